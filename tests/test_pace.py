"""`auto`: what is chosen, when, and that a run keeps it; a run that becomes slow says so once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_equal
from short_runs import checkpoint_of, folder_of, run, stop_after

from algorithms import cql, iql
from corl import compiled, duration, pace
from corl.config import FinetuneConfig, parse_config
from corl.layers import dump_config, read_yaml

ROOT = Path(__file__).parent.parent
# As they are before the tests are kept from them.
TIME_PRODUCTS, AVAILABLE_CORES = pace.time_products, pace.available_cores
SHORT = {
    "offline_iterations": 6,
    "online_iterations": 6,
    "eval_freq": 6,
    "n_episodes": 1,
    "log_freq": 1,
    "batch_size": 16,
}
AUTO = {"threads": "auto", "compile": "auto"}
# Seconds of a product by number of threads, and the number that is chosen.
IDLE = {1: 1.0, 2: 0.6, 4: 0.4}
TIMINGS = [
    ({1: 1.0}, 1),
    ({1: 1.0, 2: 0.6}, 2),
    # Not clearly faster.
    ({1: 1.0, 2: 0.85}, 1),
    # Another program has one of two cores.
    ({1: 1.0, 2: 30.0}, 1),
    (IDLE, 4),
    ({1: 1.0, 2: 0.6, 4: 0.55}, 2),
    ({1: 1.0, 2: 0.9, 4: 0.3}, 4),
    ({1: 1.0, 2: 0.6, 4: 9.0}, 2),
]


@pytest.fixture
def machine_with(monkeypatch):
    """A machine with these timings, and something that compiling lacks or not."""

    def install(seconds, obstacle=""):
        monkeypatch.setattr(pace, "available_cores", lambda: max(seconds))
        monkeypatch.setattr(pace, "time_products", lambda counts: dict(seconds))
        monkeypatch.setattr(compiled, "obstacle", lambda: obstacle)

    return install


@pytest.fixture(autouse=True)
def same_threads():
    """The number of threads of this process stays as it is."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("seconds, best", TIMINGS)
def test_more_threads_are_taken_where_they_are_clearly_faster(seconds, best):
    assert pace.fastest_threads(seconds) == best


@pytest.mark.parametrize(
    "cores, counts",
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (6, [1, 2, 4, 6]),
        (8, [1, 2, 4, 8]),
        (64, [1, 2, 4, 8]),
    ],
)
def test_no_more_threads_are_tried_than_there_are_cores(cores, counts):
    assert pace.thread_counts(cores) == counts


def test_products_are_timed_in_turns_for_about_the_time_that_is_given(monkeypatch):
    """On a clock that only the products move; the median leaves one bad round out."""
    now, threads, calls = [0.0], [1], []

    def product(*args, out):
        calls.append(threads[0])
        slow = 50.0 if len(calls) < 12 else 1.0
        now[0] += {1: 0.004, 2: 0.002}[threads[0]] * slow

    def set_threads(count):
        threads[0] = count

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch, "set_num_threads", set_threads)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    state = torch.get_rng_state()
    found = TIME_PRODUCTS([1, 2], 5.0, lambda: now[0])
    assert found == {1: pytest.approx(0.004), 2: pytest.approx(0.002)}
    assert 5.0 <= now[0] < 5.2 and threads == [1]
    burst = pace.BURST + 1
    assert calls[: 4 * burst] == [1] * burst + [2] * burst + [1] * burst + [2] * burst
    assert torch.equal(torch.get_rng_state(), state)


def test_real_products_are_timed_and_the_threads_put_back():
    before = torch.get_num_threads()
    found = TIME_PRODUCTS([1, 2], 0.01)
    assert set(found) == {1, 2} and min(found.values()) > 0
    assert torch.get_num_threads() == before


LONG = pace.BREAK_EVEN
MISSING = "a C++ compiler"


