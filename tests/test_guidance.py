"""Energy guidance against closed forms, plain float64 loops and finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corl_dare.behavior import dpm_solver_sample, make_behavior_model, noise_schedule
from corl_dare.guidance import (
    T_MIN,
    EnergyNetwork,
    contrastive_loss,
    energy_gradient,
)

DOUBLE = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=DOUBLE)


@pytest.fixture(autouse=True)
def global_stream_is_left_alone():
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "global torch stream was used"


def optimal_energy(x, support, q, beta, alpha, sigma):
    """log E[exp(beta Q) | a_t = x] for K equally likely atoms as clean actions.

    x (..., 1) in one dimension, support and q (K,) -> (...)
    """
    log_normal = -0.5 * ((x - alpha * support) / sigma).square()
    return (beta * q + log_normal).logsumexp(-1) - log_normal.logsumexp(-1)


# ---------------------------------------------------------------- network


@pytest.mark.parametrize(
    "s, a, published", [(17, 6, 213_025), (11, 3, 210_721), (29, 8, 216_609)]
)
def test_energy_network_has_the_published_number_of_parameters(s, a, published):
    energy = EnergyNetwork(s, a)
    assert sum(p.numel() for p in energy.parameters()) == published
    assert published == 207_137 + 256 * (a + s)
    assert sum(b.numel() for b in energy.buffers()) == 16


def plain_energy(energy, action, t, state):
    """f for one row in plain numpy, written from its definition."""
    w = {k: v.detach().double().numpy() for k, v in energy.state_dict().items()}
    angle = 2 * np.pi * t * w["frequencies"]
    time = w["time.weight"] @ np.concatenate([np.sin(angle), np.cos(angle)])
    x = np.concatenate([action, time + w["time.bias"], state])
    x = w["input.weight"] @ x + w["input.bias"]
    for layer in (1, 3, 5, 7):
        x = x / (1 + np.exp(-x))
        x = w[f"hidden.{layer}.weight"] @ x + w[f"hidden.{layer}.bias"]
    return x.item()


def test_energy_network_equals_a_plain_loop_in_both_forms():
    energy = EnergyNetwork(5, 3, seed=2).double()
    actions, states, t = randn(4, 6, 3), randn(4, 5, seed=1), randn(4, seed=2).sigmoid()
    together = energy(actions, t, states)
    assert together.shape == (4, 6)
    for i in range(4):
        for k in range(6):
            row = actions[i, k].numpy(), t[i].item(), states[i].numpy()
            assert together[i, k].item() == pytest.approx(
                plain_energy(energy, *row), rel=1e-9, abs=1e-11
            )
    for k in range(6):
        rows = energy(actions[:, k], t, states)
        assert rows.shape == (4,)
        assert torch.allclose(rows, together[:, k], rtol=1e-9, atol=1e-12)


def test_one_time_for_all_rows_broadcasts():
    energy = EnergyNetwork(5, 3).double()
    x, states, t = randn(4, 3), randn(4, 5, seed=1), torch.tensor([0.3], dtype=DOUBLE)
    assert torch.allclose(energy(x, t, states), energy(x, t.expand(4), states))


def test_weights_are_a_function_of_the_seed():
    first, same, other = (EnergyNetwork(5, 3, seed=s).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert all(not torch.equal(first[k], other[k]) for k in first)


# ---------------------------------------------------------------- loss


def entropy(q, beta):
    labels = (beta * q).softmax(-1)
    return -(labels * (beta * q).log_softmax(-1)).sum(-1).mean()


def loss_of(energy, q, beta=3.0, seed=0):
    b, k = q.shape
    support, states = randn(b, k, 2, seed=seed), randn(b, 4, seed=seed + 1)
    return contrastive_loss(
        energy, support, q, states, beta, generator(seed), noise_schedule
    )


def test_loss_equals_a_plain_loop():
    energy = EnergyNetwork(4, 2, seed=1).double()
    support, states, q = randn(3, 5, 2), randn(3, 4, seed=1), randn(3, 5, seed=2)
    args = (support, q, states, 1.7, generator(8), noise_schedule)
    loss = contrastive_loss(energy, *args).item()
    twin, total = generator(8), 0.0
    uniform = torch.rand(3, generator=twin, dtype=DOUBLE).tolist()
    noise = torch.randn(3, 5, 2, generator=twin, dtype=DOUBLE).numpy()
    for i in range(3):
        t = 1e-3 + 0.999 * uniform[i]
        alpha = math.exp(-0.25 * t * t * 19.9 - 0.05 * t)
        sigma = math.sqrt(1 - alpha**2)
        f, p = [], []
        for k in range(5):
            x = alpha * support[i, k].numpy() + sigma * noise[i, k]
            f.append(plain_energy(energy, x, t, states[i].numpy()))
            p.append(math.exp(1.7 * q[i, k].item()))
        for k in range(5):
            predicted = math.exp(f[k]) / sum(math.exp(v) for v in f)
            total -= p[k] / sum(p) * math.log(predicted)
    assert loss == pytest.approx(total / 3, rel=1e-9)


def test_one_time_per_state_and_independent_noise_per_action():
    seen = {}

    def schedule(t):
        return torch.full_like(t, 2.0), torch.full_like(t, 0.5)

    def energy(x, t, states):
        seen["noise"], seen["t"] = (x - 2.0 * support) / 0.5, t
        return x.sum(-1)

    b, k, a = 4000, 4, 2
    support, q, states = randn(b, k, a), randn(b, k, seed=1), randn(b, 3, seed=2)
    contrastive_loss(energy, support, q, states, 1.0, generator(3), schedule)
    t, noise = seen["t"], seen["noise"].flatten(1)
    assert t.shape == (b,) and t.min() >= T_MIN and t.max() <= 1.0
    assert t.mean().item() == pytest.approx(0.5005, abs=0.02)
    assert t.std().item() == pytest.approx(0.999 / math.sqrt(12), abs=0.02)
    covariance = torch.cov(noise.T)
    assert torch.allclose(covariance, torch.eye(k * a, dtype=DOUBLE), atol=0.12)


@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.floats(0.0, 50.0),
    st.floats(0.0, 100.0),
    st.integers(0, 1000),
)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_loss_is_at_least_the_entropy_of_the_labels(b, k, beta, spread, seed):
    q, f = spread * randn(b, k, seed=seed), 3.0 * randn(b, k, seed=seed + 1)
    loss, bound = loss_of(lambda *_: f, q, beta), entropy(q, beta)
    assert loss.isfinite() and loss >= bound - 1e-9
    same = (f.softmax(-1) - (beta * q).softmax(-1)).abs().max() < 1e-3
    assert same or loss > bound + 1e-7


def test_loss_equals_the_entropy_iff_the_softmaxes_agree_with_plus_sign():
    q = randn(6, 4)
    bound = entropy(q, 3.0).item()
    assert loss_of(lambda *_: 3.0 * q, q).item() == pytest.approx(bound, abs=1e-12)
    assert loss_of(lambda *_: -3.0 * q, q).item() > bound + 0.1
    assert loss_of(lambda *_: 2.0 * q, q).item() > bound + 1e-3


@given(st.floats(-1e3, 1e3), st.integers(0, 1000))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_loss_ignores_constants_per_state_and_time(size, seed):
    q, f, c = randn(4, 5), randn(4, 5, seed=1), size * randn(4, 1, seed=seed)
    base = loss_of(lambda *_: f, q).item()

    def shifted(x, t, states):
        return f + c * torch.cos(5 * t).unsqueeze(-1) + states.sum(-1, keepdim=True)

    assert loss_of(shifted, q).item() == pytest.approx(base, abs=1e-9)
    assert loss_of(lambda *_: f, q + c).item() == pytest.approx(base, abs=1e-9)


def test_no_gradient_flows_into_the_labels():
    q = randn(3, 4).requires_grad_(True)
    energy = EnergyNetwork(4, 2).double()
    loss_of(energy, q).backward()
    assert q.grad is None
    gradients = {name: p.grad.abs().max() for name, p in energy.named_parameters()}
    # f + constant is the same prediction, so the last bias has nothing to learn
    assert gradients.pop("hidden.7.bias") < 1e-12
    assert min(gradients.values()) > 1e-9


@pytest.mark.parametrize("size", (1e4, 1e30))
def test_huge_q_values_give_a_finite_loss(size):
    energy = EnergyNetwork(4, 2).double()
    assert loss_of(energy, size * randn(3, 4)).isfinite()


@pytest.mark.parametrize(
    "support, q, states",
    [
        ((3, 4), (3, 4), (3, 5)),
        ((3, 4, 2), (3, 5), (3, 5)),
        ((3, 4, 2), (3,), (3, 5)),
        ((3, 4, 2), (3, 4), (2, 5)),
    ],
)
def test_loss_refuses_shapes_that_do_not_fit(support, q, states):
    shapes = torch.zeros(support), torch.zeros(q), torch.zeros(states)
    with pytest.raises(ValueError, match="do not fit"):
        contrastive_loss(EnergyNetwork(5, 2), *shapes, 1.0, generator(), noise_schedule)


# ---------------------------------------------------------------- the optimum

ATOMS = torch.tensor([-1.0, 0.0, 1.5], dtype=DOUBLE)
ATOM_Q = torch.tensor([0.0, 1.0, -0.5], dtype=DOUBLE)
LEVEL = 0.8, 0.6  # one noise level, so that f is a function of one number


def fixed_level(t):
    return torch.full_like(t, LEVEL[0]), torch.full_like(t, LEVEL[1])


def atom_loss(energy, b, k, seed):
    """Loss on b states whose k support actions are drawn from the three atoms."""
    g = generator(seed)
    which = torch.randint(3, (b, k), generator=g)
    support, q = ATOMS[which].unsqueeze(-1), ATOM_Q[which]
    states = torch.zeros(b, 1, dtype=DOUBLE)
    return contrastive_loss(energy, support, q, states, 1.5, g, fixed_level)


def closed_form(x):
    return optimal_energy(x, ATOMS, ATOM_Q, 1.5, *LEVEL)


def test_gradient_descent_on_a_free_table_finds_the_closed_form():
    edges = torch.linspace(-2.5, 3.0, 45, dtype=DOUBLE)
    width = edges[1] - edges[0]
    table = torch.zeros(45, dtype=DOUBLE, requires_grad=True)

    def energy(x, t, states):
        place = ((x.squeeze(-1) - edges[0]) / width).clamp(0, 43.999)
        left = place.floor().long()
        share = place - left
        return table[left] * (1 - share) + table[left + 1] * share

    optimizer = torch.optim.Adam([table], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for step in range(400):
        optimizer.zero_grad()
        atom_loss(energy, 64, 64, step).backward()
        optimizer.step()
        schedule.step()
    inside = edges.abs().sub(0.1).abs() < 1.6  # where the noised actions are
    goal = closed_form(edges.unsqueeze(-1))[inside]
    found = table.detach()[inside]
    error = (found - found.mean()) - (goal - goal.mean())
    assert goal.std() > 0.3  # a flat table would miss the threshold by far
    assert error.abs().max() < 0.15
    assert error.square().mean().sqrt() < 0.05


@pytest.mark.parametrize("bump", (torch.sin, torch.tanh, lambda x: 0.3 * x * x))
def test_the_closed_form_is_where_the_loss_stops_falling(bump):
    def loss(eps):
        def energy(x, t, states):
            return closed_form(x) + eps * bump(x.squeeze(-1))

        return atom_loss(energy, 4000, 128, 11).item()

    down, here, up = loss(-0.5), loss(0.0), loss(0.5)
    assert here < down and here < up
    slope, curvature = (up - down), (up + down - 2 * here) / 0.25
    assert abs(slope / curvature) < 0.05  # the minimum along this line is next to 0


# ---------------------------------------------------------------- gradient and guidance


def test_energy_gradient_equals_finite_differences():
    energy = EnergyNetwork(5, 3, seed=4).double()
    x, states, t = randn(4, 3), randn(4, 5, seed=1), randn(4, seed=2).sigmoid()
    gradient, step = energy_gradient(energy, x, t, states), 1e-5
    for j in range(3):
        shift = torch.zeros(3, dtype=DOUBLE)
        shift[j] = step
        with torch.no_grad():
            difference = energy(x + shift, t, states) - energy(x - shift, t, states)
        assert torch.allclose(gradient[:, j], difference / (2 * step), atol=1e-8)
    assert gradient.abs().max() > 1e-4


def test_energy_gradient_needs_no_graph_and_leaves_none():
    energy = EnergyNetwork(5, 3).double()
    x, states = randn(4, 3).requires_grad_(True), randn(4, 5, seed=1)
    t = torch.full((4,), 0.4, dtype=DOUBLE)
    outside = energy_gradient(energy, x, t, states)
    with torch.no_grad():
        inside = energy_gradient(energy, x, t, states)
        as_float = energy_gradient(energy, x, 0.4, states)
    assert torch.equal(outside, inside) and torch.allclose(inside, as_float)
    assert not outside.requires_grad and x.grad is None
    assert all(p.grad is None for p in energy.parameters())
    energy.requires_grad_(False)
    x = x.detach()
    assert torch.equal(energy_gradient(energy, x, t, states), outside)
    assert not x.requires_grad  # the caller's tensor is left as it was


def guided_score(score, gradient, scale):
    """The score of nu(a|s) exp(scale f), from the score of nu and the gradient of f."""
    return lambda x, t: score(x, t) + scale * gradient(x, t)


def test_the_energy_is_not_evaluated_at_scale_zero():
    def forbidden(x, t, states):
        raise AssertionError("energy was evaluated at scale 0")

    model = make_behavior_model("diffusion", 5, 3, width=0.25)
    states, noise = randn(4, 5).float(), randn(4, 2, 3).float()
    plain = model.sample(states, 2, noise=noise)
    off = model.sample(states, 2, noise=noise, guidance=forbidden, scale=0.0)
    assert torch.equal(off, plain)


# variance of the behavior -> gain of the mean of the 15-step sampler (reference table)
MEAN_GAIN = {0.01: 0.999625, 0.04: 0.999058, 0.09: 0.998394, 0.25: 0.997029, 1: 0.993707}


@pytest.mark.parametrize("v", MEAN_GAIN)
def test_exact_guidance_shifts_a_gaussian_by_its_golden_gain_and_minus_f_reverses(v):
    # The intermediate energy of c a under N(0, v) is linear in a_t.
    c, states = 2.0, torch.zeros(5, 1, dtype=DOUBLE)

    def intermediate(sign):
        def energy(x, t, states):
            alpha, sigma = noise_schedule(t)
            return sign * (x.sum(-1) * c * alpha * v / (alpha**2 * v + sigma**2))

        return energy

    def score(x, t):
        alpha, sigma = noise_schedule(t)
        return -x / (alpha**2 * v + sigma**2)

    def sample(sign, scale):
        gradient = lambda x, t: energy_gradient(intermediate(sign), x, t, states)  # noqa: E731
        field = guided_score(score, gradient, scale)

        def data_prediction(x, t):
            alpha, sigma = noise_schedule(t)
            return (x + sigma**2 * field(x, t)) / alpha

        return dpm_solver_sample(data_prediction, randn(5, 2))

    plain = sample(1.0, 0.0)
    shift = sample(1.0, 1.0) - plain
    assert torch.allclose(shift, torch.full_like(shift, v * c * MEAN_GAIN[v]), atol=2e-6)
    assert torch.allclose(sample(-1.0, 1.0) - plain, -shift, atol=1e-9)
    assert torch.allclose(sample(1.0, 3.0) - plain, 3.0 * shift, atol=1e-9)


def test_an_energy_network_guides_the_diffusion_model_as_its_callable():
    model = make_behavior_model("diffusion", 5, 3, width=0.25).double()
    energy, states, noise = EnergyNetwork(5, 3).double(), randn(4, 5), randn(4, 2, 3)
    times = []

    def guidance(x, t, states):
        times.append(t)
        return energy_gradient(energy, x, t, states)

    on = model.sample(states, 2, noise=noise, guidance=guidance, scale=5.0)
    assert len(times) == 15 and not on.requires_grad

    def data_prediction(x, t):
        alpha, sigma = noise_schedule(t)
        rows, time = states.repeat_interleave(2, 0), torch.full((8,), t, dtype=DOUBLE)
        field = guided_score(
            lambda x, t: model.score(x, t, rows),
            lambda x, t: energy_gradient(energy, x, t, rows),
            5.0,
        )
        return ((x + sigma**2 * field(x, time)) / alpha).detach()

    by_hand = dpm_solver_sample(data_prediction, noise.view(8, 3)).view(4, 2, 3)
    assert torch.allclose(on, by_hand, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(on, model.sample(states, 2, noise=noise), atol=1e-3)
