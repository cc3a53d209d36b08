"""WSRL: updates of both phases against a float64 oracle, and what the online phase keeps."""

import shutil

import numpy as np
import pytest
import torch
from helpers import assert_equal, hard_release
from oracle_sac import OracleWSRL
from short_runs import checkpoint_of, folder_of, run, stop_after
from test_rlpd import A, B, S, assert_same_weights, watch_noise
from test_rlpd import batches as plain_batches

from algorithms import cal_ql, cql, dare_wsrl, wsrl
from corl import buffers
from corl_dare.config import LagrangeDareConfig
from corl_dare.hook import Release

TASK = "hopper-medium-v2"
SMALL = {"hidden_dim": 16, "cql_n_actions": 3, "n_critics": 4, "compile": False}


def batches(count):
    rng = np.random.default_rng(2)
    for number, batch in enumerate(plain_batches(count)):
        returns = rng.normal(size=(B, 1))
        if number % 2:
            # As of rows that were collected online.
            returns[::3] = -np.inf
        yield [*batch, torch.tensor(returns, dtype=torch.float32)]


def make_trainer(max_action=1.0, module=wsrl, **fields):
    config = module.TrainConfig(env=TASK, **{**SMALL, **fields})
    torch.manual_seed(0)
    return module.make_trainer(config, S, A, max_action, "cpu"), config


MAZE = {
    "base": "cal_ql",
    "cql_alpha": 1.0,
    "cql_lagrange": True,
    "state_dependent_std": False,
    "q_n_hidden_layers": 3,
}
OFFLINE = {
    "locomotion": {},
    "antmaze": MAZE,
    "one action": {"cql_max_target_backup": False, "layer_norm": False},
    "no penalty": {"cql_alpha": 0.0, "last_hidden_gain": None, "shared_head": False},
}
ONLINE = {
    "locomotion": {},
    "antmaze": {**MAZE, "max_target_backup_online": True, "utd": 2},
    "penalty kept": {**MAZE, "cql_alpha_online": 0.7, "utd": 3},
    "zero gradients": {
        **{**MAZE, "cql_alpha_online": 0.7, "utd": 3, "shared_head": False},
        "zero_gradient_steps": True,
    },
    "other rates": {"utd": 1, "temperature_lr": 1e-2, "init_temperature": 0.3},
}


@pytest.mark.parametrize("max_action", [1.0, 2.0])
@pytest.mark.parametrize("case", OFFLINE)
def test_ten_offline_updates_equal_the_float64_oracle(case, max_action):
    trainer, config = make_trainer(max_action, **OFFLINE[case])
    oracle, drawn = OracleWSRL(trainer, config, A, max_action), watch_noise(trainer)
    for batch in batches(10):
        logs = trainer.train(batch)
        expected = oracle.train(batch, drawn[-1], (batch[0], batch[3]), False)
        assert_logged(logs, expected)
    assert_same_weights(trainer, oracle)


@pytest.mark.parametrize("case", ONLINE)
def test_twelve_online_updates_equal_the_float64_oracle(case):
    """The policy and the temperature learn once, from the rows of all batches of a step."""
    trainer, config = make_trainer(**ONLINE[case])
    oracle, drawn = OracleWSRL(trainer, config, A), watch_noise(trainer)
    waiting = []
    for batch in batches(12):
        given = [field.clone() for field in batch]
        logs = trainer.train(given, online=True)
        for field in given:
            # A captured buffer writes its next batch into the same tensors.
            field.zero_()
        waiting.append(batch)
        rows = None
        if len(waiting) == config.utd:
            rows = [torch.cat([x[i] for x in waiting]) for i in (0, 3)]
            waiting = []
        assert ("actor_loss" in logs) is (rows is not None)
        assert_logged(logs, oracle.train(batch, drawn[-1], rows, True))
    assert trainer.waiting == []
    assert_same_weights(trainer, oracle)


