"""The steps of an update, and whole updates as one compiled graph (`compile: true`).

An update of these small networks is a few hundred calls of a few microseconds around some dozen
matrix products. `torch.compile` fuses what lies between the products, backward passes and
optimizers included, into a graph without Python. Eager stays the reference: the graph has the
same losses, the same random draws and Adam's formula, and differs by float32 rounding.

An algorithm file needs two things: `descend` where it would write `loss.backward()` and
`optimizer.step()`, and `CompiledUpdate` around a method that takes tensors, flags and None and
returns a dict of tensors.
"""

import functools
import math
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from corl.captured import Captured

COMPILERS = ("g++", "clang++")
# Eager's random draws; fewer microseconds around a graph with the wrapper in C++.
OPTIONS: dict[str, Any] = {"fallback_random": True, "cpp_wrapper": True}


# What a graph is built from; torch's own headers include both.
HEADERS = "#include <Python.h>\n#include <cmath>\nint main() { return 0; }\n"


def check(device: str = "cpu") -> None:
    """Raises ValueError where updates cannot be compiled on the device; `auto` may be a GPU."""
    # There a graph of torch's own kernels is captured where none can be compiled.
    on_a_gpu = device != "cpu" and torch.cuda.is_available()
    if not on_a_gpu and (problem := obstacle()):
        raise ValueError(f"compile: true needs {problem}; or set compile to false")


def obstacle() -> str:
    """What compiling needs and this machine lacks; "" where it can be done."""
    names = (os.environ.get("CXX", ""), *COMPILERS)
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        return "a C++ compiler (install g++ or clang++, or put its path into $CXX)"
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return f"a newer torch than {torch.__version__}"
    if not _includes_python(compiler):
        return f"Python's header files (Python.h), which {compiler} does not find"
    # torch looks for g++ alone on Linux.
    os.environ.setdefault("CXX", compiler)
    return ""


@functools.cache
def _includes_python(compiler: str) -> bool:
    include = sysconfig.get_paths()["include"]
    command = [compiler, "-fsyntax-only", "-x", "c++", f"-I{include}", "-"]
    done = subprocess.run(command, input=HEADERS, text=True, capture_output=True)
    return done.returncode == 0


def keep_graphs_in(folder: Path) -> None:
    """Compiled graphs are kept in the folder, for every later process with the same ones.

    A TORCHINDUCTOR_CACHE_DIR of the user stays. The graphs are machine code, so each instruction
    set has a folder of its own, and each number of threads, which is built in.

    Raises:
        ValueError: the folder cannot be made.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    name = f"{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}-threads"
    folder = folder.absolute() / name.lower()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ValueError(
            f"cannot keep compiled updates in {folder} ({error.strerror}); set CORL_DARE_CACHE "
            "to a folder that you may write to, or compile to false"
        ) from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def function(eager: Callable[..., Any], device: str = "cpu") -> Callable[..., Any]:
    """The function of tensors as one graph, compiled when it is called first.

    On a GPU it becomes a CUDA graph too, see `captured.Captured`: of compiled kernels where there
    is a compiler, else of torch's own.
    """
    if not on_gpu(device):
        return torch.compile(eager, fullgraph=True, options=OPTIONS)
    return Captured(_fused(eager))


def on_gpu(device: str | torch.device) -> bool:
    """Is the device a CUDA one, where graphs are captured?"""
    return torch.device(device).type == "cuda"


def _fused(eager: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its kernels fused, on a GPU; as it is where nothing can compile it."""
    if obstacle():
        return eager
    return torch.compile(eager, fullgraph=True, options={"fallback_random": True})


class _StepOfAllSeeds(torch.autograd.Function):
    """Leaves `torch.vmap`: the losses of all seeds are added up, and one step moves all of them.

    vmap hands a function with a rule of its own the whole tensors, with their gradients.
    """

    @staticmethod
    def forward(loss: torch.Tensor, optimizers: list) -> torch.Tensor:
        raise RuntimeError("a trainer of a stack makes no update alone")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, loss: torch.Tensor, optimizers: list) -> tuple:
        descend(loss.sum(), *optimizers)
        return loss.detach(), 0


def descend(
    loss: torch.Tensor,
    *optimizers: torch.optim.Optimizer,
    max_norm: float | None = None,
) -> None:
    """Step every optimizer along the loss's gradient with respect to its own parameters.

    Only these gradients are computed, so other networks in the loss need not be frozen. A
    parameter that the loss does not depend on stays as it is. One parameter group per optimizer.

    Args:
        max_norm: a longer gradient, of all parameters together, is shortened to it. Not for
            stacked seeds.
    """
    # `CompiledUpdate` gives its optimizers the attribute `traced_group`, and `stacked.Stack`
    # the attribute `stacked`: the optimizer of all seeds.
    marked: tuple[Any, ...] = optimizers
    compiling = torch.compiler.is_compiling()
    if not compiling and hasattr(marked[0], "stacked"):
        assert max_norm is None, "a norm of each seed is not computed"
        stacked = [optimizer.stacked for optimizer in marked]
        _StepOfAllSeeds.apply(loss, stacked)
        return
    # A captured update takes the same steps before it is captured, and where nothing could
    # compile it.
    traced = compiling or getattr(marked[0], "captured", False)
    groups = [o.traced_group if traced else o.param_groups[0] for o in marked]
    parameters = [parameter for group in groups for parameter in group["params"]]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    if max_norm is not None:
        norm = torch.nn.utils.get_total_norm([g for g in found if g is not None])
        # As torch's `clip_grad_norm_`.
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        found = tuple(None if g is None else g * scale for g in found)
    gradients = iter(found)
    for optimizer, group in zip(optimizers, groups, strict=True):
        pairs = [(parameter, next(gradients)) for parameter in group["params"]]
        if traced:
            _traced_adam(optimizer.state, group, pairs)
            continue
        for parameter, gradient in pairs:
            # Adam of stacked seeds on a GPU takes gradients that lie as the parameters do.
            parameter.grad = None if gradient is None else gradient.contiguous()
        optimizer.step()


