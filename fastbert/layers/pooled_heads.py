"""Heads that read the pooled first position and return nothing else of their encoder's output: they say so to it.

Each is named as its stock class, which `save_pretrained`, pipelines and Trainer look up by name.
"""

from functools import wraps
from typing import Any

from torch import nn

from fastbert.layers.encoder import packs_unseen
from fastbert.layers.reading import Reading
from fastbert.layers.stock import stock_class, subclass, untested


def _reading_first(name: str) -> type[nn.Module]:
    stock = stock_class(name)

    @wraps(stock.forward)  # with its signature: Trainer chooses columns by it
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if untested(name) is None and packs_unseen(self):
            kwargs["reading"] = Reading(None, alone=True)
        return stock.forward(self, *args, **kwargs)

    return subclass(name, __name__, forward=forward)


BertForSequenceClassification = _reading_first("BertForSequenceClassification")
BertForNextSentencePrediction = _reading_first("BertForNextSentencePrediction")
BertForMultipleChoice = _reading_first("BertForMultipleChoice")
