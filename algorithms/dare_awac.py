"""Advantage-Weighted Actor-Critic, offline then online (CORL's finetune AWAC on today's stack).

DARE-AWAC: the same with Dynamic Alignment for RElease, https://arxiv.org/abs/2511.03828. AWAC has
its constraint inside the policy's objective. So online, rows of weight 1 keep that objective, and
rows of weight 0 get the policy loss of DARE-I, that of SAC (Eq. 16; docs/awac.md).

    python algorithms/dare_awac.py --config configs/awac/hopper_medium.yaml

Paper: Nair et al. 2020, https://arxiv.org/abs/2006.09359. Names, order of updates, checkpoint
keys and numbers are those of CORL's `algorithms/finetune/awac.py` at commit 6afec90; one update
on the same weights, batch and draws gives the same parameters. Config fields have the names that
they have in the other algorithms; CORL's names (`ALIASES` below) are read, too.

    python algorithms/awac.py --config configs/awac/hopper_medium.yaml

What differs from upstream, and why (`compat: true` brings the upstream behaviour back):
- A dataset that exactly fills the buffer can be fine-tuned. Upstream's write pointer is then
  out of range.
- Regret is computed from evaluation episodes. Upstream computes it from training episodes.
Without a switch: `mixing_ratio` adds a second form with two buffers (offline rows first, then
online rows; the default is upstream's single buffer). Actions are clipped to the bounds of the
environment, which upstream takes for -1 and 1; the policy's mean is clipped before it is
executed, which upstream leaves to the environment. `deterministic_torch` is false by default: on
a GPU it costs time. Checkpoints also hold optimizers and target networks, and `load_model` reads
upstream's, which its script cannot. `train` (upstream's `update`) returns tensors, so that an
update never waits for the device. `eval_seed` is upstream's `test_seed`; upstream's `eval_seed`
has no effect.

Shapes: B rows of a batch, S state dimension, A action dimension.
"""

import copy
import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal

from corl import seeds
from corl.compiled import CompiledUpdate, descend, soft_update
from corl.config import FinetuneConfig, arguments_of, main

# CORL's names, for those who import them from here.
from corl.finetune import (  # noqa: F401
    MixedBuffer,
    ReplayBuffer,
    TensorBatch,
    compute_mean_std,
    eval_actor,
    is_goal_reached,
    modify_reward,
    modify_reward_online,
    normalize_states,
    return_reward_range,
    set_env_seed,
    set_seed,
    wrap_env,
)
from corl.sampling import Fit, standard_log_prob
from corl_dare.config import LOGS, MEANS, PANELS, PRESETS, UNDEFINED, DareConfig
from corl_dare.hook import (
    DareHook,
    Release,
    clipped_log_prob,
    energy_q_scale,
    prepare,
)

BASELINE = "awac"
COLUMNS = ["critic_loss", "actor_loss"]
COLUMNS += LOGS
# Attributes of the trainer and keys of CORL's checkpoints.
CHECKPOINT_PARTS = ("actor", "critic_1", "critic_2")
# What else ours hold.
OPTIMIZERS = ("actor_optimizer", "critic_1_optimizer", "critic_2_optimizer")
TARGETS = {"target_critic_1": "critic_1", "target_critic_2": "critic_2"}


@dataclass
class DareAWACConfig(DareConfig):
    """The block `dare:` of DARE-AWAC."""

    entropy_alpha: float = 0.2  # weight of log pi in the policy loss of released rows

    RANGES: ClassVar[dict] = DareConfig.RANGES | {"entropy_alpha": "[0, inf)"}


