"""Statistics of a few runs: IQM, stratified bootstrap, probability of improvement, regret.

The unit is a run (one seed of one task), never an episode: episodes of one policy are not
independent tries of a method. IQM, the stratified bootstrap and the probability of improvement are
those of Agarwal et al. 2021, arXiv 2108.13264 (rliable). Everything is numpy, and random only
through the seed that is passed in.

A bootstrap of three seeds draws only from three values, so its interval is too narrow
(docs/report.md has the measured coverage). Claims are about differences between methods; these get
Student's interval.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
REPS = 2000
LAST = 4  # evaluations that DARE averages for its tables


class Estimate(NamedTuple):
    """A value and its 95 % interval; the bounds are nan where a task has a single run."""

    value: np.ndarray | float
    low: np.ndarray | float
    high: np.ndarray | float


# ---------------------------------------------------------------- of one run


def final_score(scores: np.ndarray) -> float:
    """Mean of the last four online evaluations (T,): DARE's protocol."""
    return float(np.mean(_checked(scores)[-LAST:]))


def regret(scores: np.ndarray) -> float:
    """Mean of 1 - score / 100 over the online evaluations (T,); scores D4RL-normalized.

    Where a score is 100 times a success rate this is CORL's `eval/regret`, from evaluation
    episodes. Below 0 for scores above 100.
    """
    return float(np.mean(1.0 - _checked(scores) / 100.0))


# ---------------------------------------------------------------- over runs


def iqm(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean along an axis: a quarter of the n values is cut off at each end.

    floor(n / 4) values are cut, as scipy's `trim_mean(values, 0.25)` does: of three runs none.
    """
    values = np.sort(_checked(values), axis=axis)
    n = values.shape[axis]
    return values.take(np.arange(n // 4, n - n // 4), axis=axis).mean(axis=axis)


def aggregate_iqm(
    tasks: Sequence[np.ndarray], seed: int = 0, reps: int = REPS
) -> Estimate:
    """IQM over all runs of all tasks, with its stratified bootstrap interval.

    Args:
        tasks: per task the runs' values (R,), or curves (R, T) for an interval at each point.
        seed: of the resampling.
        reps: bootstrap samples.
    """
    return _bootstrap(lambda *drawn: iqm(np.concatenate(drawn, 1), 1), tasks, seed, reps)


def mean_difference(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> Estimate:
    """Mean over tasks of the mean paired difference x - y, with Student's 95 % interval.

    Args:
        x, y: per task (R,), run i of both with the same seed and the same offline model. The
            share of a score that comes from these is the same in both and cancels.

    The interval has Welch and Satterthwaite's degrees of freedom.

    Raises:
        ValueError: the numbers of runs differ.
    """
    gaps = [_checked(a) - _checked(b) for a, b in _same_tasks(x, y, paired=True)]
    value = float(np.mean([g.mean() for g in gaps]))
    if min(len(g) for g in gaps) < 2:
        return Estimate(value, np.nan, np.nan)
    variances = np.array([g.var(ddof=1) / len(g) for g in gaps]) / len(gaps) ** 2
    total = variances.sum()
    if total == 0.0:
        return Estimate(value, value, value)
    shares = (variances / total) ** 2 / np.array([len(g) - 1 for g in gaps])
    half = student_quantile(1.0 / shares.sum()) * np.sqrt(total)
    return Estimate(value, value - half, value + half)


def student_quantile(freedom: float) -> float:
    """t with P(|T| < t) = 0.95 for Student's T of `freedom` >= 1 degrees of freedom.

    With T = sqrt(freedom) tan(angle) the density of the angle is cos(angle)^(freedom - 1).
    """
    edges = np.linspace(0.0, np.pi / 2, 200001)
    middles = 0.5 * (edges[1:] + edges[:-1])
    below = np.concatenate([[0.0], np.cumsum(np.cos(middles) ** (freedom - 1.0))])
    angle = np.interp(LEVEL * below[-1], below, edges)
    return float(np.sqrt(freedom) * np.tan(angle))


def probability_of_improvement(
    x: Sequence[np.ndarray], y: Sequence[np.ndarray], seed: int = 0, reps: int = REPS
) -> Estimate:
    """P(a run of x beats a run of y on a task), mean over tasks; a tie counts one half.

    x, y: per task the runs' values (R_x,), (R_y,); they need no pairing.
    """
    count = len(_same_tasks(x, y))

    def statistic(*drawn: np.ndarray) -> np.ndarray:
        wins = []
        for a, b in zip(drawn[:count], drawn[count:], strict=True):
            gap = a[:, :, None] - b[:, None, :]  # (reps, R_x, R_y)
            wins.append((0.5 * (1.0 + np.sign(gap))).mean((1, 2)))
        return np.mean(wins, axis=0)

    return _bootstrap(statistic, [*x, *y], seed, reps)


def _bootstrap(
    statistic: Callable[..., np.ndarray],
    strata: Sequence[np.ndarray],
    seed: int,
    reps: int,
) -> Estimate:
    """The statistic of arrays (reps, R, ...), one per stratum, and its percentile interval.

    Runs are drawn with replacement inside their stratum. Where a stratum has a single run
    there is no interval.
    """
    strata = [_checked(runs) for runs in strata]
    value = statistic(*(runs[None] for runs in strata))[0]
    if min(len(runs) for runs in strata) < 2:
        nowhere = np.full_like(value, np.nan)[()]
        return Estimate(value, nowhere, nowhere)
    generator = np.random.default_rng(seed)
    drawn = [
        runs[generator.integers(0, len(runs), size=(reps, len(runs)))] for runs in strata
    ]
    tail = 50.0 * (1.0 - LEVEL)
    low, high = np.percentile(statistic(*drawn), (tail, 100.0 - tail), axis=0)
    return Estimate(value, low, high)


def _same_tasks(x, y, paired: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    if len(x) != len(y) or not len(x):
        raise ValueError(
            f"compare the same tasks, at least one; not {len(x)} and {len(y)}"
        )
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        if paired and len(a) != len(b):
            raise ValueError(
                f"task {i} has {len(a)} and {len(b)} runs; pair them by seed"
            )
    return list(zip(x, y, strict=True))


def _checked(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0 or values.size == 0:
        raise ValueError("a statistic needs at least one value")
    if not np.isfinite(values).all():
        raise ValueError("a statistic needs finite values; a diverged run is no number")
    return values
