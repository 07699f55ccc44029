"""Attention's backward for short sequences: one program per head, which computes scores and dP once for all three gradients.

The equations are in backward_kv.py. All queries of a sequence, up to 128, are the rows of one tile, so each block of keys gets
its dK and dV at once while dQ accumulates. A first pass over the keys sums delta, rowsum(P dP), from the same dP as the
gradients: dS then sums to 0 over a row as exactly as eager's, which a delta from rounded outputs does not achieve
(backward_q.py). Seven products, one launch instead of two, and the forward's output is not read. 16 bits only: the tile would
not fit the registers in 32. General masks and grouped heads take the two kernels at any length: their pointers and loops need
registers too.
"""

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    SIZES,
    head_of,
    keep_scores,
    load_tile,
    locate,
    product,
    row_keys,
    sees_none,
    store_row,
    store_tile,
    tile_pointers,
    visible_keys,
)


@triton.jit
def _seen_keys(key_mask_ptr, keys, seqlen_k, none, CAUSAL: tl.constexpr):
    """Which keys have gradients: those that the mask shows, or all keys where `none` of the queries sees any key.

    With CAUSAL that depends on the query as well, and every key of the sequence counts as seen.
    """
    seen = keys < seqlen_k
    if key_mask_ptr is not None and not CAUSAL:
        seen = seen & (none | (tl.load(key_mask_ptr + keys, seen, other=0) != 0))
    return seen


@triton.jit
def _load_keys(ptr, keys, seen, strides, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr):
    """[keys, BLOCK_D], 0 for keys that are not seen and past the head size."""
    pointers = tile_pointers(ptr, keys, strides, BLOCK_D, ALIGNED)
    if D != BLOCK_D:
        tile = tl.load(pointers, seen[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers, seen[:, None], other=0.0)
    return tile


@triton.jit
def _store_keys(ptr, tile, keys, seen, seqlen_k, strides, HIDES: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr):
    """Store the rows of keys that are seen; with HIDES, store 0 for keys of the sequence that are not."""
    BLOCK_D: tl.constexpr = tile.shape[1]
    pointers = tile_pointers(ptr, keys, strides, BLOCK_D, ALIGNED)
    inside = (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), seen[:, None] & inside)
    if HIDES:
        hidden = (keys < seqlen_k) & (seen == 0)
        tl.store(pointers, tl.zeros(tile.shape, pointers.dtype.element_ty), hidden[:, None] & inside)


