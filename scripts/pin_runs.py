"""Pins the numbers of short runs: what every algorithm file computes must stay the same bits.

    python scripts/pin_runs.py                   # compares this checkout with tests/pins.json
    python scripts/pin_runs.py --tree PATH --write    # writes it from a checkout of another commit

Each case is a run of an algorithm file on a small self-collected dataset, on the CPU, in one
thread, not compiled. The digests hold on the processor and with the versions that the file names.
Elsewhere the sums of the weights are compared, to a tolerance.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from corl import machine

ROOT = Path(__file__).parent.parent
PINS = ROOT / "tests" / "pins.json"
COMMON = (
    "--env hopper-random-v2 --dataset_source self-collected --dataset_rows 1500 "
    "--device cpu --buffer_size 4000 --offline_iterations 40 --online_iterations 60 "
    "--batch_size 32 --eval_freq 25 --n_episodes 1 --log_freq 5 --threads 1 "
    "--compile false --seed 3 --eval_seed 7 "
)
CQL = "--cql_n_actions 3 --cql_alpha 5 --cql_alpha_online 2 "
SMALL = "--dare.behavior_updates 20 --dare.behavior_batch_size 32 "
RATIO = (
    f"{SMALL} --dare.behavior mixture --dare.score policy_ratio --dare.guidance_scale 0 "
)
GUIDED = (
    f"{SMALL} --dare.behavior_width 0.05 --dare.sampler_steps 3 --dare.support_actions 4 "
    "--dare.energy_batch_states 8 --dare.energy_updates 10 --dare.energy_update_freq 2 "
    "--dare.guidance_scale 2.0 "
)
EDIS = (
    "--edis.refresh_every 25 --edis.samples 200 --edis.diffusion_updates 20 "
    "--edis.diffusion_batch_size 32 --edis.width 32 --edis.depth 2 "
    "--edis.sampler_steps 5 --edis.generation_batch_size 150 --edis.energy_updates 2 "
    "--edis.energy_batch_size 8 --edis.energy_levels 3 --edis.negatives 4 "
)
E2O = "--n_critics 3 --hidden_dim 32 --cql_n_actions 3 "
CFDG = (
    "--cfdg.refresh_every 25 --cfdg.samples 200 --cfdg.diffusion_updates 20 "
    "--cfdg.refresh_updates 10 --cfdg.diffusion_batch_size 32 --cfdg.width 32 "
    "--cfdg.depth 2 --cfdg.sampler_steps 5 --cfdg.generation_batch_size 150 "
)
# Name -> algorithm, flags beyond the common ones.
CASES = {
    "iql": ("iql", ""),
    "iql compat": ("iql", "--compat true"),
    "iql two buffers": (
        "iql",
        "--mixing_ratio 0.5 --utd 2 --online_warmup 10 --actor_lr_online 1e-4",
    ),
    "iql deterministic": (
        "iql",
        "--iql_deterministic true --normalize_reward true --actor_dropout 0.1 "
        "--expl_noise 0.2",
    ),
    "cql": ("cql", CQL),
    "cql compat": ("cql", f"{CQL} --compat true --bc_steps 5 --cql_lagrange true"),
    "cal_ql": ("cal_ql", CQL),
    "cal_ql compat": (
        "cal_ql",
        f"{CQL} --compat true --normalize_reward true --reward_scale 2 --reward_bias -1 "
        "--cql_max_target_backup true --backup_entropy true --target_update_period 2",
    ),
    "dare_iql guided": ("dare_iql", f"{GUIDED} --dare.reference_max_age 3"),
    "dare_iql soft": (
        "dare_iql",
        f"{RATIO} --dare.weights soft --dare.value offline",
    ),
    "dare_iql compat": (
        "dare_iql",
        f"{RATIO} --compat true --mixing_ratio 0.25 --dare.rule posterior "
        "--dare.score likelihood --dare.behavior gaussian",
    ),
    "dare_cal_ql": ("dare_cal_ql", CQL + RATIO),
    "dare_cal_ql guided, calibrated": (
        "dare_cal_ql",
        f"{CQL} {GUIDED} --normalize_reward true --reward_scale 2 "
        "--dare.keep_calibration true",
    ),
    "dare_cal_ql compat": (
        "dare_cal_ql",
        f"{CQL} {RATIO} --compat true --cql_lagrange true",
    ),
    "td3_bc": ("td3_bc", ""),
    "td3_bc two buffers, anneal": (
        "td3_bc",
        "--mixing_ratio 0.5 --utd 2 --online_warmup 10 --bc_online anneal "
        "--bc_anneal_steps 40 --bc_end 0.2 --policy_freq 3 --normalize_reward true",
    ),
    "pex": ("pex", "--online_warmup 0"),
    "opt_td3": ("opt_td3", "--online_warmup 12 --pretrain_updates 9 --utd 2"),
    "opt_td3 capacity": (
        "opt_td3",
        "--online_warmup 5 --pretrain_updates 4 --utd 1 --priority_capacity 1520 "
        "--kappa_steps 30 --weigh_outer false --inner_lr 0.01 --policy_freq 3",
    ),
    "opt_spot": (
        "opt_spot",
        "--vae_iterations 30 --vae_hidden_dim 64 --online_warmup 12 "
        "--pretrain_updates 9 --kappa_steps 30 --lambd_end 0.3",
    ),
    "pex clipped, greedy": (
        "pex",
        "--online_warmup 10 --utd 2 --mixing_ratio 0.25 --clip_actions true "
        "--eval_epsilon 0 --inv_temperature 0.5 --normalize_reward true",
    ),
    "baq_cal_ql": (
        "baq_cal_ql",
        f"{CQL} --baq.clone_updates 30 --baq.clone_batch_size 32 --sampling_refresh 9",
    ),
    "e2o": ("e2o", f"{E2O} --online_warmup 5"),
    "e2o gap kept, by row": (
        "e2o",
        f"{E2O} --online_warmup 10 --utd 2 --mixing_ratio 0.25 --cql_alpha_online 1 "
        "--uncertainty_by row --target_rule mean --exploration policy",
    ),
    "rlpd": (
        "rlpd",
        "--online_warmup 10 --random_steps 15 --utd 3 --mixing_ratio 0.25 --hidden_dim 32 "
        "--offline_iterations 0",
    ),
    "rlpd antmaze": (
        "rlpd",
        "--online_warmup 0 --random_steps 0 --utd 2 --hidden_dim 32 --n_hidden_layers 3 "
        "--n_target_critics 1 --backup_entropy false",
    ),
    "wsrl": ("wsrl", "--online_warmup 10 --hidden_dim 32 --cql_n_actions 3"),
    "wsrl cal_ql, penalty kept": (
        "wsrl",
        "--base cal_ql --online_warmup 0 --utd 2 --hidden_dim 32 --cql_n_actions 3 "
        "--cql_lagrange true --cql_alpha 1 --cql_alpha_online 1 --mixing_ratio 0.25 "
        "--max_target_backup_online true --state_dependent_std false --q_n_hidden_layers 3 "
        "--normalize_reward true --reward_scale 2 --reward_bias -1",
    ),
    "dare_wsrl": (
        "dare_wsrl",
        f"{RATIO} --online_warmup 10 --utd 2 --hidden_dim 32 --cql_n_actions 3 "
        "--cql_lagrange true",
    ),
    "dare_wsrl guided": (
        "dare_wsrl",
        f"{GUIDED} --base cal_ql --online_warmup 0 --hidden_dim 32 --cql_n_actions 3 "
        "--mixing_ratio 0.25 --dare.reference_max_age 3",
    ),
    "awac": ("awac", "--awac_lambda 0.3333"),
    "awac two buffers": ("awac", "--mixing_ratio 0.25 --hidden_dim 64 --gamma 0.9"),
    "rebrac": ("rebrac", "--hidden_dim 64"),
    "rebrac two buffers, target penalty": (
        "rebrac",
        "--mixing_ratio 0.5 --utd 2 --online_warmup 10 --bc_anneal_steps 40 --bc_end 0.2 "
        "--critic_bc_online keep --expl_noise 0.1 --hidden_dim 64",
    ),
    "dare_rebrac": ("dare_rebrac", f"{RATIO} --dare.policy_std 0.1 --hidden_dim 64"),
    "dare_rebrac guided, target penalty": (
        "dare_rebrac",
        f"{GUIDED} --critic_bc_online keep --hidden_dim 64",
    ),
    "spot": ("spot", "--vae_iterations 30 --vae_hidden_dim 64"),
    "spot two buffers, dropout": (
        "spot",
        "--vae_iterations 27 --vae_hidden_dim 64 --mixing_ratio 0.5 --utd 2 "
        "--online_warmup 10 --lambd_cool_steps 40 --lambd_end 0.3 --actor_dropout 0.1 "
        "--actor_init_w 0.001 --critic_init_w 0.003 --num_samples 2 --normalize true",
    ),
    "dare_spot": ("dare_spot", f"{RATIO} --vae_iterations 30 --vae_hidden_dim 64"),
    "dare_spot guided": (
        "dare_spot",
        f"{GUIDED} --vae_iterations 30 --vae_hidden_dim 64 --dare.reference_max_age 3",
    ),
    "dare_opt_spot": (
        "dare_opt_spot",
        f"{RATIO} --vae_iterations 30 --vae_hidden_dim 64 --online_warmup 12 "
        "--pretrain_updates 9 --kappa_steps 30",
    ),
    "dare_opt_spot guided": (
        "dare_opt_spot",
        f"{GUIDED} --vae_iterations 30 --vae_hidden_dim 64 --online_warmup 10 "
        "--pretrain_updates 4 --kappa_steps 30 --mixing_ratio 0.25 --utd 2 "
        "--dare.reference_max_age 3 --dare.weights soft",
    ),
    "td3_bc_sa filter": (
        "td3_bc_sa",
        "--trust_by iql --filter_updates 20 --part_trajectories 3 --online_warmup 10 "
        "--beta_lr 1e-4 --n_period 8 --beta_anneal_steps 40 --policy_freq_online 3",
    ),
    "td3_bc_sa half, paper": (
        "td3_bc_sa",
        "--preset paper --buffer_mode half --online_warmup 0 --beta_lr 1e-4 --n_period 8",
    ),
    "cql_sa": (
        "cql_sa",
        "--cql_n_actions 3 --part_trajectories 3 --online_warmup 10 --beta_lr 1e-4 "
        "--n_period 8 --beta_anneal_steps 40",
    ),
    "cql_sa lagrange, paper": (
        "cql_sa",
        "--preset paper --cql_n_actions 3 --buffer_mode all --online_warmup 0 "
        "--cql_lagrange true --cql_target_action_gap 0.8 --trust_penalty false "
        "--actor_bc_weight 0.5 --beta_lr 1e-4 --n_period 8",
    ),
    "famo2o_iql": ("famo2o_iql", "--balance_period 2"),
    "famo2o_iql public code, two buffers": (
        "famo2o_iql",
        "--preset public_code --mixing_ratio 0.25 --utd 2 --online_warmup 10 "
        "--beta_low 8 --beta_high 14 --iql_tau 0.9 --normalize_reward true",
    ),
    "famo2o_cql": ("famo2o_cql", "--cql_n_actions 3"),
    "famo2o_cql public code": (
        "famo2o_cql",
        "--preset public_code --cql_n_actions 3 --normalize_reward true --reward_scale 2",
    ),
    "cql two buffers": ("cql", f"{CQL} --mixing_ratio 0.25 --cql_lagrange true"),
    "dare_cql": ("dare_cql", f"{CQL} {RATIO} --cql_lagrange true"),
    "dare_cql guided": ("dare_cql", f"{CQL} {GUIDED} --dare.reference_max_age 3"),
    "dare_awac": ("dare_awac", f"{RATIO} --awac_lambda 0.3333"),
    "dare_awac guided": ("dare_awac", f"{GUIDED} --hidden_dim 64"),
    "dare_td3_bc": ("dare_td3_bc", RATIO),
    "edis_iql": ("edis_iql", f"{EDIS} --mixing_ratio 0.3"),
    "edis_iql every update, public energies": (
        "edis_iql",
        f"{EDIS} --edis.schedule every_update --edis.energies public "
        "--edis.normalize_rewards true --utd 2 --online_warmup 10",
    ),
    "edis_cal_ql": (
        "edis_cal_ql",
        f"{CQL} {EDIS} --mixing_ratio 0.3 --edis.model_terminals true "
        "--edis.guidance exact",
    ),
    "cfdg_iql": ("cfdg_iql", CFDG),
    "cfdg_iql two models": (
        "cfdg_iql",
        f"{CFDG} --cfdg.models unconditional --cfdg.model_terminals false "
        "--cfdg.normalize_rewards false --cfdg.offline_share 0.5 --utd 2 "
        "--online_warmup 10 --mixing_ratio 0.3",
    ),
    "dare_td3_bc guided": ("dare_td3_bc", f"{GUIDED} --dare.reference_max_age 3"),
    "dare_famo2o_cql": ("dare_famo2o_cql", f"{RATIO} --cql_n_actions 3"),
    "dare_cql_sa annealed": (
        "dare_cql_sa",
        f"{RATIO} --cql_n_actions 3 --online_warmup 10 --beta_lr 1e-4 --n_period 8 "
        "--beta_anneal cosine --beta_anneal_steps 40",
    ),
    "dare_cql_sa guided": (
        "dare_cql_sa",
        f"{GUIDED} --cql_n_actions 3 --online_warmup 0 --beta_lr 1e-4 --n_period 8 "
        "--cql_lagrange true --trust_penalty false --dare.reference_max_age 3",
    ),
}


def arguments(name: str, runs_dir: Path | str) -> list[str]:
    """The flags of a case."""
    return f"{COMMON} {CASES[name][1]} --runs_dir {runs_dir}".split()


def numbers_of(folder: Path) -> dict[str, Any]:
    """Digest of a run folder's networks, and per network the sum and the sum of absolutes."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    digest, sums = hashlib.sha256(), {}
    for part, value in sorted(state["parts"]["trainer"].items()):
        if not isinstance(value, dict) or "param_groups" in value:
            continue
        tensors = {k: v for k, v in sorted(value.items()) if isinstance(v, torch.Tensor)}
        for name, tensor in tensors.items():
            digest.update(f"{part}.{name}".encode() + tensor.numpy().tobytes())
        if tensors:
            flat = torch.cat([t.double().flatten() for t in tensors.values()])
            sums[part] = [flat.sum().item(), flat.abs().sum().item()]
    return {
        "networks": digest.hexdigest(),
        "sums": sums,
        "dataset": state["dataset_sha256"],
    }


