"""TD3+BC(SA) and CQL(SA): updates against float64 oracles, degenerate cases, trusted rows."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_ssar import OracleCQLSA, OracleFilter, OracleTD3BCSA
from short_runs import checkpoint_of, folder_of, opened_parts, run
from test_iql import TASK, A, B, S, random_batch

from adaptive_regularization import coefficient, trust
from adaptive_regularization.iql_filter import IQLFilter
from algorithms import cql, cql_sa, td3_bc, td3_bc_sa
from corl.buffers import ReplayBuffer, upload
from corl.compiled import descend, soft_update

# The coefficient and the threshold move within a few updates.
QUICK = {"beta_lr": 1e-3, "n_period": 4, "n_raises": 5}
CQL_NETS = {"q_n_hidden_layers": 2, "cql_n_actions": 3}
NETWORKS = {
    td3_bc_sa: ("actor", "critic_1", "critic_2"),
    cql_sa: ("actor", "critic_1", "critic_2"),
}


@pytest.fixture(autouse=True)
def narrow_coefficient(monkeypatch):
    """A coefficient network of 32 units: its formula does not depend on the width."""
    small = partial(coefficient.CoefficientNet, hidden_dim=32)
    for module in (td3_bc_sa, cql_sa):
        monkeypatch.setattr(module, "CoefficientNet", small)


def make(module, seed=0, max_action=1.0, **fields):
    config = module.TrainConfig(env=TASK, **fields)
    torch.manual_seed(seed)
    return module.make_trainer(config, S, A, max_action, "cpu"), config


def flags(rng, share=0.6):
    return torch.tensor(rng.random(B) < share).float()


def next_noise(trainer, batch, *flags):
    """The noise of the next update; the global stream stays where it is."""
    stream = torch.get_rng_state()
    noise = trainer._noise(batch[1], *flags)
    torch.set_rng_state(stream)
    return noise


def assert_near(network, expected, tolerance=2e-5, where=""):
    for key, value in network.state_dict().items():
        gap = (value.double() - expected[key]).abs().max().item()
        assert gap < tolerance, f"{where}.{key} is off by {gap}"


TD3_CASES = {
    "published": {},
    "seldom, wide": {"policy_freq": 3, "policy_noise": 0.9, "alpha": 0.5},
    "penalty on all": {"trust_penalty": False, "delta": 0.4, "n_end": 9.0},
}


@pytest.mark.parametrize("max_action", [1.0, 2.0])
@pytest.mark.parametrize("case", TD3_CASES)
def test_td3_bc_sa_updates_equal_the_float64_oracle(case, max_action):
    trainer, config = make(td3_bc_sa, max_action=max_action, **QUICK, **TD3_CASES[case])
    oracle = OracleTD3BCSA(trainer, config, max_action)
    rng = np.random.default_rng(1)
    for number in range(16):
        if number == 12:
            trainer.start_online(config.policy_freq)
            trainer.decay = 0.3
        batch, trusted = random_batch(rng), flags(rng)
        noise = next_noise(trainer, batch)
        logs = trainer.train([*batch, trusted[:, None]])
        loss = oracle.train(batch, noise, trusted, trainer.decay, number < 12)
        if loss is not None:
            assert logs["actor_loss"].item() == pytest.approx(loss, rel=2e-4, abs=1e-5)
    for name in NETWORKS[td3_bc_sa]:
        assert_near(getattr(trainer, name), oracle.now[name], where=name)
        target = getattr(trainer, f"{name}_target")
        assert_near(target, oracle.target[name], where=f"{name}_target")
    assert_near(trainer.beta, oracle.beta.now, where="beta")
    assert trainer.threshold.n.item() == pytest.approx(oracle.beta.n, rel=1e-6)
    assert bool(trainer.threshold.rising) is oracle.beta.rising


CQL_CASES = {
    "locomotion": {},
    "antmaze": {
        **{"cql_lagrange": True, "cql_target_action_gap": 0.8, "cql_alpha": 5.0},
        **{"cql_max_target_backup": True, "cql_clip_diff_min": -200.0},
        **{"actor_bc_weight": 0.5, "trust_penalty": False, "q2_n_hidden_layers": 1},
    },
    "paper": {"threshold_cap": float("inf"), "n_end": 1.2, "policy_lr": 1e-3},
}


@pytest.mark.parametrize("max_action", [1.0, 2.0])
@pytest.mark.parametrize("case", CQL_CASES)
def test_cql_sa_updates_equal_the_float64_oracle(case, max_action):
    fields = {**QUICK, **CQL_NETS, **CQL_CASES[case]}
    trainer, config = make(cql_sa, max_action=max_action, **fields)
    oracle = OracleCQLSA(trainer, config, A, max_action)
    rng = np.random.default_rng(1)
    for number in range(12):
        if number == 9:
            trainer.start_online()
            trainer.decay = 0.3
        batch, trusted = random_batch(rng), flags(rng)
        # At a bound the density has no value; the clip makes one.
        batch[1][0] = 1.0
        noise = next_noise(trainer, batch)
        logs = trainer.train([*batch, trusted[:, None]])
        loss = oracle.train(batch, noise, trusted, trainer.decay, number < 9)
        assert logs["policy_loss"].item() == pytest.approx(loss, rel=2e-4, abs=1e-4)
    for i, name in enumerate(("critic_1", "critic_2")):
        assert_near(getattr(trainer, name), oracle.q[i], where=name)
        assert_near(getattr(trainer, f"target_{name}"), oracle.target[i], where=name)
    assert_near(trainer.actor, oracle.actor, where="actor")
    assert_near(trainer.beta, oracle.beta.now, where="beta")
    for name, expected in oracle.scalars.items():
        value = getattr(trainer, name)().item()
        assert value == pytest.approx(expected.item(), abs=2e-5), name
    assert trainer.threshold.n.item() == pytest.approx(oracle.beta.n, rel=1e-6)
    assert bool(trainer.threshold.rising) is oracle.beta.rising


def test_the_filters_updates_equal_the_float64_oracle():
    torch.manual_seed(0)
    made = IQLFilter(S, A, descend, soft_update, 0.8, 0.9)
    oracle, rng = OracleFilter(made), np.random.default_rng(2)
    for _ in range(8):
        batch = random_batch(rng)
        logs = made.train(batch)
        value_loss, q_loss = oracle.train(batch)
        assert logs["filter_value_loss"].item() == pytest.approx(value_loss, rel=1e-4)
        assert logs["filter_q_loss"].item() == pytest.approx(q_loss, rel=1e-4)
    assert_near(made.critics, oracle.q, where="critics")
    assert_near(made.target_critics, oracle.target, where="target_critics")
    assert_near(made.value, oracle.v, where="value")
    s, a = batch[:2]
    worth = torch.minimum(*oracle.both(oracle.q, s.double(), a.double()))
    expected = worth >= oracle.values(oracle.v, s.double())
    assert torch.equal(made.trusted(s, a), expected) and 0 < expected.sum() < B


# ---------------------------------------------------------------- degenerate cases


def fix_beta(trainer, value):
    """beta(s) is the value everywhere, and stays."""
    trainer.beta.highest = 2.0 * value
    with torch.no_grad():
        for parameter in trainer.beta.parameters():
            parameter.zero_()
    for group in trainer.beta_optimizer.param_groups:
        group["lr"] = 0.0


def test_td3_bc_sa_with_a_fixed_coefficient_has_td3_bcs_gradient():
    """Up to the factor alpha: here Q is divided by it, there the distance is not multiplied."""
    ours, _ = make(td3_bc_sa, alpha=2.5)
    fix_beta(ours, 0.4)
    base = make(td3_bc, alpha=2.5)[0]
    for name in ("critic_1", "critic_2"):
        for kind in ("", "_target"):
            setattr(base, f"{name}{kind}", copy.deepcopy(getattr(ours, f"{name}{kind}")))
    base.actor.load_state_dict(ours.actor.state_dict())
    batch = random_batch(np.random.default_rng(0))
    batch[1].tanh_()
    out = ours.actor(batch[0])
    q, bc = ours.policy_losses(batch[0], batch[1], out)
    weights = ours.row_weights(ours.beta(batch[0]), torch.ones(B), torch.tensor(1.0))
    loss = q.mean() / q.detach().abs().mean() + (weights * bc).mean()
    found = torch.autograd.grad(loss, list(ours.actor.parameters()))
    q, bc = base.policy_losses(*batch[:2])
    loss = 2.5 * q.mean() / q.detach().abs().mean() + bc.mean()
    expected = torch.autograd.grad(loss, list(base.actor.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(2.5 * one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lagrange", [False, True])
def test_cql_sa_with_a_fixed_coefficient_is_cql_with_its_critics(lagrange):
    fields = {"cql_n_actions": 3, "cql_lagrange": lagrange, "cql_target_action_gap": 0.8}
    ours = make(cql_sa, cql_alpha=7.0, **fields)[0]
    fix_beta(ours, 7.0)
    base = make(cql, cql_alpha=7.0, **fields)[0]
    parts = ("critic_1", "critic_2", "target_critic_1", "target_critic_2", "actor")
    for part in parts:
        setattr(base, part, copy.deepcopy(getattr(ours, part)))
    for name, rate in (("critic_1", 3e-4), ("critic_2", 3e-4), ("actor", 3e-5)):
        made = torch.optim.Adam(getattr(base, name).parameters(), rate)
        setattr(base, f"{name}_optimizer", made)
    rng = np.random.default_rng(0)
    for seed in range(4):
        batch = random_batch(rng)
        batch[1].clamp_(-0.999, 0.999)
        for trainer in (ours, base):
            torch.manual_seed(seed)
            trainer.train(batch)
    for part in parts:
        expected = getattr(base, part).state_dict()
        # Of Adam's steps of 3e-4: mean(c x) and c mean(x) round differently.
        assert_near(getattr(ours, part), expected, 1e-5, part)
    assert ours.log_alpha_prime().item() == pytest.approx(base.log_alpha_prime().item())


@pytest.mark.parametrize("module", [td3_bc_sa, cql_sa])
def test_without_a_trusted_row_nothing_is_learned_and_nothing_regularized(module):
    """The coefficient stays, n stays, and the data's actions have no say in the penalty."""
    fields = {**QUICK, "n_period": 1} | (CQL_NETS if module is cql_sa else {})
    trainer, _ = make(module, **fields)
    before = copy.deepcopy(trainer.beta.state_dict())
    none = torch.zeros(B, 1)
    rng = np.random.default_rng(0)
    for _ in range(4):
        logs = trainer.train([*random_batch(rng), none])
    assert_equal(trainer.beta.state_dict(), before)
    assert trainer.threshold.n.item() == 1.0 and trainer.threshold.rising.item() == 1.0
    if module is cql_sa:
        assert logs["cql_min_qf1_loss"].item() == 0.0
    weights = trainer.row_weights(torch.ones(B), none[:, 0], torch.tensor(0.5))
    assert not weights.any()


