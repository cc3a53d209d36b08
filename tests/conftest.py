"""Options and marks of all tests. No test looks for data on the network.

A fault that a run may meet is a test with the mark `fault(kind)`. With `--all-faults`, which
`make faults` and `make test-slow` give, the many slow instances run too (mark `whole`), and the
last lines count the faults of each kind that ended as they should.

A test that needs what not everybody has is a test with the mark `optional(what)`. It is skipped
where that is missing; `make test-optional` installs it and runs these tests alone.
"""

import importlib.util
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

os.environ["CORL_DARE_D4RL_URL"] = ""
# Compiled graphs outlive the folder of a test.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"corl_dare_tests_{os.getuid()}"),
)
FAULT = (
    "fault"  # name of the mark, and of the property that carries its kind to the summary
)
OPTIONAL = "optional"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium():
    return next(filter(None, map(shutil.which, CHROMIUMS)), None)


# What a test may need -> is it here, and how to get it.
NEEDED = {
    **{
        package: (
            lambda package=package: importlib.util.find_spec(package) is not None,
            f"{package} is not installed (requirements-{group}.txt)",
        )
        for package, group in {
            "ray": "sweep",
            "minari": "minari",
            "d4rl": "d4rl",
            "gymnasium_robotics": "robotics",
            "ogbench": "ogbench",
            "imageio_ffmpeg": "video",
            "stable_baselines3": "buffers",
            "d3rlpy": "buffers",
            "torchrl": "buffers",
        }.items()
    },
    "browser": (
        lambda: importlib.util.find_spec("playwright") and find_chromium(),
        "no playwright (requirements-browser.txt), or none of " + ", ".join(CHROMIUMS),
    ),
    "cuda": (torch.cuda.is_available, "there is no CUDA device"),
    "corl": (lambda: "CORL_DIR" in os.environ, "CORL_DIR is not a checkout of CORL"),
}


def pytest_addoption(parser):
    parser.addoption(
        "--all-faults",
        action="store_true",
        help="also the slow instances of faults, and a count of each kind",
    )


@pytest.fixture(autouse=True)
def no_timed_choice(monkeypatch):
    """No test depends on the load of the machine: a run in a test states its threads."""
    from corl import pace

    def timed(*args):
        raise AssertionError("state threads and compile in this test")

    monkeypatch.setattr(pace, "time_products", timed)
    monkeypatch.setattr(pace, "available_cores", lambda **options: 2)


@pytest.fixture(autouse=True)
def numbers_alone(request, monkeypatch):
    """A run leaves out what takes most of a short run and changes none of its numbers.

    Where a test is about one of them, it has the mark `makes("estimate")` or the like.
    """
    from corl import curves, finetune, machine

    left_out = {
        "estimate": (finetune.Session, "_estimate", lambda *updates: {}),
        "picture": (curves, "plot_curves", lambda *drawing: None),
        "commit": (machine, "git_commit", lambda: "0" * 40),
        # Many small files are written, and no power cut is waited for.
        "sync": (os, "fsync", lambda file: None),
    }
    wanted = {x for mark in request.node.iter_markers("makes") for x in mark.args}
    assert wanted <= left_out.keys()
    for what in left_out.keys() - wanted:
        monkeypatch.setattr(*left_out[what])


@pytest.fixture(autouse=True)
def narrow_networks(request, monkeypatch):
    """With the mark `narrow(n)` a hidden layer of 256 units, as in the papers, gets n of them."""
    mark = request.node.get_closest_marker("narrow")
    layers = torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Embedding
    for layer in layers if mark else ():

        def narrow(self, *sizes, make=layer.__init__, **options):
            make(self, *(mark.args[0] if n == 256 else n for n in sizes), **options)

        monkeypatch.setattr(layer, "__init__", narrow)


@pytest.fixture(scope="session")
def chromium():
    """The path of a Chromium of the system."""
    return find_chromium()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    whole = [item for item in items if item.get_closest_marker("whole")]
    if whole and not config.getoption("--all-faults"):
        items[:] = [item for item in items if item not in whole]
        config.hook.pytest_deselected(items=whole)
    for item in items:
        mark = item.get_closest_marker(FAULT)
        if mark is not None:
            item.user_properties.append((FAULT, mark.args[0]))
        for mark in item.iter_markers(OPTIONAL):
            is_here, reason = NEEDED[mark.args[0]]
            if not is_here():
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--all-faults"):
        return
    tried, passed = Counter(), Counter()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            kind = dict(report.user_properties).get(FAULT)
            # A test that could not even be prepared has no call.
            if kind is None or (outcome != "error" and report.when != "call"):
                continue
            tried[kind] += 1
            passed[kind] += outcome == "passed"
    terminalreporter.section("faults that ended as they should")
    for kind in sorted(tried):
        terminalreporter.write_line(f"{kind}: {passed[kind]}/{tried[kind]}")
