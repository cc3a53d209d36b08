"""Algorithm files: found by path, and loaded for their `TrainConfig` and their parts."""

import dataclasses
import functools
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from corl.config import ConfigError

# The clone of the repository: runs import from here, and its folder algorithms/ has the files.
ROOT = Path(__file__).parent.parent


# Fields that a sweep fills or reads in every config.
NEEDED = (
    *("env", "seed", "name", "runs_dir", "threads", "load_model"),
    *("offline_iterations", "online_iterations", "eval_freq"),
)


def missing_file(path: Path) -> str:
    """Says of a file of a sweep that it does not exist, and what its path is relative to."""
    if path.is_absolute():
        return f"{path} does not exist; mend its path in the sweep file"
    text = f"{path} does not exist in {Path.cwd()}, the working folder, which paths begin at"
    if (ROOT / path).is_file():
        return f"{text}; start the sweep in {ROOT}"
    return f"{text}; mend its path in the sweep file, or start the sweep elsewhere"


@functools.cache
def load_algorithm(file: str) -> ModuleType:
    """The module of an algorithm file, whose path is relative to the working folder.

    Raises:
        ConfigError: there is no such file, it cannot be imported, or it is no algorithm.
    """
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"algorithm {missing_file(path)}")
    name = "algorithm_file_" + re.sub(r"\W", "_", str(path.resolve()))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or path.suffix != ".py":
        raise ConfigError(f"algorithm {file} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    # A file without a main guard may end the program.
    except (Exception, SystemExit) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"algorithm {file} cannot be imported: {text[:300]}; mend that file"
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
    lacking = set(NEEDED) - {field.name for field in dataclasses.fields(config)}
    if lacking:
        raise ConfigError(
            f"{file}: its TrainConfig lacks {', '.join(sorted(lacking))}, which a sweep needs"
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
