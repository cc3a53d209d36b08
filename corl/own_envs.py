"""A gymnasium environment of the user's own as a task: any with Box spaces and a time limit.

Algorithms act in [-1, 1]. The environment gets actions of its own range, shape and type, and its
observations become vectors. The id is gymnasium's, as `Hopper-v5`, or `my_package:MyEnv-v0`, for
which gymnasium imports `my_package` first, from the folder of the command where it lies there.
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

from corl import tasks


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
        ref_min, ref_max: raw returns of the scores 0 and 100; default: results are raw returns.

    Raises:
        ValueError: gymnasium cannot make it, its spaces are no Box, its actions have no finite
            range, or it has no time limit. The message says what to do.
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
    assert isinstance(states, Box) and isinstance(actions, Box)
    low, high = (side.ravel().tolist() for side in (actions.low, actions.high))
    bounds: tasks.Bounds | None = tuple(low), tuple(high)
    if set(low) == {-1.0} and set(high) == {1.0}:
        bounds = None
    sizes = int(np.prod(states.shape)), int(np.prod(actions.shape))
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
    shape = env.observation_space.shape
    if shape is not None and len(shape) != 1:
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
            limit: dict[str, Any] = (
                {} if horizon is None else {"max_episode_steps": horizon}
            )
            return gym.make(env_id, disable_env_checker=True, **limit)
    except (gym.error.Error, ImportError) as error:
        line = " ".join(str(error).split())
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
    if not isinstance(states, Box):
        raise ValueError(
            f"{env_id} has the observations {_one_line(states)}, and every algorithm here needs "
            "one vector, a gymnasium.spaces.Box; register it with the wrapper "
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


def _one_line(space: Any) -> str:
    return " ".join(str(space).split())[:200]
