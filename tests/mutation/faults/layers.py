"""Fast layers: what goes into the kernels, and which modules are called as they are."""

from functools import partial

from tests.mutation.fault import Fault

DROPOUT = "tests/models/test_dropout.py"
OTHERS = "tests/models/test_other_modules.py"
ATTENTION = "tests/models/test_attention.py"
OTHERS_ATTENTION = "tests/models/test_others_attention.py"
EMBEDDINGS = "tests/models/test_embeddings.py"
CAUSALITY = "tests/models/test_causality.py"
MASKS_GIVEN = "tests/models/test_masks_given.py"
WRAPPED = "tests/models/test_wrapped_forwards.py"

_parts = partial(Fault, file="fastbert/layers/parts.py")
_attention = partial(Fault, file="fastbert/layers/attention.py")
_projection = partial(Fault, file="fastbert/layers/projection.py")
_embeddings = partial(Fault, file="fastbert/layers/embeddings.py")
_integration = partial(Fault, file="fastbert/integrations/attention.py")
_masks = partial(Fault, file="fastbert/layers/masks.py")
_dispatch = partial(Fault, file="fastbert/dispatch.py")

FAULTS = (
    _parts(
        "the bias is added by the product and by the kernel",
        before="return F.linear(x, linear.weight), linear.bias",
        after="return F.linear(x, linear.weight, linear.bias), linear.bias",
        tests=("tests/models/test_layer.py::test_a_hook_inside_fires[forward]",),
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
        "a LayerNorm without bias is accepted",
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
        "dropout uses the layer's mode, not the dropout module's",
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
        tests=("tests/models/test_layer.py::test_a_hook_inside_fires[forward]",),
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
        "a user's attention function is never called",
        before="if not isinstance(mask, KernelMask) and (reason := implementation_reason(implementation)):",
        after="if False:",
        tests=(f"{OTHERS_ATTENTION}::test_a_function_of_ones_own_is_called",),
    ),
    _attention(
        "eager attention's weights are missing where they could be read",
        before='elif implementation == "eager":\n        return',
        after="elif False:\n        return",
        tests=("tests/models/test_hooks.py::test_a_hook_on_eager_attention_gets_its_weights",),
    ),
    _attention(
        "a bool mask that eager attention would add hides keys",
        before='if mask.dtype == torch.bool and implementation == "eager":',
        after="if False:",
        tests=(f"{ATTENTION}::test_a_bool_mask_that_eager_attention_adds_is_added",),
    ),
    _attention(
        "cached keys of cross-attention are recomputed and appended",
        before="cache.is_updated[self.layer_idx] = True",
        after="cache.is_updated[self.layer_idx] = False",
        tests=("tests/models/test_generate.py::test_keys_of_the_encoder_are_cached_once",),
    ),
    _projection(
        "the three projections lose their biases",
        before="bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])",
        after="bias = None",
        tests=(f"{ATTENTION}::test_one_product_is_three",),
    ),
    _projection(
        "separate gradients are treated as slices of one buffer",
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
        before="past if position_ids is None else 0,",
        after="0,",
        tests=(f"{EMBEDDINGS}::test_cached_tokens_are_counted",),
    ),
    _embeddings(
        "a user's buffer of positions is not read",
        before="shape[0] and _position_reason(self) is None:",
        after="shape[0]:",
        tests=("tests/models/test_replaced_code.py::test_buffers_of_ones_own_are_read",),
    ),
    _embeddings(
        "a buffer of positions is not inspected again after a write",
        before="if known is None or known[0] != buffer._version:",
        after="if known is None:",
        tests=("tests/models/test_replaced_code.py::test_a_buffer_that_is_written_to_is_looked_at_again",),
    ),
    _embeddings(
        "the layer ignores the padding row",
        before="None if input_ids is None else self.word_embeddings.padding_idx,",
        after="None,",
        tests=(f"{EMBEDDINGS}::test_the_padding_row_has_no_gradient",),
    ),
    _embeddings(
        "the embeddings drop in evaluation",
        before="self.dropout.p if self.dropout.training else 0.0,",
        after="self.dropout.p,",
        tests=(f"{EMBEDDINGS}::test_dropout_is_drawn_in_training_only",),
    ),
    _integration(
        "the mask never reaches the kernel",
        before="key_mask=None if general else mask,",
        after="key_mask=None,",
        tests=("tests/models/test_attention.py::test_roberta_selects_the_kernel_by_name[right]",),
    ),
    _integration(
        "a decoder sees what comes after",
        before="causal=causal and not general and q_length > 1,",
        after="causal=False,",
        tests=("tests/models/test_causality.py", "-k", "test_causality_that_was_changed_by_hand and sdpa-none"),
    ),
    Fault(
        "every layer computes the mask's bounds",
        file="fastbert/ops.py",
        before="if bounds is None:",
        after="if True:",
        tests=(f"{ATTENTION}::test_bounds_of_a_mask_are_worked_out_once_a_forward",),
    ),
    _integration(
        "a function registered under one of transformers' names counts as transformers' own",
        before="if inner is not None and inner.__module__ in modules:",
        after='if getattr(function, "__module__", None) in modules:',
        tests=(f"{OTHERS_ATTENTION}::test_a_function_of_ones_own_is_called",),
    ),
    _masks(
        "a user's module gets a KernelMask",
        before='if not found.fast or found.part not in ("SelfAttention", "CrossAttention") or _observed(attends):',
        after="if False:",
        tests=(f"{OTHERS_ATTENTION}::test_a_self_attention_of_ones_own_gets_the_masks_it_knows",),
    ),
    _masks(
        "a user's mask function counts as transformers' own",
        before="forwards.innermost(getattr(module, name)) is None for name in _MASK_FUNCTIONS)",
        after='getattr(module, name).__module__ != "transformers.masking_utils" for name in _MASK_FUNCTIONS)',
        tests=("tests/models/test_masks_given.py::test_what_makes_masks_was_replaced",),
    ),
    _masks(
        "a hook on a layer sees the kernel's mask",
        before='if (has_hooks or "forward" in vars(layer)) and any(map(_observed, (*wrappers_of(called), layer))):',
        after="if False:",
        tests=("tests/models/test_hooks.py::test_a_hook_sees_the_mask_that_stock_gives",),
    ),
    _masks(
        "a mask whose rows differ is treated as a padding mask",
        before="if mask.shape[1] != 1 or (mask.shape[2] != 1 and mask.stride(2) != 0):",
        after="if mask.shape[1] != 1:",
        tests=(f"{ATTENTION}::test_general_masks",),
    ),
    _masks(
        "masks follow the model's config although the attention's causality differs",
        before='return same and bool(attends["is_causal"]) == causal',
        after="return same",
        tests=(f"{CAUSALITY}::test_causality_that_was_changed_by_hand", f"{CAUSALITY}::test_a_layer_of_another_patched_model"),
    ),
    _masks(
        "a decoder with bidirectional attention is causal",
        before='if causal and not getattr(config, "is_causal", True):',
        after="if False:",
        tests=(f"{CAUSALITY}::test_causality_that_was_changed_by_hand",),
    ),
    _masks(
        "a layer whose config names another implementation gets the kernel's masks",
        before="same = own is config or own._attn_implementation == config._attn_implementation",
        after="same = True",
        tests=(f"{CAUSALITY}::test_a_layer_of_another_patched_model",),
    ),
    _masks(
        "a replaced mask function is not called",
        before="or untested(model.STOCK) or masks_replaced(family.path):",
        after="or untested(model.STOCK):",
        tests=(f"{MASKS_GIVEN}::test_what_makes_masks_was_replaced",),
    ),
    _masks(
        "a bool mask of the caller's is kept for the backward",
        before="torch.bool, copy=True, memory_format",
        after="torch.bool, memory_format",
        tests=(f"{MASKS_GIVEN}::test_a_mask_overwritten_before_the_backward",),
    ),
    _masks(
        "a mask of the caller's that eager attention would add is kept for the backward",
        before="general.clone() if added and general is given and isinstance(given, Tensor) else general",
        after="general",
        tests=(f"{MASKS_GIVEN}::test_a_mask_overwritten_before_the_backward",),
    ),
    _masks(
        "a mask with fewer rows than the batch goes to the kernel",
        before="and given.shape[0] >= keys.shape[0]:",
        after=":",
        tests=(f"{MASKS_GIVEN}::test_any_form_does_what_stock_does",),
    ),
    _attention(
        "a mask for more keys than there are is cut",
        before="if mask.dim() and mask.shape[-1] != keys.shape[1] and not cached:",
        after="if False:",
        tests=(f"{MASKS_GIVEN}::test_any_form_does_what_stock_does",),
    ),
    _attention(
        "a mask of another type than the scores' is cast",
        before="if mask.is_floating_point() and mask.dtype != keys.dtype",
        after="if False",
        tests=(f"{MASKS_GIVEN}::test_any_form_does_what_stock_does",),
    ),
    _attention(
        "a user's keyword is treated as a packing",
        before="if isinstance(packing, Packing):",
        after="if packing is not None:",
        tests=(f"{CAUSALITY}::test_a_column_of_the_users_own_is_passed_over",),
    ),
    _integration(
        "keywords of the attention function have no effect",
        before="return frozenset(inspect.signature(function).parameters)",
        after="return frozenset()",
        tests=(f"{CAUSALITY}::test_a_keyword_of_the_attention_function",),
    ),
    Fault(
        "keywords of the attention function have no effect in a packed batch",
        file="fastbert/layers/encoder.py",
        before="if (reason := argument_reason(implementation, tuple(kwargs))) is not None:",
        after="if False:",
        tests=(f"{CAUSALITY}::test_a_keyword_of_the_attention_function",),
    ),
    Fault(
        "any column called lengths is used as the number of tokens",
        file="fastbert/layers/encoder.py",
        before="if isinstance(kwargs.get(name), Counted):",
        after="if kwargs.get(name) is not None:",
        tests=(f"{CAUSALITY}::test_a_column_of_the_users_own_is_passed_over",),
    ),
    Fault(
        "any column called reading is used as a Reading",
        file="fastbert/layers/encoder.py",
        before='kwargs.pop("reading") if isinstance(kwargs.get("reading"), Reading) else None',
        after='kwargs.pop("reading", None)',
        tests=(f"{CAUSALITY}::test_a_column_of_the_users_own_is_passed_over",),
    ),
    Fault(
        "a wrapper around a fast forward fails once the model is unpatched",
        file="fastbert/layers/stock.py",
        before="if isinstance(self, FastModule):",
        after="if True:",
        tests=(f"{WRAPPED}::test_a_wrapper_outlives_the_patch",),
    ),
    Fault(
        "accelerate's hooks restore the forward of the module's former class",
        file="fastbert/patch.py",
        before='if getattr(replaced_forward, "__func__", None) is before[module].forward:',
        after="if False:",
        tests=(f"{WRAPPED}::test_hooks_of_accelerate_outlive_the_patch",),
    ),
    Fault(
        "a user's module in a layer gets packed rows",
        file="fastbert/layers/by_row.py",
        before="if not (cls in _TORCH or cls.__module__.startswith(_LIBRARIES)) or class_forward_replaced(cls):",
        after="if class_forward_replaced(cls):",
        tests=("tests/models/test_replaced_code.py::test_a_module_of_ones_own_in_a_layer_never_sees_packed_rows",),
    ),
    _integration(
        "requested attention weights are not returned",
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
        "a forward replaced on a class of torch is bypassed",
        before="and cls.forward is _LIBRARY.get(cls)",
        after="",
        tests=("tests/models/test_replaced_code.py", "-k", "test_a_forward_replaced_on_its_class and LayerNorm"),
    ),
    _dispatch(
        "calls of replicas are not counted",
        before="_calls[replica] = _calls.setdefault(module, Calls())",
        after="pass",
        tests=("tests/models/test_wrappers.py::test_replicas_of_data_parallel_count_as_the_model",),
    ),
    _dispatch(
        "mixed dtypes go to a kernel outside autocast",
        before="if tensor.dtype != first.dtype and not autocast:",
        after="if False:",
        tests=("tests/models/test_transforms.py::test_types_that_differ_outside_autocast_go_through_stock_code",),
    ),
)
