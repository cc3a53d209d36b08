"""ReBRAC, offline then online (CORL's JAX script in PyTorch).

DARE-ReBRAC: the same with Dynamic Alignment for RElease, https://arxiv.org/abs/2511.03828. Online,
the weight of a row multiplies its penalties (docs/rebrac.md, `make diff ALGO=rebrac`).

    python algorithms/dare_rebrac.py --config configs/rebrac/hopper_medium.yaml

Paper: Tarasov et al. 2023, https://arxiv.org/abs/2305.09836. TD3 with two penalties, |pi(s) - a|^2
in the policy's loss and |a' - a'_data|^2 in the target of the critics, each with a coefficient.
Networks, losses and order of updates are those of CORL's `algorithms/offline/rebrac.py` at commit
6afec90; the online phase is that of corl-team/CORL's `algorithms/finetune/rebrac.py` at eeeeef2.
One update on the same weights, batch and noise differs from upstream's by float32 rounding.

    python algorithms/rebrac.py --config configs/rebrac/hopper_medium.yaml

What differs from upstream, and why:
- Fields have this repository's names; upstream's are other spellings (`ALIASES`), so its finetune
  YAML files are read unchanged. `mixing_ratio` is the offline share of a batch (upstream: the
  online share; its files say 0.5). Without it there is one buffer; upstream always has two.
- Upstream's options `use_calibration` and `reset_opts`, which no file of its sets, are refused.
- A policy update is one of every `policy_freq` updates from the first; upstream counts environment
  steps, which is the same while each has one update.
- Random numbers are torch's and numpy's, so whole runs differ from upstream's.
`compat: true` changes the buffer alone (see `ReplayBuffer`). A row of metrics.csv between two
updates of the policy has no loss of the policy.

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
from corl.config import AUTO, FinetuneConfig, arguments_of, main

# CORL's names, for those who import them from here.
from corl.finetune import (  # noqa: F401
    MixedBuffer,
    ReplayBuffer,
    RewardRule,
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

BASELINE = "rebrac"
COLUMNS = ["critic_loss", "q_min", "actor_loss", "bc_mse_policy"]
COLUMNS += ["actor_bc_coef", "critic_bc_coef"]
COLUMNS += LOGS
# Attributes of the trainer and keys of its checkpoints.
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
# flax's; torch's default is 1e-5.
LAYER_NORM_EPS = 1e-6
# What `normalize_reward` multiplies antmaze's rewards by.
REWARD_SCALE = 100.0


def scale_rewards(dataset: Dict, *unused: Any) -> Dict:
    """Multiply `dataset["rewards"]` (N,) by REWARD_SCALE, in place."""
    dataset["rewards"] *= REWARD_SCALE
    return {}


def scale_reward_online(reward: float, env_name: str) -> float:
    """The same for one reward."""
    return reward * REWARD_SCALE


@dataclass
class TrainConfig(FinetuneConfig):
    """ReBRAC's fields; those of every algorithm are in `FinetuneConfig`."""

    # Other defaults than the common ones
    env: str = "halfcheetah-medium-v2"  # D4RL task name
    eval_seed: int = 42  # seeds the evaluation episodes
    normalize: bool = False  # normalize states with the dataset's mean and std
    group: str = "rebrac-finetune"  # wandb group
    name: str = "DARE-ReBRAC"  # first part of the run folder's name
    # Networks
    hidden_dim: int = 256  # width of hidden layers
    actor_n_hiddens: int = 3  # hidden layers of the policy
    critic_n_hiddens: int = 3  # hidden layers of each critic
    actor_ln: bool = False  # LayerNorm in the policy
    critic_ln: bool = True  # LayerNorm in the critics
    # TD3; normalize_reward: antmaze: reward times 100
    actor_lr: float = 3e-4  # actor learning rate
    qf_lr: float = 3e-4  # critics learning rate
    tau: float = 0.005  # target network update rate
    policy_noise: float = 0.2  # std of the noise on target actions
    noise_clip: float = 0.5  # bound on that noise
    policy_freq: int = 2  # updates of the critics per update of the policy
    expl_noise: float = 0.0  # std of the exploration noise online, of the largest action
    # ReBRAC
    actor_bc_coef: float = 1.0  # weight of the policy's penalty
    critic_bc_coef: float = 1.0  # weight of the target's penalty
    normalize_q: bool = True  # divide Q by mean |Q| in the policy's loss
    bc_end: float = 0.5  # anneal: the least share of the policy's penalty
    use_calibration: bool = False  # upstream's option; only false
    reset_opts: bool = False  # upstream's option; only false
    # Not in CORL
    mixing_ratio: Optional[float] = None  # offline share of a batch; none: one buffer
    policy_std: Optional[float] = None  # of the policy's density; none: expl_noise
    bc_online: str = "auto"  # the policy's penalty online: keep, drop, anneal (upstream)
    critic_bc_online: str = "drop"  # the target's penalty online: keep, drop (upstream)
    # anneal: online steps until the share would be 0; none: online_iterations
    bc_anneal_steps: Optional[int] = None
    dare: NoisyDareConfig = dataclasses.field(default_factory=NoisyDareConfig)

    RANGES: ClassVar[dict] = FinetuneConfig.RANGES | {
        **dict.fromkeys(("expl_noise", "policy_noise", "noise_clip"), "[0, inf)"),
        **dict.fromkeys(("actor_bc_coef", "critic_bc_coef"), "[0, inf)"),
        **dict.fromkeys(("actor_lr", "qf_lr"), "(0, inf)"),
        **dict.fromkeys(("actor_n_hiddens", "critic_n_hiddens"), "[1, 100]"),
        "hidden_dim": "[1, 1e5]",
        "tau": "(0, 1]",
        "policy_freq": "[1, 1e9]",
        "mixing_ratio": "[0, 1)",
        "policy_std": "(0, inf)",
        "bc_end": "[0, 1]",
        "bc_anneal_steps": "[1, 1e9]",
    }
    CHOICES: ClassVar[dict] = FinetuneConfig.CHOICES | {
        "bc_online": (AUTO, "keep", "drop", "anneal"),
        "critic_bc_online": ("keep", "drop"),
    }
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        "mixing_ratio",
        "policy_std",
        "expl_noise",
        "bc_online",
        "critic_bc_online",
        "bc_end",
        "bc_anneal_steps",
        "dare",
    }
    ALIASES: ClassVar[Dict[str, str]] = {
        "dataset_name": "env",
        "train_seed": "seed",
        "eval_every": "eval_freq",
        "eval_episodes": "n_episodes",
        "num_offline_updates": "offline_iterations",
        "num_online_updates": "online_iterations",
        "num_warmup_steps": "online_warmup",
        "replay_buffer_size": "buffer_size",
        "normalize_states": "normalize",
        "gamma": "discount",
        "actor_learning_rate": "actor_lr",
        "critic_learning_rate": "qf_lr",
        "min_decay_coef": "bc_end",
    }
    COMPAT_EVAL_SEED: ClassVar[str] = "eval_seed"
    REWARDS: ClassVar[RewardRule] = RewardRule(scale_rewards, scale_reward_online)
    NEXT_ACTIONS: ClassVar[bool] = True  # rows carry the action after them
    QUICK_START: ClassVar[str] = "configs/rebrac/quick_start.yaml"
    PRESETS: ClassVar[dict] = PRESETS

    def __post_init__(self):
        super().__post_init__()
        if self.dare.enabled:
            self.bc_online = self.dare.only_release("bc_online", self.bc_online)
            self.dare.density_std(self.density_std())
            self.mixing_ratio = 0.5 if self.mixing_ratio is None else self.mixing_ratio
        if self.bc_online == AUTO:
            self.bc_online = "anneal"
        self.density_std()
        if self.mixing_ratio is not None:
            self.check_mixing_ratio("; leave it out for a single buffer")
        if self.normalize_reward and not self.env.startswith("antmaze"):
            raise ValueError(
                "normalize_reward is ReBRAC's rule for antmaze, reward times 100, and env is "
                f"{self.env}; set normalize_reward to false"
            )
        for field in ("use_calibration", "reset_opts"):
            if getattr(self, field):
                raise ValueError(f"{field} is not in this file; set {field} to false")

    def bc_coefs(self, steps: int) -> Tuple[float, float]:
        """Weights of the policy's and the target's penalty after so many online steps."""
        share = float(self.bc_online == "keep")
        if self.bc_online == "anneal":
            # Upstream's schedule begins with the updates.
            since = max(steps - self.online_warmup, 0)
            length = self.bc_anneal_steps or max(self.online_iterations, 1)
            share = max(self.bc_end, 1.0 - since / length)
        kept = float(self.critic_bc_online == "keep")
        return self.actor_bc_coef * share, self.critic_bc_coef * kept


