"""Behavior models against oracles: tables, plain float64 loops, closed forms."""

import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from corl_dare import behavior, behavior_fit, cache
from corl_dare.behavior import (
    T_MIN,
    BehaviorModel,
    clipped_normal_log_prob,
    dpm_solver_sample,
    make_behavior_model,
    noise_schedule,
)
from corl_dare.behavior_fit import fit
from corl_dare.cache import fit_cached

ROBOTS = {"halfcheetah": (17, 6), "hopper": (11, 3), "antmaze": (29, 8)}
KINDS = ("diffusion", "gaussian", "mixture")
SMALL = {
    "diffusion": {"width": 0.125},
    "gaussian": {"hidden_dim": 32},
    "mixture": {"hidden_dim": 32, "components": 3},
}

# i, alpha, sigma, half log-SNR at t = 1 - 0.0666 i: the sampler's grid
GRID = [
    (0, 0.006572, 0.999978, -5.024978),
    (1, 0.012512, 0.999922, -4.380989),
    (2, 0.022794, 0.999740, -3.781008),
    (3, 0.039732, 0.999210, -3.224812),
    (4, 0.066267, 0.997802, -2.711870),
    (5, 0.105750, 0.994393, -2.241050),
    (6, 0.161474, 0.986877, -1.810199),
    (7, 0.235916, 0.971773, -1.415646),
    (8, 0.329796, 0.944052, -1.051709),
    (9, 0.441128, 0.897444, -0.710215),
    (10, 0.564570, 0.825385, -0.379786),
    (11, 0.691359, 0.722512, -0.044074),
    (12, 0.810070, 0.586334, 0.323231),
    (13, 0.908184, 0.418571, 0.774602),
    (14, 0.974223, 0.225585, 1.462944),
    (15, 0.999945, 0.010485, 4.557715),
]
# variance v -> gain of the noise and of the mean; exact score of N(m, v), 15 steps
GOLDEN = {
    0.01: (0.048705, 0.999625),
    0.04: (0.134955, 0.999058),
    0.09: (0.236005, 0.998394),
    0.25: (0.443779, 0.997029),
    1.00: (0.949185, 0.993707),
}
GOLDEN_STEPS = {
    5: 0.121095,
    8: 0.170401,
    10: 0.192802,
    16: 0.232596,
    30: 0.268669,
    101: 0.296472,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


@pytest.fixture(autouse=True)
def global_stream_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    yield
    assert torch.equal(torch.get_rng_state(), before[0]), "global torch stream was used"
    assert np.array_equal(np.random.get_state()[1], before[1])


class ExactGaussian(nn.Module):
    """Stands in for the score network: h = sigma * exact score of N(mean(s), v)."""

    def __init__(self, v, mean=None):
        super().__init__()
        self.v, self.mean = v, mean or (lambda s: s[..., :1])

    def embed_states(self, states):
        return self.mean(states)  # (..., 1)

    def forward(self, x, t, mean):
        alpha, sigma = noise_schedule(t.unsqueeze(-1))
        return -sigma * (x - alpha * mean) / (alpha**2 * self.v + sigma**2)


def exact_model(v, action_dim=1, mean=None):
    model = make_behavior_model("diffusion", 1, action_dim, width=0.05)
    model.network = ExactGaussian(v, mean)
    return model


# ---------------------------------------------------------------- forward process


def test_schedule_equals_the_reference_table():
    for i, alpha, sigma, half_log_snr in GRID:
        t = 1.0 - 0.0666 * i
        a, s = noise_schedule(t)
        assert abs(a - alpha) < 6e-7 and abs(s - sigma) < 6e-7
        assert abs(math.log(a) - math.log(s) - half_log_snr) < 6e-7
        at, st_ = noise_schedule(torch.tensor([t], dtype=torch.float64))
        assert at.item() == pytest.approx(a, abs=1e-15)
        assert st_.item() == pytest.approx(s, abs=1e-15)


@given(st.floats(1e-9, 1.0))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_schedule_is_variance_preserving_and_the_closed_form_inverse_returns_t(t):
    alpha, sigma = noise_schedule(t)
    assert alpha**2 + sigma**2 == pytest.approx(1.0, abs=1e-14)
    z = 2.0 * (20.0 - 0.1) * math.log1p((sigma / alpha) ** 2)
    inverse = z / ((20.0 - 0.1) * (math.sqrt(0.1**2 + z) + 0.1))
    assert inverse == pytest.approx(t, rel=1e-9)


def test_sigma_keeps_its_digits_near_zero_in_float32():
    for t in (1e-7, 1e-5, 1e-3, 1e-2):
        u = 0.5 * t * t * 19.9 + t * 0.1  # -2 log alpha
        series = math.sqrt(u - u**2 / 2 + u**3 / 6)  # of 1 - exp(-u)
        _, sigma = noise_schedule(torch.tensor(t, dtype=torch.float32))
        assert sigma.item() == pytest.approx(series, rel=3e-7)


# ---------------------------------------------------------------- sampler


def exact_data_prediction(v, mean):
    def data_prediction(x, t):
        alpha, sigma = noise_schedule(t)
        gain = alpha * v / (alpha**2 * v + sigma**2)
        return mean + gain * (x - alpha * mean)  # posterior mean, not via the score

    return data_prediction


def gain_of_noise(v, steps=15):
    noise = torch.tensor([0.0, 1.0], dtype=torch.float64)
    out = dpm_solver_sample(exact_data_prediction(v, 1.0), noise, steps)
    return (out[1] - out[0]).item(), out[0].item()


@pytest.mark.parametrize("v", GOLDEN)
def test_sampler_reproduces_the_golden_gains(v):
    gain, mean = gain_of_noise(v)
    assert gain == pytest.approx(GOLDEN[v][0], abs=6e-7)
    assert mean == pytest.approx(GOLDEN[v][1], abs=6e-7)


@pytest.mark.parametrize("steps", GOLDEN_STEPS)
def test_sampler_reproduces_the_golden_gain_of_other_step_counts(steps):
    assert gain_of_noise(0.09, steps)[0] == pytest.approx(GOLDEN_STEPS[steps], abs=6e-7)


def test_sampler_converges_to_the_ode():
    (a0, s0), (a1, s1) = noise_schedule(T_MIN), noise_schedule(1.0)
    for v in (0.01, 0.09, 1.0):
        ode = math.sqrt((a0**2 * v + s0**2) / (a1**2 * v + s1**2))
        coarse, fine = (abs(gain_of_noise(v, n)[0] - ode) for n in (501, 2001))
        assert fine < 1e-3 * ode and fine < coarse


@given(st.integers(1, 40))
@settings(deadline=None, derandomize=True, max_examples=40)
def test_sampler_makes_exactly_steps_evaluations_on_the_uniform_grid(steps):
    times = []

    def data_prediction(x, t):
        times.append(t)
        return torch.zeros_like(x)

    dpm_solver_sample(data_prediction, torch.ones(1), steps)
    assert all(isinstance(t, float) for t in times)
    assert np.allclose(times, np.linspace(1.0, T_MIN, steps + 1)[:-1], atol=1e-12)


@given(st.integers(1, 40), st.floats(-3.0, 3.0))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_sampler_is_exact_when_the_data_prediction_is_constant(steps, clean):
    (a0, s0), (a1, s1) = noise_schedule(T_MIN), noise_schedule(1.0)
    noise = torch.tensor([-1.5, 0.0, 2.0], dtype=torch.float64)
    out = dpm_solver_sample(lambda x, t: torch.full_like(x, clean), noise, steps)
    exact = s0 / s1 * noise + clean * (a0 - a1 * s0 / s1)
    assert torch.allclose(out, exact, rtol=0, atol=1e-12)


def test_sampler_equals_the_rule_written_out_for_a_nonlinear_prediction():
    def f(x, t):
        return np.tanh(3.0 * x + t) * (0.3 + t)

    t = [1.0 - 0.999 * i / 7 for i in range(8)]
    a = [math.exp(-0.25 * u * u * 19.9 - 0.05 * u) for u in t]
    s = [math.sqrt(1.0 - u * u) for u in a]
    lam = [math.log(u / w) for u, w in zip(a, s, strict=True)]
    x = np.array([-1.0, 0.2, 1.7])
    noise = torch.from_numpy(x.copy())
    for i in (0, 2, 4):
        h = lam[i + 2] - lam[i]
        r = (lam[i + 1] - lam[i]) / h
        d0 = f(x, t[i])
        u = s[i + 1] / s[i] * x + a[i + 1] * (1 - math.exp(-r * h)) * d0
        d1 = f(u, t[i + 1])
        mix = d0 + (d1 - d0) / (2 * r)
        x = s[i + 2] / s[i] * x + a[i + 2] * (1 - math.exp(-h)) * mix
    h = lam[7] - lam[6]
    x = s[7] / s[6] * x + a[7] * (1 - math.exp(-h)) * f(x, t[6])
    out = dpm_solver_sample(lambda x, t: torch.from_numpy(f(x.numpy(), t)), noise, 7)
    assert np.allclose(out.numpy(), x, atol=1e-10)


@pytest.mark.parametrize("steps", (0, -3))
def test_sampler_refuses_no_steps(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}"):
        dpm_solver_sample(lambda x, t: x, torch.zeros(1), steps)


# ---------------------------------------------------------------- score network


@pytest.mark.parametrize("robot", ROBOTS)
def test_score_network_has_the_published_number_of_parameters(robot):
    s, a = ROBOTS[robot]
    model = make_behavior_model("diffusion", s, a)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == 1_621_440 + 32 * s + 2049 * a
    assert sum(b.numel() for b in model.buffers()) == 16
    published = {"halfcheetah": 1_634_278, "hopper": 1_627_939, "antmaze": 1_638_760}
    assert trainable == published[robot]


def plain_network(weights, x, t, s):
    """The score network for one row, in plain numpy float64, written from its table."""

    def lin(name, u):
        return weights[f"network.{name}.weight"] @ u + weights[f"network.{name}.bias"]

    def silu(u):
        return u / (1.0 + np.exp(-u))

    def block(name, u):
        h = silu(lin(f"{name}.first", u)) + lin(f"{name}.condition", silu(e))
        h = silu(lin(f"{name}.second", h))
        has_skip = f"network.{name}.skip.weight" in weights
        return h + (lin(f"{name}.skip", u) if has_skip else u)

    angle = 2 * np.pi * t * weights["network.time.frequencies"]
    time = lin("time.linear", np.concatenate([np.sin(angle), np.cos(angle)]))
    e = np.concatenate([silu(lin("state", s)), time])
    e = lin("joint.2", silu(lin("joint.0", e)))
    d1 = block("down1", x)
    d2 = block("down2", d1)
    d3 = block("down3", d2)
    u2 = block("up3", np.concatenate([d3, block("mid", d3)]))
    u1 = block("up2", np.concatenate([d2, u2]))
    return lin("last", np.concatenate([d1, u1]))


def numpy_weights(model):
    return {k: v.double().numpy() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("width", (1.0, 0.25))
def test_score_network_equals_the_table_row_by_row(width):
    model = make_behavior_model("diffusion", 5, 3, width=width, seed=3).double()
    weights = numpy_weights(model)
    x, s = randn(4, 3, dtype=torch.float64), randn(4, 5, seed=1, dtype=torch.float64)
    t = torch.tensor([1e-3, 0.2, 0.7, 1.0], dtype=torch.float64)
    score = model.score(x, t, s).detach().numpy()
    for i in range(4):
        h = plain_network(weights, x[i].numpy(), t[i].item(), s[i].numpy())
        _, sigma = noise_schedule(t[i].item())
        assert np.allclose(score[i], h / sigma, atol=1e-10)


def test_score_is_the_network_output_over_sigma():
    model, seen = make_behavior_model("diffusion", 5, 3), []
    model.network.last.register_forward_hook(lambda m, i, out: seen.append(out))
    t = torch.tensor([1e-3, 0.01, 0.5, 1.0])
    score = model.score(randn(4, 3), t, randn(4, 5, seed=1))
    _, sigma = noise_schedule(t.unsqueeze(-1))
    assert torch.equal(score, seen[0] / sigma)
    assert torch.allclose(score * sigma, seen[0], rtol=2e-7, atol=0)


def test_denoising_loss_equals_a_plain_loop():
    model = make_behavior_model("diffusion", 4, 2, width=0.25, seed=1).double()
    s, a = randn(6, 4, dtype=torch.float64), randn(6, 2, seed=1, dtype=torch.float64)
    loss = model.loss(s, a, generator(5)).item()
    twin, weights, total = generator(5), numpy_weights(model), 0.0
    uniform = torch.rand(6, generator=twin, dtype=torch.float64).numpy()
    noise = torch.randn(6, 2, generator=twin, dtype=torch.float64).numpy()
    for i in range(6):
        t = 1e-3 + 0.999 * uniform[i]
        alpha = math.exp(-0.25 * t * t * 19.9 - 0.05 * t)
        sigma = math.sqrt(1.0 - alpha * alpha)
        x = alpha * a[i].numpy() + sigma * noise[i]
        score = plain_network(weights, x, t, s[i].numpy()) / sigma
        for j in range(2):
            total += (sigma * score[j] + noise[i, j]) ** 2
    assert loss == pytest.approx(total / 6, rel=1e-10)


def test_denoising_loss_of_a_silent_network_is_the_action_dimension():
    model = make_behavior_model("diffusion", 4, 6, width=0.05)
    for p in model.network.last.parameters():
        nn.init.zeros_(p)
    n = 50_000
    loss = model.loss(randn(n, 4), randn(n, 6, seed=1), generator(2)).item()
    assert loss == pytest.approx(6.0, abs=5 * math.sqrt(2 * 6 / n))


def test_denoising_loss_of_the_exact_score_is_below_its_neighbours():
    s = torch.zeros(20_000, 1)
    a = 0.5 * randn(20_000, 1, seed=1)
    losses = [exact_model(v).loss(s, a, generator(2)).item() for v in (0.15, 0.25, 0.4)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


# ---------------------------------------------------------------- diffusion sampling


@pytest.mark.parametrize("v", GOLDEN)
def test_model_samples_have_the_golden_gains_per_state(v):
    model = exact_model(v)
    states = torch.tensor([[0.0], [1.0], [-2.0]], dtype=torch.float64)
    noise = torch.tensor([0.0, 1.0, -0.5], dtype=torch.float64).expand(3, 3)
    out = model.sample(states, 3, noise=noise.unsqueeze(-1)).squeeze(-1)
    gain, mean = GOLDEN[v]
    assert torch.allclose(out, gain * noise + mean * states, rtol=0, atol=3e-6)


@pytest.mark.parametrize("v", GOLDEN)
@pytest.mark.parametrize("scale", (1.0, 4.0, -2.0))
def test_guidance_by_a_linear_energy_shifts_the_mean_by_its_golden_gain(v, scale):
    # Energy c(s) a: intermediate gradient c alpha v / (alpha^2 v + sigma^2); c = 1 + s.
    def guidance(x, t, states):
        assert x.shape == (6, 1) and states.shape == (6, 1)
        alpha, sigma = noise_schedule(t)
        return (1.0 + states) * alpha * v / (alpha**2 * v + sigma**2)

    model = exact_model(v, mean=lambda s: torch.zeros_like(s))
    states = torch.tensor([[0.0], [1.0], [-3.0]], dtype=torch.float64)
    noise = randn(3, 2, 1, dtype=torch.float64)
    plain = model.sample(states, 2, noise=noise)
    shift = model.sample(states, 2, noise=noise, guidance=guidance, scale=scale) - plain
    expected = scale * v * (1.0 + states) * GOLDEN[v][1]
    assert torch.allclose(shift, expected.unsqueeze(1).expand_as(shift), atol=2e-5)


def test_scale_zero_is_the_unguided_path_bit_for_bit_and_skips_the_energy():
    def forbidden(x, t, states):
        raise AssertionError("guidance was evaluated at scale 0")

    model, states = make_behavior_model("diffusion", 5, 3, width=0.25), randn(4, 5)
    noise = randn(4, 2, 3, seed=1)
    plain = model.sample(states, 2, noise=noise)
    off = model.sample(states, 2, noise=noise, guidance=forbidden, scale=0.0)
    assert torch.equal(plain, off)
    on = model.sample(
        states, 2, noise=noise, guidance=lambda x, t, s: torch.ones_like(x), scale=1.0
    )
    assert not torch.equal(plain, on)


def test_the_score_network_is_evaluated_once_per_step_and_the_states_embedded_once():
    model, calls = make_behavior_model("diffusion", 5, 3, width=0.05), []
    model.network.last.register_forward_hook(lambda *a: calls.append("step"))
    model.network.state.register_forward_hook(lambda *a: calls.append("states"))
    model.sample(randn(2, 5), 4, generator())
    assert calls == ["states"] + ["step"] * 15


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_one_state_equal_samples_of_its_copies(kind):
    model = make_behavior_model(kind, 5, 3, seed=1, **SMALL[kind]).double()
    states, noise = (randn(4, 5, dtype=torch.float64), randn(4, 6, 3, seed=1).double())
    together = model.sample(states, 6, noise=noise)
    copies = model.sample(states.repeat_interleave(6, 0), 1, noise=noise.view(24, 1, 3))
    assert torch.allclose(together.view(24, 1, 3), copies, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_a_function_of_the_noise(kind):
    model, states = make_behavior_model(kind, 5, 3, **SMALL[kind]), randn(4, 5)
    noise = randn(4, 2, 3, seed=7)
    first = model.sample(states, 2, noise=noise)
    assert first.shape == (4, 2, 3) and not first.requires_grad
    assert torch.equal(first, model.sample(states, 2, noise=noise.clone()))
    assert torch.equal(first, model.sample(states, 2, generator(7)))
    assert not torch.equal(first, model.sample(states, 2, generator(8)))


@pytest.mark.parametrize("kind", KINDS)
def test_sample_refuses_missing_or_misshapen_noise(kind):
    model, states = make_behavior_model(kind, 5, 3, **SMALL[kind]), randn(4, 5)
    with pytest.raises(ValueError, match="needs a generator or noise"):
        model.sample(states)
    with pytest.raises(ValueError, match=r"noise has shape \(4, 1, 2\).*\(4, 1, 3\)"):
        model.sample(states, noise=randn(4, 1, 2))


# ---------------------------------------------------------------- densities


def with_random_head(kind, state_dim, action_dim, seed=0, **options):
    """A density model with visibly different components, in float64."""
    model = make_behavior_model(kind, state_dim, action_dim, seed=seed, **options)
    with torch.no_grad():
        bias = model.net[-1].bias
        bias.copy_(randn(len(bias), seed=seed))
    return model.double()


@pytest.mark.parametrize("kind", ("gaussian", "mixture"))
def test_density_integrates_to_one(kind):
    model = with_random_head(kind, 2, 1, seed=4, hidden_dim=16)
    grid = torch.linspace(-60.0, 60.0, 24_001, dtype=torch.float64)
    for state in randn(3, 2, seed=1, dtype=torch.float64):
        with torch.no_grad():
            log_prob = model.log_prob(state.expand(len(grid), 2), grid.unsqueeze(-1))
        assert torch.trapezoid(log_prob.exp(), grid).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", ("gaussian", "mixture"))
def test_probabilities_of_clipped_actions_add_up_to_one(kind):
    """Density between the bounds, mass at them."""
    model = with_random_head(kind, 2, 1, seed=4, hidden_dim=16)
    grid = torch.linspace(-0.7, 0.7, 20_001, dtype=torch.float64)
    for state in randn(3, 2, seed=1, dtype=torch.float64):
        with torch.no_grad():
            rows = state.expand(len(grid), 2), grid.unsqueeze(-1)
            log_prob = model.log_prob(*rows, 0.7)
            assert torch.equal(log_prob[1:-1], model.log_prob(*rows)[1:-1])
            inside = model.log_prob(*rows).exp()
        mass = log_prob[0].exp() + log_prob[-1].exp()
        whole = torch.trapezoid(inside, grid) + mass
        assert mass > 0.01 and whole.item() == pytest.approx(1, abs=1e-6)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.floats(-3, 3),
    st.floats(-3, 1),
    st.floats(0.1, 2),
    st.sampled_from([-1.0, 1.0]),
)
def test_the_mass_at_a_bound_by_erfc(mean, log_std, bound, side):
    found = clipped_normal_log_prob(
        *(torch.tensor(x, dtype=torch.float64) for x in (side * bound, mean, log_std)),
        bound,
    )
    beyond = (bound - side * mean) / math.exp(log_std)
    assert found.exp().item() == pytest.approx(
        0.5 * math.erfc(beyond / math.sqrt(2)), rel=1e-9, abs=1e-300
    )


def test_a_bound_far_from_the_mean_has_a_finite_log_mass():
    found = clipped_normal_log_prob(
        torch.tensor([1.0, -1.0]), torch.tensor(-0.9), torch.tensor(-5.0), 1.0
    )
    assert found.isfinite().all() and found[0] < -1e4 and found[1] > -1e3


def torch_distribution(model, states):
    log_weight, mean, log_std = model.distribution(states)
    normal = torch.distributions.Normal(mean, log_std.exp())
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=log_weight),
        torch.distributions.Independent(normal, 1),
    )


@pytest.mark.parametrize("kind", ("gaussian", "mixture"))
def test_log_prob_equals_torch_distributions(kind):
    model = with_random_head(kind, 4, 3)
    s, a = randn(50, 4, dtype=torch.float64), randn(50, 3, seed=1, dtype=torch.float64)
    expected = torch_distribution(model, s).log_prob(a)
    assert model.log_prob(s, a).shape == (50,)
    assert torch.allclose(model.log_prob(s, a), expected, atol=1e-10)
    assert torch.allclose(model.loss(s, a, None), -expected.mean())


@pytest.mark.parametrize("kind", ("gaussian", "mixture"))
def test_sample_moments_equal_the_density_s(kind):
    model, n = with_random_head(kind, 2, 2, seed=2), 100_000
    states = randn(2, 2, dtype=torch.float64)
    out = model.sample(states, n, generator(1))
    law = torch_distribution(model, states)
    error = 5 * (law.variance / n).sqrt()
    assert (out.mean(1) - law.mean).abs().lt(error).all()
    assert torch.allclose(out.var(1), law.variance.detach(), rtol=0.05)
    _, mean, _ = model.distribution(states)
    assert kind == "gaussian" or (mean.std(1) > 0.3).all()  # the test sees components


def test_mixture_samples_follow_the_mixture_s_distribution_function():
    # On a grid of noise quantiles the choice of component leaves no randomness: the
    # empirical distribution may be off by the few grid points at the C - 1 edges only.
    model, n = with_random_head("mixture", 2, 1, seed=3), 20_000
    state = randn(1, 2, dtype=torch.float64)
    ranks = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    noise = torch.special.ndtri(ranks).view(1, n, 1)
    out = model.sample(state, n, noise=noise).flatten().sort().values
    log_weight, mean, log_std = (p.detach() for p in model.distribution(state))
    z = (out[:, None] - mean[..., 0]) / log_std[..., 0].exp()
    cdf = (log_weight.exp() * torch.special.ndtr(z)).sum(-1)
    assert (cdf - ranks).abs().max().item() < 10 / n


def test_mixture_sample_is_finite_for_extreme_noise_and_dead_components():
    model = make_behavior_model("mixture", 2, 2, components=3)
    with torch.no_grad():
        model.net[-1].weight.zero_()
        model.net[-1].bias.view(3, -1)[:, 0] = torch.tensor([-200.0, 0.0, -200.0])
    extreme = torch.tensor([-40.0, -9.0, -6.0, 0.0, 6.0, 9.0, 40.0])
    noise = extreme.view(1, 7, 1).repeat(1, 1, 2)
    out = model.sample(torch.zeros(1, 2), 7, noise=noise)
    _, mean, log_std = model.distribution(torch.zeros(1, 2))
    assert out.isfinite().all()
    # only the living component may be chosen: its second coordinate shows it
    expected = mean[0, 1, 1] + log_std[0, 1, 1].exp() * extreme
    assert torch.allclose(out[0, :, 1], expected, rtol=1e-5)
    inner = mean[0, 1, 0] + log_std[0, 1, 0].exp() * extreme[2:5]
    assert torch.allclose(out[0, 2:5, 0], inner, atol=1e-3)


@given(st.floats(-1e4, 1e4))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_log_std_stays_in_its_bounds_and_keeps_a_gradient(raw):
    model = make_behavior_model("gaussian", 1, 1, hidden_dim=4).double()
    with torch.no_grad():
        model.net[-1].weight.zero_()
        model.net[-1].bias.copy_(torch.tensor([0.0, 0.0, raw]))
    log_std = model.distribution(torch.zeros(1, 1, dtype=torch.float64))[2]
    assert -5.0 <= log_std.item() <= 2.001
    log_std.sum().backward()
    gradient = model.net[-1].bias.grad[2].item()
    assert gradient > 0.01 if -8.0 < raw < 5.0 else gradient >= 0.0


def test_likelihood_of_actions_piled_on_the_bound_stays_bounded():
    model = make_behavior_model("mixture", 1, 2, components=2, hidden_dim=16)
    losses = fit(
        model,
        torch.zeros(64, 1),
        torch.ones(64, 2),
        updates=1500,
        batch_size=64,
        lr=3e-2,
        generator=generator(),
        progress=False,
    )
    floor = 2 * (-5.0 + 0.5 * math.log(2 * math.pi))  # the narrowest Gaussian's
    assert floor - 1e-3 <= losses[-1] < floor + 1.0


def test_diffusion_says_that_it_has_no_density():
    model = make_behavior_model("diffusion", 5, 3, width=0.05)
    with pytest.raises(NotImplementedError, match="diffusion .* no density"):
        model.log_prob(randn(2, 5), randn(2, 3))


def test_state_normalization_uses_population_moments_and_leaves_constants_alone():
    model = make_behavior_model("gaussian", 3, 1)
    states = torch.tensor([[1.0, 5.0, -2.0], [3.0, 5.0, -2.0 + 1e-6]])
    model.normalize_to(states)
    assert torch.allclose(model.state_mean, torch.tensor([2.0, 5.0, -2.0]))
    assert torch.allclose(model.state_std, torch.tensor([1.0, 1.0, 1.0]))
    assert {"state_mean", "state_std"} <= set(model.state_dict())


@pytest.mark.parametrize("kind", ("gaussian", "mixture"))
def test_density_models_do_not_care_about_the_scale_of_the_states(kind):
    s, a = randn(200, 3, dtype=torch.float64), randn(200, 2, seed=1).double()
    answers = []
    for factor, offset in ((1.0, 0.0), (1024.0, -4096.0)):
        model = make_behavior_model(kind, 3, 2, **SMALL[kind]).double()
        scaled = s * factor + offset
        options = dict(updates=20, batch_size=50, lr=1e-3, progress=False)
        fit(model, scaled, a, generator=generator(), **options)
        answers.append(model.log_prob(scaled, a))
    assert torch.allclose(*answers, atol=1e-6)


# ---------------------------------------------------------------- construction


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_a_function_of_the_seed(kind):
    states = [
        make_behavior_model(kind, 5, 3, seed=seed, **SMALL[kind]).state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert any(not torch.equal(states[0][k], states[2][k]) for k in states[0])


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("vae", {}, "'vae' is not one of diffusion, gaussian, mixture"),
        ("gaussian", {"width": 2}, "'gaussian'.*width"),
        ("diffusion", {"width": 0.0}, "width is 0.0"),
        ("diffusion", {"width": math.nan}, "width is nan"),
        ("mixture", {"components": 0}, "components 0"),
    ],
)
def test_bad_settings_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make_behavior_model(kind, 5, 3, **options)


