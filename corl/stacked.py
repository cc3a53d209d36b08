"""The networks of several seeds in one update.

`Stack` takes ordinary trainers, one per seed, and makes one of them. Their parameters lie in one
tensor each, (N, ...), of which the trainers keep views: so every trainer has its newest weights at
any time, and its checkpoint is an ordinary one. The update of an algorithm file runs as it stands
under `torch.vmap`, which turns N products of matrices into one batched product. Where it takes an
optimizer's step, `compiled.descend` leaves vmap: the losses of all seeds are added up and one Adam
moves all of them. Adam works on each number alone, so nothing of one seed reaches another.

Shapes: N seeds in front of everything else.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LRScheduler

from corl import traced

PLAIN = (int, float, bool, str, type(None))


def tree_map(function: Callable[..., Any], *values: Any) -> Any:
    """The function of the leaves of nested dicts, lists and (named) tuples of one form."""
    first = values[0]
    if isinstance(first, dict):
        return {k: tree_map(function, *(v[k] for v in values)) for k in first}
    if isinstance(first, list | tuple):
        items = [tree_map(function, *leaves) for leaves in zip(*values, strict=True)]
        named = hasattr(first, "_fields")
        return type(first)(*items) if named else type(first)(items)
    return function(*values)


def stack_leaves(*values: Any) -> Any:
    """Tensors of all seeds as one, (N, ...); anything else must be the same for all.

    Raises:
        ValueError: it is not.
    """
    if isinstance(values[0], torch.Tensor):
        return torch.stack(values)
    if any(value != values[0] for value in values):
        raise ValueError(f"the seeds differ in what is no tensor: {values}")
    return values[0]


def of_seed(values: Any, number: int) -> Any:
    """What belongs to one seed of nested tensors (N, ...)."""

    def row(value: Any) -> Any:
        return value[number] if isinstance(value, torch.Tensor) else value

    return tree_map(row, values)


class _Roof(nn.Module):
    """Networks in one module, so that `functional_call` puts other tensors into all of them."""

    def __init__(self, networks: dict[str, nn.Module]):
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)

    def forward(self, function: Callable[..., Any], args: tuple) -> Any:
        return function(*args)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by name."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


class Networks:
    """Networks of N seeds, alike in form, whose tensors lie together.

    Args:
        members: for each seed its networks by name. Their tensors become views.

    Attributes:
        tensors: name -> (N, ...).
    """

    def __init__(self, members: Sequence[dict[str, nn.Module]]):
        self.roofs = [_Roof(networks) for networks in members]
        self.tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self.roofs[0].tensors().items():
            parts = [roof.tensors()[name] for roof in self.roofs]
            together = torch.stack([part.detach() for part in parts])
            for part, view in zip(parts, together, strict=True):
                part.data = view
            self.tensors[name] = together.requires_grad_(tensor.requires_grad)

    def together(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors (N, ...) of which these of the first seed are a part."""
        names = {id(tensor): name for name, tensor in self.roofs[0].tensors().items()}
        return [self.tensors[names[id(tensor)]] for tensor in tensors]

    def over_seeds(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the first seed's networks and of tensors, for all seeds at once.

        The result takes tensors (N, ...), also nested, and returns (N, ...). Numbers, flags and
        tensors without a dimension are the same for all seeds.
        """

        def of_one(tensors: dict[str, torch.Tensor], *args: Any) -> Any:
            # A network may stand in two places: its tensors are put in, and taken out, once.
            return functional_call(
                self.roofs[0], tensors, (function, args), tie_weights=False
            )

        def of_all(*args: Any) -> Any:
            dims = tuple(tree_map(_dimension, arg) for arg in args)
            return torch.vmap(of_one, in_dims=(0, *dims))(self.tensors, *args)

        return of_all


def _dimension(value: Any) -> int | None:
    """Along which dimension a value has one entry per seed."""
    return 0 if isinstance(value, torch.Tensor) and value.ndim else None


class Stack:
    """Trainers of N seeds and the one trainer that makes their updates.

    A trainer is an algorithm file's: its attributes are networks, optimizers (Adam with one group
    of parameters), schedules and plain values; `_update(batch, noise, ...)` is a function of
    tensors, flags and None but for its steps, and `_noise(actions, ...)` draws its random numbers.

    Args:
        trainers: one per seed, of one config but for the seed, and equally far.
        streams: for each seed what puts its random streams in place of the global ones; default:
            the trainers have generators of their own, or draw from one stream in turn.
        graph: the update becomes a CUDA graph, see `captured.Captured`.

    Attributes:
        trainer: takes batches (N, B, ...) and returns metrics (N,). Schedules, counters and
            switches are its own until `spread`.
        members: the trainers.
        optimizers: of all seeds together.
    """

    def __init__(
        self,
        trainers: Sequence[Any],
        streams: Sequence[Callable[[], AbstractContextManager]] = (),
        graph: bool = False,
    ):
        self.members, self.graph = list(trainers), graph
        self.streams = list(streams) or [nullcontext] * len(self.members)
        networks = [_parts_of(trainer, nn.Module) for trainer in self.members]
        self.networks = Networks(networks)
        first = self.members[0]
        self.trainer = copy.copy(first)
        self._of_all = self.networks.over_seeds(first._update)
        self.gather()
        self.trainer._update = self.update
        self.trainer._noise = self.noise

    def gather(self) -> None:
        """Begin with what the members hold now, such as a state that was loaded into them."""
        first = self.members[0]
        for name, value in vars(first).items():
            if isinstance(value, PLAIN):
                setattr(self.trainer, name, value)
        optimizers = _parts_of(first, torch.optim.Optimizer)
        self.optimizers = [self._optimizer(name) for name in optimizers]
        self._rates: list[float] = []
        self._update = self._of_all
        if self.graph:
            self._update = traced.captured(self._of_all, self.optimizers)

    def _optimizer(self, name: str) -> torch.optim.Adam:
        """One Adam of all seeds; the moments of the members' become views of its own."""
        own: list[Any] = [getattr(member, name) for member in self.members]
        names = {id(p): n for n, p in self.networks.roofs[0].named_parameters()}
        group = own[0].param_groups[0]
        if type(own[0]) is not torch.optim.Adam or len(own[0].param_groups) > 1:
            raise ValueError(
                f"{name} is not Adam with one group, so it cannot be stacked"
            )
        together = torch.optim.Adam(
            [self.networks.tensors[names[id(p)]] for p in group["params"]]
        )
        options = {k: v for k, v in group.items() if k != "params"}
        place = group["params"][0].device
        if place.type == "cuda":
            # One kernel for all parameters, which a graph can hold. A rate that is a number
            # would be part of the graph.
            rate = torch.tensor(group["lr"], device=place)
            options |= {"fused": True, "foreach": None, "capturable": True, "lr": rate}
        together.param_groups[0].update(options)
        if self.graph and traced.can_fuse():
            # Steps that a recording can follow, see `compiled.descend`.
            marks: Any = together
            marks.captured = True
            rate = torch.tensor(group["lr"], device=place)
            marks.traced_group = together.param_groups[0]
            marks.traced_group["lr"] = rate
        for number, parameter in enumerate(together.param_groups[0]["params"]):
            parts = [optimizer.param_groups[0]["params"][number] for optimizer in own]
            states = [o.state.get(p, {}) for o, p in zip(own, parts, strict=True)]
            counts = [float(state.get("step", 0.0)) for state in states]
            if len(set(counts)) > 1:
                raise ValueError(
                    f"the seeds' {name} have made {counts} steps: not as many"
                )
            step = torch.tensor(
                counts[0], device=place if place.type == "cuda" else "cpu"
            )
            moments = {}
            for key in ("exp_avg", "exp_avg_sq"):
                rows = [
                    s.get(key, torch.zeros_like(p))
                    for s, p in zip(states, parts, strict=True)
                ]
                moments[key] = torch.stack([row.detach() for row in rows])
            together.state[parameter] = {"step": step, **moments}
            for row, (optimizer, part) in enumerate(zip(own, parts, strict=True)):
                views = {key: moment[row] for key, moment in moments.items()}
                optimizer.state[part] = {"step": step, **views}
        marked: Any = own[0]
        marked.stacked = together
        # The schedules ask whether `step` was called.
        for optimizer in own:
            optimizer._opt_called = True
        return together

    def update(self, *args: Any) -> dict[str, torch.Tensor]:
        """`_update` of all seeds: arguments (N, ...), metrics (N,)."""
        own: Any = list(_parts_of(self.trainer, torch.optim.Optimizer).values())
        rates = [optimizer.param_groups[0]["lr"] for optimizer in own]
        if rates != self._rates:
            for optimizer, rate in zip(own, rates, strict=True):
                group = optimizer.stacked.param_groups[0]
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
            self._rates = rates
        return self._update(*args)

    def noise(self, actions: torch.Tensor, *flags: Any) -> Any:
        """`_noise` of every seed from its own streams; actions (N, B, A)."""
        drawn = []
        for member, stream, rows in zip(
            self.members, self.streams, actions, strict=True
        ):
            with stream():
                drawn.append(member._noise(rows, *flags))
        return tree_map(stack_leaves, *drawn)

    def spread(self) -> None:
        """Give every member the counters, switches, schedules and rates of `trainer`."""
        schedules = _parts_of(self.trainer, LRScheduler)
        optimizers = _parts_of(self.trainer, torch.optim.Optimizer)
        for member in self.members:
            for name, value in vars(self.trainer).items():
                if isinstance(value, PLAIN):
                    setattr(member, name, value)
            for name, schedule in schedules.items():
                state = copy.deepcopy(schedule.state_dict())
                getattr(member, name).load_state_dict(state)
            for name, optimizer in optimizers.items():
                group = optimizer.param_groups[0]
                own = getattr(member, name).param_groups[0]
                own.update({k: v for k, v in group.items() if k != "params"})


def _parts_of(trainer: Any, kind: type) -> dict[str, Any]:
    """The attributes of a kind, by name."""
    return {k: v for k, v in vars(trainer).items() if isinstance(v, kind)}
