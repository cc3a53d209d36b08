"""E2O: updates of both phases against float64, its degenerate case CQL, and how it explores."""

import copy

import numpy as np
import pytest
import torch
from oracle_e2o import OracleE2O, policy, q_values
from test_iql import TASK, A, B, S, random_batch

from algorithms import cql, e2o

SMALL = {"n_critics": 4, "hidden_dim": 24, "q_n_hidden_layers": 2, "cql_n_actions": 3}
RATES = {"policy_lr": 1e-3, "qf_lr": 1e-3}
ALPHA_LR = e2o.TrainConfig.temperature_lr


def make(max_action=1.0, **fields):
    config = e2o.TrainConfig(env=TASK, **{**SMALL, **fields})
    torch.manual_seed(0)
    return e2o.make_trainer(config, S, A, max_action, "cpu"), config


CASES = {
    "published": {},
    "of each row, mean": {"uncertainty_by": "row", "target_rule": "mean"},
    "kept": {"cql_alpha_online": 2.0, "target_rule": "min", "cql_alpha": 1.0},
    "no gap": {"cql_alpha": 0.0, "uncertainty_temperature": 0.5, **RATES},
}


@pytest.mark.parametrize("max_action", [1.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_updates_equal_the_float64_oracle(case, max_action):
    trainer, config = make(max_action, **CASES[case])
    oracle = OracleE2O(trainer, config, A, max_action)
    rng = np.random.default_rng(1)
    for number in range(12):
        batch, online = random_batch(rng), number >= 5
        stream = torch.get_rng_state()
        noise = trainer._noise(batch[1], online)._asdict()
        torch.set_rng_state(stream)
        logs = trainer.train(batch, online)
        for name, value in oracle.train(batch, noise, online).items():
            assert logs[name].item() == pytest.approx(value, rel=2e-4, abs=1e-5), name
        weight = config.cql_alpha_online if online else config.cql_alpha
        assert ("cql_gap" in logs) is bool(weight) and ("spread" in logs) is online
    pairs = (trainer.actor, oracle.actor), (trainer.critics, oracle.q)
    for network, expected in (*pairs, (trainer.target_critics, oracle.target)):
        for name, value in network.state_dict().items():
            gap = (value.double() - expected[name]).abs().max().item()
            assert gap < 2e-5, f"{name} is off by {gap}"
    expected = oracle.scalars["log_alpha"].item()
    assert trainer.alpha.raw.item() == pytest.approx(expected, abs=1e-6)


def as_cql(trainer):
    """CQL's trainer with the networks of an E2O trainer of two critics."""
    width, layers = SMALL["hidden_dim"], [*trainer.critics.hidden, trainer.critics.last]
    critics = [
        cql.FullyConnectedQFunction(S, A, False, len(layers) - 1, width) for _ in (0, 1)
    ]
    actor = cql.TanhGaussianPolicy(S, A, 1.0, log_std_offset=0.0, hidden_dim=width)
    with torch.no_grad():
        for i, critic in enumerate(critics):
            for ours, theirs in zip(layers, critic.network[::2], strict=True):
                theirs.weight.copy_(ours.weight[i].T)
                theirs.bias.copy_(ours.bias[i, 0])
        *hidden, last = actor.base_network[::2]
        for ours, theirs in zip(trainer.actor.trunk[::2], hidden, strict=True):
            theirs.load_state_dict(ours.state_dict())
        heads = trainer.actor.mean, trainer.actor.log_std
        last.weight.copy_(torch.cat([head.weight for head in heads]))
        last.bias.copy_(torch.cat([head.bias for head in heads]))

    def adam(network):
        return torch.optim.Adam(network.parameters(), 1e-3)

    made = cql.ContinuousCQL(
        *(critics[0], adam(critics[0]), critics[1], adam(critics[1])),
        # The two numbers that scale its log std are no part of E2O, and stay.
        *(actor, adam(actor.base_network), -float(A)),
        backup_entropy=True,
        policy_lr=1e-3,
        bc_steps=0,
        cql_n_actions=2,
        cql_alpha=0.0,
    )
    made.alpha_optimizer.param_groups[0]["lr"] = ALPHA_LR
    return made


# The parts of CQL's checkpoint, in the order in which E2O learns them.
ORDER = (
    ("sac_log_alpha", "sac_log_alpha_optim"),
    *(tuple(k for k in cql.CHECKPOINT_PARTS if k.startswith("critic")),),
    ("actor", "actor_optim"),
)


@pytest.fixture
def in_float64():
    """Adam makes steps of gradients that are rounding, so float32 would hide small mistakes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_two_critics_without_a_factor_and_a_gap_are_cql(in_float64):
    """CQL makes all losses from the weights of before a step, so each part is taken by itself."""
    fields = {"n_critics": 2, "uncertainty_temperature": 0.0, "cql_alpha": 0.0}
    trainer, _ = make(**fields, **RATES)
    theirs, rng = as_cql(trainer), np.random.default_rng(2)
    for _ in range(4):
        batch = [field.double() for field in random_batch(rng)]
        normal = torch.tensor(rng.normal(size=(2, B, A)))
        many = [torch.zeros(B, 2, A)] * 3
        trainer._update(batch, e2o.Noise(policy=normal[0], backup=normal[1]))
        for keys in ORDER:
            state = copy.deepcopy(theirs.state_dict())
            noise = cql.Noise(normal[0], None, normal[1], *many)
            theirs._update(batch, noise, False, True)
            learned = copy.deepcopy({k: theirs.state_dict()[k] for k in keys})
            theirs.load_state_dict({**state, **learned})
            # CQL descends along log alpha, E2O along alpha, which stays near 1 here.
            ours, own = trainer.alpha.raw.detach(), theirs.log_alpha.constant.data
            assert (own - ours).abs() < 1e-6
            own.copy_(ours)
    expected = as_cql(trainer)
    for critic in ("critic_1", "critic_2"):
        for one, other in zip(
            getattr(theirs, critic).parameters(),
            getattr(expected, critic).parameters(),
            strict=True,
        ):
            assert (one - other).abs().max() < 1e-8
    base = expected.actor.base_network.state_dict()
    for name, value in theirs.actor.base_network.state_dict().items():
        assert (value - base[name]).abs().max() < 1e-8, name
    assert trainer.alpha.raw.abs() > ALPHA_LR
    for i, critic in enumerate((theirs.target_critic_1, theirs.target_critic_2)):
        target = trainer.target_critics.last.weight[i].T
        assert (critic.network[-1].weight - target).abs().max() < 1e-8


@pytest.mark.parametrize("ucb_lambda", [0.0, 10.0])
def test_of_some_actions_that_with_the_largest_bound_acts(ucb_lambda):
    trainer, _ = make(2.0, ucb_lambda=ucb_lambda)
    actor = trainer.composite.train()
    states = torch.randn(7, S).numpy()
    torch.manual_seed(3)
    noise = torch.randn(7, 4, A).double()
    torch.manual_seed(3)
    acted = actor.act(states)
    q = {k: v.double() for k, v in trainer.critics.state_dict().items()}
    pi = {k: v.double() for k, v in trainer.actor.state_dict().items()}
    s, seen = torch.tensor(states).double(), set()
    actions = [policy(pi, s, noise[:, i], 2.0)[0] for i in range(4)]
    values = torch.stack([torch.stack(q_values(q, s, a)) for a in actions])
    bound = values.mean(1) + ucb_lambda * values.std(1)
    for row in range(7):
        best = int(bound[:, row].argmax())
        seen.add(best)
        np.testing.assert_allclose(acted[row], actions[best][row], atol=1e-5)
    assert len(seen) > 1
    mode = actor.eval().act(states[0])
    np.testing.assert_allclose(
        mode, trainer.actor.mode(torch.tensor(states))[0].detach()
    )
    plain = make(2.0, exploration="policy")[0].composite.train()
    torch.manual_seed(3)
    sample = plain.act(states)
    torch.manual_seed(3)
    first = policy(pi, s, torch.randn(7, 1, A)[:, 0].double(), 2.0)[0]
    np.testing.assert_allclose(sample, first, atol=1e-5)


def test_antmaze_is_refused_in_one_line():
    with pytest.raises(
        ValueError, match="env antmaze-umaze-v2: E2O's form .*unpublished"
    ):
        e2o.TrainConfig(env="antmaze-umaze-v2")
