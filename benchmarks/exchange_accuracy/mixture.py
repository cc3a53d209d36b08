"""When does a mixture fitted by EM find the misplaced rows? The rules on drawn scores.

    python -m benchmarks.exchange_accuracy.mixture --seed 0    # a minute on one core

Scores are drawn from two normal laws, so that nothing but the rule can be wrong. A case is the
mean of the online law (the offline one is N(0, 1)) and the share of each half that is misplaced.
`two fits` fits each half alone and decides by the posterior. `pooled em` is the mixture that
reviewers of the paper asked for: one fit to all rows, with one share. `em` is `dare.rule: em`:
one fit to all rows, with a share of each half, and no exchange where the shares do not differ.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.exchange_accuracy.measure import decide, outcome
from benchmarks.exchange_accuracy.report import table
from corl import arguments, files, machine
from corl_dare.exchange import exchange, fit_mixture

COMMAND = "python -m benchmarks.exchange_accuracy.mixture"
OUT = Path(__file__).parents[2] / "results" / "exchange_accuracy"
# Name -> mean of the online law, misplaced share of the offline and of the online half.
CASES = {
    "equal laws": (0.0, 0.3, 0.3),
    "N(0) and N(1), 30 %": (1.0, 0.3, 0.3),
    "N(0) and N(2), 30 %": (2.0, 0.3, 0.3),
    "N(0) and N(2), 0 %": (2.0, 0.0, 0.0),
    "N(0) and N(2), 10 % and 50 %": (2.0, 0.1, 0.5),
    "N(0) and N(4), 30 %": (4.0, 0.3, 0.3),
}
# Heading -> rule of `measure.decide`.
RULES = {"two fits": "posterior", "pooled em": "pooled em", "em": "em"}


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; every field is a flag."""

    seed: int = 0
    batches: int = 1000
    half: int = 128  # rows of a half batch


def draw(
    case: tuple[float, float, float], s: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (R, 2N), and which of them are of the online law."""
    mean, off, on = case
    rng = np.random.default_rng([s.seed, s.half])
    wrong = np.concatenate([rng.random((s.batches, s.half)) < x for x in (off, on)], 1)
    online = wrong != (np.arange(2 * s.half) >= s.half)
    scores = rng.normal(size=online.shape) + mean * online
    return torch.tensor(scores), torch.tensor(online)


def measure(s: Settings) -> list[dict]:
    """Per case and rule what the exchange did, and how often the gate of em opened."""
    rows = []
    for name, case in CASES.items():
        scores, online = draw(case, s)
        odds = torch.vmap(lambda row: fit_mixture(row, s.half).log_odds)(scores)
        opened = odds.isfinite().all(1).double().mean().item()
        for heading, rule in RULES.items():
            found = outcome(decide(scores, rule), online)
            kept = {k: found[k] for k in ("exchanged", "purity_before", "purity_off")}
            rows.append({"case": name, "rule": heading, "opened": opened, **kept})
    return rows


def seconds_per_batch(s: Settings, repeats: int = 50) -> dict[str, float]:
    """Rule -> processor seconds of one exchange, as it is without a graph."""
    (scores, _), found = draw(CASES["N(0) and N(2), 30 %"], s), {}
    halves = scores[:, : s.half].float(), scores[:, s.half :].float()
    for rule in ("threshold", "posterior", "share", "em"):
        exchange(halves[0][0], halves[1][0], rule=rule)
        start = time.process_time()
        for i in range(repeats):
            exchange(halves[0][i], halves[1][i], rule=rule)
        found[rule] = (time.process_time() - start) / repeats
    return found


def page(record: dict) -> str:
    """The text of mixture.md."""
    s, rows = record["settings"], record["rows"]
    cells = []
    for case in CASES:
        own = {row["rule"]: row for row in rows if row["case"] == case}
        row = [case, own["em"]["purity_before"]]
        for rule in RULES:
            row += [f"{own[rule]['exchanged']:.1f}", own[rule]["purity_off"]]
        cells.append([*row, own["em"]["opened"]])
    head = ["laws, misplaced", "purity before"]
    for rule in RULES:
        head += [f"M, {rule}", f"purity, {rule}"]
    costs = ", ".join(f"{k} {1e3 * v:.2f}" for k, v in record["seconds"].items())
    return (
        f"# A mixture fitted by EM\n\n`{record['command']}`, commit {record['commit']}, "
        f"{record['machine']['processor']}. {s['batches']} batches of {s['half']} + {s['half']} "
        "normal scores. M: exchanged pairs. Gate: share of the batches in which em exchanges at "
        "all. For equal laws purity means nothing: the right M is 0.\n\n"
        + table([*head, "gate"], cells)
        + f"\nProcessor milliseconds of one exchange without a graph: {costs}.\n"
    )


def main() -> None:
    """Measure, and write mixture.json and mixture.md."""
    parser = arguments.Parser(prog=COMMAND, description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name}", type=arguments.setting(field), default=field.default
        )
    parser.add_argument("--out", type=arguments.path, default=OUT)
    args = parser.parse_args()
    with arguments.errors_in_one_line():
        fields = [field.name for field in dataclasses.fields(Settings)]
        settings = Settings(**{name: getattr(args, name) for name in fields})
        machine.configure_threads(1)
        record = {
            "command": " ".join([COMMAND, *sys.argv[1:]]),
            "settings": dataclasses.asdict(settings),
            "rows": measure(settings),
            "seconds": seconds_per_batch(settings),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "commit": machine.git_commit(),
        }
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        files.write_text(args.out / "mixture.json", text)
        files.write_text(args.out / "mixture.md", page(record))


if __name__ == "__main__":
    main()
