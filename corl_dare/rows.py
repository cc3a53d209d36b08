"""What a replay buffer must offer the hook: rows drawn, rows read; and a cache per row.

A buffer tells which rows it drew in one of two ways: it has `draw(n)` and `gather(rows)`, or it
has CORL's private storage (`_states`, `_actions`, ..., `_size`, `_pointer`, `_buffer_size`). Any
other buffer with `sample(n)` works too, where nothing has to be cached per row.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# The fields of CORL's buffers, in the order of their batches.
FIELDS = tuple(
    "_states _actions _rewards _next_states _dones _mc_returns _next_actions".split()
)


def storage(buffer: Any) -> list[torch.Tensor]:
    """The tensors (capacity, ...) of a buffer with CORL's private storage, in batch order."""
    return [getattr(buffer, field) for field in FIELDS if hasattr(buffer, field)]


def upload(rows: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """Row numbers (B,) on the device. The host does not wait for the work that is queued there."""
    index = torch.from_numpy(rows)
    if torch.device(device).type != "cuda":
        return index.to(device)
    return index.pin_memory().to(device, non_blocking=True)


def draw_rows(buffer: Any, rows: np.ndarray) -> list[torch.Tensor]:
    """The given rows (B,) of a buffer with CORL's private storage."""
    fields = storage(buffer)
    index = upload(rows, fields[0].device)
    return [field[index] for field in fields]


def draw(buffer: Any, n: int) -> tuple[np.ndarray | None, list[torch.Tensor]]:
    """A batch of n rows and, where the buffer tells, their numbers (n,) in the buffer.

    CORL's buffer draws its rows from numpy's global generator; the same draw is made here.
    """
    if hasattr(buffer, "draw"):
        rows = buffer.draw(n)
        return rows, buffer.gather(rows)
    if hasattr(buffer, "_states"):
        rows = np.random.randint(0, buffer._size, size=n)
        return rows, draw_rows(buffer, rows)
    return None, list(buffer.sample(n))


class SlotCache:
    """A value per buffer slot, made when it is first asked for.

    A value serves `max_age` calls (None: for ever) and dies when the buffer overwrites its
    slot. Whether a slot is valid is known on the host, where the row numbers are drawn, so
    asking costs no wait for the device.
    """

    def __init__(self, buffer: Any, max_age: int | None):
        self.buffer, self.max_age = buffer, max_age
        # (capacity, ...), made with the first value.
        self.values: torch.Tensor | None = None
        # The call that made a slot's value; -1: there is none.
        self.made = np.full(buffer._buffer_size, -1, dtype=np.int64)
        self.pointer = buffer._pointer

    def forget_overwritten(self) -> None:
        """Invalidate the slots that the ring has written since the last call."""
        steps = (self.buffer._pointer - self.pointer) % len(self.made)
        self.made[(self.pointer + np.arange(steps)) % len(self.made)] = -1
        self.pointer = self.buffer._pointer

    def get(
        self, rows: np.ndarray, now: int, make: Callable[[np.ndarray], torch.Tensor]
    ) -> torch.Tensor:
        """Values (B, ...) of the slots `rows` (B,); `make` gets positions in 0..B-1."""
        self.forget_overwritten()
        made = self.made[rows]
        stale = made < 0
        if self.max_age is not None:
            stale |= now - made >= self.max_age
        missing = np.flatnonzero(stale)
        if len(missing):
            fresh = make(missing)
            if self.values is None:
                shape = (len(self.made), *fresh.shape[1:])
                self.values = torch.zeros(shape, dtype=fresh.dtype, device=fresh.device)
            # A row that was drawn twice keeps its last value; a GPU would keep either of them.
            slots, from_the_end = np.unique(rows[missing][::-1], return_index=True)
            kept = upload(len(missing) - 1 - from_the_end, fresh.device)
            self.values[upload(slots, fresh.device)] = fresh[kept]
            self.made[slots] = now
        assert self.values is not None
        return self.values[upload(rows, self.values.device)]

    def state_dict(self) -> dict[str, Any]:
        """The valid slots, their values and when they were made; on the CPU."""
        slots = torch.from_numpy(np.flatnonzero(self.made >= 0))
        values = None
        if self.values is not None:
            values = self.values[slots.to(self.values.device)].cpu()
        return {
            "slots": slots,
            "made": torch.from_numpy(self.made)[slots],
            "values": values,
            "pointer": self.pointer,
        }

    def load_state_dict(self, state: dict[str, Any], device: str) -> None:
        """Put a `state_dict` of a cache around the same buffer back."""
        slots = state["slots"].numpy()
        self.made[:] = -1
        self.made[slots] = state["made"].numpy()
        self.pointer = state["pointer"]
        self.values = None
        if state["values"] is not None:
            kept = state["values"].to(device)
            shape = (len(self.made), *kept.shape[1:])
            self.values = torch.zeros(shape, dtype=kept.dtype, device=device)
            self.values[state["slots"].to(device)] = kept
