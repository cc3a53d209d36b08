"""The ways to take DARE elsewhere, run as docs/use-in-your-codebase.md shows them."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kinds import with_slow

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"```python\n(.*?)```",
    (ROOT / "docs" / "use-in-your-codebase.md").read_text(),
    re.DOTALL,
)

ONE_FILE = """
from collections import deque
from random import Random

class Theirs:  # somebody else's buffer: a deque of Python tuples
    def __init__(self, shift):
        random = Random(0)
        rows = ([random.random() for _ in range(3)] for _ in range(500))
        self.rows = deque((s, [s[0] + shift], s[1], s, False) for s in rows)
        self.random = Random(1)
    def sample(self, n):
        columns = zip(*self.random.sample(self.rows, n))
        return [torch.tensor(column, dtype=torch.float32) for column in columns]

torch.manual_seed(0)
noisy = lambda batch: [batch[0], batch[1] + 0.2 * torch.randn_like(batch[1]), *batch[2:]]
offline, online = noisy(Theirs(0.0).sample(64)), noisy(Theirs(0.3).sample(64))
batch, weight, stats = dare_batch(offline, online, lambda states: states[:, :1])
assert 0 < stats["exchanged"] <= 32 and weight.sum() == 64
distance = (batch[1][:, 0] - batch[0][:, 0]).abs()
before = (offline[1][:, 0] - offline[0][:, 0]).abs()
assert distance[:64].mean() < before.mean()
assert sorted(batch[2].tolist()) == sorted(torch.cat([offline[2], online[2]]).tolist())
print("ok")
"""

HOOK = """
class Buffer:
    def __init__(self, shift):
        self.states = torch.randn(400, 2)
        self.actions = self.states[:, :1] * 0.3 + shift + 0.1 * torch.randn(400, 1)
    def sample(self, n):
        rows = torch.randint(400, (n,))
        return [self.states[rows], self.actions[rows]]

torch.manual_seed(0)
offline, online = Buffer(0.0), Buffer(0.2)
policy = lambda s, a: -((a - 0.3 * s[:, :1] - 0.2) ** 2).sum(1) / 0.02
hook = make_hook(offline, online, policy, offline.states, offline.actions)
weights = torch.zeros(1, requires_grad=True)
losses = lambda batch: ((batch[1][:, 0] - weights) ** 2, 0.0 * weights + batch[0][:, 0])
log = update(hook, losses, torch.optim.SGD([weights], 0.1))
assert weights.item() != 0.0 and log["score_on_mean"] > log["score_off_mean"]
print("ok")
"""


def run(arguments, cwd, **environment):
    return subprocess.run(
        arguments,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_exchange_copied_alone_works_on_foreign_buffers(tmp_path):
    shutil.copy(ROOT / "corl_dare" / "exchange.py", tmp_path)
    (tmp_path / "program.py").write_text(BLOCKS[0] + ONE_FILE)
    # -S and -I would hide torch too; instead make sure that ours cannot be imported
    blocker = "import sys; sys.modules['corl_dare'] = None\n"
    (tmp_path / "program.py").write_text(blocker + BLOCKS[0] + ONE_FILE)
    done = run([sys.executable, "program.py"], tmp_path)
    assert done.stdout.strip() == "ok", done.stderr


def test_the_hook_around_foreign_buffers(tmp_path):
    block = BLOCKS[1].replace("behavior_updates=2000", "behavior_updates=200")
    assert block != BLOCKS[1]
    (tmp_path / "program.py").write_text(block + HOOK)
    done = run([sys.executable, "program.py"], tmp_path, PYTHONPATH=str(ROOT))
    # The first line says which behavior model was trained.
    assert done.stdout.splitlines()[-1:] == ["ok"], done.stderr


def test_the_hook_needs_no_host(tmp_path):
    """The folder corl_dare alone, copied beside a program; `corl` cannot be imported."""
    shutil.copytree(ROOT / "corl_dare", tmp_path / "corl_dare")
    block = BLOCKS[1].replace("behavior_updates=2000", "behavior_updates=200")
    blocker = "import sys; sys.modules['corl'] = None\n"
    (tmp_path / "program.py").write_text(blocker + block + HOOK)
    done = run([sys.executable, "program.py"], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout.splitlines()[-1:] == ["ok"], done.stderr


# What an installation brings.
PACKAGES = ("corl", "corl_dare", "transition_diffusion", "adaptive_regularization")
PACKAGES += ("policy_family",)
PACKAGES += ("online_pretraining",)
HEAD = """
import sys
sys.modules["corl"] = sys.modules["corl_dare"] = None
import copy, math
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Distribution, Normal, TanhTransform, TransformedDistribution
from torch.optim.lr_scheduler import CosineAnnealingLR
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from torch.func import functional_call
TensorBatch = Batch = List[torch.Tensor]
"""
MAKE = {
    "iql": """
