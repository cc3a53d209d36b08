"""Old gym's place of `SyncVectorEnv`."""

from gym.vector import SyncVectorEnv

__all__ = ["SyncVectorEnv"]
