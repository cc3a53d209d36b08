"""Runs an unmodified CORL file on today's Python, gymnasium and MuJoCo.

CORL's scripts import `gym` 0.23, `d4rl`, which needs mujoco_py, and `wandb`. Here modules of
those names stand in for them: the environments are those of `envs.make`, the data is what
`sources.resolve` finds, the log needs no account. CORL's file is not changed.

    python -m corl.d4rl_shim CORL/algorithms/finetune/iql.py --env hopper-medium-v2 \\
        --device cpu

Options of the shim (`--dataset_source`, `--dataset_path`, `--log`) stand before the file, CORL's
own after it. Start states come from gymnasium's generators, so a seed gives other episodes
than it did in CORL's time.
"""

import argparse
import json
import math
import runpy
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from corl import arguments, envs, files, tasks
from corl.data import schema, sources


class Unavailable(ValueError):
    """Something that the script asks for cannot be had here; the message says why."""


# ---------------------------------------------------------------- gym


class Env:
    """Old gym's environment: `reset()` gives the observation, `step()` four values."""


class TaskEnv(Env):
    """A D4RL task behind old gym's interface, with D4RL's extra attributes.

    Raises:
        Unavailable: the task is unknown or has no environment here.
    """

    def __init__(self, name: str):
        try:
            self.task = tasks.task(name)
            self.env = envs.make(self.task)
        except (ValueError, ImportError) as error:
            raise Unavailable(str(error)) from error
        self.observation_space = self.env.observation_space
        self.action_space = self.env.action_space
        self.ref_min_score, self.ref_max_score = self.task.ref_min, self.task.ref_max
        self._max_episode_steps = self.task.horizon
        self._seed: int | None = None  # for the next reset
        self.unwrapped = self

    def seed(self, seed: int | None = None) -> list[int]:
        """Seeds the episodes from the next reset on; None draws a fresh seed."""
        self._seed = int(gymnasium.utils.seeding.np_random(seed)[1])
        return [self._seed]

    def reset(self) -> np.ndarray:
        """Begin an episode; the observation (S,)."""
        observation, _ = self.env.reset(seed=self._seed)
        self._seed = None
        return observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, dict[str, Any]]:
        """Take an action (A,): observation (S,), reward, done, info.

        As in old gym, a time-out is `done`, with `TimeLimit.truncated` in the info.
        """
        observation, reward, terminated, truncated, info = self.env.step(action)
        if truncated:
            info["TimeLimit.truncated"] = not terminated
        return observation, reward, bool(terminated or truncated), info

    def close(self) -> None:
        """Free what the environment holds."""
        self.env.close()

    def get_normalized_score(self, score: Any) -> Any:
        """D4RL's score as a fraction: 0 is its random policy, 1 its expert."""
        return self.task.normalized_score(score) / 100.0

    def get_dataset(self, h5path: str | None = None) -> dict[str, np.ndarray]:
        """The raw rows, as `schema.load_hdf5` gives them; `h5path` overrides the source."""
        path = h5path or find_dataset(self.task).provenance["path"]
        return schema.load_hdf5(path, self.task)


class Wrapper(Env):
    """Old gym's wrapper: what it does not define is the inner environment's."""

    def __init__(self, env: Any):
        self.env = env

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"a gym wrapper hides the private attribute {name!r}")
        return getattr(self.env, name)


class TransformObservation(Wrapper):
    """Applies `f` to every observation."""

    def __init__(self, env: Any, f: Callable):
        super().__init__(env)
        self.f = f

    def reset(self) -> Any:
        """Begin an episode; the changed observation."""
        return self.f(self.env.reset())

    def step(self, action: np.ndarray) -> tuple:
        """The inner environment's step, its observation changed."""
        observation, *rest = self.env.step(action)
        return self.f(observation), *rest


class TransformReward(Wrapper):
    """Applies `f` to every reward."""

    def __init__(self, env: Any, f: Callable):
        super().__init__(env)
        self.f = f

    def step(self, action: np.ndarray) -> tuple:
        """The inner environment's step, its reward changed."""
        observation, reward, *rest = self.env.step(action)
        return observation, self.f(reward), *rest


