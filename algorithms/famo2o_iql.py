"""FamO2O on IQL: a family of policies, and a model that picks one of them in each state.

Paper: Wang et al. 2023, https://arxiv.org/abs/2310.17966. The policy pi_u(a|s, beta) also reads
the coefficient beta that weighs its advantages, so it is a family of policies, from cautious to
greedy. Offline it learns with beta drawn evenly from a range. The balance model pi_b(beta|s) learns
in both phases to raise the Q of what pi_u does at its beta. Online pi_u learns and acts at the
coefficients of pi_b. V and the critics are those of IQL.

    python algorithms/famo2o_iql.py --config configs/famo2o_iql/antmaze_umaze.yaml

Only the paper's abstract could be had here, so the formulas are read off the authors' program
(LeapLabTHU/FamO2O at ea9cb01), with one fault mended: there the weight of a row is a mean over the
coefficients of the whole batch, so that the members of the family have no reason to differ.
`--preset public_code` (`weights_of: batch`) brings it back. docs/famo2o.md lists every difference.
Those without a switch: the numbers that draw a coefficient and the action at it are independent,
the actions of the dataset are not clipped to 1 - 1e-5, and evaluations have an environment of
their own.

Shapes: B rows of a batch, S state dimension, A action dimension, E numbers that tell of a
coefficient.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal

from corl import seeds
from corl.compiled import CompiledUpdate, descend, soft_update
from corl.config import FinetuneConfig, arguments_of, main
from corl.finetune import TensorBatch
from corl.sampling import Fit, standard_log_prob
from policy_family.acting import FamilyActor
from policy_family.balance import BalanceModel
from policy_family.coefficient import condition
from policy_family.config import FamilyFields

EXP_ADV_MAX = 100.0
LOG_STD_MIN = -5.0
LOG_STD_MAX = 2.0
BALANCE_LOG_STD_MIN = -10.0
COLUMNS = ["value_loss", "q_loss", "actor_loss"]
COLUMNS += ["balance_loss", "eta_loss", "eta", "beta_mean", "beta_std"]
# Attributes of the trainer and keys of its checkpoints; the actor is pi_u with pi_b.
CHECKPOINT_PARTS = (
    "qf",
    "q_target",
    "q_optimizer",
    "vf",
    "v_optimizer",
    "actor",
    "actor_optimizer",
    "balance_optimizer",
    "log_eta",
    "eta_optimizer",
)


@dataclass
class TrainConfig(FamilyFields, FinetuneConfig):
    """IQL's fields; the family's are in `FamilyFields`, every algorithm's in `FinetuneConfig`."""

    # Other defaults than the common ones
    normalize: bool = False  # normalize states with the dataset's mean and std
    group: str = "FamO2O-IQL-D4RL"  # wandb group
    name: str = "FamO2O-IQL"  # first part of the run folder's name
    # IQL; normalize_reward: locomotion: returns span 1000; antmaze: reward - 1
    tau: float = 0.005  # target network update rate
    iql_tau: float = 0.7  # expectile of the value loss
    vf_lr: float = 3e-4  # value function learning rate
    qf_lr: float = 3e-4  # critic learning rate
    actor_lr: float = 3e-4  # learning rate of the family
    # FamO2O on IQL
    balance_period: int = 1  # updates between two of the balance model
    eta_init: float = 1.0  # first weight of the balance model's entropy
    eta_lr: float = 3e-4  # its learning rate
    target_entropy: float = -0.5  # entropy of the balance model that eta aims at
    # Whose coefficient weighs a row's advantage: its own, or those of the whole batch (public code)
    weights_of: str = "own"

    RANGES: ClassVar[dict] = (
        FinetuneConfig.RANGES
        | FamilyFields.RANGES
        | {
            "tau": "(0, 1]",
            "iql_tau": "(0, 1)",
            **dict.fromkeys(("vf_lr", "qf_lr", "actor_lr", "eta_lr"), "(0, inf)"),
            "balance_period": "[1, 1e9]",
            "eta_init": "(0, inf)",
            "target_entropy": "(-inf, inf)",
        }
    )
    CHOICES: ClassVar[dict] = FinetuneConfig.CHOICES | {"weights_of": ("own", "batch")}
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | FamilyFields.ONLINE
    # The public code's names.
    ALIASES: ClassVar[Dict[str, str]] = {
        "expectile": "iql_tau",
        "value_lr": "vf_lr",
        "critic_lr": "qf_lr",
        "family_sin_cos_n": "encoding_base",
        "hierarchical_init_temperature": "eta_init",
        "hierarchical_temp_lr": "eta_lr",
    }
    PRESETS: ClassVar[dict] = {"public_code": {"weights_of": "batch"}}
    QUICK_START: ClassVar[str] = "configs/famo2o_iql/quick_start.yaml"

    def __post_init__(self):
        super().__post_init__()
        self.check_family()
        if self.mixing_ratio is not None:
            self.check_mixing_ratio("; leave it out for a single buffer")


