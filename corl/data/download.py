"""Download of one file: resumable, checked, and never half under its final name.

D4RL's server is slow and often out of reach. So an interrupted download goes on where it
stopped, size and SHA-256 are compared before the file gets its name, and a server that does
not answer is given up within seconds. Whatever a server sends, no more than the known size is
written, and it cannot lead to anything but http and https.

Elsewhere `files.replacing` writes whole files and leaves nothing after an error. Here what has
come so far is to stay, under a name that the next try finds; so this file renames by itself.
"""

import http.client
import os
import queue
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from corl import files, locks
from corl.progress import progress_bar

TIMEOUT = 5.0  # seconds without an answer
BLOCK = 1 << 20  # bytes that are read at once
# Bytes of a file whose size nobody published; D4RL's largest has half of that.
LARGEST = 1 << 30
SCHEMES = ("http", "https")
HDF5_START = b"\x89HDF\r\n\x1a\n"


class DownloadError(Exception):
    """A file cannot be had from a server; one line says why."""


class Unreachable(DownloadError):
    """There is no connection, so other files of this server are not worth a try."""


def download(
    url: str,
    target: Path,
    size: int | None = None,
    digest: str | None = None,
    timeout: float = TIMEOUT,
    progress: bool = True,
) -> Path:
    """Fetch an HDF5 file to `target`, unless it is there; returns `target`.

    The bytes gather in `target` + `.part`, which stays after a broken transfer, so that
    the next call goes on there. A file without a known digest starts anew, because
    nothing could tell that the parts belong together. Of two processes that fetch the same file
    the second waits for the first.

    Args:
        url: address of the file.
        target: where the file is to be; its folder is made.
        size: bytes of the right file, compared before the transfer.
        digest: SHA-256 of the right file; a file with another one is deleted.
        timeout: seconds without an answer after which the server is given up.

    Raises:
        Unreachable: no connection to the server.
        DownloadError: broken transfer, HTTP error, wrong size, digest or type of file,
            no room or no right to write.
    """
    if urlsplit(url).scheme not in SCHEMES:
        raise DownloadError(f"{url} is no address that starts with http:// or https://")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(target.name + ".lock")
        with locks.holding(lock, str(target), wait=True):
            if not target.exists():
                part = target.with_name(target.name + ".part")
                fetch(url, part, size, digest, timeout, progress)
                _check(part, digest)
                os.replace(part, target)
    except OSError as error:
        raise DownloadError(f"cannot write {target} ({_one_line(error)})") from error
    return target


def fetch(
    url: str,
    part: Path,
    size: int | None,
    digest: str | None,
    timeout: float,
    progress: bool,
) -> None:
    """Bring the file at `url` to `part`, from where `part` ends on, if its digest is known."""
    if part.is_symlink():
        part.unlink()
    have = part.stat().st_size if part.exists() and digest else 0
    if size is not None and have == size:
        return
    if size is not None and have > size:
        have = 0
    try:
        answer = _open(url, have, timeout)
    except DownloadError:
        raise
    except urllib.error.HTTPError as error:
        # 416: the rest that was asked for does not exist, so `part` is of another file.
        if error.code == 416:
            part.unlink(missing_ok=True)
        raise DownloadError(f"{url}: HTTP {error.code} {error.reason}") from error
    except Exception as error:
        # The look-up of the name, the connection, a proxy or the protocol failed.
        raise Unreachable(f"{url}: no connection ({_one_line(error)})") from error
    with answer:
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            # The server knows no ranges and sends the whole file.
            have = 0
        length = answer.headers.get("Content-Length") or ""
        total = have + int(length) if length.isdecimal() else size
        if size is not None and total != size:
            raise DownloadError(f"{url} has {total} bytes; D4RL's file has {size}")
        if total is not None and total > LARGEST:
            raise DownloadError(
                f"{url} has {total} bytes; no file of D4RL's has {LARGEST}"
            )
        free = shutil.disk_usage(part.parent).free
        if total is not None and free < total - have:
            raise DownloadError(
                f"{part.parent} has {free / 1e6:.0f} MB left, {url} needs "
                f"{(total - have) / 1e6:.0f} MB more"
            )
        # A server that tells no size must not fill the disk either.
        limit = min(LARGEST, free // 2) if total is None else total
        have = _copy(answer, part, have, total, limit, progress)
    if have > limit:
        part.unlink()
        raise DownloadError(
            f"{url} sends more than {limit} bytes; what came was deleted"
        )
    if total is not None and have != total:
        raise DownloadError(
            f"{url}: the transfer broke off after {have} of {total} bytes; repeat to go on"
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to http and https only, and never from https back to http."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        before, after = (urlsplit(address).scheme for address in (req.full_url, newurl))
        if after not in SCHEMES or (before == "https" and after != "https"):
            raise DownloadError(
                f"{req.full_url} leads on to {newurl}; that is not followed"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, have: int, timeout: float) -> http.client.HTTPResponse:
    """The answer to a request for a file from byte `have` on, or an error.

    The opener runs in a thread, because no socket timeout covers the look-up of the server's name.
    """
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(_Redirects())
    answers: queue.Queue[http.client.HTTPResponse | Exception] = queue.Queue()

    def work() -> None:
        try:
            answers.put(opener.open(request, timeout=timeout))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = answers.get(timeout=2 * timeout)
    except queue.Empty:
        raise TimeoutError(f"no answer within {2 * timeout:g} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _copy(
    answer: http.client.HTTPResponse,
    part: Path,
    have: int,
    total: int | None,
    limit: int,
    progress: bool,
) -> int:
    """Append an answer to `part` until it ends or breaks off; the bytes that `part` then has.

    No more is read than one byte beyond `limit`, which tells a server that does not stop.
    """
    with (
        open(part, "ab" if have else "wb") as handle,
        progress_bar(
            total=total,
            initial=have,
            desc=f"download of {part.stem}",
            unit="B",
            unit_scale=True,
            disable=not progress,
        ) as bar,
    ):
        while True:
            try:
                # `read1` gives what is there, however little, and so loses nothing in a break.
                block = answer.read1(min(BLOCK, limit + 1 - have))
            except (OSError, http.client.HTTPException):
                # What has come so far is kept; the caller compares the size.
                break
            if not block:
                break
            handle.write(block)
            have += len(block)
            bar.update(len(block))
            if have > limit:
                break
        handle.flush()
        os.fsync(handle.fileno())
        return handle.tell()


def _check(part: Path, digest: str | None) -> None:
    """Delete a file that is no HDF5 file or has another digest, and raise."""
    with open(part, "rb") as handle:
        start = handle.read(len(HDF5_START))
    wrong = None
    if start != HDF5_START:
        wrong = "is not an HDF5 file"
    elif digest is not None and (found := files.sha256(part)) != digest:
        wrong = f"has sha256 {found}, not D4RL's {digest}"
    if wrong:
        part.unlink()
        raise DownloadError(f"the downloaded {part.stem} {wrong}; it was deleted")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
