"""AntMaze is D4RL's: maps, physics, resets, reward, limit; and its data are made as D4RL's."""

import re
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corl import antmaze, envs, physics, tasks

KINDS = ("umaze", "umaze-diverse", "medium-play", "medium-diverse") + (
    "large-play",
    "large-diverse",
)
# D4RL's evaluation maps as numbers, written down again: 1 wall, 2 start, 3 goal.
MAPS = {
    "umaze": "11111 12001 11101 13001 11111",
    "medium": "11111111 12011001 10010001 11000111 10010001 10100101 10001031 11111111",
    "large": "111111111111 120001000001 101101010101 100000010001 101111011101 "
    "100101000001 110101010111 100100010301 111111111111",
}
GOALS = {"umaze": (0, 8), "medium": (20, 20), "large": (32, 24)}  # cell centres, x and y
COLLECT = {  # marked `G` in D4RL's generation maps
    "umaze": {(3, 1)},
    "medium": {(2, 6), (5, 1), (6, 5)},
    "large": {(1, 6), (3, 5), (3, 10), (5, 2), (7, 4), (7, 6), (7, 9)},
}


def reference_model(size):
    """D4RL's ant and walls as text edits of gymnasium's file, apart from the code under test."""
    text = (Path(gym.__file__).parent / "envs/mujoco/assets/ant.xml").read_text()
    text = text.replace('timestep="0.01"', 'timestep="0.02"')
    text = text.replace(
        'margin="0.01" rgba', 'margin="0.01" solref=".02 1" solimp=".8 .8 .01" rgba'
    )
    text = re.sub(
        r'ctrlrange="-1.0 1.0" joint="(\w+)" gear="150"',
        r'ctrlrange="-30 30" joint="\1"',
        text,
    )
    walls = "".join(
        f'<geom type="box" pos="{4 * (j - 1)} {4 * (i - 1)} 1" size="2 2 1" '
        'contype="1" conaffinity="1"/>'
        for i, row in enumerate(MAPS[size].split())
        for j, mark in enumerate(row)
        if mark == "1"
    )
    return mujoco.MjModel.from_xml_string(
        text.replace("</worldbody>", walls + "</worldbody>")
    )


def eval_env(kind="umaze"):
    return envs.make(f"antmaze-{kind}-v2")


# ---------------------------------------------------------------- maps


@pytest.mark.parametrize("size", MAPS)
def test_map_start_and_goal_are_d4rls(size):
    maze, rows = antmaze.MAZES[size], MAPS[size].split()
    shown = [
        "".join("1" if c == "#" else {"R": "2", "G": "3", ".": "0"}[c] for c in r)
        for r in maze.rows
    ]
    assert shown == rows
    assert maze.position(maze.cells("R")[0]).tolist() == [0, 0]
    assert maze.position(maze.cells("G")[0]).tolist() == list(GOALS[size])
    assert set(maze.play_goals) == COLLECT[size]
    assert len(maze.play_goals) == len(COLLECT[size])
    assert COLLECT[size] <= set(maze.free)


@pytest.mark.parametrize("size", MAPS)
def test_compiled_model_is_d4rls_in_every_physical_field(size):
    found, wanted = antmaze.AntMaze(size).model, reference_model(size)
    assert (
        found.opt.timestep == 0.02
        and found.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
    )
    assert (found.nq, found.nv, found.nu) == (15, 14, 8)
    assert found.actuator_ctrlrange.tolist() == [[-30, 30]] * 8
    fields = [
        "type",
        "pos",
        "quat",
        "size",
        "friction",
        "solref",
        "solimp",
        "margin",
        "gap",
    ]
    fields = [
        f"geom_{f}"
        for f in (*fields, "condim", "contype", "conaffinity", "solmix", "bodyid")
    ]
    fields += [
        "jnt_type",
        "jnt_range",
        "jnt_axis",
        "jnt_pos",
        "jnt_limited",
        "jnt_stiffness",
    ]
    fields += ["jnt_solref", "jnt_solimp", "jnt_margin", "dof_armature", "dof_damping"]
    fields += [
        "dof_frictionloss",
        "actuator_gear",
        "actuator_trnid",
        "actuator_ctrllimited",
    ]
    fields += ["actuator_gainprm", "actuator_biasprm", "qpos0", "qpos_spring"]
    for field in fields:
        np.testing.assert_array_equal(
            getattr(found, field), getattr(wanted, field), field
        )
    for field in ("body_mass", "body_inertia", "body_pos", "body_quat", "body_ipos"):
        # the goal is one more body, the last and without mass
        np.testing.assert_array_equal(
            getattr(found, field)[:-1], getattr(wanted, field), field
        )
    assert found.body_mass[-1] == 0 and found.ngeom == wanted.ngeom


