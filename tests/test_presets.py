"""Presets: what they set, what wins over them, and that a long run names those that are shorter."""

import dataclasses

import pytest
from kinds import one_of_each_kind
from short_runs import CQL_FIELDS, DEFAULTS, SMALL, folder_of, run

from algorithms import (
    awac,
    baq_cal_ql,
    cal_ql,
    cfdg_iql,
    cql,
    dare_awac,
    dare_cal_ql,
    dare_cql,
    dare_cql_sa,
    dare_famo2o_cql,
    dare_iql,
    dare_opt_spot,
    dare_rebrac,
    dare_spot,
    dare_td3_bc,
    dare_wsrl,
    e2o,
    edis_cal_ql,
    edis_iql,
    iql,
    opt_spot,
    opt_td3,
    pex,
    rebrac,
    rlpd,
    spot,
    td3_bc,
    wsrl,
)
from corl import duration
from corl.config import parse_config
from corl.layers import ConfigError, dump_config, make_config, presets_help, presets_of
from corl_dare.config import PRESETS, DareConfig

pytestmark = pytest.mark.narrow(16)
WITH_PRESETS = [dare_iql, dare_cal_ql, dare_cql, dare_awac, dare_td3_bc, dare_rebrac]
WITH_PRESETS += [dare_spot, dare_wsrl, dare_famo2o_cql, dare_cql_sa, dare_opt_spot]
BASELINES = [
    *(iql, cql, cal_ql, td3_bc, awac, rebrac, spot),
    *(pex, edis_iql, edis_cal_ql, cfdg_iql, rlpd, wsrl, e2o, baq_cal_ql),
    *(opt_td3, opt_spot),
]
YAML = "dare:\n  guidance_scale: 8.0\n  cap: 3\n  support_actions: 5\n"
# ReBRAC acts without noise, so a ratio of densities needs a width.
ACTS_WITHOUT_NOISE = (dare_rebrac,)


def parsed(module, tmp_path, *argv, text=YAML):
    if module in ACTS_WITHOUT_NOISE:
        argv = (*argv, "--dare.policy_std", "0.1")
    (tmp_path / "c.yaml").write_text(text)
    return parse_config(
        module.TrainConfig, ["--config", str(tmp_path / "c.yaml"), *argv]
    )


