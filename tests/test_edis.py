"""EDIS in its two files: when rows are generated, who draws them, what is left without them."""

import copy

import numpy as np
import pytest
import torch
import wiring
from helpers import assert_equal, make_buffer
from kinds import one_of_each_kind
from short_runs import (
    assert_same_weights,
    checkpoint_of,
    edis_block,
    final_weights,
    folder_of,
    run,
)
from test_wiring import is_row_of, online_rows

from algorithms import cal_ql, edis_cal_ql, edis_iql, iql
from corl import curves, finetune, machine
from corl.buffers import JoinedBuffer, MixedBuffer, ReplayBuffer
from corl.config import parse_config
from transition_diffusion.config import LOGS
from transition_diffusion.generation import Generation

SHORT = {
    "offline_iterations": 8,
    "online_iterations": 25,
    "eval_freq": 33,
    "n_episodes": 1,
    "log_freq": 1,
    "batch_size": 16,
}
TWINS = [(iql, edis_iql), (cal_ql, edis_cal_ql)]


def generation(share=0.3, online_rows=40, seed=0, **fields):
    """A generation around two buffers of `helpers`; its policy answers with half the noise."""
    offline, online = make_buffer(50, seed=1), ReplayBuffer(3, 2, 64)
    if online_rows:
        online = make_buffer(online_rows, shift=0.3, seed=2)
    rows = ReplayBuffer(3, 2, 60)
    return Generation(
        edis_block(**fields),
        replay=JoinedBuffer(offline, online),
        online=online,
        generated=rows,
        mixed=MixedBuffer(rows, online, share),
        policy=lambda states, noise: 0.5 * noise,
        share=share,
        sizes=(3, 2, 1.0),
        seed=seed,
    )


def finish(made, step=0):
    """Make every piece of the refresh before an online step; returns the phases."""
    made.before(step)
    phases = []
    while (phase := made.phase()) is not None:
        phases.append(phase)
        made.advance()
    return phases


# ---------------------------------------------------------------- buffers


def test_joined_buffers_draw_what_one_buffer_draws():
    offline, online = make_buffer(30, seed=1), make_buffer(20, shift=0.5, seed=2)
    one, joined = make_buffer(30, seed=1), JoinedBuffer(offline, online)
    for i in range(20):
        s, a, r, following, done = (x[0].numpy() for x in online.gather(np.array([i])))
        one.add_transition(s, a, r[0], following, bool(done[0]))
    for buffer in (one, joined):
        np.random.seed(4)
        buffer.batch = buffer.sample(200)
    assert joined.size == one.size == 50
    assert_equal(one.batch, joined.batch)


def test_refilled_rows_replace_all_others_and_have_no_known_return():
    buffer = ReplayBuffer(3, 2, 12, mc_returns=True)
    for n, value in ((12, 1.0), (7, 2.0)):
        buffer.refill([torch.full((n, w), value) for w in (3, 2, 1, 3, 1)])
    batch = buffer.sample(100)
    assert all((field == 2.0).all() for field in batch[:5]) and buffer.size == 7
    assert (batch[5] == -np.inf).all()
    copied = ReplayBuffer(3, 2, 12, mc_returns=True)
    copied.load_state_dict(buffer.state_dict())
    assert_equal(copied.gather(np.arange(7)), buffer.gather(np.arange(7)))
    with pytest.raises(ValueError, match="13 rows do not fit into a buffer of 12"):
        buffer.refill([torch.zeros(13, w) for w in (3, 2, 1, 3, 1)])


# ---------------------------------------------------------------- a refresh


def test_refreshes_come_when_the_authors_code_makes_them():
    steps = range(0, 200_010, 10)
    always = generation(refresh_every=10_000)
    assert sum(always.due(step) for step in steps) == 21 and always.due(0)
    seldom = generation(refresh_every=10_000, schedule="refresh_steps")
    assert sum(seldom.due(step) for step in steps) == 20 and not seldom.due(0)
    never = generation(share=0.0, refresh_every=10)
    assert not any(never.due(step) for step in steps)


