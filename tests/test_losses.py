"""Losses are functions of tensors that return one value per row, and an update is one, too.

Their gradients are held against finite differences in float64, the draws of an update against
draws by hand, and what a release does to losses against its formula.
"""

import copy

import pytest
import torch
from helpers import hard_release
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import cal_ql, cql, dare_cal_ql, dare_iql, iql
from corl_dare.hook import Release

S, A, B, N = 4, 2, 6, 3
TASK = "hopper-medium-v2"
DOUBLE = torch.float64
IQL, FAMILY = [iql, dare_iql], [cql, cal_ql, dare_cal_ql]
ALL = [*IQL, *FAMILY]


def make(module, dtype=DOUBLE, seed=0, dare=None, **fields):
    """A trainer of the module with all its numbers in float64."""
    if dare is not None:
        block = getattr(module, "DareIQLConfig", None) or module.DareCalQLConfig
        fields["dare"] = block(**dare)
    if module in FAMILY:
        fields = {"cql_n_actions": N, **fields}
    config = module.TrainConfig(env=TASK, **fields)
    torch.manual_seed(seed)
    trainer = module.make_trainer(config, S, A, 1.0, "cpu")
    for part in networks(trainer).values():
        part.to(dtype)
    return trainer


def networks(trainer):
    return {k: v for k, v in vars(trainer).items() if isinstance(v, torch.nn.Module)}


