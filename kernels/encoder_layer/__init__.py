"""A whole layer of BERT as one op: y = LN(dropout(gelu(y1 W1' + b1) W2' + b2) + y1), y1 = LN(dropout(a Wo' + bo) + x),
where a is the attention of x's projections.

Host time is why: on a fast GPU a layer's kernels are done before Python has called its modules one by one. Here a layer is
a straight line of 24 launches, 25 where sequences are long, of kernels that were bound before (plan.py), in one autograd
function.
And some work is only saved in this form: a residual's gradient is added inside a product (6 T H elements of memory traffic),
and the sums of all vectors' gradients end in one launch. Of 16 T H elements that a layer would keep, 11 are kept: the
activation's output and the first LayerNorm's are made again by the kernels of the backward that read their inputs anyway, for
one write of each (5 of the 44 T H elements that a layer's kernels move besides products), which no switch is worth.

    forward    products 8 T H^2 + 4 T H F operations, attention 4 T S H; kernels between them 16 T H elements
    backward   twice the products, attention as in attention.py; kernels between them 28 T H elements

Saved: see forward.Saved. Attention, dropout, LayerNorm and the activation are the single ops' own kernels.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..attention import bounds_of
from ..core import failures
from ..core.autograd import check_unbatched, links, needs_backward, not_twice
from ..core.failures import KernelFailed
from ..feed_forward import products as feed_forward_products
from . import plain
from .backward import Gradients, Vectors, backward
from .checks import check
from .forward import Inputs, Saved, draw_seeds, forward
from .plan import Plan, plan_of
from .plan import clear as clear_plans
from .products import Products
from .settings import Layout, Settings, Weights
from .twins import Twins

__all__ = ["encoder_layer"]

# What a layer may launch, by which a failure is told to be one of its own.
KERNELS = (
    "attention_fwd_kernel",
    "attention_bwd_q_kernel",
    "attention_bwd_kv_kernel",
    "attention_bwd_short_kernel",
    "bias_gelu_fwd_kernel",
    "bias_gelu_bwd_kernel",
    "column_sums_kernel",
    "dropout_add_layernorm_fwd_kernel",
    "dropout_add_layernorm_bwd_kernel",
)


def encoder_layer(
    x: Tensor,
    weights: Weights,
    settings: Settings,
    *,
    key_mask: Tensor | None = None,
    key_bounds: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    queries: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    index: Tensor | None = None,
    inverse: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """One layer of BERT's encoder.

    Args:
        x: [B, S, H], or packed [T, H]. fp64 (on a GPU by plain PyTorch), fp32, fp16 or bf16.
        weights: the layer's parameters, of one dtype.
        settings: its numbers.
        key_mask: bool [B, S], true where a key is valid.
        key_bounds: bounds_of(key_mask), where it is known already.
        cu_seqlens: int32 [sequences + 1], where each packed sequence starts and the last ends: from 0 to T.
        max_seqlen: length of the longest packed sequence, or more.
        queries: [N, H], the packed rows that are read, where those are not all: the result is of these alone.
        cu_seqlens_q, max_seqlen_q: the same of them. Causal queries are the last of their sequence, see attention.
        index: int32 [N], the packed rows that are read, in place of queries: any rows of x, none twice, zeros where it is
            below 0. Attention runs for all rows, and what follows it for these.
        inverse: int32 [T], with index: where each row of x is among those, negative if nowhere.
        product_dtype: of the matrix products and attention, as autocast has it; x's by default.
        norm_dtype: that LayerNorm returns (autocast asks for float32); by default what its sum has.
        seed: int64 [6], of which the dropouts take the first, third and fifth; drawn from torch's generator when None and
            something is dropped.

    Returns:
        The shape of x, or of queries, or [N, H]; contiguous.

    Raises:
        ValueError: shapes, dtypes (float64 beside others for one) or devices that do not fit, an activation that has no
            kernel, a probability outside [0, 1], packed rows with a key_mask.
    """
    layout = Layout(key_mask, key_bounds, cu_seqlens, max_seqlen, queries, cu_seqlens_q, max_seqlen_q, index, inverse)
    dtypes = product_dtype, norm_dtype
    check(x, weights, settings, layout, *dtypes, seed)
    if key_mask is not None and key_bounds is None:
        layout = layout._replace(key_bounds=bounds_of(key_mask))
    layout = Layout(*(aligned(value) if isinstance(value, Tensor) else value for value in layout))
    x, weights = aligned(x), Weights(*map(aligned, weights))
    if settings.drops:
        seed = draw_seeds(settings, x.device) if seed is None else aligned(seed)
    with torch.autocast(x.device.type, enabled=False):  # products have the dtype that was asked for
        if failures.is_wide(x):
            return plain.forward(x, weights, settings, layout, *dtypes, seed)
        try:
            return unchecked(x, weights, settings, layout, *dtypes, seed)
        except KernelFailed:
            if failures.strict:
                raise
            return plain.forward(x, weights, settings, layout, *dtypes, seed)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor` as the layer's kernels take it, contiguous and from a multiple of 16 bytes on; a copy where it is not so."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def unchecked(
    x: Tensor,
    weights: Weights,
    settings: Settings,
    layout: Layout,
    product_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
    twins: Twins | None = None,
) -> Tensor:
    """encoder_layer for arguments that are known to fit and are aligned; `seed` is drawn where it is None, key_bounds are
    those of the key_mask. `twins`: of the forward that this call is one of.

    Raises:
        KernelFailed: a kernel cannot be compiled or loaded, which was noted (failures.reasons). Nothing was computed.
    """
    if _elsewhere(x):
        with torch.cuda.device(x.device):
            return unchecked(x, weights, settings, layout, product_dtype, norm_dtype, seed, twins)
    key_mask, key_bounds, cu_seqlens, max_seqlen, queries, cu_seqlens_q, max_seqlen_q, index, inverse = layout
    packed, gradient = cu_seqlens is not None, needs_backward(x, queries, *weights)
    *outer, hidden = x.shape
    read_rows = None if queries is None else queries.numel() // hidden
    call = (
        *(prod(outer), cu_seqlens.shape[0] - 1 if packed else outer[0], max_seqlen if packed else outer[1]),
        *(read_rows if index is None else index.shape[0], max_seqlen_q),
        *(packed, key_mask is not None, hidden, weights.intermediate.shape[0]),
        *(x.dtype, weights.query.dtype, product_dtype or x.dtype, norm_dtype, x.device),
        *(torch.get_float32_matmul_precision(), gradient),
    )
    masks = key_mask, key_bounds, cu_seqlens if queries is None else cu_seqlens_q, cu_seqlens, index, inverse
    try:
        plan = plan_of(call, settings)
        if torch._C._are_functorch_transforms_active():  # tensors stand for others there
            twins = None
        x_low = None if twins is None else twins.take(x, plan.product_dtype)
        if gradient:
            apply = _Layer.apply if torch._C._are_functorch_transforms_active() else _apply
            y = apply(plan, settings, masks, seed, twins, x_low, x, queries, *weights)
        else:
            seed = draw_seeds(settings, x.device) if seed is None else seed
            y, low, _ = forward(plan, settings, _inputs(x, queries, masks), weights, seed, x_low)
            if twins is not None:
                twins.low = low
        if twins is not None:
            twins.beside(y)
        return y
    except KernelFailed as failure:
        _note(failure)
        raise


def _note(failure: KernelFailed) -> None:
    failures.record(failure)
    if failure.kernel in feed_forward_products.KERNELS:
        clear_plans()  # the plans that have it: cuBLAS and a kernel take its place in the next ones


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        settings: Settings,
        masks: tuple[Tensor | None, ...],
        seed: Tensor | None,
        twins: Twins | None,
        x_low: Tensor | None,
        x: Tensor,
        queries: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        weights = Weights(*weights)
        seed = draw_seeds(settings, x.device) if seed is None else seed
        y, low, saved = forward(plan, settings, _inputs(x, queries, masks), weights, seed, x_low)
        if twins is not None:
            twins.low = low
        if saved.x.dtype == x.dtype:  # themselves, by which a second derivative finds what the gradients were made of
            saved, ctx.links = saved._replace(x=x, queries=queries), ()
        else:
            ctx.links = links((x, queries), ())
        ctx.save_for_backward(*saved[:-1], *saved.products, *Vectors.of(weights), seed)
        ctx.hooked = _saved_tensors_hooks(True) is not None
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.settings, ctx.masks, ctx.weights = plan, settings, masks, weights
        ctx.shapes = x.shape, None if queries is None else queries.shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        check_unbatched((dy,))
        saved = ctx.saved_tensors  # once: checkpointing allows no more
        if not torch.is_grad_enabled():
            return *(None,) * 6, *_gradients(ctx, saved, dy)
        with torch.no_grad():
            found = _gradients(ctx, saved, dy)
        return *(None,) * 6, *not_twice(found, (dy, *saved, *ctx.links, *ctx.weights))


# The hooks that see what is saved now, or None.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
# Function's own looks for what functorch's transforms may have left in each argument.
_apply = super(torch.autograd.Function, _Layer).apply


def _gradients(ctx: Any, tensors: Sequence[Tensor | None], dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of x, of the queries and of each weight: those that are needed, and some that autograd drops."""
    if _elsewhere(dy):
        with torch.cuda.device(dy.device):
            return _gradients(ctx, tensors, dy)
    if torch.is_autocast_enabled(dy.device.type):
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(ctx, tensors, dy)
    if ctx.hooked:  # hooks may give saved tensors back in other places and with other strides
        tensors = [None if tensor is None else aligned(tensor) for tensor in tensors]
    needs, plan, settings = ctx.needs_input_grad, ctx.plan, ctx.settings
    saved, vectors, seed = Saved(*tensors[:8], Products._make(tensors[8:13])), Vectors._make(tensors[13:17]), tensors[17]
    x, queries = (None if rows is None else rows.view(-1, plan.hidden) for rows in saved[:2])
    saved = saved._replace(x=x, queries=queries)
    inputs = Inputs(x, queries, dy, *ctx.masks)
    needed = Gradients(needs[6], needs[7], Weights._make(needs[8:]))
    dy = aligned(dy).view(-1, plan.hidden)
    try:
        dx, dqueries, dweights = backward(plan, settings, dy, inputs, saved, vectors, seed, needed)
    except KernelFailed as failure:
        if failures.strict:
            raise
        _note(failure)
        dx, dqueries, *dweights = plain.gradients(plan, settings, dy, inputs, ctx.weights, seed)
    shape, queries_shape = ctx.shapes
    dx = None if dx is None else dx.view(*shape)
    return dx, None if dqueries is None else dqueries.view(*queries_shape), *dweights


def _inputs(x: Tensor, queries: Tensor | None, masks: tuple[Tensor | None, ...]) -> Inputs:
    hidden = x.shape[-1]
    if queries is None:
        return Inputs(x.view(-1, hidden), None, x, *masks)
    return Inputs(x.view(-1, hidden), queries.view(-1, hidden), queries, *masks)


def _elsewhere(x: Tensor) -> bool:
    """Whether another device than x's is the current one."""
    return x.is_cuda and x.device.index != torch._C._cuda_getDevice()
