"""A dataset as it is trained on: found, rewards scaled, states normalized."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, Dict, NamedTuple, Optional, Tuple

import numpy as np
import torch

from corl import finite, machine, tasks
from corl.buffers import ReplayBuffer
from corl.data import sources
from corl.rewards import (
    EPISODES,
    SPAN_REWARDS,
    RewardRule,
    get_return_to_go,
    return_reward_range,
    return_rule,
    scales_by_span,
)

# Floats that an update keeps for each row of its batch, at least: two critics with two hidden
# layers of 256.
HIDDEN = 2 * 2 * 256


def compute_mean_std(states: np.ndarray, eps: float) -> Tuple[np.ndarray, np.ndarray]:
    """Mean (S,) and standard deviation + eps (S,) of states (N, S)."""
    return states.mean(0), states.std(0) + eps


def normalize_states(
    states: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> np.ndarray:
    """(states - mean) / std, of the shape of the states."""
    return (states - mean) / std


class Normalization:
    """The normalization of states: `apply` it, `undo` it.

    Args:
        mean, std: (S,), or (1,) for none.
        device: where `undo` works.
    """

    def __init__(self, mean: np.ndarray, std: np.ndarray, device: str = "cpu"):
        self.mean, self.std = mean, std
        self._mean, self._std = (
            torch.as_tensor(x, dtype=torch.float32, device=device) for x in (mean, std)
        )

    def apply(self, states: np.ndarray) -> np.ndarray:
        """Raw states (..., S) -> normalized states."""
        return normalize_states(states, self.mean, self.std)

    def undo(self, states: torch.Tensor) -> torch.Tensor:
        """Normalized states (..., S) -> raw states, but for float32 rounding."""
        return states * self._std + self._mean


class Data(NamedTuple):
    """A dataset as it is trained on.

    arrays: q-learning arrays of N rows, states normalized, rewards scaled.
    provenance: where they come from.
    normalization: of the states.
    reward_args: what the online reward rule needs.
    return_range: tells the smallest and the largest return of rewards as trained on, and puts
        into the provenance that it was asked. Raises ValueError where there are no episodes.
    """

    arrays: Dict[str, np.ndarray]
    provenance: Dict[str, Any]
    normalization: Normalization
    reward_args: Dict[str, Any]
    return_range: Callable[[], Tuple[float, float]]


def load_data(
    config: Any, task: tasks.Task, device: str = "cpu", rule: Optional[str] = None
) -> Data:
    """Find a config's dataset and prepare it for training.

    The config's class may say `REWARDS`, what `normalize_reward` does, and `MC_RETURNS`, whether
    rows need their return-to-go, and `NEXT_ACTIONS`, whether they need the action after them.

    Args:
        rule: where the return range comes from; default: `return_rule` of the config.

    Raises:
        ValueError, RuntimeError: see `sources.resolve`; a dataset larger than the buffer, or
            without the episodes that the settings need; rewards, returns-to-go or normalized
            states that are not finite, or whose squares are not.
    """
    rule = rule or return_rule(config)
    dataset = sources.resolve(
        task,
        source=config.dataset_source,
        path=config.dataset_path,
        rows=config.dataset_rows,
        next_actions=keeps_next_actions(config),
    )
    arrays = dataset.arrays
    if len(arrays["rewards"]) > config.buffer_size:
        raise ValueError(
            f"buffer_size {config.buffer_size} is smaller than the dataset of "
            f"{len(arrays['rewards'])} rows; set it to at least {len(arrays['rewards'])}"
        )
    # What overflows here is said below, in an error.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        try:
            reward_args = _prepare_rewards(dataset, task, config, rule)
            return_range = _trained_range(
                config, dataset, rule, reward_args, task.horizon
            )
            normalization = _normalize(arrays, config, device)
        except ValueError as error:
            raise ValueError(f"{dataset.provenance['path']}: {error}") from None
    provenance = dataset.provenance
    return Data(arrays, provenance, normalization, reward_args, return_range)


def _prepare_rewards(
    dataset: sources.Dataset, task: tasks.Task, config: Any, rule: str
) -> Dict[str, Any]:
    """Scale the rewards in place and add returns-to-go; returns what online rewards need."""
    arrays, reward_args = dataset.arrays, {}
    if keeps_mc_returns(config):
        require_episodes(dataset.provenance, "returns-to-go")
    if config.normalize_reward:
        reward_args = _scale_rewards(config, dataset, rule)
        _check("rewards", arrays["rewards"], "normalize_reward")
    if keeps_mc_returns(config):
        arrays["mc_returns"] = get_return_to_go(arrays, task, config)
        _check(
            "rewards", arrays["mc_returns"], "the sum that makes returns-to-go of them"
        )
    return reward_args


def _normalize(arrays: Dict[str, np.ndarray], config: Any, device: str) -> Normalization:
    """Normalize the states in place."""
    mean, std = np.zeros(1, np.float32), np.ones(1, np.float32)
    if config.normalize:
        mean, std = compute_mean_std(arrays["observations"], eps=1e-3)
        # An infinite deviation would make every state 0.
        for name, values in (("mean", mean), ("standard deviation", std)):
            _check("observations", values, f"their {name} (normalize)")
    normalization = Normalization(mean, std, device)
    for key in ("observations", "next_observations"):
        arrays[key] = normalization.apply(arrays[key])
        _check(key, arrays[key], "normalize")
    return normalization


def _check(key: str, values: np.ndarray, made_by: str) -> None:
    """Raises ValueError where float32 cannot hold the squares of what a setting made of a key."""
    largest = max(values.max(), -values.min())
    # Not "larger than": comparisons with nan are false.
    if not largest <= finite.LARGEST:
        raise ValueError(
            f"{key} cannot be used after {made_by}: the largest value is {largest:g}, "
            f"{finite.rule(largest)}; mend the data"
        )


def require_episodes(provenance: Dict[str, Any], purpose: str) -> None:
    """Raise where rows are shuffled, so that nothing that is summed over episodes exists."""
    if provenance.get("order") == "shuffled":
        raise ValueError(
            "the rows are shuffled, so there are no episodes, and "
            f"{purpose} cannot be computed; give a file with rows in order, or an algorithm "
            "and settings that need none (IQL, normalize_reward false, a literal scale of Q)"
        )


def _range_of(returns: np.ndarray) -> Tuple[float, float]:
    """Smallest and largest of returns (E,)."""
    if not len(returns):
        raise ValueError(
            "the dataset holds no finished episode, so its return range is unknown"
        )
    return float(returns.min()), float(returns.max())


def _scale_rewards(config: Any, dataset: sources.Dataset, rule: str) -> Dict[str, Any]:
    """Change a dataset's rewards by the algorithm's rule; returns what online rewards need."""
    bounds = None
    if scales_by_span(config.env):
        require_episodes(dataset.provenance, "normalize_reward")
        bounds = _range_of(dataset.returns) if rule == EPISODES else None
    args = reward_rule(config).offline(dataset.arrays, config.env, config, bounds)
    if "min_ret" in args:
        _note_range(dataset.provenance, rule, args["min_ret"], args["max_ret"])
    return args


def _note_range(provenance: Dict[str, Any], rule: str, low: float, high: float) -> None:
    """Keep the first range that a run uses. Where rewards are scaled, it is that of the file's."""
    provenance.setdefault("return_range", {"low": low, "high": high, "rule": rule})


