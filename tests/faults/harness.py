"""What every fault needs: a good dataset, a command run in this process, and a judge."""

import contextlib
import io
import re
import traceback
from typing import NamedTuple

import numpy as np

from corl import files
from corl.config import main

STATES, ACTIONS = 11, 3  # hopper
EPISODE = 50  # rows
# The longest line that a reader takes in.
LONGEST = 600


class Outcome(NamedTuple):
    """How a command ended: exit status, what it printed, and a Python traceback or ""."""

    status: int
    out: str
    err: str
    trace: str


def algorithm(module):
    """The command of an algorithm file, as a function of its arguments."""

    def command(argv):
        main(module.train, module.TrainConfig, argv)

    return command


def run(command, *argv):
    """Run `command(argv)` in this process, as the command line would; an `Outcome`."""
    out, err, status, trace = io.StringIO(), io.StringIO(), 0, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command([str(a) for a in argv])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
            if isinstance(end.code, str):  # Python prints it to stderr
                print(end.code, file=err)
        except BaseException:
            status, trace = 1, traceback.format_exc()
    return Outcome(status, out.getvalue(), err.getvalue(), trace)


def assert_refused(outcome, *says):
    """The command ended with one clear line that matches every pattern of `says`.

    Case does not matter. Patterns name the file or field, the value, and the fix.
    """
    assert not outcome.trace, outcome.trace
    assert outcome.status not in (0, None), f"it went on:\n{outcome.out}{outcome.err}"
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, f"not one line of error:\n{outcome.err}"
    # argparse and the like may write usage before; nothing comes after.
    assert outcome.err.rstrip().endswith(lines[0]), f"more than a line:\n{outcome.err}"
    assert len(lines[0]) <= LONGEST, lines[0]
    for pattern in says:
        assert re.search(pattern, lines[0], re.IGNORECASE), f"no {pattern!r}: {lines[0]}"


def good_rows(rows=1000, seed=0):
    """Arrays of a hopper dataset: random walks in episodes of `EPISODE` rows, which time out."""
    rng = np.random.default_rng(seed)
    observations = rng.normal(size=(rows, STATES)).astype(np.float32).cumsum(0) / 10
    next_observations = np.empty_like(observations)
    next_observations[:-1] = observations[1:]
    next_observations[-1] = observations[-1]
    timeouts = np.arange(1, rows + 1) % EPISODE == 0
    terminals = np.zeros(rows, bool)
    # Every other episode falls, so that returns differ.
    terminals[EPISODE - 1 :: 2 * EPISODE] = True
    return {
        "observations": observations,
        "actions": rng.uniform(-0.9, 0.9, (rows, ACTIONS)).astype(np.float32),
        "rewards": rng.uniform(0, 3, rows).astype(np.float32),
        "next_observations": next_observations,
        "terminals": terminals,
        "timeouts": timeouts & ~terminals,
    }


def write_dataset(path, arrays):
    """Write arrays as an HDF5 dataset; returns the path."""

    def fill(file):
        for name, values in arrays.items():
            file.create_dataset(name, data=values)

    files.write_hdf5(path, fill)
    return path


def short_run(folder, dataset, **fields):
    """Flags of a run of seconds on a dataset; its run folder lies in `folder`/runs."""
    values = {
        "env": "hopper-medium-v2",
        "dataset_path": dataset,
        "runs_dir": folder / "runs",
        "device": "cpu",
        "threads": 1,
        "compile": "false",
        "eval_freq": 10,
        "log_freq": 5,
        "n_episodes": 1,
        "batch_size": 8,
        "buffer_size": 2000,
        "offline_iterations": 10,
        "online_iterations": 10,
        **fields,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


# The `dare.` flags of a behavior model that is trained in a second.
FAST_DARE = {
    "dare.behavior": "mixture",
    "dare.score": "policy_ratio",
    "dare.guidance_scale": 0,
    "dare.behavior_updates": 5,
    "dare.behavior_batch_size": 8,
}
