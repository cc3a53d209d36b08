"""What other people's scripts ask of gym, d4rl and wandb beyond CORL's, one test for each."""

import argparse
import collections
import copy
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
import pytest
import torch

from corl import envs, tasks
from corl.shim import launch, patches
from corl.shim.__main__ import lacking, main, split
from corl.shim.options import Options, Unavailable

ROOT = Path(__file__).parent.parent
TASK, NEVER_FALLS = "hopper-medium-v2", "halfcheetah-medium-v2"


@pytest.fixture(scope="module")
def old():
    """gym 0.23, for all tests of this file that change nothing of it."""
    with launch.installed():
        yield importlib.import_module("gym")


@pytest.fixture
def new():
    with launch.installed(Options(gym_api="0.26")):
        yield importlib.import_module("gym")


class Counter(gymnasium.Env):
    """Observes the number of steps and the last action; ends after four steps."""

    observation_space = gymnasium.spaces.Box(-9.0, 9.0, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-2.0, 4.0, (1,), np.float64)
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, scale=1.0, render_mode=None):
        self.scale, self.render_mode = scale, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(2), {"began": True}

    def step(self, action):
        self.count += 1
        seen = np.array([self.count, action[0]])
        return seen, self.scale * self.count, self.count == 4, False, {}

    def render(self):
        return np.zeros((4, 5, 3), np.uint8) if self.render_mode == "rgb_array" else None


gymnasium.register("ShimCounter-v3", entry_point=Counter, max_episode_steps=3)


# ---------------------------------------------------------------- modules


def test_submodules_are_real_and_their_classes_the_same(old):
    names = "spaces.box spaces.dict utils.seeding utils.ezpickle error vector.vector_env"
    names += " envs.registration envs.mujoco.mujoco_env envs.classic_control.acrobot"
    names += " wrappers.monitoring.video_recorder logger version wrappers.time_limit"
    names += " wrappers.record_episode_statistics"
    for name in names.split():
        importlib.import_module(f"gym.{name}")
    box = importlib.import_module("gym.spaces.box").Box
    assert box is old.spaces.Box is gymnasium.spaces.Box
    assert issubclass(box, old.Space) and old.Space is old.spaces.Space
    limit = importlib.import_module("gym.wrappers.time_limit").TimeLimit
    assert limit is old.wrappers.TimeLimit and isinstance(old.make(TASK), limit)
    for name in ("gym_mujoco", "locomotion", "hand_manipulation_suite"):
        assert importlib.import_module(f"d4rl.{name}").qlearning_dataset
    wrappers = importlib.import_module("d4rl.locomotion.wrappers")
    assert isinstance(old.make(TASK).env.env, wrappers.NormalizedBoxEnv)
    old.logger.set_level(old.logger.ERROR)
    old.logger.warn("not %s", "shown")


def test_an_environment_type_can_be_annotated(old):
    class Mine(old.Env[np.ndarray, int]):
        pass

    class Around(old.ObservationWrapper[np.ndarray, int]):
        pass

    assert issubclass(Around, old.Wrapper)
    assert issubclass(Mine, old.Env) and old.Env[np.ndarray, np.ndarray] is not old.Env


def test_old_generators_have_the_old_names(old):
    generator, seed = old.utils.seeding.np_random(3)
    twin = np.random.default_rng(np.random.SeedSequence(3))
    assert seed == 3 and generator.randint(10) == twin.integers(10)
    assert generator.randn(2).shape == (2,) and 0 <= generator.rand() < 1


@pytest.mark.parametrize("name", ["GoalEnv", "spaces_of", "wrappers.GrayScale"])
def test_a_missing_name_says_that_the_shim_lacks_it(old, name):
    owner, _, last = f"gym.{name}".rpartition(".")
    with pytest.raises(AttributeError, match=f"the shim does not provide gym.{name}"):
        getattr(sys.modules[owner], last)


