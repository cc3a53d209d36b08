"""Sweeps on Ray: methods × tasks × seeds × overrides, each cell a run of an algorithm file.

    python -m experiments.sweep sweeps/smoke.yaml     # a Ray of its own, one worker per core
    python -m experiments.sweep sweeps/hopper.yaml --address HOST:6379 --gpus 0.25
    python -m experiments.sweep sweeps/hopper.yaml --only iql n0   # two of its methods
    python -m experiments.sweep sweeps/hopper.yaml --status   # the table, nothing is started

The store is folders and small files, each written atomically: `runs/SWEEP/CELL/` holds
`cell.json` (what it is), `config.yaml` (all its settings), `log.txt`, `state.json` (done or
failed) and `run/`, the run folder. Running the same command again goes on: finished cells stay,
begun ones resume from their checkpoints, failed ones get another try.

Fine-tuning starts from shared offline models, one per (algorithm family, task, seed, offline
settings), in `runs/offline/CELL/model.pt`, which every sweep of the same `runs_dir` may use.

The sweep file is explained in docs/sweep.md.
"""

import argparse
import csv
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import runpy
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import filelock

from corl import checkpoints, files, machine
from corl.config import ConfigError, dump_config, make_config, read_yaml

ROOT = Path(__file__).parent.parent
REQUIREMENTS = "requirements-sweep.txt"
SWEEP_FIELDS = {
    "name": str,
    "config": str,
    "tasks": list,
    "seeds": list,
    "settings": dict,
    "grid": dict,
    "methods": dict,
    "share_offline": bool,
    "offline_settings": dict,
}
METHOD_FIELDS = {
    "algorithm": str,
    "config": str,
    "settings": dict,
    "grid": dict,
    "offline": str,
}
GIVEN = {  # fields that the sweep fills, and what to write instead
    "env": "tasks: [...]",
    "seed": "seeds: [...]",
    "name": "the method's name",
    "runs_dir": "--runs_dir",
    "resume": "the same command again",
}
# Fields that change no result: cells that differ only in these are the same cell.
NOT_RESULTS = {
    *("device", "threads", "runs_dir", "resume", "checkpoints_path"),
    *("wandb_mode", "project", "group", "name"),
}
# Fields that the offline phase does not read. One that is missing here costs a model that could
# have been shared; one too many would share what must not be, so a new field is not listed.
ONLINE_FIELDS = {
    *("online_iterations", "online_warmup", "utd", "mixing_ratio", "load_model"),
    *("actor_lr_online", "expl_noise", "noise_clip", "cql_alpha_online", "dare"),
}
DIED = 128  # exit statuses from here on, and negative ones, are deaths and not errors
STOPPED = 143  # as the shell reports SIGTERM: saved, but not at the end
GRACE = 30.0  # seconds that a cell has to save after its worker is gone


# ---------------------------------------------------------------- the plan


@dataclass
class Cell:
    """One run: its folder, what it stands for, and its whole config."""

    folder: Path
    method: str  # with its overrides: dare-iql,dare.cap=32
    task: str
    seed: int
    algorithm: str  # file
    config: Any
    overrides: dict[str, Any]
    model: "Cell | None" = None  # the offline cell that it starts from

    @property
    def label(self) -> str:
        return f"{self.method} {self.task} seed {self.seed}"

    @property
    def is_model(self) -> bool:
        """Is it an offline cell, whose model others start from?"""
        return self.folder.parent.name == "offline"


