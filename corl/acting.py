"""Acting in environments: seeds, wrappers, exploration, collection and evaluation."""

import os
import random
from collections.abc import Callable, Sequence
from typing import Any, Dict, List, Optional, Protocol, Tuple, Union

import gymnasium as gym
import numpy as np
import torch

from corl import envs, finite, physics, runs, tasks
from corl.buffers import ReplayBuffer
from corl.config import FinetuneConfig
from corl.data import ogbench

# The most episodes that run side by side. More would add memory, and little speed: a policy call
# for so many states is a small part of their environment steps.
TOGETHER = 16
ENVS_WITH_GOAL = ("antmaze", "pen", "door", "hammer", "relocate")


class Actor(Protocol):
    """A network that acts, as those of the algorithm files do."""

    def act(self, state: np.ndarray, device: str) -> np.ndarray:
        """State (S,) -> action (A,), or (N, S) -> (N, A); in evaluation mode without noise."""

    def train(self) -> Any:
        """Switch to training mode, in which it explores."""

    def eval(self) -> Any:
        """Switch to evaluation mode."""


class CheckedEnv(gym.Wrapper):
    """An environment that takes finite actions and hands out values that can be learned from.

    It gets the part of an action that lies inside its bounds, as D4RL's environments do.

    `reset` and `step` raise FloatingPointError where an action is not finite, and where an
    observation or a reward has no square in float32.

    Args:
        env: the environment, with raw observations and rewards.
        role: `training` or `evaluation`.
        config: of the run; it names the task and the likely cause of a bad action.
    """

    def __init__(self, env: gym.Env, role: str, config: Any):
        super().__init__(env)
        self._name, self._config = f"the {role} environment {config.env}", config
        space: Any = env.action_space
        self._low, self._high = space.low, space.high

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(**options)
        self._check(observation, "observation")
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take an action (A,)."""
        if not np.isfinite(action).all():
            raise FloatingPointError(
                f"the policy's action in {self._name} is not finite: "
                f"{finite.likely_cause(self._config)}"
            )
        result = self.env.step(np.clip(action, self._low, self._high))
        self._check(result[0], "observation")
        reward: Any = result[1]
        if not abs(reward) <= finite.LARGEST:
            self._check(reward, "reward")
        return result

    def _check(self, values: Any, what: str) -> None:
        # Not "larger than": comparisons with nan are false.
        if np.abs(values).max() <= finite.LARGEST:
            return
        values = np.atleast_1d(values).astype(float)
        place = int(np.argmax(~(np.abs(values) <= finite.LARGEST)))
        dimension = f" (dimension {place})" if len(values) > 1 else ""
        raise FloatingPointError(
            f"{self._name} gave the {what} {values[place]:g}{dimension}"
            f"{self._episode_step()}, {finite.rule(values[place])}; look for the fault in the "
            "environment"
        )

    def _episode_step(self) -> str:
        try:
            return (
                f" in step {self.env.get_wrapper_attr('_elapsed_steps')} of its episode"
            )
        except AttributeError:
            return ""


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

        def scaled(reward: Any) -> Any:
            return reward_scale * reward

        env = gym.wrappers.TransformReward(env, scaled)
    return env


def set_env_seed(env: gym.Env, seed: int) -> None:
    """Seed an environment's resets and its action space."""
    envs.seed(env, seed)


def set_seed(seed: int, env: Optional[gym.Env] = None) -> None:
    """Seed the global random streams, and an environment."""
    if env is not None:
        set_env_seed(env, seed)
    for seed_stream in (random.seed, np.random.seed, torch.manual_seed):
        seed_stream(seed)
    os.environ["PYTHONHASHSEED"] = str(seed)


def add_noise(
    action: np.ndarray, max_action: float, scale: float, clip: float
) -> np.ndarray:
    """An action (A,) with clipped normal noise, clipped to the bounds: TD3's exploration."""
    noise = (torch.randn(action.shape) * scale).clamp(-clip, clip)
    return np.clip(action + max_action * noise.numpy(), -max_action, max_action)


def is_goal_reached(reward: float, info: Dict) -> bool:
    """Has a goal task been solved in this step?"""
    for key in ("goal_achieved", "success"):
        if key in info:
            return bool(info[key])
    return reward > 0


def eval_actor(
    env: gym.Env, actor: Actor, device: str, n_episodes: int, seed: int
) -> Tuple[np.ndarray, float]:
    """Raw returns (n_episodes,) of the deterministic policy, and the share of successes."""
    returns, successes = play_episodes(env, actor, device, range(n_episodes), seed)
    return returns, float(np.mean(successes))


