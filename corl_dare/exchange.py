"""The exchange of DARE: score every row, find the misplaced ones, swap them.

Dynamic Alignment for RElease, arXiv 2511.03828, Eq. 7-10. A batch has an offline and an
online half. Each row gets an alignment score d: how far its action is from a reference
action of the behavior model (higher = further). A Gaussian is fitted to the scores of
each half; where the two densities meet is the separation point tau. Offline rows at or
above tau and online rows below it are misplaced, and as many as both sides can give are
swapped for this update. An algorithm then keeps its conservative loss on the
offline-like half and releases it on the online-like one: that is the weight per row.

This file imports nothing of the project: copy it. With anybody's buffers:

>>> import torch
>>> generator = torch.Generator().manual_seed(0)
>>> def sample(shift):  # stands for buffer.sample(128): states, actions
...     states = torch.rand(128, 11, generator=generator)
...     noise = torch.randn(128, 3, generator=generator)
...     return [states, states[:, :3] + shift + 0.3 * noise]
>>> batch = [torch.cat(rows) for rows in zip(sample(0.0), sample(0.3))]
>>> references = batch[0][:, :3]  # stands for an action of your behavior model per state
>>> scores = alignment_score(batch[1], references)
>>> order, weight, stats = exchange(scores[:128], scores[128:], cap=32)
>>> states, actions = reorder(batch, order)  # offline-like rows first
>>> conservative_loss = actions.square().sum(1)  # stands for yours, one value per row
>>> loss = (weight * conservative_loss).mean()
>>> bool(0 < stats["exchanged"] <= 32)
True

Eq. 7 writes KL(a || a_hat) for two actions, which between two points is 0 or infinite.
The reading here: two Gaussians with the same standard deviation sigma around them, so
|a - a_hat|^2 / (2 sigma^2) nats. Then neither the direction of the KL nor sigma decides
anything. Monotone transforms do, since they change the Gaussian fits; the common ones
are other kinds of `alignment_score`.

What the exchange does to the halves: it makes them *more* distinct along d, by
construction. Under the paper's rule the mean gap never shrinks, and two halves of one
and the same law come out almost separated. So a large `amplitude_after` is no evidence
of a real difference.

Everything keeps fixed shapes and never waits for the device; float32 or float64.
Shapes: B rows, K references per row, A action dimension, N_off and N_on rows per half.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

ALIGNMENTS = ("gaussian_kl", "distance", "log_distance", "kernel", "softmax_kl")
RULES = ("threshold", "posterior", "direct", "share", "random")
WEIGHTS = ("hard", "soft")
SQUARED_DISTANCE_MIN = 1e-12  # floor of log_distance: float32 cannot tell such actions


# ---------------------------------------------------------------- scores


def alignment_score(
    actions: torch.Tensor,
    references: torch.Tensor,
    kind: str = "gaussian_kl",
    sigma: float = 1.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Alignment score d of each action, higher = further from its references (Eq. 7).

    Kinds, with w_k the weight of reference a_k:
        gaussian_kl: sum_k w_k |a - a_k|^2 / (2 sigma^2), nats.
        distance: sum_k w_k |a - a_k|, in units of the action.
        log_distance: log of gaussian_kl; the mean squared distance is floored at 1e-12.
        kernel: -log sum_k w_k exp(-|a - a_k|^2 / (2 sigma^2)), nats; -log of a kernel
            density up to a constant. Equals gaussian_kl for K = 1.
        softmax_kl: sum_k w_k KL(softmax(a) || softmax(a_k)), softmax over the action
            dimensions, nats. What a library call on raw actions computes: blind to a
            shift of all dimensions, 0 for A = 1. Only to probe what that would decide.

    Args:
        actions: (B, A).
        references: (B, A), or (B, K, A).
        sigma: standard deviation in units of the action; distance and softmax_kl have
            none.
        weights: (B, K), not negative, normalised here; None: uniform. A row whose
            weights are all 0 scores NaN.

    Returns:
        (B,).

    Raises:
        ValueError: unknown kind, shapes that do not fit, sigma not positive and finite.
    """
    if kind not in ALIGNMENTS:
        raise ValueError(f"alignment {kind!r} is not one of {', '.join(ALIGNMENTS)}")
    if not 0.0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    if references.ndim == 2:
        references = references.unsqueeze(1)  # (B, 1, A)
    fits = actions.ndim == 2 and references.ndim == 3
    if not fits or references.shape[::2] != actions.shape or 0 in references.shape[1:]:
        raise ValueError(
            f"actions {tuple(actions.shape)} and references {tuple(references.shape)} "
            "do not fit; pass (B, A) and (B, A) or (B, K, A)"
        )
    if weights is None:
        weights = torch.full_like(references[..., 0], 1.0 / references.shape[1])
    elif weights.shape != references.shape[:2]:
        raise ValueError(
            f"weights {tuple(weights.shape)} do not fit; pass one per reference, "
            f"{tuple(references.shape[:2])}"
        )
    else:
        weights = weights / weights.sum(1, keepdim=True)  # (B, K)
    actions = actions.unsqueeze(1)  # (B, 1, A)

    if kind == "softmax_kl":
        log_p, log_q = actions.log_softmax(-1), references.log_softmax(-1)
        return (weights * (log_p.exp() * (log_p - log_q)).sum(-1)).sum(1)
    squared = (actions - references).square().sum(-1)  # (B, K)
    if kind == "distance":
        return (weights * squared.sqrt()).sum(1)
    if kind == "kernel":
        return -(weights.log() - squared / (2.0 * sigma**2)).logsumexp(1)
    squared = (weights * squared).sum(1)  # (B,)
    if kind == "log_distance":
        return squared.clamp(min=SQUARED_DISTANCE_MIN).log() - math.log(2.0 * sigma**2)
    return squared / (2.0 * sigma**2)


