"""AntMaze with D4RL's physics on gymnasium's MuJoCo: an ant, walls, a goal.

gymnasium-robotics has mazes of the same names with another ant (five times the torque, half
the time per action), other starts and another goal radius, so that scores there say nothing
about D4RL's. Here gymnasium's own `ant.xml` is brought to D4RL's numbers and walls are added.

Coordinates: the start cell's centre is the origin, x grows with the column and y with the row
of the map, one cell is 4 wide. The goal is a mocap body, so MuJoCo's state holds it.
"""

import functools
import xml.etree.ElementTree as ElementTree
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.mujoco.mujoco_env import expand_model_path

from corl import physics

CELL = 4.0  # width of a cell
WALL_HEIGHT = 2.0
GOAL_RADIUS = 0.5  # distance of torso and goal, in the plane, that counts as reached
TORQUE = 30.0  # what a motor applies for the action 1
FRAME_SKIP, TIMESTEP = 5, 0.02  # 0.1 s per action
# Widths of the two uniform draws that are added to a goal, per axis.
GOAL_NOISE = (1.0, 0.5)
# Width of the uniform draw that is added to a drawn start, per axis; the map's start has none.
START_NOISE = 1.0
# Noise of a reset: half the width for joint positions, the standard deviation for velocities.
POSE_NOISE = 0.1

Cell = tuple[int, int]  # row, column


