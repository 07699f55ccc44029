"""Attention's gradient of the queries: a program a block of queries, over all keys that they see.

The equations are in backward_kv.py.
"""

import triton
import triton.language as tl

from .tiles import (
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
    store_queries,
    store_row,
    store_tile,
    tile_pointers,
    visible_keys,
)


@triton.jit
def _weights_of_keys(
    q,
    dout,
    logsumexp,
    share,
    row_key,
    k_ptr,
    v_ptr,
    k_row_stride,
    k_col_stride,
    v_row_stride,
    v_col_stride,
    block,
    rows,
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
    """(k, P, dP) of the keys that start at `block`."""
    KEEP_SCALE: tl.constexpr = 1.0 / (1.0 - P_DROP) if P_DROP < 1 else 0.0
    WIDE: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth > 16
    keys = block + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, keys, k_row_stride, k_col_stride, seqlen_k, D, BLOCK_D, MASK, ALIGNED)
    v = load_tile(v_ptr, keys, v_row_stride, v_col_stride, seqlen_k, D, BLOCK_D, MASK, ALIGNED)
    scores = product(q, tl.trans(k), None, PRECISION, ACC) * (SCALE * LOG2E)
    if MASK:
        scores = mask_scores(
            scores,
            rows[:, None],
            keys[None, :],
            seqlen_q,
            seqlen_k,
            key_mask_ptr,
            mask_ptr,
            mask_q_stride,
            mask_k_stride,
            CAUSAL,
        )
    weights = probabilities(scores, logsumexp[:, None], share[:, None], seqlen_k, MASK, WIDE)
    dweights = product(dout, tl.trans(v), None, PRECISION, ACC)
    if P_DROP > 0:
        positions = tl.arange(0, BLOCK_M)
        keep = keep_scores(row_key[:, None], positions[:, None], tl.arange(0, BLOCK_N)[None, :], block, P_DROP)
        dweights = tl.where(keep, dweights, 0.0) * KEEP_SCALE  # one instruction with the difference that follows
    return k, weights, dweights