def asymmetric_l2_loss(u: torch.Tensor, tau: float) -> torch.Tensor:
    """Expectile loss |tau - 1[u < 0]| u^2 of each residual, (B,) -> (B,); IQL Eq. 5."""
    below = (u < 0).to(u.dtype)
    return (tau - below).abs() * u.square()


class Squeeze(nn.Module):
    """(..., 1) -> (...)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(-1)


class MLP(nn.Module):
    """Linear layers of widths `dims` with ReLU in between, (..., dims[0]) -> (..., dims[-1]).

    `last` are the layers after them. Weights are orthogonal with gain sqrt(2), the last ones too,
    and biases 0: the authors' first weights.
    """

    def __init__(self, dims: List[int], *last: nn.Module):
        super().__init__()
        layers: List[nn.Module] = []
        for n_in, n_out in zip(dims[:-1], dims[1:], strict=True):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1], *last)
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight, gain=math.sqrt(2.0))
                nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class FamilyPolicy(nn.Module):
    """pi_u: Normal(tanh(mean(s, beta)), std) in units of the box, one policy for each beta.

    The standard deviation depends on neither; samples are not squashed.
    """

    def __init__(
        self,
        state_dim: int,
        act_dim: int,
        max_action: float,
        encoding_base: float = 10000.0,
        encoding_pairs: int = 3,
        hidden_dim: int = 256,
    ):
        super().__init__()
        widths = [state_dim + 2 * encoding_pairs, hidden_dim, hidden_dim, act_dim]
        self.net = MLP(widths, nn.Tanh())
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.max_action = max_action
        self.encoding = encoding_base, encoding_pairs

    def forward(self, obs: torch.Tensor, beta: torch.Tensor) -> Normal:
        """The law of actions (B, A) for states (B, S) and coefficients (B,)."""
        mean = self.net(condition(obs, beta, *self.encoding))
        # Argument checks read tensors on the host; they change no number.
        return Normal(mean, self.std(), validate_args=False)

    def std(self) -> torch.Tensor:
        """The standard deviation (A,)."""
        return self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()

    def choose(self, obs: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """Executable actions (B, A): the mean, or in training mode a sample."""
        action = self.net(condition(obs, beta, *self.encoding))
        if self.training:
            action = torch.normal(action, self.std().expand_as(action))
        action = self.max_action * action
        return action.clamp(-self.max_action, self.max_action)


class TwinQ(nn.Module):
    """Two critics: states (B, S) and actions (B, A) -> min(Q1, Q2) (B,); `both` gives both."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int = 256):
        super().__init__()
        widths = [state_dim + action_dim, hidden_dim, hidden_dim, 1]
        self.q1, self.q2 = (MLP(widths, Squeeze()) for _ in range(2))

    def both(
        self, state: torch.Tensor, action: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat((state, action), dim=-1)
        return self.q1(x), self.q2(x)

    def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        q1, q2 = self.both(state, action)
        return torch.minimum(q1, q2)


class ValueFunction(nn.Module):
    """V: states (B, S) -> (B,)."""

    def __init__(self, state_dim: int, hidden_dim: int = 256):
        super().__init__()
        self.v = MLP([state_dim, hidden_dim, hidden_dim, 1], Squeeze())

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.v(state)


class Scalar(nn.Module):
    """One trainable number."""

    def __init__(self, init_value: float):
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(init_value))

    def forward(self) -> nn.Parameter:
        return self.constant


class Noise(NamedTuple):
    """All random numbers of one update."""

    balance: torch.Tensor  # (B,), normal: the coefficient that pi_b learns from
    action: torch.Tensor  # (B, A), normal: the action at it
    share: Optional[torch.Tensor]  # (B,), in [0, 1): offline, pi_u's coefficient
    drawn: Optional[torch.Tensor]  # (B,), normal: online, pi_u's coefficient


