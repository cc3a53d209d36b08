"""SPOT: updates against a float64 oracle, dropout, the VAE before the run, settings, DARE-SPOT."""

import copy
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_equal, hard_release
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_spot import NETWORKS, OracleSPOT
from short_runs import checkpoint_of, folder_of, noisy_block, run
from test_iql import TASK, A, B, S, random_batch
from test_losses import assert_gradient, randn
from test_rollback import assert_same_run, without_estimate

from algorithms import dare_spot, spot
from corl import checkpoints, finetune, runs
from corl_dare.config import NoisyDareConfig
from corl_dare.hook import Release

pytestmark = pytest.mark.narrow(32)
CORL_KEYS = {"vae", "vae_optimizer", "total_it"}
CORL_KEYS |= {name for part in NETWORKS for name in (part, f"{part}_optimizer")}
NARROW = {"vae_hidden_dim": 24, "vae_latent_dim": 3}


def make(seed=0, max_action=1.0, module=spot, **fields):
    config = module.TrainConfig(env=TASK, **{**NARROW, **fields})
    torch.manual_seed(seed)
    return module.make_trainer(config, S, A, max_action, "cpu"), config


def in_float64(trainer):
    """Adam's first steps are as large for a gradient that is all rounding as for any other."""
    for network in networks(trainer).values():
        network.double()
    return trainer


def double_batch(rng):
    return [field.double() for field in random_batch(rng)]


def draw(trainer, batch, policy=True):
    """The noise of the next update; the global stream stays where it is."""
    stream = torch.get_rng_state()
    noise = trainer._noise(batch[1], policy)
    torch.set_rng_state(stream)
    return noise


def learns_next(trainer):
    return (trainer.total_it + 1) % trainer.policy_freq == 0


def networks(trainer):
    targets = [f"{name}_target" for name in NETWORKS]
    return {name: getattr(trainer, name) for name in ["vae", *NETWORKS, *targets]}


def assert_same_weights(trainer, oracle, tolerance=1e-9):
    for name, network in networks(trainer).items():
        now = oracle.target if name.endswith("_target") else oracle.now
        known = {"vae": oracle.vae, **now}
        expected = known[name.removesuffix("_target")]
        for key, value in network.state_dict().items():
            gap = (value.double() - expected[key]).abs().max().item()
            assert gap < tolerance, f"{name}.{key} is off by {gap}"


# ---------------------------------------------------------------- updates

CASES = {
    "CORL's": {},
    "seldom": {"policy_freq": 3, "tau": 0.05, "online_discount": 0.7},
    "wide noise": {"policy_noise": 0.9, "noise_clip": 0.6, "beta": 2.0},
    "several samples": {"num_samples": 3, "actor_lr": 1e-3},
    "importance weighted": {"num_samples": 3, "iwae": True, "lambd": 0.1},
    "small heads": {"actor_init_w": 0.1, "critic_init_w": 0.3, "vae_latent_dim": None},
}


