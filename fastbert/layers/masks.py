"""The mask that a patched model hands to its own attention, and when it may: nothing but kernels sees it.

Stock makes its masks for the attention implementation that the config names: [B, 1, Q, K], bool or to be added, or [B, K].
The kernel wants the keys that padding leaves, [B, K], without a tensor of scores' size and without a look at the device. A
module that is not fastbert's, or a hook, that is between the model and the attention gets what stock would have given it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.bert import modeling_bert as bert

from fastbert import forwards, ops
from fastbert.dispatch import IDLE_HOOKS, hooked, hooks_of
from fastbert.layers.stock import BertAttention, BertEncoder, BertLayer, untested


@dataclass(frozen=True, eq=False)
class KernelMask:
    """What stands in place of `attention_mask` where only fast classes read it.

    keys: bool [B, K], the keys that are no padding; None: all of them. Causality is the module's own.
    general: what stock would have been given where that says more, such as a caller's own [B, 1, Q, K]; else None.
    stock: makes the mask that stock would have been given, for a call that no kernel takes.
    by_module: why the layers that get it run module by module, or None.
    prepared: what has just been looked at of layers, by layer, so that they need not look again where `context` says so.
    layers: those that will be called with it, once each (gradient checkpointing calls them again).
    twins: what one layer hands to the next beside its result.
    """

    keys: Tensor | None
    general: Any
    stock: Callable[[], Any]
    by_module: str | None = None
    prepared: dict[nn.Module, Any] = field(default_factory=dict)
    layers: tuple[nn.Module, ...] = ()
    twins: Any = field(default_factory=lambda: ops.Twins())
    _seeds: dict[nn.Module, Tensor] = field(default_factory=dict)

    def seed_of(self, layer: nn.Module, device: torch.device) -> Tensor | None:
        """int64 [6] for the dropouts of `layer`, the same each time, drawn for all layers at once; None of another layer."""
        if self.layers and not self._seeds:
            drawn = torch.randint(2**62, (len(self.layers), 6), device=device)
            self._seeds.update(zip(self.layers, drawn.unbind(), strict=True))
        seed = self._seeds.get(layer)
        return seed if seed is not None and seed.device == device else None

    @cached_property
    def bounds(self) -> Tensor | None:
        """ops.bounds_of the keys, for all layers."""
        return None if self.keys is None else ops.bounds_of(self.keys)


def stock_mask(mask: Any) -> Any:
    """The mask as stock's forward wants it."""
    return mask.stock() if isinstance(mask, KernelMask) else mask


def kernel_mask(given: Any, keys: Tensor, stock: Callable[[], Any], added: bool, **more: Any) -> KernelMask:
    """The mask over `keys` [B, K, H] from what the caller gave, without a look at its values.

    What is neither a padding mask nor None goes the way that stock lets it go. Nothing of the caller's is kept for the
    backward that stock does not keep, as he may write to it before: a padding mask, and where masks are `added` (by eager
    attention) any. `more`: see KernelMask.
    """
    if given is None:
        return KernelMask(None, None, stock, **more)
    if isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] == keys.shape[1] and given.shape[0] >= keys.shape[0]:
        # Multiple choice flattens a 4-D mask to more rows than the batch has; stock reads these.
        seen = given[: keys.shape[0]].to(keys.device, torch.bool, copy=True, memory_format=torch.contiguous_format)
        return KernelMask(seen, None, stock, **more)
    general = stock()
    return KernelMask(None, general.clone() if added and general is given and isinstance(given, Tensor) else general, stock)


def keys_of(mask: Any) -> Tensor | None:
    """The [B, K] of a bool [B, 1, Q, K] whose rows are one, as transformers makes it of padding (an expanded view)."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype != torch.bool:
        return None
    if mask.shape[1] != 1 or (mask.shape[2] != 1 and mask.stride(2) != 0):
        return None
    return mask[:, 0, 0]


def prepare_layers(
    model: nn.Module, layers: tuple[type, ...], attentions: tuple[type, ...], prepare: Callable[..., Any]
) -> dict[nn.Module, Any] | None:
    """Whether every module of `model`, a BertModel, that is handed its masks is stock's or one of the fast `layers` and
    `attentions`, and reads them as the model means them: then what `prepare(layer, hooked=...)` says of the fast layers
    that can run as one op, else None."""
    encoder, config = model.encoder, model.config
    if not _is_fast_or_stock(_unsharded_type(encoder)) or _observed(encoder) or untested("BertModel") or masks_replaced():
        return None
    causal = bool(config.is_decoder)
    if causal and not getattr(config, "is_causal", True):  # a decoder that was made to look both ways
        return None
    found: dict[nn.Module, Any] = {}
    others = any(hooks_of(encoder))  # whose code runs between the layers, and may change the next ones
    compiling = torch.compiler.is_compiling()
    for layer in encoder.layer:
        cls = _unsharded_type(layer)
        if cls not in layers:
            return None
        has_hooks = any(hooks_of(layer))
        if (has_hooks or "forward" in vars(layer)) and _observed(layer):
            return None
        prepared = None if cls is BertLayer or compiling else prepare(layer, hooked=has_hooks)
        others = others or has_hooks or prepared is None or prepared.context is None
        if prepared is not None and prepared.state.reason is None:
            found[layer] = prepared
            if not _same_attention(prepared.state.attention, prepared.state.config, config, causal):
                return None
        elif not _attention_sees(layer.attention, attentions, config, causal):
            return None
        crossattention = layer._modules.get("crossattention")
        if crossattention is not None and not _attention_sees(crossattention, attentions, config, False):
            return None
    return {layer: prepared._replace(context=None) for layer, prepared in found.items()} if others else found


def _is_fast_or_stock(encoder: type) -> bool:
    """Whether it is stock's or a fast one: a class of somebody's own may read its mask."""
    return encoder is BertEncoder or (issubclass(encoder, BertEncoder) and encoder.__module__.startswith("fastbert."))


def _attention_sees(attention: nn.Module, attentions: tuple[type, ...], config: Any, causal: bool) -> bool:
    if _unsharded_type(attention) is not BertAttention or _observed(attention):
        return False
    attends = attention.self
    if type(attends) not in attentions or _observed(attends):
        return False
    return _same_attention(vars(attends), attends.config, config, causal)


def _same_attention(attends: dict[str, Any], own: Any, config: Any, causal: bool) -> bool:
    """A layer of another model, or one whose causality was changed by hand, takes the model's masks in its own way."""
    same = own is config or own._attn_implementation == config._attn_implementation
    return same and bool(attends["is_causal"]) == causal


def _unsharded_type(module: nn.Module) -> type:
    """The class of `module`; of one that FSDP2 sharded, which gets a class of its own, the one that it had."""
    cls = type(module)
    return cls.__mro__[2] if cls.__mro__[1].__module__.startswith(_SHARDING) else cls


@torch.compiler.assume_constant_result
def masks_replaced() -> bool:
    """Whether BERT's masks are made by something else than transformers' own functions."""
    return any(hasattr(bert, name) and forwards.innermost(getattr(bert, name)) is None for name in _MASK_FUNCTIONS)


def _observed(module: nn.Module) -> bool:
    return hooked(module, _IDLE)


_MASK_FUNCTIONS = ("create_causal_mask", "create_bidirectional_mask")
# Its hooks gather weights and cast floating-point arguments; masks they hand on.
_SHARDING = "torch.distributed.fsdp"
_IDLE = (*IDLE_HOOKS, _SHARDING, "fastbert.verify")  # the last one's hooks see outputs alone
