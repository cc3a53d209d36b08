"""Sweeps: the plan, shared offline models, restarts, deaths, failures; and Ray, if installed.

Most cells here run a small program in place of an algorithm file, `CELL_PROGRAM`: a random walk
that is saved like a run, so that a wrong resume or a wrong start shows in its numbers.
"""

import contextlib
import dataclasses
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
import yaml

from corl.layers import ConfigError
from experiments import sweep
from experiments.cells import lock, read_state, write_cell, write_failed, write_state
from experiments.plan import digest, plan
from experiments.programs import load_algorithm
from experiments.ray_head import OWN_SETTINGS
from experiments.workers import (
    REQUIREMENTS,
    STOPPED,
    process_arguments,
    run_cell,
    run_process,
)
from tests import toy

ROOT = Path(__file__).parent.parent
CELL_PROGRAM = """
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from corl import checkpoints, runs
from corl.config import FinetuneConfig, main

@dataclass
class Dare:
    cap: Optional[int] = None


@dataclass
class TrainConfig:
    ONLINE = {"online_iterations", "load_model", "utd", "dare"}
    BOOKKEEPING = FinetuneConfig.BOOKKEEPING
    RESUMABLE = FinetuneConfig.RESUMABLE

    device: str = "cpu"
    env: str = "toy"
    seed: int = 0
    eval_freq: int = 5
    offline_iterations: int = 10
    online_iterations: int = 20
    load_model: str = ""
    lr: float = 0.1
    utd: int = 1
    threads: int = 1
    runs_dir: str = "runs"
    resume: Optional[str] = None
    wandb_mode: str = "disabled"
    project: str = "p"
    group: str = "g"
    name: str = "n"
    checkpoints_path: Optional[str] = None
    data: str = "d"
    pause: float = 0.0  # seconds per step
    trap: str = "none"  # at step 12: error, exit137 (always), kill (once)
    dare: Dare = field(default_factory=Dare)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, not {self.lr}")
        if self.env == "unknown":
            raise ValueError("no task unknown")


class Trainer:
    def __init__(self):
        self.w = torch.zeros(3)

    def state_dict(self):
        return {"w": self.w}

    def load_state_dict(self, state):
        self.w = state["w"]


def walk(run, t, phase, config, trainer):
    if phase == "online" and t == 12 and config.trap != "none":
        print("a trap closes")
        mark = Path(config.runs_dir) / "trap"
        if config.trap == "error":
            raise ValueError("the trap is an error")
        if config.trap == "exit137":
            raise SystemExit(137)
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(config.pause)
    trainer.w = trainer.w + config.lr * torch.from_numpy(np.random.randn(3))
    run.log(t + 1, phase, {"w": trainer.w[0]})


def train(config):
    with runs.Run(config, "walk", ["w"]) as run:
        run.dataset = {"sha256": config.data * 64, "source": "toy"}
        np.random.seed(config.seed)
        trainer = Trainer()
        if config.load_model:
            trainer.load_state_dict(checkpoints.load_corl_checkpoint(config.load_model, ["w"]))
        print("raylet", os.environ.get("RAY_RAYLET_PID"))
        print("threads", os.environ.get("OMP_NUM_THREADS"), "start", trainer.w.tolist())
        parts = {"trainer": trainer}
        if run.checkpoint is not None:
            print("resumed at", run.step)
            run.restore(parts)
        first = config.offline_iterations
        last = first + config.online_iterations
        for phase, end in (("offline", first), ("online", last)):
            for t in run.steps(phase, end):
                walk(run, t, phase, config, trainer)
                if (t + 1) % config.eval_freq == 0:
                    value = trainer.w.sum().numpy()[None]
                    run.evaluation(t + 1, phase, value, value)
                    run.step = t + 1
                    run.save(parts)
        run.save(parts)
        if run.stop_requested:
            return run.interrupted()
        return run.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
"""
METHODS = {
    "walk": {"algorithm": "walk.py"},
    "fast": {"algorithm": "walk.py", "settings": {"utd": 4}},
}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder with the cell program, entered; `write(**fields)` makes its sweep file."""
    (tmp_path / "walk.py").write_text(CELL_PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x"])

    def write(**fields):
        values = {"tasks": ["a-v2"], "seeds": [0, 1], "methods": METHODS, **fields}
        values = {k: v for k, v in values.items() if v is not None}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return tmp_path / "s.yaml"

    return write


class HerePool:
    """Runs cells in this process, the latest start first: only the sweep keeps an order."""

    def __init__(self, slots=99, in_line=0):
        self.started, self.slots, self.most = [], slots, 0
        self.in_line = in_line  # cells that wait for a slot

    def room(self, cell, running, line=True):
        return running < self.slots + self.in_line * line

    def start(self, cell):
        self.started.append(cell)
        return len(self.started) - 1

    def ended(self, handles, seconds):
        self.most = max(self.most, len(handles))
        return [(handles[-1], self.run(self.started[handles[-1]]), "")]

    def run(self, cell):
        code, shown = 0, io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            try:
                run_cell(cell.folder)
            except SystemExit as end:
                code = end.code
            except Exception:
                code = traceback.format_exc()
        if isinstance(code, str):
            shown.write(code + "\n")
            code = 1
        with open(cell.folder / "log.txt", "a") as file:
            file.write(shown.getvalue())
        return code


class ProcessPool:
    """Runs cells as Ray's workers do, in processes of their own, from threads."""

    def __init__(self):
        self.threads = ThreadPoolExecutor(2)

    def room(self, cell, running, line=True):
        return True

    def start(self, cell):
        return self.threads.submit(run_process, *process_arguments(cell))

    def ended(self, handles, seconds):
        done, _ = wait(handles, seconds, FIRST_COMPLETED)
        return [(future, *future.result()) for future in done]


