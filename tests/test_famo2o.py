"""FamO2O on IQL and on CQL: updates against float64, degenerate cases, coefficients, settings."""

import copy

import numpy as np
import pytest
import torch
from helpers import assert_equal
from oracle_famo2o import OracleFamCQL, OracleFamO2OIQL
from short_runs import folder_of, run
from test_iql import TASK, A, B, S, random_batch
from test_ssar import assert_near, next_noise, release_of

from algorithms import cql, dare_famo2o_cql, famo2o_cql, famo2o_iql, iql
from corl import curves
from corl.compiled import descend
from corl.config import parse_config
from corl_dare.hook import Release
from policy_family.balance import BalanceModel
from policy_family.coefficient import encode

pytestmark = pytest.mark.narrow(32)
BOTH = (famo2o_iql, famo2o_cql)
PUBLIC = {m: m.TrainConfig.PRESETS["public_code"] for m in BOTH}


def make(module, seed=0, max_action=1.0, **fields):
    config = module.TrainConfig(env=TASK, threads=1, compile=False, **fields)
    torch.manual_seed(seed)
    return module.make_trainer(config, S, A, max_action, "cpu"), config


IQL_CASES = {
    "locomotion": {"balance_period": 3},
    "antmaze": {"iql_tau": 0.9, "beta_low": 8.0, "beta_high": 14.0, "eta_init": 0.3},
    "public code": {**PUBLIC[famo2o_iql], "target_entropy": 0.4, "encoding_pairs": 2},
}


@pytest.mark.parametrize("case", IQL_CASES)
def test_updates_on_iql_equal_the_float64_oracle(case):
    max_action = 2.0 if case == "antmaze" else 1.0
    fields = {"balance_lr": 1e-3, "eta_lr": 1e-2, "tau": 0.05, **IQL_CASES[case]}
    trainer, config = make(famo2o_iql, max_action=max_action, **fields)
    oracle = OracleFamO2OIQL(trainer, config, max_action)
    rng = np.random.default_rng(1)
    for number in range(12):
        online = number >= 6
        batch = random_batch(rng)
        noise = next_noise(trainer, batch, online)
        logs = {k: v.item() for k, v in trainer.train(batch, online).items()}
        expected = oracle.train(batch, noise, online)
        assert logs == pytest.approx(expected, rel=2e-4, abs=1e-5)
    pairs = {
        "qf": oracle.q,
        "q_target": oracle.q_target,
        "vf": oracle.v,
        "log_eta": oracle.eta,
    }
    for name, expected in pairs.items():
        assert_near(getattr(trainer, name), expected, where=name)
    assert_near(trainer.actor.policy, oracle.policy, where="policy")
    assert_near(trainer.actor.balance, oracle.balance, where="balance")


CQL_CASES = {
    "mended": {},
    "public code": {**PUBLIC[famo2o_cql], "cql_alpha": 5.0, "alpha_multiplier": 0.5},
}


