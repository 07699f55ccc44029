"""Triton's interpreter, accelerated: most of its time goes into making the same few types again and again.

For fastbert's tests, benchmarks and command line; nothing that a user imports loads this package. The kernels'
arithmetic is untouched: each function here gives what the one that it replaces gives, which tests/test_interpreter.py
shows by running thousands of operations in both. All replacements are made or none.
"""

import inspect
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

from fastbert.testing.interpreter.operands import operand_replacements

# The releases of triton on which tests/test_interpreter.py passes. On another, nothing is replaced: to add one, name it
# here and run that test under it.
RELEASES = ("3.6", "3.7", "3.8")

Replacement = tuple[object, str, object]  # owner, name, and what takes the place of `owner.name`

_MISSING = object()
logger = logging.getLogger(__name__)


@cache
def accelerate() -> None:
    """Replace the slowest functions of the interpreter in this process, if this release of triton is one of RELEASES."""
    import triton

    # NumPy's word for what a hash does on purpose, and a GPU without one
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning, r"triton\.")
    if ".".join(triton.__version__.split(".")[:2]) not in RELEASES:
        logger.info("Triton's interpreter is not accelerated: triton %s is not one of %s", triton.__version__, RELEASES)
        return
    try:
        replace_all([replacement for part in _PARTS for replacement in part()])
    except (AttributeError, ImportError, TypeError) as error:
        logger.info("Triton's interpreter is not accelerated: %s", error)


def replace_all(replacements: Iterable[Replacement]) -> None:
    """Make all replacements, or none where one cannot be made.

    Raises:
        AttributeError: there is nothing of that name to replace.
        TypeError: what is there takes other arguments than what would replace it.
    """
    replacements = list(replacements)
    for owner, name, new in replacements:
        if isinstance(new, property):  # in place of an attribute of instances, of which the class has none
            continue
        expected, found = _parameters(new), _parameters(getattr(owner, name))
        if found != expected:
            raise TypeError(f"{owner.__name__}.{name} takes ({', '.join(found)}), expected ({', '.join(expected)})")
    former: list[Replacement] = []
    try:
        for owner, name, new in replacements:
            old = vars(owner).get(name, _MISSING)
            setattr(owner, name, new)
            former.append((owner, name, old))
    except BaseException:
        for owner, name, old in reversed(former):
            if old is not _MISSING:
                setattr(owner, name, old)
            else:
                delattr(owner, name)
        raise


def _parameters(function: object) -> list[str]:
    """Names, kinds and defaults, without annotations."""
    return [str(p.replace(annotation=p.empty)) for p in inspect.signature(function).parameters.values()]


def _language_replaced_once() -> Iterator[Replacement]:
    """Replace triton.language's functions for good: in this process they serve nothing else.

    The interpreter puts them back after each launch and, to the same effect, replaces them again in every jit function
    that a kernel calls: half of the time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replace, replaced = interpreter._patch_lang, set()

    class Nothing:
        def restore(self) -> None:
            pass

    @cache
    def modules_of(function) -> set[str]:
        return {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}

    def replace_once(fn) -> Nothing:
        if not modules_of(fn) <= replaced:
            replace(fn)
            replaced.update(modules_of(fn))
        return Nothing()

    yield interpreter, "_patch_lang", replace_once


def _direct_calls() -> Iterator[Replacement]:
    """Two functions and a dictionary stood between a call of triton.language and what it does."""
    from triton.runtime import interpreter

    def patch(obj, name, member, builder, scope) -> None:
        function = getattr(member, "__wrapped__", member)  # the wrapper refuses calls from outside of a kernel

        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    yield interpreter, "_patch_attr", patch


def _cached_numpy_types() -> Iterator[Replacement]:
    """A dictionary of all types was built to look one up, at every operation."""
    from triton.runtime import interpreter

    look_up, known = interpreter._get_np_dtype, {}

    def cached(tt_dtype):
        name = tt_dtype.scalar.name  # pointers and blocks have no hash
        if name not in known:
            known[name] = look_up(tt_dtype.scalar)
        return known[name]

    yield interpreter, "_get_np_dtype", cached


def _shared_shapes() -> Iterator[Replacement]:
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

    yield TritonSemantic, "broadcast_impl_value", broadcast_unequal
    yield core.block_type, "__init__", block
    yield core.block_type, "name", property(lambda self: f"<{self.shape}, {self.element_ty}>")
    yield core.tensor, "__init__", tensor


def _comparisons_by_identity() -> Iterator[Replacement]:
    """A type is equal to itself, and what is no constexpr is itself: both were found out by way of names and lists."""
    import triton.language as tl

    core = tl.core
    unwrap, equal = core._unwrap_if_constexpr, core.dtype.__eq__
    itself = {int, float, bool, str, type(None), core.tensor}

    yield core, "_unwrap_if_constexpr", lambda o: o if type(o) in itself else unwrap(o)
    yield core.dtype, "__eq__", lambda self, other: self is other or equal(self, other)


def _erf_of_arrays() -> Iterator[Replacement]:
    """A function of Python's own stood between NumPy and math.erf, called for each element."""
    from triton.runtime import interpreter

    def erf(*args: np.ndarray, **kwargs: object) -> np.ndarray:  # as np.vectorize declares itself
        (x,) = args
        return np.fromiter(map(math.erf, x.ravel().tolist()), x.dtype, x.size).reshape(x.shape)

    yield interpreter, "np_erf_fp32", erf
    yield interpreter, "np_erf_fp64", erf


def _checks_only_in_debug() -> Iterator[Replacement]:
    """Whether a sum of integers fits its type took eleven operations to find out, and is dropped unless one debugs."""
    from triton.language.semantic import TritonSemantic

    check = TritonSemantic.binary_op_sanitize_overflow_impl

    def check_in_debug(self, lhs, rhs, binary_op) -> None:
        if self.builder.options.debug:
            check(self, lhs, rhs, binary_op)

    yield TritonSemantic, "binary_op_sanitize_overflow_impl", check_in_debug


_PARTS = (
    _language_replaced_once,
    _direct_calls,
    _cached_numpy_types,
    _shared_shapes,
    _comparisons_by_identity,
    operand_replacements,
    _erf_of_arrays,
    _checks_only_in_debug,
)
