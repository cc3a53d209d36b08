"""Random numbers of OPT alone, so that without its parts a run gives the bits of its base."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def own_seed(seed: int) -> int:
    """A seed that begins another stream than the global one of the same seed."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0])


@contextmanager
def own_stream(seed: int) -> Iterator[None]:
    """Inside, networks are made from a stream of their own; the global one stays."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(own_seed(seed))
        yield


class Draws:
    """A stream on the host, the same for every device, whose numbers are moved to the device.

    Args:
        seed: of the run.
        device: of what it returns.
    """

    def __init__(self, seed: int, device: str = "cpu"):
        self.device = device
        self.generator = torch.Generator().manual_seed(own_seed(seed))

    def _moved(self, values: torch.Tensor) -> torch.Tensor:
        if not self.device.startswith("cuda"):
            return values.to(self.device)
        # The host does not wait for the work that is queued there.
        return values.pin_memory().to(self.device, non_blocking=True)

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Normal numbers of a shape."""
        return self._moved(torch.randn(tuple(shape), generator=self.generator))

    def uniform(self, count: int) -> torch.Tensor:
        """Uniform numbers (count,) in [0, 1), float64."""
        made = torch.rand(count, generator=self.generator, dtype=torch.float64)
        return self._moved(made)

    def rows(self, size: int, count: int) -> np.ndarray:
        """Row numbers (count,) below `size`, with replacement, on the host."""
        return torch.randint(size, (count,), generator=self.generator).numpy()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return {"stream": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.generator.set_state(state["stream"].cpu())
