"""The environments are D4RL's: numbers, rewards, limits, and exact save and restore."""

import sys
import types

import gymnasium as gym
import mujoco
import numpy as np
import pytest

from corl import envs, physics, tasks

# Written down again from D4RL's table, not read from the code under test.
REFERENCE = {
    "hopper": (-20.272305, 3234.3),
    "halfcheetah": (-280.178953, 12135.0),
    "walker2d": (1.629008, 4592.3),
    "antmaze": (0.0, 1.0),
}
# seconds per action, survival bonus, weight of the control cost (gym's v2 classes)
REWARD = {
    "hopper": (0.008, 1.0, 1e-3),
    "halfcheetah": (0.05, 0.0, 0.1),
    "walker2d": (0.008, 1.0, 1e-3),
}


def healthy(robot, qpos, qvel):
    if robot == "hopper":
        rest = np.concatenate([qpos[2:], qvel])
        return qpos[1] > 0.7 and abs(qpos[2]) < 0.2 and (np.abs(rest) < 100).all()
    return robot == "halfcheetah" or (0.8 < qpos[1] < 2.0 and -1.0 < qpos[2] < 1.0)


# ---------------------------------------------------------------- names and scores


@pytest.mark.parametrize("name", tasks.task_names())
def test_reference_scores_are_the_ends_of_the_normalized_scale(name):
    low, high = REFERENCE[name.split("-")[0]]
    scores = tasks.normalized_score(name, [low, high, (low + high) / 2])
    np.testing.assert_allclose(scores, [0.0, 100.0, 50.0], atol=1e-12)


def test_scores_of_published_returns():
    assert round(float(tasks.normalized_score("hopper-medium-v2", 1422.06)), 1) == 44.3
    assert (
        round(float(tasks.normalized_score("walker2d-expert-v2", 4920.51)), 1) == 107.1
    )
    assert tasks.normalized_score("hopper-medium-v2", np.zeros((2, 3))).shape == (2, 3)


def test_a_task_does_where_its_name_does():
    task = tasks.task("walker2d-medium-v2")
    assert tasks.task(task) is task
    expected = tasks.normalized_score("walker2d-medium-v2", [1.0, 2.0])
    for found in (
        tasks.normalized_score(task, [1.0, 2.0]),
        task.normalized_score([1, 2]),
    ):
        np.testing.assert_array_equal(found, expected)
    assert envs.make(task).unwrapped.spec.id == "Walker2d-v4"


def test_all_d4rl_tasks_are_known_once():
    names = tasks.task_names()
    assert len(names) == len(set(names)) == 3 * 6 + 6
    assert tasks.task("hopper-medium-replay-v2").kind == "medium-replay"
    assert tasks.task("antmaze-large-play-v2").state_dim == 29


@pytest.mark.parametrize(
    "name",
    ["", "hopper", "hopper-medium", "hopper-medium-v3", "ant-medium-v2", "Hopper-v4"]
    + ["hopper-umaze-v2", "antmaze-medium-v2", "hopper-medium-v2 ", "-medium-v2"],
)
def test_unknown_names_are_refused_with_a_known_one(name):
    known = "(hopper-medium|hopper-random|antmaze-medium-play)-v2"
    with pytest.raises(ValueError, match=f"^unknown task '{name}'; .*{known}"):
        tasks.task(name)


@pytest.mark.parametrize(
    "name, horizon",
    [("hopper-medium-v2", 1000), ("antmaze-umaze-v2", 700)]
    + [("antmaze-umaze-diverse-v2", 700), ("antmaze-medium-play-v2", 1000)],
)
def test_horizon(name, horizon):
    assert tasks.task(name).horizon == horizon


# ---------------------------------------------------------------- physics


