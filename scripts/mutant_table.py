"""The mistakes that `mutants.py` puts into the code, by kind.

A mistake that no test could tell from the right code is no mistake and does not stand here: a
seed of the evaluation environment before its first reset, which is seeded anyway; an end by time
in a step that the horizon ends anyway; `max(last, loaded)` of an online buffer without dataset;
the seed of a behavior model's first weights, over which the fitted ones are loaded.
"""

from typing import NamedTuple

# Where a text may stand.
ACTING, BUFFERS = "corl/acting.py", "corl/buffers.py"
REWARDS, DATA = "corl/rewards.py", "corl/training_data.py"
FINETUNE, ROLLBACK = "corl/finetune.py", "corl/rollback.py"
DURATION = "corl/duration.py"
RUNS = "corl/runs.py corl/run_tables.py corl/summary.py corl/checkpoints.py"
CONFIG = "corl/config.py corl/layers.py"
IQL, CQL, CALQL = (f"algorithms/{name}.py" for name in ("iql", "cql", "cal_ql"))
DIQL, DCAL = "algorithms/dare_iql.py", "algorithms/dare_cal_ql.py"
HOOK, ROWS = "corl_dare/hook.py", "corl_dare/rows.py"
DARE, WEIGHTS = "corl_dare/config.py", "corl_dare/release.py"
SEED_RUNS, STACKED_SWEEP = (
    "corl/seeds.py corl/stacked_session.py",
    "experiments/stacked.py",
)
ADAPTER, PATCHES = "corl_dare/upstream.py", "scripts/make_patches.py"

# Words of the names of tests of one algorithm.
TESTS_OF = {
    "iql": "(iql and not dare)",
    "cql": "(cql and not cal)",
    "cal_ql": "(cal_ql and not dare)",
    "dare_iql": "(dare_iql or of_iql)",
    "dare_cal_ql": "(dare_cal_ql or of_cal_ql)",
}


class Mutant(NamedTuple):
    """One mistake: `old` becomes `new` at its first place in the first file that has it."""

    files: str  # globs, tried in order
    old: str
    new: str


class Group(NamedTuple):
    """Mistakes of one kind.

    cheap: files of tests of a few seconds, which come first.
    of: algorithm whose tests are taken, where the mistake is in no algorithm's file.
    first: words of the tests of the wiring that most likely see them, as in `pytest -k`, or none.
    more: files of tests that come after these.
    """

    cheap: str
    of: str
    first: str
    more: str
    mutants: list[Mutant]


