"""D4RL's rules on made-up files, every bad input, and where data is looked for."""

import hashlib
import http.server
import importlib
import json
import os
import sys
import tempfile
import threading
import tracemalloc
import types

import gymnasium
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corl import files, machine, tasks
from corl.data import card, published, schema, sources
from corl.data.minari import caveat, split_episodes, stack_episodes
from corl.standin import collect, policies, rollout
from corl.tasks import normalized_score, task_names

S, A = 11, 3  # hopper
TASK = "hopper-medium-v2"
HOPPER, UMAZE = tasks.task(TASK), tasks.task("antmaze-umaze-v2")
FILE = "hopper_medium-v2.hdf5"


def make_raw(terminals, timeouts=None, seed=0, state_dim=S, action_dim=A):
    """Rows with distinct values; next observations that differ at every episode end."""
    rng, n = np.random.default_rng(seed), len(terminals)
    raw = {
        "observations": rng.normal(size=(n, state_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(n, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.asarray(terminals, dtype=bool),
        "next_observations": np.empty((n, state_dim), np.float32),
    }
    raw["next_observations"][:-1] = raw["observations"][1:]
    ends = raw["terminals"].copy()
    if timeouts is not None:
        raw["timeouts"] = np.asarray(timeouts, dtype=bool)
        ends |= raw["timeouts"]
    ends[-1] = True
    true_last = rng.normal(size=(ends.sum(), state_dim))
    raw["next_observations"][ends] = true_last.astype(np.float32)
    return raw


def v2_raw():
    """Episodes: 4 rows to a terminal, 3 to a time-out, a single row, an unfinished."""
    ends = {3: "terminals", 6: "timeouts", 7: "terminals"}
    flags = [
        [ends.get(i) == kind for i in range(12)] for kind in ("terminals", "timeouts")
    ]
    return make_raw(*flags)


def write(path, raw, **more):
    with h5py.File(path, "w") as file:
        for key, values in {**raw, **more}.items():
            file[key] = values
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """No data anywhere but under the test's own folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("CORL_DARE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(policies, "STAND_IN_ROWS", 60)
    monkeypatch.setenv("CORL_DARE_D4RL_URL", "")
    monkeypatch.setattr(sources, "unreachable", {})
    (tmp_path / "d4rl").mkdir()
    return tmp_path


# ---------------------------------------------------------------- D4RL's rules


def d4rl_loop(raw, horizon=1000):
    """The published rules, one row at a time."""
    out = {
        key: []
        for key in (
            "observations",
            "actions",
            "next_observations",
            "rewards",
            "terminals",
        )
    }
    step = 0
    for i in range(len(raw["rewards"]) - 1):
        if "timeouts" in raw:
            drop = bool(raw["timeouts"][i])
        else:
            drop = step == horizon - 1
        if drop:
            step = 0
            continue
        if raw["terminals"][i]:
            step = 0
        out["observations"].append(raw["observations"][i])
        out["actions"].append(raw["actions"][i])
        out["next_observations"].append(raw["observations"][i + 1])
        out["rewards"].append(raw["rewards"][i])
        out["terminals"].append(bool(raw["terminals"][i]))
        step += 1
    return {key: np.array(values) for key, values in out.items()}


def assert_same(found, expected):
    assert list(sorted(found)) == sorted(expected)
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)
        wanted = np.bool_ if key == "terminals" else np.float32
        assert found[key].dtype == wanted


def test_all_ends_of_episodes_as_d4rl_reads_them():
    raw = v2_raw()
    found = schema.qlearning_dataset(raw)
    assert_same(found, d4rl_loop(raw))
    assert len(found["rewards"]) == 10  # 12 rows without the time-out and the last one
    assert found["terminals"].sum() == 2
    # After a terminal comes the first observation of the next episode, not the true one.
    np.testing.assert_array_equal(found["next_observations"][3], raw["observations"][4])
    assert (found["next_observations"][3] != raw["next_observations"][3]).all()


def test_true_next_states_with_time_outs_kept():
    raw = v2_raw()
    found = schema.qlearning_dataset(raw, keep_timeouts=True)
    assert_same(found, {key: raw[key] for key in found})
    assert len(found["rewards"]) == 12
    del raw["next_observations"]
    with pytest.raises(ValueError, match="needs stored next_observations"):
        schema.qlearning_dataset(raw, keep_timeouts=True)


@pytest.mark.parametrize("keep_timeouts", [False, True])
def test_result_shares_no_memory_with_the_raw_data(keep_timeouts):
    raw = v2_raw()
    for values in schema.qlearning_dataset(raw, keep_timeouts).values():
        assert not any(np.shares_memory(values, original) for original in raw.values())


FLAGS = st.lists(st.sampled_from([(0, 0), (0, 0), (1, 0), (0, 1), (1, 1)]), min_size=2)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(FLAGS, st.booleans())
def test_any_pattern_of_flags_equals_the_loop(flags, as_float):
    raw = make_raw(*np.array(flags, dtype=bool).T)
    expected = d4rl_loop(raw)
    if as_float:  # antmaze stores its flags like this
        raw["terminals"] = raw["terminals"].astype(np.float64)
        raw["timeouts"] = raw["timeouts"].astype(np.float32)
    if len(expected["rewards"]):
        assert_same(schema.qlearning_dataset(raw), expected)
    else:
        with pytest.raises(ValueError, match="no transition is left"):
            schema.qlearning_dataset(raw)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.lists(st.sampled_from([False] * 4 + [True]), min_size=2, max_size=60),
    st.integers(2, 12),
)
def test_without_time_outs_the_counter_equals_the_loop(terminals, horizon):
    raw = make_raw(terminals)
    expected = d4rl_loop(raw, horizon)
    if len(expected["rewards"]):
        assert_same(schema.qlearning_dataset(raw, horizon=horizon), expected)


def test_counter_cuts_one_step_early_after_a_terminal():
    terminals = np.zeros(30, bool)
    terminals[4] = True
    flags = schema.timeout_flags({"terminals": terminals}, horizon=10)
    # Ten rows per episode otherwise, but nine after the terminal.
    assert np.flatnonzero(flags).tolist() == [13, 23]
    flags = schema.timeout_flags({"terminals": np.zeros(30, bool)}, horizon=10)
    assert np.flatnonzero(flags).tolist() == [9, 19, 29]
    with pytest.raises(ValueError, match="horizon is 1"):
        schema.timeout_flags({"terminals": terminals}, horizon=1)


def test_missing_key_is_named():
    raw = v2_raw()
    del raw["actions"]
    with pytest.raises(ValueError, match="raw data lacks actions"):
        schema.qlearning_dataset(raw)


@pytest.mark.optional("d4rl")
def test_equals_the_real_d4rl(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setenv("D4RL_SUPPRESS_IMPORT_ERROR", "1")
    d4rl = importlib.import_module("d4rl")
    assert hasattr(d4rl, "offline_env"), "this d4rl is the shim, not the package"
    rng = np.random.default_rng(0)
    for raw in (v2_raw(), make_raw(*(rng.random((2, 500)) < 0.1))):
        expected = d4rl.qlearning_dataset(None, dataset=raw)
        assert_same(schema.qlearning_dataset(raw), expected)
        del raw["timeouts"]
        env = types.SimpleNamespace(_max_episode_steps=7)
        expected = d4rl.qlearning_dataset(env, dataset=raw)
        assert_same(schema.qlearning_dataset(raw, horizon=7), expected)
    for task in map(tasks.task, task_names()):
        monkeypatch.delenv("CORL_DARE_D4RL_URL", raising=False)
        assert d4rl.infos.DATASET_URLS[task.name] == published.url(task)
        assert d4rl.infos.REF_MIN_SCORE[task.name] == task.ref_min
        assert d4rl.infos.REF_MAX_SCORE[task.name] == task.ref_max


# ---------------------------------------------------------------- reading


def test_file_is_read_whole_and_only_what_is_needed(tmp_path):
    raw = v2_raw()
    path = write(tmp_path / "x.hdf5", raw, **{"infos/qpos": np.zeros((12, 6))})
    assert_read(path, raw)


def assert_read(path, raw, task=TASK):
    found = schema.load_hdf5(path, task)
    assert set(found) == set(raw)
    for key in raw:
        np.testing.assert_array_equal(found[key], raw[key].reshape(found[key].shape))
        wanted = np.bool_ if key in ("terminals", "timeouts") else np.float32
        assert found[key].dtype == wanted


def test_other_types_and_columns_are_cast(tmp_path):
    raw = v2_raw()
    for key in ("observations", "actions", "rewards", "next_observations"):
        raw[key] = raw[key].astype(np.float64)
    raw["terminals"] = raw["terminals"].astype(np.float32)[:, None]
    raw["timeouts"] = raw["timeouts"].astype(np.uint8)
    raw["rewards"] = raw["rewards"][:, None]
    assert_read(write(tmp_path / "x.hdf5", raw), raw)


def test_antmaze_layout_is_read(tmp_path):
    flags = np.zeros((2, 20), bool)
    flags[0, 4:7] = flags[1, 9] = True
    raw = make_raw(*flags, state_dim=29, action_dim=8)
    del raw["next_observations"]
    assert_read(write(tmp_path / "x.hdf5", raw), raw, "antmaze-umaze-v2")
    found = schema.statistics(raw, UMAZE)
    assert (found["episodes"], found["unfinished_rows"]) == (1, 10)


def change(key, value, index=...):
    def apply(raw):
        raw[key] = raw[key].copy()
        raw[key][index] = value

    return apply


def replace(key, value):
    return lambda raw: raw.update({key: value})


def keep_rows(n):
    return lambda raw: raw.update({key: values[:n] for key, values in raw.items()})


SHAPE = (
    "widths \\(17, 6\\), which fit halfcheetah or walker2d; hopper-medium-v2 needs 11"
)
BAD = {
    "nan": (
        change("observations", np.nan, (5, 2)),
        "observations has nan in row 5 \\(1 ",
    ),
    "inf": (
        change("rewards", -np.inf, slice(7, 9)),
        "rewards has -inf in row 7 \\(2 bad",
    ),
    "nan next": (change("next_observations", np.nan, 3), "next_observations .* row 3"),
    "huge": (replace("rewards", np.full(12, 1e300)), "rewards has 1e\\+300 in row 0"),
    "action": (change("actions", 1.5, (4, 1)), "actions has 1.5 in row 4.*\\[-1, 1\\]"),
    "action nan": (change("actions", np.nan, (4, 1)), "actions has nan in row 4"),
    "flag": (replace("timeouts", np.arange(12)), "timeouts has 2 in row 2.*0 or 1"),
    "flag nan": (
        replace("terminals", np.full(12, np.nan)),
        "terminals has nan in row 0",
    ),
    "flag half": (replace("terminals", np.full(12, 0.5)), "terminals has 0.5 in row 0"),
    "length": (
        replace("rewards", np.zeros(11)),
        "rewards has 11 rows, observations has",
    ),
    "flags short": (replace("timeouts", np.zeros(3)), "timeouts has 3 rows"),
    "text": (replace("rewards", np.array([b"one"] * 12)), "rewards has type \\|S3"),
    "complex": (replace("rewards", np.zeros(12, complex)), "rewards has type complex"),
    "scalar": (replace("rewards", np.float32(0)), "rewards has shape \\(\\)"),
    "flat": (replace("observations", np.zeros(12)), "observations has shape \\(12,\\)"),
    "cube": (
        replace("actions", np.zeros((12, A, 1))),
        "actions has shape \\(12, 3, 1\\)",
    ),
    "wide": (replace("rewards", np.zeros((12, 2))), "rewards has shape \\(12, 2\\)"),
    "next": (replace("next_observations", np.zeros((12, 9))), "width 9; expected 11"),
    "one row": (keep_rows(1), "1 row\\(s\\); a dataset needs at least 2"),
    "no row": (keep_rows(0), "0 row\\(s\\)"),
    "robot": (lambda raw: raw.update(make_raw([0] * 12, None, 0, 17, 6)), SHAPE),
    "nobody": (replace("actions", np.zeros((12, 4))), "\\(11, 4\\), which fit no robot"),
}


@pytest.mark.parametrize("spoil, message", BAD.values(), ids=BAD)
def test_bad_contents_are_refused_with_file_key_and_row(tmp_path, spoil, message):
    raw = v2_raw()
    spoil(raw)
    path = write(tmp_path / "spoilt.hdf5", raw)
    with pytest.raises(ValueError, match=f"spoilt.hdf5.*{message}") as caught:
        schema.load_hdf5(path, TASK)
    assert "\n" not in str(caught.value)


def test_rounding_beyond_the_action_bound_is_accepted(tmp_path):
    raw = v2_raw()
    raw["actions"][3] = 1.0005
    assert_read(write(tmp_path / "x.hdf5", raw), raw)


@pytest.mark.parametrize("key", schema.REQUIRED)
def test_missing_keys_are_named(tmp_path, key):
    raw = v2_raw()
    del raw[key]
    path = write(tmp_path / "x.hdf5", raw)
    with pytest.raises(ValueError, match=f"x.hdf5 lacks {key}; it holds .*next_obs"):
        schema.load_hdf5(path, TASK)


def test_group_in_place_of_an_array_is_named(tmp_path):
    raw = v2_raw()
    raw["observations/desired_goal"] = raw.pop("observations")
    with pytest.raises(ValueError, match="observations is a group"):
        schema.load_hdf5(write(tmp_path / "x.hdf5", raw), TASK)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"<HTML><body>moved", "web page"),
        (b"PK\x03\x04 something else", "it is a zip archive; unpack it"),
        (b"\x00\x01 something else", "first bytes are not HDF5's"),
    ],
)
def test_files_of_other_kinds_are_recognized(tmp_path, content, message):
    (tmp_path / "x.hdf5").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.hdf5 is not an HDF5 file: .*{message}"):
        schema.load_hdf5(tmp_path / "x.hdf5", TASK)


def test_truncated_file_folder_and_missing_file_are_refused(tmp_path):
    path = write(tmp_path / "x.hdf5", v2_raw())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="x.hdf5 is a damaged or incomplete HDF5 file"):
        schema.load_hdf5(path, TASK)
    for name, message in (("", "is a folder"), ("none.hdf5", "does not exist")):
        with pytest.raises(ValueError, match=message):
            schema.load_hdf5(tmp_path / name, TASK)


def test_damaged_chunk_is_refused(tmp_path):
    raw = make_raw([0] * 500, [0] * 500)
    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in raw.items():
            file.create_dataset(key, data=values, compression="gzip")
        place = file["observations"].id.get_chunk_info(0).byte_offset
    with open(path, "r+b") as handle:
        handle.seek(place)
        handle.write(b"\xff" * 64)
    with pytest.raises(ValueError, match="x.hdf5 is a damaged or incomplete HDF5 file"):
        schema.load_hdf5(path, TASK)


@pytest.mark.parametrize("dtype, allowed", [(np.float32, 1.9), (np.float64, 2.5)])
def test_memory_while_loading_stays_near_the_arrays(home, dtype, allowed):
    rng = np.random.default_rng(0)
    raw = make_raw(*(rng.random((2, 50_000)) < 0.01))
    for key in ("observations", "actions", "rewards", "next_observations"):
        raw[key] = raw[key].astype(dtype)
    path = write(home / "x.hdf5", raw)
    sources.resolve(TASK, path=path)  # what is imported or cached on the way
    del raw
    tracemalloc.start()
    try:
        found = sources.resolve(TASK, path=path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < allowed * sum(v.nbytes for v in found.arrays.values())


# ---------------------------------------------------------------- names and statistics


@pytest.mark.parametrize(
    "task, name",
    [
        ("hopper-medium-replay-v2", "hopper_medium_replay-v2.hdf5"),
        ("walker2d-full-replay-v2", "walker2d_full_replay-v2.hdf5"),
        (
            "antmaze-umaze-v2",
            "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5",
        ),
        (
            "antmaze-large-play-v2",
            "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
        ),
        (
            "antmaze-medium-diverse-v2",
            "Ant_maze_big-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
        ),
    ],
)
def test_file_names_are_d4rls(task, name):
    assert published.file_name(tasks.task(task)) == name


def test_every_task_has_its_own_file_name():
    names = {published.file_name(task) for task in map(tasks.task, task_names())}
    assert len(names) == len(task_names())
    with pytest.raises(ValueError, match="-v2 tasks only"):
        published.file_name(tasks.task("hopper-medium-v0"))


def test_table_of_known_files():
    known = published.known_files()
    assert set(known) == set(task_names()) - {"antmaze-medium-play-v2"}
    assert all(len(bytes.fromhex(digest)) == 32 for _, digest in known.values())
    assert len({digest for _, digest in known.values()}) == len(known)
    assert known["hopper-medium-v2"][0] == 152756557
    assert known["antmaze-large-diverse-v2"][1].startswith("84f775eb")
    assert set(published.D4RL_RETURNS) <= {t.removesuffix("-v2") for t in task_names()}


def test_statistics_of_complete_episodes_against_a_loop():
    raw = v2_raw()
    returns, lengths, start = [], [], 0
    for i in range(12):
        if raw["terminals"][i] or raw["timeouts"][i]:
            returns.append(sum(float(r) for r in raw["rewards"][start : i + 1]))
            lengths.append(i + 1 - start)
            start = i + 1
    found = schema.statistics(raw, HOPPER)
    assert lengths == [4, 3, 1]
    for name, values in (("return", returns), ("length", lengths)):
        expected = [np.mean(values), np.std(values), min(values), max(values)]
        np.testing.assert_allclose(list(found[name].values()), expected, rtol=1e-6)
    counts = [found[k] for k in ("rows", "episodes", "unfinished_rows")]
    assert counts == [12, 3, 4]
    assert (found["terminals"], found["timeouts"]) == (2, 1)
    assert found["action_max"] == raw["actions"].max()
    json.dumps(found)


def test_statistics_without_a_complete_episode():
    found = schema.statistics(make_raw([0] * 5, [0] * 5), HOPPER)
    assert found["episodes"] == 0 and found["unfinished_rows"] == 5
    assert found["return"] == dict.fromkeys(("mean", "std", "min", "max"))


# ---------------------------------------------------------------- where data comes from


def test_order_of_sources(home, capsys, monkeypatch):
    task, name = "hopper-random-v2", "hopper_random-v2.hdf5"
    last = sources.resolve(task)
    assert last.provenance["source"] == "self-collected"
    printed = capsys.readouterr().out
    assert f"there is no {home / 'd4rl' / name}" in printed
    assert "d4rl: downloads are switched off (CORL_DARE_D4RL_URL is empty)" in printed
    assert last.provenance["message"] in printed

    folder = write(home / "d4rl" / name, v2_raw())
    found = sources.resolve(task)
    assert (found.provenance["source"], found.provenance["rows"]) == ("d4rl_dir", 10)
    assert found.provenance["path"] == str(folder)

    explicit = write(home / "mine.hdf5", make_raw([0] * 5, [0] * 5))
    found = sources.resolve(task, path=explicit)
    assert (found.provenance["source"], found.provenance["rows"]) == ("file", 4)

    found = sources.resolve(task, source="self-collected", rows=30)
    assert (found.provenance["source"], found.provenance["rows_raw"]) == (
        "self-collected",
        30,
    )
    assert sources.resolve(task, source="d4rl_dir").provenance["rows"] == 10

    monkeypatch.delenv("D4RL_DATASET_DIR")
    with pytest.raises(RuntimeError, match="home/.d4rl/datasets/hopper_random"):
        sources.resolve(task, source="d4rl_dir")


def test_arrays_and_provenance_of_a_file(home):
    raw = v2_raw()
    path = write(home / "x.hdf5", raw)
    found = sources.resolve(TASK, source="file", path=path)
    assert_same(found.arrays, d4rl_loop(raw))
    facts = found.provenance
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (facts["rows"], facts["rows_raw"]) == (10, 12)
    assert not facts["recognised"] and facts["label"].startswith("unknown file")
    assert found.task == HOPPER
    json.dumps([facts, found.statistics])


def test_d4rls_own_bytes_are_recognised_for_their_task_only(home, monkeypatch):
    path = write(home / "x.hdf5", v2_raw())
    digest = files.sha256(path)
    monkeypatch.setattr(published, "CHECKSUMS", f"hopper\nmedium 99 {digest}\n")
    own = sources.resolve(TASK, path=path).provenance
    assert own["recognised"] and own["label"].startswith(
        "D4RL's own file of hopper-medium"
    )
    other = sources.resolve("hopper-expert-v2", path=path).provenance
    assert not other["recognised"] and "hopper-medium-v2" in other["label"]


def test_file_in_d4rls_folder_that_is_too_short_is_marked(home):
    write(home / "d4rl" / FILE, v2_raw())
    assert "shorter than D4RL's 152756557" in sources.resolve(TASK).provenance["label"]


def test_stand_in_is_labelled_kept_and_collected_once(home, monkeypatch):
    task = "hopper-random-v2"
    first = sources.resolve(task)
    facts = first.provenance
    assert facts["label"] == "self-collected stand-in (not D4RL data)"
    assert facts["rows_raw"] == 60 and not facts["recognised"]
    assert facts["collected"]["seed"] == 0
    assert facts["path"].startswith(str(home / "cache"))
    json.dumps(facts)
    copy = sources.resolve(TASK, path=facts["path"]).provenance
    assert copy["label"].startswith("self-collected stand-in (not D4RL data), made for")
    monkeypatch.setattr(rollout, "rollout", None)
    again = sources.resolve(task)
    assert again.provenance == facts
    np.testing.assert_array_equal(again.arrays["actions"], first.arrays["actions"])


def test_a_name_is_parsed_once_and_the_task_passed_on(home, monkeypatch, capsys):
    def count(name):
        if isinstance(name, str):
            parsed.append(name)
        return plain(name)

    path, parsed, plain = write(home / "x.hdf5", v2_raw()), [], tasks.task
    monkeypatch.setattr(tasks, "task", count)
    found = sources.resolve(TASK, path=path)
    assert parsed == [TASK]
    sources.resolve("hopper-random-v2")  # collects
    assert parsed == [TASK, "hopper-random-v2"]
    again = sources.resolve(found.task, path=path)
    card.export(again, "d4rl", str(home / "y.hdf5"))
    assert card.card(again) == card.card(found)
    assert len(parsed) == 2


def test_cache_folder_argument_variable_and_default(home, monkeypatch):
    def folder(**options):
        found = sources.resolve("hopper-random-v2", "self-collected", **options)
        return os.path.relpath(os.path.dirname(found.provenance["path"]), home)

    assert folder(cache_dir=home / "here") == "here/datasets"
    assert folder() == "cache/datasets"
    monkeypatch.delenv("CORL_DARE_CACHE")
    assert folder() == "home/.cache/corl_dare/datasets"


def test_new_policies_get_a_new_stand_in(home, monkeypatch):
    names = []
    for digest in ("a" * 64, "b" * 64):
        monkeypatch.setattr(
            policies, "fingerprint", lambda task, d=digest: {"medium": d}
        )
        names.append(sources.stand_in_path(HOPPER).name)
    assert names == [f"{TASK}-60-{c * 8}.hdf5" for c in "ab"]


def test_nothing_found_tells_all_that_was_tried(home, monkeypatch):
    monkeypatch.setattr(policies, "POLICY_DIR", home / "nowhere")
    with pytest.raises(ValueError) as caught:
        sources.resolve("antmaze-large-play-v2")
    message = str(caught.value)
    for part in (
        "Ant_maze_hardest",
        "d4rl: downloads are switched off",
        "self-collected:",
        "dataset_path",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"source": "D4RL"},
            ValueError,
            "dataset_source 'D4RL' is not one of auto, file",
        ),
        ({"source": "file"}, ValueError, "'file' needs dataset_path"),
        ({"source": "minari"}, ValueError, "'minari' needs dataset_path"),
        ({"source": "d4rl", "path": "x"}, ValueError, "'d4rl' does not read it"),
        ({"source": "file", "path": "minari:a/b-v0"}, ValueError, "is a Minari id"),
        ({"path": "none.hdf5"}, ValueError, "none.hdf5 does not exist"),
        (
            {"source": "d4rl"},
            RuntimeError,
            "no dataset for hopper-medium-v2; d4rl: down",
        ),
        ({"source": "self-collected", "rows": 1}, ValueError, "rows is 1|not shipped"),
    ],
)
def test_impossible_requests_are_refused(home, options, error, message):
    with pytest.raises(error, match=message):
        sources.resolve(TASK, **options)


def test_file_without_a_usable_row_is_refused(home):
    path = write(home / "x.hdf5", make_raw([0] * 3, [1, 1, 0]))
    with pytest.raises(ValueError, match="x.hdf5: no transition is left"):
        sources.resolve(TASK, path=path)


# ---------------------------------------------------------------- D4RL's server


@pytest.fixture
def server(home, monkeypatch):
    """A folder behind HTTP in place of D4RL's server, which knows hopper-medium."""
    (home / "served" / "gym_mujoco_v2").mkdir(parents=True)
    path = write(home / "served" / "gym_mujoco_v2" / FILE, v2_raw())
    digest, size = files.sha256(path), path.stat().st_size
    monkeypatch.setattr(published, "CHECKSUMS", f"hopper\nmedium {size} {digest}\n")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=home / "served")

        def log_message(self, *args):
            asked.append(args)

    asked = []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=[0.01], daemon=True).start()
    url = f"http://127.0.0.1:{running.server_address[1]}"
    monkeypatch.setenv("CORL_DARE_D4RL_URL", url + "/")
    yield types.SimpleNamespace(path=path, url=url, asked=asked)
    running.shutdown()
    running.server_close()


def test_addresses_are_d4rls(home, monkeypatch):
    monkeypatch.delenv("CORL_DARE_D4RL_URL")
    stem = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
    assert published.url(HOPPER) == f"{stem}/gym_mujoco_v2/{FILE}"
    name = "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"
    assert published.url(UMAZE) == f"{stem}/ant_maze_v2/{name}"


def test_download_goes_to_d4rls_folder_once(home, server):
    found = sources.resolve(TASK).provenance
    assert (found["source"], found["path"]) == ("d4rl", str(home / "d4rl" / FILE))
    assert found["recognised"] and "checksum matches" in found["label"]
    assert [n for n in os.listdir(home / "d4rl") if n != FILE + ".lock"] == [FILE]
    asked = len(server.asked)
    assert sources.resolve(TASK).provenance["source"] == "d4rl_dir"
    assert sources.resolve(TASK, "d4rl").provenance["source"] == "d4rl"
    assert len(server.asked) == asked


def test_file_that_the_server_lacks_falls_on_to_the_stand_in(
    home, server, monkeypatch, capsys
):
    known = f"{published.CHECKSUMS}random 99 {'0' * 64}\n"
    monkeypatch.setattr(published, "CHECKSUMS", known)
    found = sources.resolve("hopper-random-v2").provenance
    assert found["source"] == "self-collected"
    lines = capsys.readouterr().out.splitlines()
    assert sum("HTTP 404" in line for line in lines) == 1
    with pytest.raises(RuntimeError, match="d4rl: .*hopper_random-v2.hdf5: HTTP 404"):
        sources.resolve("hopper-random-v2", "d4rl")
    # The server answers, so other files are still asked for.
    assert sources.resolve(TASK).provenance["source"] == "d4rl"


def test_download_with_another_checksum_is_refused(home, server):
    content = server.path.read_bytes()
    server.path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RuntimeError, match="has sha256 .*, not D4RL's .* deleted"):
        sources.resolve(TASK, "d4rl")
    server.path.write_bytes(content[:-1])
    with pytest.raises(RuntimeError, match="bytes; D4RL's file has"):
        sources.resolve(TASK, "d4rl")
    assert [n for n in os.listdir(home / "d4rl") if not n.endswith(".lock")] == []


