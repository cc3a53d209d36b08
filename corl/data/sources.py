"""D4RL task name or file -> validated q-learning arrays and the record of their origin.

`resolve` takes, in this order, and says which it took: an explicit file or Minari id;
the file in D4RL's own folder; a download from D4RL's server; data collected by
ourselves (`collect.py`). Only bytes with D4RL's checksum are called D4RL's.

    python -m corl.data.card hopper-medium-v2 --plot returns.png
    python -m corl.data.card --all
    python -m corl.data.card hopper-medium-v2 --export d4rl hopper.hdf5
    python -m corl.data.card --report results/datasets.md

The first prints the card of a dataset: its source, sizes and returns beside D4RL's
published ones. The second says for every task where its data would come from, the last
makes every stand-in and compares it with what D4RL published.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from corl import files, tasks
from corl.data import download, minari, published, schema
from corl.standin import collect, policies

SOURCES = ("auto", "file", "d4rl_dir", "d4rl", "minari", "self-collected")

_unreachable: dict[str, str] = {}  # server -> why; it is asked once per process


@dataclass
class Dataset:
    """Data of one task, ready for a replay buffer, and what is known of its origin."""

    task: str  # D4RL task name
    arrays: dict[str, np.ndarray]  # result of `qlearning_dataset`
    # source, path, sha256, rows, rows_raw, label, message, versions; recognised: D4RL's
    # own bytes for this task; collected: the settings of a stand-in
    provenance: dict[str, Any]
    statistics: dict[str, Any]  # of the raw data, see `statistics`
    # (E,) raw returns of the complete episodes
    returns: np.ndarray = field(default_factory=lambda: np.zeros(0))


def resolve(
    task: str,
    source: str = "auto",
    path: Path | str | None = None,
    cache_dir: Path | str | None = None,
    rows: int | None = None,
) -> Dataset:
    """Find a task's data, check it, make q-learning arrays of it; prints what it took.

    Args:
        task: D4RL task name.
        source: one of SOURCES. `auto` takes the first that answers: `path`; D4RL's
            folder (`D4RL_DATASET_DIR` or ~/.d4rl/datasets); a download from D4RL's
            server into it; the self-collected stand-in.
        path: HDF5 file, or `minari:` and a Minari id.
        cache_dir: where stand-ins are kept; default `CORL_DARE_CACHE` or
            ~/.cache/corl_dare.
        rows: size of a stand-in that has to be collected (default 200 000, and D4RL's
            own size for medium-replay); other sources ignore it.

    Raises:
        ValueError: unknown task or source, no source has the data, or bad data.
        RuntimeError: a forced source does not have the data, a package is missing, or
            the stand-in cannot be written.
    """
    raw, provenance = find(task, source, path, cache_dir, rows)
    facts, returns = schema.statistics(raw, task), schema.episode_returns(raw, task)
    true_ends = provenance["source"] == "minari"
    if not true_ends:
        raw.pop("next_observations", None)  # D4RL's rules do not read it
    try:
        arrays = schema.qlearning_dataset(raw, true_ends, tasks.task(task).horizon)
    except ValueError as error:
        raise ValueError(f"{provenance['path']}: {error}") from error
    counts = {"rows": len(arrays["rewards"]), "rows_raw": len(raw["rewards"])}
    message = (
        f"dataset {task}: {provenance['label']}, source {provenance['source']}, "
        f"{provenance['path']}, {counts['rows']} transitions"
    )
    if "warning" in provenance:
        message += f"; WARNING: {provenance['warning']}"
    print(message)
    versions = {"h5py_version": h5py.__version__, "numpy_version": np.__version__}
    provenance = {**provenance, **counts, **versions, "message": message}
    return Dataset(task, arrays, provenance, facts, returns)


def find(
    task: str,
    source: str = "auto",
    path: Path | str | None = None,
    cache_dir: Path | str | None = None,
    rows: int | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The raw rows of a task, as of `validate`, and where they come from; see `resolve`."""
    tasks.task(task)
    if source not in SOURCES:
        raise ValueError(f"dataset_source {source!r} is not one of {', '.join(SOURCES)}")
    if path is not None and source not in ("auto", "file", "minari"):
        raise ValueError(
            f"dataset_path is given but dataset_source {source!r} does not read it; use "
            "'file', 'minari' or 'auto'"
        )
    if path is None and source in ("file", "minari"):
        raise ValueError(f"dataset_source {source!r} needs dataset_path")
    if source == "minari" or str(path).startswith("minari:"):
        return _from_minari(task, source, str(path).removeprefix("minari:"))
    if path is not None:
        return _from_file(task, "file", Path(path).expanduser())
    if source == "self-collected":
        return _from_file(task, source, _stand_in(task, cache_dir, rows))

    reasons = []
    for name, get in (("d4rl_dir", _in_d4rl_dir), ("d4rl", _download)):
        if source in ("auto", name):
            try:
                return _from_file(task, name, get(task))
            except _NotFound as error:
                reasons.append(f"{name}: {error}")
    if source != "auto":
        raise RuntimeError(f"no dataset for {task}; {reasons[0]}")
    try:
        found = _stand_in(task, cache_dir, rows)
    except policies.NotCollectable as error:
        raise ValueError(
            f"no dataset for {task}; {'; '.join(reasons)}; self-collected: {error}. Put "
            "D4RL's file there or pass dataset_path"
        ) from error
    print(f"dataset {task}: {'; '.join(reasons)}")
    return _from_file(task, "self-collected", found)


