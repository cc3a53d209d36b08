"""Self-collected stand-in data in D4RL's HDF5 schema, where D4RL itself is out of reach.

Shipped SAC policies (`weights/`, trained by `train_sac.py`) are rolled out in the task's
environment the way D4RL's locomotion sets were made: actions are sampled, their exact
log-density is stored, an episode that reaches the time limit ends by `timeouts` even if
the robot fell in that very step, and the file is cut at its last row. Replay data comes
from a series of snapshots of one training, in training order. The rows of antmaze come from
`maze_walks.py`.

    python -m corl.standin.collect hopper-medium-v2 --rows 200000 --out hopper.hdf5
    python -m corl.standin.collect hopper-medium-v2 --mix expert --share 0.3
    python -m corl.standin.collect my_package:MyEnv-v0 --policy runs/NAME

The second command writes a labelled mixture of two policies with the exact density of both in every
row. The same command gives the same bytes on the same machine and package versions, whatever the
number of processes; an interrupted one goes on when it is repeated. Scores on this data are not
comparable with published ones, because the policies are others. The last command collects in any
environment, see `own_policy.py`.
"""

import argparse
import contextlib
import glob
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import mujoco
import numpy as np
import torch

from corl import arguments, envs, files, locks, own_envs, tasks
from corl.data import schema
from corl.progress import progress_bar
from corl.standin import maze_walks, own_policy, policies, rollout

# Version of the files' format. It is an attribute of every file and part of the chunks' names, so
# it is not the package's version: a new release must not change the files.
FORMAT_VERSION = "0.1.0"
INTERRUPTED = "interrupted; finished chunks are kept, repeat the command to go on"


def versions() -> dict[str, str]:
    """Versions of the format and the packages that decide a file's bytes, by attribute."""
    return {
        "corl_dare_version": FORMAT_VERSION,
        "gymnasium_version": gymnasium.__version__,
        "mujoco_version": mujoco.__version__,
        "numpy_version": np.__version__,
        "torch_version": str(torch.__version__),
    }


def chunk_folder(out: Path, plan: rollout.Plan) -> Path:
    """Where the finished chunks of a file are kept.

    The name holds all that the rows depend on, so that old chunks never get into a new file.
    """
    facts = json.dumps(
        [plan.settings, versions(), rollout.CHUNK, rollout.ENVS], sort_keys=True
    )
    digest = hashlib.sha256(facts.encode()).hexdigest()
    return out.with_name(f"{out.name}.{digest[:8]}.chunks")


def _chunk_file(folder: Path, chunk: rollout.Chunk) -> Path:
    return folder / f"{chunk.part:03d}-{chunk.number:03d}.npy"


def _write_chunk(path: Path, table: np.ndarray) -> None:
    """Write the rows of a chunk, and after them the SHA-256 of what is before it."""
    image = io.BytesIO()
    np.save(image, table, allow_pickle=False)
    data = image.getvalue()
    with files.replacing(path) as file:
        file.write(data + hashlib.sha256(data).digest())


