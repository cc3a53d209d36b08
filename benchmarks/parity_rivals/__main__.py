"""The command `python -m benchmarks.parity_rivals`; the package says what it does."""

import importlib
import subprocess
import textwrap
from pathlib import Path

import torch

import benchmarks.parity_rivals as package
from corl import arguments, machine

# Module of this package -> the authors' repository on GitHub.
RIVALS = {
    "pex": "Haichao-Zhang/PEX",
    "edis": "liuxhym/EDIS",
    "ssar": "QinwenLuo/SSAR",
    "e2o": "TJU-DRL-LAB/AI-Optimizer",
    "rlpd": "ikostrikov/rlpd",
    "wsrl": "zhouzypaul/wsrl",
    "famo2o": "LeapLabTHU/FamO2O",
}
# Those that are JAX.
JAX = ("rlpd", "wsrl", "famo2o")


def commit_of(checkout: Path) -> str:
    """The commit that a checkout is at."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def lines_of(found: list[package.Case]) -> list[str]:
    """What the report says of some cases."""
    lines = []
    for name, differences, explanation in found:
        largest = max(differences.values())
        lines.append(f"\n{name}: largest difference {largest:.3g}")
        lines += textwrap.wrap(explanation, 96)
        lines += [f"    {value:10.3g}  {key}" for key, value in differences.items()]
    return lines


def main() -> None:
    parser = arguments.Parser(description=(package.__doc__ or "").split("\n")[0])
    for rival, repository in RIVALS.items():
        says = f"a checkout of {repository}"
        parser.add_argument(f"--{rival}", type=arguments.path, help=says)
    parser.add_argument(
        "--jax_python",
        type=arguments.path,
        help="a Python with jax, flax, optax, distrax and tensorflow_probability",
    )
    parser.add_argument("--out", type=arguments.path, help="also write the report here")
    args = parser.parse_args()
    checkouts = {name: getattr(args, name) for name in RIVALS if getattr(args, name)}
    if not checkouts:
        parser.error("name a checkout: " + ", ".join(f"--{name}" for name in RIVALS))
    for name, checkout in checkouts.items():
        if not checkout.is_dir():
            parser.error(f"--{name} {checkout} is no folder")
    if args.jax_python is None and set(JAX) & set(checkouts):
        parser.error(f"{', '.join(JAX)} are JAX: --jax_python names a Python")
    machine.configure_threads(1)
    lines = [
        f"float32 on {machine.describe()['processor']}, torch {torch.__version__}, "
        f"ours {machine.git_commit()}"
    ]
    with arguments.errors_in_one_line():
        for name, checkout in checkouts.items():
            rival = importlib.import_module(f"{package.__name__}.{name}")
            given = [args.jax_python] * (name in JAX)
            lines.append(f"\n== {RIVALS[name]} {commit_of(checkout)}")
            lines += lines_of(rival.cases(checkout, *given))
    text = "\n".join(lines)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
