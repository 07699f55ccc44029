"""Fast classes of BertSelfAttention and BertCrossAttention: one product for the projections, then the attention kernel.

- Eager attention returns its weights, which the kernel does not have. With a `KernelMask` only fast classes are between
  model and kernel, so no other code can read the weights; without one, a call under `eager` falls back to stock.
- Keywords that the model's attention function takes by name make a call fall back to stock. Keywords that fastbert passes
  down have types of their own (`Packing`, `KernelMask`), so a user's keyword of the same name is left alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastbert import ops
from fastbert.dispatch import FastModule, falls_back, falls_back_after, run, tensor_reason
from fastbert.integrations.attention import NAME, argument_reason, attend, implementation_reason, mask_reason, wants_weights
from fastbert.layers import stock
from fastbert.layers.family import DISTILBERT, LIKE_BERT
from fastbert.layers.masks import KernelMask, carried, keys_of, stock_mask
from fastbert.layers.packing import Packing, side_by_side
from fastbert.layers.projection import project

_FLASH_KEYWORDS = ("cu_seq_lens_q", "max_length_q", "cu_seq_lens_k", "max_length_k")


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    if module.attention_head_size > ops.MAX_HEAD_SIZE:
        return f"head size {module.attention_head_size}: the kernel takes up to {ops.MAX_HEAD_SIZE}"
    if not isinstance(module.scaling, (float, int)):
        return "scaling is not a number"
    return None  # any dropout module will do: stock also reads only its p


class SelfAttention(FastModule):
    """Self-attention on the attention kernel."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        packing = kwargs.get("packing")
        if isinstance(packing, Packing):  # not a user's keyword of that name, which stock ignores
            falls_back(self, None)  # the encoder has checked the call; stock attention would mix the sequences
            return self.finish(_attend_packed(self, hidden_states, packing, kwargs.get("queries"))), None
        reason = tensor_reason(hidden_states)
        reason = reason or _reason(self, hidden_states, attention_mask, args, kwargs)
        if falls_back(self, reason):
            return super().forward(hidden_states, stock_mask(attention_mask), *args, **kwargs)
        q, k, v = project(hidden_states, self.projections, self.attention_head_size)
        if falls_back_after(self, q, k, v):  # stock's forward calls the Linears once more
            return super().forward(hidden_states, stock_mask(attention_mask), *args, **kwargs)
        mask, cache = _kernel_mask(self, attention_mask), _cache(args, kwargs)
        bounds = _varlen_bounds(self, attention_mask, cache, kwargs)
        if bounds is not None:
            return self.finish(_attend_varlen(self, q, k, v, **bounds)), None
        if cache is not None:
            k, v = _update_cache(self, getattr(cache, "self_attention_cache", cache), k, v, kwargs)
        return self.finish(_attend(self, q, k, v, mask, hidden_states.shape)), None

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        """The Linears of queries, keys and values."""
        return self.query, self.key, self.value

    def finish(self, attended: Tensor) -> Tensor:
        """What the module does with the attended values [..., H]."""
        return attended


class DistilSelfAttention(SelfAttention):
    """DistilBERT's self-attention, which includes its output product, on the attention kernel."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(hidden_states, carried(attention_mask), **kwargs)

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        return self.q_lin, self.k_lin, self.v_lin

    def finish(self, attended: Tensor) -> Tensor:
        return self.out_lin(attended)


class CrossAttention(FastModule):
    """Cross-attention on the attention kernel."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        reason = tensor_reason(hidden_states, encoder_hidden_states)
        reason = reason or _reason(self, encoder_hidden_states, attention_mask, args, kwargs)
        if falls_back(self, reason):
            return super().forward(hidden_states, encoder_hidden_states, stock_mask(attention_mask), *args, **kwargs)
        (q,) = project(hidden_states, (self.query,), self.attention_head_size)
        mask, cache = _kernel_mask(self, attention_mask), _cache(args, kwargs)
        cached = cache is not None and cache.is_updated.get(self.layer_idx)
        if cached:
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            k, v = layer.keys.transpose(1, 2), layer.values.transpose(1, 2)
        else:
            k, v = project(encoder_hidden_states, (self.key, self.value), self.attention_head_size)
        if falls_back_after(self, q, k, v):  # as above
            return super().forward(hidden_states, encoder_hidden_states, stock_mask(attention_mask), *args, **kwargs)
        if cache is not None and not cached:
            k, v = _update_cache(self, cache.cross_attention_cache, k, v, {})
            cache.is_updated[self.layer_idx] = True
        return _attend(self, q, k, v, mask, hidden_states.shape), None


def _cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache of a call: `past_key_values`, which transformers 5.24 renamed to `cache`."""
    return args[0] if args else kwargs.get("cache", kwargs.get("past_key_values"))


def _update_cache(module: nn.Module, cache: Any, k: Tensor, v: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Append k and v [B, S, heads, head size] to the cache and return all keys and values in it, in that layout."""
    more = {}
    if "cache_position" in kwargs:  # transformers 5.0 passes static caches the positions to write to
        more["cache_kwargs"] = {"cache_position": kwargs["cache_position"]}
    k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), module.layer_idx, **more)
    return k.transpose(1, 2), v.transpose(1, 2)


