"""Locks of the operating system: one process at a time, and a killed process frees its lock."""

import errno
import inspect
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

# How file systems say that they have no locks.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


class InUseError(RuntimeError):
    """Another process holds the lock; the message is one line."""


@contextmanager
def holding(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` inside; it names this process and its machine meanwhile.

    The file stays, empty: who deletes a lock file that others may have open makes two locks of
    one. On a file system without locks a line says so, and the block runs without.

    Args:
        path: lock file; its folder exists.
        what: what is locked, for messages.
        wait: wait for another holder to end.

    Raises:
        InUseError: another holder has it, and `wait` is False.
        OSError: the file cannot be made.
    """
    lock = file_lock(path, -1.0 if wait else 0.0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise InUseError(
            f"{what} is in use by {_holder(path)}: wait until that process ends, or end it"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        print(
            f"warning: the file system of {what} has no locks: see to it that no second "
            "process works on it",
            file=sys.stderr,
        )
    owner = os.getpid()
    _write(path, f"process {owner} on {socket.gethostname()}\n")
    try:
        yield
    finally:
        # A forked child shares the lock of its parent and must not end it.
        if os.getpid() == owner:
            _write(path, "")
            lock.release()


def file_lock(path: Path, timeout: float) -> filelock.BaseFileLock:
    """A lock of the operating system and nothing else; without end is a timeout of -1."""
    options: dict[str, Any] = {}
    # The substitute that newer versions take where there are no locks outlives a killed process.
    if "fallback_to_soft" in inspect.signature(filelock.FileLock.__init__).parameters:
        options["fallback_to_soft"] = False
    return filelock.FileLock(path, timeout=timeout, **options)


def _write(path: Path, text: str) -> None:
    """Say in the lock file who holds it, if it can be written; no link is followed."""
    with suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        number = os.open(path, flags, 0o666)
        try:
            os.write(number, text.encode())
        finally:
            os.close(number)


def _holder(path: Path) -> str:
    """Who holds the lock, as the file says."""
    with suppress(OSError):
        text = " ".join(path.read_text(errors="replace").split())
        if text and text.isprintable() and len(text) < 300:
            return text
    return "another process"
