"""What attention's forward and backward kernels share: where a program works, its scores, its dropout bits.

Scores are in units of log2: softmax is then a power of two, for which the hardware has an instruction.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Not specialised: that 16 divides a length makes no kernel better, and each would be compiled anew for it in mid-training.
SIZES = ("n_heads", "max_seqlen_q", "max_seqlen_k", "n_rows")
# The score of a masked key. Finite, so that a row whose keys are all masked is their plain average, as it is in
# eager, and not NaN; low enough to weigh nothing beside any key that is not masked; the same number in every dtype.
MASKED_SCORE = tl.constexpr(-(2.0**100))


# The strides of a tensor [batch, rows, heads, columns] are one argument, in that order.


@triton.jit
def sequence_bounds(cu_seqlens_ptr, batch, seqlen):
    """A sequence's first row (int64) and its length: from cu_seqlens where rows are packed, else each has seqlen."""
    first = batch * seqlen
    length = seqlen
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + batch)
        length = tl.load(cu_seqlens_ptr + batch + 1) - start
        first = start.to(tl.int64)
    return first, length


@triton.jit
def locate(blocks, n_heads, cu_seqlens_q_ptr, cu_seqlens_k_ptr, max_seqlen_q, max_seqlen_k):
    """Where a program works, of `blocks` a head: sequence * n_heads + head, block; sequence, head (int64); the sequence's first
    row (int64) and length of queries, and of keys."""
    sequence_head = tl.program_id(0) // blocks  # blocks of one head are neighbours: its keys stay in the cache
    block = tl.program_id(0) % blocks
    batch = (sequence_head // n_heads).to(tl.int64)
    head = (sequence_head % n_heads).to(tl.int64)
    first_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q)
    first_k, seqlen_k = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k)
    return sequence_head, block, batch, head, first_q, seqlen_q, first_k, seqlen_k


@triton.jit
def sequence_of(ptr, strides, batch, first_row, PACKED: tl.constexpr):
    """Where a sequence's rows start: in a batch of its own, or at a row of all."""
    if PACKED:
        ptr += first_row * strides[1]
    else:
        ptr += batch * strides[0]
    return ptr


@triton.jit
def head_of(ptr, strides, batch, first_row, head, PACKED: tl.constexpr):
    """Where a head's rows of a sequence start."""
    return sequence_of(ptr, strides, batch, first_row, PACKED) + head * strides[2]


@triton.jit
def tile_pointers(ptr, rows, strides, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr):
    """[rows, BLOCK_D] pointers, int64 within; ALIGNED: each row starts at a multiple of 16 bytes (its caller knows)."""
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    pointers = ptr + rows.to(tl.int64)[:, None] * strides[1] + cols[None, :] * strides[3]
    if ALIGNED:
        pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


