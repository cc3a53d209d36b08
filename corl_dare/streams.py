"""Random streams of checkpoints, put back on the same kind of device or begun anew on another."""

import numpy as np
import torch


def put_back(generator: torch.Generator, state: torch.Tensor, *counts: int) -> bool:
    """Give a generator the state of a checkpoint; returns whether its stream goes on.

    A state means something to one kind of device only: a CPU's has 5056 bytes, a GPU's has 16.
    Where it does not fit, a new stream begins. Its seed follows from the generator's own and
    `counts`, so that a checkpoint always goes on in the same way.

    Args:
        generator: seeded, as at the start of the training.
        state: of `Generator.get_state`, on any device.
        counts: how far the training is, not negative.
    """
    if state.numel() == generator.get_state().numel():
        generator.set_state(state.cpu())
        return True
    mixed = np.random.SeedSequence([generator.initial_seed(), *counts])
    generator.manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
    return False
