"""The exchange against brute force, closed forms and the true part of the paper's theory.

Nothing here asserts the paper's Lemma 1 or Theorem 1: they do not hold for its Algorithm 1.
"""

import ast
import doctest
import math
import shutil
import subprocess
import sys
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from corl_dare import exchange as module
from corl_dare.exchange import (
    ALIGNMENTS,
    RULES,
    alignment_score,
    exchange,
    fit_gaussian,
    fit_mixture,
    misplaced_share,
    posterior_offline,
    reorder,
    separation_point,
)

properties = settings(deadline=None, derandomize=True, max_examples=50)
few = settings(properties, max_examples=20)
D = torch.float64

ties = st.integers(-3, 3).map(float)  # a coarse grid: many equal scores
reals = st.floats(-10, 10).map(lambda x: round(x, 6))
scores = st.one_of(st.lists(ties, min_size=1, max_size=12), st.lists(reals, min_size=1))
float32s = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
caps = st.one_of(st.none(), st.integers(0, 12))


@st.composite
def halves(draw, equal=False):
    """Scores (N_off,) and (N_on,) in float64."""
    off = draw(scores)
    size = {"min_size": len(off), "max_size": len(off)} if equal else {"min_size": 1}
    on = draw(st.lists(draw(st.sampled_from([ties, reals])), **size))
    return torch.tensor(off, dtype=D), torch.tensor(on, dtype=D)


def run(off, on, cap=None, rule="threshold", **options):
    generator = torch.Generator().manual_seed(0) if rule == "random" else None
    return exchange(off, on, cap, rule, generator=generator, **options)


def split(off, on, order):
    """The two halves after the exchange."""
    after = torch.cat([off, on])[order]
    return after[: len(off)], after[len(off) :]


def cdf_difference(off, on, t):
    """F_off - F_on at t, by counting."""
    below_off = sum(1 for d in off.tolist() if d <= t) / len(off)
    return below_off - sum(1 for d in on.tolist() if d <= t) / len(on)


def extremes(off, on):
    """sup and inf of F_off - F_on over the real line."""
    points = [0.0] + [cdf_difference(off, on, t) for t in off.tolist() + on.tolist()]
    return max(points), min(points)


def amplitude(off, on):
    sup, inf = extremes(off, on)
    return sup - inf


# ---------------------------------------------------------------- alignment scores


def brute_force_score(a, references, kind, sigma, weights):
    """One action (A,), references (K, A), weights (K,) that sum to 1; plain Python."""
    distances = [math.dist(a, r) for r in references]
    energies = [d**2 / (2 * sigma**2) for d in distances]
    if kind == "gaussian_kl":
        return sum(w * e for w, e in zip(weights, energies, strict=True))
    if kind == "distance":
        return sum(w * d for w, d in zip(weights, distances, strict=True))
    if kind == "log_distance":
        return math.log(sum(w * e for w, e in zip(weights, energies, strict=True)))
    if kind == "kernel":
        pairs = zip(weights, energies, strict=True)
        return -math.log(sum(w * math.exp(-e) for w, e in pairs))

    def softmax(x):
        return [math.exp(v) / sum(math.exp(u) for u in x) for v in x]

    p, total = softmax(a), 0.0
    for w, r in zip(weights, references, strict=True):
        q = softmax(r)
        total += w * sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    return total


@pytest.mark.parametrize("kind", ALIGNMENTS)
@pytest.mark.parametrize("dtype, tolerance", [(D, 1e-12), (torch.float32, 2e-5)])
def test_scores_equal_plain_python(kind, dtype, tolerance):
    g = torch.Generator().manual_seed(1)
    actions = torch.rand(20, 3, generator=g, dtype=dtype) * 2 - 1
    references = torch.rand(20, 4, 3, generator=g, dtype=dtype) * 2 - 1
    weights = torch.rand(20, 4, generator=g, dtype=dtype)
    for given_weights in (weights, 7.0 * weights, None):
        got = alignment_score(actions, references, kind, 0.6, given_weights)
        assert got.shape == (20,) and got.dtype == dtype
        for i in range(20):
            w = [0.25] * 4
            if given_weights is not None:
                w = (weights[i] / weights[i].sum()).tolist()
            a, r = actions[i].tolist(), references[i].tolist()
            expected = brute_force_score(a, r, kind, 0.6, w)
            assert got[i].item() == pytest.approx(expected, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_one_reference_needs_no_reference_axis(kind):
    g = torch.Generator().manual_seed(2)
    a, r = torch.randn(2, 9, 3, generator=g)
    one = alignment_score(a, r, kind, 0.5)
    assert torch.equal(one, alignment_score(a, r.unsqueeze(1), kind, 0.5))


def test_kernel_with_one_reference_is_the_gaussian_kl():
    g = torch.Generator().manual_seed(3)
    a, r = 30 * torch.randn(2, 50, 6, generator=g)  # exp(-distance) underflows here
    assert torch.equal(alignment_score(a, r, "kernel"), alignment_score(a, r))


def test_kernel_ignores_references_without_weight():
    a, r = torch.zeros(1, 2), torch.tensor([[[1.0, 0.0], [9.0, 9.0]]])
    weights = torch.tensor([[2.0, 0.0]])
    assert alignment_score(a, r, "kernel", 1.0, weights).item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ALIGNMENTS)
def test_zero_distance_scores_lowest_and_finite(kind):
    a = torch.tensor([[0.3, -0.2], [0.3, -0.2]])
    r = torch.tensor([[0.3, -0.2], [0.5, -0.2]])
    near, far = alignment_score(a, r, kind, 2.0)
    assert torch.isfinite(near) and near < far
    floor = math.log(1e-12 / 8) if kind == "log_distance" else 0.0
    assert near.item() == pytest.approx(floor, abs=1e-6)


