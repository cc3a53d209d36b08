"""An update that is recorded and compiled does what the update itself does."""

import pytest
import torch

from corl import captured, compiled, traced
from corl.captured import WARM_UPS, Captured
from corl.compiled import descend
from corl.stacked import Stack

pytestmark = pytest.mark.skipif(bool(compiled.obstacle()), reason="nothing can compile")
N, B, S = 3, 6, 4


class Trainer:
    """Fits a line; the smallest thing that can be stacked."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.line = torch.nn.Linear(S, 1)
        self.optimizer = torch.optim.Adam(self.line.parameters(), lr=0.1)

    def _update(self, batch, twice):
        states, targets = batch
        loss = (self.line(states).squeeze(-1) - targets).square().mean(-1)
        descend(2.0 * loss if twice else loss, self.optimizer)
        return {"loss": loss.detach()}


def updates(graph, count):
    """Losses and weights of stacked trainers, with two forms of the update in turns."""
    stack = Stack([Trainer(seed) for seed in range(N)], graph=graph)
    draws = torch.Generator().manual_seed(0)
    losses = []
    for number in range(count):
        batch = [torch.randn(shape, generator=draws) for shape in ((N, B, S), (N, B))]
        twice = number % 2 == 0
        stack.trainer.optimizer.param_groups[0]["lr"] = 0.1 / (1 + number)
        losses.append(stack.trainer._update(batch, twice)["loss"].clone())
    return torch.stack(losses), stack.members[1].line.weight.detach().clone()


class Again:
    """Stands for a CUDA graph: makes the call again with its own copies of the arguments."""

    def __init__(self, function, values, structure, generators):
        self.function, self.structure = function, structure
        self.own = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]

    def replay(self, values):
        for own, value in zip(self.own, values, strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(value)
        args, named = captured.pytree.tree_unflatten(self.own, self.structure)
        return self.function(*args, **named)


def test_stacked_updates_as_a_graph_of_fused_kernels_are_those_without(monkeypatch):
    monkeypatch.setattr(captured, "_Graph", Again)
    found, expected = (updates(graph, 10) for graph in (True, False))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_is_read_may_be_replaced(monkeypatch):
    monkeypatch.setattr(captured, "_Graph", Again)
    held = [torch.zeros(2)]
    read = Captured(lambda place: held[0][place], reads=lambda: held)
    made = read._graphs
    for value in (1.0, 2.0):
        held[0] = torch.full((2,), value)
        for _ in range(WARM_UPS + 2):
            assert read(torch.tensor([1, 0])).tolist() == [value, value]
        assert len(made) == 1
    # The graph of before is gone: it would read what is not there any more.
    held[0] = torch.full((2,), 3.0)
    assert read(torch.tensor([1])).tolist() == [3.0] and not made


def test_nothing_is_recorded_where_nothing_compiles(monkeypatch):
    monkeypatch.setattr(compiled, "obstacle", lambda: "a C++ compiler")
    assert traced.fused(len) is len