def plan(path: Path | str, runs_dir: Path | str = "runs") -> list[Cell]:
    """The cells of a sweep file, offline cells first; nothing is written.

    Raises:
        ValueError: unknown or missing fields, wrong types, an algorithm, a config or a setting
            that does not exist, settings that an algorithm refuses, a store that was begun
            with other settings. One line that names the place.
    """
    path, runs_dir = Path(path), Path(runs_dir)
    sweep = _fields(read_yaml(path), SWEEP_FIELDS, str(path))
    for name in ("tasks", "seeds", "methods"):
        if not sweep.get(name):
            raise ConfigError(f"{path}: {name} is missing or empty")
    name = sweep.get("name", path.stem)
    if not re.fullmatch(r"\w[\w.+-]*", name) or name == "offline":
        raise ConfigError(f"{path}: {name!r} cannot be the name of a sweep's folder")
    for task in sweep["tasks"]:
        if not isinstance(task, str):
            raise ConfigError(f"{path}: tasks must be D4RL names, not {task!r}")
    for seed in sweep["seeds"]:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ConfigError(f"{path}: seeds must be whole numbers, not {seed!r}")
    cells: dict[Path, Cell] = {}
    models: dict[Path, Cell] = {}
    for key, method in sweep["methods"].items():
        origin = f"{path}: methods.{key}"
        if not re.fullmatch(r"\w[\w.+-]*", str(key)):
            raise ConfigError(f"{origin}: use letters, digits and . + - _ only")
        method = _fields(method, METHOD_FIELDS, origin)
        if "algorithm" not in method:
            raise ConfigError(f"{origin}: algorithm is missing")
        grid = {**sweep.get("grid", {}), **method.get("grid", {})}
        for overrides in _combinations(grid, origin):
            for task, seed in itertools.product(sweep["tasks"], sweep["seeds"]):
                parts = (str(key), method, overrides, task, seed)
                cell = _cell(path, sweep, runs_dir / name, *parts)
                if sweep.get("share_offline", True) and _needs_model(cell.config):
                    model = _model_of(path, sweep, method, cell, runs_dir / "offline")
                    cell.model = models.setdefault(model.folder, model)
                    cell.config = dataclasses.replace(
                        cell.config,
                        offline_iterations=0,
                        load_model=str(cell.model.folder / "model.pt"),
                    )
                if cell.folder in cells:
                    raise ConfigError(f"{path}: {cell.label} is there twice")
                cells[cell.folder] = cell
    ordered = [*models.values(), *cells.values()]
    for cell in ordered:
        _check_store(cell)
    return ordered


def select(cells: Sequence[Cell], methods: Sequence[str]) -> list[Cell]:
    """The cells of some methods, in the order of their names, after the models that they need.

    Args:
        cells: of `plan`.
        methods: names; that of a method with a grid stands for all its combinations.

    Raises:
        ValueError: a name that no cell has.
    """
    named: dict[str, list[Cell]] = {}
    for cell in (c for c in cells if not c.is_model):
        for name in {cell.method, cell.method.split(",")[0]}:
            named.setdefault(name, []).append(cell)
    for method in methods:
        if method not in named:
            raise ConfigError(
                f"--only: the sweep has no method {method}; it has {', '.join(sorted(named))}"
            )
    taken = {c.folder: c for method in methods for c in named[method]}
    needed = {c.model.folder for c in taken.values() if c.model}
    return [*(c for c in cells if c.folder in needed), *taken.values()]


def _fields(values: Any, known: dict[str, type], origin: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} must be a block of fields, not {values!r}")
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"{origin}: unknown field {name}{hint} (known: {', '.join(known)})"
            )
        if not isinstance(value, known[name]):
            kind = {list: "a list", dict: "a block of fields", str: "a text"}.get(
                known[name], "true or false"
            )
            raise ConfigError(f"{origin}: {name} must be {kind}, not {value!r}")
    return values


def _combinations(grid: dict[str, list], origin: str) -> list[dict[str, Any]]:
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(
                f"{origin}: grid.{name} must be a list of values, not {values!r}"
            )
    points = itertools.product(*grid.values())
    return [dict(zip(grid, point, strict=True)) for point in points]


