"""The progress bar of everything that takes long."""

import sys
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0  # time between two lines of one bar in a log file


def progress_bar(*args: Any, **options: Any) -> tqdm:
    """A tqdm bar on stderr; where that is no terminal, a line every `LOG_SECONDS`.

    Takes tqdm's arguments. In a log file a bar also writes its last state, unless it ended
    before its first line was due.
    """
    if sys.stderr.isatty():
        pace: dict[str, Any] = {
            "mininterval": 0.5,
            "maxinterval": 1.0,
            "dynamic_ncols": True,
        }
    else:
        # tqdm's monitor thread adds lines where miniters adapts itself, so it stays 1.
        pace = {"mininterval": LOG_SECONDS, "delay": LOG_SECONDS, "miniters": 1}
        pace["file"] = _LogLines()
    return tqdm(*args, **{**pace, **options})


class _LogLines:
    """Turns what tqdm writes, lines that overwrite each other, into lines that follow.

    A state of the bar starts with a carriage return; all else moves or clears lines.
    Since tqdm does not know this file as stderr, `tqdm.write` does not redraw the bar.
    """

    def write(self, text: str) -> None:
        if text.startswith("\r") and text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
