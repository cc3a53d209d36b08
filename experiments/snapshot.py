"""What the samples of a run look like at its last checkpoint (paper Fig. 1), as a few numbers.

    python -m experiments.report figures runs/NAME

rebuilds the run's policy, buffers and DARE hook from its folder and its dataset, draws rows of both
buffers as training does, and keeps histograms of their alignment scores with the separation point
(Fig. 1c), of the squared difference between the policy's action and the row's (Fig. 1a), and two
principal components of (state, action) (Fig. 1b, there with t-SNE: PCA has nothing to tune, and
distances in it mean something). Of an IQL run also the advantages of the rows that the exchange
moves: what the conservative policy loss, weighted by the advantage, loses and gains by it.
"""

import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch

from corl import checkpoints, envs, finetune, rewards
from corl.config import parse_config
from corl.data import sources
from corl.trained import acting
from corl_dare.exchange import exchange
from corl_dare.hook import DareHook, prepare
from corl_dare.rows import draw_rows
from experiments.programs import ROOT, load_algorithm
from experiments.values import read_json

ROWS = 4096  # drawn from each buffer
POINTS = 400  # of each buffer in the projection
BINS = 60
SHOWN = (2.5, 97.5)  # percentiles between which a histogram is drawn


class Summary(TypedDict):
    """What is read of the run's `summary.json`."""

    algorithm: str


class RunFiles(NamedTuple):
    """What a run folder says: the algorithm file's module, the config, the checkpoint."""

    folder: Path
    module: ModuleType
    config: Any
    state: dict[str, Any]


class RestoredRun(NamedTuple):
    """A run as it was at its last checkpoint; hook: None for a run without DARE.

    offline and online are buffers of the dataset's and of the online rows alone.
    """

    trainer: Any
    offline: finetune.ReplayBuffer
    online: finetune.ReplayBuffer
    hook: DareHook | None


def take_snapshot(folder: Path | str, rows: int = ROWS) -> dict[str, Any]:
    """Numbers for the paper's Fig. 1 from the last checkpoint of a run folder; on the CPU.

    A behavior model that is not in the cache is trained again.

    Returns:
        step, rows: of the checkpoint; drawn from each buffer.
        scores: edges, offline and online counts, moments of both halves, separation_point,
            auc = P(an online row has a higher alignment score than an offline one),
            exchangeable = share of the rows that the threshold rule would exchange; None for a
            run without DARE.
        advantages: rows, mean advantage and mean weight in IQL's policy loss of the offline and
            online rows that this exchange keeps and moves; None without DARE or without IQL's V.
        action_error: edges, offline and online counts, both means.
        projection: points (POINTS, 2) of both buffers, shares of the variance.

    Raises:
        ValueError: no run, no checkpoint, another dataset, or no online rows in it.
    """
    files = read_files(folder)
    run = restore(files)
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, b._size, rows) for b in (run.offline, run.online)]
    off, on = draw_rows(run.offline, drawn[0]), draw_rows(run.online, drawn[1])
    scores = advantages = None
    if run.hook is not None:
        both = torch.cat([off[0], on[0]]), torch.cat([off[1], on[1]])
        scores, order = score_numbers(run.hook, *both, drawn)
        if hasattr(run.trainer, "vf"):
            with torch.no_grad():
                q, v = run.trainer.q_target(*both), run.trainer.vf(both[0])
            advantage = (q.flatten() - v.flatten()).double().numpy()
            weight = np.exp(files.config.beta * advantage)
            weight = weight.clip(max=files.module.EXP_ADV_MAX)
            advantages = advantage_numbers(advantage, weight, order.numpy())
    return {
        "step": files.state["step"],
        "rows": rows,
        "scores": scores,
        "advantages": advantages,
        "action_error": error_numbers(acting(run.trainer), off, on),
        "projection": projection_numbers(off, on),
    }


