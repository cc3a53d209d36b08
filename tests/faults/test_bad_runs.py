"""A run folder or a checkpoint that is damaged, edited or another one's ends in one line.

The start is refused before any training, a folder that is to be gone on with stays as it is, and
a new run leaves no folder.
"""

import contextlib
import errno
import io
import json
import pickle
import random
import shutil

import filelock
import harness
import pytest
import torch
import yaml

from algorithms import cql, dare_iql, iql
from corl import checkpoints, finetune, fits, locks, run_tables, runs

pytestmark = pytest.mark.fault("bad inputs")
IQL = harness.algorithm(iql)


@pytest.fixture(scope="module")
def finished(good, tmp_path_factory):
    """The folder of a finished run of IQL."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.StringIO()):
        outcome = harness.run(IQL, *harness.short_run(folder, good))
    assert outcome.status == 0, outcome
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "the run")


def some(cases, *fast):
    """Cases of which all but these are slow instances."""
    return [
        pytest.param(case, marks=() if case in fast else pytest.mark.whole)
        for case in cases
    ]


def contents(folder):
    return {p.name: p.is_file() and p.read_bytes() for p in folder.iterdir()}


def refused(run, *says, command=IQL, words=()):
    """A resume is refused, and nothing in the folder changes."""
    before = contents(run)
    harness.assert_refused(harness.run(command, "--resume", run, *words), *says)
    after = contents(run)
    assert after.pop("run.lock", b"") == b""
    before.pop("run.lock", None)
    assert before == after


def rewrite(path, change):
    """Change what a checkpoint holds; its checksums are right again."""
    state = torch.load(path, weights_only=True)
    change(state)
    checkpoints.save_checkpoint(path, state)


# ---------------------------------------------------------------- tables

TABLES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(random.Random(0).randbytes(3000)),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "another header": lambda path: edit(path, lambda lines: ["a,b\n", *lines[1:]]),
    "no header": lambda path: edit(path, lambda lines: lines[1:]),
    "no number": lambda path: edit(path, lambda lines: [*lines[:-1], "x,offline,1\n"]),
    "a huge line": lambda path: edit(path, lambda lines: ["9" * 300_000, *lines]),
    "a row less": lambda path: edit(path, lambda lines: lines[:-1]),
    "a row twice": lambda path: edit(path, lambda lines: [*lines[:2], *lines[1:]]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "another number": lambda path: edit(
        path, lambda lines: [*lines[:-1], change(lines)]
    ),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
# What a run of an older version, whose checkpoint has no checksums of its tables, still notices.
OLD = [
    "missing",
    "empty",
    "binary",
    "zeros",
    "another header",
    "a huge line",
    "a folder",
]


def edit(path, new):
    path.write_text("".join(new(path.read_text().splitlines(keepends=True))))


def change(lines):
    return lines[-1].replace("0", "1").replace("2", "3")


@pytest.mark.parametrize(
    "table", some(["metrics.csv", "evaluations.csv"], "metrics.csv")
)
@pytest.mark.parametrize("damage", some(TABLES, "missing", "binary", "a row less"))
def test_a_damaged_table_is_refused(run, table, damage):
    TABLES[damage](run / table)
    refused(run, table, "put the file back")


@pytest.mark.parametrize(
    "table", some(["metrics.csv", "evaluations.csv"], "metrics.csv")
)
@pytest.mark.parametrize("damage", some([*OLD, "no number"], "empty", "no number"))
def test_a_damaged_table_of_an_old_run_is_refused(run, table, damage):
    rewrite(run / "checkpoint.pt", lambda state: state.pop("tables"))
    rows = run.joinpath(table).read_text().splitlines()
    TABLES[damage](run / table)
    if damage == "no number":
        text = ",".join(["x", *rows[1].split(",")[1:]])
        run.joinpath(table).write_text("\n".join([*rows, text]) + "\n")
    refused(run, table, "put the file back")


# ---------------------------------------------------------------- the config


def set_field(run, name, value):
    path = run / "config.yaml"
    fields = yaml.safe_load(path.read_text())
    fields[name] = value
    path.write_text(yaml.safe_dump(fields))


@pytest.mark.parametrize(
    "field, value",
    [("batch_size", 16), ("seed", 5), ("discount", 0.5), ("offline_iterations", 5)]
    + [
        ("normalize", False),
        ("iql_tau", 0.9),
        ("eval_freq", 5),
        ("env", "walker2d-medium-v2"),
    ],
)
def test_an_edited_config_is_refused_by_the_name_of_the_field(run, field, value):
    set_field(run, field, value)
    refused(run, rf"config\.yaml.*{field} is ", "put that back")


def test_an_edited_block_is_refused(good, tmp_path):
    command = harness.algorithm(dare_iql)
    flags = harness.short_run(tmp_path, good, **harness.FAST_DARE, online_iterations=0)
    assert harness.run(command, *flags).status == 0
    (run,) = (tmp_path / "runs").iterdir()
    path = run / "config.yaml"
    fields = yaml.safe_load(path.read_text())
    fields["dare"]["behavior_updates"] = 7
    path.write_text(yaml.safe_dump(fields))
    refused(run, r"dare\.behavior_updates is 7", "trained with 5", command=command)


@pytest.mark.parametrize(
    "field, value", [("threads", 2), ("name", "other"), ("group", "G")]
)
def test_what_changes_no_result_may_be_edited(run, field, value):
    set_field(run, field, value)
    assert harness.run(IQL, "--resume", run).status == 0


CONFIGS = {
    "missing": (lambda path: path.unlink(), "no config.yaml"),
    "a list": (lambda path: path.write_text("- 1\n- 2\n"), "field: value"),
    "no YAML": (lambda path: path.write_text("a: [1, {"), "not readable YAML"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\x00\x80" * 50), "config.yaml"),
    "empty": (lambda path: path.write_text(""), "trained with"),
    "a wrong type": (lambda path: path.write_text("batch_size: many\n"), "batch_size"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "config.yaml"),
}


@pytest.mark.parametrize("damage", some(CONFIGS, "empty"))
def test_a_damaged_config_is_refused(run, damage):
    spoil, says = CONFIGS[damage]
    spoil(run / "config.yaml")
    refused(run, says, run.name)


def test_a_run_of_another_algorithm_is_refused(run, tmp_path):
    refused(run, "config.yaml", "another algorithm", command=harness.algorithm(cql))
    (run / "config.yaml").write_text("env: hopper-medium-v2\n")
    refused(run, "checkpoint.pt", "belongs to iql", command=harness.algorithm(cql))


@pytest.mark.parametrize("steps", some([0, 3, 9], 3))
def test_a_finished_run_is_not_made_shorter(run, steps):
    words = ("--online_iterations", steps)
    refused(run, f"online_iterations {steps} ", "online_iterations 10", words=words)


# ---------------------------------------------------------------- the checkpoint


def flip(path, count, seed):
    """Change `count` bytes in the middle of a file."""
    content, rng = bytearray(path.read_bytes()), random.Random(seed)
    for place in rng.sample(range(200, len(content) - 200), count):
        content[place] ^= 1 + rng.randrange(255)
    path.write_bytes(content)


def truncate(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


FILES = {
    **{f"64 flipped bytes, {i}": lambda path, i=i: flip(path, 64, i) for i in range(3)},
    **{
        f"cut at {s}": lambda path, s=s: truncate(path, s) for s in (0, 0.01, 0.5, 0.999)
    },
    "text": lambda path: path.write_text("not a checkpoint\n" * 100),
    "random": lambda path: path.write_bytes(random.Random(1).randbytes(5000)),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"step": 1})),
    "a pickled class": lambda path: torch.save({"algorithm": harness.Outcome}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "weights alone": lambda path: torch.save({"actor": {}}, path),
    "JSON": lambda path: path.write_text(json.dumps({"algorithm": "iql"})),
}


@pytest.mark.parametrize("damage", some(FILES, "64 flipped bytes, 0", "a pickle"))
def test_a_damaged_checkpoint_is_refused(run, damage):
    FILES[damage](run / "checkpoint.pt")
    refused(run, r"checkpoint\.pt")


@pytest.mark.parametrize(
    "kind", some(["missing", "a folder", "a dangling link"], "missing")
)
def test_no_checkpoint_is_said(run, kind):
    (run / "checkpoint.pt").unlink()
    if kind == "a folder":
        (run / "checkpoint.pt").mkdir()
    if kind == "a dangling link":
        (run / "checkpoint.pt").symlink_to(run / "nowhere")
    harness.assert_refused(
        harness.run(IQL, "--resume", run), r"no checkpoint\.pt", "start the run again"
    )


def put(*place, value):
    """A change that puts a value at a place of a checkpoint."""

    def change(state):
        *path, last = place
        for name in path:
            state = state[name]
        state[last] = value

    return change


def drop(*place):
    """A change that takes an entry away."""

    def change(state):
        *path, last = place
        for name in path:
            state = state[name]
        del state[last]

    return change


def widen(state):
    """Another width in an optimizer's moments: torch itself would notice in the first update."""
    moments = state["parts"]["trainer"]["q_optimizer"]["state"][0]
    moments["exp_avg"] = torch.zeros(3, 3)


