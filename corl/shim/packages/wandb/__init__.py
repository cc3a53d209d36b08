"""Stand-in for wandb: no account; what is logged goes to a file of JSON lines.

Every `log` call becomes one line: the values and, as `_step`, the step. A name that is not here
does nothing, whatever is done with it.
"""

import argparse
import dataclasses
import importlib.abc
import importlib.machinery
import json
import math
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import _shim_path  # noqa: F401  (first: it finds corl)

from corl import files
from corl.shim.options import current


class Nothing:
    """Answers a name of wandb that the shim has not: it can be called, entered, asked, indexed."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *args: Any, **keywords: Any) -> "Nothing":
        return self

    def __getattr__(self, name: str) -> "Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(f"{self._name}.{name}")

    def __getitem__(self, key: Any) -> "Nothing":
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __instancecheck__(self, value: Any) -> bool:
        return False

    def __mro_entries__(self, bases: Any) -> tuple:
        # So that a class may be derived from it.
        return ()

    def __fspath__(self) -> str:
        return self._name

    def __repr__(self) -> str:
        return self._name


class Config(dict):
    """wandb's configuration: keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the configuration has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def update(self, values: Any = None, **options: Any) -> None:  # type: ignore[override]
        """Take a configuration of any kind over; wandb's own options are not needed here."""
        options.pop("allow_val_change", None)
        super().update(as_dict(values), **options)

    setdefaults = update

    def as_dict(self) -> dict[str, Any]:
        """A copy."""
        return dict(self)


def as_dict(values: Any) -> dict[str, Any]:
    """A configuration as a dict: dict, Namespace, dataclass, absl's flags, a ConfigDict."""
    if values is None:
        return {}
    if isinstance(values, Mapping):
        return dict(values)
    if isinstance(values, argparse.Namespace):
        return dict(vars(values))
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        return {f.name: getattr(values, f.name) for f in dataclasses.fields(values)}
    for method in ("flag_values_dict", "to_dict", "model_dump"):
        if callable(getattr(values, method, None)):
            return dict(getattr(values, method)())
    return dict(getattr(values, "__dict__", {}))


class Run:
    """What `wandb.init` gives; other names of it do nothing."""

    def __init__(self) -> None:
        self.config, self.summary = config, summary
        self.name: Any = "shim"
        self.id: Any = "shim"
        self.project: Any = "shim"
        self.group: Any = None
        self.mode, self.disabled, self.step, self.url = "disabled", False, 0, ""
        self._dir = ""

    @property
    def dir(self) -> str:
        """A folder for files, which is made when it is first asked for."""
        self._dir = self._dir or tempfile.mkdtemp(prefix="wandb-")
        return self._dir

    def log(
        self, data: Any = None, step: Any = None, commit: Any = None, **options: Any
    ) -> None:
        """One line of the file, and the last values in `summary`."""
        data = as_dict(data)
        summary.update(data)
        self.step = self.step + 1 if step is None else step
        if (path := current().log) is None:
            return
        line = json.dumps(_plain({"_step": step, **data}), allow_nan=False)
        with files.writing(path), open(path, "a") as file:
            file.write(line + "\n")

    def finish(self, *args: Any, **options: Any) -> None:
        """Nothing is left to do."""

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(f"wandb.run.{name}")


def _plain(value: Any) -> Any:
    """Values as JSON has them.

    Numpy and torch values are numbers, one that is not finite is null, anything else is text.
    """
    if hasattr(value, "tolist") and not isinstance(value, Nothing):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | None) else str(value)


config: Any = Config()
# Last value of every key.
summary: dict[str, Any] = Config()
run: Run | None = None
__version__ = "0.16.0"


def init(
    project: Any = None,
    config: Any = None,
    name: Any = None,
    id: Any = None,
    group: Any = None,
    **options: Any,
) -> Run:
    """Begin a run: takes configuration and names over."""
    global run
    run = Run()
    run.config.update(config)
    run.project = project or run.project
    run.name, run.group = name or run.name, group
    run.id = id or run.id
    return run


def log(data: Any = None, step: Any = None, commit: Any = None, **options: Any) -> None:
    """`Run.log` of the run, or of none."""
    (run or Run()).log(data, step)


def finish(*args: Any, **options: Any) -> None:
    """End the run."""
    global run
    run = None


class Error(Exception):
    """wandb's errors, which are never raised here."""


class Settings(dict):
    """Options of a run; none of them is needed here."""


class _Silent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every submodule of wandb; what is asked of it is `Nothing`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A module for every name below wandb."""
        ours = sys.modules.get(__name__) is _HERE
        if not ours or not name.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        """Let the module answer every name."""
        base = module.__name__
        vars(module).update(Error=Error, CommError=Error, UsageError=Error)

        def answer(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return Nothing(f"{base}.{name}")

        vars(module)["__getattr__"] = answer


_HERE = sys.modules[__name__]
sys.meta_path.append(_Silent())


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name in ("errors", "sdk", "util", "plot", "integration"):
        return importlib.import_module(f"{__name__}.{name}")
    return Nothing(f"wandb.{name}")
