"""Updates per second of the baselines and their DARE twins, and ratios between them.

    python benchmarks/update_speed.py [--corl PATH] [--algorithms iql cal_ql] [--threads 2]
                                      [--seconds 2] [--device auto] [--out results/speed/FILE.json]

Every variant makes whole updates (batch, hook, losses, optimizers, energy) at batch 256 and
hopper sizes with the paper's networks, on random data. The ratio is to upstream CORL's file where
`--corl` names a checkout, else to our eager baseline. All ratios come from one run on one machine.
The variants take turns, round by round, so that a machine that gets slower slows all of them. The
first round warms up and compiles, and is dropped. The table shows the median over rounds, the
smallest and the largest. The networks are untrained, which changes no cost. In the `cached`
variants a reference never expires, and the offline buffer is so small that the warm-up fills most
of the cache: they show the cost late in a long run, not at its start.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from algorithms import cal_ql, dare_cal_ql, dare_iql, iql
from benchmarks import parity
from corl import arguments, compiled, machine
from corl_dare import hook
from corl_dare.behavior import make_behavior_model
from corl_dare.rows import draw_rows

S, A, ROWS, TASK = 11, 3, 2000, "hopper-medium-v2"
RATIO = {"behavior": "mixture", "guidance_scale": 0.0, "score": "policy_ratio"}
LIKELIHOOD = {**RATIO, "score": "likelihood"}
PAPER = {"behavior": "diffusion", "guidance_scale": 8.0}
# DARE-IQL as in configs/iql/quick_start.yaml.
FAST = {**RATIO, "backup_actions": 1}
CACHED = {**PAPER, "energy_update_freq": 10, "reference_max_age": 1_000_000_000}
# Algorithm -> baseline file, DARE file, settings of both, and variants. A variant is its name ->
# (fields of the dare block or None for the baseline, whether it is compiled).
FILES = {
    "iql": (
        iql,
        dare_iql,
        {},
        {
            "IQL": (None, False),
            "IQL, compiled": (None, True),
            "DARE-IQL, policy ratio": (RATIO, False),
            "DARE-IQL, policy ratio, compiled": (RATIO, True),
            "DARE-IQL, likelihood, compiled": (LIKELIHOOD, True),
            "DARE-IQL, policy ratio, 1 backup action": (FAST, False),
            "DARE-IQL, policy ratio, 1 backup action, compiled (fast)": (FAST, True),
            "DARE-IQL, unguided references": ({"guidance_scale": 0.0}, False),
            "DARE-IQL, guided references cached, energy every 10": (CACHED, False),
            "DARE-IQL, guided references, energy every 10": (
                {**PAPER, "energy_update_freq": 10},
                False,
            ),
            "DARE-IQL, guided references, energy every update (paper)": (PAPER, False),
        },
    ),
    "cal_ql": (
        cal_ql,
        dare_cal_ql,
        {"q_n_hidden_layers": 3, "bc_steps": 0},
        {
            "Cal-QL": (None, False),
            "Cal-QL, compiled": (None, True),
            "DARE-Cal-QL, policy ratio": (RATIO, False),
            "DARE-Cal-QL, policy ratio, compiled (fast)": (RATIO, True),
            "DARE-Cal-QL, guided references, energy every update (paper)": (
                PAPER,
                False,
            ),
        },
    ),
}


def random_buffer(module, device: str, seed: int):
    """A replay buffer of `module`, full of random rows."""
    rng = np.random.default_rng(seed)
    keeps = getattr(module.TrainConfig, "MC_RETURNS", False)
    extra = {"mc_returns": True} if keeps else {}
    if getattr(module.TrainConfig, "NEXT_ACTIONS", False):
        extra = {"next_actions": True}
    buffer = module.ReplayBuffer(S, A, ROWS, device, **extra)
    buffer.load_d4rl_dataset(
        {
            "observations": rng.normal(size=(ROWS, S)),
            "actions": rng.uniform(-1, 1, (ROWS, A)),
            "rewards": rng.normal(size=ROWS),
            "next_observations": rng.normal(size=(ROWS, S)),
            "terminals": np.zeros(ROWS),
            "mc_returns": rng.normal(size=ROWS),
            "next_actions": rng.uniform(-1, 1, (ROWS, A)),
        }
    )
    return buffer


def upstream_update(algorithm: str, corl: Path, device: str):
    """A callable that makes one online update of an upstream file."""
    module = parity.load(corl / "algorithms" / "finetune" / f"{algorithm}.py")
    baseline, _, settings, _ = FILES[algorithm]
    config = baseline.TrainConfig(env=TASK, device=device, **settings)
    make = parity.iql_trainer if algorithm == "iql" else parity.cql_trainer
    trainer = make(module, config)
    buffer = random_buffer(module, device, 0)
    return lambda: trainer.train([x.to(device) for x in buffer.sample(256)])


def our_update(algorithm: str, fields: dict | None, compile: bool, device: str):
    """A callable that makes one online update of a variant."""
    torch.manual_seed(0)
    baseline, twin, settings, _ = FILES[algorithm]
    module = baseline if fields is None else twin
    offline, online = (random_buffer(module, device, seed) for seed in (0, 1))
    if fields is not None:
        block = next(f for f in dataclasses.fields(twin.TrainConfig) if f.name == "dare")
        settings = {**settings, "dare": block.type(**fields)}
    config = module.TrainConfig(env=TASK, mixing_ratio=0.5, compile=compile, **settings)
    trainer = module.make_trainer(config, S, A, 1.0, device)
    if algorithm == "cal_ql":
        trainer.start_online(config.cql_alpha_online)
    if fields is None:
        source = module.MixedBuffer(offline, online, 0.5)
        return lambda: module.step(trainer, source, config)
    options = config.dare.behavior_options
    behavior = make_behavior_model(config.dare.behavior, S, A, seed=0, **options)
    source = hook.DareHook(
        offline,
        online,
        config.dare,
        behavior.to(device).requires_grad_(False),
        **module.hook_arguments(trainer),
        device=device,
        compile=compiled.function if compile else None,
    )
    if source.energy is not None:  # support actions are sampled once per transition
        rows = np.arange(ROWS)
        for buffer_rows in np.array_split(rows, 8):
            empty = buffer_rows[:0]
            for pair in ([buffer_rows, empty], [empty, buffer_rows]):
                buffer = offline if len(pair[0]) else online
                source.support(draw_rows(buffer, buffer_rows)[0], pair)
    return lambda: module.step(trainer, source, config)


def measure(
    updates: dict, seconds: float, rounds: int, device: str
) -> dict[str, list[float]]:
    """Updates per second of every variant in every round, taking turns."""
    rates: dict[str, list[float]] = {name: [] for name in updates}
    for turn in range(rounds + 1):
        for name, update in updates.items():
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds or count < 2:
                update()
                count += 1
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn > 0:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--corl", type=arguments.path, help="a CORL checkout to compare with"
    )
    parser.add_argument(
        "--algorithms", nargs="+", default=list(FILES), choices=list(FILES)
    )
    parser.add_argument(
        "--seconds",
        type=arguments.number(float, "(0, 1e6]"),
        default=2.0,
        help="per variant and round",
    )
    parser.add_argument("--rounds", type=arguments.number(int, "[1, 1e6]"), default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=arguments.number(int, "[1, 1024]"), default=1)
    parser.add_argument("--out", type=arguments.path, help="write the numbers as JSON")
    args = parser.parse_args()
    if args.corl is not None and not (args.corl / "algorithms").is_dir():
        parser.error(f"{args.corl} is no folder of CORL")
    with arguments.errors_in_one_line():
        device = machine.pick_device(args.device)
    machine.configure_threads(args.threads)
    parts = machine.describe()
    print(
        f"{parts['gpu'] if device != 'cpu' else parts['processor']}, device {device}, "
        f"{args.threads} thread(s), torch {torch.__version__}"
    )
    can_compile = True
    try:
        compiled.check()
    except ValueError as error:
        can_compile = False
        print(f"compiled variants are left out: {error}")
    with arguments.errors_in_one_line():
        rates = {
            algorithm: measure_algorithm(algorithm, args, device, can_compile)
            for algorithm in args.algorithms
        }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps(record(args, rates, device), indent=2, allow_nan=False) + "\n"
        )


def measure_algorithm(
    algorithm: str, args: argparse.Namespace, device: str, can_compile: bool
) -> dict[str, list[float]]:
    """Measure every variant of an algorithm and print their table."""
    updates = {
        name: our_update(algorithm, fields, compile, device)
        for name, (fields, compile) in FILES[algorithm][-1].items()
        if can_compile or not compile
    }
    if args.corl is not None:
        upstream = upstream_update(algorithm, args.corl, device)
        updates = {f"upstream CORL's {algorithm}.py": upstream, **updates}
    rates = measure(updates, args.seconds, args.rounds, device)
    print(table(rates))
    return rates


def record(args: argparse.Namespace, rates: dict, device: str) -> dict:
    """The numbers and what they were measured with."""
    command = " ".join(["python benchmarks/update_speed.py", *sys.argv[1:]])
    if args.corl is not None:
        # A published record names no path of the machine that made it.
        command = command.replace(str(args.corl), "upstream/CORL")
    return {
        "command": command,
        "updates_per_second": rates,
        "settings": {
            name: {"dare": fields, "compile": compile}
            for algorithm in args.algorithms
            for name, (fields, compile) in FILES[algorithm][-1].items()
        },
        "defaults": dataclasses.asdict(dare_iql.DareIQLConfig()),
        "device": device,
        "threads": args.threads,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": machine.git_commit(),
        "upstream_commit": parity.make_patches.COMMIT if args.corl else None,
    }


def table(rates: dict[str, list[float]]) -> str:
    """One line per variant; the ratio compares it with the first variant."""
    base = statistics.median(next(iter(rates.values())))
    lines = [f"{'updates per second: median (min-max)':>75}  ratio"]
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{median:8.1f} ({min(values):.1f}-{max(values):.1f})"
        lines.append(f"{name:<66} {spread:<22} {median / base:5.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
