"""Many runs: sweeps, stored results, tables and figures.

This package is not installed. It runs from a clone of the repository: it starts the algorithm files
by their paths and writes the pages below results/.

    python -m experiments.sweep FILE                # run a sweep file
    python -m experiments.report add | figures | write
"""