def test_walls_stand_where_the_map_says():
    model = antmaze.AntMaze("umaze").model
    boxes = model.geom_pos[model.geom_type == mujoco.mjtGeom.mjGEOM_BOX]
    assert len(boxes) == MAPS["umaze"].count("1") == 18
    places = {tuple(p) for p in boxes}
    assert (0.0, 4.0, 1.0) in places and (4.0, 4.0, 1.0) in places  # above the start
    assert (8.0, 4.0, 1.0) not in places  # the way through
    assert not any(tuple([*g, 1.0]) in places for g in [(0, 0), (0, 8)])


# ---------------------------------------------------------------- dynamics and observation


def test_trajectory_is_that_of_raw_mujoco_with_torques_of_thirty():
    env = antmaze.AntMaze("umaze")
    model = reference_model("umaze")
    data = mujoco.MjData(model)
    state, _ = env.reset(seed=0)
    mujoco.mj_resetData(model, data)
    data.qpos[:], data.qvel[:] = state[:15], state[15:]
    mujoco.mj_forward(model, data)
    rng = np.random.default_rng(0)
    for _ in range(60):
        action = rng.uniform(-1, 1, 8).astype(np.float32)
        state, *_ = env.step(action)
        data.ctrl[:] = 30.0 * action.astype(np.float64)
        mujoco.mj_step(model, data, nstep=5)
        expected = np.concatenate([data.qpos, data.qvel])
        np.testing.assert_array_equal(state, expected)
    assert data.time == pytest.approx(6.0)  # 0.1 s per action
    assert np.abs(state[:2]).max() > 0.05  # it moved


def test_observation_is_position_pose_and_velocity_without_the_goal():
    env = eval_env()
    state, info = env.reset(seed=1)
    assert env.observation_space.shape == (29,) and state.dtype == np.float64
    assert env.action_space.shape == (8,) and env.action_space.high.tolist() == [1.0] * 8
    assert info == {}
    base = env.unwrapped
    base.goal = base.goal + 0.7
    state, reward, terminated, truncated, info = env.step(np.ones(8, np.float32))
    np.testing.assert_array_equal(state[:15], base.data.qpos)
    np.testing.assert_array_equal(state[15:], base.data.qvel)
    assert (reward, terminated, truncated, info) == (0.0, False, False, {})


def test_actions_outside_the_box_count_as_its_border():
    results = []
    for scale in (1.0, 7.0):
        env = eval_env()
        env.reset(seed=2)
        results.append(env.step(np.full(8, scale, np.float32))[0])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("version, factor", [("3.4.0", 1.0), ("3.5.0", 0.5)])
def test_contact_margin_is_halved_from_mujoco_3_5_on(version, factor, monkeypatch):
    monkeypatch.setattr(mujoco, "__version__", version)
    margin = eval_env().unwrapped.model.geom_margin
    assert set(margin.tolist()) == {0.01 * factor}


def test_walls_stop_the_ant():
    env = antmaze.AntMaze("umaze")
    env.reset(seed=0)
    qpos, qvel = env.init_qpos.copy(), np.zeros(14)
    qvel[1] = 8.0  # straight at the wall above the start, whose face is at y = 2
    env.set_state(qpos, qvel)
    highest = max(env.step(np.zeros(8, np.float32))[0][1] for _ in range(30))
    assert 0.4 < highest < 2.0


# ---------------------------------------------------------------- resets


