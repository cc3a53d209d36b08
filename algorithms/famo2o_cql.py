"""FamO2O on CQL: a family of policies, and a model that picks one of them in each state.

Paper: Wang et al. 2023, https://arxiv.org/abs/2310.17966. The policy pi_u(a|s, beta) also reads
the coefficient beta that weighs Q against its entropy, so it is a family of policies. Offline it
learns with beta drawn evenly from a range. The balance model pi_b(beta|s) learns in both phases to
raise the Q of what pi_u does at its beta. Online pi_u learns and acts at the coefficients of pi_b.
The critics are those of CQL with normalized layers, and the conservative gap stays online.

    python algorithms/famo2o_cql.py --config configs/famo2o_cql/hopper_medium.yaml

Only the paper's abstract could be had here, so the formulas are read off the authors' program
(LeapLabTHU/FamO2O at ea9cb01), with two faults mended, which `--preset public_code` brings back:
there the coefficients of pi_b lie in (2 beta_low - beta_high, beta_high), below 0 too, and the next
state's actions are those of the coefficient of the state before it. docs/famo2o.md lists every
difference. Those without a switch: environment steps and updates take turns one by one, actions of
online rows are clipped as those of the dataset are, and rewards are scaled once.

Shapes: B rows of a batch, n = cql_n_actions, S state dimension, A action dimension.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from corl import finetune, seeds
from corl.compiled import CompiledUpdate, descend, soft_update
from corl.config import FinetuneConfig, arguments_of, main
from corl.finetune import LINEAR_REWARDS, TensorBatch
from corl.sampling import Fit, standard_log_prob
from policy_family.acting import FamilyActor
from policy_family.balance import BalanceModel
from policy_family.coefficient import condition, squashed
from policy_family.config import FamilyFields

LOG_STD_MIN = -20.0
LOG_STD_MAX = 2.0
# The data's actions are clipped to it.
LARGEST_ACTION = 0.999
ALMOST_ONE = 1.0 - 1e-6  # largest action whose pre-tanh value is looked at
# The authors' network library has it; torch's default is 1e-5.
LAYER_NORM_EPS = 1e-6
COLUMNS = [
    "log_pi",
    "policy_loss",
    "alpha_loss",
    "alpha",
    *("balance_loss", "beta_mean", "beta_std"),
    *(
        name.format(i)
        for name in (
            "qf{}_loss",
            "average_qf{}",
            "cql_q{}_rand",
            "cql_min_qf{}_loss",
            "cql_qf{}_diff",
            "cql_q{}_current_actions",
            "cql_q{}_next_actions",
        )
        for i in (1, 2)
    ),
    "average_target_q",
]
# Keys of checkpoints and attributes of the trainer; the actor is pi_u with pi_b.
CHECKPOINT_PARTS = {
    "actor": "actor",
    "critic1": "critic_1",
    "critic2": "critic_2",
    "critic1_target": "target_critic_1",
    "critic2_target": "target_critic_2",
    "critic_1_optimizer": "critic_1_optimizer",
    "critic_2_optimizer": "critic_2_optimizer",
    "actor_optim": "actor_optimizer",
    "balance_optim": "balance_optimizer",
    "sac_log_alpha": "log_alpha",
    "sac_log_alpha_optim": "alpha_optimizer",
}


@dataclass
class TrainConfig(FamilyFields, FinetuneConfig):
    """CQL's fields; the family's are in `FamilyFields`, every algorithm's in `FinetuneConfig`."""

    # Other defaults than the common ones
    offline_iterations: int = 2000000  # updates on the dataset alone
    normalize: bool = False  # normalize states with the dataset's mean and std
    group: str = "FamCQL-D4RL"  # wandb group
    name: str = "FamCQL"  # first part of the run folder's name
    # CQL; normalize_reward: locomotion: returns span 1000; then scale and bias
    alpha_multiplier: float = 1.0  # factor on the entropy coefficient
    policy_lr: float = 3e-4  # learning rate of the family and of the entropy coefficient
    qf_lr: float = 3e-4  # critics learning rate
    soft_target_update_rate: float = 5e-3  # target network update rate
    cql_alpha: float = 1.0  # weight of the conservative gap, in both phases
    cql_n_actions: int = 10  # actions of each kind under the soft maximum
    reward_scale: float = 1.0  # factor on rewards, only with normalize_reward
    reward_bias: float = 0.0  # added to them, only with normalize_reward
    # FamO2O on CQL
    beta_low: float = 0.5  # lowest coefficient of the family
    beta_high: float = 1.5  # highest; as beta_low: a family of one
    # Where the coefficients of pi_b lie: in the range (full), or from 2 beta_low - beta_high on
    # (unshifted: public code)
    balance_range: str = "full"
    # Whose coefficient acts in the next state: its own, or that of the state before (public code)
    next_beta: str = "own"

    RANGES: ClassVar[dict] = (
        FinetuneConfig.RANGES
        | FamilyFields.RANGES
        | {
            **dict.fromkeys(("alpha_multiplier", "cql_alpha"), "[0, inf)"),
            **dict.fromkeys(("policy_lr", "qf_lr"), "(0, inf)"),
            "soft_target_update_rate": "(0, 1]",
            "cql_n_actions": "[1, 1e4]",
            "reward_scale": "(0, inf)",
            "reward_bias": "(-inf, inf)",
        }
    )
    CHOICES: ClassVar[dict] = FinetuneConfig.CHOICES | {
        "balance_range": ("full", "unshifted"),
        "next_beta": ("own", "before"),
    }
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        *FamilyFields.ONLINE,
    }
    # The public code's names.
    ALIASES: ClassVar[Dict[str, str]] = {
        "cql_min_q_weight": "cql_alpha",
        "hierarchical_policy_lr": "balance_lr",
        "sin_cos_n": "encoding_base",
    }
    PRESETS: ClassVar[dict] = {
        "public_code": {"balance_range": "unshifted", "next_beta": "before"},
    }
    QUICK_START: ClassVar[str] = "configs/famo2o_cql/quick_start.yaml"
    REWARDS: ClassVar[finetune.RewardRule] = LINEAR_REWARDS

    def __post_init__(self):
        super().__post_init__()
        self.check_family()
        if self.mixing_ratio is not None:
            self.check_mixing_ratio("; leave it out for a single buffer")


