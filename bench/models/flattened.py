"""Runs a stock model over flattened batches: all tokens in one row without padding, with sequence bounds for FlashAttention-2.

sentence-transformers and DataCollatorWithFlattening do this with `attn_implementation="flash_attention_2"`, which is a lane
where flash-attn or its build for `kernels` is there. Everywhere else torch has the same kernel, with dropout and a backward:
`NAME`. Batches are flattened once, as by a collator, outside the timed region. Heads that read the first position of each
sequence get those rows, which transformers' flattened BERT does not offer.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_outputs import SequenceClassifierOutput

from bench.core.peers import Absent

NAME = "flattened"
BY_TOKEN = ("mlm", "ner")  # heads with one output row per token, which need no change
BY_SEQUENCE = ("classification",)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over one row of all tokens, [1, heads, T, D], with transformers' signature. Without a GPU it calls SDPA for
    one sequence at a time, so that a dry run checks the rest."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if query.is_cuda:
        ends = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        out = torch.ops.aten._flash_attention_forward(q, k, v, *ends, dropout, False, False, scale=scaling)[0]
        return out[None], None
    sizes = cu_seq_lens_q.diff().tolist()
    pieces = zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
    rows = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in one), None, dropout, scale=scaling) for one in pieces]
    return torch.cat([row.transpose(0, 1) for row in rows])[None], None


AttentionInterface.register(NAME, attend)


@dataclass(frozen=True)
class Flat:
    """A batch in one row: the model's inputs, the start of each sequence, and the positions of the batch that are tokens.

    Built on the host, as by a collator.
    """

    source: Tensor
    inputs: dict[str, Any]
    starts: Tensor
    index: Tensor

    @staticmethod
    def of(batch: dict[str, Tensor]) -> "Flat":
        ids, device = batch["input_ids"], batch["input_ids"].device
        mask = batch.get("attention_mask")
        real = torch.ones(ids.shape, dtype=torch.bool) if mask is None else mask.cpu().bool()
        lengths = real.sum(1)
        ends = F.pad(lengths.cumsum(0), (1, 0))
        by_token = {name: batch[name] for name in ("input_ids", "token_type_ids")}
        by_token["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape)
        if "labels" in batch and batch["labels"].shape == ids.shape:
            by_token["labels"] = batch["labels"]
        inputs: dict[str, Any] = {name: x.cpu()[real][None].to(device) for name, x in by_token.items()}
        bounds, longest = ends.int().to(device), int(lengths.max())
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        return Flat(ids, inputs, ends[:-1].to(device), real.flatten().nonzero()[:, 0].to(device))


class Flattened(nn.Module):
    """Takes padded batches and calls `model` with flattened ones. Each batch is flattened once and kept."""

    def __init__(self, model: nn.Module, head: str) -> None:
        super().__init__()
        if head not in BY_TOKEN + BY_SEQUENCE:
            raise Absent(f"no flattened form of the head {head}")
        self._orig_mod = model  # the attribute of torch.compile's wrapper, by which the check finds parameters by name
        self.config, self.head = model.config, head
        self.kept: dict[int, Flat] = {}

    def flat(self, batch: dict[str, Tensor]) -> Flat:
        key = id(batch["input_ids"])
        if key not in self.kept:
            self.kept[key] = Flat.of(batch)
        return self.kept[key]

    def forward(self, **batch: Tensor) -> Any:
        """The model's output with one row per token; for a head over sequences, the output of the padded batch."""
        flat = self.flat(batch)
        if self.head in BY_TOKEN:
            return self._orig_mod(**flat.inputs)
        model, labels = self._orig_mod, batch.get("labels")
        hidden = model.bert(**flat.inputs).last_hidden_state
        pooled = model.bert.pooler(hidden[0, flat.starts][:, None])
        logits = model.classifier(model.dropout(pooled))
        return SequenceClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def padded(results: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results per token scattered into padded shape, with zeros at padding; other results unchanged."""
    index, shape = Flat.of(batch).index, batch["input_ids"].shape

    def spread(x: Tensor) -> Tensor:
        if x.shape[:2] != (1, len(index)):
            return x
        out = x.new_zeros(shape.numel(), *x.shape[2:])
        return out.index_copy(0, index, x[0]).view(*shape, *x.shape[2:])

    return {name: x if name.startswith("gradient of") else spread(x) for name, x in results.items()}
