"""bias_gelu: the feed-forward's activation, including the bias of the product before it."""

from collections.abc import Iterator

from fastbert.kernels import reference
from fastbert.kernels.bias_gelu import bias_gelu

from ..row_op import row_op
from ..spec import ACTIVATIONS, FEED_FORWARD, Variant

NAME = "bias_gelu"


def _variant(dtype: str, width: int, activation: str = "gelu") -> Variant:
    return Variant(NAME, dtype, width, activation, {"activation": activation})


def _variants() -> Iterator[Variant]:
    for dtype in ("bf16", "fp16", "fp32"):
        for width in FEED_FORWARD:
            yield _variant(dtype, width)
    for activation in ACTIVATIONS:
        yield _variant("bf16", 3072, activation)
        yield _variant("fp32", 3072, activation)


SPEC = row_op(
    NAME,
    bias_gelu,
    reference.bias_gelu,
    rows=("x",),
    vectors=("bias",),
    optional="bias",
    width="inner",
    variant=_variant,
    variants=_variants,
    short=("bf16 3072 gelu",),
    tensors={"forward": ("x", "y"), "backward": ("dy", "x", "dx")},
    widen=4,
    tables={"": ("bias_gelu_forward", "bias_gelu_backward")},
)
