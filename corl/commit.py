"""The commit that this code is of: by git in a checkout, by a record of the build elsewhere.

`setup.py` runs this file by its path, so it imports nothing but Python's own library. It writes
the record into what is installed, never into a checkout.
"""

import os
import subprocess
from importlib import import_module
from pathlib import Path

UNKNOWN = "unknown"
RECORD = "_build.py"  # beside this file, in an installed package


def of_git(file: Path) -> str:
    """Commit of the git repository that tracks a file, with `+dirty`, or `unknown`.

    A package that is installed in an environment lies in the repository of its user, who does not
    track it. Files in results/ do not make a commit dirty: a benchmark writes there, and its
    second seed is to name the same commit as its first.
    """
    # Variables of a git hook would name another repository.
    variables = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words],
            cwd=file.parent,
            env=variables,
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", file.name)
        code = (":/", ":(top,exclude)results")
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "HEAD") + ("+dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN


def of_build() -> str:
    """The commit that the installed package was built from, or `unknown`."""
    try:
        return str(import_module("corl._build").COMMIT)
    except (ImportError, AttributeError):
        return UNKNOWN


def record(commit: str) -> str:
    """The text of `_build.py`."""
    return f'"""Written when the package was built."""\n\nCOMMIT = "{commit}"\n'
