"""Run folders as they grow: their tables are read from where the last look ended.

A row that is half written is left for the next look. What a resume has written anew is read again
from its beginning. Curves are kept in bins, so that a long run needs no more memory than a short
one.
"""

import csv
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corl.layers import read_yaml
from corl.run_tables import TABLES, scale_of
from corl.tasks import D4RL, RAW
from experiments.cells import last_lines, read_state

METRICS, EVALUATIONS = TABLES
# Points of a curve, at most.
MOST = 800
# Bytes before the place of the last look by which a file is known again.
KEPT = 200
# The score of the evaluations, which is not a column of metrics.csv.
SCORE = "evaluation"


class GrowingTable:
    """A table of a run folder, read row by row as it grows.

    Args:
        path: the file; it need not exist yet.
        begin: is given the header, a list of names, when the file is read from its beginning.
        add: is given each whole row after it, as long as the header.

    Attributes:
        trouble: what is wrong with the file, or "".
    """

    def __init__(
        self,
        path: Path,
        begin: Callable[[list[str]], None],
        add: Callable[[list[str]], None],
    ):
        self.path, self.trouble = path, ""
        self._begin, self._add = begin, add
        self._header: list[str] | None = None
        self._place, self._last = 0, b""
        self._stamp: tuple[int, int] | None = None

    def look(self) -> bool:
        """Read what was added since the last look; was there anything?"""
        try:
            found = os.stat(self.path)
            stamp = found.st_size, found.st_mtime_ns
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            rows = 0
            for line in self._new_lines():
                self._take(line)
                rows += 1
        except OSError as error:
            # When it can be read again, that is from its beginning.
            self._stamp, self._last = None, b""
            return self._say(f"{self.path.name} cannot be read ({error.strerror})")
        return rows > 0

    def _new_lines(self) -> Iterator[str]:
        """The whole lines behind the place of the last look; all where the file is another."""
        with open(self.path, "rb") as file:
            file.seek(max(self._place - len(self._last), 0))
            if not self._last or file.read(len(self._last)) != self._last:
                file.seek(0)
                self._place, self._last = 0, b""
                self._header, self.trouble = None, ""
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._place += len(line)
                self._last = (self._last + line)[-KEPT:]
                yield line.decode(errors="replace")

    def _take(self, line: str) -> None:
        name = self.path.name
        try:
            cells = next(csv.reader([line]), [])
            if self._header is None:
                self._header = cells
                if cells[:2] != ["step", "phase"]:
                    self._say(f"{name} is no table of a run")
                else:
                    self._begin(cells)
            elif self._header[:2] == ["step", "phase"]:
                if len(cells) != len(self._header):
                    raise ValueError
                self._add(cells)
        except (ValueError, csv.Error):
            self._say(f"{name} has a damaged row")

    def _say(self, trouble: str) -> bool:
        """Note what is wrong; is it something new?"""
        new, self.trouble = trouble != self.trouble, trouble
        return new


