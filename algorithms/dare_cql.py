"""Conservative Q-Learning, offline then online (CORL's finetune CQL on today's stack).

DARE-CQL: the same with Dynamic Alignment for RElease, https://arxiv.org/abs/2511.03828. Online,
`corl_dare.hook` exchanges misplaced rows between the offline and the online half of a batch and
gives each row a conservative weight: rows of weight 1 keep the gap, rows of weight 0 are left
with the TD loss (Eq. 14 without Cal-QL's bound). A Lagrange multiplier sees the weighted rows
alone (docs/dare_cql.md, `make diff ALGO=cql`).

    python algorithms/dare_cql.py --config configs/cql/hopper_medium.yaml

Paper: Kumar et al. 2020, https://arxiv.org/abs/2006.04779. Names, config fields, order of
updates, checkpoint keys and numbers are those of CORL's `algorithms/finetune/cql.py` at commit
6afec90; one update on the same weights, batch and draws gives the same parameters.

    python algorithms/cql.py --config configs/cql/hopper_medium.yaml

What differs from upstream, and why (`compat: true` brings the upstream behaviour back):
- After `load_model` the entropy and Lagrange multipliers go on learning. Upstream's optimizers
  keep the parameters from before the load, so that they never change again.
- The warm-up of `bc_steps` clones the dataset's actions. Upstream scores a new sample instead.
- The range of returns behind `normalize_reward` is that of the file's whole episodes. Upstream
  walks over the rows that are left when D4RL has dropped those of time-outs, so that long
  episodes drift against each other.
- Evaluation episodes are seeded with `eval_seed`. Upstream overwrites it with `seed`.
- A dataset that exactly fills the buffer can be fine-tuned. Upstream's write pointer is then
  out of range.
- Regret is computed from evaluation episodes. Upstream computes it from training episodes.
Without a switch: `mixing_ratio` adds a second form with two buffers (offline rows first, then
online rows; the default is upstream's single buffer). The multipliers live on the device;
`use_automatic_entropy_tuning: false` can be saved; `train` returns tensors, so that an update
never waits for the device.

Shapes: B rows of a batch, n = cql_n_actions, S state dimension, A action dimension.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Tuple

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

from corl import finetune, seeds
from corl.compiled import CompiledUpdate, descend, soft_update
from corl.config import FinetuneConfig, arguments_of, main

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
from corl.sampling import Fit, standard_log_prob
from corl_dare.config import LOGS, MEANS, PANELS, PRESETS, UNDEFINED, LagrangeDareConfig
from corl_dare.hook import DareHook, Release, energy_q_scale, prepare

BASELINE = "cql"
LOG_STD_MIN = -20.0
LOG_STD_MAX = 2.0
ALMOST_ONE = 1.0 - 1e-6  # largest action whose pre-tanh value is scored
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
]
COLUMNS += LOGS
# Keys of CORL's checkpoints and attributes of the trainer.
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
}


@dataclass
class DareCQLConfig(LagrangeDareConfig):
    """The block `dare:` of DARE-CQL."""

    cap: Optional[int] = 32  # n, most pairs exchanged per batch; none: no cap


@dataclass
class TrainConfig(FinetuneConfig):
    """CQL's fields; those of every algorithm are in `FinetuneConfig`."""

    # Other defaults than the common ones
    env: str = "halfcheetah-medium-expert-v2"  # D4RL task name
    group: str = "CQL-D4RL"  # wandb group
    name: str = "DARE-CQL"  # first part of the run folder's name
    # CQL; normalize_reward: locomotion: returns span 1000; then scale and bias
    alpha_multiplier: float = 1.0  # factor on the entropy coefficient
    use_automatic_entropy_tuning: bool = True  # learn that coefficient
    backup_entropy: bool = False  # subtract the entropy term in the TD target
    policy_lr: float = 3e-5  # actor learning rate
    qf_lr: float = 3e-4  # critics learning rate
    soft_target_update_rate: float = 5e-3  # target network update rate
    bc_steps: int = 0  # updates of behavior cloning at the start
    target_update_period: int = 1  # updates between two of the target networks
    cql_alpha: float = 10.0  # weight of the conservative gap, offline
    cql_alpha_online: float = 10.0  # the same online
    cql_n_actions: int = 10  # actions of each kind under the soft maximum
    cql_importance_sample: bool = True  # weight them by their densities
    cql_lagrange: bool = False  # learn the weight of the gap
    cql_target_action_gap: float = -1.0  # gap that the Lagrange multiplier aims at
    cql_temp: float = 1.0  # temperature of the soft maximum
    cql_max_target_backup: bool = False  # TD target: maximum over cql_n_actions
    cql_clip_diff_min: float = -np.inf  # lower bound of the gap of a row
    cql_clip_diff_max: float = np.inf  # upper bound of it
    # Orthogonal weights; else torch's, with a small last layer
    orthogonal_init: bool = True
    q_n_hidden_layers: int = 2  # hidden layers of the critics
    reward_scale: float = 1.0  # factor on rewards, only with normalize_reward
    reward_bias: float = 0.0  # added to them, only with normalize_reward
    # Not in CORL
    mixing_ratio: Optional[float] = None  # offline share of a batch; none: one buffer
    dare: DareCQLConfig = dataclasses.field(default_factory=DareCQLConfig)

    RANGES: ClassVar[dict] = FinetuneConfig.RANGES | {
        "alpha_multiplier": "[0, inf)",
        **dict.fromkeys(("policy_lr", "qf_lr"), "(0, inf)"),
        "soft_target_update_rate": "(0, 1]",
        "bc_steps": "[0, 1e9]",
        "target_update_period": "[1, 1e9]",
        **dict.fromkeys(("cql_alpha", "cql_alpha_online"), "[0, inf)"),
        "cql_n_actions": "[1, 1e4]",
        "cql_target_action_gap": "(-inf, inf)",
        "cql_temp": "(0, inf)",
        "cql_clip_diff_min": "[-inf, inf)",
        "cql_clip_diff_max": "(-inf, inf]",
        "q_n_hidden_layers": "[1, 100]",
        "reward_scale": "(0, inf)",
        "reward_bias": "(-inf, inf)",
        "mixing_ratio": "[0, 1)",
    }
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        "cql_alpha_online",
        "mixing_ratio",
        "dare",
    }
    QUICK_START: ClassVar[str] = "configs/cql/quick_start.yaml"
    PRESETS: ClassVar[dict] = PRESETS
    REWARDS: ClassVar[finetune.RewardRule] = LINEAR_REWARDS

    def __post_init__(self):
        super().__post_init__()
        if not self.cql_clip_diff_min <= self.cql_clip_diff_max:
            raise ValueError(
                f"cql_clip_diff_min {self.cql_clip_diff_min} lies above "
                f"cql_clip_diff_max {self.cql_clip_diff_max}"
            )
        if self.dare.enabled and self.dare.alike and self.cql_lagrange:
            self.dare.check_multiplier()
        if self.dare.enabled and self.mixing_ratio is None:
            self.mixing_ratio = 0.5
        if self.mixing_ratio is not None:
            self.check_mixing_ratio("; leave it out for a single buffer")


