"""Warm-start RL: a Q-ensemble from CQL or Cal-QL, then SAC without the offline data (WSRL).

DARE-WSRL: the same with Dynamic Alignment for RElease, https://arxiv.org/abs/2511.03828. Online
the penalty and some offline rows stay, and the weight of a row multiplies its gap; the policy
learns from all rows as in WSRL (docs/wsrl.md, `make diff ALGO=wsrl`).

    python algorithms/dare_wsrl.py --config configs/wsrl/hopper_medium.yaml

Paper: Zhou, Peng, Li, Levine, Kumar 2024, https://arxiv.org/abs/2412.07762; the numbers are those
of the authors' code, zhouzypaul/wsrl 891ee35. Offline ten critics with layer normalization learn by
CQL or Cal-QL, whose penalty is that of two critics drawn anew for every update. Online nothing is
carried over but the agent: the policy collects `online_warmup` steps, then plain SAC learns from
online rows alone, with `utd` updates of the critics per environment step and one of the policy and
the temperature on the rows of all of them.

    python algorithms/wsrl.py --config configs/wsrl/hopper_medium.yaml

What differs from the authors' program, and why:
- A network is moved only where it learns. In theirs every update of some networks is also a step of
  Adam with a gradient of 0 for the others: online the policy and the temperature go on by their
  momentum in each update of the critics, and the critics in that of the policy.
  `zero_gradient_steps: true` does so.
- Actions are not clipped to 0.99999. No density of a row's action is computed here.
- The multiplier of the gap learns from the gaps of the batch. Theirs draws new actions for it, and
  online it draws them for all rows of an environment step.
- `utd: 1` online takes the critics' step before the policy's, as every other `utd` does. Theirs
  then takes both at once.
- Where offline rows are kept (`mixing_ratio`), every batch has that share of them. Theirs puts them
  behind the online rows and cuts the whole into batches, most of which have one kind.
- Online rows have no return-to-go, so that they bound no value of Cal-QL's penalty where that is
  kept. Theirs waits for the end of the episode and learns from finished ones.
- Where as many critics are asked as there are, each is asked once. Theirs may draw one twice.
As in theirs, though the paper does not say so, the critics share their last layer
(`shared_head: false` gives each its own).
`batch_size` is that of one update: theirs says 1024 for four of them. Settings of the kitchen
(no importance weights) and of a pixel encoder are left out.

`model_of: cql` or `cal_ql` starts from a model of that file (configs/wsrl/two_critics_*.yaml). That
is not the published WSRL, and every result says so (`caveat`): two critics without normalization
go on. They, their targets, the policy, the temperature and the multiplier of the gap are the same
functions and numbers as there; Adam's moments begin anew.

    python algorithms/wsrl.py --config configs/wsrl/two_critics_hopper_medium.yaml --load_model RUN

Shapes: N critics, M of them that are asked, B rows of a batch, R those of all batches of an
environment step, n = cql_n_actions, S state dimension, A action dimension.
"""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Tuple

import torch

from corl import finetune, seeds
from corl.compiled import CompiledUpdate, complete, descend, soft_update
from corl.config import FinetuneConfig, arguments_of, main
from corl.ensembles import CriticEnsemble, Form, draw_members
from corl.finetune import LINEAR_REWARDS, TensorBatch
from corl.sac import (
    TWO_CRITICS,
    PositiveScalar,
    SquashedGaussianPolicy,
    form_of,
    of_two_critics,
    policy_fit,
)
from corl_dare.config import LOGS, MEANS, PANELS, PRESETS, UNDEFINED, LagrangeDareConfig
from corl_dare.hook import DareHook, Release, energy_q_scale, prepare

BASELINE = "wsrl"
# Bounds of the policy's standard deviation.
STD_MIN, STD_MAX = 1e-5, 10.0
COLUMNS = [
    *("td_loss", "q", "target_q", "cql_gap", "cql_weight", "cql_q_proposed"),
    *("bound_rate", "multiplier_loss"),
    *("actor_loss", "log_pi", "temperature", "temperature_loss"),
]
COLUMNS += LOGS
# Attributes of the trainer and keys of its checkpoints.
CHECKPOINT_PARTS = (
    *("critics", "target_critics", "critic_optimizer", "actor", "actor_optimizer"),
    *("temperature", "temperature_optimizer", "multiplier", "multiplier_optimizer"),
)


