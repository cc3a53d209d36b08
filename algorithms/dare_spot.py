"""SPOT, offline then online (CORL's single-file SPOT on today's stack).

DARE-SPOT: the same with Dynamic Alignment for RElease, https://arxiv.org/abs/2511.03828. Online,
the weight of a row multiplies the negative ELBO of pi(s) at its state (see docs/spot.md).

    python algorithms/dare_spot.py --config configs/spot/hopper_medium.yaml

Paper: Wu et al. 2022, https://arxiv.org/abs/2202.06239. Names, config fields, order of updates,
checkpoint keys and numbers are those of CORL's `algorithms/finetune/spot.py` at commit 6afec90; one
update on the same weights, batch and draws gives the same parameters. A variational autoencoder
(VAE) learns the dataset's actions first. Then the policy maximizes
Q1(s, pi(s)) / mean |Q1| - lambd (negative ELBO of pi(s) given s), so it stays where the data has
actions. Online lambd is cooled.

    python algorithms/spot.py --config configs/spot/hopper_medium.yaml

What differs from upstream, and why (`compat: true` brings the upstream behaviour back):
- Evaluation episodes are seeded with `eval_seed`. Upstream takes `seed`.
- The VAE of `load_model` is used as it is. Upstream trains it again for `vae_iterations`.
Without a switch: `lambd_cool` is on where the config does not name it, as in all of CORL's YAML
files; upstream's default is off. lambd falls with environment steps, which at one update per step
are upstream's updates; `lambd_cool_steps` is their number where it is not `online_iterations`.
`actor_dropout` is that of the authors' code (thuml/SPOT), whose locomotion settings need it: behind
the hidden layers, in the target policy, in the policy that learns and so in the action of the ELBO,
and not in an action that is executed. `iwae: true` works; upstream's crashes. The switch to the
online phase sets Adam's means to zero in place, where upstream makes new optimizers.
`mixing_ratio` splits online batches between two buffers; the default is one buffer. Checkpoints
also hold the target networks; `train` returns tensors, so that an update never waits for the
device. The exploration noise is multiplied by the largest action once, upstream's twice; it is 1 in
every task. A row of metrics.csv between two updates of the policy has no loss of the policy, as
upstream.

Shapes: B rows of a batch, S state dimension, A action dimension, L latent dimension, n samples of
the VAE per row.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from corl import finetune, seeds
from corl.compiled import CompiledUpdate, begin_anew, descend, soft_update
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

BASELINE = "spot"
COLUMNS = ["critic_loss", "actor_loss", "neg_log_beta_mean", "neg_log_beta_max", "lambd"]
COLUMNS += LOGS
# Attributes of the trainer and keys of CORL's checkpoints.
CHECKPOINT_PARTS = (
    "vae",
    "vae_optimizer",
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
    """SPOT's fields; those of every algorithm are in `FinetuneConfig`."""

    # Other defaults than the common ones
    env: str = "antmaze-umaze-v2"  # D4RL task name
    normalize: bool = False  # normalize states with the dataset's mean and std
    normalize_reward: bool = True  # locomotion: returns span 1000; antmaze: reward - 1
    group: str = "SPOT-D4RL"  # wandb group
    name: str = "DARE-SPOT"  # first part of the run folder's name
    # TD3
    actor_lr: float = 1e-4  # actor learning rate
    qf_lr: float = 3e-4  # critics learning rate
    expl_noise: float = 0.1  # std of the exploration noise online, of the largest action
    tau: float = 0.005  # target network update rate
    policy_noise: float = 0.2  # std of the noise on target actions
    noise_clip: float = 0.5  # bound on that noise, and on the exploration noise
    policy_freq: int = 2  # updates of the critics per update of the policy
    # VAE
    vae_lr: float = 1e-3  # VAE learning rate
    vae_hidden_dim: int = 750  # width of its hidden layers
    vae_latent_dim: Optional[int] = None  # size of its latent space; none: 2 A
    beta: float = 0.5  # weight of the KL divergence in the ELBO
    vae_iterations: int = 100000  # updates of the VAE before the offline phase
    # SPOT
    actor_init_w: Optional[float] = None  # bound of the actor's first last layer
    critic_init_w: Optional[float] = None  # the same of the critics
    lambd: float = 1.0  # weight of the support constraint
    num_samples: int = 1  # latent samples per action in the ELBO
    iwae: bool = False  # the importance weighted bound in place of the ELBO
    lambd_cool: Optional[bool] = None  # lower lambd online; none: yes
    lambd_end: float = 0.2  # the least share of lambd
    online_discount: float = 0.995  # discount factor online
    # Not in CORL
    actor_dropout: float = 0.0  # dropout behind the actor's hidden layers, in learning
    lambd_cool_steps: Optional[int] = None  # online steps until 0; none: all
    mixing_ratio: Optional[float] = None  # offline share of a batch; none: one buffer
    policy_std: Optional[float] = None  # of the policy's density; none: expl_noise
    dare: NoisyDareConfig = dataclasses.field(default_factory=NoisyDareConfig)

    RANGES: ClassVar[dict] = FinetuneConfig.RANGES | {
        **dict.fromkeys(("expl_noise", "policy_noise", "noise_clip"), "[0, inf)"),
        "tau": "(0, 1]",
        "policy_freq": "[1, 1e9]",
        **dict.fromkeys(("actor_lr", "qf_lr", "vae_lr"), "(0, inf)"),
        **dict.fromkeys(("vae_hidden_dim", "vae_latent_dim"), "[1, 1e5]"),
        "beta": "(0, inf)",
        "vae_iterations": "[0, 1e9]",
        **dict.fromkeys(("actor_init_w", "critic_init_w"), "(0, inf)"),
        "lambd": "[0, inf)",
        "num_samples": "[1, 1e4]",
        "lambd_end": "[0, 1]",
        "online_discount": "[0, 1]",
        "actor_dropout": "[0, 1)",
        "lambd_cool_steps": "[1, 1e9]",
        "mixing_ratio": "[0, 1)",
        "policy_std": "(0, inf)",
    }
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        "mixing_ratio",
        "policy_std",
        "expl_noise",
        "lambd_cool",
        "lambd_end",
        "lambd_cool_steps",
        "online_discount",
        "dare",
    }
    ALIASES: ClassVar[Dict[str, str]] = {"critic_lr": "qf_lr"}
    PRESETS: ClassVar[dict] = PRESETS
    QUICK_START: ClassVar[str] = "configs/spot/quick_start.yaml"

    def __post_init__(self):
        super().__post_init__()
        if self.dare.enabled:
            if self.lambd_cool:
                raise ValueError(
                    "lambd_cool true and dare would both release; leave lambd_cool out"
                )
            self.lambd_cool, self.mixing_ratio = False, self.mixing_ratio or 0.5
            self.dare.density_std(self.density_std())
        if self.lambd_cool is None:
            self.lambd_cool = True
        self.density_std()
        if self.mixing_ratio is not None:
            self.check_mixing_ratio("; leave it out for a single buffer")

    def vae_updates(self) -> int:
        """Updates of the VAE before the offline phase."""
        return 0 if self.load_model and not self.compat else self.vae_iterations

    def not_stacked(self) -> str:
        """Why the seeds of this config cannot be stacked."""
        return super().not_stacked() or "each seed trains its own VAE first"

    def lambd_after(self, steps: int) -> float:
        """Weight of the support constraint after so many environment steps."""
        if not self.lambd_cool:
            return self.lambd
        length = self.lambd_cool_steps or self.online_iterations
        return self.lambd * max(self.lambd_end, 1.0 - steps / length)


