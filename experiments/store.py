"""Stored runs: what a publication needs out of finished run folders, as small text files.

`results/EXPERIMENT/runs/LABEL/ENV-sSEED.json` holds raw episode returns, thinned metrics, settings
and provenance of one run. A label is one method. docs/report.md says what is refused, and why.
"""

import csv
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from corl import files, rewards, tasks
from corl.config import FinetuneConfig
from corl.curves import read_csv
from corl.drop import SWITCH
from corl.layers import expand, read_yaml
from corl.summary import training_score
from experiments import stats
from experiments.stored import FORMAT, NAME, Machine, Snapshot, check_stored, scale_of
from experiments.values import check_form, dump_json, flatten, plain, read_json

# Points of a metric's stored curve, at most.
POINTS = 100
# Columns of metrics.csv that are stored, of those that a run has. The first rows are what DARE
# says of its exchange and its energy network. Kept as a list of names: a stored run must stay the
# same text when a file logs one number more.
METRICS = (
    *("exchanged", "separation_point", "candidates_off", "candidates_on"),
    *("score_off_mean", "score_off_std", "score_on_mean", "score_on_std"),
    *("amplitude_before", "amplitude_after", "inverted", "refused"),
    *("references_clipped", "energy_loss"),
    *("weight_mean", "weight_zeros", "weight_ones", "conservative_loss"),
    *("em_share_off", "em_share_on", "em_statistic"),
    *("q_loss", "value_loss", "actor_loss", "policy_loss"),
    *("success_rate", "train_score"),
)
# Config fields that are not stored as settings of the method. A stored run says elsewhere which
# task, seed, data and offline model it is of, so runs that differ in these share a label; to a
# sweep's plan they are different cells, so its list is shorter: bookkeeping alone.
NOT_SETTINGS = FinetuneConfig.BOOKKEEPING | {
    *("dataset_path", "env", "load_model", "log_freq", "seed"),
}
# Numbers of the summary that not every run has: older runs, other algorithms.
LATER = ("cpu_seconds", "generator_share")
# What to do about a damaged one.
STORED_AGAIN = (
    "take it from git, or remove it and add the run again (experiments.report add)"
)
# What a finished run's files hold in any case: file -> fields.
REQUIRED = {
    "summary.json": (
        *("algorithm", "env", "machine", "versions", "score_final"),
        *("updates", "updates_per_second", "wall_seconds"),
    ),
    "config.yaml": ("name", "offline_iterations"),
}


class Summary(TypedDict, total=False):
    """What is read of a finished run's `summary.json`."""

    algorithm: str
    env: str
    machine: Machine
    versions: dict[str, str]
    score_unit: str
    score_final: float | None
    updates: int
    updates_per_second: float
    wall_seconds: float
    cpu_seconds: float
    stacked: int
    generator_share: float | None
    caveat: str
    offline_run: str | None
    warnings: list[str]


class RunConfig(TypedDict, total=False):
    """What is read of its `config.yaml`."""

    name: str
    offline_iterations: int


# ---------------------------------------------------------------- from a run folder


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
    summary = read_json(
        folder / "summary.json",
        "the run is not finished; resume it, which writes it",
        form=Summary,
    )
    config = read_yaml(folder / "config.yaml")
    _naming(folder / "config.yaml", check_form, config, RunConfig, "")
    data = _check_provenance(folder, summary, config)
    label = label or str(config["name"])
    if not re.fullmatch(NAME, label):
        raise ValueError(
            f"label {label!r} must be letters, digits and . , _ + = -, no sign first; give "
            "another one with --as"
        )
    scale = _naming(folder / "summary.json", scale_of, summary)
    evaluations = _read_evaluations(folder / "evaluations.csv", scale)
    _check_final_score(folder, evaluations, summary)
    settings = {k: v for k, v in config.items() if k not in NOT_SETTINGS}
    switch = config["offline_iterations"]
    record = {
        "format": FORMAT,
        "label": label,
        **{name: summary[name] for name in ("algorithm", "env", "seed", "commit")},
        **({} if scale is tasks.D4RL else {"score_unit": scale.label}),
        "dataset": data,
        "machine": summary["machine"],
        "versions": summary["versions"],
        "config": plain(settings),
        "before": _before(evaluations, _offline_runs(summary, config), scale),
        "evaluations": evaluations,
        "training": _training(folder / "metrics.csv"),
        "metrics": _thin_metrics(folder / "metrics.csv", switch, _metric_names(scale)),
        "updates": summary["updates"],
        "updates_per_second": _digits(summary["updates_per_second"]),
        "wall_seconds": _digits(summary["wall_seconds"]),
    }
    for name in LATER:
        if summary.get(name) is not None:
            record[name] = _digits(summary[name])
    if "stacked" in summary:
        record["stacked"] = summary["stacked"]
    if summary.get("warnings"):
        record["warnings"] = summary["warnings"]
    if "caveat" in summary:
        record["caveat"] = summary["caveat"]
    if (folder / "snapshot.json").is_file():
        record["snapshot"] = read_json(
            folder / "snapshot.json",
            "draw it again with `python -m experiments.report figures`",
            form=Snapshot,
        )
    _naming(folder, check_stored, record)
    return record


