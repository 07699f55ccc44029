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
from fastbert.layers.embeddings import Embeddings
from fastbert.layers.layer_state import CallContext, global_state, prepare
from fastbert.layers.masks import KernelMask, kernel_mask, masks_replaced, prepare_layers


class Model(FastModule):
    """A model that makes masks for the kernels and defers its embeddings until a packing encoder knows its rows."""

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
            and isinstance(embeddings, Embeddings)
            and not hasattr(self, "embeddings_project")  # between embeddings and encoder, in a small ELECTRA
            and not torch.compiler.is_compiling()
            and not hooked(embeddings)
            and not hooked(encoder)
            and "_create_attention_masks" not in vars(self)
            and not kwargs.get("debug_io")  # transformers would log the inputs of every module
            and stock.untested(self.STOCK) is None
            and not masks_replaced(self.PART.family)
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


FAST = stock.fast_classes("Model", Model, __name__)
globals().update(FAST)

# transformers looks up by class which outputs a model can record, and registers a class when a model of it is made.
for _cls in FAST.values():
    getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {}).setdefault(str(_cls), getattr(_cls, "_can_record_outputs", None))