actor, q, v = GaussianPolicy(4, 2, 1.0), TwinQ(4, 2), ValueFunction(4)
adam = lambda network: torch.optim.Adam(network.parameters(), lr=3e-4)
trainer = ImplicitQLearning(1.0, actor, adam(actor), q, adam(q), v, adam(v))
""",
    "pex": """
old, new, q, v = *(GaussianPolicy(4, 2, 1.0) for _ in range(2)), TwinQ(4, 2), ValueFunction(4)
actor, adam = old, lambda network: torch.optim.Adam(network.parameters(), lr=3e-4)
trainer = PolicyExpansion(1.0, old, adam(old), new, adam(new), q, adam(q), v, adam(v))
""",
    "td3_bc": """
actor, critics = Actor(4, 2, 1.0), [Critic(4, 2) for _ in range(2)]
adam = lambda network: torch.optim.Adam(network.parameters(), lr=3e-4)
trainer = TD3_BC(1.0, actor, adam(actor), critics[0], adam(critics[0]), critics[1],
                 adam(critics[1]), policy_freq=1)
""",
    "td3_bc_sa": """
actor, critics = Actor(4, 2, 1.0), [Critic(4, 2) for _ in range(2)]
adam = lambda network: torch.optim.Adam(network.parameters(), lr=3e-4)
beta = CoefficientNet(4, 0.4, 32)
trainer = TD3_BC_SA(1.0, actor, adam(actor), critics[0], adam(critics[0]), critics[1],
                    adam(critics[1]), beta, adam(beta), Threshold(1.0, 3.0, 10),
                    policy_freq=1)
""",
    "opt_td3": """
actor, critics = Actor(4, 2, 1.0), [Critic(4, 2) for _ in range(4)]
adam = lambda network: torch.optim.Adam(network.parameters(), lr=3e-4)
pair = Pair(*critics[2:])
trainer = OPT_TD3(1.0, actor, adam(actor), critics[0], adam(critics[0]), critics[1],
                  adam(critics[1]), pair, adam(pair), Draws(0), policy_freq=1)
""",
    "opt_spot": """
actor, critics = Actor(4, 2, 1.0), [Critic(4, 2) for _ in range(4)]
vae, adam = VAE(4, 2, None, 1.0, 16), lambda network: torch.optim.Adam(network.parameters())
pair = Pair(*critics[2:])
trainer = OPT_SPOT(1.0, actor, adam(actor), critics[0], adam(critics[0]), critics[1],
                   adam(critics[1]), pair, adam(pair), vae, adam(vae), Draws(0),
                   policy_freq=1)
""",
    "cql_sa": """
actor = TanhGaussianPolicy(4, 2, 1.0)
critics = [FullyConnectedQFunction(4, 2) for _ in range(2)]
adam = lambda network: torch.optim.Adam(network.parameters(), lr=3e-4)
beta = CoefficientNet(4, 10.0, 32)
trainer = CQL_SA(critics[0], adam(critics[0]), critics[1], adam(critics[1]), actor,
                 adam(actor), beta, adam(beta), Threshold(1.0, 3.0, 10), target_entropy=-2.0)
""",
    "famo2o_iql": """
balance = BalanceModel(MLP([4, 8, 1]), 1.0, 5.0, -10.0)
actor, q, v = FamilyActor(FamilyPolicy(4, 2, 1.0), balance), TwinQ(4, 2), ValueFunction(4)
adam = lambda network: torch.optim.Adam(network.parameters(), lr=3e-4)
trainer = FamO2OIQL(1.0, actor, adam(actor.policy), adam(balance), q, adam(q), v, adam(v))
""",
    "famo2o_cql": """
balance = BalanceModel(relu_network(4, 2, 8), 0.5, 1.5, -20.0, state_std=True)
actor = FamilyActor(FamilyPolicy(4, 2, 1.0), balance)
critics = [FullyConnectedQFunction(4, 2) for _ in range(2)]
adam = lambda network: torch.optim.Adam(network.parameters(), lr=3e-4)
trainer = FamCQL(critics[0], adam(critics[0]), critics[1], adam(critics[1]), actor,
                 adam(actor.policy), adam(balance), target_entropy=-2.0)
