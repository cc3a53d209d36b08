"""D4RL task name or file -> validated q-learning arrays and the record of their origin.

`resolve` takes, in this order, and says which it took: an explicit file or Minari id;
the file in D4RL's own folder; a download from D4RL's server; data collected by
ourselves (`collect.py`). Only bytes with D4RL's checksum are called D4RL's.

    python -m corl_dare.datasets hopper-medium-v2 --plot returns.png
    python -m corl_dare.datasets --all
    python -m corl_dare.datasets hopper-medium-v2 --export d4rl hopper.hdf5
    python -m corl_dare.datasets --report results/datasets.md

The first prints the card of a dataset: its source, sizes and returns beside D4RL's
published ones. The second says for every task where its data would come from, the last
makes every stand-in and compares it with what D4RL published.
"""

import argparse
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from corl_dare import collect, convert, download, envs

SOURCES = ("auto", "file", "d4rl_dir", "d4rl", "minari", "self-collected")
REQUIRED = ("observations", "actions", "rewards", "terminals")
OPTIONAL = ("timeouts", "next_observations")
FLAGS = ("terminals", "timeouts")
FORMATS = ("d4rl", "minari")  # of --export
SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
TORSO_HEIGHT = 0.7  # walker2d falls at 0.8, halfcheetah's is measured from its start
ACTION_BOUND = 1.0 + 1e-3  # D4RL's boxes are [-1, 1]; room for rounding only

ANTMAZE_FILE = "Ant_maze_{}_noisy_multistart_{}_multigoal_{}_sparse_fixed.hdf5"
ANTMAZE_FIELDS = {
    "umaze": ("u-maze", False, False),
    "umaze-diverse": ("u-maze", True, True),
    "medium-play": ("big-maze", True, False),
    "medium-diverse": ("big-maze", True, True),
    "large-play": ("hardest-maze", True, False),
    "large-diverse": ("hardest-maze", True, True),
}

# Bytes and SHA-256 of D4RL's -v2 files, from the checksum lists of tensorflow-datasets,
# which lack antmaze-medium-play.
CHECKSUMS = """
hopper
random 152525345 63103ef7059db4c0819bd054f4e83ff339030b50bcdb46bdbe50385f234b5054
medium 152756557 5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0
medium-replay 75854457 e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b
medium-expert 304537315 9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26
expert 152427435 01aa219a5f8eea5e639eccdc636ec2bf40e317159a95cf4bf6e985f16909941b
full-replay 187998921 56baf95963c51c1e964049a974566c50ba80f289390565523e60c0ba83e0982e
halfcheetah
random 237338037 25407aef85b5d16c0f36b4149341edb4acc6a9e88c1db529b2de19e7464874ba
medium 237727262 41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0
medium-replay 59448533 48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683
medium-expert 474567252 015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06
expert 237464597 d9fe53bb994eb1e20a99b4fa3412cd76a1bb7966a7ff55e0fcbdd6081bd2965f
full-replay 291381762 27fdf7ea86e5a2cbd24d611ae9e703c86ec2e8e52823abc69dd9af6afb3a36c0
walker2d
random 216109364 4e863bb6090cf4a461548bd470564b32f1ae5b32ef3085f816b2ede7f092e7fa
medium 232254996 cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda
medium-replay 86323963 e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db
medium-expert 462197079 6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04
expert 230567195 2985dc3d436a8baa10e8f43f946fe1d7c6337a4e4fbc65def70618093b18c59a
full-replay 285115514 f2720f9d27b2acef6ec9a7d9ad3b80b6c2078ad4467cee668a81e3b3c80bcf2a
antmaze
umaze 232532949 5ef15257771c50ef4d23c7de001750e96c8bb5d9b6a5e4a821dcfb3065fbd130
umaze-diverse 230854272 c771dd63963cd7d9f55f24a6d809064f6b82250a6aeac4c9d13f9a1d06e8c932
medium-diverse 231095166 ad9dcbac05d1f8744a7a216083f513662f43f64f28a4a5eb225e9811902dfae7
large-play 230880653 6d353df2457829925d7f9d4b0215587469908bd57478ea76f16417cfa944f471
large-diverse 231183710 84f775eb7956ea9cc766704710dc520a8ab357adc7522ade47f556f0e335e284
"""

# Return of complete episodes in D4RL's -v2 files: mean, std, min, max. From public logs
# of the Decision Transformer's download script.
D4RL_RETURNS = {
    "hopper-random": (18.40, 17.45, 2.93, 292.55),
    "hopper-medium": (1422.06, 378.95, 315.87, 3222.36),
    "hopper-medium-replay": (467.30, 511.03, -1.44, 3192.93),
    "hopper-expert": (3511.36, 328.59, 1645.28, 3759.08),
    "halfcheetah-random": (-288.80, 80.43, -525.96, -85.36),
    "halfcheetah-medium": (4770.33, 355.75, -310.23, 5309.38),
    "halfcheetah-medium-replay": (3093.29, 1680.69, -638.49, 4985.14),
    "halfcheetah-expert": (10656.43, 441.68, 2045.83, 11252.04),
    "walker2d-random": (1.87, 5.81, -17.01, 75.03),
    "walker2d-medium": (2852.09, 1095.44, -6.61, 4226.94),
    "walker2d-medium-replay": (682.70, 895.96, -50.20, 4132.00),
    "walker2d-expert": (4920.51, 136.39, 763.42, 5011.69),
}


