"""Evaluation episodes side by side: the same episodes as one after the other."""

import csv
import re

import gymnasium
import numpy as np
import pytest
import torch
from short_runs import DEFAULTS, run
from test_structure import READERS

from algorithms import iql
from corl import acting, envs, tasks
from corl.config import parse_config

MODULES = sorted({m for ms in READERS.values() for m in ms}, key=lambda m: m.__name__)


class Exact:
    """A policy whose rows do not depend on each other, to the last bit."""

    def __init__(self, size):
        self.size, self.widths = size, []

    def act(self, state, device):
        self.widths.append(state.shape[:-1])
        return np.tanh(np.sin(7.0 * state[..., : self.size]))

    def train(self):
        self.widths.append("train")

    def eval(self):
        self.widths.append("eval")


def made(name, count):
    """Environments as a run has them; halfcheetah's, which end by the time limit, are short."""
    config = iql.TrainConfig(env=name, threads=1, compile=False)
    size = tasks.task(name).state_dim
    mean, std = np.linspace(-0.1, 0.1, size), np.linspace(0.9, 1.1, size)
    found = []
    for _ in range(count):
        env = envs.make(name)
        if name.startswith("halfcheetah"):
            env = gymnasium.wrappers.TimeLimit(env, 20)
        env = acting.CheckedEnv(env, "evaluation", config)
        found.append(acting.wrap_env(env, mean, std))
    return found


@pytest.mark.parametrize("name", ["hopper-medium-v2", "halfcheetah-medium-v2"])
@pytest.mark.parametrize("episodes, count", [(1, 1), (2, 3), (5, 2), (3, 3)])
def test_the_episodes_are_those_of_one_after_the_other(name, episodes, count):
    size = tasks.task(name).action_dim
    alone, together = Exact(size), Exact(size)
    one = acting.eval_actor(made(name, 1)[0], alone, "cpu", episodes, seed=3)
    many = acting.eval_together(made(name, count), together, "cpu", episodes, seed=3)
    np.testing.assert_array_equal(one[0], many[0])
    assert one[1] == many[1] and len(many[0]) == episodes
    assert len(set(one[0])) == episodes
    assert together.widths[0] == "eval" and together.widths[-1] == "train"
    assert max(w for w in together.widths if isinstance(w, tuple)) == (
        min(episodes, count),
    )


def test_antmaze_begins_in_the_same_states():
    name = "antmaze-umaze-v2"
    starts = []

    class Watched(Exact):
        def act(self, state, device):
            starts.append(np.array(state))
            raise StopIteration

    with pytest.raises(StopIteration):
        acting.eval_together(made(name, 3), Watched(8), "cpu", 3, seed=5)
    (env,) = made(name, 1)
    expected = [env.reset(seed=5 if i == 0 else None)[0] for i in range(3)]
    np.testing.assert_array_equal(starts[0], expected)


def test_a_second_evaluation_has_the_episodes_of_the_first():
    found = made("hopper-medium-v2", 2)
    one, two = (
        acting.eval_together(found, Exact(3), "cpu", 4, seed=1)[0] for _ in range(2)
    )
    np.testing.assert_array_equal(one, two)


def test_an_action_that_is_not_finite_is_told_as_ever():
    class Broken(Exact):
        def act(self, state, device):
            return np.full((len(state), 3), np.nan)

    with pytest.raises(FloatingPointError, match="action in the evaluation environment"):
        acting.eval_together(made("hopper-medium-v2", 2), Broken(3), "cpu", 2, seed=0)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_policy_acts_on_many_states_as_on_each(module):
    config = module.TrainConfig(env="hopper-medium-v2", threads=1, compile=False)
    torch.manual_seed(0)
    actor = module.make_trainer(config, 11, 3, 1.0, "cpu").actor
    actor.eval()
    states = np.random.default_rng(0).normal(size=(5, 11))
    actions = actor.act(states, "cpu")
    assert actions.shape == (5, 3)
    each = [actor.act(state, "cpu") for state in states]
    np.testing.assert_allclose(actions, each, atol=1e-5)


def evaluations(module, tmp_path, monkeypatch, **fields):
    run(module, tmp_path, monkeypatch, **fields)
    (path,) = tmp_path.glob("*/evaluations.csv")
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_with_it_evaluates_the_same_policies(tmp_path, monkeypatch):
    fields = {
        **DEFAULTS[iql],
        "offline_iterations": 20,
        "online_iterations": 20,
        "eval_freq": 10,
        "n_episodes": 20,
    }
    found = {
        together: evaluations(
            iql, tmp_path / str(together), monkeypatch, **fields, eval_together=together
        )
        for together in (False, True)
    }
    assert len(found[True]) == 4 * 20
    for name in ("step", "phase", "episode"):
        assert [r[name] for r in found[True]] == [r[name] for r in found[False]]
    returns = [[float(r["return"]) for r in found[k]] for k in (False, True)]
    np.testing.assert_allclose(*returns, atol=1e-3)


def test_as_many_environments_as_help(tmp_path, monkeypatch):
    counts = []
    together = acting.eval_together

    def counted(found, *rest):
        counts.append(len(found))
        return together(found, *rest)

    monkeypatch.setattr(acting, "eval_together", counted)
    short = {"offline_iterations": 2, "online_iterations": 0, "eval_freq": 2}
    for episodes in (3, 20):
        fields = {**DEFAULTS[iql], **short, "n_episodes": episodes}
        folder = tmp_path / str(episodes)
        run(iql, folder, monkeypatch, **fields, eval_together=True)
    assert counts == [3, acting.TOGETHER]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--compat", "true"], "eval_together .* compat"),
        (["--env_backend", "d4rl"], "eval_together needs env_backend gymnasium"),
    ],
)
def test_what_does_not_go_with_it_is_refused(flags, named, capsys):
    with pytest.raises(SystemExit):
        parse_config(iql.TrainConfig, ["--eval_together", "true", *flags])
    assert re.search(named, capsys.readouterr().err)