def extend_and_repeat(tensor: torch.Tensor, dim: int, repeat: int) -> torch.Tensor:
    """`repeat` copies along a new dimension `dim`: (B, ...) -> (B, repeat, ...) for dim 1."""
    return tensor.unsqueeze(dim).repeat_interleave(repeat, dim)


def init_module_weights(module: nn.Module, orthogonal_init: bool = False) -> None:
    """Orthogonal: every linear layer inside the module. Else: the module, a linear layer, small."""
    if not orthogonal_init:
        nn.init.xavier_uniform_(module.weight, gain=0.01)
        return
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
            nn.init.zeros_(layer.bias)


def relu_network(
    n_in: int, n_hidden: int, n_out: int, hidden_dim: int, orthogonal_init: bool
) -> nn.Sequential:
    """(..., n_in) -> (..., n_out), ReLU after each of the n_hidden layers."""
    widths, layers = [n_in] + n_hidden * [hidden_dim], []
    for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(hidden_dim, n_out))
    init_module_weights(network if orthogonal_init else network[-1], orthogonal_init)
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

    def log_prob(
        self, mean: torch.Tensor, log_std: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """Log-density (...) of samples (..., A) in [-1, 1], in nats."""
        if not self.no_tanh:  # at the bounds the density has no finite value
            sample = sample.clamp(-ALMOST_ONE, ALMOST_ONE)
        return self._distribution(mean, log_std).log_prob(sample).sum(-1)

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
        orthogonal_init: bool = False,
        no_tanh: bool = False,
        hidden_dim: int = 256,
    ):
        super().__init__()
        self.max_action = max_action
        self.base_network = relu_network(
            state_dim, 3, 2 * action_dim, hidden_dim, orthogonal_init
        )
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
        n_hidden_layers: int = 2,
        hidden_dim: int = 256,
    ):
        super().__init__()
        self.network = relu_network(
            observation_dim + action_dim, n_hidden_layers, 1, hidden_dim, orthogonal_init
        )

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q (B,) of actions (B, A), or Q (B, n) of actions (B, n, A), at observations (B, S)."""
        if actions.ndim == 3 and observations.ndim == 2:
            observations = extend_and_repeat(observations, 1, actions.shape[1])
        return self.network(torch.cat((observations, actions), dim=-1)).squeeze(-1)


class Noise(NamedTuple):
    """All random numbers of one update, drawn in upstream's order."""

    policy: torch.Tensor  # (B, A), normal
    cloning: Optional[torch.Tensor]  # (B, A), normal; upstream's warm-up alone
    backup: torch.Tensor  # (B, A), or (B, n, A) for the maximum; normal
    uniform: torch.Tensor  # (B, n, A), in [-1, 1]
    current: torch.Tensor  # (B, n, A), normal
    following: torch.Tensor  # (B, n, A), normal


