"""The tables of a run folder, `metrics.csv` and `evaluations.csv`, which grow row by row.

A checkpoint knows what was in them. So a resume finds out whether they are still the run's own, and
drops the rows that came after the checkpoint, because they will be written again.
"""

import csv
import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from corl import files
from corl.layers import ConfigError
from corl.tasks import D4RL, RAW, SCALES, Scale

COMMON_COLUMNS = ("step", "phase", D4RL.column)
TABLES = ("metrics.csv", "evaluations.csv")


class Tables:
    """The tables of one run folder.

    Args:
        columns: metrics beyond the common ones.
        scale: of the scores. Raw returns are no second time in evaluations.csv.

    Attributes:
        columns: of metrics.csv. The table of a run of an older version may lack some.
        rows: written by this process.
    """

    def __init__(self, columns: Sequence[str], scale: Scale = D4RL):
        common = (*COMMON_COLUMNS[:2], scale.column)
        self.columns = list(dict.fromkeys([*common, *columns]))
        self._raw = scale is RAW
        self.rows = 0
        self._known = set(self.columns)
        self._folder = Path()

    def create(self, folder: Path) -> None:
        """Write both with their headers alone.

        Raises:
            OSError: a file cannot be written.
        """
        self._folder = folder
        files.write_text(folder / "metrics.csv", ",".join(self.columns) + "\n")
        header = "step,phase,episode,return" + (not self._raw) * ",score"
        files.write_text(folder / "evaluations.csv", header + "\n")

    def restore(self, folder: Path, known: Mapping[str, Any], step: int) -> None:
        """Make both as they were at a checkpoint.

        Args:
            folder: the run folder.
            known: `state` at the checkpoint; empty before version 0.2.
            step: of the checkpoint.

        Raises:
            ConfigError: a table is not as the run left it.
            OSError: a file cannot be written.
        """
        self._folder = folder
        for name in TABLES:
            text = self._as_of(name, known.get(name), step)
            # Always written anew: where the file is a link, what it leads to stays as it is.
            files.write_text(folder / name, text)
            if name == "metrics.csv":
                self.columns = next(csv.reader(io.StringIO(text)))

    def _as_of(self, name: str, known: Mapping[str, Any] | None, step: int) -> str:
        path = self._folder / name
        try:
            content = path.read_bytes()
            if known is None:
                return _rows_up_to(content, step)
            content = content[: known["bytes"]]
            if hashlib.sha256(content).hexdigest() != known["sha256"]:
                raise ValueError("its checksum differs")
            return content.decode()
        except (OSError, ValueError, csv.Error) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"{path} is not as the run left it at step {step} ({why}): put the file "
                f"back, or start a new run from its weights with --load_model {self._folder}"
            ) from None

    def check_columns(self, metrics: Mapping[str, Any]) -> None:
        """Raise KeyError for metrics that are no columns of metrics.csv."""
        unknown = set(metrics) - self._known - set(self.columns)
        if unknown:
            raise KeyError(f"metrics {sorted(unknown)} are not columns of metrics.csv")

    def add_metrics(self, step: int, phase: str, values: Mapping[str, float]) -> None:
        """One row of metrics.csv; values that are missing stay blank."""
        self.rows += 1
        line = io.StringIO()
        # The table of a run of an older version has no column for a newer metric.
        options: Any = {"extrasaction": "ignore", "lineterminator": "\n"}
        writer = csv.DictWriter(line, self.columns, **options)
        writer.writerow({"step": step, "phase": phase, **values})
        files.append(self._folder / "metrics.csv", line.getvalue())

    def add_evaluation(
        self, step: int, phase: str, returns: np.ndarray, scores: np.ndarray
    ) -> None:
        """Rows of evaluations.csv, one per episode, of returns and scores (N,)."""
        lines = io.StringIO()
        writer = csv.writer(lines, lineterminator="\n")
        for i, (total, score) in enumerate(zip(returns, scores, strict=True)):
            values = [total] if self._raw else [total, score]
            writer.writerow([step, phase, i, *(repr(float(v)) for v in values)])
        files.append(self._folder / "evaluations.csv", lines.getvalue())

    def state(self) -> dict[str, dict[str, Any]]:
        """Name -> size and checksum of each table, which is on the disk then.

        The rows of before a checkpoint will not come again.
        """
        found = {}
        for name in TABLES:
            files.sync(self._folder / name)
            content = (self._folder / name).read_bytes()
            checksum = hashlib.sha256(content).hexdigest()
            found[name] = {"bytes": len(content), "sha256": checksum}
        return found


def scale_of(columns: Collection[str]) -> Scale:
    """The scale of a run's scores, by the columns of its metrics.csv."""
    return next((scale for scale in SCALES if scale.column in columns), D4RL)


def scores_in(evaluations: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """The column of evaluations.csv that counts: scores, or raw returns where there are none."""
    return evaluations["score" if "score" in evaluations else RAW.name]


def _rows_up_to(content: bytes, step: int) -> str:
    """The header of a table and its whole rows up to a step.

    Raises:
        ValueError, csv.Error: it is no table of a run.
    """
    rows = list(csv.reader(io.StringIO(content.decode())))
    if not rows or rows[0][:2] != ["step", "phase"]:
        raise ValueError("its first line does not begin with step,phase")
    whole = [row for row in rows[1:] if len(row) == len(rows[0])]
    kept = [rows[0], *(row for row in whole if int(row[0]) <= step)]
    return "".join(",".join(row) + "\n" for row in kept)
