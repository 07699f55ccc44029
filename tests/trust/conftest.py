"""Fixtures of all tests here."""

import shutil
from pathlib import Path

import pytest

from tests.bench.train.training import save_model


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("good"))


@pytest.fixture
def model(saved_once: Path, tmp_path: Path) -> Path:
    """A folder with a small model and its tokenizer, of which a test may damage any file."""
    return Path(shutil.copytree(saved_once, tmp_path / "model"))
