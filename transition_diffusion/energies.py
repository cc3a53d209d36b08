"""EDIS's three energies (Liu et al. 2024, arXiv 2407.12448): what they learn and where they pull.

    state       online states against those of the diffusion model
    transition  online next states against those of the model with the same state and action
    policy      actions of the current policy against those of the model in the same state

Each is trained by InfoNCE on noised events. Where both sides are noised alike, its optimum is
E_t(z) = ln p_t(z of the model) - ln p_t(z online) + const. The model times exp(-E_t) is then the
noised online law, and grad E_t is the exact guidance (`ConsistentEnergies`).

`PublicEnergies` is what the authors' code does (liuxhym/EDIS, commit 28bf16d). It noises the two
sides in different coordinates and at few levels, and its conditions replace whole events.

Shapes: B anchors, K negatives per anchor, L noise levels, D columns of an event.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from transition_diffusion.sampler import (
    Condition,
    Guide,
    Normal,
    noise_levels,
    trajectory,
)
from transition_diffusion.transitions import Layout, Normalizer

KINDS = ("state", "transition", "policy")  # in the order of training
HIDDEN = 256
CAP = 10.0  # guidance is no longer than CAP sqrt(D)
# The authors' schedule where negatives are made, and the steps of it that energies see.
PUBLIC_STEPS, PUBLIC_EVERY = 32, 16

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def energy_network(columns: int) -> nn.Sequential:
    """Events (..., columns) with a time behind them -> energies (..., 1), in nats."""
    widths = [columns + 1, HIDDEN, HIDDEN, HIDDEN]
    layers: list[nn.Module] = []
    for n_in, n_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, 1))


def contrastive_losses(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """InfoNCE of energies in nats: (..., P) positives, (..., N) negatives -> (..., P).

    -ln of the share of exp(-E) that a positive has of all P + N in its group.
    """
    everything = torch.cat((-positive, -negative), -1)
    return positive + everything.logsumexp(-1, keepdim=True)


class Energies(nn.Module):
    """Three networks and where they pull; the forms differ in what a network is given.

    Args:
        layout: of the events.
        negatives: K.
        steps: of the sampler's schedule.
        levels: L, noise levels at which the energies learn.
    """

    def __init__(self, layout: Layout, negatives: int, steps: int, levels: int):
        super().__init__()
        self.layout, self.negatives = layout, negatives
        self.steps, self.levels = steps, levels
        self.networks = nn.ModuleDict(
            {kind: energy_network(len(self.columns(kind))) for kind in KINDS}
        )
        self.normalizer = Normalizer(layout.width)

    def columns(self, kind: str) -> list[int]:
        """Columns of an event that a network sees."""
        raise NotImplementedError

    def energy(
        self, kind: str, events: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Energies (...) of noised events (..., D) at a time that broadcasts to (...)."""
        shown = events[..., self.columns(kind)]
        time = time.expand(shown.shape[:-1]).unsqueeze(-1)
        return self.networks[kind](torch.cat((shown, time), -1)).squeeze(-1)

    def losses(
        self, kind: str, positives: torch.Tensor, denoise: Denoise, normal: Normal
    ) -> torch.Tensor:
        """InfoNCE of one energy, a term per positive and noise level, (B L,).

        Args:
            positives: online events (B, D), not normalized; for `policy` with actions of the
                current policy.
            denoise: of the diffusion model.
            normal: draws noise.
        """
        raise NotImplementedError

    def condition_of(self, kind: str) -> torch.Tensor:
        """Mask (D,) of what an anchor and its negatives have in common."""
        mask = torch.zeros(self.layout.width, dtype=torch.bool)
        if kind != "state":
            mask[self.layout.state] = True
        if kind == "transition":
            mask[self.layout.action] = True
        return mask.to(self.normalizer.mean.device)

    def pulled(self, kind: str) -> slice:
        """The columns that an energy pulls; the reward is never pulled."""
        parts = {"state": self.layout.state, "policy": self.layout.action}
        return parts.get(kind, self.layout.next_state)

    def gradient(
        self, places: torch.Tensor, time: torch.Tensor, scales: dict[str, float]
    ) -> torch.Tensor:
        """Scaled gradients, each in its energy's own columns, (B, D); capped per row."""
        with torch.enable_grad():
            x = places.detach().requires_grad_(True)
            found = torch.zeros_like(places)
            for kind in KINDS:
                if scales[kind] == 0.0:
                    continue
                (own,) = torch.autograd.grad(self.energy(kind, x, time).sum(), x)
                columns = self.pulled(kind)
                found[:, columns] = scales[kind] * own[:, columns]
        longest = CAP * math.sqrt(self.layout.width)
        return found * (longest / found.norm(dim=-1, keepdim=True)).clamp(max=1.0)

    def guide(self, scales: dict[str, float], exact: bool) -> Guide:
        """The pull of a sampler's steps.

        Args:
            scales: kind -> factor of its gradient.
            exact: times sigma, so that factors of 1 give the score of p exp(-E); else the
                authors' form, the same factor at every noise level.
        """
        raise NotImplementedError


