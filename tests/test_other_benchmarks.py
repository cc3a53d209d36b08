"""Other benchmarks by their own packages: Minari's records, gymnasium-robotics, OGBench.

No server is asked. The files are small and have the packages' own formats: Minari writes its files,
and those of OGBench are written as its scripts do, both of rollouts in the packages' environments.
"""

import importlib
import sys

import gymnasium as gym
import h5py
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

from algorithms import iql
from corl import envs, own_envs, physics, tasks
from corl.config import parse_config
from corl.data import minari as from_minari
from corl.data import ogbench, published, sources

ROBOTS = ("pen", "door", "hammer", "relocate")
KITCHEN = ["microwave", "kettle", "light switch", "slide cabinet"]
# Minari's ids -> the environment that its authors record, with shorter episodes.
RECORDS = {
    "D4RL/pen/human-v2": ("AdroitHandPen-v1", {"max_episode_steps": 30}),
    "D4RL/kitchen/complete-v2": (
        "FrankaKitchen-v1",
        {"tasks_to_complete": KITCHEN, "max_episode_steps": 25},
    ),
    "D4RL/pointmaze/umaze-v2": ("PointMaze_UMaze-v3", {"max_episode_steps": 40}),
}
WALK = "ogbench:antmaze-large-navigate-singletask-v0"


def run(tmp_path, *flags):
    words = (
        f"--runs_dir {tmp_path}/runs --offline_iterations 60 --online_iterations 100 "
        "--eval_freq 60 --n_episodes 1 --batch_size 8 --buffer_size 2000 --log_freq 20 "
        "--threads 1 --compile false --device cpu --name own"
    )
    config = parse_config(iql.TrainConfig, [*words.split(), *flags])
    summary = iql.train(config)
    (folder,) = (tmp_path / "runs").glob("own-*")
    return summary, folder


def column(folder, file, name):
    names, *rows = [line.split(",") for line in (folder / file).read_text().splitlines()]
    return [row[names.index(name)] for row in rows]


def rollouts(env, episodes, steps, seed=0):
    """Episodes under random actions: dicts with a list of T + 1 observations, and arrays (T,)."""
    env.action_space.seed(seed)
    found = []
    for number in range(episodes):
        state, _ = env.reset(seed=seed + number)
        part = {"observations": [state], "actions": [], "rewards": []}
        ended = []
        for _ in range(steps):
            action = env.action_space.sample()
            state, reward, terminated, truncated, _ = env.step(action)
            part["observations"].append(state)
            part["actions"].append(action)
            part["rewards"].append(float(reward))
            ended.append((terminated, truncated))
            if terminated or truncated:
                break
        flags = np.array(ended, dtype=bool)
        part["actions"] = np.array(part["actions"])
        part["rewards"] = np.array(part["rewards"])
        found.append({**part, "terminations": flags[:, 0], "truncations": flags[:, 1]})
    return found


def stacked(values):
    """A list of observations as arrays, dicts as dicts of arrays."""
    if isinstance(values[0], dict):
        return {key: stacked([value[key] for value in values]) for key in values[0]}
    return np.array(values)


# ---------------------------------------------------------------- without the packages


