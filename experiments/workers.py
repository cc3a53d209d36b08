"""What runs the cells of a sweep: a process for each, started by workers of Ray.

    python -m experiments.workers CELL     # one cell's process, as a worker starts it

A worker closes the standard input of its cell's process when it ends, however it ends; the process
then saves and stops.
"""

import json
import math
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypedDict

from corl import checkpoints, files, machine, seeds
from experiments.cells import Cell, CellFile, lock, read_state, write_state
from experiments.programs import ROOT
from experiments.ray_head import Head, set_environment
from experiments.values import read_json

REQUIREMENTS = "requirements-sweep.txt"
# Exit status of a cell that saved and stopped before its end; a shell's for SIGTERM.
STOPPED = 143
# Environment variables of the sweep that its cells get on every machine.
PASSED_ON = (
    *("CORL_DARE_CACHE", "D4RL_DATASET_DIR", "CORL_DARE_TRACEBACK"),
    *("TORCHINDUCTOR_CACHE_DIR", "CXX"),
)

RUN_AGAIN = "run the sweep again, which writes it anew"
REMOVE = "remove it, and the sweep writes it again"
REMOVE_CELL = "remove the offline model's folder and run the sweep again"


class DatasetFacts(TypedDict):
    """What a summary says of its dataset, as far as it is read here."""

    sha256: str


class _Unit(TypedDict, total=False):
    score_unit: str


class Concluded(_Unit):
    """What is read of a finished cell's `summary.json`."""

    dataset: DatasetFacts
    score_offline: float | None
    score_final: float | None


# ---------------------------------------------------------------- one cell, in its own process


def run_cell(folder: Path) -> None:
    """Run a cell to its end, from its checkpoint if it has one; a finished one is left alone.

    Raises:
        SystemExit: the algorithm's own exit status, or `STOPPED` when it saved and stopped.
        ValueError: a damaged file of the cell.
    """
    # Held until this process ends, however it ends: two sweeps, or a restarted one and what
    # its predecessor left running, never write into one cell at the same time.
    with lock(folder):
        if read_state(folder).get("state") == "done":
            return
        (folder / "state.json").unlink(missing_ok=True)
        about = read_json(folder / "cell.json", RUN_AGAIN, form=CellFile)
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
        conclude(folder, about)


def _arguments(folder: Path) -> list[str]:
    for run in sorted(p.parent for p in folder.glob("*/config.yaml")):
        if (run / "checkpoint.pt").is_file():
            return ["--resume", str(run)]
        shutil.rmtree(run)  # it died before its first checkpoint: nothing to go on from
    return ["--config", str(folder / "config.yaml")]


def conclude(folder: Path, about: dict[str, Any]) -> None:
    """Write what others need of a finished cell: the model, its score, the state.

    Args:
        folder: the cell's, with the finished run in `run`.
        about: its `cell.json`.

    Raises:
        SystemExit: "error: ..." where the run's files or its dataset are wrong.
    """
    run = folder / "run"
    summary = read_json(run / "summary.json", REMOVE, form=Concluded, finite=False)
    for name, value in summary.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SystemExit(f"error: {run / 'summary.json'}: {name} is {value}")
    if about["is_model"]:
        try:
            checkpoints.export_corl(run, folder / "model.pt")
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
    if about["offline"]:
        file = Path(about["offline"]) / "run/summary.json"
        offline = read_json(file, REMOVE_CELL, form=Concluded, finite=False)
        here, there = summary["dataset"]["sha256"], offline["dataset"]["sha256"]
        if here != there:
            raise SystemExit(
                f"error: the dataset ({here[:12]}) is not the one that the offline model "
                f"of {about['offline']} was trained on ({there[:12]}); remove the cell "
                "that has the wrong one and run the sweep again"
            )
        summary["score_offline"] = offline["score_offline"]
        summary["offline_run"] = machine.tidy_path(Path(about["offline"]) / "run")
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        files.write_text(run / "summary.json", text)
    score = summary["score_offline" if about["is_model"] else "score_final"]
    unit = {"unit": summary["score_unit"]} if "score_unit" in summary else {}
    write_state(folder, state="done", score=score, **unit)


# ---------------------------------------------------------------- started by a worker


