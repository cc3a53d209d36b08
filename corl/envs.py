"""The environment of a task, and the task of a run's settings.

The locomotion environments are gymnasium's `Hopper-v4`, `HalfCheetah-v4` and `Walker2d-v4`:
observation, reward and termination equal those of the gym v2 classes that D4RL used (v5 does
not: other Walker2d model, no survival bonus on the terminating step). From MuJoCo 3.5 on the
contact margin of a geom pair is a sum instead of a maximum, which changes hopper's physics;
`make` halves the margins there, so that every MuJoCo gives D4RL's.
AntMaze is built in `antmaze.py`, and `adroit.py` gives gymnasium-robotics' Adroit D4RL's rewards.
Any other environment is made in `own_envs.py`.

A time-out is not an end: `terminated` says that the episode is over, `truncated` that we
stopped looking. Only `terminated` may cut the bootstrap.
"""

import copy
from typing import Any

import gymnasium as gym
import numpy as np

from corl import adroit, antmaze, locomotion, own_envs, physics, tasks


class ClipAction(gym.ActionWrapper):
    """Clips actions to the box before the step, as D4RL's wrapper does.

    gymnasium's v4 classes charge the control cost of the *unclipped* action. The action space
    stays the bounded one (gymnasium's own `ClipAction` widens it to infinity), because
    algorithms read `action_space.high` as `max_action`.
    """

    def action(self, action: np.ndarray) -> np.ndarray:
        """The action (A,) inside the box."""
        space: Any = self.action_space
        # The same as np.clip, which takes three times as long for so few numbers.
        return np.minimum(np.maximum(action, space.low), space.high)


def find_task(
    name: str,
    horizon: int | None = None,
    ref_min_score: float | None = None,
    ref_max_score: float | None = None,
) -> tasks.Task:
    """The task of a D4RL name or of a gymnasium id, whose environment is made to look at it.

    The other arguments are for a gymnasium id, see `own_envs.task`.

    Raises:
        ValueError: neither, or as of `own_envs.task`.
    """
    if not tasks.is_gymnasium_id(name):
        return tasks.task(name)
    return own_envs.task(name, horizon, ref_min_score, ref_max_score)


def task_of(config: Any) -> tasks.Task:
    """The task of a run's config; see `find_task`."""
    return find_task(
        config.env, config.horizon, config.ref_min_score, config.ref_max_score
    )


def make(name: tasks.Task | str, backend: str = "gymnasium") -> gym.Env:
    """The evaluation and training environment of a task, time limit included.

    Args:
        name: a task or its D4RL name.
        backend: `gymnasium` (default) or `d4rl`, the old gym + d4rl stack if it is installed.

    Returns:
        A gymnasium environment with the 5-tuple step and float64 observations (S,).

    Raises:
        ValueError: unknown task or backend, or a package that the task needs is not installed.
        ImportError: `backend="d4rl"` without gym and d4rl installed.
    """
    task = tasks.task(name)
    if not task.is_d4rls:
        return own_envs.make(task)
    if backend == "d4rl":
        return OldGymEnv(task.name, task.horizon)
    if backend != "gymnasium":
        raise ValueError(f"env_backend {backend!r} is not one of 'gymnasium', 'd4rl'")
    if task.robot == "antmaze":
        return make_antmaze(task)
    if not task.env_id:
        return ClipAction(gym.wrappers.TimeLimit(adroit.Adroit(task), task.horizon))
    return make_robot(task.robot)


def make_robot(robot: str) -> gym.Env:
    """The environment of a locomotion robot (`hopper`, `halfcheetah`, `walker2d`)."""
    # gymnasium warns at each make that v4 is not the newest version; v4 is chosen on purpose.
    logger_level = gym.logger.min_level
    gym.logger.min_level = gym.logger.ERROR
    try:
        spec = copy.copy(gym.spec(tasks.ROBOTS[robot].env_id))
        kind = locomotion.QUICK[spec.id]
        spec.entry_point = f"{kind.__module__}:{kind.__name__}"
        # The checker looks at the types of a first step; tests do that here.
        env = gym.make(spec, disable_env_checker=True)
    finally:
        gym.logger.min_level = logger_level
    base: Any = env.unwrapped
    physics.restore_contact_margin(base.model)
    return ClipAction(env)


def make_antmaze(task: tasks.Task) -> gym.Env:
    """The evaluation environment of an antmaze -v2 task; `diverse` and `play` share it.

    Raises:
        ValueError: a -v0 or -v1 task.
    """
    if task.version != "v2":
        raise ValueError(
            f"{task.name}: only antmaze's -v2 environments are here (-v0 and -v1 keep one "
            f"goal for good); use antmaze-{task.kind}-v2"
        )
    maze = antmaze.AntMaze(task.kind.partition("-")[0])
    return ClipAction(gym.wrappers.TimeLimit(maze, task.horizon))


class OldGymEnv(gym.Env):
    """An environment of the old `gym` + `d4rl` stack behind gymnasium's interface.

    Args:
        name: D4RL task name.
        horizon: time limit in steps; an end in that step counts as a time-out.

    Raises:
        ImportError: gym or d4rl is not installed.
    """

    def __init__(self, name: str, horizon: int):
        try:
            import d4rl  # noqa: F401  (registers the tasks)
            import gym as old_gym
        except ImportError as error:
            raise ImportError(
                f"env_backend 'd4rl' needs the packages gym and d4rl ({error}); "
                "see requirements-d4rl.txt, or use --env_backend gymnasium"
            ) from error
        self.old = old_gym.make(name)
        self.horizon = horizon
        self.steps = 0
        spaces = self.old.observation_space, self.old.action_space
        self.observation_space, self.action_space = (
            gym.spaces.Box(s.low, s.high, dtype=s.dtype.type) for s in spaces
        )

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode: observation (S,) and an empty dict."""
        super().reset(seed=seed)
        self.steps = 0
        if seed is not None:
            self.old.seed(seed)
        result = self.old.reset()
        return (result[0] if isinstance(result, tuple) else result), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Take an action (A,): observation (S,), reward, terminated, truncated, info."""
        self.steps += 1
        result = self.old.step(action)
        if len(result) == 5:
            return result
        observation, reward, done, info = result
        # Old gym says `done` for an end and for a time-out. D4RL and CORL take it for a
        # time-out when the limit is reached.
        terminated = bool(done) and self.steps < self.horizon
        return (
            observation,
            float(reward),
            terminated,
            bool(done) and not terminated,
            info,
        )

    def close(self) -> None:
        """Close the old environment."""
        self.old.close()


def seed(env: gym.Env, value: int) -> None:
    """Seed the resets and the action space without a reset, as old gym's `env.seed` did."""
    base = env.unwrapped
    if isinstance(base, OldGymEnv):
        base.old.seed(value)
    # Mazes and the kitchen draw from the generator of the robot inside them, too.
    inside = [part for part in vars(base).values() if isinstance(part, gym.Env)]
    for each in (base, *inside):
        each.np_random, _ = gym.utils.seeding.np_random(value)
    env.action_space.seed(value)