@pytest.mark.parametrize("energies", ["consistent", "public"])
def test_a_refresh_fits_teaches_and_generates(energies):
    made = generation(energies=energies, model_terminals=True)
    torch.manual_seed(5)
    stream = torch.get_rng_state(), np.random.get_state()[1].copy()
    before = copy.deepcopy(made.energies.networks.state_dict())
    phases = finish(made)
    assert torch.equal(torch.get_rng_state(), stream[0])
    assert np.array_equal(np.random.get_state()[1], stream[1])
    names = ["diffusion model"] * 15 + ["energies"] * 6 + ["generated rows"] * 3
    assert [name for name, _, _ in phases] == names
    assert phases[-1] == ("generated rows", 2, 3)
    assert set(made.log) == set(LOGS) and made.log["guided"] == 1.0
    assert all(isinstance(value, float) for value in made.log.values())
    s, a, r, following, done = made.generated.gather(np.arange(60))
    assert made.generated.size == 60 == made.log["generated_rows"]
    assert a.abs().max() <= 1.0 and set(done.unique().tolist()) <= {0.0, 1.0}
    assert r.mean().item() == pytest.approx(made.log["generated_reward"], rel=1e-5)
    assert len(s.unique(dim=0)) == 60
    after = made.energies.networks.state_dict()
    assert all(not torch.equal(before[k], after[k]) for k in before if "weight" in k)
    first = s.clone()
    finish(made, 10)
    assert made.count == 2 and not torch.equal(
        made.generated.gather(np.arange(60))[0], first
    )
    # The model of a refresh ends with it; energies and their moments go on.
    state = made.state_dict()
    assert state["fit"] is None and state["samples"] is None
    assert state["optimizers"][0]["state"][0]["step"] == 4


def test_without_enough_online_rows_nothing_is_guided():
    """The first refresh comes before the first online step."""
    for few in (0, 7):
        made = generation(online_rows=few)
        assert {name for name, _, _ in finish(made)} == {
            "diffusion model",
            "generated rows",
        }
        assert made.log["guided"] == 0.0 and "state_energy_loss" not in made.log
        assert made.generated.size == 60


@pytest.mark.parametrize("stop", [0, 1, 15, 18, 21, 23])
def test_a_refresh_goes_on_to_the_bit_from_any_piece(stop):
    """The seed of the copy is another: everything comes from the state."""
    whole, made = generation(), generation()
    finish(whole)
    finish(whole, 10)
    finish(made)
    made.before(10)
    for _ in range(stop):
        made.advance()
    resumed = generation(seed=9)
    resumed.load_state_dict(copy.deepcopy(made.state_dict()))
    finish(resumed, 10)
    assert_equal(whole.state_dict(), resumed.state_dict())
    rows = [x.generated.gather(np.arange(60)) for x in (whole, resumed)]
    assert_equal(*rows)
    assert not resumed.reseeded


def test_the_estimate_counts_refreshes_and_changes_nothing():
    made = generation()
    before = copy.deepcopy(made.state_dict())

    def seconds_of(work):
        work()
        return 1.0

    (name,), (seconds,) = zip(
        *made.estimate_online(seconds_of, first=1, last=31).items(), strict=True
    )
    assert name == "3 refreshes" and seconds > 3 * 15
    assert made.estimate_online(seconds_of, first=31, last=40) == {}
    assert_equal(before, made.state_dict())


def test_generated_values_that_are_not_finite_end_the_run():
    made = generation()
    made.before(0)
    for _ in range(15):
        made.advance()
    with torch.no_grad():
        made.fit.average.module.last.bias.fill_(float("nan"))
    made.done = 15 + 6
    with pytest.raises(FloatingPointError, match="generated transition is not finite"):
        made.advance()


