"""Batches of misplaced rows, the rules that exchange them, and what came of it."""

import math
import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.exchange_accuracy.models import Models
from benchmarks.exchange_accuracy.rows import Rows
from benchmarks.exchange_accuracy.scores import Score, make_scores
from benchmarks.exchange_accuracy.settings import (
    CONTROLS,
    RATIO_RULES,
    RULES,
    Settings,
)
from corl_dare import exchange

# Bins of the calibration error.
BINS = 15


# ---------------------------------------------------------------- batches and rules


class Batches(NamedTuple):
    """R batches of N + N rows: their places in the stacked pools, and who acted.

    index: (R, 2N), places; the offline pool comes first in the stack, and the first N rows
    of a batch are its offline half.
    online: (R, 2N) bool, true where the online policy acted.
    """

    index: torch.Tensor
    online: torch.Tensor


def draw_batches(
    pools: tuple[int, int], share: float, half: int, count: int, rng: np.random.Generator
) -> Batches:
    """Batches without a row twice; round(share * half) rows of each half are misplaced.

    Raises:
        ValueError: a pool with fewer rows than a half, share outside [0, 1].
    """
    if min(pools) < half or not 0.0 <= share <= 1.0:
        raise ValueError(
            f"pools of {pools} rows, halves of {half}, share {share}: a pool must fill a "
            "half and the share lie in [0, 1]"
        )
    misplaced = round(share * half)
    batches = []
    for _ in range(count):
        own = rng.choice(pools[0], half, replace=False)
        other = rng.choice(pools[1], half, replace=False) + pools[0]
        off = np.concatenate([own[misplaced:], other[:misplaced]])
        on = np.concatenate([other[misplaced:], own[:misplaced]])
        # Shuffled, since on a tie the exchange takes the row with the lower index.
        batches.append(np.concatenate([rng.permutation(off), rng.permutation(on)]))
    index = torch.from_numpy(np.stack(batches))
    return Batches(index, index >= pools[0])


def decide(
    scores: torch.Tensor, rule: str, ratio: bool = False, share: float = 0.0
) -> torch.Tensor:
    """Order (R, 2N) of the exchanged rows, as that of `exchange`, for scores (R, 2N).

    Some rules are not named as in the hook:
        estimated share: the rule `share` of the hook.
        known share: the Bayes decision with the true share; the best there is.
        pooled em: not in the hook, see `pooled_odds`.
        lot in each half, lot over all rows: threshold with `permute` half and batch. The first
            half of the order are the rows that have its weight 1.

    Raises:
        ValueError: unknown rule, or one that needs a ratio and gets another score.
    """
    n = scores.shape[1] // 2
    if rule == "none":
        return torch.arange(2 * n).expand(len(scores), -1)
    if rule in ("estimated share", "known share"):
        if not ratio:
            raise ValueError(f"rule {rule!r} needs a score that is a log-density ratio")
        # Log-odds that a row is misplaced: first as if both were equally likely.
        log_odds = torch.cat([scores[:, :n], -scores[:, n:]], 1)
        if rule == "known share":
            prior = torch.full((len(scores), 2), share, dtype=scores.dtype)
        else:
            prior = exchange.misplaced_share(log_odds.view(-1, 2, n))
        log_odds = log_odds + prior.logit().repeat_interleave(n, 1)
        return swap(log_odds)
    if rule == "pooled em":
        odds = torch.vmap(lambda row: pooled_odds(row, n))(scores)
        return swap(torch.cat([-odds[:, :n], odds[:, n:]], 1))
    if rule.startswith("lot"):
        among = "half" if rule == "lot in each half" else "batch"
        generator = torch.Generator().manual_seed(0)
        orders = decide(scores, "threshold")
        return torch.stack(
            [exchange.permute_rows(order, n, among, generator) for order in orders]
        )
    cap = 32 if rule == "threshold, cap 32" else None
    name = rule.split(",")[0]
    return torch.vmap(lambda off, on: exchange.exchange(off, on, cap, name).order)(
        scores[:, :n], scores[:, n:]
    )


