"""`StackedSession`: what a `Session` is to one run, for the runs of several seeds at once.

An algorithm's `train` makes its one loop with it. Batches, trainer and hook are of all seeds, and
each seed keeps a `Session` of its own, with environment, run folder, checkpoint and random streams:
what it writes is what a run alone would write, to rounding.

On a GPU the environments step together in processes, see `collectors`, and policies are evaluated
in others. A policy that samples its actions draws there from its seed's stream on the CPU, where a
run alone draws from the GPU's, so its exploration differs from that of a run alone.
"""

import dataclasses
import functools
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from corl import compiled, envs, evaluation, machine, pace, runs, traced
from corl.buffers import FIELDS, MixedBuffer, ReplayBuffer, TensorBatch, upload
from corl.captured import Captured
from corl.checkpoints import pack, rng_state, set_rng_state, unpack
from corl.collectors import Collected, Collectors, Work, tensors_of
from corl.finetune import Session
from corl.progress import progress_bar
from corl.stacked import Stack, of_seed
from corl.trained import acting
from corl.training_data import keeps_mc_returns, keeps_next_actions
from corl.workers import Ended


class Streams:
    """The global random streams of one seed, put aside while another seed has them.

    Attributes:
        numpy: the stream that draws the rows of batches.
    """

    def __init__(self) -> None:
        self.numpy = np.random.RandomState()
        self._take(rng_state())

    @property
    def cpu(self) -> torch.Tensor:
        """The state of torch's stream on the CPU."""
        return self._state["torch"]

    @cpu.setter
    def cpu(self, state: torch.Tensor) -> None:
        self._state["torch"] = state

    def _take(self, state: dict[str, Any]) -> None:
        self._state = state
        self.numpy.set_state(unpack(state["numpy"]))

    @contextmanager
    def all(self) -> Iterator[None]:
        """Inside, the global streams are this seed's."""
        set_rng_state({**self._state, "numpy": pack(self.numpy.get_state())})
        try:
            yield
        finally:
            self._take(rng_state())

    @contextmanager
    def torch(self) -> Iterator[None]:
        """Inside, torch's global streams are this seed's."""
        torch.set_rng_state(self._state["torch"])
        for number, stream in enumerate(self._state.get("cuda", ())):
            torch.cuda.set_rng_state(stream, number)
        try:
            yield
        finally:
            self._state["torch"] = torch.get_rng_state()
            if "cuda" in self._state:
                self._state["cuda"] = torch.cuda.get_rng_state_all()


class StackedBuffer:
    """Replay buffers of N seeds, whose rows lie in one tensor per field; batches (N, B, ...).

    Args:
        buffers: their storages become views.
        streams: that draw their rows.
    """

    def __init__(self, buffers: Sequence[ReplayBuffer], streams: Sequence[Streams]):
        self.members, self.streams = list(buffers), list(streams)
        self._device = buffers[0]._device
        self._fields: TensorBatch = []
        for name in FIELDS:
            if not hasattr(buffers[0], name):
                continue
            own = [getattr(buffer, name) for buffer in buffers]
            together = torch.stack(own)
            for buffer, view in zip(buffers, together, strict=True):
                setattr(buffer, name, view)
            self._fields.append(together)
        self._numbers = torch.arange(len(buffers), device=self._device).unsqueeze(1)
        self._read: Callable[..., TensorBatch] = self.read

    def _storage(self) -> TensorBatch:
        return self._fields

    def draw(self, batch_size: int) -> np.ndarray:
        """Row numbers (N, batch_size), each seed's from its own stream."""
        rows = [
            stream.numpy.randint(0, buffer._size, size=batch_size)
            for stream, buffer in zip(self.streams, self.members, strict=True)
        ]
        return np.stack(rows)

    def read(self, rows: torch.Tensor) -> TensorBatch:
        """The rows of these numbers (N, B), which are on the device."""
        return [field[self._numbers, rows] for field in self._fields]

    def gather(self, indices: np.ndarray) -> TensorBatch:
        """The rows of these numbers (N, B), with one upload."""
        return self._read(upload(indices, self._device))

    def capture(self) -> None:
        """See `ReplayBuffer.capture`."""
        self._read = Captured(self.read, reads=self._storage)

    def sample(self, batch_size: int) -> TensorBatch:
        """A batch of random rows of every seed."""
        return self.gather(self.draw(batch_size))

    def add(self, rows: torch.Tensor) -> None:
        """Write a row of every seed over its oldest; rows (N, fields side by side)."""
        # The seeds share their dataset and make the same steps.
        pointer = self.members[0]._pointer
        places = [field[:, pointer] for field in self._fields]
        widths = [field.shape[-1] for field in self._fields]
        torch._foreach_copy_(places, rows.split(widths, dim=-1))
        for member in self.members:
            member.advance()