@pytest.mark.parametrize(
    "fields, device, obstacle, expected",
    [
        ({}, "cpu", "", (4, True)),
        ({}, "cpu", MISSING, (4, False)),
        ({"offline_iterations": LONG - 1}, "cpu", "", (4, False)),
        ({"offline_iterations": LONG - 1, "online_iterations": 1}, "cpu", "", (4, True)),
        # The warm-up makes no updates.
        (
            {
                "offline_iterations": 0,
                "online_iterations": LONG,
                "online_warmup": LONG // 2,
                "utd": 2,
            },
            "cpu",
            "",
            (4, True),
        ),
        (
            {
                "offline_iterations": 0,
                "online_iterations": LONG,
                "online_warmup": LONG // 2,
            },
            "cpu",
            "",
            (4, False),
        ),
        ({"compat": True}, "cpu", "", (1, False)),
        ({}, "cuda", "", (1, True)),
        ({"offline_iterations": 1}, "cuda", "", (1, False)),
        # What is given stays.
        ({"threads": 3}, "cpu", "", (3, True)),
        ({"compile": False}, "cpu", "", (4, False)),
        ({"compile": True, "offline_iterations": 1}, "cpu", "", (4, True)),
        ({"compat": True, "threads": 2, "compile": True}, "cpu", "", (2, True)),
        ({"threads": 2, "compile": True}, "cuda", "", (2, True)),
    ],
)
def test_what_is_chosen(fields, device, obstacle, expected, machine_with, capsys):
    values = {"offline_iterations": LONG, "online_iterations": 0, **AUTO, **fields}
    machine_with(IDLE, "")
    config = iql.TrainConfig(**values)
    machine_with(IDLE, obstacle)
    pace.settle(config, device)
    assert (config.threads, config.compile) == expected
    shown = capsys.readouterr().out
    if "auto" not in (values["threads"], values["compile"]):
        assert shown == ""
        return
    flags = f"--threads {expected[0]} --compile {str(expected[1]).lower()} ("
    assert shown.startswith(f"chosen for this machine: {flags}")
    assert shown.count("\n") == 1 and (obstacle in shown)
    # The flags repeat it.
    words = flags.rstrip(" (").split()
    again = parse_config(iql.TrainConfig, words)
    assert (again.threads, again.compile) == expected


def test_a_gpu_needs_no_compiler(machine_with):
    machine_with(IDLE, "a C++ compiler")
    chosen, why = pace.worth_compiling(LONG, "cuda")
    assert chosen and why == "kernels are not fused, which needs a C++ compiler"


def test_nothing_is_timed_where_there_is_no_choice(machine_with, monkeypatch):
    machine_with(IDLE)

    def timed(counts):
        raise AssertionError

    monkeypatch.setattr(pace, "time_products", timed)
    pace.settle(iql.TrainConfig(threads=2), "cpu")
    monkeypatch.setattr(pace, "available_cores", lambda: 1)
    config = iql.TrainConfig()
    pace.settle(config, "cpu")
    assert config.threads == 1


