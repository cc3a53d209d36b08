"""Serves updates of JAX-CORL's IQL, as fast as they come, to `update_speed.py`.

    JAX_PYTHON benchmarks/jax_updates.py JAX_CORL/algos/iql.py CORES ROWS STATE_DIM ACTION_DIM

Every line on the standard input is a number of seconds; the answer is the number of updates made in
them and the seconds that they took. The script is loaded unmodified (see `jax_worker.py`) and
its own jitted function makes `n_jitted_updates` updates a call, rows of the batch drawn inside.
The process keeps to the first CORES cores, since XLA takes as many threads as it has cores.
"""

import os
import runpy
import sys
import tempfile
import time
from pathlib import Path


def updates(script: str, rows: int, state_dim: int, action_dim: int):
    """A function that makes some updates and returns how many."""
    import numpy as np
    from jax_worker import stand_ins

    with tempfile.TemporaryDirectory() as folder:
        stand_ins(sys.executable, Path(folder))
        sys.argv = [script]
        names = runpy.run_path(script, run_name="upstream")
    import jax
    import jax.numpy as jnp

    rng, config = np.random.default_rng(0), names["config"]

    def column(*shape: int):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    given = {
        "observations": column(rows, state_dim),
        "actions": jnp.tanh(column(rows, action_dim)),
        "rewards": column(rows),
        "next_observations": column(rows, state_dim),
        "dones": jnp.zeros(rows),
        "dones_float": jnp.zeros(rows),
        "masks": jnp.ones(rows),
    }
    kind = names["Transition"]
    data = kind(**{field: given[field] for field in kind._fields})
    key = jax.random.PRNGKey(0)
    first = jax.tree_util.tree_map(lambda x: x[0], data)
    state = names["create_iql_train_state"](
        key, first.observations, first.actions, config
    )
    step = jax.jit(names["IQL"]().update_n_times, static_argnums=(3,))

    def make() -> int:
        nonlocal state, key
        key, own = jax.random.split(key)
        state, losses = step(state, data, own, config)
        jax.block_until_ready(losses)
        return config.n_jitted_updates

    return make


def main() -> None:
    script, *numbers = sys.argv[1:]
    cores, rows, state_dim, action_dim = map(int, numbers)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    answers = os.fdopen(os.dup(1), "w")
    # What the script prints is not an answer.
    os.dup2(2, 1)
    make = updates(script, rows, state_dim, action_dim)
    make()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < float(line):
            count += make()
        print(count, time.perf_counter() - start, file=answers, flush=True)


if __name__ == "__main__":
    main()
