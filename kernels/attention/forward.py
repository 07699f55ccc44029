"""Attention's forward kernel: softmax(scale Q K' + mask) V with a running softmax over blocks of keys.

One program computes BLOCK_M queries of one head; GROUP adjacent heads of queries share a head of keys and values. Online
softmax: Milakov and Gimelshein, arXiv:1805.02867; tiling: FlashAttention-2 (Dao, arXiv:2307.08691).
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
    mask_scores,
    product,
    row_keys,
    store_softmax,
    store_tile,
    tile_pointers,
    visible_keys,
)


@triton.jit
def _attend(
    acc, total, top, q, k_ptr, v_ptr, k_strides, v_strides, first_key, last_key, q_rows, row_key,
    seqlen_q, seqlen_k, masks, head,
    MASK: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, P_DROP: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, D: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add keys first_key to last_key to the running softmax: acc, its total and the top score of each row."""
    positions = tl.arange(0, BLOCK_M)
    for block in range(first_key, last_key, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, k_strides, seqlen_k, D, BLOCK_D, MASK, ALIGNED)
        scores = product(q, tl.trans(k), None, PRECISION, ACC)
        if MASK:
            scores *= SCALE * LOG2E
            scores = mask_scores(scores, q_rows[:, None], keys[None, :], seqlen_q, seqlen_k, masks, head, CAUSAL)
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_top[:, None])
        else:  # with the scale applied after the maximum, multiplication and subtraction are one instruction
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
        v = load_tile(v_ptr, keys, v_strides, seqlen_k, D, BLOCK_D, MASK, ALIGNED)
        acc = product(weights.to(v.dtype), v, acc, PRECISION, ACC)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=SIZES)
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, logsumexp_ptr, key_mask_ptr, key_bounds_ptr, mask_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    seed_ptr,
    q_strides, k_strides, v_strides, mask_strides,
    n_heads, max_seqlen_q, max_seqlen_k, n_rows,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, P_DROP: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    D: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = cu_seqlens_q_ptr is not None
    blocks = tl.cdiv(max_seqlen_q, BLOCK_M)
    sequence_head, block, batch, head, first_row, seqlen_q, first_key_row, seqlen_k = locate(
        blocks, n_heads, cu_seqlens_q_ptr, cu_seqlens_k_ptr, max_seqlen_q, max_seqlen_k
    )
    if block * BLOCK_M >= seqlen_q:
        return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr = head_of(q_ptr, q_strides, batch, first_row, head, PACKED)
    k_ptr = head_of(k_ptr, k_strides, batch, first_key_row, head // GROUP, PACKED)
    v_ptr = head_of(v_ptr, v_strides, batch, first_key_row, head // GROUP, PACKED)
    every, some = visible_keys(
        key_bounds_ptr, mask_ptr, batch, block * BLOCK_M, (block + 1) * BLOCK_M, seqlen_q, seqlen_k, CAUSAL
    )
    every = every // BLOCK_N * BLOCK_N
    masks = (key_mask_ptr, mask_ptr, mask_strides, batch, max_seqlen_k)

    q = load_tile(q_ptr, rows, q_strides, seqlen_q, D, BLOCK_D, True, ALIGNED)
    row_key = rows
    if P_DROP > 0:
        row_key = row_keys(tl.load(seed_ptr), sequence_head, rows)
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    for MASK in tl.static_range(2):  # first the keys that every row sees, which need no mask
        acc, total, top = _attend(
            acc, total, top, q, k_ptr, v_ptr, k_strides, v_strides, every if MASK else 0, some if MASK else every,
            rows, row_key, seqlen_q, seqlen_k, masks, head,
            MASK, SCALE, CAUSAL, P_DROP, PRECISION, ACC, D, ALIGNED, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    KEEP_SCALE: tl.constexpr = 1.0 / (1.0 - P_DROP) if P_DROP < 1 else 0.0
    # A packed sequence may have queries but no keys: its sums are empty, and its output is 0.
    out = acc * (KEEP_SCALE / tl.where(total == 0, 1.0, total))[:, None]
    out_strides = (0, n_heads * D, D, 1)
    out_ptr = head_of(out_ptr, out_strides, batch, first_row, head, True)
    store_tile(tile_pointers(out_ptr, rows, out_strides, BLOCK_D, False), out, rows, seqlen_q, D, BLOCK_D)
    if logsumexp_ptr is not None:  # a backward follows
        WIDE: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth > 16
        here = logsumexp_ptr + head * n_rows + first_row
        store_softmax(here, n_heads.to(tl.int64) * n_rows, rows, seqlen_q, top, total, WIDE)