@pytest.mark.parametrize("max_action", [1.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_updates_of_all_phases_equal_the_float64_oracle(case, max_action):
    trainer, config = make(max_action=max_action, **CASES[case])
    oracle = OracleSPOT(in_float64(trainer), config, max_action)
    rng = np.random.default_rng(1)
    for _ in range(6):
        batch = double_batch(rng)
        stream = torch.get_rng_state()
        noise = torch.randn(B, trainer.vae.latent_dim)
        torch.set_rng_state(stream)
        loss = trainer.vae_train(batch)["vae_loss"].item()
        assert loss == pytest.approx(oracle.vae_train(batch, noise), rel=1e-9)
    for step in range(20):
        if step == 12:
            trainer.start_online(config.online_discount)
            oracle.start_online()
        trainer.lambd = config.lambd * (0.5 if step >= 12 else 1.0)
        batch, policy = double_batch(rng), learns_next(trainer)
        noise, latent_noise = draw(trainer, batch, policy)
        assert (latent_noise is not None) is policy
        logs = trainer.train(batch)
        found = oracle.train(batch, noise, latent_noise, trainer.lambd)
        assert logs["critic_loss"].item() == pytest.approx(found[0], rel=1e-9)
        assert logs["lambd"].item() == pytest.approx(trainer.lambd)
        assert ("actor_loss" in logs) is policy is (found[1] is not None)
        if policy:
            assert logs["actor_loss"].item() == pytest.approx(found[1], rel=1e-9)
    assert_same_weights(trainer, oracle)


def test_the_losses_have_a_value_per_row_and_their_gradient():
    trainer, config = make(num_samples=2)
    in_float64(trainer)
    rows = 6
    s, a, noise = (
        randn(rows, S),
        randn(rows, A, seed=1).tanh(),
        randn(rows, 2, 3, seed=2),
    )
    oracle = OracleSPOT(trainer, config)
    found = trainer.vae_losses(s, a, noise)
    for ours, expected in zip(
        found, oracle.elbo_terms(oracle.vae, s, a, noise), strict=True
    ):
        torch.testing.assert_close(ours, expected)
    for i in (0, 1):
        assert_gradient(
            trainer.vae, lambda i=i: trainer.vae_losses(s, a, noise)[i], rows
        )
        assert_gradient(
            trainer.actor, lambda i=i: trainer.policy_losses(s, noise)[i], rows
        )
    trainer.iwae = True
    bound = oracle.importance_bound(oracle.vae, s, a, noise)
    torch.testing.assert_close(trainer.support_losses(s, a, noise), -bound)
    q_losses, support_losses = trainer.policy_losses(s, noise)
    policy = trainer.actor(s)
    torch.testing.assert_close(q_losses, -trainer.critic_1(s, policy))
    torch.testing.assert_close(support_losses, trainer.support_losses(s, policy, noise))


def test_the_bound_of_many_samples_is_tighter():
    trainer, _ = make(iwae=True)
    torch.manual_seed(0)
    s, a = torch.randn(64, S), torch.rand(64, A)
    means = [
        trainer.support_losses(s, a, torch.randn(64, n, 3)).mean() for n in (1, 300)
    ]
    assert means[1] < means[0]


def test_an_update_is_a_function_of_its_arguments_and_training_draws_them():
    batch = random_batch(np.random.default_rng(0))
    trainers = [make()[0] for _ in range(3)]
    torch.manual_seed(3)
    drawn = draw(trainers[0], batch)
    numbers = torch.tensor(trainers[0].lambd), torch.tensor(trainers[0].discount)
    stream = torch.get_rng_state()
    trainers[0]._update(batch, *drawn, *numbers)
    assert torch.equal(stream, torch.get_rng_state())
    trainers[1].total_it = 1  # the policy learns in the next one
    trainers[1].train(batch)
    for name, network in networks(trainers[1]).items():
        assert_equal(
            network.state_dict(), networks(trainers[0])[name].state_dict(), name
        )
    trainers[2]._update(batch, drawn[0], -drawn[1], *numbers)
    weights = [t.actor.net[0].weight for t in trainers]
    assert not torch.equal(weights[0], weights[2])


def test_the_vae_stays_as_it_is_after_its_phase():
    trainer, _ = make()
    before = copy.deepcopy(trainer.vae.state_dict())
    rng = np.random.default_rng(0)
    for _ in range(4):
        trainer.train(random_batch(rng))
    assert_equal(trainer.vae.state_dict(), before)
    assert all(p.grad is None for p in trainer.vae.parameters())


def test_at_the_switch_adam_begins_anew_and_the_vaes_goes_on():
    trainer, _ = make()
    rng = np.random.default_rng(0)
    trainer.vae_train(random_batch(rng))
    for _ in range(4):
        trainer.train(random_batch(rng))
    vae = copy.deepcopy(trainer.vae_optimizer.state_dict())
    trainer.start_online(0.7)
    assert trainer.discount == 0.7
    for optimizer in trainer.optimizers():
        for state in optimizer.state_dict()["state"].values():
            assert not any(value.any() for value in state.values())
    assert_equal(trainer.vae_optimizer.state_dict(), vae)


# ---------------------------------------------------------------- dropout, as in thuml/SPOT


def test_dropout_lies_between_a_hidden_layer_and_its_relu():
    """Means over many masks: of pre-activations scaled by 1 / (1 - p) or zero."""
    actor = spot.Actor(S, A, 1.0, dropout=0.5)
    state = torch.randn(1, S)
    torch.manual_seed(0)
    found = actor(state)
    torch.manual_seed(0)
    hidden = state
    for number in (0, 2):
        hidden = actor.net[number](hidden)
        mask = torch.nn.functional.dropout(torch.ones_like(hidden), 0.5)
        hidden = (hidden * mask).relu()
    torch.testing.assert_close(found, actor.net[4](hidden).tanh())


def test_dropout_is_in_learning_and_not_in_what_is_executed():
    trainer, _ = make(actor_dropout=0.3)
    batch = random_batch(np.random.default_rng(0))
    states = batch[0]
    for actor in (trainer.actor, trainer.actor_target):
        assert actor.training
        assert not torch.equal(actor(states), actor(states))
        torch.testing.assert_close(actor.executed(states), actor.executed(states))
    state = states[0].numpy()
    acted = [trainer.actor.act(state) for _ in range(3)]
    trainer.actor.eval()
    assert all((a == trainer.actor.act(state)).all() for a in acted)
    torch.testing.assert_close(trainer.actor(states), trainer.actor.executed(states))
    trainer.actor.train()
    seen = []
    critic, support = trainer.critic_1, trainer.support_losses
    critic.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    trainer.support_losses = lambda s, a, noise: seen.append(a) or support(s, a, noise)
    trainer.policy_losses(states, torch.randn(B, 1, 3))
    # One and the same action goes into Q and into the ELBO.
    assert seen[0] is seen[1]
    assert not torch.equal(seen[0], trainer.actor.executed(states))


def test_the_keys_of_an_actor_with_dropout_are_corls():
    plain, dropped = spot.Actor(S, A, 1.0), spot.Actor(S, A, 1.0, dropout=0.1)
    assert list(plain.state_dict()) == list(dropped.state_dict())
    assert list(plain.state_dict())[-1] == "net.4.bias"


@pytest.mark.parametrize("bound", [None, 0.003])
def test_heads_begin_small_where_they_are_asked_to(bound):
    trainer, _ = make(actor_init_w=bound, critic_init_w=bound)
    for network in (trainer.actor, trainer.critic_1, trainer.critic_2):
        head = network.net[4]
        largest = max(head.weight.abs().max().item(), head.bias.abs().max().item())
        assert (largest <= 0.003 + 1e-9) is (bound is not None)
        assert network.net[0].weight.abs().max() > 0.01


# ---------------------------------------------------------------- checkpoints, settings


def test_checkpoint_keys_are_corls_and_the_targets_are_kept(tmp_path):
    trainer, _ = make()
    rng = np.random.default_rng(0)
    trainer.vae_train(random_batch(rng))
    for _ in range(3):
        trainer.train(random_batch(rng))
    trainer.start_online(0.7)
    state = trainer.state_dict()
    targets = {f"{name}_target" for name in NETWORKS}
    assert set(state) == CORL_KEYS | targets | {"discount"}
    assert state["total_it"] == 4
    other, _ = make(seed=1)
    other.load_state_dict(state)
    assert_equal(other.state_dict(), state)
    path = tmp_path / "checkpoint_0.pt"
    known = {k: v for k, v in state.items() if k in CORL_KEYS}
    checkpoints.save_corl_checkpoint(path, known)
    fresh, config = make(seed=2)
    fresh.load_weights(checkpoints.load_corl_checkpoint(path, spot.CHECKPOINT_PARTS))
    for name in NETWORKS:  # an upstream checkpoint: the targets begin as copies
        copied = getattr(fresh, f"{name}_target").state_dict()
        assert_equal(copied, state[name])
    # A new run begins offline, whatever phase its weights are from.
    assert fresh.discount == config.discount and fresh.total_it == 4
    assert not any(p.requires_grad for p in fresh.actor_target.parameters())


@given(st.integers(0, 10**6), st.floats(0, 1), st.integers(1, 10**6))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_lambda_falls_on_a_line_to_its_share(steps, end, length):
    fields = {"env": TASK, "lambd": 0.5, "lambd_end": end}
    config = spot.TrainConfig(lambd_cool_steps=length, **fields)
    found = config.lambd_after(steps)
    assert found == pytest.approx(0.5 * max(end, (length - steps) / length), abs=1e-12)
    by_run = spot.TrainConfig(online_iterations=length, **fields)
    assert by_run.lambd_after(steps) == found
    off = spot.TrainConfig(lambd_cool=False, **fields)
    assert off.lambd_after(steps) == 0.5


def test_a_loaded_vae_is_not_trained_again():
    for fields, updates in (
        ({}, 9),
        ({"load_model": "x.pt"}, 0),
        ({"load_model": "x.pt", "compat": True}, 9),
    ):
        assert spot.TrainConfig(vae_iterations=9, **fields).vae_updates() == updates


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"actor_dropout": 1.0}, r"actor_dropout must lie in \[0, 1\), not 1.0"),
        ({"vae_iterations": -1}, r"vae_iterations must lie in \[0, 1e9\], not -1"),
        ({"vae_hidden_dim": 0}, r"vae_hidden_dim must lie in \[1, 1e5\], not 0"),
        ({"vae_latent_dim": 0}, r"vae_latent_dim must lie in \[1, 1e5\], not 0"),
        ({"vae_lr": 0.0}, r"vae_lr must lie in \(0, inf\), not 0.0"),
        ({"beta": 0.0}, r"beta must lie in \(0, inf\), not 0.0"),
        ({"lambd": -0.1}, r"lambd must lie in \[0, inf\), not -0.1"),
        ({"lambd_end": 1.5}, r"lambd_end must lie in \[0, 1\], not 1.5"),
        ({"lambd_cool_steps": 0}, r"lambd_cool_steps must lie in \[1, 1e9\], not 0"),
        ({"num_samples": 0}, r"num_samples must lie in \[1, 1e4\], not 0"),
        ({"online_discount": 1.1}, r"online_discount must lie in \[0, 1\], not 1.1"),
        ({"actor_init_w": 0.0}, r"actor_init_w must lie in \(0, inf\), not 0.0"),
        ({"mixing_ratio": 0.5, "batch_size": 255}, "batch_size 255 cannot be split"),
    ],
)
def test_bad_settings_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        spot.TrainConfig(**{"env": TASK, **fields})


