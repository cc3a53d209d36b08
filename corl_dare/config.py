"""The `dare:` block of a config: DARE's fields, their checks, and the metrics that come of them."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Optional

from corl_dare import ranges
from corl_dare.behavior import KINDS
from corl_dare.exchange import ALIGNMENTS, PERMUTATIONS, RULES, WEIGHTS

SCORES = ("reference", "likelihood", "policy_ratio")
# Weights that are the same for all rows of a batch: no score, and so no model, is needed.
ALIKE = ("uniform", "anneal")
# Fields that then have nothing to do.
SCORING = (
    *("score", "alignment", "alignment_sigma", "references", "reference_max_age"),
    *("rule", "cap", "permute", "skip_inverted"),
    *("behavior", "behavior_seed", "behavior_updates", "behavior_batch_size"),
    *("behavior_lr", "behavior_width", "sampler_steps"),
    *("guidance_scale", "energy_beta", "energy_lr", "energy_updates"),
    *("energy_update_freq", "energy_batch_states", "support_actions", "q_scale"),
)
# Every metric that `DareHook.sample` and `DareHook.update_energy` can return, and the one that a
# trainer adds.
LOGS = (
    "exchanged",
    "separation_point",
    "score_off_mean",
    "score_off_std",
    "score_on_mean",
    "score_on_std",
    "candidates_off",
    "candidates_on",
    "amplitude_before",
    "amplitude_after",
    "inverted",
    "refused",
    "references_clipped",
    "energy_loss",
    "weight_mean",
    "weight_zeros",
    "weight_ones",
    "em_share_off",
    "em_share_on",
    "em_statistic",
    # Mean of the conservative term over the rows, by their weights; see `Release.average`.
    "conservative_loss",
)
# Those that have no value in a batch whose exchange was refused, or whose weights are all 0.
UNDEFINED = (
    "em_share_off",
    "em_share_on",
    "em_statistic",
    "conservative_loss",
    "separation_point",
    "score_off_mean",
    "score_off_std",
    "score_on_mean",
    "score_on_std",
)
# Entries of a run's summary that are means of a metric over the online phase.
MEANS = {"exchanges_mean": "exchanged"}
# What a CPU cannot afford, in one word: name -> fields of a config with the block `dare:`. Fields
# that a preset leaves out stay as they are, so `paper` is what the defaults and the config files
# say. docs/speed.md has the reasons of each number.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    # The paper's kind of score, at a fraction of its cost.
    "near": {
        "dare": {
            "behavior_batch_size": 1024,
            "behavior_lr": 3e-4,
            "behavior_updates": 50_000,
            "behavior_width": 0.5,
            "energy_batch_states": 64,
            "energy_updates": 20_000,
            "sampler_steps": 8,
        }
    },
    # Another score: the log-ratio of two densities, without a diffusion model and guidance.
    "cpu": {
        "dare": {
            "behavior": "mixture",
            "behavior_batch_size": 256,
            "behavior_lr": 1e-3,
            "behavior_updates": 20_000,
            "guidance_scale": 0.0,
            "score": "policy_ratio",
        }
    },
}
# What a picture of a run shows below its score, as data that any host can draw. A band is
# (label, mean, standard deviation, color), a line (label, metric, color, style).
PANELS = (
    {
        "label": "exchanged pairs",
        "bottom": 0,
        "lines": [("", "exchanged", "#CC79A7", "-")],
    },
    {
        "label": "alignment score",
        "bands": [
            ("offline half, mean ± std", "score_off_mean", "score_off_std", "#0072B2"),
            ("online half, mean ± std", "score_on_mean", "score_on_std", "#D55E00"),
        ],
        "lines": [("separation point", "separation_point", "#009E73", "--")],
    },
)


@dataclass
class DareConfig:
    """DARE's fields, one nested block `dare:` of an algorithm's config."""

    enabled: bool = True  # false: the baseline, bit for bit
    # Score: how far is an action from the behavior?
    score: str = "reference"  # reference (paper), likelihood, policy_ratio
    # Distance to the reference; see exchange.alignment_score
    alignment: str = "gaussian_kl"
    # Std of that Gaussian; with one reference it decides nothing
    alignment_sigma: float = 1.0
    references: int = 1  # reference actions per row; the paper takes 1
    reference_max_age: int = 0  # updates a cached reference may serve; 0: always fresh
    # Exchange
    rule: str = "threshold"  # threshold (paper), posterior, em, direct, share, random
    cap: Optional[int] = None  # n, most pairs exchanged per batch; none: no cap
    # hard: 1 and 0; soft: the rule's P(offline-like | d). Without any score: uniform: `weight`;
    # anneal: from 1 down to `weight`
    weights: str = "hard"
    weight: float = 0.5  # uniform: of every row; anneal: the least
    # anneal: online steps until it would be 0, from the first update on; none: all of them
    anneal_steps: Optional[int] = None
    # By lot, who has the weights of the rule: none, half (among rows as drawn), batch (all rows)
    permute: str = "none"
    # Exchange nothing when online rows score below offline ones
    skip_inverted: bool = False
    # Behavior model (paper: diffusion, 600k updates of 4096 rows)
    behavior: str = "diffusion"  # diffusion, gaussian, mixture
    # Its seed; none: the seed of the run. With a number all seeds share one model
    behavior_seed: Optional[int] = None
    behavior_updates: int = 600000  # gradient steps on the dataset, before anything else
    behavior_batch_size: int = 4096  # rows per step
    behavior_lr: float = 1e-4  # Adam learning rate
    behavior_width: float = 1.0  # width of the diffusion network, 1: the paper's
    sampler_steps: int = 15  # network evaluations per reference action
    # Guidance (energy network)
    guidance_scale: float = 8.0  # s, paper Table 7 per dataset; 0: no guidance
    # Inverse temperature of the energy's labels softmax(beta Q)
    energy_beta: float = 3.0
    energy_lr: float = 3e-4  # Adam learning rate
    energy_updates: int = 100000  # energy steps between the offline and the online phase
    energy_update_freq: int = 1  # online updates per energy step
    energy_batch_states: int = 256  # states per energy step
    support_actions: int = 16  # behavior actions per state the energy is trained on
    # returns: Q as if the dataset's returns spanned 1000; literal: Q as it is
    q_scale: str = "returns"

    # What a field that names something may be.
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "score": SCORES,
        "rule": RULES,
        "weights": WEIGHTS + ALIKE,
        "permute": PERMUTATIONS,
        "alignment": ALIGNMENTS,
        "behavior": tuple(KINDS),
        "q_scale": ("returns", "literal"),
    }
    # Where a number may lie. Every field that is a number has an entry.
    RANGES: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("references", "sampler_steps", "support_actions"), "[1, 1e4]"),
        **dict.fromkeys(("behavior_batch_size", "energy_batch_states"), "[1, 1e6]"),
        **dict.fromkeys(("behavior_updates", "energy_update_freq"), "[1, 1e9]"),
        "weight": "[0, 1]",
        "anneal_steps": "[1, 1e9]",
        **dict.fromkeys(("cap", "reference_max_age", "energy_updates"), "[0, 1e9]"),
        **dict.fromkeys(("behavior_lr", "energy_lr"), "(0, inf)"),
        **dict.fromkeys(("alignment_sigma", "energy_beta"), "(0, inf)"),
        "behavior_width": "(0, 100]",
        "behavior_seed": "[0, 4294967295]",
        "guidance_scale": "[0, inf)",
    }
    # Field -> value -> fields that then have nothing to do. Whoever reads a config from several
    # places may leave out what an earlier place says of them.
    IDLE: ClassVar[dict[str, dict[str, tuple[str, ...]]]] = {
        "weights": {
            "hard": ("weight", "anneal_steps"),
            "soft": ("weight", "anneal_steps"),
            "uniform": (*SCORING, "anneal_steps"),
            "anneal": SCORING,
        }
    }

    def __post_init__(self) -> None:
        self._check_choices()
        ranges.check(self.RANGES, vars(self), "dare.")
        self._check_weights()
        self._check_combinations()

    @property
    def alike(self) -> bool:
        """Do all rows of a batch have the same weight, so that nothing is scored?"""
        return self.weights in ALIKE

    def weight_after(self, steps: int, length: int) -> float:
        """The weight of all rows after so many online steps of `length`, for weights `ALIKE`."""
        if self.weights == "uniform":
            return self.weight
        length = self.anneal_steps or max(length, 1)
        return max(self.weight, 1.0 - max(steps, 0) / length)

    def needs_offline_rows(self) -> bool:
        """Must a batch hold some offline rows?"""
        return self.enabled

    def not_stacked(self) -> str:
        """Why the hooks of several seeds cannot work as one, or ""."""
        if self.alike:
            return ""
        if self.enabled and (self.guided or self.score == "reference"):
            return "dare.score reference and guidance sample actions for each seed"
        if self.enabled and self.rule == "random":
            return "dare.rule random draws for each seed"
        return ""

    def _check_choices(self) -> None:
        for field, allowed in self.CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"dare.{field} must be one of {', '.join(allowed)}, "
                    f"not {getattr(self, field)!r}"
                )

    def _check_weights(self) -> None:
        idle = self.IDLE["weights"][self.weights]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in idle or value == field.default:
                continue
            why = "gives all rows one weight without a score"
            fix = "set dare.weights to hard or soft"
            if field.name not in SCORING:
                why, fix = "has no schedule", "set dare.weights to anneal"
                if not self.alike:
                    why = "takes the weights from scores"
                    fix = "set dare.weights to uniform or anneal"
            raise ValueError(
                f"dare.weights {self.weights} {why}, so dare.{field.name} {value} would do "
                f"nothing; leave it out (its default is {field.default}), or {fix}"
            )
        rules = "threshold", "em", "share"
        if self.weights == "soft" and (self.rule not in rules or self.cap is not None):
            raise ValueError(
                "dare.weights soft weighs each row by its own probability, so dare.rule "
                f"{self.rule} and dare.cap {self.cap} would do nothing; set them to threshold, em "
                "or share and to null, or dare.weights to hard"
            )

    def _check_combinations(self) -> None:
        if self.alike:
            return
        if self.rule == "share" and self.score != "policy_ratio":
            raise ValueError(
                f"dare.rule share needs log-density ratios, not dare.score {self.score}; "
                "set dare.score to policy_ratio"
            )
        if self.score != "reference" and self.behavior == "diffusion":
            raise ValueError(
                f"dare.score {self.score} needs the behavior's density, which the diffusion "
                "model does not have; set dare.behavior to mixture or gaussian"
            )
        if self.guided and self.behavior != "diffusion":
            raise ValueError(
                f"dare.behavior {self.behavior} cannot be guided; set dare.guidance_scale "
                "to 0, or dare.behavior to diffusion"
            )

    @property
    def guided(self) -> bool:
        """Does anything need the energy network?"""
        return not self.alike and self.score == "reference" and self.guidance_scale > 0

    @property
    def needs_rows(self) -> bool:
        """Must buffers tell which rows they drew, as array, since actions are kept per row?"""
        cached = self.score == "reference" and self.reference_max_age > 0
        return self.guided or (cached and not self.alike)

    @property
    def scales_q(self) -> bool:
        """Does anything need to know the span of the dataset's returns?"""
        return self.guided and self.q_scale == "returns"

    @property
    def behavior_options(self) -> dict[str, float]:
        """Options of `behavior.make_behavior_model` beyond the kind."""
        return {"width": self.behavior_width} if self.behavior == "diffusion" else {}


