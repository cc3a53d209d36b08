"""Priorities of rows, and draws in proportion to them, in tensors.

Schaul et al. 2016, https://arxiv.org/abs/1511.05952, Appendix B.2.1: a tree of sums, and one draw
from each of B equal parts of the total. Here the tree has three levels below its root, each node
as many children as there are nodes at the first level. So a draw of a batch and a change of a
batch are a few operations on all of its rows, and no sum drifts: a changed one is computed anew.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

# A place in a sum stays this share below its end, so that no rounding leads beyond the last row.
BELOW = 1.0 - 2.0**-40


class Priorities:
    """One number per row: first those of the dataset, then a ring of online rows.

    Rows of the dataset begin with 1, online rows with the largest priority so far, and those of
    priority 0 are never drawn.

    Args:
        offline: rows of the dataset, N.
        ring: online rows that the online buffer holds.
        device: of the tensors.
        limit: the last rows that were written have a priority, so many; those before have 0.

    Raises:
        ValueError: the dataset alone is more than `limit`.
    """

    def __init__(
        self, offline: int, ring: int, device: str = "cpu", limit: int | None = None
    ):
        if limit is not None and limit < offline:
            raise ValueError(
                f"priority_capacity {limit} is smaller than the dataset of {offline} rows; leave "
                f"it out, or set it to at least {offline}"
            )
        self.offline, self.ring, self.limit = offline, ring, limit
        self.device, self.known = device, 0  # online rows that were added
        width = math.ceil((offline + ring) ** (1 / 3))
        # A cube root may be rounded down.
        self.width = width + (width**3 < offline + ring)
        numbers: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.leaves = torch.zeros(self.width**3, **numbers)
        self.blocks = torch.zeros(self.width**2, **numbers)
        self.top = torch.zeros(self.width, **numbers)
        self.highest = torch.ones((), **numbers)
        self.leaves[:offline] = 1.0
        self._add_up()

    def _levels(self) -> tuple[torch.Tensor, ...]:
        return self.top, self.blocks, self.leaves

    def _add_up(self) -> None:
        """Compute all sums."""
        self.blocks.copy_(self.leaves.view(-1, self.width).sum(-1))
        self.top.copy_(self.blocks.view(-1, self.width).sum(-1))

    def offline_mass(self) -> torch.Tensor:
        """Sum of the priorities of the dataset's rows, ()."""
        node, block = self.offline // self.width**2, self.offline // self.width
        return (
            self.top[:node].sum()
            + self.blocks[node * self.width : block].sum()
            + self.leaves[block * self.width : self.offline].sum()
        )

    def draw(self, uniform: torch.Tensor, half: str = "both") -> torch.Tensor:
        """Rows (B,), one from each of B equal parts of the sum.

        Args:
            uniform: numbers (B,) in [0, 1), float64.
            half: whose rows: offline, online or both. It has rows with a priority.
        """
        count = len(uniform)
        parts = torch.arange(count, device=uniform.device, dtype=uniform.dtype)
        place = (parts + uniform) / count
        if half == "both":
            return self._rows_at(place * self.top.sum())
        border = self.offline_mass()
        if half == "offline":
            # Sums that were rounded otherwise may lead across the border.
            return self._rows_at(place * border).clamp(max=self.offline - 1)
        place = border + place * (self.top.sum() - border)
        return self._rows_at(place).clamp(min=self.offline)

    def _rows_at(self, place: torch.Tensor) -> torch.Tensor:
        """The rows (B,) at these places (B,) of the sum."""
        node = torch.zeros_like(place, dtype=torch.long)
        for level in self._levels():
            ends = level.view(-1, self.width)[node].cumsum(-1)
            place = torch.minimum(place, ends[:, -1] * BELOW).unsqueeze(-1)
            child = (ends <= place).sum(-1)
            before = F.pad(ends, (1, 0)).gather(-1, child.unsqueeze(-1))
            node, place = node * self.width + child, (place - before).squeeze(-1)
        return node

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Set the priorities (n,) of rows (n,); a row that stands there twice has one value."""
        self.leaves[rows] = values
        node = rows
        for above, below in ((self.blocks, self.leaves), (self.top, self.blocks)):
            node = node // self.width
            above[node] = below.view(-1, self.width)[node].sum(-1)
        self.highest.copy_(torch.maximum(self.highest, values.max()))

    def add(self, written: int) -> None:
        """So many online rows have been written: give the new ones the largest priority so far."""
        if written == self.known:
            return
        new = np.arange(self.known, written)
        gone = self._gone(self.known, written)
        self.known = written
        rows = torch.from_numpy(self.offline + new % self.ring).to(self.device)
        self.leaves[rows] = self.highest
        if len(gone):
            self.leaves[torch.from_numpy(gone).to(self.device)] = 0.0
        if len(new) + len(gone) > self.width:
            self._add_up()
            return
        for changed in (rows, torch.from_numpy(gone).to(self.device)):
            if len(changed):
                self.write(changed, self.leaves[changed])

    def _gone(self, known: int, written: int) -> np.ndarray:
        """Rows that fall out of the newest `limit` when there are `written` online rows."""
        if self.limit is None:
            return np.empty(0, np.int64)
        first, last = (max(self.offline + n - self.limit, 0) for n in (known, written))
        order = np.arange(first, last)
        number = order - self.offline
        # An online row whose place in the ring a newer one has taken is gone already.
        there = (number < 0) | (number >= written - self.ring)
        rows = np.where(number < 0, order, self.offline + number % self.ring)
        return rows[there]

    def state_dict(self) -> dict[str, Any]:
        """The numbers of the rows that there are, and the sums as they were rounded."""
        last = self.offline + min(self.known, self.ring)
        return {
            "offline": self.leaves[: self.offline].cpu(),
            "online": self.leaves[self.offline : last].cpu(),
            "blocks": self.blocks.cpu(),
            "top": self.top.cpu(),
            "highest": self.highest.cpu(),
            "known": self.known,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: it has more online rows than there is room for.
        """
        rows = len(state["online"])
        if rows > self.ring:
            raise ValueError(
                f"it has the priorities of {rows} online rows, and buffer_size is {self.ring}"
            )
        self.leaves.zero_()
        self.leaves[: self.offline] = state["offline"].to(self.device)
        self.leaves[self.offline : self.offline + rows] = state["online"].to(self.device)
        for name in ("blocks", "top", "highest"):
            getattr(self, name).copy_(state[name])
        self.known = state["known"]
