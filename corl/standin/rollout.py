"""TODO corl.standin.rollout"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch

from corl import envs, tasks
from corl.standin import policies

CHUNK = (
    200_000  # rows that are rolled out in one go, and kept when the rest is interrupted
)
ENVS = 16  # that share a policy call; twice the speed of one, more gain little


@dataclass(frozen=True)
class Chunk:
    """Rows that one behavior makes in one go."""

    part: int  # place of the behavior in the file
    number: int  # place in the part
    behavior: policies.Behavior
    rows: int
    whole: bool  # goes on to the end of its last episode, so that no chunk cuts one


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a file."""

    robot: str
    parts: tuple[
        tuple[policies.Behavior, int], ...
    ]  # in the order of the file, with their rows
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
    facts = tasks.task(task)
    if rows < 2:
        raise ValueError(f"rows is {rows}; a dataset needs at least 2")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if policy is not None and (
        facts.kind not in policies.SINGLE[1:] or not facts.env_id
    ):
        raise ValueError(
            f"policy is given, but {task} is not rolled out from one policy; use a "
            "medium or expert task of a locomotion robot"
        )
    if policy is None:
        policies.levels_of(facts)
    policy = Path(policy) if policy else None
    if mix is not None:
        parts = _mixture(facts, rows, policy, mix, share)
    elif facts.kind in policies.SINGLE:
        parts = [(policies.single(facts, facts.kind, policy), rows)]
    elif facts.robot == "antmaze":
        parts = [(policies.single(facts, "walker"), rows)]
    elif facts.kind == "medium-expert":
        halves = rows // 2, rows - rows // 2
        parts = [
            (policies.single(facts, level), half)
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
            policies.fingerprint(task) if "-replay-" in task else used, sort_keys=True
        ),
    }
    if mix is not None:
        settings |= {"mix": mix, "share": share}
    return Plan(facts.robot, tuple(parts), mix is not None, settings, policy)


def _mixture(
    task: tasks.Task, rows: int, policy: Path | None, mix: str, share: float
) -> list[tuple[policies.Behavior, int]]:
    if (
        task.kind not in policies.SINGLE
        or mix not in policies.SINGLE
        or mix == task.kind
    ):
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
    steps = [b.step for b in series]
    middles = [(a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)]
    starts = np.maximum([0, *middles], facts["warmup"])
    seams = np.round(rows * np.array([0, *starts, end]) / end).astype(int)
    counts = np.diff(seams).tolist()
    behaviors = [policies.Behavior("random"), *series]
    return [(b, n) for b, n in zip(behaviors, counts, strict=True) if n]


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
    behavior: policies.Behavior,
    states: np.ndarray,
    action_dim: int,
    generator: torch.Generator,
    judges: tuple[policies.Behavior, ...] = (),
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
    behavior: policies.Behavior,
    robot: str,
    rows: int,
    seed: np.random.SeedSequence,
    advance: Callable[[int], object] = lambda rows: None,
    judges: tuple[policies.Behavior, ...] = (),
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
    facts = tasks.ROBOTS[robot]
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


def _row_type(env: gymnasium.Env, judges: tuple[policies.Behavior, ...]) -> np.dtype:
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
