"""Gymnasium's locomotion environments with less Python around a step, and the same bits.

The physics are MuJoCo's. What gymnasium's v4 classes compute beside them takes about as long, most
of it in small numpy calls that are made twice or on two numbers. The classes here put other calls
with the same results in their place; tests compare whole episodes bit for bit.
"""

from typing import Any

import numpy as np
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv


class _Cost:
    """What the three have in common."""

    _ctrl_cost_weight: float

    def control_cost(self, action: np.ndarray) -> Any:
        """Weight times the sum of squares of an action (A,), in the action's precision."""
        return self._ctrl_cost_weight * np.add.reduce(np.square(action))


class _Walking(_Cost):
    """What a robot that can fall adds. Speeds are clipped to [-10, 10] where they are observed."""

    data: Any
    _healthy_reward: float
    _terminate_when_unhealthy: bool
    is_healthy: Any

    @property
    def healthy_reward(self) -> float:
        """The reward for a step; a fall costs none where it ends the episode."""
        healthy = self._terminate_when_unhealthy or self.is_healthy
        return float(healthy) * self._healthy_reward

    def _get_obs(self) -> np.ndarray:
        position, velocity = self.data.qpos, self.data.qvel
        split = len(position) - 1
        observation = np.empty(split + len(velocity))
        observation[:split] = position[1:]
        clipped = observation[split:]
        np.maximum(velocity, -10.0, out=clipped)
        np.minimum(clipped, 10.0, out=clipped)
        return observation


class Hopper(_Walking, HopperEnv):
    """`Hopper-v4`: observation (11,), action (3,)."""

    @property
    def is_healthy(self) -> bool:
        """Do height, angle and all other coordinates lie in their ranges?"""
        position, velocity = self.data.qpos, self.data.qvel
        min_z, max_z = self._healthy_z_range
        min_angle, max_angle = self._healthy_angle_range
        if not (min_z < position[1] < max_z and min_angle < position[2] < max_angle):
            return False
        low, high = self._healthy_state_range
        # A nan is not larger than anything.
        return bool(
            low < position[2:].min()
            and position[2:].max() < high
            and low < velocity.min()
            and velocity.max() < high
        )


class Walker2d(_Walking, Walker2dEnv):
    """`Walker2d-v4`: observation (17,), action (6,)."""


class HalfCheetah(_Cost, HalfCheetahEnv):
    """`HalfCheetah-v4`: observation (17,), action (6,)."""

    def _get_obs(self) -> np.ndarray:
        return np.concatenate((self.data.qpos[1:], self.data.qvel))


# Environment id -> its class here.
QUICK = {"Hopper-v4": Hopper, "Walker2d-v4": Walker2d, "HalfCheetah-v4": HalfCheetah}
