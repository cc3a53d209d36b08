"""A value that cannot be meant ends in one line that names field and value, before any work.

What is bad is said here, by what a field is, and not read from the tables of ranges.
"""

import dataclasses
import os
import typing
from pathlib import Path

import harness
import pytest
import yaml

import corl.ranges
import corl_dare.ranges
from algorithms import (
    baq_cal_ql,
    cal_ql,
    cfdg_iql,
    cql,
    dare_cal_ql,
    dare_iql,
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
    rlpd,
    wsrl,
)
from corl import machine
from corl.config import FinetuneConfig, parse_config
from corl.data import sources
from corl_dare.config import DareConfig

pytestmark = pytest.mark.fault("bad inputs")

IQL, CQL = (iql, dare_iql), (cql, cal_ql, dare_cal_ql)
DARE, MIXED = (dare_iql, dare_cal_ql), (cal_ql, dare_cal_ql)
EDIS = (edis_iql, edis_cal_ql)
FAMO2O = (famo2o_iql, famo2o_cql)
OPT = (opt_td3, opt_spot)
ALL = (*IQL, *CQL)
NO_INT = ["1.5", "nan", "inf", "-inf", "soon", "", "true", "0x10", "٣", "[1]", "1e400"]
NO_FLOAT = ["nan", "low", "", "true", "0x1p-3", "٠.٥", "0,5", "1e-3e", "[0.5]", "--1"]
# What a field is -> what it cannot be; the algorithms and the fields that are that.
COUNT = ["0", "-1", "-5", "1e12", str(10**15), str(10**30), "1" + 400 * "0", *NO_INT]
STEPS = ["-1", "-1000", "1e12", str(10**30), *NO_INT]
SEED = ["-1", "-7", str(2**32), str(10**20), *NO_INT]
RATE = ["0", "-1", "-1e-4", "inf", "-inf", "1e39", "1e-60", *NO_FLOAT]
SHARE = ["-0.1", "2", "1.0001", "inf", "-inf", "1e300", *NO_FLOAT]
POSITIVE = ["0", "-1", "-0.5", "inf", "1e200", "1e-70", *NO_FLOAT]
NOT_NEGATIVE = ["-1", "-0.001", "inf", "-inf", "1e39", *NO_FLOAT]
FINITE = ["inf", "-inf", "1e39", "-1e300", *NO_FLOAT]
NO_SWITCH = ["1", "0", "maybe", "", "y", "truee", "2", "none"]
FIELDS = [
    (ALL, "seed eval_seed", SEED),
    (ALL, "eval_freq n_episodes buffer_size batch_size utd log_freq threads", COUNT),
    (ALL, "offline_iterations online_iterations online_warmup", STEPS),
    (ALL, "dataset_rows", ["0", "1", "-3", str(10**13), "1.5", "nan", "many"]),
    (ALL, "discount", SHARE),
    (ALL, "normalize normalize_reward compat compile", NO_SWITCH),
    (
        ALL,
        "env",
        ["hopper", "", "hopper-medium-v9", "Hopper-medium-v2", "pen", "🤖", "-"],
    ),
    (ALL, "wandb_mode", ["on", "", "Online", "none"]),
    (ALL, "dataset_source", ["D4RL", "", "web", "none"]),
    (ALL, "env_backend", ["gym", "", "none"]),
    (ALL, "device", ["gpu", "", "cuda:x", "cpu:0", "none"]),
    (IQL, "vf_lr qf_lr actor_lr actor_lr_online", [v for v in RATE if v]),
    (IQL, "tau", ["0", *SHARE]),
    (IQL, "iql_tau", ["0", "1", "1e-60", "0.9999999999", *SHARE]),
    (IQL, "actor_dropout", ["1", *SHARE]),
    (IQL, "beta expl_noise noise_clip", NOT_NEGATIVE),
    (IQL, "iql_deterministic", NO_SWITCH),
    (IQL, "mixing_ratio", ["1", "0.3", *[v for v in SHARE if v]]),
    # What DARE compares offline rows with.
    (DARE, "mixing_ratio", ["0"]),
    (CQL, "policy_lr qf_lr", RATE),
    (CQL, "soft_target_update_rate", ["0", *SHARE]),
    (CQL, "alpha_multiplier cql_alpha cql_alpha_online", NOT_NEGATIVE),
    (CQL, "target_update_period cql_n_actions q_n_hidden_layers", COUNT),
    (CQL, "bc_steps", STEPS),
    (CQL, "cql_temp reward_scale", POSITIVE),
    (CQL, "cql_target_action_gap reward_bias", FINITE),
    (CQL, "cql_clip_diff_min", ["inf", *NO_FLOAT]),
    (CQL, "cql_clip_diff_max", ["-inf", *NO_FLOAT]),
    (CQL, "cql_lagrange cql_max_target_backup backup_entropy", NO_SWITCH),
    (MIXED, "mixing_ratio", ["1", "0.3", *SHARE]),
    (EDIS, "mixing_ratio", ["1", "2", "-0.1"]),
    (EDIS, "edis.samples edis.width edis.negatives edis.refresh_every", COUNT[:4]),
    (EDIS, "edis.diffusion_lr edis.energy_lr", RATE[:4]),
    (EDIS, "edis.state_scale edis.action_scale", NOT_NEGATIVE[:4]),
    (EDIS, "edis.energies edis.guidance edis.schedule", ["best", "", "none"]),
    ((cfdg_iql,), "mixing_ratio", ["1", "2", "-0.1"]),
    ((cfdg_iql,), "cfdg.samples cfdg.width cfdg.refresh_updates", COUNT[:4]),
    ((cfdg_iql,), "cfdg.synthetic_ratio cfdg.offline_share", SHARE[:4]),
    ((cfdg_iql,), "cfdg.online_rows", ["0", "1", *SHARE[:3]]),
    ((cfdg_iql,), "cfdg.guidance", NOT_NEGATIVE[:4]),
    ((cfdg_iql,), "cfdg.label_dropout", ["1", *SHARE[:3]]),
    ((cfdg_iql,), "cfdg.models", ["best", "", "none"]),
    (DARE, "dare.references dare.sampler_steps dare.support_actions", COUNT),
    (DARE, "dare.behavior_batch_size dare.energy_batch_states", COUNT),
    (DARE, "dare.behavior_updates dare.energy_update_freq", COUNT),
    (DARE, "dare.reference_max_age dare.energy_updates", STEPS),
    (DARE, "dare.cap", [v for v in STEPS if v]),
    (DARE, "dare.behavior_lr dare.energy_lr", RATE),
    (DARE, "dare.alignment_sigma dare.energy_beta dare.behavior_width", POSITIVE),
    (DARE, "dare.guidance_scale", NOT_NEGATIVE),
    (DARE, "dare.score dare.rule dare.weights dare.behavior", ["best", "", "none", "3"]),
    (DARE, "dare.alignment dare.q_scale", ["best", "", "none"]),
    (DARE, "dare.enabled dare.skip_inverted", NO_SWITCH),
    ((dare_iql,), "dare.entropy_alpha", NOT_NEGATIVE),
    ((dare_iql,), "dare.backup_actions", COUNT),
    ((dare_iql,), "dare.policy dare.value", ["best", "", "none"]),
    ((dare_cal_ql,), "dare.keep_calibration", NO_SWITCH),
    (OPT, "pretrain_updates", STEPS),
    (OPT, "inner_lr density_lr", RATE),
    (OPT, "kappa_start kappa_end", SHARE),
    (OPT, "kappa_steps", COUNT),
    (OPT, "priority_capacity", [v for v in COUNT if v]),
    (OPT, "density_temperature", POSITIVE),
    (OPT, "weigh_outer", NO_SWITCH),
    (OPT, "replay", ["best", "", "none"]),
    ((pex,), "inv_temperature", NOT_NEGATIVE),
    ((pex,), "eval_epsilon", SHARE),
    ((pex,), "mixing_ratio", ["0", "1", "0.3", "none", *SHARE]),
    ((pex,), "clip_actions", NO_SWITCH),
    ((e2o,), "env", ["antmaze-umaze-v2"]),
    ((e2o,), "n_critics", ["1", *COUNT]),
    ((e2o,), "target_rule uncertainty_by exploration", ["best", "", "none"]),
    ((e2o,), "uncertainty_temperature ucb_lambda cql_alpha_online", NOT_NEGATIVE),
    ((e2o,), "temperature_lr", RATE),
    ((e2o, baq_cal_ql), "sampling", ["best", "none"]),
    ((baq_cal_ql,), "baq.median_weight", ["0", "1", *SHARE]),
    ((baq_cal_ql,), "baq.clone_updates baq.clone_batch_size", COUNT[:4]),
    ((baq_cal_ql,), "baq.floor", ["0", *SHARE[:4]]),
    ((baq_cal_ql,), "baq.enabled baq.weigh baq.prioritize", NO_SWITCH),
    ((rlpd, wsrl), "actor_lr temperature_lr", RATE[:4]),
    ((rlpd, wsrl), "n_critics n_target_critics hidden_dim", COUNT[:4]),
    ((rlpd, wsrl), "mixing_ratio", ["1", "0.3", *SHARE[:3]]),
    ((rlpd,), "mixing_ratio", ["none"]),
    ((dare_wsrl,), "mixing_ratio cql_alpha_online", ["0"]),
    ((rlpd,), "random_steps", STEPS[:4]),
    ((rlpd,), "n_target_critics", ["11"]),
    ((wsrl,), "base", ["best", "", "none", "iql"]),
    ((wsrl,), "model_of", ["best", "", "none", "iql"]),
    ((wsrl,), "log_std_min", ["0.1", "-inf", *NO_FLOAT[:2]]),
    ((wsrl,), "log_std_max", ["-0.1", "inf", *NO_FLOAT[:2]]),
    ((wsrl,), "last_hidden_gain", ["0", "-1", "inf"]),
    ((wsrl,), "cql_alpha_online multiplier_lr", NOT_NEGATIVE[:3]),
    (FAMO2O, "beta_low beta_high", NOT_NEGATIVE[:4]),
    (FAMO2O, "encoding_base", ["0", "0.5", "inf", *NO_FLOAT]),
    (FAMO2O, "encoding_pairs", COUNT[:4]),
    (FAMO2O, "balance_lr", RATE[:4]),
    (FAMO2O, "mixing_ratio", ["1", "0.3", "2"]),
    ((famo2o_iql,), "balance_period", COUNT[:4]),
    ((famo2o_iql,), "eta_init eta_lr", RATE[:4]),
    ((famo2o_iql,), "target_entropy", FINITE[:4]),
    ((famo2o_iql,), "weights_of", ["best", "", "none"]),
    ((famo2o_cql,), "balance_range next_beta", ["best", "", "none"]),
]
INSTANCES = [
    (module, field, value)
    for modules, fields, values in FIELDS
    for module in modules
    for field in fields.split()
    for value in values
]


