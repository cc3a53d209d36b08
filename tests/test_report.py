"""The results store and the report: what is kept, what is refused, what is written."""

import csv
import dataclasses
import functools
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import toy
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from algorithms import dare_iql, iql
from corl import machine, runs
from corl.config import parse_config
from corl.tasks import D4RL, NORMALIZED, RAW
from corl_dare.config import DareConfig
from experiments import figures, groups, report, snapshot
from experiments.groups import read_experiment
from experiments.panels import differences, tenths
from experiments.store import METRICS, NOT_SETTINGS, POINTS, add, read_run, read_store
from experiments.tables import common_tasks
from experiments.values import dump_json, flatten, read_json

ROOT = Path(__file__).parent.parent
STEPS = 50  # online steps of a made-up run; an evaluation every 10


@dataclass
class Dare:
    cap: int | None = None
    rule: str = "threshold"


@dataclass
class Config:
    env: str = "hopper-medium-v2"
    seed: int = 0
    eval_seed: int = 0
    lr: float = 3e-4
    load_model: str = ""
    offline_iterations: int = 20
    online_iterations: int = STEPS
    runs_dir: str = "runs"
    resume: str | None = None
    wandb_mode: str = "disabled"
    project: str = "CORL"
    group: str = "G"
    name: str = "iql"
    ref_max_score: float | None = None
    dare: Dare = field(default_factory=Dare)


SNAPSHOT = {
    "step": 1,
    "rows": 1,
    "scores": None,
    "advantages": None,
    "action_error": {
        **{"edges": [0.0, 1.0], "offline": [1], "online": [1]},
        **{"offline_mean": 0.0, "online_mean": 0.0},
    },
    "projection": {"offline": [[0, 0]], "online": [[0, 0]], "variance": [1.0, 0.0]},
}


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """A run folder as `runs.Run` leaves it, with scores made up from the seed."""
    monkeypatch.setattr(machine, "git_commit", lambda: "0123456789abcdef")
    monkeypatch.setattr(
        machine,
        "describe",
        lambda: {"processor": "Abacus", "cores": 3, "gpu": None},
    )

    def make(gain=0.0, sha="a" * 64, episodes=3, metrics=None, scale=D4RL, **changes):
        config = Config(runs_dir=str(tmp_path / "runs"), **changes)
        total = config.offline_iterations + config.online_iterations
        columns = ["exchanged", "q_loss", f"train_{scale.name}"]
        run = runs.Run(config, "dare_iql", columns, scale)
        run.undefined = ("exchanged",)
        run.dataset = {
            "source": "self-collected",
            "label": "stand-in (not D4RL data)",
            "path": str(tmp_path / "data.hdf5"),
            "sha256": sha,
            "rows": 1000,
        }
        generator = np.random.default_rng(config.seed)
        for step in range(10, total + 1, 10):
            online = step > config.offline_iterations
            returns = generator.normal(1000.0, 100.0, episodes) + 30.0 * gain * online
            phase = "online" if online else "offline"
            run.evaluation(
                step, phase, returns, returns / (1.0 if scale is RAW else 30.0)
            )
            logged = {"q_loss": 1.0 / step}
            if online:
                logged["exchanged"] = torch.tensor(float(step))
            run.log(step, phase, logged if metrics is None else metrics)
        run.updates = total
        run.finish()
        return run.folder

    return make


def change_summary(folder, **changes):
    summary = json.loads((folder / "summary.json").read_text())
    for name, value in changes.items():
        *blocks, last = name.split("__")
        target = summary
        for block in blocks:
            target = target[block]
        target[last] = value
    (folder / "summary.json").write_text(json.dumps(summary))


