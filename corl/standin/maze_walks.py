"""Rows of antmaze's stand-in: a walking ant is led through the maze as D4RL's was.

In every step the next cell on a shortest way to the goal gives a waypoint: its centre plus uniform
noise, or beside the goal the goal itself. The walker (`walker.py`) is told the direction of the
waypoint and nothing else; its action gets noise of 0.2 and is clipped. An episode goes on at its
goal, and its time-out flag comes one step after the time limit. Rewards and terminals are computed
afterwards, for the one goal that the task is evaluated on.
"""

from collections.abc import Callable

import numpy as np

from corl import antmaze, tasks
from corl.standin import policies, walker

ENVS = 16  # environments that run side by side and share a policy call
WAYPOINT_NOISE = 1.0  # width of the uniform draw that is added per axis
# Place of the goal that rows are labelled for, seen from the goal cell's centre: the mean of the
# goals that evaluations draw. D4RL labelled for one such draw, which is not published.
LABEL_OFFSET = sum(antmaze.GOAL_NOISE) / 2

# The fields of one row; `rollout` says what they hold.
ROW = np.dtype(
    [
        ("observations", np.float32, (29,)),
        ("actions", np.float32, (8,)),
        ("rewards", np.float32),
        ("terminals", np.bool_),
        ("timeouts", np.bool_),
        ("infos/goal", np.float32, (2,)),
        ("infos/qpos", np.float32, (15,)),
        ("infos/qvel", np.float32, (14,)),
    ]
)


def make_env(kind: str) -> antmaze.AntMaze:
    """The maze of a kind of data with the goals and starts of its walks.

    D4RL's collector starts umaze's walks at the evaluation's start and all others anywhere
    but at the goals of its map, to one of which it leads. Its published script does the same
    for `diverse`; the paper (Fu et al. 2020, §5) leads there to random goals, as is done here.
    """
    size, _, style = kind.partition("-")
    maze = antmaze.MAZES[size]
    if style == "diverse":
        return antmaze.AntMaze(size, goals=maze.free, starts=maze.free)
    starts = [cell for cell in maze.free if cell not in maze.play_goals]
    return antmaze.AntMaze(size, maze.play_goals, starts if style else None)


def waypoint(
    maze: antmaze.Maze, xy: np.ndarray, goal: np.ndarray, noise: np.ndarray
) -> np.ndarray:
    """Where to walk now (2,), from a place to a goal (2,); noise (2,) in [0, 1]."""
    goal_cell = maze.cell(goal)
    cell = maze.next_cell(maze.cell(xy), goal_cell)
    if cell == goal_cell:
        return goal
    return maze.position(cell) + WAYPOINT_NOISE * noise


def label_goal(maze: antmaze.Maze) -> np.ndarray:
    """The goal (2,) that rewards and terminals are computed for."""
    return maze.position(maze.cells("G")[0]) + LABEL_OFFSET


def rollout(
    task: tasks.Task,
    policy: policies.TanhGaussianPolicy,
    rows: int,
    seed: np.random.SeedSequence,
    advance: Callable[[int], object] = lambda rows: None,
    whole: bool = False,
) -> np.ndarray:
    """Rows of episodes of horizon + 1 steps; exactly `rows`, the last one cut, unless `whole`.

    Args:
        task: an antmaze task.
        policy: maps `walker.features` to actions.
        advance: told about new rows, `rows` in all.
        whole: goes on to the end of the last episode.

    Returns:
        Table (N,) of `ROW`: observations (29,), actions (8,), rewards and infos float32,
        terminals and timeouts bool. infos/goal is the goal of the walk, not of the reward.
        infos/qpos, infos/qvel are those *after* the action, as in D4RL's antmaze: at a
        time-out they alone tell the next state.
    """
    length = task.horizon + 1
    words = seed.generate_state(1 + min(ENVS, -(-rows // length)))
    rng = np.random.default_rng(int(words[0]))
    mazes = [make_env(task.kind) for _ in words[1:]]
    for env, word in zip(mazes, words[1:], strict=True):
        env.np_random = np.random.default_rng(int(word))
    pieces, written, told = [], 0, 0

    def tell(new: int) -> None:
        nonlocal told
        told += (new := min(new, rows - told))
        advance(new)

    while written < rows:
        left = rows - written
        mazes = mazes[: -(-left // length)]
        steps = length if whole else min(length, left)
        table = _walks(mazes, policy, steps, rng, tell)
        table["timeouts"][:, length - 1 :] = True
        pieces.append(table.reshape(-1))
        written += table.size
    table = np.concatenate(pieces)
    return table if whole else table[:rows]


def _walks(
    mazes: list[antmaze.AntMaze],
    policy: policies.TanhGaussianPolicy,
    steps: int,
    rng: np.random.Generator,
    advance: Callable[[int], object],
) -> np.ndarray:
    """One walk of `steps` in each maze: a table (B, steps) of `ROW` without time-outs."""
    count, maze = len(mazes), mazes[0].maze
    states = np.array([env.reset()[0] for env in mazes])  # (B, 29)
    goals = np.array([env.goal for env in mazes])  # (B, 2)
    target = label_goal(maze)
    table = np.zeros((count, steps), ROW)
    table["infos/goal"] = goals[:, None]
    for t in range(steps):
        noise = rng.uniform(0.0, 1.0, (count, 2))
        jitter = walker.NOISE * rng.standard_normal((count, policies.ACTIONS))
        places = states[:, :2]
        ways = zip(places, goals, noise, strict=True)
        waypoints = np.array([waypoint(maze, *way) for way in ways])
        directions = waypoints - places
        # An ant on its waypoint may walk anywhere.
        directions[(directions == 0).all(1)] = 1.0, 0.0
        means = walker.act(policy, walker.features(states, directions))
        actions = np.clip(means + jitter, -1.0, 1.0).astype(np.float32)
        table["observations"][:, t], table["actions"][:, t] = states, actions
        for i, env in enumerate(mazes):
            states[i] = env.step(actions[i])[0]
        table["infos/qpos"][:, t], table["infos/qvel"][:, t] = np.split(states, [15], 1)
        advance(count)
    away = np.linalg.norm(table["infos/qpos"][..., :2] - target, axis=-1)
    table["terminals"] = away <= antmaze.GOAL_RADIUS
    table["rewards"] = table["terminals"]
    return table
