"""Arrays out of an HDF5 file that nobody vouches for.

An HDF5 file can point into other files of the machine (external and soft links, virtual datasets,
external storage), and a few bytes can claim terabytes. So a column is read only if it is a plain
array of numbers inside the file itself, wholly written, and small enough for the memory.
"""

import math
import os
import re
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np

# What turns any other file into one that can be read.
CONVERT = (
    "load it yourself where you trust it, and write its arrays into an HDF5 file "
    "(docs/datasets.md, Other formats)"
)
PICKLE = f"a Python pickle, which can run any code and is never read here; {CONVERT}"
UNPACK = "unpack it and give the HDF5 file in it"
# First bytes -> what the file is and what to do.
KINDS = {
    b"\x93NUMPY": f"a NumPy file (.npy), not D4RL's schema; {CONVERT}",
    b"\x1f\x8b": f"packed with gzip; {UNPACK}",
    b"BZh": f"packed with bzip2; {UNPACK}",
    b"\xfd7zXZ": f"packed with xz; {UNPACK}",
    b"\x28\xb5\x2f\xfd": f"packed with zstd; {UNPACK}",
    b"7z\xbc\xaf": f"a 7z archive; {UNPACK}",
    b"Rar!": f"a RAR archive; {UNPACK}",
    b"PAR1": f"a Parquet file; {CONVERT}",
    b"ARROW1": f"an Arrow file; {CONVERT}",
    b"MATLAB 5": f"an old MATLAB file; {CONVERT}",
    b"version https://git-lfs": "a git-lfs pointer; run `git lfs pull` where it came from",
}