def test_bad_dimensions_are_named():
    with pytest.raises(ValueError, match="action_dim 0"):
        make_behavior_model("gaussian", 5, 0)


# ---------------------------------------------------------------- fit


class Recorder(BehaviorModel):
    """Keeps the rows it is shown; its k-th loss is k."""

    kind = "recorder"

    def __init__(self, loss=lambda k: k):
        super().__init__(1, 1)
        self.weight = nn.Parameter(torch.zeros(()))
        self.rows, self.loss_of = [], loss

    def loss(self, states, actions, generator):
        assert torch.equal(states, -actions)
        self.rows.append(states.flatten().tolist())
        return self.loss_of(len(self.rows)) + 0.0 * self.weight


def fit_recorder(n, batch_size, updates, model=None, **options):
    model = model or Recorder()
    rows = torch.arange(float(n)).unsqueeze(-1)
    settings_ = dict(lr=1e-3, generator=generator(), progress=False) | options
    losses = fit(model, rows, -rows, updates=updates, batch_size=batch_size, **settings_)
    return model.rows, losses


@given(st.integers(1, 20), st.integers(1, 25), st.integers(1, 30))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_each_pass_shows_distinct_rows_in_full_batches(n, batch_size, updates):
    batches, _ = fit_recorder(n, batch_size, updates)
    size = min(n, batch_size)
    assert len(batches) == updates and all(len(b) == size for b in batches)
    for start in range(0, updates, n // size):
        shown = sum(batches[start : start + n // size], [])
        assert len(set(shown)) == len(shown)


def test_passes_are_shuffled_differently():
    batches, _ = fit_recorder(100, 100, 2)
    assert batches[0] != batches[1] and sorted(batches[0]) == sorted(batches[1])
    assert batches[0] != sorted(batches[0])


def test_losses_are_window_means():
    _, losses = fit_recorder(4, 2, 450)
    assert losses.tolist() == [100.5, 300.5, 425.5]


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_one_bad_loss_is_noticed_at_the_next_read(bad):
    model = Recorder(lambda k: bad if k == 37 else 1.0)
    with pytest.raises(RuntimeError, match="after 200 updates.*lr"):
        fit_recorder(4, 2, 1000, model)
    assert len(model.rows) == 200


def test_should_stop_is_asked_every_50_updates_and_interrupts():
    answers, model = iter([False, False, True]), Recorder()
    with pytest.raises(KeyboardInterrupt, match="150 of 1000"):
        fit_recorder(4, 2, 1000, model, should_stop=lambda: next(answers))
    assert len(model.rows) == 150


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"states": torch.zeros(0, 2), "actions": torch.zeros(0, 1)},
            "states are empty",
        ),
        ({"states": torch.zeros(4, 3)}, r"states have shape \(4, 3\).*\(N, 2\)"),
        ({"actions": torch.zeros(4)}, r"actions have shape \(4,\)"),
        ({"actions": torch.zeros(3, 1)}, "4 states but 3 actions"),
        (
            {"actions": np.array([[0.0], [1], [np.nan], [0]])},
            "actions row 2 is not finite",
        ),
        (
            {"states": torch.full((4, 2), 1e60, dtype=torch.float64)},
            "states row 0 is not",
        ),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"updates": 0}, "updates is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": math.nan}, "lr is nan"),
    ],
)
def test_fit_refuses_bad_input(change, message):
    arguments = dict(
        states=torch.zeros(4, 2),
        actions=torch.zeros(4, 1),
        updates=1,
        batch_size=2,
        lr=1e-3,
        generator=generator(),
        progress=False,
    )
    model = make_behavior_model("gaussian", 2, 1, hidden_dim=8)
    with pytest.raises(ValueError, match=message):
        fit(model, **(arguments | change))


