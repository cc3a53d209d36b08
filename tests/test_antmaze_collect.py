"""Antmaze's stand-in: an ant that walks, D4RL's way of leading it, D4RL's row conventions."""

import hashlib
import json
import math

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corl import antmaze, files, tasks
from corl.data import sources
from corl.data.card import card
from corl.standin import collect, maze_walks, policies, rollout, train_walker, walker
from corl.standin.policies import (
    POLICY_DIR,
    NotCollectable,
    TanhGaussianPolicy,
    fingerprint,
    kinds,
    load_policy,
    save_policy,
)

UMAZE = tasks.task("antmaze-umaze-v2")
GAIT = train_walker.Gait(7.8, 0.98, 0.67, 0.28, 0.29, 2.4, 0.22, -0.88)  # one that walks


@pytest.fixture(scope="module")
def shipped():
    return load_policy(POLICY_DIR / walker.POLICY_NAME)


def product(p, q):
    """Hamilton's product of two quaternions (w, x, y, z), written out."""
    a, b, c, d = p
    e, f, g, h = q
    return np.array(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ]
    )


def turned(state, direction, angle, shift=(0.0, 0.0)):
    """The same situation in a world that is turned about the vertical and moved."""
    c, s = math.cos(angle), math.sin(angle)
    rotation = np.array([[c, -s], [s, c]])
    state = state.copy()
    state[:2] = rotation @ state[:2] + shift
    state[15:17] = rotation @ state[15:17]
    state[3:7] = product([math.cos(angle / 2), 0, 0, math.sin(angle / 2)], state[3:7])
    return state, rotation @ direction


def some_state(seed):
    state = np.random.default_rng(seed).normal(size=29)
    state[3:7] /= np.linalg.norm(state[3:7])
    return state


# ---------------------------------------------------------------- what the walker sees


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.integers(0, 1000), st.floats(-10, 10), st.floats(0.01, 50), st.floats(-100, 100)
)
def test_features_are_the_same_wherever_the_world_is_turned(seed, angle, length, shift):
    state, direction = some_state(seed), length * np.array([0.6, -0.8])
    expected = walker.features(state[None], direction[None])
    state, direction = turned(state, direction, angle, (shift, -shift))
    found = walker.features(state[None], direction[None])
    assert found.shape == (1, 27) and found.dtype == np.float32
    # A rotation by nearly half a turn may be written with either sign.
    if abs(expected[0, 1]) > 1e-3:
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_features_along_the_x_axis_are_the_state_without_its_place():
    states = np.stack([some_state(s) for s in range(20)])
    states[:, 3] = np.abs(states[:, 3])
    found = walker.features(states, np.tile([2.5, 0.0], (20, 1)))
    np.testing.assert_allclose(found, states[:, 2:], atol=1e-6)
    states[:, 3:7] *= -1  # the same rotation
    again = walker.features(states, np.tile([2.5, 0.0], (20, 1)))
    np.testing.assert_array_equal(found, again)


def test_yaw_is_the_angle_about_the_vertical():
    for angle in np.linspace(-3, 3, 13):
        state, _ = turned(1.1 * np.eye(29)[3], np.zeros(2), angle)
        assert walker.yaw(state) == pytest.approx(angle)


# ---------------------------------------------------------------- the gait


def test_the_gaits_geometry_is_that_of_the_compiled_ant():
    model = antmaze.load_model(None)
    joints = model.actuator_trnid[:, 0]
    places = model.jnt_qposadr[joints] - 7
    assert places.tolist() == train_walker.MOTORS
    for leg in range(4):
        hip, ankle = model.joint(f"hip_{leg + 1}"), model.joint(f"ankle_{leg + 1}")
        assert hip.qposadr[0] - 7 == 2 * leg and ankle.qposadr[0] - 7 == 2 * leg + 1
        x, y = model.body_pos[hip.bodyid[0]][:2]
        angle = math.atan2(y, x) % (2 * math.pi)
        assert angle == pytest.approx(train_walker.LEG_ANGLES[leg])
        # Every ankle bends down by 30 to 70 degrees, on its own side of zero.
        bends = np.sort(train_walker.ANKLE_SIGNS[leg] * np.rad2deg(ankle.range))
        np.testing.assert_allclose(bends, [30, 70])