# Rows of these files, of unfinished episodes too where that is known.
D4RL_ROWS = {
    **{
        f"{robot}-{kind}": 1_000_000
        for robot in collect.REPLAY_ROWS
        for kind in collect.SINGLE
    },
    **{f"{robot}-medium-replay": rows for robot, rows in collect.REPLAY_ROWS.items()},
    **{f"{robot}-full-replay": 1_000_000 for robot in collect.REPLAY_ROWS},
    "hopper-medium-expert": 1_999_906,
    "halfcheetah-medium-expert": 2_000_000,
    "walker2d-medium-expert": 1_999_995,
    **{f"antmaze-{kind}": 1_000_000 for kind in envs.ANTMAZES},
}

_unreachable: dict[str, str] = {}  # server -> why; it is asked once per process


@dataclass
class Dataset:
    """Data of one task, ready for a replay buffer, and what is known of its origin."""

    task: str  # D4RL task name
    arrays: dict[str, np.ndarray]  # result of `qlearning_dataset`
    # source, path, sha256, rows, rows_raw, label, message, versions; recognised: D4RL's
    # own bytes for this task; collected: the settings of a stand-in
    provenance: dict[str, Any]
    statistics: dict[str, Any]  # of the raw data, see `statistics`
    # (E,) raw returns of the complete episodes
    returns: np.ndarray = field(default_factory=lambda: np.zeros(0))


# ---------------------------------------------------------------- what D4RL published


def file_name(task: str) -> str:
    """The name of a task's file in D4RL's dataset folder.

    Raises:
        ValueError: unknown task, or one of -v0 and -v1, whose files are named otherwise.
    """
    facts = envs.task(task)
    if facts.version != "v2":
        raise ValueError(
            f"{task}: D4RL's file names are known here for -v2 tasks only; pass "
            "the file as dataset_path"
        )
    if facts.robot == "antmaze":
        return ANTMAZE_FILE.format(*ANTMAZE_FIELDS[facts.kind])
    return f"{facts.robot}_{facts.kind.replace('-', '_')}-v2.hdf5"


def url(task: str) -> str:
    """Where D4RL's server has a task's file; `CORL_DARE_D4RL_URL` names another server.

    Raises:
        ValueError: as of `file_name`.
    """
    folder = "ant_maze_v2" if envs.task(task).robot == "antmaze" else "gym_mujoco_v2"
    return f"{_server()}/{folder}/{file_name(task)}"


def _server() -> str:
    return os.environ.get("CORL_DARE_D4RL_URL", SERVER).rstrip("/")


def known_files() -> dict[str, tuple[int, str]]:
    """Task name -> (bytes, SHA-256) of D4RL's own file, where the checksum is public."""
    known, robot = {}, ""
    for line in CHECKSUMS.split("\n"):
        match line.split():
            case [robot]:
                pass
            case [kind, size, digest]:
                known[f"{robot}-{kind}-v2"] = (int(size), digest)
    return known


# ---------------------------------------------------------------- reading and checking