# ---------------------------------------------------------------- d4rl

# Where the data comes from: the options of `installed`.
_origin: dict[str, Any] = {"source": "auto", "path": None}


def find_dataset(task: tasks.Task) -> sources.Dataset:
    """`sources.resolve` with the options of the shim.

    Raises:
        Unavailable: no source has the data, or the data is bad.
    """
    # Packages that look for the real gym or d4rl must not find the stand-ins.
    hidden = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    try:
        return sources.resolve(task, **_origin)
    except (ValueError, RuntimeError) as error:
        raise Unavailable(str(error)) from error
    finally:
        sys.modules.update(hidden)


def qlearning_dataset(
    env: Any,
    dataset: dict[str, np.ndarray] | None = None,
    terminate_on_end: bool = False,
) -> dict[str, np.ndarray]:
    """D4RL's function of that name: five arrays, fresh for the caller to change.

    Args:
        env: environment of `gym.make`, wrapped or not; with a `dataset` that stores timeouts
            it may be None.
        dataset: raw rows to use instead of the task's own.
        terminate_on_end: keep the rows that end by time-out; as in D4RL their next observation
            is then the first one of the next episode.
    """
    if dataset is None and not terminate_on_end:
        return find_dataset(env.task).arrays
    raw = env.get_dataset() if dataset is None else dataset
    if terminate_on_end:
        raw = {**raw, "timeouts": np.zeros(len(raw["rewards"]), dtype=bool)}
    horizon = 0 if env is None else env.unwrapped._max_episode_steps
    return schema.qlearning_dataset(raw, horizon=horizon)


def get_normalized_score(env_name: str, score: Any) -> Any:
    """D4RL's score of a task as a fraction."""
    return tasks.normalized_score(env_name, score) / 100.0


# ---------------------------------------------------------------- wandb


class WandbRun:
    """What CORL uses of wandb, kept in a file of JSON lines instead of an account.

    Every `log` call becomes one line: the values and, as `_step`, the step.
    """

    def __init__(self, path: Path | str | None = None):
        self.file = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "w")
        self.summary: dict[str, Any] = {}  # last value of every key
        self.config: dict[str, Any] = {}
        self.name = self.id = ""

    def init(
        self, config: Any = None, name: str = "", id: str = "", **options: Any
    ) -> "WandbRun":
        """`wandb.init`: takes config and names over; returns this run."""
        self.config.update(config or {})
        self.name, self.id = name, id
        return self

    def log(self, data: dict[str, Any], step: int | None = None, **options: Any) -> None:
        """`wandb.log`: one line of the file, and the last values in `summary`."""
        self.summary.update(data)
        if self.file is not None:
            line = json.dumps(_plain({"_step": step, **data}), allow_nan=False)
            with files.writing(self.file.name):
                self.file.write(line + "\n")

    def save(self, *args: Any, **options: Any) -> None:
        """`wandb.save`: does nothing, there is no account to send files to."""

    def mark_preempting(self) -> None:
        """`wandb.mark_preempting`: does nothing."""

    def finish(self, *args: Any, **options: Any) -> None:
        """`wandb.finish`: brings what was logged to the disk."""
        if self.file is not None:
            with files.writing(self.file.name):
                self.file.flush()


