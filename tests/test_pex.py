"""PEX: its update against float64, what it shares with IQL, and how its policies act."""

import copy

import numpy as np
import pytest
import torch
import toy
from oracle_pex import OraclePEX
from short_runs import run

from algorithms import iql, pex
from corl import checkpoints, finetune

pytestmark = pytest.mark.narrow(32)
S, A, B = 5, 2, 64
TASK = "hopper-medium-v2"


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


def make_trainer(module=pex, seed=0, **fields):
    torch.manual_seed(seed)
    config = module.TrainConfig(env=TASK, offline_iterations=50, compile=False, **fields)
    return module.make_trainer(config, S, A, 1.0, "cpu"), config


def weights(trainer, *names):
    return [p.clone() for n in names for p in getattr(trainer, n).parameters()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"inv_temperature": 0.5},
        {"beta": 10.0, "iql_tau": 0.9, "clip_actions": True, "tau": 0.05},
    ],
)
def test_twenty_online_updates_equal_the_float64_oracle(fields):
    trainer, config = make_trainer(**fields)
    trainer.actor.apply(pex.xavier)
    oracle = OraclePEX(trainer, config)
    for batch in batches(20):
        stream = torch.get_rng_state()
        draws = trainer._noise(batch[1])
        torch.set_rng_state(stream)
        logs = {k: v.item() for k, v in trainer.train(batch, online=True).items()}
        expected = oracle.expand(batch, *draws)
        assert logs == pytest.approx(expected, rel=2e-4, abs=1e-5)
    pairs = {
        "qf": oracle.q,
        "q_target": oracle.q_target,
        "vf": oracle.v,
        "actor": oracle.actor,
        "actor_online": oracle.new,
    }
    for name, expected in pairs.items():
        for key, value in getattr(trainer, name).state_dict().items():
            assert (value.double() - expected[key]).abs().max() < 2e-5, f"{name}.{key}"


def test_the_offline_phase_has_iqls_bits():
    ours, _ = make_trainer()
    theirs, _ = make_trainer(iql)
    new = weights(ours, "actor_online")
    for batch in batches(5):
        found, expected = ours.train(batch), theirs.train(batch)
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    for name in ("qf", "q_target", "vf", "actor"):
        ours_now, theirs_now = (getattr(t, name).state_dict() for t in (ours, theirs))
        assert list(ours_now) == list(theirs_now)
        assert equal(ours_now.values(), theirs_now.values()), name
    rates = [t.actor_optimizer.param_groups[0]["lr"] for t in (ours, theirs)]
    assert rates[0] == rates[1] < 3e-4
    assert equal(new, weights(ours, "actor_online"))


@pytest.mark.parametrize("wild", [False, True])
def test_v_q_and_targets_are_iqls_whatever_the_policies_do(wild):
    ours, _ = make_trainer(clip_actions=wild)
    theirs, _ = make_trainer(iql)
    if wild:
        with torch.no_grad():
            for parameter in [*ours.actor.parameters(), *ours.actor_online.parameters()]:
                parameter.add_(torch.randn_like(parameter))
    frozen = weights(ours, "actor")
    ours.start_online()
    for batch in batches(20):
        ours.train(batch, online=True)
        theirs.train(batch)
    values = ("qf", "q_target", "vf")
    assert equal(weights(ours, *values), weights(theirs, *values))
    assert equal(frozen, weights(ours, "actor"))


def test_online_adam_begins_anew_and_the_rates_are_constant():
    trainer, _ = make_trainer()
    for batch in batches(30):
        trainer.train(batch)
    trainer.start_online()
    resumed = copy.deepcopy(trainer)
    for optimizer in (resumed.q_optimizer, resumed.v_optimizer):
        optimizer.state.clear()
    for batch in batches(3):
        stream = torch.get_rng_state()
        trainer.train(batch, online=True)
        torch.set_rng_state(stream)
        resumed.train(batch, online=True)
    assert equal(weights(trainer, "qf", "vf"), weights(resumed, "qf", "vf"))
    assert trainer.actor_online_optimizer.param_groups[0]["lr"] == 3e-4


def proposals(composite, states, noise):
    with torch.no_grad():
        first, second = composite.proposals(states, noise)
        q = torch.stack([composite.critic(states, a) for a in (first, second)], -1)
    return first, second, q


def test_an_action_is_that_of_one_policy_as_often_as_softmax_of_q_says():
    trainer, _ = make_trainer(inv_temperature=5.0)
    with torch.no_grad():
        trainer.actor_online.log_std.fill_(-4.0)
    composite, count = trainer.composite, 20_000
    state = np.random.default_rng(0).normal(size=S).astype(np.float32)
    states = np.repeat(state[None], count, 0)
    torch.manual_seed(3)
    actions = composite.act(states)
    torch.manual_seed(3)
    noise = torch.randn(1, count, A)
    first, second, q = proposals(composite, torch.from_numpy(states)[None], noise)
    same = [(torch.from_numpy(actions) == x[0]).all(-1) for x in (first, second)]
    assert (same[0] ^ same[1]).all()
    expected = torch.softmax(5.0 * q, -1)[0, :, 1].mean().item()
    assert 0.1 < expected < 0.9
    assert same[1].float().mean().item() == pytest.approx(expected, abs=0.015)


