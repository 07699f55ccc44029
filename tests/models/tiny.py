"""Tiny BERTs for every class and loss, and a batch for each. They leave torch's generators unchanged."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedConfig
from transformers.models.bert import modeling_bert as bert

from fastbert.testing.rows import DEVICE

VOCABULARY = 61
ROWS = 2
LENGTH = 9
HEADS = 2
CHOICES = 2

# For float32 in a batch of another shape (packed, or in other forwards): products and kernels add in another order.
ANOTHER_ORDER = {"rtol": 1e-4, "atol": 1e-5}

Batch = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A model class, with one of the three losses for sequence classification."""

    name: str
    cls: type[nn.Module]
    labels: Callable[[int], dict[str, Tensor]]  # for sequences of this length
    config: dict[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = (ROWS,)
    config_class: type[PreTrainedConfig] = BertConfig

    def __str__(self) -> str:
        return self.name


def _integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def _token_labels(high: int, length: int) -> Tensor:
    labels = _integers(high, ROWS, length)
    labels[:, ::3] = -100
    return labels


_PROBLEM = "problem_type"
BASE = Kind("base", bert.BertModel, lambda length: {})
MLM = Kind("mlm", bert.BertForMaskedLM, lambda length: {"labels": _token_labels(VOCABULARY, length)})
CLM = Kind(
    "clm",
    bert.BertLMHeadModel,
    lambda length: {"labels": _token_labels(VOCABULARY, length)},
    {"is_decoder": True},
)
CLASSIFICATION = Kind(
    "single-label",
    bert.BertForSequenceClassification,
    lambda length: {"labels": _integers(3, ROWS)},
    {"num_labels": 3, _PROBLEM: "single_label_classification"},
)
KINDS = (
    BASE,
    Kind(
        "pretraining",
        bert.BertForPreTraining,
        lambda length: {"labels": _token_labels(VOCABULARY, length), "next_sentence_label": _integers(2, ROWS)},
    ),
    CLM,
    MLM,
    Kind("next-sentence", bert.BertForNextSentencePrediction, lambda length: {"labels": _integers(2, ROWS)}),
    Kind(
        "regression",
        bert.BertForSequenceClassification,
        lambda length: {"labels": torch.randn(ROWS)},
        {"num_labels": 1, _PROBLEM: "regression"},
    ),
    CLASSIFICATION,
    Kind(
        "multi-label",
        bert.BertForSequenceClassification,
        lambda length: {"labels": _integers(2, ROWS, 3).float()},
        {"num_labels": 3, _PROBLEM: "multi_label_classification"},
    ),
    Kind(
        "multiple-choice",
        bert.BertForMultipleChoice,
        lambda length: {"labels": _integers(CHOICES, ROWS)},
        rows=(ROWS, CHOICES),
    ),
    Kind(
        "token-classification",
        bert.BertForTokenClassification,
        lambda length: {"labels": _token_labels(3, length)},
        {"num_labels": 3},
    ),
    Kind(
        "question-answering",
        bert.BertForQuestionAnswering,
        lambda length: {"start_positions": _integers(length, ROWS), "end_positions": _integers(length, ROWS)},
    ),
)


def config(config_class: type[PreTrainedConfig] = BertConfig, **overrides: Any) -> PreTrainedConfig:
    """A config with two layers, widths that are not powers of two, and no dropout."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": 56,
        "max_position_embeddings": 24,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
    }
    return config_class(**settings | overrides)


def make(
    kind: Kind = MLM, dtype: torch.dtype = torch.float32, attention: str = "eager", seed: int = 0, **overrides: Any
) -> nn.Module:
    """A stock model in eval mode. No parameter is 0 or 1, which would hide a kernel that ignores it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = kind.cls(config(kind.config_class, **kind.config | overrides))
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model.set_attn_implementation(attention)
    return model.to(DEVICE, dtype).eval()


def make_batch(kind: Kind = MLM, mask: str = "right", seed: int = 1, labels: bool = True, length: int = LENGTH) -> Batch:
    """Token ids, segments, a mask (a key of `MASKS`) and, if the class has a loss, labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = (*kind.rows, length)
        batch: Batch = {
            "input_ids": torch.randint(1, VOCABULARY, shape),
            "token_type_ids": torch.randint(2, shape),
            "attention_mask": make_mask(mask, shape),
        }
        if labels:
            batch |= kind.labels(length)
    return {name: tensor.to(DEVICE) for name, tensor in batch.items() if tensor is not None}


# "4-D" is the additive form that reaches attention unchanged, with a different hole for every query.
MASKS = ("none", "right", "left", "holes", "one token", "4-D")


def make_mask(kind: str, shape: tuple[int, ...]) -> Tensor | None:
    mask = torch.ones(shape, dtype=torch.long)
    if kind == "none":
        return None
    if kind == "right":
        mask[1:, ..., -3:] = 0
    elif kind == "left":
        mask[1:, ..., :3] = 0
    elif kind == "holes":
        mask[..., 1::3] = 0
    elif kind == "one token":
        mask[1:, ..., 1:] = 0
    else:
        assert kind == "4-D", kind
        seen = torch.rand(*shape[:-1], 1, shape[-1], shape[-1]) < 0.7
        seen |= torch.eye(shape[-1], dtype=torch.bool)
        return torch.zeros(seen.shape).masked_fill(~seen, -1e4)
    return mask