@dataclass
class NoisyDareConfig(DareConfig):
    """The block `dare:` of an algorithm whose policy is deterministic and explores with noise."""

    # Std that gives the policy a density for policy_ratio, of the largest action; none: that of
    # the exploration noise
    policy_std: Optional[float] = None

    RANGES: ClassVar[dict[str, str]] = DareConfig.RANGES | {"policy_std": "(0, inf)"}

    def only_release(self, field: str, value: str) -> str:
        """`keep`, the value of an algorithm's own schedule with which DARE alone releases.

        Raises:
            ValueError: the value is another one, and not `auto`.
        """
        if value not in ("auto", "keep"):
            raise ValueError(
                f"{field} {value} and dare would both release the conservative loss; set "
                f"{field} to keep, or dare.enabled to false"
            )
        return "keep"

    def density_std(self, exploration_noise: float) -> float:
        """The std of the policy's density, of the largest action.

        Raises:
            ValueError: the score needs a density, and a policy that acts without noise has none.
        """
        std = exploration_noise if self.policy_std is None else self.policy_std
        if self.enabled and self.score == "policy_ratio" and not std > 0:
            raise ValueError(
                "dare.score policy_ratio needs a policy with a density, and this one acts "
                "without noise; set dare.policy_std"
            )
        return std


@dataclass
class LagrangeDareConfig(DareConfig):
    """The block `dare:` of an algorithm whose gap may have a Lagrange multiplier as its weight."""

    # With cql_lagrange, the multiplier drives to 0: literal: mean(w gap) - target; weighted:
    # mean(w (gap - target))
    lagrange_gap: str = "weighted"

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = DareConfig.CHOICES | {
        "lagrange_gap": ("literal", "weighted"),
    }

    def check_multiplier(self) -> None:
        """Refuse a multiplier that would raise the weight of the gap by what is released.

        Raises:
            ValueError: it would, with weights that are the same for all rows.
        """
        if self.lagrange_gap == "literal":
            raise ValueError(
                f"dare.weights {self.weights} with cql_lagrange and dare.lagrange_gap literal "
                "would release nothing, since the multiplier makes up for it; set "
                "dare.lagrange_gap to weighted"
            )