def _cell(
    path: Path,
    sweep: dict,
    folder: Path,
    key: str,
    method: dict,
    overrides: dict[str, Any],
    task: str,
    seed: int,
) -> Cell:
    origin = f"{path}: methods.{key}"
    program = load_algorithm(method["algorithm"], origin)
    shared = [
        (f"{path}: settings", _nested(sweep.get("settings", {}), f"{path}: settings"))
    ]
    template = method.get("config", sweep.get("config"))
    if template is not None:
        short = re.sub(r"-v\d+$", "", task).replace("-", "_")
        file = template.replace("{task}", short)
        shared.insert(0, (file, read_yaml(Path(file))))
    others = getattr(program, "OTHER_BLOCKS", ())  # another algorithm's blocks
    shared = [
        (where, {k: v for k, v in values.items() if k not in others})
        for where, values in shared
    ]
    label = ",".join([key, *(f"{k}={_text(v)}" for k, v in overrides.items())])
    layers = [
        *shared,
        (
            f"{origin}.settings",
            _nested(method.get("settings", {}), f"{origin}.settings"),
        ),
        (f"{origin}.grid", _nested(overrides, f"{origin}.grid")),
        (str(path), {"env": task, "seed": seed, "name": _safe(label)}),
    ]
    config = _make(program, layers, f"{origin} on {task}")
    stem = Path(method["algorithm"]).stem
    digest = _digest(stem, config, NOT_RESULTS)
    folder = folder / f"{_safe(label)}-{task}-s{seed}-{digest}"
    config = dataclasses.replace(config, runs_dir=str(folder))
    return Cell(folder, label, task, seed, method["algorithm"], config, overrides)


def _needs_model(config: Any) -> bool:
    trained = config.offline_iterations > 0 and config.online_iterations > 0
    return trained and not config.load_model


def _model_of(path: Path, sweep: dict, method: dict, cell: Cell, folder: Path) -> Cell:
    """The offline cell whose model a fine-tuning cell starts from."""
    algorithm = method.get("offline") or _baseline(cell.algorithm)
    program = load_algorithm(algorithm, f"{path}: offline")
    known = {field.name for field in dataclasses.fields(program.TrainConfig)}
    values = dataclasses.asdict(cell.config)
    dropped = ONLINE_FIELDS | {"runs_dir", "resume", "name", "checkpoints_path"}
    values = {k: v for k, v in values.items() if k in known - dropped}
    stem, later = Path(algorithm).stem, f"{path}: offline_settings"
    layers = [
        (str(path), {**values, "name": f"offline-{stem}"}),
        (later, _nested(sweep.get("offline_settings", {}), later)),
        (str(path), {"online_iterations": 0}),
    ]
    config = _make(program, layers, f"{path}: the offline phase of {cell.label}")
    if config.offline_iterations % config.eval_freq:
        raise ConfigError(
            f"{path}: eval_freq {config.eval_freq} does not divide offline_iterations "
            f"{config.offline_iterations}, so the score before fine-tuning would be unknown; "
            "set offline_settings: {eval_freq: ...}"
        )
    digest = _digest(stem, config, NOT_RESULTS | ONLINE_FIELDS)
    folder = folder / f"{stem}-{cell.task}-s{cell.seed}-{digest}"
    config = dataclasses.replace(config, runs_dir=str(folder))
    return Cell(folder, f"offline {stem}", cell.task, cell.seed, algorithm, config, {})


def _baseline(algorithm: str) -> str:
    """The baseline that shares its offline phase: algorithms/X.py for algorithms/dare_X.py."""
    file = Path(algorithm)
    twin = file.with_name(file.name.removeprefix("dare_"))
    return str(twin) if twin.is_file() else algorithm


@functools.cache
def load_algorithm(file: str, origin: str = "") -> types.ModuleType:
    """The module of an algorithm file, for its `TrainConfig`.

    Raises:
        ValueError: there is no such file, or no TrainConfig in it.
    """
    prefix = f"{origin}: " if origin else ""
    path = Path(file)
    if not path.is_file():
        raise ConfigError(
            f"{prefix}algorithm {file} does not exist (paths are relative to "
            f"{machine.tidy_path(Path.cwd())})"
        )
    name = "sweep_" + re.sub(r"\W", "_", str(path.resolve()))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or path.suffix != ".py":
        raise ConfigError(f"{prefix}algorithm {file} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"{prefix}algorithm {file} cannot be imported: {type(error).__name__}: {error}"
        ) from None
    if not dataclasses.is_dataclass(getattr(module, "TrainConfig", None)):
        raise ConfigError(f"{prefix}{file} is no algorithm: it has no TrainConfig")
    return module


