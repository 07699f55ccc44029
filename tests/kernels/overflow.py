"""Triton's interpreter with overflow checks on. NumPy wraps without a word, and so would a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import InterpreterBuilder

OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _assert_fits(values: np.ndarray, what: str) -> None:
    limits = np.iinfo(np.int32)
    if values.size and (values.min() < limits.min or values.max() > limits.max):
        raise OverflowError(f"{what} gives {values.max()}, which int32 does not hold")


@contextmanager
def overflow_checks() -> Iterator[None]:
    """A sum, difference, product or cast that leaves int32 raises. Unsigned numbers are hashes, which are meant to wrap."""

    def check(self, left, right, operation):
        if left.type.scalar == tl.int32:
            numbers = (np.asarray(side.handle.data).astype(np.int64) for side in (left, right))
            _assert_fits(OPERATIONS[operation.__name__](*numbers), operation.__name__)

    cast = InterpreterBuilder.cast_impl

    def checked_cast(self, source, to):
        if source.dtype.scalar == tl.int64 and to.scalar == tl.int32:
            _assert_fits(np.asarray(source.data), "a cast")
        return cast(self, source, to)

    with (
        patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", check),
        patch.object(InterpreterBuilder, "cast_impl", checked_cast),
    ):
        yield
