"""Sizes, shares and rules of the benchmark: everything that an experiment varies."""

from dataclasses import dataclass

LEVELS = ("random", "medium", "expert")
# Share of misplaced rows in each half. At 0.9 the two halves have changed places.
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9)
RULES = ("none", "threshold", "threshold, cap 32", "posterior", "em", "direct")
# What they are compared with: a mixture with one share, fitted to all rows by EM, and who has the
# weights of `threshold` by lot, among the rows of each half as drawn and among all.
CONTROLS = ("pooled em", "lot in each half", "lot over all rows")
# Rules for scores that are a log-density ratio.
RATIO_RULES = ("estimated share",)


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; every field is a flag.

    Where the paper uses another value, the comment names it.
    """

    robot: str = "hopper"
    seed: int = 0
    fit_rows: int = 30_000  # rows per policy and half that models are fitted to
    pool_rows: int = 2_000  # other rows, per policy and half, that are scored
    batches: int = 200
    half: int = 128  # rows of a half batch
    references: int = 16  # reference actions per row, K in the tables
    kernel_sigma: float = 0.2  # width of the kernel over references, in action units
    diffusion_width: float = 0.25  # paper: 1
    diffusion_updates: int = 6_000  # paper: 600 000
    diffusion_batch: int = 512  # paper: 4096
    diffusion_lr: float = 3e-3  # paper: 1e-4
    density_updates: int = 4_000  # of the Gaussian and of the mixture
    density_batch: int = 256
    density_lr: float = 1e-3
    q_updates: int = 2_000
    energy_updates: int = 1_500  # paper: 1 000 000
    energy_states: int = 64  # states per update; paper: 256
    energy_width: int = 128  # paper: 256
    guidance_scale: float = 8.0  # the paper's value for hopper-medium
    small_guidance_scale: float = 2.0  # the paper's value for hopper-medium-expert
    energy_beta: float = 3.0
    classifier_updates: int = 1_000
