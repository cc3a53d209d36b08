"""Refreshes: a new set of generated rows every so many online steps, made in pieces.

A refresh fits a diffusion model and draws rows from it; a method may do more in between. It may
take minutes or hours, so it is made in pieces, and its state after each is in `state_dict`.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from transition_diffusion.config import GeneratorConfig
from transition_diffusion.fit import DiffusionFit
from transition_diffusion.sampler import (
    Denoise,
    Guide,
    heun_step,
    noise_levels,
    trajectory,
)
from transition_diffusion.transitions import Buffer, Layout, Normalizer

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


class Phase(NamedTuple):
    """A part of a refresh: its name, its pieces, and what makes the nth one."""

    name: str
    pieces: int
    make: Callable[[int], dict[str, Any]]


class Speeds(NamedTuple):
    """Seconds of an update of a diffusion model, and of a row that a sampler asks it for.

    Attributes:
        asked: what the sampler asks, as a function of the model, and its guide -> seconds.
    """

    update: float
    asked: Callable[[Callable[[Any], Denoise], Guide | None], float]


class Refreshes:
    """When rows are generated, and how far the running refresh is.

    A subclass says what a refresh does (`phases`), where the rows go, and what a batch holds.

    Args:
        settings: the block of the config.
        replay: all rows, offline and online.
        share: of generated rows in a batch; with 0 there is nothing to generate.
        sizes: S, A and the largest action.
        seed: of everything random here. The global random streams are left alone.
        device: of the buffers.

    Attributes:
        normalizer: of events, refitted by every refresh.
        labels: that the diffusion model knows; 0: it has no such input.
        log: metrics of the last refresh.
    """

    normalizer: Normalizer
    labels = 0
    # A piece is no update of the trainer.
    trains = False

    def __init__(
        self,
        settings: GeneratorConfig,
        replay: Source,
        share: float,
        sizes: tuple[int, int, float],
        seed: int,
        device: str,
    ):
        self.settings, self.share, self.device = settings, share, device
        self.replay = replay
        self.layout = Layout(sizes[0], sizes[1], settings.model_terminals)
        self.max_action = sizes[2]
        self.host = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(device).manual_seed(seed)
        self.reseeded = False
        self.count = 0  # refreshes that are done
        self.last = -1  # online step before which the last one began
        self.now = -2  # running online step
        # Pieces of the running refresh that are done, in the order of `phases`; -1: none runs.
        self.done = -1
        self.fit: DiffusionFit | None = None
        self.samples: torch.Tensor | None = None
        self.log: dict[str, Any] = {}

    # -- what a method says ---------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Does an online step (from 0) begin with a refresh?"""
        return self.share > 0 and step % self.settings.refresh_every == 0

    def start_refresh(self) -> None:
        """A refresh begins; the normalizer is fitted."""

    def phases(self) -> list[Phase]:
        """What the running refresh does, in order; rows are drawn last."""
        raise NotImplementedError

    def hand_over(self, rows: list[torch.Tensor]) -> None:
        """Put the generated rows, s, a, r, s' and done, where updates draw them."""
        raise NotImplementedError

    def denoiser_rows(self) -> int:
        """Rows that go through the denoiser in a refresh; a training row counts three times."""
        raise NotImplementedError

    def about(self) -> str:
        """What the last refresh has made, in a few words."""
        return f"{self.settings.samples} rows"

    def seconds(self, speeds: Speeds, count: int) -> float:
        """Seconds of the next refreshes, so many."""
        raise NotImplementedError

    # -- randomness -----------------------------------------------------------------------

    def new_seed(self) -> int:
        """A seed from the stream on the host."""
        return int(torch.randint(LARGEST_SEED, (), generator=self.host))

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal noise of a shape."""
        return torch.randn(tuple(shape), generator=self.noise, device=self.device)

    def draw(self, buffer: Buffer, n: int) -> list[torch.Tensor]:
        """Random rows of a buffer, so many."""
        rows = torch.randint(buffer.size, (n,), generator=self.host)
        return buffer.gather(rows.numpy())

    # -- pieces ---------------------------------------------------------------------------

    def before(self, step: int) -> None:
        """The online step `step` is to be made: begin a refresh if it is due and has not begun."""
        self.now = step
        if not self.due(step) or self.last == step:
            return
        self.last, self.done, self.log = step, 0, {}
        # In every column but terminals and, by the settings, rewards: their zeros mean something.
        keep = [self.layout.reward][: not self.settings.normalize_rewards]
        keep += [self.layout.width - 1][: self.layout.terminals]
        self.normalizer.fit(self.replay, self.layout, keep)
        self.start_refresh()

    def _under_way(self) -> tuple[Phase, int] | None:
        """The running phase and its pieces that are done; None: no refresh runs."""
        before = 0
        for phase in self.phases() if self.done >= 0 else ():
            if self.done < before + phase.pieces:
                return phase, self.done - before
            before += phase.pieces
        return None

    def phase(self) -> tuple[str, int, int] | None:
        """Name, pieces done and all pieces of the phase that is under way; None: nothing is."""
        found = self._under_way()
        return None if found is None else (found[0].name, found[1], found[0].pieces)

    def advance(self) -> dict[str, Any]:
        """Make the next piece; returns its metrics."""
        found = self._under_way()
        assert found is not None
        phase, done = found
        metrics = phase.make(done)
        self.log.update(metrics)
        self.done += 1
        if self._under_way() is None:
            self._finish()
        return metrics

    def new_fit(self, seed: int, updates: int) -> DiffusionFit:
        """A diffusion model of the settings' size that has learned nothing."""
        s = self.settings
        return DiffusionFit(
            self.layout.width,
            width=s.width,
            depth=s.depth,
            lr=s.diffusion_lr,
            updates=updates,
            seed=seed,
            device=self.device,
            labels=self.labels,
        )

    def batches_of(self, rows: int) -> int:
        """Batches in which so many rows are generated."""
        return math.ceil(rows / self.settings.generation_batch_size)

    def generate(
        self,
        denoise: Denoise,
        batch: int,
        first: int,
        last: int,
        guide: Guide | None = None,
    ) -> dict[str, Any]:
        """Generate the nth batch of the rows from `first` up to `last`.

        Raises:
            FloatingPointError: a value is not finite.
        """
        s = self.settings
        begin = first + batch * s.generation_batch_size
        n = min(s.generation_batch_size, last - begin)
        shape = (n, self.layout.width)
        path = trajectory(denoise, shape, s.sampler_steps, self.normal, guide)
        # The last place of the path.
        (end,) = deque(path, maxlen=1)
        if not bool(end.isfinite().all()):
            raise FloatingPointError("a generated transition is not finite")
        if self.samples is None:
            self.samples = end.new_zeros((s.samples, self.layout.width))
        self.samples[begin : begin + n] = self.normalizer.undo(end)
        return {}

    def _finish(self) -> None:
        """Hand the rows over; the diffusion model has done its work."""
        assert self.samples is not None
        rows = self.layout.split(self.samples, self.max_action)
        clipped = rows[1] != self.samples[:, self.layout.action]
        self.hand_over(rows)
        self.log = {
            **{k: float(v) for k, v in self.log.items()},
            "refreshes": float(self.count + 1),
            "generated_rows": float(len(self.samples)),
            "generated_reward": float(rows[2].mean()),
            "generated_clipped": float(clipped.float().mean()),
            "denoiser_rows": float(self.denoiser_rows()),
            "generator_share": self.settings.share_of_published(),
        }
        self.count += 1
        self.fit = self.samples = None
        self.done = -1

    def report(self) -> str:
        """What the last refresh has made, for a line on the screen."""
        rows = self.log["denoiser_rows"]
        return (
            f"refresh {self.count}: {self.about()}, "
            f"{rows / 1e6:.3g} million rows through the denoiser"
        )

    # -- cost and state -------------------------------------------------------------------

    def estimate_online(
        self, seconds_of: Callable[[Callable[[], Any]], float], first: int, last: int
    ) -> dict[str, float]:
        """Seconds of the refreshes in the online steps from `first` up to `last`.

        Measured on a model of its own, so nothing here changes.
        """
        steps = range(0, last, self.settings.refresh_every)
        count = sum(self.due(step) for step in steps if step >= first)
        if not count:
            return {}
        return {f"{count} refreshes": self.seconds(self._speeds(seconds_of), count)}

    def _speeds(self, seconds_of: Callable[[Callable[[], Any]], float]) -> Speeds:
        s = self.settings
        fit, stream = self.new_fit(0, 1), torch.Generator(self.device).manual_seed(0)

        def events(n: int) -> torch.Tensor:
            shape = (n, self.layout.width)
            return torch.randn(shape, generator=stream, device=self.device)

        x, y = events(s.diffusion_batch_size), events(s.generation_batch_size)
        levels = noise_levels(s.sampler_steps)

        def learn() -> None:
            fit.update(x, x[:, 0], x)

        def asked(ask: Callable[[Any], Denoise], guide: Guide | None) -> float:
            def step() -> None:
                with torch.no_grad():
                    heun_step(ask(fit.average), y, levels, 1, y, guide)

            step()
            # A step asks the denoiser twice.
            return seconds_of(step) / (2 * len(y))

        learn()
        return Speeds(seconds_of(learn), asked)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next piece depends on; the model only while a refresh runs."""
        return {
            "host": self.host.get_state(),
            "noise": self.noise.get_state(),
            "count": self.count,
            "last": self.last,
            "done": self.done,
            "log": {k: float(v) for k, v in self.log.items()},
            "fit": None if self.fit is None else self.fit.state_dict(),
            "samples": None if self.samples is None else self.samples.cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; `reseeded` where the device is of another kind."""
        for name in ("count", "last", "done", "log"):
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
            self.fit = self.new_fit(0, 1)
            self.fit.load_state_dict(state["fit"])
        if state["samples"] is not None:
            self.samples = state["samples"].to(self.device)
