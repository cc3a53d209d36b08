"""How often is the exchange right? Scores and rules against the Bayes decision.

    python benchmarks/exchange_accuracy.py --seed 0   # ten minutes on one core
    python benchmarks/exchange_accuracy.py --report   # tables and figures again

Rows of two known policies are mixed into batches of an offline and an online half. A share of
each half is misplaced: rows of the other policy. Who acted is known for every row, and so are the
exact log-densities of both policies, so the best decision that can be made from an action is
known too. Every score ranks the rows, every rule exchanges pairs, and what comes out is compared
with the truth: AUC, precision and recall of the exchange, purity of the halves, calibration of
the posterior, cost. docs/exchange_accuracy.md says what each number means and what came out.

The behavior models are small and trained for minutes, not for the paper's 600 000 updates of 4096
rows; every size is a flag and part of the result. Scores and rules that the hook does not have
(resampled support, the nearest of K references, a classifier) live here.
"""

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from corl import files, tasks
from corl.data import schema, sources
from corl.machine import describe, git_commit, versions
from corl.standin import collect, policies

sys.path.insert(0, str(Path(__file__).parent.parent))

from corl_dare.behavior import (
    T_MIN,
    BehaviorModel,
    fit_cached,
    noise_schedule,
)
from corl_dare.exchange import (
    alignment_score,
    exchange,
    misplaced_share,
    posterior_offline,
)
from corl_dare.guidance import EnergyNetwork, contrastive_loss, energy_gradient

ROOT = Path(__file__).parent.parent
OUT = ROOT / "results" / "exchange_accuracy"
LEVELS = ("random", "medium", "expert")
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9)  # misplaced in each half; 0.9: inverted
RULES = ("none", "threshold", "threshold, cap 32", "posterior", "direct")
RATIO_RULES = ("estimated share",)  # for scores that are a log-density ratio
BINS = 15  # of the calibration error
DISCOUNT = 0.99  # of the Q that the energy follows


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; every field is a flag."""

    robot: str = "hopper"
    seed: int = 0
    fit_rows: int = 30_000  # rows per policy and half that models are fitted on
    pool_rows: int = 2_000  # other rows, per policy and half, that are scored
    batches: int = 200
    half: int = 128  # rows of a half batch
    references: int = 16  # K
    kernel_sigma: float = 0.2  # of the kernel density over references, in action units
    diffusion_width: float = 0.25  # paper: 1
    diffusion_updates: int = 6_000  # paper: 600 000
    diffusion_batch: int = 512  # paper: 4096
    diffusion_lr: float = 3e-3  # paper: 1e-4
    density_updates: int = 4_000  # of the Gaussian and the mixture
    density_batch: int = 256
    density_lr: float = 1e-3
    q_updates: int = 2_000
    energy_updates: int = 1_500  # paper: 1 000 000
    energy_states: int = 64  # per update; paper: 256
    energy_width: int = 128  # paper: 256
    guidance_scale: float = 8.0  # paper's for hopper-medium
    small_guidance_scale: float = 2.0  # paper's for hopper-medium-expert
    energy_beta: float = 3.0
    classifier_updates: int = 1_000


# ---------------------------------------------------------------- policies and rows


class Policy:
    """A policy with an exact density; None in place of a network: uniform in [-1, 1]."""

    def __init__(
        self, level: str, network: policies.TanhGaussianPolicy | None, action_dim: int
    ):
        self.level, self.action_dim = level, action_dim
        self.network = None if network is None else network.double()

    @torch.no_grad()
    def log_prob(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-density (B,) in nats, float64, of actions (B, A) in raw states (B, S)."""
        if self.network is None:
            nats = -self.action_dim * math.log(2.0)
            return torch.full((len(states),), nats, dtype=torch.float64)
        return self.network.log_prob(states.double(), actions.double())

    @torch.no_grad()
    def sample(
        self, states: torch.Tensor, n: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Actions (B, n, A), float32."""
        shape = len(states) * n, self.action_dim
        if self.network is None:
            actions = 2.0 * torch.rand(shape, generator=generator) - 1.0
        else:
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            actions, _ = self.network(states.double().repeat_interleave(n, 0), noise)
        return actions.float().view(len(states), n, -1)


def load_policy(robot: str, level: str) -> Policy:
    """The shipped policy of a level.

    Raises:
        ValueError: no such policy is shipped.
    """
    if level not in policies.kinds(robot):
        raise ValueError(
            f"no {level} policy of {robot} is shipped; there are: "
            f"{', '.join(set(LEVELS) & set(policies.kinds(robot))) or 'none'}"
        )
    network = None
    if level != "random":
        network = policies.load_policy(
            policies.POLICY_DIR / f"{robot}_{level}.safetensors"
        )
    return Policy(level, network, tasks.ROBOTS[robot].action_dim)


class Rows(NamedTuple):
    """Raw states (N, S), actions (N, A), discounted returns to go (N,), nan if unknown."""

    states: torch.Tensor
    actions: torch.Tensor
    returns: torch.Tensor

    def take(self, index: torch.Tensor) -> "Rows":
        return Rows(*(field[index] for field in self))


def stack(*parts: Rows) -> Rows:
    return Rows(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def collect_rows(
    robot: str, level: str, rows: int, seed: int, folder: Path
) -> tuple[Rows, dict]:
    """Rows of a policy's own episodes, rolled out once, and where they come from."""
    task = f"{robot}-{level}-v2"
    digests = "".join(f"-{d[:8]}" for d in policies.fingerprint(task).values())
    path = folder / f"{task}-{rows}-seed{seed}{digests}.hdf5"
    raw = schema.load_hdf5(
        collect.collect(task, rows, path, seed, progress=sys.stderr.isatty()), task
    )
    found = Rows(
        torch.from_numpy(raw["observations"]),
        torch.from_numpy(raw["actions"]),
        torch.from_numpy(returns_to_go(raw)),
    )
    ends = np.flatnonzero(raw["terminals"] | raw["timeouts"]) + 1
    if not len(ends):
        raise ValueError(
            f"{rows} rows of {task} hold no finished episode; raise fit_rows"
        )
    episodes = np.add.reduceat(raw["rewards"], [0, *ends[:-1]])
    source = {
        "source": "self-collected",
        "task": task,
        "rows": rows,
        "seed": seed,
        "sha256": files.sha256(path),
        "episode_returns": [float(f(episodes)) for f in (np.min, np.mean, np.max)],
    }
    return found, source


def returns_to_go(raw: dict[str, np.ndarray]) -> np.ndarray:
    """Discounted return to go (N,) float32; nan where a cut hides over 5 % of its weight."""
    rewards, terminals, timeouts = raw["rewards"], raw["terminals"], raw["timeouts"]
    hidden = math.ceil(math.log(0.05) / math.log(DISCOUNT))  # steps before a cut
    returns, total, steps = np.empty(len(rewards)), 0.0, 0
    cut = True  # the last row of the file ends no episode
    for i in reversed(range(len(rewards))):
        if terminals[i] or timeouts[i]:
            total, steps, cut = 0.0, 0, not terminals[i]
        total, steps = rewards[i] + DISCOUNT * total, steps + 1
        returns[i] = math.nan if cut and steps <= hidden else total
    return returns.astype(np.float32)


def split(rows: Rows, sizes: list[int], rng: np.random.Generator) -> list[Rows]:
    """Disjoint random parts of the given sizes."""
    order = torch.from_numpy(rng.permutation(len(rows.states)))
    return [rows.take(part) for part in order.split([*sizes, len(order) - sum(sizes)])][
        : len(sizes)
    ]


def contaminate(own: Rows, other: Rows, share: float) -> Rows:
    """As many rows as `own`, of which a share are those of `other`."""
    foreign = round(share * len(own.states))
    index = torch.arange(len(own.states))
    return stack(own.take(index[foreign:]), other.take(index[:foreign]))


# ---------------------------------------------------------------- fits


class Regressor(nn.Module):
    """A ReLU network on standardized (s, a), one output."""

    def __init__(self, states: torch.Tensor, actions: torch.Tensor, seed: int):
        super().__init__()
        inputs = torch.cat([states, actions], -1)
        std, mean = torch.std_mean(inputs, 0)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std.clamp(min=1e-3))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(inputs.shape[1], 128),
                nn.ReLU(),
                nn.Linear(128, 128),
                nn.ReLU(),
                nn.Linear(128, 1),
            )

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """(B, S), (B, A) -> (B,)"""
        inputs = (torch.cat([states, actions], -1) - self.mean) / self.std
        return self.net(inputs).squeeze(-1)


