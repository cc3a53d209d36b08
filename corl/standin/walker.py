"""Antmaze's walker: what its policy sees of the ant, and how it acts."""

import math

import numpy as np
import torch

from corl.standin import policies

# Standard deviation of the noise on actions in D4RL's collection; the gait is searched under it.
NOISE = 0.2
POLICY_NAME = "antmaze_walker.safetensors"


def yaw(state: np.ndarray) -> float:
    """Angle (rad) of the torso about the vertical, for a state (29,).

    The quaternion may have any length: MuJoCo leaves the noise of a reset in it until the first
    step.
    """
    w, x, y, z = state[3:7]
    return math.atan2(2 * (w * z + x * y), w * w + x * x - y * y - z * z)


def features(states: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """States (B, 29) as seen along directions (B, 2), without the position: (B, 27) float32.

    Quaternion and velocity are turned so that the direction is the x axis. MuJoCo gives the
    angular velocity in the torso's own frame, so it stays.
    """
    x, y = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).T
    half = -np.arctan2(y, x) / 2
    c, s = np.cos(half), np.sin(half)
    qw, qx, qy, qz = states[:, 3:7].T
    turned = np.stack(
        [c * qw - s * qz, c * qx - s * qy, c * qy + s * qx, c * qz + s * qw], 1
    )
    # q and -q are the same rotation, so one sign is chosen.
    turned *= np.where(turned[:, :1] < 0, -1.0, 1.0)
    vx, vy = states[:, 15], states[:, 16]
    velocity = np.stack([x * vx + y * vy, x * vy - y * vx], 1)
    parts = [states[:, 2:3], turned, states[:, 7:15], velocity, states[:, 17:]]
    return np.concatenate(parts, 1).astype(np.float32)


@torch.no_grad()
def act(policy: policies.TanhGaussianPolicy, inputs: np.ndarray) -> np.ndarray:
    """Features (B, 27) -> the policy's mean actions (B, 8)."""
    means = policy.net(torch.from_numpy(inputs))[:, : policies.ACTIONS]
    return torch.tanh(means).numpy()
