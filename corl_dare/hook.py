"""`DareHook`: what an algorithm file inserts where it samples its online batches.

    batch, weight, log = hook.sample(batch_size)

The hook draws the offline and the online half with the buffers' own `sample`, scores every row
by how far its action is from the behavior model, exchanges misplaced rows (`exchange.py`) and
returns the stacked batch, offline-like rows first, with a conservative weight per row: 1 keeps
the conservative loss, 0 releases it. An algorithm that multiplies its per-row conservative loss
by that weight is a DARE algorithm.

DARE, arXiv 2511.03828, Algorithm 1, lines 5-8 and 10. Readings of what the paper leaves open:
one reference action is clipped to the action bounds before it is scored; the behavior model and
the energy take raw states; Q is the running algorithm's twin target minimum, multiplied by
`q_scale` so that returns span 1000 as in the code that the guidance scales come from.

Everything random here comes from generators of the hook, except the rows of a batch, which the
buffers draw as they always do. So a run with the hook off equals the baseline bit for bit, and
one with the hook on sees the baseline's rows.
"""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from corl import compiled
from corl.progress import progress_bar
from corl_dare.behavior import (
    BehaviorModel,
    clipped_normal_log_prob,
    fit,
    fit_cached,
    make_behavior_model,
    noise_schedule,
)
from corl_dare.exchange import ALIGNMENTS, alignment_score, exchange, reorder
from corl_dare.guidance import EnergyNetwork, contrastive_loss, energy_gradient

SCORES = ("reference", "likelihood", "policy_ratio")
RULES = ("threshold", "posterior", "direct", "share", "random")
BEHAVIORS = ("diffusion", "gaussian", "mixture")
LOGS = (  # every metric that `sample` and `follow` can return
    "exchanged",
    "separation_point",
    "score_off_mean",
    "score_off_std",
    "score_on_mean",
    "score_on_std",
    "candidates_off",
    "candidates_on",
    "amplitude_before",
    "amplitude_after",
    "inverted",
    "references_clipped",
    "energy_loss",
)