def _make(program: types.ModuleType, layers: list, origin: str) -> Any:
    try:
        return make_config(program.TrainConfig, layers)
    except ConfigError:
        raise  # names its place already
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _nested(values: dict, origin: Any) -> dict[str, Any]:
    """`dare.cap: 3` as `dare: {cap: 3}`; fields that the sweep fills itself raise."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        if name in GIVEN:
            raise ConfigError(f"{origin}: {name} is given by {GIVEN[name]}")
        *blocks, last = str(name).split(".")
        target = nested
        for block in blocks:
            target = target.setdefault(block, {})
            if not isinstance(target, dict):
                raise ConfigError(
                    f"{origin}: {name} is set, but {block} is {target!r} and not a block"
                )
        if isinstance(value, dict) and isinstance(target.get(last), dict):
            target[last].update(value)
        else:
            target[last] = value
    return nested


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _digest(algorithm: str, config: Any, leave_out: set[str]) -> str:
    """Of the settings that are not defaults, so that a new field renames no cell."""
    default = _flat(dataclasses.asdict(type(config)()))
    values = {
        name: value
        for name, value in _flat(dataclasses.asdict(config)).items()
        if name.split(".")[0] not in leave_out and value != default[name]
    }
    text = json.dumps([algorithm, values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _text(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _safe(label: str) -> str:
    return re.sub(r"[^\w.,=+-]", "_", label)[:100]  # file names end at 255 bytes


def _check_store(cell: Cell) -> None:
    """What changed since a cell was begun, and is not in its name, must not pass unseen."""
    if not any(cell.folder.glob("*/config.yaml")):
        return
    begun = _flat(read_yaml(cell.folder / "config.yaml"))
    model = Path(str(begun.get("load_model"))).parent.name
    if cell.model and model != cell.model.folder.name:
        raise ConfigError(
            f"{machine.tidy_path(cell.folder)} was begun from the offline model {model}, now the "
            f"sweep file asks for {cell.model.folder.name}: put its offline settings back, "
            "give the sweep another name, or remove that folder"
        )
    now = _flat(dataclasses.asdict(cell.config))
    for name in sorted(begun.keys() & now.keys()):
        bookkeeping = NOT_RESULTS | ({"load_model"} if cell.model else set())
        if name.split(".")[0] not in bookkeeping and begun[name] != now[name]:
            raise ConfigError(
                f"{machine.tidy_path(cell.folder)} was begun with {name} {begun[name]}, now it "
                f"is {now[name]}: give {name} in the sweep file, or remove that folder"
            )


# ---------------------------------------------------------------- the store


def write_cell(cell: Cell) -> None:
    """Make a cell's folder: `cell.json` and `config.yaml`."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    about = {
        "method": cell.method,
        "task": cell.task,
        "seed": cell.seed,
        "algorithm": cell.algorithm,
        "overrides": cell.overrides,
        "offline": str(cell.model.folder) if cell.model else None,
        "is_model": cell.is_model,
    }
    text = json.dumps(about, indent=2, sort_keys=True) + "\n"
    files.write_text(cell.folder / "config.yaml", dump_config(cell.config))
    files.write_text(cell.folder / "cell.json", text)


def read_state(folder: Path) -> dict[str, Any]:
    """`{"state": "done" | "failed", ...}`, or {} when neither."""
    file = folder / "state.json"
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(
            f"{machine.tidy_path(file)} is damaged; remove it, and the sweep looks at the "
            "cell again"
        ) from None


def _write_state(folder: Path, **state: Any) -> None:
    text = json.dumps(state, indent=2, sort_keys=True) + "\n"
    files.write_text(folder / "state.json", text)


def _is_done(cell: Cell) -> bool:
    return read_state(cell.folder).get("state") == "done"


def _write_failed(folder: Path, lines: list[str]) -> None:
    """Unless another sweep is at work on the cell, or has finished it."""
    try:
        with filelock.FileLock(folder / "cell.lock", timeout=0):
            if read_state(folder).get("state") != "done":
                _write_state(folder, state="failed", error=lines)
    except filelock.Timeout:
        pass