def load_hdf5(path: Path | str, task: str) -> dict[str, np.ndarray]:
    """The transitions of a D4RL HDF5 file, checked and cast; see `validate`.

    Raises:
        ValueError: not a readable HDF5 file, or contents that do not fit the task.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"dataset file {path} does not exist")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file: {_what_instead(path)}")
    try:
        with h5py.File(path) as file:
            if missing := [key for key in REQUIRED if key not in file]:
                raise ValueError(
                    f"{path} lacks {', '.join(missing)}; it holds "
                    f"{', '.join(sorted(file)) or 'nothing'}; D4RL's schema needs "
                    f"{', '.join(REQUIRED)}"
                )
            columns = {key: file[key] for key in REQUIRED + OPTIONAL if key in file}
            for key, column in columns.items():
                if not isinstance(column, h5py.Dataset):
                    raise ValueError(
                        f"{path}: {key} is a group; D4RL stores one array there"
                    )
            return _clean(columns, task, path)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{path} is a damaged or incomplete HDF5 file ({error}); get it again"
        ) from error


def _what_instead(path: Path) -> str:
    with open(path, "rb") as handle:
        start = handle.read(200).lstrip().lower()
    if not start:
        return "it is empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer; run `git lfs pull` where it came from"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, so the download failed; check its address"
    return "its first bytes are not HDF5's; download it again"


def validate(
    raw: dict[str, np.ndarray], task: str, path: Path | str
) -> dict[str, np.ndarray]:
    """Check raw transitions against a task and cast them; `path` names them in errors.

    Flags may be of any numeric type (antmaze stores floats); both may be set in one row.

    Returns:
        observations (N, S), actions (N, A), rewards (N,) and, where given,
        next_observations (N, S) as float32; terminals and, where given, timeouts (N,) as
        bool. N is at least 2.

    Raises:
        ValueError: wrong shape, type or length, a value that is not finite in float32,
            an action outside [-1, 1], a flag that is not 0 or 1. Names file, key, row.
    """
    columns = {k: np.asarray(raw[k]) for k in REQUIRED + OPTIONAL if k in raw}
    return _clean(columns, task, path)


def _clean(
    columns: dict[str, np.ndarray | h5py.Dataset], task: str, path: Path | str
) -> dict[str, np.ndarray]:
    """`validate`; columns of a file are read one by one, so a float64 file is not in
    memory beside its float32 copy."""
    shapes = {}
    for key, column in columns.items():
        if column.dtype.kind not in "fiub":
            raise ValueError(
                f"{path}: {key} has type {column.dtype}; numbers are needed"
            )
        shapes[key] = column.shape
        if key in ("rewards", *FLAGS) and column.shape[1:] == (1,):
            shapes[key] = column.shape[:1]
    _check_shapes(shapes, envs.task(task), path)
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
        if key == "actions":
            outside = np.abs(cast) > ACTION_BOUND
            _reject(outside, values, key, path, "actions must be within [-1, 1]")
        clean[key] = cast
    _check_torso(clean["observations"], envs.task(task), path)
    return clean


def _check_torso(observations: np.ndarray, facts: envs.Task, path: Path | str) -> None:
    """halfcheetah and walker2d have the same widths, but only the walker stands upright."""
    if facts.robot not in ("halfcheetah", "walker2d"):
        return
    height = np.median(observations[:, 0])
    robot = "walker2d" if height > TORSO_HEIGHT else "halfcheetah"
    if robot != facts.robot:
        raise ValueError(
            f"{path}: the torso's height, observations[:, 0], is {height:.2f} in the "
            f"median, as {robot}'s; {facts.name} needs data of {facts.robot}"
        )


def _reject(
    bad: np.ndarray, values: np.ndarray, key: str, path: Path | str, rule: str
) -> None:
    rows = bad.reshape(len(bad), -1).any(1)
    if rows.any():
        row = int(rows.argmax())
        value = values[row][bad[row]].flat[0] if values.ndim > 1 else values[row]
        raise ValueError(
            f"{path}: {key} has {value} in row {row} ({rows.sum()} bad rows of "
            f"{len(rows)}); {rule}"
        )


def _check_shapes(
    shapes: dict[str, tuple[int, ...]], facts: envs.Task, path: Path | str
) -> None:
    widths = {"observations": facts.state_dim, "actions": facts.action_dim}
    widths["next_observations"] = facts.state_dim
    for key, shape in shapes.items():
        wanted = 2 if key in widths else 1
        if len(shape) != wanted:
            raise ValueError(
                f"{path}: {key} has shape {shape}; expected {wanted} dimension(s)"
            )
    dims = shapes["observations"][1], shapes["actions"][1]
    if dims != (facts.state_dim, facts.action_dim):
        fits = [
            name
            for name, robot in envs.ROBOTS.items()
            if dims == (robot.state_dim, robot.action_dim)
        ]
        raise ValueError(
            f"{path}: observations and actions have widths {dims}, which fit "
            f"{' or '.join(fits) or 'no robot known here'}; {facts.name} needs "
            f"{facts.state_dim} and {facts.action_dim}"
        )
    rows = shapes["observations"][0]
    for key, shape in shapes.items():
        if shape[0] != rows:
            raise ValueError(
                f"{path}: {key} has {shape[0]} rows, observations has {rows}"
            )
        if key in widths and shape[1] != widths[key]:
            raise ValueError(
                f"{path}: {key} has width {shape[1]}; expected {widths[key]}"
            )
    if rows < 2:
        raise ValueError(f"{path}: {rows} row(s); a dataset needs at least 2")


# ---------------------------------------------------------------- D4RL's q-learning


def qlearning_dataset(
    raw: dict[str, np.ndarray], keep_timeouts: bool = False, horizon: int = 1000
) -> dict[str, np.ndarray]:
    """Raw transitions -> q-learning arrays by the rules of `d4rl.qlearning_dataset`.

    The next observation is the observation of the following row, so the last row and
    the rows that end by a time-out are dropped; after a terminal it is the first
    observation of the next episode, which the bootstrap masks. With `keep_timeouts` all
    rows stay and the stored, true next observations are used.

    Args:
        raw: arrays of `validate`, N rows.
        horizon: time limit in steps, read only where `timeouts` is missing: a step
            counter then stands in for it.

    Returns:
        observations, next_observations (M, S), actions (M, A), rewards (M,) float32 and
        terminals (M,) bool, copies.

    Raises:
        ValueError: a key is missing, no row is left, or keep_timeouts without
            next_observations (antmaze stores none).
    """
    if missing := [key for key in REQUIRED if key not in raw]:
        raise ValueError(f"raw data lacks {', '.join(missing)}")
    if keep_timeouts:
        if "next_observations" not in raw:
            raise ValueError(
                "keep_timeouts needs stored next_observations, which this data lacks"
            )
        keep = np.arange(len(raw["rewards"]))
        next_observations = raw["next_observations"][keep]
    else:
        keep = np.flatnonzero(~timeout_flags(raw, horizon)[:-1])
        next_observations = raw["observations"][keep + 1]
    if not len(keep):
        raise ValueError("no transition is left: every row but the last ends an episode")
    return {
        "observations": raw["observations"][keep].astype(np.float32, copy=False),
        "actions": raw["actions"][keep].astype(np.float32, copy=False),
        "next_observations": next_observations.astype(np.float32, copy=False),
        "rewards": raw["rewards"][keep].astype(np.float32, copy=False),
        "terminals": raw["terminals"][keep].astype(bool, copy=False),
    }


def timeout_flags(raw: dict[str, np.ndarray], horizon: int) -> np.ndarray:
    """Stored time-out flags (N,) bool, or D4RL's step counter's if none are stored.

    D4RL's counter starts an episode at 0 after a cut but at 1 after a terminal, so the
    cut after a terminal comes one step early; reproduced, to get the same rows.

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