@dataclass(frozen=True)
class Maze:
    """A map: `#` wall, `R` start, `G` goal of the evaluation, `.` free."""

    rows: tuple[str, ...]
    # Cells that the walks of D4RL's data lead to.
    play_goals: tuple[Cell, ...]

    def cells(self, kinds: str) -> list[Cell]:
        """The cells whose mark is among `kinds`, row by row."""
        return [
            (i, j)
            for i, row in enumerate(self.rows)
            for j, mark in enumerate(row)
            if mark in kinds
        ]

    @functools.cached_property
    def free(self) -> list[Cell]:
        """All cells that are no wall."""
        return self.cells("RG.")

    @functools.cached_property
    def start(self) -> Cell:
        """The cell that evaluations start in, whose centre is the origin."""
        return self.cells("R")[0]

    def position(self, cell: Cell) -> np.ndarray:
        """Centre (2,) of a cell."""
        row, column = cell[0] - self.start[0], cell[1] - self.start[1]
        return CELL * np.array([column, row], np.float64)

    def cell(self, xy: np.ndarray) -> Cell:
        """The cell that D4RL's collector takes a position (2,) to be in.

        Its rule rounds down from cell *centres*, because its waypoints and goals lie beyond
        the centre. So a cell begins in its middle, and the result may be a wall.
        """
        x, y = (max(float(v), 0.0) // CELL for v in xy)
        return self.start[0] + int(y), self.start[1] + int(x)

    def next_cell(self, cell: Cell, goal: Cell) -> Cell:
        """The neighbour of a cell that is nearest to the goal; the cell itself may be a wall.

        Raises:
            ValueError: the goal is not a free cell, or no neighbour leads to it.
        """
        steps = distances(self, goal)
        if cell == goal:
            return goal
        options = [n for n in neighbours(cell) if n in steps]
        if not options:
            raise ValueError(f"no way from cell {cell} to the goal cell {goal}")
        return min(options, key=steps.__getitem__)


def neighbours(cell: Cell) -> list[Cell]:
    """Left, right, lower and upper cell, in D4RL's order."""
    row, column = cell
    return [(row, column - 1), (row, column + 1), (row + 1, column), (row - 1, column)]


@functools.cache
def distances(maze: Maze, goal: Cell) -> dict[Cell, int]:
    """Steps from every free cell of a maze to a goal cell, by breadth-first search.

    Raises:
        ValueError: the goal is not a free cell.
    """
    free = set(maze.free)
    if goal not in free:
        raise ValueError(f"goal cell {goal} is not a free cell of the maze")
    found, queue = {goal: 0}, deque([goal])
    while queue:
        cell = queue.popleft()
        for neighbour in neighbours(cell):
            if neighbour in free and neighbour not in found:
                found[neighbour] = found[cell] + 1
                queue.append(neighbour)
    return found


MAZES = {
    "umaze": Maze(
        (
            "#####",
            "#R..#",
            "###.#",
            "#G..#",
            "#####",
        ),
        ((3, 1),),
    ),
    "medium": Maze(
        (
            "########",
            "#R.##..#",
            "#..#...#",
            "##...###",
            "#..#...#",
            "#.#..#.#",
            "#...#.G#",
            "########",
        ),
        ((2, 6), (5, 1), (6, 5)),
    ),
    "large": Maze(
        (
            "############",
            "#R...#.....#",
            "#.##.#.#.#.#",
            "#......#...#",
            "#.####.###.#",
            "#..#.#.....#",
            "##.#.#.#.###",
            "#..#...#.G.#",
            "############",
        ),
        ((1, 6), (3, 5), (3, 10), (5, 2), (7, 4), (7, 6), (7, 9)),
    ),
}


def maze_xml(maze: Maze | None, asset: str) -> str:
    """gymnasium's ant (the file `asset`) with D4RL's numbers, walls and goal, as MJCF text.

    Without a maze it is the ant on its open plane. The numbers are those of D4RL's `ant.xml` and
    `maze_env.py`.
    """
    root = ElementTree.parse(asset).getroot()

    def part(path: str) -> ElementTree.Element:
        found = root.find(path)
        assert found is not None, f"{asset} has no {path}"
        return found

    part("option").set("timestep", str(TIMESTEP))
    part("default/geom").attrib.update(solref=".02 1", solimp=".8 .8 .01")
    for motor in root.iterfind("actuator/motor"):
        motor.set("ctrlrange", f"{-TORQUE} {TORQUE}")
        motor.set("gear", "1")
    world = part("worldbody")
    half = CELL / 2, CELL / 2, WALL_HEIGHT / 2
    walls = [(cell, maze.position(cell)) for cell in maze.cells("#")] if maze else []
    for (i, j), (x, y) in walls:
        ElementTree.SubElement(
            world,
            "geom",
            name=f"block_{i}_{j}",
            type="box",
            pos=f"{x} {y} {half[2]}",
            size=" ".join(map(str, half)),
            contype="1",
            conaffinity="1",
            rgba="0.7 0.5 0.3 1",
        )
    goal = ElementTree.SubElement(world, "body", name="goal", mocap="true")
    ElementTree.SubElement(
        goal, "site", type="cylinder", size=f"{GOAL_RADIUS} 0.02", rgba="0.8 0.1 0.1 0.6"
    )
    return ElementTree.tostring(root, encoding="unicode")


def load_model(maze: Maze | None) -> mujoco.MjModel:
    """The compiled model of `maze_xml`, with D4RL's contact margins on every MuJoCo."""
    model = mujoco.MjModel.from_xml_string(maze_xml(maze, expand_model_path("ant.xml")))
    physics.restore_contact_margin(model)
    return model


class AntMaze(MujocoEnv):
    """D4RL's antmaze -v2: reward 1 and the end where the ant comes within 0.5 of the goal.

    Observation (29,) float64: qpos (15: x, y, z, quaternion, joints), qvel (14); the goal is
    not in it. Action (8,) in [-1, 1]; 30 times the action are the torques. A fall does not end
    an episode. A reset draws goal, pose and start from `np_random`, so a seed repeats them; in
    D4RL the goal came from numpy's global stream. A wrapper has to set the time limit.

    Args:
        size: `umaze`, `medium` or `large`.
        goals: cells among which a reset draws the goal; episodes then go on at the goal, as
            in D4RL's collection. By default the map's one goal, which ends the episode.
        starts: cells among which a reset draws the start; by default the map's.
        render_mode: as of gymnasium.

    Raises:
        ValueError: another size.
    """

    metadata = {
        "render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"],
        "render_fps": 10,
    }

    def __init__(
        self,
        size: str,
        goals: Sequence[Cell] | None = None,
        starts: Sequence[Cell] | None = None,
        render_mode: str | None = None,
    ):
        if size not in MAZES:
            raise ValueError(f"maze {size!r} is not one of {', '.join(MAZES)}")
        self.maze, self.goals, self.starts = MAZES[size], goals, starts
        space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float64)
        super().__init__("ant.xml", FRAME_SKIP, space, render_mode=render_mode)

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        model = load_model(self.maze)
        return model, mujoco.MjData(model)

    def _set_action_space(self) -> gym.spaces.Box:
        space = gym.spaces.Box(-1.0, 1.0, (self.model.nu,), np.float32)
        self.action_space = space
        return space

    @property
    def goal(self) -> np.ndarray:
        """Position (2,) of the goal, a copy."""
        return self.data.mocap_pos[0, :2].copy()

    @goal.setter
    def goal(self, xy: np.ndarray) -> None:
        self.data.mocap_pos[0, :2] = xy

    def draw_goal(self) -> np.ndarray:
        """A goal (2,) by D4RL's rule: a goal cell's centre plus one-sided noise."""
        cells = self.maze.cells("G") if self.goals is None else self.goals
        cell = cells[int(self.np_random.integers(len(cells)))]
        noise = sum(self.np_random.uniform(0.0, width, 2) for width in GOAL_NOISE)
        return np.maximum(self.maze.position(cell) + noise, 0.0)

    def reset_model(self) -> np.ndarray:
        self.goal = self.draw_goal()
        rng = self.np_random
        qpos = self.init_qpos + rng.uniform(-POSE_NOISE, POSE_NOISE, self.model.nq)
        qvel = self.init_qvel + POSE_NOISE * rng.standard_normal(self.model.nv)
        if self.starts is not None:
            drawn = int(rng.integers(len(self.starts)))
            start = self.maze.position(self.starts[drawn])
            qpos[:2] = np.maximum(start + rng.uniform(0.0, START_NOISE, 2), 0.0)
        self.set_state(qpos, qvel)
        return self._observation()

    def _observation(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def reached(self) -> bool:
        """Whether the torso is within the goal's radius, border included."""
        return bool(np.linalg.norm(self.data.qpos[:2] - self.goal) <= GOAL_RADIUS)

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.do_simulation(TORQUE * np.asarray(action, np.float64), self.frame_skip)
        if self.render_mode == "human":
            self.render()
        reached = self.reached()
        terminated = reached and self.goals is None
        return self._observation(), float(reached), terminated, False, {}
