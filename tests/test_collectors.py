"""Environments of stacked seeds in processes, as on a GPU: the same rows, files and errors."""

import csv
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import assert_equal
from test_seeds import ROOT, is_alive
from test_stacked_runs import CASES, folder_of, left, together

from algorithms import cal_ql, iql, rebrac
from corl import stacked
from corl.stacked_session import StackedSession
from corl.workers import Workers, request

# Kills itself while its workers wait for a call.
PARENT = """
import os, signal
from functools import partial
from corl.workers import Workers
if __name__ == "__main__":
    workers = Workers([partial(complex, 1.0)] * 2, "counts")
    workers.ready()
    print(*(process.pid for process in workers.processes), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def in_processes(monkeypatch):
    """Stacked seeds on the CPU work as on a GPU; gives their collectors."""
    monkeypatch.setattr(StackedSession, "in_processes", True)
    made, make = [], StackedSession._make_collectors

    def kept(self):
        make(self)
        made.append(self._collectors)

    monkeypatch.setattr(StackedSession, "_make_collectors", kept)
    return made


def at_step(number, monkeypatch, act):
    """Call a function of the session after a step of a stacked run."""
    log = StackedSession.log

    def acting(self, metrics):
        now = self.sessions[0].run.step + 1
        log(self, metrics)
        if now == number:
            act(self)

    monkeypatch.setattr(StackedSession, "log", acting)


def files_of(path, seed):
    """The tables and the names of what a seed's run left."""
    folder = folder_of(path, seed)
    tables = {}
    for name in ("metrics.csv", "evaluations.csv"):
        with open(folder / name, newline="") as file:
            tables[name] = list(csv.reader(file))
    return tables, sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize(
    "module, fields",
    [
        # It samples its actions, and has two buffers.
        (iql, {"mixing_ratio": 0.5}),
        # It keeps returns-to-go.
        (cal_ql, CASES["cal_ql"][1]),
        # It keeps the action after each row, and noise comes from outside its policy.
        (rebrac, CASES["rebrac"][1]),
    ],
    ids=["iql", "cal_ql", "rebrac"],
)
def test_processes_leave_what_one_process_leaves(
    module, fields, tmp_path, monkeypatch, request
):
    noise = stacked.Stack.noise

    def apart(self, actions, *flags):
        # On a GPU updates draw from its own stream, and never from the collectors'.
        self.streams = [nullcontext] * len(self.members)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return noise(self, actions, *flags)

    monkeypatch.setattr(stacked.Stack, "noise", apart)
    together(module, tmp_path / "one", monkeypatch, **fields)
    collectors = request.getfixturevalue("in_processes")
    together(module, tmp_path / "many", monkeypatch, **fields)
    assert len(collectors) == 1
    for seed in (1, 3):
        (mine, _), (own, _) = (left(tmp_path / p, seed) for p in ("many", "one"))
        assert len(own["parts"]["online_buffer"]["rows"][0]) == 6
        assert own["parts"]["collector"]["successes"]
        assert_equal(mine["parts"], own["parts"])
        assert_equal(mine["rng"], own["rng"])
        assert mine["step"] == own["step"] == 12
        assert files_of(tmp_path / "many", seed) == files_of(tmp_path / "one", seed)
    rows = [
        left(tmp_path / "many", s)[0]["parts"]["online_buffer"]["rows"] for s in (1, 3)
    ]
    assert not torch.equal(rows[0][1], rows[1][1])


def test_an_action_that_is_not_finite_is_told_by_its_seed(
    in_processes, tmp_path, monkeypatch
):
    def spoil(session):
        for parameter in session._made[1].actor.net.parameters():
            parameter.data.fill_(torch.nan)

    at_step(9, monkeypatch, spoil)
    with pytest.raises(FloatingPointError) as error:
        together(iql, tmp_path, monkeypatch)
    said = str(error.value)
    assert said.startswith("online step 10: the policy's action in the training environ")
    assert said.count("last good checkpoint") == 1 and "(step 8)" in said
    assert folder_of(tmp_path, 3).name in said
    assert not any(is_alive(p.pid) for p in in_processes[0]._workers.processes)


def test_a_process_that_is_killed_ends_all_runs(in_processes, tmp_path, monkeypatch):
    def kill(session):
        os.kill(in_processes[0]._workers.processes[1].pid, signal.SIGKILL)

    at_step(9, monkeypatch, kill)
    with pytest.raises(RuntimeError) as error:
        together(iql, tmp_path, monkeypatch)
    said = str(error.value)
    assert said.startswith("a process that steps an environment has ended (signal 9")
    assert "\n" not in said and "of step 8" in said
    for seed in (1, 3):
        assert str(folder_of(tmp_path, seed).name) in said
    assert not any(is_alive(p.pid) for p in in_processes[0]._workers.processes)


def test_a_signal_to_the_whole_group_leaves_time_to_save(
    in_processes, tmp_path, monkeypatch
):
    def stop(session):
        for process in in_processes[0]._workers.processes:
            os.kill(process.pid, signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    at_step(9, monkeypatch, stop)
    with pytest.raises(SystemExit) as end:
        together(iql, tmp_path, monkeypatch)
    assert end.value.code == 128 + signal.SIGTERM
    states = [left(tmp_path, seed)[0] for seed in (1, 3)]
    assert [state["step"] for state in states] == [9, 9]
    rows = [state["parts"]["online_buffer"]["rows"][0] for state in states]
    assert [len(row) for row in rows] == [3, 3]


def test_workers_end_with_their_parent(tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    end = time.monotonic() + 30
    while any(map(is_alive, pids)):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_object_that_cannot_be_made_says_why():
    workers = Workers([partial(complex, "no number")], "counts")
    try:
        with pytest.raises(ValueError, match="complex"):
            workers.ready()
        assert workers.failed == 0
    finally:
        workers.close()


def test_calls_of_one_process_are_answered_in_their_order():
    workers = Workers([partial(complex, 1.0, 2.0)], "counts")
    try:
        workers.ready()
        workers.ask(0, request("conjugate"))
        workers.ask(0, request("__abs__"))
        assert workers.answer(0) == 1.0 - 2.0j
        assert workers.answer(0) == abs(1.0 + 2.0j)
    finally:
        workers.close()
