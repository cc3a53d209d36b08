"""What passes between the parts of a run: DARE's side, in both files and in patched CORL."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import wiring
from kinds import one_of_each_kind
from wiring import networks_of

from corl_dare.exchange import alignment_score, exchange, reorder

pytestmark = pytest.mark.narrow(16)
NAMES = wiring.DARE
SOFT = {"dare": {"weights": "soft", "cap": None}}
OTHER = {
    "dare": {
        "rule": "posterior",
        "cap": 3,
        "skip_inverted": True,
        "alignment": "kernel",
        "alignment_sigma": 1.5,
    }
}
RATIO = {
    "score": "policy_ratio",
    "behavior": "gaussian",
    "guidance_scale": 0.0,
    "rule": "share",
}
N_OFFLINE = 4  # of 16 rows


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return wiring.Recorder(lambda: tmp_path_factory.mktemp("run"))


both = pytest.mark.parametrize("name", NAMES)
patched_too = pytest.mark.parametrize("patched", [False, True])
with_patch = pytest.mark.parametrize("name", wiring.PATCHED)
WAYS = [(False, name) for name in NAMES] + [(True, name) for name in wiring.PATCHED]
every_way = pytest.mark.parametrize("patched, name", WAYS)
# For settings that need a run of their own.
one_of_a_kind = pytest.mark.parametrize("patched, name", one_of_each_kind(WAYS, by=1))


def online_updates(record):
    return [u for u in record.of("update") if u.weight is not None]


def calls(update, name, width=None):
    """Inputs and outputs of a network in an update; of actions (..., width, A) if given."""
    found = [(args, out) for called, args, out in update.calls if called == name]
    if width is not None:
        found = [(a, o) for a, o in found if len(a) > 1 and a[1].shape[-2] == width]
    return found


def raw(record, states):
    return record.raw(torch.as_tensor(states))


# ---------------------------------------------------------------- the behavior model


@every_way
def test_the_behavior_model_is_fitted_on_the_datasets_raw_rows(name, patched, recorded):
    record = recorded(name, patched=patched)
    (fit,) = record.of("fit")
    torch.testing.assert_close(
        fit.states, torch.tensor(record.arrays["observations"]), atol=1e-4, rtol=1e-5
    )
    assert torch.equal(fit.actions, torch.tensor(record.arrays["actions"]))
    dare = record.config.dare
    expected = {
        "updates": dare.behavior_updates,
        "batch_size": dare.behavior_batch_size,
        "lr": dare.behavior_lr,
        "seed": record.config.seed,
        "options": {"width": dare.behavior_width},
    }
    assert {k: fit.settings[k] for k in expected} == expected
    assert fit.behavior == "diffusion"
    assert str(fit.settings["cache_dir"]).endswith("/cache/behavior")
    first = next(e for e in record.events if e.kind in ("fit", "update", "step"))
    assert first is fit, "everything else comes after it"


@with_patch
def test_the_cache_of_the_behavior_model_knows_the_data(name, recorded):
    assert recorded(name).of("fit")[0].settings["dataset_hash"] == "toy-data"
    record = recorded(name, patched=True)
    data = record.arrays
    states = ((data["observations"] - record.mean) / record.std).astype(np.float32)
    digest = hashlib.sha256(states.tobytes() + data["actions"].tobytes())
    assert record.of("fit")[0].settings["dataset_hash"] == digest.hexdigest()


# ---------------------------------------------------------------- scores and the exchange


def references_of(record, update):
    """The behavior model's answer that decided the batch of an update."""
    before = record.events[: record.events.index(update)]
    return next(
        e for e in reversed(before) if e.kind in ("behavior", "density") and unlike(e)
    )


def unlike(event):
    """Not the support actions of the energy, which are three and not guided."""
    return event.kind == "density" or event.n != 3


def key_of(state):
    """Names a raw state; no two of the toy are so near."""
    return tuple(np.asarray(state).round(2).tolist())


