"""The denoiser of EDM (Karras et al. 2022, arXiv 2206.00364) with a residual MLP inside.

Noise is added to a normalized event, x + sigma n. The denoiser answers with its estimate of x.
Data have standard deviation 1 (EDM's sigma_data).
"""

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F

# ln sigma of the training noise is normal with this mean and standard deviation.
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2
TIME_DIM = 256
FREQUENCIES = 8


class NoiseFeatures(nn.Module):
    """c = ln(sigma) / 4 as [c, sin 2 pi f c, cos 2 pi f c] with fixed random f."""

    frequencies: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(FREQUENCIES))

    def forward(self, c: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B, 17)"""
        c = c.unsqueeze(-1)
        angles = 2.0 * math.pi * c * self.frequencies
        return torch.cat((c, angles.sin(), angles.cos()), -1)


class Denoiser(nn.Module):
    """Estimates of events from noised ones and their noise levels.

    c_skip x + c_out F(c_in x, ln(sigma) / 4), EDM's Table 1. F is a residual MLP with ReLU.

    Args:
        dim: D.
        width: of the hidden layers.
        depth: residual layers.
        labels: kinds of events, whose embedding is added to that of the noise; 0: there are none.
    """

    def __init__(self, dim: int, width: int = 1024, depth: int = 6, labels: int = 0):
        super().__init__()
        self.noise = nn.Sequential(
            NoiseFeatures(),
            nn.Linear(2 * FREQUENCIES + 1, TIME_DIM),
            nn.SiLU(),
            nn.Linear(TIME_DIM, TIME_DIM),
        )
        self.project = nn.Linear(dim, TIME_DIM)
        self.first = nn.Linear(TIME_DIM, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, dim)
        self.label = nn.Embedding(labels, TIME_DIM) if labels else None

    def network(
        self, x: torch.Tensor, c: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """F: (B, D), (B,) and labels (B,), if it knows some -> (B, D)."""
        h = self.project(x) + self.noise(c)
        if self.label is not None and labels is not None:
            h = h + self.label(labels)
        h = self.first(h)
        for block in self.blocks:
            h = h + block(F.relu(h))
        return self.last(F.relu(h))

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, D), (B,) and labels (B,), if it knows some -> (B, D)"""
        s = sigma.unsqueeze(-1)
        scale = (s.square() + 1.0).rsqrt()
        answer = self.network(scale * x, sigma.log() / 4.0, labels)
        return scale.square() * x + s * scale * answer


def denoising_losses(
    denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    level: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """EDM's loss of each row, (B,): weight (sigma^2 + 1) / sigma^2 times the mean square.

    Args:
        denoiser: as `Denoiser`.
        x: normalized events (B, D).
        level: standard normal (B,), which becomes sigma.
        noise: standard normal (B, D).
    """
    sigma = (LOG_SIGMA_MEAN + LOG_SIGMA_STD * level).exp()
    estimate = denoiser(x + sigma.unsqueeze(-1) * noise, sigma)
    weight = (sigma.square() + 1.0) / sigma.square()
    return weight * (estimate - x).square().mean(-1)