def drive(file, pool=None, **options):
    """Plan and run here; returns all done?, cells, what was printed, the pool."""
    cells, pool, stream = plan(file), pool or HerePool(), io.StringIO()
    done = sweep.drive(cells, pool, sweep.Table(cells, stream), **options)
    return done, cells, stream.getvalue(), pool


def states(cells):
    return [read_state(c.folder).get("state") for c in cells]


def numbers(folder):
    """What must be the same however often a sweep was stopped: file -> content."""
    folder = Path(folder)
    found = {}
    for name in ("metrics.csv", "evaluations.csv", "config.yaml", "cell.json"):
        for file in sorted(folder.rglob(name)):
            found[str(file.relative_to(folder))] = file.read_text()
    for file in sorted([*folder.rglob("checkpoint.pt"), *folder.rglob("model.pt")]):
        state = torch.load(file, weights_only=True)
        trainer = state["parts"]["trainer"] if "parts" in state else state
        found[str(file.relative_to(folder))] = {
            k: v.tolist() for k, v in trainer.items()
        }
    return found


# ---------------------------------------------------------------- the plan


def test_a_plan_is_methods_times_overrides_times_tasks_times_seeds(store):
    grid = {"dare.cap": [3, None], "lr": [0.1, 0.2]}
    cells = plan(store(tasks=["a-v2", "b-v2"], grid=grid, share_offline=False))
    assert len(cells) == 2 * 4 * 2 * 2 == len({c.folder for c in cells})
    seen = {
        (c.method, c.config.env, c.config.seed, c.config.dare.cap, c.config.lr)
        for c in cells
    }
    assert ("fast,dare.cap=null,lr=0.2", "b-v2", 1, None, 0.2) in seen
    assert len(seen) == 32 and {c.config.utd for c in cells} == {1, 4}
    assert not Path("runs").exists(), "a plan writes nothing"


def test_seed_by_seed_all_methods_start_together_after_their_models(store):
    tasks = {"tasks": ["b-v2", "a-v2"], "seeds": [1, 0]}
    cells, by_method = plan(store(by_seed=True, **tasks)), plan(store(**tasks))
    assert {c.folder for c in cells} == {c.folder for c in by_method}
    methods = list(dict.fromkeys(c.method for c in by_method if not c.is_model))
    assert len(methods) > 1
    runs = [(c.task, c.seed, c.method) for c in cells if not c.is_model]
    places = [("b-v2", 1), ("b-v2", 0), ("a-v2", 1), ("a-v2", 0)]
    assert runs == [(*place, method) for place in places for method in methods]
    begun = set()
    for before, cell in zip([None, *cells], cells, strict=False):
        assert cell.model is None or cell.model.folder in begun
        # A model stands right before a cell of its own task and seed.
        if before is not None and before.is_model:
            assert (before.task, before.seed) == (cell.task, cell.seed)
        begun.add(cell.folder)


def test_seed_by_seed_some_methods_start_together_after_their_models(store):
    file = store(by_seed=True, seeds=[1, 0])
    models = [f"offline walk a-v2 seed {seed}" for seed in (1, 0)]
    first, second = ([f"{m} a-v2 seed {s}" for m in ("fast", "walk")] for s in (1, 0))
    found = [c.label for c in plan(file, only=["fast", "walk"])]
    assert found == [models[0], *first, models[1], *second]


def test_seed_by_seed_no_model_of_a_later_seed_runs_before_the_cells_of_the_first(store):
    """Although the workers take one cell more than they run."""
    file = store(by_seed=True, seeds=[0, 1, 2])
    done, cells, _, pool = drive(file, HerePool(slots=1, in_line=1))
    assert done and [c.seed for c in pool.started] == [c.seed for c in cells]
    assert pool.most == 2, "cells of a seed do stand in line"


def test_methods_share_an_offline_model_unless_their_offline_settings_differ(store):
    methods = {
        **METHODS,
        "capped": {"algorithm": "walk.py", "settings": {"dare": {"cap": 1}}},
        "longer": {"algorithm": "walk.py", "settings": {"online_iterations": 30}},
        "steep": {"algorithm": "walk.py", "settings": {"lr": 0.5}},
        "alone": {"algorithm": "walk.py", "settings": {"online_iterations": 0}},
        "given": {"algorithm": "walk.py", "settings": {"load_model": "m.pt"}},
    }
    cells = plan(store(methods=methods, seeds=[0]))
    by_name = {c.method: c for c in cells}
    models = [c for c in cells if c.is_model]
    assert cells[:2] == models and len(models) == 2
    same = {by_name[m].model.folder for m in ("walk", "fast", "capped", "longer")}
    assert len(same) == 1 and by_name["steep"].model.folder not in same
    assert by_name["alone"].model is None and by_name["given"].model is None
    model = by_name["walk"].model.config
    assert (model.offline_iterations, model.online_iterations) == (10, 0)
    tuned = by_name["walk"].config
    assert (tuned.offline_iterations, tuned.online_iterations) == (0, 20)
    assert tuned.load_model == str(by_name["walk"].model.folder / "model.pt")
    assert by_name["given"].config.offline_iterations == 10


def test_another_task_seed_or_offline_length_is_another_model(store):
    def models(**fields):
        return {c.folder for c in plan(store(**fields)) if c.is_model}

    first = models(seeds=[0])
    others = (
        models(seeds=[1]),
        models(seeds=[0], tasks=["b-v2"]),
        models(seeds=[0], settings={"offline_iterations": 20}),
        models(seeds=[0], offline_settings={"lr": 0.3}),
    )
    assert all(len(o) == 1 and not o & first for o in others)
    assert models(seeds=[0], name="x", settings={"device": "auto", "utd": 2}) == first


