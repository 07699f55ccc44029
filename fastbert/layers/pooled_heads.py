"""Heads that read the pooled first position and return nothing else of their encoder's output: they say so to it.

Each is named as its stock class, which `save_pretrained`, pipelines and Trainer look up by name.
"""

from functools import wraps
from typing import Any

from torch import nn

from fastbert.layers.encoder import packs_unseen
from fastbert.layers.reading import Reading
from fastbert.layers.stock import stock_class, untested


def _reading_first(stock: type[nn.Module]) -> Any:
    @wraps(stock.forward)  # with its signature: Trainer chooses columns by it
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if untested(stock.__name__) is None and packs_unseen(self):
            kwargs["reading"] = Reading(None, alone=True)
        return stock.forward(self, *args, **kwargs)

    return forward


class BertForSequenceClassification(stock_class("BertForSequenceClassification")):
    forward = _reading_first(stock_class("BertForSequenceClassification"))


class BertForNextSentencePrediction(stock_class("BertForNextSentencePrediction")):
    forward = _reading_first(stock_class("BertForNextSentencePrediction"))


class BertForMultipleChoice(stock_class("BertForMultipleChoice")):
    forward = _reading_first(stock_class("BertForMultipleChoice"))
