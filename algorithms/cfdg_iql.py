"""Implicit Q-Learning, offline then online (CORL's finetune IQL on today's stack).

CFDG: the same with Classifier-Free Diffusion Generation, Huang et al. 2025,
https://arxiv.org/abs/2508.06806. Every 10 000 online steps one diffusion model learns offline and
online rows, with their labels, and then generates rows of both labels by classifier-free guidance.
A third of a batch is then generated (a fifth of it offline-like), a third offline, a third online.

There is no public code. The paper says the shares and the loop; the guidance weight, the dropout of
labels, the denoiser, its training and how often it is refreshed are readings, all fields of the
block `cfdg:`. Nothing here was compared with the authors' numbers or code.

    python algorithms/cfdg_iql.py --config configs/cfdg_iql/hopper_medium.yaml

Controls: `--cfdg.guidance 0` (labels alone), `--cfdg.models unconditional` (two models without
labels), `--cfdg.synthetic_ratio 0` (no generated row: `iql.py` at `mixing_ratio` 0.5, bit for bit).

This file is `iql.py` plus lines. docs/cfdg.md has the equations, the metrics, and what is a
reading. What follows is the header of the baseline.

Paper: Kostrikov et al. 2021, https://arxiv.org/abs/2110.06169. Names, config fields, order of
updates, checkpoint keys and numbers are those of CORL's `algorithms/finetune/iql.py` at commit
6afec90; one update on the same weights and batch gives the same parameters.

    python algorithms/iql.py --config configs/iql/hopper_medium.yaml

What differs from upstream, and why (`compat: true` brings the upstream behaviour back):
- The cosine schedule of the actor's learning rate ends with the offline phase; online the rate
  is constant. Upstream goes on stepping it, so it restarts at 0 online and climbs.
- The range of returns behind `normalize_reward` is that of the file's whole episodes. Upstream
  walks over the rows that are left when D4RL has dropped those of time-outs, so that long
  episodes drift against each other.
- Evaluation episodes are seeded with `eval_seed`. Upstream overwrites it with `seed`.
- A dataset that exactly fills the buffer can be fine-tuned. Upstream's write pointer is then
  out of range.
- Regret is computed from evaluation episodes. Upstream computes it from training episodes.
Without a switch: `mixing_ratio` adds a second form with two buffers (offline rows first, then
online rows; the default is upstream's single buffer); checkpoints also hold the target network;
`train` returns tensors, so that an update never waits for the device.

Shapes: B rows of a batch, S state dimension, A action dimension.
"""

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Dict, List, Optional, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal
from torch.optim.lr_scheduler import CosineAnnealingLR

from corl import finetune, seeds
from corl.compiled import CompiledUpdate, descend, soft_update
from corl.config import FinetuneConfig, arguments_of, main

