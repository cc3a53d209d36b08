"""What agents on soft actor-critic share: the policy, and numbers that are learned.

Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905. Losses stand in the algorithm files.

Shapes: B rows of a batch, n actions of a row, S state dimension, A action dimension.
"""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from corl.ensembles import Form
from corl.sampling import Fit, standard_log_prob

# Largest action, in units of the box, whose value before the tanh is looked for.
ALMOST_ONE = 1.0 - 1e-6
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


class SquashedGaussianPolicy(nn.Module):
    """tanh of a Gaussian: states (B, S) -> actions (B, A) in [-max_action, max_action].

    Densities are those in the box [-1, 1], before the action is scaled.

    Args:
        state_dim, action_dim, max_action: of the task.
        form: of the hidden layers; the mean and the logarithm of the standard deviation are a
            linear layer each.
        log_std_min, log_std_max: bounds of that logarithm.
        state_dependent_std: False: it is A numbers that do not depend on the state, from 0.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        form: Form | None = None,
        log_std_min: float = -20.0,
        log_std_max: float = 2.0,
        state_dependent_std: bool = True,
    ):
        super().__init__()
        form = form or Form()
        self.max_action = max_action
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        self.trunk = form.network(state_dim)
        self.mean = form.linear(form.hidden_dim, action_dim)
        self.log_std: nn.Linear | nn.Parameter
        if state_dependent_std:
            self.log_std = form.linear(form.hidden_dim, action_dim)
        else:
            self.log_std = nn.Parameter(torch.zeros(action_dim))

    def gaussian(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logarithm of the standard deviation, each (B, A), before the tanh."""
        hidden = self.trunk(states)
        mean = self.mean(hidden)
        raw = self.log_std
        log_std = raw(hidden) if isinstance(raw, nn.Linear) else raw
        log_std = log_std.clamp(self.log_std_min, self.log_std_max)
        return mean, log_std.expand_as(mean)

    def forward(
        self, states: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions for standard normal noise (B, A), or (B, n, A), and their log-densities.

        Actions have the shape of the noise, log-densities (B,) or (B, n), in nats.
        """
        mean, log_std = self.gaussian(states)
        if noise.ndim > mean.ndim:
            # The network sees a state once, its actions share the output.
            mean, log_std = mean.unsqueeze(-2), log_std.unsqueeze(-2)
        inside = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - HALF_LOG_TWO_PI
        # log(1 - tanh^2), which is exact where tanh is 1 in float32.
        squash = 2.0 * (math.log(2.0) - inside - F.softplus(-2.0 * inside))
        return self.max_action * inside.tanh(), (log_prob - squash).sum(-1)

    def mode(self, states: torch.Tensor) -> torch.Tensor:
        """The action (B, A) without noise: tanh of the mean."""
        return self.max_action * self.gaussian(states)[0].tanh()

    @torch.no_grad()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Executable action (A,) for a state (S,): the mode, or in training mode a sample."""
        states = torch.as_tensor(state, dtype=torch.float32, device=device).unsqueeze(0)
        if not self.training:
            return self.mode(states)[0].cpu().numpy()
        mean, log_std = self.gaussian(states)
        inside = mean + log_std.exp() * torch.randn_like(mean)
        return (self.max_action * inside.tanh())[0].cpu().numpy()


class PositiveScalar(nn.Module):
    """One trainable number that stays positive: a temperature, or a Lagrange multiplier.

    Args:
        init: its first value, above 0.
        softplus: it is the softplus of the parameter; else the exponential.
    """

    def __init__(self, init: float = 1.0, softplus: bool = False):
        super().__init__()
        self.softplus = softplus
        # The inverse of the softplus, written so that no large number overflows.
        inverse = init + math.log(-math.expm1(-init))
        raw = inverse if softplus else math.log(init)
        self.raw = nn.Parameter(torch.tensor(raw, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        """The number, 0-d."""
        return F.softplus(self.raw) if self.softplus else self.raw.exp()


def policy_fit(actor: SquashedGaussianPolicy) -> Fit:
    """How well rows fit the policy before its squashing, for `sampling: on_policy`."""

    def fit(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        mean, log_std = actor.gaussian(states)
        inside = (actions / actor.max_action).clamp(-ALMOST_ONE, ALMOST_ONE)
        return standard_log_prob(inside.atanh(), mean, log_std.exp())

    return fit
