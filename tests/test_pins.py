"""Short runs of every algorithm file end with the pinned weights; see scripts/pin_runs.py."""

import importlib
import json

import pytest
import torch
from kinds import with_slow

from corl import machine
from corl.config import parse_config
from scripts import pin_runs

PINS = json.loads(pin_runs.PINS.read_text())
DECIDE = ("torch", "numpy", "gymnasium", "mujoco")


def pinned_here(record):
    """Is this the processor with the versions that the digests were made with?"""
    versions = machine.versions()
    same = all(versions[k] == record["versions"][k] for k in DECIDE)
    here = machine.describe()["processor"], torch.backends.cpu.get_cpu_capability()
    return same and here == (record["processor"], record["instructions"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


# The first case of each algorithm; its other settings are slow instances.
FIRST = {algorithm: name for name, (algorithm, _) in reversed(pin_runs.CASES.items())}


@pytest.mark.parametrize("name", with_slow(FIRST.values(), pin_runs.CASES))
def test_a_short_run_ends_with_the_pinned_weights(name, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CORL_DARE_CACHE", str(cache))
    module = importlib.import_module(f"algorithms.{pin_runs.CASES[name][0]}")
    module.train(parse_config(module.TrainConfig, pin_runs.arguments(name, tmp_path)))
    found, pinned = pin_runs.numbers_of(next(tmp_path.iterdir())), PINS["runs"][name]
    assert found["sums"].keys() == pinned["sums"].keys()
    for part, (total, absolute) in pinned["sums"].items():
        # 100 updates of float32: what other processors round otherwise stays below this.
        assert found["sums"][part] == pytest.approx(
            [total, absolute], rel=1e-3, abs=1e-3 * absolute + 1e-6
        ), part
    if pinned_here(PINS):
        assert found["dataset"] == pinned["dataset"]
        assert found["networks"] == pinned["networks"]


def test_every_case_is_pinned_and_no_two_are_the_same():
    assert list(PINS["runs"]) == list(pin_runs.CASES)
    digests = [pinned["networks"] for pinned in PINS["runs"].values()]
    assert len(set(digests)) == len(digests)
