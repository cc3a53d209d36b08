"""Memory of DARE-IQL: peaks of whole runs, and whether it grows during fine-tuning.

    python benchmarks/memory.py [--out results/speed/memory.json]

Each case is a run of `algorithms/dare_iql.py` in a process of its own, whose resident memory is
read from the system while it runs (Linux). Some cases make few updates of small batches, since
only memory counts there. Buffers are allocated for the whole run, but the system counts their
memory only when rows are written. So the growth is measured from a fifth of the online steps to
the end, and the rows written in between are subtracted.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from corl import arguments, machine, tasks

ROOT = Path(__file__).parent.parent
TASK = "hopper-medium-v2"
CHEAP = "--n_episodes 1 --eval_freq 1000000 --batch_size 32 --dare.behavior_updates 100"
# Flags that are added to configs/iql/quick_start.yaml.
CASES = {
    "quick start, batch 256": "--offline_iterations 500 --online_iterations 7000 "
    "--n_episodes 1 --eval_freq 1000000",
    "one million transitions": f"{CHEAP} --dataset_rows 1000000 --buffer_size 2000000 "
    "--offline_iterations 2000 --online_iterations 8000",
    "50 000 online steps": f"{CHEAP} --offline_iterations 100 "
    "--online_iterations 50000 --buffer_size 300000",
}


def resident(pid: int) -> float:
    """Resident memory of a process in MB; 0 when it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(flags: str) -> dict:
    """Resident memory (MB) of one run: its peak, and its value by online step."""
    command = [sys.executable, "algorithms/dare_iql.py"]
    command += ["--config", "configs/iql/quick_start.yaml", "--device", "cpu"]
    command += ["--threads", "1", "--compile", "false"]
    command += ["--dataset_source", "self-collected", "--log_freq", "500"]
    with tempfile.TemporaryDirectory() as folder:
        command += [*flags.split(), "--runs_dir", folder]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        peak, course = 0.0, {}
        while process.poll() is None:
            memory = resident(process.pid)
            peak = max(peak, memory)
            step = online_steps(Path(folder))
            if step and memory:
                course[step] = memory
            time.sleep(0.2)
        if process.returncode:
            raise SystemExit(process.stderr.read().decode()[-2000:])
    return {"peak_mb": round(peak, 1), "course_mb": course, "flags": flags}


def online_steps(folder: Path) -> int:
    """The last online step in a run folder's metrics.csv, 0 before the first."""
    for path in folder.glob("*/metrics.csv"):
        head, *rows = [line.split(",") for line in path.read_text().splitlines()]
        steps = [int(row[0]) for row in rows if row[head.index("phase")] == "online"]
        return max(steps, default=0)
    return 0


def growth(course: dict[int, float]) -> float:
    """Growth (MB) from a fifth of the steps to the end, less the rows written in between."""
    last = max(course)
    first = min(step for step in course if step >= last / 5)
    task = tasks.task(TASK)
    row = 4 * (2 * task.state_dim + task.action_dim + 2) / 1e6  # float32
    return course[last] - course[first] - row * (last - first)


def main() -> None:
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=arguments.path, help="write the numbers as JSON")
    args = parser.parse_args()
    results = {}
    for name, flags in CASES.items():
        results[name] = measure(flags)
        print(f"{name:<28} peak {results[name]['peak_mb']:8.0f} MB", flush=True)
    name = "50 000 online steps"
    results[name]["growth_mb"] = round(growth(results[name]["course_mb"]), 1)
    print(f"{name:<28} growth {results[name]['growth_mb']:6.1f} MB beyond its rows")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "command": shlex.join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
            "results": results,
            "machine": machine.describe(),
            "versions": machine.versions(),
            "commit": machine.git_commit(),
        }
        args.out.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
