"""A settings file that is no settings file ends in one line with its name; nothing in it runs."""

import harness
import pytest
import yaml

from algorithms import dare_iql
from corl import yaml_files
from corl.config import FinetuneConfig
from corl.layers import read_yaml
from experiments import plan

pytestmark = pytest.mark.fault("bad inputs")

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
# Name -> (text or bytes, patterns of the line).
FILES = {
    "a field twice": (
        "seed: 1\nenv: x\nseed: 2\n",
        "seed is there twice.*lines 1 and 3",
    ),
    "the same twice": ("seed: 1\nseed: 1\n", "seed is there twice.*lines 1 and 2"),
    "twice in a block": ("dare:\n  cap: 1\n  cap: 2\n", "cap is there twice.*2 and 3"),
    "a block twice": ("dare: {cap: 1}\ndare: {cap: 2}\n", "dare is there twice"),
    "twice, quoted": ("seed: 1\n'seed': 2\n", "seed is there twice"),
    "twice in flow": ("{seed: 1, seed: 2}", "seed is there twice"),
    "two merges": ("a: &a {b: 1}\n<<: *a\n<<: *a\n", "<< is there twice"),
    "bomb": (BOMB, "aliases counted"),
    "bomb in a block": (
        "dare:\n" + "".join(f"  {x}\n" for x in BOMB.split("\n")),
        "alias",
    ),
    "itself": ("seed: &a [*a]\n", "aliases counted"),
    "itself in a block": ("dare: &a {cap: *a}\n", "aliases counted"),
    "deep flow": ("seed: " + "[" * 60 + "]" * 60, "blocks in each other"),
    "very deep flow": ("seed: " + "[" * 400, "not readable YAML"),
    "deep braces": ("{a: " * 5000, "not readable YAML"),
    "deep blocks": ("".join(f"{' ' * i}a:\n" for i in range(300)), "not readable YAML"),
    "deep lists": ("seed: \n  " + "- " * 3000 + "1\n", "not readable YAML"),
    "huge": ("# " + "x" * 10**6 + "\nseed: 1\n", "larger than 100000 bytes"),
    "many values": ("seed: [" + "1," * 21000 + "1]", "values"),
    "python object": ("seed: !!python/object/apply:os.system ['echo hi']\n", "tag"),
    "python name": ("seed: !!python/name:os.system\n", "tag .*python/name.* not read"),
    "python tuple": ("seed: !!python/tuple [1]\n", "tag .*not read"),
    "own tag": ("seed: !mine 3\n", "tag !mine is not read"),
    "binary tag": ("seed: !!binary aGk=\n", "!!binary is not read"),
    "set tag": ("seed: !!set {a, b}\n", "!!set is not read"),
    "timestamp tag": ("seed: !!timestamp soon\n", "!!timestamp is not read"),
    "int tag": ("seed: !!int soon\n", "not readable YAML"),
    "float tag": ("discount: !!float soon\n", "not readable YAML"),
    "bool tag": ("compat: !!bool soon\n", "not readable YAML"),
    "null tag on a block": ("seed: !!null {a: 1}\n", ""),
    "map tag": ("seed: !!map 3\n", "not readable YAML"),
    "five thousand digits": ("seed: " + "9" * 5000 + "\n", "not readable YAML"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "not readable YAML.*UTF-8"),
    "UTF-32": ("seed: 1\n".encode("utf-32"), "not readable YAML.*UTF-8"),
    "latin-1": ("name: é\n".encode("latin-1"), "byte 6 is not UTF-8"),
    "binary": (bytes(range(256)), "not readable YAML"),
    "nul": (b"seed: 1\0\n", "not readable YAML"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "not readable YAML"),
    "control": ("name: 'a\x07'\n", "not readable YAML"),
    "escape": ('name: "a\\nb"\n', "name must be a line"),
    "number as a key": ("1: 2\n", "unknown field 1"),
    "none as a key": ("~: 2\n", "unknown field None"),
    "switch as a key": ("yes: 2\n", "unknown field True"),
    "date as a key": ("2024-01-01: 2\n", "unknown field 2024-01-01"),
    "list as a key": ("? [a, b]\n: 2\n", "line 1: the name of a field must be a word"),
    "block as a key": ("? {a: b}\n: 2\n", "the name of a field must be a word"),
    "empty key": ("'': 2\n", "unknown field"),
    "long key": ("x" * 900 + ": 2\n", "unknown field xxx"),
    "date": ("seed: 2024-01-01\n", "seed must be int, not '2024-01-01'"),
    "time": ("seed: 2024-01-01T12:00:00Z\n", "seed must be int, not '2024"),
    "sixty": ("seed: 1:30\n", "seed must be int, not '1:30'"),
    "sixty, with a point": ("discount: 0:0.5\n", "discount must be float, not '0:0.5'"),
    "hexadecimal": ("seed: 0x10\n", "seed must be int, not '0x10'"),
    "binary number": ("seed: 0b11\n", "seed must be int, not '0b11'"),
    "list": ("seed: [1, 2]\n", r"seed must be int, not \[1, 2\]"),
    "long list": (f"seed: {list(range(500))}\n", "seed must be int.*characters"),
    "lines": ("name: |\n  a\n  b\n", "name must be a line"),
    "list for a text": ("env: [hopper-medium-v2]\n", "env must be str"),
    "block for a number": ("discount: {a: 1}\n", "discount must be float"),
    "number for a block": ("dare: 3\n", "dare must be a block"),
    "list for a block": ("dare: [cap]\n", "dare must be a block"),
    "a list": ("- seed: 1\n", "must hold `field: value` lines"),
    "a word": ("seed\n", "must hold `field: value` lines"),
    "a number": ("3\n", "must hold `field: value` lines"),
    "two documents": ("seed: 1\n---\nseed: 2\n", "not readable YAML"),
    "tab": ("dare:\n\tcap: 1\n", "not readable YAML"),
    "open bracket": ("seed: [1\n", "not readable YAML"),
    "open quote": ("name: 'a\n", "not readable YAML"),
    "unknown alias": ("seed: *a\n", "not readable YAML.*undefined alias"),
    "colons": ("seed: 1: 2\n", "not readable YAML"),
    "JSON lines": ('{"seed": 1}\n{"seed": 2}\n', "not readable YAML"),
    "merge of a number": ("<<: 3\n", "not readable YAML"),
    "resume": ("resume: runs/x\n", "resume is a flag"),
    "slip": ("sede: 1\n", "did you mean seed"),
    "slip in a block": ("dare: {capp: 1}\n", "did you mean dare.cap"),
    "CORL, offline": (
        "max_timesteps: 1000000\n",
        "max_timesteps.*set offline_iterations",
    ),
    "CORL, AWAC": ("env_name: hopper-medium-v2\n", "env_name.*set env"),
    "CORL, SPOT": ("vae_lr: 0.001\n", "vae_lr.*another algorithm"),
    "CORL, CQL": ("policy_log_std_multiplier: 1.0\n", "leave it out"),
    "CORL, AWAC's evaluations": ("eval_frequency: 1000\n", "set eval_freq"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_settings_file_is_refused_with_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, says = FILES[name]
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "bad.yaml").write_bytes(content)
    outcome = harness.run(harness.algorithm(dare_iql), "--config", "bad.yaml")
    harness.assert_refused(outcome, r"bad\.yaml", says)
    assert not (tmp_path / "runs").exists() and "hi" not in outcome.out


SWEEP = """
tasks: [hopper-medium-v2]
seeds: [0]
methods:
  a: {algorithm: FILE}
"""
SWEEPS = {
    "negative seed": ("seeds: [0]", "seeds: [-1]", "whole numbers from 0 to.*, not -1"),
    "huge seed": (
        "seeds: [0]",
        "seeds: [99999999999]",
        "whole numbers from 0 to.*not 99999999999",
    ),
    "seed of words": ("seeds: [0]", "seeds: [first]", "seeds must be whole numbers"),
    "no seed": ("seeds: [0]", "seeds: []", "seeds is missing or empty"),
    "a seed, no list": ("seeds: [0]", "seeds: 0", "seeds must be a list"),
    "seed twice": ("seeds: [0]", "seeds: [0, 0]", "is there twice"),
    "seeds twice": ("seeds: [0]", "seeds: [0]\nseeds: [1]", "seeds is there twice"),
    "unknown task": ("hopper-medium-v2", "hoper-medium-v2", "mean hopper-medium-v2"),
    "no algorithm": ("FILE", "no/such.py", "no/such.py does not exist"),
    "range": (
        "FILE",
        "FILE, settings: {discount: 2}",
        "a.settings: discount must lie in",
    ),
    "range in a block": (
        "FILE",
        "FILE, settings: {dare.cap: -1}",
        "dare.cap must lie in",
    ),
    "range in a grid": ("FILE", "FILE, grid: {tau: [0.1, 5]}", "tau must lie in"),
    "huge": (
        "FILE",
        "FILE, settings: {n_episodes: 1000000000000}",
        "n_episodes must lie",
    ),
    "too many cells": (
        "FILE",
        "FILE, grid: {"
        + ", ".join(f"dare.{f}: {list(range(1, 30))}" for f in "abcdefg")
        + "}",
        "cells, and a sweep has at most",
    ),
    "bomb": ("tasks:", BOMB + "tasks:", "aliases counted"),
    "tag": ("seeds: [0]", "seeds: !!python/tuple [0]", "tag"),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_bad_sweep_file_is_refused_with_its_name(name, tmp_path):
    old, new, says = SWEEPS[name]
    file = tmp_path / "bad.yaml"
    file.write_text(SWEEP.replace(old, new).replace("FILE", dare_iql.__file__))
    from experiments import sweep

    def command(argv):
        raise SystemExit(sweep.main(argv))

    outcome = harness.run(command, file, "--runs_dir", tmp_path / "runs")
    harness.assert_refused(outcome, r"bad\.yaml", says)
    assert not (tmp_path / "runs").exists()


def test_a_good_sweep_file_is_planned(tmp_path):
    file = tmp_path / "good.yaml"
    file.write_text(SWEEP.replace("FILE", dare_iql.__file__))
    assert [c.label for c in plan.plan(file, tmp_path)][
        -1
    ] == "a hopper-medium-v2 seed 0"


def test_good_files_are_read_as_before(tmp_path):
    file = tmp_path / "good.yaml"
    text = "\ufeff# é\na: &x {b: 1, c: [1, -2, 0.5, .inf, 1.0e-05, 3e-4]}\nd: *x\n"
    text += "e: {<<: *x, b: 2}\nf: [yes, null, ~, '010', 010, word]\n"
    file.write_text(text, encoding="utf-8")
    block = {"b": 1, "c": [1, -2, 0.5, float("inf"), 1e-5, "3e-4"]}
    assert read_yaml(file) == {
        "a": block,
        "d": block,
        "e": {**block, "b": 2},
        "f": [True, None, None, "010", "010", "word"],
    }
    file.write_text("")
    assert read_yaml(file) == {}


def test_what_is_dumped_is_read_back(tmp_path):
    values = {"a": 10**20, "b": 1e-300, "c": "1:30", "d": "0x10", "e": [True, None]}
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(values))
    assert yaml_files.load(file) == values


def test_a_file_of_a_megabyte_is_refused_unread(tmp_path, monkeypatch):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"a" * 10**6)
    monkeypatch.setattr(type(file), "read_bytes", lambda path: pytest.fail("read"))
    with pytest.raises(ValueError, match="larger than 100000 bytes"):
        yaml_files.load(file)


def test_no_value_that_corl_ships_is_called_foreign():
    """The hints are of fields that we do not have."""
    from corl.layers import CORL_FIELDS

    assert not CORL_FIELDS.keys() & FinetuneConfig.__dataclass_fields__.keys()
