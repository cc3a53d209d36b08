"""Values from files, flags and presets, laid over each other, become a config.

Every value is checked against its field's type and range, and every error is one line that names
the place, the field and the fix. A config is any dataclass with defaults; what a class may have
beside its fields (`RANGES`, `ALIASES`, `PRESETS`, `PATHS`) is described at `FinetuneConfig`.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from corl import ranges, yaml_files


class ConfigError(ValueError):
    """Bad settings; the message is one line that names the field and the fix."""


# What is meant by no value, in flags and in YAML, where a field may have none.
NOTHING = ("", "~", "null", "none")
# Control characters, and bytes of a command line that are no UTF-8.
NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# CORL's fields that we have otherwise -> what to do.
CORL_FIELDS = {
    "max_timesteps": "set offline_iterations to it, and online_iterations to 0 for an "
    "offline run",
    "env_name": "set env",
    "eval_frequency": "set eval_freq",
    "n_test_episodes": "set n_episodes",
    "test_seed": "set eval_seed",
    "gamma": "set discount",
    "critic_lr": "set qf_lr",
    "learning_rate": "set the rate of each network: actor_lr (policy_lr in CQL), qf_lr, vf_lr",
    "cql_min_q_weight": "set cql_alpha",
    "policy_log_std_multiplier": "leave it out, it is 1 here",
    "deterministic_torch": "leave it out",
    "num_epochs": "set offline_iterations to num_epochs times num_updates_on_epoch, and "
    "online_iterations to 0 for an offline run",
    "num_updates_on_epoch": "leave it out, and see offline_iterations",
    **dict.fromkeys(
        "alpha awac_lambda policy_noise policy_freq hidden_dim vae_lr vae_hidden_dim "
        "vae_latent_dim vae_iterations lambd num_samples iwae lambd_cool lambd_end "
        "actor_init_w critic_init_w online_discount".split(),
        "it belongs to another algorithm of CORL",
    ),
}


class FlagText(str):
    """What a flag was given: the field's type decides how it is read."""


def merged(old: dict, new: dict) -> dict:
    """Both, block by block; the new values win."""
    blocks = {
        k: merged(old[k] if isinstance(old.get(k), dict) else {}, v)
        for k, v in new.items()
        if isinstance(v, dict)
    }
    return {**old, **new, **blocks}


# ---------------------------------------------------------------- presets


def without_preset(config_class: Any, values: dict, origin: str) -> dict:
    """The values without `preset` where the algorithm has none; says so."""
    if "preset" not in values or getattr(config_class, "PRESETS", {}):
        return values
    print(f"{origin}: preset {values['preset']} changes nothing in this algorithm")
    return {k: v for k, v in values.items() if k != "preset"}


def with_preset(config_class: Any, values: dict, origin: str) -> dict:
    """The values over those of the preset that they name.

    Raises:
        ConfigError: there is no such preset.
    """
    presets = getattr(config_class, "PRESETS", {})
    if "preset" not in values or not presets:
        return values
    name = str(values["preset"])
    if name not in presets:
        raise ConfigError(
            f"{origin}: preset must be one of {', '.join(presets)}, not {name!r}"
        )
    rest = {k: v for k, v in values.items() if k != "preset"}
    under = without_idle(config_class, presets[name], rest, f"preset {name}")
    return merged(under, rest)


def without_idle(
    config_class: Any, values: dict, later: dict, origin: str | None
) -> dict:
    """The values without fields of a block that a later choice leaves nothing to do.

    A block's class may have a table `IDLE`: field -> value -> fields. Where one place says both,
    the block itself refuses them.

    Args:
        origin: the place of the values, for the line that names what is left out; none: no line.
    """
    kept = dict(values)
    for block, kind in _field_types(config_class).items():
        given, chosen = values.get(block), later.get(block)
        if not isinstance(given, dict) or not isinstance(chosen, dict):
            continue
        for field, table in getattr(kind, "IDLE", {}).items():
            idle = table.get(chosen.get(field), ())
            left_out = [name for name in given if name in idle]
            if left_out and origin is not None:
                names = ", ".join(f"{block}.{name}" for name in left_out)
                print(
                    f"{origin}: with {block}.{field} {chosen[field]} these would do nothing and "
                    f"are left out: {names}"
                )
            kept[block] = {k: v for k, v in given.items() if k not in idle}
    return kept


