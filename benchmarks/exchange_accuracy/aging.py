"""Does a deterministic policy know its own older rows? Its density is that of its noise.

    python -m benchmarks.exchange_accuracy.aging --seed 0    # minutes on one core
    python -m benchmarks.exchange_accuracy.aging --report    # the table from the stored numbers

TD3+BC is trained on self-collected rows and then fine-tuned, one update per environment step. At
the end every online row has an age: the updates since the policy that made it. Every score ranks
the rows of an age against rows of the dataset that no model has seen. `policy ratio` gives the
last policy a density of the width `dare.policy_std`, whatever the policy acted with.
"""

import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from algorithms import td3_bc
from benchmarks.exchange_accuracy.measure import auc
from corl import arguments, buffers, envs, files, finetune, machine
from corl.data import schema, sources
from corl.standin import collect
from corl_dare.behavior import BehaviorModel
from corl_dare.cache import fit_cached
from corl_dare.hook import noisy_log_prob

COMMAND = "python -m benchmarks.exchange_accuracy.aging"
OUT = Path(__file__).parents[2] / "results" / "exchange_accuracy"
# Widths of the policy's density, of the largest action; the policies act with 0.1.
WIDTHS = (0.05, 0.1, 0.2, 0.4)
EXPLORATION = 0.1


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; every field is a flag."""

    task: str = "hopper-medium-v2"
    seed: int = 0
    rows: int = 60_000  # of the dataset; half of them are scored
    offline_updates: int = 5_000
    online_updates: int = 6_000  # one per environment step
    age: int = 1_000  # updates between the ages of the table
    bc_online: float = 1.0  # weight of the cloning term online
    density_updates: int = 4_000  # of the mixture that models the behavior


def load(settings: Settings, folder: Path) -> tuple[dict, dict, finetune.Normalization]:
    """Rows to train on and rows to score, as q-learning arrays with normalized states."""
    s = settings
    path = folder / f"{s.task}-{s.rows}-seed{s.seed}.hdf5"
    path = collect.collect(s.task, s.rows, path, s.seed, progress=sys.stderr.isatty())
    data = schema.qlearning_dataset(schema.load_hdf5(path, s.task))
    mean, std = finetune.compute_mean_std(data["observations"], eps=1e-3)
    for key in ("observations", "next_observations"):
        data[key] = finetune.normalize_states(data[key], mean, std).astype(np.float32)
    # Whole stretches of time: neighbors of a scored row are no rows to train on.
    half = len(data["rewards"]) // 2
    parts = (
        {k: v[:half] for k, v in data.items()},
        {k: v[half:] for k, v in data.items()},
    )
    return *parts, finetune.Normalization(mean, std)


def fine_tune(
    settings: Settings, data: dict, normalization: finetune.Normalization
) -> tuple[td3_bc.TD3_BC, torch.Tensor, torch.Tensor]:
    """The trained TD3+BC; states (N, S), normalized, and actions (N, A) of its online rows.

    Row i was made after i online updates.
    """
    s = settings
    config = td3_bc.TrainConfig(env=s.task, seed=s.seed, device="cpu", compile=False)
    sizes = data["observations"].shape[1], data["actions"].shape[1]
    finetune.set_seed(s.seed)
    trainer = td3_bc.make_trainer(config, *sizes, 1.0, "cpu")
    offline = finetune.ReplayBuffer(*sizes, len(data["rewards"]) + 1)
    online = finetune.ReplayBuffer(*sizes, s.online_updates + 1)
    offline.load_d4rl_dataset(data)
    for _ in range(s.offline_updates):
        trainer.train(offline.sample(config.batch_size))
    trainer.bc_weight = s.bc_online
    mixed = buffers.MixedBuffer(offline, online, 0.5)
    env = envs.make(s.task)
    mean, std = normalization.mean, normalization.std
    state = (env.reset(seed=s.seed)[0] - mean) / std
    for _ in range(s.online_updates):
        action = trainer.actor.act(state.astype(np.float32))
        action = finetune.add_noise(action, 1.0, EXPLORATION, np.inf)
        following, reward, terminated, truncated, _ = env.step(action)
        following = (following - mean) / std
        online.add_transition(state, action, reward, following, terminated)
        if terminated or truncated:
            following = (env.reset()[0] - mean) / std
        state = following
        trainer.train(mixed.sample(config.batch_size))
    states, actions = online.gather(np.arange(s.online_updates))[:2]
    return trainer, states, actions


def fit_behavior(
    settings: Settings, data: dict, normalization: finetune.Normalization, folder: Path
) -> BehaviorModel:
    """A mixture on raw states, as the hook has it, fitted to the rows to train on."""
    states = normalization.undo(torch.from_numpy(data["observations"]))
    model, _, _ = fit_cached(
        "mixture",
        states,
        torch.from_numpy(data["actions"]),
        updates=settings.density_updates,
        batch_size=256,
        lr=1e-3,
        seed=settings.seed,
        dataset_hash=f"aging {settings.task} {settings.rows} {settings.seed}",
        cache_dir=folder / "behavior",
        options={"hidden_dim": 128},
        progress=sys.stderr.isatty(),
    )
    return model


def measure(settings: Settings, folder: Path) -> list[dict]:
    """Per score and age: AUC against rows of the dataset, and the share below 0."""
    train, held_out, normalization = load(settings, folder)
    behavior = fit_behavior(settings, train, normalization, folder)
    trainer, *online = fine_tune(settings, train, normalization)
    offline = [torch.from_numpy(held_out[k]) for k in ("observations", "actions")]

    @torch.no_grad()
    def score(states: torch.Tensor, actions: torch.Tensor, width: float | None):
        raw = normalization.undo(states)
        nats = -behavior.log_prob(raw, actions, 1.0).double()
        if width is not None:
            policy = noisy_log_prob(trainer.actor, width, 1.0)
            nats = nats + policy(states, actions).double()
        return nats

    rows = []
    for width in (None, *WIDTHS):
        off, on = score(*offline, width), score(*online, width)
        # The youngest rows first.
        for number, part in enumerate(on.flip(0).split(settings.age)):
            below = None if width is None else (part < 0).double().mean().item()
            rows.append(
                {
                    "score": "likelihood" if width is None else f"policy ratio, {width}",
                    "age": number * settings.age,
                    "auc": auc(off, part),
                    "below": below,
                }
            )
    return rows


def page(records: list[dict]) -> str:
    """The text of aging.md: means over the stored seeds."""
    first = records[0]
    seeds = ", ".join(str(r["settings"]["seed"]) for r in records)
    lines = [
        "# A deterministic policy and its own older rows",
        "",
        f"Written by `{COMMAND} --report`; seeds {seeds}, at commit "
        f"{', '.join(sorted({r['commit'] for r in records}))}, on {first['machine']['processor']}. "
        "Self-collected rows, not D4RL data. What it measures: docs/exchange_accuracy.md.",
        "",
        f"Settings: {json.dumps({k: v for k, v in first['settings'].items() if k != 'seed'})}",
        "",
    ]
    ages = sorted({row["age"] for row in first["rows"]})
    step = first["settings"]["age"]
    head = ["score", *(f"{age}\u2013{age + step}" for age in ages)]
    for column, title in (
        ("auc", "AUC of online rows of an age, in updates, against rows of the dataset"),
        ("below", "Share of them that a log-ratio calls offline-like (below 0)"),
    ):
        lines += [
            f"## {title}",
            "",
            "| " + " | ".join(head) + " |",
            "|---" * len(head) + "|",
        ]
        for score in dict.fromkeys(row["score"] for row in first["rows"]):
            cells = []
            for age in ages:
                found = [
                    row[column]
                    for record in records
                    for row in record["rows"]
                    if (row["score"], row["age"]) == (score, age)
                ]
                cells.append(None if None in found else f"{statistics.mean(found):.3f}")
            if None not in cells:
                lines.append(f"| {score} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def report(folder: Path) -> None:
    """Write aging.md of the stored seeds of a folder.

    Raises:
        ValueError: none is stored, or they have different settings.
    """
    records = [json.loads(p.read_text()) for p in sorted(folder.glob("aging_*.json"))]
    if not records:
        raise ValueError(f"no aging_*.json in {folder}; run the benchmark first")
    if len({json.dumps({**r["settings"], "seed": 0}) for r in records}) > 1:
        raise ValueError(f"the seeds in {folder} have different settings; use --out")
    (folder / "aging.md").write_text(page(records))


def main() -> None:
    """Run one seed unless only the report is asked for, then write the table."""
    parser = arguments.Parser(prog=COMMAND, description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name}", type=arguments.setting(field), default=field.default
        )
    parser.add_argument("--data", type=arguments.path, help="folder of collected rows")
    parser.add_argument("--out", type=arguments.path, default=OUT)
    parser.add_argument("--report", action="store_true", help="the table only")
    args = parser.parse_args()
    with arguments.errors_in_one_line():
        if not args.report:
            fields = [field.name for field in dataclasses.fields(Settings)]
            settings = Settings(**{name: getattr(args, name) for name in fields})
            machine.configure_threads(1)
            start, commit = time.process_time(), machine.git_commit()
            folder = args.data or sources.cache_folder() / "exchange_accuracy"
            record = {
                "command": " ".join([COMMAND, *sys.argv[1:]]),
                "settings": dataclasses.asdict(settings),
                "rows": measure(settings, folder),
                "processor_seconds": time.process_time() - start,
                "machine": machine.describe(),
                "versions": machine.versions(),
                "commit": commit,
            }
            args.out.mkdir(parents=True, exist_ok=True)
            path = args.out / f"aging_{settings.seed}.json"
            files.write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
        report(args.out)


if __name__ == "__main__":
    main()
