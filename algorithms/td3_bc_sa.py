"""TD3+BC(SA): TD3+BC whose behavior cloning term has a learned weight for each state.

Paper: Luo, Xie, Wang and Huang 2025 (SSAR), https://arxiv.org/abs/2505.19923. Base:
`algorithms/td3_bc.py`. The policy maximizes Q1(s, pi(s)) / mean |Q1| - beta(s) |pi(s) - a|^2. The
coefficient beta(s) falls where the data's action lies within n deviations of the policy's and
rises where it lies outside (Eq. 5 and 12); n rises meanwhile (Eq. 8). Only trusted rows teach it,
and only they have the cloning term (Eq. 14). Online beta is kept and annealed (Eq. 15).

    python algorithms/td3_bc_sa.py --config configs/td3_bc_sa/hopper_medium.yaml

The numbers of an update are those of the public code (QinwenLuo/SSAR at 7e6dc0b); `--preset paper`
sets what the paper has otherwise. docs/ssar.md lists every difference from both. Those without a
switch: the annealing does not go below 0, a buffer never wraps over the rows that it starts with,
targets and threshold are part of checkpoints, and a check of the threshold on a batch without a
trusted row changes nothing.

Shapes: B rows of a batch, S state dimension, A action dimension.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from adaptive_regularization.coefficient import (
    CoefficientNet,
    Threshold,
    coefficient_losses,
)
from adaptive_regularization.config import SelectiveFields
from adaptive_regularization.iql_filter import IQLFilter
from adaptive_regularization.trust import TrustedRows, split
from corl import finetune, seeds
from corl.buffers import upload
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

COLUMNS = [
    "critic_loss",
    "actor_loss",
    "decay",
    "trusted",
    *(f"beta_{name}" for name in ("loss", "min", "mean", "max")),
    *("gap", "outside", "n_away"),
]
# Attributes of the trainer and keys of its checkpoints: CORL's, then its own.
CHECKPOINT_PARTS = (
    "critic_1",
    "critic_1_optimizer",
    "critic_2",
    "critic_2_optimizer",
    "actor",
    "actor_optimizer",
    "beta",
    "beta_optimizer",
    "threshold",
)
# Networks that have a target network, `NAME_target`.
WITH_TARGET = ("critic_1", "critic_2", "actor")
BETA_MAX_NORM = 0.5  # longest gradient of the coefficient
LARGEST_ERROR = 1.0  # of a dimension of an action, squared, in the gap


@dataclass
class TrainConfig(SelectiveFields, FinetuneConfig):
    """TD3+BC's fields; SSAR's are in `SelectiveFields`, every algorithm's in `FinetuneConfig`."""

    # Other defaults than the common ones
    env: str = "halfcheetah-medium-expert-v2"  # D4RL task name
    online_iterations: int = 250000  # environment steps of fine-tuning
    online_warmup: int = 5000  # online steps before the first online update
    group: str = "TD3_BC_SA-D4RL"  # wandb group
    name: str = "TD3_BC_SA"  # first part of the run folder's name
    # TD3; normalize_reward: locomotion: returns span 1000; antmaze: reward - 1
    expl_noise: float = 0.0  # std of the exploration noise online, of the largest action
    tau: float = 0.005  # target network update rate
    policy_noise: float = 0.2  # std of the noise on target actions
    noise_clip: float = 0.5  # bound on that noise
    policy_freq: int = 2  # updates of the critics per update of the policy
    # TD3+BC
    # Weight of Q against behavior cloning; the coefficient starts at 1 / alpha
    alpha: float = 2.5
    # Not in CORL
    actor_lr: float = 3e-4  # actor learning rate
    qf_lr: float = 3e-4  # critics learning rate
    delta: float = 0.1  # std that the threshold counts in, of an action
    policy_freq_online: int = 2  # policy_freq of the online phase
    # TD3+BC(SA)
    beta_lr: float = 3e-8  # coefficient learning rate

    RANGES: ClassVar[dict] = (
        FinetuneConfig.RANGES
        | SelectiveFields.RANGES
        | {
            **dict.fromkeys(("expl_noise", "policy_noise", "noise_clip"), "[0, inf)"),
            "tau": "(0, 1]",
            **dict.fromkeys(("policy_freq", "policy_freq_online"), "[1, 1e9]"),
            **dict.fromkeys(("alpha", "delta"), "(0, inf)"),
            **dict.fromkeys(("actor_lr", "qf_lr"), "(0, inf)"),
        }
    )
    CHOICES: ClassVar[dict] = (
        FinetuneConfig.CHOICES | SelectiveFields.CHOICES | {"sampling": ("uniform",)}
    )
    ONLINE: ClassVar[frozenset] = (
        FinetuneConfig.ONLINE
        | SelectiveFields.ONLINE
        | {"expl_noise", "policy_freq_online"}
    )
    ALIASES: ClassVar[Dict[str, str]] = SelectiveFields.ALIASES | {
        "max_timesteps": "offline_iterations",
        "new_policy_freq": "policy_freq_online",
    }
    PRESETS: ClassVar[dict] = {"public_code": {}, "paper": SelectiveFields.PAPER}
    QUICK_START: ClassVar[str] = "configs/td3_bc_sa/quick_start.yaml"

    def __post_init__(self):
        super().__post_init__()
        self.check_selective()
        if self.mixing_ratio:
            self.check_mixing_ratio()


