"""The plan of a sweep file: methods × overrides × tasks × seeds, a cell each.

Fine-tuning starts from shared offline models, one per (baseline, task, seed, offline settings).
They are cells, too. The name of a cell's folder ends in a hash of its settings, so changed settings
are a new cell, and cells that differ in nothing that changes a result are the same one.

docs/sweep.md explains the sweep file.
"""

import copy
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corl import pace, tasks
from corl.config import AUTO
from corl.layers import ConfigError, make_config, read_yaml, without_foreign_blocks
from experiments.cells import OFFLINE, Cell, check_begun
from experiments.programs import baseline_of, load_algorithm, missing_file
from experiments.values import flatten, read_json, shown

SWEEP_FIELDS = {
    "name": str,
    "config": str,
    "tasks": list,
    "seeds": list,
    "settings": dict,
    "grid": dict,
    "methods": dict,
    "share_offline": bool,
    "by_seed": bool,
    "offline_settings": dict,
}
METHOD_FIELDS = {
    "algorithm": str,
    "config": str,
    "settings": dict,
    "grid": dict,
    "offline": str,
}
# Config fields that the sweep fills itself, and what to write in the sweep file instead.
FILLED_BY_SWEEP = {
    "env": "tasks: [...]",
    "seed": "seeds: [...]",
    "seeds": "seeds: [...]",
    "name": "the method's name",
    "runs_dir": "--runs_dir",
    "resume": "the same command again",
}
# Defaults that have changed: cells keep the names that they got from these.
FORMER_DEFAULTS = {"compile": False}
# What a sweep or a method may be called: a part of a folder's name.
NAME = r"\w[\w.+-]{0,99}"
# What a task may be called: D4RL's names and gymnasium's ids.
TASK = r"\w[\w.+:/-]{0,99}"
# More cells than this are a slip, such as one list too many in a grid.
MOST_CELLS = 10_000
# Values of settings, later ones over earlier ones: (where they come from, nested values).
Layers = list[tuple[str, dict[str, Any]]]


@dataclass
class Method:
    """A method of a sweep file.

    Attributes:
        name: its key in the file.
        origin: its place in the file, for errors.
        algorithm: path of the algorithm file.
        config: settings file with `{task}` in its name; none: the defaults.
        settings: its own, over those that all methods share.
        grid: field -> the values that it takes.
        offline: algorithm file of its offline model; none: the algorithm's baseline.
    """

    name: str
    origin: str
    algorithm: str
    config: str | None
    settings: dict[str, Any]
    grid: dict[str, list]
    offline: str | None

    @property
    def points(self) -> int:
        """How many combinations the grid has; one if it is empty."""
        return math.prod(map(len, self.grid.values()))

    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of the grid's values."""
        points = itertools.product(*self.grid.values())
        return [dict(zip(self.grid, point, strict=True)) for point in points]


@dataclass
class Sweep:
    """A sweep file, checked.

    name: of its folder. settings, offline_settings: nested. by_seed: all methods of a task and
    seed are cells that follow each other, behind the offline models that they need.
    """

    path: Path
    name: str
    tasks: list[str]
    seeds: list[int]
    methods: list[Method]
    settings: dict[str, Any]
    offline_settings: dict[str, Any]
    share_offline: bool
    by_seed: bool


