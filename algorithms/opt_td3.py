"""TD3+OPT: TD3+BC offline, then new critics that are pre-trained online (OPT).

Paper: Shin et al. 2025, https://arxiv.org/abs/2507.08387. Offline it is `algorithms/td3_bc.py`, to
the bit; `load_model` takes its checkpoints. Online the frozen policy collects first, for
`online_warmup` steps. Then a second pair of critics, Q_on, learns from both buffers by a loss that
looks through an inner step: L_off(psi) + c L_on(psi - alpha grad L_off(psi)). From then on both
pairs learn from the same rows, and the policy maximizes (1 - kappa) Q_off + kappa Q_on, the first
critic of each, without cloning and without a normalizer. kappa changes with the online steps. Rows
are drawn by priorities that a network of densities gives them (balanced replay).

    python algorithms/opt_td3.py --config configs/opt_td3/hopper_medium.yaml

The authors' code was not at hand. The formulas are the paper's; the order of an update, c, and
what neither says are those of a third party's port (docs/opt.md lists them all), so no number here
was compared with theirs. `weigh_outer: false` has c = 1, as the paper writes it. What differs:
- The port gives the newest 1 000 000 rows a priority, so on a dataset of that size every online
  row pushes an offline row out of the replay, and larger ones do not fit. Here all rows have one;
  `priority_capacity: 1000000` is the port's.
- The pre-training comes between two online steps, on `online_warmup` rows.
With `kappa_start` and `kappa_end` 0 and `replay: uniform` the critics and the policy are TD3's.

Shapes: B rows of a batch, S state dimension, A action dimension.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, ClassVar, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from corl import finetune, seeds
from corl.compiled import CompiledUpdate, begin_anew, complete, descend, soft_update
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
from online_pretraining.config import OptFields
from online_pretraining.critics import (
    ONLINE_PARTS,
    OnlineCritics,
    OnlinePretraining,
    Pair,
)
from online_pretraining.draws import Draws, own_stream
from online_pretraining.replay import REPLAY_COLUMNS, Replay

# The file whose offline phase this one shares.
BASELINE = "td3_bc"
COLUMNS = ["critic_loss", "actor_loss", "online_critic_loss", "kappa", *REPLAY_COLUMNS]
# Attributes of the trainer and keys of TD3+BC's checkpoints.
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
# Normal noise (B, A) of the target of Q_on, and kappa ().
Online = Tuple[torch.Tensor, torch.Tensor]


@dataclass
class TrainConfig(OptFields, FinetuneConfig):
    """TD3+BC's fields; OPT's are in `OptFields`, those of every algorithm in `FinetuneConfig`."""

    # Other defaults than the common ones
    online_iterations: int = 300000  # environment steps of fine-tuning, with the warm-up
    online_warmup: int = 25000  # online steps that the frozen policy collects in
    utd: int = 5  # updates per environment step online
    normalize: bool = False  # normalize states with the dataset's mean and std
    group: str = "OPT_TD3-D4RL"  # wandb group
    name: str = "OPT_TD3"  # first part of the run folder's name
    # TD3; normalize_reward: locomotion: returns span 1000; antmaze: reward - 1
    expl_noise: float = 0.1  # std of the exploration noise online, of the largest action
    tau: float = 0.005  # target network update rate
    policy_noise: float = 0.2  # std of the noise on target actions
    noise_clip: float = 0.5  # bound on that noise, and on the exploration noise
    policy_freq: int = 2  # updates of the critics per update of the policy
    # TD3+BC
    alpha: float = 2.5  # weight of Q against behavior cloning offline
    actor_lr: float = 3e-4  # actor learning rate
    qf_lr: float = 3e-4  # learning rate of all critics

    RANGES: ClassVar[dict] = (
        FinetuneConfig.RANGES
        | OptFields.RANGES
        | {
            **dict.fromkeys(("expl_noise", "policy_noise", "noise_clip"), "[0, inf)"),
            "tau": "(0, 1]",
            "policy_freq": "[1, 1e9]",
            "alpha": "[0, inf)",
            **dict.fromkeys(("actor_lr", "qf_lr"), "(0, inf)"),
        }
    )
    CHOICES: ClassVar[dict] = FinetuneConfig.CHOICES | OptFields.CHOICES
    ONLINE: ClassVar[frozenset] = (
        FinetuneConfig.ONLINE | OptFields.ONLINE | {"expl_noise"}
    )
    ALIASES: ClassVar[Dict[str, str]] = {"max_timesteps": "offline_iterations"}
    QUICK_START: ClassVar[str] = "configs/opt_td3/quick_start.yaml"

    def __post_init__(self):
        super().__post_init__()
        self.check_opt()


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


class OPT_TD3(OnlineCritics):
    """The networks of TD3+BC and the online critics, their losses and one update of each phase.

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
        online_critics: nn.Module,
        online_critics_optimizer: torch.optim.Optimizer,
        draws: Draws,
        discount: float = 0.99,
        tau: float = 0.005,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_freq: int = 2,
        alpha: float = 2.5,
        inner_lr: float = 3e-4,
        weigh_outer: bool = True,
        device: str = "cpu",
    ):
        self.actor, self.critic_1, self.critic_2 = actor, critic_1, critic_2
        self.actor_target, self.critic_1_target, self.critic_2_target = (
            copy.deepcopy(network).to(device).requires_grad_(False)
            for network in (actor, critic_1, critic_2)
        )
        self.actor_optimizer = actor_optimizer
        self.critic_1_optimizer = critic_1_optimizer
        self.critic_2_optimizer = critic_2_optimizer
        online = online_critics, online_critics_optimizer, draws, inner_lr, weigh_outer
        self.add_online_critics(*online, tau, descend, soft_update)
        self.max_action, self.device = max_action, device
        self.discount, self.tau, self.alpha = discount, tau, alpha
        self.policy_noise, self.noise_clip = policy_noise, noise_clip
        self.policy_freq = policy_freq
        self.total_it = 0  # updates of both phases, without the pre-training
        self.kappa = 0.0  # share of the online critics; the online loop sets it

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [
            self.critic_1_optimizer,
            self.critic_2_optimizer,
            self.actor_optimizer,
            self.online_critics_optimizer,
        ]

    def start_online(self) -> None:
        """Adam begins anew for the offline critics and the policy."""
        begin_anew(*self.optimizers()[:3])

    def target_q(
        self, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """min(Q1, Q2) of the offline critics' target networks, (B,)."""
        return torch.minimum(
            self.critic_1_target(observations, actions),
            self.critic_2_target(observations, actions),
        )

    @torch.no_grad()
    def td_target(
        self,
        target_q: Callable[..., torch.Tensor],
        next_observations: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        noise: torch.Tensor,
        discount: torch.Tensor,
    ) -> torch.Tensor:
        """r + discount Q(s', pi(s') + clipped noise), (B,), Q of `target_q`; noise (B, A)."""
        noise = (noise * self.policy_noise).clamp(-self.noise_clip, self.noise_clip)
        next_actions = self.actor_target(next_observations) + noise
        next_actions = next_actions.clamp(-self.max_action, self.max_action)
        next_q = target_q(next_observations, next_actions)
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        return rewards + (1.0 - dones) * discount * next_q

    def q_losses(
        self, observations: torch.Tensor, actions: torch.Tensor, y: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Squared TD errors of both offline critics, each (B,); TD target y (B,)."""
        return (
            F.mse_loss(self.critic_1(observations, actions), y, reduction="none"),
            F.mse_loss(self.critic_2(observations, actions), y, reduction="none"),
        )

    def policy_losses(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """-Q1(s, pi(s)), and the distance of pi(s) to the action of the row, each (B,)."""
        policy_out = self.actor(observations)
        q_losses = -self.critic_1(observations, policy_out)
        bc_losses = F.mse_loss(policy_out, actions, reduction="none").mean(-1)
        return q_losses, bc_losses

    def online_policy_losses(
        self, observations: torch.Tensor, kappa: torch.Tensor
    ) -> torch.Tensor:
        """-(1 - kappa) Q_off(s, pi(s)) - kappa Q_on(s, pi(s)), (B,); kappa ()."""
        policy_out = self.actor(observations)
        offline = self.critic_1(observations, policy_out)
        online = self.online_critics(observations, policy_out)[0]
        return -((1.0 - kappa) * offline + kappa * online)

    def _noise(self, actions: torch.Tensor) -> torch.Tensor:
        """The random numbers of TD3's update, normal, (B, A), from the global stream."""
        return torch.randn_like(actions)

    def train(self, batch: TensorBatch, online: bool = False) -> Dict[str, torch.Tensor]:
        """One update on a batch, of TD3+BC or online of OPT; returns 0-d tensors."""
        self.total_it += 1
        actions = batch[1]
        given: Optional[Online] = None
        if online:
            # A tensor: a number would be compiled in.
            kappa = actions.new_full((), self.kappa)
            given = self.draws.normal(actions.shape), kappa
        return self._update(
            batch,
            self._noise(actions),
            actions.new_full((), self.discount),
            self.total_it % self.policy_freq == 0,
            given,
        )

    def _update(
        self,
        batch: TensorBatch,
        noise: torch.Tensor,
        discount: torch.Tensor,
        update_policy: bool,
        online: Optional[Online],
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps. Policy and targets follow the new critics.

        Without `online` it is TD3+BC's update.
        """
        observations, actions, rewards, next_observations, dones = batch
        rest = next_observations, rewards, dones
        y = self.td_target(self.target_q, *rest, noise, discount)
        q1_losses, q2_losses = self.q_losses(observations, actions, y)
        critic_loss = q1_losses.mean(-1) + q2_losses.mean(-1)
        descend(critic_loss, self.critic_1_optimizer, self.critic_2_optimizer)
        log_dict = {"critic_loss": critic_loss.detach()}
        followers = [*WITH_TARGET]
        if online is not None:
            y = self.td_target(self.online_target_q, *rest, online[0], discount)
            online_loss = self.online_q_losses(observations, actions, y).mean(-1)
            descend(online_loss, self.online_critics_optimizer)
            log_dict["online_critic_loss"] = online_loss.detach()
            log_dict["kappa"] = online[1]
            followers.append("online_critics")
        if update_policy:
            if online is not None:
                actor_loss = self.online_policy_losses(observations, online[1]).mean(-1)
            else:
                q_losses, bc_losses = self.policy_losses(observations, actions)
                lmbda = self.alpha / q_losses.detach().abs().mean(-1)
                actor_loss = lmbda * q_losses.mean(-1) + bc_losses.mean(-1)
            descend(actor_loss, self.actor_optimizer)
            for name in followers:
                target, source = getattr(self, f"{name}_target"), getattr(self, name)
                soft_update(target, source, self.tau)
            log_dict["actor_loss"] = actor_loss.detach()
        return log_dict

    def state_dict(self) -> Dict[str, Any]:
        """TD3+BC's keys with its target networks, the online critics and their random stream."""
        targets = [f"{name}_target" for name in WITH_TARGET]
        parts = [*CHECKPOINT_PARTS, *targets, *ONLINE_PARTS, "draws"]
        return {
            **{part: getattr(self, part).state_dict() for part in parts},
            "total_it": self.total_it,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)
        self.draws.load_state_dict(state_dict["draws"])

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from a `state_dict`, or from TD3+BC's: then the online critics stay."""
        for part in CHECKPOINT_PARTS:
            getattr(self, part).load_state_dict(state_dict[part])
        for name in WITH_TARGET:
            # CORL's checkpoints have no target networks; they restart as copies.
            target = state_dict.get(f"{name}_target", state_dict[name])
            getattr(self, f"{name}_target").load_state_dict(target)
        for part in ONLINE_PARTS:
            if part in state_dict:
                getattr(self, part).load_state_dict(state_dict[part])
        self.total_it = state_dict["total_it"]


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> OPT_TD3:
    """The trainer of a config, on the device."""
    # The order of construction is that of td3_bc.py; the online critics have their own stream.
    actor = Actor(state_dim, action_dim, max_action).to(device)
    critic_1, critic_2 = (Critic(state_dim, action_dim).to(device) for _ in range(2))
    with own_stream(config.seed):
        pair = Pair(*(Critic(state_dim, action_dim) for _ in range(2))).to(device)
    trainer = OPT_TD3(
        **arguments_of(
            OPT_TD3,
            config,
            device=device,
            policy_noise=config.policy_noise * max_action,
            noise_clip=config.noise_clip * max_action,
        ),
        max_action=max_action,
        actor=actor,
        actor_optimizer=torch.optim.Adam(actor.parameters(), lr=config.actor_lr),
        critic_1=critic_1,
        critic_1_optimizer=torch.optim.Adam(critic_1.parameters(), lr=config.qf_lr),
        critic_2=critic_2,
        critic_2_optimizer=torch.optim.Adam(critic_2.parameters(), lr=config.qf_lr),
        online_critics=pair,
        online_critics_optimizer=torch.optim.Adam(pair.parameters(), lr=config.qf_lr),
        draws=Draws(config.seed, device),
    )
    # It may make no step for long, and its state is in every checkpoint.
    complete(trainer.online_critics_optimizer)
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
        alone = [trainer.online_critics_optimizer]
        trainer._pretrain = CompiledUpdate(trainer._pretrain, alone)
    return trainer


def step(
    trainer: OPT_TD3, source: Any, config: TrainConfig, online: bool
) -> Dict[str, Any]:
    """One update of a phase on a fresh batch of the source; returns its metrics."""
    losses = trainer.train(source.sample(config.batch_size), online)
    return {**losses, **source.log} if online else losses


@seeds.each
def train(config: TrainConfig) -> Dict[str, Any]:
    """The whole run; returns what the run folder's summary.json says."""
    with seeds.session(config, __file__, COLUMNS) as session:
        trainer = session.build(make_trainer)
        session.keep("trainer", trainer, loads=CHECKPOINT_PARTS)
        buffers = session.offline_buffer, session.online_buffer
        source = Replay(
            config,
            *buffers,
            finetune.JoinedBuffer(*buffers),
            session.sizes[:2],
            trainer.draws,
            descend,
            CompiledUpdate if config.compile is True else None,
        )
        session.keep("replay", source)
        pretraining = OnlinePretraining(config, trainer, *buffers)
        session.between(session.keep("pretraining", pretraining))

        explore = partial(
            finetune.add_noise,
            max_action=trainer.max_action,
            scale=config.expl_noise,
            clip=config.noise_clip,
        )

        session.start(
            offline=lambda: step(trainer, session.offline_buffer, config, False),
            online=lambda: step(trainer, source, config, True),
            period=config.policy_freq,
        )
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, session.offline_buffer, config, False))
        session.switch(trainer.start_online)
        for t in session.online(trainer.actor, explore):
            steps = t - config.offline_iterations
            # The first update has kappa_start.
            trainer.kappa, source.written = config.kappa_after(steps), steps + 1
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config, True)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
