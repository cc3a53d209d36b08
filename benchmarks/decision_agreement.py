"""What each shortcut changes: the rows it exchanges against those of the paper's setting.

    python benchmarks/decision_agreement.py [--out results/speed/agreement.json]

A small DARE-IQL experiment on hopper is brought to its online phase: IQL is trained offline, its
policy fills the online buffer, a diffusion model is fitted to the behavior and an energy to Q.
Then some online updates are made in the paper's setting. After them every setting decides which
rows of the same batches to exchange. The table compares each setting with the paper's, by means
over batches:

agreement    size of intersection / union of the exchanged rows (Jaccard index)
chance       the agreement that two random sets of these sizes would have
correlation  Spearman correlation between the scores of a batch
exchanged    pairs per batch, of 128
ms           milliseconds for the scores and the exchange of one batch; the settings are timed in
             the order of the table, one after the other

The paper's setting decides by one random reference per row, so with other noise it does not agree
even with itself: the row `paper, other noise` shows how much agreement can be expected at best.
Networks and data are small and trained for minutes; all sizes are flags and part of the result.
"""

import copy
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from algorithms import dare_iql
from corl import arguments, envs, finetune, machine, tasks
from corl.data import sources
from corl.progress import progress_bar
from corl_dare import hook
from corl_dare.behavior import BehaviorModel
from corl_dare.config import PRESETS
from corl_dare.exchange import exchange
from corl_dare.rows import draw

