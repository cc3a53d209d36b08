"""Policies whose density is known exactly, and rows of their episodes."""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.exchange_accuracy.settings import LEVELS
from corl import files, tasks
from corl.data import schema
from corl.standin import collect, policies

# Discount of the returns, and so of the Q that the energy follows.
DISCOUNT = 0.99


class Policy:
    """A policy with an exact density; without a network it is uniform in [-1, 1]."""

    def __init__(
        self, level: str, network: policies.TanhGaussianPolicy | None, action_dim: int
    ):
        self.level, self.action_dim = level, action_dim
        self.network = None if network is None else network.double()

    @torch.no_grad()
    def log_prob(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-density (B,) in nats, float64, of actions (B, A) in raw states (B, S)."""
        if self.network is None:
            nats = -self.action_dim * math.log(2.0)
            return torch.full((len(states),), nats, dtype=torch.float64)
        return self.network.log_prob(states.double(), actions.double())

    @torch.no_grad()
    def sample(
        self, states: torch.Tensor, n: int, generator: torch.Generator
    ) -> torch.Tensor:
        """n actions in each of the states (B, S): (B, n, A), float32."""
        shape = len(states) * n, self.action_dim
        if self.network is None:
            actions = 2.0 * torch.rand(shape, generator=generator) - 1.0
        else:
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            actions, _ = self.network(states.double().repeat_interleave(n, 0), noise)
        return actions.float().view(len(states), n, -1)


def load_policy(robot: str, level: str) -> Policy:
    """The shipped policy of a level.

    Raises:
        ValueError: no such policy is shipped.
    """
    if level not in policies.kinds(robot):
        raise ValueError(
            f"no {level} policy of {robot} is shipped; there are: "
            f"{', '.join(set(LEVELS) & set(policies.kinds(robot))) or 'none'}"
        )
    network = None
    if level != "random":
        network = policies.load_policy(
            policies.POLICY_DIR / f"{robot}_{level}.safetensors"
        )
    return Policy(level, network, tasks.ROBOTS[robot].action_dim)


class Rows(NamedTuple):
    """Raw states (N, S), actions (N, A), discounted returns to go (N,), nan if unknown."""

    states: torch.Tensor
    actions: torch.Tensor
    returns: torch.Tensor

    def take(self, index: torch.Tensor) -> "Rows":
        """The rows at the places `index` (M,)."""
        return Rows(*(field[index] for field in self))


def stack(*parts: Rows) -> Rows:
    """All rows of the parts, in their order."""
    return Rows(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def collect_rows(
    robot: str, level: str, rows: int, seed: int, folder: Path
) -> tuple[Rows, dict]:
    """Rows of a policy's own episodes, and a record of where they come from.

    The episodes are rolled out once and kept in `folder`.

    Raises:
        ValueError: the rows hold no finished episode.
    """
    task = f"{robot}-{level}-v2"
    digests = "".join(f"-{d[:8]}" for d in policies.fingerprint(task).values())
    path = folder / f"{task}-{rows}-seed{seed}{digests}.hdf5"
    raw = schema.load_hdf5(
        collect.collect(task, rows, path, seed, progress=sys.stderr.isatty()), task
    )
    found = Rows(
        torch.from_numpy(raw["observations"]),
        torch.from_numpy(raw["actions"]),
        torch.from_numpy(returns_to_go(raw)),
    )
    ends = np.flatnonzero(raw["terminals"] | raw["timeouts"]) + 1
    if not len(ends):
        raise ValueError(
            f"{rows} rows of {task} hold no finished episode; raise fit_rows"
        )
    episodes = np.add.reduceat(raw["rewards"], [0, *ends[:-1]])
    source = {
        "source": "self-collected",
        "task": task,
        "rows": rows,
        "seed": seed,
        "sha256": files.sha256(path),
        "episode_returns": [float(f(episodes)) for f in (np.min, np.mean, np.max)],
    }
    return found, source


def returns_to_go(raw: dict[str, np.ndarray]) -> np.ndarray:
    """Discounted return to go (N,) float32 of every row.

    A time-out, or the end of the file, hides the rewards that would have followed. Rows near such
    a cut, for which over 5 % of the weight is hidden, get nan.
    """
    rewards, terminals, timeouts = raw["rewards"], raw["terminals"], raw["timeouts"]
    near = math.ceil(math.log(0.05) / math.log(DISCOUNT))
    returns, total, steps = np.empty(len(rewards)), 0.0, 0
    # The last row of the file ends no episode, so the walk backwards starts at a cut.
    cut = True
    for i in reversed(range(len(rewards))):
        if terminals[i] or timeouts[i]:
            total, steps, cut = 0.0, 0, not terminals[i]
        total, steps = rewards[i] + DISCOUNT * total, steps + 1
        returns[i] = math.nan if cut and steps <= near else total
    return returns.astype(np.float32)


def split(rows: Rows, sizes: list[int], rng: np.random.Generator) -> list[Rows]:
    """Disjoint random parts of the given sizes; rows that are left over are dropped."""
    order = torch.from_numpy(rng.permutation(len(rows.states)))
    *parts, _ = order.split([*sizes, len(order) - sum(sizes)])
    return [rows.take(part) for part in parts]


def contaminate(own: Rows, other: Rows, share: float) -> Rows:
    """As many rows as `own`, of which a share are those of `other`."""
    foreign = round(share * len(own.states))
    index = torch.arange(len(own.states))
    return stack(own.take(index[foreign:]), other.take(index[:foreign]))
