"""Trains antmaze's walker: a gait is searched, then a network learns it.

D4RL's ant was trained by SAC on the distance to a goal, for millions of steps. Here the search
is for the eight numbers of a trot that walks in any direction without turning, by the
cross-entropy method (Rubinstein 1999) on the speed along a given heading; it takes a minute.
A network then clones it, because the trot has a clock and behavior data should come from a
policy of the state alone. Both run on the open plane, with D4RL's ant and torques.

    python -m corl.standin.train_walker --out walker          # gait.json, train.csv, policy
    python -m corl.standin.train_walker --out walker --ship   # evaluates, becomes the shipped one
"""

import csv
import dataclasses
import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mujoco
import numpy as np
import torch

from corl import antmaze, arguments, files, locks
from corl.progress import progress_bar
from corl.standin import policies, walker

# The four legs stand at these angles; each has a hip (about z) and an ankle. The ankles' axes
# alternate in sign. Diagonal legs swing together.
LEG_ANGLES = np.deg2rad([45.0, 135.0, 225.0, 315.0])
ANKLE_SIGNS = np.array([1.0, -1.0, -1.0, 1.0])
LEG_PHASES = np.array([0.0, math.pi, 0.0, math.pi])
MOTORS = [6, 7, 0, 1, 2, 3, 4, 5]  # joint of each motor: the fourth leg comes first


@dataclass(frozen=True)
class Gait:
    """A trot: joint targets that swing with a clock, and the torques towards them."""

    period: float  # steps of a cycle
    stride: float  # amplitude of the hips, rad
    ankle: float  # middle of the ankles, rad
    lift: float  # of the ankles, in and out of phase, rad
    reach: float  # of the ankles of legs that point along the heading, rad
    stiffness: float  # action per rad
    damping: float  # action per rad/s
    lead: float  # phase of the lift before the stride, rad

    def action(self, state: np.ndarray, heading: float, phase: float) -> np.ndarray:
        """Action (8,) in [-1, 1] for a state (29,), to walk along a heading (rad)."""
        # Angles of the legs against the heading.
        angles = LEG_ANGLES + walker.yaw(state) - heading
        phases = phase + LEG_PHASES
        swing = -np.cos(phases)
        targets = np.empty(policies.ACTIONS)
        targets[0::2] = self.stride * np.sin(angles) * swing
        targets[1::2] = ANKLE_SIGNS * (
            self.ankle
            + self.lift * np.sin(phases + self.lead)
            + self.reach * np.cos(angles) * swing
        )
        pull = self.stiffness * (targets - state[7:15]) - self.damping * state[21:29]
        return np.clip(pull, -1.0, 1.0)[MOTORS]


# The bounds of the search.
LOWEST = Gait(4.0, 0.3, 0.6, 0.0, -0.4, 0.5, 0.0, -1.5)
HIGHEST = Gait(12.0, 1.2, 1.1, 0.6, 0.4, 5.0, 0.6, 1.5)


class Plane:
    """D4RL's ant on its open plane."""

    def __init__(self) -> None:
        self.model = antmaze.load_model(None)
        self.data = mujoco.MjData(self.model)

    def reset(self, rng: np.random.Generator) -> np.ndarray:
        """Start with the noise of a maze's reset; the state (29,)."""
        mujoco.mj_resetData(self.model, self.data)
        noise = antmaze.POSE_NOISE
        self.data.qpos[:] += rng.uniform(-noise, noise, self.model.nq)
        self.data.qvel[:] = noise * rng.standard_normal(self.model.nv)
        mujoco.mj_forward(self.model, self.data)
        return self.state()

    def step(self, action: np.ndarray) -> np.ndarray:
        """Take an action (8,), which is clipped to [-1, 1]; the state (29,) after it."""
        self.data.ctrl[:] = antmaze.TORQUE * np.clip(action, -1.0, 1.0)
        mujoco.mj_step(self.model, self.data, nstep=antmaze.FRAME_SKIP)
        return self.state()

    def state(self) -> np.ndarray:
        """Positions (15,) and velocities (14,) in one array (29,)."""
        return np.concatenate([self.data.qpos, self.data.qvel])


