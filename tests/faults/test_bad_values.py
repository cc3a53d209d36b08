"""A value of a field that cannot be meant ends in one line, before any work."""

import harness
import pytest

from algorithms import iql

pytestmark = pytest.mark.fault("bad inputs")


@pytest.mark.parametrize(
    "field, value", [("batch_size", "0"), ("env", "hoper-medium-v2")]
)
def test_a_bad_value_is_refused_by_name(field, value, good, tmp_path):
    flags = harness.short_run(tmp_path, good, **{field: value})
    outcome = harness.run(harness.algorithm(iql), *flags)
    harness.assert_refused(outcome, field, value)
    assert not (tmp_path / "runs").exists()


def test_a_good_run_ends_well(good, tmp_path):
    flags = harness.short_run(tmp_path, good)
    outcome = harness.run(harness.algorithm(iql), *flags)
    assert outcome.status == 0, outcome
