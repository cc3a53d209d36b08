"""A function of tensors as one CUDA graph: the GPU gets its kernels in one launch.

An update of these small networks is a few hundred kernels of a few microseconds, and the host
takes longer to launch them than the GPU takes to run them. A CUDA graph holds the launches, so
that a call costs one.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

# Calls before a graph is captured: libraries set themselves up, and compiled code is built.
WARM_UPS = 2
# Forms of arguments that get a graph of their own, and so memory of their own.
MOST_GRAPHS = 8


class Captured:
    """The function, run from CUDA graphs after a few ordinary calls.

    There is one graph per form of the arguments: shapes, data types, and every argument that is
    no tensor. The function must do the same work at every call of one form, never wait for the
    device, and change tensors only in place. A call may overwrite the tensors that the call
    before returned.

    Args:
        function: takes tensors and plain values, also in lists and tuples, and returns tensors.
        optimizers: that the function steps. Their state may be put into new tensors by
            `load_state_dict`; then the graphs are captured again.
        generators: that the function draws from, besides the device's own.
        reads: gives the tensors, besides its arguments, that the function reads. Where others
            have taken their place, the graphs are captured again.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        optimizers: Sequence[torch.optim.Optimizer] = (),
        generators: Iterable[torch.Generator] = (),
        reads: Callable[[], Iterable[torch.Tensor]] = tuple,
    ):
        self.function, self.reads = function, reads
        self.optimizers, self.generators = optimizers, tuple(generators)
        self._graphs: dict[Hashable, _Graph] = {}
        self._calls: Counter[Hashable] = Counter()
        self._places: list[int] = []

    def __call__(self, *args: Any, **named: Any) -> Any:
        values, structure = pytree.tree_flatten((args, named))
        # As the graph has its copies: compiled code knows how its arguments lie in memory, and
        # would be compiled again in the middle of a capture.
        values = [v.contiguous() if isinstance(v, torch.Tensor) else v for v in values]
        form = form_of(values, structure)
        places = self._places_of_state()
        if places != self._places:
            self._graphs.clear()
            self._calls.clear()
            self._places = places
        graph = self._graphs.get(form)
        if graph is None:
            self._calls[form] += 1
            warm = self._calls[form] > WARM_UPS
            if not warm or len(self._graphs) == MOST_GRAPHS:
                args, named = pytree.tree_unflatten(values, structure)
                return self.function(*args, **named)
            graph = _Graph(self.function, values, structure, self.generators)
            self._graphs[form] = graph
        return graph.replay(values)

    def _places_of_state(self) -> list[int]:
        """Addresses of what is read, and of the optimizers' state (made at the first step)."""
        states = [
            value
            for optimizer in self.optimizers
            for state in optimizer.state.values()
            for value in state.values()
        ]
        return [value.data_ptr() for value in (*states, *self.reads())]


def form_of(values: Sequence[Any], structure: Any) -> Hashable:
    """What the arguments of one call have in common with those of another with the same work.

    Args:
        values, structure: as pytree's `tree_flatten` gives them.
    """
    forms = [
        (value.shape, value.dtype)
        if isinstance(value, torch.Tensor)
        else (type(value), value)
        for value in values
    ]
    return structure, *forms


class _Graph:
    """One captured call: where its arguments go, and where its results are."""

    def __init__(
        self,
        function: Callable[..., Any],
        values: list[Any],
        structure: Any,
        generators: Sequence[torch.Generator],
    ):
        own = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
        self._inputs = [value for value in own if isinstance(value, torch.Tensor)]
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        args, named = pytree.tree_unflatten(own, structure)
        reason: Exception | None = None
        try:
            # Capturing runs nothing.
            with torch.cuda.graph(self._graph):
                try:
                    self._outputs = function(*args, **named)
                except Exception as error:
                    reason = error
                    raise
        except Exception as error:
            # A broken capture ends with an error of its own, which does not say why.
            raise reason or error from None

    def replay(self, values: list[Any]) -> Any:
        given = [value for value in values if isinstance(value, torch.Tensor)]
        if given:
            torch._foreach_copy_(self._inputs, given)
        self._graph.replay()
        return self._outputs