@pytest.mark.parametrize(
    "name, package, file",
    [
        ("FrankaKitchen-v1", "gymnasium_robotics", "robotics"),
        ("gymnasium_robotics:FrankaKitchen-v1", "gymnasium_robotics", "robotics"),
        ("pen-human-v1", "gymnasium_robotics", "robotics"),
        (WALK, "ogbench", "ogbench"),
        ("minari:D4RL/pen/human-v2", "minari", "minari"),
    ],
)
def test_a_package_that_is_missing_is_one_line_with_the_command(
    name, package, file, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    says = f"{package}.*pip install -r requirements-{file}.txt"
    with pytest.raises((ValueError, RuntimeError), match=says) as error:
        envs.make(envs.find_task(name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cube-single-play-v0", "visual-cube-single-play-v0"])
def test_a_task_of_ogbench_without_rewards_is_refused_with_the_name_of_one_that_has_some(
    name,
):
    right = name.replace("-v0", "-singletask-v0")
    with pytest.raises(ValueError, match=f"as ogbench:{right}"):
        envs.find_task(f"ogbench:{name}")


def test_a_task_of_pictures_is_refused_with_the_name_of_one_of_vectors():
    with pytest.raises(ValueError, match="take ogbench:cube-single-play-singletask-v0"):
        envs.find_task("ogbench:visual-cube-single-play-singletask-v0")


def test_nested_observations_become_the_vectors_that_gymnasium_makes_of_them():
    box = gym.spaces.Box
    parts = {"b": box(-9, 9, (2, 3), np.float64), "a": box(-9, 9, (), np.float64)}
    space = gym.spaces.Dict({"z": gym.spaces.Dict(parts), "g": box(-9, 9, (1,))})
    space.seed(0)
    values = [space.sample() for _ in range(5)]
    expected = [gym.spaces.flatten(space, value) for value in values]
    np.testing.assert_array_equal(from_minari.flat(space, stacked(values)), expected)


class Goal(gym.Env):
    observation_space = gym.spaces.Dict(
        {k: gym.spaces.Box(-9, 9, (2,)) for k in ("observation", "desired_goal")}
    )
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        goal = np.float32([3, 4])
        return {"observation": np.float32([1, 2]), "desired_goal": goal}, {}


gym.register("TestGoal-v0", Goal, max_episode_steps=9)


def test_dict_observations_become_one_vector_with_the_keys_in_their_order():
    task = envs.find_task("TestGoal-v0")
    assert task.state_dim == 4
    assert envs.make(task).reset()[0].tolist() == [3, 4, 1, 2]


def test_a_seed_reaches_the_robot_inside_an_environment():
    outer = gym.make("TestGoal-v0")
    outer.unwrapped.robot = Goal()
    envs.seed(outer, 5)
    draws = [env.np_random.random() for env in (outer.unwrapped, outer.unwrapped.robot)]
    assert draws == [np.random.default_rng(5).random()] * 2


class OwnHopper(HopperEnv):
    """Might remember more than MuJoCo's state."""


def test_only_gymnasiums_own_environments_are_known_by_mujocos_state():
    gym.register("TestHopper-v0", OwnHopper, max_episode_steps=9)
    for name, known in (("Hopper-v5", True), ("TestHopper-v0", False)):
        env = gym.make(name)
        env.reset()
        state = physics.get_state(env, exact=False)
        assert (state["physics"] is not None) == known


def test_files_of_adroit_have_d4rls_names():
    task = tasks.task("pen-human-v1")
    assert published.file_name(task) == "pen-human-v1.hdf5"
    assert published.url(task).endswith("/hand_dapg_v1/pen-human-v1.hdf5")
    with pytest.raises(ValueError, match="pass the file"):
        published.file_name(tasks.task("pen-human-v0"))


# ---------------------------------------------------------------- Adroit under D4RL's names


def d4rls_reward(robot, model, data):
    """D4RL's reward of the state after an action, of MuJoCo's data and not of observations."""

    def apart(a, b):
        return np.linalg.norm(a - b)

    palm = data.site("S_grasp").xpos
    if robot == "door":
        hinge, handle = data.joint("door_hinge").qpos[0], data.site("S_handle").xpos
        bonus = 2 * (hinge > 0.2) + 8 * (hinge > 1.0) + 10 * (hinge > 1.35)
        cost = 0.1 * apart(palm, handle) + 0.1 * (hinge - 1.57) ** 2
        return bonus - cost - 1e-5 * np.sum(data.qvel**2)
    thing = data.body("Object").xpos
    if robot == "relocate":
        target = data.site("target").xpos
        away, reward = apart(thing, target), -0.1 * apart(palm, thing)
        if thing[2] > 0.04:
            reward += 1 - 0.5 * apart(palm, target) - 0.5 * away
        return reward + 10 * (away < 0.1) + 20 * (away < 0.05)
    if robot == "hammer":
        tool, nail = data.site("tool").xpos, data.site("S_target").xpos
        depth = apart(nail, data.site("nail_goal").xpos)
        cost = 0.1 * apart(palm, thing) + apart(tool, nail) + 10 * depth
        cost += 0.01 * np.linalg.norm(data.qvel)
        lifted = thing[2] > 0.04 and tool[2] > 0.04
        return 2 * lifted + 25 * (depth < 0.02) + 75 * (depth < 0.01) - cost
    ends = [
        data.site(f"{name}_top").xpos - data.site(f"{name}_bottom").xpos
        for name in ("object", "target")
    ]
    alike = np.dot(*(end / np.linalg.norm(end) for end in ends))
    away = apart(thing, data.site("eps_ball").xpos)
    bonus = 10 * (away < 0.075 and alike > 0.9) + 50 * (away < 0.075 and alike > 0.95)
    return alike - away + bonus - 5 * (thing[2] < 0.075)


@pytest.mark.optional("gymnasium_robotics")
@pytest.mark.parametrize("robot", ROBOTS)
def test_rewards_ends_and_limits_of_adroit_are_d4rls(robot):
    env, facts = envs.make(f"{robot}-expert-v1"), tasks.ROBOTS[robot]
    hand = env.unwrapped.hand
    assert env.observation_space.shape == (facts.state_dim,)
    assert env.action_space == gym.spaces.Box(-1, 1, (facts.action_dim,), np.float32)
    env.action_space.seed(1)
    ends = []
    for episode in range(2):
        env.reset(seed=episode)
        for step in range(1, facts.horizon + 1):
            state, reward, terminated, truncated, info = env.step(
                env.action_space.sample()
            )
            expected = d4rls_reward(robot, hand.model, hand.data)
            assert reward == pytest.approx(expected, abs=1e-9)
            fallen = robot == "pen" and hand.data.body("Object").xpos[2] < 0.075
            assert terminated == fallen and truncated == (step == facts.horizon)
            # The bonus of a pen that lies as it should is the only large reward.
            assert info["goal_achieved"] == (robot == "pen" and reward > 50)
            if terminated or truncated:
                break
        ends.append(step)
    assert min(ends) < 100 if robot == "pen" else ends == [200, 200]


@pytest.mark.optional("gymnasium_robotics")
@pytest.mark.parametrize("robot", ROBOTS)
def test_an_adroit_episode_goes_on_bit_for_bit_in_another_environment(robot):
    task = f"{robot}-human-v1"
    env, other = envs.make(task), envs.make(task)
    env.reset(seed=1)
    other.reset(seed=2)
    envs.seed(env, 3)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.1, 0.1, (12, *env.action_space.shape)).astype(np.float32)
    for action in actions[:6]:
        env.step(action)
    saved = physics.get_state(env)
    assert physics.set_state(other, saved)
    for action in actions[6:]:
        one, two = env.step(action), other.step(action)
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1:4] == two[1:4]
    np.testing.assert_array_equal(env.reset()[0], other.reset()[0])


@pytest.mark.optional("gymnasium_robotics")
def test_a_run_of_d4rls_pen(tmp_path):
    parts = rollouts(envs.make("pen-human-v1"), 6, 100)
    rows = {k: np.concatenate([p[k] for p in parts]) for k in ("actions", "rewards")}
    rows["observations"] = np.concatenate([p["observations"][:-1] for p in parts])
    rows["terminals"] = np.concatenate([p["terminations"] for p in parts])
    rows["timeouts"] = np.concatenate([p["truncations"] for p in parts])
    with h5py.File(tmp_path / "pen.hdf5", "w") as file:
        for key, values in rows.items():
            file[key] = values
    flags = ["--env", "pen-human-v1", "--dataset_path", str(tmp_path / "pen.hdf5")]
    summary, folder = run(tmp_path, *flags)
    returns = [float(x) for x in column(folder, "evaluations.csv", "return")]
    scores = [float(x) for x in column(folder, "evaluations.csv", "score")]
    low, high = 96.262799, 3076.8331017826877
    expected = [100 * (x - low) / (high - low) for x in returns]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    rates = [float(x) for x in column(folder, "metrics.csv", "success_rate") if x]
    assert len(rates) == 1 and rates[0] in (0, 1) and "score_unit" not in summary


# ---------------------------------------------------------------- Minari's records


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Of another test, whose record has the same name.
    own_envs.task.cache_clear()
    return tmp_path


def record(name, **more):
    """Write rollouts as Minari does; the environment and the episodes."""
    import gymnasium_robotics  # noqa: F401  (registers the environments)
    import minari
    from minari.data_collector import EpisodeBuffer

    env_id, options = RECORDS[name]
    env = gym.make(env_id, disable_env_checker=True, **options)
    parts = rollouts(env, 3, 100)
    buffers = [
        EpisodeBuffer(**{**p, "observations": stacked(p["observations"])}) for p in parts
    ]
    minari.create_dataset_from_buffers(name, buffers, env=env, **more)
    return env, parts


@pytest.mark.optional("minari")
@pytest.mark.optional("gymnasium_robotics")
@pytest.mark.parametrize("name", RECORDS)
def test_a_run_of_a_minari_record_takes_data_and_environment_from_it(name, home):
    env, parts = record(name)
    task = envs.find_task(f"minari:{name}")
    assert task.horizon == RECORDS[name][1]["max_episode_steps"]
    found = sources.resolve(task).arrays
    for key, side in (
        ("observations", slice(None, -1)),
        ("next_observations", slice(1, None)),
    ):
        expected = [
            gym.spaces.flatten(env.observation_space, state)
            for part in parts
            for state in part["observations"][side]
        ]
        np.testing.assert_array_equal(found[key], np.float32(expected))
    rewards = np.concatenate([p["rewards"] for p in parts])
    np.testing.assert_array_equal(found["rewards"], np.float32(rewards))
    made = envs.make(task)
    assert type(made.unwrapped) is type(env.unwrapped)
    state = gym.spaces.flatten(env.observation_space, env.reset(seed=5)[0])
    np.testing.assert_array_equal(made.reset(seed=5)[0], state)

    summary, folder = run(home, "--env", f"minari:{name}")
    assert summary["score_unit"] == "raw return"
    assert (
        summary["dataset"]["source"] == "minari" and "warning" not in summary["dataset"]
    )
    assert len(column(folder, "evaluations.csv", "return")) >= 2


@pytest.mark.optional("minari")
@pytest.mark.optional("gymnasium_robotics")
def test_reference_scores_are_the_recorded_ones_or_those_that_are_given(home):
    record("D4RL/pen/human-v2", ref_min_score=90.0, ref_max_score=3000.0)
    task = envs.find_task("minari:D4RL/pen/human-v2")
    assert (task.ref_min, task.ref_max) == (90.0, 3000.0)
    assert task.scale is tasks.NORMALIZED
    task = envs.find_task("minari:D4RL/pen/human-v2", 7, 0.0, 10.0)
    assert (task.ref_min, task.ref_max, task.horizon) == (0.0, 10.0, 7)
    steps = rollouts(envs.make(task), 1, 50)[0]["truncations"]
    assert len(steps) == 7


@pytest.mark.optional("minari")
def test_a_record_without_an_environment_is_refused(home):
    import minari
    from minari.data_collector import EpisodeBuffer

    part = rollouts(gym.make("Pendulum-v1"), 1, 5)[0]
    part["observations"] = stacked(part["observations"])
    box = gym.make("Pendulum-v1")
    spaces = {
        "observation_space": box.observation_space,
        "action_space": box.action_space,
    }
    minari.create_dataset_from_buffers("mine/x-v0", [EpisodeBuffer(**part)], **spaces)
    with pytest.raises(ValueError, match="mine/x-v0 records no environment; give one"):
        envs.find_task("minari:mine/x-v0")


# ---------------------------------------------------------------- OGBench


def write_walks(path, walks=3, steps=40):
    """Files as OGBench's `generate_locomaze.py` writes them; each walk stands at the goal a while.

    The rows that its loader makes have one less for each walk, whose last action it drops.
    """
    env = gym.make("antmaze-large-v0", terminate_at_goal=False, max_episode_steps=steps)
    env.action_space.seed(0)
    goal = np.array(env.unwrapped.ij_to_xy((7, 10)))
    rows = {k: [] for k in ("observations", "actions", "terminals", "qpos", "qvel")}
    for walk in range(walks):
        state, _ = env.reset(seed=walk)
        for step in range(steps):
            if step == 20:
                env.unwrapped.set_xy(goal)
                state = env.unwrapped.get_ob()
            action = env.action_space.sample()
            after, _, _, truncated, info = env.step(action)
            kept = state, action, truncated, info["prev_qpos"], info["prev_qvel"]
            for key, value in zip(rows, kept, strict=True):
                rows[key].append(value)
            state = after
    kinds = {"terminals": bool}
    arrays = {k: np.array(v, dtype=kinds.get(k, np.float32)) for k, v in rows.items()}
    np.savez_compressed(path, **arrays)
    np.savez_compressed(str(path).replace(".npz", "-val.npz"), **arrays)
    return arrays, goal


@pytest.mark.optional("ogbench")
def test_a_run_of_ogbench_by_its_own_loader(tmp_path):
    importlib.import_module("ogbench")

    path = tmp_path / "antmaze-large-navigate-v0.npz"
    stored, goal = write_walks(path)
    task = envs.find_task(WALK)
    assert (task.state_dim, task.action_dim, task.horizon) == (29, 8, 1000)
    found = sources.resolve(task, path=path)
    assert (
        found.provenance["ogbench_version"] and found.provenance["source"] == "ogbench"
    )
    kept = ~stored["terminals"]
    reached = np.linalg.norm(stored["qpos"][kept, :2] - goal, axis=1) <= 0.5
    assert 0 < reached.sum() < len(reached) / 2
    np.testing.assert_array_equal(found.arrays["terminals"], reached)
    np.testing.assert_array_equal(found.arrays["rewards"], reached - np.float32(1))
    following = np.flatnonzero(kept) + 1
    states = stored["observations"]
    np.testing.assert_array_equal(found.arrays["observations"], states[kept])
    np.testing.assert_array_equal(found.arrays["next_observations"], states[following])
    # The walks go on at the goal, so that each of them is one episode.
    assert found.lengths.tolist() == [39, 39, 39]
    np.testing.assert_array_equal(found.returns, (reached - 1.0).reshape(3, 39).sum(1))

    flags = ["--env", WALK, "--dataset_path", str(path), "--horizon", "50"]
    summary, folder = run(tmp_path, *flags)
    assert summary["score_unit"] == "raw return"
    returns = [float(x) for x in column(folder, "metrics.csv", "raw_return") if x]
    assert len(returns) == 2 and set(returns) == {-50.0}
    rates = [float(x) for x in column(folder, "metrics.csv", "success_rate") if x]
    assert len(rates) == 2 and set(rates) == {0.0}
    assert summary["dataset"]["source"] == "ogbench"


@pytest.mark.optional("ogbench")
def test_without_ogbenchs_file_there_is_one_line_with_the_place(tmp_path):
    task = envs.find_task(WALK)
    with pytest.raises(RuntimeError, match="no file of.*~/.ogbench/data") as error:
        ogbench.rows(task.name, tmp_path / "none.npz")
    assert "\n" not in str(error.value)
