"""Runs: folders, logs, checkpoints, stopping, the summary and curves, with their failures."""

import csv
import json
import os
import pickle
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from small_config import Config, parse

from corl import checkpoints, curves, machine, run_tables, runs, tasks
from corl.config import main
from corl.layers import ConfigError
from corl_dare.config import LOGS, PANELS

ROOT = Path(__file__).parent.parent
SMALL = settings(deadline=None, derandomize=True, max_examples=60)


# ---------------------------------------------------------------- machine


def test_devices(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.pick_device("auto") == machine.pick_device("cpu") == "cpu"
    assert machine.pick_device("cuda:1") == "cpu"
    assert "no CUDA device" in capsys.readouterr().out  # not in silence
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.pick_device("auto") == "cuda"
    assert machine.pick_device("cuda:1") == "cuda:1"
    for name in ("gpu", "cuda1", "", "cpu:0"):
        with pytest.raises(ConfigError, match="device"):
            machine.pick_device(name)


def test_threads():
    before = torch.get_num_threads()
    try:
        machine.configure_threads(2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ConfigError, match="threads"):
        machine.configure_threads(0)


@pytest.mark.parametrize(
    "seconds, words",
    [(0, "0 s"), (45, "45 s"), (720, "12 min"), (12240, "3.4 h"), (181440, "2.1 days")],
)
def test_readable_time(seconds, words):
    assert machine.readable_time(seconds) == words


def test_paths_are_shown_without_the_home_folder(monkeypatch, tmp_path):
    home, here = tmp_path / "home" / "ann", tmp_path / "work"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert machine.tidy_path(here / "runs" / "a") == "runs/a"
    assert machine.tidy_path("runs/a") == "runs/a"
    assert machine.tidy_path(home / "data.hdf5") == "~/data.hdf5"
    assert machine.tidy_path("/data/x") == "/data/x"


@pytest.mark.makes("commit")
def test_commit_of_this_code_or_unknown(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{40}(\+dirty)?|unknown", machine.git_commit())

    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert machine.git_commit() == "unknown"


@pytest.mark.makes("commit")
def test_only_changed_code_makes_a_commit_dirty(tmp_path, monkeypatch):
    for name in ("corl/machine.py", "algorithms/a.py", "results/numbers.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    person = ("-c", "user.name=n", "-c", "user.email=e@x.org")
    for words in (("init", "-q"), ("add", "."), (*person, "commit", "-qm", "first")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "corl" / "machine.py"))
    assert re.fullmatch(r"[0-9a-f]{40}", machine.git_commit())
    (tmp_path / "results/numbers.json").write_text("2")
    assert re.fullmatch(r"[0-9a-f]{40}", machine.git_commit())
    (tmp_path / "algorithms/a.py").write_text("2")
    assert re.fullmatch(r"[0-9a-f]{40}\+dirty", machine.git_commit())


# ---------------------------------------------------------------- pack, random streams


def through_a_file(value, path):
    torch.save(checkpoints.pack(value), path)
    return checkpoints.unpack(torch.load(path, weights_only=True))


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


DTYPES = "bool int8 uint8 int16 uint16 int32 uint32 int64 uint64 float16 float32 float64"
ARRAYS = st.sampled_from(DTYPES.split()).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
)
LEAVES = (
    ARRAYS
    | st.integers(-(2**130), 2**130)
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.none()
    | st.text(st.characters(codec="utf-8"), max_size=5)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.text("abc", max_size=3) | st.integers(0, 9), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@SMALL
@given(TREES)
def test_pack_is_lossless_through_a_file(tmp_path_factory, value):
    assert_same(through_a_file(value, tmp_path_factory.getbasetemp() / "x.pt"), value)


def test_packed_arrays_are_copies():
    array = np.arange(6)[::-2]
    packed = checkpoints.pack(array)
    array[:] = 0
    assert checkpoints.unpack(packed).tolist() == [5, 3, 1]
    checkpoints.unpack(packed)[:] = 0
    assert checkpoints.unpack(packed).tolist() == [5, 3, 1]


@pytest.mark.parametrize("name", ["PCG64", "MT19937", "Philox", "SFC64"])
def test_numpy_generators_go_on_exactly(name, tmp_path):
    generator = np.random.Generator(getattr(np.random, name)(7))
    generator.integers(0, 10, 3, dtype=np.uint32)  # leaves half a word behind
    state = through_a_file(generator.bit_generator.state, tmp_path / "x.pt")
    wanted = generator.random(5), generator.integers(0, 99, 5, dtype=np.uint32)
    generator.random(100)
    generator.bit_generator.state = state
    found = generator.random(5), generator.integers(0, 99, 5, dtype=np.uint32)
    assert np.array_equal(wanted, found)


def draws():
    return (
        [random.random() for _ in range(3)],
        [random.gauss(0, 1) for _ in range(3)],
        np.random.normal(size=3).tolist(),
        torch.randn(3).tolist(),
    )


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(0, 700))
def test_global_streams_go_on_exactly(tmp_path_factory, seed, before):
    streams = checkpoints.rng_state()
    try:
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        random.gauss(0, 1), np.random.normal()  # both keep a second number for later
        for _ in range(before):
            random.random(), np.random.random(), torch.rand(1)
        path = tmp_path_factory.getbasetemp() / "rng.pt"
        torch.save(checkpoints.rng_state(), path)
        wanted = draws()
        assert draws() != wanted
        checkpoints.set_rng_state(torch.load(path, weights_only=True))
        assert draws() == wanted
    finally:
        checkpoints.set_rng_state(streams)


# ---------------------------------------------------------------- checkpoints

STATE = {
    "format": checkpoints.FORMAT,
    "algorithm": "iql",
    "step": 3,
    "w": torch.arange(3.0),
}


@pytest.mark.parametrize("place", ["torch.save", "half", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_while_saving_leaves_the_old_checkpoint(
    tmp_path, monkeypatch, place, error
):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, STATE)

    def crash(*args, **kwargs):
        if place == "half":
            args[1].write(b"PK half a file")
        raise error

    if place in ("torch.save", "half"):
        monkeypatch.setattr(torch, "save", crash)
    else:
        monkeypatch.setattr(os, place.removeprefix("os."), crash)
    with pytest.raises(type(error)):
        checkpoints.save_checkpoint(path, {**STATE, "step": 4})
    monkeypatch.undo()
    assert checkpoints.load_checkpoint(path, "iql")["step"] == 3
    assert os.listdir(tmp_path) == ["checkpoint.pt"]  # and no litter
    checkpoints.save_checkpoint(path, {**STATE, "step": 4})
    assert checkpoints.load_checkpoint(path, "iql")["step"] == 4


def test_a_checkpoint_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("replace"), replace(*a)))
    checkpoints.save_checkpoint(tmp_path / "checkpoint.pt", STATE)
    assert calls == ["fsync", "replace", "fsync"]


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def load_error(path, algorithm="iql"):
    with pytest.raises(ValueError) as caught:
        checkpoints.load_checkpoint(path, algorithm)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_checkpoints_of_others_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert "does not exist" in load_error(path)
    checkpoints.save_checkpoint(path, STATE)
    assert torch.equal(checkpoints.load_checkpoint(path, "iql")["w"], STATE["w"])
    assert "belongs to iql, not to cql" in load_error(path, "cql")
    for number in (checkpoints.FORMAT + 1, None):
        checkpoints.save_checkpoint(path, {**STATE, "format": number})
        assert f"format {number}" in load_error(path)
    checkpoints.save_checkpoint(path, {"algorithm": "iql"})
    assert "format" in load_error(path)
    for other in ({"step": 3}, [1], torch.zeros(2)):
        torch.save(other, path)
        assert "not a checkpoint of a corl-dare run" in load_error(path)


