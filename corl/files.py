"""Files: written whole or not at all, their SHA-256, and HDF5 images.

Whatever a run or a collection leaves on the disk is written here, so that a crash, a full disk
or an interruption never leaves half a file under a final name.
"""

import glob
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import h5py


@contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """A binary file to write; it takes the place of `path` when the block ends well.

    Until then it has a name of its own beside `path`, so that two writers never share one. After
    an error nothing of it is left, and what stood at `path` is untouched. Only a process that is
    killed leaves its file; see `remove_remains`.

    Raises:
        OSError: no room, no right to write, or no such folder.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    # Mode "x" refuses a name that exists, so a link that someone laid there is not followed.
    with open(part, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # Windows renames closed files only.
            file.close()
            os.replace(part, path)
        except BaseException:
            # A full disk must not stay full.
            with suppress(OSError):
                file.close()
            part.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Bring a new name in a folder to the disk, where the system can (POSIX)."""
    if os.name != "posix":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_remains(path: Path | str) -> None:
    """Delete the files that killed writers of `path` left; none may be writing it now."""
    path = Path(path)
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        part.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text as UTF-8 in one step, as `replacing`.

    Raises:
        OSError: as of `replacing`.
    """
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def naming_errors(path: Path | str) -> Iterator[None]:
    """Inside, an OSError becomes a RuntimeError of one line that names `path`."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(f"cannot write {path} ({reason})") from error


def sha256(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_hdf5(path: Path | str, fill: Callable[["h5py.File"], object]) -> None:
    """Write the HDF5 file that `fill` fills, in one step, as `replacing`.

    Raises:
        OSError: as of `replacing`.
    """
    import h5py

    # The file is made in memory first: when a disk is full, HDF5's own writing ends the process
    # with a crash instead of an error.
    memory = {"driver": "core", "backing_store": False, "block_size": 1 << 24}
    with h5py.File(str(path), "w", **memory) as file:
        fill(file)
        file.flush()
        image = file.id.get_file_image()
    with replacing(path) as out:
        out.write(image)


def attributes(file: "h5py.File") -> dict[str, Any]:
    """The attributes of an HDF5 file as plain Python values."""
    import numpy as np

    values = {name: file.attrs[name] for name in file.attrs}
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
