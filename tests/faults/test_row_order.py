"""Rows whose order contradicts their stored next states: used as they are, or refused."""

import h5py
import harness
import numpy as np
import pytest

from algorithms import cal_ql, cql, dare_iql, iql
from corl import files, tasks
from corl.data import card, row_order, schema, sources
from corl.training_data import load_data

pytestmark = pytest.mark.fault("bad inputs")
TASK = tasks.task("hopper-medium-v2")
ROWS, LENGTH = 2000, harness.EPISODE


def rows_in_order(rows=ROWS, seed=0):
    """Good rows whose episodes do not go on at the next one: a reset jumps."""
    raw = harness.good_rows(rows, seed)
    rng = np.random.default_rng(seed)
    ends = np.flatnonzero(raw["terminals"] | raw["timeouts"])
    for end in ends[:-1]:
        raw["observations"][end + 1 :] += rng.normal(5, 1, harness.STATES)
        raw["next_observations"][end + 1 :] = np.append(
            raw["observations"][end + 2 :], raw["next_observations"][-1:], 0
        )
    step = rng.normal(size=(len(ends), harness.STATES)) / 10
    raw["next_observations"][ends] = raw["observations"][ends] + step
    return {key: values.copy() for key, values in raw.items()}


def permuted(raw, seed=1):
    order = np.random.default_rng(seed).permutation(len(raw["rewards"]))
    return {key: values[order] for key, values in raw.items()}


def without_time_outs(raw):
    return {**raw, "timeouts": np.zeros_like(raw["timeouts"])}


def without_key(raw, key="timeouts"):
    return {k: v for k, v in raw.items() if k != key}


def interleaved(raw):
    """As collectors with several environments write rows: one of each in turn."""
    order = np.arange(len(raw["rewards"])).reshape(2, -1).T.ravel()
    return {key: values[order] for key, values in raw.items()}


def changed(key, change):
    return lambda raw: {**raw, key: change(raw[key])}


def resolve(tmp_path, raw, name="rows.hdf5"):
    path = harness.write_dataset(tmp_path / name, raw)
    return sources.resolve(TASK, path=path)


def assert_pairs_are_stored_ones(found, raw):
    """Every row of the result has the next state that the file stores for that state."""
    stored = {
        s.tobytes(): n
        for s, n in zip(raw["observations"], raw["next_observations"], strict=True)
    }
    assert len(found["rewards"]) == len(raw["rewards"])
    for state, following in zip(
        found["observations"], found["next_observations"], strict=True
    ):
        np.testing.assert_allclose(following, stored[state.tobytes()], atol=1e-4)


# ---------------------------------------------------------------- in order


def test_rows_in_order_are_read_by_d4rls_rule_to_the_bit(tmp_path):
    raw = rows_in_order()
    found = resolve(tmp_path, raw)
    assert (found.provenance["order"], found.provenance["seams"]) == ("in order", 0)
    expected = schema.qlearning_dataset(without_key(raw, "next_observations"))
    for key, values in expected.items():
        np.testing.assert_array_equal(found.arrays[key], values)
    unknown = resolve(tmp_path, without_key(raw, "next_observations"), "other.hdf5")
    assert unknown.provenance["order"] == "unknown"
    for key, values in expected.items():
        np.testing.assert_array_equal(unknown.arrays[key], values)


@pytest.mark.parametrize("kind", [np.float64, np.float16])
def test_rounding_is_no_seam(kind, tmp_path):
    raw = rows_in_order()
    raw["observations"] = raw["observations"].astype(kind)
    if kind is np.float16:
        raw["next_observations"] = raw["next_observations"].astype(kind)
    assert resolve(tmp_path, raw).provenance["seams"] == 0


def test_d4rls_own_bytes_are_read_by_its_rule_whatever_they_hold(tmp_path, monkeypatch):
    raw = permuted(rows_in_order())
    path = harness.write_dataset(tmp_path / "x.hdf5", raw)
    known = f"hopper\nmedium 99 {files.sha256(path)}\n"
    monkeypatch.setattr(sources.published, "CHECKSUMS", known)
    found = sources.resolve(TASK, path=path)
    expected = schema.qlearning_dataset(raw)
    for key, values in expected.items():
        np.testing.assert_array_equal(found.arrays[key], values)
    assert "order     D4RL's; " in card.card(found)


