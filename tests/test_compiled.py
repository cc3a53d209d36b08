"""`compile: true` gives the eager update's numbers, in one graph, and resumes exactly."""

import copy
import shutil

import numpy as np
import pytest
import torch
from helpers import hard_release, make_hook
from kinds import with_slow
from torch._dynamo.utils import counters

from algorithms import (
    awac,
    baq_cal_ql,
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
    famo2o_cql,
    famo2o_iql,
    iql,
    opt_td3,
    pex,
    rebrac,
    rlpd,
    spot,
    td3_bc,
    td3_bc_sa,
    wsrl,
)
from corl import compiled
from corl_dare.exchange import exchange

S, A, B = 5, 2, 16
TASK = "hopper-medium-v2"
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, compiled.COMPILERS)), reason="no C++ compiler"
)


def batches(module, count):
    rng = np.random.default_rng(0)
    shapes = [(B, S), (B, A), (B, 1), (B, S), (B, 1)] + [(B, 1)] * (
        module in (baq_cal_ql, dare_cal_ql, wsrl, dare_wsrl)
    )
    shapes += [(B, A)] * getattr(module.TrainConfig, "NEXT_ACTIONS", False)
    for _ in range(count):
        batch = [torch.tensor(rng.normal(size=s), dtype=torch.float32) for s in shapes]
        batch[1], batch[4] = batch[1].tanh(), (batch[4] > 1).float()
        yield batch


def make(module, compile, **fields):
    config = module.TrainConfig(
        env=TASK, seed=0, offline_iterations=8, compile=compile, **fields
    )
    torch.manual_seed(0)
    return module.make_trainer(config, S, A, 1.0, "cpu")


def networks(trainer):
    return {
        f"{name}.{key}": value
        for name, part in vars(trainer).items()
        if isinstance(part, torch.nn.Module)
        for key, value in part.state_dict().items()
    }


def train(trainer, module, skip, count, arguments=()):
    """Updates number `skip` to `count`; the logs of the last one."""
    for number, batch in enumerate(batches(module, count)):
        if number >= skip:
            torch.manual_seed(number)
            logs = trainer.train(batch, *arguments)
    return logs


