"""BAQ's clone, weights and priorities a second time, in float64 and without modules.

The update itself is Cal-QL's with a weight on the squared TD errors: `OracleCQL` with `td_weight`.
"""

import math

import numpy as np
import torch
from oracle_iql import Adam, descend, double, mlp


def mean_and_log_std(params, s):
    out = mlp(params, "network", s)
    half = out.shape[1] // 2
    return torch.tanh(out[:, :half]), out[:, half:].clamp(-5.0, 2.0)


def distances(params, s, a, max_action):
    """Mean squared difference from the clone's mean, of the largest action, (B,)."""
    mean, _ = mean_and_log_std(params, s.double())
    return ((mean - a.double() / max_action) ** 2).sum(1) / a.shape[1]


def priorities(distances, sensitivity, floor, novel):
    near = np.exp(-sensitivity * np.asarray(distances))
    return floor + (1 - near if novel else near)


class OracleClone:
    """Takes the first weights of a clone; `fit` makes one update."""

    def __init__(self, clone, rate):
        self.max_action, self.now = clone.max_action, double(clone.state_dict())
        self.adam = Adam(rate)

    def fit(self, s, a):
        s, a = s.double(), a.double() / self.max_action

        def loss_of(params):
            mean, log_std = mean_and_log_std(params, s)
            variance = torch.exp(2 * log_std)
            rows = (a - mean) ** 2 / variance + torch.log(2 * math.pi * variance)
            return 0.5 * rows.sum(1).mean()

        return descend(self.now, self.adam, loss_of)
