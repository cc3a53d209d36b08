"""A reader of CORL finds its names in every algorithm file, with its arguments in its order."""

import inspect

import pytest

from algorithms import (
    awac,
    baq_cal_ql,
    cal_ql,
    cfdg_iql,
    cql,
    cql_sa,
    dare_awac,
    dare_cal_ql,
    dare_cql,
    dare_cql_sa,
    dare_iql,
    dare_opt_spot,
    dare_rebrac,
    dare_spot,
    dare_td3_bc,
    edis_cal_ql,
    edis_iql,
    iql,
    opt_spot,
    opt_td3,
    rebrac,
    spot,
    td3_bc,
    td3_bc_sa,
)
from corl import compiled, finetune

IQL = [iql, dare_iql, edis_iql, cfdg_iql]
FAMILY = [cql, dare_cql, cal_ql, dare_cal_ql, edis_cal_ql, cql_sa, baq_cal_ql]
FAMILY += [dare_cql_sa]
CAL_QL = [cal_ql, dare_cal_ql, edis_cal_ql, baq_cal_ql]
OTHERS = [td3_bc, dare_td3_bc, awac, dare_awac, rebrac, dare_rebrac, spot, dare_spot]
OTHERS += [td3_bc_sa, opt_td3, opt_spot, dare_opt_spot]
ALL = [*IQL, *FAMILY, *OTHERS]
ARGUMENTS = {
    "ReplayBuffer": "state_dim action_dim buffer_size device",
    "wrap_env": "env state_mean state_std reward_scale",
    "eval_actor": "env actor device n_episodes seed",
    "compute_mean_std": "states eps",
    "normalize_states": "states mean std",
    "set_seed": "seed env",
    "set_env_seed": "env seed",
    "is_goal_reached": "reward info",
    "return_reward_range": "dataset max_episode_steps",
    "soft_update": "target source tau",
    "modify_reward": "dataset env_name max_episode_steps",
    "modify_reward_online": "reward env_name",
}
IQL_CLASSES = "Squeeze MLP GaussianPolicy DeterministicPolicy TwinQ ValueFunction"
IQL_CLASSES += " ImplicitQLearning asymmetric_l2_loss EXP_ADV_MAX"
CQL_CLASSES = "Scalar ReparameterizedTanhGaussian TanhGaussianPolicy"
CQL_CLASSES += " FullyConnectedQFunction extend_and_repeat init_module_weights"


NAMES = {
    **dict.fromkeys(IQL, IQL_CLASSES),
    **dict.fromkeys(FAMILY, CQL_CLASSES),
    **dict.fromkeys([td3_bc, dare_td3_bc], "Actor Critic TD3_BC"),
    **dict.fromkeys([awac, dare_awac], "Actor Critic AdvantageWeightedActorCritic"),
    **dict.fromkeys([rebrac, dare_rebrac], "Actor Critic ReBRAC"),
    **dict.fromkeys([spot, dare_spot], "VAE Actor Critic SPOT"),
    td3_bc_sa: "Actor Critic TD3_BC_SA",
    opt_td3: "Actor Critic OPT_TD3",
    **dict.fromkeys([opt_spot, dare_opt_spot], "VAE Actor Critic OPT_SPOT"),
}


@pytest.mark.parametrize("module", ALL)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_common_parts_are_in_every_algorithm_file(module, name):
    found = getattr(module, name)
    expected = ARGUMENTS[name].split()
    names = list(inspect.signature(found).parameters)
    assert names[: len(expected)] == expected
    if module in FAMILY and name.startswith("modify_reward"):
        assert {"reward_scale", "reward_bias"} <= set(names)
        name = name.replace("modify_reward", "modify_reward_linear")
    home = compiled if name == "soft_update" else finetune
    assert found is getattr(home, name)  # written once


@pytest.mark.parametrize("module", ALL)
def test_the_algorithms_own_parts_are_in_their_file(module):
    for name in ["TrainConfig", "TensorBatch", "train", *NAMES[module].split()]:
        assert hasattr(module, name), name
    assert hasattr(module, "ContinuousCQL") is (module in (cql, dare_cql))
    assert hasattr(module, "CalQL") is (module in CAL_QL)


@pytest.mark.parametrize("module", ALL)
def test_batches_of_two_buffers_are_mixed_by_the_same_class(module):
    assert module.MixedBuffer is finetune.MixedBuffer


@pytest.mark.parametrize("module", CAL_QL)
def test_cal_ql_has_its_returns_to_go(module):
    assert module.get_return_to_go is finetune.get_return_to_go
    assert list(inspect.signature(module.get_return_to_go).parameters)[0] == "dataset"