def test_softmax_kl_is_blind_to_a_shift_of_all_dimensions():
    a = torch.randn(5, 3, dtype=D, generator=torch.Generator().manual_seed(4))
    assert alignment_score(a, a + 3.0, "softmax_kl").abs().max() < 1e-12
    assert alignment_score(a, a + 3.0).min() > 1.0
    assert alignment_score(a[:, :1], a[:, 1:2], "softmax_kl").abs().max() == 0


@pytest.mark.parametrize(
    "kind, p, q",
    [("gaussian_kl", 18, 65), ("distance", 27, 54), ("log_distance", 44, 38)],
)
def test_the_transform_of_the_distance_decides_the_candidates(kind, p, q):
    """Residuals N(0, 0.3^2 I) and N(0, 0.4^2 I) in six dimensions, 128 rows each."""
    g = torch.Generator().manual_seed(5)
    counts = torch.zeros(2)
    for _ in range(200):
        noise = torch.randn(256, 6, generator=g)
        noise[:128] *= 0.3
        noise[128:] *= 0.4
        d = alignment_score(noise, torch.zeros(256, 6), kind)
        stats = exchange(d[:128], d[128:]).stats
        counts += torch.stack([stats["candidates_off"], stats["candidates_on"]])
    assert (counts / 200).tolist() == pytest.approx([p, q], abs=1.0)


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("alignment 'mse'", {"kind": "mse"}),
        ("sigma", {"sigma": 0.0}),
        ("sigma", {"sigma": -1.0}),
        ("sigma", {"sigma": math.nan}),
        ("sigma", {"sigma": math.inf}),
        ("do not fit", {"references": torch.zeros(5, 2)}),
        ("do not fit", {"references": torch.zeros(4, 3)}),
        ("do not fit", {"references": torch.zeros(4, 0, 2)}),
        ("do not fit", {"references": torch.zeros(2)}),
        ("do not fit", {"actions": torch.zeros(4)}),
        ("do not fit", {"actions": torch.tensor(0.0)}),
        ("do not fit", {"actions": torch.zeros(4, 1, 2)}),
        ("weights", {"weights": torch.ones(4)}),
        ("weights", {"weights": torch.ones(4, 2)}),
    ],
)
def test_bad_score_arguments_are_named(message, arguments):
    good = {"actions": torch.zeros(4, 2), "references": torch.zeros(4, 2)}
    with pytest.raises(ValueError, match=message):
        alignment_score(**{**good, **arguments})


# ---------------------------------------------------------------- two Gaussians


@properties
@given(scores)
def test_fit_is_the_population_moments(values):
    mean, std = fit_gaussian(torch.tensor(values, dtype=D))
    expected = math.fsum(values) / len(values)
    variance = math.fsum((v - expected) ** 2 for v in values) / len(values)
    assert mean.shape == std.shape == ()
    assert mean.item() == pytest.approx(expected, abs=1e-12)
    assert std.item() == pytest.approx(math.sqrt(variance), abs=1e-12)


@few
@given(float32s, st.integers(1, 300))
def test_equal_scores_have_exactly_that_mean_and_no_width(value, n):
    mean, std = fit_gaussian(torch.full((n,), value))
    assert mean.item() == value and std.item() == 0.0


TABLE = [
    ((0.0, 1.0, 2.0, 1.0), 1.0),
    ((0.0, 1.0, 2.0, 2.0), 1.23758391),
    ((0.0, 2.0, 2.0, 1.0), 0.76241609),
    ((1.0, 0.5, 3.0, 1.0), 1.82995483),
    ((3.0, 1.0, 1.0, 0.5), 1.82995483),
    ((0.2, 0.1, 0.5, 0.3), 0.35582622),
    ((0.0, 1.0, 1.0, 2.0), 0.5),  # no root between the means
    ((0.2, 0.1, 0.3, 0.3), 0.25),
]


@pytest.mark.parametrize("moments, tau", TABLE)
def test_separation_point_of_known_cases(moments, tau):
    assert separation_point(*moments).item() == pytest.approx(tau, abs=1e-8)


def test_separation_point_broadcasts_numbers_and_tensors():
    columns = [
        torch.tensor(c, dtype=D) for c in zip(*[m for m, _ in TABLE], strict=True)
    ]
    expected = torch.tensor([tau for _, tau in TABLE], dtype=D)
    assert torch.allclose(separation_point(*columns), expected, atol=1e-8)
    mixed = separation_point(torch.zeros(3, 1), 1.0, torch.tensor([2.0, 4.0]), 1)
    assert mixed.shape == (3, 2) and mixed.dtype == torch.float32
    assert mixed[0].tolist() == [1.0, 2.0]


def bisection(mean_off, std_off, mean_on, std_on):
    """The equal-density point as a fraction of the way between the means, 60 digits."""
    with localcontext() as context:
        context.prec = 60
        m0, s0, m1, s1 = map(Decimal, (mean_off, std_off, mean_on, std_on))
        log_ratio = (s1 / s0).ln()

        def odds(fraction):
            t = m0 + (m1 - m0) * fraction
            return ((t - m1) / s1) ** 2 / 2 - ((t - m0) / s0) ** 2 / 2 + log_ratio

        low, high = Decimal(0), Decimal(1)
        if odds(low) <= 0 or odds(high) >= 0:
            return None
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if odds(middle) > 0 else (low, middle)
        return float(low)


