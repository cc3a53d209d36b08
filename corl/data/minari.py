"""From Minari's episodes to D4RL's rows and back, and into HDF5 files of D4RL's schema.

Minari (https://minari.farama.org) stores episodes of T actions and T + 1 observations, so that
every row has its true next state. D4RL stores rows; their names are the ones used here.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from corl import files, tasks
from corl.data import hdf5

INSTALL = "pip install -r requirements-minari.txt"
# What a reader of scores has to know, by the beginning of a dataset's id.
CAVEATS = {
    "mujoco/": "other policies than D4RL's, gymnasium's v5 environments (another walker2d "
    "model, no survival bonus on a fall); scores are not comparable with D4RL's tables",
    "D4RL/antmaze/": "made again with gymnasium-robotics' physics (twice the control rate, "
    "other torques, mirrored maze, success within 0.45): policies of this data do not fit "
    "D4RL's antmaze and their scores there mean nothing",
    "": "not D4RL's own file; scores are not comparable with D4RL's tables",
}


def caveat(name: str) -> str:
    """What a reader of scores has to know about the data of a Minari id."""
    return next(text for start, text in CAVEATS.items() if name.startswith(start))


def import_minari(name: str) -> Any:
    """The package minari, which the dataset `name` needs.

    Raises:
        RuntimeError: it is not installed; the message says how to install it.
    """
    try:
        import minari
    except ImportError as error:
        raise RuntimeError(
            f"the dataset minari:{name} needs the package minari ({error}); {INSTALL}"
        ) from error
    return minari


# ---------------------------------------------------------------- from Minari


def from_minari(name: str, whole: bool = False) -> dict[str, np.ndarray]:
    """The rows of a Minari dataset, which is downloaded if it is not there.

    Args:
        name: Minari id, such as `mujoco/hopper/medium-v0`.
        whole: states hold all that the environment shows, in the order of `flat`; else a goal
            environment's become D4RL's, see `stack_episodes`.

    Returns:
        Arrays as of `stack_episodes`, not yet checked against a task.

    Raises:
        RuntimeError: minari is not installed, or cannot load the dataset.
    """
    stored = _load(name)
    with _one_line(name):
        space = stored.observation_space if whole else None
        return stack_episodes(stored.iterate_episodes(), space)


def recover(name: str, **limit: Any) -> Any:
    """The environment that a dataset records, the one for evaluations where it names one.

    Args:
        name: Minari id.
        limit: `max_episode_steps`, where it is not the recorded one.

    Raises:
        RuntimeError: as of `from_minari`.
        ValueError: the dataset records no environment.
        ImportError, gymnasium.error.Error: the environment cannot be made here.
    """
    stored = _load(name)
    if not {"env_spec", "eval_env_spec"} & set(stored.storage.metadata):
        raise ValueError(
            f"the Minari dataset {name} records no environment; give one as env, and "
            f"minari:{name} as dataset_path"
        )
    return stored.recover_environment(eval_env=True, **limit)


def reference_scores(name: str) -> tuple[float | None, float | None]:
    """The returns of the scores 0 and 100 that a dataset records; None where it lacks one.

    Raises:
        RuntimeError: as of `from_minari`.
    """
    found = _load(name).storage.metadata
    low, high = found.get("ref_min_score"), found.get("ref_max_score")
    if low is None or high is None or not low < high:
        return None, None
    return float(low), float(high)


def _load(name: str) -> Any:
    minari = import_minari(name)
    with _one_line(name):
        return minari.load_dataset(name, download=True)


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Inside, whatever Minari says of a dataset becomes a RuntimeError of one line."""
    try:
        yield
    except Exception as error:
        # Minari raises errors of its own for a missing id, a lost network, a damaged folder.
        line = " ".join(str(error).split())
        raise RuntimeError(
            f"minari cannot load {name!r} ({type(error).__name__}: {line})"
        ) from error


