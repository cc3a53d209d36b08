"""Self-collected stand-in data in D4RL's HDF5 schema, where D4RL itself is out of reach.

Shipped SAC policies (`policies/`, trained by `sac.py`) are rolled out in the task's
environment the way D4RL's locomotion sets were made: actions are sampled, their exact
log-density is stored, an episode that reaches the time limit ends by `timeouts` even if
the robot fell in that very step, and the file is cut at its last row.

    python -m corl_dare.collect hopper-medium-v2 --rows 200000 --out hopper.hdf5

The same command gives the same bytes on the same machine and package versions. Scores on
this data are not comparable with published ones: the policies are others.
"""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import gymnasium
import h5py
import mujoco
import numpy as np
import torch
from safetensors import SafetensorError

from corl_dare import __version__, envs, sac
from corl_dare.progress import progress_bar

POLICY_DIR = Path(__file__).parent / "policies"
STAND_IN_ROWS = 200_000  # half a minute of hopper on one core
ENVS = (
    16  # environments that share a policy call; twice the speed of one, more gain little
)
LEVELS = {"random": (), "medium": ("medium",), "expert": ("expert",)}
LEVELS["medium-expert"] = ("medium", "expert")


class NotCollectable(ValueError):
    """The behavior policies that a task's stand-in needs are not shipped."""


@dataclass(frozen=True)
class Behavior:
    """A policy to roll out; None draws actions uniformly from [-1, 1]."""

    level: str
    policy: sac.TanhGaussianPolicy | None = None
    sha256: str = ""
    step: int | None = None  # training steps behind the policy, if known


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


# ---------------------------------------------------------------- behavior policies


def kinds(robot: str) -> list[str]:
    """The dataset kinds that can be collected for a robot with the shipped policies."""
    if robot not in envs.ROBOTS or not envs.ROBOTS[robot].env_id:
        return []
    levels = {
        facts["level"] for facts in _manifest().values() if facts["robot"] == robot
    }
    return [kind for kind, needed in LEVELS.items() if levels.issuperset(needed)]


def fingerprint(task: str) -> dict[str, str]:
    """Level -> SHA-256 of the shipped policies that a task's stand-in comes from.

    Raises:
        NotCollectable: no stand-in for this task; says what there is for its robot.
    """
    levels = _levels(envs.task(task))
    return {
        level: _shipped(envs.task(task).robot, level)[1]["sha256"] for level in levels
    }


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


def _load(path: Path, level: str, task: envs.Task, facts: dict) -> Behavior:
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
            policy = sac.load_policy(path)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"policy file {path} is not a policy written by corl_dare.sac ({error!r})"
        ) from error
    dims = policy.net[0].in_features, policy.net[-1].out_features // 2
    if dims != (task.state_dim, task.action_dim):
        raise ValueError(
            f"policy file {path} maps {dims[0]} state to {dims[1]} action dimensions; "
            f"{task.robot} has {task.state_dim} and {task.action_dim}"
        )
    return Behavior(level, policy, digest, facts.get("step"))


def _behaviors(task: envs.Task, policy: Path | None) -> list[Behavior]:
    if policy is not None:
        if task.kind not in ("medium", "expert") or not task.env_id:
            raise ValueError(
                f"policy is given, but {task.name} is not rolled out from one policy; "
                "use a medium or expert task of a locomotion robot"
            )
        return [_load(Path(policy), task.kind, task, {})]
    levels = _levels(task)
    if not levels:
        return [Behavior("random")]
    shipped = [_shipped(task.robot, level) for level in levels]
    return [
        _load(path, level, task, facts)
        for level, (path, facts) in zip(levels, shipped, strict=True)
    ]


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
    behavior: Behavior, states: np.ndarray, action_dim: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """states (B, S) float32 -> sampled actions (B, A), log-densities (B,) in nats."""
    shape = (len(states), action_dim)
    if behavior.policy is None:
        actions = 2.0 * torch.rand(shape, generator=generator) - 1.0
        log_probs = torch.full(shape[:1], -action_dim * math.log(2.0))
    else:
        noise = torch.randn(shape, generator=generator)
        actions, log_probs = behavior.policy(torch.from_numpy(states), noise)
    return actions.numpy(), log_probs.numpy()


