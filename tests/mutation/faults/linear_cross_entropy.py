"""linear_cross_entropy: losses of rows, their reduction, and gradients in chunks."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/kernels/test_linear_cross_entropy.py"
FUZZ = "tests/kernels/test_linear_cross_entropy_fuzz.py"

_rows = partial(Fault, file="kernels/linear_cross_entropy_rows.py", op="linear_cross_entropy")
_op = partial(Fault, file="kernels/linear_cross_entropy.py", op="linear_cross_entropy")

FAULTS = (
    _rows(
        "ignored labels count in the mean",
        before="counted += ours.to(tl.int32)",
        after="counted += (rows < n_rows).to(tl.int32)",
        tests=(f"{TESTS}::test_one_label",),
        short=True,
    ),
    _rows(
        "the label's gradient is not smoothed",
        before="dloss = (dloss * (1.0 - SMOOTHING))[None, :, None]",
        after="dloss = dloss[None, :, None]",
        tests=(f"{TESTS}::test_label_smoothing",),
        short=True,
    ),
    _rows(
        "smoothing spreads over the buffer's columns",
        before="tl.sum(sum_x, axis=1) / N_COLS",
        after="tl.sum(sum_x, axis=1) / STRIDE",
        tests=(f"{TESTS}::test_label_smoothing",),
    ),
    _rows(
        "the sum is not rescaled when a higher logit comes",
        before="total * _exp(top - higher)",
        after="total * tl.minimum(_exp(top - higher) + 1.0, 1.0)",
        tests=(f"{TESTS}::test_berts_vocabulary",),
    ),
    _rows(
        "columns past the vocabulary count in the softmax",
        before='return tl.where(cols < N_COLS, x, float("-inf")) if END else x',
        after="return x",
        tests=(f"{TESTS}::test_one_label",),
    ),
    _rows(
        "the label's logit lacks its bias",
        before="label_logit += tl.load(label_biases, known, other=0.0).to(ACC)",
        after="label_logit += 0.0",
        tests=(f"{TESTS}::test_one_label",),
    ),
    _rows(
        "ignored rows have a gradient",
        before="return tl.where(counted, dx, 0.0)",
        after="return tl.where(counted | True, dx, 0.0)",
        tests=(f"{TESTS}::test_one_label",),
    ),
    _rows(
        "a mean over no label is 0",
        before="loss = loss / n.to(ACC)",
        after="loss = loss / tl.maximum(n, 1).to(ACC)",
        tests=(f"{TESTS}::test_all_labels_ignored",),
    ),
    _rows(
        "the gradient of the loss itself is not multiplied with",
        before="factor = tl.load(dloss_ptr).to(ACC) * tl.load(scale_ptr).to(ACC)",
        after="factor = tl.load(scale_ptr).to(ACC)",
        tests=(f"{TESTS}::test_the_losss_own_gradient",),
    ),
    _rows(
        "a gradient a row is taken to be contiguous",
        before="dlosses_ptr + rows * dlosses_stride",
        after="dlosses_ptr + rows",
        tests=(f"{TESTS}::test_a_gradient_a_row",),
    ),
    _rows(
        "the label after the last class is accepted",
        before="(labels < 0) | (labels >= n_cols))]",
        after="(labels < 0) | (labels > n_cols))]",
        tests=("tests/kernels/test_linear_cross_entropy_arguments.py::test_a_label_that_is_no_class",),
    ),
    _op(
        "each chunk starts the weight's gradient anew",
        before="self._hidden[self._done], self.alpha, self._done == 0)",
        after="self._hidden[self._done], self.alpha, True)",
        tests=(f"{FUZZ}::test_the_length_of_a_chunk",),
    ),
    _op(
        "the bias gradient keeps float16's scale",
        before="return total if self.alpha == 1.0 else total.mul_(self.alpha)",
        after="return total",
        tests=(f"{TESTS}::test_the_losss_own_gradient",),
    ),
    _op(
        "the bias gradient is the first chunk's",
        before="total = self._dbias[0] if len(self._dbias) == 1 else self._dbias.sum(0)",
        after="total = self._dbias[0] if len(self._dbias) else self._dbias.sum(0)",
        tests=(f"{FUZZ}::test_the_length_of_a_chunk",),
    ),
    _op(
        "the last chunk's rows are the buffer's",
        before="if len(rows) < len(logits):  # the last",
        after="if len(rows) < len(logits) // 2:  # the last",
        tests=(f"{FUZZ}::test_the_length_of_a_chunk", TESTS),
    ),
    _op(
        "the weight's gradient is not divided by the labels that count",
        before="if needs_weight:\n        hidden = scaled(hidden, dloss, scale, dtype)",
        after="if needs_weight and needs_hidden:\n        hidden = scaled(hidden, dloss, scale, dtype)",
        tests=(f"{TESTS}::test_frozen_inputs",),
    ),
)
