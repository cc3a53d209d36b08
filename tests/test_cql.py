"""CQL, Cal-QL and their DARE twins: updates against a float64 oracle, returns to go, checkpoints.

With CORL_DIR set to CORL's folder the oracle is held against upstream's own files, too.
"""

import copy
import inspect
import itertools
import math
import os
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kinds import with_slow
from oracle_cql import OracleCQL, Settings, returns_to_go

from algorithms import cal_ql, cql, dare_cal_ql, dare_cql
from benchmarks import parity
from corl import checkpoints, tasks
from corl.data import sources
from corl_dare.hook import Release

S, A, B, WIDTH = 5, 2, 12, 24
OWN_SETTINGS = {"max_action", "no_tanh", "calibrated", "resampled_bc", "lagrange_gap"}
TASK = "hopper-medium-v2"
PARTS = ("critic_1", "critic_2", "target_critic_1", "target_critic_2", "actor")
SCALARS = ("log_alpha", "log_alpha_prime")
ALL = [cql, dare_cql, cal_ql, dare_cal_ql]
MC = [cal_ql, dare_cal_ql]
TWINS = {dare_cql: cql, dare_cal_ql: cal_ql}  # -> their baselines
every_twin = pytest.mark.parametrize("module", TWINS)
calibrated_or_not = pytest.mark.parametrize(
    "module, calibrated", [(dare_cql, False), (dare_cal_ql, False), (dare_cal_ql, True)]
)


def upstream(name):
    return parity.load(
        Path(os.environ["CORL_DIR"]) / "algorithms/finetune" / f"{name}.py"
    )


def narrow(net):
    """The same chain of layers, WIDTH wide: float64 rounding is all that is looked for."""
    linear = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
    sizes = [
        linear[0].in_features,
        *[WIDTH] * (len(linear) - 1),
        linear[-1].out_features,
    ]
    for i, layer in enumerate(linear):
        small = torch.nn.Linear(sizes[i], sizes[i + 1])
        layer.weight, layer.bias = small.weight, small.bias


def make_pair(module, n_hidden_layers=2, **flags):
    """A trainer with its nets made small, and the oracle that starts from them."""
    settings = Settings(target_entropy=-A, **flags)
    torch.manual_seed(0)
    critics = [
        module.FullyConnectedQFunction(S, A, True, n_hidden_layers) for _ in range(2)
    ]
    actor = module.TanhGaussianPolicy(
        S, A, settings.max_action, orthogonal_init=True, no_tanh=settings.no_tanh
    )
    for net in (critics[0].network, critics[1].network, actor.base_network):
        narrow(net)
    adam = lambda net, lr: torch.optim.Adam(net.parameters(), lr=lr)  # noqa: E731
    arguments = {
        f.name: getattr(settings, f.name)
        for f in fields(Settings)
        if f.name not in OWN_SETTINGS
    }
    kind = getattr(module, "CalQL", None) or module.ContinuousCQL
    # Upstream's module is no key of a table.
    if module in [*TWINS]:
        block = module.TrainConfig.__dataclass_fields__["dare"].default_factory
        arguments["dare"] = block(lagrange_gap=settings.lagrange_gap)
    if "compat" in inspect.signature(kind).parameters:
        arguments["compat"] = settings.resampled_bc
    trainer = kind(
        critic_1=critics[0],
        critic_1_optimizer=adam(critics[0], settings.qf_lr),
        critic_2=critics[1],
        critic_2_optimizer=adam(critics[1], settings.qf_lr),
        actor=actor,
        actor_optimizer=adam(actor, settings.policy_lr),
        device="cpu",
        **arguments,
    )
    if hasattr(trainer, "switch_calibration") and not settings.calibrated:
        trainer.switch_calibration()
    return trainer, OracleCQL(trainer, settings)


def random_batch(rng, with_returns):
    tensor = lambda x: torch.tensor(x, dtype=torch.float32)  # noqa: E731
    batch = [
        tensor(rng.normal(size=(B, S))),
        tensor(rng.uniform(-0.95, 0.95, (B, A))),
        tensor(rng.normal(size=(B, 1))),
        tensor(rng.normal(size=(B, S))),
        tensor(rng.random((B, 1)) < 0.2),
    ]
    if with_returns:
        batch.append(tensor(0.3 * rng.normal(size=(B, 1))))
    return batch


def assert_same(trainer, oracle, tolerance=2e-5):
    """Float32 rounding of 20 Adam steps of 3e-4: far below one step."""
    expected = dict(zip(PARTS, [*oracle.q, *oracle.target, oracle.actor], strict=True))
    for part in PARTS:
        for name, value in getattr(trainer, part).state_dict().items():
            gap = (value.double() - expected[part][name]).abs().max().item()
            assert gap < tolerance, f"{part}.{name} is off by {gap}"
    for name, expected in oracle.scalars.items():
        if getattr(trainer, name, None) is not None:
            value = getattr(trainer, name)().item()
            assert value == pytest.approx(expected.item(), abs=tolerance), name


