"""Calibrated Q-Learning, offline then online (CORL's finetune Cal-QL on today's stack).

Paper: Nakamoto et al. 2023, https://arxiv.org/abs/2303.05479. Names, config fields, order of
updates, checkpoint keys and numbers are those of CORL's `algorithms/finetune/cal_ql.py` at
commit 6afec90; one update on the same weights, batch and draws gives the same parameters.

    python algorithms/cal_ql.py --config configs/cal_ql/hopper_medium.yaml

What differs from upstream, and why (`compat: true` brings the upstream behaviour back):
- After `load_model` the entropy and Lagrange multipliers go on learning. Upstream's optimizers
  keep the parameters from before the load, so that they never change again.
- The warm-up of `bc_steps` clones the dataset's actions. Upstream scores a new sample instead.
- Evaluation episodes are seeded with `eval_seed`. Upstream overwrites it with `seed`.
- A dataset that exactly fills the buffer is no special case. Upstream's write pointer is then
  out of range.
- Regret is computed from evaluation episodes. Upstream computes it from training episodes.
- Online rows carry a return-to-go of -inf, no bound. Upstream stores 0; nothing reads it, as
  calibration ends with the offline phase.
Without a switch: the multipliers live on the device; `use_automatic_entropy_tuning: false` can be
saved; `train` returns tensors, so that an update never waits for the device.
"""

