"""E2O: an ensemble of critics, pessimistic offline, released and exploring online.

Paper: Zhao et al. 2023, https://arxiv.org/abs/2306.06871 (ENOTO in its version of 2024). Offline it
is CQL with N critics. Online the same networks go on with the pessimism released:
- the conservative gap has the weight `cql_alpha_online`, 0;
- the TD target follows the mean of the minimum of all pairs of critics, with the entropy term,
  instead of the minimum of all at the policy's mode (`target_rule`);
- the critics' loss is multiplied by sigmoid(-T spread) + 0.5 (`uncertainty_temperature`), where
  the spread is that of the critics' values of next states, over a batch or of each row
  (`uncertainty_by`);
- of N actions of the policy that with the largest mean + lambda std of Q acts (`exploration`).

    python algorithms/e2o.py --config configs/e2o/hopper_medium.yaml

The settings are those of the authors' code, TJU-DRL-LAB/AI-Optimizer at 4a4e74e, which is a fork of
d3rlpy. It is for locomotion: how the paper ensembles LAPO for antmaze is unpublished, so antmaze
tasks are refused. What differs from that code, and why:
- Its script of the online phase samples the policy and never calls the rule with lambda. Here the
  rule is the default, as in the paper; `exploration: policy` is the script.
- Its next state of a terminal row is a vector of zeros, and it drops the last row of an episode
  that timed out. Here rows are as everywhere: no target looks at a state after a terminal, but
  the gap's actions of the next state are those of the true one.
- One sample of the policy serves the temperature's loss and the policy's. There each draws its own.
- The multiplier of the gap, which is never trained there, is left out, and so is the policy's
  target network, which nothing reads.

Shapes: N critics, B rows of a batch, n actions of a row, S state dimension, A action dimension.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn

from corl import finetune, seeds
from corl.compiled import CompiledUpdate, descend, soft_update
from corl.config import FinetuneConfig, arguments_of, main
from corl.ensembles import CriticEnsemble, Form

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
from corl.sac import PositiveScalar, SquashedGaussianPolicy, policy_fit

COLUMNS = [
    *("log_pi", "policy_loss", "alpha_loss", "alpha", "qf_loss", "average_qf", "std_qf"),
    *("average_target_q", "cql_gap", "spread", "td_weight"),
]
# Keys of checkpoints and attributes of the trainer.
CHECKPOINT_PARTS = (
    *("actor", "critics", "target_critics", "alpha"),
    *("actor_optimizer", "critic_optimizer", "alpha_optimizer"),
)


@dataclass
class TrainConfig(FinetuneConfig):
    """E2O's fields; those of every algorithm are in `FinetuneConfig`."""

    # Other defaults than the common ones
    online_iterations: int = 250000  # environment steps of fine-tuning
    online_warmup: int = 1000  # online steps before the first online update
    normalize: bool = False  # normalize states with the dataset's mean and std
    group: str = "E2O-D4RL"  # wandb group
    name: str = "E2O"  # first part of the run folder's name
    # CQL-N; normalize_reward: locomotion: returns span 1000; then scale and bias
    n_critics: int = 10  # critics, and actions that exploration chooses from
    hidden_dim: int = 256  # width of all networks
    q_n_hidden_layers: int = 3  # hidden layers of the critics
    policy_lr: float = 3e-5  # actor learning rate
    qf_lr: float = 3e-4  # critics learning rate
    temperature_lr: float = 1e-4  # learning rate of the entropy coefficient
    soft_target_update_rate: float = 5e-3  # target network update rate
    cql_alpha: float = 5.0  # weight of the mean conservative gap, offline
    cql_n_actions: int = 10  # actions of each kind under the soft maximum
    reward_scale: float = 1.0  # factor on rewards, only with normalize_reward
    reward_bias: float = 0.0  # added to them, only with normalize_reward
    # Online
    mixing_ratio: float = 0.0  # offline share of an online batch
    cql_alpha_online: float = 0.0  # weight of the gap online; 0: released
    target_rule: str = "weighted_min_pair"  # of critics' values; min, mean
    uncertainty_temperature: float = 10.0  # T of the factor on the critics' loss; 0: 1
    uncertainty_by: str = "batch"  # one spread for a batch, or for each row: row
    exploration: str = "ucb"  # mean + lambda std of Q chooses; policy: a sample
    ucb_lambda: float = 10.0  # of that rule

    RANGES: ClassVar[dict] = FinetuneConfig.RANGES | {
        "n_critics": "[2, 1000]",
        "hidden_dim": "[1, 1e5]",
        "q_n_hidden_layers": "[1, 100]",
        **dict.fromkeys(("policy_lr", "qf_lr", "temperature_lr"), "(0, inf)"),
        "soft_target_update_rate": "(0, 1]",
        **dict.fromkeys(("cql_alpha", "cql_alpha_online"), "[0, inf)"),
        "cql_n_actions": "[1, 1e4]",
        "reward_scale": "(0, inf)",
        "reward_bias": "(-inf, inf)",
        "mixing_ratio": "[0, 1)",
        **dict.fromkeys(("uncertainty_temperature", "ucb_lambda"), "[0, inf)"),
    }
    CHOICES: ClassVar[dict] = FinetuneConfig.CHOICES | {
        "target_rule": ("weighted_min_pair", "min", "mean"),
        "uncertainty_by": ("batch", "row"),
        "exploration": ("ucb", "policy"),
    }
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        *("mixing_ratio", "cql_alpha_online", "target_rule"),
        *("uncertainty_temperature", "uncertainty_by", "exploration", "ucb_lambda"),
    }
    QUICK_START: ClassVar[str] = "configs/e2o/quick_start.yaml"
    REWARDS: ClassVar[finetune.RewardRule] = LINEAR_REWARDS

    def __post_init__(self):
        super().__post_init__()
        if self.env.startswith("antmaze"):
            raise ValueError(
                f"env {self.env}: E2O's form for antmaze is unpublished; choose a locomotion "
                "task, or another algorithm"
            )
        self.check_mixing_ratio()


