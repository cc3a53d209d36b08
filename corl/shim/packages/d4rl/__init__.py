"""Stand-in for D4RL: its tasks, its datasets, its scores; see `corl.shim`."""

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import _shim_path  # noqa: F401  (first: it finds corl)
import gymnasium
import numpy as np
from _shim_names import missing

from corl import tasks
from corl.data import schema
from d4rl import infos, offline_env
from d4rl.offline_env import NormalizedBoxEnv, OfflineEnv, find_dataset

__all__ = [
    "NormalizedBoxEnv",
    "OfflineEnv",
    "ProxyEnv",
    "get_normalized_score",
    "infos",
    "offline_env",
    "qlearning_dataset",
    "sequence_dataset",
    "set_dataset_path",
]
# Modules that D4RL's scripts import so that their tasks are known; here all are.
FAMILIES = (
    "gym_mujoco",
    "locomotion",
    "hand_manipulation_suite",
    "pointmaze",
    "kitchen",
    "utils",
)


def qlearning_dataset(
    env: Any,
    dataset: dict[str, np.ndarray] | None = None,
    terminate_on_end: bool = False,
    **options: Any,
) -> dict[str, np.ndarray]:
    """D4RL's function of that name: five arrays, fresh for the caller to change.

    Args:
        env: environment of `gym.make`, wrapped or not; with a `dataset` that stores timeouts
            it may be None.
        dataset: raw rows to use instead of the task's own.
        terminate_on_end: keep the rows that end by time-out; as in D4RL their next observation
            is then the first one of the next episode.
        options: of `env.get_dataset`.
    """
    if isinstance(env, gymnasium.Env):
        # Of gymnasium's `GymV21Environment-v0`.
        env = vars(env.unwrapped)["old"]
    if dataset is None and not terminate_on_end and not options:
        return find_dataset(env.task).arrays
    raw = env.get_dataset(**options) if dataset is None else dataset
    if terminate_on_end:
        raw = {**raw, "timeouts": np.zeros(len(raw["rewards"]), dtype=bool)}
    horizon = 0
    if env is not None:
        task = getattr(env, "task", None)
        horizon = env._max_episode_steps if task is None else task.horizon
    return schema.qlearning_dataset(raw, horizon=horizon)


def sequence_dataset(
    env: Any, dataset: dict[str, np.ndarray] | None = None, **options: Any
) -> Iterator[dict[str, np.ndarray]]:
    """D4RL's function of that name: the episodes one after the other, as arrays of rows.

    An episode ends by its flag, or after the time limit where the data stores no timeouts; rows
    after the last end are left out.
    """
    raw = env.get_dataset(**options) if dataset is None else dataset
    rows = len(raw["rewards"])
    over = np.asarray(raw["terminals"], bool).reshape(rows)
    if "timeouts" in raw:
        over = over | np.asarray(raw["timeouts"], bool).reshape(rows)
    columns = [k for k, v in raw.items() if len(v) == rows and "metadata" not in k]
    start, limit = 0, 0 if "timeouts" in raw else env.task.horizon
    for row in range(rows):
        if over[row] or row - start + 1 == limit:
            yield {key: raw[key][start : row + 1] for key in columns}
            start = row + 1


def get_normalized_score(env_name: str, score: Any) -> Any:
    """D4RL's score of a task as a fraction."""
    return tasks.normalized_score(env_name, score) / 100.0


def set_dataset_path(path: str) -> None:
    """D4RL's folder of data; here `--dataset_path` says where data is, so nothing happens."""


def _families() -> None:
    """Let `import d4rl.gym_mujoco` and `d4rl.locomotion.wrappers` find this package."""
    here = sys.modules[__name__]
    for name in FAMILIES:
        sys.modules[f"{__name__}.{name}"] = here
        sys.modules[f"{__name__}.{name}.wrappers"] = here
        setattr(here, name, here)
    maze = importlib.import_module("d4rl.maze_model")
    sys.modules[f"{__name__}.pointmaze.maze_model"] = maze


_families()
ProxyEnv = NormalizedBoxEnv
__getattr__ = missing("d4rl")
