"""Attention's forward kernel: softmax(scale Q K' + mask) V with the softmax kept running over blocks of keys.

One program computes BLOCK_M queries of one head; GROUP neighbouring heads of queries share one of keys and values. Online
softmax: Milakov and Gimelshein, arXiv:1805.02867; tiling: FlashAttention-2 (Dao, arXiv:2307.08691).
"""

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    SIZES,
    keep_scores,
    load_tile,
    mask_scores,
    product,
    row_keys,
    sequence_bounds,
    store_softmax,
    store_tile,
    tile_pointers,
    visible_keys,
)


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    k_ptr,
    v_ptr,
    k_row_stride,
    k_col_stride,
    v_row_stride,
    v_col_stride,
    first_key,
    last_key,
    q_rows,
    row_key,
    seqlen_q,
    seqlen_k,
    key_mask_ptr,
    mask_ptr,
    mask_q_stride,
    mask_k_stride,
    MASK: tl.constexpr,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    P_DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Take keys first_key to last_key into the running softmax (acc, its total and the top score of each row)."""
    positions = tl.arange(0, BLOCK_M)
    for block in range(first_key, last_key, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, k_row_stride, k_col_stride, seqlen_k, D, BLOCK_D, MASK, ALIGNED)
        scores = product(q, tl.trans(k), None, PRECISION, ACC)
        if MASK:
            scores = mask_scores(
                scores * (SCALE * LOG2E),
                q_rows[:, None],
                keys[None, :],
                seqlen_q,
                seqlen_k,
                key_mask_ptr,
                mask_ptr,
                mask_q_stride,
                mask_k_stride,
                CAUSAL,
            )
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_top[:, None])
        else:  # scaled after the maximum, product and difference are one instruction
            if SCALE >= 0:
                new_top = tl.maximum(top, tl.max(scores, axis=1) * (SCALE * LOG2E))
            else:
                new_top = tl.maximum(top, tl.min(scores, axis=1) * (SCALE * LOG2E))
            weights = tl.exp2(scores * (SCALE * LOG2E) - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None]
        if P_DROP > 0:
            keep = keep_scores(row_key[:, None], positions[:, None], tl.arange(0, BLOCK_N)[None, :], block, P_DROP)
            weights = tl.where(keep, weights, 0.0)
        v = load_tile(v_ptr, keys, v_row_stride, v_col_stride, seqlen_k, D, BLOCK_D, MASK, ALIGNED)
        acc = product(weights.to(v.dtype), v, acc, PRECISION, ACC)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=SIZES)
def attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    logsumexp_ptr,
    key_mask_ptr,
    key_bounds_ptr,
    mask_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seed_ptr,
    q_batch_stride,
    q_row_stride,
    q_head_stride,
    q_col_stride,
    k_batch_stride,
    k_row_stride,
    k_head_stride,
    k_col_stride,
    v_batch_stride,
    v_row_stride,
    v_head_stride,
    v_col_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_q_stride,
    mask_k_stride,
    n_heads,
    max_seqlen_q,
    max_seqlen_k,
    n_rows,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    P_DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(max_seqlen_q, BLOCK_M)
    sequence_head = tl.program_id(0) // blocks  # blocks of one head are neighbours: its keys stay in the cache
    block = tl.program_id(0) % blocks
    batch = (sequence_head // n_heads).to(tl.int64)
    head = (sequence_head % n_heads).to(tl.int64)
    first_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q)
    first_k, seqlen_k = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k)
    if block * BLOCK_M >= seqlen_q:
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)

    if cu_seqlens_q_ptr is None:
        q_ptr += batch * q_batch_stride
        k_ptr += batch * k_batch_stride
        v_ptr += batch * v_batch_stride
        out_row = batch * max_seqlen_q
    else:
        q_ptr += first_q.to(tl.int64) * q_row_stride
        k_ptr += first_k.to(tl.int64) * k_row_stride
        v_ptr += first_k.to(tl.int64) * v_row_stride
        out_row = first_q.to(tl.int64)
    q_ptr += head * q_head_stride
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride

    every, some = visible_keys(
        key_bounds_ptr, mask_ptr, batch, block * BLOCK_M, (block + 1) * BLOCK_M, seqlen_q, seqlen_k, CAUSAL
    )
    if key_mask_ptr is not None:
        key_mask_ptr += batch * max_seqlen_k
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch_stride + head * mask_head_stride
    every = every // BLOCK_N * BLOCK_N

    q = load_tile(q_ptr, rows, q_row_stride, q_col_stride, seqlen_q, D, BLOCK_D, True, ALIGNED)
    row_key = rows
    if P_DROP > 0:
        row_key = row_keys(tl.load(seed_ptr), sequence_head, rows)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    acc, total, top = _attend(
        acc, total, top, q, k_ptr, v_ptr, k_row_stride, k_col_stride, v_row_stride, v_col_stride, 0, every,
        rows, row_key, seqlen_q, seqlen_k, key_mask_ptr, mask_ptr, mask_q_stride, mask_k_stride,
        False, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, k_ptr, v_ptr, k_row_stride, k_col_stride, v_row_stride, v_col_stride, every, some,
        rows, row_key, seqlen_q, seqlen_k, key_mask_ptr, mask_ptr, mask_q_stride, mask_k_stride,
        True, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    KEEP_SCALE: tl.constexpr = 1.0 / (1.0 - P_DROP) if P_DROP < 1 else 0.0
    # A packed sequence may have queries and no key: its sums are empty, and its output is 0.
    out = acc * (KEEP_SCALE / tl.where(total == 0, 1.0, total))[:, None]
    out_rows = out_row + rows
    out_head = out_ptr + head * D
    store_tile(tile_pointers(out_head, out_rows, n_heads * D, 1, BLOCK_D, False), out, rows, seqlen_q, D, BLOCK_D)
    if logsumexp_ptr is not None:  # what a backward needs
        WIDE: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth > 16
        here = logsumexp_ptr + head * n_rows + out_row
        store_softmax(here, n_heads.to(tl.int64) * n_rows, rows, seqlen_q, top, total, WIDE)
