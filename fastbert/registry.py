"""The one table: which transformers module has which fast class, on which kernel, under which switch of `patch`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers.models.bert import modeling_bert as bert

from fastbert import ops
from fastbert.layers import (
    attention,
    embeddings,
    encoder,
    intermediate,
    mlm_heads,
    pooled_heads,
    prediction_head,
    residual_norm,
)


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
        if ops.MISSING:  # first: limits of kernels that are not there would read as limits of theirs
            return ops.MISSING
        if "forward" in vars(module):  # accelerate's hooks do that, and have kept the stock forward to call
            return "its forward was replaced on the module itself"
        return self.unsupported(module)


ENTRIES = (
    Entry(
        bert.BertEmbeddings,
        embeddings.FastBertEmbeddings,
        "embedding_layernorm",
        "embeddings",
        embeddings.unsupported,
    ),
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
# By the value of mlm_logits.
MLM_HEADS = {
    value: tuple(
        Entry(getattr(bert, name), getattr(fast, name), "linear_cross_entropy", "mlm_head", mlm_heads.unsupported)
        for name in ("BertForMaskedLM", "BertForPreTraining", "BertLMHeadModel")
    )
    for value, fast in (("full", mlm_heads.Full), ("none", mlm_heads.WithoutLogits))
}
# Exact types: a user's subclass may have a forward of its own.
BY_STOCK = {entry.stock: entry for entry in (*ENTRIES, PACKING, *POOLED_HEADS, *MLM_HEADS["full"])}
BY_FAST = {
    entry.fast: entry
    for entry in (*ENTRIES, PACKING, AUTO_PACKING, *POOLED_HEADS, *MLM_HEADS["full"], *MLM_HEADS["none"])
}

# Parts of BERT that hold work but have no kernel yet; `report` names them so that nothing is passed over.
STOCK_ONLY = (bert.BertPooler,)


def encoders_with_a_reader(model: nn.Module, mlm: bool) -> set[nn.Module]:
    """The encoders in `model` of which a head reads some positions only, MLM heads among them where `mlm`."""
    entries = (*POOLED_HEADS, *(entry for heads in MLM_HEADS.values() if mlm for entry in heads))
    heads = {cls for entry in entries for cls in (entry.stock, entry.fast)}
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
