"""Are the versions that pyproject.toml allows really enough? The lowest and the newest are tried.

    python scripts/check_bounds.py                                # or: make bounds
    python scripts/check_bounds.py lowest --python python3.10     # one of them, another Python
    python scripts/check_bounds.py lowest -- tests/test_antmaze.py

Each set of versions gets a virtual environment of its own, with the test tools, and runs the
tests that touch the requirements most. `lowest` installs what stands behind each `>=` of the
dependencies, `newest` what pip finds. pip reads its own variables, such as PIP_CONSTRAINT and
PIP_EXTRA_INDEX_URL, which can name a smaller build of torch. An environment has some gigabytes;
it is deleted at the end unless `--work` names a folder for it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Test tools do not belong to what is installed by users, so any version will do.
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "setuptools")
# Environments, datasets, files, networks, whole runs.
TESTS = (
    *("tests/test_envs.py", "tests/test_antmaze.py"),
    *("tests/test_datasets.py", "tests/test_files.py", "tests/test_config.py"),
    *("tests/test_checkpoints.py", "tests/test_behavior.py", "tests/test_iql.py"),
    *("tests/test_cql.py", "tests/test_hook.py", "tests/test_runs.py"),
    *("tests/test_wiring_dare.py", "tests/faults"),
)


def dependencies() -> list[str]:
    """The requirements of pyproject.toml, without its optional groups."""
    text = (ROOT / "pyproject.toml").read_text()
    # Python 3.10 has no reader of TOML.
    found = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)
    assert found is not None, "pyproject.toml has no list of dependencies"
    return re.findall(r'"([^"]+)"', found.group(1))


def lowest(requirement: str) -> str:
    """`name[extra]>=1.2,<3` -> `name[extra]==1.2`.

    Raises:
        ValueError: it has no lower bound.
    """
    found = re.fullmatch(r"([\w.-]+(?:\[[\w,-]+\])?)>=([\w.]+)(,.*)?", requirement)
    if found is None:
        raise ValueError(f"{requirement} in pyproject.toml has no lower bound")
    return f"{found.group(1)}=={found.group(2)}"


def check(which: str, python: str, folder: Path, tests: list[str]) -> bool:
    """Make the environment of a set of versions and run the tests in it; did all pass?"""
    wanted = dependencies()
    if which == "lowest":
        wanted = [lowest(requirement) for requirement in wanted]
    print(f"\n{which}: {', '.join(wanted)}", flush=True)
    subprocess.run([python, "-m", "venv", folder], check=True)
    own = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    pip = [own, "-m", "pip", "--disable-pip-version-check"]
    installed = subprocess.run([*pip, "install", "--quiet", *wanted, *TOOLS])
    if installed.returncode:
        print(f"{which}: these versions cannot be installed together")
        return False
    subprocess.run([*pip, "list"], check=True)
    tests = tests or [name for name in TESTS if (ROOT / name).exists()]
    # The packages of this checkout, whatever else is installed.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([own, "-m", "pytest", *tests], cwd=ROOT, env=variables)
    return done.returncode == 0


def main() -> None:
    """The command line that the top of this file shows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("which", nargs="?", choices=("lowest", "newest"))
    parser.add_argument("--python", default=sys.executable, help="default: this one")
    parser.add_argument("--work", type=Path, help="folder of environments, kept")
    parser.epilog = "What stands after -- goes to pytest, in place of a choice of tests."
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args, tests = parser.parse_args(words[:cut]), words[cut + 1 :]
    sets = (args.which,) if args.which else ("lowest", "newest")
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        passed = {s: check(s, args.python, work / s, tests) for s in sets}
    for name, good in passed.items():
        print(f"{name} versions on {args.python}: {'passed' if good else 'FAILED'}")
    raise SystemExit(not all(passed.values()))


if __name__ == "__main__":
    main()
