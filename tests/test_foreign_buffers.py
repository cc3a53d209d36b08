"""Batches and buffers of other libraries in the hook, as docs/use-in-your-codebase.md shows them.

Every row of the toy data says where it belongs: the reward is the sum of its state, the next state
is the state plus 1, and a row whose state begins with a value above 0 is an end.
"""

import os
import re
import subprocess
import sys
from collections import namedtuple
from dataclasses import make_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from corl_dare.config import DareConfig
from corl_dare.hook import DareHook, prepare
from corl_dare.rows import as_batch, as_tensor, draw

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "use-in-your-codebase.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NAMES = "observations", "actions", "rewards", "next_observations", "terminals"


def rows(count=6, seed=0):
    """Five float64 arrays, rewards and ends (count,)."""
    states = np.random.default_rng(seed).normal(size=(count, 3))
    actions = 0.3 * states[:, :2]
    return [states, actions, states.sum(1), states + 1.0, states[:, 0] > 0]


def forms():
    """One batch in the form of each library."""
    arrays = rows()
    state, action, reward, after, end = arrays
    fields = dict(zip(NAMES, arrays, strict=True))
    # In another order, with fields that the hook does not know.
    mixed = {k: fields[k] for k in sorted(fields)} | {"discounts": None, "index": end}
    nested = {
        # Of the row before: these must not be taken.
        **{
            "observation": state,
            "action": action,
            "reward": -reward,
            "terminated": ~end,
        },
        "next": {
            "observation": after,
            "reward": reward,
            "terminated": end,
            "done": ~end,
        },
    }
    tensors = {k: torch.from_numpy(v) for k, v in mixed.items() if v is not None}
    return {
        "dict": mixed,
        "dict of tensors": tensors,
        "nested dict": nested,
        "namedtuple": namedtuple("Batch", mixed)(*mixed.values()),
        "dataclass": make_dataclass("Batch", mixed)(**mixed),
    }


@pytest.mark.parametrize("form", forms())
def test_a_batch_with_names_becomes_a_batch_of_corl(form):
    found = as_batch(forms()[form])
    for tensor, expected in zip(found, rows(), strict=True):
        assert tensor.dtype == torch.float32
        expected = torch.as_tensor(expected).float().reshape(6, -1)
        assert torch.equal(tensor, expected)


def test_a_list_keeps_its_order_and_its_tensors():
    tensor, array = torch.ones(2, 1, dtype=torch.float64), np.zeros((2, 3))
    found = as_batch((tensor, array))
    assert found[0] is tensor
    assert torch.equal(found[1], torch.zeros(2, 3)) and found[1].dtype == torch.float32


def test_a_batch_without_a_field_is_refused_by_its_name():
    batch = {**dict(zip(NAMES[:4], rows(), strict=False)), "masks": np.ones(6)}
    with pytest.raises(
        ValueError, match="has no ends: it has .*masks, and none of next"
    ):
        as_batch(batch)


def test_the_hook_draws_the_same_from_lists_and_from_functions_that_give_dicts(tmp_path):
    config = DareConfig(
        score="likelihood",
        behavior="gaussian",
        guidance_scale=0.0,
        behavior_updates=3,
        behavior_batch_size=8,
    )
    halves = [rows(16, seed) for seed in (0, 1)]

    def lists(arrays):
        class Buffer:
            def sample(self, n):
                return [as_tensor(x[:n]).reshape(n, -1) for x in arrays]

        return Buffer()

    def dicts(arrays):
        return lambda n: {k: x[:n] for k, x in zip(NAMES, arrays, strict=True)}

    options = {"dataset_hash": "toy", "cache_dir": tmp_path}
    drawn = []
    for kind, data in ((lists, as_tensor), (dicts, lambda array: array)):
        buffers = [kind(half) for half in halves]
        given = {"states": data(halves[0][0]), "actions": data(halves[0][1])}
        drawn.append(prepare(config, *buffers, **options, **given).sample(16))
    for one, other in zip(drawn[0].batch, drawn[1].batch, strict=True):
        assert torch.equal(one, other)
    assert drawn[0].log.keys() == drawn[1].log.keys()
    with pytest.raises(ValueError, match="function does not show its rows"):
        prepare(config, dicts(halves[0]), dicts(halves[1]), **options)
    with pytest.raises(ValueError, match="function has no CORL storage"):
        DareHook(
            *(dicts(half) for half in halves),
            DareConfig(score="reference", reference_max_age=5, guidance_scale=0.0),
            None,
        )


