"""The page that compares every self-collected stand-in with D4RL's published figures.

python -m corl.data.card --report results/datasets.md
"""

import tempfile
from pathlib import Path

from corl import files, machine, tasks
from corl.data import published, sources
from corl.standin import collect, policies


def report(out: Path, cache_dir: Path | str | None, rows: int | None) -> None:
    """Make every stand-in there can be, and write a table of them against D4RL's data.

    Args:
        out: the page, in Markdown; its folder is made.
        cache_dir, rows: as of `sources.resolve`.

    Raises:
        ValueError: `out` is a folder; else as of `sources.resolve`.
        RuntimeError: no room or no right to write; else as of `sources.resolve`.
    """
    if out.is_dir():
        raise ValueError(f"--report {out} is a folder; a file is needed")
    with files.naming_errors(out):
        # A try before the work is spent.
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    robots, mazes, missing = [], [], []
    for task in map(tasks.task, tasks.task_names()):
        try:
            policies.fingerprint(task)
        except policies.NotCollectable:
            missing.append(task.name)
            continue
        dataset = sources.resolve(task, "self-collected", None, cache_dir, rows)
        if task.robot == "antmaze":
            mazes.append(_maze_row(dataset))
        else:
            robots.append(_robot_row(dataset))
    lines = [
        "# Self-collected stand-ins beside D4RL's data",
        "",
        _origin(out, rows),
        "",
        *_robot_section(robots),
        *_maze_section(mazes),
        f"No stand-in: {', '.join(missing) or 'none is missing'}.",
    ]
    with files.naming_errors(out):
        files.write_text(out, "\n".join(lines) + "\n")


def _origin(out: Path, rows: int | None) -> str:
    """Command, commit, versions and machine behind the page."""
    size = "" if rows is None else f" --rows {rows}"
    versions = {name[:-8]: v for name, v in collect.versions().items()}
    here = machine.describe()
    return (
        f"Command: `python -m corl.data.card --report {machine.tidy_path(out)}{size}`, "
        f"commit {machine.git_commit()}, "
        f"{', '.join(f'{k} {v}' for k, v in versions.items())}, "
        f"{here['processor']}, {here['cores']} cores."
    )


def _robot_section(rows: list[str]) -> list[str]:
    return [
        "## Locomotion",
        "",
        "Returns of complete episodes, raw and D4RL-normalized. `within`: the stand-in's",
        "mean lies within D4RL's published mean ± 1 std; empty where D4RL's is not known.",
        "`docs/datasets.md` says which policies acted, and why `expert` is weaker.",
        "",
        "| task | rows | episodes | return, mean ± std (min … max) | normalized | "
        "D4RL's rows | D4RL's mean ± std | normalized | within | sha256 |",
        "|---" * 10 + "|",
        *rows,
        "",
    ]


def _maze_section(rows: list[str]) -> list[str]:
    return [
        "## Antmaze",
        "",
        "Episodes go on at the goal, so a return counts rows at the goal that rewards are",
        "computed for and is no score. D4RL publishes no such figures. As in D4RL's data,",
        "the goals that medium-play's ants walk to are others than the evaluation's.",
        "",
        "| task | rows | episodes | rows at the goal per episode, mean ± std | "
        "episodes that get there | D4RL's rows | sha256 |",
        "|---" * 7 + "|",
        *rows,
        "",
    ]


def _robot_row(dataset: sources.Dataset) -> str:
    task, mine = dataset.task, dataset.statistics["return"]
    own, own_score = "no complete episode", ""
    if mine["mean"] is not None:
        own = "{mean:.0f} ± {std:.0f} ({min:.0f} … {max:.0f})".format(**mine)
        own_score = f"{task.normalized_score(mine['mean']):.1f}"
    theirs, their_score, within = "not known", "", ""
    returns = published.returns(task)
    if returns is not None:
        mean, std = returns[:2]
        theirs = f"{mean:.0f} ± {std:.0f}"
        their_score = f"{task.normalized_score(mean):.1f}"
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
    """One line of a table: what is ours, then what is D4RL's, then the file's digest."""
    stats, task = dataset.statistics, dataset.task
    counts = [task.name, str(stats["rows"]), str(stats["episodes"])]
    theirs = [str(published.rows(task)), *theirs]
    digest = f"`{dataset.provenance['sha256'][:12]}`"
    return f"| {' | '.join([*counts, *mine, *theirs, digest])} |"
