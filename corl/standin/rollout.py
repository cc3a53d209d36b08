"""Which policy makes which rows of a stand-in, and the rows themselves.

A `Plan` holds all that decides the bytes of a file. It is cut into chunks that are rolled out
each for itself, so that an interrupted collection loses one chunk at most.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gymnasium
import numpy as np
import torch

from corl import envs, tasks
from corl.standin import policies

# Rows that are rolled out in one go, and kept when the rest is interrupted.
CHUNK = 200_000
# Environments that share a policy call: twice the speed of one; more gain little.
ENVS = 16


@dataclass(frozen=True)
class Chunk:
    """Rows that one behavior makes in one go."""

    part: int  # place of the behavior in the file
    number: int  # place of the chunk in the part
    behavior: policies.Behavior
    rows: int
    whole: bool  # goes on to the end of its last episode, so that no chunk cuts one


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a file."""

    task: tasks.Task
    # Behaviors with their rows, in the order of the file.
    parts: tuple[tuple[policies.Behavior, int], ...]
    # Whole episodes of the parts are to be put in random order.
    mixed: bool
    # What the file's attributes say of it.
    settings: dict[str, Any]
    # The file of a policy that is given in place of the shipped one.
    policy: Path | None = None

    @property
    def chunks(self) -> list[Chunk]:
        """The plan in pieces of CHUNK rows, in the order of the file."""
        found = []
        for part, (behavior, rows) in enumerate(self.parts):
            for number, start in enumerate(range(0, rows, CHUNK)):
                rest = rows - start
                found.append(
                    Chunk(part, number, behavior, min(CHUNK, rest), rest > CHUNK)
                )
        return found


