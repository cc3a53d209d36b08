"""Old gym's environments and wrappers.

With the interface of gym 0.23 `reset()` gives the observation and `step()` observation, reward,
done, info. With that of 0.26 (`--gym-api 0.26`) `reset()` gives observation and info, and `step()`
has terminated and truncated in place of done. Wrappers here take both and give what they got.
"""

import copy
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import gymnasium

from corl.shim.options import current
from gym.simulation import Simulation

ObsType = TypeVar("ObsType")
ActType = TypeVar("ActType")


class Env(Generic[ObsType, ActType]):
    """Old gym's environment."""

    metadata: dict[str, Any] = {"render.modes": []}
    reward_range = (-float("inf"), float("inf"))
    spec: Any = None
    action_space: Any
    observation_space: Any
    _np_random: Any = None

    @property
    def np_random(self) -> Any:
        """The environment's generator, made when it is first asked for."""
        if self._np_random is None:
            self._np_random = gymnasium.utils.seeding.np_random()[0]
        return self._np_random

    @np_random.setter
    def np_random(self, value: Any) -> None:
        self._np_random = value

    @property
    def unwrapped(self) -> Any:
        """The environment without wrappers, and so without a time limit."""
        return self

    def reset(self, **options: Any) -> Any:
        """Begin an episode; the generator is seeded where `seed` is given."""
        if options.get("seed") is not None:
            self.seed(options["seed"])

    def step(self, action: Any) -> Any:
        """Take an action."""
        raise NotImplementedError

    def render(self, mode: str = "human", **options: Any) -> Any:
        """A picture, where the environment has one."""

    def close(self) -> None:
        """Free what the environment holds."""

    def seed(self, seed: int | None = None) -> list[int]:
        """Seed the generator; None draws a fresh seed."""
        self._np_random, used = gymnasium.utils.seeding.np_random(seed)
        return [int(used)]

    def __enter__(self) -> "Env":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __str__(self) -> str:
        name = type(self).__name__
        return f"<{name} instance>" if self.spec is None else f"<{name}<{self.spec.id}>>"


class Adapter(Env):
    """A gymnasium environment behind old gym's interface, without a time limit.

    What old environments offer besides (`model`, `data`, `set_state`, `dt`) is gymnasium's.
    """

    def __init__(self, env: gymnasium.Env):
        self.env = env.unwrapped
        self.observation_space = self.env.observation_space
        self.action_space = self.env.action_space
        self.metadata = {**self.env.metadata, "render.modes": ["human", "rgb_array"]}
        self._api = current().gym_api
        # For the next reset.
        self._seed: int | None = None
        self._sim: Simulation | None = None

    def seed(self, seed: int | None = None) -> list[int]:
        """Seed the episodes from the next reset on; None draws a fresh seed."""
        self._seed = int(gymnasium.utils.seeding.np_random(seed)[1])
        return [self._seed]

    def reset(self, **options: Any) -> Any:
        """Begin an episode: the observation, with its info where the interface has it.

        Options are `seed`, `options` and `return_info`.
        """
        seed = self._seed if options.get("seed") is None else options["seed"]
        self._seed = None
        observation, info = self.env.reset(seed=seed, options=options.get("options"))
        if options.get("return_info") or self._api == "0.26":
            return observation, info
        return observation

    def step(self, action: Any) -> tuple:
        """Take an action: observation, reward, done, info, or five values."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._api == "0.26":
            return observation, reward, bool(terminated), bool(truncated), info
        if truncated:
            info["TimeLimit.truncated"] = not terminated
        return observation, reward, bool(terminated or truncated), info

    def render(self, mode: str = "human", **options: Any) -> Any:
        """A picture (height, width, 3) for `rgb_array`; nothing for a window."""
        if mode == "human":
            return None
        if hasattr(self.env, "model"):
            size = {k: options[k] for k in ("width", "height") if k in options}
            return self.sim.render(**size)[::-1]
        base: Any = self.env
        base.render_mode = mode
        return base.render()

    @property
    def sim(self) -> Simulation:
        """mujoco_py's simulation of a MuJoCo environment."""
        if self._sim is None:
            base: Any = self.env
            self._sim = Simulation(base.model, base.data)
        return self._sim

    def close(self) -> None:
        """Free what the environment holds."""
        self.env.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "env":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.env, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapter":
        # Pictures hold a context of the graphics library, which cannot be copied.
        twin = copy.copy(self)
        twin.env, twin._sim = copy.deepcopy(self.env, memo), None
        return twin