@pytest.mark.parametrize("kind", KINDS)
def test_fit_survives_one_row_and_zero_variance(kind):
    model = make_behavior_model(kind, 2, 1, **SMALL[kind])
    options = dict(updates=5, batch_size=256, lr=1e-3, progress=False)
    losses = fit(
        model, np.ones((1, 2)), np.ones((1, 1)), generator=generator(), **options
    )
    assert np.isfinite(losses).all()
    assert model.sample(torch.ones(1, 2), 3, generator()).isfinite().all()


def toy(n, seed=0):
    """a1 | s ~ N(0.5 s, 0.3^2) with s in {-1, 1}, a2 ~ N(0, 0.3^2)."""
    states = torch.where(randn(n, 1, seed=seed) > 0, 1.0, -1.0)
    noise = 0.3 * randn(n, 2, seed=seed + 1)
    return states, noise + torch.cat([0.5 * states, torch.zeros_like(states)], -1)


def test_diffusion_learns_a_conditional_gaussian():
    states, actions = toy(4000)
    model = make_behavior_model("diffusion", 1, 2, width=0.125)
    ask = torch.tensor([[-1.0], [1.0]])
    before = model.sample(ask, 500, generator(9))
    options = dict(updates=1500, batch_size=256, lr=2e-3, progress=False)
    losses = fit(model, states, actions, generator=generator(3), **options)
    out = model.sample(ask, 500, generator(9))  # (2, 500, 2)
    goal = torch.tensor([[-0.5, 0.0], [0.5, 0.0]])
    assert losses[-1] < 0.75 * losses[0]
    assert (out.mean(1) - goal).abs().max() < 0.12
    # the sampler turns an std of 0.3 into 0.236
    assert (out.std(1) - 0.236).abs().max() < 0.08
    untrained = (before.mean(1) - goal).abs().max() + (before.std(1) - 0.236).abs().max()
    assert untrained > 0.3