def read_files(folder: Path | str) -> RunFiles:
    """The algorithm file, the config and the checkpoint of a run.

    Raises:
        ValueError: no finished run, no checkpoint, or a run of a file that is not here.
    """
    folder = Path(folder)
    if not (folder / "summary.json").is_file():
        raise ValueError(f"{folder} is no finished run (no summary.json)")
    name = read_json(folder / "summary.json", "resume the run", form=Summary)[
        "algorithm"
    ]
    if not re.fullmatch(r"\w+", name):
        raise ValueError(
            f"{folder / 'summary.json'}: algorithm {name!r} is no name of an algorithm file; "
            "run it again"
        )
    file = ROOT / "algorithms" / f"{name}.py"
    if not file.is_file():
        raise ValueError(
            f"{folder} is a run of {name}, whose file algorithms/{name}.py is not beside "
            "experiments; use a checkout of the repository"
        )
    module = load_algorithm(str(file))
    arguments = ["--config", str(folder / "config.yaml")]
    config = parse_config(module.TrainConfig, arguments)
    state = checkpoints.load_checkpoint(folder / "checkpoint.pt", name)
    return RunFiles(folder, module, config, state)


def restore(files: RunFiles) -> RestoredRun:
    """Policy, buffers and hook of a run at its last checkpoint, on the CPU.

    Raises:
        ValueError: the dataset found here is another one, or there are no online rows.
    """
    folder, module, config, state = files
    task = envs.task_of(config)
    rule = state["run"].get("return_rule", rewards.UPSTREAM)
    data = finetune.load_data(config, task, rule=rule)
    if data.provenance["sha256"] != state["dataset_sha256"]:
        raise ValueError(
            f"{folder}: the dataset found here is not the run's (its sha256 differs); set "
            "CORL_DARE_CACHE or D4RL_DATASET_DIR to where that one is"
        )
    offline = finetune.new_buffer(config, task)
    offline.load_d4rl_dataset(data.arrays)
    online = online_buffer(files)
    max_action = float(envs.make(task, config.env_backend).action_space.high[0])
    sizes = task.state_dim, task.action_dim, max_action
    trainer = module.make_trainer(config, *sizes, "cpu")
    trainer.load_state_dict(checkpoints.unpack(state["parts"]["trainer"]))
    acting(trainer).eval()
    hook = None
    # Weights without a score have nothing to show.
    if "hook" in state["parts"] and not config.dare.alike:
        hook = prepare(
            config.dare,
            offline,
            online,
            dataset_hash=data.provenance["sha256"],
            cache_dir=sources.cache_folder(),
            mixing_ratio=config.mixing_ratio,
            unnormalize=data.normalization.undo,
            max_action=max_action,
            seed=config.seed,
            **module.hook_arguments(trainer),
        )
        hook.load_state_dict(checkpoints.unpack(state["parts"]["hook"]))
    return RestoredRun(trainer, offline, online, hook)


def online_buffer(files: RunFiles) -> finetune.ReplayBuffer:
    """A buffer of the online rows alone.

    Raises:
        ValueError: there are none, or they cannot be told from the dataset's.
    """
    folder, _, config, state = files
    saved = state["parts"].get("online_buffer")
    if saved is None or not len(saved["rows"][0]):
        raise ValueError(f"{folder}: the checkpoint has no online rows")
    shared = getattr(config, "mixing_ratio", None) is None
    if shared and saved["first"] == 0:
        raise ValueError(
            f"{folder}: online rows have overwritten the dataset in the run's one buffer; "
            "set mixing_ratio, or a larger buffer_size, to tell them apart"
        )
    pointer = len(saved["rows"][0]) % config.buffer_size if shared else saved["pointer"]
    buffer = finetune.new_buffer(config, envs.task_of(config))
    buffer.load_state_dict({"first": 0, "pointer": pointer, "rows": saved["rows"]})
    return buffer