@triton.jit
def _add_keys(
    dq,
    q,
    dout,
    logsumexp,
    share,
    delta,
    row_key,
    k_ptr,
    v_ptr,
    k_row_stride,
    k_col_stride,
    v_row_stride,
    v_col_stride,
    first_key,
    last_key,
    rows,
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
    """dq with the part of keys first_key to last_key added."""
    for block in range(first_key, last_key, BLOCK_N):
        k, weights, dweights = _weights_of_keys(
            q, dout, logsumexp, share, row_key, k_ptr, v_ptr, k_row_stride, k_col_stride, v_row_stride, v_col_stride,
            block, rows, seqlen_q, seqlen_k, key_mask_ptr, mask_ptr, mask_q_stride, mask_k_stride,
            MASK, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        dscores = weights * (dweights - delta[:, None])
        dq = product(dscores.to(k.dtype), k, dq, PRECISION, ACC)
    return dq


@triton.jit
def _add_delta(
    delta,
    q,
    dout,
    logsumexp,
    share,
    row_key,
    k_ptr,
    v_ptr,
    k_row_stride,
    k_col_stride,
    v_row_stride,
    v_col_stride,
    first_key,
    last_key,
    rows,
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
    """delta with the part of keys first_key to last_key added."""
    for block in range(first_key, last_key, BLOCK_N):
        _, weights, dweights = _weights_of_keys(
            q, dout, logsumexp, share, row_key, k_ptr, v_ptr, k_row_stride, k_col_stride, v_row_stride, v_col_stride,
            block, rows, seqlen_q, seqlen_k, key_mask_ptr, mask_ptr, mask_q_stride, mask_k_stride,
            MASK, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        delta += tl.sum(weights * dweights, axis=1)
    return delta


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    queries_ptr,
    key_mask_ptr,
    key_bounds_ptr,
    mask_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    out_ptr,
    logsumexp_ptr,
    seed_ptr,
    dq_ptr,
    sums_ptr,
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
    mask_batch_stride,
    mask_head_stride,
    mask_q_stride,
    mask_k_stride,
    dq_row_stride,
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
    """With sums [sequences x blocks, heads x D] also the sums of each block's dq, as they are before rounding."""
    blocks = tl.cdiv(max_seqlen_q, BLOCK_M)
    sequence_head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch = (sequence_head // n_heads).to(tl.int64)
    head = (sequence_head % n_heads).to(tl.int64)
    first_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q)
    first_k, seqlen_k = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k)
    if block * BLOCK_M >= seqlen_q:
        if sums_ptr is not None:
            nothing = tl.zeros([BLOCK_D], ACC)
            store_row(sums_ptr + ((batch * blocks + block) * n_heads + head) * D, nothing, D, BLOCK_D)
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if cu_seqlens_q_ptr is None:
        first_row = batch * max_seqlen_q
        q_ptr += batch * q_batch_stride
        k_ptr += batch * k_batch_stride
        v_ptr += batch * v_batch_stride
        dout_ptr += batch * dout_batch_stride
    else:
        first_row = first_q.to(tl.int64)
        q_ptr += first_row * q_row_stride
        k_ptr += first_k.to(tl.int64) * k_row_stride
        v_ptr += first_k.to(tl.int64) * v_row_stride
        dout_ptr += first_row * dout_row_stride
    q_ptr += head * q_head_stride
    k_ptr += head // GROUP * k_head_stride
    v_ptr += head // GROUP * v_head_stride
    dout_ptr += head * dout_head_stride

    every, some = visible_keys(
        key_bounds_ptr, mask_ptr, batch, block * BLOCK_M, (block + 1) * BLOCK_M, seqlen_q, seqlen_k, CAUSAL
    )
    every = every // BLOCK_N * BLOCK_N
    if key_mask_ptr is not None:
        key_mask_ptr += batch * max_seqlen_k
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch_stride + head * mask_head_stride

    q = load_tile(q_ptr, rows, q_row_stride, q_col_stride, seqlen_q, D, BLOCK_D, True, ALIGNED)
    dout = load_tile(dout_ptr, rows, dout_row_stride, dout_col_stride, seqlen_q, D, BLOCK_D, True, ALIGNED)
    here = head * n_rows + first_row
    WIDE: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth > 16
    logsumexp, share = load_softmax(logsumexp_ptr + here, n_heads.to(tl.int64) * n_rows, rows, seqlen_q, WIDE)
    row_key = rows
    if P_DROP > 0:
        row_key = row_keys(tl.load(seed_ptr), sequence_head, rows)
    if WIDE:
        # From the same dP as the gradients below, so that they add up to 0 over a row as exactly as eager's do: keys have
        # much in common, and whatever is left over is multiplied by that. In 16 bits their own rounding is far more.
        delta = tl.zeros([BLOCK_M], ACC)
        delta = _add_delta(
            delta, q, dout, logsumexp, share, row_key, k_ptr, v_ptr, k_row_stride, k_col_stride, v_row_stride, v_col_stride,
            0, every, rows, seqlen_q, seqlen_k, key_mask_ptr, mask_ptr, mask_q_stride, mask_k_stride,
            False, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        delta = _add_delta(
            delta, q, dout, logsumexp, share, row_key, k_ptr, v_ptr, k_row_stride, k_col_stride, v_row_stride, v_col_stride,
            every, some, rows, seqlen_q, seqlen_k, key_mask_ptr, mask_ptr, mask_q_stride, mask_k_stride,
            True, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        out_ptr += first_row * (n_heads * D) + head * D
        out = load_tile(out_ptr, rows, n_heads * D, 1, seqlen_q, D, BLOCK_D, True, ALIGNED)
        delta = tl.sum(dout.to(ACC) * out.to(ACC), axis=1)
    store_queries(queries_ptr + here * 4, rows, seqlen_q, logsumexp, share, delta * (1.0 - P_DROP), row_key)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    dq = _add_keys(
        dq, q, dout, logsumexp, share, delta, row_key, k_ptr, v_ptr, k_row_stride, k_col_stride, v_row_stride, v_col_stride,
        0, every, rows, seqlen_q, seqlen_k, key_mask_ptr, mask_ptr, mask_q_stride, mask_k_stride,
        False, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _add_keys(
        dq, q, dout, logsumexp, share, delta, row_key, k_ptr, v_ptr, k_row_stride, k_col_stride, v_row_stride, v_col_stride,
        every, some, rows, seqlen_q, seqlen_k, key_mask_ptr, mask_ptr, mask_q_stride, mask_k_stride,
        True, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq_rows = tile_pointers(dq_ptr + head * D, first_row + rows, dq_row_stride, 1, BLOCK_D, ALIGNED)
    dq *= SCALE
    store_tile(dq_rows, dq, rows, seqlen_q, D, BLOCK_D)
    if sums_ptr is not None:  # rows past the last are 0
        store_row(sums_ptr + ((batch * blocks + block) * n_heads + head) * D, tl.sum(dq, axis=0), D, BLOCK_D)
