"""Nested values: settings as one flat dict, and JSON files as they are read and written here."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"dare": {"cap": 3}}` as `{"dare.cap": 3}`."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def plain(value: Any) -> Any:
    """Settings as JSON can hold them: an infinite bound as text."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_json(
    path: Path, fix: str = "make it again", missing: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        fix: what to do if there is no such file or it is damaged; ends the error's line.
        missing: what to return where there is no such file; none: that is an error.

    Raises:
        ValueError: no file, no JSON, or JSON that is no object.
    """
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        if missing is not None:
            return missing
        raise ValueError(f"{path} does not exist: {fix}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {fix}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object; {fix}")
    return value


def dump_json(value: Any) -> str:
    """JSON with sorted keys, a list of numbers on one line; equal values, equal text."""

    def dump(value: Any, indent: str) -> str:
        inner = indent + " "
        nested = isinstance(value, list) and any(isinstance(v, dict) for v in value)
        if isinstance(value, dict) and value:
            items = [
                f"{json.dumps(str(k))}: {dump(value[k], inner)}" for k in sorted(value)
            ]
            return "{\n" + inner + f",\n{inner}".join(items) + f"\n{indent}}}"
        if nested:
            items = [dump(v, inner) for v in value]
            return "[\n" + inner + f",\n{inner}".join(items) + f"\n{indent}]"
        return json.dumps(value, allow_nan=False)

    return dump(value, "") + "\n"