def relu_network(
    n_in: int, n_out: int, hidden_dim: int = 256, norm: bool = False
) -> List[nn.Module]:
    """Layers (..., n_in) -> (..., n_out), two hidden ones with ReLU, normalized before it."""
    layers: List[nn.Module] = []
    for width in (n_in, hidden_dim):
        layers += [nn.Linear(width, hidden_dim)]
        layers += [nn.LayerNorm(hidden_dim)] if norm else []
        layers += [nn.ReLU()]
    return [*layers, nn.Linear(hidden_dim, n_out)]


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
        self.net = nn.Sequential(*relu_network(state_dim + action_dim, 1, norm=True))

    def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat((state, action), dim=-1)).squeeze(-1)


class TD3_BC_SA:
    """TD3+BC(SA)'s networks, their losses and one update of all of them.

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
        beta: nn.Module,
        beta_optimizer: torch.optim.Optimizer,
        threshold: nn.Module,
        chosen_by: Optional[Any] = None,
        discount: float = 0.99,
        tau: float = 0.005,
        policy_noise: float = 0.2,
        noise_clip: float = 0.5,
        policy_freq: int = 2,
        delta: float = 0.1,
        trust_penalty: bool = True,
        n_period: int = 50000,
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
        self.max_action, self.device = max_action, device
        self.beta, self.beta_optimizer = beta, beta_optimizer
        self.threshold, self.chosen_by = threshold, chosen_by
        self.discount, self.tau, self.delta = discount, tau, delta
        self.policy_noise, self.noise_clip = policy_noise, noise_clip
        self.policy_freq = policy_freq
        self.trust_penalty, self.n_period = trust_penalty, n_period
        self.total_it = 0
        self.decay = 1.0  # factor on the coefficient; the online loop sets it
        self.learns_beta = True  # offline

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [
            self.critic_1_optimizer,
            self.critic_2_optimizer,
            self.actor_optimizer,
            self.beta_optimizer,
        ]

    def start_online(self, policy_freq: int) -> None:
        """The coefficient and the threshold stay as they are; the policy learns as often."""
        self.learns_beta, self.policy_freq = False, policy_freq

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
        policy_out: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """-Q1(s, pi(s)), and the distance of pi(s) to the action of the row, each (B,)."""
        q_losses = -self.critic_1(observations, policy_out)
        bc_losses = F.mse_loss(policy_out, actions, reduction="none").mean(-1)
        return q_losses, bc_losses

    def row_weights(
        self, beta: torch.Tensor, trust: torch.Tensor, decay: torch.Tensor
    ) -> torch.Tensor:
        """Weight of the cloning distance of each row, (B,).

        It is sg[beta(s)] times the trust of the row times the annealing. This is the one place
        where a weight of another method, such as DARE's `release.weight`, would multiply.
        """
        weights = beta.detach() * decay
        return weights * trust if self.trust_penalty else weights

    @torch.no_grad()
    def gaps(self, policy_out: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """How far the data's action lies inside the threshold, (B,): below 0 it is outside.

        n^2 delta^2 minus the squared error, each dimension's at most 1, of which the mean is taken
        as the public code does; Eq. 12 has the sum and no bound.
        """
        errors = (policy_out - actions).square().clamp(max=LARGEST_ERROR)
        return (self.threshold.n * self.delta).square() - errors.mean(-1)

    def _noise(self, actions: torch.Tensor) -> torch.Tensor:
        """The random numbers of one update, normal, (B, A), from the global stream."""
        return torch.randn_like(actions)

    def train(
        self,
        batch: TensorBatch,
    ) -> Dict[str, torch.Tensor]:
        """One update on a batch, whose last field may be trust; returns 0-d tensors."""
        self.total_it += 1
        batch, trust = split(batch)
        due = self.total_it % self.n_period == 0
        return self._update(
            batch,
            trust,
            self._noise(batch[1]),
            # Tensors: a number would be compiled in.
            batch[1].new_full((), self.decay),
            batch[1].new_full((), float(due)),
            self.total_it % self.policy_freq == 0,
            self.learns_beta,
        )

    def _update(
        self,
        batch: TensorBatch,
        trust: torch.Tensor,
        noise: torch.Tensor,
        decay: torch.Tensor,
        due: torch.Tensor,
        update_policy: bool,
        update_beta: bool,
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps. The policy follows the new critics.

        The coefficient follows the policy of before its step, then come the targets.
        """
        observations, actions, rewards, next_observations, dones = batch
        y = self.td_target(next_observations, rewards, dones, noise)
        q1_losses, q2_losses = self.q_losses(observations, actions, y)
        critic_loss = q1_losses.mean(-1) + q2_losses.mean(-1)
        descend(critic_loss, self.critic_1_optimizer, self.critic_2_optimizer)
        log_dict = {
            "critic_loss": critic_loss.detach(),
            "decay": decay,
            "trusted": trust.mean(),
        }
        if update_policy:
            policy_out, beta = self.actor(observations), self.beta(observations)
            weights = self.row_weights(beta, trust, decay)
            q_losses, bc_losses = self.policy_losses(observations, actions, policy_out)
            lmbda = 1.0 / q_losses.detach().abs().mean(-1)
            actor_loss = lmbda * q_losses.mean(-1) + (weights * bc_losses).mean(-1)
            descend(actor_loss, self.actor_optimizer)
            log_dict["actor_loss"] = actor_loss.detach()
            log_dict.update(beta_metrics(beta))
            if update_beta:
                gaps = self.gaps(policy_out, actions)
                self._update_beta(gaps, trust, beta, due, log_dict)
            for name in WITH_TARGET:
                target, source = getattr(self, f"{name}_target"), getattr(self, name)
                soft_update(target, source, self.tau)
        return log_dict

    def _update_beta(
        self,
        gaps: torch.Tensor,
        trust: torch.Tensor,
        beta: torch.Tensor,
        due: torch.Tensor,
        log_dict: Dict[str, torch.Tensor],
    ) -> None:
        """One step of the coefficient, and where it is due a check of the threshold."""
        beta_loss = coefficient_losses(gaps, trust, beta).mean(-1)
        self.threshold.check(gaps, trust, due)
        descend(beta_loss, self.beta_optimizer, max_norm=BETA_MAX_NORM)
        log_dict["beta_loss"] = beta_loss.detach()
        log_dict["gap"], log_dict["outside"] = gaps.mean(), (gaps < 0).float().mean()
        # A copy: the next check writes into it.
        log_dict["n_away"] = self.threshold.n.clone()

    def checkpoint_parts(self) -> Tuple[str, ...]:
        """What a checkpoint must hold to start from."""
        return CHECKPOINT_PARTS + ("chosen_by",) * (self.chosen_by is not None)

    def state_dict(self) -> Dict[str, Any]:
        """CORL's keys, what CORL loses (the target networks), and what SSAR adds."""
        targets = [f"{name}_target" for name in WITH_TARGET]
        parts = [*self.checkpoint_parts(), *targets]
        return {
            **{part: getattr(self, part).state_dict() for part in parts},
            "total_it": self.total_it,
            "learns_beta": self.learns_beta,
            "policy_freq": self.policy_freq,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)
        self.learns_beta = state_dict["learns_beta"]
        self.policy_freq = state_dict["policy_freq"]

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from the networks and optimizers of a `state_dict`."""
        for part in self.checkpoint_parts():
            getattr(self, part).load_state_dict(state_dict[part])
        for name in WITH_TARGET:
            # An export without target networks: they restart as copies.
            target = state_dict.get(f"{name}_target", state_dict[name])
            getattr(self, f"{name}_target").load_state_dict(target)
        self.total_it = state_dict["total_it"]


def beta_metrics(beta: torch.Tensor) -> Dict[str, torch.Tensor]:
    """The least, mean and largest of the coefficients (B,)."""
    found = beta.detach()
    return {"beta_min": found.min(), "beta_mean": found.mean(), "beta_max": found.max()}


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> TD3_BC_SA:
    """The trainer of a config, on the device."""
    actor = Actor(state_dim, action_dim, max_action).to(device)
    critic_1, critic_2 = (Critic(state_dim, action_dim).to(device) for _ in range(2))
    beta = CoefficientNet(state_dim, 1.0 / config.alpha).to(device)
    raises = config.raises(config.offline_iterations)
    chosen_by = make_filter(config, state_dim, action_dim, device)
    trainer = TD3_BC_SA(
        **arguments_of(
            TD3_BC_SA,
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
        beta=beta,
        beta_optimizer=torch.optim.Adam(beta.parameters(), lr=config.beta_lr),
        threshold=Threshold(config.n_start, config.n_end, raises).to(device),
        chosen_by=chosen_by,
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


def step(trainer: TD3_BC_SA, source: Any, config: TrainConfig) -> Dict[str, Any]:
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
        chosen_by = trainer.chosen_by
        pretraining = finetune.Pretraining(
            "IQL filter",
            # The filter of `load_model` is used as it is.
            config.filter_updates if chosen_by and not config.load_model else 0,
            lambda: chosen_by.train(session.offline_buffer.sample(config.batch_size)),
        )

        def explore(action: np.ndarray) -> np.ndarray:
            bounds = config.expl_noise, np.inf
            return finetune.add_noise(action, trainer.max_action, *bounds)

        session.start(
            offline=lambda: step(trainer, rows.offline, config),
            online=lambda: step(trainer, rows, config),
            period=config.policy_freq,
            pretraining=pretraining,
        )
        session.pretrain(pretraining)
        run = session.run
        rows.settle(None if run.step else chosen_by, run.print, run.warn)
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, rows.offline, config))

        def switch() -> None:
            trainer.start_online(config.policy_freq_online)
            rows.start_online()

        session.switch(switch)
        rows.flag_online()
        first = config.offline_iterations + config.online_warmup
        for t in session.online(trainer.actor, explore):
            trainer.decay = config.decay(t + 1 - first)
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, rows, config)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
