"""The layer's forward: nine launches of its own, and one or two for what its weights are made of."""

from typing import NamedTuple

import torch
from torch import Tensor, addmm, empty_like, mm

from ..bound import Place, addressing, by_address, stream_of
from .plan import Plan
from .products import Products, products_of
from .settings import Settings, Weights


class Inputs(NamedTuple):
    """x [T, H]; queries [N, H] where they are rows of their own; the shape that the result is to have; what attention sees (as
    in attention.attention)."""

    x: Tensor
    queries: Tensor | None
    shape: torch.Size
    key_mask: Tensor | None
    key_bounds: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens: Tensor | None

    def masks(self) -> tuple[Place, ...]:
        """In the kernels' order; a mask between queries and keys is none of them."""
        at = addressing()
        mask, bounds, queries, keys = [None if tensor is None else at(tensor) for tensor in self[3:]]
        return mask, bounds, None, queries, keys


class Saved(NamedTuple):
    """What the backward reads: 12 T H elements, with F = 4 H. The activation's output, 4 more, is made again there."""

    x: Tensor
    queries: Tensor | None
    qkv: Tensor  # [T, 3 H]; of queries of their own, the keys and values alone, [T, 2 H]
    q: Tensor | None  # of queries of their own
    attended: Tensor
    y1: Tensor
    h: Tensor
    kept: Tensor
    products: Products


def draw_seeds(settings: Settings, device: torch.device) -> Tensor | None:
    """int64 [6], of which each dropout takes one element: the first, the third and the fifth, as addresses are aligned."""
    return torch.randint(2**62, (6,), device=device) if settings.drops else None


def seed_places(seed: Tensor | None, settings: Settings) -> tuple[Place, Place, Place]:
    """Of attention's dropout and of both LayerNorms', None where nothing is dropped."""
    if seed is None:
        return None, None, None
    if by_address():
        first = seed.data_ptr()
        places = first, first + 16, first + 32
    else:
        places = seed, seed[2:], seed[4:]
    return (
        places[0] if settings.attention_p > 0.0 else None,
        places[1] if settings.attention_output_p > 0.0 else None,
        places[2] if settings.output_p > 0.0 else None,
    )


def columns(x: Tensor, width: int) -> tuple[Place, ...]:
    """Where each `width` columns of x begin."""
    if by_address():
        first, step = x.data_ptr(), width * x.element_size()
        return tuple(range(first, first + step * (x.shape[1] // width), step))
    return x.split(width, 1)


def forward(
    plan: Plan, settings: Settings, inputs: Inputs, weights: Weights, seed: Tensor | None
) -> tuple[Tensor, Saved | None]:
    """y in the shape of the rows that are read and, where a backward follows (call.gradient), what that needs."""
    call, at, stream = plan.call, addressing(), stream_of(plan.call.device)
    low, hidden, w = call.product_dtype, call.hidden, weights
    attention_seed, seed1, seed2 = seed_places(seed, settings)
    products = products_of(weights, low)
    x = inputs.x.to(low)
    if inputs.queries is None:
        read, queries, q = inputs.x, None, None
        qkv = addmm(products.projections_bias, x, products.projections.t())
        parts = columns(qkv, hidden)
    else:
        read, queries = inputs.queries, inputs.queries.to(low)
        q = addmm(products.projections_bias[:hidden], queries, products.projections[:hidden].t())
        qkv = addmm(products.projections_bias[hidden:], x, products.projections[hidden:].t())
        parts = at(q), *columns(qkv, hidden)
    kept = plan.kept.allocate(x)
    softmax, *saved = plan.kept.places(kept)
    attended = x.new_empty((plan.n_rows, hidden))
    plan.attention(stream, *parts, at(attended), softmax, *inputs.masks(), attention_seed)
    if not call.gradient:
        q = qkv = None

    projected = mm(attended, products.attention_output.t())
    y1 = projected if plan.y1_dtype == low else empty_like(projected, dtype=plan.y1_dtype)
    z, mean, rstd = saved[:3] or (at(y1), None, None)  # without a backward only z's dtype counts
    vectors = at(w.attention_norm), at(w.attention_norm_bias), at(w.attention_output_bias)
    plan.norm1(stream, at(projected), at(read), *vectors, seed1, at(y1), z, mean, rstd)

    y1_low = y1.to(low)
    h = mm(y1_low, products.intermediate.t())
    activated = empty_like(h) if call.gradient else h
    plan.gelu(stream, at(h), at(w.intermediate_bias), at(activated))
    out = mm(activated, products.output.t())
    if call.gradient:  # autograd's functions must not return views, as which `out` in the shape of x would count
        y = read.new_empty(inputs.shape, dtype=plan.out_dtype)
    else:
        y = (out if plan.out_dtype == low else empty_like(out, dtype=plan.out_dtype)).view(inputs.shape)
    z, mean, rstd = saved[3:] or (at(y), None, None)
    vectors = at(w.output_norm), at(w.output_norm_bias), at(w.output_bias)
    plan.norm2(stream, at(out), at(y1), *vectors, seed2, at(y), z, mean, rstd)
    if not call.gradient:
        return y, None
    return y, Saved(x, queries, qkv, q, attended, y1_low, h, kept, products)
