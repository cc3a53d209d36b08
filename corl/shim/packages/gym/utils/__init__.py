"""Old gym's helpers."""

from _shim_names import missing
from gymnasium.utils import EzPickle, colorize

from gym.utils import seeding

__all__ = ["EzPickle", "colorize", "seeding"]
__getattr__ = missing("gym.utils")