def presets_of(config: Any) -> dict[str, Any]:
    """Name -> the config with that preset over it, of the presets that change something."""
    changed: dict[str, Any] = {}
    for name, values in type(config).PRESETS.items():
        # A preset need not fit this run.
        with suppress(ValueError):
            other = build(type(config), merged(dataclasses.asdict(config), values))
            if other != config:
                changed[name] = other
    return changed


def _flat(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values as (dotted name, value)."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def presets_help(config_class: Any) -> str:
    """What `--preset` takes and what each preset sets; "" for a config without presets."""
    presets = getattr(config_class, "PRESETS", {})
    if not presets:
        return ""
    lines = [
        "\n--preset NAME sets several fields; the other flags win over it. Presets:"
    ]
    for name, values in presets.items():
        fields = [f"{field} {value}" for field, value in _flat(values)]
        lines.append(f"  {name}: {', '.join(fields) or 'the fields as they are'}")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- names


def aliases_of(config_class: type) -> dict[str, str]:
    """Other spellings of a config's fields -> the fields."""
    return getattr(config_class, "ALIASES", {})


def with_field_names(
    config_class: type, values: dict[str, Any], origin: str
) -> dict[str, Any]:
    """The values under the names of the fields, where a file or a flag has another spelling.

    Raises:
        ConfigError: a field is given under both of its names.
    """
    aliases = aliases_of(config_class)
    named: dict[str, Any] = {}
    for key, value in values.items():
        field = aliases.get(key, key)
        if field in named:
            spellings = " and ".join(k for k in values if aliases.get(k, k) == field)
            raise ConfigError(
                f"{origin}: {spellings} are the same field; leave one of them out"
            )
        named[field] = value
    return named


def without_foreign_blocks(config_class: type, values: dict, origin: str) -> dict:
    """The values without the blocks of other algorithms that share the file.

    Says what it leaves out. A block whose name is nearly that of a known block stays, so that
    the check of unknown fields catches the slip.
    """
    known = _field_types(config_class)
    values = without_preset(config_class, values, origin)
    blocks = [name for name, kind in known.items() if dataclasses.is_dataclass(kind)]
    kept = {}
    for name, value in values.items():
        foreign = isinstance(value, dict) and name not in known
        if foreign and not difflib.get_close_matches(str(name), blocks, 1):
            print(f"{origin}: block '{name}' is not for this algorithm and left out")
        else:
            kept[name] = value
    return kept


def _field_types(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


# ---------------------------------------------------------------- files and paths


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The top-level fields of a YAML file; see `yaml_files.load`.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        return yaml_files.load(expand(path))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def expand(path: Path | str) -> Path:
    """The path with ~ as the home folder."""
    # Path.expanduser raises for a user that does not exist; here the path does not exist.
    return Path(os.path.expanduser(path))


def with_absolute_paths(config: Any) -> Any:
    """The config with `PATHS` as absolute paths, which mean the same in every folder."""
    named = {name: getattr(config, name) for name in getattr(config, "PATHS", ())}
    found = {k: v for k, v in named.items() if v and not _is_minari_id(config, k, v)}
    absolute = {k: os.path.abspath(expand(v)) for k, v in found.items()}
    return dataclasses.replace(config, **absolute)


def _is_minari_id(config: Any, name: str, value: str) -> bool:
    minari = config.dataset_source == "minari" or value.startswith("minari:")
    return name == "dataset_path" and minari


# ---------------------------------------------------------------- values


def check(config_class: type, values: dict, origin: str, prefix: str = "") -> dict:
    """The values as the fields' types.

    Raises:
        ConfigError: an unknown field, a wrong type or a number out of its range.
    """
    known = _field_types(config_class)
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(
                f"{origin}: unknown field {prefix}{_cut(str(name)) or repr(name)}"
                f"{_hint(name, known, prefix)}"
            )
        kind = known[name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, dict | None):
                raise ConfigError(f"{origin}: {prefix}{name} must be a block of fields")
            checked[name] = check(kind, value or {}, origin, f"{prefix}{name}.")
        else:
            checked[name] = _as_type(value, kind, f"{origin}: {prefix}{name}")
    # Once more when the config is made; here the error can name the place.
    try:
        ranges.check(getattr(config_class, "RANGES", {}), checked, f"{origin}: {prefix}")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return checked


def _hint(name: Any, known: Iterable[str], prefix: str) -> str:
    """What to do about an unknown field."""
    if not prefix and name in CORL_FIELDS:
        return f" (a field of CORL's); {CORL_FIELDS[name]}"
    close = difflib.get_close_matches(str(name)[:99], list(known), 1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, and not longer than that."""
    return _cut(repr(str(value) if isinstance(value, str) else value))


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _as_type(value: Any, kind: Any, name: str) -> Any:
    """The value as a field of this type has it, the same from a flag and from YAML."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        if len(kinds) > 1:
            return _as_one_of(value, kinds, name)
        kind = kinds[0]
        none = isinstance(value, str) and value.strip().lower() in NOTHING
        if value is None or none:
            return None
    found: Any = None
    if kind is bool:
        found = value
        if isinstance(value, FlagText):
            found = yaml.SafeLoader.bool_values.get(value.strip().lower())
        found = found if isinstance(found, bool) else None
    elif kind in (int, float):
        found = as_number(value, kind)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        found = str(value)
        if len(found) > 1000 or NO_TEXT.search(found):
            raise ConfigError(
                f"{name} must be a line of at most 1000 characters, not {shown(value)}"
            )
    if found is None:
        raise ConfigError(f"{name} must be {kind.__name__}, not {shown(value)}")
    return found


def as_number(value: Any, kind: type) -> Any:
    """The value as int or float, or None where it is no such number.

    Texts are decimal numbers of ASCII digits, `1e3` and `1_000` among them. A nan is no number:
    it would pass every comparison.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, str):
        if not value.isascii() or len(value) > 400:
            return None
        # YAML writes infinity with a point before it.
        value = value.strip().lower().replace(".inf", "inf")
    try:
        if kind is int and re.fullmatch(r"[+-]?\d+", str(value)):
            return int(value)
        number = float(value)
        if kind is int:
            return int(number) if number == int(number) else None
        return number if number == number else None
    except (ValueError, OverflowError):
        return None


def _as_one_of(value: Any, kinds: Sequence[type], name: str) -> Any:
    """The value as the first of the kinds that it fits; the last kind takes any text."""
    for kind in kinds:
        with suppress(ConfigError):
            return _as_type(value, kind, name)
    raise ConfigError(
        f"{name} must be {' or '.join(k.__name__ for k in kinds)}, not {value!r}"
    )


# ---------------------------------------------------------------- configs


def build(config_class: type, values: dict) -> Any:
    """A config of the values; nested ones are the dataclasses of their blocks."""
    kinds = _field_types(config_class)
    nested = {
        name: build(kinds[name], value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return config_class(**nested)


def make_config(config_class: type, layers: Iterable[tuple[str, dict]]) -> Any:
    """A config from layers of values over the defaults; later layers win, field by field.

    Args:
        config_class: dataclass with defaults.
        layers: (where the values come from, nested values).

    Raises:
        ConfigError: an unknown field or a wrong type, named with its origin.
        ValueError: an impossible combination, from the config's own checks.
    """

    layers = list(layers)
    values: dict[str, Any] = {}
    for number, (origin, layer) in enumerate(layers):
        layer = with_field_names(config_class, layer, origin)
        # A later preset replaces an earlier one.
        if any("preset" in later for _, later in layers[number + 1 :]):
            layer = {k: v for k, v in layer.items() if k != "preset"}
        layer = with_preset(config_class, layer, origin)
        values = without_idle(config_class, values, layer, origin)
        values = merged(values, check(config_class, layer, origin))
    return build(config_class, values)


def dump_config(config: Any) -> str:
    """YAML of every field, sorted; `parse_config --config` of it gives an equal config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=True)
