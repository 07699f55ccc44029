"""Registers the attention kernel with transformers' AttentionInterface, and its mask function with AttentionMaskInterface.

`model.set_attn_implementation("fastbert")` works for every model that uses the interface. A patched model does not need
it: its config keeps the implementation that it names, and its attention modules call the kernel if that is one of
transformers' own implementations of plain softmax attention.
"""

import inspect
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from fastbert import forwards, ops
from fastbert.dispatch import falls_back, run, tensor_reason

NAME = "fastbert"
# Keywords that change the scores in a way that the kernel does not compute.
_FOREIGN = ("position_bias", "softcap", "s_aux")
# Keywords that flash and flex attention pass on to the functions that they call.
_INNER = ("softmax_scale", "deterministic", "query_length", "use_top_left_mask", "kernel_options")
# The modules with transformers' own implementations of softmax attention, and with their mask functions.
_OWN = (
    "transformers.integrations.sdpa_attention",
    "transformers.integrations.flash_attention",
    "transformers.integrations.flex_attention",
)
_OWN_MASKS = ("transformers.masking_utils",)
# Our attention functions by their names: `attention_forward`, and that of fastbert.integrations.flash.
OURS: dict[str, Any] = {}


@torch.compiler.assume_constant_result
def implementation_reason(name: str | None) -> str | None:
    """Why the attention implementation of this name may compute something other than the kernel, or None.

    Checked at each call: anyone may register a function, under a new name or under one of transformers'.
    """
    name = name or "eager"
    function, masks = ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if function is not None and OURS.get(name) is function:
        return None
    if name == "eager" and function is None:
        from fastbert.layers.stock import untested

        return untested("eager attention") or _foreign(name, masks, _OWN_MASKS)
    return _foreign(name, function, _OWN) or _foreign(name, masks, _OWN_MASKS)


@torch.compiler.assume_constant_result
def argument_reason(implementation: str | None, names: tuple[str, ...]) -> str | None:
    """Why keywords of these names, which models pass on to their attention, may change what it computes, or None."""
    function = ALL_ATTENTION_FUNCTIONS.get(implementation or "eager") or eager_attention_forward
    own = _parameters(function)
    return next((f"{name}, an argument of the attention function" for name in names if name in own), None)


@cache
def _parameters(function: Any) -> frozenset[str]:
    """The parameters of `function`, and the keywords that flash and flex attention read from `**kwargs`."""
    return frozenset(inspect.signature(function).parameters) - {"kwargs"} | set(_INNER)


def _foreign(name: str, function: Any, modules: tuple[str, ...]) -> str | None:
    while isinstance(function, partial):  # kernels from the hub are registered as partials
        function = function.func
    inner = forwards.innermost(function)
    if inner is not None and inner.__module__ in modules:
        return None
    return f"attention implementation {name!r} is not one of transformers' own"