def test_unreachable_server_is_asked_once_per_process(home, monkeypatch, capsys):
    calls = []

    def refuse(*args, **options):
        calls.append(args)
        raise sources.download.Unreachable("http://x: no connection (OSError: no route)")

    monkeypatch.setattr(sources.download, "download", refuse)
    monkeypatch.setenv("CORL_DARE_D4RL_URL", "http://x")
    for _ in range(3):
        found = sources.resolve("hopper-random-v2").provenance
        assert found["source"] == "self-collected"
    printed = capsys.readouterr().out
    assert len(calls) == 1 and printed.count("no route") == 3
    monkeypatch.setenv("CORL_DARE_D4RL_URL", "http://y")
    with pytest.raises(RuntimeError, match="no connection"):
        sources.resolve(TASK, "d4rl")
    assert len(calls) == 2


def test_download_without_a_known_checksum_says_so(home, server, monkeypatch):
    monkeypatch.setattr(published, "CHECKSUMS", "")
    label = sources.resolve(TASK, "d4rl").provenance["label"]
    assert label.startswith("unknown file (not D4RL's checksum)")


# ---------------------------------------------------------------- unfit places


def test_cache_that_cannot_be_written_is_one_line(home, monkeypatch):
    (home / "file").write_text("mine")
    monkeypatch.setattr(rollout, "rollout", None)
    with pytest.raises(
        RuntimeError, match="cannot write to .*CORL_DARE_CACHE"
    ) as caught:
        sources.resolve("hopper-random-v2", cache_dir=home / "file" / "cache")
    assert "\n" not in str(caught.value)
    command = f"datasets hopper-random-v2 --cache_dir {home}/file/cache"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match="^error: cannot write to"):
        card.main()


