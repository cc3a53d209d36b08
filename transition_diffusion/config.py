"""The blocks `edis:` and `cfdg:` of a config, their ranges, and the metrics that come of them."""

from dataclasses import dataclass
from typing import ClassVar

# Every metric of a refresh: of EDIS, and of CFDG.
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
CFDG_LOGS = (
    "refreshes",
    "diffusion_loss",
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
class GeneratorConfig:
    """What every generator of transitions has: its refreshes, its diffusion model, its rows."""

    refresh_every: int = 10000  # online steps between two refreshes
    samples: int = 100000  # generated rows, replaced by every refresh
    # Diffusion model
    diffusion_updates: int = 10000  # gradient steps on all rows
    diffusion_batch_size: int = 256  # rows per step
    diffusion_lr: float = 3e-4  # Adam learning rate at the start, cosine to 0
    width: int = 1024  # of the denoiser's hidden layers
    depth: int = 6  # its residual layers
    sampler_steps: int = 128  # noise levels of the sampler
    generation_batch_size: int = 1000  # rows generated at once
    model_terminals: bool = False  # generate terminals, too; else no row is one
    normalize_rewards: bool = False  # rewards to standard deviation 1

    RANGES: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("refresh_every", "diffusion_updates"), "[1, 1e9]"),
        **dict.fromkeys(("samples", "generation_batch_size"), "[1, 1e9]"),
        "diffusion_batch_size": "[1, 1e7]",
        "diffusion_lr": "(0, inf)",
        "width": "[1, 1e5]",
        "depth": "[1, 1000]",
        "sampler_steps": "[2, 1e4]",
    }

    def not_stacked(self) -> str:
        """Why the seeds of this config cannot be stacked."""
        return "a generator of transitions belongs to one run"

    def arithmetic(self) -> float:
        """Weights of the denoiser that a refresh goes through, learning and sampling."""
        learned = 3 * self.diffusion_updates * self.diffusion_batch_size
        sampled = self.samples * (2 * self.sampler_steps - 1)
        return (learned + sampled) * self.width**2 * self.depth

    def share_of_published(self) -> float:
        """Arithmetic of learning and sampling in a refresh, 1 with the block's own defaults."""
        return self.arithmetic() / type(self)().arithmetic()

    def row_bytes(self, state_dim: int, action_dim: int) -> dict[str, int]:
        """Field -> bytes of memory that one of its rows needs."""
        event = 4 * (2 * state_dim + action_dim + 2)
        return {
            # Those in use and those that are made.
            "samples": 2 * event,
            "generation_batch_size": 4 * event + EVALUATING * self.width,
            "diffusion_batch_size": 4 * event + LEARNING * self.width,
        }


@dataclass
class EdisConfig(GeneratorConfig):
    """EDIS's fields, one nested block `edis:` of an algorithm's config.

    The diffusion model is new at every refresh.
    """

    # Updates that draw generated rows: every_update; refresh_steps (public EDIS-I)
    schedule: str = "every_update"
    # Updates in an online step that begins with a refresh, in refresh_steps
    refresh_step_updates: int = 20
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

    RANGES: ClassVar[dict[str, str]] = GeneratorConfig.RANGES | {
        **dict.fromkeys(("refresh_step_updates", "energy_updates"), "[1, 1e9]"),
        "energy_batch_size": "[1, 1e7]",
        "energy_lr": "(0, inf)",
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

    def row_bytes(self, state_dim: int, action_dim: int) -> dict[str, int]:
        """Field -> bytes of memory that one of its rows needs."""
        event = 4 * (2 * state_dim + action_dim + 2)
        return {
            **super().row_bytes(state_dim, action_dim),
            "energy_batch_size": self.negatives
            * (
                self.energy_levels * (4 * event + LEARNING * 256)
                + EVALUATING * self.width
            ),
        }


@dataclass
class CfdgConfig(GeneratorConfig):
    """CFDG's fields, one nested block `cfdg:` of an algorithm's config.

    The two shares are the paper's. It has no public code and does not say the rest, so all other
    values are readings.
    """

    # Share of generated rows in a batch; 0: none (control)
    synthetic_ratio: float = 1 / 3
    offline_share: float = 0.2  # offline-like share of the generated rows
    # Readings
    # One model with labels: conditional; a control without: unconditional, one per label
    models: str = "conditional"
    # The w of (1 + w) labelled - w unlabelled; 0: labels alone (control)
    guidance: float = 1.0
    label_dropout: float = 0.2  # chance that a row is learned without its label
    # Online share of the rows that the conditional model learns
    online_rows: float = 0.5
    samples: int = 200000  # generated rows, replaced by every refresh
    diffusion_updates: int = 100000  # gradient steps of a model at the first refresh
    refresh_updates: int = 20000  # and at each later one, where the model goes on
    model_terminals: bool = True  # generate terminals, too; else no row is one
    normalize_rewards: bool = True  # rewards to standard deviation 1

    RANGES: ClassVar[dict[str, str]] = GeneratorConfig.RANGES | {
        "synthetic_ratio": "[0, 1]",
        "offline_share": "[0, 1]",
        "guidance": "[0, inf)",
        "label_dropout": "[0, 1)",
        "online_rows": "(0, 1)",
        "refresh_updates": "[1, 1e9]",
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "models": ("conditional", "unconditional"),
    }

    @property
    def guided(self) -> bool:
        """Does a sample ask the model with the label and without it?"""
        return self.models == "conditional" and self.guidance > 0.0

    def counts(self) -> tuple[int, int]:
        """Generated rows that are like offline ones, and like online ones."""
        offline = int(self.samples * self.offline_share)
        return offline, self.samples - offline

    def arithmetic(self) -> float:
        """Weights of the denoisers that a later refresh goes through, learning and sampling."""
        models = 1 if self.models == "conditional" else 2
        learned = 3 * models * self.refresh_updates * self.diffusion_batch_size
        sampled = self.samples * (2 * self.sampler_steps - 1) * (1 + self.guided)
        return (learned + sampled) * self.width**2 * self.depth

    def __post_init__(self) -> None:
        if self.guided and self.label_dropout == 0.0:
            raise ValueError(
                f"cfdg.guidance {self.guidance} needs cfdg.label_dropout above 0: the model must "
                "have learned some rows without their label; or set cfdg.guidance to 0"
            )
        online = int(self.diffusion_batch_size * self.online_rows)
        if self.models == "conditional" and online in (0, self.diffusion_batch_size):
            raise ValueError(
                f"cfdg.diffusion_batch_size {self.diffusion_batch_size} and cfdg.online_rows "
                f"{self.online_rows} leave no row of one label; give more rows"
            )
        if self.offline_share > 0.0 and not self.counts()[0]:
            raise ValueError(
                f"cfdg.samples {self.samples} leaves no offline-like row at cfdg.offline_share "
                f"{self.offline_share}; give more samples, or an offline_share of 0"
            )
