"""All experiments of one seed, and the command line."""

import dataclasses
import itertools
import sys
import time
from pathlib import Path

import torch

from benchmarks.exchange_accuracy import measure, report, store
from benchmarks.exchange_accuracy.models import Experiment, Models
from benchmarks.exchange_accuracy.rows import Rows, stack
from benchmarks.exchange_accuracy.scores import make_scores, score_rows
from benchmarks.exchange_accuracy.settings import LEVELS, SHARES, Settings
from corl import arguments, machine
from corl.data import sources
from corl.standin import policies

COMMAND = "python -m benchmarks.exchange_accuracy"
OUT = Path(__file__).parents[2] / "results" / "exchange_accuracy"


def run_seed(settings: Settings, levels: list[str], folder: Path) -> dict:
    """All experiments of one seed; what its JSON file holds.

    folder: where collected rows and fitted behavior models are kept.
    """
    start, commit, result = time.process_time(), machine.git_commit(), measure.Result()
    experiment = Experiment(settings, levels, folder)
    main_pair = tuple(levels[-2:])
    for pair in itertools.product(levels, repeat=2):
        print(f"{pair[0]} -> {pair[1]}: {time.process_time() - start:.0f} s", flush=True)
        measure_pair(experiment, result, pair, pair == main_pair)
    return {
        "command": " ".join([COMMAND, *sys.argv[1:]]),
        "settings": dataclasses.asdict(settings),
        "levels": levels,
        "main_pair": list(main_pair),
        "sources": experiment.sources,
        "policies": {
            x: policies.fingerprint(f"{settings.robot}-{x}-v2") for x in levels
        },
        "rows_on_the_bounds": experiment.clamped,
        "energy": experiment.fits,
        "processor_seconds": time.process_time() - start,
        "machine": machine.describe(),
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
        "commit": commit,
        "columns": result.COLUMNS,
        "tables": result.tables,
    }


def measure_pair(
    experiment: Experiment, result: measure.Result, pair: tuple[str, str], main: bool
) -> None:
    """Every setting of a pair (behavior, online); the main pair has more of them."""
    models = experiment.models(pair)
    pools = experiment.rollout_rows(pair)
    if pair[0] == pair[1]:
        # Identical policies: nothing is misplaced, whatever is exchanged.
        compare(experiment, result, "rollout", pair, models, pools, (0.0,))
        return
    compare(experiment, result, "rollout", pair, models, pools, SHARES)
    shared = experiment.shared_states(pair)
    compare(experiment, result, "shared states", pair, models, shared, (0.3,))
    if main:
        measure.time_scores(result, models, pools[0])
        fitted = experiment.fitted_rows(pair)
        compare(experiment, result, "fitted rows", pair, models, fitted, (0.3,))
        models = experiment.models(pair, share=0.3)
        compare(experiment, result, "contaminated fits", pair, models, pools, (0.3,))


def compare(
    experiment: Experiment,
    result: measure.Result,
    setting: str,
    pair: tuple[str, str],
    models: Models,
    pools: tuple[Rows, Rows],
    shares: tuple[float, ...],
) -> None:
    """Score two pools with all scores and evaluate them at every share."""
    settings = experiment.settings
    generator = torch.Generator().manual_seed(settings.seed)
    rows, off_rows = stack(*pools), len(pools[0].states)
    scores = make_scores(models, generator)
    values = score_rows(models, scores, rows, generator)
    for share in shares:
        # A classifier knows the buffers only as they are, contaminated: one for each share.
        classifier = experiment.classifier(pair, share)
        values["classifier"] = classifier(rows.states, rows.actions).double()
        measure.evaluate(
            result, setting, pair, scores, values, off_rows, share, settings
        )


def main() -> None:
    """Run one seed unless only the report is asked for, then write tables and figures."""
    parser = arguments.Parser(
        prog=COMMAND,
        description="How often is the exchange right? "
        "Scores and rules against the Bayes decision.",
    )
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name}", type=arguments.setting(field), default=field.default
        )
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument(
        "--data", type=arguments.path, help="folder of collected rows and fits"
    )
    parser.add_argument("--out", type=arguments.path, default=OUT)
    parser.add_argument("--report", action="store_true", help="tables and figures only")
    args = parser.parse_args()
    if len(args.levels) < 2 or len(set(args.levels)) < len(args.levels):
        parser.error(
            "--levels needs two or more different levels: policies are compared"
        )
    with arguments.errors_in_one_line():
        if not args.report:
            fields = [field.name for field in dataclasses.fields(Settings)]
            settings = Settings(**{name: getattr(args, name) for name in fields})
            store.check_same(args.out, dataclasses.asdict(settings), args.levels)
            folder = args.data or sources.cache_folder() / "exchange_accuracy"
            torch.set_num_threads(1)
            record = run_seed(settings, args.levels, folder)
            store.write_json(args.out / f"seed_{settings.seed}.json", record)
        report.write(args.out)
