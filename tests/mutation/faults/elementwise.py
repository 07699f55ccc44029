"""bias_gelu, gather_rows, and how every kernel is launched and differentiated."""

from functools import partial

from tests.mutation.fault import Fault

BIAS_GELU = "tests/kernels/test_bias_gelu.py"
GATHER = "tests/kernels/test_gather_rows.py"

_gelu = partial(Fault, file="kernels/bias_gelu.py", op="bias_gelu")
_maths = partial(Fault, file="kernels/core/device_math.py", op="bias_gelu")
_gather = partial(Fault, file="kernels/gather_rows.py", op="gather_rows")
_launch = partial(Fault, file="kernels/core/launch.py")
_autograd = partial(Fault, file="kernels/core/autograd.py")
_define = partial(Fault, file="kernels/core/op.py")

FAULTS = (
    _maths(
        "gelu is the tanh approximation",
        before="y = x * cdf",
        after="y = x * sigmoid(gelu_tanh_argument(x))",
        tests=(f"{BIAS_GELU}::test_the_default_is_the_exact_gelu",),
        short=True,
    ),
    _gelu(
        "the bias gradient lacks the sum of the last program",
        before="return dx, sums.sum(0)",
        after="return dx, sums[: max(1, len(sums) - 1)].sum(0)",
        tests=(BIAS_GELU, "-k", "test_matrix and 129x37"),
        short=True,
    ),
    _gelu(
        "the last block of columns has no program in the forward",
        before="* cdiv(n_cols, config.BLOCK_N), config, numbers)",
        after="* max(1, n_cols // config.BLOCK_N), config, numbers)",
        tests=(BIAS_GELU, "-k", "test_matrix and 2x1500"),
    ),
    _gelu(
        "the bias gradient is the sum of dy",
        before="dbias += tl.sum(dx, axis=0)",
        after="dbias += tl.sum(dy, axis=0)",
        tests=(f"{BIAS_GELU}::test_frozen_inputs",),
    ),
    _gelu(
        "the backward ignores the bias",
        before="x += bias[None, :]\n        dx =",
        after="dx =",
        tests=(f"{BIAS_GELU}::test_frozen_inputs",),
    ),
    _gelu(
        "the output's gradient is read with the strides of x",
        before="dy.stride(), x.stride(), x, activation)",
        after="x.stride(), x.stride(), x, activation)",
        tests=("tests/kernels/test_layouts.py", "-k", "test_gradient_of_a_sum and bias_gelu"),
    ),
    _maths(
        "gelu's derivative is its gate alone",
        before="dx = dy * (cdf + x * pdf)",
        after="dx = dy * cdf",
        tests=(f"{BIAS_GELU}::test_frozen_inputs",),
    ),
    _maths(
        "relu has a gradient at 0",
        before="tl.where(x <= 0, 0.0, dy)",
        after="tl.where(x < 0, 0.0, dy)",
        tests=(f"{BIAS_GELU}::test_gradient_of_relu_at_zero_is_zero",),
    ),
    _maths(
        "relu makes NaN a 0",
        before="y = tl.where(x < 0, 0.0, x)",
        after="y = tl.where(x > 0, x, 0.0)",
        tests=(f"{BIAS_GELU}::test_nan_and_infinity_come_through_as_in_torch",),
    ),
    _maths(
        "a coefficient of the 16-bit gelu is off by one percent",
        before="0.215696782",
        after="0.217853750",
        tests=("tests/kernels/core/test_device_math.py::test_the_normal_distribution_of_16_bit_types",),
    ),
    _gather(
        "the backward gathers by the forward's index",
        before="backward(Inputs(dy, saved.inverse, saved.index))",
        after="backward(Inputs(dy, saved.index, saved.inverse))",
        tests=(f"{GATHER}::test_rows_that_nobody_takes_are_not_read_and_get_no_gradient",),
        short=True,
    ),
    _gather(
        "a negative index takes the row before the first",
        before="taken = (sources >= 0)[:, None] & col_mask[None, :]",
        after="taken = (sources >= -1)[:, None] & col_mask[None, :]",
        tests=(
            f"{GATHER}::test_nothing_of_something_is_zeros",
            f"{GATHER}::test_rows_that_nobody_takes_are_not_read_and_get_no_gradient",
        ),
        short=True,
    ),
    _gather(
        "rows past the last are written",
        before="x, row_mask[:, None] & col_mask[None, :])",
        after="x, (rows <= n_rows)[:, None] & col_mask[None, :])",
        tests=(f"{GATHER}::test_writes_stay_inside",),
    ),
    _gather(
        "columns are treated as contiguous",
        before="x_col_stride=x.stride(1)",
        after="x_col_stride=1",
        tests=(f"{GATHER}::test_layouts",),
    ),
    _define(
        "a second derivative is silently 0",
        before="return first_order_only(found, (*upstream, *sources, *ctx.links)) if torch.is_grad_enabled() else found",
        after="return found",
        tests=("tests/kernels/test_gradcheck.py::test_a_second_derivative_raises",),
    ),
    _autograd(
        "a second derivative of named inputs is silently 0",
        before="_FirstOrderOnly.apply(g.detach().requires_grad_(), *sources)",
        after="_FirstOrderOnly.apply(g.detach().requires_grad_())",
        tests=("tests/models/test_autograd.py::test_a_second_derivative_of_named_inputs_raises[of_inputs--one op]",),
    ),
    _autograd(
        "a second derivative with respect to an input that is not saved is silently 0",
        before="[x if x.is_leaf else _Link.apply(x) for x in others]",
        after="[]",
        tests=("tests/models/test_autograd.py::test_a_second_derivative_by_what_is_not_kept_raises",),
    ),
    _define(
        "single kernels get saved tensors as hooks return them",
        before="x if x is None or x.stride() == stride else x.new_empty_strided(x.shape, stride).copy_(x)",
        after="x",
        tests=("tests/models/test_autograd.py::test_saved_tensors_come_back_with_other_strides[module by module]",),
    ),
    _launch(
        "a width takes the row of the table above its own",
        before="if limit >= width), max(by_width))]",
        after="if limit > width), max(by_width))]",
        tests=("tests/kernels/core/test_launch.py::test_a_width_takes_the_first_row_that_holds_it",),
    ),
    _launch(
        "float64 is summed in float32",
        before="return torch.float64 if dtype == torch.float64 else torch.float32",
        after="return torch.float32",
        tests=("tests/kernels/core/test_launch.py::test_only_float64_is_summed_in_float64",),
    ),
)
