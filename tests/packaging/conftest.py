"""Fixtures: temporary copies of the source tree, and environments to install them into."""

import os
import shutil
import site
from collections.abc import Callable
from pathlib import Path

import pytest

from .environments import ROOT, Environment, make_environment, source_files


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An empty environment that sees the packages installed for the tests."""
    return make_environment(tmp_path / "environment", [Path(folder) for folder in site.getsitepackages()])


@pytest.fixture
def environment_without(tmp_path: Path) -> Callable[[str], Environment]:
    """Makes an environment without one distribution: neither its package nor its metadata."""

    def make(name: str) -> Environment:
        rest = tmp_path / "rest"
        rest.mkdir()
        for folder in filter(os.path.isdir, site.getsitepackages()):  # Debian lists some that do not exist
            for entry in Path(folder).iterdir():
                if entry.name != name and not entry.name.startswith(f"{name}-"):
                    (rest / entry.name).symlink_to(entry)
        return make_environment(tmp_path / "environment", [rest])

    return make


@pytest.fixture(scope="session")
def sources() -> list[Path]:
    """The files that a commit of the working tree would contain, relative to the root."""
    return source_files()


@pytest.fixture
def tree(tmp_path: Path, sources: list[Path]) -> Path:
    """A copy of the sources only; links stay links."""
    folder = tmp_path / "tree"
    for path in sources:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path, follow_symlinks=False)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """An empty working folder, so that nothing is imported from the current one."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder
