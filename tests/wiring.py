"""A toy and a recorder for tests of the wiring: what passes between the parts of a run.

`run(algorithm)` trains one algorithm on the toy through its own `train(config)` and returns a
`Record`: events in the order in which they happened, the files and buffers that were left.
`run_patched` does the same for the hook inside a patched CORL script.

Everything that knows where the code under test has its seams stands here, so that tests read
the record alone and a change of a seam changes this file alone.

The toy ends its episodes by a fixed script (see `SCRIPT`), whatever the policy does: with a
terminal, with a time-out, and with both in the same step. Its states lie far from mean 0 and
standard deviation 1, its actions in [-2, 2], and no two of its states are the same.
"""

import copy
import csv
import importlib
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from algorithms.baq_cal_ql import BaqConfig
from corl import buffers, checkpoints, envs, machine, tasks
from corl.data import sources
from corl_dare import hook
from corl_dare.upstream import ExchangedBuffer, dare_for_corl
from transition_diffusion.refresh import Refreshes

ALGORITHMS = {
    "iql": "algorithms.iql",
    "cql": "algorithms.cql",
    "cal_ql": "algorithms.cal_ql",
    "td3_bc": "algorithms.td3_bc",
    "awac": "algorithms.awac",
    "rebrac": "algorithms.rebrac",
    "spot": "algorithms.spot",
    "pex": "algorithms.pex",
    "td3_bc_sa": "algorithms.td3_bc_sa",
    "cql_sa": "algorithms.cql_sa",
    "e2o": "algorithms.e2o",
    "baq_cal_ql": "algorithms.baq_cal_ql",
    "rlpd": "algorithms.rlpd",
    "wsrl": "algorithms.wsrl",
    "famo2o_iql": "algorithms.famo2o_iql",
    "famo2o_cql": "algorithms.famo2o_cql",
    "opt_td3": "algorithms.opt_td3",
    "opt_spot": "algorithms.opt_spot",
    "dare_spot": "algorithms.dare_spot",
    "dare_opt_spot": "algorithms.dare_opt_spot",
    "dare_td3_bc": "algorithms.dare_td3_bc",
    "dare_rebrac": "algorithms.dare_rebrac",
    "dare_iql": "algorithms.dare_iql",
    "dare_cal_ql": "algorithms.dare_cal_ql",
    "dare_cql": "algorithms.dare_cql",
    "dare_awac": "algorithms.dare_awac",
    "dare_wsrl": "algorithms.dare_wsrl",
    "dare_famo2o_cql": "algorithms.dare_famo2o_cql",
    "dare_cql_sa": "algorithms.dare_cql_sa",
    "edis_iql": "algorithms.edis_iql",
    "edis_cal_ql": "algorithms.edis_cal_ql",
    "cfdg_iql": "algorithms.cfdg_iql",
}
DARE = (
    *("dare_iql", "dare_cal_ql", "dare_td3_bc", "dare_cql", "dare_awac"),
    *("dare_rebrac", "dare_spot", "dare_wsrl", "dare_famo2o_cql", "dare_cql_sa"),
    "dare_opt_spot",
)
EDIS = ("edis_iql", "edis_cal_ql")
NO_ANTMAZE = ("e2o",)
CFDG = ("cfdg_iql",)
GENERATES = (*EDIS, *CFDG)  # rows, in refreshes
PATCHED = ("dare_iql", "dare_cal_ql")  # that have a patch for CORL's file
CQL = (
    *("cql", "cal_ql", "dare_cal_ql", "dare_cql", "edis_cal_ql", "cql_sa"),
    *("baq_cal_ql", "famo2o_cql", "dare_famo2o_cql", "dare_cql_sa"),
)
# Whose rewards are scaled and shifted.
LINEAR = (*CQL, "wsrl", "dare_wsrl", "e2o")
LOCOMOTION, GOAL = "toyhopper-medium-v2", "antmazetoy-medium-v2"
MAX_ACTION = 2.0
HORIZON = 5
REF_MIN, REF_MAX = -4.0, 5.0  # returns of the scores 0 and 100
SCRIPT = ((3, True), (5, False), (5, True), (2, True), (5, False))  # length, terminal
ROWS = 60  # of the dataset

