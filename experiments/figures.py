"""Figures of the report: numbers in, bytes of a PNG file out, the same bytes for the same numbers.

Colors are Okabe and Ito's, which the color-blind can tell apart; beyond seven curves the line style
tells them apart too.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
GREY = "#666666"
COLUMNS = 3  # panels side by side
DPI = 130


class Curve(NamedTuple):
    """x (T,), y (T,) and its band; nan in low and high: no band."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Difference(NamedTuple):
    """A mean difference, its interval (nan: none), and the differences of single runs (R,)."""

    value: float
    low: float
    high: float
    runs: np.ndarray


def curve_panels(
    panels: Mapping[str, Mapping[str, Curve]],
    styles: Sequence[str],
    x_label: str,
    y_label: str,
    caption: str,
    from_zero: bool = False,
) -> bytes:
    """Curves with bands, a panel per task, one legend; PNG.

    Args:
        panels: title -> name of the curve -> curve.
        styles: all names in the order of their colors, so that several figures agree.
        caption: what the band is, and of what data; under the panels.
        from_zero: the y axis begins at 0.
    """
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    shown = [n for n in styles if any(n in curves for curves in panels.values())]
    width = 3.4 * columns + 0.4 if columns > 1 else 5.6
    # As many entries side by side as fit if all were as long as the longest; inches at 9 points.
    entry = 0.65 + 0.075 * max(len(name) for name in shown)
    legend_columns = max(1, min(len(shown), int(width / entry)))
    extra = 0.25 * -(-len(shown) // legend_columns) + 0.5

    def draw(figure: Any) -> None:
        from matplotlib.ticker import EngFormatter

        axes = figure.subplots(lines, columns, squeeze=False).flat
        for i, (title, curves) in enumerate(panels.items()):
            axis = axes[i]
            _tidy(axis)
            axis.set_title(title, fontsize=10)
            for name in shown:
                if name in curves:
                    _draw_curve(axis, curves[name], name, styles.index(name))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            if from_zero:
                axis.set_ylim(bottom=0)
            if i + columns >= len(panels):  # nothing below it
                axis.set_xlabel(x_label, fontsize=9)
        for axis in list(axes)[len(panels) :]:
            axis.set_visible(False)
        _caption(figure, caption)
        figure.supylabel(y_label, fontsize=10)
        handles = {}
        for axis in figure.axes:
            for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(name, handle)
        figure.legend(
            [handles[name] for name in shown],
            shown,
            loc="outside upper center",
            ncols=legend_columns,
            frameon=False,
            fontsize=9,
        )

    return render((width, 2.6 * lines + extra), draw)


def difference_panels(
    panels: Mapping[str, Mapping[str, Difference]],
    styles: Sequence[str],
    x_label: str,
    caption: str,
) -> bytes:
    """Differences with their intervals, a line per name, a panel per measure; PNG.

    Args:
        panels: title -> name -> difference; every panel has the same names.
        styles: all names in the order of their colors; lines from top to bottom.
        caption: what the intervals and dots are, and of what data; under the panels.
    """
    shown = [n for n in styles if any(n in found for found in panels.values())]
    places = np.arange(len(shown))[::-1]
    width = 2.6 * len(panels) + 0.4 + 0.075 * max(len(name) for name in shown)

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (title, found) in zip(axes, panels.items(), strict=True):
            _tidy(axis)
            axis.set_title(title, fontsize=10)
            axis.axvline(0.0, color="#000000", linewidth=1.0)
            for place, name in zip(places, shown, strict=True):
                color = COLORS[styles.index(name) % len(COLORS)]
                value, low, high, runs = found[name]
                axis.plot([low, high], [place, place], color=color, linewidth=2.0)
                axis.plot(value, place, "o", color=color, ms=6)
                below = np.full(len(runs), place - 0.28)
                axis.plot(runs, below, "|", color=GREY, ms=5, zorder=3)
            axis.set_yticks(places, shown, fontsize=9)
            axis.set_ylim(-0.6, len(shown) - 0.4)
            axis.set_xlabel(x_label, fontsize=9)
        _caption(figure, caption)

    return render((width, 0.42 * len(shown) + 1.25), draw)


def _caption(figure: Any, text: str) -> None:
    figure.supxlabel(text, x=0.995, ha="right", color=GREY, fontsize=7.5)


def _draw_curve(axis: Any, curve: Curve, name: str, number: int) -> None:
    color = COLORS[number % len(COLORS)]
    style = STYLES[number // len(COLORS) % len(STYLES)]
    if np.isfinite(curve.low).any():
        axis.fill_between(
            curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0
        )
    marker = "o" if len(curve.x) <= 15 else None
    axis.plot(
        curve.x,
        curve.y,
        style,
        color=color,
        linewidth=1.4,
        marker=marker,
        ms=3,
        label=name,
    )


def snapshot_panels(snapshot: Mapping[str, Any], title: str, caption: str) -> bytes:
    """The paper's Fig. 1 of one run: action errors, projection, alignment scores; PNG."""
    scores = snapshot["scores"]
    count = 3 if scores else 2

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, count)
        for axis in axes:
            _tidy(axis)
        figure.suptitle(title, x=0.005, ha="left", fontsize=10)
        error = snapshot["action_error"]
        _draw_histograms(axes[0], error)
        axes[0].set_xlabel(
            "squared difference, policy's action\nand row's (lower 97.5 % of rows)"
        )
        axes[0].set_ylabel("rows")
        for half, color in (("offline", COLORS[0]), ("online", COLORS[1])):
            mean = error[f"{half}_mean"]
            axes[0].axvline(mean, color=color, linestyle=":", linewidth=1.4)
        axes[0].set_title("action error (dotted: means)", fontsize=9)
        _draw_projection(axes[1], snapshot["projection"])
        if scores:
            _draw_scores(axes[2], scores)
        figure.legend(
            *axes[0].get_legend_handles_labels(),
            loc="outside upper right",
            ncols=2,
            frameon=False,
            fontsize=9,
        )
        _caption(figure, caption)

    return render((3.6 * count, 3.8), draw)


def _draw_histograms(axis: Any, numbers: Mapping[str, Any]) -> None:
    edges = np.array(numbers["edges"])
    for half, color in (("offline", COLORS[0]), ("online", COLORS[1])):
        counts = np.array(numbers[half], dtype=float)
        axis.stairs(
            counts, edges, fill=True, color=color, alpha=0.35, label=f"{half} rows"
        )
        axis.stairs(counts, edges, color=color, linewidth=1.2)


def _draw_scores(axis: Any, scores: Mapping[str, Any]) -> None:
    _draw_histograms(axis, scores)
    axis.set_title(
        f"{scores['kind']}: P(online above offline) = {scores['auc']:.2f}", fontsize=9
    )
    axis.axvline(
        scores["separation_point"], color="#000000", linestyle="--", linewidth=1.4
    )
    axis.set_xlabel("alignment score (central 95 % of rows)\ndashed: separation point τ")


def _draw_projection(axis: Any, projection: Mapping[str, Any]) -> None:
    # Interleaved, so that neither cloud hides the other.
    points = np.stack([projection["offline"], projection["online"]], 1).reshape(-1, 2)
    colors = np.tile([COLORS[0], COLORS[1]], len(points) // 2)
    axis.scatter(*points.T, c=colors, s=6, alpha=0.6, linewidths=0)
    first, second = (100.0 * v for v in projection["variance"])
    axis.set_xlabel(f"component 1 ({first:.0f} % of the variance)")
    axis.set_ylabel(f"component 2 ({second:.0f} %)")
    axis.set_title("(state, action), principal components", fontsize=9)


def _tidy(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def render(size: tuple[float, float], draw: Callable[[Any], None]) -> bytes:
    """What `draw` draws on a figure, as PNG bytes.

    Neither a user's matplotlibrc nor the version of matplotlib leaves a trace.

    Args:
        size: width and height in inches.
        draw: gets the empty matplotlib figure.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()