def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path, monkeypatch):
    state = {k: v for k, v in make()[0].state_dict().items() if "vae" not in k}
    path = tmp_path / "checkpoint_9.pt"
    checkpoints.save_corl_checkpoint(path, state)
    with pytest.raises(ValueError, match="has no 'vae': it is not a checkpoint of this"):
        run(spot, tmp_path, monkeypatch, load_model=str(path))


# ---------------------------------------------------------------- the VAE before the run

SHORT = {
    "offline_iterations": 6,
    "online_iterations": 6,
    "eval_freq": 4,
    "log_freq": 3,
    "n_episodes": 1,
    "batch_size": 16,
    "vae_iterations": 11,
    "actor_dropout": 0.1,
}


class Killed(Exception):
    """What ends a process at once."""


def kill_at(update, patch, how):
    """In the update of this number of the VAE `how(trainer)` is called, before it is made."""
    train = spot.SPOT.vae_train

    def counting(self, batch):
        if self.total_it + 1 == update:
            how(self)
        return train(self, batch)

    patch.setattr(spot.SPOT, "vae_train", counting)


@pytest.mark.parametrize("update", [6, 10])
def test_a_run_that_is_killed_while_its_vae_learns_ends_as_the_unbroken_one(
    update, tmp_path, monkeypatch
):
    """It goes on from update 4 or 8, where it saved."""
    run(spot, tmp_path / "a", monkeypatch, **SHORT)

    def kill(trainer):
        # A process that is killed does not tidy up: what is there now is what is left.
        shutil.copytree(folder_of(tmp_path / "b"), tmp_path / "c" / "spot-s0-copy")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        without_estimate(patch)  # its trial would count
        kill_at(update, patch, kill)
        run(spot, tmp_path / "b", monkeypatch, **SHORT)
    assert checkpoint_of(tmp_path / "c")["run"]["pretrained"] == update // 4 * 4
    resume = {"resume": str(folder_of(tmp_path / "c"))}
    assert run(spot, tmp_path / "c", monkeypatch, **SHORT, **resume)
    assert_same_run(tmp_path / "a", tmp_path / "c")


