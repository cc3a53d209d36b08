"""What all faults share: one good dataset, and no cache but one of their own."""

import pytest
from harness import good_rows, write_dataset


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A dataset file with nothing wrong."""
    return write_dataset(tmp_path_factory.mktemp("data") / "good.hdf5", good_rows())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Behavior models and stand-ins are kept in the folder of the test."""
    monkeypatch.setenv("CORL_DARE_CACHE", str(tmp_path / "cache"))
