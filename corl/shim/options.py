"""What the stand-ins are to do, passed to a script's workers by an environment variable."""

import dataclasses
import json
import os
from pathlib import Path

# Where the packages lie that stand in for these.
PACKAGES = Path(__file__).resolve().parent / "packages"
NAMES = ("gym", "d4rl", "wandb", "mujoco_py", "mjrl", "mj_envs")
VARIABLE = "CORL_SHIM"
APIS = ("0.23", "0.26")


class Unavailable(ValueError):
    """Something that the script asks for cannot be had here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says; the defaults change nothing."""

    # `source`, `path` and `rows` of `corl.data.sources.resolve`.
    source: str = "auto"
    path: str | None = None
    rows: int | None = None
    # File for what the script logs; None keeps the last values only.
    log: str | None = None
    # "0.23": reset() gives the observation, step() four values. "0.26": reset() gives
    # (observation, info), step() five values.
    gym_api: str = "0.23"
    # Tensors that the script sends to CUDA stay on the CPU.
    cuda_is_cpu: bool = False
    # Names that Python 3.10, numpy 1.24, JAX 0.4.26 and later have removed are there again.
    old_python: bool = False
    old_numpy: bool = False
    old_jax: bool = False

    def variable(self) -> str:
        """The value of the environment variable."""
        return json.dumps(dataclasses.asdict(self))


def current() -> Options:
    """The options of this process; the defaults where none are set."""
    return Options(**json.loads(os.environ.get(VARIABLE, "{}")))
