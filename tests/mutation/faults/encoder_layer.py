"""A whole layer as one op, and the end of its column sums."""

from functools import partial

from tests.mutation.fault import Fault

LAYER = "tests/kernels/encoder_layer/test_encoder_layer.py"
AUTOGRAD = "tests/kernels/encoder_layer/test_autograd.py"
MODES = "tests/models/test_autograd.py"
GRADCHECK = "tests/kernels/encoder_layer/test_gradcheck.py"
COUNTS = "tests/kernels/encoder_layer/test_counts.py"
FAILS = "tests/faults/test_encoder_layer_fails.py"
TWINS = "tests/kernels/encoder_layer/test_twins.py"
SUMS = "tests/kernels/core/test_bound.py"

_of = partial(Fault, op="encoder_layer")
_op = partial(_of, file="kernels/encoder_layer/__init__.py")
_forward = partial(_of, file="kernels/encoder_layer/forward.py")
_backward = partial(_of, file="kernels/encoder_layer/backward.py")
_plan = partial(_of, file="kernels/encoder_layer/plan.py")
_products = partial(_of, file="kernels/encoder_layer/products.py")
_twins = partial(_of, file="kernels/encoder_layer/twins.py")
_sums = partial(_of, file="kernels/core/column_sums.py")

FAULTS = (
    _twins(
        "a result that was modified keeps its twin",
        before="or version != _version(x)",
        after="",
        tests=(f"{TWINS}::test_a_twin_of_something_else_is_not_taken[written to]",),
    ),
    _twins(
        "any next input takes the last result's twin",
        before="if of is not x or low is None",
        after="if low is None",
        tests=(f"{TWINS}::test_a_twin_of_something_else_is_not_taken[another]",),
    ),
    _forward(
        "the first LayerNorm's twin is the product that it normalised",
        before="twin = None if y1 is y1_low else at(y1_low)",
        after="twin = None if y1 is y1_low else at(empty_like(y1_low))",
        tests=(f"{LAYER}::test_mixed_dtypes",),
    ),
    _backward(
        "the residual's gradient of rows read from attention's output goes to the wrong rows",
        before="            dread = inputs.put(dread) if needed.x else None\n",
        after="            dread = torch.cat([dread, dread.new_zeros(len(inputs.inverse) - len(dread), plan.hidden)])\n",
        tests=(f"{GRADCHECK}::test_gradients[read anywhere]",),
    ),
    _backward(
        "attention's backward gets the read rows instead of all rows",
        before="attended = saved.attended if saved.all_attended is None else saved.all_attended",
        after="attended = saved.attended",
        tests=(f"{LAYER}::test_rows_that_are_read_anywhere",),
    ),
    _plan(
        "attention keeps statistics for the read rows only",
        before="self.softmax = (planes, settings.heads, self.n_queries), self._wide",
        after="self.softmax = (planes, settings.heads, self.n_rows), self._wide",
        tests=(f"{LAYER}::test_rows_that_are_read_anywhere",),
    ),
    _forward(
        "rows read from attention's output get the residual of other rows",
        before="inputs.taken(attended), inputs.taken(read)",
        after="inputs.taken(attended), read",
        tests=(f"{LAYER}::test_rows_that_are_read_anywhere",),
    ),
    _backward(
        "the feed-forward's gradient does not join the residual's",
        before="    add_product(dy1, dh, products.intermediate)\n",
        after="",
        tests=(f"{GRADCHECK}::test_gradients[plain]",),
        short=True,
    ),
    _plan(
        "the residual gets no gradient where dropout after attention dropped",
        before="self.shares1 = settings.attention_output_p == 0.0 and low == call.dtype",
        after="self.shares1 = low == call.dtype",
        tests=(f"{GRADCHECK}::test_gradients[dropped]",),
        short=True,
    ),
    _plan(
        "the residual gets no gradient where dropout after the feed-forward dropped",
        before="self.shares2 = settings.output_p == 0.0 and low == self.y1_dtype",
        after="self.shares2 = low == self.y1_dtype",
        tests=(f"{GRADCHECK}::test_gradients[dropped]",),
    ),
    _forward(
        "both LayerNorms' sums lose the same elements",
        before="places = seed, seed[2:], seed[4:]",
        after="places = seed, seed[2:], seed[2:]",
        tests=(f"{AUTOGRAD}::test_each_dropout_takes_a_seed_of_its_own",),
    ),
    _forward(
        "in a launch by address, the second seed is the forward's second number",
        before="places = first, first + 16, first + 32",
        after="places = first, first + 8, first + 16",
        tests=(f"{COUNTS}::test_addresses_are_those_of_the_views_that_the_interpreter_takes",),
    ),
    _forward(
        "in a launch by address, offsets of columns are in elements, not bytes",
        before="first, step = x.data_ptr(), width * x.element_size()",
        after="first, step = x.data_ptr(), width",
        tests=(f"{COUNTS}::test_addresses_are_those_of_the_views_that_the_interpreter_takes",),
    ),
    _forward(
        "padding is attended to",
        before="return at(self.key_mask), at(self.key_bounds), None, None, None",
        after="return None, None, None, None, None",
        tests=(f"{LAYER}::test_padded",),
    ),
    _forward(
        "the read rows get the first rows as residual",
        before="vectors = at(w.attention_norm), at(w.attention_norm_bias), at(w.attention_output_bias)",
        after="read, vectors = inputs.x, (at(w.attention_norm), at(w.attention_norm_bias), at(w.attention_output_bias))",
        tests=(f"{LAYER}::test_rows_that_are_read",),
    ),
    _forward(
        "keys and values are exchanged if no gradient is needed",
        before="qkv = linear(x, w.key, w.key_bias), linear(x, w.value, w.value_bias)",
        after="qkv = linear(x, w.value, w.value_bias), linear(x, w.key, w.key_bias)",
        tests=(f"{LAYER}::test_without_a_gradient",),
    ),
    _products(
        "queries and keys are exchanged",
        before="projections, biases = (w.query, w.key, w.value),",
        after="projections, biases = (w.key, w.query, w.value),",
        tests=(f"{LAYER}::test_packed",),
    ),
    _products(
        "under autocast the output's weight is the intermediate's memory",
        before="parts[3].view(hidden, inner),",
        after="parts[2].view(hidden, inner),",
        tests=(f"{LAYER}::test_mixed_dtypes",),
    ),
    _products(
        "on the CPU a product's terms are added to the sum one by one",
        before="return a.is_cuda",
        after="return True",
        tests=("tests/kernels/encoder_layer/test_products.py::test_a_product_is_summed_up_first",),
    ),
    _of(
        "float64 mixed with float32 is accepted",
        file="kernels/encoder_layer/checks.py",
        before="if wide and len(wide) < len(given):",
        after="if wide and not given:",
        tests=("tests/kernels/encoder_layer/test_arguments.py::test_wrong_arguments",),
    ),
    _products(
        "a product of 16 bits does not join a sum of 32",
        before="total.add_(torch.mm(a, b))",
        after="torch.mm(a, b)",
        tests=(f"{LAYER}::test_mixed_dtypes",),
    ),
    _backward(
        "x's gradient lacks the projections' part",
        before="        if needed.x:\n            add_product(dread, dqkv, weights)",
        after="        if needed.queries:\n            add_product(dread, dqkv, weights)",
        tests=(f"{GRADCHECK}::test_gradients[plain]",),
    ),
    _backward(
        "the queries' gradient uses the keys' weight",
        before="add_product(dread, dq, weights[:hidden])",
        after="add_product(dread, dq, weights[hidden : 2 * hidden])",
        tests=(f"{GRADCHECK}::test_gradients[read]",),
    ),
    _backward(
        "the sums of both LayerNorms are exchanged",
        before="plan.sums(stream, at(dvectors), *sums)",
        after="plan.sums(stream, at(dvectors), sums1, sums_of_bias, sums2, *sums_of_projections)",
        tests=(f"{GRADCHECK}::test_gradients[plain]",),
    ),
    _plan(
        "the sums of keys and values use the number of rows of the queries",
        before="return q.programs // heads, kv.programs // heads",
        after="return q.programs // heads, q.programs // heads",
        tests=(f"{LAYER}::test_sequences_far_shorter_than_the_longest",),
    ),
    _of(
        "without queries the sums are uninitialised",
        file="kernels/attention/backward_q.py",
        before="            nothing = tl.zeros([BLOCK_D], ACC)\n",
        after="            return\n            nothing = tl.zeros([BLOCK_D], ACC)\n",
        tests=(f"{LAYER}::test_sequences_far_shorter_than_the_longest",),
    ),
    _of(
        "without keys the sums are uninitialised",
        file="kernels/attention/backward_kv.py",
        before="            nothing = tl.zeros([BLOCK_D], ACC)\n",
        after="            return\n            nothing = tl.zeros([BLOCK_D], ACC)\n",
        tests=(f"{LAYER}::test_sequences_far_shorter_than_the_longest",),
    ),
    _of(
        "the sums of the values overwrite those of the keys",
        file="kernels/attention/backward_kv.py",
        before="store_row(ptr + kv_heads * D, dv, D, BLOCK_D)",
        after="store_row(ptr, dv, D, BLOCK_D)",
        tests=(f"{GRADCHECK}::test_gradients[plain]",),
    ),
    _backward(
        "vectors' gradients have the dtype of products",
        before="vectors = w.output_norm.new_empty(plan.vectors_in_all)",
        after="vectors = w.output_norm.new_empty(plan.vectors_in_all, dtype=low)",
        tests=(f"{LAYER}::test_mixed_dtypes",),
    ),
    _backward(
        "the gradients of keys and values are exchanged",
        before="plan.attention_kv(stream, *shared, *dparts[1:], sums_of_kv)",
        after="plan.attention_kv(stream, *shared, dparts[2], dparts[1], sums_of_kv)",
        tests=(f"{GRADCHECK}::test_gradients[plain]",),
    ),
    _backward(
        "the recomputed activation overwrites its input, which a second backward needs",
        before="activated = torch.empty_like(dh)",
        after="activated = saved.h",
        tests=(f"{AUTOGRAD}::test_two_backwards_are_bitwise_one_and_write_over_nothing",),
    ),
    _backward(
        "the output's gradient is overwritten",
        before="dout = torch.empty_like(saved.attended)",
        after="dout = dy",
        tests=(f"{AUTOGRAD}::test_two_backwards_are_bitwise_one_and_write_over_nothing[plain]",),
    ),
    _backward(
        "a projection's bias gets no gradient if no other gradient is needed",
        before="any(needed.weights[:6])",
        after="any(needed.weights[:6:2])",
        tests=(LAYER, "-k", "test_gradients_that_are_needed and bias"),
    ),
    _plan(
        "the second LayerNorm takes the first one's eps",
        before="self.out_dtype, settings.output_eps, settings.output_p",
        after="self.out_dtype, settings.attention_eps, settings.output_p",
        tests=(f"{LAYER}::test_each_norm_has_its_own_eps",),
    ),
    _of(
        "the activation is recomputed without its bias",
        file="kernels/bias_gelu.py",
        before="activate(x, ACTIVATION, EXACT).to(",
        after="activate(x - bias[None, :], ACTIVATION, EXACT).to(",
        tests=(f"{GRADCHECK}::test_gradients[plain]",),
    ),
    _of(
        "the first LayerNorm is recomputed without its bias",
        file="kernels/dropout_add_layernorm.py",
        before="y = x_hat * weight + tl.load(bias_ptr + cols, col_mask, other=0.0).to(ACC)",
        after="y = x_hat * weight",
        tests=(f"{GRADCHECK}::test_gradients[plain]",),
    ),
    _of(
        "without rows the gradient of the activation's bias is uninitialised",
        file="kernels/bias_gelu.py",
        before="config, numbers), rows_of_sums",
        after="config, numbers), row_programs",
        tests=(f"{LAYER}::test_nothing",),
    ),
    _op(
        "a tensor that is not contiguous is read as if it were",
        before="    tensor = tensor.contiguous()\n",
        after="",
        tests=(f"{LAYER}::test_layouts_of_weights", f"{LAYER}::test_layouts_of_masks_and_seeds"),
    ),
    _op(
        "autocast around it decides on its products",
        before="with torch.autocast(x.device.type, enabled=False):  # products",
        after="with torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type)):  # products",
        tests=(f"{AUTOGRAD}::test_autocast_around_it_changes_nothing",),
    ),
    _op(
        "a second derivative is silently 0",
        before="        if not torch.is_grad_enabled():\n",
        after="        if True:\n",
        tests=(f"{AUTOGRAD}::test_a_second_derivative_raises[plain]",),
    ),
    _op(
        "a second derivative through x is silently 0",
        before="saved, ctx.links = saved._replace(x=x, queries=queries), ()",
        after="ctx.links = ()",
        tests=(f"{AUTOGRAD}::test_a_second_derivative_by_each_input_raises[plain]",),
    ),
    _op(
        "a second derivative through a cast is silently 0",
        before="ctx.links = links((x, queries), ())",
        after="ctx.links = ()",
        tests=(f"{AUTOGRAD}::test_a_second_derivative_by_each_input_raises[mixed]",),
    ),
    _op(
        "saved tensors are read as hooks return them",
        before="[None if tensor is None else aligned(tensor) for tensor in tensors]",
        after="list(tensors)",
        tests=(f"{MODES}::test_saved_tensors_come_back_with_other_strides[one op]",),
    ),
    _op(
        "a batch of gradients is passed to the kernels",
        before="        check_unbatched((dy,))\n",
        after="",
        tests=(f"{MODES}::test_a_batch_of_gradients_raises_and_switches_nothing_off[one op]",),
    ),
    _of(
        "LayerNorm's result overwrites a product that checkpointing keeps",
        file="kernels/encoder_layer/forward.py",
        before="seen = torch._C._len_torch_dispatch_stack() > 0",
        after="seen = False",
        tests=("tests/models/test_checkpointing.py::test_selective",),
    ),
    _op(
        "a missing gradient is treated as zeros",
        before="ctx.set_materialize_grads(False)",
        after="ctx.set_materialize_grads(True)",
        tests=(f"{AUTOGRAD}::test_no_gradient_arrives",),
    ),
    _of(
        "plain PyTorch's last dropout takes the seed of the one before",
        file="kernels/encoder_layer/plain.py",
        before="keep_mask(seed[4], shape, p.output_p)",
        after="keep_mask(seed[2], shape, p.output_p)",
        tests=(f"{LAYER}::test_padded", f"{FAILS}::test_is_right_all_the_same"),
    ),
    _sums(
        "all sums overwrite those of the first tensor",
        before="out_ptr += width",
        after="out_ptr += 0",
        tests=(f"{SUMS}::test_column_sums",),
    ),
    _sums(
        "rows of a partial tile are left out",
        before="range(0, tl.cdiv(rows, BLOCK_M))",
        after="range(0, rows // BLOCK_M)",
        tests=(f"{SUMS}::test_column_sums",),
    ),
)
