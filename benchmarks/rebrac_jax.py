"""Updates of CORL's ReBRAC, which is JAX: the part of parity_rebrac.py in a Python of its own.

    JAXPYTHON benchmarks/rebrac_jax.py CORL/algorithms/offline/rebrac.py CASE.npz RESULT.npz

That Python needs jax, flax, optax and chex, and none of the packages of this repository. CASE.npz
holds settings, start weights, batches, coefficients and noise; RESULT.npz gets the weights after
the updates, under the names that our trainer gives them, and the losses of every update.
"""

import json
import runpy
import sys
import types
from typing import Any

import numpy as np

# What the file imports for data, environments and logs, none of which is used here.
UNUSED = ("d4rl", "gym", "wandb", "pyrallis", "tqdm", "tqdm.auto")


def load(path: str) -> dict[str, Any]:
    """The names that upstream's file defines; nothing is run."""
    for name in UNUSED:
        sys.modules[name] = types.ModuleType(name)
    stubs: dict[str, Any] = sys.modules
    stubs["gym"].Env = object
    stubs["pyrallis"].wrap = lambda: lambda function: function
    stubs["tqdm.auto"].trange = range
    return runpy.run_path(path, run_name="upstream")


def flax_names(weights: dict[str, np.ndarray]) -> dict[str, tuple[str, str]]:
    """Our names of a network's parameters, in their order -> flax's layer and parameter."""
    found, counts = {}, {"Dense": 0, "LayerNorm": 0}
    for name, value in weights.items():
        if not name.endswith("weight"):
            continue
        kind, scale = ("Dense", "kernel") if value.ndim == 2 else ("LayerNorm", "scale")
        layer = f"{kind}_{counts[kind]}"
        counts[kind] += 1
        found[name] = layer, scale
        found[name.removesuffix("weight") + "bias"] = layer, "bias"
    return found


def to_flax(weights: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Our parameters of a network as flax's; a kernel is a weight transposed."""
    tree: dict[str, dict[str, np.ndarray]] = {}
    for name, (layer, parameter) in flax_names(weights).items():
        tree.setdefault(layer, {})[parameter] = weights[name].T
    return tree


def part_of(case: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    """The start weights of a network."""
    start = f"start.{part}."
    return {k.removeprefix(start): v for k, v in case.items() if k.startswith(start)}


def states_of(upstream: dict[str, Any], case: dict[str, np.ndarray], settings: dict):
    """Upstream's train states of policy and critics, with the start weights of a case."""
    import jax.numpy as jnp
    import optax
    from jax.tree_util import tree_map

    shape = {"hidden_dim": settings["hidden_dim"]}
    policy = upstream["DetActor"](
        action_dim=case["actions"].shape[-1],
        layernorm=settings["actor_ln"],
        n_hiddens=settings["actor_n_hiddens"],
        **shape,
    )
    critic = upstream["EnsembleCritic"](
        num_critics=2,
        layernorm=settings["critic_ln"],
        n_hiddens=settings["critic_n_hiddens"],
        **shape,
    )
    both = [to_flax(part_of(case, name)) for name in ("critic_1", "critic_2")]
    starts = {
        "actor": {"params": to_flax(part_of(case, "actor"))},
        "critic": {"params": {"VmapCritic_0": tree_map(lambda *x: np.stack(x), *both)}},
    }
    starts = tree_map(jnp.asarray, starts)
    kinds = {
        "actor": upstream["ActorTrainState"],
        "critic": upstream["CriticTrainState"],
    }
    modules, rates = {"actor": policy, "critic": critic}, {"actor": "actor_lr"}
    return [
        kind.create(
            apply_fn=modules[name].apply,
            params=starts[name],
            target_params=starts[name],
            tx=optax.adam(learning_rate=settings[rates.get(name, "qf_lr")]),
        )
        for name, kind in kinds.items()
    ]


def run(upstream: dict[str, Any], case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights and losses after the updates of a case."""
    import jax

    settings = json.loads(str(case["settings"]))
    actor, critic = states_of(upstream, case, settings)
    key = jax.random.PRNGKey(0)
    shared = {k: settings[k] for k in ("gamma", "tau", "policy_noise", "noise_clip")}
    fields = ("states", "actions", "rewards", "next_states", "dones", "next_actions")
    losses: dict[str, list[float]] = {"critic_loss": [], "actor_loss": []}
    for i, coefs in enumerate(case["coefs"].tolist()):
        batch = {k: jax.numpy.asarray(case[k][i]) for k in fields}
        # Upstream draws the noise of the target policy here, and nothing else.
        jax.random.normal = lambda key, shape, i=i: jax.numpy.asarray(case["noise"][i])
        arguments = {**shared, "actor_bc_coef": coefs[0], "critic_bc_coef": coefs[1]}
        arguments.update(key=key, actor=actor, critic=critic, batch=batch)
        arguments["metrics"] = upstream["Metrics"].create(
            "critic_loss q_min actor_loss bc_mse_policy bc_mse_random action_mse".split()
        )
        update = upstream["update_td3_no_targets"]
        if i % settings["policy_freq"] == 0:
            update = upstream["update_td3"]
            arguments["normalize_q"] = settings["normalize_q"]
        key, actor, critic, metrics = update(**arguments)
        with np.errstate(invalid="ignore"):
            means = metrics.compute()
        for name, values in losses.items():
            values.append(float(means[name][0]))
    trees = {"actor": actor.params, "actor_target": actor.target_params}
    for name, params in (("", critic.params), ("_target", critic.target_params)):
        for number in (0, 1):
            layers = params["params"]["VmapCritic_0"]
            one = jax.tree_util.tree_map(lambda x, number=number: x[number], layers)
            trees[f"critic_{number + 1}{name}"] = {"params": one}
    result: dict[str, Any] = dict(losses)
    for part, tree in trees.items():
        names = flax_names(part_of(case, part.removesuffix("_target")))
        for name, (layer, parameter) in names.items():
            result[f"{part}.{name}"] = np.asarray(tree["params"][layer][parameter]).T
    versions = {name: sys.modules[name].__version__ for name in ("jax", "flax", "optax")}
    return {**result, "versions": np.asarray(json.dumps(versions))}


def main() -> None:
    path, case, result = sys.argv[1:]
    with np.load(case) as arrays:
        np.savez(result, **run(load(path), dict(arrays)))


if __name__ == "__main__":
    main()