# ---------------------------------------------------------------- who draws what


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return wiring.Recorder(lambda: tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name", wiring.EDIS)
def test_batches_have_generated_rows_in_the_place_of_offline_ones(name, recorded):
    record = recorded(name)
    offline = {k: rows[: wiring.ROWS] for k, rows in record.stored("offline").items()}
    online, generated = online_rows(record), record.stored("generated")
    updates = record.of("update")
    assert len(updates) == 7 + 2 * (16 - 2)
    for number, update in enumerate(updates):
        real = is_row_of(update.batch, offline)
        collected = is_row_of(update.batch, online)
        # Floor: 0.25 of 16 rows come first, and they are no row of either buffer.
        expected = [True] * 16 if number < 7 else [False] * 16
        assert real.tolist() == expected
        if number >= 7:
            assert collected.tolist() == [False] * 4 + [True] * 12
            assert (update.batch[4][:4] == 0).all()
    assert is_row_of(updates[-1].batch, generated)[:4].all()
    # Refreshes before the online steps 0, 6 and 12: the first rows are gone.
    assert not is_row_of(updates[8].batch, generated).any()


def test_in_the_authors_schedule_only_steps_with_a_refresh_draw_generated_rows(
    tmp_path, monkeypatch
):
    """And such a step has 20 updates. All others draw from offline and online rows alike."""
    seen, sample = [], Generation.sample

    def watched(self, n):
        seen.append((self.now, self.more_updates(1), sample(self, n)))
        return seen[-1][-1]

    monkeypatch.setattr(Generation, "sample", watched)
    fields = {
        **SHORT,
        "edis": edis_block(schedule="refresh_steps"),
        "mixing_ratio": 0.33,
    }
    summary = run(edis_iql, tmp_path, monkeypatch, **fields)
    steps = [step for step, _, _ in seen]
    assert [steps.count(step) for step in range(25)] == (
        [1] * 10 + [20] + [1] * 9 + [20] + [1] * 4
    )
    assert summary["updates"] == 8 + 25 + 2 * 19 and len(summary["work_seconds"]) == 2
    # The toy's second state is constant, and what is generated is not.
    generated = [(x[0][:, 1] != x[0][-1, 1]).sum().item() for _, _, x in seen]
    on = [n for step, n in zip(steps, generated, strict=True) if step in (10, 20)]
    off = [n for step, n in zip(steps, generated, strict=True) if step not in (10, 20)]
    assert set(on) == {5} and set(off) == {0}


@pytest.mark.parametrize("base, module", TWINS)
def test_with_a_share_of_zero_it_is_the_base_on_online_rows_alone(
    base, module, tmp_path, monkeypatch
):
    fields = {**SHORT, "mixing_ratio": 0.0}
    run(base, tmp_path / "a", monkeypatch, **fields)
    summary = run(module, tmp_path / "b", monkeypatch, **fields, edis=edis_block())
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert "work_seconds" not in summary
    run(base, tmp_path / "c", monkeypatch, **{**fields, "mixing_ratio": 0.5})
    weights = [final_weights(tmp_path / x)["actor"] for x in "ac"]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_between_refreshes_the_authors_schedule_is_iql_with_one_buffer(
    tmp_path, monkeypatch
):
    run(iql, tmp_path / "a", monkeypatch, **SHORT)
    block = edis_block(schedule="refresh_steps", refresh_every=1000)
    run(edis_iql, tmp_path / "b", monkeypatch, **SHORT, edis=block)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


# ---------------------------------------------------------------- whole runs


@pytest.mark.narrow(64)
@pytest.mark.parametrize("module", one_of_each_kind([edis_iql, edis_cal_ql]))
def test_it_learns_with_generated_rows(module, tmp_path, monkeypatch):
    """The toy: 0 is standing still, 100 the optimum."""
    block = edis_block(
        refresh_every=200,
        samples=400,
        diffusion_updates=250,
        diffusion_lr=3e-3,
        width=32,
        sampler_steps=12,
        generation_batch_size=400,
        energy_batch_size=16,
        energy_updates=5,
    )
    summary = run(module, tmp_path, monkeypatch, edis=block, mixing_ratio=0.3)
    assert summary["score_offline"] > 65 and summary["score_final"] > 85, summary
    metrics = curves.read_csv(folder_of(tmp_path) / "metrics.csv")
    assert metrics["refreshes"][-1] and float(metrics["guided"][-1]) == 1.0
    # Rewards of the toy lie in [-1, 0]; what is generated is near that.
    assert -1.0 < float(metrics["generated_reward"][-1]) < 0.2


def test_a_stop_in_the_middle_of_a_refresh_says_how_it_goes_on(
    tmp_path, monkeypatch, capsys
):
    fields = {**SHORT, "edis": edis_block()}
    whole = run(edis_iql, tmp_path / "a", monkeypatch, **fields)
    advance, count = Generation.advance, []

    def stopping(self):
        count.append(self.phase()[0])
        if len(count) == 24:
            sessions[0].run.stop_requested = True
        return advance(self)

    sessions, keep = [], finetune.Session.between
    with monkeypatch.context() as patch:
        patch.setattr(
            finetune.Session,
            "between",
            lambda self, work: sessions.append(self) or keep(self, work),
        )
        patch.setattr(Generation, "advance", stopping)
        assert run(edis_iql, tmp_path / "b", monkeypatch, **fields) == {}
    assert checkpoint_of(tmp_path / "b")["parts"]["generation"]["fit"] is not None
    assert "saved at step 18; go on with: --resume" in capsys.readouterr().out
    resume = {"resume": str(folder_of(tmp_path / "b"))}
    again = run(edis_iql, tmp_path / "b", monkeypatch, **fields, **resume)
    assert again["score_final"] == whole["score_final"]
    one, two = (checkpoint_of(tmp_path / x)["parts"] for x in "ab")
    assert_equal(one, two)
    assert len(again["work_seconds"]) == len(whole["work_seconds"]) == 3
    out = capsys.readouterr().out
    assert "online step 10: refresh 2: 60 rows, guided" in out


def test_runs_that_share_their_offline_phase_can_share_a_model():
    for base, module in TWINS:
        own = {
            f for f in vars(module.TrainConfig()) if f not in vars(base.TrainConfig())
        }
        assert own == {"edis"} and module.BASELINE == base.__name__.split(".")[-1]
        assert {"edis", "mixing_ratio"} <= module.TrainConfig.ONLINE


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("module", [edis_iql, edis_cal_ql])
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--edis.samples 0", "edis.samples must lie in [1, 1e9], not 0"),
        ("--edis.width 0", "edis.width must lie in"),
        ("--edis.state_scale -1", "edis.state_scale must lie in [0, inf), not -1.0"),
        ("--edis.sampler_steps 1", "edis.sampler_steps must lie in [2, 1e4], not 1"),
        (
            "--edis.energies best",
            "edis.energies 'best' is not one of consistent, public",
        ),
        ("--edis.schedule never", "edis.schedule 'never' is not one of every_update"),
        (
            "--edis.energies public --edis.guidance exact",
            "needs edis.energies consistent",
        ),
        ("--edis.sample 3", "unknown field edis.sample; did you mean edis.samples?"),
        ("--mixing_ratio 1", "mixing_ratio must lie in [0, 1), not 1.0"),
        (
            "--seeds 0,1 --seeds_as stacked",
            "a generator of transitions belongs to one run",
        ),
    ],
)
def test_bad_settings_end_in_one_line(
    module, flags, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError)) as ended:
        module.train(parse_config(module.TrainConfig, flags.split()))
    shown = capsys.readouterr().err or f"error: {ended.value}\n"
    assert words in shown and shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_rows_that_no_machine_holds_are_refused_with_what_fits(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda device: 10_000_000_000)
    block = edis_block(samples=900_000_000)
    config = edis_iql.TrainConfig(edis=block, device="cpu", threads=1, compile=False)
    task = finetune.tasks.task(config.env)
    with pytest.raises(
        ValueError, match=r"^edis.samples 900000000 needs .* GB of memory"
    ):
        finetune.check_memory(config, task)


def test_a_twin_that_compares_offline_rows_refuses_a_share_of_zero():
    from algorithms import dare_iql

    with pytest.raises(ValueError, match="mixing_ratio 0 leaves no offline row"):
        dare_iql.TrainConfig(mixing_ratio=0.0)
    off = dare_iql.DareIQLConfig(enabled=False)
    assert dare_iql.TrainConfig(mixing_ratio=0.0, dare=off).mixing_ratio == 0.0
