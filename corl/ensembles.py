"""N critics as one network, and how its layers begin.

The parameters of all critics lie in one tensor each, (N, ...), so that a layer of all of them is
one batched product. An Adam step or a soft update of such tensors is that of each critic alone.

Shapes: N critics, M of them that are asked, B rows of a batch, n actions of a row, S state
dimension, A action dimension.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# How weights begin: as torch's linear layers do, Xavier's uniform ones, or orthogonal ones. The
# last two begin without a bias.
INITS = ("torch", "xavier", "orthogonal")
# Beside the variance, in a normalization of layers; that of the JAX libraries.
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Form:
    """What the networks of an agent have in common.

    Attributes:
        hidden_dim: width of each hidden layer.
        n_hidden_layers: how many there are, each with a ReLU behind it.
        layer_norm: normalize each hidden layer, before its ReLU.
        init: one of `INITS`.
        last_hidden_gain: of the last hidden layer's orthogonal weights; all others have sqrt(2).
    """

    hidden_dim: int = 256
    n_hidden_layers: int = 2
    layer_norm: bool = False
    init: str = "torch"
    last_hidden_gain: float | None = None

    def linear(self, n_in: int, n_out: int, gain: float | None = None) -> nn.Linear:
        """A linear layer with its first weights; `gain` is of orthogonal ones.

        Raises:
            ValueError: `init` is not one of `INITS`.
        """
        layer = nn.Linear(n_in, n_out)
        if self.init == "torch":
            return layer
        if self.init == "xavier":
            nn.init.xavier_uniform_(layer.weight)
        elif self.init == "orthogonal":
            nn.init.orthogonal_(layer.weight, math.sqrt(2) if gain is None else gain)
        else:
            raise ValueError(f"init {self.init!r} is not one of {', '.join(INITS)}")
        nn.init.zeros_(layer.bias)
        return layer

    def hidden(self, n_in: int) -> list[nn.Linear]:
        """The linear layers of the hidden part, the first one from n_in inputs."""
        widths = [n_in] + self.n_hidden_layers * [self.hidden_dim]
        gains = (self.n_hidden_layers - 1) * [None] + [self.last_hidden_gain]
        pairs = zip(widths[:-1], widths[1:], gains, strict=True)
        return [self.linear(*pair) for pair in pairs]

    def network(self, n_in: int) -> nn.Sequential:
        """The hidden part of one network, (..., n_in) -> (..., hidden_dim)."""
        layers: list[nn.Module] = []
        for linear in self.hidden(n_in):
            layers.append(linear)
            if self.layer_norm:
                layers.append(nn.LayerNorm(self.hidden_dim, eps=NORM_EPS))
            layers.append(nn.ReLU())
        return nn.Sequential(*layers)


class StackedLinear(nn.Module):
    """Linear layers of one size as one: (M, B, n_in) -> (M, B, n_out)."""

    def __init__(self, layers: Sequence[nn.Linear]):
        super().__init__()
        weights = torch.stack([layer.weight.detach().T for layer in layers])
        biases = torch.stack([layer.bias.detach() for layer in layers])
        self.weight = nn.Parameter(weights.contiguous())
        self.bias = nn.Parameter(biases.unsqueeze(1))

    def forward(self, x: torch.Tensor, members: torch.Tensor | None) -> torch.Tensor:
        """One layer for each of the x; `members` (M,) are their numbers, None: all."""
        if members is None:
            return torch.baddbmm(self.bias, x, self.weight)
        return torch.baddbmm(self.bias[members], x, self.weight[members])


class StackedNorm(nn.Module):
    """Layer normalizations of one width, each with its own scale and shift: (M, B, width)."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(count, 1, width))
        self.bias = nn.Parameter(torch.zeros(count, 1, width))

    def forward(self, x: torch.Tensor, members: torch.Tensor | None) -> torch.Tensor:
        """One normalization for each of the x; `members` (M,) as in `StackedLinear`."""
        x = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        if members is None:
            return x * self.weight + self.bias
        return x * self.weight[members] + self.bias[members]


