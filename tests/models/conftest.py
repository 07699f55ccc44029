"""Fixtures of the model tests."""

import pytest

from fastbert.layers.layer import BertLayer


@pytest.fixture(params=["one op", "module by module"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test with layers as one op and module by module."""
    if request.param == "module by module":
        for attempt in ("_try_op", "_try_packed"):
            monkeypatch.setattr(BertLayer, attempt, lambda *_: "the test wants its modules")
    return request.param
