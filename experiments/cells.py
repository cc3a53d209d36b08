"""A cell of a sweep, which is one run, and the small files of its folder.

`cell.json` says what the cell is, `config.yaml` has all its settings, `log.txt` what it printed,
`state.json` whether it is done or has failed; `run/` is the run folder. Each file is written
atomically. `cell.lock` is held by the process that runs the cell.
"""

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import filelock

from corl import files, locks, machine
from corl.layers import ConfigError, dump_config, read_yaml
from experiments.values import flatten, plain, read_json

# Folder of the offline models, beside the folders of the sweeps.
OFFLINE = "offline"
REMOVE_STATE = "remove it, and the sweep looks at the cell again"


class CellState(TypedDict, total=False):
    """`state.json`: how a cell ended, with its score or the last lines of its log.

    unit: what the score is told in, where that is not D4RL's normalized score.
    """

    state: Literal["done", "failed"]
    score: float | None
    unit: str
    error: list[str]


class CellFile(TypedDict):
    """`cell.json`: what a cell is. offline: folder of the offline cell."""

    method: str
    task: str
    seed: int
    algorithm: str
    overrides: dict[str, Any]
    offline: str | None
    is_model: bool


@dataclass
class Cell:
    """One run: its folder, what it stands for, and its whole config.

    Attributes:
        method: the method's name with its overrides, `dare-iql,dare.cap=32`.
        algorithm: path of the algorithm file.
        overrides: the values of the method's grid.
        model: the offline cell that it starts from.
        chosen: the values that took the place of `auto`.
    """

    folder: Path
    method: str
    task: str
    seed: int
    algorithm: str
    config: Any
    overrides: dict[str, Any]
    model: "Cell | None" = None
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What it is called on the screen."""
        return f"{self.method} {self.task} seed {self.seed}"

    @property
    def is_model(self) -> bool:
        """Is it an offline cell, whose model others start from?"""
        return self.folder.parent.name == OFFLINE

    @property
    def is_done(self) -> bool:
        """Has it ended well?"""
        return read_state(self.folder).get("state") == "done"


def lock(folder: Path, timeout: float = -1) -> filelock.BaseFileLock:
    """The lock of a cell's folder; without a timeout it is waited for."""
    return locks.file_lock(folder / "cell.lock", timeout)


def write_cell(cell: Cell) -> None:
    """Make a cell's folder: `cell.json` and `config.yaml`."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    about = {
        "method": cell.method,
        "task": cell.task,
        "seed": cell.seed,
        "algorithm": cell.algorithm,
        "chosen": cell.chosen,
        "overrides": plain(cell.overrides),
        "offline": str(cell.model.folder) if cell.model else None,
        "is_model": cell.is_model,
    }
    files.write_text(cell.folder / "config.yaml", dump_config(cell.config))
    _write_json(cell.folder / "cell.json", about)


def check_begun(cell: Cell) -> None:
    """A cell that was begun must be what the sweep file asks for now.

    Raises:
        ConfigError: another offline model, or another default of a setting. Both change the
            results, and neither is part of the folder's name.
    """
    if not any(cell.folder.glob("*/config.yaml")):
        return
    try:
        begun = flatten(read_yaml(cell.folder / "config.yaml"))
    except ValueError as error:
        raise ConfigError(
            f"{error}; put the file back, or remove {machine.tidy_path(cell.folder)}"
        ) from None
    model = Path(str(begun.get("load_model"))).parent.name
    if cell.model and model != cell.model.folder.name:
        raise ConfigError(
            f"{machine.tidy_path(cell.folder)} was begun from the offline model {model}, now the "
            f"sweep file asks for {cell.model.folder.name}: put its offline settings back, "
            "give the sweep another name, or remove that folder"
        )
    now = flatten(dataclasses.asdict(cell.config))
    may_differ = type(cell.config).BOOKKEEPING | (
        {"load_model"} if cell.model else set()
    )
    for name in sorted(begun.keys() & now.keys()):
        if name.split(".")[0] not in may_differ and begun[name] != now[name]:
            raise ConfigError(
                f"{machine.tidy_path(cell.folder)} was begun with {name} {begun[name]}, now it "
                f"is {now[name]}: give {name} in the sweep file, or remove that folder"
            )


def read_state(folder: Path) -> dict[str, Any]:
    """`{"state": "done" | "failed", ...}`, or {} when neither.

    A cell that ended with a score that is no number has failed; older versions called it done.

    Raises:
        ValueError: the file is damaged.
    """
    # Older versions wrote a score that is no number as NaN.
    state = read_json(
        folder / "state.json", REMOVE_STATE, missing={}, form=CellState, finite=False
    )
    score = state.get("score")
    if isinstance(score, float) and not math.isfinite(score):
        return {"state": "failed", "error": [f"its score is {score}"]}
    return state


def write_state(folder: Path, **state: Any) -> None:
    """Say in `state.json` how the cell ended."""
    _write_json(folder / "state.json", state)


def write_failed(folder: Path, lines: list[str]) -> None:
    """Say that the cell failed, unless another sweep is at work on it or has finished it."""
    try:
        with lock(folder, timeout=0):
            if read_state(folder).get("state") != "done":
                write_state(folder, state="failed", error=lines)
    except filelock.Timeout:
        pass


def last_lines(folder: Path, count: int = 5) -> list[str]:
    """The last lines of a cell's log that say something, without progress bars."""
    try:
        with open(folder / "log.txt", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    bar = re.compile(r".*\|\s*\d+/\d+ \[[^]]*\]")
    lines = [bar.sub("", line.split("\r")[-1]).strip() for line in text.split("\n")]
    return [line for line in lines if line][-count:]


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, allow_nan=False)
    files.write_text(path, text + "\n")