@pytest.mark.parametrize(
    "line, name",
    [
        ("from gym import GoalEnv", "gym.GoalEnv"),
        ("import gym.envs.atari", "gym.envs.atari"),
        ("from d4rl.infos import DATASETS", "d4rl.infos.DATASETS"),
        ("import mujoco_py; mujoco_py.MjSim(1)", "mujoco_py.MjSim"),
    ],
)
def test_a_script_that_lacks_a_name_ends_with_one_line(tmp_path, line, name):
    (tmp_path / "script.py").write_text(line)
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "script.py")])
    assert str(caught.value) == f"error: the shim does not provide {name}"
    assert lacking(ImportError("No module named 'jax'", name="jax")) is None


# ---------------------------------------------------------------- environments


def test_unwrapped_has_no_time_limit(old):
    env = old.make(NEVER_FALLS).unwrapped
    env.reset()
    assert not any(env.step(np.zeros(6))[2] for _ in range(1001))
    maze = old.make("antmaze-umaze-v2")
    assert maze._max_episode_steps == 700 and not hasattr(
        maze.unwrapped, "_elapsed_steps"
    )
    maze.unwrapped.reset()
    assert not any(maze.unwrapped.step(np.zeros(8))[2] for _ in range(701))


def test_unwrapped_still_knows_task_and_data(old):
    env = old.make(TASK).unwrapped
    assert env.get_normalized_score(3234.3) == pytest.approx(1.0)
    assert env.spec.id == TASK and callable(env.get_dataset)
    assert (env.spec.name, env.spec.version) == ("hopper-medium", 2)


def test_plain_names_are_gymnasiums_with_keywords(old):
    env = old.make("ShimCounter-v0", scale=2.0)
    assert env.spec.id == "ShimCounter-v0" and env._max_episode_steps == 3
    env.reset()
    steps = [env.step([0.5])[1:] for _ in range(3)]
    assert [s[0] for s in steps] == [2.0, 4.0, 6.0]
    assert steps[2][1] is True and steps[2][2]["TimeLimit.truncated"] is True
    walker = old.make("Hopper-v3", exclude_current_positions_from_observation=False)
    assert walker.reset().shape == (12,)
    assert old.make("Ant-v2").observation_space.shape == (111,)
    # Scripts try a keyword and go on without it.
    with pytest.raises(TypeError, match=f"{TASK} does not take the keywords seed"):
        old.make(TASK, seed=1)
    with pytest.raises(Unavailable, match="unknown task 'Hoper-v2'"):
        old.make("Hoper-v2")


def test_plain_hopper_is_the_task_without_clipped_actions(old):
    plain, task, twin = old.make("Hopper-v2"), old.make(TASK), envs.make(TASK)
    for env in (plain, task):
        env.seed(1)
        env.reset()
    twin.reset(seed=1)
    action = np.array([3.0, 0.0, 0.0])
    expected = twin.step(action)
    assert task.step(action)[1] == expected[1]
    # The control cost of the part outside the box.
    assert plain.step(action)[1] == pytest.approx(expected[1] - 1e-3 * (9 - 1))


def test_a_script_registers_its_own_environment(old):
    class Mine(old.Env):
        action_space = observation_space = old.spaces.Box(-1, 1, (1,))

        def __init__(self, reward):
            self.amount = reward

        def reset(self):
            return np.zeros(1)

        def step(self, action):
            return np.ones(1), self.amount, False, {}

    old.register(
        id="Mine-v0", entry_point=Mine, max_episode_steps=2, kwargs={"reward": 5}
    )
    env = old.make("Mine-v0")
    assert env.spec.id == "Mine-v0" and "Mine-v0" in old.envs.registry.env_specs
    assert old.spec("Mine-v0").kwargs == {"reward": 5}
    env.reset()
    assert [env.step(0)[1:3] for _ in range(2)] == [(5, False), (5, True)]
    assert old.make("Mine-v0", reward=6).unwrapped.amount == 6
    # A copy of a wrapped environment is its own.
    with pytest.raises(gymnasium.error.ResetNeeded):
        old.make("Mine-v0").step(0)


