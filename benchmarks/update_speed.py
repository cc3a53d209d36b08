"""Updates per second of the baselines and their DARE twins, and ratios between them.

    python benchmarks/update_speed.py [--corl PATH] [--algorithms iql cal_ql] [--threads 2]
                                      [--jax_corl PATH --jax_python PYTHON] [--seconds 2]
                                      [--device auto] [--out results/speed/FILE.json]

Every variant makes whole updates (batch, hook, losses, optimizers, energy) at batch 256 and
hopper sizes with the paper's networks, on random data. The ratio is to upstream CORL's file where
`--corl` names a checkout, else to our eager baseline. All ratios come from one run on one machine.
The variants take turns, round by round, so that a machine that gets slower slows all of them. The
first round warms up and compiles, and is dropped. The table shows the median over rounds, the
smallest and the largest. The networks are untrained, which changes no cost. In the `cached`
variants a reference never expires, and the offline buffer is so small that the warm-up fills most
of the cache: they show the cost late in a long run, not at its start.

An algorithm is one line of `SUBJECTS`. Its twin is measured where `algorithms/dare_NAME.py` exists.
"""

import argparse
import dataclasses
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from adaptive_regularization.trust import FlaggedBuffer
from algorithms import baq_cal_ql, dare_iql
from benchmarks import parity
from corl import arguments, commit, compiled, finetune, machine
from corl.buffers import upload
from corl.captured import Captured
from corl_dare import hook
from corl_dare.behavior import make_behavior_model
from corl_dare.config import PRESETS
from corl_dare.rows import draw_rows
from online_pretraining import replay

ROOT = Path(__file__).parent.parent
S, A, ROWS, TASK = 11, 3, 2000, "hopper-medium-v2"
RATIO = {"behavior": "mixture", "guidance_scale": 0.0, "score": "policy_ratio"}
LIKELIHOOD = {**RATIO, "score": "likelihood"}
PAPER = {"behavior": "diffusion", "guidance_scale": 8.0}
NEAR = {**PAPER, **PRESETS["near"]["dare"]}
# DARE-IQL as in configs/iql/quick_start.yaml.
FAST = {**RATIO, "backup_actions": 1}
CACHED = {**PAPER, "energy_update_freq": 10, "reference_max_age": 1_000_000_000}
# Name of a variant, with the algorithm's in the place of {} -> fields of the dare block, None for
# the baseline, and whether it is compiled.
Variants = dict[str, tuple[dict[str, Any] | None, bool]]
VARIANTS: Variants = {
    "{}": (None, False),
    "{}, compiled": (None, True),
    "DARE-{}, policy ratio": (RATIO, False),
    "DARE-{}, policy ratio, compiled (fast)": (RATIO, True),
    "DARE-{}, preset near": (NEAR, False),
    "DARE-{}, preset near, compiled": (NEAR, True),
    "DARE-{}, guided references, energy every update (paper)": (PAPER, False),
    "DARE-{}, guided references, energy every update, compiled": (PAPER, True),
}
# With a balanced replay a GPU does not tell row numbers, which guidance needs.
UNGUIDED: Variants = {
    name: (fields, compile)
    for name, (fields, compile) in VARIANTS.items()
    if fields is None or not fields["guidance_scale"]
}
IQL_VARIANTS: Variants = {
    "{}": (None, False),
    "{}, compiled": (None, True),
    "DARE-{}, policy ratio": (RATIO, False),
    "DARE-{}, policy ratio, compiled": (RATIO, True),
    "DARE-{}, likelihood, compiled": (LIKELIHOOD, True),
    "DARE-{}, policy ratio, 1 backup action": (FAST, False),
    "DARE-{}, policy ratio, 1 backup action, compiled (fast)": (FAST, True),
    "DARE-{}, unguided references": ({"guidance_scale": 0.0}, False),
    "DARE-{}, guided references cached, energy every 10": (CACHED, False),
    "DARE-{}, guided references, energy every 10": (
        {**PAPER, "energy_update_freq": 10},
        False,
    ),
    "DARE-{}, preset near": (NEAR, False),
    "DARE-{}, preset near, compiled": (NEAR, True),
    "DARE-{}, guided references, energy every update (paper)": (PAPER, False),
    "DARE-{}, guided references, energy every update, compiled": (PAPER, True),
}


