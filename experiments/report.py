"""From finished runs to published tables and figures, by way of a store of small text files.

    python -m experiments.report add runs/NAME [...] --to results/EXPERIMENT --as LABEL
    python -m experiments.report figures runs/NAME     # samples at the last checkpoint, Fig. 1
    python -m experiments.report write                 # what `make report` does

`add` copies raw episode returns, thinned metrics, settings and provenance into
`results/EXPERIMENT/runs/LABEL/ENV-sSEED.json`. `write` makes README.md, scores.csv and figures/ of
each experiment from these files and from its `experiment.yaml` alone: the same bytes each time.
docs/report.md says what each number is.
"""

import argparse
import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from corl import machine
from corl.config import read_yaml
from corl.curves import read_csv
from corl_dare.hook import LOGS
from experiments import figures, stats
from experiments.snapshot import take_snapshot

FORMAT = 1  # of a stored run
POINTS = 100  # of a metric's curve
METRICS = (
    *(*LOGS, "q_loss", "value_loss", "actor_loss", "policy_loss"),
    *("success_rate", "train_score"),
)
PLACES = (  # config fields that say where and how a run was made, not what it does
    "checkpoints_path",
    "dataset_path",
    "device",
    "env",
    "group",
    "load_model",
    "log_freq",
    "name",
    "project",
    "resume",
    "runs_dir",
    "seed",
    "threads",
    "wandb_mode",
)
SUMMARY = (  # what a finished run's summary.json holds in any case
    *("algorithm", "env", "machine", "versions", "score_final"),
    *("updates", "updates_per_second", "wall_seconds"),
)
BUDGET = "online environment steps"
MEASURES = {  # on which methods are compared -> their titles in figures
    "after": "final score",
    "training": "training episodes",
}

# ---------------------------------------------------------------- store


def read_run(folder: Path | str, label: str | None = None) -> dict[str, Any]:
    """What the store keeps of a finished run folder, as numbers and text.

    Args:
        folder: run folder.
        label: name of the method in tables; default: the config's `name`.

    Raises:
        ValueError: an unfinished run, one without a known commit, dataset source or seed,
            without online evaluations, or with files that are damaged or disagree.
    """
    folder = Path(folder)
    summary = _read_json(folder / "summary.json", "the run is not finished; resume it")
    config = read_yaml(folder / "config.yaml")
    for file, values, names in (
        ("summary.json", summary, SUMMARY),
        ("config.yaml", config, ("name", "offline_iterations")),
    ):
        for name in names:
            if name not in values:
                raise ValueError(f"{folder / file} lacks {name}; run it again")
    data = summary.get("dataset")
    data = (
        {k: v for k, v in data.items() if k != "path"} if isinstance(data, dict) else {}
    )
    needed = {
        "commit": summary.get("commit") not in (None, "", "unknown"),
        "dataset source": bool(data.get("source") and data.get("label")),
        "dataset sha256": bool(data.get("sha256")),
        "seed": isinstance(summary.get("seed"), int),
    }
    for name, known in needed.items():
        if not known:
            raise ValueError(
                f"{folder}: summary.json does not say the run's {name}, so nobody could "
                "repeat it; run it again from a git checkout with the data at hand"
            )
    label = label or str(config["name"])
    if not re.fullmatch(r"\w[\w.,+=-]*", label):
        raise ValueError(
            f"label {label!r} must be letters, digits and . , _ + = -, no sign first; give "
            "another one with --as"
        )
    evaluations = _read_evaluations(folder / "evaluations.csv")
    online = [e for e in evaluations if e["phase"] == "online"]
    if not online:
        raise ValueError(
            f"{folder} has no online evaluation; there is nothing to compare"
        )
    final = stats.final_score([np.mean(e["scores"]) for e in online])
    if not math.isclose(final, summary["score_final"], abs_tol=1e-6):
        raise ValueError(
            f"{folder}: evaluations.csv gives the final score {final:.3f}, summary.json says "
            f"{summary['score_final']:.3f}; one of them belongs to another run"
        )
    record = {
        "format": FORMAT,
        "label": label,
        **{name: summary[name] for name in ("algorithm", "env", "seed", "commit")},
        "dataset": data,
        "machine": summary["machine"],
        "versions": summary["versions"],
        "config": _plain({k: v for k, v in config.items() if k not in PLACES}),
        "before": _before(evaluations, _offline_runs(summary, config)),
        "evaluations": evaluations,
        "metrics": _thin_metrics(folder / "metrics.csv", config["offline_iterations"]),
        "updates": summary["updates"],
        "updates_per_second": _digits(summary["updates_per_second"]),
        "wall_seconds": _digits(summary["wall_seconds"]),
    }
    if (folder / "snapshot.json").is_file():
        record["snapshot"] = _read_json(folder / "snapshot.json")
    return record


