"""Adroit with D4RL's rewards and ends, on the hand of gymnasium-robotics.

Its models of pen, door, hammer and relocate are D4RL's: the XML files differ in names of files and
in an option that MuJoCo dropped. Two things differ and are put right here. D4RL ends an episode
when the pen has fallen, and gymnasium-robotics goes on. And its `-v1` environments of door, hammer
and relocate pay for the distance between hand and object, for which D4RL charges (`-v2`, in which
that is repaired, is newer than the last release).
"""

from typing import Any

import gymnasium as gym
import numpy as np

from corl import packages, physics, tasks

# Below this height the pen has left the hand.
PEN_FALLEN = 0.075
PEN_HEIGHT = 26  # its place in an observation
# The parts of the model that a reset draws, where the state of MuJoCo does not hold them.
DRAWN = ("body_pos", "body_quat", "site_pos")
# Lengths that a reset of the pen measures, each time with another rounding.
MEASURED = ("pen_length", "tar_length")


def _hand_to_object(robot: str, state: np.ndarray) -> np.ndarray:
    """The way between hand and object (3,) in an observation (S,)."""
    if robot == "door":
        return state[35:38]
    if robot == "relocate":
        return state[30:33]
    return state[33:36] - state[36:39]


class Adroit(gym.Env):
    """One of D4RL's tasks of the hand, without its time limit.

    Args:
        task: of pen, door, hammer or relocate.

    Raises:
        ValueError: gymnasium-robotics is not installed.
    """

    def __init__(self, task: tasks.Task):
        packages.require("gymnasium_robotics", task.name)
        robot = task.robot
        name = f"AdroitHand{robot.title()}"
        self.repaired = f"{name}-v2" in gym.registry
        # The wrappers come from outside; the time limit is D4RL's and another one.
        made = gym.make(
            f"{name}-v2" if self.repaired else f"{name}-v1", disable_env_checker=True
        )
        hand: Any = made.unwrapped
        self.hand = hand
        self.robot = robot
        self._measured = MEASURED if robot == "pen" else ()
        physics.restore_contact_margin(self.hand.model)
        self.observation_space = self.hand.observation_space
        self.action_space = self.hand.action_space

    @property
    def np_random(self) -> np.random.Generator:
        """The generator of the resets."""
        return self.hand.np_random

    @np_random.setter
    def np_random(self, generator: np.random.Generator) -> None:
        self.hand.np_random = generator

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode: observation (S,) and an empty dict."""
        return self.hand.reset(seed=seed, options=options)

    def step(
        self, action: np.ndarray
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take an action (A,): observation (S,), reward, terminated, truncated, info."""
        state, reward, _, _, info = self.hand.step(action)
        if self.robot != "pen" and not self.repaired:
            # It was added at 0.1.
            reward -= 0.2 * np.linalg.norm(_hand_to_object(self.robot, state))
        fallen = self.robot == "pen" and bool(state[PEN_HEIGHT] < PEN_FALLEN)
        info = {**info, "goal_achieved": bool(info["success"])}
        return state, float(reward), fallen, False, info

    def get_state(self) -> dict[str, Any]:
        """What decides the future: MuJoCo's state, and where the reset put goal and object."""
        model = self.hand.model
        drawn = {name: getattr(model, name).copy() for name in DRAWN}
        measured = {k: float(getattr(self.hand, k)) for k in self._measured}
        return {"mujoco": physics.of_mujoco(model, self.hand.data), **drawn, **measured}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a `get_state`, bit for bit."""
        for name in DRAWN:
            getattr(self.hand.model, name)[:] = state[name]
        for name in self._measured:
            setattr(self.hand, name, state[name])
        physics.put_into_mujoco(self.hand.model, self.hand.data, state["mujoco"])

    def render(self) -> Any:
        """A picture (H, W, 3), or None; see gymnasium's `render`."""
        return self.hand.render()

    def close(self) -> None:
        """Close the environment of gymnasium-robotics."""
        self.hand.close()