@torch.no_grad()
def init_module_weights(network: nn.Sequential) -> None:
    """The authors' first weights: LeCun's normal ones, a small last layer, no biases."""
    *hidden, last = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer in hidden:
        # A normal that is cut off at two deviations, of which 0.8796 is left.
        std = 1.0 / math.sqrt(layer.in_features) / 0.87962566103423978
        inside = math.erf(math.sqrt(2.0))
        nn.init.uniform_(layer.weight, -inside, inside)
        layer.weight.erfinv_().mul_(math.sqrt(2.0) * std)
    bound = math.sqrt(3.0 * 1e-2 / last.in_features)
    nn.init.uniform_(last.weight, -bound, bound)
    for layer in (*hidden, last):
        nn.init.zeros_(layer.bias)


def relu_network(
    n_in: int, n_out: int, hidden_dim: int, norm: bool = False
) -> nn.Sequential:
    """(..., n_in) -> (..., n_out), two hidden layers with ReLU, normalized before it."""
    layers: List[nn.Module] = []
    for width in (n_in, hidden_dim):
        layers += [nn.Linear(width, hidden_dim)]
        layers += [nn.LayerNorm(hidden_dim, eps=LAYER_NORM_EPS)] if norm else []
        layers += [nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(hidden_dim, n_out))
    init_module_weights(network)
    return network


class Scalar(nn.Module):
    """One trainable number."""

    def __init__(self, init_value: float):
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(init_value))

    def forward(self) -> nn.Parameter:
        return self.constant


