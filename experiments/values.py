"""Nested values: settings as one flat dict, and JSON files as they are read and written here."""

import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Bounds of a JSON file that we read: bytes, objects and lists in each other, whole numbers.
LARGEST = 50_000_000
DEEPEST = 50
LARGEST_NUMBER = 2**63 - 1
# What a type is called in an error.
WORDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"dare": {"cap": 3}}` as `{"dare.cap": 3}`."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def plain(value: Any) -> Any:
    """Settings as JSON can hold them: an infinite bound as text."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def read_json(
    path: Path,
    fix: str = "make it again",
    missing: dict[str, Any] | None = None,
    form: Any = dict,
    finite: bool = True,
) -> dict[str, Any]:
    """The object in a JSON file, whose values are of the types that are expected.

    Args:
        path: the file.
        fix: what to do if there is no such file or it is damaged; ends the error's line.
        missing: what to return where there is no such file; none: that is an error.
        form: the type that is expected, see `check_form`.
        finite: NaN and Infinity, which are no JSON, are refused.

    Raises:
        ValueError: no file, no JSON, JSON of another form, or a file too large or too deeply
            nested to be one of ours.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST // 10**6} MB")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
        _check_plain(value, finite)
        check_form(value, form, "")
    except (FileNotFoundError, NotADirectoryError):
        if missing is not None:
            return missing
        raise ValueError(f"{path} does not exist: {fix}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {fix}") from None
    except RecursionError:
        raise ValueError(f"{path} is damaged (too deeply nested); {fix}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {fix}") from None
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; a name that is there twice raises."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is there twice")
    return found


def _check_plain(value: Any, finite: bool) -> None:
    """Raise where values are nested too deeply or a number is none that we write."""
    level = [("", value)]
    for _ in range(DEEPEST):
        inner = []
        for where, item in level:
            if isinstance(item, int) and abs(item) > LARGEST_NUMBER:
                raise ValueError(f"{where} is a whole number of more than 63 bits")
            if finite and isinstance(item, float) and not math.isfinite(item):
                raise ValueError(f"{where} is {item}, which is no number")
            if isinstance(item, dict):
                inner += [(f"{where}.{k}" if where else k, v) for k, v in item.items()]
            elif isinstance(item, list):
                inner += [(f"{where}[{i}]", v) for i, v in enumerate(item)]
        level = inner
        if not level:
            return
    raise ValueError("too deeply nested")


def check_form(value: Any, form: Any, where: str) -> None:
    """Raise where a value of a JSON file is not of its type.

    Args:
        value: as `json` reads it.
        form: a type: dict, list, str, int, float (whole numbers, too), bool, None, Any; list[X],
            dict[str, X], X | Y, Literal; a TypedDict, whose objects may have other fields, too.
        where: the place of the value in the file, for the error.

    Raises:
        ValueError: one line that names the place.
    """
    origin, inner = typing.get_origin(form), typing.get_args(form)
    if form is Any:
        return
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return
        (form,) = (kind for kind in inner if kind is not type(None))
        check_form(value, form, where)
    elif origin is typing.Literal:
        if value not in inner or isinstance(value, bool):
            raise ValueError(f"{where} must be {' or '.join(inner)}, not {shown(value)}")
    elif typing.is_typeddict(form):
        _check_type(value, dict, where)
        for name in sorted(form.__required_keys__ - value.keys()):
            raise ValueError(f"{where or 'the object'} lacks {name}")
        for name, kind in typing.get_type_hints(form).items():
            if name in value:
                check_form(value[name], kind, f"{where}.{name}" if where else name)
    elif origin is list:
        _check_type(value, list, where)
        for i, item in enumerate(value):
            check_form(item, inner[0], f"{where}[{i}]")
    elif origin is dict:
        _check_type(value, dict, where)
        for name, item in value.items():
            check_form(item, inner[1], f"{where}.{name}" if where else name)
    else:
        _check_type(value, form, where)


def _check_type(value: Any, kind: type, where: str) -> None:
    # True is a whole number to Python.
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits and not (kind is float and type(value) is int):
        raise ValueError(
            f"{where or 'the file'} must be {WORDS[kind]}, not {shown(value)}"
        )


def shown(value: Any) -> str:
    """A value for an error: in one line, and not all of a long one."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