def plain_update(
    module: ModuleType, trainer: Any, source: Any, config: Any
) -> Callable[[], Any]:
    """A callable that makes one online update on a batch of the source."""
    # A file whose online update is another one is told the phase.
    phase = (True,) if "online" in inspect.signature(module.step).parameters else ()
    return lambda: module.step(trainer, source, config, *phase)


# What makes the batches of an algorithm, and the halves that its twin draws from.
Rows = tuple[Any, Sequence[Any]]


def opt_rows(trainer: Any, config: Any, source: finetune.MixedBuffer) -> Rows:
    """OPT's balanced replay of all rows."""
    made = replay.Replay(
        config,
        source.offline,
        source.online,
        finetune.JoinedBuffer(source.offline, source.online),
        (S, A),
        trainer.draws,
        compiled.descend,
        compiled.CompiledUpdate if config.compile else None,
    )
    made.written = ROWS
    return made, made.halves()


def flagged_rows(trainer: Any, config: Any, source: finetune.MixedBuffer) -> Rows:
    """SSAR's rows, which tell whether they are trusted: here every third is."""
    halves = [
        FlaggedBuffer(buffer, ROWS, trainer.device, upload)
        for buffer in (source.offline, source.online)
    ]
    for half in halves:
        half.trust(np.arange(ROWS) % 3 == 0)
    return halves[1], halves


def baq_rows(trainer: Any, config: Any, source: finetune.MixedBuffer) -> Rows:
    """BAQ's rows, drawn by their priorities and weighed by the clone."""
    halves = source.offline, source.online
    parts = SimpleNamespace(
        offline_buffer=halves[0],
        online_buffer=halves[1],
        mixed=source,
        sizes=(S, A, 1.0),
        device=trainer.device,
        facts=lambda: {"online_steps": lambda: 0},
        keep=lambda name, part: part,
    )
    rows = baq_cal_ql.Behavior(parts, config)
    rows.calibrate(lambda line: None)
    return rows, halves


class Subject(NamedTuple):
    """An algorithm that is measured: `algorithms/NAME.py`, and `dare_NAME.py` where there is one.

    Attributes:
        title: its name in the table.
        upstream: its file below CORL's `algorithms/`; None: CORL has none in PyTorch.
        trainer: (upstream's module, config) -> upstream's trainer; None where it has none.
        settings: fields of the config that are not the defaults.
        variants: what is measured of it.
        online: (trainer, config) -> None: the change to the online phase, where it has a cost.
        rows: (trainer, config, buffer of both halves) -> `Rows`; None: the halves as they are.
    """

    title: str
    upstream: str | None
    trainer: Callable[[Any, Any], Any] | None
    settings: dict[str, Any] = {}
    variants: Variants = VARIANTS
    online: Callable[[Any, Any], Any] = lambda trainer, config: None
    rows: Callable[[Any, Any, Any], Rows] | None = None


CQL = {"q_n_hidden_layers": 3, "bc_steps": 0}
# Batches of halves, as those of the other algorithms here.
HALVES = {"buffer_mode": "half"}
JAX = "JAX-CORL's iql.py, offline"
SUBJECTS = {
    "iql": Subject("IQL", "finetune/iql.py", parity.iql_trainer, variants=IQL_VARIANTS),
    "cal_ql": Subject(
        "Cal-QL",
        "finetune/cal_ql.py",
        parity.cql_trainer,
        CQL,
        online=lambda trainer, config: trainer.start_online(config.cql_alpha_online),
    ),
    "td3_bc": Subject("TD3+BC", "offline/td3_bc.py", parity.actor_critic_trainer),
    "awac": Subject("AWAC", "finetune/awac.py", parity.actor_critic_trainer),
    "spot": Subject("SPOT", "finetune/spot.py", parity.spot_trainer),
    "cql": Subject("CQL", "finetune/cql.py", parity.cql_trainer, CQL),
    # CORL's file is JAX. DARE's policy ratio needs a policy with noise.
    "rebrac": Subject("ReBRAC", None, None, {"expl_noise": 0.1}),
    "rlpd": Subject("RLPD", None, None),
    "wsrl": Subject("WSRL", None, None),
    "famo2o_iql": Subject("FamO2O-IQL", None, None),
    "famo2o_cql": Subject("FamCQL", None, None),
    "opt_td3": Subject("TD3+OPT", None, None, rows=opt_rows),
    "opt_spot": Subject("SPOT+OPT", None, None, variants=UNGUIDED, rows=opt_rows),
    "e2o": Subject("E2O", None, None),
    "pex": Subject(
        "PEX", None, None, online=lambda trainer, config: trainer.start_online()
    ),
    "cql_sa": Subject(
        "CQL(SA)",
        None,
        None,
        HALVES,
        online=lambda trainer, config: trainer.start_online(),
        rows=flagged_rows,
    ),
    "td3_bc_sa": Subject(
        "TD3+BC(SA)",
        None,
        None,
        HALVES,
        online=lambda trainer, config: trainer.start_online(config.policy_freq_online),
        rows=flagged_rows,
    ),
    "baq_cal_ql": Subject(
        "BAQ-Cal-QL",
        None,
        None,
        CQL,
        online=lambda trainer, config: trainer.start_online(config.cql_alpha_online),
        rows=baq_rows,
    ),
}