def plan(
    path: Path | str,
    runs_dir: Path | str = "runs",
    gpu: bool = False,
    only: Sequence[str] = (),
) -> list[Cell]:
    """The cells of a sweep file, offline cells first or with `by_seed` before those that need them.

    Nothing is written.

    Args:
        path: of the sweep file.
        runs_dir: the store.
        gpu: whether cells run on a GPU, for what `auto` means.
        only: methods to take, in this order, with the models that they need; none: all. The name
            of a method with a grid stands for all its combinations.

    Raises:
        ValueError: unknown or missing fields, wrong types, an algorithm, a config, a setting or
            a method of `only` that does not exist, settings that an algorithm refuses, a store
            that was begun with other settings. One line that names the place.
    """
    runs_dir = Path(runs_dir)
    sweep = read_sweep(path)
    shared = _SharedSettings(sweep)
    with _each_line_once():
        drafts = [
            (method, overrides, _settings(sweep, method, shared, overrides, task, seed))
            for method in sweep.methods
            for overrides, task, seed in itertools.product(
                method.combinations(), sweep.tasks, sweep.seeds
            )
        ]
    mode = _Mode([config for *_, config in drafts], runs_dir / sweep.name, gpu)
    cells: dict[Path, Cell] = {}
    models: dict[Path, Cell] = {}
    for method, overrides, config in drafts:
        cell = _cell(sweep, method, overrides, config, mode, runs_dir)
        if sweep.share_offline and _needs_model(cell.config):
            model = _offline_cell(sweep, method, cell, mode, runs_dir)
            cell.model = models.setdefault(model.folder, model)
            cell.config = dataclasses.replace(
                cell.config,
                offline_iterations=0,
                load_model=str(cell.model.folder / "model.pt"),
            )
        if cell.folder in cells:
            raise ConfigError(f"{sweep.path}: {cell.label} is there twice")
        cells[cell.folder] = cell
    for cell in (*models.values(), *cells.values()):
        check_begun(cell)
    return _in_order(sweep, _named(list(cells.values()), only))


def _named(cells: Sequence[Cell], methods: Sequence[str]) -> list[Cell]:
    """The cells of some methods, in the order of their names; without names all of them."""
    if not methods:
        return list(cells)
    named: dict[str, list[Cell]] = {}
    for cell in cells:
        for name in {cell.method, cell.method.split(",")[0]}:
            named.setdefault(name, []).append(cell)
    for method in methods:
        if method not in named:
            raise ConfigError(
                f"--only: the sweep has no method {method}; it has {', '.join(sorted(named))}"
            )
    return list({c.folder: c for method in methods for c in named[method]}.values())


def _in_order(sweep: Sweep, cells: Sequence[Cell]) -> list[Cell]:
    """The cells behind their models: behind all of them, or with `by_seed` each behind its own."""
    models = [cell.model for cell in cells if cell.model is not None]
    ordered = [*models, *cells]
    if sweep.by_seed:

        def place(cell: Cell) -> tuple[int, int]:
            return sweep.tasks.index(cell.task), sweep.seeds.index(cell.seed)

        # Sorting keeps the order of the methods.
        pairs = [(cell.model, cell) for cell in sorted(cells, key=place)]
        ordered = [cell for pair in pairs for cell in pair if cell is not None]
    return list({cell.folder: cell for cell in ordered}.values())


