"""Counts the operations that a step of BERT needs, regardless of what a lane computes in addition.

Only matrix products count (2 operations per multiply-add), and only real tokens. With T = sum of the lengths n_i,
hidden size H, feed-forward size F, vocabulary V, batch size B, classes C:

    per layer      2 T (4 H^2 + 2 H F)      four projections of attention, two products of the feed-forward
                 + 4 H sum(n_i^2)           scores and their weighted sum, over pairs within a sequence
    heads          2 T (H^2 + H V)          MLM: transform and decoder, at every position, as stock computes it
                   2 B H^2                  pooler
                   2 T H C or 2 B H C       classifier over tokens or over sequences

The backward has two products for each product of the forward, so a training step counts as three forwards. Recomputation
(attention's scores in the backward) and padding do not count.
"""

from collections.abc import Sequence
from typing import Any

# Parts behind the encoder, by head. A classifier's width is config.num_labels unless given here.
MLM_HEADS = ("mlm", "clm", "pretraining")
POOLED_HEADS = {"pretraining": 2, "nsp": 2, "classification": None, "multiple-choice": 1}
TOKEN_HEADS = {"ner": None, "qa": 2}


def forward_flops(config: Any, head: str, lengths: Sequence[int]) -> int:
    """Operations of one forward of a BERT with this transformers config and head ("mlm", "classification", ...)."""
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
    """Operations of a training step ("train") or of a forward ("infer")."""
    return (3 if mode == "train" else 1) * forward_flops(config, head, lengths)


def mfu(flops: float, seconds: float, ceiling: float) -> float:
    """Model FLOPs utilisation: the step's operations per second as a share of the measured rate of a bf16 product."""
    return flops / seconds / ceiling
