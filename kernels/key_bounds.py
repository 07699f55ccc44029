"""The bounds by which attention skips keys, per row of a mask: first key seen, number of leading keys seen, end of the last.

key_mask bool [B, S] with any strides, bounds int32 [B, 3]:

    forward    reads BS bytes, one program per row

Nothing is saved, and nothing has a gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .core.failures import or_plain
from .core.launch import choose, launch
from .core.op import define_op

__all__ = ["key_bounds"]


@triton.jit(do_not_specialize=["seqlen"])
def key_bounds_kernel(key_mask_ptr, bounds_ptr, mask_batch_stride, mask_k_stride, seqlen, BLOCK_N: tl.constexpr):
    batch = tl.program_id(0).to(tl.int64)
    key_mask_ptr += batch * mask_batch_stride

    first = tl.full([BLOCK_N], seqlen, tl.int32)
    leading = tl.full([BLOCK_N], seqlen, tl.int32)
    end = tl.full([BLOCK_N], 0, tl.int32)
    for start in range(0, seqlen, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < seqlen
        seen = tl.load(key_mask_ptr + keys.to(tl.int64) * mask_k_stride, inside, other=0) != 0
        first = tl.minimum(first, tl.where(seen, keys, seqlen))
        leading = tl.minimum(leading, tl.where(seen, seqlen, keys))
        end = tl.maximum(end, tl.where(seen, keys + 1, 0))

    bounds_ptr += batch * 3
    tl.store(bounds_ptr, tl.min(first, axis=0))
    tl.store(bounds_ptr + 1, tl.min(leading, axis=0))  # keys past the mask's end are not seen, and at least S
    tl.store(bounds_ptr + 2, tl.max(end, axis=0))


@or_plain(reference.key_bounds)
def _launch(key_mask: Tensor) -> Tensor:
    bounds = _allocate(key_mask)
    config = choose("mask_rows", bounds, key_mask.shape[1])
    launch(
        key_bounds_kernel,
        key_mask.shape[0],
        config,
        bounds,
        key_mask_ptr=key_mask,
        bounds_ptr=bounds,
        mask_batch_stride=key_mask.stride(0),
        mask_k_stride=key_mask.stride(1),
        seqlen=key_mask.shape[1],
        BLOCK_N=config.BLOCK_N,
    )
    return bounds


def _allocate(key_mask):
    return key_mask.new_empty((key_mask.shape[0], 3), dtype=torch.int32)


_call = define_op("key_bounds", (_launch, _allocate))


def key_bounds(key_mask: Tensor) -> Tensor:
    """The first key that is seen (S if none is), how many leading keys are seen without a gap, and the end of the last one
    seen.

    Args:
        key_mask: bool [B, S], any strides, true where a key is seen.

    Returns:
        int32 [B, 3], without a synchronisation.

    Raises:
        ValueError: a mask of another dtype or shape.
    """
    if key_mask.dtype != torch.bool or key_mask.dim() != 2:
        raise ValueError(f"key_mask: expected bool [B, S], got {key_mask.dtype} {tuple(key_mask.shape)}")
    return _call(key_mask)
