"""Implicit Q-Learning, offline then online (CORL's finetune IQL on today's stack).

DARE-IQL: the same with Dynamic Alignment for RElease, https://arxiv.org/abs/2511.03828. Online,
`corl_dare.hook` exchanges misplaced rows between the offline and the online half of a batch and
gives each row a conservative weight: rows of weight 1 keep IQL's losses, rows of weight 0 get
Q-learning with a maximum over the policy's actions and a SAC policy loss (Eq. 15, 16).

    python algorithms/dare_iql.py --config configs/iql/hopper_medium.yaml

This file is `iql.py` plus lines (`make diff ALGO=iql`). Readings of the paper: the maximum
over actions is one over `backup_actions` of the current policy, without entropy; V keeps its
expectile on all rows; masked terms are averaged over the whole batch. The released policy loss
scores the action that would be executed, clipped to the bounds, where Q has seen data.

What follows is the baseline's own header.

Paper: Kostrikov et al. 2021, https://arxiv.org/abs/2110.06169. Names, config fields, order of
updates, checkpoint keys and numbers are those of CORL's `algorithms/finetune/iql.py` at commit
6afec90; one update on the same weights and batch gives the same parameters.

    python algorithms/iql.py --config configs/iql/hopper_medium.yaml

What differs from upstream, and why (`compat: true` brings the upstream behaviour back):
- The cosine schedule of the actor's learning rate ends with the offline phase; online the rate
  is constant. Upstream goes on stepping it, so it restarts at 0 online and climbs.
- Evaluation episodes are seeded with `eval_seed`. Upstream overwrites it with `seed`.
- A dataset that exactly fills the buffer can be fine-tuned. Upstream's write pointer is then
  out of range.
- Regret is computed from evaluation episodes. Upstream computes it from training episodes.
Without a switch: `mixing_ratio` adds a second form with two buffers (offline rows first, then
online rows; the default is upstream's single buffer); checkpoints also hold the target network;
`train` returns tensors, so that an update never waits for the device.
"""

import copy
import dataclasses
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal
from torch.optim.lr_scheduler import CosineAnnealingLR

from corl import checkpoints, compiled, envs, machine, physics, runs, tasks
from corl.config import main
from corl.data import sources
from corl_dare.hook import (
    LOGS,
    DareConfig,
    DareHook,
    clipped_log_prob,
    energy_q_scale,
    fit_behavior,
    new_behavior,
    seconds_to_prepare,
)

TensorBatch = List[torch.Tensor]

ALGORITHM = "iql"
ALGORITHM = "dare_" + ALGORITHM
EXP_ADV_MAX = 100.0
LOG_STD_MIN = -20.0
LOG_STD_MAX = 2.0
EXPECTILE_RELEASED = 0.99  # of V on released rows in DARE-IV, Eq. 35
ENVS_WITH_GOAL = ("antmaze", "pen", "door", "hammer", "relocate")
OTHER_BLOCKS = ("dare",)  # of a shared config file, left out here
OTHER_BLOCKS = ()  # here the block is ours
QUICK_START = "configs/iql/quick_start.yaml"
COLUMNS = [
    "value_loss",
    "q_loss",
    "actor_loss",
    "train_return",
    "train_score",
    "train_length",
    "success_rate",
    "regret",
]
COLUMNS += LOGS
CHECKPOINT_PARTS = (  # attributes of the trainer and keys of CORL's checkpoints
    "qf",
    "q_optimizer",
    "vf",
    "v_optimizer",
    "actor",
    "actor_optimizer",
    "actor_lr_schedule",
)


@dataclass
class DareIQLConfig(DareConfig):
    # The released losses of DARE-IQL
    entropy_alpha: float = 0.2  # weight of log pi (paper: 0.2 locomotion, 0.01 antmaze)
    backup_actions: int = 10  # policy actions under the maximum of Eq. 15
    policy: str = "sac"  # released rows' policy loss: sac (Eq. 16), awr (as the others)
    value: str = "all"  # V learns on: all rows; offline: weight 1 only; iv: Eq. 35
    # DARE-IV (the paper's appendix G) is policy awr with value iv.

    def __post_init__(self):
        super().__post_init__()
        if self.value not in ("all", "offline", "iv"):
            raise ValueError(
                f"dare.value must be all, offline or iv, not {self.value!r}"
            )
        if self.policy not in ("sac", "awr"):
            raise ValueError(f"dare.policy must be sac or awr, not {self.policy!r}")
        if self.backup_actions < 1:
            raise ValueError("dare.backup_actions must be at least 1")


