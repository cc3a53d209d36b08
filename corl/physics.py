"""MuJoCo's state, saved and put back bit for bit, and D4RL's contact margins."""

from typing import Any

import gymnasium as gym
import numpy as np


def restore_contact_margin(model: Any) -> None:
    """Give a model (changed in place) D4RL's contact margins on every MuJoCo.

    From 3.5 on the margin of a pair of geoms is the sum of both margins instead of the larger
    one, so they are halved there.
    """
    import mujoco

    if tuple(int(v) for v in mujoco.__version__.split(".")[:2]) >= (3, 5):
        model.geom_margin[:] *= 0.5


def of_mujoco(model: Any, data: Any) -> np.ndarray:
    """MuJoCo's full state (N,), with the warm start of the solver that the next step reads."""
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, spec))
    mujoco.mj_getState(model, data, state, spec)
    return state


def put_into_mujoco(model: Any, data: Any, state: np.ndarray) -> None:
    """Go on from a state of `of_mujoco`."""
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    mujoco.mj_setState(model, data, state, spec)
    # Derived quantities (xpos, sensor data) are functions of the state. Some MuJoCo
    # versions write a fresh warm start in forward, so the saved one is put back.
    mujoco.mj_forward(model, data)
    mujoco.mj_setState(model, data, state, spec)


def get_state(env: gym.Env, exact: bool = True) -> dict[str, Any]:
    """Everything that decides the environment's future, as plain arrays and numbers.

    It holds the physics, the elapsed steps of the time limit and the generators of resets and of
    the action space. The physics are MuJoCo's full state; an environment of another kind answers
    with its own `get_state`.

    Args:
        env: the environment.
        exact: else the physics of an environment that has no `get_state` are None, unless it is
            gymnasium's: what another one remembers beside MuJoCo's state (goals, tasks that are
            done, places that a reset draws into the model) is unknown.

    Raises:
        TypeError: the environment has neither, and the state is to be exact.
    """
    base: Any = env.unwrapped
    physics: Any = None
    if hasattr(base, "get_state"):
        physics = base.get_state()
    elif _is_its_mujoco(base, exact):
        physics = of_mujoco(base.model, base.data)
    elif exact:
        raise TypeError(
            f"{type(base).__name__} has no state to save; exact resume needs the "
            "gymnasium backend"
        )
    return {
        "physics": physics,
        "elapsed_steps": env.get_wrapper_attr("_elapsed_steps"),
        "generator": base.np_random.bit_generator.state,
        "action_space": env.action_space.np_random.bit_generator.state,
    }


def _is_its_mujoco(base: Any, exact: bool) -> bool:
    """Is the state of MuJoCo all that an environment knows?"""
    own = type(base).__module__.startswith("gymnasium.envs.mujoco.")
    return (own or exact) and hasattr(base, "model") and hasattr(base, "data")


def set_state(env: gym.Env, state: dict[str, Any]) -> bool:
    """Put an environment into a state of `get_state`; the next steps are bit-identical.

    False where the physics are not known: a reset is due.
    """
    env.reset()
    base: Any = env.unwrapped
    known = state["physics"] is not None
    if not known:
        pass
    elif hasattr(base, "set_state") and hasattr(base, "get_state"):
        base.set_state(state["physics"])
    else:
        put_into_mujoco(base.model, base.data, state["physics"])
    wrapper: Any = env
    while not isinstance(wrapper, gym.wrappers.TimeLimit):
        wrapper = wrapper.env
    wrapper._elapsed_steps = state["elapsed_steps"]
    base.np_random.bit_generator.state = state["generator"]
    env.action_space.np_random.bit_generator.state = state["action_space"]
    return known