def drawn(record, states):
    """Rows as drawn: from the buffers by their states, offline half first."""
    where = {}
    for which in ("offline", "online"):
        buffer = record.buffers[0 if which == "offline" else -1]
        for i, state in enumerate(raw(record, buffer._states[: buffer._size])):
            where[key_of(state)] = (buffer, i)
    rows = [where[key_of(state)] for state in states]
    assert [b is record.buffers[0] for b, _ in rows] == [True] * 4 + [False] * 12
    fields = ("_states", "_actions", "_rewards", "_next_states", "_dones")
    return [torch.stack([getattr(b, f)[i] for b, i in rows]) for f in fields]


@every_way
def test_references_are_guided_samples_at_the_raw_states_as_drawn(
    name, patched, recorded
):
    record = recorded(name, patched=patched)
    dare = record.config.dare
    for update in online_updates(record):
        event = references_of(record, update)
        assert event.scale == dare.guidance_scale and event.n == dare.references
        assert event.steps == dare.sampler_steps
        drawn(record, event.states)  # offline rows first
    supports = [e for e in record.of("behavior") if not unlike(e)]
    assert supports and all(e.scale == 0 for e in supports)
    assert all(e.steps == dare.sampler_steps for e in supports)


@pytest.mark.parametrize(
    "patched, name, options",
    [
        *((*way, {}) for way in WAYS),
        *one_of_each_kind([(*way, x) for way in WAYS for x in (SOFT, OTHER)], by=1),
    ],
)
def test_the_batch_is_the_exchange_of_the_rows_as_drawn(
    name, options, patched, recorded
):
    record = recorded(name, patched=patched, **options)
    dare = record.config.dare
    bound, moved = (1.0 if patched and name != "dare_iql" else wiring.MAX_ACTION), 0
    for update in online_updates(record):
        event = references_of(record, update)
        rows = drawn(record, event.states)
        clipped = event.out.clamp(-bound, bound)
        scores = alignment_score(rows[1], clipped, dare.alignment, dare.alignment_sigma)
        result = exchange(
            scores[:N_OFFLINE],
            scores[N_OFFLINE:],
            cap=dare.cap,
            rule=dare.rule,
            weights=dare.weights,
            skip_inverted=dare.skip_inverted,
        )
        moved += int(result.stats["exchanged"])
        for found, expected in zip(
            update.batch, reorder(rows, result.order), strict=False
        ):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(update.weight, result.weight)
    assert moved > 0


@both
def test_references_beyond_the_bounds_are_clipped_and_counted(name, recorded):
    record = recorded(name)
    rows = [r for r in record.rows_of("metrics.csv") if r["references_clipped"]]
    assert rows
    for row in rows:
        count = 2 * (int(row["step"]) - 9)
        event = references_of(record, online_updates(record)[count - 1])
        outside = (event.out.abs() > wiring.MAX_ACTION).float().mean().item()
        assert float(row["references_clipped"]) == pytest.approx(outside)
    assert max(float(r["references_clipped"]) for r in rows) > 0


@every_way
def test_the_policy_ratio_compares_densities_of_what_is_executed(
    name, patched, recorded
):
    """Who clips what is executed has atoms at the bounds in both densities; a tanh has none."""
    record = recorded(name, patched=patched, dare=RATIO)
    means = []
    for update in online_updates(record):
        event = references_of(record, update)
        clips = name not in (*wiring.CQL, "dare_wsrl")
        assert event.bounds == ((wiring.MAX_ACTION,) if clips else ())
        rows = drawn(record, event.states)
        torch.testing.assert_close(event.actions, rows[1])
        scores = event.policy - event.out
        means.append(
            [scores[:N_OFFLINE].mean().item(), scores[N_OFFLINE:].mean().item()]
        )
        result = exchange(
            scores[:N_OFFLINE],
            scores[N_OFFLINE:],
            cap=record.config.dare.cap,
            rule="share",
        )
        expected = reorder(rows, result.order)
        torch.testing.assert_close(update.batch[1], expected[1])
    assert not record.of("energy")
    logged = [] if patched else record.rows_of("metrics.csv")
    logged = [row for row in logged if row["score_off_mean"]]
    assert patched or len(logged) == 6
    for row in logged:
        found = [float(row[f"score_{half}_mean"]) for half in ("off", "on")]
        expected = means[2 * (int(row["step"]) - 9) - 1]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