def pages(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def text_of(folder):
    return (folder / "README.md").read_text()


def row_of(text, *cells):
    """The one table row that holds all these cells."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    found = [row for row in rows if all(cell in row for cell in cells)]
    assert len(found) == 1, (cells, found)
    return found[0]


# ---------------------------------------------------------------- store


def test_the_store_keeps_every_raw_return_to_the_last_digit(make_run, tmp_path):
    folder = make_run(seed=3)
    (path,) = add([folder], tmp_path / "results" / "x")
    assert path == tmp_path / "results/x/runs/iql/hopper-medium-v2-s3.json"
    record = json.loads(path.read_text())
    lines = (folder / "evaluations.csv").read_text().splitlines()[1:]
    kept = [
        f"{e['step']},{e['phase']},{i},{total!r},{score!r}"
        for e in record["evaluations"]
        for i, (total, score) in enumerate(zip(e["returns"], e["scores"], strict=True))
    ]
    assert kept == lines and len(lines) == 7 * 3
    assert record["before"] == record["evaluations"][1]  # the last offline one
    assert record["seed"] == 3 and record["commit"] == "0123456789abcdef"
    assert record["dataset"]["label"] == "stand-in (not D4RL data)"
    assert record["config"]["dare"] == {"cap": None, "rule": "threshold"}
    assert str(tmp_path) not in path.read_text()


def test_metrics_are_thinned_to_the_means_of_bins(make_run, tmp_path):
    folder = make_run(online_iterations=10 * 2 * POINTS + 50)
    record = read_run(folder)
    rows = [
        [int(line.split(",")[0]), float(line.split(",")[3])]
        for line in (folder / "metrics.csv").read_text().splitlines()[1:]
        if ",online," in line
    ]
    assert len(rows) == 205
    bins = [5 * [3]] + [95 * [2]]  # 205 rows in 100 bins: 5 of 3, then 95 of 2
    steps, means, start = [], [], 0
    for size in sum(bins, []):
        part = rows[start : start + size]
        start += size
        steps.append(part[-1][0] - 20)
        means.append(float(f"{sum(value for _, value in part) / size:.6g}"))
    assert record["metrics"]["step"] == steps
    assert record["metrics"]["exchanged"] == means
    assert set(record["metrics"]) == {"step", "exchanged", "q_loss"}


def test_infinite_bounds_are_settings_too(make_run, tmp_path):
    (path,) = add([make_run(lr=-np.inf)], tmp_path / "x", "iql,lr=-inf")
    assert json.loads(path.read_text())["config"]["lr"] == "-inf"
    assert path.parent.name == "iql,lr=-inf"  # a sweep's name of a method


def test_gaps_in_metrics_stay_gaps(make_run):
    bare = read_run(make_run(metrics={"exchanged": float("nan")}))["metrics"]
    assert bare == {"step": [10, 20, 30, 40, 50]}


def test_a_run_of_the_usual_length_takes_a_few_tens_of_kilobytes(make_run, tmp_path):
    changes = {"offline_iterations": 100, "online_iterations": 2000, "episodes": 5}
    (path,) = add([make_run(**changes)], tmp_path / "x")
    assert 20_000 < path.stat().st_size < 80_000  # 200 evaluations of 5 episodes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"commit": "unknown"}, "does not say the run's commit"),
        ({"commit": None}, "does not say the run's commit"),
        ({"dataset__source": None}, "the run's dataset source"),
        ({"dataset__label": ""}, "the run's dataset source"),
        ({"dataset__sha256": None}, "the run's dataset sha256"),
        ({"dataset": None}, "the run's dataset source"),
        ({"dataset": "text"}, "the run's dataset source"),
        ({"seed": None}, "the run's seed"),
        ({"score_final": 1.0}, "summary.json says 1.000; one of them belongs"),
    ],
)
def test_a_run_nobody_could_repeat_is_refused(make_run, changes, message):
    folder = make_run()
    change_summary(folder, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_run(folder)


def test_damaged_and_unfinished_runs_are_refused(make_run, tmp_path):
    def refused(change, message, **options):
        folder = make_run(**options)
        change(folder)
        with pytest.raises(ValueError, match=message) as caught:
            add([folder], tmp_path / "x")
        assert "\n" not in str(caught.value)

    def rewrite(name, old, new):
        def change(folder):
            text = (folder / name).read_text()
            assert old in text
            (folder / name).write_text(text.replace(old, new, 1))

        return change

    refused(lambda f: (f / "summary.json").unlink(), "not finished; resume it")
    refused(rewrite("summary.json", "{", ""), "summary.json is damaged")
    refused(rewrite("summary.json", '"machine"', '"m"'), "summary.json lacks machine")
    refused(rewrite("config.yaml", "env:", "- env:"), "config.yaml is not readable YAML")
    refused(lambda f: (f / "config.yaml").write_text(""), "config.yaml lacks name")
    refused(lambda f: (f / "metrics.csv").write_text(""), "metrics.csv is damaged")
    refused(rewrite("metrics.csv", "\n40,", "\n40\n40,"), "metrics.csv is damaged")
    refused(lambda f: (f / "evaluations.csv").unlink(), "evaluations.csv is missing")
    refused(rewrite("evaluations.csv", "\n10,offline", "\nten,offline"), "is damaged")
    refused(rewrite("evaluations.csv", "step,", "stop,"), "is damaged")
    refused(rewrite("evaluations.csv", "\n30,online,0,", "\n30,online,0,nan"), "damaged")
    refused(
        lambda f: (f / "evaluations.csv").write_text(
            "step,phase,episode,return,score\n10,online,0,nan,nan\n"
        ),
        "online step 10 has a return that is no number",
    )
    refused(
        lambda f: (f / "evaluations.csv").write_text(
            "step,phase,episode,return,score\n10,online,0,1,1\n20,online,0,1,1\n"
            "20,online,1,1,1\n"
        ),
        "different numbers of episodes",
    )
    refused(lambda f: None, "no online evaluation", online_iterations=0)
    assert not (tmp_path / "x").exists()


def test_a_label_must_be_a_file_name(make_run):
    folder = make_run()
    for label in ("a/b", "..", ".", "a b", "a|b"):
        with pytest.raises(ValueError, match="must be letters, digits"):
            read_run(folder, label)


def test_adding_again_renews_and_another_run_is_refused(make_run, tmp_path):
    store, folder = tmp_path / "x", make_run()
    (path,) = add([folder], store)
    before = path.read_bytes()
    assert add([folder], store) == [path] and path.read_bytes() == before
    (folder / "snapshot.json").write_text(json.dumps(SNAPSHOT))
    add([folder], store)
    assert json.loads(path.read_text())["snapshot"] == SNAPSHOT
    other = make_run(gain=5.0)
    with pytest.raises(ValueError, match="already holds another run of this label"):
        add([other], store)
    with pytest.raises(ValueError, match="already holds another run of this label"):
        add([folder, other], tmp_path / "y")
    (second,) = add([other], store, label="better")
    assert second.parent.name == "better" and len(read_store(store)) == 2


def test_one_bad_run_and_nothing_is_added(make_run, tmp_path):
    good, bad = make_run(seed=0), make_run(seed=1)
    change_summary(bad, commit="unknown")
    with pytest.raises(ValueError):
        add([good, bad], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_one_label_is_one_method(make_run, tmp_path):
    add([make_run(seed=0)], tmp_path / "x")
    with pytest.raises(
        ValueError, match=r"dare\.cap is None for seed 0 and 16 for seed 1"
    ):
        add([make_run(seed=1, dare=Dare(cap=16))], tmp_path / "x")
    # What differs for a reason: the task, and where a run was made.
    changes = {"env": "walker2d-medium-v2", "lr": 1.0}
    add([make_run(**changes)], tmp_path / "x")
    add([make_run(seed=2, group="H", load_model="")], tmp_path / "x")


def test_the_offline_score_comes_from_the_run_that_was_loaded(make_run, tmp_path):
    offline = make_run(seed=4)
    checkpoints = offline / "checkpoints"
    checkpoints.mkdir()
    loaded = {"offline_iterations": 0, "seed": 4}
    for model, step in (
        (offline / "checkpoint.pt", 20),
        (checkpoints / "checkpoint_19.pt", 20),
        (checkpoints / "checkpoint_9.pt", 10),
    ):
        record = read_run(make_run(load_model=str(model), **loaded))
        assert record["before"]["step"] == step
        first = read_run(offline)["evaluations"][step // 10 - 1]
        assert record["before"] == first
    sweep = tmp_path / "cell"  # as a sweep leaves it: model.pt beside the folder run
    sweep.mkdir()
    offline.rename(sweep / "run")
    swept = make_run(load_model=str(sweep / "model.pt"), **loaded)
    assert read_run(swept)["before"]["step"] == 20
    told = make_run(load_model=str(tmp_path / "gone" / "model.pt"), **loaded)
    change_summary(told, offline_run=str(sweep / "run"))
    assert read_run(told)["before"]["step"] == 20
    unknown = make_run(load_model=str(tmp_path / "gone" / "model.pt"), **loaded)
    assert read_run(unknown)["before"] is None


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, width=32)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
).filter(lambda v: "Infinity" not in json.dumps(v))


@settings(deadline=None, derandomize=True, max_examples=50)
@given(JSON)
def test_stored_text_is_json_whatever_the_order_of_keys(value):
    assert json.loads(dump_json(value)) == value
    if isinstance(value, dict):
        turned = dict(reversed(value.items()))
        assert dump_json(turned) == dump_json(value)


def test_what_is_no_number_is_never_stored():
    with pytest.raises(ValueError):
        dump_json({"a": [1.0, float("nan")]})


def test_a_crash_while_a_run_is_stored_leaves_the_old_file(
    make_run, tmp_path, monkeypatch
):
    folder = make_run()
    (path,) = add([folder], tmp_path / "x")
    before = pages(tmp_path / "x")
    (folder / "snapshot.json").write_text(json.dumps(SNAPSHOT))

    def crash(*args):
        raise OSError("disk full")

    with monkeypatch.context() as context, pytest.raises(OSError, match="disk full"):
        context.setattr(os, "replace", crash)
        add([folder], tmp_path / "x")
    assert pages(tmp_path / "x") == before
    add([folder], tmp_path / "x")
    assert "snapshot" in json.loads(path.read_text())


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "x.json does not exist: mend it"),
        ("{", r"x.json is damaged \(.*\); mend it"),
        ("[1]", r"x.json is damaged \(the file must be an object, not \[1\]\); mend it"),
    ],
)
def test_a_file_without_a_json_object_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / "x.json", "mend it", missing={})
    else:
        assert read_json(tmp_path / "x.json", missing={}) == {}
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "x.json", "mend it")


def test_nested_settings_become_dotted_names():
    assert flatten({"a": 1, "b": {"c": {"d": 2}, "e": []}, "f": {}}) == {
        "a": 1,
        "b.c.d": 2,
        "b.e": [],
    }


def test_a_stored_run_has_all_settings_but_those_that_say_where_it_ran(make_run):
    where = {
        *("checkpoints_path", "dataset_path", "device", "env", "group", "load_model"),
        *("log_freq", "name", "project", "resume", "runs_dir", "seed", "threads"),
        # Runs that were stored before they existed have no such fields.
        *("seeds", "seeds_as", "wandb_mode"),
    }
    assert where == NOT_SETTINGS, "runs stored before would differ from new ones"
    kept = read_run(make_run())["config"]
    assert set(kept) == {f.name for f in dataclasses.fields(Config)} - where
    for path in ROOT.glob("results/*/runs/*/*.json"):
        assert not where & set(json.loads(path.read_text())["config"])


def test_every_number_that_dare_logs_is_stored():
    assert set(dare_iql.LOGS) == set(METRICS[: len(dare_iql.LOGS)])
    assert {"exchanged", "energy_loss", "train_score"} <= set(METRICS)


# ---------------------------------------------------------------- tables


PLAN = {
    "title": "A trial",
    "note": "Made up.",
    "baseline": "iql",
    "names": {"dare": "DARE | IQL"},
    "groups": [
        {"title": "Both", "labels": ["iql", "dare", "same"]},
        {"title": "Alone", "labels": ["dare", "later"], "note": "One."},
    ],
}


@pytest.fixture
def experiment(make_run, tmp_path):
    """Two tasks, three seeds; `dare` gains 10 points, `same` nothing on average."""
    folder = tmp_path / "results" / "trial"
    for label in ("iql", "dare", "same"):
        made = []
        for seed in range(3):
            gain = {"iql": 0.0, "dare": 10.0, "same": seed - 1.0}[label]
            options = {"gain": gain, "seed": seed, "dare": Dare(rule=label)}
            for env in ("hopper-medium-v2", "walker2d-medium-v2"):
                made.append(make_run(env=env, name=label, **options))
        add(made, folder)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(PLAN))
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    for name in ("curve_panels", "difference_panels", "snapshot_panels"):
        monkeypatch.setattr(figures, name, lambda *args, **kwargs: b"")


PUBLISHED = sorted(p.parent for p in ROOT.glob("results/*/experiment.yaml"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda p: p.name)
def test_a_published_page_is_what_its_committed_runs_give(folder, tmp_path, no_pictures):
    """In a clone it also tells that the raw runs are committed: without them there is no page."""
    again = tmp_path / folder.name
    shutil.copytree(folder, again)
    report.write_report(again)
    for name in ("README.md", "scores.csv"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert "In no group" not in (again / "README.md").read_text()
    drawn = [{p.name for p in f.glob("figures/*.png")} for f in (again, folder)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("file", ["README.md", "results/README.md"])
def test_what_the_texts_quote_stands_on_a_page(file):
    """`a ± b` and `x [low, high]`, with either sign: B below A or A above B."""
    pages = "".join((folder / "README.md").read_text() for folder in PUBLISHED)
    text = (ROOT / file).read_text().replace("−", "-")
    number = r"(-?\d+\.\d+)"
    spreads = re.findall(rf"{number} ± {number}", text)
    intervals = re.findall(rf"{number}\s\[{number}, {number}\]", text)
    assert intervals
    missing = [f" {a} ± {b}" for a, b in spreads if f" {a} ± {b}" not in pages]
    for value, low, high in intervals:
        other = [f"{-float(x):.1f}" for x in (value, high, low)]
        found = [f" {x} [{a}, {b}]" for x, a, b in ((value, low, high), other)]
        missing += found[:1] * (not any(f in pages for f in found))
    assert missing == []


@pytest.mark.parametrize(
    "name", ["release_cpu", "release_gpu", "release_antmaze", "table1_cpu"]
)
def test_a_finding_quotes_numbers_of_its_pages_and_runs(name):
    """Also numbers without an interval: those of single runs, of which one seed is in."""
    (text,) = [
        paragraph
        for paragraph in (ROOT / "results/README.md").read_text().split("\n\n")
        if paragraph.startswith("**") and f"({name}/README.md)" in paragraph
    ]
    quoted = re.findall(r"\d+\.\d", text)
    assert len(quoted) > 3
    found = set()
    for page in re.findall(r"\((\w+)/README\.md\)", text):
        folder = ROOT / "results" / page
        found |= set(re.findall(r"\d+\.\d+", (folder / "README.md").read_text()))
        with (folder / "scores.csv").open() as file:
            for row in csv.DictReader(file):
                found |= {f"{float(row[x]):.1f}" for x in ("before", "after")}
    assert [number for number in quoted if number not in found] == []


# The rows of the table of methods in results/README.md.
QUOTED = {
    "IQL, one buffer (CORL)": "iql",
    "IQL, half-and-half batches": "iql-halves",
    "DARE-IQL, no exchange (n = 0)": "n0",
    "DARE-IQL, policy ratio": "policy-ratio",
    "DARE-IQL, random exchange": "random-ratio",
    "DARE-IQL, one reference (mixture behavior)": "reference",
}
# The rows of the second table in results/README.md: variants on one task.
VARIANTS = {
    "policy ratio, `share`": "share",
    "policy ratio, posterior rule": "posterior",
    "policy ratio, soft weights": "soft",
    "policy ratio, DARE-IV": "dare-iv",
    "likelihood (mixture)": "likelihood",
    "one reference, cap 16": "cap-16",
    "one reference, cap 32": "cap-32",
    "one reference, direct exchange": "direct",
    "random exchange, as many as one reference": "random-reference",
    "one guided reference, small diffusion": "guided",
    "one unguided reference, small diffusion": "unguided",
}
TASKS = ("hopper-medium-v2", "hopper-medium-replay-v2", "hopper-medium-expert-v2")


def quoted_rows(file, header):
    """The cells of the rows below a table's header, by first cell."""
    lines = (ROOT / file).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(header))
    rows = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        rows[name] = cells
    return rows


