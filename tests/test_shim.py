"""The stand-ins for gym, d4rl and wandb behave as CORL's scripts expect; CORL's YAMLs parse.

With CORL_DIR set to CORL's folder its own scripts are run, too.
"""

import importlib
import json
import os
import random
import sys
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import awac, spot, td3_bc
from corl import checkpoints, envs, tasks
from corl.config import parse_config
from corl.data import sources
from corl.shim import launch
from corl.shim.__main__ import main
from corl.shim.options import PACKAGES, Options, Unavailable

TASK = "hopper-medium-v2"


@pytest.fixture
def gym():
    with launch.installed():
        import gym

        yield gym


@pytest.fixture(scope="module")
def once():
    with launch.installed():
        yield importlib.import_module("gym")


def write_data(path, rows=160, episode=20, seed=0):
    """A hopper file; every third episode ends by a terminal, the others by a time-out."""
    rng = np.random.default_rng(seed)
    ends = np.arange(rows) % episode == episode - 1
    fell = ends & (np.arange(rows) // episode % 3 == 0)
    raw = {
        "observations": rng.normal(size=(rows, 11)),
        "actions": rng.uniform(-1, 1, (rows, 3)),
        "rewards": rng.uniform(1, 3, rows),
        "terminals": fell,
        "timeouts": ends & ~fell,
    }
    raw = {k: v if v.dtype == bool else v.astype(np.float32) for k, v in raw.items()}
    with h5py.File(path, "w") as file:
        for name, values in raw.items():
            file[name] = values
    return raw


@pytest.fixture
def data(tmp_path):
    return tmp_path / "hopper.hdf5", write_data(tmp_path / "hopper.hdf5")


# ---------------------------------------------------------------- gym


def test_episodes_are_those_of_the_environment(gym):
    old, new = gym.make(TASK), envs.make(TASK)
    assert old.seed(5) == [5]
    first, (expected, _) = old.reset(), new.reset(seed=5)
    np.testing.assert_array_equal(first, expected)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        action = rng.uniform(-1, 1, 3)
        observation, reward, done, info = old.step(action)
        expected = new.step(action)
        np.testing.assert_array_equal(observation, expected[0])
        assert reward == expected[1] and done is bool(expected[2])
        assert "TimeLimit.truncated" not in info  # the robot falls first
        if done:
            return
    raise AssertionError("hopper did not fall")


def test_time_limit_is_done_and_marked(gym):
    env = gym.make("halfcheetah-medium-v2")  # never falls
    env.reset()
    for i in range(1000):
        _, _, done, info = env.step(np.zeros(6))
        assert done is (i == 999) and info.get("TimeLimit.truncated", False) is done


class LimitAndEnd(gymnasium.Env):
    """Terminates in its first step, where the time limit of 1 falls as well."""

    observation_space = action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1), {}

    def step(self, action):
        return np.zeros(1), 1.0, True, False, {}


def test_an_end_in_the_last_step_is_not_a_truncation(gym, monkeypatch):
    monkeypatch.setattr(envs, "make", lambda name: LimitAndEnd())
    env = gym.make(TASK, max_episode_steps=1)
    env.reset()
    _, _, done, info = env.step(np.zeros(1))
    assert done is True and info["TimeLimit.truncated"] is False


def test_seed_holds_for_the_next_reset_only(gym):
    env, states = gym.make(TASK), []
    for seed in (3, 3, 4):
        env.seed(seed)
        states += [env.reset(), env.reset()]
    assert (states[0] == states[2]).all() and (states[1] == states[3]).all()
    assert (states[0] != states[1]).any() and (states[0] != states[4]).any()
    (one,), (two,) = env.seed(), env.seed(None)
    assert one != two and isinstance(one, int)


def test_spaces_and_limits_are_what_corl_reads(gym):
    env = gym.make(TASK)
    assert env.observation_space.shape == (11,) and env.action_space.shape == (3,)
    assert float(env.action_space.high[0]) == 1.0
    assert env._max_episode_steps == 1000
    env.action_space.seed(1)
    sample = env.action_space.sample()
    env.action_space.seed(1)
    np.testing.assert_array_equal(sample, env.action_space.sample())
    assert isinstance(env, gym.Env) and gym.spaces.Box is gymnasium.spaces.Box


