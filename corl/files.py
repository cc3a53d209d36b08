"""TODO corl.files"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)  # a full disk must not stay full
        raise
    if os.name == "posix":  # the new name itself must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write atomically, as `save_checkpoint`."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """A name beside `out` to write to; nothing stays under it, errors get one line."""
    part = out.with_name(f".{out.name}.part")
    try:
        yield part
    except OSError as error:
        raise RuntimeError(f"cannot write {out} ({error})") from error
    finally:
        with suppress(OSError):
            part.unlink()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def publish(part: Path, out: Path) -> None:
    """Give a complete file its final name in the same folder, once it is on the disk."""
    with open(part, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(part, out)


def write_hdf5(out: Path, fill: Callable[[h5py.File], object]) -> None:
    """Make an HDF5 file by `fill`; it gets its name when it is complete.

    Raises:
        OSError: no room or no right to write.
    """
    # In memory first: on a full disk HDF5's own writing ends with a crash, not an error.
    memory = {"driver": "core", "backing_store": False, "block_size": 1 << 24}
    with h5py.File(str(out), "w", **memory) as file:
        fill(file)
        file.flush()
        image = file.id.get_file_image()
    part = out.with_name(out.name + ".part")
    try:
        part.write_bytes(image)
        publish(part, out)
    finally:
        with suppress(OSError):
            part.unlink()


def attributes(file: h5py.File) -> dict:
    """The settings and versions that `collect` wrote to a file, as plain values."""
    values = {name: file.attrs[name] for name in file.attrs}
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
