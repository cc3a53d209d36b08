"""An experiment: a folder of stored runs, and how `experiment.yaml` groups and names them.

docs/report.md explains that file.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from corl.layers import read_yaml
from corl.tasks import Scale
from experiments.plan import planned_cells, read_sweep
from experiments.programs import ROOT
from experiments.store import (
    check_rules,
    check_scale,
    check_settings,
    online_steps,
    read_store,
)

EXPERIMENT_FIELDS = {
    "title": str,
    "note": str,
    "baseline": str,
    "names": dict,
    "groups": list,
    "sweep": str,
}
GROUP_FIELDS = {
    "title": str,
    "note": str,
    "labels": list,
    "baseline": str,
    "contrasts": list,
    "costs": bool,
}


# Settings that decide what an evaluation's number means.
SAME_SETTINGS = ("eval_seed", "horizon", "ref_min_score", "ref_max_score")


class Group(NamedTuple):
    """Methods that are compared: one set of tables and figures."""

    title: str
    note: str
    labels: tuple[str, ...]  # those that have runs
    missing: tuple[str, ...]  # those that have none yet
    baseline: str | None
    # Pairs of methods, (one, other), whose difference was chosen before the runs.
    contrasts: tuple[tuple[str, str], ...] = ()
    # Only what they cost is shown, and no score.
    costs: bool = False

    @property
    def slug(self) -> str:
        """What its figures' names begin with."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "group"


class Experiment(NamedTuple):
    """A folder of results.

    runs: label -> task -> seed -> stored run.
    planned: (label, task, seed) of the cells of its sweep; empty where it names none.
    scale: what all its runs are told in.
    """

    folder: Path
    title: str
    note: str
    names: dict[str, str]
    groups: list[Group]
    runs: dict[str, dict[str, dict[int, dict]]]
    planned: list[tuple[str, str, int]]
    scale: Scale

    def name(self, label: str) -> str:
        """What tables and figures call a method, with the word of its caveat."""
        known = [label] if label in self.runs else []
        caveats = {r["caveat"] for r in self.records(known) if "caveat" in r}
        words = sorted({caveat.split(":")[0] for caveat in caveats})
        return " ".join([self.names.get(label, label), *(f"({w})" for w in words)])

    def records(self, labels: Iterable[str]) -> Iterator[Mapping]:
        """The stored runs of some methods, by task and seed."""
        for label in labels:
            for _, by_seed in sorted(self.runs[label].items()):
                for _, record in sorted(by_seed.items()):
                    yield record

    def data_labels(self, labels: Iterable[str]) -> list[str]:
        """What the data of some methods' runs is called."""
        return sorted({record["dataset"]["label"] for record in self.records(labels)})


def read_experiment(folder: Path | str) -> Experiment:
    """An experiment's stored runs and how `experiment.yaml` groups them.

    Without that file all labels are one group, compared with the first. Where it names a sweep,
    there need not be any runs yet.

    Raises:
        ValueError: no runs, unknown fields, or runs of a group that cannot be compared.
    """
    folder = Path(folder)
    records = read_store(folder)
    file = folder / "experiment.yaml"
    values = _read_fields(file)
    if not records and not values.get("sweep"):
        raise ValueError(
            f"{folder} holds no runs; put some in with `add RUN --to {folder}`"
        )
    check_settings(records)
    scale = check_scale(records, folder)
    runs: dict[str, dict[str, dict[int, dict]]] = {}
    for r in records:
        runs.setdefault(r["label"], {}).setdefault(r["env"], {})[r["seed"]] = r
    groups: list[Group] = []
    mentioned: set[str] = set()
    everything = {"title": "All methods", "labels": sorted(runs)}
    for entry in values.get("groups") or [everything]:
        group = _read_group(entry, values, runs, file)
        if group.slug in [other.slug for other in groups]:
            raise ValueError(
                f"{file}: group {group.title!r}: another group's figures have the name "
                f"{group.slug}, too; give them titles that differ in letters a-z or digits"
            )
        groups.append(group)
        mentioned |= {*group.labels, *group.missing}
        # Costs compare, whatever the evaluations were.
        if not group.costs:
            _check_comparable(group.title, {x: runs[x] for x in group.labels})
    if values.get("baseline") and values["baseline"] not in mentioned:
        raise ValueError(f"{file}: baseline {values['baseline']} is in no group")
    note = (values.get("note") or "").strip()
    title = values.get("title") or folder.name
    names = values.get("names") or {}
    planned = _planned(values, file)
    return Experiment(folder, title, note, names, groups, runs, planned, scale)


