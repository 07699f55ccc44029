"""feed_forward: BERT's two products with the activation between them."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import reference
from fastbert.kernels.core.launch import accumulator_torch
from fastbert.kernels.feed_forward import feed_forward
from fastbert.kernels.feed_forward.products import GRADIENT, PRODUCT, decided, rows_of_sums, work

from ..spec import FEED_FORWARD, Draw, Given, OpSpec, Size, Variant

NAME = "feed_forward"
TILE = 128  # columns; products with epilogues have widths that it divides
PRODUCTS = {"forward": 2, "backward": 4}  # of 2 operations per token, element of hidden and element of the feed-forward


def _inputs(size: Size, draw: Draw, dtype: torch.dtype, *, epilogues: bool | None = None, activation: str = "gelu") -> Given:
    """x [rows, H], and weights for which products keep the magnitude of their input.

    epilogues: force the products' own epilogues (at a width that tiles divide) or cuBLAS; None: as shipped.
    """
    rows, hidden = size.tokens, size.hidden
    inner = -(-size.inner // TILE) * TILE if epilogues else size.inner
    leaves = {
        "x": draw.normal(rows, hidden),
        "weight": draw.normal(inner, hidden) / hidden**0.5,
        "bias": draw.normal(inner),
        "output_weight": draw.normal(hidden, inner) / inner**0.5,
    }
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    context = {} if activation == "gelu" else {"activation": activation}
    within = nullcontext if epilogues is None else partial(decided, epilogues, epilogues)
    return Given(leaves, context, draw.normal(rows, hidden, dtype=dtype), within)


def _variant(dtype: str, width: int, activation: str = "gelu") -> Variant:
    return Variant(NAME, dtype, width, activation, {"activation": activation, "epilogues": True}, launch=_launch)


def _variants() -> Iterator[Variant]:
    """The products with epilogues, which are off as shipped. Everything else that the op launches is bias_gelu's."""
    for dtype in ("bf16", "fp16"):
        for width in FEED_FORWARD[:3]:
            yield _variant(dtype, width)
    yield _variant("bf16", 3072, "relu")


def _launch(variant: Variant, rows: int) -> None:
    """Both products with their epilogues, launched directly: autocast, which the op disables, has no meta device."""
    activation, given = variant.options["activation"], SPEC.on_meta(variant, rows)
    (x, weight, bias, output_weight), dout = given.leaves.values(), given.dy
    inner = weight.shape[0]
    h, y, dh = (x.new_empty(rows, inner) for _ in range(3))
    product = work(PRODUCT, *x.shape, inner, x, activation)
    product.launch(x, x_ptr=x, weight_ptr=weight, bias_ptr=bias, h_ptr=h, y_ptr=y)
    sums = h.new_empty(rows_of_sums(*h.shape, h), inner, dtype=accumulator_torch(h.dtype))
    tensors = {"dout_ptr": dout, "weight_ptr": output_weight, "bias_ptr": bias, "sums_ptr": sums}
    work(GRADIENT, *dout.shape, inner, h, activation).launch(h, **tensors, h_ptr=h, dh_ptr=dh, y_ptr=y)


def _eager(x: Tensor, weight: Tensor, bias: Tensor, output_weight: Tensor) -> Tensor:
    """The op as BertIntermediate and BertOutput compute it."""
    return F.linear(F.gelu(F.linear(x, weight, bias)), output_weight)


SPEC = OpSpec(
    NAME,
    feed_forward,
    reference.feed_forward,
    _inputs,
    _variant,
    _variants,
    short=("bf16 3072 gelu",),
    width="inner",
    eager=_eager,
    tensors={"forward": ("x", "y"), "backward": ("dy", "x", "dx")},
    operations=lambda direction, size: PRODUCTS[direction] * 2 * size.tokens * size.hidden * size.inner,
    forms={"": {"epilogues": True}},
    tables={"": ("feed_forward_product", "feed_forward_gradient")},
    small=Size(1, 5, hidden=TILE, inner=64),
    audited=lambda spec, variant, rows: Size(1, rows, hidden=variant.width // 4, inner=variant.width),
)
