"""WSRL: our algorithms/wsrl.py against the authors' agents, which are JAX, in both phases.

Where their multiplier draws new actions, they get those of the batch, as ours has them.
"""

from pathlib import Path
from typing import Any

from algorithms import wsrl
from benchmarks import parity
from benchmarks.parity_rivals import Case
from benchmarks.parity_rivals.ensembles import Authors, differences
from benchmarks.parity_rivals.rlpd import EXPLANATIONS, explained

MAZE = {
    "base": "cal_ql",
    "cql_alpha": 1.0,
    "cql_lagrange": True,
    "state_dependent_std": False,
    "q_n_hidden_layers": 4,
    "max_target_backup_online": True,
}
# Case -> fields of ours, their agent and the name of its settings.
OFFLINE: dict[str, tuple[dict[str, Any], str, str]] = {
    "locomotion": ({}, "cql", "locomotion_cql"),
    "antmaze": (MAZE, "calql", "antmaze_cql"),
}
ONLINE: dict[str, tuple[dict[str, Any], str, str]] = {
    "locomotion": ({}, "sac", "locomotion_wsrl"),
    "antmaze": (MAZE, "sac", "antmaze_wsrl"),
}


def cases(checkout: Path, jax_python: Path) -> list[Case]:
    """Updates of both phases, in float32 and in float64."""
    authors, found = Authors("wsrl", checkout, jax_python), []
    for phase, chosen in (("offline", OFFLINE), ("online", ONLINE)):
        for name, (fields, agent, settings) in chosen.items():
            online = phase == "online"
            config = wsrl.TrainConfig(
                env=parity.TASK, compile=False, zero_gradient_steps=online, **fields
            )
            case = {
                "agent": agent,
                "config": settings,
                "online": online,
                "utd": config.utd if online else 1,
                "theirs": {},
            }
            for dtype in EXPLANATIONS:
                gaps = differences(authors, wsrl, config, online, case, dtype)
                kind = str(dtype).removeprefix("torch.")
                title = f"wsrl, {name}, {phase}, {kind}"
                found.append((title, gaps, explained(gaps, dtype)))
    return found