""",
    "rebrac": """
actor, critics = Actor(4, 2, 1.0), [Critic(4, 2) for _ in range(2)]
adam = lambda network: torch.optim.Adam(network.parameters(), lr=3e-4)
trainer = ReBRAC(1.0, actor, adam(actor), critics[0], adam(critics[0]), critics[1],
                 adam(critics[1]))
""",
    "spot": """
actor, critics = Actor(4, 2, 1.0, dropout=0.1), [Critic(4, 2) for _ in range(2)]
vae, adam = VAE(4, 2, None, 1.0, 16), lambda network: torch.optim.Adam(network.parameters())
trainer = SPOT(1.0, actor, adam(actor), critics[0], adam(critics[0]), critics[1],
               adam(critics[1]), vae, adam(vae), policy_freq=1)
trainer.vae_train([torch.randn(8, 4), torch.rand(8, 2)])
""",
    "rlpd": """
actor, critics = SquashedGaussianPolicy(4, 2, 1.0), CriticEnsemble(4, 2, 10)
adam, heat = lambda network: torch.optim.Adam(network.parameters()), PositiveScalar()
trainer = RLPD(critics, adam(critics), actor, adam(actor), heat, adam(heat), -1.0)
""",
    "e2o": """
actor, critics = SquashedGaussianPolicy(4, 2, 1.0), CriticEnsemble(4, 2, 3)
adam = lambda network: torch.optim.Adam(network.parameters())
trainer = E2O(actor, adam(actor), critics, adam(critics), -2.0, uncertainty_temperature=0.0)
""",
    "wsrl": """
actor, critics = SquashedGaussianPolicy(4, 2, 1.0), CriticEnsemble(4, 2, 10)
adam, heat = lambda network: torch.optim.Adam(network.parameters()), PositiveScalar()
more = PositiveScalar(1.0, softplus=True)
trainer = WSRL(critics, adam(critics), actor, adam(actor), heat, adam(heat), more,
               adam(more), -2.0)
""",
    "awac": """
actor, critics = Actor(4, 2, 32), [Critic(4, 2, 32) for _ in range(2)]
adam = lambda network: torch.optim.Adam(network.parameters(), lr=3e-4)
trainer = AdvantageWeightedActorCritic(actor, adam(actor), critics[0], adam(critics[0]),
                                       critics[1], adam(critics[1]))
""",
    "cql": """
actor = TanhGaussianPolicy(4, 2, 1.0)
critics = [FullyConnectedQFunction(4, 2) for _ in range(2)]
adam = lambda network: torch.optim.Adam(network.parameters(), lr=3e-4)
trainer = KIND(critics[0], adam(critics[0]), critics[1], adam(critics[1]), actor,
               adam(actor), target_entropy=-2.0, bc_steps=0)
""",
}
TRAIN = """
batch = [torch.randn(8, 4), torch.rand(8, 2), torch.randn(8, 1), torch.randn(8, 4)]
batch += [torch.zeros(8, 1)] * EXTRA + [torch.zeros(8, 2)] * NEXT_ACTIONS
before = [p.clone() for p in actor.parameters()]
logs = trainer.train(batch)
assert all(torch.isfinite(x) for x in logs.values())
assert any(not torch.equal(a, b) for a, b in zip(before, actor.parameters()))
print("ok")
"""


def pasted(file, names=()):
    """Source of classes and helper functions of a file, as somebody would copy them."""
    source = (ROOT / file).read_text()
    skipped = {"TrainConfig", "train", "step", "make_trainer", "policy_fit"}
    parts = []
    for node in ast.parse(source).body:
        name = getattr(node, "name", "")
        code = isinstance(node, ast.ClassDef | ast.FunctionDef) and name not in skipped
        # What wires the file to the host is not copied.
        if isinstance(node, ast.FunctionDef):
            code &= "TrainConfig" not in ast.unparse(node.args)
        constant = isinstance(node, ast.Assign) and "COLUMNS" not in ast.unparse(node)
        if (names and name in names) or (not names and (code or constant)):
            first = min(
                [node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]
            )
            parts.append("\n".join(source.splitlines()[first - 1 : node.end_lineno]))
    return "\n\n\n".join(parts) + "\n"


PASTED = (
    *("iql", "cql", "cal_ql", "td3_bc", "awac", "rebrac", "spot"),
    *("pex", "td3_bc_sa", "cql_sa", "rlpd", "wsrl", "e2o"),
    *("famo2o_iql", "famo2o_cql", "opt_td3", "opt_spot"),
)
# Runs programs one after the other: most of the time of one goes into importing torch.
RUN_ALL = """
import runpy, sys
for name in sys.argv[1:]:
    print(name, flush=True)
    runpy.run_path(f"{name}.py", run_name="__main__")
