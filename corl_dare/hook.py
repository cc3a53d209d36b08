"""`DareHook`: what an algorithm file inserts where it samples its online batches.

    drawn = hook.sample(batch_size)
    losses = trainer.train(drawn.batch, drawn.release)
    hook.update_energy(drawn)

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
buffers draw as they always do. So a run without a hook equals the baseline bit for bit, and one
with a hook sees the baseline's rows.
"""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from corl_dare.behavior import (
    BehaviorModel,
    clipped_normal_log_prob,
    make_behavior_model,
    noise_schedule,
)
from corl_dare.behavior_fit import fit
from corl_dare.cache import cached_file, check_writable, fit_cached
from corl_dare.config import DareConfig
from corl_dare.exchange import (
    EM_STEPS,
    alignment_score,
    draw_lots,
    em_state,
    em_steps,
    exchange,
    reorder,
    weight_stats,
)
from corl_dare.guidance import EnergyNetwork, contrastive_loss, energy_gradient
from corl_dare.release import Release
from corl_dare.rows import SlotCache, as_tensor, draw, draw_rows, storage, upload
from corl_dare.streams import put_back

Log = dict[str, torch.Tensor]
# Steps of expectation-maximisation in one graph, which takes seconds to compile.
EM_CHUNK = 5
assert EM_STEPS % EM_CHUNK == 0
# The numbers of the rows of a batch in the offline and in the online buffer, as drawn; None
# where a buffer does not tell them.
Rows = list[Any]


class Drawn(NamedTuple):
    """What `DareHook.sample` returns.

    batch: the buffers' tensors, each (B, ...), offline-like rows first.
    release: conservative weights of these rows.
    log: 0-d tensors on the device; names are in `config.LOGS`.
    states: (B, S), the states as drawn, before the exchange; for `update_energy`.
    rows: the row numbers as drawn; for `update_energy`.
    """

    batch: list[torch.Tensor]
    release: Release
    log: Log
    states: torch.Tensor
    rows: Rows


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

    For `DareHook(..., clipped_policy=True)`. `policy` maps states (B, S) to Normals (B, A); the
    result maps states (B, S) and actions (B, A) to log-densities (B,) in nats.
    """

    def log_prob(states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        normal = policy(states)
        log_std = normal.stddev.log()
        return clipped_normal_log_prob(actions, normal.mean, log_std, max_action).sum(-1)

    return log_prob


def noisy_log_prob(
    policy: Callable[[torch.Tensor], torch.Tensor], std: float, max_action: float
) -> Callable[..., torch.Tensor]:
    """`policy_log_prob` of a deterministic policy that acts with normal noise, then clipped.

    For `DareHook(..., clipped_policy=True)`. `policy` maps states (B, S) to actions (B, A); `std`
    is that of the noise, in units of the actions.
    """

    def noisy(states: torch.Tensor) -> torch.distributions.Normal:
        # Argument checks read tensors on the host; they change no number.
        return torch.distributions.Normal(policy(states), std, validate_args=False)

    return clipped_log_prob(noisy, max_action)


class BehaviorData(NamedTuple):
    """The data of a behavior model that is not fitted yet, and where the result is kept."""

    states: torch.Tensor  # (N, S), raw
    actions: torch.Tensor  # (N, A)
    dataset_hash: str
    cache_dir: Path | str


def fit_behavior(
    config: DareConfig,
    states: torch.Tensor,
    actions: torch.Tensor,
    *,
    dataset_hash: str,
    cache_dir: Path | str,
    seed: int,
    device: str,
    bar: Callable[..., Any] = tqdm,
    should_stop: Callable[[], bool] | None = None,
) -> BehaviorModel:
    """The behavior model of a config, frozen: from the cache, or trained and put there.

    states (N, S) are raw, actions (N, A). Prints which of the two it was. Raises as
    `cache.fit_cached` does.
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
        bar=bar,
        should_stop=should_stop,
    )
    how = "loaded" if loaded else f"trained in {time.perf_counter() - start:.0f} s"
    print(f"behavior model {config.behavior}: {how}, {path.name}")
    return model


