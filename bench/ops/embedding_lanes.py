"""The lanes of embedding_layernorm: BERT's three tables, their sum, LayerNorm and dropout; gradients of the tables."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.floors import vocabulary
from bench.ops.grid import Case, Function, Inputs, Lane, Op
from fastbert.kernels import reference
from fastbert.kernels.embedding_layernorm import embedding_layernorm

EPS = 1e-12  # BERT's


def _make(case: Case, generator: torch.Generator, device: str) -> Inputs:
    """Ids are uniform: real text repeats a few of them often, which this does not show."""
    batch, seqlen, hidden = case.batch, case.seqlen, case.hidden

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def integers(high: int) -> Tensor:
        return torch.randint(0, high, (batch, seqlen), generator=generator, device=device)

    leaves = {
        "words": normal(vocabulary(hidden), hidden),
        "positions": normal(seqlen, hidden),
        "types": normal(2, hidden),
        "weight": 1.0 + 0.3 * normal(hidden),
        "bias": normal(hidden),
    }
    context = {"ids": integers(vocabulary(hidden)), "token_type_ids": integers(2)}
    return Inputs(leaves, context, normal(batch, seqlen, hidden))


def _eager(
    words: Tensor, positions: Tensor, types: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, token_type_ids: Tensor, p: float
) -> Tensor:
    """As BertEmbeddings computes it."""
    z = F.embedding(ids, words) + F.embedding(token_type_ids, types) + positions
    return F.dropout(F.layer_norm(z, z.shape[-1:], weight, bias, EPS), p)


def _lane(call: Callable[..., Tensor]) -> Function:
    def run(inputs: Inputs, p: float) -> Tensor:
        given: dict[str, Any] = inputs.leaves | inputs.context
        return call(**given, p=p)

    return run


def _compiled(case: Case) -> Function:
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return _lane(torch.compile(_eager, dynamic=False, backend=backend))


OP = Op(
    _make,
    lambda inputs, p: reference.embedding_layernorm(**inputs.leaves, **inputs.context),
    {
        "eager": Lane(lambda case: _lane(_eager)),
        "compile": Lane(_compiled),
        "fastbert": Lane(lambda case: _lane(embedding_layernorm)),
    },
)
