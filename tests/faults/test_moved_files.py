"""A run goes on wherever it is called from, and where its files have moved it says so."""

import os
import shutil
from pathlib import Path

import harness
import pytest
import torch
import yaml

from algorithms import cql, dare_cal_ql, iql
from corl.config import parse_config
from corl.layers import with_absolute_paths
from experiments import store
from experiments.values import dump_json

pytestmark = pytest.mark.fault("bad inputs")


@pytest.fixture
def here(tmp_path, monkeypatch, good):
    """Three folders: of the data, of work, and another one, which is where a run is resumed."""
    for name in ("data", "work", "other"):
        (tmp_path / name).mkdir()
    shutil.copy(good, tmp_path / "data/good.hdf5")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def begin(module=iql, **fields):
    """A run that has done its first steps; its folder, absolute."""
    fields = {"runs_dir": "runs", "online_iterations": 5, **fields}
    dataset = fields.pop("dataset_path", "../data/good.hdf5")
    flags = harness.short_run(Path(), dataset, **fields)
    outcome = harness.run(harness.algorithm(module), *flags)
    assert outcome.status == 0, outcome
    return max(Path(os.path.expanduser(fields["runs_dir"])).glob("*")).absolute()


def resume(folder, *flags, module=iql):
    flags = ["--resume", folder, "--online_iterations", 10, *flags]
    return harness.run(harness.algorithm(module), *flags)


def weights(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["parts"]["trainer"]
    return [t for name in sorted(state) for t in leaves(state[name])]


def leaves(value):
    if isinstance(value, dict):
        return [t for v in value.values() for t in leaves(v)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_a_run_with_relative_paths_is_resumed_from_another_folder(here, monkeypatch):
    run = begin(checkpoints_path="kept")
    monkeypatch.chdir(here / "other")
    outcome = resume(run)
    assert outcome.status == 0, outcome
    assert (here / "work/kept/checkpoint_19.pt").is_file()
    assert list((here / "other").iterdir()) == []
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["dataset_path"] == str(here / "data/good.hdf5")
    assert config["runs_dir"] == "runs"


def test_no_path_of_this_machine_reaches_a_stored_run(here):
    run = begin(checkpoints_path="kept", online_iterations=10)
    summary = run / "summary.json"
    # A copy of the code without git does not know its commit, and is not what is tried here.
    summary.write_text(summary.read_text().replace('"unknown"', '"abc"'))
    assert str(here) in (run / "config.yaml").read_text()
    assert str(here) not in dump_json(store.read_run(run))


def test_a_home_folder_is_found_in_every_path(here):
    fields = {"runs_dir": "~/runs", "checkpoints_path": "~/kept"}
    run = begin(dataset_path="~/data/good.hdf5", **fields)
    assert run.parent == here / "runs" and list((here / "kept").glob("*.pt"))
    begin(load_model=f"~/runs/{run.name}/checkpoint.pt", offline_iterations=0)
    outcome = resume(f"~/runs/{run.name}")
    assert outcome.status == 0, outcome
    (here / "c.yaml").write_text("seed: 7\n")
    assert parse_config(iql.TrainConfig, ["--config", "~/c.yaml"]).seed == 7
    assert list((here / "work").glob("~*")) == []


def test_names_are_no_paths():
    config = iql.TrainConfig(name="~", group="~/x", project="~")
    assert with_absolute_paths(config) == config
    for fields in (
        {"dataset_path": "minari:mujoco/hopper/medium-v0"},
        {"dataset_path": "mujoco/hopper/medium-v0", "dataset_source": "minari"},
    ):
        config = iql.TrainConfig(**fields)
        assert with_absolute_paths(config) == config


def test_a_run_goes_on_with_its_data_in_a_new_place(here):
    run = begin()
    (here / "data/good.hdf5").rename(here / "other/moved.hdf5")
    harness.assert_refused(resume(run), "good.hdf5")
    harness.assert_refused(resume(run, "--dataset_path", "../other/no.hdf5"), "no.hdf5")
    outcome = resume(run, "--dataset_path", "../other/moved.hdf5")
    assert outcome.status == 0, outcome
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["dataset_path"] == str(here / "other/moved.hdf5")


def test_other_data_is_refused_before_any_update(here):
    run = begin()
    other = harness.write_dataset(here / "other.hdf5", harness.good_rows(seed=1))
    outcome = resume(run, "--dataset_path", other)
    harness.assert_refused(outcome, "other.hdf5", "sha256", "--dataset_path")
    assert "estimated" not in outcome.out


def test_a_run_folder_may_move(here):
    run = begin()
    shutil.move(run, here / "other/run")
    outcome = resume(here / "other/run")
    assert outcome.status == 0 and (here / "other/run/summary.json").is_file(), outcome


@pytest.mark.parametrize(
    "module",
    [iql, *(pytest.param(m, marks=pytest.mark.whole) for m in (cql, dare_cal_ql))],
)
def test_a_loaded_model_is_not_needed_again(module, here):
    method = harness.FAST_DARE if module is dare_cal_ql else {}
    model = begin(module, name="model", runs_dir="models", **method) / "checkpoint.pt"
    fields = {"load_model": model, "offline_iterations": 0, "eval_freq": 5, **method}
    whole = begin(module, online_iterations=10, runs_dir="whole", **fields)
    part = begin(module, online_iterations=5, runs_dir="part", **fields)
    model.unlink()
    outcome = resume(part, module=module)
    assert outcome.status == 0, outcome
    first, second = weights(whole), weights(part)
    assert len(first) == len(second) > 10
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
