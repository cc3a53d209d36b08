"""What is installed knows its commit, though it lies in the repository of somebody else."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import corl
import corl_dare
from corl import commit, machine

ROOT = Path(__file__).parent.parent
SOURCES = (
    "corl",
    "corl_dare",
    "transition_diffusion",
    "adaptive_regularization",
    "policy_family",
    "online_pretraining",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
)
PERSON = ("-c", "user.name=n", "-c", "user.email=e@x.org")
SAYS = "from corl import machine; print(machine.git_commit(), machine.versions()['corl-dare'])"
# A script under the shim, which brings packages that are none to pip.
RUNS = "import sys; from corl.shim.__main__ import main; main([sys.argv[1]])"


def run(*words, cwd):
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def repository(folder):
    """Make a git repository of what lies in a folder; its commit."""
    run("git", "init", "-q", cwd=folder)
    run("git", "add", ".", cwd=folder)
    run("git", *PERSON, "commit", "-qm", "first", cwd=folder)
    return run("git", "rev-parse", "HEAD", cwd=folder)


@pytest.fixture
def checkout(tmp_path):
    """A copy of our sources, without any repository yet."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / ".gitignore").write_text("build/\n*.egg-info/\n__pycache__/\n")
    return folder


@pytest.fixture
def users(tmp_path):
    """The repository of a user, with an environment that is not tracked."""
    folder = tmp_path / "user"
    (folder / "env").mkdir(parents=True)
    (folder / "work.py").write_text("1")
    (folder / ".gitignore").write_text("env/\n")
    repository(folder)
    return folder


def install(source, users):
    """`pip install` of a folder or archive into the user's environment; what it then says."""
    pytest.importorskip("setuptools")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    pip = (sys.executable, "-m", "pip", "install", *options)
    place = users / "env" / "site"
    run(*pip, "--target", str(place), str(source), cwd=users)
    words = [sys.executable, "-c", SAYS]
    variables = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(
        words, cwd=users, env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_installed_package_says_the_commit_it_was_built_from(checkout, users):
    own = repository(checkout)
    assert install(checkout, users) == [own, corl.__version__]
    script = users / "work.py"
    script.write_text(
        "import d4rl, gym.wrappers, wandb; print(gym.__file__, gym.__version__)"
    )
    place = users / "env" / "site"
    variables = {**os.environ, "PYTHONPATH": str(place)}
    words = [sys.executable, "-c", RUNS, str(script)]
    said = subprocess.run(
        words, cwd=users, env=variables, capture_output=True, text=True
    )
    assert said.stdout.split() == [
        str(place / "corl/shim/packages/gym/__init__.py"),
        "0.23.1",
    ], said.stderr
    # Nothing came into the checkout that git could see, or Python could import.
    assert run("git", "status", "--porcelain", cwd=checkout) == ""
    assert not (checkout / "corl" / commit.RECORD).exists()


@pytest.mark.whole
def test_changed_sources_are_called_dirty(checkout, users):
    own = repository(checkout)
    with open(checkout / "corl" / "files.py", "a") as file:
        file.write("\n")
    assert install(checkout, users) == [f"{own}+dirty", corl.__version__]


@pytest.mark.whole
def test_a_source_distribution_carries_its_commit(checkout, users, tmp_path):
    own = repository(checkout)
    build = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    run(sys.executable, "-c", build, str(tmp_path), cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert install(archive, users) == [own, corl.__version__]
    assert not (checkout / "corl" / commit.RECORD).exists()


@pytest.mark.whole
def test_without_git_the_users_commit_is_not_taken(checkout, users):
    inside = users / "env" / "copy"
    shutil.copytree(checkout, inside)
    assert install(inside, users) == ["unknown", corl.__version__]


def test_git_is_believed_only_where_it_tracks_the_file(users):
    package = users / "env" / "corl" / "machine.py"
    package.parent.mkdir()
    package.write_text("1")
    assert commit.of_git(package) == "unknown"
    assert commit.of_git(users / "work.py") == run("git", "rev-parse", "HEAD", cwd=users)


def test_the_variables_of_a_git_hook_do_not_mislead(users, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "work.py").write_text("2")
    mine = repository(other)
    monkeypatch.setenv("GIT_DIR", str(users / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(users))
    assert commit.of_git(other / "work.py") == mine


@pytest.mark.makes("commit")
def test_the_record_is_asked_where_git_says_nothing(monkeypatch):
    monkeypatch.setattr(commit, "of_git", lambda file: "unknown")
    assert machine.git_commit() == "unknown"
    module = type(sys)("corl._build")
    exec(commit.record("a" * 40), vars(module))
    monkeypatch.setitem(sys.modules, "corl._build", module)
    assert machine.git_commit() == "a" * 40


def test_both_packages_have_one_version():
    assert corl.__version__ == corl_dare.__version__
    assert machine.versions()["corl-dare"] == corl.__version__


def test_every_requirement_says_its_lowest_version():
    bounds = runpy.run_path(str(ROOT / "scripts" / "check_bounds.py"))
    wanted = bounds["dependencies"]()
    assert any(r.startswith("torch>=") for r in wanted) and len(wanted) > 5
    for requirement in wanted:
        name, _, version = bounds["lowest"](requirement).partition("==")
        assert requirement.startswith(f"{name}>={version}") and version[0].isdigit()
    assert bounds["lowest"]("a-b[c,d]>=1.2,<3") == "a-b[c,d]==1.2"
    for bad in ("torch", "torch==2.6", "torch<3", "torch>2.6"):
        with pytest.raises(ValueError, match="no lower bound"):
            bounds["lowest"](bad)