class CriticEnsemble(nn.Module):
    """N critics: states (B, S) and actions (B, A) -> values (N, B).

    Actions (B, n, A) get values (N, B, n). `members` (M,) are the numbers of the critics that are
    asked; the others cost nothing then, and get no gradient.

    Args:
        state_dim, action_dim: of the task.
        n_critics: N.
        form: of each critic.
        shared_head: all critics have one last layer, the same.
    """

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        n_critics: int,
        form: Form | None = None,
        shared_head: bool = False,
    ):
        super().__init__()
        form = form or Form()
        self.n_critics = n_critics
        hidden = [form.hidden(state_dim + action_dim) for _ in range(n_critics)]
        self.hidden = nn.ModuleList(map(StackedLinear, zip(*hidden, strict=True)))
        self.norms = nn.ModuleList(
            StackedNorm(n_critics, form.hidden_dim)
            for _ in range(form.n_hidden_layers * form.layer_norm)
        )
        self.last: nn.Linear | StackedLinear
        if shared_head:
            self.last = form.linear(form.hidden_dim, 1)
        else:
            lasts = [form.linear(form.hidden_dim, 1) for _ in range(n_critics)]
            self.last = StackedLinear(lasts)

    def forward(
        self,
        states: torch.Tensor,
        actions: torch.Tensor,
        members: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Values (M, B), or (M, B, n)."""
        if actions.ndim > states.ndim:
            states = states.unsqueeze(-2).expand(*actions.shape[:-1], -1)
        x = torch.cat((states, actions), dim=-1)
        rows = x.shape[:-1]
        count = self.n_critics if members is None else members.shape[0]
        x = x.reshape(-1, x.shape[-1]).expand(count, -1, -1)
        for number, layer in enumerate(self.hidden):
            x = layer(x, members)
            if self.norms:
                x = self.norms[number](x, members)
            x = x.relu()
        last = self.last
        q = last(x) if isinstance(last, nn.Linear) else last(x, members)
        return q.reshape(count, *rows)


def draw_members(
    n_critics: int, count: int, replace: bool, device: torch.device
) -> torch.Tensor:
    """Numbers (count,) of random critics, from the device's global stream.

    Args:
        n_critics: how many there are.
        count: how many are drawn.
        replace: whether one can be drawn twice.
    """
    if replace:
        return torch.randint(n_critics, (count,), device=device)
    return torch.randperm(n_critics, device=device)[:count]


def linear_layers(
    state: Mapping[str, torch.Tensor], name: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight (n_out, n_in) and bias (n_out,) of the linear layers of a `Sequential`, in order.

    Args:
        state: state_dict of the module that it is a part of.
        name: of the part.

    Raises:
        ValueError: there are none, or other layers with weights stand between them.
    """
    places = [key.split(".") for key in state if key.startswith(f"{name}.")]
    numbers = sorted({int(number) for _, number, kind in places if kind == "weight"})
    if not numbers:
        raise ValueError(f"it has no linear layers {name}.0, {name}.1 and so on")
    layers = [(state[f"{name}.{n}.weight"], state[f"{name}.{n}.bias"]) for n in numbers]
    if any(weight.ndim != 2 for weight, _ in layers):
        raise ValueError(f"not all layers of its {name} are linear ones")
    return layers


def ensemble_weights(
    critics: Sequence[Mapping[str, torch.Tensor]], name: str = "network"
) -> dict[str, torch.Tensor]:
    """The state_dict of a `CriticEnsemble` that is the same functions as separate critics.

    Args:
        critics: the state_dict of each: linear layers with a ReLU between two of them.
        name: of these layers in it.

    Raises:
        ValueError: a critic has no such layers, or they are not equally many.
    """
    each = [linear_layers(critic, name) for critic in critics]
    places = [f"hidden.{number}" for number in range(len(each[0]) - 1)] + ["last"]
    found = {}
    for place, layers in zip(places, zip(*each, strict=True), strict=True):
        found[f"{place}.weight"] = torch.stack([weight.T for weight, _ in layers])
        found[f"{place}.bias"] = torch.stack([bias for _, bias in layers]).unsqueeze(1)
    return found
