"""Every algorithm learns a toy with a known optimum, offline and online, in the real `train`."""

import itertools
import json

import numpy as np
import pytest
import torch
from kinds import one_of_each_kind, with_slow
from short_runs import (
    assert_same_weights,
    awac_block,
    baq_block,
    cal_ql_block,
    cql_block,
    dare_block,
    final_weights,
    folder_of,
    noisy_block,
    ratio_block,
    run,
    stop_after,
    wsrl_block,
)

from algorithms import (
    awac,
    baq_cal_ql,
    cal_ql,
    cql,
    cql_sa,
    dare_awac,
    dare_cal_ql,
    dare_cql,
    dare_cql_sa,
    dare_famo2o_cql,
    dare_iql,
    dare_opt_spot,
    dare_rebrac,
    dare_spot,
    dare_td3_bc,
    dare_wsrl,
    e2o,
    famo2o_cql,
    famo2o_iql,
    iql,
    opt_spot,
    opt_td3,
    pex,
    rebrac,
    rlpd,
    spot,
    td3_bc,
    td3_bc_sa,
    wsrl,
)
from corl import curves
from corl_dare import hook

# The toy has two states and an action; the widths of the papers learn it no better.
pytestmark = pytest.mark.narrow(64)


@pytest.mark.makes("picture")
@pytest.mark.parametrize(
    "kind", with_slow(["iql", "policy_ratio"], ["iql", "policy_ratio", "diffusion"])
)
def test_it_learns_offline_and_online(kind, tmp_path, monkeypatch):
    """0 is standing still, 100 the optimum; the data's policy scores about 50."""
    module, fields = iql, {}
    if kind != "iql":
        module, fields = dare_iql, {"dare": dare_block(kind)}
    summary = run(module, tmp_path, monkeypatch, **fields)
    assert summary["score_offline"] > 65
    assert summary["score_final"] > 85, summary
    folder = folder_of(tmp_path)
    metrics = curves.read_csv(folder / "metrics.csv")
    assert metrics["phase"].count("online") >= 6  # the online phase was entered
    assert summary["updates"] == 1000
    written = json.loads((folder / "summary.json").read_text())
    needed = "algorithm env seed score_offline score_final score_best"
    needed += " updates_per_second wall_seconds dataset versions commit machine"
    assert set(needed.split()) <= set(written)
    # Only what exchanges rows says how many.
    assert ("exchanges_mean" in written) is ("exchanged" in metrics) is (kind != "iql")
    assert {"source", "path", "sha256", "rows"} <= set(written["dataset"])
    assert (folder / "curves.png").stat().st_size > 10_000
    if kind != "iql":
        exchanged = [float(x) for x in metrics["exchanged"] if x]
        assert len(exchanged) >= 6 and max(exchanged) > 0
        assert summary["exchanges_mean"] == pytest.approx(np.mean(exchanged))


BLOCKS = {
    dare_cal_ql: cal_ql_block,
    dare_cql: cql_block,
    dare_famo2o_cql: ratio_block,
    dare_cql_sa: ratio_block,
    dare_td3_bc: noisy_block,
    dare_awac: awac_block,
    dare_wsrl: wsrl_block,
}


# BAQ learns less online where the offline score of narrower networks is high.
@pytest.mark.narrow(256)
@pytest.mark.parametrize(
    "module",
    one_of_each_kind(
        [
            *(cql, dare_cql, cal_ql, dare_cal_ql, cql_sa, baq_cal_ql, e2o, famo2o_cql),
            *(dare_famo2o_cql, dare_cql_sa),
        ]
    ),
)
def test_the_cql_family_learns_offline_and_online(module, tmp_path, monkeypatch):
    # The halves are nearly separated here, so few batches have a row to exchange.
    fields = {}
    if module in BLOCKS:
        fields = {"dare": BLOCKS[module](cap=8), "log_freq": 5}
    if module is baq_cal_ql:
        fields = {"baq": baq_block(clone_updates=200, anneal_steps=100)}
    summary = run(module, tmp_path, monkeypatch, **fields)
    assert summary["score_offline"] > 65, summary
    # BAQ learns less of rows that are far from the clone, until its weight is 1.
    bar = summary["score_offline"] + 2 if module is baq_cal_ql else 85
    assert summary["score_final"] > bar, summary
    metrics = curves.read_csv(folder_of(tmp_path) / "metrics.csv")
    online = [i for i, phase in enumerate(metrics["phase"]) if phase == "online"]
    assert len(online) >= 6
    if module in BLOCKS:
        exchanged = [float(metrics["exchanged"][i]) for i in online]
        assert 0 < max(exchanged) <= 8