@pytest.mark.parametrize("robot", REWARD)
def test_observation_reward_and_termination_are_those_of_gym_v2(robot):
    env = envs.make(f"{robot}-medium-v2")
    seconds, bonus, cost = REWARD[robot]
    env.action_space.seed(0)
    data, ends, rewards = env.unwrapped.data, 0, []
    env.reset(seed=0)
    for _ in range(300):
        before, action = data.qpos[0], env.action_space.sample()
        state, reward, terminated, truncated, _ = env.step(action)
        velocity = np.clip(data.qvel, -10, 10) if robot != "halfcheetah" else data.qvel
        np.testing.assert_array_equal(state, np.concatenate([data.qpos[1:], velocity]))
        paid = cost * np.square(action, dtype=np.float64).sum()
        # The bonus is paid in the step of the fall too; v5 does not.
        expected = (data.qpos[0] - before) / seconds + bonus - paid
        assert reward == pytest.approx(expected, abs=1e-6)
        assert terminated == (not healthy(robot, data.qpos, data.qvel))
        rewards.append(reward)
        if terminated or truncated:
            ends += 1
            env.reset()
    assert np.std(rewards) > 0.1
    assert ends == 0 if robot == "halfcheetah" else ends > 3


@pytest.mark.parametrize(
    "robot, mean, error, episodes",
    [("hopper", 18.6, 0.3, 300), ("walker2d", 2.84, 0.11, 300)]
    + [("halfcheetah", -295.0, 20.0, 30)],
)
def test_uniform_actions_earn_what_was_measured_before(robot, mean, error, episodes):
    """Mean and standard error of another measurement of gymnasium's v4 classes; D4RL's random
    files have 18.40, 1.87 and -288.80."""
    env = envs.make(f"{robot}-random-v2")
    env.action_space.seed(0)
    env.reset(seed=0)
    returns, total = [], 0.0
    while len(returns) < episodes:
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        total += reward
        if terminated or truncated:
            returns.append(total)
            total = 0.0
            env.reset()
    own = np.std(returns) / np.sqrt(episodes)
    assert own < 1.5 * max(error, 1.0)  # else the comparison says little
    assert abs(np.mean(returns) - mean) < 3 * np.hypot(own, error)


def test_actions_are_clipped_before_the_control_cost():
    outside = np.array([5.0, -5.0, 0.5, 2.0, -0.5, -7.0], np.float32)
    results = []
    for action in (outside, outside.clip(-1, 1)):
        env = envs.make_robot("halfcheetah")
        env.reset(seed=1)
        results.append(env.step(action))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    env = envs.make_robot("halfcheetah")
    env.reset(seed=1)
    unclipped = env.env.step(outside)[1]  # what the wrapper protects from
    paid = 0.1 * (np.square(outside).sum() - np.square(outside.clip(-1, 1)).sum())
    assert results[0][1] - unclipped == pytest.approx(paid, rel=1e-5)
    assert env.action_space.high.tolist() == [1.0] * 6


def test_time_limit_truncates_and_does_not_terminate():
    env = envs.make("halfcheetah-medium-v2")
    env.reset(seed=0)
    flags = [env.step(np.zeros(6, np.float32))[2:4] for _ in range(1000)]
    assert flags[-1] == (False, True)
    assert not any(terminated or truncated for terminated, truncated in flags[:-1])


@pytest.mark.parametrize(
    "version, factor",
    [("2.3.7", 1.0), ("3.3.7", 1.0), ("3.4.0", 1.0), ("3.5.0", 0.5), ("3.10.0", 0.5)]
    + [("4.0.0", 0.5), ("10.1.0", 0.5)],
)
def test_contact_margin_is_halved_from_mujoco_3_5_on(version, factor, monkeypatch):
    monkeypatch.setattr(mujoco, "__version__", version)
    env = envs.make_robot("hopper")
    plain = gym.make("Hopper-v4").unwrapped.model.geom_margin
    assert plain.max() == 0.001
    np.testing.assert_array_equal(env.unwrapped.model.geom_margin, plain * factor)


def test_making_an_environment_prints_no_warning_and_keeps_the_logger(capsys):
    level = gym.logger.min_level
    envs.make("walker2d-medium-v2")
    assert gym.logger.min_level == level
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- exact resume


def future(env, steps, rng):
    """Everything a training loop sees in its next steps, over resets."""
    seen = []
    for _ in range(steps):
        action = env.action_space.sample() if rng.random() < 0.5 else rng.normal(size=3)
        state, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        seen.append(np.concatenate([state, [reward, terminated, truncated]]))
        if terminated or truncated:
            seen.append(np.concatenate([env.reset()[0], np.zeros(3)]))
    return np.array(seen)


