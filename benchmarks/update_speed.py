"""Updates per second of IQL and DARE-IQL; ratios of one run on this machine.

    python benchmarks/update_speed.py [--seconds 3] [--device auto] [--out results/speed/FILE.json]

Every variant makes whole updates (batch, hook, losses, optimizers, energy) at batch 256 and
hopper sizes with the paper's networks, on random data. The variants take turns, round by round,
so that a machine that gets slower hits all of them; the first round warms up and is dropped.
Quoted: median over rounds, with the smallest and the largest. The networks are untrained, which
changes no cost. `cached` references live for ever and the offline buffer is small enough that
the warm-up fills most of the cache: it is the cost that a long run tends to, not that of its
start.
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

from algorithms import dare_iql
from corl import iql
from corl_dare import hook, runs

S, A, ROWS, TASK = 11, 3, 2000, "hopper-medium-v2"
FAITHFUL = {"behavior": "diffusion", "guidance_scale": 8.0}
DENSITY = {"behavior": "mixture", "guidance_scale": 0.0}
VARIANTS = {
    "IQL (baseline)": None,
    "DARE-IQL, policy ratio": {**DENSITY, "score": "policy_ratio"},
    "DARE-IQL, likelihood": {**DENSITY, "score": "likelihood"},
    "DARE-IQL, fresh unguided references": {"guidance_scale": 0.0},
    "DARE-IQL, fresh guided references, energy every 10": {
        **FAITHFUL,
        "energy_update_freq": 10,
    },
    "DARE-IQL, fresh guided references, energy every update (paper)": FAITHFUL,
    "DARE-IQL, cached guided references, energy every 10": {
        **FAITHFUL,
        "energy_update_freq": 10,
        "reference_max_age": 1_000_000_000,
    },
}


def random_buffer(device: str, seed: int) -> iql.ReplayBuffer:
    rng = np.random.default_rng(seed)
    buffer = iql.ReplayBuffer(S, A, ROWS, device)
    buffer.load_d4rl_dataset(
        {
            "observations": rng.normal(size=(ROWS, S)),
            "actions": rng.uniform(-1, 1, (ROWS, A)),
            "rewards": rng.normal(size=ROWS),
            "next_observations": rng.normal(size=(ROWS, S)),
            "terminals": np.zeros(ROWS),
        }
    )
    return buffer


def make_update(fields: dict | None, device: str):
    """A callable that makes one online update of a variant."""
    torch.manual_seed(0)
    offline, online = random_buffer(device, 0), random_buffer(device, 1)
    if fields is None:
        config = iql.TrainConfig(env=TASK, mixing_ratio=0.5)
        trainer = iql.make_trainer(config, S, A, 1.0, device)
        source = iql.MixedBuffer(offline, online, 0.5)
        return lambda: iql.update(trainer, source, config)
    config = dare_iql.TrainConfig(env=TASK, dare=dare_iql.DareIQLConfig(**fields))
    trainer = dare_iql.make_trainer(config, S, A, 1.0, device)
    behavior = hook.new_behavior(config.dare, S, A, 0, device).requires_grad_(False)
    source = hook.DareHook(
        offline,
        online,
        config.dare,
        behavior,
        policy_log_prob=lambda s, a: trainer.actor(s).log_prob(a).sum(-1),
        q_function=trainer.q_target,
        device=device,
    )
    if source.energy is not None:  # support actions are sampled once per transition
        rows = np.arange(ROWS)
        for buffer_rows in np.array_split(rows, 8):
            empty = buffer_rows[:0]
            for pair in ([buffer_rows, empty], [empty, buffer_rows]):
                buffer = offline if len(pair[0]) else online
                source.support(hook.draw_rows(buffer, buffer_rows)[0], pair)
    return lambda: dare_iql.update(trainer, source, config)


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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="per variant and round"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    device = runs.pick_device(args.device)
    runs.configure_threads(args.threads)
    updates = {name: make_update(fields, device) for name, fields in VARIANTS.items()}
    rates = measure(updates, args.seconds, args.rounds, device)
    base = statistics.median(rates["IQL (baseline)"])
    machine = runs.machine()
    print(
        f"{machine['gpu'] if device != 'cpu' else machine['processor']}, device {device}, "
        f"{args.threads} thread(s), torch {torch.__version__}\n"
        f"{'updates per second: median (min-max)':>72}  ratio"
    )
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{median:8.1f} ({min(values):.1f}-{max(values):.1f})"
        print(f"{name:<63} {spread:<22} {median / base:5.2f}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": "python benchmarks/update_speed.py " + " ".join(sys.argv[1:]),
            "updates_per_second": rates,
            "settings": {k: v for k, v in VARIANTS.items() if v is not None},
            "defaults": dataclasses.asdict(dare_iql.DareIQLConfig()),
            "device": device,
            "threads": args.threads,
            "machine": machine,
            "versions": runs.versions(),
            "commit": runs.git_commit(),
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
