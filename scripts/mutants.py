"""Put one-line mistakes into the code, one at a time, and see whether a test fails.

    python scripts/mutants.py                      # all, with the wiring tests and a few more
    python scripts/mutants.py --only collector     # those whose text or file holds this word
    python scripts/mutants.py --jobs 2 tests/test_wiring.py

Each mistake is made in a copy of the tracked files in a temporary folder. Tests run in stages
until one fails: the wiring tests of the algorithm concerned, all wiring tests, the older ones.
A mistake whose text is in none of its files is reported as `not found` and counts neither as
caught nor as put in: then the code has moved, and the table has to follow.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
WIRING = ["tests/test_wiring.py", "tests/test_wiring_dare.py"]
OLDER = ["tests/test_hook.py", "tests/test_iql.py", "tests/test_cql.py"]
PRELOADED = (
    *("numpy", "torch", "torch.distributions", "torch._dynamo", "gymnasium", "yaml"),
    *(
        "hypothesis",
        "pyrallis",
        "safetensors.torch",
        "matplotlib.figure",
        "tqdm",
        "h5py",
    ),
)
# Tests whose names concern one algorithm, by the stem of its file.
FOCUS = {
    "iql": "iql and not dare_iql",
    "cql": "cql",
    "cal_ql": "cal_ql and not dare_cal_ql",
    "dare_iql": "dare_iql or of_iql",
    "dare_cal_ql": "dare_cal_ql or of_cal_ql",
}

# Where a text may stand: the file of today first, then the places that it may move to.
IQL = "*/iql.py corl/finetune.py"
CQL = "*/cql.py corl/finetune.py"
CALQL = "*/cal_ql.py corl/finetune.py"
DIQL = "*/dare_iql.py corl/finetune.py"
DCAL = "*/dare_cal_ql.py corl/finetune.py"
HOOK = "corl_dare/hook.py corl_dare/rows.py corl_dare/config.py"
ADAPTER = "corl_dare/upstream.py corl_dare/hook.py"
RUNS = "corl_dare/runs.py corl/runs.py corl/checkpoints.py"


class Mutant(NamedTuple):
    """One mistake: `old` becomes `new` at its first place in the first file that has it."""

    files: str  # globs, tried in order
    old: str
    new: str


COLLECTOR = [
    Mutant(IQL, "bool(terminated) and self.episode_step < self.horizon", "terminated"),
    Mutant(CQL, "bool(terminated) and self", "(terminated or truncated) and self"),
    Mutant(
        DCAL,
        "bool(terminated) and self.episode_step < self.horizon",
        "bool(terminated or truncated)",
    ),
    Mutant(
        CALQL, "self.episode_step < self.horizon", "self.episode_step <= self.horizon"
    ),
    Mutant(
        DIQL, "(self.state, action, reward, next", "(next_state, action, reward, next"
    ),
    Mutant(
        CQL,
        "(self.state, action, reward, next_state, real_done)",
        "(self.state, action, reward, self.state, real_done)",
    ),
    Mutant(CALQL, "        self.state = next_state\n", ""),
    Mutant(IQL, "        if self.config.normalize_reward:\n", "        if False:\n"),
    Mutant(
        DIQL,
        "        self.episode_step, self.episode_return, self.success = 0, 0.0, False\n"
        "\n    def state_dict",
        "\n    def state_dict",
    ),
    Mutant(CQL, "self.success or is_goal_reached", "is_goal_reached"),
    Mutant(
        CALQL, "self.episode_return += float(reward)", "self.episode_return = reward"
    ),
    Mutant(IQL, "noise.clamp(-self.config.noise_clip, self.config.noise_clip)", "noise"),
    Mutant(DIQL, "action + self.max_action * noise", "action + noise"),
    Mutant(IQL, "if self.config.iql_deterministic:", "if False:"),
    Mutant(
        DIQL,
        "        self.state, _ = self.env.reset()\n        self.episode_step, ",
        "        self.episode_step, ",
    ),
]
EVALUATION = [
    Mutant(IQL, "    actor.train()\n", ""),
    Mutant(CQL, "    actor.train()\n", ""),
    Mutant(DCAL, "    actor.train()\n", ""),
    Mutant(DIQL, "    actor.eval()\n", ""),
    Mutant(CALQL, "    actor.eval()\n", ""),
    Mutant(IQL, "config.seed if config.compat else config.eval_seed", "config.seed"),
    Mutant(
        DCAL, "config.seed if config.compat else config.eval_seed", "config.eval_seed"
    ),
    Mutant(CQL, "seed=seed if episode == 0 else None", "seed=seed"),
    Mutant(DIQL, "seed=seed if episode == 0 else None", "seed=None"),
    Mutant(CALQL, 'if phase == "online" and config', "if config"),
    Mutant(
        IQL, "self.collector.successes if config.compat else self.successes", "[success]"
    ),
    Mutant(CQL, "self.collector.successes if config.compat", "self.successes if True"),
    Mutant(DCAL, "done = terminated or truncated", "done = truncated"),
    Mutant(CQL, "np.mean(counted)) if", "np.mean(counted[-1:])) if"),
]
LOOP = [
    Mutant(
        IQL,
        "online = t >= config.offline_iterations",
        "online = t > config.offline_iterations",
    ),
    Mutant(CQL, "            if online:\n", "            if True:\n"),
    Mutant(DIQL, "config.utd if online else 1", "config.utd"),
    Mutant(CALQL, "config.utd if online else 1", "1"),
    Mutant(DCAL, "t < config.offline_iterations + config.online_warmup", "False"),
    Mutant(
        IQL,
        "t < config.offline_iterations + config.online_warmup",
        "t < config.online_warmup",
    ),
    Mutant(
        CQL,
        "t < config.offline_iterations + config.online_warmup",
        "t <= config.offline_iterations + config.online_warmup",
    ),
    Mutant(CALQL, "(t + 1) % config.eval_freq", "t % config.eval_freq"),
    Mutant(DIQL, "(t + 1) % config.log_freq", "(t + 1) % config.eval_freq"),
    Mutant(DCAL, 'phase = "online" if online else "offline"', 'phase = "offline"'),
    Mutant(IQL, "actor, t + 1, phase)", "actor, t, phase)"),
    Mutant(DIQL, "losses, **collector.episode}", "losses}"),
    Mutant(CALQL, "online_source if online else buffer", "buffer"),
    Mutant(DCAL, "online_source if online else buffer", "buffer"),
    Mutant(
        DIQL, "start_online(config.actor_lr_online)", "start_online(config.actor_lr)"
    ),
    Mutant(IQL, "trainer.anneal and not config.compat", "trainer.anneal"),
    Mutant(
        IQL, "            if online and trainer.anneal", "            if trainer.anneal"
    ),
    Mutant(DIQL, "        self.anneal = False\n", ""),
    Mutant(CQL, "config.cql_alpha_online)", "config.cql_alpha)"),
    Mutant(DCAL, "config.cql_alpha_online)", "config.cql_alpha)"),
    Mutant(CALQL, "            self.switch_calibration()\n", "            pass\n"),
    Mutant(DCAL, "= config.dare.keep_calibration\n", "= False\n"),
    Mutant(DCAL, "= config.dare.keep_calibration\n", "= True\n"),
    Mutant(
        DIQL, "if online and isinstance(online_source", "if isinstance(online_source"
    ),
    Mutant(
        IQL,
        "            with run.measured_updates(count)",
        "            with run.measured_updates(1)",
    ),
    Mutant(CQL, "checkpoint_{t}.pt", "checkpoint_{t + 1}.pt"),
    Mutant(DIQL, "if config.checkpoints_path is not None:", "if False:"),
    Mutant(CALQL, "        if config.load_model:\n", "        if False:\n"),
    Mutant(DCAL, "                run.step = t + 1\n", ""),
    Mutant(IQL, "                run.save(parts)\n", ""),
    Mutant(CQL, "    runs.set_rng_state(streams)\n", ""),
    Mutant(DIQL, "    runs.set_rng_state(streams)\n", ""),
]
DATA = [
    Mutant(IQL, "        env = wrap_env(env, state_mean, state_std)\n", ""),
    Mutant(DCAL, "        eval_env = wrap_env(eval_env, state_mean, state_std)\n", ""),
    Mutant(CQL, '("observations", "next_observations")', '("observations",)'),
    Mutant(DIQL, "(state - state_mean) / state_std", "(state - state_mean) * state_std"),
    Mutant(IQL, "set_seed(config.seed, env)", "set_seed(config.eval_seed, env)"),
    Mutant(CALQL, "set_seed(config.seed, env)", "set_seed(config.seed)"),
    Mutant(DCAL, "set_seed(config.seed, env)", "set_seed(config.seed, eval_env)"),
    Mutant(IQL, 'kwargs["max_ret"] - kwargs["min_ret"]', 'kwargs["max_ret"]'),
    Mutant(
        DIQL,
        'return reward - 1.0 if "antmaze" in env_name',
        'return reward if "antmaze" in env_name',
    ),
    Mutant(CQL, "return reward * reward_scale + reward_bias", "return reward"),
    Mutant(
        DCAL,
        "return reward * reward_scale + reward_bias",
        "return reward * reward_scale",
    ),
    Mutant(
        CALQL,
        "{**modify_reward(data, config.env, **linear), **linear}",
        "modify_reward(data, config.env, **linear)",
    ),
    Mutant(DCAL, "else -math.inf", "else 0.0"),
    Mutant(CALQL, "0.0 if self._compat else -math.inf", "-math.inf"),
    Mutant(
        CALQL,
        "int(batch_size * self.mixing_ratio)",
        "int(batch_size * (1 - self.mixing_ratio))",
    ),
    Mutant(
        IQL,
        "for rows in zip(offline, online, strict=True)",
        "for rows in zip(online, offline, strict=True)",
    ),
    Mutant(DIQL, "randint(0, self._size, size", "randint(0, self._buffer_size, size"),
    Mutant(CQL, "randint(0, self._size, size", "randint(0, self._loaded, size"),
    Mutant(
        CALQL,
        'data["mc_returns"] = get_return_to_go(data',
        'data["mc_returns"] = data["rewards"] if 1 else (data',
    ),
]
RESUME = [
    Mutant(IQL, "            run.restore(parts)\n", "            pass\n"),
    Mutant(CQL, '            "collector": collector,\n', ""),
    Mutant(CALQL, '            "evaluator": evaluator,\n', ""),
    Mutant(DCAL, '            "online_buffer": online_buffer,\n', ""),
    Mutant(DIQL, '            parts["hook"] = online_source\n', ""),
    Mutant(IQL, '        envs.set_state(self.env, state["env"])\n', ""),
    Mutant(DCAL, '= state["unfinished"]\n', "= 0, 0.0, False\n"),
    Mutant(
        DIQL,
        '            self.dare_generator.set_state(state_dict["dare_generator"].cpu())\n',
        "            pass\n",
    ),
    Mutant(IQL, '            "q_target": self.q_target.state_dict(),\n', ""),
    Mutant(CQL, '        self.total_it = state_dict["total_it"]\n', ""),
    Mutant(
        CALQL, '        self.successes = list(state["successes"])\n', "        pass\n"
    ),
    Mutant(
        CQL,
        'self._pointer, self._size = state["pointer"], max(last, self._loaded)',
        "self._size = last",
    ),
    Mutant(RUNS, '        set_rng_state(state["rng"])\n', ""),
    Mutant(
        HOOK, '        self.row_generator.set_state(state["row_generator"].cpu())\n', ""
    ),
    Mutant(HOOK, '        self.generator.set_state(state["generator"].cpu())\n', ""),
    Mutant(HOOK, 'state["calls"], state["energy_steps"]', 'state["calls"], 0'),
    Mutant(
        HOOK,
        'self.calls, self.energy_steps = state["calls"]',
        "self.calls, self.energy_steps = 0",
    ),
    Mutant(
        HOOK, 'self.energy_optimizer.load_state_dict(state["energy_optimizer"])', "pass"
    ),
    Mutant(
        HOOK,
        "                cache.load_state_dict(part, self.device)\n",
        "                pass\n",
    ),
]
MAKE_HOOK = [
    Mutant(
        DIQL,
        "        q_function=trainer.q_target,\n",
        "        q_function=trainer.qf,\n",
    ),
    Mutant(
        DCAL,
        "        q_function=trainer.target_q,\n",
        "        q_function=trainer.critic_1,\n",
    ),
    Mutant(
        DCAL,
        "        return torch.minimum(\n            self.target_critic_1",
        "        return torch.maximum(\n            self.target_critic_1",
    ),
    Mutant(DIQL, "        state_mean=state_mean,\n", ""),
    Mutant(DCAL, "        state_std=state_std,\n", ""),
    Mutant(
        DIQL, "        max_action=trainer.max_action,\n        device", "        device"
    ),
    Mutant(DCAL, "        max_action=trainer.actor.max_action,\n", ""),
    Mutant(DIQL, "        mixing_ratio=config.mixing_ratio,\n", ""),
    Mutant(DCAL, "        mixing_ratio=config.mixing_ratio,\n", ""),
    Mutant(DIQL, "        clipped_policy=True,\n", ""),
    Mutant(DCAL, "        q_scale=q_scale,\n", ""),
    Mutant(
        DIQL,
        "return_reward_range(dataset.arrays, horizon)",
        "return_reward_range(dataset.arrays, 1000)",
    ),
    Mutant(DCAL, "config.reward_scale if config.normalize_reward else 1.0", "1.0"),
    Mutant(
        DIQL,
        "        offline,\n        online,\n        config.dare",
        "        offline,\n        offline,\n        config.dare",
    ),
    Mutant(
        DCAL,
        "raw_states = probe.raw(buffer._states[: buffer._size])",
        "raw_states = buffer._states[: buffer._size]",
    ),
    Mutant(
        DIQL,
        "raw_states = probe.raw(buffer._states[: buffer._size])",
        "raw_states = buffer._states[: buffer._size]",
    ),
    Mutant(DIQL, 'dataset_hash=dataset.provenance["sha256"]', 'dataset_hash="data"'),
    Mutant(
        DCAL,
        "                buffer._actions[: buffer._size],\n",
        "                buffer._rewards[: buffer._size].repeat(1, 2),\n",
    ),
]
HOOK_MUTANTS = [
    Mutant(HOOK, "                skip_inverted=self.config.skip_inverted,\n", ""),
    Mutant(
        HOOK,
        "self.config.alignment, self.config.alignment_sigma",
        "self.config.alignment",
    ),
    Mutant(
        HOOK,
        "actions, clipped, self.config.alignment,",
        'actions, clipped, "gaussian_kl",',
    ),
    Mutant(HOOK, 'options["steps"] = self.config.sampler_steps', 'options["steps"] = 3'),
    Mutant(HOOK, "= self.config.guidance_scale\n", "= 1.0\n"),
    Mutant(
        HOOK,
        "n_offline = int(batch_size * self.mixing_ratio)\n        offline_rows",
        "n_offline = batch_size // 2\n        offline_rows",
    ),
    Mutant(HOOK, "                cap=self.config.cap,\n", ""),
    Mutant(HOOK, "                rule=self.config.rule,\n", ""),
    Mutant(HOOK, "                weights=self.config.weights,\n", ""),
    Mutant(HOOK, "            batch = reorder(batch, result.order)\n", ""),
    Mutant(
        HOOK,
        "return batch, result.weight, {**result",
        "return batch, 1 - result.weight, {**result",
    ),
    Mutant(
        HOOK,
        "return int(batch_size * self.mixing_ratio) if hard",
        "return int(batch_size * (1 - self.mixing_ratio)) if hard",
    ),
    Mutant(
        HOOK,
        'self.config.enabled and self.config.weights == "hard"',
        "self.config.enabled",
    ),
    Mutant(
        HOOK,
        "clipped = references.clamp(-self.max_action, self.max_action)",
        "clipped = references",
    ),
    Mutant(HOOK, "return states * self.state_std + self.state_mean", "return states"),
    Mutant(
        HOOK,
        "return states * self.state_std + self.state_mean",
        "return (states + self.state_mean) * self.state_std",
    ),
    Mutant(HOOK, "self.behavior.sample(self.raw(states)", "self.behavior.sample(states"),
    Mutant(
        HOOK,
        "self.config.references, guided=True",
        "self.config.references, guided=False",
    ),
    Mutant(
        HOOK,
        "self.config.support_actions, guided=False",
        "self.config.support_actions, guided=True",
    ),
    Mutant(
        HOOK,
        "bounds = [self.max_action] if self.clipped_policy else []",
        "bounds = [self.max_action]",
    ),
    Mutant(
        HOOK,
        "self.policy_log_prob(states, actions) - behavior",
        "self.policy_log_prob(self.raw(states), actions) - behavior",
    ),
    Mutant(
        HOOK,
        "self.calls % self.config.energy_update_freq",
        "(self.calls + 1) % self.config.energy_update_freq",
    ),
    Mutant(HOOK, "self.last = states, rows", "self.last = states.flip(0), rows"),
    Mutant(
        HOOK,
        "picked[picked >= n_offline] - n_offline",
        "picked[picked >= n_offline] - 1",
    ),
    Mutant(
        HOOK,
        "rows[0][from_offline], rows[1][from_online]",
        "rows[0][from_offline], rows[1][: len(from_online)]",
    ),
    Mutant(HOOK, "            self.q_scale * q,\n", "            q,\n"),
    Mutant(
        HOOK,
        "            self.raw(states),\n            self.config.energy_beta",
        "            states,\n            self.config.energy_beta",
    ),
    Mutant(
        HOOK,
        "repeated = states.unsqueeze(1)",
        "repeated = self.raw(states).unsqueeze(1)",
    ),
    Mutant(HOOK, "            self.config.energy_beta,\n", "            1.0,\n"),
    Mutant(HOOK, "        self.energy_optimizer.step()\n", ""),
    Mutant(HOOK, "        self.energy_optimizer.zero_grad()\n", ""),
    Mutant(HOOK, "range(first + 1, last + 1)", "range(first + 1, last)"),
    Mutant(HOOK, "                if should_stop():\n                    return\n", ""),
    Mutant(
        HOOK, "states = storage(self.offline)[0]", "states = storage(self.offline)[3]"
    ),
    Mutant(
        HOOK, "[rows.numpy(), rows[:0].numpy()])", "[rows[:0].numpy(), rows.numpy()])"
    ),
    Mutant(HOOK, "        self.forget_overwritten()\n", ""),
    Mutant(HOOK, "now - made >= self.max_age", "now - made > self.max_age"),
    Mutant(
        HOOK,
        "self.support_caches = self._make_caches(None)",
        "self.support_caches = self._make_caches(1)",
    ),
    Mutant(HOOK, "            first += len(slots)\n", ""),
    Mutant(
        HOOK,
        "        batch_size=config.behavior_batch_size,\n        lr",
        "        batch_size=config.energy_batch_states,\n        lr",
    ),
    Mutant(
        HOOK,
        "        lr=config.behavior_lr,\n        seed",
        "        lr=config.energy_lr,\n        seed",
    ),
    Mutant(HOOK, "return 1.0 / reward_scale", "return reward_scale"),
    Mutant(HOOK, "lr=config.energy_lr\n", "lr=config.behavior_lr\n"),
]
RELEASE = [
    Mutant(DIQL, "source.first_released(len(weight))", "None"),
    Mutant(DCAL, "source.first_released(len(weight))", "None"),
    Mutant(DIQL, ", **source.follow()}", "}"),
    Mutant(DCAL, ", **source.follow()}", "}"),
    Mutant(
        DCAL,
        "F.pad(gap, (0, rows - first_released))",
        "F.pad(gap, (rows - first_released, 0))",
    ),
    Mutant(
        DCAL, "            gaps = [weight * gap for gap in gaps]\n", "            pass\n"
    ),
    Mutant(DCAL, "gaps = [weight * gap", "gaps = [(1 - weight) * gap"),
    Mutant(
        DCAL,
        "                x[:first_released]\n",
        "                x[-first_released:]\n",
    ),
    Mutant(
        DCAL,
        "        diffs = [gap.mean() for",
        "        diffs = [gap[:first_released].mean() for",
    ),
    Mutant(
        DCAL,
        "for x in (observations, next_observations, mc_returns, *predicted)",
        "for x in (observations, observations, mc_returns, *predicted)",
    ),
    Mutant(
        DIQL,
        "next_observations = next_observations[first_released:]",
        "next_observations = next_observations[: len(next_observations) - first_released]",
    ),
    Mutant(
        DIQL, "noise[:, first_released:]", "noise[:, : noise.shape[1] - first_released]"
    ),
    Mutant(DIQL, "amax(0), (first_released, 0))", "amax(0), (0, first_released))"),
    Mutant(
        DIQL,
        "self.qf(observations[first_released:], actions[0, first",
        "self.q_target(observations[first_released:], actions[0, first",
    ),
    Mutant(
        DIQL,
        "first_released:] - q,\n            (first_released, 0),",
        "first_released:] - q,\n            (0, first_released),",
    ),
    Mutant(
        DIQL,
        "weight * next_v + (1.0 - weight) * next_q",
        "weight * next_q + (1.0 - weight) * next_v",
    ),
    Mutant(
        DIQL,
        "weight * policy_losses + (1.0 - weight) * released",
        "weight * policy_losses + released",
    ),
    Mutant(
        DIQL,
        "self._max_backup(next_observations, noise[1:]",
        "self._max_backup(observations, noise[1:]",
    ),
    Mutant(DIQL, "noise[:1], first_released or 0", "noise[1:], first_released or 0"),
    Mutant(DIQL, "        q = self.q_target(repeated,", "        q = self.qf(repeated,"),
]
PATCHED = [
    Mutant(
        ADAPTER, "            self.hook.follow()  # after", "            pass  # after"
    ),
    Mutant(
        ADAPTER,
        "            self.hook.follow()  # after",
        "            self.hook.follow() and self.hook.follow()  # after",
    ),
    Mutant(ADAPTER, "= self.hook.first_released(batch_size)", "= None"),
    Mutant(
        ADAPTER,
        "batch, self.trainer.dare_weight, _ = self.hook.sample(batch_size)",
        "batch, _, _ = self.hook.sample(batch_size)",
    ),
    Mutant(
        ADAPTER,
        "self.add_transition = hook.online.add_transition",
        "self.add_transition = hook.offline.add_transition",
    ),
    Mutant(
        ADAPTER,
        'dataset["observations"] * state_std + state_mean',
        'dataset["observations"]',
    ),
    Mutant(
        ADAPTER,
        "energy_q_scale(config.env, high - low, reward_scale)",
        "energy_q_scale(config.env, high - low)",
    ),
    Mutant(
        ADAPTER,
        "energy_q_scale(config.env, high - low, reward_scale)",
        "energy_q_scale(config.env, high, reward_scale)",
    ),
    Mutant(ADAPTER, "        clipped_policy=clipped_policy,\n", ""),
    Mutant(
        ADAPTER,
        '        max_action=trainer.max_action if hasattr(trainer, "max_action") else 1.0,\n',
        "",
    ),
    Mutant(
        ADAPTER,
        "        mixing_ratio=mixing_ratio,\n        state_mean",
        "        state_mean",
    ),
    Mutant(
        ADAPTER,
        "        state_mean=state_mean,\n        state_std=state_std,\n        max_action=trainer",
        "        max_action=trainer",
    ),
    Mutant(
        ADAPTER,
        "        q_scale=q_scale,\n        mixing_ratio=mixing_ratio",
        "        mixing_ratio=mixing_ratio",
    ),
    Mutant(
        ADAPTER,
        'for key in ("observations", "actions"):',
        'for key in ("observations",):',
    ),
    Mutant(ADAPTER, "    trainer.dare = dare\n", ""),
    Mutant(
        ADAPTER,
        "torch.Generator(device).manual_seed(config.seed)\n    if not",
        "torch.Generator(device).manual_seed(0)\n    if not",
    ),
    Mutant(
        ADAPTER,
        "rows = np.random.randint(0, buffer._size, size=n)",
        "rows = np.random.randint(0, buffer._buffer_size, size=n)",
    ),
]
# Words of the tests that come first: what a group of mistakes most likely breaks.
HINTS = (
    (RELEASE, "weights or gap or iql_have or proposals or follows"),
    (PATCHED, "True or patched"),
    (HOOK_MUTANTS, "exchange or energy or references or support or ratio or weights"),
    (MAKE_HOOK, "fitted or energy or exchange or ratio or clipped or cache_of"),
    (EVALUATION, "evaluation or regret or explores or training_mode"),
    (COLLECTOR, "online_buffer or terminal or explores or metrics or noise or regret"),
    (DATA, "buffer or explores or batches or seeded or known_return"),
    (RESUME, "stopped"),
)
MUTANTS = [
    *(*RELEASE, *PATCHED, *HOOK_MUTANTS, *MAKE_HOOK),
    *(*LOOP, *EVALUATION, *COLLECTOR, *DATA, *RESUME),
]


def tracked(root: Path) -> list[str]:
    """The repository's files, tracked or new, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.splitlines() if (root / name).is_file()]


