"""IQL and DARE-IQL learn a toy with a known optimum, offline and online, in the real `train`."""

import json

import numpy as np
import pytest
import torch
import toy

from algorithms import dare_iql
from corl import iql
from corl_dare import runs

FIELDS = {
    "env": toy.TASK,
    "device": "cpu",
    "offline_iterations": 400,
    "online_iterations": 600,
    "batch_size": 64,
    "actor_lr": 2e-3,
    "qf_lr": 2e-3,
    "vf_lr": 2e-3,
    "tau": 0.02,
    "beta": 10.0,
    "discount": 0.8,
    "buffer_size": 10000,
    "eval_freq": 200,
    "n_episodes": 20,
    "log_freq": 100,
}
DARE = {
    "policy_ratio": {
        "score": "policy_ratio",
        "behavior": "mixture",
        "guidance_scale": 0.0,
    },
    "diffusion": {
        "guidance_scale": 1.0,
        "behavior_width": 0.05,
        "energy_updates": 30,
        "energy_batch_states": 16,
        "energy_update_freq": 10,
        "support_actions": 4,
        "reference_max_age": 50,
        "sampler_steps": 5,
    },
}


def run(module, tmp_path, monkeypatch, **fields):
    toy.install(monkeypatch, tmp_path)
    config = module.TrainConfig(**{**FIELDS, "runs_dir": str(tmp_path), **fields})
    torch.manual_seed(123)  # train seeds itself
    return module.train(config)


def dare_block(kind, **fields):
    small = {"behavior_updates": 200, "behavior_batch_size": 64, "behavior_lr": 1e-3}
    return dare_iql.DareIQLConfig(
        **{**small, "entropy_alpha": 0.01, **DARE[kind], **fields}
    )


@pytest.mark.parametrize("kind", ["iql", "policy_ratio", "diffusion"])
def test_it_learns_offline_and_online(kind, tmp_path, monkeypatch):
    """0 is standing still, 100 the optimum; the data's policy scores about 50."""
    module, fields = iql, {}
    if kind != "iql":
        module, fields = dare_iql, {"dare": dare_block(kind)}
    summary = run(module, tmp_path, monkeypatch, **fields)
    assert summary["score_offline"] > 65
    assert summary["score_final"] > 85, summary
    folder = next(tmp_path.glob("*-s0-*"))
    metrics = runs.read_csv(folder / "metrics.csv")
    assert metrics["phase"].count("online") >= 6  # the online phase was entered
    assert summary["updates"] == 1000
    written = json.loads((folder / "summary.json").read_text())
    needed = "algorithm env seed score_offline score_final score_best exchanges_mean"
    needed += " updates_per_second wall_seconds dataset versions commit machine"
    assert set(needed.split()) <= set(written)
    assert {"source", "path", "sha256", "rows"} <= set(written["dataset"])
    assert (folder / "curves.png").stat().st_size > 10_000
    if kind != "iql":
        exchanged = [float(x) for x in metrics["exchanged"] if x]
        assert len(exchanged) >= 6 and max(exchanged) > 0
        assert summary["exchanges_mean"] == pytest.approx(np.mean(exchanged))


def final_weights(tmp_path):
    folder = next(tmp_path.glob("*-s0-*"))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    trainer = state["parts"]["trainer"]
    return {k: trainer[k] for k in ("qf", "vf", "actor", "q_target")}


@pytest.mark.parametrize("mixing_ratio", [None, 0.5])
def test_off_means_equal(mixing_ratio, tmp_path, monkeypatch):
    """With DARE off the DARE file trains the baseline's numbers, bit for bit."""
    short = {"offline_iterations": 60, "online_iterations": 60, "eval_freq": 60}
    fields = {**short, "mixing_ratio": mixing_ratio, "n_episodes": 1}
    off = dare_iql.DareIQLConfig(enabled=False)
    run(iql, tmp_path / "a", monkeypatch, **fields)
    run(dare_iql, tmp_path / "b", monkeypatch, dare=off, **fields)
    a, b = final_weights(tmp_path / "a"), final_weights(tmp_path / "b")
    for part, state in a.items():
        for name, value in state.items():
            assert torch.equal(value, b[part][name]), f"{part}.{name} differs"


def test_dare_on_changes_the_online_phase_only(tmp_path, monkeypatch):
    """The offline phase of a DARE run is the baseline's, whatever the hook will do."""
    fields = {"offline_iterations": 60, "online_iterations": 0, "eval_freq": 60}
    run(iql, tmp_path / "a", monkeypatch, n_episodes=1, **fields)
    block = dare_block("policy_ratio", behavior_updates=5)
    run(dare_iql, tmp_path / "b", monkeypatch, n_episodes=1, dare=block, **fields)
    a, b = final_weights(tmp_path / "a"), final_weights(tmp_path / "b")
    assert all(torch.equal(v, b[p][k]) for p, s in a.items() for k, v in s.items())


@pytest.mark.parametrize("variant", [{"cap": 0}, {"value": "iv"}, {"rule": "random"}])
def test_variants_run_through_both_phases(variant, tmp_path, monkeypatch):
    short = {"offline_iterations": 40, "online_iterations": 40, "eval_freq": 40}
    block = dare_block("policy_ratio", behavior_updates=20, **variant)
    summary = run(
        dare_iql, tmp_path, monkeypatch, dare=block, utd=2, log_freq=10, **short
    )
    assert summary["updates"] == 40 + 2 * 40
    if variant == {"cap": 0}:
        assert summary["exchanges_mean"] == 0
    else:
        assert summary["exchanges_mean"] > 0


def test_a_dataset_larger_than_the_buffer_is_refused_before_training(
    tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="buffer_size 100 is smaller.*at least 4000"):
        run(iql, tmp_path, monkeypatch, buffer_size=100)
