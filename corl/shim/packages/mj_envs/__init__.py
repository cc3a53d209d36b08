"""Stand-in for mj_envs, the package of the Adroit hands: it can be imported, and is empty."""

from _shim_names import empty

__getattr__ = empty("mj_envs")