@torch.no_grad()
def play_episodes(
    env: gym.Env, actor: Actor, device: str, numbers: range, seed: int
) -> Tuple[np.ndarray, np.ndarray]:
    """Raw returns (n,) of the deterministic policy in some episodes, and successes (n,), 0 or 1.

    Args:
        numbers: of the episodes, in their order. All start states come from one stream, in the
            order of the episodes, whoever plays those before.
        seed: of that stream.
    """
    actor.eval()
    returns, successes = [], []
    for episode in range(numbers.stop):
        state, _ = env.reset(seed=seed if episode == 0 else None)
        if episode not in numbers:
            continue
        total, success, done = 0.0, False, False
        while not done:
            state, reward, terminated, truncated, info = env.step(
                actor.act(state, device)
            )
            done = terminated or truncated
            total += float(reward)
            success = success or is_goal_reached(float(reward), info)
        returns.append(total)
        successes.append(float(success))
    actor.train()
    return np.asarray(returns), np.asarray(successes)


class _Episode:
    """An episode that runs beside others."""

    def __init__(self, number: int, env: gym.Env, state: np.ndarray):
        self.number, self.env, self.state = number, env, state
        self.total, self.success = 0.0, False

    def step(self, action: np.ndarray) -> bool:
        """Take an action (A,); is the episode over?"""
        self.state, reward, terminated, truncated, info = self.env.step(action)
        self.total += float(reward)
        self.success = self.success or is_goal_reached(float(reward), info)
        return bool(terminated or truncated)


@torch.no_grad()
def eval_together(
    envs: Sequence[gym.Env], actor: Actor, device: str, n_episodes: int, seed: int
) -> Tuple[np.ndarray, float]:
    """As `eval_actor`, with one episode in each of the environments at a time.

    Episode i begins in the same state as there: all resets draw from one stream, in the order of
    the episodes. The policy acts on all states in one batch, whose float32 rounding depends on how
    many there are.

    Args:
        envs: of one kind, at least one; random in their resets alone.
    """
    actor.eval()
    first = envs[0].unwrapped
    waiting = iter(range(n_episodes))

    def begin(env: gym.Env) -> List[_Episode]:
        number = next(waiting, None)
        if number is None:
            return []
        if number > 0:
            env.unwrapped.np_random = first.np_random
        state, _ = env.reset(seed=seed if number == 0 else None)
        return [_Episode(number, env, state)]

    running = [episode for env in envs for episode in begin(env)]
    done: List[_Episode] = []
    while running:
        states = np.stack([episode.state for episode in running])
        actions = actor.act(states, device)
        still: List[_Episode] = []
        for episode, action in zip(running, actions, strict=True):
            if episode.step(action):
                done.append(episode)
                still += begin(episode.env)
            else:
                still.append(episode)
        running = still
    actor.train()
    done.sort(key=lambda episode: episode.number)
    returns = np.array([episode.total for episode in done])
    return returns, float(np.mean([float(episode.success) for episode in done]))


def check_reward(stored: float, raw: Any) -> None:
    """Raises FloatingPointError where a reward, as it is stored, has no square in float32."""
    if not abs(stored) <= finite.LARGEST:
        raise FloatingPointError(
            f"normalize_reward turns the reward {float(raw):g} into {float(stored):g}, "
            f"{finite.rule(stored)}; set normalize_reward to false, or look at the dataset's "
            "returns"
        )


