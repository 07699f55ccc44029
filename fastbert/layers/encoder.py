"""BertEncoder without padding: its tokens are packed once before the first layer and unpacked once after the last."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEncoder

from fastbert import ops
from fastbert.dispatch import refused, tensor_reason
from fastbert.integrations.attention import wants_weights
from fastbert.layers.attention import FastBertSelfAttention
from fastbert.layers.packing import Packing, packing_of

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # releases that pass output_hidden_states down as a keyword
    _active_collector = None


class _PackingEncoder:
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        packing = self._packing(hidden_states, attention_mask, args, kwargs)
        if refused(self, packing if isinstance(packing, str) else None):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        outputs = super().forward(packing.pack(hidden_states), None, *args, **kwargs, packing=packing)
        outputs.last_hidden_state = packing.unpack(outputs.last_hidden_state, hidden_states.shape)
        return outputs

    def _packing(
        self, hidden_states: Tensor, mask: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Packing | str:
        """How to pack this call, or the reason not to."""
        reason = self._reason(mask, args, kwargs) or tensor_reason(hidden_states)
        return reason or packing_of(mask, self.EVERY_FIRST)

    def _reason(self, mask: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if torch.compiler.is_compiling():
            return "torch.compile needs sizes that do not depend on the mask"
        if mask is None:
            return "a batch without a mask"
        if mask.dim() != 2 or mask.dtype != torch.bool:
            return "a mask between queries and keys"
        if any(x is not None for x in (*args, kwargs.get("encoder_hidden_states"), kwargs.get("past_key_values"))):
            return "cross-attention or a cache"
        if kwargs.get("output_hidden_states") or wants_weights(self, kwargs) or (_active_collector and _active_collector.get()):
            return "hidden states or attention weights were asked for"
        for layer in self.layer:
            if type(layer.attention.self) is not FastBertSelfAttention or _hooked(layer.attention.self):
                return "a layer whose attention is not the kernel's"
            if layer.chunk_size_feed_forward:
                return "a feed-forward in chunks"
        return "a layer with hooks" if any(_hooked(module) for module in self.layer.modules()) else None


def _hooked(module: nn.Module) -> bool:
    """Whether a hook would see packed rows; those that transformers leaves on modules to capture outputs are idle."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values())
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


class FastBertEncoder(_PackingEncoder, BertEncoder):
    """BertEncoder that packs; zeros come out where padding is."""

    EVERY_FIRST = False


class FirstPositionFastBertEncoder(_PackingEncoder, BertEncoder):
    """BertEncoder that packs for a head that reads the first position only, so that nobody sees the zeros."""

    EVERY_FIRST = True


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never pack, or None."""
    return None if ops.MISSING is None else ops.MISSING
