"""What the stand-ins share: aliases of gymnasium's modules, and answers for missing names."""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import _shim_path  # noqa: F401  (first: it finds corl)

from corl.shim.options import Unavailable


def alias(name: str, target: str) -> Any:
    """Make a module known as `name` too, with its submodules; the classes stay the same."""
    module = importlib.import_module(target)
    for found in list(sys.modules):
        if found == target or found.startswith(f"{target}."):
            sys.modules[name + found.removeprefix(target)] = sys.modules[found]
    return module


def missing(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a stand-in: a name that it does not have."""

    def answer(name: str) -> Any:
        raise AttributeError(f"the shim does not provide {package}.{name}")

    return answer


class Lacking:
    """A name that can be imported, and says when it is used that it is not there."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        raise Unavailable(f"the shim does not provide {self._name}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Lacking(f"{self._name}.{name}")


def empty(package: str, submodules: Sequence[str] = ()) -> Callable[[str], Any]:
    """The `__getattr__` of a package that can be imported and has nothing in it."""
    for name in submodules:
        sys.modules[f"{package}.{name}"] = sys.modules[package]

    def answer(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Lacking(f"{package}.{name}")

    return answer
