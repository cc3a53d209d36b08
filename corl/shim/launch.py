"""Puts the stand-ins on the path, runs a script, and takes them away again."""

import importlib
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gymnasium

from corl.shim.options import NAMES, PACKAGES, VARIABLE, Options, Unavailable


def _taken(names: Sequence[str]) -> dict[str, Any]:
    """Modules of these packages, taken out of `sys.modules`."""
    found = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in found}


@contextmanager
def without_stand_ins() -> Iterator[None]:
    """Inside, packages that look for the real gym or d4rl do not find the stand-ins."""
    hidden, path = _taken(NAMES), list(sys.path)
    sys.path[:] = [entry for entry in path if entry != str(PACKAGES)]
    try:
        yield
    finally:
        _taken(NAMES)
        sys.path[:] = path
        sys.modules.update(hidden)


@contextmanager
def _variables(**values: str) -> Iterator[None]:
    """Inside, environment variables have these values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def installed(options: Options | None = None) -> Iterator[dict[str, Any]]:
    """Inside, `import gym`, `import d4rl` and `import wandb` give the stand-ins.

    Processes that start inside have them too. Yields the last values that were logged.
    """
    # Here, because torch takes seconds and workers with an environment do without.
    from corl.shim import patches

    options = options or Options()
    path = os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH")]))
    with ExitStack() as stack:
        stack.enter_context(
            _variables(**{VARIABLE: options.variable(), "PYTHONPATH": path})
        )
        before, search = _taken(NAMES), list(sys.path)
        known = dict(gymnasium.registry)
        try:
            sys.path.insert(0, str(PACKAGES))
            if options.log is not None:
                Path(options.log).parent.mkdir(parents=True, exist_ok=True)
                Path(options.log).write_text("")
            stack.enter_context(patches.applied(options))
            yield importlib.import_module("wandb").summary
        finally:
            _taken(NAMES)
            gymnasium.registry.update(known)
            sys.path[:] = search
            sys.modules.update(before)


@contextmanager
def _as_program(first: str, argv: Sequence[str]) -> Iterator[None]:
    """Inside, `sys.argv` and the search path are those of a script that Python itself starts.

    Our own root leaves the path, so that our `algorithms/` and `experiments/` never answer for
    the script's; `corl` is imported already.
    """
    before, ours = sys.argv, Path(__file__).resolve().parents[2]
    asked = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    # `python -m corl.shim` itself has put the current folder first.
    hidden = {"", str(Path.cwd())} - {os.path.abspath(p) for p in asked} | {
        str(PACKAGES)
    }
    if ours.name not in ("site-packages", "dist-packages"):
        hidden.add(str(ours))
    kept = [entry for entry in sys.path if entry not in hidden]
    sys.argv = list(argv)
    sys.path[:] = [str(PACKAGES), first, *kept]
    try:
        yield
    finally:
        sys.argv = before


def run_file(
    file: Path | str, arguments: Sequence[str] = (), options: Options | None = None
) -> dict[str, Any]:
    """Run a script as the main program; the last values that it logged.

    Args:
        file: the script; its folder stands first on the path.
        arguments: its command line.
        options: what the stand-ins are to do.

    Raises:
        Unavailable: the script, an environment or its data cannot be had here.
    """
    if not Path(file).is_file():
        raise Unavailable(f"{file} does not exist; give the path of a script")
    folder = str(Path(file).resolve().parent)
    with installed(options) as summary, _as_program(folder, [str(file), *arguments]):
        runpy.run_path(str(file), run_name="__main__")
    return summary


def run_module(
    name: str, arguments: Sequence[str] = (), options: Options | None = None
) -> dict[str, Any]:
    """`python -m NAME` with the stand-ins; the current folder stands first on the path.

    Raises:
        Unavailable: there is no such module, or as of `run_file`.
    """
    here = str(Path.cwd())
    with installed(options) as summary, _as_program(here, [name, *arguments]):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise Unavailable(
                f"there is no module {name}; start in the folder that has it"
            )
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    return summary
