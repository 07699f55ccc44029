"""Accelerates Triton's interpreter, for fastbert's tests, benchmarks and command line; users never import this package.

Triton makes the same few types again at every operation and runs some thirty checks on two operands, which is most of the
tests' time. Each function here returns what the one it replaces returns: tests/test_interpreter.py shows that 13,000
operations on every pair of types give, bit for bit, the results of a process without replacements. All replacements are made
or none, and only on releases of triton that this test has passed on. The tests also make every int32 sum, product or cast
that overflows raise (tests/interpreter.py).
"""

import inspect
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

from fastbert.testing.interpreter.operands import operand_replacements

# The releases of triton on which tests/test_interpreter.py passes. On others, nothing is replaced. To add one, name it here
# and run that test under it.
RELEASES = ("3.6", "3.7", "3.8")

Replacement = tuple[object, str, object]  # owner, name, and what takes the place of `owner.name`

_MISSING = object()
logger = logging.getLogger(__name__)


@cache
def accelerate() -> None:
    """Replace the slowest functions of the interpreter in this process, if this release of triton is one of RELEASES."""
    import triton

    # Hashes overflow on purpose; NumPy warns of it, and a GPU does not.
    warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning, r"triton\.")
    if ".".join(triton.__version__.split(".")[:2]) not in RELEASES:
        logger.info("Triton's interpreter is not accelerated: triton %s is not one of %s", triton.__version__, RELEASES)
        return
    try:
        replace_all([replacement for part in _PARTS for replacement in part()])
    except (AttributeError, ImportError, TypeError) as error:
        logger.info("Triton's interpreter is not accelerated: %s", error)


def replace_all(replacements: Iterable[Replacement]) -> None:
    """Make all replacements, or none if one cannot be made.

    Raises:
        AttributeError: an attribute to replace does not exist.
        TypeError: a function and its replacement have different parameters.
    """
    replacements = list(replacements)
    for owner, name, new in replacements:
        if isinstance(new, property):  # replaces an attribute of instances, which the class does not have
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
    """The parameters of a function as text (names, kinds and defaults), without annotations."""
    return [str(p.replace(annotation=p.empty)) for p in inspect.signature(function).parameters.values()]


def _language_replaced_once() -> Iterator[Replacement]:
    """Replace triton.language's functions permanently: this process uses them in the interpreter only.

    The interpreter restores them after each launch and replaces them again, to the same effect, in every jit function that a
    kernel calls, which takes half of the time.
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
    """Removes two functions and a dictionary between a call of triton.language and its implementation."""
    from triton.runtime import interpreter

    def patch(obj, name, member, builder, scope) -> None:
        function = getattr(member, "__wrapped__", member)  # the wrapper rejects calls from outside a kernel

        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    yield interpreter, "_patch_attr", patch


def _cached_numpy_types() -> Iterator[Replacement]:
    """Caches NumPy types; Triton builds a dictionary of all types per lookup."""
    from triton.runtime import interpreter

    look_up, known = interpreter._get_np_dtype, {}

    def cached(tt_dtype):
        name = tt_dtype.scalar.name  # pointers and blocks are unhashable
        if name not in known:
            known[name] = look_up(tt_dtype.scalar)
        return known[name]

    yield interpreter, "_get_np_dtype", cached


def _shared_shapes() -> Iterator[Replacement]:
    """Shares the tuple and the product of a shape among all blocks and tensors; Triton makes them at every operation.

    A block's name, which only error messages use, is built on access.
    """
    import triton.language as tl
    from triton._utils import validate_block_shape
    from triton.language.semantic import TritonSemantic

    core = tl.core

    class Sizes(core.tuple):
        """The shape of a block; there is one object per shape, so that `is` compares shapes."""

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
    """Compares types by identity first, and returns values that are not constexpr at once; Triton compares names and lists."""
    import triton.language as tl

    core = tl.core
    unwrap, equal = core._unwrap_if_constexpr, core.dtype.__eq__
    itself = {int, float, bool, str, type(None), core.tensor}

    yield core, "_unwrap_if_constexpr", lambda o: o if type(o) in itself else unwrap(o)
    yield core.dtype, "__eq__", lambda self, other: self is other or equal(self, other)


def _erf_of_arrays() -> Iterator[Replacement]:
    """Applies math.erf to arrays directly; Triton goes through a Python function per element."""
    from triton.runtime import interpreter

    def erf(*args: np.ndarray, **kwargs: object) -> np.ndarray:  # as np.vectorize declares itself
        (x,) = args
        return np.fromiter(map(math.erf, x.ravel().tolist()), x.dtype, x.size).reshape(x.shape)

    yield interpreter, "np_erf_fp32", erf
    yield interpreter, "np_erf_fp64", erf


def _checks_only_in_debug() -> Iterator[Replacement]:
    """Checks integer overflow only in debug mode, where the result is used; the check takes eleven operations."""
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
