"""Fast classes of the heads that read only the first position of each sequence; they tell their encoder so.

A head passes a `Reading` down to its encoder as a keyword, which stock passes on. An encoder under `unpad="auto"` packs only
for such a call: the model inside the head called by other code, a hook in between or a request for hidden states sees every
position. The classes have stock's names, by which `save_pretrained`, pipelines and Trainer look classes up.

The position is read by the model's pooler, or by a module of the head that gets the whole output (`_reader`).
"""

from functools import partialmethod, wraps
from typing import Any

from torch import nn

from fastbert.dispatch import hooked
from fastbert.layers.encoder import packs_unseen
from fastbert.layers.family import ELECTRA, FAMILIES, LIKE_ROBERTA, Family
from fastbert.layers.reading import Reading
from fastbert.layers.stock import part_of, subclass, untested

PARTS = ("ForSequenceClassification", "ForNextSentencePrediction", "ForMultipleChoice")
_DENSE_HEAD, _SUMMARY = ("classifier", "ClassificationHead"), ("sequence_summary", "SequenceSummary")


def _reader(family: Family, part: str) -> tuple[str, str] | None:
    """The attribute and the part of the module in a head that reads the encoder's output; None if the pooler does."""
    if part == "ForSequenceClassification" and family in (*LIKE_ROBERTA, ELECTRA):
        return _DENSE_HEAD
    return _SUMMARY if part == "ForMultipleChoice" and family is ELECTRA else None


def _reads_first(head: nn.Module, reader: tuple[str, str] | None) -> bool:
    """Whether nothing in `head` sees more of its encoder's output than the first position of each sequence."""
    if reader is not None:
        attribute, part = reader
        reader = getattr(head, attribute)
        if hooked(reader) or not all(_is_reader(module, part) for module in _wrapped(reader)):
            return False
    return packs_unseen(head)


def _is_reader(module: nn.Module, part: str) -> bool:
    return part_of(type(module)).part == part and not hooked(module) and getattr(module, "summary_type", "first") == "first"


def _wrapped(module: nn.Module) -> list[nn.Module]:
    """The modules of which PEFT calls one in place of a module that is trained beside an adapter; else the module itself."""
    if type(module).__name__ != "ModulesToSaveWrapper" or not type(module).__module__.startswith("peft."):
        return [module]
    return [module.original_module, *module.modules_to_save.values()]


def _reading_first(family: Family, part: str) -> type[nn.Module]:
    stock, reader = family[part], _reader(family, part)

    @wraps(stock.forward)  # keeps the signature, by which Trainer chooses columns
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if untested(stock.__name__) is None and _reads_first(self, reader):
            kwargs["reading"] = Reading(None, alone=True)
        return stock.forward(self, *args, **kwargs)

    return subclass(family, part, __name__, forward=forward, reads_first=partialmethod(_reads_first, reader))


FAST = {
    cls.__name__: cls
    for cls in (_reading_first(family, part) for family in FAMILIES for part in PARTS if family.find(part) is not None)
}
globals().update(FAST)