# ---------------------------------------------------------------- which rows carry what


@every_way
def test_hard_weights_are_one_for_the_offline_half_and_zero_after(
    name, patched, recorded
):
    expected = torch.tensor([1.0] * N_OFFLINE + [0.0] * 12)
    record = recorded(name, patched=patched)
    updates = online_updates(record)
    assert len(updates) == (6 if patched else 28)
    for update in updates:
        assert torch.equal(update.weight, expected) and update.kept == N_OFFLINE
    offline = [u for u in record.of("update") if u.weight is None]
    assert len(offline) == (0 if patched else 7)


@one_of_a_kind
def test_soft_weights_lie_between_and_skip_no_row(name, patched, recorded):
    weights = []
    for update in online_updates(recorded(name, patched=patched, **SOFT)):
        assert update.kept is None
        weights.append(update.weight)
    weights = torch.cat(weights)
    assert ((weights > 0) & (weights < 1)).float().mean() > 0.5


def test_rows_keep_their_trust_wherever_the_exchange_puts_them(recorded):
    """CQL(SA)'s flags of the dataset's rows; all rows that come online are trusted."""
    record = recorded("dare_cql_sa")
    flags = record.parts()["parts"]["trusted_rows"]["flags"].tolist()
    states = raw(record, record.stored("offline")["observations"])
    trusted = dict(zip(map(key_of, states), flags, strict=True))
    moved = 0
    for update in online_updates(record):
        keys = map(key_of, raw(record, update.batch[0]))
        expected = torch.tensor([float(trusted.get(key, True)) for key in keys])
        assert torch.equal(update.batch[5][:, 0], expected)
        moved += int((expected[N_OFFLINE:] == 0).sum())
    assert moved > 0


def gap_of(update, number, kept):
    """Soft maximum (kept,) and Q of the data (B,) from what the networks answered."""
    *_, (_, (_, current_log_pi)), (_, (_, next_log_pi)) = calls(update, "actor")
    rand, current, following = (out for _, out in calls(update, f"critic_{number}", 3))
    if update.calibrated:
        bounds = update.batch[5][:kept]
        current, following = (torch.maximum(q, bounds) for q in (current, following))
    uniform = np.log(0.5**2)
    proposed = (rand - uniform, current - current_log_pi, following - next_log_pi)
    predicted = [out for _, out in calls(update, f"critic_{number}", 16)][-1]
    return torch.cat(proposed, 1).logsumexp(1), predicted


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("options", [{}, SOFT["dare"]])
def test_the_conservative_gap_of_cal_ql_is_that_of_the_kept_rows(
    keep, options, recorded
):
    dare = {**options, "keep_calibration": keep}
    record = recorded("dare_cal_ql", dare=dare, **CLIPPED)
    low, high = CLIPPED["cql_clip_diff_min"], CLIPPED["cql_clip_diff_max"]
    reached = []
    for update in online_updates(record):
        assert update.calibrated is keep
        rows = 16 if options else N_OFFLINE
        for number in (1, 2):
            given = [args[0] for args, _ in calls(update, f"critic_{number}", 3)]
            assert len(given) == 3
            for states in given:
                assert torch.equal(states, update.batch[0][:rows])
            soft, predicted = gap_of(update, number, rows)
            gap = (soft - predicted[:rows]).clamp(low, high)
            reached += [gap.min(), gap.max()]
            expected = (gap * update.weight[:rows]).sum() / 16
            found = update.logs[f"cql_qf{number}_diff"]
            assert found == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
            scale = record.config.cql_alpha_online
            penalty = update.logs[f"cql_min_qf{number}_loss"]
            assert penalty == pytest.approx(scale * found, rel=1e-5)
    assert min(reached) < max(reached)


