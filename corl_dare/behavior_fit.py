"""Trains a behavior model on states and actions; an interrupted training goes on to the same bits.

Shapes: N rows, S state dimension, A action dimension.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from corl_dare.behavior import BehaviorModel

# Seconds of training that a killed process may lose.
SAVE_SECONDS = 60.0
# Updates that a mean loss covers.
MEAN_OF = 200


def fit(
    model: BehaviorModel,
    states: torch.Tensor | np.ndarray,
    actions: torch.Tensor | np.ndarray,
    *,
    updates: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    progress: bool = True,
    bar: Callable[..., Any] = tqdm,
    should_stop: Callable[[], bool] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
    resume: dict[str, Any] | None = None,
) -> np.ndarray:
    """Train a behavior model with Adam at a constant rate; moves it to `device`.

    Rows are shuffled without replacement in each pass; the rows that do not fill a
    batch wait for the next shuffle. A batch larger than the data is the whole data.

    Args:
        states: (N, S), raw.
        actions: (N, A), raw.
        generator: on `device`; the only source of randomness.
        bar: makes the progress bar, called as `tqdm` is.
        should_stop: asked every 50 updates.
        save: given the state of the training once a minute and before a stop, for
            `torch.save`; the tensors in it change with the next update.
        resume: such a state. A call that is otherwise the same goes on from there and
            ends with the bits of a training that was never interrupted.

    Returns:
        The mean loss of each 200 updates (the last mean may cover fewer).

    Raises:
        ValueError: empty, misshapen or non-finite data, or a setting out of range.
        RuntimeError: the loss or a weight is not finite any more; such a state is not saved.
        KeyboardInterrupt: `should_stop` answered true.
    """
    device = torch.device(device)
    _check_settings(updates, batch_size, lr, generator, device)
    training = _Training(model, states, actions, batch_size, lr, generator, device)
    if resume is not None:
        training.load_state_dict(resume)
        if training.updates > updates:
            raise UnfitStateError(f"it is at update {training.updates} of {updates}")
    saved = time.perf_counter()
    with bar(
        desc=f"behavior {model.kind}",
        total=updates,
        initial=training.updates,
        unit="update",
        disable=not progress,
    ) as shown:
        while training.updates < updates:
            training.update()
            shown.update()
            if training.updates % MEAN_OF == 0 or training.updates == updates:
                shown.set_postfix(loss=f"{training.end_mean():.4f}", refresh=False)
            if training.updates % 50:
                continue
            stop = should_stop is not None and should_stop()
            late = time.perf_counter() - saved >= SAVE_SECONDS
            if save is not None and (stop or late):
                training.check_weights()
                save(training.state_dict())
                saved = time.perf_counter()
            if stop:
                how = "" if save is None else "; the same call goes on from there"
                raise KeyboardInterrupt(
                    f"behavior training stopped after {training.updates} of {updates} "
                    f"updates{how}"
                )
    training.check_weights()
    model.eval()
    return np.array(training.means)


def _check_settings(
    updates: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    for name, value in (("updates", updates), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"behavior {name} is {value}; it must be at least 1")
    if not 0.0 < lr < math.inf:
        raise ValueError(f"behavior lr is {lr}; it must be positive and finite")
    if generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}, training on {device}")


class UnfitStateError(ValueError):
    """What `fit` was given to go on from is no state of such a training."""


class _Training:
    """A model, its optimizer, its batches and the mean losses so far."""

    def __init__(
        self,
        model: BehaviorModel,
        states: torch.Tensor | np.ndarray,
        actions: torch.Tensor | np.ndarray,
        batch_size: int,
        lr: float,
        generator: torch.Generator,
        device: torch.device,
    ):
        self.model, self.generator, self.lr = model.to(device).train(), generator, lr
        dtype = next(model.parameters()).dtype
        states = torch.as_tensor(states).to(device, dtype)
        actions = torch.as_tensor(actions).to(device, dtype)
        _check_rows(model, states, actions)
        model.normalize_to(states)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        self.batches = _ShuffledBatches(states, actions, batch_size, generator)
        self.updates = 0
        self.total = torch.zeros((), device=device, dtype=dtype)
        self.means: list[float] = []

    def update(self) -> None:
        """One step of Adam."""
        loss = self.model.loss(*next(self.batches), self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()
        self.updates += 1

    def end_mean(self) -> float:
        """The mean loss since the last call, read from the device.

        Raises:
            RuntimeError: it is not finite; one bad update spoils the whole sum.
        """
        mean = self.total.item() / (self.updates - MEAN_OF * len(self.means))
        if not math.isfinite(mean):
            raise self._diverged(f"loss is {mean}")
        self.means.append(mean)
        self.total.zero_()
        return mean

    def check_weights(self) -> None:
        """Read once from the device whether all weights and moments are finite.

        Raises:
            RuntimeError: they are not.
        """
        moments = [m for state in self.optimizer.state.values() for m in state.values()]
        tensors = [*self.model.state_dict().values(), *moments]
        good = [x.isfinite().all() for x in tensors if x.device == self.total.device]
        if not torch.stack(good).all():
            raise self._diverged("weights or moments of Adam are not finite")

    def _diverged(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"behavior {what} after {self.updates} updates; "
            f"lower its lr ({self.lr}) or check the scale of the data"
        )

    def state_dict(self) -> dict[str, Any]:
        """For `torch.save`; the tensors in it change with the next update."""
        return {
            "updates": self.updates,
            "means": self.means,
            "total": self.total,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.batches.order,
            "start": self.batches.start,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            UnfitStateError: it is none of such a training.
        """
        try:
            self._check_state(state)
            self.updates, self.means = state["updates"], list(state["means"])
            self.total.copy_(state["total"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.batches.order = state["order"].to(self.total.device)
            self.batches.start = state["start"]
            self.generator.set_state(state["generator"])
        # Whoever wrote the file may have put anything anywhere.
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            raise UnfitStateError(text[:200]) from None

    def _check_state(self, state: dict[str, Any]) -> None:
        """Raise where what the parts would take in is no state of theirs."""
        rows, order, start = len(self.batches.states), state["order"], state["start"]
        if type(state["updates"]) is not int or state["updates"] < 0:
            raise ValueError(f"updates is {state['updates']!r}")
        if not all(type(mean) is float for mean in state["means"]):
            raise ValueError("means are no numbers")
        if len(state["means"]) != -(-state["updates"] // MEAN_OF):
            if len(state["means"]) != state["updates"] // MEAN_OF:
                raise ValueError("there are not as many means as updates say")
        if order.dtype != torch.long or order.shape not in ((0,), (rows,)):
            raise ValueError(f"order has shape {tuple(order.shape)}")
        if len(order) and not (0 <= int(order.min()) and int(order.max()) < rows):
            raise ValueError("order has numbers of rows that are not there")
        if type(start) is not int or not 0 <= start <= len(order):
            raise ValueError(f"start is {start!r}")
        saved, own = state["optimizer"], self.optimizer.state_dict()
        if saved["param_groups"] != own["param_groups"]:
            raise ValueError("the optimizer has other settings")
        parameters = list(self.model.parameters())
        if len(saved["state"]) != len(parameters) * bool(state["updates"]):
            raise ValueError("the optimizer has not the moments of every parameter")
        for number, moments in saved["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != parameters[number].shape:
                    raise ValueError(f"{name} of parameter {number} has another shape")
        for name, values in (*state["model"].items(), ("total", state["total"])):
            if not bool(torch.as_tensor(values).isfinite().all()):
                raise ValueError(f"{name} is not finite")


def _check_rows(
    model: BehaviorModel, states: torch.Tensor, actions: torch.Tensor
) -> None:
    for name, rows, dim in (
        ("states", states, model.state_dim),
        ("actions", actions, model.action_dim),
    ):
        if rows.ndim != 2 or rows.shape[1] != dim:
            raise ValueError(
                f"{name} have shape {tuple(rows.shape)}; expected (N, {dim})"
            )
        if not len(rows):
            raise ValueError(f"{name} are empty; the behavior model needs data")
        bad = ~rows.isfinite().all(-1)
        if bad.any():
            raise ValueError(f"{name} row {int(bad.int().argmax())} is not finite")
    if len(states) != len(actions):
        raise ValueError(f"{len(states)} states but {len(actions)} actions")


class _ShuffledBatches:
    """Endless batches; `order`, `start` and the generator decide what comes next."""

    def __init__(
        self,
        states: torch.Tensor,
        actions: torch.Tensor,
        batch_size: int,
        generator: torch.Generator,
    ):
        self.states, self.actions, self.generator = states, actions, generator
        self.size = min(batch_size, len(states))
        self.order = torch.empty(0, dtype=torch.long, device=states.device)
        self.start = 0

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.start + self.size > len(self.order):
            self.order = torch.randperm(
                len(self.states), generator=self.generator, device=self.states.device
            )
            self.start = 0
        rows = self.order[self.start : self.start + self.size]
        self.start += self.size
        return self.states[rows], self.actions[rows]
