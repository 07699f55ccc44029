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

from fastbert.testing.interpreter.operands import settle_at_once


@cache
def hurry() -> None:
    """Replace the slowest functions of the interpreter in this process, once."""
    # NumPy's word for what a hash does on purpose, and a GPU without one
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning, r"triton\.")
    for part in (
        _replace_language_once,
        _call_at_once,
        _remember_numpy_types,
        _remember_blocks,
        _compare_by_identity,
        settle_at_once,
        _erf_of_arrays,
        _drop_unread_checks,
    ):
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


def _call_at_once() -> None:
    """Two functions and a dictionary stood between a call of triton.language and what it does."""
    from triton.runtime import interpreter

    def patch(owner, name, member, builder, scope) -> None:
        function = getattr(member, "__wrapped__", member)  # the wrapper refuses calls from outside of a kernel

        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch


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

    class Sizes(core.tuple):
        """A block's shape: there is one object of each, so that `is` compares shapes."""

        def __init__(self, sizes: tuple[int, ...]) -> None:
            super().__init__(sizes)
            self.numel = validate_block_shape(sizes)
            self.of_tensor = core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))

    only = cache(Sizes)
    of_scalar = core.tuple([]), core.constexpr(1)

    def block(self, element_ty, shape) -> None:
        if type(shape) is not Sizes:
            sizes = shape if type(shape) is list else core._unwrap_if_constexpr(shape)
            shape = only(tuple([size if type(size) is int else core._unwrap_if_constexpr(size) for size in sizes]))
            if not shape.values:
                raise TypeError("0d block_type is forbidden")
        self.element_ty, self.shape, self.numel = element_ty, shape, shape.numel

    def tensor(self, handle, type) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.shape.of_tensor if type.is_block() else of_scalar

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_unequal(self, lhs, rhs):
        same = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_unequal
    core.block_type.__init__ = block
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tensor.__init__ = tensor


def _compare_by_identity() -> None:
    """A type is equal to itself, and what is no constexpr is itself: both were found out by way of names and lists."""
    import triton.language as tl

    core = tl.core
    unwrap, equal = core._unwrap_if_constexpr, core.dtype.__eq__
    itself = {int, float, bool, str, type(None), core.tensor}

    core._unwrap_if_constexpr = lambda value: value if type(value) in itself else unwrap(value)
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


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
