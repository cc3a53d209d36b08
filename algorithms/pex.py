"""Policy expansion on IQL: the offline policy stays, and a new one learns beside it (PEX).

Paper: Zhang, Xu, Yu 2023, https://arxiv.org/abs/2302.00935. The variant is the one that the
authors' code at commit b0ae11e has and that DARE's Table 1 shows: offline it is IQL, to the bit
that of iql.py, whose checkpoints `load_model` takes. Online the offline policy is frozen and a new
one begins at random. An action is that of one of the two, drawn with the probabilities
softmax(eta Q); the new policy learns from such actions, weighted by their advantage. V and the
critics learn as in IQL, from the actions of the rows, half of them offline rows.

    python algorithms/pex.py --config configs/pex/hopper_medium.yaml

What differs from the authors' program, and why:
- States are normalized, as our IQL normalizes them, so that all methods of a table start from one
  offline model. `normalize: false` is the authors' choice.
- The offline policy's standard deviation is bounded below by exp(-20), as in iql.py, and its first
  weights are torch's. The new policy has the authors' bound, exp(-5), and their first weights.
- Evaluations have an environment of their own. The authors evaluate in the training environment,
  in the middle of an episode. The random choices of an evaluation begin with `eval_seed`, so they
  are the same in every evaluation, and training does not notice them.
- The online rows of a batch are drawn with replacement.
`eval_epsilon` 0 makes evaluations greedy. `clip_actions` bounds the new policy's actions to the
box; by default an action outside of it is stored as it was drawn, as the authors do, and only the
environment gets the part inside. The authors' other starts are runs of iql.py with `mixing_ratio:
0.5` and `online_warmup: 5000`, from the offline model ("direct") or from none ("buffer").

Shapes: B rows of a batch, S state dimension, A action dimension.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal
from torch.optim.lr_scheduler import CosineAnnealingLR

from corl import seeds
from corl.compiled import CompiledUpdate, begin_anew, complete, descend, soft_update
from corl.config import FinetuneConfig, arguments_of, main
from corl.finetune import TensorBatch

# The file whose offline phase this one shares.
BASELINE = "iql"
EXP_ADV_MAX = 100.0
LOG_STD_MIN = -20.0
LOG_STD_MIN_ONLINE = -5.0
LOG_STD_MAX = 2.0
COLUMNS = ["value_loss", "q_loss", "actor_loss", "new_policy", "q_gain"]
# Attributes of the trainer and keys of IQL's checkpoints.
CHECKPOINT_PARTS = (
    "qf",
    "q_optimizer",
    "vf",
    "v_optimizer",
    "actor",
    "actor_optimizer",
    "actor_lr_schedule",
)
# What there is beside IQL's.
EXPANSION = ("actor_online", "actor_online_optimizer")
# Normal noise (B, A) of the new policy and uniform numbers (B,) that choose between the two.
Draws = Tuple[torch.Tensor, torch.Tensor]


@dataclass
class TrainConfig(FinetuneConfig):
    """PEX's fields; those of every algorithm are in `FinetuneConfig`."""

    # Other defaults than the common ones
    online_warmup: int = 5000  # online steps before the first online update
    group: str = "PEX-D4RL"  # wandb group
    name: str = "PEX"  # first part of the run folder's name
    # IQL; normalize_reward: locomotion: returns span 1000; antmaze: reward - 1
    tau: float = 0.005  # target network update rate
    beta: float = 3.0  # inverse temperature of the advantage weights
    iql_tau: float = 0.7  # expectile of the value loss
    vf_lr: float = 3e-4  # value function learning rate
    qf_lr: float = 3e-4  # critic learning rate
    actor_lr: float = 3e-4  # learning rate of either policy
    # PEX
    mixing_ratio: float = 0.5  # offline share of an online batch
    inv_temperature: float = 10.0  # eta: of Q, in the choice between the two policies
    eval_epsilon: float = 0.1  # share of choices drawn in evaluations
    clip_actions: bool = False  # clip what the new policy draws to the box

    CHOICES: ClassVar[dict] = FinetuneConfig.CHOICES | {"sampling": ("uniform",)}
    RANGES: ClassVar[dict] = FinetuneConfig.RANGES | {
        "tau": "(0, 1]",
        "iql_tau": "(0, 1)",
        **dict.fromkeys(("beta", "inv_temperature"), "[0, inf)"),
        **dict.fromkeys(("vf_lr", "qf_lr", "actor_lr"), "(0, inf)"),
        "mixing_ratio": "(0, 1)",
        "eval_epsilon": "[0, 1]",
    }
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        "mixing_ratio",
        "inv_temperature",
        "eval_epsilon",
        "clip_actions",
    }
    QUICK_START: ClassVar[str] = "configs/pex/quick_start.yaml"

    def __post_init__(self):
        super().__post_init__()
        self.check_mixing_ratio()


