"""Put one-line mistakes into the code, one at a time, and see whether a test fails.

    python scripts/mutants.py                          # all of them: hours
    python scripts/mutants.py --sample 120 --seed 0    # some, by lot
    python scripts/mutants.py --only switch            # a group, or those that hold this text
    python scripts/mutants.py --quick                  # with the likeliest tests alone
    python scripts/mutants.py --after OUTPUT           # what OUTPUT does not say was caught

Each mistake is made in a copy of the tracked files in a temporary folder. Tests run in stages
until one fails: those that most likely see the mistake, further files that the mistake's group
names, all wiring tests. A mistake whose text is in none of its files is reported as `not found` and
counts as not caught: then the code has moved, and the table, `mutant_table.py`, has to follow.
"""

import argparse
import importlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path

import pytest
from mutant_table import GROUPS, TESTS_OF, Group, Mutant

ROOT = Path(__file__).parent.parent
# The slow instances, too: a mistake may stand in any algorithm.
WIRING = ["--all-faults", "tests/test_wiring.py", "tests/test_wiring_dare.py"]
WIRING += ["tests/test_kills.py"]
# Imported before the tests are forked off: what is slow and not under test.
PRELOADED = (
    *("numpy", "torch", "torch.distributions", "torch._dynamo", "gymnasium", "yaml"),
    *(
        "hypothesis",
        "pyrallis",
        "safetensors.torch",
        "matplotlib.figure",
        "tqdm",
        "h5py",
    ),
)


def tracked(root: Path) -> list[str]:
    """The repository's files, tracked or new, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (root / name).is_file()]


def copy_tree(target: Path) -> list[str]:
    """Copy what tests read; results are large and not needed."""
    names = [n for n in tracked(ROOT) if not n.startswith(("results/", "docs/"))]
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path)
    return names


def find(mutant: Mutant, names: list[str], root: Path) -> str | None:
    """The first file that has the text."""
    for glob in mutant.files.split():
        for name in sorted(names):
            if fnmatch(name, glob) and mutant.old in (root / name).read_text():
                return name
    return None


def preload() -> None:
    """Import what is slow and not under test, so that a forked child has it."""
    for name in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)


def run_tests(root: Path, arguments: list[str]) -> str | None:
    """The first failing test, None when all pass. Runs in a fork of this process."""
    output = root / "pytest.txt"
    child = os.fork()
    if child == 0:
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(root)
        sys.path[:] = [
            str(root),
            *(p for p in sys.path if Path(p or ".").resolve() != ROOT),
        ]
        os.environ.update(PYTHONPATH=str(root), OMP_NUM_THREADS="1")
        options = ["-n", "0", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
        code = pytest.main([*options, *arguments])
        sys.stdout.flush()
        os._exit(int(code))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (0, 5):  # 5: no test was chosen
        return None
    lines = output.read_text().splitlines()
    lines = [x for x in lines if x.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0].split(" ", 1)[1] if lines else f"exit status {code}"


def stages(group: Group, name: str, tests: list[str], quick: bool) -> list[list[str]]:
    """Arguments of pytest, the quickest first; given tests replace all."""
    if tests:
        return [tests]
    algorithm = Path(name).stem if name.startswith("algorithms/") else group.of
    words = f"({group.first})"
    if algorithm:
        words += f" and {TESTS_OF[algorithm]}"
    cheap, more = group.cheap.split(), group.more.split()
    wiring = [*WIRING, "-k", words] if group.first else []
    found = [cheap, wiring, *([] if quick else [more, WIRING])]
    return [arguments for arguments in found if arguments]


def try_mutant(
    mutant: Mutant, name: str, root: Path, stages: list[list[str]]
) -> str | None:
    """The test that caught the mistake in its file."""
    path = root / name
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new, 1))
    try:
        for arguments in stages:
            failed = run_tests(root, arguments)
            if failed:
                return failed
        return None
    finally:
        path.write_text(text)


def describe(mutant: Mutant, name: str) -> str:
    old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
    return f"{name}: `{old[:60]}` -> `{new[:60]}`"


def work(
    share: list[tuple[Group, Mutant]],
    root: Path,
    tests: list[str],
    quick: bool,
    known: set[str],
) -> list[tuple[str, str]]:
    """(what became of it, description) of each mistake of this worker's share."""
    names, results = copy_tree(root), []
    for group, mutant in share:
        name = find(mutant, names, root)
        if name is None:
            results.append(("not found", describe(mutant, mutant.files)))
            continue
        if describe(mutant, name) in known:
            results.append(("caught", describe(mutant, name)))
            continue
        start = time.time()
        test = try_mutant(mutant, name, root, stages(group, name, tests, quick))
        results.append(("caught" if test else "survived", describe(mutant, name)))
        print(f"{results[-1][0]}: {results[-1][1]}", flush=True)
        print(f"    {time.time() - start:.0f} s, by {test}", flush=True)
    return results