def _read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Per evaluation its phase, step and raw episodes, in the order of the file."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    found: dict[tuple, dict[str, Any]] = {}
    try:
        columns = read_csv(path)
        names = ("phase", "step", "return", "score")
        rows = list(zip(*(columns[n] for n in names), strict=True))
        for phase, step, total, score in rows:
            entry = {"phase": phase, "step": int(step), "returns": [], "scores": []}
            entry = found.setdefault((phase, int(step)), entry)
            entry["returns"].append(float(total))
            entry["scores"].append(float(score))
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    for (phase, step), entry in found.items():
        if not np.isfinite(entry["returns"] + entry["scores"]).all():
            raise ValueError(
                f"{path}: {phase} step {step} has a return that is no number"
            )
    if len({len(e["returns"]) for e in found.values()}) > 1:
        raise ValueError(f"{path}: evaluations have different numbers of episodes")
    return list(found.values())


def _offline_runs(summary: Mapping, config: Mapping) -> list[tuple[Path, float]]:
    """Folders where the run of the loaded model may be, and the step it was loaded at."""
    found = []
    if summary.get("offline_run"):  # a sweep says it
        found.append((Path(summary["offline_run"]).expanduser(), math.inf))
    if config.get("load_model"):
        file = Path(str(config["load_model"])).expanduser()
        number = re.fullmatch(r"checkpoint_(\d+)\.pt", file.name)
        step = int(number.group(1)) + 1 if number else math.inf
        for folder in (file.parent, file.parent / "run", file.parent.parent):
            found.append((folder, step))
    return found


def _before(evaluations: list[dict], sources: list) -> dict[str, Any] | None:
    """The evaluation of the offline model: of this run, or of the run it was loaded from."""
    offline = [e for e in evaluations if e["phase"] == "offline"]
    for folder, step in sources:
        if not offline and (folder / "evaluations.csv").is_file():
            entries = _read_evaluations(folder / "evaluations.csv")
            offline = [e for e in entries if e["phase"] == "offline"]
            offline = [e for e in offline if e["step"] <= step]
    return offline[-1] if offline else None


def _plain(value: Any) -> Any:
    """Settings as JSON can hold them: an infinite bound as text."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _thin_metrics(path: Path, switch: int) -> dict[str, list]:
    """Means of the online rows in at most POINTS bins; `step` counts from the switch."""
    try:
        columns = read_csv(path)
        rows = [i for i, phase in enumerate(columns["phase"]) if phase == "online"]
        bins = np.array_split(rows, min(POINTS, len(rows))) if rows else []
        thin = {"step": [int(columns["step"][b[-1]]) - switch for b in bins]}
        curves = {n: [float(v or "nan") for v in columns.get(n, [])] for n in METRICS}
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    for name, curve in curves.items():
        values = np.array(curve)
        values = np.where(np.isfinite(values), values, np.nan)
        parts = [values[b][np.isfinite(values[b])] for b in bins if len(values)]
        if any(len(p) for p in parts):
            thin[name] = [_digits(p.mean()) if len(p) else None for p in parts]
    return thin


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def add(
    folders: Iterable[Path | str], experiment: Path | str, label: str | None = None
) -> list[Path]:
    """Put finished runs into `experiment`/runs; returns their files. All or nothing.

    Adding a run again renews its file. Raises ValueError as `read_run` does, where another run
    has the same label, task and seed, or where runs of one label differ in a setting.
    """
    experiment = Path(experiment)
    stored = {_store_path(experiment, r): r for r in read_store(experiment)}
    new: dict[Path, dict] = {}
    for folder in folders:
        record = read_run(folder, label)
        path = _store_path(experiment, record)
        old = new.get(path) or stored.get(path)
        if old is not None and _identity(old) != _identity(record):
            raise ValueError(
                f"{folder}: {path} already holds another run of this label, task and seed; "
                "give this one another label with --as, or remove that file"
            )
        new[path] = record
    check_settings({**stored, **new}.values())
    for path, record in new.items():
        write_atomic(path, dump_json(record).encode())
    return list(new)


def _store_path(experiment: Path, record: Mapping) -> Path:
    name = f"{record['env']}-s{record['seed']}.json"
    return experiment / "runs" / record["label"] / name


def _identity(record: Mapping) -> str:
    return dump_json({k: record[k] for k in ("commit", "evaluations", "wall_seconds")})


def read_store(experiment: Path | str) -> list[dict[str, Any]]:
    """The stored runs of an experiment, by label, task and seed."""
    records = []
    for path in sorted(Path(experiment).glob("runs/*/*.json")):
        record = _read_json(path)
        if record.get("format") != FORMAT or path != _store_path(
            Path(experiment), record
        ):
            raise ValueError(
                f"{path} is no stored run of this place and format {FORMAT}; make it with "
                "`python -m experiments.report add`"
            )
        records.append(record)
    return sorted(records, key=lambda r: (r["label"], r["env"], r["seed"]))


def check_settings(records: Iterable[Mapping]) -> None:
    """Runs that share label and task may differ in nothing but the seed; else ValueError."""
    first: dict[tuple, Mapping] = {}
    for record in records:
        other = first.setdefault((record["label"], record["env"]), record)
        mine, theirs = flat(record["config"]), flat(other["config"])
        for field in sorted(mine.keys() | theirs.keys()):
            if mine.get(field) != theirs.get(field):
                raise ValueError(
                    f"label {record['label']} on {record['env']}: {field} is "
                    f"{theirs.get(field)} for seed {other['seed']} and {mine.get(field)} for "
                    f"seed {record['seed']}; one label is one method, use --as"
                )


def flat(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested fields as `dare.cap`."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            fields.update(flat(value, f"{prefix}{name}."))
        else:
            fields[prefix + name] = value
    return fields


def dump_json(value: Any) -> str:
    """JSON with sorted keys, a list of numbers on one line; equal values, equal text."""

    def dump(value: Any, indent: str) -> str:
        inner = indent + " "
        nested = isinstance(value, list) and any(isinstance(v, dict) for v in value)
        if isinstance(value, dict) and value:
            items = [
                f"{json.dumps(str(k))}: {dump(value[k], inner)}" for k in sorted(value)
            ]
            return "{\n" + inner + f",\n{inner}".join(items) + f"\n{indent}}}"
        if nested:
            items = [dump(v, inner) for v in value]
            return "[\n" + inner + f",\n{inner}".join(items) + f"\n{indent}]"
        return json.dumps(value, allow_nan=False)

    return dump(value, "") + "\n"


def _read_json(path: Path, fix: str = "make it again") -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {fix}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {fix}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object; {fix}")
    return value


def write_atomic(path: Path, data: bytes) -> None:
    """The old file or the new one, whole, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------- experiment