def rollout(
    behavior: Behavior,
    robot: str,
    rows: int,
    seed: np.random.SeedSequence,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Exactly `rows` transitions of whole episodes, the last one cut.

    Episodes come in the order in which they started: an order by completion would favour
    short episodes, because the long ones would still be running at the end.

    Returns:
        D4RL's per-row keys; observations (N, S), actions (N, A), rewards (N,) float32,
        terminals, timeouts (N,) bool, infos/qpos, infos/qvel float64 of the state that
        the action was taken in, infos/action_log_probs (N,) float32 in nats.
    """
    facts = envs.ROBOTS[robot]
    seeds = seed.generate_state(1 + max(1, min(ENVS, rows // facts.horizon)))
    generator = torch.Generator().manual_seed(int(seeds[0]))
    robots = [envs.make_robot(robot) for _ in seeds[1:]]
    starts = [e.reset(seed=int(s))[0] for e, s in zip(robots, seeds[1:], strict=True)]
    states = np.asarray(starts, dtype=np.float32)  # (B, S)
    buffers = [np.zeros(facts.horizon, _row_type(e)) for e in robots]
    lengths = [0] * len(robots)
    running = list(range(len(robots)))  # number of the episode in each environment
    started, over = len(robots), {}  # finished episodes by their number
    first = written = 0  # the first episode that still runs, and all rows before it
    title = f"{robot} {behavior.level}, self-collected"
    with progress_bar(total=rows, desc=title, unit=" rows", disable=not progress) as bar:
        while written + lengths[running.index(first)] < rows:
            actions, log_probs = _act(behavior, states, facts.action_dim, generator)
            for i, env in enumerate(robots):
                data = env.unwrapped.data
                physics = data.qpos.copy(), data.qvel.copy()
                next_state, reward, terminated, truncated, _ = env.step(actions[i])
                flags = terminated and not truncated, truncated
                row = (states[i], actions[i], reward, next_state, *flags, log_probs[i])
                buffers[i][lengths[i]] = (*row, *physics)
                lengths[i] += 1
                if terminated or truncated:
                    over[running[i]] = buffers[i][: lengths[i]].copy()
                    next_state, _ = env.reset()
                    running[i], lengths[i], started = started, 0, started + 1
                states[i] = next_state
            while first in over:
                written, first = written + len(over[first]), first + 1
            bar.update(min(len(robots), rows - bar.n))
    for env in robots:
        env.close()
    last = running.index(first)
    pieces = [over[number] for number in range(first)] + [buffers[last][: lengths[last]]]
    table = np.concatenate(pieces)[:rows]
    return {name: np.ascontiguousarray(table[name]) for name in table.dtype.names}


def _row_type(env: gymnasium.Env) -> np.dtype:
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
        ]
    )


# ---------------------------------------------------------------- file


def collect(
    task: str,
    rows: int,
    out: Path | str,
    seed: int = 0,
    policy: Path | str | None = None,
    progress: bool = True,
) -> Path:
    """Roll a task's behavior out into an HDF5 file of D4RL's v2 schema; its path.

    Of medium-expert, the first half of the rows is medium and the rest expert; the seam
    carries `timeouts`, so that no transition crosses it. A file that is there already
    and was made from the same settings is left alone. Nothing appears under the final
    name before the file is complete; of two processes the second waits for the first.

    Args:
        task: D4RL name of a locomotion task, -v2.
        rows: transitions in the file, at least 2.
        policy: safetensors file of `sac.save_policy` in place of the shipped one.

    Raises:
        ValueError: nothing can be collected for the task; rows < 2; a damaged or unfit
            policy file; `out` holds something else.
    """
    facts, out = envs.task(task), Path(out)
    if rows < 2:
        raise ValueError(f"rows is {rows}; a dataset needs at least 2")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    behaviors = _behaviors(facts, Path(policy) if policy else None)
    used = {b.level: b.sha256 for b in behaviors if b.policy is not None}
    settings = {
        "source": "self-collected",
        "task": task,
        "rows": rows,
        "seed": seed,
        "policies": json.dumps(used, sort_keys=True),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out.with_name(out.name + ".lock")):
        if out.exists():
            _check_same(out, settings)
            return out
        data = _concatenate(facts.robot, behaviors, rows, seed, progress)
        _write(out, data, behaviors, settings)
    return out


def _concatenate(
    robot: str, behaviors: list[Behavior], rows: int, seed: int, progress: bool
) -> dict[str, np.ndarray]:
    shares = [rows // 2, rows - rows // 2] if len(behaviors) == 2 else [rows]
    with _one_thread():
        parts = [
            rollout(b, robot, n, np.random.SeedSequence([seed, i]), progress)
            for i, (b, n) in enumerate(zip(behaviors, shares, strict=True))
        ]
    for part in parts[:-1]:
        part["timeouts"][-1] = not part["terminals"][-1]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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


def _write(
    out: Path, data: dict[str, np.ndarray], behaviors: list[Behavior], settings: dict
) -> None:
    part = out.with_name(out.name + ".part")
    versions = {
        "corl_dare_version": __version__,
        "gymnasium_version": gymnasium.__version__,
        "mujoco_version": mujoco.__version__,
        "numpy_version": np.__version__,
        "torch_version": str(torch.__version__),
    }
    try:
        with h5py.File(part, "w") as file:
            file.attrs.update({**settings, **versions})
            for name, values in data.items():
                file.create_dataset(name, data=values, compression="gzip", shuffle=True)
            if len(behaviors) == 1 and behaviors[0].policy is not None:
                for name, value in _metadata(behaviors[0]).items():
                    file[f"metadata/{name}"] = value
        publish(part, out)
    finally:
        part.unlink(missing_ok=True)


def _metadata(behavior: Behavior) -> dict:
    """The policy as D4RL stores it: mean and log-std are two layers on one trunk."""
    weights = {k: v.numpy() for k, v in behavior.policy.state_dict().items()}
    metadata = {
        "algorithm": np.bytes_("SAC"),
        "policy/nonlinearity": np.bytes_("relu"),
        "policy/output_distribution": np.bytes_("tanh_gaussian"),
    }
    if behavior.step is not None:
        metadata["iteration"] = np.int32(behavior.step)
    for kind in ("weight", "bias"):
        mean, log_std = np.split(weights[f"net.4.{kind}"], 2)
        layers = weights[f"net.0.{kind}"], weights[f"net.2.{kind}"], mean, log_std
        for name, values in zip(
            ("fc0", "fc1", "last_fc", "last_fc_log_std"), layers, strict=True
        ):
            metadata[f"policy/{name}/{kind}"] = values
    return metadata


def main() -> None:
    # datasets imports this file: only the command line goes the other way, for the card.
    from corl_dare import datasets

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", help="D4RL name, for example hopper-medium-v2")
    parser.add_argument("--rows", type=int, default=STAND_IN_ROWS)
    parser.add_argument("--out", type=Path, help="default: TASK-self-collected.hdf5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policy", type=Path, help="in place of the shipped policy")
    args = parser.parse_args()
    out = args.out or Path(f"{args.task}-self-collected.hdf5")
    try:
        collect(args.task, args.rows, out, args.seed, args.policy)
        print(datasets.card(datasets.resolve(args.task, source="file", path=out)))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
