"""A run and its folder: config, metrics, evaluations, checkpoint, curves, summary.

`runs/NAME/` holds `config.yaml` (complete; the run can be repeated from it), `metrics.csv`,
`evaluations.csv` (one row per evaluation episode: raw return), `checkpoint.pt` (exact resume),
`curves.png` and `summary.json`. `--resume runs/NAME` goes on from the last checkpoint.

Nothing here unpickles code: checkpoints hold tensors, numbers, strings, lists and dicts, and are
read with `torch.load(weights_only=True)`; of CORL's pickled `Scalar` modules only the data is read.

    python -m corl.checkpoints export runs/NAME --to corl

writes a run's weights as CORL's `checkpoint_N.pt`.
"""

import csv
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from corl import checkpoints, curves, files, finite, machine
from corl.config import ConfigError, dump_config
from corl.progress import progress_bar

COMMON_COLUMNS = ("step", "phase", "d4rl_normalized_score")
# Names of parts in checkpoints of before version 0.2.
OLD_NAMES = {"online_buffer": "buffer"}
# What a checkpoint carries along of the run itself.
CARRIED = ("scores", "wall_seconds", "update_seconds", "updates", "switched")


class Run:
    """A run folder with its logs and checkpoint, a progress bar, and whether to stop.

    Args:
        config: needs the fields env, seed, name, runs_dir, resume, wandb_mode, project, group,
            offline_iterations, online_iterations.
        algorithm: name in checkpoints and the summary.
        columns: metrics beyond the common ones; others raise.

    Attributes that an algorithm may fill:
        panels: what curves.png shows below the score, see `curves.plot_curves`.
        means: entry of the summary -> metric whose mean over all logged rows it is. The progress
            bar shows these metrics.
        undefined: metrics that need not have a value; where they are not finite, metrics.csv has
            a blank. Any other metric that is not finite ends the run.

    Use as a context manager: inside, the first SIGINT or SIGTERM sets `stop_requested`, a second
    one interrupts at once. A FloatingPointError that leaves the block says the step and the last
    good checkpoint, too.

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
        self.panels: Sequence[Mapping[str, Any]] = []
        self.means: dict[str, str] = {}
        self.undefined: Collection[str] = ()
        self.left_out: set[str] = set()  # columns that an older run's metrics.csv lacks
        self.dataset: dict[str, Any] = {}  # provenance, set when the data is known
        # Asked at the start, since the files may have changed by the end of a long run.
        self.code = {"versions": machine.versions(), "commit": machine.git_commit()}
        self.stop_requested = False
        self.checkpoint: dict[str, Any] | None = None  # what to resume from
        self.step = 0  # iterations done
        # Phase and number of the running iteration.
        self.current: tuple[str, int] | None = None
        self.saved_step: int | None = None  # of checkpoint.pt
        self.scores: list[list[Any]] = []  # [step, phase, mean normalized score]
        self.wall_seconds = self.update_seconds = 0.0
        self.updates = 0
        # Returns of the last evaluation of this process, and the updates before it.
        self.evaluated: tuple[np.ndarray, int] = (np.empty(0), 0)
        self.switched = False  # has the switch to the online phase been made?
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
            files.write_text(path, text)
        except OSError as error:
            raise ConfigError(f"cannot write {path} ({error.strerror})") from None

    def _resume(self) -> None:
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            raise ConfigError(
                f"{self.folder} has no checkpoint.pt yet; start the run again instead"
            )
        self.checkpoint = checkpoints.load_checkpoint(path, self.algorithm)
        self.step = self.saved_step = self.checkpoint["step"]
        for name in CARRIED:
            if name in self.checkpoint["run"]:
                setattr(self, name, self.checkpoint["run"][name])
        # Rows written after the checkpoint will be written again.
        for name in ("metrics.csv", "evaluations.csv"):
            with open(self.folder / name, newline="") as file:
                rows = list(csv.reader(file))
            whole = [r for r in rows[1:] if len(r) == len(rows[0])]
            kept = [r for r in whole if int(r[0]) <= self.step]
            lines = [",".join(r) for r in [rows[0], *kept]]
            self._write(name, "\n".join(lines) + "\n")
            if name == "metrics.csv":
                self.left_out = set(self.columns) - set(rows[0])
                self.columns = rows[0]
        # Without `resume`, so that the file still describes a run of its own.
        config = dataclasses.replace(self.config, resume=None)
        self._write("config.yaml", dump_config(config))

    # -- stopping -------------------------------------------------------------------------

    def __enter__(self) -> "Run":
        def ask_to_stop(number: int, frame: Any) -> None:
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

    def __exit__(self, *error: object) -> None:
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
        if len(error) > 1 and isinstance(error[1], FloatingPointError):
            raise FloatingPointError(self._diverged(error[1])) from None

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
        """A line that does not tear the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

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
        unknown = set(metrics) - set(self.columns) - self.left_out
        if unknown:
            raise KeyError(f"metrics {sorted(unknown)} are not columns of metrics.csv")
        values = self.read(metrics)
        values = {k: v for k, v in values.items() if k not in self.left_out}
        row = {"step": step, "phase": phase, **values}
        with open(self.folder / "metrics.csv", "a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        if self.bar is not None:
            shown = {"score": f"{self.scores[-1][2]:.1f}"} if self.scores else {}
            for name in self.means.values():
                if name in values:
                    shown[name] = f"{values[name]:.0f}"
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
        for name, values in (("return", returns), ("normalized score", scores)):
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                raise FloatingPointError(
                    f"the {name} of evaluation episode {bad[0]} is {values[bad[0]]:g}: "
                    f"{finite.likely_cause(self.config)}"
                )
        with open(self.folder / "evaluations.csv", "a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for i, (total, score) in enumerate(zip(returns, scores, strict=True)):
                writer.writerow([step, phase, i, repr(float(total)), repr(float(score))])
        self._warn_of_standstill(step, phase, returns)
        mean = float(np.mean(scores))
        self.scores.append([step, phase, mean])
        self.print(
            f"{phase} step {step}: return {np.mean(returns):.0f} ± {np.std(returns):.0f}, "
            f"normalized score {mean:.1f}"
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

    def _clock(self) -> float:
        return self.wall_seconds + time.perf_counter() - self.started

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
            "rng": checkpoints.rng_state(),
            "dataset_sha256": self.dataset.get("sha256"),
            "run": {
                **{name: getattr(self, name) for name in CARRIED},
                "scores": [list(s) for s in self.scores],
                "wall_seconds": self._clock(),
            },
            "parts": {
                name: checkpoints.pack(part.state_dict()) for name, part in parts.items()
            },
        }
        for name in ("metrics.csv", "evaluations.csv"):  # rows that will not come again
            with open(self.folder / name, "ab") as file:
                os.fsync(file.fileno())
        checkpoints.save_checkpoint(self.folder / "checkpoint.pt", state)
        self.saved_step = self.step

    def restore(self, parts: dict[str, Any]) -> None:
        """Put the parts and the random streams of the checkpoint back.

        Raises:
            ConfigError: the dataset is not the one that the run began with.
        """
        state = self.checkpoint
        assert state is not None
        if state["dataset_sha256"] != self.dataset.get("sha256"):
            raise ConfigError(
                f"the dataset {self.dataset.get('path')} is not the one this run began with "
                "(its sha256 differs); put that file back or start a new run"
            )
        saved = state["parts"]
        for name, part in parts.items():
            old_name = OLD_NAMES.get(name, name)
            part.load_state_dict(
                checkpoints.unpack(saved[name] if name in saved else saved[old_name])
            )
        checkpoints.set_rng_state(state["rng"])
        self.checkpoint = None

    def interrupted(self) -> None:
        """Say how to go on."""
        folder = machine.tidy_path(self.folder)
        self.print(f"saved at step {self.step}; go on with: --resume {folder}")

    def finish(self) -> dict[str, Any]:
        """Write curves.png and summary.json and print the result; returns the summary.

        `score_offline`: last evaluation of the offline phase. `score_final`: mean of the last
        four online evaluations. `score_last`, `score_best`: last and best
        online evaluation; in a run without any, the last three are of the offline phase. All
        are means over episodes, D4RL-normalized. Versions and commit are those at the start
        of this process.
        """
        summary = self._summary()
        self._write(
            "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n"
        )
        curves.plot_curves(
            self.folder, self.config, self.dataset.get("label", ""), self.panels
        )
        if self.bar is not None:
            self.bar.close()
        self.print(self._result(summary))
        return summary

    def _summary(self) -> dict[str, Any]:
        offline, online, seen = self._phases()
        data = self.dataset
        return {
            "algorithm": self.algorithm,
            "env": self.config.env,
            "seed": self.config.seed,
            "score_offline": offline[-1] if offline else None,
            "score_final": float(np.mean(seen[-4:])) if seen else None,
            "score_last": seen[-1] if seen else None,
            "score_best": max(seen) if seen else None,
            **self._means(),
            "updates": self.updates,
            "updates_per_second": self.updates / max(self.update_seconds, 1e-9),
            "wall_seconds": self._clock(),
            "dataset": {
                "source": data.get("source"),
                "label": data.get("label"),
                "path": machine.tidy_path(data["path"]) if data.get("path") else None,
                "sha256": data.get("sha256"),
                "rows": data.get("rows"),
            },
            **self.code,
            "machine": machine.describe(),
        }

    def _phases(self) -> tuple[list[float], list[float], list[float]]:
        """Scores of the offline and the online phase, and those that count as final."""
        offline = [s for _, phase, s in self.scores if phase == "offline"]
        online = [s for _, phase, s in self.scores if phase == "online"]
        return offline, online, online or offline

    def _means(self) -> dict[str, float | None]:
        """Means of the metrics in `means`, over the rows of metrics.csv that have them."""
        columns = curves.read_csv(self.folder / "metrics.csv")
        found = {}
        for entry, name in self.means.items():
            values = [float(text) for text in columns.get(name, ()) if text]
            # Older versions wrote nan where there is a blank now.
            values = [value for value in values if math.isfinite(value)]
            found[entry] = sum(values) / len(values) if values else None
        return found

    def _result(self, summary: dict[str, Any]) -> str:
        """What a finished run says."""
        _, online, seen = self._phases()

        def show(score: float | None) -> str:
            return "none" if score is None else f"{score:.1f}"

        kind = "online" if online else "final"  # a run may be offline only
        return (
            f"\noffline score {show(summary['score_offline'])} -> {kind} score "
            f"{show(summary['score_final'])} (D4RL-normalized, mean of the last "
            f"{min(4, len(seen))} evaluations; last {show(summary['score_last'])}, best "
            f"{show(summary['score_best'])})\n"
            f"dataset: {self.dataset.get('label', 'unknown')}\n"
            f"run folder: {machine.tidy_path(self.folder)}\n"
            f"curves: {machine.tidy_path(self.folder / 'curves.png')}"
        )
