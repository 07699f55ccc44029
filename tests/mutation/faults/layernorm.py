"""LayerNorm and dropout: dropout_add_layernorm, gelu_layernorm, and the maths that they share."""

from functools import partial

from tests.mutation.fault import Fault

MATHS = "kernels/core/device_math.py"
RESIDUAL = "tests/kernels/test_dropout_add_layernorm.py"
GELU = "tests/kernels/test_gelu_layernorm.py"
DROPOUT = "tests/kernels/test_dropout.py"
BITS = "tests/kernels/core/test_device_math.py"
CHUNKS = "tests/kernels/core/test_configs.py"

_shared = partial(Fault, file=MATHS, op="dropout_add_layernorm")
_residual = partial(Fault, file="kernels/dropout_add_layernorm.py", op="dropout_add_layernorm")
_gelu = partial(Fault, file="kernels/gelu_layernorm.py", op="gelu_layernorm")

FAULTS = (
    _shared(
        "what dropout keeps is not scaled by 1 / (1 - p)",
        before="tl.where(keep, x * SCALE, 0.0)",
        after="tl.where(keep, x, 0.0)",
        tests=(f"{DROPOUT}::test_what_is_kept_is_scaled",),
    ),
    _shared(
        "eps is PyTorch's default, not the given one",
        before="tl.sqrt(variance + eps)",
        after="tl.sqrt(variance + 1e-5)",
        tests=(f"{RESIDUAL}::test_eps",),
    ),
    _shared(
        "the variance is the unbiased one",
        before="variance = tl.sum(centred * centred, axis=1) / n_cols",
        after="variance = tl.sum(centred * centred, axis=1) / (n_cols - 1)",
        tests=(f"{RESIDUAL}::test_leading_dimensions",),
    ),
    _shared(
        "the mean is over the tile's columns instead of the row's",
        before="mean = tl.sum(x, axis=1) / n_cols",
        after="mean = tl.sum(x, axis=1) / x.shape[1]",
        tests=(f"{RESIDUAL}::test_leading_dimensions",),
    ),
    _shared(
        "columns past the last one count in the variance",
        before="centred = tl.where(col_mask[None, :], x - mean[:, None], 0.0)",
        after="centred = x - mean[:, None]",
        tests=(f"{RESIDUAL}::test_leading_dimensions",),
    ),
    _shared(
        "a row's sum is combined with chunks of other rows",
        before="tl.reshape(tl.broadcast_to(x[None, :], [CHUNKS, x.shape[0]]), [CHUNKS * x.shape[0]])[:, None]",
        after="tl.reshape(tl.broadcast_to(x[:, None], [x.shape[0], CHUNKS]), [CHUNKS * x.shape[0]])[:, None]",
        tests=(f"{CHUNKS}::test_shipped_tiles[dropout_add_layernorm-sm_80-16bit-768]",),
    ),
    _shared(
        "the columns of chunks are indexed by row",
        before="(tl.arange(0, CHUNKS * BLOCK_M) // BLOCK_M)[:, None] * BLOCK_N",
        after="(tl.arange(0, CHUNKS * BLOCK_M) % CHUNKS)[:, None] * BLOCK_N",
        tests=(f"{CHUNKS}::test_shipped_tiles[dropout_add_layernorm-sm_80-16bit-768]",),
    ),
    _shared(
        "offsets of elements are 32 bits wide",
        before="return rows.to(tl.int64) * row_stride + cols.to(tl.int64) * col_stride",
        after="return rows.to(tl.int32) * row_stride + cols.to(tl.int32) * col_stride",
        tests=(f"{BITS}::test_offsets_do_not_wrap_at_32_bits",),
    ),
    _shared(
        "dropout's row counter ends at 32 bits",
        before="row_high = (rows.to(tl.int64) >> 32).to(tl.uint32)",
        after="row_high = (rows.to(tl.int64) >> 63).to(tl.uint32)",
        tests=(
            f"{BITS}::test_row_counters_far_apart_are_uncorrelated",
            f"{BITS}::test_rows_are_numbered_across_the_32_bit_boundary",
        ),
    ),
    _shared(
        "two neighbouring elements share one dropout decision",
        before="bits = tl.where((cols & 1) == 0, pair & 0xFFFF, pair >> 16)",
        after="bits = pair & 0xFFFF",
        tests=(f"{BITS}::test_places_within_a_group_of_eight_are_uncorrelated",),
    ),
    _shared(
        "dropout drops with half its probability",
        before="THRESHOLD: tl.constexpr = int(P_DROP * 65536 + 0.5)",
        after="THRESHOLD: tl.constexpr = int(P_DROP * 32768 + 0.5)",
        tests=(f"{BITS}::test_decisions_are_those_draws_against_p",),
    ),
    _residual(
        "the backward uses another dropout seed than the forward",
        before="dx = dropout(dz, keep_mask(tl.load(seed_ptr), rows, cols, P_DROP), P_DROP)",
        after="dx = dropout(dz, keep_mask(tl.load(seed_ptr) + 1, rows, cols, P_DROP), P_DROP)",
        tests=(f"{DROPOUT}::test_forward_and_backward_draw_the_same_mask",),
        short=True,
    ),
    _residual(
        "the residual gets the gradient of x, including dropout",
        before="residual = dx if saved.shared else dresidual",
        after="residual = dx",
        tests=(f"{RESIDUAL}::test_probabilities",),
        short=True,
    ),
    _residual(
        "the sums of the last program are left out",
        before="return dx, dresidual, sums.sum(0)",
        after="return dx, dresidual, sums[: max(1, len(sums) - 1)].sum(0)",
        tests=(RESIDUAL, "-k", "test_matrix and 65x37"),
    ),
    _residual(
        "the residual is read with the strides of x",
        before="x.stride(), residual.stride(), widest",
        after="x.stride(), x.stride(), widest",
        tests=("tests/kernels/test_layouts.py", "-k", "test_every_pair_of_layouts and dropout_add_layernorm"),
    ),
    _residual(
        "the last row is not written",
        before="row_mask = rows < n_rows\n    col_mask",
        after="row_mask = rows < n_rows - 1\n    col_mask",
        tests=("tests/kernels/test_memory.py", "-k", "test_writes_fill_the_outputs and dropout_add_layernorm"),
    ),
    _residual(
        "the weight's gradient lacks the row's 1 / std",
        before="dweight += dy * x_hat",
        after="dweight += tl.where(col_mask, dy * (z - mean), 0.0)",
        tests=(f"{RESIDUAL}::test_leading_dimensions",),
    ),
    _residual(
        "the product's bias has no gradient if x needs none",
        before="needs.weight or needs.bias or needs.x_bias",
        after="needs.weight or needs.bias",
        tests=(f"{RESIDUAL}::test_frozen_inputs",),
    ),
    _gelu(
        "the backward normalises x instead of its activation",
        before="(activate(x, ACTIVATION, EXACT) - mean) * rstd",
        after="(x - mean) * rstd",
        tests=(f"{GELU}::test_leading_dimensions",),
        short=True,
    ),
    _gelu(
        "the backward ignores the product's bias",
        before="    x += tl.load(x_bias_ptr + cols, col_mask, other=0.0).to(ACC)\n        x_hat",
        after="    x += 0.0\n        x_hat",
        tests=(f"{GELU}::test_leading_dimensions",),
        short=True,
    ),
    _gelu(
        "gradients of vectors are rounded to the weight's dtype instead of their own",
        before="if len(dtypes) == 1 else self.mean.dtype",
        after="if len(dtypes) == 1 else self.weight.dtype",
        tests=(f"{GELU}::test_sums_over_rows_are_added_up_and_cast_in_one_launch",),
    ),
    _gelu(
        "sums over rows are cast one by one",
        before="return dtypes.pop() if len(dtypes) == 1 else self.mean.dtype",
        after="return self.mean.dtype",
        tests=(f"{GELU}::test_sums_over_rows_are_added_up_and_cast_in_one_launch",),
    ),
    _gelu(
        "the gradient of the product's bias stops before the activation",
        before="dx_bias += tl.where(col_mask, dx, 0.0)",
        after="dx_bias += tl.where(col_mask, dactivated, 0.0)",
        tests=(f"{GELU}::test_leading_dimensions",),
    ),
    _gelu(
        "eps is always 1e-12",
        before="layernorm(activated, weight, bias, col_mask, N_COLS, EPS)",
        after="layernorm(activated, weight, bias, col_mask, N_COLS, 1e-12)",
        tests=(f"{GELU}::test_eps",),
    ),
    _gelu(
        "LayerNorm's backward lacks the gradient through the mean",
        file=MATHS,
        before="(dy_weighted - mean_dy - x_hat * mean_dy_x_hat) * rstd",
        after="(dy_weighted - x_hat * mean_dy_x_hat) * rstd",
        tests=(f"{GELU}::test_leading_dimensions",),
    ),
)
