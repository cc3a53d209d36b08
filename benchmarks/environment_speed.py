"""Where the time of acting goes: policy call, environment step, replay buffer, evaluation.

    python benchmarks/environment_speed.py [--task hopper-medium-v2] [--seconds 1] [--rounds 5]
                                           [--episodes 10] [--out results/speed/FILE.json]

One thread. The policy is IQL's network with the weights of the stand-in's medium policy, so that
the robot walks. The parts take turns, round by round, and the first round is dropped. A time is the
processor's, in µs per call, so that other programs add little; the table shows the median over
rounds, the smallest and the largest. `MuJoCo alone` are the substeps of the same environment steps,
which no program around them can save. `gymnasium's` is its own environment in our wrappers. A
ratio is that line of its group, so many times faster than the first line of the group. An
evaluation is given per environment step: all episodes one at a time, and side by side
(`eval_together`).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from algorithms import iql
from corl import acting, arguments, envs, machine, physics, tasks
from corl.standin import policies

# What a policy call and an environment step together are to stay below, in µs.
GOAL = 120.0
# Calls between two looks at the clock.
BURST = 50
ALONE, SIDE_BY_SIDE = "evaluation, one at a time", "evaluation, together"
GYMNASIUMS, STEP, CALL = (
    "environment step, gymnasium's",
    "environment step",
    "policy call",
)


def walking_policy(task: tasks.Task, config: Any) -> iql.GaussianPolicy:
    """IQL's policy that acts as the shipped medium policy, with little noise where it explores."""
    sizes = task.state_dim, task.action_dim
    actor = iql.make_trainer(config, *sizes, 1.0, "cpu").actor
    shipped = policies.load_policy(policies.shipped(task.robot, "medium")[0])
    layers = [
        [m for m in net if isinstance(m, torch.nn.Linear)]
        for net in (actor.net.net, shipped.net)
    ]
    with torch.no_grad():
        for ours, theirs in zip(*layers, strict=True):
            # The last layer also has standard deviations.
            ours.weight.copy_(theirs.weight[: len(ours.weight)])
            ours.bias.copy_(theirs.bias[: len(ours.bias)])
        actor.log_std.fill_(-3.0)
    return actor


def wrapped(env: gym.Env, config: Any) -> gym.Env:
    """The environment as a run has it; states stay raw, as the policy takes them."""
    return acting.wrap_env(acting.CheckedEnv(env, "training", config), 0.0, 1.0)


def gymnasiums(task: tasks.Task) -> gym.Env:
    """Gymnasium's own environment with D4RL's physics and clipped actions."""
    level, gym.logger.min_level = gym.logger.min_level, gym.logger.ERROR
    try:
        env = gym.make(task.env_id)
    finally:
        gym.logger.min_level = level
    base: Any = env.unwrapped
    physics.restore_contact_margin(base.model)
    return envs.ClipAction(env)


def episode(env: gym.Env, actor: iql.GaussianPolicy) -> list[np.ndarray]:
    """The actions (A,) of the episode of seed 0."""
    state, actions, over = env.reset(seed=0)[0], [], False
    while not over:
        actions.append(actor.act(state, "cpu"))
        state, _, terminated, truncated, _ = env.step(actions[-1])
        over = terminated or truncated
    return actions


def replaying(
    env: gym.Env, actions: list[np.ndarray], step: Callable[[np.ndarray], Any]
) -> Callable[[], Any]:
    """The next step of the episode of seed 0, which begins again at its end."""
    env.reset(seed=0)
    place = 0

    def call() -> None:
        nonlocal place
        if place == len(actions):
            env.reset(seed=0)
            place = 0
        step(actions[place])
        place += 1

    return call


def parts(task: tasks.Task, config: Any) -> dict[str, Callable[[], Any]]:
    """Name -> one call of it."""
    actor = walking_policy(task, config)
    sizes = task.state_dim, task.action_dim
    env, bare, run = (wrapped(envs.make(task), config) for _ in range(3))
    theirs = wrapped(gymnasiums(task), config)
    actor.eval()
    actions = episode(env, actor)
    base: Any = bare.unwrapped

    def substeps(action: np.ndarray) -> None:
        base.data.ctrl[:] = action
        mujoco.mj_step(base.model, base.data, nstep=base.frame_skip)

    buffers = [iql.ReplayBuffer(*sizes, 100_000, "cpu") for _ in range(2)]
    collector = acting.OnlineCollector(run, buffers[0], task, "cpu")
    state, row = collector.state, (collector.state, actions[0], 1.0, collector.state)
    actor.train()
    return {
        GYMNASIUMS: replaying(theirs, actions, theirs.step),
        STEP: replaying(env, actions, env.step),
        "MuJoCo alone": replaying(bare, actions, substeps),
        CALL: lambda: actor.act(state, "cpu"),
        "add_transition": lambda: buffers[1].add_transition(*row, False),
        "collector step": lambda: collector.step(actor),
    }


