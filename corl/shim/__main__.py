"""The command line of the shim: `python -m corl.shim [OPTIONS] SCRIPT|-m MODULE ...`."""

import re
import sys
from collections.abc import Sequence

from corl import arguments
from corl.data import sources
from corl.shim import launch
from corl.shim.options import APIS, NAMES, Options, Unavailable


def parser() -> arguments.Parser:
    """The shim's own options; none of them may be abbreviated."""
    made = arguments.Parser(
        prog="python -m corl.shim",
        usage="%(prog)s [OPTIONS] SCRIPT|-m MODULE [ARGUMENTS OF THE SCRIPT]",
        description="Run somebody's unmodified script. Options stand before the script.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--dataset_source", dest="source", choices=sources.SOURCES, default="auto")
    add("--dataset_path", dest="path", help="HDF5 file, or minari:ID")
    rows = "rows of data that has to be collected"
    add("--dataset_rows", dest="rows", type=arguments.number(int, "[2, 1e8]"), help=rows)
    add("--log", help="file for everything the script logs, JSON lines")
    api = "0.23 (default): step() gives 4 values; 0.26: it gives 5, reset() gives 2"
    add("--gym-api", choices=APIS, default="0.23", help=api)
    add("--cuda-is-cpu", action="store_true", help="what goes to CUDA stays on the CPU")
    old = "names are there again that {} has removed"
    add("--old-python", action="store_true", help=old.format("Python's `collections`"))
    add("--old-numpy", action="store_true", help=old.format("numpy"))
    add("--old-jax", action="store_true", help=old.format("JAX"))
    return made


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The shim's options, and the script or `-m MODULE` with all that follows.

    So a flag of the script is never taken for one of the shim.
    """
    flags = ("--cuda-is-cpu", "--old-python", "--old-numpy", "--old-jax", "--help", "-h")
    place = 0
    while place < len(argv) and argv[place].startswith("-") and argv[place] != "-m":
        alone = argv[place] in flags or "=" in argv[place]
        place += 1 if alone else 2
    return list(argv[:place]), list(argv[place:])


def lacking(error: ImportError) -> str | None:
    """The name that a stand-in does not have, as `gym.GoalEnv`; None for other packages."""
    found = re.search(r"cannot import name '(\w+)' from '([\w.]+)'", str(error))
    name = f"{found[2]}.{found[1]}" if found else str(error.name)
    return name if name.partition(".")[0] in NAMES else None


def main(argv: Sequence[str] | None = None) -> None:
    """The command line that the package's docstring shows."""
    own, rest = split(sys.argv[1:] if argv is None else argv)
    reader = parser()
    options = Options(**vars(reader.parse_args(own)))
    if not rest or rest == ["-m"]:
        reader.error("give the file of a script, or -m and a module")
    try:
        if rest[0] == "-m":
            summary = launch.run_module(rest[1], rest[2:], options)
        else:
            summary = launch.run_file(rest[0], rest[1:], options)
    except Unavailable as error:
        raise SystemExit(f"error: {error}") from error
    except ImportError as error:
        if (name := lacking(error)) is None:
            raise
        raise SystemExit(f"error: the shim does not provide {name}") from error
    for key, value in summary.items():
        if "score" in key:
            print(f"last {key}: {value}")


if __name__ == "__main__":
    main()
