"""The layer's forward: ten launches, two of them for weights that lie side by side (without a backward three products do)."""

from typing import NamedTuple

import torch
from torch import Tensor, empty_like
from torch.nn.functional import linear

from ..bound import Place, addressing, by_address
from .plan import Plan
from .products import Products, products_of
from .settings import Settings, Weights


class Inputs(NamedTuple):
    """x [T, H]; queries [N, H] where they are rows of their own; a tensor of the result's shape; what attention sees (as in
    attention.attention)."""

    x: Tensor
    queries: Tensor | None
    like: Tensor
    key_mask: Tensor | None
    key_bounds: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens: Tensor | None

    def masks(self) -> tuple[Place, ...]:
        """In the kernels' order; a mask between queries and keys is none of them."""
        at = addressing()
        if self.key_mask is not None:
            return at(self.key_mask), at(self.key_bounds), None, None, None
        if self.cu_seqlens is not None:
            return None, None, None, at(self.cu_seqlens_q), at(self.cu_seqlens)
        return None, None, None, None, None


class Saved(NamedTuple):
    """What the backward reads: 11 T H elements, with F = 4 H. The activation's output and y1, 5 more, are made again there."""

    x: Tensor
    queries: Tensor | None
    qkv: Tensor  # [T, 3 H]; of queries of their own, the keys and values alone, [T, 2 H]
    q: Tensor | None  # of queries of their own
    attended: Tensor
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
    at, stream, low, hidden, w = addressing(), plan.stream(), plan.product_dtype, plan.hidden, weights
    attention_seed, seed1, seed2 = seed_places(seed, settings)
    products = products_of(weights, low, plan.one_by_one)
    x = inputs.x if plan.dtype == low else inputs.x.to(low)
    read = inputs.x if inputs.queries is None else inputs.queries
    queries = None if inputs.queries is None else read if plan.dtype == low else read.to(low)
    q = None
    if plan.one_by_one:
        q = linear(x if queries is None else queries, w.query, w.query_bias)
        qkv = linear(x, w.key, w.key_bias), linear(x, w.value, w.value_bias)
        parts = at(q), *map(at, qkv)
    elif queries is None:
        qkv = linear(x, products.projections, products.projections_bias)
        parts = columns(qkv, hidden)
    else:
        q = linear(queries, products.projections[:hidden], products.projections_bias[:hidden])
        qkv = linear(x, products.projections[hidden:], products.projections_bias[hidden:])
        parts = at(q), *columns(qkv, hidden)
    softmax, kept, saved1, saved2 = None, None, None, None
    if plan.gradient:
        kept = plan.kept.allocate(x)
        softmax, *saved = plan.kept.places(kept)
        saved1, saved2 = saved[:3], saved[3:]
    attended = empty_like(x if queries is None else queries)
    plan.attention(stream, *parts, at(attended), softmax, *inputs.masks(), attention_seed)
    if not plan.gradient:
        q = qkv = None

    projected = linear(attended, products.attention_output)
    # Whoever sees what is dispatched may keep it, as selective checkpointing keeps products: nothing goes over it then.
    over = plan.y1_dtype == low and not torch._C._len_torch_dispatch_stack()
    y1 = projected if over else empty_like(projected, dtype=plan.y1_dtype)
    z, mean, rstd = saved1 or (at(y1), None, None)  # without a backward only z's dtype counts
    vectors = at(w.attention_norm), at(w.attention_norm_bias), at(w.attention_output_bias)
    plan.norm1(stream, at(projected), at(read), *vectors, seed1, at(y1), z, mean, rstd)

    y1_low = y1 if plan.y1_dtype == low else y1.to(low)
    if plan.product is None:
        h = linear(y1_low, products.intermediate)
        activated = empty_like(h) if plan.gradient else h
        plan.gelu(stream, at(h), at(w.intermediate_bias), at(activated))
    else:
        activated = y1_low.new_empty(len(y1_low), len(w.intermediate))
        h = empty_like(activated) if plan.gradient else None
        operands = at(y1_low), at(products.intermediate), at(w.intermediate_bias)
        plan.product(stream, *operands, None if h is None else at(h), at(activated))
    out = linear(activated, products.output)
    if plan.gradient:  # autograd's functions must not return views, as which `out` in the shape of x would count
        y = empty_like(inputs.like, dtype=plan.out_dtype)
    else:
        y = (out if plan.out_dtype == low else empty_like(out, dtype=plan.out_dtype)).view_as(inputs.like)
    z, mean, rstd = saved2 or (at(y), None, None)
    vectors = at(w.output_norm), at(w.output_norm_bias), at(w.output_bias)
    plan.norm2(stream, at(out), at(y1), *vectors, seed2, at(y), z, mean, rstd)
    if not plan.gradient:
        return y, None
    return y, Saved(x, queries, qkv, q, attended, h, kept, products)