def files_of(algorithm: str) -> list[ModuleType]:
    """The algorithm's own file and, where there is one, its DARE twin."""
    names = [algorithm, f"dare_{algorithm}"]
    found = [name for name in names if (ROOT / f"algorithms/{name}.py").is_file()]
    return [importlib.import_module(f"algorithms.{name}") for name in found]


def variants_of(algorithm: str) -> Variants:
    """What is measured of an algorithm, by the names in the table."""
    subject, twins = SUBJECTS[algorithm], files_of(algorithm)[1:]
    return {
        name.format(subject.title): (fields, compile)
        for name, (fields, compile) in subject.variants.items()
        if fields is None or twins
    }


def random_buffer(module, device: str, seed: int):
    """A replay buffer of `module`, full of random rows."""
    rng = np.random.default_rng(seed)
    keeps = getattr(module.TrainConfig, "MC_RETURNS", False)
    extra = {"mc_returns": True} if keeps else {}
    if getattr(module.TrainConfig, "NEXT_ACTIONS", False):
        extra = {"next_actions": True}
    # A file that has no such name takes the host's.
    kind = getattr(module, "ReplayBuffer", finetune.ReplayBuffer)
    buffer = kind(S, A, ROWS, device, **extra)
    buffer.load_d4rl_dataset(
        {
            "observations": rng.normal(size=(ROWS, S)),
            "actions": rng.uniform(-1, 1, (ROWS, A)),
            "rewards": rng.normal(size=ROWS),
            "next_observations": rng.normal(size=(ROWS, S)),
            "terminals": np.zeros(ROWS),
            "mc_returns": rng.normal(size=ROWS),
            "next_actions": rng.uniform(-1, 1, (ROWS, A)),
        }
    )
    return buffer


def upstream_update(algorithm: str, corl: Path, device: str):
    """A callable that makes one online update of an upstream file."""
    subject = SUBJECTS[algorithm]
    assert subject.upstream is not None and subject.trainer is not None
    module = parity.load(corl / "algorithms" / subject.upstream)
    baseline = files_of(algorithm)[0]
    config = baseline.TrainConfig(env=TASK, device=device, **subject.settings)
    trainer = subject.trainer(module, config)
    # Those of the parity check are built on the CPU.
    for part in list(vars(trainer).values()):
        if isinstance(part, torch.nn.Module):
            part.to(device)
    for name in ("device", "_device"):
        if hasattr(trainer, name):
            setattr(trainer, name, device)
    buffer = random_buffer(module, device, 0)
    return lambda: trainer.train([x.to(device) for x in buffer.sample(256)])


