"""What attention's forward and backward kernels share: a program's place, its tiles, scores and dropout bits.

Scores are in units of log2: softmax is then a power of two, for which the hardware has an instruction. The strides of a tensor
[batch, rows, heads, columns] are one argument, in that order.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Not specialised: divisibility by 16 makes no kernel better, and would recompile kernels in the middle of training.
SIZES = ("n_heads", "max_seqlen_q", "max_seqlen_k", "n_rows")
# The score of a masked key. Finite, so that a row whose keys are all masked is their plain average, as in eager, and not NaN;
# low enough to weigh nothing beside any key that is not masked; the same number in every dtype.
MASKED_SCORE = tl.constexpr(-(2.0**100))


@triton.jit
def sequence_bounds(cu_seqlens_ptr, batch, seqlen):
    """A sequence's first row (int64) and its length: from cu_seqlens for packed rows, else each has seqlen rows."""
    first = batch * seqlen
    length = seqlen
    if cu_seqlens_ptr is not None:
        start = tl.load(cu_seqlens_ptr + batch)
        length = tl.load(cu_seqlens_ptr + batch + 1) - start
        first = start.to(tl.int64)
    return first, length


@triton.jit
def locate(blocks, n_heads, cu_seqlens_q_ptr, cu_seqlens_k_ptr, max_seqlen_q, max_seqlen_k):
    """A program's place among `blocks` blocks per head: sequence * n_heads + head, block, sequence and head (int64); then the
    first row (int64) and the length of the sequence's queries, and of its keys."""
    sequence_head = tl.program_id(0) // blocks  # the blocks of a head are adjacent, so its keys stay in the cache
    block = tl.program_id(0) % blocks
    batch = (sequence_head // n_heads).to(tl.int64)
    head = (sequence_head % n_heads).to(tl.int64)
    first_q, seqlen_q = sequence_bounds(cu_seqlens_q_ptr, batch, max_seqlen_q)
    first_k, seqlen_k = sequence_bounds(cu_seqlens_k_ptr, batch, max_seqlen_k)
    return sequence_head, block, batch, head, first_q, seqlen_q, first_k, seqlen_k


@triton.jit
def sequence_of(ptr, strides, batch, first_row, PACKED: tl.constexpr):
    """The start of a sequence: an entry of the batch, or a row among all packed rows."""
    if PACKED:
        ptr += first_row * strides[1]
    else:
        ptr += batch * strides[0]
    return ptr


@triton.jit
def head_of(ptr, strides, batch, first_row, head, PACKED: tl.constexpr):
    """The start of a head's rows in a sequence."""
    return sequence_of(ptr, strides, batch, first_row, PACKED) + head * strides[2]


@triton.jit
def tile_pointers(ptr, rows, strides, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr):
    """[rows, BLOCK_D] pointers with int64 offsets; ALIGNED: the caller knows that each row starts at a multiple of 16 bytes."""
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    pointers = ptr + rows.to(tl.int64)[:, None] * strides[1] + cols[None, :] * strides[3]
    if ALIGNED:
        pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


@triton.jit
def load_tile(
    ptr, rows, strides, n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_ROWS: tl.constexpr, ALIGNED: tl.constexpr
):
    """[rows, BLOCK_D], 0 past the head size, to which BLOCK_D is rounded up; with CHECK_ROWS also 0 past the last row."""
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
    """a b + acc, accumulated in ACC; acc may be None."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def mask_scores(scores, q_index, k_index, seqlen_q, seqlen_k, masks, head, CAUSAL: tl.constexpr):
    """Scores with every mask applied; q_index and k_index broadcast to them, in either orientation.

    masks: pointers to the key mask (one byte per key) and to the general mask, either of which may be None; the general mask's
    strides (sequence, head, query, key); the sequence; the number of keys per sequence. The tuple is taken apart here, because
    triton 3.5 and 3.6 let no jit function return a None. A causal mask aligns the last query with the last key, as a cache of
    past keys requires.
    """
    key_mask_ptr, mask_ptr, mask_strides, batch, max_seqlen_k = masks
    inside = k_index < seqlen_k
    if mask_ptr is not None:
        mask_ptr += batch * mask_strides[0] + head * mask_strides[1]
        offsets = q_index.to(tl.int64) * mask_strides[2] + k_index.to(tl.int64) * mask_strides[3]
        mask = tl.load(mask_ptr + offsets, inside & (q_index < seqlen_q), other=0)
        if mask_ptr.dtype.element_ty == tl.int1:
            scores = tl.where(mask != 0, scores, MASKED_SCORE)
        else:
            # transformers masks with the lowest number of the dtype; any score added to it leaves it as it is.
            LOWEST: tl.constexpr = -65504.0 if mask_ptr.dtype.element_ty == tl.float16 else MASKED_SCORE
            scores = tl.where(mask <= LOWEST, MASKED_SCORE, scores + tl.where(mask <= LOWEST, 0, mask).to(scores.dtype) * LOG2E)
    if key_mask_ptr is not None:
        key_mask_ptr += batch * max_seqlen_k
        scores = tl.where(tl.load(key_mask_ptr + k_index, inside, other=0) != 0, scores, MASKED_SCORE)
    if CAUSAL:
        scores = tl.where(k_index <= q_index + (seqlen_k - seqlen_q), scores, MASKED_SCORE)
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def sees_none(key_bounds_ptr, batch, row, seqlen_q, seqlen_k, CAUSAL: tl.constexpr):
    """Whether causality and the key mask leave a query row no key at all. The earliest row sees the fewest keys."""
    first_valid = 0
    if key_bounds_ptr is not None:
        first_valid = tl.load(key_bounds_ptr + batch * 3)
    last_key = seqlen_k - 1
    if CAUSAL:
        last_key = row + (seqlen_k - seqlen_q)
    return last_key < first_valid


@triton.jit
def visible_keys(key_bounds_ptr, mask_ptr, batch, first_row, end_row, seqlen_q, seqlen_k, CAUSAL: tl.constexpr):
    """(n, end): all of these rows see the first n keys, and none of them sees a key from `end` on.

    A row that sees no key is the average of all keys, so a block with such a row reads them all.
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
    """Store the logarithm of each row's softmax sum, in units of log2, for the backward.

    WIDE stores two numbers, the top score and 1 / (the sum relative to it): a single 32-bit number would make all probabilities
    of a row wrong by the same relative 3e-7 or more, which float32's gradients would show. A row that sees no key is marked by
    infinity. It is the average of all keys, which eager's additive masks make it.
    """
    none = top <= MASKED_SCORE
    if WIDE:
        tl.store(ptr + rows, tl.where(none, float("inf"), top), rows < n_rows)
        tl.store(ptr + plane + rows, tl.where(none, 1.0, 1.0 / total), rows < n_rows)
    else:
        tl.store(ptr + rows, tl.where(none, float("inf"), top + tl.log2(total)), rows < n_rows)


@triton.jit
def load_softmax(ptr, plane, rows, n_rows, WIDE: tl.constexpr):
    """(logsumexp, share) of each row; share has a meaning only where WIDE."""
    logsumexp = tl.load(ptr + rows, rows < n_rows, other=0)
    share = logsumexp
    if WIDE:
        share = tl.load(ptr + plane + rows, rows < n_rows, other=0)
    return logsumexp, share


@triton.jit
def store_queries(ptr, rows, n_rows, logsumexp, share, delta, row_key):
    """Store what the gradients of keys and values need of each query row: four adjacent integers, see load_queries.

    delta is multiplied by (1 - p).
    """
    number: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + rows * 4, logsumexp.to(number, bitcast=True), rows < n_rows)
    tl.store(ptr + rows * 4 + 1, share.to(number, bitcast=True), rows < n_rows)
    tl.store(ptr + rows * 4 + 2, delta.to(number, bitcast=True), rows < n_rows)
    tl.store(ptr + rows * 4 + 3, row_key.to(number), rows < n_rows)


