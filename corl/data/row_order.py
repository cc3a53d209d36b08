"""Does the order of a file's rows agree with the next observations that it stores?

D4RL's rule takes the following row's observation as the next one and reads no stored one. That is
right only where the rows stand in the order in which they were made. Where a row carries no flag
and is still not followed by its next observation, there is a seam: an episode was cut without a
flag, or the rows were shuffled.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from corl import tasks
from corl.data import schema
from corl.data.hdf5 import BadData

# A coordinate may differ by this share of its size (of 1, where it is smaller).
TOLERANCE = 1e-4
# Above this share of seams the pieces have ten rows and fewer and are no episodes.
MOST_SEAMS = 0.1
# A stored next state is a true one if it lies nearer to its own state than the following row's
# state does. For the wrong neighbour's state that is a coin flip.
TRUE_SHARE = 0.75
# Rows that are compared in one go, and rows that `TRUE_SHARE` is judged by at most.
BLOCK = 1 << 12
JUDGED = 10_000


class RowOrder(NamedTuple):
    """What is known of a file's row order.

    kind: `unknown` without stored next states, `in order`, `cut` or `shuffled`; `D4RL's` for its
        own bytes with seams, which are read by its rules all the same.
    seams: rows without a flag that are not followed by their next observation.
    """

    kind: str
    seams: int = 0

    def describe(self) -> str:
        """A line for the card."""
        if self.kind == "unknown":
            return "taken as stored: there are no next_observations to compare with"
        if not self.seams:
            return "each row without a flag is followed by its next observation"
        return f"{self.kind}; {self.seams} row(s) without a flag are not followed by their own"

    def warning(self) -> str:
        """What a reader of the run has to know; empty where there is nothing."""
        if self.kind == "cut":
            return (
                f"episodes are cut without a flag at {self.seams} row(s), which count as "
                "time-outs; next states are the stored ones"
            )
        if self.kind == "shuffled":
            return (
                f"the rows are shuffled ({self.seams} are not followed by their next "
                "observation): next states are the stored ones, and there are no episodes"
            )
        return ""


def settle(
    raw: dict[str, np.ndarray],
    task: tasks.Task,
    path: Path | str,
    d4rls_own: bool = False,
) -> RowOrder:
    """Find the seams of raw rows and make the rows agree with them.

    Where there are seams, `raw` is changed. Time-outs then mark the seams, too (of shuffled rows
    they stay as they are), and `next_observations` are those of the following row to the bit
    wherever that row is the next one.

    Args:
        raw: arrays of `schema.validate`, N rows.
        path: names the data in errors.
        d4rls_own: seams are only counted, because published scores are of these rows as D4RL's
            rules read them.

    Raises:
        BadData: the stored next states contradict the row order and are no next states either.
    """
    if "next_observations" not in raw:
        if not task.is_d4rls and "timeouts" not in raw:
            raw["timeouts"] = _cut_by_time(raw["terminals"], task.horizon)
        return RowOrder("unknown")
    differs = _differs(raw["observations"], raw["next_observations"])
    # D4RL's step counter, which stands in for missing flags, is a rule for its own files.
    counted = task.is_d4rls or "timeouts" in raw
    ends = raw["terminals"] | (schema.timeout_flags(raw, task.horizon) & counted)
    seams = differs & ~ends
    count = int(seams.sum())
    if not count:
        if not task.is_d4rls:
            raw.setdefault("timeouts", np.zeros_like(raw["terminals"]))
        return RowOrder("in order")
    if d4rls_own:
        return RowOrder("D4RL's", count)
    _require_true_next_states(raw, differs & ~raw["terminals"], count, path)
    follows = np.flatnonzero(~differs[:-1])
    raw["next_observations"][follows] = raw["observations"][follows + 1]
    if count > MOST_SEAMS * int((~ends[:-1]).sum()):
        return RowOrder("shuffled", count)
    # D4RL's step counter stands in for missing flags, and true ends are better than its guess.
    flags = raw.get("timeouts", differs & ~raw["terminals"])
    raw["timeouts"] = flags | seams
    return RowOrder("cut", count)


def _cut_by_time(terminals: np.ndarray, horizon: int) -> np.ndarray:
    """Time-outs (N,): every `horizon` rows after the start of an episode, which no row says."""
    rows = np.arange(len(terminals))
    starts = np.where(np.append(True, terminals[:-1]), rows, 0)
    position = rows - np.maximum.accumulate(starts)
    return ((position + 1) % horizon == 0) & ~terminals


def _differs(states: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Rows (N,) whose stored next state (N, S) is not the state (N, S) of the row after it.

    The last row has none after it and is not one of them.
    """
    differs = np.zeros(len(states), dtype=bool)
    for start in range(0, len(states) - 1, BLOCK):
        stop = min(start + BLOCK, len(states) - 1)
        stored, next_row = following[start:stop], states[start + 1 : stop + 1]
        with np.errstate(over="ignore"):
            gap = np.abs(stored - next_row)
        allowed = TOLERANCE * np.maximum(np.abs(next_row), 1.0)
        differs[start:stop] = (gap > allowed).any(1)
    return differs


def _require_true_next_states(
    raw: dict[str, np.ndarray], relied_on: np.ndarray, seams: int, path: Path | str
) -> None:
    """Raise where the stored next states of the rows `relied_on` (N,) cannot be true ones."""
    rows = np.flatnonzero(relied_on)
    rows = rows[:: -(-len(rows) // JUDGED)]
    states = raw["observations"][rows].astype(np.float64)
    scale = states.std(0)
    scale[scale == 0] = 1.0

    def distance(others: np.ndarray) -> np.ndarray:
        return np.linalg.norm((others - states) / scale, axis=1)

    stored = distance(raw["next_observations"][rows])
    next_row = distance(raw["observations"][rows + 1])
    true = (stored > 0) & (stored < next_row)
    if true.mean() < TRUE_SHARE:
        raise BadData(
            f"{path}: next_observations contradict the row order in {seams} row(s) without a "
            f"flag (first: row {int(np.flatnonzero(relied_on)[0])}), and only {true.mean():.0%} of "
            "them lie nearer to their own state than the following row does, so they are no "
            "next states either; mend next_observations, or remove it if the order is right"
        )