def test_damaged_stand_in_in_the_cache_is_refused_and_named(home):
    path = sources.resolve("hopper-random-v2").provenance["path"]
    with open(path, "r+b") as handle:
        handle.truncate(os.path.getsize(path) - 200)
    with pytest.raises(ValueError, match="is not a readable HDF5 file .*delete it"):
        sources.resolve("hopper-random-v2")


def test_locomotion_file_without_time_outs_is_read_by_the_counter(home):
    raw = make_raw([0] * 2500)  # as the v0 files of halfcheetah would be
    path = write(home / "x.hdf5", {k: v for k, v in raw.items() if k != "timeouts"})
    found = sources.resolve(TASK, path=path)
    assert_same(found.arrays, d4rl_loop(raw))
    assert found.statistics["timeouts"] == 2 and found.provenance["rows"] == 2497
    with pytest.raises(ValueError, match="known here for -v2 tasks only; pass the file"):
        published.file_name(tasks.task("hopper-medium-v0"))
    assert sources.resolve("hopper-medium-v0", path=path).provenance["rows"] == 2497


def test_file_of_another_task_of_the_same_robot_is_named(home, monkeypatch):
    path = write(home / FILE, v2_raw())
    line = f"hopper\nexpert 99 {files.sha256(path)}\n"
    monkeypatch.setattr(published, "CHECKSUMS", line)
    facts = sources.resolve(TASK, path=path).provenance
    assert not facts["recognised"] and "own file of hopper-expert-v2" in facts["label"]
    assert facts["label"].endswith(f", NOT of {TASK}")