@contextmanager
def _each_line_once() -> Iterator[None]:
    """Print what is said inside without repetitions: the cells of a method say the same."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    finally:
        for line in dict.fromkeys(said.getvalue().splitlines()):
            print(line)


def planned_cells(sweep: Sweep) -> list[tuple[str, str, int]]:
    """(label in the store, task, seed) of every cell but the offline ones, in their order."""
    return [
        (_file_name(_label(method, overrides)), task, seed)
        for method in sweep.methods
        for overrides, task, seed in itertools.product(
            method.combinations(), sweep.tasks, sweep.seeds
        )
    ]


def digest(algorithm: str, config: Any, leave_out: AbstractSet[str]) -> str:
    """Hash of the settings that are not defaults: a new field does not rename old cells.

    Args:
        algorithm: name of the algorithm file without `.py`.
        config: an instance of its dataclass.
        leave_out: fields that do not count.
    """
    default = {**flatten(dataclasses.asdict(type(config)())), **FORMER_DEFAULTS}
    values = {
        name: value
        for name, value in flatten(dataclasses.asdict(config)).items()
        if name.split(".")[0] not in leave_out and value != default[name]
    }
    text = json.dumps([algorithm, values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ---------------------------------------------------------------- the sweep file


def read_sweep(path: Path | str) -> Sweep:
    """A sweep file, its fields checked; the settings are checked where a cell is made of them.

    Raises:
        ConfigError: an unknown or missing field, a wrong type, a bad name.
    """
    path = Path(path)
    values = _checked_fields(read_yaml(path), SWEEP_FIELDS, str(path))
    for name in ("tasks", "seeds", "methods"):
        if not values.get(name):
            raise ConfigError(
                f"{path}: {name} is missing or empty; a sweep needs at least one of them"
            )
    name = values.get("name", path.stem)
    if not re.fullmatch(NAME, name) or name == OFFLINE:
        raise ConfigError(
            f"{path}: {shown(name)} cannot be the name of a sweep's folder; give it a name of at "
            f"most 100 letters, digits and . + - _, and not {OFFLINE}"
        )
    for task in values["tasks"]:
        if not isinstance(task, str) or not re.fullmatch(TASK, task):
            raise ConfigError(
                f"{path}: tasks must be D4RL names or gymnasium ids, as env takes them, not "
                f"{shown(task)}"
            )
    for seed in values["seeds"]:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ConfigError(
                f"{path}: seeds must be whole numbers from 0 to {2**32 - 1}, not "
                f"{shown(seed)}"
            )
    for field in ("tasks", "seeds"):
        _check_once(values[field], f"{path}: {field}")
    sweep = Sweep(
        path,
        name,
        values["tasks"],
        values["seeds"],
        [
            _read_method(key, method, f"{path}: methods.{key}", values)
            for key, method in values["methods"].items()
        ],
        _nested(values.get("settings", {}), f"{path}: settings"),
        _nested(values.get("offline_settings", {}), f"{path}: offline_settings"),
        values.get("share_offline", True),
        values.get("by_seed", False),
    )
    count = sum(method.points for method in sweep.methods)
    count *= len(sweep.tasks) * len(sweep.seeds)
    if count > MOST_CELLS:
        raise ConfigError(
            f"{path}: methods, grids, tasks and seeds make {count} cells, and a sweep has at most "
            f"{MOST_CELLS}; shorten a list, or make several sweeps of it"
        )
    return sweep


def _check_once(values: Sequence[Any], origin: str) -> None:
    """Raise where a list has a value twice; 1 and 1.0 are one, 1 and true are not."""
    seen: list[tuple[bool, Any]] = []
    for value in values:
        entry = isinstance(value, bool), value
        if entry in seen:
            raise ConfigError(f"{origin}: {shown(value)} is there twice; take one out")
        seen.append(entry)


def _read_method(key: Any, values: Any, origin: str, sweep: Mapping) -> Method:
    if not re.fullmatch(NAME, str(key)):
        raise ConfigError(
            f"{origin}: use letters, digits and . + - _ only, and at most 100 of them"
        )
    values = _checked_fields(values, METHOD_FIELDS, origin)
    if "algorithm" not in values:
        raise ConfigError(f"{origin}: algorithm is missing")
    return Method(
        str(key),
        origin,
        values["algorithm"],
        values.get("config", sweep.get("config")),
        _nested(values.get("settings", {}), f"{origin}.settings"),
        _grid({**sweep.get("grid", {}), **values.get("grid", {})}, origin),
        values.get("offline"),
    )


def _checked_fields(values: Any, known: dict[str, type], origin: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} must be a block of fields, not {shown(values)}")
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"{origin}: unknown field {name}{hint} (known: {', '.join(known)})"
            )
        if not isinstance(value, known[name]):
            kinds = {
                list: "a list",
                dict: "a block of fields",
                str: "a text",
                bool: "true or false",
            }
            raise ConfigError(
                f"{origin}: {name} must be {kinds[known[name]]}, not {shown(value)}"
            )
    return values


def _grid(grid: dict[str, list], origin: str) -> dict[str, list]:
    """A grid, checked."""
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(
                f"{origin}: grid.{name} must be a list of values, not {shown(values)}"
            )
        _check_once(values, f"{origin}: grid.{name}")
    return grid


def _nested(values: dict, origin: str) -> dict[str, Any]:
    """`dare.cap: 3` as `dare: {cap: 3}`; fields that the sweep fills itself raise."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        if name in FILLED_BY_SWEEP:
            raise ConfigError(f"{origin}: {name} is given by {FILLED_BY_SWEEP[name]}")
        *blocks, last = str(name).split(".")
        target = nested
        for block in blocks:
            target = target.setdefault(block, {})
            if not isinstance(target, dict):
                raise ConfigError(
                    f"{origin}: {name} is set, but {block} is {shown(target)} and not a block"
                )
        if isinstance(value, dict) and isinstance(target.get(last), dict):
            target[last].update(value)
        else:
            target[last] = copy.deepcopy(value)  # YAML's anchors share one block
    return nested


