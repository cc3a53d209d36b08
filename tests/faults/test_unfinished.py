"""What an interrupted training or collection left is used if it is whole, and else said."""

import hashlib
import io

import harness
import numpy as np
import pytest
import torch

from corl.standin import collect
from corl_dare.cache import fit_cached

pytestmark = pytest.mark.fault("bad inputs")
SIZE = hashlib.sha256().digest_size
UPDATES = 250


def fit(folder, **options):
    """A behavior model of some random rows; prints where it begins."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(64, 3)).astype(np.float32)
    actions = rng.uniform(-1, 1, (64, 2)).astype(np.float32)
    settings = {"updates": UPDATES, "batch_size": 8, "lr": 1e-3, "seed": 0}
    return fit_cached(
        "mixture",
        states,
        actions,
        **settings,
        dataset_hash="a" * 64,
        cache_dir=folder,
        progress=False,
        **options,
    )


def command(argv):
    """As the command line does with the errors of a run."""
    try:
        fit(argv[0])
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


@pytest.fixture
def unfinished(tmp_path):
    """The file of a training that was interrupted after 100 updates."""
    asked = iter([False, True])
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, should_stop=lambda: next(asked))
    (file,) = tmp_path.glob("*.unfinished")
    return file


def rewrite(file, change):
    """Change the state in the file; its checksum is right again."""
    state = torch.load(io.BytesIO(file.read_bytes()[SIZE:]), weights_only=True)
    changed = change(state)
    state = state if changed is None else changed
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    file.write_bytes(hashlib.sha256(data).digest() + data)


def weights(folder):
    model, *_ = fit(folder)
    return model.state_dict()


def test_a_whole_one_is_gone_on_from(unfinished, tmp_path, capsys):
    """To the bits of a training that was not interrupted, so nothing else changes either."""
    expected = weights(tmp_path / "other")
    found = weights(tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert capsys.readouterr().out == "" and not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
        lambda data: b"\0" * len(data),
        lambda data: hashlib.sha256(b"").digest(),
        lambda data: hashlib.sha256(b"text").digest() + b"text",
        lambda data: hashlib.sha256(data).digest() + data,
    ],
)
def test_a_damaged_one_is_said_and_the_training_starts_afresh(
    damage, unfinished, tmp_path
):
    unfinished.write_bytes(damage(unfinished.read_bytes()))
    outcome = harness.run(command, tmp_path)
    assert outcome.status == 0 and not outcome.trace, outcome
    assert f"{unfinished} is damaged; the behavior model is trained" in outcome.out
    found, expected = weights(tmp_path), weights(tmp_path / "other")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [1, 2],
        lambda state: torch.zeros(3),
        lambda state: {},
        lambda state: state.__delitem__("updates"),
        lambda state: state.update(updates="many"),
        lambda state: state.update(generator=3),
        lambda state: state.update(settings="others"),
    ],
)
def test_one_that_is_none_of_ours_is_said(change, unfinished, tmp_path):
    rewrite(unfinished, change)
    outcome = harness.run(command, tmp_path)
    assert outcome.status == 0 and not outcome.trace, outcome
    assert f"{unfinished} " in outcome.out and "from the start" in outcome.out


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.__delitem__("model"),
        lambda state: state.__delitem__("start"),
        lambda state: state.update(updates=-1),
        lambda state: state.update(updates=10**6),
        lambda state: state.update(means=3),
        lambda state: state.update(means=["low"]),
        lambda state: state.update(means=[1.0] * 50),
        lambda state: state.update(total=torch.zeros(7)),
        lambda state: state.update(total=torch.tensor(float("nan"))),
        lambda state: state.update(order=torch.zeros(64)),
        lambda state: state.update(order=torch.full((64,), 10**6)),
        lambda state: state.update(order=torch.zeros(3, dtype=torch.long)),
        lambda state: state.update(start=-5),
        lambda state: state.update(start=65),
        lambda state: state.update(start=None),
        lambda state: state.update(model={}),
        lambda state: state.update(model=[1]),
        lambda state: {
            **state,
            "model": {k: v * float("nan") for k, v in state["model"].items()},
        },
        lambda state: {
            **state,
            "model": {k: v[:0] for k, v in state["model"].items() if v.ndim},
        },
        lambda state: state.update(optimizer={}),
        lambda state: state["optimizer"].update(param_groups=[]),
        lambda state: state["optimizer"]["param_groups"][0].update(lr=1e20),
        lambda state: state["optimizer"]["state"].update({99: {}}),
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
        lambda state: state["optimizer"]["state"][0].__delitem__("exp_avg_sq"),
        lambda state: state["optimizer"]["state"].__delitem__(0),
        lambda state: state.update(generator=torch.zeros(5056, dtype=torch.uint8)),
        lambda state: state.update(generator=torch.zeros(5056)),
    ],
)
def test_a_state_of_another_training_is_an_error_that_names_the_file(
    change, unfinished, tmp_path
):
    rewrite(unfinished, change)
    outcome = harness.run(command, tmp_path)
    harness.assert_refused(outcome, unfinished.name, "delete it to train")


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(b"\xff" * 8 + file.read_bytes()),
        lambda file: file.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4"),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_a_damaged_finished_model_is_an_error_that_names_the_file(damage, tmp_path):
    _, file, _ = fit(tmp_path)
    damage(file)
    harness.assert_refused(harness.run(command, tmp_path), file.name, "delete it")


# ---------------------------------------------------------------- chunks of a collection

ROWS = 60


def collected(folder):
    return collect.collect("hopper-random-v2", ROWS, folder / "x.hdf5", progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a file that was collected without interruption."""
    return collected(tmp_path_factory.mktemp("whole")).read_bytes()