def test_a_script_brings_its_own_mujoco_environment(old):
    base = old.envs.mujoco.mujoco_env.MujocoEnv

    class FullHopper(base):
        def __init__(self):
            super().__init__("hopper.xml", 4)

        def step(self, action):
            self.do_simulation(action, self.frame_skip)
            data = self.sim.data
            return np.concatenate([data.qpos, data.qvel]), 0.0, False, {}

        def reset_model(self):
            self.set_state(self.init_qpos, self.init_qvel)
            return self.state_vector()

    env, twin = FullHopper(), envs.make(TASK).unwrapped
    assert env.observation_space.shape == (12,) and env.action_space.shape == (3,)
    np.testing.assert_array_equal(env.reset(), env.state_vector())
    twin.reset()
    twin.set_state(env.init_qpos, env.init_qvel)
    for _ in range(5):
        ours = env.step(np.full(3, 0.3))[0]
        twin.do_simulation(np.full(3, 0.3), 4)
    assert env.dt == twin.dt == 0.008
    np.testing.assert_array_equal(ours[:6], twin.data.qpos)


def test_the_simulation_of_mujoco_py_is_there(old):
    env = old.make(TASK)
    env.seed(0)
    env.reset()
    state = env.sim.get_state()
    first = env.step(np.ones(3))[0]
    assert env.sim.data.qpos.size == 6
    np.testing.assert_array_equal(env.sim.data.body_xpos, env.data.xpos)
    torso = env.sim.model.body_name2id("torso")
    assert (env.sim.data.get_body_xpos("torso") == env.data.xpos[torso]).all()
    assert env.sim.model.nq == 6
    env.sim.set_state(state)
    env.sim.forward()
    np.testing.assert_array_equal(env.sim.data.qvel, state.qvel)
    # MuJoCo's solver begins elsewhere, so only nearly the same.
    np.testing.assert_allclose(env.step(np.ones(3))[0], first, atol=1e-6)
    env.set_state(state.qpos, state.qvel)
    assert env.sim.get_state().flatten().shape == (13,)


def test_pictures_are_made_off_screen(old):
    counter = old.make("ShimCounter-v0")
    assert counter.render() is None and counter.render("rgb_array").shape == (4, 5, 3)
    env = old.make(TASK)
    env.reset()
    try:
        picture = env.render(mode="rgb_array", width=64, height=48)
    except (mujoco.FatalError, AttributeError, ImportError, RuntimeError) as error:
        pytest.skip(f"no off-screen rendering here: {error}")
    assert picture.shape == (48, 64, 3) and picture.std() > 0
    np.testing.assert_array_equal(env.sim.render(64, 48)[::-1], picture)


def test_a_copy_of_an_environment_is_a_new_one(old):
    """So it was with old gym, whose MuJoCo classes copy the arguments they were made with."""
    env = old.make(TASK)
    env.seed(2)
    first = env.reset()
    before = env.sim.get_state().flatten()
    twin = copy.deepcopy(env)
    assert np.shares_memory(twin.sim.data.qpos, twin.data.qpos)
    assert not np.shares_memory(twin.sim.data.qpos, env.data.qpos)
    twin.seed(2)
    np.testing.assert_array_equal(twin.reset(), first)
    twin.step(np.ones(3))
    np.testing.assert_array_equal(env.sim.get_state().flatten(), before)


# ---------------------------------------------------------------- wrappers


def test_wrapper_bases_call_what_a_script_defines(old):
    class Doubled(old.ObservationWrapper):
        def observation(self, observation):
            return 2 * observation

    class Cheap(old.RewardWrapper):
        def reward(self, reward):
            return reward - 1

    class Shifted(old.ActionWrapper):
        def action(self, action):
            return action + 1

    class Whole(old.Wrapper):
        def reset(self, **options):
            self.began = True
            return super().reset(**options)

        def step(self, action):
            return super().step(action)

    inner = old.make("ShimCounter-v0")
    env = Whole(Shifted(Cheap(Doubled(inner))))
    np.testing.assert_array_equal(env.reset(), np.zeros(2))
    observation, reward, done, _ = env.step(np.array([0.5]))
    assert observation.tolist() == [2.0, 3.0] and reward == 0.0 and done is False
    assert env.began and env.unwrapped is inner.unwrapped and env.seed(4) == [4]
    assert env.spec is inner.spec and env.metadata is inner.metadata
    env.observation_space = "mine"
    assert env.observation_space == "mine" and inner.observation_space != "mine"


