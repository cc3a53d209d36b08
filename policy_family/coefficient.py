"""The coefficient that tells the members of a family apart, and draws of squashed normals.

Wang et al. 2023 (FamO2O), https://arxiv.org/abs/2310.17966, as the authors' code has it
(LeapLabTHU/FamO2O at ea9cb01).
"""

import math

import torch
import torch.nn.functional as F

LOG_2 = math.log(2.0)
HALF_LOG_2_PI = 0.5 * math.log(2.0 * math.pi)


def encode(coefficients: torch.Tensor, base: float, pairs: int) -> torch.Tensor:
    """How a network is told of coefficients: (...) -> (..., 2 pairs).

    Element 2i is sin(beta / base^(i / pairs)), element 2i + 1 the cosine of the same.
    """
    exponents = torch.arange(pairs, dtype=coefficients.dtype, device=coefficients.device)
    angles = coefficients.unsqueeze(-1) / base ** (exponents / pairs)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


def condition(
    states: torch.Tensor, coefficients: torch.Tensor, base: float, pairs: int
) -> torch.Tensor:
    """What a policy of the family reads: states (B, S), coefficients (B,) -> (B, S + 2 pairs)."""
    return torch.cat((states, encode(coefficients, base, pairs)), -1)


def squashed(
    mean: torch.Tensor, log_std: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """tanh of a normal's draw, (..., A), and its log-density (...), in nats.

    The density is computed from the number before the squashing, so it is finite at the bounds.

    Args:
        mean, log_std, noise: shapes that broadcast to (..., A); noise is standard normal.
    """
    raw = mean + log_std.exp() * noise
    # log(1 - tanh(x)^2)
    slope = 2.0 * (LOG_2 - raw - F.softplus(-2.0 * raw))
    log_prob = -0.5 * noise.square() - log_std - HALF_LOG_2_PI - slope
    return raw.tanh(), log_prob.sum(-1)
