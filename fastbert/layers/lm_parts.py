"""Where a head with a language model's loss keeps its transform and its decoder, in the families that keep them alike."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fastbert.dispatch import hooked
from fastbert.layers.family import DISTILBERT, ELECTRA, LIKE_ROBERTA, Family
from fastbert.layers.prediction_head import distil_parts, transform_of, transformed
from fastbert.layers.stock import part_of
from fastbert.wrapped import MARKS

IGNORED = -100


@dataclass(frozen=True)
class LMParts:
    """The parts of a head.

    decoder: the product that gives the logits.
    transform: transform(head, hidden states), the rows before the decoder [..., H].
    reason: why other code would see, or miss, that these are called instead of the head's modules; or None.
    """

    decoder: Callable[[nn.Module], nn.Linear]
    transform: Callable[[nn.Module, Tensor], Tensor]
    reason: Callable[[nn.Module], str | None]


def lm_parts_of(family: Family) -> LMParts:
    """The parts of the heads of a family."""
    if family in LIKE_ROBERTA:
        return _LIKE_ROBERTA
    return {ELECTRA: _ELECTRA, DISTILBERT: _DISTILBERT}.get(family, _LIKE_BERT)


def _reason_of_cls(head: nn.Module) -> str | None:
    heads = head.cls
    if part_of(type(heads)).part not in ("OnlyMLMHead", "PreTrainingHeads") or hooked(heads):
        return f"its head is a {type(heads).__name__}, or has hooks"
    predictions = heads.predictions
    if part_of(type(predictions)).part != "LMPredictionHead" or hooked(predictions):
        return f"its prediction head is a {type(predictions).__name__}, or has hooks"
    return _reason_of_transform(head, predictions.transform)


def _reason_of_lm_head(head: nn.Module) -> str | None:
    """RoBERTa's: one module holds transform and decoder, and its call is replaced."""
    found = head.lm_head
    if part_of(type(found)).part == "LMHead" and not hooked(found):
        return None
    return f"its head is a {type(found).__name__}, or has hooks"


def _reason_of_transform(head: nn.Module, transform: nn.Module) -> str | None:
    """Why the transform may not be called for the labelled rows only. It is only without logits."""
    if not getattr(head, "WITHOUT_LOGITS", False):
        return None
    if part_of(type(transform)).part in ("PredictionHeadTransform", "GeneratorPredictions") and not hooked(transform):
        return None
    return f"its transform is a {type(transform).__name__}, or has hooks"


_LOSS = nn.CrossEntropyLoss()


def _reason_of_distilbert(head: nn.Module) -> str | None:
    """DistilBERT's head has its parts, and a loss, as modules of its own."""
    loss = head.mlm_loss_fct
    if any(hooked(part) for part in distil_parts(head) if isinstance(part, nn.Module)):
        return "its head has hooks"
    if type(loss) is not nn.CrossEntropyLoss or hooked(loss) or vars(loss).keys() - MARKS != vars(_LOSS).keys():
        return f"its loss is a {type(loss).__name__}, or has hooks"
    if (loss.weight, loss.ignore_index, loss.reduction, loss.label_smoothing) != (None, IGNORED, "mean", 0.0):
        return "its loss has weights, or other settings"
    return None


_LIKE_BERT = LMParts(
    lambda head: head.cls.predictions.decoder, lambda head, hidden: head.cls.predictions.transform(hidden), _reason_of_cls
)
_LIKE_ROBERTA = LMParts(
    lambda head: head.lm_head.decoder, lambda head, hidden: transform_of(head.lm_head, hidden), _reason_of_lm_head
)
_ELECTRA = LMParts(
    lambda head: head.generator_lm_head,
    lambda head, hidden: head.generator_predictions(hidden),
    lambda head: _reason_of_transform(head, head.generator_predictions),
)
_DISTILBERT = LMParts(
    lambda head: head.vocab_projector,
    lambda head, hidden: transformed(head, *distil_parts(head), hidden),
    _reason_of_distilbert,
)
