"""The figures of an experiment's page: which numbers are drawn, under which names."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from corl.tasks import RAW, file_name
from experiments import figures, stats
from experiments.groups import Experiment, Group
from experiments.store import online_scores, online_steps, training_metric
from experiments.stored import scale_of
from experiments.tables import (
    MEASURES,
    averaged,
    paired,
    spread_over_runs,
    told,
    values_of_all,
)

BUDGET = "online environment steps"
# (curve's title in its panel) -> (method's name) -> curve
Panels = dict[str, dict[str, figures.Curve]]


def group_figures(
    experiment: Experiment, group: Group
) -> Iterator[tuple[str, bytes, str]]:
    """(file name, PNG, description) of a group's figures; one without numbers is left out."""
    yield from _difference_figures(experiment, group)
    yield from _curve_figures(experiment, group)


def _data_of(experiment: Experiment, group: Group) -> str:
    return "data: " + "; ".join(experiment.data_labels(group.labels))


def _difference_figures(
    experiment: Experiment, group: Group
) -> Iterator[tuple[str, bytes, str]]:
    """One over all tasks, or of raw returns one per task."""
    names = [experiment.name(label) for label in group.labels]
    for tasks in averaged(experiment, group):
        compared = differences(experiment, group, tasks)
        if not compared:
            continue
        one = f"{tasks[0]}, marks: seeds"
        many = f"mean of {len(tasks)} tasks, marks: seeds of each"
        caption = f"95 % intervals; {many if len(tasks) > 1 else one}\n"
        caption += _data_of(experiment, group)
        name, about = f"{group.slug}-differences", f"differences, {group.title}"
        unit = "points"
        if experiment.scale is RAW:
            name, about = f"{name}-{file_name(tasks[0])}", f"{about}, {tasks[0]}"
            unit = experiment.scale.name
        x_label = f"{unit} above {experiment.name(group.baseline)}"
        yield name, figures.difference_panels(compared, names, x_label, caption), about


def _curve_figures(
    experiment: Experiment, group: Group
) -> Iterator[tuple[str, bytes, str]]:
    scale = experiment.scale
    names = [experiment.name(label) for label in group.labels]
    data = _data_of(experiment, group)
    score = scale.label if scale is RAW else "normalized score"
    tasks = next(iter(averaged(experiment, group)), [])

    def by_task(curve: Callable[[Sequence[Mapping]], figures.Curve | None]) -> Panels:
        return task_panels(experiment, group, curve)

    band = "band ± standard deviation over seeds"
    for slug, panels, y_label, caption, about in (
        (
            "learning",
            by_task(learning_curve),
            score,
            f"mean, {band}",
            "learning curves",
        ),
        (
            "efficiency",
            efficiency_panel(experiment, group, tasks),
            f"{score} (IQM)",
            f"IQM over {len(tasks)} tasks, 95 % bootstrap band",
            "sample efficiency",
        ),
        (
            "training",
            by_task(training_curve),
            f"{scale.name} of training episodes",
            f"mean of tenths, {band}",
            "training episodes",
        ),
        (
            "exchanged",
            by_task(exchange_curve),
            "pairs exchanged per batch",
            f"mean, {band}",
            "exchange counts",
        ),
    ):
        if panels:
            picture = figures.curve_panels(
                panels,
                names,
                BUDGET,
                y_label,
                f"{caption}\n{data}",
                from_zero=slug == "exchanged",
            )
            yield f"{group.slug}-{slug}", picture, f"{about}, {group.title}"


def task_panels(
    experiment: Experiment,
    group: Group,
    curve: Callable[[Sequence[Mapping]], figures.Curve | None],
) -> Panels:
    """A panel per task; `curve` makes one of a method's stored runs, by seed."""
    panels: Panels = {}
    for label in group.labels:
        for env, by_seed in experiment.runs[label].items():
            drawn = curve([record for _, record in sorted(by_seed.items())])
            if drawn is not None:
                panels.setdefault(env, {})[experiment.name(label)] = drawn
    return dict(sorted(panels.items()))


