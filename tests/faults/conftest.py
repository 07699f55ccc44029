"""What a test broke works again in the next one."""

from collections.abc import Iterator

import pytest

from fastbert.kernels import failures


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    failures.forget()
    yield
    failures.forget()
