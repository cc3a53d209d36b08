"""Old gym's wrappers; each can also be had from a submodule, `gym.wrappers.time_limit`."""

import re
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from _shim_names import missing

from corl.shim.options import Unavailable
from gym.core import (
    ActionWrapper,
    Env,
    ObservationWrapper,
    RewardWrapper,
    Wrapper,
    with_observation,
)


class TransformObservation(ObservationWrapper):
    """Applies `f` to every observation."""

    def __init__(self, env: Any, f: Callable):
        super().__init__(env)
        self.f = f

    def observation(self, observation: Any) -> Any:
        """The changed observation."""
        return self.f(observation)


class TransformReward(RewardWrapper):
    """Applies `f` to every reward."""

    def __init__(self, env: Any, f: Callable):
        super().__init__(env)
        self.f = f

    def reward(self, reward: Any) -> Any:
        """The changed reward."""
        return self.f(reward)


class TimeLimit(Wrapper):
    """Ends an episode after so many steps; a time-out is `done`, and the info says so."""

    def __init__(self, env: Any, max_episode_steps: int | None = None):
        super().__init__(env)
        if max_episode_steps is None:
            max_episode_steps = env.spec.max_episode_steps
        self._max_episode_steps: Any = max_episode_steps
        self._elapsed_steps = 0

    def reset(self, **options: Any) -> Any:
        """The inner reset; the count of steps begins anew."""
        self._elapsed_steps = 0
        return self.env.reset(**options)

    def step(self, action: Any) -> tuple:
        """The inner step, over when the limit is reached."""
        observation, reward, *over, info = self.env.step(action)
        self._elapsed_steps += 1
        if self._elapsed_steps >= self._max_episode_steps:
            if len(over) == 2:
                over[1] = True
            else:
                info["TimeLimit.truncated"] = not over[0]
                over[0] = True
        return observation, reward, *over, info


class RecordEpisodeStatistics(Wrapper):
    """Puts return, length and seconds of an episode into the info of its last step."""

    def __init__(self, env: Any, deque_size: int = 100):
        super().__init__(env)
        self.start = time.time()
        self.episode_return, self.episode_length, self.episode_count = 0.0, 0, 0
        self.return_queue: deque = deque(maxlen=deque_size)
        self.length_queue: deque = deque(maxlen=deque_size)

    def reset(self, **options: Any) -> Any:
        """The inner reset; the sums begin anew."""
        self.episode_return, self.episode_length = 0.0, 0
        return self.env.reset(**options)

    def step(self, action: Any) -> tuple:
        """The inner step; its info has `episode` at the end: r, l and t."""
        observation, reward, *over, info = self.env.step(action)
        self.episode_return += reward
        self.episode_length += 1
        if any(over):
            seconds = round(time.time() - self.start, 6)
            sums = {"r": self.episode_return, "l": self.episode_length, "t": seconds}
            info = {**info, "episode": sums}
            self.return_queue.append(self.episode_return)
            self.length_queue.append(self.episode_length)
            self.episode_count += 1
            self.episode_return, self.episode_length = 0.0, 0
        return observation, reward, *over, info


class ClipAction(ActionWrapper):
    """Clips actions to the box."""

    def action(self, action: Any) -> Any:
        """The action inside the box."""
        return np.clip(action, self.action_space.low, self.action_space.high)


class RescaleAction(ActionWrapper):
    """Takes actions of [a, b] and gives the environment its own range."""

    def __init__(self, env: Any, a: Any, b: Any):
        super().__init__(env)
        space = env.action_space
        self.a = np.zeros(space.shape, space.dtype) + a
        self.b = np.zeros(space.shape, space.dtype) + b
        self.action_space = gymnasium.spaces.Box(self.a, self.b, dtype=space.dtype)

    def action(self, action: Any) -> Any:
        """The action in the environment's range."""
        low, high = self.env.action_space.low, self.env.action_space.high
        scaled = low + (high - low) * ((action - self.a) / (self.b - self.a))
        return np.clip(scaled, low, high)


class FlattenObservation(ObservationWrapper):
    """Gives every observation as one vector."""

    def __init__(self, env: Any):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.flatten_space(env.observation_space)

    def observation(self, observation: Any) -> Any:
        """The observation as a vector."""
        return gymnasium.spaces.flatten(self.env.observation_space, observation)


class FrameStack(Wrapper):
    """Gives the last `num_stack` observations, (num_stack, ...)."""

    def __init__(self, env: Any, num_stack: int, lz4_compress: bool = False):
        super().__init__(env)
        self.num_stack = num_stack
        self.frames: deque = deque(maxlen=num_stack)
        space = env.observation_space
        low, high = (np.stack([x] * num_stack) for x in (space.low, space.high))
        self.observation_space = gymnasium.spaces.Box(low, high, dtype=space.dtype)

    def reset(self, **options: Any) -> Any:
        """The inner reset, its observation repeated."""

        def fill(observation: Any) -> np.ndarray:
            self.frames.extend([observation] * self.num_stack)
            return np.stack(self.frames)

        return with_observation(self.env.reset(**options), fill)

    def step(self, action: Any) -> tuple:
        """The inner step with the last observations."""
        observation, *rest = self.env.step(action)
        self.frames.append(observation)
        return np.stack(self.frames), *rest


class OrderEnforcing(Wrapper):
    """Refuses a step before the first reset."""

    def __init__(self, env: Any):
        super().__init__(env)
        self._began = False

    def reset(self, **options: Any) -> Any:
        """The inner reset."""
        self._began = True
        return self.env.reset(**options)

    def step(self, action: Any) -> Any:
        """The inner step.

        Raises:
            ResetNeeded: there was no reset yet.
        """
        if not self._began:
            raise gymnasium.error.ResetNeeded("call reset() before step()")
        return self.env.step(action)


class PassiveEnvChecker(Wrapper):
    """Checks nothing; gym 0.26 has it around every environment."""


class Monitor(Wrapper):
    """Records nothing: the shim makes no videos."""

    def __init__(self, env: Any, *args: Any, **options: Any):
        super().__init__(env)


class RecordVideo(Monitor):
    """Records nothing: the shim makes no videos."""


class PixelObservationWrapper(Wrapper):
    """Named here so that files which import it can be read; it cannot be used."""

    def __init__(self, env: Any, *args: Any, **options: Any):
        raise Unavailable(
            "the shim does not provide gym.wrappers.PixelObservationWrapper"
        )


def _submodules() -> None:
    """Let `gym.wrappers.time_limit` and the like be this module."""
    for name, found in list(globals().items()):
        if isinstance(found, type) and issubclass(found, Env) and found is not Env:
            words = re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()
            for module in (words, words.removesuffix("_wrapper")):
                sys.modules[f"{__name__}.{module}"] = sys.modules[__name__]


_submodules()
__getattr__ = missing("gym.wrappers")
