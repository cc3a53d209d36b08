"""Which rows of a dataset are trusted, and batches that say it of their rows.

A buffer must offer `draw(n)`, row numbers (n,); `gather(rows)`, their fields; `rows()`, all rows
that it holds; and `take(buffer, rows)`, which copies rows of another buffer into it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from adaptive_regularization.config import SelectiveFields
from adaptive_regularization.iql_filter import IQLFilter

Batch = list[torch.Tensor]


def returns_of(numbers: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Undiscounted returns (T,) of trajectories; their numbers 0 to T - 1 and rewards, (N,)."""
    return np.bincount(numbers, weights=rewards)


def above_return(
    numbers: np.ndarray, rewards: np.ndarray, threshold: float
) -> np.ndarray:
    """Rows of trajectories of a return above the threshold, bool (N,)."""
    return (returns_of(numbers, rewards) > threshold)[numbers]


def best_trajectories(
    numbers: np.ndarray, rewards: np.ndarray, count: int
) -> np.ndarray:
    """Rows of the `count` trajectories with the highest returns, bool (N,); ties: the earlier."""
    returns = returns_of(numbers, rewards)
    best = np.zeros(len(returns), bool)
    best[np.argsort(-returns, kind="stable")[:count]] = True
    return best[numbers]


def best_share(numbers: np.ndarray, rewards: np.ndarray, share: float) -> np.ndarray:
    """Rows of this share of the trajectories, rounded up, those with the highest returns."""
    count = int(np.ceil(share * (numbers.max() + 1)))
    return best_trajectories(numbers, rewards, count)


def successful(
    numbers: np.ndarray, rewards: np.ndarray, failure: float, tolerance: float = 1e-3
) -> np.ndarray:
    """Rows of trajectories whose last reward is not that of a failure, bool (N,)."""
    last = np.append(np.flatnonzero(np.diff(numbers)), len(numbers) - 1)
    return (np.abs(rewards[last] - failure) > tolerance)[numbers]


