"""BertEmbeddings: three gathers, their sum, LayerNorm and dropout in one kernel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastbert import ops
from fastbert.dispatch import Replicated, is_plain, is_plain_tensor, refused, run, tensor_reason
from fastbert.layers import stock
from fastbert.layers.parts import OTHER_ARGUMENTS, dropout_reason, given, layernorm_dtype, layernorm_reason

_IDS = (torch.int64, torch.int32)


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return _reason_of_parts(module, words=True)


def _reason_of_parts(module: nn.Module, words: bool) -> str | None:
    reason = _embedding_reason("word_embeddings", module.word_embeddings) if words else None
    for name in ("position_embeddings", "token_type_embeddings"):
        reason = reason or _embedding_reason(name, getattr(module, name))
        if reason is None and getattr(module, name).padding_idx is not None:
            reason = f"{name} with a padding row"
    return reason or layernorm_reason(module.LayerNorm) or dropout_reason(module.dropout)


def _embedding_reason(name: str, embedding: nn.Module) -> str | None:
    # What the weight is, is asked at each call (tensor_reason): FSDP2 shards the tables, and gathers them for the call.
    # Gradient checkpointing hooks the words so that their rows require a gradient: of a table that does, they do.
    weight = getattr(embedding, "weight", None)
    idle = "make_inputs_require_grads" if getattr(weight, "requires_grad", False) else None
    if not is_plain(embedding, nn.Embedding, idle):
        return f"{name} is a {type(embedding).__name__}, or has hooks"
    if embedding.sparse:
        return f"{name} with sparse gradients"
    if embedding.max_norm is not None:
        return f"{name} with max_norm"
    return f"{name} with scale_grad_by_freq" if embedding.scale_grad_by_freq else None


# By a buffer: its version when it was looked at, and whether it counts from 0.
_counting: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _position_reason(module: nn.Module) -> str | None:
    """Why the kernel must read the buffer `position_ids`; None where it holds 0, 1, 2, ..., so that the kernel can count for
    itself, and the gradient of a position needs no sorting. Looked at once, and again when it was replaced or written to."""
    positions = module.position_ids
    if torch.compiler.is_compiling() or not is_plain_tensor(positions) or positions.is_meta or positions.is_inference():
        return "position_ids that cannot be looked at"
    known = _counting.get(positions)
    if known is None or known[0] != positions._version:
        if positions.is_cuda and torch.cuda.is_current_stream_capturing():
            return "position_ids that cannot be looked at"
        counted = torch.arange(positions.shape[-1], device=positions.device, dtype=positions.dtype)
        known = _counting[positions] = positions._version, torch.equal(positions.view(-1), counted)
    return None if known[1] else "position_ids of its own"


class BertEmbeddings(Replicated, stock.BertEmbeddings):
    """BertEmbeddings on the embedding_layernorm kernel."""

    @stock.fast_forward_of(stock.BertEmbeddings)
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        inputs = input_ids, token_type_ids, position_ids, inputs_embeds
        past, reason = _past(args, kwargs)
        if reason is None and (reason := self._reason(*inputs, past)) is None:
            token_type_ids, position_ids = self._ids(*inputs, past)
            reason = self._ids_reason(input_ids, token_type_ids, position_ids, inputs_embeds)
        if refused(self, reason):
            return super().forward(*inputs, *args, **kwargs)
        words = self.word_embeddings.weight if input_ids is not None else inputs_embeds
        positions, types = self.position_embeddings.weight, self.token_type_embeddings.weight
        dtype = torch.promote_types(torch.promote_types(words.dtype, types.dtype), positions.dtype)
        return run(
            self,
            ops.embedding_layernorm,
            words,
            positions,
            types,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            ids=input_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            offset=past if position_ids is None else 0,
            padding_idx=None if input_ids is None else self.word_embeddings.padding_idx,
            eps=self.LayerNorm.eps,
            p=self.dropout.p if self.dropout.training else 0.0,
            out_dtype=layernorm_dtype(dtype, words.device.type),
        )

    def _reason(
        self,
        ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past: Any,
    ) -> str | None:
        if (ids is None) == (inputs_embeds is None):
            return "both of input_ids and inputs_embeds, or neither"
        reason = stock.untested("BertEmbeddings") or _reason_of_parts(self, words=ids is not None)
        if reason is not None:
            return reason
        words = self.word_embeddings.weight if ids is not None else inputs_embeds
        tables = (words, self.position_embeddings.weight, self.token_type_embeddings.weight)
        fits = words.dim() == 3 if ids is None else ids.dim() == 2
        if not fits or any(table.shape[-1] != self.LayerNorm.normalized_shape[0] for table in tables):
            return "shapes that do not fit"
        if position_ids is None and isinstance(past, Tensor):
            return "a number of cached tokens on the device"
        return tensor_reason(*tables, self.LayerNorm.weight, self.LayerNorm.bias)

    def _ids(
        self,
        ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The ids that stock would take, from the buffers where none were given; no position ids: counted from `past`."""
        end = past + (inputs_embeds if ids is None else ids).shape[1]
        positions = self.position_ids[:, past:end] if position_ids is None else position_ids
        fits = end <= self.position_embeddings.num_embeddings
        counted = position_ids is None and fits and _position_reason(self) is None
        if token_type_ids is None and hasattr(self, "token_type_ids"):
            types = self.token_type_ids
            token_type_ids = types[:, past:end] if counted else types.expand(positions.shape[0], -1).gather(1, positions)
        return token_type_ids, None if counted else positions

    def _ids_reason(
        self, ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, inputs_embeds: Tensor | None
    ) -> str | None:
        like = ids if inputs_embeds is None else inputs_embeds
        shape = like.shape[:2]
        for tensor in (ids, token_type_ids, position_ids):
            if tensor is None:
                continue
            if type(tensor) is not Tensor and not torch.compiler.is_compiling():
                return f"{type(tensor).__name__} is not a plain tensor"
            if tensor.dtype not in _IDS or tensor.device != like.device:
                return f"ids of {tensor.dtype} on {tensor.device}"
            if tensor.shape not in (shape, (1, shape[1])):
                return "shapes that do not fit"
        return None


def _past(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, str | None]:
    """How many tokens the cache holds, by either of the names that releases have for it; or why this is another forward."""
    if not args and not kwargs:
        return 0, None
    for name in ("past_key_values_length", "cache_length"):
        if (found := given((name,), args, kwargs)) is not None:
            return found[0], None
    return 0, OTHER_ARGUMENTS
