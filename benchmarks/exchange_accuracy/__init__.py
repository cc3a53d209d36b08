"""How often is the exchange right? Scores and rules against the Bayes decision.

    python -m benchmarks.exchange_accuracy --seed 0   # ten minutes on one core
    python -m benchmarks.exchange_accuracy --report   # tables and figures again

Rows of two known policies are mixed into batches of an offline and an online half. A share of
each half is misplaced: these rows come from the other policy. For every row it is known who acted
and how likely its action was under both policies, so the best decision that can be made from an
action is known too. Every score ranks the rows, every rule exchanges pairs, and the outcome is
compared with the truth: AUC, precision and recall of the exchange, purity of the halves,
calibration of the posterior, cost. docs/exchange_accuracy.md says what each number means and what
was found.

The behavior models are small and trained for minutes, not for the paper's 600 000 updates of 4096
rows. Every size is a flag and part of the result. Scores and rules that the hook does not have
(resampled support, the nearest of K references, a classifier) are defined here.

    settings   sizes, shares and rules: everything that an experiment varies
    rows       policies with an exact density, and rows of their episodes
    models     what is fitted to the rows of one seed
    scores     every score of the benchmark
    measure    batches, rules, and what an exchange did
    run        all experiments of one seed, and the command line
    store      the files of numbers, one per seed
    report     the tables of a folder of such files
    figures    its figures
    mixture    the rule em on drawn numbers instead of rows, a command of its own
    aging      deterministic policies and their own older rows, a command of its own
"""
