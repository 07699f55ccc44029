"""Looks up the stock BERT classes of the installed transformers, and the code that each fast class replaces.

A release may lack or rename a class of an older one. A missing class is replaced by an empty one that no module has, so
that importing fastbert never fails because of it.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.loss import loss_utils
from transformers.models.bert import modeling_bert as bert

from fastbert import forwards
from fastbert.dispatch import FastModule

Function = TypeVar("Function", bound=Callable[..., Any])


def stock_class(name: str) -> type[nn.Module]:
    """transformers' BERT class of this name, or an empty class if the release lacks it."""
    return getattr(bert, name, None) or type(name, (nn.Module,), {"__module__": bert.__name__})


def subclass(name: str, module: str, namespace: str = "", mixins: tuple[type, ...] = (), **members: Any) -> type[nn.Module]:
    """A subclass of stock's `name` with the same name, by which `save_pretrained`, pipelines and Trainer look classes up.

    Args:
        name: the name of the stock class.
        module, namespace: the module (and the class in it) that holds the subclass, for pickle.
        mixins: base classes before the stock class.
        members: the attributes of the class.
    """
    found = {"__module__": module, "__qualname__": f"{namespace}.{name}" if namespace else name}
    return type(name, (*mixins, stock_class(name)), found | members)


def fast_forward_of(cls: type[nn.Module]) -> Callable[[Function], Function]:
    """Decorator of a fast forward: gives it the signature of the stock class `cls`.

    A user's wrapper may keep the fast forward after the module is unpatched. It then calls the forward of the module's
    current class.
    """

    def decorate(forward: Function) -> Function:
        def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self, FastModule):
                return forward(self, *args, **kwargs)
            return type(self).forward(self, *args, **kwargs)

        called.__signature__ = inspect.signature(cls.forward)
        return called

    return decorate


BertAttention = stock_class("BertAttention")
BertCrossAttention = stock_class("BertCrossAttention")
BertEmbeddings = stock_class("BertEmbeddings")
BertEncoder = stock_class("BertEncoder")
BertIntermediate = stock_class("BertIntermediate")
BertLayer = stock_class("BertLayer")
BertModel = stock_class("BertModel")
BertOutput = stock_class("BertOutput")
BertPooler = stock_class("BertPooler")
BertPredictionHeadTransform = stock_class("BertPredictionHeadTransform")
BertSelfAttention = stock_class("BertSelfAttention")
BertSelfOutput = stock_class("BertSelfOutput")

_FORWARDS = (
    "BertCrossAttention",
    "BertEmbeddings",
    "BertIntermediate",
    "BertOutput",
    "BertPredictionHeadTransform",
    "BertSelfAttention",
    "BertSelfOutput",
)
_LAYERS = tuple((cls, "forward") for cls in (BertEncoder, BertLayer, BertAttention))
_PACKED = (*_LAYERS, (BertLayer, "feed_forward_chunk"))
_READ = ((BertModel, "forward"), (BertPooler, "forward"))
_INSIDE = tuple((cls, "forward") for cls in (BertSelfAttention, BertSelfOutput, BertIntermediate, BertOutput))
_MLM = (*_READ, *((stock_class(name), "forward") for name in ("BertLMPredictionHead", "BertPredictionHeadTransform")))
_CAUSAL = tuple((loss_utils, name) for name in ("ForCausalLMLoss", "fixed_cross_entropy"))


def _head(name: str, *more: tuple) -> tuple:
    return ((stock_class(name), "forward"), *more)


_CODE = {name: ((stock_class(name), "forward"),) for name in _FORWARDS} | {
    "eager attention": ((bert, "eager_attention_forward"),),
    "BertEncoder": _PACKED,
    "BertLayer": (*_INSIDE, *_LAYERS[1:], (BertLayer, "feed_forward_chunk")),
    "BertModel": ((BertModel, "forward"), (BertModel, "_create_attention_masks"), *_LAYERS),
    "BertForSequenceClassification": _head("BertForSequenceClassification", *_READ),
    "BertForNextSentencePrediction": _head("BertForNextSentencePrediction", *_READ, *_head("BertOnlyNSPHead")),
    "BertForMultipleChoice": _head("BertForMultipleChoice", *_READ),
    "BertForMaskedLM": _head("BertForMaskedLM", *_MLM, *_head("BertOnlyMLMHead")),
    "BertForPreTraining": _head("BertForPreTraining", *_MLM, *_head("BertPreTrainingHeads")),
    "BertLMHeadModel": _head("BertLMHeadModel", *_MLM, *_head("BertOnlyMLMHead"), *_CAUSAL),
}


# The functions that must be tested ones, per name of the stock class whose fast class depends on them.
CODE = {name: forwards.Code(*pairs) for name, pairs in _CODE.items()}


@torch.compiler.assume_constant_result
def untested(name: str) -> str | None:
    """Why the fast class for the stock class `name` must not replace the current code of transformers, or None."""
    return CODE[name].untested()


def covered() -> tuple[forwards.Pair, ...]:
    """All functions of CODE that the installed release has; the table of digests covers these."""
    return tuple(dict.fromkeys(pair for code in CODE.values() for pair in code.pairs if hasattr(*pair)))
