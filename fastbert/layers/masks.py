"""The mask that a patched model passes to its attention, and the conditions under which it may: only kernels see it.

Stock makes its masks for the attention implementation that the config names: [B, 1, Q, K], bool or additive, or [B, K]. The
kernel wants the visible keys, a bool [B, K], without a tensor of the size of the scores and without reading a value on the
device.

- The config is never changed. Everything that reads it (a second model built from it, a user's module, `save_pretrained`,
  transformers' own checks) finds what stock has. Instead the fast BertModel overrides `_create_attention_masks` and passes
  its layers a `KernelMask`, which can also make stock's mask for a call that no kernel takes.
- It does so only if no other code sees the mask: exact stock and fast classes on the way, no hooks, transformers' own
  attention implementation. Otherwise all modules get stock's masks, and the kernel reads those.
- Each attention must mean what the config says: the same causality and implementation, with masks made by transformers' own
  functions.
"""

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import forwards, ops
from fastbert.dispatch import IDLE_HOOKS, hooked, hooks_of
from fastbert.layers.stock import part_of, untested
from fastbert.wrapped import SHARDING, behind, wrappers_of


class KernelMask:
    """Replaces `attention_mask` if only fast classes read it.

    It is no dataclass: FSDP copies those at each layer, and each copy would compute its own bounds and seeds.

    keys: bool [B, K], false for padding; None if there is no padding. Modules apply causality themselves.
    general: stock's mask if it masks more than padding, such as a caller's own [B, 1, Q, K]; else None.
    stock: makes the mask that stock would have passed, for a call that no kernel takes.
    by_module: why the layers that get it run module by module, or None.
    prepared: the `PreparedLayer` of each layer, so that a layer need not check itself again if it has a `context`.
    layers: the layers that will be called with it, once each (gradient checkpointing calls them again).
    twins: what one layer passes to the next beside its result.
    """

    def __init__(
        self,
        keys: Tensor | None,
        general: Any,
        stock: Callable[[], Any],
        by_module: str | None = None,
        prepared: dict[nn.Module, Any] | None = None,
        layers: tuple[nn.Module, ...] = (),
    ) -> None:
        self.keys, self.general, self.stock, self.by_module = keys, general, stock, by_module
        self.prepared = {} if prepared is None else prepared
        self.layers = layers
        self.twins: Any = ops.Twins()
        self._seeds: dict[nn.Module, Tensor] = {}

    def seed_of(self, layer: nn.Module, device: torch.device) -> Tensor | None:
        """The dropout seeds of `layer`, int64 [6]; None for a layer that is not in `layers`.

        They are drawn once per forward for all layers, and a layer that is called again gets the same ones. A layer that
        occurs twice in the encoder draws its own.
        """
        if self.layers and not self._seeds:
            drawn = torch.randint(2**62, (len(self.layers), 6), device=device)
            self._seeds.update(zip(self.layers, drawn.unbind(), strict=True))
        seed = self._seeds.get(layer)
        return seed if seed is not None and seed.device == device else None

    @cached_property
    def bounds(self) -> Tensor | None:
        """ops.bounds_of(keys), computed once for all layers."""
        return None if self.keys is None else ops.bounds_of(self.keys)


class CarriedMask(Tensor):
    """A KernelMask in the form of a 4-D tensor, which transformers' mask functions return as it is.

    For a model that makes its masks inside its forward: passed to that as `attention_mask`, it reaches the layers.
    """

    mask: KernelMask
    deferred: Any  # the DeferredEmbeddings of the call, or None

    @classmethod
    def of(cls, mask: KernelMask, deferred: Any) -> "CarriedMask":
        carrier = torch.empty(0, 0, 0, 0, dtype=torch.bool).as_subclass(cls)  # bool: engines cast floating-point arguments
        carrier.mask, carrier.deferred = mask, deferred
        return carrier

    def detach(self) -> "CarriedMask":
        return self  # gradient checkpointing detaches what it passes on


def carried(mask: Any) -> Any:
    """The mask that a CarriedMask carries; any other mask itself."""
    return mask.mask if isinstance(mask, CarriedMask) else mask


def stock_mask(mask: Any) -> Any:
    """The mask as stock's forward takes it."""
    return mask.stock() if isinstance(mask, KernelMask) else mask


