"""What is not finite: the weights of a run's parts, an environment's values, a file's tensors.

Each check says what is not finite and what the likely cause is, in a `FloatingPointError`. `Run`
adds the step and the last good checkpoint. No check reads a tensor on its own: all flags of a
device come to the host in one transfer, when a row of metrics or a checkpoint is written.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
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


def check_weights(parts: Mapping[str, Any], config: Any) -> None:
    """Raises FloatingPointError where the weights of a part are not finite."""
    bad = first_bad(
        pair for name, part in parts.items() for pair in weights_of(part, name)
    )
    if bad:
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


class CheckedEnv(gym.Wrapper):
    """An environment that takes finite actions and hands out values that can be learned from.

    `reset` and `step` raise FloatingPointError where an action is not finite, and where an
    observation or a reward has no square in float32.

    Args:
        env: the environment, with raw observations and rewards.
        role: `training` or `evaluation`.
        config: of the run; it names the task and the likely cause of a bad action.
    """

    def __init__(self, env: gym.Env, role: str, config: Any):
        super().__init__(env)
        self._name, self._config = f"the {role} environment {config.env}", config

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        observation, info = self.env.reset(**options)
        self._check(observation, "observation")
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take an action (A,)."""
        if not np.isfinite(action).all():
            raise FloatingPointError(
                f"the policy's action in {self._name} is not finite: "
                f"{likely_cause(self._config)}"
            )
        result = self.env.step(action)
        self._check(result[0], "observation")
        self._check(result[1], "reward")
        return result

    def _check(self, values: Any, what: str) -> None:
        # Not "larger than": comparisons with nan are false.
        if np.abs(values).max() <= LARGEST:
            return
        values = np.atleast_1d(values).astype(float)
        place = int(np.argmax(~(np.abs(values) <= LARGEST)))
        dimension = f" (dimension {place})" if len(values) > 1 else ""
        raise FloatingPointError(
            f"{self._name} gave the {what} {values[place]:g}{dimension}"
            f"{self._episode_step()}: {rule(values[place])}; look for the fault in the "
            "environment"
        )

    def _episode_step(self) -> str:
        try:
            return (
                f" in step {self.env.get_wrapper_attr('_elapsed_steps')} of its episode"
            )
        except AttributeError:
            return ""


def check_reward(stored: float, raw: Any) -> None:
    """Raises FloatingPointError where a reward, as it is stored, has no square in float32."""
    if not abs(stored) <= LARGEST:
        raise FloatingPointError(
            f"normalize_reward turns the reward {float(raw):g} into {float(stored):g}: "
            f"{rule(stored)}; set normalize_reward to false or look at the returns of the dataset"
        )


def rule(value: Any) -> str:
    """The rule that a number breaks which is not finite or has no square in float32."""
    if not math.isfinite(value):
        return "it must be finite"
    return f"numbers above {LARGEST:.2g} cannot be squared in float32"