def test_a_greedy_evaluation_takes_the_better_of_both_means():
    trainer, _ = make_trainer(eval_epsilon=0.0)
    states = np.random.default_rng(0).normal(size=(200, S)).astype(np.float32)
    composite = trainer.composite.eval()
    actions = torch.from_numpy(composite.act(states))
    tensors = torch.from_numpy(states)
    first, second, q = proposals(composite, tensors, torch.zeros(200, A))
    better = (q[:, 1] > q[:, 0]).unsqueeze(-1)
    assert 20 < better.sum() < 180
    torch.testing.assert_close(actions, torch.where(better, second, first))


def test_an_evaluation_draws_the_share_epsilon_and_always_the_same():
    trainer, _ = make_trainer(eval_epsilon=0.3, inv_temperature=0.0)
    composite, count = trainer.composite, 5000
    states = np.zeros((count, S), np.float32)
    stream = torch.get_rng_state()
    actions = composite.eval().act(states)
    other = composite.act(states)
    again = composite.eval().act(states)
    assert torch.equal(stream, torch.get_rng_state())
    assert (again == actions).all() and (other != actions).any()
    first, second, q = proposals(
        composite, torch.from_numpy(states), torch.zeros(count, A)
    )
    close = [np.isclose(actions, x.numpy(), atol=1e-6).all(-1) for x in (first, second)]
    sampled = ~close[0] & ~close[1]
    # Drawn proposals that are followed: greedily where the sample is better, else one half.
    assert 0 < sampled.mean() < 0.3
    # A choice against Q: one half of the share that is drawn; some samples are better anyway.
    assert (close[0] | close[1]).mean() > 0.7
    worse = close[0] if q[0, 1] > q[0, 0] else close[1]
    assert worse.mean() > 0.3 / 2 * 0.6


def opened(module, tmp_path, monkeypatch, **fields):
    """The session of a run on the toy that ends before its first step."""
    sessions = []

    class Opened(Exception):
        pass

    def start(self, *args, **options):
        sessions.append(self)
        raise Opened

    with monkeypatch.context() as patch, pytest.raises(Opened):
        patch.setattr(finetune.Session, "start", start)
        run(module, tmp_path, monkeypatch, **fields)
    return sessions[0]


def test_it_starts_from_a_model_of_iql_with_its_normalization(tmp_path, monkeypatch):
    short = {"offline_iterations": 60, "eval_freq": 60, "online_iterations": 0}
    run(iql, tmp_path / "iql", monkeypatch, n_episodes=1, **short)
    folder = next((tmp_path / "iql").glob("IQL-*"))
    checkpoints.export_corl(folder, tmp_path / "model.pt")
    start = {"load_model": str(tmp_path / "model.pt"), "offline_iterations": 0}
    sessions = [opened(m, tmp_path, monkeypatch, **start) for m in (iql, pex)]
    theirs, ours = (session._parts["trainer"] for session in sessions)
    for name in ("qf", "q_target", "vf", "actor"):
        assert equal(weights(theirs, name), weights(ours, name))
    raw = np.array([0.4, 1.0])
    states = [
        ((raw - s.normalization.mean) / s.normalization.std).astype(np.float32)
        for s in sessions
    ]
    assert (states[0] != raw.astype(np.float32)).any()
    mean = theirs.actor.eval().act(states[0])
    first, _ = ours.composite.proposals(
        torch.from_numpy(states[1]), torch.zeros(len(mean))
    )
    assert (first.detach().numpy() == mean).all() and len(ours.q_optimizer.state)
    new = ours.actor_online.state_dict().values()
    assert not equal(new, ours.actor.state_dict().values())


@pytest.mark.parametrize("clip", [False, True])
def test_the_environment_gets_the_part_of_an_action_inside_the_box(
    clip, tmp_path, monkeypatch
):
    """About a third of a new policy's actions lie outside: its standard deviation is 1."""
    taken, step = [], toy.ToyEnv.step

    def watched(self, action):
        taken.append(action)
        return step(self, action)

    fields = {"offline_iterations": 0, "online_iterations": 40, "inv_temperature": 0.0}
    run_of = opened(pex, tmp_path, monkeypatch, clip_actions=clip, **fields)
    monkeypatch.setattr(toy.ToyEnv, "step", watched)
    trainer = run_of._parts["trainer"]
    for _ in range(40):
        run_of._collector.step(trainer.composite)
    stored = run_of.online_buffer._actions[:40].numpy()
    assert (np.abs(stored).max() > 1) is not clip
    np.testing.assert_array_equal(np.concatenate(taken), stored.clip(-1, 1)[:, 0])


def test_the_first_update_comes_after_the_warm_up_from_halves(tmp_path, monkeypatch):
    """An update sees one row more than the warm-up has steps, as in the authors' program."""
    seen, update = [], pex.PolicyExpansion.train

    def watched(self, batch, online=False):
        seen.append((online, len(batch[0])))
        return update(self, batch, online)

    monkeypatch.setattr(pex.PolicyExpansion, "train", watched)
    fields = {"offline_iterations": 3, "online_iterations": 20, "online_warmup": 12}
    summary = run(pex, tmp_path, monkeypatch, eval_freq=23, n_episodes=1, **fields)
    assert seen == [(False, 64)] * 3 + [(True, 64)] * 8 and summary["updates"] == 11
    config = pex.TrainConfig(env=TASK)
    assert (config.mixing_ratio, config.online_warmup) == (0.5, 5000)
