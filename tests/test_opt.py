"""OPT: updates against a float64 oracle, the replay, the phases of a run, its degenerate cases."""

import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import assert_equal, hard_release, make_buffer
from oracle_iql import Adam, descend, double, mlp
from oracle_opt import OracleOPT
from oracle_spot import OracleSPOT
from oracle_td3_bc import OracleTD3BC
from short_runs import (
    assert_same_weights,
    checkpoint_of,
    final_weights,
    folder_of,
    noisy_block,
    run,
)
from test_iql import TASK, A, B, S, random_batch
from test_rollback import assert_same_run

from algorithms import dare_opt_spot, opt_spot, opt_td3, spot, td3_bc
from corl import curves
from corl.buffers import JoinedBuffer
from corl.compiled import descend as step_along
from corl_dare.config import NoisyDareConfig
from corl_dare.hook import Release
from online_pretraining import critics
from online_pretraining.draws import Draws
from online_pretraining.priorities import Priorities
from online_pretraining.replay import Replay

BASES = {opt_td3: (td3_bc, OracleTD3BC), opt_spot: (spot, OracleSPOT)}
BOTH = pytest.mark.parametrize("module", BASES, ids=["td3", "spot"])
NARROW = {"vae_hidden_dim": 24, "vae_latent_dim": 3}


def known(module, fields):
    """Those of the fields that an algorithm has."""
    names = module.TrainConfig.__dataclass_fields__
    return {k: v for k, v in fields.items() if k in names}


def make(module, max_action=1.0, **fields):
    """A trainer in float64: Adam's first steps are as large for rounding as for a gradient."""
    config = module.TrainConfig(env=TASK, **known(module, {**NARROW, **fields}))
    torch.manual_seed(0)
    trainer = module.make_trainer(config, S, A, max_action, "cpu")
    for part in list(vars(trainer).values()):
        if isinstance(part, torch.nn.Module):
            part.double()
    for state in trainer.online_critics_optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].double()
    normal = trainer.draws.normal
    trainer.draws.normal = lambda shape: normal(shape).double()
    return trainer, config


def double_batch(rng):
    return [field.double() for field in random_batch(rng)]


def own_normals(trainer, count):
    """What the trainer will draw next from its own stream, which stays where it is."""
    stream = torch.Generator()
    stream.set_state(trainer.draws.generator.get_state())
    return [torch.randn((B, A), generator=stream) for _ in range(count)]


def global_noise(trainer, batch):
    """What it will draw from the global stream: noise, and SPOT's latent noise or None."""
    stream = torch.get_rng_state()
    policy = (trainer.total_it + 1) % trainer.policy_freq == 0
    found = trainer._noise(batch[1], *([policy] * hasattr(trainer, "vae")))
    torch.set_rng_state(stream)
    return found if isinstance(found, tuple) else (found, None)


def assert_like(trainer, oracle, tolerance=1e-9):
    expected = {**oracle.base.now}
    expected |= {f"{k}_target": v for k, v in oracle.base.target.items()}
    found = {name: getattr(trainer, name) for name in expected}
    for end, pair in (("", oracle.pair), ("_target", oracle.pair_target)):
        network = getattr(trainer, f"online_critics{end}")
        for name, params in zip(("first", "second"), pair, strict=True):
            expected[f"{name}{end}"], found[f"{name}{end}"] = (
                params,
                getattr(network, name),
            )
    for name, params in expected.items():
        for key, value in found[name].state_dict().items():
            gap = (value - params[key]).abs().max().item()
            assert gap < tolerance, f"{name}.{key} is off by {gap}"


# ---------------------------------------------------------------- updates


