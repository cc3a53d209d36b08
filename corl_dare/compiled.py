"""Whole updates as one compiled graph: what `compile: true` switches on.

An update of these small networks is a few hundred calls of a few microseconds around some dozen
matrix products. `torch.compile` fuses what lies between the products, backward passes and
optimizers included, into a graph without Python. Eager stays the reference: the graph has the
same losses, the same random draws and Adam's formula, and differs by float32 rounding.

An algorithm file needs two things: `step` in the place of `optimizer.step()`, with gradients from
`torch.autograd.grad`, and `CompiledUpdate` around a method that takes tensors, flags and None and
returns a dict of tensors.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch

COMPILERS = ("g++", "clang++")


def check() -> None:
    """Raises ValueError where torch has nothing to compile with."""
    if not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        raise ValueError(
            "compile: true needs a C++ compiler (g++ or clang++, or its path in $CXX); "
            "install one or set compile to false"
        )


def step(
    optimizer: torch.optim.Optimizer, gradients: Sequence[torch.Tensor | None]
) -> None:
    """One step of an Adam with a single parameter group; None leaves a parameter alone."""
    group = optimizer.param_groups[0]
    if torch.compiler.is_compiling():
        _traced_adam(optimizer, group, gradients)
        return
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def _traced_adam(optimizer, group: dict, gradients) -> None:
    # Adam (arXiv 1412.6980), Algorithm 1. torch's own step reads the learning rate as a number,
    # and every number would be compiled in.
    beta_1, beta_2 = group["betas"]
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        if gradient is None:
            continue
        state = optimizer.state[parameter]
        state["step"].add_(1)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta_1)
        square.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        size = optimizer.compiled_lr / (1 - beta_1 ** state["step"])
        scale = (square / (1 - beta_2 ** state["step"])).sqrt() + group["eps"]
        parameter.sub_(size * mean / scale)


class CompiledUpdate:
    """A method that makes one update, compiled at its first call (half a minute).

    Learning rates are tensors in the graph and are filled before every call, so schedules go on
    as they do in eager mode; the optimizers' state keeps torch's form and its checkpoint keys.
    """

    def __init__(
        self,
        update: Callable[..., dict[str, torch.Tensor]],
        optimizers: list[torch.optim.Optimizer],
    ):
        # Lets the graph go through `autograd.grad`; off by default.
        torch._dynamo.config.trace_autograd_ops = True
        self.optimizers = optimizers
        for optimizer in optimizers:
            device = optimizer.param_groups[0]["params"][0].device
            optimizer.compiled_lr = torch.zeros((), device=device)
        self.compiled = torch.compile(
            update,
            fullgraph=True,
            # Eager's random draws. Fewer microseconds around the graph with the C++ wrapper.
            options={"fallback_random": True, "cpp_wrapper": True},
        )

    def __call__(self, *args: Any) -> dict[str, torch.Tensor]:
        for optimizer in self.optimizers:
            group = optimizer.param_groups[0]
            optimizer.compiled_lr.fill_(group["lr"])
            if not optimizer.state:
                for parameter in group["params"]:
                    optimizer.state[parameter] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return self.compiled(*args)
