"""Every score of the benchmark. A higher score means: more like the online policy."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.exchange_accuracy.models import Models
from benchmarks.exchange_accuracy.rows import Rows
from corl_dare import behavior, exchange


class Score(NamedTuple):
    """A score of rows and what it needs.

    compute: (states (B, S), actions (B, A), references (B, n, A) or None) -> (B,).
    references: where they come from and how many per row; None if it needs none.
    evaluations: of networks, per row.
    ratio: whether it is a log-density ratio, online over behavior, in nats.
    """

    name: str
    compute: Callable[..., torch.Tensor]
    references: tuple[str, int] | None = None
    evaluations: int = 1
    ratio: bool = False


def make_scores(models: Models, generator: torch.Generator) -> list[Score]:
    """Every score of the benchmark, for one pair of policies, in the order of the tables."""
    return [
        *reference_scores(models),
        *support_scores(models, generator),
        *density_scores(models),
        *oracle_scores(models),
    ]


def _aligned(kind: str, sigma: float) -> Callable[..., torch.Tensor]:
    """The alignment score of `corl_dare.exchange` as a score of rows."""
    return lambda s, a, r: exchange.alignment_score(a, r, kind, sigma)


def reference_scores(models: Models) -> list[Score]:
    """Distances to reference actions of the diffusion model."""
    settings = models.settings
    k, sigma = settings.references, settings.kernel_sigma
    one, many = ("diffusion", 1), ("diffusion", k)
    guided, weak = ("guidance_scale", 1), ("small_guidance_scale", 1)
    paper_s, small_s = settings.guidance_scale, settings.small_guidance_scale
    distance = _aligned("gaussian_kl", sigma)

    def nearest(s, a, r):
        return (a.unsqueeze(1) - r).square().sum(-1).amin(1) / 2.0

    return [
        Score(f"guided reference, s = {paper_s:g} (paper)", distance, guided, 30),
        Score(f"guided reference, s = {small_s:g}", distance, weak, 30),
        Score("reference, unguided", distance, one, 15),
        Score("reference, log distance", _aligned("log_distance", sigma), one, 15),
        Score("reference, softmax KL", _aligned("softmax_kl", sigma), one, 15),
        Score(f"{k} references, mean", distance, many, 15 * k),
        Score(f"{k} references, nearest", nearest, many, 15 * k),
        Score(f"{k} references, kernel", _aligned("kernel", sigma), many, 15 * k),
    ]


def support_scores(models: Models, generator: torch.Generator) -> list[Score]:
    """Distances to unguided references that the energy weights afterwards."""
    k, sigma = models.settings.references, models.settings.kernel_sigma
    many = ("diffusion", k)

    def log_weights(s, r):
        t = torch.full((1,), behavior.T_MIN)
        energy = models.guidance.energy(r, t, s)  # (B, K)
        return (models.settings.guidance_scale * energy).log_softmax(-1)

    def resampled(s, a, r):
        chosen = log_weights(s, r).exp().multinomial(1, generator=generator)
        picked = r.gather(1, chosen.unsqueeze(-1).expand(-1, -1, r.shape[-1]))
        return exchange.alignment_score(a, picked)

    def weighted(s, a, r):
        weights = log_weights(s, r).exp()
        return exchange.alignment_score(a, r, "kernel", sigma, weights)

    return [
        Score("support, 1 resampled", resampled, many, 16 * k),
        Score("support, weighted kernel", weighted, many, 16 * k),
    ]


def density_scores(models: Models) -> list[Score]:
    """Likelihoods, log-density ratios and the classifier: no reference actions."""
    nu, gaussian = models.mixture.log_prob, models.gaussian.log_prob
    exact_pi, fitted_pi = models.online_policy.log_prob, models.fitted_online.log_prob
    return [
        Score("Gaussian likelihood", lambda s, a, r: -gaussian(s, a)),
        Score("mixture likelihood", lambda s, a, r: -nu(s, a)),
        Score("policy ratio", lambda s, a, r: exact_pi(s, a) - nu(s, a), None, 2, True),
        Score(
            "policy ratio, fitted policy",
            lambda s, a, r: fitted_pi(s, a) - nu(s, a),
            None,
            2,
            True,
        ),
        Score("classifier", lambda s, a, r: models.classifier(s, a), None, 1, True),
    ]


def oracle_scores(models: Models) -> list[Score]:
    """The same kinds of scores from the true policies in place of fitted models."""
    exact_nu, exact_pi = models.behavior_policy.log_prob, models.online_policy.log_prob
    distance = _aligned("gaussian_kl", models.settings.kernel_sigma)
    return [
        Score("oracle reference", distance, ("policy", 1)),
        Score("oracle likelihood", lambda s, a, r: -exact_nu(s, a)),
        Score(
            "oracle ratio",
            lambda s, a, r: exact_pi(s, a) - exact_nu(s, a),
            None,
            2,
            True,
        ),
    ]


@torch.no_grad()
def score_rows(
    models: Models, scores: list[Score], rows: Rows, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Score (N,) of every row by name, float64; scores share the references they can."""
    needed: dict[str, int] = {}
    for score in scores:
        if score.references is not None:
            source, n = score.references
            needed[source] = max(n, needed.get(source, 0))
    drawn = {
        source: models.references(source, rows.states, n, generator)
        for source, n in needed.items()
    }
    values = {}
    for score in scores:
        given = None
        if score.references is not None:
            source, n = score.references
            given = drawn[source][:, :n]
        values[score.name] = score.compute(rows.states, rows.actions, given).double()
    return values
