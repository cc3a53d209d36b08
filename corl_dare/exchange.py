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
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

ALIGNMENTS = ("gaussian_kl", "distance", "log_distance", "kernel", "softmax_kl")
RULES = ("threshold", "posterior", "em", "direct", "share", "random")
WEIGHTS = ("hard", "soft")
PERMUTATIONS = ("none", "half", "batch")
SQUARED_DISTANCE_MIN = 1e-12  # floor of log_distance: float32 cannot tell such actions
EM_STEPS = 30  # of the rule em
EM_SHARES = (0.75, 0.25)  # where P(A | half) begins: at 1 and 0 it would stay
EM_STD_MIN = 0.05  # least std of A and B, in units of that of all scores
# The two shares differ if the likelihood says so at 1 %: a quantile of chi2, one degree.
EM_GATE = 6.63


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


# ---------------------------------------------------------------- a mixture of both halves


class Mixture(NamedTuple):
    """Two Gaussians A and B of all rows, of which each half has a share of its own.

    log_odds: (N_off + N_on,) log-odds of being of A, offline-like, nats; each with the
        share of the row's own half. Where the shares are not told apart every row is of
        its own half, which is inf or -inf: see `fit_mixture`.
    share_off, share_on: P(A | half), 0-d.
    statistic: twice what two shares gain in log-likelihood over one common share, for
        these A and B; 0-d.
    """

    log_odds: torch.Tensor
    share_off: torch.Tensor
    share_on: torch.Tensor
    statistic: torch.Tensor

    def stats(self) -> dict[str, torch.Tensor]:
        """What is worth a log, 0-d each."""
        return {
            "em_share_off": self.share_off,
            "em_share_on": self.share_on,
            "em_statistic": self.statistic,
        }


class EMState(NamedTuple):
    """Where the expectation-maximisation stands; everything in float64.

    log_ratio: (N,) log of density A / density B, nats.
    share: (2,) P(A | half), offline first.
    """

    log_ratio: torch.Tensor
    share: torch.Tensor


def fit_mixture(
    scores: torch.Tensor, n_off: int, state: EMState | None = None
) -> Mixture:
    """Fit A, B and both shares by expectation-maximisation (Dempster et al. 1977).

    Scores are standardised by the mean and the standard deviation of all of them. A and
    B begin with the moments of the offline and of the online half, their shares at 3/4
    and 1/4. `EM_STEPS` steps follow (`em_steps`). It climbs the likelihood times a prior
    Beta(2, 2) of each share, so that no share becomes 0 or 1.

    The shares are not told apart where the statistic is below `EM_GATE`, where the offline
    half has no larger share of A than the online one, or where a half has one row.

    Args:
        scores: (N_off + N_on,), offline rows first.
        n_off: N_off.
        state: of `em_state` on these scores; None: it is made here.
    """
    log_ratio, share = state or em_state(scores, n_off)
    offline = torch.arange(len(scores), device=scores.device) < n_off
    own = torch.where(offline, share[0], share[1])  # (N,)
    # The likelihood that one common share would have at its best.
    common = misplaced_share(log_ratio, strength=0.0)
    gain = _log_likelihoods(log_ratio, own) - _log_likelihoods(log_ratio, common)
    statistic = 2.0 * gain.sum()
    told_apart = (statistic >= EM_GATE) & (share[0] > share[1])
    if min(n_off, len(scores) - n_off) < 2:
        told_apart = torch.zeros_like(told_apart)
    in_place = _certain(offline, log_ratio)
    log_odds = torch.where(told_apart, log_ratio + own.logit(), in_place)
    return Mixture(log_odds, share[0], share[1], statistic)