@pytest.mark.parametrize("kind", ("gaussian", "mixture"))
def test_density_models_learn_a_conditional_gaussian(kind):
    states, actions = toy(4000)
    model = make_behavior_model(kind, 1, 2, **SMALL[kind])
    options = dict(updates=600, batch_size=256, lr=3e-3, progress=False)
    fit(model, states, actions, generator=generator(3), **options)
    fresh = toy(4000, seed=50)
    entropy = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.3))
    assert -model.log_prob(*fresh).mean().item() == pytest.approx(entropy, abs=0.06)


def test_mixture_learns_two_modes_and_the_gaussian_cannot():
    n = 4000
    side = torch.where(randn(n, 1) > 0.5, 0.8, -0.8)  # 31 % on the right
    actions, states = side + 0.1 * randn(n, 1, seed=1), randn(n, 2, seed=2)
    share = (side > 0).float().mean().item()
    loss = {}
    for kind in ("gaussian", "mixture"):
        model = make_behavior_model(kind, 2, 1, **SMALL[kind])
        options = dict(updates=500, batch_size=256, lr=3e-3, progress=False)
        loss[kind] = fit(model, states, actions, generator=generator(3), **options)[-1]
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.01)
    entropy -= share * math.log(share) + (1 - share) * math.log(1 - share)
    assert loss["mixture"] == pytest.approx(entropy, abs=0.1)
    assert loss["gaussian"] > entropy + 0.5
    out = model.sample(states[:1], 2000, generator(4))
    assert (out > 0).float().mean().item() == pytest.approx(share, abs=0.06)


