"""Whole runs of stacked seeds: what they write, and how each goes on alone."""

import json
import signal

import pytest
import torch
from kinds import one_of_each_kind
from short_runs import (
    cal_ql_block,
    dare_block,
    noisy_block,
    ratio_block,
    run,
    stop_after,
)
from test_stacked import assert_alike

from algorithms import (
    awac,
    cal_ql,
    cql,
    dare_cal_ql,
    dare_famo2o_cql,
    dare_iql,
    dare_rebrac,
    dare_td3_bc,
    e2o,
    famo2o_cql,
    famo2o_iql,
    iql,
    pex,
    rebrac,
    rlpd,
    td3_bc,
    wsrl,
)
from corl.config import parse_config
from corl.evaluation import Evaluators
from corl.layers import ConfigError
from corl.stacked_session import StackedSession

pytestmark = pytest.mark.narrow(16)
SHORT = {
    "offline_iterations": 6,
    "online_iterations": 6,
    "eval_freq": 4,
    "n_episodes": 2,
    "log_freq": 2,
    "batch_size": 16,
}
CASES = {
    "iql": (iql, {}),
    "iql, two buffers": (iql, {"mixing_ratio": 0.5, "iql_deterministic": True}),
    "dare_iql": (dare_iql, {"dare": dare_block("policy_ratio", behavior_updates=3)}),
    "pex": (pex, {"online_warmup": 0}),
    "e2o": (e2o, {"online_warmup": 0}),
    "rlpd": (rlpd, {"online_warmup": 2, "random_steps": 3}),
    "wsrl": (wsrl, {"online_warmup": 0}),
    "famo2o_iql": (famo2o_iql, {"balance_period": 2}),
    "famo2o_cql": (famo2o_cql, {}),
    "dare_famo2o_cql": (dare_famo2o_cql, {"dare": ratio_block(behavior_updates=3)}),
    "cql": (cql, {}),
    "cal_ql": (cal_ql, {}),
    "dare_cal_ql": (dare_cal_ql, {"dare": cal_ql_block(behavior_updates=3)}),
    "td3_bc": (td3_bc, {}),
    "dare_td3_bc": (dare_td3_bc, {"dare": noisy_block(behavior_updates=3)}),
    "awac": (awac, {}),
    "rebrac": (rebrac, {"expl_noise": 0.1}),
    "dare_rebrac": (
        dare_rebrac,
        {"expl_noise": 0.1, "dare": noisy_block(behavior_updates=3)},
    ),
}


def folder_of(path, seed):
    (folder,) = path.glob(f"*-s{seed}-*")
    return folder


def left(path, seed):
    """Checkpoint and metrics of a seed's run."""
    folder = folder_of(path, seed)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    lines = (folder / "metrics.csv").read_text().splitlines()
    return state, lines


def together(module, path, monkeypatch, **fields):
    path.mkdir(exist_ok=True)
    options = {**SHORT, "seeds": "1,3", "seeds_as": "stacked"}
    return run(module, path, monkeypatch, **{**options, **fields})


