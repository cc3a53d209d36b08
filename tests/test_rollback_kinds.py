"""A snapshot puts everything that a training changes back, into the very same objects."""

import copy
import random

import numpy as np
import pytest
import torch

from corl.rollback import Snapshot


class Part:
    """What a checkpoint keeps: it has a `state_dict`, and all kinds of attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def state_dict(self):
        return {}


def make_trainer():
    """A network with a buffer, its optimizer and its schedule."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return Part(network=network, optimizer=optimizer, schedule=schedule, updates=0)


def train(trainer, updates=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        loss = trainer.network(torch.randn(8, 2, generator=generator)).square().sum()
        trainer.optimizer.zero_grad()
        loss.backward()
        trainer.optimizer.step()
        trainer.schedule.step()
        trainer.updates += 1


def numbers(trainer):
    """All numbers of a trainer; what Adam has not made yet counts as zeros."""
    state = {k: v.clone() for k, v in trainer.network.state_dict().items()}
    for i, parameter in enumerate(trainer.network.parameters()):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            value = trainer.optimizer.state[parameter].get(name, torch.zeros(1))
            state[f"{name} {i}"] = torch.as_tensor(value).sum()
    return {**state, "rate": trainer.optimizer.param_groups[0]["lr"]}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[key])), key


@pytest.mark.parametrize("before", [0, 4])
def test_a_trainer_is_rolled_back_and_goes_on_as_if_nothing_had_been(before):
    """Fresh from its making, and in the middle of its training."""
    trainer, twin = make_trainer(), make_trainer()
    train(trainer, before)
    train(twin, before)
    tensors = [id(p) for p in trainer.network.parameters()]
    expected = numbers(trainer)
    snapshot = Snapshot([trainer])
    train(trainer, seed=2)
    assert numbers(trainer)["rate"] != expected["rate"]
    snapshot.restore()
    assert_equal(numbers(trainer), expected)
    assert trainer.updates == before
    assert [id(p) for p in trainer.network.parameters()] == tensors
    train(trainer, seed=3)
    train(twin, seed=3)
    assert_equal(numbers(trainer), numbers(twin))


def test_the_modes_of_networks_are_put_back():
    trainer = make_trainer()
    trainer.network[1].eval()
    snapshot = Snapshot([trainer])
    trainer.network.eval()
    snapshot.restore()
    assert [m.training for m in trainer.network.modules()] == [True, True, False]


def test_every_kind_of_attribute_is_put_back_in_place():
    inner = Part(count=1)
    part = Part(
        number=1,
        tensor=torch.arange(3.0),
        array=np.arange(3),
        entries={"a": 1, "deep": torch.ones(2)},
        items=[1, torch.zeros(2)],
        stream=torch.Generator().manual_seed(5),
        inner=inner,
    )
    before, old = dict(vars(part)), copy.deepcopy(part.stream.get_state())
    snapshot = Snapshot([part])
    part.number, part.new, inner.count = 2, "new", 7
    part.tensor += 1
    part.array += 1
    part.entries["deep"] += 1
    part.entries.update(a=2, b=3)
    part.items[1] += 1
    part.items.append(4)
    torch.randn(3, generator=part.stream)
    part.inner = None
    snapshot.restore()
    assert vars(part).keys() == before.keys()
    assert all(getattr(part, name) is value for name, value in before.items())
    assert part.number == 1 and inner.count == 1
    assert part.tensor.tolist() == part.array.tolist() == [0, 1, 2]
    assert part.entries.keys() == {"a", "deep"} and part.entries["a"] == 1
    assert part.entries["deep"].tolist() == [1, 1]
    assert part.items[0] == 1 and len(part.items) == 2
    assert part.items[1].tolist() == [0, 0]
    assert torch.equal(part.stream.get_state(), old)


def test_an_attribute_that_stayed_is_not_set_again():
    """Setting it would tell a compiled graph that something has changed."""

    class Watched(Part):
        def __setattr__(self, name, value):
            written.append(name)
            vars(self)[name] = value

    written = []
    part = Watched(network=make_trainer().network, count=1)
    snapshot = Snapshot([part])
    part.count = 2
    snapshot.restore()
    assert written == ["count", "count"] and part.count == 1


def test_what_is_left_out_is_not_looked_into():
    buffer = Part(rows=torch.zeros(2))
    part = Part(buffer=buffer)
    snapshot = Snapshot([part], leave=[buffer])
    buffer.rows += 1
    snapshot.restore()
    assert buffer.rows.tolist() == [1, 1] and part.buffer is buffer


def test_the_global_streams_are_put_back():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    snapshot = Snapshot([])
    first = draw()
    snapshot.restore()
    assert draw() == first
