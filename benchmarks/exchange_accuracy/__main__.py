"""The command `python -m benchmarks.exchange_accuracy`."""

from benchmarks.exchange_accuracy import run

run.main()
