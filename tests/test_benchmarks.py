"""What the speed benchmarks compute from their measurements."""

import numpy as np
import pytest

from benchmarks import decision_agreement, memory, update_speed
from corl import tasks


def decision(scores, moved):
    return np.array(scores, float), np.array(moved, bool), 0.002


def test_agreement_is_the_jaccard_index_of_the_exchanged_rows():
    paper = [decision([1, 2, 3, 4], [1, 1, 0, 0]), decision([1, 2, 3, 4], [0, 0, 0, 0])]
    ours = [decision([2, 4, 6, 8], [0, 1, 1, 0]), decision([4, 3, 2, 1], [0, 0, 0, 0])]
    same = decision_agreement.compare(paper, paper)
    assert same["agreement"] == same["correlation"] == 1.0
    found = decision_agreement.compare(ours, paper)
    assert found["agreement"] == pytest.approx((1 / 3 + 1) / 2)  # none and none agree
    assert found["correlation"] == pytest.approx((1 - 1) / 2)  # of ranks
    assert found["exchanged"] == 0.5  # one pair in the first batch, none in the second
    assert found["milliseconds"] == pytest.approx(2.0)


def test_chance_is_what_sets_drawn_by_lot_agree():
    rng = np.random.default_rng(0)
    ours, paper = (
        [decision(rng.random(256), rng.permutation(256) < count) for _ in range(400)]
        for count in (60, 100)
    )
    found = decision_agreement.compare(ours, paper)
    assert found["agreement"] == pytest.approx(found["chance"], abs=0.01)
    assert abs(found["correlation"]) < 0.02


def test_memory_growth_leaves_out_the_rows_that_came_in():
    task = tasks.task(memory.TASK)
    row = 4 * (2 * task.state_dim + task.action_dim + 2) / 1e6
    steady = {step: 300.0 + row * step for step in range(500, 50_001, 500)}
    assert memory.growth(steady) == pytest.approx(0.0, abs=1e-6)
    leaking = {step: value + 1e-3 * step for step, value in steady.items()}
    assert memory.growth(leaking) == pytest.approx(40.0, abs=1e-6)


def test_speed_ratios_are_to_the_first_variant():
    lines = update_speed.table({"base": [1.0, 2.0, 9.0], "twice": [4.0, 4.0, 5.0]})
    assert lines.splitlines()[1].split()[-1] == "1.00"
    assert lines.splitlines()[2].split()[-1] == "2.00"


def test_every_algorithm_with_a_twin_has_rows_in_the_speed_table():
    """And what is measured of it names both files."""
    twins = sorted(p.stem for p in update_speed.ROOT.glob("algorithms/dare_*.py"))
    for name in (twin.removeprefix("dare_") for twin in twins):
        variants = update_speed.variants_of(name)
        title = update_speed.SUBJECTS[name].title
        assert variants[title] == (None, False)
        assert variants[f"{title}, compiled"] == (None, True)
        assert any(shown.startswith(f"DARE-{title}, ") for shown in variants)
