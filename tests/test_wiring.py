"""What passes between the parts of a run, in all algorithm files: the host's side.

Each algorithm trains once on the toy of `wiring.py`; the tests read what was recorded.
"""

import numpy as np
import pytest
import torch
import wiring
from helpers import assert_equal
from kinds import one_of_each_kind
from wiring import CQL, DARE, EDIS, GENERATES, GOAL, LINEAR, LOCOMOTION, NO_ANTMAZE

ALL = list(wiring.ALGORITHMS)
IQL = [name for name in ALL if name.endswith("iql") and name != "famo2o_iql"]
REBRAC = [name for name in ALL if name.endswith("rebrac")]
TD3 = [name for name in ALL if "td3_bc" in name]
SPOT = [name for name in ALL if name.endswith("spot")]
OPT = [name for name in ALL if "opt_" in name]
NOISY = [*TD3, *REBRAC, *SPOT, "opt_td3"]  # noise is added to the action
COMPAT = {"compat": True, "env": GOAL}
# Whose own files are CORL's, which `compat` is about.
CORLS = ("iql", "cql", "cal_ql", "td3_bc", "awac", "rebrac", "spot")
WARMUP = (8, 9)  # steps


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return wiring.Recorder(lambda: tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def with_corl_files(recorded, tmp_path_factory):
    def get(name):
        folder = tmp_path_factory.getbasetemp() / f"corl-{name}"
        plain = {"normalize": False, "normalize_reward": False}
        fields = {"checkpoints_path": str(folder), "online_iterations": 5, **plain}
        return recorded(name, **fields), folder

    return get


# Every algorithm has one run, which most tests read. What needs a run of its own is made of one
# algorithm of each kind.
every_algorithm = pytest.mark.parametrize("name", ALL)
one_of_a_kind = pytest.mark.parametrize("name", one_of_each_kind(ALL))
# A twin is its baseline plus lines (test_structure.py). What no such line touches is tested in the
# baselines alone, and what a twin does besides its baseline's in the twins alone.
TWINS = [name for name in ALL if name.startswith(("dare_", "edis_", "baq_", "cfdg_"))]
BASELINES = [name for name in ALL if name not in TWINS]


def single_buffer(record):
    return len(record.buffers) == 1


def online_rows(record):
    """Rows that were collected online, whichever buffer holds them."""
    stored = record.stored("online")
    first = wiring.ROWS if single_buffer(record) else 0
    return {key: rows[first:] for key, rows in stored.items()}


def is_row_of(batch, stored):
    """Which rows (B,) of a batch stand in a buffer, with all their fields."""
    keys = "observations actions rewards next_observations terminals".split()
    whole = np.concatenate([stored[key] for key in keys], 1)
    rows = np.concatenate([field.numpy() for field in batch[:5]], 1)
    return (rows[:, None] == whole[None]).all(-1).any(1)


def lengths(steps):
    """Lengths of the finished episodes of a list of steps."""
    ends = [i for i, s in enumerate(steps) if s.terminated or s.truncated]
    return np.diff([-1, *ends]).tolist()


# ---------------------------------------------------------------- what is stored


def rewards_as_trained_on(record, rewards):
    config = record.config
    if not config.normalize_reward:
        return rewards
    if config.env == GOAL and record.algorithm not in LINEAR:
        return rewards - 1.0
    if config.env != GOAL:
        returns, _ = wiring.episodes_of(record.arrays)
        rewards = rewards / (returns.max() - returns.min()) * 1000
    if record.algorithm in LINEAR:
        rewards = rewards * config.reward_scale + config.reward_bias
    return rewards


@pytest.mark.parametrize(
    "name, env",
    [*((n, LOCOMOTION) for n in ALL), *one_of_each_kind([(n, GOAL) for n in ALL])],
)
def test_the_online_buffer_stores_what_the_environment_did(name, env, recorded):
    record = recorded(name, env=env)
    steps, rows = record.of("step", role="train"), online_rows(record)
    assert len(steps) == len(rows["rewards"]) == record.config.online_iterations
    for key, raw in (
        ("observations", [s.state for s in steps]),
        ("next_observations", [s.next_state for s in steps]),
    ):
        np.testing.assert_allclose(rows[key], record.normalized(raw), atol=1e-4)
    np.testing.assert_array_equal(rows["actions"], [s.action for s in steps])
    rewards = rewards_as_trained_on(record, np.array([[s.reward] for s in steps]))
    np.testing.assert_allclose(rows["rewards"], rewards, rtol=1e-5, atol=1e-4)


@every_algorithm
def test_a_terminal_is_stored_as_one_and_a_time_out_as_zero(name, recorded):
    record = recorded(name)
    steps = record.of("step", role="train")
    kinds = {(s.terminated, s.truncated) for s in steps}
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}
    # Where both coincide the limit wins: nobody knows what would have followed.
    expected = [[s.terminated and not s.truncated] for s in steps]
    np.testing.assert_array_equal(online_rows(record)["terminals"], expected)