def run_pair(trainer, oracle, updates, weights=None, seed=1, kept=None):
    """Both sides get the same batches and draws; every logged number is compared.

    With `kept` so many leading rows have weight 1 and the others 0.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    generator = torch.Generator()
    for _ in range(updates):
        batch = random_batch(rng, hasattr(trainer, "switch_calibration"))
        generator.set_state(torch.get_rng_state())
        drawn = oracle.draws(generator, B, A, kept)
        weight = None if weights is None else weights(rng)
        if kept is not None:
            weight = (torch.arange(B) < kept).float()
        release = () if weight is None else (Release(weight, kept),)
        logs = trainer.train(batch, *release)
        expected = oracle.train(batch, drawn, weight, kept)
        # Not a number more or less was drawn, and in the order of upstream.
        assert torch.equal(generator.get_state(), torch.get_rng_state())
        for name, value in expected.items():
            ours = float(logs[name])
            assert ours == pytest.approx(value, rel=2e-4, abs=2e-5), name
        assert set(logs) == set(expected)
    return expected


CASES = {
    "defaults": {},
    "antmaze": {
        "cql_lagrange": True,
        "cql_target_action_gap": 0.8,
        "cql_max_target_backup": True,
        "cql_clip_diff_min": -200.0,
        "n_hidden_layers": 5,
        "policy_lr": 1e-4,
    },
    "fixed entropy": {"use_automatic_entropy_tuning": False, "alpha_multiplier": 0.5},
    "entropy in the backup": {"backup_entropy": True, "alpha_multiplier": 2.0},
    "entropy in the max backup": {"backup_entropy": True, "cql_max_target_backup": True},
    "no importance sampling": {"cql_importance_sample": False, "cql_temp": 0.5},
    "temperature": {"cql_temp": 2.0, "cql_n_actions": 3, "cql_lagrange": True},
    "clipped gaps": {"cql_clip_diff_min": 2.4, "cql_clip_diff_max": 2.7},
    "warm-up": {"bc_steps": 8},
    "slow targets": {"target_update_period": 3, "soft_target_update_rate": 0.1},
    "wide actions": {"max_action": 2.0, "discount": 0.9},
    "no tanh": {"no_tanh": True},
}


def run_all(module, flags, weights=None):
    """Eight updates, in Cal-QL half of them calibrated."""
    with_returns = hasattr(module, "CalQL")
    trainer, oracle = make_pair(module, calibrated=with_returns, **flags)
    run_pair(trainer, oracle, 4, weights, seed=1)
    if with_returns:
        trainer.switch_calibration()
        oracle.settings.calibrated = False
    run_pair(trainer, oracle, 4, weights, seed=2)
    assert_same(trainer, oracle)


def hard_or_soft_weights(rng):
    weight = rng.random(B)
    if rng.random() < 0.5:
        weight = weight < 0.5
    return torch.tensor(weight, dtype=torch.float32)


@pytest.mark.optional("corl")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["cql", "cal_ql"])
def test_the_oracle_is_upstream(name, case):
    run_all(upstream(name), CASES[case])


# Where a weight per row meets a loss of another form.
WEIGHTED = ("defaults", "antmaze", "clipped gaps", "no importance sampling")
PLAIN = [(module, case) for module in TWINS.values() for case in CASES]
SOFT = [(module, case) for module in TWINS for case in WEIGHTED]


@pytest.mark.parametrize(
    "module, case", with_slow([*PLAIN, *SOFT], itertools.product(ALL, CASES))
)
def test_updates_equal_the_float64_oracle(module, case):
    weights = hard_or_soft_weights if module in TWINS else None
    run_all(module, CASES[case], weights)


KEPT = [
    *((dare_cal_ql, case, B // 2) for case in CASES),
    *((dare_cal_ql, case, kept) for case in ("defaults", "antmaze") for kept in (1, B)),
    *((dare_cql, case, B // 2) for case in ("defaults", "antmaze")),
]


@pytest.mark.parametrize(
    "module, case, kept",
    with_slow(KEPT, itertools.product(TWINS, CASES, (1, B // 2, B))),
)
def test_gaps_of_kept_rows_alone_equal_the_float64_oracle(module, case, kept):
    """What would be multiplied by 0 is not computed; Cal-QL's calibrated, then not."""
    trainer, oracle = make_pair(module, calibrated=module in MC, **CASES[case])
    run_pair(trainer, oracle, 4, seed=1, kept=kept)
    if module in MC:
        trainer.switch_calibration()
        oracle.settings.calibrated = False
    run_pair(trainer, oracle, 4, seed=2, kept=kept)
    assert_same(trainer, oracle)


