"""ReBRAC: updates against a float64 oracle and CORL's numbers, penalties, data, settings."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import assert_equal, hard_release
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_rebrac import NETWORKS, OracleReBRAC
from test_iql import TASK, A, B, S, random_batch

from algorithms import dare_rebrac, rebrac
from corl import config as configs
from corl import tasks, training_data
from corl.data import schema, sources
from corl_dare.config import NoisyDareConfig
from corl_dare.hook import Release
from scripts import golden_corl, make_patches

MAZE = "antmaze-umaze-v2"


def make(seed=0, max_action=1.0, module=rebrac, double=True, **fields):
    """A trainer in float64, so that it can be compared to the last digits."""
    config = module.TrainConfig(env=TASK, **fields)
    torch.manual_seed(seed)
    trainer = module.make_trainer(config, S, A, max_action, "cpu")
    if double:
        for network in networks(trainer).values():
            network.double()
    return trainer, config


def batch_of(rng, dtype=torch.float64):
    next_actions = torch.tensor(rng.uniform(-1, 1, (B, A)))
    return [x.to(dtype) for x in (*random_batch(rng), next_actions)]


def draw(batch):
    """The noise of the next update; the global stream stays where it is."""
    stream = torch.get_rng_state()
    noise = torch.randn_like(batch[1])
    torch.set_rng_state(stream)
    return noise


def networks(trainer):
    targets = [f"{name}_target" for name in NETWORKS]
    return {name: getattr(trainer, name) for name in [*NETWORKS, *targets]}


def assert_same_weights(trainer, oracle, tolerance=1e-9):
    for name, network in networks(trainer).items():
        now = oracle.target if name.endswith("_target") else oracle.now
        expected = now[name.removesuffix("_target")]
        for key, value in network.state_dict().items():
            gap = (value.double() - expected[key]).abs().max().item()
            assert gap < tolerance, f"{name}.{key} is off by {gap}"


CASES = {
    "CORL's": {"actor_lr": 1e-3, "qf_lr": 1e-3},
    "seldom": {"hidden_dim": 64, "policy_freq": 3, "tau": 0.05, "normalize_q": False},
    "wide noise": {
        "hidden_dim": 64,
        "policy_noise": 0.9,
        "noise_clip": 0.6,
        "discount": 0.9,
    },
    "networks": {"hidden_dim": 32, "actor_ln": True, "actor_n_hiddens": 1},
    "no LayerNorm": {
        "hidden_dim": 64,
        "critic_ln": False,
        "critic_n_hiddens": 2,
        "qf_lr": 1e-4,
    },
}


@pytest.mark.parametrize("max_action", [1.0, 2.0])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("coefs", [(1.0, 0.5), (0.01, 0.0), (0.0, 2.0)])
def test_twenty_updates_equal_the_float64_oracle(case, coefs, max_action):
    trainer, config = make(max_action=max_action, **CASES[case])
    oracle = OracleReBRAC(trainer, config, max_action)
    trainer.actor_bc_coef, trainer.critic_bc_coef = coefs
    rng = np.random.default_rng(1)
    for update in range(20):
        batch = batch_of(rng)
        noise = draw(batch)
        logs = trainer.train(batch)
        critic_loss, q_min, actor_loss = oracle.train(batch, noise, coefs)
        assert logs["critic_loss"].item() == pytest.approx(critic_loss, rel=1e-9)
        assert logs["q_min"].item() == pytest.approx(q_min, rel=1e-8, abs=1e-12)
        assert logs["actor_bc_coef"].item() == coefs[0]
        assert logs["critic_bc_coef"].item() == coefs[1]
        learns = update % config.policy_freq == 0
        assert ("actor_loss" in logs) is ("bc_mse_policy" in logs) is learns
        if learns:
            assert logs["actor_loss"].item() == pytest.approx(actor_loss, rel=1e-8)
    assert_same_weights(trainer, oracle)


def test_float32_is_near_the_float64_oracle():
    trainer, config = make(double=False)
    oracle = OracleReBRAC(trainer, config)
    rng = np.random.default_rng(1)
    for _ in range(20):
        batch = batch_of(rng, torch.float32)
        noise = draw(batch)
        trainer.train(batch)
        oracle.train(batch, noise, (1.0, 1.0))
    # Adam moves a weight by 3e-4 where rounding gives an almost empty gradient its sign.
    assert_same_weights(trainer, oracle, 1e-4)


def test_our_updates_end_with_the_numbers_of_corls_jax_file():
    """In float64, so that nothing but the order of sums differs."""
    golden = json.loads(golden_corl.REBRAC.read_text())
    assert golden["corl"] == make_patches.COMMIT
    assert golden["command"].split(" --jax")[0] == golden_corl.COMMAND
    found = golden_corl.rebrac_cases_of(None)
    assert found.keys() == golden["cases"].keys() and len(found) == 5
    for case, parameters in golden["cases"].items():
        assert found[case].keys() == parameters.keys()
        for name, values in parameters.items():
            close = pytest.approx(values, rel=1e-6, abs=1e-7)
            assert found[case][name] == close, f"{case}: {name}"


def test_networks_start_as_upstreams():
    trainer, config = make()
    for name in NETWORKS:
        layers = [
            x for x in getattr(trainer, name).net if isinstance(x, torch.nn.Linear)
        ]
        assert len(layers) == 4
        for layer in layers[:-1]:
            bound = layer.in_features**-0.5
            assert (layer.bias == torch.tensor(0.1).double()).all()
            assert 0.98 * bound < layer.weight.abs().max() <= bound
        bound = 1e-3 if name == "actor" else 3e-3
        last = layers[-1]
        assert 0.9 * bound < last.weight.abs().max() <= bound >= last.bias.abs().max()
        assert (last.bias != 0).all()
    norms = [x for x in trainer.critic_1.net if isinstance(x, torch.nn.LayerNorm)]
    assert [x.eps for x in norms] == [1e-6] * 3
    assert_equal(trainer.actor.state_dict(), trainer.actor_target.state_dict())


def test_the_penalty_of_the_target_is_masked_by_terminals():
    trainer, _ = make()
    batch = batch_of(np.random.default_rng(0))
    _, _, r, s2, d, a2 = batch
    noise = torch.zeros_like(a2)
    free = trainer.td_target(s2, a2, r, d, noise, torch.tensor(0.0))
    bound = trainer.td_target(s2, a2, r, d, noise, torch.tensor(2.0))
    penalty = (trainer.actor_target(s2) - a2).square().sum(1).detach()
    expected = 2.0 * trainer.discount * (1 - d[:, 0]) * penalty
    torch.testing.assert_close(free - bound, expected)
    assert (expected == 0).any() and (expected > 0.1).any()


def test_an_update_is_a_function_of_its_arguments():
    batch, coefs = batch_of(np.random.default_rng(0)), torch.tensor([0.5, 0.25])
    noise, trainers = torch.randn(B, A).double(), [make()[0] for _ in range(2)]
    for seed, trainer in enumerate(trainers):
        torch.manual_seed(seed)
        stream = torch.get_rng_state()
        trainer._update(batch, noise, *coefs, True)
        assert torch.equal(stream, torch.get_rng_state())
    for name, network in networks(trainers[0]).items():
        assert_equal(network.state_dict(), networks(trainers[1])[name].state_dict())


# ---------------------------------------------------------------- the schedule online


@given(
    st.integers(0, 10**6),
    st.floats(0, 1),
    st.integers(1, 10**6),
    st.integers(0, 10**4),
)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_penalty_falls_on_a_line_to_its_end(steps, end, length, warmup):
    fields = {"env": TASK, "actor_bc_coef": 0.5, "critic_bc_coef": 0.25, "bc_end": end}
    fields["online_warmup"] = warmup
    config = rebrac.TrainConfig(**fields, online_iterations=length)
    coef, target = config.bc_coefs(steps)
    share = (length - max(steps - warmup, 0)) / length
    assert coef == pytest.approx(0.5 * max(end, share), abs=1e-12) and target == 0.0
    assert config.bc_coefs(warmup) == (0.5, 0.0)
    other = rebrac.TrainConfig(**fields, bc_anneal_steps=length, online_iterations=7)
    assert other.bc_coefs(steps) == (coef, target)
    for online, expected in {"keep": 0.5, "drop": 0.0}.items():
        made = rebrac.TrainConfig(**fields, bc_online=online, critic_bc_online="keep")
        assert made.bc_coefs(steps) == (expected, 0.25)


def test_the_schedule_is_upstreams():
    """Its formula with the step counted from the start of the run, warm-up included."""
    offline, online, warmup = 50, 40, 5
    config = rebrac.TrainConfig(
        env=TASK, actor_bc_coef=0.3, online_iterations=online, online_warmup=warmup
    )
    assert config.bc_online == "anneal"
    for i in range(offline + warmup, offline + online):
        share = max(0.5, (online + offline - i + warmup) / online)
        assert config.bc_coefs(i - offline)[0] == pytest.approx(0.3 * share)


# ---------------------------------------------------------------- data


def raw_rows(n=12):
    rng = np.random.default_rng(0)
    raw = {
        "observations": rng.normal(size=(n, S)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, A)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.zeros(n, bool),
    }
    raw["terminals"][3] = raw["timeouts"][7] = True
    return raw


def test_the_next_action_is_that_of_the_following_row():
    """D4RL's rows: the time-out and the last one are left out, a terminal is kept."""
    raw = raw_rows()
    found = schema.qlearning_dataset(raw, next_actions=True)
    rows = [i for i in range(11) if i != 7]
    np.testing.assert_array_equal(found["actions"], raw["actions"][rows])
    following = [i + 1 for i in rows]
    np.testing.assert_array_equal(found["next_actions"], raw["actions"][following])
    assert found["next_actions"].dtype == np.float32 and found["terminals"][3]
    assert "next_actions" not in schema.qlearning_dataset(raw)
    with pytest.raises(ValueError, match="next_actions are not known"):
        schema.qlearning_dataset(raw, keep_timeouts=True, next_actions=True)


