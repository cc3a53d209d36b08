"""Updates of RLPD's and WSRL's authors, which are JAX, in a Python of its own.

    JAX_PYTHON benchmarks/parity_rivals/ensembles_jax.py rlpd|wsrl CHECKOUT CASE.npz RESULT.npz

That Python needs jax, flax, optax, distrax and ml_collections, for RLPD tensorflow_probability, and
none of the packages of this repository. CASE.npz holds settings, start weights, batches and all
random numbers; RESULT.npz gets the weights after the updates under the names of our trainer. Their
classes run unmodified, without jit, so that their random draws can be answered with those of the
case, in their order.
"""

import json
import sys
from collections import deque
from typing import Any
from unittest import mock

import numpy as np

# What they import for environments and data, none of which is used here.
UNUSED = "gym gym.utils gym.utils.seeding gym.spaces d4rl".split()
INSIDE = {"MLP_0", "network", "critic_ensemble"}  # the hidden part of a network


def our_name(part: str, path: tuple[str, ...], norm: bool) -> str:
    """The name that a parameter of theirs has in our part, by its path in their tree."""
    if part in ("temperature", "multiplier"):
        return "raw"
    if path[-1] == "log_stds":
        return "log_std"
    kind = "bias" if path[-1] == "bias" else "weight"
    layer, _, number = path[-2].rpartition("_")
    if INSIDE & set(path):
        if part != "actor":
            return f"{'norms' if layer == 'LayerNorm' else 'hidden'}.{number}.{kind}"
        place = (3 if norm else 2) * int(number) + (layer == "LayerNorm")
        return f"trunk.{place}.{kind}"
    if part != "actor":
        return f"last.{kind}"
    mean = path[-2] in ("OutputDenseMean", "Dense_0")
    return f"{'mean' if mean else 'log_std'}.{kind}"


