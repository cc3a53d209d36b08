"""Rows in proportion to how on-policy they are: weights, draws, the ring, resume, refusals."""

import copy
import importlib
import math

import numpy as np
import pytest
import torch
import wiring
from helpers import assert_equal
from kinds import one_of_each_kind
from short_runs import assert_same_weights, checkpoint_of, folder_of, run, stop_after
from short_runs import noisy_block as block
from test_hot_loop import HostReads
from torch.distributions import Normal

from adaptive_regularization.trust import FlaggedBuffer
from algorithms import (
    awac,
    cal_ql,
    cql,
    dare_rebrac,
    dare_td3_bc,
    famo2o_cql,
    famo2o_iql,
    iql,
    rebrac,
    spot,
    td3_bc,
)
from corl.buffers import ReplayBuffer, upload
from corl.sampling import OnPolicyBuffer, standard_log_prob

pytestmark = pytest.mark.narrow(16)
S, A = 2, 3
TASK = "hopper-medium-v2"


class Walks:
    """Rows of walks of random lengths, one after the other."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.left, self.state = 0, None

    def row(self):
        if self.left == 0:
            self.left, self.terminal = self.rng.integers(1, 5), self.rng.random() < 0.5
            # A walk may begin where the last one ended: then only a terminal tells them apart.
            if self.state is None or self.rng.random() < 0.5:
                self.state = self.rng.normal(size=S)
        self.left -= 1
        before, self.state = self.state, self.rng.normal(size=S)
        action = self.rng.normal(size=A)
        return before, action, 0.0, self.state, self.terminal and self.left == 0


def fit_of(states, actions):
    """Some numbers, a few of them outside the bounds."""
    return 30.0 * (states[:, 0] + actions[:, 0])


def make(rows, capacity=50, loaded=0, **options):
    """A buffer with rows of walks, some of them loaded as a dataset, and what is around it."""
    walks, buffer = Walks(), ReplayBuffer(S, A, capacity)
    found = [walks.row() for _ in range(rows)]
    keys = "observations actions rewards next_observations terminals".split()
    if loaded:
        columns = zip(*found[:loaded], strict=True)
        arrays = {k: np.array(v) for k, v in zip(keys, columns, strict=True)}
        buffer.load_d4rl_dataset(arrays)
    options = {"temperature": 5.0, "refresh": 1000, **options}
    weighted = OnPolicyBuffer(buffer, torch.nn.Dropout(), fit_of, **options)
    for row in found[loaded:]:
        buffer.add_transition(*row)
    return weighted, walks


def brute_force(buffer, order, temperature, trajectories):
    """Weights by slot: a plain loop over rows from the oldest to the newest."""
    g, groups = {}, []
    for i, slot in enumerate(order):
        value = 30.0 * float(buffer._states[slot, 0] + buffer._actions[slot, 0]) / A
        g[slot] = min(max(value, -12.0), 7.0)
        last = order[i - 1] if i else None
        joins = last is not None and not buffer._dones[last, 0]
        if joins:
            gap = buffer._next_states[last] - buffer._states[slot]
            joins = float(gap.norm()) <= 1e-6
        if joins and trajectories:
            groups[-1].append(slot)
        else:
            groups.append([slot])
    largest = max(g.values())
    return {
        slot: math.exp((np.mean([g[s] for s in group]) - largest) / temperature)
        for group in groups
        for slot in group
    }


def shares(weighted, monkeypatch, points=200_000):
    """The share of each slot in the draws, by going through the unit interval evenly."""
    places = (np.arange(points) + 0.5) / points
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "random_sample", lambda n: places)
        rows = weighted.draw(points)
    return np.bincount(rows, minlength=weighted._buffer_size) / points


def test_the_score_is_the_distance_from_the_mean_and_nothing_else():
    rng = torch.Generator().manual_seed(0)
    mean, x = torch.randn(2, 7, A, generator=rng)
    std = torch.rand(7, A, generator=rng) + 0.1
    expected = (Normal(mean, std).log_prob(x) + std.log()).sum(-1)
    torch.testing.assert_close(standard_log_prob(x, mean, std), expected)
    # A wide policy does not lower it.
    at_mean = standard_log_prob(mean, mean, std)
    torch.testing.assert_close(at_mean, standard_log_prob(mean, mean, 10 * std))


@pytest.mark.parametrize("unit", ["trajectory", "transition"])
@pytest.mark.parametrize("rows", [1, 2, 37, 50])
@pytest.mark.parametrize("temperature", [0.2, 5.0])
def test_rows_are_drawn_as_a_plain_loop_over_them_says(
    unit, rows, temperature, monkeypatch
):
    monkeypatch.setattr("corl.sampling.CHUNK", 8)
    weighted, _ = make(rows, unit=unit, temperature=temperature)
    found = shares(weighted, monkeypatch)
    weights = brute_force(
        weighted.buffer, range(rows), temperature, unit == "trajectory"
    )
    total = sum(weights.values())
    expected = [weights.get(slot, 0.0) / total for slot in range(50)]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    effective = total**2 / sum(w * w for w in weights.values()) / rows
    assert weighted.metrics["effective_share"] == pytest.approx(effective, rel=1e-5)


@pytest.mark.parametrize("unit", ["trajectory", "transition"])
@pytest.mark.parametrize("loaded", [0, 20])
def test_new_rows_weigh_one_however_often_the_ring_wraps(unit, loaded, monkeypatch):
    """The weights by slot are kept in a dict, which forgets what is written over."""
    weighted, walks = make(loaded + 9, 30, loaded, unit=unit, refresh=7)
    buffer, rng = weighted.buffer, np.random.default_rng(1)
    written, weights = loaded + 9, {}
    for draw in range(40):
        if draw % 7 == 0:
            order = [n % 30 for n in range(max(0, written - 30), written)]
            weights = brute_force(buffer, order, 5.0, unit == "trajectory")
        found = shares(weighted, monkeypatch, 50_000)
        total = sum(weights.values())
        expected = [weights.get(slot, 0.0) / total for slot in range(30)]
        np.testing.assert_allclose(found, expected, atol=5e-5)
        online = [slot for slot in weights if slot >= loaded or written - 30 > slot]
        share = sum(weights[slot] for slot in online) / total
        assert weighted.metrics["online_share"] == pytest.approx(share, abs=1e-4)
        for _ in range(rng.integers(0, 4)):
            weights[written % 30] = 1.0
            buffer.add_transition(*walks.row())
            written += 1
    assert written > 70  # the ring went round more than twice


def test_more_new_rows_than_the_buffer_holds_leave_only_new_ones(monkeypatch):
    weighted, walks = make(10, 12)
    weighted.draw(1)
    for _ in range(31):
        weighted.buffer.add_transition(*walks.row())
        weighted.draw(1)
    np.testing.assert_allclose(shares(weighted, monkeypatch), 1 / 12, atol=2e-5)


def chi_square(counts, expected):
    return float((np.square(counts - expected) / expected).sum())


def test_frequencies_of_draws_fit_the_weights():
    weighted, _ = make(20, 25)
    np.random.seed(0)
    rows = np.concatenate([weighted.draw(256) for _ in range(80)])
    weights = brute_force(weighted.buffer, range(20), 5.0, True)
    expected = np.array([weights[slot] for slot in range(20)])
    expected *= len(rows) / expected.sum()
    counts = np.bincount(rows, minlength=20)
    # 1 % of a chi-square of 19 degrees of freedom lies above. Uniform draws are far off.
    assert chi_square(counts, expected) < 36.2
    assert chi_square(counts, np.full(20, len(rows) / 20)) > 1000


def test_the_policy_is_asked_in_evaluation_mode_every_so_many_draws():
    modes = []
    weighted, _ = make(20, refresh=3)
    weighted.fit = lambda s, a: modes.append(weighted.actor.training) or fit_of(s, a)
    for _ in range(7):
        weighted.sample(4)
    assert modes == [False] * 3 and weighted.actor.training


def test_between_two_looks_at_the_rows_nothing_is_read_on_the_host():
    weighted, walks = make(20, refresh=5)
    for draw in range(5):
        with HostReads() as reads:
            weighted.sample(4)
        assert bool(reads.calls) is (draw == 0)
        weighted.buffer.add_transition(*walks.row())


def test_a_policy_that_diverged_ends_the_run():
    weighted, _ = make(20)
    weighted.fit = lambda s, a: torch.where(s[:, 0] > 0, torch.nan, 0.0)
    with pytest.raises(FloatingPointError, match="fit to a row is nan"):
        weighted.draw(4)


def test_a_restored_buffer_draws_what_the_other_one_draws():
    """Wherever it is saved: before the first draw, between two, and after the ring has wrapped."""
    one, walks = make(28, 30, 20, refresh=5)
    for i in range(16):
        two, _ = make(28, 30, 20, refresh=5)
        two.buffer.load_state_dict(one.buffer.state_dict())
        two.load_state_dict(one.state_dict())
        row = walks.row()
        for buffer in (one, two):
            buffer.buffer.add_transition(*row)
        np.random.seed(i)
        rows = one.draw(16)
        np.random.seed(i)
        np.testing.assert_array_equal(two.draw(16), rows)
        assert two.metrics == one.metrics
        assert_equal(two.state_dict(), one.state_dict())


# ---------------------------------------------------------------- in the algorithms


@pytest.mark.parametrize("flagged", [False, True])
def test_a_wrapped_buffer_can_be_copied(flagged):
    # The wrapper passes names on to its buffer, which a copy does not have yet.
    wrapped, walks = make(20)
    if flagged:
        wrapped = FlaggedBuffer(wrapped.buffer, 50, "cpu", upload)
    twin = copy.deepcopy(wrapped)
    rows = np.arange(20)
    assert_equal(twin.gather(rows), wrapped.gather(rows))
    twin.add_transition(*walks.row())
    assert twin._size == 21
    assert wrapped._size == 20


def trainer_of(module, **fields):
    config = module.TrainConfig(env=TASK, **fields)
    torch.manual_seed(0)
    return module.make_trainer(config, 11, 3, 1.0, "cpu"), config


DETERMINISTIC = {"expl_noise": 0.2}
FITS = {
    "iql": (iql, {}, 0),
    "famo2o_iql": (famo2o_iql, {}, 0),
    "famo2o_cql": (famo2o_cql, {}, 0),
    "iql, deterministic": (iql, {"iql_deterministic": True, **DETERMINISTIC}, 0.2),
    "awac": (awac, {}, 0),
    "td3_bc": (td3_bc, DETERMINISTIC, 0.2),
    "td3_bc, wider": (td3_bc, {**DETERMINISTIC, "policy_std": 0.3}, 0.3),
    "rebrac": (rebrac, {"policy_std": 0.3}, 0.3),
    "spot": (spot, DETERMINISTIC, 0.2),
    "cql": (cql, {}, 0),
    "cal_ql": (cal_ql, {}, 0),
    "dare_td3_bc": (dare_td3_bc, {"dare": block(policy_std=0.4)}, 0.4),
    "dare_rebrac": (dare_rebrac, {"dare": block(policy_std=0.4)}, 0.4),
}


@pytest.mark.parametrize("case", FITS)
def test_the_fit_is_that_of_the_policy_that_acts(case):
    """The mean is the action without exploration; actions of the dataset may lie at a bound."""
    module, fields, std = FITS[case]
    trainer, config = trainer_of(module, **fields)
    rng = np.random.default_rng(0)
    states = rng.normal(size=(6, 11)).astype(np.float32)
    actions = torch.tensor(rng.uniform(-1, 1, (6, 3)), dtype=torch.float32)
    actions[0, 0], actions[1, 1] = 1.0, -1.0
    trainer.actor.eval()
    mean = torch.tensor(np.stack([trainer.actor.act(state) for state in states]))
    std = torch.full((6, 3), std or 1.0)
    if module in (cql, cal_ql):
        mean, log_std = trainer.actor._parameters_of(torch.tensor(states))
        std = log_std.clamp(-20.0, 2.0).exp()
        actions_of = actions.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    elif module is famo2o_cql:
        beta = trainer.actor.balance.mode(torch.tensor(states))
        std = trainer.actor.policy.moments(torch.tensor(states), beta)[1].exp()
        mean, actions_of = mean.atanh(), actions.clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    else:
        actions_of = actions
    expected = (Normal(mean, std).log_prob(actions_of) + std.log()).sum(-1)
    arguments = (trainer, config) if std is not None and _takes_config(module) else ()
    found = module.policy_fit(*(arguments or (trainer,)))(torch.tensor(states), actions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _takes_config(module):
    return module.policy_fit.__code__.co_argcount == 2


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return wiring.Recorder(lambda: tmp_path_factory.mktemp("run"))


ON_POLICY = {"sampling": "on_policy", "sampling_refresh": 5}


# The others draw their rows in a way of their own, and refuse this one.
ON_POLICY_TOO = [
    name
    for name, module in wiring.ALGORITHMS.items()
    if "on_policy" in importlib.import_module(module).TrainConfig.CHOICES["sampling"]
]


def test_who_cannot_draw_so_refuses_it():
    for name in sorted(wiring.ALGORITHMS.keys() - set(ON_POLICY_TOO)):
        config = importlib.import_module(wiring.ALGORITHMS[name]).TrainConfig
        with pytest.raises(
            ValueError, match="sampling .on_policy. is not one of uniform"
        ):
            config(env=TASK, sampling="on_policy")


@pytest.mark.parametrize("name", one_of_each_kind(ON_POLICY_TOO))
def test_every_algorithm_draws_its_online_batches_so(name, recorded):
    """The parts are in the checkpoint, the offline phase is the one of uniform batches."""
    single = {"mixing_ratio": None} if name in ("td3_bc", "iql") else {}
    noise = {"expl_noise": 0.1} if name.endswith(("td3_bc", "rebrac", "spot")) else {}
    fields = {**single, **noise}
    record = recorded(name, **ON_POLICY, **fields)
    plain = recorded(name, **fields)
    parts = record.parts()["parts"]
    rows = ["all"] if single else ["offline", "online"]
    assert {k for k in parts if k.startswith("sampling_")} == {
        f"sampling_{x}" for x in rows
    }
    updates = record.of("update")
    assert all(parts[f"sampling_{x}"]["draws"] == len(updates) - 7 for x in rows)
    pairs = list(zip(updates, plain.of("update"), strict=True))
    for ours, theirs in pairs[:7]:
        assert_equal(ours.batch, theirs.batch)
    assert not all(torch.equal(x.batch[0], y.batch[0]) for x, y in pairs[7:])
    logged = [row for row in record.rows_of("metrics.csv") if row["phase"] == "online"]
    assert 0 < float(logged[-1]["effective_share"]) <= 1
    assert bool(logged[-1]["online_share"]) is bool(single)
    assert "effective_share" not in plain.rows_of("metrics.csv")[0]


SHORT = {
    "offline_iterations": 4,
    "online_iterations": 16,
    "eval_freq": 8,
    "n_episodes": 1,
    "log_freq": 2,
    "batch_size": 16,
    "buffer_size": 4007,  # the ring wraps
    "sampling": "on_policy",
    "sampling_refresh": 5,
}
DARE = {"dare": block(behavior_updates=3)}


@pytest.mark.parametrize("module, fields", [(td3_bc, {}), (dare_td3_bc, DARE)])
def test_a_resumed_run_equals_an_unbroken_one(module, fields, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run(module, whole, monkeypatch, **SHORT, **fields)
    with monkeypatch.context() as patch:
        stop_after(11, patch)
        run(module, broken, patch, **SHORT, **fields)
    folder = str(folder_of(broken))
    run(module, broken, monkeypatch, resume=folder, **SHORT, **fields)
    assert_same_weights(whole, broken)
    ours, theirs = (checkpoint_of(x)["parts"] for x in (broken, whole))
    names = [name for name in ours if name.startswith("sampling_")]
    assert len(names) == (2 if fields else 1)
    for name in names:
        assert_equal(ours[name], theirs[name])
    tables = [(folder_of(x) / "metrics.csv").read_text() for x in (broken, whole)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    "module, fields, words",
    [
        (iql, {"compat": True}, "sampling on_policy is not in upstream's files"),
        (rebrac, {}, "acts without noise; set policy_std"),
        (dare_rebrac, {"dare": block(enabled=False, policy_std=0.1)}, "set policy_std"),
        (td3_bc, {"expl_noise": 0.0}, "acts without noise; set policy_std"),
        (iql, {"iql_deterministic": True, "expl_noise": 0.0}, "set policy_std"),
        (iql, {"sampling_temperature": 0.1}, r"sampling_temperature must lie in \[0.2,"),
        (iql, {"sampling_unit": "episode"}, "not one of trajectory, transition"),
        (iql, {"sampling_refresh": 0}, "sampling_refresh must lie in"),
    ],
)
def test_what_cannot_be_is_refused(module, fields, words):
    with pytest.raises(ValueError, match=words):
        module.TrainConfig(env=TASK, sampling="on_policy", **fields)


def test_seeds_are_not_stacked():
    config = iql.TrainConfig(env=TASK, sampling="on_policy")
    assert "sampling on_policy" in config.not_stacked()


def test_rows_without_order_have_no_trajectories(tmp_path, monkeypatch):
    import toy

    make_dataset = toy.make_dataset

    def shuffled():
        dataset = make_dataset()
        dataset.provenance |= {"order": "shuffled", "path": "rows.hdf5"}
        return dataset

    monkeypatch.setattr(toy, "make_dataset", shuffled)
    with pytest.raises(ValueError, match="rows.hdf5: the rows are shuffled.*transition"):
        run(td3_bc, tmp_path, monkeypatch, **SHORT)
    run(td3_bc, tmp_path, monkeypatch, **SHORT, sampling_unit="transition")
