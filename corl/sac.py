"""What agents on soft actor-critic share: the policy, and numbers that are learned.

Haarnoja et al. 2018, https://arxiv.org/abs/1812.05905. Losses stand in the algorithm files.

Shapes: B rows of a batch, n actions of a row, S state dimension, A action dimension.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from corl.ensembles import Form, ensemble_weights, linear_layers
from corl.sampling import Fit, standard_log_prob

# Largest action, in units of the box, whose value before the tanh is looked for.
ALMOST_ONE = 1.0 - 1e-6
HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def log_density(
    inside: torch.Tensor, noise: torch.Tensor, log_std: torch.Tensor
) -> torch.Tensor:
    """Log-density (...) of tanh(inside), in nats; inside (..., A) is mean + std noise."""
    log_prob = -0.5 * noise.square() - log_std - HALF_LOG_TWO_PI
    # log(1 - tanh^2), which is exact where tanh is 1 in float32.
    squash = 2.0 * (math.log(2.0) - inside - F.softplus(-2.0 * inside))
    return (log_prob - squash).sum(-1)


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
        log_prob = log_density(inside, noise, log_std)
        return self.max_action * inside.tanh(), log_prob

    def log_prob(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-densities (B,), or (B, n), of actions (B, A), or (B, n, A), in nats."""
        mean, log_std = self.gaussian(states)
        if actions.ndim > mean.ndim:
            mean, log_std = mean.unsqueeze(-2), log_std.unsqueeze(-2)
        # At the bounds the density has no finite value.
        inside = (actions / self.max_action).clamp(-ALMOST_ONE, ALMOST_ONE).atanh()
        return log_density(inside, (inside - mean) * (-log_std).exp(), log_std)

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


# Keys of a checkpoint of CORL's CQL or Cal-QL that an agent with N critics goes on with.
TWO_CRITICS = (
    *("actor", "critic1", "critic2", "critic1_target", "critic2_target"),
    *("sac_log_alpha", "cql_log_alpha", "total_it"),
)


def policy_weights(policy: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state_dict of a `SquashedGaussianPolicy` that is the policy of CORL's CQL.

    There one network gives the mean and the logarithm of the standard deviation, and two numbers
    scale and shift the latter. Here they are a part of its layer.

    Args:
        policy: the state_dict of a `TanhGaussianPolicy`.

    Raises:
        ValueError, KeyError: it is none.
    """
    *hidden, (weight, bias) = linear_layers(policy, "base_network")
    scale, shift = (policy[f"log_std_{x}.constant"] for x in ("multiplier", "offset"))
    (mean, log_std), (mean_bias, log_std_bias) = weight.chunk(2), bias.chunk(2)
    found = {
        "mean.weight": mean,
        "mean.bias": mean_bias,
        "log_std.weight": scale * log_std,
        "log_std.bias": scale * log_std_bias + shift,
    }
    for number, (weight, bias) in enumerate(hidden):
        # A ReLU stands between two of them.
        found[f"trunk.{2 * number}.weight"] = weight
        found[f"trunk.{2 * number}.bias"] = bias
    return found


def of_two_critics(state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of CORL's CQL or Cal-QL as the state of an agent with N critics, here two.

    Policy, critics, their targets, the temperature and the multiplier of the gap; optimizers
    cannot be carried over, since their moments belong to other parameters.

    Args:
        state: has the keys `TWO_CRITICS`.

    Raises:
        ValueError, KeyError: the networks are of another form.
    """

    def positive(key: str) -> dict[str, torch.Tensor]:
        # CORL bounds the multiplier so; no temperature comes near it.
        log_value = min(float(state[key]["constant"]), math.log(1e6))
        return PositiveScalar(math.exp(log_value), softplus=True).state_dict()

    def critics(kind: str) -> dict[str, torch.Tensor]:
        return ensemble_weights([state[f"critic{number}{kind}"] for number in (1, 2)])

    return {
        "actor": policy_weights(state["actor"]),
        "critics": critics(""),
        "target_critics": critics("_target"),
        "temperature": positive("sac_log_alpha"),
        "multiplier": positive("cql_log_alpha"),
        "total_it": state["total_it"],
    }


def form_of(
    actor: Mapping[str, torch.Tensor], critics: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """What a config says of the form of networks: its fields and their values.

    Args:
        actor: the state_dict of a `SquashedGaussianPolicy`.
        critics: that of a `CriticEnsemble`.
    """
    n_critics, _, width = critics["hidden.0.weight"].shape
    layers = [k for k in critics if k.startswith("hidden.") and k.endswith(".weight")]
    trunk = [k for k, v in actor.items() if k.startswith("trunk.") and v.ndim == 2]
    return {
        "actor_n_hidden_layers": len(trunk),
        "hidden_dim": width,
        "layer_norm": any(key.startswith("norms.") for key in critics),
        "n_critics": n_critics,
        "q_n_hidden_layers": len(layers),
        "shared_head": critics["last.weight"].ndim == 2,
        "state_dependent_std": "log_std.weight" in actor,
    }
