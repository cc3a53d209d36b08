"""Packages that only some tasks need, and what installs them."""

import importlib
from typing import Any

# Package that is imported -> the requirements file that pins it.
FILES = {
    "minari": "requirements-minari.txt",
    "gymnasium_robotics": "requirements-robotics.txt",
    "ogbench": "requirements-ogbench.txt",
}


def require(package: str, wanted_by: str) -> Any:
    """A package of `FILES`, imported.

    Args:
        wanted_by: what needs it, in words.

    Raises:
        ValueError: it, or a package that it needs, cannot be imported; the message has the command
            that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        line = " ".join(str(error).split())
        raise ValueError(
            f"{wanted_by} needs the package {package} ({line}); {install(package)}"
        ) from error


def install(package: str) -> str:
    """The command that installs a package of `FILES`."""
    return f"pip install -r {FILES[package]}"
