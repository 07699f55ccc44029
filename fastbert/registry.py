"""The one table: which transformers module has which fast class, on which kernel, under which switch of `patch`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers.models.bert import modeling_bert as bert

from fastbert.layers import attention, encoder, intermediate, prediction_head, residual_norm


@dataclass(frozen=True)
class Entry:
    """A stock class and its fast subclass; `unsupported(module)` says why one module must stay stock."""

    stock: type[nn.Module]
    fast: type[nn.Module]
    kernel: str
    switch: str
    unsupported: Callable[[nn.Module], str | None]

    def why_stock(self, module: nn.Module) -> str | None:
        """Why swapping the class of a stock `module` would not put the kernel to use, or None."""
        if "forward" in vars(module):  # accelerate's hooks do that, and have kept the stock forward to call
            return "its forward was replaced on the module itself"
        return self.unsupported(module)


ENTRIES = (
    Entry(
        bert.BertSelfAttention,
        attention.FastBertSelfAttention,
        "attention",
        "attention",
        attention.unsupported,
    ),
    Entry(
        bert.BertCrossAttention,
        attention.FastBertCrossAttention,
        "attention",
        "attention",
        attention.unsupported,
    ),
    Entry(
        bert.BertSelfOutput,
        residual_norm.FastBertSelfOutput,
        "dropout_add_layernorm",
        "residual_norm",
        residual_norm.unsupported,
    ),
    Entry(
        bert.BertOutput,
        residual_norm.FastBertOutput,
        "dropout_add_layernorm",
        "residual_norm",
        residual_norm.unsupported,
    ),
    Entry(
        bert.BertIntermediate,
        intermediate.FastBertIntermediate,
        "bias_gelu",
        "intermediate",
        intermediate.unsupported,
    ),
    Entry(
        bert.BertPredictionHeadTransform,
        prediction_head.FastBertPredictionHeadTransform,
        "gelu_layernorm",
        "mlm_head",
        prediction_head.unsupported,
    ),
)
# Which of the two an encoder becomes depends on who reads it: see `encoder_entry`.
PACKING = Entry(bert.BertEncoder, encoder.FastBertEncoder, "gather_rows", "unpad", encoder.unsupported)
PACKING_FOR_FIRST = Entry(
    bert.BertEncoder, encoder.FirstPositionFastBertEncoder, "gather_rows", "unpad", encoder.unsupported
)
# Heads that read the pooled first position and return nothing else of the encoder's output.
FIRST_POSITION_HEADS = (
    bert.BertForSequenceClassification,
    bert.BertForNextSentencePrediction,
    bert.BertForMultipleChoice,
)
# Exact types: a user's subclass may have a forward of its own.
BY_STOCK = {entry.stock: entry for entry in (*ENTRIES, PACKING)}
BY_FAST = {entry.fast: entry for entry in (*ENTRIES, PACKING, PACKING_FOR_FIRST)}

# Parts of BERT that hold work but have no kernel yet; `report` names them so that nothing is passed over.
STOCK_ONLY = (bert.BertEmbeddings, bert.BertPooler)


def encoders_read_at_first(model: nn.Module) -> set[nn.Module]:
    """The encoders in `model` of which a head reads the first position only."""
    heads = (module for module in model.modules() if type(module) in FIRST_POSITION_HEADS)
    return {head.bert.encoder for head in heads}


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