widths = st.floats(-6, 6).map(lambda x: 10.0**x)
ratios = st.one_of(
    st.floats(-3, 3).map(lambda x: 10.0**x),
    st.floats(-1e-9, 1e-9).map(lambda x: 1.0 + x),
    st.just(1.0),
)


@settings(properties, max_examples=100)
@given(st.floats(-100, 100), widths, st.floats(-4, 3), st.booleans(), ratios)
def test_separation_point_equals_bisection(mean_off, std_off, log_gap, inverted, ratio):
    gap = std_off * 10.0**log_gap * (-1 if inverted else 1)
    std_on, mean_on = std_off * ratio, mean_off + gap
    fraction = bisection(mean_off, std_off, mean_on, std_on)
    for shift in (True, False):
        if (
            not shift
        ):  # the same case at 0, where the means carry no rounding of their own
            mean_off, mean_on = 0.0, gap
            fraction = bisection(mean_off, std_off, mean_on, std_on)
        tau = separation_point(mean_off, std_off, mean_on, std_on).item()
        assert min(mean_off, mean_on) <= tau <= max(mean_off, mean_on)
        expected = mean_off + (0.5 if fraction is None else fraction) * (
            mean_on - mean_off
        )
        tolerance = 1e-9 * abs(mean_on - mean_off) + 1e-15 * abs(mean_off)
        # At the border of having a root at all, rounding may decide.
        border = fraction is not None and not 1e-9 < fraction < 1 - 1e-9
        assert border or abs(tau - expected) <= tolerance


def test_bisection_has_cases_with_and_without_a_root():
    """Guards the test above: its oracle must not answer `no root` everywhere."""
    assert bisection(0, 1, 1, 2) is None and bisection(0, 2, 1, 1) is None
    assert bisection(0, 1, 2, 2) == pytest.approx(1.23758391 / 2, abs=1e-8)


def test_separation_point_stays_inside_where_the_root_meets_a_mean():
    """Rounding puts the closed form an ulp above the upper mean here."""
    mean_on = 1.6008724094554923
    tau = separation_point(0.0, 0.8271738112279405, mean_on, 5.381962359189542)
    assert mean_on * (1 - 1e-12) < tau.item() <= mean_on


@properties
@given(st.floats(-5, 5, width=32), st.floats(0.0625, 4, width=32), ratios)
def test_separation_point_in_float32_loses_only_rounding(gap, std, ratio):
    assume(abs(gap) > 1e-2 * std)
    moments = [torch.tensor(v) for v in (0.0, std, gap, std * ratio)]
    fraction = bisection(*[m.item() for m in moments])
    assume(fraction is None or 1e-3 < fraction < 1 - 1e-3)
    tau = separation_point(*moments)
    expected = gap * (0.5 if fraction is None else fraction)
    assert tau.dtype == torch.float32
    assert tau.item() == pytest.approx(expected, abs=1e-4 * abs(gap))


@pytest.mark.parametrize(
    "moments, tau",
    [
        ((1.0, 0.0, 4.0, 2.0), 2.5),
        ((1.0, 2.0, 4.0, 0.0), 2.5),
        ((1.0, 0.0, 4.0, 0.0), 2.5),
        ((3.0, 1.0, 3.0, 2.0), 3.0),
        ((3.0, 1.0, 3.0, 1.0), 3.0),
        ((3.0, 0.0, 3.0, 0.0), 3.0),
        ((1.0, math.nan, 4.0, 1.0), 2.5),
        ((1.0, 1.0, 4.0, math.inf), 2.5),
        ((1.0, math.inf, 4.0, math.inf), 2.5),
        ((0.0, 1.0, 1e-200, 1.0), 5e-201),
        ((0.0, 1e-200, 1e200, 1e-200), 5e199),
    ],
)
def test_degenerate_gaussians_separate_at_the_midpoint(moments, tau):
    assert separation_point(*moments).item() == pytest.approx(tau, rel=1e-12)
    tensors = [torch.tensor(m, dtype=D) for m in moments]
    assert separation_point(*tensors).item() == pytest.approx(tau, rel=1e-12)


@properties
@given(reals, reals, st.floats(0.2, 5), reals, st.floats(0.2, 5))
def test_posterior_is_the_density_ratio(d, mean_off, std_off, mean_on, std_on):
    def density(mean, std):
        return Decimal(-0.5 * ((d - mean) / std) ** 2).exp() / Decimal(std)

    off, on = density(mean_off, std_off), density(mean_on, std_on)
    got = posterior_offline(
        torch.tensor([d], dtype=D), mean_off, std_off, mean_on, std_on
    )
    assert got.shape == (1,)
    assert got.item() == pytest.approx(float(off / (off + on)), rel=1e-9, abs=1e-300)


def test_posterior_is_finite_where_densities_underflow():
    d = torch.tensor([-1e8, -900.0, 900.0, 1e8], dtype=D)
    assert posterior_offline(d, 0.0, 1.0, 1.0, 1.0).tolist() == [1, 1, 0, 0]
    assert posterior_offline(d, 0.0, 2.0, 1.0, 1.0).tolist() == [1, 1, 1, 1]


def test_posterior_without_width():
    d = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0])
    assert posterior_offline(d, 0.0, 0.0, 2.0, 0.0).tolist() == [1, 1, 0.5, 0, 0]
    assert posterior_offline(d, 2.0, 0.0, 0.0, 0.0).tolist() == [0, 0, 0.5, 1, 1]
    assert posterior_offline(d, 0.0, 0.0, 2.0, 1.0).tolist() == [0, 1, 0, 0, 0]
    assert posterior_offline(d, 0.0, 1.0, 2.0, 0.0).tolist() == [1, 1, 1, 0, 1]
    assert posterior_offline(d, 1.0, 0.0, 1.0, 0.0).tolist() == [0.5] * 5