@pytest.mark.parametrize("kept", [None, B // 2])
@pytest.mark.parametrize("lagrange_gap", ["literal", "weighted"])
@pytest.mark.parametrize("target", [0.8, -1.0])
@every_twin
def test_both_gaps_of_the_multiplier_equal_the_float64_oracle(
    module, target, lagrange_gap, kept
):
    flags = {"cql_target_action_gap": target, "lagrange_gap": lagrange_gap}
    trainer, oracle = make_pair(module, cql_lagrange=True, qf_lr=1e-3, **flags)
    run_pair(trainer, oracle, 4, hard_or_soft_weights, kept=kept)
    # Adam's steps of 1e-3 add up more rounding.
    assert_same(trainer, oracle, 6e-5)


def gap_where_the_multiplier_rests(trainer, weight):
    """The gap g, the same in all rows, at which the gradient of log alpha' is 0."""
    slopes = []
    for gap in (0.0, 1.0):
        diffs = [weight.mean() * gap] * 2
        _, loss = trainer._penalties(diffs, {}, Release(weight))
        (slope,) = torch.autograd.grad(loss, [trainer.log_alpha_prime()])
        slopes.append(slope.item())
    return slopes[0] / (slopes[0] - slopes[1])


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("target", [0.8, -1.0])
@every_twin
def test_a_uniform_weight_moves_the_literal_fixed_point_and_not_the_weighted_one(
    module, target, share
):
    """target / w, whatever its sign: a negative target is asked for more by released rows."""
    flags = {"cql_lagrange": True, "cql_target_action_gap": target}
    weight = torch.full((B,), share)
    for lagrange_gap, expected in (("literal", target / share), ("weighted", target)):
        trainer, _ = make_pair(module, lagrange_gap=lagrange_gap, **flags)
        found = gap_where_the_multiplier_rests(trainer, weight)
        assert found == pytest.approx(expected, rel=1e-5)


@every_twin
def test_where_all_rows_are_released_only_the_weighted_multiplier_rests(module):
    for lagrange_gap in ("literal", "weighted"):
        flags = {"cql_lagrange": True, "lagrange_gap": lagrange_gap}
        trainer, _ = make_pair(module, **flags)
        train_on_noise(trainer, torch.zeros(B))
        rests = trainer.log_alpha_prime().item() == 1.0
        assert rests is (lagrange_gap == "weighted")


def test_the_defaults_are_the_papers_form_and_the_one_that_releases():
    assert dare_cal_ql.DareCalQLConfig().lagrange_gap == "literal"
    assert dare_cql.DareCQLConfig().lagrange_gap == "weighted"
    for block in (dare_cal_ql.DareCalQLConfig, dare_cql.DareCQLConfig):
        with pytest.raises(ValueError, match="dare.lagrange_gap must be one of literal"):
            block(lagrange_gap="soft")


@pytest.mark.parametrize("module", ALL)
def test_warm_up_clones_the_actions_of_the_data(module):
    trainer, oracle = make_pair(module, bc_steps=5, resampled_bc=False, max_action=1.5)
    run_pair(trainer, oracle, 8)
    assert_same(trainer, oracle)


number = st.floats(0.1, 2.0).map(lambda x: round(x, 3))
FLAGS = {
    "use_automatic_entropy_tuning": st.booleans(),
    "backup_entropy": st.booleans(),
    "cql_importance_sample": st.booleans(),
    "cql_lagrange": st.booleans(),
    "lagrange_gap": st.sampled_from(["literal", "weighted"]),
    "cql_max_target_backup": st.booleans(),
    "resampled_bc": st.booleans(),
    "calibrated": st.booleans(),
    "no_tanh": st.booleans(),
    "bc_steps": st.integers(0, 2),
    "target_update_period": st.integers(1, 2),
    "cql_n_actions": st.integers(1, 4),
    "n_hidden_layers": st.integers(1, 3),
    "cql_target_action_gap": st.floats(-1.0, 5.0),
    "cql_clip_diff_min": st.sampled_from([-math.inf, -200.0, 2.0]),
    "cql_clip_diff_max": st.sampled_from([math.inf, 3.0]),
    "alpha_multiplier": number,
    "cql_temp": number,
    "cql_alpha": number,
}


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.fixed_dictionaries(FLAGS), st.sampled_from(ALL))
def test_any_combination_of_flags_equals_the_oracle(flags, module):
    # The entropy and the cloning term of a new sample cancel there: the gradient is rounding, of
    # which Adam makes whole steps.
    assume(not flags["resampled_bc"] or flags["alpha_multiplier"] != 1.0)
    flags["calibrated"] &= module in MC
    weights = hard_or_soft_weights if module in TWINS else None
    trainer, oracle = make_pair(module, **flags)
    run_pair(trainer, oracle, 3, weights)
    assert_same(trainer, oracle)


# ---------------------------------------------------------------- weights


def train_on_noise(trainer, weight=None, updates=5, change=lambda batch: batch):
    """Updates on batches and draws that are the same in every call; the last log."""
    rng = np.random.default_rng(3)
    torch.manual_seed(3)
    for _ in range(updates):
        batch = change(random_batch(rng, hasattr(trainer, "switch_calibration")))
        logs = trainer.train(batch, *(() if weight is None else (Release(weight),)))
    return logs


def assert_bits_equal(one, two):
    for part in (*PARTS, *SCALARS):
        states = getattr(one, part).state_dict(), getattr(two, part).state_dict()
        assert list(states[0]) == list(states[1])
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), f"{part}.{name}"


