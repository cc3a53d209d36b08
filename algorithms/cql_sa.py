"""CQL(SA): CQL whose conservative gap has a learned weight for each state.

Paper: Luo, Xie, Wang and Huang 2025 (SSAR), https://arxiv.org/abs/2505.19923. Base:
`algorithms/cql.py`, with critics that normalize their layers. The conservative gap of a row is
multiplied by beta(s) (Eq. 7). The coefficient falls where the policy gives the data's action a
higher density than an action n deviations from its mean, and rises where it gives a lower one
(Eq. 5, 6 and 9); n rises meanwhile (Eq. 8). Only trusted rows teach it, and only they have the
gap in their loss (Eq. 10). Online beta is kept and annealed (Eq. 15).

    python algorithms/cql_sa.py --config configs/cql_sa/hopper_medium.yaml

The numbers of an update are those of the public code (QinwenLuo/SSAR at 7e6dc0b); `--preset paper`
sets what the paper has otherwise. docs/ssar.md lists every difference from both. Those without a
switch: a buffer never wraps over the rows that it starts with, multipliers and threshold go on
learning after a resume, actions of online rows are clipped as those of the dataset are, and a
check of the threshold on a batch without a trusted row changes nothing.

Shapes: B rows of a batch, n = cql_n_actions, S state dimension, A action dimension.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import (
    Distribution,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

from adaptive_regularization.coefficient import (
    ANNEALING,
    CoefficientNet,
    Threshold,
    coefficient_losses,
)
from adaptive_regularization.config import MODES, SelectiveFields
from adaptive_regularization.iql_filter import IQLFilter
from adaptive_regularization.trust import TrustedRows, split
from corl import finetune, seeds
from corl.buffers import upload
from corl.compiled import CompiledUpdate, descend, soft_update
from corl.config import AUTO, FinetuneConfig, arguments_of, main

# CORL's names, for those who import them from here.
from corl.finetune import (  # noqa: F401
    LINEAR_REWARDS,
    MixedBuffer,
    ReplayBuffer,
    TensorBatch,
    compute_mean_std,
    eval_actor,
    is_goal_reached,
    normalize_states,
    return_reward_range,
    set_env_seed,
    set_seed,
    wrap_env,
)
from corl.finetune import modify_reward_linear as modify_reward  # noqa: F401
from corl.finetune import modify_reward_linear_online as modify_reward_online  # noqa: F401

LOG_STD_MIN = -20.0
LOG_STD_MAX = 2.0
ALMOST_ONE = 1.0 - 1e-6  # largest action whose pre-tanh value is scored
LARGEST_ACTION = 1.0 - 1e-4  # the data's actions are clipped to it
# Actions n deviations from the mean are clipped to it.
LARGEST_THRESHOLD_ACTION = 0.99999
FLOOR = 10.0  # deviations from the mean whose log-density is the least that counts
BETA_MAX_NORM = 0.5  # longest gradient of the coefficient
COLUMNS = [
    "log_pi",
    "policy_loss",
    "alpha_loss",
    "alpha",
    *(
        name.format(i)
        for name in (
            "qf{}_loss",
            "average_qf{}",
            "cql_std_q{}",
            "cql_q{}_rand",
            "cql_min_qf{}_loss",
            "cql_qf{}_diff",
            "cql_q{}_current_actions",
            "cql_q{}_next_actions",
        )
        for i in (1, 2)
    ),
    "average_target_q",
    "alpha_prime_loss",
    "alpha_prime",
    "decay",
    "trusted",
    *(f"beta_{name}" for name in ("loss", "min", "mean", "max")),
    *("gap", "outside", "n_away", "data_log_prob", "threshold_log_prob", "policy_std"),
]
# Keys of checkpoints and attributes of the trainer: CORL's, then its own.
CHECKPOINT_PARTS = {
    "actor": "actor",
    "critic1": "critic_1",
    "critic2": "critic_2",
    "critic1_target": "target_critic_1",
    "critic2_target": "target_critic_2",
    "critic_1_optimizer": "critic_1_optimizer",
    "critic_2_optimizer": "critic_2_optimizer",
    "actor_optim": "actor_optimizer",
    "sac_log_alpha": "log_alpha",
    "sac_log_alpha_optim": "alpha_optimizer",
    "cql_log_alpha": "log_alpha_prime",
    "cql_log_alpha_optim": "alpha_prime_optimizer",
    "beta": "beta",
    "beta_optimizer": "beta_optimizer",
    "threshold": "threshold",
}


@dataclass
class TrainConfig(SelectiveFields, FinetuneConfig):
    """CQL's fields; SSAR's are in `SelectiveFields`, every algorithm's in `FinetuneConfig`."""

    # Other defaults than the common ones
    env: str = "halfcheetah-medium-expert-v2"  # D4RL task name
    online_iterations: int = 250000  # environment steps of fine-tuning
    online_warmup: int = 5000  # online steps before the first online update
    group: str = "CQL_SA-D4RL"  # wandb group
    name: str = "CQL_SA"  # first part of the run folder's name
    # CQL; normalize_reward: locomotion: returns span 1000; then scale and bias
    alpha_multiplier: float = 1.0  # factor on the entropy coefficient
    use_automatic_entropy_tuning: bool = True  # learn that coefficient
    backup_entropy: bool = False  # subtract the entropy term in the TD target
    policy_lr: float = 3e-5  # actor learning rate
    qf_lr: float = 3e-4  # critics learning rate
    soft_target_update_rate: float = 5e-3  # target network update rate
    target_update_period: int = 1  # updates between two of the target networks
    cql_alpha: float = 10.0  # coefficient of the conservative gap at the start
    cql_n_actions: int = 10  # actions of each kind under the soft maximum
    cql_importance_sample: bool = True  # weight them by their densities
    cql_lagrange: bool = False  # learn the weight of the gap
    cql_target_action_gap: float = -1.0  # gap that the Lagrange multiplier aims at
    cql_temp: float = 1.0  # temperature of the soft maximum
    cql_max_target_backup: bool = False  # TD target: maximum over cql_n_actions
    cql_clip_diff_min: float = -np.inf  # lower bound of the gap of a row
    cql_clip_diff_max: float = np.inf  # upper bound of it
    # Orthogonal weights in the critics; else torch's; both with a small last layer
    orthogonal_init: bool = True
    q_n_hidden_layers: int = 3  # hidden layers of the critics
    q2_n_hidden_layers: Optional[int] = None  # of the second critic; none: as the first
    reward_scale: float = 1.0  # factor on rewards, only with normalize_reward
    reward_bias: float = 0.0  # added to them, only with normalize_reward
    # CQL(SA)
    actor_bc_weight: float = 0.0  # weight of the policy's squared distance to the data
    # An action n deviations from the mean stays so close to it, times n; inf: the paper
    threshold_cap: float = 0.1
    # How the coefficient falls online: linear, cosine, none; auto: cosine
    beta_anneal: str = "auto"
    # What the online buffer starts with; auto: all of the dataset on antmaze, else part
    buffer_mode: str = "auto"

    RANGES: ClassVar[dict] = (
        FinetuneConfig.RANGES
        | SelectiveFields.RANGES
        | {
            "alpha_multiplier": "[0, inf)",
            **dict.fromkeys(("policy_lr", "qf_lr"), "(0, inf)"),
            "soft_target_update_rate": "(0, 1]",
            "target_update_period": "[1, 1e9]",
            "cql_alpha": "(0, inf)",
            "cql_n_actions": "[1, 1e4]",
            "cql_target_action_gap": "(-inf, inf)",
            "cql_temp": "(0, inf)",
            "cql_clip_diff_min": "[-inf, inf)",
            "cql_clip_diff_max": "(-inf, inf]",
            **dict.fromkeys(("q_n_hidden_layers", "q2_n_hidden_layers"), "[1, 100]"),
            "reward_scale": "(0, inf)",
            "reward_bias": "(-inf, inf)",
            "actor_bc_weight": "[0, inf)",
            "threshold_cap": "(0, inf]",
        }
    )
    CHOICES: ClassVar[dict] = (
        FinetuneConfig.CHOICES
        | SelectiveFields.CHOICES
        | {
            "sampling": ("uniform",),
            "beta_anneal": (*ANNEALING, AUTO),
            "buffer_mode": (*MODES, AUTO),
        }
    )
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        *SelectiveFields.ONLINE,
    }
    ALIASES: ClassVar[Dict[str, str]] = SelectiveFields.ALIASES
    PRESETS: ClassVar[dict] = {
        "public_code": {},
        "paper": {**SelectiveFields.PAPER, "threshold_cap": np.inf},
    }
    QUICK_START: ClassVar[str] = "configs/cql_sa/quick_start.yaml"
    REWARDS: ClassVar[finetune.RewardRule] = LINEAR_REWARDS

    def __post_init__(self):
        super().__post_init__()
        if not self.cql_clip_diff_min <= self.cql_clip_diff_max:
            raise ValueError(
                f"cql_clip_diff_min {self.cql_clip_diff_min} lies above "
                f"cql_clip_diff_max {self.cql_clip_diff_max}"
            )
        if self.beta_anneal == AUTO:
            self.beta_anneal = "cosine"
        if self.buffer_mode == AUTO:
            self.buffer_mode = "all" if self.env.startswith("antmaze") else "part"
        self.check_selective()
        if self.mixing_ratio:
            self.check_mixing_ratio()


