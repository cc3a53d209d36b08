"""TD3+BC: updates against a float64 oracle, the cloning term, checkpoints, settings."""

import numpy as np
import pytest
import torch
from helpers import assert_equal, hard_release
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_td3_bc import NETWORKS, OracleTD3BC
from test_iql import TASK, A, B, S, random_batch
from test_losses import assert_gradient, randn

from algorithms import dare_td3_bc, td3_bc
from corl import checkpoints
from corl_dare.config import NoisyDareConfig
from corl_dare.hook import Release

pytestmark = pytest.mark.narrow(32)
CORL_KEYS = {"critic_1", "critic_1_optimizer", "critic_2", "critic_2_optimizer"}
CORL_KEYS |= {"actor", "actor_optimizer", "total_it"}


def make(seed=0, max_action=1.0, module=td3_bc, **fields):
    config = module.TrainConfig(env=TASK, **fields)
    torch.manual_seed(seed)
    return module.make_trainer(config, S, A, max_action, "cpu"), config


def draw(batch):
    """The noise of the next update; the global stream stays where it is."""
    stream = torch.get_rng_state()
    noise = torch.randn_like(batch[1])
    torch.set_rng_state(stream)
    return noise


def networks(trainer):
    targets = [f"{name}_target" for name in NETWORKS]
    return {name: getattr(trainer, name) for name in [*NETWORKS, *targets]}


def assert_same_weights(trainer, oracle, tolerance=2e-5):
    for name, network in networks(trainer).items():
        now = oracle.target if name.endswith("_target") else oracle.now
        expected = now[name.removesuffix("_target")]
        for key, value in network.state_dict().items():
            gap = (value.double() - expected[key]).abs().max().item()
            assert gap < tolerance, f"{name}.{key} is off by {gap}"


CASES = {
    "CORL's": {},
    "seldom": {"policy_freq": 3, "tau": 0.05},
    "wide noise": {"policy_noise": 0.9, "noise_clip": 0.6, "alpha": 0.5},
    "other rates": {"actor_lr": 1e-3, "qf_lr": 1e-4, "discount": 0.9},
}


@pytest.mark.parametrize("max_action", [1.0, 2.0])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bc_weight", [1.0, 0.25, 0.0])
def test_twenty_updates_equal_the_float64_oracle(case, bc_weight, max_action):
    trainer, config = make(max_action=max_action, **CASES[case])
    oracle = OracleTD3BC(trainer, config, max_action)
    trainer.bc_weight = bc_weight
    rng = np.random.default_rng(1)
    for _ in range(20):
        batch = random_batch(rng)
        noise = draw(batch)
        logs = trainer.train(batch)
        critic_loss, actor_loss = oracle.train(batch, noise, bc_weight)
        assert logs["critic_loss"].item() == pytest.approx(critic_loss, rel=2e-4)
        assert logs["bc_weight"].item() == bc_weight
        assert ("actor_loss" in logs) is (actor_loss is not None)
        if actor_loss is not None:
            found = logs["actor_loss"].item()
            assert found == pytest.approx(actor_loss, rel=2e-4, abs=1e-5)
    assert_same_weights(trainer, oracle)


def test_the_losses_have_a_value_per_row_and_their_gradient():
    trainer, _ = make()
    for network in networks(trainer).values():
        network.double()
    rows = 6
    s, a, s2 = randn(rows, S), randn(rows, A, seed=1).tanh(), randn(rows, S, seed=2)
    r, d = randn(rows, 1, seed=3), (randn(rows, 1, seed=4) > 0.5).double()
    y = trainer.td_target(s2, r, d, randn(rows, A, seed=5))
    for i, critic in enumerate((trainer.critic_1, trainer.critic_2)):
        assert_gradient(critic, lambda i=i: trainer.q_losses(s, a, y)[i], rows)
        torch.testing.assert_close(trainer.q_losses(s, a, y)[i], (critic(s, a) - y) ** 2)
    for i in (0, 1):
        assert_gradient(trainer.actor, lambda i=i: trainer.policy_losses(s, a)[i], rows)
    q_losses, bc_losses = trainer.policy_losses(s, a)
    policy = trainer.actor(s)
    torch.testing.assert_close(q_losses, -trainer.critic_1(s, policy))
    torch.testing.assert_close(bc_losses, (policy - a).square().mean(1))


