"""Old gym's logger: levels, and messages on the standard error stream."""

import sys
from typing import Any

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50
MIN_LEVEL = WARN


def set_level(level: int) -> None:
    """Messages below this level are not shown."""
    global MIN_LEVEL
    MIN_LEVEL = level


setLevel = set_level


def _say(level: int, name: str, message: str, *values: Any) -> None:
    if level >= MIN_LEVEL:
        print(f"{name}: {message % values if values else message}", file=sys.stderr)


def debug(message: str, *values: Any) -> None:
    """Show a message of level DEBUG."""
    _say(DEBUG, "DEBUG", message, *values)


def info(message: str, *values: Any) -> None:
    """Show a message of level INFO."""
    _say(INFO, "INFO", message, *values)


def warn(message: str, *values: Any) -> None:
    """Show a message of level WARN."""
    _say(WARN, "WARN", message, *values)


def deprecation(message: str, *values: Any) -> None:
    """Show that something is deprecated; level WARN."""
    _say(WARN, "WARN", message, *values)


def error(message: str, *values: Any) -> None:
    """Show a message of level ERROR."""
    _say(ERROR, "ERROR", message, *values)
