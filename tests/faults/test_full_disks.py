"""A disk fills up, or refuses: one line names the file, and nothing that stood there is harmed.

`Disk` lets Python's own files fail as a full disk does: a write takes some bytes and then
raises, or the disk answers only to `fsync`, or the new name is refused.
"""

import builtins
import errno
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import h5py
import harness
import pytest
import torch
from helpers import assert_equal

from algorithms import cal_ql, cql, dare_cal_ql, dare_iql, iql
from corl import checkpoints, files
from corl.data import card
from corl.standin import collect
from corl_dare import behavior_fit, cache
from experiments import report

pytestmark = pytest.mark.fault("full disks")

REASONS = {
    errno.ENOSPC: "No space left on device.*free some space",
    errno.EDQUOT: "quota exceeded.*free some space",
    errno.EACCES: "Permission denied.*mend its rights",
    errno.EROFS: "Read-only file system.*another place",
    errno.EIO: "Input/output error",
}
WRITING = set("wax+")


class _Raw(io.FileIO):
    """A file on a disk with room for so many bytes."""

    def __init__(self, path, mode, disk):
        super().__init__(path, mode)
        self.disk, self.room = disk, disk.room

    def write(self, data):
        data = memoryview(data).cast("B")
        if self.disk.how == "write" and not self.disk.healed:
            if not self.room:
                raise OSError(self.disk.number, os.strerror(self.disk.number))
            data = data[: self.room]
            self.room -= len(data)
        return super().write(data)


class Disk:
    """Lets files whose path matches fail from the `nth` on that is opened for writing.

    Args:
        patch: pytest's monkeypatch.
        pattern: regular expression of the path.
        how: what fails: open, write, fsync or replace.
        nth: the files before this one are written well.
        room: bytes that a write takes before it fails.
        number: errno.
    """

    def __init__(self, patch, pattern, how, nth=1, room=0, number=errno.ENOSPC):
        self.pattern, self.how, self.left = re.compile(pattern), how, nth - 1
        self.room, self.number = room, number
        self.healed, self.hits = False, 0
        self.files = set()
        self.plain_open, self.plain_sync, self.plain_replace = (
            builtins.open,
            os.fsync,
            os.replace,
        )
        patch.setattr(builtins, "open", self.open)
        patch.setattr(io, "open", self.open)
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(os, "replace", self.replace)

    def fails(self, path):
        return not self.healed and self.pattern.search(str(path)) is not None

    def refuse(self, *path):
        self.hits += 1
        raise OSError(self.number, os.strerror(self.number), *path)

    def open(self, path, mode="r", buffering=-1, *args, **options):
        plain = isinstance(path, int) or not WRITING & set(mode)
        if plain or not self.fails(path):
            return self.plain_open(path, mode, buffering, *args, **options)
        if self.left:
            self.left -= 1
            return self.plain_open(path, mode, buffering, *args, **options)
        if self.how == "open":
            self.refuse(str(path))
        self.hits += 1
        raw = _Raw(path, mode.replace("b", "").replace("t", ""), self)
        self.files.add(os.path.realpath(path))
        if buffering == 0:
            return raw
        if "b" in mode:
            return io.BufferedWriter(raw)
        return io.TextIOWrapper(io.BufferedWriter(raw), *args, **options)

    def fsync(self, number):
        if self.how == "fsync" and not self.healed:
            if os.path.realpath(f"/proc/self/fd/{number}") in self.files:
                self.refuse()
        self.plain_sync(number)

    def replace(self, source, target, **options):
        source_is_ours = os.path.realpath(source) in self.files
        if self.how == "replace" and not self.healed and source_is_ours:
            self.refuse(str(source), None, str(target))
        self.plain_replace(source, target, **options)


def assert_one_line(outcome, disk, name, number):
    assert disk.hits, "the disk was never full"
    harness.assert_refused(outcome, r"^error: .*cannot write", name, REASONS[number])
    assert outcome.status == 1


def leftovers(folder):
    return [p.name for p in Path(folder).rglob("*") if p.name.endswith(".part")]


