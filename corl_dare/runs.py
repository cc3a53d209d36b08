"""A run and its folder: config, metrics, evaluations, checkpoint, curves, summary.

`runs/NAME/` holds `config.yaml` (complete; the run can be repeated from it), `metrics.csv`,
`evaluations.csv` (one row per evaluation episode: raw return), `checkpoint.pt` (exact resume),
`curves.png` and `summary.json`. `--resume runs/NAME` goes on from the last checkpoint.

Nothing here unpickles code: checkpoints hold tensors, numbers, strings, lists and dicts, and are
read with `torch.load(weights_only=True)`; of CORL's pickled `Scalar` modules only the data is read.

    python -m corl_dare.runs export runs/NAME --to corl

writes a run's weights as CORL's `checkpoint_N.pt`.
"""

import argparse
import csv
import dataclasses
import difflib
import importlib.metadata
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyrallis
import torch
import yaml
from tqdm import tqdm

from corl_dare.progress import progress_bar

FORMAT = 1  # of checkpoint.pt
RESUME_MAY_CHANGE = ("resume", "online_iterations", "wandb_mode", "device")
COMMON_COLUMNS = (
    "step",
    "phase",
    "d4rl_normalized_score",
    "exchanged",
    "separation_point",
    "score_off_mean",
    "score_on_mean",
)

# ---------------------------------------------------------------- config


class ConfigError(ValueError):
    """Bad settings; the message is one line that names the field and the fix."""


def parse_config(
    config_class: type, argv: Sequence[str] | None = None, ignore: Sequence[str] = ()
) -> Any:
    """`--config FILE` and `--field value` flags -> an instance of the config dataclass.

    Flags win over the file; `--config_path` is CORL's spelling of `--config`; nested fields are
    `--dare.cap 32`. `--resume RUN` takes the run's own config. Bad input ends the program with
    one line and exit status 2.

    Args:
        config_class: dataclass with defaults.
        argv: arguments without the program's name; default: the command line's.
        ignore: blocks of a shared file that are another algorithm's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print("--config FILE reads a YAML file; flags win over it.\n")
        pyrallis.argparsing.ArgumentParser(config_class).print_help()
        raise SystemExit(0)
    try:
        return _parse(config_class, argv, ignore)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parse(config_class: type, argv: list[str], ignore: Sequence[str]) -> Any:
    flags = _read_flags(argv)
    files = [flags.pop(name) for name in ("config", "config_path") if name in flags]
    origin = "the command line"
    values: dict[str, Any] = {}
    if flags.get("resume"):
        folder = Path(str(flags["resume"]))
        other = [f for f in flags if f not in RESUME_MAY_CHANGE] + files
        if other:
            raise ConfigError(
                f"--resume uses the run's own config; leave out {other[0]} (only "
                f"{', '.join(RESUME_MAY_CHANGE[1:])} may change)"
            )
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"--resume {folder}: no run here (no config.yaml)")
        files = [str(folder / "config.yaml")]
    for file in files:
        origin = str(file)
        values.update(read_yaml(Path(str(file))))
    for name in ignore:
        if name in values:
            print(f"{origin}: block '{name}' is not for this algorithm and left out")
            del values[name]
    _check(config_class, values, origin)
    if values.get("resume") and "resume" not in flags:
        raise ConfigError(f"{origin}: resume is a flag, --resume RUN; take it out here")
    for name, value in flags.items():
        target = values
        *blocks, last = name.split(".")
        for block in blocks:
            if not isinstance(target.get(block), dict):
                target[block] = {}
            target = target[block]
        target[last] = value
    return _build(config_class(), _check(config_class, values, "command line"))


class _Text(str):
    """What a flag was given: the field's type decides how it is read."""


def _read_flags(argv: list[str]) -> dict[str, _Text]:
    flags, i = {}, 0
    while i < len(argv):
        match = re.fullmatch(r"--([\w.]+)(?:=(.*))?", argv[i], re.DOTALL)
        if match is None:
            raise ConfigError(f"cannot read {argv[i]!r}; write --field value")
        name, value = match.groups()
        if value is None:
            i += 1
            if i == len(argv) or argv[i].startswith("--"):
                raise ConfigError(f"--{name} needs a value")
            value = argv[i]
        flags[name] = _Text(value)
        i += 1
    return flags