@dataclass
class TrainConfig(FinetuneConfig):
    """WSRL's fields; those of every algorithm are in `FinetuneConfig`."""

    # Other defaults than the common ones
    online_iterations: int = 300000  # environment steps of fine-tuning
    online_warmup: int = 5000  # online steps before the first update
    utd: int = 4  # updates of the critics per environment step
    normalize: bool = False  # normalize states with the dataset's mean and std
    group: str = "WSRL-D4RL"  # wandb group
    name: str = "DARE-WSRL"  # first part of the run folder's name
    # SAC; normalize_reward: locomotion: returns span 1000; then scale and bias
    actor_lr: float = 1e-4  # policy learning rate
    qf_lr: float = 3e-4  # critics learning rate
    temperature_lr: float = 1e-4  # learning rate of the temperature
    init_temperature: float = 1.0  # its first value
    tau: float = 0.005  # target network update rate
    reward_scale: float = 1.0  # factor on rewards, only with normalize_reward
    reward_bias: float = 0.0  # added to them, only with normalize_reward
    # Networks
    hidden_dim: int = 256  # width of the hidden layers
    actor_n_hidden_layers: int = 2  # hidden layers of the policy
    q_n_hidden_layers: int = 2  # hidden layers of each critic
    layer_norm: bool = True  # normalize the hidden layers of policy and critics
    last_hidden_gain: Optional[float] = 0.01  # of the last hidden layer's first weights
    state_dependent_std: bool = True  # of the policy; false: A numbers
    shared_head: bool = True  # one last layer for all critics, as in the authors' code
    n_critics: int = 10  # critics
    n_target_critics: int = 2  # of them drawn for the minimum in a TD target
    # Bounds of the logarithm of the policy's standard deviation
    log_std_min: float = math.log(STD_MIN)  # of 1e-5
    log_std_max: float = math.log(STD_MAX)  # of 10
    # Whose model load_model is: wsrl; cql, cal_ql: two critics, not the published WSRL
    model_of: str = "wsrl"
    # The offline phase
    base: str = "cql"  # its penalty: cql, cal_ql
    n_penalty_critics: int = 2  # critics drawn for it, two may be the same
    # Weight of the gap; with cql_lagrange a factor on the multiplier
    cql_alpha: float = 5.0
    cql_n_actions: int = 10  # actions of each kind under the soft maximum
    cql_lagrange: bool = False  # learn the weight of the gap
    cql_target_action_gap: float = 0.8  # gap that the Lagrange multiplier aims at
    multiplier_lr: float = 3e-4  # learning rate of that multiplier
    cql_max_target_backup: bool = True  # TD target: maximum over cql_n_actions
    is_sparse_reward: bool = False  # cal_ql: failed episodes count as endless
    # The online phase
    mixing_ratio: Optional[float] = None  # offline share of an online batch; none: 0
    cql_alpha_online: Optional[float] = None  # as cql_alpha; none: 0, plain SAC
    max_target_backup_online: bool = False  # as cql_max_target_backup
    # Adam also moves, by its momentum, what does not learn in a step, as in the authors' code
    zero_gradient_steps: bool = False
    # With it, none is 0.5 for mixing_ratio, and cql_alpha for cql_alpha_online
    dare: LagrangeDareConfig = dataclasses.field(default_factory=LagrangeDareConfig)

    CHOICES: ClassVar[dict] = FinetuneConfig.CHOICES | {
        "base": ("cql", "cal_ql"),
        "model_of": ("wsrl", "cql", "cal_ql"),
    }
    RANGES: ClassVar[dict] = FinetuneConfig.RANGES | {
        **dict.fromkeys(("actor_lr", "qf_lr", "temperature_lr"), "(0, inf)"),
        **dict.fromkeys(("multiplier_lr", "init_temperature"), "(0, inf)"),
        "tau": "(0, 1]",
        "reward_scale": "(0, inf)",
        "reward_bias": "(-inf, inf)",
        "hidden_dim": "[1, 1e5]",
        **dict.fromkeys(("actor_n_hidden_layers", "q_n_hidden_layers"), "[1, 100]"),
        "last_hidden_gain": "(0, inf)",
        "log_std_min": "[-100, 0]",
        "log_std_max": "[0, 100]",
        **dict.fromkeys(("n_critics", "n_target_critics"), "[1, 1000]"),
        "n_penalty_critics": "[1, 1000]",
        **dict.fromkeys(("cql_alpha", "cql_alpha_online"), "[0, inf)"),
        "cql_n_actions": "[1, 1e4]",
        "cql_target_action_gap": "(-inf, inf)",
        "mixing_ratio": "[0, 1)",
    }
    ONLINE: ClassVar[frozenset] = FinetuneConfig.ONLINE | {
        "mixing_ratio",
        "cql_alpha_online",
        "max_target_backup_online",
        "zero_gradient_steps",
        "dare",
    }
    QUICK_START: ClassVar[str] = "configs/wsrl/quick_start.yaml"
    PRESETS: ClassVar[dict] = PRESETS
    REWARDS: ClassVar[finetune.RewardRule] = LINEAR_REWARDS
    MC_RETURNS: ClassVar[bool] = True  # rows carry their return-to-go

    def __post_init__(self):
        super().__post_init__()
        if self.dare.enabled:
            self.mixing_ratio = 0.5 if self.mixing_ratio is None else self.mixing_ratio
            if self.cql_alpha_online is None:
                self.cql_alpha_online = self.cql_alpha
            if not self.cql_alpha_online > 0:
                raise ValueError(
                    "cql_alpha_online 0 leaves no conservative gap that dare could weigh; give "
                    "one above 0 (default: cql_alpha), or set dare.enabled to false"
                )
            if self.dare.alike and self.cql_lagrange:
                self.dare.check_multiplier()
        self.mixing_ratio = self.mixing_ratio or 0.0
        self.cql_alpha_online = self.cql_alpha_online or 0.0
        self.check_mixing_ratio()
        if self.is_sparse_reward and not self.discount < 1.0:
            raise ValueError(
                "is_sparse_reward needs a discount below 1: r / (1 - discount)"
            )

    def caveat(self) -> str:
        """What every result says of a run that starts from a model of two critics."""
        if self.model_of == "wsrl":
            return super().caveat()
        return f"two critics: from a model of {self.model_of}.py, not the published WSRL"


