"""Short runs of every algorithm on the toy: settings, the run, what it leaves behind."""

import pytest
import torch
import toy

from algorithms import (
    awac,
    baq_cal_ql,
    cfdg_iql,
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
from corl import finetune, runs
from corl_dare.config import DareConfig, LagrangeDareConfig, NoisyDareConfig
from transition_diffusion.config import CfdgConfig, EdisConfig

FIELDS = {
    "env": toy.TASK,
    "device": "cpu",
    "threads": 1,
    "compile": False,
    "offline_iterations": 400,
    "online_iterations": 600,
    "batch_size": 64,
    "actor_lr": 2e-3,
    "qf_lr": 2e-3,
    "vf_lr": 2e-3,
    "tau": 0.02,
    "beta": 10.0,
    "discount": 0.8,
    "buffer_size": 10000,
    "eval_freq": 200,
    "n_episodes": 20,
    "log_freq": 100,
}
CQL_FIELDS = {
    **{k: v for k, v in FIELDS.items() if k not in ("actor_lr", "vf_lr", "tau", "beta")},
    "offline_iterations": 200,
    "online_iterations": 300,
    "eval_freq": 100,
    "log_freq": 50,
    "batch_size": 32,
    "policy_lr": 3e-3,
    "qf_lr": 3e-3,
    "soft_target_update_rate": 0.05,
    "cql_n_actions": 2,
    "alpha_multiplier": 0.05,
    "cql_alpha": 0.3,
    "cql_alpha_online": 0.3,
}
TD3_FIELDS = {
    **{k: v for k, v in FIELDS.items() if k not in ("vf_lr", "beta")},
    "alpha": 2.5,
    "expl_noise": 0.1,
}
# One buffer, no warm-up, and a coefficient and a threshold that move within a short run.
SA_FIELDS = {
    "buffer_mode": "all",
    "online_warmup": 0,
    "trust_share": 0.5,
    "beta_lr": 1e-3,
}
SA_FIELDS |= {"n_period": 20, "beta_anneal_steps": 500}
TD3_BC_SA_FIELDS = {**TD3_FIELDS, **SA_FIELDS}
CQL_SA_FIELDS = {k: v for k, v in CQL_FIELDS.items() if k != "cql_alpha_online"}
CQL_SA_FIELDS = {**CQL_SA_FIELDS, **SA_FIELDS, "q_n_hidden_layers": 2}
SPOT_FIELDS = {
    **{k: v for k, v in TD3_FIELDS.items() if k != "alpha"},
    "normalize_reward": False,
    "online_discount": 0.8,
    "vae_iterations": 300,
    "vae_hidden_dim": 32,
    "lambd": 0.3,
    "actor_dropout": 0.05,
}
AWAC_FIELDS = {
    **{k: v for k, v in FIELDS.items() if not k.endswith("_lr") and k != "beta"},
    "seed": 0,
    "learning_rate": 2e-3,
    "hidden_dim": 64,
    "awac_lambda": 0.1,
}
REBRAC_FIELDS = {
    **{k: v for k, v in TD3_FIELDS.items() if k != "alpha"},
    "hidden_dim": 64,
    "actor_bc_coef": 0.3,
    "critic_bc_coef": 0.1,
}
PEX_FIELDS = {**FIELDS, "online_warmup": 50}
E2O_FIELDS = {
    k: v
    for k, v in CQL_FIELDS.items()
    if k not in ("alpha_multiplier", "cql_alpha_online")
}
E2O_FIELDS |= {
    "n_critics": 3,
    "hidden_dim": 32,
    "q_n_hidden_layers": 2,
    "temperature_lr": 3e-2,
    "online_warmup": 10,
}
# Small networks, few updates per step, and an entropy that leaves room for the rewards of the toy.
SAC_FIELDS = {
    **{k: v for k, v in FIELDS.items() if k not in ("vf_lr", "beta")},
    "utd": 2,
    "hidden_dim": 32,
    "n_critics": 3,
    "offline_iterations": 250,
    "online_iterations": 300,
    "online_warmup": 50,
    "init_temperature": 0.02,
    "temperature_lr": 1e-4,
}
RLPD_FIELDS = {**SAC_FIELDS, "offline_iterations": 0, "random_steps": 50}
WSRL_FIELDS = {**SAC_FIELDS, "cql_n_actions": 2, "cql_alpha": 0.3}
FAMO2O_IQL_FIELDS = {k: v for k, v in FIELDS.items() if k != "beta"}
FAMO2O_IQL_FIELDS |= {"balance_lr": 2e-3, "beta_low": 5.0, "beta_high": 20.0}
FAMO2O_CQL_FIELDS = {k: v for k, v in CQL_FIELDS.items() if k != "cql_alpha_online"}
# Its published weight is a fifth of its base's.
FAMO2O_CQL_FIELDS["cql_alpha"] = 0.1
OPT = {"online_warmup": 50, "pretrain_updates": 100, "kappa_steps": 300, "utd": 1}
OPT_TD3_FIELDS = {**TD3_FIELDS, **OPT}
OPT_SPOT_FIELDS = {k: v for k, v in SPOT_FIELDS.items() if k != "actor_dropout"} | OPT
SMALL = {"behavior_updates": 200, "behavior_batch_size": 64, "behavior_lr": 1e-3}
DARE = {
    "policy_ratio": {
        "score": "policy_ratio",
        "behavior": "mixture",
        "guidance_scale": 0.0,
    },
    "diffusion": {
        "guidance_scale": 1.0,
        "behavior_width": 0.05,
        "energy_updates": 30,
        "energy_batch_states": 16,
        "energy_update_freq": 10,
        "support_actions": 4,
        "reference_max_age": 50,
        "sampler_steps": 5,
    },
}


DEFAULTS = {
    iql: FIELDS,
    dare_iql: FIELDS,
    pex: PEX_FIELDS,
    rlpd: RLPD_FIELDS,
    wsrl: WSRL_FIELDS,
    dare_wsrl: WSRL_FIELDS,
    famo2o_iql: FAMO2O_IQL_FIELDS,
    famo2o_cql: FAMO2O_CQL_FIELDS,
    dare_famo2o_cql: FAMO2O_CQL_FIELDS,
    edis_iql: FIELDS,
    e2o: E2O_FIELDS,
    cfdg_iql: FIELDS,
    td3_bc: TD3_FIELDS,
    dare_td3_bc: TD3_FIELDS,
    td3_bc_sa: TD3_BC_SA_FIELDS,
    cql_sa: CQL_SA_FIELDS,
    dare_cql_sa: {**CQL_SA_FIELDS, "buffer_mode": "half"},
    opt_td3: OPT_TD3_FIELDS,
    opt_spot: OPT_SPOT_FIELDS,
    dare_opt_spot: OPT_SPOT_FIELDS,
    awac: AWAC_FIELDS,
    dare_awac: AWAC_FIELDS,
    spot: SPOT_FIELDS,
    dare_spot: SPOT_FIELDS,
    rebrac: REBRAC_FIELDS,
    dare_rebrac: REBRAC_FIELDS,
}


def run(module, tmp_path, monkeypatch, **fields):
    """Train on the toy; the run folder lies in `tmp_path`. Returns the summary."""
    toy.install(monkeypatch, tmp_path)
    defaults = DEFAULTS.get(module, CQL_FIELDS)
    config = module.TrainConfig(**{**defaults, "runs_dir": str(tmp_path), **fields})
    torch.manual_seed(123)  # train seeds itself
    return module.train(config)


def opened_parts(module, tmp_path, monkeypatch, **fields):
    """The parts of a run on the toy that is opened and ends before its first step."""
    parts = {}

    class Opened(Exception):
        pass

    def keep(self, name, part, loads=()):
        parts[name] = part
        return part

    def start(self, offline, online, **options):
        raise Opened

    with monkeypatch.context() as patch, pytest.raises(Opened):
        patch.setattr(finetune.Session, "keep", keep)
        patch.setattr(finetune.Session, "start", start)
        run(module, tmp_path, monkeypatch, **fields)
    return parts


def dare_block(kind, **fields):
    """The block `dare:` of a short run of DARE-IQL."""
    return dare_iql.DareIQLConfig(
        **{**SMALL, "entropy_alpha": 0.01, **DARE[kind], **fields}
    )


def cal_ql_block(**fields):
    """The block `dare:` of a short run of DARE-Cal-QL."""
    return dare_cal_ql.DareCalQLConfig(**{**SMALL, **DARE["policy_ratio"], **fields})


def cql_block(**fields):
    """The block `dare:` of a short run of DARE-CQL."""
    return dare_cql.DareCQLConfig(**{**SMALL, **DARE["policy_ratio"], **fields})


def ratio_block(**fields):
    """The block `dare:` of a short run of DARE-FamCQL or DARE-CQL(SA)."""
    return DareConfig(**{**SMALL, **DARE["policy_ratio"], **fields})


def awac_block(**fields):
    """The block `dare:` of a short run of DARE-AWAC."""
    known = {**SMALL, "entropy_alpha": 0.01, **DARE["policy_ratio"]}
    return dare_awac.DareAWACConfig(**{**known, **fields})


def noisy_block(**fields):
    """The block `dare:` of a short run of DARE-TD3+BC, DARE-ReBRAC or DARE-SPOT."""
    return NoisyDareConfig(**{**SMALL, **DARE["policy_ratio"], **fields})


def wsrl_block(**fields):
    """The block `dare:` of a short run of DARE-WSRL."""
    return LagrangeDareConfig(**{**SMALL, **DARE["policy_ratio"], **fields})


def edis_block(**fields):
    """The block `edis:` of a short run: every update draws generated rows."""
    small = {
        "refresh_every": 10,
        "samples": 60,
        "diffusion_updates": 15,
        "diffusion_batch_size": 32,
        "width": 16,
        "depth": 1,
        "sampler_steps": 5,
        "generation_batch_size": 25,
        "energy_updates": 2,
        "energy_batch_size": 8,
        "energy_levels": 3,
        "negatives": 3,
    }
    return EdisConfig(**{**small, **fields})


def baq_block(**fields):
    """The block `baq:` of a short run."""
    small = {"clone_updates": 30, "clone_batch_size": 32, "clone_lr": 1e-3}
    return baq_cal_ql.BaqConfig(**{**small, **fields})


def cfdg_block(**fields):
    """The block `cfdg:` of a short run."""
    small = {
        "refresh_every": 10,
        "samples": 60,
        "diffusion_updates": 15,
        "refresh_updates": 5,
        "diffusion_batch_size": 32,
        "width": 16,
        "depth": 1,
        "sampler_steps": 5,
        "generation_batch_size": 25,
    }
    return CfdgConfig(**{**small, **fields})


def folder_of(tmp_path):
    """The one run folder in `tmp_path`."""
    (folder,) = tmp_path.glob("*-s0-*")
    return folder


def checkpoint_of(tmp_path):
    """The last checkpoint of the one run in `tmp_path`."""
    return torch.load(folder_of(tmp_path) / "checkpoint.pt", weights_only=True)


def final_weights(tmp_path):
    """The networks in the last checkpoint of the one run in `tmp_path`."""
    state = checkpoint_of(tmp_path)
    trainer = state["parts"]["trainer"]
    parts = {k: v for k, v in trainer.items() if isinstance(v, dict)}
    return {k: v for k, v in parts.items() if "optim" not in k}


def assert_same_weights(a, b):
    """Two runs ended with the same networks, bit for bit."""
    a, b = final_weights(a), final_weights(b)
    assert a.keys() == b.keys()
    for part, state in a.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, b[part][name]), f"{part}.{name} differs"


def stop_after(stop_at, monkeypatch):
    """Runs are asked to stop in the step `stop_at`."""
    log = runs.Run.log

    def stopping(self, step, phase, metrics):
        log(self, step, phase, metrics)
        self.stop_requested = self.stop_requested or step == stop_at

    monkeypatch.setattr(runs.Run, "log", stopping)