def test_halfcheetah_and_walker2d_are_told_apart(home):
    """Their widths are the same; rolled out here, so the heights are the real ones."""
    robot, other, paths = "walker2d", "halfcheetah", {}
    for name in (robot, other):
        paths[name] = collect.collect(
            f"{name}-random-v2", 1200, home / f"{name}.hdf5", progress=False, workers=1
        )
        raw = schema.load_hdf5(paths[name], f"{name}-medium-v2")
        assert len(raw["rewards"]) == 1200
    for name, wrong in ((robot, other), (other, robot)):
        with pytest.raises(
            ValueError, match=f"{wrong}.hdf5.* as {wrong}'s; {name}-medium-v2 needs"
        ):
            schema.load_hdf5(paths[wrong], f"{name}-medium-v2")


# ---------------------------------------------------------------- Minari


def minari_episode(n, seed, terminated, truncated):
    raw = make_raw([0] * (n + 1), seed=seed)
    flags = np.zeros((2, n), bool)
    flags[0, -1], flags[1, -1] = terminated, truncated
    return types.SimpleNamespace(
        observations=raw["observations"].astype(np.float64),
        actions=raw["actions"][:n],
        rewards=raw["rewards"][:n].astype(np.float64),
        terminations=flags[0],
        truncations=flags[1],
    )