class DareHook:
    """Wraps an offline and an online replay buffer with CORL's `sample(n)`.

    Args:
        offline, online: replay buffers. Caches need to know the rows of a batch: a buffer with
            `draw(n)` and `gather(rows)`, or with CORL's private storage, tells them; any other
            one, or a function `n -> batch`, works with `reference_max_age` 0 and without
            guidance. Batches may be those of another library, see `rows.as_batch`.
        config: DARE's fields.
        behavior: behavior model on raw states, frozen; None for weights without a score.
        policy_log_prob: (states (B, S) as in the buffers, actions (B, A)) -> (B,), the current
            policy's log-density in nats; for `score: policy_ratio`.
        q_function: (states (B, S) as in the buffers, actions (B, A)) -> (B,), the Q that the
            energy follows (twin target minimum); for guidance.
        q_scale: factor on that Q, see `energy_q_scale`; ignored for `q_scale: literal`.
        mixing_ratio: offline share of a batch.
        unnormalize: states (B, S) as in the buffers -> raw states (B, S). Default: the buffers'
            states are raw.
        max_action: actions lie in [-max_action, max_action].
        clipped_policy: the policy's actions are clipped to these bounds, and at a bound
            `policy_log_prob` is the log of the mass beyond it. Then the behavior's is, too.
        seed: of the hook's own generators.
        compile: turns the exchange and the density scores into compiled graphs; default: eager.
        capture: on a GPU, turns the behavior model's sampler and the energy step into one launch
            each; called with a function of tensors, and with `optimizers` and `generators` that
            it uses. Default: they are launched kernel by kernel.
        bar: makes progress bars, called as `tqdm` is.
        data: what `begin` fits the behavior model on; None: it is fitted.
        online_steps: tells how many steps the online phase has made since its first update;
            for `weights: anneal`. Default: one for each batch that was drawn.
        online_length: steps of the whole online phase; the default of `anneal_steps`.
        online_first: draw the online half before the offline one. Needed where the host's own mixed
            batches draw in that order, so that a run with the hook sees the rows of one without.

    Raises:
        ValueError: a part that the configured score needs is missing.
    """

    def __init__(
        self,
        offline: Any,
        online: Any,
        config: DareConfig,
        behavior: BehaviorModel | None,
        *,
        policy_log_prob: Callable[..., torch.Tensor] | None = None,
        q_function: Callable[..., torch.Tensor] | None = None,
        q_scale: float = 1.0,
        mixing_ratio: float = 0.5,
        unnormalize: Callable[[torch.Tensor], torch.Tensor] | None = None,
        max_action: float = 1.0,
        clipped_policy: bool = False,
        device: str = "cpu",
        seed: int = 0,
        compile: Callable[..., Callable[..., Any]] | None = None,
        capture: Callable[..., Callable[..., Any]] | None = None,
        bar: Callable[..., Any] = tqdm,
        data: BehaviorData | None = None,
        online_steps: Callable[[], int] | None = None,
        online_length: int | None = None,
        online_first: bool = False,
    ):
        if config.weights == "anneal" and not (config.anneal_steps or online_length):
            raise ValueError("dare.weights anneal needs dare.anneal_steps")
        if config.score == "policy_ratio" and policy_log_prob is None:
            raise ValueError("dare.score policy_ratio needs policy_log_prob")
        if config.guided and q_function is None:
            raise ValueError(
                "guidance needs q_function; or set dare.guidance_scale to 0"
            )
        self.offline, self.online, self.config = offline, online, config
        self.behavior, self.policy_log_prob = behavior, policy_log_prob
        self.q_function = q_function
        self.q_scale = q_scale if config.q_scale == "returns" else 1.0
        self.mixing_ratio, self.max_action = mixing_ratio, max_action
        self.unnormalize = unnormalize or (lambda states: states)
        self.clipped_policy, self.online_first = clipped_policy, online_first
        self.device, self.seed, self.bar, self.data = device, seed, bar, data
        self.online_steps, self.online_length = online_steps, online_length or 0
        self.generator = torch.Generator(device).manual_seed(seed)
        # Draws the rows of energy steps, on the host.
        self.row_generator = torch.Generator().manual_seed(seed)
        self.samples = 0  # batches drawn so far: the clock of the caches
        self.energy_steps = 0
        # Batches so far whose exchange was refused, since a score was not finite.
        self.refused = torch.zeros((), device=device)
        # Has `load_state_dict` begun a stream anew, because the old one is of another device?
        self.reseeded = False
        self.reference_caches: list[SlotCache] | None = None
        if config.reference_max_age > 0 and config.score == "reference":
            self.reference_caches = self._make_caches(config.reference_max_age)
        self.energy: EnergyNetwork | None = None
        self.energy_optimizer: torch.optim.Adam | None = None
        self.support_caches: list[SlotCache] | None = None
        if config.guided:
            self._make_energy()
        self._make_graphs(compile, capture)

    def _make_energy(self) -> None:
        """What guidance needs: the energy network and the actions that it is trained on."""
        self.support_caches = self._make_caches(None)
        assert self.behavior is not None
        dims = self.behavior.state_dim, self.behavior.action_dim
        self.energy = EnergyNetwork(*dims, seed=self.seed).to(self.device)
        self.energy_optimizer = torch.optim.Adam(
            self.energy.parameters(), lr=self.config.energy_lr, capturable=self._on_gpu
        )

    @property
    def _on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def _make_graphs(
        self,
        compile: Callable[..., Callable[..., Any]] | None,
        capture: Callable[..., Callable[..., Any]] | None,
    ) -> None:
        """The functions of tensors that a batch needs, as they are or as graphs."""
        self._exchange, self._density_scores = exchange, self.density_scores
        self._em_steps = em_steps
        self._guided_samples = self.guided_samples
        self._energy_update = self.energy_update
        if compile is not None:
            self._density_scores = compile(self.density_scores)
            self._em_steps = compile(em_steps)
            if self.config.rule != "random":  # a graph takes no generator
                self._exchange = compile(exchange)
        if capture is None:
            return
        # A cache asks for another number of samples each time.
        if self.reference_caches is None:
            self._guided_samples = capture(
                self.guided_samples, generators=[self.generator]
            )
        if self.energy_optimizer is not None:
            self._energy_update = capture(
                self.energy_update,
                optimizers=[self.energy_optimizer],
                generators=[self.generator],
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

    def sample(self, batch_size: int) -> Drawn:
        """A batch with its offline-like rows first; see `Drawn`."""
        self.samples += 1
        n_offline = int(batch_size * self.mixing_ratio)
        rows, (offline, online) = self._draw_halves(n_offline, batch_size - n_offline)
        weight = self._weight_tensor(offline[0])
        batch, weight, log, states = self.arrange(offline, online, rows, weight)
        log = self._count_refused(log)
        return Drawn(batch, self._release(weight, n_offline), log, states, rows)

    def _draw_halves(
        self, n_offline: int, n_online: int
    ) -> tuple[Rows, list[list[torch.Tensor]]]:
        """Row numbers and rows of the offline and of the online half."""
        step = -1 if self.online_first else 1
        halves = [(self.offline, n_offline), (self.online, n_online)][::step]
        drawn = [draw(buffer, n, self.device) for buffer, n in halves][::step]
        return [rows for rows, _ in drawn], [batch for _, batch in drawn]

    @property
    def weight(self) -> float:
        """The weight of all rows now; 1 where rows have weights of their own."""
        if not self.config.alike:
            return 1.0
        # The batch that is being drawn counts for the steps after it.
        steps = self.online_steps() if self.online_steps else self.samples - 1
        return self.config.weight_after(steps, self.online_length)

    def _weight_tensor(self, like: torch.Tensor) -> torch.Tensor | None:
        # A number would be part of a graph.
        return like.new_full((), self.weight) if self.config.alike else None

    def _count_refused(self, log: Log) -> Log:
        if "refused" not in log:
            return log
        self.refused = self.refused + log["refused"]
        return {**log, "refused": self.refused}

    def _release(self, weight: torch.Tensor, n_offline: int) -> Release:
        if not self.config.alike:
            return Release(weight, n_offline if self.config.weights == "hard" else None)
        # What stays the same during a run: each number has a graph of its own.
        fixed = self.config.weight if self.config.weights == "uniform" else None
        if self.config.weight == 1.0 or fixed == 0.0:
            return Release(weight, int(self.config.weight) * weight.shape[-1])
        return Release(weight)

    @torch.no_grad()
    def arrange(
        self,
        offline: list[torch.Tensor],
        online: list[torch.Tensor],
        rows: Rows,
        weight: torch.Tensor | None = None,
        lots: torch.Tensor | None = None,
    ) -> tuple[list[torch.Tensor], torch.Tensor, Log, torch.Tensor]:
        """Score and exchange two halves of a batch; takes nothing else but what is cached.

        Args:
            weight: 0-d, of all rows; then nothing is scored and no row moves.
            lots: of `draw_lots`, (B,), where `permute` needs some; default: they are drawn here.

        Returns:
            The batch with its offline-like rows first, the weights of its rows (B,), metrics, and
            the states as they were drawn.
        """
        batch = [torch.cat(halves) for halves in zip(offline, online, strict=True)]
        n_offline = len(offline[0])
        states, actions = batch[0], batch[1]
        if weight is not None:
            weight = weight.expand(len(states)).clone()
            return batch, weight, weight_stats(weight), states
        scores, log = self.score(states, actions, rows)
        em = None
        if self.config.rule == "em":
            em = em_state(scores, n_offline, self._em_steps, EM_CHUNK)
        result = self._exchange(
            scores[:n_offline],
            scores[n_offline:],
            cap=self.config.cap,
            rule=self.config.rule,
            weights=self.config.weights,
            skip_inverted=self.config.skip_inverted,
            generator=self.generator if self.config.rule == "random" else None,
            em=em,
        )
        order = result.order
        if self.config.permute != "none":
            lots = self.draw_lots(n_offline, len(states)) if lots is None else lots
            order = lots[order]
        batch = reorder(batch, order)
        return batch, result.weight, {**result.stats, **log}, states

    def draw_lots(self, n_offline: int, rows: int) -> torch.Tensor:
        """For each row of a batch the one that takes its place by lot, (rows,)."""
        return draw_lots(
            n_offline, rows, self.config.permute, self.generator, self.device
        )

    def score(
        self, states: torch.Tensor, actions: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, Log]:
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
        raw = self.unnormalize(states)
        assert self.behavior is not None
        if self.config.score == "likelihood":
            return -self.behavior.log_prob(raw, actions)
        bound = self.max_action if self.clipped_policy else math.inf
        behavior = self.behavior.log_prob(raw, actions, bound)
        assert self.policy_log_prob is not None
        return self.policy_log_prob(states, actions) - behavior

    def references(self, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Reference actions (B, K, A), fresh or from the cache, not clipped."""

        if self.reference_caches is None:
            return self._guided_samples(states)
        return self._cached(self.reference_caches, states, rows, self._guided_samples)

    def guided_samples(self, states: torch.Tensor) -> torch.Tensor:
        """Fresh reference actions (B, K, A)."""
        return self.sample_behavior(states, self.config.references, guided=True)

    def support(self, states: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Support actions (B, K, A): unguided behavior samples, drawn once per transition."""

        def make(states: torch.Tensor) -> torch.Tensor:
            return self.sample_behavior(
                states, self.config.support_actions, guided=False
            )

        assert self.support_caches is not None
        return self._cached(self.support_caches, states, rows, make)

    def _cached(
        self,
        caches: list[SlotCache],
        states: torch.Tensor,
        rows: Rows,
        make: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        parts, first = [], 0
        for cache, slots in zip(caches, rows, strict=True):
            part = states[first : first + len(slots)]
            first += len(slots)

            def make_missing(
                missing: np.ndarray, part: torch.Tensor = part
            ) -> torch.Tensor:
                return make(part[upload(missing, part.device)])

            if len(slots):
                parts.append(cache.get(slots, self.samples, make_missing))
        return torch.cat(parts)

    def sample_behavior(
        self, states: torch.Tensor, n: int, guided: bool
    ) -> torch.Tensor:
        """Behavior actions (B, n, A) at states as in the buffers; guided: pi_0 of Eq. 5."""
        options: dict[str, Any] = {}
        if self.config.behavior == "diffusion":
            options["steps"] = self.config.sampler_steps
            energy = self.energy
            if guided and energy is not None:
                options["scale"] = self.config.guidance_scale
                options["guidance"] = lambda x, t, s: energy_gradient(energy, x, t, s)
        assert self.behavior is not None
        with torch.no_grad():
            raw = self.unnormalize(states)
            return self.behavior.sample(raw, n, self.generator, **options)

    # -- the energy follows Q -------------------------------------------------------------

    def update_energy(self, drawn: Drawn) -> Log:
        """Call it once per update: every `energy_update_freq` calls, one energy step toward Q.

        The states are those of the batch as drawn (Algorithm 1, line 10).
        """
        if self.energy is None or self.samples % self.config.energy_update_freq:
            return {}
        states, rows = drawn.states, drawn.rows
        picked = torch.randperm(len(states), generator=self.row_generator).numpy()
        picked = np.sort(picked[: self.config.energy_batch_states])
        n_offline = len(rows[0])
        from_offline = picked[picked < n_offline]
        from_online = picked[picked >= n_offline] - n_offline
        rows = [rows[0][from_offline], rows[1][from_online]]
        return self.energy_step(states[upload(picked, self.device)], rows)

    def energy_step(self, states: torch.Tensor, rows: Rows) -> Log:
        """One contrastive step (CEP, arXiv 2304.12824) on states (B, S) as in the buffers."""
        loss = self._energy_update(states, self.support(states, rows))
        self.energy_steps += 1
        return {"energy_loss": loss}

    def energy_update(self, states: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
        """The loss, 0-d, of the energy step with support actions (B, K, A)."""
        assert self.q_function is not None and self.energy is not None
        assert self.energy_optimizer is not None
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
            self.unnormalize(states),
            self.config.energy_beta,
            self.generator,
            noise_schedule,
        )
        self.energy_optimizer.zero_grad()
        loss.backward()
        self.energy_optimizer.step()
        return loss.detach()

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

        Raises:
            FloatingPointError: the energy's loss is not finite, read when it may be saved.
        """
        if self.energy is None or self.energy_steps >= self.config.energy_updates:
            return
        first, last = self.energy_steps, self.config.energy_updates
        log: Log = {}
        with self.bar(
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
                log = self.energy_step(states, [rows.numpy(), rows[:0].numpy()])
                bar.update()
                if step % save_every == 0 and step < last:
                    self._check_energy(log)
                    save()
                if should_stop():
                    return
        self._check_energy(log)

    def _check_energy(self, log: Log) -> None:
        """Raises FloatingPointError where the loss of the last energy step is not finite."""
        loss = log["energy_loss"].item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"energy_loss is {loss} after {self.energy_steps} energy updates: "
                f"likely too high a learning rate (dare.energy_lr {self.config.energy_lr:g}), "
                "or Q on too large a scale (see dare.energy_beta and dare.q_scale)"
            )

    # -- start ----------------------------------------------------------------------------

    def begin(self, should_stop: Callable[[], bool] | None = None) -> None:
        """Fit the behavior model or load it from the cache, unless that is done.

        Raises as `cache.fit_cached` does; a stopped fit goes on at the next call.
        """
        if self.data is None:
            return
        fitted = fit_behavior(
            self.config,
            self.data.states,
            self.data.actions,
            dataset_hash=self.data.dataset_hash,
            cache_dir=self.data.cache_dir,
            seed=self._behavior_seed,
            device=self.device,
            bar=self.bar,
            should_stop=should_stop,
        )
        assert self.behavior is not None
        # In place: compiled graphs hold these tensors.
        self.behavior.load_state_dict(fitted.state_dict())
        self.data = None

    def estimate(
        self, seconds_of: Callable[[Callable[[], Any]], float]
    ) -> dict[str, float]:
        """Estimated seconds of fitting the behavior model, if it has to be, and of `pretrain`.

        `seconds_of` runs some work and times it. The hook is left in another state: the caller
        puts it back.
        """
        config, seconds = self.config, {}
        if self.data is not None and not self._behavior_file(self.data).exists():
            batch = [x[: config.behavior_batch_size] for x in self.data[:2]]
            self._fit_steps(batch, 1)  # warms up
            two = seconds_of(lambda: self._fit_steps(batch, 2))
            seconds["behavior model"] = two / 2 * config.behavior_updates
        left = config.energy_updates - self.energy_steps
        if self.energy is not None and left > 0:
            rows = np.arange(min(self.offline._size, config.energy_batch_states))
            states = draw_rows(self.offline, rows)[0]

            def work() -> Log:
                return self.energy_step(states, [rows, rows[:0]])

            # The first step also samples the support actions.
            cold, warm = seconds_of(work), seconds_of(work)
            new = min(left * len(rows), self.offline._size) / len(rows)
            seconds["energy"] = left * warm + new * max(cold - warm, 0.0)
        return seconds

    @property
    def _behavior_seed(self) -> int:
        own = self.config.behavior_seed
        return self.seed if own is None else own

    def _behavior_file(self, data: BehaviorData) -> Path:
        assert self.behavior is not None
        return cached_file(
            self.behavior,
            len(data.states),
            updates=self.config.behavior_updates,
            batch_size=self.config.behavior_batch_size,
            lr=self.config.behavior_lr,
            seed=self._behavior_seed,
            dataset_hash=data.dataset_hash,
            cache_dir=data.cache_dir,
        )[0]

    def _fit_steps(self, batch: list[torch.Tensor], count: int) -> None:
        assert self.behavior is not None
        fit(
            self.behavior.requires_grad_(True),
            *batch,
            updates=count,
            batch_size=self.config.behavior_batch_size,
            lr=self.config.behavior_lr,
            generator=torch.Generator(self.device).manual_seed(0),
            device=self.device,
            progress=False,
        )
        self.behavior.requires_grad_(False)

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
            "calls": self.samples,
            "energy_steps": self.energy_steps,
            "refused": self.refused.cpu(),
            "caches": caches,
        }
        if self.energy is not None and self.energy_optimizer is not None:
            state["energy"] = self.energy.state_dict()
            state["energy_optimizer"] = self.energy_optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict` of a hook with the same config and buffers.

        Random streams of another kind of device begin anew, and `reseeded` is true then.
        """
        self.samples, self.energy_steps = state["calls"], state["energy_steps"]
        # Checkpoints of older versions did not count.
        self.refused = state.get("refused", torch.zeros(())).to(self.device)
        kept = [
            put_back(generator, state[name], self.samples, self.energy_steps)
            for name, generator in (
                ("generator", self.generator),
                ("row_generator", self.row_generator),
            )
        ]
        self.reseeded = not all(kept)
        named = {"reference": self.reference_caches, "support": self.support_caches}
        for name, saved in state["caches"].items():
            caches = named[name]
            assert caches is not None
            for cache, part in zip(caches, saved, strict=True):
                cache.load_state_dict(part, self.device)
        if self.energy is not None and self.energy_optimizer is not None:
            self.energy.load_state_dict(state["energy"])
            self.energy_optimizer.load_state_dict(state["energy_optimizer"])
            # The checkpoint may be of another device.
            self.energy_optimizer.param_groups[0]["capturable"] = self._on_gpu


def _rows_to_fit(
    offline: Any,
    states: torch.Tensor | np.ndarray | None,
    actions: torch.Tensor | np.ndarray | None,
    unnormalize: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """States (N, S) and actions (N, A) for the behavior model: those given, or the buffer's."""
    if (states is None) != (actions is None):
        raise ValueError("prepare needs states and actions, or neither of them")
    if states is not None and actions is not None:
        return as_tensor(states), as_tensor(actions)
    if not storage(offline):
        raise ValueError(
            f"{type(offline).__name__} does not show its rows: give prepare the dataset's states "
            "and actions"
        )
    found, actions = (field[: offline._size] for field in storage(offline)[:2])
    return (unnormalize(found) if unnormalize else found), actions


def prepare(
    config: DareConfig,
    offline: Any,
    online: Any,
    *,
    dataset_hash: str,
    cache_dir: Path | str,
    states: torch.Tensor | np.ndarray | None = None,
    actions: torch.Tensor | np.ndarray | None = None,
    q_scale: float | Callable[[], float] = 1.0,
    begin: bool = True,
    seeds: Sequence[dict[str, Any]] = (),
    over_seeds: Callable[..., Callable[..., Any]] | None = None,
    **options: Any,
) -> DareHook:
    """A hook ready to sample: behavior model fitted or loaded, Q scaled.

    Args:
        config: DARE's fields.
        offline, online: replay buffers, see `DareHook`.
        dataset_hash: names the data in the cache of behavior models.
        cache_dir: the models are kept in its folder `behavior`.
        states, actions: (N, S) raw and (N, A), tensors or arrays, what the behavior model is
            fitted on. Default: the rows of the offline buffer, un-normalized.
        q_scale: factor on Q, or a function that tells it and is asked only where it matters.
        begin: False leaves the fit to a later `hook.begin()`.
        seeds, over_seeds: for several seeds in one process: the arguments that each has of its
            own, such as buffers and seed, and a function, see `hook_stacked.StackedHook`.
        options: the other arguments of `DareHook`.

    Raises:
        ValueError: a missing part, or data that cannot be fitted; see `cache.fit_cached`.
        CacheError: the model has to be trained, and the cache cannot be written.
    """
    if over_seeds is not None:
        capture = options.pop("capture", None)
        options |= {"cache_dir": cache_dir, "q_scale": q_scale, "begin": begin}
        hooks = [prepare(config, **{**options, **own}) for own in seeds]
        # It is a `DareHook`, so its file imports this one.
        from corl_dare.hook_stacked import StackedHook

        return StackedHook(hooks, offline, online, over_seeds, capture)
    if config.alike:
        return DareHook(offline, online, config, None, **options)
    seed, device = options.get("seed", 0), options.get("device", "cpu")
    states, actions = _rows_to_fit(offline, states, actions, options.get("unnormalize"))
    behavior = make_behavior_model(
        config.behavior,
        states.shape[1],
        actions.shape[1],
        seed=seed if config.behavior_seed is None else config.behavior_seed,
        **config.behavior_options,
    )
    if callable(q_scale):
        q_scale = q_scale() if config.scales_q else 1.0
    hook = DareHook(
        offline,
        online,
        config,
        behavior.to(device).eval().requires_grad_(False),
        q_scale=q_scale,
        data=BehaviorData(states, actions, dataset_hash, Path(cache_dir) / "behavior"),
        **options,
    )
    if hook.data is not None:
        model_file = hook._behavior_file(hook.data)
        # Not after the first phase or a long fit.
        if not model_file.exists():
            check_writable(model_file)
    if begin:
        hook.begin()
    return hook
