"""Collect data in any environment with a random policy, a policy's file or the policy of a run.

`collect.py` is its command line. The file has D4RL's schema, with next observations, and actions in
the environment's own range.
"""

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from corl import envs, files, tasks, trained
from corl.progress import progress_bar
from corl.standin import policies, rollout

# State (S,) -> action (A,) in [-1, 1].
Policy = Callable[[np.ndarray], np.ndarray]


def collect(
    task: tasks.Task,
    rows: int,
    out: Path,
    seed: int = 0,
    policy: Path | None = None,
    about: dict[str, str] | None = None,
    progress: bool = True,
) -> Path:
    """Roll a policy out into a new HDF5 file; its path. The last episode may be unfinished.

    Args:
        task: of any environment.
        rows: transitions in the file, at least 2.
        out: the file; its folder is made.
        seed: of the environment and of the policy's draws.
        policy: run folder, or file of `policies.save_policy`; default: uniform actions.
        about: further attributes of the file, such as versions.

    Raises:
        ValueError: `out` exists, or the policy cannot be had or does not fit the task.
        RuntimeError: no room or no right to write.
    """
    if out.exists():
        raise ValueError(f"{out} exists; delete it or choose another file with --out")
    with rollout.one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        act, named = policy_of(task, policy)
        columns = _roll_out(task, act, rows, seed, progress)

    def fill(file: h5py.File) -> None:
        made = {
            "source": "self-collected",
            "task": task.name,
            "rows": rows,
            "seed": seed,
        }
        file.attrs.update({**made, "policies": named, **(about or {})})
        for name, values in columns.items():
            file.create_dataset(name, data=values, compression="gzip", shuffle=True)

    with files.naming_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_hdf5(out, fill)
    return out


def policy_of(task: tasks.Task, policy: Path | None) -> tuple[Policy, str]:
    """A policy that draws from torch's global stream, and its name and digest as text.

    Raises:
        ValueError: as of `collect`.
    """
    if policy is None:
        return lambda state: 2.0 * torch.rand(task.action_dim).numpy() - 1.0, "random"
    if policy.is_dir():
        digest = files.sha256(_checkpoint(policy))
        return _of_run(task, policy), json.dumps({policy.resolve().name: digest})
    behavior = policies.load_behaviors(policy, "own", task, {})[0]
    network = behavior.policy
    assert network is not None

    @torch.no_grad()
    def act(state: np.ndarray) -> np.ndarray:
        inputs = torch.as_tensor(state, dtype=torch.float32)[None]
        return network(inputs, torch.randn(1, task.action_dim))[0][0].numpy()

    return act, json.dumps({policy.name: behavior.sha256})


def _checkpoint(folder: Path) -> Path:
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(
            f"--policy {folder} has no checkpoint.pt: name the folder of a run that has saved "
            "one, which it does at every evaluation, or a policy's .safetensors file"
        )
    return path


def _of_run(task: tasks.Task, folder: Path) -> Policy:
    """The policy of a run's last checkpoint as it acts online, without the noise that TD3 adds."""
    _checkpoint(folder)
    run = trained.read(folder)
    own = envs.task_of(run.config)
    sizes = own.state_dim, own.action_dim
    if sizes != (task.state_dim, task.action_dim):
        raise ValueError(
            f"--policy {folder} is of {own.name} with {sizes[0]} states and {sizes[1]} actions; "
            f"{task.name} has {task.state_dim} and {task.action_dim}"
        )
    actor = run.after.train()

    @torch.no_grad()
    def act(state: np.ndarray) -> np.ndarray:
        return actor.act((state - run.mean) / run.std, "cpu")

    return act


def _roll_out(
    task: tasks.Task, act: Policy, rows: int, seed: int, progress: bool
) -> dict[str, np.ndarray]:
    """The columns of `rows` transitions of one environment."""
    env = envs.make(task)
    states, actions = (rows, task.state_dim), (rows, task.action_dim)
    columns: dict[str, np.ndarray] = {
        "observations": np.empty(states, np.float32),
        "actions": np.empty(actions, np.float32),
        "rewards": np.empty(rows, np.float32),
        "next_observations": np.empty(states, np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": np.zeros(rows, bool),
    }
    state, _ = env.reset(seed=seed)
    for i in progress_bar(
        range(rows), desc=task.name, unit=" rows", disable=not progress
    ):
        action = np.clip(act(state), -1.0, 1.0)
        following, reward, terminated, truncated, _ = env.step(action)
        ends = terminated, truncated and not terminated
        row = state, task.to_env(action), reward, following, *ends
        for values, value in zip(columns.values(), row, strict=True):
            values[i] = value
        state = following
        if terminated or truncated:
            state, _ = env.reset()
    env.close()
    return columns
