"""TD3+BC, offline then online (CORL's offline TD3+BC on today's stack, with a second phase).

DARE-TD3+BC: the same with Dynamic Alignment for RElease, https://arxiv.org/abs/2511.03828. Online,
the weight of a row multiplies its distance |pi(s) - a|^2 (docs/td3_bc.md, `make diff ALGO=td3_bc`).

    python algorithms/dare_td3_bc.py --config configs/td3_bc/hopper_medium.yaml

Paper: Fujimoto and Gu 2021, https://arxiv.org/abs/2106.06860. Names, config fields, order of
updates, checkpoint keys and numbers are those of CORL's `algorithms/offline/td3_bc.py` at commit
6afec90; one update on the same weights, batch and draws gives the same parameters. The policy
maximizes lambda Q1(s, pi(s)) - |pi(s) - a|^2 with lambda = alpha / mean |Q1| (Eq. 4 and 5).

    python algorithms/td3_bc.py --config configs/td3_bc/hopper_medium.yaml

What differs from upstream, and why (`compat: true` brings the upstream behaviour back):
- Evaluation episodes are seeded with `eval_seed`. Upstream takes `seed`.
Without a switch: upstream ends with the offline phase. Here an online phase follows where
`online_iterations` is not 0, and `bc_online` says what the behavior cloning term does in it:
`keep` it, `drop` it (lambda stays), or `anneal` it by max(bc_end, 1 - t / bc_anneal_steps) at
environment step t. The policy then explores with TD3's normal noise, which upstream's field
`expl_noise` names and its script does not use. `mixing_ratio` splits online batches between two
buffers; the default is one buffer. Learning rates are fields; checkpoints also hold the target
networks; `train` returns tensors, so that an update never waits for the device. A row of
metrics.csv between two updates of the policy has no loss of the policy, as upstream.

Shapes: B rows of a batch, S state dimension, A action dimension.
"""

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from corl import finetune, seeds
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
from corl_dare.config import LOGS, MEANS, PANELS, PRESETS, UNDEFINED, NoisyDareConfig
from corl_dare.hook import DareHook, Release, energy_q_scale, noisy_log_prob, prepare

BASELINE = "td3_bc"
COLUMNS = ["critic_loss", "actor_loss", "bc_weight"]
COLUMNS += LOGS
# Attributes of the trainer and keys of CORL's checkpoints.
CHECKPOINT_PARTS = (
    "critic_1",
    "critic_1_optimizer",
    "critic_2",
    "critic_2_optimizer",
    "actor",
    "actor_optimizer",
)
# Networks that have a target network, `NAME_target`.
WITH_TARGET = ("critic_1", "critic_2", "actor")


@dataclass
class TrainConfig(FinetuneConfig):
    """TD3+BC's fields; those of every algorithm are in `FinetuneConfig`."""

    # Other defaults than the common ones
    env: str = "halfcheetah-medium-expert-v2"  # D4RL task name
    online_iterations: int = 0  # environment steps of fine-tuning; upstream has none
    group: str = "TD3_BC-D4RL"  # wandb group
    name: str = "DARE-TD3_BC"  # first part of the run folder's name
    # TD3; normalize_reward: locomotion: returns span 1000; antmaze: reward - 1
    expl_noise: float = 0.1  # std of the exploration noise online, of the largest action
    tau: float = 0.005  # target network update rate
    policy_noise: float = 0.2  # std of the noise on target actions
    noise_clip: float = 0.5  # bound on that noise
    policy_freq: int = 2  # updates of the critics per update of the policy
    # TD3+BC
    alpha: float = 2.5  # weight of Q against behavior cloning
    # Not in CORL
    actor_lr: float = 3e-4  # actor learning rate
    qf_lr: float = 3e-4  # critics learning rate
    mixing_ratio: Optional[float] = None  # offline share of a batch; none: one buffer
    policy_std: Optional[float] = None  # of the policy's density; none: expl_noise
    bc_online: str = "keep"  # the behavior cloning term online: keep, drop, anneal
    bc_end: float = 0.0  # anneal: the least weight of that term
    bc_anneal_steps: int = 400000  # anneal: online steps until its weight would be 0
    dare: NoisyDareConfig = dataclasses.field(default_factory=NoisyDareConfig)

    RANGES: ClassVar[dict] = FinetuneConfig.RANGES | {
        **dict.fromkeys(("expl_noise", "policy_noise", "noise_clip"), "[0, inf)"),
        "tau": "(0, 1]",
        "policy_freq": "[1, 1e9]",
        "alpha": "[0, inf)",
        **dict.fromkeys(("actor_lr", "qf_lr"), "(0, inf)"),
        "mixing_ratio": "[0, 1)",
        "policy_std": "(0, inf)",
        "bc_end": "[0, 1]",
        "bc_anneal_steps": "[1, 1e9]",
    }
    CHOICES: ClassVar[dict] = FinetuneConfig.CHOICES | {
        "bc_online": ("keep", "drop", "anneal"),
    }
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        "mixing_ratio",
        "policy_std",
        "expl_noise",
        "bc_online",
        "bc_end",
        "bc_anneal_steps",
        "dare",
    }
    ALIASES: ClassVar[Dict[str, str]] = {"max_timesteps": "offline_iterations"}
    QUICK_START: ClassVar[str] = "configs/td3_bc/quick_start.yaml"
    PRESETS: ClassVar[dict] = PRESETS

    def __post_init__(self):
        super().__post_init__()
        if self.dare.enabled:
            self.bc_online = self.dare.only_release("bc_online", self.bc_online)
            self.dare.density_std(self.density_std())
            self.mixing_ratio = 0.5 if self.mixing_ratio is None else self.mixing_ratio
        self.density_std()
        if self.mixing_ratio is not None:
            self.check_mixing_ratio("; leave it out for a single buffer")

    def bc_weight(self, steps: int) -> float:
        """Weight of the behavior cloning term after so many environment steps."""
        if self.bc_online == "anneal":
            return max(self.bc_end, 1.0 - steps / self.bc_anneal_steps)
        return float(self.bc_online == "keep")


