"""FamO2O: our famo2o_iql.py and famo2o_cql.py against the authors' JAX programs, in both phases.

Its Python has JAX; benchmarks/famo2o_jax.py says which packages. The cases have
`--preset public_code`, since the programs have no other form. Draws are ours: the programs' random
numbers are taken from them. FamCQL's program draws new ones for each network's loss; here all
losses have the same.
"""

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from algorithms import famo2o_cql, famo2o_iql, iql
from benchmarks import parity
from benchmarks.parity_rivals import Case

UPDATES, B = 4, 64
FIELDS = ("observations", "actions", "rewards", "next_observations", "dones")
ALIKE = {"iql": famo2o_iql, "cql": famo2o_cql}
PARTS = {
    "iql": ("policy", "balance", "qf", "q_target", "vf", "log_eta"),
    "cql": (
        *("policy", "balance", "log_alpha", "critic_1", "critic_2"),
        *("target_critic_1", "target_critic_2"),
    ),
}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "iql": {
        "antmaze": {"iql_tau": 0.9, "beta_low": 8.0, "beta_high": 14.0},
        "narrow": {"target_entropy": 0.5, "eta_init": 0.3, "tau": 0.05},
    },
    "cql": {
        "locomotion": {"cql_n_actions": 4},
        "wide": {"beta_low": 0.0, "beta_high": 4.0, "cql_alpha": 5.0},
    },
}
WHY = (
    "float32 rounding: the same terms are added up in another order; where a gradient is as small "
    "as Adam's epsilon, rounding is a part of the step (3e-4)"
)
WHY_DOUBLE = "float64 rounding"


@contextmanager
def numbers_of(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have a type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def part_of(trainer: Any, name: str) -> torch.nn.Module:
    """A network of a trainer; the family and its balance model lie in the actor."""
    return getattr(trainer.actor if name in ("policy", "balance") else trainer, name)


def draws_of(base: str, config: Any, noise: Any) -> dict[str, list[torch.Tensor]]:
    """The numbers of an update in the order in which the authors' program asks for them."""
    even = []
    if noise.share is not None:
        width = config.beta_high - config.beta_low
        even = [config.beta_low + noise.share * width]
    if base == "iql":
        drawn = [] if noise.drawn is None else [noise.drawn]
        # Their library draws the columns of an action one after the other.
        normal = [noise.balance, noise.action.mT, *drawn]
        return {"normal": normal, "uniform": even}
    induced = [] if noise.induced is None else [noise.induced]
    normal = [noise.balance, noise.policy, *induced, noise.backup]
    normal += [noise.current, noise.following]
    return {"normal": normal, "uniform": [*even, noise.uniform]}


def our_run(
    base: str, config: Any, online: bool, dtype: torch.dtype
) -> tuple[Any, dict]:
    """Our trainer after the updates, and all that the authors' program needs to make them."""
    module: Any = ALIKE[base]
    torch.manual_seed(0)
    trainer = module.make_trainer(config, parity.S, parity.A, 1.0, "cpu")
    case: dict[str, Any] = {
        f"start.{part}.{name}": value.numpy().copy()
        for part in PARTS[base]
        for name, value in part_of(trainer, part).state_dict().items()
    }
    settings = {**dataclasses.asdict(config), "online": online}
    case["settings"] = json.dumps(settings, default=str)
    buffer, draw = parity.buffer_of(iql, 0), trainer._noise
    np.random.seed(1)
    torch.manual_seed(1)
    batches, draws = [], []
    for _ in range(UPDATES):
        batch = [field.to(dtype) for field in buffer.sample(B)]
        # Theirs are clipped when they are read.
        batch[1] = batch[1].clamp(-0.999, 0.999)
        noise = draw(batch[1], online)
        trainer._noise = lambda *_, noise=noise: noise
        trainer.train(batch, online)
        batches.append(batch)
        draws.append(draws_of(base, config, noise))
    columns = [torch.stack(column).numpy() for column in zip(*batches, strict=True)]
    case.update(zip(FIELDS, columns, strict=True))
    case.update(rewards=case["rewards"][..., 0], dones=case["dones"][..., 0])
    for kind in ("normal", "uniform"):
        for number in range(len(draws[0][kind])):
            rows = [update[kind][number].numpy() for update in draws]
            case[f"{kind}.{number}"] = np.stack(rows)
    return trainer, case


def their_run(
    base: str, checkout: Path, python: Path, case: dict, wide: bool
) -> dict[str, np.ndarray]:
    """The weights that the authors' program makes of a case.

    Raises:
        ValueError: the program fails.
    """
    worker = Path(__file__).parent.parent / "famo2o_jax.py"
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "case.npz", Path(folder) / "result.npz"
        np.savez(given, **case)
        command = [str(python), str(worker), str(checkout.absolute()), base, given, made]
        environment = {
            **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            "JAX_ENABLE_X64": str(int(wide)),
            "JAX_PLATFORMS": "cpu",
        }
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(f"{python}: {done.stderr.strip()[-500:]}")
        with np.load(made) as arrays:
            return dict(arrays)


def differences(base: str, trainer: Any, theirs: dict) -> dict[str, float]:
    """Parameter of ours -> largest difference."""
    return {
        f"{part}.{name}": float(np.abs(value.numpy() - theirs[f"{part}.{name}"]).max())
        for part in PARTS[base]
        for name, value in part_of(trainer, part).state_dict().items()
    }


def cases(checkout: Path, python: Path) -> list[Case]:
    """Both bases, both phases, in float64 and in part in float32."""
    results = []
    for base, settings in SETTINGS.items():
        kind: Any = ALIKE[base].TrainConfig
        first = next(iter(settings.values()))
        for name, fields in settings.items():
            given = {**kind.PRESETS["public_code"], **fields}
            config = kind(env=parity.TASK, compile=False, threads=1, **given)
            exact = (torch.float64, WHY_DOUBLE)
            # The first settings in single precision, too.
            kinds = [(torch.float32, WHY), exact] if fields is first else [exact]
            for phase in ("offline", "online"):
                for dtype, why in kinds:
                    with numbers_of(dtype):
                        ours, case = our_run(base, config, phase == "online", dtype)
                    wide = dtype is torch.float64
                    theirs = their_run(base, checkout, python, case, wide)
                    title = f"famo2o_{base}, {name}, {phase}, {str(dtype)[6:]}"
                    results.append((title, differences(base, ours, theirs), why))
    return results
