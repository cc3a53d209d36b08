"""Between D4RL's rows and other homes of data: Minari's episodes, D4RL's HDF5 files.

Minari (https://minari.farama.org) stores episodes of T actions and T + 1 observations, so
every next state is a true one. D4RL stores rows, and calls them by the names used here.
"""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np

from corl import files, tasks

INSTALL = "pip install -r requirements-minari.txt"
CAVEATS = {
    "mujoco/": "other policies than D4RL's, gymnasium's v5 environments (another walker2d "
    "model, no survival bonus on a fall); scores are not comparable with D4RL's tables",
    "D4RL/antmaze/": "made again with gymnasium-robotics' physics (twice the control rate, "
    "other torques, mirrored maze, success within 0.45): policies of this data do not fit "
    "D4RL's antmaze and their scores there mean nothing",
    "": "not D4RL's own file; scores are not comparable with D4RL's tables",
}


def caveat(name: str) -> str:
    """What a reader of scores has to know about a Minari dataset's id."""
    return next(text for start, text in CAVEATS.items() if name.startswith(start))


def import_minari(name: str) -> Any:
    """The package minari; RuntimeError says how to install it, for the dataset `name`."""
    try:
        import minari
    except ImportError as error:
        raise RuntimeError(
            f"the dataset minari:{name} needs the package minari ({error}); {INSTALL}"
        ) from error
    return minari


# ---------------------------------------------------------------- from Minari


def from_minari(name: str) -> dict[str, np.ndarray]:
    """The rows of a Minari dataset, downloaded if it is not there; not yet checked.

    Raises:
        RuntimeError: minari is not installed, or cannot load the dataset.
    """
    minari = import_minari(name)
    try:
        return stack_episodes(
            minari.load_dataset(name, download=True).iterate_episodes()
        )
    except Exception as error:  # a missing id, a network, a damaged folder: minari's own
        line = " ".join(str(error).split())
        raise RuntimeError(
            f"minari cannot load {name!r} ({type(error).__name__}: {line})"
        ) from error


def stack_episodes(episodes: Iterable[Any]) -> dict[str, np.ndarray]:
    """Minari's episodes as D4RL's columns, next_observations and timeouts included.

    The state of a goal environment becomes D4RL's: xy, then the rest, without the goal.

    Raises:
        ValueError: no episode.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for episode in episodes:
        states = episode.observations
        if isinstance(states, dict):
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


# ---------------------------------------------------------------- to Minari


def to_minari(
    raw: dict[str, np.ndarray], bounds: np.ndarray, task: str, name: str, about: str
) -> Path:
    """Write rows as a local Minari dataset; its folder.

    Rows without next_observations (antmaze) lose the last one of each episode, whose next
    state nobody knows. Columns beyond the five of q-learning are not kept. Nothing
    appears under the final id before the dataset is complete.

    Args:
        raw: arrays of `datasets.validate`, N rows.
        bounds: first row of each episode, then N.
        name: id such as `mine/hopper/medium-v0`.
        about: description that goes into the metadata.

    Raises:
        ValueError: a malformed id, one that exists, or rows that are no episodes.
        RuntimeError: minari is not installed.
    """
    minari = import_minari(name)
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.namespace import create_namespace, list_local_namespaces
    from minari.storage.datasets_root_dir import get_dataset_path

    facts = tasks.task(task)
    namespace = parse_dataset_id(name)[0]
    target = Path(get_dataset_path(name))
    if target.exists():
        raise ValueError(
            f"the Minari dataset {name} exists in {target}; delete it first"
        )
    buffers = [EpisodeBuffer(**e) for e in _episodes(raw, bounds, facts.robot)]
    if not buffers:
        raise ValueError(f"{task}: no episode is long enough to be exported")
    spaces = {
        "observation_space": gymnasium.spaces.Box(
            -np.inf, np.inf, (facts.state_dim,), np.float32
        ),
        "action_space": gymnasium.spaces.Box(-1.0, 1.0, (facts.action_dim,), np.float32),
    }
    root = Path(get_dataset_path())
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=root))
    try:
        with _minari_root(part), warnings.catch_warnings():
            # Minari asks for the environment of the collection; D4RL's rows carry none.
            warnings.simplefilter("ignore", UserWarning)
            stored = minari.create_dataset_from_buffers(
                name,
                buffers,
                **spaces,
                eval_env=facts.env_id or None,
                algorithm_name="see description",
                author="corl-dare",
                author_email="none",
                code_permalink="none",
                description=about,
            )
            scores = {"ref_min_score": facts.ref_min, "ref_max_score": facts.ref_max}
            stored.storage.update_metadata(scores)
        if namespace is not None and namespace not in list_local_namespaces():
            create_namespace(namespace)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(part / name, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


@contextmanager
def _minari_root(folder: Path) -> Iterator[None]:
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before


def _episodes(
    raw: dict[str, np.ndarray], bounds: np.ndarray, robot: str
) -> Iterator[dict[str, np.ndarray]]:
    states, rows = raw["observations"], len(raw["observations"])
    following = raw.get("next_observations")
    if following is None and robot != "antmaze":
        raise ValueError(
            "this data has no next_observations, so the last state of an episode is not "
            "known and it cannot become a Minari dataset"
        )
    if following is not None:
        inside = np.ones(rows, dtype=bool)
        inside[bounds[1:] - 1] = False
        differ = (following[:-1] != states[1:]).any(1) & inside[:-1]
        if differ.any():
            raise ValueError(
                f"row {differ.argmax()} is not followed by its next observation, so the "
                "rows are no episodes and cannot become a Minari dataset"
            )
    timeouts = raw.get("timeouts", np.zeros(rows, dtype=bool))
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        last = stop if following is not None else stop - 1
        if last == start:
            continue
        end = (
            states[stop - 1 : stop] if following is None else following[stop - 1 : stop]
        )
        truncations = timeouts[start:last].copy()
        truncations[-1] |= timeouts[stop - 1]
        yield {
            "observations": np.concatenate([states[start:last], end]),
            "actions": raw["actions"][start:last],
            "rewards": raw["rewards"][start:last],
            "terminations": raw["terminals"][start:last],
            "truncations": truncations,
        }


# ---------------------------------------------------------------- to D4RL's files


def to_d4rl(
    raw: dict[str, np.ndarray], about: str, out: Path, original: Path | None
) -> Path:
    """Write rows as an HDF5 file of D4RL's schema; its path.

    Args:
        raw: arrays of `datasets.validate`; they become the file's columns.
        about: where the rows come from, kept as an attribute.
        original: HDF5 file whose further contents (infos, metadata, attributes) are kept.

    Raises:
        ValueError: `out` exists.
        RuntimeError: no room or no right to write.
    """
    if out.exists():
        raise ValueError(f"{out} exists; delete it or choose another file")

    def fill(file: h5py.File) -> None:
        for key, values in raw.items():
            file.create_dataset(key, data=values, compression="gzip", shuffle=True)
        if original is not None:
            with h5py.File(original) as source:
                for key in sorted(set(source) - set(raw)):
                    source.copy(source[key], file, key)
                file.attrs.update(source.attrs)
        file.attrs["exported_from"] = about

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_hdf5(out, fill)
    except OSError as error:
        line = " ".join(str(error).split())
        raise RuntimeError(f"cannot write {out} ({line})") from error
    return out