def test_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, STATE)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert "damaged" in load_error(path)
    for size in (5, 300, 5000):
        path.write_bytes(rng.bytes(size))
        assert "damaged" in load_error(path)
    path.unlink()
    path.mkdir()
    assert "does not exist" in load_error(path)


def test_a_malicious_checkpoint_is_refused_and_not_executed(tmp_path):
    path, marker = tmp_path / "checkpoint.pt", tmp_path / "executed"
    torch.save({**STATE, "x": Evil(marker)}, path)
    assert "never unpickled" in load_error(path)
    path.write_bytes(pickle.dumps({**STATE, "x": Evil(marker)}, protocol=2))
    load_error(path)
    assert not marker.exists()
    torch.save({**STATE, "x": Evil(marker)}, path)
    try:  # the attack works where pickle is executed
        torch.load(path, weights_only=False)
    finally:
        assert marker.exists()


# ---------------------------------------------------------------- a run's folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(columns=("loss",), algorithm="iql", **fields):
    return runs.Run(Config(**fields), algorithm, columns)


def table(folder, name):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


class Part:
    """A part of a run with a state: numbers from its own generator."""

    def __init__(self, seed=0):
        self.rng, self.sum = np.random.default_rng(seed), np.zeros(2)

    def step(self):
        self.sum = self.sum + self.rng.normal(size=2) + random.random()
        return self.sum

    def state_dict(self):
        return {"rng": self.rng.bit_generator.state, "sum": self.sum.copy()}

    def load_state_dict(self, state):
        self.rng.bit_generator.state, self.sum = state["rng"], state["sum"]