@pytest.fixture
def chunk(tmp_path, monkeypatch):
    """The one chunk of a collection that was interrupted before its file was written."""
    with monkeypatch.context() as patched:

        def stop(*args):
            raise KeyboardInterrupt

        patched.setattr(collect, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            collected(tmp_path)
    (file,) = tmp_path.glob("*.chunks/*.npy")
    return file


def signed(table, **options):
    buffer = io.BytesIO()
    np.save(buffer, table, **options)
    data = buffer.getvalue()
    return data + hashlib.sha256(data).digest()


def test_a_whole_chunk_is_used(chunk, whole, tmp_path, monkeypatch, capsys):
    def again(*args):
        raise AssertionError("it was collected again")

    monkeypatch.setattr(collect, "_roll_out_chunk", again)
    assert collected(tmp_path).read_bytes() == whole
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data[:-SIZE],
        lambda data: data[:700] + bytes([data[700] ^ 1]) + data[701:],
        lambda data: data + b"x",
        lambda data: b"\0" * len(data),
        lambda data: b"no array" + hashlib.sha256(b"no array").digest(),
        lambda data: signed(np.zeros(ROWS)),
        lambda data: signed(np.zeros((ROWS, 3))),
        lambda data: signed(np.load(io.BytesIO(data))[:-1]),
        lambda data: signed(np.load(io.BytesIO(data))[:0]),
        lambda data: signed(np.array([print] * ROWS, dtype=object)),
        lambda data: signed(np.load(io.BytesIO(data))[["rewards"]]),
    ],
)
def test_a_damaged_chunk_is_said_and_collected_again(
    damage, chunk, whole, tmp_path, capsys
):
    chunk.write_bytes(damage(chunk.read_bytes()))
    assert collected(tmp_path).read_bytes() == whole
    assert f"{chunk} is damaged" in capsys.readouterr().out


def test_what_is_in_the_place_of_chunks_is_named(chunk, tmp_path):
    def again(argv):
        try:
            collected(argv[0] if isinstance(argv[0], type(tmp_path)) else tmp_path)
        except (ValueError, RuntimeError) as error:
            raise SystemExit(f"error: {error}") from None

    chunk.unlink()
    chunk.mkdir()
    harness.assert_refused(harness.run(again, tmp_path), chunk.name, "cannot write")
    chunk.rmdir()
    chunk.parent.rmdir()
    chunk.parent.write_text("mine")
    harness.assert_refused(harness.run(again, tmp_path), chunk.parent.name)
