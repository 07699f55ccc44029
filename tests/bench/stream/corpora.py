"""For the tests of the stream: corpora whose words are numbered, each one token that occurs once, so that rows tell where
their tokens come from."""

from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bench.stream.loader import Loader
from bench.stream.masking import IGNORED, Batch
from bench.stream.source import open_stream

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
Document = list[str]
State = dict[str, object]


def numbers_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """The token of word w7 is 7 behind the special ones."""
    vocabulary = [*SPECIAL.values(), *(f"w{number}" for number in range(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def make_documents(count: int, seed: int = 0, sentences: int = 8, words: int = 12) -> list[Document]:
    """Documents of two sentences or more, of numbered words."""
    drawn = numpy.random.default_rng(seed)
    number, found = 0, []
    for _ in range(count):
        document = []
        for length in drawn.integers(1, words + 1, drawn.integers(2, sentences + 1)):
            document.append(" ".join(f"w{number + i}" for i in range(length)))
            number += length
        found.append(document)
    return found


def words_of(documents: list[Document]) -> list[int]:
    return [int(word[1:]) for document in documents for sentence in document for word in sentence.split()]


def write(folder: Path, documents: list[Document], shards: int) -> list[str]:
    """The documents in so many text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        text = "\n".join("".join(f"{sentence}\n" for sentence in document) for document in documents[shard::shards])
        (folder / f"{shard:02d}.txt").write_text(text)
    return [str(folder)]


def make_stream(data, tokenizer, task="mlm", **options):
    """A stream of small rows, batches and blocks."""
    return open_stream(data, tokenizer, task, **{"max_length": 24, "batch": 8, "readers": 4, "block": 600} | options)


def take(loader: Loader, count: int) -> list[Batch]:
    return [batch for _, batch in zip(range(count), loader, strict=False)]


def rows_of(batch: Batch) -> Iterator[dict[str, list[int]]]:
    """Every row of a batch without padding, what was masked put back."""
    ids = torch.where(batch["labels"] == IGNORED, batch["input_ids"], batch["labels"])
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        columns = {"ids": ids[i, :length], "types": batch["token_type_ids"][i, :length]}
        row = {name: value.tolist() for name, value in columns.items()}
        yield row | {"random": batch["next_sentence_label"][i].item()} if "next_sentence_label" in batch else row


def equal(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def joined(parts: list[Batch]) -> list[tuple[object, ...]]:
    """The rows of the same batch on several ranks, whatever their order and padding."""
    found = []
    for batch in parts:
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            values = [value[i] for value in batch.values()]
            found.append(tuple(tuple(value[:length].tolist()) if value.dim() else value.item() for value in values))
    return sorted(found)
