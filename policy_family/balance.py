"""The balance model: which member of the family acts in which state."""

import torch
import torch.nn as nn

from policy_family.coefficient import squashed

LOG_STD_MAX = 2.0


class BalanceModel(nn.Module):
    """pi_b(beta|s): a squashed normal x in (-1, 1), moved to the range of the coefficients.

    Args:
        network: states (B, S) -> (B, 1), the mean of x before the squashing; with `state_std`
            (B, 2), whose second column is log std before two learned numbers scale and shift it.
        low, high: the range.
        log_std_min: lowest log std.
        state_std: the standard deviation depends on the state. Otherwise it is one learned number.
        shifted: x + 1 counts as twice a share of the range. Otherwise x itself is the share, as in
            the public code of the CQL form, and beta lies in (2 low - high, high).
    """

    def __init__(
        self,
        network: nn.Module,
        low: float,
        high: float,
        log_std_min: float,
        state_std: bool = False,
        shifted: bool = True,
    ):
        super().__init__()
        self.network, self.low, self.high = network, low, high
        self.log_std_min = log_std_min
        self.state_std, self.shifted = state_std, shifted
        if state_std:
            self.log_std_multiplier = nn.Parameter(torch.tensor(1.0))
            self.log_std_offset = nn.Parameter(torch.tensor(-1.0))
        else:
            self.log_std = nn.Parameter(torch.zeros(1))

    def _moments(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, 1) and log std, (B, 1) or (1,), before the squashing."""
        mean = self.network(states)
        if self.state_std:
            mean, log_std = mean.chunk(2, dim=-1)
            log_std = self.log_std_multiplier * log_std + self.log_std_offset
        else:
            log_std = self.log_std
        return mean, log_std.clamp(self.log_std_min, LOG_STD_MAX)

    def _place(self, x: torch.Tensor) -> torch.Tensor:
        """Coefficients (B,) of squashed numbers (B, 1)."""
        share = (x.squeeze(-1) + 1.0) / 2.0 if self.shifted else x.squeeze(-1)
        return self.low + share * (self.high - self.low)

    def forward(
        self, states: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients (B,) for normal noise (B,), and log-densities (B,) of their x, in nats.

        The density is that of x: the move to the range adds a constant, which is left out.
        """
        x, log_prob = squashed(*self._moments(states), noise.unsqueeze(-1))
        return self._place(x), log_prob

    def mode(self, states: torch.Tensor) -> torch.Tensor:
        """The coefficients (B,) that act: those of the squashed mean."""
        return self._place(self._moments(states)[0].tanh())

    def spread(self, shares: torch.Tensor) -> torch.Tensor:
        """Coefficients (B,) of shares (B,) of the range, from 0 to 1."""
        return self.low + shares * (self.high - self.low)
