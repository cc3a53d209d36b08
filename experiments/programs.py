"""Algorithm files: found by path, and loaded for their `TrainConfig` and their parts."""

import dataclasses
import functools
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from corl import machine
from corl.config import ConfigError

# The clone of the repository: runs import from here, and its folder algorithms/ has the files.
ROOT = Path(__file__).parent.parent


@functools.cache
def load_algorithm(file: str) -> ModuleType:
    """The module of an algorithm file, whose path is relative to the working folder.

    Raises:
        ConfigError: there is no such file, it cannot be imported, or it is no algorithm.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(
            f"algorithm {file} does not exist (paths are relative to "
            f"{machine.tidy_path(Path.cwd())})"
        )
    name = "algorithm_file_" + re.sub(r"\W", "_", str(path.resolve()))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or path.suffix != ".py":
        raise ConfigError(f"algorithm {file} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"algorithm {file} cannot be imported: {type(error).__name__}: {error}"
        ) from None
    config = getattr(module, "TrainConfig", None)
    if not dataclasses.is_dataclass(config):
        raise ConfigError(f"{file} is no algorithm: it has no TrainConfig")
    for fields in ("ONLINE", "BOOKKEEPING"):
        if not hasattr(config, fields):
            raise ConfigError(
                f"{file} does not say which fields are {fields}: derive its TrainConfig from "
                "corl.config.FinetuneConfig"
            )
    return module


def baseline_of(file: str) -> str:
    """The file whose offline phase an algorithm shares: its `BASELINE`, else itself.

    Raises:
        ConfigError: the file cannot be loaded, or its baseline is not beside it.
    """
    name = getattr(load_algorithm(file), "BASELINE", None)
    if name is None:
        return file
    baseline = Path(file).with_name(f"{name}.py")
    if not baseline.is_file():
        raise ConfigError(
            f"{file} shares the offline phase of {name}, but {baseline} does not exist; name "
            "that algorithm's file with `offline`"
        )
    return str(baseline)
