"""Updates of N stacked seeds a second against those of one seed, on one machine.

    python benchmarks/stacked_seeds.py [--device cuda] [--algorithms iql dare_iql] [--seeds 8]
                                       [--seconds 3] [--rounds 5] [--out results/speed/FILE.json]

Each variant makes whole updates (rows drawn, uploaded and gathered; hook; noise; losses;
optimizers) at batch 256 and hopper sizes with the paper's networks, on random data. `dare_iql` has
the policy ratio and one backup action. One and N take turns, round by round, so that a machine
that gets slower slows both; the first round warms up and is dropped. Throughput is updates per
second times seeds.
"""

import argparse
import dataclasses
import functools
import json
import shlex
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from algorithms import awac, cal_ql, cql, dare_cal_ql, dare_iql, dare_td3_bc, iql, td3_bc
from benchmarks.update_speed import TASK, A, S, measure, random_buffer
from corl import arguments, compiled, machine, traced
from corl.buffers import MixedBuffer
from corl.stacked import Stack
from corl.stacked_session import StackedBuffer, Streams
from corl_dare.behavior import make_behavior_model
from corl_dare.hook import DareHook
from corl_dare.hook_stacked import StackedHook

RATIO = {"behavior": "mixture", "guidance_scale": 0.0, "score": "policy_ratio"}
CQL = {"q_n_hidden_layers": 3, "bc_steps": 0}
# Algorithm -> its file and fields, and the fields of its block `dare:`, if it has one.
CASES = {
    "iql": (iql, {}, None),
    "dare_iql": (dare_iql, {}, {**RATIO, "backup_actions": 1}),
    "td3_bc": (td3_bc, {}, None),
    "dare_td3_bc": (dare_td3_bc, {}, RATIO),
    "awac": (awac, {}, None),
    "cql": (cql, CQL, None),
    "cal_ql": (cal_ql, CQL, None),
    "dare_cal_ql": (dare_cal_ql, CQL, RATIO),
}


def config_of(name: str, seed: int):
    """The config of one seed of a case."""
    module, fields, block = CASES[name]
    if block is not None:
        kinds = {f.name: f.type for f in dataclasses.fields(module.TrainConfig)}
        fields = {**fields, "dare": kinds["dare"](**block)}
    ratio = {} if name == "cql" else {"mixing_ratio": 0.5}
    return module.TrainConfig(env=TASK, seed=seed, compile=False, **ratio, **fields)


def hook_of(
    name: str, seed: int, trainer, offline, online, device: str, compile: bool
) -> DareHook:
    """The hook of one seed, with a behavior model that is not fitted, which costs the same."""
    config = config_of(name, seed)
    options = config.dare.behavior_options
    behavior = make_behavior_model("mixture", S, A, seed=seed, **options)
    behavior = behavior.to(device).requires_grad_(False)
    arguments_of_hook = CASES[name][0].hook_arguments
    return DareHook(
        offline,
        online,
        config.dare,
        behavior,
        **arguments_of_hook(trainer),
        device=device,
        seed=seed,
        compile=functools.partial(compiled.function, device=device) if compile else None,
    )


def update_of(name: str, count: int, device: str):
    """A callable that makes one online update of `count` seeds; 1 is an ordinary trainer.

    On a GPU both are CUDA graphs, and the ordinary trainer's kernels are fused.
    """
    graphs = compiled.on_gpu(device)
    module = CASES[name][0]
    trainers, streams, pairs = [], [], []
    for seed in range(count):
        torch.manual_seed(seed)
        config = config_of(name, seed)
        config.compile = graphs and count == 1
        trainers.append(module.make_trainer(config, S, A, 1.0, device))
        streams.append(Streams())
        pairs.append([random_buffer(module, device, 2 * seed + i) for i in (0, 1)])
    if count == 1:
        trainer, (offline, online) = trainers[0], pairs[0]
    else:
        stack = Stack(trainers, [stream.torch for stream in streams], graphs)
        trainer = stack.trainer
        offline, online = (
            StackedBuffer([pair[i] for pair in pairs], streams) for i in (0, 1)
        )
    source = MixedBuffer(offline, online, 0.5)
    if graphs:
        for buffer in (offline, online, source):
            buffer.capture()
    if CASES[name][2] is not None:
        hooks = [
            hook_of(name, seed, trainer, *pair, device, graphs and count == 1)
            for seed, pair in enumerate(pairs)
        ]
        source = hooks[0]
        if count > 1:
            capture = traced.captured if graphs else None
            over_seeds = stack.networks.over_seeds
            source = StackedHook(hooks, offline, online, over_seeds, capture)
    config = config_of(name, 0)
    return lambda: module.step(trainer, source, config)


def main() -> None:
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--algorithms", nargs="+", default=["iql", "dare_iql"], choices=list(CASES)
    )
    positive = arguments.number(int, "[1, 1e6]")
    parser.add_argument("--seeds", nargs="+", type=positive, default=[8])
    parser.add_argument(
        "--seconds", type=arguments.number(float, "(0, 1e6]"), default=3.0
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--threads", type=arguments.number(int, "[1, 1024]"), default=1)
    parser.add_argument("--out", type=arguments.path, help="write the numbers as JSON")
    args = parser.parse_args()
    with arguments.errors_in_one_line():
        device = machine.pick_device(args.device)
        machine.configure_threads(args.threads)
        print(heading(device, args))
        rates = {}
        for name in args.algorithms:
            counts = [1, *(count for count in args.seeds if count > 1)]
            updates = {str(count): update_of(name, count, device) for count in counts}
            rates[name] = measure(updates, args.seconds, args.rounds, device)
            print(table(name, rates[name]), flush=True)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(record(args, rates, device), indent=2, allow_nan=False)
            args.out.write_text(text + "\n")


def heading(device: str, args: argparse.Namespace) -> str:
    """Where the numbers come from."""
    parts = machine.describe()
    where = parts["processor"] if device == "cpu" else parts["gpu"]
    return (
        f"{where}, device {device}, {args.threads} thread(s), torch {torch.__version__}"
    )


def table(name: str, rates: dict[str, list[float]]) -> str:
    """One line per number of seeds: updates, throughput, and its ratio to that of one."""
    base = statistics.median(rates["1"])
    lines = [f"{name:<14} seeds  updates/s: median (min-max)   seeds x updates/s  ratio"]
    for count, values in rates.items():
        median, seeds = statistics.median(values), int(count)
        spread = f"{median:9.1f} ({min(values):.1f}-{max(values):.1f})"
        ratio = seeds * median / base
        lines.append(
            f"{'':<14} {seeds:5d}  {spread:<30} {seeds * median:18.1f} {ratio:6.2f}"
        )
    return "\n".join(lines)


def record(args: argparse.Namespace, rates: dict, device: str) -> dict:
    """The numbers and what they were measured with."""
    return {
        "command": shlex.join(["python", "benchmarks/stacked_seeds.py", *sys.argv[1:]]),
        "updates_per_second": rates,
        "device": device,
        "threads": args.threads,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": machine.git_commit(),
    }


if __name__ == "__main__":
    main()