def score_numbers(
    hook: DareHook, states: torch.Tensor, actions: torch.Tensor, drawn: list
) -> tuple[dict[str, Any], torch.Tensor]:
    """Alignment scores of offline and online rows as the hook sees them, and where they part.

    Also the order (2N,) into which the threshold rule would put offline and online rows.
    """
    with torch.no_grad():
        values, _ = hook.score(states, actions, drawn)
    n = len(drawn[0])
    result = exchange(values[:n], values[n:])
    moments = ("score_off_mean", "score_off_std", "score_on_mean", "score_on_std")
    d = values.double().numpy()
    numbers = {
        "kind": hook.config.score,
        **_histogram(d[:n], d[n:]),
        **{name: float(result.stats[name]) for name in moments},
        "separation_point": float(result.stats["separation_point"]),
        "exchangeable": float(result.stats["exchanged"]) / n,
        "auc": auc(d[:n], d[n:]),
    }
    return numbers, result.order


def advantage_numbers(
    advantage: np.ndarray, weight: np.ndarray, order: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Means over the rows that an exchange keeps in their half and over those that it moves.

    Args:
        advantage: (2N,) A = Q - V, offline rows first.
        weight: (2N,) min(exp(beta A), 100), each row's weight in IQL's policy loss.
        order: (2N,) places of the rows, the first N offline-like.
    """
    n = len(order) // 2
    offline = np.arange(2 * n) < n
    offline_like = np.zeros(2 * n, bool)
    offline_like[order[:n]] = True
    groups = {
        "offline_kept": offline & offline_like,
        "offline_moved": offline & ~offline_like,
        "online_kept": ~offline & ~offline_like,
        "online_moved": ~offline & offline_like,
    }
    return {
        name: {
            "rows": int(group.sum()),
            "advantage": float(advantage[group].mean()) if group.any() else None,
            "weight": float(weight[group].mean()) if group.any() else None,
        }
        for name, group in groups.items()
    }


def auc(low: np.ndarray, high: np.ndarray) -> float:
    """P(a value of `high` is above one of `low`), a tie counts one half."""
    low = np.sort(low)
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2.0 * len(low)))


def error_numbers(actor: Any, off: list, on: list) -> dict[str, Any]:
    """Squared difference, mean over action dimensions, of the policy's mode and the row."""
    errors = []
    for states, actions in (off[:2], on[:2]):
        chosen = np.stack([actor.act(state) for state in states.numpy()])
        errors.append(((chosen - actions.numpy()) ** 2).mean(1).astype(np.float64))
    return {
        **_histogram(*errors, low=0.0),
        "offline_mean": float(errors[0].mean()),
        "online_mean": float(errors[1].mean()),
    }


def projection_numbers(off: list, on: list, points: int = POINTS) -> dict[str, Any]:
    """The first rows of both buffers on the two principal components of all rows.

    (state, action) is standardized per coordinate over both buffers together. A component
    points to where its largest coefficient is positive.
    """
    rows = torch.cat([torch.cat(off[:2], 1), torch.cat(on[:2], 1)]).double().numpy()
    std = rows.std(0)
    rows = (rows - rows.mean(0)) / np.where(std > 0, std, 1.0)
    _, strength, components = np.linalg.svd(rows, full_matrices=False)
    components = components[:2]  # (2, S + A)
    largest = np.abs(components).argmax(1)
    components *= np.sign(components[[0, 1], largest])[:, None]
    placed = rows @ components.T  # (2 rows, 2)
    n = len(off[0])
    return {
        "offline": np.round(placed[:n][:points], 3).tolist(),
        "online": np.round(placed[n:][:points], 3).tolist(),
        "variance": (strength[:2] ** 2 / max((strength**2).sum(), 1e-12)).tolist(),
    }


def _histogram(
    off: np.ndarray, on: np.ndarray, low: float | None = None
) -> dict[str, Any]:
    """Counts of both in common bins; the tails, 2.5 % of all rows at each end, are left out."""
    start, high = np.percentile(np.concatenate([off, on]), SHOWN)
    low = start if low is None else low
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1)
    return {
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "offline": np.histogram(off, edges)[0].tolist(),
        "online": np.histogram(on, edges)[0].tolist(),
    }