def _read_chunk(path: Path, chunk: rollout.Chunk, row_type: np.dtype) -> np.ndarray:
    """The rows of a chunk; ValueError where the file is damaged or of something else."""
    content = path.read_bytes()
    size = hashlib.sha256().digest_size
    data, digest = content[:-size], content[-size:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError("its checksum differs")
    try:
        table = np.load(io.BytesIO(data), allow_pickle=False)
    # A checksum can be right over anything.
    except Exception as error:
        raise ValueError(f"{type(error).__name__} in its header") from None
    enough = len(table) >= chunk.rows if chunk.whole else len(table) == chunk.rows
    if table.ndim != 1 or table.dtype != row_type or not enough:
        raise ValueError("it holds other rows")
    return table


def _row_type(plan: rollout.Plan) -> np.dtype:
    """The fields of the rows of a plan's chunks."""
    if plan.task.robot == "antmaze":
        return maze_walks.ROW
    judges = tuple(judge for judge, _ in plan.parts) if plan.mixed else ()
    with contextlib.closing(envs.make_robot(plan.task.robot)) as env:
        return rollout.row_type(env, judges)


def _drop_damaged(plan: rollout.Plan, folder: Path) -> None:
    """Delete the chunks that cannot be used, and say so."""
    row_type = _row_type(plan)
    for chunk in plan.chunks:
        path = _chunk_file(folder, chunk)
        if path.exists():
            try:
                _read_chunk(path, chunk, row_type)
            except ValueError as error:
                print(f"{path} is damaged ({error}); its rows are collected again")
                path.unlink()


def roll_out(
    plan: rollout.Plan,
    folder: Path,
    advance: Callable[[int], object],
    worker: int = 0,
    workers: int = 1,
) -> None:
    """Make every `workers`-th chunk of a plan, unless `folder` holds it already."""
    with rollout.one_thread():
        for chunk in plan.chunks[worker::workers]:
            path = _chunk_file(folder, chunk)
            if path.exists():
                continue
            _write_chunk(path, _roll_out_chunk(plan, chunk, advance))


def _roll_out_chunk(
    plan: rollout.Plan, chunk: rollout.Chunk, advance: Callable[[int], object]
) -> np.ndarray:
    """The rows (N,) of a chunk; its place in the plan decides its random numbers."""
    seed = np.random.SeedSequence([plan.settings["seed"], chunk.part, chunk.number])
    behavior, rows, whole = chunk.behavior, chunk.rows, chunk.whole
    if plan.task.robot == "antmaze":
        assert behavior.policy is not None
        return maze_walks.rollout(plan.task, behavior.policy, rows, seed, advance, whole)
    judges = tuple(judge for judge, _ in plan.parts) if plan.mixed else ()
    return rollout.rollout(behavior, plan.task.robot, rows, seed, advance, judges, whole)


def roll_out_in_processes(
    plan: rollout.Plan, out: Path, workers: int, advance: Callable[[int], object]
) -> None:
    """`roll_out` with one interpreter per worker.

    Forking would hurt a parent that uses threads or a GPU, and multiprocessing's fresh
    interpreters would run the parent's script again.

    Raises:
        RuntimeError: a process failed.
    """
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = _worker_command(plan, out)
    running: list[subprocess.Popen] = []
    try:
        for i in range(workers):
            running.append(
                subprocess.Popen(
                    [*command, "--worker", f"{i}/{workers}"],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                    # Ctrl-C reaches this process alone, and `finally` ends the others.
                    start_new_session=True,
                )
            )
        codes, said = _wait(running, advance)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
    if any(codes):
        # One of them is enough: a full disk is full for all.
        begin = "error: "
        errors = [line[len(begin) :].strip() for line in said if line.startswith(begin)]
        if not errors:
            sys.stderr.writelines(said)
        why = errors[0] if errors else f"exit code {max(codes, key=abs)}, see above"
        raise RuntimeError(
            f"a collecting process failed: {why}; repeat the command to go on from the "
            "finished chunks"
        )


def _wait(
    running: list[subprocess.Popen], advance: Callable[[int], object]
) -> tuple[list[int], list[str]]:
    """Pass the new rows of processes on until all have ended; exit codes and lines of errors."""
    said: list[str] = []

    def listen(process: subprocess.Popen) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            advance(int(line))

    def note(process: subprocess.Popen) -> None:
        assert process.stderr is not None
        said.extend(process.stderr)

    threads = [
        threading.Thread(target=target, args=[process], daemon=True)
        for process in running
        for target in (listen, note)
    ]
    for thread in threads:
        thread.start()
    codes = [process.wait() for process in running]
    for thread in threads:
        thread.join()
    return codes, said


def _worker_command(plan: rollout.Plan, out: Path) -> list[str]:
    """The command line of this file that makes the same plan again."""
    command = [sys.executable, "-m", "corl.standin.collect", plan.task.name]
    command += ["--out", os.path.abspath(out)]
    for name in ("rows", "seed", "mix", "share"):
        if name in plan.settings:
            command += [f"--{name}", str(plan.settings[name])]
    if plan.policy:
        command += ["--policy", os.path.abspath(plan.policy)]
    return command


def assemble(plan: rollout.Plan, folder: Path) -> dict[str, np.ndarray]:
    """The chunks as D4RL's columns (N, ...); each part gets exactly its rows.

    Where a part ends inside an episode the seam carries `timeouts`, so that no
    transition crosses it.
    """
    counts = [rows for _, rows in plan.parts]
    row_type = _row_type(plan)
    columns: dict[str, np.ndarray] = {}
    start, left = 0, list(counts)
    for chunk in plan.chunks:
        table = _read_chunk(_chunk_file(folder, chunk), chunk, row_type)
        table = table[: left[chunk.part]]
        for name in row_type.names or ():
            values = table[name]
            if name not in columns:
                columns[name] = np.empty((sum(counts), *values.shape[1:]), values.dtype)
            columns[name][start : start + len(table)] = values
        start, left[chunk.part] = start + len(table), left[chunk.part] - len(table)
    seams = np.cumsum(counts) - 1
    if not plan.mixed:
        # The end of the file is cut as D4RL's are and carries no flag.
        seams = seams[:-1]
    columns["timeouts"][seams] = ~columns["terminals"][seams]
    if len(counts) > 1:
        columns["infos/policy_label"] = np.repeat(
            np.arange(len(counts), dtype=np.int16), counts
        )
    if plan.mixed:
        order = _shuffled_episodes(columns, plan.settings["seed"])
        columns = {name: values[order] for name, values in columns.items()}
    return columns


def _shuffled_episodes(columns: dict[str, np.ndarray], seed: int) -> np.ndarray:
    """Row numbers (N,) that put whole episodes in random order."""
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"]) + 1
    episodes = np.split(np.arange(len(columns["rewards"])), ends[:-1])
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
    return np.concatenate([episodes[i] for i in rng.permutation(len(episodes))])


def collect(
    task: tasks.Task | str,
    rows: int,
    out: Path | str,
    seed: int = 0,
    policy: Path | str | None = None,
    progress: bool = True,
    mix: str | None = None,
    share: float = 0.5,
    workers: int | None = None,
) -> Path:
    """Roll a task's behavior out into an HDF5 file of D4RL's v2 schema; its path.

    Of medium-expert, the first half of the rows is medium and the rest expert; replay
    rows come in training order from the shipped series. Where the policy changes inside
    an episode, the seam carries `timeouts`. Rows of files with several policies carry
    `infos/policy_label`, an index into the attribute `policy_labels`.

    A file that is there already and was made from the same settings is left alone. Nothing
    appears under the final name before the file is complete. Finished chunks of an
    interrupted collection are used by the next. Of two processes that collect the same file
    the second waits for the first.

    Args:
        task: a locomotion or antmaze task of -v2, or its D4RL name.
        rows: transitions in the file, at least 2.
        out: the file; its folder is made.
        seed: decides all random numbers, not negative.
        policy: safetensors file of `policies.save_policy` in place of the shipped one.
        progress: show a progress bar.
        mix: random, medium or expert: mixes whole episodes of this policy in; every row
            then has the log-density of both, `infos/log_probs/LEVEL` in nats.
        share: part of the rows that `mix` makes.
        workers: processes; by default one per core where the rows are worth it.

    Raises:
        ValueError: nothing can be collected for the task; rows < 2; a damaged or unfit
            policy file; an impossible mixture; `out` holds something else.
        RuntimeError: no room or no right to write; a process failed.
    """
    task, out = tasks.task(task), Path(out)
    plan = rollout.make_plan(task, rows, seed, policy, mix, share)
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    # A finished file needs no lock, so it may lie in a read-only folder.
    if out.exists():
        _check_same(out, plan.settings)
        return out
    with _writing_to(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with locks.holding(out.with_name(out.name + ".lock"), str(out), wait=True):
            if out.exists():
                _check_same(out, plan.settings)
                return out
            files.remove_remains(out)
            _require_space(out.parent, plan)
            folder = chunk_folder(out, plan)
            folder.mkdir(exist_ok=True)
            try:
                _make_chunks(plan, folder, out, workers, progress)
                _write(out, plan, assemble(plan, folder))
                for old in out.parent.glob(f"{glob.escape(out.name)}.*.chunks"):
                    shutil.rmtree(old, ignore_errors=True)
            finally:
                if folder.exists() and not any(folder.glob("*.npy")):
                    shutil.rmtree(folder, ignore_errors=True)
    return out


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Inside, an OSError becomes a RuntimeError of one line that says what to do."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        if isinstance(error, files.CannotWrite):
            reason = f"{Path(error.filename).name}: {error.reason}"
        raise RuntimeError(
            f"cannot write to {folder} ({reason}); free some space, mend its rights or "
            "choose another folder (--out, or CORL_DARE_CACHE for the cache)"
        ) from error


def _require_space(folder: Path, plan: rollout.Plan) -> None:
    """Raise where the chunks and then the file beside them would not fit."""
    task, rows = plan.task, plan.settings["rows"]
    floats = 2 * task.state_dim + task.action_dim + 2 + 2 * (task.state_dim + 1)
    needed, free = 2 * 4 * floats * rows, shutil.disk_usage(folder).free
    if free < needed:
        raise RuntimeError(
            f"{folder} has {free / 1e6:.0f} MB left, collecting {rows} rows of "
            f"{task.robot} needs {needed / 1e6:.0f} MB; free some space or choose "
            "another folder (--out, or CORL_DARE_CACHE for the cache)"
        )


def _make_chunks(
    plan: rollout.Plan, folder: Path, out: Path, workers: int | None, progress: bool
) -> None:
    """Roll out what `folder` does not hold yet, in as many processes as are worth it."""
    chunks, rows = plan.chunks, plan.settings["rows"]
    _drop_damaged(plan, folder)
    if workers is None:
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        # A process takes some seconds to start.
        workers = max(1, min(cores, rows // 100_000))
    workers = min(workers, len(chunks))
    done = sum(c.rows for c in chunks if _chunk_file(folder, c).exists())
    title = f"{plan.task.name}, self-collected"
    with progress_bar(
        total=rows, initial=done, desc=title, unit=" rows", disable=not progress
    ) as bar:
        if workers == 1 or done == rows:
            roll_out(plan, folder, bar.update)
        else:
            roll_out_in_processes(plan, out, workers, bar.update)


def _check_same(out: Path, settings: dict) -> None:
    """Raise unless the file `out` was made from these settings."""
    try:
        with h5py.File(out) as file:
            found = files.attributes(file)
    except OSError as error:
        raise ValueError(
            f"{out} exists and is not a readable HDF5 file ({error}); delete it"
        ) from error
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"{out} exists and has {name} {found.get(name)!r} where {value!r} is "
                "asked for; delete it or choose another file"
            )


def _write(out: Path, plan: rollout.Plan, data: dict[str, np.ndarray]) -> None:
    """Write the columns of `assemble` with the plan's settings as attributes."""
    behaviors = [behavior for behavior, _ in plan.parts]

    def fill(file: h5py.File) -> None:
        file.attrs.update({**plan.settings, **versions()})
        for name, values in data.items():
            file.create_dataset(name, data=values, compression="gzip", shuffle=True)
        if len(behaviors) > 1:
            file.attrs["policy_labels"] = json.dumps([b.level for b in behaviors])
        for name, value in _metadata(plan).items():
            file[f"metadata/{name}"] = value

    files.write_hdf5(out, fill)


def _metadata(plan: rollout.Plan) -> dict:
    """What D4RL stores of the policy, by name below `metadata/`.

    Of random, joined and antmaze data that is nothing, of replay data the training step. The
    mean and the log-std are two layers on one trunk.
    """
    behavior, replay = plan.parts[-1][0], plan.task.kind.endswith("-replay")
    joined = len(plan.parts) > 1 and not replay
    if behavior.policy is None or joined or plan.task.robot == "antmaze":
        return {}
    metadata: dict[str, Any] = {"algorithm": np.bytes_("SAC")}
    if not replay:
        metadata["policy/nonlinearity"] = np.bytes_("relu")
        metadata["policy/output_distribution"] = np.bytes_("tanh_gaussian")
    if behavior.step is not None:
        metadata["iteration"] = np.int32(behavior.step)
    if replay:
        return metadata
    weights = {k: v.numpy() for k, v in behavior.policy.state_dict().items()}
    for kind in ("weight", "bias"):
        mean, log_std = np.split(weights[f"net.4.{kind}"], 2)
        layers = weights[f"net.0.{kind}"], weights[f"net.2.{kind}"], mean, log_std
        for name, values in zip(
            ("fc0", "fc1", "last_fc", "last_fc_log_std"), layers, strict=True
        ):
            metadata[f"policy/{name}/{kind}"] = values
    return metadata


def _work(plan: rollout.Plan, out: Path, worker: str) -> None:
    """One of several processes: makes its chunks, prints its new rows to standard output."""
    number, workers = (int(n) for n in worker.split("/"))
    waiting = 0

    def advance(rows: int) -> None:
        nonlocal waiting
        waiting += rows
        if waiting >= 1000:
            print(waiting, flush=True)
            waiting = 0

    with _writing_to(out.parent):
        roll_out(plan, chunk_folder(out, plan), advance, number, workers)
    print(waiting, flush=True)


def summary(path: Path, task: tasks.Task) -> str:
    """What a collected file holds, in three lines."""
    raw = schema.load_hdf5(path, task)
    facts = schema.statistics(raw, task)
    kind = "stand-in (not D4RL data) for" if task.is_d4rls else "data of"
    # D4RL's tasks have a time limit of their own.
    more = "" if task.is_d4rls else f" --horizon {task.horizon}"
    lines = [
        f"{path}: self-collected {kind} {task.name}, "
        f"{facts['rows']} rows, {facts['episodes']} complete episodes",
        f"sha256 {files.sha256(path)}",
        f"python -m corl.data.card {task.name}{more} --path {path} shows its returns",
    ]
    return "\n".join(lines)


def _parse_arguments() -> argparse.Namespace:
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "task", help="D4RL name, as hopper-medium-v2, or gymnasium id, as Hopper-v5"
    )
    parser.add_argument(
        "--horizon",
        type=arguments.number(int, "[2, 1e9]"),
        help="of a gymnasium id: time limit in steps",
    )
    parser.add_argument(
        "--rows",
        type=arguments.number(int, "[2, 1e9]"),
        help="default: 200000; D4RL's of a replay",
    )
    parser.add_argument(
        "--out", type=arguments.path, help="default: TASK-self-collected.hdf5"
    )
    parser.add_argument("--seed", type=arguments.number(int, arguments.SEED), default=0)
    parser.add_argument(
        "--policy",
        type=arguments.path,
        help="run folder or .safetensors file; default: the shipped policy, or random actions",
    )
    parser.add_argument(
        "--mix", choices=policies.SINGLE, help="second policy of a mixture"
    )
    parser.add_argument(
        "--share",
        type=arguments.number(float, "(0, 1)"),
        default=0.5,
        help="rows of --mix, 0 to 1",
    )
    parser.add_argument(
        "--workers",
        type=arguments.number(int, "[1, 1024]"),
        help="processes; default: by the cores",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def _with_own_policy(args: argparse.Namespace, task: tasks.Task, out: Path) -> None:
    """The command for an environment that is not D4RL's, or for the policy of a run."""
    if args.mix or args.workers:
        raise ValueError(
            "--mix and --workers are for D4RL's tasks and the shipped policies; leave them out"
        )
    if said := own_envs.about_actions(task):
        print(said)
    rows = policies.default_rows(task) if args.rows is None else args.rows
    own_policy.collect(task, rows, out, args.seed, args.policy, versions())
    print(summary(out, task))


def main() -> None:
    """The command line that the top of this file shows."""
    args = _parse_arguments()
    mixed = f"-{args.mix}-{args.share:g}" if args.mix else ""
    name = tasks.file_name(args.task)
    out = args.out or Path(f"{name}{mixed}-self-collected.hdf5")
    settings = {"policy": args.policy, "mix": args.mix, "share": args.share}
    try:
        task = envs.find_task(args.task, args.horizon)
        if not task.is_d4rls or (args.policy and args.policy.is_dir()):
            _with_own_policy(args, task, out)
            return
        if args.horizon is not None:
            raise ValueError(f"{task.name} has D4RL's time limit; leave --horizon out")
        rows = policies.default_rows(task) if args.rows is None else args.rows
        if args.worker:
            plan = rollout.make_plan(task, rows, args.seed, **settings)
            _work(plan, out, args.worker)
            return
        collect(task, rows, out, args.seed, workers=args.workers, **settings)
        print(summary(out, task))
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