# ---------------------------------------------------------------- exchange = brute force


def swap(rows, leave_off, leave_on, m):
    """Swap the first m of two lists of rows, in place."""
    for x, y in list(zip(leave_off, leave_on, strict=False))[:m]:
        rows[x], rows[y] = y, x


def brute_force_exchange(off, on, cap, rule, tau):
    """New row order and M by Python loops; `tau` is tested against bisection above."""
    n_off, n_on = len(off), len(on)
    pool = off + on
    if rule == "threshold":
        leave_off = [i for i in range(n_off) if pool[i] >= tau]
        leave_on = [j for j in range(n_off, n_off + n_on) if pool[j] < tau]
    else:
        # Fill the offline-like half from the lowest score up; at equal scores those that
        # are offline already come first.
        chosen = sorted(range(len(pool)), key=lambda i: (pool[i], i >= n_off, i))[:n_off]
        leave_off = [i for i in range(n_off) if i not in chosen]
        leave_on = [j for j in chosen if j >= n_off]
    # Python's sort is stable, also in reverse.
    leave_off.sort(key=lambda i: pool[i], reverse=True)
    leave_on.sort(key=lambda j: pool[j])
    m = min(len(leave_off), len(leave_on), len(pool) if cap is None else cap)
    rows = list(range(len(pool)))
    swap(rows, leave_off, leave_on, m)
    return rows, m, len(leave_off), len(leave_on)


@pytest.mark.parametrize("rule", ["threshold", "direct"])
@settings(properties, max_examples=60)
@given(halves(), caps)
def test_exchange_equals_brute_force(rule, both, cap):
    off, on = both
    order, weight, stats = run(off, on, cap, rule)
    tau = stats["separation_point"].item()
    rows, m, p, q = brute_force_exchange(off.tolist(), on.tolist(), cap, rule, tau)
    if rule == "threshold":
        assert order.tolist() == rows
    else:  # which of equal scores moves is free
        pool = torch.cat([off, on])
        assert torch.equal(pool[order].sort()[0], pool.sort()[0])
        for part in (slice(len(off)), slice(len(off), None)):
            assert torch.equal(pool[order][part].sort()[0], pool[rows][part].sort()[0])
    counted = [stats[k] for k in ("exchanged", "candidates_off", "candidates_on")]
    assert counted == [m, p, q]
    assert weight.tolist() == [1.0] * len(off) + [0.0] * len(on)


@settings(properties, max_examples=60)
@given(halves(), caps)
def test_posterior_rule_equals_brute_force(both, cap):
    off, on = both
    order, _, stats = run(off, on, cap, "posterior")
    moments = [*fit_gaussian(off), *fit_gaussian(on)]
    mean_off, std_off, mean_on, std_on = (m.item() for m in moments)
    assume(min(std_off, std_on) > 1e-3)

    def odds(d):
        z_off, z_on = (d - mean_off) / std_off, (d - mean_on) / std_on
        return z_on**2 / 2 - z_off**2 / 2 + math.log(std_on / std_off)

    n_off, pool = len(off), [odds(d) for d in off.tolist() + on.tolist()]
    assume(all(abs(r) > 1e-9 for r in pool))
    leave_off = sorted(r for r in pool[:n_off] if r < 0)
    leave_on = sorted((r for r in pool[n_off:] if r >= 0), reverse=True)
    m = min(len(leave_off), len(leave_on), len(pool) if cap is None else cap)
    assert stats["exchanged"] == m
    assert (stats["candidates_off"], stats["candidates_on"]) == (
        len(leave_off),
        len(leave_on),
    )
    left_off = sorted(pool[i] for i in order[n_off:].tolist() if i < n_off)
    left_on = sorted(
        (pool[i] for i in order[:n_off].tolist() if i >= n_off), reverse=True
    )
    assert left_off == pytest.approx(leave_off[:m], abs=1e-7)
    assert left_on == pytest.approx(leave_on[:m], abs=1e-7)


def test_posterior_rule_knows_the_second_meeting_point():
    """A narrow offline law inside a wide online one: both tails are online-like."""
    off = torch.tensor([-0.2, -0.1, 0.0, 0.1, 0.2, -3.0], dtype=D)
    on = torch.tensor([-9.0, 9.0, 5.0, 0.05, 10.0, -9.0], dtype=D)
    order, _, stats = run(off, on, rule="posterior")
    assert order[5] == 9 and order[9] == 5  # -3 leaves for 0.05
    assert stats["exchanged"] == 1
    assert off[5] < stats["separation_point"]  # the threshold would keep it


@few
@given(halves(), caps)
def test_random_rule_swaps_as_many_as_the_threshold(both, cap):
    off, on = both
    expected = run(off, on, cap).stats["exchanged"]
    order, _, stats = run(off, on, cap, "random")
    moved = (order != torch.arange(len(order))).nonzero()[:, 0]
    assert stats["exchanged"] == expected and len(moved) == 2 * expected
    assert ((order[moved] < len(off)) != (moved < len(off))).all()


def test_random_rule_is_uniform_within_each_half():
    g = torch.Generator().manual_seed(0)
    off, on = torch.arange(8.0), torch.arange(12.0) + 1.5
    moved, pairs, repeats = torch.zeros(20), torch.zeros(8, 12), 4000
    for _ in range(repeats):
        order, _, stats = exchange(off, on, 2, "random", generator=g)
        moved += order != torch.arange(20)
        pairs += order[:8, None] == torch.arange(8, 20)
    assert stats["exchanged"] == 2
    # binomial with sd <= sqrt(4000 / 4 * 3 / 4) = 27; four of them
    assert (moved[:8] - repeats * 2 / 8).abs().max() < 110
    assert (moved[8:] - repeats * 2 / 12).abs().max() < 110
    assert (pairs - repeats * 2 / 96).abs().max() < 45


