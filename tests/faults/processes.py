"""Real processes of real algorithm files: started, stopped, killed, and what they left.

They are forked from one server that has imported everything, because the imports take longer than
such a run.
"""

import multiprocessing
import os
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import harness
import torch

from algorithms import cal_ql, cql, dare_cal_ql, dare_iql, iql
from corl import curves
from corl.config import main

MODULES = {
    "iql": iql,
    "cql": cql,
    "cal_ql": cal_ql,
    "dare_iql": dare_iql,
    "dare_cal_ql": dare_cal_ql,
}
# Saved at 10, 20, 30, 40; the online phase begins with the warm-up of three steps.
FIELDS = {
    "offline_iterations": 20,
    "online_iterations": 20,
    "eval_freq": 10,
    "log_freq": 3,
    "online_warmup": 3,
    "seed": 1,
}
SECONDS = 120  # for what takes a few
# What the server imports; where it does not find the algorithms, each process imports them.
IMPORTS = [f"algorithms.{name}" for name in MODULES]


class Left(NamedTuple):
    """What a finished run left behind."""

    checkpoint: dict
    metrics: bytes
    evaluations: bytes


def flags_of(name, folder, dataset, **fields):
    """Flags of a short run of an algorithm."""
    extra = harness.FAST_DARE if name.startswith("dare") else {}
    if name not in ("iql", "dare_iql"):
        extra = {**extra, "cql_n_actions": 2}
    return harness.short_run(folder, dataset, **{**FIELDS, **extra, **fields})


def _work(name, argv, log, cache):
    """What a process does: the command line of an algorithm file."""
    os.environ["CORL_DARE_CACHE"] = cache
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Lines, so that the log of a killed process is whole.
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    # The picture is the last thing that a run makes, and would take half of its time.
    curves.plot_curves = lambda *arguments: None
    module = MODULES[name]
    main(module.train, module.TrainConfig, argv)


@contextmanager
def started(name, argv, log):
    """A process that runs an algorithm file; whatever happens, it ends with the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    words = [str(word) for word in argv]
    cache = os.environ["CORL_DARE_CACHE"]
    process = context.Process(target=_work, args=(name, words, str(log), cache))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join(SECONDS)


def finish(name, argv, log):
    """Run to the end; returns the seconds it took."""
    start = time.monotonic()
    with started(name, argv, log) as process:
        process.join(SECONDS)
        assert process.exitcode == 0, Path(log).read_text()
    return time.monotonic() - start


def run_folder(folder):
    """The one run folder in `folder`/runs, or None."""
    found = list((folder / "runs").glob("*"))
    assert len(found) < 2, found
    return found[0] if found else None


def wait_for_checkpoint(process, folder, log):
    """Wait until the run has something to go on from; returns its folder."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.is_alive():
        with suppress(FileNotFoundError):
            run = run_folder(folder)
            if run is not None and (run / "checkpoint.pt").exists():
                return run
        time.sleep(0.002)
    raise AssertionError(Path(log).read_text())


def left_by(run):
    """What the finished run in this folder left behind; nothing of a killed writer is there."""
    assert (run / "summary.json").exists()
    assert not list(run.glob(".*.part"))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    checkpoint = {name: state[name] for name in ("step", "parts", "rng")}
    tables = ((run / name).read_bytes() for name in ("metrics.csv", "evaluations.csv"))
    return Left(checkpoint, *tables)
