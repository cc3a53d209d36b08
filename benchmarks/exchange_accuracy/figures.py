"""The figures of a folder of stored numbers."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.exchange_accuracy.settings import SHARES
from benchmarks.exchange_accuracy.store import Store, arrow

# The colors of Okabe and Ito, which color-blind readers can tell apart.
COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
MARKERS = "osD^vPX"


def draw_all(store: Store, folder: Path) -> None:
    """Write every figure into the folder."""
    draw_auc(store, folder / "auc.png")
    draw_purity(store, folder / "purity.png")
    draw_reliability(store, folder / "reliability.png")
    draw_cost(store, folder / "cost.png")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure and its axes (rows, columns), with a grid and without a frame."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_auc(store: Store, path: Path) -> None:
    """AUC of every score, a mark for each pair of policies."""
    figure, ((axis,),) = new_figure(8, 6.5)
    for i, (b, o) in enumerate(store.pairs):
        where = {"setting": "rollout", "share": 0.0, "behavior": b, "online": o}
        values = [store.mean("auc", "auc", score=s, **where) for s in store.scores]
        style = {"color": COLORS[i % 7], "marker": MARKERS[i % 7], "linestyle": "none"}
        axis.plot(values, range(len(values)), label=arrow((b, o)), alpha=0.85, **style)
    axis.axvline(0.5, color="#666666", linewidth=1, linestyle=":")
    axis.set_yticks(range(len(store.scores)), store.scores)
    axis.invert_yaxis()
    axis.set_xlabel("AUC: online rows against behavior rows (behavior → online)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=150)


def draw_purity(store: Store, path: Path) -> None:
    """Purity after the exchange over the misplaced share, a panel for each pair."""
    shares = [s for s in SHARES if s <= 0.5]
    lines = [
        (store.scores[0], "threshold"),
        ("reference, unguided", "threshold"),
        ("mixture likelihood", "threshold"),
        ("policy ratio", "threshold"),
        ("policy ratio", "estimated share"),
        ("oracle ratio", "known share"),
    ]
    columns = 3 if len(store.pairs) > 2 else 2
    rows = math.ceil(len(store.pairs) / columns)
    options = {"sharex": True, "sharey": True}
    figure, axes = new_figure(10, 3.2 * rows + 0.8, rows, columns, **options)
    for axis, (b, o) in zip(axes.flat, store.pairs, strict=False):
        x = [100 * s for s in shares]
        label = "no exchange"
        axis.plot(x, [1 - s for s in shares], color="#666666", ls=":", label=label)
        for i, (score, rule) in enumerate(lines):
            where = {"setting": "rollout", "behavior": b, "online": o, "score": score}
            y = [
                store.mean("exchange", "purity_off", rule=rule, share=s, **where)
                for s in shares
            ]
            style = {"color": COLORS[i], "marker": MARKERS[i], "markersize": 4}
            axis.plot(x, y, label=f"{score}, {rule}", **style)
        axis.set_title(arrow((b, o)), fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("misplaced rows in each half (%)")
    for axis in axes[:, 0]:
        axis.set_ylabel("purity after the exchange")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=150)


def draw_reliability(store: Store, path: Path) -> None:
    """Stated probability against the share that is true; the main pair of the first seed."""
    b, o = store.main_pair
    lines = [
        (store.scores[0], "two Gaussians"),
        ("mixture likelihood", "two Gaussians"),
        ("policy ratio", "two Gaussians"),
        ("policy ratio", "logistic of the ratio"),
        ("oracle ratio", "logistic of the ratio"),
    ]
    figure, ((axis,),) = new_figure(6.5, 6.5)
    axis.plot([0, 1], [0, 1], color="#666666", ls=":", label="calibrated")
    seed = store.seeds[0]["settings"]["seed"]
    for i, (score, posterior_name) in enumerate(lines):
        where = {"behavior": b, "online": o, "score": score, "share": 0.3}
        found = store.values("reliability", "bins", posterior=posterior_name, **where)
        bins = np.array([bin for bin in dict(found)[seed] if bin[2] >= 0.005])
        style = {"color": COLORS[i], "marker": MARKERS[i], "markersize": 5}
        axis.plot(bins[:, 0], bins[:, 1], label=f"{score}, {posterior_name}", **style)
    axis.set_xlabel("stated P(behavior | d)")
    axis.set_ylabel("share of rows that the behavior made")
    axis.set_title(
        f"{arrow((b, o))}, 30 % misplaced, seed {seed}\nbins of at least 0.5 % of the rows",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_cost(store: Store, path: Path) -> None:
    """Purity after the exchange over the cost of a score."""
    figure, ((axis,),) = new_figure(8, 5)
    oracles = [s for s in store.scores if s.startswith("oracle")]
    for i, score in enumerate(s for s in store.scores if s not in oracles):
        x = 1000 * store.mean("cost", "seconds_per_1000", score=score)
        where = {"setting": "rollout", "share": 0.3, "rule": "threshold"}
        y = store.off_diagonal("exchange", "purity_off", score=score, **where)
        style = {"color": COLORS[i % 7], "marker": MARKERS[i // 7]}
        axis.plot(x, y, linestyle="none", label=score, **style)
    best = {"setting": "rollout", "share": 0.3, "score": "oracle ratio"}
    y = store.off_diagonal("exchange", "purity_off", rule="known share", **best)
    axis.axhline(y, color="#000000", linewidth=1, label="oracle ratio, known share")
    axis.axhline(0.7, color="#666666", linewidth=1, ls=":", label="no exchange")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("processor milliseconds per 1000 rows (small networks)")
    axis.set_ylabel("purity after the exchange\n(30 % misplaced, threshold rule)")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