@dataclass
class DareConfig:
    """DARE's fields, one nested block `dare:` of every algorithm's config."""

    enabled: bool = True  # false: the baseline, bit for bit
    # Score: how far is an action from the behavior?
    score: str = "reference"  # reference (paper), likelihood, policy_ratio
    alignment: str = (
        "gaussian_kl"  # distance to the reference; see exchange.alignment_score
    )
    alignment_sigma: float = (
        1.0  # std of that Gaussian; decides nothing for one reference
    )
    references: int = 1  # reference actions per row; the paper takes 1
    reference_max_age: int = 0  # updates a cached reference may serve; 0: always fresh
    # Exchange
    rule: str = "threshold"  # threshold (paper), posterior, direct, share, random
    cap: Optional[int] = None  # n, most pairs exchanged per batch; none: no cap
    weights: str = "hard"  # hard: 1 and 0; soft: posterior P(offline-like | d)
    skip_inverted: bool = (
        False  # exchange nothing when online rows score below offline ones
    )
    # Behavior model (paper: diffusion, 600k updates of 4096 rows)
    behavior: str = "diffusion"  # diffusion, gaussian, mixture
    behavior_updates: int = 600000  # gradient steps on the dataset, before anything else
    behavior_batch_size: int = 4096  # rows per step
    behavior_lr: float = 1e-4  # Adam learning rate
    behavior_width: float = 1.0  # width of the diffusion network, 1: the paper's
    sampler_steps: int = 15  # network evaluations per reference action
    # Guidance (energy network)
    guidance_scale: float = 8.0  # s, paper Table 7 per dataset; 0: no guidance
    energy_beta: float = (
        3.0  # inverse temperature of the energy's labels softmax(beta Q)
    )
    energy_lr: float = 3e-4  # Adam learning rate
    energy_updates: int = 100000  # energy steps between the offline and the online phase
    energy_update_freq: int = 1  # online updates per energy step
    energy_batch_states: int = 256  # states per energy step
    support_actions: int = 16  # behavior actions per state the energy is trained on
    q_scale: str = (
        "returns"  # returns: Q as if returns spanned 1000; literal: Q as it is
    )

    def __post_init__(self):
        choices = {
            "score": SCORES,
            "rule": RULES,
            "weights": ("hard", "soft"),
            "alignment": ALIGNMENTS,
            "behavior": BEHAVIORS,
            "q_scale": ("returns", "literal"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"dare.{field} must be one of {', '.join(allowed)}, "
                    f"not {getattr(self, field)!r}"
                )
        if self.cap is not None and self.cap < 0:
            raise ValueError(
                f"dare.cap must be 0 or more, or null for no cap, not {self.cap}"
            )
        at_least_one = (
            "references",
            "behavior_updates",
            "behavior_batch_size",
            "sampler_steps",
            "energy_update_freq",
            "energy_batch_states",
            "support_actions",
        )
        for field in at_least_one:
            if getattr(self, field) < 1:
                raise ValueError(
                    f"dare.{field} must be at least 1, not {getattr(self, field)}"
                )
        for field in ("reference_max_age", "energy_updates", "guidance_scale"):
            if getattr(self, field) < 0:
                raise ValueError(
                    f"dare.{field} must not be negative, not {getattr(self, field)}"
                )
        positive = "alignment_sigma behavior_lr behavior_width energy_beta energy_lr"
        for field in positive.split():
            if not getattr(self, field) > 0:
                raise ValueError(
                    f"dare.{field} must be positive, not {getattr(self, field)}"
                )
        if self.weights == "soft" and (self.rule != "threshold" or self.cap is not None):
            raise ValueError(
                "dare.weights soft weighs each row by its own score, so dare.rule and dare.cap "
                "would do nothing; set them to threshold and null, or dare.weights to hard"
            )
        if self.rule == "share" and self.score != "policy_ratio":
            raise ValueError(
                f"dare.rule share needs log-density ratios, not dare.score {self.score}; "
                "set dare.score to policy_ratio"
            )
        if self.score != "reference" and self.behavior == "diffusion":
            raise ValueError(
                f"dare.score {self.score} needs the behavior's density, which the diffusion "
                "model does not have; set dare.behavior to mixture or gaussian"
            )
        if self.guided and self.behavior != "diffusion":
            raise ValueError(
                f"dare.behavior {self.behavior} cannot be guided; set dare.guidance_scale "
                "to 0, or dare.behavior to diffusion"
            )

    @property
    def guided(self) -> bool:
        """Does anything need the energy network?"""
        return self.score == "reference" and self.guidance_scale > 0

    @property
    def scales_q(self) -> bool:
        """Does anything need to know the span of the dataset's returns?"""
        return self.guided and self.q_scale == "returns"

    @property
    def behavior_options(self) -> dict[str, float]:
        """Options of `behavior.make_behavior_model` beyond the kind."""
        return {"width": self.behavior_width} if self.behavior == "diffusion" else {}


def energy_q_scale(
    env_name: str, return_span: float, reward_scale: float = 1.0
) -> float:
    """Factor on Q before `energy_beta`, so that the paper's guidance scales fit.

    They belong to rewards whose returns span 1000 (locomotion) or that are r - 1 (antmaze).

    Args:
        env_name: D4RL task name.
        return_span: largest minus smallest return of the rewards that Q is trained on.
        reward_scale: factor on antmaze rewards (10 in Cal-QL).

    Raises:
        ValueError: the span is not positive.
    """
    if env_name.startswith("antmaze"):
        return 1.0 / reward_scale
    if not return_span > 0:
        raise ValueError(
            f"the dataset's returns span {return_span}; no scale of Q fits them, "
            "set dare.q_scale to literal"
        )
    return 1000.0 / return_span


def clipped_log_prob(
    policy: Callable[[torch.Tensor], torch.distributions.Normal], max_action: float
) -> Callable[..., torch.Tensor]:
    """`policy_log_prob` of a Gaussian policy whose samples are clipped before they are executed.

    For `DareHook(..., clipped_policy=True)`. `policy` maps states (B, S) to Normals (B, A).
    """

    def log_prob(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        normal = policy(states)
        log_std = normal.stddev.log()
        return clipped_normal_log_prob(actions, normal.mean, log_std, max_action).sum(-1)

    return log_prob


def new_behavior(
    config: DareConfig, state_dim: int, action_dim: int, seed: int, device: str
) -> BehaviorModel:
    """The untrained behavior model of a config."""
    model = make_behavior_model(
        config.behavior, state_dim, action_dim, seed=seed, **config.behavior_options
    )
    return model.to(device)


def fit_behavior(
    config: DareConfig,
    states: torch.Tensor,
    actions: torch.Tensor,
    *,
    dataset_hash: str,
    cache_dir: Path | str,
    seed: int,
    device: str,
    should_stop: Callable[[], bool] | None = None,
) -> BehaviorModel:
    """The behavior model of a config, frozen: from the cache, or trained and put there.

    states (N, S) are raw, actions (N, A). Prints which of the two it was.
    """
    start = time.perf_counter()
    model, path, loaded = fit_cached(
        config.behavior,
        states,
        actions,
        updates=config.behavior_updates,
        batch_size=config.behavior_batch_size,
        lr=config.behavior_lr,
        seed=seed,
        dataset_hash=dataset_hash,
        cache_dir=cache_dir,
        device=device,
        options=config.behavior_options,
        bar=progress_bar,
        should_stop=should_stop,
    )
    how = "loaded" if loaded else f"trained in {time.perf_counter() - start:.0f} s"
    print(f"behavior model {config.behavior}: {how}, {path.name}")
    return model


def seconds_to_prepare(hook: "DareHook") -> dict[str, float]:
    """Estimated seconds of behavior training (if not cached) and of `pretrain`, per phase.

    Measured on an untrained hook, which it leaves in another state: throw it away.
    """

    def measure(work: Callable[[], Any]) -> float:
        if hook.device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if hook.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - start

    config, generator = hook.config, torch.Generator(hook.device).manual_seed(0)
    rows = np.arange(min(hook.offline._size, config.behavior_batch_size))
    states, actions = draw_rows(hook.offline, rows)[:2]

    def steps(count: int) -> float:
        return measure(
            lambda: fit(
                hook.behavior,
                hook.raw(states),
                actions,
                updates=count,
                batch_size=config.behavior_batch_size,
                lr=config.behavior_lr,
                generator=generator,
                device=hook.device,
                progress=False,
            )
        )

    steps(1)  # warms up
    seconds = {"behavior model unless cached": steps(2) / 2 * config.behavior_updates}
    if hook.energy is not None and config.energy_updates:
        rows = rows[: config.energy_batch_states]

        def work() -> dict:
            return hook.energy_step(states[: len(rows)], [rows, rows[:0]])

        cold, warm = (
            measure(work),
            measure(work),
        )  # the first one samples support actions
        visits = config.energy_updates * len(rows)
        new = min(visits, hook.offline._size) / len(rows)
        seconds["energy"] = config.energy_updates * warm + new * max(cold - warm, 0.0)
    return seconds


class SlotCache:
    """A value per buffer slot, made on demand.

    A value serves `max_age` calls (none: for ever) and dies when the buffer overwrites its
    slot. Whether a slot is valid is known on the host, where the row indices are drawn, so
    asking costs no device synchronisation.
    """

    def __init__(self, buffer: Any, max_age: int | None):
        self.buffer, self.max_age = buffer, max_age
        self.values: torch.Tensor | None = (
            None  # (capacity, ...), made with the first value
        )
        self.made = np.full(
            buffer._buffer_size, -1, dtype=np.int64
        )  # call number, -1: none
        self.pointer = buffer._pointer

    def forget_overwritten(self) -> None:
        """Invalidate the slots that the ring has written since the last call."""
        steps = (self.buffer._pointer - self.pointer) % len(self.made)
        self.made[(self.pointer + np.arange(steps)) % len(self.made)] = -1
        self.pointer = self.buffer._pointer

    def get(
        self, rows: np.ndarray, now: int, make: Callable[[np.ndarray], torch.Tensor]
    ) -> torch.Tensor:
        """Values (B, ...) of the slots `rows` (B,); `make` gets positions in 0..B-1."""
        self.forget_overwritten()
        made = self.made[rows]
        stale = made < 0
        if self.max_age is not None:
            stale |= now - made >= self.max_age
        missing = np.flatnonzero(stale)
        if len(missing):
            fresh = make(missing)
            if self.values is None:
                shape = (len(self.made), *fresh.shape[1:])
                self.values = torch.zeros(shape, dtype=fresh.dtype, device=fresh.device)
            slots = torch.from_numpy(rows[missing]).to(fresh.device)
            self.values[slots] = fresh
            self.made[rows[missing]] = now
        return self.values[torch.from_numpy(rows).to(self.values.device)]

    def state_dict(self) -> dict[str, Any]:
        slots = torch.from_numpy(np.flatnonzero(self.made >= 0))
        values = None
        if self.values is not None:
            values = self.values[slots.to(self.values.device)].cpu()
        return {
            "slots": slots,
            "made": torch.from_numpy(self.made)[slots],
            "values": values,
            "pointer": self.pointer,
        }

    def load_state_dict(self, state: dict[str, Any], device: str) -> None:
        slots = state["slots"].numpy()
        self.made[:] = -1
        self.made[slots] = state["made"].numpy()
        self.pointer = state["pointer"]
        self.values = None
        if state["values"] is not None:
            kept = state["values"].to(device)
            shape = (len(self.made), *kept.shape[1:])
            self.values = torch.zeros(shape, dtype=kept.dtype, device=device)
            self.values[state["slots"].to(device)] = kept


class DareHook:
    """Wraps an offline and an online replay buffer with CORL's `sample(n)`.

    Args:
        offline, online: replay buffers. Caches need to know the rows of a batch: a buffer with
            `draw(n)` and `gather(rows)`, or with CORL's private storage, tells them; any other
            one works with `reference_max_age` 0 and without guidance.
        config: DARE's fields.
        behavior: fitted behavior model on raw states.
        policy_log_prob: (states (B, S) as in the buffers, actions (B, A)) -> (B,), the current
            policy's log-density in nats; for `score: policy_ratio`.
        q_function: (states (B, S) as in the buffers, actions (B, A)) -> (B,), the Q that the
            energy follows (twin target minimum); for guidance.
        q_scale: factor on that Q, see `energy_q_scale`; ignored for `q_scale: literal`.
        mixing_ratio: offline share of a batch.
        state_mean, state_std: the buffers' state normalization, arrays (S,) or numbers.
        max_action: actions lie in [-max_action, max_action].
        clipped_policy: the policy's actions are clipped to these bounds, and at a bound
            `policy_log_prob` is the log of the mass beyond it. Then the behavior's is, too.
        seed: of the hook's own generators.
        compile: run the exchange and the density scores as compiled graphs.

    Raises:
        ValueError: a part that the configured score needs is missing.
    """

    def __init__(
        self,
        offline: Any,
        online: Any,
        config: DareConfig,
        behavior: BehaviorModel | None = None,
        *,
        policy_log_prob: Callable[..., torch.Tensor] | None = None,
        q_function: Callable[..., torch.Tensor] | None = None,
        q_scale: float = 1.0,
        mixing_ratio: float = 0.5,
        state_mean: np.ndarray | float = 0.0,
        state_std: np.ndarray | float = 1.0,
        max_action: float = 1.0,
        clipped_policy: bool = False,
        device: str = "cpu",
        seed: int = 0,
        compile: bool = False,
    ):
        if config.enabled and behavior is None:
            raise ValueError("DARE needs a behavior model; see behavior.fit_cached")
        if config.enabled and config.score == "policy_ratio" and policy_log_prob is None:
            raise ValueError("dare.score policy_ratio needs policy_log_prob")
        if config.enabled and config.guided and q_function is None:
            raise ValueError(
                "guidance needs q_function; or set dare.guidance_scale to 0"
            )
        self.offline, self.online, self.config = offline, online, config
        self.behavior, self.policy_log_prob = behavior, policy_log_prob
        self.q_function = q_function
        self.q_scale = q_scale if config.q_scale == "returns" else 1.0
        self.mixing_ratio, self.max_action = mixing_ratio, max_action
        self.clipped_policy = clipped_policy
        self.device = device
        self.state_mean = torch.as_tensor(state_mean, dtype=torch.float32, device=device)
        self.state_std = torch.as_tensor(state_std, dtype=torch.float32, device=device)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.row_generator = torch.Generator().manual_seed(seed)  # rows of energy steps
        self.calls = 0  # of sample
        self.energy_steps = 0
        self.last: tuple[torch.Tensor, list] | None = (
            None  # states and rows of the batch
        )
        self._exchange, self._density_scores = exchange, self.density_scores
        if compile:
            self._density_scores = compiled.function(self.density_scores)
            if config.rule != "random":  # a graph takes no generator
                self._exchange = compiled.function(exchange)
        self.energy, self.energy_optimizer = None, None
        caching = config.reference_max_age > 0 and config.score == "reference"
        self.reference_caches = self.support_caches = None
        if config.enabled and caching:
            self.reference_caches = self._make_caches(config.reference_max_age)
        if config.enabled and config.guided:
            self.support_caches = self._make_caches(None)
            state_dim, action_dim = behavior.state_dim, behavior.action_dim
            self.energy = EnergyNetwork(state_dim, action_dim, seed=seed).to(device)
            self.energy_optimizer = torch.optim.Adam(
                self.energy.parameters(), lr=config.energy_lr
            )

    def _make_caches(self, max_age: int | None) -> list[SlotCache]:
        for buffer in (self.offline, self.online):
            if not hasattr(buffer, "_buffer_size") or not hasattr(buffer, "_pointer"):
                raise ValueError(
                    f"{type(buffer).__name__} has no CORL storage, so its rows cannot be "
                    "cached; set dare.reference_max_age and dare.guidance_scale to 0"
                )
        return [SlotCache(buffer, max_age) for buffer in (self.offline, self.online)]

    # -- sampling -------------------------------------------------------------------------

    def sample(
        self, batch_size: int
    ) -> tuple[list[torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
        """A batch with its offline-like rows first.

        Returns:
            batch: the buffers' tensors, each (batch_size, ...).
            weight: conservative weight per row (batch_size,), 1 keeps, 0 releases.
            log: 0-d tensors, on the device: `exchanged`, `separation_point`, score moments, ...
        """
        self.calls += 1
        n_offline = int(batch_size * self.mixing_ratio)
        offline_rows, offline = draw(self.offline, n_offline)
        online_rows, online = draw(self.online, batch_size - n_offline)
        batch = [torch.cat(rows) for rows in zip(offline, online, strict=True)]
        if not self.config.enabled:
            return batch, torch.ones(batch_size, device=self.device), {}
        with torch.no_grad():
            rows = [offline_rows, online_rows]
            states, actions = batch[0], batch[1]
            scores, log = self.score(states, actions, rows)
            self.last = states, rows
            result = self._exchange(
                scores[:n_offline],
                scores[n_offline:],
                cap=self.config.cap,
                rule=self.config.rule,
                weights=self.config.weights,
                skip_inverted=self.config.skip_inverted,
                generator=self.generator if self.config.rule == "random" else None,
            )
            batch = reorder(batch, result.order)
        return batch, result.weight, {**result.stats, **log}

    def first_released(self, batch_size: int) -> int | None:
        """Row of a batch of `sample` from which on hard weights are 0; before it they are 1.

        None with soft weights and when DARE is off. A loss of weight 0 need not be computed.
        """
        hard = self.config.enabled and self.config.weights == "hard"
        return int(batch_size * self.mixing_ratio) if hard else None

    def score(
        self, states: torch.Tensor, actions: torch.Tensor, rows: list
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Alignment scores (B,): higher = further from the behavior. Nats."""
        if self.config.score == "reference":
            references = self.references(states, rows)  # (B, K, A)
            clipped = references.clamp(-self.max_action, self.max_action)
            outside = (clipped != references).float().mean()
            scores = alignment_score(
                actions, clipped, self.config.alignment, self.config.alignment_sigma
            )
            return scores, {"references_clipped": outside}
        return self._density_scores(states, actions), {}

    def density_scores(
        self, states: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """Scores (B,) of the densities, nats: -log nu(a|s), or log pi(a|s) - log nu(a|s)."""
        if self.config.score == "likelihood":
            return -self.behavior.log_prob(self.raw(states), actions)
        bounds = [self.max_action] if self.clipped_policy else []
        behavior = self.behavior.log_prob(self.raw(states), actions, *bounds)
        return self.policy_log_prob(states, actions) - behavior

    def raw(self, states: torch.Tensor) -> torch.Tensor:
        """Undo the buffers' normalization: the behavior model and the energy take raw states."""
        return states * self.state_std + self.state_mean

    def references(self, states: torch.Tensor, rows: list) -> torch.Tensor:
        """Reference actions (B, K, A), fresh or from the cache, not clipped."""

        def make(states: torch.Tensor) -> torch.Tensor:
            return self.sample_behavior(states, self.config.references, guided=True)

        if self.reference_caches is None:
            return make(states)
        return self._cached(self.reference_caches, self.calls, states, rows, make)

    def support(self, states: torch.Tensor, rows: list) -> torch.Tensor:
        """Support actions (B, K, A): unguided behavior samples, drawn once per transition."""

        def make(states: torch.Tensor) -> torch.Tensor:
            return self.sample_behavior(
                states, self.config.support_actions, guided=False
            )

        return self._cached(self.support_caches, self.calls, states, rows, make)

    def _cached(self, caches, now, states, rows, make) -> torch.Tensor:
        parts, first = [], 0
        for cache, slots in zip(caches, rows, strict=True):
            part = states[first : first + len(slots)]
            first += len(slots)

            def make_missing(missing: np.ndarray, part=part) -> torch.Tensor:
                return make(part[torch.from_numpy(missing).to(part.device)])

            if len(slots):
                parts.append(cache.get(slots, now, make_missing))
        return torch.cat(parts)

    def sample_behavior(
        self, states: torch.Tensor, n: int, guided: bool
    ) -> torch.Tensor:
        """Behavior actions (B, n, A) at states as in the buffers; guided: pi_0 of Eq. 5."""
        options: dict[str, Any] = {}
        if self.config.behavior == "diffusion":
            options["steps"] = self.config.sampler_steps
            if guided and self.energy is not None:
                options["scale"] = self.config.guidance_scale
                options["guidance"] = lambda x, t, s: energy_gradient(
                    self.energy, x, t, s
                )
        with torch.no_grad():
            return self.behavior.sample(self.raw(states), n, self.generator, **options)

    # -- the energy follows Q -------------------------------------------------------------

    def follow(self) -> dict[str, torch.Tensor]:
        """Call once per update: every `energy_update_freq` calls, one energy step toward Q.

        The states are those of the last batch (Algorithm 1, line 10).
        """
        if self.energy is None or self.calls % self.config.energy_update_freq:
            return {}
        states, rows = self.last
        total = len(states)
        picked = torch.randperm(total, generator=self.row_generator).numpy()
        picked = np.sort(picked[: self.config.energy_batch_states])
        n_offline = len(rows[0])
        from_offline = picked[picked < n_offline]
        from_online = picked[picked >= n_offline] - n_offline
        rows = [rows[0][from_offline], rows[1][from_online]]
        return self.energy_step(states[torch.from_numpy(picked).to(self.device)], rows)

    def energy_step(self, states: torch.Tensor, rows: list) -> dict[str, torch.Tensor]:
        """One contrastive step (CEP, arXiv 2304.12824) on states (B, S) as in the buffers."""
        support = self.support(states, rows)  # (B, K, A)
        b, k, a = support.shape
        with torch.no_grad():
            repeated = states.unsqueeze(1).expand(b, k, states.shape[1])
            q = self.q_function(
                repeated.reshape(b * k, -1), support.reshape(b * k, a)
            ).reshape(b, k)
        loss = contrastive_loss(
            self.energy,
            support,
            self.q_scale * q,
            self.raw(states),
            self.config.energy_beta,
            self.generator,
            noise_schedule,
        )
        self.energy_optimizer.zero_grad()
        loss.backward()
        self.energy_optimizer.step()
        self.energy_steps += 1
        return {"energy_loss": loss.detach()}

    def pretrain(
        self,
        should_stop: Callable[[], bool] = lambda: False,
        save: Callable[[], None] = lambda: None,
        save_every: int = 5000,
        progress: bool = True,
    ) -> None:
        """Energy steps on the offline buffer up to `energy_updates`, before the online phase.

        Stops early when `should_stop()` and goes on from there when called again; calls `save`
        every `save_every` steps.
        """
        if self.energy is None or self.energy_steps >= self.config.energy_updates:
            return
        first, last = self.energy_steps, self.config.energy_updates
        with progress_bar(
            desc="energy", initial=first, total=last, disable=not progress
        ) as bar:
            for step in range(first + 1, last + 1):
                rows = torch.randint(
                    0,
                    self.offline._size,
                    (self.config.energy_batch_states,),
                    generator=self.row_generator,
                )
                states = storage(self.offline)[0][rows.to(self.device)]
                self.energy_step(states, [rows.numpy(), rows[:0].numpy()])
                bar.update()
                if step % save_every == 0 and step < last:
                    save()
                if should_stop():
                    return

    def as_buffer(self, trainer: Any) -> "ExchangedBuffer":
        """CORL's buffer interface around this hook, for `patches/`."""
        return ExchangedBuffer(self, trainer)

    # -- checkpoint -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what the hook does next, for an exact resume."""
        caches = {
            name: [cache.state_dict() for cache in caches]
            for name, caches in (
                ("reference", self.reference_caches),
                ("support", self.support_caches),
            )
            if caches is not None
        }
        state = {
            "generator": self.generator.get_state(),
            "row_generator": self.row_generator.get_state(),
            "calls": self.calls,
            "energy_steps": self.energy_steps,
            "caches": caches,
        }
        if self.energy is not None:
            state["energy"] = self.energy.state_dict()
            state["energy_optimizer"] = self.energy_optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict` of a hook with the same config and buffers."""
        self.generator.set_state(state["generator"].cpu())
        self.row_generator.set_state(state["row_generator"].cpu())
        self.calls, self.energy_steps = state["calls"], state["energy_steps"]
        named = {"reference": self.reference_caches, "support": self.support_caches}
        for name, saved in state["caches"].items():
            for cache, part in zip(named[name], saved, strict=True):
                cache.load_state_dict(part, self.device)
        if self.energy is not None:
            self.energy.load_state_dict(state["energy"])
            self.energy_optimizer.load_state_dict(state["energy_optimizer"])


class ExchangedBuffer:
    """A hook in the place of CORL's online replay buffer.

    `sample(n)` returns the batch alone and leaves the weights at `trainer.dare_weight`, and
    `first_released` at `trainer.dare_first`, so that CORL's training loop need not change.
    """

    def __init__(self, hook: DareHook, trainer: Any):
        self.hook, self.trainer = hook, trainer
        self.add_transition = hook.online.add_transition

    def sample(self, batch_size: int) -> list[torch.Tensor]:
        if self.trainer.dare_weight is not None:
            self.hook.follow()  # after the update on the batch before this one
        batch, self.trainer.dare_weight, _ = self.hook.sample(batch_size)
        self.trainer.dare_first = self.hook.first_released(batch_size)
        return batch


def dare_for_corl(
    config: Any,
    trainer: Any,
    offline: Any,
    online: Any,
    *,
    dataset: dict[str, np.ndarray],
    return_range: tuple[float, float],
    state_mean: np.ndarray | float,
    state_std: np.ndarray | float,
    policy_log_prob: Callable[..., torch.Tensor],
    q_function: Callable[..., torch.Tensor],
    clipped_policy: bool = False,
    reward_scale: float = 1.0,
    mixing_ratio: float = 0.5,
) -> DareHook | None:
    """The hook of a patched CORL script (`patches/`), or None when `dare.enabled` is false.

    Gives the trainer what its inserted lines read, `dare` and `dare_generator`, and trains the
    behavior model on the normalized q-learning arrays `dataset`. `return_range` is the smallest
    and the largest return of its rewards.
    """
    device, dare = str(config.device), config.dare
    trainer.dare = dare
    trainer.dare_generator = torch.Generator(device).manual_seed(config.seed)
    if not dare.enabled:
        return None
    digest = hashlib.sha256()
    for key in ("observations", "actions"):
        digest.update(np.ascontiguousarray(dataset[key]).tobytes())
    cache = os.environ.get("CORL_DARE_CACHE") or "~/.cache/corl_dare"
    states = torch.as_tensor(dataset["observations"] * state_std + state_mean)
    behavior = fit_behavior(
        dare,
        states.float(),
        torch.as_tensor(dataset["actions"]).float(),
        dataset_hash=digest.hexdigest(),
        cache_dir=Path(cache).expanduser() / "behavior",
        seed=config.seed,
        device=device,
    )
    q_scale = 1.0
    if dare.scales_q:
        low, high = return_range
        q_scale = energy_q_scale(config.env, high - low, reward_scale)
    return DareHook(
        offline,
        online,
        dare,
        behavior,
        policy_log_prob=policy_log_prob,
        q_function=q_function,
        q_scale=q_scale,
        mixing_ratio=mixing_ratio,
        state_mean=state_mean,
        state_std=state_std,
        max_action=trainer.max_action if hasattr(trainer, "max_action") else 1.0,
        clipped_policy=clipped_policy,
        device=device,
        seed=config.seed,
    )


def storage(buffer: Any) -> list[torch.Tensor]:
    """The tensors of a buffer with CORL's private storage, in the order of its batches."""
    fields = ["_states", "_actions", "_rewards", "_next_states", "_dones", "_mc_returns"]
    return [getattr(buffer, field) for field in fields if hasattr(buffer, field)]


def draw_rows(buffer: Any, rows: np.ndarray) -> list[torch.Tensor]:
    """The given rows (B,) of a buffer with CORL's private storage."""
    fields = storage(buffer)
    index = torch.from_numpy(rows).to(fields[0].device)
    return [field[index] for field in fields]


def draw(buffer: Any, n: int) -> tuple[np.ndarray | None, list[torch.Tensor]]:
    """A batch and, where the buffer tells, the rows it came from.

    CORL's buffer draws its rows from numpy's global generator; the same draw is made here.
    """
    if hasattr(buffer, "draw"):
        rows = buffer.draw(n)
        return rows, buffer.gather(rows)
    if hasattr(buffer, "_states"):
        rows = np.random.randint(0, buffer._size, size=n)
        return rows, draw_rows(buffer, rows)
    return None, list(buffer.sample(n))