class FamO2OIQL:
    """The networks, their losses and one update of each phase.

    The losses are functions of tensors and take no step; each returns one value per row.
    """

    def __init__(
        self,
        max_action: float,
        actor: FamilyActor,
        actor_optimizer: torch.optim.Optimizer,
        balance_optimizer: torch.optim.Optimizer,
        q_network: TwinQ,
        q_optimizer: torch.optim.Optimizer,
        v_network: ValueFunction,
        v_optimizer: torch.optim.Optimizer,
        iql_tau: float = 0.7,
        balance_period: int = 1,
        eta_init: float = 1.0,
        eta_lr: float = 3e-4,
        target_entropy: float = -0.5,
        weights_of: str = "own",
        discount: float = 0.99,
        tau: float = 0.005,
        device: str = "cpu",
    ):
        self.actor, self.qf, self.vf = actor, q_network, v_network
        self.q_target = copy.deepcopy(q_network).to(device).requires_grad_(False)
        self.actor_optimizer = actor_optimizer
        self.balance_optimizer = balance_optimizer
        self.q_optimizer, self.v_optimizer = q_optimizer, v_optimizer
        self.log_eta = Scalar(math.log(eta_init)).to(device)
        self.eta_optimizer = torch.optim.Adam(self.log_eta.parameters(), eta_lr)
        self.max_action, self.device = max_action, device
        self.iql_tau, self.weights_of = iql_tau, weights_of
        self.balance_period, self.target_entropy = balance_period, target_entropy
        self.discount, self.tau = discount, tau
        self.total_it = 0

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [
            self.q_optimizer,
            self.v_optimizer,
            self.actor_optimizer,
            self.balance_optimizer,
            self.eta_optimizer,
        ]

    def value_losses(self, adv: torch.Tensor) -> torch.Tensor:
        """Expectile regression of V towards Q, (B,); adv (B,) is Q - V."""
        return asymmetric_l2_loss(adv, self.iql_tau)

    def q_losses(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        next_v: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Squared TD errors of both critics, each (B,); next_v (B,)."""
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        y = rewards + (1.0 - dones) * self.discount * next_v
        q1, q2 = self.qf.both(observations, actions)
        return (
            F.mse_loss(q1, y, reduction="none"),
            F.mse_loss(q2, y, reduction="none"),
        )

    def advantage_weights(self, adv: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """min(exp(beta A), 100) of each row, (B,); adv and beta are (B,), without gradient."""
        if self.weights_of == "own":
            return (beta * adv).exp().clamp(max=EXP_ADV_MAX)
        # The public code multiplies (B, 1) and (B,), and takes the mean of the matrix.
        every = (beta.unsqueeze(-1) * adv).exp().clamp(max=EXP_ADV_MAX)
        return every.mean(-2)

    def policy_losses(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        adv: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        """Advantage-weighted regression of the family's members beta, (B,)."""
        law = self.actor.policy(observations, beta)
        bc_losses = -law.log_prob(actions / self.max_action).sum(-1)
        return self.advantage_weights(adv, beta) * bc_losses

    def balance_losses(
        self, observations: torch.Tensor, noise: Noise
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """eta log pi_b - Q of what pi_u does at a coefficient of pi_b, (B,).

        Then the log-densities and the coefficients, each (B,).
        """
        beta, log_prob = self.actor.balance(observations, noise.balance)
        law = self.actor.policy(observations, beta)
        actions = self.max_action * (law.mean + law.stddev * noise.action)
        q = self.q_target(observations, actions)
        return self.log_eta().detach().exp() * log_prob - q, log_prob, beta

    def eta_losses(self, log_prob: torch.Tensor) -> torch.Tensor:
        """Loss of the entropy's weight, (B,); log_prob (B,)."""
        return self.log_eta().exp() * (-log_prob.detach() - self.target_entropy)

    @torch.no_grad()
    def coefficients(self, observations: torch.Tensor, noise: Noise) -> torch.Tensor:
        """At which pi_u learns, (B,): offline spread over the range, online drawn from pi_b."""
        if noise.share is not None:
            return self.actor.balance.spread(noise.share)
        return self.actor.balance(observations, noise.drawn)[0]

    def _noise(self, actions: torch.Tensor, online: bool) -> Noise:
        """The random numbers of one update on actions (B, A), from the global stream."""
        flat = actions[..., 0]
        return Noise(
            balance=torch.randn_like(flat),
            action=torch.randn_like(actions),
            share=None if online else torch.rand_like(flat),
            drawn=torch.randn_like(flat) if online else None,
        )

    def train(self, batch: TensorBatch, online: bool = False) -> Dict[str, torch.Tensor]:
        """One update of a phase on a batch; returns 0-d tensors."""
        self.total_it += 1
        balance_is_due = self.total_it % self.balance_period == 0
        noise = self._noise(batch[1], online)
        return self._update(batch, noise, balance_is_due)

    def _update(
        self, batch: TensorBatch, noise: Noise, balance_is_due: bool
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps: V, pi_b, eta, pi_u, the critics, the targets.

        The coefficients of pi_u are those of pi_b before its step, and pi_b learns from pi_u
        before its step.
        """
        observations, actions, rewards, next_observations, dones = batch
        with torch.no_grad():
            target_q = self.q_target(observations, actions)
        v_loss = self.value_losses(target_q - self.vf(observations)).mean(-1)
        descend(v_loss, self.v_optimizer)
        beta = self.coefficients(observations, noise)
        log_dict = self._learn_balance(observations, noise) if balance_is_due else {}
        with torch.no_grad():
            adv = target_q - self.vf(observations)
            next_v = self.vf(next_observations)
        policy_loss = self.policy_losses(observations, actions, adv, beta).mean(-1)
        descend(policy_loss, self.actor_optimizer)
        q1_losses, q2_losses = self.q_losses(
            observations, actions, rewards, dones, next_v
        )
        q_loss = q1_losses.mean(-1) + q2_losses.mean(-1)
        descend(q_loss, self.q_optimizer)
        soft_update(self.q_target, self.qf, self.tau)
        return {
            "value_loss": v_loss.detach(),
            "q_loss": q_loss.detach(),
            "actor_loss": policy_loss.detach(),
            **log_dict,
        }

    def _learn_balance(
        self, observations: torch.Tensor, noise: Noise
    ) -> Dict[str, torch.Tensor]:
        """Steps of pi_b and of eta."""
        losses, log_prob, beta = self.balance_losses(observations, noise)
        balance_loss = losses.mean(-1)
        descend(balance_loss, self.balance_optimizer)
        eta_loss = self.eta_losses(log_prob).mean(-1)
        descend(eta_loss, self.eta_optimizer)
        beta = beta.detach()
        return {
            "balance_loss": balance_loss.detach(),
            "eta_loss": eta_loss.detach(),
            "eta": self.log_eta().detach().exp(),
            "beta_mean": beta.mean(-1),
            "beta_std": beta.std(-1, correction=0),
        }

    def state_dict(self) -> Dict[str, Any]:
        """All that learns."""
        return {
            **{part: getattr(self, part).state_dict() for part in CHECKPOINT_PARTS},
            "total_it": self.total_it,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from the networks and optimizers of a `state_dict`."""
        for part in CHECKPOINT_PARTS:
            getattr(self, part).load_state_dict(state_dict[part])
        self.total_it = state_dict["total_it"]


def make_actor(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float
) -> FamilyActor:
    """The family of policies and its balance model."""
    policy = FamilyPolicy(
        state_dim, action_dim, max_action, config.encoding_base, config.encoding_pairs
    )
    network = MLP([state_dim, 256, 256, 1])
    balance = BalanceModel(
        network, config.beta_low, config.beta_high, BALANCE_LOG_STD_MIN
    )
    return FamilyActor(policy, balance)


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> FamO2OIQL:
    """The trainer of a config, on the device."""
    q_network = TwinQ(state_dim, action_dim).to(device)
    v_network = ValueFunction(state_dim).to(device)
    actor = make_actor(config, state_dim, action_dim, max_action).to(device)

    def adam(network: nn.Module, rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=rate)

    trainer = FamO2OIQL(
        **arguments_of(FamO2OIQL, config, device=device),
        max_action=max_action,
        actor=actor,
        actor_optimizer=adam(actor.policy, config.actor_lr),
        balance_optimizer=adam(actor.balance, config.balance_lr),
        q_network=q_network,
        q_optimizer=adam(q_network, config.qf_lr),
        v_network=v_network,
        v_optimizer=adam(v_network, config.vf_lr),
    )
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


def policy_fit(trainer: FamO2OIQL) -> Fit:
    """How well rows fit the members of the family that act, for `sampling: on_policy`."""
    actor = trainer.actor

    def fit(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        law = actor.policy(states, actor.balance.mode(states))
        return standard_log_prob(actions / trainer.max_action, law.mean, law.stddev)

    return fit


def step(
    trainer: FamO2OIQL, source: Any, config: TrainConfig, online: bool
) -> Dict[str, Any]:
    """One update of a phase on a fresh batch of the source; returns its metrics."""
    return trainer.train(source.sample(config.batch_size), online)


@seeds.each
def train(config: TrainConfig) -> Dict[str, Any]:
    """The whole run; returns what the run folder's summary.json says."""
    with seeds.session(config, __file__, COLUMNS) as session:
        trainer = session.build(make_trainer)
        session.keep("trainer", trainer, loads=CHECKPOINT_PARTS)
        session.weigh_rows(trainer.actor, policy_fit(trainer))
        source = session.mixed
        session.start(
            offline=lambda: step(trainer, session.offline_buffer, config, False),
            online=lambda: step(trainer, source, config, True),
            period=config.balance_period,
        )
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, session.offline_buffer, config, False))
        for _ in session.online(trainer.actor):
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config, True)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