@dataclass
class TrainConfig:
    # Experiment
    device: str = "auto"  # auto, cpu, cuda
    env: str = "antmaze-umaze-v2"  # D4RL task name
    seed: int = 0  # seeds networks, batches, exploration and the training environment
    eval_seed: int = 0  # seeds the evaluation episodes
    eval_freq: int = 50000  # updates between two evaluations
    n_episodes: int = 100  # episodes per evaluation
    offline_iterations: int = 1000000  # updates on the dataset alone
    online_iterations: int = 1000000  # environment steps of fine-tuning
    checkpoints_path: Optional[str] = None  # also write CORL's checkpoint_N.pt here
    load_model: str = ""  # CORL checkpoint whose weights to start from
    # IQL
    actor_dropout: float = 0.0  # dropout in the actor's hidden layers
    buffer_size: int = 2000000  # transitions per buffer
    batch_size: int = 256  # transitions per update
    discount: float = 0.99  # discount factor
    tau: float = 0.005  # target network update rate
    beta: float = 3.0  # inverse temperature of the advantage weights
    iql_tau: float = 0.7  # expectile of the value loss
    expl_noise: float = 0.03  # exploration noise of the deterministic policy
    noise_clip: float = 0.5  # bound on that noise
    iql_deterministic: bool = False  # deterministic instead of Gaussian policy
    normalize: bool = True  # normalize states with the dataset's mean and std
    normalize_reward: bool = False  # locomotion: returns span 1000; antmaze: reward - 1
    vf_lr: float = 3e-4  # value function learning rate
    qf_lr: float = 3e-4  # critic learning rate
    actor_lr: float = 3e-4  # actor learning rate
    # Ours
    mixing_ratio: Optional[float] = (
        None  # offline share of an online batch; none: one buffer
    )
    actor_lr_online: Optional[float] = None  # constant actor rate online; none: actor_lr
    utd: int = 1  # updates per environment step online
    online_warmup: int = 0  # online steps before the first online update (PEX: 5000)
    compat: bool = False  # reproduce upstream's known faults (see the file header)
    dataset_source: str = "auto"  # auto, file, d4rl_dir, d4rl, minari, self-collected
    dataset_path: Optional[str] = None  # dataset file (or minari id) to use
    dataset_rows: Optional[int] = None  # rows of the self-collected stand-in
    env_backend: str = "gymnasium"  # gymnasium, or d4rl for the old gym + d4rl stack
    log_freq: int = 500  # updates between two rows of metrics.csv
    threads: int = 1  # torch CPU threads; small networks gain little from more
    compile: bool = False  # updates as one compiled graph; needs a C++ compiler
    runs_dir: str = "runs"  # where run folders are made
    resume: Optional[str] = None  # run folder to go on with
    wandb_mode: str = "disabled"  # disabled, offline, online
    # Wandb
    project: str = "CORL"  # wandb project
    group: str = "IQL-D4RL"  # wandb group
    name: str = "IQL"  # first part of the run folder's name
    name: str = "DARE-IQL"  # first part of the run folder's name
    # DARE
    dare: DareIQLConfig = dataclasses.field(default_factory=DareIQLConfig)

    def __post_init__(self):
        tasks.task(self.env)
        counts = (
            "eval_freq",
            "n_episodes",
            "batch_size",
            "buffer_size",
            "utd",
            "log_freq",
        )
        for field in counts:
            if getattr(self, field) < 1:
                raise ValueError(
                    f"{field} must be at least 1, not {getattr(self, field)}"
                )
        for field in ("offline_iterations", "online_iterations", "online_warmup"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative")
        if self.compile:
            compiled.check()
        if not 0.0 < self.iql_tau < 1.0:
            raise ValueError(f"iql_tau must lie in (0, 1), not {self.iql_tau}")
        if self.dare.enabled and self.mixing_ratio is None:
            self.mixing_ratio = 0.5
        if self.dare.score == "policy_ratio" and self.iql_deterministic:
            raise ValueError("dare.score policy_ratio needs a policy with a density")
        if self.mixing_ratio is not None:
            if not 0.0 < self.mixing_ratio < 1.0:
                raise ValueError(
                    f"mixing_ratio must lie in (0, 1), not {self.mixing_ratio}; "
                    "leave it out for a single buffer"
                )
            if not (self.batch_size * self.mixing_ratio).is_integer():
                raise ValueError(
                    f"batch_size {self.batch_size} cannot be split by mixing_ratio "
                    f"{self.mixing_ratio}: both halves must be whole rows"
                )


@torch.no_grad()
def soft_update(target: nn.Module, source: nn.Module, tau: float) -> None:
    # Two products and a sum, as upstream: a fused lerp rounds differently.
    for target_param, source_param in zip(
        target.parameters(), source.parameters(), strict=True
    ):
        target_param.copy_((1 - tau) * target_param + tau * source_param)


def compute_mean_std(states: np.ndarray, eps: float) -> Tuple[np.ndarray, np.ndarray]:
    return states.mean(0), states.std(0) + eps


def normalize_states(states: np.ndarray, mean: np.ndarray, std: np.ndarray):
    return (states - mean) / std


def wrap_env(
    env: gym.Env,
    state_mean: Union[np.ndarray, float] = 0.0,
    state_std: Union[np.ndarray, float] = 1.0,
    reward_scale: float = 1.0,
) -> gym.Env:
    env = gym.wrappers.TransformObservation(
        env, lambda state: (state - state_mean) / state_std, env.observation_space
    )
    if reward_scale != 1.0:
        env = gym.wrappers.TransformReward(env, lambda reward: reward_scale * reward)
    return env


class ReplayBuffer:
    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        buffer_size: int,
        device: str = "cpu",
        compat: bool = False,
    ):
        self._buffer_size = buffer_size
        self._pointer = 0
        self._size = 0
        self._loaded = 0  # rows of the dataset; they are not part of a checkpoint
        self._compat = compat
        self._device = device
        # Zeros of the whole capacity: the operating system hands out pages on first write.
        self._states = torch.zeros((buffer_size, state_dim), device=device)
        self._actions = torch.zeros((buffer_size, action_dim), device=device)
        self._rewards = torch.zeros((buffer_size, 1), device=device)
        self._next_states = torch.zeros((buffer_size, state_dim), device=device)
        self._dones = torch.zeros((buffer_size, 1), device=device)

    def _storage(self) -> TensorBatch:
        return [
            self._states,
            self._actions,
            self._rewards,
            self._next_states,
            self._dones,
        ]

    def _to_tensor(self, data: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(data, dtype=torch.float32, device=self._device)

    def load_d4rl_dataset(self, data: Dict[str, np.ndarray]) -> None:
        if self._size != 0:
            raise ValueError("a dataset can only be loaded into an empty buffer")
        rows = len(data["observations"])
        if rows > self._buffer_size:
            raise ValueError(
                f"buffer_size {self._buffer_size} is smaller than the dataset of {rows} "
                f"rows; set buffer_size to at least {rows}"
            )
        self._states[:rows] = self._to_tensor(data["observations"])
        self._actions[:rows] = self._to_tensor(data["actions"])
        self._rewards[:rows] = self._to_tensor(data["rewards"][..., None])
        self._next_states[:rows] = self._to_tensor(data["next_observations"])
        self._dones[:rows] = self._to_tensor(data["terminals"][..., None])
        self._size = self._loaded = rows
        self._pointer = rows if self._compat else rows % self._buffer_size

    def draw(self, batch_size: int) -> np.ndarray:
        # The legacy global generator on the host, as upstream: same seed, same batches.
        return np.random.randint(0, self._size, size=batch_size)

    def gather(self, indices: np.ndarray) -> TensorBatch:
        rows = torch.from_numpy(indices).to(self._device)
        return [field[rows] for field in self._storage()]

    def sample(self, batch_size: int) -> TensorBatch:
        return self.gather(self.draw(batch_size))

    def add_transition(
        self,
        state: np.ndarray,
        action: np.ndarray,
        reward: float,
        next_state: np.ndarray,
        done: bool,
    ) -> None:
        for field, value in zip(
            self._storage(), (state, action, reward, next_state, done), strict=True
        ):
            field[self._pointer] = self._to_tensor(value)
        self._pointer = (self._pointer + 1) % self._buffer_size
        self._size = min(self._size + 1, self._buffer_size)

    def state_dict(self) -> Dict[str, Any]:
        # Dataset rows come back from the dataset, unless the ring has overwritten some.
        wrapped = self._size == self._buffer_size
        first = 0 if wrapped else self._loaded
        return {
            "first": first,
            "pointer": self._pointer,
            "rows": [field[first : self._size].cpu() for field in self._storage()],
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        first, last = state["first"], state["first"] + len(state["rows"][0])
        if last > self._buffer_size:
            raise ValueError(
                f"the checkpoint's buffer holds {last} rows, buffer_size is "
                f"{self._buffer_size}; use the run's own config"
            )
        for field, rows in zip(self._storage(), state["rows"], strict=True):
            field[first:last] = rows.to(self._device)
        self._pointer, self._size = state["pointer"], max(last, self._loaded)


class MixedBuffer:
    """Batches of two sources: offline rows first, then online rows."""

    def __init__(self, offline: ReplayBuffer, online: ReplayBuffer, mixing_ratio: float):
        self.offline, self.online, self.mixing_ratio = offline, online, mixing_ratio

    def sample(self, batch_size: int) -> TensorBatch:
        n_offline = int(batch_size * self.mixing_ratio)
        offline = self.offline.sample(n_offline)
        online = self.online.sample(batch_size - n_offline)
        return [torch.cat(rows) for rows in zip(offline, online, strict=True)]


def set_env_seed(env: Optional[gym.Env], seed: int) -> None:
    envs.seed(env, seed)


def set_seed(
    seed: int, env: Optional[gym.Env] = None, deterministic_torch: bool = False
) -> None:
    if env is not None:
        set_env_seed(env, seed)
    for seed_stream in (random.seed, np.random.seed, torch.manual_seed):
        seed_stream(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)
    torch.use_deterministic_algorithms(mode=deterministic_torch)


def is_goal_reached(reward: float, info: Dict) -> bool:
    return bool(info["goal_achieved"] if "goal_achieved" in info else reward > 0)


@torch.no_grad()
def eval_actor(
    env: gym.Env, actor: nn.Module, device: str, n_episodes: int, seed: int
) -> Tuple[np.ndarray, float]:
    """Raw returns (n_episodes,) of the deterministic policy, and the share of successes."""
    actor.eval()
    returns, successes = [], []
    for episode in range(n_episodes):
        state, _ = env.reset(seed=seed if episode == 0 else None)
        total, success, done = 0.0, False, False
        while not done:
            state, reward, terminated, truncated, info = env.step(
                actor.act(state, device)
            )
            done = terminated or truncated
            total += float(reward)
            success = success or is_goal_reached(reward, info)
        returns.append(total)
        successes.append(float(success))
    actor.train()
    return np.asarray(returns), float(np.mean(successes))


def return_reward_range(dataset: Dict, max_episode_steps: int) -> Tuple[float, float]:
    """Smallest and largest return of the dataset's finished episodes.

    An episode ends at a terminal or after `max_episode_steps` rows, which is upstream's rule;
    D4RL drops the time-out rows, so long episodes drift against each other.
    """
    returns, total, length = [], 0.0, 0
    for reward, done in zip(
        dataset["rewards"].tolist(), dataset["terminals"].tolist(), strict=True
    ):
        total, length = total + reward, length + 1
        if done or length == max_episode_steps:
            returns.append(total)
            total, length = 0.0, 0
    if not returns:
        raise ValueError(
            "the dataset holds no finished episode, so its return range is unknown"
        )
    return min(returns), max(returns)


def modify_reward(dataset: Dict, env_name: str, max_episode_steps: int = 1000) -> Dict:
    """Scale or shift `dataset["rewards"]` in place; returns what online rewards need."""
    rewards, args = dataset["rewards"], {}
    if is_locomotion(env_name):
        low, high = return_reward_range(dataset, max_episode_steps)
        args = {"min_ret": low, "max_ret": high, "max_episode_steps": max_episode_steps}
        rewards /= high - low  # two roundings, as upstream
        rewards *= max_episode_steps
    elif "antmaze" in env_name:
        rewards -= 1.0
    return args


def modify_reward_online(reward: float, env_name: str, **kwargs) -> float:
    if is_locomotion(env_name):
        span = kwargs["max_ret"] - kwargs["min_ret"]
        return reward / span * kwargs["max_episode_steps"]
    return reward - 1.0 if "antmaze" in env_name else reward


def is_locomotion(env_name: str) -> bool:
    return any(robot in env_name for robot in ("halfcheetah", "hopper", "walker2d"))


def asymmetric_l2_loss(u: torch.Tensor, tau: float) -> torch.Tensor:
    below = (u < 0).to(u.dtype)
    return ((tau - below).abs() * u.square()).mean()


class Squeeze(nn.Module):
    def __init__(self, dim=-1):
        super().__init__()
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.squeeze(self.dim)


class MLP(nn.Module):
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
    """What both policies share: tanh(MLP(s)) and acting in an environment."""

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
        raise NotImplementedError

    @torch.no_grad()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Executable action (A,) for a state (S,); training mode explores."""
        obs = torch.as_tensor(state, dtype=torch.float32, device=device)
        action = self.max_action * self.choose(obs.unsqueeze(0))
        return action.clamp(-self.max_action, self.max_action)[0].cpu().numpy()


class GaussianPolicy(Policy):
    """Normal(tanh(mean(s)), std), std independent of the state; samples are not squashed."""

    def __init__(self, state_dim: int, act_dim: int, *args, **kwargs):
        super().__init__(state_dim, act_dim, *args, **kwargs)
        self.log_std = nn.Parameter(torch.zeros(act_dim))

    def forward(self, obs: torch.Tensor) -> Normal:
        std = self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp()
        # Argument checks read tensors on the host; they change no number.
        return Normal(self.net(obs), std, validate_args=False)

    def choose(self, obs: torch.Tensor) -> torch.Tensor:
        policy_out = self(obs)
        return policy_out.sample() if self.training else policy_out.mean


class DeterministicPolicy(Policy):
    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.net(obs)

    choose = forward


class TwinQ(nn.Module):
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
    def __init__(self, state_dim: int, hidden_dim: int = 256, n_hidden: int = 2):
        super().__init__()
        widths = [state_dim] + n_hidden * [hidden_dim] + [1]
        self.v = MLP(widths, squeeze_output=True)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.v(state)


class ImplicitQLearning:
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
        dare: Optional[DareIQLConfig] = None,
        dare_generator: Optional[torch.Generator] = None,
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
        self.dare = dare
        self.dare_generator = (
            dare_generator  # private: the baseline's draws stay the same
        )

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [self.q_optimizer, self.v_optimizer, self.actor_optimizer]

    def start_online(self, actor_lr: Optional[float] = None) -> None:
        """End the cosine schedule: online the actor's rate is constant, by default the first."""
        self.anneal = False
        for group in self.actor_optimizer.param_groups:
            group["lr"] = actor_lr or group["initial_lr"]

    def _noise(
        self, actions: torch.Tensor, weight: Optional[torch.Tensor]
    ) -> Optional[torch.Tensor]:
        """Normal noise of all policy samples of one update, (1 + backup_actions, B, A)."""
        if weight is None:
            return None
        shape = (1 + self.dare.backup_actions, *actions.shape)
        return torch.randn(shape, generator=self.dare_generator, device=actions.device)

    def _propose(
        self, policy_out: Union[Normal, torch.Tensor], noise: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Executable policy actions (n, B, A) and log-densities (n, B) for noise (n, B, A)."""
        if isinstance(policy_out, torch.Tensor):
            return policy_out.unsqueeze(0), torch.zeros_like(policy_out[:, 0]).unsqueeze(
                0
            )
        actions = policy_out.mean + policy_out.stddev * noise
        log_prob = policy_out.log_prob(actions).sum(-1)
        return actions.clamp(-self.max_action, self.max_action), log_prob

    @torch.no_grad()
    def _max_backup(
        self, next_observations: torch.Tensor, noise: torch.Tensor, first_released: int
    ) -> torch.Tensor:
        """max over policy actions of min(Q1, Q2) of the target network, (B,); Eq. 15.

        0 for the rows before `first_released`, whose weight is 1.
        """
        next_observations = next_observations[first_released:]
        policy_out = self.actor(next_observations)
        actions, _ = self._propose(policy_out, noise[:, first_released:])  # (n, B', A)
        repeated = next_observations.repeat(len(actions), 1)  # (n B', S)
        q = self.q_target(repeated, actions.flatten(0, 1))
        return F.pad(q.view(len(actions), -1).amax(0), (first_released, 0))

    def _released_losses(
        self,
        observations: torch.Tensor,
        policy_out: Union[Normal, torch.Tensor],
        noise: torch.Tensor,
        first_released: int,
    ) -> torch.Tensor:
        """SAC policy loss alpha log pi - min(Q1, Q2), (B,); Eq. 16. 0 before `first_released`."""
        actions, log_prob = self._propose(policy_out, noise)
        q = self.qf(observations[first_released:], actions[0, first_released:])
        return F.pad(
            self.dare.entropy_alpha * log_prob[0, first_released:] - q,
            (first_released, 0),
        )

    def _update_v(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        log_dict: Dict,
        weight: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        with torch.no_grad():
            target_q = self.q_target(observations, actions)
        adv = target_q - self.vf(observations)
        residual, expectile = adv, self.iql_tau
        if weight is not None and self.dare.value == "iv":
            expectile = weight * self.iql_tau + (1.0 - weight) * EXPECTILE_RELEASED
        if weight is not None and self.dare.value == "offline":
            residual = weight.sqrt() * adv  # the loss is quadratic in the residual
        v_loss = asymmetric_l2_loss(residual, expectile)
        log_dict["value_loss"] = v_loss.detach()
        compiled.descend(v_loss, self.v_optimizer)
        return adv

    def _update_q(
        self,
        next_v: torch.Tensor,
        observations: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        terminals: torch.Tensor,
        log_dict: Dict,
    ) -> None:
        y = rewards + (1.0 - terminals) * self.discount * next_v
        q1, q2 = self.qf.both(observations, actions)
        q_loss = (F.mse_loss(q1, y) + F.mse_loss(q2, y)) / 2
        log_dict["q_loss"] = q_loss.detach()
        compiled.descend(q_loss, self.q_optimizer)
        soft_update(self.q_target, self.qf, self.tau)

    def _update_policy(
        self,
        adv: torch.Tensor,
        observations: torch.Tensor,
        actions: torch.Tensor,
        log_dict: Dict,
        weight: Optional[torch.Tensor] = None,
        first_released: Optional[int] = None,
        noise: Optional[torch.Tensor] = None,
    ) -> None:
        policy_out = self.actor(observations)
        if isinstance(policy_out, Normal):
            bc_losses = -policy_out.log_prob(actions).sum(-1)  # (B,)
        else:
            bc_losses = (policy_out - actions).square().sum(-1)  # (B,)
        exp_adv = (self.beta * adv.detach()).exp().clamp(max=EXP_ADV_MAX)  # (B,)
        policy_losses = exp_adv * bc_losses  # (B,)
        if weight is not None and self.dare.policy == "sac":
            released = self._released_losses(
                observations, policy_out, noise[:1], first_released or 0
            )
            policy_losses = weight * policy_losses + (1.0 - weight) * released
        policy_loss = policy_losses.mean()
        log_dict["actor_loss"] = policy_loss.detach()
        compiled.descend(policy_loss, self.actor_optimizer)

    def train(
        self,
        batch: TensorBatch,
        weight: Optional[torch.Tensor] = None,
        first_released: Optional[int] = None,
    ) -> Dict[str, torch.Tensor]:
        """One update; `weight` (B,) is 1 before row `first_released` and 0 from there, if given.

        What would be multiplied by 0 is then not computed.
        """
        self.total_it += 1
        log_dict = self._update(
            *batch,
            weight,
            first_released,
            self._noise(batch[1], weight),
        )
        if self.anneal:
            self.actor_lr_schedule.step()
        return log_dict

    def _update(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        next_observations: torch.Tensor,
        dones: torch.Tensor,
        weight: Optional[torch.Tensor] = None,
        first_released: Optional[int] = None,
        noise: Optional[torch.Tensor] = None,
    ) -> Dict[str, torch.Tensor]:
        log_dict: Dict[str, torch.Tensor] = {}
        with torch.no_grad():
            next_v = self.vf(next_observations)
        if weight is not None:
            next_q = self._max_backup(next_observations, noise[1:], first_released or 0)
            next_v = weight * next_v + (1.0 - weight) * next_q
        adv = self._update_v(
            observations,
            actions,
            log_dict,
            weight,
        )
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        self._update_q(next_v, observations, actions, rewards, dones, log_dict)
        self._update_policy(
            adv,
            observations,
            actions,
            log_dict,
            weight,
            first_released,
            noise,
        )
        return log_dict

    def state_dict(self) -> Dict[str, Any]:
        return {
            **{part: getattr(self, part).state_dict() for part in CHECKPOINT_PARTS},
            "total_it": self.total_it,
            "q_target": self.q_target.state_dict(),
            "dare_generator": self.dare_generator.get_state(),
        }

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        for part in CHECKPOINT_PARTS:
            getattr(self, part).load_state_dict(state_dict[part])
        # Upstream's checkpoints have no target network; it restarts as a copy.
        self.q_target.load_state_dict(state_dict.get("q_target", state_dict["qf"]))
        self.total_it = state_dict["total_it"]
        if "dare_generator" in state_dict:
            self.dare_generator.set_state(state_dict["dare_generator"].cpu())


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> ImplicitQLearning:
    # The order of construction is the order of upstream's random draws.
    q_network = TwinQ(state_dim, action_dim).to(device)
    v_network = ValueFunction(state_dim).to(device)
    policy = DeterministicPolicy if config.iql_deterministic else GaussianPolicy
    actor = policy(state_dim, action_dim, max_action, dropout=config.actor_dropout).to(
        device
    )
    trainer = ImplicitQLearning(
        max_action=max_action,
        actor=actor,
        actor_optimizer=torch.optim.Adam(actor.parameters(), lr=config.actor_lr),
        q_network=q_network,
        q_optimizer=torch.optim.Adam(q_network.parameters(), lr=config.qf_lr),
        v_network=v_network,
        v_optimizer=torch.optim.Adam(v_network.parameters(), lr=config.vf_lr),
        iql_tau=config.iql_tau,
        beta=config.beta,
        max_steps=config.offline_iterations,
        discount=config.discount,
        tau=config.tau,
        device=device,
        dare=config.dare,
        dare_generator=torch.Generator(device).manual_seed(config.seed),
    )
    if config.compile:
        trainer._update = compiled.CompiledUpdate(trainer._update, trainer.optimizers())
    return trainer


class OnlineCollector:
    """Acts with the exploring policy, one environment step a call, into a replay buffer."""

    def __init__(
        self,
        env: gym.Env,
        buffer: ReplayBuffer,
        config: TrainConfig,
        reward_args: Dict,
        device: str,
    ):
        self.env, self.buffer, self.config = env, buffer, config
        self.reward_args, self.device = reward_args, device
        self.horizon = tasks.task(config.env).horizon
        self.max_action = float(env.action_space.high[0])
        self.state, _ = env.reset()
        self.episode_step, self.episode_return, self.success = 0, 0.0, False
        self.successes: List[float] = []  # of the finished episodes
        self.episode: Dict[str, float] = {}  # numbers of the last finished episode

    def explore(self, actor: nn.Module) -> np.ndarray:
        action = actor.act(self.state, self.device)
        if self.config.iql_deterministic:
            noise = torch.randn(action.shape) * self.config.expl_noise
            noise = noise.clamp(-self.config.noise_clip, self.config.noise_clip)
            action = np.clip(
                action + self.max_action * noise.numpy(),
                -self.max_action,
                self.max_action,
            )
        return action

    def step(self, actor: nn.Module) -> None:
        action = self.explore(actor)
        next_state, reward, terminated, truncated, info = self.env.step(action)
        self.episode_step += 1
        self.episode_return += float(reward)
        self.success = self.success or is_goal_reached(reward, info)
        # A time-out is not an end: the value of the next state still counts.
        real_done = bool(terminated) and self.episode_step < self.horizon
        if self.config.normalize_reward:
            reward = modify_reward_online(reward, self.config.env, **self.reward_args)
        self.buffer.add_transition(self.state, action, reward, next_state, real_done)
        self.state = next_state
        if not (terminated or truncated):
            return
        self.successes.append(float(self.success))
        self.episode = {
            "train_return": self.episode_return,
            "train_score": float(
                tasks.normalized_score(self.config.env, self.episode_return)
            ),
            "train_length": float(self.episode_step),
        }
        self.state, _ = self.env.reset()
        self.episode_step, self.episode_return, self.success = 0, 0.0, False

    def state_dict(self) -> Dict[str, Any]:
        return {
            "env": physics.get_state(self.env),
            "state": self.state,
            "unfinished": [self.episode_step, self.episode_return, self.success],
            "successes": self.successes,
            "episode": self.episode,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        physics.set_state(self.env, state["env"])
        self.state = state["state"]
        self.episode_step, self.episode_return, self.success = state["unfinished"]
        self.successes, self.episode = list(state["successes"]), dict(state["episode"])


def update(trainer: ImplicitQLearning, source: Any, config: TrainConfig) -> Dict:
    """One gradient step on a fresh batch of the source."""
    if isinstance(source, DareHook):
        batch, weight, dare_log = source.sample(config.batch_size)
        log_dict = trainer.train(batch, weight, source.first_released(len(weight)))
        return {**log_dict, **dare_log, **source.follow()}
    batch = source.sample(config.batch_size)
    return trainer.train(batch)


def make_hook(
    config: TrainConfig,
    trainer: ImplicitQLearning,
    offline: ReplayBuffer,
    online: ReplayBuffer,
    behavior: Any,
    dataset: Any,
    state_mean: np.ndarray,
    state_std: np.ndarray,
) -> DareHook:
    q_scale = 1.0
    if config.dare.scales_q:
        horizon = tasks.task(config.env).horizon
        min_ret, max_ret = return_reward_range(dataset.arrays, horizon)
        q_scale = energy_q_scale(config.env, max_ret - min_ret)
    return DareHook(
        offline,
        online,
        config.dare,
        behavior,
        policy_log_prob=clipped_log_prob(trainer.actor, trainer.max_action),
        clipped_policy=True,
        q_function=trainer.q_target,
        q_scale=q_scale,
        mixing_ratio=config.mixing_ratio,
        state_mean=state_mean,
        state_std=state_std,
        max_action=trainer.max_action,
        device=trainer.device,
        seed=config.seed,
        compile=config.compile,
    )


class Evaluator:
    """Evaluates the deterministic policy; for goal tasks also success rate and regret."""

    def __init__(
        self,
        env: gym.Env,
        config: TrainConfig,
        device: str,
        collector: OnlineCollector,
    ):
        self.env, self.config, self.device = env, config, device
        self.collector = collector
        self.successes: List[float] = []  # success rate of every online evaluation

    def evaluate(
        self, run: runs.Run, actor: nn.Module, step: int, phase: str
    ) -> Dict[str, float]:
        config = self.config
        seed = config.seed if config.compat else config.eval_seed
        returns, success = eval_actor(
            self.env, actor, self.device, config.n_episodes, seed
        )
        scores = tasks.normalized_score(config.env, returns)
        logs = {"d4rl_normalized_score": run.evaluation(step, phase, returns, scores)}
        if phase == "online" and config.env.startswith(ENVS_WITH_GOAL):
            self.successes.append(success)
            # Upstream's regret is that of the training episodes.
            counted = self.collector.successes if config.compat else self.successes
            logs["success_rate"] = success
            logs["regret"] = 1.0 - float(np.mean(counted)) if counted else float("nan")
        return logs

    def state_dict(self) -> Dict[str, Any]:
        return {"successes": self.successes}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.successes = list(state["successes"])


def save_corl_checkpoint(config: TrainConfig, trainer: Any, t: int) -> None:
    """CORL's `checkpoint_N.pt`, when `checkpoints_path` asks for it."""
    if config.checkpoints_path is not None:
        folder = Path(config.checkpoints_path)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.save_checkpoint(folder / f"checkpoint_{t}.pt", trainer.state_dict())


def seconds_per_update(
    config: TrainConfig, source: Any, dims: Tuple[int, int], device: str
) -> float:
    """Measured on a throw-away trainer; the random streams are put back afterwards."""
    streams = checkpoints.rng_state()
    # Not compiled: that would cost more time than it measures.
    config = dataclasses.replace(config, compile=False)
    probe = make_trainer(config, *dims, 1.0, device)
    update(probe, source, config)  # warms up
    start, count = time.perf_counter(), 0
    while count < 10 and time.perf_counter() - start < 2.0:
        update(probe, source, config)
        count += 1
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / count
    checkpoints.set_rng_state(streams)
    return seconds


def announce(seconds: Dict[str, float], device: str) -> None:
    """Print what the phases will take, evaluations not counted."""
    total = sum(seconds.values())
    parts = ", ".join(f"{k} {machine.readable_time(v)}" for k, v in seconds.items())
    print(f"estimated time on this {device}: {machine.readable_time(total)} ({parts})")
    if total > 3600:
        print(f"for a first look in minutes: --config {QUICK_START}")


def load_data(config: TrainConfig) -> Tuple[Any, Dict, np.ndarray, np.ndarray]:
    """Dataset with rewards and states as trained on, reward arguments, state mean and std."""
    dataset = sources.resolve(
        config.env,
        source=config.dataset_source,
        path=config.dataset_path,
        rows=config.dataset_rows,
    )
    data = dataset.arrays
    if len(data["rewards"]) > config.buffer_size:
        raise ValueError(
            f"buffer_size {config.buffer_size} is smaller than the dataset of "
            f"{len(data['rewards'])} rows; set it to at least {len(data['rewards'])}"
        )
    reward_args = modify_reward(data, config.env) if config.normalize_reward else {}
    state_mean, state_std = np.zeros(1, np.float32), np.ones(1, np.float32)
    if config.normalize:
        state_mean, state_std = compute_mean_std(data["observations"], eps=1e-3)
    for key in ("observations", "next_observations"):
        data[key] = normalize_states(data[key], state_mean, state_std)
    return dataset, reward_args, state_mean, state_std


def train(config: TrainConfig) -> Dict[str, Any]:
    """The whole experiment; returns what the run folder's summary.json says."""
    device = machine.pick_device(config.device)
    machine.configure_threads(config.threads)
    task = tasks.task(config.env)
    env = envs.make(config.env, config.env_backend)
    eval_env = envs.make(config.env, config.env_backend)
    with runs.Run(config, ALGORITHM, COLUMNS) as run:
        dataset, reward_args, state_mean, state_std = load_data(config)
        run.dataset = dataset.provenance
        env = wrap_env(env, state_mean, state_std)
        eval_env = wrap_env(eval_env, state_mean, state_std)

        dims = task.state_dim, task.action_dim
        buffer = ReplayBuffer(*dims, config.buffer_size, device, config.compat)
        buffer.load_d4rl_dataset(dataset.arrays)
        online_buffer, online_source = buffer, buffer
        if config.mixing_ratio is not None:
            online_buffer = ReplayBuffer(*dims, config.buffer_size, device)
            online_source = MixedBuffer(buffer, online_buffer, config.mixing_ratio)

        max_action = float(env.action_space.high[0])
        set_seed(config.seed, env)
        set_env_seed(eval_env, config.eval_seed)
        trainer = make_trainer(config, *dims, max_action, device)
        if config.load_model:
            trainer.load_state_dict(
                checkpoints.load_corl_checkpoint(config.load_model, CHECKPOINT_PARTS)
            )
        collector = OnlineCollector(env, online_buffer, config, reward_args, device)
        evaluator = Evaluator(eval_env, config, device, collector)
        parts = {
            "trainer": trainer,
            "online_buffer": online_buffer,
            "collector": collector,
            "evaluator": evaluator,
        }
        update_seconds = seconds_per_update(config, buffer, dims, device)
        seconds = {
            "offline": config.offline_iterations * update_seconds,
            "online": config.online_iterations * config.utd * update_seconds,
        }
        hook_args = (dataset, state_mean, state_std)
        if config.dare.enabled:
            untrained = new_behavior(config.dare, *dims, config.seed, device)
            eager = dataclasses.replace(config, compile=False)
            probe = make_hook(eager, trainer, buffer, buffer, untrained, *hook_args)
            update_seconds = seconds_per_update(config, probe, dims, device)
            seconds["online"] = config.online_iterations * config.utd * update_seconds
            seconds.update(seconds_to_prepare(probe))
        announce(seconds, device)
        if config.dare.enabled:
            raw_states = probe.raw(buffer._states[: buffer._size])
            del probe  # its caches can take gigabytes
            behavior = fit_behavior(
                config.dare,
                raw_states,
                buffer._actions[: buffer._size],
                dataset_hash=dataset.provenance["sha256"],
                cache_dir=sources.cache_folder() / "behavior",
                seed=config.seed,
                device=device,
                should_stop=lambda: run.stop_requested,
            )
            online_source = make_hook(
                config, trainer, buffer, online_buffer, behavior, *hook_args
            )
            parts["hook"] = online_source
        if run.checkpoint is not None:
            run.restore(parts)

        losses: Dict[str, torch.Tensor] = {}
        for t in run.progress():
            online = t >= config.offline_iterations
            if online and trainer.anneal and not config.compat:
                trainer.start_online(config.actor_lr_online)
            if online and isinstance(online_source, DareHook):
                online_source.pretrain(
                    lambda: run.stop_requested, lambda: run.save(parts)
                )
                if run.stop_requested:
                    break
            if online:
                collector.step(trainer.actor)
            count = config.utd if online else 1
            if online and t < config.offline_iterations + config.online_warmup:
                count = 0
            with run.measured_updates(count):
                for _ in range(count):
                    losses = update(trainer, online_source if online else buffer, config)
            log_dict = {**losses, **collector.episode}
            evaluated = (t + 1) % config.eval_freq == 0
            phase = "online" if online else "offline"
            if evaluated:
                log_dict.update(evaluator.evaluate(run, trainer.actor, t + 1, phase))
            if evaluated or (t + 1) % config.log_freq == 0:
                run.log(t + 1, phase, log_dict)
            if evaluated:
                run.step = t + 1
                run.save(parts)
                save_corl_checkpoint(config, trainer, t)
        run.save(parts)  # the last weights, wherever eval_freq left off
        if run.stop_requested:
            run.interrupted()
            return {}
        return run.finish()


if __name__ == "__main__":
    main(train, TrainConfig, ignore=OTHER_BLOCKS)
