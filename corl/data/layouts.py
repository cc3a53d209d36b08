"""The layouts in which data of the user's own may lie, as D4RL's columns.

An HDF5 file or a NumPy archive (`.npz`) of columns, a dict of arrays, or a folder with one such
file per episode. Columns may have the names of other libraries. Rows may stand in any order where
they hold their next observations; `row_order` finds out.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from corl import files
from corl.data import hdf5
from corl.data.hdf5 import BadData

# D4RL's name of a column -> other libraries' names.
NAMES = {
    "observations": ("states", "obs"),
    "actions": (),
    "rewards": (),
    "terminals": ("terminations", "terminateds", "dones", "done"),
    "timeouts": ("truncations", "truncateds"),
    "next_observations": ("next_states", "next_obs"),
}
REQUIRED = ("observations", "actions", "rewards", "terminals")
# What an episode's file may end with.
ENDINGS = (".hdf5", ".h5", ".npz")


def column_names(held: Collection[str]) -> dict[str, str]:
    """D4RL's name -> the name that a file with the names `held` has for the column."""
    found = {}
    for name, others in NAMES.items():
        for spelling in (name, *others):
            if spelling in held:
                found[name] = spelling
                break
    return found


def require(held: Collection[str], path: Path | str) -> dict[str, str]:
    """`column_names`, or BadData where a column is missing that must be there."""
    names = column_names(held)
    if missing := [key for key in REQUIRED if key not in names]:
        there = ", ".join(sorted(held)[:20]) or "nothing"
        raise BadData(
            f"{path} lacks {', '.join(missing)}; it holds {there}; D4RL's schema "
            f"needs {', '.join(REQUIRED)}"
        )
    return names


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The columns of a NumPy archive, under D4RL's names; nothing in it is unpickled.

    Raises:
        BadData: a damaged archive, one without the columns, or larger than the memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            needed = 3 * sum(part.file_size for part in archive.infolist())
        free = hdf5.available_memory()
        if free is not None and needed > free:
            raise BadData(
                f"{path}: loading it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB "
                "are free; give a file with fewer rows"
            )
        with np.load(path, allow_pickle=False) as archive:
            names = require(archive.files, path)
            return {key: archive[name] for key, name in names.items()}
    except BadData:
        raise
    except Exception as error:
        # A damaged archive can raise nearly anything.
        line = " ".join(str(error).split())[:200]
        raise BadData(
            f"{path} cannot be read as an archive of plain arrays ({line}); write it again with "
            "numpy.savez"
        ) from error


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """The columns of an HDF5 file, under D4RL's names.

    Raises:
        BadData: as of `hdf5.plain_columns`, or a column is missing.
    """
    hdf5.check_kind(path)
    with hdf5.reading(path), h5py.File(path) as file:
        names = require(file, path)
        columns = hdf5.plain_columns(file, path, names.values())
        hdf5.check_memory(columns, path)
        return {key: columns[name][()] for key, name in names.items()}


def of_dict(rows: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays in memory, under D4RL's names.

    Raises:
        BadData: a column is missing.
    """
    names = require(rows, "the dict of arrays")
    return {key: np.asarray(rows[name]) for key, name in names.items()}


def is_npz(path: Path) -> bool:
    """Is this a NumPy archive, by its name and its first bytes?"""
    if path.suffix.lower() != ".npz" or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def episode_files(folder: Path) -> list[Path]:
    """The episodes of a folder in the order of their names, `e2` before `e10`.

    Raises:
        BadData: there is none.
    """
    found = [p for p in folder.iterdir() if p.suffix.lower() in ENDINGS]
    if not found:
        raise BadData(
            f"{folder} is a folder without an episode; a folder of episodes holds one "
            f"{' or '.join(ENDINGS)} file for each"
        )

    def order(path: Path) -> list[tuple[int, str]]:
        parts = re.split(r"(\d+)", path.name)
        return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts]

    return sorted(found, key=order)


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """The rows of a folder of episodes; each file is one, with T actions and T or T + 1 states.

    An episode whose last row is no terminal ends by a time-out. Of T states without
    `next_observations` the last row's next one is not known.

    Raises:
        BadData: as of `read_npz` and `read_hdf5`, an empty episode, one with states of another
            number, or files of which some hold next states and others do not.
    """
    parts = [_episode(path) for path in episode_files(folder)]
    if len({frozenset(part) for part in parts}) > 1:
        raise BadData(
            f"{folder}: some episodes hold next_observations (or one observation more than "
            "actions) and others do not; write all in one way"
        )
    try:
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    except ValueError as error:
        raise BadData(f"{folder}: the episodes do not fit together ({error})") from error


def _episode(path: Path) -> dict[str, np.ndarray]:
    columns = read_npz(path) if is_npz(path) else read_hdf5(path)
    steps, states = len(columns["actions"]), columns["observations"]
    if not steps or len(states) not in (steps, steps + 1):
        raise BadData(
            f"{path}: {steps} actions and {len(states)} observations are no episode; it has as "
            "many observations as actions, or one more"
        )
    if len(states) > steps:
        columns.update(observations=states[:-1], next_observations=states[1:])
    for key in ("terminals", "timeouts"):
        flags = np.asarray(columns.get(key, False))
        if flags.size <= 1:
            # One flag for the whole episode is that of its last row.
            last = bool(flags.any())
            flags = np.zeros(steps, bool)
            flags[-1] = last
        columns[key] = flags.copy()
    if not columns["terminals"][-1]:
        columns["timeouts"][-1] = 1
    return columns


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and digests of a folder's episodes."""
    if not os.path.isdir(path):
        return files.sha256(path)
    found = hashlib.sha256()
    for part in episode_files(path):
        found.update(f"{part.name} {files.sha256(part)}\n".encode())
    return found.hexdigest()