@dataclass
class TrainConfig(FinetuneConfig):
    """AWAC's fields; those of every algorithm are in `FinetuneConfig`."""

    # Other defaults than the common ones
    env: str = "halfcheetah-medium-expert-v2"  # D4RL task name
    seed: int = 42  # seeds networks, batches, exploration and the training environment
    eval_seed: int = 69  # seeds the evaluation episodes
    eval_freq: int = 1000  # updates between two evaluations
    buffer_size: int = 20000000  # transitions per buffer
    group: str = "AWAC-D4RL"  # wandb group
    name: str = "DARE-AWAC"  # first part of the run folder's name
    # AWAC; normalize_reward: locomotion: returns span 1000; antmaze: reward - 1
    deterministic_torch: bool = False  # torch's deterministic algorithms only
    hidden_dim: int = 256  # width of the hidden layers
    learning_rate: float = 3e-4  # of actor and critics
    tau: float = 5e-3  # target network update rate
    awac_lambda: float = 1.0  # temperature of the advantage weights
    # Not in CORL
    mixing_ratio: Optional[float] = None  # offline share of a batch; none: one buffer
    dare: DareAWACConfig = dataclasses.field(default_factory=DareAWACConfig)

    RANGES: ClassVar[dict] = FinetuneConfig.RANGES | {
        "hidden_dim": "[1, 1e5]",
        "learning_rate": "(0, inf)",
        "tau": "(0, 1]",
        "awac_lambda": "(0, inf)",
        "mixing_ratio": "[0, 1)",
    }
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        "mixing_ratio",
        "dare",
    }
    ALIASES: ClassVar[Dict[str, str]] = {
        "env_name": "env",
        "test_seed": "eval_seed",
        "eval_frequency": "eval_freq",
        "n_test_episodes": "n_episodes",
        "gamma": "discount",
    }
    COMPAT_EVAL_SEED: ClassVar[str] = "eval_seed"
    QUICK_START: ClassVar[str] = "configs/awac/quick_start.yaml"
    PRESETS: ClassVar[dict] = PRESETS

    def __post_init__(self):
        super().__post_init__()
        if self.dare.enabled and self.mixing_ratio is None:
            self.mixing_ratio = 0.5
        if self.mixing_ratio is not None:
            self.check_mixing_ratio("; leave it out for a single buffer")


def relu_network(n_in: int, n_out: int, hidden_dim: int) -> nn.Sequential:
    """(..., n_in) -> (..., n_out), three hidden layers with ReLU."""
    return nn.Sequential(
        nn.Linear(n_in, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, n_out),
    )


