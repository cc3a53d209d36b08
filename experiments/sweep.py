"""Run a sweep file: the cells of its plan on Ray, until all are done or have failed.

    python -m experiments.sweep sweeps/smoke.yaml     # a Ray of its own, one worker per core
    python -m experiments.sweep sweeps/hopper.yaml --address HOST:6379 --gpus 0.25
    python -m experiments.sweep sweeps/hopper.yaml --only iql n0   # two of its methods
    python -m experiments.sweep sweeps/hopper.yaml --status   # the table, nothing is started

The store is folders and small files: `runs/SWEEP/CELL/` and, for the shared offline models,
`runs/offline/CELL/`, which every sweep of the same `runs_dir` may use. Running the same command
again goes on: finished cells stay, begun ones resume from their checkpoints, failed ones get
another try.

docs/sweep.md explains the sweep file and the store. The plan is made in `plan`, a cell's files are
in `cells`, its process in `workers`.
"""

import argparse
import csv
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from corl import arguments, machine
from corl.layers import ConfigError
from corl.tasks import RAW
from experiments.cells import Cell, last_lines, read_state, write_cell, write_failed
from experiments.plan import plan
from experiments.workers import Pool, RayPool

# Exit statuses from here on, and negative ones, are deaths and not errors.
DIED = 128


def drive(cells: Sequence[Cell], pool: Pool, table: "Table", retries: int = 3) -> bool:
    """Run what is not done; true if all cells are done at the end.

    Cells start in the order of the sweep file, offline models first, as workers get free; a cell
    waits for its offline model. One whose process died is started again from its
    checkpoint, at most `retries` times; one that ended with an error has failed. Neither stops
    the others.
    """
    driver = _Driver(pool, table, retries)
    for cell in cells:
        if not cell.is_done:
            write_cell(cell)
            driver.waiting.append(cell)
    while driver.waiting or driver.running:
        driver.start_waiting()
        table.show()
        if driver.running:
            driver.take_ended(1.0)
        elif driver.waiting:
            time.sleep(1.0)  # the pool has no room at all
    table.show(last=True)
    for cell in cells:
        if cell.folder in driver.failed:
            log = machine.tidy_path(cell.folder / "log.txt")
            table.event(f"\nFAILED: {cell.label} ({log})")
            for line in driver.failed[cell.folder]:
                table.event(f"    {line}")
    return not driver.failed


class _Driver:
    """The cells of a sweep that wait, run and have failed."""

    def __init__(self, pool: Pool, table: "Table", retries: int):
        self.pool, self.table, self.retries = pool, table, retries
        self.waiting: list[Cell] = []
        self.running: dict[Any, Cell] = {}  # by the pool's handle
        self.deaths: dict[Path, int] = {}
        # Kept here and not read back: another sweep of this store may try a failed cell again.
        self.failed: dict[Path, list[str]] = {}

    def start_waiting(self) -> None:
        """Start the cells that can start; those whose offline model failed fail, too.

        While a cell waits for its model, later ones take free workers but do not wait in line:
        they would run before it.
        """
        line = True
        for cell in list(self.waiting):
            if cell.model and cell.model.folder in self.failed:
                folder = machine.tidy_path(cell.model.folder)
                self.fail(cell, [f"its offline model failed: {folder}"])
            elif cell.model and not cell.model.is_done:
                line = False
                continue
            elif self.pool.room(cell, len(self.running), line):
                self.running[self.pool.start(cell)] = cell
            else:
                continue
            self.waiting.remove(cell)

    def take_ended(self, seconds: float) -> None:
        """Look at the cells that ended within the time: done, to be started again, or failed."""
        for handle, code, note in self.pool.ended(list(self.running), seconds):
            cell = self.running.pop(handle)
            if cell.is_done:
                unit = read_state(cell.folder).get("unit", "score")
                self.table.event(
                    f"done: {cell.label}, {unit} {self.table.progress(cell)}"
                )
                continue
            died = code is None or code <= 0 or code >= DIED
            deaths = self.deaths.get(cell.folder, 0) + died
            self.deaths[cell.folder] = deaths
            if died and deaths <= self.retries:
                how = note or (f"signal {-code}" if code < 0 else f"status {code}")
                self.table.event(
                    f"died ({how}): {cell.label}; trying again from its checkpoint, "
                    f"{deaths} of {self.retries}"
                )
                self.waiting.append(cell)
                continue
            lines = [*last_lines(cell.folder), *([note] if note else [])]
            if died:
                lines.append(f"died {self.retries + 1} times")
            self.fail(cell, lines or [f"exit status {code}"])

    def fail(self, cell: Cell, lines: list[str]) -> None:
        """A cell that is not tried again in this sweep; the lines say why."""
        self.failed[cell.folder] = lines
        write_failed(cell.folder, lines)
        self.table.event(f"FAILED: {cell.label}: {lines[-1]}")


