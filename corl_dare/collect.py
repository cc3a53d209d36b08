"""Self-collected stand-in data in D4RL's HDF5 schema, where D4RL itself is out of reach.

Shipped SAC policies (`policies/`, trained by `sac.py`) are rolled out in the task's
environment the way D4RL's locomotion sets were made: actions are sampled, their exact
log-density is stored, an episode that reaches the time limit ends by `timeouts` even if
the robot fell in that very step, and the file is cut at its last row. Replay data comes
from a series of snapshots of one training, in training order. Antmaze is
`antmaze_collect.py`'s.

    python -m corl_dare.collect hopper-medium-v2 --rows 200000 --out hopper.hdf5
    python -m corl_dare.collect hopper-medium-v2 --mix expert --share 0.3

The second command writes a labelled mixture of two policies with the exact density of
both in every row. The same command gives the same bytes on the same machine and package
versions, whatever the number of processes; an interrupted one goes on when it is repeated.
Scores on this data are not comparable with published ones: the policies are others.
"""

import argparse
import glob
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
import gymnasium
import h5py
import mujoco
import numpy as np
import torch
from safetensors import SafetensorError

from corl_dare import __version__, ant_walker, antmaze_collect, envs, sac
from corl_dare.progress import progress_bar

POLICY_DIR = Path(__file__).parent / "policies"
STAND_IN_ROWS = 200_000  # half a minute of hopper on one core
REPLAY_ROWS = {"hopper": 402_000, "halfcheetah": 202_000, "walker2d": 302_000}  # D4RL's
CHUNK = (
    200_000  # rows that are rolled out in one go, and kept when the rest is interrupted
)
ENVS = 16  # that share a policy call; twice the speed of one, more gain little
SINGLE = ("random", "medium", "expert")  # kinds that one policy makes
INTERRUPTED = "interrupted; finished chunks are kept, repeat the command to go on"
LEVELS = {  # what is shipped -> which kinds it makes
    "random": (),
    "medium": ("medium",),
    "expert": ("expert",),
    "medium-expert": ("medium", "expert"),
    "medium-replay": ("series", "medium"),
    "full-replay": ("series",),
    **{kind: ("walker",) for kind in envs.ANTMAZES},
}


class NotCollectable(ValueError):
    """The behavior policies that a task's stand-in needs are not shipped."""


@dataclass(frozen=True)
class Behavior:
    """A policy to roll out; None draws actions uniformly from [-1, 1]."""

    level: str
    policy: sac.TanhGaussianPolicy | None = None
    sha256: str = ""
    step: int | None = None  # training steps behind the policy, if known