@pytest.mark.parametrize("module", [td3_bc_sa, cql_sa])
def test_online_the_coefficient_and_the_threshold_stay(module):
    fields = QUICK | (CQL_NETS if module is cql_sa else {})
    trainer, config = make(module, **fields)
    if module is td3_bc_sa:
        trainer.start_online(1)
    else:
        trainer.start_online()
    before = copy.deepcopy((trainer.beta.state_dict(), trainer.threshold.state_dict()))
    rng = np.random.default_rng(0)
    for _ in range(4):
        trainer.train(random_batch(rng))
    assert_equal((trainer.beta.state_dict(), trainer.threshold.state_dict()), before)


# ---------------------------------------------------------------- parts


def test_the_coefficient_starts_near_its_base_and_stays_in_its_range():
    for seed in range(3):
        torch.manual_seed(seed)
        net = coefficient.CoefficientNet(17, 10.0)
        beta = net(torch.randn(500, 17))
        assert 8.0 < beta.mean() < 12.0 and 0 < beta.min() and beta.max() < 15.0
    assert [tuple(p.shape) for p in net.parameters()][::2] == [
        *((512, 17), (512, 512), (512, 512), (1, 512))
    ]
    assert 0 < net(1e6 * torch.randn(9, 17)).min() + 1e-9


