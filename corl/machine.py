"""Where a run runs: device, threads, versions, commit, processor; and how that is printed."""

import importlib.metadata
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import corl
from corl import commit
from corl.layers import ConfigError


def pick_device(name: str) -> str:
    """The device to run on: `cpu`, `cuda` or `cuda:N`.

    `auto` is cuda where there is one, else the cpu. Where a cuda device is asked for and there is
    none, a line says so and the cpu is taken.

    Raises:
        ConfigError: another name, or a number that no device has.
    """
    if name != "auto" and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        print(f"device {name}: no CUDA device here, running on the cpu")
        return "cpu"
    count = torch.cuda.device_count()
    if name.startswith("cuda:") and 0 < count <= int(name[5:]):
        raise ConfigError(
            f"device {name} is not here, the last one is cuda:{count - 1}; set device to one "
            "of those"
        )
    return name


def configure_threads(count: int) -> None:
    """Set the number of CPU threads that torch uses in one operation.

    Raises:
        ConfigError: less than 1.
    """
    if count < 1:
        raise ConfigError(f"threads must be at least 1, not {count}")
    torch.set_num_threads(count)


def memory(device: str = "cpu") -> int | None:
    """Bytes that a device has: free ones of a GPU, all of the machine or container otherwise.

    None where the system does not say.
    """
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    found = []
    with suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        # The word "max" stands for no limit.
        with suppress(OSError, ValueError):
            found.append(int(Path("/sys/fs/cgroup", limit).read_text()))
    return min(found, default=None)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers, by name.

    A package that is missing has the version `not installed`. That of `corl-dare` is the running
    code's, wherever it lies.
    """
    found = {"python": platform.python_version(), "corl-dare": corl.__version__}
    for package in ("torch", "numpy", "gymnasium", "mujoco"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str:
    """Commit of this code, with `+dirty` where tracked files differ from it, or `unknown`.

    In a checkout git tells it, in an installed package the record of its build.
    """
    found = commit.of_git(Path(__file__))
    return commit.of_build() if found == commit.UNKNOWN else found


def describe() -> dict[str, Any]:
    """Processor, cores and GPU (None without one); no names of hosts or users."""
    model = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
        if found := re.search(r"model name\s*:\s*(.+)", text):
            model = found.group(1)
    except OSError:
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": model, "cores": os.cpu_count(), "gpu": gpu}


def readable_time(seconds: float) -> str:
    """A duration for people: `45 s`, `12 min`, `3.4 h`, `2.1 days`."""
    for unit, size, digits in (("days", 86400, 1), ("h", 3600, 1), ("min", 60, 0)):
        if seconds >= size:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def tidy_path(path: Path | str) -> str:
    """A path to print and record: relative to the current folder, or with ~ for the home folder."""
    path = Path(path).absolute()
    for base, sign in ((Path.cwd(), ""), (Path.home(), "~/")):
        if path.is_relative_to(base):
            return f"{sign}{path.relative_to(base)}"
    return str(path)
