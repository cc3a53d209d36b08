"""TODO corl.data.card"""

import argparse
from pathlib import Path

import h5py
import numpy as np

from corl import files, tasks
from corl.data import minari, schema, sources
from corl.data.published import D4RL_RETURNS, D4RL_ROWS, server
from corl.machine import describe, git_commit, tidy_path
from corl.standin import collect, policies

FORMATS = ("d4rl", "minari")  # of --export


def card(dataset: sources.Dataset) -> str:
    """A dataset in a few lines of text, its returns beside D4RL's published ones."""
    task, facts, stats = dataset.task, dataset.provenance, dataset.statistics
    ends = f"{stats['terminals']} terminals, {stats['timeouts']} time-outs"
    if stats["unfinished_rows"]:
        ends += f"; last episode unfinished ({stats['unfinished_rows']} rows)"
    lines = [
        ("dataset", task),
        ("data", facts["label"]),
        ("source", facts["source"]),
        ("path", facts["path"]),
        ("sha256", facts["sha256"]),
        ("rows", f"{facts['rows']} transitions from {facts['rows_raw']} rows"),
        ("episodes", f"{stats['episodes']} complete; {ends}"),
        ("length", _four(stats["length"], "steps", 0)),
        ("return", _four(stats["return"], "raw", 2)),
        ("score", _four(_scores(task, stats["return"]), "normalized", 1)),
    ]
    if tasks.task(task).robot == "antmaze":
        # Evaluations end at the goal, these episodes go on: their return is no success rate.
        lines[-1] = ("score", "none: the rewards of one episode are added up")
    published = D4RL_RETURNS.get(task.removesuffix("-v2"))
    if published is not None:
        names = ("mean", "std", "min", "max")
        theirs = dict(zip(names, published, strict=True))
        lines += [
            ("D4RL's", _four(theirs, "raw, published for D4RL's own file", 2)),
            ("", _four(_scores(task, theirs), "normalized", 1)),
        ]
    lines.append(("actions", f"{stats['action_min']:.6f} … {stats['action_max']:.6f}"))
    if "collected" in facts:
        made = facts["collected"]
        lines.append(("seed", made["seed"]))
        lines.append(("policies", made["policies"]))
    versions = {**facts, **facts.get("collected", {})}.items()
    named = [f"{k[:-8]} {v}" for k, v in versions if k.endswith("_version")]
    lines.append(("versions", ", ".join(named)))
    if "warning" in facts:
        lines.append(("warning", facts["warning"]))
    return "\n".join(f"{name:<9} {text}".rstrip() for name, text in lines)


def _scores(task: str, summary: dict[str, float | None]) -> dict[str, float | None]:
    if summary["mean"] is None:
        return summary
    scores = {k: float(tasks.normalized_score(task, v)) for k, v in summary.items()}
    zero = float(tasks.normalized_score(task, 0.0))
    return {**scores, "std": scores["std"] - zero}  # a width is scaled, not shifted


def _four(summary: dict[str, float | None], unit: str, digits: int) -> str:
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
    from matplotlib.figure import Figure  # slow to import

    if not len(dataset.returns):
        raise ValueError(f"{dataset.task}: no complete episode to plot")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    label = f"{len(dataset.returns)} episodes, {dataset.provenance['label']}"
    axes.hist(dataset.returns, bins=50, color="tab:blue", label=label)
    mean = dataset.returns.mean()
    axes.axvline(mean, color="black", label=f"their mean, {mean:.4g}")
    published = D4RL_RETURNS.get(dataset.task.removesuffix("-v2"))
    if published is not None:
        center, width = published[:2]
        axes.axvline(center, color="tab:orange", label=f"D4RL's mean, {center:.4g}")
        low, high = center - width, center + width
        style = {"color": "tab:orange", "alpha": 0.2, "zorder": 0}
        axes.axvspan(low, high, **style, label="D4RL's mean ± 1 std")
    axes.set_xlabel("return of an episode (raw)")
    axes.set_ylabel("episodes")
    axes.set_title(dataset.task)
    figure.legend(loc="outside lower center", fontsize=7)
    form = out.suffix.removeprefix(".") or "png"
    with files.writing(out) as part:
        figure.savefig(part, dpi=150, format=form)
        files.publish(part, out)