@pytest.mark.parametrize("case", ["defaults", "antmaze", "clipped gaps"])
@pytest.mark.parametrize("lagrange_gap", ["literal", "weighted"])
@calibrated_or_not
def test_weight_one_everywhere_is_the_baseline_bit_for_bit(
    module, lagrange_gap, case, calibrated
):
    flags = {**CASES[case], "calibrated": calibrated}
    plain, _ = make_pair(TWINS[module], **flags)
    flags["lagrange_gap"] = lagrange_gap
    none, ones = (make_pair(module, **flags)[0] for _ in range(2))
    expected = train_on_noise(plain)
    logs = train_on_noise(none), train_on_noise(ones, torch.ones(B))
    for trainer, got in zip((none, ones), logs, strict=True):
        assert_bits_equal(plain, trainer)
        got.pop("conservative_loss", None)  # of a release alone
        assert {k: v.item() for k, v in got.items()} == {
            k: v.item() for k, v in expected.items()
        }


@calibrated_or_not
def test_weight_zero_everywhere_leaves_the_td_step(module, calibrated):
    released, _ = make_pair(module, calibrated=calibrated)
    _, oracle = make_pair(module, calibrated=calibrated, cql_alpha=0.0)
    rng = np.random.default_rng(4)
    generator = torch.Generator().manual_seed(4)
    torch.manual_seed(4)
    for _ in range(8):
        batch = random_batch(rng, module in MC)
        drawn = oracle.draws(generator, B, A)
        logs = released.train(batch, Release(torch.zeros(B)))
        oracle.train(batch, drawn)
        assert logs["cql_qf1_diff"] == logs["cql_min_qf2_loss"] == 0.0
    assert_same(released, oracle)


@pytest.mark.parametrize("case", ["defaults", "antmaze", "clipped gaps"])
def test_weight_zero_everywhere_is_cql_with_alpha_zero_bit_for_bit(case):
    """With a learned multiplier, too, in the form that dare_cql has by default."""
    flags = {**CASES[case], "lagrange_gap": dare_cql.DareCQLConfig().lagrange_gap}
    released, _ = make_pair(dare_cql, **flags)
    plain, _ = make_pair(cql, **flags, cql_alpha=0.0)
    train_on_noise(released, torch.zeros(B))
    train_on_noise(plain)
    assert_bits_equal(released, plain)


@every_twin
def test_the_mean_is_over_the_whole_batch(module):
    """Half a weight is half of cql_alpha: both are the same bits, as 1/2 is exact."""
    halved, _ = make_pair(module, cql_alpha=4.0, cql_clip_diff_max=2.5)
    plain, _ = make_pair(module, cql_alpha=2.0, cql_clip_diff_max=2.5)
    train_on_noise(halved, torch.full((B,), 0.5))
    train_on_noise(plain)
    assert_bits_equal(halved, plain)


@pytest.mark.parametrize("bound", [-math.inf, 50.0])
def test_the_bound_of_a_released_row_is_not_used(bound):
    weight = (torch.arange(B) % 3 > 0).float()

    def other_bounds(batch):
        batch[5] = torch.where(weight[:, None] > 0, batch[5], bound)
        return batch

    one, two = (make_pair(dare_cal_ql, calibrated=True)[0] for _ in range(2))
    train_on_noise(one, weight)
    train_on_noise(two, weight, change=other_bounds)
    assert_bits_equal(one, two)


@pytest.mark.parametrize("module", MC)
def test_a_return_of_minus_infinity_is_no_bound(module):
    def unbounded(batch):
        return [*batch[:5], torch.full((B, 1), -math.inf)]

    calibrated, plain = (make_pair(module, calibrated=c)[0] for c in (True, False))
    logs = train_on_noise(calibrated, change=unbounded)
    train_on_noise(plain)
    assert_bits_equal(calibrated, plain)
    assert logs["bound_rate_cql_q1_next_actions"] == 0.0
    assert all(torch.isfinite(value) for value in logs.values())


# ---------------------------------------------------------------- trainers


