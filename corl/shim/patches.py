"""Changes of Python, torch, numpy and JAX that old scripts need, taken back afterwards."""

import collections
import importlib
import importlib.util
import sys
from collections import abc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from corl.shim.options import Options, current

# Removed name -> what numpy has for it.
NUMPY = {
    "bool": bool,
    "int": int,
    "float": float,
    "complex": complex,
    "object": object,
    "str": str,
    "long": int,
    "unicode": str,
    "bool8": np.bool_,
    "float_": np.float64,
    "complex_": np.complex128,
    "infty": np.inf,
    "Inf": np.inf,
    "Infinity": np.inf,
    "NaN": np.nan,
    "NAN": np.nan,
    "product": np.prod,
    "cumproduct": np.cumprod,
    "sometrue": np.any,
    "alltrue": np.all,
    "row_stack": np.vstack,
    "in1d": np.isin,
    "trapz": getattr(np, "trapezoid", None),
}
# Removed name of jax -> the name in jax.tree_util.
JAX = {
    "tree_map": "tree_map",
    "tree_multimap": "tree_map",
    "tree_leaves": "tree_leaves",
    "tree_flatten": "tree_flatten",
    "tree_unflatten": "tree_unflatten",
    "tree_structure": "tree_structure",
    "tree_transpose": "tree_transpose",
    "tree_util.tree_multimap": "tree_map",
}


@contextmanager
def applied(options: Options) -> Iterator[None]:
    """Inside, the changes that the options name are made."""
    with ExitStack() as stack:
        stack.enter_context(_attributes({(torch, "load"): _loader(torch.load, options)}))
        if options.cuda_is_cpu:
            stack.enter_context(_attributes(_cuda_calls()))
            stack.enter_context(_OnTheCpu())
        if options.old_python:
            names = {name: getattr(abc, name) for name in abc.__all__}
            stack.enter_context(_attributes(_missing(collections, names)))
        if options.old_numpy:
            stack.enter_context(_attributes(_missing(np, NUMPY)))
        if options.old_jax:
            stack.enter_context(_attributes(_old_jax()))
        yield


def in_worker() -> None:
    """Make the changes in a process that a script has started, for good; once is enough."""
    if getattr(torch.load, "of_the_shim", False):
        return
    changes = applied(current())
    changes.__enter__()
    # A context manager that nobody holds would be left at once.
    _kept.append(changes)


_kept: list[Any] = []


@contextmanager
def _attributes(values: dict[tuple[Any, str], Any]) -> Iterator[None]:
    """Inside, (owner, name) has another value."""
    nothing = object()
    before = {key: vars(key[0]).get(key[1], nothing) for key in values}
    for (owner, name), value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in before.items():
            if value is nothing:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _missing(owner: Any, names: dict[str, Any]) -> dict[tuple[Any, str], Any]:
    """What of `names` the module does not have."""
    there = vars(owner)
    return {(owner, n): v for n, v in names.items() if n not in there and v is not None}


def _old_jax() -> dict[tuple[Any, str], Any]:
    """JAX's removed tree functions and names, where JAX is installed."""
    if importlib.util.find_spec("jax") is None:
        return {}
    jax = importlib.import_module("jax")
    tree = importlib.import_module("jax.tree_util")
    found: dict[tuple[Any, str], Any] = {}
    for old, new in JAX.items():
        owner = tree if old.startswith("tree_util.") else jax
        name = old.removeprefix("tree_util.")
        # JAX answers a removed name by an error of its own, in a function of the module.
        if name not in vars(owner):
            found[owner, name] = getattr(tree, new)
    if "KeyArray" not in vars(jax.random):
        found[jax.random, "KeyArray"] = jax.Array
    return found


def _loader(torch_load: Callable, options: Options) -> Callable:
    """`torch.load` that knows the script's own `Scalar`, which CQL's checkpoints hold.

    Since 2.6 torch refuses classes in a checkpoint; this one the script has defined itself.
    """

    def load(*args: Any, **keywords: Any) -> Any:
        scalar = getattr(sys.modules["__main__"], "Scalar", None)
        if options.cuda_is_cpu:
            args = args[:1]
            keywords["map_location"] = "cpu"
        with torch.serialization.safe_globals([] if scalar is None else [scalar]):
            return torch_load(*args, **keywords)

    setattr(load, "of_the_shim", True)  # noqa: B010  (mypy knows no attribute of a function)
    return load


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


class _OnTheCpu(TorchFunctionMode):
    """Every torch call that names a CUDA device gets the CPU instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """The call, its device changed."""
        if func is torch.device:
            # Its name stays: the script may ask for it, and print it.
            return func(*args, **(kwargs or {}))
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        args = tuple("cpu" if _is_cuda(a) else a for a in args)
        changed = {k: "cpu" if _is_cuda(v) else v for k, v in (kwargs or {}).items()}
        if changed.get("pin_memory"):
            changed["pin_memory"] = False
        return func(*args, **changed)


def _cuda_calls() -> dict[tuple[Any, str], Any]:
    """Functions of `torch.cuda` that end a program without CUDA do nothing."""

    def nothing() -> Callable[..., None]:
        # A function for each name: torch's compiler wants no function under two names.
        return lambda *args, **keywords: None

    def module_to_cpu(module: torch.nn.Module, device: Any = None) -> torch.nn.Module:
        return module

    calls: dict[tuple[Any, str], Any] = {
        (torch.cuda, name): nothing() for name in ("set_device", "synchronize", "init")
    }
    calls[torch.cuda, "current_device"] = lambda: 0
    calls[torch.cuda, "get_device_name"] = lambda device=None: "CPU (cuda-is-cpu)"
    calls[torch.nn.Module, "cuda"] = module_to_cpu
    calls[torch.cuda, "FloatTensor"] = torch.FloatTensor
    calls[torch.cuda, "LongTensor"] = torch.LongTensor
    return calls
