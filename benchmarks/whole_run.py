"""Whole runs, from the dataset's file to the final score: ours, upstream CORL's, JAX-CORL's.

    python benchmarks/whole_run.py [--corl CORL] [--jax_corl JAX_CORL --jax_python PYTHON]
        [--offline 20000] [--online 5000] [--rounds 1] [--cores N]
        [--out results/speed/FILE.json]

Every row is a process of its own with the settings that it has by default, on hopper-medium with
the same evaluations. Its time is all of it: imports, reading the file, compiling, evaluations. The
CPU time is that of the process and of those that it waited for. Ours run twice: with an empty
cache, and again with the graphs that the first run left (its behavior model is fitted again). A
third run is eager with the threads that the first one chose; the break-even length comes from it:
the updates after which the compiled run, with what it spends beside the updates, is ahead.

JAX-CORL has no online phase and fixes no evaluation seed; it runs in the Python of `--jax_python`,
its environment behind a pipe (`jax_worker.py`). What is not there is a row "not measured". `--out`
writes JSON, and beside it the text that is printed, after each run anew.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from corl import arguments, commit, machine, yaml_files
from corl.data import sources
from scripts import make_patches

ROOT = Path(__file__).parent.parent
TASK, CONFIG = "hopper-medium-v2", "configs/iql/hopper_medium.yaml"
UPSTREAM, JAX = "upstream CORL, IQL", "JAX-CORL, IQL, offline part"
# Our runs: title -> file and what is not the config file's.
OURS = {
    "IQL": ("algorithms/iql.py", []),
    "DARE-IQL, preset cpu": ("algorithms/dare_iql.py", ["--preset", "cpu"]),
}
EMPTY, WARM, EAGER = "empty cache", "warm cache", "eager"
Numbers = dict[str, Any]


class Failed(Exception):
    """A run that ended with an error; the message is its last line."""


# ---------------------------------------------------------------- processes


def measured(
    command: Sequence[Any], offline_ends: str = "", **variables: Any
) -> Numbers:
    """Run a command in the repository's root; its wall and CPU seconds.

    Args:
        command: program and arguments.
        offline_ends: pattern of the line that it prints when its offline part is over; then
            `offline_seconds` is there, too.
        variables: of its environment; None takes one out.

    Raises:
        Failed: it ended with an error.
    """
    variables = {"PYTHONPATH": ROOT, "PYTHONUNBUFFERED": 1, **variables}
    environment = {k: v for k, v in os.environ.items() if k not in variables}
    environment.update({k: str(v) for k, v in variables.items() if v is not None})
    found: Numbers = {}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if offline_ends and re.match(offline_ends, line):
                found["offline_seconds"] = time.perf_counter() - start
        _, status, usage = os.wait4(process.pid, 0)
        found["wall_seconds"] = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:]
            raise Failed(last[0] if last else f"exit status {process.returncode}")
    found["cpu_seconds"] = usage.ru_utime + usage.ru_stime
    return found


class Plan(NamedTuple):
    """What all rows share."""

    args: argparse.Namespace
    dataset: sources.Dataset

    @property
    def lengths(self) -> list[Any]:
        """The flags that ours and CORL's have in common."""
        args = self.args
        return [
            *("--env", TASK, "--device", "cpu", "--seed", args.seed),
            *("--offline_iterations", args.offline, "--online_iterations", args.online),
            *("--eval_freq", args.eval_freq, "--n_episodes", args.n_episodes),
        ]


def ours(plan: Plan, title: str, cache: Path, *flags: Any) -> Numbers:
    """One of our runs with the compiled updates of a cache folder."""
    file, preset = OURS[title]
    # A cache of graphs is what is compared, not one of behavior models.
    shutil.rmtree(cache / "behavior", ignore_errors=True)
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, file, "--config", CONFIG, *preset, *plan.lengths]
        path = plan.dataset.provenance["path"]
        command += ["--dataset_path", path, "--runs_dir", runs, *flags]
        if preset and plan.args.behavior_updates is not None:
            command += ["--dare.behavior_updates", plan.args.behavior_updates]
        found = measured(
            command,
            rf"offline step {plan.args.offline}: ",
            CORL_DARE_CACHE=cache,
            TORCHINDUCTOR_CACHE_DIR=None,
        )
        (folder,) = Path(runs).iterdir()
        summary = json.loads((folder / "summary.json").read_text())
        config = yaml_files.load(folder / "config.yaml")
    for name in ("score_offline", "score_final", "updates", "updates_per_second"):
        found[name] = summary[name]
    return {**found, "threads": config["threads"], "compile": config["compile"]}


