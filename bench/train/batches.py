"""Makes batches: transformers' collators, masks that depend only on row and epoch, and a tally of all batches."""

import zlib
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from bench.stream.masking import Masking
from fastbert import Windows

Batch = dict[str, Tensor]
Collate = Callable[[list[dict[str, Any]]], Batch]


class Rows(torch.utils.data.Dataset):
    """Encoded rows, each with a seed for its masks that depends only on run seed, epoch and row.

    Stock and fastbert consume torch's generator differently for dropout, and a resumed run skips batches that it has seen.
    Masks drawn from that generator would therefore differ.
    """

    def __init__(self, features: Dataset, seed: int, kept: tuple[str, ...]) -> None:
        self.features = features.select_columns([name for name in features.column_names if name in kept])
        # Not set through accelerate's set_epoch, which is not called in the first epoch of a resumed run.
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = zlib.crc32(f"{self.seed} {self.epoch} {index}".encode())
        return self.features[index] | {"draw": draw}


class Collator:
    """A task's collator that records the real tokens of each batch and a checksum of the model's inputs."""

    def __init__(self, task: str, tokenizer: Any, windows: Windows | None = None) -> None:
        self.masking = Masking(tokenizer) if task in ("mlm", "pretraining") else None
        self.plain = None if self.masking else COLLATORS.get(task, DataCollatorWithPadding)(tokenizer)
        if windows is not None:
            self.plain = windows.collate
        self.tokens: list[int] = []
        self.checksums: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        draws = [row.pop("draw") for row in rows]
        batch = dict(self.masking(rows, draws) if self.masking else self.plain(rows))
        self.tokens.append(int(batch["attention_mask"].sum()))
        checksum = 0
        for name in sorted(batch):
            value = batch[name]
            content = value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
            checksum = zlib.crc32(content, checksum)
        self.checksums.append(checksum)
        return batch


def _causal(tokenizer: Any) -> Collate:
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


COLLATORS: dict[str, Callable[[Any], Collate]] = {
    "ner": DataCollatorForTokenClassification,
    "multiple-choice": DataCollatorForMultipleChoice,
    "clm": _causal,
}
