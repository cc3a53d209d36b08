"""What only a GPU can show: CUDA graphs give the numbers of the launches that they hold.

Needs a CUDA device; `benchmarks/gpu.sh` runs these tests on one, beside all others.
"""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_equal, make_buffer, make_hook

from algorithms import dare_iql
from benchmarks.device_parity import CASES, Updates, batches, differences
from corl import compiled, machine
from corl.captured import MOST_GRAPHS, WARM_UPS, Captured

pytestmark = pytest.mark.optional("cuda")
ROOT = Path(__file__).parent.parent
# A cosine schedule that falls to its end, so that a rate inside the graph would show.
SHORT = {name: {**fields, "offline_iterations": 8} for name, fields in CASES.items()}


@pytest.mark.parametrize("compile", [False, True], ids=["launches", "graph"])
@pytest.mark.parametrize("name", CASES)
def test_an_update_on_the_gpu_is_that_of_the_cpu(name, compile):
    found = differences(name, "cuda", compile, 8, SHORT[name])
    # Of a weight: seven of 65536 gradients are as small as Adam's epsilon (see device_parity).
    assert found["first"] < 3e-4 and found["last"] < 8 * 3e-4
    assert found["loss"] < 1e-3


def test_a_graph_goes_on_after_a_checkpoint():
    """The optimizers' state comes back in new tensors: what was captured must not serve."""
    data = batches(12, dare_iql.TrainConfig)
    whole, cut = (Updates("dare_iql", "cuda", True, SHORT["dare_iql"]) for _ in range(2))
    for number, batch in enumerate(data):
        whole.make(batch, number)
    for number in range(6):
        cut.make(data[number], number)
    saved = copy.deepcopy(cut.trainer.state_dict())
    for number in range(6, 9):
        cut.make(data[number], number)
    cut.trainer.load_state_dict(saved)
    for number in range(6, 12):
        cut.make(data[number], number)
    assert_equal(cut.weights(), whole.weights())


def test_forms_of_arguments_have_graphs_of_their_own():
    total = torch.zeros((), device="cuda")

    def add(pair, doubled):
        value = pair[0] + pair[1]
        total.add_(value.sum() * (2 if doubled else 1))
        return {"value": value}

    captured, expected = Captured(add), 0.0
    for size in (2, 3):
        for doubled in (False, True):
            for k in range(WARM_UPS + 3):
                pair = [torch.full((size,), float(k), device="cuda") for _ in range(2)]
                out = captured(pair, doubled)["value"]
                assert out.tolist() == [2.0 * k] * size
                expected += 2.0 * k * size * (2 if doubled else 1)
    assert total.item() == expected


def test_too_many_forms_run_as_they_are():
    captured = Captured(lambda x: x * 2)
    for size in range(1, MOST_GRAPHS + 4):
        for _ in range(WARM_UPS + 2):
            assert captured(torch.ones(size, device="cuda")).sum().item() == 2.0 * size
    assert len(captured._graphs) == MOST_GRAPHS


def hooks(**fields):
    """The same hook launch by launch, and as graphs."""
    for graphs in (False, True):
        buffers = [
            make_buffer(40, device="cuda"),
            make_buffer(30, shift=0.8, seed=1, device="cuda"),
        ]
        yield make_hook(
            offline=buffers[0],
            online=buffers[1],
            device="cuda",
            compile=partial(compiled.function, device="cuda") if graphs else None,
            capture=Captured if graphs else None,
            **fields,
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"score": "policy_ratio"},
        {"score": "policy_ratio", "weights": "soft", "cap": None},
        {"score": "policy_ratio", "rule": "share"},
        {"score": "policy_ratio", "rule": "em", "weights": "soft"},
        {"kind": "diffusion", "guidance_scale": 2.0, "energy_batch_states": 8},
        {"kind": "diffusion", "guidance_scale": 2.0, "reference_max_age": 2},
    ],
    ids=["ratio", "soft", "share", "em", "guided", "cached"],
)
def test_a_hook_of_graphs_draws_and_decides_as_without(fields):
    logs = []
    for hook in hooks(**fields):
        np.random.seed(0)
        for _ in range(8):
            drawn = hook.sample(16)
            log = {**drawn.log, **hook.update_energy(drawn)}
            log = {key: value.item() for key, value in log.items()}
        logs.append((log, hook.generator.get_state()))
    (expected, stream), (found, stream_of_graphs) = logs
    assert torch.equal(stream, stream_of_graphs)
    assert found == pytest.approx(expected, rel=2e-3, abs=2e-3)


PROGRAM = [sys.executable, str(ROOT / "algorithms" / "dare_iql.py")]
SETTINGS = [
    *("--env", "hopper-random-v2", "--dataset_source", "self-collected"),
    *("--dataset_rows", "1500", "--device", "cuda", "--compile", "true"),
    *("--threads", "1", "--buffer_size", "4000", "--batch_size", "32"),
    *("--offline_iterations", "40", "--eval_freq", "40", "--n_episodes", "1"),
    *("--dare.behavior_updates", "20", "--dare.behavior_batch_size", "32"),
    *("--dare.behavior_width", "0.05", "--dare.sampler_steps", "3"),
    *("--dare.support_actions", "4", "--dare.energy_batch_states", "8"),
    *("--dare.energy_updates", "10", "--dare.energy_update_freq", "2"),
    *("--dare.guidance_scale", "2.0"),
]


def weights_of(run):
    state = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
    return {name: state["parts"][name] for name in ("trainer", "hook")}


def test_a_run_on_the_gpu_is_resumed_to_the_last_bit(tmp_path):
    environment = {**os.environ, "CORL_DARE_CACHE": str(tmp_path / "cache")}

    def run(*more):
        done = subprocess.run(
            [*PROGRAM, *more],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:]

    run(*SETTINGS, "--runs_dir", "whole", "--online_iterations", "80")
    run(*SETTINGS, "--runs_dir", "half", "--online_iterations", "40")
    (whole,), (half,) = ((tmp_path / name).glob("*") for name in ("whole", "half"))
    run("--resume", str(half), "--online_iterations", "80")
    assert_equal(weights_of(half), weights_of(whole))


def test_cuda_is_what_auto_takes():
    config = dare_iql.TrainConfig(env="hopper-medium-v2", threads=1)
    assert machine.pick_device(config.device) == "cuda"
