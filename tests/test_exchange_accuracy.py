"""The exchange-accuracy benchmark against theory: Gaussians whose Bayes error is known."""

import ast
import graphlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.exchange_accuracy import aging, report
from benchmarks.exchange_accuracy.measure import (
    auc,
    calibration_error,
    decide,
    draw_batches,
    outcome,
    posterior,
    reliability,
    swap,
)
from benchmarks.exchange_accuracy.models import (
    Guidance,
    Models,
    Regressor,
    fit_classifier,
    fit_guidance,
)
from benchmarks.exchange_accuracy.rows import (
    DISCOUNT,
    Policy,
    Rows,
    contaminate,
    load_policy,
    returns_to_go,
    split,
)
from benchmarks.exchange_accuracy.scores import make_scores, score_rows
from benchmarks.exchange_accuracy.settings import CONTROLS, RULES, SHARES, Settings
from benchmarks.exchange_accuracy.store import Store, check_same
from corl_dare import behavior, exchange, guidance

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "benchmarks.exchange_accuracy"]
D = torch.float64
properties = settings(deadline=None, derandomize=True, max_examples=60)


def phi(x):
    """Standard normal distribution function."""
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def gaussian_batches(d_prime, share, half=16_000, count=2):
    """Batches of scores N(0, 1) (behavior) and N(d', 1) (online), and who acted."""
    rng = np.random.default_rng(0)
    pool = 2 * half
    batches = draw_batches((pool, pool), share, half, count, rng)
    scores = torch.cat([normal(pool, 1), normal(pool, 2) + d_prime])
    return scores[batches.index], batches.online


def run(scores, online, rule, **options):
    return outcome(decide(scores, rule, **options), online)


# ---------------------------------------------------------------- theory


@pytest.mark.parametrize("d_prime", [0.0, 0.5, 1.5, 3.0])
def test_the_auc_of_two_gaussians_is_that_of_theory(d_prime):
    off, on = normal(100_000, 1), normal(100_000, 2) + d_prime
    assert auc(off, on) == pytest.approx(phi(d_prime / math.sqrt(2)), abs=0.004)


