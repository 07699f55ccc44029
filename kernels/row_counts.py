"""Per row of a batch: how many positions are tokens, how many are read, and whether a position that is read is padding.

tokens and read bool [B, S] with any strides, one of which may be None; counts int32 [3, B]:

    forward    reads 2BS bytes, one program per row

Nothing is saved, and nothing has a gradient. packed_rows packs by these numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .core.checks import check_device
from .core.failures import or_plain
from .core.launch import choose, launch
from .core.op import define_op

__all__ = ["row_counts"]


@triton.jit(do_not_specialize=["n_sequences", "seqlen"])
def row_counts_kernel(
    tokens_ptr,
    read_ptr,
    counts_ptr,
    tokens_batch_stride,
    tokens_col_stride,
    read_batch_stride,
    read_col_stride,
    n_sequences,
    seqlen,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    n_tokens = tl.zeros([BLOCK_N], tl.int32)
    n_read = tl.zeros([BLOCK_N], tl.int32)
    missing = tl.zeros([BLOCK_N], tl.int32)

    for start in range(0, seqlen, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        inside = cols < seqlen
        cols = cols.to(tl.int64)
        read = (cols == 0) & inside  # by default the first position is read
        if read_ptr is not None:
            read = tl.load(read_ptr + batch * read_batch_stride + cols * read_col_stride, inside, other=0) != 0
            n_read += read.to(tl.int32)
        if tokens_ptr is not None:
            token = tl.load(tokens_ptr + batch * tokens_batch_stride + cols * tokens_col_stride, inside, other=0) != 0
            n_tokens += token.to(tl.int32)
            missing |= (read & (token == 0)).to(tl.int32)

    counts_ptr += batch
    tl.store(counts_ptr, tl.sum(n_tokens, axis=0))
    tl.store(counts_ptr + n_sequences, tl.sum(n_read, axis=0))
    tl.store(counts_ptr + 2 * n_sequences.to(tl.int64), tl.max(missing, axis=0))


@or_plain(reference.row_counts)
def _launch(tokens: Tensor | None, read: Tensor | None) -> Tensor:
    counts = _allocate(tokens, read)
    either = read if tokens is None else tokens
    config = choose("mask_rows", counts, either.shape[1])
    launch(
        row_counts_kernel,
        either.shape[0],
        config,
        counts,
        tokens_ptr=tokens,
        read_ptr=read,
        counts_ptr=counts,
        tokens_batch_stride=0 if tokens is None else tokens.stride(0),
        tokens_col_stride=0 if tokens is None else tokens.stride(1),
        read_batch_stride=0 if read is None else read.stride(0),
        read_col_stride=0 if read is None else read.stride(1),
        n_sequences=either.shape[0],
        seqlen=either.shape[1],
        BLOCK_N=config.BLOCK_N,
    )
    return counts


def _allocate(tokens, read):
    either = read if tokens is None else tokens
    return either.new_empty((3, either.shape[0]), dtype=torch.int32)


_call = define_op("row_counts", (_launch, _allocate))


def row_counts(tokens: Tensor | None, read: Tensor | None) -> Tensor:
    """The number of tokens in each row, the number of positions that are read, and 1 where one of those is padding.

    Args:
        tokens: bool [B, S], any strides; None: unknown, and both the number of tokens and the third count are 0.
        read: bool [B, S], any strides; None: the first position of each row, which is not counted.

    Returns:
        int32 [3, B], without a synchronisation.

    Raises:
        ValueError: both are None, or masks of another dtype, of two shapes or on two devices.
    """
    masks = [(name, mask) for name, mask in (("tokens", tokens), ("read", read)) if mask is not None]
    if not masks:
        raise ValueError("tokens: expected bool [B, S] for tokens or read, got None for both")
    like = masks[0][1]
    for name, mask in masks:
        if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape != like.shape:
            expected = "[B, S]" if mask is like else f"{tuple(like.shape)}"
            raise ValueError(f"{name}: expected bool {expected}, got {mask.dtype} {tuple(mask.shape)}")
        check_device(name, mask, like)
    return _call(tokens, read)
