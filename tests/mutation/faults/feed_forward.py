"""feed_forward: products with epilogues, when they are taken, and the layer that uses them."""

from functools import partial

from tests.mutation.fault import Fault

OP = "tests/kernels/feed_forward/test_feed_forward.py"
LAYER = "tests/kernels/encoder_layer/test_epilogues.py"
FAIL = "tests/faults/test_epilogues_fail.py"
_kernel = partial(Fault, file="kernels/feed_forward/products.py", op="feed_forward")
_op = partial(Fault, file="kernels/feed_forward/__init__.py", op="feed_forward")
_plan = partial(Fault, file="kernels/encoder_layer/plan.py", op="feed_forward")

FAULTS = (
    _kernel(
        "rows past the last are written",
        before="tl.arange(0, PART)[None, :], (rows <= last)[:, None]",
        after="tl.arange(0, PART)[None, :], (rows >= 0)[:, None]",
        tests=(f"{OP}::test_rows_past_the_last_are_not_written",),
        short=True,
    ),
    _kernel(
        "rows past the last count in the bias gradient",
        before="tl.sum(tl.where(mask, dh, 0.0), axis=0)",
        after="tl.sum(dh, axis=0)",
        tests=(OP, "-k", "test_any_number_of_rows and program"),
        short=True,
    ),
    _kernel(
        "quarters of a tile in the wrong order",
        before="    return first, second, third, fourth",
        after="    return first, third, second, fourth",
        tests=(OP, "-k", "test_any_number_of_rows and 17"),
    ),
    _kernel(
        "the last group of row blocks has the size of the others",
        before="height = tl.minimum(tl.cdiv(n_rows, BLOCK_M) - first, GROUP)",
        after="height = GROUP",
        tests=(OP, "-k", "test_any_number_of_rows and 130"),
    ),
    _kernel(
        "the activation reads a sum that was not rounded",
        before="(x, weight, BLOCK_K, inner_stride, ACC, BLOCK_M, BLOCK_N, BLOCK_K).to(LOW))",
        after="(x, weight, BLOCK_K, inner_stride, ACC, BLOCK_M, BLOCK_N, BLOCK_K))",
        tests=(OP, "-k", "test_16_bit_results"),
    ),
    _kernel(
        "a persistent program stops after its first tile",
        before="end = tl.cdiv(n_rows, BLOCK_M) * (N_COLS // BLOCK_N) if PERSISTENT else first + 1",
        after="end = first + 1",
        tests=(OP, "-k", "test_any_number_of_rows and persistent"),
    ),
    _kernel(
        "sums of a block of rows overwrite those of another",
        before="sums_ptr + (row // BLOCK_M * N_COLS + col + i * PART)",
        after="sums_ptr + (col + i * PART)",
        tests=(OP, "-k", "test_any_number_of_rows and program"),
    ),
    _kernel(
        "the epilogue is on for fewer rows than the table says",
        before="return least is not None and n_rows >= least",
        after="return least is not None",
        tests=(OP, "-k", "test_the_table_decides"),
    ),
    _kernel(
        "the epilogue is on for sizes that tiles do not divide",
        before="return n_inner % config.BLOCK_K == 0 and n_cols % config.BLOCK_N == 0 and n_inner > 0",
        after="return n_inner > 0",
        tests=(OP, "-k", "test_sizes_that_tiles"),
    ),
    _kernel(
        "the epilogue is on for activations whose slope it cannot compute",
        before="if activation not in ACTIVATIONS or KERNELS",
        after="if KERNELS",
        tests=(OP, "-k", "test_other_activations"),
    ),
    _op(
        "rows with strides are read as if they had none",
        before="    tensor = tensor.contiguous()\n",
        after="",
        tests=(OP, "-k", "test_leading_dimensions_and_strides"),
    ),
    _op(
        "the backward uses its epilogue even if it is off",
        before="return Saved(*inputs[:4], h, inputs.activation, inputs.gradient_on)",
        after="return Saved(*inputs[:4], h, inputs.activation, inputs.product_on)",
        tests=(OP, "-k", "test_every_way and gelu and float32"),
    ),
    _plan(
        "h is written without a backward",
        before='saved = ("h_ptr", low if call.gradient else None)',
        after='saved = ("h_ptr", low)',
        tests=(LAYER, "-k", "test_two_launches_fewer"),
    ),
    _plan(
        "a product that does not compile disables the layer op",
        before="            failures.record(failure)\n            return None",
        after="            raise",
        tests=(FAIL, "-k", "test_in_a_layer and compiled"),
    ),
    _kernel(
        "a product that failed is tried at each call",
        before=" or KERNELS[part == GRADIENT] in failures.reasons",
        after="",
        tests=(FAIL, "-k", "test_in_a_layer and launched"),
    ),
)