# The offline and the online side of every pair differ, and no number is its default or 1.
COMMON = {
    "device": "cpu",
    "threads": 1,
    "compile": False,
    "seed": 3,
    "eval_seed": 11,
    "eval_freq": 4,
    "log_freq": 3,
    "n_episodes": 2,
    "offline_iterations": 7,
    "online_iterations": 16,
    "online_warmup": 2,
    "utd": 2,
    "batch_size": 16,
    "mixing_ratio": 0.25,
    "buffer_size": 90,
    "discount": 0.9,
    "normalize_reward": True,
    "name": "wiring",
    # IQL
    "actor_lr": 1e-3,
    "actor_lr_online": 7e-4,
    "vf_lr": 2e-3,
    "qf_lr": 3e-3,
    "tau": 0.02,
    "beta": 2.0,
    "iql_tau": 0.8,
    # CQL and Cal-QL
    "policy_lr": 1e-3,
    "soft_target_update_rate": 0.02,
    "cql_alpha": 5.0,
    "cql_alpha_online": 2.0,
    "cql_n_actions": 3,
    "reward_scale": 2.0,
    "reward_bias": -0.5,
    # TD3+BC
    "bc_online": "anneal",
    "bc_end": 0.3,
    "bc_anneal_steps": 10,
    # SPOT
    "vae_iterations": 4,
    "vae_hidden_dim": 16,
    "lambd": 0.7,
    "lambd_cool": True,
    "lambd_end": 0.4,
    "lambd_cool_steps": 10,
    "online_discount": 0.8,
    # OPT
    "pretrain_updates": 5,
    "kappa_start": 0.2,
    "kappa_end": 0.7,
    "kappa_steps": 9,
    # SSAR
    "buffer_mode": "half",
    "filter_updates": 4,
    "trust_share": 0.3,
    "beta_lr": 1e-3,
    "beta_anneal_steps": 10,
    "n_period": 3,
    # RLPD and WSRL
    "temperature_lr": 1e-3,
    "random_steps": 0,
    "n_critics": 3,
    # AWAC
    "hidden_dim": 32,
    "learning_rate": 2e-3,
    "awac_lambda": 0.5,
}
# Its rule for rewards is antmaze's alone.
REBRAC = {"seed": 6, "normalize": True, "normalize_reward": False, "expl_noise": 0.1}
# Seeds with which training and evaluations reach the goal in different episodes; in a DARE file
# the base's own release is off.
OWN = {
    "td3_bc": {"seed": 4},
    "awac": {"seed": 6},
    "rebrac": REBRAC,
    "dare_td3_bc": {"seed": 4, "bc_online": "keep"},
    "dare_rebrac": {**REBRAC, "bc_online": "keep"},
    "dare_awac": {"seed": 8},
    "spot": {"seed": 1, "normalize": True},
    "pex": {"seed": 1, "eval_epsilon": 0.0, "clip_actions": True},
    "rlpd": {"seed": 5, "normalize": True},
    "wsrl": {"seed": 5, "normalize": True},
    "dare_wsrl": {"seed": 5, "normalize": True},
    "td3_bc_sa": {"seed": 4, "trust_by": "iql", "expl_noise": 0.1},
    "opt_td3": {"seed": 0, "normalize": True},
    "opt_spot": {"seed": 2, "normalize": True},
    "dare_spot": {"seed": 1, "normalize": True, "lambd_cool": False},
    "dare_opt_spot": {"seed": 3, "normalize": True, "lambd_cool": False},
    "e2o": {"normalize": True},
    "famo2o_iql": {"seed": 1, "normalize": True, "balance_period": 2},
    "famo2o_cql": {"seed": 0, "normalize": True},
    "dare_famo2o_cql": {"seed": 2, "normalize": True},
}
COMMON_BAQ = {"clone_updates": 3, "clone_batch_size": 8, "clone_lr": 1e-3, "floor": 0.1}
COMMON_DARE = {
    "cap": 2,
    "references": 2,
    "behavior_updates": 3,
    "behavior_batch_size": 8,
    "behavior_lr": 2e-3,
    "behavior_width": 0.05,
    "sampler_steps": 2,
    "guidance_scale": 2.0,
    "energy_beta": 1.5,
    "energy_lr": 1e-3,
    "energy_updates": 4,
    "energy_update_freq": 2,
    "energy_batch_states": 6,
    "support_actions": 3,
    "entropy_alpha": 0.3,
    "backup_actions": 3,
}