# ---------------------------------------------------------------- cache


def cached(folder, kind="gaussian", **change):
    states, actions = toy(64)
    arguments = dict(
        updates=5,
        batch_size=16,
        lr=1e-3,
        seed=0,
        dataset_hash="abc",
        cache_dir=folder,
        options=SMALL[kind],
        progress=False,
    )
    return fit_cached(kind, states, actions, **(arguments | change))


@pytest.mark.parametrize("kind", KINDS)
def test_second_call_loads_the_same_frozen_model(kind, tmp_path):
    first, path, loaded = cached(tmp_path / "new", kind)
    again, same_path, loaded_again = cached(tmp_path / "new", kind)
    assert (loaded, loaded_again) == (False, True) and path == same_path
    assert [p.name for p in (tmp_path / "new").iterdir()] == [path.name]
    assert path.name.startswith(f"behavior-{kind}-") and path.suffix == ".safetensors"
    for model in (first, again):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    states, noise = randn(4, 1), randn(4, 2, 2, seed=1)
    assert torch.equal(
        first.sample(states, 2, noise=noise), again.sample(states, 2, noise=noise)
    )


def test_training_moved_the_cached_weights(tmp_path):
    model, _, _ = cached(tmp_path)
    fresh = make_behavior_model("gaussian", 1, 2, seed=0, **SMALL["gaussian"])
    assert not torch.equal(model.net[0].weight, fresh.net[0].weight)