def extend_and_repeat(tensor: torch.Tensor, dim: int, repeat: int) -> torch.Tensor:
    """`repeat` copies along a new dimension `dim`: (B, ...) -> (B, repeat, ...) for dim 1."""
    return tensor.unsqueeze(dim).repeat_interleave(repeat, dim)


def init_module_weights(network: nn.Sequential, orthogonal_init: bool = False) -> None:
    """Orthogonal hidden layers without biases, or torch's own; a small last layer without bias."""
    *hidden, last = [layer for layer in network if isinstance(layer, nn.Linear)]
    for layer in hidden * orthogonal_init:
        nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
        nn.init.zeros_(layer.bias)
    small = nn.init.orthogonal_ if orthogonal_init else nn.init.xavier_uniform_
    small(last.weight, gain=0.01)
    nn.init.zeros_(last.bias)


def relu_network(
    n_in: int,
    n_hidden: int,
    n_out: int,
    hidden_dim: int,
    orthogonal_init: bool = False,
    norm: bool = False,
) -> nn.Sequential:
    """(..., n_in) -> (..., n_out), n_hidden layers with ReLU, normalized before it."""
    widths, layers = [n_in] + n_hidden * [hidden_dim], []
    for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(width_in, width_out)]
        layers += [nn.LayerNorm(width_out)] if norm else []
        layers += [nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(hidden_dim, n_out))
    init_module_weights(network, orthogonal_init)
    return network


