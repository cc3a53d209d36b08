"""Episodes of several policies that are played in processes of their own."""

import numpy as np
import torch
from test_stacked import networks, trainers

from algorithms import iql
from corl import envs, evaluation
from corl.acting import eval_actor, wrap_env


def test_processes_play_the_episodes_that_the_run_itself_would_play():
    jobs, own = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        config = iql.TrainConfig(env="hopper-medium-v2", n_episodes=2, compile=False)
        trainer = iql.make_trainer(config, 11, 3, 1.0, "cpu")
        mean, std = np.full(11, 0.1), np.full(11, 2.0)
        actor = evaluation.on_the_cpu(trainer.actor)
        jobs.append(evaluation.Episodes(config, mean, std, actor, 5 + seed))
        env = wrap_env(envs.make(config.env), mean, std)
        own.append(eval_actor(env, trainer.actor, "cpu", 2, 5 + seed))
    evaluators = evaluation.Evaluators(2)
    try:
        found = evaluators.evaluate(jobs)
    finally:
        evaluators.close()
    for (returns, success), (mine, share) in zip(found, own, strict=True):
        assert np.array_equal(returns, mine) and success == share
    assert not np.array_equal(own[0][0], own[1][0])


def test_a_copy_of_an_actor_shares_nothing_with_it():
    (trainer,) = trainers(iql, {}, 1)
    actor = evaluation.on_the_cpu(trainer.actor)
    with torch.no_grad():
        actor.log_std += 1.0
    assert not networks(trainer)["actor.log_std"].any()
