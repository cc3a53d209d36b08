"""Our files against a CORL checkout: the largest difference of every parameter.

    python benchmarks/parity.py --corl PATH [--out results/parity/FILE.txt]

Both sides get the same weights, batches and random draws and make 20 updates on the CPU in
float32. The cases named `patched` apply `patches/` to a copy in memory and compare whole online
DARE updates (hook, losses, energy) with our DARE file. A difference of 0 means the same bits.
CORL's ReBRAC is JAX and has a command of its own, benchmarks/parity_rebrac.py.
"""

import dataclasses
import functools
import inspect
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from algorithms import (
    awac,
    cal_ql,
    cql,
    dare_awac,
    dare_cal_ql,
    dare_iql,
    dare_spot,
    iql,
    spot,
    td3_bc,
)
from corl import arguments, machine
from corl.shim import launch
from corl_dare import hook
from corl_dare.behavior import make_behavior_model
from corl_dare.upstream import ExchangedBuffer
from scripts import make_patches

S, A, B, ROWS, UPDATES, TASK = 11, 3, 256, 2000, 20, "hopper-medium-v2"


def load(path: Path) -> SimpleNamespace:
    """The names that an upstream file defines; nothing is run."""
    with launch.installed():
        return SimpleNamespace(**runpy.run_path(str(path), run_name="upstream"))


def data(seed: int) -> dict[str, np.ndarray]:
    """Random rows in the fields of a D4RL dataset."""
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.normal(size=(ROWS, S)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (ROWS, A)).astype(np.float32),
        "rewards": rng.normal(size=ROWS).astype(np.float32),
        "next_observations": rng.normal(size=(ROWS, S)).astype(np.float32),
        "terminals": rng.random(ROWS) < 0.05,
        "mc_returns": rng.normal(size=ROWS).astype(np.float32),
        "next_actions": rng.uniform(-1, 1, (ROWS, A)).astype(np.float32),
    }


def buffer_of(module, seed: int):
    """A replay buffer of `module` that holds random rows."""
    extra = {}
    if getattr(module.TrainConfig, "MC_RETURNS", False):
        extra = {"mc_returns": True}
    if getattr(module.TrainConfig, "NEXT_ACTIONS", False):
        extra = {"next_actions": True}
    buffer = module.ReplayBuffer(S, A, ROWS + 10, "cpu", **extra)
    buffer.load_d4rl_dataset(data(seed))
    return buffer


def iql_trainer(module, config):
    """A trainer of `module`; networks are built in the order of the upstream script."""
    torch.manual_seed(0)
    if hasattr(module, "make_trainer"):
        return module.make_trainer(config, S, A, 1.0, "cpu")
    q, v = module.TwinQ(S, A), module.ValueFunction(S)
    kind = (
        module.DeterministicPolicy if config.iql_deterministic else module.GaussianPolicy
    )
    actor = kind(S, A, 1.0, dropout=config.actor_dropout)
    adam = torch.optim.Adam
    return module.ImplicitQLearning(
        max_action=1.0,
        actor=actor,
        actor_optimizer=adam(actor.parameters(), lr=config.actor_lr),
        q_network=q,
        q_optimizer=adam(q.parameters(), lr=config.qf_lr),
        v_network=v,
        v_optimizer=adam(v.parameters(), lr=config.vf_lr),
        iql_tau=config.iql_tau,
        beta=config.beta,
        max_steps=config.offline_iterations,
        discount=config.discount,
        tau=config.tau,
        device="cpu",
    )


def differences(a, b, parts: list[str]) -> dict[str, float]:
    """Largest absolute difference between two trainers, for each parameter of the parts."""
    found = {}
    for part in parts:
        ours, theirs = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert list(ours) == list(theirs), f"{part}: other parameter names"
        for name in ours:
            found[f"{part}.{name}"] = (ours[name] - theirs[name]).abs().max().item()
    return found


class Setup(NamedTuple):
    """How the cases are run.

    Attributes:
        updates: per trainer.
        rows: of a batch.
        compare: given the trainers of a case, ours first, and the names of their parts.
    """

    updates: int = UPDATES
    rows: int = B
    compare: Callable[..., Any] = differences


WHOLE = Setup()


def sides(ours, upstream) -> list:
    """The modules that a case is run with; without upstream's it is ours alone."""
    return [ours] if upstream is None else [ours, upstream]


