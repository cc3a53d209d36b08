"""Records the commit in what is built; everything else stands in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
# By its path: the package itself cannot be imported while it is built.
COMMIT = runpy.run_path(str(HERE / "corl" / "commit.py"))


def write_record(package: Path) -> None:
    """Write the commit of this folder into a built copy of `corl/`.

    A source distribution is in no repository; what is built of it copies its record.
    """
    commit = COMMIT["of_git"](HERE / "corl" / "commit.py")
    target = package / COMMIT["RECORD"]
    if commit != COMMIT["UNKNOWN"]:
        # Not through a hard link into the sources, which `sdist` makes.
        target.unlink(missing_ok=True)
        target.write_text(COMMIT["record"](commit))
    elif not (HERE / "corl" / COMMIT["RECORD"]).exists():
        # Of an older build in the same folder.
        target.unlink(missing_ok=True)


class BuildPy(build_py):
    """Modules with their commit; an editable install stays in its checkout and asks git."""

    def run(self) -> None:
        """Build as always, and add the record."""
        super().run()
        if not self.editable_mode:
            write_record(Path(self.build_lib) / "corl")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The record belongs to what is installed."""
        record = Path(self.build_lib) / "corl" / COMMIT["RECORD"]
        outputs = super().get_outputs(include_bytecode)
        return [*outputs, str(record)] if record.exists() else outputs


class Sdist(sdist):
    """A source distribution with its commit."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Copy as always, and add the record."""
        super().make_release_tree(base_dir, files)
        write_record(Path(base_dir) / "corl")


setup(cmdclass={"build_py": BuildPy, "sdist": Sdist})