def test_global_random_streams_are_not_touched(gym):
    np.random.seed(0), random.seed(0), torch.manual_seed(0)
    before = np.random.get_state()[1].copy(), np.random.get_state()[2]
    expected = random.getstate(), torch.get_rng_state()
    env = gym.make(TASK)
    env.seed(0)
    for _ in range(3):
        env.reset()
        env.step(env.action_space.sample())
    env.seed()
    env.reset()
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])
    assert before[1] == np.random.get_state()[2]
    assert random.getstate() == expected[0]
    assert torch.equal(torch.get_rng_state(), expected[1])


def test_wrappers_transform_and_let_the_rest_through(gym):
    env = gym.make(TASK)
    wrapped = gym.wrappers.TransformObservation(env, lambda state: (state - 1.0) / 2.0)
    wrapped = gym.wrappers.TransformReward(wrapped, lambda reward: 10.0 * reward)
    twin = envs.make(TASK)
    wrapped.seed(1)
    state, (expected, _) = wrapped.reset(), twin.reset(seed=1)
    np.testing.assert_array_equal(state, (expected - 1.0) / 2.0)
    state, reward, done, info = wrapped.step(np.zeros(3))
    expected = twin.step(np.zeros(3))
    np.testing.assert_array_equal(state, (expected[0] - 1.0) / 2.0)
    assert reward == 10.0 * expected[1] and done is False
    assert wrapped.action_space is env.action_space
    assert wrapped.unwrapped is env.unwrapped is not env
    assert wrapped.get_normalized_score(3234.3) == env.get_normalized_score(3234.3)
    with pytest.raises(AttributeError, match="_max_episode_steps"):
        wrapped._max_episode_steps  # noqa: B018  (hidden in gym 0.23, too)


