"""BertEncoder without padding: its tokens are packed once before the first layer and unpacked once after the last.

Where a head says that it reads some positions only, the last layer's queries, output and feed-forward run for those.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.bert.modeling_bert import BertAttention, BertEncoder, BertLayer, BertModel, BertPooler

from fastbert import ops
from fastbert.dispatch import refused, tensor_reason
from fastbert.integrations.attention import wants_weights
from fastbert.layers.attention import FastBertSelfAttention, flash_keywords, packed_reason
from fastbert.layers.packing import Packing, every_row, first_rows, rows_of
from fastbert.layers.reading import Reading, reading_of

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # releases that pass output_hidden_states down as a keyword
    _active_collector = None


class _PackingEncoder:
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        packing = self._packing(hidden_states, attention_mask, args, kwargs)
        if refused(self, packing if isinstance(packing, str) else None):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        shape = hidden_states.shape
        packed = packing.tokens.take(hidden_states.flatten(0, 1)).unsqueeze(0)
        for layer in self.layer if packing.read is None else self.layer[:-1]:
            packed = layer(packed, None, None, packing=packing)
        rows = packing.tokens
        if packing.read is not None:
            rows, packed = packing.read, _read_layer(self.layer[-1], packed, packing)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=rows.put(packed.squeeze(0)).view(shape))

    def _packing(
        self, hidden_states: Tensor, mask: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Packing | str:
        """How to pack this call, or the reason not to."""
        if torch.compiler.is_compiling():
            return "torch.compile needs sizes that do not depend on the mask"
        told = reading_of(self)
        reason = None if self.ALWAYS or (told and told.alone) else "outputs at padded positions can be seen"
        reason = reason or self._reason(mask, args, kwargs) or tensor_reason(hidden_states)
        if reason is not None:
            return reason
        packing = _packing_of(mask, told, *hidden_states.shape[:2], hidden_states.device)
        if isinstance(packing, Packing) and packing.read is not None and self.layer[-1].attention.self.is_causal:
            # The kernel's causal queries are the last of their sequence, not any of it.
            return "a batch without padding" if packing.tokens.index is None else replace(packing, read=None)
        return packing

    def _reason(self, mask: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if mask is not None and (mask.dim() != 2 or mask.dtype != torch.bool):
            return "a mask between queries and keys"
        if mask is None and (flash_keywords(kwargs) or kwargs.get("position_ids") is not None):
            return "position ids or bounds, by which the batch may be packed already"
        if any(x is not None for x in (*args, kwargs.get("encoder_hidden_states"), kwargs.get("past_key_values"))):
            return "cross-attention or a cache"
        if kwargs.get("output_hidden_states") or wants_weights(self, kwargs) or (_active_collector and _active_collector.get()):
            return "hidden states or attention weights were asked for"
        if not len(self.layer):
            return "no layers"
        for layer in self.layer:
            attention = layer.attention
            if not (type(layer) is BertLayer and type(attention) is BertAttention):
                return f"a layer that is a {type(layer).__name__}"
            if type(attention.self) is not FastBertSelfAttention:
                return "a layer whose attention is not the kernel's"
            if (reason := packed_reason(attention.self)) is not None:
                return reason
            if layer.chunk_size_feed_forward:
                return "a feed-forward in chunks"
        return "a layer with hooks" if any(hooked(module) for module in self.layer.modules()) else None


def _read_layer(layer: BertLayer, hidden_states: Tensor, packing: Packing) -> Tensor:
    """The last layer at the rows that are read: [1, T, H] -> [1, N, H]."""
    run = partial(_layer_at_rows, layer, packing=packing)
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(run, hidden_states)
    return run(hidden_states)


def _layer_at_rows(layer: BertLayer, hidden_states: Tensor, packing: Packing) -> Tensor:
    rows = packing.read.within(packing.tokens).take(hidden_states.squeeze(0)).unsqueeze(0)
    attended, _ = layer.attention.self(hidden_states, packing=packing, queries=rows)
    return layer.feed_forward_chunk(layer.attention.output(attended, rows))


def _packing_of(mask: Tensor | None, told: Reading | None, batch: int, seqlen: int, device: torch.device) -> Packing | str:
    """The packing of a bool [B, S] mask, or the reason not to pack. One synchronisation, none where nothing is unknown."""
    if not batch * seqlen:
        return "an empty batch"
    alone = told is not None and told.alone
    if mask is None and not alone:
        return "a batch without a mask"
    if mask is None and told.positions is None:
        return Packing(every_row(batch, seqlen, device), first_rows(batch, seqlen, device))
    tokens, longest, n_read, longest_read, missing = _facts(mask, told)
    if tokens == 0:
        return "a batch of padding alone"
    if told is not None and told.positions is not None:
        told.rows = rows_of(told.positions, n_read, longest_read)
    if alone and missing:
        return "a position that is padding is read"
    whole = mask is None or tokens == batch * seqlen
    if whole and not alone:
        return "a batch without padding"
    read = None
    if alone:
        read = first_rows(batch, seqlen, device) if told.positions is None else told.rows
    return Packing(every_row(batch, seqlen, device) if whole else rows_of(mask, tokens, longest), read)


def _facts(mask: Tensor | None, told: Reading | None) -> list[int]:
    """Tokens in all and in the longest row, positions read in all and in the row of most, those read that are padding."""
    read = None if told is None or told.positions is None else told.positions
    if read is None:
        lengths = mask.sum(1)
        firsts = mask[:, 0].logical_not().sum()
        return torch.stack([lengths.sum(), lengths.amax(), firsts, firsts, firsts]).tolist()
    lengths, reads = (read if mask is None else mask).sum(1), read.sum(1)
    missing = torch.zeros_like(reads[0]) if mask is None else (read & ~mask).sum()
    return torch.stack([lengths.sum(), lengths.amax(), reads.sum(), reads.amax(), missing]).tolist()


def hooked(module: nn.Module) -> bool:
    """Whether a hook would see packed rows; those that transformers leaves on modules to capture outputs are idle."""
    if "forward" in vars(module):
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values())
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def encoder_of(head: nn.Module) -> nn.Module | None:
    """The packing encoder of `head`, if nothing but the head can see what comes out of it."""
    model = head.bert
    if type(model) is not BertModel or not isinstance(model.encoder, _PackingEncoder):
        return None
    pooler = model.pooler
    if pooler is not None and (type(pooler) is not BertPooler or hooked(pooler)):
        return None
    return None if hooked(model) or hooked(model.encoder) else model.encoder


class FastBertEncoder(_PackingEncoder, BertEncoder):
    """BertEncoder that packs whatever has padding; zeros come out where padding is."""

    ALWAYS = True


class AutoFastBertEncoder(_PackingEncoder, BertEncoder):
    """BertEncoder that packs only for a head that says what it reads, so that nobody sees the zeros."""

    ALWAYS = False


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never pack, or None."""
    return None if ops.MISSING is None else ops.MISSING
