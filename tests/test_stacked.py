"""Seeds in one update: what N stacked trainers learn is what N separate ones learn."""

import numpy as np
import pytest
import torch
from helpers import UNNORMALIZE, assert_equal, make_buffer
from helpers import A as ACTIONS
from helpers import S as STATES

from algorithms import (
    awac,
    cal_ql,
    cql,
    dare_cal_ql,
    dare_famo2o_cql,
    dare_iql,
    dare_rebrac,
    dare_td3_bc,
    dare_wsrl,
    e2o,
    famo2o_cql,
    famo2o_iql,
    iql,
    pex,
    rebrac,
    rlpd,
    td3_bc,
    wsrl,
)
from corl import stacked
from corl.stacked_session import StackedBuffer
from corl.stacked_session import Streams as AllStreams
from corl_dare.behavior import make_behavior_model
from corl_dare.config import DareConfig
from corl_dare.hook import DareHook, Release
from corl_dare.hook_stacked import StackedHook

pytestmark = pytest.mark.narrow(32)
S, A, B = 5, 2, 12
TASK = "hopper-medium-v2"
FAST = dare_iql.DareIQLConfig(backup_actions=1)
# Case -> module, fields, seeds, updates. The batches of `online` have a release.
CQL = {"cql_n_actions": 2, "bc_steps": 3}
MOST = {**CQL, "cql_lagrange": True, "cql_max_target_backup": True}
WSRL = {"cql_n_actions": 2, "hidden_dim": 16, "base": "cal_ql"}
CASES = {
    "iql": (iql, {}, 3, 100),
    "iql, deterministic": (iql, {"iql_deterministic": True}, 2, 10),
    "dare_iql, offline": (dare_iql, {"mixing_ratio": 0.5}, 2, 10),
    "dare_iql, online": (dare_iql, {"dare": FAST}, 3, 100),
    "td3_bc": (td3_bc, {}, 2, 12),
    "dare_td3_bc, online": (dare_td3_bc, {}, 2, 12),
    "pex, offline": (pex, {}, 2, 12),
    "pex, online": (pex, {}, 2, 12),
    "e2o, online": (e2o, {"hidden_dim": 16, "n_critics": 3}, 2, 10),
    "rlpd, online": (rlpd, {"utd": 3, "hidden_dim": 16}, 2, 12),
    "wsrl, offline": (wsrl, {**WSRL, "cql_lagrange": True}, 2, 6),
    "wsrl, online": (wsrl, {**WSRL, "utd": 3, "cql_alpha_online": 2.0}, 2, 12),
    "dare_wsrl, online": (dare_wsrl, {**WSRL, "utd": 3, "cql_lagrange": True}, 2, 12),
    "famo2o_iql, offline": (famo2o_iql, {"balance_period": 2}, 2, 6),
    "famo2o_cql, online": (famo2o_cql, {"cql_n_actions": 2}, 2, 6),
    "dare_famo2o_cql, online": (dare_famo2o_cql, {"cql_n_actions": 2}, 2, 6),
    "awac": (awac, {"hidden_dim": 64}, 2, 12),
    "rebrac": (rebrac, {"hidden_dim": 64}, 2, 12),
    "dare_rebrac, online": (dare_rebrac, {"hidden_dim": 64}, 2, 12),
    "cql": (cql, CQL, 2, 10),
    "cql, multiplier and maximum": (cql, MOST, 2, 10),
    "cql, fixed entropy": (cql, {**CQL, "use_automatic_entropy_tuning": False}, 2, 5),
    "cal_ql": (cal_ql, CQL, 2, 10),
    "dare_cal_ql, online": (dare_cal_ql, CQL, 2, 10),
}
WITH_RETURNS = (cal_ql, dare_cal_ql, wsrl, dare_wsrl)
# Their update takes the phase.
WITH_PHASE = (pex, rlpd, wsrl, e2o, famo2o_iql, famo2o_cql)
WITH_PHASE += (dare_wsrl, dare_famo2o_cql)
# What a release may look like: half of the rows kept, all of them (k = B), soft weights.
KEPT = (B // 2, B, None)


def trainers(module, fields, count):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        config = module.TrainConfig(
            env=TASK, seed=seed, offline_iterations=80, compile=False, **fields
        )
        made.append(module.make_trainer(config, S, A, 1.0, "cpu"))
    return made


def batches(module, count, seeds):
    """For each update a batch of tensors (N, B, ...)."""
    rng = np.random.default_rng(0)
    shapes = [(S,), (A,), (1,), (S,), (1,)] + [(1,)] * (module in WITH_RETURNS)
    shapes += [(A,)] * getattr(module.TrainConfig, "NEXT_ACTIONS", False)
    for _ in range(count):
        batch = [torch.tensor(rng.normal(size=(seeds, B, *s))) for s in shapes]
        batch[1], batch[4] = batch[1].tanh(), (batch[4] > 1).double()
        yield batch


def releases(number, seeds, online):
    """Releases of all seeds, and of each alone."""
    if not online:
        return (), [()] * seeds
    kept = KEPT[number % len(KEPT)]
    weight = (torch.arange(B) < (kept or 0)).double().expand(seeds, B)
    if kept is None:
        weight = torch.rand(seeds, B, generator=torch.Generator().manual_seed(number))
    alone = [(Release(row, kept),) for row in weight]
    return (Release(weight, kept),), alone


class Streams:
    """A global stream per seed."""

    def __init__(self, seed):
        self.seed = seed
        self.state = torch.Generator().manual_seed(100 + seed).get_state()

    def __call__(self):
        return self

    def __enter__(self):
        self.outside = torch.get_rng_state()
        torch.set_rng_state(self.state)

    def __exit__(self, *error):
        self.state = torch.get_rng_state()
        torch.set_rng_state(self.outside)


def networks(trainer):
    return {
        f"{name}.{key}": value
        for name, part in vars(trainer).items()
        if isinstance(part, torch.nn.Module)
        for key, value in part.state_dict().items()
    }


@pytest.fixture
def double():
    """Double precision, in which rounding does not grow into differences that one can see."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_stacked_seeds_learn_what_separate_ones_learn(case, double):
    module, fields, seeds, count = CASES[case]
    online = case.endswith("online")
    alone, streams = trainers(module, fields, seeds), [Streams(s) for s in range(seeds)]
    stack = stacked.Stack(
        trainers(module, fields, seeds), [Streams(s) for s in range(seeds)]
    )
    for number, batch in enumerate(batches(module, count, seeds)):
        if module is pex and number == count // 2:
            # Adam begins anew for all seeds.
            for trainer in [stack.trainer, *alone]:
                trainer.start_online()
        together, each = releases(number, seeds, online)
        if module in WITH_PHASE:
            # A DARE file takes the release behind it.
            released = int(hasattr(module, "hook_arguments"))
            together = (online, *together[:released])
            each = [(online, *own[:released]) for own in each]
        logs = stack.trainer.train(batch, *together)
        for seed, trainer in enumerate(alone):
            with streams[seed]:
                own = trainer.train([x[seed] for x in batch], *each[seed])
            assert own.keys() == logs.keys()
            for name, value in own.items():
                assert_close(logs[name][seed], value, name)
    stack.spread()
    for seed, trainer in enumerate(alone):
        assert_alike(stack.members[seed].state_dict(), trainer.state_dict())
    # The seeds have not become one.
    first, second = (networks(member) for member in stack.members[:2])
    assert any(not torch.equal(first[name], second[name]) for name in first)


def assert_close(a, b, where):
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m: f"{where}: {m}")


def assert_alike(a, b, where=""):
    """Two states agree to rounding; the first may have moments of zeros where none were made."""
    if isinstance(b, dict):
        for key in b:
            assert_alike(a[key], b[key], f"{where}.{key}")
    elif isinstance(b, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_alike(x, y, f"{where}[{i}]")
    elif isinstance(b, torch.Tensor) and b.is_floating_point():
        assert_close(a.to(b.dtype), b, where)
    else:
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b, where


# ---------------------------------------------------------------- the hook


def hooks(seeds, **fields):
    """Hooks of several seeds with networks of their own, and the buffers of each."""
    config = DareConfig(
        score="policy_ratio", behavior="mixture", guidance_scale=0.0, **fields
    )
    made = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = make_behavior_model("mixture", STATES, ACTIONS, seed=seed)
        made.append(
            DareHook(
                make_buffer(40, seed=seed),
                make_buffer(30, shift=0.4, seed=seed + 9),
                config,
                model.requires_grad_(False),
                policy_log_prob=lambda s, a: -((a - 0.4) ** 2).sum(-1),
                unnormalize=UNNORMALIZE,
                seed=seed,
            )
        )
    return made


@pytest.mark.parametrize(
    "fields",
    [
        *(
            {"rule": rule}
            for rule in ("threshold", "posterior", "em", "direct", "share")
        ),
        {"rule": "threshold", "weights": "soft"},
        {"rule": "threshold", "cap": 3},
        {"rule": "threshold", "permute": "half"},
        {"rule": "threshold", "permute": "batch"},
    ],
    ids=str,
)
def test_a_stacked_exchange_gives_the_bits_of_hooks_alone(fields):
    alone, streams = hooks(3, **fields), []
    members = hooks(3, **fields)
    for seed in range(3):
        np.random.seed(seed)
        streams.append(AllStreams())
    offline = StackedBuffer([hook.offline for hook in members], streams)
    online = StackedBuffer([hook.online for hook in members], streams)
    none = stacked.Networks([{"none": torch.nn.Linear(1, 1)} for _ in members])
    stack = StackedHook(members, offline, online, none.over_seeds)
    exchanged = 0.0
    for _ in range(2):
        drawn = stack.sample(64)
        for seed, hook in enumerate(alone):
            # Two batches of a seed's stream follow each other.
            if hook.samples == 0:
                np.random.seed(seed)
                hook.stream = np.random.get_state()
            np.random.set_state(hook.stream)
            own = hook.sample(64)
            hook.stream = np.random.get_state()
            mine = stacked.of_seed(drawn.batch, seed)
            assert_equal(mine[2:], own.batch[2:])
            assert_equal(mine[:2], own.batch[:2])
            torch.testing.assert_close(drawn.release.weight[seed], own.release.weight)
            assert drawn.release.kept == own.release.kept
            for name, value in own.log.items():
                torch.testing.assert_close(drawn.log[name][seed], value, msg=name)
            exchanged += float(own.log["exchanged"])
    # The prior of `share` and the gate of `em` are stronger than what these few rows say.
    assert exchanged > 0 or fields["rule"] in ("share", "em")
    stack.spread()
    assert_equal([h.state_dict() for h in members], [h.state_dict() for h in alone])


def test_a_hook_that_draws_for_each_seed_is_not_stacked():
    members = hooks(2, rule="random")
    with pytest.raises(ValueError, match="dare.rule random"):
        StackedHook(members, None, None, None)


def test_a_trainer_of_a_stack_makes_no_update_alone():
    stack = stacked.Stack(trainers(td3_bc, {}, 2))
    batch = [x[0].float() for x in next(batches(td3_bc, 1, 2))]
    with pytest.raises(RuntimeError, match="alone"):
        stack.members[0].train(batch)


def test_seeds_that_are_not_equally_far_are_not_stacked():
    pair = trainers(td3_bc, {}, 2)
    pair[1].train([x[0].float() for x in next(batches(td3_bc, 1, 2))])
    with pytest.raises(ValueError, match="not as many"):
        stacked.Stack(pair)
