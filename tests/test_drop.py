"""The drop at the switch: cases computed by hand, and the evaluations that it is made of."""

import csv
import json

import numpy as np
import pytest
from helpers import assert_equal
from short_runs import checkpoint_of, folder_of, run, stop_after

from algorithms import iql, td3_bc
from corl import curves
from corl.drop import Drop, drop_at_the_switch, drop_of, score_before

pytestmark = pytest.mark.narrow(16)
STEPS = [1000, 2000, 5000, 10000, 15000, 20000]


@pytest.mark.parametrize(
    "before, scores, expected",
    [
        # Means of three: 40, 30, 50, 70. It is back with the last of them.
        (60.0, [60, 40, 20, 30, 100, 80], (60, 30, 10000, 20000)),
        # Means 80, 70, 60, 50: at 80 with the first, and the collapse comes later.
        (80.0, [80, 80, 80, 50, 50, 50], (80, 30, 20000, 5000)),
        # Never back: censored.
        (90.0, [60, 30, 30, 60, 90, 90], (90, 50, 5000, None)),
        # It only rises: the drop is below 0.
        (10.0, [20, 30, 40, 50, 60, 70], (10, -20, 5000, 5000)),
        # Of equal depths the first; exactly at the score before is back.
        (50.0, [40, 40, 40, 40, 40, 70], (50, 10, 5000, 20000)),
        # One good evaluation among bad ones is no recovery.
        (70.0, [10, 10, 190, 10, 10, 10], (70, 60, 20000, 5000)),
    ],
)
def test_depth_and_recovery_by_hand(before, scores, expected):
    found = drop_at_the_switch(before, STEPS, scores)
    assert found == Drop(*expected, budget=20000)
    assert found.censored_recovery == (expected[3] or 20000)


def test_too_few_evaluations_or_an_unknown_start_give_no_drop():
    assert drop_at_the_switch(50.0, STEPS[:2], [1, 2]) is None
    assert drop_at_the_switch(None, STEPS, range(6)) is None
    assert drop_at_the_switch(50.0, STEPS[:3], [1, 2, 3]) == Drop(
        50, 48, 5000, None, 5000
    )


def test_a_mean_of_equal_scores_is_not_rounded_below_them():
    for score in np.random.default_rng(0).uniform(0, 100, 200):
        assert drop_at_the_switch(score, STEPS[:3], [score] * 3).depth == pytest.approx(
            0
        )
    assert drop_at_the_switch(80.0, STEPS[:3], [80.0] * 3).recovery == 5000


def test_the_score_before_is_that_at_the_switch_or_the_last_offline_one():
    rows = [[5, "offline", 10.0], [10, "offline", 20.0], [20, "online", 90.0]]
    assert score_before(rows) == 20.0 and score_before(rows[2:]) is None
    assert score_before([*rows, [10, "switch", 25.0]]) == 25.0
    online = [[10 + step, "online", 30.0] for step in (1, 2, 3)]
    assert drop_of([*rows[:2], *online], 10) == Drop(20, -10, 3, 3, 3)


# ---------------------------------------------------------------- in a run

SHORT = {
    "offline_iterations": 10,
    "online_iterations": 20,
    "eval_freq": 10,
    "n_episodes": 2,
    "log_freq": 5,
    "batch_size": 16,
}
MORE = {"eval_switch": 5, "eval_early": "2,4"}


def evaluations(folder):
    """(step, phase) -> scores, in the order of the file."""
    found = {}
    with open(folder_of(folder) / "evaluations.csv", newline="") as file:
        for row in csv.DictReader(file):
            key = int(row["step"]), row["phase"]
            found.setdefault(key, []).append(float(row["score"]))
    return found


