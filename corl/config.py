"""The fields that all algorithms share, and the command line of an algorithm file.

pyrallis, which CORL uses, only prints `--help` here. The command line is our own: it knows
`--config`, `--resume`, nested fields and `none`. How values become a config is in `layers`.
"""

import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Optional, Union

import pyrallis

from corl import compiled, ranges, tasks
from corl.layers import (
    ConfigError,
    FlagText,
    aliases_of,
    build,
    check,
    expand,
    merged,
    presets_help,
    read_yaml,
    shown,
    with_field_names,
    with_preset,
    without_foreign_blocks,
    without_idle,
    without_preset,
)

# The most runs that one command starts.
MOST_SEEDS = 1000
# A value of `threads` and `compile`: `pace.settle` puts the chosen one in its place.
AUTO = "auto"


# ---------------------------------------------------------------- common fields


@dataclasses.dataclass
class FinetuneConfig:
    """The fields of every algorithm's config; an algorithm adds its own and changes defaults.

    Tables below the fields say what else must be known of them. An algorithm extends them beside
    its own fields: `ONLINE = FinetuneConfig.ONLINE | {"mixing_ratio"}`.
    """

    # Experiment
    device: str = "auto"  # auto, cpu, cuda
    env: str = "hopper-medium-v2"  # D4RL task name, or gymnasium id: MODULE:MyEnv-v0
    seed: int = 0  # seeds networks, batches, exploration and the training environment
    seeds: Optional[str] = None  # several runs in one command: 0-7 or 0,3,5
    seeds_as: str = "auto"  # stacked: one process; processes; auto: stacked on a GPU
    eval_seed: int = 0  # seeds the evaluation episodes
    eval_freq: int = 5000  # updates between two evaluations
    n_episodes: int = 10  # episodes per evaluation
    offline_iterations: int = 1000000  # updates on the dataset alone
    online_iterations: int = 1000000  # environment steps of fine-tuning
    checkpoints_path: Optional[str] = None  # also write CORL's checkpoint_N.pt here
    load_model: str = ""  # CORL checkpoint to start from; {seed} in it for several seeds
    # Common to the algorithms
    buffer_size: int = 2000000  # transitions per buffer
    batch_size: int = 256  # transitions per update
    discount: float = 0.99  # discount factor
    normalize: bool = True  # normalize states with the dataset's mean and std
    normalize_reward: bool = False  # scale rewards; the algorithm says how
    # Not in CORL
    utd: int = 1  # updates per environment step online
    online_warmup: int = 0  # online steps before the first online update (PEX: 5000)
    sampling: str = "uniform"  # rows of online batches: uniform, on_policy (ARB)
    sampling_temperature: float = 5.0  # on_policy: the higher, the more uniform
    sampling_refresh: int = 1000  # on_policy: updates between two looks at all rows
    sampling_unit: str = "trajectory"  # on_policy: what has one weight, or transition
    eval_early: Optional[str] = None  # further online evaluations, at steps 1000,2000
    eval_switch: int = 0  # episodes of one more evaluation at the switch; 0: none
    eval_together: bool = False  # episodes side by side: faster, other float32 rounding
    compat: bool = False  # reproduce upstream's known faults (see the file header)
    dataset_source: str = "auto"  # auto, file, d4rl_dir, d4rl, minari, self-collected
    dataset_path: Optional[str] = None  # file, folder of episodes or minari:ID to use
    dataset_rows: Optional[int] = None  # rows of the self-collected stand-in
    env_backend: str = "gymnasium"  # gymnasium, or d4rl for the old gym + d4rl stack
    horizon: Optional[int] = None  # of a gymnasium id: time limit in steps
    ref_min_score: Optional[float] = None  # of a gymnasium id: return of the score 0
    ref_max_score: Optional[float] = None  # return of the score 100
    log_freq: int = 500  # updates between two rows of metrics.csv
    threads: Union[int, str] = "auto"  # torch CPU threads; auto: chosen at the start
    compile: Union[bool, str] = "auto"  # updates as one compiled graph; auto: if it pays
    runs_dir: str = "runs"  # where run folders are made
    resume: Optional[str] = None  # run folder to go on with
    wandb_mode: str = "disabled"  # disabled, offline, online
    # Wandb
    project: str = "CORL"  # wandb project
    group: str = "D4RL"  # wandb group
    name: str = "run"  # first part of the run folder's name

    # Where a number may lie. Every field that is a number has an entry.
    RANGES: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("seed", "eval_seed"), "[0, 4294967295]"),
        **dict.fromkeys(("eval_freq", "log_freq", "utd"), "[1, 1e9]"),
        "offline_iterations": "[0, 1e9]",
        "online_iterations": "[0, 1e9]",
        "online_warmup": "[0, 1e9]",
        # The authors' smallest temperature; below it weights vanish in float32.
        "sampling_temperature": "[0.2, inf)",
        "sampling_refresh": "[1, 1e9]",
        "n_episodes": "[1, 1e6]",
        "eval_switch": "[0, 1e6]",
        # The memory of the machine bounds them, too; see `training_data.check_memory`.
        **dict.fromkeys(("buffer_size", "batch_size"), "[1, 1e10]"),
        **dict.fromkeys(("dataset_rows", "horizon"), "[2, 1e9]"),
        **dict.fromkeys(("ref_min_score", "ref_max_score"), "(-inf, inf)"),
        "discount": "[0, 1]",
        "threads": "[1, 1024]",
    }
    # The values of a field that has few.
    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {
        "dataset_source": (
            "auto",
            "file",
            "d4rl_dir",
            "d4rl",
            "minari",
            "self-collected",
        ),
        "env_backend": ("gymnasium", "d4rl"),
        "wandb_mode": ("disabled", "offline", "online"),
        "seeds_as": ("auto", "stacked", "processes"),
        "sampling": ("uniform", "on_policy"),
        "sampling_unit": ("trajectory", "transition"),
    }
    # Files and folders that a run needs again: its config.yaml has them as absolute paths.
    PATHS: ClassVar[tuple[str, ...]] = ("checkpoints_path", "dataset_path", "load_model")
    # The offline phase does not read these, so runs that differ in nothing else can start from
    # one offline model. A field that is missing here costs a model that could have been shared;
    # one too many would share what must not be.
    ONLINE: ClassVar[frozenset] = frozenset(
        {
            *("online_iterations", "online_warmup", "utd", "load_model"),
            *("sampling", "sampling_temperature", "sampling_refresh", "sampling_unit"),
            *("eval_early", "eval_switch"),
        }
    )
    # These change no result.
    BOOKKEEPING: ClassVar[frozenset] = frozenset(
        {
            *("device", "threads", "runs_dir", "resume", "checkpoints_path"),
            *("wandb_mode", "project", "group", "name", "seeds", "seeds_as"),
        }
    )
    # A resume may change these.
    RESUMABLE: ClassVar[frozenset] = frozenset(
        {
            *("resume", "online_iterations", "wandb_mode", "device"),
            # The same data, which may have moved; its checksum is compared.
            *("dataset_path", "dataset_source"),
        }
    )
    # Other spellings of fields, upstream's: {"gamma": "discount"}. Files and flags may use them;
    # a resolved config holds the names of the fields.
    ALIASES: ClassVar[dict[str, str]] = {}
    # The field that seeds evaluations where `compat` reproduces upstream.
    COMPAT_EVAL_SEED: ClassVar[str] = "seed"
    # What a long run names for a first look in minutes.
    QUICK_START: ClassVar[str] = ""
    # What every result of the algorithm says of it: a word, a colon and why. Reports put the word
    # behind the name of the method.
    CAVEAT: ClassVar[str] = ""
    # Name -> values of fields that `preset: NAME` or `--preset NAME` sets in one word.
    PRESETS: ClassVar[dict] = {}

    def __post_init__(self) -> None:
        self._check_fields(self, "")
        for name, block in vars(self).items():
            if dataclasses.is_dataclass(block):
                self._check_fields(block, f"{name}.")
        self._check_eval_together()
        self.early_evaluations()
        if self.sampling == "on_policy" and self.compat:
            raise ValueError(
                "sampling on_policy is not in upstream's files, which compat reproduces; set one "
                "of them back"
            )
        self._check_env()
        for field, kind in (("threads", "a whole number"), ("compile", "true or false")):
            value = getattr(self, field)
            if isinstance(value, str) and value != AUTO:
                raise ValueError(f"{field} must be {AUTO} or {kind}, not {value!r}")
        if self.seeds is not None:
            seed_list(self.seeds)
        if self.compile is True:
            compiled.check(self.device)

    @staticmethod
    def _check_fields(values: Any, prefix: str) -> None:
        """Raises ValueError where a number or a choice of a config or a block is none."""
        ranges.check(getattr(values, "RANGES", {}), vars(values), prefix)
        for field, allowed in getattr(values, "CHOICES", {}).items():
            if getattr(values, field) not in allowed:
                raise ValueError(
                    f"{prefix}{field} {getattr(values, field)!r} is not one of "
                    f"{', '.join(allowed)}"
                )

    def _check_env(self) -> None:
        """The environment is made later; here its name and what is said of it are looked at."""
        if not tasks.is_gymnasium_id(self.env):
            try:
                tasks.task(self.env)
            except ValueError as error:
                raise ValueError(f"env: {error}") from None
            for field in ("horizon", "ref_min_score", "ref_max_score"):
                if getattr(self, field) is not None:
                    raise ValueError(f"{field} of {self.env} is D4RL's; leave it out")
        elif self.env_backend != "gymnasium":
            raise ValueError(f"env_backend of {self.env} must be gymnasium")
        low, high = self.ref_min_score, self.ref_max_score
        if low is None and high is None:
            return
        if low is None or high is None or not low < high:
            raise ValueError(
                f"ref_min_score {low} and ref_max_score {high} are the returns of the scores 0 "
                "and 100; give both, the lower one first, or neither"
            )

    def _check_eval_together(self) -> None:
        if self.eval_together and self.compat:
            raise ValueError(
                "eval_together runs episodes side by side, and compat one after the other as "
                "upstream does; set one of them to false"
            )
        if self.eval_together and self.env_backend != "gymnasium":
            raise ValueError(
                f"eval_together needs env_backend gymnasium, whose episodes can begin from one "
                f"random stream, not {self.env_backend}; set it to false"
            )

    def caveat(self) -> str:
        """What every result of a run says of it: `CAVEAT`, or what its settings make of that."""
        return self.CAVEAT

    def early_evaluations(self) -> tuple[int, ...]:
        """The online steps that `eval_early` names.

        Raises:
            ValueError: it names something else.
        """
        found: list[int] = []
        for part in (self.eval_early or "").replace(" ", "").split(","):
            if part and not re.fullmatch(r"[1-9]\d{0,9}", part, re.ASCII):
                raise ValueError(
                    f"eval_early must be online steps like 1000,2000, not "
                    f"{shown(self.eval_early)}"
                )
            found += [int(part)] if part else []
        return tuple(found)

    def uniform_steps(self) -> int:
        """First online steps with uniform actions in place of the policy's; a field may say it."""
        return 0

    def density_std(self) -> float:
        """Std that gives a policy without noise a density, of the largest action.

        For algorithms with the fields `policy_std` and `expl_noise`. That of a block of fields
        which is enabled comes first.

        Raises:
            ValueError: rows are weighted by that density, and there is none.
        """
        blocks = [b for b in vars(self).values() if getattr(b, "enabled", False)]
        given = [getattr(block, "policy_std", None) for block in blocks]
        given += [vars(self)["policy_std"], vars(self)["expl_noise"]]
        std = next(value for value in given if value is not None)
        if self.sampling == "on_policy" and not std > 0:
            raise ValueError(
                "sampling on_policy needs a policy with a density, and this one acts without "
                "noise; set policy_std"
            )
        return std

    def not_stacked(self) -> str:
        """Why the seeds of this config cannot be stacked, or ""; a block of fields may say so."""
        if self.compat:
            return "compat is for single runs"
        if self.sampling == "on_policy":
            return "sampling on_policy weighs the rows of each seed"
        if getattr(self, "actor_dropout", 0.0):
            return "actor_dropout draws its masks inside the network"
        blocks = [
            value for value in vars(self).values() if hasattr(value, "not_stacked")
        ]
        return next(filter(None, (block.not_stacked() for block in blocks)), "")

    def check_mixing_ratio(self, or_else: str = "") -> None:
        """Raises ValueError where `mixing_ratio` does not cut a batch into two whole halves."""
        # A field of the algorithms that have two buffers.
        ratio = vars(self)["mixing_ratio"]
        for name, block in vars(self).items() if ratio == 0 else ():
            if hasattr(block, "needs_offline_rows") and block.needs_offline_rows():
                raise ValueError(
                    f"mixing_ratio 0 leaves no offline row in a batch, and {name} needs some; "
                    f"give a share, or set {name}.enabled to false"
                )
        if not (self.batch_size * ratio).is_integer():
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split by mixing_ratio {ratio}: "
                f"both halves must be whole rows{or_else}"
            )