def assert_logged(logs, expected):
    for name, value in expected.items():
        if name == "critic_loss":
            found = logs["td_loss"]
            if "cql_gap" in logs:
                found = found + logs["cql_weight"] * logs["cql_gap"]
        else:
            found = logs[name]
        assert found.item() == pytest.approx(value, rel=2e-4, abs=2e-5), name


def test_losses_have_a_value_per_row():
    trainer, _ = make_trainer(**MAZE)
    (batch,) = batches(1)
    noise = trainer._noise(batch[1], 2 * B, False)
    values = trainer.critics(*batch[:2])
    gaps, _ = trainer.conservative_gaps(values, batch, noise)
    assert gaps.shape == trainer.td_losses(values, values[0]).shape == (B,)
    rows = [torch.cat([batch[i]] * 2) for i in (0, 3)]
    policy_losses, log_pi = trainer.policy_losses(rows[0], noise.policy)
    losses = trainer.temperature_losses(rows[1], noise.temperature)
    assert policy_losses.shape == log_pi.shape == losses.shape == (2 * B,)


def test_only_the_drawn_critics_have_the_penalty():
    trainer, _ = make_trainer(n_penalty_critics=1)
    (batch,) = batches(1)
    noise = trainer._noise(batch[1], 0, False)
    values = trainer.critics(*batch[:2])
    gaps, _ = trainer.conservative_gaps(values, batch, noise)
    (grad,) = torch.autograd.grad(gaps.sum(), [trainer.critics.hidden[0].weight])
    asked = grad.flatten(1).abs().sum(1) > 0
    assert torch.nonzero(asked).flatten().tolist() == noise.penalized.tolist()


SHORT = {"offline_iterations": 6, "online_iterations": 20, "eval_freq": 26}
SHORT |= {"n_episodes": 1, "log_freq": 1, "online_warmup": 8, "utd": 3, "batch_size": 8}


@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_online_batches_have_the_kept_share_of_offline_rows(
    ratio, tmp_path, monkeypatch
):
    seen, read = [], buffers.MixedBuffer.read
    halves = lambda self, *rows: seen.append([*map(len, rows)]) or read(self, *rows)  # noqa: E731
    monkeypatch.setattr(buffers.MixedBuffer, "read", halves)
    summary = run(wsrl, tmp_path, monkeypatch, **SHORT, mixing_ratio=ratio)
    # 12 steps after the warm-up, in which the pre-trained policy acts.
    assert summary["updates"] == 6 + 12 * 3
    offline = int(8 * ratio)
    assert len(seen) >= 36 and all(row == [offline, 8 - offline] for row in seen)


@pytest.mark.parametrize("base, stop_at", [("cal_ql", 3), ("cql", 10), ("cql", 20)])
def test_stopped_and_resumed_equals_an_unbroken_run(
    base, stop_at, tmp_path, monkeypatch
):
    """Offline, in the warm-up, and later."""
    fields = {**SHORT, "base": base, "cql_lagrange": base == "cal_ql"}
    run(wsrl, tmp_path / "a", monkeypatch, **fields)
    with monkeypatch.context() as patch:
        stop_after(stop_at, patch)
        assert run(wsrl, tmp_path / "b", monkeypatch, **fields) == {}
    resume = str(folder_of(tmp_path / "b"))
    run(wsrl, tmp_path / "b", monkeypatch, **fields, resume=resume)
    one, two = (checkpoint_of(tmp_path / name) for name in "ab")
    for key in ("parts", "rng", "step"):
        assert_equal(one[key], two[key], key)
    texts = [(folder_of(tmp_path / x) / "metrics.csv").read_text() for x in "ab"]
    assert texts[0] == texts[1]


# ---------------------------------------------------------------- weights of rows

KEPT = {**MAZE, "cql_alpha_online": 0.7, "utd": 3}
# What a release may look like: part of the rows, none, all, and weights of their own.
RELEASES = [hard_release(B, 11), hard_release(B, 0), hard_release(B, B)]
RELEASES += [Release(torch.linspace(0.05, 0.95, B))]
RELEASES += [Release((torch.arange(B) % 3 == 0).float())]