def randn(*shape, seed=0, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def batch_of(module, seed=0, dtype=DOUBLE):
    batch = [
        randn(B, S, seed=seed, dtype=dtype),
        randn(B, A, seed=seed + 1, dtype=dtype).tanh(),
        randn(B, 1, seed=seed + 2, dtype=dtype),
        randn(B, S, seed=seed + 3, dtype=dtype),
        (randn(B, 1, seed=seed + 4, dtype=dtype) > 0.8).to(dtype),
    ]
    if module in (cal_ql, dare_cal_ql):
        batch.append(0.3 * randn(B, 1, seed=seed + 5, dtype=dtype))
    return batch


def noise_of(trainer, seed=9, cloning=False, release=None):
    """The noise of one update of the CQL family, in float64."""
    torch.manual_seed(seed)
    more = () if release is None else (release,)
    drawn = trainer._noise(torch.zeros(B, A), cloning, *more)
    return type(drawn)(*(x if x is None else x.double() for x in drawn))


def assert_gradient(network, terms_of, rows=B):
    """Autograd against a central difference, along a direction in the network's weights.

    Each row has a weight of its own, so terms in the wrong rows would show.
    """
    parameters = list(network.parameters())
    weight = 1.0 + torch.arange(rows, dtype=DOUBLE)
    terms = terms_of()
    assert terms.shape == (rows,) and terms.dtype == DOUBLE
    gradients = torch.autograd.grad(
        (weight * terms).sum(), parameters, allow_unused=True, materialize_grads=True
    )
    ways = [randn(*p.shape, seed=i + 50) for i, p in enumerate(parameters)]
    length = sum(way.square().sum() for way in ways).sqrt()
    ways = [way / length for way in ways]
    step = 1e-6  # few ReLUs have a kink so near

    def shifted(size):
        with torch.no_grad():
            for p, way in zip(parameters, ways, strict=True):
                p.add_(size * way)
        return (weight * terms_of()).sum().item()

    slope = (shifted(step) - shifted(-2 * step)) / (2 * step)
    shifted(step)
    expected = sum((g * way).sum() for g, way in zip(gradients, ways, strict=True))
    assert abs(slope) > 1e-4  # a flat loss would prove nothing
    assert slope == pytest.approx(expected.item(), rel=1e-5, abs=1e-8)


RELEASES = {
    "none": None,
    "hard": hard_release(B, B // 2),
    "soft": Release(torch.linspace(0.0, 1.0, B, dtype=DOUBLE)),
}
RELEASES["hard"] = Release(RELEASES["hard"].weight.double(), RELEASES["hard"].kept)


# ---------------------------------------------------------------- IQL's losses


@pytest.mark.parametrize("module", IQL)
def test_the_expectile_loss_has_a_value_per_row(module):
    u = torch.tensor([-2.0, 0.0, 3.0], dtype=DOUBLE)
    expected = torch.tensor([0.3 * 4, 0.0, 0.7 * 9], dtype=DOUBLE)
    torch.testing.assert_close(module.asymmetric_l2_loss(u, 0.7), expected)


@pytest.mark.parametrize("value", ["all", "offline", "iv"])
@pytest.mark.parametrize("release", RELEASES)
def test_value_losses_have_their_gradient(value, release):
    """V's; written out for each choice of the rows that V learns on."""
    trainer = make(dare_iql, dare={"value": value})
    states, release = randn(B, S), RELEASES[release]
    target = 2.0 * randn(B, seed=1)

    def terms():
        return trainer.value_losses(target - trainer.vf(states), release)

    assert_gradient(trainer.vf, terms)
    u, expectile, factor = target - trainer.vf(states), torch.full((B,), 0.7), 1.0
    if release is not None and value == "iv":
        expectile = release.weight * 0.7 + (1 - release.weight) * 0.99
    if release is not None and value == "offline":
        factor = release.weight
    written = factor * torch.where(u < 0, 1 - expectile, expectile) * u**2
    torch.testing.assert_close(terms(), written)


@pytest.mark.parametrize("module", IQL)
def test_q_losses_have_their_gradient(module):
    trainer = make(module, discount=0.9)
    s, a, r, _, d = batch_of(module)
    next_v = randn(B, seed=7)
    for i, network in enumerate((trainer.qf.q1, trainer.qf.q2)):
        assert_gradient(
            network, lambda i=i: trainer.q_losses(s, a, r, d, next_v)[i], rows=B
        )
        y = r[:, 0] + 0.9 * (1 - d[:, 0]) * next_v
        q = network(torch.cat([s, a], 1))
        losses = trainer.q_losses(s, a, r, d, next_v)[i]
        torch.testing.assert_close(losses, (q - y) ** 2)


@pytest.mark.parametrize("policy", ["sac", "awr"])
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_policy_losses_have_their_gradient(policy, release, deterministic):
    trainer = make(dare_iql, iql_deterministic=deterministic, dare={"policy": policy})
    s, a, *_ = batch_of(dare_iql)
    adv, noise = randn(B, seed=7), 0.3 * randn(1, B, A, seed=8)

    def terms():
        return trainer.policy_losses(s, a, adv, noise, RELEASES[release])

    assert_gradient(trainer.actor, terms)


def test_policy_losses_of_iql_have_their_gradient():
    trainer = make(iql)
    s, a, *_ = batch_of(iql)
    adv = torch.linspace(-1.0, 3.0, B, dtype=DOUBLE)  # beta 3: the last ones are clipped
    assert_gradient(trainer.actor, lambda: trainer.policy_losses(s, a, adv))
    law = trainer.actor(s)
    z = (a - law.mean) / law.stddev
    log_prob = -0.5 * z**2 - law.stddev.log() - 0.5 * torch.tensor(2 * torch.pi).log()
    written = -(3.0 * adv).exp().clamp(max=100.0) * log_prob.sum(1)
    torch.testing.assert_close(trainer.policy_losses(s, a, adv), written)


# ---------------------------------------------------------------- the CQL family's losses

CASES = {
    "plain": {},
    "maximum, entropy": {"cql_max_target_backup": True, "backup_entropy": True},
    "no importance": {"cql_importance_sample": False, "cql_temp": 0.5},
    "lagrange": {"cql_lagrange": True, "cql_target_action_gap": 0.3},
}


def gaps_of(trainer, module, batch, noise, release=None):
    """The conservative gaps of both critics, with Q of the data made anew."""
    s, a, _, s2, _, *mc_returns = batch
    predicted = [critic(s, a) for critic in (trainer.critic_1, trainer.critic_2)]
    more = () if release is None else (release,)
    return trainer.conservative_gaps(predicted, s, s2, *mc_returns, noise, {}, *more)


@pytest.mark.parametrize("module", FAMILY)
@pytest.mark.parametrize("case", CASES)
def test_the_critics_loss_has_its_gradient(module, case):
    """TD loss and penalty of one critic; the other one does not enter."""
    trainer = make(module, **CASES[case])
    batch, noise = batch_of(module), noise_of(trainer)
    s, a, r, s2, d, *_ = batch
    alpha = torch.tensor(0.3, dtype=DOUBLE)
    for i, critic in enumerate((trainer.critic_1, trainer.critic_2)):

        def terms(i=i, critic=critic):
            y, _ = trainer.td_target(s2, r, d, alpha, noise)
            gaps = gaps_of(trainer, module, batch, noise)
            penalties, _ = trainer._penalties(gaps, {})
            return (critic(s, a) - y) ** 2 + penalties[i]

        assert_gradient(critic, terms)


@pytest.mark.parametrize("kept", [1, 4, B])
def test_the_gaps_of_kept_rows_have_their_gradient_and_the_others_none(kept):
    release = Release((torch.arange(B) < kept).double(), kept)
    trainer = make(dare_cal_ql)
    batch, noise = batch_of(dare_cal_ql), noise_of(trainer, release=release)
    gaps = gaps_of(trainer, dare_cal_ql, batch, noise, release)
    for i, critic in enumerate((trainer.critic_1, trainer.critic_2)):
        assert_gradient(
            critic,
            lambda i=i: gaps_of(trainer, dare_cal_ql, batch, noise, release)[i],
        )
        assert not gaps[i][kept:].any()
        # The same draws without a release: the same gaps in the rows that are kept.
        rows = [x[:kept] for x in batch]
        alone = gaps_of(trainer, dare_cal_ql, rows, noise)
        torch.testing.assert_close(gaps[i][:kept], alone[i])


@pytest.mark.parametrize("module", FAMILY)
@pytest.mark.parametrize("cloning", [False, True])
def test_policy_losses_of_the_family_have_their_gradient(module, cloning):
    trainer = make(module)
    s, a, *_ = batch_of(module)
    noise, alpha = noise_of(trainer, cloning=cloning), torch.tensor(0.3, dtype=DOUBLE)

    def terms():
        new_actions, log_pi = trainer.actor(s, noise=noise.policy)
        return trainer.policy_losses(s, a, new_actions, alpha, log_pi, cloning, noise)

    assert_gradient(trainer.actor, terms)


@pytest.mark.parametrize("module", FAMILY)
def test_the_multipliers_losses_have_their_gradient(module):
    trainer = make(module, cql_lagrange=True)
    log_pi, diffs = randn(B), [torch.tensor(2.0, dtype=DOUBLE)] * 2
    assert_gradient(trainer.log_alpha, lambda: trainer.alpha_losses(log_pi))
    assert_gradient(
        trainer.log_alpha_prime,
        lambda: trainer._penalties(diffs, {})[1].reshape(1),
        rows=1,
    )


# ---------------------------------------------------------------- an update is a function


def arguments(module, trainer, release):
    """What `_update` takes besides the batch."""
    if module is iql:
        return ()
    if module is dare_iql:
        noise = randn(11, B, A, dtype=torch.float32) if release is not None else None
        return noise, release
    torch.manual_seed(4)
    more = () if module is not dare_cal_ql else (release,)
    return (trainer._noise(torch.zeros(B, A), True, *more), True, True, *more)


CASES_OF_UPDATES = [(module, None) for module in ALL]
CASES_OF_UPDATES += [(m, r) for m in (dare_iql, dare_cal_ql) for r in (3, "soft")]


@pytest.mark.parametrize("module, kept", CASES_OF_UPDATES)
def test_an_update_is_a_function_of_its_arguments(module, kept):
    """Equal weights and arguments: equal results, whatever the global stream is."""
    release = None if kept is None else hard_release(B, B // 2)
    if kept == "soft":
        release = Release(torch.linspace(0.0, 1.0, B))
    results = []
    for seed in (100, 200):
        trainer = make(module, torch.float32)
        batch = batch_of(module, dtype=torch.float32)
        given = arguments(module, trainer, release)
        before = [x.clone() for x in batch]
        torch.manual_seed(seed)
        stream = torch.get_rng_state()
        own = getattr(trainer, "dare_generator", torch.Generator())
        own_stream = own.get_state()
        logs = trainer._update(batch, *given)
        assert torch.equal(torch.get_rng_state(), stream)
        assert torch.equal(own.get_state(), own_stream)
        assert all(torch.equal(x, y) for x, y in zip(batch, before, strict=True))
        results.append((logs, networks(trainer)))
    (logs, nets), (other_logs, other_nets) = results
    assert logs.keys() == other_logs.keys()
    assert all(torch.equal(v, other_logs[k]) for k, v in logs.items())
    for name, network in nets.items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, other_nets[name].state_dict()[key]), (name, key)


@pytest.mark.parametrize("module, kept", CASES_OF_UPDATES[2:])
def test_other_noise_makes_another_update(module, kept):
    """So the noise is used: with a release, and always in the CQL family."""
    if module is dare_iql and kept is None:
        pytest.skip("without a release DARE-IQL draws nothing")
    release = Release(torch.linspace(0.0, 1.0, B))
    trainers = [make(module, torch.float32) for _ in range(2)]
    for seed, trainer in enumerate(trainers):
        noise = randn(11, B, A, seed=seed, dtype=torch.float32)
        given = (noise, release)
        if module in FAMILY:
            torch.manual_seed(seed)
            more = () if module is not dare_cal_ql else (release,)
            given = (trainer._noise(torch.zeros(B, A), False, *more), False, True, *more)
        trainer._update(batch_of(module, dtype=torch.float32), *given)
    one, two = (trainer.actor.state_dict() for trainer in trainers)
    assert any(not torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("module", ALL)
def test_training_draws_the_noise_and_makes_the_update_of_it(module):
    trained, updated = make(module, torch.float32), make(module, torch.float32)
    batch = batch_of(module, dtype=torch.float32)
    release = hard_release(B, 3) if module in (dare_iql, dare_cal_ql) else None
    more = () if release is None else (release,)
    torch.manual_seed(11)
    logs = trained.train(batch, *more)
    torch.manual_seed(11)
    given = ()
    if module is dare_iql:
        given = (updated._noise(batch[1]), release)
    elif module in FAMILY:
        given = (updated._noise(batch[1], False, *more), False, True, *more)
    expected = updated._update(batch, *given)
    assert {k: v.item() for k, v in logs.items()} == {
        k: v.item() for k, v in expected.items()
    }
    for name, network in networks(trained).items():
        for key, value in network.state_dict().items():
            other = getattr(updated, name).state_dict()[key]
            assert torch.equal(value, other), (name, key)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("module", FAMILY)
@pytest.mark.parametrize("compat, cloning", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("maximum", [False, True])
def test_the_cql_family_draws_in_the_order_of_upstream(module, compat, cloning, maximum):
    """New actions, the warm-up's sample, the backup, uniform actions, those of s and s'."""
    flags = {"compat": bool(compat), "cql_max_target_backup": maximum}
    trainer = make(module, torch.float32, **flags)
    torch.manual_seed(5)
    drawn = trainer._noise(torch.zeros(B, A), bool(cloning))
    after = torch.get_rng_state()
    torch.manual_seed(5)
    many, flat = (B, N, A), (B, A)
    expected = [torch.randn(flat)]
    expected.append(torch.randn(flat) if compat and cloning else None)
    expected.append(torch.randn(many if maximum else flat))
    expected.append(torch.empty(many).uniform_(-1, 1))
    expected += [torch.randn(many), torch.randn(many)]
    names = ("policy", "cloning", "backup", "uniform", "current", "following")
    assert drawn._fields == names
    for name, ours, theirs in zip(names, drawn, expected, strict=True):
        same = ours is None if theirs is None else torch.equal(ours, theirs)
        assert same, name
    assert torch.equal(torch.get_rng_state(), after)  # and not a number more


@pytest.mark.parametrize("kept", [0, 2, B])
def test_a_gap_of_weight_zero_is_not_drawn_for(kept):
    trainer = make(dare_cal_ql, torch.float32)
    drawn = trainer._noise(torch.zeros(B, A), False, hard_release(B, kept))
    assert drawn.policy.shape == drawn.backup.shape == (B, A)
    for field in (drawn.uniform, drawn.current, drawn.following):
        assert field.shape == (kept, N, A)
    soft = trainer._noise(torch.zeros(B, A), False, Release(torch.ones(B)))
    assert soft.uniform.shape == (B, N, A)


def test_dare_iql_draws_from_its_own_stream():
    trainer = make(dare_iql, torch.float32, dare={"backup_actions": 4}, seed=0)
    twin = copy.deepcopy(trainer.dare_generator.get_state())
    before = torch.get_rng_state()
    noise = trainer._noise(torch.zeros(B, A))
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator()
    generator.set_state(twin)
    assert torch.equal(noise, torch.randn(1 + 4, B, A, generator=generator))


# ---------------------------------------------------------------- what a release does

VALUES = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12)


def two_losses(values):
    first = torch.tensor(values, dtype=DOUBLE)
    return first, first.flip(0) * 0.5 + 1.0


@given(VALUES, st.integers(0, 12))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_a_hard_release_keeps_the_leading_rows(values, kept):
    """Also where no row is kept, and where all are."""
    kept = min(kept, len(values))
    conservative, released = two_losses(values)
    release = Release((torch.arange(len(values)) < kept).double(), kept)
    w = release.weight
    keep = release.keep(conservative[:kept])
    mix = release.mix(conservative, released[kept:])
    assert torch.equal(keep, w * conservative)
    assert torch.equal(mix, w * conservative + (1 - w) * released)
    # The same weights without the number of kept rows.
    soft = Release(w)
    assert torch.equal(soft.keep(conservative), keep)
    assert torch.equal(soft.mix(conservative, released), mix)


@given(VALUES, st.integers(0, 10_000))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_a_soft_release_weighs_every_row(values, seed):
    conservative, released = two_losses(values)
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(len(values), generator=generator, dtype=DOUBLE)
    release = Release(w)
    assert release.kept is None
    torch.testing.assert_close(release.keep(conservative), w * conservative)
    expected = [
        w[i].item() * conservative[i].item() + (1 - w[i].item()) * released[i].item()
        for i in range(len(values))
    ]
    mixed = release.mix(conservative, released)
    torch.testing.assert_close(mixed, torch.tensor(expected, dtype=DOUBLE))


@pytest.mark.parametrize("kept", [0, 2, B])
def test_what_is_not_kept_may_be_nan(kept):
    """Neither the losses nor their gradients know of it; a weight of 0 would spread it."""
    values = torch.where(torch.arange(B) < kept, 1.5, torch.nan).double()
    conservative = values.clone().requires_grad_(True)
    released = torch.full((B - kept,), 2.0, dtype=DOUBLE)
    release = Release((torch.arange(B) < kept).double(), kept)
    mixed = release.mix(conservative, released)
    mixed.sum().backward()
    assert mixed.tolist() == [1.5] * kept + [2.0] * (B - kept)
    assert conservative.grad.tolist() == [1.0] * kept + [0.0] * (B - kept)
    if kept < B:
        everywhere = Release(release.weight).mix(values, torch.ones(B, dtype=DOUBLE))
        assert everywhere.isnan().any()


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_a_released_row_with_an_unknown_return_trains_on(kept):
    """Cal-QL's bound is a number of the conservative loss; a released row needs none."""
    trainer, other = (make(dare_cal_ql, torch.float32) for _ in range(2))
    batch = batch_of(dare_cal_ql, dtype=torch.float32)
    unknown = [x.clone() for x in batch]
    unknown[5][kept:] = torch.nan
    torch.manual_seed(1)
    trainer.train(batch, hard_release(B, kept))
    torch.manual_seed(1)
    logs = other.train(unknown, hard_release(B, kept))
    for name, network in networks(other).items():
        for key, value in network.state_dict().items():
            assert torch.isfinite(value).all(), (name, key)
            assert torch.equal(value, getattr(trainer, name).state_dict()[key])
    assert torch.isfinite(logs["cql_min_qf1_loss"])
