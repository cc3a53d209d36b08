"""Named so that files which import D4RL's point mazes can be read."""

from typing import Any

from gym.core import Env

from corl.shim.options import Unavailable


class MazeEnv(Env):
    """D4RL's point maze, which cannot be used here."""

    def __init__(self, *args: Any, **options: Any):
        raise Unavailable("the shim does not provide d4rl.pointmaze.MazeEnv")
