"""The coefficient of each state, the threshold that it learns from, and its annealing online.

Luo, Xie, Wang and Huang 2025, https://arxiv.org/abs/2505.19923, with the constants of their public
code (QinwenLuo/SSAR at 7e6dc0b) where the paper has none.
"""

import math

import torch
import torch.nn as nn

# The shapes of the annealing; "none" keeps the coefficient.
ANNEALING = ("linear", "cosine", "none")


class CoefficientNet(nn.Module):
    """beta(s): states (B, S) -> (B,) in (0, 1.5 beta_init), about beta_init at the start.

    It has three hidden layers of 512 (public code). Adam moves it by 1e-8 a step, which float16
    weights would not notice.
    """

    def __init__(self, state_dim: int, beta_init: float, hidden_dim: int = 512):
        super().__init__()
        self.highest = 1.5 * beta_init
        widths = [state_dim, *3 * [hidden_dim], 1]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        layers = [nn.Linear(n_in, n_out) for n_in, n_out in pairs]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        # The sigmoid of ln 2 is 2/3.
        nn.init.constant_(layers[-1].bias, math.log(2.0))
        hidden = [part for layer in layers[:-1] for part in (layer, nn.ReLU())]
        self.net = nn.Sequential(*hidden, layers[-1])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The coefficients (B,) of states (B, S)."""
        return self.highest * torch.sigmoid(self.net(states)).squeeze(-1)


def coefficient_losses(
    gaps: torch.Tensor, trust: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Eq. 5: gap times coefficient of each trusted row, (B,); the gradient reaches beta alone.

    Args:
        gaps: (B,), how far the data's action lies inside the threshold; below 0: outside, and the
            coefficient rises.
        trust: (B,), 1 or 0.
        beta: (B,).
    """
    return gaps.detach() * trust * beta


class Threshold(nn.Module):
    """n, the distance from the policy's mean, in deviations, at which a data action is "inside".

    At each check n rises by a step, up to `end`, until the trusted rows of the batch are inside on
    average. From then on it stays. Both of its numbers are tensors, so that nobody waits for them.

    Args:
        start, end: the first and the highest n.
        raises: steps from the one to the other.
    """

    n: torch.Tensor
    rising: torch.Tensor

    def __init__(self, start: float, end: float, raises: int):
        super().__init__()
        self.end, self.step = end, (end - start) / raises
        self.register_buffer("n", torch.tensor(float(start)))
        # 1 until it has stopped.
        self.register_buffer("rising", torch.tensor(1.0))

    @torch.no_grad()
    def check(self, gaps: torch.Tensor, trust: torch.Tensor, due: torch.Tensor) -> None:
        """Raise n, or stop, where `due` is 1 and a row is trusted; nothing where it is 0.

        Args:
            gaps, trust: (B,), as of `coefficient_losses`.
            due: 0-d.
        """
        count = trust.sum()
        inside = ((gaps * trust).sum() / count.clamp(min=1.0) > 0).float()
        # The public code raises n where no row is trusted, too: the mean is nan there.
        due = due * self.rising * (count > 0)
        raised = (self.n + self.step).clamp(max=self.end)
        self.n.copy_(torch.where(due * (1.0 - inside) > 0, raised, self.n))
        self.rising.mul_(1.0 - due * inside)


def annealing(steps: int, length: int, shape: str) -> float:
    """Factor on the coefficient after `steps` online: 1 at 0, 0 from `length` on.

    Eq. 15 has a min for the max, with which the factor would be 0 at the start and negative after.

    Args:
        steps: environment steps since the warm-up; below 0: 0.
        length: steps after which the factor is 0.
        shape: of `ANNEALING`; the paper's is linear, the public code of CQL(SA) has a quarter of a
            cosine.
    """
    if shape == "none":
        return 1.0
    share = min(max(steps, 0) / length, 1.0)
    return 1.0 - share if shape == "linear" else math.cos(share * math.pi / 2)