# ---------------------------------------------------------------- cut without a flag

CUT = {
    "no time-out is flagged": without_time_outs,
    "no time-outs at all": without_key,
    "in float64": lambda raw: without_time_outs(
        {k: v.astype(np.float64) if v.dtype != bool else v for k, v in raw.items()}
    ),
}


@pytest.mark.parametrize("spoil", CUT.values(), ids=CUT)
def test_cut_episodes_end_at_their_seams(spoil, tmp_path, capsys):
    raw = rows_in_order()
    whole = schema.episode_returns(raw, TASK)
    found = resolve(tmp_path, spoil(raw))
    seams = int(raw["timeouts"][:-1].sum())
    assert (found.provenance["order"], found.provenance["seams"]) == ("cut", seams)
    # The last row has no row after it, so without its flag its episode is unfinished.
    np.testing.assert_allclose(found.returns, whole[: len(found.returns)], rtol=1e-6)
    assert len(found.returns) == ROWS // LENGTH - 1
    assert_pairs_are_stored_ones(found.arrays, raw)
    assert f"cut without a flag at {seams} row(s)" in capsys.readouterr().out
    text = card.card(found)
    assert f"order     cut; {seams} row(s)" in text and "warning   episodes" in text


def test_returns_to_go_stop_at_the_seams(tmp_path):
    raw = rows_in_order()
    path = harness.write_dataset(tmp_path / "x.hdf5", without_time_outs(raw))
    config = cal_ql.TrainConfig(
        env=TASK.name, dataset_path=str(path), normalize=False, discount=1.0
    )
    found = load_data(config, TASK).arrays["mc_returns"]
    totals = raw["rewards"].reshape(-1, LENGTH).astype(np.float64)
    expected = totals[:, ::-1].cumsum(1)[:, ::-1].ravel()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_export_of_cut_episodes_has_their_flags(tmp_path):
    raw = rows_in_order()
    found = resolve(tmp_path, without_time_outs(raw))
    card.export(found, "d4rl", str(tmp_path / "out.hdf5"))
    with h5py.File(tmp_path / "out.hdf5") as file:
        np.testing.assert_array_equal(file["timeouts"][:-1], raw["timeouts"][:-1])


# ---------------------------------------------------------------- shuffled

SHUFFLED = {
    "permuted": permuted,
    "permuted without flags": lambda raw: permuted(without_time_outs(raw)),
    "permuted without the key": lambda raw: permuted(without_key(raw)),
    "two environments in turn": interleaved,
}


@pytest.mark.parametrize("spoil", SHUFFLED.values(), ids=SHUFFLED)
def test_shuffled_rows_keep_their_stored_next_states(spoil, tmp_path, capsys):
    raw = spoil(rows_in_order())
    found = resolve(tmp_path, raw)
    assert found.provenance["order"] == "shuffled" and found.shuffled
    assert_pairs_are_stored_ones(found.arrays, raw)
    assert not len(found.returns) and found.statistics["episodes"] == 0
    assert "the rows are shuffled" in capsys.readouterr().out
    assert "no complete episode" in card.card(found)
    with pytest.raises(ValueError, match="the rows are shuffled"):
        card.export(found, "d4rl", str(tmp_path / "out.hdf5"))


NEEDS_EPISODES = {
    "cal_ql": (cal_ql, {}, "returns-to-go"),
    "iql scaled": (iql, {"normalize_reward": True}, "normalize_reward"),
    "cql scaled": (cql, {"normalize_reward": True}, "normalize_reward"),
    "iql scaled, compat": (
        iql,
        {"normalize_reward": True, "compat": True},
        "normalize_reward",
    ),
    "energy": (
        dare_iql,
        {
            "dare.behavior_updates": 1,
            "dare.behavior_width": 0.05,
            "dare.behavior_batch_size": 8,
            "dare.q_scale": "returns",
        },
        "scale of returns",
    ),
}