class Bins:
    """Rows of numbers that keep coming, as means over at most `MOST` equal bins.

    Attributes:
        steps: of the last row of each bin.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._sums: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._size, self._rows = 1, 0

    def add(self, step: int, values: np.ndarray) -> None:
        """A row (C,); what is not finite has no value."""
        known = np.isfinite(values)
        values = np.where(known, values, 0.0)
        if self._rows % self._size == 0:
            self.steps.append(step)
            self._sums.append(values)
            self._counts.append(known.astype(int))
        else:
            self.steps[-1] = step
            self._sums[-1] += values
            self._counts[-1] += known
        self._rows += 1
        if len(self.steps) == MOST and self._rows % self._size == 0:
            self.steps = self.steps[1::2]
            self._sums = _pairs(self._sums)
            self._counts = _pairs(self._counts)
            self._size *= 2

    def curve(self, column: int) -> list[list[float]]:
        """The points [step, mean] of the bins in which a column has a value."""
        found = zip(self.steps, self._sums, self._counts, strict=True)
        return [[s, v[column] / n[column]] for s, v, n in found if n[column]]

    def known(self) -> np.ndarray:
        """Whether a column has any value, (C,)."""
        return np.any(self._counts, axis=0) if self._counts else np.zeros(0, bool)


def _pairs(values: list[np.ndarray]) -> list[np.ndarray]:
    return [a + b for a, b in zip(values[::2], values[1::2], strict=True)]


class GrowingRun:
    """A run folder as far as it is written: what it is, how far it is, its curves.

    Attributes:
        folder: has a metrics.csv.
        changed: when something was new, see `Runs.answer`.
    """

    def __init__(self, folder: Path):
        self.folder, self.changed = folder, 0
        self._tables = (
            GrowingTable(folder / METRICS, self._begin_metrics, self._add_metrics),
            GrowingTable(folder / EVALUATIONS, self._begin_scores, self._add_score),
        )
        self._begin_metrics([])
        self._begin_scores([])
        self._about: dict[str, Any] = {}
        self._config: tuple[Any, dict[str, Any], str] = (None, {}, "")

    # -- reading --------------------------------------------------------------------------

    def look(self) -> bool:
        """Read what is new; was there anything?"""
        new = [table.look() for table in self._tables]
        about = self._read_about()
        changed = any(new) or about != self._about
        self._about = about
        return changed

    def _begin_metrics(self, header: list[str]) -> None:
        self._columns = header[2:]
        self._bins, self._step, self._phase = Bins(), 0, ""

    def _add_metrics(self, cells: list[str]) -> None:
        values = np.array([float(cell or "nan") for cell in cells[2:]])
        self._step, self._phase = int(cells[0]), cells[1]
        self._bins.add(self._step, values)

    def _begin_scores(self, header: list[str]) -> None:
        counted = "score" if "score" in header else RAW.name
        self._score_at = header.index(counted) if header else 0
        self._scores: dict[tuple[int, str], list[float]] = {}

    def _add_score(self, cells: list[str]) -> None:
        score = float(cells[self._score_at])
        sums = self._scores.setdefault((int(cells[0]), cells[1]), [0.0, 0])
        sums[0] += score
        sums[1] += 1

    def _read_about(self) -> dict[str, Any]:
        config, trouble = self._read_config()
        state, said = self._state()
        troubles = [trouble, *(table.trouble for table in self._tables), said]
        return {
            "method": str(config.get("name", "")),
            "task": str(config.get("env", "")),
            "seed": str(config.get("seed", "")),
            "switch": _count(config.get("offline_iterations")),
            "total": _count(config.get("offline_iterations"))
            + _count(config.get("online_iterations")),
            "state": state,
            "trouble": "; ".join(t for t in troubles if t),
        }

    def _read_config(self) -> tuple[dict[str, Any], str]:
        """The run's config, read when it has changed, and what is wrong with it."""
        path = self.folder / "config.yaml"
        stamp, before = _written(path), self._config
        if stamp != before[0] or not stamp:
            try:
                self._config = stamp, read_yaml(path), ""
            except (OSError, ValueError):
                self._config = stamp, {}, "config.yaml cannot be read"
        return self._config[1:]

    def _state(self) -> tuple[str, str]:
        """`running`, `finished`, `failed` or `stopped`, and for a failed cell the last line."""
        try:
            # The process at work names itself there, and empties it at its end.
            if (self.folder / "run.lock").stat().st_size:
                return "running", ""
        except OSError:
            pass
        cell = self.folder.parent
        try:
            if read_state(cell).get("state") == "failed":
                return "failed", " ".join(last_lines(cell, 1))
        except ValueError:
            pass
        finished = (self.folder / "summary.json").is_file()
        return "finished" if finished else "stopped", ""

    # -- telling --------------------------------------------------------------------------

    def metrics(self) -> list[str]:
        """The columns of metrics.csv that have a value."""
        known = self._bins.known()
        return [name for name, has in zip(self._columns, known, strict=False) if has]

    def curve(self, metric: str) -> list[list[float]]:
        """The points [step, value] of a metric, or of the score of the evaluations."""
        points: list[list[float]] = []
        if metric == SCORE:
            points = [[step, score] for step, score in self._means()]
        elif metric in self._columns:
            points = self._bins.curve(self._columns.index(metric))
        return [point for point in points if math.isfinite(point[1])]

    def tell(self, metric: str) -> dict[str, Any]:
        """Everything that the page shows of the run."""
        scores = [score for _, score in self.curve(SCORE)]
        scale = scale_of(self._columns) if self._columns else D4RL
        return {
            **self._about,
            "step": self._step,
            "phase": self._phase,
            "unit": scale.label,
            "last": scores[-1] if scores else None,
            "best": max(scores, default=None),
            "written": max(_written(self.folder / name) for name in TABLES) / 1e9,
            "curve": self.curve(metric),
        }

    def _means(self) -> list[tuple[int, float]]:
        """Step and mean over episodes of each evaluation, in the order of the file."""
        found = self._scores.items()
        return [(step, total / count) for (step, _), (total, count) in found]


class Runs:
    """All run folders below a folder, as they come and grow."""

    def __init__(self, root: Path):
        self.root = root
        self._runs: dict[str, GrowingRun] = {}
        self._clock = 0

    def answer(self, metric: str, since: int) -> dict[str, Any]:
        """What is new.

        Args:
            metric: whose curves are told.
            since: `clock` of the answer before; 0: everything is new.

        Returns:
            `clock`; `now`, the time in seconds; `names`, all runs in their order; `metrics`, all
            that there are; `runs`, name -> what has changed, see `GrowingRun.tell`.
        """
        # From the time of day, so that a page outlives a restart of the server.
        self._clock = max(self._clock + 1, int(time.time() * 1000))
        found = {self._name(folder): folder for folder in run_folders(self.root)}
        for name in self._runs.keys() - found.keys():
            del self._runs[name]
        for name, folder in found.items():
            if name not in self._runs:
                self._runs[name] = GrowingRun(folder)
            if self._runs[name].look():
                self._runs[name].changed = self._clock
        names = sorted(found)
        runs = {name: self._runs[name] for name in names}
        metrics = dict.fromkeys(m for run in runs.values() for m in run.metrics())
        return {
            "clock": self._clock,
            "now": time.time(),
            "names": names,
            "metrics": [SCORE, *metrics],
            "runs": {n: r.tell(metric) for n, r in runs.items() if r.changed > since},
        }

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self.root).as_posix()


def run_folders(root: Path) -> Iterator[Path]:
    """The folders below a folder, or that folder itself, that hold a metrics.csv."""
    for path, folders, names in os.walk(root):
        if METRICS in names:
            folders.clear()
            yield Path(path)
        folders[:] = [name for name in folders if not name.startswith(".")]


def _written(path: Path) -> int:
    """When a file was last written, in nanoseconds; 0 without one."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
