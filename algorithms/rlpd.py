"""Online learning with prior data: SAC from scratch on half offline, half online rows (RLPD).

Paper: Ball, Smith, Kostrikov, Levine 2023, https://arxiv.org/abs/2302.02948; the numbers are those
of the authors' code, ikostrikov/rlpd c90fd4b. There is no offline phase. Every environment step
brings `utd` updates of ten critics with layer normalization, each on a batch of its own of which
`mixing_ratio` are offline rows; the policy and the temperature learn once, on the last batch. A TD
target is the minimum of two target critics, which are drawn anew for every update; the policy
climbs the mean of all ten.

    python algorithms/rlpd.py --config configs/rlpd/hopper_medium.yaml

What differs from the authors' program, and why:
- A batch can have any offline share. Theirs interleaves the two halves and fails at others than
  0.5 (their issue 4).
- The dataset's actions are not clipped to 1 - 1e-5. No density of them is computed here.
- `random_steps` and `online_warmup` are two fields; theirs is one (`start_training`).
- Their `pretrain_steps` is `offline_iterations`, 0 as in the paper. Here the policy learns in every
  update of that phase.
Weight decay, dropout and the residual critic of their code are switched off in its RLPD settings,
and are left out.

Shapes: N critics, M of them in a TD target, B rows of a batch, S state dimension, A action
dimension.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Tuple

import torch

from corl import seeds
from corl.compiled import CompiledUpdate, complete, descend, soft_update
from corl.config import FinetuneConfig, arguments_of, main
from corl.ensembles import CriticEnsemble, Form, draw_members
from corl.finetune import TensorBatch
from corl.sac import PositiveScalar, SquashedGaussianPolicy, policy_fit

COLUMNS = ["critic_loss", "q", "target_q", "actor_loss", "log_pi"]
COLUMNS += ["temperature", "temperature_loss"]
# Attributes of the trainer and keys of its checkpoints.
CHECKPOINT_PARTS = (
    *("critics", "target_critics", "critic_optimizer", "actor", "actor_optimizer"),
    *("temperature", "temperature_optimizer"),
)


@dataclass
class TrainConfig(FinetuneConfig):
    """RLPD's fields; those of every algorithm are in `FinetuneConfig`."""

    # Other defaults than the common ones
    offline_iterations: int = 0  # updates on the dataset alone; the paper has none
    online_iterations: int = 250000  # environment steps
    online_warmup: int = 5000  # online steps before the first update
    utd: int = 20  # updates of the critics per environment step
    normalize: bool = False  # normalize states with the dataset's mean and std
    group: str = "RLPD-D4RL"  # wandb group
    name: str = "RLPD"  # first part of the run folder's name
    # SAC; normalize_reward: locomotion: returns span 1000; antmaze: reward - 1
    actor_lr: float = 3e-4  # policy learning rate
    qf_lr: float = 3e-4  # critics learning rate
    temperature_lr: float = 3e-4  # learning rate of the temperature
    init_temperature: float = 1.0  # its first value
    backup_entropy: bool = True  # subtract the entropy term in the TD target
    tau: float = 0.005  # target network update rate
    # Networks
    hidden_dim: int = 256  # width of the hidden layers
    n_hidden_layers: int = 2  # hidden layers of the policy and of each critic
    critic_layer_norm: bool = True  # normalize the hidden layers of the critics
    n_critics: int = 10  # critics
    n_target_critics: int = 2  # of them drawn for the minimum in a TD target
    # Prior data
    mixing_ratio: float = 0.5  # offline share of an online batch
    random_steps: int = 5000  # first online steps, with uniform actions

    RANGES: ClassVar[dict] = FinetuneConfig.RANGES | {
        **dict.fromkeys(("actor_lr", "qf_lr", "temperature_lr"), "(0, inf)"),
        "init_temperature": "(0, inf)",
        "tau": "(0, 1]",
        "hidden_dim": "[1, 1e5]",
        "n_hidden_layers": "[1, 100]",
        **dict.fromkeys(("n_critics", "n_target_critics"), "[1, 1000]"),
        "mixing_ratio": "[0, 1)",
        "random_steps": "[0, 1e9]",
    }
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        "mixing_ratio",
        "random_steps",
    }
    # The authors' flags.
    ALIASES: ClassVar[dict] = {
        "temp_lr": "temperature_lr",
        "num_qs": "n_critics",
        "num_min_qs": "n_target_critics",
        "utd_ratio": "utd",
        "offline_ratio": "mixing_ratio",
        "max_steps": "online_iterations",
    }
    QUICK_START: ClassVar[str] = "configs/rlpd/quick_start.yaml"

    def __post_init__(self):
        super().__post_init__()
        self.check_mixing_ratio()
        if self.n_target_critics > self.n_critics:
            raise ValueError(
                f"n_target_critics {self.n_target_critics} are drawn from n_critics "
                f"{self.n_critics}; set it to at most that"
            )

    def uniform_steps(self) -> int:
        """First online steps with uniform actions."""
        return self.random_steps


class Noise(NamedTuple):
    """All random numbers of one update."""

    backup: torch.Tensor  # (B, A), normal
    members: torch.Tensor  # (M,), numbers of critics
    policy: Optional[torch.Tensor]  # (B, A), normal; where the policy learns


