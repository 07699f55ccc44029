"""Converts two operands of Triton's interpreter to a common type and shape quickly; see `fastbert.testing.interpreter`."""

from collections.abc import Iterator
from functools import cache

import numpy as np


def operand_replacements() -> Iterator[tuple[object, str, object]]:
    """Converts two operands without the some thirty checks of Triton, and without copying them to a common shape.

    NumPy broadcasts by itself, and its element-wise arithmetic is all that uses the two operands afterwards.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    core, convert, cast = tl.core, TritonSemantic.binary_op_type_checking_impl, TritonSemantic.cast
    tensor, pointer = core.tensor, core.pointer_type
    names = (*core.dtype.SINT_TYPES, *core.dtype.UINT_TYPES, *core.dtype.STANDARD_FP_TYPES)
    numbers = {id(dtype): dtype for dtype in vars(core).values() if type(dtype) is core.dtype and dtype.name in names}
    integers = {key for key, dtype in numbers.items() if dtype.is_int()}

    @cache
    def common(semantic, one: int, other: int, divides: bool):
        return semantic.computation_type_impl(numbers[one], False, numbers[other], False, divides)

    @cache
    def casts_in_one_step(source: int, target: int) -> bool:
        """Whether a cast is one NumPy cast: to int1 it is a comparison, and from 16-bit types it goes through float32."""
        one, other = numbers[source], numbers[target]
        if one is tl.bfloat16 or other is tl.bfloat16 or other is tl.int1:
            return False
        return one is not tl.float16 or other is tl.float32

    def cast_quickly(self, input, dst_ty, fp_downcast_rounding=None):
        source, target = id(input.dtype), id(dst_ty.scalar)
        if source == target:
            return input
        if fp_downcast_rounding or source not in numbers or target not in numbers or not casts_in_one_step(source, target):
            return cast(self, input, dst_ty, fp_downcast_rounding)
        result = numbers[target]
        return tensor(
            self.builder.cast_impl(input.handle, result),
            core.block_type(result, input.type.shape) if input.type.is_block() else result,
        )

    @cache
    def joint(lhs: tuple[int, ...], rhs: tuple[int, ...]):
        return core.block_type(tl.int1, list(np.broadcast_shapes(lhs, rhs))).shape

    def meet(lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        left, right = lhs.handle, rhs.handle
        shape = joint(left.data.shape if lhs.type.is_block() else (), right.data.shape if rhs.type.is_block() else ())
        return tensor(left, core.block_type(lhs.dtype, shape)), tensor(right, core.block_type(rhs.dtype, shape))

    constants: dict[tuple, tensor] = {}

    def constant(self, value, like, divides):
        """`value` as `convert` returns it for the operand `like`, or None if `convert` changes the type of `like`."""
        key = type(value), value, id(like.dtype), id(like.shape), divides
        if key not in constants:
            one, other = convert(self, like, value, div_or_mod=divides)
            if one is not like:
                return None
            if len(constants) >= 1000:
                constants.clear()
            constants[key] = other
        return constants[key]

    def convert_quickly(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        if arithmetic_check:
            if type(lhs) is tensor and type(rhs) is tensor:
                one, other = id(lhs.dtype), id(rhs.dtype)
                if one in numbers and other in numbers:
                    if one != other or div_or_mod:
                        dtype = common(self, one, other, div_or_mod)
                        lhs, rhs = self.cast(lhs, dtype), self.cast(rhs, dtype)
                    return meet(lhs, rhs)
                if allow_lhs_ptr and type(lhs.dtype) is pointer and other in integers:
                    return meet(lhs, rhs)
            elif type(rhs) in (int, float) and type(lhs) is tensor and id(lhs.dtype) in numbers:
                found = constant(self, rhs, lhs, div_or_mod)
                if found is not None:
                    return lhs, found
            elif type(lhs) in (int, float) and type(rhs) is tensor and id(rhs.dtype) in numbers:
                found = constant(self, lhs, rhs, div_or_mod)
                if found is not None:
                    return found, rhs
        return convert(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    yield TritonSemantic, "binary_op_type_checking_impl", convert_quickly
    yield TritonSemantic, "cast", cast_quickly
