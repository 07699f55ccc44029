"""The layer's backward: fourteen launches, thirteen for short sequences.

A residual's gradient is added inside the product that computes the other gradient of the same tensor.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch import unsafe_split_with_sizes as split  # the parts are no views, so writing to one is allowed

from ..core.bound import Place, addressing
from .forward import Inputs, Saved, columns, seed_places
from .plan import Plan
from .products import add_product, product
from .settings import Settings, Weights


class Gradients(NamedTuple):
    """Gradients; None where none was asked for."""

    x: Tensor | None
    queries: Tensor | None
    weights: Weights


class Vectors(NamedTuple):
    """The weights' vectors that the backward's kernels read."""

    attention_norm: Tensor
    attention_norm_bias: Tensor
    intermediate_bias: Tensor
    output_norm: Tensor

    @classmethod
    def of(cls, weights: Weights) -> "Vectors":
        w = weights
        return cls(w.attention_norm, w.attention_norm_bias, w.intermediate_bias, w.output_norm)


def backward(
    plan: Plan,
    settings: Settings,
    dy: Tensor,
    inputs: Inputs,
    saved: Saved,
    vectors: Vectors,
    seed: Tensor | None,
    needed: Gradients,
) -> Gradients:
    """The gradients that `needed` marks. Of `inputs` only the masks and the index are read."""
    at, stream, low, w, products = addressing(), plan.stream(), plan.product_dtype, vectors, saved.products
    attention_seed, seed1, seed2 = seed_places(seed, settings)
    softmax, z1, mean1, rstd1, z2, mean2, rstd2 = plan.kept.places(saved.kept)
    scratch = plan.scratch.allocate(dy)
    places = plan.scratch.places(scratch)
    sums, queries = places[: plan.n_sums], places[plan.n_sums :]
    sums2, sums_of_bias, sums1, *sums_of_projections = sums

    dout = torch.empty_like(saved.attended)
    dy1 = dout if plan.shares2 else torch.empty_like(dout, dtype=plan.y1_dtype)
    statistics = at(dy), z2, mean2, rstd2, at(w.output_norm), None, seed2
    plan.norm2_backward(stream, *statistics, at(dout), None if plan.shares2 else at(dy1), None, sums2)
    if plan.product_gradient is None:
        dh = torch.mm(dout, products.output)
        activated = torch.empty_like(dh)
        plan.gelu_backward(stream, at(dh), at(saved.h), at(w.intermediate_bias), at(dh), at(activated), sums_of_bias)
    else:
        dh, activated = torch.empty_like(saved.h), torch.empty_like(saved.h)
        operands = at(dout), at(products.output), at(w.intermediate_bias), at(saved.h)
        plan.product_gradient(stream, *operands, at(dh), at(activated), sums_of_bias)
    doutput = _of_weight(needed.weights.output, dout, activated, plan.weight_dtype)
    del activated
    add_product(dy1, dh, products.intermediate)
    # A program reads a row before it writes one, so a gradient may overwrite the one that it is computed from.
    dprojected = dy1 if plan.y1_dtype == low else dout
    unused = dout if dprojected is dy1 else dy1
    if plan.shares1:
        dread = dprojected
    elif unused is not dprojected and unused.dtype == plan.dtype:
        dread = unused
    else:
        dread = torch.empty_like(dout, dtype=plan.dtype)
    y1 = torch.empty_like(dout)
    statistics = at(dy1), z1, mean1, rstd1, at(w.attention_norm), at(w.attention_norm_bias), seed1
    plan.norm1_backward(stream, *statistics, at(dprojected), None if plan.shares1 else at(dread), at(y1), sums1)
    dintermediate = _of_weight(needed.weights.intermediate, dh, y1, plan.weight_dtype)
    del dh, y1
    dattended = torch.mm(dprojected, products.attention_output)
    dattention_output = _of_weight(needed.weights.attention_output, dprojected, saved.attended, plan.weight_dtype)

    dx, dqueries, dprojections, attends = None, None, (None,) * 3, needed.x or needed.queries or any(needed.weights[:6])
    if attends:
        if inputs.index is not None:
            dattended = inputs.put(dattended)
            dread = inputs.put(dread) if needed.x else None
        places = softmax, *queries, *sums_of_projections
        dqkv, dq = _through_attention(plan, dattended, inputs, saved, places, attention_seed)
        dx, dqueries, dprojections = _of_projections(plan, dread, dqkv, dq, saved, needed)
    dvectors = w.output_norm.new_empty(plan.vectors_in_all)
    plan.sums(stream, at(dvectors), *sums)  # without attention's backward it also sums uninitialised rows, which are dropped
    dnorm2, dnorm2_bias, doutput_bias, dintermediate_bias, dnorm1, dnorm1_bias, dattention_output_bias, *dbiases = split(
        dvectors, plan.vectors
    )
    weights = Weights(
        *chain.from_iterable(zip(dprojections, dbiases if attends else (None,) * 3, strict=True)),
        dattention_output,
        dattention_output_bias,
        dnorm1,
        dnorm1_bias,
        dintermediate,
        dintermediate_bias,
        doutput,
        doutput_bias,
        dnorm2,
        dnorm2_bias,
    )
    return Gradients(dx, dqueries, weights)


def _through_attention(
    plan: Plan,
    dattended: Tensor,
    inputs: Inputs,
    saved: Saved,
    places: tuple[Place, ...],
    seed: Place,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of attention's inputs in their layout: [T, 3 H]; with queries of their own, [T, 2 H] and [N, H]."""
    at, stream, masks, dout = addressing(), plan.stream(), inputs.masks(), addressing()(dattended)
    softmax, *places = places
    parts, dqkv, dq = columns(saved.qkv, plan.hidden), torch.empty_like(saved.qkv), None
    dparts = columns(dqkv, plan.hidden)
    if saved.q is not None:
        dq = torch.empty_like(saved.q)
        parts, dparts = (at(saved.q), *parts), (at(dq), *dparts)
    attended = saved.attended if saved.all_attended is None else saved.all_attended
    if plan.attention_short is not None:
        masks = *masks[:2], *masks[3:]
        plan.attention_short(stream, *parts, dout, *masks, softmax, seed, *dparts, *places)
        return dqkv, dq
    queries, sums_of_q, sums_of_kv = places
    shared = *parts, dout, queries, *masks
    plan.attention_q(stream, *shared, at(attended), softmax, seed, dparts[0], sums_of_q)
    plan.attention_kv(stream, *shared, *dparts[1:], sums_of_kv)
    return dqkv, dq


