"""Any gymnasium environment and data of the user's own: what a newcomer brings runs."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from algorithms import iql
from corl import envs, machine, own_envs, rewards, run_tables, tasks, trained
from corl.config import parse_config
from corl.data import sources
from corl.standin import own_policy
from experiments import report, sweep
from experiments.cells import read_state, write_cell
from experiments.plan import plan
from experiments.workers import run_cell

ROOT = Path(__file__).parent.parent
LOW, HIGH = np.float32([0.0, -3.0]), np.float32([10.0, 1.5])


class Point(gym.Env):
    """Notes the actions that it gets; its actions are a 2 x 1 array."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2, 1), np.float32)
    action_space = gym.spaces.Box(LOW[:, None], HIGH[:, None])
    seen: list = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=(2, 1)).astype(np.float32)
        return self.place, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.seen.append(action)
        self.place = self.place + np.float32(0.1) * action
        return self.place, -float(np.abs(self.place).sum()), False, False, {}


class Odd(Point):
    def __init__(self, actions=None, states=None):
        self.action_space = actions or self.action_space
        self.observation_space = states or self.observation_space


ENDLESS = gym.spaces.Box(-np.inf, np.inf, (2,))
gym.register("TestPoint-v0", Point)
gym.register("TestInfinite-v0", Odd, kwargs={"actions": ENDLESS}, max_episode_steps=9)
gym.register("TestInt-v0", Odd, kwargs={"actions": gym.spaces.Box(0, 9, (1,), int)})
STATES = gym.spaces.Dict({"a": ENDLESS, "b": gym.spaces.Discrete(2)})
gym.register("TestDict-v0", Odd, kwargs={"states": STATES}, max_episode_steps=9)


def point(horizon=8, **scores):
    return envs.find_task("TestPoint-v0", horizon, **scores)


# ---------------------------------------------------------------- the environment


def test_the_environment_gets_its_own_range_shape_and_type():
    env = envs.make(point())
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    Point.seen.clear()
    assert env.reset(seed=0)[0].shape == (2,)
    for action in ([-1, -1], [1, 1], [0, 0], [-7, 7]):
        env.step(np.float32(action))
    expected = [LOW, HIGH, LOW / 2 + HIGH / 2, [LOW[0], HIGH[1]]]
    np.testing.assert_array_equal(np.array(Point.seen)[..., 0], expected)


finite = st.floats(-(2.0**20), 2.0**20, width=32)
unit = arrays.arrays(np.float32, 2, elements=st.floats(-1, 1, width=32))


@settings(max_examples=200, deadline=None)
@given(finite, st.floats(2.0**-10, 2.0**20, width=32), st.data())
def test_rescaling_there_and_back_is_exact(low, width, data):
    high = float(np.float32(low + width))
    if not high > low:
        return
    task = tasks.Task("t", "", "", "", "t", 1, 1, None, None, 9, ((low,), (high,)))
    own = np.float32([data.draw(st.floats(low, high, width=32)), low, high])[:, None]
    inside = task.to_unit(own)
    assert np.abs(inside).max() == 1.0 and inside[1:, 0].tolist() == [-1.0, 1.0]
    back = task.to_env(inside)
    # Near zero float32 is finer than what float64 has left beside a far middle.
    rounding = 2.0**-51 * max(abs(low), abs(high))
    assert np.abs(back - own).max() <= rounding
    coarse = np.spacing(np.abs(own)) > 4 * rounding
    np.testing.assert_array_equal(back.astype(np.float32)[coarse], own[coarse])


@settings(max_examples=50, deadline=None)
@given(unit)
def test_what_an_algorithm_does_comes_back_from_a_file_of_the_environments_range(action):
    task = point()
    stored = task.to_env(action).astype(np.float32)
    np.testing.assert_allclose(task.to_unit(stored), action, rtol=0, atol=4e-7)


def test_a_range_of_minus_one_to_one_is_left_alone():
    task = envs.find_task("Hopper-v5")
    action = np.float32([0.1, -0.3, 1])
    assert task.bounds is None and task.to_env(action) is action
    assert own_envs.about_actions(task) == "" and task.horizon == 1000
    assert "[0, 10], [-3, 1.5]" in own_envs.about_actions(point())