@pytest.mark.parametrize("rule", ["threshold", "posterior", "direct"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_every_rule_reaches_the_bayes_error_of_equal_gaussians(rule, share):
    """Equal widths: the Bayes cut is midway and errs on Phi(-d'/2) of either policy."""
    d_prime = 2.0
    right = phi(d_prime / 2)  # share of a policy's rows on its own side
    moved = share * right + (1 - share) * (1 - right)
    scores, online = gaussian_batches(d_prime, share)
    found = run(scores, online, rule)
    assert found["purity_before"] == pytest.approx(1 - share)
    assert found["purity_off"] == pytest.approx(right, abs=0.01)
    assert found["purity_on"] == pytest.approx(right, abs=0.01)
    assert found["exchanged"] == pytest.approx(16_000 * moved, rel=0.05)
    assert found["precision"] == pytest.approx(share * right / moved, abs=0.02)
    if share:
        assert found["recall"] == pytest.approx(right, abs=0.02)
    else:
        assert found["recall"] is None


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_known_share_gives_the_bayes_decision(share):
    """A log-ratio of N(-+d'^2/2, d'^2) moves a row when it beats the odds of the share."""
    d_prime = 2.0
    odds = math.log((1 - share) / share)
    shift = d_prime**2 / 2
    hit = phi((shift - odds) / d_prime)  # a misplaced row is moved
    false = phi((-shift - odds) / d_prime)  # a row in its place is moved
    scores, online = gaussian_batches(d_prime, share)
    ratio = d_prime * (scores - d_prime / 2)
    found = run(ratio, online, "known share", ratio=True, share=share)
    purity = 1 - share * (1 - hit) - (1 - share) * false
    assert found["purity_off"] == pytest.approx(purity, abs=0.01)
    assert found["recall"] == pytest.approx(hit, abs=0.03)
    expected = share * hit / (share * hit + (1 - share) * false)
    assert found["precision"] == pytest.approx(expected, abs=0.03)
    others = {rule: run(scores, online, rule)["purity_off"] for rule in RULES}
    # The mixture estimates the share, so it decides nearly the same.
    assert found["purity_off"] > others.pop("em") - 0.002
    assert found["purity_off"] > max(others.values()) + 0.005
    estimated = run(ratio, online, "estimated share", ratio=True)
    assert estimated["purity_off"] == pytest.approx(purity, abs=0.01)


def test_the_papers_score_of_two_gaussian_policies_has_its_closed_form():
    """pi = N(0, I_2) and N(mu, I_2): one reference, a likelihood and the log-ratio."""
    mu, n = 2.0, 40_000
    off, references = normal((n, 2), 1), normal((n, 2), 2)
    on = normal((n, 2), 3) + torch.tensor([mu, 0.0], dtype=D)
    one = exchange.alignment_score
    got = auc(one(off, references), one(on, references))
    assert got == pytest.approx(1 - 0.5 * math.exp(-(mu**2) / 8), abs=0.01)
    got = auc(off.square().sum(1), on.square().sum(1))
    assert got == pytest.approx(1 - 0.5 * math.exp(-(mu**2) / 4), abs=0.01)
    got = auc(off[:, 0], on[:, 0])  # the log-ratio is linear in that direction
    assert got == pytest.approx(phi(mu / math.sqrt(2)), abs=0.01)


@pytest.mark.parametrize("share, narrowed", [(0.0, False), (0.3, True)])
def test_the_posterior_is_calibrated_where_its_gaussians_are_true(share, narrowed):
    scores, online = gaussian_batches(1.5, share)
    ece = calibration_error(reliability(posterior(scores), ~online))
    # Misplaced rows pull the fitted means together: the posterior hedges too much.
    assert (ece > 0.05) if narrowed else (ece < 0.015)
    ratio = 1.5 * (scores - 0.75)
    bins = reliability((-ratio).sigmoid(), ~online)
    assert calibration_error(bins) < 0.015


def test_the_calibration_error_is_the_distance_of_a_wrong_probability_from_the_truth():
    p = torch.full((1000,), 0.9, dtype=D)
    true = torch.arange(1000) < 600
    assert calibration_error(reliability(p, true)) == pytest.approx(0.3)
    ends = torch.tensor([0.0, 1.0], dtype=D)
    bins = reliability(ends, torch.tensor([False, True]))
    assert [row[:2] for row in bins] == [[0.0, 0.0], [1.0, 1.0]]
    assert calibration_error(bins) == 0.0


def test_where_nothing_is_misplaced_the_threshold_exchanges_half_and_a_true_ratio_nothing():
    rng = np.random.default_rng(0)
    batches = draw_batches((5000, 5000), 0.0, 128, 50, rng)
    noise = normal(10_000)[batches.index]
    found = run(noise, batches.online, "threshold")
    assert found["exchanged"] == pytest.approx(62, abs=2)
    ratio = torch.zeros_like(noise)
    for rule in ("threshold", "posterior", "direct", "estimated share"):
        assert run(ratio, batches.online, rule, ratio=True)["exchanged"] == 0


def test_a_score_that_is_upside_down_makes_the_halves_less_pure():
    scores, online = gaussian_batches(2.0, 0.1, half=500)
    assert run(scores, online, "threshold")["purity_off"] > 0.8
    assert run(-scores, online, "threshold")["purity_off"] < 0.2


# ---------------------------------------------------------------- measures and rules


def slow_measure(order, online):
    """One batch, by sets."""
    n = len(order) // 2
    truth = online.tolist()
    off, on = order[:n].tolist(), order[n:].tolist()
    gone = [i for i in range(n) if i not in set(off)]
    come = [i for i in off if i >= n]
    misplaced = [i for i in range(2 * n) if truth[i] == (i < n)]
    hits = [i for i in gone + come if i in misplaced]
    return {
        "exchanged": len(come),
        "precision": len(hits) / len(gone + come) if gone else None,
        "recall": len(hits) / len(misplaced) if misplaced else None,
        "purity_off": sum(not truth[i] for i in off) / n,
        "purity_on": sum(truth[i] for i in on) / n,
    }


coarse = st.lists(st.integers(-2, 2).map(float), min_size=2, max_size=20)


@properties
@given(
    coarse, st.randoms(use_true_random=False), st.sampled_from((*RULES[1:], *CONTROLS))
)
def test_measures_equal_counting(values, random, rule):
    values = values[: len(values) // 2 * 2]
    scores = torch.tensor([values], dtype=D)
    online = torch.tensor([[random.random() < 0.5 for _ in values]])
    order = decide(scores, rule)
    found = outcome(order, online)
    expected = slow_measure(order[0], online[0])
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    # A swapped pair changes both halves alike.
    n = len(values) // 2
    before_off, before_on = (~online[0, :n]).sum(), online[0, n:].sum()
    change = n * found["purity_off"] - before_off, n * found["purity_on"] - before_on
    assert change[0].item() == pytest.approx(change[1].item())


@pytest.mark.parametrize("rule", RULES[1:])
def test_decisions_are_those_of_exchange(rule):
    scores = normal((20, 64)).round(decimals=1)
    orders = decide(scores, rule)
    cap = 32 if "cap" in rule else None
    for row, order in zip(scores, orders, strict=True):
        alone = exchange.exchange(row[:32], row[32:], cap, rule.split(",")[0])
        assert torch.equal(order, alone.order)


@properties
@given(coarse)
def test_swap_takes_the_largest_positive_odds_of_both_halves(values):
    values = values[: len(values) // 2 * 2]
    n = len(values) // 2
    order = swap(torch.tensor([values], dtype=D))[0].tolist()
    assert sorted(order) == list(range(2 * n))
    count = min(sum(v > 0 for v in values[:n]), sum(v > 0 for v in values[n:]))
    moved = [i for i in order[:n] if i >= n] + [i for i in order[n:] if i < n]
    assert len(moved) == 2 * count
    for half in (range(n), range(n, 2 * n)):
        gone = sorted((values[i] for i in half if i in moved), reverse=True)
        assert gone == sorted((values[i] for i in half), reverse=True)[:count]


def test_the_cap_binds():
    scores, online = gaussian_batches(2.0, 0.4, half=500)
    assert run(scores, online, "threshold, cap 32")["exchanged"] == 32
    assert run(scores, online, "threshold")["exchanged"] > 100
    assert run(scores, online, "none")["exchanged"] == 0


@properties
@given(st.floats(0.05, 0.5), st.floats(2.0, 4.0))
def test_the_share_is_found_again(share, d_prime):
    """The ratio of N(0, 1) and N(d', 1), of which `share` are misplaced."""
    n = 4000
    shift = torch.where(torch.arange(n) < share * n, d_prime, 0.0)
    log_odds = d_prime * (normal(n) + shift - d_prime / 2)
    assert exchange.misplaced_share(log_odds).item() == pytest.approx(share, abs=0.05)


def test_where_scores_say_nothing_the_share_goes_to_zero():
    assert exchange.misplaced_share(torch.zeros(3, 128, dtype=D)).max() < 1e-3


@properties
@given(coarse, coarse)
def test_auc_equals_counting(off, on):
    expected = sum((a < b) + 0.5 * (a == b) for a in off for b in on)
    got = auc(torch.tensor(off, dtype=D), torch.tensor(on, dtype=D))
    assert got == pytest.approx(expected / len(off) / len(on))


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_batches_hold_the_share_and_no_row_twice(share):
    rng = np.random.default_rng(0)
    batches = draw_batches((150, 200), share, 128, 20, rng)
    foreign = round(share * 128)
    assert (batches.online[:, :128].sum(1) == foreign).all()
    assert ((~batches.online[:, 128:]).sum(1) == foreign).all()
    assert torch.equal(batches.online, batches.index >= 150)
    for row in batches.index:
        assert len(row.unique()) == 256 and row.min() >= 0 and row.max() < 350
    if share in (0.3, 0.5):  # shuffled: ties must not tell who is misplaced
        place = batches.online[:, :128].double().mean(0)
        assert place[:64].sum() == pytest.approx(foreign / 2, abs=8)


@pytest.mark.parametrize("pools, share", [((100, 200), 0.1), ((200, 200), 1.1)])
def test_impossible_batches_are_refused(pools, share):
    with pytest.raises(ValueError, match="half"):
        draw_batches(pools, share, 128, 1, np.random.default_rng(0))


def rows_of(actions):
    states = torch.zeros(len(actions), 2)
    return Rows(states, actions, torch.arange(float(len(actions))))


def test_contamination_and_split_lose_no_row():
    own, other = rows_of(torch.zeros(10, 1)), rows_of(torch.ones(10, 1))
    mixed = contaminate(own, other, 0.3)
    assert len(mixed.states) == 10 and mixed.actions.sum() == 3
    parts = split(own, [4, 5], np.random.default_rng(0))
    found = torch.cat([part.returns for part in parts])
    assert [len(p.states) for p in parts] == [4, 5] and len(found.unique()) == 9


def test_returns_to_go_by_hand():
    n, g = 400, DISCOUNT
    raw = {
        "rewards": np.ones(n),
        "terminals": np.arange(n) == 9,
        "timeouts": np.zeros(n, bool),
    }
    found = returns_to_go(raw)
    expected = [(1 - g ** (10 - i)) / (1 - g) for i in range(10)]
    assert found[:10] == pytest.approx(expected, rel=1e-5)  # ends at a terminal
    known = np.isfinite(found)
    assert g**300 < 0.05 < g**298 and known[:101].all() and not known[101:].any()
    assert found[10] == pytest.approx((1 - g**390) / (1 - g), rel=1e-5)
    raw["timeouts"][160] = True
    known = np.isfinite(returns_to_go(raw))
    assert known[:10].all() and not known[10:].any()


# ---------------------------------------------------------------- policies and scores


def test_the_uniform_policy_knows_its_density():
    policy = load_policy("hopper", "random")
    generator = torch.Generator().manual_seed(0)
    actions = policy.sample(torch.zeros(1000, 11), 2, generator)
    assert actions.shape == (1000, 2, 3) and actions.abs().max() <= 1
    assert actions.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.02)
    nats = policy.log_prob(torch.zeros(5, 11), actions[:5, 0])
    assert torch.allclose(nats, torch.full((5,), -3 * math.log(2), dtype=D))


def test_a_shipped_policy_samples_from_its_density():
    """E over samples of q/p = 1 for any density q inside the support."""
    policy = load_policy("hopper", "medium")
    states = 0.1 * normal((1, 11)).float()
    generator = torch.Generator().manual_seed(0)
    actions = policy.sample(states, 20_000, generator)[0]
    repeated = states.expand(len(actions), -1)
    log_p = policy.log_prob(repeated, actions)
    u = torch.atanh(actions.double().clamp(-1 + 1e-6, 1 - 1e-6))
    q = torch.distributions.Normal(u.mean(0), 0.5 * u.std(0))
    log_q = (q.log_prob(u) - torch.log1p(-torch.tanh(u).square())).sum(1)
    assert (log_q - log_p).exp().mean().item() == pytest.approx(1.0, abs=0.05)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="no novice policy of walker2d"):
        load_policy("walker2d", "novice")


class Linear(Policy):
    """N(shift, I): a policy with a density that is known on paper."""

    def __init__(self, shift):
        self.shift = torch.tensor(shift)

    def log_prob(self, states, actions):
        z = actions.double() - self.shift
        return -0.5 * z.square().sum(1) - len(self.shift) / 2 * math.log(2 * math.pi)

    def sample(self, states, n, generator):
        noise = torch.randn(len(states), n, 2, generator=generator)
        return noise + self.shift


class Sampler(behavior.GaussianBehavior):
    """Answers as the diffusion would: with samples of N(0, 0.3^2 I)."""

    def sample(self, states, n=1, generator=None, **options):
        return 0.3 * torch.randn(len(states), n, 2, generator=generator)


def toy_models():
    g = behavior.GaussianBehavior(3, 2, hidden_dim=8).requires_grad_(False)
    energy = guidance.EnergyNetwork(3, 2, hidden_dim=8).requires_grad_(False)
    classifier = Regressor(normal((9, 3)).float(), normal((9, 2)).float(), 0)
    return Models(
        Linear([0.0, 0.0]),
        Linear([2.0, 0.0]),
        Sampler(3, 2, hidden_dim=8),
        g,
        g,
        g,
        Guidance(energy, 0.0, 0.0),
        classifier.requires_grad_(False),
        Settings(references=4),
    )


def test_oracle_scores_have_the_auc_of_theory_and_nothing_beats_the_ratio():
    models, n = toy_models(), 20_000
    generator = torch.Generator().manual_seed(0)
    states = normal((2 * n, 3)).float()
    actions = normal((2 * n, 2), 1).float()
    actions[n:, 0] += 2.0
    pool = Rows(states, actions, torch.zeros(2 * n))
    scores = make_scores(models, generator)
    values = score_rows(models, scores, pool, generator)
    assert list(values) == [score.name for score in scores] and len(values) == 18
    found = {name: auc(d[:n], d[n:]) for name, d in values.items()}
    bayes = phi(2 / math.sqrt(2))
    assert found["oracle ratio"] == pytest.approx(bayes, abs=0.01)
    likelihood = 1 - 0.5 * math.exp(-1.0)
    assert found["oracle likelihood"] == pytest.approx(likelihood, abs=0.01)
    reference = 1 - 0.5 * math.exp(-0.5)
    assert found["oracle reference"] == pytest.approx(reference, abs=0.01)
    # References near the behavior's mean rank as its likelihood does.
    assert found["4 references, mean"] == pytest.approx(likelihood, abs=0.03)
    assert max(found.values()) <= found["oracle ratio"]


def test_scores_follow_their_definition():
    models = toy_models()
    states, actions = normal((6, 3)).float(), 0.2 * normal((6, 2), 1).float()
    references = models.references(
        "diffusion", states, 4, torch.Generator().manual_seed(0)
    )
    scores = {s.name: s for s in make_scores(models, torch.Generator())}

    def score(name, given):
        return scores[name].compute(states, actions, given).tolist()

    sigma = models.settings.kernel_sigma
    for i in range(6):
        squares = [
            sum((a - r) ** 2 for a, r in zip(actions[i].tolist(), x, strict=True))
            for x in references[i].tolist()
        ]
        near = pytest.approx(min(squares) / 2, rel=1e-4)
        assert score("4 references, nearest", references)[i] == near
        kernel = sum(math.exp(-s / (2 * sigma**2)) for s in squares) / 4
        found = score("4 references, kernel", references)[i]
        assert found == pytest.approx(-math.log(kernel), rel=1e-4)
        energy = models.guidance.energy(
            references[i : i + 1], torch.tensor([behavior.T_MIN]), states[i : i + 1]
        )
        weights = (models.settings.guidance_scale * energy[0]).softmax(0).tolist()
        kernel = sum(
            w * math.exp(-s / (2 * sigma**2))
            for w, s in zip(weights, squares, strict=True)
        )
        found = score("support, weighted kernel", references)[i]
        assert found == pytest.approx(-math.log(kernel), rel=1e-4)


def test_resampling_follows_the_energy():
    models = toy_models()
    n = 20_000
    references = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]).repeat(n, 1, 1)
    states = torch.zeros(n, 3)
    t = torch.tensor([behavior.T_MIN])
    energy = models.guidance.energy(references[:1], t, states[:1])[0]
    chance = (models.settings.guidance_scale * energy).softmax(0)[1].item()
    assert 0.02 < chance < 0.98
    generator = torch.Generator().manual_seed(0)
    scores = {s.name: s for s in make_scores(models, generator)}
    d = scores["support, 1 resampled"].compute(states, torch.zeros(n, 2), references)
    assert set(d.unique().tolist()) == {0.0, 0.5}  # whole references, not mixtures
    assert (d == 0.5).double().mean().item() == pytest.approx(chance, abs=0.02)