def stack_episodes(episodes: Iterable[Any], space: Any = None) -> dict[str, np.ndarray]:
    """Minari's episodes as D4RL's columns.

    Without a space the state of a goal environment becomes D4RL's: xy, then the rest, without the
    goal.

    Args:
        episodes: objects with observations (T + 1, S), actions (T, A), rewards, terminations and
            truncations (T,).
        space: gymnasium's, of the observations; states are then those of `flat`.

    Returns:
        observations and next_observations (N, S), actions (N, A), rewards, terminals and
        timeouts (N,), in the types that Minari stores; N is the sum of all T.

    Raises:
        ValueError: there is no episode.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for episode in episodes:
        states = episode.observations
        if space is not None:
            states = flat(space, states)
        elif isinstance(states, dict):
            states = [states["achieved_goal"], states["observation"]]
            states = np.concatenate(states, axis=1)
        # An episode with neither flag was cut by a reset, which is a time-out for us.
        cut = np.array(episode.truncations, dtype=bool)
        cut[-1] |= not episode.terminations[-1]
        rows = {
            "observations": states[:-1],
            "next_observations": states[1:],
            "actions": episode.actions,
            "rewards": episode.rewards,
            "terminals": episode.terminations,
            "timeouts": cut,
        }
        for key, values in rows.items():
            parts.setdefault(key, []).append(values)
    if not parts:
        raise ValueError("there is no episode in it")
    return {key: np.concatenate(part) for key, part in parts.items()}


def flat(space: Any, values: Any) -> np.ndarray:
    """Observations as the vectors that gymnasium's `FlattenObservation` makes of them, (N, S).

    Args:
        space: gymnasium's Box, or a Dict or Tuple of such.
        values: N observations in the form that the space has, arrays (N, ...) at its leaves.
    """
    parts = getattr(space, "spaces", None)
    if parts is None:
        return np.asarray(values).reshape(len(values), -1)
    items = parts.items() if isinstance(parts, dict) else enumerate(parts)
    return np.concatenate([flat(part, values[key]) for key, part in items], axis=1)


# ---------------------------------------------------------------- to Minari


def to_minari(
    raw: dict[str, np.ndarray],
    bounds: np.ndarray,
    task: tasks.Task,
    name: str,
    about: str,
) -> Path:
    """Write rows as a local Minari dataset; its folder.

    Rows without next_observations (antmaze) lose the last one of each episode, because its next
    state is not known. Columns beyond the five of q-learning are not kept. Nothing appears under
    the final id before the dataset is complete.

    Args:
        raw: arrays of `schema.validate`, N rows.
        bounds: first row of each episode, then N: (E + 1,).
        name: id such as `mine/hopper/medium-v0`.
        about: description that goes into the metadata.

    Raises:
        ValueError: a malformed id, one that exists, or rows that do not form episodes.
        RuntimeError: minari is not installed.
    """
    import_minari(name)
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.namespace import create_namespace, list_local_namespaces
    from minari.storage.datasets_root_dir import get_dataset_path

    namespace = parse_dataset_id(name)[0]
    target = Path(get_dataset_path(name))
    if target.exists():
        raise ValueError(
            f"the Minari dataset {name} exists in {target}; delete it first"
        )
    buffers = [EpisodeBuffer(**e) for e in split_episodes(raw, bounds, task)]
    if not buffers:
        raise ValueError(f"{task.name}: no episode is long enough to be exported")
    # A folder of its own inside Minari's, so that the finished dataset only has to be renamed.
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=Path(get_dataset_path())))
    try:
        with _minari_root(part):
            _create(buffers, task, name, about)
        if namespace is not None and namespace not in list_local_namespaces():
            create_namespace(namespace)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(part / name, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _create(buffers: list[Any], task: tasks.Task, name: str, about: str) -> None:
    """Let Minari write its episode buffers as the dataset `name`, with D4RL's scores."""
    # gymnasium is slow to import, and reading a dataset does not need it.
    from gymnasium.spaces import Box

    with warnings.catch_warnings():
        # Minari asks for the environment of the collection; D4RL's rows do not name one.
        warnings.simplefilter("ignore", UserWarning)
        stored = import_minari(name).create_dataset_from_buffers(
            name,
            buffers,
            observation_space=Box(-np.inf, np.inf, (task.state_dim,), np.float32),
            action_space=Box(*_range(task), dtype=np.float32),
            eval_env=task.env_id or None,
            algorithm_name="see description",
            author="corl-dare",
            author_email="none",
            code_permalink="none",
            description=about,
        )
        if task.ref_min is not None:
            scores = {"ref_min_score": task.ref_min, "ref_max_score": task.ref_max}
            stored.storage.update_metadata(scores)


