"""The locomotion environments with less Python give gymnasium's bits."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from corl import envs, physics, tasks

ROBOTS = [name for name, robot in tasks.ROBOTS.items() if robot.env_id]


def bits(value):
    return np.asarray(value).dtype, np.asarray(value).tobytes()


@pytest.fixture(autouse=True)
def without_warnings(monkeypatch):
    """Gymnasium's of v4, which is chosen on purpose."""
    monkeypatch.setattr(gymnasium.logger, "min_level", gymnasium.logger.ERROR)


def theirs(robot):
    """Gymnasium's environment, with D4RL's margins and clipped actions."""
    env = gymnasium.make(tasks.ROBOTS[robot].env_id)
    physics.restore_contact_margin(env.unwrapped.model)
    return env


@pytest.mark.parametrize("robot", ROBOTS)
@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_whole_episodes_are_gymnasiums_to_the_last_bit(robot, scale):
    """Start, observations, rewards, ends and infos, with actions inside and outside of the box."""
    ours, other = envs.make_robot(robot), theirs(robot)
    box = other.action_space
    rng, ends = np.random.default_rng(1), 0
    for episode in range(4):
        seed = 7 if episode == 0 else None
        one, two = ours.reset(seed=seed)[0], other.reset(seed=seed)[0]
        assert bits(one) == bits(two)
        for _ in range(150):
            action = (scale * rng.normal(size=box.shape)).astype(np.float32)
            given = action.copy()
            result = ours.step(action)
            expected = other.step(np.clip(action, box.low, box.high))
            assert [bits(v) for v in result[:2]] == [bits(v) for v in expected[:2]]
            assert result[2:4] == expected[2:4]
            assert list(result[4]) == list(expected[4])
            assert all(bits(result[4][k]) == bits(expected[4][k]) for k in expected[4])
            np.testing.assert_array_equal(action, given)
            if result[2] or result[3]:
                ends += 1
                break
    assert (ends > 0) == (robot != "halfcheetah")


@pytest.mark.parametrize("robot", ROBOTS)
def test_the_time_limit_is_gymnasiums(robot):
    ours, other = envs.make_robot(robot), theirs(robot)
    limits = [e.get_wrapper_attr("_max_episode_steps") for e in (ours, other)]
    assert limits[0] == limits[1] == tasks.ROBOTS[robot].horizon
    assert ours.unwrapped.spec.id == other.unwrapped.spec.id


@pytest.mark.parametrize("robot", ["hopper", "walker2d"])
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 0.69, 0.71, 1.9, -9.5, 11.0, 101.0, -101.0]
)
@pytest.mark.parametrize("special", [None, np.nan, np.inf, -np.inf])
def test_health_and_observation_of_any_state_are_gymnasiums(robot, value, special):
    ours, other = envs.make_robot(robot).unwrapped, theirs(robot).unwrapped
    sizes = ours.model.nq, ours.model.nv
    rng = np.random.default_rng(0)
    for place in range(sum(sizes)):
        state = np.zeros(sum(sizes))
        state[1] = 1.25
        state += 0.001 * rng.normal(size=len(state))
        state[place] = value if special is None else special
        for env in (ours, other):
            env.data.qpos[:], env.data.qvel[:] = np.split(state, [sizes[0]])
        for name in ("is_healthy", "healthy_reward", "terminated"):
            assert getattr(ours, name) == getattr(other, name), (name, place)
        assert bits(ours._get_obs()) == bits(other._get_obs())


@pytest.mark.parametrize("robot", ROBOTS)
def test_an_observation_is_a_copy(robot):
    env = envs.make_robot(robot).unwrapped
    before, _ = env.reset(seed=0)
    kept = before.copy()
    env.step(np.ones(env.action_space.shape, np.float32))
    np.testing.assert_array_equal(before, kept)


@pytest.mark.parametrize("robot", ROBOTS)
def test_gymnasiums_checker_finds_no_fault(robot):
    check_env(envs.make_robot(robot).unwrapped, skip_render_check=True)
