"""Where the data of a task comes from: a name or a file -> checked q-learning arrays.

`resolve` takes, in this order, and says which it took: an explicit file or Minari id; the file in
D4RL's own folder; a download from D4RL's server; data collected by ourselves
(`standin/collect.py`, imported only when rows have to be collected). Only bytes with D4RL's
checksum are called D4RL's.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from corl import tasks
from corl.data import (
    download,
    hdf5,
    layouts,
    minari,
    ogbench,
    published,
    row_order,
    schema,
)
from corl.layers import expand
from corl.standin import policies

SOURCES = ("auto", "file", "d4rl_dir", "d4rl", "minari", "self-collected")

# Server -> why it cannot be reached. A server is asked once in a process.
unreachable: dict[str, str] = {}


@dataclass
class Dataset:
    """Data of one task, ready for a replay buffer, and what is known of its origin."""

    task: tasks.Task
    # Result of `schema.qlearning_dataset`.
    arrays: dict[str, np.ndarray]
    # source, path, sha256, rows, rows_raw, label, message, versions; `recognised`: these are
    # D4RL's own bytes for this task; `collected`: the settings of a stand-in; `order`, `seams`:
    # see `row_order.RowOrder`.
    provenance: dict[str, Any]
    # Result of `schema.statistics` for the raw rows.
    statistics: dict[str, Any]
    # (E,) raw returns and lengths in rows of the complete episodes, all rows counted.
    returns: np.ndarray = field(default_factory=lambda: np.zeros(0))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, int))

    @property
    def shuffled(self) -> bool:
        """Are these rows without an order, so that there are no episodes?"""
        return self.provenance.get("order") == "shuffled"


def resolve(
    task: tasks.Task | str,
    source: str = "auto",
    path: Path | str | Mapping[str, Any] | None = None,
    cache_dir: Path | str | None = None,
    rows: int | None = None,
    next_actions: bool = False,
) -> Dataset:
    """Find a task's data, check it, make q-learning arrays of it; prints what it took.

    Args:
        task: a task or its D4RL name.
        source: one of SOURCES. `auto` takes the first that answers: `path`; D4RL's
            folder (`D4RL_DATASET_DIR` or ~/.d4rl/datasets); a download from D4RL's
            server into it; the self-collected stand-in.
        path: HDF5 file, `.npz` archive, folder of episodes, dict of arrays, or `minari:` and a
            Minari id. A task that is not D4RL's needs it, unless it is named by its Minari dataset
            or is OGBench's.
        cache_dir: where stand-ins are kept; default `CORL_DARE_CACHE` or
            ~/.cache/corl_dare.
        rows: size of a stand-in that has to be collected (default 200 000, and D4RL's
            own size for medium-replay); other sources ignore it.
        next_actions: also give the action after each row. Rows that end by a time-out, after
            which it is not known, are then dropped from every source.

    Raises:
        ValueError: unknown task or source, no source has the data, bad data, or
            `next_actions` of shuffled rows.
        RuntimeError: a forced source does not have the data, a package is missing, or
            the stand-in cannot be written.
    """
    task = tasks.task(task)
    raw, provenance = find(task, source, path, cache_dir, rows)
    order = provenance["order"]
    if provenance["source"] == "ogbench":
        task = replace(task, walks_on=True)
    facts, returns = schema.statistics(raw, task), schema.episode_returns(raw, task)
    lengths = np.diff(schema.episode_bounds(raw, task))
    if order == "shuffled":
        facts = schema.without_episodes(facts)
        returns, lengths = np.zeros(0), np.zeros(0, int)
        if next_actions:
            raise ValueError(
                f"{provenance['path']}: the rows are shuffled, so the action after each row, "
                "which this algorithm needs, is unknown; give a file with rows in order"
            )
    true_ends = provenance["source"] == "minari" or order in ("cut", "shuffled")
    if not task.is_d4rls:
        true_ends = "next_observations" in raw
    true_ends = true_ends and not next_actions
    if not true_ends:
        # D4RL's rules do not read them, and they are a good part of the memory.
        raw.pop("next_observations", None)
    _warn_of_long_episodes(provenance, facts, task)
    try:
        arrays = schema.qlearning_dataset(raw, true_ends, task.horizon, next_actions)
    except ValueError as error:
        raise ValueError(f"{provenance['path']}: {error}") from error
    counts = {"rows": len(arrays["rewards"]), "rows_raw": len(raw["rewards"])}
    message = (
        f"dataset {task.name}: {provenance['label']}, source {provenance['source']}, "
        f"{provenance['path']}, {counts['rows']} transitions"
    )
    if "warning" in provenance:
        message += f"; WARNING: {provenance['warning']}"
    print(message)
    versions = {"h5py_version": h5py.__version__, "numpy_version": np.__version__}
    provenance = {**provenance, **counts, **versions, "message": message}
    return Dataset(task, arrays, provenance, facts, returns, lengths)


def _warn_of_long_episodes(
    provenance: dict[str, Any], facts: dict[str, Any], task: tasks.Task
) -> None:
    """Add to `provenance["warning"]` where episodes are longer than the time limit."""
    if not facts["too_long"]:
        return
    warning = (
        f"{facts['too_long']} episode(s) are longer than the time limit of {task.horizon} "
        "steps, so ends of episodes seem to lack their flags and returns to be of several"
    )
    before = provenance.get("warning")
    provenance["warning"] = f"{before}; {warning}" if before else warning


def find(
    task: tasks.Task | str,
    source: str = "auto",
    path: Path | str | Mapping[str, Any] | None = None,
    cache_dir: Path | str | None = None,
    rows: int | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The raw rows of a task and the record of their origin; arguments as of `resolve`.

    Returns:
        The rows as of `schema.validate`, N of them, and the record of their origin: source, path,
        sha256, recognised, label, and what else is known of that source.

    Raises:
        ValueError, RuntimeError: as of `resolve`.
    """
    task = tasks.task(task)
    if source not in SOURCES:
        raise ValueError(f"dataset_source {source!r} is not one of {', '.join(SOURCES)}")
    if path is not None and source not in ("auto", "file", "minari"):
        raise ValueError(
            f"dataset_path is given but dataset_source {source!r} does not read it; use "
            "'file', 'minari' or 'auto'"
        )
    if path is None and task.name.startswith("minari:"):
        path = task.name
    if path is None and source in ("file", "minari"):
        raise ValueError(f"dataset_source {source!r} needs dataset_path")
    if isinstance(path, Mapping):
        return _from_memory(task, path)
    if ogbench.is_ogbench(task.name) and (
        path is None or ogbench.is_its_file(expand(path))
    ):
        return _from_ogbench(task, None if path is None else expand(path))
    if path is None and not task.is_d4rls:
        raise ValueError(
            f"{task.name} is no task of D4RL, so nobody knows its data; give dataset_path (an HDF5 "
            "or .npz file, a folder of episodes or minari:ID), or collect some with "
            f"`python -m corl.standin.collect {task.name}`"
        )
    if source == "minari" or str(path).startswith("minari:"):
        return _from_minari(task, source, str(path).removeprefix("minari:"))
    if path is not None:
        return _from_file(task, "file", expand(path))
    if source == "self-collected":
        return _from_file(task, source, _stand_in(task, cache_dir, rows))
    return _first_that_answers(task, source, cache_dir, rows)