# ---------------------------------------------------------------- two Gaussians


def fit_gaussian(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation (0-d each) of scores (N,).

    Equal scores give exactly that mean and 0.

    Raises:
        ValueError: no scores, or not a floating-point vector.
    """
    _check_scores(scores, "scores")
    # Centred first: the mean of N equal numbers may otherwise be off by a rounding.
    std, mean = torch.std_mean(scores - scores[0], correction=0)
    return scores[0] + mean, std


def separation_point(
    mean_off: torch.Tensor | float,
    std_off: torch.Tensor | float,
    mean_on: torch.Tensor | float,
    std_on: torch.Tensor | float,
) -> torch.Tensor:
    """Where two Gaussian densities are equal strictly between their means (Eq. 8-9).

    There is at most one such point. Where there is none, and where a standard deviation
    is 0, the means are equal or a value is not finite, the midpoint of the means.

    Args:
        mean_off, std_off, mean_on, std_on: numbers or tensors that broadcast; numbers
            alone count as float64.

    Returns:
        tau, in units of the score; 0-d for numbers and 0-d tensors.
    """
    mean_off, std_off, mean_on, std_on = _tensors(mean_off, std_off, mean_on, std_on)
    # In units of the mean gap the root is a fraction of the way from offline to online.
    # log1p of the difference keeps the digits when the deviations are almost equal.
    gap, wider = (mean_on - mean_off).abs(), std_on - std_off
    log_ratio = wider.sign() * (wider.abs() / torch.minimum(std_off, std_on)).log1p()
    u, v = std_off / gap, std_on / gap
    a, b = 2.0 * log_ratio * u.square(), 2.0 * log_ratio * v.square()
    fraction = u * (1.0 + b) / (u + v * (1.0 + b - a).sqrt())
    # At the border of having a root, rounding may put it an ulp outside.
    tau = torch.lerp(mean_off, mean_on, fraction.clamp(0.0, 1.0))
    # Both comparisons are false for NaN, which a width or gap of 0 makes of a or b.
    between = (a < 1.0) & (b > -1.0) & tau.isfinite()
    return torch.where(between, tau, 0.5 * mean_off + 0.5 * mean_on)


def posterior_offline(
    scores: torch.Tensor,
    mean_off: torch.Tensor | float,
    std_off: torch.Tensor | float,
    mean_on: torch.Tensor | float,
    std_on: torch.Tensor | float,
) -> torch.Tensor:
    """Probability P(offline-like | d) of finite scores (B,) under equal priors, (B,).

    A standard deviation of 0 is a point mass: if one is 0, scores on that mean belong to
    it and all others to the other half; if both are 0, scores belong to the nearest
    mean, 0.5 each on a tie.
    """
    return _log_odds(scores, mean_off, std_off, mean_on, std_on).sigmoid()


def _log_odds(
    scores: torch.Tensor,
    mean_off: torch.Tensor | float,
    std_off: torch.Tensor | float,
    mean_on: torch.Tensor | float,
    std_on: torch.Tensor | float,
) -> torch.Tensor:
    """Log of density_off / density_on (B,), nats; unlike the posterior not saturating."""
    scores, mean_off, std_off, mean_on, std_on = _tensors(
        scores, mean_off, std_off, mean_on, std_on
    )
    z_off, z_on = (scores - mean_off) / std_off, (scores - mean_on) / std_on
    odds = 0.5 * (z_on - z_off) * (z_on + z_off) + std_on.log() - std_off.log()
    point_off, point_on = std_off == 0, std_on == 0
    odds = torch.where(point_off, _certain(scores == mean_off, odds), odds)
    odds = torch.where(point_on, _certain(scores != mean_on, odds), odds)
    nearer = (scores - mean_on).abs() - (scores - mean_off).abs()  # > 0: to offline
    nearest = torch.where(nearer == 0, nearer, _certain(nearer > 0, odds))
    return torch.where(point_off & point_on, nearest, odds)


def _certain(offline: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    certain = torch.full_like(like, math.inf)
    return torch.where(offline, certain, -certain)


# ---------------------------------------------------------------- the exchange


class Exchange(NamedTuple):
    """What `exchange` decided; rows count in the stacked batch, offline rows first.

    order: (N_off + N_on,) int64, row i of the exchanged batch is row order[i] of the
        stacked one. The first N_off rows are offline-like.
    weight: (N_off + N_on,) conservative weight of each *exchanged* row: 1 keeps the
        conservative loss, 0 releases it.
    stats: 0-d tensors in the dtype of the scores:
        exchanged: M, swapped pairs.
        separation_point: tau.
        score_off_mean, score_off_std, score_on_mean, score_on_std: halves as drawn.
        candidates_off, candidates_on: p and q, rows that the rule calls misplaced.
        amplitude_before, amplitude_after: sup - inf of F_off - F_on, the halves'
            empirical distribution functions; from 0 (equal) to 1 (separated).
        inverted: 1 if the online rows do not score higher on average, else 0.
        refused: 1 if nothing is exchanged because a score is not finite, else 0.
    """

    order: torch.Tensor
    weight: torch.Tensor
    stats: dict[str, torch.Tensor]


def exchange(
    scores_off: torch.Tensor,
    scores_on: torch.Tensor,
    cap: int | None = None,
    rule: str = "threshold",
    *,
    weights: str = "hard",
    skip_inverted: bool = False,
    generator: torch.Generator | None = None,
) -> Exchange:
    """Swap misplaced rows between the offline and the online half of a batch (Eq. 8-10).

    Rules. M = min(p, q, cap) pairs are swapped, the k-th of one half with the k-th of
    the other; on ties the row with the lower index goes first.
        threshold (Eq. 10): offline rows with d >= tau, highest first, for online rows
            with d < tau, lowest first.
        posterior: offline rows with P(offline-like | d) < 1/2, least likely first, for
            online rows with P >= 1/2, most likely first. Unlike tau it knows that
            Gaussians of different width meet twice.
        direct (the paper's ablation): the N_off lowest scores of all rows become
            offline-like; on a tie rows stay where they are.
        share (ours): for scores that are a log-density ratio log pi(a|s) - log nu(a|s),
            in nats. The misplaced share of each half is estimated (`misplaced_share`),
            then each row is decided as Bayes would. It fits no Gaussian and swaps
            nothing where the scores say nothing.
        random: M as the threshold rule has it, rows drawn uniformly in each half: the
            control for whether it matters *which* rows are swapped.

    Without any swap, and with hard weights: a batch with a score that is not finite, or
    with scores so large that their standard deviation overflows.

    Args:
        scores_off, scores_on: alignment scores (N_off,), (N_on,); no gradient flows.
        cap: n, most pairs to swap; None: no cap; 0: nothing is swapped.
        rule: threshold, posterior, direct, share or random.
        weights: hard, 1 for the first N_off rows and 0 for the others; or soft,
            P(offline-like | d) by the fits to the halves as drawn, whatever rule and cap say:
            they only order the rows then.
        skip_inverted: swap nothing, with hard weights, if the online mean is not above the
            offline mean. There the rule, as the paper has it, swaps nearly everything.
        generator: of the random rule, on the device of the scores.

    Raises:
        ValueError: an empty half or scores that are not floating-point vectors,
            unknown rule or weights, cap not an integer of at least 0, random without a
            generator.
    """
    _check_scores(scores_off, "scores_off")
    _check_scores(scores_on, "scores_on")
    _check_choices(cap, rule, weights, generator)
    n_off, n_on, device = len(scores_off), len(scores_on), scores_off.device
    scores = torch.cat([scores_off, scores_on]).detach()  # (N_off + N_on,)
    moments = *fit_gaussian(scores[:n_off]), *fit_gaussian(scores[n_off:])
    tau = separation_point(*moments)
    # A score that is not finite makes a moment not finite.
    usable = torch.stack(moments).isfinite().all()
    inverted = moments[2] <= moments[0]
    values, index = scores.sort(stable=True)

    # Offline rows leave from the highest key down, online rows from the lowest up, so a
    # rule only has to say how many of them are misplaced.
    key = -_log_odds(scores, *moments) if rule == "posterior" else scores
    leaves_off, leaves_on = _misplaced(rule, key, tau, index, n_off)
    if rule == "random":
        rank_off = torch.randperm(n_off, generator=generator, device=device)
        rank_on = torch.randperm(n_on, generator=generator, device=device)
    else:
        rank_off = key[:n_off].argsort(descending=True, stable=True)
        rank_on = key[n_off:].argsort(stable=True)

    p, q = leaves_off.sum(), leaves_on.sum()
    pairs = min(n_off, n_on, n_off if cap is None else cap)  # M can be no larger
    count = torch.minimum(p, q).clamp(max=pairs)
    allowed = usable & ~inverted if skip_inverted else usable
    count = torch.where(allowed, count, 0)

    x, y = rank_off[:pairs], rank_on[:pairs] + n_off
    swapped = torch.arange(pairs, device=device) < count
    rows = torch.arange(n_off + n_on, device=device)
    order = rows.scatter(0, x, torch.where(swapped, y, x))
    order = order.scatter(0, y, torch.where(swapped, x, y))

    weight = (rows < n_off).to(scores.dtype)
    if weights == "soft":
        soft = posterior_offline(scores[order], *moments)
        weight = torch.where(allowed, soft, weight)
    stats = {
        "exchanged": count,
        "separation_point": tau,
        "score_off_mean": moments[0],
        "score_off_std": moments[1],
        "score_on_mean": moments[2],
        "score_on_std": moments[3],
        "candidates_off": p,
        "candidates_on": q,
        # Swaps undo themselves, so `order` is also where a row went.
        "amplitude_before": _amplitude(values, index < n_off, n_off),
        "amplitude_after": _amplitude(values, order[index] < n_off, n_off),
        "inverted": inverted,
        "refused": ~usable,
    }
    return Exchange(order, weight, {k: v.to(scores.dtype) for k, v in stats.items()})


def _misplaced(
    rule: str, key: torch.Tensor, tau: torch.Tensor, index: torch.Tensor, n_off: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which offline rows (N_off,) and which online rows (N_on,) a rule calls misplaced.

    `random` counts as many as `threshold`. `direct` tells only how many, not which: its
    marks are in the order of the scores.

    Args:
        key: (N_off + N_on,), minus the log-odds for `posterior`, else the scores.
        index: the order that sorts the scores.
    """
    if rule == "posterior":
        return key[:n_off] > 0, key[n_off:] <= 0
    if rule == "direct":
        # The sort is stable and offline rows come first, so on a tie they stay.
        return index[n_off:] < n_off, index[:n_off] >= n_off
    if rule == "share":
        off, on = key[:n_off], -key[n_off:]  # log-odds of being misplaced
        leaves_off = off + misplaced_share(off).logit() > 0
        leaves_on = on + misplaced_share(on).logit() > 0
        return leaves_off, leaves_on
    return key[:n_off] >= tau, key[n_off:] < tau


def misplaced_share(log_odds: torch.Tensor, strength: float = 10.0) -> torch.Tensor:
    """Share of misplaced rows of a half, estimated from how each row looks.

    The most probable weight c of a two-part mixture, under a prior that weighs as `strength`
    rows in their place: the root of sum_i sigmoid(l_i + logit c) = c (N + strength), or 0
    where there is none. The posterior is log-concave in c, so bisection finds it.

    Args:
        log_odds: (..., N), nats, of a row being misplaced if half of the rows were: the
            log-density ratio of the other half's policy to this half's.
        strength: rows.

    Returns:
        (...), from 0 to N / (N + strength).
    """
    low = torch.zeros_like(log_odds[..., 0])
    width = 0.5
    for _ in range(25):  # to 3e-8
        middle = low + width
        misplaced = (log_odds + middle.logit().unsqueeze(-1)).sigmoid().sum(-1)
        above = misplaced > middle * (log_odds.shape[-1] + strength)
        low = torch.where(above, middle, low)
        width /= 2
    return low


def reorder(batch: Iterable[torch.Tensor], order: torch.Tensor) -> list[torch.Tensor]:
    """The rows of every tensor (N_off + N_on, ...) of a stacked batch in the new order.

    Raises:
        ValueError: a tensor with another number of rows than `order`.
    """
    batch = list(batch)
    for i, tensor in enumerate(batch):
        if tensor.ndim == 0 or len(tensor) != len(order):
            raise ValueError(
                f"tensor {i} of the batch has shape {tuple(tensor.shape)}; the order "
                f"needs {len(order)} rows, offline and online stacked"
            )
    return [tensor.index_select(0, order) for tensor in batch]


def _amplitude(values: torch.Tensor, offline: torch.Tensor, n_off: int) -> torch.Tensor:
    """sup - inf of F_off - F_on, from sorted scores and which of them are offline."""
    cdf_off = offline.cumsum(0).to(values.dtype) / n_off
    cdf_on = (~offline).cumsum(0).to(values.dtype) / (len(values) - n_off)
    # Within a run of equal scores only the last sum is a value of the step function. The
    # value 0 before the first score is also the one after the last.
    within_run = torch.nn.functional.pad(values[1:] == values[:-1], (0, 1))
    difference = (cdf_off - cdf_on).masked_fill(within_run, 0.0)
    return difference.amax() - difference.amin()


def _tensors(*values: torch.Tensor | float) -> list[torch.Tensor]:
    """Numbers and tensors as tensors of one dtype and device."""
    given = [value for value in values if isinstance(value, torch.Tensor)]
    dtype, device = torch.float64, None
    if given:
        dtype, device = given[0].dtype, given[0].device
        for tensor in given[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return [torch.as_tensor(value, dtype=dtype, device=device) for value in values]


def _check_scores(scores: torch.Tensor, name: str) -> None:
    if scores.ndim != 1 or not len(scores) or not scores.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point vector of at least one score, not shape "
            f"{tuple(scores.shape)}, {scores.dtype}"
        )


def _check_choices(
    cap: int | None, rule: str, weights: str, generator: torch.Generator | None
) -> None:
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(RULES)}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is not one of {', '.join(WEIGHTS)}")
    whole = isinstance(cap, int) and not isinstance(cap, bool)
    if cap is not None and not (whole and cap >= 0):
        raise ValueError(f"cap must be an integer of at least 0, or None, not {cap!r}")
    if rule == "random" and generator is None:
        raise ValueError("rule 'random' needs a generator; pass a torch.Generator")