@dataclass(frozen=True)
class Chunk:
    """Rows that one behavior makes in one go."""

    part: int  # place of the behavior in the file
    number: int  # place in the part
    behavior: Behavior
    rows: int
    whole: bool  # goes on to the end of its last episode, so that no chunk cuts one


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a file."""

    robot: str
    parts: tuple[tuple[Behavior, int], ...]  # in the order of the file, with their rows
    mixed: bool  # whole episodes of the parts in random order
    settings: dict[str, str | int | float]
    policy: Path | None = None  # given in place of the shipped one

    @property
    def chunks(self) -> list[Chunk]:
        found = []
        for part, (behavior, rows) in enumerate(self.parts):
            for number, start in enumerate(range(0, rows, CHUNK)):
                rest = rows - start
                found.append(
                    Chunk(part, number, behavior, min(CHUNK, rest), rest > CHUNK)
                )
        return found


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def publish(part: Path, out: Path) -> None:
    """Give a complete file its final name in the same folder, once it is on the disk."""
    with open(part, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(part, out)


def write_hdf5(out: Path, fill: Callable[[h5py.File], object]) -> None:
    """Make an HDF5 file by `fill`; it gets its name when it is complete.

    Raises:
        OSError: no room or no right to write.
    """
    # In memory first: on a full disk HDF5's own writing ends with a crash, not an error.
    memory = {"driver": "core", "backing_store": False, "block_size": 1 << 24}
    with h5py.File(str(out), "w", **memory) as file:
        fill(file)
        file.flush()
        image = file.id.get_file_image()
    part = out.with_name(out.name + ".part")
    try:
        part.write_bytes(image)
        publish(part, out)
    finally:
        with suppress(OSError):
            part.unlink()


# ---------------------------------------------------------------- behavior policies


def kinds(robot: str) -> list[str]:
    """The dataset kinds that can be collected for a robot with the shipped policies."""
    known = envs.ROBOTS[robot].kinds if robot in envs.ROBOTS else ()
    levels = {
        facts["level"] for facts in _manifest().values() if facts["robot"] == robot
    }
    return [
        k for k, needed in LEVELS.items() if k in known and levels.issuperset(needed)
    ]


def fingerprint(task: str) -> dict[str, str]:
    """Level -> SHA-256 of the shipped policies that a task's stand-in comes from.

    Raises:
        NotCollectable: no stand-in for this task; says what there is for its robot.
    """
    levels = _levels(envs.task(task))
    return {
        level: _shipped(envs.task(task).robot, level)[1]["sha256"] for level in levels
    }


def default_rows(task: str) -> int:
    """Rows of a stand-in if nobody asks for a number: D4RL's own of medium-replay."""
    facts = envs.task(task)
    if facts.kind == "medium-replay":
        return REPLAY_ROWS.get(facts.robot, STAND_IN_ROWS)
    return STAND_IN_ROWS


def _manifest() -> dict[str, dict]:
    path = POLICY_DIR / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _levels(task: envs.Task) -> tuple[str, ...]:
    able = kinds(task.robot)
    if task.kind not in able or task.version != "v2":
        options = ", ".join(f"{task.robot}-{kind}-v2" for kind in able)
        raise NotCollectable(
            f"no self-collected stand-in for {task.name}: behavior policies for it are "
            f"not shipped; for {task.robot} there are: {options or 'none'}"
        )
    return LEVELS[task.kind]


def _shipped(robot: str, level: str) -> tuple[Path, dict]:
    for file, facts in _manifest().items():
        if (facts["robot"], facts["level"]) == (robot, level):
            return POLICY_DIR / file, facts
    raise ValueError(f"no {level} policy of {robot} in {POLICY_DIR / 'manifest.json'}")


def _load(path: Path, level: str, task: envs.Task, facts: dict) -> list[Behavior]:
    """The policy of a file, or of a series all."""
    if not path.is_file():
        raise ValueError(f"policy file {path} does not exist")
    digest = sha256(path)
    if facts.get("sha256", digest) != digest:
        raise ValueError(
            f"policy file {path} has sha256 {digest}, the manifest says "
            f"{facts['sha256']}; reinstall the package"
        )
    try:
        # Building the network draws its start weights from the global stream.
        with torch.random.fork_rng(devices=[]):
            if level == "series":
                named = [
                    (f"step {step}", step, policy)
                    for step, policy in sac.load_series(path).items()
                ]
            else:
                named = [(level, facts.get("step"), sac.load_policy(path))]
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"policy file {path} is not a policy written by corl_dare.sac ({error!r})"
        ) from error
    inputs = ant_walker.FEATURES if level == "walker" else task.state_dim
    for _, _, policy in named:
        dims = policy.net[0].in_features, policy.net[-1].out_features // 2
        if dims != (inputs, task.action_dim):
            raise ValueError(
                f"policy file {path} maps {dims[0]} state to {dims[1]} action "
                f"dimensions; {task.robot} has {inputs} and {task.action_dim}"
            )
    return [Behavior(name, policy, digest, step) for name, step, policy in named]


def _single(task: envs.Task, level: str, policy: Path | None = None) -> Behavior:
    if level == "random":
        return Behavior("random")
    path, facts = (policy, {}) if policy else _shipped(task.robot, level)
    return _load(path, level, task, facts)[0]


# ---------------------------------------------------------------- plan


