"""Makes batches: transformers' collators, masks that depend only on row and epoch, and a tally of all batches."""

import zlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy
import pyarrow
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

    def lengths(self) -> list[int]:
        """The real tokens of each row, of all its windows or endings together."""
        chunks = self.features.with_format("arrow")[:]["input_ids"].chunks
        return [length for chunk in chunks for length in _lengths(chunk)]

    @cached_property
    def longest(self) -> int:
        return max(self.lengths(), default=0)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """A row. With its number may come the length that it is padded to where that matters; otherwise that of the longest."""
        number, width = index if isinstance(index, tuple) else (index, self.longest)
        draw = zlib.crc32(f"{self.seed} {self.epoch} {number}".encode())
        return self.features[number] | {"draw": draw, "width": width}


def _lengths(ids: Any) -> list[int]:
    """The numbers in each item of an Arrow array of lists, or of lists of lists."""
    ends = numpy.arange(len(ids) + 1)
    while pyarrow.types.is_list(ids.type):
        ends, ids = ids.offsets.to_numpy()[ends], ids.values
    return numpy.diff(ends).tolist()


class Collator:
    """A task's collator that records the real tokens of each batch and a checksum of the model's inputs.

    A span's loss is over all positions, padding too. So rows with spans are padded to their width, on every rank alike; others
    to the longest of them.
    """

    def __init__(self, task: str, tokenizer: Any, windows: Windows | None = None, whole_words: bool = False) -> None:
        self.masking = Masking(tokenizer, whole_words) if task in ("mlm", "pretraining") else None
        self.plain = None if self.masking else COLLATORS.get(task, DataCollatorWithPadding)(tokenizer)
        if windows is not None:
            self.plain = windows.collate
        self.spans = DataCollatorWithPadding(tokenizer, padding="max_length") if task == "qa" else None
        self.tokens: list[int] = []  # of each batch
        self.checksums: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        draws, widths = ([row.pop(name) for row in rows] for name in ("draw", "width"))
        if self.spans is not None:
            self.spans.max_length = max(widths)
            batch = dict(self.spans(rows))
        else:
            batch = dict(self.masking(rows, draws) if self.masking else self.plain(rows))
        self.tokens.append(int(batch["attention_mask"].sum()))
        self.checksums.append(checksum(batch))
        return batch


def checksum(batch: Mapping[str, Any]) -> int:
    """The sum of a number for the content of each row, without padding: the same for the same rows in any order and parts."""
    values = {name: numpy.asarray(batch[name]) for name in sorted(batch) if name != "lengths"}  # of windows: in the mask
    mask = values["attention_mask"].astype(bool)
    ends = numpy.cumsum(values["windows"]) if "windows" in values else numpy.arange(1, len(mask) + 1)
    total = start = 0
    for row, end in enumerate(ends):
        own = 0
        for value in values.values():
            of_tokens = value.shape[: mask.ndim] == mask.shape
            content = value[start:end][mask[start:end]] if of_tokens else value[row] if len(value) == len(ends) else ()
            own = zlib.crc32(numpy.ascontiguousarray(content).tobytes(), own)
        total += own
        start = end
    return total


def _causal(tokenizer: Any) -> Collate:
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


COLLATORS: dict[str, Callable[[Any], Collate]] = {
    "ner": DataCollatorForTokenClassification,
    "multiple-choice": DataCollatorForMultipleChoice,
    "clm": _causal,
}
