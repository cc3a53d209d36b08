"""Where the number of a field may lie, written as in mathematics: `[0, 1)`, `(0, inf)`.

A config says it in a table beside its fields, `RANGES = {"discount": "[0, 1]"}`. The host and the
plugin each have this file, since neither imports the other; a test compares them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def contains(interval: str, value: float) -> bool:
    """Does the number lie in the interval? A nan lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def check(
    ranges: Mapping[str, str], values: Mapping[str, Any], prefix: str = ""
) -> None:
    """Refuse a number outside its range. Networks compute in float32, so that must lie in it, too.

    Args:
        ranges: field -> interval.
        values: field -> number; other fields and None are left alone.
        prefix: what stands before the field's name in the error.

    Raises:
        ValueError: one line that names the field, its range and the value.
    """
    for field, interval in ranges.items():
        value = values.get(field)
        if value is None:
            continue
        said = str(value) if abs(value) < 1e100 else f"{float(value):g}"
        if isinstance(value, float):
            with np.errstate(over="ignore"):
                rounded = float(np.float32(value))
            if contains(interval, value) and not contains(interval, rounded):
                said += f", which is {rounded:g} in float32"
                value = rounded
        if not contains(interval, value):
            raise ValueError(f"{prefix}{field} must lie in {interval}, not {said}")