class ConsistentEnergies(Energies):
    """Normalized coordinates and the sampler's schedule on both sides.

    A network sees what it is for: s, (s, a, s') or (s, a), scaled to standard deviation 1 as a
    denoiser's input is, and ln(sigma) / 4.
    """

    def energy(
        self, kind: str, events: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Energies (...) of noised events (..., D) at ln(sigma) / 4."""
        scale = ((8.0 * time).exp() + 1.0).rsqrt().unsqueeze(-1)
        return super().energy(kind, scale * events, time)

    def columns(self, kind: str) -> list[int]:
        """Those that the energy is about."""
        everything = list(range(self.layout.width))
        parts = [self.layout.state]
        if kind != "state":
            parts.append(self.layout.action)
        if kind == "transition":
            parts.append(self.layout.next_state)
        return [column for part in parts for column in everything[part]]

    def taught(self) -> list[int]:
        """The steps at whose noise levels the energies learn, spread over the schedule."""
        return sorted({i * self.steps // self.levels for i in range(self.levels)})

    def losses(
        self, kind: str, positives: torch.Tensor, denoise: Denoise, normal: Normal
    ) -> torch.Tensor:
        """InfoNCE at every level of `taught`; negatives of one trajectory per anchor and K."""
        z, mask = self.normalizer(positives), self.condition_of(kind)
        b, d = z.shape
        anchors = z.repeat_interleave(self.negatives, 0)
        condition = Condition(anchors, mask) if mask.any() else None
        steps, levels = self.taught(), noise_levels(self.steps)
        # The last level that is asked for ends the trajectory.
        path = trajectory(
            denoise, (len(anchors), d), self.steps, normal, condition=condition
        )
        reached = [
            x for i, x in zip(range(steps[-1] + 1), path, strict=False) if i in steps
        ]
        sigma = z.new_tensor([levels[i] for i in steps])[:, None, None]
        negatives = torch.stack(reached)
        # The condition is without noise there, and an anchor's is noised.
        noised = anchors + sigma * normal((len(steps), *anchors.shape))
        negatives = torch.where(mask, noised, negatives)
        noised = z + sigma * normal((len(steps), b, d))
        time = sigma.squeeze(-1).log() / 4.0
        positive = self.energy(kind, noised, time)
        negative = self.energy(kind, negatives, time)
        if kind != "state":
            positive = positive.unsqueeze(-1)
            negative = negative.unflatten(-1, (b, self.negatives))
        return contrastive_losses(positive, negative).flatten()

    def guide(self, scales: dict[str, float], exact: bool) -> Guide:
        """The pull at the place and the noise level of each slope."""

        def slope(z: torch.Tensor, sigma: float, i: int) -> torch.Tensor:
            time = z.new_full((), math.log(sigma) / 4.0)
            return (sigma if exact else 1.0) * self.gradient(z, time, scales)

        return Guide(slope)


class PublicEnergies(Energies):
    """The authors' code: raw coordinates, whole events, the number of the step as time.

    The state energy learns at step 0 alone, the others at the steps 0 and 16 of a schedule of
    32. In-painting overwrites all columns, with zeros for those that are no condition: so no
    negative needs the denoiser.
    """

    def columns(self, kind: str) -> list[int]:
        """All but a terminal, which the authors' energies do not know."""
        return list(range(2 * self.layout.state_dim + self.layout.action_dim + 1))

    def _negatives(
        self, kind: str, events: torch.Tensor, normal: Normal
    ) -> torch.Tensor:
        """What the sampler leaves of conditions (B K, D) at step 0 and, but for states, at 16."""
        first = noise_levels(PUBLIC_STEPS)[0] * normal(tuple(events.shape))
        found = [self.normalizer.undo(first)]
        if kind != "state":
            found.append(torch.where(self.condition_of(kind), events, 0.0))
        return torch.stack(found)

    def losses(
        self, kind: str, positives: torch.Tensor, denoise: Denoise, normal: Normal
    ) -> torch.Tensor:
        """InfoNCE at the authors' levels, in their groups."""
        steps = [0] if kind == "state" else list(range(0, PUBLIC_STEPS, PUBLIC_EVERY))
        levels = noise_levels(PUBLIC_STEPS)
        sigma = positives.new_tensor([levels[i] for i in steps])[:, None, None]
        time = positives.new_tensor(steps, dtype=positives.dtype)[:, None]
        anchors = positives.repeat_interleave(self.negatives, 0)
        negatives = self._negatives(kind, anchors, normal)
        noised = positives + sigma * normal((len(steps), *positives.shape))
        positive = self.energy(kind, noised, time)
        negative = self.energy(kind, negatives, time)
        if kind == "state":
            return contrastive_losses(positive, negative).flatten()
        # The list of all levels, one after the other, is cut into groups of neighbours, so that
        # a group holds the negatives of two anchors.
        b, k = len(positives), self.negatives
        positive = positive.reshape(b, 1, -1).mT
        negative = negative.reshape(b, k, -1).mT
        return contrastive_losses(positive, negative).flatten()

    def guide(self, scales: dict[str, float], exact: bool) -> Guide:
        """The pull before the noise of a step, from raw coordinates; `exact` is not known."""

        def slope(z: torch.Tensor, sigma: float, i: int) -> torch.Tensor:
            time = z.new_full((), float(i))
            return self.gradient(self.normalizer.undo(z), time, scales)

        return Guide(slope, before_noise=True)


FORMS: dict[str, Any] = {"consistent": ConsistentEnergies, "public": PublicEnergies}