def test_statistics_of_an_episode_stand_in_its_last_info(old):
    env = old.wrappers.RecordEpisodeStatistics(old.make("ShimCounter-v0"), deque_size=1)
    for _ in range(2):
        env.reset()
        infos = [env.step([0.0])[3] for _ in range(3)]
    assert [i.get("episode", {}).get("r") for i in infos] == [None, None, 6.0]
    assert infos[2]["episode"]["l"] == 3 and infos[2]["episode"]["t"] >= 0
    assert list(env.return_queue) == [6.0] and list(env.length_queue) == [3]


def test_actions_are_rescaled_and_clipped(old):
    env = old.make("ShimCounter-v0")
    scaled = old.wrappers.RescaleAction(env, -1, 1)
    scaled.reset()
    assert scaled.action_space.low == -1 and scaled.action_space.high == 1
    assert [scaled.step(np.array([x]))[0][1] for x in (-1.0, 0.0, 1.0)] == [-2, 1, 4]
    clipped = old.wrappers.ClipAction(env)
    clipped.reset()
    assert [clipped.step(np.array([x]))[0][1] for x in (-9.0, 1.5, 9.0)] == [-2, 1.5, 4]


def test_observations_are_flattened_and_stacked(old):
    class Pair(Counter):
        observation_space = gymnasium.spaces.Dict(
            a=gymnasium.spaces.Box(0, 1, (2, 2)), b=gymnasium.spaces.Box(0, 1, (1,))
        )

        def reset(self, **options):
            return {
                "a": np.full((2, 2), 0.5, np.float32),
                "b": np.ones(1, np.float32),
            }, {}

    flat = old.wrappers.FlattenObservation(old.core.Adapter(Pair()))
    assert flat.observation_space.shape == (5,)
    assert flat.reset().tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]
    stacked = old.wrappers.FrameStack(old.make("ShimCounter-v0"), 2)
    assert stacked.reset().shape == stacked.observation_space.shape == (2, 2)
    assert stacked.step([0.0])[0][:, 0].tolist() == [0.0, 1.0]


def test_a_time_limit_of_the_script_is_kept(old):
    env = old.wrappers.TimeLimit(
        old.make("ShimCounter-v0").unwrapped, max_episode_steps=2
    )
    env.reset()
    assert [env.step([0.0])[2] for _ in range(2)] == [False, True]
    env = old.wrappers.TimeLimit(old.make("ShimCounter-v0").unwrapped, 4)
    env.reset()
    # It ends by itself in that step.
    info = [env.step([0.0]) for _ in range(4)][-1][3]
    assert info["TimeLimit.truncated"] is False


def test_monitors_record_nothing_and_let_through(old):
    env = old.wrappers.Monitor(old.make("ShimCounter-v0"), "./video", force=True)
    assert env.reset().tolist() == [0, 0] and env.step([1.0])[1] == 1.0
    assert old.wrappers.RecordVideo(env, "v").step([1.0])[1] == 2.0
    with pytest.raises(Unavailable, match="PixelObservationWrapper"):
        old.wrappers.PixelObservationWrapper(env)


def test_gym_26_gives_five_values(new):
    assert new.__version__ == "0.26.2"
    env = new.make(NEVER_FALLS)
    first, info = env.reset(seed=3)
    assert info == {} or isinstance(info, dict)
    np.testing.assert_array_equal(first, envs.make(NEVER_FALLS).reset(seed=3)[0])
    counter = new.wrappers.RecordEpisodeStatistics(new.make("ShimCounter-v0"))
    assert counter.reset()[1] == {"began": True}
    ends = [counter.step([0.0])[2:] for _ in range(3)]
    assert [e[:2] for e in ends] == [(False, False), (False, False), (False, True)]
    assert ends[2][2]["episode"]["l"] == 3
    changed = new.wrappers.TransformObservation(new.make(TASK), lambda s: s * 0)
    observation, info = changed.reset()
    assert not observation.any() and len(changed.step(np.zeros(3))) == 5
    # The layers that d3rlpy counts.
    assert isinstance(new.make(TASK).env.env.env, new.wrappers.ClipAction)