@pytest.mark.parametrize("case", one_of_each_kind(CASES))
def test_a_stacked_run_leaves_what_runs_alone_leave(case, tmp_path, monkeypatch):
    module, fields = CASES[case]
    together(module, tmp_path / "many", monkeypatch, **fields)
    for seed in (1, 3):
        path = tmp_path / f"alone{seed}"
        path.mkdir()
        run(module, path, monkeypatch, **{**SHORT, **fields, "seed": seed})
        (mine, rows), (own, own_rows) = (
            left(p, seed) for p in (tmp_path / "many", path)
        )
        assert mine["parts"].keys() == own["parts"].keys()
        assert mine["step"] == own["step"] == 12
        # The streams are as far, bit for bit.
        assert_alike(mine["rng"], own["rng"])
        buffers = [state["parts"]["online_buffer"]["rows"] for state in (mine, own)]
        for a, b in zip(*buffers, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert len(rows) == len(own_rows) and rows[0] == own_rows[0]
        assert (folder_of(tmp_path / "many", seed) / "summary.json").exists()


@pytest.mark.parametrize("in_processes", [False, True])
def test_a_seed_of_a_stacked_run_goes_on_alone(in_processes, tmp_path, monkeypatch):
    # Updates of IQL draw no noise, so that its collector alone needs torch's stream.
    monkeypatch.setattr(StackedSession, "in_processes", in_processes)
    path = tmp_path / "many"
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        together(iql, path, monkeypatch)
    folder = folder_of(path, 3)
    assert not (folder / "summary.json").exists()
    argv = ["--resume", str(folder)]
    iql.train(parse_config(iql.TrainConfig, argv))
    alone = tmp_path / "alone"
    alone.mkdir()
    run(iql, alone, monkeypatch, **SHORT, seed=3)
    (mine, rows), (own, own_rows) = (left(p, 3) for p in (path, alone))
    assert mine["step"] == own["step"] == 12
    assert_alike(mine["rng"], own["rng"])
    # Its CPU time was in part that of a process for all.
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stacked"] == 2 and "cpu_seconds" not in summary
    networks = [state["parts"]["trainer"]["qf"] for state in (mine, own)]
    for name, value in networks[1].items():
        torch.testing.assert_close(networks[0][name], value, rtol=1e-3, atol=1e-3)
    assert [r.split(",")[:2] for r in rows] == [r.split(",")[:2] for r in own_rows]


def test_the_evaluation_at_the_switch_is_played_in_processes(tmp_path, monkeypatch):
    played, play = [], Evaluators.evaluate

    def evaluate(self, jobs):
        played.append([len(job.numbers) for job in jobs])
        return play(self, jobs)

    monkeypatch.setattr(Evaluators, "evaluate", evaluate)
    monkeypatch.setattr(StackedSession, "in_processes", True)
    together(iql, tmp_path / "many", monkeypatch, eval_switch=5)
    # After 4 updates, at the switch, after 8 steps and after 12.
    assert played == [[2, 2], [5, 5], [2, 2], [2, 2]]
    (tmp_path / "alone").mkdir()
    run(iql, tmp_path / "alone", monkeypatch, **SHORT, seed=3, eval_switch=5)
    mine, own = (
        (folder_of(tmp_path / name, 3) / "evaluations.csv").read_text().splitlines()
        for name in ("many", "alone")
    )
    assert [row.split(",")[:3] for row in mine] == [row.split(",")[:3] for row in own]
    assert sum(",switch," in row for row in mine) == 5


@pytest.mark.parametrize("step", [2, 9])
def test_a_signal_stops_all_seeds_after_the_same_step(
    step, tmp_path, monkeypatch, capsys
):
    log = StackedSession.log

    def interrupted(self, metrics):
        now = self.sessions[0].run.step + 1
        log(self, metrics)
        if now == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StackedSession, "log", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        together(iql, tmp_path, monkeypatch)
    assert end.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert [left(tmp_path, seed)[0]["step"] for seed in (1, 3)] == [step, step]
    shown = capsys.readouterr().out
    for seed in (1, 3):
        assert str(folder_of(tmp_path, seed)) in shown


def test_a_seed_that_diverges_is_named_once(tmp_path, monkeypatch):
    log = StackedSession.log

    def spoiled(self, metrics):
        if self.sessions[0].run.step + 1 == 6:
            metrics["q_loss"] = torch.tensor([1.0, torch.nan])
        log(self, metrics)

    monkeypatch.setattr(StackedSession, "log", spoiled)
    with pytest.raises(FloatingPointError) as error:
        together(iql, tmp_path, monkeypatch)
    said = str(error.value)
    assert said.count("q_loss is nan") == said.count("last good checkpoint") == 1
    assert folder_of(tmp_path, 3).name in said and "(step 4)" in said


def test_a_checkpoint_of_a_seed_holds_that_seed_alone(tmp_path, monkeypatch):
    together(iql, tmp_path, monkeypatch, seeds="0-3")
    sizes = [
        (folder_of(tmp_path, seed) / "checkpoint.pt").stat().st_size for seed in range(4)
    ]
    alone = tmp_path / "alone"
    alone.mkdir()
    run(iql, alone, monkeypatch, **SHORT, seed=0)
    own = (folder_of(alone, 0) / "checkpoint.pt").stat().st_size
    assert max(sizes) < 1.1 * own


def test_what_cannot_be_stacked_is_refused_before_any_work(tmp_path, monkeypatch):
    for fields in (
        {"compat": True},
        {"actor_dropout": 0.1},
        {"dare": dare_block("diffusion")},
        {"dare": dare_block("policy_ratio", rule="random")},
    ):
        with pytest.raises(ConfigError, match="set seeds_as to processes"):
            together(dare_iql, tmp_path, monkeypatch, **fields)
    assert not list(tmp_path.glob("*-s*"))
