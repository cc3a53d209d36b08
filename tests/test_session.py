"""What a session promises: phases that read their own fields, and a switch that is made once."""

import pytest
from helpers import assert_equal
from short_runs import (
    awac_block,
    baq_block,
    cal_ql_block,
    cfdg_block,
    checkpoint_of,
    cql_block,
    dare_block,
    edis_block,
    folder_of,
    noisy_block,
    ratio_block,
    run,
    stop_after,
    wsrl_block,
)

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
    dare_famo2o_cql,
    dare_iql,
    dare_opt_spot,
    dare_rebrac,
    dare_spot,
    dare_td3_bc,
    dare_wsrl,
    e2o,
    edis_cal_ql,
    edis_iql,
    famo2o_cql,
    famo2o_iql,
    iql,
    opt_spot,
    opt_td3,
    pex,
    rebrac,
    rlpd,
    spot,
    td3_bc,
    td3_bc_sa,
    wsrl,
)
from corl import curves

pytestmark = pytest.mark.narrow(16)
SHORT = {
    "offline_iterations": 8,
    "online_iterations": 8,
    "eval_freq": 8,
    "n_episodes": 1,
    "log_freq": 1,
    "batch_size": 16,
}
PHASE = {"online_iterations": 3, "online_warmup": 2, "utd": 3}
IQL_ONLINE = {
    "mixing_ratio": 0.25,
    "actor_lr_online": 1e-2,
    "expl_noise": 0.9,
    "noise_clip": 0.1,
}
SA_ONLINE = {
    "buffer_mode": "half",
    "mixing_ratio": 0.25,
    "beta_anneal": "cosine",
    "beta_anneal_steps": 5,
    "online_trust": "all",
    "part_rows": "trusted",
    "part_trajectories": 3,
}
SPOT_ONLINE = {
    "mixing_ratio": 0.25,
    "expl_noise": 0.9,
    "lambd_cool": True,
    "lambd_end": 0.5,
    "lambd_cool_steps": 5,
    "online_discount": 0.7,
}
OPT_ONLINE = {
    "pretrain_updates": 2,
    "inner_lr": 0.1,
    "weigh_outer": False,
    "kappa_start": 0.9,
    "kappa_end": 0.1,
    "kappa_steps": 4,
    "replay": "uniform",
    "density_lr": 0.1,
    "density_temperature": 2.0,
    "priority_capacity": 5000,
    "expl_noise": 0.9,
}
PEX_ONLINE = {
    "mixing_ratio": 0.25,
    "inv_temperature": 0.5,
    "eval_epsilon": 0.9,
    "clip_actions": True,
}
E2O_ONLINE = {
    "mixing_ratio": 0.25,
    "cql_alpha_online": 2.0,
    "target_rule": "mean",
    "uncertainty_temperature": 1.0,
    "uncertainty_by": "row",
    "exploration": "policy",
    "ucb_lambda": 1.0,
}
# Fields of the online phase and other values for them.
ONLINE = {
    "iql": (iql, IQL_ONLINE),
    "dare_iql": (
        dare_iql,
        {**IQL_ONLINE, "dare": dare_block("policy_ratio", behavior_updates=3)},
    ),
    "cql": (cql, {"cql_alpha_online": 7.0, "mixing_ratio": 0.25}),
    "dare_cql": (
        dare_cql,
        {
            "cql_alpha_online": 7.0,
            "mixing_ratio": 0.25,
            "dare": cql_block(behavior_updates=3),
        },
    ),
    "td3_bc": (
        td3_bc,
        {
            "mixing_ratio": 0.25,
            "expl_noise": 0.9,
            "bc_online": "anneal",
            "bc_end": 0.2,
            "bc_anneal_steps": 5,
        },
    ),
    "dare_td3_bc": (
        dare_td3_bc,
        {
            "mixing_ratio": 0.25,
            "expl_noise": 0.9,
            "bc_online": "keep",
            "bc_end": 0.2,
            "bc_anneal_steps": 5,
            "dare": noisy_block(behavior_updates=3),
        },
    ),
    "spot": (spot, SPOT_ONLINE),
    "pex": (pex, PEX_ONLINE),
    "rlpd": (rlpd, {"mixing_ratio": 0.25, "random_steps": 3}),
    "wsrl": (
        wsrl,
        {
            "mixing_ratio": 0.25,
            "cql_alpha_online": 7.0,
            "max_target_backup_online": True,
            "zero_gradient_steps": True,
        },
    ),
    "dare_wsrl": (
        dare_wsrl,
        {
            "mixing_ratio": 0.25,
            "cql_alpha_online": 7.0,
            "max_target_backup_online": True,
            "zero_gradient_steps": True,
            "dare": wsrl_block(behavior_updates=3),
        },
    ),
    "famo2o_iql": (famo2o_iql, {"mixing_ratio": 0.25}),
    "famo2o_cql": (famo2o_cql, {"mixing_ratio": 0.25}),
    "dare_famo2o_cql": (
        dare_famo2o_cql,
        {"mixing_ratio": 0.25, "dare": ratio_block(behavior_updates=3)},
    ),
    "opt_td3": (opt_td3, OPT_ONLINE),
    "opt_spot": (
        opt_spot,
        {
            **{k: v for k, v in SPOT_ONLINE.items() if k != "mixing_ratio"},
            **OPT_ONLINE,
            "lambd_cool": False,
        },
    ),
    "dare_opt_spot": (
        dare_opt_spot,
        {
            **{**SPOT_ONLINE, **OPT_ONLINE},
            "lambd_cool": False,
            "dare": noisy_block(behavior_updates=3),
        },
    ),
    "td3_bc_sa": (
        td3_bc_sa,
        {**SA_ONLINE, "expl_noise": 0.9, "policy_freq_online": 3},
    ),
    "cql_sa": (cql_sa, SA_ONLINE),
    "dare_cql_sa": (
        dare_cql_sa,
        {**SA_ONLINE, "dare": ratio_block(behavior_updates=3)},
    ),
    "dare_spot": (
        dare_spot,
        {**SPOT_ONLINE, "lambd_cool": False, "dare": noisy_block(behavior_updates=3)},
    ),
    "awac": (awac, {"mixing_ratio": 0.25}),
    "dare_awac": (
        dare_awac,
        {"mixing_ratio": 0.25, "dare": awac_block(behavior_updates=3)},
    ),
    "rebrac": (
        rebrac,
        {
            "mixing_ratio": 0.25,
            "expl_noise": 0.9,
            "bc_online": "drop",
            "critic_bc_online": "keep",
            "bc_end": 0.2,
            "bc_anneal_steps": 5,
        },
    ),
    "dare_rebrac": (
        dare_rebrac,
        {
            "mixing_ratio": 0.25,
            "expl_noise": 0.9,
            "bc_online": "keep",
            "critic_bc_online": "keep",
            "bc_end": 0.2,
            "bc_anneal_steps": 5,
            "dare": noisy_block(behavior_updates=3),
        },
    ),
    "cal_ql": (cal_ql, {"cql_alpha_online": 7.0, "mixing_ratio": 0.25}),
    "baq_cal_ql": (
        baq_cal_ql,
        {"cql_alpha_online": 7.0, "mixing_ratio": 0.25, "baq": baq_block()},
    ),
    "e2o": (e2o, E2O_ONLINE),
    "edis_iql": (edis_iql, {**IQL_ONLINE, "edis": edis_block(samples=7)}),
    "cfdg_iql": (cfdg_iql, {**IQL_ONLINE, "cfdg": cfdg_block(samples=7)}),
    "edis_cal_ql": (
        edis_cal_ql,
        {"cql_alpha_online": 7.0, "mixing_ratio": 0.3, "edis": edis_block(samples=7)},
    ),
    "dare_cal_ql": (
        dare_cal_ql,
        {
            "cql_alpha_online": 7.0,
            "mixing_ratio": 0.25,
            "dare": cal_ql_block(behavior_updates=3, keep_calibration=True),
        },
    ),
}


