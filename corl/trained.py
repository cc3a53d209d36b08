"""The policies of a run: as the online phase found it, and as it is at the last checkpoint.

`keep_at_switch` writes the first of them into the run folder before the first online step, since
`checkpoint.pt` is overwritten from then on. `read` brings both back, without the dataset; of a run
that has not come so far, only the last one.
"""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from corl import checkpoints, files, fits
from corl.config import parse_config
from corl.layers import ConfigError

AT_SWITCH = "policy_at_switch.safetensors"
# The algorithm files of a clone of the repository.
ALGORITHMS = Path(__file__).parent.parent / "algorithms"


class TrainedRun(NamedTuple):
    """Two policies of a run, on the CPU, that read states (state - mean) / std.

    Attributes:
        config: of the run.
        step: iterations behind the last checkpoint.
        before: the policy at the switch; None in a run that has not come so far.
        after: the policy of the last checkpoint.
        mean, std: (S,), or (1,) where states are not normalized.
    """

    config: Any
    step: int
    before: Any
    after: Any
    mean: np.ndarray
    std: np.ndarray


def acting(trainer: Any) -> Any:
    """The policy of a trainer that acts online: of several what they are together."""
    return getattr(trainer, "composite", trainer.actor)


def keep_at_switch(
    folder: Path, actor: torch.nn.Module, mean: np.ndarray, std: np.ndarray
) -> None:
    """Write the policy that the online phase begins with, and the normalization of its states.

    Raises:
        CannotWrite: as of `files.replacing`.
    """
    # Copies: networks of several seeds, and parts that stand in two places, share their memory.
    weights = {
        f"policy.{name}": tensor.detach().cpu().contiguous().clone()
        for name, tensor in actor.state_dict().items()
    }
    states = {"state_mean": mean, "state_std": std}
    arrays = {k: torch.from_numpy(np.array(v, order="C")) for k, v in states.items()}
    with files.replacing(folder / AT_SWITCH) as file:
        file.write(save({**weights, **arrays}))


def read(folder: Path, file: Path | None = None) -> TrainedRun:
    """Both policies of a run folder.

    Args:
        folder: of a run that has a checkpoint.
        file: its algorithm file; default: that of this clone.

    Raises:
        ValueError: a file is missing or damaged, or does not fit.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no checkpoint.pt: name the folder of a run that has saved one"
        )
    state = checkpoints.read(path)
    name = state.get("algorithm") if isinstance(state, dict) else None
    module = load_program(file or _algorithm_file(path, name))
    state = checkpoints.load_checkpoint(path, (file.stem if file else None) or str(name))
    fits.check_layout(state, path)
    given = ["--config", str(folder / "config.yaml")]
    config = parse_config(module.TrainConfig, given)
    # Compiled updates would take a minute, and there is none.
    config = dataclasses.replace(config, compile=False, device="cpu")
    trainer, step = _trainer(module, config), state["step"]
    fits.load_part(trainer, state["parts"].get("trainer"), path, "trainer")
    # What acts online is not ready before.
    online = step > config.offline_iterations
    after = (acting(trainer) if online else trainer.actor).eval()
    if (folder / AT_SWITCH).is_file():
        before, mean, std = _at_switch(folder / AT_SWITCH, _trainer(module, config))
        return TrainedRun(config, step, before, after, mean, std)
    if state.get("states") is None:
        raise ValueError(
            f"{folder} has no {AT_SWITCH}, and an older version wrote its checkpoint.pt, which "
            "does not say how states are normalized; go on with --resume, or run it again"
        )
    with fits.fitting(path, "states"):
        mean, std = checkpoints.unpack(state["states"])
    return TrainedRun(config, step, None, after, mean, std)


def _at_switch(file: Path, trainer: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """The policy of `keep_at_switch`, in a trainer of the run, and mean and std of the states."""
    try:
        kept = load_file(file)
        mean, std = kept.pop("state_mean").numpy(), kept.pop("state_std").numpy()
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{file} is damaged ({error})") from None
    weights = {name.removeprefix("policy."): tensor for name, tensor in kept.items()}
    with fits.fitting(file, "policy"):
        acting(trainer).load_state_dict(weights)
    return acting(trainer).eval(), mean, std


def _trainer(module: ModuleType, config: Any) -> Any:
    from corl import envs

    task = envs.task_of(config)
    space: Any = envs.make(task, config.env_backend).action_space
    sizes = task.state_dim, task.action_dim, float(space.high[0])
    return module.make_trainer(config, *sizes, "cpu")


def _algorithm_file(source: Path, name: Any) -> Path:
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ValueError(f"{source} is not a checkpoint of a corl-dare run")
    file = ALGORITHMS / f"{name}.py"
    if not file.is_file():
        raise ValueError(
            f"{source} is of a run of {name}.py, which is not in {ALGORITHMS}; name that file "
            "with --algorithm"
        )
    return file


def load_program(file: Path) -> ModuleType:
    """The module of an algorithm file.

    Raises:
        ConfigError: it cannot be imported, or it is no algorithm.
    """
    name = "algorithm_file_" + re.sub(r"\W", "_", str(file.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or file.suffix != ".py":
        raise ConfigError(f"algorithm {file} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    # A file without a main guard may end the program.
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"algorithm {file} cannot be imported: {text[:300]}; mend that file"
        ) from None
    if not dataclasses.is_dataclass(getattr(module, "TrainConfig", None)):
        raise ConfigError(f"{file} is no algorithm: it has no TrainConfig")
    return module
