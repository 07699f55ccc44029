"""Fast layers: what goes into the kernels, and which modules are called as they are."""

from functools import partial

from tests.mutation.fault import Fault

DROPOUT = "tests/models/test_dropout.py"
OTHERS = "tests/models/test_other_modules.py"
ATTENTION = "tests/models/test_attention.py"
EMBEDDINGS = "tests/models/test_embeddings.py"
EQUALITY = "tests/models/test_equality.py"

_parts = partial(Fault, file="fastbert/layers/parts.py")
_attention = partial(Fault, file="fastbert/layers/attention.py")
_projection = partial(Fault, file="fastbert/layers/projection.py")
_embeddings = partial(Fault, file="fastbert/layers/embeddings.py")
_integration = partial(Fault, file="fastbert/integrations/attention.py")
_dispatch = partial(Fault, file="fastbert/dispatch.py")

FAULTS = (
    _parts(
        "the bias is added by the product and by the kernel",
        before="return F.linear(x, linear.weight), linear.bias",
        after="return F.linear(x, linear.weight, linear.bias), linear.bias",
        tests=(f"{EMBEDDINGS}::test_ids",),
    ),
    _parts(
        "an adapter on a Linear is bypassed",
        before="if is_plain(linear, nn.Linear) and is_plain_tensor(linear.weight):",
        after="if isinstance(linear.weight, Tensor):",
        tests=(OTHERS, "-k", "test_a_linear_that_is_not_plain_is_called and after"),
    ),
    _parts(
        "torch's tanh GELU runs as the exact one",
        before='return "gelu" if function.approximate == "none" else "gelu_tanh"',
        after='return "gelu"',
        tests=("tests/models/test_parameters.py::test_activation_that_is_a_module_of_torch",),
    ),
    _parts(
        "a LayerNorm without bias is taken for one with it",
        before="if norm.weight is None or norm.bias is None:",
        after="if norm.weight is None:",
        tests=(f"{OTHERS}::test_another_layer_norm_stays_stock",),
    ),
    Fault(
        "dropout is drawn in evaluation",
        file="fastbert/layers/residual_norm.py",
        before="p=self.dropout.p if self.dropout.training else 0.0,",
        after="p=self.dropout.p,",
        tests=(f"{DROPOUT}::test_off_is_bitwise_without",),
    ),
    Fault(
        "dropout is drawn by the layer's mode, not the dropout's own",
        file="fastbert/layers/residual_norm.py",
        before="p=self.dropout.p if self.dropout.training else 0.0,",
        after="p=self.dropout.p if self.training else 0.0,",
        tests=(f"{DROPOUT}::test_only_the_dropout_modules_own_mode_counts",),
    ),
    Fault(
        "the residual is not added",
        file="fastbert/layers/residual_norm.py",
        before="            x,\n            input_tensor,\n",
        after="            x,\n            input_tensor * 0,\n",
        tests=(f"{EMBEDDINGS}::test_ids",),
    ),
    _attention(
        "attention never drops",
        before="p = module.dropout.p if module.training else 0.0\n    out = run(module, attend,",
        after="p = 0.0\n    out = run(module, attend,",
        tests=(f"{DROPOUT}::test_attention_drops_in_training_only",),
    ),
    _attention(
        "packed attention drops in evaluation",
        before="p = module.dropout.p if module.training else 0.0\n    out = run(module, ops.attention,",
        after="p = module.dropout.p\n    out = run(module, ops.attention,",
        tests=(f"{DROPOUT}::test_attention_drops_in_training_only",),
    ),
    _attention(
        "an attention that is chosen after patching is not obeyed",
        before="if former_name(module.config._attn_implementation) is None:",
        after="if False:",
        tests=(f"{ATTENTION}::test_an_implementation_chosen_after_patching_is_obeyed",),
    ),
    _attention(
        "cached keys of cross-attention are made again and appended",
        before="past_key_values.is_updated[self.layer_idx] = True",
        after="past_key_values.is_updated[self.layer_idx] = False",
        tests=("tests/models/test_generate.py::test_keys_of_the_encoder_are_cached_once",),
    ),
    _projection(
        "the three projections lose their biases",
        before="bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])",
        after="bias = None",
        tests=(f"{ATTENTION}::test_one_product_is_three",),
    ),
    _projection(
        "gradients that lie apart are taken for slices of one buffer",
        before="or grad.storage_offset() != first.storage_offset() + i * step",
        after="or grad.storage_offset() < 0",
        tests=(f"{ATTENTION}::test_gradients_of_other_origin_are_stacked",),
    ),
    _projection(
        "hooks on a projection are bypassed",
        before="is_plain(linear, nn.Linear)\n        and is_plain_tensor(linear.weight)",
        after="isinstance(linear, nn.Linear)\n        and is_plain_tensor(linear.weight)",
        tests=(f"{ATTENTION}::test_odd_linears_are_called_as_modules",),
    ),
    _embeddings(
        "cached tokens are not counted in positions",
        before="offset=0 if position_ids is not None else past_key_values_length,",
        after="offset=0,",
        tests=(f"{EMBEDDINGS}::test_cached_tokens_are_counted",),
    ),
    _embeddings(
        "the layer forgets which row is padding",
        before="padding_idx=None if input_ids is None else self.word_embeddings.padding_idx,",
        after="padding_idx=None,",
        tests=(f"{EMBEDDINGS}::test_the_padding_row_has_no_gradient",),
    ),
    _embeddings(
        "the embeddings drop in evaluation",
        before="p=self.dropout.p if self.dropout.training else 0.0,",
        after="p=self.dropout.p,",
        tests=(f"{EMBEDDINGS}::test_dropout_is_drawn_in_training_only",),
    ),
    _integration(
        "the mask never reaches the kernel",
        before="key_mask=None if general else mask,",
        after="key_mask=None,",
        tests=(f"{EQUALITY}::test_rows_of_padding_alone_are_equal",),
    ),
    _integration(
        "a decoder sees what comes after",
        before="causal=causal and not general and q_length > 1,",
        after="causal=False,",
        tests=("tests/models/test_generate.py::test_cache_is_equal",),
    ),
    Fault(
        "every layer works out the mask's bounds",
        file="fastbert/ops.py",
        before="if key_mask not in _bounds:",
        after="if True:",
        tests=(f"{ATTENTION}::test_bounds_of_a_mask_are_worked_out_once_a_forward",),
    ),
    _integration(
        "where attention weights are asked for padding is seen",
        before="return seen if mask is None else seen & mask[:, None, None, :]",
        after="return seen",
        tests=("tests/models/test_arguments_of_forward.py::test_attentions",),
    ),
    _integration(
        "attention weights that are asked for are not given",
        before="def wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:\n",
        after="def wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:\n    return False\n",
        tests=("tests/models/test_arguments_of_forward.py::test_attentions",),
    ),
    _dispatch(
        "hooks that see a module's input are bypassed",
        before="and not module._forward_pre_hooks\n",
        after="\n",
        tests=("tests/models/test_hooks.py", "-k", "test_a_hook_added_after_patching_fires and pre-forward"),
    ),
    _dispatch(
        "hooks on every module of the process are bypassed",
        before="and not _has_any_global_hook()",
        after="",
        tests=("tests/models/test_hooks.py::test_a_hook_on_every_module_of_the_process_fires",),
    ),
    _dispatch(
        "types that differ go to a kernel outside of autocast",
        before="if tensor.dtype != first.dtype and not autocast:",
        after="if False:",
        tests=("tests/models/test_transforms.py::test_types_that_differ_outside_autocast_go_through_stock_code",),
    ),
)