@pytest.mark.parametrize("order", ["cut", "shuffled"])
def test_rows_without_a_known_next_action_are_left_out_or_refused(order, monkeypatch):
    raw, task = raw_rows(), tasks.task(TASK)
    raw["next_observations"] = np.roll(raw["observations"], -1, 0)
    origin = {"source": "file", "path": "x.hdf5", "label": "mine", "order": order}
    monkeypatch.setattr(sources, "find", lambda *args: (dict(raw), dict(origin)))
    plain = sources.resolve(task)
    assert len(plain.arrays["rewards"]) == 12
    if order == "shuffled":
        with pytest.raises(ValueError, match=r"x\.hdf5: the rows are shuffled.*action"):
            sources.resolve(task, next_actions=True)
        return
    found = sources.resolve(task, next_actions=True).arrays
    assert len(found["rewards"]) == 10
    np.testing.assert_array_equal(found["next_actions"][7], raw["actions"][9])


def test_buffers_keep_next_actions_in_memory_and_in_checkpoints():
    config = rebrac.TrainConfig(env=TASK, buffer_size=6)
    buffer = training_data.new_buffer(config, tasks.task(TASK))
    rng = np.random.default_rng(0)
    width = tasks.task(TASK)
    row = (np.zeros(width.state_dim), np.zeros(width.action_dim), 1.0)
    following = rng.uniform(-1, 1, (8, width.action_dim)).astype(np.float32)
    for action in following:
        buffer.add_transition(*row, np.zeros(width.state_dim), False, action)
    expected = torch.tensor(following[[6, 7, 2, 3, 4, 5]])
    assert torch.equal(buffer.gather(np.arange(6))[5], expected)
    other = training_data.new_buffer(config, tasks.task(TASK))
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(other.gather(np.arange(6))[5], expected)