def walk(
    plane: Plane,
    action: Callable[[np.ndarray, float, int], np.ndarray],
    heading: float,
    steps: int,
    noise: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Metres (steps,) along the heading after each step of a walk from rest.

    `action` maps a state (29,), a heading and the number of the step to an action (8,).
    """
    state, covered = plane.reset(rng), np.empty(steps)
    along = np.array([math.cos(heading), math.sin(heading)])
    start = state[:2] @ along
    for t in range(steps):
        jitter = noise * rng.standard_normal(policies.ACTIONS)
        state = plane.step(action(state, heading, t) + jitter)
        covered[t] = state[:2] @ along - start
    return covered


def gait_policy(gait: Gait) -> Callable[[np.ndarray, float, int], np.ndarray]:
    """The gait with its clock at 0 in the first step, for `walk`."""
    turn = 2 * math.pi / gait.period
    return lambda state, heading, t: gait.action(state, heading, turn * t)


def search(
    generations: int = 30,
    population: int = 40,
    elite: int = 8,
    steps: int = 60,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Gait, list[dict]]:
    """The gait whose walks under noise are fastest, and a row of numbers per generation.

    This is the cross-entropy method: every generation is drawn from a Gaussian that is fitted
    to the best of the last one. All gaits of a generation start from the same poses.

    Args:
        generations: how often gaits are drawn.
        population: gaits in a generation; `elite` of them are the best.
        steps: length of a walk.
    """
    rng, plane = np.random.default_rng(seed), Plane()
    low, high = (np.array(dataclasses.astuple(g)) for g in (LOWEST, HIGHEST))
    mean, std = (low + high) / 2, (high - low) / 3
    log = []
    title = "search of the gait"
    for generation in progress_bar(range(generations), desc=title, disable=not progress):
        draws = mean + std * rng.standard_normal((population, len(mean)))
        draws[0] = mean
        draws = draws.clip(low, high)
        seeds, speeds = rng.integers(2**32, size=2), np.empty(population)
        for i, draw in enumerate(draws):
            covered = [
                walk(
                    plane,
                    gait_policy(Gait(*draw)),
                    heading,
                    steps,
                    walker.NOISE,
                    np.random.default_rng(s),
                )[-1]
                for s, heading in zip(seeds, (0.0, math.pi / 6), strict=True)
            ]
            speeds[i] = np.mean(covered) / (0.1 * steps)
        if not np.isfinite(speeds).all():
            raise ValueError(
                f"generation {generation + 1}: a walk's speed is not finite"
            )
        order = np.argsort(-speeds)
        mean, std = draws[order[:elite]].mean(0), draws[order[:elite]].std(0)
        # Without a floor the search would end where it stands.
        std = np.maximum(std, 0.01 * (high - low))
        log.append(
            {
                "generation": generation + 1,
                "walks": 2 * population * (generation + 1),
                "speed_best": speeds[order[0]],
                "speed_elite": speeds[order[:elite]].mean(),
            }
        )
    # The mean of the last elite owes less to luck than the best single draw.
    return Gait(*mean.tolist()), log


def demonstrations(
    gait: Gait, walks: int, steps: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 27) and the gait's own actions (N, 8) in walks under three noise levels.

    Headings change now and then, and two of three walks start inside the cycle, so that the
    clone sees the states that it will meet in a maze.
    """
    plane, states, directions, actions = Plane(), [], [], []
    turn = 2 * math.pi / gait.period
    for number in range(walks):
        state, heading = plane.reset(rng), rng.uniform(0, 2 * math.pi)
        phase = rng.uniform(0, 2 * math.pi) if number % 3 else 0.0
        noise = walker.NOISE * rng.integers(3)
        for _ in range(steps):
            if rng.random() < 0.02:
                heading = rng.uniform(0, 2 * math.pi)
            states.append(state)
            directions.append([math.cos(heading), math.sin(heading)])
            actions.append(gait.action(state, heading, phase))
            state = plane.step(
                actions[-1] + noise * rng.standard_normal(policies.ACTIONS)
            )
            phase += turn
    return walker.features(np.array(states), np.array(directions)), np.array(actions)


def clone(
    inputs: np.ndarray, actions: np.ndarray, updates: int, seed: int
) -> tuple[policies.TanhGaussianPolicy, float]:
    """A policy whose mean action regresses the actions; the share of variance it explains.

    The share is measured on the last tenth of the rows, which are held out. The policy's own
    noise is as small as its format allows, because the collector adds noise of its own.

    Args:
        inputs: features (N, 27) of `walker.features`.
        actions: what to do there (N, 8).
        updates: steps of Adam on 256 random rows each.
        seed: decides the start weights and the rows.
    """
    count = len(inputs) * 9 // 10
    x, y = torch.from_numpy(inputs), torch.from_numpy(actions.astype(np.float32))
    center, spread = x[:count].mean(0), x[:count].std(0) + 1e-3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = policies.TanhGaussianPolicy(policies.FEATURES, policies.ACTIONS)
    first, last = (cast(torch.nn.Linear, policy.net[i]) for i in (0, -1))
    with torch.no_grad():
        last.weight[policies.ACTIONS :] = 0.0
        last.bias[policies.ACTIONS :] = policies.LOG_STD_MIN
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, updates)
    scaled = (x - center) / spread
    for _ in range(updates):
        rows = torch.randint(count, (256,), generator=generator)
        means = torch.tanh(policy.net(scaled[rows])[:, : policies.ACTIONS])
        loss = (means - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        # The policy is to take features as they are, so the scaling goes into its weights.
        first.weight /= spread
        first.bias.sub_(first.weight @ center)
        means = torch.tanh(policy.net(x[count:])[:, : policies.ACTIONS])
        left = (means - y[count:]).square().mean() / y[count:].var(0).mean()
    if not math.isfinite(left):
        raise ValueError(
            f"the clone's error is {float(left)} after {updates} updates; its training diverged"
        )
    return policy.requires_grad_(False), float(1 - left)


def evaluate(
    policy: policies.TanhGaussianPolicy, walks: int, steps: int = 300
) -> np.ndarray:
    """Speeds (walks,) in m/s along random headings from rest, under the collector's noise."""
    rng, plane = np.random.default_rng(20_000), Plane()

    def action(state: np.ndarray, heading: float, t: int) -> np.ndarray:
        direction = np.array([[math.cos(heading), math.sin(heading)]])
        return walker.act(policy, walker.features(state[None], direction))[0]

    speeds = np.empty(walks)
    for i in range(walks):
        heading = rng.uniform(0, 2 * math.pi)
        covered = walk(plane, action, heading, steps, walker.NOISE, rng)
        speeds[i] = covered[-1] / (0.1 * steps)
    return speeds


def train(out: Path, seed: int = 0) -> None:
    """Search the gait and clone it; `gait.json`, `train.csv` and the policy go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with locks.holding(out / "train.lock", str(out)):
        _train(out, seed)


def _train(out: Path, seed: int) -> None:
    gait, log = search(seed=seed)
    print(f"gait: {log[-1]['speed_elite']:.2f} m/s in its own search, {gait}")
    text = json.dumps(dataclasses.asdict(gait), indent=2, allow_nan=False) + "\n"
    files.write_text(out / "gait.json", text)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, log[0])
    writer.writeheader()
    writer.writerows(log)
    files.write_text(out / "train.csv", lines.getvalue())
    inputs, actions = demonstrations(gait, 300, 100, np.random.default_rng([seed, 1]))
    policy, explained = clone(inputs, actions, 5_000, seed)
    policies.save_policy(policy, out / walker.POLICY_NAME)
    speeds = evaluate(policy, 20)
    print(
        f"clone: explains {explained:.1%} of the gait's actions, walks "
        f"{speeds.mean():.2f} ± {speeds.std():.2f} m/s; written to {out / walker.POLICY_NAME}"
    )


def ship(out: Path, seed: int = 0) -> None:
    """Make the trained policy the shipped one, as float16, and write it to the manifest.

    Raises:
        ValueError: nothing was trained in `out`.
    """
    if not (out / walker.POLICY_NAME).is_file():
        raise ValueError(
            f"no {walker.POLICY_NAME} in {out}; train it first, without --ship"
        )
    policies.POLICY_DIR.mkdir(exist_ok=True)
    shipped = policies.POLICY_DIR / walker.POLICY_NAME
    policies.save_policy(
        policies.load_policy(out / walker.POLICY_NAME), shipped, half=True
    )
    speeds = evaluate(policies.load_policy(shipped), 100)
    facts = {
        "robot": "antmaze",
        "level": "walker",
        "speed_mean": round(float(speeds.mean()), 3),
        "speed_std": round(float(speeds.std()), 3),
        "episodes": len(speeds),
        "command": f"python -m corl.standin.train_walker --seed {seed}",
    }
    policies.add_to_manifest(walker.POLICY_NAME, facts)
    shutil.copy(out / "train.csv", policies.POLICY_DIR / "antmaze_train.csv")
    print(
        f"{walker.POLICY_NAME}: {speeds.mean():.2f} ± {speeds.std():.2f} m/s, 100 walks"
    )


def main() -> None:
    """The command line that the top of this file shows."""
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=arguments.path, required=True, help="folder of the training"
    )
    parser.add_argument("--seed", type=arguments.number(int, arguments.SEED), default=0)
    parser.add_argument(
        "--ship", action="store_true", help="ship the trained policy instead of training"
    )
    args = parser.parse_args()
    # The matrices are small: a second thread costs more than it brings.
    torch.set_num_threads(1)
    with arguments.errors_in_one_line("interrupted; the command begins anew"):
        (ship if args.ship else train)(args.out, args.seed)


if __name__ == "__main__":
    main()
