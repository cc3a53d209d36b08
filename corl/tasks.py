"""D4RL's tasks: a name is parsed once into a frozen `Task`, which is passed on.

A `Task` knows the sizes of states and actions, the time limit and the returns between which D4RL
normalizes its scores.
"""

import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np

# Kinds of data: of the locomotion robots, of antmaze, of Adroit's hands.
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
    """What D4RL fixes for a robot."""

    # gymnasium's environment with D4RL's physics, reward and termination; empty: there is none
    env_id: str
    state_dim: int
    action_dim: int
    ref_min: float  # raw return that D4RL gives the score 0
    ref_max: float  # raw return that D4RL gives the score 100
    horizon: int = 1000  # time limit in environment steps
    kinds: tuple[str, ...] = KINDS  # kinds of data that D4RL has for the robot
    versions: tuple[str, ...] = ("v0", "v1", "v2")  # of its tasks' names


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
    """One D4RL task: a robot and the kind of data it comes with; see `Robot` for the facts."""

    # The comments show the parts of hopper-medium-replay-v2.
    name: str  # hopper-medium-replay-v2
    robot: str  # hopper
    kind: str  # medium-replay
    version: str  # v2
    env_id: str  # Hopper-v4; empty where gymnasium has no such environment
    state_dim: int
    action_dim: int
    ref_min: float
    ref_max: float
    horizon: int

    def normalized_score(self, returns: Any) -> np.ndarray:
        """D4RL's score in percent, 100 (return - min) / (max - min), in the shape of `returns`.

        D4RL's own `get_normalized_score` gives the fraction; every paper prints the percentage.
        """
        returns = np.asarray(returns, dtype=np.float64)
        return 100.0 * (returns - self.ref_min) / (self.ref_max - self.ref_min)


def task_names() -> list[str]:
    """Every -v2 task name that `task` knows; Adroit's tasks end with -v1."""
    return [
        f"{r}-{k}-v2" for r, f in ROBOTS.items() if "v2" in f.versions for k in f.kinds
    ]


def task(name: Task | str) -> Task:
    """The task of a D4RL name such as `hopper-medium-replay-v2`; a `Task` is returned as it is.

    So a function that people call by name takes either and begins with this call.

    Raises:
        ValueError: the name is not a D4RL task known here; the message names the nearest one.
    """
    if isinstance(name, Task):
        return name
    robot, _, rest = name.partition("-")
    kind, _, version = rest.rpartition("-")
    facts = ROBOTS.get(robot)
    if facts is None or kind not in facts.kinds or version not in facts.versions:
        raise ValueError(f"unknown task {_cut(name)!r}; {_known(name, robot)}")
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


def _known(name: str, robot: str) -> str:
    """What to write instead of an unknown name."""
    hands = [r for r, facts in ROBOTS.items() if facts.kinds is ADROIT]
    known = [*task_names(), *(f"{r}-{k}-v1" for r in hands for k in ADROIT)]
    close = difflib.get_close_matches(name[:99], known, 1, 0.8)
    if close:
        return f"did you mean {close[0]}?"
    if robot in ROBOTS:
        facts = ROBOTS[robot]
        return f"{robot} has {', '.join(facts.kinds)}, as in {robot}-{facts.kinds[0]}-v2"
    return f"names are ROBOT-DATA-VERSION, as hopper-medium-v2, and robots {', '.join(ROBOTS)}"


def _cut(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:50]}..."


def normalized_score(name: Task | str, returns: Any) -> np.ndarray:
    """`Task.normalized_score` of a task or of its name.

    Raises:
        ValueError: as of `task`.
    """
    return task(name).normalized_score(returns)
