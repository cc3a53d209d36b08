"""Loading one million transitions: seconds and memory, vectorised against the plain loop.

    python benchmarks/dataset_speed.py [--rows 1000000] [--loop_rows 200000] [--out FILE.json]

The rows are synthetic, with the sizes of hopper and episodes that end by terminals and time-outs.
Two things are measured. First `qlearning_dataset` on arrays in memory, against a loop that follows
the published rule one row at a time; the loop gets fewer rows and its time is scaled, since it
grows with the rows; both results are compared value by value. Then the whole way from an HDF5 file
of D4RL's schema to checked q-learning arrays (`datasets.resolve`, checksum included), for float32
and, the worst case, float64. Each load has a fresh process, whose largest resident memory is
compared with that before the load. Times are medians of five; the loop runs once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from corl import arguments, machine
from corl.data import schema, sources

S, A, TASK = 11, 3, "hopper-medium-v2"


def synthetic(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random rows; an episode ends every 500 steps on average, in a third by time-out."""
    rng = np.random.default_rng(seed)
    ends = rng.random(rows) < 1 / 500
    late = rng.random(rows) < 1 / 3
    states = rng.normal(size=(rows + 1, S)).astype(np.float32)
    return {
        "observations": states[:-1],
        "actions": rng.uniform(-1, 1, (rows, A)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": ends & ~late,
        "timeouts": ends & late,
        "next_observations": states[1:],
    }


def plain_loop(raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rules of `d4rl.qlearning_dataset`, one row at a time into lists."""
    keys = ("observations", "actions", "next_observations", "rewards", "terminals")
    out: dict[str, list] = {key: [] for key in keys}
    for i in range(len(raw["rewards"]) - 1):
        if bool(raw["timeouts"][i]):
            continue
        out["observations"].append(raw["observations"][i].astype(np.float32))
        out["actions"].append(raw["actions"][i].astype(np.float32))
        out["next_observations"].append(raw["observations"][i + 1].astype(np.float32))
        out["rewards"].append(raw["rewards"][i].astype(np.float32))
        out["terminals"].append(bool(raw["terminals"][i]))
    return {key: np.array(values) for key, values in out.items()}


def measure_arrays(rows: int, loop_rows: int) -> dict:
    """Seconds of both ways on arrays in memory.

    Raises:
        RuntimeError: their results differ.
    """
    raw = synthetic(rows)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        found = schema.qlearning_dataset(raw)
        seconds.append(time.process_time() - start)
    few = {key: values[:loop_rows] for key, values in raw.items()}
    start = time.process_time()
    expected = plain_loop(few)
    loop = (time.process_time() - start) * rows / loop_rows
    same = schema.qlearning_dataset(few)
    for key, values in expected.items():
        if not np.array_equal(same[key], values) or same[key].dtype != values.dtype:
            raise RuntimeError(f"the vectorised {key} differ from the loop's")
    fast = statistics.median(seconds)
    return {
        "array_bytes": sum(values.nbytes for values in found.values()),
        "vectorised_cpu_seconds": fast,
        "loop_cpu_seconds_scaled": loop,
        "loop_rows": loop_rows,
        "ratio": loop / fast,
    }


def measure_file(rows: int, dtype: str) -> dict:
    """Seconds and memory of loading a file whose float fields have a dtype."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.hdf5"
        with h5py.File(path, "w") as file:
            for key, values in synthetic(rows).items():
                if values.dtype == np.float32:
                    values = values.astype(dtype)
                file.create_dataset(key, data=values, compression="gzip", shuffle=True)
        command = [sys.executable, __file__, "--load", str(path)]
        loads = [
            json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            for _ in range(5)
        ]
        return {
            "file_bytes": path.stat().st_size,
            "cpu_seconds": statistics.median(load["cpu_seconds"] for load in loads),
            "seconds": statistics.median(load["seconds"] for load in loads),
            "peak_over_arrays": max(load["peak_over_arrays"] for load in loads),
        }


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM).

    Not `getrusage`: its peak is inherited from the process that started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux")


def load(path: str) -> None:
    """Load the file in this process and print the measurements as JSON."""
    before = resident("VmRSS")
    cpu, clock = time.process_time(), time.time()
    with open(os.devnull, "w") as nowhere:
        out, sys.stdout = sys.stdout, nowhere
        found = sources.resolve(TASK, path=path)
        sys.stdout = out
    cpu, clock = time.process_time() - cpu, time.time() - clock
    size = sum(values.nbytes for values in found.arrays.values())
    over = (resident("VmHWM") - before) / size
    print(
        json.dumps(
            {"cpu_seconds": cpu, "seconds": clock, "peak_over_arrays": over},
            allow_nan=False,
        )
    )


def main() -> None:
    rows = arguments.number(int, "[2, 1e9]")
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=rows, default=1_000_000)
    parser.add_argument("--loop_rows", type=rows, default=200_000)
    parser.add_argument(
        "--out", type=arguments.path, default=Path("results/data/dataset_speed.json")
    )
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load)
        return
    if args.loop_rows > args.rows:
        parser.error("--loop_rows must be at most --rows")
    result = {
        "command": f"python benchmarks/dataset_speed.py --rows {args.rows}",
        "rows": args.rows,
        "arrays": measure_arrays(args.rows, args.loop_rows),
        "file_float32": measure_file(args.rows, "float32"),
        "file_float64": measure_file(args.rows, "float64"),
        "machine": machine.describe(),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
    }
    print(json.dumps(result, indent=2, allow_nan=False))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".part")
    part.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    os.replace(part, args.out)


if __name__ == "__main__":
    main()
