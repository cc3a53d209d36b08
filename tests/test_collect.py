"""Self-collected data: D4RL's schema, exact densities, same bytes, safe writing."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pytest
import torch

from corl import envs, files, tasks
from corl.standin import collect, policies, rollout, train_sac
from corl.standin.policies import (
    POLICY_DIR,
    STAND_IN_ROWS,
    Behavior,
    NotCollectable,
    TanhGaussianPolicy,
    default_rows,
    fingerprint,
    kinds,
    load_policy,
    load_series,
    save_policy,
    save_series,
)

S, A = 11, 3  # hopper


def make_policy(path, state_dim=S, action_dim=A, seed=0, hidden=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = TanhGaussianPolicy(state_dim, action_dim, hidden)
    save_policy(policy, path)
    return path


def ship(folder, monkeypatch, robots=("hopper",), levels=("medium", "expert")):
    """A policy folder as the package ships it."""
    manifest = {}
    for i, (robot, level) in enumerate((r, v) for r in robots for v in levels):
        facts, name = tasks.ROBOTS[robot], f"{robot}_{level}.safetensors"
        path = make_policy(folder / name, facts.state_dim, facts.action_dim, seed=i)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest[name] = {
            "robot": robot,
            "level": level,
            "step": 1000 + i,
            "return_mean": 1.0,
            "return_std": 0.5,
            "sha256": digest,
            "command": "python -m corl.standin.train_sac",
        }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(policies, "POLICY_DIR", folder)
    return manifest


def ship_series(folder, steps, warmup, robot="hopper"):
    """Adds a series to the policies of `ship`; the policies by step."""
    facts, name = tasks.ROBOTS[robot], f"{robot}_series.safetensors"
    policies = {}
    for step in steps:
        make_policy(folder / "one", facts.state_dim, facts.action_dim, seed=step)
        policies[step] = load_policy(folder / "one")
    (folder / "one").unlink()
    save_series(policies, folder / name)
    manifest = json.loads((folder / "manifest.json").read_text())
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    facts = {"robot": robot, "level": "series", "steps": steps, "warmup": warmup}
    manifest[name] = {**facts, "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return load_series(folder / name)


@pytest.fixture
def policy(tmp_path):
    return make_policy(tmp_path / "policy.safetensors")


def run(task, rows, out, **options):
    return collect.collect(task, rows, out, progress=False, **options)


def read(path):
    data = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: data.update(
                {name: item[()]} if isinstance(item, h5py.Dataset) else {}
            )
        )
        return data, dict(file.attrs)


# ---------------------------------------------------------------- contents


def test_schema_is_d4rl_v2(tmp_path, policy):
    path = run("hopper-medium-v2", 500, tmp_path / "data.hdf5", seed=7, policy=policy)
    data, attributes = read(path)
    shapes = {
        "observations": ((500, S), "float32"),
        "next_observations": ((500, S), "float32"),
        "actions": ((500, A), "float32"),
        "rewards": ((500,), "float32"),
        "terminals": ((500,), "bool"),
        "timeouts": ((500,), "bool"),
        "infos/qpos": ((500, 6), "float64"),
        "infos/qvel": ((500, 6), "float64"),
        "infos/action_log_probs": ((500,), "float32"),
    }
    found = {k: (data[k].shape, str(data[k].dtype)) for k in shapes}
    assert found == shapes
    metadata = {k.removeprefix("metadata/") for k in data if k.startswith("metadata/")}
    layers = ("fc0", "fc1", "last_fc", "last_fc_log_std")
    weights = {f"policy/{n}/{k}" for n in layers for k in ("weight", "bias")}
    text = {"algorithm", "policy/nonlinearity", "policy/output_distribution"}
    assert metadata == weights | text
    assert data["metadata/algorithm"] == b"SAC"
    assert data["metadata/policy/nonlinearity"] == b"relu"
    assert data["metadata/policy/output_distribution"] == b"tanh_gaussian"
    assert data["metadata/policy/last_fc_log_std/weight"].shape == (A, 16)
    assert attributes["source"] == "self-collected"
    assert (attributes["task"], attributes["seed"]) == ("hopper-medium-v2", 7)
    digest = hashlib.sha256(policy.read_bytes()).hexdigest()
    assert json.loads(attributes["policies"]) == {"medium": digest}
    assert attributes["torch_version"] == torch.__version__
    # The format's version, which a new release of the package leaves alone.
    assert attributes["corl_dare_version"] == "0.1.0"


def test_rows_are_consecutive_steps_of_the_physics(tmp_path, policy):
    path = run("hopper-medium-v2", 3000, tmp_path / "data.hdf5", policy=policy)
    data, _ = read(path)
    qpos, qvel = data["infos/qpos"], data["infos/qvel"].clip(-10, 10)
    states = np.concatenate([qpos[:, 1:], qvel], 1).astype(np.float32)
    np.testing.assert_array_equal(data["observations"], states)
    inside = ~(data["terminals"] | data["timeouts"])[:-1]
    assert 20 < (~inside).sum() < 1000
    following = data["observations"][1:][inside]
    np.testing.assert_array_equal(data["next_observations"][:-1][inside], following)
    ends = data["next_observations"][:-1][~inside]
    assert (ends != data["observations"][1:][~inside]).any(1).all()
    starts = np.append(0, np.flatnonzero(~inside) + 1)
    np.testing.assert_allclose(data["observations"][starts, 0], 1.25, atol=0.0051)
    distance = np.diff(qpos[:, 0])[inside]
    paid = 1e-3 * np.square(data["actions"][:-1][inside], dtype=np.float64).sum(1)
    rewards = data["rewards"][:-1][inside]
    np.testing.assert_allclose(rewards, distance / 0.008 + 1.0 - paid, atol=1e-5)
    heights, angles = data["next_observations"][:, 0], data["next_observations"][:, 1]
    fallen = (heights <= 0.7) | (np.abs(angles) >= 0.2)
    np.testing.assert_array_equal(data["terminals"], fallen)


def test_log_probs_equal_the_float64_density_of_the_stored_policy(tmp_path, policy):
    path = run("hopper-medium-v2", 2000, tmp_path / "data.hdf5", policy=policy)
    data, _ = read(path)
    net = {
        k: v.astype(np.float64) for k, v in data.items() if "weight" in k or "bias" in k
    }

    def layer(x, name):
        prefix = f"metadata/policy/{name}"
        return x @ net[f"{prefix}/weight"].T + net[f"{prefix}/bias"]

    hidden = np.maximum(layer(data["observations"].astype(np.float64), "fc0"), 0)
    hidden = np.maximum(layer(hidden, "fc1"), 0)
    mean, log_std = layer(hidden, "last_fc"), layer(hidden, "last_fc_log_std")
    actions = data["actions"].astype(np.float64)
    normal = -0.5 * ((np.arctanh(actions) - mean) / np.exp(log_std)) ** 2
    normal -= log_std + 0.5 * math.log(2 * math.pi)
    expected = (normal - np.log1p(-(actions**2))).sum(1)
    # Nearer to the bounds float32 actions no longer determine what was drawn.
    clear = (np.abs(actions) < 0.999).all(1)
    assert clear.mean() > 0.9
    found = data["infos/action_log_probs"]
    np.testing.assert_allclose(found[clear], expected[clear], atol=2e-4, rtol=0)
    # Sampled, not the mean: the standardized draws are standard normal.
    draws = ((np.arctanh(actions) - mean) / np.exp(log_std))[clear]
    assert abs(draws.mean()) < 0.05 and abs(draws.std() - 1) < 0.05


def test_random_data_is_uniform(tmp_path):
    data, attributes = read(run("hopper-random-v2", 3000, tmp_path / "data.hdf5"))
    np.testing.assert_allclose(data["infos/action_log_probs"], -A * np.log(2), rtol=1e-6)
    counts = np.histogram(data["actions"], bins=10, range=(-1, 1))[0]
    assert counts.sum() == 3000 * A and abs(counts - 900).max() < 120  # 4 sigma
    assert not [k for k in data if k.startswith("metadata")]
    assert json.loads(attributes["policies"]) == {}


def test_time_limit_sets_timeouts_only_and_the_file_is_cut(tmp_path):
    policy = make_policy(tmp_path / "cheetah.safetensors", 17, 6)
    path = run("halfcheetah-medium-v2", 2500, tmp_path / "data.hdf5", policy=policy)
    data, _ = read(path)
    assert np.flatnonzero(data["timeouts"]).tolist() == [999, 1999]
    assert not data["terminals"].any()
    positions = data["infos/qpos"][:, 1:].astype(np.float32)
    np.testing.assert_array_equal(positions, data["observations"][:, :8])


def test_fall_at_the_time_limit_counts_as_time_out(tmp_path, monkeypatch):
    class FallsAtTheEnd(gym.Wrapper):
        def step(self, action):
            state, reward, _, truncated, info = self.env.step(action)
            return state, reward, truncated, truncated, info

    plain = envs.make_robot
    monkeypatch.setattr(envs, "make_robot", lambda robot: FallsAtTheEnd(plain(robot)))
    data, _ = read(run("halfcheetah-random-v2", 1001, tmp_path / "data.hdf5"))
    assert np.flatnonzero(data["timeouts"]).tolist() == [999]
    assert not data["terminals"].any()


def test_episodes_come_whole_and_in_the_order_of_their_start():
    rows, seed = 4200, np.random.SeedSequence([5, 0])
    found = rollout.rollout(Behavior("random"), "hopper", rows, seed)

    seeds = seed.generate_state(5)  # the generator's, then one per thousand rows
    generator = torch.Generator().manual_seed(int(seeds[0]))
    robots = [envs.make_robot("hopper") for _ in range(4)]
    episodes = []  # (time of start, environment, rows)
    current = []
    for i, env in enumerate(robots):
        state, _ = env.reset(seed=int(seeds[1 + i]))
        current.append((0, i, [state]))
    for time in range(2000):
        actions = (2 * torch.rand(4, A, generator=generator) - 1).numpy()
        for i, env in enumerate(robots):
            state, _, terminated, truncated, _ = env.step(actions[i])
            if terminated or truncated:
                episodes.append(current[i])
                state, _ = env.reset()
                current[i] = (time + 1, i, [])
            current[i][2].append(state)
    ordered = sorted(episodes, key=lambda e: e[:2])
    states = np.concatenate([e[2] for e in ordered])
    assert len(states) > rows
    expected = states[:rows].astype(np.float32)
    np.testing.assert_array_equal(found["observations"], expected)


def test_medium_expert_is_half_and_half_with_a_seam(tmp_path, monkeypatch):
    manifest = ship(tmp_path, monkeypatch)
    path = run("hopper-medium-expert-v2", 301, tmp_path / "both.hdf5", seed=2)
    data, attributes = read(path)
    assert len(data["rewards"]) == 301
    assert data["terminals"][149] != data["timeouts"][149]
    np.testing.assert_allclose(data["observations"][150, 0], 1.25, atol=0.0051)
    assert not [k for k in data if k.startswith("metadata")]
    levels = json.loads(attributes["policies"])
    assert levels["medium"] == manifest["hopper_medium.safetensors"]["sha256"]
    assert levels["expert"] == manifest["hopper_expert.safetensors"]["sha256"]
    for level, half in (("medium", slice(0, 150)), ("expert", slice(150, 301))):
        behavior = load_policy(tmp_path / f"hopper_{level}.safetensors")
        columns = ("observations", "actions")
        states, actions = (torch.from_numpy(data[k][half]) for k in columns)
        found = data["infos/action_log_probs"][half]
        expected = behavior.log_prob(states, actions).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-2)


def test_seam_flag_is_set_when_the_medium_half_is_cut_mid_episode(tmp_path, monkeypatch):
    ship(tmp_path, monkeypatch, robots=("halfcheetah",))
    data, _ = read(run("halfcheetah-medium-expert-v2", 60, tmp_path / "both.hdf5"))
    assert np.flatnonzero(data["timeouts"]).tolist() == [29]


# ---------------------------------------------------------------- replay


def replay_rows(rows, steps, warmup, end):
    """Which snapshot acts in each row, one training step at a time; 0 acts uniformly."""
    found = []
    for row in range(rows):
        t = (row + 0.5) * end / rows
        found.append(0 if t < warmup else min(steps, key=lambda step: abs(step - t)))
    return found


@pytest.mark.parametrize("kind, rows", [("medium-replay", 257), ("full-replay", 180)])
def test_replay_comes_in_training_order_from_the_nearest_snapshot(
    tmp_path, monkeypatch, kind, rows
):
    ship(tmp_path, monkeypatch)  # medium is step 1000
    steps = [200, 500, 900, 1500, 2000]
    policies = ship_series(tmp_path, steps, warmup=100)
    data, attributes = read(run(f"hopper-{kind}-v2", rows, tmp_path / "x.hdf5"))
    names = json.loads(attributes["policy_labels"])
    found = [names[i] for i in data["infos/policy_label"]]
    if kind == "medium-replay":
        expected = replay_rows(rows, [s for s in steps if s <= 1000], 100, 1000)
    else:
        expected = replay_rows(rows, steps, 100, 2000)
    expected = [f"step {s}" if s else "random" for s in expected]
    differ = [i for i in range(rows) if found[i] != expected[i]]
    assert len(differ) <= 2 * len(steps)  # rounding at the seams
    assert names == list(dict.fromkeys(expected))
    levels = ["medium", "series"] if kind == "medium-replay" else ["series"]
    assert sorted(json.loads(attributes["policies"])) == levels
    assert data["metadata/iteration"] == (900 if kind == "medium-replay" else 2000)
    # The exact density under the snapshot that acted, in the row it acted in.
    states, actions = (torch.from_numpy(data[k]) for k in ("observations", "actions"))
    for i, name in enumerate(names):
        rows_of = data["infos/policy_label"] == i
        if name == "random":
            density = np.full(rows_of.sum(), -A * np.log(2))
        else:
            policy = policies[int(name.removeprefix("step "))]
            density = policy.log_prob(states[rows_of], actions[rows_of]).numpy()
        given = data["infos/action_log_probs"][rows_of]
        np.testing.assert_allclose(given, density, atol=1e-2)
    seams = np.flatnonzero(np.diff(data["infos/policy_label"]))
    assert (data["timeouts"] | data["terminals"])[seams].all()
    assert not (data["timeouts"] & data["terminals"]).any()


def test_medium_replay_is_sized_as_d4rls_and_needs_the_series(tmp_path, monkeypatch):
    ship(tmp_path, monkeypatch)
    assert default_rows(tasks.task("hopper-medium-replay-v2")) == 402_000
    assert default_rows(tasks.task("walker2d-medium-replay-v2")) == 302_000
    assert default_rows(tasks.task("hopper-medium-v2")) == STAND_IN_ROWS
    assert "medium-replay" not in kinds("hopper")
    ship_series(tmp_path, [2000], warmup=0)
    assert kinds("hopper")[-2:] == ["medium-replay", "full-replay"]
    assert set(fingerprint("hopper-medium-replay-v2")) == {"series", "medium"}
    with pytest.raises(ValueError, match="series.* has no snapshot up to step 1000"):
        run("hopper-medium-replay-v2", 50, tmp_path / "x")
    data, _ = read(run("hopper-full-replay-v2", 50, tmp_path / "x"))
    assert "infos/policy_label" not in data  # one snapshot alone, no warm-up


def test_shipped_series_reaches_from_the_start_to_the_shipped_levels():
    manifest = json.loads((POLICY_DIR / "manifest.json").read_text())
    for name, facts in manifest.items():
        path = POLICY_DIR / name
        assert hashlib.sha256(path.read_bytes()).hexdigest() == facts["sha256"]
        assert path.stat().st_size < 1.5e6
        if facts["level"] == "series":
            assert list(load_series(path)) == facts["steps"]
            assert len(facts["return_mean"]) == len(facts["steps"])
            levels = [
                other["step"]
                for other in manifest.values()
                if other["robot"] == facts["robot"] and other["level"] != "series"
            ]
            assert levels and max(levels) <= facts["steps"][-1]
            assert facts["steps"][0] <= 0.1 * facts["steps"][-1]


def test_series_keeps_every_policy_rounded_to_float16(tmp_path):
    policies = {}
    for step in (30, 4, 100):
        make_policy(tmp_path / "one", seed=step)
        policies[step] = load_policy(tmp_path / "one")
    save_series(policies, tmp_path / "x.safetensors")
    found = load_series(tmp_path / "x.safetensors")
    assert list(found) == [4, 30, 100]
    for step, policy in policies.items():
        for key, value in policy.state_dict().items():
            assert torch.equal(found[step].state_dict()[key], value.half().float())


def test_ship_series_writes_the_file_and_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "POLICY_DIR", tmp_path / "policies")
    monkeypatch.setattr(
        train_sac, "sampled_returns", lambda *a, **k: np.array([1.0, 3.0])
    )
    for step in (10, 20):
        make_policy(tmp_path / f"policy_{step:07d}.safetensors", seed=step)
    (tmp_path / "train.csv").write_text("step\n10\n20\n")
    command = f"sac hopper --out {tmp_path} --seed 3 --level series --ship"
    monkeypatch.setattr(sys, "argv", [*command.split(), "20", "10"])
    train_sac.main()
    facts = json.loads((tmp_path / "policies/manifest.json").read_text())
    facts = facts["hopper_series.safetensors"]
    assert (facts["steps"], facts["return_mean"]) == ([10, 20], [2.0, 2.0])
    assert (facts["level"], facts["warmup"]) == ("series", train_sac.WARMUP)
    made = "python -m corl.standin.train_sac hopper --seed 3 --snapshot_every 10, series"
    assert facts["command"].startswith(made)
    assert (tmp_path / "policies/hopper_train.csv").read_text() == "step\n10\n20\n"
    monkeypatch.setattr(sys, "argv", [*command.split(), "30"])
    with pytest.raises(SystemExit, match="no snapshot of step 30 .* it has 10, 20"):
        train_sac.main()


# ---------------------------------------------------------------- mixtures


def float64_density(policy, states, actions):
    """Of a tanh-Gaussian, from the weights, without the code under test."""
    x = states.astype(np.float64)
    for i in (0, 2, 4):
        weight, bias = policy.net[i].weight.numpy(), policy.net[i].bias.numpy()
        x = x @ weight.astype(np.float64).T + bias
        x = np.maximum(x, 0) if i < 4 else x
    mean, log_std = np.split(x, 2, axis=1)
    a = actions.astype(np.float64)
    normal = -0.5 * ((np.arctanh(a) - mean) / np.exp(log_std)) ** 2
    normal -= log_std + 0.5 * math.log(2 * math.pi)
    return (normal - np.log1p(-(a**2))).sum(1)


@pytest.mark.parametrize("mix", ["expert", "random"])
def test_mixture_carries_labels_and_both_densities_in_every_row(
    tmp_path, monkeypatch, mix
):
    ship(tmp_path, monkeypatch)
    path = run("hopper-medium-v2", 1000, tmp_path / "m.hdf5", mix=mix, share=0.3)
    data, attributes = read(path)
    assert json.loads(attributes["policy_labels"]) == ["medium", mix]
    label = data["infos/policy_label"]
    assert label.sum() == 300 and len(label) == 1000
    own = load_policy(tmp_path / "hopper_medium.safetensors")
    clear = (np.abs(data["actions"]) < 0.999).all(1)
    assert clear.mean() > 0.8
    states, actions = data["observations"][clear], data["actions"][clear]
    expected = {"medium": float64_density(own, states, actions)}
    if mix == "expert":
        other = load_policy(tmp_path / "hopper_expert.safetensors")
        expected[mix] = float64_density(other, states, actions)
    else:
        expected[mix] = np.full(clear.sum(), -A * np.log(2))
    columns = []
    for level in ("medium", mix):
        found = data[f"infos/log_probs/{level}"]
        np.testing.assert_allclose(found[clear], expected[level], atol=1e-3, rtol=1e-4)
        columns.append(found)
    acting = np.where(label == 0, *columns)
    np.testing.assert_array_equal(data["infos/action_log_probs"], acting)
    # Where float32 actions round to the bound, the density of what was drawn is finite.
    assert all(np.isfinite(column).all() for column in columns)
    assert not [k for k in data if k.startswith("metadata")]
    assert (attributes["mix"], attributes["share"]) == (mix, 0.3)


def test_mixture_shuffles_whole_episodes(tmp_path, monkeypatch):
    ship(tmp_path, monkeypatch)
    path = run("hopper-medium-v2", 2000, tmp_path / "m.hdf5", mix="expert", share=0.5)
    data, _ = read(path)
    ends = data["terminals"] | data["timeouts"]
    assert ends[-1]
    inside = ~ends[:-1]
    following = data["observations"][1:][inside]
    np.testing.assert_array_equal(data["next_observations"][:-1][inside], following)
    label = data["infos/policy_label"]
    assert (label[1:] == label[:-1])[inside].all()
    changes = (label[1:] != label[:-1]).sum()
    assert changes > 0.25 * ends.sum()  # half of the seams, if the order is random
    # The same rows as of the two policies alone, in another order.
    for level, number in (("medium", 0), ("expert", 1)):
        chosen = data["observations"][label == number]
        policy = tmp_path / f"hopper_{level}.safetensors"
        behavior = Behavior(level, load_policy(policy))
        seed = np.random.SeedSequence([0, number, 0])
        alone = rollout.rollout(behavior, "hopper", 1000, seed)["observations"]
        np.testing.assert_array_equal(np.sort(chosen, 0), np.sort(alone, 0))


def test_policy_labels_of_medium_expert(tmp_path, monkeypatch):
    ship(tmp_path, monkeypatch)
    data, attributes = read(run("hopper-medium-expert-v2", 101, tmp_path / "x.hdf5"))
    assert data["infos/policy_label"].tolist() == [0] * 50 + [1] * 51
    assert json.loads(attributes["policy_labels"]) == ["medium", "expert"]


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("hopper-medium-v2", {"mix": "medium"}, "takes two different ones of random"),
        ("hopper-medium-v2", {"mix": "best"}, "mix 'best' into hopper-medium-v2"),
        ("hopper-medium-expert-v2", {"mix": "random"}, "two different ones"),
        ("hopper-medium-v2", {"mix": "random", "share": 0.0}, "is 0 of 50 rows"),
        ("hopper-medium-v2", {"mix": "random", "share": 1.0}, "is 50 of 50 rows"),
        ("hopper-medium-v2", {"mix": "random", "share": -1.0}, "is -50 of 50"),
        ("hopper-medium-v2", {"mix": "random", "share": math.nan}, "share is nan"),
        ("hopper-medium-v2", {"mix": "expert"}, "hopper-expert-v2.*not shipped"),
        ("walker2d-random-v2", {"mix": "medium"}, "walker2d-medium-v2.*not shipped"),
        ("hopper-medium-v2", {"workers": 0}, "workers is 0; it must be at least 1"),
    ],
)
def test_impossible_mixtures_are_refused(tmp_path, monkeypatch, task, options, message):
    levels = ("medium",) if "medium-expert" not in task else ("medium", "expert")
    ship(tmp_path, monkeypatch, levels=levels)
    with pytest.raises(ValueError, match=message):
        run(task, 50, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_shipped_policy_is_used_with_its_training_step(tmp_path, monkeypatch):
    ship(tmp_path, monkeypatch)
    data, _ = read(run("hopper-expert-v2", 50, tmp_path / "data.hdf5"))
    assert data["metadata/iteration"] == 1001
    weights = load_policy(tmp_path / "hopper_expert.safetensors").net[0].weight
    np.testing.assert_array_equal(data["metadata/policy/fc0/weight"], weights)


# ---------------------------------------------------------------- repeatable


def test_same_settings_give_the_same_bytes_whatever_the_global_state(tmp_path, policy):
    threads = torch.get_num_threads()
    digests = []
    for i in range(2):
        torch.set_num_threads(1 + i)
        torch.manual_seed(i)
        np.random.seed(i)
        options = {"seed": 3, "policy": policy}
        path = run("hopper-medium-v2", 2500, tmp_path / f"{i}.hdf5", **options)
        assert torch.get_num_threads() == 1 + i
        digests.append(files.sha256(path))
    torch.set_num_threads(threads)
    assert digests[0] == digests[1]
    other = run("hopper-medium-v2", 2500, tmp_path / "o.hdf5", seed=4, policy=policy)
    assert (read(other)[0]["actions"] != read(path)[0]["actions"]).mean() > 0.9


def test_global_random_streams_are_left_alone(tmp_path, policy):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    run("hopper-medium-v2", 200, tmp_path / "data.hdf5", policy=policy)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_existing_file_of_the_same_settings_is_left_alone(tmp_path, monkeypatch):
    path = run("hopper-random-v2", 50, tmp_path / "data.hdf5")
    stamp = path.stat().st_mtime_ns
    monkeypatch.setattr(rollout, "rollout", None)
    assert run("hopper-random-v2", 50, path) == path
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "task, rows, seed, named",
    [
        ("hopper-random-v2", 51, 0, "rows 50 where 51"),
        ("hopper-random-v2", 50, 1, "seed 0 where 1"),
        ("walker2d-random-v2", 50, 0, "task 'hopper-random-v2'"),
    ],
)
def test_existing_file_of_other_settings_is_refused(tmp_path, task, rows, seed, named):
    path = run("hopper-random-v2", 50, tmp_path / "data.hdf5")
    digest = files.sha256(path)
    with pytest.raises(ValueError, match=f"data.hdf5 exists and has {named}.*delete"):
        run(task, rows, path, seed=seed)
    assert files.sha256(path) == digest


def test_existing_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ValueError, match="not a readable HDF5 file"):
        run("hopper-random-v2", 50, path)
    assert path.read_text() == "mine"


# ---------------------------------------------------------------- interruption


class Interrupted(gym.Wrapper):
    def step(self, action):
        raise KeyboardInterrupt


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_interrupted_rollout_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch):
    plain, out = envs.make_robot, tmp_path / "data.hdf5"
    monkeypatch.setattr(envs, "make_robot", lambda robot: Interrupted(plain(robot)))
    with pytest.raises(KeyboardInterrupt):
        run("hopper-random-v2", 50, out)
    assert leftovers(tmp_path) == []
    monkeypatch.undo()
    assert len(read(run("hopper-random-v2", 50, out))[0]["rewards"]) == 50


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(self, name, **options):
        if name == "rewards":
            raise OSError("no space left")
        return create(self, name, **options)

    create = h5py.Group.create_dataset
    monkeypatch.setattr(h5py.Group, "create_dataset", full_disk)
    with pytest.raises(RuntimeError, match="cannot write to .*no space left.*free some"):
        run("hopper-random-v2", 50, tmp_path / "data.hdf5")
    assert [n for n in leftovers(tmp_path) if not n.endswith(".chunks")] == []


def test_final_name_appears_only_with_a_complete_file(tmp_path, monkeypatch):
    seen, replace = [], os.replace

    def watch(part, out):
        assert not out.exists() and part.parent == out.parent
        if out.name == "data.hdf5":
            seen.append(len(read(part)[0]["observations"]))
        replace(part, out)

    monkeypatch.setattr(os, "replace", watch)
    run("hopper-random-v2", 50, tmp_path / "data.hdf5")
    assert seen == [50] and leftovers(tmp_path) == ["data.hdf5"]


def test_interrupted_collection_goes_on_from_its_finished_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "CHUNK", 100)
    whole = run("hopper-random-v2", 350, tmp_path / "whole.hdf5")

    def interrupted(*args):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return plain(*args)

    made, plain, out = [], rollout.rollout, tmp_path / "data.hdf5"
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "rollout", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("hopper-random-v2", 350, out)
    assert not out.exists()
    kept = list(tmp_path.glob("data.hdf5.*.chunks/*.npy"))
    assert len(kept) == 2

    def count(*args):
        made.append(args)
        return plain(*args)

    monkeypatch.setattr(rollout, "rollout", count)
    assert files.sha256(run("hopper-random-v2", 350, out)) == files.sha256(whole)
    assert len(made) == 4  # two before the interruption, two after
    assert leftovers(tmp_path) == ["data.hdf5", "whole.hdf5"]


def test_chunks_of_other_settings_or_versions_are_not_used(tmp_path, monkeypatch):
    out = tmp_path / "data.hdf5"
    folders = set()
    for seed, version in ((0, "1"), (1, "1"), (0, "2")):
        monkeypatch.setattr(mujoco, "__version__", version)
        plan = rollout.make_plan(tasks.task("hopper-random-v2"), 50, seed)
        folders.add(collect.chunk_folder(out, plan))
    assert len(folders) == 3


def test_chunks_join_at_whole_episodes(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "CHUNK", 60)
    data, _ = read(run("hopper-random-v2", 400, tmp_path / "data.hdf5"))
    assert len(data["rewards"]) == 400
    ends = data["terminals"] | data["timeouts"]
    assert not data["timeouts"].any()  # no chunk cuts an episode
    following = data["observations"][1:][~ends[:-1]]
    np.testing.assert_array_equal(data["next_observations"][:-1][~ends[:-1]], following)
    starts = np.append(0, np.flatnonzero(ends[:-1]) + 1)
    np.testing.assert_allclose(data["observations"][starts, 0], 1.25, atol=0.0051)


def test_the_number_of_processes_does_not_change_a_byte(tmp_path, monkeypatch):
    task, lines = "hopper-medium-expert-v2", []
    one = run(task, 301, tmp_path / "one.hdf5", seed=3, workers=1)
    plan = rollout.make_plan(tasks.task(task), 301, 3)
    out = tmp_path / "two.hdf5"
    collect.chunk_folder(out, plan).mkdir()
    collect.roll_out_in_processes(plan, out, 2, lines.append)
    assert sum(lines) == 301
    assert len(list(tmp_path.glob("two.hdf5.*.chunks/*.npy"))) == 2
    monkeypatch.setattr(rollout, "rollout", None)  # all is there already
    two = run(task, 301, out, seed=3, workers=2)
    assert files.sha256(one) == files.sha256(two)
    assert leftovers(tmp_path) == ["one.hdf5", "two.hdf5"]


def test_failing_process_is_one_line_and_keeps_what_is_done(tmp_path, policy, capfd):
    plan = rollout.make_plan(tasks.task("hopper-medium-v2"), 50, policy=policy)
    policy.write_bytes(b"no policy any more")
    with pytest.raises(RuntimeError, match="failed: policy file.*repeat the command"):
        collect.roll_out_in_processes(plan, tmp_path / "x.hdf5", 1, lambda rows: None)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("at", ["rollout.rollout", "collect.assemble"])
def test_disk_that_fills_up_meanwhile_is_one_line_and_no_crash(tmp_path, at):
    """A limit on the size of files is met for real, at the chunk or at the finished file."""
    script = f"""