@dataclass(eq=False, repr=False)
class RLPD:
    """RLPD's networks, their losses and one update of them.

    The losses are functions of tensors and take no step; each returns one value per row.
    """

    critics: CriticEnsemble
    critic_optimizer: torch.optim.Optimizer
    actor: SquashedGaussianPolicy
    actor_optimizer: torch.optim.Optimizer
    temperature: PositiveScalar
    temperature_optimizer: torch.optim.Optimizer
    target_entropy: float
    n_target_critics: int = 2
    backup_entropy: bool = True
    discount: float = 0.99
    tau: float = 0.005
    utd: int = 20
    device: str = "cpu"

    def __post_init__(self):
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.total_it = 0
        # Updates since the policy's last one began, of `utd`; between two steps it is `utd`.
        self.minibatch = self.utd

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [self.critic_optimizer, self.actor_optimizer, self.temperature_optimizer]

    @torch.no_grad()
    def td_target(
        self,
        next_observations: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        noise: Noise,
    ) -> torch.Tensor:
        """r + gamma (1 - d) (min of the drawn target critics - T log pi), (B,)."""
        next_actions, next_log_pi = self.actor(next_observations, noise.backup)
        asked = next_observations, next_actions, noise.members
        next_q = self.target_critics(*asked).amin(dim=0)
        if self.backup_entropy:
            next_q = next_q - self.temperature() * next_log_pi
        return rewards.squeeze(-1) + (1.0 - dones.squeeze(-1)) * self.discount * next_q

    def critic_losses(self, values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Squared TD error, mean over the critics, (B,); values (N, B), target (B,)."""
        return (values - target).square().mean(dim=0)

    def policy_losses(
        self, observations: torch.Tensor, noise: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """T log pi - mean of all critics at new actions, and log pi, each (B,)."""
        actions, log_pi = self.actor(observations, noise)
        q = self.critics(observations, actions).mean(dim=0)
        return self.temperature().detach() * log_pi - q, log_pi

    def temperature_losses(self, log_pi: torch.Tensor) -> torch.Tensor:
        """T (entropy - its target), (B,); log_pi (B,)."""
        return self.temperature() * (-log_pi - self.target_entropy).detach()

    def _noise(self, actions: torch.Tensor, learns: bool) -> Noise:
        """The random numbers of one update on actions (B, A), from the global stream."""
        drawn = self.critics.n_critics, self.n_target_critics, False, actions.device
        return Noise(
            backup=torch.randn_like(actions),
            members=draw_members(*drawn),
            policy=torch.randn_like(actions) if learns else None,
        )

    def train(self, batch: TensorBatch, online: bool = False) -> Dict[str, torch.Tensor]:
        """One update of the critics, online of every `utd` the last one also of the policy.

        Returns 0-d tensors.
        """
        self.total_it += 1
        self.minibatch = self.minibatch % self.utd + 1 if online else self.utd
        learns = self.minibatch == self.utd
        return self._update(batch, self._noise(batch[1], learns), learns)

    def _update(
        self, batch: TensorBatch, noise: Noise, learns: bool
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps: critics, their targets, policy, temperature."""
        observations, actions, rewards, next_observations, dones = batch
        target = self.td_target(next_observations, rewards, dones, noise)
        values = self.critics(observations, actions)
        critic_loss = self.critic_losses(values, target).mean(-1)
        descend(critic_loss, self.critic_optimizer)
        soft_update(self.target_critics, self.critics, self.tau)
        log_dict = {
            "critic_loss": critic_loss.detach(),
            "q": values.detach().mean(),
            "target_q": target.mean(),
        }
        if not learns:
            return log_dict
        assert noise.policy is not None
        policy_losses, log_pi = self.policy_losses(observations, noise.policy)
        policy_loss = policy_losses.mean(-1)
        temperature_loss = self.temperature_losses(log_pi).mean(-1)
        # A copy: the parameter is about to move.
        temperature = self.temperature().detach().clone()
        descend(policy_loss, self.actor_optimizer)
        descend(temperature_loss, self.temperature_optimizer)
        return {
            **log_dict,
            "actor_loss": policy_loss.detach(),
            "log_pi": log_pi.detach().mean(),
            "temperature": temperature,
            "temperature_loss": temperature_loss.detach(),
        }

    def state_dict(self) -> Dict[str, Any]:
        """Networks and optimizers by their names."""
        parts = {part: getattr(self, part).state_dict() for part in CHECKPOINT_PARTS}
        return {**parts, "total_it": self.total_it}

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
) -> RLPD:
    """The trainer of a config, on the device."""
    sizes = config.hidden_dim, config.n_hidden_layers
    form = Form(*sizes, init="xavier")
    critic_form = Form(*sizes, config.critic_layer_norm, init="xavier")
    actor = SquashedGaussianPolicy(state_dim, action_dim, max_action, form).to(device)
    critics = CriticEnsemble(state_dim, action_dim, config.n_critics, critic_form)
    critics = critics.to(device)
    temperature = PositiveScalar(config.init_temperature).to(device)

    def adam(network: torch.nn.Module, rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=rate)

    trainer = RLPD(
        **arguments_of(RLPD, config, device=device),
        critics=critics,
        critic_optimizer=adam(critics, config.qf_lr),
        actor=actor,
        actor_optimizer=adam(actor, config.actor_lr),
        temperature=temperature,
        temperature_optimizer=adam(temperature, config.temperature_lr),
        target_entropy=-action_dim / 2,
    )
    for optimizer in trainer.optimizers():
        # They make no step in the warm-up, and their state is in every checkpoint.
        complete(optimizer)
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


def step(
    trainer: RLPD, source: Any, config: TrainConfig, online: bool
) -> Dict[str, Any]:
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
            period=config.utd,
        )
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, session.offline_buffer, config, False))
        for _ in session.online(trainer.actor):
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config, True)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
