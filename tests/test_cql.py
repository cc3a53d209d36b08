"""CQL, Cal-QL and DARE-Cal-QL: updates against a float64 oracle, returns to go, checkpoints.

With CORL_DIR set to CORL's folder the oracle is held against upstream's own files, too.
"""

import math
import os
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_cql import OracleCQL, Settings, returns_to_go

from benchmarks import parity

CORL_DIR = os.environ.get("CORL_DIR")
S, A, B, WIDTH = 5, 2, 12, 24
OWN_SETTINGS = {"max_action", "no_tanh", "calibrated", "resampled_bc"}


def upstream(name):
    if not CORL_DIR:
        pytest.skip("CORL_DIR is not set to CORL's folder")
    return parity.load(Path(CORL_DIR) / "algorithms/finetune" / f"{name}.py")


def narrow(net):
    """The same chain of layers, WIDTH wide: float64 rounding is all that is looked for."""
    linear = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
    sizes = [linear[0].in_features, *[WIDTH] * (len(linear) - 1), linear[-1].out_features]
    for i, layer in enumerate(linear):
        small = torch.nn.Linear(sizes[i], sizes[i + 1])
        layer.weight, layer.bias = small.weight, small.bias


def make_pair(module, n_hidden_layers=2, wide=False, **flags):
    """A trainer with its nets made small, and the oracle that starts from them."""
    settings = Settings(target_entropy=-A, **flags)
    torch.manual_seed(0)
    critics = [
        module.FullyConnectedQFunction(S, A, True, n_hidden_layers) for _ in range(2)
    ]
    actor = module.TanhGaussianPolicy(
        S, A, settings.max_action, orthogonal_init=True, no_tanh=settings.no_tanh
    )
    if not wide:
        for net in (critics[0].network, critics[1].network, actor.base_network):
            narrow(net)
    adam = lambda net, lr: torch.optim.Adam(net.parameters(), lr=lr)  # noqa: E731
    arguments = {
        f.name: getattr(settings, f.name)
        for f in fields(Settings)
        if f.name not in OWN_SETTINGS
    }
    kind = getattr(module, "CalQL", None) or module.ContinuousCQL
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
    modules = [
        (trainer.critic_1, oracle.q[0]),
        (trainer.critic_2, oracle.q[1]),
        (trainer.target_critic_1, oracle.target[0]),
        (trainer.target_critic_2, oracle.target[1]),
        (trainer.actor, oracle.actor),
    ]
    for module, expected in modules:
        for name, value in module.state_dict().items():
            gap = (value.double() - expected[name]).abs().max().item()
            assert gap < tolerance, f"{type(module).__name__}.{name} is off by {gap}"
    for name, expected in oracle.scalars.items():
        if getattr(trainer, name, None) is not None:
            value = getattr(trainer, name)().item()
            assert value == pytest.approx(expected.item(), abs=tolerance), name


def run_pair(trainer, oracle, updates, weights=None, seed=1):
    """Both sides get the same batches and draws; every logged number is compared."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    generator = torch.Generator()
    for _ in range(updates):
        batch = random_batch(rng, hasattr(trainer, "switch_calibration"))
        generator.set_state(torch.get_rng_state())
        drawn = oracle.draws(generator, B, A)
        weight = () if weights is None else (weights(rng),)
        logs = trainer.train(batch, *weight)
        expected = oracle.train(batch, drawn, *weight)
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
    "adroit": {"cql_alpha": 1.0, "cql_max_target_backup": True, "n_hidden_layers": 3},
    "fixed entropy": {"use_automatic_entropy_tuning": False, "alpha_multiplier": 0.5},
    "entropy in the backup": {"backup_entropy": True, "alpha_multiplier": 2.0},
    "entropy in the max backup": {"backup_entropy": True, "cql_max_target_backup": True},
    "no importance sampling": {"cql_importance_sample": False, "cql_temp": 0.5},
    "temperature": {"cql_temp": 2.0, "cql_n_actions": 3, "cql_lagrange": True},
    "clipped gaps": {"cql_clip_diff_min": 2.4, "cql_clip_diff_max": 2.7},
    "warm-up": {"bc_steps": 8},
    "slow targets": {"target_update_period": 3, "soft_target_update_rate": 0.1},
    "wide actions": {"max_action": 2.0, "discount": 0.9},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["cql", "cal_ql"])
def test_the_oracle_is_upstream(name, case):
    module = upstream(name)
    for calibrated in {"cql": [False], "cal_ql": [False, True]}[name]:
        trainer, oracle = make_pair(module, **CASES[case], calibrated=calibrated)
        run_pair(trainer, oracle, 20)
        assert_same(trainer, oracle)
