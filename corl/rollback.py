"""Put objects back into the state they were in, in place.

`Snapshot` copies what a training changes: numbers, arrays, tensors, networks, optimizers,
learning-rate schedules, random streams. `restore` copies it back into the very same tensors, so
that a compiled graph that holds them notices nothing.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from corl.checkpoints import rng_state, set_rng_state

PLAIN = (int, float, bool, str, bytes, type(None))
Undo = Callable[[], object]


class Snapshot:
    """The state of some objects, and of the global random streams.

    Args:
        objects: their attributes are followed, and those of the objects in them.
        leave: objects that are not looked into, such as replay buffers and environments.
    """

    def __init__(self, objects: Iterable[Any], leave: Iterable[Any] = ()):
        self._left_alone = {id(x) for x in leave}
        self._streams = rng_state()
        self._undo: list[Undo] = []
        self._attributes_of(list(objects))

    def restore(self) -> None:
        """Everything as it was."""
        for undo in self._undo:
            undo()
        set_rng_state(self._streams)

    def _attributes_of(self, value: Any) -> None:
        """Remember a value and what hangs on it, each object once."""
        if id(value) in self._left_alone or isinstance(value, PLAIN):
            return
        self._left_alone.add(id(value))
        if isinstance(value, torch.nn.Module):
            self._undo.append(_undo_module(value))
        elif isinstance(value, torch.optim.Optimizer):
            self._undo.append(_undo_optimizer(value))
        elif isinstance(value, LRScheduler):
            state = copy.deepcopy(value.state_dict())
            self._undo.append(lambda: value.load_state_dict(state))
        elif isinstance(value, torch.Generator):
            stream = value.get_state()
            self._undo.append(lambda: value.set_state(stream))
        elif isinstance(value, torch.Tensor):
            tensor = value.detach().clone()
            self._undo.append(lambda: _copy(value, tensor))
        elif isinstance(value, np.ndarray):
            array = value.copy()
            self._undo.append(lambda: np.copyto(value, array))
        elif isinstance(value, dict):
            entries = dict(value)
            self._undo.append(lambda: _refill(value, entries))
            self._each(entries.values())
        elif isinstance(value, list):
            items = list(value)
            self._undo.append(lambda: value.__setitem__(slice(None), items))
            self._each(items)
        elif hasattr(value, "state_dict"):
            attributes = dict(vars(value))
            self._undo.append(lambda: _set_attributes(value, attributes))
            self._each(attributes.values())

    def _each(self, values: Iterable[Any]) -> None:
        for value in values:
            self._attributes_of(value)


@torch.no_grad()
def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def _refill(target: dict[Any, Any], entries: dict[Any, Any]) -> None:
    target.clear()
    target.update(entries)


def _set_attributes(value: Any, attributes: dict[str, Any]) -> None:
    # Only what is another object now: an attribute that was set tells a compiled graph that
    # something may have changed.
    for name in set(vars(value)) - set(attributes):
        delattr(value, name)
    for name, old in attributes.items():
        if vars(value).get(name, value) is not old:
            setattr(value, name, old)


def _undo_module(module: torch.nn.Module) -> Undo:
    tensors = [*module.parameters(), *module.buffers()]
    copies = [tensor.detach().clone() for tensor in tensors]
    modes = [(m, m.training) for m in module.modules()]

    def undo() -> None:
        for tensor, old in zip(tensors, copies, strict=True):
            _copy(tensor, old)
            tensor.grad = None
        for part, mode in modes:
            if part.training is not mode:
                part.training = mode

    return undo


def _undo_optimizer(optimizer: torch.optim.Optimizer) -> Undo:
    """Moments that were not there yet become zeros, with which Adam starts, too."""
    groups = [
        {k: v for k, v in group.items() if k != "params"}
        for group in optimizer.param_groups
    ]
    groups = copy.deepcopy(groups)
    states = {
        parameter: {
            k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()
        }
        for parameter, state in optimizer.state.items()
    }

    def undo() -> None:
        for group, old in zip(optimizer.param_groups, groups, strict=True):
            group.update(old)
        for parameter, state in optimizer.state.items():
            before = states.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    _copy(value, before.get(name, torch.zeros_like(value)))
                elif name in before:
                    state[name] = before[name]

    return undo
