"""What the guides ask, checked: import walls, twins, configs, Makefile, README commands."""

import ast
import dataclasses
import difflib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
from corl.config import parse_config
from corl.tasks import ANTMAZES, KINDS

ROOT = Path(__file__).parent.parent
# Room -> packages of ours that it may import.
WALLS = {
    "corl_dare": {"corl_dare"},
    "corl": {"corl"},
    "transition_diffusion": {"transition_diffusion"},
    "adaptive_regularization": {"adaptive_regularization"},
    "policy_family": {"policy_family"},
    "online_pretraining": {"online_pretraining"},
    "algorithms": {
        "corl",
        "corl_dare",
        "transition_diffusion",
        "adaptive_regularization",
        "policy_family",
        "online_pretraining",
    },
    "experiments": {"corl", "experiments"},
}
OURS = {
    "corl",
    "corl_dare",
    "adaptive_regularization",
    "online_pretraining",
    "policy_family",
    "transition_diffusion",
    "algorithms",
    "experiments",
    "benchmarks",
    "scripts",
    "tests",
}
# The one file that rebuilds a hook from a run folder.
KNOWS_THE_PLUGIN = "experiments/snapshot.py"
# Third parties of the plugin. `corl_dare/exchange.py` and `guidance.py` need torch alone.
ALONE = {"torch", "numpy", "safetensors", "tqdm"}
# Lines of a baseline that another file of it has otherwise.
REMOVED = {
    "iql.py": ['    name: str = "IQL"  # first part of the run folder\'s name'],
    "cal_ql.py": ['    name: str = "Cal-QL"  # first part of the run folder\'s name'],
    "cql.py": ['    name: str = "CQL"  # first part of the run folder\'s name'],
    "awac.py": ['    name: str = "AWAC"  # first part of the run folder\'s name'],
    "td3_bc.py": ['    name: str = "TD3_BC"  # first part of the run folder\'s name'],
    "rebrac.py": ['    name: str = "ReBRAC"  # first part of the run folder\'s name'],
    "spot.py": ['    name: str = "SPOT"  # first part of the run folder\'s name'],
    "wsrl.py": ['    name: str = "WSRL"  # first part of the run folder\'s name'],
    "famo2o_cql.py": [
        '    name: str = "FamCQL"  # first part of the run folder\'s name'
    ],
    "cql_sa.py": ['    name: str = "CQL_SA"  # first part of the run folder\'s name'],
    "opt_spot.py": [
        'BASELINE = "spot"',
        '    name: str = "OPT_SPOT"  # first part of the run folder\'s name',
    ],
}
# The most lines that another file of a baseline may insert; 175 where nothing stands here.
INSERTED = {
    **{"dare_td3_bc.py": 60, "dare_rebrac.py": 60, "dare_spot.py": 60},
    **{"dare_awac.py": 100, "dare_wsrl.py": 85, "edis_iql.py": 95, "edis_cal_ql.py": 75},
    **{"baq_cal_ql.py": 265, "cfdg_iql.py": 70, "dare_opt_spot.py": 100},
    **{"dare_famo2o_cql.py": 80, "dare_cql_sa.py": 85},
}
# Files that are a baseline plus lines.
TWINS = sorted(
    p.name
    for method in ("dare", "edis", "baq", "cfdg")
    for p in ROOT.glob(f"algorithms/{method}_*.py")
)
CONFIGS = sorted(ROOT.glob("configs/*/*.yaml"))
READERS = {  # folder of configs -> the files that read them
    "iql": (iql, dare_iql),
    "pex": (pex,),
    "cql": (cql, dare_cql),
    "cal_ql": (cal_ql, dare_cal_ql, baq_cal_ql),
    "td3_bc": (td3_bc, dare_td3_bc),
    "awac": (awac, dare_awac),
    "rebrac": (rebrac, dare_rebrac),
    "spot": (spot, dare_spot),
    "e2o": (e2o,),
    "edis_iql": (edis_iql,),
    "edis_cal_ql": (edis_cal_ql,),
    "cfdg_iql": (cfdg_iql,),
    "td3_bc_sa": (td3_bc_sa,),
    "cql_sa": (cql_sa, dare_cql_sa),
    "rlpd": (rlpd,),
    "wsrl": (wsrl, dare_wsrl),
    "famo2o_iql": (famo2o_iql,),
    "famo2o_cql": (famo2o_cql, dare_famo2o_cql),
    "opt_td3": (opt_td3,),
    "opt_spot": (opt_spot, dare_opt_spot),
}
TABLE_1 = [
    *(f"{r}-{k}-v2" for r in ("halfcheetah", "hopper", "walker2d") for k in KINDS[1:4]),
    *(f"antmaze-{k}-v2" for k in ANTMAZES[:4]),
]
# The tasks of papers that report others.
REPORTED = {
    "cfdg_iql": [t for t in TABLE_1 if "umaze" not in t],
    **dict.fromkeys(("e2o", "famo2o_cql"), [t for t in TABLE_1 if "maze" not in t]),
    "opt_td3": [
        f"{r}-{k}-v2" for r in ("halfcheetah", "hopper", "walker2d") for k in KINDS[:3]
    ],
    "opt_spot": [f"antmaze-{k}-v2" for k in ANTMAZES],
}


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def files_of(room):
    """The source files of a room; stubs of old commands are not part of it."""
    paths = sorted((ROOT / room).rglob("*.py"))
    return [p for p in paths if "raise SystemExit" not in p.read_text()[:400]]