def evaluations(
    task: tasks.Task, config: Any, episodes: int
) -> dict[str, Callable[[], int]]:
    """Name -> an evaluation, which returns the number of its environment steps."""
    actor = walking_policy(task, config)
    count = min(episodes, acting.TOGETHER)
    made = [wrapped(envs.make(task), config) for _ in range(count)]
    steps = 0
    act = actor.act

    def counted(state: np.ndarray, device: str) -> np.ndarray:
        nonlocal steps
        steps += state.size // task.state_dim
        return act(state, device)

    actor.act = counted

    def measured(evaluate: Callable[..., Any], where: Any) -> int:
        before = steps
        evaluate(where, actor, "cpu", episodes, 0)
        return steps - before

    return {
        ALONE: lambda: measured(acting.eval_actor, made[0]),
        SIDE_BY_SIDE: lambda: measured(acting.eval_together, made),
    }


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """µs per call of every part in every round, taking turns."""
    task = tasks.task(args.task)
    config = iql.TrainConfig(env=task.name, threads=1, compile=False)
    calls, whole = parts(task, config), evaluations(task, config, args.episodes)
    times: dict[str, list[float]] = {name: [] for name in (*calls, *whole)}
    for turn in range(args.rounds + 1):
        for name, call in calls.items():
            count, start = 0, time.process_time()
            while time.process_time() - start < args.seconds:
                for _ in range(BURST):
                    call()
                count += BURST
            if turn > 0:
                times[name].append(1e6 * (time.process_time() - start) / count)
        for name, evaluate in whole.items():
            start = time.process_time()
            steps = evaluate()
            if turn > 0:
                times[name].append(1e6 * (time.process_time() - start) / steps)
    return times


def table(times: dict[str, list[float]]) -> str:
    """One line per part; a ratio is the median over rounds of the base's time by this one's."""
    bases = {STEP: GYMNASIUMS, "MuJoCo alone": GYMNASIUMS, SIDE_BY_SIDE: ALONE}
    lines = [f"{'µs: median (min-max)':>58}  ratio"]
    for name, values in times.items():
        ratio = ""
        if name in bases:
            pairs = zip(times[bases[name]], values, strict=True)
            ratio = f"{statistics.median(base / own for base, own in pairs):6.2f}"
        median = statistics.median(values)
        spread = f"{median:8.1f} ({min(values):.1f}-{max(values):.1f})"
        lines.append(f"{name:<34} {spread:<26} {ratio}".rstrip())
    both = [sum(pair) for pair in zip(times[CALL], times[STEP], strict=True)]
    lines.append(
        f"policy call and environment step: {statistics.median(both):.1f} µs, "
        f"the goal is {GOAL:.0f}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    walkers = [
        f"{robot}-medium-v2" for robot, facts in tasks.ROBOTS.items() if facts.env_id
    ]
    parser.add_argument("--task", choices=walkers, default="hopper-medium-v2")
    parser.add_argument(
        "--seconds",
        type=arguments.number(float, "(0, 1e6]"),
        default=1.0,
        help="per part and round",
    )
    parser.add_argument("--rounds", type=arguments.number(int, "[1, 1e6]"), default=5)
    parser.add_argument("--episodes", type=arguments.number(int, "[1, 1e6]"), default=10)
    parser.add_argument("--out", type=arguments.path, help="write the numbers as JSON")
    args = parser.parse_args()
    machine.configure_threads(1)
    print(f"{machine.describe()['processor']}, 1 thread, torch {torch.__version__}")
    with arguments.errors_in_one_line():
        times = measure(args)
        print(table(times))
        if args.out is not None:
            record = {
                "command": " ".join(
                    ["python benchmarks/environment_speed.py", *sys.argv[1:]]
                ),
                "microseconds": times,
                "task": args.task,
                "episodes": args.episodes,
                "threads": 1,
                "machine": machine.describe(),
                "versions": machine.versions(),
                "commit": machine.git_commit(),
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
