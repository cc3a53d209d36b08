"""Behavior models nu(a|s): what the data's policy would have done in a state.

Three members behind one interface (`loss`, `sample`, `log_prob`); `behavior_fit.py` trains
them, and `cache.py` keeps what was trained:

* `diffusion`: the score model of contrastive energy prediction (Lu et al. 2023, arXiv
  2304.12824) with its sampler, a singlestep DPM-Solver++ (Lu et al. 2022, arXiv
  2211.01095) of order 2. It can be guided towards high Q. No density.
* `gaussian`, `mixture`: a conditional Gaussian and a mixture density network (Bishop
  1994). Exact density, one network evaluation per sample.

Densities are those of the raw action. Policies that end in tanh pile actions up at the
bounds, where the true law is nearly an atom: there the densities answer with a narrow
component that also reaches a little beyond the bound. Nothing is clipped here; clip
where actions are used.

This file imports nothing of the project. Shapes: B states, n actions per state, S state
dimension, A action dimension.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

BETA_0, BETA_1 = 0.1, 20.0  # linear noise rate of the variance-preserving process
T_MIN = 1e-3  # smallest diffusion time, in training and at the end of sampling

Number = TypeVar("Number", float, torch.Tensor)
DataPrediction = Callable[[torch.Tensor, float], torch.Tensor]
Guidance = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]


# ---------------------------------------------------------------- the interface


class BehaviorModel(nn.Module):
    """A conditional law of actions given raw states; the contract of all members.

    `options` holds the settings that, with the dimensions and the weights, define the
    model.
    """

    kind: str

    def __init__(self, state_dim: int, action_dim: int, **options: Any):
        super().__init__()
        if state_dim < 1 or action_dim < 1:
            raise ValueError(
                f"state_dim {state_dim} and action_dim {action_dim} must be at least 1"
            )
        self.state_dim, self.action_dim, self.options = state_dim, action_dim, options

    def normalize_to(self, states: torch.Tensor) -> None:
        """Adapt to the scale of the training states (N, S); `fit` calls it once."""

    def loss(
        self, states: torch.Tensor, actions: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Training loss, a scalar with gradient; states (B, S), actions (B, A)."""
        raise NotImplementedError

    def sample(
        self,
        states: torch.Tensor,
        n: int = 1,
        generator: torch.Generator | None = None,
        *,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Actions (B, n, A) for raw states (B, S), without gradient and not clipped.

        `noise` (B, n, A), standard normal, replaces the draw from `generator`: the
        actions are a deterministic function of it.

        Raises:
            ValueError: neither generator nor noise, or noise of another shape.
        """
        raise NotImplementedError

    def log_prob(
        self,
        states: torch.Tensor,
        actions: torch.Tensor,
        max_action: float = math.inf,
    ) -> torch.Tensor:
        """Log-density (B,) in nats of actions (B, A) in states (B, S).

        With `max_action` that of actions clipped to [-max_action, max_action]: at a bound it
        is the log of the mass beyond it, see `clipped_normal_log_prob`.

        Raises:
            NotImplementedError: the model has no density.
        """
        raise NotImplementedError(
            f"the {self.kind} behavior model has no density; use kind 'gaussian' or "
            "'mixture' for scores that need log_prob"
        )

    def _noise(
        self,
        states: torch.Tensor,
        n: int,
        generator: torch.Generator | None,
        noise: torch.Tensor | None,
    ) -> torch.Tensor:
        shape = (len(states), n, self.action_dim)
        if noise is None and generator is None:
            raise ValueError("sample needs a generator or noise; pass one of them")
        if noise is None:
            return torch.randn(
                shape, generator=generator, device=states.device, dtype=states.dtype
            )
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {shape}")
        return noise


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Parameter initialization from `seed`; the global stream is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed every GPU, which the fork does not restore.
        torch.default_generator.manual_seed(seed)
        yield


# ---------------------------------------------------------------- process and sampler


def noise_schedule(t: Number) -> tuple[Number, Number]:
    """(alpha_t, sigma_t) of a_t = alpha_t a_0 + sigma_t noise.

    t in [0, 1] is a float (two floats come back) or a tensor (two tensors of its shape).
    Variance preserving: alpha^2 + sigma^2 = 1. Accurate near t = 0, where 1 - alpha^2
    would cancel. Song et al. 2021, arXiv 2011.13456.
    """
    log_alpha = -0.25 * t * t * (BETA_1 - BETA_0) - 0.5 * t * BETA_0
    lib: Any = torch if isinstance(t, torch.Tensor) else math
    return lib.exp(log_alpha), lib.sqrt(-lib.expm1(2.0 * log_alpha))


@lru_cache
def _solver_plan(steps: int) -> tuple[tuple[float, ...], ...]:
    """Coefficients of the update rule, one tuple per block; host float64, no tensors.

    (t, x, d) for a first-order cell, (t, x, d, t_mid, x_end, d_end, d_mid) for a
    second-order block over two cells.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; the sampler needs at least 1")
    times = [1.0 - (1.0 - T_MIN) * i / steps for i in range(steps)] + [T_MIN]
    alphas, sigmas = zip(*(noise_schedule(t) for t in times), strict=True)
    half_log_snr = [
        math.log(a) - math.log(s) for a, s in zip(alphas, sigmas, strict=True)
    ]

    def cell(p: int, q: int) -> tuple[float, float]:
        h = half_log_snr[q] - half_log_snr[p]
        return sigmas[q] / sigmas[p], -alphas[q] * math.expm1(-h)

    plan: list[tuple[float, ...]] = []
    first_order = 1 if steps % 2 else 2
    for i in range(0, steps - first_order, 2):
        r = (half_log_snr[i + 1] - half_log_snr[i]) / (
            half_log_snr[i + 2] - half_log_snr[i]
        )
        x_end, d = cell(i, i + 2)
        block = (x_end, d * (1.0 - 0.5 / r), d * 0.5 / r)
        plan.append((times[i], *cell(i, i + 1), times[i + 1], *block))
    for i in range(steps - first_order, steps):
        plan.append((times[i], *cell(i, i + 1)))
    return tuple(plan)


def dpm_solver_sample(
    data_prediction: DataPrediction, noise: torch.Tensor, steps: int = 15
) -> torch.Tensor:
    """Solve the probability-flow ODE from t = 1 to T_MIN in exactly `steps` evaluations.

    DPM-Solver++ singlestep, order 2, midpoint form, grid uniform in time: second-order
    blocks of two cells, then one first-order cell (odd `steps`) or two (even). No
    thresholding, no final denoising. The result is narrower than the data's law; fewer
    steps narrow it more.

    Args:
        data_prediction: (x, t) -> estimate of the clean actions, shaped like x; t is a
            float.
        noise: standard normal, any shape.

    Raises:
        ValueError: steps < 1.
    """
    x = noise
    for t, x_weight, d_weight, *second in _solver_plan(steps):
        d = data_prediction(x, t)
        middle = x_weight * x + d_weight * d
        if second:
            t_mid, x_end, d_end, d_mid = second
            x = x_end * x + d_end * d + d_mid * data_prediction(middle, t_mid)
        else:
            x = middle
    return x


# ---------------------------------------------------------------- diffusion


class FourierTime(nn.Module):
    """Random Fourier features of the time, frozen, and a linear layer."""

    frequencies: torch.Tensor

    def __init__(self, dim: int = 32, scale: float = 30.0):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(dim // 2) * scale)
        self.linear = nn.Linear(dim, dim)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., dim)"""
        angles = 2.0 * math.pi * t.unsqueeze(-1) * self.frequencies
        return self.linear(torch.cat([angles.sin(), angles.cos()], -1))


class ResidualBlock(nn.Module):
    """Two SiLU layers with the condition added between them, and a skip connection."""

    def __init__(self, in_dim: int, out_dim: int, condition_dim: int):
        super().__init__()
        self.first = nn.Linear(in_dim, out_dim)
        self.condition = nn.Linear(condition_dim, out_dim)
        self.second = nn.Linear(out_dim, out_dim)
        self.skip = nn.Identity() if in_dim == out_dim else nn.Linear(in_dim, out_dim)

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x (..., in_dim), condition (..., condition_dim) -> (..., out_dim)"""
        hidden = F.silu(self.first(x)) + self.condition(condition)
        return F.silu(self.second(hidden)) + self.skip(x)


class ScoreNetwork(nn.Module):
    """The U-shaped network h(a_t, t | s) of CEP; the score is h / sigma_t.

    1 621 440 + 32 S + 2049 A trainable parameters and 16 frozen frequencies at width 1.
    The leading dimensions of x, t and the state embedding broadcast, so that n actions
    of one state share its condition.
    """

    def __init__(self, state_dim: int, action_dim: int, width: float = 1.0):
        super().__init__()
        large, middle, small = (max(8, round(k * width)) for k in (512, 256, 128))
        joint = small
        self.time = FourierTime()
        self.state = nn.Linear(state_dim, 32)
        self.joint = nn.Sequential(
            nn.Linear(64, joint), nn.SiLU(), nn.Linear(joint, joint)
        )
        self.down1 = ResidualBlock(action_dim, large, joint)
        self.down2 = ResidualBlock(large, middle, joint)
        self.down3 = ResidualBlock(middle, small, joint)
        self.mid = ResidualBlock(small, small, joint)
        self.up3 = ResidualBlock(2 * small, middle, joint)
        self.up2 = ResidualBlock(2 * middle, large, joint)
        self.last = nn.Linear(2 * large, action_dim)

    def embed_states(self, states: torch.Tensor) -> torch.Tensor:
        """(..., S) -> (..., 32); does not depend on t, so a sampler needs it once."""
        return F.silu(self.state(states))

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, state_embedding: torch.Tensor
    ) -> torch.Tensor:
        """x (..., A), t (...), embedding (..., 32) -> h (..., A): minus the noise."""
        time = self.time(t).expand(*state_embedding.shape[:-1], -1)
        # The blocks read the embedding only through SiLU.
        condition = F.silu(self.joint(torch.cat([state_embedding, time], -1)))
        down1 = self.down1(x, condition)
        down2 = self.down2(down1, condition)
        down3 = self.down3(down2, condition)
        up = self.mid(down3, condition)
        up = self.up3(torch.cat([down3, up], -1), condition)
        up = self.up2(torch.cat([down2, up], -1), condition)
        return self.last(torch.cat([down1, up], -1))


