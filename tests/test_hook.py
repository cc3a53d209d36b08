"""The hook: rows kept whole, private randomness, caches with a bounded age, exact resume."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import A, S, make_buffer, make_hook
from hypothesis import given, settings
from hypothesis import strategies as st

from corl.progress import progress_bar
from corl_dare.behavior import make_behavior_model
from corl_dare.config import DareConfig
from corl_dare.hook import (
    DareHook,
    clipped_log_prob,
    energy_q_scale,
    fit_behavior,
    prepare,
)
from corl_dare.rows import SlotCache, draw
from corl_dare.upstream import ExchangedBuffer


def stacked_rows(hook, seed, n):
    """The rows that the buffers give for a seed, offline first."""
    np.random.seed(seed)
    offline, online = hook.offline.sample(n), hook.online.sample(n)
    return [torch.cat(x) for x in zip(offline, online, strict=True)]


def test_a_cap_of_zero_returns_the_buffers_rows_untouched():
    hook = make_hook(score="likelihood", cap=0)
    np.random.seed(3)
    drawn = hook.sample(16)
    expected = stacked_rows(hook, 3, 8)
    assert all(torch.equal(x, y) for x, y in zip(drawn.batch, expected, strict=True))
    assert torch.equal(drawn.release.weight, (torch.arange(16) < 8).float())
    assert drawn.release.kept == 8 and drawn.log["exchanged"] == 0


def test_what_was_drawn_is_told_as_it_was_before_the_exchange():
    """States and row numbers belong together, whatever the exchange moved."""
    hook = make_hook(score="policy_ratio")
    np.random.seed(0)
    drawn = hook.sample(32)
    assert drawn.log["exchanged"] > 0
    assert torch.equal(drawn.states, stacked_rows(hook, 0, 16)[0])
    buffers = zip((hook.offline, hook.online), drawn.rows, strict=True)
    states = torch.cat([buffer._states[torch.from_numpy(n)] for buffer, n in buffers])
    assert torch.equal(drawn.states, states)
    assert not torch.equal(drawn.batch[0], states)
    assert hook.samples == 1


@pytest.mark.parametrize("ratio, n_offline", [(0.5, 8), (0.25, 4), (0.75, 12)])
def test_the_mixing_ratio_says_how_many_rows_are_kept(ratio, n_offline):
    hook = make_hook(score="likelihood")
    hook.mixing_ratio = ratio
    drawn = hook.sample(16)
    assert drawn.release.kept == len(drawn.rows[0]) == n_offline
    assert drawn.release.weight.sum() == n_offline


def test_soft_weights_keep_no_row_for_certain():
    drawn = make_hook(score="likelihood", weights="soft").sample(16)
    assert drawn.release.kept is None
    assert ((drawn.release.weight > 0) & (drawn.release.weight < 1)).any()


@pytest.mark.parametrize("score", ["reference", "likelihood", "policy_ratio"])
def test_exchange_permutes_whole_rows(score):
    hook = make_hook(score=score)
    np.random.seed(0)
    drawn = hook.sample(32)
    batch, weight, log = drawn.batch, drawn.release.weight, drawn.log
    stacked = stacked_rows(hook, 0, 16)
    # the reward names the row: match rows by it, then every field must have moved along
    order = [stacked[2][:, 0].tolist().index(r) for r in batch[2][:, 0].tolist()]
    for moved, field in zip(batch, stacked, strict=True):
        assert torch.equal(moved, field[order])
    assert sorted(batch[2][:, 0].tolist()) == sorted(stacked[2][:, 0].tolist())
    assert torch.equal(weight, torch.tensor([1.0] * 16 + [0.0] * 16))
    swapped = (torch.tensor(order[:16]) >= 16).sum()
    assert log["exchanged"] == swapped


def test_policy_ratio_is_log_policy_minus_log_behavior_on_raw_states():
    hook = make_hook(score="policy_ratio")
    states, actions = torch.randn(5, S), torch.rand(5, A)
    scores, _ = hook.score(states, actions, [None, None])
    log_nu = hook.behavior.log_prob(states * 2.0 + 0.5, actions)
    expected = -((actions - 0.8) ** 2).sum(1) - log_nu
    torch.testing.assert_close(scores, expected)


def test_a_clipped_policy_equal_to_the_behavior_has_ratio_0_everywhere():
    hook = make_hook("gaussian", score="policy_ratio")

    def policy(states):
        _, mean, log_std = hook.behavior.distribution(hook.unnormalize(states))
        return torch.distributions.Normal(mean[:, 0], log_std[:, 0].exp())

    hook.clipped_policy, hook.policy_log_prob = True, clipped_log_prob(policy, 1.0)
    states = torch.randn(200, S, generator=torch.Generator().manual_seed(0))
    actions = policy(states).sample().clamp(-1, 1)
    assert (actions.abs() == 1).any(1).float().mean() > 0.1
    scores, _ = hook.score(states, actions, [None, None])
    torch.testing.assert_close(scores, torch.zeros(200), atol=1e-4, rtol=0)


def test_a_clipped_action_is_judged_by_the_mass_beyond_the_bound():
    """A policy around 0.9 acts at the bound often, the behavior around 0 hardly ever."""
    hook = make_hook("gaussian", score="policy_ratio")
    shape = (1, 1, A)
    hook.behavior.distribution = lambda states: (
        torch.zeros(1, 1),
        torch.zeros(shape),
        torch.full(shape, math.log(0.3)),
    )
    normal = torch.distributions.Normal(torch.full((1, A), 0.9), 0.3)
    hook.clipped_policy = True
    hook.policy_log_prob = clipped_log_prob(lambda states: normal, 1.0)
    action = torch.full((1, A), 0.95)
    action[0, 0] = 1.0
    (score,), _ = hook.score(torch.zeros(1, S), action, [None, None])
    tails = [math.erfc((1.0 - mean) / 0.3 / math.sqrt(2)) for mean in (0.9, 0.0)]
    inside = ((0.95 - 0.0) ** 2 - (0.95 - 0.9) ** 2) / (2 * 0.3**2)
    expected = math.log(tails[0] / tails[1]) + (A - 1) * inside
    assert score.item() == pytest.approx(expected, rel=1e-5)


def test_the_policy_ratio_sends_policy_rows_online():
    """Behavior near 0, policy near 0.8, a third of each half misplaced: halves get purer."""
    rng = np.random.default_rng(0)
    origin = rng.random((2, 600)) < np.array([[0.3], [0.7]])  # True: drawn by the policy
    buffers = []
    for half in origin:
        buffer = make_buffer(600, capacity=600)
        center = np.where(half[:, None], 0.8, 0.0)
        buffer._actions[:] = torch.tensor(center + 0.3 * rng.normal(size=(600, A)))
        buffer._rewards[:, 0] = torch.tensor(half, dtype=torch.float32)
        buffers.append(buffer)
    hook = make_hook(score="policy_ratio", offline=buffers[0], online=buffers[1])
    hook.behavior.log_prob = lambda s, a, bound: -(a**2).sum(1) / 0.18
    hook.policy_log_prob = lambda s, a: -((a - 0.8) ** 2).sum(1) / 0.18
    np.random.seed(0)
    impurity = [hook.sample(256).batch[2][:128].mean().item() for _ in range(20)]
    assert np.mean(impurity) < 0.10  # 0.30 before the exchange


def test_hook_leaves_the_global_torch_stream_alone():
    hook = make_hook("diffusion", guidance_scale=2.0, energy_updates=3)
    before = torch.get_rng_state()
    hook.pretrain(progress=False)
    for _ in range(3):
        hook.update_energy(hook.sample(8))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("max_age", [1, 3])
def test_reference_age_bound_is_honoured(max_age):
    hook = make_hook("diffusion", reference_max_age=max_age)
    rows = np.array([0, 1, 2, 2])
    states = hook.offline.gather(rows)[0]
    made = []
    for now in range(1, 9):
        hook.samples = now
        made.append(hook.references(states, [rows, rows[:0]]))
    for i in range(1, len(made)):
        renewed = i % max_age == 0
        assert torch.equal(made[i][:2], made[i - 1][:2]) != renewed


def test_age_zero_draws_fresh_references_each_time():
    hook = make_hook("diffusion", reference_max_age=0)
    states = hook.offline.gather(np.array([0, 1]))[0]
    first, second = (hook.references(states, [None, None]) for _ in range(2))
    assert not torch.equal(first, second)


def test_cache_forgets_a_slot_the_ring_has_overwritten():
    buffer = make_buffer(4, capacity=6)
    cache = SlotCache(buffer, None)
    count = [0]

    def make(missing):
        count[0] += len(missing)
        return torch.full((len(missing), 1), float(count[0]))

    rows = np.array([0, 1, 3])
    first = cache.get(rows, 1, make)
    assert torch.equal(cache.get(rows, 2, make), first)
    for _ in range(3):  # writes slots 4, 5, 0
        buffer.add_transition(np.zeros(S), np.zeros(A), 0.0, np.zeros(S), False)
    second = cache.get(rows, 3, make)
    assert second[0] != first[0] and torch.equal(second[1:], first[1:])


@given(st.lists(st.integers(0, 7), min_size=1, max_size=40), st.integers(1, 4))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_cache_against_a_dictionary(events, max_age):
    """Event 7 writes a transition, any other asks for that slot."""
    buffer = make_buffer(7, capacity=7)
    cache, oracle, serial = SlotCache(buffer, max_age), {}, [0]

    def make(missing):
        serial[0] += 1
        return torch.full((len(missing),), float(serial[0]))

    for now, event in enumerate(events):
        if event == 7:
            oracle.pop(buffer._pointer, None)
            buffer.add_transition(np.zeros(S), np.zeros(A), 0.0, np.zeros(S), False)
            continue
        value = cache.get(np.array([event]), now, make).item()
        if event not in oracle or now - oracle[event][0] >= max_age:
            oracle[event] = (now, float(serial[0]))
        assert value == oracle[event][1]


def test_energy_learns_where_q_is_high():
    """Q = sum of actions: the energy's gradient must point up, and guidance must raise Q."""
    hook = make_hook("diffusion", guidance_scale=3.0, energy_updates=150, energy_lr=3e-3)
    hook.pretrain(progress=False)
    states = hook.offline.gather(np.arange(40))[0]
    plain = hook.sample_behavior(states, 4, guided=False).sum(-1).mean()
    guided = hook.sample_behavior(states, 4, guided=True).sum(-1).mean()
    assert guided > plain + 0.1