def last_lines(folder: Path, count: int = 5) -> list[str]:
    """The last lines of a cell's log that say something, without progress bars."""
    try:
        with open(folder / "log.txt", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    bar = re.compile(r".*\|\s*\d+/\d+ \[[^]]*\]")
    lines = [bar.sub("", line.split("\r")[-1]).strip() for line in text.split("\n")]
    return [line for line in lines if line][-count:]


# ---------------------------------------------------------------- one cell, in its own process


def work(folder: Path) -> None:
    """Run a cell to its end, from its checkpoint if it has one; a finished one is left alone.

    Raises:
        SystemExit: the algorithm's own exit status, or `STOPPED` when it saved and stopped.
    """
    # Held until this process ends, however it ends: two sweeps, or a restarted one and what
    # its predecessor left running, never write into one cell at the same time.
    with filelock.FileLock(folder / "cell.lock"):
        if read_state(folder).get("state") == "done":
            return
        (folder / "state.json").unlink(missing_ok=True)
        about = json.loads((folder / "cell.json").read_text())
        sys.argv = [about["algorithm"], *_arguments(folder)]
        try:
            runpy.run_path(about["algorithm"], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        finished = [p.parent for p in folder.glob("*/summary.json")]
        if not finished:
            raise SystemExit(STOPPED)
        if finished[0].name != "run":
            os.replace(finished[0], folder / "run")
        _conclude(folder, about)


def _arguments(folder: Path) -> list[str]:
    for run in sorted(p.parent for p in folder.glob("*/config.yaml")):
        if (run / "checkpoint.pt").is_file():
            return ["--resume", str(run)]
        shutil.rmtree(run)  # it died before its first checkpoint: nothing to go on from
    return ["--config", str(folder / "config.yaml")]


def _conclude(folder: Path, about: dict[str, Any]) -> None:
    run = folder / "run"
    summary = json.loads((run / "summary.json").read_text())
    if about["is_model"]:
        checkpoints.export_corl(run, folder / "model.pt")
    if about["offline"]:
        offline = json.loads((Path(about["offline"]) / "run/summary.json").read_text())
        here, there = summary["dataset"]["sha256"], offline["dataset"]["sha256"]
        if here != there:
            raise SystemExit(
                f"error: the dataset ({here[:12]}) is not the one that the offline model "
                f"of {about['offline']} was trained on ({there[:12]}); remove the cell "
                "that has the wrong one and run the sweep again"
            )
        summary["score_offline"] = offline["score_offline"]
        summary["offline_run"] = machine.tidy_path(Path(about["offline"]) / "run")
        files.write_text(run / "summary.json", json.dumps(summary, indent=2) + "\n")
    score = summary["score_offline" if about["is_model"] else "score_final"]
    _write_state(folder, state="done", score=score)


def _follow_parent() -> None:
    """End this process when the worker that started it is gone: its end closes our stdin."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # the run saves and stops
        time.sleep(GRACE)
        os._exit(STOPPED)

    threading.Thread(target=watch, daemon=True).start()


# ---------------------------------------------------------------- workers


def run_process(
    words: list[str], cwd: str, path: str, variables: dict[str, str], log: str
) -> tuple[int | None, str]:
    """Exit status of a Python process, and why there is none; runs in a worker of any machine.

    Args:
        words: arguments of Python.
        cwd: folder to run in.
        path: folder that Python imports from first.
        variables: environment variables to set.
        log: file that its output is appended to.
    """
    if not (os.path.isdir(cwd) and os.path.isdir(os.path.dirname(log))):
        return 1, f"a worker does not see {cwd} or {os.path.dirname(log)}: share them"
    search = os.pathsep.join(p for p in (path, os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, **variables, "PYTHONPATH": search}
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=cwd,
            env=environment,
            stdin=subprocess.PIPE,  # closed by our end, which the child watches for
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the sweep, which ends its workers
        )
        return process.wait(), ""


def _order(cell: Cell) -> tuple:
    """Arguments of `run_process` for a cell."""
    kept = ("CORL_DARE_CACHE", "D4RL_DATASET_DIR", "CORL_DARE_TRACEBACK")
    variables = {k: os.environ[k] for k in kept if k in os.environ}
    variables["OMP_NUM_THREADS"] = str(cell.config.threads)
    words = ["-u", "-m", "experiments.sweep", "--cell", str(cell.folder)]
    log = str((cell.folder / "log.txt").absolute())
    return words, str(Path.cwd()), str(ROOT), variables, log


class Pool(Protocol):
    """What runs cells: handles of started ones, and which have ended, with what."""

    def room(self, cell: Cell, running: int) -> bool:
        """Whether another cell can be handed over while so many run."""
        ...

    def start(self, cell: Cell) -> Any: ...

    def ended(self, handles: Sequence[Any], seconds: float) -> list[tuple]:
        """(handle, exit status or None, note) of those that ended within the time."""
        ...

    def close(self) -> None: ...


class RayPool:
    """Workers of Ray: a local one, started here and stopped at the end, or a cluster's.

    Args:
        address: of a running cluster; none: a Ray of our own on this machine.
        workers: cells at a time on this machine; none: one per core.
        gpus: share of a GPU that a cell takes, 0 for none.

    Raises:
        RuntimeError: no Ray installed, or no cluster at the address.
    """

    def __init__(self, address: str | None, workers: int | None, gpus: float):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address is None and "RAY_AUTH_MODE" not in os.environ:
            # Of this Ray alone: it would otherwise leave a token in the home folder, which
            # changes how every later Ray of this user starts.
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        try:
            import ray
        except ImportError:
            raise RuntimeError(
                f"a sweep needs Ray: python -m pip install -r {REQUIREMENTS}"
            ) from None
        self.ray, self.gpus = ray, gpus
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address is None:
            options |= {"num_cpus": workers, "include_dashboard": False}
            options |= {"_node_ip_address": "127.0.0.1"}
        try:
            if address not in (None, "auto"):
                _knock(address)  # Ray itself would try for many minutes
            ray.init(address or "local", **options)
        except (OSError, RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise RuntimeError(
                f"no Ray at {address or 'this machine'}: {text}"
            ) from None

    def check(self, cells: Iterable[Cell]) -> None:
        """Raise if no machine can ever run a cell."""
        nodes = [n["Resources"] for n in self.ray.nodes() if n["Alive"]]
        for cell in cells:
            need = {"CPU": cell.config.threads, "GPU": self.gpus}
            if not any(all(n.get(k, 0) >= v for k, v in need.items()) for n in nodes):
                most = {k: max(n.get(k, 0) for n in nodes) for k in need}
                raise RuntimeError(
                    f"{cell.label} needs {need['CPU']} CPUs and {need['GPU']} GPUs; the "
                    f"largest machine has {most['CPU']:g} and {most['GPU']:g}: set threads "
                    "in the sweep file, --workers or --gpus"
                )

    def room(self, cell: Cell, running: int) -> bool:
        # Ray runs what it is handed in no particular order, so it gets no more than fits, and
        # one in line: no worker idles, and a cluster that grows on demand sees a demand.
        need = {"CPU": cell.config.threads, "GPU": self.gpus}
        nodes = [n["Resources"] for n in self.ray.nodes() if n["Alive"]]
        fit = sum(min(n.get(k, 0) // v for k, v in need.items() if v) for n in nodes)
        return running <= fit

    def start(self, cell: Cell) -> Any:
        resources = {"num_cpus": cell.config.threads, "num_gpus": self.gpus}
        # Retries are the sweep's: it knows an error from a death.
        remote = self.ray.remote(max_retries=0, **resources)(run_process)
        words, cwd, path, variables, log = _order(cell)
        if not self.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ""  # what was not asked for is not taken
        return remote.remote(words, cwd, path, variables, log)

    def ended(self, handles: Sequence[Any], seconds: float) -> list[tuple]:
        ready, _ = self.ray.wait(list(handles), num_returns=1, timeout=seconds)
        outcomes = []
        for handle in ready:
            try:
                outcomes.append((handle, *self.ray.get(handle)))
            except self.ray.exceptions.RayTaskError as error:
                outcomes.append((handle, 1, str(error.cause)))
            except self.ray.exceptions.RayError as error:
                outcomes.append((handle, None, type(error).__name__))
        return outcomes

    def close(self) -> None:
        self.ray.shutdown()


def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("write HOST:PORT or auto")
    socket.create_connection((host, int(port)), timeout=10).close()


# ---------------------------------------------------------------- the sweep


def drive(cells: Sequence[Cell], pool: Pool, table: "Table", retries: int = 3) -> bool:
    """Run what is not done; true if all cells are done at the end.

    Cells start in the order of the sweep file, offline models first, as workers get free; a cell
    waits for its offline model. One whose process died is started again from its
    checkpoint, at most `retries` times; one that ended with an error has failed. Neither stops
    the others.
    """
    waiting, running, deaths = [], {}, {}
    # Kept here and not read back: another sweep of this store may try a failed cell again.
    failed: dict[Path, list[str]] = {}

    def fail(cell: Cell, lines: list[str]) -> None:
        failed[cell.folder] = lines
        _write_failed(cell.folder, lines)
        table.event(f"FAILED: {cell.label}: {lines[-1]}")

    for cell in cells:
        if not _is_done(cell):
            write_cell(cell)
            waiting.append(cell)
    while waiting or running:
        for cell in list(waiting):
            if cell.model and cell.model.folder in failed:
                folder = machine.tidy_path(cell.model.folder)
                fail(cell, [f"its offline model failed: {folder}"])
            elif (not cell.model or _is_done(cell.model)) and pool.room(
                cell, len(running)
            ):
                running[pool.start(cell)] = cell
            else:
                continue
            waiting.remove(cell)
        table.show()
        if waiting and not running:
            time.sleep(1.0)  # the pool has no room at all
        for handle, code, note in pool.ended(list(running), 1.0) if running else ():
            cell = running.pop(handle)
            if _is_done(cell):
                table.event(f"done: {cell.label}, score {table.progress(cell)}")
                continue
            died = code is None or code <= 0 or code >= DIED
            deaths[cell.folder] = deaths.get(cell.folder, 0) + died
            if died and deaths[cell.folder] <= retries:
                how = note or (f"signal {-code}" if code < 0 else f"status {code}")
                table.event(
                    f"died ({how}): {cell.label}; trying again from its checkpoint, "
                    f"{deaths[cell.folder]} of {retries}"
                )
                waiting.append(cell)
            else:
                lines = [*last_lines(cell.folder), *([note] if note else [])]
                if died:
                    lines.append(f"died {retries + 1} times")
                fail(cell, lines or [f"exit status {code}"])
    table.show(last=True)
    for cell in cells:
        if cell.folder in failed:
            log = machine.tidy_path(cell.folder / "log.txt")
            table.event(f"\nFAILED: {cell.label} ({log})")
            for line in failed[cell.folder]:
                table.event(f"    {line}")
    return not failed


class Table:
    """Progress: a row per method and task, a column per seed, read from the store.

    On a terminal it is drawn again in place; elsewhere events are printed as they come, and the
    table at the end.
    """

    def __init__(self, cells: Sequence[Cell], stream: TextIO | None = None):
        self.cells, self.stream = cells, stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.drawn, self.next = 0, 0.0

    def progress(self, cell: Cell) -> str:
        """`waiting`, `45 %`, `FAILED`, or the score of a finished cell."""
        state = read_state(cell.folder)
        if state.get("state") == "failed":
            return "FAILED"
        if state.get("state") == "done":
            score = state["score"]
            return "done" if score is None else f"{score:.1f}"
        total = cell.config.offline_iterations + cell.config.online_iterations
        for file in cell.folder.glob("*/metrics.csv"):
            step = _last_step(file)
            return f"{100 * step / max(total, 1):.0f} %"
        return "waiting"

    def lines(self) -> list[str]:
        """The table's rows, the header first."""
        seeds = list(dict.fromkeys(c.seed for c in self.cells))
        rows: dict[tuple, dict[int, str]] = {}
        counts = {"done": 0, "failed": 0, "begun": 0}
        for cell in self.cells:
            shown = self.progress(cell)
            label = cell.method
            while cell.seed in rows.setdefault((label, cell.task), {}):
                label += "'"  # offline models of other settings
            rows[label, cell.task][cell.seed] = shown
            state = read_state(cell.folder).get("state")
            counts["begun"] += state is None and shown != "waiting"
            if state:
                counts[state] += 1
        wide = max([len(label) for label, _ in rows] + [6])
        long = max([len(task) for _, task in rows] + [4])
        out = [
            f"{'method':{wide}}  {'task':{long}}"
            + "".join(_right(f"s{s}") for s in seeds)
        ]
        for (label, task), row in rows.items():
            shown = "".join(_right(row.get(s, "")) for s in seeds)
            out.append(f"{label:{wide}}  {task:{long}}{shown}")
        out.append(
            f"{counts['done']} of {len(self.cells)} done, {counts['begun']} begun, "
            f"{counts['failed']} failed"
        )
        return out

    def show(self, last: bool = False) -> None:
        if not last and (not self.terminal or time.monotonic() < self.next):
            return
        self.next = time.monotonic() + 2.0
        lines = self.lines()
        if self.terminal and not last:
            width, height = shutil.get_terminal_size()
            if len(lines) >= height:  # what does not fit cannot be drawn over
                lines = lines[-1:]
            lines = [line[: width - 1] for line in lines]
        self._erase()
        print("\n".join(lines), file=self.stream, flush=True)
        self.drawn = 0 if last else len(lines)

    def event(self, text: str) -> None:
        """A line that stays, above the table."""
        self._erase()
        print(text, file=self.stream, flush=True)
        self.next = 0.0

    def _erase(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="", file=self.stream)
            self.drawn = 0


def _right(text: str) -> str:
    return f"  {text:>8}"


def _last_step(file: Path) -> int:
    try:
        with open(file, newline="") as lines:
            rows = list(csv.reader(lines))
        return int(rows[-1][0])
    except (OSError, ValueError, IndexError):
        return 0  # only the header, or a row that is being written


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 all done, 1 some failed, 2 bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sweep",
        description="Run a sweep file; run it again to go on. docs/sweep.md explains it.",
    )
    parser.add_argument("sweep", nargs="?", help="YAML file")
    parser.add_argument("--runs_dir", default="runs", help="the store (default: runs)")
    parser.add_argument(
        "--workers", type=int, help="cells at a time (default: one per core)"
    )
    parser.add_argument("--address", help="of a running Ray cluster, HOST:PORT or auto")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPU share per cell")
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", help="these methods alone, in this order"
    )
    parser.add_argument("--retries", type=int, default=3, help="after deaths, per cell")
    parser.add_argument("--status", action="store_true", help="only show the table")
    parser.add_argument("--cell", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cell is not None:
        _follow_parent()
        work(args.cell)
        return 0
    try:
        return _sweep(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _sweep(args: argparse.Namespace) -> int:
    if args.sweep is None:
        raise ConfigError("name a sweep file, for example sweeps/smoke.yaml")
    if args.address is not None and args.workers is not None:
        raise ConfigError("--workers is for a Ray of our own, not for --address")
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers must be at least 1, not {args.workers}")
    if args.gpus < 0 or args.retries < 0:
        raise ConfigError("--gpus and --retries must not be negative")
    cells = plan(args.sweep, args.runs_dir)
    if args.only:
        cells = select(cells, args.only)
    table = Table(cells)
    if args.status or all(_is_done(c) for c in cells):
        table.show(last=True)
        return 0
    pool = RayPool(args.address, args.workers, args.gpus)

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        pool.check(cells)
        return 0 if drive(cells, pool, table, args.retries) else 1
    finally:
        pool.close()
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
