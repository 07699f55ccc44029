"""Defines the tasks of `fastbert verify` and `fastbert report`: BERT's nine classes and their like, each with real text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import BertConfig, PreTrainedTokenizerFast
from transformers.models.bert import modeling_bert as bert

from fastbert.errors import InputError
from fastbert.layers.family import ELECTRA, FAMILIES, Family

Batch = dict[str, Tensor]


class Texts:
    """Lines of text and a tokenizer, from which tasks make batches that are padded to the longest row.

    Raises:
        InputError: the tokenizer lacks a token that padding or masking needs.
    """

    def __init__(self, tokenizer: Any, lines: Sequence[str], batch_size: int, max_length: int) -> None:
        if tokenizer.pad_token_id is None:
            raise InputError("MODEL: its tokenizer has no padding token; set tokenizer.pad_token and save it again")
        self.tokenizer = tokenizer
        self.lines = [lines[i % len(lines)] for i in range(2 * batch_size)]
        self.batch_size = batch_size
        self.max_length = max_length
        self.generator = torch.Generator().manual_seed(0)

    def encode(self, first: list[str], second: list[str] | None = None) -> Batch:
        encoded = self.tokenizer(first, second, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "token_type_ids", "attention_mask") if name in encoded}

    def singles(self) -> Batch:
        return self.encode(self.lines[: self.batch_size])

    def pairs(self) -> Batch:
        return self.encode(self.lines[: self.batch_size], self.lines[self.batch_size :])

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def masked(self, batch: Batch) -> Batch:
        """`batch` with 15 % of the real positions replaced by [MASK] and labelled; all others are labelled -100."""
        if self.tokenizer.mask_token_id is None:
            raise InputError("MODEL: its tokenizer has no mask token, which masking needs; choose other tasks with --task")
        real = batch["attention_mask"].bool()
        chosen = (torch.rand(real.shape, generator=self.generator) < 0.15) & real
        chosen[:, 1] = True  # every row has a label
        labels = batch["input_ids"].masked_fill(~chosen, -100)
        masked = batch["input_ids"].masked_fill(chosen, self.tokenizer.mask_token_id)
        return batch | {"input_ids": masked, "labels": labels}


def _base(texts: Texts, _: BertConfig) -> Batch:
    return texts.singles()


def _pretraining(texts: Texts, _: BertConfig) -> Batch:
    return texts.masked(texts.pairs()) | {"next_sentence_label": texts.integers(2, texts.batch_size)}


def _clm(texts: Texts, _: BertConfig) -> Batch:
    batch = texts.singles()
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def _mlm(texts: Texts, _: BertConfig) -> Batch:
    return texts.masked(texts.singles())


def _nsp(texts: Texts, _: BertConfig) -> Batch:
    return texts.pairs() | {"labels": texts.integers(2, texts.batch_size)}


def _classification(texts: Texts, config: BertConfig) -> Batch:
    if config.problem_type == "multi_label_classification":
        labels = texts.integers(2, texts.batch_size, config.num_labels).float()
    elif config.problem_type == "regression" or config.num_labels == 1:
        labels = texts.integers(10, texts.batch_size, config.num_labels).float()
    else:
        labels = texts.integers(config.num_labels, texts.batch_size)
    return texts.singles() | {"labels": labels}


def _multiple_choice(texts: Texts, _: BertConfig) -> Batch:
    contexts = [line for line in texts.lines[: texts.batch_size] for _ in range(2)]
    batch = texts.encode(contexts, texts.lines)
    shaped = {name: tensor.view(texts.batch_size, 2, -1) for name, tensor in batch.items()}
    return shaped | {"labels": texts.integers(2, texts.batch_size)}


def _ner(texts: Texts, config: BertConfig) -> Batch:
    batch = texts.singles()
    labels = texts.integers(config.num_labels, *batch["input_ids"].shape)
    return batch | {"labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def _qa(texts: Texts, _: BertConfig) -> Batch:
    batch = texts.pairs()
    shortest = int(batch["attention_mask"].sum(1).min())
    start = texts.integers(shortest, texts.batch_size)
    return batch | {"start_positions": start, "end_positions": (start + 2).clamp(max=shortest - 1)}


@dataclass(frozen=True)
class Task:
    """BERT's class, the function that makes its batch, and what its config needs.

    parts: the names of the class in the families, without their prefixes.
    """

    name: str
    model_class: type
    batch: Callable[[Texts, BertConfig], Batch]
    config: dict[str, Any]
    parts: tuple[str, ...] = ()

    def class_for(self, config: Any) -> type | None:
        """The class of this task in the family of `config`, or None if the family or the installed release has none."""
        family = family_of_config(config)
        if family is None or (self.name == "pretraining" and family is ELECTRA):  # which trains a discriminator
            return None
        return next((cls for part in self.parts if (cls := family.find(part)) is not None), None)


def family_of_config(config: Any) -> Family | None:
    """The family of models with this config, or None."""
    return next((family for family in FAMILIES if model_type_of(family) == config.model_type), None)


def model_type_of(family: Family) -> str | None:
    """transformers' name for a family in its configs; None if the installed release lacks it."""
    model = family.find("Model")
    return None if model is None else model.config_class.model_type


_EVERY = (
    ("base", "BertModel", _base, {}),
    ("pretraining", "BertForPreTraining", _pretraining, {}),
    ("clm", "BertLMHeadModel", _clm, {"is_decoder": True}, ("LMHeadModel", "ForCausalLM")),
    ("mlm", "BertForMaskedLM", _mlm, {}),
    ("nsp", "BertForNextSentencePrediction", _nsp, {}),
    ("classification", "BertForSequenceClassification", _classification, {}),
    ("multiple-choice", "BertForMultipleChoice", _multiple_choice, {}),
    ("ner", "BertForTokenClassification", _ner, {}),
    ("qa", "BertForQuestionAnswering", _qa, {"num_labels": 2}),
)
# A transformers release may lack one of the classes; the tasks of the others remain.
TASKS = {
    name: Task(name, getattr(bert, model_class), batch, config, *(parts or [(model_class.removeprefix("Bert"),)]))
    for name, model_class, batch, config, *parts in _EVERY
    if hasattr(bert, model_class)
}


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        InputError: the installed transformers lacks its class.
    """
    if name not in TASKS:
        missing = next(model_class for known, model_class, *_ in _EVERY if known == name)
        raise InputError(f"--task {name}: transformers {transformers.__version__} has no {missing}")
    return TASKS[name]


def word_tokenizer(lines: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is the words of `lines`, for the small random model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import BertProcessing

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    split = Whitespace()
    words = sorted({word for line in lines for word, _ in split.pre_tokenize_str(line)})
    vocabulary = {word: index for index, word in enumerate(special + words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
