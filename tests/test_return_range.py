"""Return ranges come from whole episodes; `compat` and runs of older versions keep upstream's."""

import importlib
import json
import lzma
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from algorithms import cal_ql, iql
from corl import tasks
from corl.config import parse_config
from corl.layers import ConfigError
from corl.rewards import return_reward_range
from corl.training_data import load_data
from experiments import store

TASK = tasks.task("hopper-medium-v2")
OLD = Path(__file__).parent / "old_runs"


def write_episodes(path, lengths, rewards, unfinished=0):
    """A hopper file: one constant reward per episode; all end by a time-out."""
    rng, rows = np.random.default_rng(0), sum(lengths) + unfinished
    observations = rng.normal(size=(rows, 11)).astype(np.float32)
    timeouts = np.zeros(rows, bool)
    timeouts[np.cumsum(lengths, dtype=int) - 1] = True
    values = np.repeat(rewards, [*lengths, unfinished][: len(rewards)])
    with h5py.File(path, "w") as file:
        file["observations"] = observations
        file["actions"] = rng.uniform(-1, 1, (rows, 3)).astype(np.float32)
        file["rewards"] = values.astype(np.float32)
        file["terminals"] = np.zeros(rows, bool)
        file["timeouts"] = timeouts
    return path


@pytest.fixture
def path(tmp_path):
    """Three episodes of 1000 rows that return 1000, 10000 and 3000."""
    return write_episodes(tmp_path / "x.hdf5", [1000] * 3, [1.0, 10.0, 3.0])


def load(module, path, **fields):
    config = module.TrainConfig(env=TASK.name, dataset_path=str(path), **fields)
    return load_data(config, TASK)


def test_the_range_is_that_of_whole_episodes(path):
    data = load(iql, path, normalize_reward=True)
    assert data.provenance["return_range"] == {
        "low": 1000.0,
        "high": 10000.0,
        "rule": "episodes",
    }
    np.testing.assert_allclose(data.arrays["rewards"][0], 1000 / 9000, rtol=1e-6)
    assert data.return_range() == pytest.approx((1000 / 9, 10000 / 9))


def test_compat_walks_over_the_rows_that_d4rl_leaves(path):
    data = load(iql, path, normalize_reward=True, compat=True)
    # The walk takes 1000 rows at a time, 999 of an episode and the first of the next.
    found = data.provenance["return_range"]
    assert found == {"low": 1009.0, "high": 9986.0, "rule": "upstream"}
    span = 9986.0 - 1009.0
    np.testing.assert_allclose(data.arrays["rewards"][0], 1000 / span, rtol=1e-6)
    low, high = return_reward_range(data.arrays, 1000)
    assert data.return_range() == (low, high)


def test_rewards_as_trained_on_have_the_span_that_the_energy_is_scaled_by(tmp_path):
    path = write_episodes(tmp_path / "x.hdf5", [100, 400], [2.0, 1.0])
    data = load(cal_ql, path, normalize_reward=True, reward_scale=3.0, reward_bias=-1.0)
    # 200 and 400, each divided by 200 and times 1000, then times 3 minus 1 per row.
    assert data.return_range() == pytest.approx((3000 - 100, 6000 - 400))
    assert load(cal_ql, path).return_range() == (200.0, 400.0)


def test_only_a_run_that_scales_says_a_range(path):
    data = load(iql, path)
    assert "return_range" not in data.provenance
    data.return_range()
    assert data.provenance["return_range"]["high"] == 10000.0


def test_two_complete_episodes_are_enough_and_one_has_no_span(tmp_path):
    two = write_episodes(tmp_path / "two.hdf5", [300, 300], [1.0, 2.0])
    assert load(iql, two, normalize_reward=True).provenance["return_range"]["low"] == 300
    one = write_episodes(tmp_path / "one.hdf5", [300], [1.0, 1.0], unfinished=50)
    # No scale is needed here, and one episode is a range.
    assert load(iql, one).return_range() == (300.0, 300.0)
    with pytest.raises(ValueError, match="returns 300.*normalize_reward to false"):
        load(iql, one, normalize_reward=True)
    none = write_episodes(tmp_path / "none.hdf5", [], [1.0], unfinished=50)
    with pytest.raises(ValueError, match="no finished episode"):
        load(iql, none, normalize_reward=True)


# ---------------------------------------------------------------- resume


