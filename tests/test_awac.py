"""AWAC: updates against a float64 oracle, its policy, checkpoints, settings."""

import numpy as np
import pytest
import torch
from helpers import assert_equal
from oracle_awac import CRITICS, OracleAWAC
from test_iql import TASK, A, B, S, random_batch
from test_losses import assert_gradient, randn

from algorithms import awac
from corl import checkpoints

TARGETS = {"target_critic_1", "target_critic_2"}


def make(seed=0, max_action=1.0, **fields):
    config = awac.TrainConfig(env=TASK, buffer_size=1000, **fields)
    torch.manual_seed(seed)
    return awac.make_trainer(config, S, A, max_action, "cpu"), config


def networks(trainer):
    return {k: v for k, v in vars(trainer).items() if isinstance(v, torch.nn.Module)}


def assert_same_weights(trainer, oracle, tolerance=2e-5):
    for name, network in networks(trainer).items():
        expected = {"actor": oracle.actor, **oracle.now}.get(name)
        if expected is None:
            expected = oracle.target[name.removeprefix("target_")]
        for key, value in network.state_dict().items():
            gap = (value.double() - expected[key]).abs().max().item()
            assert gap < tolerance, f"{name}.{key} is off by {gap}"


CASES = {
    "locomotion": {"awac_lambda": 0.3333},
    "antmaze": {"awac_lambda": 0.1},
    "narrow": {"hidden_dim": 64, "discount": 0.9, "tau": 0.05, "learning_rate": 1e-3},
}


@pytest.mark.parametrize("max_action", [1.0, 0.5])
@pytest.mark.parametrize("case", CASES)
def test_twenty_updates_equal_the_float64_oracle(case, max_action):
    trainer, config = make(max_action=max_action, **CASES[case])
    oracle = OracleAWAC(trainer, config, max_action)
    rng = np.random.default_rng(1)
    for _ in range(20):
        batch = random_batch(rng)
        stream = torch.get_rng_state()
        noise = [torch.randn_like(batch[1]) for _ in range(2)]
        torch.set_rng_state(stream)
        logs = trainer.train(batch)
        losses = oracle.train(batch, noise)
        ours = [logs[k].item() for k in ("critic_loss", "actor_loss")]
        np.testing.assert_allclose(ours, losses, rtol=2e-4, atol=1e-5)
    assert_same_weights(trainer, oracle)


def test_the_losses_have_a_value_per_row_and_their_gradient():
    trainer, _ = make()
    for network in networks(trainer).values():
        network.double()
    s, a, rows = randn(6, S), randn(6, A, seed=1).tanh(), 6
    y, adv = (
        randn(6, seed=2),
        torch.linspace(-1.0, 9.0, 6).double(),
    )  # the last is clipped
    for i, critic in enumerate((trainer.critic_1, trainer.critic_2)):
        assert_gradient(critic, lambda i=i: trainer.q_losses(s, a, y)[i], rows)
        expected = (critic(s, a) - y) ** 2
        torch.testing.assert_close(trainer.q_losses(s, a, y)[i], expected)
    assert_gradient(trainer.actor, lambda: trainer.policy_losses(s, a, adv), rows)
    log_prob = torch.distributions.Normal(trainer.actor._mlp(s), 1.0).log_prob(a).sum(1)
    written = -adv.exp().clamp(max=100.0) * log_prob
    torch.testing.assert_close(trainer.policy_losses(s, a, adv), written)


def test_an_update_is_a_function_of_its_arguments_and_training_draws_them():
    batch = random_batch(np.random.default_rng(0))
    torch.manual_seed(7)
    noise = tuple(torch.randn(B, A) for _ in range(2))
    results = []
    for seed in (1, 2):
        trainer, _ = make()
        torch.manual_seed(seed)
        stream = torch.get_rng_state()
        trainer._update(batch, noise)
        assert torch.equal(stream, torch.get_rng_state())
        results.append(trainer.state_dict())
    trained, _ = make()
    torch.manual_seed(7)
    trained.train(batch)
    trained.total_it = 0
    results.append(trained.state_dict())
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])
    for swapped in ((noise[1], noise[1]), (noise[0], noise[0])):  # both are used
        other, _ = make()
        other._update(batch, swapped)
        weights = other.actor._mlp[0].weight
        assert not torch.equal(weights, results[0]["actor"]["_mlp.0.weight"])


def test_what_is_executed_is_clipped_and_what_is_scored_is_what_was_clipped():
    trainer, _ = make(max_action=0.5)
    actor = trainer.actor
    with torch.no_grad():
        actor._mlp[-1].bias.fill_(3.0)  # the mean lies outside
    state = np.zeros(S)
    actor.eval()
    np.testing.assert_array_equal(actor.act(state), np.full(A, 0.5, np.float32))
    actor.train()
    states = torch.zeros(2000, S)
    actions, log_prob = actor(states)
    assert actions.max() == 0.5 and (actions < 0.5).any() and actions.min() >= -0.5
    torch.testing.assert_close(log_prob, actor.log_prob(states, actions))
    assert log_prob.shape == (2000,)


def test_checkpoint_keys_are_corls_and_the_rest_is_kept():
    trainer, _ = make()
    rng = np.random.default_rng(0)
    for _ in range(3):
        trainer.train(random_batch(rng))
    state = trainer.state_dict()
    optimizers = {f"{name}_optimizer" for name in ("actor", *CRITICS)}
    corl = {"actor", *CRITICS}
    assert set(state) == corl | optimizers | TARGETS | {"total_it"}
    assert list(state["actor"])[:2] == ["_log_std", "_mlp.0.weight"]
    assert state["critic_1"]["_mlp.6.weight"].shape == (1, 256)
    other, _ = make(seed=1)
    other.load_state_dict(state)
    assert_equal(other.state_dict(), state)
    fresh, _ = make(seed=1)
    fresh.load_weights({k: v for k, v in state.items() if k in corl})
    for name in CRITICS:  # an upstream checkpoint: the targets begin as copies
        copied = getattr(fresh, f"target_{name}").state_dict()
        assert_equal(copied, state[name])
    assert fresh.total_it == 0 and not fresh.actor_optimizer.state


def test_corls_checkpoint_is_written_and_read(tmp_path):
    trainer, _ = make()
    trainer.train(random_batch(np.random.default_rng(0)))
    path = tmp_path / "checkpoint_0.pt"
    checkpoints.save_corl_checkpoint(path, trainer.state_dict())
    state = checkpoints.load_corl_checkpoint(path, awac.CHECKPOINT_PARTS)
    other, _ = make(seed=1)
    other.load_weights(state)
    assert_equal(other.state_dict(), trainer.state_dict())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"awac_lambda": 0.0}, r"awac_lambda must lie in \(0, inf\), not 0.0"),
        ({"hidden_dim": 0}, r"hidden_dim must lie in \[1, 1e5\], not 0"),
        ({"mixing_ratio": 1.0}, r"mixing_ratio must lie in \(0, 1\)"),
    ],
)
def test_bad_settings_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        awac.TrainConfig(**{"env": TASK, **fields})


@pytest.mark.parametrize("flag", [True, False])
def test_deterministic_torch_is_switched_as_the_field_says(flag, monkeypatch):
    found = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", found.append)
    monkeypatch.setattr(awac.finetune, "Session", lambda *args: 1 / 0)
    monkeypatch.setattr(awac.os, "environ", {})
    with pytest.raises(ZeroDivisionError):
        awac.train(awac.TrainConfig(env=TASK, deterministic_torch=flag))
    assert found == [flag]
    assert ("CUBLAS_WORKSPACE_CONFIG" in awac.os.environ) is flag