@pytest.mark.parametrize(
    "task, words",
    [("hopper-v9", "unknown task"), ("pen-human-v1", "pen-human-v1 needs the package")],
)
def test_a_task_without_environment_is_refused(gym, task, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(Unavailable, match=words):
        gym.make(task)


# ---------------------------------------------------------------- d4rl


def test_scores_are_fractions(gym):
    import d4rl

    env = gym.make("walker2d-expert-v2")
    assert (env.ref_min_score, env.ref_max_score) == (1.629008, 4592.3)
    middle = (1.629008 + 4592.3) / 2
    assert float(env.get_normalized_score(middle)) == pytest.approx(0.5)
    scores = d4rl.get_normalized_score(TASK, np.array([-20.272305, 3234.3]))
    np.testing.assert_allclose(scores, [0.0, 1.0], atol=1e-12)
    assert d4rl.infos.REF_MIN_SCORE[TASK] == -20.272305
    assert d4rl.infos.REF_MAX_SCORE["antmaze-umaze-v2"] == 1.0


def d4rl_rule(raw, limit, terminate_on_end):
    """D4RL's rule, one row after the other."""
    out = {k: [] for k in ("observations", "actions", "next_observations")}
    out |= {"rewards": [], "terminals": []}
    step = 0
    for i in range(len(raw["rewards"]) - 1):
        cut = raw["timeouts"][i] if "timeouts" in raw else step == limit - 1
        if cut and not terminate_on_end:
            step = 0
            continue
        if raw["terminals"][i] or cut:
            step = 0
        for name in ("observations", "actions", "rewards", "terminals"):
            out[name].append(raw[name][i])
        out["next_observations"].append(raw["observations"][i + 1])
        step += 1
    return {k: np.array(v) for k, v in out.items()}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(draw=st.data(), terminate_on_end=st.booleans(), stores_timeouts=st.booleans())
def test_qlearning_dataset_is_d4rls(once, draw, terminate_on_end, stores_timeouts):
    ends = draw.draw(st.lists(st.sampled_from([0, 0, 0, 1, 2, 3]), min_size=2))
    rng = np.random.default_rng(len(ends))
    raw = {
        "observations": rng.normal(size=(len(ends), 2)),
        "actions": rng.normal(size=(len(ends), 1)),
        "rewards": rng.normal(size=len(ends)),
        "terminals": np.array(ends) % 2 == 1,
        "next_observations": np.zeros((len(ends), 2)),  # never used
    }
    if stores_timeouts:
        raw["timeouts"] = np.array(ends) >= 2
    expected = d4rl_rule(raw, 1000, terminate_on_end)
    if not len(expected["rewards"]):
        return
    env = None if stores_timeouts else once.make(TASK)
    d4rl = importlib.import_module("d4rl")
    got = d4rl.qlearning_dataset(env, raw, terminate_on_end)
    assert set(got) == set(expected)
    for name, values in expected.items():
        assert got[name].dtype == (bool if name == "terminals" else np.float32)
        np.testing.assert_array_equal(got[name], values.astype(got[name].dtype))


@pytest.mark.parametrize("terminate_on_end", [False, True])
def test_a_tasks_own_data_is_found_and_fresh(data, terminate_on_end):
    path, raw = data
    with launch.installed(Options("file", str(path))):
        import d4rl
        import gym

        env = gym.wrappers.TransformObservation(gym.make(TASK), lambda state: state)
        first = d4rl.qlearning_dataset(env, terminate_on_end=terminate_on_end)
        expected = d4rl_rule(raw, 1000, terminate_on_end)
        for name, values in expected.items():
            np.testing.assert_array_equal(first[name], values)
            first[name][:] = 0  # CORL changes rewards in place
        second = d4rl.qlearning_dataset(env, terminate_on_end=terminate_on_end)
        np.testing.assert_array_equal(second["rewards"], expected["rewards"])
        np.testing.assert_array_equal(env.get_dataset()["timeouts"], raw["timeouts"])


def test_missing_data_is_unavailable(monkeypatch, tmp_path):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    with launch.installed(Options("d4rl_dir")):
        import d4rl
        import gym

        with pytest.raises(Unavailable, match="hopper_medium-v2.hdf5"):
            d4rl.qlearning_dataset(gym.make(TASK))


def test_a_real_d4rl_package_does_not_meet_the_stand_ins(gym, monkeypatch):
    import d4rl

    def resolve(task, *given, **options):
        assert not {"gym", "d4rl", "wandb"} & set(sys.modules)
        assert str(PACKAGES) not in sys.path
        sys.modules["d4rl"] = "the real one"
        return sources.Dataset(task, {"rewards": 1}, {}, {})

    monkeypatch.setattr(sources, "resolve", resolve)
    assert d4rl.qlearning_dataset(gym.make(TASK)) == {"rewards": 1}
    assert sys.modules["d4rl"] is d4rl and sys.modules["gym"] is gym


# ---------------------------------------------------------------- modules, log, script


@pytest.mark.parametrize("fails", [False, True])
def test_the_stand_ins_leave_no_trace(monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "wandb", theirs := type(sys)("wandb"))
    before = torch.load, list(sys.path), dict(os.environ)
    others = sys.modules.get("gym")
    try:
        with launch.installed(
            Options("file", "x.hdf5", old_numpy=True, cuda_is_cpu=True)
        ):
            assert importlib.import_module("gym.wrappers").TransformReward
            assert sys.modules["gym"] is not others
            assert sys.modules["wandb"] is not theirs and torch.load is not before[0]
            assert np.float_ is np.float64 and torch.zeros(1).cuda().device.type == "cpu"
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert sys.modules.get("gym") is others
    assert sys.modules["wandb"] is theirs and not hasattr(np, "float_")
    assert before == (torch.load, list(sys.path), dict(os.environ))
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1).cuda()


SCRIPT = """
import sys
import uuid
from dataclasses import dataclass
import d4rl
import gym
import numpy as np
import torch
import wandb

class Scalar(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.constant = torch.nn.Parameter(torch.tensor(value))

@dataclass
class Config:
    env: str = sys.argv[1]

def evaluate(env: gym.Env):
    env.seed(0)
    state, done, total = env.reset(), False, 0.0
    while not done:
        state, reward, done, info = env.step(np.zeros(3))
        total += reward
    return total

if __name__ == "__main__":
    env = gym.make(Config().env)
    data = d4rl.qlearning_dataset(env)
    env = gym.wrappers.TransformObservation(env, lambda state: state / 2)
    wandb.init(config={"env": sys.argv[1]}, project="P", group="G", name="N",
               id=str(uuid.uuid4()))
    wandb.run.save()
    wandb.log({"loss": np.float32(0.5), "rows": len(data["rewards"])}, step=1)
    total = evaluate(env)
    wandb.log({"eval/d4rl_normalized_score": env.get_normalized_score(total) * 100.0,
               "many": torch.ones(2)}, step=2)
    torch.save({"sac_log_alpha": Scalar(-0.5)}, sys.argv[2])
    assert torch.load(sys.argv[2])["sac_log_alpha"].constant.item() == -0.5
    wandb.finish()
"""


