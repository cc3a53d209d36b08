"""Environments by name: what a script registers, D4RL's tasks, gymnasium's own."""

import copy
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium

from corl import envs, physics, tasks
from corl.shim.options import Unavailable, current
from gym.core import Adapter
from gym.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

# What newer gyms take in `make` and this one has no use for.
IGNORED = ("render_mode", "disable_env_checker", "autoreset", "apply_api_compatibility")
# MuJoCo's environments of before gymnasium; their v4 takes the keywords of v3.
OLD_MUJOCO = (
    "Ant|HalfCheetah|Hopper|Humanoid|HumanoidStandup|InvertedDoublePendulum|"
    "InvertedPendulum|Pusher|Reacher|Swimmer|Walker2d"
)


class UnknownKeyword(Unavailable, TypeError):
    """A keyword that an environment does not take; as a TypeError, a script may try without."""


@dataclass
class EnvSpec:
    """What is known of an environment: name, class, keywords, time limit."""

    id: str
    entry_point: Any = None
    reward_threshold: float | None = None
    nondeterministic: bool = False
    max_episode_steps: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name without its version."""
        return re.sub(r"-v\d+$", "", self.id)

    @property
    def version(self) -> int | None:
        """The version; None where the name has none."""
        found = re.search(r"-v(\d+)$", self.id)
        return int(found[1]) if found else None

    def make(self, **kwargs: Any) -> Any:
        """`gym.make` of this name."""
        return make(self.id, **kwargs)


class Registry(dict):
    """Name -> `EnvSpec`, with the attributes that gyms before 0.24 had."""

    @property
    def env_specs(self) -> "Registry":
        """The registry itself."""
        return self

    def all(self) -> Any:
        """Every `EnvSpec`."""
        return self.values()

    def spec(self, name: str) -> EnvSpec:
        """`gym.spec`."""
        return spec(name)

    def make(self, name: str, **kwargs: Any) -> Any:
        """`gym.make`."""
        return make(name, **kwargs)

    def register(self, id: str, **facts: Any) -> None:
        """`gym.register`."""
        register(id, **facts)


registry = Registry()


def register(id: str, entry_point: Any = None, **facts: Any) -> None:
    """Make an environment of the script known by a name.

    Args:
        id: the name.
        entry_point: `module:Class`, or what makes the environment.
        facts: fields of `EnvSpec`; others (`order_enforce`) are not needed here.
    """
    known = {k: v for k, v in facts.items() if k in EnvSpec.__dataclass_fields__}
    known["kwargs"] = dict(known.get("kwargs") or {})
    registry[id] = EnvSpec(id, entry_point, **known)


def load(name: str) -> Callable:
    """What `module:attribute` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def gymnasium_name(name: str) -> str | None:
    """gymnasium's environment for a name of old gym; None where it has none.

    MuJoCo's v0 to v3 are its v4, whose physics, reward and ends are theirs; other old versions
    are the oldest one that gymnasium still has.
    """
    base, _, version = name.rpartition("-v")
    if re.fullmatch(OLD_MUJOCO, base) and version in ("0", "1", "2", "3"):
        return f"{base}-v4"
    known = gymnasium.envs.registration.registry
    if name in known:
        return name
    newer = [k for k in known if re.fullmatch(re.escape(base) + r"-v\d+", k)]
    if base and version.isdigit() and newer:
        return min(newer, key=lambda k: int(k.rpartition("-v")[2]))
    return None


def spec(name: str) -> EnvSpec:
    """What is known of a name.

    Raises:
        Unavailable: it is neither registered nor D4RL's nor gymnasium's.
    """
    if name in registry:
        return registry[name]
    if (known := gymnasium_name(name)) is not None:
        theirs = gymnasium.spec(known)
        return EnvSpec(
            name,
            theirs.entry_point,
            theirs.reward_threshold,
            max_episode_steps=theirs.max_episode_steps,
            kwargs=copy.deepcopy(theirs.kwargs),
        )
    try:
        task = tasks.task(name)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    return EnvSpec(name, "d4rl.offline_env:TaskEnv", max_episode_steps=task.horizon)


def make(id: Any, **kwargs: Any) -> Any:
    """An environment behind old gym's interface, with its time limit.

    Args:
        id: name, or an `EnvSpec`.
        kwargs: of the environment's class.

    Raises:
        Unavailable: the name is unknown, or it has no environment here.
    """
    name = id.id if isinstance(id, EnvSpec) else id
    if ":" in name:
        module, _, name = name.partition(":")
        importlib.import_module(module)
    kwargs = {k: v for k, v in kwargs.items() if k not in IGNORED}
    limit = kwargs.pop("max_episode_steps", None)
    found = copy.copy(spec(name))
    found.kwargs = {**found.kwargs, **kwargs}
    env = _base(found, kwargs)
    env.unwrapped.spec = found
    limit = found.max_episode_steps if limit is None else limit
    if current().gym_api == "0.26":
        env = PassiveEnvChecker(env)
    env = OrderEnforcing(env)
    return env if limit is None else TimeLimit(env, limit)


def _base(found: EnvSpec, kwargs: dict[str, Any]) -> Any:
    """The environment of `make`, still without its time limit."""
    if found.id in registry:
        entry = found.entry_point
        return (load(entry) if isinstance(entry, str) else entry)(**found.kwargs)
    known = gymnasium_name(found.id)
    if known is None:
        if kwargs:
            words = ", ".join(kwargs)
            raise UnknownKeyword(
                f"the shim's {found.id} does not take the keywords {words}"
            )
        return importlib.import_module("d4rl.offline_env").make(found.id)
    robots = {facts.env_id: name for name, facts in tasks.ROBOTS.items() if facts.env_id}
    if known in robots and not kwargs:
        return Adapter(envs.make_robot(robots[known]))
    return Adapter(_gymnasium(known, kwargs))


def _gymnasium(name: str, kwargs: dict[str, Any]) -> gymnasium.Env:
    """gymnasium's environment, without its warning that there is a newer version."""
    level = gymnasium.logger.min_level
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    if name == "Ant-v4":
        # Ant-v2 and v3 observe the contact forces.
        kwargs = {"use_contact_forces": True, **kwargs}
    try:
        env = gymnasium.make(name, disable_env_checker=True, **kwargs)
    except (gymnasium.error.Error, ImportError) as error:
        raise Unavailable(f"gym.make({name!r}): {error}") from error
    finally:
        gymnasium.logger.min_level = level
    base: Any = env.unwrapped
    if hasattr(base, "model"):
        physics.restore_contact_margin(base.model)
    return env


def for_gymnasium(env_id: str, **kwargs: Any) -> gymnasium.Env:
    """What gymnasium's name `GymV21Environment-v0` makes: an environment of ours, for gymnasium."""
    return envs.OldGymEnv(env_id, spec(env_id).max_episode_steps or sys.maxsize)


for _name in ("GymV21Environment-v0", "GymV26Environment-v0"):
    # Not by `register`, which warns of the entry that is there and asks for a package.
    gymnasium.registry[_name] = gymnasium.envs.registration.EnvSpec(
        _name, entry_point="gym.envs.registration:for_gymnasium"
    )


def api() -> str:
    """The interface of this process's environments, "0.23" or "0.26"."""
    return current().gym_api