def _trained_range(
    config: Any,
    dataset: sources.Dataset,
    rule: str,
    reward_args: Dict[str, Any],
    horizon: int,
) -> Callable[[], Tuple[float, float]]:
    """`Data.return_range`, which must not keep the dataset's states in memory."""
    provenance, returns, lengths = dataset.provenance, dataset.returns, dataset.lengths
    rows = {key: dataset.arrays[key] for key in ("rewards", "terminals")}
    if config.normalize_reward:
        online, env = reward_rule(config).online, config.env
        per_row = online(0.0, env, **reward_args)
        per_reward = online(1.0, env, **reward_args) - per_row
        returns = returns * per_reward + lengths * per_row

    def return_range() -> Tuple[float, float]:
        try:
            require_episodes(provenance, "the scale of returns")
            if rule == EPISODES:
                low, high = _range_of(returns)
            else:
                low, high = return_reward_range(rows, horizon)
        except ValueError as error:
            raise ValueError(f"{provenance['path']}: {error}") from None
        _note_range(provenance, rule, low, high)
        return low, high

    return return_range


def reward_rule(config: Any) -> RewardRule:
    """What `normalize_reward` does for this algorithm."""
    return getattr(config, "REWARDS", SPAN_REWARDS)


def keeps_mc_returns(config: Any) -> bool:
    """Does this algorithm need returns-to-go?"""
    return getattr(config, "MC_RETURNS", False)


def keeps_next_actions(config: Any) -> bool:
    """Does this algorithm need the action after each row?"""
    return getattr(config, "NEXT_ACTIONS", False)


def check_memory(config: Any, task: tasks.Task, device: str = "cpu") -> None:
    """Refuse buffers and batches that this machine cannot hold, before any work.

    Raises:
        ValueError: the field, what it needs, what there is, and the largest value that fits.
    """
    have = machine.memory(device)
    if have is None:
        return
    actions = task.action_dim * (1 + keeps_next_actions(config))
    row = 4 * (2 * task.state_dim + actions + 2 + keeps_mc_returns(config))
    buffers = 1 if getattr(config, "mixing_ratio", None) is None else 2
    sizes = {"buffer_size": row * buffers, "batch_size": row + 4 * HIDDEN}
    for name, block in vars(config).items():
        if hasattr(block, "row_bytes"):
            own = block.row_bytes(task.state_dim, task.action_dim)
            sizes.update({f"{name}.{field}": size for field, size in own.items()})
    for field, size in sizes.items():
        value = attrgetter(field)(config)
        needed = value * size
        if needed > have:
            raise ValueError(
                f"{field} {value} needs {needed / 1e9:.4g} GB of memory, and "
                f"{device} has {have / 1e9:.4g} GB; set {field} to at most {have // size}"
            )


def new_buffer(
    config: Any, task: tasks.Task, device: str = "cpu", rows: Optional[int] = None
) -> ReplayBuffer:
    """An empty buffer of a config's size, or for so many rows."""
    return ReplayBuffer(
        task.state_dim,
        task.action_dim,
        config.buffer_size if rows is None else rows,
        device,
        config.compat,
        keeps_mc_returns(config),
        keeps_next_actions(config),
    )