def steps(run):
    """The steps of both phases that are left, with the phase."""
    for phase, last in (
        ("offline", run.config.offline_iterations),
        ("online", run.total),
    ):
        for t in run.steps(phase, last):
            yield phase, t


def loop(run, part, stop_at=None, save_every=3):
    """What a run does, in miniature."""
    with run:
        run.dataset = {"sha256": "abc", "label": "made up"}
        if run.checkpoint is not None:
            run.restore({"part": part})
        for phase, t in steps(run):
            value = part.step()
            run.updates += 1
            run.log(t + 1, phase, {"loss": torch.tensor(value[0])})
            if (t + 1) % 2 == 0:
                run.evaluation(t + 1, phase, 100 * value, value)
            if (t + 1) % save_every == 0:
                run.step = t + 1
                run.save({"part": part})
            if t + 1 == stop_at:
                raise RuntimeError("killed")
        if run.stop_requested:
            run.save({"part": part})
            run.interrupted()
            return {}
        return run.finish()


def test_a_folder_says_what_ran_and_its_config_runs_it_again(here):
    run = make_run(seed=3, name="IQL")
    assert re.fullmatch(r"IQL-hopper-medium-v2-s3-\d{8}-\d{6}", run.folder.name)
    assert run.folder.parent == Path("runs")
    assert parse("--config", run.folder / "config.yaml") == run.config
    assert not list(run.folder.glob("*.part"))


def test_runs_of_the_same_second_get_folders_of_their_own(here, monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda form: "20250101-000000")
    names = [make_run().folder.name for _ in range(3)]
    stamp = "X-hopper-medium-v2-s0-20250101-000000"
    assert names == [stamp, f"{stamp}-2", f"{stamp}-3"]


def test_a_place_that_cannot_be_written_is_refused_at_once(here, monkeypatch):
    (here / "file").write_text("mine")
    for place in ("file", "file/below"):
        with pytest.raises(ConfigError, match="run folder file.*runs_dir"):
            make_run(runs_dir=place)
    assert (here / "file").read_text() == "mine"

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=r"Permission denied.*runs_dir"):
        make_run()


def test_a_full_disk_is_one_line(here, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"config\.yaml.*No space left"):
        make_run()


# ---------------------------------------------------------------- logs


def test_metrics_are_written_exactly_and_columns_stay(here):
    run = make_run(columns=("loss", "exact", "count"))
    loss, exact = torch.tensor(0.1, requires_grad=True), torch.tensor(0.1).double() / 3
    run.log(1, "offline", {"loss": loss, "exact": exact})
    run.undefined = ("exact",)
    run.log(2, "online", {"count": torch.tensor(7), "exact": float("nan")})
    run.log(3, "online", {"loss": torch.tensor([2.0])})
    one, two, three = table(run.folder, "metrics.csv")
    assert (one["step"], one["phase"], one["count"]) == ("1", "offline", "")
    assert np.float32(one["loss"]) == np.float32(0.1)
    assert float(one["exact"]) == exact.item()
    assert float(two["count"]) == 7 and two["loss"] == "" and two["exact"] == ""
    assert float(three["loss"]) == 2.0
    assert list(one) == [*run_tables.COMMON_COLUMNS, "loss", "exact", "count"]


def test_tensors_are_read_in_one_transfer(here, monkeypatch):
    reads = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: reads.append(t) or real(t))

    def single(self):
        raise AssertionError("read one by one")

    monkeypatch.setattr(torch.Tensor, "item", single)
    monkeypatch.setattr(torch.Tensor, "__float__", single)
    run = make_run(columns=("loss", "count"))
    run.log(1, "online", {"loss": torch.tensor(1.0), "count": torch.tensor(2)})
    assert len(reads) == 1 and reads[0].shape == (2,)


