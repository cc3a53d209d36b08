"""The time estimate tries every part for real; afterwards nothing is as if it had."""

import functools
import itertools
import random
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import one_of_each_kind, with_slow
from short_runs import (
    awac_block,
    baq_block,
    cal_ql_block,
    cfdg_block,
    checkpoint_of,
    cql_block,
    dare_block,
    edis_block,
    folder_of,
    noisy_block,
    ratio_block,
    run,
    stop_after,
    wsrl_block,
)
from torch._dynamo.utils import counters

from algorithms import (
    awac,
    baq_cal_ql,
    cal_ql,
    cfdg_iql,
    cql,
    cql_sa,
    dare_awac,
    dare_cal_ql,
    dare_cql,
    dare_cql_sa,
    dare_famo2o_cql,
    dare_iql,
    dare_opt_spot,
    dare_rebrac,
    dare_spot,
    dare_td3_bc,
    dare_wsrl,
    e2o,
    edis_iql,
    famo2o_cql,
    famo2o_iql,
    iql,
    opt_spot,
    opt_td3,
    pex,
    rebrac,
    rlpd,
    spot,
    td3_bc,
    td3_bc_sa,
    wsrl,
)
from corl import compiled, finetune
from corl.rollback import Snapshot

pytestmark = pytest.mark.narrow(16)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiled.COMPILERS)), reason="no C++ compiler"
)


class Thing:
    """Something with attributes that a snapshot follows."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def state_dict(self):
        return {}


def streams():
    """The next number of each global random stream, which is left alone."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    numbers = random.random(), np.random.random(), torch.rand(1).item()
    random.setstate(states[0]), np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return numbers


# ---------------------------------------------------------------- one kind of thing