SAMPLING = {
    "sampling_temperature": 3.0,
    "sampling_refresh": 5,
    "sampling_unit": "transition",
    "eval_switch": 1,
    "eval_early": "1",
}


@pytest.mark.parametrize("name", ONLINE)
def test_the_offline_phase_does_not_read_the_fields_of_the_online_phase(
    name, tmp_path, monkeypatch
):
    """So runs that differ in nothing else can share their offline model."""
    module, other = ONLINE[name]
    config = module.TrainConfig
    other = {**other, **SAMPLING, "sampling": config.CHOICES["sampling"][-1]}
    if hasattr(config, "policy_std"):
        other["policy_std"] = 0.3
    # `load_model` is how the shared model comes in.
    assert {*PHASE, *other, "load_model"} == config.ONLINE
    base = {"online_iterations": 0}
    if "dare" in other:
        base["dare"] = type(other["dare"])(enabled=False)
    if "baq" in other:
        base["baq"] = baq_block(enabled=False)
    run(module, tmp_path / "a", monkeypatch, **{**SHORT, **base})
    with monkeypatch.context() as patch:
        stop_after(SHORT["offline_iterations"], patch)
        run(module, tmp_path / "b", monkeypatch, **{**SHORT, **PHASE, **other})
    one, two = checkpoint_of(tmp_path / "a"), checkpoint_of(tmp_path / "b")
    assert one["step"] == two["step"] == 8
    assert_equal(one["parts"]["trainer"], two["parts"]["trainer"])
    assert_equal(one["rng"], two["rng"])