def test_settings_that_change_no_result_are_the_same_cell(store):
    def folders(**settings):
        return {c.folder for c in plan(store(settings=settings))}

    same = {"device": "cuda", "threads": 2, "wandb_mode": "offline", "group": "x"}
    assert folders(**same) == folders() == folders(lr=0.1)
    assert not {f for f in folders(lr=0.2) if "offline" not in str(f)} & folders()


def test_a_new_field_renames_no_cell():
    old = dataclasses.make_dataclass("C", [("a", int, 1), ("b", int, 2)])
    new = dataclasses.make_dataclass("C", [("a", int, 1), ("b", int, 2), ("c", int, 3)])
    assert digest("x", old(a=5), set()) == digest("x", new(a=5), set())
    assert digest("x", new(a=5), set()) != digest("x", new(a=5, c=4), set())
    assert digest("x", old(), set()) != digest("y", old(), set())


# Folders of the offline models of two shipped sweeps as they were planned before this package
# was split: a store of old runs is found under these names.
OFFLINE_CELLS = {
    "hopper_cpu": {
        "iql-hopper-medium-v2-s0-0b0db71f",
        "iql-hopper-medium-v2-s1-50ce8f09",
        "iql-hopper-medium-v2-s2-cc109435",
    },
    "cal_ql_cpu": {
        "cal_ql-hopper-medium-v2-s0-e649f161",
        "cal_ql-hopper-medium-v2-s1-846be496",
        "cal_ql-hopper-medium-v2-s2-369ac725",
        "cql-hopper-medium-v2-s0-8722a839",
        "cql-hopper-medium-v2-s1-a7dbd578",
        "cql-hopper-medium-v2-s2-b8a1a22c",
    },
}
# The same of some cells that start from them.
FINE_TUNED_CELLS = {
    "hopper_cpu": {
        "iql-halves-hopper-medium-v2-s0-0f53bb91",
        "policy-ratio-hopper-medium-v2-s1-110c4d4a",
        "cap-32-hopper-medium-v2-s2-1c29ed59",
    },
    "cal_ql_cpu": {
        "cal-ql-hopper-medium-v2-s0-c6b7f6ab",
        "dare-cal-ql-hopper-medium-v2-s1-c1c542a2",
        "cql-hopper-medium-v2-s2-025b67c1",
    },
}