import copy
import dataclasses
import math
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
from torch.distributions import (
    Distribution,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

from corl import checkpoints, compiled, envs, machine, physics, runs, tasks
from corl.config import main
from corl.data import sources

TensorBatch = List[torch.Tensor]

ALGORITHM = "cal_ql"
LOG_STD_MIN = -20.0
LOG_STD_MAX = 2.0
ALMOST_ONE = 1.0 - 1e-6  # largest action whose pre-tanh value is scored
ENVS_WITH_GOAL = ("antmaze", "pen", "door", "hammer", "relocate")
OTHER_BLOCKS = ("dare",)  # of a shared config file, left out here
QUICK_START = "configs/cal_ql/quick_start.yaml"
COLUMNS = [
    "log_pi",
    "policy_loss",
    "alpha_loss",
    "alpha",
    *(
        name.format(i)
        for name in (
            "qf{}_loss",
            "average_qf{}",
            "cql_std_q{}",
            "cql_q{}_rand",
            "cql_min_qf{}_loss",
            "cql_qf{}_diff",
            "cql_q{}_current_actions",
            "cql_q{}_next_actions",
            "bound_rate_cql_q{}_current_actions",
            "bound_rate_cql_q{}_next_actions",
        )
        for i in (1, 2)
    ),
    "average_target_q",
    "alpha_prime_loss",
    "alpha_prime",
    "train_return",
    "train_score",
    "train_length",
    "success_rate",
    "regret",
]
CHECKPOINT_PARTS = {  # keys of CORL's checkpoints and attributes of the trainer
    "actor": "actor",
    "critic1": "critic_1",
    "critic2": "critic_2",
    "critic1_target": "target_critic_1",
    "critic2_target": "target_critic_2",
    "critic_1_optimizer": "critic_1_optimizer",
    "critic_2_optimizer": "critic_2_optimizer",
    "actor_optim": "actor_optimizer",
    "sac_log_alpha": "log_alpha",
    "sac_log_alpha_optim": "alpha_optimizer",
    "cql_log_alpha": "log_alpha_prime",
    "cql_log_alpha_optim": "alpha_prime_optimizer",
}


@dataclass
class TrainConfig:
    # Experiment
    device: str = "auto"  # auto, cpu, cuda
    env: str = "halfcheetah-medium-expert-v2"  # D4RL task name
    seed: int = 0  # seeds networks, batches, exploration and the training environment
    eval_seed: int = 0  # seeds the evaluation episodes
    eval_freq: int = 5000  # updates between two evaluations
    n_episodes: int = 10  # episodes per evaluation
    offline_iterations: int = 1000000  # updates on the dataset alone
    online_iterations: int = 1000000  # environment steps of fine-tuning
    checkpoints_path: Optional[str] = None  # also write CORL's checkpoint_N.pt here
    load_model: str = ""  # CORL checkpoint whose weights to start from
    # CQL
    buffer_size: int = 2000000  # transitions per buffer
    batch_size: int = 256  # transitions per update
    discount: float = 0.99  # discount factor
    alpha_multiplier: float = 1.0  # factor on the entropy coefficient
    use_automatic_entropy_tuning: bool = True  # learn that coefficient
    backup_entropy: bool = False  # subtract the entropy term in the TD target
    policy_lr: float = 3e-5  # actor learning rate
    qf_lr: float = 3e-4  # critics learning rate
    soft_target_update_rate: float = 5e-3  # target network update rate
    bc_steps: int = 0  # updates of behavior cloning at the start
    target_update_period: int = 1  # updates between two of the target networks
    cql_alpha: float = 10.0  # weight of the conservative gap, offline
    cql_alpha_online: float = 10.0  # the same online
    cql_n_actions: int = 10  # actions of each kind under the soft maximum
    cql_importance_sample: bool = True  # weight them by their densities
    cql_lagrange: bool = False  # learn the weight of the gap
    cql_target_action_gap: float = -1.0  # gap that the Lagrange multiplier aims at
    cql_temp: float = 1.0  # temperature of the soft maximum
    cql_max_target_backup: bool = False  # TD target: maximum over cql_n_actions
    cql_clip_diff_min: float = -np.inf  # bounds of the gap of a row
    cql_clip_diff_max: float = np.inf
    orthogonal_init: bool = (
        True  # orthogonal weights; else torch's with a small last layer
    )
    normalize: bool = True  # normalize states with the dataset's mean and std
    normalize_reward: bool = False  # locomotion: returns span 1000; then scale and bias
    q_n_hidden_layers: int = 2  # hidden layers of the critics
    reward_scale: float = 1.0  # both only with normalize_reward
    reward_bias: float = 0.0
    # Cal-QL
    mixing_ratio: float = 0.5  # offline share of an online batch
    is_sparse_reward: bool = False  # failed episodes count as endless
    # Ours
    utd: int = 1  # updates per environment step online
    online_warmup: int = 0  # online steps before the first online update
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
    group: str = "Cal-QL-D4RL"  # wandb group
    name: str = "Cal-QL"  # first part of the run folder's name

    def __post_init__(self):
        tasks.task(self.env)
        at_least = {
            1: (
                "eval_freq",
                "n_episodes",
                "batch_size",
                "buffer_size",
                "target_update_period",
                "cql_n_actions",
                "q_n_hidden_layers",
                "utd",
                "log_freq",
            ),
            0: ("offline_iterations", "online_iterations", "bc_steps", "online_warmup"),
        }
        for bound, fields in at_least.items():
            for field in fields:
                if getattr(self, field) < bound:
                    raise ValueError(
                        f"{field} must be at least {bound}, not {getattr(self, field)}"
                    )
        if self.compile:
            compiled.check()
        if not self.cql_temp > 0:
            raise ValueError(f"cql_temp must be positive, not {self.cql_temp}")
        if not self.cql_clip_diff_min <= self.cql_clip_diff_max:
            raise ValueError(
                f"cql_clip_diff_min {self.cql_clip_diff_min} lies above "
                f"cql_clip_diff_max {self.cql_clip_diff_max}"
            )
        if not 0.0 < self.mixing_ratio < 1.0:
            raise ValueError(f"mixing_ratio must lie in (0, 1), not {self.mixing_ratio}")
        if self.is_sparse_reward and not self.discount < 1.0:
            raise ValueError(
                "is_sparse_reward needs a discount below 1: r / (1 - discount)"
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
        self._mc_returns = torch.zeros((buffer_size, 1), device=device)

    def _storage(self) -> TensorBatch:
        return [
            self._states,
            self._actions,
            self._rewards,
            self._next_states,
            self._dones,
            self._mc_returns,
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
        self._mc_returns[:rows] = self._to_tensor(data["mc_returns"][..., None])
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
        # Nobody knows the return of a running episode: -inf bounds no value. Upstream says 0.
        mc_return = 0.0 if self._compat else -math.inf
        row = (state, action, reward, next_state, done, mc_return)
        for field, value in zip(self._storage(), row, strict=True):
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


def get_return_to_go(
    dataset: Dict, task: tasks.Task, config: "TrainConfig"
) -> np.ndarray:
    """Discounted return from every row to the end of its episode, (N,), float64.

    Raw observations, rewards as trained on. An episode ends at a terminal, where the next row
    does not go on from this one, and after the task's horizon. With `is_sparse_reward` an episode
    whose last reward is that of failure never ends: each of its rows gets r / (1 - discount).
    """
    rewards = dataset["rewards"]
    jump = dataset["observations"][1:] - dataset["next_observations"][:-1]
    ends = np.append(np.linalg.norm(jump, axis=1) > 1e-6, True)
    ends |= dataset["terminals"].astype(bool)
    first = np.append(0, np.flatnonzero(ends)[:-1] + 1)  # row where each stretch begins
    lengths = np.diff(np.append(first, len(rewards)))
    position = np.arange(len(rewards)) - np.repeat(first, lengths)
    ends |= (position + 1) % task.horizon == 0

    failure = task.ref_min * config.reward_scale + config.reward_bias
    returns = np.empty(len(rewards))
    values, lasts = rewards.tolist(), ends.tolist()
    total, endless = 0.0, False
    for row in range(len(values) - 1, -1, -1):
        if lasts[row]:
            endless = config.is_sparse_reward and bool(rewards[row] == failure)
            total = values[row] / (1 - config.discount) if endless else 0.0
        if not endless:
            total = values[row] + config.discount * total
        returns[row] = total
    return returns


def modify_reward(
    dataset: Dict,
    env_name: str,
    max_episode_steps: int = 1000,
    reward_scale: float = 1.0,
    reward_bias: float = 0.0,
) -> Dict:
    """Scale and shift `dataset["rewards"]`; returns what online rewards need."""
    args = {}
    if is_locomotion(env_name):
        low, high = return_reward_range(dataset, max_episode_steps)
        args = {"min_ret": low, "max_ret": high, "max_episode_steps": max_episode_steps}
        dataset["rewards"] /= high - low  # two roundings, as upstream
        dataset["rewards"] *= max_episode_steps
    dataset["rewards"] = dataset["rewards"] * reward_scale + reward_bias
    return args


def modify_reward_online(
    reward: float,
    env_name: str,
    reward_scale: float = 1.0,
    reward_bias: float = 0.0,
    **kwargs,
) -> float:
    if is_locomotion(env_name):
        span = kwargs["max_ret"] - kwargs["min_ret"]
        reward = reward / span * kwargs["max_episode_steps"]
    return reward * reward_scale + reward_bias


def is_locomotion(env_name: str) -> bool:
    return any(robot in env_name for robot in ("halfcheetah", "hopper", "walker2d"))


def extend_and_repeat(tensor: torch.Tensor, dim: int, repeat: int) -> torch.Tensor:
    return tensor.unsqueeze(dim).repeat_interleave(repeat, dim)


def init_module_weights(module: nn.Module, orthogonal_init: bool = False) -> None:
    """Orthogonal: every linear layer inside the module. Else: the module, a linear layer, small."""
    if not orthogonal_init:
        nn.init.xavier_uniform_(module.weight, gain=0.01)
        return
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
            nn.init.zeros_(layer.bias)


def relu_network(
    n_in: int, n_hidden: int, n_out: int, hidden_dim: int, orthogonal_init: bool
) -> nn.Sequential:
    widths, layers = [n_in] + n_hidden * [hidden_dim], []
    for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(hidden_dim, n_out))
    init_module_weights(network if orthogonal_init else network[-1], orthogonal_init)
    return network


class Scalar(nn.Module):
    """One trainable number."""

    def __init__(self, init_value: float):
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(init_value, dtype=torch.float32))

    def forward(self) -> nn.Parameter:
        return self.constant


class ReparameterizedTanhGaussian(nn.Module):
    """tanh of a Gaussian, with its density; the pre-tanh sample is kept, so no atanh is needed."""

    def __init__(
        self,
        log_std_min: float = LOG_STD_MIN,
        log_std_max: float = LOG_STD_MAX,
        no_tanh: bool = False,
    ):
        super().__init__()
        self.log_std_min, self.log_std_max = log_std_min, log_std_max
        self.no_tanh = no_tanh

    def _distribution(self, mean: torch.Tensor, log_std: torch.Tensor) -> Distribution:
        std = log_std.clamp(self.log_std_min, self.log_std_max).exp()
        # Argument checks read tensors on the host; they change no number.
        normal = Normal(mean, std, validate_args=False)
        if self.no_tanh:
            return normal
        squash = TanhTransform(cache_size=1)
        return TransformedDistribution(normal, squash, validate_args=False)

    def log_prob(
        self, mean: torch.Tensor, log_std: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        if not self.no_tanh:  # at the bounds the density has no finite value
            sample = sample.clamp(-ALMOST_ONE, ALMOST_ONE)
        return self._distribution(mean, log_std).log_prob(sample).sum(-1)

    def forward(
        self, mean: torch.Tensor, log_std: torch.Tensor, deterministic: bool = False
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        if deterministic:
            action = mean.tanh()
            return action, self.log_prob(mean, log_std, action)
        distribution = self._distribution(mean, log_std)
        action = distribution.rsample()
        return action, distribution.log_prob(action).sum(-1)


class TanhGaussianPolicy(nn.Module):
    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        max_action: float,
        log_std_multiplier: float = 1.0,
        log_std_offset: float = -1.0,
        orthogonal_init: bool = False,
        no_tanh: bool = False,
        hidden_dim: int = 256,
    ):
        super().__init__()
        self.max_action = max_action
        self.base_network = relu_network(
            state_dim, 3, 2 * action_dim, hidden_dim, orthogonal_init
        )
        self.log_std_multiplier = Scalar(log_std_multiplier)
        self.log_std_offset = Scalar(log_std_offset)
        self.tanh_gaussian = ReparameterizedTanhGaussian(no_tanh=no_tanh)

    def _parameters_of(
        self, observations: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.base_network(observations).chunk(2, dim=-1)
        return mean, self.log_std_multiplier() * log_std + self.log_std_offset()

    def log_prob(
        self, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """Log-density of actions (B, A) or (B, n, A) at observations (B, S), in nats."""
        if actions.ndim == 3:
            observations = extend_and_repeat(observations, 1, actions.shape[1])
        mean, log_std = self._parameters_of(observations)
        return self.tanh_gaussian.log_prob(mean, log_std, actions / self.max_action)

    def forward(
        self,
        observations: torch.Tensor,
        deterministic: bool = False,
        repeat: Optional[int] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, A), or (B, repeat, A), and their log-densities."""
        mean, log_std = self._parameters_of(observations)
        if (
            repeat is not None
        ):  # the network sees a state once, its copies share the output
            mean, log_std = (extend_and_repeat(x, 1, repeat) for x in (mean, log_std))
        actions, log_probs = self.tanh_gaussian(mean, log_std, deterministic)
        return self.max_action * actions, log_probs

    @torch.no_grad()
    def act(self, state: np.ndarray, device: str = "cpu") -> np.ndarray:
        """Executable action (A,) for a state (S,); training mode explores."""
        obs = torch.as_tensor(state, dtype=torch.float32, device=device)
        actions, _ = self(obs.unsqueeze(0), deterministic=not self.training)
        return actions[0].cpu().numpy()


class FullyConnectedQFunction(nn.Module):
    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        orthogonal_init: bool = False,
        n_hidden_layers: int = 2,
        hidden_dim: int = 256,
    ):
        super().__init__()
        self.network = relu_network(
            observation_dim + action_dim, n_hidden_layers, 1, hidden_dim, orthogonal_init
        )

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q (B,) of actions (B, A), or Q (B, n) of actions (B, n, A), at observations (B, S)."""
        if actions.ndim == 3 and observations.ndim == 2:
            observations = extend_and_repeat(observations, 1, actions.shape[1])
        return self.network(torch.cat((observations, actions), dim=-1)).squeeze(-1)


class CalQL:
    def __init__(
        self,
        critic_1: nn.Module,
        critic_1_optimizer: torch.optim.Optimizer,
        critic_2: nn.Module,
        critic_2_optimizer: torch.optim.Optimizer,
        actor: nn.Module,
        actor_optimizer: torch.optim.Optimizer,
        target_entropy: float,
        discount: float = 0.99,
        alpha_multiplier: float = 1.0,
        use_automatic_entropy_tuning: bool = True,
        backup_entropy: bool = False,
        policy_lr: float = 3e-4,
        qf_lr: float = 3e-4,
        soft_target_update_rate: float = 5e-3,
        bc_steps: int = 100000,
        target_update_period: int = 1,
        cql_n_actions: int = 10,
        cql_importance_sample: bool = True,
        cql_lagrange: bool = False,
        cql_target_action_gap: float = -1.0,
        cql_temp: float = 1.0,
        cql_alpha: float = 5.0,
        cql_max_target_backup: bool = False,
        cql_clip_diff_min: float = -np.inf,
        cql_clip_diff_max: float = np.inf,
        device: str = "cpu",
        compat: bool = False,
    ):
        self.critic_1, self.critic_2, self.actor = critic_1, critic_2, actor
        self.critic_1_optimizer = critic_1_optimizer
        self.critic_2_optimizer = critic_2_optimizer
        self.actor_optimizer = actor_optimizer
        self.target_critic_1, self.target_critic_2 = (
            copy.deepcopy(critic).to(device).requires_grad_(False)
            for critic in (critic_1, critic_2)
        )
        self.log_alpha = Scalar(0.0).to(device)
        self.alpha_optimizer = torch.optim.Adam(self.log_alpha.parameters(), policy_lr)
        self.log_alpha_prime = Scalar(1.0).to(device)
        self.alpha_prime_optimizer = torch.optim.Adam(
            self.log_alpha_prime.parameters(), qf_lr
        )
        self.device, self.compat = device, compat
        self.discount, self.target_entropy = discount, target_entropy
        self.alpha_multiplier, self.backup_entropy = alpha_multiplier, backup_entropy
        self.use_automatic_entropy_tuning = use_automatic_entropy_tuning
        self.soft_target_update_rate = soft_target_update_rate
        self.target_update_period, self.bc_steps = target_update_period, bc_steps
        self.cql_n_actions, self.cql_temp = cql_n_actions, cql_temp
        self.cql_importance_sample, self.cql_alpha = cql_importance_sample, cql_alpha
        self.cql_lagrange, self.cql_target_action_gap = (
            cql_lagrange,
            cql_target_action_gap,
        )
        self.cql_max_target_backup = cql_max_target_backup
        self.cql_clip_diff_min, self.cql_clip_diff_max = (
            cql_clip_diff_min,
            cql_clip_diff_max,
        )
        self.total_it = 0
        self._calibration_enabled = True

    def optimizers(self) -> List[torch.optim.Optimizer]:
        return [
            self.critic_1_optimizer,
            self.critic_2_optimizer,
            self.actor_optimizer,
            self.alpha_optimizer,
            self.alpha_prime_optimizer,
        ]

    def update_target_network(self, soft_target_update_rate: float) -> None:
        soft_update(self.target_critic_1, self.critic_1, soft_target_update_rate)
        soft_update(self.target_critic_2, self.critic_2, soft_target_update_rate)

    def switch_calibration(self) -> None:
        self._calibration_enabled = not self._calibration_enabled

    def start_online(self, cql_alpha: float) -> None:
        """Online the values are no longer bounded by returns; call it as often as you like."""
        if self._calibration_enabled:
            self.switch_calibration()
        self.cql_alpha = cql_alpha

    def target_q(
        self, observations: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """min(Q1, Q2) of the target networks, (B,) or (B, n)."""
        return torch.minimum(
            self.target_critic_1(observations, actions),
            self.target_critic_2(observations, actions),
        )

    def _alpha_and_alpha_loss(
        self, observations: torch.Tensor, log_pi: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        if not self.use_automatic_entropy_tuning:
            return observations.new_tensor(self.alpha_multiplier), log_pi.new_zeros(())
        log_alpha = self.log_alpha()
        alpha_loss = -(log_alpha * (log_pi + self.target_entropy).detach()).mean()
        return log_alpha.detach().exp() * self.alpha_multiplier, alpha_loss

    def _policy_loss(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        new_actions: torch.Tensor,
        alpha: torch.Tensor,
        log_pi: torch.Tensor,
        cloning: bool,
    ) -> torch.Tensor:
        if not cloning:
            critics = (self.critic_1, self.critic_2)
            goal = torch.minimum(*(c(observations, new_actions) for c in critics))
        elif self.compat:  # upstream scores a new sample instead of the data's action
            goal = self.actor(observations)[1]
        else:
            goal = self.actor.log_prob(observations, actions)
        return (alpha * log_pi - goal).mean()

    @torch.no_grad()
    def _td_target(
        self,
        next_observations: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        alpha: torch.Tensor,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """TD target and the next value in it, both (B,)."""
        if self.cql_max_target_backup:
            next_actions, next_log_pi = self.actor(
                next_observations, repeat=self.cql_n_actions
            )
            next_q, best = self.target_q(next_observations, next_actions).max(dim=-1)
            next_log_pi = next_log_pi.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        else:
            next_actions, next_log_pi = self.actor(next_observations)
            next_q = self.target_q(next_observations, next_actions)
        if self.backup_entropy:
            next_q = next_q - alpha * next_log_pi
        rewards, dones = rewards.squeeze(-1), dones.squeeze(-1)
        return rewards + (1.0 - dones) * self.discount * next_q, next_q

    @torch.no_grad()
    def _proposals(
        self, observations: torch.Tensor, next_observations: torch.Tensor, dim: int
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Actions under the soft maximum: uniform, of pi(s), of pi(s'); log-densities of pi's."""
        n = self.cql_n_actions
        uniform = observations.new_empty(len(observations), n, dim).uniform_(-1, 1)
        current, current_log_pi = self.actor(observations, repeat=n)
        following, next_log_pi = self.actor(next_observations, repeat=n)
        return uniform, current, following, current_log_pi, next_log_pi

    def _conservative_gap(
        self,
        number: int,
        critic: nn.Module,
        q_predicted: torch.Tensor,
        observations: torch.Tensor,
        proposals: Tuple[torch.Tensor, ...],
        mc_returns: torch.Tensor,
        log_dict: Dict,
    ) -> torch.Tensor:
        """Soft maximum of Q over actions minus Q of the data's action, clipped, (B,)."""
        uniform, current, following, current_log_pi, next_log_pi = proposals
        q_rand = critic(observations, uniform)
        q_current = critic(observations, current)
        q_next = critic(observations, following)  # at s, not s': as upstream
        for name, q in (("current", q_current), ("next", q_next)):
            below = (q.detach() < mc_returns).float().mean()
            log_dict[f"bound_rate_cql_q{number}_{name}_actions"] = below
        if self._calibration_enabled:
            q_current = torch.maximum(q_current, mc_returns)
            q_next = torch.maximum(q_next, mc_returns)
        plain = torch.cat((q_rand, q_predicted.unsqueeze(1), q_next, q_current), dim=1)
        q = plain
        if self.cql_importance_sample:
            uniform_log_prob = math.log(0.5 ** uniform.shape[-1])
            weighted = (q_next - next_log_pi, q_current - current_log_pi)
            q = torch.cat((q_rand - uniform_log_prob, *weighted), dim=1)
        soft_maximum = torch.logsumexp(q / self.cql_temp, dim=1) * self.cql_temp
        log_dict[f"cql_std_q{number}"] = plain.detach().std(dim=1).mean()
        for name, values in (
            ("rand", q_rand),
            ("current_actions", q_current),
            ("next_actions", q_next),
        ):
            log_dict[f"cql_q{number}_{name}"] = values.detach().mean()
        gap = soft_maximum - q_predicted
        return gap.clamp(self.cql_clip_diff_min, self.cql_clip_diff_max)

    def _conservative_gaps(
        self,
        predicted: List[torch.Tensor],
        observations: torch.Tensor,
        next_observations: torch.Tensor,
        mc_returns: torch.Tensor,
        dim: int,
        log_dict: Dict,
    ) -> List[torch.Tensor]:
        """Both critics' conservative gaps, each (B,)."""
        proposals = self._proposals(observations, next_observations, dim)
        gaps = [
            self._conservative_gap(
                number,
                critic,
                q,
                observations,
                proposals,
                mc_returns,
                log_dict,
            )
            for number, critic, q in zip(
                (1, 2), (self.critic_1, self.critic_2), predicted, strict=True
            )
        ]
        return gaps

    def _q_loss(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        next_observations: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        mc_returns: torch.Tensor,
        alpha: torch.Tensor,
        log_dict: Dict,
    ) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        critics = (self.critic_1, self.critic_2)
        predicted = [critic(observations, actions) for critic in critics]
        td_target, next_q = self._td_target(next_observations, rewards, dones, alpha)
        td_losses = [F.mse_loss(q, td_target) for q in predicted]
        gaps = self._conservative_gaps(
            predicted,
            observations,
            next_observations,
            mc_returns,
            actions.shape[-1],
            log_dict,
        )
        diffs = [gap.mean() for gap in gaps]
        if self.cql_lagrange:
            alpha_prime = self.log_alpha_prime().exp().clamp(0.0, 1000000.0)
            excess = [diff - self.cql_target_action_gap for diff in diffs]
            dual = [alpha_prime * self.cql_alpha * e.detach() for e in excess]
            alpha_prime_loss = (-dual[0] - dual[1]) * 0.5
            alpha_prime = (
                alpha_prime.detach()
            )  # the critics see the value before the step
            compiled.descend(alpha_prime_loss, self.alpha_prime_optimizer)
            penalties = [alpha_prime * self.cql_alpha * e for e in excess]
        else:
            penalties = [diff * self.cql_alpha for diff in diffs]
            alpha_prime = alpha_prime_loss = observations.new_zeros(())
        for i in (1, 2):
            log_dict[f"qf{i}_loss"] = td_losses[i - 1].detach()
            log_dict[f"average_qf{i}"] = predicted[i - 1].detach().mean()
            log_dict[f"cql_qf{i}_diff"] = diffs[i - 1].detach()
            log_dict[f"cql_min_qf{i}_loss"] = penalties[i - 1].detach()
        log_dict["average_target_q"] = next_q.mean()
        log_dict["alpha_prime"] = alpha_prime
        log_dict["alpha_prime_loss"] = alpha_prime_loss.detach()
        qf_loss = td_losses[0] + td_losses[1] + penalties[0] + penalties[1]
        return qf_loss, alpha_prime, alpha_prime_loss

    def train(
        self,
        batch: TensorBatch,
    ) -> Dict[str, torch.Tensor]:
        self.total_it += 1
        cloning = self.total_it <= self.bc_steps
        move_targets = self.total_it % self.target_update_period == 0
        return self._update(
            *batch,
            cloning,
            move_targets,
        )

    def _update(
        self,
        observations: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        next_observations: torch.Tensor,
        dones: torch.Tensor,
        mc_returns: torch.Tensor,
        cloning: bool,
        move_targets: bool,
    ) -> Dict[str, torch.Tensor]:
        new_actions, log_pi = self.actor(observations)
        alpha, alpha_loss = self._alpha_and_alpha_loss(observations, log_pi)
        policy_loss = self._policy_loss(
            observations, actions, new_actions, alpha, log_pi, cloning
        )
        log_dict = {
            "log_pi": log_pi.detach().mean(),
            "policy_loss": policy_loss.detach(),
            "alpha_loss": alpha_loss.detach(),
            "alpha": alpha,
        }
        qf_loss, _, _ = self._q_loss(
            observations,
            actions,
            next_observations,
            rewards,
            dones,
            mc_returns,
            alpha,
            log_dict,
        )
        # Every loss is computed before the first of these steps.
        if self.use_automatic_entropy_tuning:
            compiled.descend(alpha_loss, self.alpha_optimizer)
        compiled.descend(policy_loss, self.actor_optimizer)
        compiled.descend(qf_loss, self.critic_1_optimizer, self.critic_2_optimizer)
        if move_targets:
            self.update_target_network(self.soft_target_update_rate)
        return log_dict

    def state_dict(self) -> Dict[str, Any]:
        state = {k: getattr(self, v).state_dict() for k, v in CHECKPOINT_PARTS.items()}
        return {**state, "total_it": self.total_it}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        for key, attribute in CHECKPOINT_PARTS.items():
            getattr(self, attribute).load_state_dict(state_dict[key])
        self.total_it = state_dict["total_it"]


def make_trainer(
    config: TrainConfig, state_dim: int, action_dim: int, max_action: float, device: str
) -> CalQL:
    # The order of construction is the order of upstream's random draws.
    critic_1, critic_2 = (
        FullyConnectedQFunction(
            state_dim, action_dim, config.orthogonal_init, config.q_n_hidden_layers
        ).to(device)
        for _ in range(2)
    )
    actor = TanhGaussianPolicy(
        state_dim, action_dim, max_action, orthogonal_init=config.orthogonal_init
    ).to(device)
    trainer = CalQL(
        critic_1=critic_1,
        critic_1_optimizer=torch.optim.Adam(critic_1.parameters(), config.qf_lr),
        critic_2=critic_2,
        critic_2_optimizer=torch.optim.Adam(critic_2.parameters(), config.qf_lr),
        actor=actor,
        actor_optimizer=torch.optim.Adam(actor.parameters(), config.policy_lr),
        target_entropy=-float(action_dim),
        discount=config.discount,
        alpha_multiplier=config.alpha_multiplier,
        use_automatic_entropy_tuning=config.use_automatic_entropy_tuning,
        backup_entropy=config.backup_entropy,
        policy_lr=config.policy_lr,
        qf_lr=config.qf_lr,
        soft_target_update_rate=config.soft_target_update_rate,
        bc_steps=config.bc_steps,
        target_update_period=config.target_update_period,
        cql_n_actions=config.cql_n_actions,
        cql_importance_sample=config.cql_importance_sample,
        cql_lagrange=config.cql_lagrange,
        cql_target_action_gap=config.cql_target_action_gap,
        cql_temp=config.cql_temp,
        cql_alpha=config.cql_alpha,
        cql_max_target_backup=config.cql_max_target_backup,
        cql_clip_diff_min=config.cql_clip_diff_min,
        cql_clip_diff_max=config.cql_clip_diff_max,
        device=device,
        compat=config.compat,
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
        self.state, _ = env.reset()
        self.episode_step, self.episode_return, self.success = 0, 0.0, False
        self.successes: List[float] = []  # of the finished episodes
        self.episode: Dict[str, float] = {}  # numbers of the last finished episode

    def step(self, actor: nn.Module) -> None:
        action = actor.act(self.state, self.device)
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


def update(trainer: CalQL, source: Any, config: TrainConfig) -> Dict:
    """One gradient step on a fresh batch of the source."""
    batch = source.sample(config.batch_size)
    return trainer.train(batch)


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
        checkpoints.save_corl_checkpoint(
            folder / f"checkpoint_{t}.pt", trainer.state_dict()
        )


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
    reward_args = {}
    if config.normalize_reward:
        linear = {
            "reward_scale": config.reward_scale,
            "reward_bias": config.reward_bias,
        }
        reward_args = {**modify_reward(data, config.env, **linear), **linear}
    data["mc_returns"] = get_return_to_go(data, tasks.task(config.env), config)
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
        online_buffer = ReplayBuffer(*dims, config.buffer_size, device, config.compat)
        online_source = MixedBuffer(buffer, online_buffer, config.mixing_ratio)

        max_action = float(env.action_space.high[0])
        set_seed(config.seed, env)
        set_env_seed(eval_env, config.eval_seed)
        trainer = make_trainer(config, *dims, max_action, device)
        if config.load_model:
            trainer.load_state_dict(
                checkpoints.load_corl_checkpoint(config.load_model, CHECKPOINT_PARTS)
            )
            if config.compat:  # as upstream, the optimizers step what nobody reads
                trainer.log_alpha = copy.deepcopy(trainer.log_alpha)
                trainer.log_alpha_prime = copy.deepcopy(trainer.log_alpha_prime)
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
        announce(seconds, device)
        if run.checkpoint is not None:
            run.restore(parts)

        losses: Dict[str, torch.Tensor] = {}
        for t in run.progress():
            online = t >= config.offline_iterations
            if online:
                trainer.start_online(config.cql_alpha_online)
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
