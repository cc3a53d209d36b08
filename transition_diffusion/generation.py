"""EDIS's generated rows: a refresh fits a new diffusion model, trains the energies and draws."""

from collections.abc import Callable
from typing import Any

import torch

from transition_diffusion.config import EdisConfig
from transition_diffusion.energies import FORMS, KINDS, Energies
from transition_diffusion.refresh import (
    Batches,
    Phase,
    Refillable,
    Refreshes,
    Source,
    Speeds,
)
from transition_diffusion.sampler import Guide
from transition_diffusion.transitions import Buffer

# States (B, S) and standard normal noise (B, A) -> actions of the current policy (B, A).
Policy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FITTING, ENERGIES, SAMPLING = "diffusion model", "energies", "generated rows"


class Generation(Refreshes):
    """The generated rows of a run, and the refresh that is under way.

    Args:
        settings: the block `edis:`.
        replay: all rows, offline and online.
        online: the online rows alone.
        generated: is refilled.
        mixed: draws batches of generated and online rows.
        policy: acts for the policy energy.
        share, sizes, seed, device: see `Refreshes`.
    """

    settings: EdisConfig

    def __init__(
        self,
        settings: EdisConfig,
        replay: Source,
        online: Buffer,
        generated: Refillable,
        mixed: Batches,
        policy: Policy,
        share: float,
        sizes: tuple[int, int, float],
        seed: int,
        device: str = "cpu",
    ):
        super().__init__(settings, replay, share, sizes, seed, device)
        self.online, self.generated = online, generated
        self.mixed, self.policy = mixed, policy
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.new_seed())
            self.energies = self._new_energies()
        self.normalizer = self.energies.normalizer
        self.optimizers = [
            torch.optim.Adam(
                self.energies.networks[kind].parameters(), settings.energy_lr
            )
            for kind in KINDS
        ]
        self.guided = False

    def _new_energies(self) -> Energies:
        s = self.settings
        form = FORMS[s.energies]
        made = form(self.layout, s.negatives, s.sampler_steps, s.energy_levels)
        return made.to(self.device)

    # -- when -----------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """At step 0 only where every update draws generated rows."""
        begins = step > 0 or self.settings.schedule == "every_update"
        return begins and super().due(step)

    def sample(self, n: int) -> list[torch.Tensor]:
        """A batch for the running online step: of `mixed`, or of `replay`, see `schedule`."""
        always = self.share == 0 or self.settings.schedule == "every_update"
        return (self.mixed if always or self.now == self.last else self.replay).sample(n)

    def more_updates(self, updates: int) -> int:
        """Updates of the running online step beyond those that every step has."""
        on_refresh = self.settings.schedule == "refresh_steps" and self.now == self.last
        return max(0, self.settings.refresh_step_updates - updates) * on_refresh

    # -- pieces ---------------------------------------------------------------------------

    def start_refresh(self) -> None:
        """Guided if there are enough online rows for a step of the energies."""
        self.guided = self.online.size >= self.settings.energy_batch_size
        self.fit = self.new_fit(self.new_seed(), self.settings.diffusion_updates)

    def phases(self) -> list[Phase]:
        """The model, the energies where rows are guided, the rows."""
        s = self.settings
        energies = Phase(ENERGIES, len(KINDS) * s.energy_updates, self._teach)
        batches = self.batches_of(s.samples)
        return [
            Phase(FITTING, s.diffusion_updates, self._fit_once),
            *[energies] * self.guided,
            Phase(SAMPLING, batches, self._sample_once),
        ]

    def _fit_once(self, done: int) -> dict[str, Any]:
        assert self.fit is not None
        n = self.settings.diffusion_batch_size
        x = self.normalizer(self.layout.join(self.draw(self.replay, n)))
        loss = self.fit.update(x, self.normal((n,)), self.normal(x.shape))
        return {"diffusion_loss": loss}

    def _teach(self, done: int) -> dict[str, Any]:
        """One step of an energy; the mean of its losses, 0-d."""
        number = done % len(KINDS)
        kind, n = KINDS[number], self.settings.energy_batch_size
        batch = self.draw(self.online, n)
        if kind == "policy":
            with torch.no_grad():
                batch[1] = self.policy(batch[0], self.normal(batch[1].shape))
        assert self.fit is not None
        events, model = self.layout.join(batch), self.fit.average
        losses = self.energies.losses(kind, events, model, self.normal)
        optimizer = self.optimizers[number]
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        return {f"{kind}_energy_loss": losses.detach().mean()}

    def _guide(self) -> Guide:
        s = self.settings
        scales = {
            "state": s.state_scale,
            "policy": s.action_scale,
            "transition": s.next_state_scale,
        }
        return self.energies.guide(scales, exact=s.guidance == "exact")

    def _sample_once(self, done: int) -> dict[str, Any]:
        assert self.fit is not None
        guide = self._guide() if self.guided else None
        rows = (0, self.settings.samples)
        return self.generate(self.fit.average, done, *rows, guide)

    def hand_over(self, rows: list[torch.Tensor]) -> None:
        """All in one buffer."""
        self.generated.refill(rows)
        self.log["guided"] = float(self.guided)

    # -- cost and state -------------------------------------------------------------------

    def denoiser_rows(self) -> int:
        """Rows that went through the denoiser in a refresh; a training row counts three times."""
        s = self.settings
        learned = 3 * s.diffusion_updates * s.diffusion_batch_size
        sampled = s.samples * (2 * s.sampler_steps - 1)
        return learned + sampled + self.guided * s.energy_updates * self._taught_rows()

    def _taught_rows(self) -> int:
        """The same of one step of all energies."""
        s = self.settings
        if s.energies == "public":
            return 0
        taught = (s.energy_levels - 1) * s.sampler_steps // s.energy_levels
        return len(KINDS) * s.energy_batch_size * s.negatives * 2 * taught

    def about(self) -> str:
        """What the last refresh has made, in a few words."""
        return f"{super().about()}, {'guided' if self.guided else 'not guided'}"

    def seconds(self, speeds: Speeds, count: int) -> float:
        """Seconds of so many refreshes, all guided."""
        s = self.settings
        free, guided = (
            speeds.asked(lambda model: model, guide) for guide in (None, self._guide())
        )
        each = speeds.update * s.diffusion_updates
        each += guided * s.samples * (2 * s.sampler_steps - 1)
        each += free * s.energy_updates * self._taught_rows()
        return count * each

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next piece depends on; the model only while a refresh runs."""
        return {
            "energies": self.energies.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "guided": self.guided,
            **super().state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; `reseeded` where the device is of another kind."""
        self.energies.load_state_dict(state["energies"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.guided = state["guided"]
        super().load_state_dict(state)
