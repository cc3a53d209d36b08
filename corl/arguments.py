"""Arguments of the commands beside the algorithm files: argparse, with errors in one line."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from corl import ranges
from corl.layers import as_number, shown

# A seed of numpy's generators.
SEED = "[0, 4294967295]"


class Parser(argparse.ArgumentParser):
    """argparse whose errors read like all others: one line, `error: ...`, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """End the program with the message."""
        self.exit(2, f"error: {' '.join(message.split())} (--help shows the usage)\n")


def number(kind: type, interval: str) -> Callable[[str], Any]:
    """The `type` of an argument that is a number of a range, `number(int, "[1, 1e9]")`."""

    def read(text: str) -> Any:
        value = as_number(text, kind)
        if value is None:
            raise argparse.ArgumentTypeError(
                f"must be {kind.__name__}, not {shown(text)}"
            )
        if not ranges.contains(interval, value):
            raise argparse.ArgumentTypeError(
                f"must lie in {interval}, not {shown(text)}"
            )
        return value

    return read


def setting(field: dataclasses.Field) -> Callable[[str], Any]:
    """The `type` of a benchmark's setting: a seed, a positive number or a text."""
    kind: Any = type(field.default)
    if field.name == "seed":
        return number(int, SEED)
    return number(kind, "(0, 1e9]") if kind in (int, float) else kind


def path(text: str) -> Path:
    """The `type` of an argument that is a path: ~ is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not ''")
    return Path(os.path.expanduser(text))


@contextmanager
def errors_in_one_line(interrupted: str = "interrupted") -> Iterator[None]:
    """Inside, an error that a user can mend ends the program with one line and status 1.

    Ctrl-C ends it with the line `interrupted` and status 130, as a shell has it. Set
    CORL_DARE_TRACEBACK=1 to see where an error came from.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, RuntimeError, ImportError, OSError, FloatingPointError) as error:
        if os.environ.get("CORL_DARE_TRACEBACK"):
            raise
        raise SystemExit(f"error: {' '.join(str(error).split())}") from error
