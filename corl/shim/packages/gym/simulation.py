"""mujoco_py's simulation and its names, on today's MuJoCo."""

from typing import Any

import mujoco
import numpy as np

from corl.shim.options import Unavailable


class Data:
    """MuJoCo's data with mujoco_py's names: `body_xpos` is MuJoCo's `xpos`."""

    def __init__(self, data: Any):
        vars(self)["_data"] = data

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        data = self._data
        return getattr(data, name if hasattr(data, name) else name.removeprefix("body_"))

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._data, name, value)

    def get_body_xpos(self, name: str) -> np.ndarray:
        """Position (3,) of a body."""
        return self._data.body(name).xpos

    def get_site_xpos(self, name: str) -> np.ndarray:
        """Position (3,) of a site."""
        return self._data.site(name).xpos


class Model:
    """MuJoCo's model with mujoco_py's look-ups, `site_name2id` and the like."""

    def __init__(self, model: Any):
        vars(self)["_model"] = model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        model = self._model
        if name.endswith("_name2id"):
            return lambda text: getattr(model, name.removesuffix("_name2id"))(text).id
        return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._model, name, value)


class Simulation:
    """mujoco_py's `MjSim`, as far as scripts read it: state, model, data, pictures."""

    def __init__(self, model: Any, data: Any):
        self._model, self._data = model, data
        self.model, self.data = Model(model), Data(data)
        self._renderers: dict[tuple[int, int], Any] = {}

    def forward(self) -> None:
        """Compute what follows from positions and velocities."""
        mujoco.mj_forward(self._model, self._data)

    def step(self) -> None:
        """Simulate one of MuJoCo's time steps."""
        mujoco.mj_step(self._model, self._data)

    def reset(self) -> None:
        """Go back to the model's first state."""
        mujoco.mj_resetData(self._model, self._data)

    def get_state(self) -> "SimulationState":
        """Copies of time, positions and velocities."""
        data = self._data
        return SimulationState(data.time, data.qpos.copy(), data.qvel.copy())

    def set_state(self, state: "SimulationState") -> None:
        """Take a state of `get_state` over."""
        self._data.time = state.time
        self._data.qpos[:], self._data.qvel[:] = state.qpos, state.qvel

    def render(
        self,
        width: int = 256,
        height: int = 256,
        camera_name: str | None = None,
        camera_id: int | None = None,
        mode: str = "offscreen",
        depth: bool = False,
    ) -> np.ndarray:
        """A picture (height, width, 3) of bytes, its first row at the bottom as in mujoco_py."""
        if depth:
            raise Unavailable("the shim does not provide depth pictures")
        if (width, height) not in self._renderers:
            made = mujoco.Renderer(self._model, height=height, width=width)
            self._renderers[width, height] = made
        renderer = self._renderers[width, height]
        camera = camera_name if camera_name is not None else camera_id
        renderer.update_scene(self._data, camera=-1 if camera is None else camera)
        return renderer.render()[::-1]


class SimulationState:
    """mujoco_py's `MjSimState`."""

    def __init__(self, time: float, qpos: np.ndarray, qvel: np.ndarray):
        self.time, self.qpos, self.qvel = time, qpos, qvel
        self.act = None
        self.udd_state: dict[str, Any] = {}

    def flatten(self) -> np.ndarray:
        """Time, positions and velocities in one array."""
        return np.concatenate([[self.time], self.qpos, self.qvel])
