"""Old gym's random generators."""

from typing import Any

import gymnasium
import numpy as np


class RandomNumberGenerator(np.random.Generator):
    """numpy's generator that also answers the names of `numpy.random.RandomState`."""

    def rand(self, *size: int) -> Any:
        """Uniform numbers in [0, 1) of this shape."""
        return self.random(size or None)

    def randn(self, *size: int) -> Any:
        """Normal numbers of this shape."""
        return self.standard_normal(size or None)

    def randint(self, low: int, high: int | None = None, size: Any = None) -> Any:
        """Whole numbers in [low, high), or in [0, low)."""
        return self.integers(low, high, size)

    random_sample = np.random.Generator.random


def np_random(seed: int | None = None) -> tuple[RandomNumberGenerator, int]:
    """A generator and the seed it was made with; None draws a seed."""
    made, used = gymnasium.utils.seeding.np_random(seed)
    return RandomNumberGenerator(made.bit_generator), int(used)
