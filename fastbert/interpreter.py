"""Triton's interpreter, made quicker: most of its time goes into making the same few types again and again.

For programs that are fastbert's own (its command line, the benchmarks, the tests): nothing is replaced in a process
that merely imports fastbert. The kernels' arithmetic is untouched; each function here gives what the one that it
replaces gives. Written for triton 3.7; another release that lacks one of the functions stays as slow as it is.
"""

import math
import warnings
from contextlib import suppress
from functools import cache

import numpy as np


def hurry() -> None:
    """Replace the slowest functions of the interpreter in this process."""
    # NumPy's word for what a hash does on purpose, and a GPU without one
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning, r"triton\.")
    for part in (_replace_language_once, _remember_numpy_types, _remember_blocks, _erf_of_arrays, _drop_unread_checks):
        with suppress(AttributeError, ImportError):
            part()


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
        return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

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
    """A function of Python's own stood between NumPy and math.erf, called for each element."""
    from triton.runtime import interpreter

    def erf(x: np.ndarray) -> np.ndarray:
        return np.fromiter(map(math.erf, x.ravel().tolist()), x.dtype, x.size).reshape(x.shape)

    interpreter.np_erf_fp32 = interpreter.np_erf_fp64 = erf


def _drop_unread_checks() -> None:
    """Whether a sum of integers fits its type took eleven operations to find out, and is dropped unless one debugs."""
    from triton.language.semantic import TritonSemantic

    check = TritonSemantic.binary_op_sanitize_overflow_impl

    def check_if_read(self, left, right, operation) -> None:
        if self.builder.options.debug:
            check(self, left, right, operation)

    TritonSemantic.binary_op_sanitize_overflow_impl = check_if_read
