"""A run killed at any moment goes on from its last checkpoint to the bits of an unbroken run.

The kill is an exception that nothing catches, raised in the middle of what happens at that moment;
tests/test_resume.py kills whole processes.
"""

import pytest
import wiring
from test_wiring import assert_same, without_losses

OFFLINE, EVERY = wiring.COMMON["offline_iterations"], wiring.COMMON["eval_freq"]
WARMUP, UTD = wiring.COMMON["online_warmup"], wiring.COMMON["utd"]
# Moment -> kind of the event in which the run dies, its number, its fields. Checkpoints are written
# every `EVERY` steps, so the first one is there before each of these moments.
MOMENTS = {
    "before the switch": ("update", OFFLINE, {}),
    "at the switch": ("step", 1, {"role": "train"}),
    "in the warm-up": ("step", WARMUP, {"role": "train"}),
    "after the switch": ("update", OFFLINE + 2 * UTD, {}),
    "between two updates of a step": ("update", OFFLINE + 3 * UTD + 1, {}),
    "while a later checkpoint is written": ("save", 3, {}),
    "in the training of the energy": ("energy", 3, {}),
}
CASES = [
    (name, moment)
    for name in wiring.ALGORITHMS
    for moment in MOMENTS
    if name in wiring.DARE or MOMENTS[moment][0] != "energy"
]


class Killed(BaseException):
    """Nobody catches it and nothing is saved."""


def kill_at(moment):
    kind, number, fields = MOMENTS[moment]

    def stop(record, event):
        if len(record.of(kind, **fields)) == number:
            raise Killed(moment)
        return False

    return stop


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return wiring.Recorder(lambda: tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name, moment", CASES)
def test_a_killed_run_ends_as_the_unbroken_one(name, moment, tmp_path, recorded):
    whole = recorded(name, env=wiring.GOAL)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        wiring.run(patch, name, tmp_path, kill_at(moment), env=wiring.GOAL)
    (folder,) = (tmp_path / "runs").iterdir()
    assert not (folder / "summary.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        options = {"env": wiring.GOAL, "resume": str(folder)}
        resumed = wiring.run(patch, name, tmp_path, **options)
    assert_same(whole.parts(), resumed.parts())
    assert whole.rows_of("evaluations.csv") == resumed.rows_of("evaluations.csv")
    rows = [
        list(map(without_losses, record.rows_of("metrics.csv")))
        for record in (whole, resumed)
    ]
    assert rows[0] == rows[1]
    assert resumed.summary["updates"] == whole.summary["updates"]