@pytest.mark.parametrize("kept", [None, "soft", B // 3, 0])
@pytest.mark.parametrize("case", CQL_CASES)
def test_updates_on_cql_equal_the_float64_oracle(case, kept):
    """Online those of the DARE file with a release: none, soft weights, so many leading rows."""
    max_action = 2.0 if case == "mended" else 1.0
    fields = {"cql_n_actions": 3, "soft_target_update_rate": 0.05, **CQL_CASES[case]}
    module = famo2o_cql if kept is None else dare_famo2o_cql
    trainer, config = make(module, max_action=max_action, **fields)
    oracle = OracleFamCQL(trainer, config, A, max_action)
    rng = np.random.default_rng(1)
    for number in range(10):
        online = number >= 5
        batch = random_batch(rng)
        batch[1][0] = max_action
        given = online, *(release_of(kept, rng) if online else ())
        noise = next_noise(trainer, batch, *given)
        logs = {k: v.item() for k, v in trainer.train(batch, *given).items()}
        weight = given[1].weight if given[1:] else None
        expected = oracle.train(batch, noise, online, weight)
        assert ("conservative_loss" in logs) is ("conservative_loss" in expected)
        found = {k: logs[k] for k in expected}
        assert found == pytest.approx(expected, rel=2e-4, abs=1e-4)
    for i, name in enumerate(("critic_1", "critic_2")):
        assert_near(getattr(trainer, name), oracle.q[i], where=name)
        assert_near(getattr(trainer, f"target_{name}"), oracle.target[i], where=name)
    assert_near(trainer.actor.policy, oracle.policy, where="policy")
    assert_near(trainer.actor.balance, oracle.balance, where="balance")
    assert_near(trainer.log_alpha, oracle.log_alpha, where="log_alpha")


# ---------------------------------------------------------------- degenerate cases


def without_code(weights, beta, bias_of):
    """The first layer of a member of the family as one that reads states alone."""
    weight, bias = weights
    code = encode(torch.tensor(beta), 10000.0, (weight.shape[1] - S) // 2)
    bias_of.copy_(bias + weight[:, S:] @ code)
    return weight[:, :S]


def test_with_one_coefficient_its_losses_are_those_of_iql():
    """Where log pi is equal: the coefficient's part of the first layer becomes a bias."""
    ours, _ = make(famo2o_iql, beta_low=3.0, beta_high=3.0)
    base = make(iql, beta=3.0)[0]
    base.qf.load_state_dict(ours.qf.state_dict())
    base.vf.load_state_dict(ours.vf.state_dict())
    state = copy.deepcopy(ours.actor.policy.state_dict())
    first = state["net.net.0.weight"], state["net.net.0.bias"]
    state["net.net.0.weight"] = without_code(first, 3.0, state["net.net.0.bias"])
    base.actor.load_state_dict(state)
    batch = random_batch(np.random.default_rng(0))
    observations, actions, rewards, next_observations, dones = batch
    noise = next_noise(ours, batch, True)
    # Whatever pi_b has drawn, offline and online.
    beta = ours.coefficients(observations, noise)
    assert (beta == 3.0).all()
    adv = ours.q_target(observations, actions) - ours.vf(observations)
    next_v = ours.vf(next_observations)
    adv, next_v = 30.0 * adv.detach(), next_v.detach()
    rows = observations, actions, adv
    found = ours.policy_losses(*rows, beta), base.policy_losses(*rows)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.value_losses(adv), base.value_losses(adv))
    rows = observations, actions, rewards, dones, next_v
    assert (torch.stack(ours.q_losses(*rows)) == torch.stack(base.q_losses(*rows))).all()


def test_with_the_coefficient_1_its_losses_are_those_of_cql():
    fields = {"cql_n_actions": 3, "cql_alpha": 2.0}
    ours, _ = make(famo2o_cql, beta_low=1.0, beta_high=1.0, **fields)
    base = make(cql, **fields)[0]
    for name in ("critic_1", "critic_2", "target_critic_1", "target_critic_2"):
        setattr(base, name, copy.deepcopy(getattr(ours, name)))
    # Base's policy with as many layers.
    base.actor.base_network = cql.relu_network(S, 2, 2 * A, 256, True)
    state = copy.deepcopy(ours.actor.policy.state_dict())
    keys = "base_network.0.weight", "base_network.0.bias"
    state[keys[0]] = without_code([state[k] for k in keys], 1.0, state[keys[1]])
    base.actor.load_state_dict(state)
    for name in ("critic_1", "critic_2"):
        made = torch.optim.Adam(getattr(base, name).parameters(), 3e-4)
        setattr(base, f"{name}_optimizer", made)
    batch = random_batch(np.random.default_rng(0))
    batch[1].clamp_(-0.999, 0.999)
    noise = next_noise(ours, batch, True)
    of_base = cql.Noise(
        noise.policy, None, noise.backup, noise.uniform, noise.current, noise.following
    )
    base._noise = lambda *_: of_base
    ours._noise = lambda *_: noise
    found, expected = ours.train(batch, online=True), base.train(batch)
    for key in expected.keys() & found.keys():
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)
    assert len(expected.keys() & found.keys()) >= 18
    # One step of the critics later.
    for name in ("critic_1", "critic_2", "target_critic_1"):
        assert_near(getattr(ours, name), getattr(base, name).state_dict(), 1e-5, name)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_weight_that_is_the_same_for_all_rows_keeps_or_drops_the_gap(weight, hard):
    """FamCQL as it is, or with `cql_alpha` 0, bit for bit."""
    fields = {"cql_n_actions": 3, "cql_alpha": 2.0}
    ours, _ = make(dare_famo2o_cql, **fields)
    plain, _ = make(famo2o_cql, **{**fields, "cql_alpha": 2.0 * weight})
    release = Release(torch.full((B,), weight), int(weight * B) if hard else None)
    rng = np.random.default_rng(0)
    for seed in range(3):
        batch = random_batch(rng)
        for trainer, given in ((ours, (True, release)), (plain, (True,))):
            torch.manual_seed(seed)
            trainer.train(batch, *given)
    assert_equal(ours.state_dict(), plain.state_dict())


# ---------------------------------------------------------------- coefficients


def test_the_encoding_is_the_one_of_the_facts():
    zero, one = encode(torch.tensor([0.0, 10.0]), 10000.0, 3)
    assert zero.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    divisors = [1.0, 21.54, 464.16]
    expected = [f(10.0 / d) for d in divisors for f in (np.sin, np.cos)]
    np.testing.assert_allclose(one.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("state_std", [False, True])
def test_coefficients_stay_in_their_range_however_far_the_mean_is(state_std):
    torch.manual_seed(0)
    network = torch.nn.Linear(S, 1 + state_std)
    states, noise = 30.0 * torch.randn(500, S), torch.randn(500)
    for shifted, low in ((True, 8.0), (False, 2.0)):
        model = BalanceModel(network, 8.0, 14.0, -10.0, state_std, shifted)
        beta, log_prob = model(states, noise)
        assert beta.min() >= low - 1e-4 and beta.max() <= 14.0
        assert log_prob.isfinite().all()
        # Both ends are reached, and the mode is what is drawn without noise.
        assert beta.min() < low + 0.5 and beta.max() > 13.5
        mode = model(states, torch.zeros(500))[0]
        torch.testing.assert_close(model.mode(states), mode)


def test_a_row_is_weighed_by_its_own_coefficient_or_by_those_of_the_batch():
    trainer, _ = make(famo2o_iql)
    adv, beta = torch.tensor([0.5, -1.0, 9.0]), torch.tensor([1.0, 2.0, 5.0])
    own = trainer.advantage_weights(adv, beta)
    torch.testing.assert_close(own[:2], (beta * adv)[:2].exp())
    assert own.shape == (3,) and own[2] == 100.0
    other = beta.clone()
    other[1] = 4.0
    changed = trainer.advantage_weights(adv, other) != own
    assert changed.tolist() == [False, True, False]
    trainer.weights_of = "batch"
    every = trainer.advantage_weights(adv, beta)
    mean = torch.stack([(b * adv).exp().clamp(max=100.0) for b in beta]).mean(0)
    torch.testing.assert_close(every, mean)


@pytest.mark.parametrize("module", BOTH)
def test_what_acts_is_the_member_that_the_balance_models_mode_picks(module):
    trainer, _ = make(module, max_action=2.0)
    states = np.random.default_rng(0).normal(size=(5, S)).astype(np.float32)
    actor, tensors = trainer.actor.eval(), torch.from_numpy(states)
    with torch.no_grad():
        beta = actor.balance.mode(tensors)
        if module is famo2o_iql:
            mean = actor.policy(tensors, beta).mean
        else:
            mean = actor.policy.moments(tensors, beta)[0].tanh()
    actions = actor.act(states)
    np.testing.assert_allclose(actions, (2.0 * mean).numpy(), atol=1e-6)
    np.testing.assert_allclose(actor.act(states[0]), actions[0], atol=1e-6)
    actor.train()
    noisy = np.stack([actor.act(states) for _ in range(200)])
    assert noisy.std(0).min() > 0.05 and np.abs(noisy).max() <= 2.0
    assert (actor.balance.mode(tensors) == beta).all()


def test_the_balance_model_raises_q_and_eta_keeps_its_entropy():
    trainer, _ = make(famo2o_iql, balance_lr=1e-2, eta_init=1e-3, eta_lr=1e-2)
    direction = torch.randn(A)
    trainer.q_target = lambda states, actions: actions @ direction
    batch = random_batch(np.random.default_rng(0))

    def gain():
        with torch.no_grad():
            beta = trainer.actor.balance.mode(batch[0])
            mean = trainer.actor.policy(batch[0], beta).mean
            return trainer.q_target(batch[0], mean).mean()

    before = gain()
    for _ in range(40):
        trainer._learn_balance(batch[0], trainer._noise(batch[1], False))
    assert gain() > before
    # Mean log-density below and above that of the target entropy.
    for log_prob, rises in ((-0.5, False), (1.5, True)):
        eta = trainer.log_eta().item()
        for _ in range(20):
            losses = trainer.eta_losses(torch.full((4,), log_prob))
            descend(losses.mean(), trainer.eta_optimizer)
        assert (trainer.log_eta().item() > eta) is rises


# ---------------------------------------------------------------- settings and runs


@pytest.mark.parametrize("module", BOTH)
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"beta_low": 2.0, "beta_high": 1.0}, "beta_high 1.0 lies below beta_low 2.0"),
        ({"beta_low": -1.0}, r"beta_low must lie in \[0, .*, not -1.0"),
        ({"encoding_pairs": 0}, r"encoding_pairs must lie in \[1, "),
        ({"encoding_base": 0.0}, r"encoding_base must lie in \[1, "),
        ({"mixing_ratio": 0.3}, "batch_size 256 cannot be split by mixing_ratio 0.3"),
    ],
)
def test_bad_settings_name_the_field(module, fields, message):
    with pytest.raises(ValueError, match=message):
        module.TrainConfig(**{"env": TASK, **fields})


@pytest.mark.parametrize("module", BOTH)
def test_the_public_codes_faults_come_back_with_one_word(module, capsys):
    config = parse_config(module.TrainConfig, ["--preset", "public_code"])
    assert config != module.TrainConfig()
    for field, value in PUBLIC[module].items():
        assert getattr(config, field) == value
        with pytest.raises(SystemExit):
            parse_config(module.TrainConfig, [f"--{field}", "best"])
        shown = capsys.readouterr().err
        choices = ", ".join(module.TrainConfig.CHOICES[field])
        assert shown.startswith(f"error: {field} 'best' is not one of {choices}")


def test_the_balance_model_learns_every_few_updates_and_metrics_say_so(
    tmp_path, monkeypatch
):
    fields = {"offline_iterations": 7, "online_iterations": 5, "eval_freq": 6}
    fields.update(balance_period=3, log_freq=1, n_episodes=1, batch_size=16)
    run(famo2o_iql, tmp_path, monkeypatch, **fields)
    found = curves.read_csv(folder_of(tmp_path) / "metrics.csv")
    learned = [i + 1 for i, text in enumerate(found["balance_loss"]) if text]
    assert learned == [3, 6, 9, 12]
    assert all(found["actor_loss"])
