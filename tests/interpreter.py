"""Makes Triton's interpreter stricter: it raises where a GPU would silently overflow."""

import numpy as np


def check_overflows() -> None:
    """Make sums, differences, products and casts of signed integers raise if they overflow, such as an offset past 2**31.

    A GPU wraps silently. Unsigned integers wrap on purpose, in the generators of random bits.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime.interpreter import InterpreterBuilder

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    cast = InterpreterBuilder.cast_impl

    def raise_unless_it_fits(values: np.ndarray, scalar: tl.dtype, what: str) -> None:
        if values.min() < scalar.get_int_min_value() or values.max() > scalar.get_int_max_value():
            raise OverflowError(f"{what} gives {values.max()}, which {scalar} does not hold")

    def check(self, left, right, operation) -> None:
        scalar = left.type.scalar
        if scalar.int_bitwidth < 64 and scalar.is_int_signed():
            exact = operations[operation.__name__](left.handle.data, right.handle.data, dtype=np.int64)
            raise_unless_it_fits(exact, scalar, operation.__name__)

    def checked_cast(self, source, to):
        if source.dtype.scalar == tl.int64 and to.scalar == tl.int32:
            raise_unless_it_fits(source.data, tl.int32, "a cast")
        return cast(self, source, to)

    TritonSemantic.binary_op_sanitize_overflow_impl = check
    InterpreterBuilder.cast_impl = checked_cast
