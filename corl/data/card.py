"""What is in a dataset, in a few lines: the card, a picture, a table of all tasks, an export.

    python -m corl.data.card hopper-medium-v2 --plot returns.png
    python -m corl.data.card --all
    python -m corl.data.card hopper-medium-v2 --export d4rl hopper.hdf5
    python -m corl.data.card --report results/datasets.md

The first prints the card of a dataset: its source, sizes and returns beside D4RL's published ones.
The second says for every task where its data would come from. The third writes a dataset in
another format. The last makes every stand-in and compares it with what D4RL published.
"""

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from corl import arguments, files, tasks
from corl.data import minari, published, row_order, schema, sources
from corl.standin import policies

FORMATS = ("d4rl", "minari")  # what --export writes
INTERRUPTED = "interrupted; what is complete is kept, repeat the command to go on"


def card(dataset: sources.Dataset) -> str:
    """A dataset in a few lines of text, its returns beside D4RL's published ones."""
    task, facts, stats = dataset.task, dataset.provenance, dataset.statistics
    ends = f"{stats['terminals']} terminals, {stats['timeouts']} time-outs"
    if stats["unfinished_rows"]:
        ends += f"; last episode unfinished ({stats['unfinished_rows']} rows)"
    lines = [
        ("dataset", task.name),
        ("data", facts["label"]),
        ("source", facts["source"]),
        ("path", facts["path"]),
        ("sha256", facts["sha256"]),
        ("rows", f"{facts['rows']} transitions from {facts['rows_raw']} rows"),
        ("order", _order(facts)),
        ("episodes", f"{stats['episodes']} complete; {ends}"),
        ("length", _four(stats["length"], "steps", 0)),
        ("return", _four(stats["return"], "raw", 2)),
        *(
            [("score", _score(task, stats["return"]))]
            if task.ref_min is not None
            else []
        ),
        *_published(task),
        ("actions", f"{stats['action_min']:.6f} … {stats['action_max']:.6f}"),
    ]
    if "collected" in facts:
        made = facts["collected"]
        lines += [(name, made.get(name, "?")) for name in ("seed", "policies")]
    versions = {**facts, **facts.get("collected", {})}.items()
    named = [f"{k[:-8]} {v}" for k, v in versions if k.endswith("_version")]
    lines.append(("versions", ", ".join(named)))
    if "warning" in facts:
        lines.append(("warning", facts["warning"]))
    return "\n".join(f"{name:<9} {text}".rstrip() for name, text in lines)


def _order(facts: dict[str, Any]) -> str:
    """The card's line on the order of the rows."""
    return row_order.RowOrder(facts["order"], facts["seams"]).describe()


def _score(task: tasks.Task, summary: dict[str, float | None]) -> str:
    """The card's line of normalized scores, from the summary of raw returns."""
    if task.robot == "antmaze":
        # Evaluations end at the goal, these episodes go on: their return is no success rate.
        return "none: the rewards of one episode are added up"
    return _four(_scores(task, summary), "normalized", 1)


def _published(task: tasks.Task) -> list[tuple[str, str]]:
    """The card's lines of D4RL's own returns, none where they are not published."""
    returns = published.returns(task)
    if returns is None:
        return []
    names = ("mean", "std", "min", "max")
    theirs: dict[str, float | None] = dict(zip(names, returns, strict=True))
    return [
        ("D4RL's", _four(theirs, "raw, published for D4RL's own file", 2)),
        ("", _four(_scores(task, theirs), "normalized", 1)),
    ]


def _scores(
    task: tasks.Task, summary: dict[str, float | None]
) -> dict[str, float | None]:
    """A summary of raw returns as normalized scores."""
    if summary["mean"] is None:
        return summary
    scores = {k: float(task.normalized_score(v)) for k, v in summary.items()}
    # A width is scaled, not shifted.
    return {**scores, "std": scores["std"] - float(task.normalized_score(0.0))}


def _four(summary: dict[str, float | None], unit: str, digits: int) -> str:
    """Mean, std, min and max in one line."""
    if summary["mean"] is None:
        return "no complete episode"
    mean, std, low, high = (f"{summary[k]:.{digits}f}" for k in summary)
    return f"{mean} ± {std} ({low} … {high}) {unit}"


def plot_returns(dataset: sources.Dataset, out: Path) -> None:
    """Histogram of the complete episodes' raw returns; D4RL's mean and width beside it.

    Raises:
        ValueError: no complete episode, or a type of picture that nobody can draw.
        RuntimeError: no room or no right to write.
    """
    # matplotlib is slow to import.
    from matplotlib.figure import Figure

    if not len(dataset.returns):
        raise ValueError(f"{dataset.task.name}: no complete episode to plot")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    label = f"{len(dataset.returns)} episodes, {dataset.provenance['label']}"
    axes.hist(dataset.returns, bins=50, color="tab:blue", label=label)
    mean = dataset.returns.mean()
    axes.axvline(mean, color="black", label=f"their mean, {mean:.4g}")
    theirs = published.returns(dataset.task)
    if theirs is not None:
        center, width = theirs[:2]
        axes.axvline(center, color="tab:orange", label=f"D4RL's mean, {center:.4g}")
        low, high = center - width, center + width
        style: dict[str, Any] = {"color": "tab:orange", "alpha": 0.2, "zorder": 0}
        axes.axvspan(low, high, **style, label="D4RL's mean ± 1 std")
    axes.set_xlabel("return of an episode (raw)")
    axes.set_ylabel("episodes")
    axes.set_title(dataset.task.name)
    figure.legend(loc="outside lower center", fontsize=7)
    form = out.suffix.removeprefix(".") or "png"
    with files.naming_errors(out), files.replacing(out) as file:
        figure.savefig(file, dpi=150, format=form)


