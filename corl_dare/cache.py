"""Behavior models that are trained once: weights kept under a hash of data and settings.

`fit_cached` loads what an earlier call with the same data and settings trained, or trains it and
keeps it. An interrupted training goes on from its last state. Nothing is unpickled: weights are
safetensors, unfinished trainings are read with `torch.load(weights_only=True)` after a checksum.
"""

import glob
import hashlib
import io
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from corl_dare.behavior import BehaviorModel, make_behavior_model
from corl_dare.behavior_fit import UnfitStateError, fit
from corl_dare.streams import put_back


class CacheError(OSError):
    """The cache cannot be written; one line says which file, why, and what helps."""

    def __init__(self, path: Path, error: OSError):
        reason = error.strerror or " ".join(str(error).split())
        super().__init__(
            f"cannot write {path} ({reason}); free some space there, mend its rights, or set "
            "CORL_DARE_CACHE to another folder"
        )


# Raise it when a file of old weights would mean something else.
FORMAT = 1


def fit_cached(
    kind: str,
    states: torch.Tensor | np.ndarray,
    actions: torch.Tensor | np.ndarray,
    *,
    updates: int,
    batch_size: int,
    lr: float,
    seed: int,
    dataset_hash: str,
    cache_dir: str | os.PathLike,
    device: torch.device | str = "cpu",
    options: dict | None = None,
    progress: bool = True,
    bar: Callable[..., Any] = tqdm,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[BehaviorModel, Path, bool]:
    """The trained, frozen model of these settings, from the cache or trained into it.

    The file name holds a hash of the kind, options, training settings, seed, dimensions,
    `dataset_hash` and format. Weights and noise come from `seed`. An interrupted training
    leaves `*.DEVICE.unfinished`, written once a minute and before a stop: the next call
    goes on from it, to the bits of an unbroken training. On another kind of device it goes on
    with a new random stream and says so. A damaged file is reported and not used.

    Returns:
        The model on `device` (eval, no gradients), its file, and whether it was loaded.

    Raises:
        ValueError: see `make_behavior_model` and `fit`; an empty dataset hash.
        RuntimeError: the cached file is damaged or belongs to other settings, or an unfinished
            one holds no state of this training.
        CacheError: the cache cannot be written, which is tried before the training.
        KeyboardInterrupt: see `fit`.
    """
    _check_data(states, actions, dataset_hash)
    state_dim, action_dim = states.shape[1], actions.shape[1]
    model = make_behavior_model(
        kind, state_dim, action_dim, seed=seed, **(options or {})
    )
    settings: dict[str, Any] = {"updates": updates, "batch_size": batch_size, "lr": lr}
    path, text = cached_file(
        model,
        len(states),
        **settings,
        seed=seed,
        dataset_hash=dataset_hash,
        cache_dir=cache_dir,
    )
    loaded = path.exists()
    if loaded:
        _load(model, path, text)
    else:
        check_writable(path)
        # A name per kind of device, since the states of generators differ between them.
        unfinished = path.with_suffix(f".{torch.device(device).type}.unfinished")
        generator = torch.Generator(device).manual_seed(seed)
        with _naming_unfinished(path):
            fit(
                model,
                states,
                actions,
                **settings,
                generator=generator,
                device=device,
                progress=progress,
                bar=bar,
                should_stop=should_stop,
                save=lambda state: _save_unfinished(state, unfinished, text),
                resume=_furthest_unfinished(path, unfinished, text, generator),
            )
        _save(model, path, text)
        for file in _unfinished_files(path):
            file.unlink(missing_ok=True)
    return model.to(device).eval().requires_grad_(False), path, loaded


@contextmanager
def _naming_unfinished(path: Path) -> Iterator[None]:
    """Inside, a state that cannot be gone on from is an error that names its file."""
    try:
        yield
    except UnfitStateError as error:
        names = " or ".join(map(str, _unfinished_files(path)))
        raise RuntimeError(
            f"{names} holds no state of this training ({error}); delete it to train the model "
            "from the start"
        ) from None


def _check_data(states: Any, actions: Any, dataset_hash: str) -> None:
    if not dataset_hash:
        raise ValueError("dataset_hash is empty; the cache needs it to know the data")
    if np.ndim(states) != 2 or np.ndim(actions) != 2:
        raise ValueError(
            f"states {np.shape(states)} and actions {np.shape(actions)} must be "
            "(N, S) and (N, A)"
        )


def cached_file(
    model: BehaviorModel,
    rows: int,
    *,
    updates: int,
    batch_size: int,
    lr: float,
    seed: int,
    dataset_hash: str,
    cache_dir: str | os.PathLike,
) -> tuple[Path, str]:
    """Where the trained weights of these settings are kept, and the settings as text."""
    settings = {
        "format": FORMAT,
        "kind": model.kind,
        "options": model.options,
        "state_dim": model.state_dim,
        "action_dim": model.action_dim,
        "rows": rows,
        "dataset_hash": dataset_hash,
        "updates": updates,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Path(cache_dir) / f"behavior-{model.kind}-{key}.safetensors", text


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _save(model: BehaviorModel, path: Path, settings: str) -> None:
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    _write(path, save(tensors, {"settings": settings, "sha256": _checksum(tensors)}))


def _write(path: Path, data: bytes) -> None:
    """Atomically: a crash at any moment leaves the old file or the new one, whole."""
    # The plugin's own writer: it must not need the host's.
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A new file, so that nothing is written through a link of that name.
        with open(part, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CacheError(path, error) from error
        raise


def check_writable(path: Path) -> None:
    """Make and remove a file beside a file of the cache.

    Raises:
        CacheError: no room, or no right to write.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            # A full disk often has room for a name, but not for a byte.
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise CacheError(path, error) from error


def _load(model: BehaviorModel, path: Path, settings: str) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise RuntimeError(
            f"{path} is damaged ({error}); delete it to train the model again"
        ) from error
    if metadata.get("settings") != settings:
        raise RuntimeError(
            f"{path} belongs to other settings ({metadata.get('settings')}, wanted "
            f"{settings}); delete it to train the model again"
        )
    if metadata.get("sha256") != _checksum(tensors):
        raise RuntimeError(
            f"{path} is damaged (checksum differs); delete it to train the model again"
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RuntimeError(
                f"{path} holds weights that are not finite ({name}); delete it to train the "
                "model again"
            )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:200]
        raise RuntimeError(
            f"{path} holds other weights than the model's ({text}); delete it to train the "
            "model again"
        ) from None


def _save_unfinished(state: dict[str, Any], path: Path, settings: str) -> None:
    buffer = io.BytesIO()
    torch.save({"settings": settings, **state}, buffer)
    data = buffer.getvalue()
    # torch.load does not notice flipped bits in tensors, so the checksum comes first.
    _write(path, hashlib.sha256(data).digest() + data)


def _unfinished_files(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.*.unfinished"))


def _furthest_unfinished(
    path: Path, own: Path, settings: str, generator: torch.Generator
) -> dict[str, Any] | None:
    """Of the unfinished trainings of all devices the one with most updates; `own` wins a tie.

    If it is of another kind of device, it goes on with a new stream of `generator`.
    """
    names = sorted(_unfinished_files(path), key=lambda file: file != own)
    states, damaged = [], []
    for name in names:
        state, why = _load_unfinished(name, settings)
        if state is None:
            damaged.append(f"{name} {why}")
        else:
            states.append(state)
    # Of equals, max takes the first.
    best = max(states, key=lambda state: state["updates"], default=None)
    if damaged:
        then = "from the start" if best is None else f"from update {best['updates']}"
        print(f"{'; '.join(damaged)}; the behavior model is trained {then}")
    if best is None:
        return None
    try:
        goes_on = put_back(generator, best["generator"], best["updates"])
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnfitStateError(" ".join(str(error).split())) from None
    if not goes_on:
        best["generator"] = generator.get_state()
        print(
            f"the behavior model goes on at update {best['updates']}, on another kind of "
            "device; its random stream is seeded anew, so its numbers differ"
        )
    return best


def _load_unfinished(path: Path, settings: str) -> tuple[dict[str, Any] | None, str]:
    """The state in a file, or None and what is wrong with the file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        # Another process has just finished this very model.
        return None, "has gone"
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    size = hashlib.sha256().digest_size
    digest, data = content[:size], content[size:]
    if hashlib.sha256(data).digest() != digest:
        return None, "is damaged"
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # A checksum can be right over anything, and torch fails on it in many ways.
    except Exception:
        return None, "is damaged"
    if not isinstance(state, dict) or type(state.get("updates")) is not int:
        return None, "is damaged"
    if not isinstance(state.get("generator"), torch.Tensor):
        return None, "is damaged"
    if state.get("settings") != settings:
        return None, "belongs to other settings"
    return state, ""