def upstream(plan: Plan) -> Numbers:
    """CORL's script under our shim."""
    script = plan.args.corl / "algorithms/finetune/iql.py"
    path = plan.dataset.provenance["path"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        shim = [sys.executable, "-m", "corl.shim", "--log", log]
        command = [*shim, "--dataset_path", path, script, *plan.lengths]
        found = measured(command, "Online tuning")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    scores = {
        int(line["_step"]): value
        for line in lines
        for name, value in line.items()
        if name.removeprefix("eval/") == "d4rl_normalized_score"
    }
    offline = [score for step, score in scores.items() if step < plan.args.offline]
    found["score_offline"] = offline[-1] if offline else None
    found["score_final"] = list(scores.values())[-1] if scores else None
    return found


def jax_corl(plan: Plan) -> Numbers:
    """JAX-CORL's script, the offline part of the run."""
    args = plan.args
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "data.npz", **plan.dataset.arrays)
        worker = [args.jax_python, "benchmarks/jax_worker.py", sys.executable, folder]
        settings = {
            "env_name": TASK,
            "seed": args.seed,
            "max_steps": args.offline,
            "eval_interval": args.eval_freq,
            "eval_episodes": args.n_episodes,
        }
        flags = [f"{name}={value}" for name, value in settings.items()]
        found = measured([*worker, args.jax_corl / "algos/iql.py", *flags])
        text = (Path(folder) / "log.jsonl").read_text()
    for line in map(json.loads, text.splitlines()):
        found.setdefault("versions", line.get("versions"))
        for name, value in line.items():
            if name.endswith("final_normalized_score"):
                found["score_offline"] = value
    return {**found, "offline_seconds": found["wall_seconds"], "score_final": None}


# ---------------------------------------------------------------- rounds


def rows_of(plan: Plan, cache: Path) -> dict[str, Callable[[], Numbers] | str]:
    """Row -> what measures it, or why it is not measured. Caches are new and empty."""
    args = plan.args
    rows: dict[str, Callable[[], Numbers] | str] = {
        UPSTREAM: (lambda: upstream(plan)) if args.corl else "without --corl"
    }
    forced = ["--compile", "true"] if args.compile == "true" else []
    for title, (file, _) in OURS.items():
        folder = cache / Path(file).stem
        chosen: Numbers = {}

        def first(title: str = title, folder: Path = folder, kept: Numbers = chosen):
            kept.update(ours(plan, title, folder, *forced))
            return dict(kept)

        def again(title: str = title, folder: Path = folder):
            return ours(plan, title, folder, *forced)

        def eager(title: str = title, folder: Path = folder, kept: Numbers = chosen):
            threads = kept.get("threads", 1)
            flags = ["--threads", threads, "--compile", "false"]
            return ours(plan, title, folder, *flags)

        rows[f"{title}, {EMPTY}"] = first
        rows[f"{title}, {WARM}"] = again
        rows[f"{title}, {EAGER}"] = eager
    rows[JAX] = "without --jax_corl and --jax_python"
    if args.jax_corl and args.jax_python:
        rows[JAX] = lambda: jax_corl(plan)
    return rows