def test_a_script_in_corls_manner_runs(tmp_path, data, capsys):
    script, log = tmp_path / "script.py", tmp_path / "logs" / "log.jsonl"
    script.write_text(SCRIPT)
    options = ["--dataset_path", str(data[0]), "--log", str(log)]
    argv = list(sys.argv)
    main([*options, str(script), TASK, str(tmp_path / "checkpoint.pt")])
    assert sys.argv == argv
    first, last = [json.loads(line) for line in log.read_text().splitlines()]
    rows = len(d4rl_rule(data[1], 1000, False)["rewards"])
    assert first == {"_step": 1, "loss": 0.5, "rows": rows}
    assert last["_step"] == 2 and last["many"] == [1.0, 1.0]
    env, total, over = envs.make(TASK), 0.0, False
    env.reset(seed=0)
    while not over:
        _, reward, over, _, _ = env.step(np.zeros(3))
        total += reward
    score = float(tasks.normalized_score(TASK, total))
    assert last["eval/d4rl_normalized_score"] == pytest.approx(score, rel=1e-12)
    assert (
        f"last eval/d4rl_normalized_score: {score:.5f}"[:-2] in capsys.readouterr().out
    )


def test_a_foreign_class_in_a_checkpoint_is_refused_in_a_script(tmp_path):
    script, marker = tmp_path / "script.py", tmp_path / "executed"
    script.write_text(
        "import os, sys, torch\n"
        "class Scalar(torch.nn.Module): pass\n"
        "class Evil:\n"
        "    def __reduce__(self): return os.system, ('touch ' + sys.argv[2],)\n"
        "torch.save({'sac_log_alpha': Scalar(), 'actor': Evil()}, sys.argv[1])\n"
        "torch.load(sys.argv[1])\n"
    )
    with pytest.raises(Exception, match="[Ww]eights.only"):
        launch.run_file(script, [str(tmp_path / "checkpoint.pt"), str(marker)])
    assert not marker.exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nothing.py"], "nothing.py does not exist"),
        (["SCRIPT", "hopper-medium-v7"], "unknown task"),
        (["SCRIPT", "antmaze-umaze-v0"], "antmaze-umaze-v0"),
        (["--dataset_path", "nothing.hdf5", "SCRIPT", TASK], "nothing.hdf5"),
    ],
)
def test_what_cannot_be_had_ends_with_one_line(tmp_path, arguments, words):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with pytest.raises(SystemExit) as caught:
        main([str(script) if a == "SCRIPT" else a for a in arguments])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("error: ")


