"""A second process on a run that is still alive is refused, and the first notices nothing."""

import os
import signal

import harness
import processes
import pytest
from helpers import assert_equal

pytestmark = pytest.mark.fault("alive resumes")

FAST = [("iql", 0), ("dare_iql", 0)]
CASES = [
    pytest.param(name, i, marks=() if (name, i) in FAST else pytest.mark.whole)
    for name in processes.MODULES
    for i in range(2)
]


@pytest.fixture(scope="module")
def alone(good, tmp_path_factory):
    """What a run leaves behind that nobody disturbed; each is made once."""
    known = {}

    def get(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            processes.finish(
                name, processes.flags_of(name, folder, good), folder / "log"
            )
            known[name] = processes.left_by(processes.run_folder(folder))
        return known[name]

    return get


@pytest.mark.parametrize("name, resumed", CASES)
def test_a_second_process_is_refused(name, resumed, good, tmp_path, alone):
    """While the first, new or itself resumed, is stopped in the middle; then it goes on."""
    log, command = tmp_path / "log", harness.algorithm(processes.MODULES[name])
    flags = processes.flags_of(name, tmp_path, good)
    if resumed:
        with processes.started(name, flags, log) as process:
            run = processes.wait_for_checkpoint(process, tmp_path, log)
        flags = ["--resume", run]
    with processes.started(name, flags, log) as process:
        if resumed:
            wait_for_lock(process, run, log)
        run = processes.wait_for_checkpoint(process, tmp_path, log)
        os.kill(process.pid, signal.SIGSTOP)
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        for _ in range(3):
            outcome = harness.run(command, "--resume", run)
            harness.assert_refused(outcome, run.name, f"process {process.pid} on ")
        assert before == {path.name: path.read_bytes() for path in run.iterdir()}
        os.kill(process.pid, signal.SIGCONT)
        process.join(processes.SECONDS)
        assert process.exitcode == 0, log.read_text()
    first, whole = processes.left_by(run), alone(name)
    assert (first.metrics, first.evaluations) == (whole.metrics, whole.evaluations)
    assert_equal(first.checkpoint, whole.checkpoint)


def wait_for_lock(process, run, log):
    """Wait until the process says in the lock file that the folder is its own."""
    while process.is_alive():
        if f"process {process.pid} " in (run / "run.lock").read_text():
            return
    raise AssertionError(log.read_text())
