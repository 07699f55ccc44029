"""attention's gradients."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/kernels/attention/test_attention.py"
MASKS = "tests/kernels/attention/test_masks.py"
PADDING = (MASKS, "-k", "test_padding and (none or right) and 5-torch")  # few of many
CAUSAL = (MASKS, "-k", "test_causal_and_padding and none")
DROPOUT = "tests/kernels/attention/test_dropout.py"
COMMON = "tests/kernels/attention/test_common_parts.py"
GROUPED = "tests/kernels/attention/test_grouped.py"

_keys = partial(Fault, file="kernels/attention/backward_kv.py", op="attention")
_queries = partial(Fault, file="kernels/attention/backward_q.py", op="attention")

FAULTS = (
    _queries(
        "dq lacks the scale",
        before="    dq *= SCALE\n",
        after="",
        tests=(f"{TESTS}::test_scale",),
        short=True,
    ),
    _queries(
        "dk and dv get a delta from rounded outputs",
        before="        delta += left\n",
        after="",
        tests=(f"{COMMON}::test_gradients_of_rows_that_are_alike[plain]",),
    ),
    _queries(
        "dq keeps the error of delta",
        before="        dq -= left[:, None] * _typical_key(",
        after="        dq -= 0.0 * left[:, None] * _typical_key(",
        tests=(f"{COMMON}::test_gradients_of_rows_that_are_alike[plain]",),
    ),
    _queries(
        "delta is summed before dropout",
        before="True, MASK, SCALE, CAUSAL, P_DROP, PRECISION",
        after="True, MASK, SCALE, CAUSAL, 0.0, PRECISION",
        tests=("tests/kernels/attention/test_gradcheck.py::test_element_by_element",),
    ),
    _queries(
        "dq uses the key mask of the first sequence",
        before="mask_strides, batch, max_seqlen_k)",
        after="mask_strides, 0, max_seqlen_k)",
        tests=PADDING,
    ),
    _queries(
        "dq reads the values of the first group",
        before="v_strides, batch, first_key_row, head // GROUP, PACKED)",
        after="v_strides, batch, first_key_row, 0, PACKED)",
        tests=(GROUPED, "-k", "test_against_the_reference and none"),
    ),
    _queries(
        "the backward uses another dropout seed than the forward",
        before="row_key = row_keys(tl.load(seed_ptr), sequence_head, rows)",
        after="row_key = row_keys(tl.load(seed_ptr) + 1, sequence_head, rows)",
        tests=(f"{DROPOUT}::test_forward_and_both_backward_kernels_draw_the_same_mask",),
    ),
    _queries(
        "the 16-bit delta is that of another head's output",
        before="out_ptr = head_of(out_ptr, out_strides, batch, first_row, head, True)",
        after="out_ptr = head_of(out_ptr, out_strides, batch, first_row, 0, True)",
        tests=(MASKS, "-k", "test_added_masks and float16-float16-biases"),
    ),
    _queries(
        "dk lacks delta for the last rows of a partial block",
        before="store_queries(queries_ptr + here * 4, rows, seqlen_q,",
        after="store_queries(queries_ptr + here * 4, rows, seqlen_q // 16 * 16,",
        tests=("tests/kernels/attention/test_gradcheck.py::test_element_by_element",),
    ),
    _keys(
        "the last head of a group is left out of dk and dv",
        before="for member in range(GROUP):",
        after="for member in range(GROUP - 1 if GROUP > 1 else 1):",
        tests=(GROUPED, "-k", "test_the_bits_of_heads_that_are_not_shared and none"),
    ),
    _keys(
        "all heads of a group use the mask of the first one",
        before="seqlen_q, seqlen_k, masks, head,\n            MASK",
        after="seqlen_q, seqlen_k, masks, kv_head * GROUP,\n            MASK",
        tests=(GROUPED, "-k", "test_the_bits_of_heads_that_are_not_shared and by"),
    ),
    _keys(
        "all heads of a group use the dropout and the softmax of the first one",
        before="queries_ptr + head * n_rows * 4",
        after="queries_ptr + kv_head * GROUP * n_rows * 4",
        tests=(GROUPED, "-k", "test_the_bits_of_heads_that_are_not_shared and dropped"),
    ),
    _keys(
        "a dropped weight that is not finite spoils the gradients of values",
        before="dropped = tl.where(keep, weights, 0.0)",
        after="dropped = weights * keep.to(ACC)",
        tests=("tests/kernels/attention/test_metamorphic.py", "-k", "test_what_is_not_finite_spoils and q"),
    ),
    _keys(
        "dk is not rescaled for dropout",
        before="dk *= SCALE * KEEP_SCALE",
        after="dk *= SCALE",
        tests=("tests/kernels/attention/test_gradcheck.py::test_element_by_element",),
    ),
    _queries(
        "dk's delta is rescaled twice for dropout",
        before="logsumexp, share, delta * (1.0 - P_DROP), row_key)",
        after="logsumexp, share, delta, row_key)",
        tests=("tests/kernels/attention/test_gradcheck.py::test_element_by_element",),
    ),
    _keys(
        "dk is scaled twice",
        before="dk *= SCALE * KEEP_SCALE",
        after="dk *= SCALE * SCALE * KEEP_SCALE",
        tests=(f"{TESTS}::test_scale",),
    ),
    _keys(
        "dv is not rescaled for dropout",
        before="    dv *= KEEP_SCALE\n",
        after="",
        tests=(
            f"{DROPOUT}::test_what_is_kept_is_scaled",
            f"{DROPOUT}::test_forward_and_both_backward_kernels_draw_the_same_mask",
        ),
    ),
    _keys(
        "blocks of keys are skipped one too early",
        before="past = block * BLOCK_N >= tl.load(key_bounds_ptr + batch * 3 + 2)",
        after="past = (block + 1) * BLOCK_N >= tl.load(key_bounds_ptr + batch * 3 + 2)",
        tests=PADDING,
    ),
    _keys(
        "queries start one block of keys too late where there are more keys than queries",
        before="start = tl.maximum(block * BLOCK_N - (seqlen_k - seqlen_q), 0) // BLOCK_M * BLOCK_M",
        after="start = tl.maximum(block * BLOCK_N, 0) // BLOCK_M * BLOCK_M",
        tests=CAUSAL,
    ),
    _keys(
        "the block on the diagonal is not masked",
        before="(block + 1) * BLOCK_N - 1 - (seqlen_k - seqlen_q), 0), BLOCK_M) * BLOCK_M",
        after="block * BLOCK_N - (seqlen_k - seqlen_q), 0), BLOCK_M) * BLOCK_M",
        tests=CAUSAL,
    ),
    _keys(
        "keys get no gradient from a row that averages all of them",
        before="start = tl.where(sees_none(key_bounds_ptr, batch, 0, seqlen_q, seqlen_k, CAUSAL), 0, start)",
        after="start = tl.where(sees_none(key_bounds_ptr, batch, 0, seqlen_q, seqlen_k, CAUSAL), start, start)",
        tests=(f"{MASKS}::test_a_row_that_sees_no_key_is_the_average_of_all",),
    ),
)
