"""Golden numbers of CORL's own programs, by which tests hold ours without a CORL checkout.

    python scripts/golden_corl.py --corl PATH      # writes tests/golden/corl.json
    python scripts/golden_corl.py --corl PATH --jax_python PYTHON     # tests/golden/rebrac.json

Every case of benchmarks/parity.py is run with CORL's file, for fewer updates of fewer rows, and
what its networks hold at the end is stored: of every parameter its sum, the sum of its absolute
values and some of its values, and one SHA-256 over the bits of all. The cases named `patched` are
CORL's file with our patch. tests/test_golden.py runs our files and compares. CORL's ReBRAC is JAX
and rounds otherwise, so its numbers are of float64 and in a file of their own.
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from algorithms import awac, cal_ql, cql, td3_bc
from benchmarks import parity, parity_rebrac
from corl import files, machine
from experiments.values import dump_json
from scripts import make_patches

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden/corl.json"
REBRAC = ROOT / "tests/golden/rebrac.json"
COMMAND = "python scripts/golden_corl.py --corl PATH"
# One of the cases begins with 10 updates of behavior cloning.
UPDATES, ROWS = 11, 16
SAMPLES = 4
DECIDE = ("torch", "numpy")


def numbers(*trainers_and_parts: Any) -> dict[str, Any]:
    """Of the last trainer: parameter -> its numbers, and the SHA-256 of all."""
    *_, trainer, parts = trainers_and_parts
    digest, found = hashlib.sha256(), {}
    for part in parts:
        for name, value in getattr(trainer, part).state_dict().items():
            value = value.detach().contiguous()
            digest.update(f"{part}.{name}".encode())
            digest.update(value.numpy().tobytes())
            flat = value.double().flatten()
            places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat))).long()
            kept = [flat.sum(), flat.abs().sum(), *flat[places]]
            found[f"{part}.{name}"] = [float(f"{x:.9g}") for x in kept]
    return {"parameters": found, "sha256": digest.hexdigest()}


SETUP = parity.Setup(UPDATES, ROWS, numbers)


# File of ours -> the cases of benchmarks/parity.py, and the file of CORL below algorithms/.
PARTS: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "iql": (parity.iql_cases, "finetune/iql.py"),
    "cql": (partial(parity.cql_cases, cql), "finetune/cql.py"),
    "cal_ql": (partial(parity.cql_cases, cal_ql), "finetune/cal_ql.py"),
    "td3_bc": (partial(parity.actor_critic_cases, td3_bc), "offline/td3_bc.py"),
    "awac": (partial(parity.actor_critic_cases, awac), "finetune/awac.py"),
    "spot": (parity.spot_cases, "finetune/spot.py"),
    # CORL's file with our patch.
    "dare_iql": (parity.dare_iql_cases, "finetune/iql.py"),
    "dare_spot": (parity.dare_spot_cases, "finetune/spot.py"),
    "dare_cal_ql": (parity.dare_cal_ql_cases, "finetune/cal_ql.py"),
    "dare_awac": (parity.dare_awac_cases, "finetune/awac.py"),
}


def cases_of(part: str, corl: Path | None) -> dict[str, Any]:
    """Case -> numbers, of CORL's file below `corl`, or of ours."""
    run, file = PARTS[part]
    if corl is None:
        upstream = None
    elif part.startswith("dare_"):
        upstream = parity.patched_module(corl, part.removeprefix("dare_"))
    else:
        upstream = parity.load(corl / "algorithms" / file)
    return run(upstream, setup=SETUP)


def rebrac_cases_of(upstream: parity_rebrac.JaxFile | None) -> dict[str, Any]:
    """Case -> numbers, of CORL's ReBRAC, or of ours."""
    found = parity_rebrac.cases(upstream, SETUP, torch.float64)
    return {case: numbers["parameters"] for case, numbers in found.items()}


def made_here(record: dict[str, Any]) -> bool:
    """Whether the numbers are of this processor and these versions."""
    return record["made_on"] == made_on()


def made_on() -> dict[str, str]:
    """What decides the last bits of float32."""
    versions = machine.versions()
    processor = machine.describe()["processor"]
    return {
        "processor": processor,
        # A name may stand for processors with different instructions.
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **{name: versions[name] for name in DECIDE},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corl", type=Path, required=True, help="a CORL checkout")
    parser.add_argument(
        "--jax_python", type=Path, help="a Python with jax, flax, optax, chex"
    )
    args = parser.parse_args(argv)
    machine.configure_threads(1)
    for patch in make_patches.patches().values():
        # Its SHA-256 shows that the checkout is of the commit below.
        make_patches.check_target(patch, args.corl)
    if args.jax_python is not None:
        file = args.corl / "algorithms/offline/rebrac.py"
        jax = parity_rebrac.JaxFile(args.jax_python, file)
        rebrac = {
            "corl": make_patches.COMMIT,
            "command": f"{COMMAND} --jax_python PYTHON",
            "cases": rebrac_cases_of(jax),
        }
        files.write_text(REBRAC, dump_json(rebrac))
        print(f"{REBRAC.relative_to(ROOT)}: {len(rebrac['cases'])} cases")
        return
    record = {
        "corl": make_patches.COMMIT,
        "command": COMMAND,
        "made_on": made_on(),
        "updates": UPDATES,
        "rows": ROWS,
        "cases": {k: v for part in PARTS for k, v in cases_of(part, args.corl).items()},
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    files.write_text(GOLDEN, dump_json(record))
    print(f"{GOLDEN.relative_to(ROOT)}: {len(record['cases'])} cases")


if __name__ == "__main__":
    main()