class StackedSession:
    """The sessions of several seeds behind the interface of one.

    Args:
        configs: of the seeds.
        file, columns: as of `Session`.

    Raises: as `Session`.
    """

    def __init__(self, configs: Sequence[Any], file: str, columns: Sequence[str]):
        self.configs, self.config = list(configs), configs[0]
        self.sessions = [Session(config, file, columns) for config in configs]
        first = self.sessions[0]
        self.device, self.task = first.device, first.task
        self._parts: list[Any] = []  # that hold a part of each seed
        self._stack: Stack | None = None
        self._graph = bool(self.config.compile) and compiled.on_gpu(self.device)
        self._signal: int | None = None
        self._told = self.sessions[0]  # tells of an error
        self._evaluators: evaluation.Evaluators | None = None
        self._collectors: Collectors | None = None
        self._collecting = False  # do the collectors have the streams?

    @property
    def in_processes(self) -> bool:
        """Do environments and policies run in processes of their own?"""
        return self.device != "cpu"

    def __enter__(self) -> "StackedSession":
        self._open, self.streams = ExitStack(), []
        with self._open as opened:
            for session in self.sessions:
                session.__enter__()
                opened.push(functools.partial(self._close, session))
                # It has just seeded the global streams.
                self.streams.append(Streams())
            self._stack_buffers()
            self._listen(opened)
            if self.in_processes:
                most = len(self.sessions) * self.config.n_episodes
                count = min(most, pace.available_cores(openmp=False))
                self._evaluators = evaluation.Evaluators(max(1, count))
                opened.callback(self._evaluators.close)
            # Only where all has gone well.
            self._open = opened.pop_all()
        for session in self.sessions:
            session.run.prefix = f"[seed {session.config.seed}] "
            session.run.stacked = len(self.sessions)
        for session in self.sessions[1:]:
            # One bar tells of all.
            session.run.bar = progress_bar(total=1, disable=True)
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.__exit__(*error)

    def _close(self, session: Session, *error: Any) -> None:
        """End a session. One of them says what a run says of an error."""
        if (
            isinstance(error[1], FloatingPointError | OSError)
            and session is not self._told
        ):
            stopped = RuntimeError("another seed has ended all of them")
            error = type(stopped), stopped, None
        session.__exit__(*error)

    def _stack_buffers(self) -> None:
        offline = [session.offline_buffer for session in self.sessions]
        online = [session.online_buffer for session in self.sessions]
        self.offline_buffer = self.online_buffer = StackedBuffer(offline, self.streams)
        self.mixed: Any = self.offline_buffer
        if online[0] is not offline[0]:
            self.online_buffer = StackedBuffer(online, self.streams)
            ratio = self.config.mixing_ratio
            offline_rows: Any = self.offline_buffer
            online_rows: Any = self.online_buffer
            self.mixed = MixedBuffer(offline_rows, online_rows, ratio)
        if self._graph:
            for buffer in (self.offline_buffer, self.online_buffer, self.mixed):
                buffer.capture()
        self.sizes = self.sessions[0].sizes
        self.normalization = self.sessions[0].normalization

    def _listen(self, opened: ExitStack) -> None:
        """A signal stops all seeds after the same step; a second one at once."""

        def ask(number: int, frame: Any) -> None:
            if self._signal is not None:
                raise runs.Interrupted("", number)
            self._signal = number

        for number in (signal.SIGINT, signal.SIGTERM):
            opened.callback(signal.signal, number, signal.signal(number, ask))

    # -- parts ----------------------------------------------------------------------------

    def build(self, make_trainer: Callable[..., Any]) -> Any:
        """The trainer of all seeds: see `stacked.Stack`."""
        made = []
        for session, stream in zip(self.sessions, self.streams, strict=True):
            with stream.all():
                # One graph is made of all of them, if any.
                alone = dataclasses.replace(session.config, compile=False)
                made.append(make_trainer(alone, *session.sizes, session.device))
        self._made = made
        self._stack = Stack(made, [s.torch for s in self.streams], self._graph)
        return self._stack.trainer

    def keep(self, name: str, part: Any, loads: Collection[str] = ()) -> Any:
        """Each seed keeps its part; see `Session.keep`."""
        assert self._stack is not None
        whole: Any = self._stack if part is self._stack.trainer else part
        for session, member in zip(self.sessions, whole.members, strict=True):
            session.keep(name, member, loads)
        if loads and self.config.load_model:
            whole.gather()
        self._parts.append(whole)
        return part

    def make(self, name: str, make: Callable[[Any], Any]) -> Any:
        """See `Session.make`; there is no estimate that would make another."""
        return self.keep(name, make(self.config))

    def facts(self, config: Any = None) -> dict[str, Any]:
        """See `Session.facts`: `seeds` are those of each, and a function of all comes along."""
        assert self._stack is not None
        eager = {"compile": None, "capture": None}
        return {
            **self.sessions[0].facts(),
            **eager,
            "offline": self.offline_buffer,
            "online": self.online_buffer,
            "seeds": [{**session.facts(), **eager} for session in self.sessions],
            "over_seeds": self._stack.networks.over_seeds,
            "capture": traced.captured if self._graph else None,
        }

    def show(self, *args: Any) -> None:
        """See `Session.show`."""
        for session in self.sessions:
            session.show(*args)

    def weigh_rows(self, actor: Any, fit: Any) -> None:
        """Nothing: `not_stacked` leaves no other sampling than the uniform one."""

    def return_span(self) -> float:
        """See `Session.return_span`: the seeds share their dataset."""
        return self.sessions[0].return_span()

    # -- start and steps ------------------------------------------------------------------

    def start(self, offline: Any, online: Any, **options: Any) -> None:
        """What parts do first; without an estimate of the time."""
        print(f"{len(self.sessions)} seeds stacked on {self.device}")
        if self.in_processes and self.config.online_iterations:
            self._make_collectors()
        for session, stream in zip(self.sessions, self.streams, strict=True):
            with stream.all():
                session.start(offline, online, estimate=False)
        if self._collectors is not None:
            # What is wrong with them is said before any training.
            with self._told_by_its_seed(self._collectors):
                self._collectors.ready()

    def _make_collectors(self) -> None:
        """From now on the seeds' collectors are in processes."""
        assert self._stack is not None
        works = []
        for session, own in zip(self.sessions, self._made, strict=True):
            works.append(self._work(session, acting(own)))
            collected: Any = Collected(session._collector)
            session._collector = session._evaluator.collector = collected
            session.keep("collector", collected)
        tensors = self._stack.networks.together(tensors_of(acting(self._made[0])))
        self._collectors = Collectors(works, tensors, self.device)
        self._open.callback(self._collectors.close)

    def _work(self, session: Session, actor: Any) -> Work:
        config, task = session.config, self.task
        row = ReplayBuffer(
            task.state_dim,
            task.action_dim,
            buffer_size=1,
            mc_returns=keeps_mc_returns(config),
            next_actions=keeps_next_actions(config),
        )
        return Work(
            envs.make,
            task,
            config,
            session.normalization.mean,
            session.normalization.std,
            session._collector.reward,
            session._collector.state_dict(),
            evaluation.on_the_cpu(actor),
            row,
        )

    @contextmanager
    def _told_by_its_seed(
        self, processes: Collectors | evaluation.Evaluators
    ) -> Iterator[None]:
        """An error of a process in here is told by the seed that it worked for."""
        try:
            yield
        except Exception as error:
            if processes.failed is not None:
                self._told = self.sessions[processes.failed]
            if isinstance(error, Ended):
                raise RuntimeError(f"{error}; {self._way_on()}") from None
            raise

    def should_stop(self) -> bool:
        """Has somebody asked the runs to stop?"""
        return self._signal is not None or self.sessions[0].should_stop()

    def _steps(self, steps: Sequence[Iterator[int]], draws: bool) -> Iterator[int]:
        """All seeds make the same steps; each has its own streams where they draw."""
        streams = [own.torch if draws else nullcontext for own in self.streams]
        while True:
            if self.should_stop():
                for session in self.sessions:
                    session.run.stop_requested = True
                    session.run._signal = self._signal
            made = []
            for own, stream in zip(steps, streams, strict=True):
                with stream():
                    made.append(next(own, None))
            if made[0] is None:
                return
            yield made[0]

    def _actors(self, actor: Any) -> list[Any]:
        """Each seed's network in the place of one of the trainer of all seeds."""
        assert self._stack is not None
        own = vars(self._stack.trainer)
        name = next(name for name, part in own.items() if part is actor)
        return [getattr(member, name) for member in self._made]

    def offline(self, actor: Any) -> Iterator[int]:
        """See `Session.offline`."""
        pairs = zip(self.sessions, self._actors(actor), strict=True)
        steps = [session.offline(own) for session, own in pairs]
        return self._steps(steps, draws=False)

    @property
    def goes_online(self) -> bool:
        """See `Session.goes_online`."""
        return self.sessions[0].goes_online

    def switch(self, change: Callable[[], Any]) -> None:
        """See `Session.switch`."""
        self.sessions[0].switch(change)
        for session in self.sessions[1:]:
            session.switch(lambda: None)

    def online(self, actor: Any, explore: Any = None) -> Iterator[int]:
        """See `Session.online`."""
        if self._collectors is not None:
            return self._online_together(self._collectors, actor, explore)
        pairs = zip(self.sessions, self._actors(actor), strict=True)
        steps = [session.online(own, explore) for session, own in pairs]
        return self._steps(steps, draws=True)

    def _online_together(
        self, collectors: Collectors, actor: Any, explore: Any
    ) -> Iterator[int]:
        """`online` with all environments in processes."""
        with self._told_by_its_seed(collectors):
            collectors.begin(explore, [stream.cpu for stream in self.streams])
        self._collecting = True
        if episodes := self.sessions[0].switch_episodes:
            self._evaluate(self._actors(actor), episodes)
        pairs = zip(self.sessions, self._actors(actor), strict=True)
        steps = [session.online_steps(own) for session, own in pairs]
        for step in self._steps(steps, draws=False):
            with self._told_by_its_seed(collectors):
                rows = collectors.step()
            self.online_buffer.add(rows)
            yield step

    def updates(self) -> Iterator[int]:
        """See `Session.updates`."""
        yield from zip(*(session.updates() for session in self.sessions), strict=True)

    def log(self, metrics: dict[str, Any]) -> None:
        """End a step of every seed; metrics (N,)."""
        step = self.sessions[0].run.step + 1
        evaluated = self.sessions[0].evaluates(step)
        if not evaluated and step % self.config.log_freq:
            for session in self.sessions:
                session._stop_clock()
            return
        self._spread()
        if evaluated:
            actors = [session._actor for session in self.sessions]
            self._evaluate(actors, self.config.n_episodes)
        for number, (session, stream) in enumerate(
            zip(self.sessions, self.streams, strict=True)
        ):
            self._told = session
            with stream.all():
                session.log(of_seed(metrics, number))
        self._told = self.sessions[0]

    def _evaluate(self, actors: Sequence[Any], episodes: int) -> None:
        """Play so many episodes of every seed at the same time, if there are processes for it."""
        if self._evaluators is None:
            return
        jobs = []
        for session, own in zip(self.sessions, actors, strict=True):
            normal, seed = session.normalization, session._evaluator.seed
            actor = evaluation.on_the_cpu(own)
            jobs.append(
                evaluation.Episodes(
                    envs.make,
                    self.task,
                    session.config,
                    normal.mean,
                    normal.std,
                    actor,
                    seed,
                    range(episodes),
                )
            )
        with self._told_by_its_seed(self._evaluators):
            results = self._evaluators.evaluate(jobs)
        for session, result in zip(self.sessions, results, strict=True):
            session._evaluator.played = result

    def _spread(self) -> None:
        """Give every seed what it writes down."""
        for part in self._parts:
            part.spread()
        if self._collectors is None or not self._collecting:
            return
        states = self._collectors.states()
        for session, own, (state, stream) in zip(
            self.sessions, self.streams, states, strict=True
        ):
            session._collector.load_state_dict(state)
            own.cpu = stream

    def save(self) -> None:
        """See `Session.save`."""
        self._spread()
        for session, stream in zip(self.sessions, self.streams, strict=True):
            with stream.all():
                session.save()

    def finish(self) -> dict[str, Any]:
        """Save and end every run; returns {} (each summary is in its folder).

        Raises: as `Session.finish`.
        """
        self.save()
        if self.should_stop():
            run = self.sessions[0].run
            run.print(f"saved at step {run.step}; {self._each_alone()}")
            if self._signal is not None:
                raise SystemExit(128 + self._signal)
            return {}
        for session in self.sessions:
            session.run.finish()
        return {}

    def _each_alone(self) -> str:
        folders = [machine.tidy_path(session.run.folder) for session in self.sessions]
        ways = " or ".join(folders)
        return f"each seed goes on alone, equal to rounding, with: --resume {ways}"

    def _way_on(self) -> str:
        """What is left of runs that failed, and how they go on."""
        run = self.sessions[0].run
        if run.saved_step is None:
            return run.way_on()
        return f"the last checkpoints are of step {run.saved_step}, {self._each_alone()}"