def test_more_evaluations_change_no_number_of_the_training(tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("plain", "more", "resumed")]
    for folder in folders:
        folder.mkdir()
    run(td3_bc, folders[0], monkeypatch, **SHORT)
    summary = run(td3_bc, folders[1], monkeypatch, **SHORT, **MORE)
    with monkeypatch.context() as patch:
        stop_after(14, patch)
        run(td3_bc, folders[2], patch, **SHORT, **MORE)
    resumed = str(folder_of(folders[2]))
    run(td3_bc, folders[2], monkeypatch, resume=resumed, **SHORT, **MORE)
    plain, more, again = (evaluations(folder) for folder in folders)
    assert list(plain) == [(10, "offline"), (20, "online"), (30, "online")]
    online = [(step, "online") for step in (12, 14, 20, 30)]
    assert list(more) == [(10, "offline"), (10, "switch"), *online]
    assert [len(scores) for scores in more.values()] == [2, 5, 2, 2, 2, 2]
    assert again == more  # once, however often it is resumed
    assert {k: more[k] for k in plain} == plain
    # The same policy, the same first start states.
    assert more[10, "switch"][:2] == more[10, "offline"]
    states = [checkpoint_of(folder)["parts"] for folder in folders]
    assert_equal(states[1]["trainer"], states[0]["trainer"])
    assert_equal(states[2], states[1])
    # The summary has what the function finds in the file.
    means = [np.mean(more[key]) for key in online]
    before = np.mean(more[10, "switch"])
    expected = drop_at_the_switch(before, [2, 4, 10, 20], means)._asdict()
    assert summary["drop"] == pytest.approx(expected)
    stored = json.loads((folder_of(folders[1]) / "summary.json").read_text())
    assert stored["drop"] == summary["drop"]
    with open(folder_of(folders[1]) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "online"]
    scores = [float(row["train_score"]) for row in rows if row["train_score"]]
    assert len(scores) == 4  # rows at 12 and 14 come before the first episode ends
    assert summary["score_training"] == pytest.approx(np.mean(scores))


@pytest.mark.parametrize("text", ["1000,x", "0", "-5", "1.5", "1e3", ",,a"])
def test_early_evaluations_must_be_steps(text):
    with pytest.raises(ValueError, match="eval_early must be online steps like"):
        iql.TrainConfig(env="hopper-medium-v2", eval_early=text)


def test_early_evaluations_are_read():
    config = iql.TrainConfig(env="hopper-medium-v2", eval_early=" 1000, 2000")
    assert config.early_evaluations() == (1000, 2000)
    assert iql.TrainConfig(env="hopper-medium-v2").early_evaluations() == ()


class Axis:
    """Keeps what is drawn on it."""

    def __init__(self):
        self.lines, self.texts = [], []

    def plot(self, x, y, *marks, **options):
        self.lines.append((np.atleast_1d(x).tolist(), np.atleast_1d(y).tolist(), marks))

    def text(self, x, y, text, **options):
        self.texts.append((x, y, text.strip()))


def columns(before, scores):
    rows = [(100, "offline", before - 5), (100, "switch", before)]
    rows += [(100 + step, "online", s) for step, s in zip(STEPS, scores, strict=False)]
    # Two episodes around the mean.
    rows = [(t, phase, s + d) for t, phase, s in rows for d in (-1, 1)]
    names = ("step", "phase", "score")
    return {n: [str(row[i]) for row in rows] for i, n in enumerate(names)}


def test_the_picture_marks_depth_and_recovery():
    axis = Axis()
    curves._draw_drop(axis, columns(60.0, [60, 40, 20, 30, 100, 80]), 100)
    assert axis.lines == [
        ([100, 20100], [60, 60], ()),
        ([10100, 10100], [60, 30], ()),
        ([10100], [30], ("v",)),
        ([20100], [60], ("^",)),
    ]
    assert axis.texts == [(10100, 30, "−30.0")]
    axis = Axis()
    curves._draw_drop(axis, columns(90.0, [60, 30, 30, 60, 90, 90]), 100)
    assert [marks for *_, marks in axis.lines] == [(), (), ("v",)]
    axis = Axis()
    curves._draw_drop(axis, columns(50.0, [1, 2]), 100)
    assert axis.lines == []
