"""Numbers that stop being finite end a run in one line; the last good checkpoint is kept."""

import csv
import importlib
import json
import math

import gymnasium
import numpy as np
import pytest
import torch
from harness import FAST_DARE, algorithm, assert_refused, run, short_run

from corl import checkpoints, envs
from corl.checkpoints import export_corl, read
from corl_dare.hook import DareHook
from experiments import workers
from experiments.cells import read_state

pytestmark = pytest.mark.fault("numeric faults")

ALGORITHMS = ("iql", "cql", "cal_ql", "dare_iql", "dare_cal_ql")
whole = pytest.mark.whole


def module_of(name):
    """The module of an algorithm."""
    return importlib.import_module(f"algorithms.{name}")


def fields_of(name, **fields):
    """Settings of a short run of an algorithm; only DARE's has the block `dare`."""
    conservative = {"cql_n_actions": 2} if "ql" in name and "iql" not in name else {}
    return {**(FAST_DARE if "dare" in name else {}), **conservative, **fields}


def try_run(name, folder, dataset, **fields):
    """How a short run of an algorithm ends."""
    flags = short_run(folder, dataset, **fields_of(name, **fields))
    return run(algorithm(module_of(name)), *flags)


def folder_of(tmp_path):
    (folder,) = (tmp_path / "runs").iterdir()
    return folder


def rows_of(tmp_path, name="metrics.csv"):
    with open(folder_of(tmp_path) / name, newline="") as file:
        return list(csv.DictReader(file))


def assert_nothing_bad_was_left(tmp_path):
    """No file of the run folder says nan or inf, and its checkpoint has finite weights."""
    folder = folder_of(tmp_path)
    assert not (folder / "summary.json").exists()
    for name in ("metrics.csv", "evaluations.csv"):
        cells = (folder / name).read_text().lower().replace("\n", ",").split(",")
        assert not {"nan", "inf", "-inf"} & set(cells)
    if (folder / "checkpoint.pt").exists():
        export_corl(folder, tmp_path / "exported.pt")  # which refuses bad weights


# ---------------------------------------------------------------- learning rates


RATES = [
    *(("iql", field) for field in ("qf_lr", "vf_lr", "actor_lr")),
    *((name, field) for name in ("cql", "cal_ql") for field in ("qf_lr", "policy_lr")),
    *(("dare_iql", field) for field in ("qf_lr", "vf_lr", "actor_lr")),
    *(("dare_cal_ql", field) for field in ("qf_lr", "policy_lr")),
]
FAST_RATES = {("iql", "qf_lr"), ("cql", "qf_lr"), ("dare_cal_ql", "policy_lr")}


@pytest.mark.parametrize("rate", ["1e20", pytest.param("1e25", marks=whole)])
@pytest.mark.parametrize(
    "name, field",
    [pytest.param(*r, marks=() if r in FAST_RATES else whole) for r in RATES],
)
def test_a_learning_rate_that_blows_up_is_named(name, field, rate, good, tmp_path):
    outcome = try_run(name, tmp_path, good, **{field: rate}, online_iterations=0)
    rate = rf"{field} {float(rate):g}".replace("+", r"\+")
    # Where the very first updates diverge there is nothing to go back to.
    assert_refused(
        outcome, r"offline step (5|10):", "is (nan|-?inf|not finite)", "learning rate"
    )
    assert_refused(outcome, rate, "no checkpoint was written yet")
    assert_nothing_bad_was_left(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"log_freq": 1000, "eval_freq": 1000}, {"log_freq": 1000}, {"eval_freq": 1000}],
)
def test_no_run_is_too_short_to_notice(fields, good, tmp_path):
    fields = {"qf_lr": 1e20, "actor_lr": 1e20, "online_iterations": 0, **fields}
    assert_refused(try_run("iql", tmp_path, good, **fields), "offline step", "qf_lr")
    assert_nothing_bad_was_left(tmp_path)


@whole
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_online_phase_that_blows_up_keeps_the_offline_checkpoint(
    name, good, tmp_path, monkeypatch
):
    def spoil(trainer, call):
        for optimizer in trainer.__dict__.values():
            if call >= 12 and isinstance(optimizer, torch.optim.Optimizer):
                optimizer.param_groups[0]["lr"] = 1e30

    after_calls(monkeypatch, name, spoil)
    outcome = try_run(name, tmp_path, good, eval_freq=10, offline_iterations=10)
    assert_refused(outcome, "online step (1[0-9]|20):", r"checkpoint\.pt \(step 10\)")
    assert_nothing_bad_was_left(tmp_path)


