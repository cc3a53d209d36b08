"""Old gym's place of its video recorder."""

from gym.wrappers.monitoring import video_recorder

__all__ = ["video_recorder"]
