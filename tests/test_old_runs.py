"""Run folders of commit 728f611 are read and resumed as their own code did; see old_runs/."""

import csv
import importlib
import io
import json
import lzma
import shutil
from pathlib import Path

import pytest
from test_pins import pinned_here

from corl.config import parse_config
from scripts import pin_runs

OLD = Path(__file__).parent / "old_runs"
RESUMED = json.loads((OLD / "resumed.json").read_text())


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("name", RESUMED["runs"])
def test_an_old_run_goes_on_as_its_own_code_did(name, tmp_path, monkeypatch):
    shutil.copytree(OLD / name, tmp_path / name)
    shutil.copy(OLD / "rows.hdf5", tmp_path)
    packed = tmp_path / name / "checkpoint.pt.xz"
    (tmp_path / name / "checkpoint.pt").write_bytes(lzma.decompress(packed.read_bytes()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CORL_DARE_CACHE", str(tmp_path / "cache"))
    module = importlib.import_module(f"algorithms.{name}")
    arguments = ["--resume", name, "--online_iterations", "12"]
    summary = module.train(parse_config(module.TrainConfig, arguments))
    assert summary["updates"] == 18
    found, expected = pin_runs.numbers_of(tmp_path / name), RESUMED["runs"][name]
    assert found["dataset"] == expected["dataset"]
    for part, (total, absolute) in expected["sums"].items():
        assert found["sums"][part] == pytest.approx(
            [total, absolute], rel=1e-3, abs=1e-3 * absolute + 1e-6
        ), part
    ours = rows_of((tmp_path / name / "metrics.csv").read_text())
    theirs = rows_of(expected["metrics"])
    assert [(r["step"], r["phase"]) for r in ours] == [
        (r["step"], r["phase"]) for r in theirs
    ]
    if pinned_here(RESUMED):
        assert found["networks"] == expected["networks"]
        assert ours == theirs
