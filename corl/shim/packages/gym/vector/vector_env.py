"""Old gym's place of `VectorEnv`."""

from gym.vector import VectorEnv

__all__ = ["VectorEnv"]
