"""The drop of the score at the switch to the online phase: how deep it is, and when it is over.

One function for a run's summary and picture and for the pages of results.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Phase of the evaluation at the switch, see the field `eval_switch`.
SWITCH = "switch"
# Evaluations of a moving mean.
WINDOW = 3


class Drop(NamedTuple):
    """What the switch costs; scores D4RL-normalized, steps of the online phase.

    Attributes:
        before: score at the switch.
        depth: `before` minus the lowest moving mean of three online evaluations; below 0 where
            even that is above `before`.
        depth_step: of the last evaluation of that moving mean.
        recovery: step of the last evaluation of the first moving mean at or above `before`;
            None: there was none within the budget.
        budget: step of the last evaluation, to which a recovery that was not seen is censored.
    """

    before: float
    depth: float
    depth_step: int
    recovery: int | None
    budget: int

    @property
    def censored_recovery(self) -> int:
        """The recovery, or the budget where there was none."""
        return self.budget if self.recovery is None else self.recovery


def drop_at_the_switch(
    before: float | None, steps: Sequence[int], scores: Sequence[float]
) -> Drop | None:
    """The drop of a run, or None where its score before is unknown or it has too few evaluations.

    Args:
        before: mean score of the evaluation at the switch.
        steps: (T,) of the online evaluations, counted from the switch and rising.
        scores: (T,) their mean scores.
    """
    if before is None or len(scores) < WINDOW:
        return None
    means = np.lib.stride_tricks.sliding_window_view(scores, WINDOW).mean(-1)
    ends = steps[WINDOW - 1 :]
    lowest = int(np.argmin(means))
    again = np.flatnonzero(means >= before)
    recovery = int(ends[again[0]]) if len(again) else None
    depth = float(before - means[lowest])
    return Drop(float(before), depth, int(ends[lowest]), recovery, int(steps[-1]))


def score_before(scores: Sequence[Sequence[Any]]) -> float | None:
    """The score before of rows (step, phase, score): at the switch, else the last offline one."""
    for wanted in (SWITCH, "offline"):
        found = [score for _, phase, score in scores if phase == wanted]
        if found:
            return float(found[-1])
    return None


def drop_of(scores: Sequence[Sequence[Any]], switch: int) -> Drop | None:
    """The drop of rows (step, phase, score) of a run whose online phase begins at `switch`."""
    online = [(step, score) for step, phase, score in scores if phase == "online"]
    steps = [int(step) - switch for step, _ in online]
    values = [float(score) for _, score in online]
    return drop_at_the_switch(score_before(scores), steps, values)
