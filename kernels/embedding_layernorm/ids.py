"""The ids of packed rows, which embedding_layernorm's kernels read when they run over some rows of a batch only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.failures import or_plain
from ..core.launch import cdiv, choose, launch
from . import plain


@triton.jit(do_not_specialize=["n_rows", "seqlen", "offset"])
def embedding_layernorm_ids_kernel(
    index_ptr,
    ids_ptr,
    type_ids_ptr,
    position_ids_ptr,
    packed_ids_ptr,
    packed_type_ids_ptr,
    packed_position_ids_ptr,
    type_batch_stride,
    position_batch_stride,
    n_rows,
    seqlen,
    offset,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = rows < n_rows
    sources = tl.maximum(tl.load(index_ptr + rows, mask, other=0), 0)
    batch, place = (sources // seqlen).to(tl.int64), sources % seqlen

    tl.store(packed_ids_ptr + rows, tl.load(ids_ptr + sources, mask, other=0), mask)
    if type_ids_ptr is not None:
        type_ids = tl.load(type_ids_ptr + batch * type_batch_stride + place, mask, other=0)
        tl.store(packed_type_ids_ptr + rows, type_ids, mask)
    position_ids = (offset + place).to(tl.int64)
    if position_ids_ptr is not None:
        position_ids = tl.load(position_ids_ptr + batch * position_batch_stride + place, mask, other=0)
    tl.store(packed_position_ids_ptr + rows, position_ids, mask)


@or_plain(plain.packed_ids)
def packed_ids(
    index: Tensor, ids: Tensor, type_ids: Tensor | None, position_ids: Tensor | None, offset: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The ids, types (None if none are given) and positions of the rows `index` [N] of a batch [..., S], each int64 [1, N].

    type_ids and position_ids are given per sequence or once for all; without position_ids, positions count from `offset`. An
    index below 0 takes the ids of the first row.
    """
    seqlen, n_rows = ids.shape[-1], index.shape[0]
    words, positions = (ids.new_empty((1, n_rows), dtype=torch.int64) for _ in range(2))
    types = None if type_ids is None else torch.empty_like(words)
    config = choose("mask_rows", index, n_rows)
    launch(
        embedding_layernorm_ids_kernel,
        cdiv(n_rows, config.BLOCK_N),
        config,
        index,
        index_ptr=index,
        ids_ptr=ids.contiguous(),
        type_ids_ptr=None if type_ids is None else type_ids.contiguous(),
        position_ids_ptr=None if position_ids is None else position_ids.contiguous(),
        packed_ids_ptr=words,
        packed_type_ids_ptr=types,
        packed_position_ids_ptr=positions,
        type_batch_stride=batch_stride(type_ids, ids.shape),
        position_batch_stride=batch_stride(position_ids, ids.shape),
        n_rows=n_rows,
        seqlen=seqlen,
        offset=offset,
        BLOCK_N=config.BLOCK_N,
    )
    return words, types, positions


def batch_stride(ids: Tensor | None, shape: torch.Size) -> int:
    """The stride from one sequence's ids to the next one's; 0 where one row of ids serves all sequences."""
    return 0 if ids is None or ids.shape != shape else shape[-1]
