"""Stored results, and finished runs that become results, that are damaged end in one line."""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import harness
import pytest

from algorithms import iql
from experiments import report

pytestmark = pytest.mark.fault("bad inputs")
RESULTS = Path(__file__).parents[2] / "results/hopper_cpu"
# One with a snapshot, and one of another seed, so that they are compared.
STORED = sorted(RESULTS.glob("runs/*/*-s0.json"))[0]
RECORD = json.loads(STORED.read_text())
DEEP = '{"a": ' * 20_000 + "1" + "}" * 20_000
GONE = object()


def command(argv):
    report.command_line(argv)


def write(tmp_path, text):
    """An experiment with one stored run, of this text or these bytes; its file."""
    file = tmp_path / "x/runs" / STORED.parent.name / STORED.name
    file.parent.mkdir(parents=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def changed(place, value):
    """The record with another value at a place such as `evaluations.0.step`."""
    record = copy.deepcopy(RECORD)
    *path, last = [int(p) if p.isdigit() else p for p in place.split(".")]
    inner = record
    for part in path:
        inner = inner[part]
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value
    return record


def assert_page_refused(tmp_path, *patterns):
    outcome = harness.run(command, "write", tmp_path / "x")
    harness.assert_refused(outcome, STORED.name, *patterns)
    assert not (tmp_path / "x/README.md").exists()


def test_the_good_record_makes_a_page(tmp_path):
    write(tmp_path, json.dumps(RECORD))
    outcome = harness.run(command, "write", tmp_path / "x")
    assert outcome.status == 0 and (tmp_path / "x/README.md").exists(), outcome


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "3", "\0", "[" * 50_000, DEEP, "// no\n{}"),
        json.dumps(RECORD)[:-100],
        json.dumps(RECORD).replace('"seed"', '"label"'),
        '{"format": 1, "format": 1}',
        b"\xff\xfe{}",
        b"\x1f\x8b\x08\0\0\0",
    ],
    ids=lambda text: repr(text)[:20],
)
def test_a_stored_file_that_is_no_object(text, tmp_path):
    write(tmp_path, text)
    assert_page_refused(tmp_path, "damaged|no stored run", "add")


