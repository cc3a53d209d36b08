"""docs/add-dare-to-your-algorithm.md: its blocks are one program, which learns and exchanges."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import toy

PAGE = Path(__file__).parent.parent / "docs" / "add-dare-to-your-algorithm.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
FAST = {"lr": 2e-3, "discount": 0.8, "tau": 0.02}


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The names that the blocks define, run as they stand but for a shorter fit."""
    monkeypatch.chdir(tmp_path)
    text = "\n".join(BLOCKS)
    shorter = text.replace("behavior_updates=2000", "behavior_updates=200")
    assert shorter != text
    names = {}
    exec(compile(shorter, str(PAGE), "exec"), names)
    torch.manual_seed(0)
    return names


def dataset(program):
    """The toy's rows in a buffer of the page."""
    arrays = toy.make_dataset().arrays
    keys = "observations actions rewards next_observations terminals".split()
    fields = [torch.as_tensor(arrays[key]).float() for key in keys]
    return program["Buffer"]([f if f.ndim == 2 else f[:, None] for f in fields])


def score(agent, episodes=20):
    """0 is standing still, 100 the optimum."""
    env, total = toy.make(), 0.0
    for episode in range(episodes):
        (state, _), done = env.reset(seed=episode), False
        while not done:
            with torch.no_grad():
                action = agent.pi(torch.as_tensor(state).float()[None])[0].numpy()
            state, reward, *ends, _ = env.step(action)
            total, done = total + reward, any(ends)
    span = toy.RETURN_BEST - toy.RETURN_STILL
    return 100.0 * (total / episodes - toy.RETURN_STILL) / span


def test_the_program_of_the_page_learns_offline_and_online_and_exchanges(program):
    agent, offline = program["TD3BC"](2, 1, **FAST), dataset(program)
    program["train"](agent, offline, toy.make(), 400, 1, batch=64)
    pretrained = score(agent)
    agent = program["TD3BC"](2, 1, **FAST)
    exchanged = program["train"](agent, offline, toy.make(), 400, 600, batch=64)
    assert pretrained > 65 and score(agent) > 85, (pretrained, score(agent))
    assert 0 < exchanged <= 32


def test_weights_of_one_change_no_bit_and_others_do(program):
    offline = dataset(program)
    agents = [program["TD3BC"](2, 1) for _ in range(3)]
    for agent in agents[1:]:
        for name in ("pi", "q", "pi_target", "q_target"):
            getattr(agent, name).load_state_dict(getattr(agents[0], name).state_dict())
    for agent, weight in zip(
        agents, (1.0, torch.ones(64), torch.zeros(64)), strict=True
    ):
        torch.manual_seed(1)
        for _ in range(5):
            agent.update(offline.sample(64), weight)
    plain, ones, zeros = (list(agent.pi.parameters()) for agent in agents)
    assert all(torch.equal(a, b) for a, b in zip(plain, ones, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, zeros, strict=True))


def test_what_the_page_calls_the_change_is_two_words():
    assert BLOCKS[0].count("weight") == 2


def test_rows_come_back_from_the_buffer_as_they_were_added(program):
    buffer = program["Buffer"]([])
    for i in range(3):
        buffer.add(np.full(2, i), [i], i, np.full(2, -i), 0.0)
    states, actions, rewards, following, ends = buffer.sample(50)
    assert set(rewards[:, 0].tolist()) == {0.0, 1.0, 2.0}
    assert torch.equal(states, rewards.expand(-1, 2)) and torch.equal(actions, rewards)
    assert torch.equal(following, -states) and ends.shape == (50, 1)