def test_an_update_is_a_function_of_its_arguments_and_training_draws_them():
    batch = random_batch(np.random.default_rng(0))
    one, two, three = (make()[0] for _ in range(3))
    noise, weight = torch.randn(B, A), torch.tensor(0.5)
    for trainer, seed in ((one, 1), (two, 2)):
        torch.manual_seed(seed)
        stream = torch.get_rng_state()
        trainer._update(batch, noise, weight, True)
        assert torch.equal(stream, torch.get_rng_state())
    torch.manual_seed(3)
    drawn = draw(batch)
    one.total_it = three.total_it = 1  # the policy learns in the next one
    one.bc_weight = three.bc_weight = 0.5
    assert_equal(one.critic_1.state_dict(), two.critic_1.state_dict())
    assert_equal(one.actor.state_dict(), two.actor.state_dict())
    three.train(batch)
    two = make()[0]
    two._update(batch, drawn, weight, True)
    for name, network in networks(three).items():
        assert_equal(network.state_dict(), networks(two)[name].state_dict(), name)
    other = make()[0]
    other._update(batch, -drawn, weight, True)
    assert not torch.equal(other.critic_1.net[0].weight, two.critic_1.net[0].weight)


def test_dropping_the_cloning_term_keeps_the_normalizer():
    """The policy climbs alpha Q1 / mean |Q1|, so the scale of Q1 is nothing to it."""
    batch = random_batch(np.random.default_rng(0))
    steps = []
    for scale in (1.0, 8.0):
        trainer, _ = make(qf_lr=1e-30)
        with torch.no_grad():
            for parameter in trainer.critic_1.net[4].parameters():
                parameter.mul_(scale)
        trainer.bc_weight, trainer.total_it = 0.0, 1
        trainer.train(batch)
        steps.append(trainer.actor_optimizer.state_dict()["state"])
    for key, value in steps[0].items():  # Adam's means: the gradients
        torch.testing.assert_close(value["exp_avg"], steps[1][key]["exp_avg"])


@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 10**6))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_weight_falls_on_a_line_to_its_end(steps, end, length):
    config = td3_bc.TrainConfig(
        env=TASK, bc_online="anneal", bc_end=end, bc_anneal_steps=length
    )
    weight = config.bc_weight(steps)
    assert end <= weight <= 1.0
    assert weight == pytest.approx(max(end, (length - steps) / length), abs=1e-12)
    assert config.bc_weight(steps + 1) <= weight
    assert config.bc_weight(0) == 1.0
    assert td3_bc.TrainConfig(env=TASK, bc_end=end).bc_weight(steps) == 1.0
    assert td3_bc.TrainConfig(env=TASK, bc_online="drop").bc_weight(steps) == 0.0


@pytest.mark.narrow(256)
def test_checkpoint_keys_are_corls_and_the_targets_are_kept():
    trainer, _ = make()
    rng = np.random.default_rng(0)
    for _ in range(3):
        trainer.train(random_batch(rng))
    state = trainer.state_dict()
    targets = {f"{name}_target" for name in NETWORKS}
    assert set(state) == CORL_KEYS | targets
    assert list(state["actor"])[:2] == ["net.0.weight", "net.0.bias"]
    assert state["critic_1"]["net.4.weight"].shape == (1, 256)
    other, _ = make(seed=1)
    other.load_state_dict(state)
    assert_equal(other.state_dict(), state)
    other.load_weights({k: v for k, v in state.items() if k in CORL_KEYS})
    for name in NETWORKS:  # an upstream checkpoint: the targets restart as copies
        copied = getattr(other, f"{name}_target").state_dict()
        assert_equal(copied, getattr(other, name).state_dict())
    assert not any(p.requires_grad for p in other.actor_target.parameters())


def test_corls_checkpoint_is_written_and_read(tmp_path):
    trainer, _ = make()
    trainer.train(random_batch(np.random.default_rng(0)))
    path = tmp_path / "checkpoint_0.pt"
    checkpoints.save_corl_checkpoint(path, trainer.state_dict())
    assert set(torch.load(path, weights_only=True)) >= CORL_KEYS
    state = checkpoints.load_corl_checkpoint(path, td3_bc.CHECKPOINT_PARTS)
    other, _ = make(seed=1)
    other.load_weights(state)
    assert_equal(other.state_dict(), trainer.state_dict())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bc_online": "fade"}, "bc_online 'fade' is not one of keep, drop, anneal"),
        ({"bc_end": 1.5}, r"bc_end must lie in \[0, 1\], not 1.5"),
        ({"bc_anneal_steps": 0}, r"bc_anneal_steps must lie in \[1, 1e9\], not 0"),
        ({"policy_freq": 0}, r"policy_freq must lie in \[1, 1e9\], not 0"),
        ({"mixing_ratio": 1.0}, r"mixing_ratio must lie in \[0, 1\)"),
        ({"mixing_ratio": 0.5, "batch_size": 255}, "batch_size 255 cannot be split"),
    ],
)
def test_bad_settings_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        td3_bc.TrainConfig(**{"env": TASK, **fields})


