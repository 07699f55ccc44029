"""The table of patchable modules: each stock class with its fast class, its kernel and the switch of `patch`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastbert import forwards, ops
from fastbert.dispatch import forward_replaced, kind_of
from fastbert.layers import (
    attention,
    embeddings,
    encoder,
    intermediate,
    layer,
    mlm_heads,
    model,
    pooled_heads,
    prediction_head,
    residual_norm,
    stock,
)
from fastbert.layers.stock import CODE, BertEncoder, BertPooler, stock_class


@dataclass(frozen=True)
class Entry:
    """A stock class and its fast subclass.

    stock, fast: the stock class, and the subclass that replaces it.
    kernel: the names of the ops that it launches, for the report; None if it launches nothing itself.
    switch: the argument of `patch` that controls it.
    unsupported: unsupported(module) is the reason why that module must stay stock, or None.
    switches: all the arguments that must be on, if there are several.
    """

    stock: type[nn.Module]
    fast: type[nn.Module]
    kernel: str | None
    switch: str
    unsupported: Callable[[nn.Module], str | None]
    switches: tuple[str, ...] = ()

    def wanted(self, switches: dict[str, Any]) -> Any:
        """The value of the switch; with several, whether all are on."""
        return all(switches[name] for name in self.switches) if self.switches else switches[self.switch]

    def disabled_switch(self, switches: dict[str, Any]) -> str:
        """The switch that is off."""
        return next((name for name in self.switches if not switches[name]), self.switch)

    def stock_reason(self, module: nn.Module, untested: bool = False) -> str | None:
        """Why a stock `module` would not use the kernel if it got the fast class, or None.

        With `untested`, the stock code need not be one that fastbert was tested against.
        """
        if ops.MISSING:  # first, because kernels that cannot be imported have limits of 0
            return ops.MISSING
        if forward_replaced(module):  # accelerate's hooks do that, and keep the stock forward to call
            return "its forward was replaced on the module itself"
        return self.inactive_reason(module, untested)

    def inactive_reason(self, module: nn.Module, untested: bool = False) -> str | None:
        """Like `stock_reason`, for a module that may already have the fast class."""
        reason = None if untested else self.code.untested(strict=True)
        return reason or self.unsupported(module)

    @property
    def code(self) -> forwards.Code:
        """The stock functions that the fast class replaces or depends on."""
        return CODE[self.stock.__name__]


def _entry(part: Any, name: str, kernel: str | None, switch: str) -> Entry:
    return Entry(stock_class(name), getattr(part, name), kernel, switch, _unsupported(part))


def _unsupported(part: Any) -> Callable[[nn.Module], str | None]:
    return getattr(part, "unsupported", lambda module: None)


# The layer op launches the kernels of these ops.
LAYER = "attention, dropout_add_layernorm, bias_gelu"
_INSIDE_LAYERS = ("attention", "residual_norm", "intermediate")
ENTRIES = (
    _entry(embeddings, "BertEmbeddings", "embedding_layernorm", "embeddings"),
    _entry(attention, "BertSelfAttention", "attention", "attention"),
    _entry(attention, "BertCrossAttention", "attention", "attention"),
    _entry(residual_norm, "BertSelfOutput", "dropout_add_layernorm", "residual_norm"),
    _entry(residual_norm, "BertOutput", "dropout_add_layernorm", "residual_norm"),
    Entry(stock.BertLayer, layer.BertLayer, LAYER, "attention", lambda module: None, _INSIDE_LAYERS),
    _entry(intermediate, "BertIntermediate", "bias_gelu", "intermediate"),
    _entry(prediction_head, "BertPredictionHeadTransform", "gelu_layernorm", "mlm_head"),
    # It makes masks and launches nothing itself, so the report omits it.
    _entry(model, "BertModel", None, "attention"),
)
# For unpad=True, and for unpad="auto" with a head that says what it reads.
PACKING = Entry(BertEncoder, encoder.Always.BertEncoder, "gather_rows", "unpad", encoder.unsupported)
AUTO_PACKING = Entry(BertEncoder, encoder.Unseen.BertEncoder, "gather_rows", "unpad", encoder.unsupported)
# Heads that say what they read. They launch nothing themselves.
POOLED_HEADS = tuple(
    _entry(pooled_heads, name, None, "unpad")
    for name in ("BertForSequenceClassification", "BertForNextSentencePrediction", "BertForMultipleChoice")
)
# Per value of mlm_logits.
MLM_HEADS = {
    value: tuple(
        Entry(stock_class(name), getattr(fast, name), "linear_cross_entropy", "mlm_head", mlm_heads.unsupported)
        for name in ("BertForMaskedLM", "BertForPreTraining", "BertLMHeadModel")
    )
    for value, fast in (("full", mlm_heads.Full), ("none", mlm_heads.WithoutLogits))
}
# Keyed by exact type: a user's subclass may override forward.
BY_STOCK = {entry.stock: entry for entry in (*ENTRIES, PACKING, *POOLED_HEADS, *MLM_HEADS["full"])}
BY_FAST = {
    entry.fast: entry for entry in (*ENTRIES, PACKING, AUTO_PACKING, *POOLED_HEADS, *MLM_HEADS["full"], *MLM_HEADS["none"])
}

# Parts of BERT that compute something but have no kernel; `report` lists them for completeness.
STOCK_ONLY = (BertPooler,)


def encoders_with_a_reader(model: nn.Module, mlm: bool) -> set[nn.Module]:
    """The encoders in `model` whose head reads only some positions; MLM heads count if `mlm`."""
    entries = (*POOLED_HEADS, *(entry for heads in MLM_HEADS.values() if mlm for entry in heads))
    heads = {cls for entry in entries for cls in (entry.stock, entry.fast)}
    bodies = (getattr(module, "bert", None) for module in model.modules() if kind_of(module) in heads)
    return {body.encoder for body in bodies if hasattr(body, "encoder")}


MODEL_CLASSES = (
    "BertModel",
    "BertForPreTraining",
    "BertLMHeadModel",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
