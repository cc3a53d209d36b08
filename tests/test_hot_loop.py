"""An update never waits for the device: no host read, no data-dependent shape.

FakeTensorMode knows shapes and no values: it raises on `.item()`, on `if tensor`, on boolean
mask indexing. It lets `.cpu()` pass, so a second guard counts copies to the host.
"""

import copy
import sys
from functools import partial

import pytest
import torch
from helpers import make_hook
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from algorithms import (
    awac,
    baq_cal_ql,
    cal_ql,
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
from corl_dare.hook import Release

S, A, B = 11, 3, 32
TASK = "hopper-medium-v2"


class HostReads(TorchFunctionMode):
    """Counts calls that copy a tensor to the host; optimizers' step counters live there."""

    NAMES = (
        "cpu",
        "item",
        "tolist",
        "numpy",
        "__bool__",
        "__float__",
        "__int__",
        "nonzero",
    )

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.NAMES and not self.inside_optimizer():
            self.calls.append(name)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def inside_optimizer():
        frame = sys._getframe()
        while frame is not None:
            if "torch/optim" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False


def batch():
    return [
        torch.randn(B, S),
        torch.rand(B, A),
        torch.randn(B, 1),
        torch.randn(B, S),
    ] + [torch.zeros(B, 1)]


def make_trainer(module, **fields):
    config = module.TrainConfig(env=TASK, **fields)
    return module.make_trainer(config, S, A, 1.0, "cpu")


def later(make):
    """Calls of `make` wait until they are called: a test needs one trainer and not all of them."""
    return lambda *args, **fields: partial(make, *args, **fields)


def updates():
    """Name -> what makes a trainer, and returns a callable that makes one update of it."""

    @later
    def plain(deterministic):
        trainer = make_trainer(iql, iql_deterministic=deterministic)
        return lambda: trainer.train(batch())

    @later
    def in_phase(module, online, **fields):
        trainer = make_trainer(module, **fields)
        release = [Release(torch.rand(B))] * (module is dare_famo2o_cql)
        return lambda: trainer.train(batch(), online, *release)

    @later
    def weighed():
        trainer = make_trainer(baq_cal_ql, cql_n_actions=2)
        more = [torch.randn(B, 1)]
        return lambda: trainer.train(batch() + more, torch.rand(B))

    @later
    def ensemble(module, online, **fields):
        trainer = make_trainer(module, utd=1, hidden_dim=16, **fields)
        returns = [torch.randn(B, 1)] * (module in (wsrl, dare_wsrl))
        release = [Release(torch.rand(B))] * (module is dare_wsrl)
        return lambda: trainer.train(batch() + returns, online, *release)

    @later
    def dare(value):
        block = dare_iql.DareIQLConfig(value=value)
        trainer = make_trainer(dare_iql, dare=block)
        # FakeTensorMode takes no generator: the global stream will do for shapes.
        trainer.dare_generator = None
        return lambda: trainer.train(batch(), Release(torch.rand(B)))

    @later
    def conservative(module, **fields):
        trainer = make_trainer(module, cql_n_actions=2, **fields)
        extra = [torch.randn(B, 1)] * (module in (cal_ql, dare_cal_ql))
        twins = (dare_cql, dare_cal_ql, dare_cql_sa)
        release = [Release(torch.rand(B))] * (module in twins)
        return lambda: trainer.train(batch() + extra, *release)

    maze = {"cql_lagrange": True, "cql_max_target_backup": True, "backup_entropy": True}

    @later
    def actor_critic(module, **fields):
        trainer = make_trainer(module, **fields)
        # The policy of TD3+BC learns in the second update, that of ReBRAC in the first.
        next_actions = getattr(module.TrainConfig, "NEXT_ACTIONS", False)
        trainer.total_it = 0 if next_actions else 1
        more = [torch.rand(B, A)] * next_actions
        twins = (dare_td3_bc, dare_awac, dare_rebrac, dare_spot)
        release = [Release(torch.rand(B))] * (module in twins)
        return lambda: trainer.train(batch() + more, *release)

    @later
    def vae():
        trainer = make_trainer(spot)
        return lambda: trainer.vae_train(batch())

    @later
    def ssar_filter():
        trainer = make_trainer(td3_bc_sa, trust_by="iql")
        return lambda: trainer.chosen_by.train(batch())

    @later
    def pretrained(module, online):
        trainer = make_trainer(module)
        # FakeTensorMode takes no generator: the global stream will do for shapes.
        trainer.draws.generator = None
        trainer.total_it, count = 1, iter(range(10))
        release = [Release(torch.rand(B))] * (module is dare_opt_spot)
        if online:
            return lambda: trainer.train(batch(), True, *release)
        return lambda: trainer.pretrain(batch(), batch(), next(count))

    dropout = {"actor_dropout": 0.1}
    return {
        "spot": actor_critic(spot, **dropout),
        "spot iwae": actor_critic(spot, iwae=True, num_samples=2),
        "spot vae": vae(),
        "dare_spot": actor_critic(dare_spot, **dropout),
        "dare_td3_bc": actor_critic(dare_td3_bc),
        "td3_bc": actor_critic(td3_bc),
        "td3_bc_sa": actor_critic(td3_bc_sa),
        "cql_sa": conservative(cql_sa, **maze),
        "dare_cql_sa": conservative(dare_cql_sa, **maze),
        "ssar filter": ssar_filter(),
        "awac": actor_critic(awac),
        "rebrac": actor_critic(rebrac),
        "dare_rebrac": actor_critic(dare_rebrac),
        "dare_awac": actor_critic(dare_awac),
        "dare_cql": conservative(dare_cql, **maze),
        "cql": conservative(cql),
        "cal_ql": conservative(cal_ql, **maze),
        "cal_ql cloning": conservative(cal_ql, bc_steps=5, cql_importance_sample=False),
        "dare_cal_ql": conservative(dare_cal_ql, **maze),
        "iql": plain(False),
        "e2o": ensemble(e2o, False, cql_n_actions=2),
        "e2o online": ensemble(e2o, True),
        "baq_cal_ql": weighed(),
        "rlpd online": ensemble(rlpd, True),
        "wsrl": ensemble(wsrl, False, base="cal_ql", cql_lagrange=True),
        "wsrl online": ensemble(wsrl, True),
        "dare_wsrl online": ensemble(dare_wsrl, True, cql_lagrange=True),
        "pex": in_phase(pex, False),
        "pex online": in_phase(pex, True),
        "famo2o_iql": in_phase(famo2o_iql, False, weights_of="batch"),
        "famo2o_iql online": in_phase(famo2o_iql, True),
        "famo2o_cql": in_phase(famo2o_cql, False, cql_n_actions=2),
        "famo2o_cql online": in_phase(famo2o_cql, True, cql_n_actions=2),
        "dare_famo2o_cql": in_phase(dare_famo2o_cql, True, cql_n_actions=2),
        **{
            f"{module.__name__[11:]} {name}": pretrained(module, name == "online")
            for module in (opt_td3, opt_spot, dare_opt_spot)
            for name in ("online", "pre-training")
        },
        "iql deterministic": plain(True),
        **{f"dare_iql {value}": dare(value) for value in ("all", "offline", "iv")},
    }


PHASES = ("", " online")
NAMES = ["iql", "iql deterministic", "dare_iql all", "dare_iql offline", "dare_iql iv"]
NAMES += ["cql", "cal_ql", "cal_ql cloning", "dare_cal_ql"]
NAMES += ["td3_bc", "dare_td3_bc", "awac", "dare_awac", "dare_cql"]
NAMES += ["td3_bc_sa", "cql_sa", "ssar filter", "dare_cql_sa", "dare_famo2o_cql"]
NAMES += ["rebrac", "dare_rebrac", "spot", "spot iwae", "spot vae", "dare_spot"]
NAMES += ["e2o", "e2o online", "baq_cal_ql"]
NAMES += ["rlpd online", "wsrl", "wsrl online", "dare_wsrl online"]
NAMES += [f"{x}{phase}" for x in ("pex", "famo2o_iql", "famo2o_cql") for phase in PHASES]
NAMES += ["opt_td3 online", "opt_td3 pre-training"]
NAMES += ["opt_spot online", "opt_spot pre-training", "dare_opt_spot online"]


@pytest.mark.parametrize("name", NAMES)
def test_update_reads_nothing_on_the_host(name, monkeypatch):
    deepcopy = copy.deepcopy
    with FakeTensorMode() as mode, monkeypatch.context() as patch:
        # Two things that fake parameters cannot do: be moved to where they are, and be copied
        # without a copy of their mode.
        patch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)
        patch.setattr(copy, "deepcopy", lambda x: deepcopy(x, {id(mode): mode}))
        work = updates()[name]()
        work()
        work()
    work = updates()[name]()
    with HostReads() as reads:
        logs = work()
    assert reads.calls == []
    assert all(isinstance(v, torch.Tensor) and v.ndim == 0 for v in logs.values())


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "mixture", "score": "policy_ratio"},
        {"kind": "mixture", "score": "likelihood", "weights": "soft"},
        {"kind": "diffusion", "guidance_scale": 2.0},
        {"kind": "diffusion", "rule": "posterior", "skip_inverted": True},
        {"kind": "diffusion", "rule": "random"},
        {"kind": "diffusion", "rule": "direct", "reference_max_age": 5},
    ],
)
def test_hook_reads_nothing_on_the_host(fields):
    """Row numbers are drawn on the host, as CORL does; scores, weights and logs stay put."""
    hook = make_hook(**fields)
    hook.update_energy(hook.sample(16))
    with HostReads() as reads:
        drawn = hook.sample(16)
        log = {**drawn.log, **hook.update_energy(drawn)}
    reads.calls = [c for c in reads.calls if c != "numpy"]  # of the row numbers
    assert reads.calls == []
    assert all(isinstance(v, torch.Tensor) and v.ndim == 0 for v in log.values())


def test_the_guard_sees_a_host_read():
    with HostReads() as reads:
        torch.ones(3).sum().item()
        torch.ones(3).cpu()
    assert reads.calls == ["item", "cpu"]
    with (
        FakeTensorMode(),
        pytest.raises(Exception, match="_local_scalar_dense"),
    ):
        torch.ones(3).sum().item()


def test_scores_have_no_data_dependent_shape():
    from corl_dare.exchange import exchange

    with FakeTensorMode(allow_non_fake_inputs=True):
        for rule in ("threshold", "posterior", "direct"):
            result = exchange(torch.randn(16), torch.randn(16), 4, rule, weights="soft")
            assert result.order.shape == (32,)
