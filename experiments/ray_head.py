"""A Ray of a sweep's own, whose processes end with the sweep, however it ends.

    python -m experiments.ray_head [WORKERS]     # as a sweep starts it

This process starts Ray in a session, and so in a process group, of its own. Its standard input
is a pipe from the sweep. When the sweep is gone, the pipe ends, and the group is killed. Ray ties
some of its processes to the one that started it, but its agents outlive that one by a minute.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from typing import Any

from experiments.programs import ROOT

# For a Ray of our own only. Both are read when Ray is imported.
OWN_SETTINGS = {
    # Ray asks for a reachable address even where it is given 127.0.0.1, and listens on every
    # interface then. With this, which is its default on Windows and macOS, it stays on loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def set_environment() -> None:
    """What a Ray of our own reads from the environment; before `ray` is imported."""
    for name, value in OWN_SETTINGS.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        # For this Ray alone: it would otherwise leave a token in the home folder, which
        # changes how every later Ray of this user starts.
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


class Head:
    """The process that holds our Ray. `close` ends it, and so does the end of this process.

    Args:
        workers: cells at a time; none: one per core.

    Attributes:
        address: of this Ray, HOST:PORT.

    Raises:
        RuntimeError: Ray did not start; one line.
    """

    def __init__(self, workers: int | None):
        words = [] if workers is None else [str(workers)]
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.ray_head", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search},
            # A group of its own. Ctrl-C is for the sweep alone.
            start_new_session=True,
        )
        assert self.process.stdout is not None
        try:
            line = self.process.stdout.readline()
            answer = json.loads(line) if line else {}
            if "address" not in answer:
                raise RuntimeError(answer.get("error", "its process died"))
        except BaseException:
            self.close()
            raise
        self.address: str = answer["address"]

    def close(self) -> None:
        """End Ray's processes and wait until they are gone."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()


def _end_with_sweep() -> None:
    """Kill this process group when standard input ends."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(workers: int | None) -> None:
    """Start Ray, say its address or why there is none as a line of JSON, and hold it."""
    if os.getpgrp() != os.getpid():
        raise SystemExit("error: a sweep starts this; run `python -m experiments.sweep`")
    _end_with_sweep()
    # Ray's processes inherit the standard output, but this line is all that goes there.
    with open(os.dup(1), "w") as answer:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        options |= {"num_cpus": workers, "include_dashboard": False}
        try:
            context = ray.init("local", _node_ip_address="127.0.0.1", **options)
            found = {"address": context.address_info["gcs_address"]}
        except (OSError, RuntimeError, ValueError) as error:
            found = {"error": " ".join(str(error).split())}
        print(json.dumps(found), file=answer, flush=True)
    if "address" in found:
        signal.pause()


if __name__ == "__main__":
    set_environment()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
