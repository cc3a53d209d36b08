"""gymnasium's class, under old gym's name."""

from gymnasium.utils import EzPickle

__all__ = ["EzPickle"]