class Noise(NamedTuple):
    """All random numbers of one update; None where nothing needs them."""

    backup: torch.Tensor  # (B, A), or (B, n, A) for the maximum; normal
    members: torch.Tensor  # (M,), numbers of critics in the TD target
    penalized: Optional[torch.Tensor]  # (M,), numbers of critics in the penalty
    uniform: Optional[torch.Tensor]  # (B, n, A), in [-1, 1]
    current: Optional[torch.Tensor]  # (B, n, A), normal
    following: Optional[torch.Tensor]  # (B, n, A), normal
    policy: Optional[torch.Tensor]  # (R, A), normal
    temperature: Optional[torch.Tensor]  # (R, A), or (R, n, A) as `backup`; normal


# States and next states (R, S) that the policy and the temperature learn from.
Rows = Tuple[torch.Tensor, torch.Tensor]


@dataclass(eq=False, repr=False)
class WSRL:
    """WSRL's networks, their losses and one update of each phase.

    The losses are functions of tensors and take no step; each returns one value per row.
    """

    critics: CriticEnsemble
    critic_optimizer: torch.optim.Optimizer
    actor: SquashedGaussianPolicy
    actor_optimizer: torch.optim.Optimizer
    temperature: PositiveScalar
    temperature_optimizer: torch.optim.Optimizer
    multiplier: PositiveScalar
    multiplier_optimizer: torch.optim.Optimizer
    target_entropy: float
    n_target_critics: int = 2
    n_penalty_critics: int = 2
    base: str = "cql"
    cql_alpha: float = 5.0
    cql_alpha_online: float = 0.0
    cql_n_actions: int = 10
    cql_lagrange: bool = False
    cql_target_action_gap: float = 0.8
    cql_max_target_backup: bool = True
    max_target_backup_online: bool = False
    zero_gradient_steps: bool = False
    discount: float = 0.99
    tau: float = 0.005
    utd: int = 4
    model_of: str = "wsrl"
    device: str = "cpu"
    dare: LagrangeDareConfig = dataclasses.field(default_factory=LagrangeDareConfig)

    def __post_init__(self):
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.total_it = 0
        # Rows of the environment step's batches so far; none between two steps.
        self.waiting: List[Rows] = []

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [
            self.critic_optimizer,
            self.actor_optimizer,
            self.temperature_optimizer,
            self.multiplier_optimizer,
        ]

    def gap_weight(self, online: bool) -> float:
        """The field that weighs the conservative gap in a phase."""
        return self.cql_alpha_online if online else self.cql_alpha

    @torch.no_grad()
    def td_target(
        self,
        next_observations: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        noise: Noise,
    ) -> torch.Tensor:
        """r + gamma (1 - d) Q', (B,); Q' is the minimum of the drawn critics, no entropy.

        Where `noise.backup` has several actions, Q' is the maximum over them.
        """
        next_actions, _ = self.actor(next_observations, noise.backup)
        asked = next_observations, next_actions, noise.members
        next_q = self.target_critics(*asked).amin(dim=0)
        if noise.backup.ndim > next_observations.ndim:
            next_q = next_q.amax(dim=-1)
        return rewards.squeeze(-1) + (1.0 - dones.squeeze(-1)) * self.discount * next_q

    def td_losses(self, values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Squared TD error, mean over the critics, (B,); values (N, B), target (B,)."""
        return (values - target).square().mean(dim=0)

    @torch.no_grad()
    def _proposals(
        self, observations: torch.Tensor, next_observations: torch.Tensor, noise: Noise
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Actions under the soft maximum, (B, 3n, A), and their log-densities, (B, 3n).

        First uniform ones, then those of pi(s) and of pi(s').
        """
        assert noise.uniform is not None and noise.following is not None
        uniform = self.actor.max_action * noise.uniform
        current, log_pi = self.actor(observations, noise.current)
        following, next_log_pi = self.actor(next_observations, noise.following)
        uniform_log_prob = torch.full_like(log_pi, -uniform.shape[-1] * math.log(2.0))
        return (
            torch.cat((uniform, current, following), dim=-2),
            torch.cat((uniform_log_prob, log_pi, next_log_pi), dim=-1),
        )

    def conservative_gaps(
        self,
        values: torch.Tensor,
        batch: TensorBatch,
        noise: Noise,
        release: Optional[Release] = None,
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Soft maximum of Q over actions minus Q of the data's, (B,), and metrics.

        It is the mean over the drawn critics. With the base `cal_ql` values of the policies'
        actions lie no lower than the returns-to-go.

        Args:
            values: of the data's actions, (N, B).
            batch: with returns-to-go (B, 1) as its sixth field.
            noise: of this update.
            release: which rows keep their gap; the others' need not be known.
        """
        observations, next_observations, mc_returns = batch[0], batch[3], batch[5]
        if release is not None and release.kept == 0:
            return torch.zeros_like(values[0]), {}
        if release is not None:
            observations, next_observations, mc_returns = (
                x[: release.kept] for x in (observations, next_observations, mc_returns)
            )
            values = values[:, : release.kept]
        proposed, log_prob = self._proposals(observations, next_observations, noise)
        assert noise.penalized is not None
        q = self.critics(observations, proposed, noise.penalized)
        found = {"cql_q_proposed": q.detach().mean()}
        if self.base == "cal_ql":
            n = self.cql_n_actions
            uniform, policies = q[..., :n], q[..., n:]
            found["bound_rate"] = (policies.detach() < mc_returns).float().mean()
            q = torch.cat((uniform, torch.maximum(policies, mc_returns)), dim=-1)
        gaps = torch.logsumexp(q - log_prob, dim=-1) - values[noise.penalized]
        gaps = gaps.mean(dim=0)
        if release is not None:
            gaps = release.keep(gaps)
            found["conservative_loss"] = release.average(gaps)
        return gaps, found

    def multiplier_loss(
        self,
        gap: torch.Tensor,
        release: Optional[Release] = None,
    ) -> torch.Tensor:
        """-multiplier (gap - its target), 0-d; gap 0-d, without gradient."""
        excess = gap - self.cql_target_action_gap
        if release is not None and self.dare.lagrange_gap == "weighted":
            excess = gap - release.weight.mean(-1) * self.cql_target_action_gap
        return -self.multiplier() * excess

    def policy_losses(
        self, observations: torch.Tensor, noise: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """T log pi - minimum of all critics at new actions, and log pi, each (R,)."""
        actions, log_pi = self.actor(observations, noise)
        q = self.critics(observations, actions).amin(dim=0)
        return self.temperature().detach() * log_pi - q, log_pi

    def temperature_losses(
        self, next_observations: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """T (entropy at s' - its target), (R,); mean over the actions of a row."""
        with torch.no_grad():
            log_pi = self.actor(next_observations, noise)[1]
            if noise.ndim > next_observations.ndim:
                log_pi = log_pi.mean(dim=-1)
        return self.temperature() * (-log_pi - self.target_entropy)

    def _noise(
        self,
        actions: torch.Tensor,
        rows: int,
        online: bool,
        release: Optional[Release] = None,
    ) -> Noise:
        """The random numbers of one update on actions (B, A), from the global stream.

        The policy learns from so many `rows`; 0: it does not learn.
        """
        (b, a), n = actions.shape, self.cql_n_actions
        device, total = actions.device, self.critics.n_critics
        several = self.max_target_backup_online if online else self.cql_max_target_backup
        each = (n,) if several else ()
        penalized, gap_rows = self.gap_weight(online) > 0, b
        if release is not None and release.kept is not None:
            gap_rows = release.kept

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device)

        def uniform(*shape: int) -> torch.Tensor:
            return actions.new_empty(shape).uniform_(-1, 1)

        def drawn(count: int) -> torch.Tensor:
            return draw_members(total, count, count != total, device)

        return Noise(
            backup=normal(b, *each, a),
            members=drawn(self.n_target_critics),
            penalized=drawn(self.n_penalty_critics) if penalized else None,
            uniform=uniform(gap_rows, n, a) if penalized else None,
            current=normal(gap_rows, n, a) if penalized else None,
            following=normal(gap_rows, n, a) if penalized else None,
            policy=normal(rows, a) if rows else None,
            temperature=normal(rows, *each, a) if rows else None,
        )

    def train(
        self,
        batch: TensorBatch,
        online: bool = False,
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """One update of everything, online of the critics and after `utd` of all; 0-d tensors.

        Online the policy and the temperature learn from the rows of the `utd` batches together.
        """
        self.total_it += 1
        rows: Optional[Rows] = (batch[0], batch[3])
        if online:
            # Copies: a captured buffer writes its next batch into the same tensors.
            self.waiting.append((batch[0].clone(), batch[3].clone()))
            rows = None
            if len(self.waiting) == self.utd:
                states, next_states = zip(*self.waiting, strict=True)
                rows = (torch.cat(states, dim=-2), torch.cat(next_states, dim=-2))
                self.waiting.clear()
        count = 0 if rows is None else rows[0].shape[-2]
        noise = self._noise(
            batch[1],
            count,
            online,
            release,
        )
        return self._update(
            batch,
            noise,
            rows,
            online,
            release,
        )

    def _update(
        self,
        batch: TensorBatch,
        noise: Noise,
        rows: Optional[Rows],
        online: bool,
        release: Optional[Release] = None,
    ) -> Dict[str, torch.Tensor]:
        """A function of tensors but for the steps.

        Offline every loss comes before the first step; online the critics step first.
        """
        critic_loss, gap, log_dict = self._critic_loss(
            batch,
            noise,
            online,
            release,
        )
        coasts = online and self.zero_gradient_steps
        if online:
            self._step_critics(critic_loss)
        if coasts:
            self._coast("actor", "temperature")
            if gap is not None:
                self._coast("multiplier")
        if rows is not None:
            log_dict.update(self._step_policy(rows, noise))
            if gap is not None and self.cql_lagrange:
                multiplier_loss = self.multiplier_loss(
                    gap,
                    release,
                )
                descend(multiplier_loss, self.multiplier_optimizer)
                log_dict["multiplier_loss"] = multiplier_loss.detach()
            if coasts:
                self._coast("critic")
        if not online:
            self._step_critics(critic_loss)
        return log_dict

    def _critic_loss(
        self,
        batch: TensorBatch,
        noise: Noise,
        online: bool,
        release: Optional[Release] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], Dict[str, torch.Tensor]]:
        """The critics' loss, the mean gap where it counts, both 0-d, and metrics."""
        observations, actions, rewards, next_observations, dones = batch[:5]
        target = self.td_target(next_observations, rewards, dones, noise)
        values = self.critics(observations, actions)
        td_loss = self.td_losses(values, target).mean(-1)
        log_dict = {
            "td_loss": td_loss.detach(),
            "q": values.detach().mean(),
            "target_q": target.mean(),
        }
        if noise.penalized is None:
            return td_loss, None, log_dict
        gaps, found = self.conservative_gaps(
            values,
            batch,
            noise,
            release,
        )
        gap = gaps.mean(-1)
        weight = torch.full_like(td_loss, self.gap_weight(online))
        if self.cql_lagrange:
            weight = weight * self.multiplier().detach()
        log_dict.update(found, cql_gap=gap.detach(), cql_weight=weight)
        return td_loss + weight * gap, gap.detach(), log_dict

    def _step_critics(self, loss: torch.Tensor) -> None:
        descend(loss, self.critic_optimizer)
        soft_update(self.target_critics, self.critics, self.tau)

    def _coast(self, *names: str) -> None:
        """A step of Adam with a gradient of 0: its momentum moves the networks."""
        for name in names:
            network = self.critics if name == "critic" else getattr(self, name)
            zero = sum((0.0 * p).sum() for p in network.parameters())
            assert isinstance(zero, torch.Tensor)
            descend(zero, getattr(self, f"{name}_optimizer"))

    def _step_policy(self, rows: Rows, noise: Noise) -> Dict[str, torch.Tensor]:
        """Both losses come before both steps; returns metrics."""
        assert noise.policy is not None and noise.temperature is not None
        observations, next_observations = rows
        policy_losses, log_pi = self.policy_losses(observations, noise.policy)
        policy_loss = policy_losses.mean(-1)
        losses = self.temperature_losses(next_observations, noise.temperature)
        temperature_loss = losses.mean(-1)
        # A copy: the parameter is about to move.
        temperature = self.temperature().detach().clone()
        descend(policy_loss, self.actor_optimizer)
        descend(temperature_loss, self.temperature_optimizer)
        return {
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
        for part in CHECKPOINT_PARTS:
            getattr(self, part).load_state_dict(state_dict[part])
        self.total_it = state_dict["total_it"]

    def load_weights(self, state_dict: Dict[str, Any]) -> None:
        """Start from the networks and optimizers of a `state_dict`, or from another file's model.

        Raises:
            ValueError: it is of another file, or its networks have another form.
        """
        wanted = CHECKPOINT_PARTS if self.model_of == "wsrl" else TWO_CRITICS
        if missing := [key for key in wanted if key not in state_dict]:
            raise ValueError(
                f"it has no {missing[0]!r}, so it is no model of {self.model_of}.py; set "
                "model_of to the file that it is a model of"
            )
        if self.model_of != "wsrl":
            # Adam's moments are those of the start.
            state_dict = {**self.state_dict(), **of_two_critics(state_dict)}
            self._check_form(state_dict)
        self.load_state_dict(state_dict)

    def _check_form(self, state_dict: Dict[str, Any]) -> None:
        """Raises ValueError where fields of the config make other networks than CQL's."""
        own = form_of(self.actor.state_dict(), self.critics.state_dict())
        own |= {
            "log_std_min": self.actor.log_std_min,
            "log_std_max": self.actor.log_std_max,
        }
        needed = form_of(state_dict["actor"], state_dict["critics"])
        needed |= {"log_std_min": -20.0, "log_std_max": 2.0}
        wrong = [f"{k} to {str(v).lower()}" for k, v in needed.items() if own[k] != v]
        if wrong:
            raise ValueError(
                f"a model of {self.model_of}.py has other networks: set {', '.join(wrong)}"
            )


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> WSRL:
    """The trainer of a config, on the device."""

    def form(n_hidden_layers: int) -> Form:
        return Form(
            config.hidden_dim,
            n_hidden_layers,
            config.layer_norm,
            "orthogonal",
            config.last_hidden_gain,
        )

    actor = SquashedGaussianPolicy(
        state_dim,
        action_dim,
        max_action,
        form(config.actor_n_hidden_layers),
        log_std_min=config.log_std_min,
        log_std_max=config.log_std_max,
        state_dependent_std=config.state_dependent_std,
    ).to(device)
    critics = CriticEnsemble(
        state_dim,
        action_dim,
        config.n_critics,
        form(config.q_n_hidden_layers),
        config.shared_head,
    ).to(device)
    temperature = PositiveScalar(config.init_temperature, softplus=True).to(device)
    multiplier = PositiveScalar(1.0, softplus=True).to(device)

    def adam(network: torch.nn.Module, rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=rate)

    trainer = WSRL(
        **arguments_of(WSRL, config, device=device),
        critics=critics,
        critic_optimizer=adam(critics, config.qf_lr),
        actor=actor,
        actor_optimizer=adam(actor, config.actor_lr),
        temperature=temperature,
        temperature_optimizer=adam(temperature, config.temperature_lr),
        multiplier=multiplier,
        multiplier_optimizer=adam(multiplier, config.multiplier_lr),
        target_entropy=-float(action_dim),
    )
    for optimizer in trainer.optimizers():
        # Some make no step for long, and their state is in every checkpoint.
        complete(optimizer)
    if config.compile is True:
        trainer._update = CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


def hook_arguments(trainer: WSRL) -> Dict[str, Any]:
    """What the hook needs of the trainer: the log-density of its policy, and its Q."""
    return {
        "policy_log_prob": trainer.actor.log_prob,
        # The minimum of all, as in the policy's loss.
        "q_function": lambda *asked: trainer.target_critics(*asked).amin(dim=0),
    }


def step(
    trainer: WSRL, source: Any, config: TrainConfig, online: bool
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
    if config.model_of != "wsrl" and not config.load_model:
        raise ValueError(
            f"model_of {config.model_of} needs a model: give load_model, a run folder or a "
            "checkpoint, or leave model_of out"
        )
    with seeds.session(config, __file__, COLUMNS) as session:
        trainer = session.build(make_trainer)
        # The rest is another one in a model of two critics; `load_weights` looks.
        session.keep("trainer", trainer, loads=("actor",))
        if caveat := config.caveat():
            print(f"{caveat}; Adam's moments begin anew")
        session.weigh_rows(trainer.actor, policy_fit(trainer.actor))
        source = session.mixed
        if config.dare.enabled:
            session.show(PANELS, MEANS, UNDEFINED)
            scale = config.reward_scale if config.normalize_reward else 1.0
            source = session.make(
                "hook",
                lambda config: prepare(
                    config.dare,
                    **session.facts(config),
                    **hook_arguments(trainer),
                    q_scale=lambda: energy_q_scale(
                        config.env, session.return_span(), scale
                    ),
                ),
            )
        session.start(
            offline=lambda: step(trainer, session.offline_buffer, config, False),
            online=lambda: step(trainer, source, config, True),
            period=config.utd,
            other=lambda hook, config: step(trainer, hook, config, True),
        )
        for _ in session.offline(trainer.actor):
            session.log(step(trainer, session.offline_buffer, config, False))
        if config.dare.enabled and session.goes_online:
            source.pretrain(session.should_stop, session.save)
        for _ in session.online(trainer.actor):
            losses: Dict[str, Any] = {}
            for _ in session.updates():
                losses = step(trainer, source, config, True)
            session.log(losses)
        return session.finish()


if __name__ == "__main__":
    main(train, TrainConfig)