class FamilyPolicy(nn.Module):
    """pi_u: a squashed normal whose mean and log std depend on the state and on beta."""

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        encoding_base: float = 10000.0,
        encoding_pairs: int = 3,
        hidden_dim: int = 256,
    ):
        super().__init__()
        self.max_action = max_action
        self.encoding = encoding_base, encoding_pairs
        n_in = state_dim + 2 * encoding_pairs
        self.base_network = relu_network(n_in, 2 * action_dim, hidden_dim)
        self.log_std_multiplier = Scalar(1.0)
        self.log_std_offset = Scalar(-1.0)

    def moments(
        self, observations: torch.Tensor, beta: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Mean and log std (B, A) before the squashing, for states (B, S), coefficients (B,)."""
        out = self.base_network(condition(observations, beta, *self.encoding))
        mean, log_std = out.chunk(2, dim=-1)
        log_std = self.log_std_multiplier() * log_std + self.log_std_offset()
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)

    def forward(
        self, observations: torch.Tensor, beta: torch.Tensor, noise: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Actions, as many as there is normal noise, (B, A) or (B, n, A), and log-densities."""
        mean, log_std = self.moments(observations, beta)
        if noise.ndim == 3:
            # The network sees a state once, its actions share the output.
            mean, log_std = mean.unsqueeze(1), log_std.unsqueeze(1)
        actions, log_probs = squashed(mean, log_std, noise)
        return self.max_action * actions, log_probs

    def choose(self, observations: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        """Executable actions (B, A): the squashed mean, or in training mode a sample."""
        mean, log_std = self.moments(observations, beta)
        if self.training:
            mean = torch.normal(mean, log_std.exp())
        return self.max_action * mean.tanh()


class FullyConnectedQFunction(nn.Module):
    """One critic, with normalized layers."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_dim: int = 256):
        super().__init__()
        n_in = observation_dim + action_dim
        self.network = relu_network(n_in, 1, hidden_dim, norm=True)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q (B,) of actions (B, A), or Q (B, n) of actions (B, n, A), at observations (B, S)."""
        if actions.ndim == 3:
            observations = observations.unsqueeze(1).expand(-1, actions.shape[1], -1)
        return self.network(torch.cat((observations, actions), dim=-1)).squeeze(-1)


class Noise(NamedTuple):
    """All random numbers of one update."""

    balance: torch.Tensor  # (B,), normal: the coefficient of pi_b in the state
    next_balance: Optional[torch.Tensor]  # (B,), normal: in the next state
    share: Optional[torch.Tensor]  # (B,), in [0, 1): offline, pi_u's coefficient
    policy: torch.Tensor  # (B, A), normal: the action that pi_u learns from
    induced: Optional[
        torch.Tensor
    ]  # (B, A), normal: offline, pi_b's; online it is the same
    backup: torch.Tensor  # (B, A), normal
    uniform: torch.Tensor  # (B, n, A), in [-1, 1]
    current: torch.Tensor  # (B, n, A), normal
    following: torch.Tensor  # (B, n, A), normal


class Coefficients(NamedTuple):
    """The coefficients of one update, each (B,), without gradient."""

    current: torch.Tensor  # at which pi_u learns
    following: torch.Tensor  # of the actions in the next state


@dataclass(eq=False, repr=False)
class FamCQL:
    """The networks, their losses and one update of each phase.

    The losses are functions of tensors and take no step; each returns one value per row.
    """

    critic_1: nn.Module
    critic_1_optimizer: torch.optim.Optimizer
    critic_2: nn.Module
    critic_2_optimizer: torch.optim.Optimizer
    actor: FamilyActor
    actor_optimizer: torch.optim.Optimizer
    balance_optimizer: torch.optim.Optimizer
    target_entropy: float
    max_action: float = 1.0
    discount: float = 0.99
    alpha_multiplier: float = 1.0
    policy_lr: float = 3e-4
    soft_target_update_rate: float = 5e-3
    cql_n_actions: int = 10
    cql_alpha: float = 1.0
    next_beta: str = "own"
    device: str = "cpu"

    def __post_init__(self):
        self.target_critic_1, self.target_critic_2 = (
            copy.deepcopy(critic).to(self.device).requires_grad_(False)
            for critic in (self.critic_1, self.critic_2)
        )
        self.log_alpha = Scalar(0.0).to(self.device)
        self.alpha_optimizer = torch.optim.Adam(
            self.log_alpha.parameters(), self.policy_lr
        )
        self.total_it = 0

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [
            self.critic_1_optimizer,
            self.critic_2_optimizer,
            self.actor_optimizer,
            self.alpha_optimizer,
            self.balance_optimizer,
        ]

    def least_q(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """min(Q1, Q2) of the critics, (B,)."""
        critics = (self.critic_1, self.critic_2)
        return torch.minimum(*(critic(observations, actions) for critic in critics))

    def target_q(
        self, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """min(Q1, Q2) of the target networks, (B,)."""
        critics = (self.target_critic_1, self.target_critic_2)
        return torch.minimum(*(critic(observations, actions) for critic in critics))

    def alpha(self) -> torch.Tensor:
        """The entropy coefficient, 0-d."""
        return self.log_alpha().detach().exp() * self.alpha_multiplier

    def alpha_losses(self, log_pi: torch.Tensor) -> torch.Tensor:
        """Loss of the entropy coefficient, (B,); log_pi (B,)."""
        return -(self.log_alpha() * (log_pi + self.target_entropy).detach())

    def balance_losses(
        self, observations: torch.Tensor, beta: torch.Tensor, noise: Noise
    ) -> torch.Tensor:
        """-Q of what pi_u does at coefficients (B,) of pi_b, which have a gradient, (B,)."""
        of_action = noise.policy if noise.induced is None else noise.induced
        actions, _ = self.actor.policy(observations, beta, of_action)
        return -self.least_q(observations, actions)

    def policy_losses(
        self,
        observations: torch.Tensor,
        beta: torch.Tensor,
        new_actions: torch.Tensor,
        alpha: torch.Tensor,
        log_pi: torch.Tensor,
    ) -> torch.Tensor:
        """alpha log pi_u - beta Q, (B,)."""
        return alpha * log_pi - beta * self.least_q(observations, new_actions)

    @torch.no_grad()
    def coefficients(
        self, beta: torch.Tensor, next_observations: torch.Tensor, noise: Noise
    ) -> Coefficients:
        """Offline pi_u's are spread over the range; the rest is pi_b's, beta (B,) in the state."""
        balance, beta = self.actor.balance, beta.detach()
        following = beta
        if noise.next_balance is not None:
            following, _ = balance(next_observations, noise.next_balance)
        current = beta if noise.share is None else balance.spread(noise.share)
        return Coefficients(current, following)

    @torch.no_grad()
    def td_target(
        self,
        next_observations: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        next_beta: torch.Tensor,
        noise: Noise,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """TD target and the next value in it, both (B,); rewards and dones (B, 1)."""
        next_actions, _ = self.actor.policy(next_observations, next_beta, noise.backup)
        next_q = self.target_q(next_observations, next_actions)
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        return rewards + (1.0 - dones) * self.discount * next_q, next_q

    def _conservative_gap(
        self,
        number: int,
        critic: nn.Module,
        q_predicted: torch.Tensor,
        observations: torch.Tensor,
        proposals: Tuple[torch.Tensor, ...],
        log_dict: Dict,
    ) -> torch.Tensor:
        """Soft maximum of Q over actions minus Q of the data's action, (B,)."""
        uniform, current, following, current_log_pi, next_log_pi = proposals
        q_rand = critic(observations, uniform)
        q_current = critic(observations, current)
        q_next = critic(observations, following)  # at s, not s'
        uniform_log_prob = math.log(0.5 ** uniform.shape[-1])
        weighted = (q_next - next_log_pi, q_current - current_log_pi)
        q = torch.cat((q_rand - uniform_log_prob, *weighted), dim=1)
        for name, values in (
            ("rand", q_rand),
            ("current_actions", q_current),
            ("next_actions", q_next),
        ):
            log_dict[f"cql_q{number}_{name}"] = values.detach().mean()
        return torch.logsumexp(q, dim=1) - q_predicted

    def conservative_gaps(
        self,
        predicted: List[torch.Tensor],
        observations: torch.Tensor,
        next_observations: torch.Tensor,
        betas: Coefficients,
        noise: Noise,
        log_dict: Dict,
    ) -> List[torch.Tensor]:
        """The conservative gaps of both critics, each (B,); predicted: Q of the data, (B,)."""
        with torch.no_grad():
            policy = self.actor.policy
            current, log_pi = policy(observations, betas.current, noise.current)
            following, next_log_pi = policy(
                next_observations, betas.following, noise.following
            )
        uniform = self.max_action * noise.uniform
        proposals = uniform, current, following, log_pi, next_log_pi
        critics = (self.critic_1, self.critic_2)
        gaps = [
            self._conservative_gap(number, critic, q, observations, proposals, log_dict)
            for number, critic, q in zip((1, 2), critics, predicted, strict=True)
        ]
        return gaps

    def _noise(
        self,
        actions: torch.Tensor,
        online: bool,
    ) -> Noise:
        """The random numbers of one update on actions (B, A), from the global stream."""
        (b, a), n = actions.shape, self.cql_n_actions

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=actions.device)

        gap_rows = b
        return Noise(
            balance=normal(b),
            next_balance=normal(b) if self.next_beta == "own" else None,
            share=None if online else torch.rand(b, device=actions.device),
            policy=normal(b, a),
            induced=None if online else normal(b, a),
            backup=normal(b, a),
            uniform=actions.new_empty(gap_rows, n, a).uniform_(-1, 1),
            current=normal(gap_rows, n, a),
            following=normal(gap_rows, n, a),
        )

    def train(
        self,
        batch: TensorBatch,
        online: bool = False,
    ) -> Dict[str, torch.Tensor]:
        """One update of a phase on a batch; returns 0-d tensors."""
        self.total_it += 1
        noise = self._noise(
            batch[1],
            online,
        )
        return self._update(
            batch,
            noise,
        )

    def _update(
        self,
        batch: TensorBatch,
        noise: Noise,
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps; every loss is of the networks before them.

        pi_b steps first, since all that depends on it has been drawn then.
        """
        observations, actions, rewards, next_observations, dones = batch
        bound = LARGEST_ACTION * self.max_action
        actions = actions.clamp(-bound, bound)
        beta, _ = self.actor.balance(observations, noise.balance)
        betas = self.coefficients(beta, next_observations, noise)
        balance_loss = self.balance_losses(observations, beta, noise).mean(-1)
        descend(balance_loss, self.balance_optimizer)
        new_actions, log_pi = self.actor.policy(
            observations, betas.current, noise.policy
        )
        alpha = self.alpha()
        alpha_loss = self.alpha_losses(log_pi).mean(-1)
        policy_loss = self.policy_losses(
            observations, betas.current, new_actions, alpha, log_pi
        ).mean(-1)
        beta = beta.detach()
        log_dict = {
            "log_pi": log_pi.detach().mean(),
            "policy_loss": policy_loss.detach(),
            "alpha_loss": alpha_loss.detach(),
            "alpha": alpha,
            "balance_loss": balance_loss.detach(),
            "beta_mean": beta.mean(-1),
            "beta_std": beta.std(-1, correction=0),
        }
        td_target, next_q = self.td_target(
            next_observations, rewards, dones, betas.following, noise
        )
        log_dict["average_target_q"] = next_q.mean()
        rows = observations, actions, next_observations
        qf_loss = self._critic_loss(
            rows,
            td_target,
            betas,
            noise,
            log_dict,
        )
        descend(alpha_loss, self.alpha_optimizer)
        descend(policy_loss, self.actor_optimizer)
        descend(qf_loss, self.critic_1_optimizer, self.critic_2_optimizer)
        for number in ("1", "2"):
            target, critic = f"target_critic_{number}", f"critic_{number}"
            pair = getattr(self, target), getattr(self, critic)
            soft_update(*pair, self.soft_target_update_rate)
        return log_dict

    def _critic_loss(
        self,
        rows: Tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        td_target: torch.Tensor,
        betas: Coefficients,
        noise: Noise,
        log_dict: Dict,
    ) -> torch.Tensor:
        """TD losses and conservative gaps of both critics, (); rows: s, a, s'."""
        observations, actions, next_observations = rows
        critics = (self.critic_1, self.critic_2)
        predicted = [critic(observations, actions) for critic in critics]
        gaps = self.conservative_gaps(
            predicted,
            observations,
            next_observations,
            betas,
            noise,
            log_dict,
        )
        loss = td_target.new_zeros(())
        for i, (q, gap) in enumerate(zip(predicted, gaps, strict=True), start=1):
            td_loss = F.mse_loss(q, td_target, reduction="none").mean(-1)
            diff = gap.mean(-1)
            penalty = diff * self.cql_alpha
            log_dict[f"qf{i}_loss"] = td_loss.detach()
            log_dict[f"average_qf{i}"] = q.detach().mean()
            log_dict[f"cql_qf{i}_diff"] = diff.detach()
            log_dict[f"cql_min_qf{i}_loss"] = penalty.detach()
            loss = loss + td_loss + penalty
        return loss

    def state_dict(self) -> Dict[str, Any]:
        """All that learns."""
        state = {k: getattr(self, v).state_dict() for k, v in CHECKPOINT_PARTS.items()}
        return {**state, "total_it": self.total_it}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from the networks and optimizers of a `state_dict`."""
        for key, attribute in CHECKPOINT_PARTS.items():
            getattr(self, attribute).load_state_dict(state_dict[key])
        self.total_it = state_dict["total_it"]


def make_actor(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float
) -> FamilyActor:
    """The family of policies and its balance model."""
    policy = FamilyPolicy(
        state_dim, action_dim, max_action, config.encoding_base, config.encoding_pairs
    )
    balance = BalanceModel(
        relu_network(state_dim, 2, 256),
        config.beta_low,
        config.beta_high,
        LOG_STD_MIN,
        state_std=True,
        shifted=config.balance_range == "full",
    )
    return FamilyActor(policy, balance)


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> FamCQL:
    """The trainer of a config, on the device."""
    critic_1, critic_2 = (
        FullyConnectedQFunction(state_dim, action_dim).to(device) for _ in range(2)
    )
    actor = make_actor(config, state_dim, action_dim, max_action).to(device)

    def adam(network: nn.Module, rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=rate)

    trainer = FamCQL(
        **arguments_of(FamCQL, config, device=device),
        max_action=max_action,
        critic_1=critic_1,
        critic_1_optimizer=adam(critic_1, config.qf_lr),
        critic_2=critic_2,
        critic_2_optimizer=adam(critic_2, config.qf_lr),
        actor=actor,
        actor_optimizer=adam(actor.policy, config.policy_lr),
        balance_optimizer=adam(actor.balance, config.balance_lr),
        target_entropy=-float(action_dim),
    )
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


def policy_fit(trainer: FamCQL) -> Fit:
    """How well rows fit the members of the family that act, for `sampling: on_policy`."""
    actor = trainer.actor

    def fit(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        mean, log_std = actor.policy.moments(states, actor.balance.mode(states))
        inside = (actions / trainer.max_action).clamp(-ALMOST_ONE, ALMOST_ONE)
        return standard_log_prob(inside.atanh(), mean, log_std.exp())

    return fit


def step(
    trainer: FamCQL, source: Any, config: TrainConfig, online: bool
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
