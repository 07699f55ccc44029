"""The one table: which transformers module has which fast class, on which kernel, under which switch of `patch`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers.models.bert import modeling_bert as bert

from fastbert.layers import attention, encoder, intermediate, pooled_heads, prediction_head, residual_norm


@dataclass(frozen=True)
class Entry:
    """A stock class and its fast subclass; `unsupported(module)` says why one module must stay stock."""

    stock: type[nn.Module]
    fast: type[nn.Module]
    kernel: str | None
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
# unpad=True, and unpad="auto" where a head says what it reads.
PACKING = Entry(bert.BertEncoder, encoder.FastBertEncoder, "gather_rows", "unpad", encoder.unsupported)
AUTO_PACKING = Entry(bert.BertEncoder, encoder.AutoFastBertEncoder, "gather_rows", "unpad", encoder.unsupported)
# Heads that say what they read. They launch nothing themselves, so no report shows them.
POOLED_HEADS = tuple(
    Entry(stock, fast, None, "unpad", pooled_heads.unsupported)
    for stock, fast in (
        (bert.BertForSequenceClassification, pooled_heads.BertForSequenceClassification),
        (bert.BertForNextSentencePrediction, pooled_heads.BertForNextSentencePrediction),
        (bert.BertForMultipleChoice, pooled_heads.BertForMultipleChoice),
    )
)
# Exact types: a user's subclass may have a forward of its own.
BY_STOCK = {entry.stock: entry for entry in (*ENTRIES, PACKING, *POOLED_HEADS)}
BY_FAST = {entry.fast: entry for entry in (*ENTRIES, PACKING, AUTO_PACKING, *POOLED_HEADS)}

# Parts of BERT that hold work but have no kernel yet; `report` names them so that nothing is passed over.
STOCK_ONLY = (bert.BertEmbeddings, bert.BertPooler)


def encoders_with_a_reader(model: nn.Module) -> set[nn.Module]:
    """The encoders in `model` of which a head says what it reads."""
    heads = {cls for entry in POOLED_HEADS for cls in (entry.stock, entry.fast)}
    return {module.bert.encoder for module in model.modules() if type(module) in heads}


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