PLAN_FIELDS = {"title": str, "note": str, "baseline": str, "names": dict, "groups": list}
GROUP_FIELDS = {"title": str, "note": str, "labels": list, "baseline": str}


class Group(NamedTuple):
    """Methods that are compared: one set of tables and figures."""

    title: str
    note: str
    labels: tuple[str, ...]  # those that have runs
    missing: tuple[str, ...]  # those that have none yet
    baseline: str | None

    @property
    def slug(self) -> str:
        """What its figures' names begin with."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "group"


class Experiment(NamedTuple):
    """A folder of results. runs: label -> task -> seed -> stored run."""

    folder: Path
    title: str
    note: str
    names: dict[str, str]
    groups: list[Group]
    runs: dict[str, dict[str, dict[int, dict]]]

    def name(self, label: str) -> str:
        return self.names.get(label, label)


def read_experiment(folder: Path | str) -> Experiment:
    """An experiment's stored runs and how `experiment.yaml` groups them.

    Without that file all labels are one group, compared with the first.

    Raises:
        ValueError: no runs, unknown fields, or runs of a group that cannot be compared.
    """
    folder = Path(folder)
    records = read_store(folder)
    if not records:
        raise ValueError(
            f"{folder} holds no runs; put some in with `add RUN --to {folder}`"
        )
    check_settings(records)
    tree: dict[str, dict[str, dict[int, dict]]] = {}
    for r in records:
        tree.setdefault(r["label"], {}).setdefault(r["env"], {})[r["seed"]] = r
    file = folder / "experiment.yaml"
    plan = {}
    if file.is_file():
        try:
            plan = yaml.safe_load(file.read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{file}: {' '.join(str(error).split())}") from None
    _known(plan, PLAN_FIELDS, str(file))
    names = plan.get("names") or {}
    groups: list[Group] = []
    for entry in plan.get("groups") or [
        {"title": "All methods", "labels": sorted(tree)}
    ]:
        _known(entry, GROUP_FIELDS, f"{file}: a group")
        if not entry.get("title") or not entry.get("labels"):
            raise ValueError(f"{file}: a group needs a title and labels")
        where = f"{file}: group {entry['title']!r}"
        labels = [str(label) for label in entry["labels"]]
        if entry.get("baseline") and entry["baseline"] not in labels:
            raise ValueError(f"{where}: baseline {entry['baseline']} is not in labels")
        shown = [names.get(label, label) for label in labels]
        if len(set(shown)) < len(shown):
            raise ValueError(f"{where}: two labels have the same name; see names")
        present = tuple(label for label in labels if label in tree)
        baseline = entry.get("baseline") or plan.get("baseline") or labels[0]
        group = Group(
            entry["title"],
            (entry.get("note") or "").strip(),
            present,
            tuple(label for label in labels if label not in tree),
            baseline if baseline in present else None,
        )
        if group.slug in [other.slug for other in groups]:
            raise ValueError(
                f"{where}: another group's figures have the name {group.slug}, too; give them "
                "titles that differ in letters a-z or digits"
            )
        groups.append(group)
        _check_comparable(group.title, {label: tree[label] for label in present})
    mentioned = {label for group in groups for label in (*group.labels, *group.missing)}
    if plan.get("baseline") and plan["baseline"] not in mentioned:
        raise ValueError(f"{file}: baseline {plan['baseline']} is in no group")
    note = (plan.get("note") or "").strip()
    title = plan.get("title") or folder.name
    return Experiment(folder, title, note, names, groups, tree)


def _known(values: Any, fields: Mapping[str, type], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold `field: value` lines")
    for name, value in values.items():
        if name not in fields:
            raise ValueError(
                f"{where}: unknown field {name}; known: {', '.join(fields)}"
            )
        kind = fields[name]
        if value is not None and not isinstance(value, kind):
            word = {str: "text", list: "a list", dict: "a block"}[kind]
            raise ValueError(f"{where}: {name} must be {word}, not {value!r}")
        if kind is dict and any(not isinstance(v, str) for v in (value or {}).values()):
            raise ValueError(f"{where}: {name} must give each label a text")


def _check_comparable(title: str, tree: Mapping[str, Mapping[str, Mapping]]) -> None:
    """Same data, same evaluations: what a comparison on a task takes for granted."""
    first: dict[str, tuple] = {}
    for label, tasks in tree.items():
        for env, by_seed in tasks.items():
            for record in by_seed.values():
                online = [e for e in record["evaluations"] if e["phase"] == "online"]
                facts = {
                    "the data (sha256)": record["dataset"]["sha256"][:12],
                    "the evaluations' steps": _online_steps(record),
                    "episodes per evaluation": len(online[0]["returns"]),
                    "eval_seed": record["config"].get("eval_seed"),
                }
                other, theirs = first.setdefault(env, (label, facts))
                for name, value in facts.items():
                    if value != theirs[name]:
                        raise ValueError(
                            f"group {title!r}, {env}: {name} of {label} and {other} differ "
                            f"({value} and {theirs[name]}); put them in different groups"
                        )


# ---------------------------------------------------------------- numbers of runs


def _online_steps(record: Mapping) -> list[int]:
    switch = record["config"]["offline_iterations"]
    return [e["step"] - switch for e in record["evaluations"] if e["phase"] == "online"]


def _online_scores(record: Mapping) -> np.ndarray:
    online = [e["scores"] for e in record["evaluations"] if e["phase"] == "online"]
    return np.array([np.mean(scores) for scores in online])


def measures(record: Mapping) -> dict[str, float | None]:
    """A run's scores (D4RL-normalized): before, after (last four), last, best; its regret.

    training: mean over the logged online steps of the score of the last training episode.
    """
    scores = _online_scores(record)
    return {
        "before": float(np.mean(record["before"]["scores"]))
        if record["before"]
        else None,
        "after": stats.final_score(scores),
        "last": float(scores[-1]),
        "best": float(scores.max()),
        "regret": stats.regret(scores),
        "training": _metric_mean(record, "train_score"),
        "exchanged": _metric_mean(record, "exchanged"),
    }


def _metric_mean(record: Mapping, name: str) -> float | None:
    values = [v for v in record["metrics"].get(name, []) if v is not None]
    return float(np.mean(values)) if values else None


def learning_curves(
    records: Sequence[Mapping],
) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) and scores (R, T) of runs with the same steps; from 0 if all say before."""
    steps = np.array(_online_steps(records[0]), dtype=float)
    scores = np.array([_online_scores(r) for r in records])
    if all(r["before"] for r in records):
        before = [[np.mean(r["before"]["scores"])] for r in records]
        steps, scores = np.append(0.0, steps), np.hstack([before, scores])
    return steps, scores