def copy_tree(target: Path) -> list[str]:
    """Copy what tests read; results are large and not needed."""
    names = [n for n in tracked(ROOT) if not n.startswith(("results/", "docs/"))]
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path)
    return names


def find(mutant: Mutant, names: list[str], root: Path) -> str | None:
    """The first file that has the text."""
    for glob in mutant.files.split():
        for name in sorted(names):
            if fnmatch(name, glob) and mutant.old in (root / name).read_text():
                return name
    return None


def preload() -> None:
    """Import what is slow and not under test, so that a forked child has it."""
    for name in PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)


def run_tests(root: Path, arguments: list[str]) -> str | None:
    """The first failing test, None when all pass. Runs in a fork of this process."""
    output = root / "pytest.txt"
    child = os.fork()
    if child == 0:
        with open(output, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(root)
        sys.path[:] = [
            str(root),
            *(p for p in sys.path if Path(p or ".").resolve() != ROOT),
        ]
        os.environ.update(PYTHONPATH=str(root), OMP_NUM_THREADS="1")
        options = ["-n", "0", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
        code = pytest.main([*options, *arguments])
        sys.stdout.flush()
        os._exit(int(code))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (0, 5):  # 5: no test was chosen
        return None
    lines = output.read_text().splitlines()
    lines = [x for x in lines if x.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0].split(" ", 1)[1] if lines else f"exit status {code}"


def stages(mutant: Mutant, name: str, tests: list[str]) -> list[list[str]]:
    """Arguments of pytest, the quickest first; given tests replace all."""
    if tests:
        return [tests]
    focus = FOCUS.get(Path(name).stem, "dare_iql")
    hint = next((hint for group, hint in HINTS if mutant in group), "test")
    return [[*WIRING, "-k", f"({focus}) and ({hint})"], WIRING, OLDER]


def try_mutant(mutant: Mutant, name: str, root: Path, tests: list[str]) -> str | None:
    """The test that caught the mistake in its file."""
    path = root / name
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new, 1))
    try:
        for arguments in stages(mutant, name, tests):
            failed = run_tests(root, arguments)
            if failed:
                return failed
        return None
    finally:
        path.write_text(text)