def test_energy_schedule_and_stop():
    hook = make_hook(
        "diffusion", guidance_scale=2.0, energy_update_freq=3, energy_updates=5
    )
    hook.pretrain(should_stop=lambda: hook.energy_steps == 2, progress=False)
    assert hook.energy_steps == 2
    hook.pretrain(progress=False)
    assert hook.energy_steps == 5
    done = []
    for _ in range(7):
        done.append(bool(hook.update_energy(hook.sample(8))))
    assert done == [False, False, True, False, False, True, False]


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "diffusion", "guidance_scale": 2.0, "reference_max_age": 4},
        {"kind": "diffusion", "rule": "random"},
        {"kind": "mixture", "score": "reference", "reference_max_age": 2},
    ],
)
def test_resume_is_exact(fields):
    def run(hook, steps):
        logs = []
        for _ in range(steps):
            drawn = hook.sample(16)
            logs += [drawn.batch[2].clone(), drawn.release.weight]
            logs += [drawn.log["separation_point"], *hook.update_energy(drawn).values()]
        return logs

    np.random.seed(5)
    hook = make_hook(**fields)
    run(hook, 4)
    saved, stream = copy.deepcopy(hook.state_dict()), np.random.get_state()
    expected = run(hook, 6)
    np.random.set_state(stream)
    resumed = make_hook(**fields)
    resumed.load_state_dict(saved)
    assert all(torch.equal(x, y) for x, y in zip(expected, run(resumed, 6), strict=True))


