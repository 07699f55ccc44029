"""gelu_layernorm: the end of BERT's MLM transform, a product's bias, the activation and LayerNorm."""

from collections.abc import Iterator

from fastbert.kernels import reference
from fastbert.kernels.gelu_layernorm import gelu_layernorm

from ..row_op import row_op
from ..spec import ACTIVATIONS, HIDDEN, Variant

NAME = "gelu_layernorm"


def _variant(dtype: str, width: int, activation: str = "gelu") -> Variant:
    return Variant(NAME, dtype, width, activation, {"activation": activation})


def _variants() -> Iterator[Variant]:
    for width in HIDDEN:
        for dtype in ("bf16", "fp16", "fp32", "mixed"):
            yield _variant(dtype, width)
    for activation in ACTIVATIONS:
        yield _variant("bf16", 768, activation)
        yield _variant("fp32", 768, activation)


SPEC = row_op(
    NAME,
    gelu_layernorm,
    reference.gelu_layernorm,
    rows=("x",),
    vectors=("weight", "bias", "x_bias"),
    optional="x_bias",
    variant=_variant,
    variants=_variants,
    short=("bf16 768 gelu",),
    tensors={"forward": ("x", "y"), "backward": ("dy", "x", "dx")},
    tables={"": ("layernorm_forward", "gelu_layernorm_backward")},
)