BATCH = 256


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; every field is a flag."""

    env: str = "hopper-medium-v2"
    seed: int = 0
    # Few rows, since support actions are sampled once for each of them.
    dataset_rows: int = 15_000
    offline_updates: int = 10_000
    online_rows: int = 5_000
    behavior_updates: int = 3_000  # paper: 600 000
    behavior_batch_size: int = 256  # paper: 4096
    behavior_lr: float = 5e-4  # paper: 1e-4
    behavior_width: float = 1.0
    # Made before the online updates; paper: 100 000.
    energy_updates: int = 2_000
    energy_batch_states: int = 64  # paper: 256
    # An old reference is made before these updates, the decision after them.
    online_updates: int = 200
    batches: int = 40


PAPER = {}
MIXTURE = {"behavior": "mixture", "guidance_scale": 0.0}
# Of the preset `near` what this experiment can show: its models are smaller than the preset's.
NEAR = {k: PRESETS["near"]["dare"][k] for k in ("sampler_steps", "behavior_width")}
# Name -> fields of the dare block that differ from the paper's setting.
VARIANTS = {
    "paper": PAPER,
    "paper, other noise": PAPER,
    "energy every 10 updates": {"energy_update_freq": 10},
    "energy every 50 updates": {"energy_update_freq": 50},
    "references as old as the online updates": {"reference_max_age": 1_000_000_000},
    "5 network evaluations": {"sampler_steps": 5},
    "near": NEAR,
    "near, energy every 10 updates": {**NEAR, "energy_update_freq": 10},
    "8 network evaluations": {"sampler_steps": 8},
    "no guidance": {"guidance_scale": 0.0},
    "16 references": {"references": 16},
    "16 references, other noise": {"references": 16},
    "16 references, no guidance": {"references": 16, "guidance_scale": 0.0},
    "likelihood of a mixture": {**MIXTURE, "score": "likelihood"},
    "policy ratio to a mixture": {**MIXTURE, "score": "policy_ratio"},
    "random": {"rule": "random"},
}


class Experiment:
    """Buffers, a trained IQL and behavior models; makes hooks that share them."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.config = dare_iql.TrainConfig(
            env=settings.env,
            seed=settings.seed,
            dataset_source="self-collected",
            dataset_rows=settings.dataset_rows,
            buffer_size=settings.dataset_rows + settings.online_rows,
            offline_iterations=settings.offline_updates,
            threads=1,
            compile=False,
            dare=self.block({}),
        )
        task = tasks.task(settings.env)
        self.data = finetune.load_data(self.config, task)
        normalization = self.data.normalization
        env = envs.make(settings.env)
        env = finetune.wrap_env(env, normalization.mean, normalization.std)
        self.offline, self.online = (
            finetune.new_buffer(self.config, task) for _ in range(2)
        )
        self.offline.load_d4rl_dataset(self.data.arrays)
        finetune.set_seed(settings.seed, env)
        sizes = task.state_dim, task.action_dim, 1.0
        self.trainer = dare_iql.make_trainer(self.config, *sizes, "cpu")
        for _ in progress_bar(range(settings.offline_updates), desc="offline"):
            dare_iql.step(self.trainer, self.offline, self.config)
        self.trainer.start_online()
        collector = finetune.OnlineCollector(env, self.online, task, "cpu")
        for _ in range(settings.online_rows):
            collector.step(self.trainer.actor)
        low, high = self.data.return_range()
        self.q_scale = hook.energy_q_scale(settings.env, high - low)
        self.behaviors: dict[tuple[str, float], BehaviorModel] = {}

    def block(self, fields: dict) -> dare_iql.DareIQLConfig:
        """The dare block of a variant, with the sizes of this experiment."""
        names = {f.name for f in dataclasses.fields(dare_iql.DareIQLConfig)}
        sizes = dataclasses.asdict(self.settings).items()
        shared = {k: v for k, v in sizes if k in names}
        return dare_iql.DareIQLConfig(**{**shared, **fields})

    def behavior(self, block: dare_iql.DareIQLConfig) -> BehaviorModel:
        """The behavior model of a block: one for each kind and width."""
        key = block.behavior, block.behavior_width
        if key not in self.behaviors:
            self.behaviors[key] = self.fit(block)
        return self.behaviors[key]

    def fit(self, block: dare_iql.DareIQLConfig) -> BehaviorModel:
        """A behavior model of the raw offline rows, from the cache if it was fitted before."""
        rows = self.offline._size
        return hook.fit_behavior(
            block,
            self.data.normalization.undo(self.offline._states[:rows]),
            self.offline._actions[:rows],
            dataset_hash=self.data.provenance["sha256"],
            cache_dir=sources.cache_folder() / "behavior",
            seed=self.settings.seed,
            device="cpu",
        )

    def hook(self, fields: dict, seed: int = 0) -> hook.DareHook:
        """A hook of a variant on the common buffers, trainer and behavior models."""
        block = self.block(fields)
        return hook.DareHook(
            self.offline,
            self.online,
            block,
            self.behavior(block),
            **dare_iql.hook_arguments(self.trainer),
            q_scale=self.q_scale,
            unnormalize=self.data.normalization.undo,
            seed=seed,
        )


def follow(leader: hook.DareHook, drawn: hook.Drawn, other: hook.DareHook) -> None:
    """An energy step of another schedule, on the leader's batch and support actions."""
    other.samples = leader.samples
    other.support_caches = leader.support_caches
    other.update_energy(drawn)


