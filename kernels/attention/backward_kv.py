"""Attention's backward; its kernel for dK and dV: one program per block of keys, over all queries that see them.

With P = softmax(scores), Z the dropped and rescaled P, and O = Z V:

    dV = Z' dO        dP = dropout'(dO V')        dS = P (dP - delta), delta = rowsum(dP P) = rowsum(dO O)
    dQ = dS K         dK = dS' Q

delta as rowsum(dO O): FlashAttention (Dao et al., arXiv:2205.14135, appendix B.2). It holds with dropout, which O includes.

The backward is two kernels. dQ comes first and leaves four numbers per query row for this one; both recompute the scores. That
takes 14 Sq Sk D operations per head instead of 10, but summing dQ across programs would need atomics or a second pass. Short
sequences take one kernel (backward_short.py). Every sum has one order: no atomics, the same bits every time. Grouped heads are
a loop in this program over the heads of queries that share the keys, for the same reason. In a layer these kernels also sum the
projections' bias gradients, before rounding.
"""

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    SIZES,
    head_of,
    keep_scores,
    load_queries,
    load_tile,
    locate,
    mask_scores,
    probabilities,
    product,
    sees_none,
    sequence_of,
    store_row,
    store_tile,
    tile_pointers,
)


@triton.jit
def _add_queries(
    dk, dv, k, v, q_ptr, dout_ptr, queries_ptr, q_strides, dout_strides, first_query, last_query, first_key,
    seqlen_q, seqlen_k, masks, head,
    MASK: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, P_DROP: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv plus the contributions of queries first_query to last_query, both multiplied by (1 - p).

    Tiles are [keys, queries].
    """
    WIDE: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth > 16
    keys = first_key + tl.arange(0, BLOCK_N)
    for block in range(first_query, last_query, BLOCK_M):
        rows = block + tl.arange(0, BLOCK_M)
        q = load_tile(q_ptr, rows, q_strides, seqlen_q, D, BLOCK_D, True, ALIGNED)
        dout = load_tile(dout_ptr, rows, dout_strides, seqlen_q, D, BLOCK_D, True, ALIGNED)
        logsumexp, share, delta, row_key = load_queries(queries_ptr, rows, seqlen_q, ACC)

        scores = product(k, tl.trans(q), None, PRECISION, ACC) * (SCALE * LOG2E)
        if MASK:
            scores = mask_scores(scores, rows[None, :], keys[:, None], seqlen_q, seqlen_k, masks, head, CAUSAL)
        weights = probabilities(scores, logsumexp[None, :], share[None, :], seqlen_k, MASK, WIDE)
        dweights = product(v, tl.trans(dout), None, PRECISION, ACC)
        dropped = weights
        if P_DROP > 0:
            positions = tl.arange(0, BLOCK_M)
            keep = keep_scores(row_key[None, :], positions[None, :], tl.arange(0, BLOCK_N)[:, None], first_key, P_DROP)
            dropped = tl.where(keep, weights, 0.0)
        dv = product(dropped.to(dout.dtype), dout, dv, PRECISION, ACC)
        # P (dropout'(dP) - delta), with one selection per score. A non-finite dP stays so where it is dropped: the value or the
        # upstream gradient behind it has by then made all outputs or all of dv NaN, since 0 times it is NaN.
        dscores = dropped * dweights - weights * delta[None, :]
        dk = product(dscores.to(q.dtype), q, dk, PRECISION, ACC)
    return dk, dv


@triton.jit
def _add_heads(
    dk, dv, k, v, q_ptr, dout_ptr, queries_ptr, q_strides, dout_strides, kv_head, n_rows, first_query, last_query, first_key,
    seqlen_q, seqlen_k, masks,
    MASK: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, P_DROP: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv plus the contributions of these queries, of every head that shares the keys, one head after the other."""
    for member in range(GROUP):
        head = kv_head * GROUP + member
        dk, dv = _add_queries(
            dk, dv, k, v, q_ptr + head * q_strides[2], dout_ptr + head * dout_strides[2], queries_ptr + head * n_rows * 4,
            q_strides, dout_strides, first_query, last_query, first_key, seqlen_q, seqlen_k, masks, head,
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
    q_ptr, k_ptr, v_ptr, dout_ptr, queries_ptr, key_mask_ptr, key_bounds_ptr, mask_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    dk_ptr, dv_ptr, sums_ptr,
    q_strides, k_strides, v_strides, dout_strides, mask_strides, dkv_row_stride,
    n_heads, max_seqlen_q, max_seqlen_k, n_rows,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, P_DROP: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With sums [sequences x blocks, 2 x kv heads x D] it also writes each block's sums of dk and dv, before rounding."""
    PACKED: tl.constexpr = cu_seqlens_q_ptr is not None
    blocks = tl.cdiv(max_seqlen_k, BLOCK_N)
    kv_heads = n_heads // GROUP
    _, block, batch, kv_head, first_row, seqlen_q, first_key_row, seqlen_k = locate(
        blocks, kv_heads, cu_seqlens_q_ptr, cu_seqlens_k_ptr, max_seqlen_q, max_seqlen_k
    )
    if block * BLOCK_N >= seqlen_k:
        if sums_ptr is not None:
            nothing = tl.zeros([BLOCK_D], ACC)
            _store_sums(sums_ptr, nothing, nothing, batch * blocks + block, kv_head, kv_heads, D, BLOCK_D)
        return
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr = sequence_of(q_ptr, q_strides, batch, first_row, PACKED)
    dout_ptr = sequence_of(dout_ptr, dout_strides, batch, first_row, PACKED)
    k_ptr = head_of(k_ptr, k_strides, batch, first_key_row, kv_head, PACKED)
    v_ptr = head_of(v_ptr, v_strides, batch, first_key_row, kv_head, PACKED)
    queries_ptr += first_row * 4

    # Queries from `start` on see some key of this block; from `clear` on they see all of its keys and need no mask.
    start = 0
    clear = 0
    if CAUSAL:
        start = tl.maximum(block * BLOCK_N - (seqlen_k - seqlen_q), 0) // BLOCK_M * BLOCK_M
        clear = tl.cdiv(tl.maximum((block + 1) * BLOCK_N - 1 - (seqlen_k - seqlen_q), 0), BLOCK_M) * BLOCK_M
    complete = (block + 1) * BLOCK_N <= seqlen_k
    if key_mask_ptr is not None:
        complete = complete & ((block + 1) * BLOCK_N <= tl.load(key_bounds_ptr + batch * 3 + 1))
        if mask_ptr is None:
            past = block * BLOCK_N >= tl.load(key_bounds_ptr + batch * 3 + 2)
            start = tl.where(past, seqlen_q, start)
    if mask_ptr is not None:
        complete = False
        start = 0
    # A row that sees no key averages all keys, including this block's.
    start = tl.where(sees_none(key_bounds_ptr, batch, 0, seqlen_q, seqlen_k, CAUSAL), 0, start)
    clear = tl.where(complete, tl.minimum(clear, seqlen_q), seqlen_q)

    masks = (key_mask_ptr, mask_ptr, mask_strides, batch, max_seqlen_k)
    k = load_tile(k_ptr, keys, k_strides, seqlen_k, D, BLOCK_D, True, ALIGNED)
    v = load_tile(v_ptr, keys, v_strides, seqlen_k, D, BLOCK_D, True, ALIGNED)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for CLEAR in tl.static_range(2):
        dk, dv = _add_heads(
            dk, dv, k, v, q_ptr, dout_ptr, queries_ptr, q_strides, dout_strides, kv_head, n_rows,
            clear if CLEAR else start, seqlen_q if CLEAR else clear, block * BLOCK_N,
            seqlen_q, seqlen_k, masks,
            not CLEAR, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, GROUP, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    KEEP_SCALE: tl.constexpr = 1.0 / (1.0 - P_DROP) if P_DROP < 1 else 0.0
    dk *= SCALE * KEEP_SCALE
    dv *= KEEP_SCALE
    strides = (0, dkv_row_stride, D, 1)
    dk_ptr = head_of(dk_ptr, strides, batch, first_key_row, kv_head, True)
    dv_ptr = head_of(dv_ptr, strides, batch, first_key_row, kv_head, True)
    store_tile(tile_pointers(dk_ptr, keys, strides, BLOCK_D, ALIGNED), dk, keys, seqlen_k, D, BLOCK_D)
    store_tile(tile_pointers(dv_ptr, keys, strides, BLOCK_D, ALIGNED), dv, keys, seqlen_k, D, BLOCK_D)
    if sums_ptr is not None:  # rows past the last are 0
        row = batch * blocks + block
        _store_sums(sums_ptr, tl.sum(dk, axis=0), tl.sum(dv, axis=0), row, kv_head, kv_heads, D, BLOCK_D)