def _range(task: tasks.Task) -> tuple[np.ndarray, np.ndarray]:
    """Low and high (A,) of the environment's own actions."""
    ones = np.ones(task.action_dim, np.float32)
    if task.bounds is None:
        return -ones, ones
    low, high = np.asarray(task.bounds, np.float32)
    return low, high


@contextmanager
def _minari_root(folder: Path) -> Iterator[None]:
    """Inside, Minari keeps its datasets in `folder`."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def split_episodes(
    raw: dict[str, np.ndarray], bounds: np.ndarray, task: tasks.Task
) -> Iterator[dict[str, np.ndarray]]:
    """Rows as the fields of Minari's episodes, the reverse of `stack_episodes`.

    Arguments and errors as of `to_minari`.
    """
    states, following = raw["observations"], raw.get("next_observations")
    if following is None and task.robot != "antmaze":
        raise ValueError(
            "this data has no next_observations, so the last state of an episode is not "
            "known and it cannot become a Minari dataset"
        )
    if following is not None:
        _require_consecutive(states, following, bounds)
    timeouts = raw.get("timeouts", np.zeros(len(states), dtype=bool))
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        # Without next observations the last state is the episode's end and has no action.
        last = stop if following is not None else stop - 1
        if last == start:
            continue
        end = states if following is None else following
        truncations = timeouts[start:last].copy()
        truncations[-1] |= timeouts[stop - 1]
        yield {
            "observations": np.concatenate([states[start:last], end[stop - 1 : stop]]),
            "actions": raw["actions"][start:last],
            "rewards": raw["rewards"][start:last],
            "terminations": raw["terminals"][start:last],
            "truncations": truncations,
        }


def _require_consecutive(
    states: np.ndarray, following: np.ndarray, bounds: np.ndarray
) -> None:
    """Raise where a row's next state (N, S) is not the state of the row after it."""
    inside = np.ones(len(states), dtype=bool)
    inside[bounds[1:] - 1] = False
    differ = (following[:-1] != states[1:]).any(1) & inside[:-1]
    if differ.any():
        raise ValueError(
            f"row {differ.argmax()} is not followed by its next observation, so the "
            "rows are no episodes and cannot become a Minari dataset"
        )


# ---------------------------------------------------------------- to D4RL's files


def to_d4rl(
    raw: dict[str, np.ndarray], about: str, out: Path, original: Path | None
) -> Path:
    """Write rows as an HDF5 file of D4RL's schema; its path.

    Args:
        raw: arrays of `schema.validate`; they become the file's columns.
        about: where the rows come from, kept as the attribute `exported_from`.
        original: HDF5 file whose further contents (infos, metadata, attributes) are kept.

    Raises:
        ValueError: `out` exists, or `original` holds links to elsewhere.
        RuntimeError: no room or no right to write.
    """
    if out.exists():
        raise ValueError(f"{out} exists; delete it or choose another file")

    def fill(file: h5py.File) -> None:
        for key, values in raw.items():
            file.create_dataset(key, data=values, compression="gzip", shuffle=True)
        if original is not None:
            with hdf5.reading(original), h5py.File(original) as source:
                hdf5.copy_plain(source, file, original, skip=raw)
                file.attrs.update(source.attrs)
        file.attrs["exported_from"] = about

    with files.naming_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_hdf5(out, fill)
    return out
