"""How a run uses its machine: the number of its threads, and whether its updates are compiled.

`settle` puts a choice in the place of `threads: auto` and `compile: auto`, once, when a run
starts. The run stores it, so that a resume and a repetition compute the same. `RateWatch`
notices when a run is far slower than it was when it began.

Threads. A product of two matrices is what an update does most, so products of the size of the
networks are timed, under the load of the moment. The threads of one product spin until the last
of them is done. So two threads are faster than one where two cores are idle, and several times
slower where another program wants a core: the choice has to be measured, and what is measured
holds as long as the machine's load does. One thread depends on nobody.

Compiling. A graph takes half a minute to compile and saves some milliseconds per update.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from corl import compiled
from corl.config import AUTO

# Rows and columns of the products that are timed: the hidden layers of all algorithms have 256
# units, and a batch has 256 rows.
SIZE = 256
# Products that are timed together.
BURST = 8
# Seconds for all timings.
SECONDS = 1.0
# More threads are taken where a product is so many times faster. Products are about two thirds of
# a compiled update, so 1.25 there is 1.15 of the whole. For less it is not worth it to depend on
# cores that another program may want in a minute.
CLEARLY = 1.25
# More threads than this find too little work in one product of this size.
MOST_THREADS = 8
# Updates from which compiling pays: it takes 20 to 30 seconds for each of the two phases and
# saves 3 to 5 ms per update of the IQL family (docs/speed.md).
BREAK_EVEN = 10_000
# A run is slow when it makes less than this share of the updates that were measured at its start,
SLOW = 1 / 3
# for so many seconds of updates.
SLOW_SECONDS = 60.0


# ---------------------------------------------------------------- the choice


def settle(config: Any, device: str) -> None:
    """Put what is chosen in the place of `auto` in `threads` and `compile` of a config.

    Prints the choice as the flags that repeat it. What is given stays as it is. No random stream
    is touched.

    Args:
        config: of a run, a `FinetuneConfig`; it is changed.
        device: that it runs on.
    """
    if AUTO not in (config.threads, config.compile):
        return
    if config.resume:
        # The run is older than the choice, and this was the default.
        threads, compile, reasons = 1, False, ["as the run began"]
    else:
        compile, reason = _choose_compile(config, device)
        reasons = [reason] if config.compile == AUTO else []
        threads = 1
        if config.threads == AUTO and not config.compat and device == "cpu":
            threads, reason = _choose_threads()
            reasons.insert(0, reason)
    if config.threads == AUTO:
        config.threads = threads
    if config.compile == AUTO:
        config.compile = compile
    print(
        f"chosen for this machine: --threads {config.threads} "
        f"--compile {str(config.compile).lower()} ({'; '.join(filter(None, reasons))})"
    )


def _choose_threads() -> tuple[int, str]:
    """Number of threads, and why."""
    counts = thread_counts(available_cores())
    if len(counts) == 1:
        return 1, "one core"
    seconds = time_products(counts)
    shown = ", ".join(f"{1e3 * seconds[c]:.2f} ms on {c}" for c in counts)
    return fastest_threads(seconds), f"a product of matrices takes {shown} threads"


def _choose_compile(config: Any, device: str) -> tuple[bool, str]:
    """Whether to compile, and why not."""
    if config.compat:
        return False, "compat is not compiled"
    return worth_compiling(updates_of(config), device)


def worth_compiling(updates: int, device: str = "cpu") -> tuple[bool, str]:
    """Whether so many updates are worth compiling here, and why not or how."""
    if updates < BREAK_EVEN:
        return False, f"compiling pays from {BREAK_EVEN} updates"
    problem = compiled.obstacle()
    if compiled.on_gpu(device):
        kernels = f"kernels are not fused, which needs {problem}" if problem else ""
        return True, kernels or "CUDA graphs of fused kernels"
    return (False, f"compiling needs {problem}") if problem else (True, "")


def updates_of(config: Any) -> int:
    """Updates of a whole run."""
    online = max(config.online_iterations - config.online_warmup, 0)
    return config.offline_iterations + online * config.utd


def thread_counts(cores: int) -> list[int]:
    """The numbers of threads that are tried: 1, 2, 4, ... and all cores."""
    most = min(cores, MOST_THREADS)
    return sorted({*(2**i for i in range(most.bit_length())), most})


def fastest_threads(seconds: Mapping[int, float]) -> int:
    """The fewest threads that no larger number beats clearly.

    Args:
        seconds: number of threads -> seconds of one product; has 1.
    """
    best = 1
    for count in sorted(seconds):
        if seconds[best] >= CLEARLY * seconds[count]:
            best = count
    return best


def time_products(
    counts: Sequence[int],
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Number of threads -> median seconds of a product of matrices.

    The numbers take turns, so that a program that comes or goes meanwhile meets them all.
    """
    before = torch.get_num_threads()
    matrix = torch.ones(SIZE, SIZE)
    product = torch.empty_like(matrix)
    found: dict[int, list[float]] = {count: [] for count in counts}
    end = clock() + seconds
    try:
        while clock() < end or len(found[counts[0]]) < 3:
            for count in counts:
                torch.set_num_threads(count)
                # Wakes the threads.
                torch.mm(matrix, matrix, out=product)
                start = clock()
                for _ in range(BURST):
                    torch.mm(matrix, matrix, out=product)
                found[count].append((clock() - start) / BURST)
    finally:
        torch.set_num_threads(before)
    return {count: statistics.median(times) for count, times in found.items()}