@pytest.mark.parametrize(
    "name, normalize",
    [*((n, True) for n in ALL), *one_of_each_kind([(n, False) for n in ALL])],
)
def test_the_offline_buffer_holds_the_dataset_as_trained_on(
    name, normalize, recorded, with_corl_files
):
    record = recorded(name) if normalize else with_corl_files(name)[0]
    assert record.config.normalize is normalize
    stored = {k: v[: wiring.ROWS] for k, v in record.stored("offline").items()}
    for key in ("observations", "next_observations"):
        raw = record.arrays[key]
        expected = record.normalized(raw) if record.config.normalize else raw
        np.testing.assert_allclose(stored[key], expected, atol=1e-5)
    rewards = rewards_as_trained_on(record, record.arrays["rewards"])
    np.testing.assert_allclose(stored["rewards"][:, 0], rewards, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(stored["actions"], record.arrays["actions"])
    np.testing.assert_array_equal(stored["terminals"][:, 0], record.arrays["terminals"])


@pytest.mark.parametrize(
    "name, fields", [("cal_ql", {}), ("dare_cal_ql", {}), ("cal_ql", COMPAT)]
)
def test_rows_collected_online_have_no_known_return(name, fields, recorded):
    record = recorded(name, **fields)
    known = online_rows(record)["mc_returns"]
    assert (known == (0.0 if fields else -np.inf)).all()
    # An episode of the dataset ends at a terminal, at a jump, or after the horizon.
    data, config = record.arrays, record.config
    rewards = rewards_as_trained_on(record, data["rewards"])
    returns, total, count = [0.0] * wiring.ROWS, 0.0, 0
    starts = [0]
    for i in range(wiring.ROWS - 1):
        jump = (data["next_observations"][i] != data["observations"][i + 1]).any()
        if jump or data["terminals"][i]:
            starts.append(i + 1)
    for i in reversed(range(wiring.ROWS)):
        total = rewards[i] + config.discount * total
        returns[i] = total
        total = 0.0 if i in starts else total
        count += 1
    stored = record.stored("offline")["mc_returns"][:, 0]
    np.testing.assert_allclose(stored, returns, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------- who acts, and when


@every_algorithm
def test_the_policy_explores_in_collection_and_not_in_evaluation(name, recorded):
    record = recorded(name)
    for step in record.of("step"):
        state = record.normalized(step.state)
        np.testing.assert_allclose(step.act.state, state, atol=1e-6)
        assert np.abs(step.action).max() <= wiring.MAX_ACTION
        if step.role == "eval" or name not in NOISY:
            np.testing.assert_array_equal(step.action, step.act.action)
        if step.role == "eval":
            assert not step.act.training
            np.testing.assert_array_equal(step.action, step.act.mean)
        else:
            assert step.act.training
            # The frozen policy of PEX acts with its mean.
            assert name == "pex" or (step.action != step.act.mean).all()


@every_algorithm
def test_the_networks_train_in_training_mode_before_and_after_evaluations(
    name, recorded
):
    record = recorded(name)
    first = record.events.index(record.of("step", role="eval")[0])
    updates = record.of("update")
    assert all(u.actor_training for u in updates)
    assert record.events.index(updates[-1]) > first


@pytest.mark.parametrize(
    "name",
    one_of_each_kind([n for n in (*IQL, *SPOT, "opt_td3") if n in BASELINES]),
)
@pytest.mark.parametrize("noise, bound", [(0.03, 0.5), (5.0, 0.1)])
def test_the_deterministic_policy_explores_with_bounded_noise(
    name, noise, bound, recorded
):
    fields = {"iql_deterministic": True, "expl_noise": noise, "noise_clip": bound}
    record = recorded(name, **fields)
    gaps = []
    for step in record.of("step", role="train"):
        assert np.abs(step.action).max() <= wiring.MAX_ACTION
        gaps += list(np.abs(step.action - step.act.mean))
    # In units of the largest action, as upstream.
    gaps = np.array(gaps) / wiring.MAX_ACTION
    assert gaps.max() <= bound + 1e-6
    if noise > bound:
        assert (np.abs(gaps - bound) < 1e-6).mean() > 0.5
    else:
        assert 0.3 * noise < np.sqrt(np.mean(gaps**2)) < 2 * noise
    for step in record.of("step", role="eval"):
        np.testing.assert_array_equal(step.action, step.act.mean)


@pytest.mark.parametrize("noise", [0.05, 0.3])
@pytest.mark.parametrize("name", [n for n in (*TD3, *REBRAC) if n in BASELINES])
def test_td3_explores_with_normal_noise_that_has_no_bound_but_the_actions(
    name, noise, recorded
):
    steps = recorded(
        name, expl_noise=noise, online_iterations=60, online_warmup=60, eval_freq=60
    ).of("step", role="train")
    actions = np.array([s.action for s in steps])
    gaps = (actions - np.array([s.act.mean for s in steps])) / wiring.MAX_ACTION
    inside = np.abs(actions) < wiring.MAX_ACTION  # the others are clipped
    assert 0.8 * noise < np.sqrt(np.mean(gaps[inside] ** 2)) < 1.2 * noise
    assert np.abs(gaps).max() > 2 * noise


@pytest.mark.parametrize("bc_online", ["keep", "drop", "anneal"])
@pytest.mark.parametrize("name", ["td3_bc"])
def test_the_behavior_cloning_term_changes_with_the_environment_steps(
    name, bc_online, recorded
):
    """Not with the updates, of which there are two a step and none in the warm-up."""
    record = recorded(name, bc_online=bc_online)
    weights = [u.bc_weight for u in record.of("update")]
    t = np.repeat(
        np.arange(3, 17), 2
    )  # environment steps made, from the end of the warm-up
    expected = {
        "keep": np.ones(28),
        "drop": np.zeros(28),
        "anneal": np.maximum(0.3, 1 - t / 10),
    }
    assert weights[:7] == [1.0] * 7
    np.testing.assert_allclose(weights[7:], expected[bc_online])
    logged = [u.logs["bc_weight"] for u in record.of("update")]
    np.testing.assert_allclose(logged, weights, rtol=1e-6)


@pytest.mark.parametrize("name", SPOT)
def test_the_support_constraint_is_cooled_with_the_environment_steps(name, recorded):
    """Not with the updates; DARE's weights take its place. The discount changes at the switch."""
    updates = recorded(name).of("update")
    t = np.repeat(np.arange(3, 17), 2)
    cooled = np.full(28, 0.7)
    if name not in DARE:
        cooled = 0.7 * np.maximum(0.4, 1 - t / 10)
    expected = [*np.full(7, 0.7), *cooled]
    np.testing.assert_allclose([u.lambd for u in updates], expected)
    np.testing.assert_allclose([u.logs["lambd"] for u in updates], expected, rtol=1e-6)
    assert [u.discount for u in updates] == [0.9] * 7 + [0.8] * 28


@pytest.mark.parametrize("name", NOISY)
def test_the_policy_of_td3_learns_in_every_second_update(name, recorded):
    """That of ReBRAC in the first, too."""
    learned = ["actor_loss" in u.logs for u in recorded(name).of("update")]
    assert learned == [i % 2 == int(name not in REBRAC) for i in range(35)]


@pytest.mark.parametrize("name", REBRAC)
def test_rows_carry_the_action_after_them(name, recorded):
    record = recorded(name)
    stored, rows = record.stored("offline"), record.arrays["actions"]
    np.testing.assert_array_equal(stored["next_actions"][:-1], rows[1:])
    # Online it is what the policy does in the next state, with its noise, before it learns.
    online = online_rows(record)
    assert (online["next_actions"] != 0).all()
    warmup = slice(0, record.config.online_warmup - 1)
    states, following = online["observations"][1:], online["next_observations"][:-1]
    same = (states == following).all(1)[warmup]
    gaps = np.abs(online["next_actions"][:-1] - online["actions"][1:])[warmup][same]
    assert len(gaps) and (gaps < 6 * 0.1 * wiring.MAX_ACTION).all() and (gaps > 0).all()


@every_algorithm
def test_updates_and_environment_steps_take_turns(name, recorded):
    record = recorded(name)
    config = record.config
    kinds = [
        e.kind
        for e in record.events
        if e.kind == "update" or (e.kind == "step" and e.role == "train")
    ]
    offline = ["update"] * config.offline_iterations
    warmup = ["step"] * config.online_warmup
    turns = config.online_iterations - config.online_warmup
    assert kinds == offline + warmup + ["step", "update", "update"] * turns
    # Those of the pre-training move no policy and count, too.
    more = 5 * (name in OPT)
    assert record.summary["updates"] == kinds.count("update") + more


@every_algorithm
def test_the_training_environment_is_seeded_once_by_seed(name, recorded):
    record = recorded(name)
    resets = record.of("reset", role="train")
    assert all(r.seed is None for r in resets)
    expected = wiring.first_states(record.config.seed, len(resets))
    np.testing.assert_array_equal([r.state for r in resets], expected)
    lengths_seen = lengths(record.of("step", role="train"))
    assert lengths_seen == [length for length, _ in wiring.SCRIPT[: len(lengths_seen)]]


# ---------------------------------------------------------------- evaluations


@pytest.mark.parametrize(
    "name, fields",
    [*((name, {}) for name in ALL), *((name, COMPAT) for name in CORLS)],
)
def test_every_evaluation_starts_from_the_evaluation_seed(name, fields, recorded):
    record = recorded(name, **fields)
    config = record.config
    # AWAC's and ReBRAC's upstream have a field of their own for that.
    own = "awac" in name or name in REBRAC
    seed = config.seed if fields and not own else config.eval_seed
    resets = record.of("reset", role="eval")
    rounds = (config.offline_iterations + config.online_iterations) // config.eval_freq
    assert [r.seed for r in resets] == [seed, None] * rounds
    states = np.array([r.state for r in resets]).reshape(rounds, 2, 2)
    assert (states == states[:1]).all()
    expected = wiring.first_states(seed, 2)
    np.testing.assert_allclose(states[0], expected)


def evaluation_returns(record):
    """Returns (evaluations, episodes) from the steps of the evaluation environment."""
    returns, total = [], 0.0
    for step in record.of("step", role="eval"):
        total += step.reward
        if step.terminated or step.truncated:
            returns.append(total)
            total = 0.0
    return np.array(returns).reshape(-1, record.config.n_episodes)


@every_algorithm
def test_evaluations_come_at_eval_freq_and_name_their_phase(name, recorded):
    record = recorded(name)
    rows = record.rows_of("evaluations.csv")
    expected = [(4, "offline"), (8, "online"), (12, "online"), (16, "online")]
    expected = [(*e, i) for e in [*expected, (20, "online")] for i in range(2)]
    assert [(int(r["step"]), r["phase"], int(r["episode"])) for r in rows] == expected
    returns = evaluation_returns(record)
    np.testing.assert_allclose([float(r["return"]) for r in rows], returns.ravel())
    scores = 100 * (returns + 4.0) / 9.0  # of the toy's reference returns -4 and 5
    np.testing.assert_allclose([float(r["score"]) for r in rows], scores.ravel())
    assert record.summary["score_offline"] == pytest.approx(scores[0].mean())
    assert record.summary["score_final"] == pytest.approx(scores[1:].mean())
    assert record.summary["score_last"] == pytest.approx(scores[-1].mean())


@every_algorithm
def test_an_evaluation_comes_after_the_updates_of_its_step(name, recorded):
    record = recorded(name)
    done, starts = 0, []
    for event in record.events:
        done += event.kind == "update"
        if event.kind == "reset" and event.role == "eval" and event.seed is not None:
            starts.append(done)
    # 7 offline updates; online steps 8 and 9 are the warm-up; then two a step.
    assert starts == [4, 7, 7 + 2 * 3, 7 + 2 * 7, 7 + 2 * 11]


@every_algorithm
def test_metrics_come_at_log_freq_and_with_evaluations(name, recorded):
    record = recorded(name)
    rows = record.rows_of("metrics.csv")
    steps = [3, 4, 6, 8, 9, 12, 15, 16, 18, 20, 21]
    assert [int(r["step"]) for r in rows] == steps
    assert [r["phase"] for r in rows] == [
        "offline" if s <= 7 else "online" for s in steps
    ]
    scored = [int(r["step"]) for r in rows if r["d4rl_normalized_score"]]
    assert scored == [4, 8, 12, 16, 20]
    means = 100 * (evaluation_returns(record).mean(1) + 4.0) / 9.0
    shown = [float(r["d4rl_normalized_score"]) for r in rows if int(r["step"]) in scored]
    np.testing.assert_allclose(shown, means)


@every_algorithm
def test_a_row_of_metrics_holds_the_last_update_and_the_last_episode(name, recorded):
    record = recorded(name)
    updates, steps = record.of("update"), record.of("step", role="train")
    for row in record.rows_of("metrics.csv"):
        step = int(row["step"])
        count = min(step, 7) + 2 * max(0, step - 9)
        if step not in WARMUP:
            for key, value in updates[count - 1].logs.items():
                assert float(row[key]) == pytest.approx(value, rel=1e-6), key
        seen, episode, last = steps[: max(0, step - 7)], [], None
        for s in seen:
            episode.append(s.reward)
            if s.terminated or s.truncated:
                last, episode = episode, []
        if last is None:
            assert row["train_return"] == row["train_length"] == ""
        else:
            assert float(row["train_return"]) == pytest.approx(sum(last))
            score = 100 * (sum(last) + 4.0) / 9.0
            assert float(row["train_score"]) == pytest.approx(score)
            assert float(row["train_length"]) == len(last)


def successes(steps):
    """1 per finished episode with a positive reward, else 0."""
    found, reached = [], False
    for step in steps:
        reached = reached or step.reward > 0
        if step.terminated or step.truncated:
            found.append(float(reached))
            reached = False
    return found


@pytest.mark.parametrize(
    "name, fields",
    one_of_each_kind([*((n, {}) for n in ALL), *((n, COMPAT) for n in CORLS)]),
)
def test_regret_counts_online_evaluations_or_as_upstream_training(
    name, fields, recorded
):
    record = recorded(name, **{"env": GOAL, **fields})
    scored = [r for r in record.rows_of("metrics.csv") if r["d4rl_normalized_score"]]
    assert scored[0]["phase"] == "offline" and scored[0]["regret"] == ""
    rates = np.reshape(successes(record.of("step", role="eval")), (-1, 2)).mean(1)
    for i, row in enumerate(scored[1:], start=1):
        assert float(row["success_rate"]) == rates[i]
        steps = record.of("step", role="train")[: int(row["step"]) - 7]
        counted = successes(steps) if fields else rates[1 : i + 1]
        regret = 1 - np.mean(counted) if len(counted) else np.nan
        # Blank where there is none yet.
        found = float(row["regret"] or "nan")
        assert found == pytest.approx(regret, nan_ok=True)
    assert recorded(name).rows_of("metrics.csv")[-2]["regret"] == ""


def ends_without_success(steps):
    """Numbers of the finished episodes that had a success, but none in the last step."""
    ends = [s.reward > 0 for s in steps if s.terminated or s.truncated]
    return [
        i
        for i, (a, b) in enumerate(zip(successes(steps), ends, strict=True))
        if a and not b
    ]


@one_of_a_kind
def test_the_toy_tells_success_of_training_and_evaluation_apart(name, recorded):
    """Else the test of the regret could not fail."""
    record = recorded(name, env=GOAL)
    found = np.mean(successes(record.of("step", role="train")))
    rates = np.reshape(successes(record.of("step", role="eval")), (-1, 2)).mean(1)
    assert len({found, np.mean(rates), np.mean(rates[1:])}) == 3
    assert len(set(rates[1:])) > 1
    lost = ends_without_success(record.of("step", role="train"))
    assert lost, "a success that is lost again before the end"


# ---------------------------------------------------------------- batches and the switch


# What batches of generated rows or of all rows hold: test_edis.py, test_cfdg.py, test_opt.py.
@pytest.mark.parametrize(
    "name", [n for n in ALL if n not in (*GENERATES, "opt_td3", "opt_spot")]
)
def test_batches_are_offline_alone_and_then_mixed(name, recorded):
    record = recorded(name)
    config, offline = record.config, record.stored("offline")
    offline = {key: rows[: wiring.ROWS] for key, rows in offline.items()}
    online = online_rows(record)
    collected = 0
    n_offline = config.batch_size // 4
    for event in record.events:
        collected += event.kind == "step" and event.role == "train"
        if event.kind != "update":
            continue
        assert all(len(field) == config.batch_size for field in event.batch)
        so_far = {key: rows[:collected] for key, rows in online.items()}
        here, there = is_row_of(event.batch, offline), is_row_of(event.batch, so_far)
        assert (here | there).all()
        if collected == 0:
            assert here.all()
        elif not single_buffer(record):
            assert here.sum() == n_offline
            if name not in DARE:
                assert here[:n_offline].all()
    assert record.of("update")[-1].batch is not record.of("update")[-2].batch
    if single_buffer(record):
        assert is_row_of(record.of("update")[-1].batch, online).any()
    last = [u.batch for u in record.of("update")[-10:]]
    seen = torch.cat([b[0][is_row_of(b, online)] for b in last])
    assert len(seen.unique(dim=0)) > 5, "always the same rows"


@pytest.mark.parametrize("fields", [{}, COMPAT])
def test_without_a_mixing_ratio_iql_has_one_buffer(fields, recorded):
    record = recorded("iql", mixing_ratio=None, **fields)
    assert single_buffer(record) and len(record.stored("online")["rewards"]) == 76
    later = [u for u in record.of("update")[7:]]
    online = online_rows(record)
    assert sum(is_row_of(u.batch, online).sum() for u in later) > 0


def test_no_two_batches_are_the_same_rows(recorded):
    for name in ALL:
        seen = [u.batch[0].numpy().tobytes() for u in recorded(name).of("update")]
        assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    "name, fields",
    [
        *((name, {}) for name in IQL),
        *[("iql", COMPAT), ("iql", {"actor_lr_online": None})],
    ],
)
def test_the_actors_rate_falls_as_a_cosine_and_is_constant_online(
    name, fields, recorded
):
    record = recorded(name, **fields)
    config, n = record.config, record.config.offline_iterations
    rates = [u.rate for u in record.of("update")]
    falling = config.actor_lr * (1 + np.cos(np.pi * np.arange(n) / n)) / 2
    np.testing.assert_allclose(rates[:n], falling, rtol=1e-6)
    if fields == COMPAT:
        again = config.actor_lr * (1 - np.cos(np.pi * np.arange(len(rates) - n) / n)) / 2
        np.testing.assert_allclose(rates[n:], again, atol=1e-9)
    else:
        assert set(rates[n:]) == {config.actor_lr_online or config.actor_lr}


@pytest.mark.parametrize(
    "name, fields",
    [
        *((n, {}) for n in CQL if not n.endswith(("cql_sa", "famo2o_cql"))),
        *(("cql", COMPAT), ("cal_ql", COMPAT)),
    ],
)
def test_the_conservative_weight_and_the_calibration_change_at_the_switch(
    name, fields, recorded
):
    record = recorded(name, **fields)
    config, updates = record.config, record.of("update")
    offline, online = updates[:7], updates[7:]
    assert {u.cql_alpha for u in offline} == {config.cql_alpha}
    assert {u.cql_alpha for u in online} == {config.cql_alpha_online}
    for u in updates:  # what was set is what the loss used
        expected = u.cql_alpha * u.logs["cql_qf1_diff"]
        assert u.logs["cql_min_qf1_loss"] == pytest.approx(expected, rel=1e-5)
    if name.endswith("cal_ql"):
        assert {u.calibrated for u in offline} == {True}
        assert {u.calibrated for u in online} == {False}


# ---------------------------------------------------------------- files


@every_algorithm
def test_checkpoints_are_written_after_every_evaluation_and_at_the_end(name, recorded):
    record = recorded(name)
    saved = [e.step for e in record.of("save", name="checkpoint.pt")]
    # After the phase of the VAE, of the filter or of the clone.
    before = [0] * (name in (*SPOT, "td3_bc_sa", "baq_cal_ql"))
    # At the end of every refresh, before the online steps 0 (EDIS alone), 6 and 12.
    refreshes = [7] * (name in EDIS) + [13, 19] * (name in GENERATES)
    # At the end of the pre-training, before the online step 2.
    pretrained = [9] * (name in OPT)
    assert saved == sorted([*before, 4, 8, 12, 16, 20, 23, *refreshes, *pretrained])
    assert record.parts()["step"] == 23
    assert {p.name for p in record.folder.iterdir()} >= {
        *("config.yaml", "metrics.csv", "evaluations.csv", "summary.json"),
    }


@one_of_a_kind
def test_corls_files_are_numbered_as_corl_counts(name, with_corl_files):
    record, folder = with_corl_files(name)
    found = {p.name for p in folder.iterdir()}
    assert found == {"checkpoint_3.pt", "checkpoint_7.pt", "checkpoint_11.pt"}
    saved = [e.name for e in record.of("save") if e.name != "checkpoint.pt"]
    assert saved == ["checkpoint_3.pt", "checkpoint_7.pt", "checkpoint_11.pt"]


@one_of_a_kind
def test_load_model_starts_from_the_weights_of_the_file(name, with_corl_files, recorded):
    """The first evaluation, in the warm-up, acts as the last one before the file."""
    before, folder = with_corl_files(name)
    count = wiring.SCRIPT[0][0] + wiring.SCRIPT[1][0]  # steps of the two episodes
    expected = [s.action for s in before.of("step", role="eval")[-count:]]
    fields = {"offline_iterations": 0, "online_iterations": 2, "eval_freq": 1}
    fields["normalize"] = False
    loaded = recorded(name, load_model=str(folder / "checkpoint_11.pt"), **fields)
    found = [s.action for s in loaded.of("step", role="eval")[:count]]
    np.testing.assert_array_equal(found, expected)
    untrained = [s.action for s in before.of("step", role="eval")[:count]]
    assert (np.array(untrained) != expected).any()


# ---------------------------------------------------------------- stop and resume


def stop_after(count, kind, **fields):
    """Ask to stop at the nth event of a kind."""
    return lambda record, event: len(record.of(kind, **fields)) == count


def without_losses(row):
    """A warm-up step has no update, so what a row shows as losses there is left open."""
    if int(row["step"]) not in WARMUP:
        return row
    common = "step phase d4rl_normalized_score train_return train_length regret".split()
    return {key: row[key] for key in common}


@one_of_a_kind
def test_stopped_again_and_again_it_ends_as_the_unbroken_run(name, tmp_path, recorded):
    """In the offline phase, in the energy's training, in the warm-up, between two updates."""
    env = LOCOMOTION if name in NO_ANTMAZE else GOAL
    whole = recorded(name, env=env)
    stops = [
        stop_after(5, "update"),
        *([stop_after(2, "energy")] if name in DARE else []),
        # In the fit of the diffusion model, and among the rows that are made.
        *([stop_after(2, "piece"), stop_after(3, "piece")] if name in GENERATES else []),
        stop_after(1, "step", role="train"),
        stop_after(5, "update"),
    ]
    resume = None
    for stop in [*stops, None]:
        with pytest.MonkeyPatch.context() as patch:
            part = wiring.run(patch, name, tmp_path, stop, env=env, resume=resume)
        resume = str(part.folder)
        if stop is not None:
            assert part.summary == {}
            assert part._stop is None, "it was never asked to stop"
            collected = part.of("step", role="train") or part.of("piece")
            assert collected or len(part.of("energy")) in (0, 2), "went on for longer"
    assert_equal(whole.parts(), part.parts())
    assert whole.rows_of("evaluations.csv") == part.rows_of("evaluations.csv")
    rows = [list(map(without_losses, r.rows_of("metrics.csv"))) for r in (whole, part)]
    assert rows[0] == rows[1]
    assert part.summary["score_final"] == whole.summary["score_final"]
    assert part.summary["updates"] == whole.summary["updates"]


@one_of_a_kind
def test_what_only_the_online_phase_reads_changes_nothing_offline(name, recorded):
    """So runs that differ in nothing else can share an offline model."""
    config = recorded(name).config
    other = {
        "online_iterations": 0,
        "online_warmup": 3,
        "utd": 1,
        "actor_lr_online": 5e-4,
        "expl_noise": 0.1,
        "noise_clip": 0.3,
        "cql_alpha_online": 1.0,
        "max_target_backup_online": True,
        "zero_gradient_steps": True,
        "random_steps": 3,
        "mixing_ratio": 0.5,
        "bc_online": "keep" if name in DARE else "drop",
        "critic_bc_online": "keep",
        "bc_end": 0.1,
        "bc_anneal_steps": 7,
        "lambd_cool": False,
        "lambd_end": 0.9,
        "lambd_cool_steps": 3,
        "online_discount": 0.5,
        "policy_std": 0.3,
        "sampling": config.CHOICES["sampling"][-1],
        "sampling_temperature": 3.0,
        "sampling_refresh": 5,
        "sampling_unit": "transition",
        "eval_switch": 2,
        "eval_early": "1,2",
        "inv_temperature": 0.5,
        "eval_epsilon": 0.9,
        "clip_actions": False,
        "buffer_mode": "half",
        "beta_anneal": "none",
        "beta_anneal_steps": 4,
        "part_rows": "trusted",
        "part_trajectories": 2,
        "online_trust": "all",
        "policy_freq_online": 3,
        "target_rule": "mean",
        "uncertainty_temperature": 1.0,
        "uncertainty_by": "row",
        "exploration": "policy",
        "ucb_lambda": 1.0,
        "dare": {"cap": 1},
        "edis": {"samples": 11},
        "baq": {"median_weight": 0.5},
        "cfdg": {"samples": 11},
        "pretrain_updates": 2,
        "inner_lr": 0.1,
        "weigh_outer": False,
        "kappa_start": 0.9,
        "kappa_end": 0.1,
        "kappa_steps": 4,
        "replay": "uniform",
        "density_lr": 0.1,
        "density_temperature": 2.0,
        "priority_capacity": 80,
    }
    unread = config.ONLINE - {"load_model"}
    assert unread <= other.keys()
    assert {"online_iterations", "online_warmup", "utd", "load_model"} <= config.ONLINE
    mine = {k: other[k] for k in unread}
    changed = recorded(name, **mine)
    offline = [[u.logs for u in r.of("update")[:7]] for r in (recorded(name), changed)]
    assert offline[0] == offline[1]
    scores = [r.summary["score_offline"] for r in (recorded(name), changed)]
    assert scores[0] == scores[1]