def key_mask_or_general(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for `attention_forward`: a bool [batch, keys] if it only masks padding, else a bool [batch, 1, queries, keys].

    The module applies causality itself. No value on the device is read. None if nothing is masked.
    """
    padding = attention_mask is None or attention_mask.dim() == 2
    if attention_mask is not None and padding:
        attention_mask = attention_mask[:batch_size]  # multiple choice flattens a 4-D mask to more rows; stock reads the first
    if padding and mask_function is bidirectional_mask_function:
        return _key_mask(attention_mask, kv_length, kv_offset)
    if padding and mask_function is causal_mask_function and kv_offset == 0:
        q_length, q_offset = _queries(kwargs, kv_length)
        if q_offset == kv_length - q_length:
            mask = _key_mask(attention_mask, kv_length, kv_offset)
            if mask is not None or q_length in (1, kv_length):
                return mask
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def _queries(kwargs: dict[str, Any], kv_length: int) -> tuple[int, int | None]:
    """The number of queries and their offset; the offset is None if only the device knows it.

    transformers 5.0 passes the positions of the queries, a tensor, instead of both.
    """
    if "cache_position" in kwargs:
        length = kwargs["cache_position"].shape[0]
        return length, 0 if length == kv_length else None
    offset = kwargs.get("q_offset", 0)
    return kwargs["q_length"], offset if isinstance(offset, int) else None


def _key_mask(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    if attention_mask is None:
        return None
    padded = prepare_padding_mask(attention_mask, kv_length, kv_offset)[:, kv_offset : kv_offset + kv_length]
    # A new tensor object even if the values are the caller's: `ops.key_bounds` caches by identity.
    return padded.to(torch.bool).view(padded.shape)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the signature of transformers' AttentionInterface.

    A call that no kernel takes falls back to SDPA, or to eager attention if attention weights are requested.

    Args:
        module: the attention module; its `is_causal` (default True) holds unless the argument is given.
        query: [batch, heads, queries, head size].
        key, value: [batch, kv heads, keys, head size]; each kv head serves a group of query heads.
        attention_mask: as `key_mask_or_general` returns it, or an additive mask [batch or 1, 1 or heads, queries, keys].
        dropout: the dropout probability.
        scaling: multiplies the scores; by default head size ** -0.5.
        is_causal: mask keys that lie behind each query.

    Returns:
        The output [batch, queries, heads, head size], and the weights [batch, heads, queries, keys] or None.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    weights = wants_weights(module, kwargs)
    reason = "attention weights were requested" if weights else _foreign_keyword(kwargs)
    if not falls_back(module, reason or attention_reason(query, key, value, attention_mask)):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return run(module, attend, q, k, v, attention_mask, causal, scaling, dropout), None
    mask = attention_mask
    if mask is not None or weights:
        mask = _general_mask(mask, causal and query.shape[2] > 1, query, key)
    if weights:
        key, value = (_each_head(x, query.shape[1]) for x in (key, value))
        mask = _added(mask, _mask_dtype(module, query))
        return eager_attention_forward(module, query, key, value, mask, scaling, dropout, **kwargs)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, dropout, scaling, causal, **kwargs)


def _foreign_keyword(kwargs: dict[str, Any]) -> str | None:
    return next((f"{name}, which the kernel does not compute" for name in _FOREIGN if kwargs.get(name) is not None), None)


def _each_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values [batch, kv heads, seq, head size], repeated for each query head of their group."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller requested attention weights."""
    return bool(kwargs.get("output_attentions", getattr(getattr(module, "config", None), "output_attentions", False)))


def attention_reason(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """Why the kernel does not take this call, or None."""
    if query.shape[-1] > ops.MAX_HEAD_SIZE:
        return f"head size {query.shape[-1]}: the kernel takes up to {ops.MAX_HEAD_SIZE}"
    if not query.dtype == key.dtype == value.dtype:
        return "queries, keys and values differ in dtype"
    if value.shape[-1] != query.shape[-1] or key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        return "queries, keys and values with incompatible heads"
    return mask_reason(mask) or tensor_reason(query, key, value)


def mask_reason(mask: Tensor | None) -> str | None:
    """Why the kernel does not take this mask, or None."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return "a mask that is not a tensor of two or four dimensions"
    if mask.dtype != torch.bool and (mask.dim() == 2 or not mask.is_floating_point()):
        return f"a {mask.dim()}-D mask of {mask.dtype}"
    return "a mask that requires a gradient" if mask.requires_grad else None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, p: float) -> Tensor:
    """Run the kernel on [batch, seq, heads, head size] views.

    `mask` is a bool [batch, keys], a bool or additive [batch or 1, 1 or heads, queries, keys], or None.
    """
    q_length, kv_length = q.shape[1], k.shape[1]
    general = mask is not None and mask.dim() == 4
    if causal and mask is None and 1 < q_length < kv_length:
        # As in transformers' SDPA: without a mask the static cache is still empty, and keys behind the queries are unfilled.
        k, v = k[:, :q_length], v[:, :q_length]
    if general:
        mask = mask[..., :kv_length]
    return ops.attention(
        q,
        k,
        v,
        key_mask=None if general else mask,
        mask=mask if general else None,
        causal=causal and not general and q_length > 1,
        scale=scale,
        p=p,
        key_bounds=None if general or mask is None else ops.key_bounds(mask),
    )


def _general_mask(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """Any mask in the form that stock implementations take, [batch or 1, 1, queries, keys], or None."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if mask is not None and mask.dim() == 4:
        return mask[..., :kv_length]
    if mask is None and not causal:
        return None
    seen = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=query.device)
    if causal:
        seen = seen.tril(0 if mask is None else kv_length - q_length)
    return seen if mask is None else seen & mask[:, None, None, :]


def _mask_dtype(module: nn.Module, query: Tensor) -> torch.dtype:
    """The dtype of stock's masks: the model's own dtype, which under autocast is not that of the queries."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), query.dtype)


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask as an additive mask: 0 where a key is visible, the lowest number of `dtype` elsewhere."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


OURS[NAME] = attention_forward
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, key_mask_or_general)
