"""BertEmbeddings: three gathers, their sum, LayerNorm and dropout in one kernel."""

import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertEmbeddings

from fastbert import ops
from fastbert.dispatch import is_plain, refused, run, tensor_reason
from fastbert.layers.parts import dropout_reason, layernorm_dtype, layernorm_reason

_IDS = (torch.int64, torch.int32)


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    return _reason_of_parts(module, words=True) or _position_reason(module)


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


def _position_reason(module: nn.Module) -> str | None:
    """Asked once, when the model is patched: the kernel counts positions itself and does not read them in the buffer."""
    positions = getattr(module, "position_ids", None)
    if positions is None or positions.is_meta or isinstance(positions, torch._subclasses.FakeTensor):
        return None
    counted = torch.arange(positions.numel(), device=positions.device).expand_as(positions)
    return None if torch.equal(positions, counted) else "position_ids of its own"


class FastBertEmbeddings(BertEmbeddings):
    """BertEmbeddings on the embedding_layernorm kernel."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        given = input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length
        if refused(self, self._reason(*given)):
            return super().forward(*given)
        seqlen = (inputs_embeds if input_ids is None else input_ids).shape[1]
        if token_type_ids is None and hasattr(self, "token_type_ids"):
            if position_ids is None:
                token_type_ids = self.token_type_ids[:, past_key_values_length : past_key_values_length + seqlen]
            else:
                token_type_ids = self.token_type_ids.expand(position_ids.shape[0], -1).gather(1, position_ids)
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
            offset=0 if position_ids is not None else past_key_values_length,
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
        past: int,
    ) -> str | None:
        if (ids is None) == (inputs_embeds is None):
            return "both of input_ids and inputs_embeds, or neither"
        reason = _reason_of_parts(self, words=ids is not None)
        if reason is not None:
            return reason
        words = self.word_embeddings.weight if ids is not None else inputs_embeds
        parameters = (self.position_embeddings.weight, self.token_type_embeddings.weight)
        reason = tensor_reason(words, *parameters, self.LayerNorm.weight, self.LayerNorm.bias)
        return reason or self._ids_reason(words, ids, token_type_ids, position_ids, past)

    def _ids_reason(
        self, words: Tensor, ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None, past: int
    ) -> str | None:
        shape = words.shape[:-1] if ids is None else ids.shape
        width = self.LayerNorm.normalized_shape[0]
        tables = (words, self.position_embeddings.weight, self.token_type_embeddings.weight)
        if len(shape) != 2 or any(table.shape[-1] != width for table in tables):
            return "shapes that do not fit"
        for given in (ids, token_type_ids, position_ids):
            if given is None:
                continue
            if type(given) is not Tensor and not torch.compiler.is_compiling():
                return f"{type(given).__name__} is not a plain tensor"
            if given.dtype not in _IDS or given.device != words.device:
                return f"ids of {given.dtype} on {given.device}"
            if given.shape not in (shape, (1, shape[1])):
                return "shapes that do not fit"
        if position_ids is None:
            if isinstance(past, Tensor):
                return "a number of cached tokens on the device"
            if past + shape[1] > min(self.position_ids.shape[1], self.position_embeddings.num_embeddings):
                return "more tokens than positions"
        return None