def test_antmazes_rewards_are_multiplied_by_100():
    config = rebrac.TrainConfig(env=MAZE, normalize_reward=True)
    data = {"rewards": np.array([0.0, 1.0], np.float32)}
    args = config.REWARDS.offline(data, config.env, config, None)
    assert data["rewards"].tolist() == [0.0, 100.0]
    assert config.REWARDS.online(1.0, config.env, **args) == 100.0


# ---------------------------------------------------------------- checkpoints and settings


def test_a_checkpoint_brings_everything_back():
    trainer, _ = make()
    rng = np.random.default_rng(0)
    for _ in range(3):
        trainer.train(batch_of(rng))
    other, _ = make(seed=1)
    # A copy: optimizers would share their state.
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert_equal(other.state_dict(), trainer.state_dict())
    batch = batch_of(rng)
    for each in (trainer, other):
        torch.manual_seed(0)
        each.train(batch)
    assert_equal(other.state_dict(), trainer.state_dict())
    assert not any(p.requires_grad for p in other.actor_target.parameters())


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"bc_online": "fade"},
            "bc_online 'fade' is not one of auto, keep, drop, anneal",
        ),
        ({"critic_bc_online": "anneal"}, "critic_bc_online 'anneal' is not one of keep"),
        ({"bc_end": 1.5}, r"bc_end must lie in \[0, 1\], not 1.5"),
        ({"actor_bc_coef": -1.0}, r"actor_bc_coef must lie in \[0, inf\), not -1.0"),
        ({"actor_n_hiddens": 0}, r"actor_n_hiddens must lie in \[1, 100\], not 0"),
        ({"mixing_ratio": 0.5, "batch_size": 255}, "batch_size 255 cannot be split"),
        ({"normalize_reward": True}, f"antmaze.*env is {TASK}; set normalize_reward"),
        ({"use_calibration": True}, "use_calibration is not in this file"),
        ({"reset_opts": True}, "reset_opts is not in this file"),
    ],
)
def test_bad_settings_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        rebrac.TrainConfig(**{"env": TASK, **fields})


