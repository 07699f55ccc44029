"""The fewest bytes and operations of an op, and the time they take at the measured ceilings. KERNELS has the targets.

T = tokens, W = width (hidden size, or 4 times that for bias_gelu), b = bytes an element. Weights, biases and the
row statistics are left out: at 4,096 tokens they are under 1 %. linear_cross_entropy's weight is not, but its floor is that
of its operations.
"""

from typing import Any

from bench.core.hardware import BF16_OPERATIONS_PER_SECOND, COPY_BYTES_PER_SECOND

# Tensors of T x W elements that are read or written.
TENSORS = {
    "feed_forward": {"forward": ("x", "y"), "backward": ("dy", "x", "dx")},
    "linear_cross_entropy": {"forward": ("hidden",), "backward": ("hidden", "dhidden")},
}
# Products of linear_cross_entropy, each of 2 operations a token, element of hidden and class.
DECODER_PRODUCTS = {"forward": 1, "backward": 2}
# Products of feed_forward, each of 2 operations a token, element of hidden and element of the feed-forward.
FEED_FORWARD_PRODUCTS = {"forward": 2, "backward": 4}
VOCABULARY, TINY_VOCABULARY = 30522, 101
# Of attention, each of 2 operations a score and element of a head, as each kernel computes them (both of the backward of
# longer sequences make scores and dP again).
SCORE_PRODUCTS = {
    "attention_fwd_kernel": 2,
    "attention_bwd_kv_kernel": 4,
    "attention_bwd_q_kernel": 3,
    "attention_bwd_short_kernel": 5,
}

LAYERS = {768: 12, 1024: 24}
ADAMW_BYTES = 28  # a float32 parameter: reads it, its gradient and two moments; writes it and the moments


def parameters(hidden: int) -> int:
    """Of BertModel: word, position and type embeddings with their norm, the layers, the pooler."""
    embeddings = (30522 + 512 + 2) * hidden + 2 * hidden
    return embeddings + LAYERS[hidden] * (12 * hidden**2 + 13 * hidden) + hidden**2 + hidden


MODELS = {"BERT-base": 768, "BERT-large": 1024}
SHAPES = {"1 x 512": (1, 512), "32 x 128": (32, 128), "64 x 512": (64, 512)}  # sequences x their length


def vocabulary(hidden: int) -> int:
    """Classes of the decoder that is measured: BERT's, and few for the tiny model of a dry run."""
    return VOCABULARY if hidden in LAYERS else TINY_VOCABULARY


def _specs() -> dict[str, Any]:
    # They import triton, whose interpreter a dry run chooses before that.
    from fastbert.testing.specs import SPECS

    return SPECS


def directions(op: str) -> tuple[str, ...]:
    """Those of an op whose bytes are stated."""
    return tuple(TENSORS[op] if op in TENSORS else _specs()[op].tensors if op in _specs() else ())


def stated_bytes(op: str, direction: str, tokens: int, hidden: int, itemsize: int) -> int:
    """Of so many tensors of tokens x width elements."""
    if op in TENSORS:
        return len(TENSORS[op][direction]) * tokens * hidden * itemsize
    return _specs()[op].moved(direction, tokens, hidden, itemsize)


def stated_operations(op: str, direction: str, batch: int, seqlen: int, hidden: int) -> int:
    """Of the matrix products: hidden is heads x head size, and every head has seqlen x seqlen scores."""
    if op == "linear_cross_entropy":
        return DECODER_PRODUCTS[direction] * 2 * batch * seqlen * hidden * vocabulary(hidden)
    if op == "feed_forward":
        return FEED_FORWARD_PRODUCTS[direction] * 2 * batch * seqlen * hidden * 4 * hidden
    return _specs()[op].operations(direction, batch, seqlen, hidden) if op not in TENSORS else 0


def floor_microseconds(moved: float, operations: float = 0.0) -> float:
    """Whichever takes longer: the bytes at the measured copy bandwidth, or the operations at the measured bf16 rate."""
    return max(moved / COPY_BYTES_PER_SECOND, operations / BF16_OPERATIONS_PER_SECOND) * 1e6