def checks(threshold, gaps, count):
    for _ in range(count):
        threshold.check(gaps, torch.ones(len(gaps)), torch.tensor(1.0))
    return threshold.n.item()


def test_the_threshold_rises_in_ten_steps_and_stops_for_good():
    outside, inside = torch.full((4,), -1.0), torch.full((4,), 1.0)
    threshold = coefficient.Threshold(1.0, 3.0, 10)
    assert checks(threshold, outside, 1) == pytest.approx(1.2)
    assert checks(threshold, outside, 9) == pytest.approx(3.0)
    assert checks(threshold, outside, 5) == pytest.approx(3.0)
    threshold = coefficient.Threshold(1.0, 3.0, 10)
    assert checks(threshold, outside, 2) == pytest.approx(1.4)
    # Only the trusted rows count.
    mixed = torch.tensor([1.0, -9.0])
    threshold.check(mixed, torch.tensor([1.0, 0.0]), torch.tensor(0.0))
    assert threshold.rising.item() == 1.0
    threshold.check(mixed, torch.tensor([1.0, 0.0]), torch.tensor(1.0))
    assert threshold.rising.item() == 0.0
    assert checks(threshold, outside, 3) == pytest.approx(1.4) and inside.mean() > 0


def test_the_paper_raises_the_threshold_until_the_offline_phase_ends():
    config = cql_sa.TrainConfig(env=TASK)
    assert config.raises(1_000_000) == 10
    config = cql_sa.TrainConfig(env=TASK, n_raises=None)
    assert (config.raises(1_000_000), config.raises(10)) == (20, 1)