CLIPPED = {"cql_clip_diff_min": -50.0, "cql_clip_diff_max": 500.0}


def test_the_proposals_of_cal_ql_come_from_the_kept_states(recorded):
    for update in online_updates(recorded("dare_cal_ql")):
        proposals = [args[0] for args, out in calls(update, "actor") if out[0].ndim == 3]
        current, following = proposals
        assert torch.equal(current, update.batch[0][:N_OFFLINE])
        assert torch.equal(following, update.batch[3][:N_OFFLINE])


def noise_of(update):
    """The draws of an update: one sample for the policy loss, three for the backup."""
    generator = torch.Generator()
    generator.set_state(update.stream)
    return torch.randn(4, 16, 2, generator=generator)


@pytest.mark.parametrize("options", [{}, SOFT])
@patched_too
def test_released_rows_of_iql_have_the_maximum_over_the_policys_actions(
    options, patched, recorded
):
    record = recorded("dare_iql", patched=patched, **options)
    for update in online_updates(record):
        first = 0 if options else N_OFFLINE
        _, _, rewards, following, dones = update.batch
        released = 16 - first
        (whole, _), (given, q) = calls(update, "q_target")
        assert len(q) == 3 * released and len(whole[0]) == 16
        assert torch.equal(given[0], following[first:].repeat(3, 1))
        mean, std = calls(update, "actor")[0][1]
        actions = mean + std * noise_of(update)[1:, first:]
        actions = actions.clamp(-wiring.MAX_ACTION, wiring.MAX_ACTION)
        torch.testing.assert_close(given[1], actions.flatten(0, 1))
        best = F.pad(q.view(3, released).amax(0), (first, 0))
        next_v = calls(update, "vf")[0][1]
        assert torch.equal(calls(update, "vf")[0][0][0], following)
        value = update.weight * next_v + (1 - update.weight) * best
        y = rewards[:, 0] + (1 - dones[:, 0]) * record.config.discount * value
        losses = [F.mse_loss(calls(update, q)[0][1], y) for q in ("q1", "q2")]
        assert update.logs["q_loss"] == pytest.approx(float(sum(losses)) / 2, rel=1e-4)


@pytest.mark.parametrize("options", [{}, SOFT])
@patched_too
def test_released_rows_of_iql_have_the_sac_policy_loss(options, patched, recorded):
    record = recorded("dare_iql", patched=patched, **options)
    config = record.config
    for update in online_updates(record):
        first = 0 if options else N_OFFLINE
        states, actions = update.batch[:2]
        given, (mean, std) = calls(update, "actor")[-1]
        assert torch.equal(given[0], states)
        policy = torch.distributions.Normal(mean, std)
        ((on, acted), q) = calls(update, "qf")[0]
        assert torch.equal(on, states[first:]) and len(calls(update, "qf")) == 1
        sample = mean + std * noise_of(update)[0]
        bounded = sample.clamp(-wiring.MAX_ACTION, wiring.MAX_ACTION)
        torch.testing.assert_close(acted, bounded[first:])
        log_pi = policy.log_prob(sample).sum(-1)
        free = F.pad(config.dare.entropy_alpha * log_pi[first:] - q, (first, 0))
        target_q, v = calls(update, "q_target")[0][1], calls(update, "vf")[1][1]
        factor = (config.beta * (target_q - v)).exp().clamp(max=100)
        cloned = factor * -policy.log_prob(actions).sum(-1)
        loss = (update.weight * cloned + (1 - update.weight) * free).mean()
        assert update.logs["actor_loss"] == pytest.approx(loss.item(), rel=1e-4)


@every_way
def test_the_stream_of_released_losses_begins_at_the_seed(name, patched, recorded):
    record = recorded(name, patched=patched)
    seed = record.config.seed
    if name == "dare_iql" or patched:
        stream = torch.Generator().manual_seed(seed).get_state()
        assert torch.equal(online_updates(record)[0].stream, stream)