def test_a_classifier_learns_the_log_odds():
    n = 4000
    off = Rows(normal((n, 2)).float(), normal((n, 1), 1).float(), torch.zeros(n))
    on = off._replace(actions=normal((n, 1), 2).float() + 2.0)
    model = fit_classifier(off, on, 300, seed=0)
    a = torch.linspace(-1, 3, 9).unsqueeze(1)
    assert torch.allclose(model(torch.zeros(9, 2), a), 2 * (a[:, 0] - 1), atol=0.6)


def test_guidance_follows_the_returns():
    """Return grows with the first action: the energy's gradient must point there."""
    n = 3000
    actions = (2 * torch.rand(n, 2, generator=torch.Generator().manual_seed(0))) - 1
    states = normal((n, 3)).float()
    data = Rows(states, actions, 5 * actions[:, 0])
    sizes = {"q_updates": 300, "energy_updates": 300, "energy_width": 32}
    model = Sampler(3, 2, hidden_dim=8)
    chosen = Settings(energy_beta=0.01, **sizes)
    fitted = fit_guidance(model, data, data, 10.0, chosen)
    assert fitted.entropy < fitted.loss < math.log(16)
    x = 0.3 * normal((200, 2), 3).float()
    gradient = fitted.gradient(x, 0.05, states[:200])
    assert gradient[:, 0].mean() > 5 * gradient[:, 1].mean().abs() > 0


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accuracy")
    flags = {
        "levels": "random medium",
        "fit_rows": "1500",
        "pool_rows": "60",
        "half": "32",
        "batches": "4",
        "references": "2",
        "diffusion_width": "0.05",
        "diffusion_updates": "2",
        "density_updates": "3",
        "q_updates": "2",
        "energy_updates": "2",
        "energy_width": "8",
        "classifier_updates": "2",
        "data": str(folder / "data"),
        "out": str(folder / "out"),
    }
    words = [w for k, v in flags.items() for w in (f"--{k}", *v.split())]
    command = [*COMMAND, *words]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=500)
    return folder / "out", command


