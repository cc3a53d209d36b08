"""Does a checkpoint fit a run? What is missing, of another kind or of another size is named."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from corl.checkpoints import pack, unpack


def check_layout(state: dict[str, Any], path: Path) -> None:
    """The entries of a run's checkpoint are there and of the right kinds.

    Raises:
        ValueError: one is not; the message names the file and the entry.
    """
    kinds: dict[str, Any] = {"step": int, "run": dict, "rng": dict, "parts": dict}
    # Checkpoints of before version 0.2 have neither.
    later: dict[str, Any] = {"config": dict, "tables": dict}
    for name, kind in {**kinds, **later}.items():
        right = isinstance(state.get(name), kind) and not isinstance(state[name], bool)
        if not right and (name in kinds or name in state):
            raise ValueError(_damaged(path, name))
    if state["step"] < 0:
        raise ValueError(_damaged(path, "step"))
    for name, known in state.get("tables", {}).items():
        if not isinstance(known, dict) or set(known) != {"bytes", "sha256"}:
            raise ValueError(_damaged(path, f"tables.{name}"))
    counters = {
        "wall_seconds": 0.0,
        "update_seconds": 0.0,
        "cpu_seconds": 0.0,
        "updates": 0,
        "pretrained": 0,
        "switched": False,
        "stacked": 0,
    }
    with fitting(path, "run"):
        check_fit(state["run"], counters)
        for _, phase, score in state["run"]["scores"]:
            check_fit([phase, score], ["", 0.0])


def _damaged(path: Path, name: str) -> str:
    return (
        f"{path} is damaged: its entry {name!r} is missing or no such thing; put a good copy in "
        "its place or start a new run"
    )


@contextmanager
def fitting(path: Path | str, name: str) -> Iterator[None]:
    """Inside, an error of loading becomes a ValueError of one line that names file and part."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        # torch says in its first line that something is wrong and in the next ones what.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = lines[1] if len(lines) > 1 else " ".join(lines)
        if isinstance(error, KeyError):
            why = f"it has no {why}"
        raise ValueError(
            f"{path} does not fit: {name}: {why[:300]}; it is of other settings, another robot or "
            "another version, or damaged"
        ) from None


def load_part(part: Any, saved: Any, path: Path | str, name: str) -> None:
    """Put what a checkpoint holds of a part back into it; `name` is the part's.

    Raises:
        ValueError: it is missing, or of another kind or size.
    """
    with fitting(path, name):
        if saved is None:
            raise ValueError("this part is missing")
        check_fit(saved, pack(part.state_dict()))
        part.load_state_dict(unpack(saved))
        _check_moments(part)


def load_weights(part: Any, state: dict[str, Any], path: Path | str) -> None:
    """Let a trainer start from the networks and optimizers of a checkpoint of `path`.

    Raises:
        ValueError: they are of other sizes.
    """
    with fitting(path, "weights"):
        check_fit(state, pack(part.state_dict()))
        part.load_weights(state)
        _check_moments(part)


def check_fit(saved: Any, wanted: Any, name: str = "") -> None:
    """Packed values must be of the kinds and sizes of others, where both have an entry.

    Arrays of no rows may have any number of them, and what is None may be anything. Integers
    and bytes may have any size: a random stream of another device has another one.

    Raises:
        ValueError: names the entry, what it is and what it should be.
    """
    if isinstance(wanted, Mapping) and isinstance(saved, Mapping):
        for key in (key for key in wanted if key in saved):
            check_fit(saved[key], wanted[key], f"{name}.{key}" if name else str(key))
    elif isinstance(wanted, list | tuple) and isinstance(saved, list | tuple):
        for i, (ours, theirs) in enumerate(zip(saved, wanted, strict=False)):
            check_fit(ours, theirs, f"{name}[{i}]")
    elif wanted is not None and saved is not None:
        ours, theirs = _form(saved), _form(wanted)
        if ours[0] != theirs[0]:
            raise ValueError(f"{name} is a {ours[0]}, not a {theirs[0]}")
        if 0 in theirs[1][:1]:
            ours, theirs = (ours[0], ours[1][1:]), (theirs[0], theirs[1][1:])
        if ours[1] != theirs[1]:
            raise ValueError(f"{name} has shape {ours[1]}, here it is {theirs[1]}")


def _form(value: Any) -> tuple[str, tuple[int, ...]]:
    """The kind of a value, and the shape where it matters."""
    if isinstance(value, torch.Tensor) and value.dim():
        floating = value.is_floating_point()
        kind = "array of floats" if floating else "array of integers"
        return kind, tuple(value.shape) if floating else ()
    if isinstance(value, torch.Tensor | int | float):
        return "number", ()
    return type(value).__name__, ()


def _check_moments(part: Any) -> None:
    """torch takes any moments into an optimizer and fails in the first update."""
    for name, optimizer in vars(part).items():
        if not isinstance(optimizer, torch.optim.Optimizer):
            continue
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                sized = isinstance(value, torch.Tensor) and value.dim()
                if sized and value.shape != parameter.shape:
                    raise ValueError(
                        f"{name}.{key} has shape {tuple(value.shape)}, its parameter "
                        f"{tuple(parameter.shape)}"
                    )
