"""Our ReBRAC against CORL's JAX file: the largest difference of every parameter.

    python benchmarks/parity_rebrac.py --corl PATH --jax_python PYTHON [--out FILE.txt]

PYTHON has jax, flax, optax and chex; it runs CORL's updates (`benchmarks/rebrac_jax.py`). Both
sides get the same weights, batches and noise and make 20 updates on the CPU. In float32 they
differ by rounding, which Adam enlarges where a gradient is almost 0, up to its learning rate; in
float64 they show that the rest is equal.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from algorithms import rebrac
from benchmarks import parity
from corl import arguments, machine

# The settings of CORL's files; coefficients of the first case stand in none of them.
SETTINGS: dict[str, dict[str, Any]] = {
    "large penalties": {},
    "locomotion": {
        "actor_bc_coef": 0.01,
        "critic_bc_coef": 0.01,
        "actor_lr": 1e-3,
        "qf_lr": 1e-3,
    },
    "antmaze": {
        "actor_bc_coef": 0.003,
        "critic_bc_coef": 0.002,
        "qf_lr": 5e-5,
        "discount": 0.999,
    },
    "online": {"actor_bc_coef": 0.05, "online_iterations": 30},
    "other networks": {
        "hidden_dim": 64,
        "actor_n_hiddens": 2,
        "critic_n_hiddens": 1,
        "actor_ln": True,
        "critic_ln": False,
        "normalize_q": False,
        "policy_freq": 3,
    },
}
FIELDS = ("states", "actions", "rewards", "next_states", "dones", "next_actions")


class JaxFile(NamedTuple):
    """CORL's ReBRAC, and a Python that can run it."""

    python: Path
    file: Path

    def after(self, case: dict[str, Any]) -> dict[str, np.ndarray]:
        """What `benchmarks/rebrac_jax.py` makes of a case."""
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder) / "case.npz", Path(folder) / "result.npz"
            np.savez(given, **case)
            worker = Path(__file__).with_name("rebrac_jax.py")
            command = map(str, [self.python, worker, self.file, given, made])
            wide = str(int(case["noise"].dtype == np.float64))
            environment = {**os.environ, "JAX_ENABLE_X64": wide, "JAX_PLATFORMS": "cpu"}
            done = subprocess.run(
                list(command), env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{self.python}: {done.stderr.strip()[-500:]}")
            with np.load(made) as arrays:
                return dict(arrays)


def trainer_of(config: Any, dtype: torch.dtype) -> Any:
    """A trainer of ReBRAC whose numbers have a type."""
    torch.manual_seed(0)
    trainer = rebrac.make_trainer(config, parity.S, parity.A, 1.0, "cpu")
    for name in rebrac.WITH_TARGET:
        getattr(trainer, name).to(dtype), getattr(trainer, f"{name}_target").to(dtype)
    return trainer


def our_run(
    config: Any, setup: parity.Setup, online: bool, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """Our trainer after the updates, and all that upstream needs to make the same ones."""
    trainer, buffer = trainer_of(config, dtype), parity.buffer_of(rebrac, 0)
    case: dict[str, Any] = {
        f"start.{part}.{name}": value.numpy().copy()
        for part in rebrac.WITH_TARGET
        for name, value in getattr(trainer, part).state_dict().items()
    }
    settings = dataclasses.asdict(config)
    case["settings"] = json.dumps({**settings, "gamma": config.discount})
    np.random.seed(1)
    torch.manual_seed(1)
    batches, noises, coefs = [], [], []
    for step in range(setup.updates):
        if online:
            trainer.actor_bc_coef, trainer.critic_bc_coef = config.bc_coefs(step)
        coefs.append([trainer.actor_bc_coef, trainer.critic_bc_coef])
        batches.append([column.to(dtype) for column in buffer.sample(setup.rows)])
        stream = torch.get_rng_state()
        noises.append(trainer._noise(batches[-1][1]))
        torch.set_rng_state(stream)
        trainer.train(batches[-1])
    columns = [torch.stack(column).numpy() for column in zip(*batches, strict=True)]
    case.update(zip(FIELDS, columns, strict=True))
    case.update(rewards=case["rewards"][..., 0], dones=case["dones"][..., 0])
    case.update(noise=torch.stack(noises).numpy(), coefs=np.array(coefs))
    return trainer, case


def cases(
    upstream: JaxFile | None,
    setup: parity.Setup = parity.WHOLE,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Case -> what `setup.compare` finds; the case `online` follows the online schedule."""
    results = {}
    parts = [*rebrac.WITH_TARGET, *(f"{name}_target" for name in rebrac.WITH_TARGET)]
    for name, fields in SETTINGS.items():
        config = rebrac.TrainConfig(env=parity.TASK, **fields)
        trainer, case = our_run(config, setup, name == "online", dtype)
        trainers = [trainer]
        if upstream is not None:
            found = upstream.after(case)
            trainers.append(trainer_of(config, dtype))
            for part in parts:
                network = getattr(trainers[1], part)
                state = {k: found[f"{part}.{k}"] for k in network.state_dict()}
                network.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
        kind = str(dtype).removeprefix("torch.")
        results[f"rebrac, {name}, {kind}"] = setup.compare(*trainers, parts)
    return results


def main() -> None:
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--corl", type=arguments.path, required=True, help="a CORL checkout"
    )
    parser.add_argument(
        "--jax_python",
        type=arguments.path,
        required=True,
        help="a Python with jax, flax, optax, chex",
    )
    parser.add_argument("--out", type=arguments.path, help="also write the report here")
    args = parser.parse_args()
    if not (args.corl / "algorithms").is_dir():
        parser.error(f"{args.corl} is no folder of CORL")
    if not args.jax_python.is_file():
        parser.error(f"--jax_python {args.jax_python} is no program")
    machine.configure_threads(1)
    file = JaxFile(args.jax_python, args.corl / "algorithms/offline/rebrac.py")
    results: dict[str, Any] = {}
    with arguments.errors_in_one_line():
        for dtype in (torch.float32, torch.float64):
            results.update(cases(file, dtype=dtype))
    parity.report(results, "", args.out)


if __name__ == "__main__":
    main()
