"""Tasks: a name is parsed once into a frozen `Task`, which is passed on.

A `Task` knows the sizes of states and actions, the range of the environment's own actions, the time
limit and, where there are any, the returns between which scores are normalized. The names here are
D4RL's; a gymnasium environment becomes a `Task` in `own_envs.py`.
"""

import difflib
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

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
# gymnasium-robotics registers its environments when it is imported.
ROBOTICS = re.compile(
    r"(AdroitHand|AntMaze_|Fetch|FrankaKitchen|HandManipulate|HandReach|PointMaze_)\w*-v\d+$"
)


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


class Scale(NamedTuple):
    """What results of a task are told in.

    Attributes:
        column: of metrics.csv.
        unit: in words, before `name`.
        name: `score`, or `return` where nothing is normalized.
    """

    column: str
    unit: str
    name: str

    @property
    def label(self) -> str:
        """Unit and name, for a picture or a table."""
        return f"{self.unit} {self.name}"


D4RL = Scale("d4rl_normalized_score", "D4RL-normalized", "score")
NORMALIZED = Scale("normalized_score", "normalized", "score")
RAW = Scale("raw_return", "raw", "return")
SCALES = (D4RL, NORMALIZED, RAW)

Bounds = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Task:
    """One task: of D4RL, a robot and the kind of data it comes with; or a gymnasium environment.

    Algorithms act in [-1, 1]. `bounds` are the environment's own, low (A,) and high (A,), and None
    where they are the same. For the other facts see `Robot`.
    """

    # The comments show the parts of hopper-medium-replay-v2.
    name: str  # hopper-medium-replay-v2
    robot: str  # hopper; empty where the task is not D4RL's, as the next two
    kind: str  # medium-replay
    version: str  # v2
    env_id: str  # Hopper-v4; empty where gymnasium has no such environment
    state_dim: int
    action_dim: int
    ref_min: float | None
    ref_max: float | None
    horizon: int
    bounds: Bounds | None = None
    # Does its data go on at the goal, where an evaluation ends? Then time-outs alone end an episode
    # of the data, and terminals mark rows at the goal.
    walks_on: bool = False

    @property
    def is_d4rls(self) -> bool:
        """Is this a task of D4RL, with its rules for data and scores?"""
        return bool(self.robot)

    @property
    def scale(self) -> Scale:
        """What its results are told in."""
        if self.is_d4rls:
            return D4RL
        return RAW if self.ref_min is None else NORMALIZED

    def normalized_score(self, returns: Any) -> np.ndarray:
        """The score in percent, 100 (return - min) / (max - min), in the shape of `returns`.

        D4RL's own `get_normalized_score` gives the fraction; every paper prints the percentage.
        Without reference scores it is the raw return.
        """
        returns = np.asarray(returns, dtype=np.float64)
        if self.ref_min is None or self.ref_max is None:
            return returns
        return 100.0 * (returns - self.ref_min) / (self.ref_max - self.ref_min)

    def to_unit(self, actions: np.ndarray) -> np.ndarray:
        """Actions (..., A) of the environment's range as those of [-1, 1], in float64.

        The bounds become -1 and 1 to the bit, and what lies outside becomes the bound. Without
        `bounds` the actions stay as they are.
        """
        if self.bounds is None:
            return actions
        low, high, middle, half = self._range
        actions = np.asarray(actions, dtype=np.float64)
        inside = np.clip((actions - middle) / half, -1.0, 1.0)
        return np.where(actions >= high, 1.0, np.where(actions <= low, -1.0, inside))

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Actions (..., A) of [-1, 1] as those of the environment, the reverse of `to_unit`."""
        if self.bounds is None:
            return actions
        low, high, middle, half = self._range
        actions = np.asarray(actions, dtype=np.float64)
        inside = np.clip(middle + half * actions, low, high)
        return np.where(actions >= 1.0, high, np.where(actions <= -1.0, low, inside))

    @property
    def _range(self) -> tuple[np.ndarray, ...]:
        """Low, high, middle and half of the width of the environment's actions, (A,) each."""
        low, high = np.asarray(self.bounds, dtype=np.float64)
        return low, high, low / 2 + high / 2, high / 2 - low / 2


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
        walks_on=robot == "antmaze",
    )


def is_gymnasium_id(name: str) -> bool:
    """Is this no task of D4RL, but an environment of gymnasium or of a module, `MODULE:ID`?

    The module is not imported.
    """
    with suppress(ValueError):
        task(name)
        return False
    if ":" in name:
        return all(name.partition(":")[::2])
    # It is slow to import, and D4RL's names do not need it.
    import gymnasium

    return name in gymnasium.registry or ROBOTICS.match(name) is not None


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
    return (
        f"names are ROBOT-DATA-VERSION, as hopper-medium-v2, and robots {', '.join(ROBOTS)}; any "
        "other environment is a gymnasium id, as Hopper-v5 or my_package:MyEnv-v0"
    )


def file_name(name: str) -> str:
    """A task's name as a part of a file's: `my_package:MyEnv-v0` as `my_package_MyEnv-v0`."""
    return re.sub(r"[^\w.,+=-]", "_", name)


def _cut(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:50]}..."


def normalized_score(name: Task | str, returns: Any) -> np.ndarray:
    """`Task.normalized_score` of a task or of its name.

    Raises:
        ValueError: as of `task`.
    """
    return task(name).normalized_score(returns)
