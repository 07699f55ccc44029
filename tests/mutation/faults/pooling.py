"""pool_rows: which rows count and how much, what it does with ties, NaN and nothing, and where it reads."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/kernels/test_pool_rows.py"

_kernel = partial(Fault, file="kernels/pool_rows.py", op="pool_rows")

FAULTS = (
    _kernel(
        "weights count from the sequence's first position, also if that is padding",
        before="first = tl.load(index_ptr + start, start < end, other=0)",
        after="first = sequence * seqlen",
        tests=(f"{TESTS}::test_positions_count_from_the_first_token",),
        short=True,
    ),
    _kernel(
        "the last of equal elements gets the gradient",
        before="row = tl.min(tl.where(equal, winner, NONE), axis=0)",
        after="row = tl.max(tl.where(equal, winner, -1), axis=0)",
        tests=(f"{TESTS}::test_the_first_of_equals_gets_the_gradient_of_max",),
        short=True,
    ),
    _kernel(
        "a NaN behind a number is passed over",
        before="| ((x != x) & (best == best))",
        after="",
        tests=(f"{TESTS}::test_nan_is_larger_than_any_number",),
    ),
    _kernel(
        "numbers below zero are never the largest",
        before="return (winner < 0) | (x > best)",
        after="return (x > best)",
        tests=(f"{TESTS}::test_against_the_reference",),
    ),
    _kernel(
        "rows that the mask leaves out count",
        before="(tl.load(mask_ptr + places, inside, other=0) != 0)",
        after="(tl.load(mask_ptr + places, inside, other=0) == 0) | inside",
        tests=(f"{TESTS}::test_by_hand",),
    ),
    _kernel(
        "the mask is read as if it were contiguous",
        before="sequences.to(tl.int64) * mask_batch_stride + columns * mask_col_stride",
        after="sequences.to(tl.int64) * seqlen + columns",
        tests=(f"{TESTS}::test_layouts",),
    ),
    _kernel(
        "16-bit rows are summed in 16 bits",
        before="            tile += x\n",
        after="            tile = (tile + x).to(x_ptr.dtype.element_ty).to(ACC)\n",
        tests=(f"{TESTS}::test_sums_are_float32",),
    ),
    _kernel(
        "sqrt divides by the count",
        before='divisor = tl.sqrt(total) if MODE == "sqrt" else total',
        after="divisor = total",
        tests=(f"{TESTS}::test_by_hand",),
    ),
    _kernel(
        "a sequence without a row that counts is NaN",
        before="divisor = tl.where(total > 0, divisor, 1.0)",
        after="divisor += 0.0",
        tests=(f"{TESTS}::test_no_row_counts",),
    ),
    _kernel(
        "spare rows get the gradient of the batch's first position",
        before="positions = tl.load(index_ptr + rows, row_mask, other=-1)",
        after="positions = tl.maximum(tl.load(index_ptr + rows, row_mask, other=-1), 0)",
        tests=(f"{TESTS}::test_against_the_reference",),
    ),
    _kernel(
        "weights of the gradient count from 0",
        before="scale *= (positions - firsts + 1).to(ACC)",
        after="scale *= (positions - firsts).to(ACC)",
        tests=(f"{TESTS}::test_every_position_of_the_batch",),
    ),
    _kernel(
        "weights count the tokens, not the positions",
        before='index if mask is not None or mode == "weighted" else None',
        after="index if mask is not None else None",
        tests=(f"{TESTS}::test_padding_anywhere",),
    ),
    _kernel(
        "columns of x are taken to be adjacent",
        before="x_col_stride=x.stride(1)",
        after="x_col_stride=1",
        tests=(f"{TESTS}::test_layouts",),
    ),
    _kernel(
        "rows of the upstream gradient are taken to be adjacent",
        before="dy_row_stride=dy.stride(0)",
        after="dy_row_stride=n_cols",
        tests=(f"{TESTS}::test_layouts",),
    ),
    _kernel(
        "one long sequence is read by a few SMs",
        before='return choose("pool_rows_forward_few", x, n_cols)',
        after="return config",
        tests=(f"{TESTS}::test_one_long_sequence_is_read_by_many_multiprocessors",),
    ),
    _kernel(
        "in plain PyTorch rows that the mask leaves out get a gradient",
        before="torch.where(mask[sequences, positions - sequences * seqlen], scale, 0.0)",
        after="scale",
        tests=("tests/faults/test_kernel_fails.py",),
    ),
)