@given(st.integers(-9, 10**6), st.integers(1, 10**6))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_the_annealing_falls_from_one_to_zero_and_not_below(steps, length):
    for shape in ("linear", "cosine"):
        now = coefficient.annealing(steps, length, shape)
        assert 0.0 <= now <= 1.0
        assert coefficient.annealing(steps + 1, length, shape) <= now
    assert coefficient.annealing(steps, length, "none") == 1.0
    assert coefficient.annealing(0, length, "linear") == 1.0
    assert coefficient.annealing(250_000, 400_000, "linear") == pytest.approx(0.375)
    assert coefficient.annealing(250_000, 400_000, "cosine") == pytest.approx(
        0.5556, abs=1e-4
    )


NUMBERS = np.array([0, 0, 1, 1, 1, 2, 3, 3])
REWARDS = np.array([1.0, 2.0, 0.0, 0.0, 1.0, 5.0, -1.0, 0.0])  # returns 3, 1, 5, -1


def rows(found):
    return np.flatnonzero(found).tolist()


def test_rows_are_chosen_by_the_returns_of_their_trajectories():
    assert rows(trust.above_return(NUMBERS, REWARDS, 2.5)) == [0, 1, 5]
    # A return that equals the threshold does not pass.
    assert rows(trust.above_return(NUMBERS, REWARDS, 3.0)) == [5]
    assert rows(trust.above_return(NUMBERS, REWARDS, 5.0)) == []
    assert rows(trust.best_trajectories(NUMBERS, REWARDS, 1)) == [5]
    assert rows(trust.best_share(NUMBERS, REWARDS, 0.25)) == [5]
    assert rows(trust.best_share(NUMBERS, REWARDS, 0.26)) == [0, 1, 5]
    assert trust.best_share(NUMBERS, REWARDS, 1.0).all()
    assert rows(trust.successful(NUMBERS, REWARDS, 0.0)) == [0, 1, 2, 3, 4, 5]
    # Returns 2, 3, 1, 2: of equal ones the earlier is taken.
    assert rows(trust.best_trajectories(NUMBERS, np.ones(8), 2)) == [0, 1, 2, 3, 4]


def buffer(count, capacity=20):
    made = ReplayBuffer(1, 1, capacity)
    if count:
        numbers = np.arange(count, dtype=np.float32)
        fields = {k: numbers[:, None] for k in ("observations", "next_observations")}
        fields |= {"actions": np.zeros((count, 1), np.float32), "terminals": numbers * 0}
        made.load_d4rl_dataset({**fields, "rewards": REWARDS.astype(np.float32)})
    return made