@pytest.mark.parametrize("module", ALL)
@pytest.mark.parametrize("case", ["defaults", "antmaze"])
def test_an_update_changes_every_trainable_and_no_frozen_weight(module, case):
    trainer, _ = make_pair(module, **CASES[case])
    before = {k: copy.deepcopy(getattr(trainer, k)) for k in (*PARTS, *SCALARS)}
    train_on_noise(trainer, updates=1)
    for name, old in before.items():
        frozen = name == "log_alpha_prime" and not trainer.cql_lagrange
        for p, q in zip(
            getattr(trainer, name).parameters(), old.parameters(), strict=True
        ):
            assert torch.equal(p, q) is frozen, name
            assert p.requires_grad is not name.startswith("target")


@pytest.mark.parametrize("module", ALL)
def test_starting_online_sets_the_weight_and_ends_calibration(module):
    trainer, _ = make_pair(module, calibrated=module in MC)
    for _ in range(2):  # once more changes nothing
        trainer.start_online(1.5)
        assert trainer.cql_alpha == 1.5
        assert not getattr(trainer, "_calibration_enabled", False)


@pytest.mark.parametrize("module", ALL)
def test_what_the_switch_changed_comes_back_with_the_whole_state_alone(module):
    """A checkpoint of a run holds the phase; weights from elsewhere start a new run."""
    trainer, _ = make_pair(module, calibrated=module in MC)
    trainer.start_online(1.5)
    resumed, started = (
        make_pair(module, calibrated=module in MC, cql_alpha=5.0)[0] for _ in range(2)
    )
    resumed.load_state_dict(trainer.state_dict())
    started.load_weights(trainer.state_dict())
    assert (resumed.cql_alpha, started.cql_alpha) == (1.5, 5.0)
    if module in MC:
        assert not resumed._calibration_enabled and started._calibration_enabled


UPSTREAM_KEYS = {
    "actor",
    "critic1",
    "critic2",
    "critic1_target",
    "critic2_target",
    "critic_1_optimizer",
    "critic_2_optimizer",
    "actor_optim",
    "sac_log_alpha",
    "sac_log_alpha_optim",
    "cql_log_alpha",
    "cql_log_alpha_optim",
    "total_it",
}


@pytest.mark.parametrize("module", ALL)
@pytest.mark.parametrize("tuned", [True, False])
def test_checkpoint_keys_are_corls(module, tuned):
    config = module.TrainConfig(env=TASK, use_automatic_entropy_tuning=tuned)
    state = module.make_trainer(config, S, A, 1.0, "cpu").state_dict()
    ours = {"cql_alpha"} | ({"calibration"} if module in MC else set())
    assert set(state) == UPSTREAM_KEYS | ours  # and what the switch online changes
    assert list(state["critic1"]) == [
        f"network.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
    ]
    assert list(state["actor"]) == [
        *(f"base_network.{i}.{k}" for i in (0, 2, 4, 6) for k in ("weight", "bias")),
        "log_std_multiplier.constant",
        "log_std_offset.constant",
    ]
    sizes = [tuple(p.shape) for p in state["critic2"].values() if p.dim() == 2]
    assert sizes == [(256, S + A), (256, 256), (1, 256)]
    assert len(state["actor_optim"]["param_groups"][0]["params"]) == 10


@pytest.mark.parametrize("module", ALL)
@pytest.mark.parametrize("case", ["antmaze", "fixed entropy"])
@pytest.mark.parametrize("corl_file", [False, True])
def test_a_loaded_trainer_goes_on_exactly(tmp_path, module, case, corl_file):
    trainer, _ = make_pair(module, **CASES[case])
    train_on_noise(trainer)
    state, path = trainer.state_dict(), tmp_path / "checkpoint_4.pt"
    if corl_file:  # the form that CORL's own scripts read
        checkpoints.save_corl_checkpoint(path, state)
        state = checkpoints.load_corl_checkpoint(path, UPSTREAM_KEYS)
    else:
        torch.save(state, path)
        state = torch.load(path, weights_only=True)
    other, _ = make_pair(module, **CASES[case])
    if corl_file:
        other.load_weights(state)
    else:
        other.load_state_dict(state)
    assert_bits_equal(trainer, other)
    before = {name: getattr(other, name)().item() for name in SCALARS}
    train_on_noise(trainer), train_on_noise(other)
    assert_bits_equal(trainer, other)
    assert other.total_it == 10
    for name, value in before.items():
        learned = case == "antmaze"
        assert (getattr(other, name)().item() != value) is learned, name


