"""The IQL filter: trust the actions that are worth at least as much as their state.

Critics and values of IQL (Kostrikov et al. 2021, https://arxiv.org/abs/2110.06169), without a
policy, learn from the dataset before the offline phase. A row is trusted where min(Q1, Q2)(s, a) is
not below V(s).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

# Networks and optimizers in a checkpoint.
PARTS = ("critics", "target_critics", "value", "critics_optimizer", "value_optimizer")
# Rows that are judged at once.
CHUNK = 65536


def relu_network(n_in: int, hidden_dim: int = 256) -> nn.Sequential:
    """(..., n_in) -> (..., 1), two hidden layers with ReLU."""
    return nn.Sequential(
        nn.Linear(n_in, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, 1),
    )


class TwinCritics(nn.Module):
    """Q1 and Q2, each (B,), of actions (B, A) at states (B, S)."""

    def __init__(self, state_dim: int, action_dim: int):
        super().__init__()
        self.q1, self.q2 = (relu_network(state_dim + action_dim) for _ in range(2))

    def forward(
        self, states: torch.Tensor, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both values."""
        inputs = torch.cat((states, actions), dim=-1)
        return self.q1(inputs).squeeze(-1), self.q2(inputs).squeeze(-1)


class IQLFilter:
    """The filter's networks, their losses and one update of all of them.

    Args:
        state_dim, action_dim: sizes of a state and an action.
        descend: (loss, *optimizers), steps each along the loss's gradient.
        soft_update: (target, source, rate), moves a target network.
        expectile: of the value loss.
        discount: discount factor.
        device: of its networks.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        descend: Callable[..., None],
        soft_update: Callable[..., None],
        expectile: float = 0.7,
        discount: float = 0.99,
        device: str = "cpu",
    ):
        self.critics: nn.Module = TwinCritics(state_dim, action_dim).to(device)
        self.value: nn.Module = relu_network(state_dim).to(device)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.critics_optimizer = torch.optim.Adam(self.critics.parameters(), lr=3e-4)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=3e-4)
        self.expectile, self.discount = expectile, discount
        self._descend, self._soft_update = descend, soft_update

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """All optimizers."""
        return [self.critics_optimizer, self.value_optimizer]

    def value_losses(
        self, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """Expectile losses of V towards the target critics, (B,)."""
        with torch.no_grad():
            q = torch.minimum(*self.target_critics(observations, actions))
        gap = q - self.value(observations).squeeze(-1)
        return (self.expectile - (gap < 0).float()).abs() * gap.square()

    def q_losses(
        self, observations: torch.Tensor, actions: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """Squared TD errors of both critics, their mean, (B,); TD target y (B,)."""
        q1, q2 = self.critics(observations, actions)
        one, two = (F.mse_loss(q, y, reduction="none") for q in (q1, q2))
        return (one + two) / 2

    def train(self, batch: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """One update on a batch, whose first five fields count; returns 0-d tensors."""
        return self._update(list(batch[:5]))

    def _update(self, batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """A function of tensors but for the steps; V(s') in the TD target is that of before."""
        observations, actions, rewards, next_observations, dones = batch
        with torch.no_grad():
            next_v = self.value(next_observations).squeeze(-1)
        value_loss = self.value_losses(observations, actions).mean(-1)
        self._descend(value_loss, self.value_optimizer)
        y = rewards.squeeze(-1) + (1.0 - dones.squeeze(-1)) * self.discount * next_v
        q_loss = self.q_losses(observations, actions, y).mean(-1)
        self._descend(q_loss, self.critics_optimizer)
        self._soft_update(self.target_critics, self.critics, 0.005)
        found = {"filter_value_loss": value_loss, "filter_q_loss": q_loss}
        return {name: loss.detach() for name, loss in found.items()}

    @torch.no_grad()
    def trusted(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Which rows pass, bool (N,), of states (N, S) and actions (N, A)."""
        found = []
        for s, a in zip(states.split(CHUNK), actions.split(CHUNK), strict=True):
            q = torch.minimum(*self.critics(s, a))
            found.append(q >= self.value(s).squeeze(-1))
        return torch.cat(found)

    def state_dict(self) -> dict[str, Any]:
        """Networks and optimizers."""
        return {part: getattr(self, part).state_dict() for part in PARTS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for part in PARTS:
            getattr(self, part).load_state_dict(state_dict[part])