def trusted_rows(self_collected=False, capacity=20, **fields):
    config = td3_bc_sa.TrainConfig(env=TASK, online_iterations=9, **fields)
    offline = buffer(8, capacity)
    online = offline if config.mixing_ratio is None else buffer(0, capacity)
    return trust.TrustedRows(
        *(config, offline, online, lambda purpose: (NUMBERS, REWARDS), 0.0),
        *(self_collected, capacity, "cpu", upload),
    )


def started(**fields):
    """A run's rows at the beginning of its online phase, and the flags of the online places."""
    made = trusted_rows(trust_return=2.5, **fields)
    made.settle(None, lambda line: None, pytest.fail)
    made.start_online()
    made.flag_online()
    return made, rows(made._online.flags[:, 0].numpy() == 0)


def test_published_returns_are_for_d4rls_data_and_stand_ins_use_a_share():
    chosen = {"trust_return": 2.5, "trust_share": 0.25}
    assert rows(trusted_rows(**chosen).flags.numpy()) == [0, 1, 5]
    stand_in = trusted_rows(self_collected=True, **chosen)
    assert rows(stand_in.flags.numpy()) == [5]
    assert "the best 0.25 of the trajectories, as trust_return" in stand_in.describe()
    assert "1 of 8 rows (12.5%)" in stand_in.describe()
    literal = trusted_rows(self_collected=True, trust_return=2.5, trust_share=None)
    assert rows(literal.flags.numpy()) == [0, 1, 5]
    assert rows(trusted_rows(trust_by="success").flags.numpy()) == [0, 1, 2, 3, 4, 5]
    assert trusted_rows(trust_by="all").flags.all()


def test_an_empty_set_is_a_warning():
    said, warned = [], []
    made = trusted_rows(trust_return=9.0)
    made.settle(None, said.append, warned.append)
    assert "trusted: 0 of 8 rows (0.0%)" in said[0]
    assert "no row is trusted" in warned[0] and "have no penalty" in warned[0]
    made = trusted_rows(trust_return=9.0, trust_penalty=False)
    made.settle(None, said.append, warned.append)
    assert "penalty" not in warned[1]


def test_the_four_buffer_modes_start_with_what_they_say():
    everything, unflagged = started(buffer_mode="all")
    assert unflagged == [2, 3, 4, 6, 7]
    np.random.seed(0)
    states, trusted = (everything.sample(64)[i][:, 0].numpy() for i in (0, 5))
    assert set(states) <= set(range(8)) and trusted.shape == (64,)
    half, unflagged = started(buffer_mode="half")
    assert unflagged == [] and half._buffers[1]._size == 0
    half._buffers[1].take(half._buffers[0], np.array([7, 7]))
    np.random.seed(0)
    batch = half.sample(64)
    expected = np.isin(batch[0][:32, 0].numpy(), [0, 1, 5])
    np.testing.assert_array_equal(batch[5][:32, 0].numpy(), expected)
    assert (batch[0][32:] == 7).all() and (batch[5][32:] == 1).all()
    empty, unflagged = started(buffer_mode="none")
    assert unflagged == [] and empty._buffers[1]._size == 0
    # The two best trajectories, 2 and 0, are rows 0, 1 and 5, in the dataset's order.
    best, unflagged = started(buffer_mode="part", part_trajectories=2)
    assert best._buffers[1].rows()[0][:, 0].tolist() == [0, 1, 5]
    # The public code leaves the flags of the rows that new ones will overwrite.
    assert unflagged == [3, 4, 6, 7]
    _, unflagged = started(part_trajectories=3, online_trust="all")
    assert unflagged == [2, 3, 4]
    part, unflagged = started(part_rows="trusted", online_trust="all")
    assert part._buffers[1].rows()[0][:, 0].tolist() == [0, 1, 5] and unflagged == []