def test_vectors_step_together_and_reset_by_themselves(old):
    env = old.vector.make("ShimCounter-v0", 2, asynchronous=True)
    assert env.num_envs == 2 and env.single_action_space.shape == (1,)
    assert env.observation_space.shape == (2, 2) and env.reset().shape == (2, 2)
    for _ in range(3):
        observations, rewards, dones, infos = env.step(np.array([[0.5], [1.0]]))
    assert observations.tolist() == [[0, 0], [0, 0]] and rewards.tolist() == [3, 3]
    assert dones.all() and infos[1]["terminal_observation"].tolist() == [3, 1]
    assert env.call("spec")[0].id == "ShimCounter-v0"
    makers = [lambda: old.make(TASK)] * 2
    many = old.vector.SyncVectorEnv(makers)
    many.seed(5)
    states, twin = many.reset(), envs.make(TASK)
    for i in range(2):
        np.testing.assert_array_equal(states[i], twin.reset(seed=5 + i)[0])


def test_vectors_of_gym_26(new):
    env = new.vector.make("ShimCounter-v0", 2)
    assert env.reset()[0].shape == (2, 2)
    for _ in range(3):
        *_, terminated, truncated, infos = env.step(np.zeros((2, 1)))
    assert truncated.all() and not terminated.any()
    assert infos["final_observation"][0].tolist() == [3, 0]
    assert infos["_final_observation"].all()


# ---------------------------------------------------------------- d4rl


def test_sequences_are_the_episodes(old):
    d4rl = importlib.import_module("d4rl")
    rng, ends = np.random.default_rng(0), [3, 4, 9]
    raw = {"observations": rng.normal(size=(12, 2)), "rewards": np.arange(12.0)}
    raw |= {"terminals": np.zeros(12, bool), "timeouts": np.zeros(12, bool)}
    raw["terminals"][3] = raw["timeouts"][4] = raw["timeouts"][9] = True
    raw["metadata/algorithm"] = np.zeros(12)
    found = list(d4rl.sequence_dataset(None, raw))
    assert [len(e["rewards"]) for e in found] == [4, 1, 5]
    assert [e["rewards"][-1] for e in found] == ends
    assert "metadata/algorithm" not in found[0]
    del raw["timeouts"]
    long = {k: np.repeat(v[:1], 2001, 0) for k, v in raw.items()}
    lengths = [len(e["rewards"]) for e in d4rl.sequence_dataset(old.make(TASK), long)]
    assert lengths == [1000, 1000]


def test_qlearning_dataset_passes_keywords_on(old, tmp_path):
    d4rl = importlib.import_module("d4rl")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["observations"] = np.zeros((5, 11), np.float32)
        file["actions"] = np.zeros((5, 3), np.float32)
        file["rewards"] = np.arange(5, dtype=np.float32)
        file["terminals"] = file["timeouts"] = np.zeros(5, bool)
    rows = d4rl.qlearning_dataset(old.make(TASK), h5path=str(tmp_path / "a.hdf5"))
    assert rows["rewards"].tolist() == [0, 1, 2, 3]


def test_gymnasiums_own_way_to_old_environments_leads_here(old):
    d4rl = importlib.import_module("d4rl")
    env = gymnasium.make("GymV21Environment-v0", env_id="ShimCounter-v0")
    assert env.reset()[0].shape == (2,)
    assert [env.step(np.zeros(1))[2:4] for _ in range(3)][-1] == (False, True)
    task = gymnasium.make("GymV21Environment-v0", env_id=TASK)
    raw = {k: np.zeros((5, 2), np.float32) for k in ("observations", "actions")}
    raw |= {"rewards": np.zeros(5, np.float32), "terminals": np.zeros(5, bool)}
    assert len(d4rl.qlearning_dataset(task, raw)["rewards"]) == 4


