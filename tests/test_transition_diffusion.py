"""The package `transition_diffusion`: denoiser, sampler, energies, fits that go on."""

import math

import numpy as np
import oracle_edis
import pytest
import torch
from helpers import make_buffer

from transition_diffusion.config import EdisConfig
from transition_diffusion.denoiser import Denoiser, denoising_losses
from transition_diffusion.energies import (
    FORMS,
    KINDS,
    ConsistentEnergies,
    PublicEnergies,
    contrastive_losses,
)
from transition_diffusion.fit import DiffusionFit
from transition_diffusion.sampler import (
    Condition,
    Guide,
    heun_step,
    noise_levels,
    trajectory,
)
from transition_diffusion.transitions import Layout, Normalizer

LAYOUT = Layout(3, 2)
D = LAYOUT.width
SCALES = dict.fromkeys(KINDS, 1.0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(shape):
    return torch.randn(shape)


def last_of(path):
    *_, last = path
    return last


# ---------------------------------------------------------------- transitions


def test_columns_are_cut_and_joined_and_actions_clipped():
    layout = Layout(3, 2, terminals=True)
    batch = [torch.randn(4, n) for n in (3, 2, 1, 3)] + [
        torch.tensor([[0.4], [0.6]] * 2)
    ]
    batch[1][0, 0] = 1.7
    events = layout.join([*batch, torch.zeros(4, 1)])  # a sixth field is no column
    assert events.shape == (4, layout.width) == (4, 10)
    s, a, r, following, done = layout.split(events, max_action=0.5)
    assert torch.equal(s, batch[0]) and torch.equal(following, batch[3])
    assert torch.equal(a, batch[1].clamp(-0.5, 0.5)) and torch.equal(r, batch[2])
    assert done.flatten().tolist() == [0, 1, 0, 1]
    assert LAYOUT.split(events[:, :9], 1.0)[4].sum() == 0


def test_the_normalizer_takes_all_rows_and_leaves_some_columns(monkeypatch):
    monkeypatch.setattr("transition_diffusion.transitions.CHUNK", 7)
    buffer = make_buffer(50)
    buffer._states += 1e4  # far from 0, where float32 sums of squares would cancel
    normalizer = Normalizer(D)
    normalizer.fit(buffer, LAYOUT, [LAYOUT.reward])
    events = LAYOUT.join(buffer.gather(np.arange(50))).double().numpy()
    mean, std = events.mean(0), events.std(0, ddof=1) + 1e-5
    mean[5], std[5] = 0.0, 1.0
    np.testing.assert_allclose(normalizer.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(normalizer.std, std, rtol=1e-4)
    z = normalizer(torch.tensor(events, dtype=torch.float32))
    np.testing.assert_allclose(normalizer.undo(z), events, rtol=1e-6, atol=1e-3)


# ---------------------------------------------------------------- denoiser and fit


def test_the_denoiser_and_its_loss_are_those_of_the_formulas():
    model = Denoiser(D, width=16, depth=2)
    p = oracle_edis.double(model.state_dict())
    x, level, noise = torch.randn(6, D), torch.randn(6), torch.randn(6, D)
    sigma = torch.tensor([0.002, 0.1, 1.0, 5.0, 40.0, 80.0])
    expected = oracle_edis.denoise(p, x.double(), sigma.double())
    torch.testing.assert_close(model(x, sigma), expected.float(), rtol=1e-4, atol=1e-5)
    losses = denoising_losses(model, x, level, noise)
    assert losses.shape == (6,)
    expected = oracle_edis.denoising_loss(p, x.double(), level.double(), noise.double())
    assert losses.mean().item() == pytest.approx(float(expected), rel=1e-4)


def test_a_denoiser_of_the_papers_size_has_its_parameters():
    model = Denoiser(26)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(6.67e6, rel=0.01)


def test_fits_make_the_steps_of_the_formulas():
    """Past update 100, where the averaged weights leave their copies."""
    fit = DiffusionFit(D, 8, 1, 3e-3, 140, seed=1)
    oracle = oracle_edis.OracleFit(fit, 3e-3, 140)
    for _ in range(131):
        batch = torch.randn(4, D), torch.randn(4), torch.randn(4, D)
        loss = fit.update(*batch)
        assert loss.item() == pytest.approx(oracle.update(*batch), rel=1e-3)
    for part, expected in (
        (fit.denoiser, oracle.p),
        (fit.average.module, oracle.average),
    ):
        for name, value in part.state_dict().items():
            near = {"rtol": 1e-3, "atol": 2e-5}
            torch.testing.assert_close(value.double(), expected[name], **near)
    moved = fit.denoiser.last.weight - fit.average.module.last.weight
    assert moved.abs().max() > 1e-4


def test_a_fit_leaves_the_global_stream_alone_and_goes_on_to_the_bit():
    before = torch.get_rng_state()
    batches = [tuple(torch.randn(3, 4, D).unbind()) for _ in range(25)]
    batches = [(x, y[:, 0], z) for x, y, z in batches]
    torch.set_rng_state(before)
    whole, broken = (DiffusionFit(D, 8, 1, 1e-3, 25, seed=s) for s in (3, 3))
    assert torch.equal(torch.get_rng_state(), before)
    for batch in batches:
        whole.update(*batch)
    for batch in batches[:13]:
        broken.update(*batch)
    resumed = DiffusionFit(D, 8, 1, 1e-3, 25, seed=9)
    resumed.load_state_dict(broken.state_dict())
    for batch in batches[13:]:
        resumed.update(*batch)
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, resumed.average.state_dict()[name]), name
    assert whole.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


# ---------------------------------------------------------------- sampler


MEAN, STD = 1.5, 0.4


def gaussian(mean=MEAN, std=STD):
    """The exact denoiser of a normal law."""

    def model(x, sigma):
        s = torch.as_tensor(sigma, dtype=x.dtype)
        s = s.unsqueeze(-1) if s.dim() else s
        return (std**2 * x + s**2 * mean) / (std**2 + s**2)

    return model


@pytest.mark.parametrize("i", [0, 3, 9])
def test_a_step_is_that_of_the_algorithm(i):
    x, noise = torch.randn(5, D), torch.randn(5, D)

    def slope(place, sigma, number):
        assert number == i
        return 0.1 * sigma * place

    levels = noise_levels(10)
    got = heun_step(gaussian(), levels[i] * x, levels, i, noise, Guide(slope))
    expected = oracle_edis.heun(
        *(gaussian(), levels[i] * x.double(), 10, i, noise.double()),
        lambda place, sigma: 0.1 * sigma * place,
    )
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


def test_the_schedule_has_its_ends_and_its_share_of_churn():
    levels = noise_levels(128)
    assert len(levels) == 129
    assert (levels[0], levels[127], levels[128]) == pytest.approx((80.0, 0.002, 0.0))
    # The sheet's marks: noise levels at step 16 of 128 and of 32.
    assert levels[16] == pytest.approx(38.8, abs=0.05)
    assert noise_levels(32)[16] == pytest.approx(2.17, abs=0.01)


def test_samples_of_a_known_law_have_it():
    x = last_of(trajectory(gaussian(), (4000, 2), 40, normal))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert x.std().item() == pytest.approx(STD, abs=0.03)


def test_exact_guidance_turns_one_known_law_into_another():
    """The score of p exp(-E): with E = ln p - ln q the samples are those of q."""
    target, low = (-0.5, 0.7), 1.0  # the model's law is the standard normal

    def gradient(z, sigma, i):
        own = (z - target[0]) / (target[1] ** 2 + sigma**2) - z / (low + sigma**2)
        return sigma * own

    path = trajectory(gaussian(0.0, 1.0), (4000, 2), 40, normal, Guide(gradient))
    x = last_of(path)
    assert x.mean().item() == pytest.approx(target[0], abs=0.04)
    assert x.std().item() == pytest.approx(target[1], abs=0.04)


def test_a_condition_is_kept_and_the_rest_varies():
    mask = torch.zeros(D, dtype=torch.bool)
    mask[LAYOUT.state] = mask[LAYOUT.action] = True
    values = torch.randn(30, D)
    condition = Condition(values, mask)
    path = trajectory(gaussian(), (30, D), 12, normal, condition=condition)
    x = last_of(path)
    assert torch.equal(x[:, mask], values[:, mask])
    assert (x[:, ~mask] - values[:, ~mask]).std(0).min() > 0.1
    assert x[:, ~mask].std(0).min() > 0.1


# ---------------------------------------------------------------- energies


def test_info_nce_is_the_share_of_a_positive_in_its_group():
    positive, negative = torch.randn(4, 2), torch.randn(4, 5)
    expected = oracle_edis.info_nce(positive.tolist(), negative.tolist())
    losses = contrastive_losses(positive, negative)
    torch.testing.assert_close(losses, torch.tensor(expected))
    # Energies that say nothing: the log of the number of candidates.
    assert contrastive_losses(torch.zeros(3, 1), torch.zeros(3, 10)).mean() == (
        pytest.approx(math.log(11))
    )


@pytest.mark.parametrize("form", FORMS)
def test_losses_begin_near_those_of_energies_that_say_nothing(form):
    energies = FORMS[form](LAYOUT, 10, 8, 4)
    events = torch.randn(16, D)
    for kind in KINDS:
        losses = energies.losses(kind, events, gaussian(0.0, 1.0), normal)
        levels = {"consistent": 4, "public": 1 if kind == "state" else 2}[form]
        assert losses.shape == (16 * levels,)
        blind = math.log(16 * 11 if kind == "state" else 11)
        # Inputs of 80 standard deviations move even untrained energies.
        assert losses.mean().item() == pytest.approx(blind, abs=3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_consistent_negatives_have_the_anchors_condition_and_vary(kind):
    seen = []
    energies = ConsistentEnergies(LAYOUT, 5, 10, 5)
    energies.energy = lambda kind, x, time: seen.append(x) or x.sum(-1)
    events = 100.0 * torch.randn(8, D)
    energies.losses(kind, events, gaussian(), normal)
    positive, negative = seen
    levels = torch.tensor([noise_levels(10)[i] for i in energies.taught()])
    assert positive.shape == (5, 8, D) and negative.shape == (5, 40, D)
    anchors = events.repeat_interleave(5, 0)
    same = energies.condition_of(kind)
    noise = (negative - anchors) / levels[:, None, None]
    # From step 1 on; at step 0 everything is noise.
    if same.any():
        assert noise[1:, :, same].std() == pytest.approx(1.0, abs=0.1)
    free = noise[-1][:, ~same] * levels[-1]
    assert free.std() > 20, "the free columns are the anchor's"
    groups = negative[-1][:, ~same].reshape(8, 5, -1)
    assert groups.std(1).min() > 0
    noise = (positive - events) / levels[:, None, None]
    assert noise.std() == pytest.approx(1.0, abs=0.1)


def test_public_negatives_are_the_anchors_with_zeros_behind_their_condition():
    """As executed: the mask covers all columns, so nothing of the model is left at step 16."""
    seen = []
    energies = PublicEnergies(LAYOUT, 3, 128, 8)
    energies.energy = lambda kind, x, time: seen.append((x, time)) or x.sum(-1)
    events = torch.randn(4, D)
    energies.losses("transition", events, None, normal)
    (_, _), (negative, time) = seen
    expected = events.repeat_interleave(3, 0).clone()
    expected[:, LAYOUT.reward :] = 0.0
    assert torch.equal(negative[1], expected)
    assert time.flatten().tolist() == [0, 16]
    assert negative[0].std() == pytest.approx(80, rel=0.2)


@pytest.mark.parametrize("form", FORMS)
def test_guidance_pulls_each_part_by_its_energy_and_never_the_reward(form):
    energies = FORMS[form](LAYOUT, 3, 8, 2)
    energies.normalizer.mean.copy_(torch.randn(D))
    z, sigma, i = torch.randn(7, D), 2.0, 3
    raw = energies.normalizer.undo(z) if form == "public" else z
    time = torch.tensor(3.0 if form == "public" else math.log(sigma) / 4)
    slope = energies.guide(SCALES, exact=False).slope(z, sigma, i)
    parts = (LAYOUT.state, LAYOUT.next_state, LAYOUT.action)
    for kind, part in zip(KINDS, parts, strict=True):
        x = raw.clone().requires_grad_(True)
        (own,) = torch.autograd.grad(energies.energy(kind, x, time).sum(), x)
        torch.testing.assert_close(slope[:, part], own[:, part])
        alone = energies.guide({**dict.fromkeys(KINDS, 0.0), kind: 2.0}, False)
        pulled = alone.slope(z, sigma, i)
        torch.testing.assert_close(pulled[:, part], 2 * own[:, part])
        pulled[:, part] = 0.0
        assert not pulled.any()
    assert slope[:, LAYOUT.reward].abs().max() == 0 and not slope.requires_grad
    if form == "consistent":
        exact = energies.guide(SCALES, exact=True).slope(z, sigma, i)
        torch.testing.assert_close(exact, sigma * slope)
    far = energies.guide(dict.fromkeys(KINDS, 1e6), False).slope(z, sigma, i)
    torch.testing.assert_close(far.norm(dim=1), torch.full((7,), 10 * math.sqrt(D)))


def test_trained_energies_carry_samples_to_the_online_rows():
    """Online states lie at 1 and the model's at 0: with guidance samples go there.

    Short training, so not all the way; exact guidance has a test of its own.
    """
    layout = Layout(1, 1)
    energies = ConsistentEnergies(layout, 4, 16, 8)
    model = gaussian(0.0, 1.0)
    optimizer = torch.optim.Adam(energies.parameters(), 3e-3)
    for _ in range(75):
        events = torch.randn(32, layout.width)
        events[:, 0] = 1.0 + 0.5 * events[:, 0]
        loss = energies.losses("state", events, model, normal).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scales = {**dict.fromkeys(KINDS, 0.0), "state": 1.0}
    guide = energies.guide(scales, exact=True)
    guided = last_of(trajectory(model, (1000, layout.width), 16, normal, guide))
    free = last_of(trajectory(model, (1000, layout.width), 16, normal))
    assert free[:, 0].mean().abs() < 0.15 and guided[:, 1:].mean().abs() < 0.15
    assert 0.3 < guided[:, 0].mean() < 1.3


def test_the_share_of_the_published_arithmetic_counts_rows_and_weights():
    assert EdisConfig().share_of_published() == 1.0
    half_as_wide = EdisConfig(width=512)
    assert half_as_wide.share_of_published() == pytest.approx(0.25)
    sampled, learned = 100_000 * 255, 3 * 10_000 * 256
    short = EdisConfig(diffusion_updates=100, samples=1000)
    expected = (sampled / 100 + learned / 100) / (sampled + learned)
    assert short.share_of_published() == pytest.approx(expected)