class OnlineCollector:
    """Acts with the exploring policy, one environment step a call, into a replay buffer.

    Args:
        env: training environment, seeded.
        buffer: gets the transitions.
        task: the environment's task.
        device: of the policy.
        reward: reward -> reward to store.
        random_steps: that many first steps have uniformly random actions in place of the actor's.
    """

    def __init__(
        self,
        env: gym.Env,
        buffer: ReplayBuffer,
        task: tasks.Task,
        device: str,
        reward: Callable[[Any], float] = float,
        random_steps: int = 0,
    ):
        self.env, self.buffer, self.task = env, buffer, task
        self.device, self.reward = device, reward
        self._random_left = random_steps
        self.state, _ = env.reset()
        self.episode_step, self.episode_return, self.success = 0, 0.0, False
        self.successes: List[float] = []  # one for each finished episode
        self.episode: Dict[str, float] = {}  # numbers of the last finished episode

    def step(
        self,
        actor: Actor,
        explore: Optional[Callable[[np.ndarray], np.ndarray]] = None,
    ) -> None:
        """One environment step of the actor, which is in training mode.

        `explore` maps its action (A,) to the one that is executed.
        """

        def act(state: np.ndarray) -> np.ndarray:
            if self._random_left:
                return self._random_action()
            action = actor.act(state, self.device)
            return action if explore is None else explore(action)

        action = act(self.state)
        next_state, reward, terminated, truncated, info = self.env.step(action)
        self.episode_step += 1
        self.episode_return += float(reward)
        self.success = self.success or is_goal_reached(float(reward), info)
        # A time-out is not an end: the value of the next state still counts.
        # D4RL's environments may end in the very step of the time limit, and that counts as one.
        in_time = self.episode_step < self.task.horizon or not self.task.is_d4rls
        real_done = bool(terminated) and in_time
        stored = self.reward(reward)
        check_reward(stored, reward)
        row = (self.state, action, stored, next_state, real_done)
        # What the policy would do now: it learns before its next step.
        more = (act(next_state),) if self.buffer.keeps_next_actions else ()
        self.buffer.add_transition(*row, *more)
        self._random_left = max(self._random_left - 1, 0)
        self.state = next_state
        if terminated or truncated:
            self._finish_episode()

    def _random_action(self) -> np.ndarray:
        """An action (A,), uniform in the box."""
        space: Any = self.env.action_space
        share = torch.rand(space.shape).numpy()
        return space.low + share * (space.high - space.low)

    def _finish_episode(self) -> None:
        self.successes.append(float(self.success))
        self.episode = {
            "train_return": self.episode_return,
            "train_length": float(self.episode_step),
        }
        if self.task.scale is not tasks.RAW:
            score = self.task.normalized_score(self.episode_return)
            self.episode["train_score"] = float(score)
        self._begin_episode()

    def _begin_episode(self) -> None:
        self.state, _ = self.env.reset()
        self.episode_step, self.episode_return, self.success = 0, 0.0, False

    def state_dict(self) -> Dict[str, Any]:
        """The environment's state and the running episode's numbers."""
        state = {
            "env": physics.get_state(self.env, exact=self.task.is_d4rls),
            "state": self.state,
            "unfinished": [self.episode_step, self.episode_return, self.success],
            "successes": self.successes,
            "episode": self.episode,
        }
        # Runs that never act at random have no such entry.
        left = {"random_left": self._random_left} if self._random_left else {}
        return {**state, **left}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        again = physics.set_state(self.env, state["env"])
        self.state = state["state"]
        self.episode_step, self.episode_return, self.success = state["unfinished"]
        self.successes, self.episode = list(state["successes"]), dict(state["episode"])
        self._random_left = state.get("random_left", 0)
        if not again:
            print(
                f"{self.task.name} has no get_state and set_state, so the run goes on with a new "
                "episode, and its numbers differ from those of an unbroken one"
            )
            self._begin_episode()


class Evaluator:
    """Evaluates the deterministic policy; for goal tasks also success rate and regret.

    `more` are further environments of the same kind, for `eval_together`.
    """

    def __init__(
        self,
        env: gym.Env,
        config: FinetuneConfig,
        device: str,
        collector: OnlineCollector,
        more: Sequence[gym.Env] = (),
    ):
        self.env, self.config, self.device = env, config, device
        self.more = more
        self.collector = collector
        self.successes: List[float] = []  # success rate of every online evaluation
        # Returns and share of successes of episodes that were played elsewhere.
        self.played: Optional[Tuple[np.ndarray, float]] = None

    @property
    def seed(self) -> int:
        """Of the first start state."""
        config = self.config
        return getattr(config, config.COMPAT_EVAL_SEED if config.compat else "eval_seed")

    def evaluate(
        self,
        run: runs.Run,
        actor: Actor,
        step: int,
        phase: str,
        episodes: Optional[int] = None,
    ) -> Dict[str, float]:
        """Write the episodes down; returns the metrics of this evaluation.

        `episodes` is their number, by default `n_episodes`.
        """
        config = self.config
        played, self.played = self.played, None
        rest = actor, self.device, episodes or config.n_episodes, self.seed
        if config.eval_together:
            played = played or eval_together([self.env, *self.more], *rest)
        returns, success = played or eval_actor(self.env, *rest)
        scores = self.collector.task.normalized_score(returns)
        task = self.collector.task
        logs = {task.scale.column: run.evaluation(step, phase, returns, scores)}
        if ogbench.is_ogbench(task.name):
            # OGBench's tables have success rates.
            logs["success_rate"] = success
        elif phase == "online" and task.robot.startswith(ENVS_WITH_GOAL):
            self.successes.append(success)
            # Upstream's regret is that of the training episodes.
            counted = self.collector.successes if config.compat else self.successes
            logs["success_rate"] = success
            # Without an episode there is no regret yet.
            if counted:
                logs["regret"] = 1.0 - float(np.mean(counted))
        return logs

    def state_dict(self) -> Dict[str, Any]:
        """The success rates so far."""
        return {"successes": self.successes}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.successes = list(state["successes"])