def stored_measures(measure):
    """label -> task -> values by seed, of the published comparison."""
    with open(ROOT / "results/hopper_cpu/scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        by_task = found.setdefault(row["label"], {})
        by_task.setdefault(row["env"], []).append(float(row[measure] or "nan"))
    return found


def means_of(label, tasks):
    """Cells `pairs exchanged`, `final score`, `training score`: a mean per task."""
    cells = []
    for measure in ("exchanged", "after", "training"):
        found = stored_measures(measure)[label]
        means = [np.mean(found[task]) for task in tasks]
        known = not np.isnan(means).any()
        cells.append(", ".join(f"{m:.1f}" for m in means) if known else "–")
    return cells


def spreads_of(label):
    """Cells `mean ± standard deviation`: the final score per task, then the training score."""
    cells = []
    for measure in ("after", "training"):
        found = stored_measures(measure)[label]
        for task in TASKS:
            spread = np.std(found[task], ddof=1)
            cells.append(f"{np.mean(found[task]):.1f} ± {spread:.1f}")
    return cells


def test_the_table_of_methods_holds_what_is_stored():
    rows = quoted_rows("results/README.md", "| | pairs exchanged | final: medium |")
    assert list(rows) == list(QUOTED)
    for name, label in QUOTED.items():
        exchanged = "0" if label == "n0" else means_of(label, TASKS)[0]
        assert rows[name] == [exchanged, *spreads_of(label)], name


def test_the_table_of_variants_holds_what_is_stored():
    rows = quoted_rows("results/README.md", "| variant on hopper-medium |")
    assert list(rows) == list(VARIANTS)
    for name, label in VARIANTS.items():
        assert rows[name] == means_of(label, TASKS[:1]), name


def test_the_readme_promises_the_stored_scores_of_make_run():
    with open(ROOT / "results/quick_start/scores.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "dare-iql"]
    scores = [[f"{float(row[key]):.1f}" for key in ("before", "after")] for row in rows]
    text = " ".join((ROOT / "README.md").read_text().split())
    (first, *others) = scores
    assert f"**{first[0]}** after the offline phase and **{first[1]}** after" in text
    assert " and ".join(f"from {a} to {b}" for a, b in others) in text
    quoted = quoted_rows("results/README.md", "| | seed 0 | seed 1 | seed 2 |")[
        "DARE-IQL"
    ]
    assert quoted[:3] == [f"{a} → {b}" for a, b in scores]


# The rows of the table of scores in results/README.md -> score and rule of the benchmark's page.
ACCURACY = {
    "guided reference, threshold (the paper's)": (
        "guided reference, s = 8 (paper)",
        "threshold",
    ),
    "16 unguided references (kernel), threshold": ("16 references, kernel", "threshold"),
    "guided reference, `em`": ("guided reference, s = 8 (paper)", "em"),
    "mixture likelihood, threshold": ("mixture likelihood", "threshold"),
    "policy ratio, threshold": ("policy ratio", "threshold"),
    "policy ratio, `em`": ("policy ratio", "em"),
    "**policy ratio, `share`**": ("policy ratio", "estimated share"),
    "true densities, true share": ("oracle ratio", "known share"),
}


def test_the_table_of_scores_holds_what_the_benchmark_found():
    page = (ROOT / "results/exchange_accuracy/README.md").read_text()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines()]
    identical = page[page.index("## Identical policies") :].splitlines()
    columns = next(x for x in identical if x.startswith("| score |")).split("|")
    rows = quoted_rows("results/README.md", "| score, rule | ranks right (AUC) |")
    assert list(rows) == list(ACCURACY)
    for name, (score, rule) in ACCURACY.items():
        auc = next(row[-1] for row in cells if row[:1] == [score])
        _, _, moved, precision, _, purity = next(
            r for r in cells if r[:2] == [score, rule]
        )
        still = next(x for x in identical if x.startswith(f"| {score} |")).split("|")
        column = "estimated share" if rule == "known share" else rule
        equal = still[columns.index(f" {column} ")]
        expected = [auc, moved, 100 * float(precision), purity, equal]
        found = [cell.strip("* %") for cell in rows[name]]
        for quoted, stored in zip(found, expected, strict=True):
            # The page is rounded, too, so half of a last digit is allowed and a little more.
            unit = 0.01 if "." in quoted else 1.0
            assert abs(float(quoted) - float(stored)) <= 0.51 * unit, (name, quoted)


def test_tables_hold_what_the_raw_returns_give(experiment, no_pictures):
    report.write_report(experiment)
    text = text_of(experiment)
    before, after, last, best, regret = [], [], [], [], []
    depth, recovery = [], []
    for seed in range(3):
        path = experiment / f"runs/dare/hopper-medium-v2-s{seed}.json"
        record = json.loads(path.read_text())
        phases = {"offline": [], "online": []}
        for entry in record["evaluations"]:
            phases[entry["phase"]].append(sum(entry["scores"]) / 3)
        before.append(phases["offline"][-1])
        after.append(sum(phases["online"][-4:]) / 4)
        last.append(phases["online"][-1])
        best.append(max(phases["online"]))
        regret.append(1 - sum(phases["online"]) / 5 / 100)
        online = phases["online"]
        moving = [sum(online[i : i + 3]) / 3 for i in range(3)]
        depth.append(before[-1] - min(moving))
        # Evaluations at steps 10, 20, ...; the first mean is known at 30.
        back = [30 + 10 * i for i in range(3) if moving[i] >= before[-1]]
        recovery.append(back[0] if back else None)

    def shown(values, digits=1):
        mean = sum(values) / 3
        std = (sum((v - mean) ** 2 for v in values) / 2) ** 0.5
        return f"{mean:.{digits}f} ± {std:.{digits}f}"

    def lost(recovery):
        count = recovery.count(None)
        return f" ({count} of 3 not back)" if count else ""

    both = text.split("## Alone")[0]
    row = row_of(both.replace("\\|", "/"), "hopper-medium-v2", "DARE / IQL")
    assert row[2:] == [
        "0–2",
        f"{shown(before)} → {shown(after)}",
        shown(last),
        shown(best),
        shown(regret, 3),
        "–",  # no training episodes were made up
        shown(depth),
        shown([(step or 50) / 1000 for step in recovery]) + "k" + lost(recovery),
        "50.0 ± 0.0",  # the made-up exchange counts are 30, 40, ..., 70
    ]


def test_recoveries_that_a_run_did_not_see_count_to_its_end(
    make_run, tmp_path, no_pictures
):
    """The made-up runs start at about 33, and gain -10 or +10 points online."""
    for label, gain in (("down", -10.0), ("up", 10.0)):
        made = [make_run(name=label, seed=seed, gain=gain) for seed in range(2)]
        add(made, tmp_path / "x")
    report.write_report(tmp_path / "x")
    text = text_of(tmp_path / "x")
    assert row_of(text, "hopper-medium-v2", "down")[9] == "0.1 ± 0.0k (2 of 2 not back)"
    assert row_of(text, "hopper-medium-v2", "up")[9] == "0.0 ± 0.0k"
    with open(tmp_path / "x/scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["recovery"] for row in rows] == ["", "", "30", "30"]
    assert [float(row["depth"]) > 0 for row in rows] == [True, True, False, False]


SWEEP = """
config: configs/iql/{task}.yaml
methods:
  ours: {algorithm: algorithms/dare_iql.py}
  half: {algorithm: algorithms/dare_iql.py, grid: {dare.cap: [0, 3]}}
  lot: {algorithm: algorithms/dare_iql.py}
tasks: [hopper-medium-v2, walker2d-medium-v2]
seeds: [0, 1, 2]
"""
CONTRASTS = {
    "sweep": "plan.yaml",
    "groups": [
        {
            "title": "All",
            "labels": ["ours", "half,dare.cap=0", "half,dare.cap=3", "lot"],
            "contrasts": [["ours", "half,dare.cap=0"], ["ours", "lot"]],
        }
    ],
}


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """The folder of an experiment that names its sweep, and has no runs yet."""
    monkeypatch.setattr(groups, "ROOT", tmp_path)
    (tmp_path / "plan.yaml").write_text(SWEEP)
    folder = tmp_path / "results" / "trial"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(CONTRASTS))
    return folder


def test_a_page_of_a_sweep_is_there_before_its_first_run(planned, no_pictures):
    report.command_line(["write", str(planned)])
    text = text_of(planned)
    assert "**0 of 24 cells of the sweep are in.**" in text
    assert "No runs yet of: ours, half,dare.cap=0, half,dare.cap=3, lot." in text
    assert row_of(text, "ours − lot")[1:4] == ["–", "0", "no runs yet"]
    assert len((planned / "scores.csv").read_text().splitlines()) == 1


def test_a_contrast_is_paired_by_the_seeds_that_are_in(planned, make_run, no_pictures):
    gains = {"ours": (5.0, 6.0, 7.0), "half,dare.cap=0": (0.0, 0.0, 1.0), "lot": (3.0,)}
    for label, by_seed in gains.items():
        for env in ("hopper-medium-v2", "walker2d-medium-v2"):
            if env == "walker2d-medium-v2" and label == "lot":
                continue
            for seed, gain in enumerate(by_seed):
                metrics = {"train_score": 20.0 + 2 * gain}
                options = {"env": env, "seed": seed, "metrics": metrics}
                add([make_run(name=label, gain=gain, **options)], planned)
    report.write_report(planned)
    text = text_of(planned)
    assert (
        "**13 of 24 cells of the sweep are in.** Not complete: half,dare.cap=3 0" in text
    )
    hopper = row_of(text, "ours − half,dare.cap=0", "hopper-medium-v2")
    # Differences 10, 12 and 12; t of two degrees of freedom is 4.303.
    half = 4.3027 * (4 / 3) ** 0.5 / 3**0.5
    primary = f"{34 / 3:.1f} [{34 / 3 - half:.1f}, {34 / 3 + half:.1f}]"
    assert hopper[2:4] == ["3", primary] and hopper[6] == "better"
    half /= 2  # of the scores, half as large
    final = f"{17 / 3:.1f} [{17 / 3 - half:.1f}, {17 / 3 + half:.1f}]"
    assert hopper[4] == final
    # The same offline part, so the depths differ as the scores do.
    depth = f"{-17 / 3:.1f} [{-17 / 3 - half:.1f}, {-17 / 3 + half:.1f}]"
    assert hopper[5] == depth
    both = row_of(text, "ours − half,dare.cap=0", "mean of 2 tasks")
    assert both[2] == "6" and both[3].startswith(f"{34 / 3:.1f} [")
    lot = row_of(text, "ours − lot", "hopper-medium-v2")
    assert lot[2:4] == ["1", "4.0 [no interval]"]
    assert lot[6] == "cannot be told: one seed"


def test_the_evaluation_at_the_switch_is_kept_and_is_the_score_before(
    make_run, tmp_path, no_pictures
):
    folder = make_run()
    rows = (folder / "evaluations.csv").read_text().splitlines(keepends=True)
    switch = [f"20,switch,{i},{i * 30.0},{float(i)}\n" for i in range(5)]
    # A run from a loaded model has it first.
    (folder / "evaluations.csv").write_text("".join([rows[0], *switch, *rows[1:]]))
    (path,) = add([folder], tmp_path / "x")
    record = json.loads(path.read_text())
    assert record["before"]["scores"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert record["before"]["phase"] == "switch" and len(record["evaluations"]) == 8
    report.write_report(tmp_path / "x")
    text = text_of(tmp_path / "x")
    assert "Episodes per evaluation: 3; at the switch: 5." in text
    assert row_of(text, "hopper-medium-v2", "iql")[3].startswith("2.0 → ")
    record["evaluations"][1]["scores"].append(1.0)
    path.write_text(dump_json(record))
    with pytest.raises(ValueError, match="damaged"):
        read_store(tmp_path / "x")


def test_the_mean_of_training_episodes_is_that_of_the_logged_online_rows(
    make_run, tmp_path
):
    folder = make_run(metrics={})
    text = (folder / "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("train_score")
    scores = iter(["7", "8", "", "nan", "10", "20", "60"])
    lines = [text[0]]
    for line in text[1:]:
        cells = line.split(",")
        cells[column] = next(scores)
        lines.append(",".join(cells))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    # Two offline rows, and three of the five online ones have a number.
    assert read_run(folder)["training"] == 30.0
    assert read_run(make_run(name="none"))["training"] is None


def test_the_costs_name_collapsed_seeds_cpu_time_and_a_generators_share(
    make_run, tmp_path, no_pictures
):
    folder = tmp_path / "results" / "trial"
    for label, gains in (("a", (0.0, -25.0, -25.0)), ("b", (0.0, 0.0, -10.0))):
        made = [make_run(name=label, seed=s, gain=g) for s, g in enumerate(gains)]
        for seed, run in enumerate(made):
            extra = {"generator_share": 0.001 * (seed + 1), "caveat": "a reading: ours"}
            extra = extra if label == "b" else {}
            change_summary(run, cpu_seconds=60.0 * (seed + 1), **extra)
        add(made, folder)
    report.write_report(folder)
    rows = [line for line in text_of(folder).splitlines() if line.startswith("| ")]
    first = next(i for i, row in enumerate(rows) if "CPU minutes" in row)
    assert rows[first].endswith("| generator's share |")
    costs = [[x.strip() for x in row.strip("|").split("|")] for row in rows[first:]]
    steps = 20 + STEPS
    assert costs[2] == [
        *("a", "3", "2 (hopper-medium-v2 seed 1–2)"),
        *(f"{steps} ± 0", "2.0 ± 1.0", "–"),
    ]
    assert costs[3] == [
        *("b (a reading)", "3", "0"),
        *(f"{steps} ± 0", "2.0 ± 1.0", "0.001–0.003"),
    ]
    # Runs of before CPU time was noted have no such table, and their pages stay.
    path = folder / "runs/a/hopper-medium-v2-s0.json"
    record = json.loads(path.read_text())
    del record["cpu_seconds"]
    path.write_text(dump_json(record))
    report.write_report(folder)
    assert "CPU minutes" not in text_of(folder)


def test_stacked_seeds_have_no_cpu_time_and_their_machine_says_how_many_they_are(
    make_run, tmp_path, no_pictures
):
    folder = tmp_path / "results" / "trial"
    for label in ("a", "b"):
        made = [make_run(name=label, seed=seed) for seed in range(3)]
        for seed, run in enumerate(made):
            if label == "b" or seed > 0:
                change_summary(run, stacked=2)
                summary = json.loads((run / "summary.json").read_text())
                summary.pop("cpu_seconds", None)
                (run / "summary.json").write_text(json.dumps(summary))
            else:
                change_summary(run, cpu_seconds=90.0)
        add(made, folder)
    report.write_report(folder)
    text = text_of(folder)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    first = next(i for i, row in enumerate(rows) if "CPU minutes" in row)
    minutes = [row.strip("| ").split("|")[-1].strip() for row in rows[first + 2 :][:2]]
    assert minutes == ["1.5", "–"]
    assert "Stacked seeds share a process and have no CPU time of their own." in text
    places = [row for row in rows if row.startswith("| `")][-2:]
    assert "cores; " in places[0] and places[0].count("2 seeds stacked") == 1
    assert "2 seeds stacked" in places[1] and "cores; " not in places[1]


def test_a_group_of_costs_shows_no_score(make_run, tmp_path, no_pictures):
    folder = tmp_path / "results" / "trial"
    for label in ("a", "b"):
        run = make_run(name=label)
        change_summary(run, cpu_seconds=90.0)
        add([run], folder)
    group = {"title": "Costs", "labels": ["a", "b"], "costs": True}
    (folder / "experiment.yaml").write_text(json.dumps({"groups": [group]}))
    report.write_report(folder)
    shown = text_of(folder).split("## Costs")[1].split("## Where")[0]
    tables = [line for line in shown.splitlines() if line.startswith("| ")]
    assert "CPU minutes" in tables[0] and len(tables) == 4
    assert "collapsed" not in tables[0]
    assert "| a | 1 |" in tables[2] and "| 1.5 |" in tables[2]
    group["costs"] = "yes"
    (folder / "experiment.yaml").write_text(json.dumps({"groups": [group]}))
    with pytest.raises(ValueError, match="costs must be true or false, not 'yes'"):
        report.write_report(folder)


def test_a_page_says_what_its_runs_warned_of(make_run, tmp_path, no_pictures):
    folder = tmp_path / "results" / "trial"
    made = [make_run(name="sa", seed=seed) for seed in range(4)]
    for run in made[:3]:
        change_summary(run, warnings=["no row is trusted"])
    add([*made, make_run(name="calm")], folder)
    report.write_report(folder)
    warned = text_of(folder).split("Warnings of the runs:")[1].split("\n\n")[1]
    assert warned == "- sa, hopper-medium-v2, seed 0–2: no row is trusted"
    for run in made[:3]:
        change_summary(run, warnings=[])
    add(made, folder)
    report.write_report(folder)
    assert "Warnings" not in text_of(folder)


def test_a_difference_inside_the_interval_is_called_that(experiment, no_pictures):
    report.write_report(experiment)
    text = text_of(experiment).split("## Alone")[0].replace("\\|", "/")
    better = row_of(text, "DARE / IQL", "better")
    assert better[4] == "10.0 [10.0, 10.0]" and better[5] == "1.00 [1.00, 1.00]"
    same = row_of(text, "same", "inside the interval")
    # paired: -1, 0 and 1 on both tasks; Student's t of 4 degrees of freedom
    half = 2.77645 * (2 * (1.0 / 3) / 4) ** 0.5
    assert same[4] == f"0.0 [-{half:.1f}, {half:.1f}]"
    table = text.split("IQM of after")[1]
    assert row_of(table, "iql", "–")[4:] == ["–", "–", "–"]
    assert "start from the same offline model" in text


def test_training_episodes_are_compared_where_all_runs_have_them(
    make_run, tmp_path, no_pictures
):
    folder = tmp_path / "x"
    for label, gain in (("a", 0.0), ("b", 7.0)):
        made = []
        for seed in range(3):
            metrics = {"train_score": 20.0 + seed + gain, "exchanged": 1.0}
            made.append(make_run(name=label, seed=seed, metrics=metrics))
        add(made, folder)
    report.write_report(folder)
    text = text_of(folder)
    assert row_of(text, "hopper-medium-v2", "b")[7] == "28.0 ± 1.0"
    table = text.split("IQM of training")[1]
    assert row_of(table, "b", "better")[3:5] == ["28.0", "7.0 [7.0, 7.0]"]
    without = make_run(name="b", seed=3, metrics={"exchanged": 1.0})
    add([without], folder)
    report.write_report(folder)
    assert "IQM of training" not in text_of(folder)


def test_training_curves_are_means_of_tenths():
    steps, values = np.arange(1.0, 24.0), np.arange(46.0).reshape(2, 23)
    ends, means = tenths(steps, values)
    assert len(ends) == 10 and ends[-1] == 23.0 and means.shape == (2, 10)
    assert ends[0] == 3.0 and means[:, 0].tolist() == [1.0, 24.0]
    ends, means = tenths(steps[:3], values[:, :3])
    assert ends.tolist() == [1.0, 2.0, 3.0] and (means == values[:, :3]).all()


def test_worse_is_called_worse(experiment, no_pictures):
    plan = yaml.safe_load((experiment / "experiment.yaml").read_text())
    plan["baseline"] = "dare"
    (experiment / "experiment.yaml").write_text(yaml.safe_dump(plan))
    report.write_report(experiment)
    assert row_of(text_of(experiment), "iql", "worse")[4] == "-10.0 [-10.0, -10.0]"


def test_one_seed_tells_nothing(make_run, tmp_path, no_pictures):
    for label in ("a", "b"):
        add([make_run(name=label, gain=len(label))], tmp_path / "x")
    report.write_report(tmp_path / "x")
    row = row_of(text_of(tmp_path / "x"), "b", "cannot be told: one seed")
    assert "[no interval]" in row[2] and "[no interval]" in row[4]
    assert "±" not in row_of(text_of(tmp_path / "x"), "hopper-medium-v2", "b")[3]


def test_the_page_says_where_the_numbers_come_from(experiment, no_pictures):
    report.write_report(experiment)
    text = text_of(experiment)
    assert text.startswith("# A trial\n\nMade up.\n")
    assert "Data: **stand-in (not D4RL data)**" in text
    assert "not D4RL scores" in text and "Episodes per evaluation: 3." in text
    row = row_of(text, "`dare`")
    assert row[1:7] == [
        "2",
        "0–2",
        "stand-in (not D4RL data)",
        "1,000",
        "012345678",
        "Abacus, 3 cores",
    ]
    assert "No runs yet of: later." in text
    settings_row = row_of(text, "`dare.rule`")
    assert settings_row == ["`dare.rule`", "iql", "dare", "same"]
    for figure in re.findall(r"\(figures/(.*?)\)", text):
        assert (experiment / "figures" / figure).is_file()
    assert "figures/both-learning.png" in text
    csv = (experiment / "scores.csv").read_text().splitlines()
    assert len(csv) == 1 + 18 and csv[0].startswith("label,env,seed,before,after")


def test_a_setting_that_has_nothing_to_do_in_a_method_is_not_compared(
    make_run, tmp_path, no_pictures
):
    methods = {
        "quarter": DareConfig(weights="uniform", weight=0.25),
        "half": DareConfig(weights="uniform"),
        "em": DareConfig(rule="em"),
        "capped": DareConfig(cap=3),
    }
    folder = tmp_path / "results" / "released"
    for label, dare in methods.items():
        add([make_run(name=label, dare=dare)], folder)
    plan = {"title": "Released", "groups": [{"title": "All", "labels": [*methods]}]}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(plan))
    report.write_report(folder)
    text = text_of(folder)
    assert row_of(text, "`dare.rule`")[1:] == ["–", "–", "em", "threshold"]
    assert row_of(text, "`dare.cap`")[1:] == ["–", "–", "none", "3"]
    assert row_of(text, "`dare.weight`")[1:] == ["0.25", "0.5", "–", "–"]
    assert row_of(text, "`dare.weights`")[1:] == ["uniform", "uniform", "hard", "hard"]


def test_a_method_that_no_group_shows_is_named(experiment, no_pictures):
    name = "In no group of experiment.yaml, so not compared below:"
    report.write_report(experiment)
    assert name not in text_of(experiment)
    plan = {**PLAN, "groups": [{"title": "Some", "labels": ["iql", "dare"]}]}
    (experiment / "experiment.yaml").write_text(yaml.safe_dump(plan))
    report.write_report(experiment)
    assert f"{name} same.\n" in text_of(experiment)


def test_uncommitted_code_is_shown(make_run, tmp_path, no_pictures):
    folder = make_run()
    change_summary(folder, commit="0123456789abcdef+dirty")
    add([folder], tmp_path / "x")
    report.write_report(tmp_path / "x")
    assert "| 012345678+dirty |" in text_of(tmp_path / "x")


def test_methods_that_start_elsewhere_are_named(make_run, tmp_path, no_pictures):
    add([make_run(name="a", seed=0)], tmp_path / "x")
    other = make_run(name="b", seed=0, offline_iterations=10, online_iterations=50)
    add([other], tmp_path / "x")
    report.write_report(tmp_path / "x")
    text = text_of(tmp_path / "x")
    assert "**They do not all start from the same offline models.**" in text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sha": "b" * 64}, r"the data \(sha256\) of b and a differ"),
        ({"online_iterations": 40}, "the evaluations' steps of b and a differ"),
        ({"episodes": 4}, "episodes per evaluation of b and a differ"),
        ({"eval_seed": 7}, "eval_seed of b and a differ"),
    ],
)
def test_what_cannot_be_compared_is_not(
    make_run, tmp_path, no_pictures, changes, message
):
    add([make_run(name="a")], tmp_path / "x")
    add([make_run(name="b", **changes)], tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        report.write_report(tmp_path / "x")
    groups = [{"title": label, "labels": [label]} for label in "ab"]
    (tmp_path / "x/experiment.yaml").write_text(yaml.safe_dump({"groups": groups}))
    assert report.write_report(tmp_path / "x")


@pytest.mark.parametrize(
    "text, message",
    [
        ("titel: x", "unknown field titel; known: title, note"),
        ("groups: [{title: x}]", "a group needs a title and labels"),
        ("groups: [{title: x, lables: [a]}]", "unknown field lables"),
        ("- a", "must hold `field: value` lines"),
        ("a: [", "experiment.yaml"),
        ("title: 2024", "title must be text, not 2024"),
        ("groups: [{title: x, labels: a}]", "labels must be a list, not 'a'"),
        ("names: [a]", "names must be a block"),
        ("names: {a: 5}", "names must give each label a text"),
        ("groups: [{title: x, labels: [a, b], baseline: c}]", "c is not in labels"),
        ("baseline: c", "baseline c is in no group"),
        ("sweep: nowhere.yaml", "experiment.yaml: sweep: config file"),
        (
            "groups: [{title: x, labels: [a, b], contrasts: [[a, c]]}]",
            "contrasts must be pairs of its labels, like [a, b], not ['a', 'c']",
        ),
        (
            "groups: [{title: x y, labels: [a]}, {title: X-Y, labels: [a]}]",
            "group 'X-Y': another group's figures have the name x-y, too",
        ),
        (
            "{names: {b: a}, groups: [{title: x, labels: [a, b]}]}",
            "two labels have the same name",
        ),
    ],
)
def test_a_bad_plan_is_one_clear_line(make_run, tmp_path, text, message):
    add([make_run(name="a")], tmp_path / "x")
    (tmp_path / "x/experiment.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        report.write_report(tmp_path / "x")
    assert "\n" not in str(caught.value)


def test_a_damaged_or_misplaced_store_is_named(make_run, tmp_path):
    (path,) = add([make_run()], tmp_path / "x")
    moved = path.with_name("hopper-medium-v2-s9.json")
    path.rename(moved)
    with pytest.raises(ValueError, match="s9.json is no stored run of this place"):
        read_store(tmp_path / "x")
    moved.write_text(moved.read_text()[:-100])
    with pytest.raises(ValueError, match="s9.json is damaged"):
        read_store(tmp_path / "x")
    with pytest.raises(ValueError, match="holds no runs"):
        read_experiment(tmp_path / "nothing")


# ---------------------------------------------------------------- reproducible bytes


def test_the_report_is_the_same_to_the_byte(experiment, tmp_path, monkeypatch):
    """Elsewhere, after files came in another order, and for a user with own styles."""
    report.write_report(experiment)
    first = pages(experiment)
    assert len(first) == 1 + 18 + 2 + 7  # plan, runs, README and CSV, figures
    for name in ("README.md", "scores.csv", "figures/both-learning.png"):
        (experiment / name).unlink()
    (experiment / "figures/old.png").write_bytes(b"of a label that is gone")
    copy = tmp_path / "elsewhere"
    for name, data in reversed(pages(experiment).items()):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    np.random.seed(1)
    report.write_report(copy)
    assert pages(copy) == first


def test_other_numbers_other_bytes(experiment):
    report.write_report(experiment)
    first = pages(experiment)
    path = experiment / "runs/dare/hopper-medium-v2-s1.json"
    record = json.loads(path.read_text())
    record["evaluations"][-1]["scores"][0] += 5.0
    path.write_text(dump_json(record))
    report.write_report(experiment)
    changed = {name for name, data in pages(experiment).items() if first[name] != data}
    drawn = {"figures/both-learning.png", "figures/both-differences.png"}
    assert {"README.md", "scores.csv", *drawn} <= changed
    assert "figures/both-exchanged.png" not in changed


# ---------------------------------------------------------------- figures


def pixels(png):
    import io

    from matplotlib import image

    assert png.startswith(b"\x89PNG") and b"Software" not in png
    return image.imread(io.BytesIO(png))


def has_color(png, color):
    wanted = np.array(matplotlib.colors.to_rgb(color))
    return (np.abs(pixels(png)[..., :3] - wanted).max(-1) < 0.02).sum()


def test_each_curve_has_its_color_and_lone_runs_no_band():
    x, nowhere = np.array([0.0, 1.0, 2.0]), np.full(3, np.nan)
    names = [f"m{i}" for i in range(7)]
    curves = {
        name: figures.Curve(x, x + 3 * i, nowhere, nowhere)
        for i, name in enumerate(names)
    }
    png = figures.curve_panels({"task": curves}, names, "x", "y", "made up")
    for color in figures.COLORS:
        assert has_color(png, color) > 50, color
    two = figures.curve_panels({"a": curves, "b": curves}, names, "x", "y", "made up")
    assert pixels(two).shape[1] > pixels(png).shape[1]
    banded = {"m0": figures.Curve(x, x, x - 1, x + 1)}
    plain = {"m0": curves["m0"]}
    light = np.array(matplotlib.colors.to_rgb(figures.COLORS[0])) * 0.15 + 0.85
    counts = [
        has_color(figures.curve_panels({"t": c}, names, "x", "y", ""), light)
        for c in (plain, banded)
    ]
    assert counts[0] < 200 and counts[1] > 5000  # of a smoothed line, of the band


@pytest.mark.parametrize("panels", [1, 3])
def test_a_legend_of_many_long_names_stays_inside_the_figure(panels, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "render", lambda *args: drawn.append(args))
    x = np.arange(3.0)
    names = [f"{i}: a method with a name of forty characters" for i in range(7)]
    curves = {name: figures.Curve(x, x, x, x) for name in names}
    figures.curve_panels({str(i): curves for i in range(panels)}, names, "x", "y", "")
    (size, draw), *_ = drawn
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    extent = legend.get_window_extent()
    assert 0 <= extent.x0 and extent.x1 <= figure.bbox.x1
    assert extent.y1 <= figure.bbox.y1
    assert extent.y0 >= max(axis.bbox.y1 for axis in figure.axes)


def test_differences_stand_where_their_numbers_are(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "render", lambda *args: drawn.append(args))
    sure = figures.Difference(2.0, 1.0, 3.0, np.array([1.5, 2.5]))
    alone = figures.Difference(-4.0, np.nan, np.nan, np.array([-4.0]))
    panel = {"sure": sure, "alone": alone}
    names = ["base", "alone", "sure"]
    figures.difference_panels({"a": panel, "b": panel}, names, "points", "made up")
    (size, draw), *_ = drawn
    figure = Figure(figsize=size)
    draw(figure)
    left, right = figure.axes
    labels = [tick.get_text() for tick in left.get_yticklabels()]
    assert dict(zip(labels, left.get_yticks(), strict=True)) == {"alone": 1, "sure": 0}
    for axis in (left, right):
        zero, *lines = axis.get_lines()
        assert list(zero.get_xdata()) == [0.0, 0.0]
        ranges, dots, marks = lines[0::3], lines[1::3], lines[2::3]
        assert [list(d.get_xdata()) for d in dots] == [[-4.0], [2.0]]
        assert list(ranges[1].get_xdata()) == [1.0, 3.0]
        assert np.isnan(ranges[0].get_xdata()).all(), "one seed has no interval"
        assert [list(m.get_xdata()) for m in marks] == [[-4.0], [1.5, 2.5]]
        assert [d.get_color() for d in dots] == list(figures.COLORS[1:3])


def test_the_figure_of_differences_has_the_tables_numbers(experiment):
    tree = read_experiment(experiment)
    both, alone = tree.groups
    tasks = common_tasks(tree, both)
    panels = differences(tree, both, tasks)
    assert list(panels) == ["final score"], "no training episodes were made up"
    found = panels["final score"]
    assert list(found) == ["DARE | IQL", "same"], "no line for the baseline"
    assert found["DARE | IQL"].low == pytest.approx(10.0)
    assert sorted(found["same"].runs) == pytest.approx([-1, -1, 0, 0, 1, 1])
    assert found["same"].high == pytest.approx(2.7764451 * (1.0 / 6) ** 0.5)
    assert differences(tree, alone, common_tasks(tree, alone)) == {}


def test_methods_without_common_seeds_have_no_difference_to_draw(make_run, tmp_path):
    for label, seed in (("a", 0), ("b", 1), ("c", 0)):
        add([make_run(name=label, seed=seed)], tmp_path / "x")
    report.write_report(tmp_path / "x")
    assert "no common seeds" in text_of(tmp_path / "x")
    tree = read_experiment(tmp_path / "x")
    (group,) = tree.groups
    found = differences(tree, group, common_tasks(tree, group))
    assert list(found["final score"]) == ["c"] and np.isnan(
        found["final score"]["c"].low
    )


def test_more_methods_than_colors_are_still_told_apart():
    x = np.array([0.0, 1.0])
    names = [f"m{i}" for i in range(9)]
    nowhere = np.full(2, np.nan)
    both = [
        figures.curve_panels(
            {"t": {names[i]: figures.Curve(x, x, nowhere, nowhere)}}, names, "", "", ""
        )
        for i in (0, 7)
    ]
    assert has_color(both[1], figures.COLORS[0])
    assert has_color(both[1], figures.COLORS[0]) < 0.9 * has_color(
        both[0], figures.COLORS[0]
    )  # dashed


# ---------------------------------------------------------------- snapshots


SMALL = (
    "--env toy-medium-v2 --offline_iterations 20 --online_iterations 60 --eval_freq 10 "
    "--n_episodes 2 --batch_size 16 --log_freq 10 --buffer_size 5000 --device cpu "
    "--threads 1 --compile false"
)
MIXTURE = (
    "--dare.behavior mixture --dare.guidance_scale 0 --dare.score policy_ratio "
    "--dare.behavior_updates 50 --dare.behavior_batch_size 64"
)


@pytest.fixture
def toy_run(monkeypatch, tmp_path):
    toy.install(monkeypatch, tmp_path)
    monkeypatch.setattr(machine, "git_commit", lambda: "0123456789abcdef")

    def train(module, extra=""):
        flags = f"{SMALL} {extra} --runs_dir {tmp_path / 'runs'}".split()
        module.train(parse_config(module.TrainConfig, flags))
        return max((tmp_path / "runs").iterdir(), key=lambda p: p.stat().st_mtime_ns)

    return train


def test_a_snapshot_of_a_dare_run_from_its_files_alone(toy_run, tmp_path, capsys):
    folder = toy_run(dare_iql, MIXTURE)
    report.command_line(["figures", str(folder)])
    found = json.loads((folder / "snapshot.json").read_text())
    pixels((folder / "snapshot.png").read_bytes())
    assert found["step"] == 80 and found["rows"] == snapshot.ROWS
    scores = found["scores"]
    assert scores["kind"] == "policy_ratio" and 0.0 <= scores["auc"] <= 1.0
    low, high = sorted([scores["score_off_mean"], scores["score_on_mean"]])
    assert low <= scores["separation_point"] <= high
    # the middle 95 % of the rows; more where scores repeat, as in a buffer of 60 rows
    assert 0.94 < (sum(scores["offline"]) + sum(scores["online"])) / 8192 < 0.98
    assert snapshot.take_snapshot(folder) == found  # the same rows again
    groups = found["advantages"]
    moved = round(scores["exchangeable"] * snapshot.ROWS)
    assert groups["offline_moved"]["rows"] == groups["online_moved"]["rows"] == moved
    assert sum(group["rows"] for group in groups.values()) == 2 * snapshot.ROWS

    add([folder], tmp_path / "results" / "x", "dare")
    report.write_report(tmp_path / "results" / "x")
    name = "figures/snapshot-dare-toy-medium-v2-s0.png"
    assert name in text_of(tmp_path / "results" / "x")
    assert "| offline, stays | offline, moved |" in text_of(tmp_path / "results" / "x")
    pixels((tmp_path / "results" / "x" / name).read_bytes())


def test_advantages_of_kept_and_moved_rows_by_hand():
    offline, online = [1.0, 5.0, 3.0], [10.0, 40.0, 30.0]
    advantage = np.array(offline + online)
    weight = advantage / 10
    swapped = snapshot.advantage_numbers(advantage, weight, np.array([0, 4, 2, 3, 1, 5]))
    assert swapped == {
        "offline_kept": {"rows": 2, "advantage": 2.0, "weight": pytest.approx(0.2)},
        "offline_moved": {"rows": 1, "advantage": 5.0, "weight": 0.5},
        "online_kept": {"rows": 2, "advantage": 20.0, "weight": 2.0},
        "online_moved": {"rows": 1, "advantage": 40.0, "weight": 4.0},
    }
    none = snapshot.advantage_numbers(advantage, weight, np.arange(6))
    assert none["online_moved"] == {"rows": 0, "advantage": None, "weight": None}
    assert none["offline_kept"]["advantage"] == 3.0


def test_a_snapshot_tells_the_rows_of_one_buffer_apart(toy_run):
    """Upstream's IQL keeps both sources in one buffer; the dataset's rows come first."""
    folder = toy_run(iql)
    files = snapshot.read_files(folder)
    buffer = snapshot.online_buffer(files)
    assert buffer._size == 60
    saved = files.state["parts"]["online_buffer"]
    assert torch.equal(buffer._actions[:60], saved["rows"][1])
    found = snapshot.take_snapshot(folder)
    assert found["scores"] is None
    figures.snapshot_panels(found, "t", "c")
    full = {"parts": {"online_buffer": {**saved, "first": 0}}}
    with pytest.raises(ValueError, match="online rows have overwritten the dataset"):
        snapshot.online_buffer(files._replace(state=full))


def test_a_snapshot_of_other_data_is_refused(toy_run, monkeypatch):
    folder = toy_run(iql)
    other = dataclasses.replace(toy.make_dataset())
    other.provenance["sha256"] = "other"
    monkeypatch.setattr(snapshot.sources, "resolve", lambda *a, **k: other)
    with pytest.raises(ValueError, match="is not the run's"):
        snapshot.take_snapshot(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(ValueError, match="no finished run"):
        snapshot.take_snapshot(folder)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
)
def test_auc_by_brute_force(low, high):
    wins = [1.0 if b > a else 0.5 if a == b else 0.0 for a in low for b in high]
    found = snapshot.auc(np.array(low, float), np.array(high, float))
    assert found == pytest.approx(np.mean(wins))


def test_projection_finds_the_direction_that_was_put_in():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(600, 3, generator=generator)
    line = torch.linspace(-3, 3, 600)[:, None] * torch.tensor([[1.0, 1.0, 1.0]])
    rows = line + 0.1 * noise
    off, on = rows[:300], rows[300:]  # one end of the line, the other end
    found = snapshot.projection_numbers(
        [off[:, :2], off[:, 2:]], [on[:, :2], on[:, 2:]], points=300
    )
    assert found["variance"][0] > 0.99 and sum(found["variance"]) <= 1.0 + 1e-9
    ends = np.array(found["offline"])[:, 0], np.array(found["online"])[:, 0]
    assert ends[0].mean() < -1.0 and ends[1].mean() > 1.0
    flat = [torch.ones(5, 2), torch.ones(5, 1)]
    assert snapshot.projection_numbers(flat, flat, points=5)["offline"][0] == [0.0, 0.0]


def test_action_error_is_that_of_the_policy_on_each_row():
    class Still:
        def act(self, state):
            return np.array([0.5, -0.5], dtype=np.float32)

    states = torch.zeros(4, 3)
    off = [states, torch.tensor([[0.5, -0.5]]).repeat(4, 1)]
    on = [states, torch.tensor([[1.5, -0.5]]).repeat(4, 1)]
    found = snapshot.error_numbers(Still(), off, on)
    assert (found["offline_mean"], found["online_mean"]) == (0.0, 0.5)
    assert sum(found["offline"]) == 4 and sum(found["online"]) == 4


# ---------------------------------------------------------------- raw returns

OWN = ("Hopper-v5", "my_package:Walk-v0")


@pytest.fixture
def own_tasks(make_run, tmp_path):
    """Two environments of the user's own, three seeds; `dare` gains 300 on each return."""
    folder = tmp_path / "results" / "own"
    for label, gain in (("iql", 0.0), ("dare", 10.0)):
        add([*own_runs(make_run, label, gain)], folder)
    groups_ = [{"title": "Both", "labels": ["iql", "dare"]}]
    groups_[0]["contrasts"] = [["dare", "iql"]]
    (folder / "experiment.yaml").write_text(yaml.safe_dump({"groups": groups_}))
    return folder


def own_runs(make_run, label, gain, **options):
    for seed in range(3):
        for env in OWN:
            # The training return of each row, and an own seed of evaluations per task.
            yield make_run(
                gain=gain,
                seed=seed,
                env=env,
                name=label,
                metrics={"train_return": 500.0 + gain},
                **{"scale": RAW, **options},
            )


def test_a_run_without_reference_scores_is_stored_by_its_returns(own_tasks):
    path = own_tasks / "runs/dare/my_package_Walk-v0-s1.json"
    record = json.loads(path.read_text())
    assert record["env"] == "my_package:Walk-v0" and record["score_unit"] == "raw return"
    assert all(e["returns"] == e["scores"] for e in record["evaluations"])
    assert record["training"] == 510.0
    assert set(record["metrics"]) == {"step", "train_return"}
    # A run with scores stays the text that it was.
    assert "score_unit" not in json.loads(
        next(ROOT.glob("results/hopper_cpu/runs/*/*.json")).read_text()
    )


def test_a_page_of_raw_returns_says_return_and_means_each_task_alone(
    own_tasks, monkeypatch
):
    drawn = {"curve_panels": [], "difference_panels": []}

    def draw(name, *args, **options):
        drawn[name].append(args)
        return b""

    for name in drawn:
        monkeypatch.setattr(figures, name, functools.partial(draw, name))
    report.write_report(own_tasks)
    text = text_of(own_tasks)
    assert "All numbers are raw returns, in each environment's own unit." in text
    for absent in ("score", "regret", "collapsed", "mean of 2 tasks"):
        assert absent not in text.lower()
    records = {}
    for r in read_store(own_tasks):
        online = [e["returns"] for e in r["evaluations"] if e["phase"] == "online"]
        found = records.setdefault((r["label"], r["env"]), [])
        found.append(np.mean(online[-4:]))
    for env in OWN:
        gap = np.mean(records["dare", env]) - np.mean(records["iql", env])
        row = row_of(text, "dare − iql", env)
        assert row[4].split()[0] == f"{gap:.1f}" and row[3].split()[0] == "10.0"
        after = np.array(records["dare", env])
        shown = f"{after.mean():.1f} ± {after.std(ddof=1):.1f}"
        assert row_of(text, env, "dare", "0–2")[3].endswith(f"→ {shown}")
        assert f"On {env}, which all of them ran." in text
        name = f"figures/both-differences-{env.replace(':', '_')}.png"
        assert name in text and (own_tasks / name).is_file()
    assert "final return [95 %]" in text and "mean return of the training" in text
    labels = {args[3] for args in drawn["curve_panels"]}
    assert labels == {"raw return", "return of training episodes"}
    panels, _, x_label, caption = drawn["difference_panels"][0]
    assert list(panels) == ["final return", "training episodes"]
    assert x_label == "return above iql" and caption.startswith("95 % intervals; Hopper")
    with open(own_tasks / "returns.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and "regret" not in rows[0]
    assert {row["env"] for row in rows} == set(OWN)
    assert not (own_tasks / "scores.csv").exists()


def test_a_cost_table_of_raw_returns_does_not_halve_them(own_tasks, no_pictures):
    for path in own_tasks.glob("runs/*/*.json"):
        record = json.loads(path.read_text())
        path.write_text(dump_json({**record, "cpu_seconds": 60.0}))
    report.write_report(own_tasks)
    row = row_of(text_of(own_tasks), "iql", "6", "1.0 ± 0.0")
    assert row == ["iql", "6", "70 ± 0", "1.0 ± 0.0"]


@pytest.mark.parametrize("scale", [D4RL, NORMALIZED])
def test_returns_and_scores_of_two_kinds_do_not_share_a_page(
    scale, own_tasks, make_run, tmp_path
):
    other = make_run(env="hopper-medium-v2", name="iql", scale=scale)
    says = (
        rf"raw return \(.* on Hopper-v5\) and {scale.label} \(iql on hopper-medium-v2\)"
    )
    with pytest.raises(ValueError, match=says) as error:
        add([other], own_tasks)
    assert "different experiments" in str(error.value) and "\n" not in str(error.value)
    add([other], tmp_path / "results" / "scores")
    stray = next((tmp_path / "results/scores/runs/iql").iterdir())
    shutil.copy(stray, own_tasks / "runs/iql" / stray.name)
    with pytest.raises(ValueError, match="cannot stand in one table"):
        report.write_report(own_tasks)


def test_own_reference_scores_are_scores_that_must_agree(
    make_run, tmp_path, no_pictures
):
    options = {"scale": NORMALIZED, "env": "Hopper-v5"}
    folder = tmp_path / "x"
    add(
        [make_run(seed=s, name="a", ref_max_score=9.0, **options) for s in (0, 1)],
        folder,
    )
    report.write_report(folder)
    text = text_of(folder)
    assert "normalized by the runs' own `ref_min_score`" in text and "| regret |" in text
    add([make_run(name="b", ref_max_score=8.0, **options)], folder)
    with pytest.raises(ValueError, match="ref_max_score of b and a differ"):
        report.write_report(folder)


def test_a_unit_that_nobody_knows_is_refused(make_run, own_tasks):
    folder = make_run()
    change_summary(folder, score_unit="points")
    with pytest.raises(
        ValueError, match="summary.json is damaged.*'points' is not one of"
    ):
        read_run(folder)
    path = own_tasks / "runs/dare/Hopper-v5-s0.json"
    path.write_text(path.read_text().replace('"raw return"', '"points"'))
    with pytest.raises(ValueError, match=r"Hopper-v5-s0.json is damaged.*'points'"):
        read_store(own_tasks)


# ---------------------------------------------------------------- command line


def test_commands_end_with_one_line(make_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = make_run()
    report.command_line(["add", str(folder), "--to", "results/x", "--as", "a"])
    assert capsys.readouterr().out.splitlines()[-1] == (
        "results/x/runs/a/hopper-medium-v2-s0.json"
    )
    report.command_line(["write"])
    assert "results/x/README.md and 3 files" in capsys.readouterr().out
    report.command_line(["write", "results/x"])
    assert Path("results/x/figures/all-methods-learning.png").is_file()
    for arguments, message in (
        (["add", "nowhere", "--to", "results/x"], "nowhere/summary.json does not exist"),
        (["figures", "nowhere"], "nowhere is no finished run"),
    ):
        with pytest.raises(SystemExit, match=f"error: {message}"):
            report.command_line(arguments)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="error: empty holds no experiment"):
        report.command_line(["write", "empty"])
    (tmp_path / "empty/x").mkdir()
    (tmp_path / "empty/x/experiment.yaml").write_text("title: Planned")
    with pytest.raises(SystemExit, match="error: empty/x holds no runs"):
        report.command_line(["write", "empty"])