def asymmetric_l2_loss(u: torch.Tensor, tau: float) -> torch.Tensor:
    """Expectile loss |tau - 1[u < 0]| u^2 of each residual, (B,) -> (B,); IQL Eq. 5."""
    below = (u < 0).to(u.dtype)
    return (tau - below).abs() * u.square()


class Squeeze(nn.Module):
    """(..., 1) -> (...)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(-1)


class MLP(nn.Module):
    """Linear layers of widths `dims` with ReLU in between, (..., dims[0]) -> (..., dims[-1]).

    `last` are the layers after them.
    """

    def __init__(self, dims: List[int], *last: nn.Module):
        super().__init__()
        layers: List[nn.Module] = []
        for n_in, n_out in zip(dims[:-1], dims[1:], strict=True):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1], *last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class GaussianPolicy(nn.Module):
    """Normal(tanh(mean(s)), std), states (B, S) -> a law of actions (B, A) in units of the box.

    The standard deviation does not depend on the state; samples are not squashed.
    """

    def __init__(
        self,
        state_dim: int,
        act_dim: int,
        max_action: float,
        log_std_min: float = LOG_STD_MIN,
        hidden_dim: int = 256,
    ):
        super().__init__()
        self.net = MLP([state_dim, hidden_dim, hidden_dim, act_dim], nn.Tanh())
        self.log_std = nn.Parameter(torch.zeros(act_dim))
        self.max_action, self.log_std_min = max_action, log_std_min

    def forward(self, obs: torch.Tensor) -> Normal:
        # Argument checks read tensors on the host; they change no number.
        return Normal(self.net(obs), self.std(), validate_args=False)

    def std(self) -> torch.Tensor:
        """The standard deviation (A,)."""
        return self.log_std.clamp(self.log_std_min, LOG_STD_MAX).exp()

    @torch.inference_mode()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Executable action (A,) for a state (S,): the mean, or in training mode a sample."""
        obs = torch.as_tensor(state, dtype=torch.float32, device=device)
        action = self.net(obs.unsqueeze(0))
        if self.training:
            action = torch.normal(action, self.std().expand_as(action))
        action = self.max_action * action
        return action.clamp(-self.max_action, self.max_action)[0].cpu().numpy()


def xavier(layer: nn.Module) -> None:
    """The first weights of the authors' policies: Xavier's uniform ones, and no bias."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


class TwinQ(nn.Module):
    """Two critics: states (B, S) and actions (B, A) -> min(Q1, Q2) (B,); `both` gives both."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int = 256):
        super().__init__()
        widths = [state_dim + action_dim, hidden_dim, hidden_dim, 1]
        self.q1, self.q2 = (MLP(widths, Squeeze()) for _ in range(2))

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

    def __init__(self, state_dim: int, hidden_dim: int = 256):
        super().__init__()
        self.v = MLP([state_dim, hidden_dim, hidden_dim, 1], Squeeze())

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.v(state)