def overview(cache_dir: Path | str | None = None) -> str:
    """A table of every task: where its data would come from, rows, D4RL's return.

    Looks at names and folders only; nothing is loaded, downloaded or collected, so it
    cannot know whether D4RL's server would answer before a stand-in is taken.
    """
    lines = [("task", "source", "rows", "D4RL's return")]
    for task in tasks.task_names():
        published = D4RL_RETURNS.get(task.removesuffix("-v2"))
        figures = "{:.2f} ± {:.2f}".format(*published) if published else "not known"
        lines.append((task, *_would_come_from(task, cache_dir), figures))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    rows = [
        "  ".join(
            (text.rjust if i == 2 else text.ljust)(widths[i])
            for i, text in enumerate(line)
        ).rstrip()
        for line in lines
    ]
    if server():
        rows.append(f"Before a stand-in is taken, {server()} is asked for D4RL's file.")
    return "\n".join(rows)


def _would_come_from(task: str, cache_dir: Path | str | None) -> tuple[str, str]:
    """Source and rows of a task."""
    try:
        path = sources._in_d4rl_dir(task)
        with h5py.File(path) as file:
            return f"{path}", str(len(file["rewards"]))
    except sources._NotFound:
        pass
    except (OSError, KeyError, TypeError) as error:
        return f"{path}: unreadable ({error})", "-"
    try:
        rows = policies.default_rows(task)
        found = sources._stand_in_file(task, cache_dir, rows)
        if found.exists():
            return f"self-collected, {found}", str(rows)
        return "self-collected (not yet made)", str(rows)
    except policies.NotCollectable:
        return "D4RL's server, if it answers, or --path", str(
            D4RL_ROWS[task.removesuffix("-v2")]
        )


def report(out: Path, cache_dir: Path | str | None, rows: int | None) -> None:
    """Make every stand-in there can be, and write a table of them against D4RL's data.

    Raises:
        ValueError: `out` is a folder; else as of `resolve`.
        RuntimeError: no room or no right to write; else as of `resolve`.
    """
    pass  # GONE  # of it only the names of commit and machine

    if out.is_dir():
        raise ValueError(f"--report {out} is a folder; a file is needed")
    with files.writing(out) as part:  # a try, before the work is spent
        out.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    robots, mazes, missing = [], [], []
    for task in tasks.task_names():
        try:
            policies.fingerprint(task)
        except policies.NotCollectable:
            missing.append(task)
            continue
        dataset = sources.resolve(task, "self-collected", None, cache_dir, rows)
        if tasks.task(task).robot == "antmaze":
            mazes.append(_maze_row(dataset))
        else:
            robots.append(_robot_row(dataset))
    size = "" if rows is None else f" --rows {rows}"
    made = {k[:-8]: v for k, v in collect.versions().items()}
    machine = describe()
    lines = [
        "# Self-collected stand-ins beside D4RL's data",
        "",
        f"Command: `python -m corl.data.card --report {tidy_path(out)}{size}`, "
        f"commit {git_commit()}, {', '.join(f'{k} {v}' for k, v in made.items())}, "
        f"{machine['processor']}, {machine['cores']} cores.",
        "",
        "## Locomotion",
        "",
        "Returns of complete episodes, raw and D4RL-normalized. `within`: the stand-in's",
        "mean lies within D4RL's published mean ± 1 std; empty where D4RL's is not known.",
        "`docs/datasets.md` says which policies acted, and why `expert` is weaker.",
        "",
        "| task | rows | episodes | return, mean ± std (min … max) | normalized | "
        "D4RL's rows | D4RL's mean ± std | normalized | within | sha256 |",
        "|---" * 10 + "|",
        *robots,
        "",
        "## Antmaze",
        "",
        "Episodes go on at the goal, so a return counts rows at the goal that rewards are",
        "computed for and is no score. D4RL publishes no such figures. As in D4RL's data,",
        "the goals that medium-play's ants walk to are others than the evaluation's.",
        "",
        "| task | rows | episodes | rows at the goal per episode, mean ± std | "
        "episodes that get there | D4RL's rows | sha256 |",
        "|---" * 7 + "|",
        *mazes,
        "",
        f"No stand-in: {', '.join(missing) or 'none is missing'}.",
    ]
    with files.writing(out) as part:
        part.write_text("\n".join(lines) + "\n")
        files.publish(part, out)


