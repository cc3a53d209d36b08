"""What the speed benchmarks compute from their measurements."""

import numpy as np
import pytest

from benchmarks import (
    decision_agreement,
    environment_speed,
    memory,
    update_speed,
    whole_run,
)
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


def whole(wall, rate, compile=True, threads=1):
    return {
        "wall_seconds": wall,
        "updates": 1000,
        "updates_per_second": rate,
        "compile": compile,
        "threads": threads,
    }


def test_compiling_has_paid_when_its_seconds_are_saved():
    """1000 updates: 5 s and 20 s beside them compiled, 10 s and 8 s beside them eager."""
    compiled, eager = whole(25.0, 200.0), whole(18.0, 100.0, compile=False)
    found = whole_run.break_even(compiled, eager)
    assert found["compile_seconds"] == pytest.approx(12.0)
    # Each update saves 5 ms.
    assert found["updates"] == 2400
    slower = whole_run.break_even(whole(25.0, 90.0), eager)
    assert slower["updates"] is None


def test_the_table_of_whole_runs_says_what_was_not_measured():
    results = {
        whole_run.UPSTREAM: "without --corl",
        "IQL, empty cache": [whole(25.0, 200.0)],
        "IQL, warm cache": [whole(15.0, 200.0)],
        "IQL, eager": [whole(18.0, 100.0, compile=False)],
        whole_run.JAX: "failed: no module",
    }
    text = whole_run.table(results)
    assert "| upstream CORL, IQL | not measured (without --corl) |" in text
    assert "JAX-CORL, IQL, offline part | failed: no module |" in text
    assert "- IQL, empty cache: compiling costs 12 s and pays after 2400 updates" in text
    assert "- IQL, warm cache: compiling costs 2 s and pays after 400 updates" in text
    assert "- DARE-IQL, preset cpu, warm cache: not measured" in text


def test_a_whole_run_is_compared_with_upstream_round_by_round():
    base = [{"wall_seconds": 30.0}, {"wall_seconds": 60.0}, {"wall_seconds": 60.0}]
    runs = [whole(15.0, 200.0), whole(20.0, 200.0), whole(60.0, 200.0)]
    text = whole_run.table({whole_run.UPSTREAM: base, "IQL, empty cache": runs})
    row = next(line for line in text.splitlines() if line.startswith("| IQL, empty"))
    assert row.split(" | ")[1:3] == ["20 (15–60)", "2.00"]


def test_acting_is_compared_with_gymnasium_round_by_round():
    names = environment_speed
    times = {
        names.GYMNASIUMS: [100.0, 300.0],
        names.STEP: [50.0, 100.0],
        names.CALL: [10.0, 30.0],
        names.ALONE: [90.0, 90.0],
        names.SIDE_BY_SIDE: [60.0, 60.0],
    }
    lines = names.table(times).splitlines()
    ratios = {line[:34].strip(): line.split()[-1] for line in lines[1:-1]}
    assert ratios[names.STEP] == "2.50" and ratios[names.SIDE_BY_SIDE] == "1.50"
    assert lines[-1].startswith("policy call and environment step: 95.0 µs")
