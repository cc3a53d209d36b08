"""RLPD: our algorithms/rlpd.py against the authors' learner, which is JAX."""

from pathlib import Path
from typing import Any

import torch

from algorithms import rlpd
from benchmarks import parity
from benchmarks.parity_rivals import Case
from benchmarks.parity_rivals.ensembles import Authors, differences

SETTINGS: dict[str, dict[str, Any]] = {
    "locomotion": {},
    "antmaze": {
        "n_hidden_layers": 3,
        "n_target_critics": 1,
        "backup_entropy": False,
    },
}
EXPLANATIONS = {
    torch.float32: "float32 rounding, which Adam enlarges where a gradient is almost 0",
    torch.float64: "rounding",
}
# The most that rounding explains in so few updates.
LIMITS = {torch.float32: 1e-3, torch.float64: 1e-6}


def explained(gaps: dict[str, float], dtype: torch.dtype) -> str:
    """What makes the differences, or that it is not known."""
    if max(gaps.values()) < LIMITS[dtype]:
        return EXPLANATIONS[dtype]
    return "more than rounding, and not explained yet"


def cases(checkout: Path, jax_python: Path) -> list[Case]:
    """Whole environment steps of four updates each, in float32 and in float64."""
    authors, found = Authors("rlpd", checkout, jax_python), []
    for name, fields in SETTINGS.items():
        config = rlpd.TrainConfig(
            env=parity.TASK, compile=False, utd=4, hidden_dim=64, **fields
        )
        theirs = {
            "hidden_dims": [config.hidden_dim] * config.n_hidden_layers,
            "num_qs": config.n_critics,
            "num_min_qs": config.n_target_critics,
            "critic_layer_norm": True,
            "backup_entropy": config.backup_entropy,
        }
        settings = {"utd": config.utd, "theirs": theirs}
        for dtype in EXPLANATIONS:
            gaps = differences(authors, rlpd, config, True, settings, dtype)
            kind = str(dtype).removeprefix("torch.")
            found.append((f"rlpd, {name}, {kind}", gaps, explained(gaps, dtype)))
    return found