@pytest.mark.parametrize("module", WITH_PRESETS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_fields_and_no_other(module, name, tmp_path):
    plain = dataclasses.asdict(parsed(module, tmp_path))
    config = dataclasses.asdict(parsed(module, tmp_path, "--preset", name))
    changed = {k: v for k, v in config["dare"].items() if v != plain["dare"][k]}
    assert changed == PRESETS[name].get("dare", {})
    # A preset of the baseline may have the same name.
    own = module.TrainConfig.PRESETS[name]
    assert {**config, "dare": 0} == {**plain, **own, "dare": 0}


def test_the_default_is_the_papers_setting_and_the_others_differ_from_it():
    assert list(PRESETS) == ["paper", "near", "cpu"] and PRESETS["paper"] == {}
    default = dataclasses.asdict(DareConfig())
    for name in ("near", "cpu"):
        for field, value in PRESETS[name]["dare"].items():
            assert default[field] != value and type(default[field]) is type(value)
    assert "score" not in PRESETS["near"]["dare"], "near keeps the paper's score"
    config = DareConfig(**PRESETS["cpu"]["dare"])
    assert not config.guided and config.score == "policy_ratio"


@pytest.mark.parametrize("module", WITH_PRESETS)
def test_other_flags_win_over_a_preset_and_a_preset_over_the_file(module, tmp_path):
    flags = ("--preset", "cpu", "--dare.behavior_updates", "7")
    for argv in (flags, (*flags[2:], *flags[:2])):
        dare = parsed(module, tmp_path, *argv).dare
        assert (dare.behavior_updates, dare.guidance_scale) == (7, 0.0)
        assert (dare.cap, dare.support_actions) == (3, 5)


@pytest.mark.parametrize("module", WITH_PRESETS)
def test_in_a_file_the_other_lines_win_over_its_preset(module, tmp_path):
    text = "preset: cpu\ndare:\n  behavior_updates: 9\n  cap: 3\n"
    dare = parsed(module, tmp_path, text=text).dare
    assert (dare.behavior, dare.behavior_updates, dare.cap) == ("mixture", 9, 3)
    # A flag names another one instead.
    dare = parsed(module, tmp_path, "--preset", "near", text=text).dare
    near = PRESETS["near"]["dare"]
    assert (dare.behavior, dare.score) == ("diffusion", "reference")
    assert dare.sampler_steps == near["sampler_steps"] and dare.cap == 3
    assert dare.guidance_scale == 8.0
    assert parsed(module, tmp_path, "--preset", "paper", text=text).dare.guided


def test_what_is_stored_is_what_it_set(tmp_path):
    config = parsed(dare_iql, tmp_path, "--preset", "cpu")
    text = dump_config(config)
    assert "preset" not in text and "behavior: mixture" in text
    assert parsed(dare_iql, tmp_path, text=text) == config


def test_in_the_layers_of_a_sweep_a_later_preset_replaces_an_earlier_one():
    layers = [
        ("file", {"preset": "cpu", "dare": {"cap": 3}}),
        ("sweep", {"dare": {"behavior_updates": 5}}),
    ]
    dare = make_config(dare_iql.TrainConfig, layers).dare
    assert (dare.behavior, dare.behavior_updates, dare.cap) == ("mixture", 5, 3)
    layers.append(("method", {"preset": "near"}))
    dare = make_config(dare_iql.TrainConfig, layers).dare
    near = PRESETS["near"]["dare"]
    assert (dare.behavior, dare.cap) == ("diffusion", 3)
    assert dare.behavior_updates == near["behavior_updates"]
    with pytest.raises(ConfigError, match="^method: preset must be one of paper, near"):
        make_config(dare_iql.TrainConfig, [("method", {"preset": "far"})])


@pytest.mark.parametrize("module", BASELINES)
def test_a_preset_changes_nothing_in_a_baseline(module, tmp_path, capsys):
    plain = parsed(module, tmp_path, text="seed: 3\n")
    assert parsed(module, tmp_path, text="seed: 3\npreset: cpu\n") == plain
    assert "preset cpu changes nothing" in capsys.readouterr().out
    assert parsed(module, tmp_path, "--preset", "near", text="seed: 3\n") == plain
    assert "preset near changes nothing" in capsys.readouterr().out
    assert presets_help(module.TrainConfig) == ""


@pytest.mark.parametrize("module", one_of_each_kind(WITH_PRESETS))
def test_the_help_lists_what_each_preset_changes(module, capsys):
    with pytest.raises(SystemExit):
        parse_config(module.TrainConfig, ["--help"])
    shown = capsys.readouterr().out
    for name, values in PRESETS.items():
        (line,) = [x for x in shown.splitlines() if x.startswith(f"  {name}: ")]
        for field, value in values.get("dare", {}).items():
            assert f"dare.{field} {value}" in line


def test_presets_that_fit_a_run_are_offered_to_it():
    config = dare_iql.TrainConfig()
    assert set(presets_of(config)) == {"near", "cpu"}
    assert presets_of(config)["cpu"].dare.behavior == "mixture"
    # The ratio of densities needs a policy with one.
    config = dare_iql.TrainConfig(iql_deterministic=True)
    assert set(presets_of(config)) == {"near"}
    assert presets_of(iql.TrainConfig()) == {}


# ---------------------------------------------------------------- a long run


TINY = {
    "near": {"dare": {"behavior_updates": 3, "energy_updates": 3, "sampler_steps": 2}},
    "cpu": {
        "dare": {
            "behavior": "mixture",
            "behavior_updates": 3,
            "guidance_scale": 0.0,
            "score": "policy_ratio",
        }
    },
}
SHORT = {
    "offline_iterations": 2,
    "online_iterations": 3,
    "eval_freq": 5,
    "n_episodes": 1,
    "batch_size": 16,
}


@pytest.fixture
def started(tmp_path, monkeypatch, capsys):
    """Runs a short run whose estimate counts as long; returns what it printed."""
    monkeypatch.setattr(duration, "LONG", 0.0)

    def start(module, **fields):
        monkeypatch.setattr(module.TrainConfig, "PRESETS", TINY)
        block = module.TrainConfig.__dataclass_fields__["dare"].default_factory
        dare = {
            **SMALL,
            "behavior_width": 0.05,
            "behavior_updates": 40,
            "energy_updates": 60,
            "energy_batch_states": 16,
            "support_actions": 4,
        }
        values = {**DEFAULTS.get(module, CQL_FIELDS), **SHORT, **fields}
        values.setdefault("dare", block(**dare))
        run(module, tmp_path, monkeypatch, **values)
        return capsys.readouterr().out

    return start


@pytest.mark.makes("estimate")
@pytest.mark.parametrize("module", one_of_each_kind(WITH_PRESETS))
def test_a_long_run_names_the_shorter_presets_with_their_times(module, started):
    (line,) = [x for x in started(module).splitlines() if "--preset" in x]
    assert "--preset near: about " in line and "--preset cpu: about " in line


@pytest.mark.makes("estimate")
def test_a_short_run_names_none(started, monkeypatch):
    monkeypatch.setattr(duration, "LONG", 1e9)
    assert "--preset" not in started(dare_iql)


@pytest.mark.makes("estimate")
def test_only_a_new_run_looks_at_other_presets(started, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        duration.Alternatives, "seconds", lambda *work: asked.append(work) or {}
    )
    started(dare_iql)
    assert len(asked) == 1
    started(dare_iql, online_iterations=6, resume=str(folder_of(tmp_path)))
    assert len(asked) == 1


@pytest.mark.makes("estimate")
def test_a_run_without_the_method_names_none(started):
    off = dare_iql.DareIQLConfig(enabled=False)
    assert "--preset" not in started(dare_iql, dare=off)


@pytest.mark.makes("estimate")
def test_a_preset_that_takes_longer_is_not_named(started, monkeypatch):
    slow = {"behavior_updates": 10**9, "behavior": "mixture", "guidance_scale": 0.0}
    monkeypatch.setitem(TINY, "cpu", {"dare": slow})
    (line,) = [x for x in started(dare_iql).splitlines() if "--preset" in x]
    assert "near" in line and "cpu" not in line


@pytest.mark.makes("estimate")
def test_a_preset_whose_part_cannot_be_made_here_is_not_named(started, monkeypatch):
    made = dare_opt_spot.make_hook

    def make_hook(session, trainer, replay, config):
        if config.dare.sampler_steps == TINY["near"]["dare"]["sampler_steps"]:
            raise ValueError("not on this device")
        return made(session, trainer, replay, config)

    monkeypatch.setattr(dare_opt_spot, "make_hook", make_hook)
    shown = started(dare_opt_spot, vae_iterations=3)
    (line,) = [x for x in shown.splitlines() if "--preset" in x]
    assert "cpu" in line and "near" not in line
