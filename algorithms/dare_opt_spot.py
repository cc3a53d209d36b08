"""SPOT+OPT: SPOT offline, then new critics that are pre-trained online (OPT).

DARE-SPOT+OPT: the same with Dynamic Alignment for RElease, https://arxiv.org/abs/2511.03828.
Online, the weight of a row multiplies the negative ELBO of pi(s) at its state. Each half of a batch
is drawn by the priorities of its own buffer (docs/opt.md, `make diff ALGO=opt_spot`).

    python algorithms/dare_opt_spot.py --config configs/opt_spot/antmaze_umaze.yaml

Paper: Shin et al. 2025, https://arxiv.org/abs/2507.08387. Offline it is `algorithms/spot.py` with
one latent sample of the VAE and no dropout, to the bit; `load_model` takes its checkpoints. Online
the frozen policy collects first, for `online_warmup` steps. Then a second pair of critics, Q_on,
learns from both buffers by a loss that looks through an inner step:
L_off(psi) + c L_on(psi - alpha grad L_off(psi)). From then on both pairs learn from the same rows,
and the policy maximizes Q / mean |Q| - lambd (negative ELBO of pi(s) given s) with
Q = (1 - kappa) Q_off + kappa Q_on, the first critic of each. kappa changes with the online steps,
lambd is cooled. Rows are drawn by priorities that a network of densities gives them.

    python algorithms/opt_spot.py --config configs/opt_spot/antmaze_umaze.yaml

The authors' code was not at hand. The formulas are the paper's; the order of an update, c, and
what neither says are those of a third party's port (docs/opt.md lists them all), so no number here
was compared with theirs. `weigh_outer: false` has c = 1, as the paper writes it. What differs:
- The port gives the newest 1 000 000 rows a priority, so on a dataset of that size every online
  row pushes an offline row out of the replay, and larger ones do not fit. Here all rows have one;
  `priority_capacity: 1000000` is the port's.
- The pre-training comes between two online steps, on `online_warmup` rows.
- lambd falls with environment steps, from the switch on, as in spot.py. The port counts updates.
With `kappa_start` and `kappa_end` 0 and `replay: uniform` critics and policy are those of SPOT.

Shapes: B rows of a batch, S state dimension, A action dimension, L latent dimension, n samples of
the VAE per row, here 1.
"""

import copy
import dataclasses
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
from corl_dare.config import LOGS, MEANS, PANELS, PRESETS, UNDEFINED, NoisyDareConfig
from corl_dare.hook import DareHook, Release, energy_q_scale, noisy_log_prob, prepare
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
BASELINE = "opt_spot"
COLUMNS = ["critic_loss", "actor_loss", "neg_log_beta_mean", "neg_log_beta_max", "lambd"]
COLUMNS += ["online_critic_loss", "kappa", *REPLAY_COLUMNS]
COLUMNS += LOGS
# Attributes of the trainer and keys of SPOT's checkpoints.
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
# Normal noise (B, A) of the target of Q_on, and kappa ().
Online = Tuple[torch.Tensor, torch.Tensor]


