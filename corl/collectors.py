"""The environments of several seeds, which step together, each in a process of its own.

A policy of one state is too small for a GPU, where the host waits longer for it than it takes. So
each seed has a process on the CPU with its collector and its policy. Before a step the parameters
of all policies are copied from the GPU into memory that all processes share, and after it the new
rows of all seeds lie there and go up in one copy.

Random numbers: noise of the exploring policy comes from the CPU stream of torch of that seed. A run
alone on a GPU draws the noise of `add_noise` from there, too, but that of a policy which samples
from the stream of the GPU. The process has the stream as long as it steps the environment; `state`
brings it back.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

from corl import tasks
from corl.acting import CheckedEnv, OnlineCollector, wrap_env
from corl.buffers import ReplayBuffer
from corl.workers import Workers, request

# Tensors begin at multiples of so many float32 numbers, as torch's own do, since the products of
# some libraries depend on it in the last bit.
ALIGNED = 16

Explore = Callable[[np.ndarray], np.ndarray]


class Work(NamedTuple):
    """What a process needs to collect for one seed."""

    make: Callable[[tasks.Task, str], gym.Env]
    task: tasks.Task
    config: Any  # of the run
    mean: Any  # of the states, (S,) or a number
    std: Any
    reward: Callable[[Any], float]  # reward -> reward to store
    state: dict[str, Any]  # of the collector
    actor: Any  # on the CPU; its parameters move into shared memory
    buffer: ReplayBuffer  # of one row, on the CPU; it moves there, too


class SharedMemory:
    """Tensors of float32 numbers side by side, in memory that processes share.

    Args:
        shapes: of the tensors.
        device: that copies from it and to it.

    Attributes:
        all: the memory, 1-d.
        tensors: views of it, of these shapes.
    """

    def __init__(self, shapes: Sequence[torch.Size], device: str):
        sizes = [-(-shape.numel() // ALIGNED) * ALIGNED for shape in shapes]
        self.all = torch.zeros(sum(sizes)).share_memory_()
        self.tensors = views(self.all, shapes)
        self._kept = device.startswith("cuda") and self._keep(device)

    def _keep(self, device: str) -> bool:
        """Keep the memory in its place, so that a GPU reaches it without help of the processor.

        Where the system refuses that, copies take longer.
        """
        size = self.all.numel() * self.all.element_size()
        refused = torch.cuda.cudart().cudaHostRegister(self.all.data_ptr(), size, 0)
        if int(refused):
            # The next call of CUDA would raise it.
            with suppress(RuntimeError):
                torch.zeros(1, device=device)
        return not int(refused)

    def close(self) -> None:
        """Give the memory back to the system."""
        if self._kept:
            torch.cuda.cudart().cudaHostUnregister(self.all.data_ptr())
            self._kept = False


def views(memory: torch.Tensor, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    """Tensors of these shapes in 1-d memory, one behind the other."""
    found, start = [], 0
    for shape in shapes:
        found.append(memory[start : start + shape.numel()].view(shape))
        start += -(-shape.numel() // ALIGNED) * ALIGNED
    return found


class Collectors:
    """A process for each seed, which end with this one.

    Args:
        works: of the seeds.
        tensors: parameters and buffers of the policies of all seeds, (N, ...), on the device, as
            `tensors_of` gives them for one.
        device: where they are, and where rows go.
    """

    def __init__(
        self, works: Sequence[Work], tensors: Sequence[torch.Tensor], device: str
    ):
        self.device, self._tensors = device, [tensor.detach() for tensor in tensors]
        shapes = [tensor.shape for tensor in tensors]
        self._parameters = SharedMemory(shapes, device)
        self._staged = self._parameters.all
        if device != "cpu":
            self._staged = torch.zeros_like(self._staged, device=device)
        self._staged_views = views(self._staged, shapes)
        self.widths = [field.shape[1] for field in works[0].buffer._storage()]
        shape = torch.Size((len(works), sum(self.widths)))
        self._rows = SharedMemory([shape], device)
        for number, work in enumerate(works):
            own = tensors_of(work.actor)
            for tensor, shared in zip(own, self._parameters.tensors, strict=True):
                tensor.data = shared[number]
            row = self._rows.tensors[0][number : number + 1]
            work.buffer.place(row.split(self.widths, dim=1))
        makes = [partial(_Collector, work) for work in works]
        self._workers = Workers(makes, "steps an environment")

    @property
    def failed(self) -> int | None:
        """Number of the seed that met an error, or None."""
        return self._workers.failed

    def ready(self) -> None:
        """Wait for the processes. Raises as `Workers.ready`."""
        self._workers.ready()

    def begin(self, explore: Explore | None, streams: Sequence[torch.Tensor]) -> None:
        """Hand each seed its random stream, and all of them how they explore.

        Args:
            explore: as of `OnlineCollector.step`.
            streams: states of torch's stream on the CPU.
        """
        self.ready()
        self._workers.all([request("begin", explore, stream) for stream in streams])

    def step(self) -> torch.Tensor:
        """One environment step of every seed with its present policy.

        Returns:
            The new rows (N, fields side by side) on the device.

        Raises:
            FloatingPointError: as of `OnlineCollector.step`.
            Ended: a process has ended.
        """
        self._bring_parameters()
        self._workers.all([STEP] * len(self._workers.processes))
        # The copy is over before the next one from the device, which waits, and so before the
        # next step writes here.
        return self._rows.tensors[0].to(self.device, non_blocking=True)

    @torch.no_grad()
    def _bring_parameters(self) -> None:
        torch._foreach_copy_(self._staged_views, self._tensors)
        if self.device != "cpu":
            self._parameters.all.copy_(self._staged, non_blocking=True)
            torch.cuda.current_stream(self.device).synchronize()

    def states(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """For each seed the collector's `state_dict` and its random stream."""
        return self._workers.all([request("state")] * len(self._workers.processes))

    def close(self) -> None:
        """End the processes."""
        self._workers.close()
        self._parameters.close()
        self._rows.close()


STEP = request("step")


def tensors_of(network: Any) -> list[torch.Tensor]:
    """Parameters and buffers of a network, in a fixed order."""
    return [*network.parameters(), *network.buffers()]


class Collected:
    """What a run knows of its collector, which is in another process.

    Args:
        collector: the run's own, which has not been used.

    Attributes:
        task, successes, episode: as of `OnlineCollector`, when its state came last.
    """

    def __init__(self, collector: OnlineCollector):
        self.task = collector.task
        self.load_state_dict(collector.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """As of `OnlineCollector`."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep a state that came."""
        self._state = state
        self.successes, self.episode = state["successes"], state["episode"]


class _Collector:
    """Collects for one seed, in a process of its own."""

    def __init__(self, work: Work):
        config = work.config
        raw = work.make(work.task, config.env_backend)
        env = wrap_env(CheckedEnv(raw, "training", config), work.mean, work.std)
        self.collector = OnlineCollector(env, work.buffer, work.task, "cpu", work.reward)
        self.collector.load_state_dict(work.state)
        self.actor: Any = work.actor.train()
        self.explore: Explore | None = None

    def begin(self, explore: Explore | None, stream: torch.Tensor) -> None:
        """See `Collectors.begin`."""
        torch.set_rng_state(stream)
        self.explore = explore

    def step(self) -> None:
        """One environment step."""
        self.collector.step(self.actor, self.explore)

    def state(self) -> tuple[dict[str, Any], torch.Tensor]:
        """See `Collectors.states`."""
        return self.collector.state_dict(), torch.get_rng_state()