def _naming(path: Path, check: Callable[..., Any], *values: Any) -> Any:
    """What a check returns; its error names the file or folder and what to do."""
    try:
        return check(*values)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); run it again") from None


def _check_provenance(folder: Path, summary: Mapping, config: Mapping) -> dict[str, Any]:
    """What the summary says of the dataset, without its path; a run nobody could repeat raises."""
    for file, values in (("summary.json", summary), ("config.yaml", config)):
        for name in REQUIRED[file]:
            if name not in values:
                raise ValueError(f"{folder / file} lacks {name}; run it again")
    data = summary.get("dataset")
    if not isinstance(data, dict):
        data = {}
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
    return {name: value for name, value in data.items() if name != "path"}


def _check_final_score(folder: Path, evaluations: list[dict], summary: Mapping) -> None:
    """The evaluations must be those that the summary was made of."""
    scores = [np.mean(e["scores"]) for e in evaluations if e["phase"] == "online"]
    if not scores:
        raise ValueError(
            f"{folder} has no online evaluation; there is nothing to compare"
        )
    final = stats.final_score(scores)
    if summary["score_final"] is None:
        raise ValueError(f"{folder}: summary.json has no score_final; run it again")
    if not math.isclose(final, summary["score_final"], abs_tol=1e-6):
        raise ValueError(
            f"{folder}: evaluations.csv gives the final score {final:.3f}, summary.json says "
            f"{summary['score_final']:.3f}; one of them belongs to another run"
        )


def _read_evaluations(path: Path, scale: tasks.Scale) -> list[dict[str, Any]]:
    """Per evaluation its phase, step and raw episodes, in the order of the file."""
    score = "return" if scale is tasks.RAW else "score"
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    found: dict[tuple, dict[str, Any]] = {}
    try:
        columns = read_csv(path)
        names = ("phase", "step", "return", score)
        rows = list(zip(*(columns[n] for n in names), strict=True))
        for phase, step, total, score in rows:
            entry = {"phase": phase, "step": int(step), "returns": [], "scores": []}
            entry = found.setdefault((phase, int(step)), entry)
            entry["returns"].append(float(total))
            entry["scores"].append(float(score))
    except (OSError, KeyError, IndexError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}); run it again") from None
    for (phase, step), entry in found.items():
        if not np.isfinite(entry["returns"] + entry["scores"]).all():
            raise ValueError(
                f"{path}: {phase} step {step} has a return that is no number"
            )
    if len({len(e["returns"]) for e in found.values() if e["phase"] != SWITCH}) > 1:
        raise ValueError(f"{path}: evaluations have different numbers of episodes")
    return list(found.values())


def _offline_runs(summary: Mapping, config: Mapping) -> list[tuple[Path, float]]:
    """Folders where the run of the loaded model may be, and the step it was loaded at."""
    found = []
    if summary.get("offline_run"):  # a sweep says it
        found.append((expand(summary["offline_run"]), math.inf))
    if config.get("load_model"):
        file = expand(config["load_model"])
        number = re.fullmatch(r"checkpoint_(\d+)\.pt", file.name)
        step = int(number.group(1)) + 1 if number else math.inf
        for folder in (file.parent, file.parent / "run", file.parent.parent):
            found.append((folder, step))
    return found


def _before(
    evaluations: list[dict], sources: list, scale: tasks.Scale
) -> dict[str, Any] | None:
    """The evaluation of the offline model: of this run, or of the run it was loaded from."""
    if at_switch := [e for e in evaluations if e["phase"] == SWITCH]:
        return at_switch[-1]
    offline = [e for e in evaluations if e["phase"] == "offline"]
    for folder, step in sources:
        if not offline and (folder / "evaluations.csv").is_file():
            entries = _read_evaluations(folder / "evaluations.csv", scale)
            offline = [e for e in entries if e["phase"] == "offline"]
            offline = [e for e in offline if e["step"] <= step]
    return offline[-1] if offline else None


def _training(path: Path) -> float | None:
    """Mean score of the training episodes over the online phase, see `training_score`."""
    try:
        return training_score(read_csv(path))
    except (OSError, KeyError, IndexError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}); run it again") from None


def training_metric(scale: tasks.Scale) -> str:
    """The column of metrics.csv with the scores, or the returns, of training episodes."""
    return f"train_{scale.name}"


def _metric_names(scale: tasks.Scale) -> list[str]:
    own = {training_metric(tasks.D4RL): training_metric(scale)}
    return [own.get(name, name) for name in METRICS]


