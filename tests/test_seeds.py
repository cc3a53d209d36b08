"""`seeds: 0-7`: several runs in one command, each as if it had been started alone."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import assert_equal

from algorithms import iql
from corl import seeds
from corl.config import parse_config, seed_list

sys.path.append(str(Path(__file__).parent / "faults"))
import harness

ROOT = Path(__file__).parent.parent
# Stands for an algorithm file: says its seed, then does what the name of the run asks for.
PROGRAM = """
import os, pathlib, sys, time, yaml
config = yaml.safe_load(pathlib.Path(sys.argv[2]).read_text())
seed, folder = config["seed"], pathlib.Path(config["runs_dir"])
(folder / f"{seed}.pid").write_text(str(os.getpid()))
print(f"seed {seed}, seeds {config['seeds']}, threads {config['threads']}")
if config["name"] == "fails" and seed == 1:
    print("error: the data is bad", file=sys.stderr)
    raise SystemExit(1)
if config["name"] == "waits":
    time.sleep(100)
"""


def config_of(folder, name, text, **fields):
    folder.mkdir(exist_ok=True)
    fields = {"device": "cpu", "compile": False, "threads": 1, **fields}
    return iql.TrainConfig(runs_dir=str(folder), name=name, seeds=text, **fields)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def wait_for(path):
    end = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, path
        time.sleep(0.02)
    return int(path.read_text())


def is_alive(process):
    with suppress(ProcessLookupError):
        os.kill(process, 0)
        # A process that has ended and that nobody has asked about is no longer at work.
        state = Path(f"/proc/{process}/stat")
        return not state.exists() or state.read_text().split()[2] != "Z"
    return False


@pytest.mark.parametrize(
    "text, found",
    [
        ("0-7", list(range(8))),
        ("0,3,5", [0, 3, 5]),
        ("8, 0-2", [8, 0, 1, 2]),
        ("4", [4]),
        ("4294967295", [4294967295]),
    ],
)
def test_seeds_are_ranges_and_single_numbers(text, found):
    assert seed_list(text) == found


@pytest.mark.parametrize(
    "text, says",
    [
        ("a", "must be like 0-7 or 0,3,5, not 'a'"),
        ("1-", "must be like"),
        ("-1", "must be like"),
        ("", "must be like"),
        ("3-1", "write 1-3"),
        ("1,0-2", "names seed 1 twice"),
        ("0-1000", "more than 1000"),
        ("4294967296", "4294967296"),
    ],
)
def test_what_is_no_list_of_seeds_is_refused(text, says):
    with pytest.raises(ValueError, match="seeds") as error:
        iql.TrainConfig(seeds=text)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_seed_and_seeds_in_one_place_are_refused_and_a_flag_wins_over_the_file(tmp_path):
    def parse(*flags):
        return parse_config(iql.TrainConfig, list(map(str, flags)))

    file = tmp_path / "c.yaml"
    for words in (["--seed", 1, "--seeds", "0-1"], ["--config", file]):
        file.write_text("seed: 1\nseeds: 0-1\n")
        with pytest.raises(SystemExit) as end:
            parse(*words)
        assert end.value.code == 2
    file.write_text("seeds: 0-1\n")
    assert parse("--config", file).seeds == "0-1"
    alone = parse("--config", file, "--seed", 3)
    assert (alone.seed, alone.seeds) == (3, None)
    file.write_text("seed: 5\n")
    assert parse("--config", file, "--seeds", "0,2").seeds == "0,2"


def test_every_seed_runs_alone_on_one_thread_and_its_lines_say_so(
    tmp_path, program, capsys
):
    config = config_of(tmp_path / "runs", "ends", "0,2,5", threads="auto")
    seeds.as_processes(program, config, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert "3 seeds, 2 at a time, as processes of 1 thread(s)" in lines
    for seed in (0, 2, 5):
        assert f"[seed {seed}] seed {seed}, seeds None, threads 1" in lines


def test_a_seed_that_fails_is_named_in_one_line_and_the_others_go_on(
    tmp_path, program, capsys
):
    config = config_of(tmp_path / "runs", "fails", "0-2")
    with pytest.raises(RuntimeError) as error:
        seeds.as_processes(program, config, "cpu")
    assert "seeds that failed: 1 (exit status 1)" in str(error.value)
    assert "ended well: 0, 2" in str(error.value) and "\n" not in str(error.value)
    assert "[seed 1] error: the data is bad" in capsys.readouterr().out


def test_a_signal_ends_every_process_and_starts_no_other(tmp_path, program):
    folder = tmp_path / "runs"
    folder.mkdir()
    script = f"""
import os, sys, signal, threading, time
from pathlib import Path
from algorithms import iql
from corl import config, seeds

def interrupt():
    while len(list(Path({str(folder)!r}).glob("*.pid"))) < 2:
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGINT)

def train(config):
    threading.Thread(target=interrupt, daemon=True).start()
    seeds.as_processes({program!r}, config, "cpu")

words = ["--runs_dir", {str(folder)!r}, "--name", "waits", "--seeds", "0-3"]
words += ["--threads", "1", "--compile", "false", "--device", "cpu"]
config.main(train, iql.TrainConfig, words)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Two at a time, on any machine.
    script = "from corl import pace\npace.available_cores = lambda **_: 2\n" + script
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted: seeds 0, 1, 2, 3 have not ended" in done.stderr
    assert "Traceback" not in done.stderr
    started = sorted(folder.glob("*.pid"))
    assert [path.stem for path in started] == ["0", "1"]
    assert not any(is_alive(int(path.read_text())) for path in started)


def test_no_process_outlives_a_command_that_was_killed(tmp_path, program):
    folder = tmp_path / "runs"
    folder.mkdir()
    script = f"""
from algorithms import iql
from corl import seeds
fields = dict(device="cpu", compile=False, threads=1, name="waits", seeds="0-1")
config = iql.TrainConfig(runs_dir={str(folder)!r}, **fields)
seeds.as_processes({program!r}, config, "cpu")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        process = wait_for(folder / "0.pid")
        assert is_alive(process)
    finally:
        parent.kill()
        parent.wait()
    end = time.monotonic() + 20
    while is_alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(process)


def test_a_run_of_several_seeds_gives_the_bits_of_runs_alone(tmp_path):
    data = harness.write_dataset(tmp_path / "data.hdf5", harness.good_rows())
    command = harness.algorithm(iql)
    flags = harness.short_run(tmp_path / "many", data)
    many = harness.run(command, *flags, "--seeds", "1,4")
    assert many.status == 0, many.err
    for seed in (1, 4):
        flags = harness.short_run(tmp_path / f"alone{seed}", data, seed=seed)
        alone = harness.run(command, *flags)
        assert alone.status == 0, alone.err
        states = []
        for folder in ("many", f"alone{seed}"):
            (path,) = (tmp_path / folder / "runs").glob(f"*-s{seed}-*")
            assert (path / "summary.json").exists()
            state = torch.load(path / "checkpoint.pt", weights_only=True)
            assert state["config"]["seeds"] is None
            states.append(state)
        assert_equal(states[0]["parts"], states[1]["parts"])


def test_corls_checkpoints_of_each_seed_have_a_folder(tmp_path):
    config = config_of(tmp_path, "x", "0-1", checkpoints_path="there")
    alone = seeds.of_seed(config, 1)
    assert (alone.checkpoints_path, alone.seed, alone.seeds) == ("there/seed-1", 1, None)


def test_seeds_as_takes_three_words():
    with pytest.raises(ValueError, match="seeds_as 'threads' is not one of"):
        iql.TrainConfig(seeds_as="threads")