def read_yaml(path: Path) -> dict[str, Any]:
    """The top-level fields of a YAML file; a file that holds something else raises."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{path} is not readable YAML: {text}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path} must hold `field: value` lines")
    return values or {}


def _check(config_class: type, values: dict, origin: str, prefix: str = "") -> dict:
    """The values as the fields' types; unknown fields and wrong types raise."""
    known = typing.get_type_hints(config_class)
    checked = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise ConfigError(f"{origin}: unknown field {prefix}{name}{hint}")
        kind = known[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict | None):
                raise ConfigError(f"{origin}: {prefix}{name} must be a block of fields")
            checked[name] = _check(kind, value or {}, origin, f"{prefix}{name}.")
        else:
            checked[name] = _as_type(value, kind, f"{origin}: {prefix}{name}")
    return checked


def _as_type(value: Any, kind: Any, name: str) -> Any:
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
    if optional:
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        kind = kinds[0]
        none = isinstance(value, _Text) and value.lower() in ("", "~", "null", "none")
        if value is None or none or (value == "" and kind is not str):
            return None
    if isinstance(value, _Text) and kind is bool:
        value = yaml.SafeLoader.bool_values.get(value.lower(), value)
    try:
        if isinstance(value, bool):
            if kind is bool:
                return value
        elif kind is int:
            whole = re.fullmatch(r"[+-]?\d+", str(value))
            number = int(value) if whole else float(value)
            if number == int(number):
                return int(number)
        elif kind is float:
            # YAML 1.1 reads 3e-4 as a string
            number = float(str(value).replace(".inf", "inf"))
            if number == number:  # nan would pass the checks of __post_init__
                return number
        elif kind is str and isinstance(value, str | int | float):
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{name} must be {kind.__name__}, not {value!r}")