def test_minari_episodes_keep_every_row_with_true_next_states(home, monkeypatch, capsys):
    ends = [(True, False), (False, True), (False, False)]
    episodes = [minari_episode(4 + i, i, *end) for i, end in enumerate(ends)]
    module = types.ModuleType("minari")
    module.__version__ = "0"
    module.load_dataset = lambda name, download: types.SimpleNamespace(
        iterate_episodes=lambda: iter(episodes)
    )
    monkeypatch.setitem(sys.modules, "minari", module)
    found = sources.resolve(TASK, path="minari:mujoco/hopper/medium-v0")
    states = [e.observations for e in episodes]
    expected = {
        "observations": np.concatenate([s[:-1] for s in states]),
        "next_observations": np.concatenate([s[1:] for s in states]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": np.concatenate([e.rewards for e in episodes]),
        "terminals": np.concatenate([e.terminations for e in episodes]),
    }
    assert_same(found.arrays, expected)
    assert found.statistics["episodes"] == 3 and found.statistics["timeouts"] == 2
    assert found.provenance["source"] == "minari"
    assert "not D4RL data" in found.provenance["label"]
    assert "gymnasium's v5 environments" in found.provenance["warning"]
    assert f"WARNING: {found.provenance['warning']}" in capsys.readouterr().out
    assert "\nwarning   other policies than D4RL's" in card.card(found)
    same = sources.resolve(TASK, "minari", "mujoco/hopper/medium-v0")
    assert same.provenance["sha256"] == found.provenance["sha256"]
    episodes[0].rewards[0] += 1
    other = sources.resolve(TASK, "minari", "mujoco/hopper/medium-v0")
    assert other.provenance["sha256"] != found.provenance["sha256"]


def test_minari_missing_or_failing_is_one_line(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(RuntimeError, match="minari:a/b-v0 needs.*requirements-minari"):
        sources.resolve(TASK, path="minari:a/b-v0")

    def missing(name, download):
        raise FileNotFoundError(name)

    module = types.ModuleType("minari")
    module.load_dataset = missing
    monkeypatch.setitem(sys.modules, "minari", module)
    with pytest.raises(RuntimeError, match="cannot load 'a/b-v0' \\(FileNotFoundError"):
        sources.resolve(TASK, path="minari:a/b-v0")


def test_caveats_follow_the_id():
    assert "v5 environments" in caveat("mujoco/walker2d/expert-v0")
    assert "0.45" in caveat("D4RL/antmaze/umaze-v1")
    assert caveat("mine/hopper-v0").startswith("not D4RL's own file")


def test_minari_goal_observations_become_d4rls_state():
    rng = np.random.default_rng(0)
    n = 5
    states = {
        k: rng.normal(size=(n + 1, d))
        for k, d in (("achieved_goal", 2), ("observation", 27), ("desired_goal", 2))
    }
    flags = np.zeros((2, n), bool)
    episode = types.SimpleNamespace(
        observations=states,
        actions=rng.uniform(-1, 1, (n, 8)),
        rewards=np.zeros(n),
        terminations=flags[0],
        truncations=flags[1],
    )
    raw = stack_episodes([episode])
    assert raw["observations"].shape == (n, 29)
    np.testing.assert_array_equal(
        raw["observations"][:, :2], states["achieved_goal"][:-1]
    )
    np.testing.assert_array_equal(
        raw["next_observations"][:, 2:], states["observation"][1:]
    )
    assert raw["timeouts"].tolist() == [False] * 4 + [True] and not flags.any()
    with pytest.raises(ValueError, match="no episode"):
        stack_episodes([])


def as_episodes(buffers):
    return [types.SimpleNamespace(**episode) for episode in buffers]


BOUNDS = st.lists(st.integers(1, 6), min_size=1, max_size=8)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    BOUNDS,
    st.lists(st.sampled_from(["terminals", "timeouts"]), min_size=8),
    st.booleans(),
)
def test_rows_survive_the_way_to_episodes_and_back(lengths, ends, unfinished):
    stops = np.cumsum(lengths)
    flags = {
        "terminals": np.zeros(stops[-1], bool),
        "timeouts": np.zeros(stops[-1], bool),
    }
    for i, (stop, kind) in enumerate(zip(stops, ends, strict=False)):
        if not (unfinished and i == len(stops) - 1):
            flags[kind][stop - 1] = True
    raw = make_raw(**flags)
    bounds = np.append(0, stops)
    found = stack_episodes(as_episodes(split_episodes(raw, bounds, HOPPER)))
    if unfinished:  # an episode with neither flag reads as cut by a reset
        raw["timeouts"][-1] = True
    for key, values in raw.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)


