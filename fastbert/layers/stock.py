"""Looks up transformers' stock classes, makes fast subclasses of them, and lists the code that each fast class replaces."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers.loss import loss_utils

from fastbert import forwards
from fastbert.dispatch import FastModule, kind_of
from fastbert.layers.family import BERT, DISTILBERT, ELECTRA, FAMILIES, LIKE_ROBERTA, Family
from fastbert.wrapped import base_of

Function = TypeVar("Function", bound=Callable[..., Any])


class Part(NamedTuple):
    """What a stock or fast class is: which part of which family."""

    family: Family
    part: str
    fast: bool


_NONE = Part(BERT, "", False)
_parts: dict[type, Part] = {}


def part_of(cls: type) -> Part:
    """The part that `cls`, a stock or a fast class, is; one with an empty name for any other class.

    A class that FSDP2 has put over a stock or fast one is the same part.
    """
    return _parts.get(cls) or _parts.get(base_of(cls), _NONE)


def family_of(module: nn.Module) -> Family:
    """The family of a module with a stock or a fast class."""
    own = getattr(type(module), "PART", None)
    return (own or part_of(kind_of(module))).family


def stock_class(name: str) -> type[nn.Module]:
    """The stock class of this name, or an empty class if the release lacks it."""
    family = next(family for family in FAMILIES if family.part(name))
    return family[family.part(name)]


def subclass(
    family: Family, part: str, module: str, namespace: str = "", mixins: tuple[type, ...] = (), **members: Any
) -> type[nn.Module]:
    """A subclass of a stock class with the same name, by which `save_pretrained`, pipelines and Trainer look classes up.

    Args:
        family, part: the stock class.
        module, namespace: the module (and the class in it) that holds the subclass, for pickle.
        mixins: base classes before the stock class.
        members: the attributes of the class, beside STOCK, the name of the stock class, and PART, what the class is.
    """
    stock = family[part]
    name = stock.__name__
    found = {"__module__": module, "__qualname__": f"{namespace}.{name}" if namespace else name}
    found |= {"STOCK": name, "PART": Part(family, part, True)}
    cls = type(name, (*mixins, stock), found | members)
    _parts[cls] = cls.PART
    return cls


def fast_classes(
    part: str, mixin: type, module: str, namespace: str = "", families: Iterable[Family] = FAMILIES, **members: Any
) -> dict[str, type[nn.Module]]:
    """The fast classes, by name, that `mixin` makes of this part in each family that has it.

    BERT's is always there: over an empty class, if the release lacks the stock class.
    """
    made = {}
    for family in families:
        if family is BERT or family.find(part) is not None:
            forward = fast_forward_of(family[part])(mixin.forward)
            cls = subclass(family, part, module, namespace, (mixin,), __doc__=mixin.__doc__, forward=forward, **members)
            made[cls.__name__] = cls
    return made


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


def _functions(family: Family, *parts: str, name: str = "forward") -> tuple[forwards.Pair, ...]:
    """The function `name` of each of these parts."""
    return tuple((family[part], name) for part in parts)


def _code_of_distilbert() -> dict[str, tuple[forwards.Pair, ...]]:
    of = partial(_functions, DISTILBERT)
    eager = (DISTILBERT.module, "eager_attention_forward")
    ffn = (*of("FFN"), *of("FFN", name="ff_chunk"))
    layer = (*of("Layer", "SelfAttention"), *ffn, eager)
    code = {
        "Embeddings": of("Embeddings"),
        "SelfAttention": (*of("SelfAttention"), eager),
        "FFN": ffn,
        "Layer": layer,
        "Encoder": (*of("Encoder"), *layer),
        "Model": (*of("Model", "Encoder"), *layer),
        "ForSequenceClassification": of("ForSequenceClassification", "Model"),
        "ForMultipleChoice": of("ForMultipleChoice", "Model"),
        "ForMaskedLM": of("ForMaskedLM", "Model"),
    }
    return {DISTILBERT.name(part): pairs for part, pairs in code.items()}


def _code_of(family: Family) -> dict[str, tuple[forwards.Pair, ...]]:
    """The functions that the fast classes of a family replace or rely on, per name of the stock class."""
    if family is DISTILBERT:
        return _code_of_distilbert()
    of = partial(_functions, family)
    # Eager attention is looked up in the family's module. BERT's is checked by calls that use it (implementation_reason).
    eager = () if family is BERT else ((family.module, "eager_attention_forward"),)
    layers = of("Encoder", "Layer", "Attention")
    chunk = of("Layer", name="feed_forward_chunk")
    inside = of("SelfAttention", "SelfOutput", "Intermediate", "Output")
    masks = of("Model", name="_create_attention_masks")
    causal = tuple((loss_utils, name) for name in ("ForCausalLMLoss", "fixed_cross_entropy"))
    pooled = of("Model") if family is ELECTRA else of("Model", "Pooler")  # what is between an encoder and a head
    embeddings = of("Embeddings")
    if family in LIKE_ROBERTA:
        for name in ("create_position_ids_from_input_ids", "create_position_ids_from_inputs_embeds"):
            embeddings += of("Embeddings", name=name)
        lm_head = of("LMHead")
    elif family is ELECTRA:
        lm_head = of("GeneratorPredictions")
    else:
        lm_head = of("LMPredictionHead", "PredictionHeadTransform")
    dense_head = of("ClassificationHead") if family.find("ClassificationHead") else ()
    summary = of("SequenceSummary") if family.find("SequenceSummary") else ()
    lm = (*pooled, *lm_head)
    only = of("OnlyMLMHead") if family.find("OnlyMLMHead") else ()
    code = {
        **{part: (*of(part), *eager) for part in ("CrossAttention", "SelfAttention")},
        **{part: of(part) for part in ("SelfOutput", "Intermediate", "Output")},
        **{
            part: of(part) for part in ("PredictionHeadTransform", "LMHead", "GeneratorPredictions", "DiscriminatorPredictions")
        },
        "Embeddings": embeddings,
        "Encoder": (*layers, *chunk),
        "Layer": (*inside, *eager, *layers[1:], *chunk),
        "Model": (*of("Model"), *masks, *layers),
        "ForSequenceClassification": (*of("ForSequenceClassification"), *pooled, *dense_head),
        "ForNextSentencePrediction": (*of("ForNextSentencePrediction"), *pooled, *of("OnlyNSPHead")),
        "ForMultipleChoice": (*of("ForMultipleChoice"), *pooled, *summary),
        "ForMaskedLM": (*of("ForMaskedLM"), *lm, *only),
        "LMHeadModel": (*of("LMHeadModel"), *lm, *only, *causal),
        "ForCausalLM": (*of("ForCausalLM"), *lm, *only, *causal),
    }
    if family is not ELECTRA:  # whose ForPreTraining is another one: it has a discriminator
        code["ForPreTraining"] = (*of("ForPreTraining"), *lm, *of("PreTrainingHeads"))
    others = ("LMHead", "GeneratorPredictions", "DiscriminatorPredictions", "ForCausalLM")  # which BERT has in no release
    has = {part for part in code if (part not in others if family is BERT else family.find(part) is not None)}
    return {family.prefix + part: pairs for part, pairs in code.items() if part in has}


_FAMILIES_HERE = tuple(family for family in FAMILIES if family.module is not None)
for _family in _FAMILIES_HERE:
    for _name, _cls in vars(_family.module).items():
        if isinstance(_cls, type) and _cls.__module__ == _family.module.__name__ and _family.part(_name):
            _parts[_cls] = Part(_family, _family.part(_name), False)

# The functions that must be tested ones, per name of the stock class whose fast class depends on them.
CODE = {name: forwards.Code(*pairs) for family in _FAMILIES_HERE for name, pairs in _code_of(family).items()}
CODE["eager attention"] = forwards.Code((BERT.module, "eager_attention_forward"))


@torch.compiler.assume_constant_result
def untested(name: str) -> str | None:
    """Why the fast class for the stock class `name` must not replace the current code of transformers, or None."""
    return CODE[name].untested()


def covered() -> tuple[forwards.Pair, ...]:
    """All functions of CODE that the installed release has; the table of digests covers these."""
    return tuple(dict.fromkeys(pair for code in CODE.values() for pair in code.pairs if hasattr(*pair)))
