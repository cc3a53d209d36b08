"""D4RL task name -> environment, horizon and reference scores.

The locomotion environments are gymnasium's `Hopper-v4`, `HalfCheetah-v4` and `Walker2d-v4`:
observation, reward and termination equal those of the gym v2 classes that D4RL used (v5 does
not: other Walker2d model, no survival bonus on the terminating step). From MuJoCo 3.5 on the
contact margin of a geom pair is a sum instead of a maximum, which changes hopper's physics;
`make` halves the margins there, so that every MuJoCo gives D4RL's.
AntMaze is built in `antmaze.py`.

A time-out is not an end: `terminated` says that the episode is over, `truncated` that we
stopped looking. Only `terminated` may cut the bootstrap.
"""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

KINDS = ("random", "medium", "medium-replay", "medium-expert", "expert", "full-replay")
ANTMAZES = (
    "umaze",
    "umaze-diverse",
    "medium-play",
    "medium-diverse",
    "large-play",
    "large-diverse",
)
ADROIT = ("human", "cloned", "expert")


@dataclass(frozen=True)
class Robot:
    """What D4RL fixes per robot; scores are raw returns."""

    env_id: str  # gymnasium id whose physics, reward and termination equal D4RL's
    state_dim: int
    action_dim: int
    ref_min: float  # return of the score 0, from D4RL
    ref_max: float  # return of the score 100, from D4RL
    horizon: int = 1000  # time limit in environment steps
    kinds: tuple[str, ...] = KINDS  # of data that D4RL has for it
    versions: tuple[str, ...] = ("v0", "v1", "v2")


ROBOTS = {
    "hopper": Robot("Hopper-v4", 11, 3, -20.272305, 3234.3),
    "halfcheetah": Robot("HalfCheetah-v4", 17, 6, -280.178953, 12135.0),
    "walker2d": Robot("Walker2d-v4", 17, 6, 1.629008, 4592.3),
    "antmaze": Robot("", 29, 8, 0.0, 1.0, kinds=ANTMAZES),
    "pen": Robot("", 45, 24, 96.262799, 3076.8331017826877, 100, ADROIT, ("v0", "v1")),
    "door": Robot("", 39, 28, -56.512833, 2880.5693087298737, 200, ADROIT, ("v0", "v1")),
    "hammer": Robot(
        "", 46, 26, -274.856578, 12794.134825156867, 200, ADROIT, ("v0", "v1")
    ),
    "relocate": Robot(
        "", 39, 30, -6.425911, 4233.877797728884, 200, ADROIT, ("v0", "v1")
    ),
}


@dataclass(frozen=True)
class Task:
    """One D4RL task: a robot and the kind of data it comes with."""

    name: str  # hopper-medium-replay-v2
    robot: str  # hopper
    kind: str  # medium-replay
    version: str  # v2
    env_id: str
    state_dim: int
    action_dim: int
    ref_min: float
    ref_max: float
    horizon: int


def task_names() -> list[str]:
    """Every -v2 task name that `task` knows; Adroit's tasks end with -v1."""
    return [
        f"{r}-{k}-v2" for r, f in ROBOTS.items() if "v2" in f.versions for k in f.kinds
    ]


def task(name: str) -> Task:
    """Look up a D4RL task name such as `hopper-medium-replay-v2`.

    Raises:
        ValueError: the name is not a D4RL task known here; the message lists those that are.
    """
    robot, _, rest = name.partition("-")
    kind, _, version = rest.rpartition("-")
    facts = ROBOTS.get(robot)
    if facts is None or kind not in facts.kinds or version not in facts.versions:
        raise ValueError(
            f"unknown task {name!r}; known tasks: {', '.join(task_names())}, "
            "{pen,door,hammer,relocate}-{human,cloned,expert}-v1"
        )
    horizon = 700 if kind.startswith("umaze") else facts.horizon
    return Task(
        name,
        robot,
        kind,
        version,
        facts.env_id,
        facts.state_dim,
        facts.action_dim,
        facts.ref_min,
        facts.ref_max,
        horizon,
    )


def normalized_score(name: str, returns: Any) -> np.ndarray:
    """D4RL-normalized score in percent: 100 (return - min) / (max - min), same shape as `returns`.

    D4RL's own `get_normalized_score` is the fraction; every paper prints the percentage.
    """
    facts = task(name)
    return (
        100.0
        * (np.asarray(returns, dtype=np.float64) - facts.ref_min)
        / (facts.ref_max - facts.ref_min)
    )


class ClipAction(gym.ActionWrapper):
    """Clips actions to the box before the step, as D4RL's wrapper does.

    gymnasium's v4 classes charge the control cost of the *unclipped* action. The action space
    stays the bounded one (gymnasium's own `ClipAction` widens it to infinity), because
    algorithms read `action_space.high` as `max_action`.
    """

    def action(self, action: np.ndarray) -> np.ndarray:
        return np.clip(action, self.action_space.low, self.action_space.high)