@triton.jit
def _block_of_keys(
    block, seen, q, dout, scale, logsumexp, average, row_key, rows, k_ptr, v_ptr, k_strides, v_strides, key_mask_ptr,
    seqlen_q, seqlen_k,
    CAUSAL: tl.constexpr, P_DROP: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The keys from `block` on; P for them, before and after dropout (not rescaled); and dP."""
    keys = block + tl.arange(0, BLOCK_N)
    k = _load_keys(k_ptr, keys, seen, k_strides, D, BLOCK_D, ALIGNED)
    v = _load_keys(v_ptr, keys, seen, v_strides, D, BLOCK_D, ALIGNED)
    scores = product(q, tl.trans(k), None, PRECISION, ACC) * scale[:, None] - logsumexp[:, None]
    # A key that is not seen is loaded as 0, and its gradients are stored as 0: its weights need no mask but must be finite.
    weights = tl.exp2(tl.minimum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL))
    if CAUSAL:
        visible = keys[None, :] <= rows[:, None] + (seqlen_k - seqlen_q)
        if key_mask_ptr is not None:
            visible = visible & (tl.load(key_mask_ptr + keys, keys < seqlen_k, other=0) != 0)[None, :]
        weights = tl.where(visible | average[:, None], weights, 0.0)
    dweights = product(dout, tl.trans(v), None, PRECISION, ACC)
    dropped = weights
    if P_DROP > 0:
        keep = keep_scores(row_key[:, None], rows[:, None], tl.arange(0, BLOCK_N)[None, :], block, P_DROP)
        dropped = tl.where(keep, weights, 0.0)
    return k, weights, dropped, dweights


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_short_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, key_mask_ptr, key_bounds_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    logsumexp_ptr, seed_ptr, dq_ptr, dk_ptr, dv_ptr, sums_ptr,
    q_strides, k_strides, v_strides, dout_strides, dq_row_stride, dkv_row_stride,
    n_heads, max_seqlen_q, max_seqlen_k, n_rows,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, P_DROP: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With sums [sequences, 3 x heads x D] it also writes the sums of dq, dk and dv over each sequence, before rounding. That
    of dk is 0: a vector added to all keys adds the same to all scores of a row, which softmax ignores.
    """
    KEEP_SCALE: tl.constexpr = 1.0 / (1.0 - P_DROP) if P_DROP < 1 else 0.0
    PACKED: tl.constexpr = cu_seqlens_q_ptr is not None
    sequence_head, _, batch, head, first_row, seqlen_q, first_key_row, seqlen_k = locate(
        1, n_heads, cu_seqlens_q_ptr, cu_seqlens_k_ptr, max_seqlen_q, max_seqlen_k
    )
    rows = tl.arange(0, BLOCK_M)
    dq_strides = (0, dq_row_stride, D, 1)
    dkv_strides = (0, dkv_row_stride, D, 1)
    q_ptr = head_of(q_ptr, q_strides, batch, first_row, head, PACKED)
    k_ptr = head_of(k_ptr, k_strides, batch, first_key_row, head, PACKED)
    v_ptr = head_of(v_ptr, v_strides, batch, first_key_row, head, PACKED)
    dout_ptr = head_of(dout_ptr, dout_strides, batch, first_row, head, PACKED)
    dq_ptr = head_of(dq_ptr, dq_strides, batch, first_row, head, True)
    dk_ptr = head_of(dk_ptr, dkv_strides, batch, first_key_row, head, True)
    dv_ptr = head_of(dv_ptr, dkv_strides, batch, first_key_row, head, True)

    # Keys from `end` on have no gradient; without queries no key has one.
    none = sees_none(key_bounds_ptr, batch, 0, seqlen_q, seqlen_k, CAUSAL)
    _, end = visible_keys(key_bounds_ptr, None, batch, 0, BLOCK_M, seqlen_q, seqlen_k, CAUSAL)
    end = tl.where(seqlen_q > 0, end, 0)
    HIDES: tl.constexpr = key_mask_ptr is not None and not CAUSAL
    if key_mask_ptr is not None:
        key_mask_ptr += batch * max_seqlen_k

    dout = load_tile(dout_ptr, rows, dout_strides, seqlen_q, D, BLOCK_D, True, ALIGNED)
    q = load_tile(q_ptr, rows, q_strides, seqlen_q, D, BLOCK_D, True, ALIGNED)
    logsumexp = tl.load(logsumexp_ptr + head * n_rows + first_row + rows, rows < seqlen_q, other=0.0)
    # A row that sees no key is the average of all: its scores are all zero.
    average = logsumexp == float("inf")
    scale = tl.where(average, 0.0, SCALE * LOG2E)
    logsumexp = tl.where(average, tl.log2(seqlen_k.to(ACC)), logsumexp)
    row_key = rows
    if P_DROP > 0:
        row_key = row_keys(tl.load(seed_ptr), sequence_head, rows)

    # Each block's mask is loaded before the previous block is finished, so that no tile waits for its mask.
    first_seen = _seen_keys(key_mask_ptr, tl.arange(0, BLOCK_N), seqlen_k, none, CAUSAL)
    seen = first_seen
    delta = tl.zeros([BLOCK_M], ACC)  # multiplied by 1 - p, as `dropped` is
    for block in range(0, end, BLOCK_N):
        k, weights, dropped, dweights = _block_of_keys(
            block, seen, q, dout, scale, logsumexp, average, row_key, rows, k_ptr, v_ptr, k_strides, v_strides, key_mask_ptr,
            seqlen_q, seqlen_k, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        delta += tl.sum(dropped * dweights, axis=1)
        seen = _seen_keys(key_mask_ptr, block + BLOCK_N + tl.arange(0, BLOCK_N), seqlen_k, none, CAUSAL)
    seen = first_seen
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    dv_sum = tl.zeros([BLOCK_D], ACC)
    for block in range(0, end, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k, weights, dropped, dweights = _block_of_keys(
            block, seen, q, dout, scale, logsumexp, average, row_key, rows, k_ptr, v_ptr, k_strides, v_strides, key_mask_ptr,
            seqlen_q, seqlen_k, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        dscores = (dropped * dweights - weights * delta[:, None]).to(q.dtype)  # multiplied by 1 - p, as in backward_kv.py
        dv = product(tl.trans(dout), dropped.to(dout.dtype), None, PRECISION, ACC) * KEEP_SCALE
        _store_keys(dv_ptr, tl.trans(dv), keys, seen, seqlen_k, dkv_strides, HIDES, D, ALIGNED)
        dk = product(tl.trans(q), dscores, None, PRECISION, ACC) * (SCALE * KEEP_SCALE)
        _store_keys(dk_ptr, tl.trans(dk), keys, seen, seqlen_k, dkv_strides, HIDES, D, ALIGNED)
        dq = product(dscores, k, dq, PRECISION, ACC)
        if sums_ptr is not None:
            dv_sum += tl.sum(tl.where(seen[None, :], dv, 0.0), axis=1)
        seen = _seen_keys(key_mask_ptr, keys + BLOCK_N, seqlen_k, none, CAUSAL)
    dq_rows = tile_pointers(dq_ptr, rows, dq_strides, BLOCK_D, ALIGNED)
    dq *= SCALE * KEEP_SCALE
    store_tile(dq_rows, dq, rows, seqlen_q, D, BLOCK_D)
    if sums_ptr is not None:
        sums_ptr += (batch * 3 * n_heads + head) * D
        store_row(sums_ptr, tl.sum(dq, axis=0), D, BLOCK_D)
        store_row(sums_ptr + n_heads * D, tl.zeros([BLOCK_D], ACC), D, BLOCK_D)
        store_row(sums_ptr + n_heads * (2 * D), dv_sum, D, BLOCK_D)

    nothing = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for block in range(tl.cdiv(end, BLOCK_N) * BLOCK_N, seqlen_k, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        _store_keys(dk_ptr, nothing, keys, keys < seqlen_k, seqlen_k, dkv_strides, False, D, ALIGNED)
        _store_keys(dv_ptr, nothing, keys, keys < seqlen_k, seqlen_k, dkv_strides, False, D, ALIGNED)
