"""Nothing earned is lost: SIGKILL, SIGTERM and resume, on real MuJoCo, to the last bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_equal

ROOT = Path(__file__).parent.parent
RUN = [
    *(sys.executable, str(ROOT / "algorithms" / "dare_iql.py")),
    *("--env", "hopper-random-v2", "--dataset_source", "self-collected"),
    *("--dataset_rows", "1500", "--device", "cpu", "--buffer_size", "4000"),
    *("--offline_iterations", "40", "--online_iterations", "120", "--batch_size", "32"),
    *("--eval_freq", "40", "--n_episodes", "1", "--log_freq", "10"),
    *("--dare.behavior_updates", "20", "--dare.behavior_batch_size", "32"),
    *("--dare.behavior_width", "0.05", "--dare.sampler_steps", "3"),
    *("--dare.support_actions", "4", "--dare.energy_batch_states", "8"),
    *("--dare.energy_updates", "10", "--dare.energy_update_freq", "2"),
    *("--dare.reference_max_age", "3", "--dare.guidance_scale", "2.0"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return {**os.environ, "OMP_NUM_THREADS": "1", "CORL_DARE_CACHE": cache}


def start(arguments, cwd, environment):
    return subprocess.Popen(
        arguments,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(arguments, cwd, environment):
    process = start(arguments, cwd, environment)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(condition, process, seconds=120):
    end = time.time() + seconds
    while time.time() < end and process.poll() is None:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"never happened; output:\n{process.communicate()[0]}")


def rows(folder):
    path = folder / "metrics.csv"
    return path.read_text().count("\n") if path.exists() else 0


def result(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state["parts"], (folder / "metrics.csv").read_text(), state["rng"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("unbroken")
    finish(RUN, folder, environment)
    return next((folder / "runs").iterdir())


# Processes that are killed at any moment, of other algorithms: tests/faults/test_run_kills.py.
@pytest.mark.whole
@pytest.mark.parametrize("lines", [8, 12])
def test_killed_and_resumed_equals_an_unbroken_run(
    lines, tmp_path, environment, unbroken
):
    """SIGKILL when metrics.csv has so many lines: after the first or the second checkpoint."""
    process = start(RUN, tmp_path, environment)
    folder = None

    def far_enough():
        nonlocal folder
        folder = next((tmp_path / "runs").glob("*"), None)
        return folder is not None and rows(folder) >= lines

    wait_for(far_enough, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "summary.json").exists()
    finish([*RUN[:2], "--resume", str(folder)], tmp_path, environment)
    broken, whole = result(folder), result(unbroken)
    assert_equal(broken[0], whole[0])
    assert broken[1] == whole[1]  # no row of metrics.csv lost, doubled or different
    assert_equal(broken[2], whole[2])


def test_sigterm_saves_says_how_to_go_on_and_loses_nothing(
    tmp_path, environment, unbroken
):
    process = start(RUN, tmp_path, environment)
    folder = None

    def far_enough():
        nonlocal folder
        folder = next((tmp_path / "runs").glob("*"), None)
        return folder is not None and rows(folder) >= 7

    wait_for(far_enough, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    # A shell's status of SIGTERM, so that what comes after `&&` does not start.
    assert process.returncode == 143, output
    assert f"--resume {folder.relative_to(tmp_path)}" in output
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] % 40 != 0 or saved["step"] >= 40
    finish([*RUN[:2], "--resume", str(folder)], tmp_path, environment)
    assert_equal(result(folder)[0], result(unbroken)[0])


def test_resume_refuses_another_algorithm_and_other_settings(
    tmp_path, environment, unbroken
):
    other = [
        sys.executable,
        str(ROOT / "algorithms" / "iql.py"),
        "--resume",
        str(unbroken),
    ]
    process = start(other, tmp_path, environment)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "belongs to dare_iql, not to iql" in output and "Traceback" not in output
    process = start(
        [*RUN[:2], "--resume", str(unbroken), "--seed", "3"], tmp_path, environment
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "leave out seed" in output
