"""Our files of the paper's rivals against their authors' programs.

    python -m benchmarks.parity_rivals --pex PATH --edis PATH --ssar PATH --e2o PATH [--out FILE]
    python -m benchmarks.parity_rivals --rlpd PATH --wsrl PATH --famo2o PATH --jax_python PYTHON

Each PATH is a checkout of the authors' repository; a rival without one is left out. PYTHON runs
those that are JAX. Both sides get the same weights, batches and random draws and make their
updates on the CPU in float32, and in float64 where a case says so.

A rival is a module of this package with one function:

    cases(checkout: Path) -> list of (name, {parameter: largest difference}, explanation)

Those of JAX take that Python as a second argument. The explanation says what makes a
difference that is more than rounding; it is empty where none is.
"""

# (name, {parameter: largest difference}, explanation)
Case = tuple[str, dict[str, float], str]
