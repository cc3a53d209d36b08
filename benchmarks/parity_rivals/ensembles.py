"""Our updates of RLPD and WSRL, and those of their authors in a Python with JAX."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from algorithms import cal_ql
from benchmarks import parity

UPDATES = 8
WORKER = Path(__file__).with_name("ensembles_jax.py")
FIELDS = "observations actions rewards next_observations masks mc_returns".split()


class Authors(NamedTuple):
    """The authors' program `name` in a checkout, and a Python that can run it."""

    name: str
    checkout: Path
    python: Path

    def after(self, case: dict[str, Any], dtype: torch.dtype) -> dict[str, np.ndarray]:
        """The weights that their updates of a case end with, by our names.

        Raises:
            RuntimeError: they failed.
        """
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder) / "case.npz", Path(folder) / "result.npz"
            np.savez(given, **case)
            command = [self.python, WORKER, self.name, self.checkout, given, made]
            wide = str(int(dtype is torch.float64))
            environment = {**os.environ, "JAX_ENABLE_X64": wide, "JAX_PLATFORMS": "cpu"}
            environment.pop("PYTHONPATH", None)
            done = subprocess.run(
                list(map(str, command)), env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{self.python}: {done.stderr.strip()[-3000:]}")
            with np.load(made) as arrays:
                return dict(arrays)


def parts_of(trainer: Any) -> dict[str, torch.Tensor]:
    """The parameters of a trainer by part and name."""
    names = "actor critics target_critics temperature multiplier".split()
    return {
        f"{part}.{name}": value
        for part in names
        if hasattr(trainer, part)
        for name, value in getattr(trainer, part).state_dict().items()
    }


def our_run(
    module: Any, config: Any, online: bool, settings: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Our weights after the updates, and all that the authors need to make the same ones."""
    torch.manual_seed(0)
    trainer = module.make_trainer(config, parity.S, parity.A, 1.0, "cpu")
    for part in vars(trainer).values():
        if isinstance(part, torch.nn.Module):
            part.to(dtype)
    for optimizer in trainer.optimizers():
        # Its moments are of the type that the parameters had.
        optimizer.state.clear()
    start = {f"start.{k}": v.numpy().copy() for k, v in parts_of(trainer).items()}
    case: dict[str, Any] = {**start, "settings": json.dumps(settings)}
    buffer, draw, batches = parity.buffer_of(cal_ql, 0), trainer._noise, []
    np.random.seed(1)
    torch.manual_seed(1)

    def recorded(actions: torch.Tensor, *flags: Any) -> Any:
        noise = draw(actions, *flags)
        for name, value in noise._asdict().items():
            if value is not None:
                case[f"noise.{len(batches) - 1}.{name}"] = value.numpy()
        return noise

    trainer._noise = recorded
    for _ in range(UPDATES):
        batch = [column.to(dtype) for column in buffer.sample(parity.B)]
        batches.append(batch)
        returns = batch[5:] if getattr(module.TrainConfig, "MC_RETURNS", False) else []
        trainer.train([*batch[:5], *returns], online)
    columns = [torch.stack(column).numpy() for column in zip(*batches, strict=True)]
    case.update(zip(FIELDS, columns, strict=True))
    case.update(rewards=case["rewards"][..., 0], masks=1 - case["masks"][..., 0])
    case.update(mc_returns=case["mc_returns"][..., 0])
    return parts_of(trainer), case


def differences(
    authors: Authors,
    module: Any,
    config: Any,
    online: bool,
    settings: dict[str, Any],
    dtype: torch.dtype,
) -> dict[str, float]:
    """Parameter of ours -> largest difference after the updates."""
    ours, case = our_run(module, config, online, settings, dtype)
    theirs = authors.after(case, dtype)
    found = {}
    for name, value in theirs.items():
        gap = (ours[name] - torch.from_numpy(value)).abs().max()
        found[name] = gap.item()
    return found
