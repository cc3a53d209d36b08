"""Stand-in for OpenAI's gym 0.23, on gymnasium and on `corl.envs`; see `corl.shim`."""

import _shim_path  # noqa: F401  (first: it finds corl)
from _shim_names import alias, missing

error = alias("gym.error", "gymnasium.error")
spaces = alias("gym.spaces", "gymnasium.spaces")

from gymnasium.spaces import Space  # noqa: E402

from gym import core, envs, logger, utils, vector, version, wrappers  # noqa: E402
from gym.core import (  # noqa: E402
    ActionWrapper,
    Env,
    ObservationWrapper,
    RewardWrapper,
    Wrapper,
)
from gym.envs.registration import (  # noqa: E402
    load,
    make,
    register,
    registry,
    spec,
)

__version__ = version.VERSION
__all__ = [
    "ActionWrapper",
    "Env",
    "ObservationWrapper",
    "RewardWrapper",
    "Space",
    "Wrapper",
    "core",
    "envs",
    "error",
    "load",
    "logger",
    "make",
    "register",
    "registry",
    "spaces",
    "spec",
    "utils",
    "vector",
    "version",
    "wrappers",
]
__getattr__ = missing("gym")
