"""What several test files build: buffers whose rows say where they come from, and hooks."""

import numpy as np
import torch

from corl.finetune import Normalization, ReplayBuffer
from corl_dare.behavior import make_behavior_model
from corl_dare.config import DareConfig
from corl_dare.hook import DareHook, Release

S, A = 3, 2


def unnormalize_on(device):
    """Raw states are twice the states in the buffers, plus a half."""
    halves, twos = (np.full(S, x, np.float32) for x in (0.5, 2.0))
    return Normalization(halves, twos, device).undo


UNNORMALIZE = unnormalize_on("cpu")


def make_buffer(rows, capacity=64, shift=0.0, seed=0, device="cpu"):
    """Row i carries i in its reward, so that a batch says where its rows came from."""
    rng = np.random.default_rng(seed)
    buffer = ReplayBuffer(S, A, capacity, device)
    buffer.load_d4rl_dataset(
        {
            "observations": rng.normal(size=(rows, S)).astype(np.float32),
            "actions": np.clip(rng.normal(shift, 0.3, (rows, A)), -1, 1).astype("f4"),
            "rewards": np.arange(rows, dtype=np.float32) + 1000 * (shift != 0),
            "next_observations": rng.normal(size=(rows, S)).astype(np.float32),
            "terminals": np.zeros(rows, bool),
        }
    )
    return buffer


def make_hook(
    kind="mixture",
    offline=None,
    online=None,
    compile=None,
    capture=None,
    device="cpu",
    **fields,
):
    guided = fields.get("guidance_scale", 0.0) > 0
    config = DareConfig(
        behavior=kind,
        **{
            "guidance_scale": 0.0,
            "support_actions": 4,
            "behavior_width": 0.05,
            **fields,
        },
    )
    options = config.behavior_options
    model = make_behavior_model(kind, S, A, seed=0, **options).requires_grad_(False)
    model = model.to(device)
    return DareHook(
        offline or make_buffer(40),
        online or make_buffer(30, shift=0.8, seed=1),
        config,
        model,
        policy_log_prob=lambda s, a: -((a - 0.8) ** 2).sum(1),
        q_function=(lambda s, a: a.sum(1)) if guided else None,
        unnormalize=unnormalize_on(device),
        seed=7,
        compile=compile,
        capture=capture,
        device=device,
    )


def hard_release(rows, kept):
    """The first `kept` of `rows` rows keep their conservative loss."""
    return Release((torch.arange(rows) < kept).float(), kept)


def assert_equal(a, b, where=""):
    """Nested dicts, lists and tensors are the same, bit for bit; else names the place."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:  # nan is the same as nan
        assert a == b or (a != a and b != b), f"{where}: {a} is not {b}"