class _NotFound(Exception):
    """A source does not have the data; the next one may."""


def _d4rl_dir() -> Path:
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def _in_d4rl_dir(task: str) -> Path:
    try:
        path = _d4rl_dir() / published.file_name(task)
    except ValueError as error:
        raise _NotFound(str(error)) from error
    if not path.is_file():
        raise _NotFound(f"there is no {path}")
    return path


def _download(task: str) -> Path:
    """Download into D4RL's folder, where d4rl looks, too; D4RL's checksum or nothing."""
    try:
        address = published.url(task)
    except ValueError as error:
        raise _NotFound(str(error)) from error
    target, server = _d4rl_dir() / published.file_name(task), published.server()
    if target.is_file():
        return target
    if not server:
        raise _NotFound("downloads are switched off (CORL_DARE_D4RL_URL is empty)")
    if server in _unreachable:
        raise _NotFound(_unreachable[server])
    try:
        return download.download(address, target, *published.known_files().get(task, ()))
    except download.Unreachable as error:
        _unreachable[server] = str(error)
        raise _NotFound(str(error)) from error
    except download.DownloadError as error:
        raise _NotFound(str(error)) from error


def cache_folder(cache_dir: Path | str | None = None) -> Path:
    """Where prepared things are kept: the argument, CORL_DARE_CACHE or ~/.cache/corl_dare."""
    cache = cache_dir or os.environ.get("CORL_DARE_CACHE") or "~/.cache/corl_dare"
    return Path(cache).expanduser()


def _stand_in(task: str, cache_dir: Path | str | None, rows: int | None) -> Path:
    rows = policies.default_rows(task) if rows is None else rows
    return collect.collect(task, rows, _stand_in_file(task, cache_dir, rows))


def _stand_in_file(task: str, cache_dir: Path | str | None, rows: int) -> Path:
    # A new release may ship other policies: their files must not be taken for these.
    digests = "".join(f"-{digest[:8]}" for digest in policies.fingerprint(task).values())
    return cache_folder(cache_dir) / "datasets" / f"{task}-{rows}{digests}.hdf5"


def _from_file(
    task: str, source: str, path: Path
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    raw = schema.load_hdf5(path, task)
    digest = files.sha256(path)
    with h5py.File(path) as file:
        made = files.attributes(file)
    known = {known: name for name, (_, known) in published.known_files().items()}.get(
        digest
    )
    provenance = {
        "source": source,
        "path": str(path),
        "sha256": digest,
        "recognised": known == task,
        "label": _label(task, source, path, known, made),
    }
    if made.get("source") == "self-collected":
        provenance["collected"] = made
    return raw, provenance


def _label(task: str, source: str, path: Path, known: str | None, made: dict) -> str:
    if known is not None:
        label = f"D4RL's own file of {known} (checksum matches)"
        return label if known == task else f"{label}, NOT of {task}"
    if made.get("source") == "self-collected":
        label = "self-collected stand-in (not D4RL data)"
        if "mix" in made:
            label += f", {made['share']:.0%} of its rows by the {made['mix']} policy"
        if made.get("task") != task:
            label += f", made for {made.get('task')}"
        return label
    label = "unknown file (not D4RL's checksum)"
    size = published.known_files().get(task, (None,))[0]
    if "exported_from" in made:
        label += f", exported from {made['exported_from']}"
    elif source != "file" and size and path.stat().st_size < size:
        label += f", shorter than D4RL's {size} bytes"
    return label


def _from_minari(
    task: str, source: str, name: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if source not in ("auto", "minari"):
        raise ValueError(
            f"dataset_path is a Minari id, but dataset_source is {source!r}"
        )
    raw = schema.validate(minari.from_minari(name), task, f"minari:{name}")
    return raw, {
        "source": "minari",
        "path": f"minari:{name}",
        "sha256": schema.hash_arrays(raw),
        "recognised": False,
        "label": f"Minari dataset {name} (not D4RL data)",
        "warning": minari.caveat(name),
        "minari_version": minari.import_minari(name).__version__,
    }