COLLECTOR = Group(
    "",
    "cal_ql",
    "stores or terminal or explores or last_episode or regret or noise",
    "",
    [
        Mutant(ACTING, "bool(terminated) and in_time", "bool(terminated)"),
        Mutant(ACTING, "bool(terminated) and in_time", "bool(terminated or truncated)"),
        Mutant(
            ACTING,
            "self.episode_step < self.task.horizon",
            "self.episode_step <= self.task.horizon",
        ),
        Mutant(ACTING, "(self.state, action, stored", "(next_state, action, stored"),
        Mutant(
            ACTING,
            "stored, next_state, real_done",
            "stored, self.state, real_done",
        ),
        Mutant(ACTING, "        self.state = next_state\n", ""),
        Mutant(ACTING, "stored = self.reward(reward)", "stored = float(reward)"),
        Mutant(
            ACTING,
            "        self.episode_step, self.episode_return, self.success = 0, 0.0, False\n"
            "\n    def state_dict",
            "\n    def state_dict",
        ),
        # Not in an episode of evaluations side by side, which comes first.
        Mutant(
            ACTING,
            "return += float(reward)\n        self.success = self.success or is_goal",
            "return += float(reward)\n        self.success = is_goal",
        ),
        Mutant(
            ACTING,
            "self.episode_return += float(reward)",
            "self.episode_return = float(reward)",
        ),
        Mutant(
            ACTING,
            "        self.state, _ = self.env.reset()\n        self.episode_step, ",
            "        self.episode_step, ",
        ),
        Mutant(
            ACTING,
            "        if terminated or truncated:\n            self._finish",
            "        if terminated:\n            self._finish",
        ),
        Mutant(ACTING, "append(float(self.success))", "append(1.0)"),
        Mutant(ACTING, "float(self.episode_step)", "float(self.episode_step - 1)"),
        Mutant(
            ACTING,
            "self.task.normalized_score(self.episode_return)",
            "self.episode_return",
        ),
        Mutant(ACTING, "    return reward > 0\n", "    return False\n"),
    ],
)
EXPLORATION = Group(
    "",
    "iql",
    "noise or explores",
    "",
    [
        Mutant(ACTING, ".clamp(-clip, clip)", ""),
        Mutant(ACTING, "action + max_action * noise.numpy()", "action + noise.numpy()"),
        Mutant(
            ACTING,
            "max_action * noise.numpy(), -max_action, max_action)",
            "max_action * noise.numpy(), -1.0, 1.0)",
        ),
        Mutant(
            ACTING,
            "return action if explore is None else explore(action)",
            "return action",
        ),
        Mutant(
            FINETUNE,
            "self._collector.step(actor, explore)",
            "self._collector.step(actor)",
        ),
        Mutant(IQL, "explore if config.iql_deterministic else None", "explore"),
        Mutant(DIQL, "explore if config.iql_deterministic else None", "None"),
        Mutant(
            IQL,
            "scale=config.expl_noise,\n            clip=config.noise_clip",
            "scale=config.noise_clip,\n            clip=config.expl_noise",
        ),
        Mutant(
            DIQL,
            "            max_action=trainer.max_action",
            "            max_action=1.0",
        ),
    ],
)
EVALUATION = Group(
    "",
    "cal_ql",
    "evaluation or regret or explores or training_mode or apart",
    "",
    [
        Mutant(ACTING, "    actor.train()\n", ""),
        Mutant(ACTING, "    actor.eval()\n", ""),
        Mutant(
            ACTING,
            'config.COMPAT_EVAL_SEED if config.compat else "eval_seed"',
            "config.COMPAT_EVAL_SEED",
        ),
        Mutant(
            ACTING,
            'config.COMPAT_EVAL_SEED if config.compat else "eval_seed"',
            '"eval_seed"',
        ),
        Mutant(ACTING, "seed=seed if episode == 0 else None", "seed=seed"),
        Mutant(ACTING, "seed=seed if episode == 0 else None", "seed=None"),
        Mutant(ACTING, 'elif phase == "online" and task', "elif task"),
        Mutant(
            ACTING,
            "self.collector.successes if config.compat else self.successes",
            "[success]",
        ),
        Mutant(ACTING, "self.collector.successes if config.compat else self", "self"),
        Mutant(
            ACTING,
            "self.collector.successes if config.compat else self.successes",
            "self.collector.successes",
        ),
        Mutant(ACTING, "done = terminated or truncated", "done = truncated"),
        Mutant(ACTING, "np.mean(counted)", "np.mean(counted[-1:])"),
        Mutant(
            ACTING,
            "            total += float(reward)",
            "            total = float(reward)",
        ),
        Mutant(
            ACTING,
            "            success = success or is_goal",
            "            success = is_goal",
        ),
        Mutant(ACTING, "phase, returns, scores)}", "phase, scores, returns)}"),
        Mutant(ACTING, "float(np.mean(successes))", "float(np.max(successes))"),
        Mutant(ACTING, "            self.successes.append(success)\n", ""),
        Mutant(FINETUNE, "Evaluator(eval_env, config", "Evaluator(env, config"),
        Mutant(
            FINETUNE,
            "self._actor, step, self._phase",
            "self._actor, step - 1, self._phase",
        ),
    ],
)
SEEDS = Group(
    "",
    "cal_ql",
    "seeded or evaluation_seed or begins_at or changes_nothing",
    "",
    [
        Mutant(
            FINETUNE, "set_seed(config.seed, env)", "set_seed(config.eval_seed, env)"
        ),
        Mutant(FINETUNE, "set_seed(config.seed, env)", "set_seed(config.seed)"),
        Mutant(
            FINETUNE, "set_seed(config.seed, env)", "set_seed(config.seed, eval_env)"
        ),
        # The training environment is reset before it is seeded.
        Mutant(
            FINETUNE,
            """\
        set_seed(config.seed, env)
        set_env_seed(eval_env, config.eval_seed)
        self._reward = self._reward_rule(data.reward_args)
        self._collector = OnlineCollector(
            env,
            self.online_buffer,
            task,
            device,
            self._reward,
            config.uniform_steps(),
        )
""",
            """\
        self._reward = self._reward_rule(data.reward_args)
        self._collector = OnlineCollector(
            env,
            self.online_buffer,
            task,
            device,
            self._reward,
            config.uniform_steps(),
        )
        set_seed(config.seed, env)
        set_env_seed(eval_env, config.eval_seed)
""",
        ),
        Mutant(ACTING, "        set_env_seed(env, seed)\n", "        pass\n"),
        Mutant(
            ACTING,
            "(random.seed, np.random.seed, torch.manual_seed)",
            "(random.seed, torch.manual_seed)",
        ),
        Mutant(
            ACTING,
            "(random.seed, np.random.seed, torch.manual_seed)",
            "(random.seed, np.random.seed)",
        ),
        Mutant(DIQL, "manual_seed(config.seed)", "manual_seed(0)"),
        Mutant(DIQL, "manual_seed(config.seed)", "manual_seed(config.eval_seed)"),
    ],
)
BUFFER = Group(
    "",
    "cal_ql",
    "batches or known_return or offline_buffer or stores or mixing_ratio or terminal",
    "tests/test_iql.py tests/test_cql.py",
    [
        Mutant(BUFFERS, "0.0 if self._compat else -math.inf", "0.0"),
        Mutant(BUFFERS, "0.0 if self._compat else -math.inf", "-math.inf"),
        Mutant(
            BUFFERS,
            "int(batch_size * self.mixing_ratio)",
            "int(batch_size * (1 - self.mixing_ratio))",
        ),
        Mutant(
            BUFFERS,
            "for rows in zip(offline, online, strict=True)",
            "for rows in zip(online, offline, strict=True)",
        ),
        Mutant(
            BUFFERS, "randint(0, self._size, size", "randint(0, self._buffer_size, size"
        ),
        Mutant(
            BUFFERS,
            "randint(0, self._size, size",
            "randint(0, max(self._loaded, 1), size",
        ),
        Mutant(
            BUFFERS,
            "self._pointer = (self._pointer + 1) % self._buffer_size",
            "self._pointer = self._pointer + 1",
        ),
        Mutant(BUFFERS, "rows if self._compat else rows % self._buffer_size", "0"),
        Mutant(BUFFERS, "rows if self._compat else rows % self._buffer_size", "rows"),
        Mutant(
            BUFFERS, "first = 0 if wrapped else self._loaded", "first = self._loaded"
        ),
        Mutant(BUFFERS, "min(self._size + 1, self._buffer_size)", "self._size + 1"),
        Mutant(
            BUFFERS,
            'self._to_tensor(data["next_observations"])',
            'self._to_tensor(data["observations"])',
        ),
        Mutant(
            BUFFERS,
            '        self._dones[:rows] = self._to_tensor(data["terminals"][..., None])\n',
            "",
        ),
        Mutant(
            BUFFERS,
            "row: List[Any] = [state, action, reward, next_state, done]",
            "row: List[Any] = [state, action, reward, next_state, 0.0]",
        ),
        Mutant(
            DATA,
            "        device,\n        config.compat,\n",
            "        device,\n        False,\n",
        ),
        Mutant(
            FINETUNE,
            "            self.online_buffer = new_buffer(config, task, device)\n",
            "",
        ),
        Mutant(
            FINETUNE,
            "MixedBuffer(self.offline_buffer, self.online_buffer, ratio)",
            "MixedBuffer(self.offline_buffer, self.offline_buffer, ratio)",
        ),
        Mutant(
            FINETUNE,
            "            env,\n            self.online_buffer,\n",
            "            env,\n            self.offline_buffer,\n",
        ),
    ],
)
DATASET = Group(
    "",
    "cal_ql",
    "buffer or explores or known_return",
    "tests/test_iql.py tests/test_cql.py",
    [
        Mutant(REWARDS, 'kwargs["max_ret"] - kwargs["min_ret"]', 'kwargs["max_ret"]'),
        Mutant(REWARDS, "return reward - 1.0 if is_antmaze(env_name) else", "return"),
        Mutant(REWARDS, "return reward * reward_scale + reward_bias", "return reward"),
        Mutant(
            REWARDS,
            "return reward * reward_scale + reward_bias",
            "return reward * reward_scale",
        ),
        Mutant(
            REWARDS,
            'return {**args, "reward_scale": reward_scale, "reward_bias": reward_bias}',
            "return args",
        ),
        Mutant(REWARDS, 'reward / span * kwargs["max_episode_steps"]', "reward / span"),
        Mutant(REWARDS, '    dataset["rewards"] *= max_episode_steps\n', ""),
        Mutant(REWARDS, '        dataset["rewards"] -= 1.0\n', "        pass\n"),
        Mutant(REWARDS, "        reward_bias=config.reward_bias,\n", ""),
        Mutant(
            REWARDS,
            "    ),\n    modify_reward_linear_online,\n",
            "    ),\n    modify_reward_online,\n",
        ),
        Mutant(REWARDS, "+ config.discount * total", "+ total"),
        Mutant(REWARDS, '    ends |= dataset["terminals"].astype(bool)\n', ""),
        Mutant(REWARDS, "if done or length == max_episode_steps:", "if done:"),
        Mutant(DATA, "reward_rule(config).offline(", "SPAN_REWARDS.offline("),
        Mutant(DATA, "+ lengths * per_row", ""),
        Mutant(DATA, "_range_of(dataset.returns) if rule == EPISODES else None", "None"),
        Mutant(DATA, '("observations", "next_observations")', '("observations",)'),
        Mutant(DATA, "eps=1e-3", "eps=0.0"),
        Mutant(DATA, "    if config.normalize:\n", "    if True:\n"),
        Mutant(
            DATA,
            "    if config.normalize_reward:\n        reward_args",
            "    if True:\n        reward_args",
        ),
        # Returns-to-go of the rewards before they are scaled.
        Mutant(
            DATA,
            """\
    if config.normalize_reward:
        reward_args = _scale_rewards(config, dataset, rule)
        _check("rewards", arrays["rewards"], "normalize_reward")
    if keeps_mc_returns(config):
        arrays["mc_returns"] = get_return_to_go(arrays, task, config)
""",
            """\
    if keeps_mc_returns(config):
        arrays["mc_returns"] = get_return_to_go(arrays, task, config)
    if config.normalize_reward:
        reward_args = _scale_rewards(config, dataset, rule)
        _check("rewards", arrays["rewards"], "normalize_reward")
    if keeps_mc_returns(config):
""",
        ),
        Mutant(
            FINETUNE,
            "        if not self.config.normalize_reward:\n",
            "        if True:\n",
        ),
        # The states of one of the environments stay raw.
        Mutant(
            FINETUNE,
            "CheckedEnv(raw, role, config), mean, std)",
            "CheckedEnv(raw, role, config), *(() if raw is self._env else (mean, std)))",
        ),
        Mutant(
            FINETUNE,
            "CheckedEnv(raw, role, config), mean, std)",
            "CheckedEnv(raw, role, config), *((mean, std) if raw is self._env else ()))",
        ),
        Mutant(
            ACTING,
            "(state - state_mean) / state_std",
            "(state - state_mean) * state_std",
        ),
    ],
)
LOOP = Group(
    "tests/test_session_alone.py tests/test_session.py",
    "cal_ql",
    "turns or batches or evaluation or metrics or switch",
    "tests/test_runs.py",
    [
        Mutant(
            FINETUNE,
            'steps("offline", self.config.offline_iterations)',
            'steps("offline", self.config.offline_iterations - 1)',
        ),
        Mutant(
            FINETUNE,
            'self._phase, self._actor = "offline"',
            'self._phase, self._actor = "online"',
        ),
        Mutant(
            FINETUNE,
            'self._phase, self._actor = "online"',
            'self._phase, self._actor = "offline"',
        ),
        # The environment step comes after the updates.
        Mutant(
            FINETUNE,
            "            self._collector.step(actor, explore)\n            yield t\n",
            "            yield t\n            self._collector.step(actor, explore)\n",
        ),
        Mutant(
            FINETUNE,
            "            self._collector.step(actor, explore)\n            yield t\n",
            "            yield t\n",
        ),
        Mutant(
            FINETUNE,
            "online >= self.config.online_warmup",
            "online > self.config.online_warmup",
        ),
        Mutant(
            FINETUNE,
            "(self.config.utd if count is None else count) if warm else 0",
            "self.config.utd if count is None else count",
        ),
        Mutant(FINETUNE, "(self.config.utd if count is None", "(1 if count is None"),
        Mutant(
            FINETUNE,
            "online = self.run.step - self.config.offline_iterations",
            "online = self.run.step",
        ),
        Mutant(FINETUNE, "        self._count(count)\n", "        self._count(1)\n"),
        Mutant(
            FINETUNE,
            "        self._count(count)\n",
            "        self._count(self.config.utd)\n",
        ),
        Mutant(
            FINETUNE,
            "            self._count(1)\n            yield t",
            "            yield t",
        ),
        Mutant(FINETUNE, "        self._clock = time.perf_counter()\n", ""),
        Mutant(FINETUNE, "        self._clock = None\n\n    def log", "\n    def log"),
        Mutant(
            FINETUNE,
            "        self._stop_clock()\n        config, step",
            "        config, step",
        ),
        Mutant(FINETUNE, "self.config, self.run.step + 1", "self.config, self.run.step"),
        Mutant(FINETUNE, "{**metrics, **self._collector.episode}", "{**metrics}"),
        Mutant(
            FINETUNE,
            "step % self.config.eval_freq == 0",
            "(step - 1) % self.config.eval_freq == 0",
        ),
        Mutant(FINETUNE, "evaluated or step % config.log_freq == 0", "evaluated"),
        Mutant(
            FINETUNE,
            "evaluated or step % config.log_freq == 0",
            "step % config.log_freq == 0",
        ),
        Mutant(
            FINETUNE, "self.run.log(step, self._phase", 'self.run.log(step, "offline"'
        ),
        Mutant(RUNS, "for t in range(self.step, last)", "for t in range(last)"),
        Mutant(
            RUNS, "            if self.stop_requested:\n                return\n", ""
        ),
        Mutant(RUNS, "            self.step = t + 1\n", ""),
        Mutant(RUNS, "seen[-4:]", "seen[-3:]"),
        Mutant(
            RUNS,
            "Phases(offline, online, online or offline)",
            "Phases(offline, online, offline)",
        ),
        Mutant(
            CQL,
            "step(trainer, session.offline_buffer, config))\n        session",
            "step(trainer, source, config))\n        session",
        ),
        Mutant(
            DCAL,
            "step(trainer, session.offline_buffer, config))\n        session",
            "step(trainer, source, config))\n        session",
        ),
        Mutant(
            CALQL,
            "                losses = step(trainer, source, config)",
            "                losses = step(trainer, session.offline_buffer, config)",
        ),
        Mutant(
            DIQL,
            "                losses = step(trainer, source, config)",
            "                losses = step(trainer, session.mixed, config)",
        ),
        Mutant(
            IQL, "            session.log(losses)\n", "            session.log({})\n"
        ),
    ],
)
SWITCH = Group(
    "tests/test_session_alone.py tests/test_session.py",
    "cal_ql",
    "switch or rate or stopped or warm or calibration",
    "",
    [
        Mutant(
            FINETUNE,
            "if self.goes_online and not self.run.switched:",
            "if not self.run.switched:",
        ),
        # Again after each resume.
        Mutant(
            FINETUNE,
            "if self.goes_online and not self.run.switched:",
            "if self.goes_online:",
        ),
        Mutant(FINETUNE, "            self.run.switched = True\n", ""),
        Mutant(FINETUNE, "            change()\n", "            pass\n"),
        Mutant(
            FINETUNE,
            "            change()\n",
            "            change()\n            change()\n",
        ),
        Mutant(
            FINETUNE,
            "self.config.offline_iterations <= self.run.step <",
            "self.config.offline_iterations < self.run.step <",
        ),
        Mutant(RUNS, '"updates", "switched")', '"updates")'),
        Mutant(
            IQL, "start_online(config.actor_lr_online)", "start_online(config.actor_lr)"
        ),
        Mutant(DIQL, "start_online(config.actor_lr_online)", "start_online()"),
        Mutant(DIQL, "        if not config.compat:\n", "        if True:\n"),
        Mutant(IQL, "        self.anneal = False\n", ""),
        Mutant(IQL, "        if self.anneal:\n", "        if True:\n"),
        Mutant(
            CQL,
            "start_online(config.cql_alpha_online)",
            "start_online(config.cql_alpha)",
        ),
        Mutant(
            DCAL,
            "start_online(config.cql_alpha_online)",
            "start_online(config.cql_alpha)",
        ),
        Mutant(CALQL, "            self.switch_calibration()\n", "            pass\n"),
        Mutant(
            CALQL,
            "        if self._calibration_enabled:\n            self.switch",
            "        if not self._calibration_enabled:\n            self.switch",
        ),
        Mutant(DCAL, "= config.dare.keep_calibration\n", "= False\n"),
        Mutant(DCAL, "= config.dare.keep_calibration\n", "= True\n"),
    ],
)
SAVING = Group(
    "tests/test_session_alone.py tests/test_session.py",
    "cal_ql",
    "checkpoints or corls_files or load_model or stopped or killed",
    "tests/test_runs.py",
    [
        Mutant(FINETUNE, 'f"checkpoint_{step - 1}.pt"', 'f"checkpoint_{step}.pt"'),
        Mutant(FINETUNE, "if self.config.checkpoints_path is None:", "if True:"),
        Mutant(FINETUNE, "if loads and self.config.load_model and", "if False and"),
        Mutant(
            FINETUNE,
            "fits.load_weights(part, state, path)",
            "part.load_state_dict(state)",
        ),
        Mutant(FINETUNE, "            self.run.step = step\n", ""),
        Mutant(
            FINETUNE,
            "            self.save()\n            self._save",
            "            self._save",
        ),
        Mutant(
            FINETUNE,
            "        self.save()  # the last weights",
            "        pass  # the last weights",
        ),
        Mutant(
            FINETUNE,
            "        if self.run.stop_requested:\n            self.run.inter",
            "        if False:\n            self.run.inter",
        ),
        Mutant(
            FINETUNE,
            "        if self.run.checkpoint is not None:\n",
            "        if False:\n",
        ),
        Mutant(FINETUNE, '        self.keep("online_buffer", self.online_buffer)\n', ""),
        Mutant(
            FINETUNE,
            'self.keep("online_buffer", self.online_buffer)',
            'self.keep("online_buffer", self.offline_buffer)',
        ),
        Mutant(FINETUNE, '        self.keep("collector", self._collector)\n', ""),
        Mutant(FINETUNE, '        self.keep("evaluator", self._evaluator)\n', ""),
        Mutant(ACTING, 'physics.set_state(self.env, state["env"])', "True"),
        Mutant(ACTING, '= state["unfinished"]\n', "= 0, 0.0, False\n"),
        Mutant(ACTING, '        self.state = state["state"]\n', ""),
        Mutant(
            ACTING,
            '        self.successes = list(state["successes"])\n',
            "        pass\n",
        ),
        Mutant(
            ACTING,
            'list(state["successes"]), dict(state["episode"])',
            'list(state["successes"]), {}',
        ),
        Mutant(
            BUFFERS,
            'self._pointer, self._size = state["pointer"], max(last, self._loaded)',
            "self._size = max(last, self._loaded)",
        ),
        Mutant(
            RUNS,
            """\
            kept = checkpoints.set_rng_state(
                state["rng"], self.device, before, self.step
            )
""",
            "            kept = True\n",
        ),
        Mutant(RUNS, '    np.random.set_state(unpack(state["numpy"]))\n', ""),
        Mutant(RUNS, '    torch.set_rng_state(state["torch"])\n', ""),
        Mutant(RUNS, "for row in whole if int(row[0]) <= step)", "for row in whole)"),
        Mutant(
            RUNS,
            '"wall_seconds", "update_seconds", "updates",',
            '"wall_seconds", "update_seconds",',
        ),
        Mutant(RUNS, '*("scores", "wall_seconds"', '*("wall_seconds"'),
        Mutant(
            RUNS,
            'self.step = self.saved_step = state["step"]',
            'self.saved_step = state["step"]',
        ),
        Mutant(IQL, '            "q_target": self.q_target.state_dict(),\n', ""),
        Mutant(IQL, '            "anneal": self.anneal,\n', ""),
        Mutant(CQL, '        self.total_it = state_dict["total_it"]\n', ""),
        Mutant(CALQL, '            "calibration": self._calibration_enabled,\n', ""),
        Mutant(DCAL, '            "cql_alpha": self.cql_alpha,\n', ""),
        Mutant(
            DIQL,
            'put_back(self.dare_generator, state_dict["dare_generator"], self.total_it)',
            "True",
        ),
        # The hook is in no checkpoint.
        Mutant(DIQL, "session.make(", "(lambda name, make: make(config))("),
    ],
)
ESTIMATE = Group(
    "tests/test_session_alone.py tests/test_presets.py tests/test_session.py "
    "tests/test_rollback_kinds.py tests/test_rollback.py",
    "",
    "(cal_ql or dare_iql) and estimate",
    "",
    [
        Mutant(FINETUNE, "        snapshot.restore()\n", ""),
        Mutant(DURATION, "        vars(online).update(own)\n", "        pass\n"),
        Mutant(FINETUNE, "[] if run.switched else list", "list"),
        Mutant(FINETUNE, "> duration.LONG and not run.step", "> duration.LONG"),
        Mutant(DURATION, "total > HOUR and", "total > 0 and"),
        Mutant(
            FINETUNE,
            "            self._estimate(updates, watch, other, pretraining)\n",
            "            pass\n",
        ),
        Mutant(FINETUNE, "left[phase] * each[phase]", "each[phase]"),
        Mutant(
            FINETUNE,
            "(self._total - max(first, run.step)) * config.utd",
            "(self._total - max(first, run.step))",
        ),
        Mutant(FINETUNE, "max(first - run.step, 0),", "first,"),
        Mutant(FINETUNE, "self._total - max(first, run.step)", "self._total - first"),
        Mutant(
            DURATION,
            "sum(seconds) / (len(seconds) * self.period)",
            "sum(seconds) / self.period",
        ),
        Mutant(ROLLBACK, "        set_rng_state(self._streams)\n", ""),
        Mutant(
            ROLLBACK,
            "            _copy(tensor, old)\n            tensor.grad",
            "            tensor.grad",
        ),
        Mutant(
            ROLLBACK,
            "[*module.parameters(), *module.buffers()]",
            "[*module.parameters()]",
        ),
        Mutant(
            ROLLBACK,
            "            if part.training is not mode:\n                part.training = mode\n",
            "            pass\n",
        ),
        Mutant(ROLLBACK, "            group.update(old)\n", "            pass\n"),
        Mutant(ROLLBACK, "value.load_state_dict(state))", "None)"),
        Mutant(ROLLBACK, "value.set_state(stream))", "None)"),
        Mutant(
            ROLLBACK,
            "before.get(name, torch.zeros_like(value))",
            "before.get(name, value)",
        ),
        Mutant(ROLLBACK, "k: v.clone() if isinstance(v, torch.Tensor) else v", "k: v"),
        Mutant(
            ROLLBACK, "tensor = value.detach().clone()\n", "tensor = value.detach()\n"
        ),
        Mutant(ROLLBACK, "np.copyto(value, array))", "None)"),
        Mutant(ROLLBACK, "_refill(value, entries))", "None)"),
        Mutant(
            ROLLBACK, "            self._each(entries.values())\n", "            pass\n"
        ),
        Mutant(ROLLBACK, "value.__setitem__(slice(None), items))", "None)"),
        Mutant(
            ROLLBACK, "            setattr(value, name, old)\n", "            pass\n"
        ),
        Mutant(ROLLBACK, "        delattr(value, name)\n", "        pass\n"),
        Mutant(
            ROLLBACK,
            "            self._each(attributes.values())\n",
            "            pass\n",
        ),
        Mutant(
            ROLLBACK,
            "self._left_alone = {id(x) for x in leave}",
            "self._left_alone = set()",
        ),
    ],
)
FACTS = Group(
    "tests/test_session_alone.py tests/test_session.py",
    "dare_iql",
    "fitted or energy or exchange or ratio or clipped or cache_of or q_of",
    "tests/test_hook.py tests/test_prepare.py",
    [
        Mutant(
            FINETUNE,
            'get("offline", self.offline_buffer)',
            'get("offline", self.online_buffer)',
        ),
        Mutant(
            FINETUNE,
            'get("online", self.online_buffer)',
            'get("online", self.offline_buffer)',
        ),
        Mutant(
            FINETUNE, '"mixing_ratio": self.config.mixing_ratio', '"mixing_ratio": 0.5'
        ),
        Mutant(FINETUNE, "self.normalization.undo", "lambda states: states"),
        Mutant(FINETUNE, '"max_action": self.sizes.max_action', '"max_action": 1.0'),
        Mutant(FINETUNE, 'self.run.dataset["sha256"]', '"data"'),
        Mutant(FINETUNE, '"seed": self.config.seed', '"seed": self.config.eval_seed'),
        Mutant(FINETUNE, '"cache_dir": sources.cache_folder()', '"cache_dir": "runs"'),
        # Of the rewards before they are scaled.
        Mutant(
            DATA,
            "low, high = _range_of(returns)",
            "low, high = _range_of(dataset.returns)",
        ),
        Mutant(FINETUNE, "return high - low", "return high"),
        Mutant(
            FINETUNE,
            "self.run.panels, self.run.means, self.run.undefined = panels, means, undefined",
            "self.run.panels, self.run.undefined = panels, undefined",
        ),
        Mutant(FINETUNE, "part.begin(self.should_stop)", "part.begin()"),
        Mutant(DATA, "return states * self._std + self._mean", "return states"),
        Mutant(
            DATA,
            "return states * self._std + self._mean",
            "return (states + self._mean) * self._std",
        ),
        Mutant(DIQL, '"q_function": trainer.q_target', '"q_function": trainer.qf'),
        Mutant(DCAL, '"q_function": trainer.target_q', '"q_function": trainer.critic_1'),
        Mutant(DCAL, "            self.target_critic_1(", "            self.critic_1("),
        Mutant(DIQL, '"clipped_policy": True', '"clipped_policy": False'),
        Mutant(
            DIQL,
            "clipped_log_prob(trainer.actor, trainer.max_action)",
            "clipped_log_prob(trainer.actor, 1.0)",
        ),
        Mutant(
            DIQL,
            "                q_scale=lambda: energy_q_scale(config.env, session.return_span()),\n",
            "",
        ),
        Mutant(DCAL, "config.reward_scale if config.normalize_reward else 1.0", "1.0"),
        Mutant(DCAL, "source.pretrain(session.should_stop, session.save)", "pass"),
        Mutant(
            DIQL,
            "source.pretrain(session.should_stop, session.save)",
            "source.pretrain()",
        ),
        Mutant(
            DIQL,
            "if config.dare.enabled and session.goes_online:",
            "if config.dare.enabled:",
        ),
        Mutant(
            DIQL,
            "if config.dare.enabled:\n            session.show",
            "if True:\n            session.show",
        ),
    ],
)
THE_HOOK = Group(
    "",
    "dare_iql",
    "exchange or energy or references or support or ratio or weights or fitted or stopped",
    "tests/test_hook.py tests/test_prepare.py",
    [
        Mutant(HOOK, "            skip_inverted=self.config.skip_inverted,\n", ""),
        Mutant(
            HOOK,
            "self.config.alignment, self.config.alignment_sigma",
            "self.config.alignment",
        ),
        Mutant(HOOK, "clipped, self.config.alignment,", 'clipped, "gaussian_kl",'),
        Mutant(HOOK, "= self.config.sampler_steps", "= 3"),
        Mutant(HOOK, "= self.config.guidance_scale\n", "= 1.0\n"),
        Mutant(
            HOOK,
            "n_offline = int(batch_size * self.mixing_ratio)\n",
            "n_offline = batch_size // 2\n",
        ),
        Mutant(HOOK, "            cap=self.config.cap,\n", ""),
        Mutant(HOOK, "            rule=self.config.rule,\n", ""),
        Mutant(HOOK, "            weights=self.config.weights,\n", ""),
        Mutant(HOOK, "        batch = reorder(batch, order)\n", ""),
        Mutant(
            HOOK,
            "clipped = references.clamp(-self.max_action, self.max_action)",
            "clipped = references",
        ),
        Mutant(
            HOOK,
            "raw = self.unnormalize(states)\n            return self.behavior",
            "raw = states\n            return self.behavior",
        ),
        Mutant(
            HOOK,
            "raw = self.unnormalize(states)\n        assert",
            "raw = states\n        assert",
        ),
        Mutant(HOOK, "references, guided=True", "references, guided=False"),
        Mutant(HOOK, "support_actions, guided=False", "support_actions, guided=True"),
        Mutant(
            HOOK,
            "bound = self.max_action if self.clipped_policy else math.inf",
            "bound = self.max_action",
        ),
        Mutant(
            HOOK,
            "policy_log_prob(states, actions) - b",
            "policy_log_prob(raw, actions) - b",
        ),
        Mutant(
            HOOK,
            "self.samples % self.config.energy_update_freq",
            "(self.samples + 1) % self.config.energy_update_freq",
        ),
        Mutant(HOOK, "log, states, rows)", "log, states.flip(0), rows)"),
        # The states of the batch after the exchange.
        Mutant(HOOK, "log, states, rows)", "log, batch[0], rows)"),
        Mutant(HOOK, "{**result.stats, **log}", "{**result.stats}"),
        Mutant(
            HOOK,
            "picked[picked >= n_offline] - n_offline",
            "picked[picked >= n_offline] - 1",
        ),
        Mutant(HOOK, "rows[1][from_online]]", "rows[1][: len(from_online)]]"),
        Mutant(
            HOOK, "picked[: self.config.energy_batch_states]", "picked[: len(states)]"
        ),
        Mutant(HOOK, "            self.q_scale * q,\n", "            q,\n"),
        Mutant(HOOK, '= q_scale if config.q_scale == "returns" else 1.0', "= q_scale"),
        Mutant(
            HOOK,
            "            self.unnormalize(states),\n            self.config.energy_beta",
            "            states,\n            self.config.energy_beta",
        ),
        Mutant(
            HOOK,
            "repeated = states.unsqueeze(1)",
            "repeated = self.unnormalize(states).unsqueeze(1)",
        ),
        Mutant(HOOK, "            self.config.energy_beta,\n", "            1.0,\n"),
        Mutant(HOOK, "        self.energy_optimizer.step()\n", ""),
        Mutant(HOOK, "        self.energy_optimizer.zero_grad()\n", ""),
        Mutant(HOOK, "range(first + 1, last + 1)", "range(first + 1, last)"),
        Mutant(
            HOOK, "                if should_stop():\n                    return\n", ""
        ),
        Mutant(
            HOOK,
            "states = storage(self.offline)[0]",
            "states = storage(self.offline)[3]",
        ),
        Mutant(
            HOOK,
            "[rows.numpy(), rows[:0].numpy()])",
            "[rows[:0].numpy(), rows.numpy()])",
        ),
        Mutant(
            HOOK,
            "self.support_caches = self._make_caches(None)",
            "self.support_caches = self._make_caches(1)",
        ),
        Mutant(HOOK, "            first += len(slots)\n", ""),
        Mutant(HOOK, "lr=self.config.energy_lr,", "lr=self.config.behavior_lr,"),
        Mutant(ROWS, "        self.forget_overwritten()\n", ""),
        Mutant(ROWS, "now - made >= self.max_age", "now - made > self.max_age"),
        Mutant(ROWS, "            self.made[slots] = now\n", ""),
        Mutant(
            ROWS,
            "np.random.randint(0, buffer._size, size=n)",
            "np.random.randint(0, buffer._buffer_size, size=n)",
        ),
    ],
)
PREPARE = Group(
    "",
    "dare_iql",
    "fitted or energy or cache_of or q_of or stopped",
    "tests/test_hook.py tests/test_prepare.py",
    [
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
        Mutant(HOOK, "        options=config.behavior_options,\n", ""),
        Mutant(HOOK, "return 1.0 / reward_scale", "return reward_scale"),
        Mutant(HOOK, "return 1000.0 / return_span", "return 1.0 / return_span"),
        # The behavior model is fitted on normalized states.
        Mutant(HOOK, "(unnormalize(found) if unnormalize else found)", "found"),
        Mutant(
            HOOK, "found, actions = (field[: offline._size]", "found, actions = (field"
        ),
        Mutant(HOOK, "_rows_to_fit(offline, states", "_rows_to_fit(online, states"),
        Mutant(HOOK, "q_scale = q_scale() if config.scales_q else 1.0", "q_scale = 1.0"),
        Mutant(HOOK, "        q_scale=q_scale,\n        data", "        data"),
        Mutant(HOOK, "dataset_hash, Path(cache_dir)", '"data", Path(cache_dir)'),
        Mutant(HOOK, 'Path(cache_dir) / "behavior")', "Path(cache_dir))"),
        Mutant(HOOK, "        self.behavior.load_state_dict(fitted.state_dict())\n", ""),
        Mutant(HOOK, "    if begin:\n", "    if not begin:\n"),
        Mutant(
            HOOK,
            "            seed=self._behavior_seed,\n            device",
            "            seed=0,\n            device",
        ),
        Mutant(DARE, "return self.guided and self.q_scale", "return self.q_scale"),
        Mutant(HOOK, "two / 2 * config", "two * config"),
        Mutant(HOOK, "left * warm + new * max(cold - warm, 0.0)", "left * cold"),
        Mutant(
            HOOK,
            "left = config.energy_updates - self.energy_steps",
            "left = config.energy_updates",
        ),
        Mutant(
            HOOK,
            "if self.data is not None and not self._behavior_file(self.data).exists():",
            "if self.data is not None:",
        ),
        Mutant(
            DARE,
            'self.score == "reference" and self.guidance_scale > 0',
            "self.guidance_scale > 0",
        ),
        Mutant(HOOK, '                ("row_generator", self.row_generator),\n', ""),
        Mutant(HOOK, '                ("generator", self.generator),\n', ""),
        Mutant(HOOK, 'state["calls"], state["energy_steps"]', 'state["calls"], 0'),
        Mutant(HOOK, 'self.energy_steps = state["calls"], ', "self.energy_steps = 0, "),
        Mutant(
            HOOK,
            'self.energy_optimizer.load_state_dict(state["energy_optimizer"])',
            "pass",
        ),
        Mutant(
            HOOK,
            "                cache.load_state_dict(part, self.device)\n",
            "                pass\n",
        ),
    ],
)
RELEASE = Group(
    "tests/test_losses.py",
    "",
    "dare and (weights or gap or iql_have or proposals or follows)",
    "tests/test_hook.py tests/test_prepare.py tests/test_release.py",
    [
        Mutant(
            WEIGHTS,
            "torch.cat((conservative, skipped))",
            "torch.cat((skipped, conservative))",
        ),
        Mutant(
            WEIGHTS,
            "            return self.weight * conservative\n",
            "            return conservative\n",
        ),
        Mutant(
            WEIGHTS,
            "            return self.weight * conservative\n",
            "            return (1.0 - self.weight) * conservative\n",
        ),
        Mutant(
            WEIGHTS,
            "self.weight * conservative + (1.0 - self.weight) * released",
            "self.weight * released + (1.0 - self.weight) * conservative",
        ),
        Mutant(
            WEIGHTS,
            "self.weight * conservative + (1.0 - self.weight) * released",
            "self.weight * conservative + released",
        ),
        Mutant(
            WEIGHTS,
            "torch.cat((conservative[: self.kept], released))",
            "torch.cat((released, conservative[: self.kept]))",
        ),
        Mutant(WEIGHTS, "conservative[: self.kept]", "conservative[-self.kept :]"),
        Mutant(HOOK, "Release(weight, n_offline if", "Release(weight, n_offline - 1 if"),
        Mutant(
            HOOK,
            "Release(weight, n_offline if",
            "Release(weight, weight.shape[-1] - n_offline if",
        ),
        Mutant(HOOK, 'n_offline if self.config.weights == "hard" else None', "None"),
        Mutant(
            HOOK,
            'n_offline if self.config.weights == "hard" else None',
            "n_offline",
        ),
        Mutant(
            HOOK,
            "Release(weight, n_offline if",
            "Release(1 - weight, n_offline if",
        ),
        Mutant(
            DIQL,
            "trainer.train(drawn.batch, drawn.release)",
            "trainer.train(drawn.batch)",
        ),
        Mutant(
            DCAL,
            "trainer.train(drawn.batch, drawn.release)",
            "trainer.train(drawn.batch)",
        ),
        Mutant(DIQL, "**drawn.log, **source.update_energy(drawn)}", "**drawn.log}"),
        Mutant(DCAL, "{**losses, **drawn.log, **source", "{**losses, **source"),
        Mutant(DCAL, "release.keep(gap) for gap in gaps", "gap for gap in gaps"),
        Mutant(
            DCAL,
            "x[: release.kept]",
            "x[len(x) - (release.kept or len(x)) :]",
        ),
        Mutant(
            DCAL,
            "for x in (observations, next_observations, mc_returns, *predicted)",
            "for x in (observations, observations, mc_returns, *predicted)",
        ),
        Mutant(DCAL, "diffs = [gap.mean(-1) for", "diffs = [gap[:4].mean(-1) for"),
        # Another order of draws.
        Mutant(
            DCAL,
            """\
            current=normal(gap_rows, n, a),
            following=normal(gap_rows, n, a),
""",
            """\
            following=normal(gap_rows, n, a),
            current=normal(gap_rows, n, a),
""",
        ),
        Mutant(
            CALQL,
            """\
            current=normal(gap_rows, n, a),
            following=normal(gap_rows, n, a),
""",
            """\
            following=normal(gap_rows, n, a),
            current=normal(gap_rows, n, a),
""",
        ),
        Mutant(
            DIQL,
            "        next_observations = next_observations[kept:]\n",
            "        next_observations = next_observations[: -kept if kept else None]\n",
        ),
        Mutant(DIQL, "noise[:, kept:])", "noise[:, : noise.shape[1] - (kept or 0)])"),
        Mutant(
            DIQL,
            "self.qf(observations[kept:], actions[0, kept:])",
            "self.q_target(observations[kept:], actions[0, kept:])",
        ),
        Mutant(
            DIQL,
            "self.qf(observations[kept:], actions[0, kept:])",
            "self.qf(observations[: len(observations) - (kept or 0)], actions[0, kept:])",
        ),
        Mutant(DIQL, "log_prob[0, kept:] - q", "log_prob[0, : len(q)] - q"),
        Mutant(
            DIQL,
            "self._max_backup(next_observations, noise[1:]",
            "self._max_backup(observations, noise[1:]",
        ),
        Mutant(
            DIQL,
            "self._max_backup(next_observations, noise[1:]",
            "self._max_backup(next_observations, noise[:-1]",
        ),
        Mutant(
            DIQL,
            "policy_out, noise[:1], release.kept",
            "policy_out, noise[1:], release.kept",
        ),
        Mutant(
            DIQL, "        q = self.q_target(repeated,", "        q = self.qf(repeated,"
        ),
        Mutant(
            DIQL,
            "next_v = release.mix(next_v, next_q)",
            "next_v = release.mix(next_q, next_v)",
        ),
        Mutant(
            DIQL,
            "            losses = release.mix(losses, released)\n",
            "            pass\n",
        ),
        Mutant(DIQL, "adv = release.weight.sqrt() * adv", "adv = release.weight * adv"),
    ],
)
PATCHED = Group(
    "",
    "",
    "dare and (True or patched or cache_of)",
    "tests/test_patches.py",
    [
        Mutant(
            ADAPTER,
            "            self.hook.update_energy(self.drawn)\n",
            "            pass\n",
        ),
        Mutant(
            ADAPTER,
            "            self.hook.update_energy(self.drawn)\n",
            "            self.hook.update_energy(self.drawn)\n" * 2,
        ),
        Mutant(
            ADAPTER,
            "self.trainer.dare_release = self.drawn.release",
            "self.trainer.dare_release = None",
        ),
        Mutant(
            ADAPTER,
            "self.trainer.dare_release = self.drawn.release",
            "self.trainer.dare_release = self.drawn.release._replace(kept=None)",
        ),
        Mutant(ADAPTER, "hook.online.add_transition", "hook.offline.add_transition"),
        Mutant(
            ADAPTER,
            'dataset["observations"] * state_std + state_mean',
            'dataset["observations"]',
        ),
        Mutant(ADAPTER, "high - low, reward_scale)", "high - low)"),
        Mutant(ADAPTER, "high - low, reward_scale)", "high, reward_scale)"),
        Mutant(ADAPTER, "        **options,\n    )", "    )"),
        Mutant(ADAPTER, '        max_action=getattr(trainer, "max_action", 1.0),\n', ""),
        Mutant(
            ADAPTER, "unnormalize=lambda states: states * std + mean", "unnormalize=None"
        ),
        Mutant(
            ADAPTER,
            "        q_scale=lambda: energy_q_scale(env, high - low, reward_scale),\n",
            "",
        ),
        Mutant(
            ADAPTER,
            'for key in ("observations", "actions"):',
            'for key in ("observations",):',
        ),
        Mutant(ADAPTER, "    trainer.dare = dare\n", ""),
        Mutant(
            ADAPTER,
            "torch.Generator(device).manual_seed(config.seed)",
            "torch.Generator(device).manual_seed(0)",
        ),
        Mutant(ADAPTER, "        seed=config.seed,\n", ""),
        Mutant(ADAPTER, "    if not dare.enabled:\n        return None\n", ""),
        Mutant(PATCHES, "    clipped_policy=True,\n", ""),
        Mutant(
            PATCHES,
            "    reward_scale=config.reward_scale if config.normalize_reward else 1.0,\n",
            "",
        ),
        Mutant(
            PATCHES,
            "next_v = release.mix(next_v, next_q)",
            "next_v = release.mix(next_q, next_v)",
        ),
    ],
)
SETS = Group(
    "tests/test_config.py",
    "",
    "only_the_online",
    "tests/test_iql.py tests/test_session.py tests/test_sweep.py",
    [
        Mutant(
            CONFIG, '"online_warmup", "utd", "load_model")', '"online_warmup", "utd")'
        ),
        Mutant(
            CONFIG,
            '("online_iterations", "online_warmup", "utd"',
            '("online_iterations", "online_warmup", "eval_seed", "utd"',
        ),
        Mutant(
            CONFIG, '*("device", "threads", "runs_dir"', '*("device", "seed", "runs_dir"'
        ),
        Mutant(CONFIG, '"wandb_mode", "device"),', '"wandb_mode", "device", "seed"),'),
        Mutant(CONFIG, '*("resume", "online_iterations", ', '*("resume", '),
        Mutant(
            DIQL, '        "policy_std",\n        "dare",\n', '        "policy_std",\n'
        ),
        Mutant(
            DIQL,
            "            self.mixing_ratio = 0.5\n",
            "            self.mixing_ratio = 0.25\n",
        ),
    ],
)
STACKED = Group(
    "tests/test_release.py tests/test_report.py "
    "tests/test_stacked_sweep.py tests/test_stacked.py tests/test_stacked_runs.py",
    "",
    "",
    "",
    [
        Mutant(SEED_RUNS, '.replace("{seed}", str(seed))', '.replace("{seed}", "1")'),
        Mutant(
            SEED_RUNS, "episodes := self.sessions[0].switch_episodes", "episodes := 0"
        ),
        Mutant(
            SEED_RUNS,
            "self._evaluate(actors, self.config.n_episodes)",
            "self._evaluate(actors, 1)",
        ),
        Mutant(SEED_RUNS, "session.run.stacked = len(self.sessions)", "pass"),
        Mutant(
            "corl_dare/hook_stacked.py",
            "drawn = [hook.draw_lots(n_offline, batch_size) for hook in self.members]",
            "first = self.members[0]\n"
            "            drawn = [first.draw_lots(n_offline, batch_size) for _ in self.members]",
        ),
        Mutant(HOOK, "order = lots[order]", "order = order[lots]"),
        Mutant(
            STACKED_SWEEP,
            'models / f"{cell.seed}.pt"',
            'models / f"{group.cells[0].seed}.pt"',
        ),
        Mutant(
            STACKED_SWEEP, 'for own in ("seed", ', 'for own in ("policy_noise", "seed", '
        ),
        Mutant(
            STACKED_SWEEP, 'if any(cell.folder.glob("*/checkpoint.pt")):', "if False:"
        ),
        Mutant(
            STACKED_SWEEP,
            "                handle.terminate()\n",
            "                pass\n",
        ),
        Mutant(
            "experiments/tables.py",
            ' for r in records if "stacked" not in r]',
            " for r in records]",
        ),
    ],
)
GROUPS = {
    "release": RELEASE,
    "switch": SWITCH,
    "facts": FACTS,
    "hook": THE_HOOK,
    "prepare": PREPARE,
    "patched": PATCHED,
    "loop": LOOP,
    "saving": SAVING,
    "estimate": ESTIMATE,
    "seeds": SEEDS,
    "evaluation": EVALUATION,
    "collector": COLLECTOR,
    "exploration": EXPLORATION,
    "buffer": BUFFER,
    "dataset": DATASET,
    "sets": SETS,
    "stacked": STACKED,
}