def test_reference_scores_have_all_versions_and_adroit(old):
    infos = importlib.import_module("d4rl.infos")
    names = ["hopper-medium-v0", "walker2d-expert-v1", "antmaze-large-play-v0"]
    for name in (*names, "pen-human-v0", "relocate-cloned-v1", "hammer-expert-v1"):
        assert infos.REF_MIN_SCORE[name] == tasks.task(name).ref_min
        assert infos.REF_MAX_SCORE[name] == tasks.task(name).ref_max


# ---------------------------------------------------------------- wandb


class Flags:
    """absl's flags and a ConfigDict, as far as a configuration is read."""

    def __init__(self, method):
        setattr(self, method, lambda: {"lr": 0.5})


@dataclasses.dataclass
class Dataclass:
    lr: float = 0.5


@pytest.mark.parametrize(
    "config",
    [
        {"lr": 0.5},
        argparse.Namespace(lr=0.5),
        Flags("flag_values_dict"),
        Flags("to_dict"),
        Dataclass(),
    ],
    ids=["dict", "Namespace", "absl", "ConfigDict", "dataclass"],
)
def test_wandb_takes_configurations_of_any_kind(old, config):
    wandb = importlib.import_module("wandb")
    wandb.config.clear()
    run = wandb.init(config=config, project="p", name="n", settings=wandb.Settings(a=1))
    assert wandb.config.lr == run.config["lr"] == 0.5 and wandb.run is run
    wandb.config.update(argparse.Namespace(lr=1.0, seed=3), allow_val_change=True)
    assert (wandb.config.lr, wandb.config.seed, run.name) == (1.0, 3, "n")
    wandb.config.tau = 0.1
    assert wandb.config["tau"] == 0.1 and Path(run.dir).is_dir()
    wandb.finish()


def test_every_unknown_name_of_wandb_does_nothing(old):
    wandb = importlib.import_module("wandb")
    video = importlib.import_module("wandb.sdk.data_types.video")
    assert repr(video.Video("x")) == "wandb.sdk.data_types.video.Video"
    wandb.watch(None, log="all"), wandb.save("x"), wandb.require("core"), wandb.login()
    with wandb.init() as run, wandb.Whatever(1) as thing:
        assert run is wandb.run and thing.a.b(3)["c"] is not None
        run.save(), run.log_code("."), run.define_metric("x")
        run.summary["best"] = 1
    assert wandb.summary["best"] == 1 and not isinstance(3, wandb.Image)

    class Callback(wandb.integration.sb3.WandbCallback):
        pass

    try:
        raise ValueError
    except (wandb.errors.CommError, ValueError):
        pass
    with pytest.raises(AttributeError):
        wandb.__wrapped__  # noqa: B018


def test_wandb_logs_what_is_no_number_as_text(tmp_path):
    with launch.installed(Options(log=str(tmp_path / "log"))) as summary:
        wandb = importlib.import_module("wandb")
        wandb.init()
        wandb.log({"picture": wandb.Image(1), "a": {"b": np.float32(2)}}, 7)
        wandb.run.log({"bad": float("nan"), "rows": torch.arange(2)}, step=8)
    first, last = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert first == {"_step": 7, "picture": "wandb.Image", "a": {"b": 2.0}}
    assert last == {"_step": 8, "bad": None, "rows": [0, 1]}
    assert list(summary) == ["picture", "a", "bad", "rows"]


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "argv, own",
    [
        (["a.py", "--log", "x", "--data", "y"], 0),
        (["--log", "x", "a.py", "--log", "y"], 2),
        (["--log=x", "--cuda-is-cpu", "-m", "a.b", "--old-jax"], 2),
        (["--gym-api", "0.26", "-m", "a"], 2),
        (["--help"], 1),
    ],
)
def test_flags_after_the_script_are_the_scripts(argv, own):
    assert split(argv) == (argv[:own], argv[own:])