def _planned(values: Mapping, file: Path) -> list[tuple[str, str, int]]:
    """The cells of the sweep that is named, a file of the repository."""
    if not values.get("sweep"):
        return []
    try:
        return planned_cells(read_sweep(ROOT / values["sweep"]))
    except ValueError as error:
        raise ValueError(f"{file}: sweep: {error}") from None


def _read_fields(file: Path) -> dict[str, Any]:
    """The fields of experiment.yaml, checked; {} where there is none."""
    values = read_yaml(file) if file.is_file() else {}
    _check_fields(values, EXPERIMENT_FIELDS, str(file))
    return values


def _read_group(entry: Any, values: Mapping, runs: Mapping, file: Path) -> Group:
    """One entry of `groups`; what it does not say is taken from the whole file's values."""
    _check_fields(entry, GROUP_FIELDS, f"{file}: a group")
    if not entry.get("title") or not entry.get("labels"):
        raise ValueError(f"{file}: a group needs a title and labels")
    where = f"{file}: group {entry['title']!r}"
    labels = [str(label) for label in entry["labels"]]
    if entry.get("baseline") and entry["baseline"] not in labels:
        raise ValueError(f"{where}: baseline {entry['baseline']} is not in labels")
    names = values.get("names") or {}
    shown = [names.get(label, label) for label in labels]
    if len(set(shown)) < len(shown):
        raise ValueError(f"{where}: two labels have the same name; see names")
    contrasts = entry.get("contrasts") or []
    for pair in contrasts:
        if not isinstance(pair, list) or len(pair) != 2 or not set(pair) <= set(labels):
            raise ValueError(
                f"{where}: contrasts must be pairs of its labels, like [a, b], not {pair!r}"
            )
    present = tuple(label for label in labels if label in runs)
    baseline = entry.get("baseline") or values.get("baseline") or labels[0]
    return Group(
        entry["title"],
        (entry.get("note") or "").strip(),
        present,
        tuple(label for label in labels if label not in runs),
        baseline if baseline in present else None,
        tuple((one, other) for one, other in contrasts),
        bool(entry.get("costs")),
    )


def _check_fields(values: Any, fields: Mapping[str, type], where: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold `field: value` lines")
    for name, value in values.items():
        if name not in fields:
            raise ValueError(
                f"{where}: unknown field {name}; known: {', '.join(fields)}"
            )
        kind = fields[name]
        if value is not None and not isinstance(value, kind):
            word = {str: "text", list: "a list", dict: "a block", bool: "true or false"}[
                kind
            ]
            raise ValueError(f"{where}: {name} must be {word}, not {value!r}")
        if kind is dict and any(not isinstance(v, str) for v in (value or {}).values()):
            raise ValueError(f"{where}: {name} must give each label a text")


def _check_comparable(title: str, tree: Mapping[str, Mapping[str, Mapping]]) -> None:
    """Same data, same evaluations: what a comparison on a task takes for granted."""
    records = [r for t in tree.values() for seeds in t.values() for r in seeds.values()]
    check_rules(records, f"group {title!r}")
    first: dict[str, tuple] = {}
    for label, tasks in tree.items():
        for env, by_seed in tasks.items():
            for record in by_seed.values():
                online = [e for e in record["evaluations"] if e["phase"] == "online"]
                facts = {
                    "the data (sha256)": record["dataset"]["sha256"][:12],
                    "the evaluations' steps": online_steps(record),
                    "episodes per evaluation": len(online[0]["returns"]),
                    **{name: record["config"].get(name) for name in SAME_SETTINGS},
                }
                other, theirs = first.setdefault(env, (label, facts))
                for name, value in facts.items():
                    if value != theirs[name]:
                        raise ValueError(
                            f"group {title!r}, {env}: {name} of {label} and {other} differ "
                            f"({value} and {theirs[name]}); put them in different groups"
                        )
