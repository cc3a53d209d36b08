"""The tables of a folder of stored numbers: its README.md."""

import functools
import json
import math
import statistics
from pathlib import Path

from benchmarks.exchange_accuracy import figures
from benchmarks.exchange_accuracy.settings import (
    CONTROLS,
    RATIO_RULES,
    RULES,
    SHARES,
)
from benchmarks.exchange_accuracy.store import Store, arrow


def write(folder: Path) -> None:
    """Write README.md and the figures of a folder of stored numbers."""
    store = Store(folder)
    (folder / "README.md").write_text(page(store))
    figures.draw_all(store, folder)


def page(store: Store) -> str:
    """The text of README.md: where the numbers come from, then every table."""
    sections = [heading(store)]
    for section in (
        auc_tables,
        exchange_tables,
        share_table,
        identical_table,
        inverted_table,
        calibration_table,
        sensitivity_table,
        cost_table,
    ):
        store.spread = 0.0
        text = section(store)
        if len(store.seeds) > 1 and not math.isnan(store.spread):
            text += (
                "\nLargest range over seeds of any number here, of single pairs before they are "
                f"averaged: {store.spread:.3f}.\n"
            )
        sections.append(text)
    return "\n".join(sections)


def table(head: list[str], rows: list[list], digits: int = 3) -> str:
    """A markdown table; nan is a dash."""

    def text(cell) -> str:
        if isinstance(cell, float):
            return "\u2013" if math.isnan(cell) else f"{cell:.{digits}f}"
        return str(cell)

    lines = [head, ["---"] * len(head), *([text(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def heading(store: Store) -> str:
    """Where the numbers come from: seeds, command, commit, machine, versions, data, sizes."""
    first = store.seeds[0]
    settings = {k: v for k, v in first["settings"].items() if k != "seed"}
    numbers = ", ".join(str(s["settings"]["seed"]) for s in store.seeds)
    commits = ", ".join(sorted({s["commit"] for s in store.seeds}))
    minutes = max(s["processor_seconds"] for s in store.seeds) / 60
    machine = first["machine"]
    lines = [
        "# Exchange accuracy: the tables",
        "",
        "What was found, in one table and a few sentences: "
        "[results](../README.md#does-the-exchange-move-the-right-rows). The section AUC below "
        "says which scores tell the rows of two policies apart, the section on the exchange "
        "which rules make the halves purer, the last one what a score costs.",
        "",
        "Written by `python -m benchmarks.exchange_accuracy --report` from the `seed_N.json`"
        " files in this folder. What the numbers mean: docs/exchange_accuracy.md.",
        "",
        f"- seeds {numbers}; command of each, at the commit below: `{first['command']}` "
        "with its seed",
        f"- commit {commits}",
        f"- {machine['processor']}, {first['threads']} thread, at most {minutes:.0f} "
        "processor minutes a seed",
        "- versions: " + ", ".join(f"{k} {v}" for k, v in first["versions"].items()),
        f"- data: self-collected {settings['robot']} rows (not D4RL data), "
        + ", ".join(
            f"{s['task']} {s['rows']} rows (mean return {s['episode_returns'][1]:.0f})"
            for s in first["sources"]
        ),
        f"- settings: {json.dumps(settings)}",
        "",
    ]
    return "\n".join(lines)


def auc_tables(store: Store) -> str:
    """AUC of every score and pair, for both kinds of rows."""
    text = (
        "## AUC\n\nChance that a row of the online policy scores above one of the behavior; "
        "0.5 says nothing.\n"
    )
    for setting, title in (
        ("rollout", "Rows as they were rolled out (states differ too)"),
        ("shared states", "Both policies in the same states: the oracle ratio is Bayes"),
    ):
        share = 0.0 if setting == "rollout" else 0.3
        rows = []
        for score in store.scores:
            where = {"setting": setting, "score": score, "share": share}
            values = [
                store.mean("auc", "auc", behavior=b, online=o, **where)
                for b, o in store.pairs
            ]
            rows.append([score, *values, statistics.mean(values)])
        head = ["score", *map(arrow, store.pairs), "mean"]
        text += f"\n### {title}\n\n" + table(head, rows)
    return text


def exchange_tables(store: Store) -> str:
    """What every score and rule exchanges: over all pairs, and for the main pair."""
    main = {"behavior": store.main_pair[0], "online": store.main_pair[1]}
    text = "## The exchange at 30 % misplaced rows\n\n"
    text += (
        "Pairs M of 128, precision and recall of the moved rows, purity of the halves after "
        "(before: 0.70; a swap changes both purities alike, so one number tells both).\n"
    )
    for title, mean in (
        ("Mean over the pairs of different policies", store.off_diagonal),
        (arrow(store.main_pair), functools.partial(store.mean, **main)),
    ):
        rows = []
        for score in store.scores:
            for rule in (*RULES[1:], *CONTROLS, *RATIO_RULES, "known share"):
                where = {"setting": "rollout", "score": score, "rule": rule}
                columns = "exchanged", "precision", "recall", "purity_off"
                row = [mean("exchange", c, share=0.3, **where) for c in columns]
                if not math.isnan(row[0]):
                    rows.append([score, rule, f"{row[0]:.1f}", *row[1:]])
        text += f"\n### {title}\n\n"
        head = ["score", "rule", "M", "precision", "recall", "purity after"]
        text += table(head, rows)
    return text


def share_table(store: Store) -> str:
    """Purity after the exchange over the misplaced share."""
    text = (
        "## Purity after the exchange by misplaced share\n\n"
        "Threshold rule unless named; mean over the pairs of different policies. Without an "
        "exchange the purity is one minus the share.\n\n"
    )
    shares = [s for s in SHARES if s <= 0.5]
    rows = []
    for score, rule in curves(store):
        where = {"setting": "rollout", "score": score, "rule": rule}
        purities = [
            store.off_diagonal("exchange", "purity_off", share=s, **where)
            for s in shares
        ]
        rows.append([score if rule == "threshold" else f"{score}, {rule}", *purities])
    return text + table(["score", *(f"{s:.0%}" for s in shares)], rows)


def curves(store: Store) -> list[tuple[str, str]]:
    """Scores and rules that the table follows over the misplaced share."""
    return [
        *((score, "threshold") for score in store.scores),
        ("policy ratio", "posterior"),
        ("policy ratio", "em"),
        ("oracle ratio", "em"),
        ("policy ratio", "estimated share"),
        ("oracle ratio", "estimated share"),
        ("oracle ratio", "known share"),
    ]


def identical_table(store: Store) -> str:
    """What is exchanged where nothing should be."""
    text = (
        "## Identical policies\n\nBoth halves come from one policy: the right answer is to "
        "exchange nothing. Pairs M of 128, mean over the policies.\n\n"
    )
    rules = (*RULES[1:], *CONTROLS, *RATIO_RULES)
    rows = []
    for score in store.scores:
        where = {"setting": "rollout", "score": score, "share": 0.0}
        row = []
        for rule in rules:
            found = [
                store.mean(
                    "exchange", "exchanged", behavior=x, online=x, rule=rule, **where
                )
                for x in store.levels
            ]
            row.append(statistics.mean(found))
        rows.append([score, *row])
    return text + table(["score", *rules], rows, digits=1)


def inverted_table(store: Store) -> str:
    """How often the two halves seem to have changed places, and what is exchanged then."""
    text = (
        "## Inverted batches\n\nShare of batches whose online half scores no higher than its "
        "offline half. With 0 % misplaced an inversion is an error of the score; with 90 % "
        "misplaced it is the truth. `skip_inverted` exchanges nothing in those batches. "
        "Purity is that after the threshold rule; mean over the pairs of different policies.\n\n"
    )
    rows = []
    for score in store.scores:
        row = [score]
        for share in (0.0, 0.9):
            where = {"setting": "rollout", "score": score, "share": share}
            for column in ("inverted", "exchanged", "purity_off"):
                row.append(
                    store.off_diagonal("exchange", column, rule="threshold", **where)
                )
        rows.append(row)
    head = ["score"]
    for share in ("0 %", "90 %"):
        head += [f"inverted, {share}", f"M, {share}", f"purity after, {share}"]
    return text + table(head, rows)


def calibration_table(store: Store) -> str:
    """Calibration error of both posteriors."""
    text = (
        "## Calibration of the posterior\n\nExpected calibration error (15 bins) of "
        "P(behavior | d) against who acted; mean over the pairs of different policies. The two "
        "Gaussians are those that the exchange fits to the halves as drawn; the logistic of a "
        "log-ratio needs no fit.\n\n"
    )
    shares = (0.0, 0.3, 0.5)
    rows = []
    for score in store.scores:
        for name in ("two Gaussians", "logistic of the ratio"):
            where = {"setting": "rollout", "score": score, "posterior": name}
            row = [
                store.off_diagonal("calibration", "ece", share=s, **where)
                for s in shares
            ]
            if not math.isnan(row[0]):
                rows.append([score, name, *row])
    return text + table(["score", "posterior", *(f"{s:.0%}" for s in shares)], rows)


def sensitivity_table(store: Store) -> str:
    """What it changes that models have seen the scored rows, or misplaced ones."""
    b, o = store.main_pair
    text = (
        f"## What the models have seen ({arrow((b, o))}, 30 % misplaced, threshold rule)\n\n"
        "Held out: models fitted on clean buffers, other rows are scored. Fitted rows: the "
        "scored rows were fitted. Contaminated fits: 30 % of each buffer that the models are "
        "fitted on come from the other policy.\n\n"
    )
    settings = {
        "held out": "rollout",
        "fitted rows": "fitted rows",
        "contaminated fits": "contaminated fits",
    }
    rows = []
    for score in store.scores:
        row = [score]
        for setting in settings.values():
            where = {"setting": setting, "behavior": b, "online": o, "score": score}
            row.append(store.mean("auc", "auc", share=0.3, **where))
            row.append(
                store.mean(
                    "exchange", "purity_off", share=0.3, rule="threshold", **where
                )
            )
        rows.append(row)
    head = ["score"]
    for name in settings:
        head += [f"AUC, {name}", f"purity, {name}"]
    return text + table(head, rows)


def cost_table(store: Store) -> str:
    """Network evaluations and processor time of every score."""
    text = (
        "## Cost\n\nProcessor milliseconds per 1000 rows on one core, references included "
        "(median of five calls on 256 rows, mean over seeds), with the small networks of this "
        "benchmark; network evaluations per row do not depend on them.\n\n"
    )
    rows = []
    for score in store.scores:
        ms = 1000 * store.mean("cost", "seconds_per_1000", score=score)
        evaluations = int(store.mean("cost", "evaluations", score=score))
        rows.append([score, evaluations, f"{ms:.1f}"])
    # The spread of times says nothing about accuracy.
    store.spread = math.nan
    return text + table(["score", "evaluations", "ms"], rows)