def test_a_run_that_is_asked_to_stop_while_its_vae_learns_goes_on(
    tmp_path, monkeypatch, capsys
):
    run(spot, tmp_path / "a", monkeypatch, **SHORT)
    sessions = []
    run_init = runs.Run.__init__

    def init(self, *args):
        sessions.append(self)
        run_init(self, *args)

    def ask(trainer):
        sessions[-1].stop_requested = True

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "__init__", init)
        without_estimate(patch)
        kill_at(6, patch, ask)
        assert run(spot, tmp_path / "b", monkeypatch, **SHORT) == {}
    assert "saved at step 0" in capsys.readouterr().out
    saved = checkpoint_of(tmp_path / "b")
    assert (saved["step"], saved["run"]["pretrained"]) == (0, 6)
    resume = {"resume": str(folder_of(tmp_path / "b"))}
    assert run(spot, tmp_path / "b", monkeypatch, **SHORT, **resume)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    shown = capsys.readouterr().out
    assert "VAE: 11 updates, reconstruction_loss 0." in shown


@pytest.mark.makes("estimate")
def test_the_estimate_counts_what_is_left_of_the_vae(tmp_path, monkeypatch, capsys):
    asked = []
    seconds = finetune.Session._seconds_of_pretraining

    def recorded(self, pretraining, watch):
        watch = SimpleNamespace(seconds_per_call=lambda work: 1.0)
        asked.append(seconds(self, pretraining, watch))
        return asked[-1]

    monkeypatch.setattr(finetune.Session, "_seconds_of_pretraining", recorded)
    with monkeypatch.context() as patch, pytest.raises(Killed):

        def kill(trainer):
            shutil.copytree(folder_of(tmp_path / "a"), tmp_path / "b" / "spot-s0-copy")
            raise Killed

        kill_at(6, patch, kill)
        run(spot, tmp_path / "a", monkeypatch, **SHORT)
    assert "(VAE " in capsys.readouterr().out
    resume = {"resume": str(folder_of(tmp_path / "b"))}
    run(spot, tmp_path / "b", monkeypatch, **SHORT, **resume)
    more = {**SHORT, "online_iterations": 9}
    run(spot, tmp_path / "b", monkeypatch, **more, **resume)
    assert asked == [{"VAE": 11.0}, {"VAE": 7.0}, {}]