@pytest.mark.parametrize("name", OFFLINE_CELLS)
def test_the_cells_of_shipped_sweeps_keep_their_folders(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    cells = plan(ROOT / f"sweeps/{name}.yaml", tmp_path)
    assert {c.folder.name for c in cells if c.is_model} == OFFLINE_CELLS[name]
    assert FINE_TUNED_CELLS[name] <= {c.folder.name for c in cells}


def test_the_offline_model_is_that_of_the_baseline_a_file_names(store):
    named = CELL_PROGRAM.replace("@dataclass", 'BASELINE = "walk"\n\n\n@dataclass', 1)
    Path("dare_other.py").write_text(named)
    Path("dare_walk.py").write_text(CELL_PROGRAM)  # its name says nothing
    Path("third.py").write_text(named.replace('"walk"', '"dare_other"'))
    names = "walk", "dare_other", "dare_walk", "third"
    methods = {m: {"algorithm": f"{m}.py"} for m in names}
    cells = {c.method: c for c in plan(store(methods=methods, seeds=[0]))}
    assert cells["walk"].model is cells["dare_other"].model
    assert cells["third"].model is cells["walk"].model, "the baseline of its baseline"
    assert cells["dare_other"].model.algorithm == "walk.py"
    assert cells["dare_walk"].model.algorithm == "dare_walk.py"


def test_blocks_of_other_algorithms_are_left_out_and_said_once_per_place(store, capsys):
    Path("a.yaml").write_text("other: {x: 1}\n")
    plan(store(config="{task}.yaml", settings={"other.y": 2}, seeds=[0, 1, 2]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("'other' is not for this" in line for line in lines)
    assert lines[0].startswith(str(Path.cwd() / "s.yaml: settings"))
    assert lines[1].startswith("a.yaml")


def test_fields_that_a_method_leaves_nothing_to_do_are_named_once(store, capsys):
    Path("algorithms").symlink_to(ROOT / "algorithms")
    own = {"dare.weights": "uniform", "dare.weight": 0.5}
    methods = {"uniform": {"algorithm": "algorithms/dare_td3_bc.py", "settings": own}}
    fields = {"dare.cap": 3, "compile": False, "threads": 1}
    tasks = ["hopper-medium-v2"]
    plan(store(methods=methods, tasks=tasks, settings=fields, seeds=[0, 1, 2]))
    line = (
        f"{Path.cwd() / 's.yaml'}: methods.uniform.settings: with dare.weights uniform"
    )
    assert capsys.readouterr().out.count(line) == 1


def test_a_block_that_yaml_shares_between_methods_is_not_changed_by_one(store):
    block = {"cap": 1}  # safe_dump writes an anchor for the second use
    first = {"algorithm": "walk.py", "settings": {"dare": block, "dare.cap": 3}}
    second = {"algorithm": "walk.py", "settings": {"dare": block}}
    file = store(methods={"first": first, "second": second}, seeds=[0])
    assert "*id" in file.read_text()
    caps = {c.method: c.config.dare.cap for c in plan(file) if not c.is_model}
    assert caps == {"first": 3, "second": 1}


def test_config_files_take_the_tasks_place_and_lose_against_the_sweep(store):
    Path("a.yaml").write_text("lr: 0.7\nutd: 3\nother: {x: 1}\nenv: z\n")
    cells = plan(store(config="{task}.yaml", settings={"other.y": 2}))
    plain = next(c for c in cells if c.method == "walk").config
    fast = next(c for c in cells if c.method == "fast").config
    assert (plain.lr, plain.utd, fast.utd, plain.env) == (0.7, 3, 4, "a-v2")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"sedes": [1]}, ["s.yaml: unknown field sedes; did you mean seeds?"]),
        ({"seeds": None}, ["s.yaml: seeds is missing or empty"]),
        ({"methods": {}}, ["methods is missing or empty"]),
        ({"seeds": 3}, ["seeds must be a list, not 3"]),
        ({"seeds": ["a"]}, ["seeds must be whole numbers", "not 'a'"]),
        ({"seeds": [0, 0]}, ["seeds: 0 is there twice; take one out"]),
        ({"tasks": [3]}, ["tasks must be D4RL names or gymnasium ids", "not 3"]),
        ({"tasks": ["unknown"]}, ["methods.walk on unknown: no task unknown"]),
        ({"name": "offline"}, ["'offline' cannot be the name"]),
        ({"name": "../x"}, ["'../x' cannot be the name"]),
        ({"share_offline": 1}, ["share_offline must be true or false, not 1"]),
        ({"config": "no/{task}.yaml"}, ["no/a.yaml does not exist"]),
        ({"settings": {"lrr": 1}}, ["s.yaml: settings: unknown field lrr", "lr?"]),
        ({"settings": {"seed": 1}}, ["settings: seed is given by seeds: [...]"]),
        ({"settings": {"runs_dir": "x"}}, ["runs_dir is given by --runs_dir"]),
        ({"settings": {"dare.capp": 1}}, ["unknown field dare.capp", "dare.cap?"]),
        ({"settings": {"dare": 3, "dare.cap": 1}}, ["dare.cap is set, but dare is 3"]),
        ({"settings": {"lr": "soon"}}, ["settings: lr must be float, not 'soon'"]),
        ({"settings": {"lr": -1}}, ["methods.walk on a-v2: lr must be positive"]),
        ({"settings": {"eval_freq": 4}}, ["eval_freq 4 does not divide", "10"]),
        ({"offline_settings": {"x": 4}}, ["offline_settings: unknown field x"]),
        ({"grid": {"lr": 1}}, ["grid.lr must be a list of values, not 1"]),
        ({"grid": {"lr": []}}, ["grid.lr must be a list of values"]),
        ({"grid": {"lrr": [1]}}, ["methods.walk.grid: unknown field lrr"]),
        ({"methods": {"m": {}}}, ["methods.m: algorithm is missing"]),
        ({"methods": {"m": 3}}, ["methods.m must be a block of fields, not 3"]),
        ({"methods": {"a/b": {"algorithm": "walk.py"}}}, ["methods.a/b: use letters"]),
        (
            {"methods": {"m": {"algorithm": "no.py"}}},
            ["methods.m", "no.py", "not exist"],
        ),
        ({"methods": {"m": {"algorithm": "s.yaml"}}}, ["s.yaml is not a Python file"]),
        ({"methods": {"m": {"algorithm": "e.py"}}}, ["e.py is no algorithm"]),
        (
            {"methods": {"m": {"algorithm": "g.py"}}},
            ["methods.m: g.py does not say which fields are ONLINE"],
        ),
        (
            {"methods": {"m": {"algorithm": "h.py"}}},
            ["h.py shares the offline phase of no, but no.py does not exist"],
        ),
        (
            {"methods": {"m": {"algorithm": "f.py"}}},
            ["f.py cannot be imported: SyntaxError"],
        ),
        ({"methods": {"m": {"algorithm": "walk.py", "sets": {}}}}, ["field sets"]),
        (
            {"methods": {"m": {"algorithm": "walk.py", "offline": "no.py"}}},
            ["no.py does not exist"],
        ),
        (
            {"methods": {"m": {"algorithm": "walk.py", "settings": {"other": {}}}}},
            ["methods.m.settings: unknown field other"],
        ),
    ],
)
def test_a_bad_sweep_is_refused_in_one_line_before_anything_starts(
    store, capsys, fields, words
):
    Path("e.py").write_text("")
    Path("f.py").write_text("def")
    Path("g.py").write_text(CELL_PROGRAM.replace("    ONLINE =", "    LATER ="))
    Path("h.py").write_text('BASELINE = "no"\n' + CELL_PROGRAM)
    assert sweep.main([str(store(**fields))]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert all(word in shown.err for word in words), shown.err
    assert shown.out == "" and not Path("runs").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "name a sweep file"),
        (["no.yaml"], "no.yaml does not exist"),
        (["s.yaml", "--workers", "0"], "--workers: must lie in [1, 1024], not '0'"),
        (["s.yaml", "--workers", "2", "--address", "x"], "not for --address"),
        (["s.yaml", "--gpus", "-1"], "--gpus: must lie in [0, 1024], not '-1'"),
        (["s.yaml", "--only", "walk", "run"], "no method run; it has fast, walk"),
    ],
)
def test_bad_flags_are_refused_in_one_line(store, capsys, flags, words):
    store()
    try:
        status = sweep.main(flags)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert words in capsys.readouterr().err


