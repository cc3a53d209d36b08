"""Statistics against closed forms, written-out loops and exhaustive enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from experiments import stats

FINITE = st.floats(-1e3, 1e3)


def trimmed_mean_by_hand(values):
    values = sorted(values)
    cut = len(values) // 4
    kept = values[cut : len(values) - cut]
    return math.fsum(kept) / len(kept)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(hnp.arrays(np.float64, st.integers(1, 40), elements=FINITE))
def test_iqm_is_the_mean_of_the_middle_half(values):
    assert stats.iqm(values) == pytest.approx(trimmed_mean_by_hand(values), abs=1e-9)
    assert stats.iqm(values[::-1]) == stats.iqm(values)
    assert values.min() - 1e-9 <= stats.iqm(values) <= values.max() + 1e-9


def test_iqm_of_known_numbers():
    assert stats.iqm(np.array([1.0, 2.0, 3.0, 400.0])) == 2.5
    assert stats.iqm(np.array([0.0, 1.0, 8.0])) == 3.0  # of three runs none is cut
    assert stats.iqm(np.arange(16.0)) == 7.5
    columns = np.array([[1.0, 9.0], [2.0, 9.0], [3.0, 9.0], [400.0, 9.0]])
    assert stats.iqm(columns).tolist() == [2.5, 9.0]


def test_scores_of_one_run():
    assert stats.final_score(np.array([9.0, 1.0, 2.0, 3.0, 4.0])) == 2.5
    assert stats.final_score(np.array([9.0, 1.0])) == 5.0
    assert stats.regret(np.array([0.0, 50.0, 100.0])) == 0.5
    assert stats.regret(np.array([110.0])) == pytest.approx(-0.1)


def test_the_interval_is_that_of_all_resamples():
    """Three runs have 27 equally likely resamples: the quantiles can be enumerated."""
    runs = np.array([0.0, 1.0, 5.0])
    means = sorted(np.mean(draw) for draw in itertools.product(runs, repeat=3))
    estimate = stats.aggregate_iqm([runs], reps=20000)  # of three runs: their mean
    assert estimate.value == 2.0
    # 1 of 27 resamples is all 0: the 2.5 % quantile is that one, exactly; so is the other end
    assert estimate.low == means[0] == 0.0 and estimate.high == means[-1] == 5.0
    three = np.array([0.0, 1.0, 0.0])  # the number of ones drawn is binomial
    estimate = stats.aggregate_iqm([three], reps=20000)
    # none of three: 8 of 27 draws, three of three: 1 of 27; both are above 2.5 %
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_the_bootstrap_is_stratified():
    """Tasks far apart, runs equal inside a task: any resample across tasks would vary."""
    tasks = [np.full(3, 0.0), np.full(3, 100.0)]
    assert stats.aggregate_iqm(tasks) == stats.Estimate(50.0, 50.0, 50.0)


def test_iqm_interval_by_a_written_out_loop():
    tasks = [np.array([1.0, 4.0, 2.0, 8.0]), np.array([3.0, 30.0])]
    generator = np.random.default_rng(7)
    draws = [generator.integers(0, len(t), size=(500, len(t))) for t in tasks]
    values = []
    for i in range(500):
        pooled = [t[k] for t, rows in zip(tasks, draws, strict=True) for k in rows[i]]
        values.append(trimmed_mean_by_hand(pooled))
    expected = np.percentile(values, [2.5, 97.5])
    estimate = stats.aggregate_iqm(tasks, seed=7, reps=500)
    assert [estimate.low, estimate.high] == pytest.approx(expected)
    assert estimate.value == trimmed_mean_by_hand([1.0, 4.0, 2.0, 8.0, 3.0, 30.0])


def test_bands_are_the_intervals_of_each_point():
    curves = [np.random.default_rng(i).normal(size=(4, 3)) for i in range(2)]
    band = stats.aggregate_iqm(curves, seed=3)
    for t in range(3):
        point = stats.aggregate_iqm([c[:, t] for c in curves], seed=3)
        assert [b[t] for b in band] == pytest.approx(list(point))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    hnp.arrays(np.float64, st.integers(1, 6), elements=st.integers(-3, 3)),
    hnp.arrays(np.float64, st.integers(1, 6), elements=st.integers(-3, 3)),
)
def test_probability_of_improvement_by_brute_force(x, y):
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in x for b in y]
    value = stats.probability_of_improvement([x], [y], reps=20).value
    assert value == pytest.approx(np.mean(wins))
    other = stats.probability_of_improvement([y], [x], reps=20).value
    assert value + other == pytest.approx(1.0)


def test_probability_of_improvement_averages_tasks_not_pairs():
    x, y = [np.ones(1), np.zeros(5)], [np.zeros(1), np.ones(5)]
    assert stats.probability_of_improvement(x, y).value == 0.5
    sure = stats.probability_of_improvement([np.ones(3)], [np.zeros(3)])
    assert sure == stats.Estimate(1.0, 1.0, 1.0)


def test_pairing_by_seed_takes_the_common_part_out():
    """A large effect of the seed hides a small gain, unless the runs are paired."""
    luck = np.array([0.0, 50.0, 100.0, 150.0])
    gain = np.array([1.0, 2.0, 1.0, 2.0])
    paired = stats.mean_difference([luck + gain], [luck])
    assert paired.value == pytest.approx(1.5)
    half = 3.182446 * gain.std(ddof=1) / 2  # t of 3 degrees of freedom, 4 runs
    assert paired.low == pytest.approx(1.5 - half) and paired.high > 0
    assert paired.high == pytest.approx(1.5 + half)
    with pytest.raises(ValueError, match="task 0 has 4 and 3 runs; pair them by seed"):
        stats.mean_difference([luck], [luck[:3]])


def test_student_quantile_is_the_table_s():
    table = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 10: 2.22814, 120: 1.97993}
    for freedom, t in table.items():
        assert stats.student_quantile(freedom) == pytest.approx(t, abs=1e-4)


def test_difference_over_tasks_has_welch_and_satterthwaite_s_freedom():
    gaps = [np.array([1.0, 3.0, 5.0]), np.array([0.0, 1.0])]
    estimate = stats.mean_difference(gaps, [np.zeros(3), np.zeros(2)])
    a, b = 4.0 / 3 / 4, 0.5 / 2 / 4  # variances of the tasks' share of the mean
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 1)
    half = stats.student_quantile(freedom) * math.sqrt(a + b)
    assert estimate.value == 1.75
    assert [estimate.low, estimate.high] == pytest.approx([1.75 - half, 1.75 + half])


def test_difference_interval_covers_the_truth_as_often_as_it_says():
    """Three runs on each of three tasks with unequal spread; the bootstrap covers 83 %."""
    generator = np.random.default_rng(0)
    spread, covered = np.array([1.0, 3.0, 0.3]), 0
    for _ in range(600):
        x = [s * generator.normal(size=3) for s in spread]
        estimate = stats.mean_difference(x, [np.zeros(3)] * 3)
        covered += estimate.low <= 0.0 <= estimate.high
    assert 0.93 < covered / 600 <= 1.0


def test_no_spread_no_width_and_one_run_no_interval():
    same = stats.mean_difference([np.array([2.0, 2.0])], [np.array([1.0, 1.0])])
    assert same == stats.Estimate(1.0, 1.0, 1.0)
    one = stats.mean_difference([np.ones(1), np.ones(2)], [np.zeros(1), np.zeros(2)])
    assert one.value == 1.0 and math.isnan(one.low) and math.isnan(one.high)


def test_intervals_shrink_with_the_root_of_the_number_of_runs():
    values = np.random.default_rng(0).normal(size=400)
    wide, narrow = (stats.aggregate_iqm([v]) for v in (values[:25], values))
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
    assert 3.0 < ratio < 5.0  # 4 in the limit
    # The mean of the middle half of normal values is 84 % as efficient as the mean.
    expected = 2 * 1.96 / 20 / math.sqrt(0.84)
    assert narrow.high - narrow.low == pytest.approx(expected, rel=0.15)


def test_same_seed_same_interval_and_the_global_stream_is_left_alone():
    tasks = [np.random.default_rng(1).normal(size=5)]
    np.random.seed(0)
    first = np.random.random()
    np.random.seed(0)
    a, b = stats.aggregate_iqm(tasks, seed=4), stats.aggregate_iqm(tasks, seed=4)
    assert a == b and a != stats.aggregate_iqm(tasks, seed=5)
    assert np.random.random() == first


def test_one_run_has_no_interval():
    estimate = stats.aggregate_iqm([np.array([3.0]), np.array([1.0, 2.0])])
    assert estimate.value == 2.0
    assert math.isnan(estimate.low) and math.isnan(estimate.high)
    band = stats.aggregate_iqm([np.zeros((1, 4))])
    assert band.value.shape == band.low.shape == (4,) and np.isnan(band.low).all()


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf], np.zeros((0, 3))])
def test_no_value_and_no_number_are_refused(bad):
    for function in (stats.iqm, stats.final_score, stats.regret):
        with pytest.raises(ValueError, match="a statistic needs"):
            function(np.array(bad))
    with pytest.raises(ValueError, match="a statistic needs"):
        stats.aggregate_iqm([np.array(bad)])


def test_other_tasks_cannot_be_compared():
    with pytest.raises(ValueError, match="same tasks"):
        stats.probability_of_improvement([np.ones(2)], [])
    with pytest.raises(ValueError, match="same tasks"):
        stats.mean_difference([], [])
