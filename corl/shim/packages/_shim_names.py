"""What the stand-ins share: aliases of gymnasium's modules, and answers for missing names."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


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
