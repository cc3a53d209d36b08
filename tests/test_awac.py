"""AWAC: updates against a float64 oracle, its policy, checkpoints, settings."""

import numpy as np
import pytest
import torch
from helpers import assert_equal, hard_release
from oracle_awac import CRITICS, OracleAWAC
from test_iql import TASK, A, B, S, random_batch
from test_losses import assert_gradient, randn

from algorithms import awac, dare_awac
from corl import checkpoints
from corl_dare.hook import Release

TARGETS = {"target_critic_1", "target_critic_2"}


def make(seed=0, max_action=1.0, module=awac, **fields):
    config = module.TrainConfig(env=TASK, buffer_size=1000, **fields)
    torch.manual_seed(seed)
    return module.make_trainer(config, S, A, max_action, "cpu"), config


def draw(batch):
    """The noise of the next update; the global stream stays where it is."""
    stream = torch.get_rng_state()
    noise = [torch.randn_like(batch[1]) for _ in range(2)]
    torch.set_rng_state(stream)
    return noise


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
        noise = draw(batch)
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
        ({"mixing_ratio": 1.0}, r"mixing_ratio must lie in \[0, 1\)"),
    ],
)
def test_bad_settings_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        awac.TrainConfig(**{"env": TASK, **fields})


@pytest.mark.parametrize("flag", [True, False])
def test_deterministic_torch_is_switched_as_the_field_says(flag, monkeypatch):
    found = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", found.append)
    monkeypatch.setattr(awac.seeds, "session", lambda *args: 1 / 0)
    monkeypatch.setattr(awac.os, "environ", {})
    with pytest.raises(ZeroDivisionError):
        awac.train(awac.TrainConfig(env=TASK, deterministic_torch=flag))
    assert found == [flag]
    assert ("CUBLAS_WORKSPACE_CONFIG" in awac.os.environ) is flag


# ---------------------------------------------------------------- DARE-AWAC


def make_dare(max_action=1.0, entropy_alpha=0.2, **fields):
    block = dare_awac.DareAWACConfig(entropy_alpha=entropy_alpha)
    return make(max_action=max_action, module=dare_awac, dare=block, **fields)


def beyond(trainer, mean=3.0):
    """The policy's mean lies beyond the upper bound in every state."""
    with torch.no_grad():
        trainer.actor._mlp[-1].bias.fill_(mean)
    return trainer


