"""The cells of a sweep on one GPU, without Ray: all seeds of a method share one process.

    python -m experiments.stacked sweeps/release_cpu.yaml --tasks hopper-medium-v2 --at_once 3

The plan, the cells and the shared offline models are those of `experiments.sweep`, and both work
on one store. A *group* is the cells that differ in nothing but their seed. Its process trains them
stacked (docs/speed.md), and then each run moves into its cell. Where a process was stopped, each
cell has the last checkpoint of its seed, and `experiments.sweep` goes on with it.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import filelock

from corl import arguments, files, machine, seeds, tasks
from corl.layers import ConfigError, dump_config, read_yaml
from experiments.cells import (
    Cell,
    last_lines,
    lock,
    read_state,
    write_cell,
    write_state,
)
from experiments.plan import plan
from experiments.programs import ROOT
from experiments.sweep import (
    add_places,
    check_named,
    exit_status,
    say_mode,
    stopped_by_sigterm,
)
from experiments.values import flatten, read_json
from experiments.workers import RUN_AGAIN, CellFile, conclude

# Folder of the groups in the store.
STACKED = "stacked"
# Seconds in which a stopped process must have saved.
PATIENCE = 120.0


class Handle(Protocol):
    """A process, as of `subprocess.Popen`."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


@dataclass
class Group:
    """Cells that differ in nothing but their seed, and the folder where they run together."""

    folder: Path
    cells: list[Cell]

    @property
    def label(self) -> str:
        """What it is called on the screen."""
        first = self.cells[0]
        numbers = ", ".join(str(cell.seed) for cell in self.cells)
        return f"{first.method} {first.task} seeds {numbers}"


def groups_of(cells: Sequence[Cell], runs_dir: Path) -> list[Group]:
    """The groups of cells, in the order of their first ones.

    Raises:
        ConfigError: settings whose seeds cannot be stacked.
    """
    found: dict[str, Group] = {}
    for cell in cells:
        values = flatten(dataclasses.asdict(cell.config))
        for own in ("seed", "load_model", "runs_dir"):
            values.pop(own, None)
        sweep = cell.folder.parent.name
        text = json.dumps([sweep, cell.algorithm, cell.method, values], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:8]
        stem = cell.config.name if cell.is_model else f"{sweep}-{cell.config.name}"
        name = f"{stem}-{tasks.file_name(cell.task)}-{key}"
        group = found.setdefault(key, Group(runs_dir / STACKED / name, []))
        group.cells.append(cell)
    for group in found.values():
        config = group.cells[0].config
        why = "its settings have no `seeds`"
        if hasattr(config, "seeds"):
            why = config.not_stacked()
        if why:
            raise ConfigError(
                f"the seeds of {group.cells[0].method} cannot be stacked: {why}; run it with "
                "experiments.sweep, and name the other methods with --only"
            )
    return list(found.values())


def prepare(group: Group, device: str) -> list[str]:
    """Make the folders of a group and its cells; returns the command line of its run.

    That is the algorithm's file and its arguments.
    """
    models = group.folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    for cell in group.cells:
        write_cell(cell)
        if cell.model is not None:
            shutil.copyfile(cell.model.folder / "model.pt", models / f"{cell.seed}.pt")
    first = group.cells[0]
    config = dataclasses.replace(
        first.config,
        device=first.config.device if device == "auto" else device,
        runs_dir=str(group.folder),
        load_model=str(models / "{seed}.pt") if first.model else "",
    )
    file = group.folder / "config.yaml"
    files.write_text(file, dump_config(config))
    numbers = ",".join(str(cell.seed) for cell in group.cells)
    words = [first.algorithm, "--config", str(file)]
    return [*words, "--seeds", numbers, "--seeds_as", "stacked"]


def start(group: Group, device: str) -> subprocess.Popen:
    """Start the process of a group."""
    words = ["-u", "-m", seeds.__name__, *prepare(group, device)]
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    with open(group.folder / "log.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, *words],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                "OMP_NUM_THREADS": "1",
            },
            # Closed by our end, which the process watches for.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for this process, which hands it on.
            start_new_session=True,
        )


def collect(group: Group) -> list[str]:
    """Move the runs in a group's folder into their cells, and conclude those that have ended.

    Returns:
        For each run that cannot be concluded what is wrong; its cell has failed.
    """
    errors = []
    cells = {cell.seed: cell for cell in group.cells}
    for file in sorted(group.folder.glob("*/config.yaml")):
        run, cell = file.parent, cells.get(read_yaml(file)["seed"])
        if cell is None or any(cell.folder.glob("*/checkpoint.pt")):
            continue
        if not (run / "checkpoint.pt").is_file():
            # It died before its first checkpoint: nothing to go on from.
            shutil.rmtree(run)
            continue
        ended = (run / "summary.json").is_file()
        os.replace(run, cell.folder / ("run" if ended else run.name))
        if ended:
            errors += _conclude(cell)
    return errors


def _conclude(cell: Cell) -> list[str]:
    """What is wrong with a run that has ended, if anything: as of `experiments.sweep`."""
    about = read_json(cell.folder / "cell.json", RUN_AGAIN, form=CellFile)
    try:
        conclude(cell.folder, about)
    except SystemExit as error:
        write_state(cell.folder, state="failed", error=[str(error)])
        return [str(error)]
    return []


