"""Run 35 public repositories under `corl.shim`, unmodified; print the table of what runs.

    python -m benchmarks.other_peoples_code FOLDER --python PATH/TO/python [--only NAME ...]

FOLDER holds the checkouts, each named `owner+name`, at the commits below. An entry runs when every
command of it ends well (or is stopped after its evaluation) and the last one has printed or written
a finite evaluation after at least 200 updates. Each runs in a copy of its checkout; nobody's file
is changed. `--python` is an interpreter that has this project's packages and what the repositories
ask for besides (docs/shim.md lists them).
"""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from corl import arguments, machine

ROOT = Path(__file__).resolve().parent.parent
TASK = "hopper-medium-v2"
NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf))"
# Data is collected by ourselves, 20 000 rows: enough for a short run, and no download.
DATA = "--dataset_source self-collected --dataset_rows 20000"
# Where the script makes something of every row, or needs many tasks.
FEW = "--dataset_source self-collected --dataset_rows 3000"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One repository: what is run, and what shows its evaluation."""

    repository: str
    commit: str
    # What stands after `python -m corl.shim OPTIONS`, one for each step.
    commands: tuple[str, ...]
    # In the output, in the log of wandb or in `written`: group 1 is the evaluation.
    evidence: str
    # Options of the shim besides those of the data.
    options: str = ""
    # Folder of the checkout in which the commands start.
    folder: str = ""
    # Files, as a pattern, in which the script writes its evaluations.
    written: str = ""
    # Environment variables, `NAME=VALUE`.
    variables: str = ""
    # The evaluation counts from the so-manieth on: some are made before the first update.
    nth: int = 1
    # Steps that end with this message have done what the next one needs.
    enough: str = ""
    data: str = DATA
    # `FILE=COPY`: a file that the user makes of theirs, as their README says.
    copied: str = ""


CORL_OFFLINE = (
    "--env {task} --device cpu --max_timesteps 200 --eval_freq 200 --n_episodes 1"
)
CORL_ONLINE = (
    "--env {task} --device cpu --offline_iterations 200 --online_iterations 200"
    " --eval_freq 100 --n_episodes 1 --buffer_size 30000"
)
# Where no flag says how long a loop is; see that file.
SHORT = "SHORTER"
# They were written for a flax whose `init` gives a FrozenDict.
FROZEN = "FLAX_RETURN_FROZENDICT=1"
IQL = "--env_name={task} --max_steps=200 --eval_interval=200 --eval_episodes=1 --notqdm"

ENTRIES = (
    Entry(
        "tinkoff-ai/CORL",
        "6afec90",
        (
            f"algorithms/offline/td3_bc.py {CORL_OFFLINE}",
            f"algorithms/finetune/iql.py {CORL_ONLINE}",
        ),
        rf'd4rl_normalized_score": {NUMBER}',
    ),
    Entry(
        "sfujim/TD3_BC",
        "8791ad7",
        ("main.py --env {task} --max_timesteps 200 --eval_freq 200",),
        rf"D4RL score: {NUMBER}",
    ),
    Entry(
        "nissymori/JAX-CORL",
        "d747dd8",
        (
            "algos/td3bc.py env_name={task} max_steps=200 eval_episodes=1"
            " n_jitted_updates=2",
        ),
        rf"Final Evaluation Score: {NUMBER}",
    ),
    Entry(
        "Zhendong-Wang/Diffusion-Policies-for-Offline-RL",
        "d871f5c",
        ("main.py --env_name {task} --num_steps_per_epoch 4 --batch_size 64",),
        rf"Average Episodic N-Reward\W+{NUMBER}",
    ),
    Entry(
        "gwthomas/IQL-PyTorch",
        "71ea1aa",
        (
            "main.py --env-name {task} --log-dir out --n-steps 200 --eval-period 200"
            " --n-eval-episodes 1",
        ),
        rf"normalized return mean\W+{NUMBER}",
    ),
    Entry(
        "thuml/SPOT",
        "4be91cc",
        (
            "train_vae.py --env hopper --dataset medium --num_iters 200",
            "main.py --env {task} --max_timesteps 200 --eval_freq 200 --eval_episodes 1"
            " --vae_model_path PATTERN:runs/train_vae/*/*/model/*.pt",
        ),
        rf"Evaluation over 1 episodes: {NUMBER}",
        options="--cuda-is-cpu",
    ),
    Entry(
        "ChenDRAG/CEP-energy-guided-diffusion",
        "4cc0622",
        (
            f"{SHORT} 1000=1 train_behavior.py --env {{task}} --device cpu --expid b",
            f"{SHORT} 10000=200 train_critic.py --env {{task}} --device cpu --expid c --s 1"
            " --diffusion_steps 5 --seed_per_evaluation 1"
            " --actor_load_path models_rl/b/behavior_ckpt600.pth",
        ),
        rf"reward {NUMBER} \+-",
        folder="Offline_RL_2D",
        data=FEW,
    ),
    Entry(
        "ryanxhr/POR",
        "e692bb3",
        (
            "main_por.py --env_name {task} --type por_r --log_dir out --model_dir out"
            " --train_steps 200 --eval_period 200 --n_eval_episodes 1 --pretrain_steps 0",
        ),
        rf'"normalized return mean": {NUMBER}',
    ),
    Entry(
        "ChenDRAG/SfBC",
        "d384e9f",
        (
            "train_behavior.py --env {task} --device cpu --expid b --batch_size 2048"
            " --n_behavior_epochs 25 --sample_per_epoch 20000",
            "train_critic.py --env {task} --device cpu --expid b --actor_load_epoch 25"
            " --diffusion_steps 5 --seed_per_evaluation 1",
        ),
        rf"eval/rew {NUMBER}",
        written="logs/b/events*",
        data=FEW,
    ),
    Entry(
        "kzl/decision-transformer",
        "e2d82e6",
        (
            "../data/download_d4rl_datasets.py",
            "../experiment.py --env hopper --dataset medium --max_iters 1 --device cpu"
            " --num_steps_per_iter 200 --num_eval_episodes 1",
        ),
        rf"target_3600_return_mean: {NUMBER}",
        folder="gym/data",
        data=FEW,
    ),
    Entry(
        "Haichao-Zhang/PEX",
        "b0ae11e",
        (
            "main_offline.py --env_name {task} --log_dir out --num_steps 200"
            " --eval_period 200 --eval_episode_num 1",
        ),
        rf"normalized return mean': (?:np.float64\()?{NUMBER}",
        options="--cuda-is-cpu",
    ),
    Entry(
        "liuxhym/EDIS",
        "28bf16d",
        # Every 250th step up to its first evaluation.
        (f"{SHORT} 1200010=0:50001:250 algorithms/iql_edis.py --env {{task}}",),
        rf"D4RL score: {NUMBER}",
        variables="PYTHONPATH=.",
        options="--cuda-is-cpu",
    ),
    Entry(
        "QinwenLuo/SSAR",
        "7e6dc0b",
        (
            "td3_bc.py --env {task} --device cpu --offline_timesteps 200 --eval_freq 200"
            " --n_episodes 1",
        ),
        rf"D4RL score\W+{NUMBER}",
    ),
    Entry(
        "young-geng/CQL",
        "21efac4",
        (
            "-m SimpleSAC.conservative_sac_main --env {task} --device cpu --n_epochs 1"
            " --n_train_step_per_epoch 200 --eval_n_trajs 1",
        ),
        rf"average_normalizd_return\W+{NUMBER}",
    ),
    Entry(
        "nakamotoo/Cal-QL",
        "ac6eafe",
        (
            "-m JaxCQL.conservative_sac_main --env antmaze-umaze-v2 --n_pretrain_epochs 1"
            " --n_train_step_per_epoch_offline 200 --eval_n_trajs 1"
            " --max_online_env_steps 1000",
        ),
        rf"average_normalized_return\W+{NUMBER}",
        nth=2,
        copied="JaxCQL/wandb_config_example.py=JaxCQL/wandb_config.py",
        options="--old-jax",
    ),
    Entry(
        "LeapLabTHU/FamO2O (CQL)",
        "ea9cb01",
        (
            f"{SHORT} 1000=40 cql_finetune/family_conservative_sac_finetune_main.py"
            " --env {task} -c family --wandb-offline --wandb-output-dir out",
        ),
        rf"average_normalizd_return\W+{NUMBER}",
        folder="jax_cql",
        variables="PYTHONPATH=.",
        options="--old-jax",
    ),
    Entry(
        "LeapLabTHU/FamO2O (IQL)",
        "ea9cb01",
        (
            f"family_train_finetune.py {IQL} --num_pretraining_steps=200"
            " --config=configs/family_antmaze_finetune_config.py"
            " --replay_buffer_size=30000 --last_eval_start_steps=0"
            " --last_eval_interval=200",
        ),
        rf"\s{NUMBER}",
        folder="jax_iql",
        variables=FROZEN,
        written="tmp/*.txt",
        options="--old-jax",
    ),
    Entry(
        "BY571/CQL",
        "2fd085a",
        (
            "CQL-SAC/train_offline.py --env halfcheetah-medium-v2 --episodes 2 --batch_size 64",
        ),
        rf"\| Reward: {NUMBER}",
    ),
    Entry(
        "yihaosun1124/OfflineRL-Kit",
        "e3ce697",
        (
            "run_example/run_td3bc.py --task {task} --epoch 1 --step-per-epoch 200"
            " --eval_episodes 1 --device cpu",
        ),
        rf"normalized_episode_reward\W+{NUMBER}",
        variables="PYTHONPATH=.",
    ),
    Entry(
        "zhaoyi11/adaptive_bc",
        "d47226d",
        (
            "main.py --env hopper-medium-v2 --pretrain_timesteps 201 --eval_freq 200"
            " --max_timesteps 200 --num_updates 1",
        ),
        rf'pretrain_evaluation/": {{"d4rl": {NUMBER}',
        nth=2,
    ),
    Entry(
        "thu-ml/SRPO",
        "b3b916a",
        (
            f"{SHORT} 10000=1 train_behavior.py --env {{task}} --device cpu --expid b",
            f"{SHORT} 10000=2 train_critic.py --env {{task}} --device cpu --expid b"
            " --actor_load_path SRPO_model_factory/b/behavior_ckpt200.pth",
            f"{SHORT} 10000=200 train_policy.py --env {{task}} --device cpu --expid p"
            " --n_policy_epochs 1 --actor_load_path SRPO_model_factory/b/behavior_ckpt200.pth"
            " --critic_load_path SRPO_model_factory/b/critic_ckpt150.pth",
        ),
        rf'rewdeter": {NUMBER}',
        options="--cuda-is-cpu",
    ),
    Entry(
        "jannerm/trajectory-transformer",
        "8834a6e",
        (
            f"{SHORT} 334=3 scripts/train.py --dataset {{task}} --device cpu"
            " --n_epochs_ref 1 --n_saves 111 --batch_size 32 --n_layer 1 --n_embd 8",
            "scripts/plan.py --dataset {task} --device cpu --gpt_loadpath gpt/azure"
            " --horizon 2 --beam_width 4 --renderer DebugRenderer",
        ),
        rf'"score": {NUMBER}',
        written="**/rollout.json",
        variables="PYTHONPATH=.",
        options="--old-python --old-numpy --cuda-is-cpu",
        data=FEW,
    ),
    Entry(
        "jannerm/diffuser",
        "7ea4228",
        (
            "scripts/train.py --dataset {task} --device cpu --n_train_steps 200"
            " --n_steps_per_epoch 200 --n_saves 1 --sample_freq 0 --batch_size 4 --save_freq 199",
            "scripts/train_values.py --dataset {task} --device cpu --n_train_steps 200"
            " --n_steps_per_epoch 200 --n_saves 1 --batch_size 4 --save_freq 199",
            "scripts/plan_guided.py --dataset {task} --device cpu --batch_size 2"
            " --n_guide_steps 1 --vis_freq 100000",
        ),
        rf'"score": {NUMBER}',
        written="**/rollout.json",
        variables="PYTHONPATH=.",
        options="--old-python --old-numpy",
    ),
    Entry(
        "CleanDiffuserTeam/CleanDiffuser",
        "05f17fc",
        (
            "pipelines/dql_d4rl_mujoco.py task={task} device=cpu gradient_steps=200"
            " save_interval=200 log_interval=200 batch_size=64",
            "pipelines/dql_d4rl_mujoco.py task={task} device=cpu mode=inference num_envs=2"
            " num_episodes=1 num_candidates=2 batch_size=64",
        ),
        rf"^\[{NUMBER}\] \[",
        variables="PYTHONPATH=.",
    ),
    Entry(
        "sfujim/BCQ",
        "4876f7e",
        (
            "main.py --env Hopper-v3 --train_behavioral --max_timesteps 400"
            " --start_timesteps 200 --eval_freq 400",
            "main.py --env Hopper-v3 --generate_buffer --max_timesteps 2000",
            "main.py --env Hopper-v3 --max_timesteps 200 --eval_freq 200",
        ),
        rf"Evaluation over 10 episodes: {NUMBER}",
        folder="continuous_BCQ",
    ),
    Entry(
        "snu-mllab/EDAC",
        "198d570",
        ("-m scripts.sac --env_name {task} --epoch 1 --num_qs 2",),
        rf"evaluation/Average Returns\W+{NUMBER}",
        options="--cuda-is-cpu --old-numpy",
    ),
    Entry(
        "ikostrikov/implicit_q_learning",
        "09d7002",
        (f"train_offline.py {IQL} --config=configs/mujoco_config.py",),
        rf"200 {NUMBER}",
        written="tmp/*.txt",
        variables=FROZEN,
        options="--old-jax",
    ),
    Entry(
        "ryanxhr/IVR",
        "58edd26",
        (
            f"train_offline.py {IQL} --config=configs/mujoco_config.py --alg=SQL --alpha=2",
        ),
        rf'normalized_return": {NUMBER}',
        variables=FROZEN,
    ),
    Entry(
        "Div99/XQL",
        "dff09af",
        (f"train_offline.py {IQL} --config=configs/mujoco_config.py --batch_size=256",),
        rf"200 {NUMBER}",
        folder="offline",
        variables=FROZEN,
        written="tmp/*/*.txt",
        options="--old-jax",
    ),
    Entry(
        "ikostrikov/rlpd",
        "c90fd4b",
        (
            "train_finetuning.py --env_name={task} --max_steps=1201 --start_training=1000"
            " --eval_interval=1200 --eval_episodes=1 --config=configs/rlpd_config.py",
        ),
        rf'evaluation/return": {NUMBER}',
    ),
    Entry(
        "philippe-eecs/IDQL",
        "7582571",
        ("-m launcher.examples.train_ddpm_iql_offline --variant 0",),
        rf'eval/.*return": {NUMBER}',
        options="--old-jax",
    ),
    Entry(
        "zhouzypaul/wsrl",
        "891ee35",
        (
            "finetune.py --agent sac --config experiments/configs/train_config.py:"
            "locomotion_wsrl --reward_bias 0.0 --env {task} --num_offline_steps 200"
            " --num_online_steps 0 --eval_interval 200 --n_eval_trajs 1 --save_dir out",
        ),
        rf'average_normalized_return": {NUMBER}',
        options="--old-jax",
    ),
    Entry(
        "takuseno/d3rlpy",
        "38c34b6",
        ("reproductions/offline/td3_plus_bc.py --dataset {task}",),
        rf"environment\W+{NUMBER}",
        options="--gym-api 0.26",
        variables="PYTHONPATH=.",
    ),
    Entry(
        "seohongpark/fql",
        "719d044",
        (
            "main.py --env_name=antmaze-umaze-v2 --offline_steps=200 --eval_interval=200"
            " --eval_episodes=1 --log_interval=100",
        ),
        rf'evaluation/.*return": {NUMBER}',
    ),
    Entry(
        "facebookresearch/online-dt",
        "c376fa1",
        (
            "data/download_d4rl_gym_datasets.py",
            "main.py --env {task} --device cpu --max_pretrain_iters 1"
            " --num_updates_per_pretrain_iter 200 --max_online_iters 0"
            " --num_eval_episodes 1 --embed_dim 64 --n_layer 1 --n_head 1 --batch_size 16",
        ),
        rf"evaluation/return_mean_gm\W+{NUMBER}",
        # Its last robot; hopper's file is written by then.
        enough="unknown task 'ant-medium-v2'",
        data=FEW,
    ),
)


@dataclasses.dataclass
class Outcome:
    """What became of an entry."""

    runs: bool
    # The evaluation, or the first fault.
    words: str
    seconds: float


def plain(path: Path) -> str:
    """The text of a file; of one of TensorBoard a line `TAG VALUE` for each scalar."""
    if not path.name.startswith("events.out.tfevents"):
        return path.read_text()
    # A tag, the mark of a number, a little-endian float32.
    found = re.findall(rb"([\w/ ]+)\x15(.{4})", path.read_bytes(), re.DOTALL)
    return "\n".join(f"{t.decode()} {struct.unpack('<f', v)[0]}" for t, v in found)


def evaluation(entry: Entry, place: Path, text: str) -> float | None:
    """The evaluation that the entry's text or files show; None where there is none yet."""
    if entry.written:
        found = list(place.glob(entry.written))
        text = "\n".join(plain(path) for path in found)
    matches = re.findall(entry.evidence, text, re.MULTILINE)
    return float(matches[entry.nth - 1]) if len(matches) >= entry.nth else None