@pytest.mark.parametrize(
    "module, mixing_ratio",
    with_slow(
        [(td3_bc, None), (awac, 0.5), (rebrac, None), (spot, 0.5)],
        itertools.product([td3_bc, awac, rebrac, spot], [None, 0.5]),
    ),
)
def test_the_actor_critics_learn_offline_and_online(
    module, mixing_ratio, tmp_path, monkeypatch
):
    summary = run(module, tmp_path, monkeypatch, mixing_ratio=mixing_ratio)
    assert summary["score_offline"] > 65, summary
    assert summary["score_final"] > 85, summary
    metrics = curves.read_csv(folder_of(tmp_path) / "metrics.csv")
    assert metrics["phase"].count("online") >= 6 and summary["updates"] == 1000


def test_pex_learns_offline_and_online(tmp_path, monkeypatch):
    """The new policy begins at random, and the composite never falls far below the old one."""
    summary = run(pex, tmp_path, monkeypatch, inv_temperature=30.0)
    assert summary["score_offline"] > 65, summary
    assert summary["score_final"] > 85, summary
    metrics = curves.read_csv(folder_of(tmp_path) / "metrics.csv")
    shares = [float(x) for x in metrics["new_policy"] if x]
    assert 0.3 < shares[-1] < 1.0 and summary["updates"] == 950


def test_rlpd_learns_online_and_wsrl_in_both_phases(tmp_path, monkeypatch):
    """WSRL goes on without an offline row."""
    summary = run(rlpd, tmp_path / "rlpd", monkeypatch)
    assert summary["score_offline"] is None and summary["updates"] == 2 * 250
    assert summary["score_final"] > 85, summary
    summary = run(wsrl, tmp_path / "wsrl", monkeypatch)
    assert summary["score_offline"] > 65 and summary["score_final"] > 85, summary


def test_famo2o_on_iql_learns_offline_and_online(tmp_path, monkeypatch):
    summary = run(famo2o_iql, tmp_path, monkeypatch)
    assert summary["score_offline"] > 65 and summary["score_final"] > 85, summary


@pytest.mark.parametrize("module", one_of_each_kind([opt_td3, opt_spot]))
def test_opt_learns_offline_and_online(module, tmp_path, monkeypatch):
    summary = run(module, tmp_path, monkeypatch)
    assert summary["score_offline"] > 65, summary
    assert summary["score_final"] > 85, summary
    assert summary["updates"] == 400 + 100 + 550


def test_td3_bc_sa_learns_from_the_best_trajectories(tmp_path, monkeypatch):
    fields = {"buffer_mode": "part", "part_trajectories": 200, "online_warmup": 50}
    summary = run(td3_bc_sa, tmp_path, monkeypatch, **fields)
    assert summary["score_offline"] > 65 and summary["score_final"] > 85, summary


