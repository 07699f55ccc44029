"""attention's forward: masks, the running softmax, dropout's bits, packed rows, and its launcher."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/kernels/attention/test_attention.py"
MASKS = "tests/kernels/attention/test_masks.py"
BOUNDS = "tests/kernels/test_key_bounds.py"
PADDING = (MASKS, "-k", "test_padding and (none or right) and 5-torch")  # few of many
CAUSAL = (MASKS, "-k", "test_causal_and_padding and none")
DROPOUT = "tests/kernels/attention/test_dropout.py"
PACKED = "tests/kernels/attention/test_packed.py"
GROUPED = "tests/kernels/attention/test_grouped.py"
ALIGNMENT = "tests/kernels/attention/test_alignment.py"

_op = partial(Fault, file="kernels/attention/__init__.py", op="attention")
_forward = partial(Fault, file="kernels/attention/forward.py", op="attention")
_tiles = partial(Fault, file="kernels/attention/tiles.py", op="attention")

FAULTS = (
    _tiles(
        "the key mask is dropped",
        before="tl.load(key_mask_ptr + k_index, inside, other=0) != 0",
        after="tl.load(key_mask_ptr + k_index, inside, other=0) >= 0",
        tests=PADDING,
        short=True,
    ),
    _tiles(
        "causal is off by one",
        before="k_index <= q_index + (seqlen_k - seqlen_q)",
        after="k_index < q_index + (seqlen_k - seqlen_q)",
        tests=CAUSAL,
    ),
    _tiles(
        "an additive mask is not converted to log2",
        before="tl.where(mask <= LOWEST, 0, mask).to(scores.dtype) * LOG2E)",
        after="tl.where(mask <= LOWEST, 0, mask).to(scores.dtype))",
        tests=(MASKS, "-k", "test_added_masks and float32-float32"),
    ),
    _tiles(
        "a mask's strides are exchanged",
        before="q_index.to(tl.int64) * mask_strides[2] + k_index.to(tl.int64) * mask_strides[3]",
        after="q_index.to(tl.int64) * mask_strides[3] + k_index.to(tl.int64) * mask_strides[2]",
        tests=(f"{MASKS}::test_layouts_of_masks",),
    ),
    _tiles(
        "the last valid key is not read",
        before="end = tl.minimum(end, tl.load(key_bounds_ptr + batch * 3 + 2))",
        after="end = tl.minimum(end, tl.load(key_bounds_ptr + batch * 3 + 2) - 1)",
        tests=(f"{MASKS}::test_the_last_valid_key_at_the_edge_of_a_block",),
    ),
    _tiles(
        "a row that sees no key is not marked",
        before="none = top <= MASKED_SCORE",
        after="none = top < MASKED_SCORE",
        tests=(f"{MASKS}::test_a_row_that_sees_no_key_is_the_average_of_all",),
    ),
    _tiles(
        "the float32 backward's statistics lack the softmax's sum",
        before="tl.where(none, 1.0, 1.0 / total)",
        after="tl.where(none, 1.0, 1.0)",
        tests=(f"{TESTS}::test_scale",),
    ),
    _tiles(
        "the float16 backward's statistics lack the softmax's sum",
        before='tl.where(none, float("inf"), top + tl.log2(total))',
        after='tl.where(none, float("inf"), top)',
        tests=(f"{PACKED}::test_dtypes_and_head_sizes",),
    ),
    _tiles(
        "a packed sequence reads its neighbour's first row",
        before="length = tl.load(cu_seqlens_ptr + batch + 1) - start",
        after="length = tl.load(cu_seqlens_ptr + batch + 1) - start + 1",
        tests=(f"{PACKED}::test_sequences_do_not_see_each_other",),
    ),
    _tiles(
        "offsets of rows are 32 bits wide",
        before="rows.to(tl.int64)[:, None] * strides[1]",
        after="rows.to(tl.int32)[:, None] * strides[1]",
        tests=("tests/kernels/attention/test_offsets.py::test_elements_far_apart[q-1]", "-m", "long"),
    ),
    _tiles(
        "every head drops the same probabilities",
        before="head = (rows * 0).to(tl.uint32) + head.to(tl.uint32)",
        after="head = (rows * 0).to(tl.uint32)",
        tests=(
            f"{DROPOUT}::test_heads_are_numbered_through_the_batch",
            "tests/kernels/attention/test_dropout_statistics.py::test_heads_are_uncorrelated",
        ),
    ),
    _tiles(
        "every block of keys draws the dropout of the first block",
        before="group = ((keys & 7) | ((keys >> 4) << 3)) + (first_key >> 1)",
        after="group = ((keys & 7) | ((keys >> 4) << 3)) + (first_key * 0)",
        tests=(
            f"{DROPOUT}::test_the_mask_depends_on_query_and_key_alone",
            "tests/kernels/attention/test_dropout_statistics.py::test_far_queries_and_keys_are_uncorrelated",
        ),
    ),
    _forward(
        "the key mask is the first sequence's",
        before="mask_strides, batch, max_seqlen_k)",
        after="mask_strides, 0, max_seqlen_k)",
        tests=PADDING,
    ),
    _forward(
        "keys are treated as valid to the end of their block",
        before="every = every // BLOCK_N * BLOCK_N",
        after="every = tl.cdiv(every, BLOCK_N) * BLOCK_N",
        tests=PADDING,
    ),
    _forward(
        "softmax without the maximum",
        before="new_top = tl.maximum(top, tl.max(scores, axis=1) * (SCALE * LOG2E))",
        after="new_top = tl.maximum(top, tl.max(scores, axis=1) * 0.0)",
        tests=(f"{TESTS}::test_scores_past_what_an_exponential_holds",),
    ),
    _forward(
        "the running sum is not rescaled when a higher score comes",
        before="acc = acc * rescale[:, None]",
        after="acc = acc * tl.minimum(rescale + 1.0, 1.0)[:, None]",
        tests=(f"{TESTS}::test_a_top_score_that_grows_from_block_to_block",),
    ),
    _forward(
        "kept probabilities are not scaled",
        before="out = acc * (KEEP_SCALE / tl.where(total == 0, 1.0, total))[:, None]",
        after="out = acc * (1.0 / tl.where(total == 0, 1.0, total))[:, None]",
        tests=(f"{DROPOUT}::test_what_is_kept_is_scaled",),
    ),
    _forward(
        "a sequence without keys divides by 0",
        before="tl.where(total == 0, 1.0, total)",
        after="total",
        tests=(f"{PACKED}::test_queries_of_a_sequence_without_keys_are_zero",),
    ),
    _op(
        "values are read with the strides of the keys",
        before="_strides(q), _strides(k), _strides(v), None",
        after="_strides(q), _strides(k), _strides(k), None",
        tests=("tests/kernels/attention/test_layouts.py", "-k", "test_four_strides and float64"),
    ),
    _forward(
        "a group's heads read the keys of another group",
        before="k_strides, batch, first_key_row, head // GROUP, PACKED)",
        after="k_strides, batch, first_key_row, head % (n_heads // GROUP), PACKED)",
        tests=(GROUPED, "-k", "test_the_bits_of_heads_that_are_not_shared and none"),
    ),
    _op(
        "rows are assumed aligned to 16 bytes whatever the address of the tensor",
        before="x.data_ptr() % 16 == 0 and x.stride(-1) == 1",
        after="x.stride(-1) == 1",
        tests=(f"{ALIGNMENT}::test_one_tensor_that_is_not_aligned",),
    ),
    _op(
        "rows are assumed aligned to 16 bytes whatever their stride",
        before="not any(stride % vector for stride in x.stride()[:-1])",
        after="not any(stride % 2 for stride in x.stride()[:-1])",
        tests=(f"{ALIGNMENT}::test_it_is_true_of_every_address",),
    ),
    _op(
        "dK and dV are written in 16-byte vectors although dout is unaligned",
        before="aligned = _aligned(q, k, v, out, dout, dq, dk, dv)",
        after="aligned = _aligned(q, k, v, out, dq, dk, dv)",
        tests=(f"{ALIGNMENT}::test_an_upstream_gradient_that_is_not_aligned",),
    ),
    _tiles(
        "a model of one head does not compile",
        before='SIZES = ("n_heads", ',
        after="SIZES = (",
        tests=("tests/kernels/test_specialisations.py", "-k", "test_every_kernel_compiles_at_every_kind_of_int and one"),
    ),
    *(
        Fault(says, file="kernels/key_bounds.py", before=before, after=after, tests=(test,), op="key_bounds", short=short)
        for says, before, after, test, short in (
            (
                "the last valid key is past the end",
                "tl.where(seen, keys + 1, 0)",
                "tl.where(seen, keys, 0)",
                f"{MASKS}::test_bounds",
                True,
            ),
            (
                "only the first thousand keys are read",
                "for start in range(0, seqlen, BLOCK_N):",
                "for start in range(0, tl.minimum(seqlen, BLOCK_N), BLOCK_N):",
                f"{BOUNDS}::test_against_the_reference",
                True,
            ),
            (
                "a key behind the mask's end is seen",
                "inside, other=0) != 0",
                "inside, other=1) != 0",
                f"{BOUNDS}::test_against_the_reference",
                False,
            ),
            (
                "keys of all masks are treated as contiguous",
                "keys.to(tl.int64) * mask_k_stride",
                "keys.to(tl.int64)",
                f"{BOUNDS}::test_against_the_reference",
                False,
            ),
            (
                "leading keys are counted up to the last gap",
                "leading = tl.minimum(leading, tl.where(seen, seqlen, keys))",
                "leading = tl.where(seen, leading, keys)",
                f"{BOUNDS}::test_against_the_reference",
                False,
            ),
        )
    ),
    _op(
        "float32 products are TF32 whatever torch's setting",
        before="return float32_products()",
        after='return "tf32"',
        tests=(f"{TESTS}::test_the_precision_of_float32_products_is_torchs",),
    ),
)
