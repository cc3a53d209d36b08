"""Do updates on a GPU change the weights as those on the CPU do?

    python benchmarks/device_parity.py [--device cuda] [--updates 20] [--out FILE]

Every algorithm makes the same updates three times: on the CPU, on the device launch by launch, and
on the device as a CUDA graph. Weights, batches and random numbers are those of the CPU. The table
shows the largest difference of a weight, after the first update and after the last, and the
largest relative difference of a loss in the first. All of it is float32 rounding: TF32 is off.
Where a gradient is as small as Adam's epsilon, rounding decides the step, so a weight may differ
by a learning rate (3e-4) per update.
"""

import argparse
import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent.parent))

from corl import arguments, machine
from corl_dare.hook import Release

S, A, B, TASK = 11, 3, 256, "hopper-medium-v2"
# Algorithm -> settings. A network of another size is cheaper and decides nothing here.
CASES: dict[str, dict[str, Any]] = {
    "iql": {},
    "dare_iql": {},
    "pex": {},
    "famo2o_iql": {},
    "famo2o_cql": {},
    "opt_td3": {},
    "opt_spot": {},
    "dare_opt_spot": {},
    "td3_bc": {},
    "dare_td3_bc": {},
    "td3_bc_sa": {},
    "cql_sa": {},
    "rlpd": {"hidden_dim": 64},
    "wsrl": {"hidden_dim": 64},
    "dare_wsrl": {"hidden_dim": 64, "utd": 1},
    "awac": {},
    "dare_awac": {},
    "spot": {},
    "dare_spot": {},
    "rebrac": {},
    "dare_rebrac": {},
    "cql": {},
    "dare_cql": {},
    "dare_famo2o_cql": {},
    "dare_cql_sa": {},
    "cal_ql": {"bc_steps": 0},
    "baq_cal_ql": {"bc_steps": 0},
    "e2o": {},
    "dare_cal_ql": {"bc_steps": 0},
}
# Whose update is told the phase.
WITH_PHASE = ("pex", "e2o", "famo2o_iql", "famo2o_cql", "opt_td3", "opt_spot")
MODES = {"launch by launch": False, "CUDA graph": True}


def batches(count: int, config: Any) -> list[list[torch.Tensor]]:
    """Random batches of hopper's shapes with the fields that a config class has, on the CPU."""
    rng = np.random.default_rng(0)
    shapes = [(B, S), (B, A), (B, 1), (B, S), (B, 1)]
    shapes += [(B, 1)] * getattr(config, "MC_RETURNS", False)
    shapes += [(B, A)] * getattr(config, "NEXT_ACTIONS", False)
    made = []
    for _ in range(count):
        batch = [torch.tensor(rng.normal(size=s), dtype=torch.float32) for s in shapes]
        batch[1], batch[4] = batch[1].tanh(), (batch[4] > 1).float()
        made.append(batch)
    return made


class Updates:
    """A trainer on a device whose weights, batches and random numbers are made on the CPU."""

    def __init__(self, name: str, device: str, compile: bool, fields: dict[str, Any]):
        module = importlib.import_module(f"algorithms.{name}")
        config = module.TrainConfig(
            env=TASK, threads=1, compile=compile, device=device, **fields
        )
        torch.manual_seed(0)
        # The streams of a GPU are others, so the weights are those of a trainer on the CPU.
        source = module.make_trainer(config, S, A, 1.0, "cpu").state_dict()
        self.trainer = module.make_trainer(config, S, A, 1.0, device)
        self.trainer.load_weights(source)
        self.device, self.given = device, []
        if name.removeprefix("dare_") in WITH_PHASE or name == "dare_wsrl":
            # Their online updates, which differ from those of the offline phase.
            self.given.append(True)
        if name.startswith("dare_"):
            weight = (torch.arange(B) < B // 2).float().to(device)
            self.given.append(Release(weight, B // 2))
        if name == "baq_cal_ql":
            self.given = [torch.linspace(0.1, 1.0, B).to(device)]
        # IQL's update draws nothing.
        if hasattr(self.trainer, "_noise"):
            draw = self.trainer._noise
            self.trainer._noise = lambda actions, *flags: self._moved(
                draw(actions.cpu(), *flags)
            )
        if hasattr(self.trainer, "dare_generator"):
            self.trainer.dare_generator = torch.Generator().manual_seed(0)

    def _moved(self, values: Any) -> Any:
        move = torch.Tensor.to
        return pytree.tree_map_only(torch.Tensor, lambda x: move(x, self.device), values)

    def make(self, batch: list[torch.Tensor], number: int) -> dict[str, float]:
        """One update; returns its losses."""
        torch.manual_seed(number)
        logs = self.trainer.train([x.to(self.device) for x in batch], *self.given)
        return {key: float(value) for key, value in logs.items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Every parameter of the trainer's networks, on the CPU, float64."""
        return {
            f"{name}.{key}": value.double().cpu()
            for name, part in vars(self.trainer).items()
            if isinstance(part, torch.nn.Module)
            for key, value in part.state_dict().items()
        }


def differences(
    name: str, device: str, compile: bool, updates: int, fields: dict[str, Any]
) -> dict[str, float]:
    """What the device makes of the updates, against the CPU: largest differences."""
    here, there = (
        Updates(name, where, mode, fields)
        for where, mode in (("cpu", False), (device, compile))
    )
    config = sys.modules[f"algorithms.{name}"].TrainConfig
    found: dict[str, float] = {}
    for number, batch in enumerate(batches(updates, config)):
        ours, theirs = here.make(batch, number), there.make(batch, number)
        if ours.keys() != theirs.keys():
            raise ValueError(f"{name} logs other metrics on {device}")
        if number == 0:
            found["loss"] = max(
                abs(ours[key] - theirs[key]) / max(abs(ours[key]), 1e-3) for key in ours
            )
        if number in (0, updates - 1):
            pairs = zip(here.weights().values(), there.weights().values(), strict=True)
            gap = max((x - y).abs().max().item() for x, y in pairs)
            found["first" if number == 0 else "last"] = gap
    return found


def main() -> None:
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--updates", type=arguments.number(int, "[2, 1e6]"), default=20)
    parser.add_argument("--algorithms", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=arguments.path, help="write the numbers as JSON")
    args = parser.parse_args()
    with arguments.errors_in_one_line():
        device = machine.pick_device(args.device)
    torch.set_num_threads(1)
    parts = machine.describe()
    print(
        f"{parts['gpu'] if device != 'cpu' else parts['processor']}, torch {torch.__version__}"
    )
    print(f"{'':12} {'':18} {'weights, update 1':>18} {'last':>10} {'losses':>10}")
    results: dict[str, dict[str, Any]] = {}
    for name in args.algorithms:
        for mode, compile in MODES.items():
            found = differences(name, device, compile, args.updates, CASES[name])
            results.setdefault(name, {})[mode] = found
            print(
                f"{name:12} {mode:18} {found['first']:18.1e} {found['last']:10.1e} "
                f"{found['loss']:10.1e}",
                flush=True,
            )
    if args.out is not None:
        save(args, results, device)


def save(args: argparse.Namespace, results: dict[str, Any], device: str) -> None:
    """Write the numbers and what they were measured with."""
    record = {
        "command": shlex.join(["python", "benchmarks/device_parity.py", *sys.argv[1:]]),
        "largest_differences": results,
        "device": device,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": machine.git_commit(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
