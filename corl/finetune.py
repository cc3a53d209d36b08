"""The parts of an offline-to-online run, under CORL's names where CORL has them.

An algorithm file brings its networks, losses and loop; this is the rest: replay buffers, reward
rules, the collector that acts in the environment, the evaluator, and `Session`, which opens a
run, counts its steps, logs, saves, resumes and ends it. `Session` is no framework: the loop
stands in the algorithm file.
"""

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn

from corl import checkpoints, compiled, envs, machine, physics, runs, tasks
from corl.config import FinetuneConfig
from corl.data import sources
from corl.progress import progress_bar
from corl.rollback import Snapshot

TensorBatch = List[torch.Tensor]

ENVS_WITH_GOAL = ("antmaze", "pen", "door", "hammer", "relocate")
# What every algorithm logs beside its losses.
COLUMNS = ("train_return", "train_score", "train_length", "success_rate", "regret")


# ---------------------------------------------------------------- states


def compute_mean_std(states: np.ndarray, eps: float) -> Tuple[np.ndarray, np.ndarray]:
    """Mean (S,) and standard deviation + eps (S,) of states (N, S)."""
    return states.mean(0), states.std(0) + eps


def normalize_states(states: np.ndarray, mean: np.ndarray, std: np.ndarray):
    """(states - mean) / std, of the shape of the states."""
    return (states - mean) / std


class Normalization:
    """The normalization of states: `apply` it, `undo` it.

    Args:
        mean, std: (S,), or (1,) for none.
        device: where `undo` works.
    """

    def __init__(self, mean: np.ndarray, std: np.ndarray, device: str = "cpu"):
        self.mean, self.std = mean, std
        self._mean, self._std = (
            torch.as_tensor(x, dtype=torch.float32, device=device) for x in (mean, std)
        )

    def apply(self, states: np.ndarray) -> np.ndarray:
        """Raw states (..., S) -> normalized states."""
        return normalize_states(states, self.mean, self.std)

    def undo(self, states: torch.Tensor) -> torch.Tensor:
        """Normalized states (..., S) -> raw states, but for float32 rounding."""
        return states * self._std + self._mean


def wrap_env(
    env: gym.Env,
    state_mean: Union[np.ndarray, float] = 0.0,
    state_std: Union[np.ndarray, float] = 1.0,
    reward_scale: float = 1.0,
) -> gym.Env:
    """The environment with normalized states and scaled rewards."""
    env = gym.wrappers.TransformObservation(
        env, lambda state: (state - state_mean) / state_std, env.observation_space
    )
    if reward_scale != 1.0:
        env = gym.wrappers.TransformReward(env, lambda reward: reward_scale * reward)
    return env


# ---------------------------------------------------------------- buffers


