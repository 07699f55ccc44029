"""Fast classes of encoders that skip padding: tokens are packed once before the first layer and unpacked after the last.

If a head says that it reads only some positions, the last layer's queries, output and feed-forward run for those only. A
causal last layer takes its rows after attention instead: the kernel's causal queries are the last ones of their sequence, so
attention runs for all rows, and `index` and `inverse` of `encoder_layer` name the rows that go on.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from fastbert import ops
from fastbert.dispatch import IDLE_HOOKS, FastModule, falls_back, hooked, kind_of, run, tensor_reason
from fastbert.integrations.attention import argument_reason, implementation_reason, wants_weights
from fastbert.layers import stock
from fastbert.layers.attention import flash_keywords
from fastbert.layers.attention import unsupported as attention_unsupported
from fastbert.layers.by_row import row_reason
from fastbert.layers.capturing import is_recording
from fastbert.layers.counts import CallerCounts, TokenBudget
from fastbert.layers.deferred_embeddings import AcceptsDeferredEmbeddings, DeferredEmbeddings
from fastbert.layers.family import DISTILBERT, LIKE_BERT
from fastbert.layers.layer import Layer, at_rows
from fastbert.layers.layout import chunk_size_of, self_attention_of
from fastbert.layers.masks import CarriedMask, KernelMask, carried
from fastbert.layers.packing import Packing, Rows
from fastbert.layers.packing_plan import plan_packing
from fastbert.layers.reading import PooledReading, Reading
from fastbert.lengths import Counted
from fastbert.wrapped import SHARDING, behind, wrappers_of

_IDLE = (*IDLE_HOOKS, SHARDING)
_MAX_READ_FRACTION = 0.75  # of the tokens: gathering more rows costs as much as it saves
_ATTENTIONS = ("Attention", "SelfAttention")
_CROSS_OR_CACHE = ("encoder_hidden_states", "past_key_values", "cache")


class PackingEncoder(AcceptsDeferredEmbeddings, FastModule):
    """An encoder that packs: with ALWAYS every batch with padding, else only for a head that says what it reads."""

    caller_counts: CallerCounts | None = None  # fastbert.lengths sets it within its block

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        # A user's own keywords of these names are passed on, as in stock.
        reading = kwargs.pop("reading") if isinstance(kwargs.get("reading"), Reading) else None
        embed, attention_mask = self._take_embed(attention_mask, kwargs), carried(attention_mask)
        packing = self._packing(hidden_states, attention_mask, reading, args, kwargs)
        if falls_back(self, packing if isinstance(packing, str) else None):
            if isinstance(reading, PooledReading):
                reading.padded = packing
            hidden_states = hidden_states if embed is None else embed(None)
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        shape = hidden_states.shape
        if embed is not None:
            packed = embed(packing.tokens)
        else:
            packed = run(self, packing.tokens.take, hidden_states.flatten(0, 1)).unsqueeze(0)
        for layer in self.layer if packing.read is None else self.layer[:-1]:
            packed = layer(packed, attention_mask, packing=packing)
        rows = packing.tokens
        if packing.read is not None:
            rows, packed = packing.read, _read_layer(self.layer[-1], packed, attention_mask, packing)
        if isinstance(reading, PooledReading):
            reading.hidden, reading.tokens = packed.squeeze(0), rows
            return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=packed.new_empty(()).expand(shape))
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=rows.put(packed.squeeze(0)).view(shape))

    def _take_embed(self, mask: Any, kwargs: dict[str, Any]) -> Callable[[Rows | None], Tensor] | None:
        """The call of deferred embeddings; their keyword becomes stock's."""
        if not isinstance(deferred := kwargs.get("position_ids"), DeferredEmbeddings):
            return None
        kwargs["position_ids"] = deferred.position_ids
        return deferred.embed

    def may_pack(self, kwargs: dict[str, Any]) -> bool:
        reading = kwargs.get("reading")
        return self.ALWAYS or (isinstance(reading, Reading) and reading.hides_padding)

    def _packing(
        self,
        hidden_states: Tensor,
        mask: Any,
        reading: Reading | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Packing | str:
        """The packing of this call, or the reason not to pack."""
        counts = self.caller_counts or CallerCounts()
        if isinstance(kwargs.get("lengths"), TokenBudget):
            counts = CallerCounts(token_budget=kwargs.pop("lengths").tokens)
        for name, field in (("lengths", "lengths"), ("read_lengths", "read")):  # from a LengthsCollator
            if isinstance(kwargs.get(name), Counted):
                counts = replace(counts, **{field: tuple(kwargs.pop(name))})
        if isinstance(reading, PooledReading):
            if torch.compiler.is_compiling():
                return "torch.compile traces no packing for a pooling"
            if reading.per_row is not None and (counts.lengths is not None or counts.token_budget is not None):
                counts = replace(counts, read=(reading.per_row,) * len(hidden_states))
        reason = None if self.ALWAYS or (reading and reading.hides_padding) else "outputs at padded positions are visible"
        reason = reason or tensor_reason(hidden_states) or self._reason(mask, args, kwargs)
        if reason is not None:
            return reason
        packing = plan_packing(mask.keys, reading, counts, *hidden_states.shape[:2], hidden_states.device)
        pooled = isinstance(reading, PooledReading)  # it takes the rows that it asked for
        causal = self_attention_of(behind(self.layer[-1])).is_causal
        if isinstance(packing, Packing) and packing.read is not None and not pooled and causal:
            # Attention runs for all rows there, and the rows that are read are gathered from its output.
            index, n_read = packing.tokens.index, len(packing.read.index)
            if n_read > _MAX_READ_FRACTION * (hidden_states.shape[:2].numel() if index is None else len(index)):
                return "a batch without padding" if index is None else replace(packing, read=None)
        return packing

    def _reason(self, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if (reason := stock.untested(self.STOCK)) is not None:
            return reason
        if not len(self.layer):
            return "no layers"
        captured = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        if captured or wants_weights(self, kwargs) or is_recording():
            return "hidden states or attention weights were requested"
        if any(x is not None for x in (*args, *map(kwargs.get, _CROSS_OR_CACHE))):
            return "cross-attention or a cache"
        known = mask.prepared if isinstance(mask, KernelMask) else {}
        for called in self.layer:
            layer = behind(called)
            if layer not in known:
                reason = _layer_reason(called)
            else:
                around = (layer,) if layer is called else (*wrappers_of(called), layer)
                reason = "a layer with hooks" if any([hooked(module, _IDLE) for module in around]) else None
            if reason is not None:
                return reason
            if chunk_size_of(layer):
                return "a chunked feed-forward"
        implementation = self.config._attn_implementation
        if not isinstance(mask, KernelMask):
            return implementation_reason(implementation) or "masks that code other than the kernels could read"
        if (reason := argument_reason(implementation, tuple(kwargs))) is not None:
            return reason
        if mask.general is not None:
            return "a mask between queries and keys"
        if mask.keys is None and (flash_keywords(kwargs) or kwargs.get("position_ids") is not None):
            return "position ids or cu_seqlens, by which the batch may already be packed"
        return None


def _layer_reason(layer: nn.Module) -> str | None:
    """Why `layer`, which the model has not prepared, may not be called with packed tokens, or None."""
    if stock.part_of(type(layer)).part != "Layer" or stock.part_of(type(layer.attention)).part not in _ATTENTIONS:
        return f"a layer that is a {type(layer).__name__}"
    attention = self_attention_of(layer)
    attends = stock.part_of(type(attention))
    if attends.part != "SelfAttention" or not attends.fast:
        return "a layer whose attention does not use the kernel"
    return attention_unsupported(attention) or next(filter(None, map(row_reason, layer.modules())), None)


def _read_layer(layer: nn.Module, hidden_states: Tensor, mask: KernelMask, packing: Packing) -> Tensor:
    """The last layer for the rows that are read: [1, T, H] -> [1, N, H]."""
    if isinstance(behind(layer), Layer):
        return layer(hidden_states, mask, packing=packing, reads=True)
    run = partial(at_rows, layer, packing=packing)
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(run, hidden_states)
    return run(hidden_states)


def packs_unseen(head: nn.Module) -> bool:
    """Whether the encoder of `head` packs and only the head can see its output."""
    return model_packs_unseen(body_of(head))


def model_packs_unseen(model: nn.Module) -> bool:
    """Whether the encoder of `model` packs and only the caller of `model` can see its output."""
    if stock.part_of(type(model)).part != "Model" or not isinstance(encoder_of(model), PackingEncoder):
        return False
    pooler = getattr(model, "pooler", None)
    if pooler is not None and (stock.part_of(type(pooler)).part != "Pooler" or hooked(pooler)):
        return False
    return not (hooked(model, _IDLE) or hooked(encoder_of(model), _IDLE))


def body_of(head: nn.Module) -> nn.Module:
    """The model inside a head of a known family; any other module itself."""
    part = stock.part_of(kind_of(head))
    return head._modules.get(part.family.body, head) if part.part else head


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of a model of a known family, or None."""
    return model._modules.get(stock.family_of(model).encoder)


def packing_encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of `model`, a BertModel or a head, if it packs when `model` is called without labels; else None."""
    encoder = encoder_of(body_of(model))
    if not isinstance(encoder, PackingEncoder):
        return None
    reads_first = getattr(model, "reads_first", None)
    return encoder if encoder.ALWAYS or (reads_first is not None and reads_first()) else None


class DistilEncoder(PackingEncoder):
    """DistilBERT's encoder, which packs."""

    def _take_embed(self, mask: Any, kwargs: dict[str, Any]) -> Callable[[Rows | None], Tensor] | None:
        return mask.deferred.embed if isinstance(mask, CarriedMask) and mask.deferred is not None else None

    @property
    def config(self) -> Any:
        return behind(self.layer[0]).attention.config if len(self.layer) else None


def _encoders(namespace: str, always: bool) -> type:
    """A namespace class whose attributes are the fast classes, so that pickle finds them."""
    classes = {
        **stock.fast_classes("Encoder", PackingEncoder, __name__, namespace, LIKE_BERT, ALWAYS=always),
        **stock.fast_classes("Encoder", DistilEncoder, __name__, namespace, [DISTILBERT], ALWAYS=always),
    }
    return type(namespace, (), {"__module__": __name__, **classes})


Always = _encoders("Always", always=True)  # unpad=True
Unseen = _encoders("Unseen", always=False)  # unpad="auto"


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never pack, or None."""
    return None if ops.MISSING is None else ops.MISSING