def overview(cache_dir: Path | str | None = None) -> str:
    """A table of every task: where its data would come from, rows, D4RL's return.

    Looks at names and folders only; nothing is loaded, downloaded or collected, so it
    cannot know whether D4RL's server would answer before a stand-in is taken.
    """
    lines = [("task", "source", "rows", "D4RL's return")]
    for task in map(tasks.task, tasks.task_names()):
        returns = published.returns(task)
        figures = "{:.2f} ± {:.2f}".format(*returns) if returns else "not known"
        lines.append((task.name, *_would_come_from(task, cache_dir), figures))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    rows = [
        "  ".join(
            (text.rjust if i == 2 else text.ljust)(widths[i])
            for i, text in enumerate(line)
        ).rstrip()
        for line in lines
    ]
    if server := published.server():
        rows.append(f"Before a stand-in is taken, {server} is asked for D4RL's file.")
    return "\n".join(rows)


def _would_come_from(task: tasks.Task, cache_dir: Path | str | None) -> tuple[str, str]:
    """Source and rows of a task, as text."""
    path = None
    with suppress(sources.NotFound):
        path = sources.in_d4rl_folder(task)
    if path is not None:
        try:
            return f"{path}", str(schema.count_rows(path))
        except ValueError as error:
            return f"{path}: unreadable ({error})", "-"
    try:
        found = sources.stand_in_path(task, cache_dir)
    except policies.NotCollectable:
        return "D4RL's server, if it answers, or --path", str(published.rows(task))
    rows = str(policies.default_rows(task))
    if found.exists():
        return f"self-collected, {found}", rows
    return "self-collected (not yet made)", rows


def export(dataset: sources.Dataset, form: str, target: str) -> None:
    """Write all raw rows as D4RL's HDF5 file (`d4rl`) or a local Minari dataset (`minari`).

    Args:
        form: one of FORMATS.
        target: the file to write, or the Minari id.

    Raises:
        ValueError, RuntimeError: as of `minari.to_d4rl` and `minari.to_minari`.
    """
    task, facts = dataset.task, dataset.provenance
    if dataset.shuffled:
        raise ValueError(
            f"{facts['path']}: the rows are shuffled; readers of an exported file would take "
            "each row for the next one of the row before"
        )
    source = "minari" if facts["source"] == "minari" else "file"
    # Read again, because q-learning arrays lack some of the rows.
    raw, _ = sources.find(task, source, facts["path"])
    raw["actions"] = task.to_env(raw["actions"]).astype(np.float32)
    if form == "minari":
        bounds = schema.episode_bounds(raw, task)
        if bounds[-1] < len(raw["rewards"]):
            bounds = np.append(bounds, len(raw["rewards"]))
        about = f"{task.name}: {facts['label']}, sha256 {facts['sha256']}"
        print(f"wrote {minari.to_minari(raw, bounds, task, target, about)}")
    else:
        original = None if source == "minari" else Path(facts["path"])
        about = f"{facts['label']}, {facts['path']}, sha256 {facts['sha256']}"
        print(f"wrote {minari.to_d4rl(raw, about, Path(target), original)}")


def main() -> None:
    """The command line that the top of this file shows."""
    args = _parse_arguments()
    try:
        if args.all:
            print(overview(args.cache_dir))
        elif args.report:
            # Imported here, because it needs the collector and a card does not.
            from corl.data import standin_report

            standin_report.report(args.report, args.cache_dir, args.rows)
        else:
            _one_task(args)
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        raise SystemExit(130) from None


def _parse_arguments() -> argparse.Namespace:
    parser = arguments.Parser(description="Find a dataset and print its card.")
    parser.add_argument(
        "task", nargs="?", help="D4RL name, as hopper-medium-v2, or gymnasium id"
    )
    parser.add_argument(
        "--horizon",
        type=arguments.number(int, "[2, 1e9]"),
        help="of a gymnasium id: time limit in steps",
    )
    parser.add_argument("--source", choices=sources.SOURCES, default="auto")
    parser.add_argument("--path", help="HDF5 file, or minari:ID")
    parser.add_argument(
        "--cache_dir", type=arguments.path, help="where stand-ins are kept"
    )
    parser.add_argument(
        "--rows",
        type=arguments.number(int, "[2, 1e9]"),
        help="size of a stand-in to collect",
    )
    parser.add_argument(
        "--plot", type=arguments.path, help="write a histogram of returns (PNG)"
    )
    parser.add_argument(
        "--export",
        nargs=2,
        metavar=("FORMAT", "TARGET"),
        help="d4rl FILE, or minari ID: write the dataset in that format",
    )
    parser.add_argument("--all", action="store_true", help="a line for every task")
    parser.add_argument(
        "--report", type=arguments.path, help="compare all stand-ins with D4RL's"
    )
    args = parser.parse_args()
    if (args.task is not None) + args.all + (args.report is not None) != 1:
        parser.error("give one task, or --all, or --report FILE")
    if args.task is None and (args.plot or args.export or args.path):
        parser.error("--plot, --export and --path belong to one task")
    if args.export and args.export[0] not in FORMATS:
        parser.error(
            f"--export {args.export[0]}: the formats are {' and '.join(FORMATS)}"
        )
    return args


def _one_task(args: argparse.Namespace) -> None:
    task = args.task
    if tasks.is_gymnasium_id(task):
        # gymnasium is slow to import, and D4RL's names do not need it.
        from corl import own_envs

        task = own_envs.task(task, args.horizon)
    found = sources.resolve(task, args.source, args.path, args.cache_dir, args.rows)
    print(card(found))
    if args.plot:
        plot_returns(found, args.plot)
        print(f"wrote {args.plot}")
    if args.export:
        export(found, *args.export)


if __name__ == "__main__":
    main()
