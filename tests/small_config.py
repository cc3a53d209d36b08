"""Settings in miniature: a config with a nested block, and its command line."""

from dataclasses import dataclass, field
from typing import (
    ClassVar,
    Optional,
)  # pyrallis, which prints --help, does not know X | None

from corl.config import FinetuneConfig, parse_config


@dataclass
class Block:
    """A nested block of settings."""

    cap: Optional[int] = 32  # noqa: UP045 most pairs
    scale: float = 1.0  # weight
    on: bool = True  # switch

    def __post_init__(self):
        if self.scale < 0:
            raise ValueError(f"dare.scale must not be negative, not {self.scale}")


@dataclass
class Config:
    """What a run needs of a config."""

    env: str = "hopper-medium-v2"  # task
    seed: int = 0  # seeds everything
    lr: float = 3e-4  # learning rate
    compat: bool = False  # faults
    dataset_path: Optional[str] = None  # noqa: UP045 file
    offline_iterations: int = 4  # updates
    online_iterations: int = 6  # environment steps
    device: str = "cpu"  # device
    runs_dir: str = "runs"  # where
    resume: Optional[str] = None  # noqa: UP045 run folder
    wandb_mode: str = "disabled"  # wandb
    project: str = "CORL"  # wandb project
    group: str = "G"  # wandb group
    name: str = "X"  # first part of the folder's name
    dare: Block = field(default_factory=Block)

    RESUMABLE: ClassVar[frozenset] = FinetuneConfig.RESUMABLE


def parse(*argv):
    """A config from a command line."""
    return parse_config(Config, [str(a) for a in argv])
