"""Makes random batches for the eight heads: token ids, segments, the mask of given lengths, labels."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbert.cli.tasks import TASKS

HEADS = tuple(name for name in TASKS if name != "base")
CHOICES = 2
MASKED = 0.15  # share of real positions with an MLM label
MODEL_INPUTS = ("input_ids", "token_type_ids", "attention_mask")
Batch = dict[str, Tensor]


def make(head: str, config: Any, lengths: Sequence[int], seqlen: int, seed: int, device: str, *, labels: bool = True) -> Batch:
    """A batch of len(lengths) sequences padded to `seqlen`, on `device`; pairs of choices for multiple choice.

    There is no mask if there is no padding, as from a data collator that packs full rows.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = list(lengths)
    random.Random(seed).shuffle(lengths)
    rows = len(lengths)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    sizes = torch.tensor(lengths)
    real = torch.arange(seqlen)[None, :] < sizes[:, None]
    batch = {
        "input_ids": integers(config.vocab_size, rows, seqlen).masked_fill(~real, config.pad_token_id),
        "token_type_ids": (torch.arange(seqlen)[None, :] >= sizes[:, None] // 2).long() * real,
    }
    if not bool(real.all()):
        batch["attention_mask"] = real.long()

    def chosen_labels() -> Tensor:
        chosen = (torch.rand(real.shape, generator=generator) < MASKED) & real
        chosen[:, 0] = True  # so that every batch has a label
        return batch["input_ids"].masked_fill(~chosen, -100)

    if head in ("mlm", "pretraining"):
        batch["labels"] = chosen_labels()
    if head == "clm":
        batch["labels"] = batch["input_ids"].masked_fill(~real, -100)
    if head == "pretraining":
        batch["next_sentence_label"] = integers(2, rows)
    elif head == "nsp":
        batch["labels"] = integers(2, rows)
    elif head == "classification":
        batch["labels"] = integers(config.num_labels, rows)
    elif head == "multiple-choice":
        batch = {name: x.view(rows // CHOICES, CHOICES, seqlen) for name, x in batch.items()}
        batch["labels"] = integers(CHOICES, rows // CHOICES)
    elif head == "ner":
        batch["labels"] = integers(config.num_labels, rows, seqlen).masked_fill(~real, -100)
    elif head == "qa":
        batch["start_positions"] = (torch.rand(rows, generator=generator) * sizes).long()
        batch["end_positions"] = (torch.rand(rows, generator=generator) * sizes).long()
    return {name: tensor.to(device) for name, tensor in batch.items() if labels or name in MODEL_INPUTS}


def padding(batch: Batch) -> Tensor | None:
    """bool in the shape of input_ids, true at padded positions; None if there is no padding."""
    return batch["attention_mask"] == 0 if "attention_mask" in batch else None
