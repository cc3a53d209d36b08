"""The files of numbers, `seed_N.json`: written by a run, read for tables and figures."""

import itertools
import json
import math
import statistics
from pathlib import Path

from corl import files


def write_json(path: Path, record: dict) -> None:
    """Write what one seed found; the file appears when it is whole.

    Each row of a table has a line of its own, so that a diff can be read.
    """
    tables = record.pop("tables")
    head = json.dumps(record, indent=1, allow_nan=False)
    parts = []
    for name, rows in tables.items():
        lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows)
        parts.append(f"  {json.dumps(name)}: [\n  {lines}\n  ]")
    text = head[:-2] + ',\n "tables": {\n' + ",\n".join(parts) + "\n }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def check_same(folder: Path, settings: dict, levels: list[str]) -> None:
    """Raise where a stored seed has other settings than these: tables are means over seeds."""
    wanted = {**settings, "levels": levels}
    for path in sorted(folder.glob("seed_*.json")):
        record = json.loads(path.read_text())
        stored = {**record["settings"], "levels": record["levels"]}
        for name in sorted(wanted.keys() | stored.keys()):
            if name != "seed" and wanted.get(name) != stored.get(name):
                raise ValueError(
                    f"{path} was made with {name} {stored.get(name)}, not {wanted.get(name)}: "
                    "give other settings another folder with --out"
                )


class Store:
    """The stored numbers of all seeds; means over seeds, and over whatever is not named.

    Raises:
        ValueError: no seed is stored, or seeds of different settings are.
    """

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("seed_*.json"))
        if not paths:
            raise ValueError(f"no seed_*.json in {folder}; run the benchmark first")
        self.seeds = [json.loads(path.read_text()) for path in paths]
        check_same(folder, self.seeds[0]["settings"], self.seeds[0]["levels"])
        # Rows by table and score.
        self.rows: dict[tuple[str, str], list[dict]] = {}
        for seed in self.seeds:
            number = {"seed": seed["settings"]["seed"]}
            for name, rows in seed["tables"].items():
                columns = seed["columns"][name]
                for row in rows:
                    named = dict(zip(columns, row, strict=True)) | number
                    self.rows.setdefault((name, named["score"]), []).append(named)
        first = self.seeds[0]
        self.main_pair, self.levels = tuple(first["main_pair"]), first["levels"]
        self.pairs = list(itertools.permutations(self.levels, 2))
        self.scores = [row[0] for row in first["tables"]["cost"]]
        # Largest range over seeds of any mean that was asked for since this was set to 0.
        self.spread = 0.0

    def values(self, table: str, column: str, score: str, **where) -> list[tuple]:
        """(seed, value) of the rows where every named column equals its value."""
        return [
            (row["seed"], row[column])
            for row in self.rows[table, score]
            if row[column] is not None and all(row[k] == v for k, v in where.items())
        ]

    def mean(self, table: str, column: str, **where) -> float:
        """Mean over rows and seeds, nan without rows; widens `spread`."""
        by_seed: dict[int, list[float]] = {}
        for seed, value in self.values(table, column, **where):
            by_seed.setdefault(seed, []).append(value)
        means = [statistics.mean(values) for values in by_seed.values()]
        if not means:
            return math.nan
        self.spread = max(self.spread, max(means) - min(means))
        return statistics.mean(means)

    def off_diagonal(self, table: str, column: str, **where) -> float:
        """Mean over the pairs of different policies."""
        found = [
            self.mean(table, column, behavior=b, online=o, **where)
            for b, o in self.pairs
        ]
        found = [x for x in found if not math.isnan(x)]
        return statistics.mean(found) if found else math.nan


def arrow(pair: tuple[str, str]) -> str:
    """A pair of policies in tables and figures: behavior → online."""
    return f"{pair[0]} \u2192 {pair[1]}"