def test_random_rule_leaves_the_global_stream_alone():
    before = torch.get_rng_state()
    first = run(
        torch.randn(9, generator=torch.Generator()), torch.ones(5), rule="random"
    )
    assert torch.equal(torch.get_rng_state(), before)
    again = run(
        torch.randn(9, generator=torch.Generator()), torch.ones(5), rule="random"
    )
    assert torch.equal(first.order, again.order)


# ---------------------------------------------------------------- what is true of it


@pytest.mark.parametrize("rule", RULES)
@properties
@given(halves(), caps)
def test_nothing_is_lost_and_the_count_is_the_least(rule, both, cap):
    off, on = both
    order, _, stats = run(off, on, cap, rule)
    n = len(off) + len(on)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))
    crossed = (order[: len(off)] >= len(off)).sum()
    limits = [stats["candidates_off"].item(), stats["candidates_on"].item()]
    assert crossed == stats["exchanged"] == min(limits + ([] if cap is None else [cap]))
    assert (order != torch.arange(n)).sum() == 2 * crossed  # the others keep their place
    if cap == 0:
        assert torch.equal(order, torch.arange(n))


@properties
@given(halves(), caps)
def test_cdf_difference_rises_between_swapped_scores_only(both, cap):
    """Facts on Eq. 22: its change is (1/N_off + 1/N_on) per swapped pair, 2/N if equal."""
    off, on = both
    order, _, stats = run(off, on, cap)
    new_off, new_on = split(off, on, order)
    pool, tau = torch.cat([off, on]), stats["separation_point"].item()
    pairs = [
        (pool[order[i]].item(), pool[i].item())  # (d_y, d_x)
        for i in range(len(off))
        if order[i] >= len(off)
    ]
    step, m = 1 / len(off) + 1 / len(on), stats["exchanged"].item()
    for t in [*pool.tolist(), math.nextafter(tau, -math.inf), -99.0, 99.0]:
        change = cdf_difference(new_off, new_on, t) - cdf_difference(off, on, t)
        between = sum(y <= t < x for y, x in pairs)
        assert change == pytest.approx(step * between, abs=1e-12)
    just_below = math.nextafter(tau, -math.inf)
    change = cdf_difference(new_off, new_on, just_below)
    change -= cdf_difference(off, on, just_below)
    assert change == pytest.approx(step * m, abs=1e-12)


@properties
@given(halves(equal=True), caps)
def test_extremes_of_the_cdf_difference_never_fall(both, cap):
    off, on = both
    order, _, stats = run(off, on, cap)
    (sup, inf), (new_sup, new_inf) = extremes(off, on), extremes(*split(off, on, order))
    assert new_sup >= sup - 1e-12 and new_inf >= inf - 1e-12
    change = (new_sup - new_inf) - (sup - inf)
    assert abs(change) <= 2 * stats["exchanged"].item() / len(off) + 1e-12


@pytest.mark.parametrize("rule", RULES)
@properties
@given(halves(), caps)
def test_both_amplitudes_equal_counting(rule, both, cap):
    off, on = both
    order, _, stats = run(off, on, cap, rule)
    assert stats["amplitude_before"].item() == pytest.approx(amplitude(off, on))
    after = amplitude(*split(off, on, order))
    assert stats["amplitude_after"].item() == pytest.approx(after)


@properties
@given(halves(equal=True), caps)
def test_mean_gap_grows_by_the_swapped_differences(both, cap):
    off, on = both
    order, _, _ = run(off, on, cap)
    new_off, new_on = split(off, on, order)
    gained = sum(  # d_x - d_y of every pair
        (off[i] - torch.cat([off, on])[order[i]]).item()
        for i in range(len(off))
        if order[i] >= len(off)
    )
    growth = (new_on.mean() - new_off.mean()) - (on.mean() - off.mean())
    assert gained >= 0
    assert growth.item() == pytest.approx(2 / len(off) * gained, abs=1e-9)


@properties
@given(halves(equal=True), caps)
def test_wrong_side_count_falls_by_two_per_pair(both, cap):
    off, on = both
    order, _, stats = run(off, on, cap)
    tau, m = stats["separation_point"], stats["exchanged"]
    p, q = stats["candidates_off"], stats["candidates_on"]
    new_off, new_on = split(off, on, order)
    new_p, new_q = (new_off >= tau).sum(), (new_on < tau).sum()
    assert new_p + new_q == p + q - 2 * m
    if cap is None:
        # Also: a second exchange at the same tau would swap nothing.
        assert min(new_p, new_q) == 0
        bound = 1 - (p - q).abs() / len(off)
        assert stats["amplitude_after"] >= bound - 1e-12


@properties
@given(st.lists(st.tuples(ties, st.integers(0, 4).map(float)), min_size=1, max_size=12))
def test_amplitude_never_falls_if_offline_scores_lie_lower(pairs):
    off = torch.tensor([d for d, _ in pairs], dtype=D)
    on = off + torch.tensor([rise for _, rise in pairs], dtype=D)  # so F_off >= F_on
    last = amplitude(off, on)
    for cap in range(len(off) + 1):
        after = run(off, on, cap).stats["amplitude_after"].item()
        assert after >= last - 1e-12
        last = after