def test_an_unknown_metric_raises_and_writes_nothing(here):
    run = make_run()
    before = (run.folder / "metrics.csv").read_text()
    with pytest.raises(KeyError, match="lossy"):
        run.log(1, "offline", {"loss": 1.0, "lossy": 2.0})
    assert (run.folder / "metrics.csv").read_text() == before


def test_every_episode_of_an_evaluation_has_a_row(here):
    run = make_run()
    returns, scores = np.array([1 / 3, 2e9]), np.array([0.1, 99.75])
    assert run.evaluation(5, "online", returns, scores) == scores.mean()
    rows = table(run.folder, "evaluations.csv")
    assert [(r["step"], r["phase"], r["episode"]) for r in rows] == [
        ("5", "online", "0"),
        ("5", "online", "1"),
    ]
    assert [float(r["return"]) for r in rows] == returns.tolist()
    assert [float(r["score"]) for r in rows] == scores.tolist()


# ---------------------------------------------------------------- resume


def test_a_broken_run_goes_on_to_the_same_files(here):
    random.seed(1)
    whole = make_run(name="whole")
    loop(whole, Part())
    random.seed(1)
    broken = make_run(name="broken")
    with pytest.raises(RuntimeError, match="killed"):
        loop(broken, Part(), stop_at=8)  # the last checkpoint is of step 6
    with open(broken.folder / "metrics.csv", "a") as file:
        file.write("9,onl")  # half a line
    random.seed(99)
    resumed = runs.Run(parse("--resume", broken.folder), "iql", ["loss"])
    assert resumed.step == 6 and resumed.folder == broken.folder
    assert [r["step"] for r in table(broken.folder, "metrics.csv")] == list("123456")
    assert [r["step"] for r in table(broken.folder, "evaluations.csv")] == list("224466")
    loop(resumed, Part(seed=5))
    for name in ("metrics.csv", "evaluations.csv"):
        assert (broken.folder / name).read_text() == (whole.folder / name).read_text()
    one, two = (
        json.loads((r.folder / "summary.json").read_text()) for r in (whole, resumed)
    )
    for key in ("score_offline", "score_final", "score_last", "score_best", "updates"):
        assert one[key] == two[key]
    assert one["updates"] == 10


def test_time_adds_up_over_resumes(here):
    with make_run() as run:
        run.wall_seconds, run.cpu_seconds = 1000.0, 2000.0
        run.dataset = {"sha256": "abc"}
        run.save({})
    resumed = runs.Run(Config(resume=str(run.folder)), "iql", [])
    summary = resumed.finish()
    assert 1000.0 <= summary["wall_seconds"] < 1100.0
    assert 2000.0 < summary["cpu_seconds"] < 2100.0


def test_the_config_of_a_resumed_run_still_runs_it_from_the_start(here):
    with make_run(seed=4) as run:
        run.save({})
    config = parse("--resume", run.folder, "--online_iterations", "60")
    assert (config.seed, config.online_iterations) == (4, 60)
    assert runs.Run(config, "iql", []).total == 64
    again = parse("--config", run.folder / "config.yaml")
    assert again.resume is None and again.online_iterations == 60


def test_what_cannot_be_resumed_is_refused(here):
    with make_run() as run:
        pass
    with pytest.raises(ConfigError, match=r"no checkpoint\.pt yet"):
        runs.Run(Config(resume=str(run.folder)), "iql", [])
    run.dataset = {"sha256": "abc"}
    run.save({"part": Part()})
    with pytest.raises(ValueError, match="belongs to iql, not to cql"):
        runs.Run(Config(resume=str(run.folder)), "cql", [])
    other = runs.Run(Config(resume=str(run.folder)), "iql", [])
    other.dataset = {"sha256": "def", "path": "data.hdf5"}
    part = Part()
    with pytest.raises(ConfigError, match=r"data\.hdf5.*sha256"):
        other.restore({"part": part})
    assert part.sum.tolist() == [0, 0]


# ---------------------------------------------------------------- stopping