# A finetune file of corl-team/CORL, field by field.
UPSTREAM = """
actor_bc_coef: 0.003
actor_learning_rate: 0.0003
actor_ln: false
actor_n_hiddens: 3
batch_size: 256
critic_bc_coef: 0.002
critic_learning_rate: 0.00005
critic_ln: true
critic_n_hiddens: 3
dataset_name: antmaze-umaze-v2
eval_episodes: 100
eval_every: 50000
eval_seed: 42
expl_noise: 0.0
gamma: 0.999
group: mine
hidden_dim: 256
min_decay_coef: 0.4
mixing_ratio: 0.5
name: rebrac-finetune
noise_clip: 0.5
normalize_q: true
normalize_reward: true
normalize_states: false
num_offline_updates: 1000
num_online_updates: 2000
num_warmup_steps: 0
policy_freq: 2
policy_noise: 0.2
project: CORL
replay_buffer_size: 2000000
reset_opts: false
tau: 0.005
train_seed: 3
use_calibration: false
"""


def test_corls_finetune_yaml_files_are_read_unchanged(tmp_path, capsys):
    path = tmp_path / "umaze_v2.yaml"
    path.write_text(UPSTREAM)
    config = configs.parse_config(rebrac.TrainConfig, ["--config", str(path)])
    assert (config.env, config.seed, config.discount) == (MAZE, 3, 0.999)
    assert (config.actor_lr, config.qf_lr, config.bc_end) == (3e-4, 5e-5, 0.4)
    assert (config.offline_iterations, config.online_iterations) == (1000, 2000)
    assert (config.n_episodes, config.eval_freq, config.mixing_ratio) == (
        100,
        50000,
        0.5,
    )
    path.write_text("dataset_name: hopper-medium-v2\nnum_epochs: 1000\n")
    with pytest.raises(SystemExit):
        configs.parse_config(rebrac.TrainConfig, ["--config", str(path)])
    line = capsys.readouterr().err
    assert "num_epochs (a field of CORL's); set offline_iterations to" in line


# ---------------------------------------------------------------- DARE-ReBRAC


