"""IQL and DARE-IQL: one update against a float64 oracle, buffers, schedule, evaluation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_iql import OracleIQL
from short_runs import dare_block, opened_parts

from algorithms import dare_iql, iql
from corl import checkpoints
from corl_dare.hook import Release

pytestmark = pytest.mark.narrow(32)
S, A, B = 11, 3, 64
TASK = "hopper-medium-v2"


def random_batch(rng):
    tensor = lambda x: torch.tensor(x, dtype=torch.float32)  # noqa: E731
    return [
        tensor(rng.normal(size=(B, S))),
        tensor(rng.uniform(-1, 1, (B, A))),
        tensor(rng.normal(size=(B, 1))),
        tensor(rng.normal(size=(B, S))),
        tensor(rng.random((B, 1)) < 0.2),
    ]


def make_pair(module, deterministic=False, **fields):
    torch.manual_seed(0)
    config = module.TrainConfig(
        env=TASK, iql_deterministic=deterministic, offline_iterations=50, **fields
    )
    trainer = module.make_trainer(config, S, A, 1.0, "cpu")
    oracle = OracleIQL(
        trainer,
        beta=config.beta,
        iql_tau=config.iql_tau,
        discount=config.discount,
        tau=config.tau,
        lr=config.actor_lr,
        max_steps=config.offline_iterations,
        deterministic=deterministic,
    )
    return trainer, oracle


def assert_same_weights(trainer, oracle, tolerance=2e-5):
    """Float32 rounding of 20 Adam steps of 3e-4: far below one step."""
    pairs = [
        (trainer.qf, oracle.q),
        (trainer.q_target, oracle.q_target),
        (trainer.vf, oracle.v),
        (trainer.actor, oracle.actor),
    ]
    for module, expected in pairs:
        for name, value in module.state_dict().items():
            gap = (value.double() - expected[name]).abs().max().item()
            assert gap < tolerance, f"{type(module).__name__}.{name} is off by {gap}"


@pytest.mark.parametrize("module", [iql, dare_iql])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("beta, expectile", [(3.0, 0.7), (10.0, 0.9)])
def test_twenty_updates_equal_the_float64_oracle(module, deterministic, beta, expectile):
    trainer, oracle = make_pair(module, deterministic, beta=beta, iql_tau=expectile)
    rng = np.random.default_rng(1)
    for _ in range(20):
        batch = random_batch(rng)
        logs = trainer.train(batch)
        losses = oracle.train(batch)
        ours = [logs[k].item() for k in ("value_loss", "q_loss", "actor_loss")]
        np.testing.assert_allclose(ours, losses, rtol=2e-4, atol=1e-5)
    assert_same_weights(trainer, oracle)


@pytest.mark.parametrize(
    "value, policy",
    [("all", "sac"), ("offline", "sac"), ("iv", "sac"), ("iv", "awr"), ("all", "awr")],
)
@pytest.mark.parametrize("soft, first", [(False, None), (False, B // 2), (True, None)])
def test_dare_updates_equal_the_float64_oracle(value, policy, soft, first):
    """Eq. 15, 16 and 35 with the same draws; also when the rows of weight 1 are left out."""
    dare = {"value": value, "policy": policy, "entropy_alpha": 0.2, "backup_actions": 4}
    block = dare_iql.DareIQLConfig(**dare)
    trainer, oracle = make_pair(dare_iql, dare=block)
    # With seed 1 a row meets a kink of the policy loss that float32 rounds to the other side.
    rng = np.random.default_rng(2)
    weight = torch.cat([torch.ones(B // 2), torch.zeros(B // 2)])
    for _ in range(20):
        batch = random_batch(rng)
        if soft:
            weight = torch.tensor(rng.random(B), dtype=torch.float32)
        stream = trainer.dare_generator.get_state()
        noise, *backup_noise = torch.randn(5, B, A, generator=trainer.dare_generator)
        backup_noise = torch.stack(backup_noise)
        trainer.dare_generator.set_state(stream)
        trainer.train(batch, Release(weight, first))
        draws = {"noise": noise, "backup_noise": backup_noise}
        oracle.train(batch, weight, {**dare, **draws})
    assert_same_weights(trainer, oracle)


def test_weight_one_everywhere_is_plain_iql():
    plain, _ = make_pair(iql)
    ones, _ = make_pair(dare_iql)
    rng = np.random.default_rng(2)
    for _ in range(5):
        batch = random_batch(rng)
        plain.train(batch)
        ones.train(batch, Release(torch.ones(B)))
    for a, b in zip(plain.actor.parameters(), ones.actor.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(plain.qf.parameters(), ones.qf.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("module", [iql, dare_iql])
def test_an_update_changes_every_trainable_and_no_frozen_weight(module):
    trainer, _ = make_pair(module)
    before = {
        name: [p.clone() for p in getattr(trainer, name).parameters()]
        for name in ("qf", "vf", "actor", "q_target")
    }
    trainer.train(random_batch(np.random.default_rng(0)))
    for name, old in before.items():
        for p, q in zip(getattr(trainer, name).parameters(), old, strict=True):
            assert not torch.equal(p, q)
    assert not any(p.requires_grad for p in trainer.q_target.parameters())


def test_checkpoint_keys_are_corls_and_the_target_is_kept():
    trainer, _ = make_pair(iql)
    upstream = {
        "qf",
        "q_optimizer",
        "vf",
        "v_optimizer",
        "actor",
        "actor_optimizer",
        "actor_lr_schedule",
        "total_it",
    }
    rng = np.random.default_rng(0)
    trainer.train(random_batch(rng))
    state = trainer.state_dict()
    assert set(state) == upstream | {"q_target", "anneal"}
    names = {"q1.net.0.weight", "q2.net.4.bias"}
    assert names <= set(state["qf"]) and "v.net.2.weight" in state["vf"]
    assert list(state["actor"])[0] == "log_std" and "net.net.0.weight" in state["actor"]
    other, _ = make_pair(iql)
    other.load_state_dict(state)
    for p, q in zip(
        other.q_target.parameters(), trainer.q_target.parameters(), strict=True
    ):
        assert torch.equal(p, q)
    other.load_weights({k: v for k, v in state.items() if k in upstream})
    for p, q in zip(other.q_target.parameters(), other.qf.parameters(), strict=True):
        assert torch.equal(p, q)  # an upstream checkpoint: the target restarts as a copy


def test_dropout_shifts_the_keys_as_upstream():
    config = iql.TrainConfig(env=TASK, actor_dropout=0.1)
    keys = iql.make_trainer(config, S, A, 1.0, "cpu").actor.state_dict()
    assert [k for k in keys if k.endswith("weight")] == [
        f"net.net.{i}.weight" for i in (0, 3, 6)
    ]


@pytest.mark.parametrize("compat, online", [(False, None), (False, 1e-4), (True, None)])
def test_actor_learning_rate_online(compat, online):
    """Corrected: constant online. Upstream: restarts at zero and climbs."""
    trainer, _ = make_pair(iql)
    rng = np.random.default_rng(0)
    rates = []
    for t in range(60):
        if t == 50 and not compat:
            trainer.start_online(online)
        rates.append(trainer.actor_optimizer.param_groups[0]["lr"])
        trainer.train(random_batch(rng))
    expected = [0.5 * 3e-4 * (1 + np.cos(np.pi * j / 50)) for j in range(60)]
    np.testing.assert_allclose(rates[:50], expected[:50], rtol=1e-6, atol=1e-12)
    tail = expected[50:] if compat else [online or 3e-4] * 10
    np.testing.assert_allclose(rates[50:], tail, rtol=1e-6, atol=1e-12)


def test_what_the_switch_changed_comes_back_with_the_whole_state():
    trainer, _ = make_pair(iql)
    trainer.start_online(1e-4)
    resumed, _ = make_pair(iql)
    resumed.load_state_dict(trainer.state_dict())
    rng = np.random.default_rng(0)
    for _ in range(3):
        resumed.train(random_batch(rng))
    assert resumed.actor_optimizer.param_groups[0]["lr"] == 1e-4
    assert resumed.anneal is False


def data_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(rows, S)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, A)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "next_observations": rng.normal(size=(rows, S)).astype(np.float32),
        "terminals": rng.random(rows) < 0.1,
    }


def test_a_dataset_that_fills_the_buffer_can_be_fine_tuned():
    transition = (np.ones(S), np.ones(A), 1.0, np.ones(S), True)
    buffer = iql.ReplayBuffer(S, A, 10)
    buffer.load_d4rl_dataset(data_of(10))
    buffer.add_transition(*transition)
    assert torch.equal(buffer._states[0], torch.ones(S)) and buffer._size == 10
    upstream = iql.ReplayBuffer(S, A, 10, compat=True)
    upstream.load_d4rl_dataset(data_of(10))
    with pytest.raises(IndexError):
        upstream.add_transition(*transition)


def test_buffer_refuses_a_larger_dataset_and_a_second_one():
    buffer = iql.ReplayBuffer(S, A, 5)
    with pytest.raises(ValueError, match="set buffer_size to at least 6"):
        buffer.load_d4rl_dataset(data_of(6))
    buffer.load_d4rl_dataset(data_of(5))
    with pytest.raises(ValueError, match="empty buffer"):
        buffer.load_d4rl_dataset(data_of(1))


@given(st.integers(0, 6), st.integers(0, 15))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_buffer_state_restores_every_row(loaded, added):
    def fill():
        buffer = iql.ReplayBuffer(S, A, 8)
        if loaded:
            buffer.load_d4rl_dataset(data_of(loaded))
        return buffer

    buffer = fill()
    for i in range(added):
        buffer.add_transition(np.full(S, i), np.full(A, i), i, np.full(S, -i), i % 2)
    copy = fill()
    copy.load_state_dict(buffer.state_dict())
    assert (copy._size, copy._pointer) == (buffer._size, buffer._pointer)
    for x, y in zip(copy._storage(), buffer._storage(), strict=True):
        assert torch.equal(x, y)


def test_mixed_batches_are_offline_rows_first():
    offline, online = iql.ReplayBuffer(S, A, 20), iql.ReplayBuffer(S, A, 20)
    offline.load_d4rl_dataset(data_of(20))
    online.add_transition(np.zeros(S), np.zeros(A), 99.0, np.zeros(S), False)
    batch = iql.MixedBuffer(offline, online, 0.25).sample(16)
    assert (batch[2][4:] == 99.0).all() and not (batch[2][:4] == 99.0).any()


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 5),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_return_range_against_a_plain_walk(rows, limit):
    dataset = {
        "rewards": np.array([r for r, _ in rows], np.float32),
        "terminals": np.array([d for _, d in rows]),
    }
    returns, episode = [], []
    for reward, done in rows:
        episode.append(reward)
        if done or len(episode) == limit:
            returns.append(sum(episode))
            episode = []
    if returns:
        assert iql.return_reward_range(dataset, limit) == (min(returns), max(returns))
    else:
        with pytest.raises(ValueError, match="no finished episode"):
            iql.return_reward_range(dataset, limit)


def test_reward_transforms_offline_and_online_agree():
    dataset = {
        "rewards": np.array([1, 2, 3, 10], np.float32),
        "terminals": np.array([False, True, False, True]),
    }
    args = iql.modify_reward(dataset, TASK)
    np.testing.assert_allclose(dataset["rewards"], np.array([1, 2, 3, 10]) * 100.0)
    assert iql.modify_reward_online(2.0, TASK, **args) == pytest.approx(200.0)
    sparse = {"rewards": np.array([0, 1], np.float32), "terminals": np.array([0, 1])}
    iql.modify_reward(sparse, "antmaze-umaze-v2")
    assert sparse["rewards"].tolist() == [-1.0, 0.0]
    assert iql.modify_reward_online(1.0, "antmaze-umaze-v2") == 0.0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"env": "hoper-medium-v2"}, "unknown task 'hoper-medium-v2'"),
        ({"mixing_ratio": 1.0}, r"mixing_ratio must lie in \[0, 1\)"),
        ({"mixing_ratio": 0.5, "batch_size": 255}, "batch_size 255 cannot be split"),
        ({"batch_size": 0}, r"batch_size must lie in \[1, 1e10\], not 0"),
        ({"online_iterations": -1}, "online_iterations must lie in .0, 1e9., not -1"),
        ({"iql_tau": 1.0}, "iql_tau must lie"),
    ],
)
@pytest.mark.parametrize("module", [iql, dare_iql])
def test_bad_settings_name_the_field(module, fields, message):
    with pytest.raises(ValueError, match=message):
        module.TrainConfig(**{"env": TASK, **fields})


def test_dare_splits_the_batch_in_halves_by_default():
    assert dare_iql.TrainConfig(env=TASK).mixing_ratio == 0.5
    off = dare_iql.TrainConfig(env=TASK, dare=dare_iql.DareIQLConfig(enabled=False))
    assert off.mixing_ratio is None  # the baseline's default
    with pytest.raises(ValueError, match="batch_size 255 cannot be split"):
        dare_iql.TrainConfig(env=TASK, batch_size=255)


def test_the_policy_ratio_of_dare_iql_knows_that_its_policy_is_clipped(
    tmp_path, monkeypatch
):
    """A policy at the bound acts there half of the time; data that never does is far from it."""
    block = dare_block("policy_ratio", behavior="gaussian", behavior_updates=1)
    parts = opened_parts(dare_iql, tmp_path, monkeypatch, dare=block)
    trainer, found = parts["trainer"], parts["hook"]
    trainer.actor.forward = lambda s: torch.distributions.Normal(
        torch.ones(len(s), 1), 0.1
    )
    states, at_bound = torch.zeros(1, 2), torch.ones(1, 1)
    assert found.policy_log_prob(states, at_bound).exp().item() == pytest.approx(0.5)
    (score,), _ = found.score(states, at_bound, [None, None])
    log_nu = found.behavior.log_prob(found.unnormalize(states), at_bound, 1.0)
    assert score.item() == pytest.approx(math.log(0.5) - log_nu.item(), rel=1e-5)


def test_a_loaded_model_brings_no_random_stream(tmp_path):
    config = dare_iql.TrainConfig(env=TASK, seed=3)
    saved = dare_iql.make_trainer(config, S, A, 1.0, "cpu")
    state = saved.state_dict()
    state["dare_generator"] = torch.zeros(16, dtype=torch.uint8)  # as of another device
    torch.save(state, tmp_path / "checkpoint_9.pt")
    trainer = dare_iql.make_trainer(config, S, A, 1.0, "cpu")
    stream = trainer.dare_generator.get_state()
    parts = dare_iql.CHECKPOINT_PARTS
    trainer.load_weights(
        checkpoints.load_corl_checkpoint(tmp_path / "checkpoint_9.pt", parts)
    )
    assert torch.equal(trainer.dare_generator.get_state(), stream)
    loaded = trainer.vf.state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in saved.vf.state_dict().items())