@pytest.mark.parametrize(
    "place, value",
    [
        *((name, GONE) for name in sorted(set(RECORD) - {"snapshot"})),
        *((name, None) for name in sorted(set(RECORD) - {"snapshot", "before"})),
        *((name, [1, {}]) for name in sorted(set(RECORD) - {"snapshot"})),
        ("format", 2),
        ("format", "1"),
        ("env", "../../x"),
        ("label", "/tmp/x"),
        ("seed", -1),
        ("seed", "0"),
        ("seed", True),
        ("updates", 10**30),
        ("updates_per_second", math.nan),
        ("wall_seconds", math.inf),
        ("wall_seconds", "long"),
        ("commit", 3),
        ("versions", {"torch": 2}),
        ("machine.processor", 3),
        ("machine.cores", "two"),
        ("machine", {}),
        ("dataset", {}),
        ("dataset.sha256", 3),
        ("dataset.rows", "many"),
        ("config", {}),
        ("config.offline_iterations", "0"),
        ("config.offline_iterations", None),
        ("before", {}),
        ("before.scores", []),
        ("before.scores", ["high"]),
        ("evaluations", []),
        ("evaluations", [3]),
        ("evaluations.0.phase", "later"),
        ("evaluations.0.phase", GONE),
        ("evaluations.0.step", "5000"),
        ("evaluations.0.step", 1.5),
        ("evaluations.0.returns", []),
        ("evaluations.0.returns", [[1.0]]),
        ("evaluations.0.returns.0", None),
        ("evaluations.0.returns.0", math.nan),
        ("evaluations.0.scores.0", "nan"),
        ("evaluations.0.scores.0", -math.inf),
        ("evaluations.1.scores", [1.0]),
        ("metrics.step", GONE),
        ("metrics.step.0", None),
        ("metrics.step", [1]),
        ("metrics.q_loss", 3),
        ("metrics.q_loss.0", "low"),
        ("metrics.q_loss", []),
        ("snapshot", 3),
        ("snapshot", {}),
        ("snapshot.rows", "many"),
        ("snapshot.action_error", None),
        ("snapshot.action_error.edges", [0.0]),
        ("snapshot.action_error.offline.0", 0.5),
        ("snapshot.projection.variance", [1.0]),
        ("snapshot.projection.offline.0", [1.0]),
        ("snapshot.projection.online", []),
    ],
    ids=lambda value: str(value)[:30] if value is not GONE else "gone",
)
def test_a_stored_run_with_a_wrong_value_is_named(place, value, tmp_path):
    record = {**RECORD, "snapshot": RECORD.get("snapshot", SNAPSHOT)}
    if place.startswith("snapshot."):
        record["snapshot"] = copy.deepcopy(SNAPSHOT)
        keep, RECORD["snapshot"] = RECORD.get("snapshot"), record["snapshot"]
        try:
            record = changed(place, value)
        finally:
            RECORD["snapshot"] = keep
            if keep is None:
                del RECORD["snapshot"]
    else:
        record = changed(place, value)
    write(tmp_path, json.dumps(record))
    assert_page_refused(tmp_path, place.split(".")[0] + "|no stored run", "add")


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


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path)])
def test_a_stored_file_that_is_no_file(make, tmp_path):
    file = write(tmp_path, "")
    file.unlink()
    make(file)
    assert_page_refused(tmp_path, "cannot be read|does not exist")


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("- a", "must hold"),
        ("a: [", "YAML"),
        ("title: a\ntitle: b", "twice|YAML"),
        ("title: 3", "title must be text"),
        ("titel: a", "unknown field titel"),
        ("groups: {}", "groups must be a list"),
        ("groups: [3]", "a group"),
        ("groups: [{}]", "needs a title and labels"),
        ("groups: [{title: a, labels: b}]", "labels must be a list"),
        ("groups: [{title: a, labels: [b], baseline: c}]", "baseline c"),
        ("names: [a]", "names must be a block"),
        ("names: {a: 3}", "names must give each label a text"),
        ("baseline: nobody", "baseline nobody is in no group"),
        ("title: " + "[" * 3000, "YAML|nested"),
        ("note: &a [*a]", "YAML|note"),
    ],
)
def test_a_bad_experiment_file_is_named(text, pattern, tmp_path):
    write(tmp_path, json.dumps(RECORD))
    (tmp_path / "x/experiment.yaml").write_text(text)
    outcome = harness.run(command, "write", tmp_path / "x")
    harness.assert_refused(outcome, "experiment.yaml", pattern)


# ---------------------------------------------------------------- a finished run, to be stored


@pytest.fixture(scope="module")
def finished(good, tmp_path_factory):
    """A finished run folder of a dataset that is known."""
    folder = tmp_path_factory.mktemp("finished")
    flags = harness.short_run(folder, good)
    assert harness.run(harness.algorithm(iql), *flags).status == 0
    (run,) = (folder / "runs").iterdir()
    # A commit that is unknown, as in an unpacked archive, is another fault.
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "commit": "0" * 40}))
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def assert_not_stored(run, *patterns):
    outcome = harness.run(command, "add", run, "--to", run.parent / "x", "--as", "m")
    harness.assert_refused(outcome, *patterns)
    assert not (run.parent / "x").exists()


def test_the_good_run_is_stored(run):
    outcome = harness.run(command, "add", run, "--to", run.parent / "x", "--as", "m")
    assert outcome.status == 0, outcome


@pytest.mark.parametrize(
    "name, value, pattern",
    [
        ("env", "../../x", "env"),
        ("env", 3, "env must be a text"),
        ("algorithm", None, "algorithm must be a text"),
        ("seed", -1, "seed"),
        ("seed", "0", "seed"),
        ("seed", 2**70, "63 bits"),
        ("machine", 3, "machine must be an object"),
        ("machine", {}, "machine lacks"),
        ("versions", [], "versions must be an object"),
        ("versions", {"torch": None}, "versions.torch must be a text"),
        ("score_final", "high", "score_final must be a number"),
        ("score_final", None, "score_final"),
        ("score_final", 1e6, "belongs to another run"),
        ("score_final", math.nan, "nan"),
        ("updates", 1.5, "updates must be a whole number"),
        ("updates_per_second", "fast", "updates_per_second must be a number"),
        ("wall_seconds", GONE, "lacks wall_seconds"),
        ("dataset", "good", "dataset"),
        ("dataset", {"source": "file", "label": "x"}, "sha256"),
        (
            "dataset",
            {"source": 1, "label": [2], "sha256": {"a": 3}, "rows": 4},
            "dataset",
        ),
        ("commit", "unknown", "commit"),
        ("commit", 3, "commit"),
        ("offline_run", 3, "offline_run must be a text"),
    ],
)
def test_a_wrong_value_in_a_summary_is_named(name, value, pattern, run):
    summary = json.loads((run / "summary.json").read_text())
    summary.pop(name, None) if value is GONE else summary.update({name: value})
    (run / "summary.json").write_text(json.dumps(summary))
    assert_not_stored(run, "run", pattern)


