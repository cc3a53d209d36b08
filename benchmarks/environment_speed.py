"""Where the time of acting goes: policy call, environment step, replay buffer, evaluation.

    python benchmarks/environment_speed.py [--task hopper-medium-v2] [--seconds 1] [--rounds 5]
                                           [--episodes 10] [--out results/speed/FILE.json]

One thread, IQL's policy network, untrained; the environment is moved by the stand-in's own policy,
so that it walks. The parts take turns, round by round, and the first round is dropped. A time is
the processor's, in µs per call, so that a busy machine adds little; the table shows the median over
rounds, the smallest and the largest. `MuJoCo alone` are the substeps of one environment step: what
no program around them can save. The ratio of an environment step is to gymnasium's own environment
with the same wrappers around it. Whole evaluations of the stand-in's policy follow: one episode
after the other, and side by side (`eval_together`), as µs per environment step.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from algorithms import iql
from corl import acting, arguments, envs, machine, physics, tasks
from corl.standin import policies

# The two that make up an online step, and what their sum is to stay below.
TOGETHER, GOAL = ("policy call", "environment step"), 120.0


class Walker:
    """The stand-in's policy as an actor, with its mean action; it counts its calls."""

    def __init__(self, policy: Any):
        self.policy, self.steps = policy, 0

    def act(self, state: np.ndarray, device: str) -> np.ndarray:
        """States (S,) or (N, S) -> actions of the same form."""
        self.steps += 1 if state.ndim == 1 else len(state)
        with torch.no_grad():
            states = torch.as_tensor(np.atleast_2d(state), dtype=torch.float32)
            actions = self.policy.mean_action(states)
        return actions.numpy().reshape(*state.shape[:-1], -1)

    def train(self) -> None:
        """Nothing changes."""

    def eval(self) -> None:
        """Nothing changes."""
