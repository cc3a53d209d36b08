"""What is fitted to the rows of one seed: behavior models, an energy, a classifier."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.exchange_accuracy.rows import (
    Policy,
    Rows,
    collect_rows,
    contaminate,
    load_policy,
    split,
    stack,
)
from benchmarks.exchange_accuracy.settings import LEVELS, Settings
from corl_dare import behavior, guidance
from corl_dare.cache import fit_cached

# States that the energy is fitted in, and support actions of each state.
ENERGY_STATES, SUPPORT = 2048, 16


class Regressor(nn.Module):
    """A ReLU network on standardized (s, a) with one output."""

    def __init__(self, states: torch.Tensor, actions: torch.Tensor, seed: int):
        super().__init__()
        inputs = torch.cat([states, actions], -1)
        std, mean = torch.std_mean(inputs, 0)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std.clamp(min=1e-3))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(inputs.shape[1], 128),
                nn.ReLU(),
                nn.Linear(128, 128),
                nn.ReLU(),
                nn.Linear(128, 1),
            )

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """(B, S), (B, A) -> (B,)"""
        inputs = (torch.cat([states, actions], -1) - self.mean) / self.std
        return self.net(inputs).squeeze(-1)


def regress(
    rows: Rows, targets: torch.Tensor, loss: Callable, updates: int, seed: int
) -> Regressor:
    """A network trained on batches of 256 rows with targets (N,).

    The optimizer is Adam; its rate falls from 1e-3 to 0 along a cosine.
    """
    model = Regressor(rows.states, rows.actions, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        index = torch.randint(len(targets), (256,), generator=generator)
        value = loss(model(rows.states[index], rows.actions[index]), targets[index])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def fit_classifier(off: Rows, on: Rows, updates: int, seed: int) -> Regressor:
    """Log-odds that a row comes from the online buffer rather than the offline one."""
    labels = torch.cat([torch.zeros(len(off.states)), torch.ones(len(on.states))])
    loss = F.binary_cross_entropy_with_logits
    return regress(stack(off, on), labels, loss, updates, seed)


class Guidance(NamedTuple):
    """An energy network and how well it was fitted.

    loss: its cross-entropy in the last updates, nats.
    entropy: that of the labels, nats: the loss cannot get below it.
    """

    energy: guidance.EnergyNetwork
    loss: float
    entropy: float

    def gradient(self, x: torch.Tensor, t: float, states: torch.Tensor) -> torch.Tensor:
        """What the sampler adds to the score at noise level t."""
        return guidance.energy_gradient(self.energy, x, t, states)


def fit_guidance(
    model: behavior.BehaviorModel, off: Rows, on: Rows, span: float, settings: Settings
) -> Guidance:
    """An energy that follows a Q, as in the hook; here the Q of those who acted.

    This Q is a regression of the discounted returns to go of the rows of both buffers.
    `span` is the range of the undiscounted returns. As in the hook, Q is scaled as if that
    range were 1000.
    """
    rows = stack(off, on)
    known = rows.take(rows.returns.isfinite().nonzero().squeeze(1))
    std, mean = torch.std_mean(known.returns)
    targets = (known.returns - mean) / std
    q = regress(known, targets, F.mse_loss, settings.q_updates, settings.seed)

    generator = torch.Generator().manual_seed(settings.seed)
    index = torch.randint(len(rows.states), (ENERGY_STATES,), generator=generator)
    states = rows.states[index]  # (E, S)
    support = sample_clipped(model, states, SUPPORT, generator)  # (E, SUPPORT, A)
    repeated = states.repeat_interleave(SUPPORT, 0)
    values = q(repeated, support.flatten(0, 1)) * std
    values = values.view(-1, SUPPORT) * 1000.0 / span
    energy = guidance.EnergyNetwork(
        model.state_dim,
        model.action_dim,
        hidden_dim=settings.energy_width,
        seed=settings.seed,
    )
    losses = _train_energy(energy, states, support, values, settings, generator)
    labels = (settings.energy_beta * values).log_softmax(-1)
    entropy = -(labels.exp() * labels).sum(-1).mean()
    last = torch.stack(losses[-200:]).mean()
    return Guidance(energy.requires_grad_(False), last.item(), entropy.item())


def _train_energy(
    energy: guidance.EnergyNetwork,
    states: torch.Tensor,
    support: torch.Tensor,
    values: torch.Tensor,
    settings: Settings,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """The contrastive loss of every update; states (E, S), support (E, K, A), values (E, K)."""
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3, fused=True)
    losses = []
    for _ in range(settings.energy_updates):
        index = torch.randint(
            len(states), (settings.energy_states,), generator=generator
        )
        loss = guidance.contrastive_loss(
            energy,
            support[index],
            values[index],
            states[index],
            settings.energy_beta,
            generator,
            behavior.noise_schedule,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def sample_clipped(
    model: behavior.BehaviorModel,
    states: torch.Tensor,
    n: int,
    generator: torch.Generator,
    **options,
) -> torch.Tensor:
    """Reference actions (B, n, A), clipped to [-1, 1] as the hook does."""
    parts = [model.sample(chunk, n, generator, **options) for chunk in states.split(256)]
    return torch.cat(parts).clamp(-1.0, 1.0)


@dataclass
class Models:
    """Everything that the scores of one pair of policies are computed from.

    behavior_policy, online_policy: those that acted, with their exact densities.
    diffusion, gaussian, mixture: models of the behavior, fitted to the offline half.
    fitted_online: a mixture fitted to the rows of the online half.
    classifier: of the two buffers.
    """

    behavior_policy: Policy
    online_policy: Policy
    diffusion: behavior.BehaviorModel
    gaussian: behavior.BehaviorModel
    mixture: behavior.BehaviorModel
    fitted_online: behavior.BehaviorModel
    guidance: Guidance
    classifier: Regressor
    settings: Settings

    def references(
        self, source: str, states: torch.Tensor, n: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Reference actions (B, n, A) in states (B, S).

        source: `policy` (the behavior itself), `diffusion` (unguided), or the setting that
        holds the scale of the guidance.
        """
        if source == "policy":
            return self.behavior_policy.sample(states, n, generator)
        options = {}
        if source != "diffusion":
            options = {
                "guidance": self.guidance.gradient,
                "scale": getattr(self.settings, source),
            }
        return sample_clipped(self.diffusion, states, n, generator, **options)