def relu_network(
    n_in: int,
    n_out: int,
    hidden_dim: int,
    n_hiddens: int,
    layernorm: bool,
    last_bound: float,
) -> List[nn.Module]:
    """Layers (..., n_in) -> (..., n_out), hidden ones Linear, ReLU and perhaps LayerNorm.

    Hidden weights start as torch's own, uniform within 1 / sqrt(fan-in), hidden biases at 0.1,
    the last layer uniform within `last_bound`.
    """
    layers: List[nn.Module] = []
    for width in [n_in, *[hidden_dim] * (n_hiddens - 1)]:
        layers += [nn.Linear(width, hidden_dim), nn.ReLU()]
        nn.init.constant_(layers[-2].bias, 0.1)
        if layernorm:
            layers.append(nn.LayerNorm(hidden_dim, eps=LAYER_NORM_EPS))
    layers.append(nn.Linear(hidden_dim, n_out))
    for parameter in layers[-1].parameters():
        nn.init.uniform_(parameter, -last_bound, last_bound)
    return layers


class Actor(nn.Module):
    """states (B, S) -> actions (B, A) in [-max_action, max_action]."""

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        hidden_dim: int = 256,
        n_hiddens: int = 3,
        layernorm: bool = False,
    ):
        super().__init__()
        shape = hidden_dim, n_hiddens, layernorm
        layers = relu_network(state_dim, action_dim, *shape, last_bound=1e-3)
        self.net = nn.Sequential(*layers, nn.Tanh())
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

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        hidden_dim: int = 256,
        n_hiddens: int = 3,
        layernorm: bool = True,
    ):
        super().__init__()
        shape = hidden_dim, n_hiddens, layernorm
        layers = relu_network(state_dim + action_dim, 1, *shape, last_bound=3e-3)
        self.net = nn.Sequential(*layers)

    def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat((state, action), dim=-1)).squeeze(-1)