def short_run(folder, path, **fields):
    values = {
        "env": TASK.name,
        "dataset_path": path,
        "runs_dir": folder / "runs",
        "device": "cpu",
        "eval_freq": 4,
        "n_episodes": 1,
        "batch_size": 8,
        "buffer_size": 4000,
        "offline_iterations": 4,
        "online_iterations": 4,
        "normalize_reward": "true",
        "threads": 1,
        "compile": "false",
        **fields,
    }
    words = [w for name, value in values.items() for w in (f"--{name}", str(value))]
    iql.train(parse_config(iql.TrainConfig, words))
    return next((folder / "runs").iterdir())


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def forget_rule(folder):
    """A checkpoint as older versions wrote it."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    del state["run"]["return_rule"]
    torch.save(state, folder / "checkpoint.pt")


def test_a_resumed_run_keeps_the_rule_it_began_with(path, tmp_path):
    folder = short_run(tmp_path, path)
    assert summary_of(folder)["dataset"]["return_range"]["rule"] == "episodes"
    words = ["--resume", str(folder), "--online_iterations"]
    iql.train(parse_config(iql.TrainConfig, [*words, "8"]))
    assert summary_of(folder)["dataset"]["return_range"]["rule"] == "episodes"
    forget_rule(folder)
    for steps in ("12", "16"):
        iql.train(parse_config(iql.TrainConfig, [*words, steps]))
        found = summary_of(folder)["dataset"]["return_range"]
        assert found == {"low": 1009.0, "high": 9986.0, "rule": "upstream"}


def test_an_old_run_of_cut_rows_does_not_go_on(path, tmp_path):
    with h5py.File(path, "a") as file:
        states = file["observations"][()]
        following = np.roll(states, -1, 0)
        # Without flags: two cuts, each with a next state near to its own.
        del file["timeouts"]
        file["timeouts"] = np.zeros(len(states), bool)
        following[[999, 1999]] = states[[999, 1999]] + 0.01
        file["next_observations"] = following
    folder = short_run(tmp_path, path, normalize_reward="false")
    forget_rule(folder)
    words = ["--resume", str(folder), "--online_iterations", "8"]
    with pytest.raises(ConfigError, match="older version.*are cut; start a new run"):
        iql.train(parse_config(iql.TrainConfig, words))


@pytest.mark.parametrize("name", ["dare_iql", "iql"])
def test_a_run_of_an_older_version_says_upstream_where_it_scales(
    name, tmp_path, monkeypatch
):
    shutil.copytree(OLD / name, tmp_path / name)
    shutil.copy(OLD / "rows.hdf5", tmp_path)
    packed = (tmp_path / name / "checkpoint.pt.xz").read_bytes()
    (tmp_path / name / "checkpoint.pt").write_bytes(lzma.decompress(packed))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CORL_DARE_CACHE", str(tmp_path / "cache"))
    module = importlib.import_module(f"algorithms.{name}")
    arguments = ["--resume", name, "--online_iterations", "7"]
    summary = module.train(parse_config(module.TrainConfig, arguments))
    found = summary["dataset"]["return_range"]
    assert (found or {"rule": None})["rule"] == (
        "upstream" if name == "dare_iql" else None
    )


# ---------------------------------------------------------------- reports


def record(rule, label="a", seed=0, **config):
    dataset = {} if rule == "old" else {"return_range": rule and {"rule": rule}}
    found = {"label": label, "env": TASK.name, "seed": seed, "dataset": dataset}
    return {**found, "config": config}


SCALED = {"normalize_reward": True}
ENERGY = {"dare": {"q_scale": "returns", "guidance_scale": 2.0}}
PLAIN = {"normalize_reward": False}


@pytest.mark.parametrize(
    "found, expected",
    [
        (record("old", **SCALED), "upstream"),
        (record("old", **ENERGY), "upstream"),
        (record("old", **PLAIN), None),
        (record("old", dare={"q_scale": "literal", "guidance_scale": 2.0}), None),
        (record("episodes", **SCALED), "episodes"),
        (record(None, **ENERGY), None),
    ],
)
def test_what_a_stored_run_scaled_by(found, expected):
    assert store.return_rule(found) == expected


def test_runs_of_two_rules_are_not_shown_together():
    new, old = record("episodes", "b", **SCALED), record("old", "a", **SCALED)
    with pytest.raises(ValueError, match="group 'G', hopper.*a seed 0.*run the older"):
        store.check_rules([new, old], "group 'G'")
    store.check_rules([new, record(None, "a"), record("old", "c", **PLAIN)], "here")
    store.check_rules([old, record("upstream", "b")], "here")
    seeds = [record("episodes", seed=0, **SCALED), record("old", seed=1, **SCALED)]
    with pytest.raises(ValueError, match="label a, hopper-medium-v2: a seed 1"):
        store.check_settings(seeds)
