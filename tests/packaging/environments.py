"""The source files, and throw-away environments to install them into without a network."""

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees the packages of the one the tests run in, but has its own fastbert."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *arguments: str | Path, cwd: Path) -> str:
        """Run Python there and return what it printed; its errors are the test's."""
        return run([self.python, *arguments], cwd)

    def install(self, *what: str | Path) -> None:
        """pip install, from the disk alone: build tools and dependencies are the ones of the surrounding tests."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "install"]
        # --ignore-installed: the fastbert of the surrounding environment stays as it is.
        local = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
        run([*pip, *local, *what], self.folder)


def run(command: list[str | Path], cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_environment(folder: Path, packages: list[Path]) -> Environment:
    venv.create(folder, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    # Python reads .pth files only in its own folder: an editable fastbert behind these paths is not switched on.
    (own / "surrounding.pth").write_text("".join(f"{path}\n" for path in packages))
    return Environment(folder)


def source_files() -> list[Path]:
    """What a commit of the working tree would hold, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: only git knows which files are sources")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    return [Path(name) for name in sorted(set(listed.split("\0"))) if name and os.path.lexists(ROOT / name)]