class Scalar(nn.Module):
    """One trainable number."""

    def __init__(self, init_value: float):
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(init_value, dtype=torch.float32))

    def forward(self) -> nn.Parameter:
        return self.constant


class ReparameterizedTanhGaussian(nn.Module):
    """tanh of a Gaussian with its log-density; mean and log_std are (..., A)."""

    def __init__(
        self,
        log_std_min: float = LOG_STD_MIN,
        log_std_max: float = LOG_STD_MAX,
        no_tanh: bool = False,
    ):
        super().__init__()
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        self.no_tanh = no_tanh

    def _distribution(self, mean: torch.Tensor, log_std: torch.Tensor) -> Distribution:
        std = log_std.clamp(self.log_std_min, self.log_std_max).exp()
        # Argument checks read tensors on the host; they change no number.
        normal = Normal(mean, std, validate_args=False)
        if self.no_tanh:
            return normal
        squash = TanhTransform(cache_size=1)
        return TransformedDistribution(normal, squash, validate_args=False)

    def log_probs(
        self, mean: torch.Tensor, log_std: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Log-density of each dimension of samples (..., A) in [-1, 1], (..., A), in nats."""
        if not self.no_tanh:  # at the bounds the density has no finite value
            sample = sample.clamp(-ALMOST_ONE, ALMOST_ONE)
        return self._distribution(mean, log_std).log_prob(sample)

    def log_prob(
        self, mean: torch.Tensor, log_std: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Log-density (...) of samples (..., A) in [-1, 1], in nats."""
        return self.log_probs(mean, log_std, sample).sum(-1)

    def forward(
        self, mean: torch.Tensor, log_std: torch.Tensor, noise: Optional[torch.Tensor]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Actions (..., A) for normal noise (..., A), None: the mode; log-densities (...)."""
        if noise is None:
            action = mean.tanh()
            return action, self.log_prob(mean, log_std, action)
        distribution = self._distribution(mean, log_std)
        normal = distribution if self.no_tanh else distribution.base_dist
        action = normal.loc + noise * normal.scale
        if not self.no_tanh:
            # The transform remembers its input, so that no atanh is needed for the density.
            action = distribution.transforms[0](action)
        return action, distribution.log_prob(action).sum(-1)


class TanhGaussianPolicy(nn.Module):
    """states (B, S) -> actions (B, A) in [-max_action, max_action] and log-densities (B,)."""

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        log_std_multiplier: float = 1.0,
        log_std_offset: float = -1.0,
        no_tanh: bool = False,
        hidden_dim: int = 256,
    ):
        super().__init__()
        self.max_action = max_action
        self.base_network = relu_network(state_dim, 3, 2 * action_dim, hidden_dim)
        self.log_std_multiplier = Scalar(log_std_multiplier)
        self.log_std_offset = Scalar(log_std_offset)
        self.tanh_gaussian = ReparameterizedTanhGaussian(no_tanh=no_tanh)

    def _parameters_of(
        self, observations: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.base_network(observations).chunk(2, dim=-1)
        return mean, self.log_std_multiplier() * log_std + self.log_std_offset()

    def log_prob(
        self, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """Log-density of actions (B, A) or (B, n, A) at observations (B, S), in nats."""
        if actions.ndim == 3:
            observations = extend_and_repeat(observations, 1, actions.shape[1])
        mean, log_std = self._parameters_of(observations)
        return self.tanh_gaussian.log_prob(mean, log_std, actions / self.max_action)

    @torch.no_grad()
    def threshold_log_probs(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        n: torch.Tensor,
        cap: float,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-densities of actions and of the threshold, and the policy's std, each (B, A).

        The threshold of a dimension is the lower one of the two actions n deviations before and
        behind the mean, which are at most n times the cap from the squashed mean (Eq. 6). An
        action's own density counts at least as that of 10 deviations.
        """
        mean, log_std = self._parameters_of(observations)
        std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()
        center = mean.tanh()

        def away(n: Union[torch.Tensor, float]) -> torch.Tensor:
            bound, sides = LARGEST_THRESHOLD_ACTION, []
            for side in (1.0, -1.0):
                action = (mean + side * n * std).tanh().clamp(-bound, bound)
                action = torch.clamp(action, center - n * cap, center + n * cap)
                sides.append(self.tanh_gaussian.log_probs(mean, log_std, action))
            return torch.minimum(*sides)

        own = self.tanh_gaussian.log_probs(mean, log_std, actions / self.max_action)
        return torch.maximum(own, away(FLOOR)), away(n), std

    def forward(
        self,
        observations: torch.Tensor,
        deterministic: bool = False,
        repeat: Optional[int] = None,
        noise: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, A), or (B, repeat, A), and their log-densities (B,), or (B, repeat).

        `noise` is standard normal, of the shape of the actions; without it, it is drawn here.
        """
        mean, log_std = self._parameters_of(observations)
        if repeat is not None:
            # The network sees a state once, its copies share the output.
            mean, log_std = (extend_and_repeat(x, 1, repeat) for x in (mean, log_std))
        if deterministic:
            noise = None
        elif noise is None:
            noise = torch.randn(mean.shape, device=mean.device)
        actions, log_probs = self.tanh_gaussian(mean, log_std, noise)
        return self.max_action * actions, log_probs

    @torch.no_grad()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Executable action (A,) for a state (S,); training mode explores."""
        obs = torch.as_tensor(state, dtype=torch.float32, device=device)
        actions, _ = self(obs.unsqueeze(0), deterministic=not self.training)
        return actions[0].cpu().numpy()


class FullyConnectedQFunction(nn.Module):
    """One critic."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        orthogonal_init: bool = False,
        n_hidden_layers: int = 3,
        hidden_dim: int = 256,
    ):
        super().__init__()
        self.network = relu_network(
            *(observation_dim + action_dim, n_hidden_layers, 1, hidden_dim),
            orthogonal_init=orthogonal_init,
            norm=True,
        )

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q (B,) of actions (B, A), or Q (B, n) of actions (B, n, A), at observations (B, S)."""
        if actions.ndim == 3 and observations.ndim == 2:
            observations = extend_and_repeat(observations, 1, actions.shape[1])
        return self.network(torch.cat((observations, actions), dim=-1)).squeeze(-1)


class Noise(NamedTuple):
    """All random numbers of one update, drawn in upstream's order."""

    policy: torch.Tensor  # (B, A), normal
    backup: torch.Tensor  # (B, A), or (B, n, A) for the maximum; normal
    uniform: torch.Tensor  # (B, n, A), in [-1, 1]
    current: torch.Tensor  # (B, n, A), normal
    following: torch.Tensor  # (B, n, A), normal


@dataclass(eq=False, repr=False)
class CQL_SA:
    """CQL(SA)'s networks, their losses and one update of all of them.

    The losses are functions of tensors and take no step; each returns one value per row.
    """

    critic_1: nn.Module
    critic_1_optimizer: torch.optim.Optimizer
    critic_2: nn.Module
    critic_2_optimizer: torch.optim.Optimizer
    actor: nn.Module
    actor_optimizer: torch.optim.Optimizer
    beta: nn.Module
    beta_optimizer: torch.optim.Optimizer
    threshold: nn.Module
    target_entropy: float
    chosen_by: Optional[Any] = None
    discount: float = 0.99
    alpha_multiplier: float = 1.0
    use_automatic_entropy_tuning: bool = True
    backup_entropy: bool = False
    policy_lr: float = 3e-4
    qf_lr: float = 3e-4
    soft_target_update_rate: float = 5e-3
    target_update_period: int = 1
    cql_n_actions: int = 10
    cql_importance_sample: bool = True
    cql_lagrange: bool = False
    cql_target_action_gap: float = -1.0
    cql_temp: float = 1.0
    cql_max_target_backup: bool = False
    cql_clip_diff_min: float = -np.inf
    cql_clip_diff_max: float = np.inf
    actor_bc_weight: float = 0.0
    threshold_cap: float = 0.1
    trust_penalty: bool = True
    n_period: int = 50000
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
        self.log_alpha_prime = Scalar(1.0).to(self.device)
        self.alpha_prime_optimizer = torch.optim.Adam(
            self.log_alpha_prime.parameters(), self.qf_lr
        )
        self.total_it = 0
        self.decay = 1.0  # factor on the coefficient; the online loop sets it
        self.learns_beta = True  # offline

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [
            self.critic_1_optimizer,
            self.critic_2_optimizer,
            self.actor_optimizer,
            self.alpha_optimizer,
            self.alpha_prime_optimizer,
            self.beta_optimizer,
        ]

    def update_target_network(self, soft_target_update_rate: float) -> None:
        """Move both target critics towards the critics."""
        soft_update(self.target_critic_1, self.critic_1, soft_target_update_rate)
        soft_update(self.target_critic_2, self.critic_2, soft_target_update_rate)

    def start_online(self) -> None:
        """The coefficient and the threshold stay as they are."""
        self.learns_beta = False

    def target_q(
        self, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """min(Q1, Q2) of the target networks, (B,) or (B, n)."""
        return torch.minimum(
            self.target_critic_1(observations, actions),
            self.target_critic_2(observations, actions),
        )

    def alpha(self, log_pi: torch.Tensor) -> torch.Tensor:
        """The entropy coefficient, 0-d."""
        if not self.use_automatic_entropy_tuning:
            return log_pi.new_tensor(self.alpha_multiplier)
        return self.log_alpha().detach().exp() * self.alpha_multiplier

    def alpha_losses(self, log_pi: torch.Tensor) -> torch.Tensor:
        """Loss of the entropy coefficient, (B,); log_pi (B,)."""
        if not self.use_automatic_entropy_tuning:
            return torch.zeros_like(log_pi)
        return -(self.log_alpha() * (log_pi + self.target_entropy).detach())

    def policy_losses(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        new_actions: torch.Tensor,
        alpha: torch.Tensor,
        log_pi: torch.Tensor,
    ) -> torch.Tensor:
        """alpha log pi - Q, plus a share of the squared distance to the data's action, (B,)."""
        critics = (self.critic_1, self.critic_2)
        goal = torch.minimum(*(c(observations, new_actions) for c in critics))
        if not self.actor_bc_weight:
            return alpha * log_pi - goal
        distances = (new_actions - actions).square().sum(-1)
        return alpha * log_pi - goal + self.actor_bc_weight * distances

    @torch.no_grad()
    def td_target(
        self,
        next_observations: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        alpha: torch.Tensor,
        noise: Noise,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """TD target and the next value in it, both (B,); rewards and dones (B, 1)."""
        if self.cql_max_target_backup:
            next_actions, next_log_pi = self.actor(
                next_observations, repeat=self.cql_n_actions, noise=noise.backup
            )
            next_q, best = self.target_q(next_observations, next_actions).max(dim=-1)
            next_log_pi = next_log_pi.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        else:
            next_actions, next_log_pi = self.actor(next_observations, noise=noise.backup)
            next_q = self.target_q(next_observations, next_actions)
        if self.backup_entropy:
            next_q = next_q - alpha * next_log_pi
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        return rewards + (1.0 - dones) * self.discount * next_q, next_q

    @torch.no_grad()
    def _proposals(
        self,
        observations: torch.Tensor,
        next_observations: torch.Tensor,
        noise: Noise,
    ) -> Tuple[torch.Tensor, ...]:
        """Actions under the soft maximum: uniform, of pi(s), of pi(s'), each (B, n, A).

        Then the log-densities of the last two, each (B, n).
        """
        n = self.cql_n_actions
        current, current_log_pi = self.actor(observations, repeat=n, noise=noise.current)
        following, next_log_pi = self.actor(
            next_observations, repeat=n, noise=noise.following
        )
        return noise.uniform, current, following, current_log_pi, next_log_pi

    def _conservative_gap(
        self,
        number: int,
        critic: nn.Module,
        q_predicted: torch.Tensor,
        observations: torch.Tensor,
        proposals: Tuple[torch.Tensor, ...],
        log_dict: Dict,
    ) -> torch.Tensor:
        """Soft maximum of Q over actions minus Q of the data's action, clipped, (B,)."""
        uniform, current, following, current_log_pi, next_log_pi = proposals
        q_rand = critic(observations, uniform)
        q_current = critic(observations, current)
        q_next = critic(observations, following)  # at s, not s': as upstream
        plain = torch.cat((q_rand, q_predicted.unsqueeze(1), q_next, q_current), dim=1)
        q = plain
        if self.cql_importance_sample:
            uniform_log_prob = math.log(0.5 ** uniform.shape[-1])
            weighted = (q_next - next_log_pi, q_current - current_log_pi)
            q = torch.cat((q_rand - uniform_log_prob, *weighted), dim=1)
        soft_maximum = torch.logsumexp(q / self.cql_temp, dim=1) * self.cql_temp
        log_dict[f"cql_std_q{number}"] = plain.detach().std(dim=1).mean()
        for name, values in (
            ("rand", q_rand),
            ("current_actions", q_current),
            ("next_actions", q_next),
        ):
            log_dict[f"cql_q{number}_{name}"] = values.detach().mean()
        gap = soft_maximum - q_predicted
        return gap.clamp(self.cql_clip_diff_min, self.cql_clip_diff_max)

    def conservative_gaps(
        self,
        predicted: List[torch.Tensor],
        observations: torch.Tensor,
        next_observations: torch.Tensor,
        noise: Noise,
        log_dict: Dict,
    ) -> List[torch.Tensor]:
        """The conservative gaps of both critics, each (B,); predicted: Q of the data, (B,)."""
        proposals = self._proposals(observations, next_observations, noise)
        critics = (self.critic_1, self.critic_2)
        gaps = [
            self._conservative_gap(
                number,
                critic,
                q,
                observations,
                proposals,
                log_dict,
            )
            for number, critic, q in zip((1, 2), critics, predicted, strict=True)
        ]
        return gaps

    def row_weights(
        self,
        beta: torch.Tensor,
        trust: torch.Tensor,
        decay: torch.Tensor,
    ) -> torch.Tensor:
        """Weight of the conservative gap of each row, (B,).

        It is sg[beta(s)] times the trust of the row times the annealing. This is the one place
        where the weight of another method multiplies, as that of DARE in dare_cql_sa.py.
        """
        weights = beta.detach() * decay
        return weights * trust if self.trust_penalty else weights

    def _penalties(
        self,
        gaps: List[torch.Tensor],
        weights: torch.Tensor,
        log_dict: Dict,
    ) -> Tuple[List[torch.Tensor], torch.Tensor]:
        """Conservative terms of the critics' loss and the multiplier's loss, all 0-d.

        With the multiplier the weight is on the gap's excess over its target: mean(w (gap - g)).
        """
        if not self.cql_lagrange:
            alpha_prime = alpha_prime_loss = weights.new_zeros(())
            penalties = [(weights * gap).mean(-1) for gap in gaps]
        else:
            alpha_prime = self.log_alpha_prime().exp().clamp(0.0, 1000000.0)
            target = self.cql_target_action_gap
            excess = [(weights * (gap - target)).mean(-1) for gap in gaps]
            dual = [alpha_prime * e.detach() for e in excess]
            alpha_prime_loss = (-dual[0] - dual[1]) * 0.5
            alpha_prime = alpha_prime.detach()
            penalties = [alpha_prime * e for e in excess]
        log_dict["alpha_prime"] = alpha_prime
        log_dict["alpha_prime_loss"] = alpha_prime_loss.detach()
        return penalties, alpha_prime_loss

    def _noise(
        self,
        actions: torch.Tensor,
    ) -> Noise:
        """The random numbers of one update on actions (B, A), from the global stream."""
        (b, a), n = actions.shape, self.cql_n_actions

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=actions.device)

        gap_rows = b
        return Noise(
            policy=normal(b, a),
            backup=normal(b, n, a) if self.cql_max_target_backup else normal(b, a),
            uniform=actions.new_empty(gap_rows, n, a).uniform_(-1, 1),
            current=normal(gap_rows, n, a),
            following=normal(gap_rows, n, a),
        )

    def train(
        self,
        batch: TensorBatch,
    ) -> Dict[str, torch.Tensor]:
        """One update on a batch, whose last field may be trust; returns 0-d tensors."""
        self.total_it += 1
        batch, trust = split(batch)
        due = self.total_it % self.n_period == 0
        noise = self._noise(
            batch[1],
        )
        return self._update(
            batch,
            trust,
            noise,
            # Tensors: a number would be compiled in.
            batch[1].new_full((), self.decay),
            batch[1].new_full((), float(due)),
            self.total_it % self.target_update_period == 0,
            self.learns_beta,
        )

    def _update(
        self,
        batch: TensorBatch,
        trust: torch.Tensor,
        noise: Noise,
        decay: torch.Tensor,
        due: torch.Tensor,
        move_targets: bool,
        update_beta: bool,
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps; all losses but beta's come before the first.

        The coefficient follows the new policy.
        """
        observations, actions, rewards, next_observations, dones = batch
        # Where the density of an action is finite.
        bound = LARGEST_ACTION * self.actor.max_action
        actions = actions.clamp(-bound, bound)
        new_actions, log_pi = self.actor(observations, noise=noise.policy)
        alpha = self.alpha(log_pi)
        alpha_loss = self.alpha_losses(log_pi).mean(-1)
        policy_loss = self.policy_losses(
            observations, actions, new_actions, alpha, log_pi
        ).mean(-1)
        log_dict = {
            "log_pi": log_pi.detach().mean(),
            "policy_loss": policy_loss.detach(),
            "alpha_loss": alpha_loss.detach(),
            "alpha": alpha,
            "decay": decay,
            "trusted": trust.mean(),
        }
        beta = self.beta(observations)
        log_dict.update(beta_metrics(beta))
        weights = self.row_weights(
            beta,
            trust,
            decay,
        )
        qf_loss, alpha_prime_loss = self._critic_loss(
            [observations, actions, rewards, next_observations, dones],
            weights,
            alpha,
            noise,
            log_dict,
        )
        if self.cql_lagrange:
            descend(alpha_prime_loss, self.alpha_prime_optimizer)
        if self.use_automatic_entropy_tuning:
            descend(alpha_loss, self.alpha_optimizer)
        descend(policy_loss, self.actor_optimizer)
        descend(qf_loss, self.critic_1_optimizer, self.critic_2_optimizer)
        if update_beta:
            self._update_beta(observations, actions, trust, beta, due, log_dict)
        if move_targets:
            self.update_target_network(self.soft_target_update_rate)
        return log_dict

    def _critic_loss(
        self,
        batch: TensorBatch,
        weights: torch.Tensor,
        alpha: torch.Tensor,
        noise: Noise,
        log_dict: Dict,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The critics' loss and the multiplier's, both 0-d; weights (B,) of the gaps."""
        observations, actions, rewards, next_observations, dones = batch
        critics = (self.critic_1, self.critic_2)
        predicted = [critic(observations, actions) for critic in critics]
        td_target, next_q = self.td_target(
            next_observations, rewards, dones, alpha, noise
        )
        log_dict["average_target_q"] = next_q.mean()
        td_losses = [F.mse_loss(q, td_target, reduction="none") for q in predicted]
        td_losses = [losses.mean(-1) for losses in td_losses]
        gaps = self.conservative_gaps(
            predicted,
            observations,
            next_observations,
            noise,
            log_dict,
        )
        penalties, alpha_prime_loss = self._penalties(gaps, weights, log_dict)
        for i in (0, 1):
            log_dict[f"qf{i + 1}_loss"] = td_losses[i].detach()
            log_dict[f"average_qf{i + 1}"] = predicted[i].detach().mean()
            log_dict[f"cql_qf{i + 1}_diff"] = gaps[i].detach().mean()
            log_dict[f"cql_min_qf{i + 1}_loss"] = penalties[i].detach()
        return td_losses[0] + td_losses[1] + penalties[0] + penalties[
            1
        ], alpha_prime_loss

    def gaps(
        self, observations: torch.Tensor, actions: torch.Tensor, log_dict: Dict
    ) -> torch.Tensor:
        """Log-density of the data's action above that of the threshold, (B,); below 0: outside.

        The mean over dimensions, as the public code has it; Eq. 5 has the sum.
        """
        data, limit, std = self.actor.threshold_log_probs(
            observations, actions, self.threshold.n, self.threshold_cap
        )
        log_dict["data_log_prob"], log_dict["policy_std"] = data.mean(), std.mean()
        log_dict["threshold_log_prob"] = limit.mean()
        return (data - limit).mean(-1)

    def _update_beta(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        trust: torch.Tensor,
        beta: torch.Tensor,
        due: torch.Tensor,
        log_dict: Dict,
    ) -> None:
        """One step of the coefficient, and where it is due a check of the threshold."""
        gaps = self.gaps(observations, actions, log_dict)
        beta_loss = coefficient_losses(gaps, trust, beta).mean(-1)
        self.threshold.check(gaps, trust, due)
        descend(beta_loss, self.beta_optimizer, max_norm=BETA_MAX_NORM)
        log_dict["beta_loss"] = beta_loss.detach()
        log_dict["gap"], log_dict["outside"] = gaps.mean(), (gaps < 0).float().mean()
        # A copy: the next check writes into it.
        log_dict["n_away"] = self.threshold.n.clone()

    def checkpoint_parts(self) -> Dict[str, str]:
        """What a checkpoint must hold to start from: key -> attribute."""
        chosen_by = {"chosen_by": "chosen_by"} if self.chosen_by is not None else {}
        return CHECKPOINT_PARTS | chosen_by

    def state_dict(self) -> Dict[str, Any]:
        """CORL's keys, and what SSAR adds."""
        parts = self.checkpoint_parts()
        state = {k: getattr(self, v).state_dict() for k, v in parts.items()}
        return {**state, "total_it": self.total_it, "learns_beta": self.learns_beta}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)
        self.learns_beta = state_dict["learns_beta"]

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from the networks and optimizers of a `state_dict`."""
        for key, attribute in self.checkpoint_parts().items():
            getattr(self, attribute).load_state_dict(state_dict[key])
        self.total_it = state_dict["total_it"]


def beta_metrics(beta: torch.Tensor) -> Dict[str, torch.Tensor]:
    """The least, mean and largest of the coefficients (B,)."""
    found = beta.detach()
    return {"beta_min": found.min(), "beta_mean": found.mean(), "beta_max": found.max()}


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> CQL_SA:
    """The trainer of a config, on the device."""
    depths = config.q_n_hidden_layers, config.q2_n_hidden_layers
    critic_1, critic_2 = (
        FullyConnectedQFunction(
            *(state_dim, action_dim, config.orthogonal_init, depth or depths[0])
        ).to(device)
        for depth in depths
    )
    actor = TanhGaussianPolicy(state_dim, action_dim, max_action).to(device)
    beta = CoefficientNet(state_dim, config.cql_alpha).to(device)
    raises = config.raises(config.offline_iterations)
    trainer = CQL_SA(
        **arguments_of(CQL_SA, config, device=device),
        critic_1=critic_1,
        critic_1_optimizer=torch.optim.Adam(critic_1.parameters(), config.qf_lr),
        critic_2=critic_2,
        critic_2_optimizer=torch.optim.Adam(critic_2.parameters(), config.qf_lr),
        actor=actor,
        actor_optimizer=torch.optim.Adam(actor.parameters(), config.policy_lr),
        beta=beta,
        beta_optimizer=torch.optim.Adam(beta.parameters(), config.beta_lr),
        threshold=Threshold(config.n_start, config.n_end, raises).to(device),
        target_entropy=-float(action_dim),
        chosen_by=make_filter(config, state_dim, action_dim, device),
    )
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


def make_filter(
    config: TrainConfig, state_dim: int, action_dim: int, device: str
) -> Optional[IQLFilter]:
    """The IQL filter of a config, on the device, or None."""
    if config.trust_by != "iql":
        return None
    steps = descend, soft_update
    made = IQLFilter(
        *(state_dim, action_dim, *steps, config.filter_tau, config.discount, device)
    )
    if config.compile is True:
        made._update = CompiledUpdate(made._update, made.optimizers())
    return made


def step(trainer: CQL_SA, source: Any, config: TrainConfig) -> Dict[str, Any]:
    """One update on a fresh batch of the source; returns its metrics."""
    return trainer.train(source.sample(config.batch_size))


def trusted_rows(session: Any, config: TrainConfig) -> TrustedRows:
    """Which rows of the run's dataset are trusted, and both phases' batches with that in them."""
    return TrustedRows(
        config,
        offline=session.offline_buffer,
        online=session.online_buffer,
        episodes=session.episodes,
        failure=session.task.ref_min,
        self_collected=session.run.dataset["source"] == "self-collected",
        capacity=config.buffer_size,
        device=session.device,
        upload=upload,
    )


@seeds.each
def train(config: TrainConfig) -> Dict[str, Any]:
    """The whole run; returns what the run folder's summary.json says."""
    with seeds.session(config, __file__, COLUMNS) as session:
        trainer = session.build(make_trainer)
        session.keep("trainer", trainer, loads=trainer.checkpoint_parts())
        rows = session.keep("trusted_rows", trusted_rows(session, config))
        source, chosen_by = rows, trainer.chosen_by
        pretraining = finetune.Pretraining(
            "IQL filter",
            # The filter of `load_model` is used as it is.
            config.filter_updates if chosen_by and not config.load_model else 0,
            lambda: chosen_by.train(session.offline_buffer.sample(config.batch_size)),
        )

        session.start(
            offline=lambda: step(trainer, rows.offline, config),
            online=lambda: step(trainer, source, config),
            pretraining=pretraining,
        )
        session.pretrain(pretraining)
        run = session.run
        rows.settle(None if run.step else chosen_by, run.print, run.warn)
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, rows.offline, config))

        def switch() -> None:
            trainer.start_online()
            rows.start_online()

        session.switch(switch)
        rows.flag_online()
        first = config.offline_iterations + config.online_warmup
        for t in session.online(trainer.actor):
            trainer.decay = config.decay(t + 1 - first)
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
