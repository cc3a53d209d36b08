"""Old gym's registry, and the classes of its environments as far as scripts import them."""

from _shim_names import alias, missing

classic_control = alias("gym.envs.classic_control", "gymnasium.envs.classic_control")

from gym.envs import mujoco, registration  # noqa: E402
from gym.envs.registration import make, register, registry, spec  # noqa: E402

__all__ = [
    "classic_control",
    "make",
    "mujoco",
    "register",
    "registration",
    "registry",
    "spec",
]
__getattr__ = missing("gym.envs")
