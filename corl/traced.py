"""An update with `torch.vmap` and gradients inside, with its kernels fused.

torch.compile cannot look into the update of stacked seeds, where an optimizer steps in the middle
of `torch.vmap` (`compiled.descend`). One call can be recorded instead, as the flat list of what it
does to tensors. Such a list compiles like any other function.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from corl import compiled
from corl.captured import Captured, form_of


def can_fuse() -> bool:
    """Can kernels be compiled here?"""
    return not compiled.obstacle()


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its kernels fused, see `Fused`; as it is where nothing can compile it."""
    return Fused(function) if can_fuse() else function


def captured(
    function: Callable[..., Any], optimizers: Sequence[torch.optim.Optimizer] = ()
) -> Captured:
    """The function as a CUDA graph of fused kernels, see `captured.Captured`."""
    return Captured(fused(function), optimizers)


class Fused:
    """The function of tensors, recorded at its first call and compiled at its second.

    There is one recording per form of the arguments, as of `captured.Captured`. The function must
    do the same work at every call of one form. Tensors that are no arguments must stay the same
    ones, and may be changed in place.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self._recorded: dict[Hashable, tuple[Callable[..., Any], Any]] = {}

    def __call__(self, *args: Any) -> Any:
        values, structure = pytree.tree_flatten(args)
        form = form_of(values, structure)
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if form not in self._recorded:
            recorded, outputs, structure_of_outputs = self._record(values, structure)
            options: dict[str, Any] = {"fallback_random": True}
            work = torch.compile(recorded, fullgraph=True, options=options)
            self._recorded[form] = work, structure_of_outputs
        else:
            work, structure_of_outputs = self._recorded[form]
            outputs = work(*tensors)
        return pytree.tree_unflatten(list(outputs), structure_of_outputs)

    def _record(
        self, values: list[Any], structure: Any
    ) -> tuple[torch.fx.GraphModule, list[Any], Any]:
        """What one call does, what it returned, and the structure of that.

        The call is made: what it changes is changed once.
        """
        returned: list[Any] = []

        def flat(*tensors: torch.Tensor) -> list[Any]:
            given = iter(tensors)
            filled = [next(given) if isinstance(v, torch.Tensor) else v for v in values]
            result = self.function(*pytree.tree_unflatten(filled, structure))
            returned.extend(pytree.tree_flatten(result))
            return returned[0]

        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        recorded = make_fx(flat)(*tensors)
        # Gradients are part of the recording, so nothing else has to follow them.
        for place in (recorded._parameters, recorded._buffers, vars(recorded)):
            for name, value in list(place.items()):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    del place[name]
                    setattr(recorded, name, value.detach())
        outputs, structure_of_outputs = returned
        return recorded, outputs, structure_of_outputs