class Composite(nn.Module):
    """The policy that acts online: one of two policies' actions, chosen by what Q says of them.

    The frozen policy proposes its mean, the new one a sample, and the new one is followed with
    the probability that softmax(eta Q) gives it. In evaluation mode the new policy proposes its
    mean, too, and the action with the larger Q is taken, but for a share `epsilon` of either.

    Args:
        offline, online: the two policies.
        critic: min(Q1, Q2) of it is compared.
        inv_temperature: eta.
        epsilon: share of an evaluation's proposals, and of its choices, that are drawn.
        clip: whether proposals are clipped to the box.
        eval_seed: of what is drawn in evaluation mode, which begins anew with every evaluation.
    """

    def __init__(
        self,
        offline: GaussianPolicy,
        online: GaussianPolicy,
        critic: TwinQ,
        inv_temperature: float = 10.0,
        epsilon: float = 0.1,
        clip: bool = False,
        eval_seed: int = 0,
    ):
        super().__init__()
        self.offline, self.online, self.critic = offline, online, critic
        self.inv_temperature, self.epsilon = inv_temperature, epsilon
        self.clip, self.eval_seed = clip, eval_seed
        self._coins = np.random.default_rng(eval_seed)

    def train(self, mode: bool = True) -> "Composite":
        """Switch to training or to evaluation mode; every evaluation draws the same numbers."""
        if not mode:
            self._coins = np.random.default_rng(self.eval_seed)
        return super().train(mode)

    def proposals(
        self, obs: torch.Tensor, noise: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Executable actions (B, A) of both policies; the new one's has normal noise (B, A)."""
        bound = self.offline.max_action
        mean = self.offline.net(obs)
        sample = self.online.net(obs) + self.online.std() * noise
        if self.clip:
            sample = sample.clamp(-1.0, 1.0)
        return bound * mean, bound * sample

    def gain(
        self, obs: torch.Tensor, offline: torch.Tensor, online: torch.Tensor
    ) -> torch.Tensor:
        """By how much Q of the new policy's action exceeds Q of the offline one's, (B,)."""
        return self.critic(obs, online) - self.critic(obs, offline)

    def probability(self, gain: torch.Tensor) -> torch.Tensor:
        """With which the new policy is followed, (B,): softmax(eta Q) of two."""
        return (self.inv_temperature * gain).sigmoid()

    @torch.inference_mode()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Action (A,) for a state (S,); without `clip` it may lie outside of the box."""
        obs = torch.as_tensor(state, dtype=torch.float32, device=device).unsqueeze(0)
        shape = (*obs.shape[:-1], len(self.online.log_std))
        if self.training:
            draws = torch.randn(shape, device=device), torch.rand(shape[:-1])
            greedy = torch.zeros(shape[:-1], dtype=torch.bool)
        else:
            draws, greedy = self._evaluation_draws(shape, device)
        first, second = self.proposals(obs, draws[0])
        gain = self.gain(obs, first, second).cpu()
        drawn = draws[1] < self.probability(gain)
        new = torch.where(greedy, gain > 0, drawn).unsqueeze(-1)
        return torch.where(new, second.cpu(), first.cpu())[0].numpy()

    def _evaluation_draws(
        self, shape: Tuple[int, ...], device: str
    ) -> Tuple[Draws, torch.Tensor]:
        """As training's, with noise 0 where the mean is proposed; and which choices are greedy."""
        proposed, chosen = self._coins.random((2, *shape[:-1])) < self.epsilon
        noise = self._coins.standard_normal(shape) * proposed[..., None]
        uniform = torch.from_numpy(self._coins.random(shape[:-1]))
        noise = torch.as_tensor(noise, dtype=torch.float32, device=device)
        return (noise, uniform), torch.from_numpy(~chosen)


class PolicyExpansion:
    """The networks of IQL and of its expansion, their losses and one update of each phase.

    The losses are functions of tensors and take no step; each returns one value per row.
    """

    def __init__(
        self,
        max_action: float,
        actor: GaussianPolicy,
        actor_optimizer: torch.optim.Optimizer,
        actor_online: GaussianPolicy,
        actor_online_optimizer: torch.optim.Optimizer,
        q_network: TwinQ,
        q_optimizer: torch.optim.Optimizer,
        v_network: ValueFunction,
        v_optimizer: torch.optim.Optimizer,
        iql_tau: float = 0.7,
        beta: float = 3.0,
        max_steps: int = 1000000,
        discount: float = 0.99,
        tau: float = 0.005,
        inv_temperature: float = 10.0,
        eval_epsilon: float = 0.1,
        clip_actions: bool = False,
        eval_seed: int = 0,
        device: str = "cpu",
    ):
        self.actor, self.qf, self.vf = actor, q_network, v_network
        self.q_target = copy.deepcopy(q_network).to(device).requires_grad_(False)
        self.actor_online = actor_online
        self.composite = Composite(
            actor,
            actor_online,
            q_network,
            inv_temperature,
            eval_epsilon,
            clip_actions,
            eval_seed,
        )
        self.actor_optimizer = actor_optimizer
        self.actor_online_optimizer = actor_online_optimizer
        self.q_optimizer, self.v_optimizer = q_optimizer, v_optimizer
        self.actor_lr_schedule = CosineAnnealingLR(actor_optimizer, max(1, max_steps))
        self.max_action, self.device = max_action, device
        self.beta, self.iql_tau = beta, iql_tau
        self.discount, self.tau = discount, tau
        self.total_it = 0

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [
            self.q_optimizer,
            self.v_optimizer,
            self.actor_optimizer,
            self.actor_online_optimizer,
        ]

    def start_online(self) -> None:
        """Adam begins anew for V and the critics; the new policy's has made no step yet."""
        begin_anew(self.q_optimizer, self.v_optimizer)

    def value_losses(self, adv: torch.Tensor) -> torch.Tensor:
        """Expectile regression of V towards Q, (B,); adv (B,) is Q - V."""
        return asymmetric_l2_loss(adv, self.iql_tau)

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
        policy: GaussianPolicy,
        observations: torch.Tensor,
        actions: torch.Tensor,
        adv: torch.Tensor,
    ) -> torch.Tensor:
        """Advantage-weighted regression of a policy, (B,); adv (B,) without gradient."""
        bc_losses = -policy(observations).log_prob(actions).sum(-1)
        exp_adv = (self.beta * adv).exp().clamp(max=EXP_ADV_MAX)
        return exp_adv * bc_losses

    def _noise(self, actions: torch.Tensor) -> Draws:
        """The random numbers of one online update, from the global stream."""
        return torch.randn_like(actions), torch.rand_like(actions[..., 0])

    def train(self, batch: TensorBatch, online: bool = False) -> Dict[str, torch.Tensor]:
        """One update on a batch, of IQL or online of the expansion; returns 0-d tensors."""
        self.total_it += 1
        log_dict = self._update(batch, self._noise(batch[1]) if online else None)
        if not online:
            self.actor_lr_schedule.step()
        return log_dict

    def _update(
        self, batch: TensorBatch, draws: Optional[Draws]
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps. V learns first, then Q, then a policy.

        Without draws it is IQL's update.
        """
        observations, actions, rewards, next_observations, dones = batch
        with torch.no_grad():
            next_v = self.vf(next_observations)
            target_q = self.q_target(observations, actions)
        adv = target_q - self.vf(observations)
        v_loss = self.value_losses(adv).mean(-1)
        descend(v_loss, self.v_optimizer)
        q1_losses, q2_losses = self.q_losses(
            observations, actions, rewards, dones, next_v
        )
        q_loss = (q1_losses.mean(-1) + q2_losses.mean(-1)) / 2
        descend(q_loss, self.q_optimizer)
        soft_update(self.q_target, self.qf, self.tau)
        log_dict = {"value_loss": v_loss.detach(), "q_loss": q_loss.detach()}
        if draws is None:
            rest = observations, actions, adv.detach()
            policy_loss = self.policy_losses(self.actor, *rest).mean(-1)
            descend(policy_loss, self.actor_optimizer)
        else:
            policy_loss, found = self._expansion_loss(observations, *draws)
            descend(policy_loss, self.actor_online_optimizer)
            log_dict.update(found)
        return {**log_dict, "actor_loss": policy_loss.detach()}

    def _expansion_loss(
        self, observations: torch.Tensor, noise: torch.Tensor, uniform: torch.Tensor
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """The new policy's loss (), from actions of the composite policy; and metrics."""
        with torch.no_grad():
            first, second = self.composite.proposals(observations, noise)
            gain = self.composite.gain(observations, first, second)
            probability = self.composite.probability(gain)
            new = (uniform < probability).unsqueeze(-1)
            actions = torch.where(new, second, first)
            # Of the networks as they are after their steps.
            adv = self.q_target(observations, actions) - self.vf(observations)
        # In units of the box, as the policy has them.
        rest = observations, actions / self.max_action, adv
        loss = self.policy_losses(self.actor_online, *rest).mean(-1)
        return loss, {"new_policy": probability.mean(-1), "q_gain": gain.mean(-1)}

    def state_dict(self) -> Dict[str, Any]:
        """IQL's keys with its target network, and the new policy with its optimizer."""
        parts = [*CHECKPOINT_PARTS, "q_target", *EXPANSION]
        return {
            **{part: getattr(self, part).state_dict() for part in parts},
            "total_it": self.total_it,
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.load_weights(state_dict)

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from a `state_dict`, or from a checkpoint of IQL: then the new policy stays."""
        for part in CHECKPOINT_PARTS:
            getattr(self, part).load_state_dict(state_dict[part])
        # CORL's checkpoints have no target network; it restarts as a copy.
        self.q_target.load_state_dict(state_dict.get("q_target", state_dict["qf"]))
        for part in EXPANSION:
            if part in state_dict:
                getattr(self, part).load_state_dict(state_dict[part])
        self.total_it = state_dict["total_it"]


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> PolicyExpansion:
    """The trainer of a config, on the device."""
    # The order of construction is that of iql.py; the new policy comes last.
    q_network = TwinQ(state_dim, action_dim).to(device)
    v_network = ValueFunction(state_dim).to(device)
    sizes = state_dim, action_dim, max_action
    actor = GaussianPolicy(*sizes).to(device)
    actor_online = GaussianPolicy(*sizes, LOG_STD_MIN_ONLINE).apply(xavier).to(device)

    def adam(network: nn.Module, rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=rate)

    trainer = PolicyExpansion(
        **arguments_of(PolicyExpansion, config, device=device),
        max_action=max_action,
        actor=actor,
        actor_optimizer=adam(actor, config.actor_lr),
        actor_online=actor_online,
        actor_online_optimizer=adam(actor_online, config.actor_lr),
        q_network=q_network,
        q_optimizer=adam(q_network, config.qf_lr),
        v_network=v_network,
        v_optimizer=adam(v_network, config.vf_lr),
        max_steps=config.offline_iterations,
    )
    # It may make no step for long, and its state is in every checkpoint.
    complete(trainer.actor_online_optimizer)
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


def step(
    trainer: PolicyExpansion, source: Any, config: TrainConfig, online: bool
) -> Dict[str, Any]:
    """One update of a phase on a fresh batch of the source; returns its metrics."""
    return trainer.train(source.sample(config.batch_size), online)


@seeds.each
def train(config: TrainConfig) -> Dict[str, Any]:
    """The whole run; returns what the run folder's summary.json says."""
    with seeds.session(config, __file__, COLUMNS) as session:
        trainer = session.build(make_trainer)
        session.keep("trainer", trainer, loads=CHECKPOINT_PARTS)
        session.start(
            offline=lambda: step(trainer, session.offline_buffer, config, False),
            online=lambda: step(trainer, session.mixed, config, True),
        )
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, session.offline_buffer, config, False))
        session.switch(trainer.start_online)
        for _ in session.online(trainer.composite):
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, session.mixed, config, True)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