@pytest.mark.parametrize("coefs", [(0.5, 0.0), (0.5, 0.25)])
@pytest.mark.parametrize("soft, kept", [(False, None), (False, B // 2), (True, None)])
def test_dare_updates_equal_the_float64_oracle(soft, kept, coefs):
    """The weight multiplies the penalties of its row; the scale of Q has none."""
    trainer, config = make(module=dare_rebrac, hidden_dim=64)
    trainer.actor_bc_coef, trainer.critic_bc_coef = coefs
    oracle = OracleReBRAC(trainer, config)
    rng = np.random.default_rng(2)
    weight = hard_release(B, B // 2).weight
    for _ in range(20):
        batch = batch_of(rng)
        if soft:
            weight = torch.tensor(rng.random(B), dtype=torch.float32)
        noise = draw(batch)
        trainer.train(batch, Release(weight, kept))
        oracle.train(batch, noise, coefs, weight)
    assert_same_weights(trainer, oracle)


@pytest.mark.parametrize("critic", [0.0, 0.25])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_the_same_weight_everywhere_is_the_baseline_with_its_penalties_so(
    weight, critic
):
    """Weight 1: as they are, 0: both coefficients 0; to the last bit of float32."""
    plain, _ = make(double=False)
    released, _ = make(module=dare_rebrac, double=False)
    plain.actor_bc_coef, plain.critic_bc_coef = 0.1 * weight, critic * weight
    released.actor_bc_coef, released.critic_bc_coef = 0.1, critic
    rng = np.random.default_rng(2)
    for seed in range(6):
        batch = batch_of(rng, torch.float32)
        release = Release(torch.full((B,), weight))
        for trainer, more in ((plain, ()), (released, (release,))):
            torch.manual_seed(seed)
            trainer.train(batch, *more)
    for name, network in networks(plain).items():
        assert_equal(network.state_dict(), networks(released)[name].state_dict(), name)


@pytest.mark.parametrize(
    "noise, policy_std, expected", [(0.1, None, 0.2), (0, 0.05, 0.1)]
)
def test_the_density_is_that_of_the_clipped_noise(noise, policy_std, expected):
    block = NoisyDareConfig(policy_std=policy_std)
    fields = {"expl_noise": noise, "dare": block, "double": False}
    trainer, config = make(module=dare_rebrac, max_action=2.0, **fields)
    log_prob = dare_rebrac.hook_arguments(trainer)["policy_log_prob"]
    states = torch.randn(5, S)
    mean = trainer.actor(states)
    normal = torch.distributions.Normal(mean, expected)
    inside = normal.log_prob(mean + 0.03).sum(1)
    torch.testing.assert_close(log_prob(states, mean + 0.03), inside)


def test_dare_takes_the_place_of_the_own_release():
    on, off = NoisyDareConfig(), NoisyDareConfig(enabled=False)
    made = dare_rebrac.TrainConfig(env=TASK, dare=on)
    assert (made.bc_online, made.mixing_ratio) == ("keep", 0.5)
    assert made.bc_coefs(10**6) == (1.0, 0.0)
    kept = dare_rebrac.TrainConfig(env=TASK, dare=on, critic_bc_online="keep")
    assert kept.bc_coefs(10**6) == (1.0, 1.0)
    made = dare_rebrac.TrainConfig(env=TASK, dare=off)
    assert (made.bc_online, made.mixing_ratio) == ("anneal", None)


@pytest.mark.parametrize(
    "fields, dare, message",
    [
        ({"bc_online": "anneal"}, {}, "bc_online anneal and dare would both release"),
        ({"bc_online": "drop"}, {}, "bc_online drop and dare would both release"),
        ({}, {"policy_std": None}, "acts without noise; set dare.policy_std"),
        ({"batch_size": 255}, {}, "batch_size 255 cannot be split"),
    ],
)
def test_what_dare_cannot_have_is_refused(fields, dare, message):
    ratio = {"score": "policy_ratio", "behavior": "mixture", "guidance_scale": 0.0}
    ratio["policy_std"] = 0.1
    with pytest.raises(ValueError, match=message):
        block = NoisyDareConfig(**{**ratio, **dare})
        dare_rebrac.TrainConfig(env=TASK, dare=block, **fields)