def test_antmaze_rows_lose_the_last_of_an_episode_whose_next_state_is_not_stored():
    terminals = np.zeros(10, bool)
    terminals[3:5] = True  # at the goal, up to the row before the time-out
    timeouts = np.arange(10) == 5
    raw = make_raw(terminals, timeouts, state_dim=29, action_dim=8)
    del raw["next_observations"]
    episodes = as_episodes(split_episodes(raw, np.array([0, 6, 10]), UMAZE))
    found = stack_episodes(episodes)
    kept = [0, 1, 2, 3, 4, 6, 7, 8]
    expected = schema.qlearning_dataset(raw)
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)
    np.testing.assert_array_equal(found["actions"], raw["actions"][kept])
    assert np.flatnonzero(found["timeouts"]).tolist() == [4, 7]
    with pytest.raises(ValueError, match="no next_observations"):
        list(split_episodes(raw, np.array([0, 6, 10]), HOPPER))


def test_rows_that_are_no_episodes_are_not_exported():
    raw = v2_raw()
    raw["next_observations"][5] += 1
    with pytest.raises(
        ValueError, match="row 5 is not followed by its next observation"
    ):
        list(split_episodes(raw, np.array([0, 4, 7, 8, 12]), HOPPER))


@pytest.fixture
def minari(home, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
    return importlib.import_module("minari")


@pytest.mark.optional("minari")
def test_round_trip_through_real_minari(home, minari, monkeypatch, capsys):
    raw = v2_raw()
    path = write(home / "x.hdf5", raw)
    command = f"datasets {TASK} --path {path} --export minari mine/hopper/medium-v0"
    monkeypatch.setattr(sys, "argv", command.split())
    card.main()
    assert f"wrote {home / 'minari/mine/hopper/medium-v0'}" in capsys.readouterr().out
    stored = minari.load_dataset("mine/hopper/medium-v0")
    assert (stored.total_episodes, stored.total_steps) == (4, 12)
    score = minari.get_normalized_score(stored, np.array([1422.06]))
    expected = normalized_score(TASK, [1422.06]) / 100
    np.testing.assert_allclose(score, expected)
    assert stored.recover_environment(eval_env=True).spec.id == "Hopper-v4"
    assert "mine/hopper/medium-v0" in minari.list_local_datasets()
    assert [n for n in os.listdir(home / "minari") if n.startswith(".")] == []

    found, facts = sources.find(TASK, path="minari:mine/hopper/medium-v0")
    raw["timeouts"][-1] = True
    for key, values in raw.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)
        assert found[key].dtype == values.dtype
    resolved = sources.resolve(TASK, path="minari:mine/hopper/medium-v0")
    assert resolved.provenance["rows"] == 12 and facts["minari_version"]

    with pytest.raises(SystemExit, match="medium-v0 exists in"):
        card.main()
    # And back into a file of D4RL's schema.
    out = home / "back.hdf5"
    card.export(resolved, "d4rl", str(out))
    again, _ = sources.find(TASK, path=out)
    for key, values in raw.items():
        np.testing.assert_array_equal(again[key], values, err_msg=key)
    label = sources.resolve(TASK, path=out).provenance["label"]
    assert "exported from Minari dataset mine/hopper/medium-v0" in label