"""


def program_of(name):
    """A program that pastes the class of an algorithm and makes one update."""
    steps = pasted(
        "corl/compiled.py", ("begin_anew", "descend", "_traced_adam", "soft_update")
    )
    if name.endswith("_sa"):
        steps += pasted("adaptive_regularization/coefficient.py")
        steps += pasted("adaptive_regularization/trust.py", ("split",))
    if name in ("rlpd", "wsrl", "e2o"):
        steps += pasted("corl/ensembles.py") + pasted("corl/sac.py")
    if name.startswith("famo2o"):
        for file in ("coefficient", "balance", "acting"):
            steps += pasted(f"policy_family/{file}.py")
    if name.startswith("opt_"):
        steps += pasted("online_pretraining/draws.py")
        steps += pasted("online_pretraining/critics.py")
    make = MAKE.get(name, MAKE["cql"])
    kind = {"cql": "ContinuousCQL", "cal_ql": "CalQL"}.get(name, "")
    program = HEAD + steps + pasted(f"algorithms/{name}.py") + make + TRAIN
    program = program.replace("KIND", kind).replace(
        "EXTRA", str(1 + (name in ("cal_ql", "wsrl")))
    )
    return program.replace("NEXT_ACTIONS", str(int(name == "rebrac")))


def test_algorithm_classes_pasted_with_torch_and_descend_train(tmp_path):
    for name in PASTED:
        (tmp_path / f"{name}.py").write_text(program_of(name))
    done = run([sys.executable, "-c", RUN_ALL, *PASTED], tmp_path)
    expected = [word for name in PASTED for word in (name, "ok")]
    assert done.stdout.split() == expected, done.stderr


# Runs a file without what the editable installation of this checkout adds to imports.
BARE = """
import runpy, sys
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in str(f)]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What a non-editable `pip install .` of a clean copy puts into an environment."""
    copy, site = (tmp_path_factory.mktemp(name) for name in ("copy", "site"))
    for name in (*PACKAGES, "algorithms", "experiments"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    done = run([*command, "--target", str(site), "."], copy)
    assert done.returncode == 0, done.stderr
    return site


def test_an_installation_brings_the_packages_and_the_policies(site):
    names = {p.name for p in site.iterdir() if not p.name.endswith(".dist-info")}
    assert names - {"__pycache__", "bin"} == set(PACKAGES)
    for package in ("data", "standin"):
        assert (site / "corl" / package / "__init__.py").is_file()
    here, there = (x / "corl" / "standin" / "weights" for x in (ROOT, site))
    weights = {p.name for p in here.iterdir() if p.suffix != ".csv"}
    assert {p.name for p in there.iterdir()} == weights


@pytest.mark.parametrize(
    "file", with_slow(["dare_iql"], ["cql", "dare_iql", "dare_cal_ql"])
)
def test_an_algorithm_file_outside_the_repository_runs(file, site, tmp_path):
    """After `pip install .`; no configs, no algorithms beside it."""
    shutil.copy(ROOT / "algorithms" / f"{file}.py", tmp_path)
    small = "--env hopper-random-v2 --dataset_rows 1500 --offline_iterations 4 "
    small += "--online_iterations 4 --eval_freq 4 --n_episodes 1 --batch_size 16 "
    small += "--dataset_source self-collected --device cpu "
    if file.startswith("dare"):
        small += "--dare.behavior mixture --dare.behavior_batch_size 16 "
        small += "--dare.guidance_scale 0 --dare.score policy_ratio "
        small += "--dare.behavior_updates 5"
    done = run(
        [sys.executable, "-c", BARE, f"{file}.py", *small.split()],
        tmp_path,
        PYTHONPATH=str(site),
        CORL_DARE_CACHE=str(site.parent / "cache"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "offline score" in done.stdout and "curves.png" in done.stdout
    assert str(ROOT) not in done.stdout


def test_another_package_of_the_same_name_is_named_with_its_path(site, tmp_path):
    other = tmp_path / "other" / "corl"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    shutil.copy(ROOT / "algorithms" / "iql.py", tmp_path)
    path = f"{other.parent}{os.pathsep}{site}"
    command = [sys.executable, "-c", BARE, "iql.py", "--help"]
    done = run(command, tmp_path, PYTHONPATH=path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError") and str(other / "__init__.py") in last