def _attend_packed(module: nn.Module, hidden_states: Tensor, packing: Packing, queries: Tensor | None) -> Tensor:
    """Attention over packed tokens [1, T, H] for the rows that are read, `queries` [1, N, H], or for all tokens if None."""
    bounds = {"cu_seqlens": packing.tokens.cu_seqlens, "max_seqlen": packing.tokens.max_seqlen}
    if queries is None:
        q, k, v = project(hidden_states, module.projections, module.attention_head_size)
        return _attend_varlen(module, q, k, v, **bounds)
    query, key, value = module.projections
    (q,) = project(queries, (query,), module.attention_head_size)
    k, v = project(hidden_states, (key, value), module.attention_head_size)
    keys, rows = side_by_side(packing.tokens, packing.read)
    bounds |= {"cu_seqlens": keys, "cu_seqlens_q": rows, "max_seqlen_q": packing.read.max_seqlen}
    return _attend_varlen(module, q, k, v, **bounds)


def _varlen_bounds(module: nn.Module, mask: Any, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """cu_seqlens and max_seqlen of a [1, T, H] call from a flattening collator, or None.

    None also if the model's own attention implementation would ignore them.
    """
    if isinstance(mask, KernelMask):
        mask = mask.keys if mask.general is None else mask.general
    if mask is not None or cache is not None or not _reads_packing(module) or not flash_keywords(kwargs):
        return None
    return {"cu_seqlens": kwargs["cu_seq_lens_q"].to(torch.int32), "max_seqlen": int(kwargs["max_length_q"])}


def flash_keywords(kwargs: dict[str, Any]) -> bool:
    """Whether the call passes the bounds of packed sequences, as transformers' flattening collators do."""
    return all(kwargs.get(name) is not None for name in _FLASH_KEYWORDS)


def _reads_packing(module: nn.Module) -> bool:
    return "flash" in (module.config._attn_implementation or "")


def _attend_varlen(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **bounds: Any) -> Tensor:
    q, k, v = (x.squeeze(0) for x in (q, k, v))
    p = module.dropout.p if module.training else 0.0
    out = run(module, ops.attention, q, k, v, causal=module.is_causal, scale=module.scaling, p=p, **bounds)
    return out.flatten(1).unsqueeze(0)


def _reason(module: nn.Module, keys: Tensor, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    implementation = module.config._attn_implementation or "eager"
    if reason := stock.untested(module.STOCK) or unsupported(module):
        return reason
    # A model that passes a KernelMask has checked the implementation.
    if not isinstance(mask, KernelMask) and (reason := implementation_reason(implementation)):
        return reason
    if len(args) > 1:
        return "more arguments than the tested forwards take"
    if reason := argument_reason(implementation, tuple(kwargs)):
        return reason
    if wants_weights(module, kwargs):
        return "attention weights were requested"
    if _reads_packing(module) and kwargs.get("position_ids") is not None and kwargs.get("cu_seq_lens_q") is None:
        return "position ids that the model's own attention would read as the bounds of packed sequences"
    return _mask_reason(implementation, mask, keys, cached=_cache(args, kwargs) is not None)


def _mask_reason(implementation: str, mask: Any, keys: Tensor, cached: bool) -> str | None:
    if isinstance(mask, KernelMask):
        mask = mask.general
    elif implementation == "eager":
        return "eager attention returns its weights, and code other than the kernels could read them"
    if isinstance(mask, Tensor):
        if mask.dtype == torch.bool and implementation == "eager":
            return "a bool mask, which eager attention adds to the scores as zeros and ones"
        if mask.dim() == 2 and implementation != NAME and "flash" not in implementation:
            return "a two-dimensional mask"
        if mask.dim() and mask.shape[-1] != keys.shape[1] and not cached:  # a cache's length is known only after its update
            return "a mask for a different number of keys"
        if mask.is_floating_point() and mask.dtype != keys.dtype and not torch.is_autocast_enabled(keys.device.type):
            return f"a {mask.dtype} mask for {keys.dtype} scores"
    return mask_reason(mask)


def _kernel_mask(module: nn.Module, mask: Any) -> Tensor | None:
    """The mask as `attend` takes it: a bool [B, K], true for visible keys, a [B, 1, Q, K], or None."""
    if isinstance(mask, KernelMask):
        if mask.general is None:
            return mask.keys
        mask = mask.general
    keys = None if module.is_causal else keys_of(mask)
    return mask if keys is None else keys


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shape: Any) -> Tensor:
    p = module.dropout.p if module.training else 0.0
    out = run(module, attend, q, k, v, mask, module.is_causal, module.scaling, p)
    return out.reshape(*shape[:-1], -1)


FAST = {
    **stock.fast_classes("SelfAttention", SelfAttention, __name__, families=LIKE_BERT),
    **stock.fast_classes("SelfAttention", DistilSelfAttention, __name__, families=[DISTILBERT]),
    **stock.fast_classes("CrossAttention", CrossAttention, __name__),
}
globals().update(FAST)