def decide(source: hook.DareHook, number: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Scores (B,), whether a row is exchanged (B,), and seconds, of batch `number`."""
    np.random.seed(number)
    half = BATCH // 2
    rows, parts = zip(
        *(draw(buffer, half) for buffer in (source.offline, source.online)),
        strict=True,
    )
    states, actions = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    start = time.perf_counter()
    with torch.no_grad():
        scores, _ = source.score(states, actions, list(rows))
        result = exchange(
            scores[:half],
            scores[half:],
            rule=source.config.rule,
            generator=source.generator,
        )
    seconds = time.perf_counter() - start
    moved = (result.order != torch.arange(BATCH)).numpy()
    return scores.numpy(), moved, seconds


def ranks(x: np.ndarray) -> np.ndarray:
    """The place of every value in the sorted order, from 0."""
    return x.argsort().argsort().astype(float)


def compare(ours: list, papers: list) -> dict[str, float]:
    """Means over batches of what the docstring of this file lists."""
    agreement, chance, correlation, exchanged = [], [], [], []
    for (scores, moved, _), (paper_scores, paper_moved, _) in zip(
        ours, papers, strict=True
    ):
        union = (moved | paper_moved).sum()
        agreement.append((moved & paper_moved).sum() / union if union else 1.0)
        # Expected sizes of union and intersection if both sets were drawn at random.
        p, q = moved.mean(), paper_moved.mean()
        chance.append(p * q / (p + q - p * q) if union else 1.0)
        correlation.append(np.corrcoef(ranks(scores), ranks(paper_scores))[0, 1])
        exchanged.append(moved.sum() / 2)
    return {
        "agreement": float(np.mean(agreement)),
        "agreement_error": float(np.std(agreement, ddof=1) / len(agreement) ** 0.5),
        "chance": float(np.mean(chance)),
        "correlation": float(np.mean(correlation)),
        "exchanged": float(np.mean(exchanged)),
        "milliseconds": float(np.median([seconds for *_, seconds in ours]) * 1e3),
    }


def run(settings: Settings, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Name of the setting -> its numbers, for these variants."""
    experiment = Experiment(settings)
    paper = experiment.hook(PAPER)
    paper.pretrain()
    hooks = {}
    for i, (name, fields) in enumerate(VARIANTS.items()):
        if name not in names:
            continue
        # Every variant has noise of its own.
        hooks[name] = experiment.hook(fields, seed=i)
        if hooks[name].energy is not None:
            hooks[name].energy = copy.deepcopy(paper.energy)
            hooks[name].energy_optimizer = torch.optim.Adam(
                hooks[name].energy.parameters(), lr=hooks[name].config.energy_lr
            )
            state = copy.deepcopy(paper.energy_optimizer.state_dict())
            hooks[name].energy_optimizer.load_state_dict(state)
    numbers = range(1000, 1000 + settings.batches)
    for source in hooks.values():
        if source.config.reference_max_age:
            # Fill the cache of old references before Q and the energy change.
            for number in numbers:
                decide(source, number)

    np.random.seed(settings.seed)
    late = [h for h in hooks.values() if h.config.energy_update_freq > 1]
    for _ in progress_bar(range(settings.online_updates), desc="online"):
        drawn = paper.sample(experiment.config.batch_size)
        experiment.trainer.train(drawn.batch, drawn.release)
        paper.update_energy(drawn)
        for other in late:
            follow(paper, drawn, other)
    for source in hooks.values():
        if source.energy is not None and source not in late:
            source.energy = paper.energy

    decisions = {
        name: [decide(source, number) for number in numbers]
        for name, source in progress_bar(hooks.items(), desc="decisions")
    }
    return {name: compare(ours, decisions["paper"]) for name, ours in decisions.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown table."""
    head = ["setting", "agreement", "chance", "correlation", "exchanged", "ms"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, r in results.items():
        cells = [
            name,
            f"{r['agreement']:.3f} ± {r['agreement_error']:.3f}",
            f"{r['chance']:.3f}",
            f"{r['correlation']:.2f}",
            f"{r['exchanged']:.1f}",
            f"{r['milliseconds']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name}", type=arguments.setting(field), default=field.default
        )
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)
    )
    parser.add_argument("--out", type=arguments.path, help="write the numbers as JSON")
    args = vars(parser.parse_args())
    out, names = args.pop("out"), ["paper", *args.pop("variants")]
    settings = Settings(**args)
    machine.configure_threads(1)
    with arguments.errors_in_one_line():
        results = run(settings, names)
    print(table(results))
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": shlex.join(
            ["python", "benchmarks/decision_agreement.py", *sys.argv[1:]]
        ),
        "results": results,
        "settings": dataclasses.asdict(settings),
        "variants": VARIANTS,
        "data": "self-collected stand-in, not D4RL data",
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": machine.git_commit(),
    }
    out.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