def test_a_network_gets_its_numbers_back_in_the_same_tensors():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    net[1].eval()
    tensors = [*net.parameters(), *net.buffers()]
    before = [x.clone() for x in tensors]
    snapshot = Snapshot([net])
    net.train()
    net(torch.randn(4, 2)).sum().backward()
    with torch.no_grad():
        for x in net.parameters():
            x.add_(1.0)
    assert not torch.equal(net[1].running_mean, before[-3])
    snapshot.restore()
    now = [*net.parameters(), *net.buffers()]
    assert all(x is y for x, y in zip(tensors, now, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))
    assert all(x.grad is None for x in net.parameters())
    assert net[0].training and not net[1].training


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(kind, steps):
    """Fresh or in the middle: its next steps are those of one that was left alone."""

    def make():
        weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind([weight], lr=0.1, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return weight, optimizer, schedule

    def step(weight, optimizer, schedule, power=2):
        optimizer.zero_grad()
        (weight**power).sum().backward()
        optimizer.step()
        schedule.step()

    tried, left_alone = make(), make()
    for _ in range(steps):
        step(*tried), step(*left_alone)
    held = {id(v) for state in tried[1].state.values() for v in state.values()}
    snapshot = Snapshot(tried)
    for _ in range(4):
        step(*tried, power=3)
    assert tried[1].param_groups[0]["lr"] != left_alone[1].param_groups[0]["lr"]
    after = {id(v) for state in tried[1].state.values() for v in state.values()}
    snapshot.restore()
    found = {id(v) for state in tried[1].state.values() for v in state.values()}
    assert held <= after == found  # a graph that holds these tensors holds them still
    assert torch.equal(tried[0], left_alone[0])
    for _ in range(4):
        step(*tried), step(*left_alone)
        assert torch.equal(tried[0], left_alone[0])
        assert tried[2].get_last_lr() == left_alone[2].get_last_lr()
    assert_equal(tried[1].state_dict(), left_alone[1].state_dict())
    assert_equal(tried[2].state_dict(), left_alone[2].state_dict())


def test_attributes_come_back_the_lost_ones_and_without_the_new_ones():
    array, tensor = np.arange(3.0), torch.arange(3.0)
    generator = torch.Generator().manual_seed(5)
    inner = Thing(count=7)
    thing = Thing(
        count=3,
        rate=0.5,
        name="x",
        nothing=None,
        flag=True,
        array=array,
        tensor=tensor,
        generator=generator,
        nested={"list": [tensor, {"deep": array}, 5], "inner": inner},
    )
    before = dict(vars(thing))
    expected = torch.rand(2, generator=torch.Generator().manual_seed(5))
    snapshot = Snapshot([thing])

    thing.count, thing.name, thing.flag = 99, "y", False
    thing.nothing = torch.zeros(2)
    thing.new = 1
    array[:] = -1
    tensor.fill_(-1)
    torch.rand(9, generator=generator)
    inner.count, inner.more = 8, [1]
    thing.nested["list"].append(6)
    thing.nested["list"][2] = 0
    thing.nested["added"] = 1
    thing.nested["list"][1]["deep"] = None
    thing.tensor = torch.ones(5)
    del thing.rate

    nested = before["nested"]
    snapshot.restore()
    assert vars(thing).keys() == before.keys()
    assert all(vars(thing)[key] is value for key, value in before.items())
    assert thing.nothing is None and (thing.count, thing.rate) == (3, 0.5)
    assert (thing.name, thing.flag) == ("x", True)
    assert nested.keys() == {"list", "inner"}
    assert nested["list"][0] is tensor and nested["list"][1]["deep"] is array
    assert nested["list"][2:] == [5] and vars(inner) == {"count": 7}
    assert array.tolist() == tensor.tolist() == [0.0, 1.0, 2.0]
    assert torch.equal(torch.rand(2, generator=generator), expected)


def test_objects_in_a_circle_are_followed_once():
    one, two = Thing(n=1), Thing(n=2)
    one.other, two.other = two, one
    snapshot = Snapshot([one])
    one.n = two.n = 0
    two.other = None
    snapshot.restore()
    assert (one.n, two.n) == (1, 2) and two.other is one and one.other is two


def test_what_shall_be_left_alone_is_left_alone():
    inside = Thing(n=1)
    thing = Thing(n=1, inside=inside)
    snapshot = Snapshot([thing], leave=[inside])
    thing.n = inside.n = 2
    snapshot.restore()
    assert (thing.n, inside.n) == (1, 2)


@given(st.integers(0, 2**31), st.integers(1, 50))
@settings(deadline=None, derandomize=True, max_examples=20)
def test_the_global_streams_are_put_back(seed, draws):
    outside = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        expected = streams()
        snapshot = Snapshot([])
        for _ in range(draws):
            random.gauss(0, 1), np.random.normal(), torch.randn(1)
        assert streams() != expected
        snapshot.restore()
        assert streams() == expected
    finally:
        random.setstate(outside[0]), np.random.set_state(outside[1])
        torch.set_rng_state(outside[2])


# ---------------------------------------------------------------- whole runs

estimates = pytest.mark.makes("estimate")
SHORT = {
    "offline_iterations": 20,
    "online_iterations": 20,
    "eval_freq": 20,
    "n_episodes": 1,
    "log_freq": 5,
    "batch_size": 16,
}
# The diffusion's block has an energy, caches of references and of support actions.
GUIDED = {"behavior_updates": 20, "energy_updates": 6, "energy_update_freq": 2}
RUNS = {
    "iql": (iql, {}),
    "iql, two buffers": (iql, {"mixing_ratio": 0.5, "utd": 2, "online_warmup": 5}),
    "iql, deterministic": (iql, {"iql_deterministic": True, "actor_dropout": 0.1}),
    "iql, online alone": (iql, {"offline_iterations": 0}),
    "dare_iql, guided": (dare_iql, {"dare": dare_block("diffusion", **GUIDED)}),
    "dare_iql, ratio": (
        dare_iql,
        {"dare": dare_block("policy_ratio", behavior_updates=5, rule="random")},
    ),
    "cql": (cql, {"cql_lagrange": True}),
    "td3_bc": (td3_bc, {"bc_online": "anneal", "policy_freq": 3}),
    "dare_td3_bc": (dare_td3_bc, {"dare": noisy_block(behavior_updates=5)}),
    "awac": (awac, {"mixing_ratio": 0.5, "utd": 2}),
    "td3_bc_sa": (
        td3_bc_sa,
        {"trust_by": "iql", "filter_updates": 7, "buffer_mode": "half"},
    ),
    "cql_sa": (cql_sa, {"buffer_mode": "part", "n_period": 3, "part_trajectories": 9}),
    "dare_cql_sa": (
        dare_cql_sa,
        {"n_period": 3, "dare": ratio_block(behavior_updates=5)},
    ),
    "dare_awac": (dare_awac, {"dare": awac_block(behavior_updates=5)}),
    "dare_cql": (
        dare_cql,
        {"dare": cql_block(behavior_updates=5), "cql_lagrange": True},
    ),
    "pex": (pex, {"online_warmup": 5, "utd": 2}),
    "rlpd": (rlpd, {"online_warmup": 5, "random_steps": 12, "utd": 3}),
    "wsrl": (wsrl, {"online_warmup": 5, "utd": 3, "cql_lagrange": True}),
    "dare_wsrl": (
        dare_wsrl,
        {"online_warmup": 5, "utd": 3, "dare": wsrl_block(behavior_updates=5)},
    ),
    "famo2o_iql": (famo2o_iql, {"balance_period": 3}),
    "famo2o_cql": (famo2o_cql, {"mixing_ratio": 0.5}),
    "dare_famo2o_cql": (dare_famo2o_cql, {"dare": ratio_block(behavior_updates=5)}),
    "opt_td3": (opt_td3, {"online_warmup": 5, "pretrain_updates": 6, "utd": 2}),
    "opt_spot": (
        opt_spot,
        {"online_warmup": 12, "pretrain_updates": 3, "vae_iterations": 7},
    ),
    "spot": (spot, {"vae_iterations": 30, "policy_freq": 3}),
    "dare_spot": (
        dare_spot,
        {"vae_iterations": 7, "dare": noisy_block(behavior_updates=5)},
    ),
    "dare_opt_spot": (
        dare_opt_spot,
        {
            **{"online_warmup": 5, "pretrain_updates": 3, "vae_iterations": 7},
            "dare": noisy_block(behavior_updates=5),
        },
    ),
    "rebrac": (rebrac, {"mixing_ratio": 0.5, "bc_anneal_steps": 30, "policy_freq": 3}),
    "dare_rebrac": (dare_rebrac, {"dare": noisy_block(behavior_updates=5)}),
    "edis_iql": (edis_iql, {"mixing_ratio": 0.3, "edis": edis_block()}),
    "baq_cal_ql": (
        baq_cal_ql,
        {"baq": baq_block(), "sampling_refresh": 7, "normalize_reward": True},
    ),
    "e2o": (e2o, {"online_warmup": 5, "utd": 2}),
    "cfdg_iql": (cfdg_iql, {"cfdg": cfdg_block()}),
    "cal_ql": (cal_ql, {"bc_steps": 3, "target_update_period": 2}),
    "dare_cal_ql": (dare_cal_ql, {"dare": cal_ql_block(behavior_updates=5)}),
}


def without_estimate(monkeypatch):
    start = functools.partialmethod(finetune.Session.start, estimate=False)
    monkeypatch.setattr(finetune.Session, "start", start)


def assert_same_run(one, two):
    """The last checkpoints and the logged numbers are the same, bit for bit."""
    first, second = checkpoint_of(one), checkpoint_of(two)
    for key in ("parts", "rng", "step"):
        assert_equal(first[key], second[key], key)
    for name in ("metrics.csv", "evaluations.csv"):
        texts = [(folder_of(x) / name).read_text() for x in (one, two)]
        assert texts[0] == texts[1]


@estimates
@pytest.mark.parametrize("name", one_of_each_kind(RUNS))
def test_a_run_with_the_estimate_equals_one_without(name, tmp_path, monkeypatch, capsys):
    module, fields = RUNS[name]
    run(module, tmp_path / "a", monkeypatch, **{**SHORT, **fields})
    (line,) = re.findall("estimated time on this cpu.*", capsys.readouterr().out)
    assert "online" in line
    without_estimate(monkeypatch)
    run(module, tmp_path / "b", monkeypatch, **{**SHORT, **fields})
    assert "estimated time" not in capsys.readouterr().out
    assert_same_run(tmp_path / "a", tmp_path / "b")


# Stopped offline, online, and where a part of its own decides what is left.
RESUMED = {
    *(("iql, two buffers", 10), ("iql, two buffers", 30), ("dare_iql, guided", 30)),
    *(("spot", 10), ("opt_td3", 30), ("td3_bc_sa", 30), ("baq_cal_ql", 30)),
}

IN_BOTH_PHASES = [k for k, (_, f) in RUNS.items() if "offline_iterations" not in f]


@estimates
@pytest.mark.parametrize(
    "name, stop_at", with_slow(RESUMED, itertools.product(IN_BOTH_PHASES, (10, 30)))
)
def test_a_resumed_run_with_the_estimate_equals_one_without(
    name, stop_at, tmp_path, monkeypatch
):
    module, fields = RUNS[name]
    with monkeypatch.context() as patch:
        stop_after(stop_at, patch)
        assert run(module, tmp_path / "a", monkeypatch, **{**SHORT, **fields}) == {}
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for place in ("a", "b"):
        if place == "b":
            without_estimate(monkeypatch)
        resume = {"resume": str(folder_of(tmp_path / place))}
        assert run(module, tmp_path / place, monkeypatch, **SHORT, **fields, **resume)
    assert_same_run(tmp_path / "a", tmp_path / "b")


@estimates
def test_the_estimate_names_every_part_that_takes_time(tmp_path, monkeypatch, capsys):
    module, fields = RUNS["dare_iql, guided"]
    estimates = []
    for _ in range(2):  # in the second run the behavior model lies in the cache
        run(module, tmp_path, monkeypatch, **{**SHORT, **fields})
        lines = capsys.readouterr().out.splitlines()
        estimates += [line for line in lines if "estimated time" in line]
    one, two = [re.findall(r"(?:[(]|, )([a-z ]+) \d", line) for line in estimates]
    assert one == ["behavior model", "energy", "offline", "online"]
    assert two == ["energy", "offline", "online"]


def graphs():
    return counters["stats"]["unique_graphs"]


COMPILED = {
    "iql": (iql, {}),
    "dare_iql": (dare_iql, {"dare": dare_block("policy_ratio", behavior_updates=5)}),
    "td3_bc": (td3_bc, {}),  # one graph without and one with the policy
}


@estimates
@needs_compiler
@pytest.mark.whole
@pytest.mark.parametrize("name", COMPILED)
def test_the_estimate_compiles_and_the_run_compiles_nothing_again(
    name, tmp_path, monkeypatch
):
    module, fields = COMPILED[name]
    fields = {**SHORT, **fields, "compile": True}
    compiled_by_start, start = [], finetune.Session.start

    def counting(self, *arguments, **options):
        start(self, *arguments, **options)
        compiled_by_start.append(graphs())

    torch._dynamo.reset()
    counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(finetune.Session, "start", counting)
        run(module, tmp_path / "a", monkeypatch, **fields)
    assert compiled_by_start == [graphs()] and graphs() >= 1
    if name != "iql":
        return  # compiling takes its time
    torch._dynamo.reset()
    without_estimate(monkeypatch)
    run(module, tmp_path / "b", monkeypatch, **fields)
    assert_same_run(tmp_path / "a", tmp_path / "b")