def make_plan(
    task: str,
    rows: int,
    seed: int = 0,
    policy: Path | str | None = None,
    mix: str | None = None,
    share: float = 0.5,
) -> Plan:
    """Which behavior makes which rows of a file; arguments as of `collect`.

    Raises:
        ValueError: as of `collect`.
    """
    facts = envs.task(task)
    if rows < 2:
        raise ValueError(f"rows is {rows}; a dataset needs at least 2")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if policy is not None and (facts.kind not in SINGLE[1:] or not facts.env_id):
        raise ValueError(
            f"policy is given, but {task} is not rolled out from one policy; use a "
            "medium or expert task of a locomotion robot"
        )
    if policy is None:
        _levels(facts)
    policy = Path(policy) if policy else None
    if mix is not None:
        parts = _mixture(facts, rows, policy, mix, share)
    elif facts.kind in SINGLE:
        parts = [(_single(facts, facts.kind, policy), rows)]
    elif facts.robot == "antmaze":
        parts = [(_single(facts, "walker"), rows)]
    elif facts.kind == "medium-expert":
        halves = rows // 2, rows - rows // 2
        parts = [
            (_single(facts, level), half)
            for level, half in zip(("medium", "expert"), halves, strict=True)
        ]
    else:
        parts = _replay(facts, rows)
    used = {b.level: b.sha256 for b, _ in parts if b.policy is not None}
    settings = {
        "source": "self-collected",
        "task": task,
        "rows": rows,
        "seed": seed,
        "policies": json.dumps(
            fingerprint(task) if "-replay-" in task else used, sort_keys=True
        ),
    }
    if mix is not None:
        settings |= {"mix": mix, "share": share}
    return Plan(facts.robot, tuple(parts), mix is not None, settings, policy)


def _mixture(
    task: envs.Task, rows: int, policy: Path | None, mix: str, share: float
) -> list[tuple[Behavior, int]]:
    if task.kind not in SINGLE or mix not in SINGLE or mix == task.kind:
        raise ValueError(
            f"mix {mix!r} into {task.name}: a mixture takes two different ones of "
            f"{', '.join(SINGLE)}"
        )
    _levels(envs.task(f"{task.robot}-{mix}-v2"))
    others = round(rows * share) if math.isfinite(share) else 0
    if not 0 < others < rows:
        raise ValueError(
            f"share is {share}, which is {others} of {rows} rows; it must be between 0 "
            "and 1 and leave rows to both policies"
        )
    own = _single(task, task.kind, policy)
    return [(own, rows - others), (_single(task, mix), others)]


def _replay(task: envs.Task, rows: int) -> list[tuple[Behavior, int]]:
    """Rows in training order, each from the policy that was nearest in the training.

    The first training steps acted uniformly. A snapshot stands for the steps from the
    middle to its predecessor up to the middle to its successor.
    """
    path, facts = _shipped(task.robot, "series")
    series = _load(path, "series", task, facts)
    end = series[-1].step
    if task.kind == "medium-replay":
        end = _shipped(task.robot, "medium")[1]["step"]
        series = [b for b in series if b.step <= end]
    if not series:
        raise ValueError(f"policy file {path} has no snapshot up to step {end}")
    steps = [b.step for b in series]
    middles = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    starts = np.maximum([0, *middles], facts["warmup"])
    seams = np.round(rows * np.array([0, *starts, end]) / end).astype(int)
    counts = np.diff(seams).tolist()
    behaviors = [Behavior("random"), *series]
    return [(b, n) for b, n in zip(behaviors, counts, strict=True) if n]


# ---------------------------------------------------------------- rollout