class Table:
    """The progress of a sweep: a row per method and task, a column per seed.

    It is read from the cells' folders.

    On a terminal it is drawn again in place; elsewhere events are printed as they come, and the
    table at the end.
    """

    def __init__(self, cells: Sequence[Cell], stream: TextIO | None = None):
        self.cells, self.stream = cells, stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.drawn, self.next_time = 0, 0.0

    def progress(self, cell: Cell) -> str:
        """`waiting`, `45 %`, `FAILED`, or the score of a finished cell."""
        state = read_state(cell.folder)
        if state.get("state") == "failed":
            return "FAILED"
        if state.get("state") == "done":
            score = state.get("score")
            # Nobody knows the size of an environment's returns.
            form = ".4g" if state.get("unit") == RAW.label else ".1f"
            return "done" if score is None else f"{score:{form}}"
        total = cell.config.offline_iterations + cell.config.online_iterations
        for file in cell.folder.glob("*/metrics.csv"):
            step = max(0, min(_last_step(file), total))
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
            + "".join(_column(f"s{s}") for s in seeds)
        ]
        for (label, task), row in rows.items():
            shown = "".join(_column(row.get(s, "")) for s in seeds)
            out.append(f"{label:{wide}}  {task:{long}}{shown}")
        out.append(
            f"{counts['done']} of {len(self.cells)} done, {counts['begun']} begun, "
            f"{counts['failed']} failed"
        )
        return out

    def show(self, last: bool = False) -> None:
        """Draw the table, on a terminal every two seconds, elsewhere only the last time."""
        if not last and (not self.terminal or time.monotonic() < self.next_time):
            return
        self.next_time = time.monotonic() + 2.0
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
        self.next_time = 0.0

    def _erase(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="", file=self.stream)
            self.drawn = 0


def _column(text: str) -> str:
    return f"  {text:>8}"


def _last_step(file: Path) -> int:
    """The step in the last row of a metrics.csv."""
    try:
        with open(file, newline="") as lines:
            rows = list(csv.reader(lines))
        return int(rows[-1][0])
    except (OSError, ValueError, IndexError, csv.Error):
        return 0  # only the header, or a row that is being written


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 all done, 1 some failed, 2 bad input."""
    parser = arguments.Parser(
        prog="python -m experiments.sweep",
        description="Run a sweep file; run it again to go on. docs/sweep.md explains it.",
    )
    add_places(parser)
    parser.add_argument(
        "--workers",
        type=arguments.number(int, "[1, 1024]"),
        help="cells at a time (default: one per core)",
    )
    parser.add_argument("--address", help="of a running Ray cluster, HOST:PORT or auto")
    parser.add_argument(
        "--gpus",
        type=arguments.number(float, "[0, 1024]"),
        default=0.0,
        help="GPU share per cell",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        metavar="METHOD",
        help="these methods alone, in this order",
    )
    parser.add_argument(
        "--retries",
        type=arguments.number(int, "[0, 1e6]"),
        default=3,
        help="after deaths, per cell",
    )
    parser.add_argument("--status", action="store_true", help="only show the table")
    args = parser.parse_args(argv)
    return exit_status(lambda: _sweep(args), args.runs_dir)


def add_places(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which sweep, and where its store is."""
    parser.add_argument("sweep", type=arguments.path, nargs="?", help="YAML file")
    parser.add_argument(
        "--runs_dir",
        type=arguments.path,
        default="runs",
        help="the store (default: runs)",
    )


def exit_status(work: Callable[[], int], runs_dir: str) -> int:
    """What the work of a command returns; 130 when it was stopped, 2 after an error, in a line."""
    try:
        return work()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    except OSError as error:
        print(
            f"error: {error.filename or runs_dir}: {error.strerror or error}; mend its "
            "rights or what is in its place, or give another --runs_dir",
            file=sys.stderr,
        )
        return 2
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check_named(sweep: str | None) -> str:
    """The sweep file's path. Raises ConfigError where none was given."""
    if sweep is None:
        raise ConfigError("name a sweep file, for example sweeps/smoke.yaml")
    return sweep


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is a KeyboardInterrupt."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _sweep(args: argparse.Namespace) -> int:
    check_named(args.sweep)
    if args.address is not None and args.workers is not None:
        raise ConfigError("--workers is for a Ray of our own, not for --address")
    cells = plan(args.sweep, args.runs_dir, args.gpus > 0, args.only)
    table = Table(cells)
    if args.status or all(c.is_done for c in cells):
        table.show(last=True)
        return 0
    _check_store(Path(args.runs_dir))
    say_mode(cells)
    pool = RayPool(args.address, args.workers, args.gpus)
    with stopped_by_sigterm():
        try:
            pool.check(cells)
            return 0 if drive(cells, pool, table, args.retries) else 1
        finally:
            pool.close()


def say_mode(cells: Sequence[Cell]) -> None:
    """Print what was chosen for cells whose sweep file does not say it."""
    chosen = next((c.chosen for c in cells if c.chosen), None)
    if chosen is not None:
        shown = ", ".join(f"{k}: {str(v).lower()}" for k, v in chosen.items())
        print(f"chosen for every cell: {shown} (state them under settings to repeat it)")


def _check_store(folder: Path) -> None:
    """Raise where the store cannot be written, before Ray starts."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(
            f"--runs_dir {folder}: {place} is no folder that can be written; mend that, or give "
            "another --runs_dir"
        )


if __name__ == "__main__":
    sys.exit(main())
