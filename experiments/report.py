"""Pages of results: tables and figures of stored runs; and the command line of the store.

    python -m experiments.report add runs/NAME [...] --to results/EXPERIMENT --as LABEL
    python -m experiments.report figures runs/NAME     # samples at the last checkpoint, Fig. 1
    python -m experiments.report write                 # what `make report` does

`add` copies what a page needs of finished runs into the store. `write` makes README.md, scores.csv
and figures/ of each experiment from stored runs and its `experiment.yaml` alone: the same bytes
each time. docs/report.md says what each number is.
"""

from collections.abc import Sequence
from pathlib import Path

from corl import files, machine
from corl.arguments import Parser, errors_in_one_line, path
from corl.drop import SWITCH
from corl.tasks import D4RL, NORMALIZED, RAW, SCALES, file_name
from experiments import tables
from experiments.groups import Experiment, Group, read_experiment
from experiments.panels import group_figures, snapshot_picture
from experiments.store import add, read_run
from experiments.values import dump_json

# What a page says of numbers that are not D4RL's.
ABOUT_SCALES = {
    NORMALIZED: "Scores are normalized by the runs' own `ref_min_score` and `ref_max_score`. ",
    RAW: "All numbers are raw returns, in each environment's own unit. ",
}


def write_report(folder: Path | str) -> list[Path]:
    """Write README.md, scores.csv and figures/ of an experiment; returns the files.

    Where nothing is normalized, the second is returns.csv.
    The figures folder belongs to the report: pictures of an earlier one are removed.
    """
    experiment = read_experiment(folder)
    pictures: dict[str, bytes] = {}
    text = [f"# {experiment.title}\n"]
    if experiment.note:
        text.append(experiment.note + "\n")
    text.append(tables.progress_note(experiment))
    text.append(tables.ungrouped_note(experiment))
    text.append(_data_note(experiment))
    for group in experiment.groups:
        text.append(_group_section(experiment, group, pictures))
    text.append(_snapshot_section(experiment, pictures))
    if experiment.runs:
        text.append(
            "## Where the numbers come from\n\n" + tables.provenance_table(experiment)
        )
    text.append(
        "Raw returns of every evaluation episode, settings and versions: `runs/`. One row per "
        f"run: `{_rows_file(experiment)}`. This page, that file and `figures/` are written by "
        "`make report`.\n"
    )
    written = {"README.md": "\n".join(t for t in text if t).encode()}
    written[_rows_file(experiment)] = tables.scores_csv(experiment).encode()
    written.update({f"figures/{name}.png": data for name, data in pictures.items()})
    for name, data in written.items():
        _write(experiment.folder / name, data)
    for old in experiment.folder.glob("figures/*.png"):
        if old.stem not in pictures:
            old.unlink()
    for scale in SCALES:
        if scale.name != experiment.scale.name:
            (experiment.folder / f"{scale.name}s.csv").unlink(missing_ok=True)
    return [experiment.folder / name for name in written]


def _rows_file(experiment: Experiment) -> str:
    return f"{experiment.scale.name}s.csv"


def _data_note(experiment: Experiment) -> str:
    labels = experiment.data_labels(experiment.runs)
    records = list(experiment.records(experiment.runs))
    if not records:
        return "There are no runs yet.\n"
    note = f"Data: **{'; '.join(labels)}**. "
    note += ABOUT_SCALES.get(experiment.scale, "")
    own = any(r["dataset"]["source"] == "self-collected" for r in records)
    if own and experiment.scale is D4RL:
        note += (
            "Scores use D4RL's scale, but those on self-collected data are not D4RL scores and "
            "compare with nothing outside this page. "
        )
    evaluations = [entry for r in records for entry in r["evaluations"]]
    episodes = sorted({len(e["returns"]) for e in evaluations if e["phase"] != SWITCH})
    at_switch = sorted({len(e["returns"]) for e in evaluations if e["phase"] == SWITCH})
    note += f"Episodes per evaluation: {', '.join(map(str, episodes))}"
    if at_switch:
        note += f"; at the switch: {', '.join(map(str, at_switch))}"
    return note + ".\n"


def _group_section(
    experiment: Experiment, group: Group, pictures: dict[str, bytes]
) -> str:
    text = [f"## {group.title}\n"]
    if group.note:
        text.append(group.note + "\n")
    if group.missing:
        text.append(f"No runs yet of: {', '.join(group.missing)}.\n")
    if contrasts := tables.contrast_table(experiment, group):
        text.append(contrasts)
        text.append(
            "These differences were chosen before the runs. Each is paired by seed, with Student's "
            "interval, over the pairs that are in. A lower depth is better. The verdict is that of "
            "the primary measure.\n"
        )
    if not group.labels:
        return "\n".join(text)
    if not group.costs:
        text.extend(_scores(experiment, group))
    text.extend(_costs(experiment, group))
    if warned := tables.warnings_list(experiment, group):
        text.append("Warnings of the runs:\n\n" + warned)
    if group.costs:
        return "\n".join(text)
    for name, picture, alt in group_figures(experiment, group):
        pictures[name] = picture
        text.append(f"![{alt}](figures/{name}.png)\n")
    settings = tables.settings_table(experiment, group)
    if settings:
        text.append("What differs between them:\n\n" + settings)
    return "\n".join(text)