def test_the_command_writes_every_cell(tiny):
    out, _ = tiny
    record = json.loads((out / "seed_0.json").read_text())
    columns = record["columns"]["exchange"]
    cells = [
        dict(zip(columns, row, strict=True)) for row in record["tables"]["exchange"]
    ]
    rollout = [c for c in cells if c["setting"] == "rollout"]
    pairs = {(c["behavior"], c["online"]) for c in rollout}
    assert len(pairs) == 4 and {c["share"] for c in rollout} == set(SHARES)
    assert {c["rule"] for c in rollout} == {
        *RULES,
        *CONTROLS,
        "estimated share",
        "known share",
    }
    assert len({c["score"] for c in rollout}) == 18
    settings_seen = {c["setting"] for c in cells}
    assert settings_seen == {
        "rollout",
        "shared states",
        "fitted rows",
        "contaminated fits",
    }
    for cell in rollout:
        assert cell["purity_before"] == pytest.approx(
            1 - round(cell["share"] * 32) / 32, abs=1e-4
        )
        assert cell["rule"] != "none" or cell["exchanged"] == 0
    assert {"commit", "machine", "versions", "sources"} <= set(record)
    assert record["command"].startswith(
        "python -m benchmarks.exchange_accuracy --levels"
    )
    assert all(s["source"] == "self-collected" for s in record["sources"])


