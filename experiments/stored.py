"""The form of a stored run, `results/EXPERIMENT/runs/LABEL/ENV-sSEED.json`, and its check.

A file may hold more than is named here; what is named is read by the tables and figures.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from corl import tasks
from corl.drop import SWITCH
from experiments.values import check_form

# Version of the form of a stored run.
FORMAT = 1
# What a label may be, and a task as a part of a file's name.
NAME = r"\w[\w.,+=-]*"


class Evaluation(TypedDict):
    """One evaluation: raw returns of its episodes, and their scores.

    Where nothing is normalized, the scores are the returns. An evaluation at the switch has a
    number of episodes of its own.
    """

    phase: Literal["offline", "switch", "online"]
    step: int
    returns: list[float]
    scores: list[float]


class Dataset(TypedDict):
    """The data of a run."""

    label: str
    source: str
    sha256: str
    rows: int


class Machine(TypedDict):
    """Where a run was made."""

    processor: str | None
    cores: int | None
    gpu: str | None


class Counts(TypedDict):
    """Counts in bins of offline and of online rows."""

    edges: list[float]
    offline: list[int]
    online: list[int]


class ActionError(Counts):
    """Squared differences of the policy's action and the row's."""

    offline_mean: float
    online_mean: float


class Scores(Counts):
    """Alignment scores."""

    kind: str
    auc: float
    separation_point: float


class Projection(TypedDict):
    """Points of both buffers in the plane, and the shares of the variance."""

    offline: list[list[float]]
    online: list[list[float]]
    variance: list[float]


class Advantage(TypedDict):
    """Means over a group of rows."""

    advantage: float | None
    weight: float | None


class Snapshot(TypedDict):
    """What `experiments.snapshot` returns."""

    step: int
    rows: int
    scores: Scores | None
    advantages: dict[str, Advantage] | None
    action_error: ActionError
    projection: Projection


class _Later(TypedDict, total=False):
    """What runs of older versions do not have."""

    score_unit: str
    snapshot: Snapshot
    training: float | None
    cpu_seconds: float
    stacked: int
    generator_share: float
    warnings: list[str]
    caveat: str


class StoredRun(_Later):
    """A stored run.

    score_unit: the label of its `scale_of`; D4RL's where it is missing.
    before: the evaluation at the switch, else the last one of the offline model, where it is known.
    training: mean score of the training episodes over the online phase.
    stacked: seeds that shared a process; such a run has no CPU time of its own.
    generator_share: arithmetic of a generator of rows, as a share of what its paper spends.
    warnings: lines that the run printed as warnings, in their order.
    caveat: what must be known of the method: a word, a colon and why.
    """

    label: str
    algorithm: str
    env: str
    seed: int
    commit: str
    dataset: Dataset
    machine: Machine
    versions: dict[str, str]
    config: dict[str, Any]
    before: Evaluation | None
    evaluations: list[Evaluation]
    metrics: dict[str, list[float | None]]
    updates: int
    updates_per_second: float
    wall_seconds: float


def check_stored(record: Mapping[str, Any]) -> None:
    """Raise where the tables and figures of a page could not be made of a stored run.

    Raises:
        ValueError: one line that names the place in the record.
    """
    check_form(record, StoredRun, "")
    names = {"label": record["label"], "env": tasks.file_name(record["env"])}
    for field, name in names.items():
        if not re.fullmatch(NAME, name):
            raise ValueError(f"{field} {record[field]!r} is no part of a file name")
    scale_of(record)
    if not 0 <= record["seed"] < 2**32:
        raise ValueError(f"seed is {record['seed']}")
    check_form(
        record["config"].get("offline_iterations"), int, "config.offline_iterations"
    )
    _check_evaluations(record)
    metrics = record["metrics"]
    for name, values in metrics.items():
        if len(values) != len(metrics.get("step", ())):
            raise ValueError(f"metrics.{name} has another length than metrics.step")
    if None in metrics.get("step", ()):
        raise ValueError("metrics.step lacks a step")
    if "snapshot" in record:
        _check_snapshot(record["snapshot"])


def scale_of(record: Mapping[str, Any]) -> tasks.Scale:
    """What the scores of a stored run, or of a `summary.json`, are told in.

    Raises:
        ValueError: its `score_unit` is none that we know.
    """
    scales = {scale.label: scale for scale in tasks.SCALES}
    unit = record.get("score_unit", tasks.D4RL.label)
    if unit not in scales:
        raise ValueError(f"score_unit {unit!r} is not one of {', '.join(scales)}")
    return scales[unit]


def _check_evaluations(record: Mapping[str, Any]) -> None:
    found = record["evaluations"]
    if not any(entry["phase"] == "online" for entry in found):
        raise ValueError("evaluations lacks an online one")
    first = next(entry for entry in found if entry["phase"] != SWITCH)
    for i, entry in enumerate(found):
        count = len((entry if entry["phase"] == SWITCH else first)["returns"])
        same = count, count
        if not entry["returns"] or (len(entry["returns"]), len(entry["scores"])) != same:
            raise ValueError(
                f"evaluations[{i}] has {len(entry['returns'])} returns and "
                f"{len(entry['scores'])} scores, the first has {same[0]}"
            )
    if record["before"] is not None and not record["before"]["scores"]:
        raise ValueError("before.scores is empty")


def _check_snapshot(snapshot: Mapping[str, Any]) -> None:
    for name in ("scores", "action_error"):
        counts = snapshot[name]
        for half in ("offline", "online") if counts is not None else ():
            if len(counts[half]) + 1 != len(counts["edges"]) or not counts[half]:
                raise ValueError(f"snapshot.{name}.{half} does not fit its edges")
    projection = snapshot["projection"]
    points = [projection["offline"], projection["online"]]
    if len(points[0]) != len(points[1]) or len(projection["variance"]) != 2:
        raise ValueError("snapshot.projection has halves of different sizes")
    if any(len(point) != 2 for half in points for point in half):
        raise ValueError("snapshot.projection has a point that is not in the plane")
    if snapshot["advantages"] is not None and snapshot["scores"] is None:
        raise ValueError("snapshot has advantages, but no scores")
