"""Processes in which the policies of several seeds are evaluated at the same time, on the CPU.

A policy of one row is too small for a GPU, and an environment knows none. So a policy is copied
to processes that play its episodes, with the start states that the run itself would have.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from corl import tasks
from corl.acting import CheckedEnv, play_episodes, wrap_env
from corl.workers import Workers, request


class Episodes(NamedTuple):
    """What a process needs to play episodes of one seed."""

    make: Callable[[tasks.Task, str], gym.Env]
    task: tasks.Task
    config: Any  # of the run
    mean: Any  # of the states, (S,) or a number
    std: Any
    actor: Any  # on the CPU
    seed: int  # of the first start state
    numbers: range  # of the episodes

    def split(self, parts: int) -> list["Episodes"]:
        """The same episodes in at most so many parts, in their order."""
        if self.config.env_backend != "gymnasium" or not self.task.is_d4rls:
            # Its resets may draw from a stream that steps draw from, too.
            parts = 1
        parts = max(1, min(parts, len(self.numbers)))
        bounds = [len(self.numbers) * part // parts for part in range(parts + 1)]
        pairs = zip(bounds, bounds[1:], strict=False)
        return [self._replace(numbers=self.numbers[a:b]) for a, b in pairs]


class Evaluators:
    """So many processes, which end with this one.

    Args:
        count: processes.
    """

    def __init__(self, count: int):
        makes = [_Player] * count
        self._workers = Workers(makes, "plays evaluation episodes")
        self.failed: int | None = None  # number of the job that met an error

    def evaluate(self, jobs: Sequence[Episodes]) -> list[tuple[np.ndarray, float]]:
        """For each job the raw returns (n_episodes,) and the share of successes.

        The episodes of a job are split where there are more processes than jobs.

        Raises:
            FloatingPointError: as of `CheckedEnv`.
            Ended: a process has ended.
        """
        workers, count = self._workers, len(self._workers.processes)
        workers.ready()
        found: list[list[Any]] = [[] for _ in jobs]
        parts = [
            (number, part)
            for number, job in enumerate(jobs)
            for part in job.split(count // len(jobs))
        ]
        for place, (_, part) in enumerate(parts):
            workers.ask(place % count, request("play", part))
        for place, (number, _) in enumerate(parts):
            self.failed = number
            found[number].append(workers.answer(place % count))
        self.failed = None
        results = []
        for own in found:
            returns, successes = (
                np.concatenate(part) for part in zip(*own, strict=True)
            )
            results.append((returns, float(np.mean(successes))))
        return results

    def close(self) -> None:
        """End the processes."""
        self._workers.close()


def on_the_cpu(actor: Any) -> Any:
    """A copy of an actor that shares nothing with it."""
    return copy.deepcopy(actor).cpu()


class _Player:
    """Plays episodes, in a process of its own."""

    def play(self, part: Episodes) -> tuple[np.ndarray, np.ndarray]:
        """Raw returns (n,) and successes (n,), 0 or 1, of some episodes."""
        config = part.config
        raw = _env(part.make, part.task, config.env_backend)
        env = wrap_env(CheckedEnv(raw, "evaluation", config), part.mean, part.std)
        return play_episodes(env, part.actor, "cpu", part.numbers, part.seed)


@functools.cache
def _env(make: Callable[..., gym.Env], task: tasks.Task, backend: str) -> gym.Env:
    return make(task, backend)
