"""RLPD: updates against a float64 oracle, batches of any offline share, random first steps."""

import numpy as np
import pytest
import torch
import toy
from helpers import assert_equal
from oracle_sac import OracleRLPD
from short_runs import checkpoint_of, folder_of, run, stop_after

from algorithms import rlpd
from corl import buffers, curves

S, A, B = 5, 2, 32
TASK = "hopper-medium-v2"
SMALL = {"hidden_dim": 16, "compile": False}


def batches(count, seed=1):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        arrays = (
            rng.normal(size=(B, S)),
            rng.uniform(-1, 1, (B, A)),
            rng.normal(size=(B, 1)),
            rng.normal(size=(B, S)),
            rng.random((B, 1)) < 0.2,
        )
        yield [torch.tensor(x, dtype=torch.float32) for x in arrays]


def make_trainer(max_action=1.0, **fields):
    config = rlpd.TrainConfig(env=TASK, **{**SMALL, **fields})
    torch.manual_seed(0)
    return rlpd.make_trainer(config, S, A, max_action, "cpu"), config


def watch_noise(trainer):
    """What each update draws, in a list."""
    drawn, draw = [], trainer._noise

    def watched(*args):
        drawn.append(draw(*args))
        return drawn[-1]

    trainer._noise = watched
    return drawn


def assert_same_weights(trainer, oracle):
    expected = {**oracle.now, "target_critics": oracle.target}
    for name, parameters in expected.items():
        for key, value in getattr(trainer, name).state_dict().items():
            gap = (value.double() - parameters[key]).abs().max().item()
            assert gap < 2e-5, f"{name}.{key} is off by {gap}"


CASES = {
    "locomotion": {"utd": 4},
    "antmaze": {
        "utd": 3,
        "backup_entropy": False,
        "n_hidden_layers": 3,
        "n_target_critics": 1,
    },
    "SAC": {
        "utd": 1,
        "n_critics": 2,
        "critic_layer_norm": False,
        "mixing_ratio": 0.0,
        "temperature_lr": 1e-2,
        "init_temperature": 0.3,
    },
}


@pytest.mark.parametrize("max_action", [1.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_twelve_updates_equal_the_float64_oracle(case, max_action):
    trainer, config = make_trainer(max_action, **CASES[case])
    oracle, drawn = OracleRLPD(trainer, config, A, max_action), watch_noise(trainer)
    for number, batch in enumerate(batches(12), start=1):
        logs = trainer.train(batch, online=True)
        learns = number % config.utd == 0
        expected = oracle.train(batch, drawn[-1], learns)
        # The policy and the temperature learn once, from the last batch.
        assert ("actor_loss" in logs) is learns
        for name, value in expected.items():
            assert logs[name].item() == pytest.approx(value, rel=2e-4, abs=1e-5)
    assert_same_weights(trainer, oracle)


def test_losses_have_a_value_per_row_and_the_offline_phase_is_the_same_update():
    trainer, _ = make_trainer(utd=5)
    (batch,) = batches(1)
    noise = trainer._noise(batch[1], True)
    target = trainer.td_target(batch[3], batch[2], batch[4], noise)
    losses = trainer.critic_losses(trainer.critics(*batch[:2]), target)
    policy_losses, log_pi = trainer.policy_losses(batch[0], noise.policy)
    found = losses, policy_losses, trainer.temperature_losses(log_pi)
    assert [x.shape for x in found] == [(B,)] * 3
    assert len(set(noise.members.tolist())) == 2
    other, _ = make_trainer(utd=1)
    for made, online in ((trainer, False), (other, True)):
        torch.manual_seed(1)
        assert "actor_loss" in made.train(batch, online)
    assert_equal(trainer.state_dict(), other.state_dict())


SHORT = {"online_iterations": 30, "eval_freq": 30, "n_episodes": 1, "log_freq": 1}
SHORT |= {"random_steps": 8, "online_warmup": 12, "utd": 3, "batch_size": 8}


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5])
def test_every_batch_has_its_offline_share_and_there_is_no_offline_phase(
    ratio, tmp_path, monkeypatch
):
    seen, read = [], buffers.MixedBuffer.read
    halves = lambda self, *rows: seen.append([*map(len, rows)]) or read(self, *rows)  # noqa: E731
    monkeypatch.setattr(buffers.MixedBuffer, "read", halves)
    summary = run(rlpd, tmp_path, monkeypatch, **SHORT, mixing_ratio=ratio)
    # 18 steps after the warm-up.
    assert summary["updates"] == 18 * 3 and summary["score_offline"] is None
    offline = int(8 * ratio)
    assert len(seen) >= 54 and all(row == [offline, 8 - offline] for row in seen)
    metrics = curves.read_csv(folder_of(tmp_path) / "metrics.csv")
    assert [bool(x) for x in metrics["actor_loss"]] == [False] * 12 + [True] * 18


def test_the_first_steps_are_uniform_and_the_later_ones_the_policys(
    tmp_path, monkeypatch
):
    taken, step = [], toy.ToyEnv.step
    record = lambda self, a: taken.append(float(a[0])) or step(self, a)  # noqa: E731
    monkeypatch.setattr(toy.ToyEnv, "step", record)
    # What the policy does cannot be mistaken for a draw.
    act = lambda self, state, device: np.full(1, 0.5, np.float32)  # noqa: E731
    monkeypatch.setattr(rlpd.SquashedGaussianPolicy, "act", act)
    fields = {**SHORT, "online_iterations": 300, "online_warmup": 300, "eval_freq": 300}
    run(rlpd, tmp_path, monkeypatch, **{**fields, "random_steps": 250})
    # The dataset was made with the same environment; five steps are of the evaluation.
    collected = taken[-305:-5]
    assert collected[250:] == [0.5] * 50
    drawn = np.array(collected[:250])
    assert len(set(drawn)) > 240 and np.abs(drawn).max() <= 1
    assert np.histogram(drawn, 5, (-1, 1))[0].min() > 30


@pytest.mark.parametrize("stop_at", [5, 10, 20])
def test_stopped_and_resumed_equals_an_unbroken_run(stop_at, tmp_path, monkeypatch):
    """Among random steps, in the warm-up, and later."""
    run(rlpd, tmp_path / "a", monkeypatch, **SHORT)
    with monkeypatch.context() as patch:
        stop_after(stop_at, patch)
        assert run(rlpd, tmp_path / "b", monkeypatch, **SHORT) == {}
    resume = str(folder_of(tmp_path / "b"))
    run(rlpd, tmp_path / "b", monkeypatch, **SHORT, resume=resume)
    one, two = (checkpoint_of(tmp_path / name) for name in "ab")
    for key in ("parts", "rng", "step"):
        assert_equal(one[key], two[key], key)
    texts = [(folder_of(tmp_path / x) / "metrics.csv").read_text() for x in "ab"]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_target_critics": 11}, "n_target_critics 11 are drawn from n_critics 10"),
        ({"mixing_ratio": 0.3}, "batch_size 256 cannot be split by mixing_ratio 0.3"),
        ({"mixing_ratio": 1.0}, r"mixing_ratio must lie in \[0, 1\)"),
        ({"n_critics": 0}, r"n_critics must lie in \[1, 1000\], not 0"),
        ({"random_steps": -1}, r"random_steps must lie in \[0, 1e9\]"),
    ],
)
def test_bad_settings_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        rlpd.TrainConfig(**{"env": TASK, **fields})