def seed_list(text: str) -> list[int]:
    """The seeds that `seeds` names: `0-7` is 0 to 7, `0,3,5` are three, `0-3,8` are five.

    Raises:
        ConfigError: it is no such list, names a seed twice, or more than `MOST_SEEDS`.
    """
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part, re.ASCII)
        if match is None:
            raise ConfigError(
                f"seeds must be like 0-7 or 0,3,5, not {shown(text)}; --seed takes one"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(
                f"seeds {part} ends before it begins; write {last}-{first}"
            )
        if len(found) + last - first >= MOST_SEEDS:
            raise ConfigError(f"seeds {shown(text)} are more than {MOST_SEEDS}")
        found += range(first, last + 1)
    twice = [seed for seed in found if found.count(seed) > 1]
    if twice:
        raise ConfigError(f"seeds {shown(text)} names seed {twice[0]} twice")
    ranges.check(
        {"seed": FinetuneConfig.RANGES["seed"]}, {"seed": max(found)}, "seeds: "
    )
    return found


def _check_one_of(values: dict, origin: str) -> None:
    """Raises ConfigError where one place gives `seed` and `seeds`."""
    if values.get("seeds") is not None and "seed" in values:
        raise ConfigError(
            f"{origin}: seed and seeds are both given; leave one of them out"
        )


def arguments_of(
    function: Callable[..., Any], config: Any, **others: Any
) -> dict[str, Any]:
    """Arguments of a function or class: the config's fields of these names; `others` win."""
    names = inspect.signature(function).parameters
    found = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return {**found, **others}


# ---------------------------------------------------------------- reading


def parse_config(config_class: type, argv: Sequence[str] | None = None) -> Any:
    """`--config FILE` and `--field value` flags -> an instance of the config dataclass.

    Flags win over the file; `--config_path` is CORL's spelling of `--config`; nested fields are
    `--block.field 32`. `--resume RUN` takes the run's own config. Bad input ends the program with
    one line and exit status 2.

    Args:
        config_class: dataclass with defaults; its `RESUMABLE` says what a resume may change.
        argv: arguments without the program's name; default: the command line's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "-h" in argv or "--help" in argv:
        print("--config FILE reads a YAML file; flags win over it.\n")
        pyrallis.argparsing.ArgumentParser(config_class).print_help()
        for alias, name in aliases_of(config_class).items():
            print(f"--{alias} is another spelling of --{name}")
        print(presets_help(config_class), end="")
        raise SystemExit(0)
    try:
        return _parse(config_class, argv)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _parse(config_class: Any, argv: list[str]) -> Any:
    flags = with_field_names(config_class, _read_flags(argv), "the command line")
    files: list[str] = [
        flags.pop(name) for name in ("config", "config_path") if name in flags
    ]
    origin = "the command line"
    values: dict[str, Any] = {}
    if flags.get("resume"):
        folder = expand(flags["resume"])
        other = [f for f in flags if f not in config_class.RESUMABLE] + files
        if other:
            raise ConfigError(
                f"--resume uses the run's own config; leave out {other[0]} (only "
                f"{', '.join(sorted(config_class.RESUMABLE - {'resume'}))} may change)"
            )
        if not (folder / "config.yaml").is_file():
            raise ConfigError(f"--resume {folder}: no run here (no config.yaml)")
        files = [str(folder / "config.yaml")]
    for file in files:
        origin = str(file)
        values.update(with_field_names(config_class, read_yaml(file), origin))
    values = without_foreign_blocks(config_class, values, origin)
    _check_one_of(values, origin)
    _check_one_of(flags, "the command line")
    # A flag wins over the file, which may say the same thing in the other way.
    for flag, replaced in (("seed", "seeds"), ("seeds", "seed"), ("preset", "preset")):
        if flag in flags:
            values.pop(replaced, None)
    values = with_preset(config_class, values, origin)
    try:
        check(config_class, values, origin)
    except ConfigError as error:
        if not flags.get("resume"):
            raise
        raise ConfigError(
            f"{error}; is it a run of another algorithm, or was the file edited?"
        ) from None
    if values.get("resume") and "resume" not in flags:
        raise ConfigError(f"{origin}: resume is a flag, --resume RUN; take it out here")
    given = without_preset(config_class, _nested(flags), "the command line")
    given = with_preset(config_class, given, "the command line")
    values = merged(without_idle(config_class, values, given, origin), given)
    return build(config_class, check(config_class, values, "command line"))


def _nested(flags: dict[str, Any]) -> dict[str, Any]:
    """`a.b` -> value as `a` -> `b` -> value."""
    nested: dict[str, Any] = {}
    for name, value in flags.items():
        target = nested
        *blocks, last = name.split(".")
        for block in blocks:
            if target.get(block) is None:
                target[block] = {}
            target = target[block]
            if not isinstance(target, dict):
                raise ConfigError(
                    f"--{name}: {block} is set to {shown(target)}, no block"
                )
        target[last] = value
    return nested


def _read_flags(argv: list[str]) -> dict[str, FlagText]:
    flags: dict[str, FlagText] = {}
    i = 0
    while i < len(argv):
        match = re.fullmatch(r"--([\w.]+)(?:=(.*))?", argv[i], re.DOTALL)
        if match is None:
            raise ConfigError(f"cannot read {shown(argv[i])}; write --field value")
        name, value = match.groups()
        if value is None:
            i += 1
            if i == len(argv) or argv[i].startswith("--"):
                raise ConfigError(f"--{name} needs a value")
            value = argv[i]
        # An empty shell variable must not start another run than the one that is meant.
        if not value and name in ("resume", "config", "config_path"):
            raise ConfigError(f"--{name} needs a value, not ''")
        if flags.get(name, value) != value:
            print(f"--{name} is given twice: {shown(value)} counts")
        flags[name] = FlagText(value)
        i += 1
    return flags


def main(
    train: Callable[[Any], Any], config_class: type, argv: Sequence[str] | None = None
) -> None:
    """The command line of an algorithm file: config, `train`, errors as one line.

    `argv` takes the place of the command line's arguments.

    Set CORL_DARE_TRACEBACK=1 to see where an error came from.
    """
    config = parse_config(config_class, argv)
    try:
        train(config)
    except KeyboardInterrupt as stop:
        print(": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        # A shell's for SIGINT, unless the run knows of another signal.
        raise SystemExit(getattr(stop, "status", 130)) from None
    except (ValueError, RuntimeError, ImportError, OSError, FloatingPointError) as error:
        if os.environ.get("CORL_DARE_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
