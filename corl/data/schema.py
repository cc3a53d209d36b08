"""D4RL's HDF5 schema: read a file, check every value, make q-learning arrays, count episodes.

Rows here are always the *raw* rows of a file, a dict of arrays as `validate` returns it.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from corl import tasks
from corl.data import hdf5, layouts
from corl.data.hdf5 import BadData

REQUIRED = layouts.REQUIRED
OPTIONAL = ("timeouts", "next_observations")
FLAGS = ("terminals", "timeouts")
# Median height of the torso that tells walker2d from halfcheetah: the walker falls at 0.8, and
# halfcheetah's height is measured from where it starts.
TORSO_HEIGHT = 0.7
# D4RL's boxes are [-1, 1]; the rest is room for rounding.
ACTION_BOUND = 1.0 + 1e-3
# The largest number with a square in float32: errors are squared, and so are states where their
# standard deviation is computed.
LARGEST = float(np.sqrt(np.finfo(np.float32).max))


def load_hdf5(path: Path | str, task: tasks.Task | str) -> dict[str, np.ndarray]:
    """The raw rows of a D4RL HDF5 file, checked and cast; see `validate` for the arrays.

    Nothing outside the file is read, and nothing of it before it is known to fit into memory.

    Raises:
        ValueError: not a readable HDF5 file, or contents that do not fit the task.
    """
    task, path = tasks.task(task), Path(path)
    hdf5.check_kind(path)
    with hdf5.reading(path), h5py.File(path) as file:
        names = layouts.require(file, path)
        found = hdf5.plain_columns(file, path, names.values())
        columns: dict[str, Any] = {key: found[name] for key, name in names.items()}
        return _clean(columns, task, path)


def load(path: Path, task: tasks.Task) -> dict[str, np.ndarray]:
    """As `load_hdf5`, of any of the layouts in `layouts.py`."""
    # Path.is_dir raises where a name is too long.
    if os.path.isdir(path):
        return validate(layouts.read_folder(path), task, path)
    if layouts.is_npz(path):
        return validate(layouts.read_npz(path), task, path)
    return load_hdf5(path, task)


def count_rows(path: Path) -> int:
    """The rows of a D4RL HDF5 file, which is not read whole.

    Raises:
        ValueError: as of `load_hdf5`, as far as `rewards` goes.
    """
    hdf5.check_kind(path)
    with hdf5.reading(path), h5py.File(path) as file:
        return len(hdf5.plain_dataset(file, path, "rewards"))


def validate(
    raw: dict[str, np.ndarray], task: tasks.Task, path: Path | str
) -> dict[str, np.ndarray]:
    """Check raw rows against a task and cast them; `path` names them in errors.

    Flags may be of any numeric type (antmaze stores floats); both may be set in one row.

    Returns:
        observations (N, S), actions (N, A), rewards (N,) and, where given,
        next_observations (N, S) as float32; terminals and, where given, timeouts (N,) as
        bool. N is at least 2.

    Raises:
        ValueError: a wrong shape, type or length, a value that is not finite in float32 or has no
            square there, an action outside [-1, 1], a flag that is neither 0 nor 1, or rows of
            another robot. The message names file, key and row.
    """
    columns = {k: np.asarray(raw[k]) for k in REQUIRED + OPTIONAL if k in raw}
    return _clean(columns, task, path)


def _clean(
    columns: dict[str, np.ndarray | h5py.Dataset], task: tasks.Task, path: Path | str
) -> dict[str, np.ndarray]:
    """The work of `validate`, on arrays or on the columns of a file.

    Columns are read one by one, so that a float64 file is never whole in memory beside its
    float32 copy.
    """
    shapes = {}
    for key, column in columns.items():
        if column.dtype.kind not in "fiub":
            raise BadData(f"{path}: {key} has type {column.dtype}; numbers are needed")
        shapes[key] = column.shape
        if key in ("rewards", *FLAGS) and column.shape[1:] == (1,):
            shapes[key] = column.shape[:1]
        elif not task.is_d4rls and key not in ("rewards", *FLAGS):
            # The environment's arrays become vectors, too.
            shapes[key] = (len(column), int(np.prod(column.shape[1:])))
    _check_shapes(shapes, task, path)
    if any(isinstance(column, h5py.Dataset) for column in columns.values()):
        hdf5.check_memory(columns, path)
    clean = {}
    for key, column in columns.items():
        values = column[()].reshape(shapes[key])
        if key in FLAGS:
            _reject(~np.isin(values, (0, 1)), values, key, path, "flags are 0 or 1")
            clean[key] = values.astype(bool)
            continue
        with np.errstate(over="ignore"):
            cast = values.astype(np.float32, copy=False)
        _reject(
            ~np.isfinite(cast), values, key, path, "values must be finite in float32"
        )
        largest = max(cast.max(), -cast.min())
        if largest > LARGEST:
            large = np.abs(cast) > LARGEST
            rule = f"the largest is {largest:.3g}, and above {LARGEST:.2g} float32 has no squares"
            _reject(large, values, key, path, rule)
        if key == "actions":
            cast = _unit_actions(cast, values, task, path)
        clean[key] = cast
    _check_torso(clean["observations"], task, path)
    return clean


def _unit_actions(
    cast: np.ndarray, values: np.ndarray, task: tasks.Task, path: Path | str
) -> np.ndarray:
    """Actions (N, A) in [-1, 1], float32, of the stored ones and their float32 copy."""
    if task.bounds is None:
        outside = np.abs(cast) > ACTION_BOUND
        _reject(outside, values, "actions", path, "actions must be within [-1, 1]")
        return cast
    low, high = np.asarray(task.bounds)
    room = (ACTION_BOUND - 1.0) * (high - low)
    outside = (values < low - room) | (values > high + room)
    rule = f"actions must be within the environment's range, {low} to {high}"
    _reject(outside, values, "actions", path, " ".join(rule.split()))
    return task.to_unit(values).astype(np.float32)


def _check_torso(observations: np.ndarray, task: tasks.Task, path: Path | str) -> None:
    """Tell halfcheetah from walker2d: their widths are equal, but only the walker is upright."""
    if task.robot not in ("halfcheetah", "walker2d"):
        return
    height = np.median(observations[:, 0])
    robot = "walker2d" if height > TORSO_HEIGHT else "halfcheetah"
    if robot != task.robot:
        raise BadData(
            f"{path}: the torso's height, observations[:, 0], is {height:.2f} in the "
            f"median, as {robot}'s; {task.name} needs data of {task.robot}"
        )


def _reject(
    bad: np.ndarray, values: np.ndarray, key: str, path: Path | str, rule: str
) -> None:
    """Raise for the first row of `values` that `bad` (same shape, bool) marks."""
    rows = bad.reshape(len(bad), -1).any(1)
    if rows.any():
        row = int(rows.argmax())
        value = values[row][bad[row]].flat[0] if values.ndim > 1 else values[row]
        raise BadData(
            f"{path}: {key} has {value} in row {row} ({rows.sum()} bad rows of "
            f"{len(bad)}); {rule}"
        )


def _check_shapes(
    shapes: dict[str, tuple[int, ...]], task: tasks.Task, path: Path | str
) -> None:
    widths = {"observations": task.state_dim, "actions": task.action_dim}
    widths["next_observations"] = task.state_dim
    for key, shape in shapes.items():
        wanted = 2 if key in widths else 1
        if len(shape) != wanted:
            raise BadData(
                f"{path}: {key} has shape {shape}; expected {wanted} dimension(s)"
            )
    dims = shapes["observations"][1], shapes["actions"][1]
    if dims != (task.state_dim, task.action_dim):
        fits = [
            name
            for name, robot in tasks.ROBOTS.items()
            if dims == (robot.state_dim, robot.action_dim)
        ]
        fit = f", which fit {' or '.join(fits) or 'no robot known here'}"
        raise BadData(
            f"{path}: observations and actions have widths {dims}"
            f"{fit if task.is_d4rls else ''}; {task.name} needs "
            f"{task.state_dim} and {task.action_dim}"
        )
    rows = shapes["observations"][0]
    for key, shape in shapes.items():
        if shape[0] != rows:
            raise BadData(f"{path}: {key} has {shape[0]} rows, observations has {rows}")
        if key in widths and shape[1] != widths[key]:
            raise BadData(f"{path}: {key} has width {shape[1]}; expected {widths[key]}")
    if rows < 2:
        raise BadData(f"{path}: {rows} row(s); a dataset needs at least 2")


def qlearning_dataset(
    raw: dict[str, np.ndarray],
    keep_timeouts: bool = False,
    horizon: int = 1000,
    next_actions: bool = False,
) -> dict[str, np.ndarray]:
    """Raw rows -> q-learning arrays, by the rules of `d4rl.qlearning_dataset`.

    The next observation is the observation of the following row, so the last row and
    the rows that end by a time-out are dropped. After a terminal it is the first
    observation of the next episode, which the bootstrap masks. With `keep_timeouts` all
    rows stay and the stored, true next observations are used.

    Args:
        raw: arrays of `validate`, N rows.
        keep_timeouts: keep all rows, with their stored next observations.
        horizon: time limit in steps, read only where `timeouts` is missing: a step
            counter then stands in for it.
        next_actions: also give the action of the following row. No row knows the one after a
            time-out, so it does not go with `keep_timeouts`.

    Returns:
        observations, next_observations (M, S), actions (M, A), rewards (M,) float32 and
        terminals (M,) bool, and where asked for next_actions (M, A) float32; copies.

    Raises:
        ValueError: a key is missing, no row is left, `keep_timeouts` is set and there are no
            next_observations (antmaze stores none), or it is set together with `next_actions`.
    """
    if next_actions and keep_timeouts:
        raise ValueError("next_actions are not known where keep_timeouts keeps all rows")
    if missing := [key for key in REQUIRED if key not in raw]:
        raise ValueError(f"raw data lacks {', '.join(missing)}")
    if keep_timeouts:
        if "next_observations" not in raw:
            raise ValueError(
                "keep_timeouts needs stored next_observations, which this data lacks"
            )
        keep: np.ndarray = np.arange(len(raw["rewards"]))
        next_observations = raw["next_observations"][keep]
    else:
        keep = np.flatnonzero(~timeout_flags(raw, horizon)[:-1])
        next_observations = raw["observations"][keep + 1]
    if not len(keep):
        raise ValueError("no transition is left: every row but the last ends an episode")
    following = {"next_actions": raw["actions"][keep + 1]} if next_actions else {}
    return {
        **{k: v.astype(np.float32, copy=False) for k, v in following.items()},
        "observations": raw["observations"][keep].astype(np.float32, copy=False),
        "actions": raw["actions"][keep].astype(np.float32, copy=False),
        "next_observations": next_observations.astype(np.float32, copy=False),
        "rewards": raw["rewards"][keep].astype(np.float32, copy=False),
        "terminals": raw["terminals"][keep].astype(bool, copy=False),
    }


def timeout_flags(raw: dict[str, np.ndarray], horizon: int) -> np.ndarray:
    """Time-out flags (N,) bool: the stored ones, or those that D4RL's step counter gives.

    D4RL's counter starts an episode at 0 after a cut but at 1 after a terminal, so the cut
    after a terminal comes one step early. That is reproduced, to get the same rows.

    Raises:
        ValueError: the counter is needed and horizon < 2.
    """
    if "timeouts" in raw:
        return np.asarray(raw["timeouts"], dtype=bool)
    if horizon < 2:
        raise ValueError(f"horizon is {horizon}; data without timeouts needs at least 2")
    rows = len(raw["terminals"])
    flags = np.zeros(rows, dtype=bool)
    ends = np.append(np.flatnonzero(raw["terminals"]), rows)
    start = counter = 0
    while start < rows:
        cut = start + horizon - 1 - counter
        end = int(ends[np.searchsorted(ends, start)])
        counter = int(end < cut)
        start = min(end, cut) + 1
        if cut < rows and not counter:
            flags[cut] = True
    return flags


def episode_bounds(raw: dict[str, np.ndarray], task: tasks.Task) -> np.ndarray:
    """First row of each complete episode, then the row after the last one: (E + 1,) int.

    Where the data goes on at the goal (`Task.walks_on`), time-outs alone end an episode.
    """
    ends = timeout_flags(raw, task.horizon)
    if not task.walks_on:
        ends = ends | raw["terminals"].astype(bool)
    return np.concatenate([[0], np.flatnonzero(ends) + 1])


def without_episodes(statistics: dict[str, Any]) -> dict[str, Any]:
    """Statistics of rows whose order means nothing."""
    none = {"return": _summary(np.zeros(0)), "length": _summary(np.zeros(0))}
    counts = {"episodes": 0, "unfinished_rows": statistics["rows"], "too_long": 0}
    return {**statistics, **counts, **none}


def episode_returns(raw: dict[str, np.ndarray], task: tasks.Task) -> np.ndarray:
    """Raw returns (E,) float64 of the complete episodes."""
    totals = np.concatenate([[0.0], np.cumsum(raw["rewards"], dtype=np.float64)])
    return np.diff(totals[episode_bounds(raw, task)])


def statistics(raw: dict[str, np.ndarray], task: tasks.Task) -> dict[str, Any]:
    """Counts, raw returns and lengths of the complete episodes, and the range of actions.

    All values are plain numbers. Without a complete episode those of `return` and `length` are
    None.
    """
    bounds, rows = episode_bounds(raw, task), len(raw["rewards"])
    longest = task.horizon
    if task.walks_on:
        # Antmaze's collector flags one row late, and its limit is 1000 in all mazes. OGBench's
        # walks may be longer than its evaluations.
        longest = 1001 if task.is_d4rls else rows
    lengths = np.append(np.diff(bounds), rows - bounds[-1])
    return {
        "rows": rows,
        "episodes": len(bounds) - 1,
        "unfinished_rows": rows - int(bounds[-1]),
        "terminals": int(raw["terminals"].sum()),
        "timeouts": int(timeout_flags(raw, task.horizon).sum()),
        "return": _summary(episode_returns(raw, task)),
        "length": _summary(np.diff(bounds)),
        # Episodes that no time limit ended, the unfinished one included.
        "too_long": int((lengths > longest).sum()),
        "action_min": float(raw["actions"].min()),
        "action_max": float(raw["actions"].max()),
    }


def _summary(values: np.ndarray) -> dict[str, float | None]:
    names = ("mean", "std", "min", "max")
    if not len(values):
        return dict.fromkeys(names)
    return {name: float(getattr(values, name)()) for name in names}


def hash_arrays(arrays: dict[str, np.ndarray]) -> str:
    """Hexadecimal SHA-256 of arrays: names, types, shapes and values."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[key]).data)
    return digest.hexdigest()
