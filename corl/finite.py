"""What is not finite: which weights of a run's parts or tensors of a file, and why.

Each check says what is not finite and what the likely cause is, in a `FloatingPointError`. `Run`
adds the step and the last good checkpoint. No check reads a tensor on its own: all flags of a
device come to the host in one transfer, when a row of metrics or a checkpoint is written.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from corl.data.schema import LARGEST

Named = Iterator[tuple[str, torch.Tensor]]


def named_tensors(value: Any, name: str) -> Named:
    """The floating-point tensors in nested dicts, lists and tuples, with their paths."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from named_tensors(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from named_tensors(inner, f"{name}.{i}")


def weights_of(part: Any, name: str) -> Named:
    """What learns in a part of a run: its networks, optimizers and trainable tensors."""
    if isinstance(part, torch.nn.Module | torch.optim.Optimizer):
        yield from named_tensors(part.state_dict(), name)
        return
    for attribute, value in getattr(part, "__dict__", {}).items():
        for learns in value if isinstance(value, list | tuple) else (value,):
            if isinstance(learns, torch.nn.Module | torch.optim.Optimizer):
                yield from weights_of(learns, f"{name}.{attribute}")
        if isinstance(value, torch.Tensor) and value.requires_grad:
            yield f"{name}.{attribute}", value


def first_bad(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The name of the first tensor with a value that is not finite, or ""."""
    by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors:
        flag = tensor.detach().isfinite().all()
        by_device.setdefault(flag.device, []).append((name, flag))
    for flags in by_device.values():
        good = torch.stack([flag for _, flag in flags]).tolist()
        for (name, _), is_good in zip(flags, good, strict=True):
            if not is_good:
                return name
    return ""


def bad_weight(parts: Mapping[str, Any]) -> str:
    """The name of the first of all parts' weights that is not finite, or ""."""
    return first_bad(
        pair for name, part in parts.items() for pair in weights_of(part, name)
    )


def check_weights(parts: Mapping[str, Any], config: Any) -> None:
    """Raises FloatingPointError where the weights of a part are not finite."""
    if bad := bad_weight(parts):
        raise FloatingPointError(f"{bad} is not finite: {likely_cause(config)}")


def likely_cause(config: Any) -> str:
    """Why numbers of a training may have left the range of float32."""
    rates = ", ".join(f"{name} {rate:g}" for name, rate in _learning_rates(config, ""))
    return (
        f"the values diverged; likely too high a learning rate ({rates or 'unknown'}), or "
        "rewards or states on too large a scale"
    )


def _learning_rates(config: Any, prefix: str) -> Iterator[tuple[str, float]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _learning_rates(value, f"{prefix}{field.name}.")
        elif field.name.split("_")[-1] == "lr" or "_lr_" in field.name:
            if isinstance(value, float | int):
                yield prefix + field.name, value


def rule(value: Any) -> str:
    """The rule that a number breaks which is not finite or has no square in float32."""
    if not math.isfinite(value):
        return "which is not finite"
    return f"and numbers above {LARGEST:.2g} cannot be squared in float32"