def with_observation(result: Any, change: Callable[[Any], Any]) -> Any:
    """The result of a reset, its observation changed; an info dict stays."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
        return change(result[0]), result[1]
    return change(result)


class Wrapper(Env[ObsType, ActType]):
    """What it does not define is the inner environment's; private names stay hidden."""

    def __init__(self, env: Any):
        self.env = env

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"a gym wrapper hides the private attribute {name!r}")
        if name == "env":
            raise AttributeError("this wrapper was never given an environment")
        return getattr(self.env, name)

    @property
    def unwrapped(self) -> Any:
        """The innermost environment."""
        return self.env.unwrapped

    @property
    def np_random(self) -> Any:
        """The inner environment's generator."""
        return self.env.np_random

    @np_random.setter
    def np_random(self, value: Any) -> None:
        self.env.np_random = value

    @classmethod
    def class_name(cls) -> str:
        """The name of the wrapper."""
        return cls.__name__

    def reset(self, **options: Any) -> Any:
        """The inner environment's reset."""
        return self.env.reset(**options)

    def step(self, action: Any) -> Any:
        """The inner environment's step."""
        return self.env.step(action)

    def render(self, mode: str = "human", **options: Any) -> Any:
        """The inner environment's picture."""
        return self.env.render(mode, **options)

    def close(self) -> None:
        """Close the inner environment."""
        self.env.close()

    def seed(self, seed: int | None = None) -> list[int]:
        """Seed the inner environment."""
        return self.env.seed(seed)

    def __str__(self) -> str:
        return f"<{type(self).__name__}{self.env}>"


def _inner(name: str) -> property:
    """An attribute of the inner environment until the wrapper sets its own."""

    def get(self: Wrapper) -> Any:
        return self.__dict__[name] if name in self.__dict__ else getattr(self.env, name)

    def put(self: Wrapper, value: Any) -> None:
        self.__dict__[name] = value

    return property(get, put)


# `Env` has class attributes of these names, so that `__getattr__` would never be asked.
for _name in ("spec", "metadata", "reward_range", "action_space", "observation_space"):
    setattr(Wrapper, _name, _inner(_name))


class ObservationWrapper(Wrapper[ObsType, ActType]):
    """Gives `observation(x)` in place of every observation x."""

    def reset(self, **options: Any) -> Any:
        """The inner reset, its observation changed."""
        return with_observation(self.env.reset(**options), self.observation)

    def step(self, action: Any) -> tuple:
        """The inner step, its observation changed."""
        observation, *rest = self.env.step(action)
        return self.observation(observation), *rest

    def observation(self, observation: Any) -> Any:
        """The changed observation."""
        raise NotImplementedError


class RewardWrapper(Wrapper[ObsType, ActType]):
    """Gives `reward(r)` in place of every reward r."""

    def step(self, action: Any) -> tuple:
        """The inner step, its reward changed."""
        observation, reward, *rest = self.env.step(action)
        return observation, self.reward(reward), *rest

    def reward(self, reward: Any) -> Any:
        """The changed reward."""
        raise NotImplementedError


class ActionWrapper(Wrapper[ObsType, ActType]):
    """Takes `action(a)` in place of every action a."""

    def step(self, action: Any) -> tuple:
        """The inner step with the changed action."""
        return self.env.step(self.action(action))

    def action(self, action: Any) -> Any:
        """The changed action."""
        raise NotImplementedError
