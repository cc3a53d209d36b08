"""Algorithm files: found by path, and loaded for their `TrainConfig` and their parts."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from corl.layers import ConfigError, without_idle
from corl.trained import load_program

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
    module = load_program(path)
    config = module.TrainConfig
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


def working_settings(algorithm: str, config: Mapping) -> dict[str, Any]:
    """The settings of a stored run without those that others leave nothing to do.

    Those of an algorithm that is not among ours, or whose file cannot be loaded, stay as they are.

    Args:
        algorithm: name of the file, as `dare_iql`.
        config: its settings, nested.
    """
    try:
        module = load_algorithm(str(ROOT / "algorithms" / f"{algorithm}.py"))
    except ConfigError:
        return dict(config)
    return without_idle(module.TrainConfig, dict(config), dict(config), origin=None)


def baseline_of(file: str) -> str:
    """The file whose offline phase an algorithm shares: its `BASELINE` or that of it, else itself.

    Raises:
        ConfigError: the file cannot be loaded, or its baseline is not beside it.
    """
    name = getattr(load_algorithm(file), "BASELINE", None)
    if name in (None, Path(file).stem):
        return file
    baseline = Path(file).with_name(f"{name}.py")
    if not baseline.is_file():
        raise ConfigError(
            f"{file} shares the offline phase of {name}, but {baseline} does not exist; name "
            "that algorithm's file with `offline`"
        )
    return baseline_of(str(baseline))