@pytest.mark.parametrize(
    "max_action, outside", [(1.0, False), (1.0, True), (0.5, False)]
)
@pytest.mark.parametrize("soft, kept", [(False, None), (False, B // 2), (True, None)])
def test_dare_updates_equal_the_float64_oracle(soft, kept, max_action, outside):
    trainer, config = make_dare(max_action, entropy_alpha=0.3, awac_lambda=0.3333)
    if outside:
        beyond(trainer, 1.5)
    oracle = OracleAWAC(trainer, config, max_action)
    # With seed 2 a ReLU of a critic has an input of 0 up to rounding, and its unit goes astray.
    rng = np.random.default_rng(3)
    weight = hard_release(B, B // 2).weight
    for _ in range(20):
        batch = random_batch(rng)
        if soft:
            weight = torch.tensor(rng.random(B), dtype=torch.float32)
        noise = draw(batch)
        logs = trainer.train(batch, Release(weight, kept))
        losses = oracle.train(batch, noise, weight, entropy_alpha=0.3)
        ours = [logs[k].item() for k in ("critic_loss", "actor_loss")]
        np.testing.assert_allclose(ours, losses, rtol=2e-4, atol=1e-5)
    assert_same_weights(trainer, oracle)


def test_weight_one_everywhere_is_awac_bit_for_bit():
    plain, released = make()[0], make_dare()[0]
    rng = np.random.default_rng(2)
    for seed in range(6):
        batch = random_batch(rng)
        for trainer, more in ((plain, ()), (released, (Release(torch.ones(B)),))):
            torch.manual_seed(seed)
            trainer.train(batch, *more)
    assert_equal(plain.state_dict(), released.state_dict())


@pytest.mark.parametrize("kept", [None, 0])
def test_weight_zero_everywhere_is_the_released_loss_alone(kept):
    """The actor's step is Adam's on that loss; the critics are AWAC's."""
    batch = random_batch(np.random.default_rng(0))
    trainer, config = make_dare()
    noise = draw(batch)
    trainer.train(batch, Release(torch.zeros(B), kept))
    alone, _ = make_dare()
    # The policy follows the critics of after their step.
    alone.critic_1.load_state_dict(trainer.critic_1.state_dict())
    alone.critic_2.load_state_dict(trainer.critic_2.state_dict())
    optimizer = torch.optim.Adam(alone.actor.parameters(), lr=config.learning_rate)
    alone.released_losses(batch[0], noise[1]).mean().backward()
    optimizer.step()
    for name, value in alone.actor.state_dict().items():
        torch.testing.assert_close(trainer.actor.state_dict()[name], value)
    plain, _ = make()
    torch.manual_seed(5)
    plain.train(batch)
    trainer, _ = make_dare()
    torch.manual_seed(5)
    trainer.train(batch, Release(torch.zeros(B), kept))
    assert_equal(plain.critic_1.state_dict(), trainer.critic_1.state_dict())


class Hill(torch.nn.Module):
    """Q = -(a - top)^2, summed over actions."""

    def __init__(self, top):
        super().__init__()
        self.top = top

    def forward(self, states, actions):
        return -((actions - self.top) ** 2).sum(1)


def test_a_policy_whose_mean_lies_beyond_the_bounds_comes_back():
    """Q sees the bound, and its slope there moves the mean; a plain clip would not."""
    trainer = beyond(make_dare(entropy_alpha=0.0)[0])
    trainer.critic_1, trainer.critic_2 = Hill(0.5), Hill(0.5)
    states, noise = torch.zeros(4, S), torch.zeros(4, A)
    losses = trainer.released_losses(states, noise)
    torch.testing.assert_close(losses, torch.full((4,), A * 0.25))  # at the bound, 1
    losses.mean().backward()
    slope = trainer.actor._mlp[-1].bias.grad
    torch.testing.assert_close(slope, torch.ones(A))  # 2 (1 - 0.5), downhill
    optimizer = torch.optim.Adam(trainer.actor.parameters(), lr=3e-3)
    for _ in range(600):
        optimizer.zero_grad()
        trainer.released_losses(
            torch.randn(64, S), 0.0 * torch.randn(64, A)
        ).mean().backward()
        optimizer.step()
    means = trainer.actor.policy(torch.randn(64, S)).mean
    assert (means - 0.5).abs().max() < 0.3


def test_the_entropy_term_of_released_rows_is_that_of_the_sample_before_the_clip():
    trainer, _ = make_dare(max_action=0.5, entropy_alpha=0.7)
    states, noise = torch.randn(6, S), 3.0 * torch.randn(6, A)
    policy = trainer.actor.policy(states)
    sample = policy.mean + noise * policy.stddev
    assert (sample.abs() > 0.5).any()
    q = torch.minimum(
        *(
            critic(states, sample.clamp(-0.5, 0.5))
            for critic in (trainer.critic_1, trainer.critic_2)
        )
    )
    expected = 0.7 * policy.log_prob(sample).sum(1) - q
    torch.testing.assert_close(trainer.released_losses(states, noise), expected)


def test_the_density_is_that_of_the_clipped_samples():
    """At a bound: the mass of the normal beyond it; inside: its density."""
    trainer, _ = make_dare(max_action=2.0)
    log_prob = dare_awac.hook_arguments(trainer)["policy_log_prob"]
    states = torch.randn(5, S)
    normal = trainer.actor.policy(states)
    inside = normal.mean + 0.3
    torch.testing.assert_close(log_prob(states, inside), normal.log_prob(inside).sum(1))
    bound = torch.full_like(inside, 2.0)
    beyond_it = (1 - normal.cdf(bound)).log().sum(1)
    found = log_prob(states, bound)
    torch.testing.assert_close(found, beyond_it, atol=1e-3, rtol=1e-3)


def test_dare_needs_two_buffers_and_a_sensible_entropy_weight():
    assert dare_awac.TrainConfig(env=TASK).mixing_ratio == 0.5
    off = dare_awac.DareAWACConfig(enabled=False)
    assert dare_awac.TrainConfig(env=TASK, dare=off).mixing_ratio is None
    with pytest.raises(ValueError, match="batch_size 255 cannot be split"):
        dare_awac.TrainConfig(env=TASK, batch_size=255)
    with pytest.raises(ValueError, match=r"dare.entropy_alpha must lie in \[0, inf\)"):
        dare_awac.DareAWACConfig(entropy_alpha=-1.0)