class Actor(nn.Module):
    """Normal(mean(s), std), clipped: states (B, S) -> actions (B, A) and log-densities (B,).

    Neither the mean nor the samples are squashed; the standard deviation does not depend on the
    state.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        hidden_dim: int,
        min_log_std: float = -20.0,
        max_log_std: float = 2.0,
        min_action: float = -1.0,
        max_action: float = 1.0,
    ):
        super().__init__()
        self._mlp = relu_network(state_dim, action_dim, hidden_dim)
        self._log_std = nn.Parameter(torch.zeros(action_dim))
        self._min_log_std, self._max_log_std = min_log_std, max_log_std
        self._min_action, self._max_action = min_action, max_action

    def policy(self, state: torch.Tensor) -> Normal:
        """The law of actions (B, A) before they are clipped."""
        std = self._log_std.clamp(self._min_log_std, self._max_log_std).exp()
        # Argument checks read tensors on the host; they change no number.
        return Normal(self._mlp(state), std, validate_args=False)

    def log_prob(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Log-density (B,) of actions (B, A), in nats, as if none were clipped."""
        return self.policy(state).log_prob(action).sum(-1)

    def forward(
        self, state: torch.Tensor, noise: Optional[torch.Tensor] = None
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Clipped samples for standard normal noise (B, A); without it, it is drawn here."""
        policy = self.policy(state)
        if noise is None:
            noise = torch.randn(policy.mean.shape, device=policy.mean.device)
        action = policy.mean + noise * policy.stddev
        action = action.clamp(self._min_action, self._max_action)
        return action, policy.log_prob(action).sum(-1)

    @torch.no_grad()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Executable action (A,) for a state (S,); training mode explores."""
        obs = torch.as_tensor(state, dtype=torch.float32, device=device).unsqueeze(0)
        action = self(obs)[0] if self.training else self.policy(obs).mean
        return action.clamp(self._min_action, self._max_action)[0].cpu().numpy()


class Critic(nn.Module):
    """Q (B,) of actions (B, A) at states (B, S)."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int):
        super().__init__()
        self._mlp = relu_network(state_dim + action_dim, 1, hidden_dim)

    def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self._mlp(torch.cat((state, action), dim=-1)).squeeze(-1)


class AdvantageWeightedActorCritic:
    """AWAC's networks, their losses and one update of all of them.

    The losses are functions of tensors and take no step; each returns one value per row.
    """

    def __init__(
        self,
        actor: nn.Module,
        actor_optimizer: torch.optim.Optimizer,
        critic_1: nn.Module,
        critic_1_optimizer: torch.optim.Optimizer,
        critic_2: nn.Module,
        critic_2_optimizer: torch.optim.Optimizer,
        discount: float = 0.99,
        tau: float = 5e-3,
        awac_lambda: float = 1.0,
        exp_adv_max: float = 100.0,
        dare: Optional[DareAWACConfig] = None,
    ):
        self.actor, self.critic_1, self.critic_2 = actor, critic_1, critic_2
        self.target_critic_1, self.target_critic_2 = (
            copy.deepcopy(critic).requires_grad_(False)
            for critic in (critic_1, critic_2)
        )
        self.actor_optimizer = actor_optimizer
        self.critic_1_optimizer = critic_1_optimizer
        self.critic_2_optimizer = critic_2_optimizer
        self.discount, self.tau = discount, tau
        self.awac_lambda, self.exp_adv_max = awac_lambda, exp_adv_max
        self.total_it = 0
        self.dare = dare or DareAWACConfig()

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [self.critic_1_optimizer, self.critic_2_optimizer, self.actor_optimizer]

    def q(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """min(Q1, Q2), (B,)."""
        return torch.minimum(
            self.critic_1(observations, actions), self.critic_2(observations, actions)
        )

    def target_q(
        self, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """min(Q1, Q2) of the target networks, (B,)."""
        return torch.minimum(
            self.target_critic_1(observations, actions),
            self.target_critic_2(observations, actions),
        )

    @torch.no_grad()
    def td_target(
        self,
        next_observations: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """r + discount min(Q1, Q2)(s', sample of pi(s')), (B,); normal noise (B, A)."""
        next_actions, _ = self.actor(next_observations, noise)
        next_q = self.target_q(next_observations, next_actions)
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        return rewards + self.discount * (1.0 - dones) * next_q

    def q_losses(
        self, observations: torch.Tensor, actions: torch.Tensor, y: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Squared TD errors of both critics, each (B,); TD target y (B,)."""
        return (
            F.mse_loss(self.critic_1(observations, actions), y, reduction="none"),
            F.mse_loss(self.critic_2(observations, actions), y, reduction="none"),
        )

    @torch.no_grad()
    def advantages(
        self, observations: torch.Tensor, actions: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """min(Q1, Q2) of the row's action minus that of a sample of pi(s), (B,)."""
        new_actions, _ = self.actor(observations, noise)
        v = self.q(observations, new_actions)
        return self.q(observations, actions) - v

    def released_losses(
        self, observations: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """alpha log pi(a|s) - min(Q1, Q2)(s, clipped a), (B,), a = mean + std noise; Eq. 16.

        The gradient of Q passes the clip as if there were none: else a policy whose mean lies
        beyond a bound would never learn to come back.
        """
        policy = self.actor.policy(observations)
        actions = policy.mean + noise * policy.stddev
        low, high = self.actor._min_action, self.actor._max_action
        executed = actions.detach().clamp(low, high) + (actions - actions.detach())
        log_prob = policy.log_prob(actions).sum(-1)
        return self.dare.entropy_alpha * log_prob - self.q(observations, executed)

    def policy_losses(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        adv: torch.Tensor,
        noise: Optional[torch.Tensor] = None,
        release: Optional[Release] = None,
        log_dict: Optional[Dict[str, torch.Tensor]] = None,
    ) -> torch.Tensor:
        """Advantage-weighted regression, (B,); adv (B,) without gradient."""
        weights = (adv / self.awac_lambda).exp().clamp(max=self.exp_adv_max)
        losses = -self.actor.log_prob(observations, actions) * weights
        if release is not None:
            kept = release.kept
            released = self.released_losses(observations[kept:], noise[kept:])
            if log_dict is not None:
                average = release.average(release.keep(losses[:kept]))
                log_dict["conservative_loss"] = average
            losses = release.mix(losses, released)
        return losses

    def _noise(self, actions: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Normal noise of the policy's samples at s' and at s, each (B, A), global stream."""
        return torch.randn_like(actions), torch.randn_like(actions)

    def train(
        self,
        batch: TensorBatch,
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """One update on a batch; returns 0-d tensors."""
        self.total_it += 1
        return self._update(
            batch,
            self._noise(batch[1]),
            release,
        )

    def _update(
        self,
        batch: TensorBatch,
        noise: Tuple[torch.Tensor, torch.Tensor],
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps. The policy follows the new critics."""
        observations, actions, rewards, next_observations, dones = batch
        y = self.td_target(next_observations, rewards, dones, noise[0])
        q1_losses, q2_losses = self.q_losses(observations, actions, y)
        critic_loss = q1_losses.mean(-1) + q2_losses.mean(-1)
        descend(critic_loss, self.critic_1_optimizer, self.critic_2_optimizer)
        log_dict: Dict[str, torch.Tensor] = {}
        actor_loss = self.policy_losses(
            observations,
            actions,
            self.advantages(observations, actions, noise[1]),
            # The sample of pi(s) is the one under the advantage.
            noise[1],
            release,
            log_dict,
        ).mean(-1)
        descend(actor_loss, self.actor_optimizer)
        for target, source in TARGETS.items():
            soft_update(getattr(self, target), getattr(self, source), self.tau)
        return {
            **log_dict,
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
        }

    def state_dict(self) -> Dict[str, Any]:
        """CORL's keys, and what CORL loses: optimizers, target networks, number of updates."""
        parts = [*CHECKPOINT_PARTS, *OPTIMIZERS, *TARGETS]
        return {
            **{part: getattr(self, part).state_dict() for part in parts},
            "total_it": self.total_it,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from the networks and optimizers of a `state_dict` or a CORL checkpoint."""
        for part in CHECKPOINT_PARTS:
            getattr(self, part).load_state_dict(state_dict[part])
        # Upstream's checkpoints have networks alone; optimizers begin, and targets are copies.
        for part in OPTIMIZERS:
            if part in state_dict:
                getattr(self, part).load_state_dict(state_dict[part])
        for target, source in TARGETS.items():
            state = state_dict.get(target, state_dict[source])
            getattr(self, target).load_state_dict(state)
        self.total_it = state_dict.get("total_it", 0)


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> AdvantageWeightedActorCritic:
    """The trainer of a config, on the device."""
    # The order of construction is the order of upstream's random draws.
    sizes = state_dim, action_dim, config.hidden_dim
    bounds = {"min_action": -max_action, "max_action": max_action}
    actor = Actor(*sizes, **bounds).to(device)
    critic_1, critic_2 = (Critic(*sizes).to(device) for _ in range(2))
    rate = config.learning_rate
    trainer = AdvantageWeightedActorCritic(
        **arguments_of(AdvantageWeightedActorCritic, config),
        actor=actor,
        actor_optimizer=torch.optim.Adam(actor.parameters(), lr=rate),
        critic_1=critic_1,
        critic_1_optimizer=torch.optim.Adam(critic_1.parameters(), lr=rate),
        critic_2=critic_2,
        critic_2_optimizer=torch.optim.Adam(critic_2.parameters(), lr=rate),
    )
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


def policy_fit(trainer: AdvantageWeightedActorCritic) -> Fit:
    """How well rows fit the policy, for `sampling: on_policy`."""

    def fit(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        policy = trainer.actor.policy(states)
        return standard_log_prob(actions, policy.mean, policy.stddev)

    return fit


def hook_arguments(trainer: AdvantageWeightedActorCritic) -> Dict[str, Any]:
    """What the hook needs of the trainer: the log-density of its policy, and its Q."""
    actor = trainer.actor
    return {
        "policy_log_prob": clipped_log_prob(actor.policy, actor._max_action),
        "clipped_policy": True,
        "q_function": trainer.target_q,
    }


def step(
    trainer: AdvantageWeightedActorCritic, source: Any, config: TrainConfig
) -> Dict[str, Any]:
    """One update on a fresh batch of the source; returns its metrics."""
    if isinstance(source, DareHook):
        drawn = source.sample(config.batch_size)
        losses = trainer.train(drawn.batch, drawn.release)
        return {**losses, **drawn.log, **source.update_energy(drawn)}
    return trainer.train(source.sample(config.batch_size))


@seeds.each
def train(config: TrainConfig) -> Dict[str, Any]:
    """The whole run; returns what the run folder's summary.json says."""
    if config.deterministic_torch:
        # What CUDA's matrix products ask for.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic_torch)
    with seeds.session(config, __file__, COLUMNS) as session:
        trainer = session.build(make_trainer)
        session.keep("trainer", trainer, loads=CHECKPOINT_PARTS)
        session.weigh_rows(trainer.actor, policy_fit(trainer))
        source = session.mixed
        if config.dare.enabled:
            session.show(PANELS, MEANS, UNDEFINED)
            source = session.make(
                "hook",
                lambda config: prepare(
                    config.dare,
                    **session.facts(config),
                    **hook_arguments(trainer),
                    q_scale=lambda: energy_q_scale(config.env, session.return_span()),
                ),
            )
        session.start(
            offline=lambda: step(trainer, session.offline_buffer, config),
            online=lambda: step(trainer, source, config),
            other=lambda hook, config: step(trainer, hook, config),
        )
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, session.offline_buffer, config))
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