def test_a_batch_carries_the_flags_of_its_rows():
    made = trusted_rows(trust_return=2.5)
    np.random.seed(1)
    batch = made.offline.sample(40)
    expected = np.isin(batch[0][:, 0].numpy(), [0, 1, 5])
    np.testing.assert_array_equal(batch[5][:, 0].numpy(), expected)
    five, flagged = trust.split(batch)
    assert len(five) == 5 and torch.equal(flagged, batch[5][:, 0])
    assert trust.split(five)[1].tolist() == [1.0] * 40


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"buffer_mode": "all"}, "buffer_mode all .* set it to at least 17"),
        ({"part_trajectories": 2, "capacity": 11}, "buffer_mode part .* at least 12"),
    ],
)
def test_a_buffer_that_would_wrap_is_refused(fields, message):
    with pytest.raises(ValueError, match=f"buffer_size .*{message}"):
        trusted_rows(**{"capacity": 16, **fields})
    trusted_rows(**{**fields, "capacity": 17})


@pytest.mark.parametrize("module", [td3_bc_sa, cql_sa])
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_end": 0.5}, "n_end 0.5 lies below n_start 1.0"),
        ({"trust_share": None}, "needs trust_return .* or trust_share; set one"),
        ({"trust_share": 0.0}, r"trust_share must lie in \(0, 1\], not 0.0"),
        ({"trust_by": "luck"}, "trust_by 'luck' is not one of return, iql"),
        ({"mixing_ratio": 0.25}, "belongs to buffer_mode half, not to part"),
        ({"buffer_mode": "half", "batch_size": 5}, "batch_size 5 cannot be split"),
        ({"beta_anneal": "step"}, "beta_anneal 'step' is not one of linear, cosine"),
    ],
)
def test_bad_settings_name_the_field(module, fields, message):
    with pytest.raises(ValueError, match=message):
        module.TrainConfig(**{"env": TASK, **fields})


# ---------------------------------------------------------------- runs

SHORT = {"offline_iterations": 6, "online_iterations": 6, "eval_freq": 6}
SHORT |= {"n_episodes": 1, "log_freq": 2, "batch_size": 16}


def test_load_model_brings_the_coefficient_the_threshold_and_the_filter(
    tmp_path, monkeypatch
):
    """A run that only fine-tunes has the flags that the filter of the offline run gives."""
    first, second = tmp_path / "a", tmp_path / "b"
    chosen = {"trust_by": "iql", "filter_updates": 300, "discount": 0.0}
    run(
        td3_bc_sa,
        first,
        monkeypatch,
        **{**SHORT, **chosen, "online_iterations": 0},
        checkpoints_path=str(tmp_path / "corl"),
    )
    model = {"load_model": str(tmp_path / "corl" / "checkpoint_5.pt")}
    alone = {**SHORT, **chosen, **model, "offline_iterations": 0}
    run(td3_bc_sa, second, monkeypatch, **alone)
    one, two = (checkpoint_of(x)["parts"] for x in (first, second))
    for part in ("beta", "threshold", "chosen_by"):
        assert_equal(one["trainer"][part], two["trainer"][part], part)
    assert_equal(one["trusted_rows"], two["trusted_rows"])
    kept = one["trusted_rows"]["flags"]
    assert 0 < int(kept.sum()) < len(kept)


@pytest.mark.parametrize("module", [td3_bc_sa, cql_sa])
def test_a_run_says_what_it_trusts_and_an_empty_set_stands_in_its_summary(
    module, tmp_path, monkeypatch, capsys
):
    fields = {**SHORT, "trust_return": 1e6, "trust_share": None}
    summary = run(module, tmp_path, monkeypatch, **fields)
    (warning,) = summary["warnings"]
    shown = capsys.readouterr().out
    assert f"warning: {warning}" in shown and "no row is trusted" in warning
    assert "trusted: 0 of 4000 rows" in shown
    assert "trusted" in (folder_of(tmp_path) / "metrics.csv").read_text()


def test_returns_are_raw_whatever_rewards_are_trained_on(tmp_path, monkeypatch):
    """Thresholds of a run that scales its rewards choose the same rows."""
    chosen = {"trust_return": -1.0, "trust_share": None}
    found = []
    for more in (
        {},
        {"normalize_reward": True, "reward_scale": 3.0, "reward_bias": -2.0},
    ):
        parts = opened_parts(cql_sa, tmp_path, monkeypatch, **chosen, **more)
        found.append(parts["trusted_rows"].flags)
    assert torch.equal(*found) and 0 < int(found[0].sum()) < len(found[0])
