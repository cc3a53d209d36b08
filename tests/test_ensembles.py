"""Critics as one network, their first weights, and what agents on SAC share."""

import math

import numpy as np
import pytest
import torch
from oracle_iql import double
from oracle_sac import act, values
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from corl.ensembles import CriticEnsemble, Form, StackedLinear, draw_members
from corl.sac import PositiveScalar, SquashedGaussianPolicy

S, A, B, N = 5, 2, 7, 4


def ensemble(shared_head=False, **fields):
    torch.manual_seed(0)
    form = Form(hidden_dim=8, **fields)
    made = CriticEnsemble(S, A, N, form, shared_head).double()
    with torch.no_grad():
        for parameter in made.parameters():
            # A bias, a scale and a shift that show.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("layer_norm, shared_head", [(False, False), (True, True)])
@pytest.mark.parametrize("shape", [(B, A), (B, 3, A)])
@pytest.mark.parametrize("members", [None, [2], [3, 0], [1, 1, 2]])
def test_an_ensemble_is_its_critics_side_by_side(
    layer_norm, shared_head, shape, members
):
    critics = ensemble(shared_head, layer_norm=layer_norm, n_hidden_layers=3)
    s, a = torch.randn(B, S).double(), torch.rand(shape).double()
    members = None if members is None else torch.tensor(members)
    found = critics(s, a, members)
    expected = values(double(critics.state_dict()), s, a, members)
    torch.testing.assert_close(found, torch.stack(expected))


def test_a_critic_that_is_not_asked_gets_no_gradient():
    critics = ensemble(layer_norm=True)
    s, a = torch.randn(B, S).double(), torch.rand(B, A).double()
    critics(s, a, torch.tensor([1, 1])).sum().backward()
    for parameter in critics.parameters():
        asked = parameter.grad.flatten(1).abs().sum(1) > 0
        assert asked.tolist() == [False, True, False, False]


def test_first_weights_are_those_of_their_rule():
    torch.manual_seed(0)
    plain = CriticEnsemble(S, A, N, Form(hidden_dim=8))
    torch.manual_seed(0)
    linear = [[torch.nn.Linear(*n) for n in ((7, 8), (8, 8))] for _ in range(N)]
    for layer, own in zip(plain.hidden, zip(*linear, strict=True), strict=True):
        expected = StackedLinear(own)
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.bias, expected.bias)
    xavier = CriticEnsemble(S, A, N, Form(64, init="xavier"))
    for layer in (*xavier.hidden, xavier.last):
        bound = math.sqrt(6 / sum(layer.weight.shape[1:]))
        assert 0.9 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    form = Form(8, 2, init="orthogonal", last_hidden_gain=0.01)
    critics = CriticEnsemble(S, A, N, form)
    layers = (*critics.hidden, critics.last)
    for layer, gain in zip(layers, (2, 1e-4, 2), strict=True):
        small, large = sorted(layer.weight.shape[1:])
        product = layer.weight @ layer.weight.mT
        if layer.weight.shape[1] == large:
            product = layer.weight.mT @ layer.weight
        torch.testing.assert_close(product, (gain * torch.eye(small)).expand(N, -1, -1))
    with pytest.raises(ValueError, match="init 'zeros' is not one of torch, xavier"):
        Form(init="zeros").linear(2, 2)


@pytest.mark.parametrize("replace", [False, True])
def test_members_are_drawn_evenly(replace):
    torch.manual_seed(0)
    drawn = [draw_members(N, 2, replace, torch.device("cpu")) for _ in range(2000)]
    pairs = torch.stack(drawn)
    counts = torch.bincount(pairs.flatten(), minlength=N) / pairs.numel()
    torch.testing.assert_close(counts, torch.full((N,), 1 / N), atol=0.03, rtol=0)
    same = (pairs[:, 0] == pairs[:, 1]).double().mean().item()
    assert same == pytest.approx(1 / N, abs=0.03) if replace else same == 0


@pytest.mark.parametrize("state_dependent_std", [True, False])
@pytest.mark.parametrize("n", [None, 3])
def test_the_policys_density_is_that_of_a_squashed_normal(state_dependent_std, n):
    policy = SquashedGaussianPolicy(
        S, A, 2.0, Form(8), state_dependent_std=state_dependent_std
    ).double()
    s = torch.randn(B, S).double()
    noise = torch.randn(B, A).double() if n is None else torch.randn(B, n, A).double()
    actions, log_prob = policy(s, noise)
    mean, log_std = policy.gaussian(s)
    if n:
        mean, log_std = mean[:, None], log_std[:, None]
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    torch.testing.assert_close(log_prob, squashed.log_prob(actions / 2).sum(-1))
    by_hand = act(double(policy.state_dict()), s, noise)
    torch.testing.assert_close((actions / 2, log_prob), by_hand)
    assert not torch.isnan(policy(1e4 * s, noise)[1]).any()


def test_the_policy_acts_by_its_mode_in_evaluations_and_by_samples_in_training():
    policy = SquashedGaussianPolicy(S, A, 2.0, Form(8), log_std_max=-20.0)
    state = np.ones(S)
    policy.eval()
    mode = policy.act(state)
    expected = 2 * policy.gaussian(torch.ones(1, S))[0].tanh()
    assert mode.shape == (A,) and np.allclose(mode, expected.detach().numpy())
    # Its standard deviation is e^-20 here.
    assert np.allclose(policy.train().act(state), mode, atol=1e-6)
    policy.log_std_max = policy.log_std_min = 0.0
    assert not np.allclose(policy.act(state), policy.act(state), atol=1e-2)
    assert policy.eval().act(np.ones((3, S))).shape == (3, A)


@pytest.mark.parametrize("softplus", [False, True])
def test_a_positive_number_begins_where_it_is_told(softplus):
    for value in (0.01, 1.0, 20.0):
        number = PositiveScalar(value, softplus)
        assert number().item() == pytest.approx(value, rel=1e-5)
        with torch.no_grad():
            number.raw.sub_(30.0)
        assert 0 < number().item() < value
