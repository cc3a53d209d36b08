"""The numbers of an experiment's runs, and the tables of its page.

The unit is a run, one seed of one task. docs/report.md says what each number is.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from corl.drop import drop_at_the_switch
from corl.tasks import RAW, Scale
from experiments import stats
from experiments.groups import Experiment, Group
from experiments.programs import working_settings
from experiments.store import online_scores, online_steps, training_metric
from experiments.stored import scale_of
from experiments.values import flatten

# Measures on which methods are compared -> their titles in figures.
MEASURES = {
    "after": "final score",
    "training": "training episodes",
}
# Measures of a contrast, the primary one first -> their titles.
CONTRASTED = {
    "training": "training episodes (primary)",
    "after": "final score",
    "depth": "depth of the drop",
}

# A run whose final score is below this share of the offline model's has collapsed.
COLLAPSED = 0.5


def told(scale: Scale, text: str) -> str:
    """A text about scores in the words of a scale: of raw returns it says return."""
    return text.replace("score", scale.name)


# ---------------------------------------------------------------- numbers of runs


def measures(record: Mapping) -> dict[str, float | None]:
    """A run's scores, in its scale: before, after (last four), last, best; its regret.

    regret: None where nothing is normalized, since nobody knows the best return.
    training: mean over the logged online steps of the score of the last training episode.
    depth, recovery: of the drop at the switch, see `corl.drop.Drop`. A recovery that the run did
    not see is None, and in `censored` it is the last evaluation's step.
    """
    scores = online_scores(record)
    before = float(np.mean(record["before"]["scores"])) if record["before"] else None
    drop = drop_at_the_switch(before, online_steps(record), scores.tolist())
    scale = scale_of(record)
    return {
        "before": before,
        "after": stats.final_score(scores),
        "last": float(scores[-1]),
        "best": float(scores.max()),
        "regret": None if scale is RAW else stats.regret(scores),
        # Older versions stored its bins alone.
        "training": record["training"]
        if "training" in record
        else _metric_mean(record, training_metric(scale)),
        "depth": drop.depth if drop else None,
        "recovery": drop.recovery if drop else None,
        "censored": drop.censored_recovery if drop else None,
        "exchanged": _metric_mean(record, "exchanged"),
    }


def _metric_mean(record: Mapping, name: str) -> float | None:
    values = [v for v in record["metrics"].get(name, []) if v is not None]
    return float(np.mean(values)) if values else None


def common_tasks(experiment: Experiment, group: Group) -> list[str]:
    """The tasks that every method of the group has runs of."""
    sets = [set(experiment.runs[label]) for label in group.labels]
    return sorted(set.intersection(*sets)) if sets else []


def averaged(experiment: Experiment, group: Group) -> list[list[str]]:
    """The common tasks in parts over which a mean is taken.

    Scores have one scale, so all tasks are one part. Raw returns of different environments have
    no common unit, so each task is its own.
    """
    tasks = common_tasks(experiment, group)
    return [[task] for task in tasks] if experiment.scale is RAW else [tasks]


def _values(
    experiment: Experiment, label: str, tasks: Sequence[str], measure: str
) -> list[dict]:
    """Per task: seed -> a measure of the run."""
    runs_of = experiment.runs[label]
    return [
        {seed: measures(r)[measure] for seed, r in sorted(runs_of[env].items())}
        for env in tasks
    ]


def values_of_all(
    experiment: Experiment, group: Group, tasks: Sequence[str], measure: str
) -> dict[str, list[dict]]:
    """method -> per task seed -> a measure; empty if a run of the group lacks the measure."""
    found = {x: _values(experiment, x, tasks, measure) for x in group.labels}
    lacking = any(None in s.values() for scores in found.values() for s in scores)
    return {} if lacking else found


def paired(
    scores: Sequence[Mapping], reference: Sequence[Mapping]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per task the values (R,) of both, for the seeds that both have."""
    x, y = [], []
    for mine, theirs in zip(scores, reference, strict=True):
        seeds = sorted(mine.keys() & theirs.keys())
        x.append(np.array([mine[s] for s in seeds]))
        y.append(np.array([theirs[s] for s in seeds]))
    return x, y