class FlaggedBuffer:
    """A buffer whose batches say of each row whether it is trusted, as a last field (B, 1).

    Args:
        buffer: see the head of this file.
        capacity: rows it can hold.
        device: of its tensors.
        upload: row numbers (B,) -> the same on the device, without waiting for it.
    """

    def __init__(
        self, buffer: Any, capacity: int, device: str, upload: Callable[..., Any]
    ):
        self.buffer, self._device, self._upload = buffer, device, upload
        # Of every place in the ring; rows that come online are trusted.
        self.flags = torch.ones((capacity, 1), device=device)

    def __getattr__(self, name: str) -> Any:
        # What is not about flags is the buffer's own. But a copy asks before there is a buffer,
        # and special methods are not passed on.
        if name == "buffer" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.buffer, name)

    def trust(self, flags: np.ndarray) -> None:
        """Set the flags of the first places, (N,), and trust all others."""
        self.flags.fill_(1.0)
        self.flags[: len(flags), 0] = torch.from_numpy(flags).float().to(self._device)

    def gather(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers (B,), with their flags."""
        flags = self.flags[self._upload(rows, self._device)]
        return [*self.buffer.gather(rows), flags]

    def sample(self, batch_size: int) -> Batch:
        """A batch of random rows."""
        return self.gather(self.buffer.draw(batch_size))


class TrustedRows:
    """The trusted rows of a run: chosen once, kept in its checkpoints, told with every batch.

    Args:
        config: of the run.
        offline, online: its buffers, one and the same in the mode `all`; the dataset is in the
            first, the second is empty otherwise.
        episodes: (purpose) -> numbers of the trajectories and raw rewards of the dataset's rows,
            each (N,). Raises ValueError where there are none.
        failure: last raw reward of a trajectory that does not reach its goal; None: not known.
        self_collected: the data are not D4RL's.
        capacity, device, upload: of both buffers, see `FlaggedBuffer`.

    Attributes:
        flags: bool (N,), on the CPU.
        offline: the source of batches offline.
        online: the buffer of the online phase; the same one in the mode `all`.

    Raises:
        ValueError: there are no trajectories to choose from, or the buffer is too small.
    """

    def __init__(
        self,
        config: SelectiveFields,
        offline: Any,
        online: Any,
        episodes: Callable[[str], tuple[np.ndarray, np.ndarray]],
        failure: float | None,
        self_collected: bool,
        capacity: int,
        device: str,
        upload: Callable[..., Any],
    ):
        self._config, self._buffers = config, (offline, online)
        self.offline = FlaggedBuffer(offline, capacity, device, upload)
        self.online = self.offline
        if online is not offline:
            self.online = FlaggedBuffer(online, capacity, device, upload)
        self._self_collected, self._failure = self_collected, failure
        self._best: np.ndarray | None = None
        numbers, rewards = self._episodes(episodes)
        self.flags = torch.from_numpy(self._first_flags(numbers, rewards))
        if config.buffer_mode == "part" and config.part_rows == "best":
            self._best = best_trajectories(numbers, rewards, config.part_trajectories)
        self._check_capacity(capacity)
        self.offline.trust(self.flags.numpy())

    def _episodes(self, episodes: Callable) -> tuple[np.ndarray, np.ndarray]:
        """What `episodes` tells where it is needed; else one trajectory of rewards 0."""
        config = self._config
        if config.trust_by in ("return", "success"):
            return episodes(f"trust_by {config.trust_by}")
        if config.buffer_mode == "part" and config.part_rows == "best":
            return episodes("part_rows best")
        rows = len(self._buffers[0].rows()[0])
        return np.zeros(rows, int), np.zeros(rows)

    def _first_flags(self, numbers: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """Everything before the filter has learned."""
        config = self._config
        if config.trust_by == "success":
            if self._failure is None:
                raise ValueError(
                    "trust_by success needs the reward of a failure; give it as ref_min_score, "
                    "with a ref_max_score"
                )
            return successful(numbers, rewards, self._failure)
        if config.trust_by != "return":
            return np.ones(len(numbers), bool)
        if self._by_share():
            return best_share(numbers, rewards, config.trust_share or 0.0)
        return above_return(numbers, rewards, config.trust_return or 0.0)

    def _by_share(self) -> bool:
        """A share is chosen: the published returns are those of D4RL's data."""
        config = self._config
        if config.trust_return is None:
            return True
        return self._self_collected and config.trust_share is not None

    def _check_capacity(self, capacity: int) -> None:
        config: Any = self._config
        rows = {"all": len(self.flags), "part": int(self._part().sum())}
        needed = rows.get(config.buffer_mode, 0)
        if config.trust_by == "iql" and config.part_rows == "trusted":
            # Nobody knows yet how many will pass.
            needed = len(self.flags) if config.buffer_mode == "part" else needed
        needed += config.online_iterations
        if config.buffer_mode in rows and needed > capacity:
            raise ValueError(
                f"buffer_size {capacity} must hold what buffer_mode {config.buffer_mode} starts "
                f"with and online_iterations {config.online_iterations}: set it to at least "
                f"{needed}"
            )

    def _part(self) -> np.ndarray:
        """The dataset's rows that the online buffer starts with in the mode `part`."""
        return self.flags.numpy() if self._best is None else self._best

    @property
    def count(self) -> int:
        """Trusted rows of the dataset."""
        return int(self.flags.sum())

    def settle(
        self,
        chosen_by: IQLFilter | None,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        """Take the rows that the filter lets pass, and say what was chosen.

        Args:
            chosen_by: None where the choice has been made: at the start, or in a checkpoint.
            say, warn: what prints a line, and a warning.
        """
        if chosen_by is not None:
            states, actions = self._buffers[0].rows()[:2]
            self.flags = chosen_by.trusted(states, actions).cpu()
        self.offline.trust(self.flags.numpy())
        say(self.describe())
        if self.warning():
            warn(self.warning())

    def describe(self) -> str:
        """One line on the choice and its result."""
        config = self._config
        names = {
            "iql": f"the IQL filter ({config.filter_updates} updates)",
            "success": "trajectories that end at the goal",
            "all": "every row",
            "return": f"trajectories with a return above {config.trust_return}",
        }
        name = names[config.trust_by]
        if config.trust_by == "return" and self._by_share():
            name = f"the best {config.trust_share:g} of the trajectories"
            if config.trust_return is not None:
                name += ", as trust_return is of D4RL's data"
        share = self.count / len(self.flags)
        return f"trusted: {self.count} of {len(self.flags)} rows ({share:.1%}), {name}"

    def warning(self) -> str:
        """What an empty set means, or ""."""
        if self.count:
            return ""
        found = "no row is trusted, so the coefficient does not learn"
        if self._config.trust_penalty:
            found += " and the dataset's rows have no penalty"
        return f"{found}; choose the rows in another way (trust_by, trust_share)"

    def start_online(self) -> None:
        """Copy what the online buffer starts with; once, at the switch."""
        offline, online = self._buffers
        if self._config.buffer_mode == "part":
            online.take(offline, np.flatnonzero(self._part()))

    def flag_online(self) -> None:
        """Flags of the online buffer's places. They follow from the dataset's."""
        config, flags = self._config, self.flags.numpy()
        if config.buffer_mode == "part":
            part = flags[self._part()]
            inherited = config.online_trust == "inherited"
            # The public code moves the rows to the front and leaves the flags behind them.
            flags = np.append(part, flags[len(part) :]) if inherited else part
        elif config.buffer_mode != "all":
            flags = flags[:0]
        self.online.trust(flags)

    def sample(self, batch_size: int) -> Batch:
        """A batch of the online phase; in the mode `half` offline rows stand first."""
        count = int(batch_size * (self._config.mixing_ratio or 0.0))
        online = self.online.sample(batch_size - count)
        if not count:
            return online
        pairs = zip(self.offline.sample(count), online, strict=True)
        return [torch.cat(fields, dim=-2) for fields in pairs]

    def state_dict(self) -> dict[str, Any]:
        """The flags."""
        return {"flags": self.flags.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a `state_dict` back.

        Raises:
            ValueError: it is of another number of rows.
        """
        flags = state_dict["flags"]
        if flags.shape != self.flags.shape:
            raise ValueError(
                f"flags are of {len(flags)} rows, the dataset has {len(self.flags)}"
            )
        self.flags = flags.bool().cpu()
        self.offline.trust(self.flags.numpy())


def split(batch: Sequence[torch.Tensor]) -> tuple[Batch, torch.Tensor]:
    """A batch's five fields, and the trust of its rows (B,): of all where it does not say."""
    if len(batch) > 5:
        return list(batch[:5]), batch[5].squeeze(-1)
    return list(batch), torch.ones_like(batch[2]).squeeze(-1)