# Every update draws generated rows, so that both files are one case.
COMMON_EDIS = {
    "schedule": "every_update",
    "refresh_every": 6,
    "samples": 30,
    "diffusion_updates": 4,
    "diffusion_batch_size": 8,
    "diffusion_lr": 1e-3,
    "width": 16,
    "depth": 1,
    "sampler_steps": 4,
    "generation_batch_size": 20,
    "energy_updates": 2,
    "energy_batch_size": 6,
    "energy_levels": 2,
    "negatives": 3,
}
# No share is the default, and a refresh of another length follows the first one.
COMMON_CFDG = {
    "synthetic_ratio": 0.4,
    "offline_share": 0.3,
    "guidance": 0.7,
    "label_dropout": 0.3,
    "online_rows": 0.4,
    "refresh_every": 6,
    "samples": 30,
    "diffusion_updates": 4,
    "refresh_updates": 8,
    "diffusion_batch_size": 8,
    "diffusion_lr": 1e-3,
    "width": 16,
    "depth": 1,
    "sampler_steps": 4,
    "generation_batch_size": 20,
}


class WiringEnv(gymnasium.Env):
    """Tells the recorder of every reset and step; `role` is train or eval."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-MAX_ACTION, MAX_ACTION, (2,), np.float32)

    def __init__(self, role: str = "none", record: "Record | None" = None):
        self.role, self.record = role, record
        self.place, self.episode, self.count = np.zeros(2), -1, 0

    def observe(self) -> np.ndarray:
        return np.array([50.0, -7.0]) + np.array([20.0, 0.3]) * self.place

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:  # a seed decides everything, the script too
            self.episode = -1
        self.place = self.np_random.uniform(-1, 1, 2)
        self.episode, self.count = self.episode + 1, 0
        if self.record is not None:
            self.record.add("reset", role=self.role, seed=seed, state=self.observe())
        return self.observe(), {}

    def step(self, action):
        before = self.observe()
        self.place = np.clip(self.place + np.clip(action, -2, 2) / 3, -1.5, 1.5)
        self.count += 1
        length, terminal = SCRIPT[self.episode % len(SCRIPT)]
        terminated = terminal and self.count == length
        reward = float(self.place[0] - 0.45)
        if self.episode == 2:  # a goal that is reached and lost again; in training alone
            reward += 2.0 if self.count == 2 else -2.0
        if self.record is not None:
            self.record.step(self, before, action, reward, terminated)
        return self.observe(), reward, terminated, False, {}

    def get_state(self):
        return {"place": self.place, "episode": self.episode, "count": self.count}

    def set_state(self, state):
        self.place, self.episode = np.array(state["place"]), int(state["episode"])
        self.count = int(state["count"])


def first_states(seed: int, episodes: int) -> list[np.ndarray]:
    """Raw states at the beginning of the episodes of a toy that was seeded once."""
    env = WiringEnv()
    env.np_random = gymnasium.utils.seeding.np_random(seed)[0]
    return [env.reset()[0] for _ in range(episodes)]


def make_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Raw arrays of the dataset, all float32 but the terminals."""
    rng, env = np.random.default_rng(seed), WiringEnv()
    env.np_random = rng
    keys = "observations actions rewards next_observations terminals".split()
    out: dict[str, list] = {key: [] for key in keys}
    while len(out["rewards"]) < ROWS:
        state, done = env.reset()[0], False
        while not done and len(out["rewards"]) < ROWS:
            action = np.clip(0.7 * rng.normal(size=2) - 0.2, -2, 2)
            following, reward, terminated, *_ = env.step(action)
            for key, value in zip(
                keys, (state, action, reward, following, terminated), strict=True
            ):
                out[key].append(value)
            state, done = following, terminated or env.count == HORIZON
    # Rows are in order, so the next action is that of the next row.
    out["next_actions"] = [*out["actions"][1:], np.zeros(2)]
    types = {"terminals": bool}
    return {k: np.array(v, dtype=types.get(k, np.float32)) for k, v in out.items()}


