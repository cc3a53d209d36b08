"""Arguments of every other command: what cannot be meant ends in one line, before any work."""

import importlib
import sys

import harness
import pytest

pytestmark = pytest.mark.fault("bad inputs")

NO_SEED = ["-1", "4294967296", "1.5", "x", "", "1" + 30 * "0"]
NO_COUNT = ["0", "-1", "2.5", "nan", "many", "", str(10**12), str(10**30)]
CARD, COLLECT = "corl.data.card", "corl.standin.collect"
SAC, WALKER = "corl.standin.train_sac", "corl.standin.train_walker"
SWEEP, REPORT = "experiments.sweep", "experiments.report"
SHIM, CHECKPOINTS = "corl.shim.__main__", "corl.checkpoints"
SPEED, TABLE = "benchmarks.update_speed", "benchmarks.upstream_table"
AGREEMENT, DATA = "benchmarks.decision_agreement", "benchmarks.dataset_speed"
ACCURACY = "benchmarks.exchange_accuracy.run"
# Command, the arguments that it needs, an argument, values that it cannot have.
NUMBERS = [
    (CARD, ["hopper-medium-v2"], "rows", ["1", *NO_COUNT]),
    (COLLECT, ["hopper-medium-v2"], "rows", ["1", *NO_COUNT]),
    (COLLECT, ["hopper-medium-v2"], "seed", NO_SEED),
    (COLLECT, ["hopper-medium-v2"], "workers", NO_COUNT),
    (
        COLLECT,
        ["hopper-medium-v2"],
        "share",
        ["-1", "2", "0", "1", "nan", "half", "inf"],
    ),
    (SAC, ["hopper", "--out", "x"], "seed", NO_SEED),
    (SAC, ["hopper", "--out", "x"], "steps", NO_COUNT),
    (SAC, ["hopper", "--out", "x"], "snapshot_every", NO_COUNT),
    (SAC, ["hopper", "--out", "x", "--level", "medium"], "ship", NO_COUNT),
    (WALKER, ["--out", "x"], "seed", NO_SEED),
    (SWEEP, ["s.yaml"], "workers", NO_COUNT),
    (SWEEP, ["s.yaml"], "gpus", ["-1", "nan", "inf", "one", ""]),
    (SWEEP, ["s.yaml"], "retries", ["-1", "1.5", "x", str(10**12)]),
    (SPEED, [], "rounds", NO_COUNT),
    (SPEED, [], "threads", NO_COUNT),
    (SPEED, [], "seconds", ["0", "-1", "nan", "inf", "long"]),
    (TABLE, ["CORL"], "seed", NO_SEED),
    (AGREEMENT, [], "seed", NO_SEED),
    (AGREEMENT, [], "dataset_rows", NO_COUNT),
    (AGREEMENT, [], "behavior_lr", ["0", "-1", "nan", "inf", "x"]),
    (DATA, [], "rows", ["1", *NO_COUNT]),
    (DATA, [], "loop_rows", ["1", *NO_COUNT]),
    (ACCURACY, [], "seed", NO_SEED),
    (ACCURACY, [], "batches", NO_COUNT),
    (ACCURACY, [], "diffusion_lr", ["0", "-1", "nan", "inf", "x"]),
]
INSTANCES = [
    pytest.param(command, [*given, f"--{name}={value}"], f"--{name}: must (lie in|be)")
    for command, given, name, values in NUMBERS
    for value in values
]
OTHERS = [
    (CARD, ["hoper-medium-v2"], "unknown task.*mean hopper-medium-v2"),
    (CARD, [], "give one task"),
    (CARD, ["hopper-medium-v2", "--source", "web"], "--source.*web"),
    (CARD, ["hopper-medium-v2", "--path", "no.hdf5"], "no.hdf5"),
    (CARD, ["hopper-medium-v2", "--path", "~nobody_here/x.hdf5"], "nobody_here"),
    (CARD, ["hopper-medium-v2", "--export", "csv", "x"], "--export csv"),
    (CARD, ["hopper-medium-v2", "--no_such"], "no_such"),
    (CARD, ["hopper-medium-v2", "hopper-expert-v2"], "hopper-expert-v2"),
    (CARD, ["--all", "--report", "x"], "give one task"),
    (CARD, ["--all", "--plot", "x.png"], "belong to one task"),
    (COLLECT, ["hoper-medium-v2"], "unknown task.*mean hopper-medium-v2"),
    (COLLECT, ["pen-human-v1"], "pen"),
    (COLLECT, [], "task"),
    (COLLECT, ["hopper-medium-v2", "--mix", "best"], "--mix.*best"),
    (COLLECT, ["hopper-medium-v2", "--policy", "no.safetensors"], "no.safetensors"),
    (COLLECT, ["hopper-medium-v2", "--seed"], "--seed"),
    (SAC, ["ant", "--out", "x"], "ant"),
    (SAC, ["hopper"], "--out"),
    (SAC, ["hopper", "--out", "x", "--device", "gpu"], "device 'gpu'"),
    (SAC, ["hopper", "--out", "x", "--level", "medium"], "belong together"),
    (SAC, ["hopper", "--out", "x", "--ship", "5", "--level", "expert"], "x"),
    (WALKER, [], "--out"),
    (WALKER, ["--out", "x", "--ship"], "x"),
    (SWEEP, [], "name a sweep file"),
    (SWEEP, ["no.yaml"], "no.yaml does not exist"),
    (SWEEP, ["s.yaml", "t.yaml"], "t.yaml"),
    (REPORT, [], "command"),
    (REPORT, ["draw"], "draw"),
    (REPORT, ["add", "no/run", "--to", "x"], "no/run"),
    (REPORT, ["add", "no/run"], "--to"),
    (REPORT, ["figures", "no/run"], "no/run"),
    (REPORT, ["write", "no/results"], "no/results"),
    (SHIM, ["no/script.py"], "no/script.py does not exist"),
    (SHIM, ["--dataset_source", "web", "x.py"], "web"),
    (SHIM, [], "file of a script"),
    (SHIM, ["-m"], "-m and a module"),
    (SHIM, ["-m", "no.module"], "no module no.module"),
    (SHIM, ["--gym-api", "0.9", "x.py"], "0.9"),
    (SHIM, ["--data", "x.py", "y.py"], "--data"),
    (CHECKPOINTS, ["export", "no/run", "--to", "corl"], "no/run.*does not exist"),
    (CHECKPOINTS, ["export", "no/run", "--to", "d3rlpy"], "d3rlpy"),
    (CHECKPOINTS, ["export", "no/run"], "--to"),
    (CHECKPOINTS, [], "command"),
    (SPEED, ["--device", "gpu"], "device 'gpu'"),
    (SPEED, ["--algorithms", "td3"], "td3"),
    (SPEED, ["--corl", "no/corl", "--algorithms", "iql"], "no/corl"),
    (TABLE, ["no/corl"], "no/corl is no folder of CORL"),
    (TABLE, ["no/corl", "--only", "td3"], "td3"),
    (AGREEMENT, ["--env", "hoper-medium-v2"], "unknown task"),
    (DATA, ["--rows", "10", "--loop_rows", "20"], "--loop_rows"),
    (ACCURACY, ["--levels", "medium"], "two or more"),
    (ACCURACY, ["--levels", "medium", "best"], "best"),
    (ACCURACY, ["--report", "--out", "no/out"], "no/out"),
    ("benchmarks.parity", ["--corl", "no/corl"], "no/corl"),
    ("benchmarks.parity", [], "--corl"),
    ("benchmarks.parity_rebrac", ["--corl", "no/corl"], "--jax_python"),
    (
        "benchmarks.parity_rebrac",
        ["--corl", "no/corl", "--jax_python", "no/python"],
        "no/corl",
    ),
    ("benchmarks.memory", ["--no_such"], "no_such"),
]


@pytest.mark.parametrize("command, argv, says", [*INSTANCES, *OTHERS], ids=str)
def test_a_bad_argument_is_refused(command, argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(command)
    main = getattr(module, "main", None) or module.command_line
    monkeypatch.setattr(sys, "argv", [command, *argv])

    def without_arguments(_):
        raise SystemExit(main())

    harness.assert_refused(harness.run(without_arguments), says)
    assert list(tmp_path.iterdir()) == []
