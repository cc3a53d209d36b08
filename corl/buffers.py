"""Replay buffers under CORL's names."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Dict, List, Optional, Union

import numpy as np
import torch

from corl.captured import Captured

TensorBatch = List[torch.Tensor]
# Where a buffer keeps the fields of a batch, in their order; not all buffers have the last ones.
FIELDS = (
    *("_states", "_actions", "_rewards", "_next_states", "_dones"),
    *("_mc_returns", "_next_actions"),
)


def upload(indices: np.ndarray, device: str) -> torch.Tensor:
    """Row numbers (B,) on the device. The host does not wait for the work that is queued there."""
    rows = torch.from_numpy(indices)
    if not device.startswith("cuda"):
        return rows.to(device)
    return rows.pin_memory().to(device, non_blocking=True)


class ReplayBuffer:
    """A ring of transitions on the device.

    Args:
        state_dim, action_dim: sizes of a state and an action.
        buffer_size: transitions it can hold.
        device: of its tensors.
        compat: upstream's faults: a dataset that fills the buffer leaves the write pointer out
            of range, and rows collected online have a return-to-go of 0.
        mc_returns: keeps the return-to-go of a row as a sixth field.
        next_actions: keeps the action after a row as the last field.

    A batch holds states (B, S), actions (B, A), rewards (B, 1), next states (B, S), dones (B, 1)
    and, where they are kept, returns-to-go (B, 1) and next actions (B, A).
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        buffer_size: int,
        device: str = "cpu",
        compat: bool = False,
        mc_returns: bool = False,
        next_actions: bool = False,
    ):
        self._buffer_size = buffer_size
        self._pointer = 0
        self._size = 0
        # Rows of the dataset. They are not part of a checkpoint.
        self._loaded = 0
        self._read: Callable[..., TensorBatch] = self.read
        self._compat = compat
        self._device = device

        # Zeros of the whole capacity: the operating system hands out pages on first write.
        def column(width: int) -> torch.Tensor:
            return torch.zeros((buffer_size, width), device=device)

        self._states = column(state_dim)
        self._actions = column(action_dim)
        self._rewards = column(1)
        self._next_states = column(state_dim)
        self._dones = column(1)
        if mc_returns:
            self._mc_returns = column(1)
        if next_actions:
            self._next_actions = column(action_dim)

    @property
    def size(self) -> int:
        """Rows that can be drawn."""
        return self._size

    @property
    def keeps_next_actions(self) -> bool:
        """Does a row hold the action after it?"""
        return hasattr(self, "_next_actions")

    def _storage(self) -> TensorBatch:
        return [getattr(self, name) for name in FIELDS if hasattr(self, name)]

    def place(self, fields: Sequence[torch.Tensor]) -> None:
        """Keep the rows in these tensors (buffer_size, width), one for each field of a batch."""
        names = [name for name in FIELDS if hasattr(self, name)]
        for name, field in zip(names, fields, strict=True):
            setattr(self, name, field)

    def _to_tensor(self, data: Union[np.ndarray, float]) -> torch.Tensor:
        return torch.as_tensor(data, dtype=torch.float32, device=self._device)

    def load_d4rl_dataset(self, data: Dict[str, np.ndarray]) -> None:
        """Fill an empty buffer with q-learning arrays of N rows.

        Raises:
            ValueError: the buffer is not empty, or too small.
        """
        if self._size != 0:
            raise ValueError("a dataset can only be loaded into an empty buffer")
        rows = len(data["observations"])
        if rows > self._buffer_size:
            raise ValueError(
                f"buffer_size {self._buffer_size} is smaller than the dataset of {rows} "
                f"rows; set buffer_size to at least {rows}"
            )
        self._states[:rows] = self._to_tensor(data["observations"])
        self._actions[:rows] = self._to_tensor(data["actions"])
        self._rewards[:rows] = self._to_tensor(data["rewards"][..., None])
        self._next_states[:rows] = self._to_tensor(data["next_observations"])
        self._dones[:rows] = self._to_tensor(data["terminals"][..., None])
        if hasattr(self, "_mc_returns"):
            self._mc_returns[:rows] = self._to_tensor(data["mc_returns"][..., None])
        if self.keeps_next_actions:
            self._next_actions[:rows] = self._to_tensor(data["next_actions"])
        self._size = self._loaded = rows
        self._pointer = rows if self._compat else rows % self._buffer_size

    def draw(self, batch_size: int) -> np.ndarray:
        """Row numbers (batch_size,), uniform with replacement."""
        # The legacy global generator on the host, as upstream: same seed, same batches.
        return np.random.randint(0, self._size, size=batch_size)

    def read(self, rows: torch.Tensor) -> TensorBatch:
        """The rows of these numbers (B,), which are on the device."""
        return [field[rows] for field in self._storage()]

    def gather(self, indices: np.ndarray) -> TensorBatch:
        """The rows of these numbers (B,)."""
        return self._read(upload(indices, self._device))

    def capture(self) -> None:
        """From now on a GPU gets all fields of a batch in one launch, see `captured.Captured`."""
        self._read = Captured(self.read, reads=self._storage)

    def sample(self, batch_size: int) -> TensorBatch:
        """A batch of random rows."""
        return self.gather(self.draw(batch_size))

    def rows(self) -> TensorBatch:
        """All rows that it holds, by their places in the ring; views."""
        return [field[: self._size] for field in self._storage()]

    def take(self, source: "ReplayBuffer", rows: np.ndarray) -> None:
        """Copy rows (n,) of another buffer into this empty one; they are part of checkpoints.

        Raises:
            ValueError: it is not empty, or too small.
        """
        if self._size or len(rows) > self._buffer_size:
            raise ValueError(
                f"{len(rows)} rows do not fit into a buffer of {self._buffer_size} that holds "
                f"{self._size}; set buffer_size to at least {self._size + len(rows)}"
            )
        for field, taken in zip(self._storage(), source.gather(rows), strict=True):
            field[: len(rows)] = taken
        self._size = len(rows)
        self._pointer = len(rows) % self._buffer_size

    def add_transition(
        self,
        state: np.ndarray,
        action: np.ndarray,
        reward: float,
        next_state: np.ndarray,
        done: bool,
        next_action: Optional[np.ndarray] = None,
    ) -> None:
        """Write one row over the oldest; `next_action` (A,) where such actions are kept."""
        row: List[Any] = [state, action, reward, next_state, done]
        if hasattr(self, "_mc_returns"):
            # Nobody knows the return of a running episode: -inf bounds no value. Upstream says 0.
            row.append(0.0 if self._compat else -math.inf)
        if self.keeps_next_actions:
            row.append(next_action)
        for field, value in zip(self._storage(), row, strict=True):
            if field.is_cpu:
                # The same memory and rounding, without torch's indexing.
                field.numpy()[self._pointer] = value
            else:
                field[self._pointer] = self._to_tensor(value)
        self.advance()

    def advance(self) -> None:
        """Count a row that was written at the pointer."""
        self._pointer = (self._pointer + 1) % self._buffer_size
        self._size = min(self._size + 1, self._buffer_size)

    def refill(self, rows: TensorBatch) -> None:
        """Hold rows of states, actions, rewards, next states and dones in the place of all others.

        Raises:
            ValueError: they are more than it can hold.
        """
        n = len(rows[0])
        if n > self._buffer_size:
            raise ValueError(f"{n} rows do not fit into a buffer of {self._buffer_size}")
        for field, values in zip(self._storage(), rows, strict=False):
            field[:n] = values
        if hasattr(self, "_mc_returns"):
            # As of a row that was collected.
            self._mc_returns[:n] = 0.0 if self._compat else -math.inf
        self._size, self._pointer = n, n % self._buffer_size

    def state_dict(self) -> Dict[str, Any]:
        """The rows that do not come back from the dataset."""
        # Once the ring has overwritten some of the dataset's rows, that is all of them.
        wrapped = self._size == self._buffer_size
        first = 0 if wrapped else self._loaded
        return {
            "first": first,
            "pointer": self._pointer,
            "rows": [field[first : self._size].cpu() for field in self._storage()],
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore a `state_dict` into a buffer with the same dataset in it."""
        first, last = state["first"], state["first"] + len(state["rows"][0])
        if last > self._buffer_size:
            raise ValueError(
                f"the checkpoint's buffer holds {last} rows, buffer_size is "
                f"{self._buffer_size}; use the run's own config"
            )
        for field, rows in zip(self._storage(), state["rows"], strict=True):
            field[first:last] = rows.to(self._device)
        self._pointer, self._size = state["pointer"], max(last, self._loaded)


class MixedBuffer:
    """Batches of two sources: offline rows first, then online rows."""

    def __init__(self, offline: ReplayBuffer, online: ReplayBuffer, mixing_ratio: float):
        self.offline, self.online, self.mixing_ratio = offline, online, mixing_ratio
        self._read: Callable[..., TensorBatch] = self.read

    def read(self, offline: torch.Tensor, online: torch.Tensor) -> TensorBatch:
        """The rows of these numbers in each source, (B_off,) and (B_on,)."""
        halves = zip(self.offline.read(offline), self.online.read(online), strict=True)
        # Along the rows, whatever stands before them.
        return [torch.cat(rows, dim=-2) for rows in halves]

    def capture(self) -> None:
        """See `ReplayBuffer.capture`."""
        self._read = Captured(
            self.read, reads=lambda: self.offline._storage() + self.online._storage()
        )

    def sample(self, batch_size: int) -> TensorBatch:
        """A batch with `mixing_ratio` of its rows from the offline buffer."""
        n_offline = int(batch_size * self.mixing_ratio)
        rows = self.offline.draw(n_offline), self.online.draw(batch_size - n_offline)
        return self._read(*(upload(part, self.offline._device) for part in rows))


class JoinedBuffer:
    """The rows of two buffers as if they lay in one: offline rows first, then online rows."""

    def __init__(self, offline: ReplayBuffer, online: ReplayBuffer):
        self.offline, self.online = offline, online

    @property
    def size(self) -> int:
        """Rows that can be drawn."""
        return self.offline.size + self.online.size

    def read(self, rows: torch.Tensor) -> TensorBatch:
        """The rows of these numbers (B,), which are on the device."""
        first = self.offline.size
        offline = self.offline.read(rows.clamp(max=first - 1))
        online = self.online.read((rows - first).clamp(min=0))
        is_offline = (rows < first).unsqueeze(-1)
        return [
            torch.where(is_offline, *rows) for rows in zip(offline, online, strict=True)
        ]

    def gather(self, indices: np.ndarray) -> TensorBatch:
        """The rows of these numbers (B,)."""
        return self.read(upload(indices, self.offline._device))

    def sample(self, batch_size: int) -> TensorBatch:
        """A batch of random rows, drawn as one buffer draws them."""
        return self.gather(np.random.randint(0, self.size, size=batch_size))
