"""Weights without a score: uniform, annealed; what a release amounts to in the log."""

import dataclasses
import importlib

import numpy as np
import pytest
import torch
from helpers import assert_equal, make_buffer, make_hook
from wiring import ALGORITHMS, DARE, Recorder

from algorithms import dare_cal_ql, dare_cql, dare_td3_bc, dare_wsrl
from corl import stacked
from corl.config import parse_config
from corl.layers import make_config as layered
from corl.layers import presets_of
from corl.stacked_session import StackedBuffer
from corl.stacked_session import Streams as AllStreams
from corl_dare.config import ALIKE, SCORING, DareConfig
from corl_dare.exchange import draw_lots
from corl_dare.hook import DareHook, Release, prepare
from corl_dare.hook_stacked import StackedHook

pytestmark = pytest.mark.narrow(16)


def plain_block(algorithm, **fields):
    """Values that put the block of the toy's config back to its defaults."""
    config = importlib.import_module(ALGORITHMS[algorithm]).TrainConfig
    block = config.__dataclass_fields__["dare"].default_factory
    default = {f.name: f.default for f in dataclasses.fields(block)}
    return {**{k: default[k] for k in SCORING}, **fields}


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    return Recorder(lambda: tmp_path_factory.mktemp("run"))


def hook_of(weights, weight, online_steps=None, length=None, **more):
    config = DareConfig(weights=weights, weight=weight, **more)
    buffers = make_buffer(40), make_buffer(30, shift=0.8, seed=1)
    options = {"online_steps": online_steps, "online_length": length}
    return prepare(config, *buffers, dataset_hash="x", cache_dir="none", **options)


# ---------------------------------------------------------------- the hook


@pytest.mark.parametrize("weight, kept", [(1.0, 16), (0.0, 0), (0.3, None)])
def test_uniform_weights_need_no_model_and_move_no_row(weight, kept):
    hook = hook_of("uniform", weight)
    np.random.seed(0)
    drawn = hook.sample(16)
    np.random.seed(0)
    plain = [
        torch.cat(x)
        for x in zip(hook.offline.sample(8), hook.online.sample(8), strict=True)
    ]
    assert_equal(drawn.batch, plain)
    assert torch.equal(drawn.release.weight, torch.full((16,), weight))
    assert drawn.release.kept == kept
    found = [drawn.log[f"weight_{x}"].item() for x in ("mean", "zeros", "ones")]
    assert found == pytest.approx([weight, float(weight == 0), float(weight == 1)])
    assert hook.behavior is None and hook.energy is None and hook.data is None
    assert hook.update_energy(drawn) == {} and hook.estimate(lambda work: 1.0) == {}
    hook.load_state_dict(hook.state_dict())


def test_a_host_that_draws_its_online_half_first_sees_its_own_rows():
    buffers = make_buffer(40), make_buffer(30, shift=0.8, seed=1)
    options = {"dataset_hash": "x", "cache_dir": "none", "online_first": True}
    hook = prepare(DareConfig(weights="uniform"), *buffers, **options)
    np.random.seed(0)
    drawn = hook.sample(16)
    np.random.seed(0)
    online, offline = buffers[1].sample(8), buffers[0].sample(8)
    plain = [torch.cat(x) for x in zip(offline, online, strict=True)]
    assert_equal(drawn.batch, plain)


def test_annealed_weights_follow_the_steps_of_the_online_phase():
    now = [0]
    hook = hook_of("anneal", 0.25, lambda: now[0], 100)
    found = []
    for now[0] in (0, 10, 50, 74, 75, 80, 1000):
        drawn = hook.sample(8)
        assert drawn.release.kept is None
        found.append(drawn.release.weight[0].item())
    assert found == pytest.approx([1.0, 0.9, 0.5, 0.26, 0.25, 0.25, 0.25])
    # Its own length, and one step per batch where nobody tells of steps.
    hook = hook_of("anneal", 0.0, anneal_steps=4)
    found = [hook.sample(8).release.weight[0].item() for _ in range(6)]
    assert found == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    again = hook_of("anneal", 0.0, anneal_steps=4)
    again.load_state_dict({**hook.state_dict(), "calls": 2})
    assert again.sample(8).release.weight[0] == 0.5
    assert hook_of("anneal", 1.0, anneal_steps=4).sample(8).release.kept == 8
    with pytest.raises(ValueError, match="anneal needs dare.anneal_steps"):
        hook_of("anneal", 0.5)