@pytest.mark.parametrize("lagrange_gap", ["literal", "weighted"])
@pytest.mark.parametrize("fields", [KEPT, {**KEPT, "base": "cql", "n_critics": 2}])
def test_weighted_updates_equal_the_float64_oracle(fields, lagrange_gap):
    dare = LagrangeDareConfig(lagrange_gap=lagrange_gap)
    trainer, config = make_trainer(module=dare_wsrl, dare=dare, **fields)
    oracle, drawn, waiting = OracleWSRL(trainer, config, A), watch_noise(trainer), []
    for number, batch in enumerate(batches(15)):
        release = RELEASES[number % 5]
        logs = trainer.train(batch, True, release)
        waiting = [*waiting, batch] if number % 3 else [batch]
        rows = None
        if len(waiting) == 3:
            rows = [torch.cat([x[i] for x in waiting]) for i in (0, 3)]
        assert len(drawn[-1].uniform) == (B if release.kept is None else release.kept)
        assert_logged(logs, oracle.train(batch, drawn[-1], rows, True, release))
        assert ("conservative_loss" in logs) is (release.kept != 0)
        if release.kept != 0:
            mean = logs["cql_gap"] / release.weight.double().mean()
            assert logs["conservative_loss"].item() == pytest.approx(
                mean.item(), rel=1e-5
            )
    assert_same_weights(trainer, oracle)


def learned(trainer, releases, seed=5):
    """The state after an online update with each release, from draws of one seed."""
    torch.manual_seed(seed)
    for batch, release in zip(batches(len(releases)), releases, strict=True):
        trainer.train(batch, True, *release)
    return trainer.state_dict()


@pytest.mark.parametrize("release", [hard_release(B, B), Release(torch.ones(B))])
def test_weight_1_everywhere_is_wsrl_with_the_penalty_kept(release):
    ours, theirs = make_trainer(module=dare_wsrl, **KEPT)[0], make_trainer(**KEPT)[0]
    assert_equal(learned(ours, 6 * [[release]]), learned(theirs, 6 * [[]]))


@pytest.mark.parametrize("release", [hard_release(B, 0), Release(torch.zeros(B))])
def test_weight_0_everywhere_is_wsrl_without_the_penalty(release):
    """The penalty has random numbers of its own, so both get those of the other parts."""
    fields = {**KEPT, "cql_lagrange": False}
    ours, _ = make_trainer(module=dare_wsrl, **fields)
    theirs, _ = make_trainer(**{**fields, "cql_alpha_online": None})
    drawn = watch_noise(ours)
    learned(ours, 6 * [[release]])
    of_ours, theirs._noise = (
        iter(drawn),
        lambda *args: next(of_ours)._replace(
            penalized=None, uniform=None, current=None, following=None
        ),
    )
    assert_equal(ours.state_dict(), learned(theirs, 6 * [[]]))


def test_the_gaps_of_kept_rows_are_those_of_these_rows_alone():
    trainer, _ = make_trainer(module=dare_wsrl, **KEPT)
    (batch,) = batches(1)
    release, alone = hard_release(B, 11), [field[:11] for field in batch]
    noise = trainer._noise(batch[1], 0, True, release)
    values = trainer.critics(*batch[:2])
    gaps, _ = trainer.conservative_gaps(values, batch, noise, release)
    expected, _ = trainer.conservative_gaps(values[:, :11], alone, noise)
    assert torch.equal(gaps[:11], expected) and gaps[11:].eq(0).all() and len(gaps) == B