def _build(default: Any, values: dict) -> Any:
    """The default config with the values in place.

    A new one: what __post_init__ derived from the defaults must not pass for a given value.
    """
    nested = {
        name: _build(getattr(default, name), value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return type(default)(**nested)


def make_config(config_class: type, layers: Iterable[tuple[str, dict]]) -> Any:
    """A config from layers of values over the defaults; later layers win, field by field.

    Args:
        config_class: dataclass with defaults.
        layers: (where the values come from, nested values).

    Raises:
        ConfigError: an unknown field or a wrong type, named with its origin.
        ValueError: an impossible combination, from the config's own checks.
    """

    def merge(old: dict, new: dict) -> dict:
        blocks = {
            k: merge(old.get(k, {}), v) for k, v in new.items() if isinstance(v, dict)
        }
        return {**old, **new, **blocks}

    values: dict[str, Any] = {}
    for origin, layer in layers:
        values = merge(values, _check(config_class, layer, origin))
    return _build(config_class(), values)


def dump_config(config: Any) -> str:
    """YAML of every field, sorted; `parse_config --config` of it gives an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=True)


# ---------------------------------------------------------------- machine


def pick_device(name: str) -> str:
    """`auto`: cuda where there is one, else cpu. Asking for a missing cuda falls back, aloud."""
    if name != "auto" and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        print(f"device {name}: no CUDA device here, running on the cpu")
        return "cpu"
    return name


def configure_threads(count: int) -> None:
    """CPU threads of torch."""
    if count < 1:
        raise ConfigError(f"threads must be at least 1, not {count}")
    torch.set_num_threads(count)


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "gymnasium", "mujoco", "corl-dare"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str:
    """Commit of this code, `+dirty` when tracked files differ from it, or `unknown`.

    Files in results/ are what code wrote, so a benchmark's second seed is as clean as its first.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        code = (":/", ":(top,exclude)results")
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Processor, cores and GPU; no names of hosts or users."""
    model = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = re.search(r"model name\s*:\s*(.+)", text).group(1)
    except (OSError, AttributeError):
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": model, "cores": os.cpu_count(), "gpu": gpu}


def readable_time(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for unit, size, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def tidy_path(path: Path | str) -> str:
    """A path to print and record: relative to here or with the home folder as ~."""
    path = Path(path).absolute()
    for base, sign in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base):
            return f"{sign}{path.relative_to(base)}"
    return str(path)


# ---------------------------------------------------------------- checkpoints


def pack(value: Any) -> Any:
    """Nested numpy arrays as tensors, which a checkpoint may hold; `unpack` reverses it."""
    if isinstance(value, np.ndarray):
        return {"__array__": torch.from_numpy(np.array(value, order="C"))}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: pack(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(pack(v) for v in value)
    return value


def unpack(value: Any) -> Any:
    """Reverse of `pack`."""
    if isinstance(value, dict):
        if set(value) == {"__array__"}:
            return value["__array__"].numpy().copy()
        return {k: unpack(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(unpack(v) for v in value)
    return value


def rng_state() -> dict[str, Any]:
    """The global random streams of Python, numpy (legacy) and torch, CPU and CUDA."""
    state = {
        "python": pack(random.getstate()),
        "numpy": pack(np.random.get_state()),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the streams of `rng_state` back."""
    random.setstate(unpack(state["python"]))
    np.random.set_state(unpack(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)  # a full disk must not stay full
        raise
    if os.name == "posix":  # the new name itself must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write atomically, as `save_checkpoint`."""
    with _replacing(path) as file:
        file.write(text.encode())


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write atomically: a crash at any moment leaves the old file or the new one, whole."""
    with _replacing(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path, algorithm: str) -> dict[str, Any]:
    """Read a checkpoint of `save_checkpoint` on the CPU.

    Raises:
        ValueError: missing, truncated, not a checkpoint, of another algorithm or format.
    """
    state = _load(path)
    if not isinstance(state, dict) or "algorithm" not in state:
        raise ValueError(f"{path} is not a checkpoint of a corl-dare run")
    if state["algorithm"] != algorithm:
        raise ValueError(
            f"{path} belongs to {state['algorithm']}, not to {algorithm}; run that "
            "algorithm's file"
        )
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {state.get('format')}, this version reads "
            f"{FORMAT}"
        )
    return state


class _PickledScalar:
    """What stands in a pickle for CORL's module `Scalar`: its data, none of its code.

    CQL's checkpoints hold two such modules, and a pickle names the class as `__main__.Scalar`.
    """

    def __init__(self, state: dict[str, Any] | None = None):
        self.state = state

    def __getstate__(self):
        return self.state

    def __setstate__(self, state):
        self.state = state


_PickledScalar.__module__, _PickledScalar.__qualname__ = "__main__", "Scalar"


def load_corl_checkpoint(path: Path | str, required: Iterable[str] = ()) -> dict:
    """Weights and optimizers of a CORL `checkpoint_N.pt`, or of a run's `checkpoint.pt`.

    The `Scalar` modules in checkpoints of CQL and Cal-QL come as `{"constant": tensor}`.
    Nothing in the file is executed; any other class in it is refused.

    Args:
        path: the file.
        required: keys that the algorithm reads.

    Raises:
        ValueError: missing, truncated, holding foreign classes, or of another algorithm.
    """
    with torch.serialization.safe_globals([_PickledScalar]):
        state = _load(Path(path))
    if isinstance(state, dict) and "parts" in state:
        state = state["parts"]["trainer"]
    if isinstance(state, dict):
        # A random stream is no weight, and may be of another device: a new run has its own.
        state = {k: v for k, v in state.items() if k != "dare_generator"}
        state = {name: _scalar_state(v, f"{path}: {name}") for name, v in state.items()}
    missing = [k for k in required if not isinstance(state, dict) or k not in state]
    if missing:
        raise ValueError(
            f"{path} has no {missing[0]!r}: it is not a checkpoint of this algorithm"
        )
    return state


def _scalar_state(value: Any, name: str) -> Any:
    """The state_dict of a pickled `Scalar`; other values as they are."""
    if not isinstance(value, _PickledScalar):
        return value
    try:
        constant = value.state["_parameters"]["constant"].detach()
        return {"constant": constant.reshape(())}
    except (TypeError, KeyError, AttributeError, RuntimeError):
        raise ValueError(f"{name} is no module with one number 'constant'") from None


def save_corl_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a trainer's state as CORL's `load_state_dict` reads it, atomically.

    CQL and Cal-QL expect module objects where our state has `{"constant": tensor}`. The file
    then names the class `__main__.Scalar`, which CORL's scripts define.
    """

    def corl(value: Any) -> Any:
        if not isinstance(value, dict) or set(value) != {"constant"}:
            return value
        module = torch.nn.Module()
        module.constant = torch.nn.Parameter(value["constant"].detach().cpu())
        return _PickledScalar(vars(module))

    # Pickle writes a class only under a name where it finds that very class.
    main_module, absent = sys.modules["__main__"], object()
    before = getattr(main_module, "Scalar", absent)
    main_module.Scalar = _PickledScalar
    try:
        save_checkpoint(path, {name: corl(value) for name, value in state.items()})
    finally:
        if before is absent:
            del main_module.Scalar
        else:
            main_module.Scalar = before


def export_corl(run: Path | str, out: Path | str | None = None) -> Path:
    """Write the last checkpoint of a run folder as CORL's `checkpoint_N.pt`.

    Args:
        run: run folder.
        out: file to write; default: `checkpoint_N.pt` in the run folder, N as CORL counts, from 0.

    Raises:
        ValueError: no readable checkpoint in the folder, or a place that cannot be written.
    """
    path = Path(run) / "checkpoint.pt"
    state = _load(path)
    if not isinstance(state, dict) or "trainer" not in state.get("parts", {}):
        raise ValueError(f"{path} is not a checkpoint of a corl-dare run")
    out = Path(out or Path(run) / f"checkpoint_{state['step'] - 1}.pt")
    if not out.parent.is_dir():
        raise ValueError(f"cannot write {out}: {out.parent} is not a folder")
    save_corl_checkpoint(out, state["parts"]["trainer"])
    return out


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = "Unsupported" in str(error) or "weights_only" in str(error)
        if refused and "Unsupported operand" not in str(error):  # that one is no pickle
            found = re.search(r"GLOBAL (\S+)", str(error))
            name = f" ({found.group(1)})" if found else ""
            why = f"it holds Python objects{name}, which are never unpickled"
        else:
            why = f"it is damaged or not a checkpoint ({type(error).__name__})"
        raise ValueError(f"cannot read {path}: {why}") from None


# ---------------------------------------------------------------- the run


class Run:
    """A run folder, its logs, its progress bar and the wish to stop.

    Args:
        config: needs the fields env, seed, name, runs_dir, resume, wandb_mode, project, group,
            offline_iterations, online_iterations.
        algorithm: name in checkpoints and the summary.
        columns: metrics beyond the common ones; others raise.

    Use as a context manager: inside, the first SIGINT or SIGTERM sets `stop_requested`, a second
    one interrupts at once.

    Raises:
        ConfigError: the folder cannot be made or written, or there is nothing to resume.
    """

    def __init__(self, config: Any, algorithm: str, columns: Sequence[str]):
        if config.wandb_mode not in ("disabled", "offline", "online"):
            raise ConfigError(
                f"wandb_mode {config.wandb_mode!r} is not one of disabled, offline, online"
            )
        self.config, self.algorithm = config, algorithm
        self.columns = list(dict.fromkeys([*COMMON_COLUMNS, *columns]))
        self.total = config.offline_iterations + config.online_iterations
        self.dataset: dict[str, Any] = {}  # provenance, set when the data is known
        # Now: by the end of a long run the files may be others than those that run.
        self.code = {"versions": versions(), "commit": git_commit()}
        self.stop_requested = False
        self.checkpoint: dict[str, Any] | None = None  # what to resume from
        self.step = 0  # iterations done
        # Counters that a checkpoint carries along
        self.scores: list = []  # [step, phase, mean normalized score]
        self.wall_seconds = self.update_seconds = 0.0
        self.updates = 0
        self.exchanges = [0.0, 0]  # sum, count of the logged exchange counts
        self.bar: tqdm | None = None
        self.wandb: Any = None
        if config.resume:
            self.folder = Path(config.resume)
            self._resume()
        else:
            self.folder = self._new_folder()
            self._write("config.yaml", dump_config(config))
            self._write("metrics.csv", ",".join(self.columns) + "\n")
            self._write("evaluations.csv", "step,phase,episode,return,score\n")
        self.started = time.perf_counter()
        self._start_wandb()

    def _new_folder(self) -> Path:
        config = self.config
        stamp = time.strftime("%Y%m%d-%H%M%S")
        base = (
            Path(config.runs_dir) / f"{config.name}-{config.env}-s{config.seed}-{stamp}"
        )
        folder, count = base, 1
        while True:
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                count += 1
                folder = Path(f"{base}-{count}")
            except OSError as error:
                raise ConfigError(
                    f"cannot make the run folder {folder} ({error.strerror}); set runs_dir "
                    "to a place you may write to"
                ) from None
            if not Path(config.runs_dir).is_dir():
                raise ConfigError(f"runs_dir {config.runs_dir} is not a folder")
        return folder

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        try:
            write_text(path, text)
        except OSError as error:
            raise ConfigError(f"cannot write {path} ({error.strerror})") from None

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            raise ConfigError(
                f"{self.folder} has no checkpoint.pt yet; start the run again instead"
            )
        self.checkpoint = load_checkpoint(path, self.algorithm)
        self.step = self.checkpoint["step"]
        for name, value in self.checkpoint["run"].items():
            setattr(self, name, value)
        # Rows written after the checkpoint will be written again.
        for name in ("metrics.csv", "evaluations.csv"):
            with open(self.folder / name, newline="") as file:
                rows = list(csv.reader(file))
            whole = [r for r in rows[1:] if len(r) == len(rows[0])]
            kept = [r for r in whole if int(r[0]) <= self.step]
            lines = [",".join(r) for r in [rows[0], *kept]]
            self._write(name, "\n".join(lines) + "\n")
            if name == "metrics.csv":
                self.columns = rows[0]
        # Without `resume`, so that the file still describes a run of its own.
        config = dataclasses.replace(self.config, resume=None)
        self._write("config.yaml", dump_config(config))

    # -- stopping -------------------------------------------------------------------------

    def __enter__(self) -> "Run":
        def ask_to_stop(number, frame):
            if self.stop_requested:
                raise KeyboardInterrupt
            self.stop_requested = True
            # Not print: the signal may have come in the middle of one, which raises.
            with suppress(OSError):
                os.write(2, b"\nstopping after this step; once more to stop at once\n")

        self._handlers = {
            number: signal.signal(number, ask_to_stop)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            try:
                self.wandb.finish()
            except Exception as failure:
                self.print(
                    f"wandb did not finish ({failure}); metrics.csv has everything"
                )

    # -- progress -------------------------------------------------------------------------

    def print(self, text: str) -> None:
        """A line that does not tear the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def progress(self) -> Iterable[int]:
        """The iterations that are left, 0-based, behind a progress bar."""
        self.bar = progress_bar(total=self.total, initial=self.step, unit="it")
        for t in range(self.step, self.total):
            online = t >= self.config.offline_iterations
            self.bar.set_description_str("online" if online else "offline", False)
            yield t
            self.step = t + 1
            self.bar.update()
            if self.stop_requested:
                return

    @contextmanager
    def measured_updates(self, count: int):
        """Time spent in gradient updates, for the summary's rate."""
        start = time.perf_counter()
        yield
        self.update_seconds += time.perf_counter() - start
        self.updates += count

    # -- logs -----------------------------------------------------------------------------

    def log(self, step: int, phase: str, metrics: dict[str, Any]) -> None:
        """One row of metrics.csv; tensors are read here, in one transfer."""
        unknown = set(metrics) - set(self.columns)
        if unknown:
            raise KeyError(f"metrics {sorted(unknown)} are not columns of metrics.csv")
        tensors = {k: v for k, v in metrics.items() if isinstance(v, torch.Tensor)}
        values = dict(metrics)
        if tensors:
            scalars = [v.detach().double().reshape(()) for v in tensors.values()]
            stacked = torch.stack(scalars)
            values.update(zip(tensors, stacked.tolist(), strict=True))
        row = {"step": step, "phase": phase, **values}
        with open(self.folder / "metrics.csv", "a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        if "exchanged" in values:
            self.exchanges[0] += values["exchanged"]
            self.exchanges[1] += 1
        if self.bar is not None:
            shown = {"score": f"{self.scores[-1][2]:.1f}"} if self.scores else {}
            if "exchanged" in values:
                shown["exchanged"] = f"{values['exchanged']:.0f}"
            self.bar.set_postfix(shown, refresh=False)
        if self.wandb is not None:
            try:
                self.wandb.log({f"{phase}/{k}": v for k, v in values.items()}, step=step)
            except Exception as error:
                self.print(f"wandb stopped ({error}); metrics.csv has everything")
                self.wandb = None

    def evaluation(
        self, step: int, phase: str, returns: np.ndarray, scores: np.ndarray
    ) -> float:
        """Rows of evaluations.csv, one per episode; returns the mean normalized score."""
        with open(self.folder / "evaluations.csv", "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for i, (total, score) in enumerate(zip(returns, scores, strict=True)):
                writer.writerow([step, phase, i, repr(float(total)), repr(float(score))])
        mean = float(np.mean(scores))
        self.scores.append([step, phase, mean])
        self.print(
            f"{phase} step {step}: return {np.mean(returns):.0f} ± {np.std(returns):.0f}, "
            f"normalized score {mean:.1f}"
        )
        return mean

    def _start_wandb(self) -> None:
        config = self.config
        if config.wandb_mode == "disabled":
            return
        try:
            import wandb

            self.wandb = wandb.init(
                mode=config.wandb_mode,
                project=config.project,
                group=config.group,
                name=self.folder.name,
                dir=str(self.folder),
                config=dataclasses.asdict(config),
            )
        except Exception as error:
            print(
                f"no wandb ({type(error).__name__}: {error}); metrics.csv has everything"
            )

    # -- checkpoint and end ---------------------------------------------------------------

    def _clock(self) -> float:
        return self.wall_seconds + time.perf_counter() - self.started

    def save(self, parts: dict[str, Any]) -> None:
        """checkpoint.pt: `state_dict` of every part, the global random streams, the counters."""
        state = {
            "format": FORMAT,
            "algorithm": self.algorithm,
            "step": self.step,
            "rng": rng_state(),
            "dataset_sha256": self.dataset.get("sha256"),
            "run": {
                "scores": [list(s) for s in self.scores],
                "wall_seconds": self._clock(),
                "update_seconds": self.update_seconds,
                "updates": self.updates,
                "exchanges": list(self.exchanges),
            },
            "parts": {name: pack(part.state_dict()) for name, part in parts.items()},
        }
        for name in ("metrics.csv", "evaluations.csv"):  # rows that will not come again
            with open(self.folder / name, "ab") as file:
                os.fsync(file.fileno())
        save_checkpoint(self.folder / "checkpoint.pt", state)

    def restore(self, parts: dict[str, Any]) -> None:
        """Put the parts and the random streams of the checkpoint back.

        Raises:
            ConfigError: the dataset is not the one that the run began with.
        """
        state = self.checkpoint
        if state["dataset_sha256"] != self.dataset.get("sha256"):
            raise ConfigError(
                f"the dataset {self.dataset.get('path')} is not the one this run began with "
                "(its sha256 differs); put that file back or start a new run"
            )
        for name, part in parts.items():
            part.load_state_dict(unpack(state["parts"][name]))
        set_rng_state(state["rng"])
        self.checkpoint = None

    def interrupted(self) -> None:
        """Say how to go on."""
        folder = tidy_path(self.folder)
        self.print(f"saved at step {self.step}; go on with: --resume {folder}")

    def finish(self) -> dict[str, Any]:
        """Write curves.png and summary.json and print the result; returns the summary.

        `score_offline`: last evaluation of the offline phase. `score_final`: mean of the last
        four online evaluations (DARE's protocol). `score_last`, `score_best`: last and best
        online evaluation; in a run without any, the last three are of the offline phase. All
        are means over episodes, D4RL-normalized. Versions and commit are those at the start
        of this process.
        """
        offline = [s for _, phase, s in self.scores if phase == "offline"]
        online = [s for _, phase, s in self.scores if phase == "online"]
        seen = online or offline
        data = self.dataset
        summary = {
            "algorithm": self.algorithm,
            "env": self.config.env,
            "seed": self.config.seed,
            "score_offline": offline[-1] if offline else None,
            "score_final": float(np.mean(seen[-4:])) if seen else None,
            "score_last": seen[-1] if seen else None,
            "score_best": max(seen) if seen else None,
            "exchanges_mean": self.exchanges[0] / self.exchanges[1]
            if self.exchanges[1]
            else None,
            "updates": self.updates,
            "updates_per_second": self.updates / max(self.update_seconds, 1e-9),
            "wall_seconds": self._clock(),
            "dataset": {
                "source": data.get("source"),
                "label": data.get("label"),
                "path": tidy_path(data["path"]) if data.get("path") else None,
                "sha256": data.get("sha256"),
                "rows": data.get("rows"),
            },
            **self.code,
            "machine": machine(),
        }
        self._write("summary.json", json.dumps(summary, indent=2) + "\n")
        plot_curves(self.folder, self.config, data.get("label", ""))

        def show(score: float | None) -> str:
            return "none" if score is None else f"{score:.1f}"

        if self.bar is not None:
            self.bar.close()
        kind = "online" if online else "final"  # a run may be offline only
        self.print(
            f"\noffline score {show(summary['score_offline'])} -> {kind} score "
            f"{show(summary['score_final'])} (D4RL-normalized, mean of the last "
            f"{min(4, len(seen))} evaluations; last {show(summary['score_last'])}, best "
            f"{show(summary['score_best'])})\n"
            f"dataset: {data.get('label', 'unknown')}\n"
            f"run folder: {tidy_path(self.folder)}\n"
            f"curves: {tidy_path(self.folder / 'curves.png')}"
        )
        return summary


# ---------------------------------------------------------------- curves

# Okabe and Ito's colors, which the color-blind can tell apart
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def read_csv(path: Path) -> dict[str, list[str]]:
    """Columns of a CSV file, as text."""
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    return {name: [r[i] for r in rows[1:]] for i, name in enumerate(rows[0])}


def plot_curves(folder: Path, config: Any, label: str) -> Path:
    """Draw curves.png of a run folder: score, exchange count, score distributions.

    Missing columns, few points, nan and inf leave gaps. `label` names the dataset's source.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    metrics = read_csv(folder / "metrics.csv")
    steps = np.array(metrics["step"], dtype=float)

    def column(name: str) -> np.ndarray:
        """A number per row, nan where there is none."""
        values = [float(v or "nan") for v in metrics.get(name, [""] * len(steps))]
        values = np.array(values, dtype=float)
        return np.where(np.isfinite(values), values, np.nan)

    exchanged = column("exchanged")
    rows = np.isfinite(exchanged)  # those of the online phase, where pairs are exchanged
    panels = 3 if rows.any() else 1
    figure = Figure(figsize=(7, 2.5 * panels + 0.7), layout="constrained")
    axes = np.atleast_1d(figure.subplots(panels, sharex=True))
    switch, total = (
        config.offline_iterations,
        config.offline_iterations + config.online_iterations,
    )
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if 0 < switch < total:
            axis.axvline(switch, color="#666666", linewidth=1, linestyle=":")
    axes[0].set_xlim(-0.02 * total, 1.02 * total or 1.0)
    for start, end, phase in ((0, switch, "offline"), (switch, total, "online")):
        if end - start > 0.1 * total:  # else no room for the word
            options = {"ha": "center", "va": "bottom", "color": "#666666", "fontsize": 9}
            across = axes[0].get_xaxis_transform()
            axes[0].text((start + end) / 2, 1.0, phase, transform=across, **options)
    axes[0].set_title(
        f"{config.name} on {config.env}, seed {config.seed}\n{label}",
        fontsize=10,
        pad=18,
        wrap=True,
    )
    _draw_scores(axes[0], read_csv(folder / "evaluations.csv"))
    if panels == 3:
        x = steps[rows]
        _draw_line(axes[1], x, exchanged[rows], PURPLE)
        axes[1].set_ylim(bottom=0)
        axes[1].set_ylabel("exchanged pairs")
        names = (
            "score_off_mean score_off_std score_on_mean score_on_std separation_point"
        )
        _draw_distributions(axes[2], x, *(column(n)[rows] for n in names.split()))
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    axes[-1].set_xlabel("step (offline: updates, online: environment steps)")
    figure.align_ylabels()
    path = folder / "curves.png"
    with _replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
    return path


def _draw_line(axis: Any, x: np.ndarray, y: np.ndarray, color: str, **options) -> None:
    options["marker"] = (
        "o" if np.isfinite(y).sum() <= 50 else None
    )  # one point is seen too
    axis.plot(x, y, color=color, linewidth=1.2, markersize=3, **options)


def _draw_scores(axis: Any, evaluations: dict[str, list[str]]) -> None:
    steps = np.array(evaluations["step"], dtype=float)
    scores = np.array(evaluations["score"], dtype=float)
    scores = np.where(np.isfinite(scores), scores, np.nan)
    x = np.unique(steps)
    mean = np.array([scores[steps == step].mean() for step in x])
    std = np.array([scores[steps == step].std() for step in x])
    axis.fill_between(x, mean - std, mean + std, color=BLUE, alpha=0.18, linewidth=0)
    _draw_line(axis, x, mean, BLUE)
    axis.set_ylabel("D4RL-normalized score\n(mean ± std of episodes)")
    if not np.isfinite(mean).any():
        axis.set_yticks([])
        options = {"ha": "center", "va": "center", "color": "#666666"}
        why = "the scores are not finite" if len(x) else "no evaluations"
        axis.text(0.5, 0.5, why, transform=axis.transAxes, **options)


def _draw_distributions(
    axis: Any,
    x: np.ndarray,
    off: np.ndarray,
    off_std: np.ndarray,
    on: np.ndarray,
    on_std: np.ndarray,
    tau: np.ndarray,
) -> None:
    """Scores of both halves, mean ± std, and the separation point between them."""
    for mean, std, color, name in (
        (off, off_std, BLUE, "offline half, mean ± std"),
        (on, on_std, ORANGE, "online half, mean ± std"),
    ):
        axis.fill_between(
            x, mean - std, mean + std, color=color, alpha=0.18, linewidth=0
        )
        _draw_line(axis, x, mean, color, label=name)
    _draw_line(axis, x, tau, GREEN, label="separation point", linestyle="--")
    axis.set_ylabel("alignment score")
    # Ratio scores have stds far above the distances between the lines: show the lines.
    ends = [np.percentile(y, (1, 99)) for y in map(_finite, (off, on, tau)) if len(y)]
    if ends:
        low, high = np.min(ends), np.max(ends)
        room = (high - low) or max(abs(high), 1.0)
        bottom, top = axis.get_ylim()
        if bottom < low - room or top > high + room:
            axis.set_ylabel("alignment score\n(spread cut off)")
        axis.set_ylim(max(bottom, low - room), min(top, high + room))
    # Above the panel, where no data is.
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=3,
        fontsize=9,
        frameon=False,
    )


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def main(
    train: Callable[[Any], Any], config_class: type, ignore: Sequence[str] = ()
) -> None:
    """The command line of an algorithm file: config, `train`, errors as one line.

    Set CORL_DARE_TRACEBACK=1 to see where an error came from.
    """
    config = parse_config(config_class, ignore=ignore)
    try:
        train(config)
    except KeyboardInterrupt as stop:
        print(": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        if os.environ.get("CORL_DARE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def command_line(argv: Sequence[str] | None = None) -> None:
    """`python -m corl_dare.runs export RUN --to corl [--out FILE]`."""
    parser = argparse.ArgumentParser(prog="python -m corl_dare.runs")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a run's weights for other code")
    export.add_argument("run", help="run folder")
    export.add_argument("--to", choices=("corl",), required=True)
    export.add_argument("--out", help="file to write; default: checkpoint_N.pt in RUN")
    args = parser.parse_args(argv)
    try:
        print(tidy_path(export_corl(args.run, args.out)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    command_line()
