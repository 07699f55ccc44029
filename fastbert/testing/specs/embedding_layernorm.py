"""embedding_layernorm: BERT's three tables, their sum, LayerNorm and dropout; gradients of the tables."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import reference
from fastbert.kernels.embedding_layernorm import embedding_layernorm

from ..spec import HIDDEN, Draw, Given, OpSpec, Size, Variant

NAME = "embedding_layernorm"
EMBEDDED = 127  # the audit's sequence length, which divides TOKENS
IDS, ORDER = "embedding_layernorm_ids_kernel", "embedding_layernorm_bwd_order_kernel"
_PARTS = ("fwd", "bwd", "bwd_sums", "bwd_finish", "bwd_order", "bwd_runs", "bwd_joins")
OF_ROWS = tuple(f"embedding_layernorm_{part}_kernel" for part in _PARTS)


def _inputs(
    size: Size,
    draw: Draw,
    dtype: torch.dtype,
    *,
    p: float = 0.0,
    repeated: bool = False,
    packed: bool = False,
    **options: Any,
) -> Given:
    """Random ids, uniform. Real text repeats a few of them often, which these do not show.

    repeated: half of the tokens are one word, like [MASK] or [PAD], so that partial sums are added up too.
    packed: through an index of all rows.
    """
    shape = size.batch, size.seqlen
    rows = {"words": (size.vocabulary,), "positions": (size.seqlen,), "types": (2,), "weight": (), "bias": ()}
    leaves = {name: draw.normal(*sizes, size.hidden) for name, sizes in rows.items()}
    leaves["weight"] = 1.0 + 0.3 * leaves["weight"]
    ids, token_type_ids = (draw.integers(0, high, *shape) for high in (size.vocabulary, 2))
    if repeated:
        ids[:, size.seqlen // 2 :] = 7
    context: dict[str, Any] = {"ids": ids, "token_type_ids": token_type_ids} | options
    if packed:
        index = torch.arange(size.tokens, dtype=torch.int32, device=draw.device)
        context |= {"index": index, "inverse": index}
        shape = 1, size.tokens
    context |= {"p": p, "seed": draw.seed()} if p else {}
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    return Given(leaves, context, draw.normal(*shape, size.hidden, dtype=dtype))


def _variant(dtype: str, width: int, p: float = 0.0) -> Variant:
    return Variant(NAME, dtype, width, f"p={p}", {"p": p, "padding_idx": 0})


def _variants() -> Iterator[Variant]:
    for width in HIDDEN:
        for dtype in ("bf16", "fp32"):
            yield _variant(dtype, width, p=0.1)
    yield _variant("bf16", 768)
    yield _variant("fp16", 768, p=0.1)
    yield Variant(NAME, "bf16", 768, "packed", {"p": 0.1, "packed": True}, OF_ROWS)
    yield Variant(NAME, "bf16", 1, "ids", {"packed": True}, (IDS,))
    yield Variant(NAME, "bf16", 1, "order", {}, (ORDER,))


def _audited(spec: OpSpec, variant: Variant, rows: int) -> Size:
    """As many words as tokens, so that the words' rows count towards the floor as they are read: one row per token. Kernels
    that see no row get one sequence: a kernel orders the ids of a batch only if they are few."""
    batch = 1 if variant.width == 1 else rows // EMBEDDED
    return Size(batch, EMBEDDED, hidden=variant.width, vocabulary=batch * EMBEDDED)


def _eager(
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    token_type_ids: Tensor,
    p: float = 0.0,
) -> Tensor:
    """The op as BertEmbeddings computes it."""
    z = F.embedding(ids, words) + F.embedding(token_type_ids, types) + positions
    return F.dropout(F.layer_norm(z, z.shape[-1:], weight, bias, 1e-12), p)


SPEC = OpSpec(
    NAME,
    embedding_layernorm,
    reference.embedding_layernorm,
    _inputs,
    _variant,
    _variants,
    short=("bf16 768 p=0.1",),
    eager=_eager,
    tensors={
        "forward": ("word", "type", "position", "y"),
        "backward": ("dy", "word", "type", "position", "dz", "dz of each word", "dz of each position"),
    },
    forms={"dropped": {"p": 0.1, "repeated": True}},
    tables={
        "dropped": (
            *("layernorm_forward", "layernorm_backward", "embedding_order", "embedding_runs"),
            *("embedding_sums_backward", "embedding_finish"),
        )
    },
    dropout=True,
    small=Size(2, 5, hidden=24, vocabulary=13),
    large=Size(32, 128),
    audited=_audited,
)
