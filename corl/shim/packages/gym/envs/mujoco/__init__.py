"""Old gym's base class of MuJoCo environments, for environments that scripts bring."""

from _shim_names import missing

from gym.envs.mujoco import mujoco_env
from gym.envs.mujoco.mujoco_env import MujocoEnv

__all__ = ["MujocoEnv", "mujoco_env"]
__getattr__ = missing("gym.envs.mujoco")