def choose(only: str, sample: int | None, seed: int) -> list[tuple[Group, Mutant]]:
    """The mistakes to try: of the group `only`, or those that hold this text; some by lot."""
    chosen = [
        (group, mutant)
        for name, group in GROUPS.items()
        for mutant in group.mutants
        if only == name or (only not in GROUPS and only in " ".join(mutant))
    ]
    if sample is not None and sample < len(chosen):
        chosen = random.Random(seed).sample(chosen, sample)
    return chosen


def caught_before(output: Path | None) -> set[str]:
    """Descriptions of the mistakes that an earlier output says were caught."""
    lines = output.read_text().splitlines() if output else []
    return {
        line.removeprefix("caught: ") for line in lines if line.startswith("caught: ")
    }


def try_all(
    chosen: list[tuple[Group, Mutant]], arguments: argparse.Namespace
) -> list[tuple[str, str]]:
    """(what became of it, description) of each mistake.

    Raises:
        SystemExit: a test fails without any mistake.
    """
    known = caught_before(arguments.after)
    jobs, given = arguments.jobs, (arguments.tests, arguments.quick, known)
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.unchecked:
            copy_tree(Path(folder) / "whole")
            groups = [group for group, _ in chosen]
            more = {t for g in groups for t in f"{g.cheap} {g.more}".split()}
            tests = arguments.tests or [*WIRING, *sorted(more)]
            failed = run_tests(Path(folder) / "whole", tests)
            if failed:
                raise SystemExit(f"a test fails without any mistake: {failed}")
        shares = [(chosen[i::jobs], Path(folder) / str(i), *given) for i in range(jobs)]
        with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
            parts = pool.map(work, *zip(*shares, strict=True))
            return [result for part in parts for result in part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help="files or ids; default: in stages")
    parser.add_argument(
        "--only", default="", help="a group, or those that hold this text"
    )
    parser.add_argument("--sample", type=int, help="so many of them, by lot")
    parser.add_argument("--seed", type=int, default=0, help="of the lot")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--after", type=Path, help="earlier output; what it caught counts as caught"
    )
    parser.add_argument("--quick", action="store_true", help="the first stage alone")
    parser.add_argument(
        "--unchecked", action="store_true", help="no run without mistake"
    )
    arguments = parser.parse_args()
    if min(arguments.jobs, arguments.sample or 1) < 1:
        parser.error("--sample and --jobs must be at least 1")
    if arguments.after and not arguments.after.is_file():
        parser.error(f"--after {arguments.after} does not exist")
    chosen = choose(arguments.only, arguments.sample, arguments.seed)
    preload()
    start = time.time()
    results = try_all(chosen, arguments)
    caught = sum(kind == "caught" for kind, _ in results)
    seconds = time.time() - start
    total = sum(len(group.mutants) for group in GROUPS.values())
    print(
        f"\ncaught {caught} of {len(results)} in {seconds:.0f} s (the table has {total})"
    )
    for kind, line in results:
        if kind != "caught":
            print(f"{kind}: {line}")
    raise SystemExit(caught < len(results))


if __name__ == "__main__":
    main()
