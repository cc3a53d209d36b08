"""Settings: YAML and flags, layers, blocks of other algorithms, errors in one line."""

import copy
import dataclasses
import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Optional  # pyrallis, which prints --help, does not know X | None

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_config import Block, Config, parse

from algorithms import (
    awac,
    baq_cal_ql,
    cal_ql,
    cfdg_iql,
    cql,
    cql_sa,
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
    famo2o_cql,
    famo2o_iql,
    iql,
    opt_spot,
    opt_td3,
    pex,
    rebrac,
    rlpd,
    spot,
    td3_bc,
    td3_bc_sa,
    wsrl,
)
from corl.config import FinetuneConfig, parse_config
from corl.layers import (
    NOTHING,
    ConfigError,
    dump_config,
    make_config,
    without_foreign_blocks,
)

ROOT = Path(__file__).parent.parent
SMALL = settings(deadline=None, derandomize=True, max_examples=60)
FAMILIES = {
    "iql": [iql, dare_iql, edis_iql, cfdg_iql],
    "pex": [pex],
    "cql": [cql, dare_cql],
    "cal_ql": [cal_ql, dare_cal_ql, edis_cal_ql, baq_cal_ql],
    "td3_bc": [td3_bc, dare_td3_bc],
    "awac": [awac, dare_awac],
    "rebrac": [rebrac, dare_rebrac],
    "spot": [spot, dare_spot],
    "td3_bc_sa": [td3_bc_sa],
    "cql_sa": [cql_sa, dare_cql_sa],
    "e2o": [e2o],
    "rlpd": [rlpd],
    "wsrl": [wsrl, dare_wsrl],
    "famo2o_iql": [famo2o_iql],
    "famo2o_cql": [famo2o_cql, dare_famo2o_cql],
    "opt": [opt_td3, opt_spot, dare_opt_spot],
}
ALL = [module for family in FAMILIES.values() for module in family]


@pytest.fixture
def refused(capsys, tmp_path):
    """Parse bad settings; returns the line they are refused with."""

    def check(*argv, text=None):
        if text is not None:
            (tmp_path / "c.yaml").write_text(text)
            argv = ["--config", tmp_path / "c.yaml", *argv]
        with pytest.raises(SystemExit) as caught:
            parse(*argv)
        shown = capsys.readouterr()
        assert caught.value.code == 2 and shown.out == ""
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
        return shown.err

    return check


@dataclass
class Derived:
    on: bool = True
    share: Optional[float] = None  # noqa: UP045

    def __post_init__(self):
        if self.on and self.share is None:
            self.share = 0.5


def test_what_a_config_derives_from_its_defaults_is_not_taken_for_given():
    assert parse_config(Derived, []) == Derived(True, 0.5)
    assert parse_config(Derived, ["--on", "false"]) == Derived(False, None)


def test_dare_off_is_the_baseline_with_its_single_buffer():
    config = parse_config(dare_iql.TrainConfig, ["--dare.enabled", "false"])
    assert config.mixing_ratio is None


def test_later_layers_win_field_by_field_and_errors_name_the_layer():
    first, second = ("file", {"seed": 1, "dare": {"cap": 3, "on": False}}), {"cap": 4}
    config = make_config(Config, [first, ("sweep", {"dare": second})])
    assert config == Config(seed=1, dare=Block(4, 1.0, False))
    with pytest.raises(ConfigError, match="^sweep: unknown field dare.capp; did"):
        make_config(Config, [first, ("sweep", {"dare": {"capp": 4}})])


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\nlr: 0.1\ndare:\n  cap: 7\n  scale: 2\n")
    for flag in ("--config", "--config_path"):
        config = parse(flag, file, "--seed", 5, "--dare.cap=9")
        assert (config.seed, config.lr, config.dare) == (5, 0.1, Block(9, 2.0))
        assert config.env == "hopper-medium-v2"