# ---------------------------------------------------------------- metrics and weights


def after_calls(monkeypatch, name, spoil):
    """`spoil(trainer, number of the update, metrics)` follows each update of the run itself."""
    module, calls = module_of(name), []
    step, start = module.step, module.finetune.Session.start

    def counted(trainer, source, config):
        log = step(trainer, source, config)
        calls.append(1)
        return spoil(trainer, len(calls)) or log

    def begin(self, *args, **kwargs):
        start(self, *args, **kwargs)
        calls.clear()  # those of the time estimate

    monkeypatch.setattr(module, "step", counted)
    monkeypatch.setattr(module.finetune.Session, "start", begin)


def losses_of(name):
    """The metrics of an algorithm, but for those that DARE adds."""
    columns = module_of(name.removeprefix("dare_")).COLUMNS
    return [*columns, "energy_loss"] if "dare" in name else columns


# A value for each metric in turn.
METRICS = [
    (name, metric, ("nan", "inf", "-inf")[i % 3])
    for name in ALGORITHMS
    for i, metric in enumerate(losses_of(name))
]
FAST_METRICS = {
    *(("iql", "q_loss", "nan"), ("iql", "value_loss", "inf"), ("cql", "alpha", "-inf")),
    *(("dare_iql", "energy_loss", "nan"), ("cal_ql", "qf1_loss", "inf")),
}


@pytest.mark.parametrize(
    "name, metric, value",
    [
        *(pytest.param(*p, marks=whole) for p in METRICS if p not in FAST_METRICS),
        *sorted(FAST_METRICS),
    ],
)
def test_a_metric_that_is_not_finite_is_fatal(
    name, metric, value, good, tmp_path, monkeypatch
):
    def spoil(trainer, call):
        return {metric: torch.tensor(float(value))} if call == 15 else None

    after_calls(monkeypatch, name, spoil)
    outcome = try_run(name, tmp_path, good, offline_iterations=20, online_iterations=0)
    assert_refused(
        outcome, rf"step 15: {metric} is {value}:", r"checkpoint\.pt \(step 10\)"
    )
    assert [r["step"] for r in rows_of(tmp_path)] == ["5", "10"]
    assert_nothing_bad_was_left(tmp_path)


def test_a_metric_that_comes_from_every_row_as_infinite_is_fatal_at_once(
    good, tmp_path, monkeypatch
):
    after_calls(monkeypatch, "iql", lambda t, call: {"q_loss": torch.tensor(math.inf)})
    outcome = try_run("iql", tmp_path, good, log_freq=1)
    assert_refused(outcome, "offline step 1: q_loss is inf", "no checkpoint")


PARTS = {
    "iql": ("qf", "vf", "actor", "q_target", "q_optimizer", "actor_optimizer"),
    "cql": ("critic_1", "target_critic_2", "actor", "log_alpha", "critic_1_optimizer"),
    "cal_ql": ("critic_2", "target_critic_1", "actor", "alpha_optimizer"),
    "dare_iql": ("qf", "vf", "actor", "q_target", "v_optimizer"),
    "dare_cal_ql": ("critic_1", "actor", "log_alpha", "actor_optimizer"),
}
FAST_PARTS = {
    *(("iql", "q_target"), ("iql", "q_optimizer"), ("cql", "log_alpha")),
    *(("cal_ql", "target_critic_1"), ("dare_iql", "actor"), ("dare_cal_ql", "critic_1")),
}