def run(name: str, tree: Path, folder: Path) -> dict[str, Any]:
    """The numbers of a case with the files of a checkout."""
    algorithm = CASES[name][0]
    file = tree / "algorithms" / f"{algorithm}.py"
    if not file.is_file():  # before the baselines moved there
        file = tree / "corl" / f"{algorithm}.py"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(tree),
        "CORL_DARE_CACHE": str(folder / "cache"),
    }
    runs = folder / name.replace(" ", "-").replace(",", "")
    subprocess.run(
        [sys.executable, str(file), *arguments(name, runs)],
        env=environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return numbers_of(next(runs.iterdir()))


def commit_of(tree: Path) -> str:
    """The commit that a checkout is at."""
    command = ["git", "-C", str(tree), "rev-parse", "HEAD"]
    return subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to run")
    parser.add_argument("--write", action="store_true", help="write tests/pins.json")
    args = parser.parse_args()
    if not (args.tree / "corl").is_dir():
        parser.error(f"--tree {args.tree} is no checkout")
    with tempfile.TemporaryDirectory() as folder:
        found = {name: run(name, args.tree.resolve(), Path(folder)) for name in CASES}
    if args.write:
        record = {
            "commit": commit_of(args.tree),
            "processor": machine.describe()["processor"],
            # A name may stand for processors with different instructions.
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "versions": machine.versions(),
            "runs": found,
        }
        PINS.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        return
    pinned = json.loads(PINS.read_text())["runs"]
    for name, numbers in found.items():
        print(f"{name}: {'same' if numbers == pinned[name] else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