def release_of(module, step, rng):
    """None for a file without DARE; else hard weights, later soft ones."""
    if module is not dare_opt_spot:
        return None
    return Release(torch.from_numpy(rng.random(B))) if step > 9 else double_hard(B // 2)


def double_hard(kept):
    release = hard_release(B, kept)
    return release._replace(weight=release.weight.double())


CASES = {
    "published": {},
    "seldom": {"policy_freq": 3, "tau": 0.05, "online_discount": 0.7, "discount": 0.8},
    "wide noise": {"policy_noise": 0.9, "noise_clip": 0.6, "beta": 2.0, "qf_lr": 1e-3},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("module", [*BASES, dare_opt_spot], ids=["td3", "spot", "dare"])
def test_updates_of_both_phases_equal_the_float64_oracle(module, case):
    max_action = 2.0 if case == "seldom" else 1.0
    trainer, config = make(module, max_action, **CASES[case])
    with_vae, rng = module is not opt_td3, np.random.default_rng(1)
    base = OracleSPOT if with_vae else OracleTD3BC
    oracle = OracleOPT(trainer, config, base, max_action)
    for step in range(16):
        if step == 4:
            trainer.start_online(*((config.online_discount,) if with_vae else ()))
            oracle.start_online()
        online, batch = step >= 4, double_batch(rng)
        noise, latent = global_noise(trainer, batch)
        own, trainer.kappa = own_normals(trainer, 1)[0], 0.05 * step
        release = release_of(module, step, rng) if online else None
        logs = trainer.train(batch, online, *([release] if release else []))
        if not online:
            more = (latent, config.lambd) if with_vae else ()
            oracle.base.train(batch, noise, *more)
            continue

        def support(s, policy, release=release, latent=latent):
            errors, divergence = oracle.base.elbo_terms(
                oracle.base.vae, s, policy, latent
            )
            rows = errors + config.beta * divergence
            return config.lambd * (release.weight * rows if release else rows).mean()

        expected = oracle.train(
            batch, noise, own, trainer.kappa, support if with_vae else None
        )
        found = [logs["critic_loss"], logs["online_critic_loss"], logs.get("actor_loss")]
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or ours.item() == pytest.approx(theirs, rel=1e-9)
        assert logs["kappa"].item() == pytest.approx(trainer.kappa)
    assert_like(trainer, oracle)


PRETRAINING = {
    "published": {},
    "long inner step": {"inner_lr": 0.05},
    "unweighed": {"inner_lr": 0.02, "weigh_outer": False, "policy_freq": 3},
}


@pytest.mark.parametrize("case", PRETRAINING)
@BOTH
def test_pre_training_equals_the_oracle_with_its_second_derivatives(module, case):
    """The critics of the offline phase and the policy stay; their targets, too."""
    trainer, config = make(module, tau=0.1, **PRETRAINING[case])
    oracle = OracleOPT(trainer, config, BASES[module][1])
    rng = np.random.default_rng(1)
    for number in range(1, 9):
        batches = double_batch(rng), double_batch(rng)
        batches[1][2] *= 1.0 + number  # so that both losses are the smaller one at times
        noise, stream = own_normals(trainer, 2), torch.get_rng_state()
        logs = trainer.pretrain(*batches, number)
        assert torch.equal(stream, torch.get_rng_state())
        expected = oracle.pretrain(*batches, noise, number)
        found = [logs[name].item() for name in ("offline_loss", "online_loss")]
        assert found == pytest.approx(expected, rel=1e-9)
    assert_like(trainer, oracle)


def test_the_loss_through_the_inner_step_has_the_closed_gradient():
    """L_off = p'Ap / 2 and L_on = b'p: the gradient is Ap + c (I - alpha A) b."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    matrix, b = matrix @ matrix.T, torch.tensor([9.0, 5.0, 7.0, 8.0]).double()
    p = torch.ones(4, dtype=torch.float64, requires_grad=True)
    for weigh in (True, False):
        loss, first, second = critics.two_batch_loss(
            {"p": p},
            lambda q: q["p"] @ matrix @ q["p"] / 2,
            lambda q: b @ q["p"],
            0.1,
            weigh,
        )
        fast = p.detach() - 0.1 * matrix @ p.detach()
        assert second.item() == pytest.approx((b @ fast).item()) and second > first
        c = (first / second).item() if weigh else 1.0
        expected = matrix @ p.detach() + c * (b - 0.1 * matrix @ b)
        torch.testing.assert_close(torch.autograd.grad(loss, p)[0], expected)


def test_kappa_goes_on_a_line_from_the_end_of_the_warm_up():
    fields = {"kappa_start": 0.1, "kappa_end": 0.9, "kappa_steps": 150, "env": TASK}
    config = opt_td3.TrainConfig(online_warmup=50, **fields)
    found = [config.kappa_after(t) for t in (0, 50, 75, 100, 150, 10**6)]
    assert found == pytest.approx([0.1, 0.1, 0.3, 0.5, 0.9, 0.9])
    late = opt_td3.TrainConfig(online_warmup=500, **fields)
    assert [late.kappa_after(t) for t in (499, 500, 501)] == pytest.approx(
        [0.1, 0.1, 0.9]
    )


# ---------------------------------------------------------------- priorities and replay


def drawn_plainly(weights, uniform):
    """The row that holds each place of the sum, by a walk."""
    ends = np.cumsum(weights)
    places = (np.arange(len(uniform)) + uniform) / len(uniform) * ends[-1]
    return [next(i for i, end in enumerate(ends) if end > place) for place in places]


@pytest.mark.parametrize("limit", [None, 31, 40])
def test_priorities_draw_and_change_as_a_plain_list(limit):
    """With online rows that write over online rows, and with the newest rows alone."""
    rng, offline, ring = np.random.default_rng(0), 30, 17
    made = Priorities(offline, ring, limit=limit)
    plain, highest, order = np.zeros(offline + ring), 1.0, list(range(offline))
    plain[:offline] = 1.0
    written = 0
    for turn in range(40):
        for number in range(written, written + turn % 4):
            row = offline + number % ring
            order.append(row)
            plain[row] = highest
        written += turn % 4
        if limit:
            plain[list(set(order) - set(order[-limit:]))] = 0.0
        made.add(written)
        uniform = rng.random(8)
        rows = made.draw(torch.from_numpy(uniform))
        assert rows.tolist() == drawn_plainly(plain, uniform)
        for half, first, part in (
            ("offline", 0, plain[:offline]),
            ("online", offline, plain[offline:]),
        ):
            if part.any():
                found = made.draw(torch.from_numpy(uniform), half).tolist()
                assert found == [first + row for row in drawn_plainly(part, uniform)]
        values = rng.choice([1e-3, 0.5, 3.0, 1e3], size=offline + ring)
        plain[rows] = values[rows]
        highest = max(highest, plain[rows].max())
        made.write(rows, torch.from_numpy(values)[rows])
        leaves = made.leaves[: offline + ring]
        np.testing.assert_array_equal(leaves.numpy(), plain)
        assert made.top.sum().item() == pytest.approx(plain.sum(), rel=1e-12)
    again = Priorities(offline, ring, limit=limit)
    again.load_state_dict(made.state_dict())
    for name in ("leaves", "blocks", "top", "highest"):
        assert torch.equal(getattr(again, name), getattr(made, name)), name


def test_no_place_of_the_sum_leads_to_a_row_without_priority():
    made = Priorities(40, 10)
    made.write(torch.arange(40), torch.zeros(40, dtype=torch.float64))
    made.write(torch.tensor([3, 39]), torch.tensor([1e-3, 1e3], dtype=torch.float64))
    edges = torch.tensor([0.0, 1 - 2**-53]).double()
    assert made.draw(edges).tolist() == [3, 39]
    assert made.draw(torch.ones(4).double() - 2**-53).tolist() == [39] * 4


def make_replay(count=50, **fields):
    offline, online = make_buffer(40, 128), make_buffer(count, 128, shift=0.8, seed=1)
    config = opt_td3.TrainConfig(env=TASK, buffer_size=128, **fields)
    draws, joined = Draws(0), JoinedBuffer(offline, online)
    made = Replay(config, offline, online, joined, (3, 2), draws, step_along)
    made.written = count
    return made


def test_a_batch_teaches_the_density_and_changes_the_priorities_of_its_rows_alone():
    """Against the formulas in float64: the network's step, then priorities, clipped."""
    replay = make_replay()
    params, adam = double(replay.density.state_dict()), Adam(3e-4)
    replay.priorities.add(50)
    for _ in range(3):
        before = replay.priorities.leaves.clone()
        stream = torch.Generator()
        stream.set_state(replay.draws.generator.get_state())
        drawn = [torch.randint(n, (32,), generator=stream) for n in (40, 50)]
        uniform = torch.rand(32, generator=stream, dtype=torch.float64)
        rows = replay.priorities.draw(uniform)
        pairs = [
            [x.double() for x in buffer.gather(n.numpy())[:2]]
            for buffer, n in zip((replay.offline, replay.online), drawn, strict=True)
        ]

        def ratio(p, pair):
            return mlp(p, "net", torch.cat(pair, 1))[:, 0].clamp(min=0)

        scale = (ratio(params, pairs[0]) ** 0.2).mean()

        def loss(p, pairs=pairs, ratio=ratio):
            off, on = (ratio(p, pair) for pair in pairs)
            first = -torch.log(2 / (off + 1) + 1e-10)
            return (first - torch.log(2 * on / (on + 1) + 1e-10)).mean()

        expected = descend(params, adam, loss)
        batch = replay.sample(32)
        assert replay.log["density_loss"].item() == pytest.approx(expected, rel=1e-5)
        offline = rows < 40
        assert torch.equal(batch[2][offline, 0], rows[offline].float())
        assert torch.equal(batch[2][~offline, 0], rows[~offline].float() - 40 + 1000)
        found = ratio(params, [x.double() for x in batch[:2]]) ** 0.2 / scale
        after = replay.priorities.leaves
        torch.testing.assert_close(
            after[rows], found.clamp(1e-3, 1e3), rtol=1e-3, atol=1e-6
        )
        rest = torch.ones(len(before), dtype=torch.bool)
        rest[rows] = False
        assert torch.equal(after[rest], before[rest])
    assert (replay.priorities.leaves[:90] == 1).any(), "some row was never drawn"


def test_halves_draw_by_priority_from_their_own_rows_and_learn_once_a_batch():
    replay = make_replay(batch_size=32)
    halves = replay.halves()
    for turn in range(1, 4):
        before = replay.priorities.leaves.clone()
        for half, first, number in ((halves[0], 0, 0), (halves[1], 40, 1000)):
            stream = torch.Generator()
            stream.set_state(replay.draws.generator.get_state())
            if not first:
                # What the density network learns from.
                [torch.randint(n, (32,), generator=stream) for n in (40, 50)]
                replay.priorities.add(50)
            uniform = torch.rand(16, generator=stream, dtype=torch.float64)
            part = replay.priorities.leaves[first : first + (50 if first else 40)]
            rows = half.draw(16)
            assert rows.tolist() == drawn_plainly(part.numpy(), uniform.numpy())
            batch = half.gather(rows)
            assert batch[2][:, 0].tolist() == (rows + number).tolist()
            expected = replay.priority(batch[0], batch[1], replay.scale)
            assert torch.equal(replay.priorities.leaves[rows + first], expected)
            before[rows + first] = expected
        before[40:90] = torch.where(before[40:90] == 0, 1.0, before[40:90])
        assert torch.equal(replay.priorities.leaves, before), "of the drawn rows alone"
        steps = {int(s["step"]) for s in replay.optimizer.state.values()}
        assert steps == {turn} and halves[1]._size == 50
    plain = make_replay(replay="uniform")
    assert plain.halves() == (plain.offline, plain.online)


def test_a_density_that_says_nothing_leaves_the_rows_alike():
    replay = make_replay()
    with torch.no_grad():
        replay.density.net[4].bias.fill_(-1e3)
    for _ in range(3):
        replay.sample(32)
    # Each batch holds rows that were not drawn before, as their priority is higher.
    assert replay.priorities.leaves[:90].unique().tolist() == [1e-3]


def test_rows_that_the_network_calls_online_are_drawn_more_often():
    replay = make_replay()
    shares = []
    for _ in range(150):
        replay.sample(32)
        shares.append(replay.log["online_share"].item())
    assert np.mean(shares[-50:]) > 0.75 > 0.65 > np.mean(shares[:5])
    assert replay.log["density_online"] > 3 * replay.log["density_offline"]


def test_the_ports_capacity_drops_the_oldest_offline_rows():
    """The trap: with as many places as the dataset has rows each online row takes one of them."""
    dropped, kept = make_replay(30, priority_capacity=40), make_replay(30)
    for replay in (dropped, kept):
        replay.sample(32)
    has = [(r.priorities.leaves[:70] > 0) for r in (dropped, kept)]
    assert has[0].tolist() == [False] * 30 + [True] * 40 and has[1].all()
    with pytest.raises(ValueError, match="priority_capacity 39 .*at least 40"):
        make_replay(priority_capacity=39)


# ---------------------------------------------------------------- DARE-SPOT+OPT


@pytest.mark.parametrize("kept", [None, 0, B])
def test_the_same_weight_everywhere_is_opt_with_all_or_nothing_of_lambda(kept):
    """On the same batches, bit for bit; None: no row is left out, and the weights are 1."""
    weight = 0.0 if kept == 0 else 1.0
    plain, released = (make(x, lambd=0.4)[0] for x in (opt_spot, dare_opt_spot))
    plain.lambd *= weight
    release = Release(torch.full((B,), weight).double(), kept)
    rng = np.random.default_rng(2)
    for seed in range(6):
        batch = double_batch(rng)
        for trainer, more in ((plain, ()), (released, (release,))):
            trainer.kappa = 0.1 * seed
            torch.manual_seed(seed)
            logs = trainer.train(batch, True, *more)
    found = [
        {k: v for k, v in trainer.state_dict().items() if "draws" not in k}
        for trainer in (plain, released)
    ]
    assert_equal(*found)
    assert logs["conservative_loss"].isfinite() == (kept != 0)


def test_the_hook_is_given_the_mix_of_both_pairs_of_critics_and_the_policys_density():
    trainer, _ = make(dare_opt_spot, 2.0, dare=NoisyDareConfig(policy_std=0.05))
    parts = dare_opt_spot.hook_arguments(trainer)
    states, actions, *_ = batch = double_batch(np.random.default_rng(3))
    pairs = trainer.target_q, trainer.online_target_q
    for share in (0.0, 0.25):
        if share:
            trainer.kappa = share
            trainer.train(batch, True)
        offline, online = (q(states, actions) for q in pairs)
        expected = (1 - share) * offline + share * online
        torch.testing.assert_close(parts["q_function"](states, actions), expected)
        assert not torch.allclose(offline, online)
    mean = trainer.actor(states)
    inside = torch.distributions.Normal(mean, 0.1).log_prob(mean + 0.03).sum(1)
    found = parts["policy_log_prob"](states, mean + 0.03)
    torch.testing.assert_close(found, inside)


@pytest.mark.parametrize(
    "fields, dare, message",
    [
        ({"lambd_cool": True}, {}, "lambd_cool true and dare would both release"),
        ({"priority_capacity": 300_000}, {}, "drops all rows of the dataset within"),
        ({"expl_noise": 0.0}, {}, "acts without noise; set dare.policy_std"),
        ({"mixing_ratio": 0.0}, {}, "mixing_ratio 0 leaves no offline row"),
        ({"batch_size": 255}, {}, "batch_size 255 cannot be split"),
        ({"sampling": "on_policy"}, {}, "sampling 'on_policy' is not one of uniform"),
    ],
)
def test_what_dare_cannot_have_is_refused(fields, dare, message):
    with pytest.raises(ValueError, match=message):
        dare_opt_spot.TrainConfig(env=TASK, dare=noisy_block(**dare), **fields)
    if "sampling" not in fields:
        off = noisy_block(**dare, enabled=False)
        assert dare_opt_spot.TrainConfig(env=TASK, dare=off, **fields).lambd_cool


def test_dare_takes_the_place_of_the_cooling():
    config = dare_opt_spot.TrainConfig(env=TASK, dare=noisy_block())
    assert config.lambd_cool is False and config.lambd_after(10**6) == config.lambd
    assert dare_opt_spot.TrainConfig(**vars(config)) == config
    higher = {"priority_capacity": 300_001, "replay": "balanced"}
    assert dare_opt_spot.TrainConfig(env=TASK, dare=noisy_block(), **higher)


@pytest.mark.parametrize(
    "dare, needs",
    [
        ({}, True),
        ({"guidance_scale": 0.0}, False),
        ({"guidance_scale": 0.0, "reference_max_age": 3}, True),
        ({"guidance_scale": 0.0, "score": "policy_ratio", "behavior": "mixture"}, False),
        ({"weights": "uniform"}, False),
    ],
)
def test_what_needs_row_numbers_is_refused_where_a_gpu_draws_them(dare, needs):
    config = dare_opt_spot.TrainConfig(env=TASK, dare=NoisyDareConfig(**dare))
    assert config.dare.needs_rows is needs
    gpu = SimpleNamespace(device="cuda:0")
    if needs:
        with pytest.raises(ValueError, match="replay balanced draws .*; set replay to"):
            dare_opt_spot.make_hook(gpu, None, make_replay(), config)


# ---------------------------------------------------------------- whole runs

SHORT = {
    "offline_iterations": 20,
    "online_iterations": 30,
    "online_warmup": 10,
    "eval_freq": 25,
    "n_episodes": 1,
    "log_freq": 5,
    "batch_size": 16,
    "vae_iterations": 6,
    "utd": 2,
}
OPT = {"pretrain_updates": 8, "kappa_start": 0.1, "kappa_steps": 25}
BASE = {"actor_dropout": 0.0}


class One:
    """In the place of alpha: the normalizer of TD3+BC is 1, whatever Q is."""

    def __truediv__(self, other):
        return torch.ones_like(other)


def run_base(module, tmp_path, monkeypatch, **fields):
    base = BASES[module][0]
    fields = known(base, {**SHORT, **BASE, **fields})
    with monkeypatch.context() as patch:
        if base is td3_bc and not fields["offline_iterations"]:
            make_trainer = td3_bc.make_trainer

            def without_normalizer(*args):
                trainer = make_trainer(*args)
                trainer.alpha = One()
                return trainer

            patch.setattr(td3_bc, "make_trainer", without_normalizer)
        return run(base, tmp_path, monkeypatch, **fields)


def run_opt(module, tmp_path, monkeypatch, **fields):
    return run(
        module, tmp_path, monkeypatch, **known(module, {**SHORT, **OPT, **fields})
    )


def assert_base_is_in(one, two):
    """The networks of the base are, bit for bit, those of OPT."""
    base, opt = final_weights(one), final_weights(two)
    for part, state in base.items():
        for name, value in state.items():
            assert torch.equal(value, opt[part][name]), f"{part}.{name} differs"


@BOTH
def test_without_its_parts_it_is_the_base(module, tmp_path, monkeypatch):
    """kappa 0 and uniform replay: TD3 without cloning and normalizer, or SPOT, whole runs.

    TD3+BC has no switch at which Adam begins anew, so it has no offline phase here.
    """
    fields = {"offline_iterations": 20 * (module is opt_spot), "normalize": True}
    fields |= {"bc_online": "drop", "eval_freq": 10}
    none = {"replay": "uniform", "kappa_start": 0.0, "kappa_end": 0.0}
    run_base(module, tmp_path / "a", monkeypatch, **fields)
    summary = run_opt(module, tmp_path / "b", monkeypatch, **fields, **none)
    assert summary["updates"] == fields["offline_iterations"] + 8 + 2 * 20
    assert_base_is_in(tmp_path / "a", tmp_path / "b")
    texts = [
        (folder_of(tmp_path / name) / "evaluations.csv").read_text() for name in "ab"
    ]
    assert texts[0] == texts[1]


@BOTH
def test_the_offline_phase_is_the_bases(module, tmp_path, monkeypatch):
    """So `load_model` takes its models: the online critics stay as they were made."""
    fields = {"online_iterations": 0, "checkpoints_path": str(tmp_path / "corl")}
    fields |= {"normalize": True, "eval_freq": 20}
    run_base(module, tmp_path / "a", monkeypatch, **fields)
    run_opt(module, tmp_path / "b", monkeypatch, online_iterations=0, normalize=True)
    assert_base_is_in(tmp_path / "a", tmp_path / "b")
    model = {"load_model": str(tmp_path / "corl" / "checkpoint_19.pt")}
    zero = {"offline_iterations": 0, "online_iterations": 0, "normalize": True}
    run_opt(module, tmp_path / "c", monkeypatch, **zero, **model)
    assert_same_weights(tmp_path / "b", tmp_path / "c")


def stop_in_pretraining(monkeypatch, done):
    advance = critics.OnlinePretraining.advance

    def stopping(self):
        found = advance(self)
        if self.done == done:
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(critics.OnlinePretraining, "advance", stopping)


@pytest.mark.makes("estimate")
@BOTH
def test_a_run_that_is_stopped_in_the_pre_training_goes_on_to_the_same_bits(
    module, tmp_path, monkeypatch, capsys
):
    whole = run_opt(module, tmp_path / "a", monkeypatch)
    shown = capsys.readouterr().out
    assert "online pre-training" in shown.split("evaluations not counted")[1][:200]
    assert "online step 10: 8 updates of the online critics, offline_loss" in shown
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_in_pretraining(patch, 5)
        run_opt(module, tmp_path / "b", monkeypatch)
    state = checkpoint_of(tmp_path / "b")
    assert state["step"] == 30 and state["parts"]["pretraining"] == {"done": 5}
    assert state["run"]["updates"] == 25
    resume = str(folder_of(tmp_path / "b"))
    again = run_opt(module, tmp_path / "b", monkeypatch, resume=resume)
    assert whole["updates"] == again["updates"] == 20 + 8 + 2 * 20
    assert_same_run(tmp_path / "a", tmp_path / "b")


@BOTH
def test_the_policy_and_its_critics_wait_for_the_pre_training(
    module, tmp_path, monkeypatch
):
    """Collection and pre-training move the online critics alone, and their own targets."""
    parts = []
    for steps in (10, 11):
        folder = tmp_path / str(steps)
        with monkeypatch.context() as patch:
            if steps == 11:
                # Before the first environment step after it.
                patch.setattr(module, "step", lambda *args: {})
            run_opt(
                module,
                folder,
                monkeypatch,
                online_iterations=steps,
                offline_iterations=0,
                vae_iterations=0,
            )
        parts.append(final_weights(folder))
    moved = {
        part
        for part, state in parts[0].items()
        if any(not torch.equal(v, parts[1][part][k]) for k, v in state.items())
    }
    assert moved == {"online_critics", "online_critics_target", "draws"}


def test_the_first_update_has_kappa_start_and_its_row_says_so(tmp_path, monkeypatch):
    fields = {"log_freq": 1, "utd": 1, "kappa_start": 0.25, "kappa_end": 0.5}
    run_opt(opt_td3, tmp_path, monkeypatch, **fields, kappa_steps=20)
    metrics = curves.read_csv(folder_of(tmp_path) / "metrics.csv")
    found = [float(x) for x in metrics["kappa"] if x]
    expected = [0.25 + 0.025 * min(t, 10) for t in range(20)]
    assert found == pytest.approx(expected)
    shares = [float(x) for x in metrics["online_share"] if x]
    assert len(shares) == 20 and 0.0 <= min(shares) <= max(shares) <= 1.0
    assert math.isfinite(float(metrics["density_loss"][-1]))


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"online_warmup": 0},
            "online_warmup 0 leaves no online row for pretrain_updates",
        ),
        ({"kappa_start": 1.5}, r"kappa_start must lie in \[0, 1\], not 1.5"),
        ({"kappa_steps": 0}, r"kappa_steps must lie in \[1, 1e9\]"),
        ({"inner_lr": 0.0}, r"inner_lr must lie in \(0, inf\)"),
        ({"replay": "best"}, "replay 'best' is not one of balanced, uniform"),
        ({"sampling": "on_policy"}, "sampling 'on_policy' is not one of uniform"),
        ({"pretrain_updates": -1}, r"pretrain_updates must lie in \[0, 1e9\]"),
        ({"priority_capacity": 0}, r"priority_capacity must lie in \[1, 1e10\]"),
    ],
)
@BOTH
def test_bad_settings_name_the_field(module, fields, message):
    with pytest.raises(ValueError, match=message):
        module.TrainConfig(**{"env": TASK, **fields})
    assert module.TrainConfig(env=TASK, online_warmup=0, pretrain_updates=0)


def test_a_capacity_below_the_dataset_is_refused_before_training(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="priority_capacity 100 is smaller.*at least"):
        run_opt(opt_td3, tmp_path, monkeypatch, priority_capacity=100)