def whole_rows(path):
    lines = path.read_text().split("\n")
    assert lines[-1] == "", "the last row is torn"
    assert len({line.count(",") for line in lines[:-1]}) == 1


# ---------------------------------------------------------------- a run

ALGORITHMS = {
    "dare_iql": (dare_iql, harness.FAST_DARE),
    "dare_cal_ql": (dare_cal_ql, harness.FAST_DARE),
    "iql": (iql, {}),
    "cql": (cql, {}),
    "cal_ql": (cal_ql, {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A cache in which behavior models are trained already."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def unbroken(good, models, tmp_path_factory):
    """Algorithm -> the last checkpoint of a run that met no fault."""
    made = {}

    def make(algorithm):
        if algorithm not in made:
            home = tmp_path_factory.mktemp("unbroken")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("CORL_DARE_CACHE", str(models))
                outcome = harness.run(*run_of(algorithm, home, good))
            assert outcome.status == 0, outcome
            made[algorithm] = run_folder(home)
        return made[algorithm]

    return make


def run_of(algorithm, folder, dataset, **fields):
    module, own = ALGORITHMS[algorithm]
    flags = harness.short_run(
        folder,
        dataset,
        checkpoints_path=folder / "corl",
        eval_freq=5,
        **own,
        **fields,
    )
    return (harness.algorithm(module), *flags)


def run_folder(home):
    (folder,) = (home / "runs").iterdir()
    return folder


# File -> how often it is written, or opened to be appended to, in a run of 20 steps with an
# evaluation every 5.
OFTEN = {
    r"metrics\.csv": (2, 3, 5),
    r"evaluations\.csv": (2, 3, 5),
    r"[/.]checkpoint\.pt": (1, 2, 4, 5),
    r"checkpoint_\d+\.pt": (1, 2, 4),
    r"summary\.json": (1,),
    r"curves\.png": (1,),
}
# How, and the bytes that are taken before.
HOWS = [("open", 0), ("write", 0), ("write", 7), ("write", 900)]
HOWS += [("fsync", 0), ("replace", 0)]
FAST = {
    (r"metrics\.csv", "write", 3, 7),
    (r"[/.]checkpoint\.pt", "write", 2, 900),
    (r"checkpoint_\d+\.pt", "open", 2, 0),
    (r"curves\.png", "write", 1, 900),
}


def instances():
    for (name, often), (how, room) in itertools.product(OFTEN.items(), HOWS):
        appended = name.endswith("csv")
        if appended and (how == "replace" or room == 900):
            # Rows are appended, and shorter.
            continue
        if name.startswith("summary") and room == 900:
            continue
        for nth in often:
            if how == "fsync" and appended and nth % 2:
                # The file is synced at every second opening.
                continue
            fast = (name, how, nth, room) in FAST
            marks = [] if fast else [pytest.mark.whole]
            if "curves" in name:
                marks.append(pytest.mark.makes("picture"))
            yield pytest.param(name, how, nth, room, marks=marks)


@pytest.mark.parametrize("name, how, nth, room", list(instances()))
def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_later(
    name, how, nth, room, good, models, unbroken, tmp_path, monkeypatch
):
    expected = unbroken("dare_iql")
    monkeypatch.setenv("CORL_DARE_CACHE", str(models))
    with monkeypatch.context() as patch:
        disk = Disk(patch, name, how, nth, room)
        outcome = harness.run(*run_of("dare_iql", tmp_path, good))
    assert_one_line(outcome, disk, name, errno.ENOSPC)
    assert not leftovers(tmp_path)
    folder = run_folder(tmp_path)
    for table in ("metrics.csv", "evaluations.csv"):
        whole_rows(folder / table)
    for file in tmp_path.glob("corl/*.pt"):
        checkpoints.read(file)
    if not (folder / "checkpoint.pt").exists():
        assert "no checkpoint yet, so start the run again" in outcome.err
        return
    step = checkpoints.read(folder / "checkpoint.pt")["step"]
    assert f"step {step}, go on with: --resume " in outcome.err
    again = harness.run(harness.algorithm(dare_iql), "--resume", folder)
    assert again.status == 0, again
    ends = [checkpoints.read(f / "checkpoint.pt")["parts"] for f in (folder, expected)]
    assert_equal(*ends)
    tables = [(f / "evaluations.csv").read_text() for f in (folder, expected)]
    assert tables[0] == tables[1]
    assert json.loads((folder / "summary.json").read_text())["score_final"] is not None


@pytest.mark.parametrize(
    "number, name, how",
    [
        pytest.param(
            number, name, how, marks=() if how == "fsync" else pytest.mark.whole
        )
        for number, (name, how) in itertools.product(
            list(REASONS)[1:], [(r"[/.]checkpoint\.pt", "fsync"), ("summary", "open")]
        )
    ],
)
def test_other_refusals_of_a_disk_are_named_too(
    number, name, how, good, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        disk = Disk(patch, name, how, number=number)
        fields = {"offline_iterations": 5, "online_iterations": 0}
        outcome = harness.run(*run_of("iql", tmp_path, good, **fields))
    assert_one_line(outcome, disk, name, number)
    assert not leftovers(tmp_path)


@pytest.mark.whole
@pytest.mark.makes("picture")
@pytest.mark.parametrize("algorithm", sorted(set(ALGORITHMS) - {"dare_iql"}))
@pytest.mark.parametrize("name", OFTEN)
def test_no_algorithm_hides_a_full_disk(
    algorithm, name, good, models, tmp_path, monkeypatch
):
    monkeypatch.setenv("CORL_DARE_CACHE", str(models))
    with monkeypatch.context() as patch:
        disk = Disk(patch, name, "write", nth=max(OFTEN[name]), room=3)
        outcome = harness.run(*run_of(algorithm, tmp_path, good))
    assert_one_line(outcome, disk, name, errno.ENOSPC)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "evaluations.csv"])
@pytest.mark.parametrize(
    "how",
    ["write", *(pytest.param(h, marks=pytest.mark.whole) for h in ("open", "fsync"))],
)
def test_a_resume_on_a_full_disk_leaves_the_run_as_it_was(
    name, how, unbroken, models, tmp_path, monkeypatch
):
    monkeypatch.setenv("CORL_DARE_CACHE", str(models))
    folder = shutil.copytree(unbroken("dare_iql"), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        disk = Disk(patch, re.escape(name), how)
        command = harness.algorithm(dare_iql)
        outcome = harness.run(command, "--resume", folder, "--online_iterations", 30)
    assert_one_line(outcome, disk, name, errno.ENOSPC)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# ---------------------------------------------------------------- places, found at the start


def no_training(patch):
    """From here on no update and no environment step is made."""

    def stop(*args, **options):
        raise AssertionError("work began before the places were tried")

    patch.setattr("corl.finetune.Session.updates", stop)
    patch.setattr("corl.finetune.Session.offline", stop)
    patch.setattr(cache, "fit", stop)


def full_for_temporary_files(patch, number, below):
    """Nothing can be written into folders whose path matches."""
    plain = tempfile.TemporaryFile

    def refuse(*args, **options):
        if re.search(below, str(options["dir"])):
            raise OSError(number, os.strerror(number))
        return plain(*args, **options)

    patch.setattr(tempfile, "TemporaryFile", refuse)


@pytest.mark.parametrize("number", REASONS)
@pytest.mark.parametrize("field", ["runs_dir", "checkpoints_path"])
def test_a_place_that_cannot_be_written_is_found_at_the_start(
    field, number, good, tmp_path, monkeypatch
):
    no_training(monkeypatch)
    full_for_temporary_files(monkeypatch, number, field)
    (tmp_path / field).mkdir()
    flags = {"runs_dir": tmp_path / "elsewhere", field: tmp_path / field / "deep" / "er"}
    command = harness.algorithm(iql)
    outcome = harness.run(command, *harness.short_run(tmp_path, good, **flags))
    harness.assert_refused(outcome, f"{field}: cannot write", "deep/er", REASONS[number])
    assert not (tmp_path / "elsewhere").exists()
    assert not list((tmp_path / field).iterdir())


@pytest.mark.parametrize("field", ["runs_dir", "checkpoints_path"])
@pytest.mark.parametrize("below", ["", "below"])
def test_a_place_that_is_a_file_is_found_at_the_start(
    field, below, good, tmp_path, monkeypatch
):
    no_training(monkeypatch)
    (tmp_path / "file").write_text("mine")
    flags = {"runs_dir": tmp_path / "elsewhere", field: tmp_path / "file" / below}
    command = harness.algorithm(iql)
    outcome = harness.run(command, *harness.short_run(tmp_path, good, **flags))
    harness.assert_refused(outcome, f"{field}: cannot write", "file", "is a file")
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("number", REASONS)
def test_a_cache_of_behavior_models_is_tried_before_any_update(
    number, good, tmp_path, monkeypatch
):
    no_training(monkeypatch)
    full_for_temporary_files(monkeypatch, number, "/behavior$")
    outcome = harness.run(*run_of("dare_iql", tmp_path, good))
    what = r"behavior-mixture-\w+\.safetensors", "CORL_DARE_CACHE"
    harness.assert_refused(
        outcome, "cannot write", *what, REASONS[number].split(".*")[0]
    )


def test_a_cache_that_holds_the_model_need_not_be_written(
    good, unbroken, models, tmp_path, monkeypatch
):
    unbroken("dare_iql")
    monkeypatch.setenv("CORL_DARE_CACHE", str(models))
    full_for_temporary_files(monkeypatch, errno.EROFS, "/behavior$")
    outcome = harness.run(*run_of("dare_iql", tmp_path, good))
    assert outcome.status == 0, outcome


@pytest.mark.parametrize("kind", ["a full disk", "a file in the way"])
def test_a_cache_of_datasets_is_tried_before_rows_are_collected(
    kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(collect, "roll_out", None)
    monkeypatch.setenv("CORL_DARE_CACHE", str(tmp_path / "cache"))
    if kind == "a file in the way":
        (tmp_path / "cache").write_text("mine")
    else:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    flags = harness.short_run(tmp_path, "x", dataset_source="self-collected")
    flags = flags[:2] + flags[4:]
    outcome = harness.run(harness.algorithm(iql), *flags)
    harness.assert_refused(outcome, "cache", "free some space", "CORL_DARE_CACHE")


# ---------------------------------------------------------------- caches


@pytest.mark.parametrize(
    "name, nth",
    [(r"\.unfinished", 1), (r"\.unfinished", 2), (r"behavior-\w+-\w+\.safetensors", 1)],
)
@pytest.mark.parametrize(
    "how, room",
    [
        pytest.param(how, room, marks=() if room == 900 else pytest.mark.whole)
        for how, room in HOWS
    ],
)
def test_a_cache_that_fills_up_names_its_file_and_the_fit_goes_on(
    name, nth, how, room, good, unbroken, tmp_path, monkeypatch
):
    # Saved at every look, so twice in 100 updates.
    monkeypatch.setattr(behavior_fit, "SAVE_SECONDS", 0)
    fields = {"dare.behavior_updates": 150}
    flags = harness.short_run(tmp_path, good, **{**harness.FAST_DARE, **fields})
    command = harness.algorithm(dare_iql)
    with monkeypatch.context() as patch:
        disk = Disk(patch, name, how, nth, room)
        outcome = harness.run(command, *flags)
    assert disk.hits
    harness.assert_refused(
        outcome, "cannot write .*" + name, "no space left", "free some space"
    )
    assert not leftovers(tmp_path)
    again = harness.run(command, *flags)
    assert again.status == 0, again


# ---------------------------------------------------------------- exports and reports


def export(run, out):
    return checkpoints.command_line, "export", run, "--to", "corl", "--out", out


def card_plot(run, out):
    del run
    flags = "hopper-medium-v2", "--path", out.parent / "good.hdf5", "--plot", out
    return with_arguments(card.main), *flags


def add_to_store(run, out):
    return report.command_line, "add", run, "--to", out


def collected(run, out):
    del run
    flags = "hopper-random-v2", "--rows", "100", "--out", out
    return with_arguments(collect.main), *flags


def with_arguments(main):
    """A command that reads sys.argv, as a function of its arguments."""

    def command(argv):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["command", *argv])
            main()

    return command


# Where an export goes -> the command, the files that fail, and what the line has to name.
EXPORTS = {
    "export.pt": (export, r"export\.pt", "export.pt"),
    "card.png": (card_plot, r"card\.png", "card.png"),
    "card.pdf": (card_plot, r"card\.pdf", "card.pdf"),
    "store": (add_to_store, r"store/runs/.*\.json", "store/runs/"),
    "rows.hdf5": (collected, r"rows\.hdf5\.\w+\.part", "rows.hdf5"),
    "chunks.hdf5": (collected, r"000-000\.npy", "000-000.npy"),
}


@pytest.mark.parametrize("out", EXPORTS)
@pytest.mark.parametrize(
    "how, room",
    [
        pytest.param(how, room, marks=() if room == 7 else pytest.mark.whole)
        for how, room in HOWS
        if room != 900
    ],
)
def test_an_export_to_a_full_disk_names_its_file_and_leaves_nothing(
    out, how, room, good, unbroken, tmp_path, monkeypatch
):
    monkeypatch.setattr("corl.machine.git_commit", lambda: "0" * 40)
    shutil.copy(good, tmp_path / "good.hdf5")
    run = shutil.copytree(unbroken("dare_iql"), tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text()) | {"commit": "0" * 40}
    (run / "summary.json").write_text(json.dumps(summary))
    make, pattern, named = EXPORTS[out]
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    with monkeypatch.context() as patch:
        disk = Disk(patch, pattern, how, room=room)
        outcome = harness.run(*make(run, tmp_path / out))
    assert disk.hits, "the disk was never full"
    harness.assert_refused(outcome, "cannot write", re.escape(named), "no space left")
    after = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    # The lock and the finished chunks of a collection stay, for the next try.
    new = [p for p in set(after) - set(before) if p.suffix not in (".lock", ".npy")]
    assert not new
    again = harness.run(*make(run, tmp_path / out))
    assert again.status == 0, again


@pytest.mark.parametrize("stands", [True, False])
def test_what_stood_there_stays(stands, tmp_path, monkeypatch):
    path = tmp_path / "x.hdf5"
    if stands:
        files.write_hdf5(path, lambda file: file.create_dataset("x", data=[1, 2]))
    with monkeypatch.context() as patch:
        Disk(patch, r"x\.hdf5", "write", room=100)
        with pytest.raises(files.CannotWrite, match=r"x\.hdf5 \(No space left"):
            files.write_hdf5(path, lambda file: file.create_dataset("x", data=[3]))
    assert path.exists() == stands
    if stands:
        with h5py.File(path) as file:
            assert list(file["x"]) == [1, 2]


# ---------------------------------------------------------------- one file


@pytest.mark.parametrize("room", [0, 1, 63, 64, 65, 500, 3000])
def test_a_checkpoint_names_the_disk_and_not_the_format(room, tmp_path, monkeypatch):
    """torch answers with an error of its own when a write fails; the disk's is the one to show."""
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"old": 1})
    with monkeypatch.context() as patch:
        Disk(patch, "checkpoint", "write", room=room)
        with pytest.raises(files.CannotWrite, match="checkpoint.pt .No space left"):
            checkpoints.save_checkpoint(path, {"x": torch.zeros(1000)})
    assert checkpoints.read(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("room", [0, 1, 5, 11])
def test_a_row_is_appended_whole_or_not_at_all(room, tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,2.5\n")
    with monkeypatch.context() as patch:
        Disk(patch, "metrics", "write", room=room)
        with pytest.raises(files.CannotWrite, match="metrics.csv"):
            files.append(path, "2,3.5\n3,4.5\n")
    assert path.read_text() == "step,loss\n1,2.5\n"
    files.append(path, "2,3.5\n")
    assert path.read_text().endswith("1,2.5\n2,3.5\n")


def test_a_place_is_tried_without_leaving_anything(tmp_path):
    files.check_writable(tmp_path / "a" / "b")
    files.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(files.CannotWrite, match="link"):
        files.check_writable(tmp_path / "link")