class Experiment:
    """Rows, policies and fits of one seed; models of a half see only the rows of that half.

    sources: where the rows come from. returns: smallest, mean and largest return of the
    episodes of a level. clamped: share of rows of a level with an action on the bounds.
    fits: how well the energies were fitted.
    """

    def __init__(self, settings: Settings, levels: list[str], folder: Path):
        self.settings, self.folder = settings, folder
        self.policies = {x: load_policy(settings.robot, x) for x in levels}
        self.fit_off, self.fit_on, self.pool_off, self.pool_on = {}, {}, {}, {}
        self.sources, self.returns, self.clamped, self.fits = [], {}, {}, {}
        for level in levels:
            self._collect(level)

    def _collect(self, level: str) -> None:
        settings, parts = self.settings, []
        # Two collections: no episode is both fitted and scored. Far more rows than are scored,
        # so that few of these are neighbors in time.
        sizes = settings.fit_rows, max(settings.pool_rows, settings.fit_rows // 3)
        wanted = settings.fit_rows, settings.pool_rows
        for part, (rows, size) in enumerate(zip(sizes, wanted, strict=True)):
            seed = 2 * settings.seed + part
            found, source = collect_rows(
                settings.robot, level, 2 * rows, seed, self.folder
            )
            self.sources.append(source)
            self.returns.setdefault(level, source["episode_returns"])
            rng = np.random.default_rng([settings.seed, LEVELS.index(level), part])
            parts += split(found, [size] * 2, rng)
        self.fit_off[level], self.fit_on[level] = parts[:2]
        self.pool_off[level], self.pool_on[level] = parts[2:]
        on_bounds = stack(*parts).actions.abs() > 1 - 1e-6
        self.clamped[level] = on_bounds.any(1).double().mean().item()

    def fit(self, kind: str, rows: Rows, name: str) -> behavior.BehaviorModel:
        """A behavior model of the rows, from the cache if it was fitted before."""
        s = self.settings
        diffusion = kind == "diffusion"
        options = {"width": s.diffusion_width} if diffusion else {"hidden_dim": 128}
        model, _, _ = fit_cached(
            kind,
            rows.states,
            rows.actions,
            updates=s.diffusion_updates if diffusion else s.density_updates,
            batch_size=s.diffusion_batch if diffusion else s.density_batch,
            lr=s.diffusion_lr if diffusion else s.density_lr,
            seed=s.seed,
            dataset_hash=f"{name} {json.dumps(self.sources)}",
            cache_dir=self.folder / "behavior",
            options=options,
            progress=sys.stderr.isatty(),
        )
        return model

    def buffers(self, pair: tuple[str, str], share: float) -> tuple[Rows, Rows]:
        """Rows to fit models to; a share of each buffer comes from the other policy."""
        own, other = pair
        off = contaminate(self.fit_off[own], self.fit_off[other], share)
        on = contaminate(self.fit_on[other], self.fit_on[own], share)
        return off, on

    def models(self, pair: tuple[str, str], share: float = 0.0) -> Models:
        """Fits for a pair (behavior, online) on buffers that are contaminated by `share`."""
        own, other = pair
        off, on = self.buffers(pair, share)
        tag = f"{own} with {share} {other}" if share else own
        tag_on = f"{other} with {share} {own}" if share else other
        kinds = ("diffusion", "gaussian", "mixture")
        nu = [self.fit(kind, off, f"offline half, {tag}") for kind in kinds]
        pi = self.fit("mixture", on, f"online half, {tag_on}")
        returns = [self.returns[level] for level in pair]
        span = max(r[2] for r in returns) - min(r[0] for r in returns)
        fitted = fit_guidance(nu[0], off, on, span, self.settings)
        models = Models(
            self.policies[own],
            self.policies[other],
            *nu,
            pi,
            fitted,
            self.classifier(pair, share),
            self.settings,
        )
        self.fits[f"{tag} / {tag_on}"] = {
            "energy_loss": fitted.loss,
            "energy_label_entropy": fitted.entropy,
            "references_clipped": self._clipped(models, own),
        }
        return models

    def _clipped(self, models: Models, level: str) -> list[float]:
        """Share of clipped coordinates of references: unguided, small scale, large scale."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        states = self.pool_off[level].states[:256]
        return [
            (models.references(x, states, 1, generator).abs() == 1).float().mean().item()
            for x in ("diffusion", "small_guidance_scale", "guidance_scale")
        ]

    def classifier(self, pair: tuple[str, str], share: float) -> Regressor:
        """A classifier of the two buffers, contaminated by `share` as they are in a run."""
        updates = self.settings.classifier_updates
        return fit_classifier(*self.buffers(pair, share), updates, self.settings.seed)

    def rollout_rows(self, pair: tuple[str, str]) -> tuple[Rows, Rows]:
        """Rows that no model has seen, in the states that each policy visits."""
        return self.pool_off[pair[0]], self.pool_on[pair[1]]

    def fitted_rows(self, pair: tuple[str, str]) -> tuple[Rows, Rows]:
        """Rows that the models have seen, as in a run."""
        index = torch.arange(min(self.settings.pool_rows, self.settings.fit_rows))
        return self.fit_off[pair[0]].take(index), self.fit_on[pair[1]].take(index)

    def shared_states(self, pair: tuple[str, str]) -> tuple[Rows, Rows]:
        """Both policies act in the states of both; there the oracle ratio is the Bayes score."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        states = torch.cat([pool.states for pool in self.rollout_rows(pair)])
        states = states[torch.randperm(len(states), generator=generator)]
        pools = []
        for level, part in zip(pair, states.chunk(2), strict=True):
            actions = self.policies[level].sample(part, 1, generator).squeeze(1)
            pools.append(Rows(part, actions, torch.full((len(part),), math.nan)))
        return pools[0], pools[1]