@pytest.mark.parametrize("before", [0, 7, 60])
def test_state_gives_a_bit_identical_future_mid_episode_and_over_resets(before):
    env = envs.make_robot("hopper")
    env.reset(seed=3)
    env.action_space.seed(3)
    future(env, before, np.random.default_rng(1))
    saved = physics.get_state(env)
    expected = future(env, 150, np.random.default_rng(2))
    assert (expected[:, -2] == 1).sum() >= 2  # falls, so the reset generator matters

    fresh = envs.make_robot("hopper")
    fresh.action_space.seed(99)
    fresh.reset(seed=99)
    future(fresh, 33, np.random.default_rng(4))
    for again in (fresh, env):
        physics.set_state(again, saved)
        found = future(again, 150, np.random.default_rng(2))
        np.testing.assert_array_equal(found, expected)


def test_state_keeps_the_elapsed_steps():
    env = envs.make_robot("halfcheetah")
    env.reset(seed=0)
    for _ in range(990):
        env.step(np.zeros(6, np.float32))
    saved = physics.get_state(env)
    fresh = envs.make_robot("halfcheetah")
    physics.set_state(fresh, saved)
    cut = [fresh.step(np.zeros(6, np.float32))[3] for _ in range(10)]
    assert cut == [False] * 9 + [True]


def test_saved_warm_start_survives_a_forward_that_writes_its_own(monkeypatch):
    def forward(model, data):  # as MuJoCo versions did that stored it in forward
        plain(model, data)
        data.qacc_warmstart[:] += 1.0

    plain = mujoco.mj_forward
    env = envs.make_robot("hopper")
    env.reset(seed=0)
    env.step(np.ones(3, np.float32))
    saved = physics.get_state(env)
    monkeypatch.setattr(mujoco, "mj_forward", forward)
    physics.set_state(env, saved)
    np.testing.assert_array_equal(physics.get_state(env)["physics"], saved["physics"])


def test_state_survives_wrappers_around_the_environment():
    env = envs.make_robot("hopper")
    shifted = gym.wrappers.TransformObservation(env, lambda s: s + 1, None)
    shifted.reset(seed=0)
    shifted.step(np.ones(3, np.float32))
    saved = physics.get_state(shifted)
    first = shifted.step(np.ones(3, np.float32))[0]
    physics.set_state(shifted, saved)
    np.testing.assert_array_equal(shifted.step(np.ones(3, np.float32))[0], first)


def test_state_of_another_environment_is_refused():
    with pytest.raises(TypeError, match="CartPoleEnv has no state to save"):
        physics.get_state(gym.make("CartPole-v1"))


# ---------------------------------------------------------------- backends


def test_impossible_environments_are_refused():
    with pytest.raises(ValueError, match="env_backend 'mujoco'"):
        envs.make("hopper-medium-v2", "mujoco")


def test_d4rl_backend_without_d4rl_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "d4rl", None)
    with pytest.raises(ImportError, match="needs the packages gym and d4rl"):
        envs.make("hopper-medium-v2", "d4rl")


@pytest.mark.parametrize("end", [5, 1000])
def test_old_gym_done_becomes_end_or_time_out(end, monkeypatch):
    class Old:
        observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        steps = 0

        def seed(self, seed):
            self.seeded = seed

        def reset(self):
            self.steps = 0
            return np.zeros(2)

        def step(self, action):
            self.steps += 1
            return np.zeros(2), np.float32(1), self.steps == end, {}

    module = types.ModuleType("gym")
    module.make = lambda name: Old()
    monkeypatch.setitem(sys.modules, "gym", module)
    monkeypatch.setitem(sys.modules, "d4rl", types.ModuleType("d4rl"))
    env = envs.make("hopper-medium-v2", "d4rl")
    for _ in range(2):
        env.reset(seed=5)
        assert env.old.seeded == 5
        flags = [env.step(np.zeros(1))[2:4] for _ in range(end)]
        assert flags[:-1] == [(False, False)] * (end - 1)
        assert flags[-1] == ((True, False) if end < 1000 else (False, True))