def test_an_error_of_the_script_keeps_its_traceback(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise ValueError('mine')")
    with pytest.raises(ValueError, match="mine"):
        main([str(script)])


# ---------------------------------------------------------------- CORL's YAML files

RUN = "checkpoints_path: null\ndevice: cuda\nload_model: ''\nproject: CORL\nseed: 0\n"
RUN += "batch_size: 256\nbuffer_size: 10000000\ndiscount: 0.99\n"
RUN += "offline_iterations: 1000000\nonline_iterations: 1000000\n"
MAZE = "eval_freq: 50000\nn_episodes: 100\nnormalize_reward: true\n"
HAND = "eval_freq: 5000\nn_episodes: 10\nnormalize_reward: false\n"
IQL = "actor_lr: 3e-4\nqf_lr: 3e-4\nvf_lr: 3e-4\ntau: 0.005\nnormalize: true\n"
IQL += "iql_deterministic: false\ngroup: IQL-D4RL\nname: IQL_{env}\n"
CQL = "alpha_multiplier: 1.0\nbackup_entropy: false\nbc_steps: 0\ncql_n_actions: 10\n"
CQL += "cql_clip_diff_max: .inf\ncql_clip_diff_min: -200\ncql_importance_sample: true\n"
CQL += "cql_max_target_backup: true\ncql_target_action_gap: 0.8\ncql_temp: 1.0\n"
CQL += "normalize: false\northogonal_init: true\npolicy_lr: 0.0001\nqf_lr: 0.0003\n"
CQL += "soft_target_update_rate: 0.005\ntarget_update_period: 1\nname: CQL\n"
CQL += "use_automatic_entropy_tuning: true\ngroup: cql-{env}-multiseed-v0\n"
CQL_MAZE = "cql_alpha: 5.0\ncql_alpha_online: 5.0\ncql_lagrange: true\n"
CQL_MAZE += "q_n_hidden_layers: 5\nreward_bias: -5.0\nreward_scale: 10.0\n"
CQL_HAND = "cql_alpha: 1.0\ncql_alpha_online: 1.0\ncql_lagrange: false\n"
CQL_HAND += "q_n_hidden_layers: 3\nreward_bias: 0.0\nreward_scale: 1.0\n"
CAL_QL = "mixing_ratio: 0.5\nis_sparse_reward: {sparse}\n"
# algorithm -> its lines in CORL's finetune YAMLs for antmaze and for Adroit
YAML = {
    "iql": (
        RUN + MAZE + IQL + "beta: 10.0\niql_tau: 0.9\n",
        RUN + HAND + IQL + "beta: 3.0\niql_tau: 0.8\nactor_dropout: 0.1\n",
    ),
    "cql": (RUN + MAZE + CQL + CQL_MAZE, RUN + HAND + CQL + CQL_HAND),
    "cal_ql": (
        RUN + MAZE + CQL + CQL_MAZE + CAL_QL,
        RUN + HAND + CQL + CQL_HAND + CAL_QL,
    ),
}
MAZES = [f"antmaze-{kind}-v2" for kind in tasks.ANTMAZES]
HANDS = [f"{robot}-cloned-v1" for robot in ("pen", "door", "hammer", "relocate")]


def corl_yaml(algorithm, env):
    lines = YAML[algorithm][not env.startswith("antmaze")]
    sparse = str(env.startswith("antmaze")).lower()
    return f"env: {env}\n" + lines.format(env=env, sparse=sparse)


@pytest.mark.parametrize("algorithm", YAML)
@pytest.mark.parametrize("env", MAZES + HANDS)
def test_corls_yaml_files_are_read_unchanged(tmp_path, algorithm, env):
    module = importlib.import_module(f"algorithms.{algorithm}")
    path = tmp_path / "corl.yaml"
    path.write_text(corl_yaml(algorithm, env))
    config = parse_config(module.TrainConfig, ["--config", str(path)])
    assert (config.env, config.seed, config.discount) == (env, 0, 0.99)
    assert config.buffer_size == 10_000_000 and config.qf_lr == 3e-4
    assert config.normalize_reward is env.startswith("antmaze")
    if algorithm != "iql":
        assert config.cql_clip_diff_max == float("inf")
        assert config.cql_clip_diff_min == -200.0
        assert config.q_n_hidden_layers == (5 if env in MAZES else 3)


TD3_BC = "alpha: 2.5\nexpl_noise: 0.1\nmax_timesteps: 1000000\nname: TD3-BC\n"
TD3_BC += "noise_clip: 0.5\nnormalize: true\npolicy_freq: 2\npolicy_noise: 0.2\n"
TD3_BC += "tau: 0.005\ngroup: td3-bc-multiseed-v0\n"
AWAC = "awac_lambda: 0.1\ndeterministic_torch: false\ngamma: 0.99\nhidden_dim: 256\n"
AWAC += "learning_rate: 0.0003\ntau: 0.005\ntest_seed: 69\ngroup: awac-multiseed-v0\n"
SPOT = "actor_init_w: 0.001\nactor_lr: 0.0001\nbeta: 0.5\ncritic_init_w: 0.003\n"
SPOT += (
    "critic_lr: 0.0003\neval_seed: 0\nexpl_noise: 0.1\niwae: false\nlambd_cool: true\n"
)
SPOT += "noise_clip: 0.5\nnormalize: false\nnum_samples: 1\npolicy_freq: 2\n"
SPOT += "policy_noise: 0.2\ntau: 0.005\nvae_hidden_dim: 750\nvae_iterations: 100000\n"
SPOT += "vae_latent_dim: null\nvae_lr: 0.001\ngroup: spot-multiseed-v0\nname: SPOT\n"
# On Adroit, on antmaze.
SPOT_OWN = ("lambd: 1.0\nlambd_end: 0.5\nonline_discount: 0.99\n",)
SPOT_OWN += ("lambd: 0.25\nlambd_end: 0.2\nonline_discount: 0.995\n",)


@pytest.mark.parametrize("env", [*MAZES, *HANDS, "hopper-medium-v2"])
def test_corls_offline_yaml_files_of_td3_bc_are_read_and_stay_offline(tmp_path, env):
    lines = RUN.replace("offline_iterations: 1000000\nonline_iterations: 1000000\n", "")
    assert "iterations" not in lines
    path = tmp_path / "corl.yaml"
    path.write_text(f"env: {env}\n" + lines + TD3_BC + HAND)
    config = parse_config(td3_bc.TrainConfig, ["--config", str(path)])
    assert (config.env, config.offline_iterations) == (env, 1_000_000)
    assert config.online_iterations == 0 and config.name == "TD3-BC"
    assert config.buffer_size == 10_000_000 and config.policy_noise == 0.2


@pytest.mark.parametrize("env", MAZES + HANDS)
def test_corls_finetune_yaml_files_of_awac_are_read_unchanged(tmp_path, env):
    lines = RUN.replace("load_model: ''\n", "").replace("discount: 0.99\n", "")
    lines += MAZE if env in MAZES else HAND
    for ours, corls in (("eval_freq", "eval_frequency"), ("n_epi", "n_test_epi")):
        lines = lines.replace(ours, corls)
    path = tmp_path / "corl.yaml"
    path.write_text(f"env_name: {env}\n" + lines.replace("seed: 0", "seed: 42") + AWAC)
    config = parse_config(awac.TrainConfig, ["--config", str(path)])
    assert (config.env, config.seed, config.eval_seed) == (env, 42, 69)
    assert (config.discount, config.awac_lambda) == (0.99, 0.1)
    assert config.eval_freq == (50_000 if env in MAZES else 5_000)
    assert config.n_episodes == (100 if env in MAZES else 10)
    assert config.normalize_reward is (env in MAZES) and config.normalize


@pytest.mark.parametrize("env", MAZES + HANDS)
def test_corls_finetune_yaml_files_of_spot_are_read_unchanged(tmp_path, env):
    lines = RUN.replace("10000000", "2000000") + (MAZE if env in MAZES else HAND)
    path = tmp_path / "corl.yaml"
    path.write_text(f"env: {env}\n" + lines + SPOT + SPOT_OWN[env in MAZES])
    config = parse_config(spot.TrainConfig, ["--config", str(path)])
    assert (config.env, config.qf_lr, config.actor_lr) == (env, 3e-4, 1e-4)
    assert (config.vae_latent_dim, config.iwae, config.normalize) == (None, False, False)
    assert config.normalize_reward is (env in MAZES) and config.lambd_cool
    assert config.online_discount == (0.995 if env in MAZES else 0.99)


@pytest.mark.parametrize(
    "name, dims, limits",
    [
        ("pen-cloned-v1", (45, 24, 100), (96.262799, 3076.8331017826877)),
        ("door-human-v1", (39, 28, 200), (-56.512833, 2880.5693087298737)),
        ("hammer-expert-v0", (46, 26, 200), (-274.856578, 12794.134825156867)),
        ("relocate-cloned-v1", (39, 30, 200), (-6.425911, 4233.877797728884)),
    ],
)
def test_adroit_tasks_are_known_and_their_environment_is_optional(
    name, dims, limits, monkeypatch
):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    task = tasks.task(name)
    assert (task.state_dim, task.action_dim, task.horizon) == dims
    np.testing.assert_allclose(tasks.normalized_score(name, limits), [0, 100], atol=1e-9)
    with pytest.raises(ValueError, match=f"{name} needs.*requirements-robotics"):
        envs.make(name)


@pytest.mark.parametrize("name", ["pen-cloned-v2", "pen-medium-v1", "hopper-human-v2"])
def test_no_adroit_names_beyond_d4rls(name):
    with pytest.raises(ValueError, match="unknown task"):
        tasks.task(name)


# ---------------------------------------------------------------- CORL itself

CORL_DIR = os.environ.get("CORL_DIR")
SHORT = "--offline_iterations 4 --online_iterations 4 --eval_freq 4 --n_episodes 1"
UPSTREAM = {
    "finetune/iql.py": SHORT,
    "finetune/cql.py": SHORT,
    "finetune/cal_ql.py": SHORT,
    "finetune/spot.py": SHORT + " --vae_iterations 2",
    "offline/td3_bc.py": "--max_timesteps 4 --eval_freq 4 --n_episodes 1",
}


@pytest.mark.optional("corl")
@pytest.mark.parametrize("name", UPSTREAM)
def test_upstream_scripts_run_and_their_checkpoints_load_both_ways(tmp_path, data, name):
    script = Path(CORL_DIR) / "algorithms" / name
    flags = [*UPSTREAM[name].split(), "--env", TASK, "--device", "cpu"]
    flags += ["--buffer_size", "1000", "--batch_size", "16", "--checkpoints_path"]
    options = Options(path=str(data[0]))
    summary = launch.run_file(script, [*flags, str(tmp_path / "a")], options)
    assert any("d4rl_normalized_score" in key for key in summary)
    saved = max(tmp_path.glob("a/*/checkpoint_*.pt"), key=lambda p: p.stat().st_mtime)
    state = checkpoints.load_corl_checkpoint(saved)
    out = tmp_path / "checkpoint_9.pt"
    checkpoints.save_corl_checkpoint(out, state)
    flags += [str(tmp_path / "b"), "--load_model", str(out)]
    launch.run_file(script, flags, options)
    (again, *_) = sorted(tmp_path.glob("b/*/checkpoint_*.pt"))
    again = checkpoints.load_corl_checkpoint(again)
    assert again["total_it"] > state["total_it"]
    for name in {"sac_log_alpha", "cql_log_alpha"} & set(state):
        # CORL's own fault: after a load its optimizers move the parameters of before.
        assert again[name]["constant"] == state[name]["constant"] != 0.0


def leaves(value, name=""):
    if isinstance(value, dict | list | tuple):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for n, x in pairs for k, v in leaves(x, f"{name}.{n}").items()}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value}