@pytest.mark.parametrize(
    "module, fields, what", NEEDS_EPISODES.values(), ids=NEEDS_EPISODES
)
def test_what_needs_episodes_refuses_shuffled_rows(module, fields, what, tmp_path):
    path = harness.write_dataset(tmp_path / "rows.hdf5", permuted(rows_in_order()))
    flags = harness.short_run(tmp_path, path, buffer_size=4000, **fields)
    outcome = harness.run(harness.algorithm(module), *flags)
    harness.assert_refused(outcome, r"rows\.hdf5", "shuffled", what, "give a file")


def test_iql_goes_on_with_shuffled_rows(tmp_path):
    path = harness.write_dataset(tmp_path / "rows.hdf5", permuted(rows_in_order()))
    flags = harness.short_run(tmp_path, path, buffer_size=4000)
    outcome = harness.run(harness.algorithm(iql), *flags)
    assert outcome.status == 0, outcome
    assert outcome.out.count("the rows are shuffled") == 1


# ---------------------------------------------------------------- neither


def shift(rows):
    return lambda values: np.roll(values, rows, 0)


FALSE = {
    "zeros": changed("next_observations", np.zeros_like),
    "the state itself": lambda raw: {**raw, "next_observations": raw["observations"]},
    "one row late": changed("next_observations", shift(1)),
    "two rows late": changed("next_observations", shift(2)),
    "one row early": changed("next_observations", shift(-1)),
    "standardized": changed("next_observations", lambda v: (v - v.mean(0)) / v.std(0)),
    "permuted alone": lambda raw: {
        **raw,
        "next_observations": permuted(raw)["next_observations"],
    },
    "states permuted alone": lambda raw: {
        **raw,
        "observations": permuted(raw)["observations"],
    },
}


@pytest.mark.parametrize("spoil", FALSE.values(), ids=FALSE)
def test_next_states_that_are_none_are_refused_with_counts(spoil, tmp_path):
    path = harness.write_dataset(tmp_path / "rows.hdf5", spoil(rows_in_order()))
    flags = harness.short_run(tmp_path, path, buffer_size=4000)
    outcome = harness.run(harness.algorithm(iql), *flags)
    says = (r"rows\.hdf5", "next_observations", r"\d+ row\(s\)", "mend|remove")
    harness.assert_refused(outcome, *says)
    outcome = harness.run(main_of_card, TASK.name, "--path", path)
    harness.assert_refused(outcome, *says)


def main_of_card(argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["card", *argv])
        card.main()


# ---------------------------------------------------------------- too long


@pytest.mark.parametrize("length, episodes", [(1001, 1), (2007, 1), (3000, 2)])
def test_the_card_warns_of_episodes_beyond_the_time_limit(
    length, episodes, tmp_path, capsys
):
    raw = without_key(harness.good_rows(length * episodes), "next_observations")
    ends = np.arange(1, length * episodes + 1) % length == 0
    raw |= {"timeouts": ends, "terminals": np.zeros_like(ends)}
    found = resolve(tmp_path, raw)
    warning = f"{episodes} episode(s) are longer than the time limit of 1000"
    assert f"warning   {warning}" in card.card(found)
    assert warning in capsys.readouterr().out


def test_an_unfinished_last_episode_beyond_the_limit_is_warned_of(tmp_path):
    raw = without_key(harness.good_rows(1500), "next_observations")
    none = np.zeros(1500, bool)
    found = resolve(tmp_path, {**raw, "timeouts": none, "terminals": none})
    assert "1 episode(s) are longer" in card.card(found)


def test_episodes_of_the_limit_are_not_warned_of(tmp_path):
    raw = without_key(harness.good_rows(2000), "next_observations")
    ends = np.arange(1, 2001) % 1000 == 0
    raw |= {"timeouts": ends, "terminals": np.zeros_like(ends)}
    assert "warning" not in card.card(resolve(tmp_path, raw))


def test_a_line_of_the_card_for_every_kind_of_order():
    for kind in ("unknown", "in order", "cut", "shuffled", "D4RL's"):
        text = row_order.RowOrder(kind, 3 if kind[0] in "csD" else 0).describe()
        assert text and "\n" not in text