def test_a_foreign_buffer_needs_only_sample():
    class Foreign:
        def sample(self, n):
            return [torch.randn(n, S), torch.rand(n, A), torch.zeros(n, 1)]

    hook = make_hook(score="likelihood", offline=Foreign(), online=Foreign())
    drawn = hook.sample(10)
    assert len(drawn.batch[0]) == len(drawn.release.weight) == 10
    assert drawn.rows == [None, None]
    with pytest.raises(ValueError, match="Foreign has no CORL storage"):
        make_hook(reference_max_age=5, offline=Foreign(), online=Foreign())


def test_rows_are_drawn_as_the_buffer_draws_them():
    class Upstream:  # CORL's private storage, no draw and gather
        _buffer_size = 40

    ours = make_buffer(40, capacity=40)
    upstream = Upstream()
    for field in ("_states", "_actions", "_rewards", "_next_states", "_dones", "_size"):
        setattr(upstream, field, getattr(ours, field))
    np.random.seed(2)
    rows, batch = draw(upstream, 9)
    np.random.seed(2)
    expected = ours.sample(9)
    assert all(torch.equal(x, y) for x, y in zip(batch, expected, strict=True))
    assert torch.equal(ours._rewards[rows], batch[2])


def test_q_scale_brings_returns_to_a_span_of_1000():
    assert energy_q_scale("hopper-medium-v2", 2500.0) == pytest.approx(0.4)
    assert energy_q_scale("antmaze-umaze-v2", 1.0, reward_scale=10.0) == 0.1
    with pytest.raises(ValueError, match="span 0.0"):
        energy_q_scale("hopper-medium-v2", 0.0)
    guided = DareConfig()
    assert guided.scales_q and not DareConfig(q_scale="literal").scales_q
    assert not DareConfig(guidance_scale=0.0).scales_q
    literal = make_hook("diffusion", guidance_scale=1.0, q_scale="literal")
    assert literal.q_scale == 1.0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"cap": -1}, "dare.cap"),
        ({"score": "kl"}, "dare.score must be one of reference"),
        ({"rule": "best"}, "dare.rule"),
        ({"rule": "share"}, "dare.rule share needs log-density ratios"),
        ({"weights": "smooth"}, "dare.weights"),
        ({"weights": "soft", "cap": 0}, "dare.weights soft weighs each row by its own"),
        (
            {"weights": "soft", "rule": "random"},
            "so dare.rule random and dare.cap None would do noth",
        ),
        ({"alignment": "gausian_kl"}, "dare.alignment must be one of gaussian_kl"),
        (
            {"alignment_sigma": -1.0},
            r"dare.alignment_sigma must lie in \(0, inf\), not -1",
        ),
        ({"behavior_lr": 0.0}, "dare.behavior_lr must lie in"),
        ({"behavior_width": -1.0}, "dare.behavior_width must lie in"),
        ({"energy_beta": -3.0}, "dare.energy_beta must lie in"),
        ({"energy_lr": float("nan")}, "dare.energy_lr must lie in"),
        ({"behavior": "vae"}, "dare.behavior must be"),
        ({"references": 0}, "dare.references"),
        ({"reference_max_age": -1}, "dare.reference_max_age"),
        ({"score": "likelihood"}, "needs the behavior's density"),
        ({"behavior": "mixture"}, "cannot be guided"),
    ],
)
def test_bad_settings_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        DareConfig(**fields)


