"""Attention's gradients of a short sequence: a program a head, which makes scores and dP once for all three of them.

The equations are in attention_backward.py. All queries of a sequence are the rows of one tile, so that one block of keys after
the other has its dK and dV at once, and dQ adds up on the way: five products instead of seven, and one launch. For 16 bits: in
32 and 64 delta would need a pass of its own (attention_backward_q.py), and the tile more registers than there are.
"""

import triton
import triton.language as tl

from .attention_tiles import (
    LOG2E,
    SIZES,
    keep_scores,
    load_softmax,
    load_tile,
    mask_scores,
    probabilities,
    product,
    row_keys,
    sequence_bounds,
    store_tile,
    tile_pointers,
    visible_keys,
)


@triton.jit
def _add_keys(
    dq,
    q,
    dout,
    logsumexp,
    delta,
    row_key,
    k_ptr,
    v_ptr,
    dk_ptr,
    dv_ptr,
    k_row_stride,
    k_col_stride,
    v_row_stride,
    v_col_stride,
    dkv_row_stride,
    first_key,
    last_key,
    seqlen_q,
    seqlen_k,
    key_mask_ptr,
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
    """dq with the part of keys first_key to last_key added, whose own gradients are stored."""
    KEEP_SCALE: tl.constexpr = 1.0 / (1.0 - P_DROP) if P_DROP < 1 else 0.0
    rows = tl.arange(0, BLOCK_M)
    for block in tl.range(first_key, last_key, BLOCK_N, disable_licm=True):
        keys = block + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, k_row_stride, k_col_stride, seqlen_k, D, BLOCK_D, MASK, ALIGNED)
        v = load_tile(v_ptr, keys, v_row_stride, v_col_stride, seqlen_k, D, BLOCK_D, MASK, ALIGNED)
        scores = product(q, tl.trans(k), None, PRECISION, ACC) * (SCALE * LOG2E)
        if MASK:
            scores = mask_scores(
                scores, rows[:, None], keys[None, :], seqlen_q, seqlen_k, key_mask_ptr, None, 0, 0, CAUSAL
            )
        weights = probabilities(scores, logsumexp[:, None], logsumexp[:, None], seqlen_k, MASK, False)
        dweights = product(dout, tl.trans(v), None, PRECISION, ACC)
        dropped = weights
        if P_DROP > 0:
            keep = keep_scores(row_key[:, None], rows[:, None], tl.arange(0, BLOCK_N)[None, :], block, P_DROP)
            dropped = tl.where(keep, weights, 0.0)
            dweights = tl.where(keep, dweights, 0.0) * KEEP_SCALE
        dscores = (weights * (dweights - delta[:, None])).to(q.dtype)
        dv = product(tl.trans(dropped.to(dout.dtype)), dout, None, PRECISION, ACC)
        dv_rows = tile_pointers(dv_ptr, keys, dkv_row_stride, 1, BLOCK_D, ALIGNED)
        store_tile(dv_rows, dv * KEEP_SCALE, keys, seqlen_k, D, BLOCK_D)
        dk = product(tl.trans(dscores), q, None, PRECISION, ACC)
        dk_rows = tile_pointers(dk_ptr, keys, dkv_row_stride, 1, BLOCK_D, ALIGNED)
        store_tile(dk_rows, dk * SCALE, keys, seqlen_k, D, BLOCK_D)
        dq = product(dscores, k, dq, PRECISION, ACC)
    return dq


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_short_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    out_ptr,
    logsumexp_ptr,
    key_mask_ptr,
    key_bounds_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seed_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
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
    dout_batch_stride,
    dout_row_stride,
    dout_head_stride,
    dout_col_stride,
    dq_row_stride,
    dkv_row_stride,
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
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence_head = tl.program_id(0)
    batch = (sequence_head // n_heads).to(tl.int64)
    head = (sequence_head % n_heads).to(tl.int64)
    first_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q)
    first_k, seqlen_k = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k)
    rows = tl.arange(0, BLOCK_M)
    if cu_seqlens_q_ptr is None:
        first_row = batch * max_seqlen_q
        first_key_row = batch * max_seqlen_k
        q_ptr += batch * q_batch_stride
        k_ptr += batch * k_batch_stride
        v_ptr += batch * v_batch_stride
        dout_ptr += batch * dout_batch_stride
    else:
        first_row = first_q.to(tl.int64)
        first_key_row = first_k.to(tl.int64)
        q_ptr += first_row * q_row_stride
        k_ptr += first_key_row * k_row_stride
        v_ptr += first_key_row * v_row_stride
        dout_ptr += first_row * dout_row_stride
    q_ptr += head * q_head_stride
    k_ptr += head * k_head_stride
    v_ptr += head * v_head_stride
    dout_ptr += head * dout_head_stride
    out_ptr += first_row * (n_heads * D) + head * D
    dq_ptr += first_row * dq_row_stride + head * D
    dk_ptr += first_key_row * dkv_row_stride + head * D
    dv_ptr += first_key_row * dkv_row_stride + head * D

    every, some = visible_keys(key_bounds_ptr, None, batch, 0, BLOCK_M, seqlen_q, seqlen_k, CAUSAL)
    every = every // BLOCK_N * BLOCK_N
    if key_mask_ptr is not None:
        key_mask_ptr += batch * max_seqlen_k
    some = tl.where(seqlen_q > 0, some, 0)
    every = tl.minimum(every, some)

    dout = load_tile(dout_ptr, rows, dout_row_stride, dout_col_stride, seqlen_q, D, BLOCK_D, True, ALIGNED)
    out = load_tile(out_ptr, rows, n_heads * D, 1, seqlen_q, D, BLOCK_D, True, ALIGNED)
    delta = tl.sum(dout.to(ACC) * out.to(ACC), axis=1)
    q = load_tile(q_ptr, rows, q_row_stride, q_col_stride, seqlen_q, D, BLOCK_D, True, ALIGNED)
    plane = n_heads.to(tl.int64) * n_rows
    logsumexp, _ = load_softmax(logsumexp_ptr + head * n_rows + first_row, plane, rows, seqlen_q, False)
    row_key = rows
    if P_DROP > 0:
        row_key = row_keys(tl.load(seed_ptr), sequence_head, rows)

    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    dq = _add_keys(
        dq, q, dout, logsumexp, delta, row_key, k_ptr, v_ptr, dk_ptr, dv_ptr, k_row_stride, k_col_stride, v_row_stride,
        v_col_stride, dkv_row_stride, 0, every, seqlen_q, seqlen_k, key_mask_ptr,
        False, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _add_keys(
        dq, q, dout, logsumexp, delta, row_key, k_ptr, v_ptr, dk_ptr, dv_ptr, k_row_stride, k_col_stride, v_row_stride,
        v_col_stride, dkv_row_stride, every, some, seqlen_q, seqlen_k, key_mask_ptr,
        True, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq_rows = tile_pointers(dq_ptr, rows, dq_row_stride, 1, BLOCK_D, ALIGNED)
    store_tile(dq_rows, dq * SCALE, rows, seqlen_q, D, BLOCK_D)
    for block in range(tl.cdiv(some, BLOCK_N) * BLOCK_N, seqlen_k, BLOCK_N):  # keys that no query sees
        keys = block + tl.arange(0, BLOCK_N)
        dk_rows = tile_pointers(dk_ptr, keys, dkv_row_stride, 1, BLOCK_D, ALIGNED)
        dv_rows = tile_pointers(dv_ptr, keys, dkv_row_stride, 1, BLOCK_D, ALIGNED)
        nothing = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        store_tile(dk_rows, nothing, keys, seqlen_k, D, BLOCK_D)
        store_tile(dv_rows, nothing, keys, seqlen_k, D, BLOCK_D)
