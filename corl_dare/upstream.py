"""The hook inside an upstream CORL file that `patches/` have changed."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from corl_dare.hook import DareHook, Drawn, energy_q_scale, prepare


class ExchangedBuffer:
    """A hook in the place of CORL's online replay buffer.

    `sample(n)` returns the batch alone and leaves its `Release` at `trainer.dare_release`, so
    that CORL's training loop need not change.
    """

    def __init__(self, hook: DareHook, trainer: Any):
        self.hook, self.trainer = hook, trainer
        self.add_transition = hook.online.add_transition
        self.drawn: Drawn | None = None

    def sample(self, batch_size: int) -> list[torch.Tensor]:
        """A batch of the hook; the energy first follows the update on the batch before it."""
        if self.drawn is not None:
            self.hook.update_energy(self.drawn)
        self.drawn = self.hook.sample(batch_size)
        self.trainer.dare_release = self.drawn.release
        return self.drawn.batch


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
    reward_scale: float = 1.0,
    **options: Any,
) -> DareHook | None:
    """The hook of a patched CORL script, or None when `dare.enabled` is false.

    Gives the trainer what its inserted lines read, `dare` and `dare_generator`, and trains the
    behavior model on the normalized q-learning arrays `dataset`.

    Args:
        config: the script's config, with the block `dare`.
        trainer: CORL's algorithm object.
        offline, online: CORL's replay buffers.
        dataset: observations (N, S), normalized, and actions (N, A).
        return_range: smallest and largest return of the dataset's rewards.
        state_mean, state_std: the normalization of the states, arrays (S,) or numbers.
        reward_scale: factor on antmaze rewards.
        options: other arguments of `DareHook`.
    """
    device, dare = str(config.device), config.dare
    # AWAC's script has its own name for it.
    env = getattr(config, "env", None) or config.env_name
    trainer.dare = dare
    trainer.dare_generator = torch.Generator(device).manual_seed(config.seed)
    if not dare.enabled:
        return None
    digest = hashlib.sha256()
    for key in ("observations", "actions"):
        digest.update(np.ascontiguousarray(dataset[key]).tobytes())
    cache = os.environ.get("CORL_DARE_CACHE") or "~/.cache/corl_dare"
    mean, std = (
        torch.as_tensor(x, dtype=torch.float32, device=device)
        for x in (state_mean, state_std)
    )
    low, high = return_range
    return prepare(
        dare,
        offline,
        online,
        dataset_hash=digest.hexdigest(),
        cache_dir=Path(cache).expanduser(),
        states=torch.as_tensor(dataset["observations"] * state_std + state_mean).float(),
        actions=torch.as_tensor(dataset["actions"]).float(),
        q_scale=lambda: energy_q_scale(env, high - low, reward_scale),
        unnormalize=lambda states: states * std + mean,
        max_action=getattr(trainer, "max_action", 1.0),
        device=device,
        seed=config.seed,
        **options,
    )