def test_the_file_says_what_is_in_it(tmp_path):
    _, path, _ = cached(tmp_path, updates=7)
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["settings"])
    assert record["updates"] == 7 and record["dataset_hash"] == "abc"
    assert record["kind"] == "gaussian" and record["options"] == SMALL["gaussian"]


@pytest.mark.parametrize(
    "change",
    [
        {"updates": 6},
        {"batch_size": 8},
        {"lr": 2e-3},
        {"seed": 1},
        {"dataset_hash": "abd"},
        {"options": {"hidden_dim": 16}},
        {"kind": "mixture"},
    ],
)
def test_a_changed_setting_trains_again(change, tmp_path):
    _, path, _ = cached(tmp_path)
    _, other, loaded = cached(tmp_path, **change)
    assert not loaded and other != path and path.exists()


def test_default_options_and_the_same_options_spelled_out_are_one_model(tmp_path):
    _, path, _ = cached(tmp_path, options=None)
    _, same, loaded = cached(tmp_path, options={"hidden_dim": 256})
    assert loaded and same == path


def test_a_new_format_does_not_read_old_files(tmp_path, monkeypatch):
    _, path, _ = cached(tmp_path)
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    _, other, loaded = cached(tmp_path)
    assert not loaded and other != path


@pytest.mark.parametrize("keep", (0, 4, 200, -1))
def test_a_truncated_file_is_named_with_the_remedy(keep, tmp_path):
    _, path, _ = cached(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RuntimeError, match=f"{path.name} is damaged.*delete it"):
        cached(tmp_path)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    _, path, _ = cached(tmp_path)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match="damaged.*checksum.*delete it"):
        cached(tmp_path)


