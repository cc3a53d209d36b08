"""What `normalize_reward` does, offline and online, and returns of a dataset's episodes."""

from collections.abc import Callable
from typing import Any, Dict, NamedTuple, Optional, Tuple

import numpy as np

from corl import tasks

# Where the smallest and the largest return of a dataset come from: its episodes as they are in the
# file, or upstream's walk over the rows that D4RL's rules leave. Results say which they used.
EPISODES, UPSTREAM = "episodes", "upstream"


def scales_by_span(env_name: str) -> bool:
    """Is this a task whose rewards are scaled by the span of returns?

    D4RL's users do so in locomotion, and here it is done in every environment that is not D4RL's.
    """
    robots = ("halfcheetah", "hopper", "walker2d")
    return not _is_d4rls(env_name) or any(robot in env_name for robot in robots)


def is_antmaze(env_name: str) -> bool:
    """Is this one of D4RL's antmaze tasks?"""
    return _is_d4rls(env_name) and "antmaze" in env_name


def _is_d4rls(env_name: str) -> bool:
    return env_name.partition("-")[0] in tasks.ROBOTS


def return_rule(config: Any) -> str:
    """The rule for a config's return range: upstream's with `compat`, else the episodes'."""
    return UPSTREAM if getattr(config, "compat", False) else EPISODES


def return_reward_range(dataset: Dict, max_episode_steps: int) -> Tuple[float, float]:
    """Smallest and largest return of the dataset's finished episodes, by upstream's rule.

    An episode ends at a terminal or after `max_episode_steps` rows. D4RL drops the time-out rows,
    so long episodes drift against each other.

    Raises:
        ValueError: no episode is finished.
    """
    returns, total, length = [], 0.0, 0
    for reward, done in zip(
        dataset["rewards"].tolist(), dataset["terminals"].tolist(), strict=True
    ):
        total, length = total + reward, length + 1
        if done or length == max_episode_steps:
            returns.append(total)
            total, length = 0.0, 0
    if not returns:
        raise ValueError(
            "the dataset holds no finished episode, so its return range is unknown"
        )
    return min(returns), max(returns)


def _scale_by_span(
    dataset: Dict,
    env_name: str,
    max_episode_steps: int,
    return_range: Optional[Tuple[float, float]] = None,
) -> Dict:
    if not scales_by_span(env_name):
        return {}
    if return_range is None:
        return_range = return_reward_range(dataset, max_episode_steps)
    low, high = return_range
    if not high > low:
        raise ValueError(
            "normalize_reward divides rewards by the span of the dataset's returns, but every "
            f"finished episode returns {low:g}; set normalize_reward to false"
        )
    dataset["rewards"] /= high - low  # two roundings, as upstream
    dataset["rewards"] *= max_episode_steps
    return {"min_ret": low, "max_ret": high, "max_episode_steps": max_episode_steps}


def modify_reward(
    dataset: Dict,
    env_name: str,
    max_episode_steps: int = 1000,
    return_range: Optional[Tuple[float, float]] = None,
) -> Dict:
    """Change `dataset["rewards"]` (N,) in place; returns what online rewards need.

    Locomotion and environments that are not D4RL's: scaled so that returns span
    `max_episode_steps`. Antmaze: reward - 1.

    Args:
        return_range: smallest and largest return; default: those of `return_reward_range`.

    Raises:
        ValueError: no episode is finished, or all have the same return.
    """
    args = _scale_by_span(dataset, env_name, max_episode_steps, return_range)
    if is_antmaze(env_name):
        dataset["rewards"] -= 1.0
    return args


def modify_reward_online(reward: float, env_name: str, **kwargs: Any) -> float:
    """The same for one reward; `kwargs` is what `modify_reward` returned."""
    if scales_by_span(env_name):
        span = kwargs["max_ret"] - kwargs["min_ret"]
        return reward / span * kwargs["max_episode_steps"]
    return reward - 1.0 if is_antmaze(env_name) else reward


