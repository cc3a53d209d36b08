"""An environment that is not D4RL's as a task: any with Box spaces and a time limit.

Algorithms act in [-1, 1]. The environment gets actions of its own range, shape and type, and its
observations become vectors. The id is gymnasium's, as `Hopper-v5`, or `my_package:MyEnv-v0`, for
which gymnasium imports `my_package` first, from the folder of the command where it lies there. It
may be the environment that a Minari dataset records (`minari:D4RL/pen/human-v2`), or OGBench's
(`ogbench:antmaze-large-navigate-singletask-v0`).
"""

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import FlattenObservation, TimeLimit

from corl import packages, tasks
from corl.data import minari, ogbench

# Before a dataset's id: the environment that the dataset records.
MINARI = "minari:"


@functools.cache
def task(
    env_id: str,
    horizon: int | None = None,
    ref_min: float | None = None,
    ref_max: float | None = None,
) -> tasks.Task:
    """The task of an environment, which is made once to look at it.

    Args:
        env_id: gymnasium's id.
        horizon: time limit in steps; default: the environment's own.
        ref_min, ref_max: raw returns of the scores 0 and 100; default: those that a Minari dataset
            records, else results are raw returns.

    Raises:
        ValueError: gymnasium cannot make it, its spaces are no Box, its actions have no finite
            range, or it has no time limit. The message says what to do.
        RuntimeError: a Minari dataset cannot be had.
    """
    env = _gym_make(env_id, horizon)
    try:
        states, actions = env.observation_space, env.action_space
        _check_spaces(env_id, states, actions)
        limit = horizon or _time_limit(env)
    finally:
        env.close()
    if limit is None:
        raise ValueError(
            f"{env_id} has no time limit; give one in steps: --horizon 1000 (or horizon in the "
            "YAML file)"
        )
    assert isinstance(actions, Box)
    if env_id.startswith(MINARI) and ref_min is None:
        ref_min, ref_max = minari.reference_scores(env_id.removeprefix(MINARI))
    low, high = (side.ravel().tolist() for side in (actions.low, actions.high))
    bounds: tasks.Bounds | None = tuple(low), tuple(high)
    if set(low) == {-1.0} and set(high) == {1.0}:
        bounds = None
    width = gym.spaces.flatten_space(states).shape
    assert width is not None
    sizes = int(np.prod(width)), int(np.prod(actions.shape))
    return tasks.Task(
        env_id, "", "", "", env_id, *sizes, ref_min, ref_max, limit, bounds
    )


def about_actions(task: tasks.Task) -> str:
    """A line on the range of the environment's actions; empty where it is [-1, 1]."""
    if task.bounds is None:
        return ""
    low, high = task.bounds
    ranges = dict.fromkeys(f"[{a:g}, {b:g}]" for a, b in zip(low, high, strict=True))
    shown = ", ".join([*ranges][:4]) + (", ..." if len(ranges) > 4 else "")
    return (
        f"{task.name}: actions of the environment's range {shown} are rescaled to [-1, 1], in "
        "which the algorithm acts"
    )


def make(task: tasks.Task) -> gym.Env:
    """The environment of a task of `task`, as algorithms see it, with its time limit.

    Returns:
        An environment with observations (S,) and actions (A,) in [-1, 1].

    Raises:
        ValueError: gymnasium cannot make it.
    """
    env = _gym_make(task.env_id, task.horizon)
    if len(env.observation_space.shape or ()) != 1:
        env = FlattenObservation(env)
    return UnitActions(env, task)


class UnitActions(gym.Wrapper):
    """Takes actions (A,) of [-1, 1]; the environment gets them in its own range and shape.

    Args:
        env: the environment.
        task: knows the range.
    """

    def __init__(self, env: gym.Env, task: tasks.Task):
        super().__init__(env)
        self._task, self._own = task, env.action_space
        self.action_space = Box(-1.0, 1.0, (task.action_dim,), np.float32)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take an action (A,)."""
        own: Any = self._own
        # In the type of the space, since environments may ask whether it holds the action.
        inside = self._task.to_env(np.clip(action, -1.0, 1.0)).astype(own.dtype)
        return self.env.step(inside.reshape(own.shape))


def _gym_make(env_id: str, horizon: int | None) -> gym.Env:
    """gymnasium's environment; errors of its own as a ValueError of one line."""
    if ":" in env_id and os.getcwd() not in sys.path:
        # Last, so that no file there stands before a package of the same name.
        sys.path.append(os.getcwd())
    try:
        with _quiet():
            # The checker's remarks are for whoever writes the environment, and its wrapper costs
            # time in each step.
            options: dict[str, Any] = {"disable_env_checker": True}
            if horizon is not None:
                options["max_episode_steps"] = horizon
            if env_id.startswith(MINARI):
                return minari.recover(env_id.removeprefix(MINARI), **options)
            if ogbench.is_ogbench(env_id):
                return ogbench.make(env_id, **options)
            if tasks.ROBOTICS.match(env_id):
                packages.require("gymnasium_robotics", env_id)
            return gym.make(env_id, **options)
    except (gym.error.Error, ImportError) as error:
        line = " ".join(str(error).split())
        for package in packages.FILES:
            if isinstance(error, ImportError) and package in line:
                line = f"{line.rstrip('.')}; {packages.install(package)}"
        raise ValueError(f"gymnasium cannot make {env_id}: {line}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, gymnasium says at no make that there is a newer version."""
    level = gym.logger.min_level
    gym.logger.min_level = gym.logger.ERROR
    try:
        yield
    finally:
        gym.logger.min_level = level


def _time_limit(env: gym.Env) -> int | None:
    """The time limit that an environment brings along, in steps."""
    if env.spec is not None and env.spec.max_episode_steps:
        return env.spec.max_episode_steps
    wrapper = env
    while isinstance(wrapper, gym.Wrapper):
        if isinstance(wrapper, TimeLimit):
            return int(wrapper._max_episode_steps)
        wrapper = wrapper.env
    return None


def _check_spaces(env_id: str, states: Any, actions: Any) -> None:
    """Raise ValueError unless both are boxes that algorithms can work with."""
    if not isinstance(actions, Box) or actions.dtype.kind != "f":
        raise ValueError(
            f"{env_id} has the actions {_one_line(actions)}, and every algorithm here needs real "
            "numbers in a range, a gymnasium.spaces.Box of floats; discrete actions are not for "
            "them"
        )
    if not _is_boxes(states):
        raise ValueError(
            f"{env_id} has the observations {_one_line(states)}, and every algorithm here needs "
            "one vector, a gymnasium.spaces.Box or a Dict of such; register it with the wrapper "
            "gymnasium.wrappers.FlattenObservation"
        )
    low, high = actions.low.ravel(), actions.high.ravel()
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        if not (np.isfinite(a) and np.isfinite(b) and a < b):
            raise ValueError(
                f"{env_id}: action {i} has the range [{a:g}, {b:g}], and only a finite one can be "
                "rescaled to [-1, 1]; give action_space = Box(low, high) with finite bounds, in "
                "the environment or by gymnasium.wrappers.TransformAction around it"
            )


def _is_boxes(space: Any) -> bool:
    """Is this a Box, or a Dict or Tuple of such, which gymnasium can make one vector of?"""
    if isinstance(space, Box):
        return True
    parts = getattr(space, "spaces", ())
    parts = parts.values() if isinstance(parts, dict) else parts
    return bool(parts) and all(map(_is_boxes, parts))


def _one_line(space: Any) -> str:
    return " ".join(str(space).split())[:200]
