"""Stand-in for mujoco_py: it can be imported. Nothing in it works; environments have `env.sim`."""

from _shim_names import empty


class MujocoException(Exception):
    """Raised by mujoco_py alone, so never here."""


__getattr__ = empty("mujoco_py", ("builder", "generated", "modder", "utils"))