def regress(
    rows: Rows, targets: torch.Tensor, loss: Callable, updates: int, seed: int
) -> Regressor:
    """A network trained on batches of 256 rows with targets (N,); Adam, rate 1e-3 to 0."""
    model = Regressor(rows.states, rows.actions, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        index = torch.randint(len(targets), (256,), generator=generator)
        value = loss(model(rows.states[index], rows.actions[index]), targets[index])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def fit_classifier(off: Rows, on: Rows, updates: int, seed: int) -> Regressor:
    """Log-odds that a row comes from the online buffer rather than the offline one."""
    labels = torch.cat([torch.zeros(len(off.states)), torch.ones(len(on.states))])
    loss = F.binary_cross_entropy_with_logits
    return regress(stack(off, on), labels, loss, updates, seed)


class Guidance(NamedTuple):
    """An energy network and how well it was fitted."""

    energy: EnergyNetwork
    loss: float  # cross-entropy of the last updates, nats
    entropy: float  # its lower bound: the entropy of the labels, nats

    def gradient(self, x: torch.Tensor, t: float, states: torch.Tensor) -> torch.Tensor:
        return energy_gradient(self.energy, x, t, states)


def fit_guidance(
    behavior: BehaviorModel, off: Rows, on: Rows, span: float, settings: Settings
) -> Guidance:
    """An energy that follows Q of the data's own policies, as the hook's follows Q.

    Q is a regression of the discounted returns to go of both buffers' rows: the value of
    the policies that acted. `span` is that of the undiscounted returns; as in the hook Q is
    scaled as if it were 1000.
    """
    rows = stack(off, on)
    known = rows.take(rows.returns.isfinite().nonzero().squeeze(1))
    std, mean = torch.std_mean(known.returns)
    targets = (known.returns - mean) / std
    q = regress(known, targets, F.mse_loss, settings.q_updates, settings.seed)

    generator = torch.Generator().manual_seed(settings.seed)
    index = torch.randint(len(rows.states), (2048,), generator=generator)
    states = rows.states[index]  # (2048, S)
    support = sample_clipped(behavior, states, 16, generator)  # (2048, 16, A)
    repeated = states.repeat_interleave(16, 0)
    values = (q(repeated, support.flatten(0, 1)) * std).view(-1, 16) * 1000.0 / span
    energy = EnergyNetwork(
        behavior.state_dim,
        behavior.action_dim,
        hidden_dim=settings.energy_width,
        seed=settings.seed,
    )
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3, fused=True)
    losses = []
    for _ in range(settings.energy_updates):
        index = torch.randint(2048, (settings.energy_states,), generator=generator)
        loss = contrastive_loss(
            energy,
            support[index],
            values[index],
            states[index],
            settings.energy_beta,
            generator,
            noise_schedule,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    labels = (settings.energy_beta * values).log_softmax(-1)
    entropy = -(labels.exp() * labels).sum(-1).mean()
    last = torch.stack(losses[-200:]).mean()
    return Guidance(energy.requires_grad_(False), last.item(), entropy.item())


def sample_clipped(
    behavior: BehaviorModel,
    states: torch.Tensor,
    n: int,
    generator: torch.Generator,
    **options,
) -> torch.Tensor:
    """Reference actions (B, n, A), clipped to [-1, 1] as the hook does."""
    parts = [
        behavior.sample(chunk, n, generator, **options) for chunk in states.split(256)
    ]
    return torch.cat(parts).clamp(-1.0, 1.0)


# ---------------------------------------------------------------- scores


@dataclass
class Models:
    """What the scores of one pair of policies are computed from."""

    behavior: Policy
    online: Policy
    diffusion: BehaviorModel
    gaussian: BehaviorModel
    mixture: BehaviorModel
    fitted_online: BehaviorModel  # a mixture fitted on the rows of the online half
    guidance: Guidance
    classifier: Regressor
    settings: Settings

    def references(
        self, source: str, states: torch.Tensor, n: int, generator: torch.Generator
    ) -> torch.Tensor:
        """Reference actions (B, n, A): of the diffusion, guided or not, or of the policy."""
        if source == "policy":
            return self.behavior.sample(states, n, generator)
        options = {}
        if source != "diffusion":
            options = {
                "guidance": self.guidance.gradient,
                "scale": getattr(self.settings, source),
            }
        return sample_clipped(self.diffusion, states, n, generator, **options)


class Score(NamedTuple):
    """A score: higher = more like the online policy.

    compute: (states (B, S), actions (B, A), references (B, n, A) or None) -> (B,).
    references: where they come from and how many per row.
    evaluations: of networks, per row.
    ratio: whether it is a log-density ratio, online over behavior, in nats.
    """

    name: str
    compute: Callable[..., torch.Tensor]
    references: tuple[str, int] | None = None
    evaluations: int = 1
    ratio: bool = False


def make_scores(models: Models, generator: torch.Generator) -> list[Score]:
    """Every score of the benchmark, for one pair of policies."""
    k, sigma = models.settings.references, models.settings.kernel_sigma
    nu, gaussian = models.mixture.log_prob, models.gaussian.log_prob
    exact_nu, exact_pi = models.behavior.log_prob, models.online.log_prob

    def aligned(kind: str) -> Callable[..., torch.Tensor]:
        return lambda s, a, r: alignment_score(a, r, kind, sigma)

    def nearest(s, a, r):
        return (a.unsqueeze(1) - r).square().sum(-1).amin(1) / 2.0

    def log_weights(s, r):
        t = torch.full((1,), T_MIN)
        energy = models.guidance.energy(r, t, s)  # (B, K)
        return (models.settings.guidance_scale * energy).log_softmax(-1)

    def resampled(s, a, r):
        chosen = log_weights(s, r).exp().multinomial(1, generator=generator)
        picked = r.gather(1, chosen.unsqueeze(-1).expand(-1, -1, r.shape[-1]))
        return alignment_score(a, picked)

    def weighted(s, a, r):
        return alignment_score(a, r, "kernel", sigma, log_weights(s, r).exp())

    one, many = ("diffusion", 1), ("diffusion", k)
    guided, weak = ("guidance_scale", 1), ("small_guidance_scale", 1)
    s8, s2 = (f"{getattr(models.settings, name):g}" for name, _ in (guided, weak))
    return [
        Score(f"guided reference, s = {s8} (paper)", aligned("gaussian_kl"), guided, 30),
        Score(f"guided reference, s = {s2}", aligned("gaussian_kl"), weak, 30),
        Score("reference, unguided", aligned("gaussian_kl"), one, 15),
        Score("reference, log distance", aligned("log_distance"), one, 15),
        Score("reference, softmax KL", aligned("softmax_kl"), one, 15),
        Score(f"{k} references, mean", aligned("gaussian_kl"), many, 15 * k),
        Score(f"{k} references, nearest", nearest, many, 15 * k),
        Score(f"{k} references, kernel", aligned("kernel"), many, 15 * k),
        Score("support, 1 resampled", resampled, many, 16 * k),
        Score("support, weighted kernel", weighted, many, 16 * k),
        Score("Gaussian likelihood", lambda s, a, r: -gaussian(s, a)),
        Score("mixture likelihood", lambda s, a, r: -nu(s, a)),
        Score("policy ratio", lambda s, a, r: exact_pi(s, a) - nu(s, a), None, 2, True),
        Score(
            "policy ratio, fitted policy",
            lambda s, a, r: models.fitted_online.log_prob(s, a) - nu(s, a),
            None,
            2,
            True,
        ),
        Score("classifier", lambda s, a, r: models.classifier(s, a), None, 1, True),
        Score("oracle reference", aligned("gaussian_kl"), ("policy", 1)),
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


# ---------------------------------------------------------------- batches and rules


class Batches(NamedTuple):
    """R batches of N + N rows: places in the stacked pools, and who acted.

    index: (R, 2N), offline pool first, the first N rows are the offline half.
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
        # Shuffled: on a tie the exchange takes the row with the lower index.
        batches.append(np.concatenate([rng.permutation(off), rng.permutation(on)]))
    index = torch.from_numpy(np.stack(batches))
    return Batches(index, index >= pools[0])


def decide(scores: torch.Tensor, rule: str, ratio: bool = False, share: float = 0.0):
    """Order (R, 2N) of the exchanged rows, as of `exchange`, for scores (R, 2N).

    Beyond the hook's rules:
        estimated share: the hook's rule `share`.
        known share: the Bayes decision with the true share; the best there is.

    Raises:
        ValueError: unknown rule, or one that needs a ratio and gets another score.
    """
    n = scores.shape[1] // 2
    if rule == "none":
        return torch.arange(2 * n).expand(len(scores), -1)
    if rule in ("estimated share", "known share"):
        if not ratio:
            raise ValueError(f"rule {rule!r} needs a score that is a log-density ratio")
        log_odds = torch.cat([scores[:, :n], -scores[:, n:]], 1)  # of being misplaced
        if rule == "known share":
            prior = torch.full((len(scores), 2), share, dtype=scores.dtype)
        else:
            prior = misplaced_share(log_odds.view(-1, 2, n))
        log_odds = log_odds + prior.logit().repeat_interleave(n, 1)
        return swap(log_odds)
    cap = 32 if rule == "threshold, cap 32" else None
    name = rule.split(",")[0]
    return torch.vmap(lambda off, on: exchange(off, on, cap, name).order)(
        scores[:, :n], scores[:, n:]
    )


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


def measure(order: torch.Tensor, online: torch.Tensor) -> dict[str, float | None]:
    """What an exchange did; order and truth (R, 2N).

    exchanged: pairs per batch. precision: share of moved rows that were misplaced.
    recall: share of misplaced rows that were moved. purity_off, purity_on: share of the
    offline-like half that the behavior made, and of the other half that the online policy
    made; purity_before is that of the offline half as drawn; purity_se: standard error
    of purity_off over batches.
    """
    n = order.shape[1] // 2
    moved = torch.cat([order[:, :n] >= n, order[:, n:] < n], 1)
    after = online.gather(1, order)
    misplaced = torch.cat([online[:, :n], ~online[:, n:]], 1)
    # A moved row that was misplaced is now where it belongs.
    right = moved & torch.cat([~after[:, :n], after[:, n:]], 1)
    purity = (~after[:, :n]).double().mean(1)
    moves, wrong, hits = (x.sum().item() for x in (moved, misplaced, right))
    return {
        "exchanged": moves / 2 / len(order),
        "precision": hits / moves if moves else None,
        "recall": hits / wrong if wrong else None,
        "purity_before": (~online[:, :n]).double().mean().item(),
        "purity_off": purity.mean().item(),
        "purity_on": after[:, n:].double().mean().item(),
        "purity_se": purity.std().item() / math.sqrt(len(order))
        if len(order) > 1
        else 0,
    }


def posterior(scores: torch.Tensor) -> torch.Tensor:
    """P(offline-like | d) (R, 2N) by the two Gaussians that each batch fits."""
    n = scores.shape[1] // 2

    def one(off: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
        stats = exchange(off, on, cap=0).stats
        names = "score_off_mean", "score_off_std", "score_on_mean", "score_on_std"
        return posterior_offline(torch.cat([off, on]), *(stats[name] for name in names))

    return torch.vmap(one)(scores[:, :n], scores[:, n:])


def reliability(p: torch.Tensor, true: torch.Tensor) -> list[list[float]]:
    """Per bin of equal width: mean probability, share that is true, share of all rows."""
    p, true = p.flatten(), true.flatten().double()
    place = (p * BINS).long().clamp(max=BINS - 1)
    count, chance, hits = (
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, x)
        for x in (torch.ones_like(p), p, true)
    )
    rows = [
        [(c / m).item(), (h / m).item(), (m / len(p)).item()]
        for m, c, h in zip(count, chance, hits, strict=True)
        if m > 0
    ]
    return rows


def calibration_error(bins: list[list[float]]) -> float:
    """Expected calibration error of `reliability`: mean |share true - mean probability|."""
    return sum(weight * abs(hit - chance) for chance, hit, weight in bins)


# ---------------------------------------------------------------- experiment


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
        self.tables = {name: [] for name in self.COLUMNS}

    def add(self, table: str, **values) -> None:
        self.tables[table].append([_short(values[c]) for c in self.COLUMNS[table]])


def _short(value):
    if isinstance(value, list):
        return [_short(x) for x in value]
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
        rules = RULES + (RATIO_RULES if score.ratio else ())
        rules += ("known share",) if score.name == "oracle ratio" else ()
        for rule in rules:
            numbers = measure(decide(d, rule, score.ratio, share), batches.online)
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


class Laboratory:
    """Rows, policies and fits of one seed; models of a half see only that half's rows."""

    def __init__(self, settings: Settings, levels: list[str], folder: Path):
        self.settings, self.folder = settings, folder
        self.policies = {x: load_policy(settings.robot, x) for x in levels}
        self.fit_off, self.fit_on, self.pool_off, self.pool_on = {}, {}, {}, {}
        self.sources, self.returns, self.clamped, self.fits = [], {}, {}, {}
        for level in levels:
            parts = []
            # Two collections: no episode is both fitted and scored. Far more rows than are
            # scored, so that neighbours in time are rare.
            sizes = settings.fit_rows, max(settings.pool_rows, settings.fit_rows // 3)
            for part, rows in enumerate(sizes):
                found, source = collect_rows(
                    settings.robot, level, 2 * rows, 2 * settings.seed + part, folder
                )
                self.sources.append(source)
                self.returns.setdefault(level, source["episode_returns"])
                rng = np.random.default_rng([settings.seed, LEVELS.index(level), part])
                wanted = (settings.fit_rows, settings.pool_rows)[part]
                parts += split(found, [wanted] * 2, rng)
            self.fit_off[level], self.fit_on[level] = parts[:2]
            self.pool_off[level], self.pool_on[level] = parts[2:]
            bounds = stack(*parts).actions.abs() > 1 - 1e-6
            self.clamped[level] = bounds.any(1).double().mean().item()

    def fit(self, kind: str, rows: Rows, name: str) -> BehaviorModel:
        """A behavior model of the rows, from the cache if it was fitted before."""
        s = self.settings
        diffusion = kind == "diffusion"
        options = {"width": s.diffusion_width} if diffusion else {"hidden_dim": 128}
        model, _, _ = fit_cached(
            kind,
            rows.states,
            rows.actions,
            updates=s.diffusion_updates if diffusion else s.density_updates,
            batch_size=s.diffusion_batch if diffusion else s.density_batch,
            lr=s.diffusion_lr if diffusion else s.density_lr,
            seed=s.seed,
            dataset_hash=f"{name} {json.dumps(self.sources)}",
            cache_dir=self.folder / "behavior",
            options=options,
            progress=sys.stderr.isatty(),
        )
        return model

    def models(self, behavior: str, online: str, share: float = 0.0) -> Models:
        """Fits for a pair; with a share, on buffers that are contaminated by it."""
        off = contaminate(self.fit_off[behavior], self.fit_off[online], share)
        on = contaminate(self.fit_on[online], self.fit_on[behavior], share)
        tag = f"{behavior} with {share} {online}" if share else behavior
        tag_on = f"{online} with {share} {behavior}" if share else online
        kinds = ("diffusion", "gaussian", "mixture")
        nu = [self.fit(kind, off, f"offline half, {tag}") for kind in kinds]
        pi = self.fit("mixture", on, f"online half, {tag_on}")
        returns = [self.returns[level] for level in (behavior, online)]
        span = max(r[2] for r in returns) - min(r[0] for r in returns)
        guidance = fit_guidance(nu[0], off, on, span, self.settings)
        models = Models(
            self.policies[behavior],
            self.policies[online],
            *nu,
            pi,
            guidance,
            self.classifier(behavior, online, share),
            self.settings,
        )
        generator = torch.Generator().manual_seed(self.settings.seed)
        states = self.pool_off[behavior].states[:256]
        clipped = [
            (models.references(x, states, 1, generator).abs() == 1).float().mean().item()
            for x in ("diffusion", "small_guidance_scale", "guidance_scale")
        ]
        self.fits[f"{tag} / {tag_on}"] = {
            "energy_loss": guidance.loss,
            "energy_label_entropy": guidance.entropy,
            "references_clipped": clipped,  # share of coordinates: unguided, small, large
        }
        return models

    def classifier(self, behavior: str, online: str, share: float) -> Regressor:
        """Of the two buffers as they are: a share of each comes from the other policy."""
        off = contaminate(self.fit_off[behavior], self.fit_off[online], share)
        on = contaminate(self.fit_on[online], self.fit_on[behavior], share)
        updates = self.settings.classifier_updates
        return fit_classifier(off, on, updates, self.settings.seed)

    def rollout_rows(self, behavior: str, online: str) -> tuple[Rows, Rows]:
        return self.pool_off[behavior], self.pool_on[online]

    def fitted_rows(self, behavior: str, online: str) -> tuple[Rows, Rows]:
        """Rows that the models have seen, as in a run."""
        index = torch.arange(min(self.settings.pool_rows, self.settings.fit_rows))
        return self.fit_off[behavior].take(index), self.fit_on[online].take(index)

    def shared_states(self, behavior: str, online: str) -> tuple[Rows, Rows]:
        """Both policies act in states of both: there the oracle ratio is the Bayes score."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        states = torch.cat([self.pool_off[behavior].states, self.pool_on[online].states])
        states = states[torch.randperm(len(states), generator=generator)]
        halves = states.chunk(2)
        pools = []
        for level, part in zip((behavior, online), halves, strict=True):
            actions = self.policies[level].sample(part, 1, generator).squeeze(1)
            pools.append(Rows(part, actions, torch.full((len(part),), math.nan)))
        return pools[0], pools[1]


def run(settings: Settings, levels: list[str], folder: Path) -> dict:
    """All experiments of one seed; what the JSON file of a seed holds."""
    start, commit, result = time.process_time(), git_commit(), Result()
    lab = Laboratory(settings, levels, folder)
    main_pair = tuple(levels[-2:])
    for pair in itertools.product(levels, repeat=2):
        print(f"{pair[0]} -> {pair[1]}: {time.process_time() - start:.0f} s", flush=True)
        models = lab.models(*pair)
        shares = SHARES if pair[0] != pair[1] else (0.0,)
        compare(lab, result, "rollout", pair, models, lab.rollout_rows(*pair), shares)
        if pair[0] != pair[1]:
            pools = lab.shared_states(*pair)
            compare(lab, result, "shared states", pair, models, pools, (0.3,))
        if pair == main_pair:
            time_scores(result, models, lab.pool_off[pair[0]])
            pools = lab.fitted_rows(*pair)
            compare(lab, result, "fitted rows", pair, models, pools, (0.3,))
            models = lab.models(*pair, share=0.3)
            pools = lab.rollout_rows(*pair)
            compare(lab, result, "contaminated fits", pair, models, pools, (0.3,))
    return {
        "command": "python benchmarks/exchange_accuracy.py " + " ".join(sys.argv[1:]),
        "settings": dataclasses.asdict(settings),
        "levels": levels,
        "main_pair": list(main_pair),
        "sources": lab.sources,
        "policies": {
            x: policies.fingerprint(f"{settings.robot}-{x}-v2") for x in levels
        },
        "rows_on_the_bounds": lab.clamped,
        "energy": lab.fits,
        "processor_seconds": time.process_time() - start,
        "machine": describe(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit,
        "columns": Result.COLUMNS,
        "tables": result.tables,
    }


@torch.no_grad()
def time_scores(result: Result, models: Models, rows: Rows) -> None:
    """Processor seconds per 1000 rows, references included: median of five calls on 256."""
    states, actions = rows.states[:256], rows.actions[:256]
    generator = torch.Generator().manual_seed(0)
    for score in make_scores(models, generator):
        times = []
        for _ in range(6):  # the first one warms up
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


def compare(
    lab: Laboratory,
    result: Result,
    setting: str,
    pair: tuple[str, str],
    models: Models,
    pools: tuple[Rows, Rows],
    shares: tuple[float, ...],
) -> None:
    """Score two pools with all scores and evaluate; the classifier once per share."""
    generator = torch.Generator().manual_seed(lab.settings.seed)
    rows, off_rows = stack(*pools), len(pools[0].states)
    scores = make_scores(models, generator)
    values = score_rows(models, scores, rows, generator)
    for share in shares:
        # It knows the buffers only as they are: contaminated.
        classifier = lab.classifier(*pair, share)
        values["classifier"] = classifier(rows.states, rows.actions).double()
        evaluate(result, setting, pair, scores, values, off_rows, share, lab.settings)


# ---------------------------------------------------------------- report


def check_same(folder: Path, settings: dict, levels: list[str]) -> None:
    """Raise where the stored seeds, whose means the tables are, have other settings than these."""
    wanted = {**settings, "levels": levels}
    for path in sorted(folder.glob("seed_*.json")):
        record = json.loads(path.read_text())
        stored = {**record["settings"], "levels": record["levels"]}
        for name in sorted(wanted.keys() | stored.keys()):
            if name != "seed" and wanted.get(name) != stored.get(name):
                raise ValueError(
                    f"{path} was made with {name} {stored.get(name)}, not {wanted.get(name)}: "
                    "give other settings another folder with --out"
                )


class Store:
    """The stored numbers of all seeds; means over seeds, and over whatever is not named."""

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("seed_*.json"))
        if not paths:
            raise ValueError(f"no seed_*.json in {folder}; run the benchmark first")
        self.seeds = [json.loads(path.read_text()) for path in paths]
        check_same(folder, self.seeds[0]["settings"], self.seeds[0]["levels"])
        self.rows: dict[tuple[str, str], list[dict]] = {}  # by table and score
        for seed in self.seeds:
            number = {"seed": seed["settings"]["seed"]}
            for name, rows in seed["tables"].items():
                columns = seed["columns"][name]
                for row in rows:
                    named = dict(zip(columns, row, strict=True)) | number
                    self.rows.setdefault((name, named["score"]), []).append(named)
        first = self.seeds[0]
        self.main_pair, self.levels = tuple(first["main_pair"]), first["levels"]
        self.pairs = list(itertools.permutations(self.levels, 2))
        self.scores = [row[0] for row in first["tables"]["cost"]]
        self.spread = (
            0.0  # largest range over seeds of what was read since it was set to 0
        )

    def values(self, table: str, column: str, score: str, **where) -> list[tuple]:
        """(seed, value) of the rows where every named column equals its value."""
        return [
            (row["seed"], row[column])
            for row in self.rows[table, score]
            if row[column] is not None and all(row[k] == v for k, v in where.items())
        ]

    def mean(self, table: str, column: str, **where) -> float:
        """Mean over rows and seeds, nan without rows; widens `spread`."""
        by_seed: dict[int, list[float]] = {}
        for seed, value in self.values(table, column, **where):
            by_seed.setdefault(seed, []).append(value)
        means = [statistics.mean(values) for values in by_seed.values()]
        if not means:
            return math.nan
        self.spread = max(self.spread, max(means) - min(means))
        return statistics.mean(means)

    def off_diagonal(self, table: str, column: str, **where) -> float:
        """Mean over the pairs of different policies."""
        found = [
            self.mean(table, column, behavior=b, online=o, **where)
            for b, o in self.pairs
        ]
        found = [x for x in found if not math.isnan(x)]
        return statistics.mean(found) if found else math.nan


def table(head: list[str], rows: list[list], digits: int = 3) -> str:
    """A markdown table; nan is a dash."""

    def text(cell) -> str:
        if isinstance(cell, float):
            return "\u2013" if math.isnan(cell) else f"{cell:.{digits}f}"
        return str(cell)

    lines = [head, ["---"] * len(head), *([text(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def arrow(pair: tuple[str, str]) -> str:
    return f"{pair[0]} \u2192 {pair[1]}"


def report(folder: Path) -> None:
    """Write README.md and the figures of a folder of stored numbers."""
    store = Store(folder)
    sections = [heading(store)]
    for write in (
        auc_tables,
        exchange_tables,
        share_table,
        identical_table,
        inverted_table,
        calibration_table,
        sensitivity_table,
        cost_table,
    ):
        store.spread = 0.0
        text = write(store)
        if len(store.seeds) > 1 and not math.isnan(store.spread):
            text += (
                "\nLargest range over seeds of any number here, of single pairs before they are "
                f"averaged: {store.spread:.3f}.\n"
            )
        sections.append(text)
    (folder / "README.md").write_text("\n".join(sections))
    for draw in (draw_auc, draw_purity, draw_reliability, draw_cost):
        draw(store, folder / f"{draw.__name__.removeprefix('draw_')}.png")


def heading(store: Store) -> str:
    first = store.seeds[0]
    settings = {k: v for k, v in first["settings"].items() if k != "seed"}
    numbers = ", ".join(str(s["settings"]["seed"]) for s in store.seeds)
    commits = ", ".join(sorted({s["commit"] for s in store.seeds}))
    minutes = max(s["processor_seconds"] for s in store.seeds) / 60
    machine = first["machine"]
    lines = [
        "# Exchange accuracy: the tables",
        "",
        "Written by `python benchmarks/exchange_accuracy.py --report` from the `seed_N.json`"
        " files in this folder. What the numbers mean: docs/exchange_accuracy.md.",
        "",
        f"- seeds {numbers}; command of each: `{first['command']}` with its seed",
        f"- commit {commits}",
        f"- {machine['processor']}, {first['threads']} thread, at most {minutes:.0f} "
        "processor minutes a seed",
        "- versions: " + ", ".join(f"{k} {v}" for k, v in first["versions"].items()),
        f"- data: self-collected {settings['robot']} rows (not D4RL data), "
        + ", ".join(
            f"{s['task']} {s['rows']} rows (mean return {s['episode_returns'][1]:.0f})"
            for s in first["sources"]
        ),
        f"- settings: {json.dumps(settings)}",
        "",
    ]
    return "\n".join(lines)


def auc_tables(store: Store) -> str:
    text = (
        "## AUC\n\nChance that a row of the online policy scores above one of the behavior; "
        "0.5 says nothing.\n"
    )
    for setting, title in (
        ("rollout", "Rows as they were rolled out (states differ too)"),
        ("shared states", "Both policies in the same states: the oracle ratio is Bayes"),
    ):
        share = 0.0 if setting == "rollout" else 0.3
        rows = [
            [
                score,
                *(
                    store.mean(
                        "auc",
                        "auc",
                        setting=setting,
                        behavior=b,
                        online=o,
                        score=score,
                        share=share,
                    )
                    for b, o in store.pairs
                ),
            ]
            for score in store.scores
        ]
        head = ["score", *map(arrow, store.pairs), "mean"]
        text += f"\n### {title}\n\n"
        text += table(head, [[*row, statistics.mean(row[1:])] for row in rows])
    return text


def exchange_tables(store: Store) -> str:
    text = "## The exchange at 30 % misplaced rows\n\n"
    text += (
        "Pairs M of 128, precision and recall of the moved rows, purity of the halves after "
        "(before: 0.70; a swap changes both purities alike, so one number tells both).\n"
    )
    for title, mean in (
        ("Mean over the pairs of different policies", store.off_diagonal),
        (
            arrow(store.main_pair),
            lambda *a, **k: store.mean(
                *a, behavior=store.main_pair[0], online=store.main_pair[1], **k
            ),
        ),
    ):
        rows = []
        for score in store.scores:
            for rule in (*RULES[1:], *RATIO_RULES, "known share"):
                where = {"setting": "rollout", "score": score, "rule": rule}
                columns = "exchanged", "precision", "recall", "purity_off"
                row = [mean("exchange", c, share=0.3, **where) for c in columns]
                if not math.isnan(row[0]):
                    rows.append([score, rule, f"{row[0]:.1f}", *row[1:]])
        text += f"\n### {title}\n\n"
        head = ["score", "rule", "M", "precision", "recall", "purity after"]
        text += table(head, rows)
    return text


def share_table(store: Store) -> str:
    text = (
        "## Purity after the exchange by misplaced share\n\n"
        "Threshold rule unless named; mean over the pairs of different policies. Without an "
        "exchange the purity is one minus the share.\n\n"
    )
    shares = [s for s in SHARES if s <= 0.5]
    rows = []
    for score, rule in curves(store):
        where = {"setting": "rollout", "score": score, "rule": rule}
        purities = [
            store.off_diagonal("exchange", "purity_off", share=s, **where)
            for s in shares
        ]
        rows.append([score if rule == "threshold" else f"{score}, {rule}", *purities])
    return text + table(["score", *(f"{s:.0%}" for s in shares)], rows)


def curves(store: Store) -> list[tuple[str, str]]:
    """Scores and rules that tables and figures follow over the misplaced share."""
    return [
        *((score, "threshold") for score in store.scores),
        ("policy ratio", "posterior"),
        ("policy ratio", "estimated share"),
        ("oracle ratio", "estimated share"),
        ("oracle ratio", "known share"),
    ]


def identical_table(store: Store) -> str:
    text = (
        "## Identical policies\n\nBoth halves come from one policy: the right answer is to "
        "exchange nothing. Pairs M of 128, mean over the policies.\n\n"
    )
    rules = (*RULES[1:], *RATIO_RULES)
    rows = []
    for score in store.scores:
        where = {"setting": "rollout", "score": score, "share": 0.0}
        row = []
        for rule in rules:
            found = [
                store.mean(
                    "exchange", "exchanged", behavior=x, online=x, rule=rule, **where
                )
                for x in store.levels
            ]
            row.append(statistics.mean(found))
        rows.append([score, *row])
    return text + table(["score", *rules], rows, digits=1)


def inverted_table(store: Store) -> str:
    text = (
        "## Inverted batches\n\nShare of batches whose online half scores no higher than its "
        "offline half. With 0 % misplaced an inversion is an error of the score; with 90 % "
        "misplaced it is the truth. `skip_inverted` exchanges nothing in those batches. "
        "Purity is that after the threshold rule; mean over the pairs of different policies.\n\n"
    )
    rows = []
    for score in store.scores:
        row = [score]
        for share in (0.0, 0.9):
            where = {"setting": "rollout", "score": score, "share": share}
            for column in ("inverted", "exchanged", "purity_off"):
                row.append(
                    store.off_diagonal("exchange", column, rule="threshold", **where)
                )
        rows.append(row)
    head = ["score"]
    for share in ("0 %", "90 %"):
        head += [f"inverted, {share}", f"M, {share}", f"purity after, {share}"]
    return text + table(head, rows)


def calibration_table(store: Store) -> str:
    text = (
        "## Calibration of the posterior\n\nExpected calibration error (15 bins) of "
        "P(behavior | d) against who acted; mean over the pairs of different policies. The two "
        "Gaussians are those that the exchange fits to the halves as drawn; the logistic of a "
        "log-ratio needs no fit.\n\n"
    )
    shares = (0.0, 0.3, 0.5)
    rows = []
    for score in store.scores:
        for name in ("two Gaussians", "logistic of the ratio"):
            where = {"setting": "rollout", "score": score, "posterior": name}
            row = [
                store.off_diagonal("calibration", "ece", share=s, **where)
                for s in shares
            ]
            if not math.isnan(row[0]):
                rows.append([score, name, *row])
    return text + table(["score", "posterior", *(f"{s:.0%}" for s in shares)], rows)


def sensitivity_table(store: Store) -> str:
    b, o = store.main_pair
    text = (
        f"## What the models have seen ({arrow((b, o))}, 30 % misplaced, threshold rule)\n\n"
        "Held out: models fitted on clean buffers, other rows are scored. Fitted rows: the "
        "scored rows were fitted. Contaminated fits: 30 % of each buffer that the models are "
        "fitted on come from the other policy.\n\n"
    )
    settings = {
        "held out": "rollout",
        "fitted rows": "fitted rows",
        "contaminated fits": "contaminated fits",
    }
    rows = []
    for score in store.scores:
        row = [score]
        for setting in settings.values():
            where = {"setting": setting, "behavior": b, "online": o, "score": score}
            row.append(store.mean("auc", "auc", share=0.3, **where))
            row.append(
                store.mean(
                    "exchange", "purity_off", share=0.3, rule="threshold", **where
                )
            )
        rows.append(row)
    head = ["score"]
    for name in settings:
        head += [f"AUC, {name}", f"purity, {name}"]
    return text + table(head, rows)


def cost_table(store: Store) -> str:
    text = (
        "## Cost\n\nProcessor milliseconds per 1000 rows on one core, references included "
        "(median of five calls on 256 rows, mean over seeds), with the small networks of this "
        "benchmark; network evaluations per row do not depend on them.\n\n"
    )
    rows = []
    for score in store.scores:
        ms = 1000 * store.mean("cost", "seconds_per_1000", score=score)
        evaluations = int(store.mean("cost", "evaluations", score=score))
        rows.append([score, evaluations, f"{ms:.1f}"])
    store.spread = math.nan  # of times: says nothing about accuracy
    return text + table(["score", "evaluations", "ms"], rows)


# ---------------------------------------------------------------- figures

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
MARKERS = "osD^vPX"


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_auc(store: Store, path: Path) -> None:
    figure, ((axis,),) = new_figure(8, 6.5)
    for i, (b, o) in enumerate(store.pairs):
        where = {"setting": "rollout", "share": 0.0, "behavior": b, "online": o}
        values = [store.mean("auc", "auc", score=s, **where) for s in store.scores]
        style = {"color": COLORS[i % 7], "marker": MARKERS[i % 7], "linestyle": "none"}
        axis.plot(values, range(len(values)), label=arrow((b, o)), alpha=0.85, **style)
    axis.axvline(0.5, color="#666666", linewidth=1, linestyle=":")
    axis.set_yticks(range(len(store.scores)), store.scores)
    axis.invert_yaxis()
    axis.set_xlabel("AUC: online rows against behavior rows (behavior → online)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=150)


def draw_purity(store: Store, path: Path) -> None:
    shares = [s for s in SHARES if s <= 0.5]
    lines = [
        (store.scores[0], "threshold"),
        ("reference, unguided", "threshold"),
        ("mixture likelihood", "threshold"),
        ("policy ratio", "threshold"),
        ("policy ratio", "estimated share"),
        ("oracle ratio", "known share"),
    ]
    columns = 3 if len(store.pairs) > 2 else 2
    rows = math.ceil(len(store.pairs) / columns)
    options = {"sharex": True, "sharey": True}
    figure, axes = new_figure(10, 3.2 * rows + 0.8, rows, columns, **options)
    for axis, (b, o) in zip(axes.flat, store.pairs, strict=False):
        x = [100 * s for s in shares]
        label = "no exchange"
        axis.plot(x, [1 - s for s in shares], color="#666666", ls=":", label=label)
        for i, (score, rule) in enumerate(lines):
            where = {"setting": "rollout", "behavior": b, "online": o, "score": score}
            y = [
                store.mean("exchange", "purity_off", rule=rule, share=s, **where)
                for s in shares
            ]
            style = {"color": COLORS[i], "marker": MARKERS[i], "markersize": 4}
            axis.plot(x, y, label=f"{score}, {rule}", **style)
        axis.set_title(arrow((b, o)), fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("misplaced rows in each half (%)")
    for axis in axes[:, 0]:
        axis.set_ylabel("purity after the exchange")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=150)


def draw_reliability(store: Store, path: Path) -> None:
    b, o = store.main_pair
    lines = [
        (store.scores[0], "two Gaussians"),
        ("mixture likelihood", "two Gaussians"),
        ("policy ratio", "two Gaussians"),
        ("policy ratio", "logistic of the ratio"),
        ("oracle ratio", "logistic of the ratio"),
    ]
    figure, ((axis,),) = new_figure(6.5, 6.5)
    axis.plot([0, 1], [0, 1], color="#666666", ls=":", label="calibrated")
    seed = store.seeds[0]["settings"]["seed"]
    for i, (score, posterior_name) in enumerate(lines):
        where = {"behavior": b, "online": o, "score": score, "share": 0.3}
        found = store.values("reliability", "bins", posterior=posterior_name, **where)
        bins = np.array([b for b in dict(found)[seed] if b[2] >= 0.005])
        style = {"color": COLORS[i], "marker": MARKERS[i], "markersize": 5}
        axis.plot(bins[:, 0], bins[:, 1], label=f"{score}, {posterior_name}", **style)
    axis.set_xlabel("stated P(behavior | d)")
    axis.set_ylabel("share of rows that the behavior made")
    axis.set_title(
        f"{arrow((b, o))}, 30 % misplaced, seed {seed}\nbins of at least 0.5 % of the rows",
        fontsize=10,
    )
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_cost(store: Store, path: Path) -> None:
    figure, ((axis,),) = new_figure(8, 5)
    oracles = [s for s in store.scores if s.startswith("oracle")]
    for i, score in enumerate(s for s in store.scores if s not in oracles):
        x = 1000 * store.mean("cost", "seconds_per_1000", score=score)
        where = {"setting": "rollout", "share": 0.3, "rule": "threshold"}
        y = store.off_diagonal("exchange", "purity_off", score=score, **where)
        style = {"color": COLORS[i % 7], "marker": MARKERS[i // 7]}
        axis.plot(x, y, linestyle="none", label=score, **style)
    best = {"setting": "rollout", "share": 0.3, "score": "oracle ratio"}
    y = store.off_diagonal("exchange", "purity_off", rule="known share", **best)
    axis.axhline(y, color="#000000", linewidth=1, label="oracle ratio, known share")
    axis.axhline(0.7, color="#666666", linewidth=1, ls=":", label="no exchange")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("processor milliseconds per 1000 rows (small networks)")
    axis.set_ylabel("purity after the exchange\n(30 % misplaced, threshold rule)")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- command line


def write_json(path: Path, record: dict) -> None:
    """One table row per line, so that a diff can be read; the file appears when it is whole."""
    tables = record.pop("tables")
    head = json.dumps(record, indent=1)
    parts = []
    for name, rows in tables.items():
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        parts.append(f"  {json.dumps(name)}: [\n  {lines}\n  ]")
    text = head[:-2] + ',\n "tables": {\n' + ",\n".join(parts) + "\n }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name}", type=type(field.default), default=field.default
        )
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--data", type=Path, help="folder of collected rows and fits")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="tables and figures only")
    args = parser.parse_args()
    try:
        if not args.report:
            fields = [field.name for field in dataclasses.fields(Settings)]
            settings = Settings(**{name: getattr(args, name) for name in fields})
            check_same(args.out, dataclasses.asdict(settings), args.levels)
            folder = args.data or sources.cache_folder() / "exchange_accuracy"
            torch.set_num_threads(1)
            record = run(settings, args.levels, folder)
            write_json(args.out / f"seed_{settings.seed}.json", record)
        report(args.out)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