import resource
from corl.standin import collect, rollout
plain = {at}
def limited(*args):
    result = plain(*args)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    return result
{at} = limited
collect.main()
"""
    command = [sys.executable, "-c", script, "hopper-random-v2", "--rows", "500"]
    command += ["--out", str(tmp_path / "data.hdf5")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: cannot write to {tmp_path} (")
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    left = leftovers(tmp_path)
    assert all(name.endswith(".chunks") for name in left)
    assert len(left) == (at == "collect.assemble")  # finished chunks are kept
    run("hopper-random-v2", 500, tmp_path / "data.hdf5")
    assert leftovers(tmp_path) == ["data.hdf5"]


def test_worker_that_cannot_write_says_so_in_one_line(tmp_path, policy, monkeypatch):
    (tmp_path / "file").write_text("in the way of a folder")
    out = tmp_path / "file" / "x.hdf5"
    command = f"collect hopper-random-v2 --rows 50 --out {out} --worker 0/1"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match="^error: cannot write to .*file .*--out"):
        collect.main()


def test_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(rollout, "rollout", interrupted)
    command = f"collect hopper-random-v2 --rows 50 --out {tmp_path / 'x.hdf5'}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match="130"):
        collect.main()
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("interrupted; ") and "repeat the command" in said
    assert leftovers(tmp_path) == []


def test_remains_of_a_killed_process_do_not_harm(tmp_path):
    (tmp_path / ".data.hdf5.0123456789abcdef.part").write_bytes(b"half a file")
    (tmp_path / "data.hdf5.lock").write_bytes(b"")
    path = run("hopper-random-v2", 50, tmp_path / "data.hdf5")
    assert len(read(path)[0]["rewards"]) == 50
    assert leftovers(tmp_path) == ["data.hdf5"]


def test_second_process_waits_and_finds_the_file(tmp_path, monkeypatch):
    out, calls, waiting = tmp_path / "data.hdf5", [], threading.Event()

    def count(*args):
        calls.append(args)
        assert waiting.wait(timeout=20)  # until the other one stands at the lock
        return plain(*args)

    class Watched(filelock.FileLock):
        def acquire(self, *args, **kwargs):
            if calls:
                waiting.set()
            return super().acquire(*args, **kwargs)

    plain = rollout.rollout
    monkeypatch.setattr(rollout, "rollout", count)
    monkeypatch.setattr(filelock, "FileLock", Watched)
    results = []
    work = [
        threading.Thread(target=lambda: results.append(run("hopper-random-v2", 50, out)))
        for _ in range(2)
    ]
    work[0].start()
    while not calls and work[0].is_alive():
        work[0].join(0.01)
    work[1].start()
    for thread in work:
        thread.join(timeout=30)
    assert results == [out, out] and len(calls) == 1


def test_two_real_processes_make_the_file_once(tmp_path):
    out = tmp_path / "data.hdf5"
    command = [sys.executable, "-m", "corl.standin.collect", "hopper-random-v2"]
    command += ["--rows", "3000", "--out", str(out)]
    root = str(Path(collect.__file__).parents[2])
    work = [
        subprocess.Popen(
            command,
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=100)[0] for process in work]
    assert [process.returncode for process in work] == [0, 0]
    digest = files.sha256(out)
    assert all(digest in text for text in printed)
    assert leftovers(tmp_path) == ["data.hdf5"]


# ---------------------------------------------------------------- places to write


def test_folder_that_cannot_be_written_is_one_line_before_any_work(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(rollout, "rollout", None)
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            RuntimeError, match="cannot write to .*file.*mend its rights"
        ):
            run("hopper-random-v2", 50, folder / "data.hdf5")

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RuntimeError, match="Permission denied.*CORL_DARE_CACHE") as e:
        run("hopper-random-v2", 50, tmp_path / "new" / "data.hdf5")
    assert "\n" not in str(e.value)


def test_finished_file_in_a_read_only_folder_is_used(tmp_path, monkeypatch):
    path = run("hopper-random-v2", 50, tmp_path / "data.hdf5")
    monkeypatch.setattr(filelock, "FileLock", None)
    assert run("hopper-random-v2", 50, path) == path


def test_full_disk_is_refused_before_any_work(tmp_path, monkeypatch):
    def usage(folder):
        return shutil._ntuple_diskusage(100, 99, 1_000_000)

    monkeypatch.setattr(rollout, "rollout", None)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(RuntimeError, match="has 1 MB left, collecting 200000 rows"):
        run("hopper-random-v2", 200_000, tmp_path / "data.hdf5")
    assert leftovers(tmp_path) == []


def test_space_estimate_covers_the_real_sizes(tmp_path, monkeypatch):
    sizes = []

    def measure(plan, folder):
        sizes.extend(p.stat().st_size for p in folder.glob("*.npy"))
        return plain(plan, folder)

    plain = collect.assemble
    monkeypatch.setattr(collect, "assemble", measure)
    path = run("hopper-random-v2", 5000, tmp_path / "data.hdf5")
    used = sum(sizes) + path.stat().st_size

    def usage(folder):
        return shutil._ntuple_diskusage(used, 0, used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(RuntimeError, match="5000 rows of hopper needs"):
        run("hopper-random-v2", 5000, tmp_path / "again.hdf5")


# ---------------------------------------------------------------- refusals


def test_kinds_follow_from_the_shipped_policies(tmp_path, monkeypatch):
    ship(tmp_path, monkeypatch, levels=("medium",))
    assert kinds("hopper") == ["random", "medium"]
    assert kinds("walker2d") == ["random"]
    assert kinds("antmaze") == []
    ship(tmp_path, monkeypatch)
    assert kinds("hopper") == ["random", "medium", "expert", "medium-expert"]
    monkeypatch.setattr(policies, "POLICY_DIR", tmp_path / "nowhere")
    assert kinds("hopper") == ["random"]


@pytest.mark.parametrize(
    "task, there",
    [
        ("hopper-medium-replay-v2", "hopper-random-v2, hopper-medium-v2$"),
        ("hopper-full-replay-v2", "hopper-random-v2, hopper-medium-v2$"),
        ("hopper-medium-expert-v2", "hopper-random-v2, hopper-medium-v2$"),
        ("hopper-medium-v0", "hopper-random-v2, hopper-medium-v2$"),
        ("walker2d-medium-v2", "walker2d-random-v2$"),
        ("antmaze-umaze-v2", "none$"),
    ],
)
def test_what_cannot_be_collected_says_what_can(tmp_path, monkeypatch, task, there):
    ship(tmp_path, monkeypatch, levels=("medium",))
    for refused in (
        lambda: run(task, 50, tmp_path / "x"),
        lambda: fingerprint(task),
    ):
        with pytest.raises(NotCollectable, match=f"for {task}.*{there}"):
            refused()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("rows", [1, 0, -5])
def test_too_few_rows_are_refused(tmp_path, rows):
    with pytest.raises(ValueError, match=f"rows is {rows};"):
        run("hopper-random-v2", rows, tmp_path / "x")


def test_negative_seed_and_unknown_task_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seed is -1"):
        run("hopper-random-v2", 50, tmp_path / "x", seed=-1)
    with pytest.raises(ValueError, match="unknown task 'hopper'"):
        run("hopper", 50, tmp_path / "x")


def test_policies_that_do_not_fit_are_refused(tmp_path, policy):
    def refused(task, file, match):
        with pytest.raises(ValueError, match=match):
            run(task, 50, tmp_path / "x", policy=file)

    (tmp_path / "garbage").write_bytes(b"\x00" * 100)
    refused("hopper-medium-v2", tmp_path / "garbage", "garbage is not a policy")
    refused("hopper-medium-v2", tmp_path / "none", "none does not exist")
    refused("walker2d-medium-v2", policy, "11 state to 3 action.*walker2d has 17 and 6")
    refused("hopper-random-v2", policy, "not rolled out from one policy")
    refused("hopper-medium-expert-v2", policy, "not rolled out from one policy")
    refused("antmaze-medium-play-v2", policy, "not rolled out from one policy")


def test_changed_shipped_policy_is_refused(tmp_path, monkeypatch):
    ship(tmp_path, monkeypatch)
    make_policy(tmp_path / "hopper_medium.safetensors", seed=9)
    with pytest.raises(
        ValueError, match="hopper_medium.safetensors has sha256.*manifest"
    ):
        run("hopper-medium-v2", 50, tmp_path / "x")


# ---------------------------------------------------------------- command line


def test_command_collects_and_says_what_it_wrote(tmp_path, monkeypatch, capsys, policy):
    out = tmp_path / "data.hdf5"
    command = (
        f"collect hopper-medium-v2 --rows 300 --seed 1 --out {out} --policy {policy}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    collect.main()
    printed = capsys.readouterr()
    assert "self-collected stand-in (not D4RL data)" in printed.out
    assert " 300 rows" in printed.out and files.sha256(out) in printed.out
    assert f"corl.data.card hopper-medium-v2 --path {out}" in printed.out
    assert "300/300" in printed.err and "rows/s" in printed.err
    assert read(out)[1]["seed"] == 1


def test_command_makes_a_mixture_under_a_name_that_says_so(tmp_path, monkeypatch):
    ship(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    command = "collect hopper-medium-v2 --rows 100 --mix expert --share 0.25"
    monkeypatch.setattr(sys, "argv", command.split())
    collect.main()
    data, _ = read(tmp_path / "hopper-medium-v2-expert-0.25-self-collected.hdf5")
    assert data["infos/policy_label"].sum() == 25


def test_command_fails_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["collect", "pen-human-v1"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^error: no self-collected.*none$"):
        collect.main()
    assert leftovers(tmp_path) == []