@dataclass
class TrainConfig(OptFields, FinetuneConfig):
    """SPOT's fields; OPT's are in `OptFields`, those of every algorithm in `FinetuneConfig`."""

    # Other defaults than the common ones
    env: str = "antmaze-umaze-v2"  # D4RL task name
    online_iterations: int = 300000  # environment steps of fine-tuning, with the warm-up
    online_warmup: int = 25000  # online steps that the frozen policy collects in
    normalize: bool = False  # normalize states with the dataset's mean and std
    normalize_reward: bool = True  # locomotion: returns span 1000; antmaze: reward - 1
    group: str = "OPT_SPOT-D4RL"  # wandb group
    name: str = "DARE-OPT_SPOT"  # first part of the run folder's name
    # OPT
    kappa_start: float = 0.1  # share of the online critics when the warm-up is over
    kappa_steps: int = 100000  # online steps, with those of the warm-up, until kappa_end
    # TD3
    actor_lr: float = 1e-4  # actor learning rate
    qf_lr: float = 3e-4  # learning rate of all critics
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
    critic_init_w: Optional[float] = None  # the same of all critics
    lambd: float = 1.0  # weight of the support constraint
    lambd_cool: Optional[bool] = None  # lower lambd online; none: yes
    lambd_end: float = 0.2  # the least share of lambd
    lambd_cool_steps: Optional[int] = None  # online steps until 0; none: all
    online_discount: float = 0.995  # discount factor online
    # DARE
    mixing_ratio: float = 0.5  # offline share of a batch
    dare: NoisyDareConfig = dataclasses.field(default_factory=NoisyDareConfig)

    RANGES: ClassVar[dict] = (
        FinetuneConfig.RANGES
        | OptFields.RANGES
        | {
            **dict.fromkeys(("expl_noise", "policy_noise", "noise_clip"), "[0, inf)"),
            "tau": "(0, 1]",
            "policy_freq": "[1, 1e9]",
            **dict.fromkeys(("actor_lr", "qf_lr", "vae_lr"), "(0, inf)"),
            **dict.fromkeys(("vae_hidden_dim", "vae_latent_dim"), "[1, 1e5]"),
            "beta": "(0, inf)",
            "vae_iterations": "[0, 1e9]",
            **dict.fromkeys(("actor_init_w", "critic_init_w"), "(0, inf)"),
            "lambd": "[0, inf)",
            "lambd_end": "[0, 1]",
            "lambd_cool_steps": "[1, 1e9]",
            "online_discount": "[0, 1]",
            "mixing_ratio": "[0, 1)",
        }
    )
    CHOICES: ClassVar[dict] = FinetuneConfig.CHOICES | OptFields.CHOICES
    ONLINE: ClassVar[frozenset] = (
        FinetuneConfig.ONLINE
        | OptFields.ONLINE
        | {
            "expl_noise",
            "lambd_cool",
            "lambd_end",
            "lambd_cool_steps",
            "online_discount",
            "mixing_ratio",
            "dare",
        }
    )
    ALIASES: ClassVar[Dict[str, str]] = {"critic_lr": "qf_lr"}
    PRESETS: ClassVar[dict] = PRESETS
    QUICK_START: ClassVar[str] = "configs/opt_spot/quick_start.yaml"

    def __post_init__(self):
        super().__post_init__()
        if self.dare.enabled:
            self.check_dare()
            self.lambd_cool = False
        if self.lambd_cool is None:
            self.lambd_cool = True
        self.check_opt()

    def check_dare(self) -> None:
        """Raises ValueError where DARE and other fields do not go together."""
        if self.lambd_cool:
            raise ValueError(
                "lambd_cool true and dare would both release; leave lambd_cool out"
            )
        capacity, steps = self.priority_capacity, self.online_iterations
        if self.replay == "balanced" and capacity is not None and capacity <= steps:
            raise ValueError(
                f"priority_capacity {capacity} drops all rows of the dataset within "
                f"online_iterations {steps}, and dare needs some; leave it out, or set it higher"
            )
        self.dare.density_std(self.expl_noise)
        self.check_mixing_ratio()

    def vae_updates(self) -> int:
        """Updates of the VAE before the offline phase; the one of `load_model` stays."""
        return 0 if self.load_model else self.vae_iterations

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
    ):
        super().__init__()
        # The order of construction is the order of upstream's random draws.
        head = uniform_(nn.Linear(256, action_dim), init_w)
        self.net = nn.Sequential(*relu_layers(state_dim, 256, head), nn.Tanh())
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

    def __init__(self, state_dim: int, action_dim: int, init_w: Optional[float] = None):
        super().__init__()
        head = uniform_(nn.Linear(256, 1), init_w)
        self.net = nn.Sequential(*relu_layers(state_dim + action_dim, 256, head))

    def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat((state, action), dim=-1)).squeeze(-1)