class DiffusionBehavior(BehaviorModel):
    """CEP's diffusion model; `width` scales its hidden layers (paper: 1.0)."""

    kind = "diffusion"

    def __init__(
        self, state_dim: int, action_dim: int, *, width: float = 1.0, seed: int = 0
    ):
        super().__init__(state_dim, action_dim, width=float(width))
        if not 0.0 < width < math.inf:
            raise ValueError(f"width is {width}; it must be positive")
        with _seeded(seed):
            self.network = ScoreNetwork(state_dim, action_dim, width)

    def loss(
        self, states: torch.Tensor, actions: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Denoising loss, summed over action dimensions, mean over rows.

        One t ~ U(T_MIN, 1) per row. A network that answers 0 has expected loss A.
        """
        options: dict[str, Any] = {"device": actions.device, "dtype": actions.dtype}
        uniform = torch.rand(len(actions), generator=generator, **options)
        t = T_MIN + (1.0 - T_MIN) * uniform  # (B,)
        noise = torch.randn(actions.shape, generator=generator, **options)
        alpha, sigma = noise_schedule(t.unsqueeze(-1))
        h = self.network(
            alpha * actions + sigma * noise, t, self.network.embed_states(states)
        )
        return (h + noise).square().sum(-1).mean()

    def score(
        self, x: torch.Tensor, t: torch.Tensor, states: torch.Tensor
    ) -> torch.Tensor:
        """Gradient (B, A) of log nu_t(x | s) in x; x (B, A), t (B,), states (B, S)."""
        h = self.network(x, t, self.network.embed_states(states))
        return h / noise_schedule(t.unsqueeze(-1))[1]

    @torch.no_grad()
    def sample(
        self,
        states: torch.Tensor,
        n: int = 1,
        generator: torch.Generator | None = None,
        *,
        noise: torch.Tensor | None = None,
        guidance: Guidance | None = None,
        scale: float = 0.0,
        steps: int = 15,
    ) -> torch.Tensor:
        """Actions (B, n, A) of nu(a|s), or of nu(a|s) exp(scale * energy) when guided.

        Args:
            guidance: (x (B n, A), t float, states (B n, S)) -> gradient (B n, A) of the
                energy in x; called without autograd, so it has to switch that on for
                itself.
            scale: weight s of the gradient in score + s * gradient; 0 does not call
                guidance.
            steps: network evaluations, at least 1.

        Raises:
            ValueError: see `BehaviorModel.sample`; steps < 1.
        """
        noise = self._noise(states, n, generator, noise)
        embedding = self.network.embed_states(states).unsqueeze(1)  # (B, 1, 32)
        guide = guidance if scale != 0.0 else None
        if guide is not None:
            repeated = states.repeat_interleave(n, 0)  # (B n, S)

        def data_prediction(x: torch.Tensor, t: float) -> torch.Tensor:
            alpha, sigma = noise_schedule(t)
            time = torch.full((1, 1), t, device=x.device, dtype=x.dtype)
            clean = (x + sigma * self.network(x, time, embedding)) / alpha
            if guide is not None:
                gradient = guide(x.flatten(0, 1), t, repeated).view_as(x)
                clean = clean + (scale * sigma * sigma / alpha) * gradient
            return clean

        return dpm_solver_sample(data_prediction, noise, steps)


# ---------------------------------------------------------------- models with a density


def clipped_normal_log_prob(
    actions: torch.Tensor,
    mean: torch.Tensor,
    log_std: torch.Tensor,
    max_action: float = math.inf,
) -> torch.Tensor:
    """Log-probability, nats, elementwise, of normal samples clipped to [-max_action, max_action].

    Inside the normal density, at a bound the mass of all samples beyond it. Policies that clip put
    atoms there, where a density says nothing of how often they act so; a log-ratio of two
    policies is right if both are taken in this way. All arguments broadcast.
    """
    z = (actions - mean) * (-log_std).exp()
    inside = -0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)
    if math.isinf(max_action):
        return inside
    beyond = (actions.sign() * mean - max_action) * (-log_std).exp()
    at_bound = actions.abs() >= max_action
    return torch.where(at_bound, torch.special.log_ndtr(beyond), inside)


class MixtureBehavior(BehaviorModel):
    """Mixture density network: diagonal Gaussians whose parameters depend on the state.

    States are standardized inside, by the mean and standard deviation of the training
    states. The standard deviations live in exp([-5, 2]): with actions piled up on the
    bounds a free one would shrink for ever and the likelihood would have no maximum;
    exp(-5) = 0.7 % of the action range is finer than what the exchange has to tell
    apart.
    """

    kind = "mixture"
    LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
    state_mean: torch.Tensor
    state_std: torch.Tensor

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        *,
        components: int = 8,
        hidden_dim: int = 256,
        seed: int = 0,
    ):
        super().__init__(
            state_dim, action_dim, components=components, hidden_dim=hidden_dim
        )
        if components < 1 or hidden_dim < 1:
            raise ValueError(
                f"components {components} and hidden_dim {hidden_dim} must be at least 1"
            )
        self.components = components
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))
        with _seeded(seed):
            self.net = nn.Sequential(
                nn.Linear(state_dim, hidden_dim),
                nn.ReLU(),
                nn.Linear(hidden_dim, hidden_dim),
                nn.ReLU(),
                nn.Linear(hidden_dim, components * (1 + 2 * action_dim)),
            )
            if components > 1:
                # Components that start in one place tend to stay together.
                last = cast(nn.Linear, self.net[-1])
                means = last.bias.view(components, -1)[:, 1 : 1 + action_dim]
                nn.init.uniform_(means, -1.0, 1.0)

    def normalize_to(self, states: torch.Tensor) -> None:
        """Take mean and standard deviation from the training states (N, S)."""
        var, mean = torch.var_mean(states, dim=0, correction=0)
        std = var.sqrt()
        self.state_mean.copy_(mean)
        # A constant column stays unscaled: its rounding error is not a unit of length.
        self.state_std.copy_(torch.where(std > 1e-3, std, torch.ones_like(std)))

    def distribution(
        self, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-weights (B, C), means (B, C, A) and log standard deviations (B, C, A)."""
        out = self.net((states - self.state_mean) / self.state_std)
        out = out.view(len(states), self.components, -1)
        logits, mean, log_std = out.split([1, self.action_dim, self.action_dim], -1)
        # Soft bounds: a hard clamp has no gradient outside and would never come back.
        log_std = self.LOG_STD_MAX - F.softplus(self.LOG_STD_MAX - log_std)
        log_std = self.LOG_STD_MIN + F.softplus(log_std - self.LOG_STD_MIN)
        return logits.squeeze(-1).log_softmax(-1), mean, log_std

    def log_prob(
        self,
        states: torch.Tensor,
        actions: torch.Tensor,
        max_action: float = math.inf,
    ) -> torch.Tensor:
        """Log-density (B,) in nats of the raw actions (B, A), in states (B, S).

        With `max_action` that of clipped actions, see `clipped_normal_log_prob`.
        """
        log_weight, mean, log_std = self.distribution(states)
        normal = clipped_normal_log_prob(
            actions.unsqueeze(1), mean, log_std, max_action
        )  # (B, C, A)
        return (log_weight + normal.sum(-1)).logsumexp(-1)

    def loss(
        self, states: torch.Tensor, actions: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Mean negative log-likelihood in nats; draws nothing."""
        return -self.log_prob(states, actions).mean()

    @torch.no_grad()
    def sample(
        self,
        states: torch.Tensor,
        n: int = 1,
        generator: torch.Generator | None = None,
        *,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Actions (B, n, A) for raw states (B, S); see `BehaviorModel.sample`."""
        noise = self._noise(states, n, generator, noise)
        log_weight, mean, log_std = self.distribution(states)
        if self.components == 1:
            return mean + log_std.exp() * noise
        # The first coordinate chooses the component: its probability u falls into one
        # of the C intervals of the weights, and u's place inside that interval is
        # uniform again, so it gives the coordinate of the noise back. float64, since
        # intervals may be short; beyond 7 standard deviations u would round to 0 or 1,
        # where components of no weight live.
        weight = log_weight.double().exp()
        edges = weight.cumsum(-1)[:, :-1]  # (B, C - 1)
        u = torch.special.ndtr(noise[..., 0].double().clamp(-7.0, 7.0))  # (B, n)
        chosen = torch.searchsorted(edges.contiguous(), u)
        inside = (u - F.pad(edges, (1, 0)).gather(1, chosen)) / weight.gather(1, chosen)
        first = torch.special.ndtri(inside.clamp(1e-12, 1.0 - 1e-12)).to(noise.dtype)
        noise = torch.cat([first.unsqueeze(-1), noise[..., 1:]], -1)
        rows = chosen.unsqueeze(-1).expand_as(noise)
        return mean.gather(1, rows) + log_std.gather(1, rows).exp() * noise


class GaussianBehavior(MixtureBehavior):
    """One diagonal Gaussian whose mean and standard deviation depend on the state."""

    kind = "gaussian"

    def __init__(
        self, state_dim: int, action_dim: int, *, hidden_dim: int = 256, seed: int = 0
    ):
        super().__init__(
            state_dim, action_dim, components=1, hidden_dim=hidden_dim, seed=seed
        )
        self.options = {"hidden_dim": hidden_dim}


KINDS = {m.kind: m for m in (DiffusionBehavior, GaussianBehavior, MixtureBehavior)}


def make_behavior_model(
    kind: str, state_dim: int, action_dim: int, *, seed: int = 0, **options: Any
) -> BehaviorModel:
    """A fresh behavior model on the CPU, its weights a function of `seed` alone.

    Args:
        kind: `diffusion` (options: width), `gaussian` (hidden_dim) or `mixture`
            (components, hidden_dim).

    Raises:
        ValueError: unknown kind, an option the kind does not have, or a bad value.
    """
    if kind not in KINDS:
        raise ValueError(f"behavior kind {kind!r} is not one of {', '.join(KINDS)}")
    try:
        return KINDS[kind](state_dim, action_dim, seed=seed, **options)
    except TypeError as error:
        raise ValueError(f"behavior kind {kind!r}: {error}") from error