class JaxUpdates:
    """Updates of JAX-CORL's IQL in a process of its own, see `jax_updates.py`."""

    def __init__(self, python: Path, corl: Path, threads: int):
        worker = Path(__file__).with_name("jax_updates.py")
        numbers = map(str, (threads, ROWS, S, A))
        self.process = subprocess.Popen(
            [str(python), str(worker), str(corl / "algos/iql.py"), *numbers],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if self._answer() != ["ready"]:
            raise RuntimeError(
                f"{python} cannot run {corl / 'algos/iql.py'}: it needs jax, flax, optax, "
                "distrax and numpy"
            )

    def _answer(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def rate(self, seconds: float) -> float:
        """Updates per second."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        count, took = map(float, self._answer())
        return count / took

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def our_update(algorithm: str, fields: dict | None, compile: bool, device: str):
    """A callable that makes one online update of a variant."""
    torch.manual_seed(0)
    subject = SUBJECTS[algorithm]
    settings = subject.settings
    module = files_of(algorithm)[0 if fields is None else 1]
    offline, online = (random_buffer(module, device, seed) for seed in (0, 1))
    buffers: Sequence[Any] = (offline, online)
    source: Any = finetune.MixedBuffer(offline, online, 0.5)
    if compile and compiled.on_gpu(device):
        for buffer in (offline, online, source):
            buffer.capture()
    if fields is not None:
        block = next(
            f for f in dataclasses.fields(module.TrainConfig) if f.name == "dare"
        )
        settings = {**settings, "dare": block.type(**fields)}
    if "mixing_ratio" in module.TrainConfig.__dataclass_fields__:
        settings = {**settings, "mixing_ratio": 0.5}
    config = module.TrainConfig(env=TASK, compile=compile, device=device, **settings)
    trainer = module.make_trainer(config, S, A, 1.0, device)
    subject.online(trainer, config)
    if subject.rows is not None:
        source, buffers = subject.rows(trainer, config, source)
    if fields is None:
        return plain_update(module, trainer, source, config)
    options = config.dare.behavior_options
    behavior = make_behavior_model(config.dare.behavior, S, A, seed=0, **options)
    source = hook.DareHook(
        *buffers,
        config.dare,
        behavior.to(device).requires_grad_(False),
        **module.hook_arguments(trainer),
        device=device,
        compile=functools.partial(compiled.function, device=device) if compile else None,
        capture=Captured if compile and compiled.on_gpu(device) else None,
    )
    if source.energy is not None:  # support actions are sampled once per transition
        rows = np.arange(ROWS)
        for buffer_rows in np.array_split(rows, 8):
            empty = buffer_rows[:0]
            for pair in ([buffer_rows, empty], [empty, buffer_rows]):
                buffer = offline if len(pair[0]) else online
                source.support(draw_rows(buffer, buffer_rows)[0], pair)
    return plain_update(module, trainer, source, config)


def measure(
    updates: dict, seconds: float, rounds: int, device: str
) -> dict[str, list[float]]:
    """Updates per second of every variant in every round, taking turns."""
    rates: dict[str, list[float]] = {name: [] for name in updates}
    for turn in range(rounds + 1):
        for name, update in updates.items():
            if isinstance(update, JaxUpdates):
                rate = update.rate(seconds)
                rates[name] += [rate] if turn > 0 else []
                continue
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds or count < 2:
                update()
                count += 1
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn > 0:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def main() -> None:
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--corl", type=arguments.path, help="a CORL checkout to compare with"
    )
    parser.add_argument(
        "--algorithms", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS)
    )
    parser.add_argument(
        "--seconds",
        type=arguments.number(float, "(0, 1e6]"),
        default=2.0,
        help="per variant and round",
    )
    parser.add_argument("--match", help="only variants with this regular expression")
    parser.add_argument("--rounds", type=arguments.number(int, "[1, 1e6]"), default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=arguments.number(int, "[1, 1024]"), default=1)
    parser.add_argument("--out", type=arguments.path, help="write the numbers as JSON")
    parser.add_argument("--jax_corl", type=arguments.path, help="a JAX-CORL checkout")
    parser.add_argument(
        "--jax_python",
        type=arguments.path,
        help="a Python with jax, flax, optax, distrax",
    )
    args = parser.parse_args()
    if (args.jax_corl is None) != (args.jax_python is None):
        parser.error("--jax_corl and --jax_python need each other")
    if args.corl is not None and not (args.corl / "algorithms").is_dir():
        parser.error(f"{args.corl} is no folder of CORL")
    with arguments.errors_in_one_line():
        device = machine.pick_device(args.device)
    machine.configure_threads(args.threads)
    parts = machine.describe()
    print(
        f"{parts['gpu'] if device != 'cpu' else parts['processor']}, device {device}, "
        f"{args.threads} thread(s), torch {torch.__version__}"
    )
    can_compile = True
    try:
        compiled.check(device)
    except ValueError as error:
        can_compile = False
        print(f"compiled variants are left out: {error}")
    with arguments.errors_in_one_line():
        measured = {
            algorithm: measure_algorithm(algorithm, args, device, can_compile)
            for algorithm in args.algorithms
        }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(
            json.dumps(record(args, measured, device), indent=2, allow_nan=False) + "\n"
        )


class Measured(NamedTuple):
    """What was measured of an algorithm: variant -> numbers.

    rates: updates per second of every round.
    memory: most memory (MB) on the GPU; empty on the CPU.
    """

    rates: dict[str, list[float]]
    memory: dict[str, float]


def measure_algorithm(
    algorithm: str, args: argparse.Namespace, device: str, can_compile: bool
) -> Measured:
    """Measure every variant of an algorithm and print their table."""
    make: dict[str, Callable[[], Callable[[], Any]]] = {}
    file = SUBJECTS[algorithm].upstream
    if args.corl is not None and file is not None:
        make[f"upstream CORL's {Path(file).name}"] = functools.partial(
            upstream_update, algorithm, args.corl, device
        )
    for name, (fields, compile) in variants_of(algorithm).items():
        # Upstream's row is always there: it is what the ratios are to.
        chosen = args.match is None or re.search(args.match, name)
        if chosen and (can_compile or not compile):
            make[name] = functools.partial(
                our_update, algorithm, fields, compile, device
            )
    updates: dict[str, Any] = {}
    memory: dict[str, float] = {}
    for name, made in make.items():
        if compiled.on_gpu(device):
            updates[name], memory[name] = peak_memory(made)
        else:
            updates[name] = made()
    if args.jax_corl is not None and algorithm == "iql" and device == "cpu":
        updates[JAX] = JaxUpdates(args.jax_python, args.jax_corl, args.threads)
    rates = measure(updates, args.seconds, args.rounds, device)
    if JAX in updates:
        updates[JAX].close()
    print(table(rates, memory), flush=True)
    return Measured(rates, memory)


def peak_memory(
    make: Callable[[], Callable[[], Any]],
) -> tuple[Callable[[], Any], float]:
    """The update that is made, and the most memory (MB) that it takes on the GPU."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    update = make()
    # The last ones run from graphs.
    for _ in range(5):
        update()
    return update, (torch.cuda.max_memory_allocated() - before) / 1e6


def record(
    args: argparse.Namespace, measured: dict[str, Measured], device: str
) -> dict[str, Any]:
    """The numbers and what they were measured with."""
    command = shlex.join(["python", "benchmarks/update_speed.py", *sys.argv[1:]])
    for path, published in (
        (args.corl, "upstream/CORL"),
        (args.jax_corl, "upstream/JAX-CORL"),
        (args.jax_python, "JAX_PYTHON"),
    ):
        # A published record names no path of the machine that made it.
        command = command.replace(str(path), published) if path else command
    return {
        "command": command,
        "updates_per_second": {name: found.rates for name, found in measured.items()},
        "peak_gpu_memory_mb": {name: found.memory for name, found in measured.items()},
        "settings": {
            name: {"dare": fields, "compile": compile}
            for algorithm in args.algorithms
            for name, (fields, compile) in variants_of(algorithm).items()
        },
        "defaults": dataclasses.asdict(dare_iql.DareIQLConfig()),
        "device": device,
        "threads": args.threads,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": machine.git_commit(),
        "upstream_commit": parity.make_patches.COMMIT if args.corl else None,
        "jax_corl_commit": commit.of_git(args.jax_corl / "algos/iql.py")
        if args.jax_corl
        else None,
    }


def table(rates: dict[str, list[float]], memory: dict[str, float] | None = None) -> str:
    """One line per variant; the ratio compares it with the first variant."""
    base, memory = statistics.median(next(iter(rates.values()))), memory or {}
    heading = f"{'updates per second: median (min-max)':>75}  ratio"
    lines = [heading + ("  peak MB" if memory else "")]
    for name, values in rates.items():
        median = statistics.median(values)
        spread = f"{median:8.1f} ({min(values):.1f}-{max(values):.1f})"
        peak = f" {memory[name]:8.0f}" if name in memory else ""
        lines.append(f"{name:<66} {spread:<22} {median / base:5.2f}{peak}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
