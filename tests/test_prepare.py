"""`prepare` asks for the scale of Q only where it matters; the hook estimates its own work."""

import pytest
import torch
from helpers import S, make_buffer

from corl_dare.config import DareConfig
from corl_dare.hook import prepare


def test_references_alone_are_guided():
    """Densities need no energy network, whatever `guidance_scale` says."""
    densities = DareConfig(score="likelihood", behavior="mixture")
    assert densities.guidance_scale > 0 and not densities.guided
    assert DareConfig().guided and not DareConfig(guidance_scale=0.0).guided


# ---------------------------------------------------------------- prepare


def prepared(cache, begin=False, **fields):
    config = DareConfig(
        behavior_updates=100,
        behavior_batch_size=8,
        behavior_width=0.05,
        energy_updates=10,
        energy_batch_states=8,
        **fields,
    )
    buffers = make_buffer(40), make_buffer(30, shift=0.8, seed=1)
    options = {"dataset_hash": "rows", "cache_dir": cache, "begin": begin}
    options["q_function"] = lambda s, a: a.sum(1)

    def q_scale():
        asked.append(1)
        return 0.5

    asked = []
    hook = prepare(config, *buffers, q_scale=q_scale, **options)
    return hook, asked


@pytest.mark.parametrize(
    "fields, scale",
    [({}, 0.5), ({"q_scale": "literal"}, 1.0), ({"guidance_scale": 0.0}, 1.0)],
)
def test_the_scale_of_q_is_asked_only_where_it_matters(tmp_path, fields, scale):
    hook, asked = prepared(tmp_path, **fields)
    assert hook.q_scale == scale and bool(asked) is (scale == 0.5)


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


def test_the_hook_estimates_what_is_left_of_its_work(tmp_path):
    """Two steps of the behavior model take 6 s, an energy step 5 s with new rows, else 1 s."""
    hook, _ = prepared(tmp_path)
    times = iter([6.0, 5.0, 1.0, 5.0, 1.0])

    def seconds_of(work):
        work()
        return next(times)

    found = hook.estimate(seconds_of)
    # 10 energy steps ask for 80 rows, of which there are 40: 5 batches of new ones.
    assert found == {"behavior model": 100 * 3.0, "energy": 10 * 1.0 + 5 * 4.0}
    prepared(tmp_path, begin=True)
    again, _ = prepared(tmp_path)
    again.energy_steps = 7
    assert again.estimate(seconds_of) == {"energy": 3 * 1.0 + 3 * 4.0}