def iql_cases(upstream, setup=WHOLE) -> dict[str, Any]:
    """Our IQL against upstream's: case -> what `setup.compare` finds."""
    settings = {
        "iql, locomotion": {},
        "iql, antmaze": {"beta": 10.0, "iql_tau": 0.9},
        "iql, deterministic": {"iql_deterministic": True, "tau": 0.001},
        "iql, dropout": {"actor_dropout": 0.1, "iql_tau": 0.8},
    }
    results = {}
    for name, fields in settings.items():
        config = iql.TrainConfig(env=TASK, offline_iterations=15, compat=True, **fields)
        trainers = []
        for module in sides(iql, upstream):
            trainer, buffer = iql_trainer(module, config), buffer_of(module, 0)
            np.random.seed(1)
            torch.manual_seed(1)
            for _ in range(setup.updates):
                trainer.train(buffer.sample(setup.rows))
            trainers.append(trainer)
        results[name] = setup.compare(*trainers, ["qf", "q_target", "vf", "actor"])
    return results


CQL_FIELDS = [f.name for f in dataclasses.fields(cql.TrainConfig)]
CQL_SETTINGS = {
    "locomotion": {"q_n_hidden_layers": 3},
    "antmaze": {
        "cql_alpha": 5.0,
        "cql_lagrange": True,
        "cql_target_action_gap": 0.8,
        "cql_max_target_backup": True,
        "cql_clip_diff_min": -200.0,
        "q_n_hidden_layers": 5,
    },
    "no importance sampling, entropy backup": {
        "cql_importance_sample": False,
        "backup_entropy": True,
        "cql_temp": 2.0,
    },
    "BC steps, small last layers": {
        "bc_steps": 10,
        "orthogonal_init": False,
        "target_update_period": 3,
        "alpha_multiplier": 0.5,
        "cql_clip_diff_max": 3.0,
    },
    "fixed entropy weight": {"use_automatic_entropy_tuning": False},
}
CQL_PARTS = [
    "critic_1",
    "critic_2",
    "target_critic_1",
    "target_critic_2",
    "actor",
    "log_alpha_prime",
]


def cql_trainer(module, config):
    """A trainer of `module`; networks are built in the order of the upstream script."""
    torch.manual_seed(0)
    if hasattr(module, "make_trainer"):
        return module.make_trainer(config, S, A, 1.0, "cpu")
    adam = torch.optim.Adam
    shape = config.orthogonal_init, config.q_n_hidden_layers
    critics = [module.FullyConnectedQFunction(S, A, *shape) for _ in range(2)]
    actor = module.TanhGaussianPolicy(S, A, 1.0, orthogonal_init=config.orthogonal_init)
    kind = getattr(module, "CalQL", None) or module.ContinuousCQL
    known = inspect.signature(kind).parameters
    return kind(
        critic_1=critics[0],
        critic_1_optimizer=adam(critics[0].parameters(), config.qf_lr),
        critic_2=critics[1],
        critic_2_optimizer=adam(critics[1].parameters(), config.qf_lr),
        actor=actor,
        actor_optimizer=adam(actor.parameters(), config.policy_lr),
        target_entropy=-A,
        **{k: getattr(config, k) for k in CQL_FIELDS if k in known and k != "device"},
    )


def cql_cases(ours, upstream, setup=WHOLE) -> dict[str, Any]:
    """The same for CQL or Cal-QL, whose calibration ends halfway."""
    results = {}
    for name, fields in CQL_SETTINGS.items():
        config = ours.TrainConfig(env=TASK, policy_lr=1e-4, compat=True, **fields)
        trainers = []
        for module in sides(ours, upstream):
            trainer, buffer = cql_trainer(module, config), buffer_of(module, 0)
            np.random.seed(1)
            torch.manual_seed(1)
            for step in range(setup.updates):
                if step == setup.updates // 2 and hasattr(trainer, "switch_calibration"):
                    trainer.switch_calibration()
                trainer.train(buffer.sample(setup.rows))
            trainers.append(trainer)
        parts = CQL_PARTS + ["log_alpha"] * config.use_automatic_entropy_tuning
        results[f"{Path(ours.__file__).stem}, {name}"] = setup.compare(*trainers, parts)
    return results


