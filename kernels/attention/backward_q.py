"""Attention's gradient of the queries: one program per block of queries, over all keys that they see.

The equations are in backward_kv.py.
"""

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    SIZES,
    head_of,
    keep_scores,
    load_softmax,
    load_tile,
    locate,
    mask_scores,
    probabilities,
    product,
    row_keys,
    store_queries,
    store_row,
    store_tile,
    tile_pointers,
    visible_keys,
)


@triton.jit
def _add_keys(
    sums, left, q, dout, logsumexp, share, delta, row_key, k_ptr, v_ptr, k_strides, v_strides, first_key, last_key, rows,
    seqlen_q, seqlen_k, masks, head,
    DELTA: tl.constexpr, MASK: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, P_DROP: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ plus the contributions of keys first_key to last_key, and in 16 bits `left` plus the sum of their dS; with DELTA the
    same for delta, rowsum(P dP)."""
    KEEP_SCALE: tl.constexpr = 1.0 / (1.0 - P_DROP) if P_DROP < 1 else 0.0
    WIDE: tl.constexpr = k_ptr.dtype.element_ty.primitive_bitwidth > 16
    for block in range(first_key, last_key, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, k_strides, seqlen_k, D, BLOCK_D, MASK, ALIGNED)
        v = load_tile(v_ptr, keys, v_strides, seqlen_k, D, BLOCK_D, MASK, ALIGNED)
        scores = product(q, tl.trans(k), None, PRECISION, ACC) * (SCALE * LOG2E)
        if MASK:
            scores = mask_scores(scores, rows[:, None], keys[None, :], seqlen_q, seqlen_k, masks, head, CAUSAL)
        weights = probabilities(scores, logsumexp[:, None], share[:, None], seqlen_k, MASK, WIDE)
        dweights = product(dout, tl.trans(v), None, PRECISION, ACC)
        if P_DROP > 0:
            positions = tl.arange(0, BLOCK_M)
            keep = keep_scores(row_key[:, None], positions[:, None], tl.arange(0, BLOCK_N)[None, :], block, P_DROP)
            dweights = tl.where(keep, dweights, 0.0) * KEEP_SCALE  # one instruction, fused with the following subtraction
        if DELTA:
            sums += tl.sum(weights * dweights, axis=1)
        else:
            dscores = weights * (dweights - delta[:, None])
            if not WIDE:
                left += tl.sum(dscores, axis=1)
            sums = product(dscores.to(k.dtype), k, sums, PRECISION, ACC)
    return sums, left


@triton.jit
def _typical_key(
    k_ptr, k_strides, n, ACC: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The mean of up to ROWS keys, spread evenly over the first n; 0 if there are none."""
    step = tl.maximum(tl.cdiv(n, ROWS), 1)
    keys = load_tile(k_ptr, tl.arange(0, ROWS) * step, k_strides, n, D, BLOCK_D, True, ALIGNED)
    return tl.sum(keys.to(ACC), axis=0) / tl.maximum(tl.cdiv(n, step), 1)


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_q_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, queries_ptr, key_mask_ptr, key_bounds_ptr, mask_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    out_ptr, logsumexp_ptr, seed_ptr, dq_ptr, sums_ptr,
    q_strides, k_strides, v_strides, dout_strides, mask_strides, dq_row_stride,
    n_heads, max_seqlen_q, max_seqlen_k, n_rows,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, P_DROP: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """With sums [sequences x blocks, heads x D] it also writes each block's sums of dq, before rounding."""
    PACKED: tl.constexpr = cu_seqlens_q_ptr is not None
    blocks = tl.cdiv(max_seqlen_q, BLOCK_M)
    sequence_head, block, batch, head, first_row, seqlen_q, first_key_row, seqlen_k = locate(
        blocks, n_heads, cu_seqlens_q_ptr, cu_seqlens_k_ptr, max_seqlen_q, max_seqlen_k
    )
    if block * BLOCK_M >= seqlen_q:
        if sums_ptr is not None:
            nothing = tl.zeros([BLOCK_D], ACC)
            store_row(sums_ptr + ((batch * blocks + block) * n_heads + head) * D, nothing, D, BLOCK_D)
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr = head_of(q_ptr, q_strides, batch, first_row, head, PACKED)
    k_ptr = head_of(k_ptr, k_strides, batch, first_key_row, head // GROUP, PACKED)
    v_ptr = head_of(v_ptr, v_strides, batch, first_key_row, head // GROUP, PACKED)
    dout_ptr = head_of(dout_ptr, dout_strides, batch, first_row, head, PACKED)
    every, some = visible_keys(
        key_bounds_ptr, mask_ptr, batch, block * BLOCK_M, (block + 1) * BLOCK_M, seqlen_q, seqlen_k, CAUSAL
    )
    every = every // BLOCK_N * BLOCK_N
    masks = (key_mask_ptr, mask_ptr, mask_strides, batch, max_seqlen_k)

    q = load_tile(q_ptr, rows, q_strides, seqlen_q, D, BLOCK_D, True, ALIGNED)
    dout = load_tile(dout_ptr, rows, dout_strides, seqlen_q, D, BLOCK_D, True, ALIGNED)
    here = head * n_rows + first_row
    WIDE: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth > 16
    logsumexp, share = load_softmax(logsumexp_ptr + here, n_heads.to(tl.int64) * n_rows, rows, seqlen_q, WIDE)
    row_key = rows
    if P_DROP > 0:
        row_key = row_keys(tl.load(seed_ptr), sequence_head, rows)
    left = tl.zeros([BLOCK_M], ACC)
    if WIDE:
        # delta comes from the same dP as the gradients below, so that dS sums to 0 over a row as exactly as eager's: keys have
        # much in common, which multiplies whatever is left over.
        delta = tl.zeros([BLOCK_M], ACC)
        for MASK in tl.static_range(2):  # first the keys that every row sees, which need no mask
            delta, left = _add_keys(
                delta, left, q, dout, logsumexp, share, None, row_key, k_ptr, v_ptr, k_strides, v_strides,
                every if MASK else 0, some if MASK else every, rows, seqlen_q, seqlen_k, masks, head,
                True, MASK, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    else:
        out_strides = (0, n_heads * D, D, 1)
        out_ptr = head_of(out_ptr, out_strides, batch, first_row, head, True)
        out = load_tile(out_ptr, rows, out_strides, seqlen_q, D, BLOCK_D, True, ALIGNED)
        delta = tl.sum(dout.to(ACC) * out.to(ACC), axis=1)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for MASK in tl.static_range(2):
        dq, left = _add_keys(
            dq, left, q, dout, logsumexp, share, delta, row_key, k_ptr, v_ptr, k_strides, v_strides,
            every if MASK else 0, some if MASK else every, rows, seqlen_q, seqlen_k, masks, head,
            False, MASK, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if not WIDE:
        # `out` is rounded, so this delta is off by up to 2**-9 of |dO| |O|. What is left of each row's sum of dS, which is 0 in
        # exact arithmetic, is that error. Where values have much in common (the upper layers) it is larger than dS itself, and
        # all rows share its direction. The kernel for k and v gets the corrected delta. Here the error has multiplied
        # rowsum(P K), for which a typical key stands: what it leaves is the error times how far this row's keys are from it.
        delta += left
        dq -= left[:, None] * _typical_key(k_ptr, k_strides, some, ACC, D, ALIGNED, BLOCK_N, BLOCK_D)[None, :]
    store_queries(queries_ptr + here * 4, rows, seqlen_q, logsumexp, share, delta * (1.0 - P_DROP), row_key)
    dq *= SCALE
    pointers = tile_pointers(dq_ptr + head * D, first_row + rows, (0, dq_row_stride, D, 1), BLOCK_D, ALIGNED)
    store_tile(pointers, dq, rows, seqlen_q, D, BLOCK_D)
    if sums_ptr is not None:  # rows past the last are 0
        store_row(sums_ptr + ((batch * blocks + block) * n_heads + head) * D, tl.sum(dq, axis=0), D, BLOCK_D)
