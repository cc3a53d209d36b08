"""Stand-in for mujoco_py: it can be imported. Nothing in it works; environments have `env.sim`."""

import sys
from typing import Any

import _shim_path  # noqa: F401  (first: it finds corl)

from corl.shim.options import Unavailable


class MujocoException(Exception):
    """Raised by mujoco_py alone, so never here."""


class _Lacking:
    """A name of mujoco_py: it can be imported, and says when it is used that it is not there."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        raise Unavailable(f"the shim does not provide {self.name}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Lacking(f"{self.name}.{name}")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Lacking(f"mujoco_py.{name}")


for _name in ("builder", "generated", "modder", "utils"):
    sys.modules[f"mujoco_py.{_name}"] = sys.modules[__name__]
