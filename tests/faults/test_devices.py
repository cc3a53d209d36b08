"""A run moves between devices: it goes on, and says what could not move with it.

No GPU is needed: checkpoints are edited to hold what a GPU's would, a random stream of 16 bytes
and tensors that say `cuda:0`; or a GPU is pretended to where streams are put back.
"""

import io
import itertools
import re
import shutil

import harness
import numpy as np
import pytest
import torch
from helpers import assert_equal
from safetensors.torch import load_file

from algorithms import cal_ql, cql, dare_cal_ql, dare_iql, iql
from corl import checkpoints, machine
from corl.standin import train_sac
from corl_dare import cache, streams

pytestmark = pytest.mark.fault("devices")

MOVED = "another kind of device"
# As of a CUDA generator: seed and offset.
STREAM = torch.arange(16, dtype=torch.uint8)
GUIDED = {
    "dare.behavior": "diffusion",
    "dare.behavior_updates": 5,
    "dare.behavior_batch_size": 8,
    "dare.behavior_width": 0.05,
    "dare.sampler_steps": 2,
    "dare.support_actions": 2,
    "dare.energy_batch_states": 4,
    "dare.energy_updates": 4,
    "dare.energy_update_freq": 2,
    "dare.reference_max_age": 3,
    "dare.guidance_scale": 1.0,
}
RUNS = {
    "dare_iql": (dare_iql, harness.FAST_DARE),
    "dare_iql, guided": (dare_iql, GUIDED),
    "dare_cal_ql": (dare_cal_ql, harness.FAST_DARE),
    "dare_cal_ql, guided": (dare_cal_ql, GUIDED),
    "dare_iql, off": (dare_iql, {"dare.enabled": False}),
    "dare_iql, random": (dare_iql, {**harness.FAST_DARE, "dare.rule": "random"}),
    "iql": (iql, {}),
    "cql": (cql, {}),
    "cal_ql": (cal_ql, {}),
}
FAST = ("dare_iql", "dare_iql, guided")


@pytest.fixture(scope="module")
def begun(good, tmp_path_factory):
    """Kind of run -> the folder of a run of 10 offline and 10 online steps."""
    made = {}

    def make(kind):
        if kind not in made:
            module, fields = RUNS[kind]
            home = tmp_path_factory.mktemp("begun")
            flags = harness.short_run(home, good, **fields)
            outcome = harness.run(harness.algorithm(module), *flags)
            assert outcome.status == 0, outcome
            made[kind] = next((home / "runs").iterdir())
        return made[kind]

    return make


def resume(kind, folder, *flags):
    """Go on for 10 more steps; the outcome and the checkpoint at the end."""
    command = harness.algorithm(RUNS[kind][0])
    outcome = harness.run(command, "--resume", folder, "--online_iterations", 20, *flags)
    return outcome, checkpoints.read(folder / "checkpoint.pt")


def edited(source, target, edit):
    """A copy of a run folder whose checkpoint `edit` has changed."""
    shutil.copytree(source, target)
    state = checkpoints.read(target / "checkpoint.pt")
    edit(state)
    checkpoints.save_checkpoint(target / "checkpoint.pt", state)
    return target


def moved_lines(outcome):
    return [line for line in outcome.out.splitlines() if MOVED in line]


def of_a_gpu(state):
    """Change what a checkpoint holds into what a GPU's run would have left."""
    parts = state["parts"]
    state["device"], state["rng"]["cuda"] = "cuda", [STREAM.clone()]
    if "dare_generator" in parts["trainer"]:
        parts["trainer"]["dare_generator"] = STREAM.clone()
    if "hook" in parts:
        parts["hook"]["generator"] = STREAM.clone()


def without_device(state):
    """As from a GPU, before checkpoints named their device."""
    of_a_gpu(state)
    del state["device"]


def one_stream(part, name):
    def edit(state):
        if part in state["parts"] and name in state["parts"][part]:
            state["parts"][part][name] = STREAM.clone()

    return edit


EDITS = {
    "all of a GPU": of_a_gpu,
    "without a device": without_device,
    "trainer alone": one_stream("trainer", "dare_generator"),
    "hook alone": one_stream("hook", "generator"),
    "rows alone": one_stream("hook", "row_generator"),
}
INSTANCES = [
    pytest.param(
        kind,
        name,
        marks=() if kind in FAST and name == "all of a GPU" else pytest.mark.whole,
    )
    for kind, name in itertools.product(RUNS, EDITS)
    # What was not edited is no fault.
    if name == "all of a GPU"
    or "dare" in kind
    and not ("off" in kind and name != "without a device")
    and not ("cal_ql" in kind and name == "trainer alone")
]


