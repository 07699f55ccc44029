"""Lists the source files, and makes temporary environments to install them into without a network."""

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
    """A virtual environment that sees the packages of the tests' environment but has its own fastbert."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *arguments: str | Path, cwd: Path) -> str:
        """Run Python in the environment and return its output; an error fails the test."""
        return run([self.python, *arguments], cwd)

    def install(self, *what: str | Path) -> None:
        """pip install without a network: build tools and dependencies are those of the tests' environment."""
        pip = [sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "install"]
        # --ignore-installed: leave the fastbert of the surrounding environment alone.
        local = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
        run([*pip, *local, *what], self.folder)


def run(command: list[str | Path], cwd: Path, *, seconds: float = 300) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def make_environment(folder: Path, packages: list[Path]) -> Environment:
    venv.create(folder, symlinks=True)
    (own,) = folder.glob("lib/python*/site-packages")
    # Python reads .pth files only in its own site folder, so an editable fastbert in these paths is not active.
    (own / "surrounding.pth").write_text("".join(f"{path}\n" for path in packages))
    return Environment(folder)


def source_files() -> list[Path]:
    """The files that a commit of the working tree would contain, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: only git knows which files are sources")
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    return [Path(name) for name in sorted(set(listed.split("\0"))) if name and os.path.lexists(ROOT / name)]