# ---------------------------------------------------------------- cells


class _SharedSettings:
    """The settings files and the sweep's own settings, which several algorithms read.

    Each algorithm gets them without the blocks that only others have; what is left out is
    printed once per algorithm and place, not once per cell.
    """

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.found: dict[tuple[str, str], dict[str, Any]] = {}

    def layers(self, method: Method, task: str) -> Layers:
        """The settings file of the task, if the method has one, and the sweep's settings."""
        layers = [self._layer(method, f"{self.sweep.path}: settings", None)]
        if method.config is not None:
            short = re.sub(r"-v\d+$", "", tasks.file_name(task)).replace("-", "_")
            file = method.config.replace("{task}", short)
            layers.insert(0, self._layer(method, file, Path(file)))
        return layers

    def _layer(
        self, method: Method, origin: str, file: Path | None
    ) -> tuple[str, dict[str, Any]]:
        key = (method.algorithm, origin)
        if key not in self.found:
            with _errors_name(method.origin):
                program = load_algorithm(method.algorithm)
            if file is not None and not file.is_file():
                raise ConfigError(f"{method.origin}: config {missing_file(file)}")
            values = read_yaml(file) if file else self.sweep.settings
            self.found[key] = without_foreign_blocks(program.TrainConfig, values, origin)
        return origin, self.found[key]


class _Mode:
    """What stands for `auto` in the cells of a sweep: one thread each, and all compiled or none.

    What the sweep began with stays.

    Args:
        configs: of all cells.
        folder: of the sweep in the store.
        gpu: whether cells run on a GPU.
    """

    def __init__(self, configs: Sequence[Any], folder: Path, gpu: bool):
        self.compile = False
        open_ones = [c for c in configs if getattr(c, "compile", None) == AUTO]
        if open_ones and not gpu:
            begun = _begun_compiled(folder)
            most = max(map(pace.updates_of, open_ones))
            self.compile = pace.worth_compiling(most)[0] if begun is None else begun

    def settle(self, config: Any) -> tuple[Any, dict[str, Any]]:
        """The config without `auto`, and the values that took its place."""
        values = {"threads": 1, "compile": self.compile}
        if getattr(config, "compat", False):
            values["compile"] = False
        chosen = {k: v for k, v in values.items() if getattr(config, k, None) == AUTO}
        return dataclasses.replace(config, **chosen), chosen


def _begun_compiled(folder: Path) -> bool | None:
    """Whether the cells of a begun sweep are compiled where `auto` stood; None: unknown."""
    for file in sorted(folder.glob("*/cell.json")):
        about = read_json(file)
        # Cells of before there was a choice were eager.
        chosen = about.get("chosen", {"compile": False})
        if "compile" in chosen:
            return chosen["compile"]
    return None


def _settings(
    sweep: Sweep,
    method: Method,
    shared: _SharedSettings,
    overrides: dict[str, Any],
    task: str,
    seed: int,
) -> Any:
    """The config of a cell as the sweep file has it."""
    own = {"env": task, "seed": seed, "name": _file_name(_label(method, overrides))}
    layers = [
        *shared.layers(method, task),
        (f"{method.origin}.settings", method.settings),
        (f"{method.origin}.grid", _nested(overrides, f"{method.origin}.grid")),
        (str(sweep.path), own),
    ]
    return _make(method.algorithm, layers, f"{method.origin} on {task}")