def cgroup(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


V1 = {
    "proc/self/cgroup": "3:cpuset:/a\n2:cpu,cpuacct:/a/b\n1:memory:/a\n",
    "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
}
V2 = {"proc/self/cgroup": "0::/a/b\n"}


@pytest.mark.parametrize(
    "files, threads, cores",
    [
        ({}, "", 8),
        ({}, "3", 3),
        ({}, "auto", 8),
        (V2, "", 8),
        ({**V2, "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, "", 8),
        ({**V2, "sys/fs/cgroup/a/b/cpu.max": "250000 100000\n"}, "", 2),
        ({**V2, "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, "", 1),
        # In a container the group is the root of what is mounted.
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"},
            "",
            4,
        ),
        (
            {**V1, "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "300000\n"},
            "2",
            2,
        ),
        ({**V1, "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "300000\n"}, "", 3),
        ({**V1, "sys/fs/cgroup/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n"}, "", 8),
    ],
)
def test_the_cores_are_those_that_the_process_may_use(
    files, threads, cores, tmp_path, monkeypatch
):
    cgroup(tmp_path, files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert AVAILABLE_CORES(tmp_path) == cores


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "text, threads, compile",
    [
        ("threads: 2\ncompile: true", 2, True),
        ("threads: 1\ncompile: false", 1, False),
        ("threads: auto\ncompile: auto", "auto", "auto"),
        ("", "auto", "auto"),
    ],
)
def test_files_and_flags_take_numbers_switches_and_auto(
    text, threads, compile, tmp_path, machine_with
):
    machine_with(IDLE)
    (tmp_path / "c.yaml").write_text(text)
    config = parse_config(iql.TrainConfig, ["--config", str(tmp_path / "c.yaml")])
    assert (config.threads, config.compile) == (threads, compile)
    flags = [word for line in text.splitlines() for word in ("--" + line).split(": ")]
    assert parse_config(iql.TrainConfig, flags) == config
    (tmp_path / "d.yaml").write_text(dump_config(config))
    assert (
        parse_config(iql.TrainConfig, ["--config", str(tmp_path / "d.yaml")]) == config
    )


@pytest.mark.parametrize("module", [iql, cql])
def test_a_trainer_of_a_config_without_a_choice_is_eager(module):
    config = module.TrainConfig(**AUTO)
    trainer = module.make_trainer(config, 3, 2, 1.0, "cpu")
    assert not isinstance(trainer._update, compiled.CompiledUpdate)


# ---------------------------------------------------------------- a run


def test_a_run_stores_its_choice_and_a_resume_keeps_it(
    tmp_path, monkeypatch, machine_with, capsys
):
    """Bit for bit, on a machine that would now choose otherwise."""
    machine_with({1: 1.0, 2: 9.0})
    run(iql, tmp_path / "whole", monkeypatch, **{**SHORT, **AUTO})
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        run(iql, tmp_path / "cut", monkeypatch, **{**SHORT, **AUTO})
    folder = folder_of(tmp_path / "cut")
    stored = read_yaml(folder / "config.yaml")
    assert (stored["threads"], stored["compile"]) == (1, False)
    capsys.readouterr()
    machine_with({1: 1.0, 2: 0.1})
    argv = ["--resume", str(folder)]
    iql.train(parse_config(iql.TrainConfig, argv))
    assert "chosen" not in capsys.readouterr().out
    assert read_yaml(folder / "config.yaml")["threads"] == 1
    one, two = checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "cut")
    for key in ("parts", "rng", "step"):
        assert_equal(one[key], two[key], key)


def test_the_choice_leaves_no_trace_in_the_numbers(tmp_path, monkeypatch, machine_with):
    machine_with({1: 1.0, 2: 9.0})
    run(iql, tmp_path / "auto", monkeypatch, **{**SHORT, **AUTO})
    run(iql, tmp_path / "given", monkeypatch, **SHORT)
    one, two = checkpoint_of(tmp_path / "auto"), checkpoint_of(tmp_path / "given")
    for key in ("parts", "rng"):
        assert_equal(one[key], two[key], key)


def test_a_run_from_before_the_choice_goes_on_as_it_began(
    tmp_path, monkeypatch, machine_with
):
    """Its config has neither field, or one."""
    machine_with({1: 1.0, 2: 9.0})
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        run(iql, tmp_path, monkeypatch, **SHORT)
    folder = folder_of(tmp_path)
    lines = (folder / "config.yaml").read_text().splitlines(keepends=True)
    old = [x for x in lines if not x.startswith(("threads", "compile"))]
    assert len(old) == len(lines) - 2
    (folder / "config.yaml").write_text("".join(old))
    machine_with({1: 1.0, 2: 0.1})
    monkeypatch.setattr(pace, "BREAK_EVEN", 1)
    config = parse_config(iql.TrainConfig, ["--resume", str(folder)])
    iql.train(config)
    assert (config.threads, config.compile) == (1, False)


def test_neither_field_names_the_files_that_a_run_is_stored_with():
    assert "threads" in FinetuneConfig.BOOKKEEPING
    # Compiled numbers differ by rounding: a setting of the method.
    assert "compile" not in FinetuneConfig.BOOKKEEPING


# ---------------------------------------------------------------- the cache of graphs

# Compiles a small function and tells how often the cache had its graph.
GRAPH = """
import sys, torch
from pathlib import Path
from corl import compiled
compiled.keep_graphs_in(Path(sys.argv[1]))
from torch._dynamo.utils import counters
out = compiled.function(lambda x: (x.sin() * 2).sum())(torch.ones(64, 64))
import json, os
print(json.dumps([
    counters["inductor"]["fxgraph_cache_hit"],
    os.environ["TORCHINDUCTOR_CACHE_DIR"],
]))
"""


def compile_in(folder):
    kept = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", GRAPH, str(folder)],
        env={**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.whole
@pytest.mark.skipif(bool(compiled.obstacle()), reason="nothing to compile with")
def test_the_next_process_finds_the_compiled_graph(tmp_path):
    hits, folder = compile_in(tmp_path / "compiled")
    assert hits == 0 and Path(folder).parent == tmp_path / "compiled"
    assert compile_in(tmp_path / "compiled") == [1, folder]


def test_each_number_of_threads_has_its_own_graphs(tmp_path, monkeypatch):
    """It is built into their code."""
    folders = []
    for count in (1, 2):
        torch.set_num_threads(count)
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        compiled.keep_graphs_in(tmp_path)
        folders.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    assert folders[0] != folders[1] and all(x.parent == tmp_path for x in folders)


def test_a_cache_that_the_user_named_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    compiled.keep_graphs_in(tmp_path / "ours")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert not (tmp_path / "ours").exists()


# ---------------------------------------------------------------- what compiling needs


def test_what_compiling_lacks_is_said_in_a_few_words(monkeypatch, tmp_path):
    assert "C++ compiler" in _obstacle_with(monkeypatch, which=lambda name: None)
    # A compiler that cannot compile, or has no Python.h.
    assert "Python.h" in _obstacle_with(monkeypatch, which=lambda name: "/bin/false")
    old = SimpleNamespace(config=SimpleNamespace())
    monkeypatch.setattr(torch, "_dynamo", old)
    assert "newer torch" in _obstacle_with(monkeypatch, which=lambda name: "g++")


def _obstacle_with(monkeypatch, which):
    with monkeypatch.context() as patch:
        patch.setattr(compiled.shutil, "which", which)
        return compiled.obstacle()


# ---------------------------------------------------------------- a slow run


def looks(watch, phase, seconds_per_update, updates, start=(0, 0.0)):
    """What is said while updates take so long each, and the counts at the end."""
    count, seconds = start
    said = []
    for _ in range(updates):
        count, seconds = count + 1, seconds + seconds_per_update
        said.append(watch.look(phase, count, seconds))
    return [line for line in said if line], (count, seconds)


def test_a_run_that_became_slow_says_so_once_with_what_helps():
    watch = pace.RateWatch({"offline": 0.1, "online": 1.0}, 2)
    said, now = looks(watch, "offline", 0.1, 1000)
    assert said == []
    said, now = looks(watch, "offline", 0.25, 1000, now)
    assert said == [], "not slow enough"
    said, now = looks(watch, "offline", 0.5, 1000, now)
    (line,) = said
    assert "2 updates a second" in line and "10 were measured" in line
    assert "--threads 1" in line and "resume" in line
    assert looks(watch, "online", 99.0, 100, now)[0] == []


def test_a_short_stop_is_not_a_slow_run():
    watch = pace.RateWatch({"offline": 0.1}, 2)
    said, now = looks(watch, "offline", 0.1, 10)
    said, now = looks(watch, "offline", 30.0, 1, now)
    assert said == []
    assert looks(watch, "offline", 0.1, 1000, now)[0] == []


def test_each_phase_has_its_own_rate_and_one_thread_no_other_number():
    watch = pace.RateWatch({"offline": 0.1, "online": 1.0}, 1)
    said, now = looks(watch, "offline", 0.1, 599)
    said, now = looks(watch, "online", 2.0, 500, now)
    assert said == []
    (line,) = looks(watch, "online", 4.0, 500, now)[0]
    assert "--threads" not in line and "Fewer runs" in line


def test_a_phase_that_was_not_measured_is_not_judged():
    watch = pace.RateWatch({}, 2)
    assert looks(watch, "offline", 100.0, 100)[0] == []


@pytest.mark.makes("estimate")
def test_a_run_prints_that_it_became_slow_once(tmp_path, monkeypatch, capsys):
    """Its updates were measured to take no time."""
    monkeypatch.setattr(pace, "SLOW_SECONDS", 1e-9)
    monkeypatch.setattr(duration.Stopwatch, "seconds_per_call", lambda *work: 1e-9)
    run(iql, tmp_path, monkeypatch, **{**SHORT, "threads": 2})
    shown = capsys.readouterr().out
    assert shown.count("were measured at the start") == 1 and "--threads 1" in shown