def test_lemma_1_of_the_paper_fails_on_its_smallest_counterexample():
    off, on = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])
    stats = exchange(off, on, cap=1).stats
    assert (stats["amplitude_before"], stats["amplitude_after"]) == (0.5, 1.0)


@properties
@given(
    st.lists(st.integers(-50, 50), min_size=2, max_size=24, unique=True),
    st.sampled_from([0.25, 2.0, 1000.0]),
    st.integers(-30, 30),
    st.randoms(use_true_random=False),
    caps,
)
def test_decisions_survive_affine_maps_and_permutations(values, c, b, random, cap):
    n_off = random.randint(1, len(values) - 1)
    off = torch.tensor(values[:n_off], dtype=D)
    on = torch.tensor(values[n_off:], dtype=D)
    order, _, stats = run(off, on, cap)
    tau = stats["separation_point"]
    assume((torch.cat([off, on]) - tau).abs().min() > 1e-9)
    mapped_order, _, mapped = run(c * off + b, c * on + b, cap)
    assert torch.equal(mapped_order, order)
    assert mapped["separation_point"].item() == pytest.approx(
        (c * tau + b).item(), abs=1e-9 * c, rel=1e-12
    )
    i, j = list(range(n_off)), list(range(len(on)))
    random.shuffle(i)
    random.shuffle(j)
    shuffled_off, shuffled_on = off[i], on[j]
    shuffled_order, _, _ = run(shuffled_off, shuffled_on, cap)
    new_off, new_on = split(shuffled_off, shuffled_on, shuffled_order)
    kept_off, kept_on = split(off, on, order)
    assert set(new_off.tolist()) == set(kept_off.tolist())
    assert set(new_on.tolist()) == set(kept_on.tolist())


@properties
@given(halves(equal=True), st.floats(0, 1), st.randoms(use_true_random=False))
def test_mixed_residual_changes_as_in_lemma_2(both, alpha, random):
    """alpha mean_off |h| + (1 - alpha) mean_on |h| of any residual; 0 change at 1/2."""
    off, on = both
    n = len(off)
    h = torch.tensor([random.random() for _ in range(2 * n)], dtype=D)
    order, _, stats = run(off, on)

    def energy(alpha, h):
        return alpha * h[:n].mean() + (1 - alpha) * h[n:].mean()

    moved = [i for i in range(n) if order[i] >= n]
    differences = sum((h[order[i]] - h[i]).item() for i in moved)  # h(y) - h(x)
    change = (energy(alpha, h[order]) - energy(alpha, h)).item()
    assert change == pytest.approx((2 * alpha - 1) * differences / n, abs=1e-12)
    limit = abs(2 * alpha - 1) * stats["exchanged"].item() / n
    assert abs(change) <= limit + 1e-12
    assert abs((energy(0.5, h[order]) - energy(0.5, h)).item()) < 1e-12


def normal(mean, std):
    return lambda g: mean + std * torch.randn(128, generator=g, dtype=D)


def exponential(mean):
    return lambda g: -mean * torch.rand(128, generator=g, dtype=D).log()