def relu_network(n_in: int, n_out: int, hidden_dim: int = 256) -> List[nn.Module]:
    """Layers (..., n_in) -> (..., n_out), two hidden ones with ReLU."""
    return [
        nn.Linear(n_in, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, n_out),
    ]


class Actor(nn.Module):
    """states (B, S) -> actions (B, A) in [-max_action, max_action]."""

    def __init__(self, state_dim: int, action_dim: int, max_action: float):
        super().__init__()
        self.net = nn.Sequential(*relu_network(state_dim, action_dim), nn.Tanh())
        self.max_action = max_action

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.max_action * self.net(state)

    @torch.no_grad()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Executable action (A,) for a state (S,), without noise."""
        obs = torch.as_tensor(state, dtype=torch.float32, device=device)
        return self(obs.unsqueeze(0))[0].cpu().numpy()


class Critic(nn.Module):
    """Q (B,) of actions (B, A) at states (B, S)."""

    def __init__(self, state_dim: int, action_dim: int):
        super().__init__()
        self.net = nn.Sequential(*relu_network(state_dim + action_dim, 1))

    def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat((state, action), dim=-1)).squeeze(-1)


class TD3_BC:
    """TD3+BC's networks, their losses and one update of all of them.

    The losses are functions of tensors and take no step; each returns one value per row.
    """

    def __init__(
        self,
        max_action: float,
        actor: nn.Module,
        actor_optimizer: torch.optim.Optimizer,
        critic_1: nn.Module,
        critic_1_optimizer: torch.optim.Optimizer,
        critic_2: nn.Module,
        critic_2_optimizer: torch.optim.Optimizer,
        discount: float = 0.99,
        tau: float = 0.005,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_freq: int = 2,
        alpha: float = 2.5,
        device: str = "cpu",
        policy_std: float = 0.1,
    ):
        self.actor, self.critic_1, self.critic_2 = actor, critic_1, critic_2
        self.actor_target, self.critic_1_target, self.critic_2_target = (
            copy.deepcopy(network).to(device).requires_grad_(False)
            for network in (actor, critic_1, critic_2)
        )
        self.actor_optimizer = actor_optimizer
        self.critic_1_optimizer = critic_1_optimizer
        self.critic_2_optimizer = critic_2_optimizer
        self.max_action, self.device = max_action, device
        self.discount, self.tau, self.alpha = discount, tau, alpha
        self.policy_noise, self.noise_clip = policy_noise, noise_clip
        self.policy_freq = policy_freq
        self.policy_std = policy_std
        self.total_it = 0
        self.bc_weight = 1.0  # of the behavior cloning term; the online loop sets it

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [self.critic_1_optimizer, self.critic_2_optimizer, self.actor_optimizer]

    def target_q(
        self, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """min(Q1, Q2) of the target networks, (B,)."""
        return torch.minimum(
            self.critic_1_target(observations, actions),
            self.critic_2_target(observations, actions),
        )

    @torch.no_grad()
    def td_target(
        self,
        next_observations: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        noise: torch.Tensor,
    ) -> torch.Tensor:
        """r + discount min(Q1, Q2)(s', pi(s') + clipped noise), (B,); normal noise (B, A)."""
        noise = (noise * self.policy_noise).clamp(-self.noise_clip, self.noise_clip)
        next_actions = self.actor_target(next_observations) + noise
        next_actions = next_actions.clamp(-self.max_action, self.max_action)
        next_q = self.target_q(next_observations, next_actions)
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        return rewards + (1.0 - dones) * self.discount * next_q

    def q_losses(
        self, observations: torch.Tensor, actions: torch.Tensor, y: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Squared TD errors of both critics, each (B,); TD target y (B,)."""
        return (
            F.mse_loss(self.critic_1(observations, actions), y, reduction="none"),
            F.mse_loss(self.critic_2(observations, actions), y, reduction="none"),
        )

    def policy_losses(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        release: Optional[Release] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """-Q1(s, pi(s)), and the distance of pi(s) to the action of the row, each (B,)."""
        policy_out = self.actor(observations)
        q_losses = -self.critic_1(observations, policy_out)
        bc_losses = F.mse_loss(policy_out, actions, reduction="none").mean(-1)
        if release is not None:
            bc_losses = release.keep(bc_losses[: release.kept])
        return q_losses, bc_losses

    def _noise(self, actions: torch.Tensor) -> torch.Tensor:
        """The random numbers of one update, normal, (B, A), from the global stream."""
        return torch.randn_like(actions)

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
            # A tensor: a number would be compiled in.
            batch[1].new_full((), self.bc_weight),
            self.total_it % self.policy_freq == 0,
            release,
        )

    def _update(
        self,
        batch: TensorBatch,
        noise: torch.Tensor,
        bc_weight: torch.Tensor,
        update_policy: bool,
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps. Policy and targets follow the new critics."""
        observations, actions, rewards, next_observations, dones = batch
        y = self.td_target(next_observations, rewards, dones, noise)
        q1_losses, q2_losses = self.q_losses(observations, actions, y)
        critic_loss = q1_losses.mean(-1) + q2_losses.mean(-1)
        descend(critic_loss, self.critic_1_optimizer, self.critic_2_optimizer)
        log_dict = {"critic_loss": critic_loss.detach(), "bc_weight": bc_weight}
        if update_policy:
            q_losses, bc_losses = self.policy_losses(
                observations,
                actions,
                release,
            )
            lmbda = self.alpha / q_losses.detach().abs().mean(-1)
            actor_loss = lmbda * q_losses.mean(-1) + bc_weight * bc_losses.mean(-1)
            descend(actor_loss, self.actor_optimizer)
            for name in WITH_TARGET:
                target, source = getattr(self, f"{name}_target"), getattr(self, name)
                soft_update(target, source, self.tau)
            log_dict["actor_loss"] = actor_loss.detach()
            if release is not None:
                log_dict["conservative_loss"] = release.average(bc_losses)
        return log_dict

    def state_dict(self) -> Dict[str, Any]:
        """CORL's keys, and what CORL loses: the target networks."""
        parts = [*CHECKPOINT_PARTS, *(f"{name}_target" for name in WITH_TARGET)]
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
        for name in WITH_TARGET:
            # Upstream's checkpoints have no target networks; they restart as copies.
            target = state_dict.get(f"{name}_target", state_dict[name])
            getattr(self, f"{name}_target").load_state_dict(target)
        self.total_it = state_dict["total_it"]


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> TD3_BC:
    """The trainer of a config, on the device."""
    # The order of construction is the order of upstream's random draws.
    actor = Actor(state_dim, action_dim, max_action).to(device)
    critic_1, critic_2 = (Critic(state_dim, action_dim).to(device) for _ in range(2))
    trainer = TD3_BC(
        **arguments_of(
            TD3_BC,
            config,
            device=device,
            policy_noise=config.policy_noise * max_action,
            noise_clip=config.noise_clip * max_action,
            policy_std=config.density_std() * max_action,
        ),
        max_action=max_action,
        actor=actor,
        actor_optimizer=torch.optim.Adam(actor.parameters(), lr=config.actor_lr),
        critic_1=critic_1,
        critic_1_optimizer=torch.optim.Adam(critic_1.parameters(), lr=config.qf_lr),
        critic_2=critic_2,
        critic_2_optimizer=torch.optim.Adam(critic_2.parameters(), lr=config.qf_lr),
    )
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


def policy_fit(trainer: TD3_BC, config: TrainConfig) -> Fit:
    """How well rows fit the policy with its noise, for `sampling: on_policy`."""
    actor, std = trainer.actor, config.density_std() * trainer.max_action
    return lambda states, actions: standard_log_prob(actions, actor(states), std)


def hook_arguments(trainer: TD3_BC) -> Dict[str, Any]:
    """What the hook needs of the trainer: the log-density of its policy, and its Q."""
    log_prob = noisy_log_prob(trainer.actor, trainer.policy_std, trainer.max_action)
    return {
        "policy_log_prob": log_prob,
        "clipped_policy": True,
        "q_function": trainer.target_q,
    }


def step(trainer: TD3_BC, source: Any, config: TrainConfig) -> Dict[str, Any]:
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
        session.weigh_rows(trainer.actor, policy_fit(trainer, config))
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

        explore = partial(
            finetune.add_noise,
            max_action=trainer.max_action,
            scale=config.expl_noise,
            clip=np.inf,
        )

        session.start(
            offline=lambda: step(trainer, session.offline_buffer, config),
            online=lambda: step(trainer, source, config),
            period=config.policy_freq,
            other=lambda hook, config: step(trainer, hook, config),
        )
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, session.offline_buffer, config))
        if config.dare.enabled and session.goes_online:
            source.pretrain(session.should_stop, session.save)
        for t in session.online(trainer.actor, explore):
            trainer.bc_weight = config.bc_weight(t + 1 - config.offline_iterations)
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
