"""Several seeds in one command: `seeds: 0-7`.

`each` stands above an algorithm's `train`. Without `seeds` it changes nothing. With `seeds` every
seed becomes a run of its own, with its own folder, that can be resumed alone:

* stacked, in one process, where the networks of all seeds make one update (`corl/stacked.py`).
  A GPU has room for them; `seeds_as: auto` takes this form there.
* as processes, one thread each, as many at a time as there are cores. A CPU is busy with one run,
  so this is its form.

    python -m corl.seeds FILE ARGUMENTS    # one seed's process, as the command starts it
"""

import dataclasses
import functools
import inspect
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from corl import compiled, machine, pace, runs
from corl.config import AUTO, seed_list
from corl.finetune import Session
from corl.layers import ConfigError, dump_config
from corl.stacked_session import StackedSession

# Seconds that a run has to save after the command that started it is gone.
GRACE = 30.0
# Exit status of a run that nobody waits for any more; a shell's for SIGTERM.
STOPPED = 143
# Where `corl` is imported from.
ROOT = Path(__file__).parent.parent

Train = Callable[[Any], dict[str, Any]]


def each(train: Train) -> Train:
    """An algorithm's `train` that also takes `seeds`.

    With `seeds` it returns {} when all runs have ended well: their summaries are in their folders.

    Raises:
        RuntimeError: a seed failed. The others have gone on to their end.
        runs.Interrupted: a signal ended the runs, which have saved.
    """

    @functools.wraps(train)
    def train_each(config: Any) -> dict[str, Any]:
        if config.seeds is None:
            return train(config)
        device = machine.pick_device(config.device)
        if _stacked(config, device):
            return train(config)
        as_processes(inspect.getfile(train), config, device)
        return {}

    return train_each


def _stacked(config: Any, device: str) -> bool:
    """Whether the seeds run stacked.

    Raises:
        ConfigError: `seeds_as: stacked` of a config that cannot be.
    """
    why = config.not_stacked()
    if config.seeds_as == "stacked" and why:
        raise ConfigError(f"seeds_as stacked: {why}; set seeds_as to processes")
    if config.seeds_as == "auto" and device != "cpu" and why:
        print(f"seeds run as processes and are not stacked: {why}")
        return False
    return config.seeds_as == "stacked" or (
        config.seeds_as == "auto" and device != "cpu"
    )


def session(config: Any, file: str, columns: Sequence[str]) -> Any:
    """The session of a run, see `finetune.Session`; with `seeds` that of all of them."""
    if config.seeds is None:
        return Session(config, file, columns)
    device, one = machine.pick_device(config.device), dataclasses.replace(config)
    if not compiled.on_gpu(device):
        # Graphs of torch.compile know nothing of stacks.
        one.compile = False
    # One mode for all.
    pace.settle(one, device)
    configs = [of_seed(one, seed) for seed in seed_list(config.seeds)]
    return StackedSession(configs, file, columns)


def of_seed(config: Any, seed: int) -> Any:
    """The config of one seed's run: an ordinary one."""
    place = config.checkpoints_path
    if place is not None:
        place = os.path.join(place, f"seed-{seed}")
    return dataclasses.replace(
        config,
        seed=seed,
        seeds=None,
        seeds_as="auto",
        checkpoints_path=place,
        load_model=config.load_model.replace("{seed}", str(seed)),
    )


# ---------------------------------------------------------------- one process per seed


def as_processes(file: str, config: Any, device: str) -> None:
    """Run an algorithm file once per seed, as many at a time as the cores have room for.

    Args:
        file: the algorithm's.
        config: with `seeds`.
        device: that all of them run on.

    Raises: as `each`.
    """
    seeds = seed_list(config.seeds)
    threads = 1 if config.threads == AUTO else config.threads
    changes: dict[str, Any] = {"threads": threads, "device": device}
    one = dataclasses.replace(config, **changes)
    # Once for all, so that they share one mode.
    pace.settle(one, device)
    at_once = min(len(seeds), max(1, pace.available_cores(openmp=False) // threads))
    print(
        f"{len(seeds)} seeds, {at_once} at a time, as processes of {threads} thread(s)"
    )
    with tempfile.TemporaryDirectory(prefix="corl-seeds-") as folder:
        commands = {}
        for seed in seeds:
            path = Path(folder, f"seed-{seed}.yaml")
            path.write_text(dump_config(of_seed(one, seed)))
            commands[seed] = ["-u", "-m", __name__, file, "--config", str(path)]
        _Processes(commands, at_once, threads).run()


class _Processes:
    """Python processes of seeds, some at a time; their lines are printed behind their seeds.

    Args:
        commands: seed -> arguments of Python.
        at_once: processes at a time.
        threads: of each of them.
    """

    def __init__(
        self, commands: Mapping[int, Sequence[str]], at_once: int, threads: int
    ):
        self.commands, self.at_once, self.threads = commands, at_once, threads
        self.running: dict[int, subprocess.Popen] = {}
        self.statuses: dict[int, int] = {}
        self.signal: int | None = None  # that asked to stop
        self._printing = threading.Lock()

    def run(self) -> None:
        """Run them all; none is left when this returns or raises. Raises as `each`."""
        pool = ThreadPoolExecutor(self.at_once)
        with self._stopping():
            futures = {pool.submit(self._run_one, seed) for seed in self.commands}
            try:
                while futures:
                    done, futures = wait(futures, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self.running.values()):
                    process.kill()
                pool.shutdown()
        self._conclude()

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Inside, SIGINT and SIGTERM ask every process to save and stop."""

        def ask(number: int, frame: Any) -> None:
            self.signal = number
            # A second one ends a run at once.
            for process in list(self.running.values()):
                process.send_signal(signal.SIGTERM)

        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run_one(self, seed: int) -> None:
        if self.signal is not None:
            return
        search = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, *self.commands[seed]],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, search)),
                "OMP_NUM_THREADS": str(self.threads),
            },
            # Closed by our end, which the child watches for.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C is for this process, which hands it on.
            start_new_session=True,
        )
        self.running[seed] = process
        if self.signal is not None:
            # It came between the question above and this line.
            process.send_signal(signal.SIGTERM)
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip():
                    with self._printing:
                        print(f"[seed {seed}] {line.rstrip()}", flush=True)
        del self.running[seed]
        self.statuses[seed] = process.returncode

    def _conclude(self) -> None:
        """Raises as `each` where not all seeds have ended well."""
        well = [seed for seed, status in self.statuses.items() if status == 0]
        rest = [seed for seed in self.commands if seed not in well]
        if self.signal is not None:
            raise runs.Interrupted(
                f"seeds {_shown(rest)} have not ended; a seed that has saved said above how "
                "it goes on",
                self.signal,
            )
        if rest:
            why = ", ".join(f"{seed} ({_ended(self.statuses[seed])})" for seed in rest)
            raise RuntimeError(
                f"seeds that failed: {why}; their lines above say why. Seeds that ended "
                f"well: {_shown(sorted(well))}"
            )


def _ended(status: int) -> str:
    """How a process ended."""
    return f"exit status {status}" if status > 0 else f"signal {-status}"


def _shown(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "none"


# ---------------------------------------------------------------- in a seed's process


def end_with_parent(status: int = STOPPED) -> None:
    """End this process when the one that started it is gone, whose end closes our stdin.

    The run is asked to save and stop; after `GRACE` seconds the process ends with `status`.
    """

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(status)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: Sequence[str]) -> None:
    """Run an algorithm file with arguments, as the command line would."""
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    end_with_parent()
    with suppress(BrokenPipeError):
        main(sys.argv[1:])
