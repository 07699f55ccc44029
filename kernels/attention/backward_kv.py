"""Attention's backward kernels. Each computes its scores again and sums in one order: no atomics, the same bits.

With P = softmax(scores), Z the dropped and rescaled P, and O = Z V:

    dV = Z' dO        dP = dropout'(dO V')        dS = P (dP - delta), delta = rowsum(dO O)        dQ = dS K, dK = dS' Q

delta as a row sum: FlashAttention (Dao et al., arXiv:2205.14135, appendix B.2). It holds with dropout too, since O has it.
"""

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    SIZES,
    keep_scores,
    load_queries,
    load_tile,
    mask_scores,
    probabilities,
    product,
    sees_none,
    sequence_bounds,
    store_row,
    store_tile,
    tile_pointers,
)


@triton.jit
def _add_queries(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    queries_ptr,
    q_row_stride,
    q_col_stride,
    dout_row_stride,
    dout_col_stride,
    first_query,
    last_query,
    first_key,
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
    """dk and dv with the part of queries first_query to last_query added, both (1 - p) times what they are meant to be.

    Tiles are [keys, queries].
    """
    WIDE: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth > 16
    keys = first_key + tl.arange(0, BLOCK_N)
    for block in range(first_query, last_query, BLOCK_M):
        rows = block + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr, rows, q_row_stride, q_col_stride, seqlen_q, D, BLOCK_D, True, ALIGNED)
        dout = load_tile(dout_ptr, rows, dout_row_stride, dout_col_stride, seqlen_q, D, BLOCK_D, True, ALIGNED)
        logsumexp, share, delta, row_key = load_queries(queries_ptr, rows, seqlen_q, ACC)

        scores = product(k, tl.trans(q), None, PRECISION, ACC) * (SCALE * LOG2E)
        if MASK:
            scores = mask_scores(
                scores,
                rows[None, :],
                keys[:, None],
                seqlen_q,
                seqlen_k,
                key_mask_ptr,
                mask_ptr,
                mask_q_stride,
                mask_k_stride,
                CAUSAL,
            )
        weights = probabilities(scores, logsumexp[None, :], share[None, :], seqlen_k, MASK, WIDE)
        dweights = product(v, tl.trans(dout), None, PRECISION, ACC)
        dropped = weights
        if P_DROP > 0:
            positions = tl.arange(0, BLOCK_M)
            keep = keep_scores(row_key[None, :], positions[None, :], tl.arange(0, BLOCK_N)[:, None], first_key, P_DROP)
            dropped = tl.where(keep, weights, 0.0)
        dv = product(dropped.to(dout.dtype), dout, dv, PRECISION, ACC)
        # P (dropout'(dP) - delta), with one choice a score. A dP that is not finite stays so where it is dropped: the value or
        # the upstream gradient that it is made of has spoiled all outputs or all of dv by then, for 0 times it is NaN.
        dscores = dropped * dweights - weights * delta[None, :]
        dk = product(dscores.to(q.dtype), q, dk, PRECISION, ACC)
    return dk, dv


