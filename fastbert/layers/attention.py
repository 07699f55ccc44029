"""BertSelfAttention and BertCrossAttention: one product for the projections, then the attention kernel."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.models.bert.modeling_bert import BertCrossAttention, BertSelfAttention

from fastbert import ops
from fastbert.dispatch import refused, run, tensor_reason
from fastbert.integrations.attention import attend, former_name, mask_reason, wants_weights
from fastbert.layers.packing import Packing, side_by_side
from fastbert.layers.parts import dropout_reason
from fastbert.layers.projection import project

_FLASH_KEYWORDS = ("cu_seq_lens_q", "max_length_q", "cu_seq_lens_k", "max_length_k")


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    if module.attention_head_size > ops.MAX_HEAD_SIZE:
        return f"a head size of {module.attention_head_size}: the kernel takes up to {ops.MAX_HEAD_SIZE}"
    return dropout_reason(module.dropout)


class FastBertSelfAttention(BertSelfAttention):
    """BertSelfAttention on the attention kernel."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        packing, queries = kwargs.get("packing"), kwargs.get("queries")
        if packing is not None:
            refused(self, None)  # FastBertEncoder asked packed_reason: stock attention would mix the sequences
            return _attended_packed(self, hidden_states, packing, queries), None
        if refused(self, _reason(self, attention_mask, kwargs) or tensor_reason(hidden_states)):
            return super().forward(hidden_states, attention_mask, past_key_values, **kwargs)
        q, k, v = project(hidden_states, (self.query, self.key, self.value), self.attention_head_size)
        bounds = _given_bounds(self, attention_mask, past_key_values, kwargs)
        if bounds is not None:
            return _attended_at(self, q, k, v, **bounds), None
        if past_key_values is not None:
            cache = past_key_values
            if isinstance(cache, EncoderDecoderCache):
                cache = cache.self_attention_cache
            k, v = (x.transpose(1, 2) for x in cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx))
        return _attended(self, q, k, v, attention_mask, hidden_states.shape), None


class FastBertCrossAttention(BertCrossAttention):
    """BertCrossAttention on the attention kernel."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        reason = _reason(self, attention_mask, kwargs) or tensor_reason(hidden_states, encoder_hidden_states)
        if refused(self, reason):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, past_key_values, **kwargs)
        (q,) = project(hidden_states, (self.query,), self.attention_head_size)
        if past_key_values is not None and past_key_values.is_updated.get(self.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            k, v = layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        else:
            k, v = project(encoder_hidden_states, (self.key, self.value), self.attention_head_size)
            if past_key_values is not None:
                cache = past_key_values.cross_attention_cache
                k, v = (x.transpose(1, 2) for x in cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx))
                past_key_values.is_updated[self.layer_idx] = True
        return _attended(self, q, k, v, attention_mask, hidden_states.shape), None


def _attended_packed(module: nn.Module, hidden_states: Tensor, packing: Packing, queries: Tensor | None) -> Tensor:
    """hidden_states [1, T, H], packed; queries [1, N, H] are the rows that are read, None for all of them."""
    bounds = {"cu_seqlens": packing.tokens.cu_seqlens, "max_seqlen": packing.tokens.max_seqlen}
    if queries is None:
        q, k, v = project(hidden_states, (module.query, module.key, module.value), module.attention_head_size)
        return _attended_at(module, q, k, v, **bounds)
    (q,) = project(queries, (module.query,), module.attention_head_size)
    k, v = project(hidden_states, (module.key, module.value), module.attention_head_size)
    keys, rows = side_by_side(packing.tokens, packing.read)
    bounds |= {"cu_seqlens": keys, "cu_seqlens_q": rows, "max_seqlen_q": packing.read.max_seqlen}
    return _attended_at(module, q, k, v, **bounds)


def _given_bounds(
    module: nn.Module, mask: Tensor | None, past_key_values: Any, kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """cu_seqlens and max_seqlen of a [1, T, H] call from a flattening collator, where the model's own implementation
    would have read them (the others ignore them)."""
    if not _reads_packing(module) or mask is not None or past_key_values is not None or not flash_keywords(kwargs):
        return None
    return {"cu_seqlens": kwargs["cu_seq_lens_q"].to(torch.int32), "max_seqlen": int(kwargs["max_length_q"])}


def flash_keywords(kwargs: dict[str, Any]) -> bool:
    """Whether the call says where packed sequences start, as transformers' flattening collators do."""
    return all(kwargs.get(name) is not None for name in _FLASH_KEYWORDS)


def _reads_packing(module: nn.Module) -> bool:
    return "flash" in (former_name(module.config._attn_implementation) or "")


def _attended_at(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **bounds: Any) -> Tensor:
    q, k, v = (x.squeeze(0) for x in (q, k, v))
    p = module.dropout.p if module.training else 0.0
    out = run(module, ops.attention, q, k, v, causal=module.is_causal, scale=module.scaling, p=p, **bounds)
    return out.flatten(1).unsqueeze(0)


def packed_reason(module: nn.Module) -> str | None:
    """Why `module` cannot attend to packed rows, or None."""
    if former_name(module.config._attn_implementation) is None:
        return f"attention implementation {module.config._attn_implementation!r} was chosen after patching"
    return unsupported(module)


def _reason(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
    if wants_weights(module, kwargs):
        return "attention weights were asked for"
    if (reason := packed_reason(module)) is not None:
        return reason
    if _reads_packing(module) and kwargs.get("position_ids") is not None and kwargs.get("cu_seq_lens_q") is None:
        return "position ids, from which the model's own attention reads where packed sequences start"
    return mask_reason(mask)


def _attended(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shape: Any) -> Tensor:
    p = module.dropout.p if module.training else 0.0
    out = run(module, attend, q, k, v, mask, module.is_causal, module.scaling, p)
    return out.reshape(*shape[:-1], -1)
