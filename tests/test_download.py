"""Downloads from a local server: resumed, checked, given up quickly, never half."""

import contextlib
import hashlib
import http.server
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

from corl.data import download as module
from corl.data.download import HDF5_START, DownloadError, Unreachable, download

CONTENT = HDF5_START + bytes(range(256)) * 4000
SIZE = len(CONTENT)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content` at /x.hdf5; what goes wrong is set on the server."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        if self.path != "/x.hdf5":
            self.send_error(404)
            return
        start = 0
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(server.content):
                self.send_error(416)
                return
            self.send_response(206)
            end, size = len(server.content) - 1, len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        else:
            self.send_response(200)
        body = server.content[start:]
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[: server.stop_after])
            if server.hang is not None:
                self.wfile.flush()
                server.hang.wait(30)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.asked = CONTENT, []
    server.ranges, server.length = True, True
    server.stop_after, server.hang = None, None
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    yield server
    if server.hang is not None:
        server.hang.set()
    server.shutdown()
    server.server_close()


def get(server, target, name="x.hdf5", size=SIZE, digest=DIGEST, **options):
    options = {"progress": False, "timeout": 5.0, **options}
    return download(f"{server.url}/{name}", target, size, digest, **options)


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def test_file_arrives_whole_and_once(server, tmp_path):
    target = tmp_path / "new" / "x.hdf5"
    assert get(server, target) == target
    assert target.read_bytes() == CONTENT and names(target.parent) == ["x.hdf5"]
    assert get(server, target) == target
    assert server.asked == [None]


def test_truncated_transfer_is_resumed_where_it_broke(server, tmp_path):
    target = tmp_path / "x.hdf5"
    server.stop_after = 300_000
    with pytest.raises(DownloadError, match=f"broke off after 300000 of {len(CONTENT)}"):
        get(server, target)
    assert names(tmp_path) == ["x.hdf5.part"]
    with pytest.raises(DownloadError, match="broke off after 600000"):
        get(server, target)
    server.stop_after = None
    get(server, target)
    assert target.read_bytes() == CONTENT and names(tmp_path) == ["x.hdf5"]
    assert server.asked == [None, "bytes=300000-", "bytes=600000-"]


def test_server_without_ranges_sends_all_again(server, tmp_path):
    target = tmp_path / "x.hdf5"
    server.stop_after, server.ranges = 1000, False
    with pytest.raises(DownloadError, match="broke off after 1000"):
        get(server, target)
    server.stop_after = None
    assert get(server, target).read_bytes() == CONTENT


def test_connection_that_goes_silent_is_given_up_and_resumed(server, tmp_path):
    server.stop_after, server.hang = 5000, threading.Event()
    start = time.monotonic()
    with pytest.raises(DownloadError, match="broke off after 5000"):
        get(server, tmp_path / "x.hdf5", timeout=0.3)
    assert time.monotonic() - start < 10
    server.hang.set()
    server.stop_after = server.hang = None
    assert get(server, tmp_path / "x.hdf5").read_bytes() == CONTENT


def test_complete_part_of_a_killed_process_needs_no_transfer(server, tmp_path):
    (tmp_path / "x.hdf5.part").write_bytes(CONTENT)
    assert get(server, tmp_path / "x.hdf5").read_bytes() == CONTENT
    assert server.asked == []


def test_wrong_hash_is_deleted_and_the_next_try_starts_anew(server, tmp_path):
    target = tmp_path / "x.hdf5"
    server.content = CONTENT[:-1] + b"?"
    with pytest.raises(DownloadError, match=f"has sha256 .*, not D4RL's {DIGEST}"):
        get(server, target)
    assert names(tmp_path) == []
    (tmp_path / "x.hdf5.part").write_bytes(b"?" * 1000)  # parts of two other files
    server.content = CONTENT
    with pytest.raises(DownloadError, match="is not an HDF5 file; it was deleted"):
        get(server, target)
    assert get(server, target).read_bytes() == CONTENT


def test_too_long_part_is_thrown_away(server, tmp_path):
    (tmp_path / "x.hdf5.part").write_bytes(CONTENT + b"more")
    assert get(server, tmp_path / "x.hdf5").read_bytes() == CONTENT


@pytest.mark.parametrize("more", [b"?", -1])
def test_wrong_size_is_refused_before_the_transfer(server, tmp_path, more):
    server.content = CONTENT[:-1] if more == -1 else CONTENT + more
    with pytest.raises(DownloadError, match=f"D4RL's file has {len(CONTENT)}"):
        get(server, tmp_path / "x.hdf5")
    assert names(tmp_path) == []


def test_web_page_in_place_of_a_file_is_refused(server, tmp_path):
    server.content = b"<html>please log in</html>"
    with pytest.raises(DownloadError, match="x.hdf5 is not an HDF5 file"):
        get(server, tmp_path / "x.hdf5", size=None, digest=None)
    assert names(tmp_path) == []


def test_file_of_unknown_digest_starts_anew(server, tmp_path):
    (tmp_path / "x.hdf5.part").write_bytes(b"older bytes")
    get(server, tmp_path / "x.hdf5", size=None, digest=None)
    assert (tmp_path / "x.hdf5").read_bytes() == CONTENT and server.asked == [None]


def test_server_that_tells_no_length(server, tmp_path):
    server.length = False
    assert get(server, tmp_path / "x.hdf5", size=None).read_bytes() == CONTENT
    server.stop_after = 1000
    with pytest.raises(DownloadError, match="broke off after 1000"):
        get(server, tmp_path / "y.hdf5")


def test_missing_file_and_unsatisfiable_range(server, tmp_path):
    with pytest.raises(DownloadError, match="/no.hdf5: HTTP 404") as caught:
        get(server, tmp_path / "x.hdf5", name="no.hdf5")
    assert not isinstance(caught.value, Unreachable)
    (tmp_path / "x.hdf5.part").write_bytes(CONTENT)
    with pytest.raises(DownloadError, match="HTTP 416"):
        get(server, tmp_path / "x.hdf5", size=None)
    assert get(server, tmp_path / "x.hdf5", size=None).read_bytes() == CONTENT


def test_no_connection_is_told_apart_and_quick(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x.hdf5"
        start = time.monotonic()
        with pytest.raises(Unreachable, match="no connection .*refused") as caught:
            download(url, tmp_path / "x.hdf5", progress=False)
        assert time.monotonic() - start < 5 and "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_name_look_up_that_hangs_is_given_up(tmp_path, monkeypatch):
    awake = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: awake.wait(30))
    start = time.monotonic()
    with pytest.raises(Unreachable, match="no answer within 0.4 seconds"):
        download("http://d4rl.invalid/x", tmp_path / "x", timeout=0.2, progress=False)
    assert time.monotonic() - start < 10
    awake.set()


def test_full_disk_and_unwritable_folder_are_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DownloadError, match="cannot write .*file/x.hdf5"):
        get(server, tmp_path / "file" / "x.hdf5")
    assert server.asked == []
    usage = shutil._ntuple_diskusage(100, 90, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DownloadError, match="has 0 MB left, .* needs 1 MB more"):
        get(server, tmp_path / "x.hdf5")
    assert names(tmp_path) == ["file"]


def test_second_download_waits_for_the_first(server, tmp_path, monkeypatch):
    target, started, waiting = tmp_path / "x.hdf5", queue.Queue(), threading.Event()

    def slow(*args):
        started.put(args)
        assert waiting.wait(20)  # until the other one stands at the lock
        return plain(*args)

    class Watched(filelock.FileLock):
        def acquire(self, *args, **kwargs):
            if not started.empty():
                waiting.set()
            return super().acquire(*args, **kwargs)

    plain = module.fetch
    monkeypatch.setattr(module, "fetch", slow)
    monkeypatch.setattr(filelock, "FileLock", Watched)
    work = [threading.Thread(target=get, args=[server, target]) for _ in range(2)]
    work[0].start()
    started.put(started.get(timeout=20))
    work[1].start()
    for thread in work:
        thread.join(timeout=30)
    assert target.read_bytes() == CONTENT
    assert started.qsize() == 1 and server.asked == [None]


def test_killed_process_leaves_a_part_that_is_used(server, tmp_path):
    server.stop_after, server.hang = 400_000, threading.Event()
    root = Path(module.__file__).parents[2]
    program = (
        "import sys; from pathlib import Path; from corl.data.download import download; "
        f"download('{server.url}/x.hdf5', Path(sys.argv[1]), {len(CONTENT)}, '{DIGEST}',"
        " timeout=60.0)"
    )
    target = tmp_path / "x.hdf5"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(target)], cwd=root, stderr=subprocess.DEVNULL
    )
    part = tmp_path / "x.hdf5.part"
    # The writer's buffer may hold back a block; any beginning will do.
    end = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not target.exists() and 0 < part.stat().st_size <= 400_000
    server.hang.set()
    server.stop_after = server.hang = None
    assert get(server, target).read_bytes() == CONTENT
    assert server.asked[-1].startswith("bytes=")
