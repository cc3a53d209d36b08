"""CFDG: the labelled denoiser, its guidance, who draws what, what is left without it."""

import copy

import numpy as np
import oracle_cfdg
import oracle_edis
import pytest
import torch
import wiring
from helpers import assert_equal, make_buffer
from short_runs import assert_same_weights, cfdg_block, checkpoint_of, folder_of, run
from test_hot_loop import HostReads
from test_wiring import is_row_of, online_rows

from algorithms import cfdg_iql, iql
from corl import curves, finetune, machine
from corl.buffers import JoinedBuffer, MixedBuffer, ReplayBuffer
from corl.config import parse_config
from transition_diffusion.config import CFDG_LOGS, CfdgConfig
from transition_diffusion.denoiser import Denoiser, denoising_losses
from transition_diffusion.fit import DiffusionFit
from transition_diffusion.labelled import (
    NO_LABEL,
    OFFLINE,
    ONLINE,
    LabelledGeneration,
    classifier_free,
)

SHORT = {
    "offline_iterations": 8,
    "online_iterations": 25,
    "eval_freq": 33,
    "n_episodes": 1,
    "log_freq": 1,
    "batch_size": 16,
}
D = 9


def generation(seed=0, **fields):
    """A generation around two buffers of `helpers`, whose rewards say where a row is from."""
    offline, online = make_buffer(50, seed=1), make_buffer(40, shift=0.3, seed=2)
    settings = cfdg_block(**fields)
    rows = [ReplayBuffer(3, 2, count) for count in settings.counts()]
    return LabelledGeneration(
        settings,
        replay=JoinedBuffer(offline, online),
        real=(offline, online),
        generated=rows,
        mixed=MixedBuffer(offline, online, 0.5),
        synthetic=MixedBuffer(*rows, settings.offline_share),
        sizes=(3, 2, 1.0),
        seed=seed,
    )


def finish(made, step=10):
    """Make every piece of the refresh before an online step; returns the phases' names."""
    made.before(step)
    names = []
    while (phase := made.phase()) is not None:
        names.append(phase[0])
        made.advance()
    return names


# ---------------------------------------------------------------- denoiser and guidance


