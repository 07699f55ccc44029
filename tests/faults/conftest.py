"""In these tests failing kernels fall back to plain PyTorch, and each test starts with working kernels."""

from collections.abc import Iterator

import pytest

from fastbert.kernels.core import failures
from fastbert.kernels.encoder_layer import plan


@pytest.fixture(autouse=True)
def forgotten(no_stand_in: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(failures, "strict", False)
    failures.reset()
    plan.clear()
    yield
    failures.reset()
    plan.clear()