@pytest.mark.parametrize("kind", KINDS)
def test_resets_follow_d4rls_distribution(kind):
    env, size = eval_env(kind), kind.partition("-")[0]
    env.reset(seed=0)
    starts, goals = [], []
    for _ in range(300):
        starts.append(env.reset()[0])
        goals.append(env.unwrapped.goal - GOALS[size])
    starts, goals = np.array(starts), np.array(goals)
    rest = [0, 0, 0.75, 1] + [0] * 11
    pose = starts[:, :15] - rest  # every position, x and y too, moves by up to 0.1
    assert (
        np.abs(pose).max() <= 0.1
        and pose.min(0).max() < -0.09
        and pose.max(0).min() > 0.09
    )
    np.testing.assert_allclose(starts[:, 15:].std(0), 0.1, atol=0.02)
    np.testing.assert_allclose(starts[:, 15:].mean(0), 0.0, atol=0.03)
    # uniform on [0, 1] plus uniform on [0, 0.5]
    assert goals.min() >= 0.0 and 1.3 < goals.max() <= 1.5
    np.testing.assert_allclose(goals.mean(0), 0.75, atol=0.06)
    np.testing.assert_allclose(goals.var(0), (1 + 0.25) / 12, atol=0.02)
    assert abs(np.corrcoef(goals.T)[0, 1]) < 0.2


def test_a_seed_repeats_goal_and_start_and_numpys_global_stream_plays_no_part():
    first, second = eval_env(), eval_env()
    np.random.seed(0)
    a = [
        first.reset(seed=5)[0],
        first.unwrapped.goal,
        first.reset()[0],
        first.unwrapped.goal,
    ]
    drawn = np.random.get_state()[1].copy()
    np.random.seed(1)
    b = [
        second.reset(seed=5)[0],
        second.unwrapped.goal,
        second.reset()[0],
        second.unwrapped.goal,
    ]
    np.testing.assert_array_equal(np.concatenate(a), np.concatenate(b))
    assert not np.array_equal(a[1], a[3])  # -v2 draws a goal at every reset
    np.random.seed(0)
    np.testing.assert_array_equal(drawn, np.random.get_state()[1])
    envs.seed(first, 5)
    np.testing.assert_array_equal(first.reset()[0], a[0])


@pytest.mark.parametrize("size", MAPS)
def test_resets_draw_from_the_given_goals_and_starts(size):
    maze, starts, goals = antmaze.MAZES[size], set(), set()
    wanted = set(maze.free) - COLLECT[size]
    env = antmaze.AntMaze(size, goals=maze.play_goals, starts=sorted(wanted))
    env.reset(seed=0)
    for _ in range(400):
        state, _ = env.reset()
        cell = maze.cell(state[:2])
        assert (
            (0 <= state[:2] - maze.position(cell))
            & (state[:2] - maze.position(cell) <= 1)
        ).all()
        starts.add(cell)
        goals.add(maze.cell(env.goal))
    assert goals == COLLECT[size] and starts == wanted


# ---------------------------------------------------------------- reward, end, limit


@pytest.mark.parametrize("distance, reached", [(0.0, True), (0.49, True), (0.52, False)])
def test_reward_and_end_within_half_a_metre_of_the_goal(distance, reached):
    env = eval_env()
    env.reset(seed=0)
    base = env.unwrapped
    rest = base.init_qpos.copy(), base.init_qvel
    base.goal, rest[0][:2] = np.array([0.6, 8.3]), [0.6 + distance, 8.3]
    base.set_state(*rest)
    state, reward, terminated, truncated, _ = env.step(np.zeros(8, np.float32))
    assert abs(np.linalg.norm(state[:2] - base.goal) - distance) < 0.01
    assert (reward, terminated, truncated) == (float(reached), reached, False)


def test_the_radius_includes_its_border():
    env = antmaze.AntMaze("umaze")
    env.reset(seed=0)
    env.goal = np.array([1.0, 2.0])
    for y, reached in [(2.5, True), (np.nextafter(2.5, 3), False), (1.5, True)]:
        env.data.qpos[:2] = [1.0, y]
        assert env.reached() is reached


def test_an_episode_with_given_goals_goes_on_at_the_goal():
    env = antmaze.AntMaze("umaze", goals=[(3, 1)])
    env.reset(seed=0)
    env.goal = env.data.qpos[:2].copy()
    assert env.step(np.zeros(8, np.float32))[1:4] == (1.0, False, False)


@pytest.mark.parametrize("kind, limit", [("umaze", 700), ("medium-play", 1000)])
def test_the_time_limit_truncates(kind, limit):
    env = eval_env(kind)
    env.reset(seed=0)
    flags = [env.step(np.zeros(8, np.float32))[1:4] for _ in range(limit)]
    assert flags[-1] == (0.0, False, True)
    assert set(flags[:-1]) == {(0.0, False, False)}


