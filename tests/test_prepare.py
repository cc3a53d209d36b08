"""`prepare` fits or loads the behavior, scales Q where it matters, and the hook estimates."""

import pytest
import torch
from helpers import UNNORMALIZE, S, make_buffer

from corl_dare.config import DareConfig
from corl_dare.hook import fit_behavior, prepare

TINY = {
    "behavior": "gaussian",
    "score": "likelihood",
    "guidance_scale": 0.0,
    "behavior_updates": 8,
    "behavior_batch_size": 8,
}


def prepared(tmp_path, offline=None, block=None, **options):
    return prepare(
        block or DareConfig(**TINY),
        offline or make_buffer(20),
        make_buffer(10, shift=0.8),
        **{"dataset_hash": "rows", "cache_dir": tmp_path, "seed": 3, **options},
    )


def test_the_behavior_is_fitted_on_the_raw_states_of_the_offline_rows(tmp_path):
    """The rows that are in the buffer, and not its empty rest; un-normalized."""
    offline = make_buffer(20, capacity=64)
    hook = prepared(tmp_path / "a", offline, unnormalize=UNNORMALIZE)
    raw = 2.0 * offline._states[:20] + 0.5
    fitted = fit_behavior(
        hook.config,
        raw,
        offline._actions[:20],
        dataset_hash="rows",
        cache_dir=tmp_path / "b",
        seed=3,
        device="cpu",
    )
    weights = hook.behavior.state_dict()
    for name, value in fitted.state_dict().items():
        assert torch.equal(weights[name], value), name
    # Rows that are handed in take the place of the buffer's.
    rows = {"states": raw, "actions": offline._actions[:20]}
    other = prepared(tmp_path / "c", make_buffer(5), unnormalize=UNNORMALIZE, **rows)
    for name, value in other.behavior.state_dict().items():
        assert torch.equal(weights[name], value), name
    files = [[f.name for f in (tmp_path / x).rglob("*.safetensors")] for x in "abc"]
    assert files[0] == files[1] == files[2] and len(files[0]) == 1


def test_a_behavior_that_is_fitted_later_takes_the_place_of_the_first_weights(
    tmp_path, capsys
):
    """In the same tensors, which a compiled graph may hold; once."""
    hook = prepared(tmp_path, begin=False)
    assert not list(tmp_path.rglob("*.safetensors"))
    held = dict(hook.behavior.named_parameters())
    before = {name: value.clone() for name, value in held.items()}
    hook.begin()
    assert "behavior model gaussian: trained in" in capsys.readouterr().out
    now = dict(hook.behavior.named_parameters())
    assert all(now[name] is value for name, value in held.items())
    assert any(not torch.equal(value, before[name]) for name, value in now.items())
    assert not any(value.requires_grad for value in now.values())
    assert not hook.behavior.training
    hook.begin()
    assert capsys.readouterr().out == ""
    again = prepared(tmp_path)
    assert "behavior model gaussian: loaded" in capsys.readouterr().out
    for name, value in again.behavior.named_parameters():
        assert torch.equal(value, now[name])


def test_a_missing_part_is_named_before_anything_is_fitted(tmp_path):
    block = DareConfig(**{**TINY, "score": "policy_ratio"})
    with pytest.raises(ValueError, match="policy_log_prob"):
        prepared(tmp_path, block=block)
    assert not list(tmp_path.iterdir())


def test_the_scale_of_q_is_asked_for_only_where_it_matters(tmp_path):
    def forbidden():
        raise AssertionError("nobody needs the span of the returns here")

    prepared(tmp_path, q_scale=forbidden, begin=False)
    guided = {"behavior_width": 0.05, "guidance_scale": 1.0}
    options = {"q_function": lambda s, a: a.sum(1), "begin": False}
    hook = prepared(
        tmp_path, block=DareConfig(**guided), q_scale=lambda: 0.25, **options
    )
    assert hook.q_scale == 0.25
    hook = prepared(tmp_path, block=DareConfig(**guided), q_scale=0.5, **options)
    assert hook.q_scale == 0.5
    literal = DareConfig(q_scale="literal", **guided)
    hook = prepared(tmp_path, block=literal, q_scale=forbidden, **options)
    assert hook.q_scale == 1.0


