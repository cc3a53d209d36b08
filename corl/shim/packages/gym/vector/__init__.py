"""Old gym's vectors of environments. They step one after the other in this process."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from _shim_names import alias, missing

import gym.envs.registration as registration
from gym.core import Env

utils = alias("gym.vector.utils", "gymnasium.vector.utils")


class VectorEnv(Env):
    """Some environments with the same spaces, stepped together.

    Args:
        num_envs: how many.
        observation_space: of one of them.
        action_space: of one of them.
    """

    def __init__(self, num_envs: int, observation_space: Any, action_space: Any):
        self.num_envs, self.is_vector_env = num_envs, True
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = utils.batch_space(observation_space, num_envs)
        self.action_space = utils.batch_space(action_space, num_envs)


class SyncVectorEnv(VectorEnv):
    """Environments of functions that make them. One that is over is reset at once.

    The last observation of an episode stands in the infos: with gym 0.23 they are a list, and it
    is `terminal_observation`; with 0.26 they are a dict, and it is in `final_observation`.
    """

    def __init__(self, env_fns: Iterable[Callable[[], Any]], **options: Any):
        self.envs = [make_one() for make_one in env_fns]
        first = self.envs[0]
        super().__init__(len(self.envs), first.observation_space, first.action_space)
        self.metadata, self.spec = first.metadata, first.spec

    def _together(self, observations: Sequence[Any]) -> Any:
        out = utils.create_empty_array(self.single_observation_space, self.num_envs)
        together = utils.concatenate(self.single_observation_space, observations, out)
        return copy.deepcopy(together)

    def seed(self, seed: Any = None) -> list[Any]:
        """Seed all: a number s gives them s, s + 1, ..."""
        if seed is None or isinstance(seed, int):
            seed = [None if seed is None else seed + i for i in range(self.num_envs)]
        return [env.seed(s) for env, s in zip(self.envs, seed, strict=True)]

    def reset(self, **options: Any) -> Any:
        """Begin an episode in each: the observations, with infos where there are."""
        if (seed := options.pop("seed", None)) is not None:
            self.seed(seed)
        results = [env.reset(**options) for env in self.envs]
        if registration.api() == "0.23" and not options.get("return_info"):
            return self._together(results)
        return self._together([r[0] for r in results]), {}

    def step(self, actions: Any) -> tuple:
        """An action for each: observations, rewards (N,), ends (N,), infos."""
        rows = list(utils.iterate(self.action_space, actions))
        steps = [list(e.step(a)) for e, a in zip(self.envs, rows, strict=True)]
        last: dict[int, Any] = {}
        for i, result in enumerate(steps):
            if any(result[2:-1]):
                last[i], again = result[0], self.envs[i].reset()
                result[0] = again[0] if len(result) == 5 else again
        observations = self._together([result[0] for result in steps])
        rewards = np.array([result[1] for result in steps], np.float64)
        ends = np.array([result[2:-1] for result in steps], bool).T
        infos = [result[-1] for result in steps]
        if len(ends) == 1:
            for i, observation in last.items():
                infos[i] = {**infos[i], "terminal_observation": observation}
            return observations, rewards, ends[0], infos
        return observations, rewards, *ends, self._as_dict(infos, last)

    def _as_dict(self, infos: list[dict], last: dict[int, Any]) -> dict[str, Any]:
        """The infos of all as one dict of arrays, `_key` says whose it is."""
        for i, observation in last.items():
            infos[i] = {"final_observation": observation, "final_info": infos[i]}
        made: dict[str, Any] = {}
        for i, info in enumerate(infos):
            for key, value in info.items():
                column = made.setdefault(key, np.full(self.num_envs, None, object))
                column[i] = value
                made.setdefault(f"_{key}", np.zeros(self.num_envs, bool))[i] = True
        return made

    def step_async(self, actions: Any) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self, **options: Any) -> tuple:
        """The step with the kept actions."""
        return self.step(self._actions)

    def call(self, name: str, *args: Any, **keywords: Any) -> tuple:
        """An attribute of each, or what it gives when called."""
        found = [getattr(env, name) for env in self.envs]
        return tuple(f(*args, **keywords) if callable(f) else f for f in found)

    def get_attr(self, name: str) -> tuple:
        """An attribute of each."""
        return self.call(name)

    def close(self, **options: Any) -> None:
        """Close all."""
        for env in self.envs:
            env.close()


class AsyncVectorEnv(SyncVectorEnv):
    """The same: a process for each environment would change no number."""


def make(
    id: str,
    num_envs: int = 1,
    asynchronous: bool = True,
    wrappers: Any = None,
    **kwargs: Any,
) -> SyncVectorEnv:
    """Some environments of a name; arguments as of gym's function of that name."""
    around = [] if wrappers is None else wrappers
    around = [around] if callable(around) else around

    def make_one() -> Any:
        env = registration.make(id, **kwargs)
        for wrap in around:
            env = wrap(env)
        return env

    return SyncVectorEnv([make_one for _ in range(num_envs)])


__getattr__ = missing("gym.vector")