def test_a_buffer_that_tells_its_rows_is_asked_for_nothing_else():
    class Ours:
        def draw(self, n):
            return np.arange(n)

        def gather(self, rows):
            return [torch.from_numpy(rows)]

    numbers, batch = draw(Ours(), 3)
    assert numbers.tolist() == batch[0].tolist() == [0, 1, 2]


DATA = """
import numpy as np

def make_data(shift):
    states = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    actions = np.clip(0.3 * states[:, :1] + shift, -1, 1)
    ends = (states[:, 0] > 1).astype(np.float32)
    return {"observations": states, "actions": actions, "rewards": states.sum(1),
            "next_observations": states + 1, "terminals": ends}

data, online_data = make_data(0.0), make_data(0.4)
"""
# Library -> (a word of its block, how its function is called and online rows are added).
LIBRARIES = {
    "stable_baselines3": (
        "stable_baselines3",
        """
from gymnasium.spaces import Box
box = lambda n: Box(-1, 1, (n,), np.float64)
offline, online = make_buffers(data, box(2), box(1), 1000)
row = [online_data[k] for k in
       ("observations", "next_observations", "actions", "rewards", "terminals")]
for values in zip(*row):
    online.add(*values, [{}])
""",
    ),
    "d3rlpy": (
        "d3rlpy",
        """
import gymnasium
class Env(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
# Episodes of two rows, the second of which begins where the first has led.
def episodes(data):
    states = np.stack([data["observations"], data["observations"] + 1], 1).reshape(-1, 2)
    actions = np.repeat(data["actions"], 2, 0)
    ends = np.zeros(800, np.float32)
    cuts = ends.copy()
    cuts[1::2] = 1
    return {"observations": states, "actions": actions, "rewards": states.sum(1),
            "terminals": ends, "timeouts": cuts}
offline, online, buffer = make_samplers(episodes(data), 1000, Env())
found = episodes(online_data)
for i in range(800):
    row = found["observations"][i], found["actions"][i], found["rewards"][i]
    buffer.append(*row)
    if i % 2:
        buffer.clip_episode(terminated=False)
""",
    ),
    "torchrl": (
        "torchrl",
        """
offline, online = make_torchrl_buffers(data, 1000)
online.extend(make_torchrl_buffers(online_data, 1)[0][:])
""",
    ),
}
CHECK = """
policy = lambda s, a: -((a - 0.3 * s[:, :1] - 0.4) ** 2).sum(1) / 0.02
hook = make_hook(offline, online, policy, data["observations"], data["actions"])
states, actions, rewards, after, ends = hook.sample(64).batch
assert rewards.shape == ends.shape == (64, 1) and actions.shape == (64, 1)
assert {x.dtype for x in (states, actions, rewards, after, ends)} == {torch.float32}
assert torch.allclose(rewards, states.sum(1, keepdim=True), atol=1e-5)
assert torch.allclose(after, states + 1, atol=1e-5)
D3RLPY_HAS_NO_ENDS or torch.testing.assert_close(ends[:, 0], (states[:, 0] > 1).float())
weights = torch.zeros(1, requires_grad=True)
losses = lambda batch: ((batch[1][:, 0] - weights) ** 2, 0.0 * weights + batch[0][:, 0])
log = update(hook, losses, torch.optim.SGD([weights], 0.1))
assert weights.item() != 0.0 and log["score_on_mean"] > log["score_off_mean"]
print("ok")
"""


@pytest.mark.parametrize(
    "library",
    [pytest.param(name, marks=pytest.mark.optional(name)) for name in LIBRARIES],
)
def test_the_buffers_of_a_library_in_the_hook(library, tmp_path):
    word, fill = LIBRARIES[library]
    (block,) = (b for b in BLOCKS if f"from {word}" in b)
    hook = BLOCKS[1].replace("behavior_updates=2000", "behavior_updates=200")
    check = CHECK.replace("D3RLPY_HAS_NO_ENDS", str(library == "d3rlpy"))
    (tmp_path / "program.py").write_text(hook + block + DATA + fill + check)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1:] == ["ok"], done.stderr
