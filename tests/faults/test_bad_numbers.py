"""Numbers in a dataset that nothing can be learned from are refused by file and key."""

import importlib

import numpy as np
import pytest
from harness import (
    EPISODE,
    FAST_DARE,
    algorithm,
    assert_refused,
    good_rows,
    run,
    short_run,
    write_dataset,
)

from corl.data import card

pytestmark = pytest.mark.fault("bad inputs")

ROWS = 200
whole = pytest.mark.whole
PLACES = {"first": 0, "middle": ROWS // 2, "last": ROWS - 1}
VALUES = ("nan", "inf", "-inf", "1e30", "-1e30", "1e300")
KEYS = ("observations", "actions", "rewards", "next_observations")
FLAGS = ("terminals", "timeouts")
CELLS = [
    *((key, value, place) for key in KEYS for value in VALUES for place in PLACES),
    *((key, value, "middle") for key in FLAGS for value in ("nan", "inf", "0.5", "-1")),
]
FAST = {
    ("rewards", "1e30", "middle"),
    ("rewards", "nan", "last"),
    ("rewards", "-inf", "first"),
    ("observations", "1e30", "last"),
    ("observations", "nan", "first"),
    ("next_observations", "inf", "middle"),
    ("actions", "nan", "middle"),
    ("terminals", "nan", "middle"),
}


def arrays_with(key, value, place):
    """Rows of a dataset in float64, with one bad number."""
    arrays = {k: v.astype(np.float64) for k, v in good_rows(ROWS).items()}
    row = arrays[key][PLACES[place] : PLACES[place] + 1]
    row.reshape(-1)[-1] = float(value)
    return arrays


def train(folder, dataset, name="iql", **fields):
    """How a short run on a dataset ends."""
    module = importlib.import_module(f"algorithms.{name}")
    return run(algorithm(module), *short_run(folder, dataset, **fields))


@pytest.mark.parametrize(
    "key, value, place",
    [pytest.param(*c, marks=() if c in FAST else whole) for c in CELLS],
)
def test_a_bad_number_is_named(key, value, place, tmp_path):
    path = write_dataset(tmp_path / "bad.hdf5", arrays_with(key, value, place))
    outcome = train(tmp_path, path)
    shown = str(float(value)).replace("+", r"\+")
    assert_refused(outcome, "bad.hdf5", key, shown, f"row {PLACES[place]}")
    assert "step" not in outcome.err


@whole
@pytest.mark.parametrize("key", ["observations", "rewards", "next_observations"])
def test_the_card_of_such_a_file_is_refused_too(key, tmp_path, monkeypatch):
    path = write_dataset(tmp_path / "bad.hdf5", arrays_with(key, "1e30", "middle"))
    words = ["card", "hopper-medium-v2", "--path", str(path)]
    monkeypatch.setattr("sys.argv", words)
    outcome = run(lambda argv: card.main())
    assert_refused(outcome, "bad.hdf5", key, r"1e\+30")


def with_rewards(rewards):
    """Rows whose rewards are these, and whose episodes all end by a fall."""
    arrays = good_rows(ROWS)
    arrays["rewards"] = np.broadcast_to(rewards, ROWS).astype(np.float32)
    arrays["terminals"] = np.arange(1, ROWS + 1) % EPISODE == 0
    arrays["timeouts"] = np.zeros(ROWS, bool)
    return arrays


@pytest.mark.parametrize(
    "name",
    ["iql", "cql", *(pytest.param(n, marks=whole) for n in ("cal_ql", "dare_iql"))],
)
@pytest.mark.parametrize("reward", [0.0, 1.0, pytest.param(-2.5, marks=whole)])
def test_equal_returns_cannot_be_normalized(name, reward, tmp_path):
    path = write_dataset(tmp_path / "equal.hdf5", with_rewards(reward))
    fields = {"normalize_reward": True, **(FAST_DARE if "dare" in name else {})}
    outcome = train(tmp_path, path, name, **fields)
    assert_refused(
        outcome, "equal.hdf5", "normalize_reward", f"{EPISODE * reward:g}", "false"
    )


def test_rewards_that_normalization_makes_too_large_are_refused(tmp_path):
    rewards = np.zeros(ROWS)
    # Large rewards that cancel each other, and returns that differ by little.
    rewards[:2] = 1e18, -1e18
    rewards[EPISODE - 1 :: EPISODE] = np.arange(ROWS // EPISODE) / 1000
    path = write_dataset(tmp_path / "narrow.hdf5", with_rewards(rewards))
    outcome = train(tmp_path, path, normalize_reward=True)
    assert_refused(outcome, "narrow.hdf5", "rewards", "normalize_reward", "squared")


@pytest.mark.parametrize("name", ["cal_ql", pytest.param("dare_cal_ql", marks=whole)])
def test_returns_to_go_that_are_too_large_are_refused(name, tmp_path):
    path = write_dataset(tmp_path / "large.hdf5", with_rewards(1e19))
    fields = FAST_DARE if "dare" in name else {}
    outcome = train(tmp_path, path, name, **fields)
    assert_refused(outcome, "large.hdf5", "rewards", "returns-to-go", "squared")


@pytest.mark.parametrize("shape", ["one column", pytest.param("all", marks=whole)])
def test_states_that_cannot_be_normalized_are_refused(shape, tmp_path):
    """Each has a square in float32, but their sum has none: every state would become 0."""
    arrays = good_rows(ROWS)
    for key in ("observations", "next_observations"):
        columns = slice(2, 3) if shape == "one column" else slice(None)
        arrays[key][:, columns] = 1.5e19 * np.sign(arrays[key][:, columns])
    path = write_dataset(tmp_path / "wide.hdf5", arrays)
    outcome = train(tmp_path, path)
    assert_refused(outcome, "wide.hdf5", "observations", "standard deviation", "inf")


@pytest.mark.parametrize("value", [1.5e19, pytest.param(-1.5e19, marks=whole)])
def test_large_values_without_normalization_end_by_a_metric(value, tmp_path):
    arrays = good_rows(ROWS)
    arrays["rewards"][:] = value
    path = write_dataset(tmp_path / "large.hdf5", arrays)
    outcome = train(tmp_path, path, online_iterations=0)
    assert_refused(
        outcome, "offline step 5:", "(loss|weight|optimizer)", "large a scale"
    )
