"""TODO corl.config"""

import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyrallis
import yaml

RESUME_MAY_CHANGE = ("resume", "online_iterations", "wandb_mode", "device")


class ConfigError(ValueError):
    """Bad settings; the message is one line that names the field and the fix."""


def parse_config(
    config_class: type, argv: Sequence[str] | None = None, ignore: Sequence[str] = ()
) -> Any:
    """`--config FILE` and `--field value` flags -> an instance of the config dataclass.

    Flags win over the file; `--config_path` is CORL's spelling of `--config`; nested fields are
    `--dare.cap 32`. `--resume RUN` takes the run's own config. Bad input ends the program with
    one line and exit status 2.

    Args:
        config_class: dataclass with defaults.
        argv: arguments without the program's name; default: the command line's.
        ignore: blocks of a shared file that are another algorithm's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print("--config FILE reads a YAML file; flags win over it.\n")
        pyrallis.argparsing.ArgumentParser(config_class).print_help()
        raise SystemExit(0)
    try:
        return _parse(config_class, argv, ignore)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parse(config_class: type, argv: list[str], ignore: Sequence[str]) -> Any:
    flags = _read_flags(argv)
    files = [flags.pop(name) for name in ("config", "config_path") if name in flags]
    origin = "the command line"
    values: dict[str, Any] = {}
    if flags.get("resume"):
        folder = Path(str(flags["resume"]))
        other = [f for f in flags if f not in RESUME_MAY_CHANGE] + files
        if other:
            raise ConfigError(
                f"--resume uses the run's own config; leave out {other[0]} (only "
                f"{', '.join(RESUME_MAY_CHANGE[1:])} may change)"
            )
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"--resume {folder}: no run here (no config.yaml)")
        files = [str(folder / "config.yaml")]
    for file in files:
        origin = str(file)
        values.update(read_yaml(Path(str(file))))
    for name in ignore:
        if name in values:
            print(f"{origin}: block '{name}' is not for this algorithm and left out")
            del values[name]
    _check(config_class, values, origin)
    if values.get("resume") and "resume" not in flags:
        raise ConfigError(f"{origin}: resume is a flag, --resume RUN; take it out here")
    for name, value in flags.items():
        target = values
        *blocks, last = name.split(".")
        for block in blocks:
            if not isinstance(target.get(block), dict):
                target[block] = {}
            target = target[block]
        target[last] = value
    return _build(config_class(), _check(config_class, values, "command line"))


class _Text(str):
    """What a flag was given: the field's type decides how it is read."""


def _read_flags(argv: list[str]) -> dict[str, _Text]:
    flags, i = {}, 0
    while i < len(argv):
        match = re.fullmatch(r"--([\w.]+)(?:=(.*))?", argv[i], re.DOTALL)
        if match is None:
            raise ConfigError(f"cannot read {argv[i]!r}; write --field value")
        name, value = match.groups()
        if value is None:
            i += 1
            if i == len(argv) or argv[i].startswith("--"):
                raise ConfigError(f"--{name} needs a value")
            value = argv[i]
        flags[name] = _Text(value)
        i += 1
    return flags


def read_yaml(path: Path) -> dict[str, Any]:
    """The top-level fields of a YAML file; a file that holds something else raises."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{path} is not readable YAML: {text}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{path} must hold `field: value` lines")
    return values or {}


def _check(config_class: type, values: dict, origin: str, prefix: str = "") -> dict:
    """The values as the fields' types; unknown fields and wrong types raise."""
    known = typing.get_type_hints(config_class)
    checked = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else ""
            raise ConfigError(f"{origin}: unknown field {prefix}{name}{hint}")
        kind = known[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict | None):
                raise ConfigError(f"{origin}: {prefix}{name} must be a block of fields")
            checked[name] = _check(kind, value or {}, origin, f"{prefix}{name}.")
        else:
            checked[name] = _as_type(value, kind, f"{origin}: {prefix}{name}")
    return checked


def _as_type(value: Any, kind: Any, name: str) -> Any:
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType)
    if optional:
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        kind = kinds[0]
        none = isinstance(value, _Text) and value.lower() in ("", "~", "null", "none")
        if value is None or none or (value == "" and kind is not str):
            return None
    if isinstance(value, _Text) and kind is bool:
        value = yaml.SafeLoader.bool_values.get(value.lower(), value)
    try:
        if isinstance(value, bool):
            if kind is bool:
                return value
        elif kind is int:
            whole = re.fullmatch(r"[+-]?\d+", str(value))
            number = int(value) if whole else float(value)
            if number == int(number):
                return int(number)
        elif kind is float:
            # YAML 1.1 reads 3e-4 as a string
            number = float(str(value).replace(".inf", "inf"))
            if number == number:  # nan would pass the checks of __post_init__
                return number
        elif kind is str and isinstance(value, str | int | float):
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{name} must be {kind.__name__}, not {value!r}")


def _build(default: Any, values: dict) -> Any:
    """The default config with the values in place.

    A new one: what __post_init__ derived from the defaults must not pass for a given value.
    """
    nested = {
        name: _build(getattr(default, name), value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return type(default)(**nested)


def make_config(config_class: type, layers: Iterable[tuple[str, dict]]) -> Any:
    """A config from layers of values over the defaults; later layers win, field by field.

    Args:
        config_class: dataclass with defaults.
        layers: (where the values come from, nested values).

    Raises:
        ConfigError: an unknown field or a wrong type, named with its origin.
        ValueError: an impossible combination, from the config's own checks.
    """

    def merge(old: dict, new: dict) -> dict:
        blocks = {
            k: merge(old.get(k, {}), v) for k, v in new.items() if isinstance(v, dict)
        }
        return {**old, **new, **blocks}

    values: dict[str, Any] = {}
    for origin, layer in layers:
        values = merge(values, _check(config_class, layer, origin))
    return _build(config_class(), values)


def dump_config(config: Any) -> str:
    """YAML of every field, sorted; `parse_config --config` of it gives an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=True)


def main(
    train: Callable[[Any], Any], config_class: type, ignore: Sequence[str] = ()
) -> None:
    """The command line of an algorithm file: config, `train`, errors as one line.

    Set CORL_DARE_TRACEBACK=1 to see where an error came from.
    """
    config = parse_config(config_class, ignore=ignore)
    try:
        train(config)
    except KeyboardInterrupt as stop:
        print(": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        if os.environ.get("CORL_DARE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
