"""A run and its folder: config, metrics, evaluations, checkpoint, curves, summary.

`runs/NAME/` holds `config.yaml` (complete; the run can be repeated from it), `metrics.csv`,
`evaluations.csv` (one row per evaluation episode: raw return), `checkpoint.pt` (exact resume),
`policy_at_switch.safetensors`, `curves.png` and `summary.json`. `--resume runs/NAME` goes on from
the last checkpoint.

Nothing here unpickles code: checkpoints hold tensors, numbers, strings, lists and dicts, and are
read with `torch.load(weights_only=True)`; of CORL's pickled `Scalar` modules only the data is read.

    python -m corl.checkpoints export runs/NAME --to corl

writes a run's weights as CORL's `checkpoint_N.pt`.
"""

import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from corl import (
    checkpoints,
    curves,
    files,
    finite,
    fits,
    locks,
    machine,
    rewards,
    summary,
    tasks,
)
from corl.layers import ConfigError, dump_config, expand, with_absolute_paths
from corl.progress import progress_bar
from corl.run_tables import TABLES, Tables
from corl.trained import AT_SWITCH

# Names of parts in checkpoints of before version 0.2.
OLD_NAMES = {"online_buffer": "buffer"}
# What a checkpoint carries along of the run itself.
CARRIED = (
    *("scores", "wall_seconds", "update_seconds", "updates", "switched"),
    *("return_rule", "pretrained", "cpu_seconds", "work_seconds", "work_begun"),
    "stacked",
)
WRITTEN = (
    *("config.yaml", "checkpoint.pt", "summary.json", "curves.png"),
    *(AT_SWITCH, *TABLES),
)
# Bytes of `name`; file systems take 255 for a folder, and task, seed and time need some.
LONGEST_NAME = 150


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; `status` is the exit status that says which, as a shell has it."""

    def __init__(self, message: str, number: int):
        super().__init__(*([message] if message else []))
        self.status = 128 + number


class Run:
    """A run folder with its logs and checkpoint, a progress bar, and whether to stop.

    Args:
        config: needs the fields env, seed, name, runs_dir, resume, wandb_mode, project, group,
            offline_iterations, online_iterations.
        algorithm: name in checkpoints and the summary.
        columns: metrics beyond the common ones; others raise.
        scale: what scores are told in.

    Attributes that an algorithm may fill:
        panels: what curves.png shows below the score, see `curves.plot_curves`.
        means: entry of the summary -> metric whose mean over all logged rows it is. The progress
            bar shows these metrics.
        undefined: metrics that need not have a value; where they are not finite, metrics.csv has
            a blank. Any other metric that is not finite ends the run.

    Use as a context manager: inside, the first SIGINT or SIGTERM sets `stop_requested`, a second
    one interrupts at once. The folder belongs to this process until the block ends. A new folder
    goes away when an error ends the block before the first step is done. A FloatingPointError
    that leaves the block says the step and the last good checkpoint, too.

    Raises:
        ConfigError: the folder cannot be made or written, or there is nothing to resume, or it
            does not belong to these settings.
        InUseError: another process is at work on the folder.
    """

    def __init__(
        self,
        config: Any,
        algorithm: str,
        columns: Sequence[str],
        scale: tasks.Scale = tasks.D4RL,
    ):
        self.config, self.algorithm, self.scale = config, algorithm, scale
        self.tables = Tables(columns, scale)
        self.total = config.offline_iterations + config.online_iterations
        self.panels: Sequence[Mapping[str, Any]] = []
        self.means: dict[str, str] = {}
        self.undefined: Collection[str] = ()
        self.warnings: list[str] = []  # of this process; the summary has them
        self.dataset: dict[str, Any] = {}  # provenance, set when the data is known
        # Mean and std of the states that the policy reads, (S,) or (1,); known with the data.
        self.state_moments: tuple[np.ndarray, np.ndarray] | None = None
        # Asked at the start, since the files may have changed by the end of a long run.
        self.code = {"versions": machine.versions(), "commit": machine.git_commit()}
        self.device = "cpu"  # where the run runs
        self.prefix = ""  # of printed lines, where several runs share a screen
        self.stop_requested = False
        self.checkpoint: dict[str, Any] | None = None  # what to resume from
        self.step = 0  # iterations done
        # Phase and number of the running iteration.
        self.current: tuple[str, int] | None = None
        self.saved_step: int | None = None  # iterations done in checkpoint.pt
        self.scores: list[list[Any]] = []  # [step, phase, mean normalized score]
        self.wall_seconds = self.update_seconds = self.cpu_seconds = 0.0
        # Seeds that shared its process, see `stacked_session`; 0: it is alone.
        self.stacked = 0
        self.updates = 0
        # Seconds of each piece of work between online steps, and of the one that is under way.
        self.work_seconds: list[float] = []
        self.work_begun = 0.0
        self.pretrained = 0  # updates done before the first step, of `Session.pretrain`
        self.return_rule = rewards.return_rule(config)  # of the dataset's return range
        # Returns of the last evaluation of this process, and the updates before it.
        self.evaluated: tuple[np.ndarray, int] = (np.empty(0), 0)
        self.switched = False  # has the switch to the online phase been made?
        self.bar: tqdm | None = None
        self.wandb: Any = None
        self._signal: int | None = None  # the one that asked to stop
        self._made: list[Path] = []  # the new folder, and those above it that are new
        self._lock = ExitStack()
        try:
            self._open()
        except BaseException:
            self._close(failed=True)
            raise
        self.started = time.perf_counter()
        self.started_cpu = time.process_time()
        self._start_wandb()

    def _open(self) -> None:
        if self.config.resume:
            self.folder = expand(self.config.resume)
            self._hold()
            self._resume()
        else:
            self.folder = self._new_folder()
            self._hold()
            with _as_config_errors():
                self._write_config(self.config)
                self.tables.create(self.folder)

    def _hold(self) -> None:
        """Keep other processes out of the folder until `_close`."""
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is not a folder, so no run folder")
        path = self.folder / "run.lock"
        try:
            self._lock.enter_context(locks.holding(path, str(self.folder)))
        except OSError as error:
            raise ConfigError(
                f"cannot lock {path} ({error.strerror}); mend the rights of the folder, or "
                "remove the file if no process works there"
            ) from None

    def _close(self, failed: bool) -> None:
        """Give the folder back. A new one in which nothing was done goes away."""
        self._lock.close()
        nothing = not self.step and not self.tables.rows
        if failed and self._made and nothing and not self._has_checkpoint:
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in self._made[1:]:
                # Another run may have begun in it.
                with suppress(OSError):
                    folder.rmdir()

    @property
    def _has_checkpoint(self) -> bool:
        return (self.folder / "checkpoint.pt").is_file()

    def _new_folder(self) -> Path:
        config = self.config
        _check_name(config.name)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        base = (
            expand(config.runs_dir)
            / f"{config.name}-{tasks.file_name(config.env)}-s{config.seed}-{stamp}"
        )
        folder, count = base, 1
        while True:
            try:
                new = [path for path in (folder, *folder.parents) if not path.exists()]
                folder.mkdir(parents=True)
                self._made = new
                break
            except FileExistsError:
                count += 1
                folder = Path(f"{base}-{count}")
            except OSError as error:
                raise ConfigError(
                    f"cannot make the run folder {folder} ({error.strerror}); set runs_dir "
                    "to a place you may write to"
                ) from None
            if not expand(config.runs_dir).is_dir():
                raise ConfigError(f"runs_dir {config.runs_dir} is not a folder")
        return folder

    def _write_config(self, config: Any) -> None:
        text = dump_config(with_absolute_paths(config))
        files.write_text(self.folder / "config.yaml", text)

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not self._has_checkpoint:
            raise ConfigError(
                f"{self.folder} has no checkpoint.pt yet; start the run again instead"
            )
        state = checkpoints.load_checkpoint(path, self.algorithm)
        fits.check_layout(state, path)
        self.checkpoint = state
        self.step = self.saved_step = state["step"]
        # Runs of before this was written used upstream's rule, and go on with it.
        self.return_rule = rewards.UPSTREAM
        self._check_same(state.get("config"), self._settings())
        if self.step > self.total:
            needed = self.step - self.config.offline_iterations
            raise ConfigError(
                f"online_iterations {self.config.online_iterations} is less than {path} has "
                f"behind it (step {self.step}): give --online_iterations {needed} or more"
            )
        for name in CARRIED:
            if name in state["run"]:
                setattr(self, name, state["run"][name])
        for name in WRITTEN:
            files.remove_remains(self.folder / name)
        with _as_config_errors():
            self.tables.restore(self.folder, state.get("tables", {}), self.step)
            # Without `resume`, so that the file still describes a run of its own.
            self._write_config(dataclasses.replace(self.config, resume=None))

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint says of the settings: as config.yaml has them."""
        config = dataclasses.replace(self.config, resume=None)
        return dataclasses.asdict(with_absolute_paths(config))

    def _check_same(self, saved: dict[str, Any] | None, now: dict[str, Any]) -> None:
        """The settings must be those of the checkpoint; before version 0.2 it had none."""
        kind = type(self.config)
        may_differ = kind.RESUMABLE | getattr(kind, "BOOKKEEPING", frozenset())
        for name, old, new in _changes(saved or {}, now):
            if name not in may_differ:
                raise ConfigError(
                    f"{self.folder / 'config.yaml'}: {name} is {new!r}, but the checkpoint was "
                    f"trained with {old!r}; put that back or start a new run"
                )

    # -- stopping -------------------------------------------------------------------------

    def __enter__(self) -> "Run":
        def ask_to_stop(number: int, frame: Any) -> None:
            if self.stop_requested:
                raise Interrupted("", number)
            self.stop_requested, self._signal = True, number
            # Not print: the signal may have come in the middle of one, which raises.
            with suppress(OSError):
                os.write(2, b"\nstopping after this step; once more to stop at once\n")

        self._handlers = {
            number: signal.signal(number, ask_to_stop)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self._close(failed=error is not None)
        if isinstance(error, FloatingPointError):
            raise FloatingPointError(self._diverged(error)) from None
        if isinstance(error, OSError):
            # No room, most often, and nobody has to look for the step.
            raise RuntimeError(f"{error}; {self.way_on()}") from error
        stopped = isinstance(error, KeyboardInterrupt)
        if stopped and self._signal is not None and not isinstance(error, Interrupted):
            raise Interrupted(str(error), self._signal) from error

    def _end(self) -> None:
        """End what outlives a step: signal handlers, the progress bar, wandb."""
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

    def _diverged(self, error: FloatingPointError) -> str:
        """The error's text with the step before it and the last good checkpoint after it."""
        path = machine.tidy_path(self.folder / "checkpoint.pt")
        where = "" if self.current is None else "{} step {}: ".format(*self.current)
        kept = "no checkpoint was written yet"
        if self.saved_step is not None:
            kept = f"the last good checkpoint is {path} (step {self.saved_step})"
        return f"{where}{error}; {kept}"

    # -- progress -------------------------------------------------------------------------

    def print(self, text: str) -> None:
        """A line that does not tear the progress bar, behind `prefix`."""
        if self.prefix:
            lines = filter(str.strip, text.splitlines())
            text = "\n".join(f"{self.prefix}{line}" for line in lines)
        with files.writing("standard output"):
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """Print a warning that the summary and the report say again."""
        self.warnings.append(text)
        self.print(f"warning: {text}")

    def steps(self, phase: str, last: int) -> Iterator[int]:
        """The iterations up to `last` that are left, 0-based, behind a progress bar.

        Ends early after the iteration in which somebody asked to stop.
        """
        if self.bar is None:
            self.bar = progress_bar(total=self.total, initial=self.step, unit="it")
        self.bar.set_description_str(phase, False)
        for t in range(self.step, last):
            if self.stop_requested:
                return
            self.current = phase, t + 1
            yield t
            self.step = t + 1
            self.bar.update()

    # -- logs -----------------------------------------------------------------------------

    def read(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The metrics as numbers, without those that are undefined; tensors in one transfer.

        Raises:
            FloatingPointError: a metric is not finite that must be.
        """
        tensors = {k: v for k, v in metrics.items() if isinstance(v, torch.Tensor)}
        values = dict(metrics)
        if tensors:
            scalars = [v.detach().double().reshape(()) for v in tensors.values()]
            stacked = torch.stack(scalars)
            values.update(zip(tensors, stacked.tolist(), strict=True))
        bad = [k for k, v in values.items() if not math.isfinite(v)]
        for name in bad:
            if name not in self.undefined:
                cause = finite.likely_cause(self.config)
                raise FloatingPointError(f"{name} is {values[name]}: {cause}")
        return {k: v for k, v in values.items() if k not in bad}

    def log(self, step: int, phase: str, metrics: dict[str, Any]) -> None:
        """One row of metrics.csv; tensors are read here, in one transfer.

        Raises:
            FloatingPointError: as of `read`.
        """
        self.tables.check_columns(metrics)
        values = self.read(metrics)
        self.tables.add_metrics(step, phase, values)
        if self.bar is not None:
            shown = {}
            if self.scores:
                shown[self.scale.name] = f"{self.scores[-1][2]:.1f}"
            for name in self.means.values():
                if name in values:
                    shown[name] = f"{values[name]:.3g}"
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
        """Rows of evaluations.csv, one per episode; returns the mean normalized score.

        Raises:
            FloatingPointError: a return or a score is not finite.
        """
        normalized = self.scale is not tasks.RAW
        found = [("return", returns), ("normalized score", scores)]
        for name, values in found[: 1 + normalized]:
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                raise FloatingPointError(
                    f"the {name} of evaluation episode {bad[0]} is {values[bad[0]]:g}: "
                    f"{finite.likely_cause(self.config)}"
                )
        self.tables.add_evaluation(step, phase, returns, scores)
        self._warn_of_standstill(step, phase, returns)
        mean = float(np.mean(scores))
        self.scores.append([step, phase, mean])
        # Nobody knows the size of an environment's returns.
        form = ".0f" if self.scale is tasks.D4RL else ".4g"
        self.print(
            f"{phase} step {step}: return {np.mean(returns):{form}} ± "
            f"{np.std(returns):{form}}" + f", normalized score {mean:.1f}" * normalized
        )
        return mean

    def _warn_of_standstill(self, step: int, phase: str, returns: np.ndarray) -> None:
        """Say so where updates have left the policy as it was.

        All evaluations start from the same seed. So the same policy gives the same returns to the
        last bit, and another one does not, but for sparse rewards, whose sums are whole numbers.
        """
        before, updates = self.evaluated
        fractions = (np.asarray(returns) % 1 != 0).any()
        if fractions and np.array_equal(before, returns) and self.updates > updates:
            self.print(
                f"warning: {phase} step {step}: the returns equal those of the last evaluation to "
                f"the last bit after {self.updates - updates} updates, so the policy has "
                "stopped learning; look at actor losses and learning rates"
            )
        self.evaluated = returns, self.updates

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

    def clock(self) -> float:
        """Seconds since the run began, pauses between processes left out."""
        return self.wall_seconds + time.perf_counter() - self.started

    def cpu_clock(self) -> float:
        """CPU seconds of this process since the run began, all of its threads together."""
        return self.cpu_seconds + time.process_time() - self.started_cpu

    def save(self, parts: dict[str, Any]) -> None:
        """checkpoint.pt: `state_dict` of every part, the global random streams, the counters.

        Raises:
            FloatingPointError: a weight is not finite; the file stays as it was.
        """
        finite.check_weights(parts, self.config)
        state = {
            "format": checkpoints.FORMAT,
            "algorithm": self.algorithm,
            "step": self.step,
            "device": self.device,
            "rng": checkpoints.rng_state(),
            "config": self._settings(),
            "dataset_sha256": self.dataset.get("sha256"),
            "states": checkpoints.pack(self.state_moments),
            "tables": self.tables.state(),
            "run": {
                **{name: getattr(self, name) for name in CARRIED},
                "scores": [list(s) for s in self.scores],
                "wall_seconds": self.clock(),
                "cpu_seconds": self.cpu_clock(),
            },
            "parts": {
                name: checkpoints.pack(part.state_dict()) for name, part in parts.items()
            },
        }
        checkpoints.save_checkpoint(self.folder / "checkpoint.pt", state)
        self.saved_step = self.step

    def check_dataset(self) -> None:
        """Before a resumed run spends time: `dataset` must be what the run began with.

        Raises:
            ConfigError: its sha256 is another, or an older version read its rows in another way.
        """
        began = self.checkpoint["dataset_sha256"] if self.checkpoint else None
        if self.checkpoint and began != self.dataset.get("sha256"):
            raise ConfigError(
                f"the dataset {self.dataset.get('path')} is not the one this run began with "
                "(its sha256 differs); put that file back, give its new place with "
                "--dataset_path, or start a new run"
            )
        run = self.checkpoint["run"] if self.checkpoint else {"return_rule": ""}
        order = self.dataset.get("order")
        if "return_rule" not in run and order in ("cut", "shuffled"):
            raise ConfigError(
                f"{self.folder} began with an older version, which ignored that the rows of "
                f"{self.dataset.get('path')} are {order}; start a new run"
            )

    def restore(self, parts: dict[str, Any]) -> None:
        """Put the parts and the random streams of the checkpoint back.

        Raises:
            ConfigError: the dataset is not the one that the run began with.
            ValueError: a part is missing or of another kind or size.
        """
        self.check_dataset()
        state, path = self.checkpoint, self.folder / "checkpoint.pt"
        assert state is not None
        saved = state["parts"]
        for name, part in parts.items():
            found = saved.get(name, saved.get(OLD_NAMES.get(name, name)))
            fits.load_part(part, found, path, name)
        before = state.get("device")
        with fits.fitting(path, "rng"):
            kept = checkpoints.set_rng_state(
                state["rng"], self.device, before, self.step
            )
        if not kept or any(getattr(part, "reseeded", False) for part in parts.values()):
            self.print(
                f"resumed on {self.device}, the checkpoint is of another kind of device: its "
                f"random streams begin anew, from seed {self.config.seed} and step "
                f"{self.step}, so numbers differ from those of a run that stayed"
            )
        self.checkpoint = None

    def way_on(self) -> str:
        """What is left of a run that failed, and how it goes on."""
        if self.saved_step is None:
            return "there is no checkpoint yet, so start the run again"
        folder = machine.tidy_path(self.folder)
        return (
            f"the last checkpoint is of step {self.saved_step}, go on with: "
            f"--resume {folder}"
        )

    def interrupted(self) -> None:
        """Say how to go on.

        Raises:
            SystemExit: a signal asked to stop; its status says which, so that no `&&` goes on.
        """
        folder = machine.tidy_path(self.folder)
        self.print(f"saved at step {self.step}; go on with: --resume {folder}")
        if self._signal is not None:
            raise SystemExit(128 + self._signal)

    def finish(self) -> dict[str, Any]:
        """Write curves.png and summary.json, print the result; returns `summary.summary_of`."""
        found = summary.summary_of(self)
        text = json.dumps(found, indent=2, allow_nan=False) + "\n"
        files.write_text(self.folder / "summary.json", text)
        label = self.dataset.get("label", "")
        curves.plot_curves(self.folder, self.config, label, self.panels, self.scale)
        if self.bar is not None:
            self.bar.close()
        self.print(summary.result_of(self, found))
        return found


@contextmanager
def _as_config_errors() -> Iterator[None]:
    """Files that cannot be written at the start of a run are a fault of its settings."""
    try:
        yield
    except OSError as error:
        raise ConfigError(str(error)) from None


def _check_name(name: str) -> None:
    """`name` must be a part of the name of a folder, so that no run leaves `runs_dir`."""
    length = len(name.encode(errors="replace"))
    bad = not name.strip() or name.startswith(".") or not name.isprintable()
    if bad or set(name) & set("/\\") or length > LONGEST_NAME:
        shown = name if len(name) <= 60 else f"{name[:60]}..."
        raise ConfigError(
            f"name {shown!r} cannot be a part of a folder's name: give one to {LONGEST_NAME} "
            "printable characters without / and \\ and without a dot in front; runs_dir says "
            "where runs go"
        )


def _changes(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """The fields of both that differ, as (name, old value, new value); blocks are looked into."""
    for name in sorted(old.keys() & new.keys()):
        before, after = old[name], new[name]
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after
