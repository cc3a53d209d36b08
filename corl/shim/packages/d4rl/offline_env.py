"""D4RL's environments: a task with its data and its scores."""

from typing import Any

import numpy as np
from gym.core import Adapter, Env
from gym.wrappers import ClipAction

from corl import envs, tasks
from corl.data import schema
from corl.shim.launch import without_stand_ins
from corl.shim.options import Unavailable, current


def find_dataset(task: tasks.Task) -> Any:
    """`sources.resolve` with the options of the shim.

    Raises:
        Unavailable: no source has the data, or the data is bad.
    """
    # Here, because it imports torch, which takes seconds and a worker does without.
    from corl.data import sources

    options = current()
    try:
        with without_stand_ins():
            return sources.resolve(task, options.source, options.path, rows=options.rows)
    except (ValueError, RuntimeError) as error:
        raise Unavailable(str(error)) from error


class OfflineEnv(Env):
    """What D4RL adds to an environment."""

    task: tasks.Task

    @property
    def ref_min_score(self) -> float | None:
        """The raw return that D4RL calls 0; None for a task that is none of D4RL's."""
        return self.task.ref_min

    @property
    def ref_max_score(self) -> float | None:
        """The raw return that D4RL calls 1; None as above."""
        return self.task.ref_max

    def get_normalized_score(self, score: Any) -> Any:
        """D4RL's score as a fraction: 0 is its random policy, 1 its expert."""
        return self.task.normalized_score(score) / 100.0

    def get_dataset(self, h5path: str | None = None) -> dict[str, np.ndarray]:
        """The raw rows, as `schema.load_hdf5` gives them; `h5path` overrides the source."""
        path = h5path or find_dataset(self.task).provenance["path"]
        return schema.load_hdf5(path, self.task)


class TaskEnv(Adapter, OfflineEnv):
    """A D4RL task without its time limit, which `gym.make` puts around it.

    Raises:
        Unavailable: the task is unknown or has no environment here.
    """

    def __init__(self, name: str):
        try:
            self.task = tasks.task(name)
            env = envs.make(self.task)
        except (ValueError, ImportError) as error:
            raise Unavailable(str(error)) from error
        super().__init__(env)


class NormalizedBoxEnv(ClipAction):
    """D4RL's wrapper: actions are clipped to the box."""

    @property
    def wrapped_env(self) -> Any:
        """The task's environment."""
        return self.env


def make(name: str) -> NormalizedBoxEnv:
    """A task behind D4RL's wrapper; no time limit yet."""
    return NormalizedBoxEnv(TaskEnv(name))
