"""A run that is killed at any moment, again and again, ends to the byte as an unbroken one."""

import time

import numpy as np
import processes
import pytest
from helpers import assert_equal

pytestmark = pytest.mark.fault("kills")

FAST = [("iql", 0), ("dare_cal_ql", 0)]
ALL = [(name, seed) for name in processes.MODULES for seed in range(6)]
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.whole) for case in ALL
]
# Settings that decide what there is to lose; an instance takes one by its seed.
VARIANTS = [{}, {"utd": 2}, {"log_freq": 1}]


@pytest.fixture(scope="module")
def unbroken(good, tmp_path_factory):
    """What an unbroken run leaves behind, and the seconds it took; each is made once."""
    known = {}

    def get(name, fields):
        key = name, *fields.items()
        if key not in known:
            folder = tmp_path_factory.mktemp(name)
            flags = processes.flags_of(name, folder, good, **fields)
            seconds = processes.finish(name, flags, folder / "log")
            known[key] = processes.left_by(processes.run_folder(folder)), seconds
        return known[key]

    return get


@pytest.mark.parametrize("name, seed", CASES)
def test_a_killed_run_ends_as_the_unbroken_one(name, seed, good, tmp_path, unbroken):
    """SIGKILL at one to three random moments from the first checkpoint on."""
    rng = np.random.default_rng([seed, len(name)])
    fields = VARIANTS[seed % len(VARIANTS)]
    whole, seconds = unbroken(name, fields)
    log, flags = tmp_path / "log", processes.flags_of(name, tmp_path, good, **fields)
    kills, run = 1 + seed % 3, None
    while kills:
        delay = rng.uniform(0, 0.5 * seconds)
        with processes.started(name, flags, log) as process:
            run = processes.wait_for_checkpoint(process, tmp_path, log)
            time.sleep(delay)
            alive = process.is_alive()
            process.kill()
        if not alive:
            # It was faster than the clock: nothing is left to kill.
            assert process.exitcode == 0, log.read_text()
            break
        kills -= 1
        flags = ["--resume", run]
    processes.finish(name, ["--resume", run], log)
    broken = processes.left_by(run)
    assert broken.metrics == whole.metrics
    assert broken.evaluations == whole.evaluations
    assert_equal(broken.checkpoint, whole.checkpoint)