class BadData(ValueError):
    """Data that cannot be used; the message is one line that names the file."""


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Inside, whatever the HDF5 library says of a damaged file becomes a BadData of one line."""
    try:
        yield
    except BadData:
        raise
    except MemoryError as error:
        raise BadData(
            f"{path} does not fit into this machine's memory; give a file with fewer rows"
        ) from error
    except Exception as error:
        # A damaged file can make h5py raise nearly anything.
        line = " ".join(str(error).split())[:200]
        raise BadData(
            f"{path} is a damaged or incomplete HDF5 file ({line}); get it again"
        ) from error


def check_kind(path: Path) -> None:
    """Raise BadData unless `path` is an HDF5 file; the message says what it is instead."""
    try:
        if path.is_dir():
            raise BadData(f"{path} is a folder; give the HDF5 file in it")
        if not path.exists():
            raise BadData(f"dataset file {path} does not exist")
        if not path.is_file():
            raise BadData(f"{path} is not a regular file; give an HDF5 file")
        with open(path, "rb") as file:
            start = file.read(512)
    except BadData:
        raise
    except (OSError, ValueError) as error:
        # No right to read it, too long a name, or one with a zero byte.
        line = " ".join(str(error).split())[:200]
        raise BadData(
            f"dataset file {str(path)[:200]!r} cannot be read ({line})"
        ) from None
    if not h5py.is_hdf5(path):
        raise BadData(f"{path} is not an HDF5 file: {_what_instead(path, start)}")


def _what_instead(path: Path, start: bytes) -> str:
    """What a file is, by its first bytes, and what to do about it."""
    text = start.lstrip().lower()
    if not text:
        return "it is empty; download it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, so the download failed; check its address"
    for magic, kind in KINDS.items():
        if start.startswith(magic):
            return f"it is {kind}"
    if start.startswith(b"PK"):
        return f"it is {_archive(path)}"
    if start[257:262] == b"ustar":
        return f"it is a tar archive; {UNPACK}"
    named = path.suffix.lower() in (".pkl", ".pickle", ".p")
    if named or re.match(rb"\x80[\x00-\x05]|\(dp|\(lp|c[\w.]+\n\w+\n", start):
        return f"it is {PICKLE}"
    if start.startswith(b"\x89HDF"):
        return "its beginning is damaged; download it again"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return f"it is a text file; {CONVERT}"
    return f"its first bytes are not HDF5's; if it has another format, {CONVERT}"


def _archive(path: Path) -> str:
    """What a zip archive is: torch's and NumPy's files are such archives, too."""
    names: list[str] = []
    with suppress(zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    if any(name.endswith("data.pkl") for name in names):
        return f"a torch file, which holds {PICKLE}"
    if names and all(name.endswith(".npy") for name in names):
        return f"a NumPy archive (.npz), not D4RL's schema; {CONVERT}"
    return f"a zip archive; {UNPACK}"


def plain_columns(
    file: h5py.File, path: Path | str, keys: Collection[str]
) -> dict[str, h5py.Dataset]:
    """Those of `keys` that an open file has, as datasets that may be read; `path` names it.

    Raises:
        BadData: a column is a link, a group, not stored in this file, or not wholly written.
    """
    return {key: plain_dataset(file, path, key) for key in keys if key in file}


def plain_dataset(file: h5py.Group, path: Path | str, key: str) -> h5py.Dataset:
    """One dataset, proved to be a plain array inside the file; errors as `plain_columns`."""
    link = file.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink):
        kind = "an external" if isinstance(link, h5py.ExternalLink) else "a soft"
        raise BadData(
            f"{path}: {key} is {kind} link, which may lead anywhere and is not followed; "
            "store the array itself there"
        )
    dataset = file[key]
    if isinstance(dataset, h5py.Group):
        raise BadData(f"{path}: {key} is a group; D4RL stores one array there")
    if not isinstance(dataset, h5py.Dataset):
        raise BadData(f"{path}: {key} is no array; D4RL stores one array there")
    if dataset.is_virtual or dataset.external:
        kind = "a virtual dataset" if dataset.is_virtual else "in external storage"
        raise BadData(
            f"{path}: {key} is {kind}, whose values lie outside this file and are not "
            "read; store the array itself there"
        )
    if dataset.shape is None:
        raise BadData(f"{path}: {key} is empty (no shape); D4RL stores one array there")
    _check_written(dataset, path, key)
    return dataset


def copy_plain(
    source: h5py.Group, target: h5py.Group, path: Path | str, skip: Collection[str] = ()
) -> None:
    """Copy everything of a group but the keys in `skip`; errors as `plain_columns`."""
    seen: set[int] = set()

    def check(group: h5py.Group, keys: Collection[str]) -> None:
        for key in keys:
            if isinstance(group.get(key, getlink=True), h5py.HardLink):
                item = group[key]
                if isinstance(item, h5py.Group):
                    address = h5py.h5o.get_info(item.id).addr
                    if address not in seen:
                        seen.add(address)
                        check(item, list(item))
                    continue
                if not isinstance(item, h5py.Dataset) or item.shape is None:
                    # Types and empty datasets hold no values.
                    continue
            plain_dataset(group, path, key)

    keys = sorted(set(source) - set(skip))
    check(source, keys)
    for key in keys:
        source.copy(source[key], target, key)


def _check_written(dataset: h5py.Dataset, path: Path | str, key: str) -> None:
    """Rows that were never written would be read as zeros."""
    if not dataset.size:
        return
    if dataset.chunks is None:
        whole, found = 1, int(dataset.id.get_storage_size() > 0)
    else:
        sizes = zip(dataset.shape, dataset.chunks, strict=True)
        whole = math.prod(-(-length // chunk) for length, chunk in sizes)
        found = dataset.id.get_num_chunks()
    if found < whole:
        raise BadData(
            f"{path}: {key} claims shape {dataset.shape}, but only {found} of {whole} "
            "part(s) were ever written; make the file again"
        )


def check_memory(columns: dict[str, h5py.Dataset], path: Path | str) -> None:
    """Raise BadData where columns, with the copies that loading makes, exceed the memory.

    Loading holds each column as float32 and as q-learning array, and one of them as stored.
    """
    free = available_memory()
    sizes = [column.size for column in columns.values()]
    stored = [column.size * column.dtype.itemsize for column in columns.values()]
    needed = 8 * sum(sizes) + max(stored, default=0)
    if free is not None and needed > free:
        key = max(columns, key=lambda name: columns[name].size)
        raise BadData(
            f"{path}: {key} claims shape {columns[key].shape}; loading the file needs "
            f"{needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; give a file with "
            "fewer rows or a machine with more memory"
        )


def available_memory() -> int | None:
    """Bytes that this process can still take, by the system and its container; None: unknown."""
    found = []
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError):
        text = Path("/proc/meminfo").read_text()
        if line := re.search(r"MemAvailable:\s*(\d+) kB", text):
            found.append(int(line.group(1)) * 1024)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # The cache of files counts as used, but the system gives it back.
        cache = re.search(r"inactive_file (\d+)", (group / "memory.stat").read_text())
        found.append(limit - used + (int(cache.group(1)) if cache else 0))
    return min(found, default=None)


def plain_attributes(file: h5py.File) -> dict[str, str | int | float | bool]:
    """The attributes of a file that are one number or one text; texts as one line."""
    found: dict[str, str | int | float | bool] = {}
    for name in file.attrs:
        value = file.attrs[name]
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, str):
            text = value.encode(errors="replace").decode(errors="replace")
            found[name] = " ".join(text.split())
        elif isinstance(value, bool | int | float):
            found[name] = value
    return found