class ReplayBuffer:
    """A ring of transitions on the device.

    Args:
        state_dim, action_dim: sizes of a state and an action.
        buffer_size: transitions it can hold.
        device: of its tensors.
        compat: upstream's faults: a dataset that fills the buffer leaves the write pointer out
            of range, and rows collected online have a return-to-go of 0.
        mc_returns: keeps the return-to-go of a row as a sixth field.

    A batch holds states (B, S), actions (B, A), rewards (B, 1), next states (B, S), dones (B, 1)
    and, where they are kept, returns-to-go (B, 1).
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        buffer_size: int,
        device: str = "cpu",
        compat: bool = False,
        mc_returns: bool = False,
    ):
        self._buffer_size = buffer_size
        self._pointer = 0
        self._size = 0
        # Rows of the dataset. They are not part of a checkpoint.
        self._loaded = 0
        self._compat = compat
        self._device = device

        # Zeros of the whole capacity: the operating system hands out pages on first write.
        def column(width: int) -> torch.Tensor:
            return torch.zeros((buffer_size, width), device=device)

        self._states = column(state_dim)
        self._actions = column(action_dim)
        self._rewards = column(1)
        self._next_states = column(state_dim)
        self._dones = column(1)
        if mc_returns:
            self._mc_returns = column(1)

    def _storage(self) -> TensorBatch:
        fields = [
            self._states,
            self._actions,
            self._rewards,
            self._next_states,
            self._dones,
        ]
        return fields + ([self._mc_returns] if hasattr(self, "_mc_returns") else [])

    def _to_tensor(self, data: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(data, dtype=torch.float32, device=self._device)

    def load_d4rl_dataset(self, data: Dict[str, np.ndarray]) -> None:
        """Fill an empty buffer with q-learning arrays of N rows.

        Raises:
            ValueError: the buffer is not empty, or too small.
        """
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
        if hasattr(self, "_mc_returns"):
            self._mc_returns[:rows] = self._to_tensor(data["mc_returns"][..., None])
        self._size = self._loaded = rows
        self._pointer = rows if self._compat else rows % self._buffer_size

    def draw(self, batch_size: int) -> np.ndarray:
        """Row numbers (batch_size,), uniform with replacement."""
        # The legacy global generator on the host, as upstream: same seed, same batches.
        return np.random.randint(0, self._size, size=batch_size)

    def gather(self, indices: np.ndarray) -> TensorBatch:
        """The rows of these numbers (B,)."""
        rows = torch.from_numpy(indices).to(self._device)
        return [field[rows] for field in self._storage()]

    def sample(self, batch_size: int) -> TensorBatch:
        """A batch of random rows."""
        return self.gather(self.draw(batch_size))

    def add_transition(
        self,
        state: np.ndarray,
        action: np.ndarray,
        reward: float,
        next_state: np.ndarray,
        done: bool,
    ) -> None:
        """Write one row over the oldest."""
        # Nobody knows the return of a running episode: -inf bounds no value. Upstream says 0.
        mc_return = 0.0 if self._compat else -math.inf
        row = (state, action, reward, next_state, done, mc_return)
        for field, value in zip(self._storage(), row, strict=False):
            field[self._pointer] = self._to_tensor(value)
        self._pointer = (self._pointer + 1) % self._buffer_size
        self._size = min(self._size + 1, self._buffer_size)

    def state_dict(self) -> Dict[str, Any]:
        """The rows that do not come back from the dataset."""
        # Once the ring has overwritten some of the dataset's rows, that is all of them.
        wrapped = self._size == self._buffer_size
        first = 0 if wrapped else self._loaded
        return {
            "first": first,
            "pointer": self._pointer,
            "rows": [field[first : self._size].cpu() for field in self._storage()],
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore a `state_dict` into a buffer with the same dataset in it."""
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
        """A batch with `mixing_ratio` of its rows from the offline buffer."""
        n_offline = int(batch_size * self.mixing_ratio)
        offline = self.offline.sample(n_offline)
        online = self.online.sample(batch_size - n_offline)
        return [torch.cat(rows) for rows in zip(offline, online, strict=True)]


# ---------------------------------------------------------------- seeds


def set_env_seed(env: Optional[gym.Env], seed: int) -> None:
    """Seed an environment's resets and its action space."""
    envs.seed(env, seed)


def set_seed(seed: int, env: Optional[gym.Env] = None) -> None:
    """Seed the global random streams, and an environment."""
    if env is not None:
        set_env_seed(env, seed)
    for seed_stream in (random.seed, np.random.seed, torch.manual_seed):
        seed_stream(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)


# ---------------------------------------------------------------- rewards


def is_locomotion(env_name: str) -> bool:
    """Is this one of the tasks whose rewards D4RL's users scale by the span of returns?"""
    return any(robot in env_name for robot in ("halfcheetah", "hopper", "walker2d"))


