"""Old gym's place of `AsyncVectorEnv`."""

from gym.vector import AsyncVectorEnv

__all__ = ["AsyncVectorEnv"]