def actor_critic_trainer(module, config):
    """A trainer of TD3+BC or AWAC; networks are built in the order of the upstream script."""
    torch.manual_seed(0)
    if hasattr(module, "make_trainer"):
        return module.make_trainer(config, S, A, 1.0, "cpu")
    is_td3 = hasattr(module, "TD3_BC")
    rate = 3e-4 if is_td3 else config.learning_rate
    width = () if is_td3 else (config.hidden_dim,)
    networks = {"actor": module.Actor(S, A, *(width or (1.0,)))}
    for name in ("critic_1", "critic_2"):
        networks[name] = module.Critic(S, A, *width)
    parts = {
        f"{name}_optimizer": torch.optim.Adam(network.parameters(), lr=rate)
        for name, network in networks.items()
    }
    kind = module.TD3_BC if is_td3 else module.AdvantageWeightedActorCritic
    known = inspect.signature(kind).parameters
    fields = {k: getattr(config, k) for k in known if hasattr(config, k)}
    if is_td3:
        fields.update(max_action=1.0, device="cpu")
    else:
        fields["gamma"] = config.discount
    trainer = kind(**networks, **parts, **fields)
    if not is_td3:  # its names are private, and its `train` is called `update`
        for name in ("actor", "critic_1", "critic_2"):
            setattr(trainer, name, getattr(trainer, f"_{name}"))
        for name in awac.TARGETS:
            setattr(trainer, name, getattr(trainer, f"_{name}"))
        trainer.train = trainer.update
    return trainer


ACTOR_CRITIC_SETTINGS = {
    td3_bc: {
        "locomotion": {},
        "seldom policy updates, small noise": {
            "policy_freq": 3,
            "policy_noise": 0.05,
            "noise_clip": 0.02,
            "alpha": 0.4,
            "tau": 0.1,
        },
    },
    awac: {
        "locomotion": {"awac_lambda": 0.3333},
        "antmaze": {"awac_lambda": 0.1},
        "narrow": {"hidden_dim": 64, "discount": 0.9, "learning_rate": 1e-2},
    },
}


def actor_critic_cases(ours, upstream, setup=WHOLE) -> dict[str, Any]:
    """The same for TD3+BC or AWAC."""
    results = {}
    for name, fields in ACTOR_CRITIC_SETTINGS[ours].items():
        config = ours.TrainConfig(env=TASK, compat=True, **fields)
        trainers = []
        for module in sides(ours, upstream):
            trainer, buffer = actor_critic_trainer(module, config), buffer_of(module, 0)
            np.random.seed(1)
            torch.manual_seed(1)
            for _ in range(setup.updates):
                trainer.train(buffer.sample(setup.rows))
            trainers.append(trainer)
        targets = awac.TARGETS
        if ours is td3_bc:
            targets = [f"{name}_target" for name in td3_bc.WITH_TARGET]
        parts = ["actor", "critic_1", "critic_2", *targets]
        results[f"{Path(ours.__file__).stem}, {name}"] = setup.compare(*trainers, parts)
    return results


SPOT_PARTS = ["vae", "actor", "critic_1", "critic_2"]
SPOT_PARTS += [f"{name}_target" for name in spot.WITH_TARGET]
SPOT_SETTINGS = {
    "antmaze": {"actor_init_w": 1e-3, "critic_init_w": 3e-3, "lambd": 0.25},
    "no cooling, seldom policy updates": {
        "lambd_cool": False,
        "policy_freq": 3,
        "beta": 2.0,
        "vae_hidden_dim": 64,
        "vae_latent_dim": 5,
        "actor_lr": 3e-4,
    },
    "several samples": {"num_samples": 4, "lambd": 0.1, "lambd_end": 0.9},
}


def spot_trainer(module, config):
    """A trainer of `module`; networks are built in the order of the upstream script."""
    torch.manual_seed(0)
    if hasattr(module, "make_trainer"):
        return module.make_trainer(config, S, A, 1.0, "cpu")
    networks = {
        "vae": module.VAE(S, A, config.vae_latent_dim, 1.0, config.vae_hidden_dim),
        "actor": module.Actor(S, A, 1.0, config.actor_init_w),
    }
    for name in ("critic_1", "critic_2"):
        networks[name] = module.Critic(S, A, config.critic_init_w)
    rates = {"vae": config.vae_lr, "actor": config.actor_lr}
    parts = {
        f"{name}_optimizer": torch.optim.Adam(
            network.parameters(), lr=rates.get(name, config.qf_lr)
        )
        for name, network in networks.items()
    }
    known = inspect.signature(module.SPOT).parameters
    fields = {k: getattr(config, k) for k in known if hasattr(config, k)}
    fields.update(
        max_action=1.0, device="cpu", max_online_steps=config.online_iterations
    )
    return module.SPOT(**networks, **parts, **fields)