@pytest.mark.parametrize("kind, name", INSTANCES)
def test_a_run_of_a_gpu_goes_on_here_and_says_so(kind, name, begun, tmp_path):
    ends = []
    for copy in ("first", "second"):
        folder = edited(begun(kind), tmp_path / copy, EDITS[name])
        outcome, end = resume(kind, folder)
        assert outcome.status == 0, outcome
        assert len(moved_lines(outcome)) == 1, outcome.out
        assert re.search(r"cpu.*seed 0 and step 20", moved_lines(outcome)[0])
        assert end["step"] == 30 and end["device"] == "cpu"
        ends.append(end)
    # The new stream follows from the seed and the step.
    assert_equal(ends[0]["parts"], ends[1]["parts"])
    for device in tensor_devices(ends[0]):
        assert device.type == "cpu"


def tensor_devices(value):
    if isinstance(value, torch.Tensor):
        yield value.device
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensor_devices(part)


def test_a_run_that_stays_says_nothing_and_keeps_its_streams(begun, tmp_path):
    kind = "dare_iql"
    folder = shutil.copytree(begun(kind), tmp_path / "stays")
    outcome, end = resume(kind, folder)
    assert outcome.status == 0 and not moved_lines(outcome), outcome
    again = edited(begun(kind), tmp_path / "again", lambda state: state.pop("device"))
    outcome, same = resume(kind, again)
    assert outcome.status == 0 and not moved_lines(outcome), outcome
    assert_equal(end["parts"], same["parts"])
    moved, other = resume(kind, edited(begun(kind), tmp_path / "moved", of_a_gpu))
    assert moved.status == 0
    streams = [s["parts"]["hook"]["generator"] for s in (end, other)]
    assert not torch.equal(*streams)


