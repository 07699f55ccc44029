"""The layer's forward: ten launches, two of which concatenate weights (without a backward, three products replace those)."""

from typing import NamedTuple

import torch
from torch import Tensor, empty_like
from torch.nn.functional import linear

from ..core.bound import Place, addressing, by_address
from ..gather_rows import gather_rows
from .plan import Plan
from .products import Products, products_of
from .settings import Settings, Weights


class Inputs(NamedTuple):
    """The tensors of a call.

    x is [T, H]; queries, if they are rows of their own, [N, H]. `like` has the shape of the result, except for its number of
    rows. Then what attention reads (as in kernels/attention), and the rows to continue with after it (encoder_layer's index).
    """

    x: Tensor
    queries: Tensor | None
    like: Tensor
    key_mask: Tensor | None
    key_bounds: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens: Tensor | None
    index: Tensor | None = None
    inverse: Tensor | None = None

    def taken(self, rows: Tensor) -> Tensor:
        """[T, H] -> [N, H]: the rows to continue with."""
        return gather_rows(rows, self.index, self.inverse)

    def put(self, rows: Tensor) -> Tensor:
        """[N, H] -> [T, H]: the inverse of `taken`, with zeros elsewhere."""
        return gather_rows(rows, self.inverse, self.index)

    def masks(self) -> tuple[Place, ...]:
        """The masks in the kernels' order, without a general mask, which a layer does not take."""
        at = addressing()
        if self.key_mask is not None:
            return at(self.key_mask), at(self.key_bounds), None, None, None
        if self.cu_seqlens is not None:
            return None, None, None, at(self.cu_seqlens_q), at(self.cu_seqlens)
        return None, None, None, None, None


class Saved(NamedTuple):
    """What the backward reads: 11 T H elements for F = 4 H. It recomputes the activation's output and y1, 5 T H more."""

    x: Tensor
    queries: Tensor | None
    qkv: Tensor  # [T, 3 H]; with queries of their own the keys and values only, [T, 2 H]
    q: Tensor | None  # [N, H], with queries of their own
    attended: Tensor  # the rows that the layer continues with
    all_attended: Tensor | None  # all rows, with `index`
    h: Tensor
    kept: Tensor
    products: Products


class Result(NamedTuple):
    """y; the same rows [N, H] in the products' dtype, if y has another; and what the backward reads, if there is one."""

    y: Tensor
    low: Tensor | None
    saved: Saved | None


def draw_seeds(settings: Settings, device: torch.device) -> Tensor | None:
    """int64 [6], or None without dropout. The dropouts use elements 0, 2 and 4, because addresses must be multiples of 16."""
    return torch.randint(2**62, (6,), device=device) if settings.drops else None


def seed_places(seed: Tensor | None, settings: Settings) -> tuple[Place, Place, Place]:
    """The seeds of attention's dropout and of those before both LayerNorms; None where nothing is dropped."""
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
    """The start of every `width` columns of x, in the form that bound kernels take."""
    if by_address():
        first, step = x.data_ptr(), width * x.element_size()
        return tuple(range(first, first + step * (x.shape[1] // width), step))
    return x.split(width, 1)


def forward(
    plan: Plan, settings: Settings, inputs: Inputs, weights: Weights, seed: Tensor | None, x_low: Tensor | None = None
) -> Result:
    """Run the layer; x_low [T, H] is x in the products' dtype, if it exists already."""
    at, stream, low, hidden, w = addressing(), plan.stream(), plan.product_dtype, plan.hidden, weights
    attention_seed, seed1, seed2 = seed_places(seed, settings)
    products = products_of(weights, low, plan.one_by_one)
    x = inputs.x if plan.dtype == low else inputs.x.to(low) if x_low is None else x_low
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
    attended, all_attended, shape = empty_like(x if queries is None else queries), None, inputs.like.shape
    plan.attention(stream, *parts, at(attended), softmax, *inputs.masks(), attention_seed)
    if inputs.index is not None:
        all_attended, attended, read = attended, inputs.taken(attended), inputs.taken(read)
        shape = *shape[:-2], *attended.shape
    if not plan.gradient:
        q = qkv = None

    projected = linear(attended, products.attention_output)
    # A dispatch mode may keep tensors (selective checkpointing keeps products), so nothing is overwritten under one.
    seen = torch._C._len_torch_dispatch_stack() > 0
    y1_low = empty_like(projected) if seen else projected
    y1 = y1_low if plan.y1_dtype == low else empty_like(projected, dtype=plan.y1_dtype)
    z, mean, rstd = saved1 or (at(y1), None, None)  # without a backward z is not written; only its dtype matters
    vectors = at(w.attention_norm), at(w.attention_norm_bias), at(w.attention_output_bias)
    twin = None if y1 is y1_low else at(y1_low)
    plan.norm1(stream, at(projected), at(read), *vectors, seed1, at(y1), twin, z, mean, rstd)

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
    if plan.gradient:  # autograd functions must not return views, and `out` in the shape of x would be one
        y = out.new_empty(shape, dtype=plan.out_dtype)
    else:
        y = (out if plan.out_dtype == low else empty_like(out, dtype=plan.out_dtype)).view(shape)
    z, mean, rstd = saved2 or (at(y), None, None)
    vectors = at(w.output_norm), at(w.output_norm_bias), at(w.output_bias)
    y_low = None if plan.out_dtype == low else empty_like(out) if seen else out
    twin = None if y_low is None else at(y_low)
    plan.norm2(stream, at(out), at(y1), *vectors, seed2, at(y), twin, z, mean, rstd)
    saved = Saved(x, queries, qkv, q, attended, all_attended, h, kept, products) if plan.gradient else None
    return Result(y, y_low, saved)