def pooled_odds(scores: torch.Tensor, n_off: int) -> torch.Tensor:
    """Log-odds of being offline-like (N,) by a mixture that knows no halves, nats.

    Two Gaussians and one free share, fitted to all scores by the steps of the rule em. They begin
    with the moments of the halves, and with equal shares. There is no test whether the halves
    differ.
    """
    z, _, log_ratio = exchange.em_start(scores, n_off)
    state = exchange.EMState(log_ratio, torch.full_like(z[:1], 0.5))
    all_rows = torch.ones_like(z).unsqueeze(0)
    state = exchange.em_steps(state, all_rows, z, exchange.EM_STEPS)
    return state.log_ratio + state.share.logit()


def swap(log_odds: torch.Tensor) -> torch.Tensor:
    """Order (R, 2N) that swaps pairs with positive log-odds (R, 2N), largest first."""
    n = log_odds.shape[1] // 2
    leaves = log_odds > 0
    count = torch.minimum(leaves[:, :n].sum(1), leaves[:, n:].sum(1)).unsqueeze(1)
    x = log_odds[:, :n].argsort(1, descending=True)
    y = log_odds[:, n:].argsort(1, descending=True) + n
    swapped = torch.arange(n) < count
    order = torch.arange(2 * n).repeat(len(log_odds), 1)
    order = order.scatter(1, x, torch.where(swapped, y, x))
    return order.scatter(1, y, torch.where(swapped, x, y))


# ---------------------------------------------------------------- measures


def auc(off: torch.Tensor, on: torch.Tensor) -> float:
    """Chance that a row of `on` (M,) scores above one of `off` (N,); a tie counts half."""
    ordered, on = off.sort().values, on.contiguous()
    below = torch.searchsorted(ordered, on, right=False).double()
    not_above = torch.searchsorted(ordered, on, right=True).double()
    return ((below + not_above) / 2.0 / len(off)).mean().item()


def outcome(order: torch.Tensor, online: torch.Tensor) -> dict[str, float | None]:
    """What an exchange did; order and truth (R, 2N).

    exchanged: pairs per batch.
    precision: share of moved rows that were misplaced.
    recall: share of misplaced rows that were moved.
    purity_before: share of the offline half, as drawn, that the behavior made.
    purity_off: the same share of the offline-like half.
    purity_on: share of the online-like half that the online policy made.
    purity_se: standard error of purity_off over batches.
    """
    n = order.shape[1] // 2
    moved = torch.cat([order[:, :n] >= n, order[:, n:] < n], 1)
    after = online.gather(1, order)
    misplaced = torch.cat([online[:, :n], ~online[:, n:]], 1)
    # A moved row that was misplaced is now where it belongs.
    right = moved & torch.cat([~after[:, :n], after[:, n:]], 1)
    purity = (~after[:, :n]).double().mean(1)
    moves, wrong, hits = (x.sum().item() for x in (moved, misplaced, right))
    several = len(order) > 1
    return {
        "exchanged": moves / 2 / len(order),
        "precision": hits / moves if moves else None,
        "recall": hits / wrong if wrong else None,
        "purity_before": (~online[:, :n]).double().mean().item(),
        "purity_off": purity.mean().item(),
        "purity_on": after[:, n:].double().mean().item(),
        "purity_se": purity.std().item() / math.sqrt(len(order)) if several else 0,
    }


def posterior(scores: torch.Tensor) -> torch.Tensor:
    """P(offline-like | d) (R, 2N) by the two Gaussians that are fitted to each batch."""
    n = scores.shape[1] // 2

    def one(off: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
        stats = exchange.exchange(off, on, cap=0).stats
        names = "score_off_mean", "score_off_std", "score_on_mean", "score_on_std"
        fits = [stats[name] for name in names]
        return exchange.posterior_offline(torch.cat([off, on]), *fits)

    return torch.vmap(one)(scores[:, :n], scores[:, n:])


def reliability(p: torch.Tensor, true: torch.Tensor) -> list[list[float]]:
    """Per bin of equal width: mean probability, share that is true, share of all rows."""
    p, true = p.flatten(), true.flatten().double()
    place = (p * BINS).long().clamp(max=BINS - 1)
    count, chance, hits = (
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, x)
        for x in (torch.ones_like(p), p, true)
    )
    return [
        [(c / m).item(), (h / m).item(), (m / len(p)).item()]
        for m, c, h in zip(count, chance, hits, strict=True)
        if m > 0
    ]


