"""The layer's backward: sixteen launches. A residual's gradient is added inside the product whose gradient meets it."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..bound import addressing, stream_of
from .forward import Inputs, Saved, columns, seed_places
from .plan import Plan
from .products import add_product, product
from .settings import Settings, Weights


class Gradients(NamedTuple):
    """None where it was not asked for."""

    x: Tensor | None
    queries: Tensor | None
    weights: Weights


def backward(
    plan: Plan,
    settings: Settings,
    dy: Tensor,
    inputs: Inputs,
    saved: Saved,
    weights: Weights,
    seed: Tensor | None,
    needed: Gradients,
) -> Gradients:
    """`needed` says of each whether it is asked for; of `inputs` the masks are read, of `weights` the vectors."""
    call, at, stream = plan.call, addressing(), stream_of(plan.call.device)
    low, w, products = call.product_dtype, weights, saved.products
    attention_seed, seed1, seed2 = seed_places(seed, settings)
    softmax, z1, mean1, rstd1, z2, mean2, rstd2 = plan.kept.places(saved.kept)
    scratch = plan.scratch.allocate(dy)
    sums2, sums_of_bias, sums1, delta, *keys = plan.scratch.places(scratch)
    row_keys = keys[0] if keys else None

    dout = torch.empty_like(saved.attended)
    dy1 = dout if plan.shares2 else torch.empty_like(dout, dtype=plan.y1_dtype)
    statistics = at(dy), z2, mean2, rstd2, at(w.output_norm), seed2
    plan.norm2_backward(stream, *statistics, at(dout), None if plan.shares2 else at(dy1), sums2)
    dh = torch.mm(dout, products.output)
    activated = torch.empty_like(dh)
    plan.gelu_backward(stream, at(dh), at(saved.h), at(w.intermediate_bias), at(dh), at(activated), sums_of_bias)
    doutput = _of_weight(needed.weights.output, dout, activated, call.weight_dtype)
    del activated
    add_product(dy1, dh, products.intermediate)
    dintermediate = _of_weight(needed.weights.intermediate, dh, saved.y1, call.weight_dtype)
    del dh

    # A program reads a row before it writes there, so a gradient may go where the one that it is made of was.
    dprojected = dy1 if plan.y1_dtype == low else dout
    unused = dout if dprojected is dy1 else dy1
    if plan.shares1:
        dread = dprojected
    elif unused is not dprojected and unused.dtype == call.dtype:
        dread = unused
    else:
        dread = torch.empty_like(dout, dtype=call.dtype)
    statistics = at(dy1), z1, mean1, rstd1, at(w.attention_norm), seed1
    plan.norm1_backward(stream, *statistics, at(dprojected), None if plan.shares1 else at(dread), sums1)
    dattended = torch.mm(dprojected, products.attention_output)
    dattention_output = _of_weight(needed.weights.attention_output, dprojected, saved.attended, call.weight_dtype)

    vectors = w.output_norm.new_empty(plan.vectors_in_all)
    plan.sums(stream, sums2, sums_of_bias, sums1, at(vectors))
    dnorm2, dnorm2_bias, doutput_bias, dintermediate_bias, dnorm1, dnorm1_bias, dattention_output_bias = vectors.split(
        plan.vectors
    )
    own = Weights(
        *(None,) * 6,
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
    if not (needed.x or needed.queries or any(needed.weights[:6])):
        return Gradients(None, None, own)

    parts = columns(saved.qkv, call.hidden)
    dqkv = torch.empty_like(saved.qkv)
    dparts = columns(dqkv, call.hidden)
    dq = None
    if saved.q is not None:
        dq = torch.empty_like(saved.q)
        parts, dparts = [at(saved.q), *parts], [at(dq), *dparts]
    dattended_place, masks = at(dattended), inputs.masks()
    plan.attention_rows(stream, dattended_place, at(saved.attended), delta, row_keys, masks[3], attention_seed)
    shared = *parts, dattended_place, softmax, delta, row_keys, *masks
    plan.attention_q(stream, *shared, dparts[0])
    plan.attention_kv(stream, *shared, *dparts[1:])
    del dattended

    dtype = call.weight_dtype
    if dq is None:
        if needed.x:
            add_product(dread, dqkv, products.projections)
        projections = _of_projections(("query", "key", "value"), needed.weights, dqkv, saved.x, dtype)
        return Gradients(dread, None, own._replace(**projections))
    projections = _of_projections(("query",), needed.weights, dq, saved.queries, dtype)
    projections |= _of_projections(("key", "value"), needed.weights, dqkv, saved.x, dtype)
    if needed.queries:
        add_product(dread, dq, products.projections[: call.hidden])
    dx = product(dqkv, products.projections[call.hidden :], call.dtype) if needed.x else None
    return Gradients(dx, dread, own._replace(**projections))


def _of_weight(needed: object, doutput: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The gradient of a product's weight [out, in]."""
    return product(doutput.t(), rows, dtype) if needed else None


def _of_projections(
    names: tuple[str, ...], needed: Weights, doutput: Tensor, rows: Tensor, dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """Gradients of the weights and biases of projections that lie side by side, by their names in Weights."""
    found: dict[str, Tensor | None] = {}
    if any(getattr(needed, name) for name in names):
        found |= zip(names, product(doutput.t(), rows, dtype).unsafe_chunk(len(names)), strict=True)
    if any(getattr(needed, f"{name}_bias") for name in names):
        biases = doutput.sum(0, dtype=dtype).unsafe_chunk(len(names))
        found |= zip((f"{name}_bias" for name in names), biases, strict=True)
    return found