def names(instance):
    module, field, value = instance
    text = "".join(c if c.isascii() and c.isprintable() else "?" for c in value[:12])
    return f"{module.__name__.split('.')[-1]}-{field}-{text}"


def refused(module, tmp_path, good, *flags):
    flags = [*harness.short_run(tmp_path, good), *flags]
    outcome = harness.run(harness.algorithm(module), *flags)
    assert not (tmp_path / "runs").exists()
    return outcome


# Every seventh is enough for a look; seven has no factor in common with the five algorithms.
@pytest.mark.parametrize(
    "instance",
    [
        pytest.param(i, id=names(i), marks=[pytest.mark.whole] if n % 7 else [])
        for n, i in enumerate(INSTANCES)
    ],
)
def test_a_bad_flag_is_refused_by_name(instance, good, tmp_path):
    module, field, value = instance
    outcome = refused(module, tmp_path, good, f"--{field}={value}")
    harness.assert_refused(outcome, rf"\b{field}\b")


@pytest.mark.parametrize(
    "field, value",
    [
        *[("seed", v) for v in (-1, 1.5, None, True, [1], {"a": 1}, "x", 10**30)],
        *[("batch_size", v) for v in (0, -8, 2.5, "many", [8], float("nan"))],
        *[("discount", v) for v in (2, -1, "high", None, [0.9], float("inf"))],
        *[("qf_lr", v) for v in (0, -1e-3, 1e39, 1e-60, "fast", False)],
        *[("normalize", v) for v in (1, "true", None, [True])],
        *[("dare", v) for v in (3, "mixture", [1], True)],
        *[("env", v) for v in (3, None, ["hopper-medium-v2"], "hopper")],
    ],
)
def test_a_bad_value_in_a_file_is_refused_with_file_and_field(
    field, value, good, tmp_path
):
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({field: value}))
    outcome = harness.run(
        harness.algorithm(dare_iql),
        *("--config", file, "--dataset_path", good, "--runs_dir", tmp_path / "runs"),
    )
    harness.assert_refused(outcome, rf"\b{field}\b")
    if field != "env":
        harness.assert_refused(outcome, "settings.yaml")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("module", ALL)
