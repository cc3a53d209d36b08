"""Stand-in for mjrl, D4RL's helper package: it can be imported, and is empty."""

from _shim_names import empty

__getattr__ = empty("mjrl")