@pytest.mark.parametrize(
    "text, words",
    [
        ("sede: 1", ["c.yaml", "unknown field sede", "did you mean seed?"]),
        ("dare:\n  capp: 1", ["c.yaml", "dare.capp", "did you mean dare.cap?"]),
        ("zzzzzz: 1", ["c.yaml", "unknown field zzzzzz\n"]),
        ("1: 2", ["c.yaml", "unknown field 1"]),
        ("seed: soon", ["c.yaml", "seed must be int", "'soon'"]),
        ("seed: 1.5", ["seed must be int", "1.5"]),
        ("seed: true", ["seed must be int", "True"]),
        ("seed: .inf", ["seed must be int", "inf"]),
        ("seed: .nan", ["seed must be int", "nan"]),
        ("seed:", ["seed must be int", "None"]),
        ("seed: [1]", ["seed must be int", "[1]"]),
        ("lr: true", ["lr must be float"]),
        ("lr: .nan", ["lr must be float", "nan"]),
        ("lr: small", ["lr must be float", "'small'"]),
        ("compat: 1", ["compat must be bool", "1"]),
        ("compat: 'true'", ["compat must be bool"]),
        ("name: yes", ["name must be str", "True"]),
        ("name: {a: 1}", ["name must be str"]),
        ("dare: 3", ["dare must be a block of fields"]),
        ("dare:\n  cap: x", ["dare.cap must be int", "'x'"]),
        ("dare:\n  scale: -1", ["dare.scale must not be negative, not -1.0"]),
        ("- 1", ["c.yaml", "field: value"]),
        ("a: [", ["c.yaml", "not readable YAML"]),
        ("a: b: c", ["c.yaml", "not readable YAML"]),
        ("resume: runs/x", ["c.yaml", "resume is a flag"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_the_field(refused, text, words):
    line = refused(text=text)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--sede", "1"], ["command line", "did you mean seed?"]),
        (["--dare.capp", "1"], ["did you mean dare.cap?"]),
        (["--seed", "true"], ["seed must be int", "true"]),
        (["--seed", "1.5"], ["seed must be int"]),
        (["--seed", ".inf"], ["seed must be int"]),
        (["--lr", "nan"], ["lr must be float"]),
        (["--compat", "1"], ["compat must be bool"]),
        (["--compat", "--seed", "3"], ["--compat needs a value"]),
        (["--seed"], ["--seed needs a value"]),
        (["seed", "1"], ["cannot read 'seed'"]),
        (["-seed", "1"], ["cannot read '-seed'"]),
        (["--seed.x", "1"], ["seed must be int"]),
        (["--dare", "3"], ["dare must be a block"]),
        (["--dare.scale", "-1"], ["dare.scale must not be negative"]),
        (["--config", "no/such.yaml"], ["no/such.yaml does not exist"]),
        (["--config", str(ROOT)], ["does not exist"]),
        (["--resume", "no/such"], ["no/such", "no config.yaml"]),
        (["--resume", "r", "--seed", "1"], ["leave out seed", "online_iterations"]),
        (["--resume", "r", "--config", "f.yaml"], ["leave out f.yaml"]),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(refused, argv, words):
    line = refused(*argv)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("text", ["dare:\n", "dare: {scale: 2.0}\n", "seed: 1\n"])
def test_a_nested_flag_joins_whatever_block_the_file_has(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert parse("--config", tmp_path / "c.yaml", "--dare.cap", 3).dare.cap == 3


def test_binary_files_are_refused_in_one_line(refused, tmp_path):
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00seed")
    assert "not readable YAML" in refused("--config", tmp_path / "b.yaml")


def test_flags_are_read_by_the_fields_type(tmp_path):
    for value in ("yes", "007", "a: b: c", "[", "#1", "2024-01-01", "null", "1e3"):
        assert parse("--name", value).name == value
    for value in ("true", "True", "yes", "on"):
        assert parse("--compat", value).compat is True
    assert parse("--dare.on", "no").dare.on is False
    for value in ("none", "null", "~", ""):
        assert parse("--dare.cap", value).dare.cap is None
        assert parse("--dataset_path", value).dataset_path is None
    assert parse("--seed", "1e6").seed == 1_000_000
    assert parse("--seed=-3").seed == parse("--seed", "-3").seed == -3
    assert parse("--seed", str(2**60 + 1)).seed == 2**60 + 1
    assert parse("--lr", "3e-4").lr == 3e-4
    assert parse("--lr", ".inf").lr == parse("--lr", "inf").lr == float("inf")


def test_yaml_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 3e-4\nseed: 1e3\ndare:\n  scale: 2\n")
    config = parse("--config", tmp_path / "c.yaml")
    assert (config.lr, config.seed, config.dare.scale) == (3e-4, 1000, 2.0)
    assert type(config.seed) is int and type(config.dare.scale) is float


def test_blocks_of_another_algorithm_are_left_out_aloud(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("seed: 1\ncql:\n  alpha: 5\n")
    assert parse("--config", tmp_path / "c.yaml").seed == 1
    shown = capsys.readouterr().out
    assert "c.yaml: block 'cql' is not for this algorithm" in shown


@pytest.mark.parametrize("text", ["drae:\n  cap: 3\n", "Dare:\n  cap: 3\n"])
def test_a_block_whose_name_is_nearly_a_known_one_is_a_slip(refused, text):
    line = refused(text=text)
    assert "unknown field" in line and "did you mean dare?" in line


def test_only_blocks_may_be_foreign_and_only_in_a_file(refused):
    assert "unknown field cql" in refused(text="cql: 5\n")
    assert "unknown field cql" in refused(text="cql: [5]\n")
    assert "unknown field cql" in refused("--cql.alpha", "5")


def test_foreign_blocks_go_and_everything_else_stays(capsys):
    values = {"seed": 1, "spot": {"a": 1}, "dare": {"cap": 3}, "name": {"a": 1}}
    before = copy.deepcopy(values)
    kept = without_foreign_blocks(Config, values, "file.yaml")
    assert kept == {"seed": 1, "dare": {"cap": 3}, "name": {"a": 1}}
    assert values == before  # a copy
    said = capsys.readouterr().out
    assert said == "file.yaml: block 'spot' is not for this algorithm and left out\n"


@pytest.mark.parametrize("family, methods", FAMILIES.items())
def test_a_family_shares_its_yaml_files(family, methods, capsys):
    """The file of a method with its own block also runs the baseline, and says what it leaves."""
    for file in sorted((ROOT / "configs" / family).glob("*.yaml")):
        values = yaml.safe_load(file.read_text())
        for module in methods:
            config = parse_config(module.TrainConfig, ["--config", str(file)])
            assert config.env == values["env"] and config.n_episodes > 0
            left_out = "dare" in values and not hasattr(config, "dare")
            assert ("block 'dare'" in capsys.readouterr().out) is left_out


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_every_field_with_its_comment(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--seed", "1", flag)
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for words in ("--config FILE", "--seed", "seeds everything", "--dare.cap"):
        assert words in shown


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=9)
FIELDS = st.fixed_dictionaries(
    {
        "env": st.one_of(TEXT, st.sampled_from(["yes", "null", "1e3", "~", "0x1", "="])),
        "seed": st.integers(),
        "lr": st.floats(allow_nan=False),
        "compat": st.booleans(),
        # What stands for no value, quoted or not, is none.
        "dataset_path": st.none()
        | TEXT.filter(lambda t: t.strip().lower() not in NOTHING),
        "dare": st.builds(
            Block,
            st.none() | st.integers(),
            st.floats(min_value=0, allow_nan=False),
            st.booleans(),
        ),
    }
)


@SMALL
@given(FIELDS)
def test_a_dumped_config_is_complete_and_reads_back_equal(tmp_path_factory, values):
    config = Config(**values)
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert parse("--config", file) == config
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert list(written) == sorted(f.name for f in dataclasses.fields(Config))


# ---------------------------------------------------------------- layers


def test_layers_are_left_as_they_are_and_a_block_may_be_empty():
    first, second = {"dare": {"cap": 3}}, {"dare": {"scale": 2.0}, "seed": 5}
    before = copy.deepcopy((first, second))
    layers = [("one", first), ("two", second), ("three", {"dare": None})]
    assert make_config(Config, layers) == Config(seed=5, dare=Block(3, 2.0, True))
    assert (first, second) == before
    assert make_config(Config, []) == Config()


def test_an_impossible_combination_of_layers_is_refused_by_the_config_itself():
    layers = [("file", {"batch_size": 255}), ("sweep", {"mixing_ratio": 0.5})]
    with pytest.raises(ValueError, match="batch_size 255 cannot be split"):
        make_config(iql.TrainConfig, layers)
    with pytest.raises(ValueError, match="dare.cap must lie in"):
        make_config(dare_iql.TrainConfig, [("sweep", {"dare": {"cap": -1}})])
    config = make_config(dare_iql.TrainConfig, [("sweep", {"dare": {"policy": "awr"}})])
    assert isinstance(config.dare, dare_iql.DareIQLConfig)
    assert config.dare.policy == "awr" and config.mixing_ratio == 0.5


# ---------------------------------------------------------------- what a field is for


@pytest.mark.parametrize("module", ALL)
@pytest.mark.parametrize("name", ["ONLINE", "BOOKKEEPING", "RESUMABLE"])
def test_the_sets_beside_the_fields_name_fields(module, name):
    fields = {field.name for field in dataclasses.fields(module.TrainConfig)}
    named = getattr(module.TrainConfig, name)
    assert named <= fields, sorted(named - fields)
    assert getattr(FinetuneConfig, name) <= named  # an algorithm adds to the common ones


@pytest.mark.parametrize("module", ALL)
def test_no_field_is_both_of_the_online_phase_and_without_effect(module):
    config = module.TrainConfig
    assert not config.ONLINE & config.BOOKKEEPING
    assert config.BOOKKEEPING.isdisjoint({"seed", "env", "batch_size", "compat"})
    quick = ROOT / config.QUICK_START
    assert quick.is_file()
    assert parse_config(config, ["--config", str(quick)]).offline_iterations < 100_000


IQL_ARGUMENTS = {"iql_tau": 0.9, "beta": 5.0, "discount": 0.5, "tau": 0.1}
CQL_ARGUMENTS = {
    "discount": 0.5,
    "alpha_multiplier": 0.25,
    "use_automatic_entropy_tuning": False,
    "backup_entropy": True,
    "policy_lr": 0.1,
    "qf_lr": 0.2,
    "soft_target_update_rate": 0.3,
    "bc_steps": 4,
    "target_update_period": 3,
    "cql_n_actions": 2,
    "cql_importance_sample": False,
    "cql_lagrange": True,
    "cql_target_action_gap": 0.7,
    "cql_temp": 0.4,
    "cql_alpha": 0.9,
    "cql_max_target_backup": True,
    "cql_clip_diff_min": -5.0,
    "cql_clip_diff_max": 6.0,
    "compat": True,
}


TD3_ARGUMENTS = {
    "discount": 0.5,
    "tau": 0.1,
    "policy_noise": 0.3,
    "noise_clip": 0.6,
    "policy_freq": 3,
    "alpha": 1.5,
}
SA_ARGUMENTS = {"trust_penalty": False, "n_period": 7}
REBRAC_ARGUMENTS = {
    **{k: v for k, v in TD3_ARGUMENTS.items() if k != "alpha"},
    "actor_bc_coef": 0.1,
    "critic_bc_coef": 0.2,
    "normalize_q": False,
}
SPOT_ARGUMENTS = {
    **{k: v for k, v in TD3_ARGUMENTS.items() if k != "alpha"},
    "beta": 0.7,
    "lambd": 0.3,
    "num_samples": 2,
    "iwae": True,
}
TD3_BC_SA_ARGUMENTS = {
    **{k: v for k, v in TD3_ARGUMENTS.items() if k != "alpha"},
    **SA_ARGUMENTS,
    "delta": 0.3,
}
OPT_ARGUMENTS = {"inner_lr": 0.2, "weigh_outer": False}
OPT_SPOT_ARGUMENTS = {
    **{k: v for k, v in SPOT_ARGUMENTS.items() if k not in ("num_samples", "iwae")},
    **OPT_ARGUMENTS,
}
NOT_IN_SA = ("bc_steps", "compat", "cql_alpha")
CQL_SA_ARGUMENTS = {
    **{k: v for k, v in CQL_ARGUMENTS.items() if k not in NOT_IN_SA},
    **SA_ARGUMENTS,
    "actor_bc_weight": 0.4,
    "threshold_cap": 0.2,
}
E2O_ARGUMENTS = {
    "discount": 0.5,
    "soft_target_update_rate": 0.1,
    "cql_alpha": 2.0,
    "cql_alpha_online": 3.0,
    "cql_n_actions": 4,
    "target_rule": "min",
    "uncertainty_temperature": 2.0,
    "uncertainty_by": "row",
    "exploration": "policy",
    "ucb_lambda": 1.0,
}
SAC_ARGUMENTS = {
    "n_target_critics": 3,
    "discount": 0.5,
    "tau": 0.1,
    "utd": 7,
}
RLPD_ARGUMENTS = {**SAC_ARGUMENTS, "backup_entropy": False}
WSRL_ARGUMENTS = {
    **SAC_ARGUMENTS,
    "n_penalty_critics": 3,
    "base": "cal_ql",
    "cql_alpha": 2.0,
    "cql_alpha_online": 2.0,
    "cql_n_actions": 3,
    "cql_lagrange": True,
    "cql_target_action_gap": 0.3,
    "cql_max_target_backup": False,
    "max_target_backup_online": True,
    "zero_gradient_steps": True,
}
FAMO2O_IQL_ARGUMENTS = {
    **{k: v for k, v in IQL_ARGUMENTS.items() if k != "beta"},
    **{"balance_period": 4, "target_entropy": -0.7, "weights_of": "batch"},
}
IN_FAMCQL = ("discount", "alpha_multiplier", "policy_lr", "soft_target_update_rate")
IN_FAMCQL += ("cql_n_actions", "cql_alpha")
FAMO2O_CQL_ARGUMENTS = {
    **{k: CQL_ARGUMENTS[k] for k in IN_FAMCQL},
    "next_beta": "before",
}
ARGUMENTS = {
    e2o: E2O_ARGUMENTS,
    rlpd: RLPD_ARGUMENTS,
    **dict.fromkeys(FAMILIES["wsrl"], WSRL_ARGUMENTS),
    famo2o_iql: FAMO2O_IQL_ARGUMENTS,
    **dict.fromkeys(FAMILIES["famo2o_cql"], FAMO2O_CQL_ARGUMENTS),
    **dict.fromkeys(FAMILIES["td3_bc_sa"], TD3_BC_SA_ARGUMENTS),
    **dict.fromkeys(FAMILIES["cql_sa"], CQL_SA_ARGUMENTS),
    opt_td3: {**TD3_ARGUMENTS, **OPT_ARGUMENTS},
    **dict.fromkeys([opt_spot, dare_opt_spot], OPT_SPOT_ARGUMENTS),
    **dict.fromkeys(FAMILIES["rebrac"], REBRAC_ARGUMENTS),
    **dict.fromkeys(FAMILIES["spot"], SPOT_ARGUMENTS),
    **dict.fromkeys(FAMILIES["td3_bc"], TD3_ARGUMENTS),
    **dict.fromkeys(FAMILIES["awac"], {"discount": 0.5, "tau": 0.1, "awac_lambda": 0.2}),
    **dict.fromkeys([*FAMILIES["iql"], pex], IQL_ARGUMENTS),
}


@pytest.mark.parametrize("module", ALL)
def test_the_algorithm_gets_the_fields_that_its_constructor_names(module):
    expected = ARGUMENTS.get(module, CQL_ARGUMENTS)
    default = module.TrainConfig()
    assert all(getattr(default, k) != v for k, v in expected.items())
    config = module.TrainConfig(**expected)
    trainer = module.make_trainer(config, 3, 2, 1.0, "cpu")
    assert {k: getattr(trainer, k) for k in expected} == expected


CQL_RATES = {"qf_lr": 0.1, "policy_lr": 0.3}, [0.1, 0.1, 0.3, 0.3, 0.1]
IQL_RATES = {"qf_lr": 0.1, "vf_lr": 0.2, "actor_lr": 0.3}, [0.1, 0.2, 0.3]
TD3_RATES = {"qf_lr": 0.1, "actor_lr": 0.3}, [0.1, 0.1, 0.3]
SA = {"beta_lr": 0.4}
TD3_BC_SA_RATES = {**TD3_RATES[0], **SA}, [*TD3_RATES[1], 0.4]
CQL_SA_RATES = {**CQL_RATES[0], **SA}, [*CQL_RATES[1], 0.4]
SAC_RATES = {"qf_lr": 0.1, "actor_lr": 0.3, "temperature_lr": 0.2}
NOISY = ("td3_bc", "rebrac", "spot")
RATES = {
    e2o: ({"qf_lr": 0.1, "policy_lr": 0.3, "temperature_lr": 0.2}, [0.1, 0.3, 0.2]),
    rlpd: (SAC_RATES, [0.1, 0.3, 0.2]),
    **dict.fromkeys(
        FAMILIES["wsrl"], ({**SAC_RATES, "multiplier_lr": 0.4}, [0.1, 0.3, 0.2, 0.4])
    ),
    **dict.fromkeys(FAMILIES["td3_bc_sa"], TD3_BC_SA_RATES),
    **dict.fromkeys(FAMILIES["cql_sa"], CQL_SA_RATES),
    **dict.fromkeys(FAMILIES["iql"], IQL_RATES),
    pex: (IQL_RATES[0], [*IQL_RATES[1], 0.3]),
    famo2o_iql: (
        {**IQL_RATES[0], "balance_lr": 0.4, "eta_lr": 0.5},
        [*IQL_RATES[1], 0.4, 0.5],
    ),
    **dict.fromkeys(
        FAMILIES["famo2o_cql"],
        ({**CQL_RATES[0], "balance_lr": 0.4}, [*CQL_RATES[1][:4], 0.4]),
    ),
    **dict.fromkeys(FAMILIES["opt"], (TD3_RATES[0], [*TD3_RATES[1], 0.1])),
    **dict.fromkeys([m for name in NOISY for m in FAMILIES[name]], TD3_RATES),
    **dict.fromkeys(FAMILIES["awac"], ({"learning_rate": 0.2}, [0.2, 0.2, 0.2])),
}


@pytest.mark.parametrize("module", ALL)
def test_every_optimizer_has_its_own_learning_rate(module):
    expected, rates = RATES.get(module, CQL_RATES)
    config = module.TrainConfig(**expected, offline_iterations=77)
    trainer = module.make_trainer(config, 3, 2, 1.0, "cpu")
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers()] == rates
    if module in [*FAMILIES["iql"], pex]:
        assert trainer.actor_lr_schedule.T_max == 77


# ---------------------------------------------------------------- other spellings of fields

# A twin has those of its baseline.
SPELLINGS = [
    (m, alias)
    for m in ALL
    if not hasattr(m, "BASELINE")
    for alias in m.TrainConfig.ALIASES
]


@pytest.mark.parametrize("module, alias", SPELLINGS)
def test_another_spelling_is_read_and_the_field_is_stored(module, alias, tmp_path):
    name = module.TrainConfig.ALIASES[alias]
    default = getattr(module.TrainConfig(), name)
    value = {str: "hopper-medium-v2", int: 7}.get(type(default))
    if value is None:
        value = not default if isinstance(default, bool) else default / 2
    choices = module.TrainConfig.CHOICES.get(name, ())
    value = next((choice for choice in choices if choice != default), value)
    file = tmp_path / "c.yaml"
    file.write_text(f"{alias}: {value}\n")
    ways = [["--config", str(file)], [f"--{alias}", str(value)]]
    # A flag wins over the file, however each of them spells the field.
    ways += [["--config", str(file), f"--{name}={value}"]]
    file.with_name("d.yaml").write_text(f"{name}: {default}\n")
    ways += [["--config", str(file.with_name("d.yaml")), f"--{alias}={value}"]]
    configs = [parse_config(module.TrainConfig, way) for way in ways]
    configs.append(make_config(module.TrainConfig, [("sweep", {alias: value})]))
    for config in configs:
        assert getattr(config, name) == value != default
        written = yaml.safe_load(dump_config(config))
        assert written[name] == value and alias not in written


@pytest.mark.parametrize("module, alias", SPELLINGS)
def test_a_field_under_both_of_its_names_is_refused(module, alias, tmp_path, capsys):
    name = module.TrainConfig.ALIASES[alias]
    value = getattr(module.TrainConfig(), name)
    file = tmp_path / "c.yaml"
    file.write_text(f"{alias}: {value}\n{name}: {value}\n")
    flags = [f"--{name}", str(value), f"--{alias}", str(value)]
    for argv in (["--config", str(file)], flags):
        with pytest.raises(SystemExit):
            parse_config(module.TrainConfig, argv)
        line = capsys.readouterr().err
        assert f"{alias} and {name}" in line or f"{name} and {alias}" in line
        assert line.startswith("error: ") and line.count("\n") == 1
        assert (str(file) if argv[0] == "--config" else "command line") in line
    with pytest.raises(ConfigError, match="^sweep: .* are the same field"):
        make_config(module.TrainConfig, [("sweep", {alias: value, name: value})])


@pytest.mark.parametrize("module", ALL)
def test_an_alias_is_no_field_and_means_one(module, capsys, monkeypatch):
    # pyrallis parses the class anew for each of its fields, which takes seconds.
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    fields = {field.name for field in dataclasses.fields(module.TrainConfig)}
    aliases = module.TrainConfig.ALIASES
    assert not fields & aliases.keys() and set(aliases.values()) <= fields
    with pytest.raises(SystemExit):
        parse_config(module.TrainConfig, ["--help"])
    shown = capsys.readouterr().out
    assert all(
        f"--{a} is another spelling of --{n}" in shown for a, n in aliases.items()
    )
