"""E2O: our algorithms/e2o.py against the authors' classes, offline and online.

Their fork of d3rlpy is imported without the parts that no update needs: environments, loggers and
the compiled data set, whose names are stubs. Their normal and uniform numbers are ours, in the
order in which they ask for them; the temperature's loss and the policy's get the same ones, as in
our file.
"""

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from algorithms import e2o, iql
from benchmarks import parity
from benchmarks.parity_rivals import Case

FORK = "offline-rl-algorithms/E2O/d3rlpy_new/d3rlpy"
# Packages whose own files import everything, and modules that no update needs.
PACKAGES = ("d3rlpy", "d3rlpy.algos", "d3rlpy.algos.torch")
STUBS = ("gym", "GPUtil", "structlog", "tensorboardX", "h5py")
MODULES = (
    *("algos.torch.cql_impl", "algos.torch.e2o_impl", "models.encoders"),
    *("models.optimizers", "models.q_functions"),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "published": {},
    "three critics, larger rates": {
        "n_critics": 3,
        **{"policy_lr": 3e-4, "qf_lr": 1e-3, "temperature_lr": 1e-3, "cql_n_actions": 3},
    },
}
# Of a batch, and updates: 30 actions of every row in ten critics take their time.
ROWS, UPDATES = 32, 10
EXPLANATION = "float32 rounding: the same terms are added up in another order"


class MiniBatch:
    """What stands for their batch of transitions."""

    def __init__(self, batch: list[torch.Tensor]):
        names = "observations actions rewards next_observations terminals"
        for name, field in zip(names.split(), batch, strict=True):
            setattr(self, name, field.numpy())
        self.n_steps = np.ones((len(batch[0]), 1), np.float32)


def stub(name: str, **attributes: Any) -> types.ModuleType:
    """A module that holds these names."""
    module = types.ModuleType(name)
    vars(module).update(attributes)
    return module


def packages(checkout: Path) -> list[Any]:
    """Their modules, in the order of `MODULES`."""
    root, known = checkout / FORK, {}
    for name in PACKAGES:
        place = root.joinpath(*name.split(".")[1:])
        known[name] = stub(name, __path__=[str(place)])
    data = dict.fromkeys(("MDPDataset", "Transition", "Episode"), object)
    known["d3rlpy.dataset"] = stub(
        "d3rlpy.dataset", TransitionMiniBatch=MiniBatch, **data
    )
    known["d3rlpy.algos.base"] = stub("d3rlpy.algos.base", AlgoImplBase=object)
    stubs: dict[str, Any] = {name: mock.MagicMock() for name in STUBS}
    with mock.patch.dict(sys.modules, {**known, **stubs}):
        return [importlib.import_module(f"d3rlpy.{name}") for name in MODULES]


def their_trainer(modules: list[Any], config: e2o.TrainConfig, online: bool) -> Any:
    """A trainer of theirs: CQL offline, E2O online."""
    cql_impl, e2o_impl, encoders, optimizers, q_functions = modules
    encoder = encoders.VectorEncoderFactory([config.hidden_dim] * 3)
    adam = optimizers.AdamFactory()
    fields: dict[str, Any] = {
        "observation_shape": (parity.S,),
        "action_size": parity.A,
        "actor_learning_rate": config.policy_lr,
        "critic_learning_rate": config.qf_lr,
        "temp_learning_rate": config.temperature_lr,
        "actor_optim_factory": adam,
        "critic_optim_factory": adam,
        "temp_optim_factory": adam,
        "actor_encoder_factory": encoder,
        "critic_encoder_factory": encoder,
        "q_func_factory": q_functions.MeanQFunctionFactory(),
        "gamma": config.discount,
        "tau": config.soft_target_update_rate,
        "n_critics": config.n_critics,
        "initial_temperature": 1.0,
        **dict.fromkeys(("use_gpu", "scaler", "action_scaler", "reward_scaler")),
    }
    if online:
        made = e2o_impl.E2OImpl(**fields)
    else:
        made = cql_impl.CQLImpl(
            **fields,
            alpha_learning_rate=0.0,
            alpha_optim_factory=adam,
            initial_alpha=1.0,
            alpha_threshold=5.0,
            conservative_weight=config.cql_alpha,
            n_action_samples=config.cql_n_actions,
            soft_q_backup=False,
        )
    made.build()
    return made