def test_the_estimate_scales_what_it_timed_to_the_whole_work(tmp_path):
    """Two steps of a fit in 3 s; an energy step in 5 s, and in 2 s with known support."""
    block = DareConfig(
        behavior_width=0.05,
        behavior_updates=100,
        behavior_batch_size=8,
        energy_updates=40,
        energy_batch_states=10,
        support_actions=2,
    )
    options = {"q_function": lambda s, a: a.sum(1), "q_scale": 1.0}
    hook = prepared(tmp_path, block=block, begin=False, **options)
    clock = iter([3.0, 5.0, 2.0])

    def seconds_of(work):
        work()
        return next(clock)

    seconds = hook.estimate(seconds_of)
    # 20 rows in batches of 10: two batches of energy states are new.
    assert seconds == {"behavior model": 150.0, "energy": 40 * 2.0 + 2 * 3.0}
    hook.energy_steps, hook.data, clock = 30, None, iter([5.0, 2.0])
    assert hook.estimate(seconds_of) == {"energy": 10 * 2.0 + 2 * 3.0}
    hook.energy_steps = 40
    assert hook.estimate(seconds_of) == {}


def test_references_alone_are_guided():
    """Densities need no energy network, whatever `guidance_scale` says."""
    densities = DareConfig(score="likelihood", behavior="mixture")
    assert densities.guidance_scale > 0 and not densities.guided
    assert DareConfig().guided and not DareConfig(guidance_scale=0.0).guided


# ---------------------------------------------------------------- prepare


def test_literal_leaves_q_as_it_is_whatever_scale_is_given(tmp_path):
    config = DareConfig(q_scale="literal", behavior_width=0.05)
    hook = prepare(
        config,
        make_buffer(40),
        make_buffer(30),
        dataset_hash="rows",
        cache_dir=tmp_path,
        begin=False,
        q_function=lambda s, a: a.sum(1),
        q_scale=0.5,
    )
    assert hook.q_scale == 1.0


def test_prepare_wants_states_and_actions_or_neither(tmp_path):
    buffers = make_buffer(40), make_buffer(30)
    with pytest.raises(ValueError, match="states and actions"):
        prepare(
            DareConfig(guidance_scale=0.0),
            *buffers,
            dataset_hash="rows",
            cache_dir=tmp_path,
            states=torch.zeros(4, S),
        )


def test_a_behavior_in_the_cache_is_not_part_of_the_estimate(tmp_path):
    """Two steps of the behavior model take 6 s, an energy step 5 s with new rows, else 1 s."""
    block = DareConfig(
        behavior_updates=100,
        behavior_batch_size=8,
        behavior_width=0.05,
        energy_updates=10,
        energy_batch_states=8,
    )
    options = {"q_function": lambda s, a: a.sum(1), "offline": make_buffer(40)}
    hook = prepared(tmp_path, block=block, begin=False, **options)
    times = iter([6.0, 5.0, 1.0, 5.0, 1.0])

    def seconds_of(work):
        work()
        return next(times)

    found = hook.estimate(seconds_of)
    # 10 energy steps ask for 80 rows, of which there are 40: 5 batches of new ones.
    assert found == {"behavior model": 100 * 3.0, "energy": 10 * 1.0 + 5 * 4.0}
    prepared(tmp_path, block=block, begin=True, **options)
    again = prepared(tmp_path, block=block, begin=False, **options)
    again.energy_steps = 7
    assert again.estimate(seconds_of) == {"energy": 3 * 1.0 + 3 * 4.0}