@pytest.mark.optional("minari")
def test_real_minari_reads_what_its_own_recorder_format_holds(home, minari):
    """Float64 values and goal dictionaries, written by minari itself."""
    from minari.data_collector import EpisodeBuffer

    rng, n = np.random.default_rng(0), 7
    sizes = {"observation": 27, "achieved_goal": 2, "desired_goal": 2}
    buffer = EpisodeBuffer(
        observations={k: rng.normal(size=(n + 1, d)) for k, d in sizes.items()},
        actions=rng.uniform(-1, 1, (n, 8)),
        rewards=np.arange(n, dtype=np.float64),
        terminations=np.zeros(n, bool),
        truncations=np.arange(n) == n - 1,
    )
    box = gymnasium.spaces.Box
    minari.create_dataset_from_buffers(
        "mine/antmaze-v0",
        [buffer],
        observation_space=gymnasium.spaces.Dict(
            {k: box(-np.inf, np.inf, (d,), np.float64) for k, d in sizes.items()}
        ),
        action_space=box(-1, 1, (8,), np.float64),
    )
    found = sources.resolve("antmaze-umaze-v2", path="minari:mine/antmaze-v0")
    states = np.concatenate(
        [buffer.observations[k] for k in ("achieved_goal", "observation")], 1
    )
    expected = states.astype(np.float32)
    np.testing.assert_array_equal(found.arrays["observations"], expected[:-1])
    np.testing.assert_array_equal(found.arrays["next_observations"], expected[1:])
    assert found.arrays["rewards"].dtype == np.float32


@pytest.mark.optional("minari")
def test_interrupted_minari_export_leaves_nothing(home, minari, monkeypatch):
    def interrupted(*args, **options):
        plain(*args, **options)
        raise KeyboardInterrupt

    plain = minari.create_dataset_from_buffers
    monkeypatch.setattr(minari, "create_dataset_from_buffers", interrupted)
    found = sources.resolve(TASK, path=write(home / "x.hdf5", v2_raw()))
    with pytest.raises(KeyboardInterrupt):
        card.export(found, "minari", "mine/hopper/medium-v0")
    assert os.listdir(home / "minari") == []
    assert os.environ["MINARI_DATASETS_PATH"] == str(home / "minari")
    with pytest.raises(ValueError, match="Malformed dataset ID"):
        card.export(found, "minari", "a name!")