def make(name: str, backend: str = "gymnasium") -> gym.Env:
    """The evaluation and training environment of a D4RL task, time limit included.

    Args:
        name: D4RL task name.
        backend: `gymnasium` (default) or `d4rl`, the old gym + d4rl stack if it is installed.

    Returns:
        A gymnasium environment with the 5-tuple step and float64 observations (S,).

    Raises:
        ValueError: unknown task or backend, or a task that has no environment on this backend.
        ImportError: `backend="d4rl"` without gym and d4rl installed.
    """
    facts = task(name)
    if backend == "d4rl":
        return OldGymEnv(name, facts.horizon)
    if backend != "gymnasium":
        raise ValueError(f"env_backend {backend!r} is not one of 'gymnasium', 'd4rl'")
    if facts.robot == "antmaze":
        return make_antmaze(facts)
    if not facts.env_id:
        raise ValueError(
            f"{name}: gymnasium has no environment with D4RL's {facts.robot} physics; "
            "install requirements-d4rl.txt with mujoco_py and pass --env_backend d4rl"
        )
    return make_robot(facts.robot)


def make_robot(robot: str) -> gym.Env:
    """The environment of a locomotion robot (`hopper`, `halfcheetah`, `walker2d`)."""
    # gymnasium warns at each make that v4 is not the newest version; here v4 is the point.
    logger_level = gym.logger.min_level
    gym.logger.min_level = gym.logger.ERROR
    try:
        env = gym.make(ROBOTS[robot].env_id)
    finally:
        gym.logger.min_level = logger_level
    restore_contact_margin(env.unwrapped.model)
    return ClipAction(env)


def make_antmaze(facts: Task) -> gym.Env:
    """The evaluation environment of an antmaze -v2 task; `diverse` and `play` share it.

    Raises:
        ValueError: a -v0 or -v1 task.
    """
    from corl_dare import antmaze

    if facts.version != "v2":
        raise ValueError(
            f"{facts.name}: only antmaze's -v2 environments are here (-v0 and -v1 keep one "
            f"goal for good); use antmaze-{facts.kind}-v2"
        )
    maze = antmaze.AntMaze(facts.kind.partition("-")[0])
    return ClipAction(gym.wrappers.TimeLimit(maze, facts.horizon))


def restore_contact_margin(model: Any) -> None:
    """Halve the geom margins on MuJoCo >= 3.5, where a pair's margin became the sum of both."""
    import mujoco

    if tuple(int(v) for v in mujoco.__version__.split(".")[:2]) >= (3, 5):
        model.geom_margin[:] *= 0.5


class OldGymEnv(gym.Env):
    """An environment of the old `gym` + `d4rl` stack behind gymnasium's interface."""

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

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.steps = 0
        if seed is not None:
            self.old.seed(seed)
        result = self.old.reset()
        return (result[0] if isinstance(result, tuple) else result), {}

    def step(self, action):
        self.steps += 1
        result = self.old.step(action)
        if len(result) == 5:
            return result
        observation, reward, done, info = result
        # Old gym says `done` for both; D4RL's and CORL's rule is that the limit is a time-out.
        terminated = bool(done) and self.steps < self.horizon
        return (
            observation,
            float(reward),
            terminated,
            bool(done) and not terminated,
            info,
        )

    def close(self):
        self.old.close()


def seed(env: gym.Env, value: int) -> None:
    """Seed the resets and the action space without a reset, as old gym's `env.seed` did."""
    base = env.unwrapped
    if isinstance(base, OldGymEnv):
        base.old.seed(value)
    base.np_random, _ = gym.utils.seeding.np_random(value)
    env.action_space.seed(value)


def get_state(env: gym.Env) -> dict[str, Any]:
    """Everything that decides the environment's future, as plain arrays and numbers.

    The physics (MuJoCo's full state with the solver's warm start, which the next step reads; an
    environment of another kind answers with its own `get_state`), the elapsed steps of the time
    limit and the reset generators.

    Raises:
        TypeError: the environment offers neither.
    """
    base = env.unwrapped
    if hasattr(base, "get_state"):
        physics = base.get_state()
    elif hasattr(base, "model") and hasattr(base, "data"):
        import mujoco

        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(base.model, spec))
        mujoco.mj_getState(base.model, base.data, physics, spec)
    else:
        raise TypeError(
            f"{type(base).__name__} has no state to save; exact resume needs the "
            "gymnasium backend"
        )
    return {
        "physics": physics,
        "elapsed_steps": env.get_wrapper_attr("_elapsed_steps"),
        "generator": base.np_random.bit_generator.state,
        "action_space": env.action_space.np_random.bit_generator.state,
    }


def set_state(env: gym.Env, state: dict[str, Any]) -> None:
    """Put an environment into a state of `get_state`; the next steps are bit-identical."""
    env.reset()
    base = env.unwrapped
    if hasattr(base, "set_state") and hasattr(base, "get_state"):
        base.set_state(state["physics"])
    else:
        import mujoco

        spec = mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_setState(base.model, base.data, state["physics"], spec)
        # Derived quantities (xpos, sensor data) are functions of the state. Some MuJoCo
        # versions write a fresh warm start in forward, so the saved one is put back.
        mujoco.mj_forward(base.model, base.data)
        mujoco.mj_setState(base.model, base.data, state["physics"], spec)
    wrapper = env
    while not isinstance(wrapper, gym.wrappers.TimeLimit):
        wrapper = wrapper.env
    wrapper._elapsed_steps = state["elapsed_steps"]
    base.np_random.bit_generator.state = state["generator"]
    env.action_space.np_random.bit_generator.state = state["action_space"]
