"""A stock model over flattened batches: all tokens in one row, no padding, FlashAttention-2 told where sequences end.

This is what sentence-transformers and a padding-free data collator do with `attn_implementation="flash_attention_2"`. That
package need not be here: torch holds the same kernel, with dropout and a backward. Batches are flattened once, by the
collator, so that costs the lane no time. Heads that read the first position of each sequence are given those rows, which
nobody's flattened BERT offers yet.
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
BY_TOKEN = ("mlm", "ner")  # heads that give a row for each token and so run as they are
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
    """One row of all tokens, [1, heads, T, D], as transformers hands it to an attention; without a GPU by SDPA, a sequence
    at a time, so that a dry run checks the rest."""
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
    """A batch in one row: what the model takes, where sequences begin, and which positions of the batch are tokens.

    Made on the host, as a collator makes it.
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
        inputs |= {"cu_seq_lens_q": ends.int().to(device), "max_length_q": int(lengths.max())}
        return Flat(ids, inputs, ends[:-1].to(device), real.flatten().nonzero()[:, 0].to(device))


class Flattened(nn.Module):
    """`model` called with padded batches, which it sees flattened; made once for each batch, which is kept."""

    def __init__(self, model: nn.Module, head: str) -> None:
        super().__init__()
        if head not in BY_TOKEN + BY_SEQUENCE:
            raise Absent(f"no flattened form of the head {head}")
        self._orig_mod = model  # as torch.compile's wrapper calls it: the check then finds the parameters by their names
        self.config, self.head = model.config, head
        self.kept: dict[int, Flat] = {}

    def flat(self, batch: dict[str, Tensor]) -> Flat:
        key = id(batch["input_ids"])
        if key not in self.kept:
            self.kept[key] = Flat.of(batch)
        return self.kept[key]

    def forward(self, **batch: Tensor) -> Any:
        """The model's own output, its rows those of all tokens; for a head by sequence that of the padded batch."""
        flat = self.flat(batch)
        if self.head in BY_TOKEN:
            return self._orig_mod(**flat.inputs)
        model, labels = self._orig_mod, batch.get("labels")
        hidden = model.bert(**flat.inputs).last_hidden_state
        pooled = model.bert.pooler(hidden[0, flat.starts][:, None])
        logits = model.classifier(model.dropout(pooled))
        return SequenceClassifierOutput(loss=None if labels is None else F.cross_entropy(logits, labels), logits=logits)


def padded(results: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results by token as a padded batch would have them, zeros where there is none; the others as they are."""
    index, shape = Flat.of(batch).index, batch["input_ids"].shape

    def spread(x: Tensor) -> Tensor:
        if x.shape[:2] != (1, len(index)):
            return x
        out = x.new_zeros(shape.numel(), *x.shape[2:])
        return out.index_copy(0, index, x[0]).view(*shape, *x.shape[2:])

    return {name: x if name.startswith("gradient of") else spread(x) for name, x in results.items()}