@pytest.mark.parametrize("room", WALLS)
def test_imports_stay_inside_the_walls(room):
    found = files_of(room)
    assert len(found) > 3
    for path in found:
        allowed = set(WALLS[room])
        if path == ROOT / KNOWS_THE_PLUGIN:
            allowed.add("corl_dare")
        for name in imports(path):
            package = name.split(".")[0]
            assert package not in OURS - allowed, f"{path} imports {name}"


def test_a_baseline_knows_nothing_of_the_plugin():
    for path in files_of("algorithms"):
        if not path.stem.startswith("dare_"):
            assert not any(n.startswith("corl_dare") for n in imports(path)), path


def test_the_host_says_no_word_of_the_method():
    for path in files_of("corl"):
        text = path.read_text().lower().replace("corl_dare", "").replace("corl-dare", "")
        words = re.findall(r"\b(dare|exchanged|separation_point|alignment)\b", text)
        assert not words, f"{path}: {words}"


def test_the_plugin_needs_only_well_kept_libraries():
    for path in files_of("corl_dare"):
        found = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names)
        alone = {"torch"} if path.stem in ("exchange", "guidance") else ALONE
        assert found - {"corl_dare"} <= alone, path
    for room in ("transition_diffusion", "policy_family"):
        for path in files_of(room):
            found = {n.split(".")[0] for n in imports(path)} - set(
                sys.stdlib_module_names
            )
            assert found - {room} <= {"torch", "numpy"}, path