class Explorer(nn.Module):
    """The policy as it acts: in training mode it explores, in evaluation mode it is the mode.

    Args:
        actor: the policy.
        critics: score its actions.
        ucb: of n_critics samples, that with the largest mean + `ucb_lambda` std of Q acts; else
            one sample.
    """

    def __init__(
        self,
        actor: SquashedGaussianPolicy,
        critics: CriticEnsemble,
        ucb: bool,
        ucb_lambda: float,
    ):
        super().__init__()
        self.actor, self.critics = actor, critics
        self.ucb, self.ucb_lambda = ucb, ucb_lambda

    def choose(self, observations: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The action (B, A) with the largest score, of those of the noise (B, n, A)."""
        actions, _ = self.actor(observations, noise)
        q = self.critics(observations, actions)
        best = (q.mean(0) + self.ucb_lambda * q.std(0)).argmax(-1, keepdim=True)
        index = best.unsqueeze(-1).expand(*best.shape, actions.shape[-1])
        return actions.gather(-2, index).squeeze(-2)

    @torch.no_grad()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Executable action (A,) for a state (S,), or (M, A) for (M, S)."""
        obs = torch.as_tensor(state, dtype=torch.float32, device=device)
        obs, shape = obs.reshape(-1, obs.shape[-1]), obs.shape[:-1]
        if not self.training:
            actions = self.actor.mode(obs)
        else:
            n = self.critics.n_critics if self.ucb else 1
            noise = torch.randn(len(obs), n, self.actor.mean.out_features, device=device)
            if self.ucb:
                actions = self.choose(obs, noise)
            else:
                actions = self.actor(obs, noise)[0].squeeze(1)
        return actions.reshape(*shape, -1).cpu().numpy()


class Noise(NamedTuple):
    """All random numbers of one update."""

    policy: torch.Tensor  # (B, A), normal
    backup: Optional[torch.Tensor] = None  # (B, A), normal; online
    spread: Optional[torch.Tensor] = None  # (B, N, A), normal; online, for the factor
    uniform: Optional[torch.Tensor] = None  # (B, n, A), in [-1, 1]; for the gap
    current: Optional[torch.Tensor] = None  # (B, n, A), normal; for the gap
    following: Optional[torch.Tensor] = None  # (B, n, A), normal; for the gap


@dataclass(eq=False, repr=False)
class E2O:
    """E2O's networks, their losses and one update of all of them.

    The losses are functions of tensors and take no step; each returns one value per row.
    """

    actor: SquashedGaussianPolicy
    actor_optimizer: torch.optim.Optimizer
    critics: CriticEnsemble
    critic_optimizer: torch.optim.Optimizer
    target_entropy: float
    temperature_lr: float = 1e-4
    discount: float = 0.99
    soft_target_update_rate: float = 5e-3
    cql_alpha: float = 5.0
    cql_alpha_online: float = 0.0
    cql_n_actions: int = 10
    target_rule: str = "weighted_min_pair"
    uncertainty_temperature: float = 10.0
    uncertainty_by: str = "batch"
    exploration: str = "ucb"
    ucb_lambda: float = 10.0
    device: str = "cpu"

    def __post_init__(self):
        self.target_critics = copy.deepcopy(self.critics).to(self.device)
        self.target_critics.requires_grad_(False)
        self.alpha = PositiveScalar(1.0).to(self.device)
        self.alpha_optimizer = torch.optim.Adam(
            self.alpha.parameters(), self.temperature_lr
        )
        ucb = self.exploration == "ucb"
        self.composite = Explorer(self.actor, self.critics, ucb, self.ucb_lambda)
        self.total_it = 0

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [self.critic_optimizer, self.actor_optimizer, self.alpha_optimizer]

    def alpha_losses(self, log_pi: torch.Tensor) -> torch.Tensor:
        """Loss of the entropy coefficient, (B,); log_pi (B,)."""
        return -(self.alpha() * (log_pi + self.target_entropy).detach())

    def policy_losses(
        self,
        observations: torch.Tensor,
        new_actions: torch.Tensor,
        alpha: torch.Tensor,
        log_pi: torch.Tensor,
    ) -> torch.Tensor:
        """alpha log pi - min Q over all critics, (B,)."""
        return alpha * log_pi - self.critics(observations, new_actions).amin(0)

    def target_value(self, q: torch.Tensor) -> torch.Tensor:
        """Values (N, B) of the target critics as one, (B,), by the rule of the online phase."""
        if self.target_rule == "mean":
            return q.mean(0)
        if self.target_rule == "min":
            return q.amin(0)
        # The k-th smallest of N is the minimum of its pairs with the N - k larger ones.
        n = q.shape[0]
        pairs = torch.arange(n - 1, -1, -1, device=q.device, dtype=q.dtype)
        weighted = pairs.unsqueeze(-1) * q.sort(0).values
        return weighted.sum(0) / (n * (n - 1) / 2)

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
        if noise.backup is None:
            next_actions = self.actor.mode(next_observations)
            next_q = self.target_critics(next_observations, next_actions).amin(0)
        else:
            next_actions, next_log_pi = self.actor(next_observations, noise.backup)
            q = self.target_critics(next_observations, next_actions)
            next_q = self.target_value(q) - alpha * next_log_pi
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        return rewards + (1.0 - dones) * self.discount * next_q, next_q

    @torch.no_grad()
    def spread(
        self, next_observations: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Std of the target critics at actions of the noise (B, N, A), their mean: () or (B,)."""
        actions, _ = self.actor(next_observations, noise)
        q = self.target_critics(next_observations, actions)
        if self.uncertainty_by == "batch":
            q = q.mean(1)
        return q.std(0, correction=0).mean(-1)

    def conservative_gaps(
        self,
        predicted: torch.Tensor,
        observations: torch.Tensor,
        next_observations: torch.Tensor,
        noise: Noise,
    ) -> torch.Tensor:
        """Soft maximum of Q over actions minus Q of the data's action, (N, B) as `predicted`.

        The actions are uniform ones, and those of the policy at s and at s', all of them at s.
        """
        assert noise.uniform is not None and noise.current is not None
        assert noise.following is not None
        with torch.no_grad():
            current, current_log_pi = self.actor(observations, noise.current)
            following, next_log_pi = self.actor(next_observations, noise.following)
        uniform = self.actor.max_action * noise.uniform
        uniform_log_prob = math.log(0.5 ** uniform.shape[-1])
        densities = (
            torch.full_like(current_log_pi, uniform_log_prob),
            *(current_log_pi, next_log_pi),
        )
        actions = torch.cat((uniform, current, following), dim=-2)
        q = self.critics(observations, actions) - torch.cat(densities, dim=-1)
        return torch.logsumexp(q, dim=-1) - predicted

    def gap_weight(self, online: bool) -> float:
        """The weight of the conservative gap in a phase."""
        return self.cql_alpha_online if online else self.cql_alpha

    def _noise(self, actions: torch.Tensor, online: bool) -> Noise:
        """The random numbers of one update of a phase on actions (B, A), from the global stream."""
        (b, a), n = actions.shape, self.cql_n_actions

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=actions.device)

        noise = Noise(policy=normal(b, a))
        if online:
            noise = noise._replace(backup=normal(b, a))
            if self.uncertainty_temperature:
                noise = noise._replace(spread=normal(b, self.critics.n_critics, a))
        if self.gap_weight(online):
            noise = noise._replace(
                uniform=actions.new_empty(b, n, a).uniform_(-1, 1),
                current=normal(b, n, a),
                following=normal(b, n, a),
            )
        return noise

    def train(self, batch: TensorBatch, online: bool = False) -> Dict[str, torch.Tensor]:
        """One update of a phase on a batch; returns 0-d tensors."""
        self.total_it += 1
        return self._update(batch, self._noise(batch[1], online))

    def _update(self, batch: TensorBatch, noise: Noise) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps: temperature, critics, policy, targets."""
        observations, actions, rewards, next_observations, dones = batch
        new_actions, log_pi = self.actor(observations, noise.policy)
        alpha_loss = self.alpha_losses(log_pi).mean(-1)
        descend(alpha_loss, self.alpha_optimizer)
        alpha = self.alpha().detach()
        log_dict = {
            "log_pi": log_pi.detach().mean(),
            "alpha_loss": alpha_loss.detach(),
            "alpha": alpha,
        }
        td_target, next_q = self.td_target(
            next_observations, rewards, dones, alpha, noise
        )
        predicted = self.critics(observations, actions)
        # Summed over the critics, while the gap is averaged over them.
        losses = (predicted - td_target).square().sum(0)
        log_dict["qf_loss"] = losses.detach().mean() / self.critics.n_critics
        log_dict["average_qf"] = predicted.detach().mean()
        log_dict["std_qf"] = predicted.detach().std(0).mean()
        log_dict["average_target_q"] = next_q.mean()
        if noise.uniform is not None:
            gaps = self.conservative_gaps(
                predicted, observations, next_observations, noise
            )
            weight = self.gap_weight(online=noise.backup is not None)
            losses = losses + weight * gaps.mean(0)
            log_dict["cql_gap"] = gaps.detach().mean()
        if noise.spread is not None:
            spread = self.spread(next_observations, noise.spread)
            factor = (-self.uncertainty_temperature * spread).sigmoid() + 0.5
            losses = factor * losses
            log_dict["spread"], log_dict["td_weight"] = spread.mean(), factor.mean()
        descend(losses.mean(-1), self.critic_optimizer)
        policy_loss = self.policy_losses(observations, new_actions, alpha, log_pi)
        policy_loss = policy_loss.mean(-1)
        descend(policy_loss, self.actor_optimizer)
        log_dict["policy_loss"] = policy_loss.detach()
        soft_update(self.target_critics, self.critics, self.soft_target_update_rate)
        return log_dict

    def state_dict(self) -> Dict[str, Any]:
        """All networks and optimizers."""
        state = {part: getattr(self, part).state_dict() for part in CHECKPOINT_PARTS}
        return {**state, "total_it": self.total_it}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from the networks and optimizers of a `state_dict`."""
        for part in CHECKPOINT_PARTS:
            getattr(self, part).load_state_dict(state_dict[part])
        self.total_it = state_dict["total_it"]


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> E2O:
    """The trainer of a config, on the device."""
    form = Form(config.hidden_dim, config.q_n_hidden_layers)
    critics = CriticEnsemble(state_dim, action_dim, config.n_critics, form).to(device)
    policy_form = Form(config.hidden_dim, n_hidden_layers=3)
    actor = SquashedGaussianPolicy(state_dim, action_dim, max_action, policy_form)
    actor = actor.to(device)
    trainer = E2O(
        **arguments_of(E2O, config, device=device),
        actor=actor,
        actor_optimizer=torch.optim.Adam(actor.parameters(), config.policy_lr),
        critics=critics,
        critic_optimizer=torch.optim.Adam(critics.parameters(), config.qf_lr),
        target_entropy=-float(action_dim),
    )
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


def step(trainer: E2O, source: Any, config: TrainConfig, online: bool) -> Dict[str, Any]:
    """One update of a phase on a fresh batch of the source; returns its metrics."""
    return trainer.train(source.sample(config.batch_size), online)


@seeds.each
def train(config: TrainConfig) -> Dict[str, Any]:
    """The whole run; returns what the run folder's summary.json says."""
    with seeds.session(config, __file__, COLUMNS) as session:
        trainer = session.build(make_trainer)
        session.keep("trainer", trainer, loads=CHECKPOINT_PARTS)
        session.weigh_rows(trainer.actor, policy_fit(trainer.actor))
        source = session.mixed
        session.start(
            offline=lambda: step(trainer, session.offline_buffer, config, False),
            online=lambda: step(trainer, source, config, True),
        )
        for _ in session.offline(trainer.composite):
            session.log(step(trainer, session.offline_buffer, config, False))
        for _ in session.online(trainer.composite):
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config, True)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
