"""The layer's matrix products and their weights, in the dtype that products run in.

Nothing about weights is kept between calls. A training call concatenates the projections' weights: a kept copy could not be
known to be stale after a write through `.data`, and would hold memory that `model.to()` means to free. Without a backward the
projections are three products, which take as many launches.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .settings import Weights


class Products(NamedTuple):
    """The weights of products. Those of the three projections are concatenated, [3 H, H] and bias [3 H]; None where each
    projection is a product of its own."""

    projections: Tensor | None
    projections_bias: Tensor | None
    attention_output: Tensor
    intermediate: Tensor
    output: Tensor


def products_of(weights: Weights, dtype: torch.dtype, one_by_one: bool) -> Products:
    """The weights in `dtype`; the projections' are concatenated unless `one_by_one`."""
    w = weights
    if one_by_one:
        return Products(None, None, w.attention_output, w.intermediate, w.output)
    projections, biases = (w.query, w.key, w.value), (w.query_bias, w.key_bias, w.value_bias)
    if w.query.dtype == dtype:
        return Products(torch.cat(projections), torch.cat(biases), w.attention_output, w.intermediate, w.output)
    hidden, inner = w.query.shape[1], w.intermediate.shape[0]
    sizes = [3 * hidden * hidden, hidden * hidden, inner * hidden, hidden * inner, 3 * hidden]
    parts = torch.empty(sum(sizes), dtype=dtype, device=w.query.device).split(sizes)
    cast = Products(
        parts[0].view(3 * hidden, hidden),
        parts[4],
        parts[1].view(hidden, hidden),
        parts[2].view(inner, hidden),
        parts[3].view(hidden, inner),
    )
    into = [*cast.projections.chunk(3), *cast.projections_bias.chunk(3), *cast[2:]]
    torch._foreach_copy_(into, [*projections, *biases, w.attention_output, w.intermediate, w.output])  # one launch
    return cast


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`, which may be wider than theirs: 16-bit products accumulate in float32 and then need no cast."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, inside the product where there is a product of these dtypes that accumulates."""
    if a.dtype == total.dtype and adds_last(a):
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b))


def adds_last(a: Tensor) -> bool:
    """Whether a product is complete before it is added to the total. cuBLAS does that; on the CPU, products of one to three
    rows add their terms to the total one by one, with 2.5 times the rounding error."""
    return a.is_cuda
