"""SAC (Haarnoja et al. 2018, arXiv 1812.05905) that trains the behavior policies of `collect.py`.

The recipe of D4RL's locomotion data: 2x256 ReLU tanh-Gaussian policy, two critics of the same
size, learned temperature with target entropy -A, one update per environment step. Every
`snapshot_every` steps the policy is saved as safetensors with the returns of its *sampled*
actions, because sampled actions are what D4RL's datasets hold.

    python -m corl_dare.sac hopper --steps 300000 --out sac/hopper

An interrupted run goes on when the command is repeated (from a new episode). The snapshot that
`collect.py` is to use as a level, and the series that its replay data comes from, are shipped
with their returns by

    python -m corl_dare.sac hopper --out sac/hopper --ship 255000 --level medium
    python -m corl_dare.sac hopper --out sac/hopper --ship 30000 80000 255000 --level series
"""

import argparse
import csv
import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from corl_dare import envs
from corl_dare.progress import progress_bar

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
WARMUP = 5_000  # first steps of a training, which act uniformly
POLICY_DIR = Path(__file__).parent / "policies"  # shipped with the package


class TanhGaussianPolicy(nn.Module):
    """a = tanh(mean(s) + std(s) * noise), two hidden layers; actions in (-1, 1)."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int = 256):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(state_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, 2 * action_dim),
        )

    def forward(
        self, states: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, S), normal noise (B, A) -> actions (B, A), log-density (B,) in nats."""
        mean, log_std = self._mean_and_log_std(states)
        u = mean + log_std.exp() * noise
        return torch.tanh(u), _log_density(noise, log_std, u)

    def log_prob(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Log-density (B,) in nats of actions (B, A); those on the bounds are moved inside."""
        inside = actions.clamp(-1 + 1e-6, 1 - 1e-6)
        return self.log_prob_of_tanh(states, torch.atanh(inside))

    def log_prob_of_tanh(self, states: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Log-density (B,) in nats of tanh(u), u (B, A): exact where tanh rounds to 1."""
        mean, log_std = self._mean_and_log_std(states)
        return _log_density((u - mean) * (-log_std).exp(), log_std, u)

    def pre_tanh(self, states: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The u (B, A) whose tanh `forward` returns for the same noise (B, A)."""
        mean, log_std = self._mean_and_log_std(states)
        return mean + log_std.exp() * noise

    def _mean_and_log_std(
        self, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(states).chunk(2, dim=-1)
        return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


def _log_density(
    noise: torch.Tensor, log_std: torch.Tensor, u: torch.Tensor
) -> torch.Tensor:
    normal = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    # log(1 - tanh(u)^2), in the form that does not overflow
    jacobian = (2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))).sum(-1)
    return normal - jacobian


class TwinQ(nn.Module):
    """Both critics as one stack of weights: one batched product per layer instead of two."""

    def __init__(self, state_dim: int, action_dim: int, hidden_dim: int = 256):
        super().__init__()
        sizes = [state_dim + action_dim, hidden_dim, hidden_dim, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
            bound = 1.0 / math.sqrt(fan_in)
            self.weights.append(
                nn.Parameter(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound))
            )
            self.biases.append(
                nn.Parameter(torch.empty(2, 1, fan_out).uniform_(-bound, bound))
            )

    def forward(self, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """-> (2, B)"""
        x = torch.cat([states, actions], -1).expand(2, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if i < 2:
                x = F.relu(x)
        return x.squeeze(-1)


class SAC:
    """Networks, optimizers and one update; everything random comes from `self.generator`."""

    def __init__(self, state_dim: int, action_dim: int, device: str, seed: int):
        self.device, self.action_dim = device, action_dim
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.policy = TanhGaussianPolicy(state_dim, action_dim).to(device)
            self.critic = TwinQ(state_dim, action_dim).to(device)
            self.target = TwinQ(state_dim, action_dim).to(device)
        self.target.load_state_dict(self.critic.state_dict())
        self.target.requires_grad_(False)
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        groups = [
            list(self.policy.parameters()),
            list(self.critic.parameters()),
            [self.log_alpha],
        ]
        self.optimizers = [torch.optim.Adam(g, lr=3e-4, fused=True) for g in groups]
        self.generator = torch.Generator(device).manual_seed(seed)

    def noise(self, n: int) -> torch.Tensor:
        return torch.randn(
            n, self.action_dim, generator=self.generator, device=self.device
        )

    @torch.no_grad()
    def act(self, state: np.ndarray) -> np.ndarray:
        x = torch.as_tensor(state, dtype=torch.float32, device=self.device).unsqueeze(0)
        return self.policy(x, self.noise(1))[0][0].cpu().numpy()

    def update(self, batch: list[torch.Tensor], discount=0.99, tau=0.005) -> None:
        s, a, r, s2, d = batch
        policy_opt, critic_opt, alpha_opt = self.optimizers
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            a2, log_prob2 = self.policy(s2, self.noise(len(s)))
            next_q = self.target(s2, a2).amin(0) - alpha * log_prob2
            y = r + discount * (1.0 - d) * next_q
        critic_loss = (self.critic(s, a) - y).square().mean(1).sum()
        critic_opt.zero_grad()
        critic_loss.backward()
        critic_opt.step()

        self.critic.requires_grad_(False)  # saves the weight gradients nobody reads
        new_a, log_prob = self.policy(s, self.noise(len(s)))
        policy_loss = (alpha * log_prob - self.critic(s, new_a).amin(0)).mean()
        policy_opt.zero_grad()
        policy_loss.backward()
        policy_opt.step()
        self.critic.requires_grad_(True)

        entropy_gap = (log_prob.detach() - self.action_dim).mean()
        self.log_alpha.grad = -entropy_gap.reshape(())
        alpha_opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.target.parameters()), list(self.critic.parameters()), tau
            )

    def state_dict(self) -> dict:
        return {
            "policy": self.policy.state_dict(),
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
            "log_alpha": self.log_alpha.detach().clone(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("policy", "critic", "target"):
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"].cpu())


def save_policy(policy: TanhGaussianPolicy, path: Path, half: bool = False) -> None:
    """Write a policy as safetensors, rounded to float16 when `half`."""
    dtype = torch.float16 if half else torch.float32
    tensors = {k: v.detach().cpu().to(dtype) for k, v in policy.state_dict().items()}
    part = path.with_suffix(".part")
    save_file(tensors, part)
    os.replace(part, path)


def load_policy(path: Path) -> TanhGaussianPolicy:
    """Read a policy of `save_policy` as float32, on the CPU, frozen."""
    return _policy(load_file(path))


def save_series(policies: dict[int, TanhGaussianPolicy], path: Path) -> None:
    """Write the policies of several training steps as one float16 safetensors file."""
    tensors = {
        f"{step}/{key}": value.detach().cpu().half()
        for step, policy in policies.items()
        for key, value in policy.state_dict().items()
    }
    part = path.with_suffix(".part")
    save_file(tensors, part)
    os.replace(part, path)


def load_series(path: Path) -> dict[int, TanhGaussianPolicy]:
    """Read a file of `save_series`: training step -> policy as of `load_policy`, ascending."""
    weights: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        step, _, name = key.partition("/")
        weights.setdefault(int(step), {})[name] = value
    return {step: _policy(weights[step]) for step in sorted(weights)}


def _policy(tensors: dict[str, torch.Tensor]) -> TanhGaussianPolicy:
    tensors = {k: v.float() for k, v in tensors.items()}
    hidden, state_dim = tensors["net.0.weight"].shape
    policy = TanhGaussianPolicy(state_dim, tensors["net.4.weight"].shape[0] // 2, hidden)
    policy.load_state_dict(tensors)
    return policy.requires_grad_(False)


def sampled_returns(agent: SAC, robot: str, episodes: int, seed: int) -> np.ndarray:
    """Raw returns (episodes,) of the policy's sampled actions; episode i resets with seed + i."""
    env, returns = envs.make_robot(robot), []
    for episode in range(episodes):
        state, _ = env.reset(seed=seed + episode)
        total, done = 0.0, False
        while not done:
            state, reward, terminated, truncated, _ = env.step(agent.act(state))
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return np.array(returns)


def train(
    robot: str,
    steps: int,
    out: Path,
    seed: int = 0,
    snapshot_every: int = 10_000,
    warmup: int = WARMUP,
    batch_size: int = 256,
    device: str = "cpu",
) -> None:
    """Train SAC for `steps` environment steps; snapshots and `train.csv` go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    facts = envs.ROBOTS[robot]
    agent = SAC(facts.state_dim, facts.action_dim, device, seed)
    widths = (facts.state_dim, facts.action_dim, 1, facts.state_dim, 1)
    columns = list(np.cumsum((0, *widths)))
    buffer = torch.zeros(steps, columns[-1], device=device)  # one row per transition
    rng = np.random.default_rng(seed)
    env, start = envs.make_robot(robot), 0
    state_file = out / "state.pt"
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        start = saved["step"]
        if start > steps:
            raise ValueError(
                f"{state_file} is at step {start}; --steps must be at least that"
            )
        agent.load_state_dict(saved["agent"])
        buffer[:start] = saved["buffer"].to(device)
        rng = np.random.default_rng([seed, start])
    env.action_space.seed(seed + start)
    state, _ = env.reset(seed=seed + start)
    clock = time.time()
    for t in progress_bar(range(start, steps), initial=start, total=steps, desc=robot):
        action = env.action_space.sample() if t < warmup else agent.act(state)
        next_state, reward, terminated, truncated, _ = env.step(action)
        row = np.concatenate([state, action, [reward], next_state, [terminated]])
        buffer[t] = torch.from_numpy(row)
        state = next_state
        if terminated or truncated:
            state, _ = env.reset()
        if t >= warmup:
            rows = buffer[
                torch.from_numpy(rng.integers(0, t + 1, batch_size)).to(device)
            ]
            batch = [rows[:, i:j] for i, j in zip(columns, columns[1:], strict=False)]
            batch[2], batch[4] = batch[2].squeeze(1), batch[4].squeeze(1)
            agent.update(batch)
        if (t + 1) % snapshot_every == 0:
            returns = sampled_returns(agent, robot, 10, seed=10_000)
            save_policy(agent.policy, out / f"policy_{t + 1:07d}.safetensors")
            row = {
                "step": t + 1,
                "return_mean": returns.mean(),
                "return_std": returns.std(),
                "alpha": agent.log_alpha.exp().item(),
                "seconds": time.time() - clock,
            }
            new = not (out / "train.csv").exists()
            with open(out / "train.csv", "a", newline="") as handle:
                writer = csv.DictWriter(handle, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            part = state_file.with_suffix(".part")
            saved = {"step": t + 1, "agent": agent.state_dict()}
            torch.save({**saved, "buffer": buffer[: t + 1].cpu()}, part)
            os.replace(part, state_file)
            tqdm.write(
                f"{t + 1}: return of sampled actions {returns.mean():.0f} ± {returns.std():.0f}"
            )


def ship(robot: str, out: Path, step: int, level: str, seed: int = 0) -> None:
    """Make the snapshot of `step` the shipped policy of a level and write it to the manifest.

    The float16 policy is the one that is evaluated and that collects data: 100 episodes of
    sampled actions.
    """
    name = f"{robot}_{level}.safetensors"
    POLICY_DIR.mkdir(exist_ok=True)
    save_policy(load_policy(snapshot(out, step)), POLICY_DIR / name, half=True)
    policy = load_policy(POLICY_DIR / name)
    facts = {"step": step, **_evaluated(robot, policy, episodes=100)}
    _to_manifest(robot, level, out, seed, facts, f"snapshot {step}")


def ship_series(robot: str, out: Path, steps: list[int], seed: int = 0) -> None:
    """Make the snapshots of `steps` the shipped series of a robot and write it to the manifest.

    Ten episodes of sampled actions per float16 policy say where the training stood.
    """
    name = f"{robot}_series.safetensors"
    POLICY_DIR.mkdir(exist_ok=True)
    steps = sorted(set(steps))
    save_series({s: load_policy(snapshot(out, s)) for s in steps}, POLICY_DIR / name)
    returns = [
        _evaluated(robot, policy, episodes=10)
        for policy in load_series(POLICY_DIR / name).values()
    ]
    facts = {"steps": steps, "warmup": WARMUP, "episodes": 10}
    for key in ("return_mean", "return_std"):
        facts[key] = [evaluated[key] for evaluated in returns]
    what = "series of the snapshots in steps"
    _to_manifest(robot, "series", out, seed, facts, what)


def snapshot(out: Path, step: int) -> Path:
    """The file of a training's snapshot; ValueError names the steps there are, if not this."""
    path = out / f"policy_{step:07d}.safetensors"
    if not path.is_file():
        there = sorted(
            int(p.stem.split("_")[1]) for p in out.glob("policy_*.safetensors")
        )
        raise ValueError(
            f"no snapshot of step {step} in {out}; it has {', '.join(map(str, there))}"
        )
    return path


def _evaluated(robot: str, policy: TanhGaussianPolicy, episodes: int) -> dict:
    facts = envs.ROBOTS[robot]
    agent = SAC(facts.state_dim, facts.action_dim, "cpu", seed=0)
    agent.policy = policy
    returns = sampled_returns(agent, robot, episodes, seed=20_000)
    return {
        "return_mean": round(float(returns.mean()), 2),
        "return_std": round(float(returns.std()), 2),
        "episodes": episodes,
    }


def _to_manifest(
    robot: str, level: str, out: Path, seed: int, facts: dict, what: str
) -> None:
    with open(out / "train.csv", newline="") as handle:
        # A snapshot's episodes draw noise, so their interval is part of the recipe.
        every = next(csv.DictReader(handle))["step"]
    name = f"{robot}_{level}.safetensors"
    path = POLICY_DIR / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {}
    manifest[name] = {
        "robot": robot,
        "level": level,
        **facts,
        "sha256": hashlib.sha256((POLICY_DIR / name).read_bytes()).hexdigest(),
        "command": f"python -m corl_dare.sac {robot} --seed {seed} "
        f"--snapshot_every {every}, {what}",
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    os.replace(part, path)
    shutil.copy(out / "train.csv", POLICY_DIR / f"{robot}_train.csv")
    print(f"{name}: return {facts['return_mean']} ± {facts['return_std']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("robot", choices=["hopper", "halfcheetah", "walker2d"])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the snapshots"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--snapshot_every", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--ship", type=int, nargs="+", help="snapshots to ship instead of training"
    )
    parser.add_argument(
        "--level",
        choices=["medium", "expert", "series"],
        help="what they are shipped as",
    )
    args = parser.parse_args()
    if (args.ship is None) != (args.level is None):
        parser.error("--ship and --level belong together")
    if args.ship and args.level != "series" and len(args.ship) > 1:
        parser.error("a level is one snapshot; only --level series ships several")
    torch.set_num_threads(1)  # small matrices: a second thread costs more than it brings
    if args.ship is not None:
        try:
            if args.level == "series":
                ship_series(args.robot, args.out, args.ship, args.seed)
            else:
                ship(args.robot, args.out, args.ship[0], args.level, args.seed)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error
        return
    train(
        args.robot,
        args.steps,
        args.out,
        args.seed,
        args.snapshot_every,
        device=args.device,
    )


if __name__ == "__main__":
    main()