def return_reward_range(dataset: Dict, max_episode_steps: int) -> Tuple[float, float]:
    """Smallest and largest return of the dataset's finished episodes.

    An episode ends at a terminal or after `max_episode_steps` rows, which is upstream's rule;
    D4RL drops the time-out rows, so long episodes drift against each other.

    Raises:
        ValueError: no episode is finished.
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


def _scale_by_span(dataset: Dict, env_name: str, max_episode_steps: int) -> Dict:
    if not is_locomotion(env_name):
        return {}
    low, high = return_reward_range(dataset, max_episode_steps)
    dataset["rewards"] /= high - low  # two roundings, as upstream
    dataset["rewards"] *= max_episode_steps
    return {"min_ret": low, "max_ret": high, "max_episode_steps": max_episode_steps}


def modify_reward(dataset: Dict, env_name: str, max_episode_steps: int = 1000) -> Dict:
    """Change `dataset["rewards"]` (N,) in place; returns what online rewards need.

    Locomotion: scaled so that returns span `max_episode_steps`. Antmaze: reward - 1.
    """
    args = _scale_by_span(dataset, env_name, max_episode_steps)
    if "antmaze" in env_name:
        dataset["rewards"] -= 1.0
    return args


def modify_reward_online(reward: float, env_name: str, **kwargs) -> float:
    """The same for one reward; `kwargs` is what `modify_reward` returned."""
    if is_locomotion(env_name):
        span = kwargs["max_ret"] - kwargs["min_ret"]
        return reward / span * kwargs["max_episode_steps"]
    return reward - 1.0 if "antmaze" in env_name else reward


def modify_reward_linear(
    dataset: Dict,
    env_name: str,
    max_episode_steps: int = 1000,
    reward_scale: float = 1.0,
    reward_bias: float = 0.0,
) -> Dict:
    """The rule of the CQL family: `modify_reward` for locomotion, then scale and bias."""
    args = _scale_by_span(dataset, env_name, max_episode_steps)
    dataset["rewards"] = dataset["rewards"] * reward_scale + reward_bias
    return {**args, "reward_scale": reward_scale, "reward_bias": reward_bias}


def modify_reward_linear_online(
    reward: float,
    env_name: str,
    reward_scale: float = 1.0,
    reward_bias: float = 0.0,
    **kwargs,
) -> float:
    """The same for one reward; `kwargs` is what `modify_reward_linear` returned."""
    if is_locomotion(env_name):
        reward = modify_reward_online(reward, env_name, **kwargs)
    return reward * reward_scale + reward_bias


class RewardRule(NamedTuple):
    """How `normalize_reward` changes rewards.

    offline: (dataset, task name, config) -> arguments of `online`; changes the dataset.
    online: (reward, task name, **arguments) -> reward.
    """

    offline: Callable[[Dict, str, Any], Dict]
    online: Callable[..., float]


SPAN_REWARDS = RewardRule(
    lambda dataset, env, config: modify_reward(dataset, env), modify_reward_online
)
LINEAR_REWARDS = RewardRule(
    lambda dataset, env, config: modify_reward_linear(
        dataset,
        env,
        reward_scale=config.reward_scale,
        reward_bias=config.reward_bias,
    ),
    modify_reward_linear_online,
)


def get_return_to_go(dataset: Dict, task: tasks.Task, config: Any) -> np.ndarray:
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


# ---------------------------------------------------------------- acting


def is_goal_reached(reward: float, info: Dict) -> bool:
    """Has a goal task been solved in this step?"""
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


class OnlineCollector:
    """Acts with the exploring policy, one environment step a call, into a replay buffer.

    Args:
        env: training environment, seeded.
        buffer: gets the transitions.
        task: the environment's task.
        device: of the policy.
        reward: reward -> reward to store.
    """

    def __init__(
        self,
        env: gym.Env,
        buffer: ReplayBuffer,
        task: tasks.Task,
        device: str,
        reward: Callable[[float], float] = float,
    ):
        self.env, self.buffer, self.task = env, buffer, task
        self.device, self.reward = device, reward
        self.state, _ = env.reset()
        self.episode_step, self.episode_return, self.success = 0, 0.0, False
        self.successes: List[float] = []  # one for each finished episode
        self.episode: Dict[str, float] = {}  # numbers of the last finished episode

    def step(
        self,
        actor: nn.Module,
        explore: Optional[Callable[[np.ndarray], np.ndarray]] = None,
    ) -> None:
        """One environment step of the actor, which is in training mode.

        `explore` maps its action (A,) to the one that is executed.
        """
        action = actor.act(self.state, self.device)
        if explore is not None:
            action = explore(action)
        next_state, reward, terminated, truncated, info = self.env.step(action)
        self.episode_step += 1
        self.episode_return += float(reward)
        self.success = self.success or is_goal_reached(reward, info)
        # A time-out is not an end: the value of the next state still counts.
        real_done = bool(terminated) and self.episode_step < self.task.horizon
        self.buffer.add_transition(
            self.state, action, self.reward(reward), next_state, real_done
        )
        self.state = next_state
        if terminated or truncated:
            self._finish_episode()

    def _finish_episode(self) -> None:
        self.successes.append(float(self.success))
        self.episode = {
            "train_return": self.episode_return,
            "train_score": float(
                tasks.normalized_score(self.task.name, self.episode_return)
            ),
            "train_length": float(self.episode_step),
        }
        self.state, _ = self.env.reset()
        self.episode_step, self.episode_return, self.success = 0, 0.0, False

    def state_dict(self) -> Dict[str, Any]:
        """The environment's state and the running episode's numbers."""
        return {
            "env": physics.get_state(self.env),
            "state": self.state,
            "unfinished": [self.episode_step, self.episode_return, self.success],
            "successes": self.successes,
            "episode": self.episode,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        physics.set_state(self.env, state["env"])
        self.state = state["state"]
        self.episode_step, self.episode_return, self.success = state["unfinished"]
        self.successes, self.episode = list(state["successes"]), dict(state["episode"])


class Evaluator:
    """Evaluates the deterministic policy; for goal tasks also success rate and regret."""

    def __init__(
        self,
        env: gym.Env,
        config: FinetuneConfig,
        device: str,
        collector: OnlineCollector,
    ):
        self.env, self.config, self.device = env, config, device
        self.collector = collector
        self.successes: List[float] = []  # success rate of every online evaluation

    def evaluate(
        self, run: runs.Run, actor: nn.Module, step: int, phase: str
    ) -> Dict[str, float]:
        """Write the episodes down; returns the metrics of this evaluation."""
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
        """The success rates so far."""
        return {"successes": self.successes}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.successes = list(state["successes"])


# ---------------------------------------------------------------- data


class Sizes(NamedTuple):
    """What a network has to know of a task."""

    state_dim: int
    action_dim: int
    max_action: float


class Data(NamedTuple):
    """A dataset as it is trained on.

    arrays: q-learning arrays of N rows, states normalized, rewards scaled.
    provenance: where they come from.
    normalization: of the states.
    reward_args: what the online reward rule needs.
    """

    arrays: Dict[str, np.ndarray]
    provenance: Dict[str, Any]
    normalization: Normalization
    reward_args: Dict[str, Any]


def load_data(config: Any, task: tasks.Task, device: str = "cpu") -> Data:
    """Find a config's dataset and prepare it for training.

    The config's class may say `REWARDS`, what `normalize_reward` does, and `MC_RETURNS`, whether
    rows need their return-to-go.

    Raises:
        ValueError, RuntimeError: see `sources.resolve`; a dataset larger than the buffer.
    """
    dataset = sources.resolve(
        config.env,
        source=config.dataset_source,
        path=config.dataset_path,
        rows=config.dataset_rows,
    )
    arrays = dataset.arrays
    if len(arrays["rewards"]) > config.buffer_size:
        raise ValueError(
            f"buffer_size {config.buffer_size} is smaller than the dataset of "
            f"{len(arrays['rewards'])} rows; set it to at least {len(arrays['rewards'])}"
        )
    reward_args = {}
    if config.normalize_reward:
        reward_args = reward_rule(config).offline(arrays, config.env, config)
    if keeps_mc_returns(config):
        arrays["mc_returns"] = get_return_to_go(arrays, task, config)
    mean, std = np.zeros(1, np.float32), np.ones(1, np.float32)
    if config.normalize:
        mean, std = compute_mean_std(arrays["observations"], eps=1e-3)
    normalization = Normalization(mean, std, device)
    for key in ("observations", "next_observations"):
        arrays[key] = normalization.apply(arrays[key])
    return Data(arrays, dataset.provenance, normalization, reward_args)


def reward_rule(config: Any) -> RewardRule:
    """What `normalize_reward` does for this algorithm."""
    return getattr(config, "REWARDS", SPAN_REWARDS)


def keeps_mc_returns(config: Any) -> bool:
    """Does this algorithm need returns-to-go?"""
    return getattr(config, "MC_RETURNS", False)


def new_buffer(config: Any, task: tasks.Task, device: str = "cpu") -> ReplayBuffer:
    """An empty buffer of a config's size."""
    return ReplayBuffer(
        task.state_dim,
        task.action_dim,
        config.buffer_size,
        device,
        config.compat,
        keeps_mc_returns(config),
    )


