"""Triton's interpreter, made quicker and stricter: most of its time went into making the same few types again.

The kernels' arithmetic is untouched; each function here gives what the one that it replaces gives.
"""

from functools import cache
from math import prod

import numpy as np
import torch


def improve() -> None:
    """Replace functions of the interpreter in this process."""
    _replace_language_once()
    _remember_numpy_types()
    _remember_blocks()
    _erf_of_arrays()
    _check_overflows()


def _replace_language_once() -> None:
    """Replace triton.language's functions for good: in this process they serve nothing else.

    The interpreter puts them back after each launch and, to the same effect, replaces them again in every jit function
    that a kernel calls: half of the time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replace, replaced = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None:
            pass

    @cache
    def modules_of(function) -> set[str]:
        return {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}

    def replace_once(function) -> Kept:
        if not modules_of(function) <= replaced:
            replace(function)
            replaced.update(modules_of(function))
        return Kept()

    interpreter._patch_lang = replace_once


def _remember_numpy_types() -> None:
    """A dictionary of all types was built to look one up, at every operation."""
    from triton.runtime import interpreter

    look_up, known = interpreter._get_np_dtype, {}

    def remember(dtype):
        name = dtype.scalar.name  # pointers and blocks have no hash
        if name not in known:
            known[name] = look_up(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = remember


def _remember_blocks() -> None:
    """Blocks and tensors of one shape share its tuple and its product, which were made anew at every operation.

    A block's name, read in error messages only, is put together when it is asked for.
    """
    import triton.language as tl
    from triton._utils import validate_block_shape
    from triton.language.semantic import TritonSemantic

    core = tl.core

    def plain(shape) -> tuple[int, ...]:
        sizes = shape.values if type(shape) is core.tuple else core._unwrap_if_constexpr(shape)
        return tuple([size if type(size) is int else core._unwrap_if_constexpr(size) for size in sizes])

    @cache
    def of_block(sizes: tuple[int, ...]):
        if not sizes:
            raise TypeError("0d block_type is forbidden")
        return core.tuple(sizes), validate_block_shape(sizes)

    @cache
    def of_tensor(sizes: tuple[int, ...]):
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(prod(sizes))

    def block(self, element_ty, shape) -> None:
        self.element_ty = element_ty
        self.shape, self.numel = of_block(plain(shape))

    def tensor(self, handle, type) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensor(tuple(type.shape.values) if type.is_block() else ())

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unequal(self, lhs, rhs):
        same = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_unequal
    core.block_type.__init__ = block
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tensor.__init__ = tensor


def _erf_of_arrays() -> None:
    """Python's erf was called for one element at a time."""
    from triton.runtime import interpreter

    def erf(x: np.ndarray) -> np.ndarray:
        return torch.erf(torch.from_numpy(np.asarray(x, dtype=np.float64))).numpy()

    interpreter.np_erf_fp32 = lambda x: erf(x).astype(np.float32)
    interpreter.np_erf_fp64 = erf


def _check_overflows() -> None:
    """Let a sum, difference, product or cast of signed integers that leaves its type raise: an offset past 2**31.

    A GPU wraps without a word. The interpreter computes the check at every operation, in eleven others, and drops it
    unless it debugs. Unsigned integers wrap on purpose, in the generators of random bits.
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
