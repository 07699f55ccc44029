"""Computes the minimum bytes and operations of an op, and the time they take at the measured ceilings.

The tensors that an op reads and writes, and its matrix products, are listed in its spec (fastbert/testing/specs).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.core.hardware import BF16_OPERATIONS_PER_SECOND, COPY_BYTES_PER_SECOND

if TYPE_CHECKING:
    from fastbert.testing.spec import OpSpec, Size

VOCABULARY, TINY_VOCABULARY = 30522, 101
HEAD_SIZE = 64
# Products of each attention kernel, each of 2 operations per score and element of a head. The two kernels of the backward
# of longer sequences both compute scores and dP.
SCORE_PRODUCTS = {
    "attention_fwd_kernel": 2,
    "attention_bwd_kv_kernel": 4,
    "attention_bwd_q_kernel": 3,
    "attention_bwd_short_kernel": 5,
}

# Ops whose forward already forms the gradients: only the two directions together compare with other implementations.
GRADIENTS_IN_FORWARD = ("linear_cross_entropy",)
DIRECTIONS = FORWARD, BACKWARD, BOTH = ("forward", "backward", "both")

LAYERS = {768: 12, 1024: 24}


def parameters(hidden: int) -> int:
    """Number of parameters of BertModel: embeddings (word, position, type) with their norm, the layers, the pooler."""
    embeddings = (30522 + 512 + 2) * hidden + 2 * hidden
    return embeddings + LAYERS[hidden] * (12 * hidden**2 + 13 * hidden) + hidden**2 + hidden


MODELS = {"BERT-base": 768, "BERT-large": 1024}
SHAPES = {"1 x 512": (1, 512), "32 x 128": (32, 128), "64 x 512": (64, 512)}  # sequences x their length


def size(batch: int, seqlen: int, hidden: int) -> "Size":
    """The spec's size for a BERT of this hidden size. The tiny model of a dry run has a small vocabulary."""
    from fastbert.testing.spec import Size

    heads = max(1, hidden // HEAD_SIZE)
    classes = VOCABULARY if hidden in LAYERS else TINY_VOCABULARY
    shapes = {"heads": heads, "head_size": hidden // heads, "inner": 4 * hidden}
    return Size(batch, seqlen, hidden, vocabulary=classes, **shapes)


def spec(op: str) -> "OpSpec":
    """The op's spec. Imported inside the function: specs import triton, and a dry run selects its interpreter first."""
    from fastbert.testing.specs import SPECS

    return SPECS[op]


def stated_bytes(op: str, direction: str, tokens: int, hidden: int, itemsize: int) -> int:
    """Bytes of every tensor in the op's spec, each counted once."""
    return spec(op).moved(direction, tokens, hidden, itemsize)


def directions_of(op: str, chosen: Sequence[str] = DIRECTIONS) -> tuple[str, ...]:
    """The directions of those `chosen` in which the op's lanes can be compared."""
    return (BOTH,) if op in GRADIENTS_IN_FORWARD else tuple(chosen)


def adamw_bytes() -> int:
    """Bytes per step and float32 parameter: reads parameter, gradient and two moments; writes parameter and moments."""
    return stated_bytes("adamw", "step", 1, 1, 4)


def stated_operations(op: str, direction: str, batch: int, seqlen: int, hidden: int) -> int:
    """Operations of the matrix products; every head has seqlen x seqlen scores."""
    return spec(op).operations(direction, size(batch, seqlen, hidden))


def floor_microseconds(moved: float, operations: float = 0.0) -> float:
    """The longer of two times: bytes at the measured copy bandwidth, operations at the measured bf16 rate."""
    return max(moved / COPY_BYTES_PER_SECOND, operations / BF16_OPERATIONS_PER_SECOND) * 1e6