@pytest.mark.parametrize(
    "module, cap",
    one_of_each_kind(
        [
            *((dare_td3_bc, 8), (dare_awac, 2), (dare_rebrac, 8), (dare_spot, 8)),
            *((dare_wsrl, 8), (dare_opt_spot, 8)),
        ]
    ),
)
def test_their_dare_twins_learn_and_exchange(module, cap, tmp_path, monkeypatch):
    block = BLOCKS.get(module, noisy_block)
    fields = {"dare": block(cap=cap), "log_freq": 10}
    if module is dare_awac:
        # Of the caps 0, 2 and 8 the larger one learned slower here, and with 8 the score fell
        # (docs/awac.md); so this is a small cap and a longer online phase.
        fields["online_iterations"] = 1200
    summary = run(module, tmp_path, monkeypatch, **fields)
    assert summary["score_offline"] > 65 and summary["score_final"] > 85, summary
    assert 0 < summary["exchanges_mean"] <= cap


@pytest.mark.parametrize("lambd", with_slow([1e3], [0.0, 1e3]))
def test_the_support_constraint_decides_between_the_optimum_and_the_data(
    lambd, tmp_path, monkeypatch
):
    """Without it the policy is TD3's; with nothing else it stays near the data's, far from 100."""
    summary = run(spot, tmp_path, monkeypatch, lambd=lambd, lambd_cool=False)
    if lambd:
        assert 10 < summary["score_final"] < 65, summary
    else:
        assert summary["score_final"] > 85, summary


@pytest.mark.parametrize("weight", [None, 1.0, 0.0])
def test_a_weight_that_is_the_same_for_all_rows_is_spot_without_cooling(
    weight, tmp_path, monkeypatch
):
    """DARE off, every weight 1, every weight 0: SPOT, and SPOT with lambda 0, bit for bit."""
    short = {"offline_iterations": 15, "online_iterations": 15, "eval_freq": 15}
    short.update(mixing_ratio=0.5, n_episodes=1, vae_iterations=6)
    sample = hook.DareHook.sample

    def constant(self, batch_size):
        drawn = sample(self, batch_size)
        every = torch.full_like(drawn.release.weight, weight)
        return drawn._replace(release=hook.Release(every))

    with monkeypatch.context() as patch:
        if weight == 0.0:
            after = spot.TrainConfig.lambd_after
            patch.setattr(
                spot.TrainConfig, "lambd_after", lambda self, t: 0.0 * after(self, t)
            )
        run(spot, tmp_path / "a", monkeypatch, lambd_cool=weight is None, **short)
    block = noisy_block(behavior_updates=5, enabled=weight is not None, cap=0)
    monkeypatch.setattr(hook.DareHook, "sample", constant)
    run(dare_spot, tmp_path / "b", monkeypatch, dare=block, **short)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.whole
@pytest.mark.parametrize("bc_online", ["drop", "anneal"])
@pytest.mark.parametrize("module", [td3_bc, rebrac])
def test_td3_without_its_cloning_term_learns_on(
    module, bc_online, tmp_path, monkeypatch
):
    fields = {"bc_online": bc_online, "bc_anneal_steps": 300, "bc_end": 0.0}
    summary = run(module, tmp_path, monkeypatch, **fields)
    assert summary["score_final"] > 85, summary


@pytest.mark.parametrize("mixing_ratio", [None, 0.5])
def test_off_means_equal(mixing_ratio, tmp_path, monkeypatch):
    """With DARE off the DARE file trains the baseline's numbers, bit for bit."""
    short = {"offline_iterations": 15, "online_iterations": 15, "eval_freq": 15}
    fields = {**short, "mixing_ratio": mixing_ratio, "n_episodes": 1}
    off = dare_iql.DareIQLConfig(enabled=False)
    run(iql, tmp_path / "a", monkeypatch, **fields)
    run(dare_iql, tmp_path / "b", monkeypatch, dare=off, **fields)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


RELEASED = {"keep": 1.0, "drop": 0.0}


