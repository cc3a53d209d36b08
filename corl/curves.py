"""TODO corl.curves"""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from corl import files

# Okabe and Ito's colors, which the color-blind can tell apart
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def read_csv(path: Path) -> dict[str, list[str]]:
    """Columns of a CSV file, as text."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    return {name: [r[i] for r in rows[1:]] for i, name in enumerate(rows[0])}


def plot_curves(folder: Path, config: Any, label: str) -> Path:
    """Draw curves.png of a run folder: score, exchange count, score distributions.

    Missing columns, few points, nan and inf leave gaps. `label` names the dataset's source.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    metrics = read_csv(folder / "metrics.csv")
    steps = np.array(metrics["step"], dtype=float)

    def column(name: str) -> np.ndarray:
        """A number per row, nan where there is none."""
        values = [float(v or "nan") for v in metrics.get(name, [""] * len(steps))]
        values = np.array(values, dtype=float)
        return np.where(np.isfinite(values), values, np.nan)

    exchanged = column("exchanged")
    rows = np.isfinite(exchanged)  # those of the online phase, where pairs are exchanged
    panels = 3 if rows.any() else 1
    figure = Figure(figsize=(7, 2.5 * panels + 0.7), layout="constrained")
    axes = np.atleast_1d(figure.subplots(panels, sharex=True))
    switch, total = (
        config.offline_iterations,
        config.offline_iterations + config.online_iterations,
    )
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if 0 < switch < total:
            axis.axvline(switch, color="#666666", linewidth=1, linestyle=":")
    axes[0].set_xlim(-0.02 * total, 1.02 * total or 1.0)
    for start, end, phase in ((0, switch, "offline"), (switch, total, "online")):
        if end - start > 0.1 * total:  # else no room for the word
            options = {"ha": "center", "va": "bottom", "color": "#666666", "fontsize": 9}
            across = axes[0].get_xaxis_transform()
            axes[0].text((start + end) / 2, 1.0, phase, transform=across, **options)
    axes[0].set_title(
        f"{config.name} on {config.env}, seed {config.seed}\n{label}",
        fontsize=10,
        pad=18,
        wrap=True,
    )
    _draw_scores(axes[0], read_csv(folder / "evaluations.csv"))
    if panels == 3:
        x = steps[rows]
        _draw_line(axes[1], x, exchanged[rows], PURPLE)
        axes[1].set_ylim(bottom=0)
        axes[1].set_ylabel("exchanged pairs")
        names = (
            "score_off_mean score_off_std score_on_mean score_on_std separation_point"
        )
        _draw_distributions(axes[2], x, *(column(n)[rows] for n in names.split()))
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[-1].set_xlabel("step (offline: updates, online: environment steps)")
    figure.align_ylabels()
    path = folder / "curves.png"
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
    return path


def _draw_line(axis: Any, x: np.ndarray, y: np.ndarray, color: str, **options) -> None:
    options["marker"] = (
        "o" if np.isfinite(y).sum() <= 50 else None
    )  # one point is seen too
    axis.plot(x, y, color=color, linewidth=1.2, markersize=3, **options)


def _draw_scores(axis: Any, evaluations: dict[str, list[str]]) -> None:
    steps = np.array(evaluations["step"], dtype=float)
    scores = np.array(evaluations["score"], dtype=float)
    scores = np.where(np.isfinite(scores), scores, np.nan)
    x = np.unique(steps)
    mean = np.array([scores[steps == step].mean() for step in x])
    std = np.array([scores[steps == step].std() for step in x])
    axis.fill_between(x, mean - std, mean + std, color=BLUE, alpha=0.18, linewidth=0)
    _draw_line(axis, x, mean, BLUE)
    axis.set_ylabel("D4RL-normalized score\n(mean ± std of episodes)")
    if not np.isfinite(mean).any():
        axis.set_yticks([])
        options = {"ha": "center", "va": "center", "color": "#666666"}
        why = "the scores are not finite" if len(x) else "no evaluations"
        axis.text(0.5, 0.5, why, transform=axis.transAxes, **options)


def _draw_distributions(
    axis: Any,
    x: np.ndarray,
    off: np.ndarray,
    off_std: np.ndarray,
    on: np.ndarray,
    on_std: np.ndarray,
    tau: np.ndarray,
) -> None:
    """Scores of both halves, mean ± std, and the separation point between them."""
    for mean, std, color, name in (
        (off, off_std, BLUE, "offline half, mean ± std"),
        (on, on_std, ORANGE, "online half, mean ± std"),
    ):
        axis.fill_between(
            x, mean - std, mean + std, color=color, alpha=0.18, linewidth=0
        )
        _draw_line(axis, x, mean, color, label=name)
    _draw_line(axis, x, tau, GREEN, label="separation point", linestyle="--")
    axis.set_ylabel("alignment score")
    # Ratio scores have stds far above the distances between the lines: show the lines.
    ends = [np.percentile(y, (1, 99)) for y in map(_finite, (off, on, tau)) if len(y)]
    if ends:
        low, high = np.min(ends), np.max(ends)
        room = (high - low) or max(abs(high), 1.0)
        bottom, top = axis.get_ylim()
        if bottom < low - room or top > high + room:
            axis.set_ylabel("alignment score\n(spread cut off)")
        axis.set_ylim(max(bottom, low - room), min(top, high + room))
    # Above the panel, where no data is.
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=3,
        fontsize=9,
        frameon=False,
    )


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