def _of_projections(
    plan: Plan, dread: Tensor, dqkv: Tensor, dq: Tensor | None, saved: Saved, needed: Gradients
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
    """The gradients of x, of the queries and of the projections' weights, in that order; `dread` [N, H] is the residual's."""
    hidden, weights = plan.hidden, saved.products.projections
    q, k, v = needed.weights[:6:2]
    if dq is None:
        if needed.x:
            add_product(dread, dqkv, weights)
        return dread, None, _side_by_side(plan, dqkv, saved.x, 3, q or k or v)
    if needed.queries:
        add_product(dread, dq, weights[:hidden])
    dx = product(dqkv, weights[hidden:], plan.dtype) if needed.x else None
    of_queries = _side_by_side(plan, dq, saved.queries, 1, q)
    return dx, dread, (*of_queries, *_side_by_side(plan, dqkv, saved.x, 2, k or v))


def _side_by_side(plan: Plan, doutput: Tensor, rows: Tensor, n: int, needed: bool) -> Sequence[Tensor | None]:
    """The gradients of the weights [H, H] of n projections of `rows`."""
    return split(product(doutput.t(), rows, plan.weight_dtype), [plan.hidden] * n) if needed else (None,) * n


def _of_weight(needed: object, doutput: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The gradient of a product's weight [out, in]."""
    return product(doutput.t(), rows, dtype) if needed else None