def test_dare_keeps_offline_rows_and_the_penalty():
    make = lambda **fields: dare_wsrl.TrainConfig(env=TASK, **fields)  # noqa: E731
    config, off = make(cql_alpha=3.0), make(dare=LagrangeDareConfig(enabled=False))
    assert (config.mixing_ratio, config.cql_alpha_online) == (0.5, 3.0)
    assert (off.mixing_ratio, off.cql_alpha_online) == (0.0, 0.0)
    given = make(mixing_ratio=0.25, cql_alpha_online=0.1)
    assert (given.mixing_ratio, given.cql_alpha_online) == (0.25, 0.1)
    assert make(**{k: v for k, v in vars(config).items() if k != "env"}) == config
    for fields in ({"cql_alpha_online": 0.0}, {"cql_alpha": 0.0}):
        with pytest.raises(
            ValueError, match="cql_alpha_online 0 leaves no.*dare.enabled"
        ):
            make(**fields)
    with pytest.raises(ValueError, match="mixing_ratio 0 leaves no offline row"):
        make(mixing_ratio=0.0)


# ---------------------------------------------------------------- models of two critics

TWO = {
    **{"n_critics": 2, "shared_head": False, "layer_norm": False},
    **{"actor_n_hidden_layers": 3, "hidden_dim": 256},
    **{"log_std_min": -20.0, "log_std_max": 2.0},
}


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def name_of(module):
    return module.__name__.removeprefix("algorithms.")


@pytest.mark.parametrize("module, max_action", [(cql, 1.0), (cal_ql, 2.0)])
def test_a_model_of_two_critics_is_the_same_functions(module, max_action, in_float64):
    torch.manual_seed(1)
    config = module.TrainConfig(env=TASK, q_n_hidden_layers=4, compile=False)
    theirs = module.make_trainer(config, S, A, max_action, "cpu")
    with torch.no_grad():
        # So many logarithms of the standard deviation lie beyond both bounds.
        theirs.actor.log_std_multiplier.constant.fill_(40.0)
        theirs.actor.log_std_offset.constant.fill_(-9.0)
        theirs.log_alpha.constant.fill_(-1.3)
        theirs.log_alpha_prime.constant.fill_(0.4)
        for p in theirs.target_critic_2.parameters():
            p.add_(0.1 * torch.randn_like(p))
    fields = {**TWO, "q_n_hidden_layers": 4, "model_of": name_of(module)}
    ours, _ = make_trainer(max_action, **fields)
    ours.load_weights({**theirs.state_dict(), "total_it": 7})
    states, rows = 2.0 * torch.randn(B, S), max_action * torch.rand(B, 3, A)
    log_std = ours.actor.gaussian(states)[1]
    assert (log_std.min(), log_std.max()) == (-20.0, 2.0)
    for noise, repeat in ((torch.randn(B, A), None), (torch.randn(B, 3, A), 3)):
        actions, log_pi = theirs.actor(states, repeat=repeat, noise=noise)
        found = ours.actor(states, noise)
        torch.testing.assert_close(found[0], actions, rtol=0.0, atol=1e-13)
        # CQL takes the noise from the action again, where it is a billionth of it.
        torch.testing.assert_close(found[1], log_pi, rtol=0.0, atol=1e-5)
    densities = theirs.actor.log_prob(states, rows)
    found = ours.actor.log_prob(states, rows)
    torch.testing.assert_close(found, densities, rtol=1e-9, atol=0.0)
    modes = theirs.actor(states, deterministic=True)[0]
    torch.testing.assert_close(ours.actor.mode(states), modes, rtol=0.0, atol=1e-13)
    for kind in ("", "target_"):
        pair = (getattr(theirs, f"{kind}critic_{number}") for number in (1, 2))
        expected = torch.stack([critic(states, rows) for critic in pair])
        found = getattr(ours, f"{kind}critics")(states, rows)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
    assert ours.temperature().item() == pytest.approx(np.exp(-1.3), rel=1e-6)
    assert ours.multiplier().item() == pytest.approx(np.exp(0.4), rel=1e-6)
    assert ours.total_it == 7
    moments = [s["exp_avg"] for o in ours.optimizers() for s in o.state.values()]
    assert moments and not any(moment.any() for moment in moments)


