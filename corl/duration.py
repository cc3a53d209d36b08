"""How long a run will take: its updates are tried on the real parts before the first step.

`Session` puts the parts back afterwards, so that neither bits nor compiled graphs notice the trial.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from corl import machine
from corl.buffers import ReplayBuffer
from corl.layers import presets_of

# (part that was made of a config, that config) -> metrics of one online update with it.
Other = Callable[[Any, Any], Any]
# A run of more seconds names the presets that make it shorter.
LONG = 3 * 3600
# A run of more seconds names the quick start of its algorithm.
HOUR = 3600


class Stopwatch(NamedTuple):
    """Times work on a device.

    Attributes:
        device: waited for before the clock is read.
        period: calls after which their work repeats, such as the updates between two of a
            delayed actor; whole periods are timed.
    """

    device: str
    period: int = 1

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call."""
        start = self._now()
        work()
        return self._now() - start

    def seconds_per_call(self, work: Callable[[], Any]) -> float:
        """Mean over ten calls, fewer where they take two seconds; the first period warms up."""

        def whole_period() -> None:
            for _ in range(self.period):
                work()

        whole_period()  # warms up, and compiles
        seconds = [self.seconds(whole_period)]
        while len(seconds) * self.period < 10 and sum(seconds) < 2.0:
            seconds.append(self.seconds(whole_period))
        return sum(seconds) / (len(seconds) * self.period)

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def lent_rows(online: ReplayBuffer, offline: ReplayBuffer) -> Iterator[None]:
    """The online buffer, still empty, shows the dataset's rows."""
    own = dict(vars(online))
    lent = {k: v for k, v in vars(offline).items() if isinstance(v, torch.Tensor)}
    vars(online).update(lent, _size=offline._size)
    try:
        yield
    finally:
        vars(online).update(own)


def seconds_of_parts(parts: Collection[Any], watch: Stopwatch) -> dict[str, float]:
    """What it is -> its seconds, of all that parts do before the first online step."""
    seconds: dict[str, float] = {}
    for part in parts:
        if hasattr(part, "estimate"):
            seconds.update(part.estimate(watch.seconds))
    return seconds


class Alternatives(NamedTuple):
    """The run with the part of another preset.

    Attributes:
        config: of the run.
        make: config -> the part that presets differ in.
        update: an online update with it.
    """

    config: Any
    make: Callable[[Any], Any]
    update: Other

    def seconds(
        self, offline: float, updates: int, watch: Stopwatch
    ) -> dict[str, float]:
        """Preset -> seconds of the whole run.

        Args:
            offline: seconds of what comes first, the same for all presets.
            updates: those of the online phase.
        """
        found: dict[str, float] = {}
        for name, config in presets_of(self.config).items():
            try:
                part = self.make(config)
            except ValueError:
                # It needs what this device cannot do.
                continue
            seconds = [offline, *seconds_of_parts([part], watch).values()]
            if updates:
                update = partial(self.update, part, config)
                seconds.append(updates * watch.seconds_per_call(update))
            found[name] = sum(seconds)
        return found


def lines(
    device: str,
    seconds: dict[str, float],
    presets: dict[str, float],
    quick_start: str | None,
) -> Sequence[str]:
    """What a run says of its time before it starts.

    Args:
        device: it runs on.
        seconds: part of the run -> its seconds.
        presets: preset -> seconds of the whole run with it.
        quick_start: config file of a run of minutes, where there is one.
    """
    total = sum(seconds.values())
    parts = ", ".join(f"{k} {machine.readable_time(v)}" for k, v in seconds.items())
    said = [
        f"estimated time on this {device}, evaluations not counted: "
        f"{machine.readable_time(total)} ({parts or 'nothing is left to do'})"
    ]
    if total > HOUR and quick_start:
        said.append(f"for a first look in minutes: --config {quick_start}")
    shorter = [
        f"--preset {name}: about {machine.readable_time(other)}"
        for name, other in presets.items()
        if other < total
    ]
    if shorter:
        said.append(
            f"for less of it (--help says what they change): {', '.join(shorter)}"
        )
    return said
