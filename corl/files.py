"""Files: written whole or not at all, their SHA-256, and HDF5 images.

Whatever a run or a collection leaves on the disk is written here, so that a crash, a full disk
or an interruption never leaves half a file under a final name.
"""

import errno
import glob
import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

if TYPE_CHECKING:
    import h5py


class CannotWrite(OSError):
    """A file cannot be written; its text is one line: the file, the reason, and what helps."""

    def __init__(self, path: Path | str, error: OSError):
        self.reason = error.strerror or " ".join(str(error).split())
        super().__init__(error.errno, self.reason, str(path))

    def __str__(self) -> str:
        helps = _HELPS.get(self.errno or 0)
        line = f"cannot write {self.filename} ({self.reason})"
        return f"{line}; {helps}" if helps else line


_ELSEWHERE = "mend its rights or choose another place"
_HELPS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space of your quota",
    errno.EACCES: _ELSEWHERE,
    errno.EPERM: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
    errno.ENOTDIR: "a part of this path is a file",
}


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Inside, an OSError becomes a `CannotWrite` that names `path`, if it names nothing yet."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(path, error) from error


class _Watched:
    """Passes bytes on to a file and keeps its error: torch puts one of its own in the place."""

    def __init__(self, file: BinaryIO):
        self._file, self.failed = file, False

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failed, self.error = True, error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """A binary file to write; it takes the place of `path` when the block ends well.

    Until then it has a name of its own beside `path`, so that two writers never share one. After
    an error nothing of it is left, and what stood at `path` is untouched. Only a process that is
    killed leaves its file; see `remove_remains`.

    Raises:
        CannotWrite: no room, no right to write, or no such folder.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    # Mode "x" refuses a name that exists, so a link that someone laid there is not followed.
    with writing(path), open(part, "xb") as file:
        watched = _Watched(file)
        try:
            yield cast(BinaryIO, watched)
            file.flush()
            os.fsync(file.fileno())
            # Windows renames closed files only.
            file.close()
            os.replace(part, path)
        except BaseException as error:
            # A full disk must not stay full.
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                part.unlink(missing_ok=True)
            if watched.failed and isinstance(error, Exception):
                raise watched.error from error
            raise
    with writing(path):
        _sync_folder(path.parent)


def append(path: Path | str, text: str) -> None:
    """Add a text at the end of a file; after an error the file is as it was, without half a row.

    Raises:
        CannotWrite: no room, no right to write, or no such folder.
    """
    # Unbuffered, so that closing has nothing left to write.
    with writing(path), open(path, "ab", buffering=0) as file:
        before, data = file.seek(0, os.SEEK_END), memoryview(text.encode())
        try:
            while data:
                data = data[file.write(data) :]
        except BaseException:
            with suppress(OSError):
                file.truncate(before)
            raise


def sync(path: Path | str) -> None:
    """Bring what was appended to a file to the disk.

    Raises:
        CannotWrite: the disk refuses it.
    """
    with writing(path), open(path, "ab") as file:
        os.fsync(file.fileno())


def check_writable(folder: Path | str) -> None:
    """Try to make a file in a folder, which need not exist yet; nothing is left of it.

    Raises:
        CannotWrite: no room, no right to write, or something else stands there.
    """
    there = Path(folder).absolute()
    while not os.path.lexists(there):
        there = there.parent
    with writing(folder), tempfile.TemporaryFile(dir=there) as file:
        # A full disk often has room for a name, but not for a byte.
        file.write(b"x")
        file.flush()


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
        CannotWrite: as of `replacing`.
    """
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def naming_errors(path: Path | str) -> Iterator[None]:
    """Inside, an OSError becomes a RuntimeError of one line that names `path`."""
    try:
        with writing(path):
            yield
    except CannotWrite as error:
        raise RuntimeError(str(error)) from error


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
        CannotWrite: as of `replacing`.
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
