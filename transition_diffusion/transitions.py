"""Transitions as the events of a diffusion model: their columns, and how they are normalized."""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn as nn

CHUNK = 65536  # rows whose statistics are taken at once
# Added to every standard deviation, so that a constant column stays finite.
STD_FLOOR = 1e-5
TERMINAL_ABOVE = 0.5  # a modelled terminal above it is one


class Buffer(Protocol):
    """A source of transitions."""

    @property
    def size(self) -> int:
        """Rows that can be drawn."""

    def gather(self, indices: np.ndarray) -> list[torch.Tensor]:
        """The rows of these numbers (B,): states, actions, rewards, next states, dones, ..."""


class Layout(NamedTuple):
    """The columns of an event (s, a, r, s'), and with `terminals` of (s, a, r, s', d)."""

    state_dim: int
    action_dim: int
    terminals: bool = False

    @property
    def width(self) -> int:
        """Columns of an event."""
        return 2 * self.state_dim + self.action_dim + 1 + self.terminals

    @property
    def state(self) -> slice:
        """The columns of s."""
        return slice(0, self.state_dim)

    @property
    def action(self) -> slice:
        """The columns of a."""
        return slice(self.state_dim, self.state_dim + self.action_dim)

    @property
    def reward(self) -> int:
        """The column of r."""
        return self.state_dim + self.action_dim

    @property
    def next_state(self) -> slice:
        """The columns of s'."""
        return slice(self.reward + 1, self.reward + 1 + self.state_dim)

    def join(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Events (B, width) of a batch: states (B, S), actions (B, A), rewards (B, 1), ..."""
        return torch.cat(batch[: 5 if self.terminals else 4], -1)

    def split(self, events: torch.Tensor, max_action: float) -> list[torch.Tensor]:
        """Batch of events (B, width): s, a within the bounds, r (B, 1), s', done (B, 1).

        Without modelled terminals no row is one.
        """
        rewards = events[:, self.reward : self.reward + 1]
        dones = torch.zeros_like(rewards)
        if self.terminals:
            dones = (events[:, -1:] > TERMINAL_ABOVE).to(events.dtype)
        actions = events[:, self.action].clamp(-max_action, max_action)
        return [
            events[:, self.state],
            actions,
            rewards,
            events[:, self.next_state],
            dones,
        ]


class Normalizer(nn.Module):
    """z = (x - mean) / (std + 1e-5) per column; some columns stay as they are.

    Args:
        width: columns.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, buffer: Buffer, layout: Layout, keep: list[int]) -> None:
        """Take mean and standard deviation of all rows of a buffer.

        Args:
            buffer: at least one row.
            layout: columns of its events.
            keep: columns that stay as they are.
        """
        n = buffer.size
        shape: dict[str, Any] = {"dtype": torch.float64, "device": self.mean.device}
        total = torch.zeros(layout.width, **shape)
        squares = torch.zeros(layout.width, **shape)
        # Around the first row, since sums of squares far from zero would cancel.
        center = layout.join(buffer.gather(np.zeros(1, dtype=np.int64))).double()
        for first in range(0, n, CHUNK):
            rows = np.arange(first, min(n, first + CHUNK))
            events = layout.join(buffer.gather(rows)).double() - center
            total += events.sum(0)
            squares += events.square().sum(0)
        variance = (squares - total.square() / n).clamp(min=0) / max(1, n - 1)
        self.mean.copy_(total / n + center[0])
        self.std.copy_(variance.sqrt() + STD_FLOOR)
        self.mean[keep], self.std[keep] = 0.0, 1.0

    def forward(self, events: torch.Tensor) -> torch.Tensor:
        """Normalized events (..., width)."""
        return (events - self.mean) / self.std

    def undo(self, normalized: torch.Tensor) -> torch.Tensor:
        """Events (..., width) of normalized ones."""
        return normalized * self.std + self.mean