@triton.jit
def load_tile(
    ptr, rows, strides, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr, ALIGNED: tl.constexpr
):
    """[rows, BLOCK_D], 0 outside: past the head size where BLOCK_D rounds it up, past the last row where asked."""
    pointers = tile_pointers(ptr, rows, strides, BLOCK_D, ALIGNED)
    if CHECK_ROWS and D != BLOCK_D:
        tile = tl.load(pointers, (rows < n_rows)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, (rows < n_rows)[:, None], other=0.0)
    elif D != BLOCK_D:
        tile = tl.load(pointers, (tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(pointers, tile, rows, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = (rows < n_rows)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask)


@triton.jit
def store_row(ptr, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    tl.store(ptr + cols, row, cols < D)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a b + acc, in ACC; acc may be None."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def masks_of(masks, head):
    """Where a head's masks start, as mask_scores takes them.

    masks: a pointer to a byte per key and to the general mask, either of which may be None, the latter's strides (sequence,
    head, query, key), the sequence, and how many keys each sequence has a byte for.
    """
    key_mask_ptr, mask_ptr, mask_strides, batch, max_seqlen_k = masks
    if key_mask_ptr is not None:
        key_mask_ptr += batch * max_seqlen_k
    if mask_ptr is not None:
        mask_ptr += batch * mask_strides[0] + head * mask_strides[1]
    return key_mask_ptr, mask_ptr, mask_strides[2], mask_strides[3]


@triton.jit
def mask_scores(scores, q_index, k_index, seqlen_q, seqlen_k, masks, CAUSAL: tl.constexpr):
    """Scores with every mask applied; q_index and k_index broadcast to them, in either orientation.

    masks: of masks_of. Causal aligns the last query with the last key, as a cache of past keys needs.
    """
    key_mask_ptr, mask_ptr, mask_q_stride, mask_k_stride = masks
    inside = k_index < seqlen_k
    if mask_ptr is not None:
        offsets = q_index.to(tl.int64) * mask_q_stride + k_index.to(tl.int64) * mask_k_stride
        mask = tl.load(mask_ptr + offsets, inside & (q_index < seqlen_q), other=0)
        if mask_ptr.dtype.element_ty == tl.int1:
            scores = tl.where(mask != 0, scores, MASKED_SCORE)
        else:
            # transformers masks with the lowest number of the dtype, which added to any score is itself again.
            LOWEST: tl.constexpr = -65504.0 if mask_ptr.dtype.element_ty == tl.float16 else MASKED_SCORE
            scores = tl.where(mask <= LOWEST, MASKED_SCORE, scores + tl.where(mask <= LOWEST, 0, mask).to(scores.dtype) * LOG2E)
    if key_mask_ptr is not None:
        scores = tl.where(tl.load(key_mask_ptr + k_index, inside, other=0) != 0, scores, MASKED_SCORE)
    if CAUSAL:
        scores = tl.where(k_index <= q_index + (seqlen_k - seqlen_q), scores, MASKED_SCORE)
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def sees_none(key_bounds_ptr, batch, row, seqlen_q, seqlen_k, CAUSAL: tl.constexpr):
    """Whether a query row has no key at all left by causality and the key mask. The earliest row is the poorest."""
    first_valid = 0
    if key_bounds_ptr is not None:
        first_valid = tl.load(key_bounds_ptr + batch * 3)
    last_key = seqlen_k - 1
    if CAUSAL:
        last_key = row + (seqlen_k - seqlen_q)
    return last_key < first_valid


@triton.jit
def visible_keys(key_bounds_ptr, mask_ptr, batch, first_row, end_row, seqlen_q, seqlen_k, CAUSAL: tl.constexpr):
    """(n, end): each of these rows sees all of the first n keys, and none of them any key from `end` on.

    A row that sees no key is the average of all of them, so a block with such a row reads them all.
    """
    n = seqlen_k
    end = seqlen_k
    if CAUSAL:
        n = tl.minimum(n, tl.maximum(first_row + (seqlen_k - seqlen_q) + 1, 0))
        end = tl.minimum(end, tl.maximum(end_row + (seqlen_k - seqlen_q), 0))
    if key_bounds_ptr is not None:
        n = tl.minimum(n, tl.load(key_bounds_ptr + batch * 3 + 1))
        end = tl.minimum(end, tl.load(key_bounds_ptr + batch * 3 + 2))
    if mask_ptr is not None:
        n = 0
        end = seqlen_k
    none = sees_none(key_bounds_ptr, batch, first_row, seqlen_q, seqlen_k, CAUSAL)
    return n, tl.where(none, seqlen_k, end)


@triton.jit
def store_softmax(ptr, plane, rows, n_rows, top, total, WIDE: tl.constexpr):
    """What the backward needs of each row's softmax: the logarithm of its sum, in units of log2.

    Where WIDE, in two parts, the top score and 1 / (the sum over what it towers above): one number of 32 bits would make
    all probabilities of a row wrong by the same relative 3e-7 or more, which float32's gradients would show.
    A row that saw no key has inf: its scores are all one.
    """
    none = top <= MASKED_SCORE
    if WIDE:
        tl.store(ptr + rows, tl.where(none, float("inf"), top), rows < n_rows)
        tl.store(ptr + plane + rows, tl.where(none, 1.0, 1.0 / total), rows < n_rows)
    else:
        tl.store(ptr + rows, tl.where(none, float("inf"), top + tl.log2(total)), rows < n_rows)


@triton.jit
def load_softmax(ptr, plane, rows, n_rows, WIDE: tl.constexpr):
    """(logsumexp, share) of each row; share is meant where WIDE."""
    logsumexp = tl.load(ptr + rows, rows < n_rows, other=0)
    share = logsumexp
    if WIDE:
        share = tl.load(ptr + plane + rows, rows < n_rows, other=0)
    return logsumexp, share


@triton.jit
def store_queries(ptr, rows, n_rows, logsumexp, share, delta, row_key):
    """What the gradients of keys and values need of each query row: four integers side by side, see load_queries.

    delta is (1 - p) times what it is.
    """
    number: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + rows * 4, logsumexp.to(number, bitcast=True), rows < n_rows)
    tl.store(ptr + rows * 4 + 1, share.to(number, bitcast=True), rows < n_rows)
    tl.store(ptr + rows * 4 + 2, delta.to(number, bitcast=True), rows < n_rows)
    tl.store(ptr + rows * 4 + 3, row_key.to(number), rows < n_rows)


@triton.jit
def load_queries(ptr, rows, n_rows, ACC: tl.constexpr):
    """(logsumexp, share, delta, row_key) of each row, 0 past the last.

    One load of 16 bytes a row. Four loads would be of fewer numbers than a program has lanes, which triton 3.6 takes for
    cheap: each lane then loads every number that it needs, one by one, in every turn of the loop.
    """
    numbers = tl.load(ptr + rows.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :], (rows < n_rows)[:, None], other=0)
    logsumexp_delta, share_key = tl.split(tl.reshape(numbers, [rows.shape[0], 2, 2]))
    logsumexp, delta = tl.split(logsumexp_delta)
    share, row_key = tl.split(share_key)
    return logsumexp.to(ACC, bitcast=True), share.to(ACC, bitcast=True), delta.to(ACC, bitcast=True), row_key.to(tl.uint32)


@triton.jit
def probabilities(scores, logsumexp, share, seqlen_k, MASK: tl.constexpr, WIDE: tl.constexpr):
    """Softmax from what store_softmax kept; all three broadcast."""
    if MASK:
        average = logsumexp == float("inf")
        scores = tl.where(average & (scores > float("-inf")), 0.0, scores)
        logsumexp = tl.where(average, tl.log2(seqlen_k.to(scores.dtype)), logsumexp)
    weights = tl.exp2(scores - logsumexp)
    if WIDE:
        weights *= share
    return weights


@triton.jit
def row_keys(seed, head, rows):
    """32 random bits for each query row of a head, the same for rows 8 apart: Philox with seven rounds, a call a row."""
    rows = (rows & 7) | ((rows >> 4) << 3)
    head = (rows * 0).to(tl.uint32) + head.to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, rows.to(tl.uint32), head, 0, 0, n_rounds=7)
    return bits