def test_without_ray_the_error_names_the_requirements(store, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert sweep.main([str(store())]) == 2
    assert f"pip install -r {REQUIREMENTS}" in capsys.readouterr().err
    assert (ROOT / REQUIREMENTS).is_file()


@pytest.mark.parametrize(
    "file", sorted(ROOT.glob("sweeps/*.yaml")), ids=lambda f: f.stem
)
def test_the_shipped_sweeps_are_sorted_and_can_be_planned(file, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    values = yaml.safe_load(file.read_text())
    assert list(values) == sorted(values)
    # Two seeds tell what is shared.
    values["seeds"] = values["seeds"][:2]
    (tmp_path / file.name).write_text(yaml.safe_dump(values))
    cells = plan(tmp_path / file.name, tmp_path)
    models = [c for c in cells if c.is_model]
    # One model per baseline, task and seed, whatever the methods change online.
    families = {c.algorithm for c in models}
    assert families and families <= {
        "algorithms/iql.py",
        "algorithms/cal_ql.py",
        "algorithms/cql.py",
        "algorithms/td3_bc.py",
        "algorithms/rebrac.py",
        "algorithms/awac.py",
        "algorithms/spot.py",
        "algorithms/cql_sa.py",
        "algorithms/td3_bc_sa.py",
        "algorithms/famo2o_iql.py",
        "algorithms/famo2o_cql.py",
        "algorithms/wsrl.py",
        "algorithms/e2o.py",
    }
    if "table1" in file.stem:
        shared = {c.method: c.model.algorithm for c in cells if c.model}
        for method, base in (("pex", "iql"), ("edis-iql", "iql"), ("dare-iql", "iql")):
            assert shared[method] == f"algorithms/{base}.py"
        assert shared["edis-cal-ql"] == shared["dare-cal-ql"] == shared["cal-ql"]
    count = len(families) * len(values["tasks"]) * len(values["seeds"])
    if file.stem == "methods_smoke":
        # OPT has settings of its own for each of its two bases.
        count += 2 * len(values["seeds"])
    assert len(models) == count


def test_the_smoke_sweep_runs_every_method_for_as_many_steps(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    cells = plan(ROOT / "sweeps" / "methods_smoke.yaml", tmp_path)
    runs = [c for c in cells if not c.is_model]
    for cell in runs:
        module = load_algorithm(cell.algorithm)
        module.make_trainer(cell.config, 11, 3, 1.0, "cpu")
    files = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("algorithms/*.py")}
    assert sorted(c.algorithm for c in runs) == sorted(files)
    steps = {c.config.online_iterations for c in runs}
    assert steps == {1000} and {(c.task, c.seed) for c in runs} == {
        ("hopper-medium-v2", 0)
    }


# ---------------------------------------------------------------- running


def test_a_sweep_runs_models_first_and_its_cells_start_from_them(store):
    done, cells, shown, pool = drive(store(seeds=[3]))
    assert done and [c.method for c in pool.started] == ["offline walk", "walk", "fast"]
    model, walk, fast = cells
    weights = torch.load(model.folder / "model.pt", weights_only=True)["w"]
    start = f"start {weights.tolist()}"
    assert "start [0.0, 0.0, 0.0]" in (model.folder / "log.txt").read_text()
    for cell in (walk, fast):
        assert start in (cell.folder / "log.txt").read_text()
        summary = json.loads((cell.folder / "run" / "summary.json").read_text())
        assert summary["score_offline"] == pytest.approx(float(weights.sum()))
        assert Path(summary["offline_run"]) == model.folder / "run"
        assert read_state(cell.folder)["score"] == summary["score_final"]
    assert "3 of 3 done" in shown


def test_cells_start_in_the_order_of_the_file_when_a_worker_is_free(store):
    done, cells, _, pool = drive(store(), HerePool(slots=1))
    assert done and pool.most == 1
    assert [c.label for c in pool.started] == [c.label for c in cells]


def test_only_some_methods_run_and_the_others_can_follow(store):
    grid = {"utd": [2, 3]}
    methods = {**METHODS, "more": {"algorithm": "walk.py", "grid": grid}}
    file = store(methods=methods, seeds=[0, 1])
    cells = plan(file)

    def chosen(*names):
        return [c.label for c in plan(file, only=names)]

    models = ["offline walk a-v2 seed 0", "offline walk a-v2 seed 1"]
    fast = ["fast a-v2 seed 0", "fast a-v2 seed 1"]
    more = [f"more,utd={n} a-v2 seed {s}" for n in (2, 3) for s in (0, 1)]
    assert chosen("fast") == models + fast
    assert chosen("more", "fast") == models + more + fast, "in the order asked for"
    assert chosen("more,utd=3") == models + more[2:]
    assert chosen("walk", "fast", "more", "more,utd=2") == [c.label for c in cells]
    alone = {"algorithm": "walk.py", "settings": {"lr": 0.3}}  # a model of its own
    file = store(methods={**METHODS, "alone": alone}, seeds=[0])
    assert len(chosen("walk")) == len(chosen("alone")) == 2


def test_finished_cells_are_never_run_again_and_models_serve_other_sweeps(store):
    drive(store())
    before = numbers("runs")
    done, _, _, pool = drive(store())
    assert done and pool.started == [] and numbers("runs") == before
    done, cells, _, pool = drive(store(name="second", settings={"utd": 9}))
    assert done and not any(c.is_model for c in pool.started)
    assert len(pool.started) == 4 and len(cells) == 6
    assert sweep.main([str(store())]) == 0, "a finished sweep needs no Ray"


def test_a_failed_cell_stops_no_other_and_is_reported_with_its_last_lines(store):
    bad = {"algorithm": "walk.py", "settings": {"trap": "error"}}
    file = store(methods={"bad": bad, **METHODS})
    done, cells, shown, _ = drive(file, retries=5)
    assert not done
    assert {c.method for c in cells if states([c]) == ["failed"]} == {"bad"}
    assert states(cells).count("done") == len(cells) - 2
    assert "FAILED: bad a-v2 seed 1" in shown and "    a trap closes" in shown
    assert shown.count("    error: the trap is an error") == 2
    assert "died" not in shown, "an error is not a death"
    _, _, _, pool = drive(file)
    assert {c.method for c in pool.started} == {"bad"}, "failed ones get another try"


def test_cells_whose_model_failed_are_reported_and_not_started(store):
    Path("broken.py").write_text(CELL_PROGRAM.replace("np.random.seed", "np.no"))
    methods = {**METHODS, "b": {"algorithm": "walk.py", "offline": "broken.py"}}
    done, cells, shown, pool = drive(store(methods=methods, seeds=[0]))
    assert not done and "b" not in {c.method for c in pool.started}
    assert "FAILED: b a-v2 seed 0: its offline model failed" in shown
    assert sorted(states(cells)) == ["done"] * 3 + ["failed"] * 2


def test_a_cell_that_keeps_dying_is_given_up(store):
    method = {"algorithm": "walk.py", "settings": {"trap": "exit137"}}
    file = store(methods={"m": method}, seeds=[0], share_offline=False)
    done, cells, shown, pool = drive(file, retries=2)
    assert not done and len(pool.started) == 3
    assert (
        "died (status 137): m a-v2 seed 0; trying again from its checkpoint, 2 of 2"
        in (shown)
    )
    assert "died 3 times" in shown
    log = (cells[0].folder / "log.txt").read_text()
    assert log.count("resumed at 10") == 2


def test_a_stopped_cell_goes_on_to_the_same_numbers(store, tmp_path):
    drive(store(name="whole"))
    cells = plan(store(name="parts"))
    for cell in cells:
        write_cell(cell)
    for after in (2, 1):  # evaluations after which SIGTERM comes
        for cell in cells:
            if read_state(cell.folder).get("state") == "done":
                continue
            timer = _StopAfter(after)
            with contextlib.redirect_stdout(timer), pytest.raises(SystemExit) as end:
                run_cell(cell.folder)
            assert end.value.code == STOPPED
    done, *_ = drive(store(name="parts"))
    assert done

    def tidy(name):
        found = numbers(tmp_path / "runs" / name)
        return {k: v for k, v in found.items() if k.endswith((".csv", ".pt"))}

    assert tidy("parts") == tidy("whole") and len(tidy("parts")) == 4 * 3


class _StopAfter(io.StringIO):
    """Sends SIGTERM to this process when the given number of evaluations was printed."""

    def __init__(self, lines):
        super().__init__()
        self.left = lines

    def write(self, text):
        self.left -= "normalized score" in text
        if self.left == 0:
            self.left = 99  # once is enough: a second signal stops at once
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def test_a_run_that_died_before_its_first_checkpoint_leaves_nothing_behind(store):
    (cell,) = plan(store(methods={"m": METHODS["walk"]}, seeds=[0]))[1:]
    cell = dataclasses.replace(cell, model=None)
    cell.config = dataclasses.replace(cell.config, load_model="")
    write_cell(cell)
    dead = cell.folder / "m-a-v2-s0-1"
    dead.mkdir()
    (dead / "config.yaml").write_text("")
    run_cell(cell.folder)
    assert not dead.exists() and (cell.folder / "run" / "summary.json").is_file()


def test_killed_between_the_summary_and_the_state_a_cell_only_concludes(store):
    _, cells, *_ = drive(store(seeds=[0]))
    before = numbers("runs")
    for cell in cells:
        (cell.folder / "state.json").unlink()
        os.replace(cell.folder / "run", cell.folder / "n-1")
    (cells[0].folder / "model.pt").unlink()
    done, *_ = drive(store(seeds=[0]))
    assert done and numbers("runs") == before
    assert "resumed at 20" in (cells[1].folder / "log.txt").read_text()


def test_a_cell_on_other_data_than_its_model_is_refused(store):
    Path("other.py").write_text(CELL_PROGRAM.replace("config.data * 64", '"e" * 64'))
    methods = {"m": {"algorithm": "other.py", "offline": "walk.py"}}
    done, cells, shown, _ = drive(store(methods=methods, seeds=[0]))
    assert not done and states(cells) == ["done", "failed"]
    assert "the dataset (eeeeeeeeeeee) is not the one" in shown and "(dddddddd" in shown


def test_a_store_begun_with_another_default_is_refused(store, capsys):
    drive(store())
    Path("walk.py").write_text(
        CELL_PROGRAM.replace("lr: float = 0.1", "lr: float = 0.2")
    )
    load_algorithm.cache_clear()
    assert sweep.main([str(store())]) == 2
    line = capsys.readouterr().err
    assert "was begun with lr 0.1, now it is 0.2" in line and line.count("\n") == 1


def test_a_cell_begun_from_another_offline_model_is_refused(store, capsys):
    drive(store(seeds=[0], offline_settings={"lr": 0.1}))
    assert sweep.main([str(store(seeds=[0], offline_settings={"lr": 0.3}))]) == 2
    line = capsys.readouterr().err
    assert "was begun from the offline model walk-a-v2-s0-" in line
    assert line.count("\n") == 1 and "remove that folder" in line
    other = store(seeds=[0], offline_settings={"lr": 0.3}, name="second")
    assert drive(other)[0], "under another name it is another sweep"


def test_what_another_sweep_does_to_a_failed_cell_hides_no_failure(store):
    bad = {"algorithm": "walk.py", "settings": {"trap": "error"}}
    file = store(methods={"bad": bad, **METHODS}, seeds=[0])

    class Meddled(HerePool):  # another sweep takes up what has failed, as `work` does
        def ended(self, handles, seconds):
            for state in Path("runs/s").glob("bad-*/state.json"):
                state.unlink()
            return super().ended(handles, seconds)

    done, cells, shown, _ = drive(file, Meddled(slots=1))
    assert not done and "FAILED: bad a-v2 seed 0" in shown
    assert shown.count("    error: the trap is an error") == 1


def test_a_failure_is_not_written_over_what_another_sweep_does(store):
    cell = plan(store())[0]
    write_cell(cell)
    with lock(cell.folder):
        write_failed(cell.folder, ["lost"])
    assert read_state(cell.folder) == {}
    write_state(cell.folder, state="done", score=1.0)
    write_failed(cell.folder, ["lost"])
    assert states([cell]) == ["done"]


def test_a_pool_without_room_is_asked_again_later(store, monkeypatch):
    pauses = []
    monkeypatch.setattr(sweep.time, "sleep", pauses.append)

    class Full(HerePool):  # as a cluster whose machines have yet to come
        def room(self, cell, running, line=True):
            return len(pauses) >= 2 and super().room(cell, running)

    done, *_ = drive(store(seeds=[0]), Full())
    assert done and pauses[:2] == [1.0, 1.0], "it does not spin"


def test_a_damaged_state_is_named(store, capsys):
    cell = plan(store())[0]
    write_cell(cell)
    (cell.folder / "state.json").write_text("")
    assert sweep.main([str(store())]) == 2
    assert (
        "state.json is damaged (Expecting value: line 1 column 1 (char 0)); remove it"
        in capsys.readouterr().err
    )


def test_one_process_at_a_time_runs_a_cell_and_the_second_finds_it_done(store):
    cell = plan(store())[0]
    write_cell(cell)
    held, released = threading.Event(), []

    def other():
        with lock(cell.folder):
            held.set()
            time.sleep(0.3)
            write_state(cell.folder, state="done", score=1.0)
            released.append(time.monotonic())

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    run_cell(cell.folder)
    assert released, "it waited for the other"
    thread.join()
    assert not list(cell.folder.glob("*/config.yaml")), "it was not run"


def test_the_table_shows_every_cell_once(store):
    cells = plan(store())
    model, walk0, walk1, *_ = [cells[0], *[c for c in cells if c.method == "walk"]]
    for cell in (model, walk0, walk1):
        write_cell(cell)
    write_state(model.folder, state="done", score=12.34)
    write_state(walk0.folder, state="failed", error=["x"])
    (walk1.folder / "r").mkdir()
    (walk1.folder / "r" / "metrics.csv").write_text("step,phase\n4,online\n9,online\n")
    stream = io.StringIO()
    stream.isatty = lambda: True
    table = sweep.Table(cells, stream)
    lines = [line.split() for line in table.lines()]
    assert lines == [
        ["method", "task", "s0", "s1"],
        ["offline", "walk", "a-v2", "12.3", "waiting"],
        ["walk", "a-v2", "FAILED", "45", "%"],
        ["fast", "a-v2", "waiting", "waiting"],
        "1 of 6 done, 1 begun, 1 failed".split(),
    ]
    table.show()
    table.event("news")
    table.show()
    table.show(last=True)
    drawn = stream.getvalue()
    assert drawn.count("\x1b[5F\x1b[J") == 2, "drawn again in place"
    assert drawn.index("news") < drawn.rindex("method") and drawn.endswith("failed\n")


# ---------------------------------------------------------------- real algorithms


@pytest.mark.parametrize("name", ["iql", "dare_iql", "cal_ql", "dare_cal_ql"])
def test_fine_tuning_a_shared_model_starts_where_an_unbroken_run_switches(
    name, store, monkeypatch, tmp_path
):
    """One online step without an update: weights, optimizers, rates, targets are the same."""
    toy.install(monkeypatch, tmp_path)
    algorithm = str(ROOT / "algorithms" / f"{name}.py")
    settings = {
        **{"offline_iterations": 20, "online_iterations": 1, "online_warmup": 1},
        **{"eval_freq": 20, "n_episodes": 1, "batch_size": 32, "buffer_size": 5000},
    }
    if name.startswith("dare"):
        settings |= {"dare.behavior": "mixture", "dare.score": "likelihood"}
        settings |= {"dare.behavior_updates": 5, "dare.guidance_scale": 0}
        settings |= {"dare.behavior_batch_size": 32}
    methods = {"m": {"algorithm": algorithm, "settings": settings}}
    file = store(methods=methods, tasks=[toy.TASK], seeds=[5])
    done, (model, cell), shown, _ = drive(file)
    assert done, shown
    assert model.algorithm == str(
        ROOT / "algorithms" / f"{name.removeprefix('dare_')}.py"
    )
    program = load_algorithm(algorithm)
    whole = dataclasses.replace(
        cell.config, offline_iterations=20, load_model="", runs_dir="whole"
    )
    program.train(whole)
    (checkpoint,) = Path("whole").glob("*/checkpoint.pt")
    a = torch.load(checkpoint, weights_only=True)["parts"]["trainer"]
    b = torch.load(cell.folder / "run/checkpoint.pt", weights_only=True)
    _assert_equal(a, b["parts"]["trainer"])


def _assert_equal(a, b, where="trainer"):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            _assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def test_a_baseline_leaves_out_shared_dare_settings_and_refuses_its_own(
    store, monkeypatch
):
    monkeypatch.chdir(ROOT)
    iql = {"algorithm": "algorithms/iql.py"}
    fields = {
        "tasks": ["hopper-medium-v2"],
        "config": "configs/iql/{task}.yaml",
        "settings": {"dare.cap": 3},
        "methods": {"iql": iql, "dare": {"algorithm": "algorithms/dare_iql.py"}},
    }
    file = store(**fields)
    cells = {c.method: c for c in plan(file)}
    assert cells["dare"].config.dare.cap == 3 and cells["iql"].config.online_iterations
    assert cells["iql"].model is cells["dare"].model
    fields["methods"]["iql"] = {**iql, "settings": {"dare.cap": 3}}
    with pytest.raises(ConfigError, match="methods.iql.settings: unknown field dare"):
        plan(store(**fields))


# ---------------------------------------------------------------- processes


def test_a_killed_process_is_started_again_from_its_checkpoint(store):
    method = {"algorithm": "walk.py", "settings": {"trap": "kill", "threads": 1}}
    fields = {"seeds": [0], "share_offline": False}
    drive(store(name="whole", methods={"m": {"algorithm": "walk.py"}}, **fields))
    file = store(name="killed", methods={"m": method}, **fields)
    done, (cell,), shown, _ = drive(file, ProcessPool())
    assert done and "died (signal 9): m a-v2 seed 0" in shown, shown
    log = (cell.folder / "log.txt").read_text()
    assert "resumed at 10" in log and "threads 1 " in log
    rows = [p.read_text() for p in sorted(Path("runs").glob("*/*/run/metrics.csv"))]
    assert len(rows) == 2 and rows[0] == rows[1]


def test_a_cell_saves_and_ends_when_its_worker_is_gone(store):
    cell = plan(store(settings={"online_iterations": 9999, "pause": 0.01}))[2]
    cell.config = dataclasses.replace(cell.config, load_model="", offline_iterations=5)
    write_cell(cell)
    words, cwd, path, variables, log = process_arguments(cell)
    program = (
        "import sys, json; from experiments.workers import run_process; "
        "run_process(*json.loads(sys.argv[1]))"
    )
    order = json.dumps([words, cwd, path, variables, log])
    worker = subprocess.Popen(
        [sys.executable, "-c", program, order], env={**os.environ, "PYTHONPATH": path}
    )
    try:
        _wait_for(lambda: list(cell.folder.glob("*/checkpoint.pt")), worker)
    finally:
        worker.kill()
        worker.wait()
    with lock(cell.folder, timeout=20):
        text = Path(log).read_text()  # the process that held it has ended
    assert "saved at step" in text and "stopping after this step" in text
    assert read_state(cell.folder) == {}


def _wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"never happened (exit status {process.poll()})")


# ---------------------------------------------------------------- Ray


def _start(file, *flags):
    words = [sys.executable, "-m", "experiments.sweep", str(file), *map(str, flags)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(process, code=0):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output
    return output


@pytest.mark.optional("ray")
def test_a_sweep_killed_in_the_middle_and_restarted_gives_the_same_store(store):
    file = store(seeds=[0], settings={"pause": 0.1, "online_iterations": 60})
    output = _finish(_start(file, "--workers", 2, "--runs_dir", "whole"))
    assert "3 of 3 done" in output
    process = _start(file, "--workers", 2, "--runs_dir", "parts")
    begun = "parts/s/*/*/checkpoint.pt"
    try:
        _wait_for(lambda: len(list(Path(".").glob(begun))) >= 1, process)
    finally:
        process.kill()
        process.communicate()
    stored = [p.parent.name for p in Path("parts").glob("*/*/state.json")]
    assert len(stored) < 3, "it was killed too late to prove anything"
    output = _finish(_start(file, "--workers", 2, "--runs_dir", "parts"))
    assert "3 of 3 done" in output

    def tidy(folder):
        found = numbers(folder).items()
        return {
            k: v.replace(folder, "runs") if isinstance(v, str) else v for k, v in found
        }

    assert tidy("parts") == tidy("whole")
    logs = "".join(p.read_text() for p in Path("parts/s").glob("*/log.txt"))
    assert "resumed at" in logs
    again = _finish(_start(file, "--runs_dir", "parts"))
    assert "3 of 3 done" in again and "done: " not in again


@pytest.mark.optional("ray")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_ends_when_its_cells_have_saved(store, number):
    """Also one that a shell script started in the background, where SIGINT is ignored."""
    file = store(
        seeds=[0],
        settings={"pause": 0.01, "eval_freq": 10**5, "offline_iterations": 10**5},
    )
    (model,) = (cell for cell in plan(file) if cell.is_model)
    log = model.folder / "log.txt"
    ignored = number == signal.SIGTERM
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler
    )
    process = _start(file, "--workers", 1)
    signal.signal(signal.SIGINT, before)
    try:
        _wait_for(lambda: log.is_file() and "start [" in log.read_text(), process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and "the same command goes on" in output
    assert len(list(model.folder.glob("*/checkpoint.pt"))) == 1


@pytest.mark.optional("ray")
def test_a_sweep_on_a_cluster_of_two_nodes_uses_both(store, monkeypatch):
    port = 20000 + os.getpid() % 10000  # below those that connections are given
    # A sweep with a Ray of its own, in a test before, may have left these in this process.
    for name in OWN_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    # A token of this cluster alone; the sweep reads it from the environment as any user's.
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    one = ["--num-cpus", "1", "--disable-usage-stats"]
    address = f"127.0.0.1:{port}"
    head = ["--head", "--port", str(port), "--include-dashboard", "false"]
    nodes = []
    # Its workers cannot import this repository; the cells' processes are told where it is.
    elsewhere = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        for words in (head, ["--address", address]):
            log = Path(f"node{len(nodes)}.txt")
            with open(log, "w") as file:
                words = [*ray, *words, *one]
                output = {"stdout": file, "stderr": subprocess.STDOUT}
                node = subprocess.Popen(words, env=elsewhere, **output)
            nodes.append(node)
            _wait_for(lambda log=log: "--block" in log.read_text(), node)
        file = store(seeds=[0], settings={"pause": 0.1})
        output = _finish(_start(file, "--address", address))
        assert "3 of 3 done" in output
        logs = "".join(p.read_text() for p in Path("runs").glob("*/*/log.txt"))
        used = {line for line in logs.splitlines() if line.startswith("raylet")}
        assert len(used) == 2 and "raylet None" not in used
        needs = _finish(_start(store(name="g"), "--address", address, "--gpus", 0.5), 2)
        assert "needs 1 CPUs and 0.5 GPUs" in needs and needs.count("\n") == 1
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(timeout=60)


@pytest.mark.optional("ray")
@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_no_cluster_at_the_address_is_one_line(store, capsys, address):
    assert sweep.main([str(store()), "--address", address]) == 2
    line = capsys.readouterr().err
    assert f"error: no Ray at {address}: " in line and line.count("\n") == 1