def _first_that_answers(
    task: tasks.Task, source: str, cache_dir: Path | str | None, rows: int | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """`find` among D4RL's folder and server and, where `source` is auto, the stand-in."""
    reasons = []

    def ask(task: tasks.Task) -> Path:
        return _download(task, asked_for=source == "d4rl")

    for name, get in (("d4rl_dir", in_d4rl_folder), ("d4rl", ask)):
        if source in ("auto", name):
            try:
                return _from_file(task, name, get(task))
            except NotFound as error:
                reasons.append(f"{name}: {error}")
    if source != "auto":
        raise RuntimeError(f"no dataset for {task.name}; {reasons[0]}")
    try:
        found = _stand_in(task, cache_dir, rows)
    except policies.NotCollectable as error:
        raise ValueError(
            f"no dataset for {task.name}; {'; '.join(reasons)}; self-collected: {error}. "
            "Put D4RL's file there or pass dataset_path"
        ) from error
    print(f"dataset {task.name}: {'; '.join(reasons)}")
    return _from_file(task, "self-collected", found)


class NotFound(Exception):
    """A source does not have the data; the next one may."""


def _d4rl_folder() -> Path:
    return expand(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")


def in_d4rl_folder(task: tasks.Task) -> Path:
    """D4RL's file of a task in D4RL's own folder.

    Raises:
        NotFound: there is none.
    """
    try:
        path = _d4rl_folder() / published.file_name(task)
    except ValueError as error:
        raise NotFound(str(error)) from error
    if not path.is_file():
        raise NotFound(f"there is no {path}")
    return path


def _download(task: tasks.Task, asked_for: bool = False) -> Path:
    """D4RL's file, downloaded into D4RL's folder, where the package d4rl looks too.

    Where the file's checksum is public, a file with another one is refused. Where it is not, the
    file comes over https, or has to be `asked_for`.

    Raises:
        NotFound: downloads are switched off, the server cannot be reached or has no such file.
    """
    try:
        address = published.url(task)
    except ValueError as error:
        raise NotFound(str(error)) from error
    target, server = _d4rl_folder() / published.file_name(task), published.server()
    if target.is_file():
        return target
    if not server:
        raise NotFound("downloads are switched off (CORL_DARE_D4RL_URL is empty)")
    if server in unreachable:
        raise NotFound(unreachable[server])
    known = published.known_files().get(task.name, ())
    if not known and not asked_for and not address.startswith("https://"):
        raise NotFound(
            f"D4RL publishes no checksum of {target.name}, and {server} is not encrypted, so "
            "nobody would notice a file that was changed on the way; dataset_source d4rl "
            "fetches it all the same"
        )
    try:
        return download.download(address, target, *known)
    except download.Unreachable as error:
        unreachable[server] = str(error)
        raise NotFound(str(error)) from error
    except download.DownloadError as error:
        raise NotFound(str(error)) from error


def cache_folder(cache_dir: Path | str | None = None) -> Path:
    """Where prepared things are kept: the argument, CORL_DARE_CACHE or ~/.cache/corl_dare."""
    cache = cache_dir or os.environ.get("CORL_DARE_CACHE") or "~/.cache/corl_dare"
    return expand(cache)


def stand_in_path(
    task: tasks.Task, cache_dir: Path | str | None = None, rows: int | None = None
) -> Path:
    """Where a task's stand-in is kept once it is collected.

    The name holds the digests of the shipped policies: a new release may ship others, and files
    of the old ones must not be taken for theirs.

    Raises:
        NotCollectable: there is no stand-in for this task.
    """
    rows = policies.default_rows(task) if rows is None else rows
    digests = "".join(f"-{digest[:8]}" for digest in policies.fingerprint(task).values())
    name = f"{task.name}-{rows}{digests}.hdf5"
    return cache_folder(cache_dir) / "datasets" / name


def _stand_in(task: tasks.Task, cache_dir: Path | str | None, rows: int | None) -> Path:
    """The task's stand-in, collected if it is not there yet."""
    # Imported here, so that reading a file needs neither the collector nor its environments.
    from corl.standin import collect

    rows = policies.default_rows(task) if rows is None else rows
    return collect.collect(task, rows, stand_in_path(task, cache_dir, rows))


def _from_file(
    task: tasks.Task, source: str, path: Path
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    raw = schema.load(path, task)
    made: dict[str, Any] = {}
    with hdf5.reading(path):
        digest = layouts.digest(path)
        if h5py.is_hdf5(path):
            with h5py.File(path) as file:
                made = hdf5.plain_attributes(file)
    owners = {known: name for name, (_, known) in published.known_files().items()}
    owner = owners.get(digest)
    order = row_order.settle(raw, task, path, owner is not None)
    provenance = {
        "source": source,
        "path": str(path),
        "sha256": digest,
        "recognised": owner == task.name,
        "label": _label(task, source, path, owner, made),
    }
    _note_order(provenance, order)
    if made.get("source") == "self-collected":
        provenance["collected"] = made
    return raw, provenance


def _note_order(provenance: dict[str, Any], order: row_order.RowOrder) -> None:
    provenance |= {"order": order.kind, "seams": order.seams}
    if order.warning():
        provenance["warning"] = order.warning()


def _from_memory(
    task: tasks.Task, rows: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    name = "the dict of arrays"
    raw = schema.validate(layouts.of_dict(rows), task, name)
    provenance: dict[str, Any] = {
        "source": "file",
        "path": name,
        "sha256": schema.hash_arrays(raw),
        "recognised": False,
        "label": "arrays of the user's own",
    }
    _note_order(provenance, row_order.settle(raw, task, name))
    return raw, provenance


def _label(
    task: tasks.Task, source: str, path: Path, owner: str | None, made: dict
) -> str:
    """What a file is, in words.

    Args:
        owner: name of the task whose D4RL file has the same bytes, if one has.
        made: the file's attributes.
    """
    if owner is not None:
        label = f"D4RL's own file of {owner} (checksum matches)"
        return label if owner == task.name else f"{label}, NOT of {task.name}"
    if not task.is_d4rls:
        by = f", collected by {made['policies']}" if "policies" in made else ""
        return f"data of the user's own{by}"[:200]
    if made.get("source") == "self-collected":
        label = "self-collected stand-in (not D4RL data)"
        if "mix" in made and isinstance(made.get("share"), float):
            label += f", {made['share']:.0%} of its rows by the {made['mix']} policy"
        if made.get("task") != task.name:
            label += f", made for {str(made.get('task'))[:50]}"
        return label
    label = "unknown file (not D4RL's checksum)"
    size = published.known_files().get(task.name, (None,))[0]
    if "exported_from" in made:
        label += f", exported from {str(made['exported_from'])[:200]}"
    elif source != "file" and size and path.stat().st_size < size:
        label += f", shorter than D4RL's {size} bytes"
    return label


def _from_minari(
    task: tasks.Task, source: str, name: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if source not in ("auto", "minari"):
        raise ValueError(
            f"dataset_path is a Minari id, but dataset_source is {source!r}"
        )
    # Every episode's last row has a flag, so there are no seams.
    whole = not task.is_d4rls
    raw = schema.validate(minari.from_minari(name, whole), task, f"minari:{name}")
    # Of the data in another environment than its own.
    warning = {"warning": minari.caveat(name)} if task.name != f"minari:{name}" else {}
    return raw, {
        "source": "minari",
        "path": f"minari:{name}",
        "sha256": schema.hash_arrays(raw),
        "recognised": False,
        "label": f"Minari dataset {name} (not D4RL data)",
        "order": "in order",
        "seams": 0,
        "minari_version": minari.import_minari(name).__version__,
        **warning,
    }


def _from_ogbench(
    task: tasks.Task, path: Path | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    name = str(path or task.name)
    raw = schema.validate(ogbench.rows(task.name, path), task, name)
    return raw, {
        "source": "ogbench",
        "path": name,
        "sha256": schema.hash_arrays(raw),
        "recognised": False,
        "label": "OGBench's rows, as its own loader gives them",
        # The loader gives each row its next state.
        "order": "in order",
        "seams": 0,
        "ogbench_version": ogbench.version(),
    }
