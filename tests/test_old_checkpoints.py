"""Runs of before version 0.2 go on: their checkpoints name fewer things, and some otherwise."""

import csv

import pytest
import torch
from helpers import assert_equal
from short_runs import (
    cal_ql_block,
    checkpoint_of,
    dare_block,
    folder_of,
    run,
    stop_after,
)

from algorithms import cal_ql, cql, dare_cal_ql, dare_iql, iql
from corl import checkpoints, curves

pytestmark = pytest.mark.narrow(16)
SHORT = {
    "offline_iterations": 20,
    "online_iterations": 20,
    "eval_freq": 20,
    "n_episodes": 1,
    "log_freq": 5,
    "batch_size": 16,
}
RUNS = {
    "iql": (iql, {"actor_lr_online": 1e-4}),
    "iql, compat": (iql, {"compat": True}),
    "dare_iql": (
        dare_iql,
        {"dare": dare_block("policy_ratio", behavior_updates=5)},
    ),
    "cql": (cql, {"cql_alpha": 0.3, "cql_alpha_online": 0.7}),
    "cal_ql": (cal_ql, {"cql_alpha": 0.3, "cql_alpha_online": 0.7}),
    "dare_cal_ql": (
        dare_cal_ql,
        {"dare": cal_ql_block(behavior_updates=5, keep_calibration=True)},
    ),
}
# Columns that every run had, DARE or not.
OLD_COLUMNS = ["exchanged", "separation_point", "score_off_mean", "score_on_mean"]


def make_old(folder, one_buffer):
    """Rewrite a run folder as the version before wrote it."""
    path = folder / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    if one_buffer:
        state["parts"]["buffer"] = state["parts"].pop("online_buffer")
    del state["run"]["switched"], state["config"], state["tables"]
    state["run"]["exchanges"] = [0.0, 0]
    trainer = state["parts"]["trainer"]
    gone = [trainer.pop(k, None) for k in ("anneal", "cql_alpha", "calibration")]
    assert any(x is not None for x in gone)
    checkpoints.save_checkpoint(path, state)
    with open(folder / "metrics.csv", newline="") as file:
        header, *rows = csv.reader(file)
    if "exchanged" not in header:
        header[3:3] = OLD_COLUMNS
        rows = [[*row[:3], *[""] * 4, *row[3:]] for row in rows]
    lines = [",".join(row) + "\n" for row in (header, *rows)]
    (folder / "metrics.csv").write_text("".join(lines))


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("stop_at", [10, 30])
def test_an_old_run_goes_on_to_the_same_bits(name, stop_at, tmp_path, monkeypatch):
    """Stopped in the offline phase, and in the online phase, where the switch lies behind."""
    module, fields = RUNS[name]
    fields = {**SHORT, **fields}
    run(module, tmp_path / "whole", monkeypatch, **fields)
    with monkeypatch.context() as patch:
        stop_after(stop_at, patch)
        run(module, tmp_path / "old", monkeypatch, **fields)
    folder = folder_of(tmp_path / "old")
    make_old(folder, one_buffer=stop_at == 10)
    summary = run(module, tmp_path / "old", monkeypatch, resume=str(folder), **fields)
    whole, old = checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "old")
    if name == "iql, compat":
        assert whole["parts"]["trainer"]["anneal"] is True  # never switched
    for key in ("parts", "rng", "step"):
        assert_equal(old[key], whole[key], key)
    expected = curves.read_csv(folder_of(tmp_path / "whole") / "metrics.csv")
    found = curves.read_csv(folder / "metrics.csv")
    assert {k: found[k] for k in expected} == expected
    assert set(found) - set(expected) <= set(OLD_COLUMNS)
    assert summary["updates"] == 40


def test_the_mean_of_an_old_run_counts_the_rows_of_before(tmp_path, monkeypatch):
    """The old checkpoint carried a sum; the rows of metrics.csv say as much."""
    module, fields = RUNS["dare_iql"]
    fields = {**SHORT, **fields}
    whole = run(module, tmp_path / "whole", monkeypatch, **fields)
    with monkeypatch.context() as patch:
        stop_after(30, patch)
        run(module, tmp_path / "old", monkeypatch, **fields)
    folder = folder_of(tmp_path / "old")
    make_old(folder, one_buffer=False)
    summary = run(module, tmp_path / "old", monkeypatch, resume=str(folder), **fields)
    assert summary["exchanges_mean"] == whole["exchanges_mean"]