def measure(plan: Plan, save: Callable[[dict[str, Any]], None]) -> None:
    """All rounds; `save` gets row -> numbers of each round, or a reason, after each run."""
    results: dict[str, Any] = {}
    for turn in range(plan.args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, row in rows_of(plan, Path(folder)).items():
                if isinstance(row, str) or isinstance(results.get(name), str):
                    results.setdefault(name, row)
                    continue
                print(f"round {turn + 1}: {name}", file=sys.stderr, flush=True)
                try:
                    results.setdefault(name, []).append(row())
                except Failed as error:
                    results[name] = f"failed: {error}"
                save(results)
    save(results)


# ---------------------------------------------------------------- what comes of it


def break_even(compiled: Numbers, eager: Numbers) -> Numbers:
    """When compiling has paid for itself.

    Returns:
        compile_seconds: what the compiled run spends beside its updates, more than the eager one.
        updates: after which the compiled run is ahead; None where its updates are not faster.
    """

    def beside(run: Numbers) -> float:
        return run["wall_seconds"] - run["updates"] / run["updates_per_second"]

    cost = max(beside(compiled) - beside(eager), 0.0)
    gain = 1 / eager["updates_per_second"] - 1 / compiled["updates_per_second"]
    return {
        "compile_seconds": cost,
        "updates": round(cost / gain) if gain > 0 else None,
    }


def break_evens(results: dict[str, Any]) -> dict[str, Any]:
    """Row -> break-even of each round, or why there is none."""
    found: dict[str, Any] = {}
    for title in OURS:
        eager = results.get(f"{title}, {EAGER}", "not reached")
        for kind in (EMPTY, WARM):
            name = f"{title}, {kind}"
            runs = results.get(name, "not reached")
            if isinstance(runs, str) or isinstance(eager, str):
                found[name] = "not measured"
            elif not all(run["compile"] for run in runs):
                found[name] = "none: a run this short is not compiled"
            elif any(
                a["threads"] != b["threads"] for a, b in zip(runs, eager, strict=False)
            ):
                found[name] = "none: the two runs chose other numbers of threads"
            else:
                found[name] = [
                    break_even(a, b) for a, b in zip(runs, eager, strict=False)
                ]
    return found


def _spread(runs: list[Numbers], name: str, digits: int = 0) -> str:
    values = [run[name] for run in runs if run.get(name) is not None]
    if not values:
        return "–"
    text = f"{statistics.median(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f}–{max(values):.{digits}f})"
    return text


def _ratio(results: dict[str, Any], runs: list[Numbers], name: str) -> str:
    """How many times faster than upstream, median over rounds."""
    base = results.get(UPSTREAM, "")
    if isinstance(base, str):
        return "–"
    pairs = [(b.get(name), r.get(name)) for b, r in zip(base, runs, strict=False)]
    ratios = [theirs / own for theirs, own in pairs if theirs and own]
    return f"{statistics.median(ratios):.2f}" if ratios else "–"


def table(results: dict[str, Any]) -> str:
    """One line per row, and the break-even lengths; a ratio is upstream's seconds by the row's."""
    lines = [
        "| run | wall s | ratio | offline part, wall s | ratio | CPU s | threads | compiled "
        "| score offline → final |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        if isinstance(runs, str):
            why = runs if runs.startswith("failed") else f"not measured ({runs})"
            lines.append(f"| {name} | {why} |" + " |" * 7)
            continue
        online = name != JAX
        cells = [
            name,
            _spread(runs, "wall_seconds") if online else "–",
            _ratio(results, runs, "wall_seconds") if online else "–",
            _spread(runs, "offline_seconds"),
            _ratio(results, runs, "offline_seconds"),
            _spread(runs, "cpu_seconds"),
            _spread(runs, "threads"),
            str(runs[0].get("compile", "–")).lower(),
            f"{_spread(runs, 'score_offline', 1)} → {_spread(runs, 'score_final', 1)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Break-even of compiling:", ""]
    for name, found in break_evens(results).items():
        if not isinstance(found, str):
            cost, counts = _spread(found, "compile_seconds"), _spread(found, "updates")
            gains = counts != "–"
            found = f"compiling costs {cost} s and pays "
            found += f"after {counts} updates" if gains else "never: not faster"
        lines.append(f"- {name}: {found}")
    return "\n".join(lines)


def record(plan: Plan, results: dict[str, Any]) -> dict[str, Any]:
    """The numbers and what they were measured with."""
    args, data = plan.args, plan.dataset.provenance
    command = shlex.join(["python", "benchmarks/whole_run.py", *sys.argv[1:]])
    # A published record names no path of the machine that made it.
    for path, name in (
        (args.corl, "upstream/CORL"),
        (args.jax_corl, "upstream/JAX-CORL"),
        (args.jax_python, "JAX_PYTHON"),
        (args.dataset_path, "DATASET"),
    ):
        if path is not None:
            command = command.replace(str(path), name)
    settings = ("offline", "online", "eval_freq", "n_episodes", "seed", "rounds")
    jax_commit = None
    if args.jax_corl is not None:
        jax_commit = commit.of_git(args.jax_corl / "algos/iql.py")
    return {
        "command": command,
        "settings": {name: getattr(args, name) for name in settings},
        "task": TASK,
        "dataset": {name: data[name] for name in ("label", "source", "sha256", "rows")},
        "runs": results,
        "break_even": break_evens(results),
        "cores": len(os.sched_getaffinity(0)),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": machine.git_commit(),
        "upstream_commit": make_patches.COMMIT if args.corl else None,
        "jax_corl_commit": jax_commit,
    }


def text_of(facts: dict[str, Any]) -> str:
    """The table, and below it what all rows share."""
    processor = facts["machine"]["processor"]
    settings = ", ".join(f"{k} {v}" for k, v in facts["settings"].items())
    packages = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    return (
        f"{table(facts['runs'])}\n\n"
        f"{facts['task']}, {facts['dataset']['label']}; {settings}; {processor}, "
        f"{facts['cores']} cores for each process; {packages}; commit {facts['commit']}, "
        f"CORL {facts['upstream_commit']}, JAX-CORL {facts['jax_corl_commit']}. The ratio is "
        "upstream's seconds by those of the row. CORL and JAX-CORL use as many threads as their "
        "libraries choose.\n"
    )


def parser() -> arguments.Parser:
    """The command line."""
    count = arguments.number(int, "[1, 1e9]")
    found = arguments.Parser(description=__doc__.split("\n")[0])
    found.add_argument("--corl", type=arguments.path, help="a CORL checkout")
    found.add_argument("--jax_corl", type=arguments.path, help="a JAX-CORL checkout")
    found.add_argument(
        "--jax_python",
        type=arguments.path,
        help="a Python with jax, flax, optax, distrax",
    )
    found.add_argument("--offline", type=count, default=20_000, help="updates")
    found.add_argument("--online", type=count, default=5_000, help="environment steps")
    found.add_argument("--eval_freq", type=count, default=5_000)
    found.add_argument("--n_episodes", type=count, default=10)
    found.add_argument("--seed", type=arguments.number(int, arguments.SEED), default=0)
    found.add_argument("--rounds", type=count, default=1)
    found.add_argument("--cores", type=count, help="that each run may use; default: all")
    found.add_argument(
        "--compile",
        choices=("auto", "true"),
        default="auto",
        help="true: ours compile, also where the run is too short to repay it",
    )
    found.add_argument(
        "--behavior_updates", type=count, help="of DARE-IQL; default: the preset's"
    )
    found.add_argument("--dataset_path", type=arguments.path, help="default: as a run's")
    found.add_argument("--out", type=arguments.path, help="write FILE.json and FILE.txt")
    return found


def main() -> None:
    args = parser().parse_args()
    for path, file in (
        (args.corl, "algorithms/finetune/iql.py"),
        (args.jax_corl, "algos/iql.py"),
    ):
        if path is not None and not (path / file).is_file():
            parser().error(f"{path} has no {file}")
    if (args.jax_corl is None) != (args.jax_python is None):
        parser().error("--jax_corl and --jax_python need each other")
    if args.jax_python is not None and not args.jax_python.is_file():
        parser().error(f"--jax_python {args.jax_python} is no program")
    if args.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    with arguments.errors_in_one_line():
        plan = Plan(args, sources.resolve(TASK, path=args.dataset_path))

        def save(results: dict[str, Any]) -> None:
            if args.out is not None:
                facts = record(plan, results)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps(facts, indent=2, allow_nan=False) + "\n"
                args.out.write_text(text)
                args.out.with_suffix(".txt").write_text(text_of(facts))

        results: dict[str, Any] = {}

        def keep(found: dict[str, Any]) -> None:
            results.update(found)
            save(found)

        measure(plan, keep)
        print(text_of(record(plan, results)))


if __name__ == "__main__":
    main()