@both
def test_with_dare_off_a_run_is_the_baseline_to_the_bit(name, recorded):
    record = recorded(name, dare={"enabled": False})
    assert not (record.of("fit") or record.of("energy") or online_updates(record))
    own = {"seed": record.config.seed, **wiring.OWN.get(name, {})}
    baseline = recorded(name.removeprefix("dare_"), **own)
    for key, value in networks_of(baseline.trainer).items():
        mine = networks_of(record.trainer)[key].state_dict()
        for part, tensor in value.state_dict().items():
            assert torch.equal(tensor, mine[part]), (key, part)


@both
def test_the_summary_has_the_mean_number_of_exchanges(name, recorded):
    record = recorded(name)
    found = [r["exchanged"] for r in record.rows_of("metrics.csv") if r["exchanged"]]
    mean = np.mean([float(x) for x in found])
    assert record.summary["exchanges_mean"] == pytest.approx(mean)


# ---------------------------------------------------------------- the energy


@every_way
def test_the_energy_is_trained_before_the_online_phase_on_offline_rows(
    name, patched, recorded
):
    record = recorded(name, patched=patched)
    dare, kinds = record.config.dare, [e.kind for e in record.events]
    energies = record.of("energy")
    assert len(energies) == 4 + (2 if patched else 14)
    before = energies[: dare.energy_updates]
    offline = record.arrays["observations"]
    for event in before:
        assert len(event.states) == dare.energy_batch_states
        gaps = np.abs(event.states.numpy()[:, None] - offline[None]).max(-1).min(1)
        assert gaps.max() < 1e-4
    first_online = next(
        i
        for i, e in enumerate(record.events)
        if (e.kind == "step" and e.role == "train")
        or (e.kind == "update" and e.weight is not None)
    )
    assert kinds[:first_online].count("energy") == dare.energy_updates
    if not patched:
        done = [i for i, e in enumerate(record.events) if e is before[0]][0]
        assert kinds[:done].count("update") == 7


@every_way
def test_the_energy_follows_every_second_update_on_its_rows(name, patched, recorded):
    record = recorded(name, patched=patched)
    online = [
        e
        for e in record.events
        if e.kind == "energy" or (e.kind == "update" and e.weight is not None)
    ][record.config.dare.energy_updates :]
    kinds = [e.kind for e in online]
    # In patched CORL the hook sees the end of an update at the next sample.
    turns = ["update", "update", "energy"] * (3 if patched else 14)
    assert kinds == (turns[:-1] if patched else turns)
    for before, event in zip(online, online[1:], strict=False):
        if event.kind == "energy":
            assert len(event.states) == record.config.dare.energy_batch_states
            batch = raw(record, before.batch[0])
            gaps = (event.states[:, None] - batch[None]).abs().amax(-1)
            nearest = gaps.argmin(1)
            assert gaps.amin(1).max() < 1e-4, "rows of another batch"
            # States as drawn: a row may have been drawn twice, so may be its state.
            assert len(set(nearest.tolist())) > 1


@every_way
def test_the_energy_is_given_raw_states_and_scaled_q_of_the_targets(
    name, patched, recorded
):
    """`test_q_scale...` say which scale."""
    record = recorded(name, patched=patched)
    scale = expected_scale(record, patched)
    differs = 0
    for event in record.of("energy"):
        assert event.network == "EnergyNetwork"
        assert event.beta == record.config.dare.energy_beta
        torch.testing.assert_close(event.q, scale * event.target_q, rtol=2e-3, atol=2e-3)
        differs += not torch.allclose(event.q, scale * event.online_q, rtol=1e-2)
        assert event.support.shape == (6, 3, 2)
        assert (event.states[:, 0] - 50).abs().max() < 31
    assert differs > 1


