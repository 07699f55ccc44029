"""loss = cross_entropy(h W' + b, labels): BERT's decoder and its loss, without all logits in memory at once.

h [T, H], W [V, H], b [V] or None, labels [T]; 2 T H V operations forward, 4 T H V backward, nothing computed twice:

    a chunk of rows     x = h W' by cuBLAS into one buffer, which is used again for each chunk
    one kernel          its rows' losses and, in place, dx = softmax(x + b) - target
    two products        dh = dx W, dW += dx' h; db += the columns' sums of dx

So gradients are formed in the forward, where a chunk's logits are; what they lack, the gradient of the loss and the
1 / (weight of the counted labels) of a mean, are two numbers on the device that the backward multiplies with. The idea is
that of mgmalek's efficient_cross_entropy and of Liger-Kernel (arXiv:2410.10989). The other known way keeps only a logsumexp
and forms the logits again in the backward, tile by tile (Wijmans et al., Cut Your Losses, arXiv:2411.09009): less memory
still, a third more operations. With V / H = 40 the products are most of the time, so here they are cuBLAS's, each made once.

There are three ways, which the parts of this file are:

    1. losses   a loss a row (reduction "none") has a gradient a row, which nothing can be multiplied with afterwards: the
                backward makes the chunks' logits again. Also where no gradient is asked for.
    2. kept     few rows, or few classes: all dx are kept as one chunk, and both products wait for the backward, which puts
                its two numbers into h and dh, the small tensors.
    3. formed   the rest: dh, and dW as a sum over chunks, float32 where W is in 16 bits. chunked.py has
                how long they are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..core.launch import DTYPES, accumulator_torch, as_rows, check_device, check_dtype, differentiable
from .chunked import Gradients, chunk_size, chunks, most_at_once, product, unscaled
from .rows import Targets, check_on_cpu, gradient_scale, launch_reduce, padded, scaled, targets_of

__all__ = ["linear_cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")


def _reduced(losses: Tensor, targets: Targets, n_cols: int, reduction: str, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss, and its derivative by a row's."""
    loss, scale = losses.new_empty((), dtype=out_dtype), losses.new_empty(())
    launch_reduce(losses, targets, n_cols, reduction, loss, scale)
    return loss, scale


def _row_losses(targets: Targets, weight: Tensor, dtype: torch.dtype) -> Tensor:
    labels = targets.labels
    if not labels.is_cuda:
        check_on_cpu(labels, weight.shape[0], targets.ignore_index)
    return torch.empty(labels.shape, dtype=dtype, device=labels.device)


# 1. Only the loss in the forward: inference, and reduction "none".


def _launch_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    out_dtype: torch.dtype,
) -> Tensor:
    dtype, n_cols = weight.dtype, weight.shape[0]
    targets = targets_of(labels, class_weights, ignore_index, label_smoothing, dtype)
    losses = _row_losses(targets, weight, out_dtype if reduction == "none" else accumulator_torch(dtype))
    for _ in chunks(hidden, weight, bias, targets, losses=losses):
        pass
    if reduction == "none":
        launch_reduce(losses, targets, n_cols, reduction, None, None)
        return losses
    return _reduced(losses, targets, n_cols, reduction, out_dtype)[0]


def _allocate_losses(hidden, weight, bias, labels, class_weights, ignore_index, reduction, label_smoothing, out_dtype):
    return hidden.new_empty(labels.shape if reduction == "none" else (), dtype=out_dtype)


def _launch_losses_bwd(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size, dtype = chunk_size(hidden, weight), weight.dtype
    sums = dtype if hidden.shape[0] <= size else accumulator_torch(dtype)
    targets = targets_of(labels, class_weights, ignore_index, label_smoothing, dtype)
    found = Gradients(hidden, weight, (needs_hidden, needs_weight, needs_bias), sums, 1.0, size)
    for dlogits in chunks(hidden, weight, bias, targets, dlosses=dlosses, gradient=True):
        found.add(dlogits)
    return found.dhidden, found.dweight.to(dtype), found.dbias.to(dtype)


def _allocate_losses_bwd(dlosses, hidden, weight, bias, labels, class_weights, ignore_index, label_smoothing, *needs):
    return _allocate_gradients(hidden, weight, *needs)


def _allocate_gradients(hidden, weight, needs_hidden, needs_weight, needs_bias):
    dhidden = hidden.new_empty(hidden.shape if needs_hidden else 0)
    dweight = weight.new_empty(weight.shape if needs_weight else 0)
    return dhidden, dweight, weight.new_empty(weight.shape[0] if needs_bias else 0)


def _save_losses(ctx, inputs, output):
    *tensors, ctx.ignore_index, _, ctx.label_smoothing, _ = inputs
    ctx.save_for_backward(*tensors)


def _gradients_losses(backward, ctx, dlosses):
    needs = ctx.needs_input_grad[:3]
    found = backward(dlosses, *ctx.saved_tensors, ctx.ignore_index, ctx.label_smoothing, *needs)
    return *_needed(found, needs), *(None,) * 6


def _needed(found: Any, needs: Any) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(found, needs, strict=True)]