@torch.no_grad()
def put(value, part):
    """Make one number of a network, or of an optimizer's moments, this value."""
    if isinstance(part, torch.optim.Optimizer):
        tensors = [s["exp_avg_sq"] for s in part.state.values()]
    else:
        tensors = list(part.parameters())
    tensors[-1].reshape(-1)[-1] = value


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=whole)])
@pytest.mark.parametrize(
    "name, part",
    [
        pytest.param(n, p, marks=() if (n, p) in FAST_PARTS else whole)
        for n, parts in PARTS.items()
        for p in parts
    ],
)
def test_a_weight_that_is_not_finite_is_never_saved(
    name, part, value, good, tmp_path, monkeypatch
):
    """It appears in the last update before a save, so that no loss has seen it."""

    def spoil(trainer, call):
        if call == 20:
            put(value, getattr(trainer, part))

    after_calls(monkeypatch, name, spoil)
    fields = {"offline_iterations": 30, "checkpoints_path": tmp_path / "corl"}
    outcome = try_run(name, tmp_path, good, **fields)
    assert_refused(
        outcome,
        rf"offline step 20: trainer\.{part}\S* is not finite: .*learning rate",
        r"the last good checkpoint is \S+checkpoint\.pt \(step 10\)",
    )
    assert read(folder_of(tmp_path) / "checkpoint.pt")["step"] == 10
    assert [p.name for p in (tmp_path / "corl").iterdir()] == ["checkpoint_9.pt"]
    assert len(rows_of(tmp_path, "evaluations.csv")) == 1
    assert_nothing_bad_was_left(tmp_path)


# ---------------------------------------------------------------- environments


class Faulty(gymnasium.Wrapper):
    """An environment whose observation or reward is a value, from a step on (0: the reset)."""

    def __init__(self, env, what, value, at):
        super().__init__(env)
        self.what, self.value, self.at, self.count = what, float(value), at, 0

    def spoiled(self, observation):
        if self.what == "observation" and self.count >= self.at:
            observation = observation.copy()
            observation[3] = self.value
        return observation

    def reset(self, **options):
        observation, info = self.env.reset(**options)
        return self.spoiled(observation), info

    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        self.count += 1
        if self.what == "reward" and self.count >= self.at:
            reward = self.value
        return self.spoiled(observation), reward, *rest


def install(monkeypatch, role, what, value, at):
    """Every environment of this role is faulty; the first one of a run is the training's."""
    make, made = envs.make, []

    def making(*args, **kwargs):
        made.append(1)
        env = make(*args, **kwargs)
        own = "training" if len(made) % 2 else "evaluation"
        return Faulty(env, what, value, at) if own == role else env

    monkeypatch.setattr(envs, "make", making)


ENVIRONMENTS = [
    (name, role, what, value, at)
    for name in ALGORITHMS
    for role in ("training", "evaluation")
    for what in ("reward", "observation")
    for value in (("nan", "inf", "-inf", "1e30") if name == "iql" else ("nan", "-1e30"))
    for at in ((0, 3) if what == "observation" else (1, 3))
]
FAST_ENVIRONMENTS = {
    ("iql", "training", "reward", "nan", 3),
    ("cql", "training", "observation", "-1e30", 3),
    ("iql", "training", "reward", "1e30", 1),
    ("dare_iql", "training", "observation", "nan", 0),
    ("iql", "evaluation", "reward", "-inf", 3),
    ("cal_ql", "evaluation", "reward", "nan", 3),
    ("iql", "evaluation", "observation", "nan", 3),
}


@pytest.mark.parametrize(
    "name, role, what, value, at",
    [
        pytest.param(*e, marks=() if e in FAST_ENVIRONMENTS else whole)
        for e in ENVIRONMENTS
    ],
)
def test_a_bad_value_of_an_environment_is_named(
    name, role, what, value, at, good, tmp_path, monkeypatch
):
    install(monkeypatch, role, what, value, at)
    outcome = try_run(name, tmp_path, good, eval_freq=5)
    shown = f"{float(value):g}".replace("+", r"\+")
    assert_refused(
        outcome, f"the {role} environment hopper-medium-v2 gave the {what} {shown}"
    )
    if at and role == "training":
        assert_refused(outcome, "online step", r"checkpoint\.pt \(step 10\)")
    if at:
        assert_refused(outcome, "in step [0-9]+ of its episode")
        assert_nothing_bad_was_left(tmp_path)


@pytest.mark.parametrize(
    "name", ["iql", *(pytest.param(n, marks=whole) for n in ALGORITHMS[1:])]
)
def test_an_action_that_is_not_finite_does_not_reach_the_environment(
    name, good, tmp_path, monkeypatch
):
    def spoil(trainer, call):
        trainer.actor.act = lambda state, device: np.full(3, math.nan)

    after_calls(monkeypatch, name, spoil)
    outcome = try_run(name, tmp_path, good)
    assert_refused(outcome, "action in the evaluation environment", "offline step 10")


