"""The fields that all SSAR algorithms have beside those of their base."""

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from adaptive_regularization.coefficient import ANNEALING, annealing

# What each buffer mode is as the offline share of an online batch; none: there is one buffer.
MODES: dict[str, Optional[float]] = {"all": None, "half": 0.5, "part": 0.0, "none": 0.0}


@dataclass
class SelectiveFields:
    """Trusted rows, coefficient, threshold, annealing and the buffer online.

    The defaults are the public code's; the preset `paper` sets what the paper has otherwise.
    """

    # The trusted rows
    trust_by: str = "return"  # what is trusted: return, iql, success, all (see the docs)
    # Trajectories of a higher raw return; for D4RL's data
    trust_return: Optional[float] = None
    # Best share of the trajectories; for self-collected data, or without trust_return
    trust_share: Optional[float] = 0.1
    trust_penalty: bool = True  # the penalty is on trusted rows alone (Eq. 10, 14)
    filter_updates: int = 1000000  # iql: updates of the filter before the offline phase
    filter_tau: float = 0.7  # iql: its expectile
    # The coefficient
    beta_lr: float = 1e-8  # its learning rate
    n_start: float = 1.0  # first threshold, in deviations from the policy's mean
    n_end: float = 3.0  # highest threshold
    n_period: int = 50000  # updates between two checks of the threshold
    # Raises from n_start to n_end; none: one for each check of the offline phase (Eq. 8)
    n_raises: Optional[int] = 10
    # Online
    beta_anneal: str = "linear"  # how the coefficient falls: linear, cosine, none
    beta_anneal_steps: int = 400000  # steps after the warm-up until it is 0
    # What the buffer starts with: all, part, none; half: there are two of them
    buffer_mode: str = "part"
    part_rows: str = "best"  # part: the best trajectories (best), or the trusted rows
    part_trajectories: int = 50  # best: how many
    # Trust of new rows: inherited (in part, of the row that had the place), or all
    online_trust: str = "inherited"
    mixing_ratio: Optional[float] = None  # half: offline share of a batch; none: 0.5

    RANGES: ClassVar[dict[str, str]] = {
        "trust_return": "(-inf, inf)",
        "trust_share": "(0, 1]",
        "filter_updates": "[0, 1e9]",
        "filter_tau": "(0, 1)",
        "beta_lr": "(0, inf)",
        **dict.fromkeys(("n_start", "n_end"), "(0, 1000]"),
        **dict.fromkeys(("n_period", "n_raises", "part_trajectories"), "[1, 1e9]"),
        "beta_anneal_steps": "[1, 1e9]",
        "mixing_ratio": "[0, 1)",
    }
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "trust_by": ("return", "iql", "success", "all"),
        "beta_anneal": ANNEALING,
        "buffer_mode": tuple(MODES),
        "part_rows": ("best", "trusted"),
        "online_trust": ("inherited", "all"),
    }
    ONLINE: ClassVar[frozenset[str]] = frozenset(
        {
            *("beta_anneal", "beta_anneal_steps", "buffer_mode", "mixing_ratio"),
            *("part_rows", "part_trajectories", "online_trust"),
        }
    )
    # The public code's names.
    ALIASES: ClassVar[dict[str, str]] = {
        "offline_timesteps": "offline_iterations",
        "online_timesteps": "online_iterations",
        "warmup_steps": "online_warmup",
        "loosen_bound": "trust_penalty",
        "iql_tau": "filter_tau",
        "min_n_away": "n_start",
        "max_n_away": "n_end",
        "update_period": "n_period",
        "decay_steps": "beta_anneal_steps",
        "load_way": "buffer_mode",
    }
    PAPER: ClassVar[dict[str, Any]] = {
        "n_raises": None,
        "beta_anneal": "linear",
        "part_rows": "trusted",
        "online_trust": "all",
    }

    def check_selective(self) -> None:
        """Settle `mixing_ratio`; the ranges have been checked.

        Raises:
            ValueError: fields that do not go together.
        """
        if self.n_end < self.n_start:
            raise ValueError(f"n_end {self.n_end} lies below n_start {self.n_start}")
        if self.trust_by == "return" and self.trust_return is self.trust_share is None:
            raise ValueError(
                "trust_by return needs trust_return (of D4RL data) or trust_share; set one"
            )
        if not self.mixing_ratio:
            self.mixing_ratio = MODES[self.buffer_mode]
        elif self.buffer_mode != "half":
            raise ValueError(
                f"mixing_ratio {self.mixing_ratio} belongs to buffer_mode half, not to "
                f"{self.buffer_mode}; leave it out"
            )

    def not_stacked(self) -> str:
        """Why the seeds of this config cannot be stacked."""
        return "each seed has a threshold and trusted rows of its own"

    def raises(self, offline_updates: int) -> int:
        """How often the threshold rises from n_start to n_end."""
        if self.n_raises is not None:
            return self.n_raises
        return max(offline_updates // self.n_period, 1)

    def decay(self, steps: int) -> float:
        """Factor on the coefficient so many environment steps after the warm-up."""
        return annealing(steps, self.beta_anneal_steps, self.beta_anneal)