@pytest.mark.parametrize(
    "off, on, m, before, after, after_32",
    [
        (exponential(1), exponential(2), 26.5, 0.301, 0.700, 0.691),
        (normal(0, 1), normal(0, 1), 62.0, 0.147, 0.979, 0.557),
        (normal(0, 1), normal(1, 1), 35.8, 0.422, 0.959, 0.903),
        (normal(0, 3), normal(0.5, 0.5), 39.3, 0.729, 0.849, 0.758),
        (normal(0, 1), normal(-1, 1), 85.1, 0.421, 0.960, 0.314),
        (normal(0, 1), normal(-3, 1), 118.5, 0.885, 0.990, 0.635),
    ],
    ids=[
        "exponential",
        "same_law",
        "shifted",
        "wide_offline",
        "inverted",
        "inverted_far",
    ],
)
def test_exchange_separates_even_identical_laws(off, on, m, before, after, after_32):
    """Means over seeded batches of 128 + 128 against an independent numeric experiment."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(200):
        scores_off, scores_on = off(g), on(g)
        free, capped = (exchange(scores_off, scores_on, cap).stats for cap in (None, 32))
        names = "exchanged", "amplitude_before", "amplitude_after"
        rows.append([*(free[k].item() for k in names), capped["amplitude_after"].item()])
    means = torch.tensor(rows).mean(0).tolist()
    assert means[0] == pytest.approx(m, abs=1.5)
    assert means[1:] == pytest.approx([before, after, after_32], abs=0.02)


# ---------------------------------------------------------------- weights, guards, edges


@pytest.mark.parametrize("rule", RULES)
@few
@given(halves(), caps)
def test_soft_weights_belong_to_the_exchanged_rows(rule, both, cap):
    off, on = both
    hard, soft = run(off, on, cap, rule), run(off, on, cap, rule, weights="soft")
    assert torch.equal(hard.order, soft.order)
    expected = posterior_offline(
        torch.cat([off, on]), *fit_gaussian(off), *fit_gaussian(on)
    )
    if rule == "share":  # P(in place) of offline rows, P(misplaced) of online ones
        places = [x + misplaced_share(x).logit() for x in (off, -on)]
        expected = torch.cat([1 - places[0].sigmoid(), places[1].sigmoid()])
    if rule == "em":
        expected = fit_mixture(torch.cat([off, on]), len(off)).log_odds.sigmoid()
    torch.testing.assert_close(soft.weight, expected[soft.order], atol=1e-12, rtol=0)
    assert ((soft.weight >= 0) & (soft.weight <= 1)).all()


def test_skip_inverted_keeps_an_inverted_batch_as_it_is_with_soft_weights_too():
    off, on = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([0.0, 1.0])
    order, weight, _ = run(off, on, weights="soft", skip_inverted=True)
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert weight.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_soft_weights_carry_no_gradient():
    off, on = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    result = exchange(off.requires_grad_(), on, weights="soft")
    assert not result.weight.requires_grad
    assert not any(v.requires_grad for v in result.stats.values())


@pytest.mark.parametrize("rule", RULES)
@few
@given(halves(), caps)
def test_skip_inverted_acts_on_inverted_batches_only(rule, both, cap):
    off, on = both
    plain, guarded = run(off, on, cap, rule), run(off, on, cap, rule, skip_inverted=True)
    inverted = fit_gaussian(on)[0] <= fit_gaussian(off)[0]
    assert plain.stats["inverted"] == float(inverted)
    if inverted:
        assert torch.equal(guarded.order, torch.arange(len(off) + len(on)))
        assert guarded.stats["exchanged"] == 0
    else:
        assert torch.equal(guarded.order, plain.order)


def test_inverted_batch_swaps_nearly_everything_without_the_guard():
    off, on = torch.tensor([10.0, 11.0, 12.0]), torch.tensor([0.0, 1.0, 2.0])
    assert exchange(off, on).stats["exchanged"] == 3
    assert exchange(off, on, skip_inverted=True).stats["exchanged"] == 0
    assert exchange(off, off, skip_inverted=True).stats["exchanged"] == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 5, 8])
@pytest.mark.parametrize("skip_inverted", [False, True])
def test_a_score_that_is_not_finite_stops_the_exchange(rule, bad, row, skip_inverted):
    pool = torch.tensor([4.0, -4, 3, -3, 2, -3, -2.5, -3.5, -3, -2.8, 1])
    off, on = pool[:5], pool[5:]
    # The gate of em wants more rows than these.
    assert run(off, on, rule=rule).stats["exchanged"] > 0 or rule == "em"
    pool[row] = bad
    options = {"weights": "soft", "skip_inverted": skip_inverted}
    order, weight, stats = run(off, on, rule=rule, **options)
    assert order.tolist() == list(range(11)) and stats["exchanged"] == 0
    assert weight.tolist() == [1.0] * 5 + [0.0] * 6


@pytest.mark.parametrize("rule", RULES)
def test_scores_too_large_for_moments_stop_the_exchange(rule):
    off, on = torch.tensor([3e38, -3e38, 3e38]), torch.tensor([-3e38, 3e38])
    order, weight, stats = run(off, on, rule=rule, weights="soft")
    assert order.tolist() == [0, 1, 2, 3, 4] and stats["exchanged"] == 0
    assert weight.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("rule", ["threshold", "posterior", "direct", "em"])
@few
@given(float32s, st.integers(1, 9), st.integers(1, 9))
def test_equal_scores_swap_nothing(rule, value, n_off, n_on):
    off, on = torch.full((n_off,), value), torch.full((n_on,), value)
    order, weight, stats = run(off, on, rule=rule, weights="soft")
    assert stats["exchanged"] == 0 and stats["separation_point"] == value
    assert stats["amplitude_before"] == stats["amplitude_after"] == 0
    told = [1.0] * n_off + [0.0] * n_on if rule == "em" else [0.5] * (n_off + n_on)
    assert weight.tolist() == told


@pytest.mark.parametrize("rule", RULES)
def test_one_row_per_half(rule):
    low, high = torch.tensor([1.0]), torch.tensor([3.0])
    assert run(low, high, rule=rule).order.tolist() == [0, 1]
    order, weight, stats = run(high, low, rule=rule, weights="soft")
    if rule == "share":  # one row is no share
        assert order.tolist() == [0, 1] and weight[0] > 0.5 and weight[1] == 0.0
    elif rule in ("posterior", "em"):
        # Each row is its own law, so it belongs where it is; one row tells nothing apart.
        assert order.tolist() == [0, 1] and weight.tolist() == [1.0, 0.0]
    else:
        assert order.tolist() == [1, 0] and weight.tolist() == [0.0, 1.0]
    assert stats["separation_point"] == 2.0


@pytest.mark.parametrize("rule", RULES)
@few
@given(st.lists(st.floats(width=32), min_size=2, max_size=10), st.integers(1, 9))
def test_any_float32_gives_an_order_and_usable_weights(rule, values, n_off):
    assume(n_off < len(values))
    off, on = torch.tensor(values[:n_off]), torch.tensor(values[n_off:])
    order, weight, stats = run(off, on, rule=rule, weights="soft")
    assert sorted(order.tolist()) == list(range(len(values)))
    assert ((weight >= 0) & (weight <= 1)).all()
    assert torch.isfinite(stats["exchanged"])


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_results_keep_the_dtype_of_the_scores(dtype):
    off, on = torch.arange(5, dtype=dtype), torch.arange(4, dtype=dtype) + 0.5
    order, weight, stats = exchange(off, on, weights="soft")
    assert order.dtype == torch.int64 and weight.dtype == dtype
    assert {(v.dtype, v.shape) for v in stats.values()} == {(dtype, ())}


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("rule 'best'", {"rule": "best"}),
        ("weights 'firm'", {"weights": "firm"}),
        ("cap", {"cap": -1}),
        ("cap", {"cap": 2.0}),
        ("cap", {"cap": True}),
        ("scores_off", {"scores_off": torch.zeros(0)}),
        ("scores_on", {"scores_on": torch.zeros(0)}),
        ("scores_off", {"scores_off": torch.zeros(3, 1)}),
        ("scores_on", {"scores_on": torch.tensor(1.0)}),
        ("scores_on", {"scores_on": torch.zeros(3, dtype=torch.int64)}),
        ("generator", {"rule": "random"}),
    ],
)
def test_bad_exchange_arguments_are_named(message, arguments):
    good = {"scores_off": torch.zeros(3), "scores_on": torch.zeros(3)}
    with pytest.raises(ValueError, match=message):
        exchange(**{**good, **arguments})


def test_fit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one score"):
        fit_gaussian(torch.zeros(0))


def test_reorder_keeps_rows_whole():
    rows = torch.arange(5)
    order = torch.tensor([3, 1, 2, 0, 4])
    batch = [rows, rows.float().unsqueeze(1).expand(5, 3), (rows % 2).bool()]
    new = reorder(batch, order)
    assert isinstance(new, list) and new[0].tolist() == order.tolist()
    assert torch.equal(new[1][:, 2], order.float())
    assert torch.equal(new[2], (order % 2).bool())
    with pytest.raises(ValueError, match=r"tensor 1 .* \(4,\)"):
        reorder([rows, rows[:4]], order)


# ---------------------------------------------------------------- hot loop, copied file


def everything():
    """Each public function with each of its choices."""
    weights = torch.rand(6, 4)
    for kind in ALIGNMENTS:
        alignment_score(torch.randn(6, 3), torch.randn(6, 4, 3), kind, 0.5, weights)
        d = alignment_score(torch.randn(6, 3), torch.randn(6, 3), kind)
    separation_point(0.0, 1.0, 2.0, d[0])
    posterior_offline(d, *fit_gaussian(d), 0.0, 1.0)
    for rule in RULES:
        for choice in ("hard", "soft"):
            for cap in (None, 0, 1):
                result = exchange(
                    d[:4],
                    d[4:],
                    cap,
                    rule,
                    weights=choice,
                    skip_inverted=cap is None,
                    generator=torch.Generator(),
                )
                reorder([d, weights], result.order)


def test_nothing_reads_a_value_back_from_the_device():
    with FakeTensorMode():
        everything()
        with pytest.raises(Exception, match="data-dependent|DataDependent|aten._local"):
            torch.randn(3).sum().item()  # the guard does see one


def test_nothing_reads_a_value_through_cpu_or_numpy():
    """FakeTensorMode lets these pass, so they are counted by name."""
    tree = ast.parse(Path(module.__file__).read_text())
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not called & {"cpu", "item", "tolist", "numpy", "nonzero", "masked_select"}
    assert "argsort" in called


def test_the_docstring_example_runs():
    result = doctest.testmod(module)
    assert result.attempted > 8 and result.failed == 0


def test_the_file_works_alone(tmp_path):
    shutil.copy(module.__file__, tmp_path / "dare_exchange.py")
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import doctest, dare_exchange\n"
        "assert doctest.testmod(dare_exchange).failed == 0\n"
        "assert not any(name.startswith('corl_dare') for name in sys.modules)\n"
        "print('alone')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "alone\n", done.stderr
    imported = set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"torch"}


# ---------------------------------------------------------------- the share rule


def log_ratio_rows(n, share, gap, generator):
    """Exact log-ratios of N(gap, 1) to N(0, 1) in two halves, and who is misplaced."""
    wrong = torch.arange(n) < round(share * n)
    online = torch.cat([wrong, ~wrong])
    x = torch.randn(2 * n, generator=generator, dtype=torch.float64) + gap * online
    return gap * x - gap**2 / 2, torch.cat([wrong, wrong])


@properties
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=40), st.floats(0.1, 20))
def test_the_misplaced_share_is_the_most_probable_one(log_odds, strength):
    """Against the logarithm of the posterior on a fine grid."""
    log_odds = torch.tensor(log_odds, dtype=torch.float64)
    grid = torch.linspace(0, 0.9999, 4001, dtype=torch.float64).unsqueeze(1)
    rows = torch.log(1 - grid + grid * log_odds.exp()).sum(1)
    objective = rows + strength * torch.log(1 - grid[:, 0])
    best = grid[objective.argmax(), 0].item()
    assert misplaced_share(log_odds, strength).item() == pytest.approx(best, abs=6e-4)


def test_the_share_rule_decides_nearly_as_bayes_does():
    generator = torch.Generator().manual_seed(0)
    n, gap = 4000, 2.0
    for share in (0.05, 0.2, 0.4):
        d, wrong = log_ratio_rows(n, share, gap, generator)
        order, _, stats = exchange(d[:n], d[n:], rule="share")
        moved = torch.cat([order[:n] >= n, order[n:] < n])
        errors = (moved != wrong).double().mean().item()
        # Bayes error of two Gaussians with this prior, from their distribution function.
        edge = gap / 2 + math.log((1 - share) / share) / gap
        phi = torch.distributions.Normal(0.0, 1.0).cdf
        right, left = phi(torch.tensor(-edge)), phi(torch.tensor(edge - gap))
        bayes = ((1 - share) * right + share * left).item()
        assert errors == pytest.approx(bayes, abs=0.01)
        assert stats["exchanged"] < 1.3 * share * n


def test_the_share_rule_leaves_equal_policies_alone():
    """Where the threshold rule swaps a third of the rows: both halves score alike."""
    generator = torch.Generator().manual_seed(0)
    off, on = (0.1 * torch.randn(128, generator=generator) for _ in range(2))
    assert exchange(off, on)[2]["exchanged"] > 30
    assert exchange(off, on, rule="share")[2]["exchanged"] == 0
    zeros = torch.zeros(128)
    assert exchange(zeros, zeros, rule="share")[2]["exchanged"] == 0