def their_state(trainer: e2o.E2O) -> dict[str, dict[str, torch.Tensor]]:
    """Our weights under the names of their parts and parameters."""
    heads = {"mean": "_mu", "log_std": "_logstd"}
    actor = {}
    for name, value in trainer.actor.state_dict().items():
        part, *rest = name.split(".")
        place = f"_encoder._fcs.{int(rest[0]) // 2}" if part == "trunk" else heads[part]
        actor[f"{place}.{rest[-1]}"] = value.clone()
    temperature = trainer.alpha.raw.detach().reshape(1, 1).clone()
    found = {"_policy": actor, "_log_temp": {"_parameter": temperature}}
    for part, critics in (
        ("_q_func", trainer.critics),
        ("_targ_q_func", trainer.target_critics),
    ):
        found[part] = {}
        for number, layer in enumerate([*critics.hidden, critics.last]):
            hidden = number < len(critics.hidden)
            place = f"_encoder._fcs.{number}" if hidden else "_fc"
            for i in range(critics.n_critics):
                where = f"_q_funcs.{i}.{place}"
                weight, bias = layer.weight.detach()[i].T, layer.bias.detach()[i, 0]
                found[part][f"{where}.weight"] = weight.clone()
                found[part][f"{where}.bias"] = bias.clone()
    return found


@contextmanager
def same_numbers(noise: e2o.Noise) -> Iterator[None]:
    """Inside, their update draws ours: temperature, critics, policy."""
    queue = [noise.policy]
    for drawn in (noise.current, noise.following):
        if drawn is not None:
            queue.append(drawn.transpose(0, 1))
    if noise.backup is not None:
        queue.append(noise.backup)
    if noise.spread is not None:
        queue += list(noise.spread.unbind(1))
    queue.append(noise.policy)

    def rsample(self: Any, shape: Any = ()) -> torch.Tensor:
        return self.loc + self.scale * queue.pop(0)

    def uniform(self: torch.Tensor, low: float, high: float) -> torch.Tensor:
        assert noise.uniform is not None and (low, high) == (-1.0, 1.0)
        return self.copy_(noise.uniform.reshape(self.shape))

    with ExitStack() as patches:
        normal = torch.distributions.Normal
        patches.enter_context(mock.patch.object(normal, "rsample", rsample))
        patches.enter_context(mock.patch.object(torch.Tensor, "uniform_", uniform))
        yield
    assert not queue, "they have drawn less than we did"


def updated(modules: list[Any], config: e2o.TrainConfig, online: bool) -> Any:
    """Our trainer and theirs after the same updates of a phase."""
    torch.manual_seed(0)
    ours = e2o.make_trainer(config, parity.S, parity.A, 1.0, "cpu")
    theirs = their_trainer(modules, config, online)
    for part, state in their_state(ours).items():
        getattr(theirs, part).load_state_dict(state)
    buffer = parity.buffer_of(iql, 0)
    np.random.seed(1)
    for _ in range(UPDATES):
        batch = buffer.sample(ROWS)
        noise = ours._noise(batch[1], online)
        ours._update(batch, noise)
        rows = MiniBatch(batch)
        with same_numbers(noise):
            theirs.update_temp(rows)
            theirs.update_critic(rows)
            theirs.update_actor(rows)
        theirs.update_critic_target()
    return ours, theirs


def cases(checkout: Path) -> list[Case]:
    """Updates of both phases, on their default networks."""
    modules, results = packages(checkout), []
    for name, fields in SETTINGS.items():
        config = e2o.TrainConfig(env=parity.TASK, **fields)
        for online in (False, True):
            ours, theirs = updated(modules, config, online)
            found: dict[str, float] = {}
            for part, state in their_state(ours).items():
                other = getattr(theirs, part).state_dict()
                gaps = [(state[key] - other[key]).abs().max().item() for key in state]
                found[part.strip("_")] = max(gaps)
            phase = "online" if online else "offline"
            results.append((f"e2o, {name}, {phase}", found, EXPLANATION))
    return results