@pytest.mark.parametrize("returns", [math.nan, math.inf, -math.inf])
def test_returns_and_scores_of_evaluations_are_finite(
    returns, good, tmp_path, monkeypatch
):
    from corl import acting

    answer = np.array([1.0, returns]), 0.0
    monkeypatch.setattr(acting, "eval_actor", lambda *args: answer)
    outcome = try_run("iql", tmp_path, good)
    assert_refused(outcome, f"return of evaluation episode 1 is {returns}", "step 10")
    assert rows_of(tmp_path, "evaluations.csv") == []


# ---------------------------------------------------------------- models that are loaded


def spoiled_checkpoint(path, out, part="qf", value=math.nan):
    """A checkpoint.pt with one bad weight."""
    state = read(path)
    weights = state["parts"]["trainer"][part]
    next(iter(weights.values())).reshape(-1)[0] = value
    torch.save(state, out)


@pytest.fixture(scope="module")
def finished(good, tmp_path_factory):
    """A finished run folder of IQL."""
    folder = tmp_path_factory.mktemp("finished")
    outcome = try_run("iql", folder, good, online_iterations=0)
    assert outcome.status == 0, outcome
    return folder_of(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["qf", "vf", "actor"])
def test_a_model_with_bad_weights_is_not_loaded(part, value, finished, good, tmp_path):
    bad = tmp_path / "bad.pt"
    spoiled_checkpoint(finished / "checkpoint.pt", bad, part, value)
    outcome = try_run("iql", tmp_path, good, load_model=bad)
    assert_refused(outcome, "load_model", "bad.pt", rf"trainer\.{part}", "not finite")