def test_a_vae_that_diverges_ends_the_run_with_its_last_good_checkpoint(
    tmp_path, monkeypatch
):
    def spoil(trainer):
        trainer.vae.mean.weight.data.fill_(float("nan"))

    without_estimate(monkeypatch)
    kill_at(8, monkeypatch, spoil)
    with pytest.raises(FloatingPointError) as caught:
        run(spot, tmp_path, monkeypatch, **SHORT)
    text = str(caught.value)
    assert text.startswith("VAE step 8: ") and "not finite" in text
    assert "vae_lr 0.001" in text and "(step 0)" in text


def test_online_alone_begins_with_a_loaded_model(tmp_path, monkeypatch):
    """The offline model of a sweep: weights of a run, no VAE phase, the switch at once."""
    run(spot, tmp_path / "a", monkeypatch, **{**SHORT, "online_iterations": 0})
    trained = []
    monkeypatch.setattr(spot.SPOT, "vae_train", lambda *args: trained.append(1))
    fields = {**SHORT, "offline_iterations": 0, "online_discount": 0.6}
    model = str(folder_of(tmp_path / "a"))
    run(spot, tmp_path / "b", monkeypatch, **fields, load_model=model)
    first, second = (checkpoint_of(tmp_path / x)["parts"]["trainer"] for x in ("a", "b"))
    assert not trained and second["discount"] == 0.6
    assert_equal(first["vae"], second["vae"])
    assert second["total_it"] == first["total_it"] + 6


