"""dropout_add_layernorm: BERT's LayerNorm with what precedes it: a product's bias, dropout and the residual."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import reference
from fastbert.kernels.dropout_add_layernorm import dropout_add_layernorm

from ..row_op import row_op
from ..spec import HIDDEN, Variant

NAME = "dropout_add_layernorm"


def _variant(dtype: str, width: int, p: float = 0.0) -> Variant:
    return Variant(NAME, dtype, width, f"p={p}", {"p": p})


def _variants() -> Iterator[Variant]:
    for width in HIDDEN:
        for dtype in ("bf16", "fp16", "fp32", "mixed"):
            yield _variant(dtype, width, p=0.1)
        yield _variant("bf16", width)
        yield _variant("fp32", width)


def _eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor, p: float = 0.0) -> Tensor:
    """The op as BertSelfOutput computes it: the product's bias, dropout, the sum, LayerNorm."""
    return F.layer_norm(F.dropout(x + x_bias, p) + residual, x.shape[-1:], weight, bias, 1e-12)


SPEC = row_op(
    NAME,
    dropout_add_layernorm,
    reference.dropout_add_layernorm,
    rows=("x", "residual"),
    vectors=("weight", "bias", "x_bias"),
    optional="x_bias",
    variant=_variant,
    variants=_variants,
    eager=_eager,
    short=("bf16 768 p=0.1",),
    tensors={"forward": ("x", "residual", "z", "y"), "backward": ("dy", "z", "dx", "dresidual")},
    forms={"dropped": {"p": 0.1}},
    tables={"dropped": ("layernorm_forward", "layernorm_backward")},
    dropout=True,
)
