"""loss = cross_entropy(h W' + b, labels): BERT's decoder and its loss, without all logits in memory at once.

h [T, H], W [V, H], b [V] or None, labels [T]; 2 T H V operations forward, 4 T H V backward, nothing computed twice:

    a chunk of rows     x = h W' by cuBLAS, into one buffer that every chunk reuses
    one kernel          its rows' losses and, in place, dx = softmax(x + b) - target
    two products        dh = dx W, dW += dx' h; db += column sums of dx

Gradients are formed in the forward, where a chunk's logits are. The backward multiplies them by two numbers on the device: the
loss's own gradient and, for a mean, 1 / (the counted labels' weight). The idea is that of mgmalek's efficient_cross_entropy and
of Liger-Kernel (arXiv:2410.10989). The alternative keeps only a logsumexp and recomputes the logits in the backward, tile by
tile (Wijmans et al., Cut Your Losses, arXiv:2411.09009): even less memory, a third more operations. With V / H = 40 the
products dominate, so each is made once, and by cuBLAS. The bias is added in the kernel: cuBLAS would
take another pass to add it to a padded buffer, which 16-byte accesses need at 30,522 columns.

There are three paths, one per part of this file:

    1. losses   a loss per row (reduction "none") has an upstream gradient per row, by which sums cannot be multiplied
                afterwards: the backward recomputes the chunks' logits. Also without a gradient.
    2. kept     few rows or few classes: all dx are kept as one chunk, and both products wait for the backward, which multiplies
                its two numbers into h and dh, the small tensors. Up to 3,234 rows of BERT-base in bf16.
    3. formed   otherwise: dh, and dW as a sum over chunks, in float32 if W has 16 bits. chunked.py decides their length.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ..core.checks import DTYPES, check_device, check_dtype
from ..core.launch import accumulator_torch, as_rows
from ..core.op import define_op
from .chunked import Gradients, add_dhidden, add_dweight, chunk_size, chunks, max_kept_rows, unscaled
from .rows import Targets, check_on_cpu, gradient_scale, launch_reduce, padded, scaled, targets_of

__all__ = ["linear_cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    class_weights: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float
    out_dtype: torch.dtype

    def targets(self, kept: bool = False) -> Targets:
        return targets_of(
            self.labels, self.class_weights, self.ignore_index, self.label_smoothing, self.weight.dtype, kept=kept
        )

    def products(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias


class Needs(NamedTuple):
    """Which gradients are asked for."""

    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool


Found = tuple[Tensor, Tensor, Tensor]  # dhidden, dweight, dbias; empty where not asked for


def _reduced(losses: Tensor, targets: Targets, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The loss, and its derivative with respect to a row's loss."""
    loss, scale = losses.new_empty((), dtype=inputs.out_dtype), losses.new_empty(())
    launch_reduce(losses, targets, inputs.weight.shape[0], inputs.reduction, loss, scale)
    return loss, scale


