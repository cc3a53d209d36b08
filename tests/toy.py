"""A task whose optimum is known in closed form, run through the real `train`.

State x in [-1, 1], action a in [-1, 1], x' = clip(x + a / 2), reward -|x'|, 5 steps, then a
time-out. From x0 uniform the best policy is a = clip(-2 x): it reaches 0 in one or two steps and
returns -max(|x0| - 1/2, 0), on average -1/8. Standing still returns -2.5 on average. The
dataset's policy goes slowly the right way, a = -0.3 x + noise, and returns about -1.2.
"""

import copy
import functools

import gymnasium
import numpy as np

from corl import envs, tasks
from corl.data import sources

TASK = "toy-medium-v2"
HORIZON = 5
RETURN_STILL, RETURN_BEST = -2.5, -0.125


class ToyEnv(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def observe(self):
        return np.array([self.x, 1.0])  # a constant input must do no harm

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return self.observe(), {}

    def step(self, action):
        self.x = float(np.clip(self.x + 0.5 * np.clip(action[0], -1, 1), -1, 1))
        return self.observe(), -abs(self.x), False, False, {}

    def get_state(self):
        return {"x": self.x}

    def set_state(self, state):
        self.x = state["x"]


def make(name=TASK, backend="gymnasium"):
    return gymnasium.wrappers.TimeLimit(ToyEnv(), HORIZON)


def make_dataset(rows=4000, seed=0):
    """A dataset of its own: a run changes the arrays."""
    return copy.deepcopy(_dataset(rows, seed))


@functools.cache
def _dataset(rows, seed):
    rng = np.random.default_rng(seed)
    env, x = ToyEnv(), 0.0
    out = {k: [] for k in ("observations", "actions", "rewards", "next_observations")}
    for i in range(rows):
        if i % HORIZON == 0:
            x = rng.uniform(-1, 1)
        env.x = x
        action = np.clip(-0.3 * x + 0.4 * rng.normal(size=1), -1, 1)
        out["observations"].append(env.observe())
        next_state, reward, *_ = env.step(action)
        x = env.x
        out["actions"].append(action)
        out["rewards"].append(reward)
        out["next_observations"].append(next_state)
    arrays = {k: np.array(v, dtype=np.float32) for k, v in out.items()}
    arrays["terminals"] = np.zeros(rows, bool)
    arrays["next_actions"] = np.roll(arrays["actions"], -1, 0)
    provenance = {"source": "toy", "sha256": f"toy{rows}-{seed}", "rows": rows}
    returns = arrays["rewards"].reshape(-1, HORIZON).sum(1, dtype=np.float64)
    lengths = np.full(len(returns), HORIZON)
    provenance |= {"path": "", "label": "toy"}
    return sources.Dataset(TASK, arrays, provenance, {}, returns, lengths)


def install(monkeypatch, tmp_path):
    """Make TASK known to envs and datasets; caches go to tmp_path."""
    robot = tasks.Robot("Toy", 2, 1, RETURN_STILL, RETURN_BEST, HORIZON)
    monkeypatch.setitem(tasks.ROBOTS, "toy", robot)
    monkeypatch.setattr(envs, "make", make)
    monkeypatch.setattr(sources, "resolve", lambda *args, **kwargs: make_dataset())
    monkeypatch.setenv("CORL_DARE_CACHE", str(tmp_path / "cache"))
