"""The fields that both FamO2O algorithms have beside those of their base."""

from dataclasses import dataclass
from typing import ClassVar, Optional


@dataclass
class FamilyFields:
    """The range of the coefficients, how networks are told of one, and the balance model's rate.

    The defaults are those of the IQL form on locomotion.
    """

    beta_low: float = 1.0  # lowest coefficient of the family
    beta_high: float = 5.0  # highest; as beta_low: a family of one
    encoding_base: float = 10000.0  # networks see sines of beta / base^(i / pairs)
    encoding_pairs: int = 3  # and as many cosines
    balance_lr: float = 3e-4  # learning rate of the balance model
    mixing_ratio: Optional[float] = None  # offline share of a batch; none: one buffer

    RANGES: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("beta_low", "beta_high"), "[0, 1e6]"),
        "encoding_base": "[1, 1e12]",
        "encoding_pairs": "[1, 1000]",
        "balance_lr": "(0, inf)",
        "mixing_ratio": "[0, 1)",
    }
    ONLINE: ClassVar[frozenset[str]] = frozenset({"mixing_ratio"})

    def check_family(self) -> None:
        """The ranges have been checked.

        Raises:
            ValueError: the range of the coefficients ends before it begins.
        """
        if self.beta_high < self.beta_low:
            raise ValueError(
                f"beta_high {self.beta_high} lies below beta_low {self.beta_low}; "
                "give the range of the coefficients in order"
            )
