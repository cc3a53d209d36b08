"""A server that lies: whatever it sends, the disk stays free and nothing unasked is taken."""

import contextlib
import hashlib
import http.server
import threading

import harness
import pytest

from algorithms import iql
from corl.data import download, published, sources
from corl.data.download import HDF5_START, DownloadError

pytestmark = pytest.mark.fault("bad inputs")
CONTENT = HDF5_START + b"x" * 100_000
SIZE = len(CONTENT)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PLAY = "antmaze-medium-play-v2"  # the one task without a public checksum


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the function `server.answer(handler)` does."""

    def do_GET(self):
        self.server.asked.append(self.path)
        with contextlib.suppress(OSError):
            self.server.answer(self)

    def reply(self, status=200, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def endless(self, **headers):
        self.reply(body=HDF5_START, **headers)
        # More than any test allows, and an end for a client that does not stop.
        for _ in range(400):
            self.wfile.write(b"y" * (1 << 16))
        self.server.all_sent = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.all_sent = [], False
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server, target, size=SIZE, digest=DIGEST, url=None):
    url = url or f"{server.url}/x.hdf5"
    return download.download(url, target, size, digest, progress=False)


def bytes_in(folder):
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix != ".lock")


ENDLESS = {
    "no length": (SIZE, {}),
    "the right length": (SIZE, {"Content_Length": SIZE}),
    "a length that is no number": (SIZE, {"Content_Length": "many"}),
    "a negative length": (SIZE, {"Content_Length": -7}),
    "no known size": (None, {}),
    "no known size, no number": (None, {"Content_Length": "1e3"}),
}


@pytest.mark.parametrize("size, headers", ENDLESS.values(), ids=ENDLESS)
def test_endless_bytes_stop_at_the_known_size(
    size, headers, server, tmp_path, monkeypatch
):
    monkeypatch.setattr(download, "LARGEST", 200_000)
    server.answer = lambda handler: handler.endless(**headers)
    digest = DIGEST if size else None
    with pytest.raises(DownloadError) as caught:
        fetch(server, tmp_path / "x.hdf5", size, digest)
    assert "more than" in str(caught.value) or "sha256" in str(caught.value)
    assert bytes_in(tmp_path) == 0 and not server.all_sent


def test_a_claim_beyond_any_file_of_d4rls_is_refused_before_the_transfer(
    server, tmp_path
):
    server.answer = lambda handler: handler.endless(Content_Length=1 << 50)
    with pytest.raises(DownloadError, match="no file of D4RL's has"):
        fetch(server, tmp_path / "x.hdf5", None, None)
    assert bytes_in(tmp_path) == 0


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x.hdf5", "data:,x", "gopher://x/"]
)
def test_a_redirect_to_another_scheme_is_not_followed(target, server, tmp_path):
    server.answer = lambda handler: handler.reply(302, Location=target)
    with pytest.raises(DownloadError, match="302|not followed"):
        fetch(server, tmp_path / "x.hdf5")
    assert bytes_in(tmp_path) == 0


def test_a_redirect_to_http_is_followed_and_the_file_checked(server, tmp_path):
    def answer(handler):
        if handler.path == "/x.hdf5":
            handler.reply(302, Location="/y.hdf5")
        else:
            handler.reply(body=CONTENT, Content_Length=len(CONTENT))

    server.answer = answer
    assert fetch(server, tmp_path / "x.hdf5").read_bytes() == CONTENT
    assert server.asked == ["/x.hdf5", "/y.hdf5"]


def test_https_is_not_left_for_http():
    rule = download._Redirects()
    request = download.urllib.request.Request("https://127.0.0.1/x.hdf5")
    with pytest.raises(DownloadError, match="not followed"):
        rule.redirect_request(request, None, 302, "", {}, "http://127.0.0.1/x.hdf5")


def test_redirects_without_an_end_are_given_up(server, tmp_path):
    server.answer = lambda handler: handler.reply(302, Location=f"{handler.path}a")
    with pytest.raises(DownloadError, match="HTTP 302"):
        fetch(server, tmp_path / "x.hdf5")
    assert len(server.asked) < 30


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/etc/passwd", "x.hdf5"]
)
def test_addresses_of_other_schemes_are_refused(url, tmp_path):
    with pytest.raises(DownloadError, match="no address that starts with http"):
        fetch(None, tmp_path / "x.hdf5", url=url)
    assert not list(tmp_path.iterdir())


def test_a_link_in_place_of_the_part_is_not_written_through(server, tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    (tmp_path / "x.hdf5.part").symlink_to(mine)
    server.answer = lambda handler: handler.reply(body=CONTENT)
    fetch(server, tmp_path / "x.hdf5")
    assert mine.read_bytes() == b"mine"


@pytest.fixture
def d4rl(server, tmp_path, monkeypatch):
    """`server` in place of D4RL's, and an empty folder of D4RL's."""
    (tmp_path / "d4rl").mkdir()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("CORL_DARE_D4RL_URL", server.url)
    monkeypatch.setattr(sources, "unreachable", {})
    server.answer = lambda handler: handler.reply(404)
    return server


def test_no_checksum_and_no_encryption_is_fetched_only_when_asked_for(d4rl, monkeypatch):
    task = sources.tasks.task(PLAY)
    with pytest.raises(sources.NotFound, match="no checksum.*dataset_source d4rl"):
        sources._download(task)
    assert d4rl.asked == []
    with pytest.raises(RuntimeError, match="404"):
        sources.resolve(PLAY, "d4rl")
    assert len(d4rl.asked) == 1
    # With a checksum plain http is enough.
    with pytest.raises(sources.NotFound, match="404"):
        sources._download(sources.tasks.task("antmaze-umaze-v2"))
    monkeypatch.setenv("CORL_DARE_D4RL_URL", "https://127.0.0.1:1")
    with pytest.raises(sources.NotFound, match="no connection"):
        sources._download(task)


def test_only_one_task_has_no_checksum():
    known = set(published.known_files())
    assert set(sources.tasks.task_names()) - known == {PLAY}


def test_a_forged_file_ends_the_run_in_one_line(d4rl, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "CHECKSUMS", f"hopper\nmedium {SIZE} {DIGEST}\n")
    d4rl.answer = lambda handler: handler.endless()
    flags = harness.short_run(tmp_path, "none", dataset_source="d4rl")
    outcome = harness.run(harness.algorithm(iql), *flags)
    harness.assert_refused(outcome, "hopper", r"bytes|sha256|D4RL")
    assert bytes_in(tmp_path / "d4rl") == 0


def test_a_server_with_file_scheme_is_refused_in_one_line(d4rl, tmp_path, monkeypatch):
    monkeypatch.setenv("CORL_DARE_D4RL_URL", "file:///etc")
    flags = harness.short_run(tmp_path, "none", dataset_source="d4rl")
    outcome = harness.run(harness.algorithm(iql), *flags)
    harness.assert_refused(outcome, "file:///etc", "http")
