"""The fields that all OPT algorithms have beside those of their base."""

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

# Where the batches of the online phase come from.
REPLAYS = ("balanced", "uniform")


@dataclass
class OptFields:
    """The pre-training of the online critics, their share in the policy's objective, the replay."""

    # Pre-training, when the warm-up is over
    pretrain_updates: int = 50000  # updates of the online critics
    inner_lr: float = 3e-4  # step along the offline loss, before the online loss
    weigh_outer: bool = True  # online loss times min(L_off, L_on) / L_on, see docs
    # The share kappa of the online critics in what the policy maximizes
    kappa_start: float = 0.3  # when the warm-up is over
    kappa_end: float = 0.9  # from the online step kappa_steps on; on a line in between
    kappa_steps: int = 150000  # online steps, with those of the warm-up
    # Replay
    replay: str = "balanced"  # rows of online batches: balanced (by priority), uniform
    density_lr: float = 3e-4  # learning rate of the density network
    density_temperature: float = 5.0  # priority: density to the power of 1 / temperature
    # Rows that have a priority, the newest; none: all (the port: 1000000)
    priority_capacity: Optional[int] = None

    RANGES: ClassVar[dict[str, str]] = {
        "pretrain_updates": "[0, 1e9]",
        **dict.fromkeys(("inner_lr", "density_lr"), "(0, inf)"),
        **dict.fromkeys(("kappa_start", "kappa_end"), "[0, 1]"),
        "kappa_steps": "[1, 1e9]",
        "density_temperature": "(0, inf)",
        "priority_capacity": "[1, 1e10]",
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "replay": REPLAYS,
        # The balanced replay is how rows are sampled here.
        "sampling": ("uniform",),
    }
    ONLINE: ClassVar[frozenset[str]] = frozenset(
        {
            *("pretrain_updates", "inner_lr", "weigh_outer"),
            *("kappa_start", "kappa_end", "kappa_steps"),
            *("replay", "density_lr", "density_temperature", "priority_capacity"),
        }
    )
    # Without a type it is no field: there are two buffers, and no batch is mixed by a fixed ratio.
    mixing_ratio = 0.5

    def check_opt(self) -> None:
        """Raises ValueError where fields do not go together; the ranges have been checked."""
        config: Any = self
        if (
            self.pretrain_updates
            and config.online_iterations
            and not config.online_warmup
        ):
            raise ValueError(
                "online_warmup 0 leaves no online row for pretrain_updates "
                f"{self.pretrain_updates}; set online_warmup to at least 1, or pretrain_updates "
                "to 0"
            )

    def not_stacked(self) -> str:
        """Why the seeds of this config cannot be stacked."""
        return "each seed has priorities of its own"

    def kappa_after(self, steps: int) -> float:
        """Share of the online critics after so many online steps."""
        config: Any = self
        warmup = config.online_warmup
        share = (steps - warmup) / max(self.kappa_steps - warmup, 1)
        share = min(max(share, 0.0), 1.0)
        return self.kappa_start + share * (self.kappa_end - self.kappa_start)