def _plain(value: Any) -> Any:
    """Values as JSON has them.

    Numpy and torch values are numbers, one that is not finite is null, anything else is text.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | None) else str(value)


# ---------------------------------------------------------------- the modules

MODULES = ("gym", "gym.spaces", "gym.wrappers", "d4rl", "d4rl.infos", "wandb")


def make_modules(run: WandbRun) -> dict[str, types.ModuleType]:
    """The stand-ins by name, ready for `sys.modules`; every log call goes to `run`."""
    made: dict[str, Any] = {
        name: types.ModuleType(name, "Stand-in, see d4rl_shim.") for name in MODULES
    }
    made["gym.spaces"] = gymnasium.spaces
    gym, d4rl, wandb = made["gym"], made["d4rl"], made["wandb"]
    gym.__version__, gym.make = "0.23.1", TaskEnv
    gym.Env, gym.Wrapper = Env, Wrapper
    gym.spaces, gym.wrappers = made["gym.spaces"], made["gym.wrappers"]
    gym.wrappers.TransformObservation = TransformObservation
    gym.wrappers.TransformReward = TransformReward
    d4rl.qlearning_dataset = qlearning_dataset
    d4rl.get_normalized_score = get_normalized_score
    d4rl.infos = made["d4rl.infos"]
    known = [tasks.task(name) for name in tasks.task_names()]
    d4rl.infos.REF_MIN_SCORE = {task.name: task.ref_min for task in known}
    d4rl.infos.REF_MAX_SCORE = {task.name: task.ref_max for task in known}
    wandb.run, wandb.init, wandb.log = run, run.init, run.log
    wandb.finish, wandb.mark_preempting = run.finish, run.mark_preempting
    wandb.config, wandb.summary = run.config, run.summary
    return made


def load_checkpoint(torch_load: Callable) -> Callable:
    """`torch.load` that knows the script's own `Scalar`, which CQL's checkpoints hold.

    Since 2.6 torch refuses classes in a checkpoint; this one the script has defined itself.
    """

    def load(*args: Any, **options: Any) -> Any:
        scalar = getattr(sys.modules["__main__"], "Scalar", None)
        with torch.serialization.safe_globals([] if scalar is None else [scalar]):
            return torch_load(*args, **options)

    return load


@contextmanager
def installed(
    source: str = "auto",
    path: Path | str | None = None,
    log: Path | str | None = None,
) -> Iterator[WandbRun]:
    """Inside, `import gym`, `import d4rl` and `import wandb` give the stand-ins.

    Args:
        source: `source` of `sources.resolve`.
        path: `path` of `sources.resolve`.
        log: file for what the script logs; None keeps the last values only.
    """
    run = WandbRun(log)
    before = {n: sys.modules[n] for n in MODULES if n in sys.modules}
    torch_load, origin = torch.load, dict(_origin)
    with ExitStack() as stack:
        if run.file is not None:
            stack.enter_context(run.file)
        _origin.update(source=source, path=path)
        sys.modules.update(make_modules(run))
        torch.load = load_checkpoint(torch_load)
        try:
            yield run
        finally:
            torch.load = torch_load
            _origin.update(origin)
            for name in MODULES:
                sys.modules.pop(name, None)
            sys.modules.update(before)


def run_file(
    file: Path | str, arguments: Sequence[str] = (), **options: Any
) -> WandbRun:
    """Run a CORL file as the main program; returns what it logged last.

    Args:
        file: CORL's script.
        arguments: its command line.
        options: of `installed`.

    Raises:
        Unavailable: the script, the task or its data cannot be had here.
    """
    if not Path(file).is_file():
        raise Unavailable(f"{file} does not exist; give the path of a CORL script")
    argv, sys.argv = sys.argv, [str(file), *arguments]
    try:
        with installed(**options) as run:
            runpy.run_path(str(file), run_name="__main__")
    finally:
        sys.argv = argv
    return run


def main(argv: Sequence[str] | None = None) -> None:
    """The command line that the top of this file shows."""
    parser = arguments.Parser(
        prog="python -m corl.d4rl_shim",
        description="Run an unmodified CORL script.",
    )
    parser.add_argument("--dataset_source", choices=sources.SOURCES, default="auto")
    parser.add_argument("--dataset_path", help="HDF5 file, or minari:ID")
    parser.add_argument("--log", help="file for everything the script logs, JSON lines")
    parser.add_argument("file", help="for example CORL/algorithms/finetune/iql.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="CORL's own flags")
    args = parser.parse_args(argv)
    try:
        run = run_file(
            args.file,
            args.arguments,
            source=args.dataset_source,
            path=args.dataset_path,
            log=args.log,
        )
    except Unavailable as error:
        raise SystemExit(f"error: {error}") from error
    for key, value in run.summary.items():
        if "score" in key:
            print(f"last {key}: {value}")


if __name__ == "__main__":
    main()