def fault(text: str) -> str:
    """The last line of the output that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [
        x for x in lines if re.match(r"(error:|[\w.]*(Error|Exception|Exit)\b)", x)
    ]
    return (errors or lines or ["no output"])[-1][:200]


def command_line(
    entry: Entry, command: str, place: Path, python: str, log: Path
) -> list:
    """The words of a command; `PATTERN:` is the newest file of that pattern."""
    words = []
    for word in command.format(task=TASK).split():
        if word.startswith("PATTERN:"):
            found = sorted(place.glob(word.removeprefix("PATTERN:")))
            word = str(found[-1]) if found else word
        words.append(str(ROOT / "benchmarks/short_loops.py") if word == SHORT else word)
    options = [*entry.data.split(), *entry.options.split(), "--log", str(log)]
    return [python, "-m", "corl.shim", *options, *words]


def stop(process: subprocess.Popen) -> None:
    """End a command with all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_command(
    entry: Entry, words: list, place: Path, log: Path, last: bool, limit: float
) -> tuple[int | None, str]:
    """Run one command: its exit code, None when the time was up, and its output.

    The last one is stopped soon after its evaluation, which counts as an end.
    """
    paths = [str(ROOT)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    for pair in entry.variables.split():
        name, _, value = pair.partition("=")
        variables[name] = value
        if name == "PYTHONPATH":
            paths.insert(0, str((place / value).resolve()))
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    output = place / ".output.txt"
    start = time.monotonic()
    with open(output, "w") as file:
        process = subprocess.Popen(
            words,
            cwd=place,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
    seen = None
    while (code := process.poll()) is None and time.monotonic() - start < limit:
        time.sleep(0.5)
        text = output.read_text(errors="replace") + log.read_text(errors="replace")
        if last and seen is None and evaluation(entry, place, text) is not None:
            seen = time.monotonic()
        if seen is not None and time.monotonic() - seen > 5:
            code = 0
            break
    stop(process)
    text = output.read_text(errors="replace") + "\n" + log.read_text(errors="replace")
    return code, text


def run_entry(
    entry: Entry, checkouts: Path, python: str, limit: float, keep: Path | None
) -> Outcome:
    """Run all commands of an entry in a copy of its checkout."""
    owner_name = entry.repository.partition(" ")[0].replace("/", "+")
    source, start = checkouts / owner_name, time.monotonic()
    if not source.is_dir():
        return Outcome(False, f"no checkout {owner_name}", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / owner_name
        shutil.copytree(source, copy, symlinks=True)
        place, log = copy / entry.folder, Path(folder) / "log.jsonl"
        if entry.copied:
            theirs, _, made = entry.copied.partition("=")
            shutil.copy(place / theirs, place / made)
        text = ""
        for number, command in enumerate(entry.commands):
            log.write_text("")
            last = number == len(entry.commands) - 1
            words = command_line(entry, command, place, python, log)
            code, text = run_command(entry, words, place, log, last, limit)
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{owner_name}-{number + 1}.txt").write_text(text)
            if code != 0 and not (entry.enough and entry.enough in text):
                step = "" if last else f"step {number + 1}: "
                said = f"stopped after {limit:.0f} s" if code is None else fault(text)
                return Outcome(False, step + said, time.monotonic() - start)
        value = evaluation(entry, place, text)
    seconds = time.monotonic() - start
    if value is None or not math.isfinite(value):
        return Outcome(False, f"its evaluation is {value}", seconds)
    return Outcome(True, f"{value:.4g}", seconds)


def read(path: Path) -> dict[Entry, Outcome]:
    """The outcomes of earlier calls in the order of the table; the last of each counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    known = {}
    for line in lines:
        fields = json.loads(line)
        repository = fields.pop("repository")
        known[repository] = Outcome(**fields)
    return {e: known[e.repository] for e in ENTRIES if e.repository in known}


def table(results: dict[Entry, Outcome]) -> str:
    """The table in Markdown."""
    rows = ["| repository | commit | outcome | evaluation, or first fault | s |"]
    rows.append("|---|---|---|---|---:|")
    for entry in ENTRIES:
        outcome = results.get(entry, Outcome(False, "not tried", 0.0))
        word = "runs" if outcome.runs else "fails"
        words = outcome.words.replace("|", "\\|")
        cells = (entry.repository, entry.commit, word, words, f"{outcome.seconds:.0f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def commands(entries: list[Entry]) -> str:
    """The commands of all entries in Markdown."""
    lines = []
    for entry in entries:
        lines += [f"### {entry.repository}", "", "```"]
        lines += [f"cd {entry.folder}"] if entry.folder else []
        lines += [f"cp {entry.copied.replace('=', ' ')}"] if entry.copied else []
        for command in entry.commands:
            start = f"{entry.variables} python -m corl.shim {entry.data} {entry.options}"
            words = f"{start} {command.format(task=TASK)}".split()
            short = "benchmarks/short_loops.py"
            lines.append(" ".join(short if word == SHORT else word for word in words))
        lines += ["```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = arguments.Parser(prog="python -m benchmarks.other_peoples_code")
    parser.add_argument("checkouts", type=arguments.path, help="folder of owner+name")
    parser.add_argument("--python", default=sys.executable, help="interpreter to use")
    parser.add_argument(
        "--only", nargs="+", default=[], help="parts of repositories' names"
    )
    seconds = arguments.number(float, "(0, 1e6]")
    parser.add_argument("--limit", type=seconds, default=180.0, help="seconds a command")
    parser.add_argument("--keep", type=arguments.path, help="folder for what they print")
    parser.add_argument(
        "--json",
        type=arguments.path,
        help="file of outcomes: those in it stand in the table too",
    )
    args = parser.parse_args()
    results = read(args.json) if args.json else {}
    for entry in ENTRIES:
        if args.only and not any(part in entry.repository for part in args.only):
            continue
        outcome = run_entry(entry, args.checkouts, args.python, args.limit, args.keep)
        results[entry] = outcome
        print(f"{entry.repository}: {outcome}", file=sys.stderr, flush=True)
        if args.json:
            with open(args.json, "a") as file:
                fields = {"repository": entry.repository, **vars(outcome)}
                file.write(json.dumps(fields) + "\n")
    print(table(results))
    count = sum(outcome.runs for outcome in results.values())
    print(f"\n{count} of {len(ENTRIES)} run. {json.dumps(machine.describe())}\n")
    print(commands(list(ENTRIES)))


if __name__ == "__main__":
    main()
