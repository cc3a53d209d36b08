"""Updates of FamO2O's authors, which are JAX: a part of parity_rivals/famo2o.py in its own Python.

    JAXPYTHON benchmarks/famo2o_jax.py CHECKOUT iql|cql CASE.npz RESULT.npz

That Python needs jax, flax, optax, distrax, tensorflow_probability and ml_collections of the time
of the authors' code (jax 0.4.18 and flax 0.7.4 work), and none of the packages of this repository.
CASE.npz holds settings, start weights, batches and draws; RESULT.npz gets the weights after the
updates. Weights have our names: of each network its layers in their order.
"""

import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

Tree = dict[str, Any]


class Draws:
    """Stands for jax.random's normal and uniform: hands out an update's numbers in their order.

    The CQL program computes all its losses once for each network; each time the numbers begin anew.
    First weights, whose shapes flax asks for in every call of a network, are drawn as before.
    """

    def __init__(self, case: dict[str, np.ndarray], kind: str):
        import jax

        self.otherwise = getattr(jax.random, kind)
        names = itertools.takewhile(
            lambda name: name in case, (f"{kind}.{i}" for i in itertools.count())
        )
        self.all = [case[name] for name in names]
        self.begin(0)

    def begin(self, update: int) -> None:
        """The numbers of an update, from 0."""
        self.left = itertools.cycle([draw[update] for draw in self.all])
        self.next = next(self.left, None)
        self.given = 0

    def check(self) -> None:
        """Raises RuntimeError where the update has left some out."""
        if self.all and (self.given == 0 or self.given % len(self.all)):
            raise RuntimeError(f"{self.given} of draws of {len(self.all)} were taken")

    def __call__(
        self, key: Any, shape: Any = (), dtype: Any = float, *args: Any, **bounds: Any
    ) -> Any:
        import jax.numpy as jnp

        if self.next is None or longer_than_one(shape) != longer_than_one(
            self.next.shape
        ):
            return self.otherwise(key, shape, dtype, *args, **bounds)
        found, self.next = self.next, next(self.left)
        self.given += 1
        return jnp.asarray(found).reshape(shape)


def longer_than_one(shape: Any) -> list[int]:
    """The dimensions of a shape that have more than one element."""
    return [int(size) for size in shape if size != 1]


def paths_of(names: list[str], layers: dict[str, tuple[str, ...]]) -> dict[str, tuple]:
    """Our names of parameters -> where flax has them; `layers`: our layer -> flax's."""
    found: dict[str, tuple] = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        if name in layers:
            found[name] = layers[name]
            continue
        place = layers[layer]
        scale = "scale" if "LayerNorm" in place[-1] else "kernel"
        found[name] = (*place, scale if kind == "weight" else "bias")
    return found


def to_tree(weights: dict[str, np.ndarray], layers: dict[str, tuple[str, ...]]) -> Tree:
    """Our parameters of a network as flax's; a kernel is a weight transposed."""
    import jax.numpy as jnp

    tree: Tree = {}
    for name, path in paths_of(list(weights), layers).items():
        node = tree
        for step in path[:-1]:
            node = node.setdefault(step, {})
        node[path[-1]] = jnp.asarray(weights[name].T)
    return tree


def from_tree(
    tree: Any, names: list[str], layers: dict[str, tuple[str, ...]]
) -> dict[str, np.ndarray]:
    """The inverse of `to_tree`."""
    found = {}
    for name, path in paths_of(names, layers).items():
        node = tree
        for step in path:
            node = node[step]
        found[name] = np.asarray(node).T
    return found