@contextmanager
def _one_thread() -> Iterator[None]:
    """Splitting a product over threads changes its last bits, then all that follows."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _act(
    behavior: Behavior,
    states: np.ndarray,
    action_dim: int,
    generator: torch.Generator,
    judges: tuple[Behavior, ...] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """states (B, S) float32 -> sampled actions (B, A), log-densities in nats: (B,), (B, J)."""
    shape, inputs = (len(states), action_dim), torch.from_numpy(states)
    uniform = torch.full(shape[:1], -action_dim * math.log(2.0))
    if behavior.policy is None:
        actions, log_probs = 2.0 * torch.rand(shape, generator=generator) - 1.0, uniform
        u = torch.atanh(actions.clamp(-1 + 1e-7, 1 - 1e-7)) if judges else None
    else:
        noise = torch.randn(shape, generator=generator)
        actions, log_probs = behavior.policy(inputs, noise)
        u = behavior.policy.pre_tanh(inputs, noise) if judges else None
    judged = np.empty((len(states), len(judges)), np.float32)
    for j, judge in enumerate(judges):
        if judge is behavior:
            judged[:, j] = log_probs
        elif judge.policy is None:
            judged[:, j] = uniform
        else:
            judged[:, j] = judge.policy.log_prob_of_tanh(inputs, u)
    return actions.numpy(), log_probs.numpy(), judged


def rollout(
    behavior: Behavior,
    robot: str,
    rows: int,
    seed: np.random.SeedSequence,
    advance: Callable[[int], object] = lambda rows: None,
    judges: tuple[Behavior, ...] = (),
    whole: bool = False,
) -> np.ndarray:
    """Transitions of whole episodes; exactly `rows`, the last episode cut, unless `whole`.

    Episodes come in the order in which they started: an order by completion would favour
    short episodes, because the long ones would still be running at the end.

    Args:
        advance: told about new rows, `rows` in all.
        judges: behaviors whose densities of the actions are stored as well.
        whole: goes on to the end of the last episode.

    Returns:
        Table (N,) with D4RL's per-row keys as fields; observations (S,), actions (A,),
        rewards float32, terminals, timeouts bool, infos/qpos, infos/qvel float64 of the
        state that the action was taken in, infos/action_log_probs and, per judge,
        infos/log_probs/LEVEL float32 in nats.
    """
    facts = envs.ROBOTS[robot]
    seeds = seed.generate_state(1 + max(1, min(ENVS, rows // facts.horizon)))
    generator = torch.Generator().manual_seed(int(seeds[0]))
    robots = [envs.make_robot(robot) for _ in seeds[1:]]
    starts = [e.reset(seed=int(s))[0] for e, s in zip(robots, seeds[1:], strict=True)]
    states = np.asarray(starts, dtype=np.float32)  # (B, S)
    buffers = [np.zeros(facts.horizon, _row_type(e, judges)) for e in robots]
    lengths = [0] * len(robots)
    running = list(range(len(robots)))  # number of the episode in each environment
    started, over = len(robots), {}  # finished episodes by their number
    first = written = told = 0  # the first episode that still runs, all rows before it
    while written + (0 if whole else lengths[running.index(first)]) < rows:
        actions, log_probs, judged = _act(
            behavior, states, facts.action_dim, generator, judges
        )
        for i, env in enumerate(robots):
            data = env.unwrapped.data
            physics = data.qpos.copy(), data.qvel.copy()
            next_state, reward, terminated, truncated, _ = env.step(actions[i])
            flags = terminated and not truncated, truncated
            row = (states[i], actions[i], reward, next_state, *flags, log_probs[i])
            buffers[i][lengths[i]] = (*row, *physics, *judged[i])
            lengths[i] += 1
            if terminated or truncated:
                over[running[i]] = buffers[i][: lengths[i]].copy()
                next_state, _ = env.reset()
                running[i], lengths[i], started = started, 0, started + 1
            states[i] = next_state
        while first in over:
            written, first = written + len(over[first]), first + 1
        advance(min(len(robots), rows - told))
        told = min(rows, told + len(robots))
    for env in robots:
        env.close()
    pieces = [over[number] for number in range(first)]
    if whole:
        return np.concatenate(pieces)
    last = running.index(first)
    return np.concatenate([*pieces, buffers[last][: lengths[last]]])[:rows]


def _row_type(env: gymnasium.Env, judges: tuple[Behavior, ...]) -> np.dtype:
    state, action = env.observation_space.shape, env.action_space.shape
    data = env.unwrapped.data
    return np.dtype(
        [
            ("observations", np.float32, state),
            ("actions", np.float32, action),
            ("rewards", np.float32),
            ("next_observations", np.float32, state),
            ("terminals", np.bool_),
            ("timeouts", np.bool_),
            ("infos/action_log_probs", np.float32),
            ("infos/qpos", np.float64, data.qpos.shape),
            ("infos/qvel", np.float64, data.qvel.shape),
            *((f"infos/log_probs/{judge.level}", np.float32) for judge in judges),
        ]
    )


# ---------------------------------------------------------------- chunks


def versions() -> dict[str, str]:
    """Of the packages that decide a file's bytes, as the file's attributes name them."""
    return {
        "corl_dare_version": __version__,
        "gymnasium_version": gymnasium.__version__,
        "mujoco_version": mujoco.__version__,
        "numpy_version": np.__version__,
        "torch_version": str(torch.__version__),
    }


def _chunk_folder(out: Path, plan: Plan) -> Path:
    """Its name holds all that the rows depend on: old chunks never get into a new file."""
    facts = json.dumps([plan.settings, versions(), CHUNK, ENVS], sort_keys=True)
    digest = hashlib.sha256(facts.encode()).hexdigest()
    return out.with_name(f"{out.name}.{digest[:8]}.chunks")


def _chunk_file(folder: Path, chunk: Chunk) -> Path:
    return folder / f"{chunk.part:03d}-{chunk.number:03d}.npy"


def roll_out(
    plan: Plan,
    folder: Path,
    advance: Callable[[int], object],
    worker: int = 0,
    workers: int = 1,
) -> None:
    """Make every `workers`-th chunk of a plan, unless `folder` holds it already."""
    judges = tuple(behavior for behavior, _ in plan.parts) if plan.mixed else ()
    with _one_thread():
        for chunk in plan.chunks[worker::workers]:
            path = _chunk_file(folder, chunk)
            if path.exists():
                continue
            words = [plan.settings["seed"], chunk.part, chunk.number]
            seed = np.random.SeedSequence(words)
            if plan.robot == "antmaze":
                kind, policy = (
                    envs.task(plan.settings["task"]).kind,
                    chunk.behavior.policy,
                )
                table = antmaze_collect.rollout(
                    kind, policy, chunk.rows, seed, advance, chunk.whole
                )
            else:
                table = rollout(
                    chunk.behavior,
                    plan.robot,
                    chunk.rows,
                    seed,
                    advance,
                    judges,
                    chunk.whole,
                )
            part = path.with_suffix(".part")
            with open(part, "wb") as handle:
                np.save(handle, table, allow_pickle=False)
            publish(part, path)


def _roll_out_in_processes(
    plan: Plan, out: Path, workers: int, advance: Callable[[int], object]
) -> None:
    """One interpreter per worker: forking would hurt a parent that uses threads or a GPU,
    and multiprocessing's fresh interpreters would run the parent's script again."""
    here = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    settings = dict(plan.settings)
    command = [sys.executable, "-m", "corl_dare.collect", settings["task"], "--out"]
    command += [os.path.abspath(out)]
    for name in ("rows", "seed", "mix", "share"):
        if name in settings:
            command += [f"--{name}", str(settings[name])]
    if plan.policy:
        command += ["--policy", os.path.abspath(plan.policy)]
    running = []
    try:
        for i in range(workers):
            running.append(
                subprocess.Popen(
                    [*command, "--worker", f"{i}/{workers}"],
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C is ours; `finally` ends them
                )
            )

        def listen(process: subprocess.Popen) -> None:
            for line in process.stdout:
                advance(int(line))

        ears = [threading.Thread(target=listen, args=[p], daemon=True) for p in running]
        for ear in ears:
            ear.start()
        codes = [process.wait() for process in running]
        for ear in ears:
            ear.join()
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
            process.wait()
            process.stdout.close()
    if any(codes):
        raise RuntimeError(
            f"a collecting process ended with exit code {max(codes, key=abs)}; its own "
            "message is above; repeat the command to go on from the finished chunks"
        )


def _assemble(plan: Plan, folder: Path) -> dict[str, np.ndarray]:
    """The chunks as D4RL's columns; each part gets exactly its rows.

    Where a part ends inside an episode the seam carries `timeouts`, so that no
    transition crosses it.
    """
    counts = [rows for _, rows in plan.parts]
    columns: dict[str, np.ndarray] = {}
    start, left = 0, list(counts)
    for chunk in plan.chunks:
        table = np.load(_chunk_file(folder, chunk), allow_pickle=False)[
            : left[chunk.part]
        ]
        for name in table.dtype.names:
            values = table[name]
            if name not in columns:
                columns[name] = np.empty((sum(counts), *values.shape[1:]), values.dtype)
            columns[name][start : start + len(table)] = values
        start, left[chunk.part] = start + len(table), left[chunk.part] - len(table)
    seams = np.cumsum(counts) - 1
    if not plan.mixed:
        seams = seams[:-1]  # the file itself is cut as D4RL's are
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
    ends = np.flatnonzero(columns["terminals"] | columns["timeouts"]) + 1
    episodes = np.split(np.arange(len(columns["rewards"])), ends[:-1])
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
    return np.concatenate([episodes[i] for i in rng.permutation(len(episodes))])


# ---------------------------------------------------------------- file


def collect(
    task: str,
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
    `infos/policy_label`, an index into the attribute `policy_labels`. A file that is
    there already and was made from the same settings is left alone. Nothing appears
    under the final name before the file is complete; finished chunks of an interrupted
    collection are used by the next; of two processes the second waits for the first.

    Args:
        task: D4RL name of a locomotion or antmaze task, -v2.
        rows: transitions in the file, at least 2.
        policy: safetensors file of `sac.save_policy` in place of the shipped one.
        mix: random, medium or expert: mixes whole episodes of this policy in; every row
            then has the log-density of both, `infos/log_probs/LEVEL` in nats.
        share: part of the rows that `mix` makes.
        workers: processes; by default one per core where the rows are worth it.

    Raises:
        ValueError: nothing can be collected for the task; rows < 2; a damaged or unfit
            policy file; an impossible mixture; `out` holds something else.
        RuntimeError: no room or no right to write; a process failed.
    """
    out = Path(out)
    plan = make_plan(task, rows, seed, policy, mix, share)
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if out.exists():  # needs no lock, so that a read-only folder will do
        _check_same(out, plan.settings)
        return out
    with _writing_to(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out.with_name(out.name + ".lock")):
            if out.exists():
                _check_same(out, plan.settings)
                return out
            _require_space(out.parent, plan)
            folder = _chunk_folder(out, plan)
            folder.mkdir(exist_ok=True)
            try:
                _make_chunks(plan, folder, out, workers, progress)
                _write(out, plan, _assemble(plan, folder))
                for old in out.parent.glob(f"{glob.escape(out.name)}.*.chunks"):
                    shutil.rmtree(old, ignore_errors=True)
            finally:
                if folder.exists() and not any(folder.glob("*.npy")):
                    shutil.rmtree(folder, ignore_errors=True)
    return out


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"cannot write to {folder} ({reason}); free some space, mend its rights or "
            "choose another folder (--out, or CORL_DARE_CACHE for the cache)"
        ) from error


