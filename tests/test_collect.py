"""Self-collected data: D4RL's schema, exact densities, same bytes, safe writing."""

import hashlib
import json
import math
import sys
import threading

import filelock
import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

from corl_dare import collect, envs, sac

S, A = 11, 3  # hopper


def make_policy(path, state_dim=S, action_dim=A, seed=0, hidden=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = sac.TanhGaussianPolicy(state_dim, action_dim, hidden)
    sac.save_policy(policy, path)
    return path


def ship(folder, monkeypatch, robots=("hopper",), levels=("medium", "expert")):
    """A policy folder as the package ships it."""
    manifest = {}
    for i, (robot, level) in enumerate((r, v) for r in robots for v in levels):
        facts, name = envs.ROBOTS[robot], f"{robot}_{level}.safetensors"
        path = make_policy(folder / name, facts.state_dim, facts.action_dim, seed=i)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        manifest[name] = {
            "robot": robot,
            "level": level,
            "step": 1000 + i,
            "return_mean": 1.0,
            "return_std": 0.5,
            "sha256": digest,
            "command": "python -m corl_dare.sac",
        }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(collect, "POLICY_DIR", folder)
    return manifest


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
    found = collect.rollout(collect.Behavior("random"), "hopper", rows, seed, False)

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
        behavior = sac.load_policy(tmp_path / f"hopper_{level}.safetensors")
        columns = ("observations", "actions")
        states, actions = (torch.from_numpy(data[k][half]) for k in columns)
        found = data["infos/action_log_probs"][half]
        expected = behavior.log_prob(states, actions).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-2)


def test_seam_flag_is_set_when_the_medium_half_is_cut_mid_episode(tmp_path, monkeypatch):
    ship(tmp_path, monkeypatch, robots=("halfcheetah",))
    data, _ = read(run("halfcheetah-medium-expert-v2", 60, tmp_path / "both.hdf5"))
    assert np.flatnonzero(data["timeouts"]).tolist() == [29]


def test_shipped_policy_is_used_with_its_training_step(tmp_path, monkeypatch):
    ship(tmp_path, monkeypatch)
    data, _ = read(run("hopper-expert-v2", 50, tmp_path / "data.hdf5"))
    assert data["metadata/iteration"] == 1001
    weights = sac.load_policy(tmp_path / "hopper_expert.safetensors").net[0].weight
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
        digests.append(collect.sha256(path))
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
    monkeypatch.setattr(collect, "rollout", None)
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
    digest = collect.sha256(path)
    with pytest.raises(ValueError, match=f"data.hdf5 exists and has {named}.*delete"):
        run(task, rows, path, seed=seed)
    assert collect.sha256(path) == digest


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
    with pytest.raises(OSError, match="no space left"):
        run("hopper-random-v2", 50, tmp_path / "data.hdf5")
    assert leftovers(tmp_path) == []


def test_final_name_appears_only_with_a_complete_file(tmp_path, monkeypatch):
    seen = []

    def watch(part, out):
        assert not out.exists() and part.parent == out.parent
        seen.append(len(read(part)[0]["observations"]))
        publish(part, out)

    publish = collect.publish
    monkeypatch.setattr(collect, "publish", watch)
    run("hopper-random-v2", 50, tmp_path / "data.hdf5")
    assert seen == [50] and leftovers(tmp_path) == ["data.hdf5"]


def test_remains_of_a_killed_process_do_not_harm(tmp_path):
    (tmp_path / "data.hdf5.part").write_bytes(b"half a file")
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

    plain = collect.rollout
    monkeypatch.setattr(collect, "rollout", count)
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


# ---------------------------------------------------------------- refusals


def test_kinds_follow_from_the_shipped_policies(tmp_path, monkeypatch):
    ship(tmp_path, monkeypatch, levels=("medium",))
    assert collect.kinds("hopper") == ["random", "medium"]
    assert collect.kinds("walker2d") == ["random"]
    assert collect.kinds("antmaze") == []
    ship(tmp_path, monkeypatch)
    assert collect.kinds("hopper") == ["random", "medium", "expert", "medium-expert"]
    monkeypatch.setattr(collect, "POLICY_DIR", tmp_path / "nowhere")
    assert collect.kinds("hopper") == ["random"]


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
        lambda: collect.fingerprint(task),
    ):
        with pytest.raises(collect.NotCollectable, match=f"for {task}.*{there}"):
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


def test_command_collects_and_prints_the_card(tmp_path, monkeypatch, capsys, policy):
    out = tmp_path / "data.hdf5"
    command = (
        f"collect hopper-medium-v2 --rows 300 --seed 1 --out {out} --policy {policy}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    collect.main()
    printed = capsys.readouterr()
    assert "self-collected stand-in (not D4RL data)" in printed.out
    assert "transitions from 300 rows" in printed.out
    assert "300/300" in printed.err and "rows/s" in printed.err
    assert read(out)[1]["seed"] == 1


def test_command_fails_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["collect", "antmaze-umaze-v2"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^error: no self-collected.*none$"):
        collect.main()
    assert leftovers(tmp_path) == []