# CORL's names, for those who import them from here.
from corl.finetune import (  # noqa: F401
    JoinedBuffer,
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
from transition_diffusion.config import CFDG_LOGS, MEANS, CfdgConfig
from transition_diffusion.labelled import LABELS, LabelledGeneration

BASELINE = "iql"
EXP_ADV_MAX = 100.0
LOG_STD_MIN = -20.0
LOG_STD_MAX = 2.0
COLUMNS = ["value_loss", "q_loss", "actor_loss"]
COLUMNS += CFDG_LOGS
# Attributes of the trainer and keys of CORL's checkpoints.
CHECKPOINT_PARTS = (
    "qf",
    "q_optimizer",
    "vf",
    "v_optimizer",
    "actor",
    "actor_optimizer",
    "actor_lr_schedule",
)


@dataclass
class TrainConfig(FinetuneConfig):
    """IQL's fields; those of every algorithm are in `FinetuneConfig`."""

    # Other defaults than the common ones
    env: str = "antmaze-umaze-v2"  # D4RL task name
    eval_freq: int = 50000  # updates between two evaluations
    n_episodes: int = 100  # episodes per evaluation
    group: str = "IQL-D4RL"  # wandb group
    name: str = "CFDG-IQL"  # first part of the run folder's name
    # IQL; normalize_reward: locomotion: returns span 1000; antmaze: reward - 1
    actor_dropout: float = 0.0  # dropout in the actor's hidden layers
    tau: float = 0.005  # target network update rate
    beta: float = 3.0  # inverse temperature of the advantage weights
    iql_tau: float = 0.7  # expectile of the value loss
    expl_noise: float = 0.03  # exploration noise of the deterministic policy
    noise_clip: float = 0.5  # bound on that noise
    iql_deterministic: bool = False  # deterministic instead of Gaussian policy
    vf_lr: float = 3e-4  # value function learning rate
    qf_lr: float = 3e-4  # critic learning rate
    actor_lr: float = 3e-4  # actor learning rate
    # Not in CORL
    mixing_ratio: Optional[float] = None  # offline share of a batch; none: one buffer
    policy_std: Optional[float] = None  # of the policy's density; none: expl_noise
    actor_lr_online: Optional[float] = None  # constant actor rate online; none: actor_lr
    # CFDG; mixing_ratio is of the rows that are not generated, 0.5 where it is left out
    cfdg: CfdgConfig = dataclasses.field(default_factory=CfdgConfig)

    RANGES: ClassVar[dict] = FinetuneConfig.RANGES | {
        "actor_dropout": "[0, 1)",
        "tau": "(0, 1]",
        "beta": "[0, inf)",
        "iql_tau": "(0, 1)",
        **dict.fromkeys(("expl_noise", "noise_clip"), "[0, inf)"),
        "policy_std": "(0, inf)",
        **dict.fromkeys(("vf_lr", "qf_lr", "actor_lr", "actor_lr_online"), "(0, inf)"),
        "mixing_ratio": "[0, 1)",
    }
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        "mixing_ratio",
        "cfdg",
        "actor_lr_online",
        "expl_noise",
        "noise_clip",
        "policy_std",
    }
    QUICK_START: ClassVar[str] = "configs/cfdg_iql/quick_start.yaml"
    CAVEAT: ClassVar[str] = (
        "reading: guidance, denoiser and refreshes of CFDG are not public, so they are ours"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.mixing_ratio is None:
            self.mixing_ratio = 0.5
        if self.iql_deterministic:
            self.density_std()
        if self.mixing_ratio is not None:
            self.check_mixing_ratio("; leave it out for a single buffer")

    def check_mixing_ratio(self, or_else: str = "") -> None:
        """Any share will do: the offline part of the rows that are not generated is rounded."""


def asymmetric_l2_loss(u: torch.Tensor, tau: float) -> torch.Tensor:
    """Expectile loss |tau - 1[u < 0]| u^2 of each residual, (B,) -> (B,); IQL Eq. 5."""
    below = (u < 0).to(u.dtype)
    return (tau - below).abs() * u.square()


class Squeeze(nn.Module):
    """(..., 1) -> (...)"""

    def __init__(self, dim=-1):
        super().__init__()
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(self.dim)


class MLP(nn.Module):
    """Linear layers of widths `dims` with an activation and dropout in between.

    (..., dims[0]) -> (..., dims[-1]), or (...) with `squeeze_output`.
    """

    def __init__(
        self,
        dims: List[int],
        activation_fn=nn.ReLU,
        output_activation_fn=None,
        squeeze_output: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if len(dims) < 2:
            raise ValueError(f"an MLP needs at least an input and an output, not {dims}")
        if squeeze_output and dims[-1] != 1:
            raise ValueError(
                f"only an output of width 1 can be squeezed, not {dims[-1]}"
            )
        layers: List[nn.Module] = []
        *hidden, last = zip(dims[:-1], dims[1:], strict=True)
        for n_in, n_out in hidden:
            layers += [nn.Linear(n_in, n_out), activation_fn()]
            if dropout > 0.0:
                layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(*last))
        if output_activation_fn is not None:
            layers.append(output_activation_fn())
        if squeeze_output:
            layers.append(Squeeze())
        self.net = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Policy(nn.Module):
    """What both policies share: tanh(MLP(s)), states (B, S) -> (B, A), and acting."""

    def __init__(
        self,
        state_dim: int,
        act_dim: int,
        max_action: float,
        hidden_dim: int = 256,
        n_hidden: int = 2,
        dropout: float = 0.0,
    ):
        super().__init__()
        widths = [state_dim] + n_hidden * [hidden_dim] + [act_dim]
        self.net = MLP(widths, output_activation_fn=nn.Tanh, dropout=dropout)
        self.max_action = max_action

    def choose(self, obs: torch.Tensor) -> torch.Tensor:
        """Actions (B, A) in [-1, 1] for states (B, S)."""
        raise NotImplementedError

    @torch.inference_mode()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Executable action (A,) for a state (S,); training mode explores."""
        obs = torch.as_tensor(state, dtype=torch.float32, device=device)
        action = self.max_action * self.choose(obs.unsqueeze(0))
        return action.clamp(-self.max_action, self.max_action)[0].cpu().numpy()


class GaussianPolicy(Policy):
    """Normal(tanh(mean(s)), std), states (B, S) -> a law of actions (B, A).

    The standard deviation does not depend on the state; samples are not squashed.
    """

    def __init__(self, state_dim: int, act_dim: int, *args, **kwargs):
        super().__init__(state_dim, act_dim, *args, **kwargs)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs: torch.Tensor) -> Normal:
        # Argument checks read tensors on the host; they change no number.
        return Normal(self.net(obs), self.std(), validate_args=False)

    def std(self) -> torch.Tensor:
        """The standard deviation (A,)."""
        return self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()

    def choose(self, obs: torch.Tensor) -> torch.Tensor:
        mean = self.net(obs)
        if not self.training:
            return mean
        # What `Normal.sample` draws, without making the law.
        return torch.normal(mean, self.std().expand_as(mean))


class DeterministicPolicy(Policy):
    """tanh(MLP(s)), states (B, S) -> actions (B, A)."""

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.net(obs)

    choose = forward


class TwinQ(nn.Module):
    """Two critics: states (B, S) and actions (B, A) -> min(Q1, Q2) (B,); `both` gives both."""

    def __init__(
        self, state_dim: int, action_dim: int, hidden_dim: int = 256, n_hidden: int = 2
    ):
        super().__init__()
        widths = [state_dim + action_dim] + n_hidden * [hidden_dim] + [1]
        self.q1, self.q2 = (MLP(widths, squeeze_output=True) for _ in range(2))

    def both(
        self, state: torch.Tensor, action: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat((state, action), dim=-1)
        return self.q1(x), self.q2(x)

    def forward(self, state: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        q1, q2 = self.both(state, action)
        return torch.minimum(q1, q2)


class ValueFunction(nn.Module):
    """V: states (B, S) -> (B,)."""

    def __init__(self, state_dim: int, hidden_dim: int = 256, n_hidden: int = 2):
        super().__init__()
        widths = [state_dim] + n_hidden * [hidden_dim] + [1]
        self.v = MLP(widths, squeeze_output=True)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.v(state)


class ImplicitQLearning:
    """IQL's networks, their losses and one update of all of them.

    The losses are functions of tensors and take no step; each returns one value per row.
    """

    def __init__(
        self,
        max_action: float,
        actor: nn.Module,
        actor_optimizer: torch.optim.Optimizer,
        q_network: nn.Module,
        q_optimizer: torch.optim.Optimizer,
        v_network: nn.Module,
        v_optimizer: torch.optim.Optimizer,
        iql_tau: float = 0.7,
        beta: float = 3.0,
        max_steps: int = 1000000,
        discount: float = 0.99,
        tau: float = 0.005,
        device: str = "cpu",
    ):
        self.actor, self.qf, self.vf = actor, q_network, v_network
        self.q_target = copy.deepcopy(q_network).to(device).requires_grad_(False)
        self.actor_optimizer = actor_optimizer
        self.q_optimizer, self.v_optimizer = q_optimizer, v_optimizer
        self.actor_lr_schedule = CosineAnnealingLR(actor_optimizer, max(1, max_steps))
        self.max_action, self.device = max_action, device
        self.beta, self.iql_tau = beta, iql_tau
        self.discount, self.tau = discount, tau
        self.total_it = 0
        self.anneal = True  # step the actor's schedule; see `start_online`

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [self.q_optimizer, self.v_optimizer, self.actor_optimizer]

    def start_online(self, actor_lr: Optional[float] = None) -> None:
        """End the cosine schedule: online the actor's rate is constant, by default the first."""
        self.anneal = False
        for group in self.actor_optimizer.param_groups:
            group["lr"] = actor_lr or group["initial_lr"]

    def value_losses(
        self,
        adv: torch.Tensor,
    ) -> torch.Tensor:
        """Expectile regression of V towards Q, (B,); adv (B,) is Q - V."""
        expectile = self.iql_tau
        return asymmetric_l2_loss(adv, expectile)

    def q_losses(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        next_v: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Squared TD errors of both critics, each (B,); next_v (B,)."""
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        y = rewards + (1.0 - dones) * self.discount * next_v
        q1, q2 = self.qf.both(observations, actions)
        return (
            F.mse_loss(q1, y, reduction="none"),
            F.mse_loss(q2, y, reduction="none"),
        )

    def policy_losses(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        adv: torch.Tensor,
    ) -> torch.Tensor:
        """Advantage-weighted regression, (B,); adv (B,) without gradient."""
        policy_out: Union[Normal, torch.Tensor] = self.actor(observations)
        if isinstance(policy_out, Normal):
            bc_losses = -policy_out.log_prob(actions).sum(-1)
        else:
            bc_losses = (policy_out - actions).square().sum(-1)
        exp_adv = (self.beta * adv).exp().clamp(max=EXP_ADV_MAX)
        losses = exp_adv * bc_losses
        return losses

    def train(
        self,
        batch: TensorBatch,
    ) -> Dict[str, torch.Tensor]:
        """One update on a batch; returns 0-d tensors."""
        self.total_it += 1
        log_dict = self._update(
            batch,
        )
        if self.anneal:
            self.actor_lr_schedule.step()
        return log_dict

    def _update(
        self,
        batch: TensorBatch,
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps. V learns first, then Q, then the policy."""
        observations, actions, rewards, next_observations, dones = batch
        with torch.no_grad():
            next_v = self.vf(next_observations)
            target_q = self.q_target(observations, actions)
        adv = target_q - self.vf(observations)
        v_loss = self.value_losses(
            adv,
        ).mean(-1)
        descend(v_loss, self.v_optimizer)
        q1_losses, q2_losses = self.q_losses(
            observations, actions, rewards, dones, next_v
        )
        q_loss = (q1_losses.mean(-1) + q2_losses.mean(-1)) / 2
        descend(q_loss, self.q_optimizer)
        soft_update(self.q_target, self.qf, self.tau)
        policy_loss = self.policy_losses(
            observations,
            actions,
            adv.detach(),
        ).mean(-1)
        descend(policy_loss, self.actor_optimizer)
        return {
            "value_loss": v_loss.detach(),
            "q_loss": q_loss.detach(),
            "actor_loss": policy_loss.detach(),
        }

    def state_dict(self) -> Dict[str, Any]:
        """CORL's keys, and what CORL loses: the target network, the state of the schedule."""
        return {
            **{part: getattr(self, part).state_dict() for part in CHECKPOINT_PARTS},
            "total_it": self.total_it,
            "q_target": self.q_target.state_dict(),
            "anneal": self.anneal,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)
        self.anneal = state_dict.get("anneal", True)

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from the networks and optimizers of a `state_dict` or a CORL checkpoint."""
        for part in CHECKPOINT_PARTS:
            getattr(self, part).load_state_dict(state_dict[part])
        # Upstream's checkpoints have no target network; it restarts as a copy.
        self.q_target.load_state_dict(state_dict.get("q_target", state_dict["qf"]))
        self.total_it = state_dict["total_it"]


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> ImplicitQLearning:
    """The trainer of a config, on the device."""
    # The order of construction is the order of upstream's random draws.
    q_network = TwinQ(state_dim, action_dim).to(device)
    v_network = ValueFunction(state_dim).to(device)
    policy = DeterministicPolicy if config.iql_deterministic else GaussianPolicy
    actor = policy(state_dim, action_dim, max_action, dropout=config.actor_dropout).to(
        device
    )
    trainer = ImplicitQLearning(
        **arguments_of(ImplicitQLearning, config, device=device),
        max_action=max_action,
        actor=actor,
        actor_optimizer=torch.optim.Adam(actor.parameters(), lr=config.actor_lr),
        q_network=q_network,
        q_optimizer=torch.optim.Adam(q_network.parameters(), lr=config.qf_lr),
        v_network=v_network,
        v_optimizer=torch.optim.Adam(v_network.parameters(), lr=config.vf_lr),
        max_steps=config.offline_iterations,
    )
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


def policy_fit(trainer: ImplicitQLearning, config: TrainConfig) -> Fit:
    """How well rows fit the policy, for `sampling: on_policy`."""

    def fit(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        policy = trainer.actor(states)
        if isinstance(policy, Normal):
            return standard_log_prob(actions, policy.mean, policy.stddev)
        std = config.density_std() * trainer.max_action
        return standard_log_prob(actions, policy * trainer.max_action, std)

    return fit


def make_generation(session: Any, config: TrainConfig) -> LabelledGeneration:
    """What generates rows for this run; the host saves it and lets it work between steps."""
    cfdg, parts = config.cfdg, zip(LABELS.values(), config.cfdg.counts(), strict=True)
    rows = [
        session.keep(
            f"generated_{label}",
            finetune.new_buffer(config, session.task, session.device, count),
        )
        for label, count in parts
    ]
    real = session.offline_buffer, session.online_buffer
    generation = LabelledGeneration(
        cfdg,
        replay=JoinedBuffer(*real),
        real=real,
        generated=rows,
        mixed=session.mixed,
        synthetic=MixedBuffer(*rows, cfdg.offline_share),
        sizes=session.sizes,
        seed=config.seed,
        device=session.device,
    )
    session.between(session.keep("generation", generation))
    session.show((), MEANS)
    return generation


def step(trainer: ImplicitQLearning, source: Any, config: TrainConfig) -> Dict[str, Any]:
    """One update on a fresh batch of the source; returns its metrics."""
    return trainer.train(source.sample(config.batch_size))


@seeds.each
def train(config: TrainConfig) -> Dict[str, Any]:
    """The whole run; returns what the run folder's summary.json says."""
    with seeds.session(config, __file__, COLUMNS) as session:
        trainer = session.build(make_trainer)
        session.keep("trainer", trainer, loads=CHECKPOINT_PARTS)
        session.weigh_rows(trainer.actor, policy_fit(trainer, config))
        source = session.mixed
        generation = make_generation(session, config)

        explore = partial(
            finetune.add_noise,
            max_action=trainer.max_action,
            scale=config.expl_noise,
            clip=config.noise_clip,
        )

        session.start(
            offline=lambda: step(trainer, session.offline_buffer, config),
            online=lambda: step(trainer, source, config),
        )
        source = generation
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, session.offline_buffer, config))
        # Upstream goes on stepping the schedule.
        if not config.compat:
            session.switch(lambda: trainer.start_online(config.actor_lr_online))
        noise = explore if config.iql_deterministic else None
        for _ in session.online(trainer.actor, noise):
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config)
            losses.update(generation.log)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