@pytest.mark.parametrize("module", [cql, cal_ql])
@pytest.mark.parametrize("compat", [False, True])
def test_multipliers_learn_on_after_load_model(tmp_path, monkeypatch, module, compat):
    """Upstream's stand still: its optimizers hold the parameters from before the load."""
    toy.install(monkeypatch, tmp_path)
    monkeypatch.setattr(sources, "resolve", lambda *a, **k: toy.make_dataset(40))

    def run(name, updates, **more):
        config = module.TrainConfig(
            env=toy.TASK,
            device="cpu",
            batch_size=8,
            buffer_size=5000,
            cql_n_actions=2,
            cql_lagrange=True,
            eval_freq=updates,
            n_episodes=1,
            compat=compat,
            checkpoints_path=str(tmp_path / name),
            runs_dir=str(tmp_path),
            offline_iterations=updates,
            online_iterations=0,
            threads=1,
            compile=False,
            **more,
        )
        module.train(config)
        path = tmp_path / name / f"checkpoint_{updates - 1}.pt"
        return path, checkpoints.load_corl_checkpoint(path)

    path, first = run("first", 3)
    _, second = run("second", 4, load_model=str(path))
    assert (first["total_it"], second["total_it"]) == (3, 7)
    for name in ("sac_log_alpha", "cql_log_alpha"):
        assert first[name]["constant"] not in (0.0, 1.0)
        stands_still = torch.equal(first[name]["constant"], second[name]["constant"])
        assert stands_still is compat, name
    for name, value in first["actor"].items():
        assert not torch.equal(value, second["actor"][name])


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("module", ALL)
def test_orthogonal_layers_have_gain_root_two_and_no_bias(module):
    torch.manual_seed(0)
    critic = module.FullyConnectedQFunction(S, A, True, 3)
    actor = module.TanhGaussianPolicy(S, A, 1.0, orthogonal_init=True)
    linear = [*critic.network[::2], *actor.base_network[::2]]
    assert len(linear) == 8
    for layer in linear:
        weight = layer.weight.detach().double()
        weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
        gram = weight @ weight.T  # orthogonal rows of length root two
        torch.testing.assert_close(
            gram, 2.0 * torch.eye(len(gram), dtype=torch.float64), atol=1e-5, rtol=0
        )
        assert not layer.bias.any()


@pytest.mark.parametrize("module", ALL)
def test_other_layers_are_torchs_and_the_last_one_is_small(module):
    torch.manual_seed(0)
    critic = module.FullyConnectedQFunction(S, A, False, 2)
    actor = module.TanhGaussianPolicy(S, A, 1.0)
    for net in (critic.network, actor.base_network):
        *hidden, last = net[::2]
        for layer in hidden:
            bound = 1 / math.sqrt(layer.in_features)
            for values in (layer.weight, layer.bias):
                assert 0.9 * bound < values.abs().max() <= bound
        bound = 0.01 * math.sqrt(6 / (last.in_features + last.out_features))
        assert 0.9 * bound < last.weight.abs().max() <= bound
        assert 0 < last.bias.abs().max() <= 1 / math.sqrt(last.in_features)


@pytest.mark.parametrize("module", ALL)
@pytest.mark.parametrize("log_std, mean", [(-1.0, 0.3), (0.0, -1.0), (-30.0, 0.0)])
def test_the_policys_density_integrates_to_one(module, log_std, mean):
    """Midpoint rule over the pre-tanh line; a deviation below e^-20 counts as e^-20."""
    std = math.exp(max(log_std, -20.0))
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None] * std + mean
    actions = torch.tanh(x)
    gaussian = module.ReparameterizedTanhGaussian()
    ones = torch.ones_like(x)
    log_prob = gaussian.log_prob(mean * ones, log_std * ones, actions)
    if log_std > -20:
        inside = actions[:, 0].abs() < 1 - 1e-6
        width = torch.gradient(actions[:, 0])[0]
        total = (log_prob.exp() * width)[inside].sum().item()
        assert total == pytest.approx(1.0, abs=2e-3)
    else:
        assert log_prob.max().item() == pytest.approx(
            20 - 0.5 * math.log(2 * math.pi), abs=1e-6
        )


@pytest.mark.parametrize("module", ALL)
def test_densities_at_the_bounds_are_finite_and_trainable(module):
    torch.manual_seed(0)
    actor = module.TanhGaussianPolicy(S, A, 1.0)
    states = torch.randn(4, S)
    edges = torch.tensor([[1.0, -1.0], [1.0, 0.0], [-1.0, -1.0], [0.5, 1.0]])
    log_prob = actor.log_prob(states, edges)
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all()
    assert all(torch.isfinite(p.grad).all() for p in actor.parameters())
    flat = torch.stack([actor.log_prob(states, e.expand(4, A)) for e in edges], 1)
    many = actor.log_prob(states, edges.expand(4, 4, A))
    torch.testing.assert_close(many, flat)