@pytest.mark.optional("minari")
def test_missing_minari_dataset_is_one_line(home, minari, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def missing(name):
        raise FileNotFoundError(f"no\n{name}")

    monkeypatch.setattr(minari.storage.hosting, "download_dataset", missing)
    with pytest.raises(
        RuntimeError, match="cannot load 'a/b-v0' \\(FileNotFoundError: no"
    ):
        sources.resolve(TASK, path="minari:a/b-v0")


def test_export_without_minari_says_how_to_get_it(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    found = sources.resolve(TASK, path=write(home / "x.hdf5", v2_raw()))
    with pytest.raises(RuntimeError, match="requirements-minari.txt"):
        card.export(found, "minari", "mine/x-v0")


# ---------------------------------------------------------------- D4RL's schema


def test_round_trip_of_a_stand_in_through_d4rls_schema(home, monkeypatch, capsys):
    task, out = "hopper-random-v2", home / "out" / "x.hdf5"
    monkeypatch.setattr(sys, "argv", f"datasets {task} --export d4rl {out}".split())
    card.main()
    assert f"wrote {out}" in capsys.readouterr().out
    original = sources.resolve(task)
    copy = sources.resolve(task, path=out)
    assert_same(copy.arrays, original.arrays)
    assert copy.provenance["label"] == original.provenance["label"]  # still a stand-in
    with h5py.File(original.provenance["path"]) as a, h5py.File(out) as b:
        keys = set()
        a.visit(keys.add)
        for key in keys:
            if isinstance(a[key], h5py.Dataset):
                np.testing.assert_array_equal(a[key][()], b[key][()], err_msg=key)
                assert a[key].dtype == b[key].dtype
        assert "infos/qpos" in keys and b.attrs["seed"] == 0
        assert original.provenance["sha256"] in b.attrs["exported_from"]
    before = out.read_bytes()
    with pytest.raises(SystemExit, match="x.hdf5 exists; delete it"):
        card.main()
    assert out.read_bytes() == before and os.listdir(out.parent) == ["x.hdf5"]


def test_exported_file_of_another_type_is_d4rls(home):
    raw = v2_raw()
    spoilt = {**raw, "observations": raw["observations"].astype(np.float64)}
    spoilt["terminals"] = raw["terminals"].astype(np.float32)[:, None]
    found = sources.resolve(TASK, path=write(home / "x.hdf5", spoilt))
    card.export(found, "d4rl", str(home / "y.hdf5"))
    with h5py.File(home / "y.hdf5") as file:
        assert file["observations"].dtype == np.float32
        assert file["terminals"].dtype == bool and file["terminals"].shape == (12,)


def test_export_to_an_unfit_place_is_one_line(home, monkeypatch):
    found = sources.resolve(TASK, path=write(home / "x.hdf5", v2_raw()))
    (home / "file").write_text("mine")
    with pytest.raises(RuntimeError, match="cannot write .*file/y.hdf5"):
        card.export(found, "d4rl", str(home / "file" / "y.hdf5"))

    def full(self, name, **options):
        raise OSError("no space left")

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(RuntimeError, match="no space left"):
        card.export(found, "d4rl", str(home / "y.hdf5"))
    assert not [n for n in os.listdir(home) if n.startswith("y.hdf5")]


# ---------------------------------------------------------------- card


def test_card_shows_the_data_beside_d4rls_published_numbers(home):
    raw = v2_raw()
    raw["rewards"][:] = 0.0
    raw["rewards"][[3, 6, 7]] = 100.0, 200.0, 300.0
    text = card.card(sources.resolve(TASK, path=write(home / "x.hdf5", raw)))
    lines = {
        line[:9].strip(): line[10:] for line in text.splitlines() if line[:9].strip()
    }
    assert lines["data"] == "unknown file (not D4RL's checksum)"
    assert lines["rows"] == "10 transitions from 12 rows"
    assert lines["episodes"].startswith("3 complete; 2 terminals, 1 time-outs; last")
    assert lines["return"] == "200.00 ± 81.65 (100.00 … 300.00) raw"
    assert lines["score"] == "6.8 ± 2.5 (3.7 … 9.8) normalized"
    assert lines["length"] == "3 ± 1 (1 … 4) steps"
    assert lines["D4RL's"].startswith(
        "1422.06 ± 378.95 (315.87 … 3222.36) raw, published"
    )
    assert "44.3 ± 11.6 (10.3 … 99.6) normalized" in text
    assert f"h5py {h5py.__version__}" in lines["versions"]


def test_card_of_a_stand_in_says_what_made_it(home):
    text = card.card(sources.resolve("hopper-random-v2"))
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line[0] != " ")
    assert lines["seed"] == "0" and lines["policies"] == "{}"
    for package in ("gymnasium", "mujoco", "torch", "numpy"):
        assert f"{package} " in lines["versions"]


def test_plot_shows_every_return(home, monkeypatch):
    import matplotlib.axes

    drawn = []
    plain = matplotlib.axes.Axes.hist

    def hist(self, values, **options):
        drawn.append(np.array(values))
        return plain(self, values, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "hist", hist)
    path, out = write(home / "x.hdf5", v2_raw()), home / "returns.png"
    command = f"datasets {TASK} --path {path} --plot {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    card.main()
    assert out.read_bytes().startswith(b"\x89PNG")
    expected = sources.resolve(TASK, path=path).statistics["return"]
    np.testing.assert_allclose(drawn[0].mean(), expected["mean"], rtol=1e-6)
    assert len(drawn[0]) == 3 and not list(home.glob(".*.part"))
    monkeypatch.setattr(sys, "argv", command.replace(".png", ".xyz").split())
    with pytest.raises(SystemExit, match="error: .*xyz"):
        card.main()
    assert not (home / "returns.xyz").exists() and not list(home.glob(".*.part"))
    empty = write(home / "y.hdf5", make_raw([0] * 5, [0] * 5))
    with pytest.raises(ValueError, match="no complete episode"):
        card.plot_returns(sources.resolve(TASK, path=empty), out)


def test_overview_has_a_line_for_every_task_and_touches_nothing(
    home, monkeypatch, capsys
):
    write(
        home / "d4rl" / "walker2d_medium-v2.hdf5", make_raw([0] * 12, [0] * 12, 0, 17, 6)
    )
    (home / "d4rl" / "walker2d_expert-v2.hdf5").write_bytes(b"no file")
    before = sorted(home.rglob("*"))
    for name in ("collect", "rollout"):
        monkeypatch.setattr(collect, name, None)
    monkeypatch.setattr(sources.download, "download", None)
    monkeypatch.setattr(policies, "POLICY_DIR", home / "nowhere")
    monkeypatch.setattr(sys, "argv", ["datasets", "--all"])
    card.main()
    lines = capsys.readouterr().out.splitlines()
    table = {line.split()[0]: line for line in lines[1:]}
    assert list(table) == task_names()
    assert "d4rl/walker2d_medium-v2.hdf5" in table["walker2d-medium-v2"]
    assert " 12 " in table["walker2d-medium-v2"]
    assert "unreadable" in table["walker2d-expert-v2"]
    assert "self-collected (not yet made)" in table["hopper-random-v2"]
    assert "18.40 ± 17.45" in table["hopper-random-v2"]
    assert " 1000000 " in table["antmaze-umaze-v2"]
    assert "D4RL's server, if it answers" in table["antmaze-umaze-v2"]
    assert sorted(home.rglob("*")) == before


def test_overview_finds_a_stand_in_that_is_there(home):
    path = sources.resolve("hopper-random-v2").provenance["path"]
    assert f"self-collected, {path}" in card.overview()


def report(home, monkeypatch, names, out, rows=400):
    """Writes the report of some tasks by the command; its text and rows of cells."""
    monkeypatch.setattr(tasks, "task_names", lambda: names)
    command = f"datasets --report {out} --rows {rows} --cache_dir {home}/cache"
    monkeypatch.setattr(sys, "argv", command.split())
    card.main()
    text = (home / out).read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return text, [[c.strip() for c in line.split("|")[1:-1]] for line in lines]


def test_report_compares_every_stand_in_with_d4rls_figures(home, monkeypatch):
    monkeypatch.setattr(policies, "POLICY_DIR", home / "nowhere")
    monkeypatch.chdir(home)
    names = ["hopper-random-v2", "antmaze-umaze-v2", "halfcheetah-random-v2"]
    text, rows = report(home, monkeypatch, names, "new/report.md")
    assert [row[0] for row in rows] == ["task", *names[::2], "task"]
    hopper, cheetah = rows[1:3]
    stats = sources.resolve(names[0], cache_dir=home / "cache", rows=400).statistics
    assert hopper[1:3] == ["400", str(stats["episodes"])]
    mean = stats["return"]["mean"]
    assert hopper[3].startswith(f"{mean:.0f} ± ")
    assert hopper[5:8] == ["1000000", "18 ± 17", "1.2"]
    assert hopper[8] == ("yes" if abs(mean - 18.40) <= 17.45 else "**no**")
    assert cheetah[3] == "no complete episode" and cheetah[8] == ""
    assert "No stand-in: antmaze-umaze-v2." in text
    made = text.splitlines()[2]
    assert made.startswith(
        "Command: `python -m corl.data.card --report new/report.md --rows 400`"
    )
    assert f"commit {machine.git_commit()}, " in made and "mujoco 3" in made
    assert str(home) not in text and f"{machine.describe()['cores']} cores" in made
    assert not list(home.glob("new/*.part"))


def test_report_counts_rows_at_the_goal_of_antmaze(home, monkeypatch):
    monkeypatch.chdir(home)
    labelled = make_raw([0] * 1404, [0] * 1404, 0, 29, 8)
    labelled["timeouts"][[700, 1401]] = 1
    labelled["rewards"][:] = 0
    labelled["rewards"][800:810] = 1
    path = write(home / "maze.hdf5", labelled)
    monkeypatch.setattr(collect, "collect", lambda *args: path)
    _, rows = report(home, monkeypatch, ["antmaze-umaze-v2"], "report.md")
    assert rows[-1][:6] == ["antmaze-umaze-v2", "1404", "2", "5 ± 5", "50%", "1000000"]


def test_report_to_an_unfit_place_is_one_line_before_any_work(home, monkeypatch):
    (home / "file").write_text("mine")
    with pytest.raises(SystemExit, match="^error: cannot write .*file/report.md"):
        report(home, monkeypatch, [], home / "file" / "report.md")
    with pytest.raises(SystemExit, match="^error: --report .*is a folder"):
        report(home, monkeypatch, [], home)

    def refuse(*args, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(sources, "resolve", None)
    with pytest.raises(SystemExit, match="^error: cannot write .*Read-only"):
        report(home, monkeypatch, ["hopper-random-v2"], home / "report.md")


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--all hopper-random-v2",
        "--all --report x.md",
        "--all --plot x.png",
        "hopper-random-v2 --export pickle x",
    ],
)
def test_impossible_commands_are_refused(home, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["datasets", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        card.main()
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_card_without_published_numbers_or_complete_episodes(home):
    path = write(home / "x.hdf5", make_raw([0] * 5, [0] * 5))
    text = card.card(sources.resolve("hopper-full-replay-v2", path=path))
    assert "no complete episode" in text and "D4RL's  " not in text


def test_command_prints_the_card_or_one_line(home, monkeypatch, capsys):
    path = write(home / "x.hdf5", v2_raw())
    monkeypatch.setattr(sys, "argv", ["datasets", TASK, "--path", str(path)])
    card.main()
    assert "10 transitions from 12 rows" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["datasets", TASK, "--source", "d4rl_dir"])
    with pytest.raises(SystemExit, match="^error: no dataset for hopper-medium-v2"):
        card.main()
