"""The one rule that says whether a kernel's result is right; the tests and `fastbert verify` both use it.

No result in float32, float16 or bfloat16 is exact, so the rule asks for no fixed number of digits. It asks that the
kernel is not clearly worse than plain PyTorch in the same dtype, both measured against float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """One tensor judged: its largest error, PyTorch's own, the bound, and why it fails where it does."""

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
    """Judge `result` (the kernel's) against `eager` (plain PyTorch, same dtype), both measured from `reference`.

    It is right when shape and dtype are eager's and every element satisfies

        |result - reference| <= 2 max|eager - reference| + eps max|reference| + atol

    where eps is that of the result's dtype and the maxima run over the finite elements of the tensor. NaN and the
    two infinities stand where eager has them; where eager and the reference both left the dtype's range, they may
    stand as the reference has them instead. Tensors that are not floating point have to equal eager's. A comparison
    in which no number could be compared although the reference holds some fails. Empty tensors are right when shape
    and dtype are.

    This is the convention of FlashAttention's tests (Dao, https://github.com/Dao-AILab/flash-attention,
    tests/test_flash_attn.py): at most twice the error of a PyTorch implementation. The term with eps is the rounding
    of the result itself, for the case that eager happens to be exact.

    Args:
        name: what the tensor is called in the answer.
        result: the kernel's tensor.
        eager: the same from plain PyTorch in the test's dtype.
        reference: the same in float64 (float32 will do for a float16 or bfloat16 model too large for float64).
        atol: added to every bound, in units of the tensor.
        relative_fp32: where the result is float32, additionally |result - reference| <= relative_fp32 max|reference|
            + atol.

    Returns:
        The Comparison. `error` and `eager_error` are the largest absolute errors, inf where nothing can be measured.

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
    representable = reference.to(dtype)  # what does not fit the dtype is infinite here, as it is in a right result
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
    """Per element: 0 finite, 1 NaN, 2 infinity, 3 minus infinity; one 0 for all where all are finite, as nearly always."""
    if math.isfinite(largest(x)):
        return torch.zeros((), dtype=torch.int64, device=x.device)
    return x.isnan() + 2 * x.isposinf() + 3 * x.isneginf()


def largest(x: Tensor) -> float:
    """The largest magnitude in x; NaN where x holds one; 0 of nothing. One pass, and no tensor is made."""
    return torch.stack(torch.aminmax(x)).abs().max().item() if x.numel() else 0.0


def _largest(x: Tensor, where: Tensor) -> float:
    return largest(x if where.all() else x[where])


def _describe_misplaced(result: Tensor, eager: Tensor, misplaced: Tensor) -> str:
    first = tuple(misplaced.nonzero()[0].tolist())
    return (
        f"NaN or infinity out of place at {int(misplaced.sum())} of {result.numel()} elements: "
        f"at {first} {float(result[first])}, eager's is {float(eager[first])}"
    )
