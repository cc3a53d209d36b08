"""Runs a script of JAX-CORL unmodified, in the Python that has JAX.

    JAX_PYTHON benchmarks/jax_worker.py PYTHON FOLDER JAX_CORL/algos/iql.py key=value ...

Needs jax, flax, optax, distrax and numpy. What else the script imports, and no more of it than the
script uses, is stood in for: data and environment (`d4rl`, `gym`), the log (`wandb`), and, where
they are missing, `omegaconf`, `pydantic` and `tqdm`. The environment lives in a process of PYTHON,
see `env_server.py`; the dataset is FOLDER/data.npz; FOLDER/log.jsonl gets the versions and what the
script logs.
"""

import ast
import importlib.metadata
import importlib.util
import json
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "distrax", "numpy")


class Env:
    """Old gym's environment, played by a server."""

    def __init__(self, python: str, task: str):
        self.server = subprocess.Popen(
            [python, "-m", "benchmarks.env_server", task],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.scores = json.loads(self.server.stdout.readline())["scores"]

    def _ask(self, value):
        self.server.stdin.write(json.dumps(value) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def reset(self):
        return np.array(self._ask(None))

    def step(self, action):
        observation, reward, done = self._ask(np.asarray(action).tolist())
        return np.array(observation), reward, done, {}

    def get_normalized_score(self, score):
        low, high = self.scores
        return (score - low) / (high - low)

    def close(self):
        self.server.stdin.close()
        self.server.wait()


class BaseModel:
    """Of pydantic: a class whose annotated defaults are given by name."""

    def __init__(self, **values):
        known = type(self).__annotations__
        unknown = set(values) - set(known)
        if unknown:
            raise TypeError(f"unknown settings {sorted(unknown)}")
        for name in known:
            setattr(self, name, values.get(name, getattr(type(self), name, None)))

    def __repr__(self):
        return repr(sorted(vars(self).items()))


def settings_of(arguments):
    """Of omegaconf: `key=value` arguments as a dict of Python values."""
    values = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


def stand_ins(python: str, folder: Path) -> list[Env]:
    """Put the stand-ins into `sys.modules`; the environments that the script makes are returned."""
    made: list[Env] = []
    log = open(folder / "log.jsonl", "w")

    def write(values):
        log.write(json.dumps(values, default=float) + "\n")
        log.flush()

    def make(task):
        made.append(Env(python, task))
        return made[-1]

    def module(name, **names):
        sys.modules[name] = types.ModuleType(name, "Stand-in, see jax_worker.")
        vars(sys.modules[name]).update(names)

    def dataset(env):
        return dict(np.load(folder / "data.npz"))

    write({"versions": {p: importlib.metadata.version(p) for p in PACKAGES}})
    module("gym", make=make, Env=Env)
    module("d4rl", qlearning_dataset=dataset)
    module(
        "wandb",
        init=lambda **options: None,
        log=lambda values, step=None: write(values),
        finish=log.close,
    )
    reader = types.SimpleNamespace(from_cli=lambda: settings_of(sys.argv[1:]))
    for name, names in {
        "omegaconf": {"OmegaConf": reader},
        "pydantic": {"BaseModel": BaseModel},
        "tqdm": {"tqdm": lambda rows, **options: rows},
    }.items():
        if importlib.util.find_spec(name) is None:
            module(name, **names)
    return made


def main() -> None:
    python, folder, script, *settings = sys.argv[1:]
    environments = stand_ins(python, Path(folder))
    sys.argv = [script, *settings]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        for env in environments:
            env.close()


if __name__ == "__main__":
    main()