def test_bad_weights_are_not_exported_and_not_gone_on_with(finished, good, tmp_path):
    spoiled_checkpoint(finished / "checkpoint.pt", tmp_path / "checkpoint.pt")
    outcome = run(checkpoints.command_line, "export", tmp_path, "--to", "corl")
    assert_refused(outcome, "checkpoint.pt", r"qf\.q1\S* is not finite")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    for name in ("config.yaml", "metrics.csv", "evaluations.csv"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    command = algorithm(module_of("iql"))
    outcome = run(command, "--resume", tmp_path, "--online_iterations", 10)
    assert_refused(outcome, r"checkpoint\.pt is of a run that diverged: its trainer.qf")
    assert "last good" not in outcome.err


def test_a_cell_whose_model_is_not_finite_has_failed(finished, tmp_path):
    for name in ("summary.json", "checkpoint.pt"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_bytes((finished / name).read_bytes())
    about = {"is_model": True, "offline": None}
    spoiled_checkpoint(finished / "checkpoint.pt", tmp_path / "run" / "checkpoint.pt")
    outcome = run(lambda argv: workers.conclude(tmp_path, about))
    assert_refused(outcome, "checkpoint.pt", "not finite")
    assert not (tmp_path / "model.pt").exists() and read_state(tmp_path) == {}
    summary = json.loads((finished / "summary.json").read_text())
    summary["score_offline"] = math.nan
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    outcome = run(lambda argv: workers.conclude(tmp_path, about))
    assert_refused(outcome, "summary.json: score_offline is nan")
    (tmp_path / "state.json").write_text('{"state": "done", "score": NaN}')
    assert read_state(tmp_path)["state"] == "failed"


# ---------------------------------------------------------------- behavior and energy


@pytest.mark.parametrize("kind", ["mixture", "diffusion", "gaussian"])
@pytest.mark.parametrize(
    "lr, updates", [(1e30, 5), pytest.param(1e30, 300, marks=whole)]
)
def test_a_behavior_model_that_diverges_is_not_kept(kind, lr, updates, good, tmp_path):
    fields = {"dare.behavior": kind, "dare.behavior_lr": lr}
    if kind == "diffusion":
        fields |= {"dare.score": "reference", "dare.behavior_width": 0.05}
    outcome = try_run(
        "dare_iql", tmp_path, good, **fields, **{"dare.behavior_updates": updates}
    )
    assert_refused(outcome, "behavior", "(nan|inf|not finite)", r"lr \(1e\+30\)")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.unfinished"))


GUIDED = {
    "dare.behavior": "diffusion",
    "dare.score": "reference",
    "dare.behavior_width": 0.05,
    "dare.guidance_scale": 1.0,
    "dare.sampler_steps": 2,
    "dare.support_actions": 2,
    "dare.energy_batch_states": 8,
    "dare.energy_updates": 10,
}


@pytest.mark.parametrize("name", ["dare_iql", pytest.param("dare_cal_ql", marks=whole)])
def test_an_energy_that_diverges_is_named(name, good, tmp_path):
    outcome = try_run(name, tmp_path, good, **GUIDED, **{"dare.energy_lr": 1e30})
    assert_refused(
        outcome,
        "energy_loss is (nan|inf) after 10 energy updates",
        r"dare.energy_lr 1e\+30",
        r"checkpoint\.pt \(step 10\)",
    )
    assert_nothing_bad_was_left(tmp_path)


@pytest.mark.parametrize("name", ["dare_iql", pytest.param("dare_cal_ql", marks=whole)])
def test_refused_exchanges_are_counted_and_their_scores_left_blank(
    name, good, tmp_path, monkeypatch
):
    """Scores of every second batch are not finite: that batch is learned from as it was drawn."""
    score = DareHook.score

    def spoiled(self, states, actions, rows):
        scores, log = score(self, states, actions, rows)
        if self.samples % 2 == 0:
            scores = scores.clone()
            scores[3] = math.inf
        return scores, log

    monkeypatch.setattr(DareHook, "score", spoiled)
    outcome = try_run(name, tmp_path, good, log_freq=1)
    assert outcome.status == 0, outcome
    rows = [r for r in rows_of(tmp_path) if r["phase"] == "online"]
    assert [int(float(r["refused"])) for r in rows] == [i // 2 for i in range(1, 11)]
    for i, row in enumerate(rows, 1):
        blank = row["separation_point"] == "" and row["score_off_mean"] == ""
        assert blank == (i % 2 == 0)
        assert float(row["exchanged"]) == 0 or i % 2
        assert "nan" not in row.values() and "inf" not in row.values()
    summary = json.loads((folder_of(tmp_path) / "summary.json").read_text())
    assert math.isfinite(summary["exchanges_mean"])


# ---------------------------------------------------------------- all as it should be


@pytest.mark.parametrize("rate", ["1e-30", "3e-4"])
def test_a_policy_that_stands_still_is_said_to(rate, good, tmp_path):
    """The run goes on: its numbers are finite."""
    fields = {"actor_lr": rate, "eval_freq": 5, "online_iterations": 0}
    outcome = try_run("iql", tmp_path, good, **fields)
    assert outcome.status == 0, outcome
    warned = "step 10: the returns equal those of the last evaluation" in outcome.out
    assert warned == (rate == "1e-30")
    assert ("stopped learning" in outcome.out) == warned


@pytest.mark.parametrize("name", [pytest.param(n, marks=whole) for n in ALGORITHMS])
def test_a_good_run_has_no_number_that_is_not_finite(name, good, tmp_path):
    outcome = try_run(name, tmp_path, good, log_freq=1)
    assert outcome.status == 0, outcome

    def refuse(constant):
        raise AssertionError(constant)

    text = (folder_of(tmp_path) / "summary.json").read_text()
    json.loads(text, parse_constant=refuse)
    for row in rows_of(tmp_path):
        values = [v for k, v in row.items() if k != "phase" and v != ""]
        assert all(math.isfinite(float(v)) for v in values)


def test_an_old_run_whose_metrics_lack_the_new_column_goes_on(good, tmp_path):
    assert try_run("dare_iql", tmp_path, good).status == 0
    folder = folder_of(tmp_path)
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name != "refused"]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    # Checkpoints of older versions did not know the tables either.
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    del state["tables"]
    torch.save(state, folder / "checkpoint.pt")
    command = algorithm(module_of("dare_iql"))
    outcome = run(command, "--resume", folder, "--online_iterations", 20)
    assert outcome.status == 0, outcome
    assert list(rows_of(tmp_path)[-1]) == names