def spread_over_runs(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over the first axis; nan where there is one run."""
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    return values.std(0, ddof=1)


def snapshots(experiment: Experiment) -> dict[tuple[str, str], list[Mapping]]:
    """(label, env) -> the records that have a snapshot, by seed."""
    found: dict[tuple[str, str], list[Mapping]] = {}
    for record in experiment.records(sorted(experiment.runs)):
        if "snapshot" in record:
            found.setdefault((record["label"], record["env"]), []).append(record)
    return found


# ---------------------------------------------------------------- tables


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def _number(value: float, digits: int = 1) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0.0 else text  # no -0.0


def _spread(values: Sequence[float | None], digits: int = 1) -> str:
    """Mean ± sample standard deviation over runs."""
    known = np.array([v for v in values if v is not None])
    if len(known) == 0:
        return "–"
    text = _number(known.mean(), digits)
    if len(known) > 1:
        text += f" ± {_number(spread_over_runs(known), digits)}"
    return text


def _interval(estimate: stats.Estimate, digits: int = 1) -> str:
    text = _number(float(estimate.value), digits)
    if math.isnan(estimate.low):
        return f"{text} [no interval]"
    ends = _number(estimate.low, digits), _number(estimate.high, digits)
    return f"{text} [{ends[0]}, {ends[1]}]"


def _seeds(by_seed: Mapping[int, Any]) -> str:
    """Seeds in short: `0–2, 5`."""
    parts: list[list[int]] = []
    for seed in sorted(by_seed):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)


def task_table(experiment: Experiment, group: Group) -> str:
    """Per task and method: scores before, after, last, best; regret, training, drop, exchanges."""
    regret = experiment.scale is not RAW
    header = ["task", "method", "seeds", "before → after", "last", "best"]
    header += ["regret"] * regret
    header += ["training", "depth", "recovery", "pairs exchanged"]
    tasks = sorted({env for label in group.labels for env in experiment.runs[label]})
    rows = []
    for env in tasks:
        for label in group.labels:
            by_seed = experiment.runs[label].get(env, {})
            if not by_seed:
                continue
            found = [measures(r) for _, r in sorted(by_seed.items())]
            column = {name: [m[name] for m in found] for name in found[0]}
            both = f"{_spread(column['before'])} → {_spread(column['after'])}"
            rest = [_spread(column["last"]), _spread(column["best"])]
            rest += [_spread(column["regret"], 3)] * regret
            rest += [_spread(column["training"]), _spread(column["depth"])]
            rest += [_recovery(found), _spread(column["exchanged"])]
            rows.append([env, experiment.name(label), _seeds(by_seed), both, *rest])
    return _table(header, rows)


def _recovery(found: Sequence[Mapping[str, float | None]]) -> str:
    """Thousands of steps until the score was back, and how many runs did not see it."""
    known = [m["censored"] for m in found if m["censored"] is not None]
    if not known:
        return "–"
    lost = len(known) - sum(m["recovery"] is not None for m in found)
    text = _spread([steps / 1000 for steps in known]) + "k"
    return f"{text} ({lost} of {len(known)} not back)" if lost else text


def contrast_table(experiment: Experiment, group: Group) -> str:
    """The differences that the group was made for, per task and over all; empty without any."""
    rows = []
    for one, other in group.contrasts:
        names = f"{experiment.name(one)} − {experiment.name(other)}"
        tasks = sorted(_tasks(experiment, one) & _tasks(experiment, other))
        if not tasks:
            rows.append([names, "–", "0", *["no runs yet"] * len(CONTRASTED), "–"])
        over_all = len(tasks) > 1 and experiment.scale is not RAW
        for shown in [[task] for task in tasks] + [tasks] * over_all:
            cells, so, pairs = [], "–", 0
            for measure in CONTRASTED:
                cell, verdict, count = _contrast(experiment, one, other, shown, measure)
                cells.append(cell)
                if measure == next(iter(CONTRASTED)):
                    so, pairs = verdict, count
            where = shown[0] if len(shown) == 1 else f"mean of {len(shown)} tasks"
            rows.append([names, where, str(pairs), *cells, so])
    if not rows:
        return ""
    titles = [told(experiment.scale, title) for title in CONTRASTED.values()]
    heads = [f"{title} [95 %]" for title in titles]
    return _table(["difference", "task", "pairs", *heads, "so"], rows)


def _tasks(experiment: Experiment, label: str) -> set[str]:
    return set(experiment.runs.get(label, {}))


def _contrast(
    experiment: Experiment, one: str, other: str, tasks: Sequence[str], measure: str
) -> tuple[str, str, int]:
    """Mean paired difference with its interval, what it says, and the number of pairs."""
    known = [
        [
            {seed: value for seed, value in by_seed.items() if value is not None}
            for by_seed in _values(experiment, label, tasks, measure)
        ]
        for label in (one, other)
    ]
    x, y = paired(*known)
    count = sum(map(len, x))
    if not all(map(len, x)):
        return "no pairs", "cannot be told", count
    estimate = stats.mean_difference(x, y)
    return _interval(estimate), _verdict(estimate), count


def _verdict(estimate: stats.Estimate) -> str:
    """What an interval of a difference says."""
    if math.isnan(estimate.low):
        return "cannot be told: one seed"
    if estimate.low > 0:
        return "better"
    return "worse" if estimate.high < 0 else "inside the interval"


def progress_note(experiment: Experiment) -> str:
    """How many cells of the sweep are in, and of which methods some are missing; "" without one."""
    if not experiment.planned:
        return ""
    stored = {
        (r["label"], r["env"], r["seed"]) for r in experiment.records(experiment.runs)
    }
    there = [cell for cell in experiment.planned if cell in stored]
    note = f"**{len(there)} of {len(experiment.planned)} cells of the sweep are in.**"
    counts = []
    for label in dict.fromkeys(label for label, *_ in experiment.planned):
        whole = sum(cell[0] == label for cell in experiment.planned)
        found = sum(cell[0] == label for cell in there)
        if found < whole:
            counts.append(f"{experiment.name(label)} {found} of {whole}")
    return note + (f" Not complete: {', '.join(counts)}." if counts else "") + "\n"


def ungrouped_note(experiment: Experiment) -> str:
    """Which methods have runs that no group shows; "" where there are none."""
    shown = {label for group in experiment.groups for label in group.labels}
    rest = [experiment.name(label) for label in experiment.runs if label not in shown]
    if not rest:
        return ""
    return f"In no group of experiment.yaml, so not compared below: {', '.join(rest)}.\n"


def aggregate_table(
    experiment: Experiment, group: Group, tasks: Sequence[str], measure: str = "after"
) -> str:
    """Over the common tasks: IQM, difference to the baseline, probability of improvement.

    Empty if a run lacks the measure.
    """
    base = group.baseline
    found = values_of_all(experiment, group, tasks, measure)
    if not found:
        return ""
    header = ["method", "runs", f"IQM of {measure} [95 %]", f"mean of {measure}"]
    if base is not None:
        name = experiment.name(base)
        header += [f"difference to {name} [95 %]", f"P(better than {name}) [95 %]", "so"]
    rows = []
    for label, scores in found.items():
        values = [np.array(list(s.values())) for s in scores]
        row = [experiment.name(label), str(sum(map(len, values)))]
        row += [_interval(stats.aggregate_iqm(values))]
        row += [_number(np.mean([v.mean() for v in values]))]
        if base is not None:
            row += (
                ["–", "–", "–"]
                if label == base
                else _difference_cells(scores, found[base])
            )
        rows.append(row)
    return _table(header, rows)


def _difference_cells(
    scores: Sequence[Mapping], reference: Sequence[Mapping]
) -> list[str]:
    """Difference to the baseline, chance to be better, verdict; paired by common seeds."""
    x, y = paired(scores, reference)
    all_x = [np.array(list(s.values())) for s in scores]
    all_y = [np.array(list(s.values())) for s in reference]
    chance = _interval(stats.probability_of_improvement(all_x, all_y), 2)
    if not all(len(v) for v in x):
        return ["no common seeds", chance, "cannot be told"]
    estimate = stats.mean_difference(x, y)
    return [_interval(estimate), chance, _verdict(estimate)]


def cost_table(experiment: Experiment, group: Group) -> str:
    """Per method: collapsed runs, updates, CPU time, a generator's share of its paper's.

    Empty if a run of the group does not say its CPU time; stacked seeds have none of their own.
    Half of a raw return means nothing, and a page of costs says nothing of scores; both say
    nothing of collapses.
    """
    of_label = {label: list(experiment.records([label])) for label in group.labels}
    everything = [record for records in of_label.values() for record in records]
    if not all("cpu_seconds" in r or "stacked" in r for r in everything):
        return ""
    collapses = experiment.scale is not RAW and not group.costs
    header = ["method", "runs", *["collapsed"] * collapses, "updates", "CPU minutes"]
    generated = any("generator_share" in record for record in everything)
    rows = []
    for label, records in of_label.items():
        alone = [r["cpu_seconds"] for r in records if "stacked" not in r]
        minutes = [seconds / 60 for seconds in alone]
        row = [experiment.name(label), str(len(records))]
        row += [_collapsed(records)] * collapses
        row += [_spread([r["updates"] for r in records], 0), _spread(minutes)]
        if generated:
            shares = [record.get("generator_share") for record in records]
            row.append(_range([share for share in shares if share is not None]))
        rows.append(row)
    return _table(header + ["generator's share"] * generated, rows)


def warnings_list(experiment: Experiment, group: Group) -> str:
    """What the runs of a group warned of, a line per method, task and text; "" if of nothing."""
    found: dict[tuple[str, str, str], dict[int, Mapping]] = {}
    for label in group.labels:
        for record in experiment.records([label]):
            for text in record.get("warnings", ()):
                seeds = found.setdefault((label, record["env"], text), {})
                seeds[record["seed"]] = record
    return "".join(
        f"- {experiment.name(label)}, {env}, seed {_seeds(seeds)}: {text}\n"
        for (label, env, text), seeds in found.items()
    )


def _collapsed(records: Sequence[Mapping]) -> str:
    """Tasks and seeds of the runs that ended below half of where they began."""
    found: dict[str, dict[int, Mapping]] = {}
    for record in records:
        scores = measures(record)
        before, after = scores["before"], scores["after"]
        if before is None or after is None:
            return "–"
        if after < COLLAPSED * before:
            found.setdefault(record["env"], {})[record["seed"]] = record
    if not found:
        return "0"
    count = sum(map(len, found.values()))
    places = "; ".join(f"{env} seed {_seeds(seeds)}" for env, seeds in found.items())
    return f"{count} ({places})"


def _range(values: Sequence[float]) -> str:
    """A value, or the smallest and the largest, with two digits."""
    if not values:
        return "–"
    ends = sorted({f"{min(values):.2g}", f"{max(values):.2g}"}, key=float)
    return "–".join(ends)


def settings_table(experiment: Experiment, group: Group) -> str:
    """The settings in which the group's methods differ; several values: one per task.

    A setting that has nothing to do in a method has a dash there.
    """
    configs: dict[str, dict[str, list]] = {}
    for label in group.labels:
        for by_seed in experiment.runs[label].values():
            record = next(iter(by_seed.values()))
            settings = working_settings(record["algorithm"], record["config"])
            fields = {"algorithm": record["algorithm"], **flatten(settings)}
            for name, value in fields.items():
                values = configs.setdefault(name, {}).setdefault(label, [])
                if value not in values:
                    values.append(value)

    def show(values: list | None) -> str:
        if values is None:
            return "–"
        return " / ".join("none" if v is None else str(v) for v in values)

    rows = []
    for name in sorted(configs):
        by_label = configs[name]
        shown = [show(by_label.get(label)) for label in group.labels]
        if len({show(values) for values in by_label.values()}) > 1:
            rows.append([f"`{name}`", *shown])
    if not rows:
        return ""
    names = [experiment.name(label) for label in group.labels]
    return _table(["setting", *names], rows)


def provenance_table(experiment: Experiment) -> str:
    """Where the runs of each label come from."""
    header = "label,tasks,seeds,data,rows,commit,machine,updates/s".split(",")
    rows = []
    for label, tasks in sorted(experiment.runs.items()):
        records = list(experiment.records([label]))
        seeds = {r["seed"]: r for r in records}
        data = {(r["dataset"]["label"], r["dataset"]["rows"]) for r in records}
        speeds: dict[str, list[float]] = {}
        for r in records:
            speeds.setdefault(_machine(r), []).append(r["updates_per_second"])
        commits = sorted({_short_commit(r["commit"]) for r in records})
        rows.append(
            [
                f"`{label}`",
                str(len(tasks)),
                _seeds(seeds),
                "; ".join(sorted({d[0] for d in data})),
                ", ".join(sorted({f"{d[1]:,}" for d in data})),
                ", ".join(commits),
                "; ".join(sorted(speeds)),
                "; ".join(_spread(speeds[name], 0) for name in sorted(speeds)),
            ]
        )
    return _table(header, rows)


def _machine(record: Mapping) -> str:
    """What a run ran on, and beside how many other seeds of its process."""
    machine = record["machine"]
    text = f"{machine['processor']}, {machine['cores']} cores"
    text += f", {machine['gpu']}" if machine["gpu"] else ""
    count = record.get("stacked")
    return f"{text}, {count} seeds stacked" if count else text


def _short_commit(commit: str) -> str:
    return commit[:9] + ("+dirty" if commit.endswith("+dirty") else "")


def scores_csv(experiment: Experiment) -> str:
    """A row per run, for other people's analysis; raw episode returns are in runs/."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    regret = ["regret"] * (experiment.scale is not RAW)
    names = ["before", "after", "last", "best", *regret, "training", "exchanged"]
    names += ["depth", "recovery"]
    head = ["label", "env", "seed", *names, "dataset_source", "dataset_sha256", "commit"]
    writer.writerow(head)
    for record in experiment.records(sorted(experiment.runs)):
        about = [record[name] for name in ("label", "env", "seed")]
        found = measures(record)
        numbers = ["" if found[n] is None else f"{found[n]:.6g}" for n in names]
        data = record["dataset"]
        row = [*about, *numbers, data["source"], data["sha256"], record["commit"]]
        writer.writerow(row)
    return out.getvalue()


def advantage_table(experiment: Experiment) -> str:
    """Which rows the exchange moves, by their advantage; empty when no snapshot has it."""
    rows = []
    for (label, env), records in snapshots(experiment).items():
        for record in records:
            groups = record["snapshot"].get("advantages")
            if groups:
                cells = [
                    "–"
                    if group["advantage"] is None
                    else f"{group['advantage']:.2f} ({_number(group['weight'])})"
                    for group in groups.values()
                ]
                auc = f"{record['snapshot']['scores']['auc']:.2f}"
                about = [experiment.name(label), env, str(record["seed"]), auc]
                rows.append([*about, *cells])
    if not rows:
        return ""
    header = ["method", "task", "seed", "AUC", "offline, stays", "offline, moved"]
    return (
        _table([*header, "online, stays", "online, moved"], rows)
        + "\nAUC: how often the alignment score of an online row is above that of an offline one. "
        "Then the mean advantage of the drawn rows that the threshold rule would leave in their "
        "half and of those that it would exchange, whatever the run's own rule; in brackets their "
        "mean weight in IQL's policy loss.\n"
    )
