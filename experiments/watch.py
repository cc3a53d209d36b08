"""A live page of all runs: their curves and one table, refreshed as they grow.

    python -m experiments.watch runs/
    python -m experiments.watch runs/ --port 9000

It reads the run folders and writes nothing. The page is served on this machine alone; it needs no
account and loads nothing from elsewhere. docs/watch.md says what it shows.
"""

import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from corl import machine
from corl.arguments import Parser, errors_in_one_line, number, path
from experiments.growing import SCORE, Runs

HOST, PORT = "127.0.0.1", 8642
PAGE = Path(__file__).with_name("watch.html")
# The page runs its own script alone and talks to this server alone.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Server(ThreadingHTTPServer):
    """Serves the page of a folder on loopback; `serve_forever` until `shutdown`.

    Args:
        root: folder of runs.
        port: 0 takes a free one.

    Raises:
        ValueError: there is no such folder, or the port is in use.
    """

    def __init__(self, root: Path, port: int = PORT):
        if not root.is_dir():
            raise ValueError(
                f"{root} is not a folder; name the one that your runs are in"
            )
        self._runs, self._lock = Runs(root), threading.Lock()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise ValueError(
                f"port {port} cannot be had ({error.strerror}); give another one with --port, "
                "0 takes a free one"
            ) from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def answer(self, metric: str, since: int) -> str:
        """`Runs.answer` as JSON."""
        with self._lock:
            found = self._runs.answer(metric, since)
        return json.dumps(found, allow_nan=False)

    def handle_error(self, request: object, client_address: object) -> None:
        """A page that was closed in the middle of an answer is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    """Answers `/`, the page, and `/runs?metric=NAME&since=CLOCK`, what is new."""

    server: Server

    def do_GET(self) -> None:
        """Answer one request."""
        # Another site could have its own name lead to this machine, and read the page.
        host = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host not in (HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN, "open the page as http://127.0.0.1")
            return
        asked = urllib.parse.urlsplit(self.path)
        if asked.path == "/":
            self._send("text/html", PAGE.read_text(encoding="utf-8"))
        elif asked.path == "/runs":
            values = dict(urllib.parse.parse_qsl(asked.query))
            since = values.get("since", "0")
            if not re.fullmatch(r"\d{1,18}", since, re.ASCII):
                self.send_error(HTTPStatus.BAD_REQUEST, "since must be a whole number")
                return
            text = self.server.answer(values.get("metric", SCORE), int(since))
            self._send("application/json", text)
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send(self, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the page asks every two seconds."""


def command_line(argv: Sequence[str] | None = None) -> None:
    """`python -m experiments.watch [RUNS] [--port N]`."""
    parser = Parser(
        prog="python -m experiments.watch",
        description="Serve a live page of all runs, on this machine alone.",
    )
    parser.add_argument(
        "runs", type=path, nargs="?", default="runs", help="folder; default: runs"
    )
    parser.add_argument(
        "--port",
        type=number(int, "[0, 65535]"),
        default=PORT,
        help=f"default: {PORT}; 0 takes a free one",
    )
    args = parser.parse_args(argv)
    with errors_in_one_line("stopped"), Server(Path(args.runs), args.port) as server:
        print(
            f"{machine.tidy_path(args.runs)}: {server.url} (Ctrl-C ends it)", flush=True
        )
        server.serve_forever()


if __name__ == "__main__":
    command_line()