def available_cores(root: Path = Path("/"), openmp: bool = True) -> int:
    """Cores that this process may use: its affinity, its container's quota, OMP_NUM_THREADS.

    Args:
        root: of the file system, where /proc and /sys are.
        openmp: False: OMP_NUM_THREADS, which bounds one process, does not count.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "") if openmp else ""
    bounds = [float(asked)] if asked.isdigit() else []
    return max(1, math.floor(min(cores, *bounds, _quota(root))))


def _quota(root: Path) -> float:
    """Cores of the control groups that this process is in, version 1 or 2; inf without a bound."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    bounds = [math.inf]
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / path.lstrip("/")
        # The bound of a parent counts, too.
        for folder in [group, *group.parents]:
            if folder.is_relative_to(mount):
                bounds.append(_quota_of(folder))
    return min(bounds)


def _quota_of(folder: Path) -> float:
    """Cores of one control group."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        cores = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        # No file, or `max`.
        return math.inf
    return cores if cores > 0 else math.inf


# ---------------------------------------------------------------- while the run goes on


class RateWatch:
    """Says once when updates have become far slower than they were when the run began.

    Args:
        expected: phase -> seconds per update, as measured at the start.
        threads: of the run.
    """

    def __init__(self, expected: Mapping[str, float], threads: int):
        self.expected, self.threads = expected, threads
        self._phase, self._updates, self._seconds = "", 0, 0.0

    def look(self, phase: str, updates: int, seconds: float) -> str:
        """What to say now, else "".

        Args:
            phase: that the updates are of.
            updates, seconds: of the run so far.
        """
        if phase != self._phase:
            self._phase, self._updates, self._seconds = phase, updates, seconds
        if seconds - self._seconds < SLOW_SECONDS or phase not in self.expected:
            return ""
        rate = (updates - self._updates) / (seconds - self._seconds)
        self._updates, self._seconds = updates, seconds
        usual = 1 / max(self.expected[phase], 1e-9)
        if rate >= SLOW * usual:
            return ""
        # Once is enough.
        self.expected = {}
        return (
            f"{rate:.3g} updates a second, and {usual:.3g} were measured at the start: "
            "other programs use the cores. " + self._help()
        )

    def _help(self) -> str:
        if self.threads == 1:
            return "Fewer runs at a time would help."
        return (
            f"{self.threads} threads wait for each other then; start the next run with "
            f"--threads 1. A resume of this run keeps its {self.threads} threads, so that it "
            "can promise the same bits."
        )
