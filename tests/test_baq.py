"""BAQ on Cal-QL: its clone, weights, priorities and updates; what is left of it switched off."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import make_buffer
from oracle_baq import OracleClone, distances, priorities
from short_runs import assert_same_weights, baq_block, checkpoint_of, folder_of, run
from test_cql import A, B, S, assert_same, make_pair, random_batch

from algorithms import baq_cal_ql, cal_ql
from corl import curves
from corl.buffers import MixedBuffer, ReplayBuffer
from corl.tasks import D4RL
from experiments.groups import Experiment

ROWS = 45  # of a dataset; 0, 20 and 40 are held out
SHORT = {
    "offline_iterations": 20,
    "online_iterations": 20,
    "eval_freq": 20,
    "n_episodes": 1,
    "batch_size": 16,
    "log_freq": 5,
}


def behavior(max_action=1.0, done=0, **fields):
    """A behavior around two buffers of `helpers`, 50 online steps long."""
    offline, online = make_buffer(ROWS, seed=1), make_buffer(30, shift=0.4, seed=2)
    session = SimpleNamespace(
        offline_buffer=offline,
        online_buffer=online,
        mixed=MixedBuffer(offline, online, 0.5),
        sizes=(3, 2, max_action),
        device="cpu",
        facts=lambda: {"online_steps": lambda: done},
        keep=lambda name, part: part,
    )
    config = baq_cal_ql.TrainConfig(
        online_iterations=60, online_warmup=10, baq=baq_block(**fields)
    )
    return baq_cal_ql.Behavior(session, config)


def rows_of(buffer):
    states, actions = buffer.rows()[:2]
    return states, actions


@pytest.mark.parametrize("max_action", [1.0, 2.0])
def test_the_clone_is_fitted_as_in_float64_and_some_rows_are_held_out(max_action):
    made = behavior(max_action, clone_batch_size=400)
    oracle = OracleClone(made.clone, made.settings.clone_lr)
    gather, drawn = made.buffer.gather, []
    made.buffer.gather = lambda rows: drawn.append(rows) or gather(rows)
    for _ in range(6):
        loss = made.update()["clone_loss"].item()
        s, a = gather(drawn[-1])[:2]
        assert loss == pytest.approx(oracle.fit(s, a), rel=1e-5)
    for name, value in made.clone.state_dict().items():
        assert (value.double() - oracle.now[name]).abs().max() < 2e-5, name
    assert set(np.concatenate(drawn)) == set(range(ROWS)) - {0, 20, 40}


def test_the_sensitivity_gives_held_out_rows_their_median_weight_and_falls_to_0():
    made, said = behavior(median_weight=0.7), []
    assert made.known_sensitivity() == 1.0
    made.calibrate(said.append)
    made.calibrate(said.append)
    s, a = (field[[0, 20, 40]] for field in rows_of(made.buffer))
    found = distances(OracleClone(made.clone, 0.0).now, s, a, 1.0)
    weights = torch.exp(-made.sensitivity * found)
    assert weights.median().item() == pytest.approx(0.7, rel=1e-5) and len(said) == 1
    k = made.sensitivity
    for done, share in ((0, 1.0), (25, 0.5), (50, 0.0), (60, 0.0)):
        made.done = lambda done=done: done
        assert made.annealed() == pytest.approx(share * k)
    sooner = behavior(sensitivity=3.0, anneal_steps=20, done=5)
    sooner.calibrate(said.append)
    assert sooner.sensitivity == 3.0 and sooner.annealed() == 3.0 * 0.75


def test_rows_are_drawn_by_their_distance_from_the_clone():
    """Near ones of the dataset, far ones of what was collected."""
    made = behavior(max_action=2.0, sensitivity=4.0, floor=0.05)
    params = OracleClone(made.clone, 0.0).now
    for half, novel in ((made.batches.offline, False), (made.batches.online, True)):
        found = distances(params, *rows_of(half.buffer), 2.0)
        expected = priorities(found, 4.0, 0.05, novel)
        np.testing.assert_allclose(half.weights(), expected, rtol=1e-5)
        np.random.seed(0)
        count = np.bincount(half.draw(40_000), minlength=len(expected))
        spread = np.sqrt(expected / expected.sum() / 40_000)
        error = count / 40_000 - expected / expected.sum()
        assert (np.abs(error) < 5 * spread).all()
        assert expected.max() > 1.5 * expected.min()


def test_updates_equal_the_float64_oracle():
    trainer, oracle = make_pair(baq_cal_ql, calibrated=True)
    made = behavior(max_action=1.0, sensitivity=2.0)
    made.clone = baq_cal_ql.Clone(S, A, 1.0)
    params = OracleClone(made.clone, 0.0).now
    rng, generator = np.random.default_rng(1), torch.Generator()
    torch.manual_seed(1)
    for number in range(8):
        made.done = lambda number=number: 5 * number
        batch = random_batch(rng, True)
        generator.set_state(torch.get_rng_state())
        drawn = oracle.draws(generator, B, A)
        k = 2.0 * (1 - 5 * number / 50)
        expected = torch.exp(-k * distances(params, *batch[:2], 1.0))
        weight, log = made.weigh(batch)
        assert (weight - expected).abs().max() < 1e-5 and log["sensitivity"] == k
        logs = trainer.train(batch, weight)
        for name, value in oracle.train(batch, drawn, td_weight=expected).items():
            assert logs[name].item() == pytest.approx(value, rel=3e-4, abs=3e-5), name
    assert_same(trainer, oracle)
    assert behavior(weigh=False).weigh(make_buffer(9).rows())[0] is None


@pytest.mark.parametrize(
    "fields", [{"enabled": False}, {"sensitivity": 0.0, "prioritize": False}]
)
def test_switched_off_it_is_cal_ql_bit_for_bit(fields, tmp_path, monkeypatch):
    run(cal_ql, tmp_path / "a", monkeypatch, **SHORT)
    run(baq_cal_ql, tmp_path / "b", monkeypatch, baq=baq_block(**fields), **SHORT)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    rng = [checkpoint_of(tmp_path / x)["rng"]["torch"] for x in "ab"]
    assert torch.equal(*rng)


def test_every_result_says_that_it_is_an_interpretation(tmp_path, monkeypatch, capsys):
    summary = run(baq_cal_ql, tmp_path, monkeypatch, baq=baq_block(), **SHORT)
    caveat = baq_cal_ql.TrainConfig.CAVEAT
    assert caveat.startswith("interpretation: ") and summary["caveat"] == caveat
    shown = capsys.readouterr().out
    assert f"\n{caveat}\n" in shown and "clone: median squared distance" in shown
    runs = {"baq": {"hopper-medium-v2": {0: {"caveat": caveat}}}}
    named = Experiment(tmp_path, "", "", {"baq": "BAQ", "x": "X"}, [], runs, [], D4RL)
    assert (named.name("baq"), named.name("x")) == ("BAQ (interpretation)", "X")
    metrics = curves.read_csv(folder_of(tmp_path) / "metrics.csv")
    k = [float(x) for x in metrics["sensitivity"] if x]
    assert k == sorted(k, reverse=True) and 0 < k[-1] < k[0]
    assert all(0 < float(x) <= 1 for x in metrics["td_weight"] if x)
    assert 0 < summary["td_weight_mean"] < 1


def test_priorities_without_offline_rows_are_refused():
    with pytest.raises(ValueError, match="mixing_ratio 0 .*baq needs some"):
        baq_cal_ql.TrainConfig(mixing_ratio=0.0)
    baq_cal_ql.TrainConfig(mixing_ratio=0.0, baq=baq_block(prioritize=False))
    empty = baq_cal_ql.PriorityBuffer(ReplayBuffer(3, 2, 5), behavior(), True)
    assert len(empty.draw(0)) == 0