def layout(
    part: str, name: str, value: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """A parameter in the shape that it has on the other side."""
    if value.ndim == 2 and (part == "actor" or name == "last.weight"):
        return value.T.reshape(shape)
    return value.reshape(shape)


def flattened(tree: Any) -> dict[tuple[str, ...], Any]:
    """A nested dict by paths."""
    if not hasattr(tree, "items"):
        return {(): tree}
    return {
        (key, *path): leaf
        for key, branch in tree.items()
        for path, leaf in flattened(branch).items()
    }


def nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """The dict of which `leaves` are the paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return tree


class Weights:
    """The start weights of a case, and the way to and from their trees."""

    def __init__(self, case: dict[str, np.ndarray], norm: dict[str, bool]):
        self.norm = norm
        self.start = {k[6:]: v for k, v in case.items() if k.startswith("start.")}

    def into(self, part: str, tree: Any) -> dict[str, Any]:
        """Their tree with our weights."""
        import jax.numpy as jnp

        leaves = {}
        for path, leaf in flattened(tree).items():
            name = our_name(part, path, self.norm.get(part, False))
            value = layout(part, name, self.start[f"{part}.{name}"], leaf.shape)
            leaves[path] = jnp.asarray(value)
        return nested(leaves)

    def out_of(self, part: str, tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
        """Their tree under our names."""
        found = {}
        for path, leaf in flattened(tree).items():
            name = our_name(part, path, self.norm.get(part, False))
            shape = self.start[f"{part}.{name}"].shape
            found[f"{prefix}{part}.{name}"] = layout(part, name, np.asarray(leaf), shape)
        return found


class Draws:
    """Answers their random draws with those of a case."""

    def __init__(self) -> None:
        self.waiting: dict[str, deque] = {}

    def give(self, kind: str, value: np.ndarray) -> None:
        """The next answer of a kind."""
        self.waiting.setdefault(kind, deque()).append(value)

    def answer(self, kind: str) -> Any:
        """What stands in the place of `jax.random.KIND`."""
        import jax
        import jax.numpy as jnp

        own = getattr(jax.random, kind)

        def drawn(key: Any, *args: Any, **named: Any) -> Any:
            # flax asks for the shape of first weights in every call, and for no numbers.
            if isinstance(key, jax.core.Tracer):
                return own(key, *args, **named)
            value = self.waiting[kind].popleft()
            if kind in ("randint", "choice"):
                return jnp.asarray(value)
            shape = named["shape"] if "shape" in named else args[0]
            # tensorflow_probability draws the dimensions of an action before the rows.
            if tuple(shape[-2:]) == value.shape[::-1]:
                value = value.T
            return jnp.asarray(value.reshape(shape))

        return drawn

    def patched(self) -> Any:
        """Inside, `jax.random` draws from here."""
        import jax

        kinds = {k: self.answer(k) for k in ("normal", "uniform", "randint", "choice")}
        return mock.patch.multiple(jax.random, **kinds)

    def done(self) -> bool:
        """Has every number been asked for?"""
        return not any(self.waiting.values())


def actions_first(noise: np.ndarray) -> np.ndarray:
    """Noise (B, n, A) as they draw it, (n, B, A); (B, A) stays."""
    return noise.swapaxes(0, 1) if noise.ndim == 3 else noise


def batch_of(case: dict[str, np.ndarray], numbers: list[int]) -> dict[str, Any]:
    """Some batches of a case, one behind the other, under their names."""
    import jax.numpy as jnp

    names = "observations actions rewards next_observations masks mc_returns".split()
    fields = {n: np.concatenate([case[n][i] for i in numbers]) for n in names}
    return {name: jnp.asarray(field) for name, field in fields.items()}


def rlpd(case: dict[str, np.ndarray], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights after the updates of RLPD's learner."""
    import jax
    from rlpd.agents.sac.sac_learner import SACLearner

    class Space:
        def __init__(self, size: int):
            self.shape, self.size = (size,), size

        def sample(self) -> np.ndarray:
            return np.zeros(self.size, case["rewards"].dtype)

    spaces = [Space(case[k].shape[-1]) for k in ("observations", "actions")]
    agent = SACLearner.create(0, *spaces, **settings["theirs"])
    weights = Weights(case, {})
    states = {"actor": agent.actor, "critics": agent.critic, "temperature": agent.temp}
    own = {part: weights.into(part, s.params) for part, s in states.items()}
    from flax.core import freeze

    def fresh(part: str) -> Any:
        state = states[part]
        params = freeze(own[part])
        return state.replace(params=params, opt_state=state.tx.init(params))

    agent = agent.replace(
        actor=fresh("actor"),
        critic=fresh("critics"),
        temp=fresh("temperature"),
        target_critic=agent.target_critic.replace(params=freeze(own["critics"])),
    )
    utd, draws = settings["utd"], Draws()
    with jax.disable_jit(), draws.patched():
        for first in range(0, len(case["rewards"]), utd):
            numbers = list(range(first, first + utd))
            for i in numbers:
                draws.give("normal", case[f"noise.{i}.backup"])
                draws.give("choice", case[f"noise.{i}.members"])
            draws.give("normal", case[f"noise.{numbers[-1]}.policy"])
            agent, _ = agent.update(batch_of(case, numbers), utd)
            assert draws.done()
    return {
        **weights.out_of("actor", agent.actor.params),
        **weights.out_of("critics", agent.critic.params),
        **weights.out_of("critics", agent.target_critic.params, "target_"),
        **weights.out_of("temperature", agent.temp.params),
    }


# Their networks -> our parts.
NETWORKS = {
    "modules_actor": "actor",
    "modules_critic": "critics",
    "modules_temperature": "temperature",
    "modules_cql_alpha_lagrange": "multiplier",
}


def offline_draws(draws: Draws, case: dict[str, np.ndarray], i: int, lagrange: bool):
    """What one of their offline updates draws, in the order of their networks' names."""

    def given(name: str) -> np.ndarray:
        return case[f"noise.{i}.{name}"]

    def gap() -> None:
        draws.give("uniform", given("uniform"))
        for name in ("current", "following"):
            draws.give("normal", actions_first(given(name)))
        draws.give("randint", given("penalized"))

    draws.give("normal", given("policy"))
    if lagrange:
        # For the multiplier, `cql_alpha_lagrange`, they draw them once more.
        gap()
    draws.give("normal", actions_first(given("backup")))
    draws.give("randint", given("members"))
    gap()
    draws.give("normal", actions_first(given("temperature")))


def wsrl(case: dict[str, np.ndarray], settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights after the updates of WSRL's agents, offline or online."""
    import jax
    from flax.core import freeze, unfreeze
    from wsrl.agents import agents

    from experiments.configs.ensemble_config import add_redq_config
    from experiments.configs.train_config import get_config

    config = get_config(settings["config"])
    config.agent_kwargs.update(settings["theirs"])
    if settings["agent"] != "sac":
        config.agent_kwargs = add_redq_config(config.agent_kwargs)
    one = batch_of(case, [0])
    agent = agents[settings["agent"]].create(
        rng=jax.random.PRNGKey(0),
        observations=one["observations"],
        actions=one["actions"],
        encoder_def=None,
        **config.agent_kwargs,
    )
    weights = Weights(case, {"actor": True, "critics": True})
    tree = {
        name: weights.into(NETWORKS[name], branch)
        for name, branch in unfreeze(agent.state.params).items()
    }
    kind = type(agent.state.params)
    params = freeze(tree) if kind is not dict else tree
    opt_states = {name: tx.init(params) for name, tx in agent.state.txs.items()}
    agent = agent.replace(
        state=agent.state.replace(
            params=params, target_params=params, opt_states=opt_states
        )
    )
    utd, online, draws = settings["utd"], settings["online"], Draws()
    lagrange = "modules_cql_alpha_lagrange" in tree
    with jax.disable_jit(), draws.patched():
        for first in range(0, len(case["rewards"]), utd):
            numbers = list(range(first, first + utd))
            batch = batch_of(case, numbers)
            if not online:
                offline_draws(draws, case, first, lagrange)
                agent, _ = agent.update(batch)
            else:
                for i in numbers:
                    draws.give("normal", actions_first(case[f"noise.{i}.backup"]))
                    draws.give("randint", case[f"noise.{i}.members"])
                last = numbers[-1]
                draws.give("normal", case[f"noise.{last}.policy"])
                draws.give("normal", actions_first(case[f"noise.{last}.temperature"]))
                agent, _ = agent.update_high_utd(batch, utd_ratio=utd)
            assert draws.done()
    found = {}
    for name, branch in unfreeze(agent.state.params).items():
        found.update(weights.out_of(NETWORKS[name], branch))
    targets = unfreeze(agent.state.target_params)["modules_critic"]
    return {**found, **weights.out_of("critics", targets, "target_")}


def main() -> None:
    name, checkout, given, made = sys.argv[1:]
    for unused in UNUSED:
        sys.modules[unused] = mock.MagicMock()
    # In the place of this folder, whose modules have the same names.
    sys.path[0] = checkout
    with np.load(given) as arrays:
        case = dict(arrays)
    settings = json.loads(str(case["settings"]))
    result = {"rlpd": rlpd, "wsrl": wsrl}[name](case, settings)
    np.savez(made, **result)


if __name__ == "__main__":
    main()
