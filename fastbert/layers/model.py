"""Fast classes of BertModel and its like: they pass a `KernelMask` to layers if only kernels see it, and defer embeddings.

No value on the device is read to make the mask. The classes have stock's names, by which `save_pretrained`, pipelines and
Trainer look classes up.
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
from fastbert.layers.capturing import is_recording_inside_layers
from fastbert.layers.deferred_embeddings import AcceptsDeferredEmbeddings, DeferredEmbeddings
from fastbert.layers.embeddings import FastEmbeddings
from fastbert.layers.family import DISTILBERT, LIKE_BERT
from fastbert.layers.layer_state import CallContext, global_state, prepare
from fastbert.layers.masks import CarriedMask, KernelMask, kernel_mask, masks_replaced, prepare_layers
from fastbert.wrapped import sharded_part


class Model(FastModule):
    """A model that makes masks for the kernels and defers its embeddings until a packing encoder knows its rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) <= 3 and self._may_defer(kwargs):  # position_ids would be the fourth
            kwargs["position_ids"] = DeferredEmbeddings(kwargs.get("position_ids"))
        return super().forward(*args, **kwargs)

    def _may_defer(self, kwargs: dict[str, Any]) -> bool:
        """Whether only fast classes and tested stock code see what the embeddings return."""
        encoder, embeddings = self._modules[self.PART.family.encoder], self.embeddings
        return (
            isinstance(encoder, AcceptsDeferredEmbeddings)
            and encoder.may_pack(kwargs)
            and isinstance(embeddings, FastEmbeddings)
            and not hasattr(self, "embeddings_project")  # between embeddings and encoder, in a small ELECTRA
            and not torch.compiler.is_compiling()
            and not hooked(embeddings)
            and not hooked(encoder)
            and "_create_attention_masks" not in vars(self)
            and not kwargs.get("debug_io")  # transformers would log the inputs of every module
            and stock.untested(self.STOCK) is None
            and not masks_replaced(self.PART.family.path)
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
        mask = self._mask(given.get("attention_mask"), hidden, partial(made, 0), known, implementation)
        if encoder_hidden is None:
            return mask, given.get("encoder_attention_mask")
        added = implementation == "eager"
        return mask, kernel_mask(given.get("encoder_attention_mask"), encoder_hidden, partial(made, 1), added)

    def _mask(
        self, given: Any, hidden: Tensor, made: Callable[[], Any], known: dict[nn.Module, Any], implementation: str
    ) -> KernelMask:
        """The KernelMask of self-attention for the caller's mask; `known` are the prepared layers."""
        own = self._modules[self.PART.family.encoder].layer
        shared = {"prepared": known, "layers": tuple(known) if len({*own}) == len(own) else ()}
        return kernel_mask(given, hidden, made, implementation == "eager", by_module=self._weights_reason(), **shared)

    def _weights_reason(self) -> str | None:
        requested = getattr(self.config, "output_attentions", False) or is_recording_inside_layers()
        return "attention weights were requested" if requested else None

    def _prepare_layers(self, hidden: Tensor | None, implementation: str) -> dict[nn.Module, Any] | None:
        """The prepared layers if only fast classes will see the masks of this call, else None."""
        if hidden is None or implementation_reason(implementation) or tensor_reason(hidden):
            return None
        device = hidden.device
        context = CallContext(global_state(self), hidden.shape[-1], device, autocast_dtype(device.type))
        return prepare_layers(self, partial(prepare, context=context))


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


class DistilModel(Model):
    """DistilBERT, which makes its masks inside its forward: a KernelMask passes through that as a CarriedMask.

    Under torch.compile it makes its own masks and runs padded.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if (mask := self._carried_mask(input_ids, attention_mask, inputs_embeds)) is not None:
            deferred = None
            if input_ids is not None and self._may_defer(kwargs):
                position_ids = deferred = DeferredEmbeddings(position_ids)
            attention_mask = CarriedMask.of(mask, deferred)
        return super(Model, self).forward(input_ids, attention_mask, inputs_embeds, position_ids, **kwargs)

    def _carried_mask(self, ids: Tensor | None, mask: Any, embeds: Tensor | None) -> KernelMask | None:
        """The KernelMask of the call if only kernels will see it."""
        words = self.embeddings.word_embeddings.weight  # a shard of any shape, if an engine gathers it for the embeddings
        if (ids is None) == (embeds is None) or torch.compiler.is_compiling():
            return None
        if self.config._attn_implementation == "eager" and sharded_part(self.embeddings) is not None:
            return None  # stock's mask is in the dtype of what the embeddings return, which only the engine knows
        hidden = embeds
        if ids is not None:
            hidden = torch.empty((), dtype=words.dtype, device=words.device).expand(*ids.shape, self.config.dim)
        implementation = self.config._attn_implementation or "eager"
        known = self._prepare_layers(hidden, implementation)
        if known is None:
            return None
        make = self.PART.family.module.create_bidirectional_mask
        made = _StockMasks(lambda: (make(self.config, hidden, mask),))
        return self._mask(mask, hidden, partial(made, 0), known, implementation)


FAST = {
    **stock.fast_classes("Model", Model, __name__, families=LIKE_BERT),
    **stock.fast_classes("Model", DistilModel, __name__, families=[DISTILBERT]),
}
globals().update(FAST)

# transformers looks up by class which outputs a model can record, and registers a class when a model of it is made.
for _cls in FAST.values():
    getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {}).setdefault(str(_cls), getattr(_cls, "_can_record_outputs", None))