def test_where_all_critics_are_asked_each_is_asked_once():
    trainer, _ = make_trainer(**{**TWO, "hidden_dim": 16})
    (batch,) = batches(1)
    for _ in range(9):
        noise = trainer._noise(batch[1], 0, False)
        assert sorted(noise.members.tolist()) == [0, 1]
        assert sorted(noise.penalized.tolist()) == [0, 1]


def model_of(module, tmp_path, monkeypatch):
    """The folder of a short run on the toy."""
    short = {"offline_iterations": 2, "online_iterations": 0, "eval_freq": 2}
    run(module, tmp_path / "model", monkeypatch, **short, n_episodes=1)
    return folder_of(tmp_path / "model")


def test_a_run_from_a_model_of_two_critics_says_so(tmp_path, monkeypatch, capsys):
    """It needs the model no more when it is resumed."""
    model = model_of(cal_ql, tmp_path, monkeypatch)
    theirs = checkpoint_of(tmp_path / "model")["parts"]["trainer"]
    fields = {**SHORT, **TWO, "model_of": "cal_ql", "load_model": str(model)}
    # Nothing learns, so that the networks stay those of the model.
    fields |= {"offline_iterations": 0, "online_iterations": 6, "online_warmup": 6}
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert run(wsrl, tmp_path / "b", monkeypatch, **fields) == {}
    shutil.rmtree(model)
    folder = folder_of(tmp_path / "b")
    summary = run(wsrl, tmp_path / "b", monkeypatch, **fields, resume=str(folder))
    caveat = "two critics: from a model of cal_ql.py, not the published WSRL"
    assert summary["caveat"] == caveat
    assert "model_of: cal_ql" in (folder / "config.yaml").read_text()
    shown = capsys.readouterr().out
    assert shown.count(f"{caveat}; Adam's moments begin anew\n") == 2
    assert f"\n{caveat}\n" in shown
    ours = checkpoint_of(tmp_path / "b")["parts"]["trainer"]["critics"]
    for number in (0, 1):
        weight = theirs[f"critic{number + 1}"]["network.0.weight"]
        assert torch.equal(ours["hidden.0.weight"][number], weight.T)


def test_a_model_that_does_not_fit_is_refused_by_its_fields(tmp_path, monkeypatch):
    model = model_of(cql, tmp_path, monkeypatch)
    cases = [
        (
            {"n_critics": 3, "shared_head": True, "hidden_dim": 32},
            "set hidden_dim to 256, n_critics to 2, shared_head to false;",
        ),
        (
            {"state_dependent_std": False, "log_std_max": 1.0},
            "set state_dependent_std to true, log_std_max to 2.0;",
        ),
        (
            {"actor_n_hidden_layers": 2, "q_n_hidden_layers": 3, "layer_norm": True},
            "set actor_n_hidden_layers to 3, layer_norm to false, q_n_hidden_layers to 2;",
        ),
        ({"model_of": "wsrl"}, "it has no 'critics', so it is no model of wsrl.py"),
        ({"load_model": ""}, "model_of cql needs a model: give load_model"),
    ]
    for fields, message in cases:
        given = {**SHORT, **TWO, "model_of": "cql", "load_model": str(model), **fields}
        with pytest.raises(ValueError) as caught:
            run(wsrl, tmp_path / "b", monkeypatch, **given)
        line = str(caught.value)
        assert message in line and "\n" not in line
        assert (str(model) in line) is bool(given["load_model"])


# ---------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"base": "iql"}, "base 'iql' is not one of cql, cal_ql"),
        ({"mixing_ratio": 0.3}, "batch_size 256 cannot be split by mixing_ratio 0.3"),
        ({"n_penalty_critics": 0}, r"n_penalty_critics must lie in \[1, 1000\], not 0"),
        ({"last_hidden_gain": 0.0}, r"last_hidden_gain must lie in \(0, inf\)"),
        (
            {"is_sparse_reward": True, "discount": 1.0},
            "is_sparse_reward needs a discount below 1",
        ),
    ],
)
def test_bad_settings_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        wsrl.TrainConfig(**{"env": TASK, **fields})
