"""TD3+BC(SA), CQL(SA) and the IQL filter against the authors' own updates, on the CPU.

`cases(checkout)` takes the folder of a checkout of QinwenLuo/SSAR (commit 7e6dc0b). Both sides get
the same weights, batches, trust flags and random draws. The authors' files are loaded
with stand-ins for the packages that their trainers do not use; nothing of theirs is changed.
"""

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptive_regularization.iql_filter import IQLFilter
from algorithms import cql_sa, td3_bc_sa
from corl.compiled import descend, soft_update

S, A, B, UPDATES = 11, 3, 64, 12
# Our updates before the online phase begins.
OFFLINE = 9
TASK = "hopper-medium-v2"
# What the files import and their trainers do not call.
UNUSED = (
    *("d4rl", "d4rl.gym_mujoco", "gym", "gym.envs", "gym.envs.classic_control"),
    *("gym.envs.classic_control.acrobot", "pyrallis", "tensorboardX"),
)
OWN = ("net", "action_selection", "dataset_utils", "utils", "cql", "td3_bc")
SHARED = {"beta_lr": 1e-4, "n_period": 4}
Case = tuple[str, dict[str, float], str]
# Names of a parameter's layers in their coefficient network -> in ours.
BETA = {f"fc{i + 1}": f"net.{2 * i}" for i in range(4)}


class Unused(types.ModuleType):
    """A module in which every name is a class that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # As a decorator it hands the function back.
        if name == "wrap":
            return lambda: lambda function: function
        return type(name, (), {})


@contextmanager
def loaded(checkout: Path) -> Iterator[Callable[[str], Any]]:
    """Inside, the authors' modules can be imported by name."""
    before = {name: sys.modules.pop(name, None) for name in (*UNUSED, *OWN)}
    sys.modules.update({name: Unused(name) for name in UNUSED})
    sys.path.insert(0, str(checkout))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(checkout))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@contextmanager
def double_precision() -> Iterator[None]:
    """Inside, networks, batches and draws are of float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def batches(count: int) -> Iterator[list[torch.Tensor]]:
    """Random batches with the trust of their rows as a last field (B, 1)."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        rows = [rng.normal(size=(B, n)) for n in (S, A, 1, S, 1, 1)]
        batch = [torch.tensor(x, dtype=torch.get_default_dtype()) for x in rows]
        batch[1] = batch[1].tanh().clamp(-0.9999, 0.9999)
        batch[4], batch[5] = (batch[4] > 1).to(batch[0]), (batch[5] > -0.3).to(batch[0])
        yield batch


