"""Every algorithm learns a toy with a known optimum, offline and online, in the real `train`."""

import json

import numpy as np
import pytest
import torch
import toy

from algorithms import cal_ql, cql, dare_cal_ql, dare_iql, iql
from corl import curves, runs
from corl_dare import hook

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
CQL_FIELDS = {
    **{k: v for k, v in FIELDS.items() if k not in ("actor_lr", "vf_lr", "tau", "beta")},
    "offline_iterations": 200,
    "online_iterations": 300,
    "eval_freq": 100,
    "log_freq": 50,
    "batch_size": 32,
    "policy_lr": 3e-3,
    "qf_lr": 3e-3,
    "soft_target_update_rate": 0.05,
    "cql_n_actions": 2,
    "alpha_multiplier": 0.05,
    "cql_alpha": 0.3,
    "cql_alpha_online": 0.3,
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
    defaults = FIELDS if module in (iql, dare_iql) else CQL_FIELDS
    config = module.TrainConfig(**{**defaults, "runs_dir": str(tmp_path), **fields})
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
    metrics = curves.read_csv(folder / "metrics.csv")
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


def cal_ql_block(**fields):
    small = {"behavior_updates": 200, "behavior_batch_size": 64, "behavior_lr": 1e-3}
    return dare_cal_ql.DareCalQLConfig(**{**small, **DARE["policy_ratio"], **fields})


@pytest.mark.parametrize("module", [cql, cal_ql, dare_cal_ql])
def test_the_cql_family_learns_offline_and_online(module, tmp_path, monkeypatch):
    # The halves are nearly separated here, so few batches have a row to exchange.
    dare = {"dare": cal_ql_block(cap=8), "log_freq": 5}
    fields = dare if module is dare_cal_ql else {}
    summary = run(module, tmp_path, monkeypatch, **fields)
    assert summary["score_offline"] > 65, summary
    assert summary["score_final"] > 85, summary
    metrics = curves.read_csv(next(tmp_path.glob("*-s0-*")) / "metrics.csv")
    online = [i for i, phase in enumerate(metrics["phase"]) if phase == "online"]
    assert len(online) >= 6
    if module is dare_cal_ql:
        exchanged = [float(metrics["exchanged"][i]) for i in online]
        assert 0 < max(exchanged) <= 8


def final_weights(tmp_path):
    folder = next(tmp_path.glob("*-s0-*"))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    trainer = state["parts"]["trainer"]
    parts = {k: v for k, v in trainer.items() if isinstance(v, dict)}
    return {k: v for k, v in parts.items() if "optim" not in k}


def assert_same_weights(a, b):
    a, b = final_weights(a), final_weights(b)
    assert a.keys() == b.keys()
    for part, state in a.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, b[part][name]), f"{part}.{name} differs"


@pytest.mark.parametrize("mixing_ratio", [None, 0.5])
def test_off_means_equal(mixing_ratio, tmp_path, monkeypatch):
    """With DARE off the DARE file trains the baseline's numbers, bit for bit."""
    short = {"offline_iterations": 60, "online_iterations": 60, "eval_freq": 60}
    fields = {**short, "mixing_ratio": mixing_ratio, "n_episodes": 1}
    off = dare_iql.DareIQLConfig(enabled=False)
    run(iql, tmp_path / "a", monkeypatch, **fields)
    run(dare_iql, tmp_path / "b", monkeypatch, dare=off, **fields)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("dare", [{"enabled": False}, {"cap": 0}])
def test_off_means_equal_for_cal_ql(dare, tmp_path, monkeypatch):
    """Off, or exchanging nothing with every weight 1: Cal-QL's numbers, bit for bit."""
    short = {"offline_iterations": 40, "online_iterations": 40, "eval_freq": 40}
    run(cal_ql, tmp_path / "a", monkeypatch, **short, n_episodes=1)
    if "cap" in dare:
        sample = hook.DareHook.sample

        def all_ones(self, batch_size):
            batch, weight, log = sample(self, batch_size)
            return batch, torch.ones_like(weight), log

        monkeypatch.setattr(hook.DareHook, "sample", all_ones)
        # Then no row is released, so none may be left out of the conservative loss.
        monkeypatch.setattr(hook.DareHook, "first_released", lambda self, n: None)
    block = cal_ql_block(behavior_updates=10, **dare)
    run(dare_cal_ql, tmp_path / "b", monkeypatch, dare=block, **short, n_episodes=1)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("module", [cql, cal_ql, dare_cal_ql])
@pytest.mark.parametrize("stop_at", [20, 60])
def test_stopped_and_resumed_equals_an_unbroken_run(
    module, stop_at, tmp_path, monkeypatch
):
    """Stopped offline, or online after the calibration's end; to the last bit."""
    fields = {"offline_iterations": 40, "online_iterations": 40, "eval_freq": 40}
    fields.update(n_episodes=1, log_freq=10)
    if module is dare_cal_ql:
        fields["dare"] = cal_ql_block(behavior_updates=10)
    run(module, tmp_path / "a", monkeypatch, **fields)
    log = runs.Run.log

    def stopping(self, step, phase, metrics):
        log(self, step, phase, metrics)
        self.stop_requested = self.stop_requested or step == stop_at

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "log", stopping)
        assert run(module, tmp_path / "b", monkeypatch, **fields) == {}
    folder = next((tmp_path / "b").glob("*-s0-*"))
    run(module, tmp_path / "b", monkeypatch, resume=str(folder), **fields)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    whole = next((tmp_path / "a").glob("*-s0-*"))
    text = [(f / "metrics.csv").read_text() for f in (whole, folder)]
    assert text[0] == text[1]


def test_rows_collected_online_have_no_lower_bound(tmp_path, monkeypatch):
    """Kept calibration: known returns bound, unknown ones do not, wherever rows end up."""
    fields = {"offline_iterations": 20, "online_iterations": 30, "eval_freq": 50}
    block = cal_ql_block(behavior_updates=10, keep_calibration=True, cap=None)
    batches, trained = [], dare_cal_ql.CalQL.train

    def train(self, batch, weight=None, first_released=None):
        if weight is not None:
            batches.append((batch[5].squeeze(-1), self._calibration_enabled))
        return trained(self, batch, weight, first_released)

    monkeypatch.setattr(dare_cal_ql.CalQL, "train", train)
    run(dare_cal_ql, tmp_path, monkeypatch, dare=block, n_episodes=1, **fields)
    bounds = torch.stack([b for b, _ in batches])
    assert all(enabled for _, enabled in batches[-30:])
    online = bounds[-30:].isinf()
    assert online.sum() == 30 * 16 and (bounds[-30:][online] < 0).all()
    # Exchanged rows took their missing bound along into the offline-like half.
    assert online[:, :16].any()
    state = final_weights(tmp_path)
    assert all(torch.isfinite(v).all() for v in state["critic1"].values())
    with pytest.raises(ValueError, match="keep_calibration.*compat"):
        dare_cal_ql.TrainConfig(env="hopper-medium-v2", dare=block, compat=True)


def test_dare_on_changes_the_online_phase_only(tmp_path, monkeypatch):
    """The offline phase of a DARE run is the baseline's, whatever the hook will do."""
    fields = {"offline_iterations": 60, "online_iterations": 0, "eval_freq": 60}
    run(iql, tmp_path / "a", monkeypatch, n_episodes=1, **fields)
    block = dare_block("policy_ratio", behavior_updates=5)
    run(dare_iql, tmp_path / "b", monkeypatch, n_episodes=1, dare=block, **fields)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


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