@triton.jit
def keep_scores(row_key, rows, keys, first_key, P_DROP: tl.constexpr):
    """True where dropout keeps a probability: a function of (seed, head, query) and of the key first_key + keys.

    A Philox call a score would cost seven times the loop (bench/FINDINGS.md), so only rows get one; along a row the bits
    come from a Weyl sequence through the first half of the integer hash lowbias32 (Wellons, "Prospecting for Hash
    Functions", 2018). Four scores share it, queries and keys 8 apart, each with a multiplier of its own at the end:
    the matrix unit's accumulators give the four to one thread whether queries or keys are its rows, so the compiler
    merges the equal parts, forward and backward. p is rounded to 2**-32.

    `rows` and `keys` are positions within blocks that start at multiples of 16: their bits are then known when the
    kernel is compiled.
    """
    THRESHOLD: tl.constexpr = min(int(P_DROP * 4294967296 + 0.5), 4294967295)
    group = ((keys & 7) | ((keys >> 4) << 3)) + (first_key >> 1)
    bits = row_key + group.to(tl.uint32) * 0x9E3779B9
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    even = tl.where((keys & 8) == 0, 0x846CA68B, 0xC2B2AE35)
    odd = tl.where((keys & 8) == 0, 0x9E485565, 0xB5297A4D)
    return bits * tl.where((rows & 8) == 0, even, odd).to(tl.uint32) >= THRESHOLD