@pytest.mark.parametrize("weights", ALIKE)
def test_stacked_seeds_share_the_weight(weights):
    def make():
        config = DareConfig(weights=weights, weight=0.25, anneal_steps=None)
        if weights == "anneal":
            config = dataclasses.replace(config, anneal_steps=8)
        buffers = make_buffer(40), make_buffer(30, shift=0.8, seed=1)
        return DareHook(*buffers, config, None)

    members, streams = [make() for _ in range(3)], []
    assert members[0].config.not_stacked() == ""
    for seed in range(3):
        np.random.seed(seed)
        streams.append(AllStreams())
    offline = StackedBuffer([hook.offline for hook in members], streams)
    online = StackedBuffer([hook.online for hook in members], streams)
    none = stacked.Networks([{"none": torch.nn.Linear(1, 1)} for _ in members])
    stack, alone = StackedHook(members, offline, online, none.over_seeds), make()
    for _ in range(3):
        drawn, own = stack.sample(8), alone.sample(8)
        assert drawn.release.weight.shape == (3, 8)
        assert torch.equal(drawn.release.weight[1], own.release.weight)
        assert drawn.release.kept == own.release.kept
        assert drawn.log["weight_mean"].shape == (3,)
        assert drawn.batch[0].shape[:2] == (3, 8)


@pytest.mark.parametrize("among", ["half", "batch"])
def test_the_hook_draws_lots_and_keeps_the_leading_rows(among):
    fields = {"score": "policy_ratio", "permute": among}
    np.random.seed(0)
    plain = make_hook(score="policy_ratio").sample(16)
    np.random.seed(0)
    hook = make_hook(**fields)
    drawn = hook.sample(16)
    assert drawn.release.kept == plain.release.kept == 8
    assert sorted(drawn.batch[2].tolist()) == sorted(plain.batch[2].tolist())
    assert not torch.equal(drawn.batch[2], plain.batch[2])
    assert drawn.log["weight_mean"] == 0.5
    state = hook.state_dict()
    np.random.seed(1)
    expected = hook.sample(16).batch[2]
    again = make_hook(**fields)
    again.load_state_dict(state)
    np.random.seed(1)
    assert torch.equal(again.sample(16).batch[2], expected)


@pytest.mark.parametrize("among", ["half", "batch"])
def test_the_hook_draws_lots_for_rows_as_they_came(among):
    """After the exchange lots within the halves would change no weight."""
    hook, other = (
        make_hook(score="policy_ratio", permute=lots) for lots in (among, "none")
    )
    for seed in range(1000):
        np.random.seed(seed)
        plain = other.sample(16)
        # No row is there twice, and some have moved.
        if len(plain.states.unique(dim=0)) == 16 and plain.log["exchanged"]:
            break
    generator = torch.Generator()
    generator.set_state(hook.generator.get_state())
    np.random.seed(seed)
    drawn = hook.sample(16)
    assert torch.equal(drawn.states, plain.states)
    order = (plain.batch[0][:, None] == plain.states[None]).all(-1).int().argmax(1)
    assert not torch.equal(order, torch.arange(16)), "some rows have moved"
    lots = draw_lots(8, 16, among, generator, "cpu")
    assert torch.equal(drawn.batch[0], plain.states[lots[order]])


def test_the_average_is_that_of_the_weights_and_of_computed_rows():
    losses = torch.arange(1.0, 7.0, requires_grad=True)
    hard = Release(torch.tensor([1.0, 1, 0, 0, 0, 0]), 2)
    assert hard.average(hard.keep(losses[:2])) == 1.5
    assert not hard.average(hard.keep(losses[:2])).requires_grad
    soft = Release(torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0, 1.5]))
    assert soft.average(soft.keep(losses)) == (0.5 + 9.0) / 2.0
    assert Release(torch.zeros(6), 0).average(torch.zeros(6)).isnan()
    assert torch.equal(Release(torch.zeros(6), 0).keep(losses[:0]), torch.zeros(6))
    whole = Release(torch.full((6,), 0.3)).whole()
    assert whole.kept == 6 and torch.equal(whole.keep(losses[:6]), losses)


# ---------------------------------------------------------------- settings