def test_missing_parts_are_named():
    buffers = make_buffer(4), make_buffer(4)
    model = make_behavior_model("mixture", S, A, seed=0)
    ratio = DareConfig(score="policy_ratio", behavior="mixture", guidance_scale=0.0)
    with pytest.raises(ValueError, match="policy_log_prob"):
        DareHook(*buffers, ratio, model)
    diffusion = make_behavior_model("diffusion", S, A, seed=0, width=0.05)
    with pytest.raises(ValueError, match="q_function"):
        DareHook(*buffers, DareConfig(), diffusion)


def test_a_stopped_behavior_training_goes_on_and_keeps_log_files_short(tmp_path, capsys):
    config = DareConfig(
        behavior="gaussian",
        guidance_scale=0.0,
        behavior_updates=120,
        behavior_batch_size=16,
    )
    states, actions = torch.randn(2, 40, S, generator=torch.Generator().manual_seed(0))
    asked = []

    def fit(**options):
        settings_ = {"cache_dir": tmp_path, "seed": 0, "device": "cpu", **options}
        settings_["bar"] = progress_bar
        rows = states, actions[:, :A]
        return fit_behavior(config, *rows, dataset_hash="rows", **settings_)

    with pytest.raises(KeyboardInterrupt, match="after 100 of 120.*goes on from there"):
        fit(should_stop=lambda: asked.append(1) or len(asked) == 2)
    fit(should_stop=lambda: asked.append(1))
    assert len(asked) == 2  # only 20 updates were left
    shown = capsys.readouterr()
    assert shown.out.startswith("behavior model gaussian: trained in")
    assert shown.err == ""  # over before the first line of a bar


# ---------------------------------------------------------------- in upstream's scripts


def test_the_buffer_in_the_place_of_corls_tells_its_trainer_the_release():
    class Trainer:
        pass

    hook, twin = (make_hook("diffusion", guidance_scale=2.0) for _ in range(2))
    trainer = Trainer()
    buffer = ExchangedBuffer(hook, trainer)
    np.random.seed(0)
    batches = []
    for _ in range(3):
        batches.append(buffer.sample(8))
        assert trainer.dare_release is buffer.drawn.release
    np.random.seed(0)
    for i, batch in enumerate(batches):
        drawn = twin.sample(8)
        assert all(torch.equal(x, y) for x, y in zip(batch, drawn.batch, strict=True))
        if i < 2:  # the energy follows the update on a batch when the next is drawn
            twin.update_energy(drawn)
    assert hook.energy_steps == twin.energy_steps == 2
    for name, value in hook.energy.state_dict().items():
        assert torch.equal(value, twin.energy.state_dict()[name])
    size = hook.online._size
    buffer.add_transition(np.zeros(S), np.zeros(A), 0.0, np.zeros(S), False)
    assert hook.online._size == size + 1


def test_seeds_may_share_one_behavior_model(tmp_path, capsys):
    def weights(seed, shared):
        config = DareConfig(
            behavior="mixture",
            score="policy_ratio",
            guidance_scale=0.0,
            behavior_updates=3,
            behavior_batch_size=8,
            behavior_seed=shared,
        )
        hook = prepare(
            config,
            make_buffer(40),
            make_buffer(30, seed=1),
            dataset_hash="x",
            cache_dir=tmp_path,
            policy_log_prob=lambda s, a: a.sum(-1),
            seed=seed,
        )
        return hook.behavior.state_dict()["net.0.weight"]

    assert torch.equal(weights(1, 5), weights(2, 5))
    assert torch.equal(weights(5, None), weights(1, 5))
    assert not torch.equal(weights(1, None), weights(2, None))
    assert capsys.readouterr().out.count("trained") == 3
