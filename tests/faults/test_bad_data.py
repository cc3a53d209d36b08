"""A dataset file that cannot be meant, or that means harm, ends in one line that names it."""

import gzip
import io
import os
import pickle
import tarfile
import zipfile

import h5py
import harness
import numpy as np
import pytest
import torch

from algorithms import iql
from corl.data import card, hdf5

pytestmark = pytest.mark.fault("bad inputs")
TASK = "hopper-medium-v2"
KEYS = ("observations", "actions", "rewards", "terminals")
SECRET = 42.0


class Bomb:
    """Unpickling it writes a file, which no test may find."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (os.mkdir, (str(self.place),))


def card_command(argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["card", *argv])
        card.main()


def assert_refused_everywhere(path, folder, *says):
    """By a run, which leaves no folder behind, and by the card."""
    flags = harness.short_run(folder, path)
    outcome = harness.run(harness.algorithm(iql), *flags)
    harness.assert_refused(outcome, *says)
    outcome = harness.run(card_command, TASK, "--path", path)
    harness.assert_refused(outcome, *says)


# ---------------------------------------------------------------- other kinds of files


def npy(rows):
    out = io.BytesIO()
    np.save(out, rows["observations"])
    return out.getvalue()


def npz(rows):
    out = io.BytesIO()
    np.savez(out, **rows)
    return out.getvalue()


def torch_file(rows):
    out = io.BytesIO()
    torch.save({k: torch.as_tensor(v) for k, v in rows.items()}, out)
    return out.getvalue()


def zip_file(rows):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("data.hdf5", b"no matter")
    return out.getvalue()


def tar_file(rows):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("data.hdf5"), io.BytesIO())
    return out.getvalue()


NEVER = ("never read", "where you trust it", "hdf5")
OTHER = {
    **{
        f"pickle, protocol {n}": (
            "d.pkl",
            lambda rows, n=n: pickle.dumps(rows, protocol=n),
            ("pickle", *NEVER),
        )
        for n in range(6)
    },
    "pickle under HDF5's name": ("d.hdf5", pickle.dumps, ("pickle", *NEVER)),
    "pickle of text": ("d.hdf5", lambda r: pickle.dumps([1], 0), ("pickle", *NEVER)),
    "torch": ("d.pt", torch_file, ("torch file", "pickle", *NEVER)),
    "npy": ("d.npy", npy, (r"\.npy", "where you trust it", "HDF5")),
    "gzip": ("d.hdf5.gz", lambda r: gzip.compress(b"x" * 99), ("gzip", "unpack")),
    "bzip2": ("d.bz2", lambda r: b"BZh91AY&SY123", ("bzip2", "unpack")),
    "xz": ("d.xz", lambda r: b"\xfd7zXZ\x00\x00\x04", ("xz", "unpack")),
    "zstd": ("d.zst", lambda r: b"\x28\xb5\x2f\xfd123", ("zstd", "unpack")),
    "zip": ("d.zip", zip_file, ("zip archive", "unpack")),
    "half a zip": ("d.zip", lambda r: zip_file(r)[:40], ("zip archive", "unpack")),
    "tar": ("d.tar", tar_file, ("tar archive", "unpack")),
    "parquet": ("d.parquet", lambda r: b"PAR1\x15\x04", ("Parquet", "HDF5")),
    "csv": ("d.csv", lambda r: b"a,b\n1,2\n", ("text file", "HDF5")),
    "json": ("d.json", lambda r: b'{"observations": []}', ("text file", "HDF5")),
    "yaml": ("d.yaml", lambda r: b"env: hopper\n", ("text file", "HDF5")),
    "a web page": (
        "d.hdf5",
        lambda r: b"<!DOCTYPE html><html>",
        ("web page", "address"),
    ),
    "xml": ("d.hdf5", lambda r: b"<?xml version='1.0'?><Error/>", ("web page",)),
    "git-lfs": ("d.hdf5", lambda r: b"version https://git-lfs x", ("git lfs pull",)),
    "nothing": ("d.hdf5", lambda r: b"", ("empty", "download it again")),
    "spaces": ("d.hdf5", lambda r: b"  \n ", ("empty", "download it again")),
    "zeros": ("d.hdf5", lambda r: bytes(4096), ("not an HDF5 file", "first bytes")),
    "noise": ("d.hdf5", lambda r: b"\x9f\x01\xff" * 99, ("not an HDF5", "first bytes")),
    "half a signature": ("d.hdf5", lambda r: b"\x89HDF\r\n", ("damaged", "again")),
}


@pytest.mark.parametrize("name, content, says", OTHER.values(), ids=OTHER)
def test_other_kinds_of_files_are_told_what_they_are(name, content, says, tmp_path):
    path = tmp_path / name
    path.write_bytes(content(harness.good_rows(20)))
    assert_refused_everywhere(path, tmp_path, name, *says)


@pytest.mark.parametrize("name", ["bomb.pkl", "bomb.hdf5", "bomb.pt", "bomb.npy"])
def test_no_pickle_is_ever_executed(name, tmp_path):
    bomb, path = Bomb(tmp_path / "exploded"), tmp_path / name
    if name.endswith("pt"):
        torch.save(bomb, path)
    elif name.endswith("npy"):
        np.save(path, np.array([bomb], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(bomb))
    assert_refused_everywhere(path, tmp_path, name)
    assert not (tmp_path / "exploded").exists()


PLACES = {
    "a folder": (lambda p: p.mkdir(), ("is a folder",)),
    "a pipe": (os.mkfifo, ("not a regular file",)),
    "nothing": (lambda p: None, ("does not exist",)),
    "a broken link": (
        lambda p: p.symlink_to(p / "x"),
        ("does not exist|cannot be read",),
    ),
    "a link to itself": (lambda p: p.symlink_to(p), ("does not exist|cannot be read",)),
    "a device": (lambda p: p.symlink_to("/dev/zero"), ("not a regular file",)),
}


@pytest.mark.parametrize("make, says", PLACES.values(), ids=PLACES)
def test_places_without_a_file_are_named(make, says, tmp_path):
    make(tmp_path / "place.hdf5")
    assert_refused_everywhere(tmp_path / "place.hdf5", tmp_path, r"place\.hdf5", *says)


@pytest.mark.parametrize("name", ["x" * 300 + ".hdf5", "zero\0byte.hdf5"])
def test_impossible_names_are_refused(name, tmp_path):
    assert_refused_everywhere(
        tmp_path / name, tmp_path, "cannot be read|does not exist|must be a line"
    )


# ---------------------------------------------------------------- pointers out of the file


def external_link(path, key, secret):
    with h5py.File(path, "a") as file:
        del file[key]
        file[key] = h5py.ExternalLink(str(secret), key)


def soft_link(target):
    def point(path, key, secret):
        with h5py.File(path, "a") as file:
            file.move(key, f"old_{key}")
            file[key] = h5py.SoftLink(target.format(key=key))

    return point


def virtual(path, key, secret):
    with h5py.File(path, "a") as file:
        shape, kind = file[key].shape, file[key].dtype
        del file[key]
        layout = h5py.VirtualLayout(shape=shape, dtype=kind)
        layout[...] = h5py.VirtualSource(str(secret), key, shape=shape)
        file.create_virtual_dataset(key, layout)


def virtual_of_nothing(path, key, secret):
    virtual(path, key, secret.with_name("none.hdf5"))


def external_storage(path, key, secret):
    with h5py.File(path, "a") as file:
        shape, kind = file[key].shape, file[key].dtype
        del file[key]
        # Any file of the machine can be read in this way.
        place = [(str(secret), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset(key, shape, kind, external=place)


POINTERS = {
    "external link": (external_link, "external link"),
    "soft link": (soft_link("/old_{key}"), "soft link"),
    "broken soft link": (soft_link("/nowhere"), "soft link"),
    "soft link to itself": (soft_link("/{key}"), "soft link"),
    "virtual": (virtual, "virtual dataset"),
    "virtual of a missing file": (virtual_of_nothing, "virtual dataset"),
    "external storage": (external_storage, "external storage"),
}


SLOW = [*KEYS[1:], "timeouts", "next_observations"]


@pytest.mark.parametrize(
    "key", [KEYS[0], *(pytest.param(key, marks=pytest.mark.whole) for key in SLOW)]
)
@pytest.mark.parametrize("point, says", POINTERS.values(), ids=POINTERS)
def test_what_leads_out_of_the_file_is_refused(point, says, key, tmp_path):
    rows = harness.good_rows(200)
    secret = harness.write_dataset(tmp_path / "secret.hdf5", rows)
    path = harness.write_dataset(tmp_path / "rows.hdf5", rows)
    point(path, key, secret)
    assert_refused_everywhere(
        path, tmp_path, r"rows\.hdf5", key, says, "store the array"
    )


def test_an_export_does_not_follow_links_either(tmp_path):
    rows = harness.good_rows(200)
    secret = harness.write_dataset(tmp_path / "secret.hdf5", rows)
    for number, inside in enumerate(("infos/x", "x")):
        path = harness.write_dataset(tmp_path / f"rows{number}.hdf5", rows)
        with h5py.File(path, "a") as file:
            file[inside] = h5py.ExternalLink(str(secret), "actions")
        out = tmp_path / f"out{number}.hdf5"
        words = (TASK, "--path", path, "--export", "d4rl", out)
        outcome = harness.run(card_command, *words)
        harness.assert_refused(outcome, "x is an external link")
        assert not out.exists()


# ---------------------------------------------------------------- wrong contents


def put(key, **options):
    """Store something else under a key."""

    def spoil(file):
        del file[key]
        file.create_dataset(key, **options)

    return spoil


def group(key):
    def spoil(file):
        del file[key]
        file.create_group(key)["inside"] = np.zeros(3)

    return spoil


def empty(key):
    def spoil(file):
        del file[key]
        file[key] = h5py.Empty("f4")

    return spoil


def named_type(key):
    def spoil(file):
        del file[key]
        file[key] = np.dtype("f4")

    return spoil


def without(key):
    def spoil(file):
        del file[key]

    return spoil


def rows_of(count):
    def spoil(file):
        for key in list(file):
            values = file[key][:count]
            del file[key]
            file[key] = values

    return spoil


def attribute(name, value):
    def spoil(file):
        file.attrs[name] = value
        del file["rewards"]

    return spoil


N = 200
COMPOUND = np.zeros(N, [("a", "f4"), ("b", "f4")])
VLEN = h5py.vlen_dtype(np.float32)
CONTENTS = {
    "compound": (put("rewards", data=COMPOUND), "rewards", "numbers are needed"),
    "compound states": (
        put("observations", data=np.zeros((N, 11), COMPOUND.dtype)),
        "observations",
        "numbers are needed",
    ),
    "vlen": (put("rewards", shape=(N,), dtype=VLEN), "rewards", "ever written|numbers"),
    "texts": (
        put("rewards", data=["x"] * N, dtype=h5py.string_dtype()),
        "rewards",
        "numbers are needed",
    ),
    "bytes": (
        put("rewards", data=np.array([b"x"] * N)),
        "rewards",
        "numbers are needed",
    ),
    "opaque": (
        put("rewards", data=np.zeros(N, "V4")),
        "rewards",
        "numbers are needed",
    ),
    "references": (
        put("rewards", shape=(N,), dtype=h5py.ref_dtype),
        "rewards",
        "ever written|numbers",
    ),
    "complex": (put("actions", data=np.zeros((N, 3), complex)), "actions", "numbers"),
    "array type": (
        put("rewards", shape=(N,), dtype=np.dtype(("f4", (2,)))),
        "rewards",
        "ever written|numbers",
    ),
    "scalar": (put("rewards", data=1.0), "rewards", r"shape \(\)"),
    "scalar states": (put("observations", data=1.0), "observations", r"shape \(\)"),
    "no shape": (empty("actions"), "actions", "empty"),
    "one more dimension": (
        put("observations", data=np.zeros((N, 11, 1))),
        "observations",
        r"\(200, 11, 1\)",
    ),
    "flat states": (put("observations", data=np.zeros(N)), "observations", r"\(200,\)"),
    "transposed": (
        put("observations", data=np.zeros((11, N))),
        "observations",
        "widths",
    ),
    "too wide": (put("observations", data=np.zeros((N, 12))), "observations", "widths"),
    "no width": (put("observations", data=np.zeros((N, 0))), "observations", "widths"),
    "a group": (group("actions"), "actions", "is a group"),
    "a type": (named_type("actions"), "actions", "is no array"),
    "short rewards": (put("rewards", data=np.zeros(N - 1)), "rewards", "199 rows"),
    "long flags": (put("timeouts", data=np.zeros(N + 1)), "timeouts", "201 rows"),
    "short next": (
        put("next_observations", data=np.zeros((1, 11))),
        "next_observations",
        "1 rows",
    ),
    "narrow next": (
        put("next_observations", data=np.zeros((N, 3))),
        "next_observations",
        "width 3",
    ),
    "no rows": (rows_of(0), "0 row", "at least 2"),
    "one row": (rows_of(1), "1 row", "at least 2"),
    "huge action": (put("actions", data=np.full((N, 3), 9.0)), "actions", r"\[-1, 1\]"),
    "infinite": (put("rewards", data=np.full(N, np.inf)), "rewards", "finite"),
    "not a number": (put("rewards", data=np.full(N, np.nan)), "rewards", "finite"),
    "beyond float32": (put("rewards", data=np.full(N, 1e200)), "rewards", "finite"),
    "flags of two": (put("terminals", data=np.full(N, 2)), "terminals", "0 or 1"),
    "negative flags": (put("timeouts", data=np.full(N, -1)), "timeouts", "0 or 1"),
    **{f"no {key}": (without(key), key, "lacks") for key in KEYS},
    "claims to be ours": (attribute("source", "self-collected"), "rewards", "lacks"),
}


@pytest.mark.parametrize("spoil, key, says", CONTENTS.values(), ids=CONTENTS)
def test_wrong_contents_are_named_with_file_and_key(spoil, key, says, tmp_path):
    path = harness.write_dataset(tmp_path / "rows.hdf5", harness.good_rows(N))
    with h5py.File(path, "a") as file:
        spoil(file)
    assert_refused_everywhere(path, tmp_path, r"rows\.hdf5", key, says)


ATTRIBUTES = {
    "ours, and nothing else": {"source": "self-collected"},
    "ours, with a share of text": {
        "source": "self-collected",
        "mix": "expert",
        "share": "much",
    },
    "an array for a text": {"source": np.arange(4)},
    "numbers for texts": {"source": 3.5, "task": 7, "exported_from": 1},
    "a text of pages": {"exported_from": "page \n" * 20_000},
    "empty": {"source": h5py.Empty("f4")},
}


@pytest.mark.parametrize("values", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_odd_attributes_do_no_harm(values, tmp_path):
    path = harness.write_dataset(tmp_path / "rows.hdf5", harness.good_rows(N))
    with h5py.File(path, "a") as file:
        for name, value in values.items():
            if isinstance(value, str) and len(value) > 60_000:
                # Larger ones do not fit beside the root group's other facts.
                value = value[:60_000]
            file.attrs[name] = value
    outcome = harness.run(card_command, TASK, "--path", path)
    assert outcome.status == 0 and not outcome.trace, outcome
    assert len(outcome.out) < 3000


# ---------------------------------------------------------------- sizes


def claim(path, key, shape, **options):
    with h5py.File(path, "a") as file:
        kind = file[key].dtype
        del file[key]
        file.create_dataset(key, shape, kind, **options)


CLAIMS = {
    "terabytes in gzip": {"chunks": (1000, 11), "compression": "gzip"},
    "terabytes in chunks": {"chunks": (1000, 11)},
    "terabytes that may grow": {"chunks": (1000, 11), "maxshape": (None, 11)},
    "terabytes": {},
}


@pytest.mark.parametrize("options", CLAIMS.values(), ids=CLAIMS)
def test_a_small_file_that_claims_terabytes_is_refused_unread(options, tmp_path):
    path = harness.write_dataset(tmp_path / "rows.hdf5", harness.good_rows(N))
    claim(path, "observations", (10**11, 11), **options)
    assert path.stat().st_size < 1e6
    says = (r"rows\.hdf5", "observations", "100000000000", "ever written|memory")
    assert_refused_everywhere(path, tmp_path, *says)


def test_rows_that_were_never_written_are_not_read_as_zeros(tmp_path):
    path = harness.write_dataset(tmp_path / "rows.hdf5", harness.good_rows(N))
    claim(path, "rewards", (N,), chunks=(50,))
    with h5py.File(path, "a") as file:
        file["rewards"][:120] = 1.0
    says = (r"rows\.hdf5", "rewards", "3 of 4", "make the file again")
    assert_refused_everywhere(path, tmp_path, *says)
    claim(path, "rewards", (N,))
    assert_refused_everywhere(path, tmp_path, "rewards", "0 of 1")


@pytest.mark.parametrize("options", [{}, {"compression": "gzip", "compression_opts": 9}])
def test_a_file_beyond_the_memory_is_refused_unread(options, tmp_path, monkeypatch):
    path = harness.write_dataset(tmp_path / "rows.hdf5", harness.good_rows(N))
    with h5py.File(path, "a") as file:
        del file["observations"]
        file.create_dataset("observations", data=np.zeros((N, 11)), **options)
    monkeypatch.setattr(hdf5, "available_memory", lambda: 30_000)
    says = (r"rows\.hdf5", "memory", "fewer rows")
    assert_refused_everywhere(path, tmp_path, *says)


def test_a_read_that_runs_out_of_memory_is_one_line(tmp_path, monkeypatch):
    path = harness.write_dataset(tmp_path / "rows.hdf5", harness.good_rows(N))

    def no_room(*args):
        raise MemoryError

    monkeypatch.setattr(h5py.Dataset, "__getitem__", no_room)
    assert_refused_everywhere(path, tmp_path, r"rows\.hdf5", "memory", "fewer rows")


def test_memory_is_known_here():
    assert hdf5.available_memory() > 1e8


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_named(share, tmp_path):
    path = harness.write_dataset(tmp_path / "rows.hdf5", harness.good_rows(N))
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert_refused_everywhere(path, tmp_path, r"rows\.hdf5", "damaged", "again")


def damaged(path, seed):
    """64 bytes of noise somewhere in the file's first pages, where HDF5 keeps its tables."""
    rng = np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    place = int(rng.integers(8, min(len(content), 8192) - 64))
    content[place : place + 64] = rng.bytes(64)
    path.write_bytes(content)


def assert_damage_does_no_harm(seed, tmp_path):
    path = harness.write_dataset(tmp_path / "rows.hdf5", harness.good_rows(N))
    damaged(path, seed)
    outcome = harness.run(card_command, TASK, "--path", path)
    # Noise may hit a place that nobody reads.
    if outcome.status != 0 or outcome.trace:
        harness.assert_refused(outcome, r"rows\.hdf5")


@pytest.mark.parametrize("seed", range(10))
def test_noise_in_the_tables_ends_in_one_line_or_in_nothing(seed, tmp_path):
    assert_damage_does_no_harm(seed, tmp_path)


@pytest.mark.whole
@pytest.mark.parametrize("seed", range(10, 200))
def test_more_noise_in_the_tables(seed, tmp_path):
    assert_damage_does_no_harm(seed, tmp_path)
