"""CFDG's generated rows (Huang et al. 2025, arXiv 2508.06806): classifier-free guidance by label.

One diffusion model learns offline and online rows, each with its label, and some without it. Rows
like offline ones and rows like online ones are drawn by label. With classifier-free guidance (Ho
and Salimans 2022, arXiv 2207.12598) the noise that the sampler removes is
(1 + w) eps(x, label) - w eps(x, no label). There is no public code, so this is a reading.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from transition_diffusion.config import CfdgConfig
from transition_diffusion.refresh import (
    Batches,
    Phase,
    Refillable,
    Refreshes,
    Source,
    Speeds,
)
from transition_diffusion.sampler import Denoise
from transition_diffusion.transitions import Buffer, Normalizer

OFFLINE, ONLINE, NO_LABEL = range(3)
LABELS = {OFFLINE: "offline", ONLINE: "online"}
BOTH = "both"


def classifier_free(model: Any, label: int, weight: float) -> Denoise:
    """What a sampler asks for rows of a label: (1 + w) D(x, label) - w D(x, no label).

    The noise eps = (x - D) / sigma is affine in D, so it has the same weights. With w = 0 the
    model is asked once.

    Args:
        model: (events (B, D), noise levels (B,), labels (B,)) -> denoised events (B, D).
        label: of the rows.
        weight: w.
    """

    def ask(x: torch.Tensor, sigma: torch.Tensor, label: int) -> torch.Tensor:
        labels = torch.full(x.shape[:1], label, device=x.device)
        return model(x, sigma, labels)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        found = ask(x, sigma, label)
        if weight == 0.0:
            return found
        return (1.0 + weight) * found - weight * ask(x, sigma, NO_LABEL)

    return denoise


class LabelledGeneration(Refreshes):
    """The rows of both labels of a run, and the refresh that is under way.

    The first refresh comes when `refresh_every` online steps are made, since before there is no
    online row to learn. Until then a batch has real rows alone.

    Args:
        settings: the block `cfdg:`.
        replay: all rows, offline and online.
        real: the offline and the online rows.
        generated: where offline-like and online-like rows are put.
        mixed: draws batches of real rows.
        synthetic: draws batches of generated rows.
        sizes, seed, device: see `Refreshes`.

    Attributes:
        weights: of each diffusion model at the end of its last fit; the next one goes on.
    """

    settings: CfdgConfig

    def __init__(
        self,
        settings: CfdgConfig,
        replay: Source,
        real: Sequence[Buffer],
        generated: Sequence[Refillable],
        mixed: Batches,
        synthetic: Batches,
        sizes: tuple[int, int, float],
        seed: int,
        device: str = "cpu",
    ):
        share = settings.synthetic_ratio
        super().__init__(settings, replay, share, sizes, seed, device)
        self.real, self.generated = real, generated
        self.mixed, self.synthetic = mixed, synthetic
        self.normalizer = Normalizer(self.layout.width).to(device)
        if settings.models == "conditional":
            self.labels = NO_LABEL + 1
        self.weights: dict[str, dict[str, torch.Tensor]] = {}

    def due(self, step: int) -> bool:
        """Not before the first online step."""
        return step > 0 and super().due(step)

    def sample(self, n: int) -> list[torch.Tensor]:
        """Real rows and behind them, once there are some, generated rows: offline ones first."""
        synthetic = int(n * self.share) if self.count else 0
        batch = self.mixed.sample(n - synthetic)
        if not synthetic:
            return batch
        generated = self.synthetic.sample(synthetic)
        return [torch.cat(rows) for rows in zip(batch, generated, strict=True)]

    # -- pieces ---------------------------------------------------------------------------

    def _models(self) -> dict[str, list[int]]:
        """Name of a diffusion model -> the labels of which it makes rows."""
        wanted = [label for label in LABELS if self.settings.counts()[label]]
        if self.labels:
            return {BOTH: wanted}
        return {LABELS[label]: [label] for label in wanted}

    def _updates(self) -> int:
        """Of the running refresh, or of the next one."""
        s = self.settings
        return s.refresh_updates if self.count else s.diffusion_updates

    def phases(self) -> list[Phase]:
        """For each diffusion model its fit, and then its rows."""
        found = []
        for name, labels in self._models().items():
            of = "" if name == BOTH else f" of {name} rows"
            fit = partial(self._fit_once, name)
            found.append(Phase(f"diffusion model{of}", self._updates(), fit))
            for label in labels:
                batches = self.batches_of(self.settings.counts()[label])
                make = partial(self._sample_once, label)
                found.append(Phase(f"{LABELS[label]}-like rows", batches, make))
        return found

    def _fit_once(self, name: str, done: int) -> dict[str, Any]:
        """One update of a diffusion model, the first one of which begins its fit."""
        updates = self._updates()
        if done == 0:
            self.fit = self.new_fit(self.new_seed(), updates)
            if name in self.weights:
                self.fit.start_from(self.weights[name])
        assert self.fit is not None
        events, labels = self._learned(name)
        x = self.normalizer(events)
        noise = self.normal(x.shape[:1]), self.normal(x.shape)
        loss = self.fit.update(x, *noise, labels)
        if done + 1 == updates:
            weights = self.fit.denoiser.state_dict()
            self.weights[name] = {k: v.clone() for k, v in weights.items()}
        return {"diffusion_loss": loss}

    def _learned(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Random events (B, D) that a model learns, and their labels (B,), if it has some."""
        s, n = self.settings, self.settings.diffusion_batch_size
        if name != BOTH:
            (label,) = self._models()[name]
            return self.layout.join(self.draw(self.real[label], n)), None
        online = int(n * s.online_rows)
        counts = {OFFLINE: n - online, ONLINE: online}
        events, labels = [], []
        for label, count in counts.items():
            events.append(self.layout.join(self.draw(self.real[label], count)))
            labels.append(torch.full((count,), label, device=self.device))
        chance = torch.rand((n,), generator=self.noise, device=self.device)
        dropped = chance < s.label_dropout
        return torch.cat(events), torch.cat(labels).masked_fill(dropped, NO_LABEL)

    def _ask(self, label: int, model: Any) -> Denoise:
        """What the sampler asks a model for rows of a label."""
        if not self.labels:
            return model
        return classifier_free(model, label, self.settings.guidance)

    def _sample_once(self, label: int, done: int) -> dict[str, Any]:
        assert self.fit is not None
        offline, _ = self.settings.counts()
        rows = (0, offline) if label == OFFLINE else (offline, self.settings.samples)
        return self.generate(self._ask(label, self.fit.average), done, *rows)

    def hand_over(self, rows: list[torch.Tensor]) -> None:
        """Each label's in a buffer of its own."""
        counts = self.settings.counts()
        parts = zip(*(field.split(counts) for field in rows), strict=True)
        for buffer, part in zip(self.generated, parts, strict=True):
            buffer.refill(list(part))

    # -- cost and state -------------------------------------------------------------------

    def denoiser_rows(self) -> int:
        """Of this refresh, or of the next one; with guidance a generated row counts twice."""
        s = self.settings
        learned = 3 * len(self._models()) * self._updates() * s.diffusion_batch_size
        return learned + s.samples * (2 * s.sampler_steps - 1) * (1 + s.guided)

    def about(self) -> str:
        """What the last refresh has made, in a few words."""
        offline, online = self.settings.counts()
        return f"{offline} offline-like and {online} online-like rows"

    def seconds(self, speeds: Speeds, count: int) -> float:
        """Seconds of the next refreshes; only the run's first one is longer."""
        s, models = self.settings, len(self._models())
        ask = partial(self._ask, ONLINE)
        updates = self._updates() + (count - 1) * s.refresh_updates
        rows = count * s.samples * (2 * s.sampler_steps - 1)
        return models * updates * speeds.update + rows * speeds.asked(ask, None)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next piece depends on."""
        return {
            "normalizer": self.normalizer.state_dict(),
            "weights": self.weights,
            **super().state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; `reseeded` where the device is of another kind."""
        self.normalizer.load_state_dict(state["normalizer"])
        self.weights = dict(state["weights"])
        super().load_state_dict(state)