def describe(mutant: Mutant, name: str) -> str:
    old, new = (" ".join(text.split()) for text in (mutant.old, mutant.new))
    return f"{name}: `{old[:60]}` -> `{new[:60]}`"


def work(share: list[Mutant], root: Path, tests: list[str]) -> list[tuple[str, str]]:
    """(what became of it, description) of each mistake of this worker's share."""
    names, results = copy_tree(root), []
    for mutant in share:
        name = find(mutant, names, root)
        if name is None:
            results.append(("not found", describe(mutant, mutant.files)))
            continue
        test = try_mutant(mutant, name, root, tests)
        results.append(("caught" if test else "survived", describe(mutant, name)))
        print(f"{results[-1][0]}: {results[-1][1]}", flush=True)
        if test:
            print(f"    by {test}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tests", nargs="*", help="files or ids; default: in stages")
    parser.add_argument("--only", default="", help="those that hold this text")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--unchecked", action="store_true", help="no run without mistake"
    )
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if arguments.only in " ".join(m)]
    preload()
    start, jobs = time.time(), arguments.jobs
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.unchecked:
            copy_tree(Path(folder) / "whole")
            failed = run_tests(Path(folder) / "whole", arguments.tests or WIRING)
            if failed:
                raise SystemExit(f"a test fails without any mistake: {failed}")
        shares = [
            (chosen[i::jobs], Path(folder) / str(i), arguments.tests)
            for i in range(jobs)
        ]
        with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
            results = [
                r for part in pool.map(work, *zip(*shares, strict=True)) for r in part
            ]
    count = {kind: sum(k == kind for k, _ in results) for kind, _ in results}
    caught, survived = count.get("caught", 0), count.get("survived", 0)
    seconds = time.time() - start
    print(f"\ncaught {caught} of {caught + survived} in {seconds:.0f} s")
    for kind, line in results:
        if kind != "caught":
            print(f"{kind}: {line}")
    raise SystemExit(caught < len(results))


if __name__ == "__main__":
    main()
