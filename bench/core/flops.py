"""The operations of BERT, in the open: what a step needs, whatever a lane computes besides.

Only matrix products count, 2 operations a multiply-add, and only real tokens: with T = sum of the lengths n_i, layers L,
hidden size H, feed-forward size F, vocabulary V,

    a layer        2 T (4 H^2 + 2 H F)      four projections of attention, two products of the feed-forward
                 + 4 H sum(n_i^2)           scores and their weighted sum, over pairs of one sequence
    the heads      2 T (H^2 + H V)          MLM: transform and decoder, at every position, as stock computes it
                   2 B H^2                  pooler
                   2 T H C or 2 B H C       classifier over tokens or over sequences

A backward is two products for each one of the forward, so a training step is three forwards. Nothing is added for
what a lane computes twice (attention's scores in a backward) or on padding.
"""

from collections.abc import Sequence
from typing import Any

# By head: which of the parts behind the encoder it has; a classifier's width is config.num_labels unless given here.
MLM_HEADS = ("mlm", "clm", "pretraining")
POOLED_HEADS = {"pretraining": 2, "nsp": 2, "classification": None, "multiple-choice": 1}
TOKEN_HEADS = {"ner": None, "qa": 2}


def forward_flops(config: Any, head: str, lengths: Sequence[int]) -> int:
    """Operations of a forward of a BERT with this transformers config and head ("mlm", "classification", ...)."""
    hidden, tokens, rows = config.hidden_size, sum(lengths), len(lengths)
    products = 2 * tokens * (4 * hidden**2 + 2 * hidden * config.intermediate_size)
    pairs = sum(n * n for n in lengths)
    total = config.num_hidden_layers * (products + 4 * hidden * pairs)
    if head in MLM_HEADS:
        total += 2 * tokens * (hidden**2 + hidden * config.vocab_size)
    if head in POOLED_HEADS:
        classes = POOLED_HEADS[head] or config.num_labels
        total += 2 * rows * (hidden**2 + hidden * classes)
    if head in TOKEN_HEADS:
        total += 2 * tokens * hidden * (TOKEN_HEADS[head] or config.num_labels)
    return total


def step_flops(config: Any, head: str, mode: str, lengths: Sequence[int]) -> int:
    """Of a training step ("train") or of a forward ("infer")."""
    return (3 if mode == "train" else 1) * forward_flops(config, head, lengths)


def mfu(flops: float, seconds: float, ceiling: float) -> float:
    """Model FLOPs utilisation: the share of the measured rate of a bf16 product that went into what the step needs."""
    return flops / seconds / ceiling
