"""Rows of a replay buffer in proportion to how on-policy they are: ARB, arXiv 2512.10510.

Every so many batches all rows get the weight exp(g / temperature). g = clip(f / A, -12, 7) minus
the largest g of all rows, where f says how well the row's action fits the current policy (see
`standard_log_prob`) and A is the number of action dimensions. For the unit `trajectory` all rows
of a trajectory have the mean of their g. Rows that are written later have the weight 1, the
largest there is, until the weights are computed again. Rows are drawn with replacement, and
nothing corrects for the weights. So it is in the authors' code, song970407/ARB 002fc0b.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from corl.buffers import ReplayBuffer, TensorBatch

# Bounds of f / A.
LOWEST, HIGHEST = -12.0, 7.0
# States that are further apart do not follow each other; norm, as the buffer has them.
JUMP = 1e-6
# Rows that the policy sees at a time.
CHUNK = 1 << 16
# Metrics of a run that samples so.
COLUMNS = ("online_share", "effective_share")

# (states (B, S), actions (B, A)) as in the buffer -> how well they fit the policy (B,).
Fit = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def standard_log_prob(
    actions: torch.Tensor, mean: torch.Tensor, std: Any
) -> torch.Tensor:
    """Log-density (B,) of (actions - mean) / std under the standard normal, in nats.

    It is -1/2 of the squared Mahalanobis distance of the action from the policy's mean, plus a
    constant. It is not the policy's log-density: log std is left out, so a wide policy does not
    lower it, and a squashed policy's action is taken before the squashing, without its Jacobian.

    Args:
        actions, mean: (B, A).
        std: (B, A), (A,) or a number.
    """
    z = (actions - mean) / std
    return (-0.5 * z.square() - 0.5 * math.log(2.0 * math.pi)).sum(-1)


class OnPolicyBuffer:
    """A replay buffer whose batches are drawn in proportion to the rows' weights.

    Everything else is the buffer's own, whose batches stay uniform.

    Args:
        buffer: holds the dataset, or nothing yet.
        actor: is in evaluation mode while `fit` is called.
        fit: of the current policy; makes no gradient.
        temperature: the higher, the more alike the weights.
        refresh: batches between two computations of the weights. Computing costs a pass of the
            policy over all rows.
        unit: what has one weight: trajectory, transition.
        rows: what its rows are called in the estimate of a run's time.
        batches: that will be drawn, for that estimate.

    Attributes:
        metrics: `online_share` of the last batch, and `effective_share` of all rows: 1 where the
            weights are equal, 1 / N where one row has them all (Kish's effective sample size).
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        actor: torch.nn.Module,
        fit: Fit,
        *,
        temperature: float = 5.0,
        refresh: int = 1000,
        unit: str = "trajectory",
        rows: str = "all",
        batches: int = 0,
    ):
        self.buffer, self.actor, self.fit = buffer, actor, fit
        self.temperature, self.refresh_every, self.unit = temperature, refresh, unit
        self.rows, self.batches = rows, batches
        self.draws = 0  # batches so far
        self._pointer = buffer._pointer  # of the buffer, at the last draw
        self._online = 0  # rows written since this began
        self._added = 0  # rows written since the weights were computed
        self._online_before = 0  # rows written before that
        self._start = 0  # slot of the oldest row, when the weights were computed
        self._set_weights(np.ones(0, np.float32))
        self.metrics: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        # A copy asks before there is a buffer, and special methods are not passed on.
        if name == "buffer" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.buffer, name)

    def sample(self, batch_size: int) -> TensorBatch:
        """A batch of random rows."""
        return self.buffer.gather(self.draw(batch_size))

    def draw(self, batch_size: int) -> np.ndarray:
        """Row numbers (batch_size,), in proportion to the weights, with replacement.

        Raises:
            FloatingPointError: as of `refresh`.
        """
        if not batch_size:
            # As half of a batch of online rows alone.
            return np.empty(0, np.int64)
        self._count_new_rows()
        if self.draws % self.refresh_every == 0:
            self.refresh()
        self.draws += 1
        ages = self._draw_ages(batch_size)
        known = len(self._weights)
        first_online = known - min(self._online_before, known)
        self.metrics["online_share"] = float((ages >= first_online).mean())
        return (self._start + ages) % self.buffer._buffer_size

    def _draw_ages(self, batch_size: int) -> np.ndarray:
        """Rows by age: 0 was the oldest one when the weights were computed."""
        known = len(self._weights)
        last = known + self._added
        # The ring writes over its oldest rows.
        first = max(0, last - self.buffer._buffer_size)
        low, high = self._mass_before(first), self._mass_before(last)
        # The legacy global generator on the host, as for uniform batches.
        places = low + (high - low) * np.random.random_sample(batch_size)
        whole = self._cumulative[-1]
        ages = np.searchsorted(self._cumulative, places, side="right") - 1
        # Each later row has the weight 1.
        later = places >= whole
        ages[later] = known + (places[later] - whole).astype(np.int64)
        # A product may be rounded up to the end.
        return ages.clip(first, last - 1)

    def _mass_before(self, age: int) -> float:
        """Sum of the weights of all older rows."""
        known = len(self._weights)
        return float(self._cumulative[min(age, known)]) + max(0, age - known)

    def _count_new_rows(self) -> None:
        new = (self.buffer._pointer - self._pointer) % self.buffer._buffer_size
        self._pointer = self.buffer._pointer
        self._added += new
        self._online += new

    # -- weights --------------------------------------------------------------------------

    def refresh(self) -> None:
        """Compute the weights of all rows.

        Raises:
            FloatingPointError: as of `weights`.
        """
        size, capacity = self.buffer._size, self.buffer._buffer_size
        self._start = self.buffer._pointer % capacity if size == capacity else 0
        self._added, self._online_before = 0, self._online
        training = self.actor.training
        self.actor.eval()
        weights = self.weights()
        self.actor.train(training)
        self._set_weights(weights.astype(np.float32))
        squares = np.square(self._weights, dtype=np.float64).sum()
        share = self._cumulative[-1] ** 2 / squares / size
        self.metrics["effective_share"] = float(share)

    def weights(self) -> np.ndarray:
        """The weights (N,) of all rows by age, of about 1 at most. Other rules overwrite this.

        Raises:
            FloatingPointError: the policy's fit is not finite.
        """
        g, begins = self.fits_and_begins()
        if not np.isfinite(g).all():
            raise FloatingPointError(
                f"sampling on_policy: the policy's fit to a row is {g[~np.isfinite(g)][0]}; the "
                "values diverged, likely too high a learning rate"
            )
        g -= g.max()
        if self.unit == "trajectory":
            starts = np.flatnonzero(begins)
            lengths = np.diff(np.append(starts, len(g)))
            g = np.repeat(np.add.reduceat(g, starts) / lengths, lengths)
        return np.exp(g / self.temperature)

    def _set_weights(self, weights: np.ndarray) -> None:
        """Weights (N,) of the rows by age, and the sum of those before each row (N + 1,)."""
        self._weights = weights
        self._cumulative = np.append(0.0, np.cumsum(weights, dtype=np.float64))

    @torch.no_grad()
    def fits_and_begins(self) -> tuple[np.ndarray, np.ndarray]:
        """By age, f / A between its bounds (N,), and whether a trajectory begins (N,)."""
        fits: list[np.ndarray] = []
        begins: list[np.ndarray] = []
        following, done = torch.empty(0), torch.empty(0)
        for states, actions, _, next_states, dones, *_ in self._chunks():
            fit = self.fit(states, actions) / actions.shape[-1]
            # A clamp would let nan pass, and infinity would become a bound.
            clipped = torch.where(fit.isfinite(), fit.clamp(LOWEST, HIGHEST), fit)
            fits.append(clipped.double().cpu().numpy())
            if not begins:
                following, done = states[:1], dones[:1]
            before = torch.cat([following, next_states[:-1]])
            ended = torch.cat([done, dones[:-1]]).squeeze(-1) > 0
            jumps = torch.linalg.vector_norm(states - before, dim=-1) > JUMP
            begins.append((jumps | ended).cpu().numpy())
            following, done = next_states[-1:], dones[-1:]
        begun = np.concatenate(begins)
        begun[0] = True
        return np.concatenate(fits), begun

    def _chunks(self) -> Iterator[TensorBatch]:
        """The rows by age, some at a time."""
        size, capacity = self.buffer._size, self.buffer._buffer_size
        for first in range(0, size, CHUNK):
            ages = np.arange(first, min(first + CHUNK, size))
            yield self.buffer.gather((self._start + ages) % capacity)

    def estimate(
        self, seconds_of: Callable[[Callable[[], Any]], float]
    ) -> dict[str, float]:
        """Estimated seconds of computing the weights; `seconds_of` runs some work and times it."""
        times = math.ceil(self.batches / self.refresh_every)
        if not times:
            return {}
        return {f"weights of {self.rows} rows": times * seconds_of(self.refresh)}

    # -- checkpoint -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The weights, and where the draws are."""
        return {
            "weights": torch.from_numpy(self._weights),
            "draws": self.draws,
            "pointer": self._pointer,
            "online": self._online,
            "online_before": self._online_before,
            "added": self._added,
            "start": self._start,
            "metrics": dict(self.metrics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, with the rows of then in the buffer."""
        weights = state["weights"].numpy()
        if len(weights) > self.buffer._buffer_size:
            raise ValueError(
                f"it has the weights of {len(weights)} rows, and buffer_size is "
                f"{self.buffer._buffer_size}"
            )
        self._set_weights(weights)
        self.draws, self._pointer = state["draws"], state["pointer"]
        self._online, self._online_before = state["online"], state["online_before"]
        self._added, self._start = state["added"], state["start"]
        self.metrics = dict(state["metrics"])
