"""Balanced replay: rows of both buffers, drawn by how likely online data would hold them.

Lee et al. 2021 (https://arxiv.org/abs/2107.00644), Section 4.1, as OPT has it. A network w(s, a)
learns the ratio of the densities of online and offline rows (Eq. 4). The priority of a row is
w^(1/T), divided by its mean over offline rows. Nothing corrects for the priorities.

A buffer must offer `size`, its rows, and `gather(rows)` and `read(rows)`, the fields of rows (n,)
whose numbers are on the host and on the device.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn as nn

from online_pretraining.draws import Draws, own_stream
from online_pretraining.priorities import Priorities

Batch = list[torch.Tensor]
# Bounds of a priority.
LOWEST, HIGHEST = 1e-3, 1e3
# Keeps logarithms and a quotient finite.
TINY = 1e-10
REPLAY_COLUMNS = ("density_loss", "density_offline", "density_online", "online_share")


class Buffer(Protocol):
    """Rows of one kind."""

    @property
    def size(self) -> int:
        """Rows that can be drawn."""

    def gather(self, indices: np.ndarray) -> Batch:
        """The rows of these numbers (B,)."""

    def read(self, rows: torch.Tensor) -> Batch:
        """The rows of these numbers (B,), which are on the device."""


class Joined(Protocol):
    """The rows of both kinds, offline rows first."""

    def sample(self, batch_size: int) -> Batch:
        """A batch of random rows."""

    def read(self, rows: torch.Tensor) -> Batch:
        """The rows of these numbers (B,), which are on the device."""


class DensityNet(nn.Module):
    """w: states (B, S) and actions (B, A) -> (B,), not below 0."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int = 256):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(state_dim + action_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, 1),
            nn.ReLU(),
        )

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """The ratio of the densities."""
        return self.net(torch.cat((states, actions), dim=-1)).squeeze(-1)