def _scores(experiment: Experiment, group: Group) -> list[str]:
    """The tables of scores, or of returns, and what they hold."""
    text = [tables.task_table(experiment, group)]
    scored = experiment.scale is not RAW
    regret = "Regret: mean of 1 − score/100 over the online evaluations. " * scored
    training = tables.told(experiment.scale, "Training: mean score of the training")
    text.append(
        "Before: evaluation at the switch, or the last offline one. After: mean of the last four "
        f"online evaluations. {regret}{training} "
        "episodes, which explore. Depth: before minus the lowest moving mean of three "
        "online evaluations. Recovery: online steps to the first such mean at or above before; "
        "without one, all steps count. Mean ± standard deviation over seeds. "
        f"{_same_start(experiment, group)}\n"
    )
    for tasks in tables.averaged(experiment, group):
        if tasks and len(group.labels) > 1:
            text.extend(_aggregates(experiment, group, tasks))
    return text


def _costs(experiment: Experiment, group: Group) -> list[str]:
    """The table of what the runs cost, and what it holds; nothing where they do not say it."""
    cost = tables.cost_table(experiment, group)
    if not cost:
        return []
    scored = experiment.scale is not RAW and not group.costs
    collapsed = "Collapsed: final score below half of the offline model's. " * scored
    records = experiment.records(group.labels)
    stacked = any("stacked" in record for record in records) * (
        "Stacked seeds share a process and have no CPU time of their own. "
    )
    return [
        cost,
        f"{collapsed}Updates and CPU time are "
        "of a run itself, all threads together; a shared offline model is not counted. "
        f"{stacked}"
        "Generator's share: its arithmetic, of what its authors spend.\n",
    ]


def _aggregates(experiment: Experiment, group: Group, tasks: list[str]) -> list[str]:
    """Tables of means over tasks that all methods of the group ran, and what they hold."""
    compared = [
        tables.aggregate_table(experiment, group, tasks, x) for x in tables.MEASURES
    ]
    over = f"Over {_plural(len(tasks), 'task')} that all of them ran"
    if experiment.scale is RAW:
        over = f"On {tasks[0]}, which all of them ran"
    return [
        *(table for table in compared if table),
        f"{over}. IQM and P: stratified "
        "bootstrap over runs, too narrow for few seeds. Difference: paired by seed, mean "
        "over tasks, Student's interval; not corrected for the number of comparisons.\n",
    ]


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _same_start(experiment: Experiment, group: Group) -> str:
    """Did all methods start from the same offline models, judged by their raw returns?"""
    starts: dict[tuple, set] = {}
    for label in group.labels:
        for env, by_seed in experiment.runs[label].items():
            for seed, record in by_seed.items():
                before = record["before"]
                returns = tuple(before["returns"]) if before else None
                starts.setdefault((env, seed), set()).add(returns)
    if any(None in found for found in starts.values()):
        return "Not all runs say how good their offline model was."
    if all(len(found) == 1 for found in starts.values()):
        return "For each task and seed all of them start from the same offline model."
    return "**They do not all start from the same offline models.**"


def _snapshot_section(experiment: Experiment, pictures: dict[str, bytes]) -> str:
    """A picture of each method's lowest seed per task, and one table of all."""
    text = []
    for (label, env), records in tables.snapshots(experiment).items():
        record = records[0]
        name = f"snapshot-{label}-{file_name(env)}-s{record['seed']}"
        pictures[name] = snapshot_picture(record, experiment.name(label))
        text.append(f"![{label}, {env}, seed {record['seed']}](figures/{name}.png)\n")
    if not text:
        return ""
    text.append(tables.advantage_table(experiment))
    return "## Samples at the end of a run\n\n" + "\n".join(text)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        file.write(data)


# ---------------------------------------------------------------- command line


def _figures_command(folder: Path) -> None:
    # Here, since it brings the plugin and the host's environments, which pages do not need.
    from experiments.snapshot import take_snapshot

    snapshot = take_snapshot(folder)
    files.write_text(folder / "snapshot.json", dump_json(snapshot))
    record = read_run(folder)
    picture = snapshot_picture(record, record["label"])
    _write(folder / "snapshot.png", picture)
    print(machine.tidy_path(folder / "snapshot.png"))


def command_line(argv: Sequence[str] | None = None) -> None:
    """`python -m experiments.report add | figures | write`; errors are one line."""
    parser = Parser(prog="python -m experiments.report")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="copy finished runs into the store")
    adding.add_argument("runs", type=path, nargs="+", help="run folders")
    adding.add_argument("--to", type=path, required=True, help="results/EXPERIMENT")
    adding.add_argument(
        "--as", dest="label", help="name of the method; default: config's"
    )
    drawing = commands.add_parser("figures", help="draw the samples of runs (Fig. 1)")
    drawing.add_argument("runs", type=path, nargs="+", help="run folders")
    writing = commands.add_parser("write", help="tables and figures of stored runs")
    writing.add_argument(
        "results", type=path, nargs="?", default="results", help="default: results"
    )
    args = parser.parse_args(argv)
    with errors_in_one_line():
        if args.command == "add":
            for file in add(args.runs, args.to, args.label):
                print(machine.tidy_path(file))
        elif args.command == "figures":
            for folder in args.runs:
                _figures_command(folder)
        else:
            _write_command(args.results)


def _write_command(results: Path) -> None:
    """All experiments below `results`, or `results` itself if it is one."""
    own = (results / "runs").is_dir() or (results / "experiment.yaml").is_file()
    folders = [results] if own else []
    found = [p for p in results.glob("*/runs") if p.is_dir()]
    folders += sorted({p.parent for p in [*found, *results.glob("*/experiment.yaml")]})
    if not folders:
        raise ValueError(f"{results} holds no experiment (no folder with stored runs)")
    for folder in folders:
        written = write_report(folder)
        print(f"{machine.tidy_path(folder / 'README.md')} and {len(written) - 1} files")


if __name__ == "__main__":
    command_line()