# Both scripts are given these; the spellings are CORL's.
PHASES = f"--env {TASK} --offline_iterations 12 --online_iterations 40"
EVERY = " --eval_freq 26 --n_episodes 1"
WHOLE = {
    **{f"finetune/{algorithm}": PHASES + EVERY for algorithm in YAML},
    "finetune/awac": PHASES.replace("env", "env_name")
    + " --eval_frequency 26 --n_test_episodes 1 --gamma 0.9 --test_seed 5",
    "finetune/spot": PHASES + EVERY + " --vae_iterations 6 --critic_lr 1e-3"
    " --lambd_cool true --online_discount 0.9",
    "offline/td3_bc": f"--env {TASK} --max_timesteps 52{EVERY}",
}


@pytest.mark.optional("corl")
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_run_is_upstreams_bit_for_bit(tmp_path, data, name):
    algorithm = name.split("/")[1]
    ours = importlib.import_module(f"algorithms.{algorithm}")
    flags = f"{WHOLE[name]} --seed 3 --normalize_reward true --buffer_size 1000 "
    flags += "--batch_size 32 --device cpu --checkpoints_path"
    flags = flags.split()
    script = Path(CORL_DIR) / "algorithms" / f"{name}.py"
    options = Options(path=str(data[0]))
    launch.run_file(script, [*flags, str(tmp_path / "theirs")], options)
    own = ["--compat", "true", "--threads", "1", "--compile", "false"]
    own += ["--dataset_path", str(data[0]), "--runs_dir"]
    argv = [*flags, str(tmp_path / "ours"), *own, str(tmp_path / "runs")]
    ours.train(parse_config(ours.TrainConfig, argv))
    for file in ("checkpoint_25.pt", "checkpoint_51.pt"):
        one, two = (
            leaves(checkpoints.load_corl_checkpoint(*tmp_path.glob(f"{who}/**/{file}")))
            for who in ("theirs", "ours")
        )
        assert len(one) > 20 and set(one) <= set(two)
        assert [key for key in one if one[key] != two[key]] == []