@pytest.mark.parametrize(
    "kind",
    [
        "dare_iql",
        *(
            pytest.param(kind, marks=pytest.mark.whole)
            for kind in RUNS
            if kind != "dare_iql"
        ),
    ],
)
def test_tensors_of_a_gpu_are_read_here(kind, begun, tmp_path, monkeypatch):
    """Every tensor in the file says that it lay on `cuda:0`."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        folder = edited(begun(kind), tmp_path / "run", of_a_gpu)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoints.export_corl(folder)
    outcome, end = resume(kind, folder)
    assert outcome.status == 0, outcome
    assert {device.type for device in tensor_devices(end)} == {"cpu"}
    state = checkpoints.load_corl_checkpoint(folder / "checkpoint_19.pt")
    assert {device.type for device in tensor_devices(state)} == {"cpu"}


@pytest.mark.parametrize(
    "device",
    ["cuda:3", *(pytest.param(d, marks=pytest.mark.whole) for d in ("cuda", "cuda:0"))],
)
def test_a_gpu_that_is_not_here_is_replaced_by_the_cpu(
    device, begun, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = edited(begun("dare_iql"), tmp_path / "run", of_a_gpu)
    outcome, end = resume("dare_iql", folder, "--device", device)
    assert outcome.status == 0 and end["device"] == "cpu", outcome
    assert f"device {device}: no CUDA device here" in outcome.out
    assert len(moved_lines(outcome)) == 1


def test_a_number_that_no_gpu_has_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.pick_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="cuda:2 is not here.*cuda:1"):
        machine.pick_device("cuda:2")


# ---------------------------------------------------------------- streams of GPUs


class Gpus:
    """As many pretended GPUs as wanted, which note the streams that they are given."""

    def __init__(self, patch, count):
        self.streams, self.seeds, self.current = {}, {}, 0
        patch.setattr(torch.cuda, "is_available", lambda: count > 0)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "set_rng_state", self.set_rng_state)
        patch.setattr(torch.cuda, "device", self.device)
        patch.setattr(torch.cuda, "manual_seed", self.manual_seed)
        self.count = count

    def set_rng_state(self, stream, number):
        assert number < self.count, "there is no such GPU"
        self.streams[number] = stream.tolist()

    def device(self, number):
        assert number < self.count, "there is no such GPU"
        self.current = number
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def manual_seed(self, seed):
        self.seeds[self.current] = seed


@pytest.fixture
def own_streams():
    before = checkpoints.rng_state()
    torch.manual_seed(5)
    yield
    checkpoints.set_rng_state(before)


@pytest.mark.parametrize(
    "before, saved, device, here, carried",
    [
        # before, streams in the checkpoint, device now, GPUs now, stream that goes on
        ("cpu", 0, "cpu", 0, True),
        ("cpu", 2, "cpu", 0, True),
        ("cpu", 1, "cpu", 4, True),
        ("cuda", 1, "cpu", 0, False),
        ("cuda:1", 2, "cpu", 1, False),
        ("cuda", 1, "cuda", 1, 0),
        ("cuda", 4, "cuda", 1, 0),
        ("cuda", 1, "cuda", 4, 0),
        ("cuda:1", 2, "cuda", 1, 1),
        ("cuda:3", 4, "cuda:1", 2, 3),
        ("cuda", 1, "cuda:1", 2, 0),
        ("cpu", 0, "cuda", 1, None),
        ("cpu", 0, "cuda:1", 2, None),
        ("cpu", 1, "cuda", 1, None),
        (None, 0, "cuda", 1, None),
        (None, 2, "cuda:1", 2, 1),
        (None, 1, "cuda:1", 2, None),
        (None, 2, "cuda", 1, 0),
        (None, 1, "cpu", 0, True),
    ],
)
def test_streams_move_from_some_gpus_to_others(
    before, saved, device, here, carried, monkeypatch, own_streams
):
    """`carried`: number of the stream, True or False on a CPU, None for a new one on a GPU."""
    state = checkpoints.rng_state()
    state.pop("cuda", None)
    if saved:
        state["cuda"] = [torch.full((16,), i, dtype=torch.uint8) for i in range(saved)]
    expected = torch.rand(3)
    gpus = Gpus(monkeypatch, here)
    goes_on = checkpoints.set_rng_state(state, device, before, step=7)
    assert torch.equal(torch.rand(3), expected), "the CPU's stream always goes on"
    if device == "cpu":
        assert goes_on is carried and not gpus.seeds
        return
    number = int(device.partition(":")[2] or 0)
    assert goes_on is (carried is not None)
    if carried is None:
        assert gpus.seeds == {number: checkpoints.fresh_seed(5, 7)}
    else:
        assert gpus.streams[number] == [carried] * 16 and not gpus.seeds


def test_new_streams_differ_by_seed_and_step_and_come_again():
    def draws(seed, step):
        generator = torch.Generator().manual_seed(seed)
        assert not streams.put_back(generator, STREAM, step)
        return generator.initial_seed(), torch.rand(4, generator=generator).tolist()

    seen = [draws(seed, step) for seed in (0, 1, 2**62) for step in (0, 1, 10**7)]
    assert len({seed for seed, _ in seen}) == len(seen)
    assert draws(1, 10**7) == seen[5]
    kept = torch.Generator().manual_seed(3)
    state = kept.get_state()
    expected = torch.rand(4, generator=kept)
    assert streams.put_back(kept, state, 9)
    assert torch.equal(torch.rand(4, generator=kept), expected)


# ---------------------------------------------------------------- unfinished trainings


def fitted(folder, device="cpu", updates=100, stop=False):
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(64, 3)), rng.uniform(-0.9, 0.9, (64, 2))
    return cache.fit_cached(
        "mixture",
        states.astype(np.float32),
        actions.astype(np.float32),
        updates=updates,
        batch_size=8,
        lr=1e-3,
        seed=1,
        dataset_hash="x",
        cache_dir=folder,
        device=device,
        progress=False,
        should_stop=lambda: stop,
    )


def as_of_a_gpu(folder):
    """Turn the unfinished training of a CPU into one of a GPU."""
    (path,) = folder.glob("*.cpu.unfinished")
    data = path.read_bytes()[32:]
    state = torch.load(io.BytesIO(data), weights_only=True)
    state["generator"] = STREAM.clone()
    settings = state.pop("settings")
    cache._save_unfinished(
        state, path.with_name(path.name.replace(".cpu.", ".cuda.")), settings
    )
    return path


def test_an_unfinished_behavior_model_goes_on_on_another_device(tmp_path, capsys):
    for folder in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(KeyboardInterrupt):
            fitted(folder, stop=True)
        as_of_a_gpu(folder).unlink()
        capsys.readouterr()
        _, path, loaded = fitted(folder)
        shown = capsys.readouterr().out
        assert not loaded and shown.count("\n") == 1, shown
        assert "goes on at update 50" in shown and MOVED in shown
        assert [file.name for file in folder.iterdir()] == [path.name]
    assert_equal(*(load_file(tmp_path / name / path.name) for name in "ab"))


def test_of_two_unfinished_trainings_the_own_one_wins_a_tie(tmp_path, capsys):
    _, unbroken, _ = fitted(tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "two", stop=True)
    as_of_a_gpu(tmp_path / "two")
    capsys.readouterr()
    _, path, _ = fitted(tmp_path / "two")
    assert capsys.readouterr().out == ""
    assert_equal(load_file(path), load_file(unbroken))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# ---------------------------------------------------------------- our own collectors


def test_the_training_of_a_shipped_policy_moves_too(capsys):
    agent = train_sac.SAC(3, 2, "cpu", 0)
    state = agent.state_dict()
    state["generator"] = STREAM.clone()
    agent.load_state_dict(state, 10)
    assert "step 10 was on another kind of device" in capsys.readouterr().out
    seed = checkpoints.fresh_seed(0, 10)
    assert agent.generator.initial_seed() == seed