# 2. Few rows: dlogits are kept, and the backward multiplies.


def _launch_kept(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, n_cols = weight.dtype, weight.shape[0]
    targets = targets_of(labels, class_weights, ignore_index, label_smoothing, dtype, kept=True)
    losses = _row_losses(targets, weight, accumulator_torch(dtype))
    dlogits = torch.empty((hidden.shape[0], padded(n_cols)), dtype=dtype, device=weight.device)
    options = {"losses": losses, "gradient": True, "scale": gradient_scale(dtype), "buffer": dlogits}
    for _ in chunks(hidden, weight, bias, targets, **options):
        pass
    return *_reduced(losses, targets, n_cols, reduction, out_dtype), dlogits


def _allocate_kept(hidden, weight, *settings):
    return *_allocate_scalars(weight, settings[-1]), weight.new_empty(hidden.shape[0], padded(weight.shape[0]))


def _allocate_scalars(weight, out_dtype):
    return weight.new_empty((), dtype=out_dtype), weight.new_empty((), dtype=accumulator_torch(weight.dtype))


def _launch_kept_bwd(
    dloss: Tensor,
    scale: Tensor,
    dlogits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, alpha = weight.dtype, 1.0 / gradient_scale(weight.dtype)
    dlogits = dlogits[:, : weight.shape[0]]
    dweight, dhidden, dbias = (hidden.new_empty(0) for _ in range(3))
    if needs_weight:  # first, so that scaled rows and those of dhidden are not held together
        dweight = product(dlogits.t(), scaled(hidden, dloss, scale, dtype), alpha)
    if needs_hidden:
        dhidden = scaled(product(dlogits, weight, alpha), dloss, scale, dtype, in_place=True)
    if needs_bias:
        dbias = scaled(unscaled(torch.sum(dlogits, 0, dtype=scale.dtype), alpha), dloss, scale, dtype)
    return dhidden, dweight, dbias


def _allocate_kept_bwd(dloss, scale, dlogits, hidden, weight, *needs):
    return _allocate_gradients(hidden, weight, *needs)


def _save_kept(ctx, inputs, output):
    _, scale, dlogits = output
    ctx.mark_non_differentiable(scale, dlogits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scale, dlogits, *inputs[:2])


def _gradients_kept(backward, ctx, dloss, *_):
    if dloss is None:
        return (None,) * 9
    needs = ctx.needs_input_grad[:3]
    return *_needed(backward(dloss, *ctx.saved_tensors, *needs), needs), *(None,) * 6


# 3. Many rows: gradients of chunks are summed up in the forward, and the backward scales them.


def _launch_formed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    out_dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, n_cols, sums = weight.dtype, weight.shape[0], accumulator_torch(weight.dtype)
    targets = targets_of(labels, class_weights, ignore_index, label_smoothing, dtype, kept=True)
    losses, factor = _row_losses(targets, weight, sums), gradient_scale(dtype)
    needs = (needs_hidden, needs_weight, needs_bias)
    found = Gradients(hidden, weight, needs, sums, factor, chunk_size(hidden, weight))
    for dlogits in chunks(hidden, weight, bias, targets, losses=losses, gradient=True, scale=factor):
        found.add(dlogits)
    return *_reduced(losses, targets, n_cols, reduction, out_dtype), found.dhidden, found.dweight, found.dbias


def _allocate_formed(hidden, weight, bias, labels, class_weights, ignore_index, reduction, label_smoothing, out_dtype, *needs):
    sums = accumulator_torch(weight.dtype)
    dhidden, dweight, dbias = _allocate_gradients(hidden, weight, *needs)
    return *_allocate_scalars(weight, out_dtype), dhidden, dweight.to(sums), dbias.to(sums)


def _launch_formed_bwd(
    dloss: Tensor, scale: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = dhidden.dtype
    return (
        scaled(dhidden, dloss, scale, dtype),
        scaled(dweight, dloss, scale, dtype),
        scaled(dbias, dloss, scale, dtype),
    )


def _allocate_formed_bwd(dloss, scale, *gradients):
    return tuple(x.new_empty(x.shape, dtype=gradients[0].dtype) for x in gradients)


def _save_formed(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _gradients_formed(backward, ctx, dloss, *_):
    if dloss is None:
        return (None,) * 12
    return *_needed(backward(dloss, *ctx.saved_tensors), ctx.needs_input_grad[:3]), *(None,) * 9


def _rule(name, forward, allocate, backward, allocate_backward, save, gradients):
    """The custom ops `name` and name_backward, and the function that is differentiated by them or without them."""
    op = torch.library.custom_op(f"fastbert::{name}", forward, mutates_args=())
    op.register_fake(allocate)
    backward_op = torch.library.custom_op(f"fastbert::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(allocate_backward)
    return differentiable(forward, backward, save, gradients, op, backward_op)


_losses = _rule(
    "linear_cross_entropy_losses",
    *(_launch_losses, _allocate_losses, _launch_losses_bwd, _allocate_losses_bwd, _save_losses, _gradients_losses),
)
_kept = _rule(
    "linear_cross_entropy_kept",
    *(_launch_kept, _allocate_kept, _launch_kept_bwd, _allocate_kept_bwd, _save_kept, _gradients_kept),
)
_formed = _rule(
    "linear_cross_entropy_formed",
    *(_launch_formed, _allocate_formed, _launch_formed_bwd, _allocate_formed_bwd, _save_formed, _gradients_formed),
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch's cross_entropy(linear(hidden, weight, bias), labels) without a tensor of all logits.

    Args:
        hidden: [..., H]. fp64, fp32, fp16 or bf16, any strides.
        weight: [V, H], in the dtype of hidden; so is the bias. Autocast does not reach in here: the caller casts.
        bias: [V], or None.
        labels: [...], int64: a class, 0 to V - 1, or ignore_index.
        class_weights: [V], what torch calls `weight`: how much a row of that label counts. fp64, fp32, fp16 or bf16, whatever
            the dtype of hidden; without a gradient, which torch has none for either.
        ignore_index: the label of rows without loss and without gradient.
        reduction: "mean", the losses' sum over the weights' sum (or over the number) of the other rows; "sum", or "none".
            A mean over no row is NaN and its gradients are 0. Over rows that weigh nothing both are NaN, also the gradients
            of ignored rows, which torch leaves 0.
        label_smoothing: how much of the target is spread over all classes.
        out_dtype: dtype of the loss; by default that of hidden. Gradients do not depend on it.

    Returns:
        [], or [...] for reduction "none".

    Raises:
        ValueError: shapes or devices that do not fit, a dtype that has no kernel, class weights that require a gradient, an
            unknown reduction, a smoothing outside [0, 1].
        IndexError: on a CPU, a label that is no class. On a GPU the device stops with an assertion, as in torch.
    """
    _check(hidden, weight, bias, labels, class_weights, reduction, label_smoothing, out_dtype or hidden.dtype)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    rows, targets = as_rows(hidden), labels.reshape(-1).contiguous()
    settings = (ignore_index, reduction, float(label_smoothing), out_dtype or hidden.dtype)
    inputs = (rows, weight, bias, targets, class_weights, *settings)
    if reduction == "none":
        return _losses(*inputs).view(labels.shape)
    if not any(needs):
        return _losses(*inputs)
    # While a compiler traces with a length that it cannot know, the answer is no.
    if guard_or_false(rows.shape[0] <= most_at_once(*weight.shape, weight.dtype)):
        return _kept(*inputs)[0]
    return _formed(*inputs, *needs)[0]


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weights: Tensor | None,
    reduction: str,
    label_smoothing: float,
    out_dtype: torch.dtype,
) -> None:
    check_dtype("hidden", hidden)
    if hidden.dim() == 0:
        raise ValueError("hidden: expected [..., H], got a tensor without dimensions")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected [V, {hidden.shape[-1]}], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name}: expected the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels), ("class_weights", class_weights)):
        check_device(name, tensor, hidden)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64, got {labels.dtype}")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels: expected shape {tuple(hidden.shape[:-1])}, got {tuple(labels.shape)}")
    if class_weights is not None:
        check_dtype("class_weights", class_weights)
        if class_weights.shape != weight.shape[:1]:
            raise ValueError(f"class_weights: expected shape {tuple(weight.shape[:1])}, got {tuple(class_weights.shape)}")
        if class_weights.requires_grad and torch.is_grad_enabled():
            raise ValueError("class_weights: expected a tensor without a gradient, got one that requires it")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1, got {label_smoothing}")
    if out_dtype not in DTYPES:
        raise ValueError(f"out_dtype: expected float64, float32, float16 or bfloat16, got {out_dtype}")
