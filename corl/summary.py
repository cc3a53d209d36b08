"""What a finished run says of itself: `summary.json`, and the lines on the screen."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corl import curves, drop, machine, tasks


class Phases(NamedTuple):
    """Mean normalized scores of a run's evaluations.

    offline, online: of each phase.
    seen: those that count as final: the online ones, or in a run without any the offline ones.
    """

    offline: list[float]
    online: list[float]
    seen: list[float]


def phases_of(scores: Sequence[Sequence[Any]]) -> Phases:
    """The phases of `Run.scores`, whose rows are (step, phase, score)."""
    offline = [s for _, phase, s in scores if phase == "offline"]
    online = [s for _, phase, s in scores if phase == "online"]
    return Phases(offline, online, online or offline)


def means_of(metrics: Path, means: Mapping[str, str]) -> dict[str, float | None]:
    """Entry of the summary -> mean of its metric, over the rows of metrics.csv that have it."""
    columns = curves.read_csv(metrics)
    found = {}
    for entry, name in means.items():
        values = [float(text) for text in columns.get(name, ()) if text]
        # Older versions wrote nan where there is a blank now.
        values = [value for value in values if math.isfinite(value)]
        found[entry] = sum(values) / len(values) if values else None
    return found


def training_score(columns: Mapping[str, Sequence[str]]) -> float | None:
    """Mean score of the training episodes over the online phase; None where there is none.

    Where nothing is normalized it is the mean return.

    It is the mean over the logged online steps of the score of the last finished episode, so an
    episode counts by the time it takes. `columns` are those of metrics.csv, as text.
    """
    name = "train_return" if tasks.RAW.column in columns else "train_score"
    pairs = zip(columns["phase"], columns.get(name, ()), strict=False)
    scores = [float(text) for phase, text in pairs if phase == "online" and text]
    scores = [score for score in scores if math.isfinite(score)]
    return float(np.mean(scores)) if scores else None


def summary_of(run: Any) -> dict[str, Any]:
    """What summary.json says of a `runs.Run`.

    `score_offline`: last evaluation of the offline phase. `score_final`: mean of the last four
    online evaluations. `score_last`, `score_best`: last and best online evaluation; in a run
    without any, the last three are of the offline phase. All are means over episodes, in
    `score_unit`, and D4RL-normalized where that is missing. `score_training`: see
    `training_score`. `drop`: see `drop.Drop`, None where the score before is unknown or there are
    fewer than three online evaluations. Versions and commit are those at the start of this
    process.
    """
    offline, _, seen = phases_of(run.scores)
    data = run.dataset
    metrics = curves.read_csv(run.folder / "metrics.csv")
    found = drop.drop_of(run.scores, run.config.offline_iterations)
    # Programs of other people have configs of their own.
    caveat = run.config.caveat() if hasattr(run.config, "caveat") else ""
    return {
        "algorithm": run.algorithm,
        **({"caveat": caveat} if caveat else {}),
        "env": run.config.env,
        "seed": run.config.seed,
        **({} if run.scale is tasks.D4RL else {"score_unit": run.scale.label}),
        "score_offline": offline[-1] if offline else None,
        "score_final": float(np.mean(seen[-4:])) if seen else None,
        "score_last": seen[-1] if seen else None,
        "score_best": max(seen) if seen else None,
        "score_training": training_score(metrics),
        "drop": found._asdict() if found else None,
        **means_of(run.folder / "metrics.csv", run.means),
        "updates": run.updates,
        "updates_per_second": run.updates / max(run.update_seconds, 1e-9),
        "wall_seconds": run.clock(),
        # Stacked seeds share the time of one process, and others step their environments.
        **(
            {"stacked": run.stacked} if run.stacked else {"cpu_seconds": run.cpu_clock()}
        ),
        # Of each piece of work between online steps, such as generating data.
        **({"work_seconds": list(run.work_seconds)} if run.work_seconds else {}),
        "dataset": {
            "source": data.get("source"),
            "label": data.get("label"),
            "path": machine.tidy_path(data["path"]) if data.get("path") else None,
            "sha256": data.get("sha256"),
            "rows": data.get("rows"),
            # None: the run scaled nothing by returns.
            "return_range": data.get("return_range"),
        },
        **({"warnings": run.warnings} if run.warnings else {}),
        **run.code,
        "machine": machine.describe(),
    }


def result_of(run: Any, summary: Mapping[str, Any]) -> str:
    """What a finished run prints."""
    _, online, seen = phases_of(run.scores)

    def show(score: float | None) -> str:
        return "none" if score is None else f"{score:.1f}"

    # A run may be offline only.
    kind, name = "online" if online else "final", run.scale.name
    return (
        f"\noffline {name} {show(summary['score_offline'])} -> {kind} {name} "
        f"{show(summary['score_final'])} ({run.scale.unit}, mean of the last "
        f"{min(4, len(seen))} evaluations; last {show(summary['score_last'])}, best "
        f"{show(summary['score_best'])})\n"
        f"{_drop_of(summary)}"
        f"{_caveat_of(summary)}"
        f"dataset: {run.dataset.get('label', 'unknown')}\n"
        f"run folder: {machine.tidy_path(run.folder)}\n"
        f"curves: {machine.tidy_path(run.folder / 'curves.png')}"
    )


def _caveat_of(summary: Mapping[str, Any]) -> str:
    """A line that says what must be known of the method, where there is something."""
    caveat = summary.get("caveat")
    return f"{caveat}\n" if caveat else ""


def _drop_of(summary: Mapping[str, Any]) -> str:
    """A line about the drop at the switch, where it is known."""
    if summary["drop"] is None:
        return ""
    found = drop.Drop(**summary["drop"])
    back = f"not back within {found.budget:,} steps"
    if found.recovery is not None:
        back = f"back after {found.recovery:,} steps"
    side = "below" if found.depth >= 0 else "above"
    return (
        f"after the switch at {found.before:.1f}: lowest mean of {drop.WINDOW} evaluations "
        f"{abs(found.depth):.1f} {side} that, at online step {found.depth_step:,}; {back}\n"
    )
