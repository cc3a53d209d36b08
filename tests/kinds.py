"""Which algorithms `make test` runs in tests that take long and say the same of every algorithm.

Those of `STANDS_FOR_ITS_KIND`. All others have the mark `whole` in such a test and run with
`make test-slow`, a new algorithm too, until somebody names it here. What is cheap runs for all of
them: an update against its oracle, the pinned run, the wiring of a run, imports and configs.
"""

import re
from pathlib import Path

import pytest

ALGORITHMS = {p.stem for p in Path(__file__).parent.parent.glob("algorithms/[a-z]*.py")}
STANDS_FOR_ITS_KIND = {
    # What others are built on.
    *("iql", "cql", "td3_bc", "awac", "rebrac", "spot"),
    # Methods with machinery of their own, once each.
    *(
        "dare_iql",
        "dare_cal_ql",
        "edis_iql",
        "cfdg_iql",
        "pex",
        "famo2o_iql",
        "td3_bc_sa",
    ),
    *("baq_cal_ql", "e2o", "rlpd", "wsrl", "opt_td3"),
}
assert STANDS_FOR_ITS_KIND <= ALGORITHMS


def algorithm_of(case):
    """The algorithm of a case: a module, a name, or a name with more words, as "iql, compat"."""
    name = getattr(case, "__name__", case).removeprefix("algorithms.")
    name = re.split("[, ]", name)[0]
    assert name in ALGORITHMS, f"{name!r} is no file of algorithms/"
    return name


def one_of_each_kind(cases, by=0):
    """Cases for `pytest.mark.parametrize`, where those of other algorithms are `whole`.

    Args:
        cases: see `algorithm_of`; or tuples that hold such a one at the place `by`.
    """
    found = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        short = algorithm_of(values[by]) in STANDS_FOR_ITS_KIND
        found.append(pytest.param(*values, marks=() if short else pytest.mark.whole))
    return found


def with_slow(fast, every):
    """Cases for `pytest.mark.parametrize`, where those that are not in `fast` are `whole`."""
    every = list(every)
    assert all(case in every for case in fast)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in fast else pytest.mark.whole,
        )
        for case in every
    ]