@pytest.mark.whole
def test_the_report_is_the_same_byte_for_byte(tiny):
    out, command = tiny
    names = ["README.md", "auc.png", "purity.png", "reliability.png", "cost.png"]
    before = [(out / name).read_bytes() for name in names]
    command = [*command, "--report"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    assert before == [(out / name).read_bytes() for name in names]
    assert before[0].decode().count("| oracle ratio |") >= 6


def test_the_published_page_is_what_the_code_writes_from_the_stored_numbers():
    folder = ROOT / "results" / "exchange_accuracy"
    assert (folder / "README.md").read_text() == report.page(Store(folder))


def test_no_two_modules_of_the_benchmark_import_each_other():
    """In a circle of imports no order of the modules is left."""
    package = "benchmarks.exchange_accuracy"
    imports: dict[str, set[str]] = {}
    for path in (ROOT / "benchmarks" / "exchange_accuracy").glob("*.py"):
        found = imports.setdefault(path.stem, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(package):
                inner = node.module.removeprefix(package).lstrip(".")
                found |= {inner} if inner else {alias.name for alias in node.names}
    order = list(graphlib.TopologicalSorter(imports).static_order())
    assert order.index("settings") < order.index("rows") < order.index("run")
    assert not imports["report"] & {"rows", "models", "scores", "measure", "run"}


def test_an_empty_folder_is_one_clear_line(tmp_path):
    command = [*COMMAND, "--report", "--out", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert "run the benchmark first" in found.stderr


@pytest.mark.parametrize("levels", ["medium", "medium medium"])
def test_levels_that_leave_nothing_to_compare_are_refused_before_any_work(levels):
    command = [*COMMAND, "--levels", *levels.split()]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and "two or more different levels" in found.stderr


def test_seeds_of_other_settings_are_not_averaged(tmp_path):
    for seed, half in ((0, 128), (1, 32)):
        record = {"settings": {"seed": seed, "half": half}, "levels": ["medium"]}
        (tmp_path / f"seed_{seed}.json").write_text(json.dumps(record))
    check_same(tmp_path / "empty", {"seed": 2, "half": 128}, ["medium"])
    with pytest.raises(ValueError, match="seed_1.json was made with half 32, not 128"):
        Store(tmp_path)
    with pytest.raises(ValueError, match="seed_1.json was made with half 32, not 128"):
        check_same(tmp_path, {"seed": 2, "half": 128}, ["medium"])
    (tmp_path / "seed_1.json").unlink()
    check_same(tmp_path, {"seed": 2, "half": 128}, ["medium"])
    with pytest.raises(ValueError, match="levels .'medium'., not .'medium', 'expert'."):
        check_same(tmp_path, {"seed": 0, "half": 128}, ["medium", "expert"])


# ---------------------------------------------------------------- ages of a deterministic policy


def test_the_command_of_the_ages_writes_every_cell_and_its_page(tmp_path):
    flags = "--rows 4000 --offline_updates 20 --online_updates 40 --age 10"
    flags += f" --density_updates 50 --data {tmp_path / 'data'} --out {tmp_path / 'out'}"
    command = [sys.executable, "-m", "benchmarks.exchange_accuracy.aging"]
    subprocess.run([*command, *flags.split()], cwd=ROOT, check=True, capture_output=True)
    record = json.loads((tmp_path / "out" / "aging_0.json").read_text())
    cells = {(row["score"], row["age"]): row for row in record["rows"]}
    assert len(cells) == (1 + len(aging.WIDTHS)) * 4
    for (score, _), row in cells.items():
        assert 0 <= row["auc"] <= 1
        assert row["below"] is None if score == "likelihood" else 0 <= row["below"] <= 1
    # The narrower the density, the more old rows lie outside it.
    oldest = [cells[f"policy ratio, {w}", 30]["below"] for w in aging.WIDTHS]
    assert oldest == sorted(oldest, reverse=True) and oldest[0] > oldest[-1]
    written = (tmp_path / "out" / "aging.md").read_text()
    assert written == aging.page([record])


def test_the_published_page_of_the_ages_is_that_of_the_stored_numbers():
    folder = ROOT / "results" / "exchange_accuracy"
    records = [json.loads(p.read_text()) for p in sorted(folder.glob("aging_*.json"))]
    assert records and (folder / "aging.md").read_text() == aging.page(records)
