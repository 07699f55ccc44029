"""A kernel test that launches no kernel has tested something else, so it fails."""

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    from fastbert.kernels.core.launch import counts

    before = counts.total()
    outcome = yield
    if not pyfuncitem.get_closest_marker("no_launch"):
        assert counts.total() > before, "no kernel was launched; mark the test no_launch if that is meant"
    return outcome