def run_blocked(blocked, program, cwd=ROOT):
    """Run a program in which a package of ours cannot be imported."""
    blocker = f"import sys; sys.modules[{blocked!r}] = None\n"
    return subprocess.run(
        [sys.executable, "-c", blocker + program],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_the_plugin_imports_and_exchanges_with_the_host_blocked():
    done = run_blocked(
        "corl",
        """
import numpy as np, pkgutil, importlib, torch, corl_dare
for module in pkgutil.iter_modules(corl_dare.__path__):
    if module.name not in "collect d4rl_shim datasets report runs sac sweep".split():
        importlib.import_module(f"corl_dare.{module.name}")
from corl_dare.config import DareConfig
from corl_dare.hook import prepare

class Buffer:
    def __init__(self, shift):
        self.states = torch.randn(200, 2)
        self.actions = 0.3 * self.states[:, :1] + shift + 0.1 * torch.randn(200, 1)
    def sample(self, n):
        rows = torch.randint(200, (n,))
        return [self.states[rows], self.actions[rows]]

torch.manual_seed(0)
offline, online = Buffer(0.0), Buffer(0.5)
config = DareConfig(score="likelihood", behavior="gaussian", guidance_scale=0.0,
                    behavior_updates=50, behavior_batch_size=64)
hook = prepare(config, offline, online, dataset_hash="toy", cache_dir="cache",
               states=offline.states, actions=offline.actions)
drawn = hook.sample(64)
assert drawn.release.kept == 32 and drawn.log["exchanged"] >= 0
print("exchanged")
""",
    )
    assert done.stdout.splitlines()[-1:] == ["exchanged"], done.stderr


def test_every_baseline_trains_with_the_plugin_blocked(tmp_path):
    small = "--env hopper-random-v2 --dataset_rows 1500 --offline_iterations 3 "
    small += "--online_iterations 3 --eval_freq 3 --n_episodes 1 --batch_size 8 "
    small += "--dataset_source self-collected --device cpu --buffer_size 2000 "
    small += "--threads 1 --compile false --online_warmup 0 --utd 1"
    # What else must be made small.
    more = {
        "spot": "--vae_iterations 2",
        "opt_td3": "--pretrain_updates 0",
        "opt_spot": "--pretrain_updates 0 --vae_iterations 2",
    }
    paths = files_of("algorithms")
    baselines = [path.stem for path in paths if path.name not in TWINS]
    assert {"iql", "spot", "pex", "cql_sa"} <= set(baselines)
    settings = {name: f"{small} {more.get(name, '')}".split() for name in baselines}
    # One process for all: most of the time goes into importing torch and MuJoCo.
    program = f"""
import importlib, os
os.environ["CORL_DARE_CACHE"] = {str(tmp_path / "cache")!r}
from corl import curves, finetune
from corl.config import parse_config
curves.plot_curves = lambda *drawing: None
finetune.Session._estimate = lambda *updates: {{}}
for name, arguments in {settings!r}.items():
    algorithm = importlib.import_module(f"algorithms.{{name}}")
    arguments += ["--runs_dir", {str(tmp_path / "runs")!r}]
    summary = algorithm.train(parse_config(algorithm.TrainConfig, arguments))
    assert summary["updates"] == 6 and "exchanges_mean" not in summary, name
    print("trained", name)
"""
    done = run_blocked("corl_dare", program, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr
    trained = re.findall(r"^trained (.*)", done.stdout, re.MULTILINE)
    assert trained == baselines


def test_without_its_run_folder_the_host_is_found_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "algorithms" / "iql.py"), "--help"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--iql_tau" in done.stdout, done.stderr


def base_of(name):
    return importlib.import_module(f"algorithms.{name.removesuffix('.py')}").BASELINE


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_its_baseline_plus_lines(name):
    base = f"{base_of(name)}.py"
    baseline = (ROOT / "algorithms" / base).read_text().splitlines()
    variant = (ROOT / "algorithms" / name).read_text().splitlines()
    matcher = difflib.SequenceMatcher(None, baseline, variant, autojunk=False)
    removed = [
        line
        for tag, i1, i2, _, _ in matcher.get_opcodes()
        if tag != "equal"
        for line in baseline[i1:i2]
    ]
    # A method with configs of its own has a quick start of its own.
    own = [line for line in removed if "QUICK_START" in line] * (
        not name.startswith("dare")
    )
    assert removed == REMOVED[base] + own and len(removed) <= 8
    inserted = len(variant) - len(baseline) + len(removed)
    assert inserted <= INSERTED.get(name, 175)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_names_its_baseline(name):
    assert base_of(name) == name.removesuffix(".py").split("_", 1)[1]


@pytest.mark.parametrize("algorithm", READERS)
def test_every_dataset_of_the_papers_table_has_a_config(algorithm):
    paths = [p for p in CONFIGS if p.parent.name == algorithm]
    tasks = {yaml.safe_load(p.read_text())["env"] for p in paths}
    assert set(REPORTED.get(algorithm, TABLE_1)) <= tasks and len(TABLE_1) == 13


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_config_is_read_by_its_files_and_sorted(path):
    values = yaml.safe_load(path.read_text())
    assert list(values) == sorted(values)
    assert list(values.get("dare", {})) == sorted(values.get("dare", {}))
    for module in READERS[path.parent.name]:
        config = parse_config(module.TrainConfig, ["--config", str(path)])
        assert config.env == values["env"]
        if module is dare_iql:
            assert config.mixing_ratio == 0.5
        if module is iql:
            assert config.mixing_ratio is None
    if path.stem != "quick_start":
        # WSRL can start from models of other files.
        stem = path.stem.removeprefix("two_critics_")
        assert stem.replace("_", "-") == values["env"].removesuffix("-v2")


def test_git_ignores_nothing_that_docs_or_pages_rest_on():
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard"]
    folders = ["results", "configs", "sweeps", "patches", "docs", "corl/standin/weights"]
    made = subprocess.run(
        [*command, *folders], cwd=ROOT, capture_output=True, check=True
    )
    assert made.stdout.decode() == ""


def read_config(module, name):
    path = ROOT / "configs" / f"{name}.yaml"
    return parse_config(module.TrainConfig, ["--config", str(path)])


@pytest.mark.parametrize(
    "module",
    sorted({m for ms in READERS.values() for m in ms}, key=lambda m: m.__name__),
)
def test_the_quick_start_that_a_long_run_names_is_there(module):
    assert (ROOT / module.TrainConfig.QUICK_START) in CONFIGS


@pytest.mark.parametrize(
    "algorithm", ["iql", "cal_ql", "cql", "cql_sa", "td3_bc", "awac", "wsrl"]
)
def test_the_papers_guidance_scales_stand_in_the_configs(algorithm):
    """Table 7."""
    scale = {
        p.stem: yaml.safe_load(p.read_text())["dare"].get("guidance_scale")
        for p in CONFIGS
        if p.parent.name == algorithm
    }
    assert scale["hopper_medium"] == 8 and scale["walker2d_medium"] == 10
    assert scale["hopper_medium_expert"] == 2 and scale["antmaze_umaze_diverse"] == 1


def test_the_papers_iql_values_stand_in_the_configs():
    """Table 5."""
    maze = read_config(dare_iql, "iql/antmaze_umaze")
    assert (maze.iql_tau, maze.beta, maze.dare.entropy_alpha) == (0.9, 10.0, 0.01)
    assert (maze.offline_iterations, maze.online_iterations) == (1_000_000, 200_000)
    assert maze.normalize_reward and maze.dare.cap is None


@pytest.mark.parametrize(
    "path",
    [p for p in CONFIGS if p.parent.name in ("pex", "cfdg_iql")],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_methods_on_iql_share_its_offline_settings(path):
    (module,) = READERS[path.parent.name]
    ours = read_config(module, f"{path.parent.name}/{path.stem}")
    theirs = read_config(iql, f"iql/{path.stem}")
    unread = iql.TrainConfig.ONLINE | iql.TrainConfig.BOOKKEEPING
    for field in dataclasses.fields(iql.TrainConfig):
        if hasattr(ours, field.name) and field.name not in unread:
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    if module is pex and path.stem != "quick_start":
        found = ours.inv_temperature, ours.mixing_ratio, ours.online_warmup
        assert found == (10.0, 0.5, 5000)


def test_the_papers_cql_values_stand_in_the_configs():
    """Table 4."""
    hopper = read_config(dare_cal_ql, "cal_ql/hopper_medium")
    maze = read_config(cql, "cql/antmaze_umaze")
    assert hopper.dare.cap == 32 and hopper.policy_lr == maze.policy_lr == 1e-4
    assert (hopper.cql_alpha, maze.cql_alpha, maze.cql_alpha_online) == (10, 5, 5)
    assert (hopper.q_n_hidden_layers, maze.q_n_hidden_layers) == (3, 5)
    assert (maze.reward_scale, maze.reward_bias, maze.cql_target_action_gap) == (
        10,
        -5,
        0.8,
    )
    assert hopper.cql_clip_diff_min == maze.cql_clip_diff_min == -200
    assert maze.cql_lagrange and maze.cql_max_target_backup and not maze.normalize
    assert hopper.normalize and not hopper.normalize_reward and not hopper.cql_lagrange
    assert read_config(cal_ql, "cal_ql/antmaze_umaze").is_sparse_reward


def test_corls_values_of_td3_bc_and_awac_stand_in_the_configs():
    for path in CONFIGS:
        if path.parent.name not in ("td3_bc", "awac") or path.stem == "quick_start":
            continue
        module = READERS[path.parent.name][0]
        config = parse_config(module.TrainConfig, ["--config", str(path)])
        maze = config.env.startswith("antmaze")
        assert config.normalize and config.normalize_reward is maze
        assert (config.offline_iterations, config.online_iterations) == (10**6, 200_000)
        if path.parent.name == "awac":
            assert config.awac_lambda == (0.1 if maze else 0.3333)
        else:
            assert (config.alpha, config.policy_freq) == (2.5, 2)
            assert (config.bc_online, config.expl_noise) == ("keep", 0.1)


REBRAC = {  # coefficients of CORL's files
    **{"halfcheetah_medium": (0.001, 0.01), "halfcheetah_medium_replay": (0.01, 0.001)},
    **{"halfcheetah_medium_expert": (0.01, 0.1), "hopper_medium": (0.01, 0.01)},
    **{"hopper_medium_replay": (0.05, 0.5), "hopper_medium_expert": (0.1, 0.01)},
    **{"walker2d_medium": (0.05, 0.1), "walker2d_medium_replay": (0.05, 0.01)},
    **{"walker2d_medium_expert": (0.01, 0.01), "antmaze_umaze": (0.003, 0.002)},
    **{"antmaze_umaze_diverse": (0.003, 0.001), "antmaze_medium_play": (0.001, 0.0005)},
    "antmaze_medium_diverse": (0.001, 0.0),
}


def test_corls_values_of_rebrac_stand_in_the_configs():
    for name, coefs in REBRAC.items():
        config = read_config(rebrac, f"rebrac/{name}")
        maze = name.startswith("antmaze")
        assert (config.actor_bc_coef, config.critic_bc_coef) == coefs
        assert (config.actor_lr, config.qf_lr) == (
            (3e-4, 5e-5) if maze else (1e-3, 1e-3)
        )
        assert (config.batch_size, config.discount) == (
            (256, 0.999) if maze else (1024, 0.99)
        )
        assert config.normalize_reward is maze and not config.normalize
        assert (config.mixing_ratio, config.bc_online, config.bc_end) == (
            0.5,
            "anneal",
            0.5,
        )
        assert (config.offline_iterations, config.online_iterations) == (10**6, 200_000)
        twin = read_config(dare_rebrac, f"rebrac/{name}")
        assert (twin.bc_online, twin.dare.policy_std) == ("keep", 0.1)


def test_the_authors_values_of_spot_stand_in_the_configs():
    """thuml/SPOT on locomotion, offline; CORL's finetune files on antmaze."""
    robots = {"halfcheetah": "0.05 0.05 1.0", "hopper": "0.1 0.1 0.2"}
    robots["walker2d"] = "0.2 0.2 0.5"
    mazes = zip(ANTMAZES, (0.25, 0.25, 0.05, 0.025), strict=False)
    weights = {f"antmaze-{kind}-v2": weight for kind, weight in mazes}
    for robot, text in robots.items():
        for kind, weight in zip(KINDS[1:4], text.split(), strict=True):
            weights[f"{robot}-{kind}-v2"] = float(weight)
    for path in CONFIGS:
        if path.parent.name != "spot" or path.stem == "quick_start":
            continue
        config = parse_config(spot.TrainConfig, ["--config", str(path)])
        maze = config.env.startswith("antmaze")
        assert config.lambd == weights[config.env], config.env
        assert config.actor_dropout == (0.0 if maze else 0.1)
        assert config.actor_lr == (1e-4 if maze else 3e-4)
        assert config.normalize is not maze and config.normalize_reward is maze
        assert config.online_discount == (0.995 if maze else 0.99)
        assert (config.actor_init_w, config.critic_init_w) == (
            (1e-3, 3e-3) if maze else (None, None)
        )
        assert (config.lambd_cool, config.lambd_end) == (True, 0.2)
        assert (config.vae_iterations, config.vae_hidden_dim) == (100_000, 750)
        twin = parse_config(dare_spot.TrainConfig, ["--config", str(path)])
        assert (twin.lambd_cool, twin.mixing_ratio) == (False, 0.5)


def test_makefile_targets_have_help_and_are_phony():
    text = (ROOT / "Makefile").read_text()
    helped = set(re.findall(r"^([a-z-]+):.*##", text, re.MULTILINE))
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())
    wanted = {"setup", "run", "test", "lint", "format", "diff", "bench", "clean"}
    assert wanted <= helped and helped <= phony | {"help"} and phony == helped


def test_readme_commands_exist():
    text = (ROOT / "README.md").read_text()
    targets = set(
        re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    for target in re.findall(r"^\s*make ([a-z]+)", text, re.MULTILINE):
        assert target in targets
    assert "make run" in text and "make test" in text
    rooms = "algorithms|corl|corl_dare|experiments|configs|benchmarks|docs|results"
    for file in re.findall(rf"\b(?:{rooms})/[\w/.-]+\w", text):
        if "ALGO" not in file:
            assert (ROOT / file).exists(), f"README names {file}"


def test_no_pickle_is_ever_executed():
    for path in [p for room in WALLS for p in files_of(room)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert flags.get("weights_only") == "True", path


def test_the_tests_that_look_for_put_in_mistakes_exist():
    """pytest fails on a missing file, which would count as a mistake that was caught."""
    text = "".join(p.read_text() for p in ROOT.glob("scripts/mutant*.py"))
    named = set(re.findall(r"tests/test_\w+\.py", text))
    assert len(named) > 10
    assert all((ROOT / name).is_file() for name in named)


def test_the_text_of_put_in_mistakes_is_in_one_of_their_files(monkeypatch):
    """Where the code moves and the table does not follow, nobody makes the mistake any more."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    mutants = importlib.import_module("mutants")
    all_of_them = [mutant for _, mutant in mutants.choose("", None, 0)]
    assert len(all_of_them) > 300
    globs = {glob for mutant in all_of_them for glob in mutant.files.split()}
    # Not `git ls-files`: an unpacked archive has no git.
    names = [str(p.relative_to(ROOT)) for glob in globs for p in ROOT.glob(glob)]
    lost = [
        mutants.describe(mutant, mutant.files)
        for mutant in all_of_them
        if mutants.find(mutant, names, ROOT) is None
    ]
    assert not lost, "\n".join(["in none of their files:", *lost])


def test_the_table_of_methods_has_a_row_for_every_algorithm_file():
    text = (ROOT / "docs" / "methods.md").read_text()
    rows = re.findall(r"^\| \[?(\w+)\]?", text, re.MULTILINE)
    files = {path.stem for path in ROOT.glob("algorithms/*.py")}
    assert files <= set(rows) and len(rows) == len(set(rows))
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1