def efficiency_panel(
    experiment: Experiment, group: Group, tasks: Sequence[str]
) -> Panels:
    """One panel of IQMs over several tasks, of the methods evaluated at the same steps on all."""
    curves: dict[str, figures.Curve] = {}
    for label in group.labels if len(tasks) > 1 else ():
        of_tasks = [
            learning_curves([r for _, r in sorted(experiment.runs[label][env].items())])
            for env in tasks
        ]
        steps = of_tasks[0][0]
        if all(np.array_equal(steps, other) for other, _ in of_tasks):
            estimate = stats.aggregate_iqm([values for _, values in of_tasks])
            curves[experiment.name(label)] = figures.Curve(steps, *estimate)
    return {"": curves} if curves else {}


def differences(
    experiment: Experiment, group: Group, tasks: Sequence[str]
) -> dict[str, dict[str, figures.Difference]]:
    """Measure -> method -> its difference to the group's baseline; empty if there is none."""
    if group.baseline is None or len(group.labels) < 2 or not tasks:
        return {}
    panels: dict[str, dict[str, figures.Difference]] = {}
    for measure, title in MEASURES.items():
        found = values_of_all(experiment, group, tasks, measure)
        title = told(experiment.scale, title)
        for label in found:
            x, y = paired(found[label], found[group.baseline])
            if label != group.baseline and all(map(len, x)):
                runs_of = np.concatenate([a - b for a, b in zip(x, y, strict=True)])
                estimate = stats.mean_difference(x, y)
                panels.setdefault(title, {})[experiment.name(label)] = (
                    figures.Difference(*estimate, runs_of)
                )
    return panels


# ---------------------------------------------------------------- curves


def learning_curve(records: Sequence[Mapping]) -> figures.Curve:
    """Mean score over runs."""
    return mean_curve(*learning_curves(records))


def training_curve(records: Sequence[Mapping]) -> figures.Curve | None:
    """Mean score of the training episodes over runs; none where a run does not have it."""
    found = metric_curves(records, training_metric(scale_of(records[0])))
    return None if found is None else mean_curve(*tenths(*found))


def exchange_curve(records: Sequence[Mapping]) -> figures.Curve | None:
    """Mean exchange count over runs; none where a run does not have it."""
    found = metric_curves(records, "exchanged")
    return None if found is None else mean_curve(*found)


def learning_curves(
    records: Sequence[Mapping],
) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) and scores (R, T) of runs with the same steps; from 0 if all say before."""
    steps = np.array(online_steps(records[0]), dtype=float)
    scores = np.array([online_scores(r) for r in records])
    if all(r["before"] for r in records):
        before = [[np.mean(r["before"]["scores"])] for r in records]
        steps, scores = np.append(0.0, steps), np.hstack([before, scores])
    return steps, scores


def metric_curves(records: Sequence[Mapping], name: str) -> tuple | None:
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


def tenths(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Curves (R, T) averaged over tenths of their points, at the last step of each."""
    parts = np.array_split(np.arange(len(steps)), min(10, len(steps)))
    means = [values[:, part].mean(1) for part in parts]
    return steps[[part[-1] for part in parts]], np.stack(means, 1)


def mean_curve(steps: np.ndarray, values: np.ndarray) -> figures.Curve:
    """Mean over runs (R, T), band ± their standard deviation."""
    mean, std = values.mean(0), spread_over_runs(values)
    return figures.Curve(steps, mean, mean - std, mean + std)


def snapshot_picture(record: Mapping, name: str) -> bytes:
    """The samples of a stored run (paper Fig. 1); PNG."""
    snapshot = record["snapshot"]
    online = snapshot["step"] - record["config"]["offline_iterations"]
    title = f"{name} on {record['env']}, seed {record['seed']}, online step {online:,}"
    caption = (
        f"{snapshot['rows']:,} rows of each buffer\ndata: {record['dataset']['label']}"
    )
    return figures.snapshot_panels(snapshot, title, caption)
