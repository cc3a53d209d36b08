"""SAC (Haarnoja et al. 2018, arXiv 1812.05905), which trained the policies of `collect.py`.

The recipe of D4RL's locomotion data: 2x256 ReLU tanh-Gaussian policy, two critics of the same
size, learned temperature with target entropy -A, one update per environment step. Every
`snapshot_every` steps the policy is saved as safetensors with the returns of its *sampled*
actions, because sampled actions are what D4RL's datasets hold.

    python -m corl.standin.train_sac hopper --steps 300000 --out sac/hopper

An interrupted run goes on when the command is repeated, from a new episode. These commands ship
the snapshot that `collect.py` is to use as a level, and the series that its replay data comes
from, together with their returns:

    python -m corl.standin.train_sac hopper --out sac/hopper --ship 255000 --level medium
    python -m corl.standin.train_sac hopper --out sac/hopper \\
        --ship 30000 80000 255000 --level series
"""

import csv
import io
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from corl import arguments, checkpoints, envs, files, finite, locks, machine, tasks
from corl.progress import progress_bar
from corl.standin import policies

WARMUP = 5_000  # first steps of a training, in which actions are uniform


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
        """States (B, S), actions (B, A) -> both values (2, B)."""
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
            self.policy = policies.TanhGaussianPolicy(state_dim, action_dim).to(device)
            self.critic = TwinQ(state_dim, action_dim).to(device)
            self.target = TwinQ(state_dim, action_dim).to(device)
        self.target.load_state_dict(self.critic.state_dict())
        self.target.requires_grad_(False)
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        groups: list[list[torch.Tensor]] = [
            list(self.policy.parameters()),
            list(self.critic.parameters()),
            [self.log_alpha],
        ]
        self.optimizers = [torch.optim.Adam(g, lr=3e-4, fused=True) for g in groups]
        self.generator = torch.Generator(device).manual_seed(seed)

    def noise(self, n: int) -> torch.Tensor:
        """Normal noise (n, A)."""
        return torch.randn(
            n, self.action_dim, generator=self.generator, device=self.device
        )

    @torch.no_grad()
    def act(self, state: np.ndarray) -> np.ndarray:
        """A sampled action (A,) in a state (S,)."""
        x = torch.as_tensor(state, dtype=torch.float32, device=self.device).unsqueeze(0)
        return self.policy(x, self.noise(1))[0][0].cpu().numpy()

    def update(
        self, batch: list[torch.Tensor], discount: float = 0.99, tau: float = 0.005
    ) -> None:
        """One step of critics, policy and temperature.

        Args:
            batch: states (B, S), actions (B, A), rewards (B,), next states (B, S), ends (B,).
        """
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

        # The critics' gradients are not needed for the policy's loss.
        self.critic.requires_grad_(False)
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
        """Networks, temperature, optimizers and the random stream."""
        return {
            "policy": self.policy.state_dict(),
            "critic": self.critic.state_dict(),
            "target": self.target.state_dict(),
            "log_alpha": self.log_alpha.detach().clone(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict, step: int) -> None:
        """Restore a `state_dict` of a step, of any device."""
        for name in ("policy", "critic", "target"):
            getattr(self, name).load_state_dict(state[name])
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        stream = state["generator"].cpu()
        if stream.numel() == self.generator.get_state().numel():
            self.generator.set_state(stream)
            return
        print(f"step {step} was on another kind of device: a new random stream begins")
        seed = checkpoints.fresh_seed(self.generator.initial_seed(), step)
        self.generator.manual_seed(seed)


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
    """Train SAC for `steps` environment steps; snapshots and `train.csv` go to `out`.

    Raises:
        ValueError: the training in `out` is further than `steps`.
        FloatingPointError: a transition or a weight is not finite; the last snapshot is kept.
        InUseError: another process trains in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locks.holding(out / "train.lock", str(out)):
        _train(robot, steps, out, seed, snapshot_every, warmup, batch_size, device)


def _train(
    robot: str,
    steps: int,
    out: Path,
    seed: int,
    snapshot_every: int,
    warmup: int,
    batch_size: int,
    device: str,
) -> None:
    facts = tasks.ROBOTS[robot]
    agent = SAC(facts.state_dim, facts.action_dim, device, seed)
    # One row per transition: state, action, reward, next state, end.
    widths = (facts.state_dim, facts.action_dim, 1, facts.state_dim, 1)
    buffer = torch.zeros(steps, sum(widths), device=device)
    start = _restore(out, agent, buffer)
    rng = np.random.default_rng([seed, start] if start else seed)
    env = envs.make_robot(robot)
    env.action_space.seed(seed + start)
    state, _ = env.reset(seed=seed + start)
    clock = time.time()
    for t in progress_bar(range(start, steps), initial=start, total=steps, desc=robot):
        action = env.action_space.sample() if t < warmup else agent.act(state)
        next_state, reward, terminated, truncated, _ = env.step(action)
        row = np.concatenate([state, action, [reward], next_state, [terminated]])
        if not np.isfinite(row).all():
            raise FloatingPointError(
                f"step {t + 1}: the state, action, reward or next state is not finite"
            )
        buffer[t] = torch.from_numpy(row)
        state = next_state
        if terminated or truncated:
            state, _ = env.reset()
        if t >= warmup:
            rows = torch.from_numpy(rng.integers(0, t + 1, batch_size)).to(device)
            s, a, r, s2, d = buffer[rows].split(widths, dim=1)
            agent.update([s, a, r.squeeze(1), s2, d.squeeze(1)])
        if (t + 1) % snapshot_every == 0:
            if bad := finite.bad_weight({"SAC": agent}):
                raise FloatingPointError(
                    f"step {t + 1}: {bad} is not finite: the training diverged; earlier "
                    f"snapshots stay in {out}"
                )
            _save_snapshot(out, agent, robot, t + 1, time.time() - clock)
            saved = {"step": t + 1, "agent": agent.state_dict()}
            with files.replacing(out / "state.pt") as file:
                torch.save({**saved, "buffer": buffer[: t + 1].cpu()}, file)


def _restore(out: Path, agent: SAC, buffer: torch.Tensor) -> int:
    """Put the state of an interrupted training into agent and buffer; its steps, 0 if none."""
    path = out / "state.pt"
    if not path.exists():
        _cut_log(out / "train.csv", 0)
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    start = saved["step"]
    if start > len(buffer):
        raise ValueError(f"{path} is at step {start}; --steps must be at least that")
    _cut_log(out / "train.csv", start)
    agent.load_state_dict(saved["agent"], start)
    buffer[:start] = saved["buffer"].to(buffer.device)
    return start


def _cut_log(path: Path, step: int) -> None:
    """Drop the lines after a step: a killed training writes them again."""
    if not path.exists():
        return
    header, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    kept = [line for line in lines if int(line.split(b",")[0]) <= step]
    if not kept:
        path.unlink()
        return
    with files.replacing(path) as file:
        file.write(b"".join([header, *kept]))


def _save_snapshot(out: Path, agent: SAC, robot: str, step: int, seconds: float) -> None:
    """Save the policy and a line of `train.csv` with the returns of its sampled actions."""
    returns = sampled_returns(agent, robot, 10, seed=10_000)
    policies.save_policy(agent.policy, out / f"policy_{step:07d}.safetensors")
    row = {
        "step": step,
        "return_mean": returns.mean(),
        "return_std": returns.std(),
        "alpha": agent.log_alpha.exp().item(),
        "seconds": seconds,
    }
    lines = io.StringIO()
    writer = csv.DictWriter(lines, row)
    if not (out / "train.csv").exists():
        writer.writeheader()
    writer.writerow(row)
    files.append(out / "train.csv", lines.getvalue())
    tqdm.write(
        f"{step}: return of sampled actions {returns.mean():.0f} ± {returns.std():.0f}"
    )


def ship(robot: str, out: Path, step: int, level: str, seed: int = 0) -> None:
    """Make the snapshot of `step` the shipped policy of a level and write it to the manifest.

    The float16 policy is evaluated, because it is the one that collects data: 100 episodes of
    sampled actions.

    Raises:
        ValueError: as of `snapshot`.
    """
    policy = policies.load_policy(snapshot(out, step))
    policies.POLICY_DIR.mkdir(exist_ok=True)
    path = policies.POLICY_DIR / f"{robot}_{level}.safetensors"
    policies.save_policy(policy, path, half=True)
    facts = _evaluated(robot, policies.load_policy(path), episodes=100)
    what = f"snapshot {step}"
    _to_manifest(robot, level, out, seed, {"step": step, **facts}, what)


def ship_series(robot: str, out: Path, steps: list[int], seed: int = 0) -> None:
    """Make the snapshots of `steps` the shipped series of a robot and write it to the manifest.

    Ten episodes of sampled actions per float16 policy say where the training stood.

    Raises:
        ValueError: as of `snapshot`.
    """
    steps = sorted(set(steps))
    series = {s: policies.load_policy(snapshot(out, s)) for s in steps}
    policies.POLICY_DIR.mkdir(exist_ok=True)
    path = policies.POLICY_DIR / f"{robot}_series.safetensors"
    policies.save_series(series, path)
    returns = [
        _evaluated(robot, policy, episodes=10)
        for policy in policies.load_series(path).values()
    ]
    facts = {"steps": steps, "warmup": WARMUP, "episodes": 10}
    for key in ("return_mean", "return_std"):
        facts[key] = [evaluated[key] for evaluated in returns]
    what = "series of the snapshots in steps"
    _to_manifest(robot, "series", out, seed, facts, what)


def snapshot(out: Path, step: int) -> Path:
    """The file of a training's snapshot.

    Raises:
        ValueError: there is none of this step; the message names the steps there are.
    """
    path = out / f"policy_{step:07d}.safetensors"
    if not path.is_file():
        there = sorted(
            int(p.stem.split("_")[1]) for p in out.glob("policy_*.safetensors")
        )
        raise ValueError(
            f"no snapshot of step {step} in {out}; it has {', '.join(map(str, there))}"
        )
    return path


def _evaluated(robot: str, policy: policies.TanhGaussianPolicy, episodes: int) -> dict:
    """Mean and standard deviation of the returns of a policy's sampled actions."""
    facts = tasks.ROBOTS[robot]
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
    """Write a shipped file's facts and the command that made it; copy the training's log."""
    with open(out / "train.csv", newline="") as handle:
        # The episodes of a snapshot draw noise, so their interval is part of the recipe.
        every = next(csv.DictReader(handle))["step"]
    name = f"{robot}_{level}.safetensors"
    command = f"python -m corl.standin.train_sac {robot} --seed {seed} "
    command += f"--snapshot_every {every}, {what}"
    facts = {"robot": robot, "level": level, **facts, "command": command}
    policies.add_to_manifest(name, facts)
    shutil.copy(out / "train.csv", policies.POLICY_DIR / f"{robot}_train.csv")
    print(f"{name}: return {facts['return_mean']} ± {facts['return_std']}")


def main() -> None:
    """The command line that the top of this file shows."""
    count = arguments.number(int, "[1, 1e9]")
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("robot", choices=["hopper", "halfcheetah", "walker2d"])
    parser.add_argument("--steps", type=count, default=1_000_000)
    parser.add_argument(
        "--out", type=arguments.path, required=True, help="folder of the snapshots"
    )
    parser.add_argument("--seed", type=arguments.number(int, arguments.SEED), default=0)
    parser.add_argument("--snapshot_every", type=count, default=10_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--ship", type=count, nargs="+", help="snapshots to ship instead of training"
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
    # The matrices are small: a second thread costs more than it brings.
    torch.set_num_threads(1)
    with arguments.errors_in_one_line("interrupted; repeat the command to go on"):
        if args.ship is None:
            device = machine.pick_device(args.device)
            settings = args.robot, args.steps, args.out, args.seed, args.snapshot_every
            train(*settings, device=device)
        elif args.level == "series":
            ship_series(args.robot, args.out, args.ship, args.seed)
        else:
            ship(args.robot, args.out, args.ship[0], args.level, args.seed)


if __name__ == "__main__":
    main()