def make_plan(
    task: tasks.Task,
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
    if rows < 2:
        raise ValueError(f"rows is {rows}; a dataset needs at least 2")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    one_policy = task.kind in policies.SINGLE[1:] and task.env_id
    if policy is not None and not one_policy:
        raise ValueError(
            f"policy is given, but {task.name} is not rolled out from one policy; use a "
            "medium or expert task of a locomotion robot"
        )
    if policy is None:
        policies.levels_of(task)
    policy = Path(policy) if policy else None
    if mix is not None:
        parts = _mixture(task, rows, policy, mix, share)
    else:
        parts = _parts(task, rows, policy)
    used = {b.level: b.sha256 for b, _ in parts if b.policy is not None}
    if task.kind.endswith("-replay"):
        used = policies.fingerprint(task)
    settings: dict[str, Any] = {
        "source": "self-collected",
        "task": task.name,
        "rows": rows,
        "seed": seed,
        "policies": json.dumps(used, sort_keys=True, allow_nan=False),
    }
    if mix is not None:
        settings |= {"mix": mix, "share": share}
    return Plan(task, tuple(parts), mix is not None, settings, policy)


def _parts(
    task: tasks.Task, rows: int, policy: Path | None
) -> list[tuple[policies.Behavior, int]]:
    """The behaviors of a kind of data with their rows, in the order of the file."""
    if task.kind in policies.SINGLE:
        return [(policies.single(task, task.kind, policy), rows)]
    if task.robot == "antmaze":
        return [(policies.single(task, "walker"), rows)]
    if task.kind == "medium-expert":
        half = rows // 2
        medium, expert = (policies.single(task, k) for k in ("medium", "expert"))
        return [(medium, half), (expert, rows - half)]
    return _replay(task, rows)


def _mixture(
    task: tasks.Task, rows: int, policy: Path | None, mix: str, share: float
) -> list[tuple[policies.Behavior, int]]:
    """The task's own policy and the one of the kind `mix`, with their rows."""
    kinds = {task.kind, mix}
    if len(kinds) < 2 or not kinds <= set(policies.SINGLE):
        raise ValueError(
            f"mix {mix!r} into {task.name}: a mixture takes two different ones of "
            f"{', '.join(policies.SINGLE)}"
        )
    policies.levels_of(tasks.task(f"{task.robot}-{mix}-v2"))
    others = round(rows * share) if math.isfinite(share) else 0
    if not 0 < others < rows:
        raise ValueError(
            f"share is {share}, which is {others} of {rows} rows; it must be between 0 "
            "and 1 and leave rows to both policies"
        )
    own = policies.single(task, task.kind, policy)
    return [(own, rows - others), (policies.single(task, mix), others)]


def _replay(task: tasks.Task, rows: int) -> list[tuple[policies.Behavior, int]]:
    """Rows in training order, each from the policy that was nearest in the training.

    The first training steps acted uniformly. A snapshot stands for the steps from the
    middle to its predecessor up to the middle to its successor.
    """
    path, facts = policies.shipped(task.robot, "series")
    series = policies.load_behaviors(path, "series", task, facts)
    end = series[-1].step
    if task.kind == "medium-replay":
        end = policies.shipped(task.robot, "medium")[1]["step"]
        series = [b for b in series if b.step <= end]
    if not series:
        raise ValueError(f"policy file {path} has no snapshot up to step {end}")
    # Every policy of a series knows its step.
    steps = [cast(int, b.step) for b in series]
    middles = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    starts = np.maximum([0, *middles], facts["warmup"])
    seams = np.round(rows * np.array([0, *starts, end]) / end).astype(int)
    counts = np.diff(seams).tolist()
    behaviors = [policies.Behavior("random"), *series]
    return [(b, n) for b, n in zip(behaviors, counts, strict=True) if n]


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch uses one thread.

    Splitting a product over threads changes its last bits, and then all that follows.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _act(
    behavior: policies.Behavior,
    states: np.ndarray,
    action_dim: int,
    generator: torch.Generator,
    judges: tuple[policies.Behavior, ...] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sampled actions and their log-densities in nats, for states (B, S) float32.

    Returns:
        actions (B, A), their log-densities (B,) under the behavior and (B, J) under the judges.
    """
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
            assert u is not None
            judged[:, j] = judge.policy.log_prob_of_tanh(inputs, u)
    return actions.numpy(), log_probs.numpy(), judged


class _Episodes:
    """The rows of episodes that run side by side, kept in the order in which these started.

    An order by completion would favour short episodes, because the long ones would still be
    running at the end.
    """

    def __init__(self, count: int, horizon: int, row_type: np.dtype):
        self.buffers = [np.zeros(horizon, row_type) for _ in range(count)]
        self.lengths = [0] * count
        # Number of the episode that runs in each environment.
        self.running = list(range(count))
        self.started = count
        # Finished episodes by their number.
        self.over: dict[int, np.ndarray] = {}
        # The earliest episode that still runs, and the rows of all before it.
        self.first = self.before = 0

    def add(self, i: int, row: tuple) -> None:
        """Append a row to the episode that runs in environment i."""
        self.buffers[i][self.lengths[i]] = row
        self.lengths[i] += 1

    def end(self, i: int) -> None:
        """The episode in environment i is over; the next one begins there."""
        self.over[self.running[i]] = self.buffers[i][: self.lengths[i]].copy()
        self.running[i], self.lengths[i] = self.started, 0
        self.started += 1
        while self.first in self.over:
            self.before += len(self.over[self.first])
            self.first += 1

    def ready(self, whole: bool) -> int:
        """Rows that `table` would have."""
        unfinished = 0 if whole else self.lengths[self.running.index(self.first)]
        return self.before + unfinished

    def table(self, whole: bool) -> np.ndarray:
        """All rows up to the earliest running episode, with those it has unless `whole`."""
        pieces = [self.over[number] for number in range(self.first)]
        if not whole:
            last = self.running.index(self.first)
            pieces.append(self.buffers[last][: self.lengths[last]])
        return np.concatenate(pieces)


def rollout(
    behavior: policies.Behavior,
    robot: str,
    rows: int,
    seed: np.random.SeedSequence,
    advance: Callable[[int], object] = lambda rows: None,
    judges: tuple[policies.Behavior, ...] = (),
    whole: bool = False,
) -> np.ndarray:
    """Transitions of whole episodes; exactly `rows`, the last episode cut, unless `whole`.

    Episodes come in the order in which they started.

    Args:
        robot: name of a locomotion robot.
        advance: told about new rows, `rows` in all.
        judges: behaviors whose densities of the actions are stored as well.
        whole: goes on to the end of the last episode.

    Returns:
        Table (N,) with D4RL's per-row keys as fields; observations (S,), actions (A,),
        rewards float32, terminals, timeouts bool, infos/qpos, infos/qvel float64 of the
        state that the action was taken in, infos/action_log_probs and, per judge,
        infos/log_probs/LEVEL float32 in nats.
    """
    facts = tasks.ROBOTS[robot]
    seeds = seed.generate_state(1 + max(1, min(ENVS, rows // facts.horizon)))
    generator = torch.Generator().manual_seed(int(seeds[0]))
    robots = [envs.make_robot(robot) for _ in seeds[1:]]
    starts = [e.reset(seed=int(s))[0] for e, s in zip(robots, seeds[1:], strict=True)]
    states = np.asarray(starts, dtype=np.float32)  # (B, S)
    episodes = _Episodes(len(robots), facts.horizon, row_type(robots[0], judges))
    told = 0
    while episodes.ready(whole) < rows:
        acted = _act(behavior, states, facts.action_dim, generator, judges)
        for i, (env, *drawn) in enumerate(zip(robots, *acted, strict=True)):
            states[i] = _step(env, episodes, i, states[i], *drawn)
        advance(min(len(robots), rows - told))
        told = min(rows, told + len(robots))
    for env in robots:
        env.close()
    table = episodes.table(whole)
    return table if whole else table[:rows]


def _step(
    env: gymnasium.Env,
    episodes: _Episodes,
    i: int,
    state: np.ndarray,
    action: np.ndarray,
    log_prob: np.ndarray,
    judged: np.ndarray,
) -> np.ndarray:
    """Take an action (A,) in environment i and note the row; the state (S,) to go on from."""
    base: Any = env.unwrapped
    data = base.data
    physics = data.qpos.copy(), data.qvel.copy()
    next_state, reward, terminated, truncated, _ = env.step(action)
    # An end in the last step before the time limit is stored as a time-out, as in D4RL.
    flags = terminated and not truncated, truncated
    row = (state, action, reward, next_state, *flags, log_prob, *physics, *judged)
    episodes.add(i, row)
    if terminated or truncated:
        episodes.end(i)
        next_state, _ = env.reset()
    return next_state


def row_type(env: gymnasium.Env, judges: tuple[policies.Behavior, ...]) -> np.dtype:
    """The fields of one row of `rollout`."""
    state, action = env.observation_space.shape, env.action_space.shape
    base: Any = env.unwrapped
    data = base.data
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
