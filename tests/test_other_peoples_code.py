"""The benchmark that runs public repositories: what counts as running, and the shorter loops."""

import json
import runpy
import struct
import sys
from pathlib import Path

import pytest

from benchmarks import other_peoples_code as bench
from benchmarks import short_loops


def entry(**changes):
    fields = {"repository": "some/body", "commit": "1234567", "commands": ("a.py",)}
    return bench.Entry(**{**fields, "evidence": rf"score: {bench.NUMBER}", **changes})


def test_an_evaluation_counts_from_the_named_one_on(tmp_path):
    text = "score: -1.5\nscore: 2e3\n"
    assert bench.evaluation(entry(), tmp_path, text) == -1.5
    assert bench.evaluation(entry(nth=2), tmp_path, text) == 2000.0
    assert bench.evaluation(entry(nth=3), tmp_path, text) is None
    assert str(bench.evaluation(entry(), tmp_path, "score: nan")) == "nan"


def test_evaluations_are_read_from_files_and_from_tensorboard(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1.txt").write_text("score: 7")
    found = bench.evaluation(entry(written="out/*.txt"), tmp_path, "score: 1")
    assert found == 7.0
    record = b"\x0a\x08eval/rew\x15" + struct.pack("<f", 116.5) + b"\x00"
    (tmp_path / "events.out.tfevents.1").write_bytes(record)
    events = entry(written="events*", evidence=rf"eval/rew {bench.NUMBER}")
    assert bench.evaluation(events, tmp_path, "") == 116.5


def test_the_first_fault_is_the_last_error_line():
    text = "KeyError: 1\nmore\nValueError: two\n{'log': 1}\n"
    assert bench.fault(text) == "ValueError: two"
    assert bench.fault("") == "no output"


@pytest.mark.parametrize("says, runs", [("score: 3.5", True), ("score: nan", False)])
def test_a_repository_is_run_in_a_copy(tmp_path, says, runs):
    (tmp_path / "some+body").mkdir()
    script = f"open('made', 'w'); print({says!r})"
    (tmp_path / "some+body" / "a.py").write_text(script)
    outcome = bench.run_entry(entry(), tmp_path, sys.executable, 60, None)
    assert outcome.runs is runs and ("3.5" if runs else "nan") in outcome.words
    assert not (tmp_path / "some+body" / "made").exists()
    missing = bench.run_entry(entry(repository="no/body"), tmp_path, "", 1, None)
    assert missing.words == "no checkout no+body" and not missing.runs


def test_loops_are_shorter_in_the_file_of_the_script_alone(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "helper.py").write_text("LENGTH = len(range(100))")
    (tmp_path / "job.py").write_text(
        "from helper import LENGTH\nimport sys\n"
        "print(len(range(100)), len(range(7)), list(range(60)), LENGTH, sys.argv[1:])"
    )
    ours = str(Path(short_loops.__file__).resolve().parent)
    monkeypatch.setattr(sys, "path", [ours, *sys.path])
    words = ["x", "100=2", "60=0:60:25", str(tmp_path / "job.py"), "--seed=1"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(short_loops.__file__, run_name="__main__")
    assert capsys.readouterr().out == "2 7 [0, 25, 50] 100 ['--seed=1']\n"


def test_the_page_has_the_outcomes_that_are_stored():
    root = Path(bench.ROOT)
    lines = (root / "results" / "other_peoples_code.jsonl").read_text().splitlines()
    stored = {json.loads(line)["repository"] for line in lines}
    assert stored == {e.repository for e in bench.ENTRIES} and len(stored) == 35
    page = (root / "docs" / "shim.md").read_text()
    results = bench.read(root / "results" / "other_peoples_code.jsonl")
    assert bench.table(results) in page
    assert f"**{sum(o.runs for o in results.values())} of 35 run.**" in page
    assert bench.commands(list(bench.ENTRIES)).strip() in page
