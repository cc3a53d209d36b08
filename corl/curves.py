"""The picture of a run: its score, and what the algorithm wants to be seen below it."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corl import drop, files
from corl.run_tables import scores_in
from corl.tasks import D4RL, Scale

# Of Okabe and Ito's palette, which the color-blind can tell apart.
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"


def read_csv(path: Path) -> dict[str, list[str]]:
    """Columns of a CSV file, as text."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    return {name: [r[i] for r in rows[1:]] for i, name in enumerate(rows[0])}


def numbers(columns: dict[str, list[str]], name: str) -> np.ndarray:
    """A column of `read_csv` as floats (N,), nan where it holds no finite number."""
    texts = columns.get(name, [""] * len(columns["step"]))
    values = np.array([float(text or "nan") for text in texts], dtype=float)
    return np.where(np.isfinite(values), values, np.nan)


def plot_curves(
    folder: Path,
    config: Any,
    label: str,
    panels: Sequence[Mapping[str, Any]] = (),
    scale: Scale = D4RL,
) -> Path:
    """Draw curves.png of a run folder: the score, and below it what the algorithm adds.

    Missing columns, few points, nan and inf leave gaps.

    Args:
        folder: run folder.
        config: the run's config.
        label: names the dataset's source.
        panels: per panel its y `label`, `lines` (label, metric, color, style), `bands` (label,
            mean, standard deviation, color) and the `bottom` of its y axis. They are drawn from
            the rows of metrics.csv that hold the metric of the first panel's first line.
        scale: of the scores.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    metrics = read_csv(folder / "metrics.csv")
    rows = np.zeros(len(metrics["step"]), bool)
    if panels:
        rows = np.isfinite(numbers(metrics, panels[0]["lines"][0][1]))
    panels = panels if rows.any() else ()
    count = 1 + len(panels)
    figure = Figure(figsize=(7, 2.5 * count + 0.7), layout="constrained")
    axes = np.atleast_1d(figure.subplots(count, sharex=True))
    _draw_phases(axes, config, label)
    evaluations = read_csv(folder / "evaluations.csv")
    _draw_scores(axes[0], evaluations, scale)
    _draw_drop(axes[0], evaluations, config.offline_iterations)
    values = {name: numbers(metrics, name)[rows] for name in metrics if name != "phase"}
    for axis, panel in zip(axes[1:], panels, strict=True):
        _draw_panel(axis, panel, values)
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[-1].set_xlabel("step (offline: updates, online: environment steps)")
    figure.align_ylabels()
    path = folder / "curves.png"
    with files.replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
    return path


def _draw_phases(axes: np.ndarray, config: Any, label: str) -> None:
    """Grid, title, and where the offline phase ends."""
    switch = config.offline_iterations
    total = switch + config.online_iterations
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if 0 < switch < total:
            axis.axvline(switch, color="#666666", linewidth=1, linestyle=":")
    axes[0].set_xlim(-0.02 * total, 1.02 * total or 1.0)
    for start, end, phase in ((0, switch, "offline"), (switch, total, "online")):
        if end - start > 0.1 * total:  # else there is no room for the word
            options = {"ha": "center", "va": "bottom", "color": "#666666", "fontsize": 9}
            across = axes[0].get_xaxis_transform()
            axes[0].text((start + end) / 2, 1.0, phase, transform=across, **options)
    axes[0].set_title(
        f"{config.name} on {config.env}, seed {config.seed}\n{label}",
        fontsize=10,
        pad=18,
        wrap=True,
    )


def _draw_line(
    axis: Any, x: np.ndarray, y: np.ndarray, color: str, **options: Any
) -> None:
    # With markers a single point is seen, too.
    options["marker"] = "o" if np.isfinite(y).sum() <= 50 else None
    axis.plot(x, y, color=color, linewidth=1.2, markersize=3, **options)


def _draw_band(
    axis: Any,
    x: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    color: str,
    **options: Any,
) -> None:
    """A line with one standard deviation on either side."""
    axis.fill_between(x, mean - std, mean + std, color=color, alpha=0.18, linewidth=0)
    _draw_line(axis, x, mean, color, **options)


def _draw_scores(axis: Any, evaluations: dict[str, list[str]], scale: Scale) -> None:
    steps = np.array(evaluations["step"], dtype=float)
    scores = np.array(scores_in(evaluations), dtype=float)
    scores = np.where(np.isfinite(scores), scores, np.nan)
    x = np.unique(steps)
    mean = np.array([scores[steps == step].mean() for step in x])
    std = np.array([scores[steps == step].std() for step in x])
    _draw_band(axis, x, mean, std, BLUE)
    axis.set_ylabel(f"{scale.label}\n(mean ± std of episodes)")
    if not np.isfinite(mean).any():
        axis.set_yticks([])
        options = {"ha": "center", "va": "center", "color": "#666666"}
        why = f"the {scale.name}s are not finite" if len(x) else "no evaluations"
        axis.text(0.5, 0.5, why, transform=axis.transAxes, **options)


def evaluation_means(columns: Mapping[str, Sequence[str]]) -> list[list[Any]]:
    """Rows (step, phase, mean score) of the evaluations in the columns of evaluations.csv."""
    found: dict[tuple[int, str], list[float]] = {}
    values = columns["step"], columns["phase"], scores_in(columns)
    for step, phase, score in zip(*values, strict=True):
        found.setdefault((int(step), phase), []).append(float(score))
    return [[step, phase, float(np.mean(s))] for (step, phase), s in found.items()]


def _draw_drop(axis: Any, evaluations: dict[str, list[str]], switch: int) -> None:
    """Mark how deep the score falls at the switch, and where it is back."""
    means = evaluation_means(evaluations)
    if not np.isfinite([score for *_, score in means]).all():
        return
    found = drop.drop_of(means, switch)
    if found is None:
        return
    end = found.censored_recovery
    level = {"color": RED, "linewidth": 1.0, "linestyle": ":"}
    axis.plot([switch, switch + end], [found.before] * 2, **level)
    if found.depth > 0:
        at, lowest = switch + found.depth_step, found.before - found.depth
        axis.plot([at, at], [found.before, lowest], color=RED, linewidth=1.2)
        axis.plot(at, lowest, "v", color=RED, markersize=5)
        label = f"−{found.depth:.1f} "
        options = {"ha": "right", "va": "bottom", "color": RED, "fontsize": 8}
        # A line of scores may run behind it.
        behind = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}
        axis.text(at, lowest, label, bbox=behind, **options)
    if found.recovery is not None:
        axis.plot(switch + found.recovery, found.before, "^", color=GREEN, markersize=5)


def _draw_panel(
    axis: Any, panel: Mapping[str, Any], values: dict[str, np.ndarray]
) -> None:
    x = values["step"]
    missing = np.full(len(x), np.nan)
    means = []
    for name, mean, std, color in panel.get("bands", ()):
        means.append(values.get(mean, missing))
        spread = values.get(std, missing)
        _draw_band(axis, x, means[-1], spread, color, label=name)
    for name, metric, color, style in panel["lines"]:
        line = values.get(metric, missing)
        _draw_line(axis, x, line, color, label=name, linestyle=style)
        means.append(line)
    axis.set_ylabel(panel["label"])
    if "bottom" in panel:
        axis.set_ylim(bottom=panel["bottom"])
    if not panel.get("bands"):
        return
    _show_the_lines(axis, panel["label"], means)
    # Above the panel, where no data is.
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=3,
        fontsize=9,
        frameon=False,
    )


def _show_the_lines(axis: Any, label: str, lines: list[np.ndarray]) -> None:
    """Cut bands off that would make the distances between the lines invisible."""
    finite = [line[np.isfinite(line)] for line in lines]
    ends = [np.percentile(line, (1, 99)) for line in finite if len(line)]
    if not ends:
        return
    low, high = np.min(ends), np.max(ends)
    room = (high - low) or max(abs(high), 1.0)
    bottom, top = axis.get_ylim()
    if bottom < low - room or top > high + room:
        axis.set_ylabel(f"{label}\n(spread cut off)")
    axis.set_ylim(max(bottom, low - room), min(top, high + room))