DELAYED = ("td3_bc", "dare_td3_bc", "rebrac", "dare_rebrac", "spot", "dare_spot")
DELAYED += ("td3_bc_sa", "opt_td3", "dare_opt_spot")
# The threshold is checked in one of the updates; so it is no number in the graph.
SA = {"beta_lr": 1e-4, "n_period": 4}
WSRL = {"cql_n_actions": 2, "hidden_dim": 16}
DELAYED += ("rlpd, online", "wsrl, online")
GRAPHS = dict.fromkeys(DELAYED, 2)  # with an update of the policy, and without
# Where a gradient is as small as Adam's epsilon, rounding is a part of the step (3e-4): seven of
# the policy's 65536 weights in one layer are such.
TOLERANCE = dict.fromkeys(DELAYED, 6e-5)
CASES = {
    "iql": (iql, {}, ()),
    "pex": (pex, {}, ()),
    "pex, online": (pex, {}, (True,)),
    "baq_cal_ql": (
        baq_cal_ql,
        {"cql_n_actions": 3, "q_n_hidden_layers": 1},
        (torch.linspace(0.1, 1.0, B),),
    ),
    "e2o, gap kept": (
        e2o,
        {"n_critics": 3, "hidden_dim": 32, "cql_n_actions": 2, "cql_alpha_online": 1.0},
        (True,),
    ),
    # Three updates are one environment step: a run saves between two of them.
    "rlpd, online": (rlpd, {"utd": 3, "hidden_dim": 16}, (True,)),
    "wsrl": (wsrl, {**WSRL, "base": "cal_ql", "cql_lagrange": True}, ()),
    "wsrl, online": (wsrl, {**WSRL, "utd": 3, "zero_gradient_steps": True}, (True,)),
    "dare_wsrl": (
        dare_wsrl,
        {**WSRL, "utd": 1, "cql_lagrange": True},
        (True, hard_release(B, B // 2)),
    ),
    "famo2o_iql": (famo2o_iql, {}, ()),
    "famo2o_cql, online": (famo2o_cql, {"cql_n_actions": 3}, (True,)),
    "dare_famo2o_cql": (
        dare_famo2o_cql,
        {"cql_n_actions": 3},
        (True, hard_release(B, B // 2)),
    ),
    "td3_bc": (td3_bc, {}, ()),
    "dare_td3_bc": (dare_td3_bc, {}, (hard_release(B, B // 2),)),
    "td3_bc_sa": (td3_bc_sa, SA, ()),
    "cql_sa": (cql_sa, {**SA, "cql_n_actions": 3, "cql_lagrange": True}, ()),
    "dare_cql_sa": (
        dare_cql_sa,
        {**SA, "cql_n_actions": 3},
        (hard_release(B, B // 2),),
    ),
    "spot": (spot, {"vae_hidden_dim": 32, "actor_dropout": 0.1}, ()),
    "opt_td3": (opt_td3, {}, (True,)),
    "dare_spot": (dare_spot, {"vae_hidden_dim": 32}, (hard_release(B, B // 2),)),
    "dare_opt_spot": (
        dare_opt_spot,
        {"vae_hidden_dim": 32},
        (True, hard_release(B, B // 2)),
    ),
    "awac": (awac, {"hidden_dim": 64}, ()),
    "rebrac": (rebrac, {"hidden_dim": 64}, ()),
    "dare_rebrac": (dare_rebrac, {"hidden_dim": 64}, (hard_release(B, B // 2),)),
    "dare_awac": (dare_awac, {"hidden_dim": 64}, (hard_release(B, B // 2),)),
    "dare_cql": (
        dare_cql,
        {"cql_n_actions": 3, "cql_lagrange": True},
        (hard_release(B, B // 2),),
    ),
    "dare_iql": (dare_iql, {"actor_lr": 1e-3}, (hard_release(B, B // 2),)),
    "dare_cal_ql": (
        dare_cal_ql,
        {
            "bc_steps": 0,
            "cql_n_actions": 3,
            "q_n_hidden_layers": 2,
            "cql_lagrange": True,
            "cql_max_target_backup": True,
        },
        (hard_release(B, B // 2),),
    ),
}


# One graph; one with and one without the policy; the most operations, of released rows. The others
# take up to two minutes of compiling each.
FAST = ("iql", "td3_bc", "dare_cal_ql")


@needs_compiler
@pytest.mark.parametrize("name", with_slow(FAST, CASES))
def test_the_compiled_update_is_the_eager_one_and_goes_on_after_a_resume(name):
    """Six updates of one trainer against three, a checkpoint and three more.

    The actor's rate falls along its cosine meanwhile, so a rate compiled in would show.
    """
    module, fields, arguments = CASES[name]
    tolerance = TOLERANCE.get(name, 2e-5)
    eager = make(module, False, **fields)
    expected = train(eager, module, 0, 6, arguments)
    torch._dynamo.reset()
    counters.clear()
    trainer = make(module, True, **fields)
    train(trainer, module, 0, 3, arguments)
    graphs = GRAPHS.get(name, 1)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    saved = copy.deepcopy(trainer.state_dict())
    logs = train(trainer, module, 3, 6, arguments)
    assert counters["stats"]["unique_graphs"] == graphs  # nothing compiled twice
    assert logs.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(logs[key], value, rtol=1e-3, atol=1e-5, msg=key)
    for key, value in networks(eager).items():
        gap = (networks(trainer)[key] - value).abs().max().item()
        assert gap < tolerance, f"{key} is off by {gap}"

    again = make(module, False, **fields)
    again.load_state_dict(saved)  # a checkpoint of one mode is one of the other
    train(again, module, 3, 6, arguments)
    for key, value in networks(again).items():
        gap = (networks(trainer)[key] - value).abs().max().item()
        assert gap < tolerance, f"{key} is off by {gap} after the resume"


@needs_compiler
@pytest.mark.parametrize("rule", ["threshold", "random"])  # the second stays eager
def test_a_compiled_hook_decides_as_the_eager_one(rule):
    results = []
    for compile in (None, compiled.function):
        torch._dynamo.reset()
        hook = make_hook(score="policy_ratio", rule=rule, compile=compile)
        hook.clipped_policy = True  # some actions are at a bound
        np.random.seed(0)
        results.append([hook.sample(32) for _ in range(3)])
    assert sum(drawn.log["exchanged"] for drawn in results[0]) > 0
    for eager, graph in zip(*results, strict=True):
        for ours, expected in zip(graph.batch, eager.batch, strict=True):
            assert torch.equal(ours, expected)  # the same rows in the same order
        assert torch.equal(graph.release.weight, eager.release.weight)
        assert graph.release.kept == eager.release.kept
        assert graph.log.keys() == eager.log.keys()
        for key, value in eager.log.items():
            torch.testing.assert_close(graph.log[key], value, msg=key)


@needs_compiler
def test_the_compiled_share_rule_moves_the_same_rows():
    generator = torch.Generator().manual_seed(0)
    scores = (
        torch.randn(64, generator=generator)
        + torch.tensor([-4.0, 4.0])[(torch.arange(64) % 32 < 8).long()]
    )  # log-ratios; a quarter of either half is high
    torch._dynamo.reset()
    expected = exchange(scores[:32], -scores[32:], rule="share")
    ours = compiled.function(exchange)(scores[:32], -scores[32:], rule="share")
    assert expected.stats["exchanged"] > 4
    assert torch.equal(ours.order, expected.order)


def test_a_missing_compiler_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="compile: true needs a C\\+\\+ compiler"):
        iql.TrainConfig(env=TASK, compile=True)
    iql.TrainConfig(env=TASK)


def test_the_step_of_a_graph_is_adams_for_parameters_that_moved_unequally_often():
    """Each parameter has the bias correction of its own count; float64, against torch's Adam."""
    pairs = [
        [torch.nn.Parameter(torch.tensor([1.0, -2.0]).double()) for _ in range(2)]
        for _ in range(2)
    ]
    theirs, ours = (torch.optim.Adam(pair, lr=0.1) for pair in pairs)
    # As `CompiledUpdate` marks them where no graph can be made.
    rate = torch.tensor(0.1).double()
    ours.traced_group = {**ours.param_groups[0], "lr": rate}
    ours.captured = True
    compiled.complete(ours)
    for number in range(6):
        for (a, b), optimizer in zip(pairs, (theirs, ours), strict=True):
            loss = b.square().sum() if number % 3 else (a.pow(4) * b).sum()
            compiled.descend(loss, optimizer)
    # The corrections are of float32.
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0)
    counts = [ours.state[parameter]["step"].item() for parameter in pairs[1]]
    assert counts == [2.0, 6.0]


def test_a_step_leaves_a_parameter_without_gradient_alone():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.Adam([a, b], lr=0.1)
    compiled.descend(a.sum(), optimizer)
    assert torch.equal(b, torch.ones(2)) and not torch.equal(a, b)
    assert a in optimizer.state and b not in optimizer.state


@pytest.mark.parametrize(
    "optimizer, named",
    [
        (lambda p: torch.optim.Adam([p], weight_decay=0.1), "weight_decay"),
        (lambda p: torch.optim.AdamW([p], weight_decay=0.0), "AdamW"),
        (lambda p: torch.optim.Adam([{"params": [p]}, {"params": []}]), "groups"),
    ],
)
def test_what_the_traced_step_does_not_know_is_refused(optimizer, named):
    made = optimizer(torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=f"only plain Adam.*{named}"):
        compiled.CompiledUpdate(lambda: {}, [made])