def calibration_error(bins: list[list[float]]) -> float:
    """Expected calibration error of `reliability`: mean |share true - mean probability|."""
    return sum(weight * abs(hit - chance) for chance, hit, weight in bins)


# ---------------------------------------------------------------- numbers of a seed


class Result:
    """Numbers of one seed, as lists of rows under named columns."""

    COLUMNS = {
        "auc": ["setting", "behavior", "online", "score", "share", "auc"],
        "exchange": [
            *("setting", "behavior", "online", "score", "share", "rule", "exchanged"),
            *("precision", "recall", "purity_before", "purity_off", "purity_on"),
            *("purity_se", "inverted"),
        ],
        "calibration": [
            *("setting", "behavior", "online", "score", "share", "posterior", "ece"),
        ],
        "reliability": [
            *("behavior", "online", "score", "share", "posterior", "bins"),
        ],
        "cost": ["score", "evaluations", "seconds_per_1000"],
    }

    def __init__(self):
        self.tables: dict[str, list[list]] = {name: [] for name in self.COLUMNS}

    def add(self, table: str, **values: Any) -> None:
        """One row of a table; floats keep five digits."""
        self.tables[table].append([_rounded(values[c]) for c in self.COLUMNS[table]])


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def evaluate(
    result: Result,
    setting: str,
    pair: tuple[str, str],
    scores: list[Score],
    values: dict[str, torch.Tensor],
    off_rows: int,
    share: float,
    settings: Settings,
) -> None:
    """AUC of every score and the outcome of every rule, into `result`.

    values: score name -> (pool,), the offline pool's `off_rows` rows first.
    """
    names = {"setting": setting, "behavior": pair[0], "online": pair[1]}
    pools = off_rows, len(next(iter(values.values()))) - off_rows
    # The same batches for all scores, rules and pairs.
    rng = np.random.default_rng([settings.seed, round(100 * share)])
    batches = draw_batches(pools, share, settings.half, settings.batches, rng)
    for score in scores:
        d = values[score.name]
        where = {**names, "score": score.name, "share": share}
        result.add("auc", **where, auc=auc(d[:off_rows], d[off_rows:]))
        d = d[batches.index]  # (R, 2N)
        means = d.view(len(d), 2, -1).mean(2)
        inverted = (means[:, 1] <= means[:, 0]).double().mean().item()
        rules = RULES + CONTROLS + (RATIO_RULES if score.ratio else ())
        rules += ("known share",) if score.name == "oracle ratio" else ()
        for rule in rules:
            numbers = outcome(decide(d, rule, score.ratio, share), batches.online)
            result.add("exchange", **where, rule=rule, inverted=inverted, **numbers)
        posteriors = {"two Gaussians": posterior(d)}
        if score.ratio:
            posteriors["logistic of the ratio"] = (-d).sigmoid()
        for name, p in posteriors.items():
            bins = reliability(p, ~batches.online)
            ece = calibration_error(bins)
            result.add("calibration", **where, posterior=name, ece=ece)
            if setting == "rollout" and share == 0.3:
                result.add("reliability", **where, posterior=name, bins=bins)


@torch.no_grad()
def time_scores(result: Result, models: Models, rows: Rows) -> None:
    """Processor seconds per 1000 rows, references included: median of five calls on 256."""
    states, actions = rows.states[:256], rows.actions[:256]
    generator = torch.Generator().manual_seed(0)
    for score in make_scores(models, generator):
        times = []
        # The first of the six calls only warms up.
        for _ in range(6):
            start, given = time.process_time(), None
            if score.references is not None:
                source, n = score.references
                given = models.references(source, states, n, generator)
            score.compute(states, actions, given)
            times.append(time.process_time() - start)
        seconds = statistics.median(times[1:]) * 1000 / len(states)
        result.add(
            "cost",
            score=score.name,
            evaluations=score.evaluations,
            seconds_per_1000=seconds,
        )
