"""Our updates end with the numbers of CORL's own programs, without a CORL checkout.

tests/golden/corl.json holds what `scripts/golden_corl.py` got from CORL's files.
"""

import json

import pytest
import torch

from corl import machine
from scripts import golden_corl, make_patches

GOLDEN = json.loads(golden_corl.GOLDEN.read_text())
# Without the processor's vector instructions the largest differences are 3e-8 for IQL and 9e-5 for
# CQL, and 1e-7 and 3e-3 of the sums; an update moves a weight by about 3e-4.
# File -> how far a weight may be off, and the share by which a sum may.
TOLERANCES = {
    "iql": (1e-6, 1e-5),
    "td3_bc": (1e-6, 1e-5),
    "awac": (1e-6, 1e-5),
    "spot": (1e-6, 1e-5),
    "dare_iql": (1e-6, 1e-5),
    "dare_awac": (1e-6, 1e-5),
    "dare_spot": (1e-6, 1e-5),
    "cql": (3e-4, 1e-2),
    "cal_ql": (3e-4, 1e-2),
    "dare_cal_ql": (3e-4, 1e-2),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    machine.configure_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_golden_numbers_name_their_origin():
    assert golden_corl.PARTS.keys() == TOLERANCES.keys()
    assert GOLDEN["corl"] == make_patches.COMMIT
    assert GOLDEN["command"] in golden_corl.__doc__
    assert (GOLDEN["updates"], GOLDEN["rows"]) == (golden_corl.UPDATES, golden_corl.ROWS)


@pytest.mark.parametrize("part", TOLERANCES)
def test_our_updates_end_with_the_numbers_of_corls_program(part):
    near, share = TOLERANCES[part]
    found = golden_corl.cases_of(part, None)
    expected = {k: v for k, v in GOLDEN["cases"].items() if k in found}
    # The names begin with that of the file; those of DARE go on with "patched".
    named = {k for k in GOLDEN["cases"] if k.split(",")[0].split()[0] == part}
    assert set(found) == named and named
    for case, golden in expected.items():
        ours = found[case]
        assert ours["parameters"].keys() == golden["parameters"].keys(), case
        for name, (total, absolute, *samples) in golden["parameters"].items():
            got_total, got_absolute, *got = ours["parameters"][name]
            where = f"{case}: {name}"
            assert got == pytest.approx(samples, abs=near, rel=0), where
            sums = pytest.approx([total, absolute], abs=share * absolute + 1e-9, rel=0)
            assert [got_total, got_absolute] == sums, where
        if golden_corl.made_here(GOLDEN):
            assert ours["sha256"] == golden["sha256"], f"{case}: not to the bit"