def test_the_first_signal_asks_the_second_interrupts_and_handlers_come_back(here, capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = make_run()
    with pytest.raises(KeyboardInterrupt):
        with run:
            assert not run.stop_requested
            signal.raise_signal(signal.SIGTERM)
            assert run.stop_requested
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "once more to stop at once" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_that_a_signal_ends_says_which_and_leaves_no_folder(here, number):
    with pytest.raises(KeyboardInterrupt, match="after 50 updates") as caught:
        with make_run():
            signal.raise_signal(number)
            raise KeyboardInterrupt(
                "stopped after 50 updates"
            )  # as a part's `begin` does
    assert caught.value.status == 128 + number
    assert not (here / "runs").exists()


def test_a_signal_in_the_middle_of_a_print_does_no_harm(here, monkeypatch, capfd):
    """Streams refuse to be entered twice, so the handler must not use them."""
    run = make_run()

    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

        flush = write

    with run:
        monkeypatch.setattr(sys, "stdout", Busy())
        monkeypatch.setattr(sys, "stderr", Busy())
        signal.raise_signal(signal.SIGINT)
        monkeypatch.undo()
    assert run.stop_requested


def test_the_loop_ends_after_the_step_that_was_asked_to_stop(here):
    run, seen = make_run(), []
    with run:
        for phase, t in steps(run):
            seen.append((phase, t))
            run.stop_requested = t == 2
    assert seen == [("offline", t) for t in (0, 1, 2)] and run.step == 3


def test_the_phases_share_the_steps_out_wherever_a_run_goes_on(here):
    for done in range(11):
        run = make_run()
        run.step = done
        with run:
            seen = list(steps(run))
        assert [t for _, t in seen] == list(range(done, 10)) and run.step == 10
        assert all((phase == "online") is (t >= 4) for phase, t in seen)


TOY = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from corl import runs
from corl.config import main
from small_config import Config
from test_runs import Part

def train(config):
    with runs.Run(config, "toy", ["loss"]) as run:
        part = Part()
        if run.checkpoint is not None:
            run.restore({{"part": part}})
        for t in run.steps("offline", run.total):
            run.log(t + 1, "offline", {{"loss": part.step()[0]}})
            if t == 2:
                print("ready", run.folder, flush=True)
            time.sleep(0.02 if config.resume is None else 0.0)
        if run.stop_requested:
            run.save({{"part": part}})
            run.interrupted()
        else:
            run.finish()

main(train, Config)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_how_to_go_on_and_is_the_exit_status(here, number):
    text = TOY.format(root=str(ROOT), tests=str(ROOT / "tests"))
    (here / "toy_run.py").write_text(text)
    command = [sys.executable, "toy_run.py"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        [*command, "--offline_iterations", "300"], **options
    ) as process:
        folder = process.stdout.readline().split()[-1]
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    hint = re.search(r"saved at step (\d+); go on with: --resume (\S+)", output)
    step = int(hint.group(1))
    assert hint.group(2) == folder and 3 <= step < 300
    assert len(table(here / folder, "metrics.csv")) == step
    assert "Traceback" not in errors
    # what the line says works
    more = [*command, "--resume", hint.group(2), "--online_iterations", "1"]
    done = subprocess.run(more, **options, timeout=60)
    assert done.returncode == 0, done.stderr
    steps = [int(r["step"]) for r in table(here / folder, "metrics.csv")]
    assert steps == list(range(1, 302))


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ValueError("no such thing"), 1, "error: no such thing\n"),
        (RuntimeError("broken"), 1, "error: broken\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt("after 50"), 130, "interrupted: after 50\n"),
        (runs.Interrupted("after 50", 15), 143, "interrupted: after 50\n"),
    ],
)
def test_main_shows_errors_as_one_line(monkeypatch, capsys, error, status, line):
    monkeypatch.delenv("CORL_DARE_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["x.py", "--seed", "1"])

    def train(config):
        assert config.seed == 1
        raise error

    with pytest.raises(SystemExit) as caught:
        main(train, Config)
    assert caught.value.code == status
    shown = capsys.readouterr().err
    assert shown.startswith(line) and shown.count("\n") == 1


def test_a_log_file_gets_a_progress_line_only_now_and_then(here, monkeypatch):
    for terminal, seconds in ((False, 30.0), (True, 0.5)):
        run = make_run()
        monkeypatch.setattr(sys.stderr, "isatty", lambda t=terminal: t, raising=False)
        next(iter(run.steps("offline", 4)))
        assert run.bar.mininterval == seconds
        run.bar.close()


def test_the_bar_shows_the_score_the_phase_and_what_means_ask_for(here):
    run = make_run(columns=("loss", "exchanged"))
    run.means = {"exchanges_mean": "exchanged"}
    with run:
        for phase, t in steps(run):
            run.evaluation(t, phase, np.array([1.0]), np.array([12.34]))
            run.log(t, phase, {"exchanged": torch.tensor(5.0), "loss": 1.0})
            assert "score=12.3" in run.bar.postfix and "exchanged=5" in run.bar.postfix
            assert "loss" not in run.bar.postfix
            assert run.bar.desc.startswith(phase)
    assert run.step == 10


# ---------------------------------------------------------------- wandb


class Wandb(types.ModuleType):
    """A wandb that fails where it is told to."""

    def __init__(self, fails=""):
        super().__init__("wandb")
        self.fails, self.calls = fails, []

    def call(self, what, /, **kwargs):
        self.calls.append((what, kwargs))
        if what == self.fails:
            raise RuntimeError(f"{what} failed")
        return self

    def init(self, **kwargs):
        return self.call("init", **kwargs)

    def log(self, values, step):
        return self.call("log", values=values, step=step)

    def finish(self):
        return self.call("finish")


@pytest.mark.parametrize("fails", ["import", "init", "log", "finish", ""])
def test_training_goes_on_without_wandb(here, monkeypatch, capsys, fails):
    wandb = None if fails == "import" else Wandb(fails)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    summary = loop(make_run(wandb_mode="offline"), Part())
    assert summary["updates"] == 10
    said = capsys.readouterr().out.count("metrics.csv has everything")
    assert said == (1 if fails else 0)  # once, not at every step
    if fails == "":
        (_, init), *logs, (last, _) = wandb.calls
        assert (init["mode"], init["project"], init["group"]) == ("offline", "CORL", "G")
        assert len(logs) == 10 and last == "finish"
        assert logs[-1][1]["step"] == 10 and "online/loss" in logs[-1][1]["values"]


def test_wandb_is_not_imported_unless_it_is_asked_for(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb("init"))
    assert make_run().wandb is None
    assert sys.modules["wandb"].calls == []


# ---------------------------------------------------------------- summary

SUMMARY = set(
    "algorithm env seed score_offline score_final score_last score_best "
    "score_training drop "
    "updates updates_per_second wall_seconds cpu_seconds dataset versions commit machine".split()
)


def scored(offline, online, **fields):
    run = make_run(**fields)
    for phase, scores in (("offline", offline), ("online", online)):
        for score in scores:
            step = len(run.scores) + 1
            run.evaluation(step, phase, np.array([0.0]), np.array([float(score)]))
    return run


@pytest.mark.parametrize(
    "offline, online, offline_score, final, last, best",
    [
        ([5, 10], [1, 90, 2, 3, 4, 7], 10, 4.0, 7, 90),
        ([10], [1, 3], 10, 2.0, 3, 3),
        ([], [1, 2, 3, 4, 5], None, 3.5, 5, 5),
        ([8, 6], [], 6, 7.0, 6, 8),
        ([], [], None, None, None, None),
    ],
)
def test_the_scores_of_the_summary(
    here, offline, online, offline_score, final, last, best
):
    summary = scored(offline, online).finish()
    keys = ("score_offline", "score_final", "score_last", "score_best")
    assert [summary[k] for k in keys] == [offline_score, final, last, best]


def test_the_summary_names_everything_and_nobody(here, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("somebody")
    monkeypatch.setenv("HOME", str(home))
    for module, function in ((platform, "node"), (socket, "gethostname")):
        monkeypatch.setattr(module, function, lambda: "some-host")
    run = scored([1], [2], seed=3)
    run.dataset = {"source": "file", "label": "a file", "sha256": "abc", "rows": 5}
    run.dataset["path"] = str(home / "d.hdf5")
    run.log(2, "online", {"loss": 1.0})
    run.updates, run.update_seconds = 20, 0.01
    returned = run.finish()
    text = (run.folder / "summary.json").read_text()
    summary = json.loads(text)
    assert summary == returned
    assert set(summary) == SUMMARY
    assert (summary["algorithm"], summary["env"]) == ("iql", "hopper-medium-v2")
    assert summary["seed"] == 3
    assert (summary["updates"], summary["updates_per_second"]) == (20, 20 / 0.01)
    # No return range, because nothing was scaled by one.
    expected = {**run.dataset, "path": "~/d.hdf5", "return_range": None}
    assert summary["dataset"] == expected
    assert set(summary["machine"]) == {"processor", "cores", "gpu"}
    assert set(summary["versions"]) >= {"python", "numpy", "gymnasium", "mujoco"}
    found = summary["versions"]["torch"].split("+")[0]
    assert found == torch.__version__.split("+")[0]
    for secret in ("somebody", "some-host", str(here)):
        assert secret not in text


def test_means_are_over_the_logged_rows_that_have_the_metric(here):
    run = make_run(columns=["loss", "exchanged", "never"])
    run.means = {"exchanges_mean": "exchanged", "never_mean": "never"}
    for count in (2, 4):
        run.log(1, "online", {"exchanged": torch.tensor(count)})
    run.log(2, "online", {"loss": 1.0})
    summary = run.finish()
    assert summary["exchanges_mean"] == 3.0 and summary["never_mean"] is None
    assert set(summary) == SUMMARY | {"exchanges_mean", "never_mean"}


def test_the_commit_is_that_of_the_start(here, monkeypatch):
    monkeypatch.setattr(machine, "git_commit", lambda: "at the start")
    run = make_run()
    monkeypatch.setattr(machine, "git_commit", lambda: "at the end")
    assert run.finish()["commit"] == "at the start"


# ---------------------------------------------------------------- curves


def append(run, name, row):
    """A row at the end of a file of a run."""
    path = run.folder / name
    header = path.read_text().splitlines()[0].split(",")
    with open(path, "a", newline="") as file:
        csv.DictWriter(file, header, lineterminator="\n").writerow(row)


def is_image(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


# With the panels of the exchange and without: phases, rows, and what stands in them.
DRAWN = [
    *((True, 4, 6, rows, "plain") for rows in (0, 1, 6)),
    *((True, 4, 6, 6, kind) for kind in ("nan", "inf", "huge")),
    *((True, 4, 0, 6, "plain"), (True, 0, 6, 6, "plain"), (True, 0, 0, 1, "plain")),
    *((True, 4, 6, 1, "nan"), (False, 4, 6, 6, "nan"), (False, 0, 0, 0, "plain")),
]


@pytest.mark.makes("picture")
@pytest.mark.parametrize("exchange, offline, online, rows, kind", DRAWN)
def test_curves_are_drawn_whatever_is_there(here, exchange, offline, online, rows, kind):
    run = make_run(
        columns=LOGS if exchange else ["loss"],
        offline_iterations=offline,
        online_iterations=online,
    )
    odd = {"plain": 1.0, "nan": float("nan"), "inf": float("inf"), "huge": 1e30}[kind]
    for i in range(rows):
        metrics = {"score_on_std": odd, "score_on_mean": 2.0, "separation_point": odd}
        if i % 2:  # a row need not have everything
            metrics = {**metrics, "score_off_mean": odd, "score_off_std": 0.0}
        metrics = {**metrics, "exchanged": odd} if exchange else {}
        # Written by hand: older versions wrote what now ends a run.
        append(run, "metrics.csv", {"step": i + 1, "phase": "online", **metrics})
        for score in (odd, 1.0):
            row = {"step": i + 1, "phase": "online", "return": score, "score": score}
            append(run, "evaluations.csv", row)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panels = PANELS if exchange else ()
        path = curves.plot_curves(run.folder, run.config, "self-collected", panels)
    assert path == run.folder / "curves.png" and is_image(path)


def drawn(run, label, monkeypatch, panels=()):
    """The figure that plot_curves saves."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, *a, **k: (figures.append(self), save(self, *a, **k)),
    )
    curves.plot_curves(run.folder, run.config, label, panels)
    return figures[0]


@pytest.mark.makes("picture")
def test_curves_show_the_numbers_their_source_and_the_switch(here, monkeypatch):
    run = make_run(columns=LOGS, name="DARE", seed=3)
    run.evaluation(2, "offline", np.zeros(2), np.array([10.0, 20.0]))
    run.evaluation(6, "online", np.zeros(2), np.array([30.0, 50.0]))
    run.log(2, "offline", {})
    for step in (5, 6):
        run.log(
            step,
            "online",
            {
                "exchanged": step,
                "separation_point": 0.3,
                "score_off_mean": 0.1,
                "score_off_std": 0.05,
                "score_on_mean": 0.5,
                "score_on_std": 1e6 if step == 6 else 0.1,
            },
        )
    figure = drawn(run, "self-collected", monkeypatch, PANELS)
    score, exchange, halves = figure.axes
    title = score.get_title()
    assert "self-collected" in title and "DARE on hopper-medium-v2, seed 3" in title
    for axis in (score, exchange, halves):
        assert any(list(line.get_xdata()) == [4, 4] for line in axis.lines)
    found = [line.get_xydata().tolist() for line in score.lines]
    assert [[2, 15], [6, 40]] in found
    assert [[5, 5], [6, 6]] in [line.get_xydata().tolist() for line in exchange.lines]
    assert exchange.get_ylim()[0] == 0
    heights = {line.get_ydata()[0] for line in halves.lines if len(line.get_xdata())}
    assert {0.1, 0.3, 0.5} <= heights
    low, high = halves.get_ylim()  # a wild std does not flatten the lines
    assert low < 0.1 and 0.5 < high and high - low < 2
    texts = [text.get_text() for text in score.texts]
    assert texts == ["offline", "online"]


@pytest.mark.makes("picture")
def test_a_run_without_exchange_has_one_panel(here, monkeypatch):
    run = scored([1], [2, 3])
    run.log(1, "offline", {"loss": 1.0})
    assert len(drawn(run, "made up", monkeypatch).axes) == 1


@pytest.mark.makes("picture")
def test_no_evaluations_are_said_so(here, monkeypatch):
    figure = drawn(make_run(), "made up", monkeypatch)
    assert "no evaluations" in [text.get_text() for text in figure.axes[0].texts]


PANEL = {
    "label": "temperature",
    "lines": [("goal", "goal", "#000000", "--")],
    "bands": [("room", "mean", "spread", "#0072B2")],
}
BARE = {"label": "loss", "bottom": -3, "lines": [("", "loss", "#CC79A7", "-")]}


@pytest.mark.makes("picture")
def test_panels_are_drawn_as_they_are_handed_in(here, monkeypatch):
    """Each with its label, its lines, and one standard deviation around a mean."""
    run = make_run(columns=("goal", "mean", "spread", "loss"))
    run.log(1, "offline", {"loss": 9.0})  # without the goal, so not drawn
    run.log(2, "offline", {"goal": 1.0, "mean": 2.0, "spread": 0.5, "loss": 7.0})
    run.log(3, "online", {"goal": 1.5, "mean": 3.0, "spread": 1.0, "loss": 8.0})
    _, first, second = drawn(run, "made up", monkeypatch, [PANEL, BARE]).axes
    assert first.get_ylabel() == "temperature"
    lines = {line.get_label(): line for line in first.lines}
    assert lines["goal"].get_xydata().tolist() == [[2, 1], [3, 1.5]]
    assert lines["goal"].get_linestyle() == "--"
    assert lines["room"].get_xydata().tolist() == [[2, 2], [3, 3]]
    (band,) = first.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert {(2.0, 1.5), (2.0, 2.5), (3.0, 2.0), (3.0, 4.0)} <= corners
    named = [text.get_text() for text in first.get_legend().get_texts()]
    assert sorted(named) == ["goal", "room"]
    assert second.get_ylabel() == "loss" and second.get_ylim()[0] == -3
    assert second.get_legend() is None
    drawn_loss = [line.get_xydata().tolist() for line in second.lines]
    assert [[2, 7], [3, 8]] in drawn_loss and not second.collections


@pytest.mark.makes("picture")
@pytest.mark.parametrize("panels", [[], [PANEL], [PANEL, BARE]])
def test_panels_without_a_logged_number_are_left_out(here, monkeypatch, panels):
    run = make_run()
    run.log(1, "offline", {"loss": 1.0})  # the goal, which PANEL begins with, never came
    assert len(drawn(run, "made up", monkeypatch, panels).axes) == 1


def test_a_finished_run_draws_the_panels_it_was_given(here, monkeypatch):
    given = []
    monkeypatch.setattr(
        curves, "plot_curves", lambda *arguments: given.append(arguments)
    )
    run = make_run()
    run.panels, run.dataset = [PANEL], {"label": "made up"}
    run.finish()
    expected = [(run.folder, run.config, "made up", [PANEL], tasks.D4RL)]
    assert given == expected
