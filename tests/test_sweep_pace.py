"""The cells of a sweep share one mode: stated in its file, or chosen once and kept."""

import json
from pathlib import Path

import pytest
import yaml

from corl import compiled, pace
from experiments import sweep
from experiments.cells import write_cell
from experiments.plan import plan, read_sweep

ROOT = Path(__file__).parent.parent
IQL, DARE = (str(ROOT / "algorithms" / f"{n}.py") for n in ("iql", "dare_iql"))
METHODS = {"iql": {"algorithm": IQL}, "dare": {"algorithm": DARE}}


@pytest.fixture
def sweep_file(tmp_path, monkeypatch):
    """Writes a sweep file into a folder of its own, which is entered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiled, "obstacle", lambda: "")

    def write(methods=METHODS, **settings):
        values = {"tasks": ["hopper-medium-v2"], "seeds": [0, 1], "methods": methods}
        (tmp_path / "s.yaml").write_text(
            yaml.safe_dump({**values, "settings": settings})
        )
        return tmp_path / "s.yaml"

    return write


def modes(cells):
    return {(cell.config.threads, cell.config.compile) for cell in cells}


def test_a_long_sweep_compiles_every_cell_and_gives_each_one_thread(sweep_file):
    cells = plan(sweep_file())
    assert len(cells) == 2 + 4 and modes(cells) == {(1, True)}
    assert {"threads": 1, "compile": True} in [cell.chosen for cell in cells]


@pytest.mark.parametrize(
    "settings, gpu, obstacle",
    [
        ({"offline_iterations": 100, "online_iterations": 100, "eval_freq": 100}, 0, ""),
        ({}, True, ""),
        ({}, False, "a C++ compiler"),
        ({"compat": True}, False, ""),
    ],
)
def test_where_compiling_does_not_pay_every_cell_is_eager(
    settings, gpu, obstacle, sweep_file, monkeypatch
):
    monkeypatch.setattr(compiled, "obstacle", lambda: obstacle)
    assert modes(plan(sweep_file(**settings), gpu=bool(gpu))) == {(1, False)}


def test_one_long_cell_decides_for_all(sweep_file):
    short = {"offline_iterations": 100, "online_iterations": 0, "eval_freq": 100}
    methods = {**METHODS, "short": {"algorithm": IQL, "settings": short}}
    assert modes(plan(sweep_file(methods))) == {(1, True)}


def test_what_a_sweep_began_with_stays(sweep_file, monkeypatch):
    """Also where it would now be chosen otherwise."""
    file = sweep_file()
    before = plan(file)
    for cell in before:
        write_cell(cell)
    monkeypatch.setattr(pace, "BREAK_EVEN", 10**9)
    after = plan(file)
    assert [c.folder for c in after] == [c.folder for c in before]
    assert modes(after) == {(1, True)}


def test_a_sweep_from_before_the_choice_goes_on_eager(sweep_file):
    file = sweep_file(compile=False, threads=1)
    old = plan(file)
    for cell in old:
        write_cell(cell)
        about = json.loads((cell.folder / "cell.json").read_text())
        del about["chosen"]
        (cell.folder / "cell.json").write_text(json.dumps(about))
    now = plan(sweep_file())
    assert [c.folder for c in now] == [c.folder for c in old]
    assert modes(now) == {(1, False)}


def test_what_the_file_states_is_what_every_cell_gets(sweep_file, monkeypatch):
    def choose(updates):
        raise AssertionError

    monkeypatch.setattr(pace, "worth_compiling", choose)
    cells = plan(sweep_file(compile=False, threads=2))
    assert modes(cells) == {(2, False)} and not any(cell.chosen for cell in cells)
    methods = {
        str(x): {"algorithm": IQL, "settings": {"compile": x, "threads": 1}}
        for x in (False, True)
    }
    cells = plan(sweep_file(methods))
    assert modes(cells) == {(1, False), (1, True)}


def test_the_choice_is_printed_with_the_lines_that_repeat_it(
    sweep_file, monkeypatch, capsys
):
    def no_pool(*args):
        raise RuntimeError("no pool in this test")

    monkeypatch.setattr(sweep, "RayPool", no_pool)
    file = sweep_file()
    assert sweep.main([str(file)]) == 2
    shown = capsys.readouterr().out
    assert "chosen for every cell: threads: 1, compile: true" in shown
    sweep.main([str(sweep_file(threads=1, compile=True))])
    assert "chosen" not in capsys.readouterr().out
    again = plan(file)
    assert modes(again) == {(1, True)}


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("sweeps/*.yaml")), ids=lambda p: p.stem
)
def test_the_shipped_sweeps_state_both(path):
    stated = read_sweep(path).settings
    assert stated["threads"] == 1 and isinstance(stated["compile"], bool)