ENTRIES = {
    **{f"no {x}": (drop(x), x) for x in ("step", "run", "rng", "parts")},
    **{f"{x} a list": (put(x, value=[1]), x) for x in ("run", "rng", "parts", "config")},
    **{
        f"step {x!r}": (put("step", value=x), "step") for x in (-1, "7", 2.5, None, True)
    },
    "a step beyond the run": (put("step", value=10**9), "online_iterations"),
    "another algorithm": (put("algorithm", value="cql"), "belongs to cql"),
    "another format": (put("format", value=99), "format 99"),
    **{
        f"no part {x}": (drop("parts", x), x)
        for x in ("trainer", "collector", "evaluator")
    },
    "no networks": (drop("parts", "trainer", "qf"), "trainer.*qf"),
    "a part is text": (put("parts", "trainer", value="weights"), "trainer"),
    "a network is a list": (put("parts", "trainer", "actor", value=[1]), "actor"),
    "another shape": (
        put("parts", "trainer", "vf", "v.net.0.weight", value=torch.zeros(2, 3)),
        r"vf\.v\.net\.0\.weight has shape \(2, 3\)",
    ),
    "text for a tensor": (
        put("parts", "trainer", "vf", "v.net.0.weight", value="x"),
        r"vf\.v\.net\.0\.weight is a str",
    ),
    "moments of another width": (widen, r"trainer: q_optimizer.* \(3, 3\)"),
    "rows of another width": (
        put("parts", "online_buffer", "rows", value=[torch.zeros(4, 2)] * 5),
        r"online_buffer: rows\[0\]",
    ),
    "fewer columns of rows": (
        put("parts", "online_buffer", "rows", value=[torch.zeros(4, 11)]),
        "online_buffer",
    ),
    "no environment": (drop("parts", "collector", "env"), "collector.*env"),
    "no random streams": (put("rng", value={}), "rng"),
    "a short random stream": (
        put("rng", "torch", value=torch.zeros(3, dtype=torch.uint8)),
        "rng",
    ),
    "scores of text": (put("run", "scores", value=[["a"]]), "run"),
    "time is text": (put("run", "wall_seconds", value="long"), "run"),
    "a table without checksum": (put("tables", "metrics.csv", value=3), "tables"),
    "another dataset": (put("dataset_sha256", value="abc"), "sha256"),
}


