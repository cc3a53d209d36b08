"""A run killed at any moment goes on from its last checkpoint to the bits of an unbroken run.

A kill leaves the run folder as it is at that moment, so one run, copied at every moment, gives all
the killed ones; tests/test_resume.py kills whole processes.
"""

import itertools
import shutil

import pytest
import wiring
from helpers import assert_equal
from kinds import one_of_each_kind
from test_wiring import without_losses

from corl import finetune

pytestmark = pytest.mark.narrow(16)
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
    # The row of the next step tells of an episode that ended before.
    "in the middle of an episode": ("step", 11, {"role": "train"}),
    "in the training of the energy": ("energy", 3, {}),
    # The second refresh: 4 updates of the model, 6 of energies, 2 batches of rows; in CFDG, whose
    # first one has 7 pieces, 8 updates and 3 batches.
    "in the fit of the diffusion model": ("piece", 6 + 3, {}),
    "in the training of three energies": ("piece", 6 + 6, {}),
    "among the generated rows": ("piece", 6 + 11, {}),
}
WHO = {"energy": wiring.DARE, "piece": wiring.GENERATES}
WITHOUT = {(name, "in the training of three energies") for name in wiring.CFDG}
# Nothing that an algorithm has of its own is lost at one of the other moments and not at this one,
# or at those of its energy or its refreshes.
OWN = "between two updates of a step"


def cases():
    """Every moment of IQL, the moments of its own of one of each kind; all others are `whole`."""
    for name, moment in itertools.product(wiring.ALGORITHMS, MOMENTS):
        kind = MOMENTS[moment][0]
        if name not in WHO.get(kind, wiring.ALGORITHMS) or (name, moment) in WITHOUT:
            continue
        (case,) = one_of_each_kind([(name, moment)])
        if not case.marks and name != "iql" and kind not in WHO and moment != OWN:
            case = pytest.param(*case.values, marks=pytest.mark.whole)
        yield case


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The unbroken run of an algorithm, and its folder as it was at each moment."""
    known = {}

    def get(name):
        if name not in known:
            known[name] = run_and_copy(name, tmp_path_factory.mktemp(name))
        return known[name]

    return get


def run_and_copy(name, folder):
    copies = {}

    def copy(record, event):
        for moment, (kind, number, fields) in MOMENTS.items():
            happened = event.kind == kind and len(record.of(kind, **fields)) == number
            if happened and moment not in copies:
                (run,) = (folder / "runs").iterdir()
                copies[moment] = shutil.copytree(run, folder / f"copy {len(copies)}")
        return False

    with pytest.MonkeyPatch.context() as patch:
        # A checkpoint after every piece of a refresh.
        patch.setattr(finetune, "SAVE_SECONDS", 0.0)
        return wiring.run(patch, name, folder, copy, env=wiring.GOAL), copies


@pytest.mark.parametrize("name, moment", list(cases()))
def test_a_killed_run_ends_as_the_unbroken_one(name, moment, killed):
    whole, copies = killed(name)
    folder = copies[moment]
    assert not (folder / "summary.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        options = {"env": wiring.GOAL, "resume": str(folder)}
        resumed = wiring.run(patch, name, folder.parent, **options)
    assert 0 < len(resumed.of("update")) < len(whole.of("update"))
    assert_equal(whole.parts(), resumed.parts())
    assert whole.rows_of("evaluations.csv") == resumed.rows_of("evaluations.csv")
    rows = [
        list(map(without_losses, record.rows_of("metrics.csv")))
        for record in (whole, resumed)
    ]
    assert rows[0] == rows[1]
    assert resumed.summary["updates"] == whole.summary["updates"]
