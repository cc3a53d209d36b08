from benchmarks.exchange_accuracy import run

run.main()
