"""Which rows of a batch keep their conservative loss, and how a loss is weighted by it."""

from typing import NamedTuple

import torch


class Release(NamedTuple):
    """Which rows of a batch keep their conservative loss.

    weight: (B,), 1 keeps, 0 releases, anything between is a soft release.
    kept: number of leading rows of weight 1 where all others have weight 0, so that a loss of
        weight 0 need not be computed; None with soft weights.
    """

    weight: torch.Tensor
    kept: int | None = None

    def keep(self, conservative: torch.Tensor) -> torch.Tensor:
        """weight * conservative, (B,), of conservative losses per row.

        Args:
            conservative: (kept,), of the rows that are kept; (B,) with soft weights.
        """
        if self.kept is None:
            return self.weight * conservative
        # All rows are there, so that sums over a batch keep their order. Not padded: in one update
        # torch 2.11 fused padding and mean on a GPU into a sum over rows that are not kept.
        skipped = conservative.new_zeros(self.weight.shape[-1] - self.kept)
        return torch.cat((conservative, skipped))

    def mix(self, conservative: torch.Tensor, released: torch.Tensor) -> torch.Tensor:
        """weight * conservative + (1 - weight) * released, (B,), of losses per row.

        Args:
            conservative: (B,).
            released: (B - kept,), of the rows that are not kept; (B,) with soft weights.
        """
        if self.kept is None:
            return self.weight * conservative + (1.0 - self.weight) * released
        return torch.cat((conservative[: self.kept], released))

    def average(self, kept: torch.Tensor) -> torch.Tensor:
        """Mean of a conservative loss by the weights, 0-d; not finite where all weights are 0.

        Two releases can be compared by it at another total weight, and rows whose loss was not
        computed have no part in it.

        Args:
            kept: (B,), as `keep` returns it.
        """
        return kept.detach().sum(-1) / self.weight.sum(-1)

    def whole(self) -> "Release":
        """The release that keeps all rows, where an algorithm's own coefficient has the weight."""
        return Release(torch.ones_like(self.weight), self.weight.shape[-1])