def _row_losses(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    labels = inputs.labels
    if not labels.is_cuda:
        check_on_cpu(labels, inputs.weight.shape[0], inputs.ignore_index)
    return torch.empty(labels.shape, dtype=dtype, device=labels.device)


def _allocate_scalars(inputs: Inputs) -> tuple[Tensor, Tensor]:
    weight = inputs.weight
    return weight.new_empty((), dtype=inputs.out_dtype), weight.new_empty((), dtype=accumulator_torch(weight.dtype))


def _allocate_gradients(hidden: Tensor, weight: Tensor, needs: Needs) -> Found:
    dhidden = hidden.new_empty(hidden.shape if needs.needs_hidden else 0)
    dweight = weight.new_empty(weight.shape if needs.needs_weight else 0)
    return dhidden, dweight, weight.new_empty(weight.shape[0] if needs.needs_bias else 0)


def _by_name(found: Found) -> dict[str, Tensor]:
    return dict(zip(Inputs._fields[:3], found, strict=True))


# 1. Only losses in the forward: inference, and reduction "none".


def _launch_losses(inputs: Inputs) -> Tensor:
    dtype, none = inputs.weight.dtype, inputs.reduction == "none"
    targets = inputs.targets()
    losses = _row_losses(inputs, inputs.out_dtype if none else accumulator_torch(dtype))
    for _ in chunks(*inputs.products(), targets, losses=losses):
        pass
    if none:
        launch_reduce(losses, targets, inputs.weight.shape[0], inputs.reduction, None, None)
        return losses
    return _reduced(losses, targets, inputs)[0]


def _allocate_losses(inputs: Inputs) -> Tensor:
    return inputs.hidden.new_empty(inputs.labels.shape if inputs.reduction == "none" else (), dtype=inputs.out_dtype)


def _launch_losses_backward(dlosses: Tensor, inputs: Inputs, needs: Needs) -> Found:
    hidden, weight, bias = inputs.products()
    size, dtype = chunk_size(hidden, weight), weight.dtype
    sums = dtype if hidden.shape[0] <= size else accumulator_torch(dtype)
    found = Gradients(hidden, weight, needs, sums, 1.0, size)
    for dlogits in chunks(hidden, weight, bias, inputs.targets(), dlosses=dlosses, gradient=True):
        found.add(dlogits)
    return found.dhidden, found.dweight.to(dtype), found.dbias.to(dtype)


def _allocate_losses_backward(dlosses: Tensor, inputs: Inputs, needs: Needs) -> Found:
    return _allocate_gradients(inputs.hidden, inputs.weight, needs)


def _save_losses(inputs: Inputs, losses: Tensor) -> Inputs:
    return inputs


def _gradients_losses(backward, dlosses: Tensor, saved: Inputs, needs: Inputs) -> dict[str, Tensor]:
    return _by_name(backward(dlosses, saved, Needs(*needs[:3])))


# 2. Few rows: dlogits are kept, and the backward multiplies.


class Kept(NamedTuple):
    scale: Tensor
    dlogits: Tensor
    hidden: Tensor
    weight: Tensor


def _launch_kept(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    weight, targets = inputs.weight, inputs.targets(kept=True)
    losses = _row_losses(inputs, accumulator_torch(weight.dtype))
    dlogits = torch.empty((inputs.hidden.shape[0], padded(weight.shape[0])), dtype=weight.dtype, device=weight.device)
    options = {"losses": losses, "gradient": True, "scale": gradient_scale(weight.dtype), "buffer": dlogits}
    for _ in chunks(*inputs.products(), targets, **options):
        pass
    return *_reduced(losses, targets, inputs), dlogits


def _allocate_kept(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    dlogits = inputs.weight.new_empty(inputs.hidden.shape[0], padded(inputs.weight.shape[0]))
    return *_allocate_scalars(inputs), dlogits


def _launch_kept_backward(dloss: Tensor, kept: Kept, needs: Needs) -> Found:
    scale, dlogits, hidden, weight = kept
    dtype, alpha = weight.dtype, 1.0 / gradient_scale(weight.dtype)
    dlogits = dlogits[:, : weight.shape[0]]
    dweight, dhidden, dbias = (hidden.new_empty(0) for _ in range(3))
    if needs.needs_weight:  # first, so that the scaled rows and dhidden are not in memory together
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        add_dweight(dweight, weight, dlogits, scaled(hidden, dloss, scale, dtype), alpha, True)
    if needs.needs_hidden:
        dhidden = hidden.new_empty(hidden.shape)
        add_dhidden(dhidden, dlogits, weight, alpha)
        dhidden = scaled(dhidden, dloss, scale, dtype, in_place=True)
    if needs.needs_bias:
        dbias = scaled(unscaled(torch.sum(dlogits, 0, dtype=scale.dtype), alpha), dloss, scale, dtype)
    return dhidden, dweight, dbias


def _allocate_kept_backward(dloss: Tensor, kept: Kept, needs: Needs) -> Found:
    return _allocate_gradients(kept.hidden, kept.weight, needs)


def _save_kept(inputs: Inputs, loss: Tensor, scale: Tensor, dlogits: Tensor) -> Kept:
    return Kept(scale, dlogits, inputs.hidden, inputs.weight)


def _gradients_kept(backward, dloss: Tensor, saved: Kept, needs: Inputs) -> dict[str, Tensor]:
    return _by_name(backward(dloss, saved, Needs(*needs[:3])))


# 3. Many rows: the forward sums gradients over chunks, and the backward scales them.


class Formed(NamedTuple):
    scale: Tensor
    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor


def _launch_formed(inputs: Inputs, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, _ = inputs.products()
    sums, factor, targets = accumulator_torch(weight.dtype), gradient_scale(weight.dtype), inputs.targets(kept=True)
    losses = _row_losses(inputs, sums)
    found = Gradients(hidden, weight, needs, sums, factor, chunk_size(hidden, weight))
    for dlogits in chunks(*inputs.products(), targets, losses=losses, gradient=True, scale=factor):
        found.add(dlogits)
    return *_reduced(losses, targets, inputs), found.dhidden, found.dweight, found.dbias


def _allocate_formed(inputs: Inputs, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = accumulator_torch(inputs.weight.dtype)
    dhidden, dweight, dbias = _allocate_gradients(inputs.hidden, inputs.weight, needs)
    return *_allocate_scalars(inputs), dhidden, dweight.to(sums), dbias.to(sums)


def _launch_formed_backward(dloss: Tensor, formed: Formed) -> Found:
    scale, *sums = formed
    return tuple(scaled(x, dloss, scale, formed.dhidden.dtype) for x in sums)


def _allocate_formed_backward(dloss: Tensor, formed: Formed) -> Found:
    _, *sums = formed
    return tuple(x.new_empty(x.shape, dtype=formed.dhidden.dtype) for x in sums)


def _save_formed(inputs: Inputs, needs: Needs, loss: Tensor, *kept: Tensor) -> Formed:
    return Formed(*kept)


def _gradients_formed(backward, dloss: Tensor, saved: Formed, needs: Inputs) -> dict[str, Tensor]:
    return _by_name(backward(dloss, saved))


_losses = define_op(
    "linear_cross_entropy_losses",
    (_launch_losses, _allocate_losses),
    (_launch_losses_backward, _allocate_losses_backward),
    _save_losses,
    _gradients_losses,
)
_kept = define_op(
    "linear_cross_entropy_kept",
    (_launch_kept, _allocate_kept),
    (_launch_kept_backward, _allocate_kept_backward),
    _save_kept,
    _gradients_kept,
)
_formed = define_op(
    "linear_cross_entropy_formed",
    (_launch_formed, _allocate_formed),
    (_launch_formed_backward, _allocate_formed_backward),
    _save_formed,
    _gradients_formed,
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
        hidden: [..., H]. fp64 (on a GPU computed by plain PyTorch), fp32, fp16 or bf16, any strides.
        weight: [V, H], in the dtype of hidden, as is the bias: the caller casts for autocast.
        bias: [V], or None.
        labels: [...], int64: a class from 0 to V - 1, or ignore_index.
        class_weights: [V], torch's `weight`: how much a row with that label counts. fp64, fp32, fp16 or bf16, whatever the
            dtype of hidden; it has no gradient, as in torch.
        ignore_index: the label of rows without loss and gradient.
        reduction: "mean", the sum of losses over the sum of the weights (or the number) of the rows that are not ignored; "sum"
            or "none". A mean over no row is NaN, and its gradients are 0. Over rows whose weights are all 0 both are NaN, also
            the gradients of ignored rows, which torch leaves 0.
        label_smoothing: the share of the target that is spread over all classes.
        out_dtype: dtype of the loss; by default that of hidden. Gradients do not depend on it.

    Returns:
        [], or [...] for reduction "none".

    Raises:
        ValueError: shapes or devices that do not fit, a dtype without a kernel, class weights that require a gradient, an
            unknown reduction, a smoothing outside [0, 1].
        IndexError: on a CPU, a label that is no class. On a GPU a device assertion fails instead, as in torch.
    """
    _check(hidden, weight, bias, labels, class_weights, reduction, label_smoothing, out_dtype or hidden.dtype)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    rows, targets = as_rows(hidden), labels.reshape(-1).contiguous()
    settings = (ignore_index, reduction, float(label_smoothing), out_dtype or hidden.dtype)
    inputs = Inputs(rows, weight, bias, targets, class_weights, *settings)
    if reduction == "none":
        return _losses(inputs).view(labels.shape)
    if not any(needs):
        return _losses(inputs)
    # False while a compiler traces with an unknown length.
    if guard_or_false(rows.shape[0] <= max_kept_rows(*weight.shape, weight.dtype)):
        return _kept(inputs)[0]
    return _formed(inputs, Needs(*needs))[0]


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
