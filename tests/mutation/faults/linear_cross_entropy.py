"""linear_cross_entropy: losses of rows, their reduction, and gradients in chunks."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/kernels/linear_cross_entropy/test_linear_cross_entropy.py"
WEIGHTS = "tests/kernels/linear_cross_entropy/test_weights.py"
MEMORY = "tests/kernels/linear_cross_entropy/test_memory.py"
FUZZ = "tests/kernels/linear_cross_entropy/test_fuzz.py"

_rows = partial(Fault, file="kernels/linear_cross_entropy/rows.py", op="linear_cross_entropy")
_chunks = partial(Fault, file="kernels/linear_cross_entropy/chunked.py", op="linear_cross_entropy")
_op = partial(Fault, file="kernels/linear_cross_entropy/__init__.py", op="linear_cross_entropy")

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
        before="at_label = dloss * (1.0 - SMOOTHING)",
        after="at_label = dloss",
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
        before="of = n.to(ACC)",
        after="of = tl.maximum(n, 1).to(ACC)",
        tests=(f"{TESTS}::test_all_labels_ignored",),
    ),
    _rows(
        "gradients are not multiplied by the loss's own gradient",
        before="factor = tl.load(dloss_ptr).to(ACC) * tl.load(scale_ptr).to(ACC)",
        after="factor = tl.load(scale_ptr).to(ACC)",
        tests=(f"{TESTS}::test_the_losss_own_gradient",),
    ),
    _rows(
        "gradients per row are treated as contiguous",
        before="dlosses_ptr + rows * dlosses_stride",
        after="dlosses_ptr + rows",
        tests=(f"{TESTS}::test_a_gradient_a_row",),
    ),
    _rows(
        "a label equal to the number of classes is accepted",
        before="(labels < 0) | (labels >= n_cols))]",
        after="(labels < 0) | (labels > n_cols))]",
        tests=("tests/kernels/linear_cross_entropy/test_arguments.py::test_a_label_that_is_no_class",),
    ),
    _rows(
        "a mean is over the labels' number, not their weights",
        before="of = tl.sum(weights, axis=0)",
        after="of = n.to(ACC)",
        tests=(f"{WEIGHTS}::test_torchs_own_call",),
    ),
    _rows(
        "ignored rows' weights count in the mean",
        before="weights += tl.load(class_weights_ptr + labels, known, other=0.0)",
        after="weights += tl.load(class_weights_ptr + labels, (labels >= 0) & (labels < N_COLS), other=0.0)",
        tests=(f"{WEIGHTS}::test_an_ignored_class_has_no_weight",),
    ),
    _rows(
        "a mean over labels that weigh nothing has finite gradients",
        before='of = tl.where(of == 0.0, float("nan"), of)',
        after="of = tl.where(of == 0.0, 1.0, of)",
        tests=(f"{WEIGHTS}::test_labels_that_weigh_nothing",),
    ),
    _rows(
        "the sum of the smoothed classes is not weighted",
        before="        x *= weights\n",
        after="",
        tests=(f"{WEIGHTS}::test_torchs_own_call",),
    ),
    _rows(
        "the weights' own sum in a smoothed loss is the number of classes",
        before="all_losses = (tl.log(row_total) + row_top) * tl.sum(sum_weights, axis=1)",
        after="all_losses = (tl.log(row_total) + row_top) * N_COLS",
        tests=(f"{WEIGHTS}::test_torchs_own_call",),
    ),
    _rows(
        "the label's gradient is not weighted",
        before="at_label *= label_weight",
        after="at_label *= 1.0",
        tests=(f"{WEIGHTS}::test_torchs_own_call",),
    ),
    _rows(
        "a class's share of smoothing is not weighted",
        before="spread *= _load_weights(class_weights_ptr, cols, STRIDE, END)",
        after="spread *= 1.0",
        tests=(f"{WEIGHTS}::test_torchs_own_call",),
    ),
    _rows(
        "the softmax's gradient lacks the sum of smoothing's weights",
        before="dloss += spread * tl.sum(sum_weights, axis=1)",
        after="dloss += spread * N_COLS",
        tests=(f"{WEIGHTS}::test_torchs_own_call",),
    ),
    _rows(
        "a sum is not multiplied by the divisor of float16's weights",
        before="scale = tl.load(unit_ptr)",
        after="scale = tl.load(unit_ptr) * 0.0 + 1.0",
        tests=(f"{WEIGHTS}::test_torchs_values",),
    ),
    _rows(
        "float16's weights are divided by that of a class without a label",
        before="largest = found.amax()",
        after="largest = class_weights.abs().amax()",
        tests=(f"{WEIGHTS}::test_weights_of_classes_that_no_label_names",),
    ),
    _chunks(
        "only the bytes of one chunk count",
        before="max(min(2 * summed, eager // 5 - summed) // row, MIN_ROWS)",
        after="max(2 * summed // row, MIN_ROWS)",
        tests=(f"{MEMORY}::test_a_quarter_of_eagers_memory",),
    ),
    _op(
        "the gradient of the rows is scaled into new memory",
        before="dhidden = scaled(dhidden, dloss, scale, dtype, in_place=True)",
        after="dhidden = scaled(dhidden, dloss, scale, dtype)",
        tests=(f"{MEMORY}::test_few_classes_are_one_chunk",),
    ),
    _chunks(
        "each chunk overwrites the weight's gradient",
        before="self._hidden[self._done], self.alpha, self._done == 0)",
        after="self._hidden[self._done], self.alpha, True)",
        tests=(f"{FUZZ}::test_the_length_of_a_chunk",),
    ),
    _chunks(
        "the bias gradient keeps float16's scale",
        before="return sums if alpha == 1.0 else sums.mul_(alpha)",
        after="return sums",
        tests=(f"{TESTS}::test_the_losss_own_gradient",),
    ),
    _chunks(
        "the bias gradient is the first chunk's",
        before="total = self._dbias[0] if len(self._dbias) == 1 else self._dbias.sum(0)",
        after="total = self._dbias[0] if len(self._dbias) else self._dbias.sum(0)",
        tests=(f"{FUZZ}::test_the_length_of_a_chunk",),
    ),
    _chunks(
        "the last chunk's rows are the buffer's",
        before="if len(rows) < len(logits):  # the last",
        after="if len(rows) < len(logits) // 2:  # the last",
        tests=(f"{FUZZ}::test_the_length_of_a_chunk", TESTS),
    ),
    _op(
        "the weight's gradient is not divided by the labels that count",
        before="add_dweight(dweight, weight, dlogits, scaled(hidden, dloss, scale, dtype), alpha, True)",
        after="add_dweight(dweight, weight, dlogits, hidden, alpha, True)",
        tests=(f"{TESTS}::test_frozen_inputs",),
    ),
)