def copy_beta(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Give their coefficient network our weights."""
    state = ours.state_dict()
    names = {f"{k}.{w}": f"{v}.{w}" for k, v in BETA.items() for w in ("weight", "bias")}
    theirs.load_state_dict({k: state[v] for k, v in names.items()})


def differences(ours: Any, theirs: Any, parts: list[str]) -> dict[str, float]:
    """Parameter -> the largest difference after all updates."""
    found = {}
    for part in parts:
        one, two = (getattr(x, part).state_dict() for x in (ours, theirs))
        if part == "beta":
            two = {
                f"{BETA[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in two.items()
            }
        for name, value in one.items():
            gap = (value - two[name]).abs().max().item()
            found[f"{part}.{name}"] = gap
    found["n"] = abs(ours.threshold.n.item() - theirs.n_away)
    return found


def train(ours: Any, theirs: Any, decay: Callable[[int], float]) -> None:
    """The same updates of both, offline and then online.

    Args:
        decay: updates online, from 1 -> factor on the coefficient.
    """
    for number, batch in enumerate(batches(UPDATES)):
        online = max(number + 1 - OFFLINE, 0)
        if online == 1:
            start_online(ours)
        ours.decay = decay(online) if online else 1.0
        for trainer, more in ((ours, ()), (theirs, (online,))):
            torch.manual_seed(number)
            trainer.train([x.clone() for x in batch], *more)


def start_online(trainer: Any) -> None:
    """The switch of either algorithm; the policy learns as often as before."""
    if isinstance(trainer, td3_bc_sa.TD3_BC_SA):
        trainer.start_online(trainer.policy_freq)
    else:
        trainer.start_online()


def td3_case(module: Any, fields: dict[str, Any]) -> dict[str, float]:
    """Their TD3+BC(SA) and ours from the same weights."""
    config = td3_bc_sa.TrainConfig(env=TASK, compile=False, **SHARED, **fields)
    torch.manual_seed(0)
    ours = td3_bc_sa.make_trainer(config, S, A, 1.0, "cpu")
    networks: dict[str, Any] = {"actor": module.Actor(S, A, 1.0)}
    for name in ("critic_1", "critic_2"):
        networks[name] = module.Critic(S, A)
    for name, network in networks.items():
        network.load_state_dict(getattr(ours, name).state_dict())
    optimizers = {
        f"{name}_optimizer": torch.optim.Adam(network.parameters(), lr=3e-4)
        for name, network in networks.items()
    }
    theirs = module.TD3_BC(
        max_action=1.0,
        **networks,
        **optimizers,
        init_beta=1.0 / config.alpha,
        expl_noise=config.delta,
        loosen_bound=config.trust_penalty,
        **settings(config),
    )
    copy_beta(ours.beta, theirs.beta)
    train(ours, theirs, config.decay)
    targets = [f"{name}_target" for name in networks]
    return differences(ours, theirs, [*networks, *targets, "beta"])


def settings(config: Any) -> dict[str, Any]:
    """Fields that both of their trainers have."""
    return {
        "min_n_away": config.n_start,
        "max_n_away": config.n_end,
        "update_period": config.n_period,
        "beta_lr": config.beta_lr,
        "decay_steps": config.beta_anneal_steps,
    }


CQL_FIELDS = (
    *("policy_lr", "qf_lr", "cql_n_actions", "cql_lagrange", "cql_target_action_gap"),
    *("cql_alpha", "cql_max_target_backup", "cql_clip_diff_min", "cql_clip_diff_max"),
    *("bc_steps", "device"),
)


def cql_case(module: Any, fields: dict[str, Any]) -> dict[str, float]:
    """Their CQL(SA) and ours from the same weights."""
    config = cql_sa.TrainConfig(env=TASK, compile=False, **SHARED, **fields)
    torch.manual_seed(0)
    ours = cql_sa.make_trainer(config, S, A, 1.0, "cpu")
    depths = config.q_n_hidden_layers, config.q2_n_hidden_layers
    networks: dict[str, Any] = {
        f"critic_{i + 1}": module.FullyConnectedQFunction(S, A, True, depth or depths[0])
        for i, depth in enumerate(depths)
    }
    networks["actor"] = module.TanhGaussianPolicy(S, A, 1.0)
    rates = {"actor": config.policy_lr}
    optimizers = {}
    for name, network in networks.items():
        network.load_state_dict(getattr(ours, name).state_dict())
        made = torch.optim.Adam(network.parameters(), rates.get(name, config.qf_lr))
        optimizers[f"{name}_optimizer"] = made
    known = {k: getattr(config, k) for k in CQL_FIELDS if hasattr(config, k)}
    theirs = module.ContinuousCQL(
        # They look for "ant" in the name.
        env="antmaze" if config.actor_bc_weight else "hopper",
        **networks,
        **optimizers,
        target_entropy=-float(A),
        loosen_bound=config.trust_penalty,
        **{**known, "device": "cpu", "bc_steps": 0},
        **settings(config),
    )
    copy_beta(ours.beta, theirs.beta)
    train(ours, theirs, config.decay)
    targets = ["target_critic_1", "target_critic_2"]
    parts = [*networks, *targets, "beta", "log_alpha", "log_alpha_prime"]
    return differences(ours, theirs, parts)


def filter_case(module: Any) -> dict[str, float]:
    """Their critics and values, and which rows they trust, against ours."""
    torch.manual_seed(0)
    ours = IQLFilter(S, A, descend, soft_update, expectile=0.7)
    rng = np.random.default_rng(1)
    shapes = {"observations": (600, S), "actions": (600, A), "rewards": (600,)}
    shapes |= {"next_observations": (600, S), "terminals": (600,)}
    data = {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}
    theirs = module.IQL_qv(S, A, 700, 1.0, iql_tau=0.7, dataset=data)
    for i in (1, 2):
        state = {
            f"net.{k}": v for k, v in getattr(ours.critics, f"q{i}").state_dict().items()
        }
        getattr(theirs.qf, f"q{i}").load_state_dict(state)
    theirs.vf.v.load_state_dict(
        {f"net.{k}": v for k, v in ours.value.state_dict().items()}
    )
    theirs.q_target.load_state_dict(theirs.qf.state_dict())
    for batch in batches(UPDATES):
        ours.train(batch)
        s, a, r, s2, d = batch[:5]
        with torch.no_grad():
            next_v = theirs.vf(s2)
        theirs._update_v(s, a, {})
        theirs._update_q(next_v, s, a, r.squeeze(-1), d.squeeze(-1), {})
    found = {}
    pairs = {"q1": theirs.qf.q1, "q2": theirs.qf.q2, "value": theirs.vf.v}
    for name, network in pairs.items():
        own = ours.value if name == "value" else getattr(ours.critics, name)
        for key, value in own.state_dict().items():
            other = network.state_dict()[f"net.{key}"]
            found[f"{name}.{key}"] = (value - other).abs().max().item()
    trusted = theirs.modify_trusts()._trusts[:600, 0]
    own_trust = ours.trusted(
        *(torch.tensor(data[k]) for k in ("observations", "actions"))
    )
    found["trusted rows that differ"] = (own_trust.float() != trusted).sum().item()
    return found


ANTMAZE = {
    **{"cql_lagrange": True, "cql_target_action_gap": 0.8, "cql_alpha": 5.0},
    **{"cql_max_target_backup": True, "cql_clip_diff_min": -200.0},
    **{"actor_bc_weight": 0.5, "trust_penalty": False, "policy_lr": 1e-4},
    **{"q_n_hidden_layers": 5, "q2_n_hidden_layers": 3, "n_end": 5.0},
}
SHORT = {"beta_anneal_steps": 10}
TD3_CASES = {
    "locomotion": {"beta_anneal": "linear", **SHORT},
    "antmaze": {"beta_anneal": "linear", "trust_penalty": False, "n_end": 5.0, **SHORT},
}
CQL_CASES = {
    "locomotion": {"beta_anneal": "cosine", **SHORT},
    "antmaze": {"beta_anneal": "cosine", **SHORT, **ANTMAZE},
}
WHY = (
    "rounding of float32: they square and average over rows and dimensions at once, we over the "
    "dimensions of a row first"
)
WHY_CQL = (
    "rounding of float32: they repeat a state for each of its actions before the policy, we after "
    "it; see the case in float64"
)
WHY_DOUBLE = (
    "rounding: multipliers, n and decay are of float32 or float64 on one side alone"
)


def cases(checkout: Path | str) -> list[Case]:
    """(case, parameter -> largest difference, what explains it) for each case."""
    with loaded(Path(checkout)) as module:
        td3, cql, filters = (module(x) for x in ("td3_bc", "cql", "action_selection"))
        found: list[Case] = []
        for name, fields in TD3_CASES.items():
            found.append((f"td3_bc_sa, {name}", td3_case(td3, fields), WHY))
        for name, fields in CQL_CASES.items():
            found.append((f"cql_sa, {name}", cql_case(cql, fields), WHY_CQL))
            with double_precision():
                gaps = cql_case(cql, fields)
            found.append((f"cql_sa, {name}, float64", gaps, WHY_DOUBLE))
        found.append(("ssar filter", filter_case(filters), "nothing: the same bits"))
    return found
