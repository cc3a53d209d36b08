"""What a replay buffer must offer the hook: rows drawn, rows read; and a cache per row.

A buffer tells which rows it drew in one of two ways: it has `draw(n)` and `gather(rows)`, or it
has CORL's private storage (`_states`, `_actions`, ..., `_size`, `_pointer`, `_buffer_size`). Any
other buffer with `sample(n)`, or a function `n -> batch`, works too, where nothing has to be
cached per row. Then `draw` may also return what only `gather` reads, such as a tensor on a GPU.
Batches may have names, as those of other libraries: see `as_batch`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

# The fields of CORL's buffers, in the order of their batches.
FIELDS = tuple(
    "_states _actions _rewards _next_states _dones _mc_returns _next_actions".split()
)

# What other libraries call the fields of a batch; the first name that a batch has counts. An
# entry of a nested mapping has its outer name before a dot, as TorchRL's `next`.
NAMES = {
    "states": ("observations", "observation", "obs", "states", "state"),
    "actions": ("actions", "action"),
    "rewards": ("next.reward", "rewards", "reward"),
    "next states": (
        *("next.observation", "next_observations", "next_observation"),
        *("next_obs", "next_states", "next_state"),
    ),
    # The ends of episodes. Time-outs do not belong here, so TorchRL's `next.done` does not count.
    "ends": ("next.terminated", "terminals", "terminal", "terminated", "dones", "done"),
}


def as_tensor(values: Any, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor as it is; of an array (...) one of the same shape, its numbers as float32."""
    if isinstance(values, torch.Tensor):
        return values
    return torch.as_tensor(np.asarray(values), dtype=torch.float32, device=device)


def as_batch(batch: Any, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """A batch of B rows in the form of CORL's: tensors (B, ...), states and actions first.

    A list or a plain tuple keeps its order. Of a mapping, a namedtuple or a dataclass the fields
    in `NAMES` are taken, in that order and as float32 on the device; rewards and ends become
    (B, 1), and other fields are left out.

    Args:
        batch: of arrays or tensors.
        device: where arrays go.

    Raises:
        ValueError: the batch has names, and none of those of a field.
    """
    named = dict(_named(batch))
    if not named:
        return [as_tensor(field, device) for field in batch]
    found = []
    for field, names in NAMES.items():
        name = next((name for name in names if name in named), None)
        if name is None:
            raise ValueError(
                f"a batch of {type(batch).__name__} has no {field}: it has "
                f"{', '.join(named)}, and none of {', '.join(names)}; give the hook a function "
                "that returns a list of states, actions, rewards, next states and ends"
            )
        rows = as_tensor(named[name], device).to(device, torch.float32)
        single = field in ("rewards", "ends")
        found.append(rows.reshape(-1, 1) if single else rows)
    return found


def _named(batch: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a batch by their names, those of nested mappings too; none of a list."""
    if hasattr(batch, "_asdict"):
        batch = batch._asdict()
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, Mapping):
        batch = vars(batch)
    if not isinstance(batch, Mapping):
        return
    for name, value in batch.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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


def draw(
    buffer: Any, n: int, device: torch.device | str = "cpu"
) -> tuple[np.ndarray | None, list[torch.Tensor]]:
    """A batch of n rows and, where the buffer tells, their numbers (n,) in the buffer.

    CORL's buffer draws its rows from numpy's global generator; the same draw is made here.
    Arrays of another library go to `device`.
    """
    if hasattr(buffer, "draw"):
        rows = buffer.draw(n)
        return rows, buffer.gather(rows)
    if hasattr(buffer, "_states"):
        rows = np.random.randint(0, buffer._size, size=n)
        return rows, draw_rows(buffer, rows)
    sample = buffer if callable(buffer) else buffer.sample
    return None, as_batch(sample(n), device)


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
