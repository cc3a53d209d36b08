"""Old gym's base class of MuJoCo environments, on today's MuJoCo."""

from pathlib import Path
from typing import Any

import gymnasium.envs.mujoco
import mujoco
import numpy as np
from gymnasium.spaces import Box

from corl import physics
from gym.core import Env
from gym.simulation import Simulation

ASSETS = Path(gymnasium.envs.mujoco.__file__).parent / "assets"


class MujocoEnv(Env):
    """An environment that loads a MuJoCo model; a subclass defines `step` and `reset_model`.

    Args:
        model_path: file; a plain name is one of gymnasium's models.
        frame_skip: MuJoCo's time steps in a step of the environment.
    """

    metadata = {"render.modes": ["human", "rgb_array"]}

    def __init__(self, model_path: str, frame_skip: int):
        path = Path(model_path)
        if not path.is_absolute() and not path.exists():
            path = ASSETS / model_path
        self.frame_skip = frame_skip
        self.model: Any = mujoco.MjModel.from_xml_path(str(path))
        physics.restore_contact_margin(self.model)
        self.data: Any = mujoco.MjData(self.model)
        self.sim = Simulation(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)
        self.init_qpos, self.init_qvel = self.data.qpos.copy(), self.data.qvel.copy()
        low, high = self.model.actuator_ctrlrange.astype(np.float32).T
        self.action_space = Box(low, high, dtype=np.float32)
        observation, *_ = self.step(self.action_space.sample())
        shape = np.shape(observation)
        self.observation_space = Box(-np.inf, np.inf, shape, np.float64)
        self.seed()

    def reset_model(self) -> Any:
        """Set the first state of an episode; its observation."""
        raise NotImplementedError

    def viewer_setup(self) -> None:
        """Old gym's hook for the camera; the shim has no window."""

    def reset(self, **options: Any) -> Any:
        """Begin an episode; its observation."""
        super().reset(**options)
        self.sim.reset()
        return self.reset_model()

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Set positions and velocities."""
        self.data.qpos[:], self.data.qvel[:] = qpos, qvel
        self.sim.forward()

    @property
    def dt(self) -> float:
        """Seconds in a step of the environment."""
        return self.model.opt.timestep * self.frame_skip

    def do_simulation(self, ctrl: np.ndarray, n_frames: int) -> None:
        """Apply controls for some of MuJoCo's time steps."""
        self.data.ctrl[:] = ctrl
        mujoco.mj_step(self.model, self.data, nstep=n_frames)
        # Forces of contacts and joints, which mujoco_py had computed, too.
        mujoco.mj_rnePostConstraint(self.model, self.data)

    def render(self, mode: str = "human", **options: Any) -> Any:
        """A picture for `rgb_array`; nothing for a window."""
        if mode == "human":
            return None
        size = {k: options[k] for k in ("width", "height") if k in options}
        return self.sim.render(**size)[::-1]

    def get_body_com(self, body_name: str) -> np.ndarray:
        """Position (3,) of a body."""
        return self.data.body(body_name).xpos

    def state_vector(self) -> np.ndarray:
        """Positions and velocities in one array."""
        return np.concatenate([self.data.qpos.flat, self.data.qvel.flat])
