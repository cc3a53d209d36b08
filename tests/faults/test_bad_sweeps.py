"""A sweep file, or a file of a sweep's cells, that cannot be meant ends in one line."""

import json
import os
from pathlib import Path

import harness
import pytest
import yaml

from experiments import sweep, workers
from experiments.cells import write_cell
from experiments.plan import plan

pytestmark = pytest.mark.fault("bad inputs")
ROOT = Path(__file__).parents[2]
IQL = str(ROOT / "algorithms/iql.py")
GOOD = {
    "tasks": ["hopper-medium-v2"],
    "seeds": [0],
    "methods": {"iql": {"algorithm": IQL}},
    "settings": {"offline_iterations": 10, "online_iterations": 10, "eval_freq": 5},
}


def command(argv):
    raise SystemExit(sweep.main(argv))


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs a sweep file, given as fields over those of a good one or as text."""
    monkeypatch.chdir(tmp_path)

    def check(fields, *patterns, flags=()):
        text = fields
        if not isinstance(fields, str | bytes):
            text = yaml.safe_dump({**GOOD, **fields})
        file = tmp_path / "s.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        outcome = harness.run(command, file, *flags)
        harness.assert_refused(outcome, *patterns)
        assert not (tmp_path / "runs").exists()

    return check


METHOD = GOOD["methods"]["iql"]


@pytest.mark.parametrize(
    "fields, patterns",
    [
        ({"seeds": []}, ["seeds is missing or empty", "at least one"]),
        ({"tasks": []}, ["tasks is missing or empty"]),
        ({"methods": {}}, ["methods is missing or empty"]),
        ({"seeds": 0}, ["seeds must be a list, not 0"]),
        ({"seeds": "0"}, ["seeds must be a list"]),
        ({"seeds": {"a": 1}}, ["seeds must be a list"]),
        ({"seeds": [-1]}, ["seeds must be whole numbers from 0", "not -1"]),
        ({"seeds": [2**40]}, ["seeds must be", str(2**40)]),
        ({"seeds": [10**400]}, ["seeds must be"]),
        ({"seeds": [True]}, ["seeds must be", "not True"]),
        ({"seeds": [0.5]}, ["seeds must be", "not 0.5"]),
        ({"seeds": [None]}, ["seeds must be", "not None"]),
        ({"seeds": [[0]]}, ["seeds must be", r"not \[0\]"]),
        ({"seeds": [0, 1, 0]}, ["seeds: 0 is there twice; take one out"]),
        ({"tasks": GOOD["tasks"] * 2}, ["tasks: 'hopper-medium-v2' is there twice"]),
        ({"tasks": "hopper-medium-v2"}, ["tasks must be a list"]),
        ({"tasks": [None]}, ["tasks must be D4RL names or gymnasium ids", "None"]),
        ({"tasks": ["../../etc"]}, ["tasks must be D4RL names or gymnasium ids", "etc"]),
        ({"tasks": ["hoper-medium-v2"]}, ["methods.iql on hoper-medium-v2", "hopper"]),
        ({"name": "../x"}, [r"'\.\./x' cannot be the name", "letters"]),
        ({"name": "/tmp/x"}, ["cannot be the name"]),
        ({"name": ".."}, ["cannot be the name"]),
        ({"name": ""}, ["cannot be the name"]),
        ({"name": "x" * 300}, ["cannot be the name", "at most 100"]),
        ({"name": "a\nb"}, ["cannot be the name"]),
        ({"name": "offline"}, ["cannot be the name"]),
        ({"name": 3}, ["name must be a text, not 3"]),
        ({"methods": {"../x": METHOD}}, [r"methods\.\.\./x", "use letters"]),
        ({"methods": {"x" * 200: METHOD}}, ["at most 100"]),
        ({"methods": ["iql"]}, ["methods must be a block of fields"]),
        ({"methods": {"m": None}}, ["methods.m must be a block of fields, not None"]),
        ({"methods": {"m": {"algorithm": 3}}}, ["algorithm must be a text, not 3"]),
        ({"methods": {"m": {"algorithm": ""}}}, ["methods.m", "not exist|Python file"]),
        ({"methods": {"m": {"algorithm": str(ROOT)}}}, ["methods.m", "not exist"]),
        ({"methods": {"m": {"algorithm": "/etc/passwd"}}}, ["not a Python file"]),
        ({"methods": {"m": {"algorithm": "a\0b"}}}, ["methods.m", "not exist|YAML"]),
        ({"methods": {"m": {"algorithms": IQL}}}, ["field algorithms", "algorithm?"]),
        (
            {"methods": {"m": {"algorithm": "algorithms/iql.py"}}},
            ["does not exist in /", "working folder", f"start the sweep in {ROOT}"],
        ),
        (
            {"methods": {"m": {"algorithm": "mine/x.py"}}},
            ["mine/x.py does not exist in /", "mend its path"],
        ),
        ({"config": "no/{task}.yaml"}, ["no/hopper_medium.yaml", "mend its path"]),
        ({"config": "{task}.yaml"}, ["hopper_medium.yaml does not exist in /"]),
        ({"config": "/etc"}, ["config /etc does not exist"]),
        ({"config": 3}, ["config must be a text"]),
        ({"settings": []}, ["settings must be a block of fields"]),
        ({"settings": None}, ["settings must be a block of fields, not None"]),
        ({"settings": {1: 2}}, ["settings: unknown field 1"]),
        ({"settings": {"discount": 2}}, ["discount", "2"]),
        ({"settings": {"seed": 3}}, ["seed is given by seeds"]),
        ({"settings": {"name": "x"}}, ["name is given by"]),
        ({"settings": {"beta.x": 1}}, ["beta"]),
        ({"offline_settings": {"offline_iterations": 0}}, ["offline_iterations 0"]),
        ({"offline_settings": {"eval_freq": 4}}, ["eval_freq 4 does not divide"]),
        ({"share_offline": "yes please"}, ["share_offline must be true or false"]),
        ({"grid": []}, ["grid must be a block of fields"]),
        ({"grid": {"beta": 3}}, ["grid.beta must be a list of values, not 3"]),
        ({"grid": {"beta": []}}, ["grid.beta must be a list of values"]),
        ({"grid": {"beta": [3.0, 3.0]}}, ["grid.beta: 3.0 is there twice"]),
        ({"grid": {"beta": [3, 3.0]}}, ["grid.beta: 3.0 is there twice"]),
        ({"grid": {"beta": [{"a": 1}]}}, ["beta"]),
        ({"grid": {"beta": [[1]]}}, ["beta"]),
        ({"grid": {"betta": [1]}}, ["unknown field betta", "beta"]),
        ({"grid": {3: [1]}}, ["unknown field 3"]),
        ({"grid": {"seed": [1, 2]}}, ["seed is given by seeds"]),
        ({"grid": {"runs_dir": ["/tmp/x"]}}, ["runs_dir is given by --runs_dir"]),
        (
            {
                "grid": {
                    name: [i / 1000 for i in range(1, 900)]
                    for name in ("discount", "tau", "iql_tau")
                }
            },
            ["make 726572699 cells", "at most 10000"],
        ),
        ({"seeds": list(range(10_500))}, ["make 10500 cells"]),
        ({"method": {}}, ["unknown field method", "methods?"]),
        ("", ["tasks is missing"]),
        ("- a\n- b\n", ["s.yaml must hold"]),
        ("a: [\n", ["s.yaml is not readable YAML"]),
        ("tasks: [a]\ntasks: [b]\n", ["tasks is there twice"]),
        ("tasks: " + "[" * 2000 + "]" * 2000, ["s.yaml"]),
        ("tasks: &a [*a]\n", ["s.yaml"]),
        ("tasks: !!python/object/apply:os.system [ls]\n", ["s.yaml", "tag|YAML"]),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(
                f"{y}: &{y} [{', '.join([f'*{x}'] * 10)}]\n"
                for x, y in zip("abcdefgh", "bcdefghi", strict=True)
            ),
            ["s.yaml"],
        ),
        (b"\xff\xfe\x00tasks", ["s.yaml"]),
        (b"tasks: \x00\x00", ["s.yaml"]),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, str | dict | bytes) else "",
)
def test_a_bad_sweep_file_is_refused_before_anything_starts(fields, patterns, refused):
    refused(fields, *patterns)


@pytest.mark.parametrize(
    "flags, patterns",
    [
        (["--workers", "-1"], ["workers", "-1"]),
        (["--workers", "0"], ["workers", "0"]),
        (["--workers", "two"], ["workers", "two"]),
        (["--gpus", "-0.5"], ["gpus", "-0.5"]),
        (["--gpus", "nan"], ["gpus", "nan"]),
        (["--retries", "-1"], ["retries", "-1"]),
        (["--only", "awac"], ["--only", "no method awac", "iql"]),
        (["--address", "nowhere"], ["nowhere|Ray"]),
        (["--address", "127.0.0.1:1", "--workers", "2"], ["--workers is for"]),
    ],
)
def test_a_bad_flag_is_refused_by_name(flags, patterns, refused):
    refused({}, *patterns, flags=flags)


@pytest.mark.parametrize(
    "make, patterns",
    [
        (lambda path: None, ["no.yaml does not exist"]),
        (lambda path: path.mkdir(), ["no.yaml", "not exist|no file"]),
        (lambda path: path.symlink_to(path), ["no.yaml"]),
        (os.mkfifo, ["no.yaml"]),
    ],
)
def test_a_sweep_file_that_is_none(make, patterns, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "no.yaml")
    harness.assert_refused(harness.run(command, "no.yaml"), *patterns)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "imported|no algorithm"),
        ("def", "imported: SyntaxError"),
        ("raise SystemExit(0)", "imported: SystemExit"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("TrainConfig = 3", "no algorithm"),
        (
            "from dataclasses import dataclass\n@dataclass\nclass TrainConfig:\n    x: int = 1\n",
            "does not say which fields are ONLINE",
        ),
        (
            "from dataclasses import dataclass\n@dataclass\nclass TrainConfig:\n"
            "    ONLINE = BOOKKEEPING = frozenset()\n    x: int = 1\n",
            "its TrainConfig lacks env, eval_freq",
        ),
    ],
)
def test_a_file_that_is_no_algorithm(text, words, refused, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    refused({"methods": {"m": {"algorithm": "mine.py"}}}, "mine.py", words)


def test_a_store_that_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(GOOD))
    (tmp_path / "runs").write_text("mine")
    harness.assert_refused(harness.run(command, "s.yaml"), "runs is no folder")


# ---------------------------------------------------------------- files of a begun sweep


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The folder of a cell that was begun."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**GOOD, "share_offline": False}))
    (cell,) = plan("s.yaml", "runs")
    write_cell(cell)
    return cell.folder


DEEP = "[" * 100_000 + "]" * 100_000
DAMAGED_STATES = [
    *("", "{", "[]", "3", "null", '"done"', "\0\0\0", DEEP),
    '{"state": ' + '{"a": ' * 60 + "1" + "}" * 61,
    '{"state": "finished"}',
    '{"state": 1}',
    '{"state": null}',
    '{"state": ["done"]}',
    '{"state": {"done": 1}}',
    '{"state": "done", "score": "high"}',
    '{"state": "done", "score": [1.0]}',
    '{"state": "done", "score": true}',
    '{"state": "done", "score": ' + "1" * 5000 + "}",
    '{"state": "done", "score": ' + "1" * 30 + "}",
    '{"state": "failed", "error": "lost"}',
    '{"state": "failed", "error": [1]}',
    '{"state": "done", "state": "failed"}',
]


@pytest.mark.parametrize("text", DAMAGED_STATES, ids=lambda text: repr(text)[:40])
def test_a_damaged_state_is_named_with_its_fix(text, begun):
    (begun / "state.json").write_text(text)
    for flags in ([], ["--status"]):
        outcome = harness.run(command, "s.yaml", *flags)
        harness.assert_refused(outcome, "state.json is damaged", "remove it")


def test_a_state_that_is_no_file_or_no_utf8(begun):
    (begun / "state.json").write_bytes(b'{"state": "\xff"}')
    harness.assert_refused(harness.run(command, "s.yaml"), "state.json is damaged")
    (begun / "state.json").unlink()
    (begun / "state.json").mkdir()
    outcome = harness.run(command, "s.yaml")
    harness.assert_refused(outcome, "state.json cannot be read", "remove it")


def run_cell(argv):
    workers.main(argv)


GOOD_CELL = {
    **{"method": "iql", "task": "hopper-medium-v2", "seed": 0, "algorithm": IQL},
    **{"overrides": {}, "offline": None, "is_model": False},
}


@pytest.mark.parametrize("field", GOOD_CELL)
@pytest.mark.parametrize("value", ["lacks", {"a": [1]}, 2.5], ids=str)
def test_a_damaged_cell_file_is_named(field, value, begun, monkeypatch):
    values = dict(GOOD_CELL)
    values.pop(field) if value == "lacks" else values.update({field: value})
    if field == "overrides" and isinstance(value, dict):
        pytest.skip("any object will do")
    (begun / "cell.json").write_text(json.dumps(values))
    outcome = harness.run(run_cell, begun)
    harness.assert_refused(outcome, "cell.json is damaged", field, "run the sweep again")


@pytest.mark.parametrize("text", ["", "[", DEEP, "NaN", '{"seed": 1e999}'])
def test_a_cell_file_that_is_no_object_is_named(text, begun):
    (begun / "cell.json").write_text(text)
    harness.assert_refused(harness.run(run_cell, begun), "cell.json is damaged")


@pytest.mark.parametrize(
    "text", ["", "- a", "a: [", "a: 1\na: 2", "\0", "env: [" * 500, "1: {2: 3}"]
)
def test_the_settings_of_a_begun_cell_that_are_damaged_are_no_traceback(text, begun):
    (begun / "run").mkdir()
    (begun / "run/config.yaml").write_text("a: 1")
    (begun / "config.yaml").write_text(text)
    outcome = harness.run(command, "s.yaml", "--status")
    if outcome.status == 0:
        # Nothing in it contradicts the sweep, which writes it anew.
        assert not outcome.trace and "0 of 1 done" in outcome.out
    else:
        harness.assert_refused(outcome, "config.yaml", "remove")


@pytest.mark.parametrize(
    "text",
    ["", "step\n", "a,b\n1", "step\n" + "9" * 400, "step\n-5", "step\n\0", "\xff"],
)
def test_damaged_metrics_do_not_stop_the_table(text, begun):
    (begun / "run").mkdir()
    (begun / "run/metrics.csv").write_bytes(text.encode("latin-1"))
    outcome = harness.run(command, "s.yaml", "--status")
    assert outcome.status == 0 and not outcome.trace, outcome