class ReBRAC:
    """ReBRAC's networks, their losses and one update of all of them.

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
        actor_bc_coef: float = 1.0,
        critic_bc_coef: float = 1.0,
        normalize_q: bool = True,
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
        self.discount, self.tau, self.normalize_q = discount, tau, normalize_q
        self.policy_noise, self.noise_clip = policy_noise, noise_clip
        self.policy_freq = policy_freq
        self.policy_std = policy_std
        # The online loop changes them.
        self.actor_bc_coef, self.critic_bc_coef = actor_bc_coef, critic_bc_coef
        self.total_it = 0

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
        next_actions: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        noise: torch.Tensor,
        critic_bc_coef: torch.Tensor,
        release: Optional[Release] = None,
    ) -> torch.Tensor:
        """r + discount (min(Q1, Q2)(s', a') - coef |a' - next action of the row|^2), (B,).

        a' is pi(s') plus clipped noise, from normal noise (B, A).
        """
        noise = (noise * self.policy_noise).clamp(-self.noise_clip, self.noise_clip)
        policy_out = self.actor_target(next_observations) + noise
        policy_out = policy_out.clamp(-self.max_action, self.max_action)
        bc_losses = F.mse_loss(policy_out, next_actions, reduction="none").sum(-1)
        if release is not None:
            bc_losses = release.weight * bc_losses
        next_q = self.target_q(next_observations, policy_out)
        next_q = next_q - critic_bc_coef * bc_losses
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        return rewards + (1.0 - dones) * self.discount * next_q

    def q_losses(
        self, observations: torch.Tensor, actions: torch.Tensor, y: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Squared TD errors of both critics, and min(Q1, Q2), each (B,); TD target y (B,)."""
        q1, q2 = (
            self.critic_1(observations, actions),
            self.critic_2(observations, actions),
        )
        q1_losses, q2_losses = (F.mse_loss(q, y, reduction="none") for q in (q1, q2))
        return q1_losses, q2_losses, torch.minimum(q1, q2)

    def policy_losses(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        release: Optional[Release] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """-min(Q1, Q2)(s, pi(s)), and |pi(s) - a|^2 to the action of the row, each (B,)."""
        policy_out = self.actor(observations)
        q1, q2 = (q(observations, policy_out) for q in (self.critic_1, self.critic_2))
        bc_losses = F.mse_loss(policy_out, actions, reduction="none").sum(-1)
        if release is not None:
            bc_losses = release.keep(bc_losses[: release.kept])
        return -torch.minimum(q1, q2), bc_losses

    def _noise(self, actions: torch.Tensor) -> torch.Tensor:
        """The random numbers of one update, normal, (B, A), from the global stream."""
        return torch.randn_like(actions)

    def train(
        self,
        batch: TensorBatch,
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """One update on a batch; returns 0-d tensors."""
        update_policy = self.total_it % self.policy_freq == 0
        self.total_it += 1
        return self._update(
            batch,
            self._noise(batch[1]),
            # Tensors: numbers would be compiled in.
            batch[1].new_full((), self.actor_bc_coef),
            batch[1].new_full((), self.critic_bc_coef),
            update_policy,
            release,
        )

    def _update(
        self,
        batch: TensorBatch,
        noise: torch.Tensor,
        actor_bc_coef: torch.Tensor,
        critic_bc_coef: torch.Tensor,
        update_policy: bool,
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps. Policy and targets follow the new critics."""
        observations, actions, rewards, next_observations, dones, next_actions = batch
        y = self.td_target(
            next_observations,
            next_actions,
            rewards,
            dones,
            noise,
            critic_bc_coef,
            release,
        )
        q1_losses, q2_losses, q_min = self.q_losses(observations, actions, y)
        critic_loss = q1_losses.mean(-1) + q2_losses.mean(-1)
        descend(critic_loss, self.critic_1_optimizer, self.critic_2_optimizer)
        log_dict = {
            "critic_loss": critic_loss.detach(),
            "q_min": q_min.detach().mean(-1),
            "actor_bc_coef": actor_bc_coef,
            "critic_bc_coef": critic_bc_coef,
        }
        if update_policy:
            q_losses, bc_losses = self.policy_losses(
                observations,
                actions,
                release,
            )
            log_dict["bc_mse_policy"] = bc_losses.detach().mean(-1)
            q_loss = q_losses.mean(-1)
            if self.normalize_q:
                q_loss = q_loss / q_losses.detach().abs().mean(-1)
            actor_loss = q_loss + actor_bc_coef * bc_losses.mean(-1)
            # The policy's target follows the policy of before its step, as upstream.
            for name in WITH_TARGET:
                target, source = getattr(self, f"{name}_target"), getattr(self, name)
                soft_update(target, source, self.tau)
            descend(actor_loss, self.actor_optimizer)
            log_dict["actor_loss"] = actor_loss.detach()
            if release is not None:
                log_dict["conservative_loss"] = release.average(bc_losses)
        return log_dict

    def state_dict(self) -> Dict[str, Any]:
        """Networks, optimizers and target networks."""
        parts = [*CHECKPOINT_PARTS, *(f"{name}_target" for name in WITH_TARGET)]
        return {
            **{part: getattr(self, part).state_dict() for part in parts},
            "total_it": self.total_it,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from the networks and optimizers of a `state_dict`."""
        for part in CHECKPOINT_PARTS:
            getattr(self, part).load_state_dict(state_dict[part])
        for name in WITH_TARGET:
            # Targets that a checkpoint lacks restart as copies.
            target = state_dict.get(f"{name}_target", state_dict[name])
            getattr(self, f"{name}_target").load_state_dict(target)
        self.total_it = state_dict["total_it"]


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> ReBRAC:
    """The trainer of a config, on the device."""
    shape = config.hidden_dim, config.actor_n_hiddens, config.actor_ln
    actor = Actor(state_dim, action_dim, max_action, *shape).to(device)
    shape = config.hidden_dim, config.critic_n_hiddens, config.critic_ln
    critic_1, critic_2 = (
        Critic(state_dim, action_dim, *shape).to(device) for _ in range(2)
    )
    trainer = ReBRAC(
        **arguments_of(
            ReBRAC,
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


def policy_fit(trainer: ReBRAC, config: TrainConfig) -> Fit:
    """How well rows fit the policy with its noise, for `sampling: on_policy`."""
    actor, std = trainer.actor, config.density_std() * trainer.max_action
    return lambda states, actions: standard_log_prob(actions, actor(states), std)


def hook_arguments(trainer: ReBRAC) -> Dict[str, Any]:
    """What the hook needs of the trainer: the log-density of its policy, and its Q."""
    log_prob = noisy_log_prob(trainer.actor, trainer.policy_std, trainer.max_action)
    target_q = trainer.target_q
    return {"policy_log_prob": log_prob, "clipped_policy": True, "q_function": target_q}


def step(trainer: ReBRAC, source: Any, config: TrainConfig) -> Dict[str, Any]:
    """One update on a fresh batch of the source; returns its metrics."""
    if isinstance(source, DareHook):
        drawn = source.sample(config.batch_size)
        release = drawn.release.whole() if config.dare.alike else drawn.release
        losses = trainer.train(drawn.batch, release)
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
            span, parts = session.return_span, hook_arguments(trainer)
            scale = REWARD_SCALE if config.normalize_reward else 1.0
            parts["q_scale"] = lambda: energy_q_scale(config.env, span(), scale)
            source = session.make(
                "hook",
                lambda config: prepare(config.dare, **session.facts(config), **parts),
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
        for t in session.online(trainer.actor, explore if config.expl_noise else None):
            coefs = config.bc_coefs(t - config.offline_iterations)
            # One weight of all rows is a factor, as in the schedule of the baseline.
            coefs = [source.weight * c if config.dare.enabled else c for c in coefs]
            trainer.actor_bc_coef, trainer.critic_bc_coef = coefs
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