@pytest.mark.parametrize("angle", [0.4, 2.0, -3.0])
def test_the_gait_depends_on_the_heading_against_the_torso_only(angle):
    state = some_state(1)
    expected = GAIT.action(state, 0.7, 1.1)
    again, _ = turned(state, np.zeros(2), angle)
    np.testing.assert_allclose(
        GAIT.action(again, 0.7 + angle, 1.1), expected, atol=1e-12
    )
    assert np.abs(expected).max() <= 1 and expected.std() > 0.1
    assert not np.allclose(GAIT.action(state, 1.7, 1.1), expected)
    assert not np.allclose(GAIT.action(state, 0.7, 2.1), expected)


def test_the_gaits_targets_leg_by_leg():
    state, heading, phase = some_state(2), 0.3, 2.0
    action = GAIT.action(state, heading, phase)
    for leg in range(4):
        angle = math.radians(45 + 90 * leg) + walker.yaw(state) - heading
        clock = phase + (leg % 2) * math.pi
        hip = -GAIT.stride * math.sin(angle) * math.cos(clock)
        bend = GAIT.ankle + GAIT.lift * math.sin(clock + GAIT.lead)
        bend -= GAIT.reach * math.cos(angle) * math.cos(clock)
        sign = 1 if leg in (0, 3) else -1
        for k, target in ((2 * leg, hip), (2 * leg + 1, sign * bend)):
            pull = (
                GAIT.stiffness * (target - state[7 + k]) - GAIT.damping * state[21 + k]
            )
            motor = train_walker.MOTORS.index(k)
            assert action[motor] == pytest.approx(min(1, max(-1, pull)))


def test_the_gait_walks_every_way():
    plane, rng = train_walker.Plane(), np.random.default_rng(0)
    for heading in (0.0, 1.3, 3.0, -2.0):
        covered = train_walker.walk(
            plane, train_walker.gait_policy(GAIT), heading, 60, 0.2, rng
        )
        assert covered[-1] > 4.0  # metres in six seconds
        assert covered[30] < covered[-1]


def test_the_search_finds_faster_gaits_and_repeats():
    options = {"generations": 3, "population": 10, "elite": 3, "steps": 30}
    gait, log = train_walker.search(**options, progress=False)
    again, same = train_walker.search(**options, progress=False)
    assert gait == again and log == same
    speeds = [row["speed_elite"] for row in log]
    assert speeds[-1] > speeds[0] + 0.1 and speeds[-1] > 0.3
    other, _ = train_walker.search(**options, seed=1, progress=False)
    assert other != gait
    low, high = train_walker.LOWEST, train_walker.HIGHEST
    for field in vars(gait):
        assert getattr(low, field) <= getattr(gait, field) <= getattr(high, field)


# ---------------------------------------------------------------- the clone