def test_the_labelled_loss_and_the_guided_denoiser_are_those_of_the_formulas():
    torch.manual_seed(0)
    model = Denoiser(D, width=16, depth=2, labels=3)
    p = oracle_edis.double(model.state_dict())
    x, level, noise = torch.randn(6, D), torch.randn(6), torch.randn(6, D)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    losses = denoising_losses(lambda x, s: model(x, s, labels), x, level, noise)
    batch = x.double(), level.double(), noise.double()
    expected = oracle_edis.denoising_loss(p, *batch, labels.tolist())
    assert losses.mean().item() == pytest.approx(float(expected), rel=1e-4)
    sigma = torch.tensor([0.002, 0.1, 1.0, 5.0, 40.0, 80.0])
    for label in (OFFLINE, ONLINE):
        for w in (0.0, 1.0, 2.5):
            found = classifier_free(model, label, w)(x, sigma)
            expected = oracle_cfdg.guided(p, x.double(), sigma.double(), label, w)
            near = {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(found.double(), expected, **near)
    assert (OFFLINE, ONLINE, NO_LABEL) == (
        *(oracle_cfdg.OFFLINE, oracle_cfdg.ONLINE),
        oracle_cfdg.NOTHING,
    )


def test_without_guidance_the_model_is_asked_once_and_with_it_without_a_label_too():
    for w, expected in ((0.0, [1]), (1.0, [1, NO_LABEL])):
        asked = []

        def model(x, sigma, labels, asked=asked):
            asked.append(labels.unique().item())
            return x

        x = torch.randn(4, D)
        found = classifier_free(model, ONLINE, w)(x, torch.ones(4))
        torch.testing.assert_close(found, x)
        assert asked == expected


def test_a_labelled_fit_makes_the_steps_of_the_formulas_and_starts_from_other_weights():
    torch.manual_seed(0)
    first, fit = (DiffusionFit(D, 8, 1, 3e-3, 9, seed=s, labels=3) for s in (1, 2))
    fit.start_from(first.denoiser.state_dict())
    oracle = oracle_edis.OracleFit(first, 3e-3, 9)
    for _ in range(6):
        batch = torch.randn(4, D), torch.randn(4), torch.randn(4, D)
        labels = torch.randint(3, (4,))
        loss = fit.update(*batch, labels)
        assert loss.item() == pytest.approx(oracle.update(*batch, labels.tolist()), 1e-3)
    for name, value in fit.denoiser.state_dict().items():
        near = {"rtol": 1e-3, "atol": 2e-5}
        torch.testing.assert_close(value.double(), oracle.p[name], **near)


# ---------------------------------------------------------------- a refresh


def test_a_refresh_learns_both_buffers_and_makes_rows_of_both_labels():
    made = generation()
    torch.manual_seed(5)
    stream = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert [step for step in range(31) if made.due(step)] == [10, 20, 30]
    names = finish(made)
    assert torch.equal(torch.get_rng_state(), stream[0])
    assert np.array_equal(np.random.get_state()[1], stream[1])
    rows = ["offline-like rows"] + ["online-like rows"] * 2
    assert names == ["diffusion model"] * 15 + rows
    assert [buffer.size for buffer in made.generated] == [12, 48]
    assert set(made.log) == set(CFDG_LOGS) and made.log["refreshes"] == 1.0
    assert all(isinstance(value, float) for value in made.log.values())
    taken = [b.gather(np.arange(b.size)) for b in made.generated]
    s, a, r, _, done = (torch.cat(fields) for fields in zip(*taken, strict=True))
    assert a.abs().max() <= 1.0 and set(done.unique().tolist()) <= {0.0, 1.0}
    assert r.mean().item() == pytest.approx(made.log["generated_reward"], rel=1e-5)
    assert len(s.unique(dim=0)) == 60
    # Guided rows are asked for twice; the model of a later refresh goes on for fewer updates.
    rows = 60 * 9 * 2
    assert made.log["denoiser_rows"] == 3 * 15 * 32 + rows
    before = {k: v.clone() for k, v in made.weights["both"].items()}
    assert finish(made, 20)[:6] == ["diffusion model"] * 5 + ["offline-like rows"]
    assert made.log["denoiser_rows"] == 3 * 5 * 32 + rows and made.count == 2
    moved = (made.weights["both"]["last.weight"] - before["last.weight"]).abs().max()
    assert 0 < moved < 5 * 1e-3, "Adam's five steps at 3e-4 from where the model was"
    state = made.state_dict()
    assert state["fit"] is None and state["samples"] is None


def test_a_batch_of_the_model_has_its_share_of_rows_and_of_dropped_labels():
    made = generation(diffusion_batch_size=4000, online_rows=0.3, label_dropout=0.25)
    events, labels = made._learned("both")
    online = events[:, made.layout.reward] >= 1000
    assert online.sum() == 1200 and not online[:2800].any()
    for label, of in ((OFFLINE, ~online), (ONLINE, online)):
        assert set(labels[of].tolist()) == {label, NO_LABEL}
        dropped = (labels[of] == NO_LABEL).float().mean().item()
        assert dropped == pytest.approx(0.25, abs=0.04)


def test_two_models_without_labels_learn_one_buffer_each():
    made = generation(models="unconditional")
    rows = ["offline-like rows"], ["online-like rows"] * 2
    assert finish(made) == (
        ["diffusion model of offline rows"] * 15
        + rows[0]
        + ["diffusion model of online rows"] * 15
        + rows[1]
    )
    assert set(made.weights) == {"offline", "online"}
    assert "label.weight" not in made.weights["offline"]
    assert made.log["denoiser_rows"] == 2 * 3 * 15 * 32 + 60 * 9
    for name, online in (("offline", False), ("online", True)):
        events, labels = made._learned(name)
        assert labels is None
        assert ((events[:, made.layout.reward] >= 1000) == online).all()


@pytest.mark.parametrize("models, w", [("conditional", 1.0), ("unconditional", 0.0)])
def test_rows_are_like_those_of_their_label(models, w):
    """Rewards of offline rows are below 50, those of online rows above 1000."""
    fields = {"models": models, "guidance": w, "samples": 200, "offline_share": 0.5}
    size = {"width": 64, "diffusion_updates": 150, "diffusion_lr": 5e-3}
    made = generation(**fields, **size, diffusion_batch_size=128, sampler_steps=12)
    finish(made)
    offline, online = (b.gather(np.arange(100))[2] for b in made.generated)
    assert (offline < 500).float().mean() > 0.9 and (online > 500).float().mean() > 0.9


@pytest.mark.parametrize("models", ["conditional", "unconditional"])
@pytest.mark.parametrize("stop", [0, 1, 5, 7])
def test_a_refresh_goes_on_to_the_bit_from_any_piece(stop, models):
    """The seed of the copy is another: everything comes from the state."""
    whole, made = generation(models=models), generation(models=models)
    finish(whole)
    finish(whole, 20)
    finish(made)
    made.before(20)
    for _ in range(stop):
        made.advance()
    resumed = generation(seed=9, models=models)
    resumed.load_state_dict(copy.deepcopy(made.state_dict()))
    finish(resumed, 20)
    assert_equal(whole.state_dict(), resumed.state_dict())
    for one, two in zip(whole.generated, resumed.generated, strict=True):
        assert_equal(one.gather(np.arange(12)), two.gather(np.arange(12)))


def test_the_estimate_counts_refreshes_of_which_the_first_is_longer():
    made = generation(diffusion_updates=1000)
    before = copy.deepcopy(made.state_dict())

    def seconds_of(work):
        work()
        return 1.0

    found = made.estimate_online(seconds_of, first=0, last=31)
    rows = 3 * 60 * 9 / (2 * 25)  # a step of the sampler asks for 25 rows twice
    assert found == {"3 refreshes": pytest.approx(1000 + 2 * 5 + rows)}
    assert_equal(before, made.state_dict())
    made.count = 1
    later = made.estimate_online(seconds_of, first=11, last=31)
    assert later == {"2 refreshes": pytest.approx(2 * 5 + rows * 2 / 3)}
    assert made.estimate_online(seconds_of, first=31, last=40) == {}


def test_the_share_of_the_defaults_arithmetic_knows_the_controls():
    assert CfdgConfig().share_of_published() == 1.0
    sampled, learned = 200_000 * 255, 3 * 20_000 * 256
    whole = 2 * sampled + learned
    plain = CfdgConfig(guidance=0.0).share_of_published()
    assert plain == pytest.approx((sampled + learned) / whole)
    two = CfdgConfig(models="unconditional").share_of_published()
    assert two == pytest.approx((sampled + 2 * learned) / whole)


# ---------------------------------------------------------------- who draws what


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return wiring.Recorder(lambda: tmp_path_factory.mktemp("run"))


def test_batches_have_four_parts_once_there_are_generated_rows(recorded):
    record = recorded("cfdg_iql")
    offline = {k: rows[: wiring.ROWS] for k, rows in record.stored("offline").items()}
    online, updates = online_rows(record), record.of("update")
    block = record.config.cfdg
    shares = block.synthetic_ratio, block.offline_share, record.config.mixing_ratio
    parts = oracle_cfdg.parts(16, *shares)
    assert parts == (2, 8, 1, 5)
    for number, update in enumerate(updates):
        real = is_row_of(update.batch, offline)
        collected = is_row_of(update.batch, online)
        # Refreshes come before the online steps 6 and 12, two of the steps only collect.
        if number < 7:
            expected = [True] * 16, [False] * 16
        elif number < 7 + 2 * (6 - 2):
            expected = [True] * 4 + [False] * 12, [False] * 4 + [True] * 12
        else:
            expected = [
                [i in range(*ends) for i in range(16)] for ends in ((0, 2), (2, 10))
            ]
        assert (real.tolist(), collected.tolist()) == (expected[0], expected[1])
    last = [field[10:] for field in updates[-1].batch]
    for place, where in ((2, slice(0, 1)), (3, slice(1, 6))):
        rows = record.buffers[place].rows()
        names = "observations actions rewards next_observations terminals".split()
        stored = dict(zip(names, (x.numpy() for x in rows), strict=True))
        assert is_row_of([field[where] for field in last], stored).all()


def test_the_papers_batch_is_a_third_of_each_and_the_generated_third_is_8_to_2():
    made = generation(synthetic_ratio=1 / 3, offline_share=0.2, samples=60)
    finish(made)
    made.synthetic.sample = lambda n: seen.append(n) or [torch.zeros(n, 1)]
    seen = []
    made.mixed.sample = lambda n: seen.append(n) or [torch.zeros(n, 1)]
    assert len(made.sample(256)[0]) == 256 and seen == [171, 85]
    assert oracle_cfdg.parts(256, 1 / 3, 0.2, 0.5) == (85, 86, 17, 68)


def test_a_draw_and_an_update_read_nothing_on_the_host():
    made = generation()
    finish(made)
    trainer = cfdg_iql.make_trainer(
        cfdg_iql.TrainConfig(threads=1, compile=False), 3, 2, 1.0, "cpu"
    )
    with HostReads() as reads:
        trainer.train(made.sample(32))
    assert reads.calls == []


# ---------------------------------------------------------------- whole runs


def test_without_generated_rows_it_is_iql_on_half_and_half(tmp_path, monkeypatch):
    """To the bit: no synthetic share, and a refresh that never comes."""
    run(iql, tmp_path / "a", monkeypatch, **SHORT, mixing_ratio=0.5)
    for name, fields in (("b", {"synthetic_ratio": 0.0}), ("c", {"refresh_every": 99})):
        block = cfdg_block(**fields)
        summary = run(cfdg_iql, tmp_path / name, monkeypatch, **SHORT, cfdg=block)
        assert_same_weights(tmp_path / "a", tmp_path / name)
        assert "work_seconds" not in summary
    run(cfdg_iql, tmp_path / "d", monkeypatch, **SHORT, cfdg=cfdg_block())
    actors = [checkpoint_of(tmp_path / x)["parts"]["trainer"]["actor"] for x in "ad"]
    assert any(not torch.equal(actors[0][k], actors[1][k]) for k in actors[0])


@pytest.mark.narrow(64)
def test_it_learns_with_generated_rows(tmp_path, monkeypatch):
    """The toy: 0 is standing still, 100 the optimum."""
    block = cfdg_block(
        refresh_every=200,
        samples=300,
        diffusion_updates=200,
        refresh_updates=50,
        diffusion_lr=5e-3,
        width=32,
        sampler_steps=10,
        generation_batch_size=300,
    )
    summary = run(cfdg_iql, tmp_path, monkeypatch, cfdg=block, n_episodes=10)
    assert summary["score_offline"] > 65 and summary["score_final"] > 85, summary
    metrics = curves.read_csv(folder_of(tmp_path) / "metrics.csv")
    assert float(metrics["refreshes"][-1]) == 2.0 and len(summary["work_seconds"]) == 2
    # Rewards of the toy lie in [-1, 0]; what is generated is near that.
    assert -1.0 < float(metrics["generated_reward"][-1]) < 0.2


def test_it_can_share_the_offline_model_of_iql():
    own = {f for f in vars(cfdg_iql.TrainConfig()) if f not in vars(iql.TrainConfig())}
    assert own == {"cfdg"} and cfdg_iql.BASELINE == "iql"
    assert {"cfdg", "mixing_ratio"} <= cfdg_iql.TrainConfig.ONLINE
    assert cfdg_iql.TrainConfig().mixing_ratio == 0.5


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--cfdg.samples 2", "cfdg.samples 2 leaves no offline-like row"),
        ("--cfdg.synthetic_ratio 1.5", "cfdg.synthetic_ratio must lie in [0, 1]"),
        ("--cfdg.online_rows 1", "cfdg.online_rows must lie in (0, 1), not 1.0"),
        ("--cfdg.guidance -1", "cfdg.guidance must lie in [0, inf), not -1.0"),
        ("--cfdg.label_dropout 0", "needs cfdg.label_dropout above 0"),
        ("--cfdg.diffusion_batch_size 1", "leave no row of one label"),
        ("--cfdg.models three", "cfdg.models 'three' is not one of conditional, uncon"),
        ("--cfdg.sample 3", "unknown field cfdg.sample; did you mean cfdg.samples?"),
        ("--mixing_ratio 1", "mixing_ratio must lie in [0, 1), not 1.0"),
        ("--seeds 0,1 --seeds_as stacked", "a generator of transitions belongs to one"),
    ],
)
def test_bad_settings_end_in_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError)) as ended:
        cfdg_iql.train(parse_config(cfdg_iql.TrainConfig, flags.split()))
    shown = capsys.readouterr().err or f"error: {ended.value}\n"
    assert words in shown and shown.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_rows_that_no_machine_holds_are_refused_with_what_fits(monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda device: 10_000_000_000)
    block = cfdg_block(samples=900_000_000)
    config = cfdg_iql.TrainConfig(cfdg=block, device="cpu", threads=1, compile=False)
    with pytest.raises(ValueError, match=r"^cfdg.samples 900000000 needs .* GB"):
        finetune.check_memory(config, finetune.tasks.task(config.env))