def em_state(
    scores: torch.Tensor,
    n_off: int,
    steps: Callable[..., EMState] | None = None,
    chunk: int = EM_STEPS,
) -> EMState:
    """Where `EM_STEPS` steps on scores (N_off + N_on,) end, offline rows first.

    Args:
        steps: `em_steps`, perhaps compiled; it is called with `chunk` steps at a time,
            since a graph of all of them takes long to compile.
        chunk: a divisor of `EM_STEPS`.
    """
    make = steps or em_steps
    z, halves, log_ratio = em_start(scores, n_off)
    share = torch.stack([torch.full_like(z[0], start) for start in EM_SHARES])
    state = EMState(log_ratio, share)
    for _ in range(EM_STEPS // chunk):
        state = make(state, halves, z, chunk)
    return state


def em_start(
    scores: torch.Tensor, n_off: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the steps begin with, in float64: see `em_steps`.

    Returns:
        Standardised scores (N,), the rows' halves (2, N), and log density A / density B (N,)
        of the Gaussians with the moments of the halves.
    """
    rows = scores.detach().double()
    # Centred first, so that equal scores have a deviation of exactly 0.
    rows = rows - rows[0]
    std, mean = torch.std_mean(rows, correction=0)
    z = (rows - mean) / torch.where(std > 0, std, 1.0)
    off = (torch.arange(len(z), device=z.device) < n_off).to(z.dtype)
    halves = torch.stack([off, 1.0 - off])
    return z, halves, _gaussians(halves, halves, z)[0]


def em_steps(
    state: EMState, halves: torch.Tensor, z: torch.Tensor, count: int
) -> EMState:
    """So many steps of expectation-maximisation.

    Args:
        halves: (2, N), 1 where a row is of the offline half, and of the online half. Or
            ones (1, N): then all rows have one share in common, `state.share` (1,).
        z: (N,), standardised scores.
    """
    sizes = halves.sum(1)
    for _ in range(count):
        log_odds = state.log_ratio + state.share.logit() @ halves
        # Of A, and of B: one minus a probability near 1 has lost its digits.
        belongs = torch.stack([log_odds, -log_odds]).sigmoid()
        log_ratio, counts = _gaussians(belongs, halves, z)
        state = EMState(log_ratio, (counts[0] + 1.0) / (sizes + 2.0))
    return state


def _gaussians(
    belongs: torch.Tensor, halves: torch.Tensor, z: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussians A and B of rows that belong to them (2, N): their log-ratio (N,), nats.

    And how many rows of each half belong to them (2, halves). Neither of them can be left
    without rows: near its mean it is at least a 500th as dense as the other one.
    """
    moments = torch.stack([z, z.square()])
    sums = belongs @ torch.cat([halves, moments]).T  # (2, 4)
    counts = sums[:, :-2]
    mean, square = (sums[:, -2:] / counts.sum(1, keepdim=True)).unbind(1)
    variance = (square - mean.square()).clamp(min=EM_STD_MIN**2)
    nats = (z - mean.unsqueeze(1)).square() / variance.unsqueeze(1)
    nats = 0.5 * (nats + variance.log().unsqueeze(1))
    return nats[1] - nats[0], counts


def _log_likelihoods(log_ratio: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Log of the mixture's density of each row (N,), over that of B, nats."""
    return torch.logaddexp(log_ratio + share.log(), torch.log1p(-share))


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
        weight_mean, weight_zeros, weight_ones: see `weight_stats`.
        em_share_off, em_share_on, em_statistic: of the rule em alone, see `Mixture`.
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
    permute: str = "none",
    em: EMState | None = None,
) -> Exchange:
    """Swap misplaced rows between the offline and the online half of a batch (Eq. 8-10).

    Rules. M = min(p, q, cap) pairs are swapped, the k-th of one half with the k-th of
    the other; on ties the row with the lower index goes first.
        threshold (Eq. 10): offline rows with d >= tau, highest first, for online rows
            with d < tau, lowest first.
        posterior: offline rows with P(offline-like | d) < 1/2, least likely first, for
            online rows with P >= 1/2, most likely first. Unlike tau it knows that
            Gaussians of different width meet twice.
        em (ours): as posterior, with the probabilities of `fit_mixture`: two Gaussians
            fitted to all rows, of which each half has a share of its own. Swaps nothing
            where the likelihood does not tell the two shares apart, or where the
            offline half has the smaller one.
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
        rule: threshold, posterior, em, direct, share or random.
        weights: hard, 1 for the first N_off rows and 0 for the others; or soft,
            P(offline-like | d) as the rule has it, whatever the cap says. Rules without a
            probability of their own take that of the fits to the halves as drawn.
        skip_inverted: swap nothing, with hard weights, if the online mean is not above the
            offline mean. There the rule, as the paper has it, swaps nearly everything.
        generator: of the rule random and of `permute`, on the device of the scores.
        permute: the control for whether it matters *which* rows have the weights that
            the rule gave: half shuffles them among the rows of each half as drawn, batch
            among all rows. The weights stay as they are and the rows move.
        em: of `em_state` on these scores, for the rule em; None: it is made here.

    Raises:
        ValueError: an empty half or scores that are not floating-point vectors,
            unknown rule, weights or permute, cap not an integer of at least 0, random
            or permute without a generator.
    """
    _check_scores(scores_off, "scores_off")
    _check_scores(scores_on, "scores_on")
    _check_choices(cap, rule, weights, permute, generator)
    n_off, device = len(scores_off), scores_off.device
    n_on = len(scores_on)
    scores = torch.cat([scores_off, scores_on]).detach()  # (N_off + N_on,)
    moments = *fit_gaussian(scores[:n_off]), *fit_gaussian(scores[n_off:])
    # A score that is not finite makes a moment not finite.
    usable = torch.stack(moments).isfinite().all()
    inverted = moments[2] <= moments[0]
    allowed = usable & ~inverted if skip_inverted else usable
    mixture = fit_mixture(scores, n_off, em) if rule == "em" else None

    key = log_odds = scores
    if weights == "soft" or rule in _BY_ODDS:
        log_odds = _log_odds_of_rule(rule, scores, n_off, moments, mixture)
    if rule in ("posterior", "em"):
        key = -log_odds
    tau = separation_point(*moments)
    values, index = scores.sort(stable=True)
    # Offline rows leave from the highest key down, online rows from the lowest up, so a
    # rule only has to say how many of them are misplaced.
    leaves_off, leaves_on = _misplaced(rule, key, log_odds, tau, index, n_off)
    if rule == "random":
        rank_off = torch.randperm(n_off, generator=generator, device=device)
        rank_on = torch.randperm(n_on, generator=generator, device=device)
    else:
        rank_off = key[:n_off].argsort(descending=True, stable=True)
        rank_on = key[n_off:].argsort(stable=True)

    p, q = leaves_off.sum(), leaves_on.sum()
    pairs = min(n_off, n_on, n_off if cap is None else cap)  # M can be no larger
    count = torch.where(allowed, torch.minimum(p, q).clamp(max=pairs), 0)
    order = _swap(rank_off[:pairs], rank_on[:pairs] + n_off, count, n_off + n_on)
    weight = (torch.arange(n_off + n_on, device=device) < n_off).to(scores.dtype)
    if weights == "soft":
        soft = log_odds[order].sigmoid().to(scores.dtype)
        weight = torch.where(allowed, soft, weight)
    stats = {
        "exchanged": count,
        "separation_point": tau,
        **dict(zip(_MOMENTS, moments, strict=True)),
        "candidates_off": p,
        "candidates_on": q,
        # Swaps undo themselves, so `order` is also where a row went.
        "amplitude_before": _amplitude(values, index < n_off, n_off),
        "amplitude_after": _amplitude(values, order[index] < n_off, n_off),
        "inverted": inverted,
        "refused": ~usable,
        **weight_stats(weight),
    }
    if mixture is not None:
        stats |= mixture.stats()
    if permute != "none":
        order = permute_rows(order, n_off, permute, generator)
    return Exchange(order, weight, {k: v.to(scores.dtype) for k, v in stats.items()})


# Rules that decide by log-odds of their own.
_BY_ODDS = ("posterior", "em", "share")
_MOMENTS = ("score_off_mean", "score_off_std", "score_on_mean", "score_on_std")


def _log_odds_of_rule(
    rule: str,
    scores: torch.Tensor,
    n_off: int,
    moments: tuple[torch.Tensor, ...],
    mixture: Mixture | None,
) -> torch.Tensor:
    """Log-odds of being offline-like (N_off + N_on,), nats, as a rule sees them.

    Rules without odds of their own have those of the fits to the halves as drawn.
    """
    if mixture is not None:
        return mixture.log_odds
    if rule != "share":
        return _log_odds(scores, *moments)
    off, on = scores[:n_off], -scores[n_off:]  # log-odds of being misplaced
    leaves_off = off + misplaced_share(off).logit()
    leaves_on = on + misplaced_share(on).logit()
    return torch.cat([-leaves_off, leaves_on])


def _swap(
    x: torch.Tensor, y: torch.Tensor, count: torch.Tensor, rows: int
) -> torch.Tensor:
    """The order (rows,) in which the first `count` rows of x and y have changed places."""
    swapped = torch.arange(len(x), device=x.device) < count
    order = torch.arange(rows, device=x.device)
    order = order.scatter(0, x, torch.where(swapped, y, x))
    return order.scatter(0, y, torch.where(swapped, x, y))


def permute_rows(
    order: torch.Tensor, n_off: int, among: str, generator: torch.Generator | None
) -> torch.Tensor:
    """An order (N_off + N_on,) in which every row has been put at the place of another by lot.

    Args:
        order: of `exchange`; rows count in the stacked batch, offline rows first.
        among: half, rows that were drawn from the same buffer; batch, all rows.
    """
    return draw_lots(n_off, len(order), among, generator, order.device)[order]


def draw_lots(
    n_off: int,
    rows: int,
    among: str,
    generator: torch.Generator | None,
    device: torch.device | str,
) -> torch.Tensor:
    """For each of the rows (N_off + N_on,) the row that takes its place, see `permute_rows`."""
    sizes = [n_off, rows - n_off] if among == "half" else [rows]
    lots = [torch.randperm(size, generator=generator, device=device) for size in sizes]
    return torch.cat([lots[0], *(lot + n_off for lot in lots[1:])])


def weight_stats(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What two releases must share to be compared, 0-d each, of weights (B,).

    weight_mean: mean; weight_zeros, weight_ones: shares of exactly 0 and exactly 1.
    """
    return {
        "weight_mean": weight.mean(),
        "weight_zeros": (weight == 0).to(weight.dtype).mean(),
        "weight_ones": (weight == 1).to(weight.dtype).mean(),
    }


def _misplaced(
    rule: str,
    key: torch.Tensor,
    log_odds: torch.Tensor,
    tau: torch.Tensor,
    index: torch.Tensor,
    n_off: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which offline rows (N_off,) and which online rows (N_on,) a rule calls misplaced.

    `random` counts as many as `threshold`. `direct` tells only how many, not which: its
    marks are in the order of the scores.

    Args:
        key: (N_off + N_on,), the higher the more a row looks online.
        log_odds: (N_off + N_on,), of being offline-like; read for `_BY_ODDS` alone.
        index: the order that sorts the scores.
    """
    if rule in ("posterior", "em"):
        return log_odds[:n_off] < 0, log_odds[n_off:] >= 0
    if rule == "direct":
        # The sort is stable and offline rows come first, so on a tie they stay.
        return index[n_off:] < n_off, index[:n_off] >= n_off
    if rule == "share":
        # A row stays where nothing tells it apart.
        return log_odds[:n_off] < 0, log_odds[n_off:] > 0
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
    cap: int | None,
    rule: str,
    weights: str,
    permute: str,
    generator: torch.Generator | None,
) -> None:
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is not one of {', '.join(RULES)}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r} is not one of {', '.join(WEIGHTS)}")
    if permute not in PERMUTATIONS:
        raise ValueError(f"permute {permute!r} is not one of {', '.join(PERMUTATIONS)}")
    whole = isinstance(cap, int) and not isinstance(cap, bool)
    if cap is not None and not (whole and cap >= 0):
        raise ValueError(f"cap must be an integer of at least 0, or None, not {cap!r}")
    if rule == "random" and generator is None:
        raise ValueError("rule 'random' needs a generator; pass a torch.Generator")
    if permute != "none" and generator is None:
        raise ValueError(
            f"permute {permute!r} needs a generator; pass a torch.Generator"
        )