@pytest.mark.parametrize("bc_online", [None, *RELEASED])
@pytest.mark.parametrize("base, twin", [(td3_bc, dare_td3_bc), (rebrac, dare_rebrac)])
def test_a_weight_that_is_the_same_for_all_rows_is_bc_online(
    base, twin, bc_online, tmp_path, monkeypatch
):
    """DARE off, every weight 1, every weight 0: the baseline's numbers, bit for bit."""
    short = {"offline_iterations": 15, "online_iterations": 15, "eval_freq": 15}
    short.update(mixing_ratio=0.5, n_episodes=1)
    sample = hook.DareHook.sample
    drawn_by_hook = []

    def constant(self, batch_size):
        drawn = sample(self, batch_size)
        drawn_by_hook.append(drawn)
        weight = torch.full_like(drawn.release.weight, RELEASED[bc_online])
        return drawn._replace(release=hook.Release(weight))

    block = noisy_block(behavior_updates=5, enabled=bc_online is not None, cap=0)
    keep = "keep" if base is td3_bc else "auto"
    run(base, tmp_path / "a", monkeypatch, bc_online=bc_online or keep, **short)
    monkeypatch.setattr(hook.DareHook, "sample", constant)
    run(twin, tmp_path / "b", monkeypatch, dare=block, **short)
    assert bool(drawn_by_hook) is (bc_online is not None)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("dare", [{"enabled": False}, {"cap": 0}])
@pytest.mark.parametrize(
    "baseline, module", [(cal_ql, dare_cal_ql), (cql, dare_cql), (awac, dare_awac)]
)
def test_off_means_equal_where_every_row_counts(
    baseline, module, dare, tmp_path, monkeypatch
):
    """Off, or exchanging nothing with every weight 1: the baseline's numbers, bit for bit."""
    short = {"offline_iterations": 15, "online_iterations": 15, "eval_freq": 15}
    short["mixing_ratio"] = 0.5
    run(baseline, tmp_path / "a", monkeypatch, **short, n_episodes=1)
    if "cap" in dare:
        sample = hook.DareHook.sample

        def all_ones(self, batch_size):
            drawn = sample(self, batch_size)
            # No row is released, so none may be left out of the conservative loss.
            ones = hook.Release(torch.ones_like(drawn.release.weight))
            return drawn._replace(release=ones)

        monkeypatch.setattr(hook.DareHook, "sample", all_ones)
    block = BLOCKS[module](behavior_updates=10, **dare)
    run(module, tmp_path / "b", monkeypatch, dare=block, **short, n_episodes=1)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "module, stop_at",
    with_slow(
        [(dare_cal_ql, 60)],
        itertools.product([cql, dare_cql, cal_ql, dare_cal_ql, dare_awac], [20, 60]),
    ),
)
def test_stopped_and_resumed_equals_an_unbroken_run(
    module, stop_at, tmp_path, monkeypatch
):
    """Stopped offline, or online after the calibration's end; to the last bit."""
    fields = {"offline_iterations": 40, "online_iterations": 40, "eval_freq": 40}
    fields.update(n_episodes=1, log_freq=10)
    if module in BLOCKS:
        fields["dare"] = BLOCKS[module](behavior_updates=10)
    run(module, tmp_path / "a", monkeypatch, **fields)
    with monkeypatch.context() as patch:
        stop_after(stop_at, patch)
        assert run(module, tmp_path / "b", monkeypatch, **fields) == {}
    folder = folder_of(tmp_path / "b")
    run(module, tmp_path / "b", monkeypatch, resume=str(folder), **fields)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    whole = folder_of(tmp_path / "a")
    text = [(f / "metrics.csv").read_text() for f in (whole, folder)]
    assert text[0] == text[1]


def test_rows_collected_online_have_no_lower_bound(tmp_path, monkeypatch):
    """Kept calibration: known returns bound, unknown ones do not, wherever rows end up."""
    fields = {"offline_iterations": 20, "online_iterations": 30, "eval_freq": 50}
    block = cal_ql_block(behavior_updates=10, keep_calibration=True, cap=None)
    batches, trained = [], dare_cal_ql.CalQL.train

    def train(self, batch, release=None):
        if release is not None:
            batches.append((batch[5].squeeze(-1), self._calibration_enabled))
        return trained(self, batch, release)

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
    fields = {"offline_iterations": 15, "online_iterations": 0, "eval_freq": 15}
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