def _label(method: Method, overrides: dict[str, Any]) -> str:
    return ",".join([method.name, *(f"{k}={_text(v)}" for k, v in overrides.items())])


def _cell(
    sweep: Sweep,
    method: Method,
    overrides: dict[str, Any],
    config: Any,
    mode: _Mode,
    runs_dir: Path,
) -> Cell:
    config, chosen = mode.settle(config)
    stem = Path(method.algorithm).stem
    key = digest(stem, config, config.BOOKKEEPING)
    name = f"{config.name}-{tasks.file_name(config.env)}-s{config.seed}-{key}"
    folder = runs_dir / sweep.name / name
    return Cell(
        folder,
        _label(method, overrides),
        config.env,
        config.seed,
        method.algorithm,
        dataclasses.replace(config, runs_dir=str(folder)),
        overrides,
        chosen=chosen,
    )


def _needs_model(config: Any) -> bool:
    trained = config.offline_iterations > 0 and config.online_iterations > 0
    return trained and not config.load_model


def _offline_cell(
    sweep: Sweep, method: Method, cell: Cell, mode: _Mode, runs_dir: Path
) -> Cell:
    """The offline cell whose model a fine-tuning cell starts from."""
    path = sweep.path
    with _errors_name(f"{path}: offline"):
        algorithm = method.offline or baseline_of(method.algorithm)
        config_class = load_algorithm(algorithm).TrainConfig
    known = {field.name for field in dataclasses.fields(config_class)}
    # Only what the offline phase reads: what else a cell sets must not make another model.
    unread = config_class.ONLINE | {"runs_dir", "resume", "name", "checkpoints_path"}
    values = dataclasses.asdict(cell.config)
    values = {k: v for k, v in values.items() if k in known - unread}
    stem = Path(algorithm).stem
    layers = [
        (str(path), {**values, "name": f"offline-{stem}"}),
        (f"{path}: offline_settings", sweep.offline_settings),
        (str(path), {"online_iterations": 0}),
    ]
    config = _make(algorithm, layers, f"{path}: the offline phase of {cell.label}")
    config, _ = mode.settle(config)
    if config.offline_iterations < 1 or config.eval_freq < 1:
        raise ConfigError(
            f"{path}: offline_settings: offline_iterations {config.offline_iterations} and "
            f"eval_freq {config.eval_freq} must be at least 1; or set share_offline: false"
        )
    if config.offline_iterations % config.eval_freq:
        raise ConfigError(
            f"{path}: eval_freq {config.eval_freq} does not divide offline_iterations "
            f"{config.offline_iterations}, so the score before fine-tuning would be unknown; "
            "set offline_settings: {eval_freq: ...}"
        )
    ending = digest(stem, config, config.BOOKKEEPING | config.ONLINE)
    name = f"{stem}-{tasks.file_name(cell.task)}-s{cell.seed}-{ending}"
    folder = runs_dir / OFFLINE / name
    config = dataclasses.replace(config, runs_dir=str(folder))
    return Cell(folder, f"offline {stem}", cell.task, cell.seed, algorithm, config, {})


def _make(algorithm: str, layers: Layers, origin: str) -> Any:
    """A config; settings that the algorithm refuses are an error that names the origin."""
    try:
        config_class = load_algorithm(algorithm).TrainConfig
        if hasattr(config_class, "seeds"):
            # A cell is one run, whatever its settings file asks for.
            layers = [*layers, (origin, {"seeds": None})]
        return make_config(config_class, layers)
    except ConfigError:
        raise  # it names its place already
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}") from None


@contextmanager
def _errors_name(origin: str) -> Iterator[None]:
    """Errors inside the block begin with the place that they are about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _text(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _file_name(label: str) -> str:
    """A label as the first part of a folder's name; file names end at 255 bytes."""
    return re.sub(r"[^\w.,=+-]", "_", label)[:100]
