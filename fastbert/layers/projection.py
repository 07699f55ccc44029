"""Projects hidden states to queries, keys and values, as [..., heads, head size] views, in one product if that is safe.

No copy of weights is kept between calls. The weights of a shared product are concatenated at each call: a kept copy could
not be seen to be stale after a write through `.data`, and would hold memory that `model.to()` is meant to free.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.dispatch import is_plain, is_plain_tensor


def project(x: Tensor, linears: tuple[nn.Linear, ...], head_size: int) -> tuple[Tensor, ...]:
    """linear(x) as [..., heads, head size], for each of `linears`.

    Plain Linears of the same shape, dtype and device share one product over their concatenated weights; parameters,
    gradients and state_dict stay separate. Other modules (LoRA, 4-bit, hooked) are called one by one.
    """
    if not _side_by_side(linears):
        return tuple(linear(x).unflatten(-1, (-1, head_size)) for linear in linears)
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    packed = F.linear(x, weight, bias).unflatten(-1, (len(linears), -1, head_size))
    if torch.compiler.is_compiling() or not packed.requires_grad:
        return packed.unbind(-3)
    return _Unbind.apply(packed)


def _side_by_side(linears: tuple[nn.Linear, ...]) -> bool:
    first = linears[0]
    return all(
        is_plain(linear, nn.Linear)
        and is_plain_tensor(linear.weight)
        and linear.weight.shape == first.weight.shape
        and linear.weight.dtype == first.weight.dtype
        and linear.weight.device == first.weight.device
        and (linear.bias is None) == (first.bias is None)
        for linear in linears
    )


class _Unbind(torch.autograd.Function):
    """unbind(-3) whose backward returns the buffer that attention's backward wrote, instead of stacking the slices again."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> tuple[Tensor, ...]:
        ctx.shape = packed.shape
        return packed.unbind(-3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = _one_buffer(grads, ctx.shape)
        return torch.stack(grads, dim=-3) if whole is None else whole


def _one_buffer(grads: tuple[Tensor, ...], shape: torch.Size) -> Tensor | None:
    """The contiguous tensor of `shape` whose slices the gradients are, or None."""
    first = grads[0]
    strides = torch.empty(shape, device="meta").stride()
    step = strides[-3]
    for i, grad in enumerate(grads):
        if (
            grad.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or grad.storage_offset() != first.storage_offset() + i * step
            or grad.stride() != (*strides[:-3], *strides[-2:])
        ):
            return None
    return first.as_strided(shape, strides)
