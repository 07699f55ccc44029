"""Fast classes of embeddings: three gathers, their sum, LayerNorm and dropout in one kernel.

The buffer `position_ids` is honoured. The kernel counts positions itself only while the buffer holds 0, 1, 2, ..., which is
checked once, and again when the buffer is replaced or written to. Under torch.compile the buffer is always read.

RoBERTa computes its positions from the ids, by stock's own functions. ERNIE may add a fourth row, the same for all tokens: the
kernel gets it as part of the table of types. DistilBERT has no types.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.weak import WeakTensorKeyDictionary

from fastbert import ops
from fastbert.dispatch import FastModule, class_forward_replaced, falls_back, is_plain, is_plain_tensor, run, tensor_reason
from fastbert.layers import stock
from fastbert.layers.deferred_embeddings import DeferredEmbeddings, given
from fastbert.layers.family import BERT, DISTILBERT, ELECTRA, ERNIE, LIKE_ROBERTA
from fastbert.layers.packing import Rows
from fastbert.layers.parts import UNKNOWN_ARGUMENTS, bind_arguments, dropout_reason, layernorm_dtype, layernorm_reason

_IDS = (torch.int64, torch.int32)


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return _reason_of_parts(module, words=True)


def _reason_of_parts(module: nn.Module, words: bool) -> str | None:
    reason = _embedding_reason("word_embeddings", module.word_embeddings) if words else None
    reason = reason or _embedding_reason("position_embeddings", module.position_embeddings)
    if (types := module._modules.get("token_type_embeddings", _NONE)) is not _NONE:
        reason = reason or _embedding_reason("token_type_embeddings", types)
        if reason is None and types.padding_idx is not None:
            reason = "token_type_embeddings with a padding row"
    reason = reason or layernorm_reason(module.LayerNorm) or dropout_reason(module.dropout)
    if reason is None and not 0.0 <= module.dropout.p <= 1.0:
        return f"a dropout of {module.dropout.p}"
    return reason


def _embedding_reason(name: str, embedding: nn.Module) -> str | None:
    # The weight's type is checked at each call (tensor_reason): FSDP2 shards the tables and gathers them for the call.
    # Gradient checkpointing hooks word_embeddings so that its output requires a gradient, which is a no-op if the table
    # requires one.
    weight = getattr(embedding, "weight", None)
    idle = "make_inputs_require_grads" if getattr(weight, "requires_grad", False) else None
    if not is_plain(embedding, nn.Embedding, idle):
        return f"{name} is a {type(embedding).__name__}, or has hooks"
    if embedding.sparse:
        return f"{name} with sparse gradients"
    if embedding.max_norm is not None:
        return f"{name} with max_norm"
    return f"{name} with scale_grad_by_freq" if embedding.scale_grad_by_freq else None


_NONE = object()
_PARTS = {
    "word_embeddings": nn.Embedding,
    "position_embeddings": nn.Embedding,
    "token_type_embeddings": nn.Embedding,
    "LayerNorm": nn.LayerNorm,
    "dropout": nn.Dropout,
}


def _reason_of_call(module: nn.Module, words: bool) -> str | None:
    """The result of `_reason_of_parts`, in a quarter of its time if it is None; runs at each call."""
    parts = module._modules
    if torch.compiler.is_compiling() or not _are_plain(parts):
        return _reason_of_parts(module, words)
    word, position, type_ = (parts[name] for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"))
    usual = (
        not (word.sparse or position.sparse or type_.sparse)
        and not (word.scale_grad_by_freq or position.scale_grad_by_freq or type_.scale_grad_by_freq)
        and word.max_norm is position.max_norm is type_.max_norm is None
        and type_.padding_idx is None
        and 0.0 <= parts["dropout"].p <= 1.0
    )
    norm = parts["LayerNorm"]
    vectors, shape = norm._parameters, norm.normalized_shape
    usual = usual and vectors.get("weight") is not None and vectors.get("bias") is not None
    return None if usual and len(shape) == 1 and shape[0] <= ops.MAX_WIDTH else _reason_of_parts(module, words)


def _are_plain(parts: dict[str, nn.Module | None]) -> bool:
    """Whether `is_plain` holds for all parts."""
    for name, cls in _PARTS.items():
        part = parts.get(name)
        if (
            type(part) is not cls
            or part._forward_hooks
            or part._forward_pre_hooks
            or part._backward_hooks
            or part._backward_pre_hooks
            or "forward" in part.__dict__
        ):
            return False
    return not (_has_any_global_hook() or any(map(class_forward_replaced, (nn.Embedding, nn.LayerNorm, nn.Dropout))))


# Per buffer: its version when it was inspected, and what was found.
_counts_from_zero: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # whether it holds 0, 1, 2, ...
_is_zero: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # whether it holds zeros


def _inspect(buffer: Tensor, found: WeakTensorKeyDictionary, holds: Callable[[Tensor], bool]) -> bool | None:
    """holds(buffer), computed when the buffer is first seen and again after a write to it; None if it cannot be read now."""
    if torch.compiler.is_compiling() or not is_plain_tensor(buffer) or buffer.is_meta or buffer.is_inference():
        return None
    known = found.get(buffer)
    if known is None or known[0] != buffer._version:
        if buffer.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        known = found[buffer] = buffer._version, holds(buffer)
    return known[1]


def _counted(positions: Tensor) -> bool:
    return torch.equal(positions.view(-1), torch.arange(positions.shape[-1], device=positions.device, dtype=positions.dtype))


def _zero(types: Tensor) -> bool:
    return not types.any()


def types_reason(model: nn.Module) -> str | None:
    """Why the tokens of a call without token_type_ids may have another type than 0, or None; `model` has embeddings."""
    types = getattr(getattr(model, "embeddings", None), "token_type_ids", None)
    return None if types is None or _inspect(types, _is_zero, _zero) else "the model's own token_type_ids are not all 0"


def _position_reason(module: nn.Module) -> str | None:
    """Why the kernel must read the buffer `position_ids`, or None if it holds 0, 1, 2, ...

    The kernel then counts positions itself, and their gradients need no sorting.
    """
    found = _inspect(module.position_ids, _counts_from_zero, _counted)
    if found is None:
        return "position_ids whose values cannot be inspected"
    return None if found else "position_ids other than 0, 1, 2, ..."


def _tensor_reason(tensors: tuple[Tensor, ...]) -> str | None:
    """tensor_reason, called with one tensor if all have the same type, dtype and device."""
    first = tensors[0]
    kind, dtype, device = type(first), first.dtype, first.device
    alike = all(type(tensor) is kind and tensor.dtype is dtype and tensor.device == device for tensor in tensors)
    return tensor_reason(first) if alike else tensor_reason(*tensors)


class FastEmbeddings(FastModule):
    """Embeddings on the embedding_layernorm kernel."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        result = self._embed(input_ids, token_type_ids, position_ids, inputs_embeds, *_past(args, kwargs))
        if result is not None:
            return result
        return super().forward(input_ids, token_type_ids, given(position_ids), inputs_embeds, *args, **kwargs)

    def _embed(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | DeferredEmbeddings | None,
        inputs_embeds: Tensor | None,
        past: Any,
        reason: str | None,
    ) -> Tensor | None:
        """The embeddings by the kernel, or None if the call falls back. `reason`: why it must, if that is known."""
        deferred = position_ids if isinstance(position_ids, DeferredEmbeddings) else None
        inputs = input_ids, token_type_ids, given(position_ids), inputs_embeds
        tables: tuple[Tensor, ...] = ()
        if reason is None and (reason := _reason_of_call(self, input_ids is not None)) is None:
            tables, reason = self._tables(*inputs, past)
        if reason is None:
            token_type_ids, position_ids = self._ids(*inputs, past)
            reason = self._ids_reason(input_ids, token_type_ids, position_ids, inputs_embeds)
        if falls_back(self, reason):
            return None
        words, positions, types = tables[:3]
        dtype = words.dtype
        if not dtype == types.dtype == positions.dtype:
            dtype = torch.promote_types(torch.promote_types(dtype, types.dtype), positions.dtype)
        embed = partial(
            run,
            self,
            ops.embed,
            *tables,
            input_ids,
            token_type_ids,
            position_ids,
            past if position_ids is None else 0,
            None if input_ids is None else self.word_embeddings.padding_idx,
            self.position_embeddings.padding_idx,
            self.LayerNorm.eps,
            self.dropout.p if self.dropout.training else 0.0,
            layernorm_dtype(dtype, words.device.type),
        )
        if deferred is None or input_ids is None:
            return embed()
        deferred.embed = partial(_embed_rows, embed)
        return words.new_empty((), dtype=embed.args[-1]).expand(*input_ids.shape, words.shape[-1])

    def _tables(
        self,
        ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past: Any,
    ) -> tuple[tuple[Tensor, ...], str | None]:
        """The tables of words, positions and types, LayerNorm's weight and bias; or why no kernel takes them."""
        if (ids is None) == (inputs_embeds is None):
            return (), "both of input_ids and inputs_embeds, or neither"
        if (reason := stock.untested(self.STOCK)) is not None:
            return (), reason
        norm = self.LayerNorm
        words = self.word_embeddings.weight if ids is not None else inputs_embeds
        tables = words, self.position_embeddings.weight, self._types(), norm.weight, norm.bias
        fits = words.dim() == 3 if ids is None else ids.dim() == 2
        width = norm.normalized_shape
        if not fits or any(table.shape[-1:] != width for table in tables) or not tables[2].shape[0]:
            return (), "incompatible shapes"
        if position_ids is None and isinstance(past, Tensor):
            return (), "a cache length that is a tensor"
        return tables, _tensor_reason(tables)

    def _types(self) -> Tensor:
        """The table of types [N, H]."""
        return self.token_type_embeddings.weight

    def _ids(
        self,
        ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """token_type_ids and position_ids as stock would use them, read from the buffers if they are not given.

        position_ids is None if the kernel may count from `past`.
        """
        end = past + (inputs_embeds if ids is None else ids).shape[1]
        if position_ids is None and end <= self.position_embeddings.weight.shape[0] and _position_reason(self) is None:
            if token_type_ids is None and (types := getattr(self, "token_type_ids", None)) is not None:
                token_type_ids = types[:, past:end]
            return token_type_ids, None
        positions = self.position_ids[:, past:end] if position_ids is None else position_ids
        return self._types_at(positions) if token_type_ids is None else token_type_ids, positions

    def _types_at(self, positions: Tensor) -> Tensor | None:
        """The types of tokens at these positions, from the buffer. None (row 0 of the table) if that is missing or zero."""
        types = getattr(self, "token_type_ids", None)
        if types is None or _inspect(types, _is_zero, _zero):
            return None
        return types.expand(positions.shape[0], -1).gather(1, positions)

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
                return "incompatible shapes"
        return None


class _RobertaEmbeddings(FastEmbeddings):
    """RoBERTa's embeddings on the embedding_layernorm kernel: positions count from the padding token's id, and skip padding."""

    def _ids(
        self,
        ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        if position_ids is None and ids is not None:
            position_ids = self.create_position_ids_from_input_ids(ids, self.padding_idx, past)
        elif position_ids is None:
            position_ids = self.create_position_ids_from_inputs_embeds(inputs_embeds, self.padding_idx)
        return self._types_at(position_ids) if token_type_ids is None else token_type_ids, position_ids


class _DistilEmbeddings(FastEmbeddings):
    """DistilBERT's embeddings on the embedding_layernorm kernel: without types, which are a row of zeros for it."""

    def forward(self, input_ids: Tensor | None, inputs_embeds: Tensor | None = None, position_ids: Any = None) -> Tensor:
        result = self._embed(input_ids, None, position_ids, inputs_embeds, 0, None)
        if result is not None:
            return result
        return super(FastEmbeddings, self).forward(input_ids, inputs_embeds, given(position_ids))

    def _types(self) -> Tensor:
        words = self.word_embeddings.weight.detach()
        return words.new_zeros(1, words.shape[-1])


class _ErnieEmbeddings(FastEmbeddings):
    """ERNIE's embeddings on the embedding_layernorm kernel, with the row of the task that all tokens have by default."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        past, reason = _past(args, kwargs)
        if self.use_task_id:
            reason = reason or _embedding_reason("task_type_embeddings", self.task_type_embeddings)
            if task_type_ids is not None:
                reason = reason or "task_type_ids"
            elif self.task_type_embeddings.padding_idx is not None:
                reason = reason or "task_type_embeddings with a padding row"
        result = self._embed(input_ids, token_type_ids, position_ids, inputs_embeds, past, reason)
        if result is not None:
            return result
        ids = input_ids, token_type_ids, task_type_ids, given(position_ids)
        return super(FastEmbeddings, self).forward(*ids, inputs_embeds, *args, **kwargs)

    def _types(self) -> Tensor:
        types = self.token_type_embeddings.weight
        return types + self.task_type_embeddings.weight[0] if self.use_task_id else types


def _embed_rows(embed: Callable[..., Tensor], rows: Rows | None) -> Tensor:
    """The embeddings [B, S, H], or those of the given rows [1, N, H]."""
    if rows is None or rows.index is None:
        y = embed()
        return y if rows is None else y.view(1, -1, y.shape[-1])
    return embed(index=rows.index, inverse=rows.inverse)


_PAST = ("past_key_values_length", "cache_length")


def _past(args: tuple, kwargs: dict[str, Any]) -> tuple[Any, str | None]:
    """The number of cached tokens, under either of its names in transformers; or why the arguments are unknown."""
    if not args and not kwargs:
        return 0, None
    for name in _PAST:
        if not args and len(kwargs) == 1 and name in kwargs:
            return kwargs[name], None
        if (found := bind_arguments((name,), args, kwargs)) is not None:
            return found[0], None
    return 0, UNKNOWN_ARGUMENTS


FAST = {
    **stock.fast_classes("Embeddings", FastEmbeddings, __name__, families=[BERT, ELECTRA]),
    **stock.fast_classes("Embeddings", _RobertaEmbeddings, __name__, families=LIKE_ROBERTA),
    **stock.fast_classes("Embeddings", _ErnieEmbeddings, __name__, families=[ERNIE]),
    **stock.fast_classes("Embeddings", _DistilEmbeddings, __name__, families=[DISTILBERT]),
}
globals().update(FAST)