def test_a_fall_ends_nothing():
    env = eval_env()
    env.reset(seed=0)
    base = env.unwrapped
    qpos = base.init_qpos.copy()
    qpos[3:7] = [0, 1, 0, 0]  # on its back
    base.set_state(qpos, base.init_qvel)
    assert not any(env.step(np.zeros(8, np.float32))[2] for _ in range(20))


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_the_success_rate(kind):
    scores = tasks.normalized_score(f"antmaze-{kind}-v2", [0.0, 1.0, 0.25])
    assert scores.tolist() == [0.0, 100.0, 25.0]


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="antmaze-umaze-v0.*use antmaze-umaze-v2"):
        envs.make("antmaze-umaze-v0")
    with pytest.raises(
        ValueError, match="maze 'big' is not one of umaze, medium, large"
    ):
        antmaze.AntMaze("big")


# ---------------------------------------------------------------- exact resume


def future(env, steps):
    rng, seen = np.random.default_rng(9), []
    for t in range(steps):
        state, *rest = env.step(rng.uniform(-1, 1, 8).astype(np.float32))
        seen.append(np.concatenate([state, np.float64(rest[:3]), env.unwrapped.goal]))
        if t == steps // 2:
            seen.append(np.concatenate([env.reset()[0], [0] * 3, env.unwrapped.goal]))
    return np.array(seen)


@pytest.mark.parametrize("before", [0, 13])
def test_state_gives_a_bit_identical_future_goal_and_resets_included(before):
    env = eval_env("medium-diverse")
    env.reset(seed=3)
    for _ in range(before):
        env.step(np.ones(8, np.float32))
    saved = physics.get_state(env)
    expected = future(env, 30)
    fresh = eval_env("medium-diverse")
    fresh.reset(seed=77)
    for again in (fresh, env):
        physics.set_state(again, saved)
        np.testing.assert_array_equal(future(again, 30), expected)
    assert len({tuple(row[-2:]) for row in expected}) == 2


# ---------------------------------------------------------------- the way through the maze


def brute_force(maze, goal):
    """Steps to the goal by relaxation until nothing changes."""
    steps = {cell: 0 if cell == goal else 10**6 for cell in maze.free}
    for _ in maze.free:
        for (i, j), value in list(steps.items()):
            near = [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
            steps[i, j] = min([value] + [steps[c] + 1 for c in near if c in steps])
    return steps


@pytest.mark.parametrize("size", MAPS)
def test_the_way_is_a_shortest_one_from_everywhere_to_everywhere(size):
    maze = antmaze.MAZES[size]
    for goal in maze.free:
        steps = brute_force(maze, goal)
        for cell in maze.free:
            found = maze.next_cell(cell, goal)
            assert steps[found] == max(steps[cell] - 1, 0)
            assert abs(found[0] - cell[0]) + abs(found[1] - cell[1]) == (cell != goal)
    assert brute_force(antmaze.MAZES["umaze"], (3, 1))[1, 1] == 6


def test_a_way_leads_out_of_a_wall_and_none_into_it():
    maze = antmaze.MAZES["umaze"]
    assert maze.next_cell((2, 2), (3, 1)) == (3, 2)
    with pytest.raises(ValueError, match=r"goal cell \(2, 2\) is not a free cell"):
        maze.next_cell((1, 1), (2, 2))
    with pytest.raises(ValueError, match=r"no way from cell \(0, 0\)"):
        maze.next_cell((0, 0), (3, 1))


@pytest.mark.parametrize("size", MAPS)
def test_a_way_leads_on_from_wherever_the_ant_can_stand(size):
    maze = antmaze.MAZES[size]
    for cell in maze.free:
        for corner in [(-1.9, -1.9), (-1.9, 1.9), (1.9, -1.9), (1.9, 1.9)]:
            here = maze.cell(maze.position(cell) + corner)
            assert maze.next_cell(here, maze.cells("G")[0]) in maze.free


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.floats(-30, 60), st.floats(-30, 60), st.sampled_from(sorted(MAPS)))
def test_cell_of_a_position_is_d4rls_rule(x, y, size):
    found = antmaze.MAZES[size].cell(np.array([x, y]))
    assert found == (int(1 + max(y, 1e-4) / 4), int(1 + max(x, 1e-4) / 4))


@pytest.mark.parametrize("size", MAPS)
def test_goals_and_waypoints_with_their_noise_stay_in_their_cell(size):
    maze = antmaze.MAZES[size]
    for cell in maze.free:
        for noise in (0.0, 1.0, 1.5):
            assert maze.cell(maze.position(cell) + noise) == cell
