"""The ways to take DARE elsewhere, run as docs/use-in-your-codebase.md shows them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"```python\n(.*?)```",
    (ROOT / "docs" / "use-in-your-codebase.md").read_text(),
    re.DOTALL,
)

ONE_FILE = """
from collections import deque
from random import Random

class Theirs:  # somebody else's buffer: a deque of Python tuples
    def __init__(self, shift):
        random = Random(0)
        rows = ([random.random() for _ in range(3)] for _ in range(500))
        self.rows = deque((s, [s[0] + shift], s[1], s, False) for s in rows)
        self.random = Random(1)
    def sample(self, n):
        columns = zip(*self.random.sample(self.rows, n))
        return [torch.tensor(column, dtype=torch.float32) for column in columns]

torch.manual_seed(0)
noisy = lambda batch: [batch[0], batch[1] + 0.2 * torch.randn_like(batch[1]), *batch[2:]]
offline, online = noisy(Theirs(0.0).sample(64)), noisy(Theirs(0.3).sample(64))
batch, weight, stats = dare_batch(offline, online, lambda states: states[:, :1])
assert 0 < stats["exchanged"] <= 32 and weight.sum() == 64
distance = (batch[1][:, 0] - batch[0][:, 0]).abs()
before = (offline[1][:, 0] - offline[0][:, 0]).abs()
assert distance[:64].mean() < before.mean()
assert sorted(batch[2].tolist()) == sorted(torch.cat([offline[2], online[2]]).tolist())
print("ok")
"""

HOOK = """
class Buffer:
    def __init__(self, shift):
        self.states = torch.randn(400, 2)
        self.actions = self.states[:, :1] * 0.3 + shift + 0.1 * torch.randn(400, 1)
    def sample(self, n):
        rows = torch.randint(400, (n,))
        return [self.states[rows], self.actions[rows]]

torch.manual_seed(0)
offline, online = Buffer(0.0), Buffer(0.2)
policy = lambda s, a: -((a - 0.3 * s[:, :1] - 0.2) ** 2).sum(1) / 0.02
hook = make_hook(offline, online, policy, offline.states, offline.actions)
weights = torch.zeros(1, requires_grad=True)
losses = lambda batch: ((batch[1][:, 0] - weights) ** 2, 0.0 * weights + batch[0][:, 0])
log = update(hook, losses, torch.optim.SGD([weights], 0.1))
assert weights.item() != 0.0 and log["score_on_mean"] > log["score_off_mean"]
print("ok")
"""


def run(arguments, cwd, **environment):
    return subprocess.run(
        arguments,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_exchange_copied_alone_works_on_foreign_buffers(tmp_path):
    shutil.copy(ROOT / "corl_dare" / "exchange.py", tmp_path)
    (tmp_path / "program.py").write_text(BLOCKS[0] + ONE_FILE)
    # -S and -I would hide torch too; instead make sure that ours cannot be imported
    blocker = "import sys; sys.modules['corl_dare'] = None\n"
    (tmp_path / "program.py").write_text(blocker + BLOCKS[0] + ONE_FILE)
    done = run([sys.executable, "program.py"], tmp_path)
    assert done.stdout.strip() == "ok", done.stderr


def test_the_hook_around_foreign_buffers(tmp_path):
    block = BLOCKS[1].replace("behavior_updates=2000", "behavior_updates=200")
    assert block != BLOCKS[1]
    (tmp_path / "program.py").write_text(block + HOOK)
    done = run([sys.executable, "program.py"], tmp_path, PYTHONPATH=str(ROOT))
    # The first line says which behavior model was trained.
    assert done.stdout.splitlines()[-1:] == ["ok"], done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The dataset is collected once; the second file finds it."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("file", ["algorithms/dare_iql.py", "algorithms/dare_cal_ql.py"])
def test_an_algorithm_file_copied_alone_runs(file, tmp_path, cache):
    """Only corl_dare is importable, as after `pip install .`; no corl/, no configs."""
    site = tmp_path / "site"
    site.mkdir()
    shutil.copytree(ROOT / "corl_dare", site / "corl_dare")
    shutil.copy(ROOT / file, tmp_path)
    small = "--env hopper-random-v2 --dataset_rows 1500 --offline_iterations 4 "
    small += "--online_iterations 4 --eval_freq 4 --n_episodes 1 --batch_size 16 "
    small += "--dataset_source self-collected --dare.behavior mixture "
    small += "--dare.guidance_scale 0 --dare.score policy_ratio "
    small += "--dare.behavior_updates 5 --dare.behavior_batch_size 16 --device cpu"
    done = run(
        [sys.executable, Path(file).name, *small.split()],
        tmp_path,
        PYTHONPATH=str(site),
        CORL_DARE_CACHE=cache,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "offline score" in done.stdout and "curves.png" in done.stdout
