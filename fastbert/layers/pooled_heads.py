"""Heads that read the pooled first position and return nothing else of their encoder's output: they say so to it.

Each is named as its stock class, which `save_pretrained`, pipelines and Trainer look up by name.
"""

from functools import wraps
from typing import Any

from torch import nn
from transformers.models.bert import modeling_bert as bert

from fastbert.layers.encoder import packs_unseen
from fastbert.layers.reading import Reading


def _reading_first(stock: type[nn.Module]) -> Any:
    @wraps(stock.forward)  # with its signature: Trainer chooses columns by it
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if packs_unseen(self):
            kwargs["reading"] = Reading(None, alone=True)
        return stock.forward(self, *args, **kwargs)

    return forward


class BertForSequenceClassification(bert.BertForSequenceClassification):
    forward = _reading_first(bert.BertForSequenceClassification)


class BertForNextSentencePrediction(bert.BertForNextSentencePrediction):
    forward = _reading_first(bert.BertForNextSentencePrediction)


class BertForMultipleChoice(bert.BertForMultipleChoice):
    forward = _reading_first(bert.BertForMultipleChoice)


def unsupported(module: nn.Module) -> str | None:
    """Why `module` must stay stock, or None."""
    return None