@pytest.mark.parametrize(
    "damage",
    some(ENTRIES, "no step", "a step beyond the run", "no networks", "another shape"),
)
def test_a_checkpoint_with_a_wrong_entry_is_refused(run, damage):
    spoil, says = ENTRIES[damage]
    rewrite(run / "checkpoint.pt", spoil)
    outcome = harness.run(IQL, "--resume", run)
    harness.assert_refused(outcome, says, "good.hdf5" if says == "sha256" else str(run))


@pytest.mark.parametrize("seed", some(range(4), 0))
def test_flipped_bytes_are_noticed_or_change_nothing(finished, tmp_path, seed):
    """Also single ones; what the archive does not need may be anything."""
    path, whole = tmp_path / "checkpoint.pt", finished / "checkpoint.pt"
    wanted, noticed = checkpoints.read(whole), 0
    content = whole.read_bytes()
    rng = random.Random(seed)
    for _ in range(10):
        place = rng.randrange(len(content))
        path.write_bytes(
            content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
        )
        try:
            found = checkpoints.read(path)
        except ValueError:
            noticed += 1
            continue
        fits.check_fit(found, wanted)
        assert str(found) == str(wanted)
    assert noticed


# ---------------------------------------------------------------- weights to start from


def start(tmp_path, good, **fields):
    return harness.run(IQL, *harness.short_run(tmp_path, good, **fields))


