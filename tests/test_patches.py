"""patches/: insert-only, in step with our DARE files, refused by any other target."""

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from scripts import make_patches

ROOT = Path(__file__).parent.parent
PATCHES = make_patches.patches()


@pytest.mark.parametrize("name", PATCHES)
def test_the_patch_on_disk_is_what_the_script_writes(name):
    written = (ROOT / "patches" / f"{name}.patch").read_text()
    assert written == make_patches.render(PATCHES[name]), "run make patches"


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_only_inserts_and_holds_only_our_text(name):
    lines = (ROOT / "patches" / f"{name}.patch").read_text().splitlines()
    assert lines[0].startswith("--- a/") and lines[1].startswith("+++ b/")
    for line in lines[2:]:
        assert line.startswith(("+", "@@")), f"context or removal: {line}"
    for hunk in re.findall(r"^@@ -(\d+),(\d+) ", "\n".join(lines), re.MULTILINE):
        assert hunk[1] == "0"


@pytest.mark.parametrize("name", PATCHES)
def test_git_applies_it_and_gets_the_text_that_the_script_makes(name, tmp_path):
    patch = PATCHES[name]
    source = "".join(f"line {i}\n" for i in range(1, 2001))
    target = tmp_path / patch.target
    target.parent.mkdir(parents=True)
    target.write_text(source)
    file = ROOT / "patches" / f"{name}.patch"
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    subprocess.run(
        ["git", "apply", "--unidiff-zero", str(file)], cwd=tmp_path, check=True
    )
    assert target.read_text() == make_patches.patched_text(patch, source)
    kept = [x for x in target.read_text().splitlines() if re.fullmatch(r"line \d+", x)]
    assert kept == source.splitlines()


def test_another_version_of_the_target_is_refused_untouched(tmp_path):
    patch = PATCHES["iql"]
    target = tmp_path / patch.target
    target.parent.mkdir(parents=True)
    target.write_text("x = 1\n")
    with pytest.raises(SystemExit, match="not the file this patch was made for"):
        make_patches.check_target(patch, tmp_path)
    known = replace(patch, sha256=hashlib.sha256(b"x = 1\n").hexdigest())
    assert make_patches.check_target(known, tmp_path) == "x = 1\n"
    with pytest.raises(SystemExit, match="does not exist"):
        make_patches.check_target(patch, tmp_path / "nowhere")
    command = [sys.executable, "scripts/make_patches.py", "--apply", "--corl", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert target.read_text() == "x = 1\n"


@pytest.mark.optional("corl")
def test_upstream_and_patched_upstream_give_our_numbers_to_the_bit():
    command = [sys.executable, "benchmarks/parity.py", "--corl", os.environ["CORL_DIR"]]
    report = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = re.findall(r"largest difference (\S+)", report.stdout)
    assert len(found) >= 7 and set(found) == {"0"}, report.stdout