def modify_reward_linear(
    dataset: Dict,
    env_name: str,
    max_episode_steps: int = 1000,
    reward_scale: float = 1.0,
    reward_bias: float = 0.0,
    return_range: Optional[Tuple[float, float]] = None,
) -> Dict:
    """The rule of the CQL family: `modify_reward` for locomotion, then scale and bias."""
    args = _scale_by_span(dataset, env_name, max_episode_steps, return_range)
    dataset["rewards"] = dataset["rewards"] * reward_scale + reward_bias
    return {**args, "reward_scale": reward_scale, "reward_bias": reward_bias}


def modify_reward_linear_online(
    reward: float,
    env_name: str,
    reward_scale: float = 1.0,
    reward_bias: float = 0.0,
    **kwargs: Any,
) -> float:
    """The same for one reward; `kwargs` is what `modify_reward_linear` returned."""
    if scales_by_span(env_name):
        reward = modify_reward_online(reward, env_name, **kwargs)
    return reward * reward_scale + reward_bias


class RewardRule(NamedTuple):
    """How `normalize_reward` changes rewards.

    offline: (dataset, task name, config, return range or None) -> arguments of `online`; changes
        the dataset. Without a range that of `return_reward_range` is taken.
    online: (reward, task name, **arguments) -> reward, a linear function of the reward.
    """

    offline: Callable[[Dict, str, Any, Optional[Tuple[float, float]]], Dict]
    online: Callable[..., float]


SPAN_REWARDS = RewardRule(
    lambda dataset, env, config, return_range: modify_reward(
        dataset, env, return_range=return_range
    ),
    modify_reward_online,
)
LINEAR_REWARDS = RewardRule(
    lambda dataset, env, config, return_range: modify_reward_linear(
        dataset,
        env,
        reward_scale=config.reward_scale,
        reward_bias=config.reward_bias,
        return_range=return_range,
    ),
    modify_reward_linear_online,
)


def episode_ends(dataset: Dict, horizon: int) -> np.ndarray:
    """Which rows end an episode, bool (N,).

    That is at a terminal, where the next row does not go on from this one, and after so many rows.
    """
    jump = dataset["observations"][1:] - dataset["next_observations"][:-1]
    ends = np.append(np.linalg.norm(jump, axis=1) > 1e-6, True)
    ends |= dataset["terminals"].astype(bool)
    # The row where each stretch begins.
    first = np.append(0, np.flatnonzero(ends)[:-1] + 1)
    lengths = np.diff(np.append(first, len(ends)))
    position = np.arange(len(ends)) - np.repeat(first, lengths)
    return ends | ((position + 1) % horizon == 0)


def get_return_to_go(dataset: Dict, task: tasks.Task, config: Any) -> np.ndarray:
    """Discounted return from every row to the end of its episode, (N,), float64.

    Raw observations, rewards as trained on. `episode_ends` says where an episode ends. With
    `is_sparse_reward` an episode whose last reward is that of failure never ends: each of its rows
    gets r / (1 - discount).
    """
    if config.is_sparse_reward and config.discount == 1:
        raise ValueError(
            "is_sparse_reward with discount 1 makes the return of an endless failure infinite; "
            "set discount below 1"
        )
    rewards, ends = dataset["rewards"], episode_ends(dataset, task.horizon)
    if config.is_sparse_reward and task.ref_min is None:
        raise ValueError(
            "is_sparse_reward needs the reward of a failure; give it as ref_min_score, with a "
            "ref_max_score"
        )
    failure = (task.ref_min or 0.0) * config.reward_scale + config.reward_bias
    returns = np.empty(len(rewards))
    values, lasts = rewards.tolist(), ends.tolist()
    total, endless = 0.0, False
    for row in range(len(values) - 1, -1, -1):
        if lasts[row]:
            endless = config.is_sparse_reward and bool(rewards[row] == failure)
            total = values[row] / (1 - config.discount) if endless else 0.0
        if not endless:
            total = values[row] + config.discount * total
        returns[row] = total
    return returns