@every_way
def test_every_energy_step_is_one_of_adam_on_the_gradient_of_its_loss(
    name, patched, recorded
):
    record = recorded(name, patched=patched)
    first, *later = record.of("energy")
    weights = [torch.nn.Parameter(w.clone()) for w in first.weights]
    optimizer = torch.optim.Adam(weights, lr=record.config.dare.energy_lr)
    for before, after in zip([first, *later], later, strict=False):
        for weight, gradient in zip(weights, before.gradient, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
        for weight, expected in zip(weights, after.weights, strict=True):
            torch.testing.assert_close(weight.detach(), expected, atol=1e-6, rtol=1e-4)


def expected_scale(record, patched):
    if patched:
        return 1000.0 / 4.0
    # Rewards as trained on; episodes end at the horizon here.
    data = record.stored("offline")
    arrays = {
        key: data[key][: wiring.ROWS, 0].astype(np.float64)
        for key in ("rewards", "terminals")
    }
    returns, _ = wiring.episodes_of(arrays)
    return 1000.0 / (returns.max() - returns.min())


@one_of_a_kind
def test_q_of_a_goal_task_is_scaled_by_its_rewards_alone(name, patched, recorded):
    fields = {"reward_scale": 4.0} if patched else {}
    record = recorded(name, patched=patched, env=wiring.GOAL, **fields)
    scale = 0.25 if patched else 1 / getattr(record.config, "reward_scale", 1.0)
    for event in record.of("energy"):
        torch.testing.assert_close(event.q, scale * event.target_q, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", one_of_each_kind(NAMES))
def test_literal_q_is_not_scaled(name, recorded):
    for event in recorded(name, dare={"q_scale": "literal"}).of("energy"):
        torch.testing.assert_close(event.q, event.target_q, rtol=1e-3, atol=1e-3)


@every_way
def test_support_actions_are_drawn_once_for_each_transition(name, patched, recorded):
    record = recorded(name, patched=patched)
    made = {}  # state -> number of the draw, its actions (a row may stand in it twice)
    for number, event in enumerate(record.of("behavior")):
        if not unlike(event):
            for state, actions in zip(event.states, event.out, strict=True):
                draw, answers = made.setdefault(key_of(state), (number, []))
                assert draw == number, "drawn again"
                answers.append(actions)
    seen = 0
    for event in record.of("energy"):
        for state, actions in zip(event.states, event.support, strict=True):
            assert any(torch.equal(x, actions) for x in made[key_of(state)][1])
            seen += 1
    assert len(made) < seen, "no row came again"


@pytest.mark.parametrize("name", one_of_each_kind(NAMES))
def test_cached_references_serve_as_long_as_they_may(name, recorded):
    """With an age, a row's references are drawn again after so many batches, not before."""
    age = 3
    record = recorded(name, dare={"reference_max_age": age})
    made, asked = {}, 0
    events, update_number = record.events, 0
    for event in events:
        if event.kind == "update" and event.weight is not None:
            update_number += 1
        if event.kind == "behavior" and unlike(event):
            for state in event.states:
                key = key_of(state)
                if (
                    made.get(key, -age) != update_number
                ):  # twice in one batch is one draw
                    assert update_number - made.get(key, -age) >= age
                made[key] = update_number
                asked += 1
    assert len(made) < asked < 28 * 16


# ---------------------------------------------------------------- the hook in patched CORL


@with_patch
def test_a_patched_script_trains_without_the_hook_when_dare_is_off(name, recorded):
    record = recorded(name, patched=True, dare={"enabled": False})
    assert record.hook is None and not record.of("fit")
    assert record.trainer.dare is record.config.dare
    stream = torch.Generator().manual_seed(record.config.seed).get_state()
    assert torch.equal(record.trainer.dare_generator.get_state(), stream)


@with_patch
def test_a_patched_script_fills_the_online_buffer_through_the_hook(name, recorded):
    record = recorded(name, patched=True)
    offline, online = record.buffers
    assert (offline._size, online._size) == (wiring.ROWS, 6)


# ---------------------------------------------------------------- calibration kept online


def test_kept_calibration_goes_on_online(recorded):
    record = recorded("dare_cal_ql", dare={"keep_calibration": True})
    assert {u.calibrated for u in record.of("update")} == {True}
    # Online rows bring no bound, wherever the exchange puts them.
    for update in online_updates(record):
        assert update.batch[5].isinf().sum() == 12
