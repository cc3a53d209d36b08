"""YAML files of settings, read so that nothing in them can surprise.

Plain values only: no tags, no field twice, no alias that stands for a mountain of values. Numbers
are decimal as in flags, so 010 is ten and 1:30 is a text (YAML 1.1 reads 8 and 90).
"""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

LARGEST = 256_000  # bytes of a file
MOST_VALUES = 100_000  # each alias counts as all that it stands for
DEEPEST = 30  # blocks in blocks
TAG = "tag:yaml.org,2002:"
PLAIN = {TAG + kind for kind in "null bool int float str seq map merge".split()}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with numbers that are decimal, and dates that are texts."""


_KEPT = {TAG + kind for kind in "null bool merge".split()}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{TAG}int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    f"{TAG}float",
    re.compile(
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def load(path: Path) -> dict[Any, Any]:
    """The top-level fields of a YAML file; an empty file has none.

    Raises:
        ValueError: no such file, no UTF-8, no YAML, a field twice, or what is named above. One
            line that names the file.
    """
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist, or is no file")
    if path.stat().st_size > LARGEST:
        raise ValueError(
            f"{path} is larger than {LARGEST} bytes, so it is no file of settings"
        )
    try:
        values = _construct(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not readable YAML: byte {error.start} is not UTF-8; save the file as "
            "UTF-8 text"
        ) from None
    except RecursionError:
        raise ValueError(f"{path} is not readable YAML: too deeply nested") from None
    # A tag that does not fit its value fails in PyYAML in many ways.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path} is not readable YAML: {text[:300]}") from None
    if not isinstance(values, dict | None):
        raise ValueError(f"{path} must hold `field: value` lines")
    return values or {}


def _construct(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, 0, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, depth: int, counts: dict[int, int]) -> int:
    """Values in a node, with each alias as what it stands for; what is not plain raises."""
    line = f"line {node.start_mark.line + 1}"
    if node.tag not in PLAIN:
        tag = node.tag.replace(TAG, "!!")
        raise ValueError(f"{line}: the tag {tag} is not read; write the plain value")
    if depth > DEEPEST:
        raise ValueError(f"{line}: more than {DEEPEST} blocks in each other")
    if id(node) in counts:
        return counts[id(node)]
    # Met again on the way down, it holds itself.
    counts[id(node)] = MOST_VALUES
    children = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = list(chain(*node.value))
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    total = 1 + sum(_count(child, depth + 1, counts) for child in children)
    if total > MOST_VALUES:
        raise ValueError(
            f"{line}: more than {MOST_VALUES} values, aliases counted as what they stand for"
        )
    counts[id(node)] = total
    return total


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"line {line}: the name of a field must be a word")
        if key.value in lines:
            raise ValueError(
                f"{key.value} is there twice, in lines {lines[key.value]} and {line}; "
                "take one out"
            )
        lines[key.value] = line
