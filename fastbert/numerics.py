"""Judges whether a kernel's result is right. The tests and `fastbert verify` use this one rule.

No result in float32, float16 or bfloat16 is exact, so the rule sets no fixed number of digits. It requires that the
kernel is not clearly worse than plain PyTorch in the same dtype, with both measured against float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """The verdict on one tensor: its largest absolute error, eager's, the bound, and the reason if it fails."""

    name: str
    error: float
    eager_error: float
    bound: float
    ok: bool
    reason: str | None


def compare(
    name: str,
    result: Tensor,
    eager: Tensor,
    reference: Tensor,
    *,
    atol: float = 0.0,
    relative_fp32: float | None = None,
) -> Comparison:
    """Judge `result` (the kernel's) against `eager` (plain PyTorch, same dtype), both measured against `reference`.

    It is right if its shape and dtype are eager's and every element satisfies

        |result - reference| <= 2 max|eager - reference| + eps max|reference| + atol

    where eps is that of the result's dtype and the maxima run over the finite elements of the tensor. NaN, infinity and
    minus infinity must be where eager has them; where eager and the reference both exceed the dtype's range, they may be
    as the reference has them instead. Tensors that are not floating point must equal eager's. A comparison fails if no
    element could be compared although the reference has finite ones. Empty tensors only need the right shape and dtype.

    This is the convention of FlashAttention's tests (Dao, https://github.com/Dao-AILab/flash-attention,
    tests/test_flash_attn.py): at most twice the error of a PyTorch implementation. The eps term is the rounding of the
    result itself, in case eager happens to be exact.

    Args:
        name: the name of the tensor, returned in the Comparison.
        result: the kernel's tensor.
        eager: the tensor from plain PyTorch in the same dtype.
        reference: the tensor in float64 (or float32, for a float16 or bfloat16 model too large for float64).
        atol: added to every bound, in units of the tensor.
        relative_fp32: if the result is float32, also require |result - reference| <= relative_fp32 max|reference| + atol.

    Returns:
        The Comparison. `error` and `eager_error` are the largest absolute errors, inf if nothing can be measured.

    Raises:
        ValueError: atol or relative_fp32 is negative or not finite.
    """
    for argument, value in (("atol", atol), ("relative_fp32", relative_fp32)):
        if value is not None and not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"{argument}: expected a finite number >= 0, got {value}")

    def failed(reason: str) -> Comparison:
        return Comparison(name, math.inf, math.inf, 0.0, False, reason)

    if result.dtype != eager.dtype:
        return failed(f"dtype is {result.dtype}, eager's is {eager.dtype}")
    for other, whose in ((eager, "eager's"), (reference, "the reference's")):
        if result.shape != other.shape:
            return failed(f"shape is {tuple(result.shape)}, {whose} is {tuple(other.shape)}")
    result, eager, reference = (t.detach() for t in (result, eager, reference))
    eager, reference = eager.to(result.device), reference.to(result.device)
    if not result.is_floating_point():
        return Comparison(name, 0.0, 0.0, 0.0, True, None) if torch.equal(result, eager) else failed("not eager's")
    if result.numel() == 0:
        return Comparison(name, 0.0, 0.0, atol, True, None)
    return _compare_numbers(name, result, eager, reference, atol, relative_fp32)


def _compare_numbers(
    name: str, result: Tensor, eager: Tensor, reference: Tensor, atol: float, relative_fp32: float | None
) -> Comparison:
    dtype = result.dtype
    representable = reference.to(dtype)  # out of the dtype's range becomes infinite, as in a correct result
    result, eager, reference = result.double(), eager.double(), reference.double()

    kind, eager_kind, reference_kind = _kind(result), _kind(eager), _kind(representable)
    overflowed = (eager_kind != _FINITE) & (reference_kind != _FINITE)
    misplaced = (kind != eager_kind) & ~(overflowed & (kind == reference_kind))
    compared = (kind == _FINITE) & (eager_kind == _FINITE) & (reference_kind == _FINITE)

    error = _largest(result - reference, compared)
    eager_error = _largest(eager - reference, compared)
    magnitude = _largest(reference, compared)
    bound = 2.0 * eager_error + torch.finfo(dtype).eps * magnitude + atol
    if relative_fp32 is not None and dtype == torch.float32:
        bound = min(bound, relative_fp32 * magnitude + atol)

    reason = None
    if misplaced.any():
        reason = _describe_misplaced(result, eager, misplaced)
    elif ((kind == _FINITE) & (reference_kind != _FINITE)).any():
        reason = "the reference is not finite where the result is"
    elif not compared.any() and (reference_kind == _FINITE).any():
        reason = "neither the result nor eager has a finite element, but the reference has: nothing was compared"
    elif not error <= bound:
        reason = f"error {error:.3g} is over the bound {bound:.3g} (eager's own error is {eager_error:.3g})"
    return Comparison(name, error, eager_error, bound, reason is None, reason)


_FINITE = 0


def _kind(x: Tensor) -> Tensor:
    """Per element: 0 finite, 1 NaN, 2 infinity, 3 minus infinity. A scalar 0 in the usual case that all are finite."""
    if math.isfinite(largest(x)):
        return torch.zeros((), dtype=torch.int64, device=x.device)
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()


def largest(x: Tensor) -> float:
    """The largest magnitude in x: NaN if x has a NaN, 0 if x is empty. One pass, without a temporary of x's size."""
    return torch.stack(torch.aminmax(x)).abs().max().item() if x.numel() else 0.0


def _largest(x: Tensor, where: Tensor) -> float:
    return largest(x if where.all() else x[where])


def _describe_misplaced(result: Tensor, eager: Tensor, misplaced: Tensor) -> str:
    first = tuple(int(place) for place in misplaced.nonzero()[0])
    return (
        f"NaN or infinity out of place at {int(misplaced.sum())} of {result.numel()} elements: "
        f"at {first} {float(result[first])}, eager's is {float(eager[first])}"
    )