@pytest.mark.parametrize("module", ALL)
def test_acting_samples_in_training_and_takes_the_mean_in_evaluation(module):
    torch.manual_seed(0)
    actor = module.TanhGaussianPolicy(S, A, 2.0)
    state = np.linspace(-1, 1, S)
    mean, raw = (
        actor.base_network(torch.tensor(state[None]).float()).detach().split(A, 1)
    )
    actor.eval()
    before = torch.get_rng_state()
    np.testing.assert_allclose(actor.act(state), 2.0 * mean.tanh()[0], rtol=1e-6)
    assert torch.equal(before, torch.get_rng_state())
    actor.train()
    action = actor.act(state)
    torch.set_rng_state(before)
    sample = mean + (raw - 1.0).exp() * torch.randn(1, A)
    np.testing.assert_allclose(action, 2.0 * sample.tanh()[0], rtol=1e-5)


# ---------------------------------------------------------------- data


ROW = st.tuples(
    st.sampled_from([-5.0, -4.5, 5.0, 0.25]),
    st.sampled_from(["goes on"] * 4 + ["jump", "end"]),
)


def dataset_of(rows):
    """Two-dimensional walk; a jump starts somewhere else without a terminal."""
    observations = np.zeros((len(rows), 2), np.float32)
    next_observations = np.zeros((len(rows), 2), np.float32)
    for i, (_, ending) in enumerate(rows):
        next_observations[i] = observations[i] + [1.0, 0.5]
        if i + 1 < len(rows):
            observations[i + 1] = next_observations[i]
            if ending == "jump":
                observations[i + 1] += [0.0, 0.01]
    return {
        "observations": observations,
        "next_observations": next_observations,
        "rewards": np.array([r for r, _ in rows], np.float32),
        "terminals": np.array([ending == "end" for _, ending in rows]),
    }


def returns_of(module, dataset, limit, config):
    if module in MC:
        task = SimpleNamespace(ref_min=0.0, horizon=limit)
    else:
        task = SimpleNamespace(ref_min_score=0.0, _max_episode_steps=limit)
    return np.array(module.get_return_to_go(dataset, task, config))


@pytest.mark.parametrize(
    "name",
    [
        "cal_ql",
        "dare_cal_ql",
        pytest.param("upstream", marks=pytest.mark.optional("corl")),
    ],
)
@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    rows=st.lists(ROW, min_size=1, max_size=40),
    limit=st.integers(1, 12),
    discount=st.sampled_from([0.0, 0.5, 0.99, 0.999]),
    sparse=st.booleans(),
)
def test_return_to_go_against_a_plain_walk(name, rows, limit, discount, sparse):
    module = {"cal_ql": cal_ql, "dare_cal_ql": dare_cal_ql}.get(name) or upstream(
        "cal_ql"
    )
    config = SimpleNamespace(
        discount=discount, is_sparse_reward=sparse, reward_scale=10.0, reward_bias=-5.0
    )
    dataset = dataset_of(rows)
    before = {k: v.copy() for k, v in dataset.items()}
    got = returns_of(module, dataset, limit, config)
    expected = returns_to_go(dataset, limit, discount, -5.0 if sparse else None)
    assert got.shape == (len(rows),)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    for key, values in before.items():
        np.testing.assert_array_equal(dataset[key], values)


@pytest.mark.parametrize("module", MC)
def test_returns_without_discount(module):
    config = SimpleNamespace(
        discount=1.0, is_sparse_reward=False, reward_scale=1.0, reward_bias=0.0
    )
    dataset = dataset_of([(0.25, "goes on"), (5.0, "end"), (-5.0, "goes on")])
    got = returns_of(module, dataset, 1000, config)
    np.testing.assert_array_equal(got, [5.25, 5.0, -5.0])


@pytest.mark.parametrize("module", MC)
def test_a_failed_episode_of_antmaze_is_worth_minus_500(module):
    config = module.TrainConfig(
        env="antmaze-umaze-v2",
        is_sparse_reward=True,
        normalize_reward=True,
        reward_scale=10.0,
        reward_bias=-5.0,
    )
    failed, reached = [(0.0, "goes on")] * 2, [(0.0, "goes on"), (1.0, "end")]
    dataset = dataset_of([*reached, *failed])
    module.modify_reward(dataset, config.env, reward_scale=10.0, reward_bias=-5.0)
    task = tasks.task(config.env)
    got = module.get_return_to_go(dataset, task, config)
    np.testing.assert_allclose(got, [-5 + 0.99 * 5, 5.0, -500.0, -500.0], rtol=1e-12)


def buffer_of(module, rows, size, compat=False):
    rng = np.random.default_rng(0)
    data = {
        "observations": rng.normal(size=(rows, S)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, A)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "next_observations": rng.normal(size=(rows, S)).astype(np.float32),
        "terminals": rng.random(rows) < 0.1,
        "mc_returns": np.arange(rows, dtype=np.float64),
    }
    buffer = module.ReplayBuffer(S, A, size, compat=compat, mc_returns=module in MC)
    if rows:
        buffer.load_d4rl_dataset(data)
    return buffer, data


ADDED = (np.zeros(S), np.zeros(A), 99.0, np.ones(S), True)


