"""Old gym's video recorder. It records nothing: the shim makes no videos."""

from typing import Any


class VideoRecorder:
    """Takes what the recorder takes, and does nothing with it."""

    def __init__(self, env: Any, *args: Any, **options: Any):
        self.env, self.enabled = env, False

    def capture_frame(self) -> None:
        """Take no picture."""

    def close(self) -> None:
        """Write no file."""
