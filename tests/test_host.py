"""The host's house: no import goes in a circle, reading data stays light, old commands help."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path):
    """Everything that a file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph():
    # What scripts import under the names gym, d4rl and wandb is no part of the house.
    guests = ROOT / "corl" / "shim" / "packages"
    files = [p for p in sorted((ROOT / "corl").rglob("*.py")) if guests not in p.parents]
    paths = {module_name(p): p for p in files}
    graph = {name: set(imported_names(p)) & set(paths) for name, p in paths.items()}
    # Its packages' files only describe them, so `from corl import x` is no way to `corl`.
    packages = {name for name, path in paths.items() if path.name == "__init__.py"}
    assert all(not graph[package] for package in packages)
    return {name: found - packages for name, found in graph.items()}


def circle(graph):
    """Names along a way through the graph that ends where it began, or None."""
    done = set()

    def search(name, way):
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return None
        for other in sorted(graph[name]):
            if found := search(other, [*way, name]):
                return found
        done.add(name)
        return None

    for name in sorted(graph):
        if found := search(name, []):
            return found
    return None


def test_a_circle_is_found_where_there_is_one():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}
    assert circle(graph) == ["b", "d", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_no_imports_of_the_host_go_in_a_circle():
    graph = import_graph()
    assert "corl.antmaze" in graph["corl.envs"]
    assert "corl.standin.collect" in graph["corl.data.sources"]  # inside a function
    assert circle(graph) is None


def test_reading_a_dataset_file_imports_no_trainer_and_no_collector(tmp_path):
    rng, rows = np.random.default_rng(0), 20
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["observations"] = rng.normal(size=(rows, 11)).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (rows, 3)).astype(np.float32)
        file["rewards"] = np.ones(rows, np.float32)
        file["terminals"] = np.zeros(rows, bool)
        file["timeouts"] = np.arange(rows) % 10 == 9
    program = (
        "import sys; from corl.data import sources; "
        "found = sources.resolve('hopper-medium-v2', path=sys.argv[1]); "
        "assert len(found.arrays['rewards']) == 18; "
        "print('loaded:', *sorted(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "x.hdf5")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.splitlines()[-1].removeprefix("loaded: ").split())
    ours = {name for name in loaded if name.startswith("corl.standin.")}
    assert "corl.data.sources" in loaded and ours == {"corl.standin.policies"}
    assert not loaded & {"corl.envs", "corl.antmaze", "mujoco", "gymnasium"}


MODULES = {
    "collect": "corl.standin.collect",
    "datasets": "corl.data.card",
    "sac": "corl.standin.train_sac",
    "d4rl_shim": "corl.shim",
    "runs": "corl.checkpoints",
    "report": "experiments.report",
    "sweep": "experiments.sweep",
}


def said(command):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("old, new", MODULES.items(), ids=MODULES)
def test_an_old_command_names_the_new_one(old, new):
    line = f"python -m corl_dare.{old} is now: python -m {new}"
    assert said(["-m", f"corl_dare.{old}"]) == line + "\n"
    assert importlib.util.find_spec(new) is not None


@pytest.mark.parametrize("name", ["iql", "cql", "cal_ql"])
def test_an_old_path_of_a_baseline_names_the_new_one(name):
    line = f"python corl/{name}.py is now: python algorithms/{name}.py"
    assert said([f"corl/{name}.py"]) == line + "\n"
    assert (ROOT / f"algorithms/{name}.py").is_file()