@pytest.mark.parametrize(
    "fields, says",
    [
        (
            {"buffer_size": 10**10},
            "buffer_size 10000000000 needs .* GB.* set buffer_size",
        ),
        ({"batch_size": 10**8}, "batch_size 100000000 needs .* GB.* set batch_size"),
        ({"buffer_size": 900}, "buffer_size 900 .*set .*at least"),
        ({"dataset_path": "no/such.hdf5"}, "no/such.hdf5"),
        ({"dataset_path": "~nobody_here/x.hdf5"}, "~nobody_here/x.hdf5"),
        ({"load_model": "no/such.pt"}, "no/such.pt does not exist"),
        ({"name": "a\nb"}, "name must be a line"),
        ({"name": "x" * 5000}, "name must be a line of at most 1000"),
        ({"dataset_path": "a\0b"}, "dataset_path must be a line"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(module, fields, says, good, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda device="cpu": 16 * 10**9)
    flags = harness.short_run(tmp_path, good, **fields)
    outcome = harness.run(harness.algorithm(module), *flags)
    harness.assert_refused(outcome, says)


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--no-such", "1"], "--no-such"),
        (["--no_such", "1"], "unknown field no_such"),
        (["-seed", "1"], "'-seed'.*--field value"),
        (["seed", "1"], "'seed'.*--field value"),
        (["run"], "'run'.*--field value"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--env", "x"], "--seed needs a value"),
        (["--", "1"], "'--'"),
        (["--=1"], "'--=1'"),
        (["--seed.x", "1"], "seed"),
        (["--seed", "1", "--seed.x", "1"], "seed is set to '1'"),
        (["--dare", "3"], "dare must be a block"),
        (["--dare", "3", "--dare.cap", "1"], "dare is set to '3'"),
        (["--dare.nosuch", "3"], "unknown field dare.nosuch"),
        (["--dare.capp", "3"], "did you mean dare.cap"),
        (["--dare.cap.x", "3"], "dare.cap"),
        (["--config="], "--config needs a value"),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--config", "/"], "config file / "),
        (["--resume="], "--resume needs a value"),
        (["--resume", "nowhere"], "nowhere.*no config.yaml"),
        (["--seed", "'5'"], "seed must be int"),
        (["--seed", '"5"'], "seed must be int"),
        (["--seed", "5 6"], "seed must be int, not '5 6'"),
        (["--seed", "9" * 5000], "seed must be int.*5002 characters"),
        (["--" + "x" * 5000, "1"], "unknown field xxx"),
        (
            ["--dataset_source", "file", "--threads", "1", "--compile", "false"],
            "dataset_source 'file' needs dataset_path",
        ),
        (["--max_timesteps", "5"], "max_timesteps.*set offline_iterations"),
        (["--gamma", "0.9"], "gamma.*set discount"),
        (["--policy_freq", "2"], "policy_freq.*another algorithm"),
        (["--env", "hoper-medium-v2"], "env: unknown task.*mean hopper-medium-v2"),
        (["--env", "hopper-mediun-v2"], "did you mean hopper-medium-v2"),
        (["--env", "pen-human"], "did you mean pen-human-v1"),
        (["--env", "maze2d-umaze-v1"], "maze2d-umaze-v1.*names are ROBOT-DATA-VERSION"),
        (["--env", "hopper-zzzzzzzz"], "hopper has random, medium"),
        (["--env", "CartPole"], "names are ROBOT-DATA-VERSION"),
        (["--env", "x" * 900], "unknown task 'xxx"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_command_line_that_cannot_be_meant_is_refused(
    argv, says, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    outcome = harness.run(harness.algorithm(dare_iql), *argv)
    harness.assert_refused(outcome, says)


# ---------------------------------------------------------------- what is read, and how


@pytest.mark.parametrize(
    "field, text, value",
    [
        ("seed", "1_000", 1000),
        ("seed", "1e3", 1000),
        ("seed", "010", 10),
        ("seed", " 5 ", 5),
        ("seed", "+5", 5),
        ("seed", "5.0", 5),
        ("seed", "4294967295", 2**32 - 1),
        ("discount", "1", 1.0),
        ("discount", "0", 0.0),
        ("discount", "9e-1", 0.9),
        ("beta", "0", 0.0),
        ("tau", "1.0", 1.0),
        ("expl_noise", "0", 0.0),
        ("actor_dropout", "0", 0.0),
        ("mixing_ratio", "0", 0.0),
        ("mixing_ratio", "None", None),
        ("mixing_ratio", "none", None),
        ("mixing_ratio", "~", None),
        ("dataset_path", "None", None),
        ("dataset_rows", "null", None),
        ("normalize", "off", False),
        ("normalize", "Yes", True),
        ("name", "010", "010"),
        ("name", "1:30", "1:30"),
        ("name", "2024-01-01", "2024-01-01"),
    ],
)
def test_flags_and_yaml_are_read_alike(field, text, value, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"{field}: {text}\n")
    read = [
        getattr(parse_config(iql.TrainConfig, argv), field)
        for argv in (["--config", str(file)], [f"--{field}", text])
    ]
    assert read == [value, value] and type(read[0]) is type(read[1]) is type(value)


def test_of_a_flag_that_is_given_twice_the_last_counts_and_that_is_said(capsys):
    argv = ["--seed", "1", "--seed=2", "--tau", "0.1", "--tau", "0.1"]
    assert parse_config(iql.TrainConfig, argv).seed == 2
    assert capsys.readouterr().out == "--seed is given twice: '2' counts\n"


def test_a_good_run_ends_well(good, tmp_path):
    flags = harness.short_run(tmp_path, good)
    outcome = harness.run(harness.algorithm(iql), *flags)
    assert outcome.status == 0, outcome


# ---------------------------------------------------------------- the tables


def numbers(config):
    hints = typing.get_type_hints(config)
    kinds = {f.name: hints[f.name] for f in dataclasses.fields(config)}
    return {n for n, k in kinds.items() if {int, float} & {k, *typing.get_args(k)}}


@pytest.mark.parametrize(
    "config",
    [
        *(module.TrainConfig for module in ALL),
        *(FinetuneConfig, DareConfig),
        *(dare_iql.DareIQLConfig, dare_cal_ql.DareCalQLConfig),
    ],
    ids=lambda c: f"{c.__module__}.{c.__name__}",
)
def test_every_number_has_a_range_and_every_range_a_number(config):
    assert len(numbers(config)) > 10 and numbers(config) == set(config.RANGES)


def test_host_and_plugin_read_ranges_alike():
    files = [
        Path(module.__file__).read_text() for module in (corl.ranges, corl_dare.ranges)
    ]
    assert files[0] == files[1]


def test_the_config_knows_the_sources_of_data():
    assert FinetuneConfig.CHOICES["dataset_source"] == sources.SOURCES


@pytest.mark.parametrize(
    "interval, inside, outside",
    [
        ("[0, 1]", [0, 1, 0.5], [-0.001, 1.001]),
        ("(0, 1)", [0.5, 1e-9], [0, 1, 2]),
        ("(0, 1]", [1], [0]),
        ("[1, 1e9]", [1, 10**9], [0, 10**9 + 1, 10**400]),
        ("[0, inf)", [0, 1e38], [float("inf"), -1e-9, float("nan")]),
        ("[-inf, inf)", [float("-inf")], [float("inf")]),
    ],
)
def test_an_interval_holds_what_its_brackets_say(interval, inside, outside):
    assert all(corl.ranges.contains(interval, value) for value in inside)
    assert not any(corl.ranges.contains(interval, value) for value in outside)


def test_the_memory_of_this_machine_is_known():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 10**8 < machine.memory() <= pages