class Driver:
    """Runs groups, so many at a time.

    Args:
        groups: in their order.
        at_once: groups at a time.
        begin: starts one.
    """

    def __init__(
        self, groups: Sequence[Group], at_once: int, begin: Callable[[Group], Handle]
    ):
        self.waiting, self.at_once, self.begin = list(groups), at_once, begin
        self.running: list[tuple[Group, Handle, float]] = []
        self.failed: list[str] = []

    def run(self) -> bool:
        """Run them all; true if all their cells are done. None is left running.

        Raises:
            KeyboardInterrupt: as it came; all have been asked to save, and did.
        """
        try:
            while self.waiting or self.running:
                self._start_waiting()
                for entry in list(self.running):
                    self._take(*entry)
                time.sleep(0.2)
        finally:
            for _, handle, _ in self.running:
                handle.terminate()
            for group, handle, _ in self.running:
                try:
                    handle.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    handle.kill()
                    handle.wait()
                collect(group)
        for line in self.failed:
            print(f"FAILED: {line}")
        return not self.failed

    def _start_waiting(self) -> None:
        for group in list(self.waiting):
            models = [cell.model for cell in group.cells if cell.model is not None]
            open_ones = [model for model in models if not model.is_done]
            if any(self._comes(model) for model in open_ones):
                continue
            if open_ones:
                self.waiting.remove(group)
                self._fail(group, f"{open_ones[0].label} is not done")
            elif len(self.running) < self.at_once:
                self.waiting.remove(group)
                print(f"started: {group.label}", flush=True)
                self.running.append((group, self.begin(group), time.monotonic()))

    def _comes(self, model: Cell) -> bool:
        """Is an offline model trained now, or will it be?"""
        groups = [*self.waiting, *(group for group, *_ in self.running)]
        return any(model.folder == c.folder for group in groups for c in group.cells)

    def _take(self, group: Group, handle: Handle, since: float) -> None:
        """Look whether a group has ended."""
        status = handle.poll()
        if status is None:
            return
        self.running.remove((group, handle, since))
        errors = collect(group)
        open_ones = [cell for cell in group.cells if not cell.is_done]
        if open_ones:
            lines = errors or last_lines(group.folder) or [f"exit status {status}"]
            for cell in open_ones:
                write_state(cell.folder, state="failed", error=lines)
            log = machine.tidy_path(group.folder / "log.txt")
            self._fail(group, f"{lines[-1]} ({log})")
            return
        shutil.rmtree(group.folder / "models", ignore_errors=True)
        seconds = time.monotonic() - since
        scores = [read_state(cell.folder)["score"] for cell in group.cells]
        shown = ", ".join(f"{score:.1f}" for score in scores)
        print(f"done: {group.label}, {shown} ({seconds:.0f} s)", flush=True)

    def _fail(self, group: Group, why: str) -> None:
        self.failed.append(f"{group.label}: {why}")


def unbegun(group: Group) -> Group:
    """The group of those of its cells that have no run yet, after what was left in its folder."""
    collect(group)
    cells = []
    for cell in (c for c in group.cells if not c.is_done):
        if any(cell.folder.glob("*/checkpoint.pt")):
            print(f"{cell.label} was begun; experiments.sweep goes on with it")
        else:
            cells.append(cell)
    return Group(group.folder, cells)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 all done, 1 some failed, 2 bad input."""
    parser = arguments.Parser(
        prog="python -m experiments.stacked",
        description="Run a sweep file on one GPU, the seeds of a method in one process.",
    )
    add_places(parser)
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="METHOD", help="these methods alone"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="these tasks alone")
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="SEED", help="these seeds alone"
    )
    parser.add_argument(
        "--at_once",
        type=arguments.number(int, "[1, 1024]"),
        default=1,
        help="groups at a time (default: 1)",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    args = parser.parse_args(argv)
    return exit_status(lambda: _run(args), args.runs_dir)


def _run(args: argparse.Namespace) -> int:
    runs_dir = Path(args.runs_dir)
    cells = plan(check_named(args.sweep), runs_dir, gpu=True, only=args.only)
    cells = _chosen(cells, {"task": args.tasks, "seed": args.seeds})
    groups = groups_of([cell for cell in cells if not cell.is_done], runs_dir)
    say_mode(cells)
    with stopped_by_sigterm(), contextlib.ExitStack() as held:
        for cell in (cell for group in groups for cell in group.cells):
            write_cell(cell)
            _hold(cell, held)
        ready = [group for group in map(unbegun, groups) if group.cells]
        done = Driver(ready, args.at_once, lambda g: start(g, args.device)).run()
    return 0 if done else 1


def _hold(cell: Cell, held: contextlib.ExitStack) -> None:
    """Keep others from a cell. Raises ConfigError where somebody is at work on it."""
    try:
        held.enter_context(lock(cell.folder, timeout=0))
    except filelock.Timeout:
        raise ConfigError(
            f"another process runs {cell.label}; wait for it, or leave the cell out with --only, "
            "--tasks or --seeds"
        ) from None


def _chosen(cells: Sequence[Cell], wanted: Mapping[str, Any]) -> list[Cell]:
    """The cells of these tasks and seeds.

    Raises:
        ConfigError: a task or seed that no cell has.
    """
    chosen = list(cells)
    for name, values in wanted.items():
        known = {getattr(cell, name) for cell in chosen}
        for value in values or ():
            if value not in known:
                shown = ", ".join(map(str, sorted(known)))
                raise ConfigError(
                    f"--{name}s: the sweep has no {name} {value}; it has {shown}"
                )
        if values:
            chosen = [cell for cell in chosen if getattr(cell, name) in values]
    return chosen


if __name__ == "__main__":
    sys.exit(main())
