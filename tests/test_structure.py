"""What the guides ask, checked: import walls, twins, configs, Makefile, README commands."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from algorithms import cal_ql, cql, dare_cal_ql, dare_iql, iql
from corl.config import parse_config
from corl.tasks import ANTMAZES, KINDS

ROOT = Path(__file__).parent.parent
# module -> modules of ours that it may import (design: who may import whom)
WALLS = {
    "corl_dare/exchange.py": set(),
    "corl_dare/behavior.py": set(),
    "corl_dare/guidance.py": set(),
    "corl_dare/progress.py": set(),
    "corl_dare/compiled.py": set(),
    "corl_dare/runs.py": {"progress"},
    "corl_dare/envs.py": {"antmaze"},
    "corl_dare/antmaze.py": {"envs"},  # envs imports it only to make one
    "corl_dare/ant_walker.py": {"antmaze", "sac", "progress"},
    "corl_dare/antmaze_collect.py": {"antmaze", "ant_walker", "envs", "sac"},
    "corl_dare/hook.py": {"behavior", "compiled", "exchange", "guidance", "progress"},
    "corl_dare/sac.py": {"envs", "progress"},
    # datasets: only for the card
    "corl_dare/collect.py": {
        *("ant_walker", "antmaze_collect", "envs", "sac", "datasets", "progress"),
    },
    # runs: only for the report's commit and machine
    "corl_dare/datasets.py": {"envs", "collect", "convert", "download", "runs"},
    "corl_dare/convert.py": {"envs", "collect"},  # collect writes HDF5 files
    "corl_dare/download.py": {"progress"},
    "corl_dare/sweep.py": {"runs"},
    "corl_dare/d4rl_shim.py": {"envs", "datasets"},
    "corl_dare/stats.py": set(),
    "corl_dare/figures.py": set(),
    "corl_dare/snapshot.py": {"datasets", "envs", "runs", "exchange", "hook"},
    "corl_dare/report.py": {"figures", "hook", "runs", "snapshot", "stats"},
    "corl/*.py": {"compiled", "datasets", "envs", "runs"},
    "algorithms/*.py": {"compiled", "hook", "datasets", "envs", "runs"},
}
ALONE = {"torch", "numpy", "safetensors", "tqdm"}  # third parties of the files to copy
TWINS = sorted(p.name.removeprefix("dare_") for p in ROOT.glob("algorithms/dare_*.py"))
CONFIGS = sorted(ROOT.glob("configs/*/*.yaml"))
READERS = {  # folder of configs -> the files that read them
    "iql": (iql, dare_iql),
    "cql": (cql,),
    "cal_ql": (cal_ql, dare_cal_ql),
}
SHARED = (  # functions that every baseline repeats, as CORL's single files do
    "soft_update",
    "compute_mean_std",
    "normalize_states",
    "wrap_env",
    "set_env_seed",
    "set_seed",
    "is_goal_reached",
    "eval_actor",
    "return_reward_range",
    "is_locomotion",
    "Evaluator",
    "seconds_per_update",
    "announce",
)
TABLE_1 = [
    *(f"{r}-{k}-v2" for r in ("halfcheetah", "hopper", "walker2d") for k in KINDS[1:4]),
    *(f"antmaze-{k}-v2" for k in ANTMAZES[:4]),
]


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("pattern", WALLS)
def test_imports_stay_inside_the_walls(pattern):
    for path in ROOT.glob(pattern):
        for name in imports(path):
            assert not name.startswith(("algorithms", "corl.", "tests")), (path, name)
            if name.startswith("corl_dare."):
                room = name.split(".")[1]
                allowed = WALLS[pattern] | {"__version__"}
                assert room in allowed, f"{path.name} must not import {room}"


def test_the_files_to_copy_need_only_well_kept_libraries():
    for name in ("exchange", "behavior", "guidance"):
        found = {n.split(".")[0] for n in imports(ROOT / "corl_dare" / f"{name}.py")}
        allowed = {"torch"} if name != "behavior" else ALONE
        assert found - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize("name", TWINS)
def test_a_dare_file_is_its_baseline_plus_lines(name):
    import difflib

    baseline = (ROOT / "corl" / name).read_text().splitlines()
    variant = (ROOT / "algorithms" / f"dare_{name}").read_text().splitlines()
    lines = list(difflib.ndiff(baseline, variant))
    matcher = difflib.SequenceMatcher(None, baseline, variant, autojunk=False)
    removed = sum(
        i2 - i1 for tag, i1, i2, _, _ in matcher.get_opcodes() if tag != "equal"
    )
    assert removed == 0, [line for line in lines if line.startswith("- ")][:5]
    assert len(variant) - len(baseline) < 250


def test_the_baselines_repeat_the_same_helpers():
    """Single files repeat code on purpose; a mend in one of them must reach the others."""
    texts = {}
    for path in sorted(ROOT.glob("corl/*.py")):
        for node in ast.parse(path.read_text()).body:
            if getattr(node, "name", None) in SHARED:
                texts.setdefault(node.name, {})[path.name] = ast.unparse(node)
    assert set(texts) == set(SHARED)
    for name, versions in texts.items():
        assert len(versions) == 3 and len(set(versions.values())) == 1, name


def test_the_baselines_run_with_the_hook_deleted():
    program = (
        "import sys; sys.modules['corl_dare.hook'] = None; "
        "import algorithms.iql, algorithms.cql, algorithms.cal_ql; "
        "assert not {'corl_dare.exchange', 'corl_dare.behavior'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("algorithm", READERS)
def test_every_dataset_of_the_papers_table_has_a_config(algorithm):
    paths = [p for p in CONFIGS if p.parent.name == algorithm]
    tasks = {yaml.safe_load(p.read_text())["env"] for p in paths}
    assert set(TABLE_1) <= tasks and len(TABLE_1) == 13


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_config_is_read_by_its_files_and_sorted(path):
    values = yaml.safe_load(path.read_text())
    assert list(values) == sorted(values)
    assert list(values.get("dare", {})) == sorted(values.get("dare", {}))
    for module in READERS[path.parent.name]:
        ignore = getattr(module, "OTHER_BLOCKS", ())
        config = parse_config(module.TrainConfig, ["--config", str(path)], ignore)
        assert config.env == values["env"]
        if module is dare_iql:
            assert config.mixing_ratio == 0.5
        if module is iql:
            assert config.mixing_ratio is None
    if path.stem != "quick_start":
        assert path.stem.replace("_", "-") == values["env"].removesuffix("-v2")


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
    ignore = getattr(module, "OTHER_BLOCKS", ())
    return parse_config(module.TrainConfig, ["--config", str(path)], ignore)


@pytest.mark.parametrize(
    "module",
    sorted({m for ms in READERS.values() for m in ms}, key=lambda m: m.__name__),
)
def test_the_quick_start_that_a_long_run_names_is_there(module):
    assert (ROOT / module.QUICK_START) in CONFIGS


@pytest.mark.parametrize("algorithm", ["iql", "cal_ql"])
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


def test_makefile_targets_have_help_and_are_phony():
    text = (ROOT / "Makefile").read_text()
    helped = set(re.findall(r"^([a-z]+):.*##", text, re.MULTILINE))
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
    for file in re.findall(
        r"\b(?:algorithms|corl|configs|benchmarks|docs)/[\w/.-]+\w", text
    ):
        if "ALGO" not in file:
            assert (ROOT / file).exists(), f"README names {file}"


def test_no_pickle_is_ever_executed():
    for path in [
        *ROOT.glob("corl_dare/*.py"),
        *ROOT.glob("corl/*.py"),
        *ROOT.glob("algorithms/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert flags.get("weights_only") == "True", path