@triton.jit
def load_queries(ptr, rows, n_rows, ACC: tl.constexpr):
    """(logsumexp, share, delta, row_key) of each row, 0 past the last.

    One 16-byte load per row. Four loads would each have fewer elements than the program has threads, which triton 3.6 takes for
    cheap: each thread would then load every number that it needs, one by one, in every iteration of the loop.
    """
    numbers = tl.load(ptr + rows.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :], (rows < n_rows)[:, None], other=0)
    logsumexp_delta, share_key = tl.split(tl.reshape(numbers, [rows.shape[0], 2, 2]))
    logsumexp, delta = tl.split(logsumexp_delta)
    share, row_key = tl.split(share_key)
    return logsumexp.to(ACC, bitcast=True), share.to(ACC, bitcast=True), delta.to(ACC, bitcast=True), row_key.to(tl.uint32)


@triton.jit
def probabilities(scores, logsumexp, share, seqlen_k, MASK: tl.constexpr, WIDE: tl.constexpr):
    """Softmax from what store_softmax stored; scores, logsumexp and share broadcast."""
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
    """32 random bits per query row of a head, shared by rows 8 apart: one Philox call per row, with seven rounds."""
    rows = (rows & 7) | ((rows >> 4) << 3)
    head = (rows * 0).to(tl.uint32) + head.to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, rows.to(tl.uint32), head, 0, 0, n_rounds=7)
    return bits


@triton.jit
def keep_scores(row_key, rows, keys, first_key, P_DROP: tl.constexpr):
    """True where dropout keeps a probability: a function of (seed, head, query) and of the key first_key + keys.

    A Philox call per score would cost seven times the loop (bench/FINDINGS.md), so only rows have one, which gives the row a
    key. Along a row the bits are a Weyl sequence through the first half of the integer hash lowbias32 (Wellons, "Prospecting
    for Hash Functions", 2018). Four scores, queries and keys 8 apart, share a hash; each ends with a multiplier of its own. The
    matrix unit's accumulators place the four in one thread whether queries or keys are its rows, so the compiler merges the
    equal parts, forward and backward. p is rounded to 2**-32.

    `rows` and `keys` are positions within blocks that start at multiples of 16, so their low bits are compile-time constants.
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
