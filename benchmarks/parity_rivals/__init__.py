"""Our files of the paper's rivals against their authors' programs.

    python -m benchmarks.parity_rivals --pex PATH --edis PATH --ssar PATH --famo2o PATH
                                        [--out FILE.txt]

Each PATH is a checkout of the authors' repository; a rival without one is left out. Both sides get
the same weights, batches and random draws and make their updates on the CPU in float32.

A rival is a module of this package with one function:

    cases(checkout: Path) -> list of (name, {parameter: largest difference}, explanation)

The explanation says what makes a difference that is more than rounding; it is empty where none is.
"""

# (name, {parameter: largest difference}, explanation)
Case = tuple[str, dict[str, float], str]