# ---------------------------------------------------------------- DARE-TD3+BC


@pytest.mark.parametrize("soft, kept", [(False, None), (False, B // 2), (True, None)])
def test_dare_updates_equal_the_float64_oracle(soft, kept):
    """The weight multiplies the distance of its row; the scale of Q has none."""
    trainer, config = make(module=dare_td3_bc)
    oracle = OracleTD3BC(trainer, config)
    rng = np.random.default_rng(2)
    weight = hard_release(B, B // 2).weight
    for _ in range(20):
        batch = random_batch(rng)
        if soft:
            weight = torch.tensor(rng.random(B), dtype=torch.float32)
        noise = draw(batch)
        trainer.train(batch, Release(weight, kept))
        oracle.train(batch, noise, 1.0, weight)
    assert_same_weights(trainer, oracle)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_same_weight_everywhere_is_the_baseline_with_its_own_switch(weight):
    plain, _ = make()
    released, _ = make(module=dare_td3_bc)
    plain.bc_weight = weight
    rng = np.random.default_rng(2)
    for seed in range(6):
        batch = random_batch(rng)
        for trainer, more in (
            (plain, ()),
            (released, (Release(torch.full((B,), weight)),)),
        ):
            torch.manual_seed(seed)
            trainer.train(batch, *more)
    for name, network in networks(plain).items():
        assert_equal(network.state_dict(), networks(released)[name].state_dict(), name)


@pytest.mark.parametrize("policy_std, expected", [(None, 0.2), (0.05, 0.1)])
def test_the_density_is_that_of_the_clipped_noise(policy_std, expected):
    """At a bound: the mass of a normal beyond it; inside: its density."""
    block = NoisyDareConfig(policy_std=policy_std)
    trainer, _ = make(module=dare_td3_bc, max_action=2.0, expl_noise=0.1, dare=block)
    log_prob = dare_td3_bc.hook_arguments(trainer)["policy_log_prob"]
    states = torch.randn(5, S)
    mean = trainer.actor(states)
    normal = torch.distributions.Normal(mean, expected)
    inside = normal.log_prob(mean + 0.03).sum(1)
    torch.testing.assert_close(log_prob(states, mean + 0.03), inside)
    beyond = (1 - normal.cdf(torch.tensor(2.0))).log().sum(1)
    if expected == 0.2:  # with the other std the mass is below float32's
        found = log_prob(states, torch.full_like(mean, 2.0))
        assert (found < 0).all() and ((found - beyond).abs() < 1e-2)[beyond > -20].all()


@pytest.mark.parametrize(
    "fields, dare, message",
    [
        ({"bc_online": "anneal"}, {}, "bc_online anneal and dare would both release"),
        ({"bc_online": "drop"}, {}, "bc_online drop and dare would both release"),
        ({"expl_noise": 0.0}, {}, "acts without noise; set dare.policy_std"),
        ({}, {"policy_std": 0.0}, r"dare.policy_std must lie in \(0, inf\), not 0.0"),
        ({"batch_size": 255}, {}, "batch_size 255 cannot be split"),
    ],
)
def test_what_dare_cannot_have_is_refused(fields, dare, message):
    ratio = {"score": "policy_ratio", "behavior": "mixture", "guidance_scale": 0.0}
    with pytest.raises(ValueError, match=message):
        block = NoisyDareConfig(**{**ratio, **dare})
        dare_td3_bc.TrainConfig(env=TASK, dare=block, **fields)
    off = NoisyDareConfig(**ratio, enabled=False)
    known = {k: v for k, v in fields.items() if k != "batch_size"}
    made = dare_td3_bc.TrainConfig(env=TASK, dare=off, **known)
    assert made.mixing_ratio is None
