"""Processes that each hold one object and answer calls of its methods.

A call takes a few dozen microseconds: a pickled name and arguments through a pipe, and the answer
back. Large tensors are better put into memory that both sides share.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch

# Those that ask a run to stop. The run saves first, for which it needs its workers.
SIGNALS = {signal.SIGINT, signal.SIGTERM}


class Ended(RuntimeError):
    """A worker has ended that should not have."""


class Workers:
    """So many processes, which end with this one.

    Args:
        makes: for each process what makes its object there. It is pickled, and so are arguments
            and results. Tensors in shared memory stay shared in it, and in it only.
        what: the processes do, for messages.

    Attributes:
        failed: number of the process whose answer was an error, or None.
    """

    def __init__(self, makes: Sequence[Callable[[], Any]], what: str):
        self.what = what
        self.failed: int | None = None
        self.processes: list[Any] = []
        self._connections: list[Connection] = []
        # A fork of this process would take the GPU's threads and locks along. One that has only
        # imported what all workers need is forked in milliseconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["corl.finetune"])
        # The server inherits what is blocked. A signal to this process waits until then.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for make in makes:
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, make), daemon=True)
                process.start()
                there.close()
                self.processes.append(process)
                self._connections.append(here)
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # The first answer says that the object is made.
        self._ready = False

    def ready(self) -> None:
        """Wait until all objects are made.

        Raises:
            Exception: one could not be made.
            Ended: a process has ended.
        """
        if not self._ready:
            self._ready = True
            for number in range(len(self.processes)):
                self.answer(number)

    def ask(self, number: int, request: bytes) -> None:
        """Send a call, see `request`, to a process. Its answer is to be fetched by `answer`.

        Raises:
            Ended: the process has ended.
        """
        try:
            self._connections[number].send_bytes(request)
        except OSError:
            self._end(number)

    def answer(self, number: int) -> Any:
        """The result of the oldest call of a process that has not been fetched.

        Raises:
            Exception: what the call raised.
            Ended: the process has ended.
        """
        try:
            well, result = pickle.loads(self._connections[number].recv_bytes())
        except (EOFError, OSError):
            self._end(number)
        if not well:
            self.failed = number
            raise result
        return result

    def all(self, requests: Sequence[bytes]) -> list[Any]:
        """The results of one call in each process, made at the same time. Raises as `answer`."""
        for number, call in enumerate(requests):
            self.ask(number, call)
        return [self.answer(number) for number in range(len(requests))]

    def _end(self, number: int) -> NoReturn:
        process = self.processes[number]
        self.failed = number
        process.join(1.0)
        raise Ended(f"a process that {self.what} has ended ({_how(process.exitcode)})")

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self._connections:
            connection.close()


def request(name: str, *args: Any) -> bytes:
    """A call of the method of that name."""
    return pickle.dumps((name, args), pickle.HIGHEST_PROTOCOL)


def _how(status: int | None) -> str:
    """How a process ended."""
    if status is not None and status < 0:
        return f"signal {-status}; out of memory, maybe"
    return "its lines above say why" if status else f"exit status {status}"


def _serve(connection: Connection, make: Callable[[], Any]) -> None:
    """Make an object and answer calls until nobody is there any more."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    torch.set_num_threads(1)
    _end_with_parent()
    served: Any = None
    name, args = "", ()
    while True:
        answer: tuple[bool, Any] = True, None
        try:
            if served is None:
                served = make()
            else:
                answer = True, getattr(served, name)(*args)
        except Exception as error:
            answer = False, error
        try:
            connection.send_bytes(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
            name, args = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
