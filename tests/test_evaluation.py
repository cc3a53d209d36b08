"""Episodes of several policies that are played in processes of their own."""

import numpy as np
import torch
from test_stacked import networks, trainers

from algorithms import iql
from corl import envs, evaluation, tasks
from corl.acting import eval_actor, wrap_env

TASK = tasks.task("hopper-medium-v2")


def job(seed, episodes, **fields):
    torch.manual_seed(seed)
    config = iql.TrainConfig(
        env=TASK.name, n_episodes=episodes, threads=1, compile=False, **fields
    )
    actor = iql.make_trainer(config, 11, 3, 1.0, "cpu").actor
    mean, std = np.full(11, 0.1), np.full(11, 2.0)
    numbers = range(episodes)
    return evaluation.Episodes(
        envs.make, TASK, config, mean, std, actor, 5 + seed, numbers
    )


def test_processes_play_the_episodes_that_the_run_itself_would_play():
    jobs, own = [job(seed, episodes=3) for seed in range(2)], []
    for each in jobs:
        env = wrap_env(envs.make(TASK), each.mean, each.std)
        own.append(eval_actor(env, each.actor, "cpu", 3, each.seed))
    # Two processes for each job.
    evaluators = evaluation.Evaluators(4)
    try:
        found = evaluators.evaluate(jobs)
    finally:
        evaluators.close()
    for (returns, success), (mine, share) in zip(found, own, strict=True):
        assert np.array_equal(returns, mine) and success == share
        assert len(set(mine)) == 3
    assert not np.array_equal(own[0][0], own[1][0])


def test_episodes_are_split_evenly_and_keep_their_order():
    def numbers(episodes, parts, **fields):
        return [list(part.numbers) for part in job(0, episodes, **fields).split(parts)]

    assert numbers(5, 2) == [[0, 1], [2, 3, 4]]
    assert numbers(2, 8) == [[0], [1]]
    assert numbers(3, 0) == numbers(3, 1) == [[0, 1, 2]]
    # The resets of the old stack may draw from a stream that its steps draw from.
    assert numbers(4, 2, env_backend="d4rl") == [[0, 1, 2, 3]]


def test_a_copy_of_an_actor_shares_nothing_with_it():
    (trainer,) = trainers(iql, {}, 1)
    actor = evaluation.on_the_cpu(trainer.actor)
    with torch.no_grad():
        actor.log_std += 1.0
    assert not networks(trainer)["actor.log_std"].any()
