"""A dataset as it is trained on: found, rewards scaled, states normalized."""

from typing import Any, Dict, NamedTuple, Tuple

import numpy as np
import torch

from corl import finite, machine, tasks
from corl.buffers import ReplayBuffer
from corl.data import sources
from corl.rewards import SPAN_REWARDS, RewardRule, get_return_to_go

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
    """

    arrays: Dict[str, np.ndarray]
    provenance: Dict[str, Any]
    normalization: Normalization
    reward_args: Dict[str, Any]


def load_data(config: Any, task: tasks.Task, device: str = "cpu") -> Data:
    """Find a config's dataset and prepare it for training.

    The config's class may say `REWARDS`, what `normalize_reward` does, and `MC_RETURNS`, whether
    rows need their return-to-go.

    Raises:
        ValueError, RuntimeError: see `sources.resolve`; a dataset larger than the buffer; rewards,
            returns-to-go or normalized states that are not finite, or whose squares are not.
    """
    dataset = sources.resolve(
        task,
        source=config.dataset_source,
        path=config.dataset_path,
        rows=config.dataset_rows,
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
            reward_args = _prepare_rewards(arrays, task, config)
            normalization = _normalize(arrays, config, device)
        except ValueError as error:
            raise ValueError(f"{dataset.provenance['path']}: {error}") from None
    return Data(arrays, dataset.provenance, normalization, reward_args)


def _prepare_rewards(
    arrays: Dict[str, np.ndarray], task: tasks.Task, config: Any
) -> Dict[str, Any]:
    """Scale the rewards in place and add returns-to-go; returns what online rewards need."""
    reward_args = {}
    if config.normalize_reward:
        reward_args = reward_rule(config).offline(arrays, config.env, config)
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


def reward_rule(config: Any) -> RewardRule:
    """What `normalize_reward` does for this algorithm."""
    return getattr(config, "REWARDS", SPAN_REWARDS)


def keeps_mc_returns(config: Any) -> bool:
    """Does this algorithm need returns-to-go?"""
    return getattr(config, "MC_RETURNS", False)


def check_memory(config: Any, task: tasks.Task, device: str = "cpu") -> None:
    """Refuse buffers and batches that this machine cannot hold, before any work.

    Raises:
        ValueError: the field, what it needs, what there is, and the largest value that fits.
    """
    have = machine.memory(device)
    if have is None:
        return
    row = 4 * (2 * task.state_dim + task.action_dim + 2 + keeps_mc_returns(config))
    buffers = 1 if getattr(config, "mixing_ratio", None) is None else 2
    for field, size in {
        "buffer_size": row * buffers,
        "batch_size": row + 4 * HIDDEN,
    }.items():
        needed = getattr(config, field) * size
        if needed > have:
            raise ValueError(
                f"{field} {getattr(config, field)} needs {needed / 1e9:.4g} GB of memory, and "
                f"{device} has {have / 1e9:.4g} GB; set {field} to at most {have // size}"
            )


def new_buffer(config: Any, task: tasks.Task, device: str = "cpu") -> ReplayBuffer:
    """An empty buffer of a config's size."""
    return ReplayBuffer(
        task.state_dim,
        task.action_dim,
        config.buffer_size,
        device,
        config.compat,
        keeps_mc_returns(config),
    )
