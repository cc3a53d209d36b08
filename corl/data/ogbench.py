"""OGBench's single tasks: environment and rows by its own loader.

The names are OGBench's, `ogbench:antmaze-large-navigate-singletask-v0`. Its other tasks, which give
goals, have no rewards.
"""

from pathlib import Path
from typing import Any

import numpy as np

from corl import packages
from corl.data.hdf5 import BadData

PREFIX = "ogbench:"


def is_ogbench(name: str) -> bool:
    """Is this one of OGBench's names?"""
    return name.startswith(PREFIX)


def make(name: str, **limit: Any) -> Any:
    """The environment of a task, as OGBench makes it.

    Args:
        name: as `ogbench:antmaze-large-navigate-singletask-v0`.
        limit: `max_episode_steps`, where it is not OGBench's.

    Raises:
        ValueError: OGBench is not installed, or it is no single task, or one of pictures.
        gymnasium.error.Error: OGBench has no such environment.
    """
    own = _own(name)
    return _loader(name)(own, env_only=True, **limit)


def rows(name: str, path: Path | None = None) -> dict[str, np.ndarray]:
    """The rows of a task in D4RL's columns, with their true next states.

    OGBench's rewards and ends are those of the state before the action. The walks go on at the
    goal: `terminals` are its zero `masks`, and the end of a walk is a time-out.

    Args:
        path: OGBench's `.npz` file, with its `-val.npz` beside it; default: that in OGBench's own
            folder, into which OGBench downloads it.

    Returns:
        observations and next_observations (N, S), actions (N, A), rewards, terminals and timeouts
        (N,).

    Raises:
        ValueError: as of `make`, or the file is damaged or not this task's.
        RuntimeError: there is no file, and it cannot be downloaded.
    """
    env = make(name)
    try:
        train, _ = _loader(name)(
            _own(name),
            dataset_path=None if path is None else str(path),
            dataset_only=True,
            cur_env=env,
        )
    except OSError as error:
        line = " ".join(str(error).split())
        raise RuntimeError(
            f"OGBench has no file of {name} here and cannot download it ({line}); put its .npz and "
            "-val.npz files into ~/.ogbench/data, or give the first as dataset_path"
        ) from error
    except (KeyError, ValueError, IndexError) as error:
        # A file of another task lacks columns or has others.
        line = " ".join(str(error).split())
        raise BadData(f"{path or name}: OGBench cannot read it ({line})") from error
    finally:
        env.close()
    return {
        **{key: train[key] for key in ("observations", "actions", "next_observations")},
        "rewards": train["rewards"],
        "terminals": train["masks"] == 0,
        "timeouts": train["terminals"].astype(bool),
    }


def is_its_file(path: Path) -> bool:
    """Is this an `.npz` file of OGBench, which holds no rewards?"""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as archive:
            return "rewards" not in archive.files
    except (OSError, ValueError):
        return False


def version() -> str:
    """The version of the package."""
    from importlib.metadata import version

    return version("ogbench")


def _loader(name: str) -> Any:
    return packages.require("ogbench", name).make_env_and_datasets


def _own(name: str) -> str:
    """The name without our prefix."""
    own = name.removeprefix(PREFIX)
    if "singletask" not in own.split("-"):
        head, _, version = own.rpartition("-")
        raise ValueError(
            f"{name} has goals and no rewards; OGBench's tasks with rewards are its single tasks, "
            f"as {PREFIX}{head}-singletask-{version}"
        )
    if own.startswith("visual-"):
        raise ValueError(
            f"{name} shows pictures, and every algorithm here takes one vector; take {PREFIX}"
            f"{own.removeprefix('visual-')}"
        )
    return own