def part_of(case: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    """The start weights of a network."""
    start = f"start.{part}."
    return {k.removeprefix(start): v for k, v in case.items() if k.startswith(start)}


def column(case: dict[str, np.ndarray], name: str, update: int) -> Any:
    """One field of the batch of an update."""
    import jax.numpy as jnp

    return jnp.asarray(case[name][update])


# Our layers of a network -> flax's.
HIDDEN = {"0": ("Dense_0",), "2": ("Dense_1",)}
IQL_POLICY = {
    **{k: ("MLP_0", *v) for k, v in HIDDEN.items()},
    "4": ("Dense_0",),
}
IQL_VALUE = {"0": ("Dense_0",), "2": ("Dense_1",), "4": ("Dense_2",)}
IQL = {
    "policy": {f"net.net.{k}": v for k, v in IQL_POLICY.items()},
    "balance": {f"network.net.{k}": v for k, v in IQL_POLICY.items()},
    "vf": {f"v.net.{k}": ("MLP_0", *v) for k, v in IQL_VALUE.items()},
    "qf": {
        f"q{i + 1}.net.{k}": (f"Critic_{i}", "MLP_0", *v)
        for i in (0, 1)
        for k, v in IQL_VALUE.items()
    },
    "log_eta": {"constant": ("log_temp",)},
}
for name in ("policy", "balance"):
    IQL[name]["log_std"] = ("log_stds",)
IQL["q_target"] = IQL["qf"]
# Our part -> the learner's.
LEARNER = {
    "policy": "actor",
    "balance": "hierarchical_actor",
    "vf": "value",
    "qf": "critic",
    "q_target": "target_critic",
    "log_eta": "hierarchical_temp",
}


def run_iql(checkout: Path, case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights after the updates of a case of FamO2O-IQL."""
    import flax

    # Their code was written for frozen dicts.
    flax.config.update("flax_return_frozendict", True)
    sys.path.insert(0, str(checkout / "jax_iql"))
    import common
    import family_learner

    settings = json.loads(str(case["settings"]))
    learner = family_learner.FamilyLearner(
        0,
        case["observations"][0, :1],
        case["actions"][0, :1],
        expectile=settings["iql_tau"],
        discount=settings["discount"],
        tau=settings["tau"],
        opt_decay_schedule=None,
        family_coefficient_range=(settings["beta_low"], settings["beta_high"]),
        target_entropy=settings["target_entropy"],
        hierarchical_init_temperature=settings["eta_init"],
    )
    for part, name in LEARNER.items():
        model = getattr(learner, name)
        params = flax.core.freeze(to_tree(part_of(case, part), IQL[part]))
        state = None if model.tx is None else model.tx.init(params)
        setattr(learner, name, model.replace(params=params, opt_state=state))
    normal, uniform = with_draws(case)
    for update in range(len(case["rewards"])):
        normal.begin(update), uniform.begin(update)
        batch = common.Batch(
            observations=column(case, "observations", update),
            actions=column(case, "actions", update),
            rewards=column(case, "rewards", update),
            masks=1.0 - column(case, "dones", update),
            next_observations=column(case, "next_observations", update),
        )
        learner.update(batch, not settings["online"])
        normal.check(), uniform.check()
    return {
        f"{part}.{key}": value
        for part, name in LEARNER.items()
        for key, value in from_tree(
            getattr(learner, name).params, list(part_of(case, part)), IQL[part]
        ).items()
    }


SCALARS = {
    "log_std_multiplier": ("log_std_multiplier_module", "value"),
    "log_std_offset": ("log_std_offset_module", "value"),
}
CQL_POLICY = {"0": "Dense_0", "2": "Dense_1", "4": "Dense_2"}
CQL_CRITIC = {
    **{"0": "Dense_0", "1": "LayerNorm_0", "3": "Dense_1", "4": "LayerNorm_1"},
    "6": "Dense_2",
}
CRITIC = {
    f"network.{k}": ("FamilyFullyConnectedNetwork_0", v) for k, v in CQL_CRITIC.items()
}
CQL = {
    "policy": {
        **{f"base_network.{k}": ("base_network", v) for k, v in CQL_POLICY.items()},
        **{f"{name}.constant": path for name, path in SCALARS.items()},
    },
    "balance": {
        **{f"network.{k}": ("base_network", v) for k, v in CQL_POLICY.items()},
        **SCALARS,
    },
    **dict.fromkeys(("critic_1", "critic_2"), CRITIC),
    **dict.fromkeys(("target_critic_1", "target_critic_2"), CRITIC),
    "log_alpha": {"constant": ("value",)},
}
# Our part -> theirs.
STATES = {
    "policy": "policy",
    "balance": "hierarchical_policy",
    "critic_1": "qf1",
    "critic_2": "qf2",
    "log_alpha": "log_alpha",
}
TARGETS = {"target_critic_1": "qf1", "target_critic_2": "qf2"}


def their_sac(checkout: Path, settings: Tree, state_dim: int, action_dim: int) -> Any:
    """FamCQL's trainer with weights of its own."""
    for name in ("wandb", "cloudpickle"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.path.insert(0, str(checkout / "jax_cql"))
    from JaxCQL.conservative_sac import ConservativeSAC
    from JaxCQL.family_conservative_sac import FamilyConservativeSAC
    from JaxCQL.family_model import FamilyFullyConnectedQFunction
    from JaxCQL.hierarchical_policy import FamilyTanhGaussianPolicy, HierarchicalPolicy
    from JaxCQL.jax_utils import init_rng

    init_rng(0)
    config = ConservativeSAC.get_default_config()
    config.cql_min_q_weight = settings["cql_alpha"]
    config.cql_n_actions = settings["cql_n_actions"]
    config.soft_target_update_rate = settings["soft_target_update_rate"]
    config.discount = settings["discount"]
    config.alpha_multiplier = settings["alpha_multiplier"]
    config.target_entropy = -float(action_dim)
    config.hierarchical_policy_lr = settings["balance_lr"]
    config.sin_cos_n, config.sin_cos_d = settings["encoding_base"], 6
    bounds = settings["beta_low"], settings["beta_high"]
    get_default = FamilyConservativeSAC.get_default_config
    # It takes the fields of its base alone, and is handed all of them.
    FamilyConservativeSAC.get_default_config = staticmethod(lambda updates=None: config)
    sac = FamilyConservativeSAC(
        config=config,
        policy=FamilyTanhGaussianPolicy(state_dim, action_dim),
        qf=FamilyFullyConnectedQFunction(state_dim, action_dim),
        hierarchical_policy=HierarchicalPolicy(
            observation_dim=state_dim, action_dim=1, coefficient_range=bounds
        ),
    )
    FamilyConservativeSAC.get_default_config = get_default
    return sac


def run_cql(checkout: Path, case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights after the updates of a case of FamCQL."""
    settings = json.loads(str(case["settings"]))
    dims = case["observations"].shape[-1], case["actions"].shape[-1]
    sac = their_sac(checkout, settings, *dims)
    from flax.training.train_state import TrainState

    for part, name in STATES.items():
        params = {"params": to_tree(part_of(case, part), CQL[part])}
        old = sac._train_states[name]
        made = TrainState.create(params=params, tx=old.tx, apply_fn=None)
        sac._train_states[name] = made
    sac._target_qf_params = {
        name: {"params": to_tree(part_of(case, part), CRITIC)}
        for part, name in TARGETS.items()
    }
    normal, uniform = with_draws(case)
    fields = ("observations", "actions", "rewards", "next_observations", "dones")
    for update in range(len(case["rewards"])):
        normal.begin(update), uniform.begin(update)
        batch = {name: column(case, name, update) for name in fields}
        sac.train(batch, use_cql=True, random_hierarchical=not settings["online"])
        normal.check(), uniform.check()
    trees = {part: sac._train_states[name].params for part, name in STATES.items()}
    trees.update({part: sac._target_qf_params[name] for part, name in TARGETS.items()})
    return {
        f"{part}.{key}": value
        for part, tree in trees.items()
        for key, value in from_tree(
            tree["params"], list(part_of(case, part)), CQL[part]
        ).items()
    }


def with_draws(case: dict[str, np.ndarray]) -> tuple[Draws, Draws]:
    """Put the numbers of a case in the place of jax's normal and uniform ones."""
    import jax

    normal, uniform = Draws(case, "normal"), Draws(case, "uniform")
    jax.random.normal, jax.random.uniform = normal, uniform
    return normal, uniform


def main() -> None:
    checkout, base, path, result = sys.argv[1:]
    import jax

    with np.load(path) as arrays:
        case = dict(arrays)
    run = {"iql": run_iql, "cql": run_cql}[base]
    # A compiled update would hold the draws of the first one.
    with jax.disable_jit():
        found = run(Path(checkout), case)
    versions = {name: sys.modules[name].__version__ for name in ("jax", "flax", "optax")}
    np.savez(result, versions=np.asarray(json.dumps(versions)), **found)


if __name__ == "__main__":
    main()