def _robot_row(dataset: sources.Dataset) -> str:
    stats, task = dataset.statistics, dataset.task
    mine, published = stats["return"], D4RL_RETURNS.get(task.removesuffix("-v2"))
    own, own_score = "no complete episode", ""
    if mine["mean"] is not None:
        own = "{mean:.0f} ± {std:.0f} ({min:.0f} … {max:.0f})".format(**mine)
        own_score = f"{tasks.normalized_score(task, mine['mean']):.1f}"
    theirs, their_score, within = "not known", "", ""
    if published is not None:
        mean, std = published[:2]
        theirs = f"{mean:.0f} ± {std:.0f}"
        their_score = f"{tasks.normalized_score(task, mean):.1f}"
        if mine["mean"] is not None:
            within = "yes" if abs(mine["mean"] - mean) <= std else "**no**"
    return _table_row(dataset, [own, own_score], [theirs, their_score, within])


def _maze_row(dataset: sources.Dataset) -> str:
    own = ["no complete episode", ""]
    if len(dataset.returns):
        mean, std = dataset.returns.mean(), dataset.returns.std()
        own = [f"{mean:.0f} ± {std:.0f}", f"{(dataset.returns > 0).mean():.0%}"]
    return _table_row(dataset, own, [])


def _table_row(dataset: sources.Dataset, mine: list[str], theirs: list[str]) -> str:
    stats, task = dataset.statistics, dataset.task
    counts = [task, str(stats["rows"]), str(stats["episodes"])]
    published = [str(D4RL_ROWS[task.removesuffix("-v2")]), *theirs]
    digest = f"`{dataset.provenance['sha256'][:12]}`"
    return f"| {' | '.join([*counts, *mine, *published, digest])} |"


def export(dataset: sources.Dataset, form: str, target: str) -> None:
    """Write all raw rows as D4RL's HDF5 file (`d4rl`) or a local Minari dataset (`minari`).

    Raises:
        ValueError, RuntimeError: as of `convert.to_d4rl` and `convert.to_minari`.
    """
    task, facts = dataset.task, dataset.provenance
    source = "minari" if facts["source"] == "minari" else "file"
    raw, _ = sources.find(
        task, source, facts["path"]
    )  # q-learning arrays lack some rows
    if form == "minari":
        bounds = schema.episode_bounds(raw, task)
        if bounds[-1] < len(raw["rewards"]):
            bounds = np.append(bounds, len(raw["rewards"]))
        about = f"{task}: {facts['label']}, sha256 {facts['sha256']}"
        print(f"wrote {minari.to_minari(raw, bounds, task, target, about)}")
    else:
        original = None if source == "minari" else Path(facts["path"])
        about = f"{facts['label']}, {facts['path']}, sha256 {facts['sha256']}"
        print(f"wrote {minari.to_d4rl(raw, about, Path(target), original)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Find a dataset and print its card.")
    parser.add_argument("task", nargs="?", help="D4RL name, such as hopper-medium-v2")
    parser.add_argument("--source", choices=sources.SOURCES, default="auto")
    parser.add_argument("--path", help="HDF5 file, or minari:ID")
    parser.add_argument("--cache_dir", type=Path, help="where stand-ins are kept")
    parser.add_argument("--rows", type=int, help="size of a stand-in to collect")
    parser.add_argument("--plot", type=Path, help="write a histogram of returns (PNG)")
    parser.add_argument(
        "--export",
        nargs=2,
        metavar=("FORMAT", "TARGET"),
        help="d4rl FILE, or minari ID: write the dataset in that format",
    )
    parser.add_argument("--all", action="store_true", help="a line for every task")
    parser.add_argument("--report", type=Path, help="compare all stand-ins with D4RL's")
    args = parser.parse_args()
    if (args.task is not None) + args.all + (args.report is not None) != 1:
        parser.error("give one task, or --all, or --report FILE")
    if args.task is None and (args.plot or args.export or args.path):
        parser.error("--plot, --export and --path belong to one task")
    if args.export and args.export[0] not in FORMATS:
        parser.error(
            f"--export {args.export[0]}: the formats are {' and '.join(FORMATS)}"
        )
    try:
        if args.all:
            print(overview(args.cache_dir))
        elif args.report:
            report(args.report, args.cache_dir, args.rows)
        else:
            _one_task(args)
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(collect.INTERRUPTED) from None


def _one_task(args: argparse.Namespace) -> None:
    found = sources.resolve(args.task, args.source, args.path, args.cache_dir, args.rows)
    print(card(found))
    if args.plot:
        plot_returns(found, args.plot)
        print(f"wrote {args.plot}")
    if args.export:
        export(found, *args.export)


if __name__ == "__main__":
    main()