@dataclass(eq=False, repr=False)
class ContinuousCQL:
    """CQL's networks, their losses and one update of all of them.

    The losses are functions of tensors and take no step; each returns one value per row.
    """

    critic_1: nn.Module
    critic_1_optimizer: torch.optim.Optimizer
    critic_2: nn.Module
    critic_2_optimizer: torch.optim.Optimizer
    actor: nn.Module
    actor_optimizer: torch.optim.Optimizer
    target_entropy: float
    discount: float = 0.99
    alpha_multiplier: float = 1.0
    use_automatic_entropy_tuning: bool = True
    backup_entropy: bool = False
    policy_lr: float = 3e-4
    qf_lr: float = 3e-4
    soft_target_update_rate: float = 5e-3
    bc_steps: int = 100000
    target_update_period: int = 1
    cql_n_actions: int = 10
    cql_importance_sample: bool = True
    cql_lagrange: bool = False
    cql_target_action_gap: float = -1.0
    cql_temp: float = 1.0
    cql_alpha: float = 5.0
    cql_max_target_backup: bool = False
    cql_clip_diff_min: float = -np.inf
    cql_clip_diff_max: float = np.inf
    device: str = "cpu"
    compat: bool = False
    dare: DareCQLConfig = dataclasses.field(default_factory=DareCQLConfig)

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

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [
            self.critic_1_optimizer,
            self.critic_2_optimizer,
            self.actor_optimizer,
            self.alpha_optimizer,
            self.alpha_prime_optimizer,
        ]

    def update_target_network(self, soft_target_update_rate: float) -> None:
        """Move both target critics towards the critics."""
        soft_update(self.target_critic_1, self.critic_1, soft_target_update_rate)
        soft_update(self.target_critic_2, self.critic_2, soft_target_update_rate)

    def start_online(self, cql_alpha: float) -> None:
        """The weight of the conservative gap changes."""
        self.cql_alpha = cql_alpha

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
        cloning: bool,
        noise: Noise,
    ) -> torch.Tensor:
        """alpha log pi - Q, in the warm-up alpha log pi(new action) - log pi(action), (B,)."""
        if not cloning:
            critics = (self.critic_1, self.critic_2)
            goal = torch.minimum(*(c(observations, new_actions) for c in critics))
        elif self.compat:  # upstream scores a new sample instead of the data's action
            goal = self.actor(observations, noise=noise.cloning)[1]
        else:
            goal = self.actor.log_prob(observations, actions)
        return alpha * log_pi - goal

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
        release: Optional[Release] = None,
    ) -> List[torch.Tensor]:
        """The conservative gaps of both critics, each (B,); predicted: Q of the data, (B,)."""
        if release is not None and release.kept == 0:
            return [torch.zeros_like(q) for q in predicted]
        if release is not None:  # a gap of weight 0 need not be known
            observations, next_observations, *predicted = (
                x[: release.kept] for x in (observations, next_observations, *predicted)
            )
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
        if release is not None:
            gaps = [release.keep(gap) for gap in gaps]
            both = torch.stack(gaps).mean(0)
            log_dict["conservative_loss"] = release.average(both)
        return gaps

    def _penalties(
        self,
        diffs: List[torch.Tensor],
        log_dict: Dict,
        release: Optional[Release] = None,
    ) -> Tuple[List[torch.Tensor], torch.Tensor]:
        """Conservative terms of the critics' loss and the multiplier's loss, all 0-d."""
        if not self.cql_lagrange:
            alpha_prime = alpha_prime_loss = diffs[0].new_zeros(())
            penalties = [diff * self.cql_alpha for diff in diffs]
        else:
            alpha_prime = self.log_alpha_prime().exp().clamp(0.0, 1000000.0)
            excess = [diff - self.cql_target_action_gap for diff in diffs]
            if release is not None and self.dare.lagrange_gap == "weighted":
                target = release.weight.mean() * self.cql_target_action_gap
                excess = [diff - target for diff in diffs]
            dual = [alpha_prime * self.cql_alpha * e.detach() for e in excess]
            alpha_prime_loss = (-dual[0] - dual[1]) * 0.5
            alpha_prime = alpha_prime.detach()
            penalties = [alpha_prime * self.cql_alpha * e for e in excess]
        log_dict["alpha_prime"] = alpha_prime
        log_dict["alpha_prime_loss"] = alpha_prime_loss.detach()
        return penalties, alpha_prime_loss

    def _noise(
        self,
        actions: torch.Tensor,
        cloning: bool,
        release: Optional[Release] = None,
    ) -> Noise:
        """The random numbers of one update on actions (B, A), from the global stream."""
        (b, a), n = actions.shape, self.cql_n_actions

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=actions.device)

        gap_rows = b
        if release is not None and release.kept is not None:
            gap_rows = release.kept
        return Noise(
            policy=normal(b, a),
            cloning=normal(b, a) if cloning and self.compat else None,
            backup=normal(b, n, a) if self.cql_max_target_backup else normal(b, a),
            uniform=actions.new_empty(gap_rows, n, a).uniform_(-1, 1),
            current=normal(gap_rows, n, a),
            following=normal(gap_rows, n, a),
        )

    def train(
        self,
        batch: TensorBatch,
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """One update on a batch; returns 0-d tensors."""
        self.total_it += 1
        cloning = self.total_it <= self.bc_steps
        move_targets = self.total_it % self.target_update_period == 0
        noise = self._noise(
            batch[1],
            cloning,
            release,
        )
        return self._update(
            batch,
            noise,
            cloning,
            move_targets,
            release,
        )

    def _update(
        self,
        batch: TensorBatch,
        noise: Noise,
        cloning: bool,
        move_targets: bool,
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps; every loss comes before the first step."""
        observations, actions, rewards, next_observations, dones = batch
        new_actions, log_pi = self.actor(observations, noise=noise.policy)
        alpha = self.alpha(log_pi)
        alpha_loss = self.alpha_losses(log_pi).mean(-1)
        policy_loss = self.policy_losses(
            observations, actions, new_actions, alpha, log_pi, cloning, noise
        ).mean(-1)
        log_dict = {
            "log_pi": log_pi.detach().mean(),
            "policy_loss": policy_loss.detach(),
            "alpha_loss": alpha_loss.detach(),
            "alpha": alpha,
        }
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
            release,
        )
        diffs = [gap.mean(-1) for gap in gaps]
        penalties, alpha_prime_loss = self._penalties(
            diffs,
            log_dict,
            release,
        )
        for i in (0, 1):
            log_dict[f"qf{i + 1}_loss"] = td_losses[i].detach()
            log_dict[f"average_qf{i + 1}"] = predicted[i].detach().mean()
            log_dict[f"cql_qf{i + 1}_diff"] = diffs[i].detach()
            log_dict[f"cql_min_qf{i + 1}_loss"] = penalties[i].detach()
        qf_loss = td_losses[0] + td_losses[1] + penalties[0] + penalties[1]
        if self.cql_lagrange:
            descend(alpha_prime_loss, self.alpha_prime_optimizer)
        if self.use_automatic_entropy_tuning:
            descend(alpha_loss, self.alpha_optimizer)
        descend(policy_loss, self.actor_optimizer)
        descend(qf_loss, self.critic_1_optimizer, self.critic_2_optimizer)
        if move_targets:
            self.update_target_network(self.soft_target_update_rate)
        return log_dict

    def detach_multipliers(self) -> None:
        """Upstream's fault after `load_model`: the optimizers step what nobody reads."""
        self.log_alpha = copy.deepcopy(self.log_alpha)
        self.log_alpha_prime = copy.deepcopy(self.log_alpha_prime)

    def state_dict(self) -> Dict[str, Any]:
        """CORL's keys, and what the switch to the online phase changes."""
        state = {k: getattr(self, v).state_dict() for k, v in CHECKPOINT_PARTS.items()}
        return {
            **state,
            "total_it": self.total_it,
            "cql_alpha": self.cql_alpha,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)
        self.cql_alpha = state_dict.get("cql_alpha", self.cql_alpha)

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from the networks and optimizers of a `state_dict` or a CORL checkpoint."""
        for key, attribute in CHECKPOINT_PARTS.items():
            getattr(self, attribute).load_state_dict(state_dict[key])
        self.total_it = state_dict["total_it"]


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> ContinuousCQL:
    """The trainer of a config, on the device."""
    # The order of construction is the order of upstream's random draws.
    critic_1, critic_2 = (
        FullyConnectedQFunction(
            state_dim, action_dim, config.orthogonal_init, config.q_n_hidden_layers
        ).to(device)
        for _ in range(2)
    )
    actor = TanhGaussianPolicy(
        state_dim, action_dim, max_action, orthogonal_init=config.orthogonal_init
    ).to(device)
    trainer = ContinuousCQL(
        **arguments_of(ContinuousCQL, config, device=device),
        critic_1=critic_1,
        critic_1_optimizer=torch.optim.Adam(critic_1.parameters(), config.qf_lr),
        critic_2=critic_2,
        critic_2_optimizer=torch.optim.Adam(critic_2.parameters(), config.qf_lr),
        actor=actor,
        actor_optimizer=torch.optim.Adam(actor.parameters(), config.policy_lr),
        target_entropy=-float(action_dim),
    )
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


def policy_fit(trainer: ContinuousCQL) -> Fit:
    """How well rows fit the policy before its squashing, for `sampling: on_policy`."""
    actor = trainer.actor

    def fit(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        mean, log_std = actor._parameters_of(states)
        std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()
        inside = (actions / actor.max_action).clamp(-ALMOST_ONE, ALMOST_ONE)
        return standard_log_prob(inside.atanh(), mean, std)

    return fit


def hook_arguments(trainer: ContinuousCQL) -> Dict[str, Any]:
    """What the hook needs of the trainer: the log-density of its policy, and its Q."""
    return {
        "policy_log_prob": trainer.actor.log_prob,
        "q_function": trainer.target_q,
    }


def step(trainer: ContinuousCQL, source: Any, config: TrainConfig) -> Dict[str, Any]:
    """One update on a fresh batch of the source; returns its metrics."""
    if isinstance(source, DareHook):
        drawn = source.sample(config.batch_size)
        losses = trainer.train(drawn.batch, drawn.release)
        return {**losses, **drawn.log, **source.update_energy(drawn)}
    return trainer.train(source.sample(config.batch_size))


@seeds.each
def train(config: TrainConfig) -> Dict[str, Any]:
    """The whole run; returns what the run folder's summary.json says."""
    with seeds.session(config, __file__, COLUMNS) as session:
        trainer = session.build(make_trainer)
        session.keep("trainer", trainer, loads=CHECKPOINT_PARTS)
        if config.load_model and config.compat:
            trainer.detach_multipliers()
        session.weigh_rows(trainer.actor, policy_fit(trainer))
        source = session.mixed
        if config.dare.enabled:
            session.show(PANELS, MEANS, UNDEFINED)
            scale = config.reward_scale if config.normalize_reward else 1.0
            source = session.make(
                "hook",
                lambda config: prepare(
                    config.dare,
                    **session.facts(config),
                    **hook_arguments(trainer),
                    q_scale=lambda: energy_q_scale(
                        config.env, session.return_span(), scale
                    ),
                ),
            )
        session.start(
            offline=lambda: step(trainer, session.offline_buffer, config),
            online=lambda: step(trainer, source, config),
            other=lambda hook, config: step(trainer, hook, config),
        )
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, session.offline_buffer, config))
        session.switch(lambda: trainer.start_online(config.cql_alpha_online))
        if config.dare.enabled and session.goes_online:
            source.pretrain(session.should_stop, session.save)
        for _ in session.online(trainer.actor):
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
