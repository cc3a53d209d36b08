"""Fit a denoiser; a fit that was stopped goes on to the same bits."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel

from transition_diffusion.denoiser import Denoiser, denoising_losses

BETAS = (0.9, 0.99)  # of Adam
MAX_NORM = 1.0  # of the gradient
# The averaged weights follow every so many updates, as copies for the first COPIED ones.
AVERAGE_EVERY, COPIED = 10, 100
DECAY, POWER = 0.995, 2 / 3


class DiffusionFit:
    """A denoiser, Adam with a cosine to 0, and averaged weights, which samples are drawn with.

    Args:
        dim: columns of an event.
        width, depth: of the denoiser.
        lr: first learning rate.
        updates: after which the rate is 0.
        seed: of the weights. The global random stream is left alone.
        device: of the weights.
        labels: kinds of events that the denoiser tells apart, see `Denoiser`.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        depth: int,
        lr: float,
        updates: int,
        seed: int,
        device: str = "cpu",
        labels: int = 0,
    ):
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also reseed every GPU, which the fork does not restore.
            torch.default_generator.manual_seed(seed)
            self.denoiser = Denoiser(dim, width, depth, labels)
        self.denoiser.to(device)
        self.optimizer = torch.optim.Adam(self.denoiser.parameters(), lr, BETAS)
        self.schedule = CosineAnnealingLR(self.optimizer, max(1, updates))
        self.average = AveragedModel(self.denoiser, multi_avg_fn=self._follow)
        self.average.requires_grad_(False)
        self.done = 0  # updates made

    def decay(self) -> float:
        """How much of the averaged weights stays: 0 at first, then growing to 0.995."""
        beyond = self.done - COPIED
        return 0.0 if beyond <= 0 else min(DECAY, 1.0 - (1.0 + beyond) ** -POWER)

    def _follow(
        self, averaged: Iterable[Any], current: Iterable[Any], number: Any
    ) -> None:
        weight = 1.0 - self.decay()
        for mean, value in zip(averaged, current, strict=True):
            mean.lerp_(value, weight)

    def start_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Begin with the weights of another denoiser of this size, before the first update."""
        self.denoiser.load_state_dict(weights)
        self.average.module.load_state_dict(weights)

    def update(
        self,
        x: torch.Tensor,
        level: torch.Tensor,
        noise: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step on normalized events (B, D); returns the loss, 0-d. See `denoising_losses`.

        Args:
            x, level, noise: see `denoising_losses`.
            labels: (B,) of a denoiser that knows some.
        """
        denoise = partial(self.denoiser, labels=labels)
        loss = denoising_losses(denoise, x, level, noise).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), MAX_NORM)
        self.optimizer.step()
        self.schedule.step()
        if self.done % AVERAGE_EVERY == 0:
            self.average.update_parameters(self.denoiser)
        self.done += 1
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on."""
        parts = ("denoiser", "optimizer", "schedule", "average")
        return {
            **{part: getattr(self, part).state_dict() for part in parts},
            "done": self.done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for part in ("denoiser", "optimizer", "schedule", "average"):
            getattr(self, part).load_state_dict(state[part])
        self.done = state["done"]