def _require_space(folder: Path, plan: Plan) -> None:
    facts, rows = envs.ROBOTS[plan.robot], plan.settings["rows"]
    floats = 2 * facts.state_dim + facts.action_dim + 2 + 2 * (facts.state_dim + 1)
    needed, free = 2 * 4 * floats * rows, shutil.disk_usage(folder).free
    if free < needed:  # the chunks, then the file beside them
        raise RuntimeError(
            f"{folder} has {free / 1e6:.0f} MB left, collecting {rows} rows of "
            f"{plan.robot} needs {needed / 1e6:.0f} MB; free some space or choose "
            "another folder (--out, or CORL_DARE_CACHE for the cache)"
        )


def _make_chunks(
    plan: Plan, folder: Path, out: Path, workers: int | None, progress: bool
) -> None:
    chunks, rows = plan.chunks, plan.settings["rows"]
    if workers is None:
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        workers = max(1, min(cores, rows // 100_000))  # a start takes some seconds
    workers = min(workers, len(chunks))
    done = sum(c.rows for c in chunks if _chunk_file(folder, c).exists())
    title = f"{plan.settings['task']}, self-collected"
    with progress_bar(
        total=rows, initial=done, desc=title, unit=" rows", disable=not progress
    ) as bar:
        if workers == 1 or done == rows:
            roll_out(plan, folder, bar.update)
        else:
            _roll_out_in_processes(plan, out, workers, bar.update)


def attributes(file: h5py.File) -> dict:
    """The settings and versions that `collect` wrote to a file, as plain values."""
    values = {name: file.attrs[name] for name in file.attrs}
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}


def _check_same(out: Path, settings: dict) -> None:
    try:
        with h5py.File(out) as file:
            found = attributes(file)
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


def _write(out: Path, plan: Plan, data: dict[str, np.ndarray]) -> None:
    behaviors = [behavior for behavior, _ in plan.parts]

    def fill(file: h5py.File) -> None:
        file.attrs.update({**plan.settings, **versions()})
        for name, values in data.items():
            file.create_dataset(name, data=values, compression="gzip", shuffle=True)
        if len(behaviors) > 1:
            file.attrs["policy_labels"] = json.dumps([b.level for b in behaviors])
        for name, value in _metadata(plan).items():
            file[f"metadata/{name}"] = value

    write_hdf5(out, fill)


def _metadata(plan: Plan) -> dict:
    """What D4RL stores of the policy: nothing of random, joined and antmaze data, of replays
    the training step. Mean and log-std are two layers on one trunk."""
    behavior, replay = plan.parts[-1][0], "-replay-" in plan.settings["task"]
    joined = len(plan.parts) > 1 and not replay
    if behavior.policy is None or joined or plan.robot == "antmaze":
        return {}
    metadata = {"algorithm": np.bytes_("SAC")}
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


def _work(plan: Plan, out: Path, worker: str) -> None:
    """The part of one of several processes; its new rows go to standard output."""
    number, workers = (int(n) for n in worker.split("/"))
    waiting = 0

    def advance(rows: int) -> None:
        nonlocal waiting
        waiting += rows
        if waiting >= 1000:
            print(waiting, flush=True)
            waiting = 0

    with _writing_to(out.parent):
        roll_out(plan, _chunk_folder(out, plan), advance, number, workers)
    print(waiting, flush=True)


def main() -> None:
    # datasets imports this file: only the command line goes the other way, for the card.
    from corl_dare import datasets

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", help="D4RL name, for example hopper-medium-v2")
    parser.add_argument("--rows", type=int, help="default: 200000; D4RL's of a replay")
    parser.add_argument("--out", type=Path, help="default: TASK-self-collected.hdf5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", type=Path, help="in place of the shipped policy")
    parser.add_argument("--mix", choices=SINGLE, help="second policy of a mixture")
    parser.add_argument("--share", type=float, default=0.5, help="rows of --mix, 0 to 1")
    parser.add_argument("--workers", type=int, help="processes; default: by the cores")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    mixed = f"-{args.mix}-{args.share:g}" if args.mix else ""
    out = args.out or Path(f"{args.task}{mixed}-self-collected.hdf5")
    settings = {"policy": args.policy, "mix": args.mix, "share": args.share}
    try:
        rows = default_rows(args.task) if args.rows is None else args.rows
        if args.worker:
            _work(make_plan(args.task, rows, args.seed, **settings), out, args.worker)
            return
        collect(args.task, rows, out, args.seed, workers=args.workers, **settings)
        print(datasets.card(datasets.resolve(args.task, source="file", path=out)))
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
