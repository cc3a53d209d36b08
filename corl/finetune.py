"""The parts of an offline-to-online run, under CORL's names where CORL has them.

An algorithm file brings its networks, losses and loop. The rest is here: `Session`, which opens a
run, counts its steps, logs, saves, resumes and ends it, and by their names all the parts that
live in `buffers`, `rewards`, `acting` and `training_data`. `Session` is no framework: the loop
stands in the algorithm file.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Protocol, Tuple, Union

import numpy as np
import torch

from corl import (
    checkpoints,
    compiled,
    drop,
    duration,
    envs,
    files,
    finite,
    fits,
    machine,
    own_envs,
    pace,
    runs,
    sampling,
    tasks,
)
from corl.acting import (  # noqa: F401
    TOGETHER,
    Actor,
    CheckedEnv,
    Evaluator,
    OnlineCollector,
    add_noise,
    eval_actor,
    is_goal_reached,
    set_env_seed,
    set_seed,
    wrap_env,
)
from corl.buffers import (  # noqa: F401
    JoinedBuffer,
    MixedBuffer,
    ReplayBuffer,
    TensorBatch,
)
from corl.captured import Captured
from corl.data import sources
from corl.layers import ConfigError, expand
from corl.progress import progress_bar
from corl.rewards import (  # noqa: F401
    LINEAR_REWARDS,
    SPAN_REWARDS,
    RewardRule,
    episode_ends,
    get_return_to_go,
    modify_reward,
    modify_reward_linear,
    modify_reward_linear_online,
    modify_reward_online,
    return_reward_range,
    scales_by_span,
)
from corl.rollback import Snapshot
from corl.trained import keep_at_switch
from corl.training_data import (  # noqa: F401
    Data,
    Normalization,
    check_memory,
    compute_mean_std,
    load_data,
    new_buffer,
    normalize_states,
    require_episodes,
    reward_rule,
)

# Seconds of work between two online steps that a killed process may lose.
SAVE_SECONDS = 300.0
# What every algorithm logs beside its losses.
COLUMNS = ("train_return", "train_score", "train_length", "success_rate", "regret")


class Pretraining(NamedTuple):
    """What learns before the offline phase, on the dataset.

    Attributes:
        name: shown while it runs.
        updates: how many it makes.
        update: makes one; returns its losses, numbers or 0-d tensors.
    """

    name: str
    updates: int
    update: Callable[[], Dict[str, Any]]


class Work(Protocol):
    """What a part does before some online steps, in pieces; see `Session.between`.

    Attributes:
        trains: whether a piece is an update of the trainer, which the run counts as one.
    """

    trains: bool

    def before(self, step: int) -> None:
        """The online step `step`, from 0, is to be made; called again after a resume."""

    def phase(self) -> Optional[Tuple[str, int, int]]:
        """What is under way: its name, pieces done and all pieces; None where nothing is left."""

    def advance(self) -> Dict[str, Any]:
        """Make one piece; returns metrics, numbers or 0-d tensors."""

    def report(self) -> str:
        """What was done, for a line on the screen."""

    def estimate_online(
        self, seconds_of: Callable[[Callable[[], Any]], float], first: int, last: int
    ) -> Dict[str, float]:
        """Its name -> the seconds it will take in the online steps `first` to `last`."""


class Sizes(NamedTuple):
    """What a network has to know of a task."""

    state_dim: int
    action_dim: int
    max_action: float


def _check_places(config: Any) -> None:
    """Raise ConfigError where the run cannot write what it has to, before any work."""
    fields = ("resume" if config.resume else "runs_dir", "checkpoints_path")
    for name in fields:
        place = getattr(config, name)
        if place is None:
            continue
        try:
            files.check_writable(place)
        except OSError as error:
            raise ConfigError(f"{name}: {error}") from None


class Session:
    """A run from its start to its end: device, data, environments, seeds, folder and steps.

        with Session(config, __file__, COLUMNS) as session:
            trainer = session.keep("trainer", make_trainer(...), loads=CHECKPOINT_PARTS)
            session.start(offline=..., online=...)
            session.pretrain(...)
            for _ in session.offline(trainer.actor):
                session.log(...)
            session.switch(...)
            for _ in session.online(trainer.actor):
                losses = {}
                for _ in session.updates():
                    losses = ...
                session.log(losses)
            return session.finish()

    Everything that a checkpoint holds exists before `start`. Inside the block there are
        device, task, sizes;
        normalization: of the states;
        offline_buffer, online_buffer: one and the same without `mixing_ratio`;
        mixed: where online batches come from without any method;
        run: the run folder.

    Args:
        config: the algorithm's config.
        file: the algorithm's file; its name is the algorithm's.
        columns: metrics that the algorithm logs.

    Raises:
        ValueError, RuntimeError, ImportError: bad settings, data or environment, before any
            training.
    """

    def __init__(self, config: Any, file: str, columns: Sequence[str]):
        self.config = config
        _check_places(config)
        self.device = machine.pick_device(config.device)
        self.task = envs.task_of(config)
        if said := own_envs.about_actions(self.task):
            print(said)
        check_memory(config, self.task, self.device)
        self._env = envs.make(self.task, config.env_backend)
        self._eval_env = envs.make(self.task, config.env_backend)
        count = min(config.n_episodes, TOGETHER) if config.eval_together else 1
        self._more_eval_envs = [envs.make(self.task) for _ in range(count - 1)]
        pace.settle(config, self.device)
        machine.configure_threads(config.threads)
        if config.compile:
            compiled.keep_graphs_in(sources.cache_folder() / "compiled")
        self._algorithm, self._columns = Path(file).stem, [*columns, *COLUMNS]
        if self.task.scale is tasks.RAW:
            # It would be `train_return` once more.
            self._columns.remove("train_score")
        if config.sampling == "on_policy":
            self._columns += sampling.COLUMNS
        self._weighted: Dict[str, sampling.OnPolicyBuffer] = {}  # rows -> their buffer
        self._early = frozenset(config.early_evaluations())
        self._parts: Dict[str, Any] = {}
        self._total = config.offline_iterations + config.online_iterations
        self._clock: Optional[float] = None  # when the running updates began
        self._phase = ""
        self._watch = pace.RateWatch({}, config.threads)
        # Makes the part that presets differ in.
        self._make: Optional[Callable[[Any], Any]] = None
        self._work: Optional[Work] = None

    def __enter__(self) -> "Session":
        self.run = runs.Run(
            self.config, self._algorithm, self._columns, self.task.scale
        ).__enter__()
        self.run.device = self.device
        try:
            self._open()
        except BaseException:
            self.run.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.run.__exit__(*self._true_error(error))

    def _true_error(self, error: Tuple[Any, ...]) -> Tuple[Any, ...]:
        """The error that ends the run; where weights are not finite, that is what it is."""
        # torch refuses some of what bad weights lead to, such as a distribution of nan.
        in_a_step = self.run.current is not None
        if in_a_step and isinstance(error[1], RuntimeError | ValueError):
            try:
                finite.check_weights(self._parts, self.config)
            except FloatingPointError as diverged:
                return type(diverged), diverged, None
            except RuntimeError:
                # The device itself has failed: the first error says more.
                pass
        return error

    def _open(self) -> None:
        config, task, device = self.config, self.task, self.device
        data = load_data(config, task, device, self.run.return_rule)
        self.run.dataset, self.normalization = data.provenance, data.normalization
        self.run.check_dataset()
        self._return_range = data.return_range
        mean, std = data.normalization.mean, data.normalization.std
        self.run.state_moments = mean, std
        roles = ["training", *["evaluation"] * (1 + len(self._more_eval_envs))]
        raws = self._env, self._eval_env, *self._more_eval_envs
        env, eval_env, *more = (
            wrap_env(CheckedEnv(raw, role, config), mean, std)
            for raw, role in zip(raws, roles, strict=True)
        )
        self.offline_buffer = new_buffer(config, task, device)
        self.offline_buffer.load_d4rl_dataset(data.arrays)
        self.online_buffer = self.offline_buffer
        self.mixed: Union[ReplayBuffer, MixedBuffer] = self.offline_buffer
        ratio = getattr(config, "mixing_ratio", None)
        if ratio is not None:
            self.online_buffer = new_buffer(config, task, device)
            self.mixed = MixedBuffer(self.offline_buffer, self.online_buffer, ratio)
        if config.compile and compiled.on_gpu(device):
            for buffer in (self.offline_buffer, self.online_buffer, self.mixed):
                buffer.capture()
        space: Any = env.action_space
        max_action = float(space.high[0])
        self.sizes = Sizes(task.state_dim, task.action_dim, max_action)
        # Here begin the random streams: networks, batches, exploration.
        set_seed(config.seed, env)
        set_env_seed(eval_env, config.eval_seed)
        self._reward = self._reward_rule(data.reward_args)
        self._collector = OnlineCollector(
            env,
            self.online_buffer,
            task,
            device,
            self._reward,
            config.uniform_steps(),
        )
        self._evaluator = Evaluator(eval_env, config, device, self._collector, more)
        self.keep("online_buffer", self.online_buffer)
        self.keep("collector", self._collector)
        self.keep("evaluator", self._evaluator)

    def _reward_rule(self, args: Dict[str, Any]) -> Callable[[float], float]:
        if not self.config.normalize_reward:
            return float
        # It may go to another process.
        return partial(reward_rule(self.config).online, env_name=self.config.env, **args)

    # -- parts ----------------------------------------------------------------------------

    def build(self, make_trainer: Callable[..., Any]) -> Any:
        """The trainer of this run: `make_trainer(config, *sizes, device)`."""
        return make_trainer(self.config, *self.sizes, self.device)

    def keep(self, name: str, part: Any, loads: Collection[str] = ()) -> Any:
        """Put a part into every checkpoint; returns it.

        Args:
            name: its name in checkpoints.
            part: has `state_dict` and `load_state_dict`. It may have `estimate(seconds_of)`, the
                seconds of what it does before the first step, and `begin(should_stop)`, which
                does that. `load_state_dict` may set its attribute `reseeded`: a random stream is
                of another kind of device and begins anew.
            loads: the keys of CORL's checkpoints that `part.load_weights` reads; then
                `load_model` is loaded into it, unless a checkpoint is about to be.
        """
        if loads and self.config.load_model and self.run.checkpoint is None:
            path = expand(self.config.load_model)
            state = checkpoints.load_corl_checkpoint(path, loads)
            fits.load_weights(part, state, path)
            if bad := finite.bad_weight({name: part}):
                raise ValueError(
                    f"load_model {path} holds weights that are not finite ({bad}); choose a "
                    "checkpoint of before its run diverged"
                )
        self._parts[name] = part
        return part

    def make(self, name: str, make: Callable[[Any], Any]) -> Any:
        """Put the part `make(config)` into every checkpoint, see `keep`; returns it.

        The estimate of a long run makes it of other configs, too: the run's own with a preset.
        """
        self._make = make
        return self.keep(name, make(self.config))

    def weigh_rows(self, actor: Any, fit: sampling.Fit) -> None:
        """With `sampling: on_policy`, `mixed` and `facts` draw rows by how on-policy they are.

        Where there are two buffers, each draws so by itself. Batches of the offline phase stay
        uniform.

        Args:
            actor: in evaluation mode while `fit` is called.
            fit: (states (B, S), actions (B, A)) as in the buffers -> how well the current policy
                fits them, (B,); see `sampling.standard_log_prob`.

        Raises:
            ValueError: the dataset has no trajectories, and they are what has a weight.
        """
        config = self.config
        if config.sampling == "uniform":
            return
        unit = config.sampling_unit
        if unit == "trajectory" and self.run.dataset.get("order") == "shuffled":
            raise ValueError(
                f"{self.run.dataset['path']}: the rows are shuffled, so there are no "
                "trajectories; set sampling_unit to transition"
            )
        steps = config.online_iterations - config.online_warmup
        left = min(steps, self._total - self.run.step) * config.utd

        def weighted(buffer: ReplayBuffer, rows: str) -> Any:
            made = sampling.OnPolicyBuffer(
                buffer,
                actor,
                fit,
                temperature=config.sampling_temperature,
                refresh=config.sampling_refresh,
                unit=unit,
                rows=rows,
                batches=max(left, 0),
            )
            self._weighted[rows] = made
            return self.keep(f"sampling_{rows}", made)

        if self.online_buffer is self.offline_buffer:
            self.mixed = weighted(self.online_buffer, "all")
            return
        halves = (
            weighted(self.offline_buffer, "offline"),
            weighted(self.online_buffer, "online"),
        )
        self.mixed = MixedBuffer(*halves, config.mixing_ratio)

    def _rows_metrics(self) -> Dict[str, float]:
        """How unequal the weights are, and whose rows the last batch of one buffer held."""
        if not self._weighted:
            return {}
        found = [buffer.metrics for buffer in self._weighted.values() if buffer.draws]
        shares = [metrics["effective_share"] for metrics in found]
        metrics = {"effective_share": min(shares)} if shares else {}
        if shares and "all" in self._weighted:
            metrics["online_share"] = found[0]["online_share"]
        return metrics

    def facts(self, config: Any = None) -> Dict[str, Any]:
        """What a plugin around the two buffers wants to know, as arguments.

        A config that is not the run's own is for an estimate and stays eager.
        """
        own = config is None or config is self.config
        compile = own and self.config.compile
        captures = compile and compiled.on_gpu(self.device)
        return {
            "offline": self._weighted.get("offline", self.offline_buffer),
            "online": self._weighted.get("online", self.online_buffer),
            "mixing_ratio": self.config.mixing_ratio,
            "unnormalize": self.normalization.undo,
            "max_action": self.sizes.max_action,
            "dataset_hash": self.run.dataset["sha256"],
            "cache_dir": sources.cache_folder(),
            "device": self.device,
            "seed": self.config.seed,
            "compile": partial(compiled.function, device=self.device)
            if compile
            else None,
            "capture": Captured if captures else None,
            "bar": progress_bar,
            # `start` begins what a part does first.
            "begin": False,
            "online_steps": self._steps_since_first_update,
            "online_length": self.config.online_iterations,
        }

    def _steps_since_first_update(self) -> int:
        begins = self.config.offline_iterations + self.config.online_warmup
        return max(self.run.step - begins, 0)

    def show(
        self,
        panels: Sequence[Dict[str, Any]],
        means: Dict[str, str],
        undefined: Collection[str] = (),
    ) -> None:
        """Panels for curves.png, means for the summary, metrics without a value: see `runs.Run`."""
        self.run.panels, self.run.means, self.run.undefined = panels, means, undefined

    def episodes(self, purpose: str) -> Tuple[np.ndarray, np.ndarray]:
        """Number of the episode, from 0, and raw reward of each row of the dataset, (N,).

        Args:
            purpose: what needs them, for the error.

        Raises:
            ValueError: the rows are shuffled.
        """
        try:
            require_episodes(self.run.dataset, purpose)
        except ValueError as error:
            raise ValueError(f"{self.run.dataset['path']}: {error}") from None
        states, _, rewards, next_states, dones = (
            field.cpu().numpy() for field in self.offline_buffer.rows()[:5]
        )
        rows = {"observations": states, "next_observations": next_states}
        ends = episode_ends({**rows, "terminals": dones[:, 0]}, self.task.horizon)
        bias = self._reward(0.0)
        raw = (rewards[:, 0].astype(np.float64) - bias) / (self._reward(1.0) - bias)
        return np.append(0, np.cumsum(ends)[:-1]), raw

    def return_span(self) -> float:
        """Largest minus smallest return of the dataset's finished episodes, as trained on.

        Antmaze's returns, which count rows at the goal, scale nothing: 0.
        """
        if self.task.robot == "antmaze":
            return 0.0
        low, high = self._return_range()
        return high - low

    # -- start ----------------------------------------------------------------------------

    def start(
        self,
        offline: Callable[[], Any],
        online: Callable[[], Any],
        estimate: bool = True,
        period: int = 1,
        other: Optional[duration.Other] = None,
        pretraining: Optional[Pretraining] = None,
    ) -> None:
        """Say how long the run will take, do what parts do first, go on from a checkpoint.

        Args:
            offline, online: one update of each phase. They are tried on the real parts, which
                are put back afterwards, so that neither bits nor compiled graphs notice.
            estimate: False leaves the trial out.
            period: updates after which their work repeats, such as those between two updates of
                a delayed actor. The trial is made of whole periods.
            other: an online update with a part that `make` made of another preset's config. A
                long run names the presets that make it shorter.
            pretraining: what `pretrain` will be given; here it counts for the time alone.
        """
        if estimate:
            updates = {"offline": offline, "online": online}
            watch = duration.Stopwatch(self.device, period)
            self._estimate(updates, watch, other, pretraining)
        for part in self._parts.values():
            if hasattr(part, "begin"):
                part.begin(self.should_stop)
        if self.run.checkpoint is not None:
            self.run.restore(self._parts)
            if bad := finite.bad_weight(self._parts):
                raise ValueError(
                    f"{self.run.folder / 'checkpoint.pt'} is of a run that diverged: its {bad} "
                    "is not finite; start a new run, with a lower learning rate"
                )

    def _estimate(
        self,
        updates: Dict[str, Callable[[], Any]],
        watch: duration.Stopwatch,
        other: Optional[duration.Other],
        pretraining: Optional[Pretraining],
    ) -> None:
        """Try the updates of both phases, and say how long the run will take."""
        run, config = self.run, self.config
        first = config.offline_iterations
        left = {
            "offline": max(first - run.step, 0),
            "online": (self._total - max(first, run.step)) * config.utd,
        }
        # What comes before the online phase is over in a run that has switched.
        parts = [] if run.switched else list(self._parts.values())
        untouched = self.offline_buffer, self.online_buffer, self._collector
        snapshot = Snapshot(self._parts.values(), (*untouched, self._evaluator))
        presets: Dict[str, float] = {}
        with duration.lent_rows(self.online_buffer, self.offline_buffer):
            of_parts = duration.seconds_of_parts(parts, watch)
            before = self._seconds_of_pretraining(pretraining, watch)
            each = {k: watch.seconds_per_call(updates[k]) for k in left if left[k]}
            phases = {phase: left[phase] * each[phase] for phase in each}
            seconds = {**before, **of_parts, **phases}
            if self._work is not None and left["online"]:
                steps = max(run.step - first, 0), self._total - first
                seconds.update(self._work.estimate_online(watch.seconds, *steps))
            long = sum(seconds.values()) > duration.LONG and not run.step
            if long and self._make is not None and other is not None:
                same = sum(before.values()) + phases.get("offline", 0.0)
                others = duration.Alternatives(config, self._make, other)
                presets = others.seconds(same, left["online"], watch)
        snapshot.restore()
        self._watch = pace.RateWatch(each, config.threads)
        for line in duration.lines(self.device, seconds, presets, config.QUICK_START):
            print(line)

    def _seconds_of_pretraining(
        self, pretraining: Optional[Pretraining], watch: duration.Stopwatch
    ) -> Dict[str, float]:
        """Its name -> its seconds, where some of it is left."""
        if pretraining is None or self.run.step:
            return {}
        left = pretraining.updates - self.run.pretrained
        if left <= 0:
            return {}
        return {pretraining.name: left * watch.seconds_per_call(pretraining.update)}

    # -- steps ----------------------------------------------------------------------------

    def should_stop(self) -> bool:
        """Has somebody asked the run to stop?"""
        return self.run.stop_requested

    def pretrain(self, pretraining: Pretraining) -> None:
        """Make the updates that are left before the offline phase, none after its first step.

        What they change must be in the parts' `state_dict`. It is saved every `eval_freq`
        updates and where somebody asks to stop, and a resumed run goes on from there.

        Raises:
            FloatingPointError: a loss or a weight is not finite.
        """
        name, last, update = pretraining
        run, config, losses = self.run, self.config, {}
        if run.step or run.pretrained >= last:
            return
        with progress_bar(desc=name, initial=run.pretrained, total=last) as bar:
            while run.pretrained < last and not run.stop_requested:
                run.current = name, run.pretrained + 1
                losses = update()
                run.pretrained += 1
                done = run.pretrained == last
                if done or run.pretrained % config.log_freq == 0:
                    losses = run.read(losses)
                    shown = {k: f"{v:.4f}" for k, v in losses.items()}
                    bar.set_postfix(shown, refresh=False)
                bar.update()
                if done or run.pretrained % config.eval_freq == 0:
                    self.save()
        if run.pretrained == last:
            found = ", ".join(f"{k} {v:.4f}" for k, v in losses.items())
            run.print(f"{name}: {last} updates, {found}")
        run.current = None

    def offline(self, actor: Actor) -> Iterator[int]:
        """The offline steps that are left, one update each; `actor` is evaluated."""
        self._phase, self._actor = "offline", actor
        for t in self.run.steps("offline", self.config.offline_iterations):
            self._count(1)
            yield t

    @property
    def goes_online(self) -> bool:
        """Does the next step belong to the online phase?"""
        begun = self.config.offline_iterations <= self.run.step < self._total
        return begun and not self.run.stop_requested

    def switch(self, change: Callable[[], Any]) -> None:
        """Make the change from the offline to the online phase, once, at the crossing.

        What it changes must be in the parts' `state_dict`.
        """
        if self.goes_online and not self.run.switched:
            change()
            self.run.switched = True

    def between(self, work: Work) -> None:
        """Before each online step a part does what is due then; call this before `start`.

        What it changes must be in the parts' `state_dict`. It is saved every `SAVE_SECONDS`, at
        its end and where somebody asks to stop, and a resumed run goes on from there.
        """
        self._work = work

    def _worked(self, t: int) -> bool:
        """Do what is due before the step t; False where somebody asked to stop in the middle.

        Raises:
            FloatingPointError: a metric is not finite.
        """
        work, run = self._work, self.run
        if work is None:
            return True
        work.before(t - self.config.offline_iterations)
        if work.phase() is None:
            return True
        saved = since = time.perf_counter()
        while (phase := work.phase()) is not None and not run.stop_requested:
            name, done, total = phase
            with progress_bar(desc=name, initial=done, total=total, leave=False) as bar:
                while done < total and not run.stop_requested:
                    self._phase, run.current = name, (name, done + 1)
                    if work.trains:
                        self._count(1)
                    metrics, done = work.advance(), done + 1
                    self._stop_clock()
                    if done == total or done % self.config.log_freq == 0:
                        run.read(metrics)
                    bar.update()
                    run.work_begun += time.perf_counter() - since
                    since = time.perf_counter()
                    if since - saved > SAVE_SECONDS and work.phase() is not None:
                        self.save()
                        saved = time.perf_counter()
        self._phase, run.current = "online", ("online", t + 1)
        if work.phase() is not None:
            return False
        run.work_seconds.append(run.work_begun)
        took = machine.readable_time(run.work_begun)
        run.work_begun = 0.0
        run.print(
            f"online step {t - self.config.offline_iterations}: {work.report()}, {took}"
        )
        self.save()
        return True

    def online(
        self,
        actor: Actor,
        explore: Optional[Callable[[np.ndarray], np.ndarray]] = None,
    ) -> Iterator[int]:
        """The online steps that are left, one environment step each, made before the body.

        Args:
            actor: acts, and is evaluated.
            explore: action (A,) -> action to execute; default: the actor's own.
        """
        for t in self.online_steps(actor):
            self._collector.step(actor, explore)
            yield t

    def online_steps(self, actor: Actor) -> Iterator[int]:
        """As `online`, for a caller that makes the environment steps."""
        self._phase, self._actor = "online", actor
        self._keep_policy()
        self._evaluate_at_the_switch()
        for t in self.run.steps("online", self._total):
            if not self._worked(t):
                return
            yield t

    @property
    def _at_the_switch(self) -> bool:
        return self.goes_online and self.run.step == self.config.offline_iterations

    def _keep_policy(self) -> None:
        """Before the first online step, for `corl.watch`; the checkpoint will be overwritten."""
        actor: Any = self._actor
        if self._at_the_switch and isinstance(actor, torch.nn.Module):
            normal = self.normalization
            keep_at_switch(self.run.folder, actor, normal.mean, normal.std)

    def _evaluate_at_the_switch(self) -> None:
        """Once, with episodes of a number of its own, before the first online step."""
        run, count = self.run, self.switch_episodes
        if count:
            self._evaluator.evaluate(run, self._actor, run.step, drop.SWITCH, count)

    @property
    def switch_episodes(self) -> int:
        """Episodes of the evaluation at the switch that is due now; 0 where none is."""
        done = any(phase == drop.SWITCH for _, phase, _ in self.run.scores)
        return self.config.eval_switch if self._at_the_switch and not done else 0

    def evaluates(self, step: int) -> bool:
        """Is there an evaluation when so many iterations are done?"""
        early = step - self.config.offline_iterations in self._early
        return step % self.config.eval_freq == 0 or early

    def updates(self, count: Optional[int] = None) -> Iterator[int]:
        """The updates that belong to this environment step: `utd`, none in the warm-up.

        Args:
            count: so many in the place of `utd`.
        """
        online = self.run.step - self.config.offline_iterations
        warm = online >= self.config.online_warmup
        count = (self.config.utd if count is None else count) if warm else 0
        self._count(count)
        yield from range(count)
        self._stop_clock()

    def _count(self, updates: int) -> None:
        self.run.updates += updates
        self._clock = time.perf_counter()

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self.run.update_seconds += time.perf_counter() - self._clock
            run = self.run
            if slow := self._watch.look(self._phase, run.updates, run.update_seconds):
                run.print(slow)
        self._clock = None

    def log(self, metrics: Dict[str, Any]) -> None:
        """End a step: evaluate, write a row of metrics, save, each when its time has come.

        Args:
            metrics: numbers and 0-d tensors, which are read only when a row is written.
        """
        self._stop_clock()
        config, step = self.config, self.run.step + 1
        metrics = {**metrics, **self._collector.episode}
        if self._phase == "online":
            metrics.update(self._rows_metrics())
        evaluated = self.evaluates(step)
        logged = evaluated or step % config.log_freq == 0
        if logged:
            # Before the evaluation, which would take hours or fail on values that diverged.
            metrics = self.run.read(metrics)
        if evaluated:
            finite.check_weights(self._parts, config)
            metrics.update(
                self._evaluator.evaluate(self.run, self._actor, step, self._phase)
            )
        if logged:
            self.run.log(step, self._phase, metrics)
        if evaluated:
            self.run.step = step
            self.save()
            self._save_corl_checkpoint(step)

    def save(self) -> None:
        """Write checkpoint.pt."""
        self.run.save(self._parts)

    def _save_corl_checkpoint(self, step: int) -> None:
        if self.config.checkpoints_path is None:
            return
        folder = expand(self.config.checkpoints_path)
        with files.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        # CORL counts from 0.
        path = folder / f"checkpoint_{step - 1}.pt"
        checkpoints.save_corl_checkpoint(path, self._parts["trainer"].state_dict())

    def finish(self) -> Dict[str, Any]:
        """Save and end the run; returns its summary, or {} where it was asked to stop.

        Raises:
            SystemExit: a signal asked, see `runs.Run.interrupted`.
        """
        self.save()  # the last weights, wherever eval_freq left off
        if self.run.stop_requested:
            self.run.interrupted()
            return {}
        return self.run.finish()
