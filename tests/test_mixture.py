"""The rule em against an expectation-maximisation of our own, and weights by lot."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corl_dare.exchange import (
    EM_GATE,
    EM_STD_MIN,
    EM_STEPS,
    EMState,
    em_start,
    em_state,
    em_steps,
    exchange,
    fit_mixture,
    permute_rows,
)

properties = settings(deadline=None, derandomize=True, max_examples=40)
D = torch.float64
ties = st.integers(-3, 3).map(float)
reals = st.floats(-10, 10).map(lambda x: round(x, 4))
rows = st.one_of(st.lists(ties, min_size=2, max_size=12), st.lists(reals, min_size=2))


def log_normal(z, mean, std):
    return -0.5 * ((z - mean) / std) ** 2 - np.log(std) - 0.5 * math.log(2 * math.pi)


class PlainEM:
    """The same steps with numpy, one row of formulas after the other."""

    def __init__(self, scores, n_off):
        self.z = np.asarray(scores, np.float64)
        spread = self.z.std()
        self.z = (self.z - self.z.mean()) / (spread if spread > 0 else 1.0)
        self.parts = [slice(0, n_off), slice(n_off, None)]
        self.mean = [self.z[part].mean() for part in self.parts]
        self.std = [max(self.z[part].std(), EM_STD_MIN) for part in self.parts]
        self.share = [0.75, 0.25]
        self.history = [self.objective()]

    def logs(self):
        """Log of P(A | half) density A, and of P(B | half) density B, of each row."""
        own = np.empty_like(self.z)
        for part, share in zip(self.parts, self.share, strict=True):
            own[part] = share
        a, b = (
            log_normal(self.z, m, s) for m, s in zip(self.mean, self.std, strict=True)
        )
        return np.log(own) + a, np.log(1 - own) + b

    def objective(self):
        """Log-likelihood plus the log of the prior of both shares."""
        prior = sum(math.log(s * (1 - s)) for s in self.share)
        return np.logaddexp(*self.logs()).sum() + prior

    def step(self):
        a, b = self.logs()
        of_a = np.exp(a - np.logaddexp(a, b))
        of_b = np.exp(b - np.logaddexp(a, b))
        for k, r in enumerate((of_a, of_b)):
            self.mean[k] = (r * self.z).sum() / r.sum()
            variance = (r * (self.z - self.mean[k]) ** 2).sum() / r.sum()
            self.std[k] = max(math.sqrt(variance), EM_STD_MIN)
        self.share = [(of_a[p].sum() + 1) / (len(of_a[p]) + 2) for p in self.parts]
        self.history.append(self.objective())

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def statistic(self):
        """Twice the gain over the best common share, by a fine grid and then a finer one."""
        a, b = (
            log_normal(self.z, m, s) for m, s in zip(self.mean, self.std, strict=True)
        )
        low, high = 0.0, 1.0
        for _ in range(4):
            grid = np.linspace(low, high, 2001)[1:-1, None]
            values = np.logaddexp(np.log(grid) + a, np.log1p(-grid) + b).sum(1)
            best, width = grid[values.argmax(), 0], (high - low) / 2000
            low, high = max(best - width, 0.0), min(best + width, 1.0)
        return 2 * (np.logaddexp(*self.logs()).sum() - values.max())


def mixed(n, mean, shares, generator, std=1.0):
    """Scores of N(0, 1) and N(mean, std); `shares` of the two halves are of the second."""
    of_b = torch.cat([torch.arange(n) < round(share * n) for share in shares])
    noise = torch.randn(2 * n, generator=generator, dtype=D)
    return torch.where(of_b, mean + std * noise, noise), of_b


@properties
@given(rows, rows)
def test_thirty_steps_equal_the_plain_ones_and_the_likelihood_never_falls(off, on):
    scores = torch.tensor(off + on, dtype=D)
    plain = PlainEM(off + on, len(off)).run(EM_STEPS)
    rises = np.diff(plain.history)
    assert (rises >= -1e-9 * np.abs(plain.history[1:]).max()).all()
    found = fit_mixture(scores, len(off))
    shares = [found.share_off.item(), found.share_on.item()]
    assert shares == pytest.approx(plain.share, abs=1e-6)
    # The grid ends a ten-thousandth before 0 and 1.
    assert found.statistic.item() == pytest.approx(plain.statistic(), abs=1e-4)
    a, b = plain.logs()
    opened = found.log_odds.isfinite().all()
    assert opened == (found.statistic >= EM_GATE and plain.share[0] > plain.share[1])
    if opened:
        probability = torch.tensor(np.exp(a - np.logaddexp(a, b)))
        torch.testing.assert_close(
            found.log_odds.sigmoid(), probability, atol=1e-6, rtol=0
        )


def test_the_objective_of_our_own_steps_never_falls():
    generator = torch.Generator().manual_seed(0)
    scores, _ = mixed(64, 1.5, (0.2, 0.8), generator)
    z, halves, log_ratio = em_start(scores, 64)
    state = EMState(log_ratio, torch.tensor([0.75, 0.25], dtype=D))
    plain = PlainEM(scores.numpy(), 64)
    for _ in range(EM_STEPS):
        state = em_steps(state, halves, z, 1)
        plain.step()
        torch.testing.assert_close(
            state.share, torch.tensor(plain.share), atol=1e-9, rtol=0
        )
    assert plain.history[-1] > plain.history[0] + 0.1


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_far_means_are_at_their_limit_after_thirty_steps(std):
    scores, _ = mixed(128, 5.0, (0.3, 0.7), torch.Generator().manual_seed(1), std)
    found = fit_mixture(scores, 128)
    limit = PlainEM(scores.numpy(), 128).run(2000)
    a, b = limit.logs()
    off_by = np.abs(found.log_odds.sigmoid().numpy() - np.exp(a - np.logaddexp(a, b)))
    assert off_by.max() < 1e-3
    assert found.share_off.item() == pytest.approx(limit.share[0], abs=1e-3)


def purity(rule, mean, shares, generator, repeats=100):
    """Mean M and mean share of the offline-like half that is of the first law."""
    found = []
    for _ in range(repeats):
        scores, of_b = mixed(128, mean, shares, generator)
        order, _, stats = exchange(scores[:128], scores[128:], rule=rule)
        found.append([stats["exchanged"].item(), (~of_b[order[:128]]).double().mean()])
    return np.mean(found, 0)


def test_it_leaves_alone_what_says_nothing_and_keeps_pure_halves_pure():
    """The figures of the trial that the rule comes from."""
    generator = torch.Generator().manual_seed(0)
    exchanged, _ = purity("em", 0.0, (0.3, 0.7), generator)
    assert exchanged < 1.5
    assert purity("posterior", 0.0, (0.3, 0.7), generator)[0] > 35
    assert purity("em", 2.0, (0.3, 0.7), generator)[1] == pytest.approx(0.842, abs=0.015)
    assert purity("em", 2.0, (0.0, 1.0), generator)[1] == pytest.approx(0.997, abs=0.005)


def test_equal_halves_rarely_pass_the_gate():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(600, 256, generator=generator)
    fits = torch.vmap(lambda row: fit_mixture(row, 128).log_odds)(scores)
    assert 0.002 < fits.isfinite().all(1).double().mean() < 0.06


def test_the_misplaced_leave_in_the_order_of_their_odds():
    scores, _ = mixed(40, 3.0, (0.2, 0.8), torch.Generator().manual_seed(3))
    odds = fit_mixture(scores, 40).log_odds
    gone = sorted(range(40), key=lambda i: odds[i].item())
    come = sorted(range(40, 80), key=lambda i: -odds[i].item())
    wrong = min(int((odds[:40] < 0).sum()), int((odds[40:] >= 0).sum()))
    assert wrong > 4
    for cap in (3, None):
        order, weight, stats = exchange(scores[:40], scores[40:], cap, "em")
        count = wrong if cap is None else cap
        assert stats["exchanged"] == count
        assert set(order[:40].tolist()) == {*gone[count:], *come[:count]}
    soft = exchange(scores[:40], scores[40:], None, "em", weights="soft")
    torch.testing.assert_close(soft.weight, odds[soft.order].sigmoid())
    assert soft.stats["em_share_off"] > soft.stats["em_share_on"]
    assert soft.stats["em_statistic"] > EM_GATE


DEGENERATE = {
    "one law": ([0.3] * 9, [0.3] * 9),
    "equal halves": ([1.0, 2.0, 3.0, 5.0] * 8, [1.0, 2.0, 3.0, 5.0] * 8),
    "one row offline": ([0.0], [5.0 + 0.1 * k for k in range(40)]),
    "one row online": ([0.1 * k for k in range(40)], [9.0]),
    "not finite": ([0.0, math.nan] * 20, [5.0, 6.0] * 20),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_where_nothing_can_be_told_nothing_is_swapped(name):
    off, on = (torch.tensor(x) for x in DEGENERATE[name])
    order, weight, stats = exchange(off, on, rule="em", weights="soft")
    assert order.tolist() == list(range(len(off) + len(on)))
    assert weight.tolist() == [1.0] * len(off) + [0.0] * len(on)
    assert stats["exchanged"] == stats["candidates_off"] == stats["candidates_on"] == 0


def test_an_atom_keeps_the_least_deviation_and_inverted_halves_do_as_told():
    generator = torch.Generator().manual_seed(0)
    # Most offline rows lie on a clipped bound, and a few of the online ones.
    off = torch.where(torch.arange(60) < 45, 0.0, torch.rand(60, generator=generator))
    on = 1.0 + torch.rand(60, generator=generator)
    on[:12] = 0.0
    result = exchange(off, on, rule="em")
    assert result.stats["exchanged"] > 0 and result.weight.isfinite().all()
    came = torch.cat([off, on])[result.order[:60]]
    assert (came == 0).sum() > 45
    inverted = partial(exchange, on, off, rule="em")
    assert inverted().stats["em_share_off"] > inverted().stats["em_share_on"]
    assert inverted(skip_inverted=True).stats["exchanged"] == 0
    assert inverted().stats["exchanged"] > 0


def test_chunks_of_compiled_steps_give_the_whole():
    scores, _ = mixed(64, 2.0, (0.3, 0.7), torch.Generator().manual_seed(0))
    asked = []

    def steps(state, halves, z, count):
        asked.append(count)
        return em_steps(state, halves, z, count)

    chunks, whole = em_state(scores, 64, steps, 5), em_state(scores, 64)
    assert asked == [5] * 6
    assert all(torch.equal(x, y) for x, y in zip(chunks, whole, strict=True))


# ---------------------------------------------------------------- weights by lot


@pytest.mark.parametrize("weights", ["hard", "soft"])
@pytest.mark.parametrize("among", ["half", "batch"])
def test_lots_move_the_rows_and_leave_the_weights(among, weights):
    scores, _ = mixed(30, 2.0, (0.3, 0.7), torch.Generator().manual_seed(0))
    args, options = (scores[:30], scores[30:]), {"weights": weights}
    plain = exchange(*args, **options)
    generator = torch.Generator().manual_seed(5)
    drawn = [
        exchange(*args, permute=among, generator=generator, **options)
        for _ in range(400)
    ]
    own = torch.empty(60, dtype=D)
    own[plain.order] = plain.weight
    got = torch.zeros(400, 60, dtype=D)
    for row, result in zip(got, drawn, strict=True):
        assert torch.equal(result.weight, plain.weight)
        assert sorted(result.order.tolist()) == list(range(60))
        row[result.order] = result.weight
        crossed = (result.order[:30] >= 30).sum()
        if among == "half":
            assert crossed == plain.stats["exchanged"]
    expected = own.mean().expand(60)
    if among == "half":
        expected = torch.cat([own[:30].mean().expand(30), own[30:].mean().expand(30)])
    # The mean of 400 draws of weights between 0 and 1: six standard errors.
    torch.testing.assert_close(got.mean(0), expected, atol=6 * 0.5 / 20, rtol=0)
    torch.testing.assert_close(
        got[:, :30].sum(1).std() > 1e-6, torch.tensor(among == "batch")
    )


def test_lots_need_a_generator_and_a_name():
    scores = torch.arange(4.0)
    with pytest.raises(ValueError, match="permute 'half' needs a generator"):
        exchange(scores, scores, permute="half")
    with pytest.raises(
        ValueError, match="permute 'row' is not one of none, half, batch"
    ):
        exchange(scores, scores, permute="row")
    generator = torch.Generator().manual_seed(0)
    order = permute_rows(torch.arange(6), 2, "half", generator)
    assert sorted(order[:2].tolist()) == [0, 1]
