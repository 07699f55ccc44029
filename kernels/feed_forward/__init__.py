"""y = activation(x weight' + bias) output_weight': BERT's feed-forward without its last bias, which LayerNorm's kernel adds.

x [..., H], weight [F, H], bias [F], output_weight [O, F]; T rows:

    forward    2TF(H + O) operations: a product, the activation, a product
    backward   twice that, and the bias gradient

Saved: x and h = x weight' [T, F]; the backward recomputes the activation's output. The products are cuBLAS's and the activation
is bias_gelu's kernel. Where configs.FUSED says so, product and activation are one kernel (products.py): the activation is the
epilogue of the first product, its slope that of the product in the backward.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from .. import bias_gelu
from ..core.checks import check_activation, check_device, check_dtype, check_vector
from ..core.failures import or_plain
from ..core.launch import accumulator_torch, as_rows
from ..core.op import define_op
from .products import GRADIENT, PRODUCT, is_on, rows_of_sums, work

__all__ = ["feed_forward"]


def _plain_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    h = F.linear(x, weight)
    return bias_gelu.plain_forward(bias_gelu.Inputs(h, bias, activation)), h if save else x.new_empty(0)


@or_plain(_plain_product)
def _launch_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    h = torch.empty_like(y) if save else None
    work(PRODUCT, *x.shape, weight.shape[0], x, activation).launch(
        x, x_ptr=x, weight_ptr=weight, bias_ptr=bias, h_ptr=h, y_ptr=y
    )
    return y, x.new_empty(0) if h is None else h


def _plain_gradient(dout: Tensor, output_weight: Tensor, middle: bias_gelu.Inputs) -> tuple[Tensor, Tensor, Tensor]:
    dh, dbias = bias_gelu.plain_backward(torch.mm(dout, output_weight), middle, True)
    return dh, bias_gelu.plain_forward(middle), dbias


@or_plain(_plain_gradient)
def _launch_gradient(dout: Tensor, output_weight: Tensor, middle: bias_gelu.Inputs) -> tuple[Tensor, Tensor, Tensor]:
    h, bias, activation = middle
    dh, y = torch.empty_like(h), torch.empty_like(h)
    sums = h.new_empty(rows_of_sums(*h.shape, h), h.shape[1], dtype=accumulator_torch(h.dtype))
    work(GRADIENT, *dout.shape, h.shape[1], h, activation).launch(
        h, dout_ptr=dout, weight_ptr=output_weight, bias_ptr=bias, h_ptr=h, dh_ptr=dh, y_ptr=y, sums_ptr=sums
    )
    return dh, y, sums.sum(0)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    output_weight: Tensor
    activation: str
    product_on: bool
    gradient_on: bool
    save: bool


class Saved(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    output_weight: Tensor
    h: Tensor
    activation: str
    gradient_on: bool


class Needs(NamedTuple):
    """Which gradients are asked for, besides the bias'."""

    needs_x: bool
    needs_weight: bool
    needs_output: bool


def _launch_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x, weight, bias, output_weight, activation, product_on, _, save = inputs
    with torch.autocast(x.device.type, enabled=False):
        if product_on:
            y, h = _launch_product(*map(_aligned, (x, weight, bias)), activation, save)
        else:
            h = F.linear(x, weight)
            y = bias_gelu.launch_forward(bias_gelu.Inputs(h, bias, activation))
        return F.linear(y, output_weight), h if save else x.new_empty(0)


def _allocate_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    x, inner = inputs.x, inputs.weight.shape[0]
    h = x.new_empty(x.shape[0], inner) if inputs.save else x.new_empty(0)
    return x.new_empty(x.shape[0], inputs.output_weight.shape[0]), h


def _launch_backward(dout: Tensor, saved: Saved, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, bias, output_weight, h, activation, gradient_on = saved
    with torch.autocast(x.device.type, enabled=False):
        if gradient_on:
            dout, output_weight, bias, h = map(_aligned, (dout, output_weight, bias, h))
            dh, y, dbias = _launch_gradient(dout, output_weight, bias_gelu.Inputs(h, bias, activation))
        else:
            middle = bias_gelu.Inputs(h, bias, activation)
            dh, dbias = bias_gelu.launch_backward(torch.mm(dout, output_weight), middle, bias is not None)
            y = bias_gelu.launch_forward(middle) if needs.needs_output else h
        dx = torch.mm(dh, weight) if needs.needs_x else x.new_empty(0)
        dweight = torch.mm(dh.t(), x) if needs.needs_weight else x.new_empty(0)
        return dx, dweight, dbias, torch.mm(dout.t(), y) if needs.needs_output else x.new_empty(0)


def _allocate_backward(dout: Tensor, saved: Saved, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = saved.weight.new_empty(saved.weight.shape[0], dtype=accumulator_torch(saved.x.dtype))
    like = saved.x, saved.weight, saved.output_weight
    dx, dweight, doutput = (t.new_empty(t.shape if needed else 0) for t, needed in zip(like, needs, strict=True))
    return dx, dweight, dbias, doutput


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """Contiguous and aligned to 16 bytes, as tiles are loaded."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _save(inputs: Inputs, y: Tensor, h: Tensor) -> Saved:
    return Saved(*inputs[:4], h, inputs.activation, inputs.gradient_on)


def _gradients(backward, dout: Tensor, saved: Saved, needs: Inputs) -> dict[str, Tensor]:
    found = backward(dout, saved, Needs(needs.x, needs.weight, needs.output_weight))
    return dict(zip(Inputs._fields[:4], found, strict=True))


_call = define_op(
    "feed_forward", (_launch_forward, _allocate_forward), (_launch_backward, _allocate_backward), _save, _gradients
)


def feed_forward(x: Tensor, weight: Tensor, bias: Tensor | None, output_weight: Tensor, *, activation: str = "gelu") -> Tensor:
    """activation(x weight' + bias) output_weight'.

    Args:
        x: [..., H]. fp64 (on a GPU computed by plain PyTorch), fp32, fp16 or bf16, any strides.
        weight: [F, H], in the dtype of x, as are the others: the caller casts for autocast.
        bias: [F], or None.
        output_weight: [O, F].
        activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".

    Returns:
        [..., O], contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a dtype or an activation without a kernel.
    """
    _check(x, weight, bias, output_weight, activation)
    tensors = x, weight, bias, output_weight
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    rows = as_rows(x)
    sizes = [weight.shape[1], weight.shape[0], output_weight.shape[0]]
    # False while a compiler traces with unknown sizes.
    known = guard_or_false(rows.shape[0] > 0)
    product_on = known and is_on(PRODUCT, x, rows.shape[0], sizes[0], sizes[1], activation)
    gradient_on = known and is_on(GRADIENT, x, rows.shape[0], sizes[2], sizes[1], activation)
    y, _ = _call(Inputs(rows, weight, bias, output_weight, activation, product_on, gradient_on, save))
    return y.view(*x.shape[:-1], output_weight.shape[0])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, output_weight: Tensor, activation: str) -> None:
    check_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected [..., H], got a tensor without dimensions")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight: expected [F, {x.shape[-1]}], got {tuple(weight.shape)}")
    if output_weight.dim() != 2 or output_weight.shape[1] != weight.shape[0]:
        raise ValueError(f"output_weight: expected [O, {weight.shape[0]}], got {tuple(output_weight.shape)}")
    check_vector("bias", bias, weight.t())
    for name, tensor in (("weight", weight), ("bias", bias), ("output_weight", output_weight)):
        check_device(name, tensor, x)
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")
    check_activation(activation)
