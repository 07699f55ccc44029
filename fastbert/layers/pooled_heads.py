"""Fast classes of the heads that read only the pooled first position; they tell their encoder so.

A head passes a `Reading` down to its encoder as a keyword, which stock passes on. An encoder under `unpad="auto"` packs only
for such a call: `model.bert(...)` called by other code, a hook in between or a request for hidden states sees every
position. The classes have stock's names, by which `save_pretrained`, pipelines and Trainer look classes up.
"""

from functools import wraps
from typing import Any

from torch import nn

from fastbert.layers.encoder import packs_unseen
from fastbert.layers.reading import Reading
from fastbert.layers.stock import stock_class, subclass, untested


def _reading_first(name: str) -> type[nn.Module]:
    stock = stock_class(name)

    @wraps(stock.forward)  # keeps the signature, by which Trainer chooses columns
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if untested(name) is None and packs_unseen(self):
            kwargs["reading"] = Reading(None, alone=True)
        return stock.forward(self, *args, **kwargs)

    return subclass(name, __name__, forward=forward, READS_FIRST=True)


BertForSequenceClassification = _reading_first("BertForSequenceClassification")
BertForNextSentencePrediction = _reading_first("BertForNextSentencePrediction")
BertForMultipleChoice = _reading_first("BertForMultipleChoice")