def test_a_run_folder_stands_for_its_weights(run, good, tmp_path):
    outcome = start(tmp_path, good, load_model=run, offline_iterations=0)
    assert outcome.status == 0, outcome


def another_width(state):
    trainer = state["parts"]["trainer"]
    trainer["qf"] = {
        name: torch.zeros(17, *value.shape[1:]) for name, value in trainer["qf"].items()
    }


def another_robot(state):
    trainer = state["parts"]["trainer"]
    for network in ("actor", "vf", "qf"):
        trainer[network] = {
            name: torch.zeros(value.shape[0], 23)
            if value.dim() == 2 and value.shape[1] < 20
            else value
            for name, value in trainer[network].items()
        }


# Other files, and other contents of a good file.
WEIGHTS = {
    "nothing": (lambda path: path.unlink(), "does not exist"),
    "an empty folder": (
        lambda path: (path.unlink(), path.mkdir()),
        "without checkpoint.pt",
    ),
    "text": (lambda path: path.write_text("x" * 300), "damaged or not a checkpoint"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps([1])), "cannot read"),
}
CHANGED = {
    "another width": (another_width, r"qf\..*\(17.*\(256"),
    "another robot": (another_robot, r"\(256, 23\).*\(256, 1[14]\)"),
    "another algorithm": (drop("parts", "trainer", "vf"), "no 'vf'"),
    "no trainer": (put("parts", value=[1]), "not a checkpoint of this algorithm"),
    "moments of another width": (widen, r"q_optimizer.*\(3, 3\)"),
    "no count": (drop("parts", "trainer", "total_it"), "total_it"),
}


@pytest.mark.parametrize("damage", some([*WEIGHTS, *CHANGED], "another robot"))
def test_weights_that_do_not_fit_are_refused(finished, good, tmp_path, damage):
    spoil, says = {**WEIGHTS, **CHANGED}[damage]
    path = shutil.copy(finished / "checkpoint.pt", tmp_path / "weights.pt")
    if damage in CHANGED:
        rewrite(path, spoil)
    else:
        spoil(path)
    outcome = start(tmp_path, good, load_model=path)
    harness.assert_refused(outcome, says, "weights.pt")
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- names and starts


@pytest.mark.parametrize(
    "name",
    ["../../x", "/tmp/x", "a/b", "..", ".", "a\\b", "a\nb", "\t", " ", "x" * 400, "a\0b"]
    + ["é" * 90, ".hidden", "\ud800"],
)
def test_a_name_that_is_no_part_of_a_folder_name_is_refused(good, tmp_path, name):
    outcome = start(tmp_path, good, name=name)
    harness.assert_refused(outcome, "^error: name .*runs_dir|name must be a line")
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


@pytest.mark.parametrize(
    "name", some(["IQL", "a b", "Ünïcode", "x" * 150, "v1.2+b", "-x"], "Ünïcode")
)
def test_other_names_are_taken(good, tmp_path, name):
    outcome = start(tmp_path, good, name=name, offline_iterations=0, online_iterations=0)
    assert outcome.status == 0, outcome
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(f"{name}-hopper")


STARTS = {
    "no dataset": {"dataset_path": "nowhere.hdf5"},
    "a small buffer": {"buffer_size": 10},
    "no weights": {"load_model": "nowhere.pt"},
    "no such device": {"device": "tpu"},
    "another robot": {"env": "walker2d-medium-v2"},
}


