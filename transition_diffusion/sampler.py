"""EDM's stochastic Heun sampler (Karras et al. 2022, Algorithm 2), with guidance and conditions."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
S_CHURN, S_TMIN, S_TMAX, S_NOISE = 80.0, 0.05, 50.0, 1.003

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Shape -> standard normal noise.
Normal = Callable[[tuple[int, ...]], torch.Tensor]
# (normalized events (B, D), their noise level, number of the step) -> added to dx / dsigma.
Slope = Callable[[torch.Tensor, float, int], torch.Tensor]


class Guide(NamedTuple):
    """What pulls samples somewhere.

    Attributes:
        slope: added to dx / dsigma.
        before_noise: the first slope of a step is that of the place before the step's noise.
    """

    slope: Slope
    before_noise: bool = False


class Condition(NamedTuple):
    """Columns that are overwritten after every step: values (B, D), mask (D,) of True."""

    values: torch.Tensor
    mask: torch.Tensor


def noise_levels(steps: int) -> list[float]:
    """sigma_0 = 80 down to sigma_{steps-1} = 0.002, then 0; EDM Eq. 5."""
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    span = max(1, steps - 1)
    return [(high + i / span * (low - high)) ** RHO for i in range(steps)] + [0.0]


def churned(levels: list[float], i: int) -> float:
    """The noise level to which step i raises that of its place."""
    inside = S_TMIN <= levels[i] <= S_TMAX
    gamma = min(S_CHURN / (len(levels) - 1), math.sqrt(2.0) - 1.0) if inside else 0.0
    return levels[i] * (1.0 + gamma)


def slope_of(denoise: Denoise, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """dx / dsigma = (x - D(x; sigma)) / sigma, (B, D)."""
    return (x - denoise(x, x.new_full(x.shape[:1], sigma))) / sigma


def heun_step(
    denoise: Denoise,
    x: torch.Tensor,
    levels: list[float],
    i: int,
    noise: torch.Tensor,
    guide: Guide | None = None,
) -> torch.Tensor:
    """From noise level i to level i + 1: (B, D) -> (B, D).

    Args:
        denoise: as `denoiser.Denoiser`.
        x: at `levels[i]`.
        levels: of `noise_levels`.
        noise: standard normal (B, D), for the churn.
    """
    high, following = churned(levels, i), levels[i + 1]
    raised = x + math.sqrt(high**2 - levels[i] ** 2) * S_NOISE * noise
    slope = slope_of(denoise, raised, high)
    if guide is not None:
        place = (x, levels[i]) if guide.before_noise else (raised, high)
        slope = slope + guide.slope(*place, i)
    euler = raised + (following - high) * slope
    if following == 0.0:
        return euler
    second = slope_of(denoise, euler, following)
    if guide is not None:
        second = second + guide.slope(euler, following, i)
    return raised + 0.5 * (following - high) * (slope + second)


@torch.no_grad()
def trajectory(
    denoise: Denoise,
    shape: tuple[int, int],
    steps: int,
    normal: Normal,
    guide: Guide | None = None,
    condition: Condition | None = None,
) -> Iterator[torch.Tensor]:
    """Normalized events (B, D) at the noise levels 0 to `steps`, the last one without noise.

    Args:
        denoise: as `denoiser.Denoiser`.
        shape: (B, D).
        steps: of the schedule; 2 steps - 1 evaluations of the denoiser.
        normal: draws the noise.
    """
    levels = noise_levels(steps)
    x = levels[0] * normal(shape)
    yield x
    for i in range(steps):
        x = heun_step(denoise, x, levels, i, normal(shape), guide)
        if condition is not None:
            x = torch.where(condition.mask, condition.values, x)
        yield x