# ---------------------------------------------------------------- DARE-SPOT


@pytest.mark.parametrize("soft, kept", [(False, None), (False, B // 2), (True, None)])
@pytest.mark.parametrize("iwae", [False, True])
def test_dare_updates_equal_the_float64_oracle(soft, kept, iwae):
    """The weight multiplies the negative ELBO of its row; the scale of Q has none."""
    trainer, config = make(module=dare_spot, iwae=iwae, num_samples=2, lambd=0.2)
    oracle = OracleSPOT(in_float64(trainer), config)
    rng = np.random.default_rng(2)
    weight = hard_release(B, B // 2).weight.double()
    for _ in range(20):
        batch = double_batch(rng)
        if soft:
            weight = torch.tensor(rng.random(B))
        drawn = draw(trainer, batch, learns_next(trainer))
        logs = trainer.train(batch, Release(weight, kept))
        found = oracle.train(batch, *drawn, config.lambd, weight)
        if found[1] is not None:
            assert logs["actor_loss"].item() == pytest.approx(found[1], rel=1e-9)
    assert_same_weights(trainer, oracle)


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_same_weight_everywhere_is_spot_with_all_or_nothing_of_lambda(weight):
    plain, _ = make(lambd=0.4)
    plain.lambd *= weight
    released, _ = make(module=dare_spot, lambd=0.4)
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


def test_rows_that_are_released_are_not_computed():
    trainer, _ = make(module=dare_spot)
    seen = []
    encode = trainer.vae.encode
    trainer.vae.encode = lambda s, a: seen.append(len(s)) or encode(s, a)
    trainer.policy_losses(torch.randn(B, S), torch.randn(B, 1, 3), hard_release(B, 5))
    assert seen == [5]


@pytest.mark.parametrize("policy_std, expected", [(None, 0.2), (0.05, 0.1)])
def test_the_density_is_that_of_the_executed_action(policy_std, expected):
    """Without dropout, and no random number of the run is drawn."""
    block = NoisyDareConfig(policy_std=policy_std)
    fields = {"max_action": 2.0, "expl_noise": 0.1, "actor_dropout": 0.3}
    trainer, _ = make(module=dare_spot, dare=block, **fields)
    log_prob = dare_spot.hook_arguments(trainer)["policy_log_prob"]
    states = torch.randn(5, S)
    stream = torch.get_rng_state()
    mean = trainer.actor.executed(states)
    inside = torch.distributions.Normal(mean, expected).log_prob(mean + 0.03).sum(1)
    torch.testing.assert_close(log_prob(states, mean + 0.03), inside)
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.parametrize(
    "fields, dare, message",
    [
        (
            {"lambd_cool": True},
            {},
            "lambd_cool true and dare would both release; leave lambd_cool out",
        ),
        ({"expl_noise": 0.0}, {}, "acts without noise; set dare.policy_std"),
        ({}, {"policy_std": 0.0}, r"dare.policy_std must lie in \(0, inf\), not 0.0"),
        ({"batch_size": 255}, {}, "batch_size 255 cannot be split"),
    ],
)
def test_what_dare_cannot_have_is_refused(fields, dare, message):
    ratio = {"score": "policy_ratio", "behavior": "mixture", "guidance_scale": 0.0}
    with pytest.raises(ValueError, match=message):
        block = NoisyDareConfig(**{**ratio, **dare})
        dare_spot.TrainConfig(env=TASK, dare=block, **fields)
    off = NoisyDareConfig(**ratio, enabled=False)
    known = {k: v for k, v in fields.items() if k != "batch_size"}
    made = dare_spot.TrainConfig(env=TASK, dare=off, **known)
    assert made.mixing_ratio is None and made.lambd_cool


def test_dare_takes_the_place_of_the_cooling():
    config = dare_spot.TrainConfig(env=TASK, dare=noisy_block())
    assert config.lambd_cool is False and config.lambd_after(10**6) == config.lambd
    again = dare_spot.TrainConfig(**vars(config))
    assert again == config