def episode_bounds(raw: dict[str, np.ndarray], task: str) -> np.ndarray:
    """First row of each complete episode, then the row after the last one (E + 1,).

    Antmaze episodes end by time-out alone: its terminals mark rows at the goal, where
    the collector walked on.
    """
    facts = envs.task(task)
    ends = timeout_flags(raw, facts.horizon)
    if facts.robot != "antmaze":
        ends = ends | raw["terminals"].astype(bool)
    return np.concatenate([[0], np.flatnonzero(ends) + 1])


def episode_returns(raw: dict[str, np.ndarray], task: str) -> np.ndarray:
    """Raw returns (E,) float64 of the complete episodes."""
    totals = np.concatenate([[0.0], np.cumsum(raw["rewards"], dtype=np.float64)])
    return np.diff(totals[episode_bounds(raw, task)])


def statistics(raw: dict[str, np.ndarray], task: str) -> dict[str, Any]:
    """Counts, raw returns and lengths of complete episodes, and the range of actions.

    All values are plain numbers; those of no episode are None.
    """
    bounds, rows = episode_bounds(raw, task), len(raw["rewards"])
    over = timeout_flags(raw, envs.task(task).horizon)
    return {
        "rows": rows,
        "episodes": len(bounds) - 1,
        "unfinished_rows": rows - int(bounds[-1]),
        "terminals": int(raw["terminals"].sum()),
        "timeouts": int(over.sum()),
        "return": _summary(episode_returns(raw, task)),
        "length": _summary(np.diff(bounds)),
        "action_min": float(raw["actions"].min()),
        "action_max": float(raw["actions"].max()),
    }


def _summary(values: np.ndarray) -> dict[str, float | None]:
    names = ("mean", "std", "min", "max")
    if not len(values):
        return dict.fromkeys(names)
    return {name: float(getattr(values, name)()) for name in names}


# ---------------------------------------------------------------- where data comes from


def resolve(
    task: str,
    source: str = "auto",
    path: Path | str | None = None,
    cache_dir: Path | str | None = None,
    rows: int | None = None,
) -> Dataset:
    """Find a task's data, check it, make q-learning arrays of it; prints what it took.

    Args:
        task: D4RL task name.
        source: one of SOURCES. `auto` takes the first that answers: `path`; D4RL's
            folder (`D4RL_DATASET_DIR` or ~/.d4rl/datasets); a download from D4RL's
            server into it; the self-collected stand-in.
        path: HDF5 file, or `minari:` and a Minari id.
        cache_dir: where stand-ins are kept; default `CORL_DARE_CACHE` or
            ~/.cache/corl_dare.
        rows: size of a stand-in that has to be collected (default 200 000, and D4RL's
            own size for medium-replay); other sources ignore it.

    Raises:
        ValueError: unknown task or source, no source has the data, or bad data.
        RuntimeError: a forced source does not have the data, a package is missing, or
            the stand-in cannot be written.
    """
    raw, provenance = find(task, source, path, cache_dir, rows)
    facts, returns = statistics(raw, task), episode_returns(raw, task)
    true_ends = provenance["source"] == "minari"
    if not true_ends:
        raw.pop("next_observations", None)  # D4RL's rules do not read it
    try:
        arrays = qlearning_dataset(raw, true_ends, envs.task(task).horizon)
    except ValueError as error:
        raise ValueError(f"{provenance['path']}: {error}") from error
    counts = {"rows": len(arrays["rewards"]), "rows_raw": len(raw["rewards"])}
    message = (
        f"dataset {task}: {provenance['label']}, source {provenance['source']}, "
        f"{provenance['path']}, {counts['rows']} transitions"
    )
    if "warning" in provenance:
        message += f"; WARNING: {provenance['warning']}"
    print(message)
    versions = {"h5py_version": h5py.__version__, "numpy_version": np.__version__}
    provenance = {**provenance, **counts, **versions, "message": message}
    return Dataset(task, arrays, provenance, facts, returns)