class OPT_SPOT(OnlineCritics):
    """The networks of SPOT and the online critics, their losses and one update of each phase.

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
        vae: nn.Module,
        vae_optimizer: torch.optim.Optimizer,
        draws: Draws,
        discount: float = 0.99,
        tau: float = 0.005,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_freq: int = 2,
        beta: float = 0.5,
        lambd: float = 1.0,
        inner_lr: float = 3e-4,
        weigh_outer: bool = True,
        policy_std: float = 0.1,
        device: str = "cpu",
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
        online = online_critics, online_critics_optimizer, draws, inner_lr, weigh_outer
        self.add_online_critics(*online, tau, descend, soft_update)
        self.max_action, self.device = max_action, device
        self.discount, self.tau = discount, tau
        self.policy_noise, self.noise_clip = policy_noise, noise_clip
        self.policy_freq, self.beta = policy_freq, beta
        # Updates of the VAE count, too, as upstream; those of the pre-training do not.
        self.total_it = 0
        self.lambd = lambd  # weight of the support constraint; the online loop sets it
        self.kappa = 0.0  # share of the online critics; the online loop sets it
        # That share on the device, for the hook; each update sets it.
        self.share = torch.zeros((), device=device)
        self.policy_std = policy_std

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [
            self.critic_1_optimizer,
            self.critic_2_optimizer,
            self.actor_optimizer,
            self.online_critics_optimizer,
        ]

    def start_online(self, discount: float) -> None:
        """The discount changes, and Adam begins anew for the offline critics and the policy."""
        self.discount = discount
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

    def vae_losses(
        self, observations: torch.Tensor, actions: torch.Tensor, noise: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Error of the reconstruction and KL divergence, each (B,); normal noise (B, n, L)."""
        mean, std = self.vae.encode(observations, actions)
        z = mean.unsqueeze(1) + std.unsqueeze(1) * noise
        decoded = self.vae.decode(observations, z)
        errors = (decoded - actions.unsqueeze(1)).square().mean((1, 2))
        return errors, -0.5 * (1 + std.pow(2).log() - mean.pow(2) - std.pow(2)).mean(-1)

    def policy_losses(
        self,
        observations: torch.Tensor,
        noise: torch.Tensor,
        kappa: Optional[torch.Tensor] = None,
        release: Optional[Release] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """-Q(s, pi(s)), and the negative ELBO of pi(s), each (B,); normal noise (B, n, L).

        Q is Q_off, or with kappa () the mix (1 - kappa) Q_off + kappa Q_on. The ELBO is up to a
        factor and a constant.
        """
        policy_out = self.actor(observations)
        q = self.critic_1(observations, policy_out)
        if kappa is not None:
            online = self.online_critics(observations, policy_out)[0]
            q = (1.0 - kappa) * q + kappa * online
        if release is not None:
            rows = (x[: release.kept] for x in (observations, policy_out, noise))
            errors, divergences = self.vae_losses(*rows)
            return -q, release.keep(errors + self.beta * divergences)
        errors, divergences = self.vae_losses(observations, policy_out, noise)
        return -q, errors + self.beta * divergences

    def _noise(
        self, actions: torch.Tensor, update_policy: bool
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The random numbers of SPOT's update, normal, (B, A) and (B, n, L), global stream."""
        noise, latent_noise = torch.randn_like(actions), None
        if update_policy:
            # Upstream's layout in memory, which the order of the draws follows.
            shape = 1, len(actions), self.vae.latent_dim
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
        online: bool = False,
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """One update on a batch, of SPOT or online of OPT; returns 0-d tensors."""
        self.total_it += 1
        actions = batch[1]
        # Tensors: numbers would be compiled in.
        numbers = [actions.new_full((), x) for x in (self.lambd, self.discount)]
        given: Optional[Online] = None
        if online:
            kappa = actions.new_full((), self.kappa)
            given = self.draws.normal(actions.shape), kappa
            self.share.copy_(kappa)
        return self._update(
            batch,
            *self._noise(actions, self.total_it % self.policy_freq == 0),
            *numbers,
            given,
            release,
        )

    def _update(
        self,
        batch: TensorBatch,
        noise: torch.Tensor,
        latent_noise: Optional[torch.Tensor],
        lambd: torch.Tensor,
        discount: torch.Tensor,
        online: Optional[Online],
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps. Policy and targets follow the new critics.

        Without `latent_noise` they stay. Without `online` it is SPOT's update.
        """
        observations, actions, rewards, next_observations, dones = batch
        rest = next_observations, rewards, dones
        y = self.td_target(self.target_q, *rest, noise, discount)
        q1_losses, q2_losses = self.q_losses(observations, actions, y)
        critic_loss = q1_losses.mean(-1) + q2_losses.mean(-1)
        descend(critic_loss, self.critic_1_optimizer, self.critic_2_optimizer)
        log_dict = {"critic_loss": critic_loss.detach(), "lambd": lambd}
        followers, kappa = [*WITH_TARGET], None
        if online is not None:
            online_noise, kappa = online
            y = self.td_target(self.online_target_q, *rest, online_noise, discount)
            online_loss = self.online_q_losses(observations, actions, y).mean(-1)
            descend(online_loss, self.online_critics_optimizer)
            log_dict["online_critic_loss"] = online_loss.detach()
            log_dict["kappa"] = kappa
            followers.append("online_critics")
        if latent_noise is not None:
            q_losses, support_losses = self.policy_losses(
                observations,
                latent_noise,
                kappa,
                release,
            )
            log_dict.update(self._update_policy(q_losses, support_losses, lambd))
            if release is not None:
                log_dict["conservative_loss"] = release.average(support_losses)
            for name in followers:
                target, source = getattr(self, f"{name}_target"), getattr(self, name)
                soft_update(target, source, self.tau)
        return log_dict

    def _update_policy(
        self,
        q_losses: torch.Tensor,
        support_losses: torch.Tensor,
        lambd: torch.Tensor,
    ) -> Dict[str, torch.Tensor]:
        """One step of the policy; its metrics."""
        support = support_losses.mean(-1)
        scale = 1.0 / q_losses.detach().abs().mean(-1)
        actor_loss = scale * q_losses.mean(-1) + lambd * support
        descend(actor_loss, self.actor_optimizer)
        return {
            "actor_loss": actor_loss.detach(),
            "neg_log_beta_mean": support.detach(),
            "neg_log_beta_max": support_losses.detach().amax(-1),
        }

    def state_dict(self) -> Dict[str, Any]:
        """SPOT's keys with its target networks, the online critics and their random stream."""
        targets = [f"{name}_target" for name in WITH_TARGET]
        parts = [*CHECKPOINT_PARTS, *targets, *ONLINE_PARTS, "draws"]
        return {
            **{part: getattr(self, part).state_dict() for part in parts},
            "total_it": self.total_it,
            "discount": self.discount,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)
        self.draws.load_state_dict(state_dict["draws"])
        self.discount = state_dict["discount"]

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from a `state_dict`, or from SPOT's: then the online critics stay."""
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


def make_networks(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> List[nn.Module]:
    """VAE, policy, both offline critics and the pair of online critics, on the device."""
    sizes = state_dim, action_dim
    latent_dim, width = config.vae_latent_dim, config.vae_hidden_dim
    # The order of construction is that of spot.py; the online critics have their own stream.
    vae = VAE(*sizes, latent_dim, max_action, width)
    actor = Actor(*sizes, max_action, config.actor_init_w)
    critics = [Critic(*sizes, config.critic_init_w) for _ in range(2)]
    with own_stream(config.seed):
        pair = Pair(*(Critic(*sizes, config.critic_init_w) for _ in range(2)))
    return [network.to(device) for network in (vae, actor, *critics, pair)]


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> OPT_SPOT:
    """The trainer of a config, on the device."""
    sizes = state_dim, action_dim, max_action
    vae, actor, critic_1, critic_2, pair = make_networks(config, *sizes, device)

    def adam(network: nn.Module, rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=rate)

    trainer = OPT_SPOT(
        **arguments_of(
            OPT_SPOT,
            config,
            device=device,
            policy_noise=config.policy_noise * max_action,
            noise_clip=config.noise_clip * max_action,
            policy_std=config.dare.density_std(config.expl_noise) * max_action,
        ),
        max_action=max_action,
        actor=actor,
        actor_optimizer=adam(actor, config.actor_lr),
        critic_1=critic_1,
        critic_1_optimizer=adam(critic_1, config.qf_lr),
        critic_2=critic_2,
        critic_2_optimizer=adam(critic_2, config.qf_lr),
        online_critics=pair,
        online_critics_optimizer=adam(pair, config.qf_lr),
        vae=vae,
        vae_optimizer=adam(vae, config.vae_lr),
        draws=Draws(config.seed, device),
    )
    # It may make no step for long, and its state is in every checkpoint.
    complete(trainer.online_critics_optimizer)
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
        alone = [trainer.online_critics_optimizer]
        trainer._pretrain = CompiledUpdate(trainer._pretrain, alone)
        trainer._vae_update = CompiledUpdate(
            trainer._vae_update, [trainer.vae_optimizer]
        )
    return trainer


def hook_arguments(trainer: OPT_SPOT) -> Dict[str, Any]:
    """What the hook needs of the trainer: the log-density of its policy, and its Q."""

    def target_q(observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        pairs = trainer.target_q, trainer.online_target_q
        offline, online = (q(observations, actions) for q in pairs)
        return (1.0 - trainer.share) * offline + trainer.share * online

    log_prob = noisy_log_prob(trainer.actor, trainer.policy_std, trainer.max_action)
    return {"policy_log_prob": log_prob, "clipped_policy": True, "q_function": target_q}


def make_hook(
    session: Any, trainer: OPT_SPOT, replay: Replay, config: TrainConfig
) -> DareHook:
    """The hook, which draws both halves of a batch by the priorities of the replay.

    Raises:
        ValueError: it keeps actions by row numbers, which would be read from a GPU.
    """
    if replay.balanced and config.dare.needs_rows and session.device != "cpu":
        raise ValueError(
            "replay balanced draws row numbers on the GPU, where guided and cached references "
            "(dare.guidance_scale, dare.reference_max_age) cannot use them; set replay to "
            "uniform, dare.score to policy_ratio as --preset cpu does, or device to cpu"
        )
    offline, online = replay.halves()
    return prepare(
        config.dare,
        **{**session.facts(config), "offline": offline, "online": online},
        **hook_arguments(trainer),
        q_scale=lambda: energy_q_scale(config.env, session.return_span()),
    )


def step(
    trainer: OPT_SPOT, source: Any, config: TrainConfig, online: bool
) -> Dict[str, Any]:
    """One update of a phase on a fresh batch of the source; returns its metrics."""
    if isinstance(source, DareHook):
        drawn = source.sample(config.batch_size)
        losses = trainer.train(drawn.batch, online, drawn.release)
        return {**losses, **drawn.log, **source.update_energy(drawn)}
    return trainer.train(source.sample(config.batch_size), online)


@seeds.each
def train(config: TrainConfig) -> Dict[str, Any]:
    """The whole run; returns what the run folder's summary.json says."""
    with seeds.session(config, __file__, COLUMNS) as session:
        trainer = session.build(make_trainer)
        session.keep("trainer", trainer, loads=CHECKPOINT_PARTS)
        buffers = session.offline_buffer, session.online_buffer
        replay = Replay(
            config,
            *buffers,
            finetune.JoinedBuffer(*buffers),
            session.sizes[:2],
            trainer.draws,
            descend,
            CompiledUpdate if config.compile is True else None,
        )
        source = session.keep("replay", replay)
        pretraining = OnlinePretraining(config, trainer, *buffers)
        session.between(session.keep("pretraining", pretraining))
        if config.dare.enabled:
            session.show(PANELS, MEANS, UNDEFINED)
            source = session.make("hook", partial(make_hook, session, trainer, replay))

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
            offline=lambda: step(trainer, session.offline_buffer, config, False),
            online=lambda: step(trainer, source, config, True),
            period=config.policy_freq,
            pretraining=vae,
            other=lambda hook, config: step(trainer, hook, config, True),
        )
        session.pretrain(vae)
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, session.offline_buffer, config, False))
        session.switch(lambda: trainer.start_online(config.online_discount))
        if config.dare.enabled and session.goes_online:
            source.pretrain(session.should_stop, session.save)
        for t in session.online(trainer.actor, explore):
            steps = t - config.offline_iterations
            trainer.lambd = config.lambd_after(steps + 1)
            # The first update has kappa_start.
            trainer.kappa, replay.written = config.kappa_after(steps), steps + 1
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config, True)
            session.log({**losses, **replay.log})
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