PROGRAM = """
import argparse, multiprocessing, subprocess, sys

def work(name):
    import gym
    env = gym.make(name)
    env.seed(1)
    return float(env.reset()[0])

if __name__ == "__main__":
    from experiments.helper import VALUE
    parser = argparse.ArgumentParser()
    parser.add_argument("--log")
    parser.add_argument("--dataset")
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (there,) = pool.map(work, ["hopper-medium-v2"])
    line = "import wandb; print(wandb.__doc__.split()[0])"
    other = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
    print(VALUE, args.log, args.dataset, there == work("hopper-medium-v2"), other.stdout)
"""


def test_workers_and_the_scripts_own_packages_are_found(tmp_path):
    """As a newcomer would: another folder, where `experiments/` is the script's."""
    (tmp_path / "code" / "experiments").mkdir(parents=True)
    (tmp_path / "code" / "experiments" / "helper.py").write_text("VALUE = 'theirs'")
    (tmp_path / "code" / "job.py").write_text(PROGRAM)
    words = ["code/job.py", "--log", "x", "--dataset", "d"]
    done = subprocess.run(
        [sys.executable, "-m", "corl.shim", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["theirs", "x", "d", "True", "Stand-in"]


def test_a_module_starts_as_with_python_m(tmp_path, monkeypatch, capsys):
    package = tmp_path / "shim_job"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("VALUE = 5")
    (package / "main.py").write_text(
        "import gym, sys\nfrom .part import VALUE\n"
        "print(__name__, VALUE, sys.argv[1:], gym.make('Hopper-v2').spec.id)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path), list(sys.argv)
    main(["-m", "shim_job.main", "--seed", "1"])
    assert capsys.readouterr().out == "__main__ 5 ['--seed', '1'] Hopper-v2\n"
    assert before == (sys.path, sys.argv)
    with pytest.raises(SystemExit, match="there is no module shim_job.other"):
        main(["-m", "shim_job.other"])


# ---------------------------------------------------------------- cheap options


def test_what_goes_to_cuda_stays_on_the_cpu(tmp_path):
    with patches.applied(Options(cuda_is_cpu=True)):
        device = torch.device("cuda:0")
        net = torch.nn.Linear(2, 2).to(device).cuda()
        rows = torch.zeros(3, 2, device="cuda") + torch.ones(3, 2).to(device)
        out = net(rows.cuda().pin_memory())
        out.sum().backward()
        torch.cuda.synchronize()
        torch.save(net.state_dict(), tmp_path / "a.pt")
        loaded = torch.load(tmp_path / "a.pt", map_location=device)
        assert {out.device.type, net.weight.grad.device.type} == {"cpu"}
        assert torch.equal(loaded["weight"], net.weight)
        assert torch.tensor([1.0], device=device).device.type == "cpu"


def test_removed_names_of_collections_are_there_on_request():
    assert not hasattr(collections, "Mapping")
    with patches.applied(Options(old_python=True)):
        assert isinstance({}, collections.Mapping) and collections.Callable
        assert collections.OrderedDict is not None
    assert not hasattr(collections, "Mapping")


def test_removed_names_of_numpy_are_there_on_request():
    assert not hasattr(np, "float_")
    with patches.applied(Options(old_numpy=True)):
        assert np.zeros(1, np.bool).dtype == bool and np.float is float
        assert np.product([2, 3]) == 6 and np.infty == np.inf
    assert not hasattr(np, "float_") and not hasattr(np, "product")


def test_removed_names_of_jax_are_there_on_request(monkeypatch):
    jax, tree, random = (type(sys)(n) for n in ("jax", "jax.tree_util", "jax.random"))
    jax.__spec__ = importlib.machinery.ModuleSpec("jax", None)
    jax.tree_util, jax.random, jax.Array = tree, random, list
    for name in set(patches.JAX.values()):
        setattr(tree, name, lambda name=name: name)
    for module in (jax, tree, random):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with patches.applied(Options(old_jax=True)):
        assert jax.tree_map() == tree.tree_multimap() == "tree_map"
        assert jax.tree_leaves() == "tree_leaves" and jax.random.KeyArray is list
    assert not hasattr(jax, "tree_map") and not hasattr(tree, "tree_multimap")