@pytest.mark.parametrize("module", [iql, cal_ql])
def test_bookkeeping_changes_no_result(module, tmp_path, monkeypatch):
    other = {
        "name": "other",
        "group": "G",
        "project": "P",
        "checkpoints_path": str(tmp_path / "corl"),
    }
    assert set(other) <= module.TrainConfig.BOOKKEEPING
    run(module, tmp_path / "a", monkeypatch, **SHORT)
    run(module, tmp_path / "b", monkeypatch, **SHORT, **other)
    assert [x.name for x in (tmp_path / "corl").iterdir()] != []
    one, two = checkpoint_of(tmp_path / "a"), checkpoint_of(tmp_path / "b")
    for key in ("parts", "rng", "step"):
        assert_equal(one[key], two[key], key)


@pytest.mark.parametrize("stops", [[], [3], [8], [9], [3, 8, 12]])
def test_the_switch_is_made_once_however_often_a_run_is_resumed(
    stops, tmp_path, monkeypatch
):
    """And after the last offline update, before the first online one."""
    made, updates = [], []
    start_online, train = iql.ImplicitQLearning.start_online, iql.ImplicitQLearning.train

    def counting(self, *arguments):
        made.append(self.total_it)
        return start_online(self, *arguments)

    def training(self, batch):
        updates.append(self.anneal)
        return train(self, batch)

    monkeypatch.setattr(iql.ImplicitQLearning, "start_online", counting)
    monkeypatch.setattr(iql.ImplicitQLearning, "train", training)
    resume = {}
    for stop_at in [*stops, None]:
        with monkeypatch.context() as patch:
            if stop_at is not None:
                stop_after(stop_at, patch)
            run(iql, tmp_path, monkeypatch, **SHORT, **resume)
        resume = {"resume": str(folder_of(tmp_path))}
    assert made == [8]
    assert updates == [True] * 8 + [False] * 8


def test_without_an_online_phase_nothing_is_switched(tmp_path, monkeypatch):
    run(iql, tmp_path, monkeypatch, **{**SHORT, "online_iterations": 0})
    state = checkpoint_of(tmp_path)
    assert state["run"]["switched"] is False
    assert state["parts"]["trainer"]["anneal"] is True


@pytest.mark.parametrize("warmup, utd", [(0, 1), (0, 3), (5, 2), (8, 1), (20, 1)])
def test_the_warm_up_has_environment_steps_without_updates(
    warmup, utd, tmp_path, monkeypatch
):
    """A row of metrics.csv in the warm-up has no losses; each later step has `utd` updates."""
    fields = {**SHORT, "online_warmup": warmup, "utd": utd}
    summary = run(iql, tmp_path, monkeypatch, **fields)
    steps = max(8 - warmup, 0)
    assert summary["updates"] == 8 + utd * steps
    assert summary["updates_per_second"] > 0
    state = checkpoint_of(tmp_path)
    assert state["parts"]["trainer"]["total_it"] == 8 + utd * steps
    assert len(state["parts"]["online_buffer"]["rows"][0]) == 8
    losses = curves.read_csv(folder_of(tmp_path) / "metrics.csv")["q_loss"]
    assert [text != "" for text in losses] == [True] * 8 + [
        step >= warmup for step in range(8)
    ]
