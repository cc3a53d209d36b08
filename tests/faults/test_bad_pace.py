"""Values of `threads`, `compile` and `preset` that cannot be meant; a cache that is no folder."""

import harness
import pytest

from algorithms import cal_ql, cql, dare_cal_ql, dare_iql, iql
from corl import compiled

ALL = {
    "iql": iql,
    "cql": cql,
    "cal_ql": cal_ql,
    "dare_iql": dare_iql,
    "dare_cal_ql": dare_cal_ql,
}
DARE = ("dare_iql", "dare_cal_ql")
VALUES = [
    *(("threads", v) for v in ("0", "-1", "two", "1.5", "true", "inf", "nan", "none")),
    *(("threads", v) for v in ("Auto?", "1e99", "[1, 2]", "''")),
    *(("compile", v) for v in ("maybe", "1", "2", "none", "0.5", "autos", "[true]")),
]


def flags_of(good, tmp_path, **fields):
    return harness.short_run(tmp_path, good, **fields)


@pytest.mark.fault("bad inputs")
@pytest.mark.parametrize("field, value", VALUES)
def test_a_flag_that_cannot_be_meant(field, value, good, tmp_path):
    outcome = harness.run(
        harness.algorithm(iql), *flags_of(good, tmp_path, **{field: value})
    )
    harness.assert_refused(outcome, field, "auto|int or str|bool or str|must lie in")
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault("bad inputs")
@pytest.mark.parametrize("field, value", VALUES)
def test_a_line_of_a_file_that_cannot_be_meant(field, value, good, tmp_path):
    (tmp_path / "c.yaml").write_text(f"{field}: {value}\n")
    flags = flags_of(good, tmp_path)
    at = flags.index(f"--{field}")
    outcome = harness.run(
        harness.algorithm(iql),
        *flags[:at],
        *flags[at + 2 :],
        "--config",
        tmp_path / "c.yaml",
    )
    harness.assert_refused(outcome, field)
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault("bad inputs")
@pytest.mark.parametrize("name", DARE)
@pytest.mark.parametrize("preset", ["gpu", "CPU", "none", "1", "near,cpu"])
def test_an_unknown_preset_names_those_that_there_are(name, preset, good, tmp_path):
    flags = flags_of(good, tmp_path, preset=preset)
    outcome = harness.run(harness.algorithm(ALL[name]), *flags)
    harness.assert_refused(outcome, "preset", preset, "paper, near, cpu")
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault("bad inputs")
@pytest.mark.parametrize("name", ALL)
def test_compile_true_without_a_compiler(name, good, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    flags = flags_of(good, tmp_path, compile="true")
    outcome = harness.run(harness.algorithm(ALL[name]), *flags)
    harness.assert_refused(
        outcome, "compile", "C\\+\\+ compiler", "set compile to false"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault("bad inputs")
def test_a_cache_of_compiled_updates_that_is_a_file(good, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(compiled, "obstacle", lambda: "")
    flags = flags_of(good, tmp_path, compile="true")
    outcome = harness.run(harness.algorithm(iql), *flags)
    harness.assert_refused(outcome, "compiled", "CORL_DARE_CACHE", "compile to false")
    assert not (tmp_path / "runs").exists()
