"""Checkpoints: a run's own `checkpoint.pt`, and CORL's `checkpoint_N.pt` both ways.

A run's file holds tensors, numbers, strings, lists and dicts and is read with
`torch.load(weights_only=True)`, so that nothing in it is ever executed. CORL's files of CQL and
Cal-QL hold pickled modules `Scalar`; only their data is read.

    python -m corl.checkpoints export runs/NAME --to corl

writes a run's weights as CORL's `checkpoint_N.pt`.
"""

import random
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corl import arguments, files, finite, machine

FORMAT = 1  # version of the layout of checkpoint.pt


def pack(value: Any) -> Any:
    """Nested lists and dicts with numpy arrays as tensors and numpy numbers as Python's.

    A checkpoint may hold the result; `unpack` turns it back.
    """
    if isinstance(value, np.ndarray):
        return {"__array__": torch.from_numpy(np.array(value, order="C"))}
    if isinstance(value, np.generic):
        return value.item()
    if (
        isinstance(value, torch.Tensor)
        and value.untyped_storage().nbytes() > value.nbytes
    ):
        # A view would bring everything along that lies beside it.
        return value.clone()
    if isinstance(value, dict):
        return {k: pack(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(pack(v) for v in value)
    return value


def unpack(value: Any) -> Any:
    """What `pack` was given: tensors that stand for numpy arrays are arrays again."""
    if isinstance(value, dict):
        if set(value) == {"__array__"}:
            return value["__array__"].numpy().copy()
        return {k: unpack(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(unpack(v) for v in value)
    return value


def rng_state() -> dict[str, Any]:
    """The global random streams of Python, numpy (legacy) and torch, CPU and CUDA."""
    state = {
        "python": pack(random.getstate()),
        "numpy": pack(np.random.get_state()),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(
    state: dict[str, Any], device: str = "cpu", before: str | None = None, step: int = 0
) -> bool:
    """Put the streams of `rng_state` back; returns whether that of the device goes on.

    A GPU that has no saved stream begins one whose seed follows from the run's seed and `step`.

    Args:
        state: of `rng_state`, maybe of a machine with more GPUs or with fewer.
        device: where the run goes on.
        before: where it ran, None where the checkpoint does not say.
        step: how far the run is.
    """
    random.setstate(unpack(state["python"]))
    np.random.set_state(unpack(state["numpy"]))
    torch.set_rng_state(state["torch"])
    saved = state.get("cuda", [])
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number, stream in enumerate(saved[:count]):
        torch.cuda.set_rng_state(stream, number)
    kind, number = _kind_and_number(device)
    old_kind, old_number = _kind_and_number(before or device)
    if kind != "cuda":
        return kind == old_kind
    if old_kind == "cuda" and old_number < len(saved):
        # The same stream, though the run's GPU may have another number here.
        torch.cuda.set_rng_state(saved[old_number], number)
        return True
    with torch.cuda.device(number):
        torch.cuda.manual_seed(fresh_seed(torch.initial_seed(), step))
    return False


def fresh_seed(seed: int, step: int) -> int:
    """The seed of a random stream that begins at a step of a training of this seed."""
    mixed = np.random.SeedSequence([seed, step])
    return int(mixed.generate_state(1, np.uint64)[0])


def _kind_and_number(device: str) -> tuple[str, int]:
    kind, _, number = device.partition(":")
    return kind, int(number or 0)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; a crash at any moment leaves the old file or the new one, whole.

    Raises:
        CannotWrite: as of `files.replacing`.
    """
    with files.replacing(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path, algorithm: str) -> dict[str, Any]:
    """Read a checkpoint of `save_checkpoint` on the CPU.

    Raises:
        ValueError: the file is missing, truncated or no checkpoint, or it is of another algorithm
            or format.
    """
    state = read(path)
    if not isinstance(state, dict) or "algorithm" not in state:
        raise ValueError(f"{path} is not a checkpoint of a corl-dare run")
    if state["algorithm"] != algorithm:
        raise ValueError(
            f"{path} belongs to {state['algorithm']}, not to {algorithm}; run that "
            "algorithm's file"
        )
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {state.get('format')}, this version reads "
            f"{FORMAT}"
        )
    return state


class _PickledScalar:
    """Takes the place of CORL's module `Scalar` in a pickle: its data, none of its code.

    CQL's checkpoints hold two such modules, and a pickle names the class as `__main__.Scalar`.
    """

    def __init__(self, state: dict[str, Any] | None = None):
        self.state = state

    def __getstate__(self) -> dict[str, Any] | None:
        return self.state

    def __setstate__(self, state: dict[str, Any] | None) -> None:
        self.state = state


_PickledScalar.__module__, _PickledScalar.__qualname__ = "__main__", "Scalar"
# torch before 2.7 looks for this name.
_PickledScalar.__name__ = "Scalar"


def load_corl_checkpoint(path: Path | str, required: Iterable[str] = ()) -> dict:
    """Weights and optimizers of a CORL `checkpoint_N.pt`, or of a run's `checkpoint.pt`.

    The `Scalar` modules in checkpoints of CQL and Cal-QL come as `{"constant": tensor}`.
    Nothing in the file is executed; any other class in it is refused.

    Args:
        path: the file, or a run folder, whose `checkpoint.pt` is meant.
        required: keys that the algorithm reads.

    Raises:
        ValueError: the file is missing or truncated, holds classes other than `Scalar`, or is of
            another algorithm.
    """
    with torch.serialization.safe_globals([_PickledScalar]):
        state = read(_weights_file(Path(path)))
    if isinstance(state, dict) and "parts" in state:
        parts = state["parts"]
        state = parts.get("trainer") if isinstance(parts, dict) else None
    if isinstance(state, dict):
        # A random stream is no weight and may belong to another device; a new run has its own.
        state = {k: v for k, v in state.items() if k != "dare_generator"}
        state = {name: _scalar_state(v, f"{path}: {name}") for name, v in state.items()}
    missing = [k for k in required if not isinstance(state, dict) or k not in state]
    if missing:
        raise ValueError(
            f"{path} has no {missing[0]!r}: it is not a checkpoint of this algorithm"
        )
    return state


def _weights_file(path: Path) -> Path:
    """The file that `load_model` means: a run folder stands for its checkpoint."""
    if not path.is_dir():
        return path
    if not (path / "checkpoint.pt").is_file():
        raise ValueError(
            f"{path} is a folder without checkpoint.pt: name a run folder that has one, or a "
            "file such as checkpoint_999999.pt"
        )
    return path / "checkpoint.pt"


def _scalar_state(value: Any, name: str) -> Any:
    """The state_dict of a pickled `Scalar`; other values as they are."""
    if not isinstance(value, _PickledScalar):
        return value
    try:
        constant = (value.state or {})["_parameters"]["constant"].detach()
        return {"constant": constant.reshape(())}
    except (TypeError, KeyError, AttributeError, RuntimeError):
        raise ValueError(f"{name} is no module with one number 'constant'") from None


def save_corl_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a trainer's state in one step, in the form that CORL's `load_state_dict` reads.

    CQL and Cal-QL expect module objects where our state has `{"constant": tensor}`. The file
    then names the class `__main__.Scalar`, which CORL's scripts define.
    """

    def as_corl_has_it(value: Any) -> Any:
        if not isinstance(value, dict) or set(value) != {"constant"}:
            return value
        module = torch.nn.Module()
        module.constant = torch.nn.Parameter(value["constant"].detach().cpu())
        return _PickledScalar(vars(module))

    # Pickle writes a class only under a name where it finds that very class.
    main_module: Any = sys.modules["__main__"]
    absent = object()
    before = getattr(main_module, "Scalar", absent)
    main_module.Scalar = _PickledScalar
    try:
        save_checkpoint(
            path, {name: as_corl_has_it(value) for name, value in state.items()}
        )
    finally:
        if before is absent:
            del main_module.Scalar
        else:
            main_module.Scalar = before


def export_corl(run: Path | str, out: Path | str | None = None) -> Path:
    """Write the last checkpoint of a run folder as CORL's `checkpoint_N.pt`.

    Args:
        run: run folder.
        out: file to write. Default: `checkpoint_N.pt` in the run folder, where N counts iterations
            from 0, as CORL does.

    Returns:
        The file.

    Raises:
        ValueError: no readable checkpoint in the folder, one whose weights are not finite, or a
            place that cannot be written.
    """
    path = Path(run) / "checkpoint.pt"
    state = read(path)
    parts = state.get("parts") if isinstance(state, dict) else None
    if not isinstance(parts, dict) or not isinstance(parts.get("trainer"), dict):
        raise ValueError(f"{path} is not a checkpoint of a corl-dare run")
    if not isinstance(state.get("step"), int):
        raise ValueError(f"{path} is damaged: it has no number of steps")
    if bad := finite.first_bad(finite.named_tensors(state["parts"]["trainer"], "")):
        raise ValueError(f"{path} is of a run that diverged: its {bad} is not finite")
    out = Path(out or Path(run) / f"checkpoint_{state['step'] - 1}.pt")
    if not out.parent.is_dir():
        raise ValueError(f"cannot write {out}: {out.parent} is not a folder")
    save_corl_checkpoint(out, parts["trainer"])
    return out


def read(path: Path) -> Any:
    """The contents of a torch file, on the CPU, without executing anything in it.

    The file is an archive with a checksum of each of its records, which torch itself does not
    compare.

    Raises:
        ValueError: the file is missing or damaged, or holds Python objects.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile("a checksum differs")
        with warnings.catch_warnings():
            # torch warns of foreign pickles before it refuses them.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = "Unsupported" in str(error) or "weights_only" in str(error)
        # "Unsupported operand" comes from bytes that are no pickle at all.
        if refused and "Unsupported operand" not in str(error):
            found = re.search(r"GLOBAL (\S+)", str(error))
            name = f" ({found.group(1)})" if found else ""
            why = f"it holds Python objects{name}, which are never unpickled"
        else:
            why = f"it is damaged or not a checkpoint ({type(error).__name__})"
        raise ValueError(
            f"cannot read {path}: {why}; put a good copy in its place or take another file"
        ) from None


def command_line(argv: Sequence[str] | None = None) -> None:
    """`python -m corl.checkpoints export RUN --to corl [--out FILE]`."""
    parser = arguments.Parser(prog="python -m corl.checkpoints")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a run's weights for other code")
    export.add_argument("run", type=arguments.path, help="run folder")
    export.add_argument("--to", choices=("corl",), required=True)
    export.add_argument(
        "--out",
        type=arguments.path,
        help="file to write; default: checkpoint_N.pt in RUN",
    )
    args = parser.parse_args(argv)
    with arguments.errors_in_one_line():
        print(machine.tidy_path(export_corl(args.run, args.out)))


if __name__ == "__main__":
    command_line()