@pytest.mark.parametrize("fault", some(STARTS, "no weights"))
def test_a_failed_start_leaves_no_folder(good, tmp_path, fault):
    outcome = start(tmp_path, good, **STARTS[fault])
    harness.assert_refused(outcome)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "place", some(["load_data", "new_buffer", "set_seed", "Evaluator"], "Evaluator")
)
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_an_error_at_the_start_leaves_no_folder(
    good, tmp_path, monkeypatch, place, error
):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(finetune, place, fail)
    outcome = start(tmp_path, good)
    assert outcome.status == (1 if isinstance(error, RuntimeError) else 130), outcome
    assert not outcome.trace and not (tmp_path / "runs").exists()


def test_a_folder_that_was_there_stays_and_so_does_a_begun_run(
    good, tmp_path, monkeypatch
):
    (tmp_path / "runs").mkdir()
    start(tmp_path, good, dataset_path="nowhere.hdf5")
    assert list((tmp_path / "runs").iterdir()) == []
    train, calls = iql.ImplicitQLearning.train, []

    def fail(self, batch):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return train(self, batch)

    monkeypatch.setattr(iql.ImplicitQLearning, "train", fail)
    assert start(tmp_path, good).status == 1
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.csv").exists()


# ---------------------------------------------------------------- locks and links


NO_LOCKS = {
    "of old": NotImplementedError("no flock"),
    **{str(n): OSError(n, "no") for n in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)},
}


@pytest.mark.parametrize("error", some(NO_LOCKS, str(errno.ENOLCK)))
def test_without_locks_a_run_goes_on_with_one_warning(run, monkeypatch, error):
    def refuse(self, *arguments, **options):
        raise NO_LOCKS[error]

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    outcome = harness.run(IQL, "--resume", run)
    assert outcome.status == 0, outcome
    assert outcome.err.count("has no locks") == 1


def test_the_holder_is_in_the_file_and_only_while_it_holds(tmp_path):
    path = tmp_path / "run.lock"
    with locks.holding(path, "the run"):
        (text,) = path.read_text().splitlines()
        with pytest.raises(locks.InUseError) as caught, locks.holding(path, "the run"):
            pass
        assert text in str(caught.value) and "the run" in str(caught.value)
        assert path.read_text().strip() == text
    assert path.read_text() == ""
    with locks.holding(path, "the run"):
        pass


def test_a_lock_that_is_a_link_or_a_folder_is_refused(run, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (run / "run.lock").unlink()
    (run / "run.lock").symlink_to(victim)
    harness.assert_refused(harness.run(IQL, "--resume", run), "run.lock")
    assert victim.read_text() == "mine"
    (run / "run.lock").unlink()
    (run / "run.lock").mkdir()
    harness.assert_refused(harness.run(IQL, "--resume", run), "run.lock")


@pytest.mark.makes("picture")
def test_a_resume_of_a_folder_of_links_leaves_their_targets(run, finished, tmp_path):
    copy = tmp_path / "links"
    copy.mkdir()
    for path in run.iterdir():
        if path.name != "run.lock":
            (copy / path.name).symlink_to(path)
    before = contents(run)
    outcome = harness.run(IQL, "--resume", copy, "--online_iterations", 20)
    assert outcome.status == 0, outcome
    assert contents(run) == before
    # The policy at the switch was there, so it is not written again.
    links = [path.name for path in copy.iterdir() if path.is_symlink()]
    assert links == ["policy_at_switch.safetensors"]


def test_remains_of_a_killed_writer_are_removed(run):
    for name in runs.WRITTEN:
        (run / f".{name}.0123456789abcdef.part").write_bytes(b"half")
    assert harness.run(IQL, "--resume", run).status == 0
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("cut", some([1, 5, 20], 5))
def test_a_torn_last_line_is_no_damage(run, cut):
    """And rows after the checkpoint are written again, to the byte."""
    for name in run_tables.TABLES:
        path = run / name
        rows = path.read_bytes()
        torn = rows + rows.splitlines(keepends=True)[-1][:-cut] + b"\0" * (cut > 5)
        path.write_bytes(torn)
        assert harness.run(IQL, "--resume", run).status == 0
        assert path.read_bytes() == rows