def test_the_clone_regresses_actions_and_adds_no_noise_of_its_own():
    rng = np.random.default_rng(0)
    inputs = (rng.normal(size=(1000, 27)) * 3 + 5).astype(np.float32)
    weights = rng.normal(size=(27, 8)) / 20
    actions = np.tanh((inputs - 5) @ weights)
    before = torch.get_rng_state()
    policy, explained = train_walker.clone(inputs, actions, 300, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert 0.6 < explained < 1.0
    means = walker.act(policy, inputs[900:])
    left = ((means - actions[900:]) ** 2).mean() / actions[900:].var(0, ddof=1).mean()
    assert explained == pytest.approx(1 - left, abs=1e-3)
    noise = torch.ones(100, 8)
    sampled = policy(torch.from_numpy(inputs[900:]), noise)[0].numpy()
    np.testing.assert_allclose(sampled, means, atol=1e-6)
    again, _ = train_walker.clone(inputs, actions, 300, seed=0)
    np.testing.assert_array_equal(walker.act(again, inputs[900:]), means)


def test_demonstrations_hold_the_gaits_own_actions():
    inputs, actions = train_walker.demonstrations(GAIT, 6, 30, np.random.default_rng(0))
    assert inputs.shape == (180, 27) and actions.shape == (180, 8)
    assert np.abs(actions).max() <= 1.0
    # Features along the heading suffice to compute the action again; the first walk and
    # every third start with the clock at 0.
    for walk in (0, 3):
        state = np.zeros(29)
        for t in range(30):
            state[2:] = inputs[30 * walk + t]
            found = GAIT.action(state, 0.0, 2 * np.pi / GAIT.period * t)
            np.testing.assert_allclose(found, actions[30 * walk + t], atol=1e-4)
    state[2:] = inputs[30]
    assert np.abs(GAIT.action(state, 0.0, 0.0) - actions[30]).max() > 0.1


def test_the_shipped_walker_walks_as_its_manifest_says(shipped):
    facts = json.loads((POLICY_DIR / "manifest.json").read_text())
    facts = facts[walker.POLICY_NAME]
    path = POLICY_DIR / walker.POLICY_NAME
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    speeds = train_walker.evaluate(shipped, 6, steps=100)
    assert speeds.min() > 1.0
    assert abs(speeds.mean() - facts["speed_mean"]) < 0.25


def test_shipping_writes_policy_log_and_manifest_beside_the_others(
    tmp_path, monkeypatch
):
    folder, out = tmp_path / "policies", tmp_path / "out"
    monkeypatch.setattr(policies, "POLICY_DIR", folder)
    with pytest.raises(ValueError, match="no antmaze_walker.safetensors in .*train it"):
        train_walker.ship(out)
    folder.mkdir()
    out.mkdir()
    (folder / "manifest.json").write_text('{"other": {"robot": "hopper"}}')
    (out / "train.csv").write_text("generation\n1\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_policy(TanhGaussianPolicy(27, 8, 16), out / walker.POLICY_NAME)
    evaluate = train_walker.evaluate
    monkeypatch.setattr(train_walker, "evaluate", lambda p, walks: evaluate(p, 2, 20))
    train_walker.ship(out, seed=3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {"other", walker.POLICY_NAME}
    facts = manifest[walker.POLICY_NAME]
    assert (facts["robot"], facts["level"]) == ("antmaze", "walker")
    assert facts["command"].endswith("--seed 3")
    assert abs(facts["speed_mean"]) < 1.0  # an untrained network does not walk
    assert (folder / "antmaze_train.csv").read_text() == "generation\n1\n"


# ---------------------------------------------------------------- leading the ant


def test_waypoints_lead_over_cell_centres_to_the_goal():
    maze, goal = antmaze.MAZES["umaze"], np.array([0.5, 8.7])
    noise, xy = np.array([0.25, 0.75]), np.array([0.0, 0.0])
    trail = []
    for _ in range(10):
        xy = maze_walks.waypoint(maze, xy, goal, noise)
        trail.append(tuple(xy))
    ways = [(4.25, 0.75), (8.25, 0.75), (8.25, 4.75), (8.25, 8.75), (4.25, 8.75)]
    assert trail == [*ways, *[(0.5, 8.7)] * 5]


@pytest.mark.parametrize("kind", tasks.ANTMAZES)
def test_goals_and_starts_of_each_kind(kind):
    env = maze_walks.make_env(kind)
    size, _, style = kind.partition("-")
    assert env.maze is antmaze.MAZES[size]
    free, play = set(env.maze.free), set(env.maze.play_goals)
    goals, starts = {
        "": (play, None),
        "play": (play, free - play),
        "diverse": (free, free),
    }[style]
    assert set(env.goals) == goals
    assert starts == (env.starts if env.starts is None else set(env.starts))


@pytest.fixture(scope="module")
def umaze(shipped):
    told = []
    seed = np.random.SeedSequence([4, 0, 0])
    table = maze_walks.rollout(UMAZE, shipped, 1500, seed, told.append)
    assert sum(told) == 1500
    return table


def test_rows_are_observation_action_and_the_physics_after_it(umaze):
    assert len(umaze) == 1500
    assert np.flatnonzero(umaze["timeouts"]).tolist() == [700, 1401]  # one step late
    physics = np.concatenate([umaze["infos/qpos"], umaze["infos/qvel"]], 1)
    inside = ~umaze["timeouts"][:-1]
    np.testing.assert_array_equal(
        physics[:-1][inside], umaze["observations"][1:][inside]
    )
    assert not np.allclose(physics[700], umaze["observations"][701], atol=0.1)
    for first in (0, 701, 1402):  # no multistart in umaze
        assert np.abs(umaze["observations"][first, :2]).max() <= 0.1
    assert np.abs(umaze["actions"]).max() <= 1.0


def test_actions_lead_to_the_recorded_physics(umaze):
    env = antmaze.AntMaze("umaze")
    env.reset(seed=0)
    for i in (0, 50, 300):
        state = umaze["observations"][i].astype(np.float64)
        env.set_state(state[:15], state[15:])
        found = env.step(umaze["actions"][i])[0]
        np.testing.assert_allclose(found[:15], umaze["infos/qpos"][i], atol=2e-3)


def test_goals_are_of_the_walk_and_labels_of_the_evaluation(umaze):
    goals = umaze["infos/goal"]
    assert len(np.unique(goals, axis=0)) == 3
    assert len(np.unique(goals[:701], axis=0)) == 1
    assert (goals >= [0, 8]).all() and (goals <= [1.5, 9.5]).all()
    for row in umaze[::7]:
        x, y = row["infos/qpos"][:2]
        reached = math.hypot(x - 0.75, y - 8.75) <= 0.5
        assert row["rewards"] == float(reached) and row["terminals"] == reached
    # Episodes go on at the goal, so labels come in runs inside an episode.
    assert 20 < umaze["terminals"][:701].sum() < 600
    assert not umaze["timeouts"][:700].any()


def test_the_ant_reaches_the_goals_it_is_led_to(umaze):
    for first in (0, 701):
        rows = umaze[first : first + 701]
        away = np.linalg.norm(rows["infos/qpos"][:, :2] - rows["infos/goal"], axis=1)
        assert away[0] > 7 and away.min() <= 0.5
        assert 100 < (away <= 0.5).argmax() < 400


def test_actions_are_the_walkers_plus_clipped_noise_of_a_fifth(umaze, shipped):
    maze = antmaze.MAZES["umaze"]
    # In the goal's cell and beside it the waypoint is the goal, without noise.
    near = [
        row for row in umaze if maze.cell(row["observations"][:2]) in ((3, 1), (3, 2))
    ]
    states = np.array([row["observations"] for row in near], np.float64)
    directions = np.array([row["infos/goal"] for row in near]) - states[:, :2]
    means = walker.act(shipped, walker.features(states, directions))
    actions = np.array([row["actions"] for row in near])
    assert len(near) > 300 and (np.abs(actions) == 1.0).any()
    free = np.abs(means) < 0.3  # five standard deviations from the bounds at least 3.5
    residual = (actions - means)[free]
    assert residual.std() == pytest.approx(0.2, abs=0.015)
    assert abs(residual.mean()) < 0.02


def test_a_rollout_repeats_and_depends_on_its_seed(shipped):
    def rows(word):
        seed = np.random.SeedSequence([word])
        return maze_walks.rollout(
            tasks.task("antmaze-medium-diverse-v2"), shipped, 40, seed
        )

    np.testing.assert_array_equal(rows(1), rows(1))
    assert not np.array_equal(rows(1)["actions"], rows(2)["actions"])
    assert not np.array_equal(rows(1)["infos/goal"][0], rows(2)["infos/goal"][0])


def test_a_whole_rollout_ends_with_an_episode(shipped, monkeypatch):
    monkeypatch.setattr(maze_walks, "ENVS", 2)
    told = []
    seed = np.random.SeedSequence([1])
    args = (UMAZE, shipped, 1450, seed, told.append)
    table = maze_walks.rollout(*args, whole=True)
    assert np.flatnonzero(table["timeouts"]).tolist() == [700, 1401, 2102]
    assert len(table) == 2103 and sum(told) == 1450
    cut = maze_walks.rollout(*args)
    np.testing.assert_array_equal(cut[:1402], table[:1402])


# ---------------------------------------------------------------- the file


def test_the_file_has_d4rls_antmaze_schema_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "CHUNK", 400)
    path = tmp_path / "a.hdf5"
    collect.collect("antmaze-umaze-v2", 710, path, progress=False)
    with h5py.File(path) as file:
        found = {}
        file.visititems(lambda name, item: found.update({name: item}))
        shapes = {k: v.shape[1:] for k, v in found.items() if hasattr(v, "shape")}
        assert shapes == {
            "observations": (29,),
            "actions": (8,),
            "rewards": (),
            "terminals": (),
            "timeouts": (),
            "infos/goal": (2,),
            "infos/qpos": (15,),
            "infos/qvel": (14,),
        }
        # The first chunk of 400 goes on to its episode's end, the second is cut.
        assert np.flatnonzero(file["timeouts"]).tolist() == [700]
        assert len(file["rewards"]) == 710
        digest = json.loads(file.attrs["policies"])["walker"]
    shipped_file = POLICY_DIR / walker.POLICY_NAME
    assert digest == hashlib.sha256(shipped_file.read_bytes()).hexdigest()
    data = sources.resolve("antmaze-umaze-v2", path=path)
    assert len(data.arrays["rewards"]) == 708
    text = card(data)
    assert "score     none" in text and "1 complete" in text


def test_the_same_command_gives_the_same_bytes(tmp_path):
    digests = []
    for name in "ab":
        path = tmp_path / f"{name}.hdf5"
        collect.collect("antmaze-large-diverse-v2", 60, path, progress=False)
        digests.append(files.sha256(path))
    assert digests[0] == digests[1]


def test_every_kind_is_offered_and_only_with_a_walker(tmp_path, monkeypatch):
    assert kinds("antmaze") == list(tasks.ANTMAZES)
    assert set(fingerprint("antmaze-large-play-v2")) == {"walker"}
    with pytest.raises(ValueError, match="mix 'random' into antmaze-umaze-v2"):
        rollout.make_plan(UMAZE, 100, mix="random")
    monkeypatch.setattr(policies, "POLICY_DIR", tmp_path)
    assert kinds("antmaze") == []
    with pytest.raises(NotCollectable, match="antmaze-umaze-v2.*not shipped"):
        rollout.make_plan(UMAZE, 100)


def test_a_policy_of_another_robot_is_no_walker(tmp_path, monkeypatch):
    path = tmp_path / "antmaze_walker.safetensors"
    with torch.random.fork_rng():
        save_policy(TanhGaussianPolicy(29, 8, 16), path)
    facts = {"robot": "antmaze", "level": "walker", "sha256": files.sha256(path)}
    (tmp_path / "manifest.json").write_text(json.dumps({path.name: facts}))
    monkeypatch.setattr(policies, "POLICY_DIR", tmp_path)
    with pytest.raises(ValueError, match="29 state to 8 action.*antmaze has 27 and 8"):
        rollout.make_plan(UMAZE, 100)