def _thin_metrics(path: Path, switch: int, names: Iterable[str]) -> dict[str, list]:
    """Means of the online rows in at most POINTS bins; `step` counts from the switch."""
    try:
        columns = read_csv(path)
        rows = [i for i, phase in enumerate(columns["phase"]) if phase == "online"]
        bins = np.array_split(rows, min(POINTS, len(rows))) if rows else []
        thin = {"step": [int(columns["step"][b[-1]]) - switch for b in bins]}
        curves = {n: [float(v or "nan") for v in columns.get(n, [])] for n in names}
    except (OSError, KeyError, IndexError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is damaged ({error}); run it again") from None
    for name, curve in curves.items():
        values = np.array(curve)
        values = np.where(np.isfinite(values), values, np.nan)
        parts = [values[b][np.isfinite(values[b])] for b in bins if len(values)]
        if any(len(p) for p in parts):
            thin[name] = [_digits(p.mean()) if len(p) else None for p in parts]
    return thin


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


# ---------------------------------------------------------------- the store


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
    check_scale({**stored, **new}.values(), experiment)
    for path, record in new.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, dump_json(record))
    return list(new)


def _store_path(experiment: Path, record: Mapping) -> Path:
    name = f"{tasks.file_name(record['env'])}-s{record['seed']}.json"
    return experiment / "runs" / record["label"] / name


def _identity(record: Mapping) -> str:
    return dump_json({k: record[k] for k in ("commit", "evaluations", "wall_seconds")})


def read_store(experiment: Path | str) -> list[dict[str, Any]]:
    """The stored runs of an experiment, by label, task and seed."""
    records = []
    for path in sorted(Path(experiment).glob("runs/*/*.json")):
        record = read_json(path, STORED_AGAIN)
        names = {name: str(record.get(name)) for name in ("label", "env", "seed")}
        if record.get("format") != FORMAT or path != _store_path(
            Path(experiment), names
        ):
            raise ValueError(
                f"{path} is no stored run of this place and format {FORMAT}; make it with "
                "`python -m experiments.report add`"
            )
        try:
            check_stored(record)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); {STORED_AGAIN}") from None
        records.append(record)
    return sorted(records, key=lambda r: (r["label"], r["env"], r["seed"]))


def return_rule(record: Mapping) -> str | None:
    """Where the return range that a stored run scaled by comes from; None if it scaled nothing.

    A run of before this was stored used upstream's rule, if its settings made it use any.
    """
    if "return_range" in record["dataset"]:
        found = record["dataset"]["return_range"]
        return found["rule"] if found else None
    config = flatten(record["config"])
    scaled = config.get("normalize_reward") or (
        config.get("dare.q_scale") == "returns" and config.get("dare.guidance_scale")
    )
    return rewards.UPSTREAM if scaled else None


def check_rules(records: Iterable[Mapping], where: str) -> None:
    """Runs that are shown together must scale by return ranges of one rule; else ValueError."""
    first: dict[str, Mapping] = {}
    for record in records:
        rule = return_rule(record)
        if rule is None:
            continue
        other = first.setdefault(record["env"], record)
        if return_rule(other) != rule:
            raise ValueError(
                f"{where}, {record['env']}: {record['label']} seed {record['seed']} scaled by a "
                f"return range of the rule {rule!r}, {other['label']} seed {other['seed']} by "
                f"{return_rule(other)!r}; run the older one again"
            )


def check_scale(records: Iterable[Mapping], folder: Path) -> tasks.Scale:
    """What all runs of an experiment are told in; of two kinds of numbers no page is made.

    Raises:
        ValueError: some are told in scores, others in returns or in scores of another kind.
    """
    first: dict[tasks.Scale, Mapping] = {}
    for record in records:
        first.setdefault(scale_of(record), record)
    if len(first) > 1:
        kinds = [f"{s.label} ({r['label']} on {r['env']})" for s, r in first.items()]
        raise ValueError(
            f"{folder}: runs told in {' and '.join(kinds)} cannot stand in one table; put them "
            "into different experiments, with another folder behind --to"
        )
    return next(iter(first), tasks.D4RL)


def check_settings(records: Iterable[Mapping]) -> None:
    """Runs that share label and task may differ in nothing but the seed; else ValueError."""
    records = list(records)
    for label in sorted({record["label"] for record in records}):
        check_rules((r for r in records if r["label"] == label), f"label {label}")
    first: dict[tuple, Mapping] = {}
    for record in records:
        other = first.setdefault((record["label"], record["env"]), record)
        mine, theirs = flatten(record["config"]), flatten(other["config"])
        for field in sorted(mine.keys() | theirs.keys()):
            if mine.get(field) != theirs.get(field):
                raise ValueError(
                    f"label {record['label']} on {record['env']}: {field} is "
                    f"{theirs.get(field)} for seed {other['seed']} and {mine.get(field)} for "
                    f"seed {record['seed']}; one label is one method, use --as"
                )


def online_steps(record: Mapping) -> list[int]:
    """Steps of a stored run's online evaluations, counted from the switch."""
    switch = record["config"]["offline_iterations"]
    return [e["step"] - switch for e in record["evaluations"] if e["phase"] == "online"]


def online_scores(record: Mapping) -> np.ndarray:
    """Mean scores (T,) of a stored run's online evaluations."""
    online = [e["scores"] for e in record["evaluations"] if e["phase"] == "online"]
    return np.array([np.mean(scores) for scores in online])