def run_process(
    words: list[str], cwd: str, path: str, variables: dict[str, str], log: str
) -> tuple[int | None, str]:
    """Run a Python process; returns its exit status, and why there is none.

    Ray sends this function to a worker of any machine, so it uses no other package of ours.

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
        try:
            # Ray interrupts a worker between two lines of Python only.
            while process.poll() is None:
                time.sleep(0.1)
        except KeyboardInterrupt:
            # `RayPool.close` asks. Without its input the cell saves and stops.
            assert process.stdin is not None
            process.stdin.close()
        return process.wait(), ""


def run_task(*arguments: Any) -> tuple[int | None, str]:
    """`run_process` in a worker of Ray, which interrupts its tasks by SIGINT."""
    # A sweep that a shell script started in the background ignores it, and so do its workers.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return run_process(*arguments)


def process_arguments(cell: Cell) -> tuple[list[str], str, str, dict[str, str], str]:
    """Arguments of `run_process` for a cell."""
    variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    variables["OMP_NUM_THREADS"] = str(cell.config.threads)
    words = ["-u", "-m", "experiments.workers", str(cell.folder)]
    log = str((cell.folder / "log.txt").absolute())
    return words, str(Path.cwd()), str(ROOT), variables, log


# ---------------------------------------------------------------- workers


class Pool(Protocol):
    """What runs cells: handles of started ones, and which have ended, with what."""

    def room(self, cell: Cell, running: int, line: bool = True) -> bool:
        """Whether another cell can be handed over while so many run; in `line`, to wait for one."""
        ...

    def start(self, cell: Cell) -> Any:
        """Hand a cell over; returns its handle."""
        ...

    def ended(self, handles: Sequence[Any], seconds: float) -> list[tuple]:
        """(handle, exit status or None, note) of those that ended within the time."""
        ...

    def close(self) -> None:
        """End all workers. Their cells save and stop."""
        ...


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
        if address is None:
            set_environment()
        try:
            import ray
        except ImportError:
            raise RuntimeError(
                f"a sweep needs Ray: python -m pip install -r {REQUIREMENTS}"
            ) from None
        self.ray, self.gpus = ray, gpus
        self.running: list[Any] = []
        # Sent as code and not by name: a worker of a cluster need not find this package.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.head: Head | None = None
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if address is None:
                self.head = Head(workers)
            elif address != "auto":
                _check_reachable(address)  # Ray itself would try for many minutes
            ray.init(self.head.address if self.head else address, **options)
        except BaseException as error:
            if self.head is not None:
                self.head.close()
            if not isinstance(error, (OSError, RuntimeError, ValueError)):
                raise
            text = " ".join(str(error).split())
            raise RuntimeError(
                f"no Ray at {address or 'this machine'}: {text}"
            ) from None

    def check(self, cells: Iterable[Cell]) -> None:
        """Raise if no machine can ever run a cell."""
        nodes = self._nodes()
        for cell in cells:
            need = self._need(cell)
            if not any(all(n.get(k, 0) >= v for k, v in need.items()) for n in nodes):
                most = {k: max(n.get(k, 0) for n in nodes) for k in need}
                raise RuntimeError(
                    f"{cell.label} needs {need['CPU']} CPUs and {need['GPU']} GPUs; the "
                    f"largest machine has {most['CPU']:g} and {most['GPU']:g}: set threads "
                    "in the sweep file, --workers or --gpus"
                )

    def _nodes(self) -> list[dict[str, float]]:
        """The resources of each machine."""
        return [n["Resources"] for n in self.ray.nodes() if n["Alive"]]

    def _need(self, cell: Cell) -> dict[str, float]:
        return {"CPU": cell.config.threads, "GPU": self.gpus}

    def room(self, cell: Cell, running: int, line: bool = True) -> bool:
        # Ray runs what it is handed in no particular order, so it gets no more than fits, and
        # one in line: no worker idles, and a cluster that grows on demand sees a demand.
        need = {k: v for k, v in self._need(cell).items() if v}
        fit = sum(min(n.get(k, 0) // v for k, v in need.items()) for n in self._nodes())
        return running < fit + line

    def start(self, cell: Cell) -> Any:
        resources = {"num_cpus": cell.config.threads, "num_gpus": self.gpus}
        # Retries are the sweep's: it knows an error from a death.
        remote = self.ray.remote(max_retries=0, **resources)(run_task)
        words, cwd, path, variables, log = process_arguments(cell)
        if not self.gpus:
            variables["CUDA_VISIBLE_DEVICES"] = ""  # what was not asked for is not taken
        handle = remote.remote(words, cwd, path, variables, log)
        self.running.append(handle)
        return handle

    def ended(self, handles: Sequence[Any], seconds: float) -> list[tuple]:
        ready, _ = self.ray.wait(list(handles), num_returns=1, timeout=seconds)
        outcomes = []
        for handle in ready:
            self.running.remove(handle)
            try:
                outcomes.append((handle, *self.ray.get(handle)))
            except self.ray.exceptions.RayTaskError as error:
                outcomes.append((handle, 1, str(error.cause)))
            except self.ray.exceptions.RayError as error:
                outcomes.append((handle, None, type(error).__name__))
        return outcomes

    def close(self) -> None:
        try:
            self._stop_running()
        finally:
            self.ray.shutdown()
            if self.head is not None:
                self.head.close()

    def _stop_running(self) -> None:
        """Ask the cells that run to save, and wait: Ray kills what a worker of its has started."""
        if not self.running:
            return
        print("\nstopping: the cells that run save first", file=sys.stderr)
        with suppress(self.ray.exceptions.RayError):
            for handle in self.running:
                self.ray.cancel(handle)
            count = len(self.running)
            self.ray.wait(self.running, num_returns=count, timeout=seeds.GRACE + 5.0)


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("write HOST:PORT or auto")
    if int(port) > 65535:
        raise ValueError(f"{port} is no port: ports end at 65535")
    socket.create_connection((host, int(port)), timeout=10).close()


def main(argv: Sequence[str]) -> None:
    """The command line that the top of this file shows; errors are one line."""
    try:
        run_cell(Path(argv[0]))
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    # The end of the worker that started this process closes its standard input.
    seeds.end_with_parent(STOPPED)
    main(sys.argv[1:])
