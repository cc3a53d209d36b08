"""Every tensor of an update is made on the device that it was given, and none is read.

Tensors on torch's device `meta` have shapes and no values, and do not mix with those of the CPU.
So a forgotten `device=` and a host read fail here as they would on a GPU.
"""

import importlib

import pytest
import torch
from helpers import make_buffer, make_hook
from wiring import ALGORITHMS

from corl_dare.exchange import RULES
from corl_dare.hook import Release

S, A, B = 11, 3, 32
TASK = "hopper-medium-v2"
# Settings that take other paths through an update.
MORE = {
    "iql": ({"iql_deterministic": True}, {"actor_dropout": 0.1}),
    "dare_iql": ({"dare": {"value": "iv"}}, {"dare": {"value": "offline"}}),
    "cql": ({"cql_lagrange": True, "cql_max_target_backup": True},),
    "cal_ql": ({"cql_lagrange": True, "backup_entropy": True}, {"bc_steps": 5}),
    "dare_cal_ql": ({"cql_lagrange": True}, {"cql_importance_sample": False}),
}
CASES = [(name, fields) for name in ALGORITHMS for fields in ({}, *MORE.get(name, ()))]


class NoGenerator:
    """Stands for `torch.Generator`, which does not know the device: the global stream draws."""

    def __init__(self, device="cpu"):
        pass

    def manual_seed(self, seed):
        return None


@pytest.fixture(autouse=True)
def no_generator(monkeypatch):
    monkeypatch.setattr(torch, "Generator", NoGenerator)


def meta_batch(name):
    config = importlib.import_module(ALGORITHMS[name]).TrainConfig
    sizes = [S, A, 1, S, 1] + [1] * getattr(config, "MC_RETURNS", False)
    sizes += [A] * getattr(config, "NEXT_ACTIONS", False)
    return [torch.empty(B, size, device="meta") for size in sizes]


def meta_trainer(name, fields):
    module = importlib.import_module(ALGORITHMS[name])
    fields = dict(fields)
    if "dare" in fields:
        block = type(module.TrainConfig(env=TASK).dare)
        fields["dare"] = block(**fields["dare"])
    config = module.TrainConfig(env=TASK, threads=1, compile=False, **fields)
    trainer = module.make_trainer(config, S, A, 1.0, "meta")
    if hasattr(trainer, "dare_generator"):
        trainer.dare_generator = None
    return trainer


def release(kind):
    weight = torch.empty(B, device="meta")
    return {"none": None, "hard": Release(weight, B // 2), "soft": Release(weight)}[kind]


@pytest.mark.parametrize("kind", ["none", "hard", "soft"])
@pytest.mark.parametrize(
    ("name", "fields"), CASES, ids=[f"{n}-{'-'.join(f) or 'plain'}" for n, f in CASES]
)
def test_an_update_stays_on_its_device(name, fields, kind):
    if kind != "none" and not name.startswith("dare_"):
        pytest.skip("a baseline has no release")
    trainer = meta_trainer(name, fields)
    given = [] if kind == "none" else [release(kind)]
    if name == "dare_opt_spot":
        # Its online update.
        given = [True, *given]
    # Two, for what happens in every second update only.
    for _ in range(2):
        logs = trainer.train(meta_batch(name), *given)
    elsewhere = {k: v.device for k, v in logs.items() if isinstance(v, torch.Tensor)}
    assert set(map(str, elsewhere.values())) == {"meta"}


HOOKS = {
    "policy_ratio": {"score": "policy_ratio"},
    "likelihood": {"score": "likelihood"},
    "reference": {},
    "cached": {"reference_max_age": 9, "references": 2},
    "guided": {"kind": "diffusion", "guidance_scale": 2.0, "energy_batch_states": 4},
    **{
        f"rule {rule}": {"rule": rule, "score": "policy_ratio"}
        # `random` draws its rows, so it needs a generator.
        for rule in RULES
        if rule not in ("random", "threshold")
    },
    "soft": {"weights": "soft", "score": "policy_ratio"},
}


@pytest.mark.parametrize("name", HOOKS)
def test_the_hook_stays_on_its_device(name):
    fields = {"energy_updates": 1, **HOOKS[name]}
    buffers = [make_buffer(40, device="meta"), make_buffer(30, shift=0.8, device="meta")]
    hook = make_hook(offline=buffers[0], online=buffers[1], device="meta", **fields)
    sample = hook.behavior.sample

    def with_noise(states, n, generator, **options):
        noise = torch.empty(len(states), n, hook.behavior.action_dim, device="meta")
        return sample(states, n, noise=noise, **options)

    hook.behavior.sample = with_noise
    for _ in range(2):
        drawn = hook.sample(16)
        log = {**drawn.log, **hook.update_energy(drawn)}
    tensors = [*drawn.batch, drawn.release.weight, *log.values()]
    assert {str(tensor.device) for tensor in tensors} == {"meta"}


def test_a_forgotten_device_would_be_noticed():
    trainer = meta_trainer("iql", {})
    batch = meta_batch("iql")
    batch[2] = torch.zeros(B, 1)
    with pytest.raises(RuntimeError, match="device"):
        trainer.train(batch)


def test_a_host_read_would_be_noticed():
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty((), device="meta").item()