def find(
    task: str,
    source: str = "auto",
    path: Path | str | None = None,
    cache_dir: Path | str | None = None,
    rows: int | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The raw rows of a task, as of `validate`, and where they come from; see `resolve`."""
    envs.task(task)
    if source not in SOURCES:
        raise ValueError(f"dataset_source {source!r} is not one of {', '.join(SOURCES)}")
    if path is not None and source not in ("auto", "file", "minari"):
        raise ValueError(
            f"dataset_path is given but dataset_source {source!r} does not read it; use "
            "'file', 'minari' or 'auto'"
        )
    if path is None and source in ("file", "minari"):
        raise ValueError(f"dataset_source {source!r} needs dataset_path")
    if source == "minari" or str(path).startswith("minari:"):
        return _from_minari(task, source, str(path).removeprefix("minari:"))
    if path is not None:
        return _from_file(task, "file", Path(path).expanduser())
    if source == "self-collected":
        return _from_file(task, source, _stand_in(task, cache_dir, rows))

    reasons = []
    for name, get in (("d4rl_dir", _in_d4rl_dir), ("d4rl", _download)):
        if source in ("auto", name):
            try:
                return _from_file(task, name, get(task))
            except _NotFound as error:
                reasons.append(f"{name}: {error}")
    if source != "auto":
        raise RuntimeError(f"no dataset for {task}; {reasons[0]}")
    try:
        found = _stand_in(task, cache_dir, rows)
    except collect.NotCollectable as error:
        raise ValueError(
            f"no dataset for {task}; {'; '.join(reasons)}; self-collected: {error}. Put "
            "D4RL's file there or pass dataset_path"
        ) from error
    print(f"dataset {task}: {'; '.join(reasons)}")
    return _from_file(task, "self-collected", found)


class _NotFound(Exception):
    """A source does not have the data; the next one may."""


def _d4rl_dir() -> Path:
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def _in_d4rl_dir(task: str) -> Path:
    try:
        path = _d4rl_dir() / file_name(task)
    except ValueError as error:
        raise _NotFound(str(error)) from error
    if not path.is_file():
        raise _NotFound(f"there is no {path}")
    return path


def _download(task: str) -> Path:
    """Download into D4RL's folder, where d4rl looks, too; D4RL's checksum or nothing."""
    try:
        address = url(task)
    except ValueError as error:
        raise _NotFound(str(error)) from error
    target, server = _d4rl_dir() / file_name(task), _server()
    if target.is_file():
        return target
    if not server:
        raise _NotFound("downloads are switched off (CORL_DARE_D4RL_URL is empty)")
    if server in _unreachable:
        raise _NotFound(_unreachable[server])
    try:
        return download.download(address, target, *known_files().get(task, ()))
    except download.Unreachable as error:
        _unreachable[server] = str(error)
        raise _NotFound(str(error)) from error
    except download.DownloadError as error:
        raise _NotFound(str(error)) from error


def cache_folder(cache_dir: Path | str | None = None) -> Path:
    """Where prepared things are kept: the argument, CORL_DARE_CACHE or ~/.cache/corl_dare."""
    cache = cache_dir or os.environ.get("CORL_DARE_CACHE") or "~/.cache/corl_dare"
    return Path(cache).expanduser()


def _stand_in(task: str, cache_dir: Path | str | None, rows: int | None) -> Path:
    rows = collect.default_rows(task) if rows is None else rows
    return collect.collect(task, rows, _stand_in_file(task, cache_dir, rows))


def _stand_in_file(task: str, cache_dir: Path | str | None, rows: int) -> Path:
    # A new release may ship other policies: their files must not be taken for these.
    digests = "".join(f"-{digest[:8]}" for digest in collect.fingerprint(task).values())
    return cache_folder(cache_dir) / "datasets" / f"{task}-{rows}{digests}.hdf5"


def _from_file(
    task: str, source: str, path: Path
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    raw = load_hdf5(path, task)
    digest = collect.sha256(path)
    with h5py.File(path) as file:
        made = collect.attributes(file)
    known = {known: name for name, (_, known) in known_files().items()}.get(digest)
    provenance = {
        "source": source,
        "path": str(path),
        "sha256": digest,
        "recognised": known == task,
        "label": _label(task, source, path, known, made),
    }
    if made.get("source") == "self-collected":
        provenance["collected"] = made
    return raw, provenance


def _label(task: str, source: str, path: Path, known: str | None, made: dict) -> str:
    if known is not None:
        label = f"D4RL's own file of {known} (checksum matches)"
        return label if known == task else f"{label}, NOT of {task}"
    if made.get("source") == "self-collected":
        label = "self-collected stand-in (not D4RL data)"
        if "mix" in made:
            label += f", {made['share']:.0%} of its rows by the {made['mix']} policy"
        if made.get("task") != task:
            label += f", made for {made.get('task')}"
        return label
    label = "unknown file (not D4RL's checksum)"
    size = known_files().get(task, (None,))[0]
    if "exported_from" in made:
        label += f", exported from {made['exported_from']}"
    elif source != "file" and size and path.stat().st_size < size:
        label += f", shorter than D4RL's {size} bytes"
    return label


def _from_minari(
    task: str, source: str, name: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if source not in ("auto", "minari"):
        raise ValueError(
            f"dataset_path is a Minari id, but dataset_source is {source!r}"
        )
    raw = validate(convert.from_minari(name), task, f"minari:{name}")
    return raw, {
        "source": "minari",
        "path": f"minari:{name}",
        "sha256": _hash_arrays(raw),
        "recognised": False,
        "label": f"Minari dataset {name} (not D4RL data)",
        "warning": convert.caveat(name),
        "minari_version": convert.import_minari(name).__version__,
    }


def _hash_arrays(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype} {arrays[key].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[key]).data)
    return digest.hexdigest()


# ---------------------------------------------------------------- card


def card(dataset: Dataset) -> str:
    """A dataset in a few lines of text, its returns beside D4RL's published ones."""
    task, facts, stats = dataset.task, dataset.provenance, dataset.statistics
    ends = f"{stats['terminals']} terminals, {stats['timeouts']} time-outs"
    if stats["unfinished_rows"]:
        ends += f"; last episode unfinished ({stats['unfinished_rows']} rows)"
    lines = [
        ("dataset", task),
        ("data", facts["label"]),
        ("source", facts["source"]),
        ("path", facts["path"]),
        ("sha256", facts["sha256"]),
        ("rows", f"{facts['rows']} transitions from {facts['rows_raw']} rows"),
        ("episodes", f"{stats['episodes']} complete; {ends}"),
        ("length", _four(stats["length"], "steps", 0)),
        ("return", _four(stats["return"], "raw", 2)),
        ("score", _four(_scores(task, stats["return"]), "normalized", 1)),
    ]
    if envs.task(task).robot == "antmaze":
        # Evaluations end at the goal, these episodes go on: their return is no success rate.
        lines[-1] = ("score", "none: the rewards of one episode are added up")
    published = D4RL_RETURNS.get(task.removesuffix("-v2"))
    if published is not None:
        names = ("mean", "std", "min", "max")
        theirs = dict(zip(names, published, strict=True))
        lines += [
            ("D4RL's", _four(theirs, "raw, published for D4RL's own file", 2)),
            ("", _four(_scores(task, theirs), "normalized", 1)),
        ]
    lines.append(("actions", f"{stats['action_min']:.6f} … {stats['action_max']:.6f}"))
    if "collected" in facts:
        made = facts["collected"]
        lines.append(("seed", made["seed"]))
        lines.append(("policies", made["policies"]))
    versions = {**facts, **facts.get("collected", {})}.items()
    named = [f"{k[:-8]} {v}" for k, v in versions if k.endswith("_version")]
    lines.append(("versions", ", ".join(named)))
    if "warning" in facts:
        lines.append(("warning", facts["warning"]))
    return "\n".join(f"{name:<9} {text}".rstrip() for name, text in lines)


def _scores(task: str, summary: dict[str, float | None]) -> dict[str, float | None]:
    if summary["mean"] is None:
        return summary
    scores = {k: float(envs.normalized_score(task, v)) for k, v in summary.items()}
    zero = float(envs.normalized_score(task, 0.0))
    return {**scores, "std": scores["std"] - zero}  # a width is scaled, not shifted


def _four(summary: dict[str, float | None], unit: str, digits: int) -> str:
    if summary["mean"] is None:
        return "no complete episode"
    mean, std, low, high = (f"{summary[k]:.{digits}f}" for k in summary)
    return f"{mean} ± {std} ({low} … {high}) {unit}"


def plot_returns(dataset: Dataset, out: Path) -> None:
    """Histogram of the complete episodes' raw returns; D4RL's mean and width beside it.

    Raises:
        ValueError: no complete episode, or a type of picture that nobody can draw.
        RuntimeError: no room or no right to write.
    """
    from matplotlib.figure import Figure  # slow to import

    if not len(dataset.returns):
        raise ValueError(f"{dataset.task}: no complete episode to plot")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    label = f"{len(dataset.returns)} episodes, {dataset.provenance['label']}"
    axes.hist(dataset.returns, bins=50, color="tab:blue", label=label)
    mean = dataset.returns.mean()
    axes.axvline(mean, color="black", label=f"their mean, {mean:.4g}")
    published = D4RL_RETURNS.get(dataset.task.removesuffix("-v2"))
    if published is not None:
        center, width = published[:2]
        axes.axvline(center, color="tab:orange", label=f"D4RL's mean, {center:.4g}")
        low, high = center - width, center + width
        style = {"color": "tab:orange", "alpha": 0.2, "zorder": 0}
        axes.axvspan(low, high, **style, label="D4RL's mean ± 1 std")
    axes.set_xlabel("return of an episode (raw)")
    axes.set_ylabel("episodes")
    axes.set_title(dataset.task)
    figure.legend(loc="outside lower center", fontsize=7)
    form = out.suffix.removeprefix(".") or "png"
    with _writing(out) as part:
        figure.savefig(part, dpi=150, format=form)
        collect.publish(part, out)


@contextmanager
def _writing(out: Path) -> Iterator[Path]:
    """A name beside `out` to write to; nothing stays under it, errors get one line."""
    part = out.with_name(f".{out.name}.part")
    try:
        yield part
    except OSError as error:
        raise RuntimeError(f"cannot write {out} ({error})") from error
    finally:
        with suppress(OSError):
            part.unlink()


# ---------------------------------------------------------------- all tasks


def overview(cache_dir: Path | str | None = None) -> str:
    """A table of every task: where its data would come from, rows, D4RL's return.

    Looks at names and folders only; nothing is loaded, downloaded or collected, so it
    cannot know whether D4RL's server would answer before a stand-in is taken.
    """
    lines = [("task", "source", "rows", "D4RL's return")]
    for task in envs.task_names():
        published = D4RL_RETURNS.get(task.removesuffix("-v2"))
        figures = "{:.2f} ± {:.2f}".format(*published) if published else "not known"
        lines.append((task, *_would_come_from(task, cache_dir), figures))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    rows = [
        "  ".join(
            (text.rjust if i == 2 else text.ljust)(widths[i])
            for i, text in enumerate(line)
        ).rstrip()
        for line in lines
    ]
    if _server():
        rows.append(f"Before a stand-in is taken, {_server()} is asked for D4RL's file.")
    return "\n".join(rows)


def _would_come_from(task: str, cache_dir: Path | str | None) -> tuple[str, str]:
    """Source and rows of a task."""
    try:
        path = _in_d4rl_dir(task)
        with h5py.File(path) as file:
            return f"{path}", str(len(file["rewards"]))
    except _NotFound:
        pass
    except (OSError, KeyError, TypeError) as error:
        return f"{path}: unreadable ({error})", "-"
    try:
        rows = collect.default_rows(task)
        found = _stand_in_file(task, cache_dir, rows)
        if found.exists():
            return f"self-collected, {found}", str(rows)
        return "self-collected (not yet made)", str(rows)
    except collect.NotCollectable:
        return "D4RL's server, if it answers, or --path", str(
            D4RL_ROWS[task.removesuffix("-v2")]
        )


def report(out: Path, cache_dir: Path | str | None, rows: int | None) -> None:
    """Make every stand-in there can be, and write a table of them against D4RL's data.

    Raises:
        ValueError: `out` is a folder; else as of `resolve`.
        RuntimeError: no room or no right to write; else as of `resolve`.
    """
    from corl_dare import runs  # of it only the names of commit and machine

    if out.is_dir():
        raise ValueError(f"--report {out} is a folder; a file is needed")
    with _writing(out) as part:  # a try, before the work is spent
        out.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    robots, mazes, missing = [], [], []
    for task in envs.task_names():
        try:
            collect.fingerprint(task)
        except collect.NotCollectable:
            missing.append(task)
            continue
        dataset = resolve(task, "self-collected", None, cache_dir, rows)
        if envs.task(task).robot == "antmaze":
            mazes.append(_maze_row(dataset))
        else:
            robots.append(_robot_row(dataset))
    size = "" if rows is None else f" --rows {rows}"
    made = {k[:-8]: v for k, v in collect.versions().items()}
    machine = runs.machine()
    lines = [
        "# Self-collected stand-ins beside D4RL's data",
        "",
        f"Command: `python -m corl_dare.datasets --report {runs.tidy_path(out)}{size}`, "
        f"commit {runs.git_commit()}, {', '.join(f'{k} {v}' for k, v in made.items())}, "
        f"{machine['processor']}, {machine['cores']} cores.",
        "",
        "## Locomotion",
        "",
        "Returns of complete episodes, raw and D4RL-normalized. `within`: the stand-in's",
        "mean lies within D4RL's published mean ± 1 std; empty where D4RL's is not known.",
        "`docs/datasets.md` says which policies acted, and why `expert` is weaker.",
        "",
        "| task | rows | episodes | return, mean ± std (min … max) | normalized | "
        "D4RL's rows | D4RL's mean ± std | normalized | within | sha256 |",
        "|---" * 10 + "|",
        *robots,
        "",
        "## Antmaze",
        "",
        "Episodes go on at the goal, so a return counts rows at the goal that rewards are",
        "computed for and is no score. D4RL publishes no such figures. As in D4RL's data,",
        "the goals that medium-play's ants walk to are others than the evaluation's.",
        "",
        "| task | rows | episodes | rows at the goal per episode, mean ± std | "
        "episodes that get there | D4RL's rows | sha256 |",
        "|---" * 7 + "|",
        *mazes,
        "",
        f"No stand-in: {', '.join(missing) or 'none is missing'}.",
    ]
    with _writing(out) as part:
        part.write_text("\n".join(lines) + "\n")
        collect.publish(part, out)


def _robot_row(dataset: Dataset) -> str:
    stats, task = dataset.statistics, dataset.task
    mine, published = stats["return"], D4RL_RETURNS.get(task.removesuffix("-v2"))
    own, own_score = "no complete episode", ""
    if mine["mean"] is not None:
        own = "{mean:.0f} ± {std:.0f} ({min:.0f} … {max:.0f})".format(**mine)
        own_score = f"{envs.normalized_score(task, mine['mean']):.1f}"
    theirs, their_score, within = "not known", "", ""
    if published is not None:
        mean, std = published[:2]
        theirs = f"{mean:.0f} ± {std:.0f}"
        their_score = f"{envs.normalized_score(task, mean):.1f}"
        if mine["mean"] is not None:
            within = "yes" if abs(mine["mean"] - mean) <= std else "**no**"
    return _table_row(dataset, [own, own_score], [theirs, their_score, within])


def _maze_row(dataset: Dataset) -> str:
    own = ["no complete episode", ""]
    if len(dataset.returns):
        mean, std = dataset.returns.mean(), dataset.returns.std()
        own = [f"{mean:.0f} ± {std:.0f}", f"{(dataset.returns > 0).mean():.0%}"]
    return _table_row(dataset, own, [])


def _table_row(dataset: Dataset, mine: list[str], theirs: list[str]) -> str:
    stats, task = dataset.statistics, dataset.task
    counts = [task, str(stats["rows"]), str(stats["episodes"])]
    published = [str(D4RL_ROWS[task.removesuffix("-v2")]), *theirs]
    digest = f"`{dataset.provenance['sha256'][:12]}`"
    return f"| {' | '.join([*counts, *mine, *published, digest])} |"


# ---------------------------------------------------------------- command line


def export(dataset: Dataset, form: str, target: str) -> None:
    """Write all raw rows as D4RL's HDF5 file (`d4rl`) or a local Minari dataset (`minari`).

    Raises:
        ValueError, RuntimeError: as of `convert.to_d4rl` and `convert.to_minari`.
    """
    task, facts = dataset.task, dataset.provenance
    source = "minari" if facts["source"] == "minari" else "file"
    raw, _ = find(task, source, facts["path"])  # q-learning arrays lack some rows
    if form == "minari":
        bounds = episode_bounds(raw, task)
        if bounds[-1] < len(raw["rewards"]):
            bounds = np.append(bounds, len(raw["rewards"]))
        about = f"{task}: {facts['label']}, sha256 {facts['sha256']}"
        print(f"wrote {convert.to_minari(raw, bounds, task, target, about)}")
    else:
        original = None if source == "minari" else Path(facts["path"])
        about = f"{facts['label']}, {facts['path']}, sha256 {facts['sha256']}"
        print(f"wrote {convert.to_d4rl(raw, about, Path(target), original)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Find a dataset and print its card.")
    parser.add_argument("task", nargs="?", help="D4RL name, such as hopper-medium-v2")
    parser.add_argument("--source", choices=SOURCES, default="auto")
    parser.add_argument("--path", help="HDF5 file, or minari:ID")
    parser.add_argument("--cache_dir", type=Path, help="where stand-ins are kept")
    parser.add_argument("--rows", type=int, help="size of a stand-in to collect")
    parser.add_argument("--plot", type=Path, help="write a histogram of returns (PNG)")
    parser.add_argument(
        "--export",
        nargs=2,
        metavar=("FORMAT", "TARGET"),
        help="d4rl FILE, or minari ID: write the dataset in that format",
    )
    parser.add_argument("--all", action="store_true", help="a line for every task")
    parser.add_argument("--report", type=Path, help="compare all stand-ins with D4RL's")
    args = parser.parse_args()
    if (args.task is not None) + args.all + (args.report is not None) != 1:
        parser.error("give one task, or --all, or --report FILE")
    if args.task is None and (args.plot or args.export or args.path):
        parser.error("--plot, --export and --path belong to one task")
    if args.export and args.export[0] not in FORMATS:
        parser.error(
            f"--export {args.export[0]}: the formats are {' and '.join(FORMATS)}"
        )
    try:
        if args.all:
            print(overview(args.cache_dir))
        elif args.report:
            report(args.report, args.cache_dir, args.rows)
        else:
            _one_task(args)
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(collect.INTERRUPTED) from None


def _one_task(args: argparse.Namespace) -> None:
    found = resolve(args.task, args.source, args.path, args.cache_dir, args.rows)
    print(card(found))
    if args.plot:
        plot_returns(found, args.plot)
        print(f"wrote {args.plot}")
    if args.export:
        export(found, *args.export)


if __name__ == "__main__":
    main()
