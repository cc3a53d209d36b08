"""CORL's checkpoint_N.pt both ways: Scalar objects are read, nothing foreign is executed."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from algorithms import iql
from corl import checkpoints

ROOT = Path(__file__).parent.parent
CORL_IQL_KEYS = "qf q_optimizer vf v_optimizer actor actor_optimizer".split()
CORL_IQL_KEYS += ["actor_lr_schedule", "total_it"]
SCALAR = """
import sys
import torch

class Scalar(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.constant = torch.nn.Parameter(torch.tensor(value))

    def forward(self):
        return self.constant
"""
# A CQL trainer in miniature: networks' and optimizers' state_dicts, two pickled modules.
WRITER = """
net, alpha, prime = torch.nn.Linear(3, 2), Scalar(-0.7), Scalar(1.5)
adam = torch.optim.Adam(alpha.parameters(), lr=0.1)
(alpha() ** 2).backward()
adam.step()
torch.save({"actor": net.state_dict(), "sac_log_alpha": alpha, "cql_log_alpha": prime,
            "sac_log_alpha_optim": adam.state_dict(), "total_it": 7}, sys.argv[1])
print(alpha().item().hex())
"""
# What CORL's script does with a file: plain torch.load, then the module is called.
READER = """
state = torch.load(sys.argv[1], weights_only=False)
for name in ("sac_log_alpha", "cql_log_alpha"):
    module = state[name]
    assert type(module) is Scalar and [*dict(module.named_parameters())] == ["constant"]
    assert module().shape == () and module().requires_grad
    (module() ** 2).backward()
    torch.optim.SGD(module.parameters(), lr=0.25).step()
    print(module().item())
"""


def run_main(program, *args):
    """Run a program as __main__, where CORL's Scalar lives; its output lines."""
    done = subprocess.run(
        [sys.executable, "-c", SCALAR + program, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """A checkpoint whose Scalar objects were pickled by their own program, and a value in it."""
    path = tmp_path_factory.mktemp("upstream") / "checkpoint_6.pt"
    (value,) = run_main(WRITER, path)
    return path, float.fromhex(value)


# ---------------------------------------------------------------- reading


def test_scalar_objects_come_as_tensors(upstream):
    path, value = upstream
    with pytest.raises(pickle.UnpicklingError):  # so this file needs the reader
        torch.load(path, weights_only=True)
    state = checkpoints.load_corl_checkpoint(path, ("actor", "sac_log_alpha"))
    assert set(state["sac_log_alpha"]) == {"constant"}
    assert state["sac_log_alpha"]["constant"].item() == value
    assert state["cql_log_alpha"]["constant"].item() == 1.5
    assert state["cql_log_alpha"]["constant"].shape == ()
    assert not state["cql_log_alpha"]["constant"].requires_grad
    assert state["actor"]["weight"].shape == (2, 3) and state["total_it"] == 7
    assert state["sac_log_alpha_optim"]["state"][0]["step"] == 1


def test_the_allowance_for_scalar_ends_with_the_read(upstream):
    path, _ = upstream
    before = set(torch.serialization.get_safe_globals())
    checkpoints.load_corl_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(ValueError, match="never unpickled"):
        checkpoints.load_checkpoint(path, "iql")


class Evil:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def in_scalar(evil):
    return {"sac_log_alpha": checkpoints._PickledScalar({"_parameters": evil})}


def marker_calls(marker):
    write = f"open({str(marker)!r}, 'w').close()"
    return {
        "system": Evil(os.system, f"touch {marker}"),
        "eval": Evil(eval, write),
        "exec": Evil(exec, write),
        "open": Evil(open, str(marker), "w"),
        "mkdir": Evil(os.mkdir, str(marker)),
        "subprocess": Evil(subprocess.check_call, ["touch", str(marker)]),
        "path": Evil(Path.touch, marker),
    }


def save(value, path):
    """torch.save, with the inert class under the name that CORL's has."""
    sys.modules["__main__"].Scalar = checkpoints._PickledScalar
    try:
        torch.save(value, path)
    finally:
        del sys.modules["__main__"].Scalar


@pytest.mark.parametrize("place", ["top", "value", "in_scalar"])
@pytest.mark.parametrize("name", marker_calls(Path("x")))
def test_a_pickle_that_calls_something_is_refused_and_not_executed(
    tmp_path, name, place
):
    marker, path = tmp_path / "executed", tmp_path / "checkpoint_0.pt"
    evil = marker_calls(marker)[name]
    save(
        {"top": evil, "value": {"actor": evil}, "in_scalar": in_scalar(evil)}[place],
        path,
    )
    with pytest.raises(ValueError) as caught:
        checkpoints.load_corl_checkpoint(path)
    assert not marker.exists()
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert "never unpickled" in str(caught.value)


def test_the_malicious_pickle_works_where_pickle_is_executed(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "checkpoint_0.pt"
    save({"actor": marker_calls(marker)["system"]}, path)
    torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_old_and_bare_pickle_files_do_not_execute_either(tmp_path):
    marker = tmp_path / "executed"
    evil = {"actor": marker_calls(marker)["system"]}
    torch.save(evil, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(evil))
    (tmp_path / "protocol_0.pt").write_bytes(pickle.dumps(evil, protocol=0))
    for name in ("old", "bare", "protocol_0"):
        with pytest.raises(ValueError, match="cannot read"):
            checkpoints.load_corl_checkpoint(tmp_path / f"{name}.pt")
    assert not marker.exists()


def test_another_class_of_main_is_refused_by_name(tmp_path):
    path = tmp_path / "checkpoint.pt"
    program = "class Other(Scalar): pass\ntorch.save({'a': Other(1.0)}, sys.argv[1])"
    run_main(program, path)
    with pytest.raises(ValueError, match=r"__main__\.Other.*never unpickled"):
        checkpoints.load_corl_checkpoint(path)


def test_calling_scalar_with_arguments_gives_no_module(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save({"sac_log_alpha": Evil(checkpoints._PickledScalar, {"x": 1})}, path)
    with pytest.raises(ValueError, match="sac_log_alpha"):
        checkpoints.load_corl_checkpoint(path)


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        [1],
        {"_parameters": None},
        {"_parameters": {}},
        {"_parameters": {"constant": 1.0}},
        {"_parameters": {"constant": torch.zeros(2)}},
    ],
)
def test_a_scalar_without_its_one_number_is_refused(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    save({"total_it": 1, "cql_log_alpha": checkpoints._PickledScalar(state)}, path)
    with pytest.raises(ValueError, match="cql_log_alpha"):
        checkpoints.load_corl_checkpoint(path)


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_a_damaged_file_is_refused_in_one_line(upstream, tmp_path, cut):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(upstream[0].read_bytes()[:cut])
    with pytest.raises(ValueError, match="damaged") as caught:
        checkpoints.load_corl_checkpoint(path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- writing


def scalars(first, second):
    return {
        "actor": {"weight": torch.arange(6.0).reshape(2, 3)},
        "sac_log_alpha": {"constant": torch.tensor(first)},
        "cql_log_alpha": {"constant": torch.tensor(second, requires_grad=True)},
        "total_it": 5,
    }


def test_written_scalars_are_corls_own_modules_there(tmp_path):
    path = tmp_path / "checkpoint_4.pt"
    checkpoints.save_corl_checkpoint(path, scalars(-0.5, 2.0))
    # one step of x <- x - 0.25 * 2 x halves the value
    assert [float(v) for v in run_main(READER, path)] == [-0.25, 1.0]


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "checkpoint_4.pt"
    checkpoints.save_corl_checkpoint(path, scalars(-0.5, 2.0))
    state = checkpoints.load_corl_checkpoint(path)
    assert state["sac_log_alpha"]["constant"].item() == -0.5
    assert state["cql_log_alpha"]["constant"].item() == 2.0
    assert torch.equal(state["actor"]["weight"], torch.arange(6.0).reshape(2, 3))
    assert state["total_it"] == 5


@pytest.mark.parametrize("fails", [False, True])
def test_writing_leaves_main_as_it_was(tmp_path, monkeypatch, fails):
    main_module = sys.modules["__main__"]
    if fails:
        monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *args: 1 / 0)
    for own in (None, "theirs"):
        if own is not None:
            monkeypatch.setattr(main_module, "Scalar", own, raising=False)
        try:
            checkpoints.save_corl_checkpoint(
                tmp_path / "checkpoint.pt", scalars(0.0, 1.0)
            )
        except ZeroDivisionError:
            assert fails
        assert getattr(main_module, "Scalar", None) == own


def test_only_one_foreign_name_is_in_the_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_corl_checkpoint(path, scalars(0.0, 1.0))
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert foreign == ["__main__.Scalar"]
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        assert b"corl_dare" not in io.BytesIO(archive.read(name)).getvalue()


# ---------------------------------------------------------------- export of a run


@pytest.fixture
def run_folder(tmp_path):
    torch.manual_seed(0)
    trainer = iql.make_trainer(iql.TrainConfig(offline_iterations=5), 3, 2, 1.0, "cpu")
    batch = [torch.randn(4, n) for n in (3, 2, 1, 3, 1)]
    trainer.train(batch)
    folder = tmp_path / "run"
    folder.mkdir()
    state = {
        "format": checkpoints.FORMAT,
        "algorithm": "iql",
        "step": 40,
        "parts": {"trainer": trainer.state_dict(), "collector": {"state": [1, 2]}},
    }
    checkpoints.save_checkpoint(folder / "checkpoint.pt", state)
    return folder, trainer, batch


def test_an_exported_run_trains_on_the_same(run_folder):
    folder, trainer, batch = run_folder
    command = [sys.executable, "-m", "corl.checkpoints", "export", str(folder)]
    done = subprocess.run(
        [*command, "--to", "corl"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    path = folder / "checkpoint_39.pt"  # CORL counts from 0
    assert done.stdout.strip().endswith("checkpoint_39.pt")
    state = torch.load(path, weights_only=True)  # what CORL's plain torch.load does
    assert set(CORL_IQL_KEYS) <= set(state)
    torch.manual_seed(1)
    other = iql.make_trainer(iql.TrainConfig(offline_iterations=5), 3, 2, 1.0, "cpu")
    other.load_weights(checkpoints.load_corl_checkpoint(path, CORL_IQL_KEYS))
    for one in (trainer, other):
        one.train(batch)
    for net in ("qf", "vf", "actor", "q_target"):
        pairs = zip(
            getattr(trainer, net).parameters(),
            getattr(other, net).parameters(),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in pairs)
    assert other.total_it == trainer.total_it == 2


def test_export_writes_where_it_is_told(run_folder, tmp_path):
    folder, _, _ = run_folder
    out = tmp_path / "weights.pt"
    checkpoints.command_line(["export", str(folder), "--to", "corl", "--out", str(out)])
    assert out.is_file() and not list(folder.glob("checkpoint_*.pt"))


def test_export_of_scalars_makes_modules(run_folder):
    folder, _, _ = run_folder
    state = {"step": 8, "parts": {"trainer": scalars(-0.5, 2.0)}}
    checkpoints.save_checkpoint(folder / "checkpoint.pt", state)
    path = checkpoints.export_corl(folder)
    assert path.name == "checkpoint_7.pt"
    assert [float(v) for v in run_main(READER, path)] == [-0.25, 1.0]


def test_export_errors_are_one_line(run_folder, tmp_path, capsys):
    folder, _, _ = run_folder
    torch.save({"actor": {}}, tmp_path / "checkpoint.pt")
    cases = [
        ([tmp_path / "nothing"], "does not exist"),
        ([tmp_path], "is not a checkpoint of a corl-dare run"),
        ([folder, "--out", tmp_path / "no" / "x.pt"], "is not a folder"),
    ]
    for args, words in cases:
        with pytest.raises(SystemExit) as caught:
            checkpoints.command_line(["export", *map(str, args), "--to", "corl"])
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert str(caught.value).startswith("error: ")
    with pytest.raises(SystemExit, match="2"):
        checkpoints.command_line(["export", str(folder), "--to", "jax"])
    assert "--to" in capsys.readouterr().err