def spot_online(trainer, config):
    """What upstream's script does at the switch to the online phase."""
    trainer.is_online, trainer.discount = True, config.online_discount
    for name, rate in (
        ("actor", config.actor_lr),
        ("critic_1", config.qf_lr),
        ("critic_2", config.qf_lr),
    ):
        parameters = getattr(trainer, name).parameters()
        setattr(trainer, f"{name}_optimizer", torch.optim.Adam(parameters, lr=rate))


def spot_cases(upstream, setup=WHOLE) -> dict[str, Any]:
    """The same for SPOT: updates of the VAE, then the offline and the online phase."""
    results = {}
    for name, fields in SPOT_SETTINGS.items():
        config = spot.TrainConfig(
            env=TASK, online_iterations=setup.updates, compat=True, **fields
        )
        trainers = []
        for module in sides(spot, upstream):
            trainer, buffer = spot_trainer(module, config), buffer_of(module, 0)
            np.random.seed(1)
            torch.manual_seed(1)
            for _ in range(setup.updates // 2):
                trainer.vae_train(buffer.sample(setup.rows))
            first = setup.updates // 2
            for step in range(setup.updates):
                if step == first and module is spot:
                    trainer.start_online(config.online_discount)
                elif step == first:
                    spot_online(trainer, config)
                if step >= first and module is spot:
                    trainer.lambd = config.lambd_after(step + 1 - first)
                trainer.train(buffer.sample(setup.rows))
            trainers.append(trainer)
        results[f"spot, {name}"] = setup.compare(*trainers, SPOT_PARTS)
    return results


class EveryRow(hook.DareHook):
    """A hook that hides how many rows are kept.

    The patch of Cal-QL computes the conservative gap of every row. Ours may leave rows out and
    would then draw other random actions, so here it computes all of them, too. That of SPOT
    computes the ELBO of every row, and a product of fewer rows may round otherwise.
    """

    def sample(self, batch_size):
        drawn = super().sample(batch_size)
        return drawn._replace(release=drawn.release._replace(kept=None))


def behavior_of(block):
    """An untrained behavior model."""
    model = make_behavior_model(block.behavior, S, A, seed=0, **block.behavior_options)
    return model.requires_grad_(False)


def dare_hook_of(trainer, config, offline, online, behavior):
    """The hook of DARE-IQL on two buffers."""
    return hook.DareHook(
        offline,
        online,
        config.dare,
        behavior,
        policy_log_prob=hook.clipped_log_prob(trainer.actor, trainer.max_action),
        clipped_policy=True,
        q_function=lambda s, a: trainer.q_target(s, a),
        seed=0,
    )


def dare_iql_cases(patched, setup=WHOLE) -> dict[str, Any]:
    """Our DARE-IQL against upstream's IQL with our patch."""
    density = {"behavior": "mixture", "guidance_scale": 0.0}
    small = {"behavior_width": 0.1, "energy_batch_states": 16, "support_actions": 4}
    settings = {
        "dare_iql patched, policy ratio": {**density, "score": "policy_ratio"},
        "dare_iql patched, guided references": {**small, "reference_max_age": 3},
        "dare_iql patched, DARE-IV, soft": {
            **density,
            "score": "likelihood",
            "weights": "soft",
            "policy": "awr",
            "value": "iv",
        },
    }
    results = {}
    for name, fields in settings.items():
        trainers = []
        for module in sides(dare_iql, patched):
            block = module.DareIQLConfig(**fields)
            config = dare_iql.TrainConfig(
                env=TASK, offline_iterations=15, batch_size=setup.rows, dare=block
            )
            trainer = iql_trainer(module, config)
            trainer.dare = block
            trainer.dare_generator = torch.Generator().manual_seed(0)
            buffers = buffer_of(module, 0), buffer_of(module, 1)
            source = dare_hook_of(trainer, config, *buffers, behavior_of(block))
            np.random.seed(1)
            replay = ExchangedBuffer(source, trainer)
            for _ in range(setup.updates):
                if module is dare_iql:
                    dare_iql.step(trainer, source, config)
                else:
                    trainer.train(replay.sample(setup.rows))
            trainers.append(trainer)
        results[name] = setup.compare(*trainers, ["qf", "q_target", "vf", "actor"])
    return results


def dare_spot_cases(patched, setup=WHOLE) -> dict[str, Any]:
    """Our DARE-SPOT against upstream's SPOT with our patch."""
    density = {"behavior": "mixture", "guidance_scale": 0.0, "score": "policy_ratio"}
    small = {"behavior_width": 0.1, "energy_batch_states": 16, "support_actions": 4}
    settings = {
        "dare_spot patched, policy ratio": {**density, "policy_std": 0.3},
        "dare_spot patched, guided references": {**small, "reference_max_age": 3},
        "dare_spot patched, soft, no cap": {**density, "weights": "soft", "cap": None},
    }
    results = {}
    for name, fields in settings.items():
        trainers = []
        for module in sides(dare_spot, patched):
            block = module.NoisyDareConfig(**fields)
            config = dare_spot.TrainConfig(
                env=TASK, batch_size=setup.rows, lambd=0.5, dare=block
            )
            trainer = spot_trainer(module, config)
            if module is dare_spot:
                parts = dare_spot.hook_arguments(trainer)
            else:
                std = block.density_std(config.expl_noise)
                parts = {
                    "policy_log_prob": hook.noisy_log_prob(trainer.actor, std, 1.0),
                    "clipped_policy": True,
                    "q_function": functools.partial(module.dare_target_q, trainer),
                }
            source = EveryRow(
                buffer_of(module, 0),
                buffer_of(module, 1),
                config.dare,
                behavior_of(block),
                **parts,
                seed=0,
            )
            np.random.seed(1)
            torch.manual_seed(1)
            replay = ExchangedBuffer(source, trainer)
            for _ in range(setup.updates):
                if module is dare_spot:
                    dare_spot.step(trainer, source, config)
                else:
                    trainer.train(replay.sample(setup.rows))
            trainers.append(trainer)
        results[name] = setup.compare(*trainers, SPOT_PARTS)
    return results


def dare_awac_cases(patched, setup=WHOLE) -> dict[str, Any]:
    """Our DARE-AWAC against upstream's AWAC with our patch."""
    small = {"behavior_width": 0.1, "energy_batch_states": 16, "support_actions": 4}
    settings = {
        "dare_awac patched, policy ratio": DENSITY,
        "dare_awac patched, guided references": {**small, "reference_max_age": 3},
        "dare_awac patched, soft": {**DENSITY, "weights": "soft", "entropy_alpha": 0.01},
    }
    results = {}
    for name, fields in settings.items():
        trainers = []
        for module in sides(dare_awac, patched):
            block = module.DareAWACConfig(**fields)
            config = dare_awac.TrainConfig(
                env=TASK, awac_lambda=0.3333, batch_size=setup.rows, dare=block
            )
            trainer = actor_critic_trainer(module, config)
            trainer.dare, actor = block, trainer.actor
            ours = module is dare_awac
            policy = actor.policy if ours else actor._get_policy
            source = hook.DareHook(
                *(buffer_of(module, seed) for seed in (0, 1)),
                block,
                behavior_of(block),
                policy_log_prob=hook.clipped_log_prob(policy, 1.0),
                clipped_policy=True,
                q_function=trainer.target_q if ours else trainer.dare_target_q,
                seed=0,
            )
            np.random.seed(1)
            torch.manual_seed(1)
            replay = ExchangedBuffer(source, trainer)
            for _ in range(setup.updates):
                if ours:
                    dare_awac.step(trainer, source, config)
                else:
                    trainer.train(replay.sample(setup.rows))
            trainers.append(trainer)
        parts = ["actor", "critic_1", "critic_2", *awac.TARGETS]
        results[name] = setup.compare(*trainers, parts)
    return results


DENSITY = {"behavior": "mixture", "guidance_scale": 0.0, "score": "policy_ratio"}
DARE_CAL_QL_SETTINGS = {
    "dare_cal_ql patched, policy ratio": ({}, DENSITY),
    "dare_cal_ql patched, antmaze, guided references": (
        CQL_SETTINGS["antmaze"],
        {
            "behavior_width": 0.1,
            "energy_batch_states": 16,
            "support_actions": 4,
            "reference_max_age": 3,
        },
    ),
    "dare_cal_ql patched, soft, no cap": (
        {},
        {**DENSITY, "weights": "soft", "cap": None},
    ),
    "dare_cal_ql patched, weighted gap": (
        {"cql_lagrange": True, "cql_target_action_gap": 0.8},
        {**DENSITY, "lagrange_gap": "weighted"},
    ),
}


def dare_cal_ql_cases(
    patched, setup=WHOLE, settings=DARE_CAL_QL_SETTINGS
) -> dict[str, Any]:
    """Our DARE-Cal-QL against upstream's Cal-QL with our patch."""
    results = {}
    for name, (fields, dare) in settings.items():
        trainers = []
        for module in sides(dare_cal_ql, patched):
            block = module.DareCalQLConfig(**dare)
            config = dare_cal_ql.TrainConfig(
                env=TASK, batch_size=setup.rows, dare=block, **fields
            )
            trainer = cql_trainer(module, config)
            trainer.dare = block
            trainer.switch_calibration()
            buffers = buffer_of(module, 0), buffer_of(module, 1)
            if module is dare_cal_ql:
                log_prob, target_q = trainer.actor.log_prob, trainer.target_q
            else:
                log_prob = functools.partial(module.dare_log_prob, trainer.actor)
                target_q = functools.partial(module.dare_target_q, trainer)
            source = EveryRow(
                *buffers,
                block,
                behavior_of(block),
                policy_log_prob=log_prob,
                q_function=target_q,
                seed=0,
            )
            np.random.seed(1)
            torch.manual_seed(1)
            replay = ExchangedBuffer(source, trainer)
            for _ in range(setup.updates):
                if module is dare_cal_ql:
                    dare_cal_ql.step(trainer, source, config)
                else:
                    trainer.train(replay.sample(setup.rows))
            trainers.append(trainer)
        results[name] = setup.compare(*trainers, [*CQL_PARTS, "log_alpha"])
    return results


def patched_module(corl: Path, name: str) -> SimpleNamespace:
    """The names of an upstream file after our patch; the checkout stays as it is."""
    patch = make_patches.patches()[name]
    text = make_patches.patched_text(patch, make_patches.check_target(patch, corl))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(text)
        return load(path)


def main() -> None:
    parser = arguments.Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--corl", type=arguments.path, required=True, help="a CORL checkout"
    )
    parser.add_argument("--out", type=arguments.path, help="also write the report here")
    args = parser.parse_args()
    if not (args.corl / "algorithms").is_dir():
        parser.error(f"{args.corl} is no folder of CORL")
    machine.configure_threads(1)
    upstream = args.corl / "algorithms/finetune"
    with arguments.errors_in_one_line():
        results = iql_cases(load(upstream / "iql.py"))
        results.update(cql_cases(cql, load(upstream / "cql.py")))
        results.update(cql_cases(cal_ql, load(upstream / "cal_ql.py")))
        offline = load(upstream.parent / "offline/td3_bc.py")
        results.update(actor_critic_cases(td3_bc, offline))
        results.update(actor_critic_cases(awac, load(upstream / "awac.py")))
        results.update(spot_cases(load(upstream / "spot.py")))
        results.update(dare_iql_cases(patched_module(args.corl, "iql")))
        results.update(dare_spot_cases(patched_module(args.corl, "spot")))
        results.update(dare_cal_ql_cases(patched_module(args.corl, "cal_ql")))
        results.update(dare_awac_cases(patched_module(args.corl, "awac")))
    report(results, ", float32", args.out)


def report(results: dict[str, Any], numbers: str, out: Path | None) -> None:
    """Print the differences of every case, and write them to a file.

    Args:
        results: case -> parameter -> difference.
        numbers: of which type they are, for the first line.
        out: the file.
    """
    lines = [
        f"CORL {make_patches.COMMIT}, {UPDATES} updates of {B} rows{numbers} on "
        f"{machine.describe()['processor']}, torch {torch.__version__}, "
        f"ours {machine.git_commit()}",
    ]
    for name, found in results.items():
        lines.append(f"\n{name}: largest difference {max(found.values()):.3g}")
        lines += [
            f"    {value:10.3g}  {parameter}" for parameter, value in found.items()
        ]
    text = "\n".join(lines)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