def uniform_(layer: nn.Linear, bound: Optional[float]) -> nn.Linear:
    """The layer with weights uniform in [-bound, bound]; None leaves torch's."""
    for parameter in (layer.weight, layer.bias) if bound is not None else ():
        nn.init.uniform_(parameter, -bound, bound)
    return layer


def relu_layers(n_in: int, hidden_dim: int, last: nn.Module) -> List[nn.Module]:
    """Layers (..., n_in) -> two hidden ones with ReLU -> `last`, which is made already."""
    return [
        nn.Linear(n_in, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        last,
    ]


class VAE(nn.Module):
    """Conditional variational autoencoder of the data's actions; latent_dim None: 2 A."""

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        latent_dim: Optional[int],
        max_action: float,
        hidden_dim: int = 750,
    ):
        super().__init__()
        latent_dim = 2 * action_dim if latent_dim is None else latent_dim
        self.encoder_shared = nn.Sequential(
            nn.Linear(state_dim + action_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
        )
        self.mean = nn.Linear(hidden_dim, latent_dim)
        self.log_std = nn.Linear(hidden_dim, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(state_dim + latent_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, action_dim),
            nn.Tanh(),
        )
        self.max_action, self.latent_dim = max_action, latent_dim

    def encode(
        self, state: torch.Tensor, action: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Mean and std (B, L) of the latent, given states (B, S) and actions (B, A)."""
        hidden = self.encoder_shared(torch.cat((state, action), dim=-1))
        return self.mean(hidden), self.log_std(hidden).clamp(-4, 15).exp()

    def decode(self, state: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Actions (B, n, A) at states (B, S) of latents (B, n, L)."""
        state = state.unsqueeze(1).expand(-1, z.shape[1], -1)
        return self.max_action * self.decoder(torch.cat((state, z), dim=-1))


class Actor(nn.Module):
    """states (B, S) -> actions (B, A) in [-max_action, max_action]."""

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        init_w: Optional[float] = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        # The order of construction is the order of upstream's random draws.
        head = uniform_(nn.Linear(256, action_dim), init_w)
        self.net = nn.Sequential(*relu_layers(state_dim, 256, head), nn.Tanh())
        self.max_action, self.dropout = max_action, dropout

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """With dropout in training mode."""
        return self._action(state, self.dropout if self.training else 0.0)

    def executed(self, state: torch.Tensor) -> torch.Tensor:
        """Without dropout in any mode, as the action that is executed."""
        return self._action(state, 0.0)

    def _action(self, state: torch.Tensor, dropout: float) -> torch.Tensor:
        for layer in self.net:
            # No layer of its own, so the keys are CORL's with dropout, too.
            if dropout and isinstance(layer, nn.ReLU):
                state = F.dropout(state, dropout)
            state = layer(state)
        return self.max_action * state

    @torch.no_grad()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Executable action (A,) for a state (S,), without noise."""
        obs = torch.as_tensor(state, dtype=torch.float32, device=device)
        return self.executed(obs.unsqueeze(0))[0].cpu().numpy()


class Critic(nn.Module):
    """Q (B,) of actions (B, A) at states (B, S)."""

    def __init__(self, state_dim: int, action_dim: int, init_w: Optional[float] = None):
        super().__init__()
        head = uniform_(nn.Linear(256, 1), init_w)
        self.net = nn.Sequential(*relu_layers(state_dim + action_dim, 256, head))

    def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat((state, action), dim=-1)).squeeze(-1)


class SPOT:
    """SPOT's networks, their losses and one update of all of them.

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
        vae: nn.Module,
        vae_optimizer: torch.optim.Optimizer,
        discount: float = 0.99,
        tau: float = 0.005,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_freq: int = 2,
        beta: float = 0.5,
        lambd: float = 1.0,
        num_samples: int = 1,
        iwae: bool = False,
        device: str = "cpu",
        policy_std: float = 0.1,
    ):
        self.actor, self.critic_1, self.critic_2 = actor, critic_1, critic_2
        self.actor_target, self.critic_1_target, self.critic_2_target = (
            copy.deepcopy(network).to(device).requires_grad_(False)
            for network in (actor, critic_1, critic_2)
        )
        self.vae, self.vae_optimizer = vae, vae_optimizer
        self.actor_optimizer = actor_optimizer
        self.critic_1_optimizer = critic_1_optimizer
        self.critic_2_optimizer = critic_2_optimizer
        self.max_action, self.device = max_action, device
        self.discount, self.tau = discount, tau
        self.policy_noise, self.noise_clip = policy_noise, noise_clip
        self.policy_freq = policy_freq
        self.beta, self.num_samples, self.iwae = beta, num_samples, iwae
        self.policy_std = policy_std
        # Updates of the VAE count, too, as upstream.
        self.total_it = 0
        self.lambd = lambd  # weight of the support constraint; the online loop sets it

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [self.critic_1_optimizer, self.critic_2_optimizer, self.actor_optimizer]

    def start_online(self, discount: float) -> None:
        """The discount changes, and Adam begins anew for the critics and the policy."""
        self.discount = discount
        begin_anew(*self.optimizers())

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
        discount: torch.Tensor,
    ) -> torch.Tensor:
        """r + discount min(Q1, Q2)(s', pi(s') + clipped noise), (B,); normal noise (B, A)."""
        noise = (noise * self.policy_noise).clamp(-self.noise_clip, self.noise_clip)
        next_actions = self.actor_target(next_observations) + noise
        next_actions = next_actions.clamp(-self.max_action, self.max_action)
        next_q = self.target_q(next_observations, next_actions)
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        return rewards + (1.0 - dones) * discount * next_q

    def q_losses(
        self, observations: torch.Tensor, actions: torch.Tensor, y: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Squared TD errors of both critics, each (B,); TD target y (B,)."""
        return (
            F.mse_loss(self.critic_1(observations, actions), y, reduction="none"),
            F.mse_loss(self.critic_2(observations, actions), y, reduction="none"),
        )

    def vae_losses(
        self, observations: torch.Tensor, actions: torch.Tensor, noise: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Error of the reconstruction and KL divergence, each (B,); normal noise (B, n, L)."""
        mean, std = self.vae.encode(observations, actions)
        z = mean.unsqueeze(1) + std.unsqueeze(1) * noise
        decoded = self.vae.decode(observations, z)
        errors = (decoded - actions.unsqueeze(1)).square().mean((1, 2))
        return errors, -0.5 * (1 + std.pow(2).log() - mean.pow(2) - std.pow(2)).mean(-1)

    def iwae_losses(
        self, observations: torch.Tensor, actions: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Negative importance weighted bound on log beta(a|s), (B,), in nats."""
        mean, std = self.vae.encode(observations, actions)
        z = mean.unsqueeze(1) + std.unsqueeze(1) * noise
        errors = (self.vae.decode(observations, z) - actions.unsqueeze(1)).square()
        # The decoder's variance is beta / 4.
        likelihood = -2.0 * errors / self.beta - 0.5 * math.log(math.pi * self.beta / 2)
        # Prior over posterior; their constants cancel.
        ratio = 0.5 * (noise.square() - z.square()) + std.log().unsqueeze(1)
        weights = likelihood.sum(-1) + ratio.sum(-1)
        return math.log(noise.shape[1]) - weights.logsumexp(-1)

    def support_losses(
        self, observations: torch.Tensor, actions: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Negative ELBO of actions (B, A), up to a factor and a constant, (B,); with `iwae` its."""
        if self.iwae:
            return self.iwae_losses(observations, actions, noise)
        errors, divergences = self.vae_losses(observations, actions, noise)
        return errors + self.beta * divergences

    def policy_losses(
        self,
        observations: torch.Tensor,
        noise: torch.Tensor,
        release: Optional[Release] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """-Q1(s, pi(s)), and the negative ELBO of pi(s), each (B,); normal noise (B, n, L)."""
        policy_out = self.actor(observations)
        q_losses = -self.critic_1(observations, policy_out)
        if release is not None:
            rows = (x[: release.kept] for x in (observations, policy_out, noise))
            return q_losses, release.keep(self.support_losses(*rows))
        return q_losses, self.support_losses(observations, policy_out, noise)

    def _noise(
        self, actions: torch.Tensor, update_policy: bool
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The random numbers of one update, normal, (B, A) and (B, n, L), of the global stream."""
        noise, latent_noise = torch.randn_like(actions), None
        if update_policy:
            # Upstream's layout in memory, which the order of the draws follows.
            shape = self.num_samples, len(actions), self.vae.latent_dim
            latent_noise = torch.randn_like(actions.new_empty(shape).transpose(0, 1))
        return noise, latent_noise

    def vae_train(self, batch: TensorBatch) -> Dict[str, torch.Tensor]:
        """One update of the VAE on a batch; returns 0-d tensors."""
        self.total_it += 1
        observations, actions = batch[:2]
        shape = len(actions), 1, self.vae.latent_dim
        noise = torch.randn(shape, device=actions.device)
        return self._vae_update(observations, actions, noise)

    def _vae_update(
        self, observations: torch.Tensor, actions: torch.Tensor, noise: torch.Tensor
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the step."""
        errors, divergences = self.vae_losses(observations, actions, noise)
        error, divergence = errors.mean(-1), divergences.mean(-1)
        loss = error + self.beta * divergence
        descend(loss, self.vae_optimizer)
        found = {"reconstruction_loss": error, "KL_loss": divergence, "vae_loss": loss}
        return {name: value.detach() for name, value in found.items()}

    def train(
        self,
        batch: TensorBatch,
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """One update on a batch; returns 0-d tensors."""
        self.total_it += 1
        return self._update(
            batch,
            *self._noise(batch[1], self.total_it % self.policy_freq == 0),
            # Tensors: numbers would be compiled in.
            batch[1].new_full((), self.lambd),
            batch[1].new_full((), self.discount),
            release,
        )

    def _update(
        self,
        batch: TensorBatch,
        noise: torch.Tensor,
        latent_noise: Optional[torch.Tensor],
        lambd: torch.Tensor,
        discount: torch.Tensor,
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps. Policy and targets follow the new critics.

        Without `latent_noise` they stay. Dropout draws its masks from the global stream.
        """
        observations, actions, rewards, next_observations, dones = batch
        y = self.td_target(next_observations, rewards, dones, noise, discount)
        q1_losses, q2_losses = self.q_losses(observations, actions, y)
        critic_loss = q1_losses.mean(-1) + q2_losses.mean(-1)
        descend(critic_loss, self.critic_1_optimizer, self.critic_2_optimizer)
        log_dict = {"critic_loss": critic_loss.detach(), "lambd": lambd}
        if latent_noise is not None:
            q_losses, support_losses = self.policy_losses(
                observations,
                latent_noise,
                release,
            )
            support = support_losses.mean(-1)
            scale = 1.0 / q_losses.detach().abs().mean(-1)
            actor_loss = scale * q_losses.mean(-1) + lambd * support
            descend(actor_loss, self.actor_optimizer)
            for name in WITH_TARGET:
                target, source = getattr(self, f"{name}_target"), getattr(self, name)
                soft_update(target, source, self.tau)
            log_dict["actor_loss"] = actor_loss.detach()
            log_dict["neg_log_beta_mean"] = support.detach()
            log_dict["neg_log_beta_max"] = support_losses.detach().amax(-1)
            if release is not None:
                log_dict["conservative_loss"] = release.average(support_losses)
        return log_dict

    def state_dict(self) -> Dict[str, Any]:
        """CORL's keys, what CORL loses, and what the switch to the online phase changes."""
        parts = [*CHECKPOINT_PARTS, *(f"{name}_target" for name in WITH_TARGET)]
        return {
            **{part: getattr(self, part).state_dict() for part in parts},
            "total_it": self.total_it,
            "discount": self.discount,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)
        self.discount = state_dict["discount"]

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
) -> SPOT:
    """The trainer of a config, on the device."""
    # The order of construction is the order of upstream's random draws.
    sizes = state_dim, action_dim
    latent_dim, width = config.vae_latent_dim, config.vae_hidden_dim
    vae = VAE(*sizes, latent_dim, max_action, width).to(device)
    actor = Actor(*sizes, max_action, config.actor_init_w, config.actor_dropout)
    actor = actor.to(device)
    critic_1, critic_2 = (
        Critic(*sizes, config.critic_init_w).to(device) for _ in range(2)
    )
    trainer = SPOT(
        **arguments_of(
            SPOT,
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
        vae=vae,
        vae_optimizer=torch.optim.Adam(vae.parameters(), lr=config.vae_lr),
    )
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
        trainer._vae_update = CompiledUpdate(
            trainer._vae_update, [trainer.vae_optimizer]
        )
    return trainer


def policy_fit(trainer: SPOT, config: TrainConfig) -> Fit:
    """How well rows fit the policy with its noise, for `sampling: on_policy`."""
    actor, std = trainer.actor.executed, config.density_std() * trainer.max_action
    return lambda states, actions: standard_log_prob(actions, actor(states), std)


def hook_arguments(trainer: SPOT) -> Dict[str, Any]:
    """What the hook needs of the trainer: the log-density of its policy, and its Q."""
    width = trainer.policy_std, trainer.max_action
    log_prob = noisy_log_prob(trainer.actor.executed, *width)
    target_q = trainer.target_q
    return {"policy_log_prob": log_prob, "clipped_policy": True, "q_function": target_q}


def step(trainer: SPOT, source: Any, config: TrainConfig) -> Dict[str, Any]:
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
            clip=config.noise_clip,
        )

        vae = finetune.Pretraining(
            "VAE",
            config.vae_updates(),
            lambda: trainer.vae_train(session.offline_buffer.sample(config.batch_size)),
        )
        session.start(
            offline=lambda: step(trainer, session.offline_buffer, config),
            online=lambda: step(trainer, source, config),
            period=config.policy_freq,
            pretraining=vae,
            other=lambda hook, config: step(trainer, hook, config),
        )
        session.pretrain(vae)
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, session.offline_buffer, config))
        session.switch(lambda: trainer.start_online(config.online_discount))
        if config.dare.enabled and session.goes_online:
            source.pretrain(session.should_stop, session.save)
        for t in session.online(trainer.actor, explore):
            trainer.lambd = config.lambd_after(t + 1 - config.offline_iterations)
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
