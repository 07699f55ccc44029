"""Computes operations of Triton's interpreter on every pair of types, as a table that two processes can compare.

    python -m tests.interpreter_cases

prints the table of Triton's own interpreter; tests/test_interpreter.py compares it with that of the accelerated one.
"""

import json
import warnings
from collections.abc import Iterator
from itertools import product

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, _get_np_dtype, _patch_lang, interpreter_semantic

ARITHMETIC = ["add", "sub", "mul", "truediv", "floordiv", "mod", "fdiv", "minimum", "maximum"]
COMPARISONS = ["less_than", "less_equal", "greater_than", "greater_equal", "equal", "not_equal"]
BINARY = [*ARITHMETIC, *COMPARISONS, "and_", "or_", "xor_", "shl", "lshr", "where"]
TYPES = ["int1", "int32", "int64", "uint8", "uint32", "uint64", "float16", "bfloat16", "float32", "float64"]
SHAPES = [((), ()), ((4,), (4,)), ((4,), ()), ((), (2, 4)), ((2, 1), (1, 4)), ((2, 4), (1, 4)), ((4,), (2, 1))]
CONSTANTS = (0, 1, 3, -2, 70_000, 2**40, 0.0, -0.0, 0.1, 1e300, float("inf"), True)


def cases() -> Iterator[tuple[str, list]]:
    """Names and outcomes: type, shape and bytes of the result, or the type of the error."""
    semantic = interpreter_semantic
    scope = _patch_lang(cases)  # as at the launch of a kernel

    def make(name: str, shape: tuple[int, ...], first: int) -> tl.core.tensor:
        """Small numbers, starting at 1, so that nothing overflows and nothing is divided by zero."""
        dtype = getattr(tl, name)
        values = np.arange(first, first + np.prod(shape, dtype=int)).reshape(shape or (1,))
        if name == "bfloat16":  # NumPy has no bfloat16: the upper half of float32
            values = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        values = values.astype(_get_np_dtype(dtype))
        return tl.core.tensor(TensorHandle(values, dtype), tl.block_type(dtype, list(shape)) if shape else dtype)

    def pointers(shape: tuple[int, ...]) -> tl.core.tensor:
        dtype = tl.pointer_type(tl.float32)
        values = np.arange(np.prod(shape, dtype=int), dtype=np.uint64).reshape(shape or (1,)) * 64
        return tl.core.tensor(TensorHandle(values, dtype), tl.block_type(dtype, list(shape)) if shape else dtype)

    def outcome(function, *operands) -> list:
        try:
            result = function(*operands)
        except Exception as error:  # the type of the error is compared
            return [type(error).__name__]
        data = result.handle.data
        sizes = [int(size) for size in result.type.shape] if result.type.is_block() else []
        assert [size.value for size in result.shape] == sizes
        return [str(result.dtype), sizes, str(data.dtype), list(data.shape), data.tobytes().hex()]

    def operation(name: str):
        if name in ("add", "sub", "mul"):
            return lambda one, other: getattr(semantic, name)(one, other, True)
        if name in ("minimum", "maximum"):
            return lambda one, other: getattr(semantic, name)(one, other, tl.PropagateNan.NONE)
        if name == "fdiv":
            return lambda one, other: semantic.fdiv(one, other, False)
        if name == "where":
            return lambda one, other: semantic.where(make("int1", (2, 4), 0), one, other)
        return getattr(semantic, name)

    for name in BINARY:
        function = operation(name)
        for (one, other), (left, right) in product(product(TYPES, TYPES), SHAPES):
            if one == other == "int32" or (left, right) in SHAPES[1:5:3]:
                found = outcome(function, make(one, left, 5), make(other, right, 1))
                yield f"{name} {one}{left} {other}{right}", found
        for dtype, value, shape in product(TYPES, CONSTANTS, ((), (2, 4))):
            if name == "fdiv" or (shape and value not in (3, 0.1)):
                continue
            for turn in range(2):  # a constant is made once and then cached
                yield f"{name} {dtype}{shape} {value!r} {turn}", outcome(function, make(dtype, shape, 2), value)
            yield f"{name} {value!r} {dtype}{shape}", outcome(function, value, make(dtype, shape, 2))
    for dtype, (left, right) in product(TYPES, SHAPES):
        for name in ("add", "sub", "mul", "less_than"):
            yield f"{name} pointer{left} {dtype}{right}", outcome(operation(name), pointers(left), make(dtype, right, 1))
        yield f"add {dtype}{left} pointer{right}", outcome(operation("add"), make(dtype, left, 1), pointers(right))
    for one, other, shape in product(TYPES, TYPES, ((), (2, 4))):
        yield f"cast {one}{shape} {other}", outcome(semantic.cast, make(one, shape, 0), getattr(tl, other))
    for dtype, axis in product(TYPES, range(3)):
        yield f"expand_dims {dtype} {axis}", outcome(semantic.expand_dims, make(dtype, (2, 4), 0), axis)
    if scope is not None:  # triton 3.5 restores its functions differently
        scope.restore()


def table() -> dict[str, list]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(cases())


if __name__ == "__main__":
    print(json.dumps(table()))