@torch.no_grad()
def _traced_adam(state: dict, group: dict, pairs: list) -> None:
    # Adam (arXiv 1412.6980), Algorithm 1. torch's own step reads the learning rate as a number,
    # and a number would be compiled in.
    moved = [pair for pair in pairs if pair[1] is not None]
    counts = torch.stack([state[parameter]["step"].add_(1) for parameter, _ in moved])
    # Once for all parameters, and as exponentials: the compiler keeps what several use if there
    # is an exponential in it. A power was computed again for every eight numbers of a parameter.
    decays = [(counts.double() * math.log(beta)).exp() for beta in group["betas"]]
    rates = group["lr"] / (1 - decays[0]).float()
    roots = (1 - decays[1]).rsqrt().float()
    beta_1, beta_2 = group["betas"]
    for number, (parameter, gradient) in enumerate(moved):
        mean, square = state[parameter]["exp_avg"], state[parameter]["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta_1)
        square.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        scale = square.sqrt() * roots[number] + group["eps"]
        parameter.sub_(rates[number] * mean / scale)


@torch.no_grad()
def complete(optimizer: torch.optim.Optimizer) -> None:
    """Give Adam its state, zeros, for the parameters that it has not moved yet."""
    for parameter in optimizer.param_groups[0]["params"]:
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)


@torch.no_grad()
def begin_anew(*optimizers: torch.optim.Optimizer) -> None:
    """Adam is as before its first step; those of stacked seeds begin anew for all of them."""
    for optimizer in optimizers:
        for moments in getattr(optimizer, "stacked", optimizer).state.values():
            # In place: compiled graphs hold these tensors.
            for moment in moments.values():
                moment.zero_()


@torch.no_grad()
def soft_update(target: torch.nn.Module, source: torch.nn.Module, tau: float) -> None:
    """Move a target network by tau towards its source: (1 - tau) target + tau source."""
    # Two products and a sum, as upstream: a fused lerp rounds differently.
    for target_param, source_param in zip(
        target.parameters(), source.parameters(), strict=True
    ):
        target_param.copy_((1 - tau) * target_param + tau * source_param)


class CompiledUpdate:
    """A method that makes one update with Adam, compiled at its first call (half a minute).

    Learning rates are tensors in the graph, filled before every call, so schedules go on as they
    do in eager mode. The optimizers' state keeps torch's form and its checkpoint keys.

    Raises:
        ValueError: an optimizer that is more than Adam with one parameter group.
    """

    def __init__(
        self,
        update: Callable[..., dict[str, torch.Tensor]],
        optimizers: list[torch.optim.Optimizer],
    ):
        # Lets the graph go through `autograd.grad`; off by default.
        torch._dynamo.config.trace_autograd_ops = True
        self.optimizers: list[Any] = list(optimizers)
        for optimizer in self.optimizers:
            group = optimizer.param_groups[0]
            more = [k for k in ("weight_decay", "amsgrad", "maximize") if group.get(k)]
            if type(optimizer) is not torch.optim.Adam:
                more.append(type(optimizer).__name__)
            if len(optimizer.param_groups) > 1:
                more.append("several parameter groups")
            if more:
                raise ValueError(
                    f"only plain Adam can be compiled, not {', '.join(more)}; "
                    "set compile to false"
                )
            rate = torch.zeros((), device=group["params"][0].device)
            # A copy: every number in torch's own group would be guarded.
            optimizer.traced_group = {**group, "lr": rate}
            optimizer._opt_called = True  # the schedules ask whether `step` was called
        self.device = self.optimizers[0].param_groups[0]["params"][0].device
        if on_gpu(self.device):
            self.compiled: Callable[..., Any] = Captured(_fused(update), self.optimizers)
            for optimizer in self.optimizers:
                optimizer.captured = True
        else:
            self.compiled = function(update)
        self._rates: list[float] = []
        self._completed: list[Any] = []  # the optimizers' state, once it is complete

    def __call__(self, *args: Any) -> dict[str, torch.Tensor]:
        rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        if rates != self._rates:
            for optimizer, rate in zip(self.optimizers, rates, strict=True):
                optimizer.traced_group["lr"].fill_(rate)
            self._rates = rates
        states = [optimizer.state for optimizer in self.optimizers]
        # `load_state_dict` makes a new one.
        new = len(states) != len(self._completed) or not all(
            state and state is known
            for state, known in zip(states, self._completed, strict=True)
        )
        if new:
            for optimizer in self.optimizers:
                complete(optimizer)
                self._place(optimizer)
            self._completed = states
        return self.compiled(*args)

    def _place(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer's counts on the device of the update."""
        for state in optimizer.state.values():
            if state["step"].device != self.device:
                # torch keeps counts on the CPU, which a CUDA graph cannot read.
                state["step"] = state["step"].to(self.device)
