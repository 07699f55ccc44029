"""attention's gradients of short sequences."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/kernels/attention/test_short.py"

_short = partial(Fault, file="kernels/attention/backward_short.py", op="attention")

FAULTS = (
    _short(
        "dq lacks the scale",
        before="dq *= SCALE * KEEP_SCALE",
        after="dq *= KEEP_SCALE",
        tests=(TESTS, "-k", "test_against_the_reference and 33 and plain"),
    ),
    _short(
        "dk is not rescaled for dropout",
        before="(SCALE * KEEP_SCALE)\n        _store_keys(dk_ptr",
        after="SCALE\n        _store_keys(dk_ptr",
        tests=(TESTS, "-k", "test_against_the_reference and 33 and dropped"),
    ),
    _short(
        "delta is that of a row without dropout",
        before="delta += tl.sum(dropped * dweights, axis=1)",
        after="delta += KEEP_SCALE * tl.sum(dropped * dweights, axis=1)",
        tests=(TESTS, "-k", "test_against_the_reference and 33 and dropped"),
    ),
    _short(
        "the backward uses another dropout seed than the forward",
        before="row_keys(tl.load(seed_ptr), sequence_head, rows)",
        after="row_keys(tl.load(seed_ptr) + 1, sequence_head, rows)",
        tests=(TESTS, "-k", "test_the_forwards_dropout and 23"),
    ),
    _short(
        "every block of keys uses the dropout of the first",
        before="tl.arange(0, BLOCK_N)[None, :], block, P_DROP)",
        after="tl.arange(0, BLOCK_N)[None, :], block * 0, P_DROP)",
        tests=(TESTS, "-k", "test_the_forwards_dropout and 23 and 32"),
    ),
    _short(
        "masked keys have gradients",
        before="seen = seen & (none | (tl.load(key_mask_ptr + keys, seen, other=0) != 0))",
        after="seen = seen & (none | (tl.load(key_mask_ptr + keys, seen, other=0) >= 0))",
        tests=(TESTS, "-k", "test_masks_of_keys and holes"),
    ),
    _short(
        "gradients of masked keys are not written",
        before="    if HIDES:\n",
        after="    if HIDES and D < 0:\n",
        tests=(TESTS, "-k", "test_masks_of_keys and holes"),
    ),
    _short(
        "gradients of keys past the last visible one are not written",
        before="tl.cdiv(end, BLOCK_N) * BLOCK_N, seqlen_k",
        after="seqlen_k, seqlen_k",
        tests=(TESTS, "-k", "test_masks_of_keys and first"),
    ),
    _short(
        "the mask of a block is that of the one before it",
        before="seen = _seen_keys(key_mask_ptr, keys + BLOCK_N,",
        after="seen = _seen_keys(key_mask_ptr, keys,",
        tests=(TESTS, "-k", "test_masks_of_keys and left"),
    ),
    _short(
        "a row that sees no key has no gradient",
        before='average = logsumexp == float("inf")',
        after='average = logsumexp == float("-inf")',
        tests=(TESTS, "-k", "test_masks_of_keys and none"),
    ),
    _short(
        "weights of invisible keys overflow",
        before="tl.exp2(tl.minimum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL))",
        after="tl.exp2(scores)",
        tests=(f"{TESTS}::test_masked_keys_do_not_matter_where_the_others_score_low",),
    ),
    _short(
        "causality is aligned with the first key",
        before="rows[:, None] + (seqlen_k - seqlen_q)",
        after="rows[:, None]",
        tests=(TESTS, "-k", "test_lengths_that_differ and causal and 17"),
    ),
    _short(
        "keys of a sequence without queries have gradients",
        before="end = tl.where(seqlen_q > 0, end, 0)",
        after="end = tl.where(seqlen_q >= 0, 0 * end, 0)",
        tests=(f"{TESTS}::test_packed_queries_of_other_rows",),
    ),
    _short(
        "sums of dv include masked keys",
        before="tl.sum(tl.where(seen[None, :], dv, 0.0), axis=1)",
        after="tl.sum(dv, axis=1)",
        tests=(TESTS, "-k", "test_sums_of_each_sequence and padded"),
    ),
    _short(
        "sums of dq are those of dv",
        before="store_row(sums_ptr, tl.sum(dq, axis=0),",
        after="store_row(sums_ptr, dv_sum,",
        tests=(TESTS, "-k", "test_sums_of_each_sequence and plain"),
    ),
    Fault(
        "sequences of 129 take the kernel for short ones",
        file="kernels/core/launch.py",
        before="for limit in LENGTHS if limit >= length)\n    return",
        after="for limit in LENGTHS if limit >= length - 1)\n    return",
        tests=(TESTS, "-k", "test_other_calls_take_the_kernels_of_any_length and longer"),
        op="attention",
    ),
)
