"""Files appear whole or not at all; digests and HDF5 images are right."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from corl import files

ROOT = Path(__file__).parent.parent


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with files.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old" and len(names(tmp_path)) == 2
    assert path.read_text() == "new" and names(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("error", [OSError("full"), ValueError("no"), KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        with files.replacing(path) as file:
            file.write(b"half")
            raise error
    assert path.read_text() == "old" and names(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_nothing(tmp_path, monkeypatch, call):
    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(tmp_path / "x.txt", "text")
    assert names(tmp_path) == []


def test_the_bytes_reach_the_disk_before_the_name_and_the_name_after(
    tmp_path, monkeypatch
):
    def sync(number):
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{number}") else "file"
        done.append(kind)
        fsync(number)

    def rename(*args):
        done.append("name")
        replace(*args)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc to tell files from folders")
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    files.write_text(tmp_path / "x.txt", "text")
    assert done == ["file", "name", "folder"]


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    victim, path = tmp_path / "victim", tmp_path / "x.txt"
    victim.write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "known")
    (tmp_path / ".x.txt.known.part").symlink_to(victim)
    with pytest.raises(files.CannotWrite, match="File exists"):
        files.write_text(path, "text")
    assert victim.read_text() == "mine" and not path.exists()


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "x.txt"
    with files.replacing(path) as first:
        first.write(b"first ")
        with files.replacing(path) as second:
            second.write(b"second")
        assert path.read_text() == "second"
        first.write(b"and last")
    assert path.read_text() == "first and last" and names(tmp_path) == ["x.txt"]


def test_remains_of_killed_writers_of_one_file_are_removed(tmp_path):
    program = (
        "import os, sys; from corl import files\n"
        "with files.replacing(sys.argv[1]) as file:\n"
        "    file.write(b'half')\n"
        "    os._exit(9)\n"
    )
    for name in ("x[1].txt", "y.txt"):
        command = [sys.executable, "-c", program, str(tmp_path / name)]
        assert subprocess.run(command, cwd=ROOT).returncode == 9
    assert len(names(tmp_path)) == 2
    files.remove_remains(tmp_path / "x[1].txt")
    (left,) = names(tmp_path)
    assert left.startswith(".y.txt.") and left.endswith(".part")


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_others_may_read_what_was_written(tmp_path):
    (tmp_path / "plain").write_text("text")
    files.write_text(tmp_path / "x.txt", "text")
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "x.txt")]
    assert modes[0] == modes[1]


def test_text_is_utf_8_and_paths_may_be_strings(tmp_path):
    files.write_text(str(tmp_path / "x.txt"), "14 ± 2 …\n")
    assert (tmp_path / "x.txt").read_bytes() == "14 ± 2 …\n".encode()


def test_digest_of_a_file_longer_than_a_block(tmp_path):
    content = bytes(range(256)) * 9000
    (tmp_path / "x").write_bytes(content)
    assert files.sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_an_hdf5_file_and_its_attributes_as_plain_values(tmp_path):
    def fill(file):
        file["rows"] = np.arange(5)
        file.attrs.update({"seed": 3, "share": 0.5, "task": "hopper", "dims": [1, 2]})

    files.write_hdf5(tmp_path / "x.hdf5", fill)
    with h5py.File(tmp_path / "x.hdf5") as file:
        assert file["rows"][()].tolist() == list(range(5))
        found = files.attributes(file)
    assert found["dims"].tolist() == [1, 2]
    assert type(found["seed"]) is int and type(found["share"]) is float
    assert (found["seed"], found["share"], found["task"]) == (3, 0.5, "hopper")


def test_an_hdf5_file_that_is_not_filled_is_not_written(tmp_path):
    def fill(file):
        file["rows"] = np.arange(5)
        raise KeyError("more")

    with pytest.raises(KeyError):
        files.write_hdf5(tmp_path / "x.hdf5", fill)
    assert names(tmp_path) == []


def test_errors_become_one_line_that_names_the_file(tmp_path):
    with pytest.raises(RuntimeError, match="cannot write .*x.txt .*two lines") as caught:
        with files.naming_errors(tmp_path / "x.txt"):
            raise OSError("two\nlines")
    assert "\n" not in str(caught.value)


def test_the_module_is_light():
    program = (
        "import sys, corl.files; print({'torch', 'h5py', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
