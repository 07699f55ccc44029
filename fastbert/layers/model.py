"""Fast class of BertModel: passes a `KernelMask` to its layers if only kernels see it, and defers its embeddings.

No value on the device is read to make the mask. The class has stock's name, by which `save_pretrained`, pipelines and Trainer
look classes up.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from fastbert.dispatch import FastModule, autocast_dtype, hooked, tensor_reason
from fastbert.integrations.attention import implementation_reason
from fastbert.layers import stock
from fastbert.layers.attention import BertCrossAttention, BertSelfAttention
from fastbert.layers.capturing import is_recording_inside_layers
from fastbert.layers.deferred_embeddings import AcceptsDeferredEmbeddings, DeferredEmbeddings
from fastbert.layers.embeddings import BertEmbeddings
from fastbert.layers.layer import BertLayer
from fastbert.layers.layer_state import CallContext, global_state, prepare
from fastbert.layers.masks import KernelMask, kernel_mask, masks_replaced, prepare_layers


class BertModel(FastModule, stock.BertModel):
    """BertModel that makes masks for the kernels and defers its embeddings until a packing encoder knows its rows."""

    @stock.fast_forward_of(stock.BertModel)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) <= 3 and self._may_defer(kwargs):  # position_ids would be the fourth
            kwargs["position_ids"] = DeferredEmbeddings(kwargs.get("position_ids"))
        return super().forward(*args, **kwargs)

    def _may_defer(self, kwargs: dict[str, Any]) -> bool:
        """Whether only fast classes and tested stock code see what the embeddings return."""
        encoder, embeddings = self.encoder, self.embeddings
        return (
            isinstance(encoder, AcceptsDeferredEmbeddings)
            and encoder.may_pack(kwargs)
            and isinstance(embeddings, BertEmbeddings)
            and not torch.compiler.is_compiling()
            and not hooked(embeddings)
            and not hooked(encoder)
            and "_create_attention_masks" not in vars(self)
            and not kwargs.get("debug_io")  # transformers would log the inputs of every module
            and stock.untested("BertModel") is None
            and not masks_replaced()
        )

    def _create_attention_masks(self, *args: Any, **given: Any) -> tuple[Any, Any]:
        implementation = self.config._attn_implementation or "eager"
        known = None if args else self._prepare_layers(given.get("embedding_output"), implementation)
        if known is None:
            return super()._create_attention_masks(*args, **given)
        made = _StockMasks(partial(super()._create_attention_masks, **given))
        if given.get("cache", given.get("past_key_values")) is not None:
            # Made now, because the layers are about to change the length of the cache.
            return tuple(KernelMask(None, mask, partial(made, i)) for i, mask in enumerate(made.masks()))
        hidden, encoder_hidden = given["embedding_output"], given.get("encoder_hidden_states")
        added = implementation == "eager"
        own = self.encoder.layer
        shared = {"prepared": known, "layers": tuple(known) if len({*own}) == len(own) else ()}
        by_module = self._weights_reason()
        mask = kernel_mask(given.get("attention_mask"), hidden, partial(made, 0), added, by_module=by_module, **shared)
        if encoder_hidden is None:
            return mask, given.get("encoder_attention_mask")
        return mask, kernel_mask(given.get("encoder_attention_mask"), encoder_hidden, partial(made, 1), added)

    def _weights_reason(self) -> str | None:
        requested = getattr(self.config, "output_attentions", False) or is_recording_inside_layers()
        return "attention weights were requested" if requested else None

    def _prepare_layers(self, hidden: Tensor | None, implementation: str) -> dict[nn.Module, Any] | None:
        """The prepared layers if only fast classes will see the masks of this call, else None."""
        if hidden is None or implementation_reason(implementation) or tensor_reason(hidden):
            return None
        device = hidden.device
        context = CallContext(global_state(), hidden.shape[-1], device, autocast_dtype(device.type))
        return prepare_layers(self, _LAYERS, _ATTENTIONS, partial(prepare, context=context))


_LAYERS = (stock.BertLayer, BertLayer)
_ATTENTIONS = (BertSelfAttention, BertCrossAttention)


class _StockMasks:
    """The masks that stock makes for a call, made on first use."""

    def __init__(self, make: Callable[[], tuple[Any, Any]]) -> None:
        self._make = make
        self._masks: tuple[Any, Any] | None = None

    def masks(self) -> tuple[Any, Any]:
        if self._masks is None:
            self._masks = self._make()
        return self._masks

    def __call__(self, index: int) -> Any:
        return self.masks()[index]


# transformers looks up by class which outputs a model can record, and registers a class when a model of it is made.
getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {}).setdefault(str(BertModel), getattr(BertModel, "_can_record_outputs", None))
