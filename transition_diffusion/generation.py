"""EDIS's generated rows: a new set every so many online steps, made in pieces.

A refresh fits a diffusion model to all rows, trains the energies and draws guided samples. It may
take minutes or hours, so it is made in pieces, and its state after each is in `state_dict`.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from transition_diffusion.config import EdisConfig
from transition_diffusion.energies import FORMS, KINDS, Energies
from transition_diffusion.fit import DiffusionFit
from transition_diffusion.sampler import Guide, heun_step, noise_levels, trajectory
from transition_diffusion.transitions import Buffer, Layout

# States (B, S) and standard normal noise (B, A) -> actions of the current policy (B, A).
Policy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FITTING, ENERGIES, SAMPLING = "diffusion model", "energies", "generated rows"
LARGEST_SEED = 2**31 - 1


class Batches(Protocol):
    """What an update draws from."""

    def sample(self, batch_size: int) -> list[torch.Tensor]:
        """A batch of so many rows."""


class Source(Buffer, Batches, Protocol):
    """Rows by their numbers and batches."""


class Refillable(Protocol):
    """Where generated rows lie."""

    def refill(self, rows: list[torch.Tensor]) -> None:
        """Hold these rows, s, a, r, s' and done, in the place of all others."""


class Generation:
    """The generated rows of a run, and the refresh that is under way.

    Args:
        settings: the block `edis:`.
        replay: all rows, offline and online.
        online: the online rows alone.
        generated: is refilled.
        mixed: draws batches of generated and online rows.
        policy: acts for the policy energy.
        share: of generated rows in a batch; with 0 there is nothing to generate.
        sizes: S, A and the largest action.
        seed: of everything random here. The global random streams are left alone.
        device: of the buffers.

    Attributes:
        log: metrics of the last refresh.
    """

    # A piece is no update of the trainer.
    trains = False

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
        self.settings, self.share, self.device = settings, share, device
        self.replay, self.online, self.generated = replay, online, generated
        self.mixed, self.policy = mixed, policy
        self.layout = Layout(sizes[0], sizes[1], settings.model_terminals)
        self.max_action = sizes[2]
        self.host = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(device).manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._new_seed())
            self.energies = self._new_energies()
        self.optimizers = [
            torch.optim.Adam(
                self.energies.networks[kind].parameters(), settings.energy_lr
            )
            for kind in KINDS
        ]
        self.reseeded = False
        self.count = 0  # refreshes that are done
        self.last = -1  # online step before which the last one began
        self.now = -2  # running online step
        # Pieces of the running refresh that are done, in the order of `_phases`; -1: none runs.
        self.done = -1
        self.guided = False
        self.fit: DiffusionFit | None = None
        self.samples: torch.Tensor | None = None
        self.log: dict[str, Any] = {}

    def _new_energies(self) -> Energies:
        s = self.settings
        form = FORMS[s.energies]
        made = form(self.layout, s.negatives, s.sampler_steps, s.energy_levels)
        return made.to(self.device)

    # -- randomness -----------------------------------------------------------------------

    def _new_seed(self) -> int:
        return int(torch.randint(LARGEST_SEED, (), generator=self.host))

    def _normal(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=self.noise, device=self.device)

    def _draw(self, buffer: Buffer, n: int) -> list[torch.Tensor]:
        rows = torch.randint(buffer.size, (n,), generator=self.host)
        return buffer.gather(rows.numpy())

    # -- when -----------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Does an online step (from 0) begin with a refresh?

        At step 0 only where every update draws generated rows.
        """
        begins = step > 0 or self.settings.schedule == "every_update"
        return self.share > 0 and begins and step % self.settings.refresh_every == 0

    def before(self, step: int) -> None:
        """The online step `step` is to be made: begin a refresh if it is due and has not begun."""
        self.now = step
        if not self.due(step) or self.last == step:
            return
        self.last, self.done = step, 0
        self.guided = self.online.size >= self.settings.energy_batch_size
        self.log = {}
        # In every column but rewards and terminals, whose zeros mean something.
        keep = [self.layout.reward][: not self.settings.normalize_rewards]
        keep += [self.layout.width - 1][: self.layout.terminals]
        self.energies.normalizer.fit(self.replay, self.layout, keep)
        self.fit = self._new_fit(self._new_seed())

    def _new_fit(self, seed: int) -> DiffusionFit:
        s = self.settings
        return DiffusionFit(
            self.layout.width,
            width=s.width,
            depth=s.depth,
            lr=s.diffusion_lr,
            updates=s.diffusion_updates,
            seed=seed,
            device=self.device,
        )

    def sample(self, n: int) -> list[torch.Tensor]:
        """A batch for the running online step: of `mixed`, or of `replay`, see `schedule`."""
        always = self.share == 0 or self.settings.schedule == "every_update"
        return (self.mixed if always or self.now == self.last else self.replay).sample(n)

    def more_updates(self, updates: int) -> int:
        """Updates of the running online step beyond those that every step has."""
        on_refresh = self.settings.schedule == "refresh_steps" and self.now == self.last
        return max(0, self.settings.refresh_step_updates - updates) * on_refresh

    # -- pieces ---------------------------------------------------------------------------

    def _phases(self) -> list[tuple[str, int]]:
        """Name and pieces of each phase of a refresh, in order."""
        s = self.settings
        energies = [(ENERGIES, len(KINDS) * s.energy_updates)] * self.guided
        batches = math.ceil(s.samples / s.generation_batch_size)
        return [(FITTING, s.diffusion_updates), *energies, (SAMPLING, batches)]

    def phase(self) -> tuple[str, int, int] | None:
        """Name, pieces done and all pieces of the phase that is under way; None: nothing is."""
        before = 0
        for name, pieces in self._phases():
            if 0 <= self.done < before + pieces:
                return name, self.done - before, pieces
            before += pieces
        return None

    def advance(self) -> dict[str, Any]:
        """Make the next piece; returns its metrics."""
        found = self.phase()
        assert found is not None and self.fit is not None
        name, done, pieces = found
        if name == FITTING:
            metrics = {"diffusion_loss": self._fit_once(self.fit)}
        elif name == ENERGIES:
            kind = done % len(KINDS)
            metrics = {f"{KINDS[kind]}_energy_loss": self._teach(kind)}
        else:
            metrics = self._sample_once(done)
        self.log.update(metrics)
        self.done += 1
        if name == SAMPLING and done + 1 == pieces:
            self._finish()
        return metrics

    def _fit_once(self, fit: DiffusionFit) -> torch.Tensor:
        n = self.settings.diffusion_batch_size
        x = self.energies.normalizer(self.layout.join(self._draw(self.replay, n)))
        return fit.update(x, self._normal((n,)), self._normal(x.shape))

    def _teach(self, number: int) -> torch.Tensor:
        """One step of an energy; returns the mean of its losses, 0-d."""
        kind, n = KINDS[number], self.settings.energy_batch_size
        batch = self._draw(self.online, n)
        if kind == "policy":
            with torch.no_grad():
                batch[1] = self.policy(batch[0], self._normal(batch[1].shape))
        assert self.fit is not None
        events, model = self.layout.join(batch), self.fit.average
        losses = self.energies.losses(kind, events, model, self._normal)
        optimizer = self.optimizers[number]
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        return losses.detach().mean()

    def _guide(self) -> Guide:
        s = self.settings
        scales = {
            "state": s.state_scale,
            "policy": s.action_scale,
            "transition": s.next_state_scale,
        }
        return self.energies.guide(scales, exact=s.guidance == "exact")

    def _sample_once(self, batch: int) -> dict[str, Any]:
        s, first = self.settings, batch * self.settings.generation_batch_size
        n = min(s.generation_batch_size, s.samples - first)
        guide = self._guide() if self.guided else None
        shape = (n, self.layout.width)
        assert self.fit is not None
        model, steps = self.fit.average, s.sampler_steps
        # The last place of the path.
        (last,) = deque(trajectory(model, shape, steps, self._normal, guide), maxlen=1)
        if not bool(last.isfinite().all()):
            raise FloatingPointError("a generated transition is not finite")
        if self.samples is None:
            self.samples = last.new_zeros((s.samples, self.layout.width))
        self.samples[first : first + n] = self.energies.normalizer.undo(last)
        return {}

    def _finish(self) -> None:
        """Hand the rows over; the diffusion model has done its work."""
        assert self.samples is not None
        rows = self.layout.split(self.samples, self.max_action)
        clipped = rows[1] != self.samples[:, self.layout.action]
        self.generated.refill(rows)
        self.count += 1
        self.log = {
            **{k: float(v) for k, v in self.log.items()},
            "refreshes": float(self.count),
            "guided": float(self.guided),
            "generated_rows": float(len(self.samples)),
            "generated_reward": float(rows[2].mean()),
            "generated_clipped": float(clipped.float().mean()),
            "denoiser_rows": float(self._denoiser_rows()),
            "generator_share": self.settings.share_of_published(),
        }
        self.fit = self.samples = None
        self.done = -1

    def _denoiser_rows(self) -> int:
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

    def report(self) -> str:
        """What the last refresh has made, for a line on the screen."""
        how = "guided" if self.guided else "not guided"
        return (
            f"refresh {self.count}: {self.settings.samples} rows, {how}, "
            f"{self._denoiser_rows() / 1e6:.3g} million rows through the denoiser"
        )

    # -- cost and state -------------------------------------------------------------------

    def estimate_online(
        self, seconds_of: Callable[[Callable[[], Any]], float], first: int, last: int
    ) -> dict[str, float]:
        """Seconds of the refreshes in the online steps from `first` up to `last`.

        Measured on a model of its own, so nothing here changes.
        """
        s = self.settings
        steps = range(0, last, s.refresh_every)
        count = sum(self.due(step) for step in steps if step >= first)
        if not count:
            return {}
        fit, stream = self._new_fit(0), torch.Generator(self.device).manual_seed(0)

        def events(n: int) -> torch.Tensor:
            shape = (n, self.layout.width)
            return torch.randn(shape, generator=stream, device=self.device)

        x, y = events(s.diffusion_batch_size), events(s.generation_batch_size)
        levels = noise_levels(s.sampler_steps)

        def learn() -> None:
            fit.update(x, x[:, 0], x)

        def sample(guide: Guide | None) -> Callable[[], Any]:
            def step() -> None:
                with torch.no_grad():
                    heun_step(fit.average, y, levels, 1, y, guide)

            step()
            return step

        learn()
        # A step asks the denoiser twice.
        free, guided = (
            seconds_of(sample(guide)) / (2 * len(y)) for guide in (None, self._guide())
        )
        each = seconds_of(learn) * s.diffusion_updates
        each += guided * s.samples * (2 * s.sampler_steps - 1)
        each += free * s.energy_updates * self._taught_rows()
        return {f"{count} refreshes": count * each}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next piece depends on; the model only while a refresh runs."""
        return {
            "energies": self.energies.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "host": self.host.get_state(),
            "noise": self.noise.get_state(),
            "count": self.count,
            "last": self.last,
            "done": self.done,
            "guided": self.guided,
            "log": {k: float(v) for k, v in self.log.items()},
            "fit": None if self.fit is None else self.fit.state_dict(),
            "samples": None if self.samples is None else self.samples.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; `reseeded` where the device is of another kind."""
        self.energies.load_state_dict(state["energies"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in ("count", "last", "done", "guided", "log"):
            setattr(self, name, state[name])
        self.host.set_state(state["host"].cpu())
        same = state["noise"].numel() == self.noise.get_state().numel()
        if same:
            self.noise.set_state(state["noise"].cpu())
        else:
            # A stream of another kind of device: a new one, from seed and progress.
            mixed = np.random.SeedSequence(
                [self.noise.initial_seed(), self.count, self.done + 1]
            )
            self.noise.manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
        self.reseeded = not same
        self.fit = self.samples = None
        if state["fit"] is not None:
            self.fit = self._new_fit(0)
            self.fit.load_state_dict(state["fit"])
        if state["samples"] is not None:
            self.samples = state["samples"].to(self.device)
