"""Fast classes of encoder layers: the whole layer as one op if only its result is observable, else module by module.

A layer is one op because of the host: on a fast GPU, a fine-tuning step of BERT-base is computed before Python has issued it
module by module. One op also does what modules cannot: gradients of residuals are added inside products, all sums of vector
gradients finish in one launch, and the outputs of the activation and of the first LayerNorm are recomputed by backward
kernels that read their inputs anyway. So 11 of 16 T H elements are kept per layer (T tokens of width H). Recomputing writes 5
T H elements, of about 44 that the backward moves; there is no switch for it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.dispatch import FastModule, autocast_dtype, device_reason, falls_back, hooked, mode_reason, tensor_reason
from fastbert.integrations.attention import argument_reason, implementation_reason
from fastbert.layers import stock
from fastbert.layers.family import DISTILBERT, LIKE_BERT
from fastbert.layers.layer_state import LayerState, PreparedLayer, state_of, without_state
from fastbert.layers.layout import self_attention_of
from fastbert.layers.masks import KernelMask, carried
from fastbert.layers.packing import Packing, side_by_side


class Layer(FastModule):
    """An encoder layer on the encoder_layer op."""

    def __getstate__(self) -> dict[str, Any]:
        return without_state(vars(self))

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        packing = kwargs.get("packing")
        if isinstance(packing, Packing):  # not a user's keyword of that name
            return self._packed(hidden_states, attention_mask, packing, bool(kwargs.get("reads")))
        if torch.compiler.is_compiling():  # it traces a layer module by module
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        result = self._try_op(hidden_states, attention_mask, args, kwargs)
        if falls_back(self, result if isinstance(result, str) else None):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return result

    def _packed(self, hidden_states: Tensor, mask: KernelMask, packing: Packing, reads: bool) -> Tensor:
        """The layer on packed tokens [1, T, H]; with `reads`, for the rows that are read only, [1, N, H]."""
        result = _COMPILING if torch.compiler.is_compiling() else self._try_packed(hidden_states, mask, packing, reads)
        if not falls_back(self, result if isinstance(result, str) else None):
            return result
        return at_rows(self, hidden_states, packing) if reads else super().forward(hidden_states, None, packing=packing)

    def _try_packed(self, hidden_states: Tensor, mask: KernelMask, packing: Packing, reads: bool) -> Tensor | str:
        """The op's result for packed tokens, or why it does not take the call."""
        tokens = packing.tokens
        layout = None, None, tokens.cu_seqlens, tokens.max_seqlen
        if reads and self_attention_of(self).is_causal:
            rows = packing.read.within(tokens)
            layout += None, None, None, rows.index, rows.inverse
        elif reads:
            queries = packing.read.within(tokens).take(hidden_states.squeeze(0)).unsqueeze(0)
            cu_seqlens, cu_seqlens_q = side_by_side(tokens, packing.read)
            layout = None, None, cu_seqlens, tokens.max_seqlen, queries, cu_seqlens_q, packing.read.max_seqlen
        return self._run(self._prepared(mask), mask, hidden_states, *layout)

    def _try_op(self, hidden_states: Tensor, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | str:
        """The op's result for a call of the stock encoder, or why it does not take the call."""
        if not isinstance(mask, KernelMask):
            return _stock_mask_reason(self, hidden_states)
        if mask.general is not None:
            return "a mask between queries and keys"
        for value in (*args, kwargs.get("past_key_values"), kwargs.get("cache"), kwargs.get("encoder_hidden_states")):
            if value is not None:
                return "cross-attention or a cache"
        prepared = self._prepared(mask)
        if prepared.state.reason is None and (reason := mask.by_module or _keyword_reason(prepared.state, kwargs)) is not None:
            return reason
        keys = mask.keys
        if keys is not None and keys.shape != hidden_states.shape[:2]:
            return "a mask for a different batch shape"
        return self._run(prepared, mask, hidden_states, keys, mask.bounds)

    def _prepared(self, mask: KernelMask) -> PreparedLayer:
        prepared = mask.prepared.pop(self, None)  # valid once: gradient checkpointing calls again later
        return PreparedLayer(state_of(self)) if prepared is None or prepared.context is None else prepared

    def _run(self, prepared: PreparedLayer, mask: KernelMask, hidden_states: Tensor, *layout: Any) -> Tensor | str:
        """The op's result, or why it does not take the call; `layout` are the fields of ops.Layout."""
        known, weights, settings, context = prepared
        if known.reason is not None:
            return known.reason
        if ops.failures.reasons and (failed := ops.failures.reasons.keys() & ops.LAYER_KERNELS):
            return f"{min(failed)} failed: {ops.failures.reasons[min(failed)]}"
        own = vars(self) if known.chunks is None else known.chunks
        if own["chunk_size_feed_forward"] or known.chunk in own:
            return "a chunked or replaced feed-forward"
        if context is None or context.hidden != hidden_states.shape[-1]:
            weights, settings = known.weights(), known.settings(hidden_states.shape[-1])
            if isinstance(weights, str) or isinstance(settings, str):
                return weights if isinstance(weights, str) else settings
            low = autocast_dtype(hidden_states.device.type)
            reason = _call_reason(hidden_states, weights.query, low)
        else:
            low = context.product_dtype
            reason = None if hidden_states.device == context.device else "hidden states on a different device than the model"
        if (reason := reason or _tensor_reason(hidden_states, weights.query.dtype, low)) is not None:
            return reason
        norm_dtype = None if low is None else torch.float32 if hidden_states.is_cuda else None  # as layernorm_dtype
        seed = mask.seed_of(self, hidden_states.device) if settings.drops else None
        twins = None if low is None else mask.twins
        try:
            return ops.encoder_layer(hidden_states, weights, settings, ops.Layout(*layout), low, norm_dtype, seed, twins)
        except ops.KernelFailed as failure:
            if ops.failures.strict:
                raise
            return f"{failure.kernel} failed: {failure.reason}"
        finally:
            if twins is not None and mask.layers[-1:] == (self,):
                twins.clear()  # no layer reads the last one's


_COMPILING = "torch.compile, which traces a layer module by module"


def at_rows(layer: nn.Module, hidden_states: Tensor, packing: Packing) -> Tensor:
    """Run a layer module by module for the rows that are read: [1, T, H] -> [1, N, H]."""
    taken = packing.read.within(packing.tokens)
    rows = taken.take(hidden_states.squeeze(0)).unsqueeze(0)
    if stock.family_of(layer) is DISTILBERT:
        attended, _ = layer.attention(hidden_states, packing=packing, queries=rows)
        attended = layer.sa_layer_norm(attended + rows)
        return layer.output_layer_norm(layer.ffn(attended) + attended)
    if layer.attention.self.is_causal:  # the kernel takes fewer causal queries than keys only at a sequence's end
        attended, _ = layer.attention.self(hidden_states, packing=packing)
        attended = taken.take(attended.squeeze(0)).unsqueeze(0)
    else:
        attended, _ = layer.attention.self(hidden_states, packing=packing, queries=rows)
    return layer.feed_forward_chunk(layer.attention.output(attended, rows))


def _stock_mask_reason(layer: nn.Module, hidden_states: Tensor) -> str:
    """Why the layer got stock's mask instead of a KernelMask."""
    known = state_of(layer)
    reason = tensor_reason(hidden_states) or known.reason or implementation_reason(known.config._attn_implementation)
    reason = reason or ("a layer with hooks" if hooked(layer) else None)
    return reason or "a mask that the patched model did not pass"


_POSITIONS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
# Keywords that encoders pass on to every layer and that no attention function takes.
_UNREAD_KEYWORDS = {
    *("encoder_hidden_states", "encoder_attention_mask", "past_key_values", "cache", "cache_position", "use_cache"),
    *("output_attentions", "position_ids"),
}


def _keyword_reason(known: LayerState, kwargs: dict[str, Any]) -> str | None:
    """Why the keywords request something that the op does not compute, or None."""
    if kwargs.get("output_attentions"):
        return "attention weights were requested"
    passed = _UNREAD_KEYWORDS.issuperset(kwargs)
    if passed and kwargs.get("position_ids") is None:
        return None
    implementation = known.config._attn_implementation
    if not passed and (reason := argument_reason(implementation, tuple(kwargs))) is not None:
        return reason
    if implementation and "flash" in implementation and any([kwargs.get(name) is not None for name in _POSITIONS]):
        return "position ids or cu_seqlens that the model's own attention would read as the bounds of packed sequences"
    return None


def _call_reason(hidden_states: Tensor, weight: Tensor, low: torch.dtype | None) -> str | None:
    """Why no kernel takes tensors on this device, in this dtype and mode, or None."""
    if weight.device != hidden_states.device:
        return f"tensors on {hidden_states.device} and {weight.device}"
    return device_reason(hidden_states.device, low or hidden_states.dtype) or mode_reason()


def _tensor_reason(hidden_states: Tensor, weight_dtype: torch.dtype, low: torch.dtype | None) -> str | None:
    """Why the op cannot take these hidden states, or None."""
    dtype = hidden_states.dtype
    if type(hidden_states) is not Tensor:
        return f"{type(hidden_states).__name__} is not a plain tensor"
    if low is None and weight_dtype != dtype:
        return f"{dtype} and {weight_dtype} together outside autocast"
    if low is not None and torch.float64 in (dtype, weight_dtype):
        return "float64, which autocast does not cast"
    if not hidden_states.is_contiguous() or hidden_states.data_ptr() % ops.ALIGNMENT:
        return f"hidden states that are not contiguous or not aligned to {ops.ALIGNMENT} bytes"
    return None if hidden_states.numel() else "an empty batch"


class DistilLayer(Layer):
    """DistilBERT's layer on the encoder_layer op."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, carried(attention_mask), **kwargs)


FAST = {
    **stock.fast_classes("Layer", Layer, __name__, families=LIKE_BERT),
    **stock.fast_classes("Layer", DistilLayer, __name__, families=[DISTILBERT]),
}
globals().update(FAST)
