"""What threads and compiling do to the bits of a run, and what compiling costs.

    python benchmarks/modes.py [--algorithms iql dare_iql] [--threads 1 2] [--out FILE]

Every mode (algorithm, threads, eager or compiled) makes the same updates on the same random rows
of hopper's sizes, in a process of its own. The table shows a digest of the losses and weights,
so that modes with equal bits are seen, and the seconds of the first update: of a compiled mode in
an empty cache, and again in the next process, which finds the graph there.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from algorithms import cal_ql, dare_iql, iql
from corl import compiled, machine
from corl_dare.hook import Release

ROOT = Path(__file__).parent.parent
MODULES = {"iql": iql, "dare_iql": dare_iql, "cal_ql": cal_ql}
S, A, B = 11, 3, 256  # hopper, and the batch


def updates(name: str, threads: int, compile: bool, count: int, cache: str) -> dict:
    """Makes the updates in this process; returns their digest and the first one's seconds."""
    module = MODULES[name]
    machine.configure_threads(threads)
    compiled.keep_graphs_in(Path(cache))
    config = module.TrainConfig(env="hopper-medium-v2", compile=compile, threads=threads)
    torch.manual_seed(0)
    trainer = module.make_trainer(config, S, A, 1.0, "cpu")
    rng, digest, first = np.random.default_rng(0), hashlib.sha256(), 0.0
    shapes = [(B, S), (B, A), (B, 1), (B, S), (B, 1)] + [(B, 1)] * (name == "cal_ql")
    half = Release((torch.arange(B) < B // 2).float(), B // 2)
    for _ in range(count):
        batch = [torch.tensor(rng.normal(size=s), dtype=torch.float32) for s in shapes]
        batch[1], batch[4] = batch[1].tanh(), (batch[4] > 1).float()
        start = time.perf_counter()
        logs = trainer.train(batch, *([half] if name == "dare_iql" else []))
        first = first or time.perf_counter() - start
        digest.update(repr(sorted((k, v.item()) for k, v in logs.items())).encode())
    for part in trainer.state_dict().values():
        for value in part.values() if isinstance(part, dict) else ():
            if isinstance(value, torch.Tensor):
                digest.update(value.numpy().tobytes())
    return {"digest": digest.hexdigest()[:16], "first_seconds": round(first, 1)}


def in_a_process(*arguments: object) -> dict:
    """`updates` in a process of its own."""
    code = f"from benchmarks.modes import *; print(json.dumps(updates(*{arguments!r})))"
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    # Passive: a busy machine must not slow a comparison of bits.
    environment.update(PYTHONPATH=str(ROOT), OMP_WAIT_POLICY="PASSIVE")
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--algorithms", nargs="+", choices=MODULES, default=[*MODULES])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    results = []
    print("| algorithm | threads | mode | digest | first update | next process |")
    print("|---|---|---|---|---|---|")
    for name in args.algorithms:
        for compile in (False, True):
            for threads in args.threads:
                with tempfile.TemporaryDirectory() as cache:
                    mode = (name, threads, compile, args.updates, cache)
                    one, two = in_a_process(*mode), in_a_process(*mode)
                same = one["digest"] == two["digest"]
                results.append(
                    {
                        "algorithm": name,
                        "threads": threads,
                        "compile": compile,
                        **one,
                        "next_process_seconds": two["first_seconds"],
                        "next_process_same_bits": same,
                    }
                )
                how = "compiled" if compile else "eager"
                print(
                    f"| {name} | {threads} | {how} | {one['digest']} | "
                    f"{one['first_seconds']} s | {two['first_seconds']} s"
                    f"{'' if same else ', OTHER BITS'} |",
                    flush=True,
                )
    if args.out is not None:
        record = {
            "command": shlex.join(["python", "benchmarks/modes.py", *sys.argv[1:]]),
            "results": results,
            "machine": machine.describe(),
            "versions": machine.versions(),
            "commit": machine.git_commit(),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
