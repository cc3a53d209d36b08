"""The online critics: their losses, the loss through an inner step, and their pre-training.

Shin et al. 2025 (OPT), https://arxiv.org/abs/2507.08387.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.func import functional_call

Parameters = Mapping[str, torch.Tensor]
Loss = Callable[[Parameters], torch.Tensor]
Rows = Sequence[torch.Tensor]
# Attributes of a trainer with online critics, and keys of its checkpoints.
ONLINE_PARTS = (
    "online_critics",
    "online_critics_optimizer",
    "online_critics_target",
)


class Pair(nn.Module):
    """Two critics as one module: what one gives (B,) -> what both give, a pair."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(
        self, state: torch.Tensor, action: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Q1 and Q2, each (B,), of actions (B, A) at states (B, S)."""
        return self.first(state, action), self.second(state, action)


def two_batch_loss(
    parameters: Parameters, offline: Loss, online: Loss, rate: float, weigh: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """OPT's L_off(p) + c L_on(p - rate * gradient of L_off(p)), then L_off and L_on; each ().

    The gradient of the whole goes through the inner step, so it has second derivatives of L_off.

    Args:
        parameters: p, by their names.
        offline, online: the two losses () at some parameters.
        rate: of the inner step.
        weigh: c is min(L_off, L_on) / L_on, without gradient; else 1.
    """
    first = offline(parameters)
    values = list(parameters.values())
    gradients = torch.autograd.grad(first, values, create_graph=True)
    pairs = zip(parameters.items(), gradients, strict=True)
    second = online({name: p - rate * g for (name, p), g in pairs})
    if not weigh:
        return first + second, first, second
    tiny = torch.finfo(second.dtype).tiny
    weight = (first.detach() / second.detach().clamp(min=tiny)).clamp(max=1.0)
    return first + weight * second, first, second


class OnlineCritics:
    """What a trainer with a second pair of critics is besides.

    The trainer calls `add_online_critics` and has `td_target(target_q, next states, rewards, dones,
    noise, discount)`, `discount` and `policy_freq`.
    """

    td_target: Callable[..., torch.Tensor]
    discount: float
    policy_freq: int

    def add_online_critics(
        self,
        critics: nn.Module,
        optimizer: torch.optim.Optimizer,
        draws: Any,
        inner_lr: float,
        weigh_outer: bool,
        tau: float,
        descend: Callable[..., None],
        soft_update: Callable[..., None],
    ) -> None:
        """Keep the pair with its Adam and a copy as its target.

        Args:
            critics: see `Pair`.
            optimizer: of its parameters.
            draws: what is random in its updates, see `draws.Draws`.
            inner_lr, weigh_outer: see `two_batch_loss`.
            tau: update rate of the target network.
            descend: (loss, *optimizers), steps each along the loss's gradient.
            soft_update: (target, source, rate), moves a target network.
        """
        self.online_critics, self.online_critics_optimizer = critics, optimizer
        self.online_critics_target = copy.deepcopy(critics).requires_grad_(False)
        self.draws = draws
        self.inner_lr, self.weigh_outer, self.online_tau = inner_lr, weigh_outer, tau
        self._descend, self._soft_update = descend, soft_update

    def online_target_q(
        self, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """min(Q1, Q2) of the online critics' target networks, (B,)."""
        return torch.minimum(*self.online_critics_target(observations, actions))

    def online_q_losses(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        y: torch.Tensor,
        parameters: Parameters | None = None,
    ) -> torch.Tensor:
        """Squared TD errors of both online critics, their sum, (B,); TD target y (B,).

        With `parameters` they take the place of the critics' own.
        """
        inputs, pair = (observations, actions), self.online_critics
        if parameters is None:
            q1, q2 = pair(*inputs)
        else:
            q1, q2 = functional_call(pair, dict(parameters), inputs)
        return (q1 - y).square() + (q2 - y).square()

    def pretrain(self, offline: Rows, online: Rows, number: int) -> dict[str, Any]:
        """Update `number`, from 1, of the online critics alone; returns 0-d tensors.

        Args:
            offline, online: a batch of each kind of rows.
        """
        noise = [self.draws.normal(batch[1].shape) for batch in (offline, online)]
        discount = offline[1].new_full((), self.discount)
        due = number % self.policy_freq == 0
        return self._pretrain(list(offline), list(online), noise, discount, due)

    def _pretrain(
        self,
        offline: Rows,
        online: Rows,
        noise: Sequence[torch.Tensor],
        discount: torch.Tensor,
        update_target: bool,
    ) -> dict[str, torch.Tensor]:
        """A function of tensors but for the step."""

        def loss_of(batch: Rows, normal: torch.Tensor) -> Loss:
            states, actions, rewards, next_states, dones = batch
            target = self.online_target_q
            y = self.td_target(target, next_states, rewards, dones, normal, discount)
            return lambda p: self.online_q_losses(states, actions, y, p).mean(-1)

        losses = loss_of(offline, noise[0]), loss_of(online, noise[1])
        parameters = dict(self.online_critics.named_parameters())
        loss, first, second = two_batch_loss(
            parameters, *losses, self.inner_lr, self.weigh_outer
        )
        self._descend(loss, self.online_critics_optimizer)
        if update_target:
            pair = self.online_critics_target, self.online_critics
            self._soft_update(*pair, self.online_tau)
        return {"offline_loss": first.detach(), "online_loss": second.detach()}


class OnlinePretraining:
    """The updates of the online critics when the warm-up is over, one a piece.

    Args:
        config: of the run: `pretrain_updates`, `online_warmup`, `batch_size`.
        trainer: see `OnlineCritics`.
        offline, online: buffers, see `replay.Buffer`.

    Attributes:
        done: updates that have been made.
    """

    # A piece is an update of the trainer.
    trains = True

    def __init__(self, config: Any, trainer: OnlineCritics, offline: Any, online: Any):
        self.updates, self.start = config.pretrain_updates, config.online_warmup
        self.batch_size, self.trainer = config.batch_size, trainer
        self.buffers = offline, online
        self.done, self.now = 0, -1
        self.found: dict[str, Any] = {}

    def before(self, step: int) -> None:
        """The online step `step`, from 0, is to be made."""
        self.now = step

    def phase(self) -> tuple[str, int, int] | None:
        """Its name, and how many of all updates are made; None where nothing is left to do."""
        if self.now < self.start or self.done >= self.updates:
            return None
        return "online pre-training", self.done, self.updates

    def _update(self, number: int) -> dict[str, Any]:
        draws = self.trainer.draws
        offline, online = (
            b.gather(draws.rows(b.size, self.batch_size)) for b in self.buffers
        )
        return self.trainer.pretrain(offline, online, number)

    def advance(self) -> dict[str, Any]:
        """Make one update; returns its metrics."""
        self.found = self._update(self.done + 1)
        self.done += 1
        return self.found

    def report(self) -> str:
        """What was done, for a line on the screen."""
        found = ", ".join(f"{name} {float(x):.4f}" for name, x in self.found.items())
        return f"{self.updates} updates of the online critics, {found}"

    def estimate_online(
        self, seconds_of: Callable[[Callable[[], Any]], float], first: int, last: int
    ) -> dict[str, float]:
        """Seconds of the updates, where they come in the online steps from `first` up to `last`."""
        left = self.updates - self.done
        if left <= 0 or not first <= self.start < last:
            return {}

        def several() -> None:
            for number in range(1, 5):
                self._update(number)

        # The first ones compile.
        several()
        return {"online pre-training": left * seconds_of(several) / 4}

    def state_dict(self) -> dict[str, Any]:
        """How far it is."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.done = state["done"]