def add_noise(
    action: np.ndarray, max_action: float, scale: float, clip: float
) -> np.ndarray:
    """An action (A,) with clipped normal noise, clipped to the bounds: TD3's exploration."""
    noise = (torch.randn(action.shape) * scale).clamp(-clip, clip)
    return np.clip(action + max_action * noise.numpy(), -max_action, max_action)


# ---------------------------------------------------------------- the session


class Session:
    """A run from its start to its end: device, data, environments, seeds, folder and steps.

        with Session(config, __file__, COLUMNS) as session:
            trainer = session.keep("trainer", make_trainer(...), loads=CHECKPOINT_PARTS)
            session.start(offline=..., online=...)
            for _ in session.offline(trainer.actor):
                session.log(...)
            session.switch(...)
            for _ in session.online(trainer.actor):
                losses = {}
                for _ in session.updates():
                    losses = ...
                session.log(losses)
            return session.finish()

    Everything that a checkpoint holds exists before `start`. Inside the block there are
        device, task, sizes;
        normalization: of the states;
        offline_buffer, online_buffer: one and the same without `mixing_ratio`;
        mixed: where online batches come from without any method;
        run: the run folder.

    Args:
        config: the algorithm's config.
        file: the algorithm's file; its name is the algorithm's.
        columns: metrics that the algorithm logs.

    Raises:
        ValueError, RuntimeError, ImportError: bad settings, data or environment, before any
            training.
    """

    def __init__(self, config: Any, file: str, columns: Sequence[str]):
        self.config = config
        self.device = machine.pick_device(config.device)
        machine.configure_threads(config.threads)
        self.task = tasks.task(config.env)
        self._env = envs.make(config.env, config.env_backend)
        self._eval_env = envs.make(config.env, config.env_backend)
        self._algorithm, self._columns = Path(file).stem, [*columns, *COLUMNS]
        self._parts: Dict[str, Any] = {}
        self._total = config.offline_iterations + config.online_iterations
        self._clock: Optional[float] = None  # when the running updates began

    def __enter__(self) -> "Session":
        self.run = runs.Run(self.config, self._algorithm, self._columns).__enter__()
        try:
            self._open()
        except BaseException:
            self.run.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.run.__exit__(kind, error, trace)

    def _open(self) -> None:
        config, task, device = self.config, self.task, self.device
        data = load_data(config, task, device)
        self.run.dataset, self.normalization = data.provenance, data.normalization
        self._rewards = {k: data.arrays[k] for k in ("rewards", "terminals")}
        mean, std = data.normalization.mean, data.normalization.std
        env = wrap_env(self._env, mean, std)
        eval_env = wrap_env(self._eval_env, mean, std)
        self.offline_buffer = new_buffer(config, task, device)
        self.offline_buffer.load_d4rl_dataset(data.arrays)
        self.online_buffer = self.mixed = self.offline_buffer
        ratio = getattr(config, "mixing_ratio", None)
        if ratio is not None:
            self.online_buffer = new_buffer(config, task, device)
            self.mixed = MixedBuffer(self.offline_buffer, self.online_buffer, ratio)
        max_action = float(env.action_space.high[0])
        self.sizes = Sizes(task.state_dim, task.action_dim, max_action)
        # Here begin the random streams: networks, batches, exploration.
        set_seed(config.seed, env)
        set_env_seed(eval_env, config.eval_seed)
        self._collector = OnlineCollector(
            env, self.online_buffer, task, device, self._reward_rule(data.reward_args)
        )
        self._evaluator = Evaluator(eval_env, config, device, self._collector)
        self.keep("online_buffer", self.online_buffer)
        self.keep("collector", self._collector)
        self.keep("evaluator", self._evaluator)

    def _reward_rule(self, args: Dict[str, Any]) -> Callable[[float], float]:
        if not self.config.normalize_reward:
            return lambda reward: reward
        rule, env = reward_rule(self.config), self.config.env
        return lambda reward: rule.online(reward, env, **args)

    # -- parts ----------------------------------------------------------------------------

    def keep(self, name: str, part: Any, loads: Sequence[str] = ()) -> Any:
        """Put a part into every checkpoint; returns it.

        Args:
            name: its name in checkpoints.
            part: has `state_dict` and `load_state_dict`. It may have `estimate(seconds_of)`, the
                seconds of what it does before the first step, and `begin(should_stop)`, which
                does that.
            loads: the keys of CORL's checkpoints that `part.load_weights` reads; then
                `load_model` is loaded into it.
        """
        if loads and self.config.load_model:
            state = checkpoints.load_corl_checkpoint(self.config.load_model, loads)
            part.load_weights(state)
        self._parts[name] = part
        return part

    def facts(self) -> Dict[str, Any]:
        """What a plugin around the two buffers wants to know, as arguments."""
        return {
            "offline": self.offline_buffer,
            "online": self.online_buffer,
            "mixing_ratio": self.config.mixing_ratio,
            "unnormalize": self.normalization.undo,
            "max_action": self.sizes.max_action,
            "dataset_hash": self.run.dataset["sha256"],
            "cache_dir": sources.cache_folder(),
            "device": self.device,
            "seed": self.config.seed,
            "compile": compiled.function if self.config.compile else None,
            "bar": progress_bar,
        }

    def show(self, panels: Sequence[Dict[str, Any]], means: Dict[str, str]) -> None:
        """Panels for curves.png and means for the summary, see `runs.Run`."""
        self.run.panels, self.run.means = panels, means

    def return_span(self) -> float:
        """Largest minus smallest return of the dataset's finished episodes, as trained on."""
        low, high = return_reward_range(self._rewards, self.task.horizon)
        return high - low

    # -- start ----------------------------------------------------------------------------

    def start(
        self,
        offline: Callable[[], Any],
        online: Callable[[], Any],
        estimate: bool = True,
    ) -> None:
        """Say how long the run will take, do what parts do first, go on from a checkpoint.

        Args:
            offline, online: one update of each phase. They are tried on the real parts, which
                are put back afterwards, so that neither bits nor compiled graphs notice.
            estimate: False leaves the trial out.
        """
        if estimate:
            self._announce(self._estimate(offline, online))
        for part in self._parts.values():
            if hasattr(part, "begin"):
                part.begin(self.should_stop)
        if self.run.checkpoint is not None:
            self.run.restore(self._parts)

    def _estimate(
        self, offline: Callable[[], Any], online: Callable[[], Any]
    ) -> Dict[str, float]:
        first = self.config.offline_iterations
        left = {
            "offline": (max(first - self.run.step, 0), offline),
            "online": (
                (self._total - max(first, self.run.step)) * self.config.utd,
                online,
            ),
        }
        untouched = self.offline_buffer, self.online_buffer, self._collector
        snapshot = Snapshot(self._parts.values(), (*untouched, self._evaluator))
        seconds: Dict[str, float] = {}
        with self._lent_rows():
            for part in self._parts.values():
                if hasattr(part, "estimate"):
                    seconds.update(part.estimate(self._seconds_of))
            for phase, (count, update) in left.items():
                if count:
                    seconds[phase] = count * self._seconds_per_call(update)
        snapshot.restore()
        return seconds

    @contextmanager
    def _lent_rows(self) -> Iterator[None]:
        """The online buffer, still empty, shows the dataset's rows."""
        offline, online = self.offline_buffer, self.online_buffer
        own = dict(vars(online))
        lent = {k: v for k, v in vars(offline).items() if isinstance(v, torch.Tensor)}
        vars(online).update(lent, _size=offline._size)
        try:
            yield
        finally:
            vars(online).update(own)

    def _seconds_of(self, work: Callable[[], Any]) -> float:
        def now() -> float:
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
            return time.perf_counter()

        start = now()
        work()
        return now() - start

    def _seconds_per_call(self, work: Callable[[], Any]) -> float:
        work()  # warms up, and compiles
        seconds = [self._seconds_of(work)]
        while len(seconds) < 10 and sum(seconds) < 2.0:
            seconds.append(self._seconds_of(work))
        return sum(seconds) / len(seconds)

    def _announce(self, seconds: Dict[str, float]) -> None:
        total = sum(seconds.values())
        parts = ", ".join(f"{k} {machine.readable_time(v)}" for k, v in seconds.items())
        print(
            f"estimated time on this {self.device}, evaluations not counted: "
            f"{machine.readable_time(total)} ({parts or 'nothing is left to do'})"
        )
        if total > 3600 and self.config.QUICK_START:
            print(f"for a first look in minutes: --config {self.config.QUICK_START}")

    # -- steps ----------------------------------------------------------------------------

    def should_stop(self) -> bool:
        """Has somebody asked the run to stop?"""
        return self.run.stop_requested

    def offline(self, actor: nn.Module) -> Iterator[int]:
        """The offline steps that are left, one update each; `actor` is evaluated."""
        self._phase, self._actor = "offline", actor
        for t in self.run.steps("offline", self.config.offline_iterations):
            self._count(1)
            yield t

    @property
    def goes_online(self) -> bool:
        """Does the next step belong to the online phase?"""
        begun = self.config.offline_iterations <= self.run.step < self._total
        return begun and not self.run.stop_requested

    def switch(self, change: Callable[[], Any]) -> None:
        """Make the change from the offline to the online phase, once, at the crossing.

        What it changes must be in the parts' `state_dict`.
        """
        if self.goes_online and not self.run.switched:
            change()
            self.run.switched = True

    def online(
        self,
        actor: nn.Module,
        explore: Optional[Callable[[np.ndarray], np.ndarray]] = None,
    ) -> Iterator[int]:
        """The online steps that are left, one environment step each, made before the body.

        Args:
            actor: acts, and is evaluated.
            explore: action (A,) -> action to execute; default: the actor's own.
        """
        self._phase, self._actor = "online", actor
        for t in self.run.steps("online", self._total):
            self._collector.step(actor, explore)
            yield t

    def updates(self) -> Iterator[int]:
        """The updates that belong to this environment step: `utd`, none in the warm-up."""
        online = self.run.step - self.config.offline_iterations
        count = self.config.utd if online >= self.config.online_warmup else 0
        self._count(count)
        yield from range(count)
        self._stop_clock()

    def _count(self, updates: int) -> None:
        self.run.updates += updates
        self._clock = time.perf_counter()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self.run.update_seconds += time.perf_counter() - self._clock
        self._clock = None

    def log(self, metrics: Dict[str, Any]) -> None:
        """End a step: evaluate, write a row of metrics, save, each when its time has come.

        Args:
            metrics: numbers and 0-d tensors, which are read only when a row is written.
        """
        self._stop_clock()
        config, step = self.config, self.run.step + 1
        metrics = {**metrics, **self._collector.episode}
        evaluated = step % config.eval_freq == 0
        if evaluated:
            metrics.update(
                self._evaluator.evaluate(self.run, self._actor, step, self._phase)
            )
        if evaluated or step % config.log_freq == 0:
            self.run.log(step, self._phase, metrics)
        if evaluated:
            self.run.step = step
            self.save()
            self._save_corl_checkpoint(step)

    def save(self) -> None:
        """Write checkpoint.pt."""
        self.run.save(self._parts)

    def _save_corl_checkpoint(self, step: int) -> None:
        if self.config.checkpoints_path is None:
            return
        folder = Path(self.config.checkpoints_path)
        folder.mkdir(parents=True, exist_ok=True)
        # CORL counts from 0.
        path = folder / f"checkpoint_{step - 1}.pt"
        checkpoints.save_corl_checkpoint(path, self._parts["trainer"].state_dict())

    def finish(self) -> Dict[str, Any]:
        """Save and end the run; returns its summary, or {} where it was asked to stop."""
        self.save()  # the last weights, wherever eval_freq left off
        if self.run.stop_requested:
            self.run.interrupted()
            return {}
        return self.run.finish()