def episodes_of(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Raw returns and lengths of the dataset's complete episodes, by a plain walk."""
    returns, lengths, total, length = [], [], 0.0, 0
    for reward, terminal in zip(arrays["rewards"], arrays["terminals"], strict=True):
        total, length = total + float(reward), length + 1
        if terminal or length == HORIZON:
            returns.append(total)
            lengths.append(length)
            total, length = 0.0, 0
    return np.array(returns), np.array(lengths)


class Record:
    """What happened in a run, in order, and what it left behind.

    Events have a `kind`:
        reset, step: of an environment, with its role; raw states; `act` is the policy's part:
            `training` its mode, `state` what it was given, `action` what it answered, `mean`
            what it answers without exploration.
        update: one gradient step: `batch`, `weight`, `kept`, rates and switches at that moment,
            `calls` of the networks (name, inputs, output), `logs`.
        fit: what the behavior model was fitted on.
        behavior: actions that the behavior model was asked for; `density`: log-densities.
        energy: one step of the energy network: what its loss was given, Q of the target
            networks and of the trained ones at the same places, the weights before the step.
        save: a checkpoint was written.
        piece: one piece of a refresh of generated rows was made.
    """

    def __init__(self, algorithm: str, config: Any, stop: Any = None):
        self.algorithm, self.config, self._stop = algorithm, config, stop
        self.events: list[SimpleNamespace] = []
        self.muted = 0
        self.calls: list[tuple] = []
        self.act: SimpleNamespace | None = None
        self.arrays = make_arrays()  # raw
        states = self.arrays["observations"]
        self.mean, self.std = states.mean(0), states.std(0) + 1e-3
        self.buffers: list[Any] = []
        self.trainer: Any = None
        self.summary: dict = {}
        self.folder = Path()

    # -- what tests read --------------------------------------------------------------------

    def of(self, kind: str, **fields: Any) -> list[SimpleNamespace]:
        """Events of a kind whose fields have these values."""
        return [
            e
            for e in self.events
            if e.kind == kind and all(getattr(e, k) == v for k, v in fields.items())
        ]

    def stored(self, which: str) -> dict[str, np.ndarray]:
        """Rows of a buffer at the end, under the dataset's names.

        `which` is offline, online or generated.
        """
        place = {"offline": 0, "generated": 2}.get(which, len(self.buffers[:2]) - 1)
        buffer = self.buffers[place]
        rows = [f.numpy() for f in buffer.gather(np.arange(buffer._size))]
        names = "observations actions rewards next_observations terminals".split()
        more = "next_actions" if buffer.keeps_next_actions else "mc_returns"
        return dict(zip([*names, more], rows, strict=False))

    def rows_of(self, name: str) -> list[dict[str, str]]:
        """Rows of a CSV file of the run folder."""
        with open(self.folder / name, newline="") as file:
            return list(csv.DictReader(file))

    def normalized(self, states: Any) -> np.ndarray:
        return (np.asarray(states) - self.mean) / self.std

    def raw(self, states: torch.Tensor) -> torch.Tensor:
        return states * torch.tensor(self.std) + torch.tensor(self.mean)

    def parts(self) -> dict[str, Any]:
        """Everything in the last checkpoint that decides numbers."""
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        return {"parts": state["parts"], "rng": state["rng"], "step": state["step"]}

    # -- recording --------------------------------------------------------------------------

    def add(self, kind: str, **fields: Any) -> None:
        if self.muted:
            return
        event = SimpleNamespace(kind=kind, **fields)
        self.events.append(event)
        if self._stop is not None and self._stop(self, event):
            self._stop = None
            signal.raise_signal(signal.SIGTERM)

    def step(self, env, before, action, reward, terminated) -> None:
        self.add(
            "step",
            role=env.role,
            state=before,
            action=np.array(action),
            reward=reward,
            next_state=env.observe(),
            terminated=terminated,
            truncated=env.count == HORIZON,
            act=self.act,
        )
        self.act = None


class Recorder:
    """Runs each variant once and hands the record out as often as it is asked for."""

    def __init__(self, new_folder: Any):
        self.new_folder, self.known = new_folder, {}

    def __call__(self, algorithm: str, patched: bool = False, **options: Any) -> Record:
        key = (algorithm, patched, repr(sorted(options.items())))
        if key not in self.known:
            with pytest.MonkeyPatch.context() as patch:
                start = run_patched if patched else run
                self.known[key] = start(patch, algorithm, self.new_folder(), **options)
        return self.known[key]


# ---------------------------------------------------------------- seams of the code under test


def networks_of(trainer: Any) -> dict[str, torch.nn.Module]:
    if hasattr(trainer, "critics"):
        names = ["actor", "critics", "target_critics"]
        return {name: getattr(trainer, name) for name in names}
    if hasattr(trainer, "critic_1"):
        names = ["actor", "critic_1", "critic_2", *target_names(trainer)]
        return {name: getattr(trainer, name) for name in names}
    names = "actor qf q_target vf"
    networks = {name: getattr(trainer, name) for name in names.split()}
    return {**networks, "q1": trainer.qf.q1, "q2": trainer.qf.q2}


def target_names(trainer: Any) -> tuple[str, str]:
    """The target critics' names: those of CORL's file, which differ."""
    pattern = "{}_target" if hasattr(trainer, "critic_1_target") else "target_{}"
    return pattern.format("critic_1"), pattern.format("critic_2")


def twin_minimum(trainer: Any, states, actions, target: bool) -> torch.Tensor:
    """min(Q1, Q2) of the target networks, or of the ones that are trained."""
    if hasattr(trainer, "critics"):
        critics = trainer.target_critics if target else trainer.critics
        return critics(states, actions).amin(0)
    if hasattr(trainer, "critic_1"):
        names = target_names(trainer) if target else ("critic_1", "critic_2")
        critics = [getattr(trainer, name) for name in names]
        found = torch.minimum(*(critic(states, actions) for critic in critics))
        if not hasattr(trainer, "share"):
            return found
        # OPT mixes in its online critics.
        pair = trainer.online_critics_target if target else trainer.online_critics
        return torch.lerp(found, torch.minimum(*pair(states, actions)), trainer.share)
    network = trainer.q_target if target else trainer.qf
    return torch.minimum(*network.both(states, actions))


def plain(value: Any) -> Any:
    """Tensors copied; a normal distribution as (mean, std)."""
    if isinstance(value, torch.distributions.Normal):
        return value.mean.detach().clone(), value.stddev.detach().clone()
    if isinstance(value, tuple):
        return tuple(plain(v) for v in value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def watch_trainer(trainer: Any, record: Record) -> None:
    """Record its networks, its actor's actions and its updates."""
    record.trainer = trainer
    for name, network in networks_of(trainer).items():

        def seen(module, args, kwargs, output, name=name):
            if not record.muted:
                record.calls.append((name, plain(args), plain(output)))

        network.register_forward_hook(seen, with_kwargs=True)
    actor, train = trainer.actor, trainer.train
    for acting in {actor, getattr(trainer, "composite", actor)}:
        watch_actor(acting, record)

    def recorded_train(batch, *given):
        record.calls = []
        release = next((x for x in given if isinstance(x, tuple)), None)
        weight, kept = release or (None, None)
        before = SimpleNamespace(
            batch=[field.clone() for field in batch],
            weight=None if weight is None else weight.clone(),
            kept=kept,
            rate=trainer.actor_optimizer.param_groups[0]["lr"],
            cql_alpha=getattr(trainer, "cql_alpha", None),
            bc_weight=getattr(trainer, "bc_weight", None),
            lambd=getattr(trainer, "lambd", None),
            discount=trainer.discount,
            calibrated=getattr(trainer, "_calibration_enabled", None),
            actor_training=actor.training,
            stream=stream_of(trainer),
        )
        logs = train(batch, *given)
        fields = {**vars(before), "calls": record.calls}
        record.calls = []
        record.add("update", logs={k: v.item() for k, v in logs.items()}, **fields)
        return logs

    trainer.train = recorded_train


def watch_actor(actor: Any, record: Record) -> None:
    """Record what it answers, and what it would answer without exploration."""
    act = actor.act

    def recorded_act(state, *args, **kwargs):
        mode, action = actor.training, act(state, *args, **kwargs)
        actor.eval()
        mean = act(state, *args, **kwargs)
        actor.train(mode)
        record.act = SimpleNamespace(
            training=mode, state=np.array(state), action=action, mean=mean
        )
        return action

    actor.act = recorded_act


def stream_of(trainer: Any) -> torch.Tensor | None:
    """State of the private generator of released losses."""
    generator = getattr(trainer, "dare_generator", None)
    return None if generator is None else generator.get_state()


def some_of(tensors: Any) -> list[torch.Tensor]:
    """A copy of every 97th number of each: a module of tests keeps hundreds of records."""
    return [tensor.detach().flatten()[::97].clone() for tensor in tensors]


def watch_hook(patch: Any, record: Record) -> None:
    """Record the behavior model's fit and samples, and the energy's steps."""
    fit_cached, contrastive_loss = hook.fit_cached, hook.contrastive_loss
    make_behavior_model = hook.make_behavior_model

    def recorded_fit(kind, states, actions, **settings):
        record.add(
            "fit",
            behavior=kind,
            states=states.clone(),
            actions=actions.clone(),
            settings=settings,
        )
        return fit_cached(kind, states, actions, **settings)

    def recorded_model(*args, **options):
        model = make_behavior_model(*args, **options)
        sample, log_prob = model.sample, model.log_prob

        def recorded_sample(states, n, generator, scale=0.0, **options):
            guided = {"scale": scale} if scale else {}
            out = sample(states, n, generator, **guided, **options)
            steps = options.get("steps")
            fields = {"states": states.clone(), "out": out.clone(), "scale": scale}
            record.add("behavior", n=n, steps=steps, **fields)
            return out

        def recorded_log_prob(states, actions, *bounds):
            out = log_prob(states, actions, *bounds)
            fields = {"states": states.clone(), "actions": actions.clone()}
            finite = tuple(b for b in bounds if np.isfinite(b))
            record.add("density", bounds=finite, out=out.clone(), **fields)
            if not record.muted:
                record.events[-1].policy = policy_log_prob(record, states, actions)
            return out

        model.sample, model.log_prob = recorded_sample, recorded_log_prob
        return model

    def recorded_loss(energy, support, q_values, states, beta, *rest):
        loss = contrastive_loss(energy, support, q_values, states, beta, *rest)
        if record.muted or record.trainer is None:
            return loss
        k, inside = support.shape[1], (states - torch.tensor(record.mean))
        inside = (inside / torch.tensor(record.std)).repeat_interleave(k, 0)
        record.muted += 1
        with torch.no_grad():
            both = [
                twin_minimum(record.trainer, inside, support.flatten(0, 1), target)
                for target in (True, False)
            ]
        record.muted -= 1
        record.add(
            "energy",
            network=type(energy).__name__,
            weights=some_of(energy.parameters()),
            gradient=some_of(
                torch.autograd.grad(loss, list(energy.parameters()), retain_graph=True)
            ),
            support=support.clone(),
            q=q_values.clone(),
            states=states.clone(),
            beta=beta,
            target_q=both[0].view_as(q_values),
            online_q=both[1].view_as(q_values),
        )
        return loss

    patch.setattr(hook, "fit_cached", recorded_fit)
    patch.setattr(hook, "make_behavior_model", recorded_model)
    patch.setattr(hook, "contrastive_loss", recorded_loss)


def policy_log_prob(record: Record, raw_states, actions) -> torch.Tensor:
    """Log-density of the current policy, by its definition; atoms at the bounds if clipped."""
    states = (raw_states - torch.tensor(record.mean)) / torch.tensor(record.std)
    actor = record.trainer.actor
    record.muted += 1
    with torch.no_grad():
        if hasattr(actor, "balance"):  # a family: the member that acts
            beta = actor.balance.mode(states)
            mean, log_std = actor.policy.moments(states, beta)
            law = torch.distributions.TransformedDistribution(
                torch.distributions.Normal(mean, log_std.exp()),
                torch.distributions.TanhTransform(),
            )
            inside = (actions / MAX_ACTION).clamp(1e-6 - 1.0, 1.0 - 1e-6)
            value = law.log_prob(inside).sum(-1)
        elif hasattr(actor, "log_std_offset") or hasattr(actor, "gaussian"):
            value = actor.log_prob(states, actions)
        else:
            # AWAC's actor answers with samples.
            normal = actor.policy(states) if hasattr(actor, "policy") else actor(states)
            if isinstance(normal, torch.Tensor):  # TD3: the noise of the exploration
                std = record.config.expl_noise * MAX_ACTION
                normal = torch.distributions.Normal(normal, std)
            inside = normal.log_prob(actions)
            low, high = (
                normal.cdf(torch.tensor(-MAX_ACTION)),
                1 - normal.cdf(torch.tensor(MAX_ACTION)),
            )
            value = torch.where(actions >= MAX_ACTION, high.log(), inside)
            value = torch.where(actions <= -MAX_ACTION, low.log(), value).sum(-1)
    record.muted -= 1
    return value


def make_known(patch: Any) -> None:
    """The names of the two tasks: one with locomotion's reward rule, one with a goal."""
    robot = tasks.Robot("Toy", 2, 2, REF_MIN, REF_MAX, HORIZON)
    for name in ("toyhopper", "antmazetoy"):
        patch.setitem(tasks.ROBOTS, name, robot)


def install(patch: Any, record: Record, module: Any, cache: Path) -> None:
    """Put the toy and the recorder in place."""
    roles = ["train", "eval"]

    def make(name, backend="gymnasium"):
        env = WiringEnv(roles.pop(0), record)
        return gymnasium.wrappers.TimeLimit(env, HORIZON)

    def resolve(*args, **kwargs):
        about = {"source": "toy", "sha256": "toy-data", "rows": ROWS, "label": "toy"}
        arrays = copy.deepcopy(record.arrays)
        task = tasks.task(record.config.env)
        found = {**about, "path": ""}
        return sources.Dataset(task, arrays, found, {}, *episodes_of(arrays))

    patch.setattr(envs, "make", make)
    patch.setattr(sources, "resolve", resolve)
    patch.setenv("CORL_DARE_CACHE", str(cache))
    patch.setattr(machine, "versions", dict)
    save = checkpoints.save_checkpoint

    def recorded_save(path, state):
        record.add("save", name=Path(path).name, step=state.get("step"))
        save(path, state)

    patch.setattr(checkpoints, "save_checkpoint", recorded_save)
    if module is not None:
        watch_module(patch, record, module)
    watch_hook(patch, record)


def watch_module(patch: Any, record: Record, module: Any) -> None:
    """Record trainer and buffers."""
    make_trainer, buffer = module.make_trainer, buffers.ReplayBuffer
    init = buffer.__init__

    def recorded_make(*args, **kwargs):
        trainer = make_trainer(*args, **kwargs)
        if record.trainer is None:
            watch_trainer(trainer, record)
        return trainer

    def recorded_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        record.buffers.append(self)

    patch.setattr(module, "make_trainer", recorded_make)
    patch.setattr(buffer, "__init__", recorded_init)
    advance = Refreshes.advance

    def recorded_advance(self):
        phase, metrics = self.phase(), advance(self)
        record.add("piece", phase=phase)
        return metrics

    patch.setattr(Refreshes, "advance", recorded_advance)


def make_config(
    algorithm: str,
    folder: Path,
    dare: dict | None = None,
    edis: dict | None = None,
    baq: dict | None = None,
    cfdg: dict | None = None,
    **fields,
):
    """Config of the toy; fields that the algorithm lacks are left out."""
    module = importlib.import_module(ALGORITHMS[algorithm])
    values = {"env": LOCOMOTION, "runs_dir": str(folder / "runs"), **COMMON}
    values.update({**OWN.get(algorithm, {}), **fields})
    if algorithm in DARE:
        block = module.TrainConfig.__dataclass_fields__["dare"].default_factory
        known = block.__dataclass_fields__
        given = {**COMMON_DARE, **(dare or {})}
        values["dare"] = block(**{k: v for k, v in given.items() if k in known})
    if algorithm in EDIS:
        block = module.TrainConfig.__dataclass_fields__["edis"].default_factory
        values["edis"] = block(**{**COMMON_EDIS, **(edis or {})})
    if algorithm.startswith("baq"):
        values["baq"] = BaqConfig(**{**COMMON_BAQ, **(baq or {})})
    if algorithm in NO_ANTMAZE and values["env"] == GOAL:
        pytest.skip(f"{algorithm} has no form for antmaze")
    if algorithm in CFDG:
        block = module.TrainConfig.__dataclass_fields__["cfdg"].default_factory
        values["cfdg"] = block(**{**COMMON_CFDG, **(cfdg or {})})
    known = module.TrainConfig.__dataclass_fields__
    return module.TrainConfig(**{k: v for k, v in values.items() if k in known})


def run(
    patch: Any,
    algorithm: str,
    folder: Path,
    stop: Any = None,
    dare: dict | None = None,
    **fields: Any,
) -> Record:
    """Train on the toy. `stop(record, event)` says when to ask the run to stop."""
    module = importlib.import_module(ALGORITHMS[algorithm])
    make_known(patch)
    config = make_config(algorithm, folder, dare, **fields)
    record = Record(algorithm, config, stop)
    install(patch, record, module, folder / "cache")
    try:
        record.summary = module.train(config)
    except SystemExit as end:
        # It was asked to stop, and saved.
        assert end.code == 128 + signal.SIGTERM
    made = sorted(Path(config.runs_dir).glob("wiring-*"))
    record.folder = Path(config.resume) if config.resume else made[-1]
    return record


# ---------------------------------------------------------------- the hook in patched CORL


class CorlBuffer:
    """The storage of CORL's replay buffer, which knows no `draw` and no `gather`."""

    def __init__(self, capacity: int = 90):
        self._buffer_size, self._pointer, self._size = capacity, 0, 0
        self._states, self._next_states = torch.zeros(2, capacity, 2)
        self._actions = torch.zeros(capacity, 2)
        self._rewards, self._dones = torch.zeros(2, capacity, 1)

    def add_transition(self, *row) -> None:
        fields = (
            self._states,
            self._actions,
            self._rewards,
            self._next_states,
            self._dones,
        )
        for field, value in zip(fields, row, strict=True):
            field[self._pointer] = torch.as_tensor(np.asarray(value)).float()
        self._pointer = (self._pointer + 1) % self._buffer_size
        self._size = min(self._size + 1, self._buffer_size)


def run_patched(
    patch: Any,
    algorithm: str,
    folder: Path,
    steps: int = 6,
    return_range: tuple[float, float] = (-3.0, 1.0),
    reward_scale: float = 1.0,
    dare: dict | None = None,
    **fields: Any,
) -> Record:
    """What a patched CORL script does with the hook: pretrain, then sample and train.

    An update's `weight` and `kept` are what the script's trainer reads from its attributes.
    """
    module = importlib.import_module(ALGORITHMS[algorithm])
    make_known(patch)
    config = make_config(algorithm, folder, dare, **fields)
    record = Record(algorithm, config)
    install(patch, record, None, folder / "cache")
    torch.manual_seed(config.seed)
    np.random.seed(config.seed)
    trainer = module.make_trainer(config, 2, 2, MAX_ACTION, "cpu")
    trainer.dare_release = None
    watch_trainer(trainer, record)
    data = copy.deepcopy(record.arrays)
    for key in ("observations", "next_observations"):
        data[key] = ((data[key] - record.mean) / record.std).astype(np.float32)
    offline, online = CorlBuffer(), CorlBuffer()
    record.buffers = [offline, online]
    keys = "observations actions rewards next_observations terminals".split()
    for i in range(ROWS):
        offline.add_transition(*(data[key][i] for key in keys))
    iql = algorithm == "dare_iql"
    made = dare_for_corl(
        config,
        trainer,
        offline,
        online,
        dataset=data,
        return_range=return_range,
        state_mean=record.mean,
        state_std=record.std,
        policy_log_prob=hook.clipped_log_prob(trainer.actor, MAX_ACTION)
        if iql
        else trainer.actor.log_prob,
        q_function=trainer.q_target if iql else trainer.target_q,
        clipped_policy=iql,
        reward_scale=reward_scale,
        mixing_ratio=config.mixing_ratio,
    )
    record.hook = made
    if made is None:
        return record
    made.pretrain(progress=False)
    buffer, rng = ExchangedBuffer(made, trainer), np.random.default_rng(5)
    for _ in range(steps):
        state, following = rng.normal(size=(2, 2))
        row = (state, rng.uniform(-2, 2, 2), 0.5, following, False)
        buffer.add_transition(*row)
        batch = buffer.sample(config.batch_size)
        if not iql:  # Cal-QL's batches carry returns
            batch = [*batch, torch.full_like(batch[2], -np.inf)]
        trainer.train(batch, trainer.dare_release)
    return record