@pytest.mark.parametrize("module", MC)
def test_rows_carry_their_returns(module):
    buffer, data = buffer_of(module, 10, 20)
    np.random.seed(0)
    expected = np.random.randint(0, 10, size=30)
    np.random.seed(0)
    batch = buffer.sample(30)
    assert len(batch) == 6 and all(field.shape[0] == 30 for field in batch)
    for field, name in zip(
        batch,
        ("observations", "actions", "rewards", "next_observations"),
        strict=False,
    ):
        values = data[name][expected].reshape(30, -1)
        np.testing.assert_array_equal(field.numpy(), values)
    np.testing.assert_array_equal(batch[5].numpy()[:, 0], expected)
    for compat, value in ((False, -math.inf), (True, 0.0)):
        online, _ = buffer_of(module, 0, 5, compat)
        online.add_transition(*ADDED)
        assert online.sample(3)[5].tolist() == [[value]] * 3


@pytest.mark.parametrize("module", MC)
@pytest.mark.parametrize("share, offline_rows", [(0.5, 8), (0.25, 4)])
def test_mixed_batches_are_offline_rows_first(module, share, offline_rows):
    offline, _ = buffer_of(module, 20, 20)
    online, _ = buffer_of(module, 0, 20)
    online.add_transition(*ADDED)
    batch = module.MixedBuffer(offline, online, share).sample(16)
    assert (batch[2][offline_rows:] == 99.0).all()
    assert not (batch[2][:offline_rows] == 99.0).any()
    assert torch.isfinite(batch[5][:offline_rows]).all()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.sampled_from(ALL), st.integers(0, 6), st.integers(0, 15))
def test_buffer_state_restores_every_row(module, loaded, added):
    buffer, copied = (buffer_of(module, loaded, 8)[0] for _ in range(2))
    for i in range(added):
        buffer.add_transition(np.full(S, i), np.full(A, i), i, np.full(S, -i), i % 2)
    copied.load_state_dict(buffer.state_dict())
    assert (copied._size, copied._pointer) == (buffer._size, buffer._pointer)
    for x, y in zip(copied._storage(), buffer._storage(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("module", ALL)
def test_reward_transforms_offline_and_online_agree(module):
    linear = {"reward_scale": 10.0, "reward_bias": -5.0}
    rows = np.array([1, 2, 3, 10], np.float32)
    dataset = {"rewards": rows.copy(), "terminals": np.array([0, 1, 0, 1])}
    args = module.modify_reward(dataset, TASK, **linear)
    np.testing.assert_allclose(dataset["rewards"], rows * 1000.0 - 5.0)
    online = module.modify_reward_online(2.0, TASK, **args)
    assert online == pytest.approx(1995.0)
    sparse = {"rewards": np.array([0, 1], np.float32), "terminals": np.array([0, 1])}
    assert module.modify_reward(sparse, "antmaze-umaze-v2", **linear) == linear
    assert sparse["rewards"].tolist() == [-5.0, 5.0]
    assert module.modify_reward_online(1.0, "antmaze-umaze-v2", **linear) == 5.0


@pytest.mark.parametrize(
    "values, message",
    [
        ({"env": "hoper-medium-v2"}, "unknown task 'hoper-medium-v2'"),
        ({"cql_n_actions": 0}, r"cql_n_actions must lie in \[1, 1e4\], not 0"),
        ({"bc_steps": -1}, r"bc_steps must lie in \[0, 1e9\], not -1"),
        ({"cql_temp": 0.0}, r"cql_temp must lie in \(0, inf\), not 0.0"),
        ({"cql_clip_diff_min": 1.0, "cql_clip_diff_max": 0.0}, "cql_clip_diff_min 1.0"),
    ],
)
@pytest.mark.parametrize("module", ALL)
def test_bad_settings_name_the_field(module, values, message):
    with pytest.raises(ValueError, match=message):
        module.TrainConfig(**{"env": TASK, **values})


@pytest.mark.parametrize("module", ALL)
def test_a_batch_that_cannot_be_split_is_refused(module):
    with pytest.raises(ValueError, match=r"mixing_ratio must lie in \[0, 1\), not 1.0"):
        module.TrainConfig(env=TASK, mixing_ratio=1.0)
    ratio = {"mixing_ratio": 0.5} if module is cql else {}
    with pytest.raises(ValueError, match="batch_size 255 cannot be split"):
        module.TrainConfig(env=TASK, batch_size=255, **ratio)


def test_cql_has_one_buffer_unless_it_is_asked_or_dare_needs_two():
    assert cql.TrainConfig(env=TASK).mixing_ratio is None
    assert dare_cql.TrainConfig(env=TASK).mixing_ratio == 0.5
    off = dare_cql.DareCQLConfig(enabled=False)
    assert dare_cql.TrainConfig(env=TASK, dare=off).mixing_ratio is None