@pytest.mark.parametrize(
    "env_id, says",
    [
        ("CartPole-v1", "Discrete.*discrete actions are not"),
        ("TestInt-v0", "Box of floats"),
        ("TestDict-v0", "FlattenObservation"),
        ("TestInfinite-v0", r"action 0 has the range \[-inf, inf\].*finite bounds"),
        ("TestPoint-v0", "no time limit.*--horizon"),
        ("no_such_module:X-v0", "No module named 'no_such_module'"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_line(env_id, says):
    with pytest.raises(ValueError, match=says) as error:
        envs.find_task(env_id)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--env hopper-medium-v2 --horizon 9", "horizon of hopper-medium-v2 is D4RL's"),
        ("--env Hopper-v5 --ref_min_score 1", "give both"),
        ("--env Hopper-v5 --ref_min_score 1 --ref_max_score 1", "the lower one first"),
        ("--env Hopper-v5 --env_backend d4rl", "must be gymnasium"),
        ("--env Hoper-v5", "unknown task.*gymnasium id"),
    ],
)
def test_settings_that_do_not_fit_the_environment_are_refused(flags, says, capsys):
    with pytest.raises(SystemExit):
        parse_config(iql.TrainConfig, flags.split())
    assert re.search(says, capsys.readouterr().err)


# ---------------------------------------------------------------- data


def episodes(lengths=(5, 8, 3, 8, 6, 8, 8), seed=0):
    """Episodes of `Point`, those of full length cut by time: dicts of T + 1 states."""
    rng, found = np.random.default_rng(seed), []
    for length in lengths:
        actions = rng.uniform(LOW, HIGH, (length, 2)).astype(np.float32)
        steps = np.vstack([rng.normal(size=2), 0.1 * actions])
        states = np.cumsum(steps, 0).astype(np.float32)
        terminals = np.arange(length) == length - 1 if length < 8 else np.zeros(length)
        rewards_ = -np.abs(states[1:]).sum(1)
        found.append(
            dict(
                observations=states,
                actions=actions,
                rewards=rewards_,
                terminals=terminals.astype(bool),
            )
        )
    return found


def rows_of(parts):
    rows = {k: np.concatenate([p[k] for p in parts]) for k in list(parts[0])[1:]}
    rows["observations"] = np.concatenate([p["observations"][:-1] for p in parts])
    rows["next_observations"] = np.concatenate([p["observations"][1:] for p in parts])
    ends = np.cumsum([len(p["actions"]) for p in parts]) - 1
    rows["timeouts"] = np.isin(np.arange(ends[-1] + 1), ends) & ~rows["terminals"]
    return rows


def write_hdf5(path, rows):
    with h5py.File(path, "w") as file:
        for key, values in rows.items():
            file[key] = values
    return path


def layouts_of(parts, folder):
    """Name -> the same episodes in another ordered layout."""
    rows = rows_of(parts)
    renamed = {
        "states": rows["observations"][..., None],
        "actions": rows["actions"].astype(np.float64)[..., None],
        "rewards": rows["rewards"][:, None],
        "next_states": rows["next_observations"][..., None],
        "dones": rows["terminals"].astype(np.uint8),
    }
    np.savez(folder / "rows.npz", **rows)
    np.savez_compressed(folder / "renamed.npz", **renamed)
    for name in ("npz", "hdf5"):
        (folder / name).mkdir()
    for i, part in enumerate(parts):
        np.savez(folder / "npz" / f"e{i + 8}.npz", **part)
        ended = {**part, "terminals": part["terminals"].any()}
        write_hdf5(folder / "hdf5" / f"e{i + 8}.hdf5", ended)
    return {
        "dict": rows,
        "hdf5": write_hdf5(folder / "rows.hdf5", rows),
        "npz": folder / "rows.npz",
        "renamed, without time-outs": folder / "renamed.npz",
        "folder of npz": folder / "npz",
        "folder of hdf5, one flag each": folder / "hdf5",
    }


def test_every_ordered_layout_loads_to_the_same_arrays(tmp_path):
    parts = episodes([5, 8, 7, 8, 6] * 3)
    expected = rows_of(parts)
    for name, path in layouts_of(parts, tmp_path).items():
        found = sources.resolve(point(), path=path)
        for key in ("observations", "next_observations", "rewards", "terminals"):
            np.testing.assert_array_equal(
                found.arrays[key], expected[key].astype(found.arrays[key].dtype), name
            )
        unit_actions = point().to_unit(expected["actions"]).astype(np.float32)
        np.testing.assert_array_equal(found.arrays["actions"], unit_actions)
        assert found.statistics["episodes"] == len(parts), name
        assert found.statistics["too_long"] == 0
        returns = [p["rewards"].sum() for p in parts]
        np.testing.assert_allclose(found.returns, returns, rtol=1e-5)


@pytest.mark.parametrize("timeouts", [True, False])
def test_rows_in_any_order_load_to_the_same_transitions_without_episodes(timeouts):
    rows = rows_of(episodes([8, 5] * 20))
    if not timeouts:
        del rows["timeouts"]
    order = np.random.default_rng(1).permutation(len(rows["rewards"]))
    mixed = {key: values[order] for key, values in rows.items()}
    ordered, found = (sources.resolve(point(), path=r) for r in (rows, mixed))

    def transitions(arrays):
        return sorted(
            map(tuple, np.hstack([v.reshape(len(v), -1) for v in arrays.values()]))
        )

    assert transitions(ordered.arrays) == transitions(found.arrays)
    assert found.shuffled and not ordered.shuffled and not len(found.returns)
    with pytest.raises(ValueError, match="rows are shuffled"):
        sources.resolve(point(), path=mixed, next_actions=True)


def test_without_next_states_the_last_row_of_a_cut_episode_is_dropped():
    parts = episodes([5, 8, 8])
    rows = rows_of(parts)
    del rows["next_observations"], rows["timeouts"]
    found = sources.resolve(point(), path=rows)
    # Time cuts the second and the third episode after 8 rows each.
    assert found.provenance["rows"] == 5 + 7 + 7
    kept = np.delete(np.arange(21), [12, 20])
    np.testing.assert_array_equal(
        found.arrays["observations"], rows["observations"][kept]
    )


def bad_action(rows):
    rows["actions"][7] = [10.5, 0]


@pytest.mark.parametrize(
    "spoil, says",
    [
        (bad_action, "actions has 10.5 in row 7.*environment's range"),
        (lambda rows: rows.pop("rewards"), "lacks rewards"),
        (lambda rows: rows.update(observations=rows["actions"][:, :1]), "widths"),
    ],
)
def test_bad_data_of_the_users_own_is_refused(spoil, says, tmp_path):
    rows = rows_of(episodes())
    spoil(rows)
    np.savez(tmp_path / "bad.npz", **rows)
    with pytest.raises(ValueError, match=says):
        sources.resolve(point(), path=tmp_path / "bad.npz")


def test_no_pickle_in_an_archive_is_read(tmp_path):
    np.savez(tmp_path / "o.npz", **dict.fromkeys(rows_of(episodes()), np.array([{}])))
    with pytest.raises(ValueError, match="o.npz cannot be read.*pickle"):
        sources.resolve(point(), path=tmp_path / "o.npz")


def test_a_task_without_published_data_says_where_to_get_some():
    with pytest.raises(ValueError, match="give dataset_path.*corl.standin.collect"):
        sources.resolve(point())


# ---------------------------------------------------------------- runs


def run(tmp_path, *flags):
    np.savez(tmp_path / "rows.npz", **rows_of(episodes([8, 5] * 20)))
    words = (
        f"--env TestPoint-v0 --horizon 8 --dataset_path {tmp_path}/rows.npz --runs_dir "
        f"{tmp_path} --offline_iterations 4 --online_iterations 20 --eval_freq 4 "
        "--n_episodes 2 --batch_size 8 --buffer_size 1000 --log_freq 4 --threads 1 "
        "--compile false --device cpu --name own"
    )
    config = parse_config(iql.TrainConfig, [*words.split(), *flags])
    summary = iql.train(config)
    return summary, next(tmp_path.glob("own-TestPoint-v0-s0-*"))


def columns_of(folder, name):
    lines = (folder / name).read_text().splitlines()
    return lines[0].split(","), [line.split(",") for line in lines[1:]]


@pytest.mark.makes("picture")
def test_without_reference_scores_everything_is_told_in_raw_returns(tmp_path, capsys):
    summary, folder = run(tmp_path, "--normalize_reward", "true")
    assert columns_of(folder, "evaluations.csv")[0] == [
        "step",
        "phase",
        "episode",
        "return",
    ]
    names, rows = columns_of(folder, "metrics.csv")
    others = {"train_score", *run_tables.COMMON_COLUMNS[2:]}
    assert names[2] == "raw_return" and not others & set(names)
    assert summary["score_unit"] == "raw return" and (folder / "curves.png").is_file()
    found = [float(r[3]) for r in columns_of(folder, "evaluations.csv")[1]]
    assert summary["score_last"] == pytest.approx(np.mean(found[-2:]))
    said = capsys.readouterr().out
    assert "online return" in said and "(raw, mean" in said and "normalized" not in said
    assert "rescaled to [-1, 1]" in said
    assert summary["dataset"]["return_range"]["low"] < 0


def test_own_reference_scores_make_normalized_ones(tmp_path):
    flags = "--ref_min_score -100 --ref_max_score 0".split()
    summary, folder = run(tmp_path, *flags)
    assert summary["score_unit"] == "normalized score"
    names, rows = columns_of(folder, "evaluations.csv")
    for row in rows:
        assert float(row[4]) == pytest.approx(float(row[3]) + 100)
    assert columns_of(folder, "metrics.csv")[0][2] == "normalized_score"


def test_a_resumed_run_begins_a_new_episode_where_the_state_is_unknown(tmp_path, capsys):
    _, folder = run(tmp_path)
    flags = ["--resume", str(folder), "--online_iterations", "24"]
    summary = iql.train(parse_config(iql.TrainConfig, flags))
    assert summary["updates"] == 28
    assert "goes on with a new episode" in capsys.readouterr().out


def test_rewards_of_an_own_environment_are_scaled_by_the_span_of_returns():
    for name in ("my_antmaze:Maze-v0", "Walk-v0", "hopper-medium-v2"):
        assert rewards.scales_by_span(name) and not rewards.is_antmaze(name)
    assert not rewards.scales_by_span("antmaze-umaze-v2")
    assert rewards.is_antmaze("antmaze-umaze-v2")


# ---------------------------------------------------------------- a sweep


WALKS = """
import gymnasium as gym
import numpy as np


class Walk(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def __init__(self, far):
        self.far = far

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.far * self.np_random.normal(size=2)
        return self.place.astype(np.float32), {}

    def step(self, action):
        self.place = self.place + 0.1 * action
        return self.place.astype(np.float32), -float(abs(self.place).sum()), False, False, {}


gym.register("Near-v0", Walk, kwargs={"far": 1.0}, max_episode_steps=8)
gym.register("Far-v0", Walk, kwargs={"far": 100.0}, max_episode_steps=8)
"""
OWN_SWEEP = """
tasks: [walks_of_a_sweep:Near-v0, walks_of_a_sweep:Far-v0]
seeds: [0, 1]
config: "{task}.yaml"
settings: {threads: 1, compile: false, device: cpu, offline_iterations: 4,
           online_iterations: 12, eval_freq: 4, n_episodes: 2, batch_size: 8,
           buffer_size: 1000, log_freq: 4}
methods:
  once: {algorithm: ALGORITHM}
  twice: {algorithm: ALGORITHM, settings: {utd: 2}}
"""


def test_a_sweep_over_own_environments_ends_in_a_page_of_returns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.setattr(machine, "git_commit", lambda: "0123456789abcdef")
    Path("walks_of_a_sweep.py").write_text(WALKS)
    Path("sweep.yaml").write_text(
        OWN_SWEEP.replace("ALGORITHM", str(ROOT / "algorithms" / "iql.py"))
    )
    for name in ("Near", "Far"):
        env = f"walks_of_a_sweep:{name}-v0"
        own_policy.collect(envs.find_task(env), 60, Path(f"{name}.hdf5"), progress=False)
        text = f"dataset_path: {name}.hdf5\n"
        Path(f"walks_of_a_sweep_{name}.yaml").write_text(text)
    cells = plan("sweep.yaml")
    assert len(cells) == 4 + 8
    for cell in cells:
        assert cell.folder.parent.parent == Path("runs")
        write_cell(cell)
        run_cell(cell.folder)
    table = sweep.Table(cells, io.StringIO())
    scores = [read_state(cell.folder) for cell in cells]
    assert {state["unit"] for state in scores} == {"raw return"}
    shown = f"{scores[-1]['score']:.4g}"
    assert table.progress(cells[-1]) == shown

    report.command_line(
        ["add", *map(str, Path("runs/sweep").glob("*/run")), "--to", "r"]
    )
    report.command_line(["write", "r"])
    text = Path("r/README.md").read_text()
    assert "score" not in text.lower() and "raw returns" in text
    for name in ("Near", "Far"):
        assert f"| walks_of_a_sweep:{name}-v0 | once | 0–1 |" in text
        assert f"On walks_of_a_sweep:{name}-v0, which all of them ran" in text
        picture = f"all-methods-differences-walks_of_a_sweep_{name}-v0.png"
        assert Path("r/figures", picture).stat().st_size > 1000
    lines = Path("r/returns.csv").read_text().splitlines()
    assert len(lines) == 9
    (folder,) = Path("runs/sweep").glob("twice-walks_of_a_sweep_Near-v0-s1-*/run")
    summary = json.loads((folder / "summary.json").read_text())
    row = next(r.split(",") for r in lines if "Near-v0,1," in r and "twice" in r)
    after = lines[0].split(",").index("after")
    assert float(row[after]) == pytest.approx(summary["score_final"], rel=1e-5)
    before = lines[0].split(",").index("before")
    assert float(row[before]) == pytest.approx(summary["score_offline"], rel=1e-5)


# ---------------------------------------------------------------- the policy of a run


def test_an_offline_policy_collects_before_the_run_goes_online(tmp_path):
    _, folder = run(tmp_path, "--online_iterations", "0")
    assert not (folder / trained.AT_SWITCH).exists()
    (folder / "summary.json").unlink()  # as in a run that was stopped
    out = own_policy.collect(point(), 40, tmp_path / "o.hdf5", 3, folder, progress=False)
    with h5py.File(out) as file:
        states, actions = file["observations"][:], file["actions"][:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        kept = trained.read(folder)
        policy = kept.after.train()
        first = policy.act((states[0] - kept.mean) / kept.std, "cpu")
    expected = point().to_env(np.clip(first, -1, 1))
    np.testing.assert_allclose(actions[0], expected, rtol=1e-6)
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(
        ValueError, match="has no checkpoint.pt: name the folder of a run"
    ):
        own_policy.collect(point(), 40, tmp_path / "p.hdf5", 0, folder, progress=False)


# ---------------------------------------------------------------- the page


def test_the_page_runs_as_it_stands_from_an_empty_folder(tmp_path):
    text = (ROOT / "docs" / "your-own-task.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my_env.py").write_text(program)
    assert len([line for line in program.splitlines() if line.strip()]) <= 20
    commands = "set -e\n" + "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    bin_folder = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "CORL": str(ROOT),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CORL_DARE_CACHE": str(tmp_path / "cache"),
        "PATH": bin_folder + os.pathsep + os.environ["PATH"],
    }
    start = time.process_time()
    done = subprocess.run(
        ["bash", "-c", commands],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.process_time() - start < 120
    (folder,) = (tmp_path / "runs").glob("walk-*")
    assert (folder / "curves.png").stat().st_size > 1000
    with h5py.File(tmp_path / "better.hdf5") as file:
        assert len(file["rewards"]) == 1000 and abs(file["actions"][:]).max() > 1
        better = file["rewards"][:].mean()
    with h5py.File(tmp_path / "random.hdf5") as file:
        assert better > file["rewards"][:].mean()
