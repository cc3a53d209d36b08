"""The cells of a sweep with stacked seeds: groups, what each cell gets, stops and failures."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from corl.config import parse_config
from corl.layers import ConfigError
from experiments import stacked
from experiments.cells import lock, read_state
from experiments.plan import plan
from experiments.programs import load_algorithm
from tests import toy

ROOT = Path(__file__).parent.parent
SETTINGS = {
    **{"offline_iterations": 20, "online_iterations": 8, "eval_freq": 4},
    **{"n_episodes": 1, "batch_size": 16, "buffer_size": 5000, "log_freq": 4},
    **{"eval_switch": 3, "threads": 1, "compile": False, "mixing_ratio": 0.5},
}
METHODS = {
    "keep": {"algorithm": str(ROOT / "algorithms/td3_bc.py")},
    "uniform": {
        "algorithm": str(ROOT / "algorithms/dare_td3_bc.py"),
        "settings": {"dare.weights": "uniform"},
    },
}


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A folder, entered, whose only task is the toy; `write(**fields)` makes its sweep file."""
    toy.install(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)

    def write(**fields):
        values = {"tasks": [toy.TASK], "seeds": [1, 3], "methods": METHODS}
        values |= {"settings": SETTINGS, **fields}
        Path("s.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return Path("s.yaml")

    return write


class Here:
    """Runs a group in this process, and has ended before it is asked."""

    def __init__(self, group):
        algorithm, *words = stacked.prepare(group, "cpu")
        program, self.status = load_algorithm(algorithm), 0
        try:
            program.train(parse_config(program.TrainConfig, words))
        except Exception as error:
            (group.folder / "log.txt").write_text(f"error: {error}\n")
            self.status = 2

    def poll(self):
        return self.status

    def terminate(self):
        raise AssertionError("it has ended")

    def wait(self, timeout=None):
        return self.status


def run(file, begin=Here, at_once=1):
    """Are all cells done?"""
    groups = stacked.groups_of(plan(file), Path("runs"))
    ready = [group for group in map(stacked.unbegun, groups) if group.cells]
    return stacked.Driver(ready, at_once, begin).run()


def cell_of(file, method, seed):
    (found,) = (c for c in plan(file) if (c.method, c.seed) == (method, seed))
    return found


def trainer(folder):
    state = torch.load(folder / "run/checkpoint.pt", weights_only=True)
    return state["parts"]["trainer"]


# ---------------------------------------------------------------- groups


def test_a_group_has_the_seeds_of_a_method_and_task_and_models_come_first(sweep):
    groups = stacked.groups_of(plan(sweep()), Path("runs"))
    assert [group.label for group in groups] == [
        f"offline td3_bc {toy.TASK} seeds 1, 3",
        f"keep {toy.TASK} seeds 1, 3",
        f"uniform {toy.TASK} seeds 1, 3",
    ]
    assert len({group.folder for group in groups}) == 3


def test_points_of_a_grid_are_groups_of_their_own(sweep):
    groups = stacked.groups_of(plan(sweep(grid={"policy_noise": [0.1, 0.2]})), Path("r"))
    assert [len(group.cells) for group in groups] == [2] * len(groups)
    assert sum(group.cells[0].method.startswith("keep,") for group in groups) == 2


def test_seeds_that_cannot_be_stacked_are_refused_with_the_reason(sweep):
    spot = {"spot": {"algorithm": str(ROOT / "algorithms/spot.py")}}
    settings = {k: v for k, v in SETTINGS.items() if k != "mixing_ratio"}
    cells = plan(sweep(methods=spot, settings=settings))
    with pytest.raises(
        ConfigError, match="each seed trains its own VAE.*experiments.sw"
    ):
        stacked.groups_of(cells, Path("runs"))


def test_a_program_that_takes_no_seeds_is_refused(sweep):
    (model, *_) = plan(sweep())

    @dataclasses.dataclass
    class Config:
        name: str = "walk"

    model.config = Config()
    with pytest.raises(ConfigError, match="its settings have no `seeds`"):
        stacked.groups_of([model], Path("runs"))


# ---------------------------------------------------------------- runs


def test_each_cell_gets_the_run_of_its_seed_from_the_model_of_its_seed(sweep, capsys):
    file = sweep()
    assert run(file)
    shown = capsys.readouterr().out
    assert shown.count("done: ") == 3 and "FAILED" not in shown
    for method in ("keep", "uniform"):
        for seed in (1, 3):
            cell = cell_of(file, method, seed)
            summary = json.loads((cell.folder / "run/summary.json").read_text())
            state = read_state(cell.folder)
            assert state == {"state": "done", "score": summary["score_final"]}
            assert summary["seed"] == seed and summary["stacked"] == 2
            assert "cpu_seconds" not in summary
            assert summary["offline_run"].endswith(f"{cell.model.folder.name}/run")
            model = json.loads((cell.model.folder / "run/summary.json").read_text())
            assert summary["score_offline"] == model["score_offline"]
    # Nothing is left where they ran but what they printed.
    assert not list(Path("runs/stacked").glob("*/*/")), "runs and models have moved"


def test_a_cell_holds_what_a_run_alone_from_the_same_model_gives(sweep, monkeypatch):
    file = sweep()
    assert run(file)
    cell = cell_of(file, "uniform", 3)
    alone = dataclasses.replace(cell.config, runs_dir="alone")
    load_algorithm(cell.algorithm).train(alone)
    (folder,) = Path("alone").iterdir()
    folder.rename("alone/run")
    mine, own = trainer(cell.folder), trainer(Path("alone"))
    for name in ("actor", "critic_1", "critic_2"):
        for key, value in own[name].items():
            torch.testing.assert_close(mine[name][key], value, rtol=1e-3, atol=1e-4)
    rows = [
        (place / "run/evaluations.csv").read_text().splitlines()
        for place in (cell.folder, Path("alone"))
    ]
    assert len(rows[0]) == len(rows[1])
    assert sum(",switch," in row for row in rows[0]) == SETTINGS["eval_switch"]


def test_what_is_done_stays_and_a_new_seed_joins(sweep):
    file = sweep(seeds=[1])
    assert run(file)
    before = (cell_of(file, "keep", 1).folder / "run/summary.json").stat().st_mtime_ns
    begun = []

    def begin(group):
        begun.append(group.label)
        return Here(group)

    file = sweep(seeds=[1, 3])
    assert run(file, begin)
    assert all(label.endswith("seeds 3") for label in begun) and len(begun) == 3
    after = (cell_of(file, "keep", 1).folder / "run/summary.json").stat().st_mtime_ns
    assert after == before


def test_a_failed_group_is_told_and_so_are_those_that_need_its_model(sweep, capsys):
    file = sweep()

    def begin(group):
        here = Here.__new__(Here)
        stacked.prepare(group, "cpu")
        (group.folder / "log.txt").write_text("error: the disk is full\n")
        here.status = 2
        return here

    assert not run(file, begin)
    shown = capsys.readouterr().out
    assert "FAILED: offline td3_bc" in shown and "the disk is full" in shown
    assert shown.count("FAILED: ") == 3
    assert (
        f"keep {toy.TASK} seeds 1, 3: offline td3_bc {toy.TASK} seed 1 is not done"
        in shown
    )
    assert read_state(cell_of(file, "keep", 1).model.folder)["state"] == "failed"
    # The next time it is tried again.
    assert run(file)


def test_a_run_on_other_data_than_its_model_fails_its_cell_and_stops_no_other(
    sweep, capsys
):
    file = sweep()

    def begin(group):
        here = Here(group)
        if group.cells[0].method == "keep":
            (run_folder,) = group.folder.glob("*-s1-*")
            summary = json.loads((run_folder / "summary.json").read_text())
            summary["dataset"]["sha256"] = "other"
            (run_folder / "summary.json").write_text(json.dumps(summary))
        return here

    assert not run(file, begin)
    shown = capsys.readouterr().out
    assert shown.count("FAILED: ") == 1
    assert "the dataset (other) is not the one that the offline model" in shown
    states = {s: read_state(cell_of(file, "keep", s).folder)["state"] for s in (1, 3)}
    assert states == {1: "failed", 3: "done"}
    assert cell_of(file, "uniform", 1).is_done


def test_a_stopped_group_leaves_every_cell_its_checkpoint(sweep, capsys):
    file = sweep()
    run(file, begin=lambda group: Here(group))
    # A store in which the runs of one method stand where a stop left them.
    groups = stacked.groups_of(plan(file), Path("runs"))
    (group,) = (g for g in groups if g.cells[0].method == "keep")
    for cell in group.cells:
        (cell.folder / "state.json").unlink()
        (cell.folder / "run/summary.json").unlink()
        (cell.folder / "run").rename(group.folder / f"keep-s{cell.seed}")
    assert stacked.unbegun(group).cells == []
    shown = capsys.readouterr().out
    for cell in group.cells:
        assert (cell.folder / f"keep-s{cell.seed}/checkpoint.pt").is_file()
        assert f"{cell.label} was begun; experiments.sweep goes on with it" in shown


def test_a_run_without_a_checkpoint_is_begun_anew(sweep):
    file = sweep()
    group = stacked.groups_of(plan(file), Path("runs"))[0]
    run_folder = group.folder / "offline-td3_bc-s1"
    run_folder.mkdir(parents=True)
    (run_folder / "config.yaml").write_text("seed: 1\n")
    assert [cell.seed for cell in stacked.unbegun(group).cells] == [1, 3]
    assert not run_folder.exists()


def test_an_error_of_the_driver_stops_what_runs_and_keeps_it(sweep):
    file, asked = sweep(), []

    class Endless:
        def __init__(self, group):
            stacked.prepare(group, "cpu")

        def poll(self):
            raise KeyboardInterrupt

        def terminate(self):
            asked.append("terminate")

        def wait(self, timeout=None):
            asked.append("wait")
            return 143

    with pytest.raises(KeyboardInterrupt):
        run(file, Endless)
    assert asked == ["terminate", "wait"]
    # One that does not listen is ended before its runs are moved.
    asked.clear()

    class Deaf(Endless):
        def wait(self, timeout=None):
            asked.append("wait")
            if timeout is not None:
                raise subprocess.TimeoutExpired("deaf", timeout)
            return -9

        def kill(self):
            asked.append("kill")

    with pytest.raises(KeyboardInterrupt):
        run(file, Deaf)
    assert asked == ["terminate", "wait", "kill", "wait"]


# ---------------------------------------------------------------- the command line


def test_unknown_tasks_and_seeds_are_refused_in_one_line(sweep, capsys):
    file = str(sweep())
    assert stacked.main([file, "--tasks", "hopper-medium-v2"]) == 2
    assert (
        "the sweep has no task hopper-medium-v2; it has toy" in capsys.readouterr().err
    )
    assert stacked.main([file, "--seeds", "2"]) == 2
    assert "--seeds: the sweep has no seed 2; it has 1, 3" in capsys.readouterr().err


def test_a_cell_that_another_sweep_runs_is_left_alone(sweep, capsys):
    file = sweep()
    cell = cell_of(file, "keep", 1)
    cell.folder.mkdir(parents=True)
    with lock(cell.folder):
        assert stacked.main([str(file), "--device", "cpu"]) == 2
    assert f"another process runs {cell.label}; wait for it" in capsys.readouterr().err


def _wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(0.1)


def test_the_command_runs_processes_and_sigterm_makes_them_save(tmp_path):
    """The real command on a real task; its cells hold checkpoints when it has ended."""
    settings = {**SETTINGS, "online_iterations": 100_000, "dataset_rows": 2000}
    fields = {"tasks": ["hopper-medium-v2"], "seeds": [0, 1], "settings": settings}
    methods = {"keep": {"algorithm": "algorithms/td3_bc.py"}}
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({**fields, "methods": methods}))
    command = [sys.executable, "-m", "experiments.stacked", str(file), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--runs_dir", str(tmp_path / "runs")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    group = tmp_path / "runs/stacked"
    try:
        # Both seeds are beyond the first evaluation of the online phase.
        _wait_for(lambda: len(list(group.glob("s-keep*/*/checkpoint.pt"))) == 2, process)
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 130, shown
    assert "stopped; the same command goes on" in shown
    assert len(list((tmp_path / "runs/s").glob("keep-*/*/checkpoint.pt"))) == 2
    assert len(list((tmp_path / "runs/offline").glob("*/model.pt"))) == 2