def test_a_file_of_other_settings_under_this_name_is_refused(tmp_path):
    _, path, _ = cached(tmp_path)
    _, other, _ = cached(tmp_path, updates=6)
    other.replace(path)
    with pytest.raises(RuntimeError, match="belongs to other settings.*delete it"):
        cached(tmp_path)


LONG = {"updates": 230, "batch_size": 10}  # 50 updates end in the middle of a pass


class Bars:
    """In the place of `tqdm`: remembers where each bar started."""

    def __init__(self):
        self.starts = []

    def __call__(self, *, initial, **options):
        self.starts.append(initial)
        return behavior_fit.tqdm(initial=initial, **options)


def stop_at(*answers):
    answers = iter(answers)
    return lambda: next(answers)


def same_bits(file, other):
    """The weights of two files; their headers have no fixed order."""
    one, two = load_file(file), load_file(other)
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def files(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_goes_on_to_the_same_bits(kind, tmp_path):
    _, path, _ = cached(tmp_path / "whole", kind, **LONG)
    folder, bars = tmp_path / "parts", Bars()
    options = {**LONG, "bar": bars}
    unfinished = f"{path.stem}.cpu.unfinished"
    for done, answers in ((50, [True]), (200, [False, False, True])):
        expected = f"after {done} of 230 updates; the same call goes on from there"
        with pytest.raises(KeyboardInterrupt, match=expected):
            cached(folder, kind, should_stop=stop_at(*answers), **options)
        assert files(folder) == [unfinished]
    _, same_path, loaded = cached(folder, kind, **options)
    assert bars.starts == [0, 50, 200] and not loaded
    assert files(folder) == [path.name] == [same_path.name]
    assert same_bits(same_path, path)


def test_the_losses_of_a_resumed_training_are_those_of_the_whole():
    states, actions = toy(64)

    def run(**options):
        model = make_behavior_model("gaussian", 1, 2, **SMALL["gaussian"])
        options = {"generator": generator(), "progress": False, **options}
        return fit(
            model, states, actions, updates=430, batch_size=10, lr=1e-3, **options
        )

    file = io.BytesIO()
    with pytest.raises(KeyboardInterrupt, match="after 250"):
        run(
            should_stop=stop_at(*[False] * 4, True),
            save=lambda state: torch.save(state, file),
        )
    file.seek(0)
    resumed = run(resume=torch.load(file, weights_only=True), generator=generator(9))
    whole = run()
    assert len(whole) == 3 and resumed.tolist() == whole.tolist()


def test_a_killed_training_goes_on_from_the_last_saved_state(tmp_path, monkeypatch):
    _, path, _ = cached(tmp_path / "whole", **LONG)

    class Killed(BaseException):
        pass

    losses, loss = [], behavior.GaussianBehavior.loss

    def fatal(*arguments):
        losses.append(1)
        if len(losses) == 120:
            raise Killed
        return loss(*arguments)

    folder, bars = tmp_path / "parts", Bars()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(behavior_fit, "SAVE_SECONDS", 0.0)
        patch.setattr(behavior.GaussianBehavior, "loss", fatal)
        cached(folder, **LONG)
    _, same_path, _ = cached(folder, bar=bars, **LONG)
    assert bars.starts == [100]
    assert same_bits(same_path, path)


def test_the_training_is_saved_once_a_minute(monkeypatch):
    clock = iter(range(0, 10_000, 25))  # 25 s pass between two looks at the clock
    monkeypatch.setattr(
        behavior_fit, "time", SimpleNamespace(perf_counter=clock.__next__)
    )
    saved = []
    fit_recorder(4, 2, 1000, save=lambda state: saved.append(state["updates"]))
    # Looks at 25, 50, 75 s; the clock is read once more after saving.
    assert saved == [150, 300, 450, 600, 750, 900]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
    ],
    ids=["empty", "truncated", "a bit of the header", "a bit of a tensor"],
)
def test_a_damaged_unfinished_training_is_reported_and_started_afresh(
    damage, tmp_path, capsys
):
    _, path, _ = cached(tmp_path / "whole", **LONG)
    folder, bars = tmp_path / "parts", Bars()
    with pytest.raises(KeyboardInterrupt):
        cached(folder, should_stop=lambda: True, **LONG)
    unfinished = next(folder.iterdir())
    unfinished.write_bytes(damage(unfinished.read_bytes()))
    _, same_path, _ = cached(folder, bar=bars, **LONG)
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and f"{unfinished.name} is damaged" in shown
    assert "trained from the start" in shown and bars.starts == [0]
    assert same_bits(same_path, path)
    assert files(folder) == [path.name]


def test_an_unfinished_training_of_other_settings_is_not_used(tmp_path, capsys):
    for lr in (1e-3, 2e-3):
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path / str(lr), should_stop=lambda: True, lr=lr, **LONG)
    mine, other = (next((tmp_path / str(lr)).iterdir()) for lr in (1e-3, 2e-3))
    assert mine.name != other.name
    other.replace(mine)
    bars = Bars()
    cached(mine.parent, bar=bars, **LONG)
    assert "belongs to other settings" in capsys.readouterr().out
    assert bars.starts == [0]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(cache.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        cached(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, message",
    [({"dataset_hash": ""}, "dataset_hash is empty"), ({"lr": -1.0}, "lr is -1.0")],
)
def test_cache_refuses_bad_settings(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        cached(tmp_path, **change)


def test_cache_refuses_flat_arrays(tmp_path):
    options = dict(updates=1, batch_size=1, lr=1e-3, seed=0, dataset_hash="a")
    with pytest.raises(ValueError, match=r"states \(3,\).*must be \(N, S\)"):
        fit_cached("gaussian", np.zeros(3), np.zeros(3), cache_dir=tmp_path, **options)
