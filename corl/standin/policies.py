"""The policies behind the stand-ins: their network, their files, and who makes which data.

The shipped ones lie in `weights/` with a manifest that says of each file which robot and level it
is, how it was trained and what its SHA-256 is.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from corl import files, finite, tasks
from corl.data import published

POLICY_DIR = Path(__file__).parent / "weights"  # shipped with the package
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
# What antmaze's walker reads and how many motors it moves.
FEATURES, ACTIONS = 27, 8
STAND_IN_ROWS = 200_000  # half a minute of hopper on one core
SINGLE = ("random", "medium", "expert")  # kinds of data that one policy makes

# Kind of data -> levels of the shipped policies that it needs.
LEVELS = {
    "random": (),
    "medium": ("medium",),
    "expert": ("expert",),
    "medium-expert": ("medium", "expert"),
    "medium-replay": ("series", "medium"),
    "full-replay": ("series",),
    **{kind: ("walker",) for kind in tasks.ANTMAZES},
}


class TanhGaussianPolicy(nn.Module):
    """a = tanh(mean(s) + std(s) * noise), from two hidden layers; actions in (-1, 1)."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int = 256):
        super().__init__()
        self.state_dim, self.action_dim = state_dim, action_dim
        self.net = nn.Sequential(
            nn.Linear(state_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, 2 * action_dim),
        )

    def forward(
        self, states: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, S), normal noise (B, A) -> actions (B, A), log-density (B,) in nats."""
        mean, log_std = self._mean_and_log_std(states)
        u = mean + log_std.exp() * noise
        return torch.tanh(u), _log_density(noise, log_std, u)

    def log_prob(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-density (B,) in nats of actions (B, A) in states (B, S).

        Actions on the bounds are moved inside, because their density is not finite.
        """
        inside = actions.clamp(-1 + 1e-6, 1 - 1e-6)
        return self.log_prob_of_tanh(states, torch.atanh(inside))

    def log_prob_of_tanh(self, states: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Log-density (B,) in nats of tanh(u), u (B, A): exact even where tanh rounds to 1."""
        mean, log_std = self._mean_and_log_std(states)
        return _log_density((u - mean) * (-log_std).exp(), log_std, u)

    def pre_tanh(self, states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The u (B, A) whose tanh `forward` returns for the same noise (B, A)."""
        mean, log_std = self._mean_and_log_std(states)
        return mean + log_std.exp() * noise

    def _mean_and_log_std(
        self, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(states).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


def _log_density(
    noise: torch.Tensor, log_std: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    """Log-density (B,) of tanh(u) for u = mean + std * noise; all arguments (B, A)."""
    normal = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    # log(1 - tanh(u)^2), in the form that does not overflow.
    jacobian = (2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))).sum(-1)
    return normal - jacobian


def save_policy(policy: TanhGaussianPolicy, path: Path, half: bool = False) -> None:
    """Write a policy as safetensors, rounded to float16 when `half`.

    Raises:
        ValueError: a weight is not finite, or not in float16.
    """
    dtype = torch.float16 if half else torch.float32
    tensors = {k: v.detach().cpu().to(dtype) for k, v in policy.state_dict().items()}
    _check_finite(tensors, path)
    with files.replacing(path) as file:
        file.write(save(tensors))


def load_policy(path: Path) -> TanhGaussianPolicy:
    """Read a policy of `save_policy` as float32, on the CPU, without gradients."""
    return _policy(load_file(path))


def save_series(policies: dict[int, TanhGaussianPolicy], path: Path) -> None:
    """Write the policies of several training steps as one float16 safetensors file.

    Raises:
        ValueError: as of `save_policy`.
    """
    tensors = {
        f"{step}/{key}": value.detach().cpu().half()
        for step, policy in policies.items()
        for key, value in policy.state_dict().items()
    }
    _check_finite(tensors, path)
    with files.replacing(path) as file:
        file.write(save(tensors))


def _check_finite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    if bad := finite.first_bad(tensors.items()):
        raise ValueError(
            f"{path} is not written: {bad} of the policy is not finite, since its training "
            "diverged; lower the learning rate or take an earlier snapshot"
        )


def load_series(path: Path) -> dict[int, TanhGaussianPolicy]:
    """Read a file of `save_series`: training step, ascending -> policy as of `load_policy`."""
    weights: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        step, _, name = key.partition("/")
        weights.setdefault(int(step), {})[name] = value
    return {step: _policy(weights[step]) for step in sorted(weights)}


def _policy(tensors: dict[str, torch.Tensor]) -> TanhGaussianPolicy:
    tensors = {k: v.float() for k, v in tensors.items()}
    hidden, state_dim = tensors["net.0.weight"].shape
    policy = TanhGaussianPolicy(state_dim, tensors["net.4.weight"].shape[0] // 2, hidden)
    policy.load_state_dict(tensors)
    return policy.requires_grad_(False)


class NotCollectable(ValueError):
    """The behavior policies that a task's stand-in needs are not shipped."""


@dataclass(frozen=True)
class Behavior:
    """A policy to roll out."""

    level: str
    # None draws actions uniformly from [-1, 1].
    policy: TanhGaussianPolicy | None = None
    # Digest of the policy's file.
    sha256: str = ""
    # Training steps behind the policy, if known.
    step: int | None = None


def kinds(robot: str) -> list[str]:
    """The kinds of data that the shipped policies can make for a robot."""
    known = tasks.ROBOTS[robot].kinds if robot in tasks.ROBOTS else ()
    there = {facts["level"] for facts in manifest().values() if facts["robot"] == robot}
    return [k for k, needed in LEVELS.items() if k in known and there.issuperset(needed)]


def fingerprint(task: tasks.Task | str) -> dict[str, str]:
    """Level -> SHA-256 of the shipped policies that a task's stand-in comes from.

    Raises:
        NotCollectable: no stand-in for this task; the message says what there is for its robot.
    """
    task = tasks.task(task)
    return {level: shipped(task.robot, level)[1]["sha256"] for level in levels_of(task)}


def default_rows(task: tasks.Task) -> int:
    """Rows of a stand-in if nobody asks for a number: as many as D4RL's for medium-replay."""
    if task.kind == "medium-replay":
        return published.REPLAY_ROWS.get(task.robot, STAND_IN_ROWS)
    return STAND_IN_ROWS


def manifest() -> dict[str, dict]:
    """File name -> what the manifest says of that shipped file."""
    path = POLICY_DIR / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def add_to_manifest(name: str, facts: dict) -> None:
    """Write what is to be known of a shipped file, with its SHA-256, into the manifest."""
    entries = manifest()
    entries[name] = {**facts, "sha256": files.sha256(POLICY_DIR / name)}
    text = json.dumps(entries, indent=2, sort_keys=True, allow_nan=False) + "\n"
    files.write_text(POLICY_DIR / "manifest.json", text)


def levels_of(task: tasks.Task) -> tuple[str, ...]:
    """The levels of the shipped policies that a task's stand-in needs.

    Raises:
        NotCollectable: as of `fingerprint`.
    """
    able = kinds(task.robot)
    if task.kind not in able or task.version != "v2":
        options = ", ".join(f"{task.robot}-{kind}-v2" for kind in able)
        raise NotCollectable(
            f"no self-collected stand-in for {task.name}: behavior policies for it are "
            f"not shipped; for {task.robot} there are: {options or 'none'}"
        )
    return LEVELS[task.kind]


def shipped(robot: str, level: str) -> tuple[Path, dict]:
    """The shipped file of a robot's level and what the manifest says of it.

    Raises:
        ValueError: there is none.
    """
    for file, facts in manifest().items():
        if (facts["robot"], facts["level"]) == (robot, level):
            return POLICY_DIR / file, facts
    raise ValueError(f"no {level} policy of {robot} in {POLICY_DIR / 'manifest.json'}")


def load_behaviors(
    path: Path, level: str, task: tasks.Task, facts: dict
) -> list[Behavior]:
    """The policy of a file, or all policies of a series in the order of their training.

    Args:
        facts: what the manifest says of the file; empty for a file of the user's own.

    Raises:
        ValueError: no such file, another SHA-256 than in `facts`, no policy in it, or one for
            another robot.
    """
    if not path.is_file():
        raise ValueError(f"policy file {path} does not exist")
    digest = files.sha256(path)
    if facts.get("sha256", digest) != digest:
        raise ValueError(
            f"policy file {path} has sha256 {digest}, the manifest says "
            f"{facts['sha256']}; reinstall the package"
        )
    named: list[tuple[str, int | None, TanhGaussianPolicy]]
    try:
        # Building the network draws its start weights from the global stream.
        with torch.random.fork_rng(devices=[]):
            if level == "series":
                series = load_series(path)
                named = [(f"step {step}", step, series[step]) for step in series]
            else:
                named = [(level, facts.get("step"), load_policy(path))]
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"policy file {path} is not a policy written by corl.standin.train_sac "
            f"({error!r})"
        ) from error
    inputs = FEATURES if level == "walker" else task.state_dim
    for _, _, policy in named:
        dims = policy.state_dim, policy.action_dim
        if dims != (inputs, task.action_dim):
            raise ValueError(
                f"policy file {path} maps {dims[0]} state to {dims[1]} action "
                f"dimensions; {task.robot or task.name} has {inputs} and {task.action_dim}"
            )
    return [Behavior(name, policy, digest, step) for name, step, policy in named]


def single(task: tasks.Task, level: str, policy: Path | None = None) -> Behavior:
    """The shipped behavior of a level, or the one of the file `policy`.

    Raises:
        ValueError: as of `shipped` and `load_behaviors`.
    """
    if level == "random":
        return Behavior("random")
    path, facts = (policy, {}) if policy else shipped(task.robot, level)
    return load_behaviors(path, level, task, facts)[0]