def kernel_mask(given: Any, keys: Tensor, stock: Callable[[], Any], added: bool, **more: Any) -> KernelMask:
    """The KernelMask over `keys` [B, K, H] for the caller's mask, without reading its values.

    A mask that is neither a padding mask nor None is converted by stock. The backward keeps no tensor of the caller that
    stock would not keep, because the caller may write to it first. So a padding mask is copied, and, if masks are `added`
    to the scores (by eager attention), any mask. `more` are further fields of KernelMask.
    """
    if given is None:
        return KernelMask(None, None, stock, **more)
    if isinstance(given, Tensor) and given.dim() == 2 and given.shape[1] == keys.shape[1] and given.shape[0] >= keys.shape[0]:
        # Multiple choice flattens a 4-D mask to more rows than the batch has; stock reads the first.
        seen = given[: keys.shape[0]].to(keys.device, torch.bool, copy=True, memory_format=torch.contiguous_format)
        return KernelMask(seen, None, stock, **more)
    general = stock()
    return KernelMask(None, general.clone() if added and general is given and isinstance(given, Tensor) else general, stock)


def keys_of(mask: Any) -> Tensor | None:
    """The keys [B, K] of a bool [B, 1, Q, K] that is expanded over queries, as transformers makes it from padding, or None."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.dtype != torch.bool:
        return None
    if mask.shape[1] != 1 or (mask.shape[2] != 1 and mask.stride(2) != 0):
        return None
    return mask[:, 0, 0]


def prepare_layers(model: nn.Module, prepare: Callable[..., Any]) -> dict[nn.Module, Any] | None:
    """Prepare the layers of `model`, which has a fast class, for a KernelMask, or return None if other code would see the mask.

    Every module that gets the masks must be stock's or fastbert's, with a fast attention, and must interpret them as the model
    does. Returns the results of `prepare(layer, hooked=...)` for the fast layers that can run as one op.
    """
    family, config = model.PART.family, model.config
    encoder = model._modules[family.encoder]
    if part_of(type(encoder)).part != "Encoder" or _observed(encoder) or untested(model.STOCK) or masks_replaced(family.path):
        return None
    causal = bool(getattr(config, "is_decoder", False))
    if causal and not getattr(config, "is_causal", True):  # a decoder with bidirectional attention
        return None
    found: dict[nn.Module, Any] = {}
    others = any(hooks_of(encoder))  # other code runs between layers and may change the next ones
    compiling = torch.compiler.is_compiling()
    for called in encoder.layer:
        layer = behind(called)
        of, part, fast = part_of(type(layer))
        if part != "Layer" or of is not family:
            return None
        has_hooks = layer is not called or any(hooks_of(layer))
        if (has_hooks or "forward" in vars(layer)) and any(map(_observed, (*wrappers_of(called), layer))):
            return None
        prepared = None if not fast or compiling else prepare(layer, hooked=has_hooks)
        others = others or has_hooks or prepared is None or prepared.context is None
        if prepared is not None and prepared.state.reason is None:
            found[layer] = prepared
            if not _same_attention(prepared.state.attention, prepared.state.config, config, causal):
                return None
        elif not _attention_sees(layer.attention, config, causal):
            return None
        crossattention = layer._modules.get("crossattention")
        if crossattention is not None and not _attention_sees(crossattention, config, False):
            return None
    return {layer: prepared._replace(context=None) for layer, prepared in found.items()} if others else found


def _attention_sees(attention: nn.Module, config: Any, causal: bool) -> bool:
    if part_of(type(attention)).part not in ("Attention", "SelfAttention") or _observed(attention):
        return False
    attends = attention._modules.get("self", attention)
    found = part_of(type(attends))
    if not found.fast or found.part not in ("SelfAttention", "CrossAttention") or _observed(attends):
        return False
    return _same_attention(vars(attends), attends.config, config, causal)


def _same_attention(attends: dict[str, Any], own: Any, config: Any, causal: bool) -> bool:
    """Whether an attention interprets masks as the model does; one of another model or with other causality does not."""
    same = own is config or own._attn_implementation == config._attn_implementation
    return same and bool(attends["is_causal"]) == causal


@torch.compiler.assume_constant_result
def masks_replaced(path: str) -> bool:
    """Whether a function that makes the masks of a family was replaced. path: the family's module under transformers.models,
    because torch up to 2.11 takes no object of ours as an argument here."""
    module = import_module(f"transformers.models.{path}")
    return any(hasattr(module, name) and forwards.innermost(getattr(module, name)) is None for name in _MASK_FUNCTIONS)


def _observed(module: nn.Module) -> bool:
    return hooked(module, _IDLE)


_MASK_FUNCTIONS = ("create_causal_mask", "create_bidirectional_mask")
_IDLE = (*IDLE_HOOKS, SHARDING, "fastbert.verify")  # the hooks of the last one see only outputs
