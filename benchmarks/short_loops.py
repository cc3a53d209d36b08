"""Runs somebody's script with shorter loops, where no flag of it says how long they are.

    python -m corl.shim benchmarks/short_loops.py 10000=200 train_critic.py --env hopper-medium-v2

Each `range(10000)` in the file of the script, and only there, is `range(200)`. `10000=0:5001:25` is
`range(0, 5001, 25)`. The file is not changed. `other_peoples_code.py` names this where it is used.
"""

import runpy
import sys
from pathlib import Path


def shorter(lengths: dict[int, range]):
    """`range` that knows some lengths as others."""

    def made(*bounds: int) -> range:
        return lengths[bounds[0]] if bounds[0] in lengths else range(*bounds)

    return made


def main() -> None:
    lengths: dict[int, range] = {}
    words = sys.argv[1:]
    while words and "=" in words[0]:
        old, _, new = words.pop(0).partition("=")
        lengths[int(old)] = range(*map(int, new.split(":")))
    sys.argv = words
    # In the place of our folder, which the script has no use for.
    ours = str(Path(__file__).resolve().parent)
    theirs = str(Path(words[0]).resolve().parent)
    sys.path[:] = [theirs if entry == ours else entry for entry in sys.path]
    runpy.run_path(words[0], {"range": shorter(lengths)}, run_name="__main__")


if __name__ == "__main__":
    main()