def _metric_curves(records: Sequence[Mapping], name: str) -> tuple | None:
    """Steps (T,) and a metric (R, T) where all runs have it."""
    found = []
    for record in records:
        metrics = record["metrics"]
        pairs = zip(metrics["step"], metrics.get(name, ()), strict=False)
        found.append({step: value for step, value in pairs if value is not None})
    steps = sorted(set.intersection(*map(set, found)))
    if not steps:
        return None
    return np.array(steps, float), np.array([[f[s] for s in steps] for f in found])


def _tenths(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Curves (R, T) averaged over tenths of their points, at the last step of each."""
    parts = np.array_split(np.arange(len(steps)), min(10, len(steps)))
    means = [values[:, part].mean(1) for part in parts]
    return steps[[part[-1] for part in parts]], np.stack(means, 1)


def _mean_curve(steps: np.ndarray, values: np.ndarray) -> figures.Curve:
    """Mean over runs (R, T), band ± their standard deviation."""
    mean, std = values.mean(0), _std(values)
    return figures.Curve(steps, mean, mean - std, mean + std)


def _std(values: np.ndarray) -> np.ndarray:
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    return values.std(0, ddof=1)


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
    return text if len(known) < 2 else f"{text} ± {_number(_std(known), digits)}"


def _interval(estimate: stats.Estimate, digits: int = 1) -> str:
    text = _number(float(estimate.value), digits)
    if math.isnan(estimate.low):
        return f"{text} [no interval]"
    ends = _number(estimate.low, digits), _number(estimate.high, digits)
    return f"{text} [{ends[0]}, {ends[1]}]"


def _seeds(by_seed: Mapping[int, Any]) -> str:
    """`0–2, 5`."""
    parts: list[list[int]] = []
    for seed in sorted(by_seed):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}–{p[-1]}" for p in parts)


def task_table(experiment: Experiment, group: Group) -> str:
    """Per task and method: scores before and after, last, best, regret, while training."""
    header = ["task", "method", "seeds", "before → after", "last", "best", "regret"]
    header += ["training", "pairs exchanged"]
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
            rest += [_spread(column["regret"], 3), _spread(column["training"])]
            rest += [_spread(column["exchanged"])]
            rows.append([env, experiment.name(label), _seeds(by_seed), both, *rest])
    return _table(header, rows)


def common_tasks(experiment: Experiment, group: Group) -> list[str]:
    """The tasks that every method of the group has runs of."""
    sets = [set(experiment.runs[label]) for label in group.labels]
    return sorted(set.intersection(*sets)) if sets else []


def _values(
    experiment: Experiment, label: str, tasks: Sequence[str], measure: str
) -> list[dict]:
    """Per task: seed -> a measure of the run."""
    runs_of = experiment.runs[label]
    return [
        {seed: measures(r)[measure] for seed, r in sorted(runs_of[env].items())}
        for env in tasks
    ]


def _values_of_all(
    experiment: Experiment, group: Group, tasks: Sequence[str], measure: str
) -> dict[str, list[dict]]:
    """`_values` of every method of the group; empty if a run lacks the measure."""
    found = {x: _values(experiment, x, tasks, measure) for x in group.labels}
    lacking = any(None in s.values() for scores in found.values() for s in scores)
    return {} if lacking else found


def aggregate_table(
    experiment: Experiment, group: Group, tasks: Sequence[str], measure: str = "after"
) -> str:
    """Over the common tasks: IQM, difference to the baseline, probability of improvement.

    Empty if a run lacks the measure.
    """
    base = group.baseline
    found = _values_of_all(experiment, group, tasks, measure)
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
            row += ["–", "–", "–"] if label == base else _against(scores, found[base])
        rows.append(row)
    return _table(header, rows)


def _paired(
    scores: Sequence[Mapping], reference: Sequence[Mapping]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per task the values of both for the seeds that both have."""
    x, y = [], []
    for mine, theirs in zip(scores, reference, strict=True):
        seeds = sorted(mine.keys() & theirs.keys())
        x.append(np.array([mine[s] for s in seeds]))
        y.append(np.array([theirs[s] for s in seeds]))
    return x, y


def _against(scores: Sequence[Mapping], reference: Sequence[Mapping]) -> list[str]:
    """Cells on the difference to the baseline; paired by the seeds that both have."""
    x, y = _paired(scores, reference)
    all_x = [np.array(list(s.values())) for s in scores]
    all_y = [np.array(list(s.values())) for s in reference]
    chance = _interval(stats.probability_of_improvement(all_x, all_y), 2)
    if not all(len(v) for v in x):
        return ["no common seeds", chance, "cannot be told"]
    estimate = stats.mean_difference(x, y)
    verdict = "inside the interval"
    if math.isnan(estimate.low):
        verdict = "cannot be told: one seed"
    elif estimate.low > 0:
        verdict = "better"
    elif estimate.high < 0:
        verdict = "worse"
    return [_interval(estimate), chance, verdict]


def settings_table(experiment: Experiment, group: Group) -> str:
    """The settings in which the group's methods differ; several values: one per task."""
    configs: dict[str, dict[str, list]] = {}
    for label in group.labels:
        for by_seed in experiment.runs[label].values():
            record = next(iter(by_seed.values()))
            fields = {"algorithm": record["algorithm"], **flat(record["config"])}
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
        records = [r for by_seed in tasks.values() for r in by_seed.values()]
        seeds = {r["seed"]: r for r in records}
        data = {(r["dataset"]["label"], r["dataset"]["rows"]) for r in records}
        machines = set()
        for r in records:
            gpu = f", {r['machine']['gpu']}" if r["machine"]["gpu"] else ""
            machines.add(
                f"{r['machine']['processor']}, {r['machine']['cores']} cores{gpu}"
            )
        commits = sorted({_short(r["commit"]) for r in records})
        rows.append(
            [
                f"`{label}`",
                str(len(tasks)),
                _seeds(seeds),
                "; ".join(sorted({d[0] for d in data})),
                ", ".join(sorted({f"{d[1]:,}" for d in data})),
                ", ".join(commits),
                "; ".join(sorted(machines)),
                _spread([r["updates_per_second"] for r in records], 0),
            ]
        )
    return _table(header, rows)


def _short(commit: str) -> str:
    return commit[:9] + ("+dirty" if commit.endswith("+dirty") else "")


def scores_csv(experiment: Experiment) -> str:
    """A row per run, for other people's analysis; raw episode returns are in runs/."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("before", "after", "last", "best", "regret", "training", "exchanged")
    head = ["label", "env", "seed", *names, "dataset_source", "dataset_sha256", "commit"]
    writer.writerow(head)
    for label, tasks in sorted(experiment.runs.items()):
        for env, by_seed in sorted(tasks.items()):
            for seed, record in sorted(by_seed.items()):
                found = measures(record)
                numbers = ["" if found[n] is None else f"{found[n]:.6g}" for n in names]
                data = record["dataset"]
                row = [label, env, seed, *numbers, data["source"], data["sha256"]]
                writer.writerow([*row, record["commit"]])
    return out.getvalue()


# ---------------------------------------------------------------- report


def write_report(folder: Path | str) -> list[Path]:
    """Write README.md, scores.csv and figures/ of an experiment; returns the files.

    The figures folder belongs to the report: pictures of an earlier one are removed.
    """
    experiment = read_experiment(folder)
    pictures: dict[str, bytes] = {}
    text = [f"# {experiment.title}\n"]
    if experiment.note:
        text.append(experiment.note + "\n")
    text.append(_data_note(experiment))
    for group in experiment.groups:
        text.append(_group_section(experiment, group, pictures))
    text.append(_snapshot_section(experiment, pictures))
    text.append("## Where the numbers come from\n\n" + provenance_table(experiment))
    text.append(
        "Raw returns of every evaluation episode, settings and versions: `runs/`. One row per "
        "run: `scores.csv`. This page, that file and `figures/` are written by `make report`.\n"
    )
    files = {"README.md": "\n".join(t for t in text if t).encode()}
    files["scores.csv"] = scores_csv(experiment).encode()
    files.update({f"figures/{name}.png": data for name, data in pictures.items()})
    for name, data in files.items():
        write_atomic(experiment.folder / name, data)
    for old in experiment.folder.glob("figures/*.png"):
        if old.stem not in pictures:
            old.unlink()
    return [experiment.folder / name for name in files]


def _data_labels(experiment: Experiment, labels: Iterable[str]) -> list[str]:
    return sorted(
        {
            record["dataset"]["label"]
            for label in labels
            for by_seed in experiment.runs[label].values()
            for record in by_seed.values()
        }
    )


def _data_note(experiment: Experiment) -> str:
    labels = _data_labels(experiment, experiment.runs)
    records = [
        r
        for tasks in experiment.runs.values()
        for s in tasks.values()
        for r in s.values()
    ]
    note = f"Data: **{'; '.join(labels)}**. "
    if any(r["dataset"]["source"] == "self-collected" for r in records):
        note += (
            "Scores use D4RL's scale, but those on self-collected data are not D4RL scores and "
            "compare with nothing outside this page. "
        )
    episodes = sorted({len(r["evaluations"][0]["returns"]) for r in records})
    note += f"Episodes per evaluation: {', '.join(map(str, episodes))}.\n"
    return note


def _group_section(
    experiment: Experiment, group: Group, pictures: dict[str, bytes]
) -> str:
    text = [f"## {group.title}\n"]
    if group.note:
        text.append(group.note + "\n")
    if group.missing:
        text.append(f"No runs yet of: {', '.join(group.missing)}.\n")
    if not group.labels:
        return "\n".join(text)
    text.append(task_table(experiment, group))
    text.append(
        "Before: last offline evaluation. After: mean of the last four online evaluations. "
        "Regret: mean of 1 − score/100 over the online evaluations. Training: mean score of the "
        "training episodes, which sample their actions. Mean ± standard deviation over seeds. "
        f"{_same_start(experiment, group)}\n"
    )
    tasks = common_tasks(experiment, group)
    if tasks and len(group.labels) > 1:
        tables = [aggregate_table(experiment, group, tasks, x) for x in MEASURES]
        text.extend(table for table in tables if table)
        text.append(
            f"Over {_plural(len(tasks), 'task')} that all of them ran. IQM and P: stratified "
            "bootstrap over runs, too narrow for few seeds. Difference: paired by seed, mean "
            "over tasks, Student's interval; not corrected for the number of comparisons.\n"
        )
    for name, picture, alt in _group_figures(experiment, group, tasks):
        pictures[name] = picture
        text.append(f"![{alt}](figures/{name}.png)\n")
    settings = settings_table(experiment, group)
    if settings:
        text.append("What differs between them:\n\n" + settings)
    return "\n".join(text)


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


def _group_figures(
    experiment: Experiment, group: Group, tasks: Sequence[str]
) -> Iterable[tuple[str, bytes, str]]:
    """(file name, PNG, description) of a group's figures."""
    slug = group.slug
    names = [experiment.name(label) for label in group.labels]
    data = "; ".join(_data_labels(experiment, group.labels))
    learning: dict[str, dict] = {}
    exchanged: dict[str, dict] = {}
    training: dict[str, dict] = {}
    efficiency: dict[str, dict] = {"": {}}
    for label, name in zip(group.labels, names, strict=True):
        for env, by_seed in sorted(experiment.runs[label].items()):
            records = [r for _, r in sorted(by_seed.items())]
            curve = _mean_curve(*learning_curves(records))
            learning.setdefault(env, {})[name] = curve
            counts = _metric_curves(records, "exchanged")
            if counts is not None:
                exchanged.setdefault(env, {})[name] = _mean_curve(*counts)
            episodes = _metric_curves(records, "train_score")
            if episodes is not None:
                training.setdefault(env, {})[name] = _mean_curve(*_tenths(*episodes))
        curves = [
            learning_curves([r for _, r in sorted(experiment.runs[label][env].items())])
            for env in tasks
        ]
        if curves and all(np.array_equal(c[0], curves[0][0]) for c in curves):
            estimate = stats.aggregate_iqm([values for _, values in curves])
            efficiency[""][name] = figures.Curve(curves[0][0], *estimate)
    differences = _differences(experiment, group, tasks)
    if differences:
        one = f"{tasks[0]}, marks: seeds"
        many = f"mean of {len(tasks)} tasks, marks: seeds of each"
        yield (
            f"{slug}-differences",
            figures.difference_panels(
                differences,
                names,
                f"points above {experiment.name(group.baseline)}",
                f"95 % intervals; {many if len(tasks) > 1 else one}\ndata: {data}",
            ),
            f"differences, {group.title}",
        )
    band = f"mean, band ± standard deviation over seeds\ndata: {data}"
    yield (
        f"{slug}-learning",
        figures.curve_panels(
            dict(sorted(learning.items())), names, BUDGET, "normalized score", band
        ),
        f"learning curves, {group.title}",
    )
    if len(tasks) > 1 and efficiency[""]:
        band = f"IQM over {len(tasks)} tasks, 95 % bootstrap band\ndata: {data}"
        yield (
            f"{slug}-efficiency",
            figures.curve_panels(
                efficiency, names, BUDGET, "normalized score (IQM)", band
            ),
            f"sample efficiency, {group.title}",
        )
    if training:
        band = f"mean of tenths, band ± standard deviation over seeds\ndata: {data}"
        yield (
            f"{slug}-training",
            figures.curve_panels(
                dict(sorted(training.items())),
                names,
                BUDGET,
                "score of training episodes",
                band,
            ),
            f"training episodes, {group.title}",
        )
    if exchanged:
        band = f"mean, band ± standard deviation over seeds\ndata: {data}"
        yield (
            f"{slug}-exchanged",
            figures.curve_panels(
                dict(sorted(exchanged.items())),
                names,
                BUDGET,
                "pairs exchanged per batch",
                band,
                from_zero=True,
            ),
            f"exchange counts, {group.title}",
        )


def _differences(
    experiment: Experiment, group: Group, tasks: Sequence[str]
) -> dict[str, dict[str, figures.Difference]]:
    """Measure -> method -> its difference to the group's baseline; empty if there is none."""
    if group.baseline is None or len(group.labels) < 2 or not tasks:
        return {}
    panels: dict[str, dict[str, figures.Difference]] = {}
    for measure, title in MEASURES.items():
        found = _values_of_all(experiment, group, tasks, measure)
        for label in found:
            x, y = _paired(found[label], found[group.baseline])
            if label != group.baseline and all(map(len, x)):
                runs_of = np.concatenate([a - b for a, b in zip(x, y, strict=True)])
                estimate = stats.mean_difference(x, y)
                panels.setdefault(title, {})[experiment.name(label)] = (
                    figures.Difference(*estimate, runs_of)
                )
    return panels


def _snapshot_section(experiment: Experiment, pictures: dict[str, bytes]) -> str:
    """A picture of each method's lowest seed per task, and one table of all."""
    text = []
    for (label, env), records in _snapshots(experiment).items():
        record = records[0]
        name = f"snapshot-{label}-{env}-s{record['seed']}"
        pictures[name] = _snapshot_picture(record, experiment.name(label))
        text.append(f"![{label}, {env}, seed {record['seed']}](figures/{name}.png)\n")
    if not text:
        return ""
    text.append(advantage_table(experiment))
    return "## Samples at the end of a run\n\n" + "\n".join(text)


def _snapshots(experiment: Experiment) -> dict[tuple[str, str], list[Mapping]]:
    """(label, env) -> the records that have a snapshot, by seed."""
    found: dict[tuple[str, str], list[Mapping]] = {}
    for label, tasks in sorted(experiment.runs.items()):
        for env, by_seed in sorted(tasks.items()):
            for _, record in sorted(by_seed.items()):
                if "snapshot" in record:
                    found.setdefault((label, env), []).append(record)
    return found


def advantage_table(experiment: Experiment) -> str:
    """Which rows the exchange moves, by their advantage; empty when no snapshot has it."""
    rows = []
    for (label, env), records in _snapshots(experiment).items():
        for record in records:
            groups = record["snapshot"].get("advantages")
            if groups:
                cells = [
                    "–"
                    if group["advantage"] is None
                    else f"{group['advantage']:.2f} ({_number(group['weight'])})"
                    for group in groups.values()
                ]
                told_apart = f"{record['snapshot']['scores']['auc']:.2f}"
                about = [experiment.name(label), env, str(record["seed"]), told_apart]
                rows.append([*about, *cells])
    if not rows:
        return ""
    header = ["method", "task", "seed", "AUC", "offline, stays", "offline, moved"]
    return (
        _table([*header, "online, stays", "online, moved"], rows)
        + "\nAUC: how often the score of an online row is above that of an offline one. Then the "
        "mean advantage of the drawn rows that the threshold rule would leave in their half "
        "and of those that it would exchange, whatever the run's own rule; in brackets their mean "
        "weight in IQL's policy loss.\n"
    )


def _snapshot_picture(record: Mapping, name: str) -> bytes:
    snapshot = record["snapshot"]
    online = snapshot["step"] - record["config"]["offline_iterations"]
    title = f"{name} on {record['env']}, seed {record['seed']}, online step {online:,}"
    caption = (
        f"{snapshot['rows']:,} rows of each buffer\ndata: {record['dataset']['label']}"
    )
    return figures.snapshot_panels(snapshot, title, caption)


# ---------------------------------------------------------------- command line


def _figures_command(folder: Path) -> None:

    snapshot = take_snapshot(folder)
    write_atomic(folder / "snapshot.json", dump_json(snapshot).encode())
    record = read_run(folder)
    picture = _snapshot_picture(record, record["label"])
    write_atomic(folder / "snapshot.png", picture)
    print(machine.tidy_path(folder / "snapshot.png"))


def command_line(argv: Sequence[str] | None = None) -> None:
    """`python -m experiments.report add | figures | write`; errors are one line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="copy finished runs into the store")
    adding.add_argument("runs", nargs="+", help="run folders")
    adding.add_argument("--to", required=True, help="results/EXPERIMENT")
    adding.add_argument(
        "--as", dest="label", help="name of the method; default: config's"
    )
    drawing = commands.add_parser("figures", help="draw the samples of runs (Fig. 1)")
    drawing.add_argument("runs", nargs="+", help="run folders")
    writing = commands.add_parser("write", help="tables and figures of stored runs")
    writing.add_argument(
        "results", nargs="?", default="results", help="default: results"
    )
    args = parser.parse_args(argv)
    try:
        if args.command == "add":
            for path in add(args.runs, args.to, args.label):
                print(machine.tidy_path(path))
        elif args.command == "figures":
            for folder in args.runs:
                _figures_command(Path(folder))
        else:
            _write_command(Path(args.results))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def _write_command(results: Path) -> None:
    """All experiments below `results`, or `results` itself if it is one."""
    folders = [results] if (results / "runs").is_dir() else []
    found = [p for p in results.glob("*/runs") if p.is_dir()]
    folders += sorted({p.parent for p in [*found, *results.glob("*/experiment.yaml")]})
    if not folders:
        raise ValueError(f"{results} holds no experiment (no folder with stored runs)")
    for folder in folders:
        written = write_report(folder)
        print(f"{machine.tidy_path(folder / 'README.md')} and {len(written) - 1} files")


if __name__ == "__main__":
    command_line()