def density_losses(
    offline: torch.Tensor, online: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms of Eq. 4 for offline and for online rows, each (B,), of their w (B,)."""
    return (
        -(2.0 / (offline + 1.0) + TINY).log(),
        -(2.0 * online / (online + 1.0) + TINY).log(),
    )


class Replay:
    """The batches of the online phase, and with `replay: balanced` the priorities of all rows.

    Args:
        config: of the run: its fields, `seed` and `buffer_size`.
        offline, online: its buffers; `joined` are the rows of both.
        sizes: S and A.
        draws: what is random here.
        descend: (loss, *optimizers), steps each along the loss's gradient.
        compile_update: (update, its optimizers) -> the same as one graph.

    Attributes:
        written: online rows that have been written; the online loop sets it.
        log: metrics of the last batch, 0-d tensors.
        balanced: whether rows are drawn by their priorities.

    Raises:
        ValueError: `priority_capacity` is smaller than the dataset.
    """

    def __init__(
        self,
        config: Any,
        offline: Buffer,
        online: Buffer,
        joined: Joined,
        sizes: tuple[int, int],
        draws: Draws,
        descend: Callable[..., None],
        compile_update: Callable[..., Any] | None = None,
    ):
        self.offline, self.online, self.joined = offline, online, joined
        self.draws, self.balanced = draws, config.replay == "balanced"
        self.written, self.log = 0, dict[str, torch.Tensor]()
        self.batch_size = config.batch_size
        if not self.balanced:
            return
        self.power, self._descend = 1.0 / config.density_temperature, descend
        # Mean of w^(1/T) over offline rows, as the last step of the network saw it.
        self.scale = torch.ones((), device=draws.device)
        with own_stream(config.seed):
            self.density = DensityNet(*sizes).to(draws.device)
        self.optimizer = torch.optim.Adam(self.density.parameters(), config.density_lr)
        limit = config.priority_capacity
        numbers = offline.size, config.buffer_size
        self.priorities = Priorities(*numbers, draws.device, limit)
        self._learn = self.learn
        if compile_update is not None:
            self._learn = compile_update(self.learn, [self.optimizer])

    def sample(self, batch_size: int) -> Batch:
        """A batch; with balanced replay the density network learns first, and priorities change."""
        if not self.balanced:
            return self.joined.sample(batch_size)
        self.update(batch_size)
        rows = self.priorities.draw(self.draws.uniform(batch_size))
        batch = self.joined.read(rows)
        self.refresh(rows, batch)
        share = (rows >= self.offline.size).float().mean()
        self.log = {**self.log, "online_share": share}
        return batch

    def update(self, batch_size: int) -> None:
        """Before a batch: rows that were written get a priority, and the density network learns."""
        self.priorities.add(self.written)
        pairs = [
            buffer.gather(self.draws.rows(buffer.size, batch_size))[:2]
            for buffer in (self.offline, self.online)
        ]
        self.log = dict(self._learn(*pairs))
        self.scale = self.log.pop("scale")

    def refresh(self, rows: torch.Tensor, batch: Batch) -> None:
        """Of the rows (B,) of a batch alone: new priorities, by the network as it is now."""
        self.priorities.write(rows, self.priority(batch[0], batch[1], self.scale))

    def halves(self) -> tuple[Any, Any]:
        """Offline and online rows apart, for batches of two halves, each drawn as `replay` says."""
        if not self.balanced:
            return self.offline, self.online
        return Half(self, "offline"), Half(self, "online")

    def learn(
        self, offline: Sequence[torch.Tensor], online: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """One step of the density network, on states and actions of both kinds of rows.

        A function of tensors but for the step. `scale` is the mean of w^(1/T) over the offline
        rows, of the network before its step.
        """
        ratios = self.density(*offline), self.density(*online)
        terms = density_losses(*ratios)
        loss = terms[0].mean() + terms[1].mean()
        kept = [ratio.detach() for ratio in ratios]
        self._descend(loss, self.optimizer)
        return {
            "density_loss": loss.detach(),
            "density_offline": kept[0].mean(),
            "density_online": kept[1].mean(),
            "scale": kept[0].pow(self.power).mean(),
        }

    @torch.no_grad()
    def priority(
        self, states: torch.Tensor, actions: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """Priorities (B,), float64, of rows whose states and actions are given."""
        ratio = self.density(states, actions).pow(self.power)
        return (ratio / (scale + TINY)).double().clamp(LOWEST, HIGHEST)

    def state_dict(self) -> dict[str, Any]:
        """The density network and the priorities."""
        parts = ("density", "optimizer", "priorities") * self.balanced
        return {part: getattr(self, part).state_dict() for part in parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, with the rows of then in the buffers."""
        for part in state:
            getattr(self, part).load_state_dict(state[part])


class Half:
    """The rows of one kind, drawn by their priorities, for batches of two halves.

    The offline half is drawn first: a batch begins with it, see `Replay.update`. Everything else is
    the buffer's own.

    Args:
        replay: balanced.
        kind: offline or online.
    """

    def __init__(self, replay: Replay, kind: str):
        self.replay, self.kind = replay, kind
        offline = kind == "offline"
        self.buffer = replay.offline if offline else replay.online
        # Of its rows, among those of both kinds.
        self.first = 0 if offline else replay.offline.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.buffer, name)

    def sample(self, batch_size: int) -> Batch:
        """So many rows."""
        return self.gather(self.draw(batch_size))

    def draw(self, batch_size: int) -> Any:
        """Numbers (batch_size,) of rows in the buffer: an array, or on a GPU a tensor there."""
        replay = self.replay
        if self.kind == "offline":
            replay.update(replay.batch_size)
        uniform = replay.draws.uniform(batch_size)
        rows = replay.priorities.draw(uniform, self.kind) - self.first
        # The host must not wait for a GPU.
        return rows.numpy() if rows.is_cpu else rows

    def gather(self, rows: Any) -> Batch:
        """The rows of these numbers (B,), which get new priorities."""
        rows = torch.as_tensor(rows)
        batch = self.buffer.read(rows)
        self.replay.refresh(rows + self.first, batch)
        return batch
