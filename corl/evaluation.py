"""Processes in which the policies of several seeds are evaluated at the same time, on the CPU.

A policy of one row is too small for a GPU, and an environment knows none. So a policy is copied
to a process that plays all of its episodes, with the start states that the run itself would have.
"""

import copy
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

from corl import envs, tasks
from corl.acting import CheckedEnv, eval_actor, wrap_env


class Episodes(NamedTuple):
    """What a process needs to play the episodes of one seed."""

    config: Any  # of the run
    mean: Any  # of the states, (S,) or a number
    std: Any
    actor: Any  # on the CPU
    seed: int  # of the first start state


class Evaluators:
    """So many processes, which end with this one.

    Args:
        count: processes.
    """

    def __init__(self, count: int):
        # A fork would take the GPU's threads and locks along.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, context, _begin)

    def evaluate(self, jobs: Sequence[Episodes]) -> list[tuple[np.ndarray, float]]:
        """For each job the raw returns (n_episodes,) and the share of successes.

        Raises:
            FloatingPointError: as of `CheckedEnv`.
            RuntimeError: a process has died.
        """
        return list(self._pool.map(play, jobs))

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(cancel_futures=True)


def on_the_cpu(actor: Any) -> Any:
    """A copy of an actor that shares nothing with it."""
    return copy.deepcopy(actor).cpu()


def play(job: Episodes) -> tuple[np.ndarray, float]:
    """Play the episodes of a job in this process."""
    config = job.config
    env = CheckedEnv(_env(config.env, config.env_backend), "evaluation", config)
    wrapped = wrap_env(env, job.mean, job.std)
    return eval_actor(wrapped, job.actor, "cpu", config.n_episodes, job.seed)


@functools.cache
def _env(name: str, backend: str) -> gym.Env:
    return envs.make(tasks.task(name), backend)


def _begin() -> None:
    """Settings of a process: one thread, no Ctrl-C of its own, and an end with its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
