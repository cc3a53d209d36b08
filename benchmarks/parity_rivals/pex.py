"""PEX: our algorithms/pex.py against the authors' classes, offline and online.

Their package runs as it is, with stubs for gym and d4rl, which it imports for its environments. It
draws the choice between the policies with `torch.multinomial`; here both sides draw it from the
same uniform numbers.
"""

import importlib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from algorithms import iql, pex
from benchmarks import parity
from benchmarks.parity_rivals import Case
from corl.shim import launch

# Parts of our trainer and of theirs; names of our parameters and of theirs.
PARTS = {"qf": "critic", "q_target": "target_critic", "vf": "vf"}
OFFLINE = {**PARTS, "actor": "policy"}
ONLINE = {**PARTS, "actor": "policy_offline", "actor_online": "policy"}
SETTINGS: dict[str, dict[str, Any]] = {
    "locomotion": {"beta": 3.0, "iql_tau": 0.7},
    "antmaze": {"beta": 10.0, "iql_tau": 0.9},
    # Q differs by less than 1 at first: then both policies are followed.
    "small inverse temperature": {"inv_temperature": 0.5, "beta": 1.0, "tau": 0.05},
}
OFFLINE_UPDATES = 15
EXPLANATION = "float32 rounding: the same terms are added up in another order"


def their_name(part: str, name: str) -> str:
    """The name that a parameter of ours has in their module."""
    if part.startswith("actor"):
        name = name.replace("net.net.4", "mean_linear").replace("net.net", "net")
    return name.replace(".net", "")


def their_state(part: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our part's `state_dict` under their names."""
    return {their_name(part, name): value.clone() for name, value in state.items()}


def packages(checkout: Path) -> Any:
    """Their modules: algorithms.iql, algorithms.pex, networks.policy, networks.value_functions."""
    with ExitStack() as opened:
        opened.enter_context(launch.installed())
        opened.enter_context(mock.patch.object(sys, "path", [str(checkout), *sys.path]))
        # Their device is chosen when they are imported.
        opened.enter_context(mock.patch("torch.cuda.is_available", lambda: False))
        names = "algorithms.iql algorithms.pex networks.policy networks.value_functions"
        return [importlib.import_module(f"pex.{name}") for name in names.split()]


def same_choice(law: torch.distributions.Categorical) -> torch.Tensor:
    """A sample of a law of two outcomes from uniform numbers, as ours is."""
    return (torch.rand(law.probs.shape[:-1]) < law.probs[..., 1]).long()


def their_trainer(modules: Any, config: Any, ours: Any, online: bool) -> Any:
    """A trainer of theirs with the weights of ours."""
    base, expanded, policies, values = modules
    networks = {
        "critic": values.DoubleCriticNetwork(parity.S, parity.A),
        "vf": values.ValueNetwork(parity.S),
        "policy": policies.GaussianPolicy(parity.S, parity.A, hidden_dim=256),
    }
    fields = {
        "optimizer_ctor": lambda params: torch.optim.Adam(params, lr=config.actor_lr),
        "tau": config.iql_tau,
        "beta": config.beta,
        "discount": config.discount,
        "target_update_rate": config.tau,
    }
    if online:
        more = {"ckpt_path": None, "inv_temperature": config.inv_temperature}
        theirs = expanded.PEX(**networks, **fields, **more)
    else:
        theirs = base.IQL(**networks, **fields, max_steps=config.offline_iterations)
    for part, name in (ONLINE if online else OFFLINE).items():
        state = their_state(part, getattr(ours, part).state_dict())
        getattr(theirs, name).load_state_dict(state)
    return theirs


def updated(modules: Any, config: Any, online: bool) -> tuple[Any, Any]:
    """Our trainer and theirs after the same updates of a phase."""
    torch.manual_seed(0)
    ours = pex.make_trainer(config, parity.S, parity.A, 1.0, "cpu")
    if online:
        # Policies that differ, as after an offline phase.
        ours.actor.apply(pex.xavier)
    theirs = their_trainer(modules, config, ours, online)
    for side in (ours, theirs):
        buffer = parity.buffer_of(iql, 0)
        np.random.seed(1)
        torch.manual_seed(1)
        for _ in range(parity.UPDATES):
            batch = buffer.sample(parity.B)
            if side is ours:
                ours.train(batch, online)
                continue
            states, actions, rewards, next_states, dones = batch
            theirs.update(states, actions, next_states, rewards[:, 0], dones[:, 0])
    return ours, theirs


def differences(ours: Any, theirs: Any, parts: dict[str, str]) -> dict[str, float]:
    """Parameter of ours -> largest difference."""
    found = {}
    for part, name in parts.items():
        other = getattr(theirs, name).state_dict()
        for key, value in getattr(ours, part).state_dict().items():
            gap = (value - other[their_name(part, key)]).abs().max()
            found[f"{part}.{key}"] = gap.item()
    return found


def acting(ours: Any, theirs: Any) -> float:
    """The largest difference of the actions that both composite policies draw."""
    states = np.random.default_rng(0).normal(size=(parity.B, parity.S))
    states = states.astype(np.float32)
    found = []
    torch.manual_seed(2)
    found.append(torch.from_numpy(ours.composite.act(states)))
    torch.manual_seed(2)
    with torch.no_grad():
        found.append(theirs.select_action(torch.from_numpy(states)))
    return (found[0] - found[1]).abs().max().item()


def cases(checkout: Path) -> list[Case]:
    """Both phases, and what the composite policy draws afterwards."""
    modules, results = packages(checkout), []
    with mock.patch.object(torch.distributions.Categorical, "sample", same_choice):
        for name, fields in SETTINGS.items():
            for phase, parts in (("offline", OFFLINE), ("online", ONLINE)):
                config = pex.TrainConfig(
                    env=parity.TASK, offline_iterations=OFFLINE_UPDATES, **fields
                )
                ours, theirs = updated(modules, config, phase == "online")
                found = differences(ours, theirs, parts)
                if phase == "online":
                    found["actions of the composite policy"] = acting(ours, theirs)
                results.append((f"pex, {name}, {phase}", found, EXPLANATION))
    return results