@triton.jit
def _add_heads(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    queries_ptr,
    q_row_stride,
    q_head_stride,
    q_col_stride,
    dout_row_stride,
    dout_head_stride,
    dout_col_stride,
    kv_head,
    n_rows,
    first_query,
    last_query,
    first_key,
    seqlen_q,
    seqlen_k,
    key_mask_ptr,
    mask_ptr,
    mask_head_stride,
    mask_q_stride,
    mask_k_stride,
    MASK: tl.constexpr,
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
    """dk and dv with the part of these queries added, of every head that shares the keys, one after the other."""
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_mask_ptr = mask_ptr
        if mask_ptr is not None:
            head_mask_ptr += head * mask_head_stride
        dk, dv = _add_queries(
            dk, dv, k, v, q_ptr + head * q_head_stride, dout_ptr + head * dout_head_stride,
            queries_ptr + head * n_rows * 4, q_row_stride, q_col_stride, dout_row_stride, dout_col_stride,
            first_query, last_query, first_key, seqlen_q, seqlen_k, key_mask_ptr, head_mask_ptr, mask_q_stride, mask_k_stride,
            MASK, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    return dk, dv


@triton.jit
def _store_sums(ptr, dk, dv, row, kv_head, kv_heads, D: tl.constexpr, BLOCK_D: tl.constexpr):
    ptr += (row * 2 * kv_heads + kv_head) * D
    store_row(ptr, dk, D, BLOCK_D)
    store_row(ptr + kv_heads * D, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_kv_kernel(
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
    dk_ptr,
    dv_ptr,
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
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """With sums [sequences x blocks, 2 x kv heads x D] also the sums of each block's dk and dv, as they are before rounding."""
    blocks = tl.cdiv(max_seqlen_k, BLOCK_N)
    sequence_head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch = (sequence_head // (n_heads // GROUP)).to(tl.int64)
    kv_head = (sequence_head % (n_heads // GROUP)).to(tl.int64)
    first_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q)
    first_k, seqlen_k = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k)
    if block * BLOCK_N >= seqlen_k:
        if sums_ptr is not None:
            nothing = tl.zeros([BLOCK_D], ACC)
            _store_sums(sums_ptr, nothing, nothing, batch * blocks + block, kv_head, n_heads // GROUP, D, BLOCK_D)
        return
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
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
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    queries_ptr += first_row * 4

    # Queries from `start` on see some key of this block; from `clear` on they see all of it and need no mask.
    start = 0
    clear = 0
    if CAUSAL:
        start = tl.maximum(block * BLOCK_N - (seqlen_k - seqlen_q), 0) // BLOCK_M * BLOCK_M
        clear = tl.cdiv(tl.maximum((block + 1) * BLOCK_N - 1 - (seqlen_k - seqlen_q), 0), BLOCK_M) * BLOCK_M
    complete = (block + 1) * BLOCK_N <= seqlen_k
    if key_mask_ptr is not None:
        key_mask_ptr += batch * max_seqlen_k
        complete = complete & ((block + 1) * BLOCK_N <= tl.load(key_bounds_ptr + batch * 3 + 1))
        if mask_ptr is None:
            past = block * BLOCK_N >= tl.load(key_bounds_ptr + batch * 3 + 2)
            start = tl.where(past, seqlen_q, start)
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch_stride
        complete = False
        start = 0
    # A row that sees no key averages every key, of this block too.
    start = tl.where(sees_none(key_bounds_ptr, batch, 0, seqlen_q, seqlen_k, CAUSAL), 0, start)
    clear = tl.where(complete, tl.minimum(clear, seqlen_q), seqlen_q)

    k = load_tile(k_ptr, keys, k_row_stride, k_col_stride, seqlen_k, D, BLOCK_D, True, ALIGNED)
    v = load_tile(v_ptr, keys, v_row_stride, v_col_stride, seqlen_k, D, BLOCK_D, True, ALIGNED)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dk, dv = _add_heads(
        dk, dv, k, v, q_ptr, dout_ptr, queries_ptr, q_row_stride, q_head_stride, q_col_stride,
        dout_row_stride, dout_head_stride, dout_col_stride, kv_head, n_rows, start, clear, block * BLOCK_N,
        seqlen_q, seqlen_k, key_mask_ptr, mask_ptr, mask_head_stride, mask_q_stride, mask_k_stride,
        True, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, GROUP, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dk, dv = _add_heads(
        dk, dv, k, v, q_ptr, dout_ptr, queries_ptr, q_row_stride, q_head_stride, q_col_stride,
        dout_row_stride, dout_head_stride, dout_col_stride, kv_head, n_rows, clear, seqlen_q, block * BLOCK_N,
        seqlen_q, seqlen_k, key_mask_ptr, mask_ptr, mask_head_stride, mask_q_stride, mask_k_stride,
        False, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, GROUP, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out_rows = first_key_row + keys
    dk_rows = tile_pointers(dk_ptr + kv_head * D, out_rows, dkv_row_stride, 1, BLOCK_D, ALIGNED)
    dv_rows = tile_pointers(dv_ptr + kv_head * D, out_rows, dkv_row_stride, 1, BLOCK_D, ALIGNED)
    KEEP_SCALE: tl.constexpr = 1.0 / (1.0 - P_DROP) if P_DROP < 1 else 0.0
    dk *= SCALE * KEEP_SCALE
    dv *= KEEP_SCALE
    store_tile(dk_rows, dk, keys, seqlen_k, D, BLOCK_D)
    store_tile(dv_rows, dv, keys, seqlen_k, D, BLOCK_D)
    if sums_ptr is not None:  # rows past the last are 0
        row = batch * blocks + block
        _store_sums(sums_ptr, tl.sum(dk, axis=0), tl.sum(dv, axis=0), row, kv_head, n_heads // GROUP, D, BLOCK_D)
