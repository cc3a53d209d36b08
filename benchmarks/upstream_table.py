"""Run unmodified CORL scripts through `corl.shim`; one row per script.

    python benchmarks/upstream_table.py PATH/TO/CORL [--out results/upstream/hopper.csv]

Each script keeps its default hyperparameters and makes 2000 offline and 1000 online updates on
hopper-medium-v2. TD3+BC, an offline script, makes 3000 offline ones; SPOT first trains its VAE for
1000. Each evaluates 5 episodes every 1000 updates. That is enough to see that a script runs and
learns from the data; none is trained to its end. The table of docs/corl.md is printed, and one CSV
row per script is written.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from corl import arguments
from corl.data import sources
from corl.machine import describe, git_commit, versions

ROOT = Path(__file__).parent.parent
TASK, COMMIT, EPISODES = "hopper-medium-v2", "6afec90", 5
COMMON = "--device cpu --buffer_size 300000".split()
OFFLINE = f"--env {TASK} --eval_freq 1000 --n_episodes {EPISODES}".split()
PHASES = "--offline_iterations 2000 --online_iterations 1000".split()
AWAC = f"--env_name {TASK} --eval_frequency 1000 --n_test_episodes {EPISODES}".split()
# Script -> (SHA-256 of the file at COMMIT, its flags).
SCRIPTS = {
    "finetune/iql.py": (
        "e13a91b99a4a2982b0747198c240ba1b8494d79163d6a5b288ccf58426a570cb",
        [*OFFLINE, *PHASES],
    ),
    "finetune/cal_ql.py": (
        "97790ec99466a118fcba19fb8dc1044e76707f0a5e38a2c096afc659a8c892ae",
        [*OFFLINE, *PHASES],
    ),
    "finetune/cql.py": (
        "71087ddb2305b491d3d319c644cd102746e1d4486ac0e1c290c8f789250893d1",
        [*OFFLINE, *PHASES],
    ),
    "finetune/spot.py": (
        "5a26ab30855e4da0af37fcb9d6bb52e5724f0c83146ffb4a68ed64454928c6d6",
        [*OFFLINE, *PHASES, "--vae_iterations", "1000"],
    ),
    "finetune/awac.py": (
        "9f3671f0a2933c98b1bbecb11b9d213a2aa4bce93822a8e0d085427b2a591b6e",
        [*AWAC, *PHASES],
    ),
    "offline/td3_bc.py": (
        "8fbcc24a58dedf81cac1fe5aa0f10a309dc6e7c705745026a3d3735e31354452",
        [*OFFLINE, "--max_timesteps", "3000"],
    ),
}


def run(corl: Path, name: str, seed: int) -> dict:
    """Run one script and read its scores from the log of the shim."""
    digest, flags = SCRIPTS[name]
    script = corl / "algorithms" / name
    if not script.is_file():
        raise SystemExit(f"error: {script} does not exist; give the folder of CORL")
    if hashlib.sha256(script.read_bytes()).hexdigest() != digest:
        raise SystemExit(f"error: {script} is not the file of CORL's commit {COMMIT}")
    flags = [*COMMON, *flags, "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        command = [sys.executable, "-m", "corl.shim", "--log", str(log)]
        start = time.perf_counter()
        subprocess.run(
            [*command, str(script), *flags],
            cwd=ROOT,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    key = "d4rl_normalized_score"
    scores = [v for line in lines for k, v in line.items() if k in (key, f"eval/{key}")]
    episodes = sum("train/episode_return" in line for line in lines)
    online = name.startswith("finetune")
    return {
        "script": name,
        "seed": seed,
        "score_offline": round(scores[1 if online else 2], 1),
        "score_online": round(scores[2], 1) if online else "",
        "online_episodes": episodes if online else "",
        "seconds": round(seconds),
        "flags": " ".join(flags),
    }


def markdown(rows: list[dict]) -> str:
    """The table and, below it, what all rows share."""
    lines = [
        "| script | score after 2000 offline updates | after 1000 more online |",
        "|---|---:|---:|",
    ]
    for row in rows:
        online = "–" if row["score_online"] == "" else row["score_online"]
        offline = f"{row['score_offline']}" + (" (3000)" if online == "–" else "")
        lines.append(f"| `{row['script']}` | {offline} | {online} |")
    first = rows[0]
    packages = ", ".join(f"{n} {first[n]}" for n in ("torch", "gymnasium", "mujoco"))
    return "\n".join(lines) + (
        f"\n\n{first['task']}, {first['dataset']}, seed {first['seed']}, D4RL-normalized "
        f"scores of {EPISODES} episodes; CORL {first['corl_commit']}, corl-dare "
        f"{first['commit'][:7] + first['commit'][40:]}; {first['machine']}; {packages}."
    )


def main() -> None:
    parser = arguments.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "corl", type=arguments.path, help=f"folder of CORL at commit {COMMIT}"
    )
    parser.add_argument("--seed", type=arguments.number(int, arguments.SEED), default=0)
    parser.add_argument("--only", choices=SCRIPTS, nargs="+", default=list(SCRIPTS))
    parser.add_argument(
        "--out", type=arguments.path, default=ROOT / "results/upstream/hopper.csv"
    )
    args = parser.parse_args()
    if not (args.corl / "algorithms").is_dir():
        parser.error(f"{args.corl} is no folder of CORL")
    data, machine = sources.resolve(TASK).provenance, describe()
    facts = {
        "corl_commit": COMMIT,
        "task": TASK,
        "dataset": data["label"],
        "dataset_sha256": data["sha256"],
        "commit": git_commit(),
        "machine": f"{machine['processor']}, 1 thread",
        **versions(),
    }
    rows = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        rows.append({**run(args.corl, name, args.seed), **facts})
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(markdown(rows))


if __name__ == "__main__":
    main()
