"""What a finished run says of itself: `summary.json`, and the lines on the screen."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corl import curves, machine


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


def summary_of(run: Any) -> dict[str, Any]:
    """What summary.json says of a `runs.Run`.

    `score_offline`: last evaluation of the offline phase. `score_final`: mean of the last four
    online evaluations. `score_last`, `score_best`: last and best online evaluation; in a run
    without any, the last three are of the offline phase. All are means over episodes,
    D4RL-normalized. Versions and commit are those at the start of this process.
    """
    offline, _, seen = phases_of(run.scores)
    data = run.dataset
    return {
        "algorithm": run.algorithm,
        "env": run.config.env,
        "seed": run.config.seed,
        "score_offline": offline[-1] if offline else None,
        "score_final": float(np.mean(seen[-4:])) if seen else None,
        "score_last": seen[-1] if seen else None,
        "score_best": max(seen) if seen else None,
        **means_of(run.folder / "metrics.csv", run.means),
        "updates": run.updates,
        "updates_per_second": run.updates / max(run.update_seconds, 1e-9),
        "wall_seconds": run.clock(),
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
    kind = "online" if online else "final"
    return (
        f"\noffline score {show(summary['score_offline'])} -> {kind} score "
        f"{show(summary['score_final'])} (D4RL-normalized, mean of the last "
        f"{min(4, len(seen))} evaluations; last {show(summary['score_last'])}, best "
        f"{show(summary['score_best'])})\n"
        f"dataset: {run.dataset.get('label', 'unknown')}\n"
        f"run folder: {machine.tidy_path(run.folder)}\n"
        f"curves: {machine.tidy_path(run.folder / 'curves.png')}"
    )
