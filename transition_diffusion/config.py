"""The `edis:` block of a config, its ranges, and the metrics that come of it."""

from dataclasses import dataclass
from typing import ClassVar

# Every metric of a refresh.
LOGS = (
    "refreshes",
    "diffusion_loss",
    "state_energy_loss",
    "transition_energy_loss",
    "policy_energy_loss",
    "guided",
    "generated_rows",
    "generated_reward",
    "generated_clipped",
    "denoiser_rows",
    "generator_share",
)
# Entries of a run's summary that are means of a metric over the online phase.
MEANS = {"generator_share": "generator_share"}
# Bytes of float32 activations per row and hidden unit while a network learns or is evaluated.
LEARNING, EVALUATING = 4 * 16, 4 * 3


@dataclass
class EdisConfig:
    """EDIS's fields, one nested block `edis:` of an algorithm's config."""

    # Updates that draw generated rows: every_update; refresh_steps (public EDIS-I)
    schedule: str = "every_update"
    # Updates in an online step that begins with a refresh, in refresh_steps
    refresh_step_updates: int = 20
    refresh_every: int = 10000  # online steps between two refreshes
    samples: int = 100000  # generated rows, replaced by every refresh
    # Diffusion model, new at every refresh
    diffusion_updates: int = 10000  # gradient steps on all rows
    diffusion_batch_size: int = 256  # rows per step
    diffusion_lr: float = 3e-4  # Adam learning rate at the start, cosine to 0
    width: int = 1024  # of the denoiser's hidden layers
    depth: int = 6  # its residual layers
    sampler_steps: int = 128  # noise levels of the sampler
    generation_batch_size: int = 1000  # rows generated at once
    model_terminals: bool = False  # generate terminals, too; else no row is one
    normalize_rewards: bool = False  # rewards to standard deviation 1
    # Energies, which go on over all refreshes
    energies: str = "consistent"  # consistent; public: as the authors' code trains them
    energy_updates: int = 20  # steps of each energy per refresh
    energy_batch_size: int = 256  # online rows per step; fewer: no guidance yet
    energy_lr: float = 1e-3  # Adam learning rate
    energy_levels: int = 8  # noise levels at which consistent energies learn
    negatives: int = 10  # samples of the model per online row
    # Guidance
    # The gradients' factor is constant (code) over noise levels, or exact: times sigma
    guidance: str = "constant"
    state_scale: float = 1.0  # factor of the state energy (code: ope_clip)
    action_scale: float = 0.2  # factor of the policy energy (code: pe_clip)
    next_state_scale: float = 0.2  # factor of the transition energy (code: te_clip)

    RANGES: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("refresh_step_updates", "refresh_every"), "[1, 1e9]"),
        **dict.fromkeys(("samples", "generation_batch_size"), "[1, 1e9]"),
        **dict.fromkeys(("diffusion_updates", "energy_updates"), "[1, 1e9]"),
        **dict.fromkeys(("diffusion_batch_size", "energy_batch_size"), "[1, 1e7]"),
        **dict.fromkeys(("diffusion_lr", "energy_lr"), "(0, inf)"),
        "width": "[1, 1e5]",
        "depth": "[1, 1000]",
        "sampler_steps": "[2, 1e4]",
        "energy_levels": "[1, 1e4]",
        "negatives": "[1, 1e4]",
        **dict.fromkeys(("state_scale", "action_scale", "next_state_scale"), "[0, inf)"),
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "schedule": ("every_update", "refresh_steps"),
        "energies": ("consistent", "public"),
        "guidance": ("constant", "exact"),
    }

    def __post_init__(self) -> None:
        if self.energies == "public" and self.guidance == "exact":
            raise ValueError(
                "edis.guidance exact needs edis.energies consistent: public energies are "
                "functions of other coordinates than the sampler's"
            )

    def not_stacked(self) -> str:
        """Why the seeds of this config cannot be stacked."""
        return "a generator of transitions belongs to one run"

    def share_of_published(self) -> float:
        """Arithmetic of learning and sampling in a refresh, 1 with the authors' values."""

        def cost(config: EdisConfig) -> float:
            learned = 3 * config.diffusion_updates * config.diffusion_batch_size
            sampled = config.samples * (2 * config.sampler_steps - 1)
            return (learned + sampled) * config.width**2 * config.depth

        return cost(self) / cost(type(self)())

    def row_bytes(self, state_dim: int, action_dim: int) -> dict[str, int]:
        """Field -> bytes of memory that one of its rows needs."""
        event = 4 * (2 * state_dim + action_dim + 2)
        return {
            # Those in use and those that are made.
            "samples": 2 * event,
            "generation_batch_size": 4 * event + EVALUATING * self.width,
            "diffusion_batch_size": 4 * event + LEARNING * self.width,
            "energy_batch_size": self.negatives
            * (
                self.energy_levels * (4 * event + LEARNING * 256)
                + EVALUATING * self.width
            ),
        }