@pytest.mark.parametrize("text", ["", "{", "[]", DEEP, "\0", '{"a": 1, "a": 2}'])
def test_a_damaged_summary_is_named(text, run):
    (run / "summary.json").write_text(text)
    assert_not_stored(run, "summary.json is damaged", "resume it")


@pytest.mark.parametrize("file", ["metrics.csv", "evaluations.csv"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"\xff\xfe" + data,
        lambda data: data.replace(b"step", b"stop"),
        lambda data: data.replace(b"online", b"online,,,x"),
        lambda data: data + b"40,on",
        lambda data: data.replace(b"\n10", b"\nten", 1),
        lambda data: data + b'"' + b"x" * 200_000,
        GONE,
    ],
)
def test_damaged_curves_are_named(file, damage, run):
    data = (run / file).read_bytes()
    (run / file).unlink()
    if damage is not GONE:
        (run / file).write_bytes(damage(data))
        if (run / file).read_bytes() == data:
            pytest.skip("nothing of that kind in this file")
    outcome = harness.run(command, "add", run, "--to", run.parent / "x", "--as", "m")
    if outcome.status == 0 and file == "metrics.csv":
        # A row that was cut off is not among the means that are stored.
        assert not outcome.trace
    else:
        harness.assert_refused(outcome, f"{file}|final score", "run")


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("", "lacks name"),
        ("- a", "config.yaml"),
        ("name: [", "config.yaml"),
        ("name: 3\noffline_iterations: 10", "name must be a text"),
        (
            "name: a\noffline_iterations: ten",
            "offline_iterations must be a whole number",
        ),
        (
            "name: a\noffline_iterations: 1.5",
            "offline_iterations must be a whole number",
        ),
    ],
)
def test_a_damaged_config_is_named(text, pattern, run):
    (run / "config.yaml").write_text(text)
    assert_not_stored(run, "config.yaml", pattern)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"step": 1}', json.dumps({**SNAPSHOT, "rows": "x"})]
)
def test_a_damaged_snapshot_is_named(text, run):
    (run / "snapshot.json").write_text(text)
    assert_not_stored(run, "snapshot.json is damaged", "experiments.report figures")


@pytest.mark.parametrize("name", ["../../evil", "a/b", "", "no_such", 3, None])
def test_figures_of_a_run_of_another_program_are_refused(name, run):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "algorithm": name}))
    outcome = harness.run(command, "figures", run)
    harness.assert_refused(outcome, "algorithm")


@pytest.mark.parametrize("label", ["../x", "/x", "a b", "-a", "", "."])
def test_a_bad_label_is_refused(label, run):
    if not label:
        pytest.skip("no label is the config's name")
    arguments = "add", run, "--to", run.parent / "x", f"--as={label}"
    outcome = harness.run(command, *arguments)
    harness.assert_refused(outcome, "label", "--as")


def test_folders_that_are_no_runs_and_no_results(tmp_path):
    for words in (("add", tmp_path, "--to", tmp_path / "x"), ("write", tmp_path)):
        harness.assert_refused(harness.run(command, *words), "not exist|no experiment")
    assert os.listdir(tmp_path) == []


@pytest.mark.whole
@pytest.mark.parametrize("seed", range(150))
def test_flipped_bytes_in_a_stored_run_are_no_traceback(seed, tmp_path):
    """Where the text is still a stored run, a page is made of it."""
    import random

    rng = random.Random(seed)
    data = bytearray(STORED.read_bytes())
    for _ in range(rng.choice([1, 3, 30])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    write(tmp_path, bytes(data))
    outcome = harness.run(command, "write", tmp_path / "x")
    assert not outcome.trace, outcome.trace
    if outcome.status:
        harness.assert_refused(outcome, STORED.name)