def test_every_field_of_a_score_is_idle_without_one_and_no_other():
    kept = {"enabled", "weights", "weight", "anneal_steps"}
    assert {f.name for f in dataclasses.fields(DareConfig)} == {*SCORING, *kept}


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"weights": "uniform", "rule": "em"},
            "so dare.rule em would do nothing; leave it",
        ),
        (
            {"weights": "anneal", "score": "likelihood"},
            "dare.score likelihood would do noth",
        ),
        ({"weights": "uniform", "cap": 3}, r"dare.cap 3 .*\(its default is None\)"),
        (
            {"weights": "uniform", "guidance_scale": 2.0},
            "dare.guidance_scale 2.0 would do",
        ),
        (
            {"weights": "uniform", "behavior": "mixture"},
            "dare.behavior mixture would do",
        ),
        (
            {"weights": "uniform", "permute": "half"},
            "dare.permute half would do nothing",
        ),
        (
            {"weights": "uniform", "anneal_steps": 9},
            "has no schedule, so dare.anneal_steps 9",
        ),
        ({"weight": 0.3}, "takes the weights from scores, so dare.weight 0.3 would do"),
        ({"weights": "soft", "anneal_steps": 3}, "dare.anneal_steps 3 would do nothing"),
        ({"weights": "uniform", "weight": 1.5}, r"dare.weight must lie in \[0, 1\]"),
        ({"permute": "rows"}, "dare.permute must be one of none, half, batch"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DareConfig(**fields)


def test_a_later_choice_leaves_out_what_an_earlier_place_says(tmp_path, capsys):
    config = "configs/td3_bc/quick_start.yaml"
    found = parse_config(
        dare_td3_bc.TrainConfig, ["--config", config, "--dare.weights", "uniform"]
    )
    assert found.dare == type(found.dare)(weights="uniform")
    said = capsys.readouterr().out
    idle = "these would do nothing and are left out: dare.behavior, dare.behavior_batch_size"
    assert f"{config}: with dare.weights uniform {idle}" in said
    argv = ["--preset", "cpu", "--dare.weights", "anneal", "--dare.weight", "0"]
    found = parse_config(dare_td3_bc.TrainConfig, argv)
    assert found.dare == type(found.dare)(weights="anneal", weight=0.0)
    assert "preset cpu: with dare.weights anneal" in capsys.readouterr().out
    layers = [
        ("file", {"dare": {"rule": "em"}}),
        ("sweep", {"dare": {"weights": "uniform"}}),
    ]
    assert layered(dare_td3_bc.TrainConfig, layers).dare.rule == "threshold"
    scored = [
        ("file", {"dare": {"weights": "anneal", "weight": 0.3, "anneal_steps": 9}}),
        ("sweep", {"dare": {"weights": "hard"}}),
    ]
    assert layered(dare_td3_bc.TrainConfig, scored).dare == type(found.dare)()
    with pytest.raises(ValueError, match="dare.rule em would do nothing"):
        layered(dare_td3_bc.TrainConfig, layers[::-1])
    with pytest.raises(SystemExit):
        parse_config(
            dare_td3_bc.TrainConfig, ["--dare.weights", "uniform", "--dare.cap", "2"]
        )
    line = capsys.readouterr().err
    assert line.startswith("error: dare.weights uniform") and line.count("\n") == 1


@pytest.mark.parametrize("module", [dare_cal_ql, dare_cql, dare_wsrl])
def test_a_multiplier_that_makes_up_for_the_weight_is_refused(module):
    def make(**dare):
        block = type(module.TrainConfig().dare)(weights="uniform", **dare)
        return module.TrainConfig(cql_lagrange=True, dare=block)

    assert make(lagrange_gap="weighted").dare.alike
    with pytest.raises(ValueError, match="would release nothing.*set dare.lagrange_gap"):
        make(lagrange_gap="literal")


def test_presets_that_do_not_fit_are_not_named():
    config = dare_td3_bc.TrainConfig(dare=dare_td3_bc.NoisyDareConfig(weights="uniform"))
    assert presets_of(config) == {}


# ---------------------------------------------------------------- whole runs


def weights_of(record):
    """Networks and optimizers of the last checkpoint, without what belongs to DARE."""
    parts = record.parts()["parts"]["trainer"]
    return {k: v for k, v in parts.items() if k != "dare_generator"}


# The batches of OPT's twin are other ones: test_opt.py.
@pytest.mark.parametrize("algorithm", [n for n in DARE if n != "dare_opt_spot"])
def test_weight_1_is_the_baseline_bit_for_bit(algorithm, recorder):
    name = algorithm.removeprefix("dare_")
    own = {
        "td3_bc": {"bc_online": "keep", "seed": 4},
        "rebrac": {"bc_online": "keep"},
        "spot": {"lambd_cool": False},
        "awac": {"seed": 8},
        "famo2o_cql": {"seed": 2},
        # Its own annealing is on where it is asked for, and both multiply.
        "cql_sa": {"beta_anneal": "linear"},
    }.get(name, {})
    plain = recorder(name, **own)
    dare = plain_block(algorithm, weights="uniform", weight=1.0)
    more = {"expl_noise": 0.1} if name == "spot" else {}
    found = recorder(algorithm, dare=dare, **{**own, **more})
    assert_equal(weights_of(plain), weights_of(found))
    assert found.of("fit") == [] and found.of("behavior") == []
    online = [e for e in found.of("update") if e.kept is not None]
    assert online and all(e.kept == len(e.weight) for e in online)


def test_annealed_rebrac_is_its_own_schedule_bit_for_bit(recorder):
    fields = {"actor_bc_coef": 0.03, "bc_end": 0.5, "critic_bc_online": "drop"}
    plain = recorder("rebrac", bc_online="anneal", bc_anneal_steps=None, **fields)
    dare = plain_block("dare_rebrac", weights="anneal", weight=0.5)
    found = recorder("dare_rebrac", dare=dare, **fields)
    assert_equal(weights_of(plain), weights_of(found))
    logged = [
        float(row["weight_mean"])
        for row in found.rows_of("metrics.csv")
        if row["weight_mean"]
    ]
    assert logged == sorted(logged, reverse=True) and logged[0] > 0.5 == logged[-1]
    fields = {"bc_online": "anneal", "bc_anneal_steps": 10, "bc_end": 0.3}
    plain = recorder("rebrac", **fields)
    dare = plain_block("dare_rebrac", weights="anneal", weight=0.3, anneal_steps=10)
    assert_equal(weights_of(plain), weights_of(recorder("dare_rebrac", dare=dare)))


@pytest.mark.parametrize("algorithm", ["dare_cal_ql", "dare_cql", "dare_wsrl"])
def test_uniform_weights_scale_alpha(algorithm, recorder):
    dare = plain_block(algorithm, weights="uniform", weight=0.25)
    found = recorder(algorithm, dare=dare)
    online = 0.25 * found.config.cql_alpha_online
    plain = recorder(algorithm.removeprefix("dare_"), cql_alpha_online=online)
    for part, value in weights_of(plain).items():
        if isinstance(value, dict) and "optimizer" not in part:
            torch.testing.assert_close(
                weights_of(found)[part], value, atol=2e-5, rtol=1e-4, msg=part
            )


@pytest.mark.parametrize("algorithm", DARE)
def test_weight_0_computes_no_conservative_row_and_logs_no_nan(algorithm, recorder):
    more = {"lambd_cool": False, "expl_noise": 0.1} if algorithm == "dare_spot" else {}
    dare = plain_block(algorithm, weights="uniform", weight=0.0)
    found = recorder(algorithm, dare=dare, **more)
    online = [e for e in found.of("update") if e.kept is not None]
    # ReBRAC's coefficient has the weight.
    kept = len(online[0].weight) if algorithm == "dare_rebrac" else 0
    assert online and all(e.kept == kept for e in online)
    last = found.rows_of("metrics.csv")[-1]
    assert (last["weight_mean"], last["weight_zeros"]) == ("0.0", "1.0")
    assert all(value != "nan" for value in last.values())


def test_the_clock_is_right_after_a_resume(recorder, tmp_path):
    dare = plain_block("dare_iql", weights="anneal", weight=0.1)
    whole = recorder("dare_iql", dare=dare)
    stopped = Recorder(lambda: tmp_path)(
        "dare_iql",
        dare=dare,
        stop=lambda record, event: len(record.of("update")) == 20,
    )
    assert len(stopped.of("update")) < len(whole.of("update"))
    resumed = Recorder(lambda: tmp_path)(
        "dare_iql", dare=dare, resume=str(stopped.folder)
    )
    expected = [e.weight[0].item() for e in whole.of("update") if e.weight is not None]
    found = [
        e.weight[0].item()
        for e in stopped.of("update") + resumed.of("update")
        if e.weight is not None
    ]
    assert found == expected and len(set(found)) > 5
    assert_equal(weights_of(whole), weights_of(resumed))
