"""One BERT layer as one op: y = LN(dropout(gelu(y1 W1' + b1) W2' + b2) + y1), y1 = LN(dropout(a Wo' + bo) + x), where a is the
attention of x's projections.

    forward    products 8 T H^2 + 4 T H F operations, attention 4 T S H; kernels between them move 16 T H elements
    backward   twice the products, attention as in kernels/attention; kernels between them move 28 T H elements

Saved: forward.Saved, 11 T H elements for F = 4 H. Attention, dropout, LayerNorm and the activation are the single ops' kernels.

The reason for one op is host time: on a fast GPU a layer's kernels finish before Python has called its modules one by one. Here
a layer is a straight line of 24 launches (25 for long sequences) of kernels that are already bound (plan.py), in one autograd
function. tests/kernels/encoder_layer/test_counts.py pins its ATen calls, its kernels and the calls that launch nothing;
tests/models/test_step_counts.py pins a whole step's. A change of the layer changes those numbers knowingly.

Some work is saved only in this form. A residual's gradient is added inside a product (6 T H elements of memory traffic), and
the sums of all vectors' gradients end in one launch. Of the 16 T H elements that a layer would save, 5 are recomputed: the
activation's and the first LayerNorm's outputs are written again by backward kernels that read their inputs anyway. That costs 5
of the 44 T H elements that a layer's kernels move besides products, too little for a switch.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..attention import bounds_of
from ..core import failures
from ..core.autograd import check_unbatched, first_order_only, links, needs_backward
from ..core.collectives import waited
from ..core.failures import KernelFailed
from ..core.launch import float32_products
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

# The kernels that a layer may launch: a failure of one of these counts as the layer's own.
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
        x: [B, S, H], or packed [T, H]. fp64 (on a GPU computed by plain PyTorch), fp32, fp16 or bf16.
        weights: the layer's parameters, all of one dtype.
        settings: the layer's numbers.
        key_mask: bool [B, S], true where a key is valid.
        key_bounds: bounds_of(key_mask), if already known.
        cu_seqlens: int32 [sequences + 1], the start of each packed sequence and the end of the last: from 0 to T.
        max_seqlen: length of the longest packed sequence, or more.
        queries: [N, H], the packed rows to compute, if not all; the result has only these.
        cu_seqlens_q, max_seqlen_q: the same for the queries. Causal queries are the last of their sequence, see attention.
        index: int32 [N], the packed rows to compute, instead of queries: any rows of x, none twice; below 0 a row of zeros.
            Attention runs for all rows, and everything after it for these. A causal last layer needs this form.
        inverse: int32 [T], with index: the place of each row of x in index, negative if it has none.
        product_dtype: dtype of the matrix products and of attention, as under autocast; x's by default.
        norm_dtype: dtype that LayerNorm returns (autocast asks for float32); by default that of its input.
        seed: int64 [6], whose elements 0, 2 and 4 seed the three dropouts; drawn from torch's generator when None and something
            is dropped.

    Returns:
        The shape of x, or of queries, or [N, H]; contiguous.

    Raises:
        ValueError: shapes, dtypes (float64 mixed with others) or devices that do not fit, an activation without a kernel, a
            probability outside [0, 1], packed rows with a key_mask.
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
    with torch.autocast(x.device.type, enabled=False):  # products run in product_dtype, not in autocast's
        if failures.is_float64_on_gpu(x):
            return plain.forward(x, weights, settings, layout, *dtypes, seed)
        try:
            return unchecked(x, weights, settings, layout, *dtypes, seed)
        except KernelFailed:
            if failures.strict:
                raise
            return plain.forward(x, weights, settings, layout, *dtypes, seed)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor` contiguous and aligned to 16 bytes, as the layer's kernels require; copied only if necessary."""
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
    """encoder_layer for checked and aligned arguments; `key_bounds` must come with key_mask, a `seed` of None is drawn.

    `twins` are handed from layer to layer within one forward.

    Raises:
        KernelFailed: a kernel cannot be compiled or loaded. It is recorded (failures.reasons), and nothing was computed.
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
        *(float32_products(), gradient),
    )
    masks = key_mask, key_bounds, cu_seqlens if queries is None else cu_seqlens_q, cu_seqlens, index, inverse
    try:
        plan = plan_of(call, settings)
        if torch._C._are_functorch_transforms_active():  # tensors may be wrappers of others
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
        _record(failure)
        raise


def _record(failure: KernelFailed) -> None:
    failures.record(failure)
    if failure.kernel in feed_forward_products.KERNELS:
        clear_plans()  # so that later plans have cuBLAS and a kernel in its place


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
        if saved.x.dtype == x.dtype:  # the very tensors, which a second derivative finds as sources of the gradients
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
        saved = ctx.saved_tensors  # once: checkpointing allows a single read
        if not torch.is_grad_enabled():
            return *(None,) * 6, *_gradients(ctx, saved, dy)
        with torch.no_grad():
            found = _gradients(ctx, saved, dy)
        return *(None,) * 6, *first_order_only(found, (dy, *saved, *ctx.links, *ctx.weights))


# The hooks on saved tensors that are active, or None.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
# Function.apply also unwraps what functorch's transforms may have left in each argument.
_apply = super(torch.autograd.Function, _Layer).apply


def _gradients(ctx: Any, tensors: Sequence[Tensor | None], dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, of the queries and of each weight. Some that are not needed come along; autograd drops them."""
    [dy] = waited((dy,))
    if _elsewhere(dy):
        with torch.cuda.device(dy.device):
            return _gradients(ctx, tensors, dy)
    if torch.is_autocast_enabled(dy.device.type):
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(ctx, tensors, dy)
    if ctx.hooked:  # hooks may return saved tensors at other addresses and with other strides
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
        _record(failure)
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
    """Whether the current device is not x's."""
    return x.is_cuda and x.device.index != torch._C._cuda_getDevice()
