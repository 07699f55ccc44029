"""What the ops' twins share: the fallbacks in plain PyTorch that run where a kernel cannot (failures.py).

A twin stands beside its launcher, takes the same arguments, returns the same types and draws the same dropout bits. Twins
favour correctness: they compute in the kernel's accumulation type, with every intermediate in memory. Derivatives are written
out, because autograd is off inside a custom op.
"""

import torch
from torch import Tensor


def upcast(x: Tensor) -> Tensor:
    """x in the type that kernels compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def column_sum(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).sum(0)


def activation_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, x, 0)
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh" if activation == "gelu_tanh" else "none")


def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and 1 / sqrt(variance + eps) of each row, computed in the dtype of x."""
    mean = x.mean(-1)
    centred = x - mean[..., None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd[..., None] * upcast(weight) + upcast(bias)
    return y.to(out_dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def layernorm_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy = upcast(dy).to(x.dtype)
    normal = (x - mean[..., None]) * rstd[..., None]
    wdy = dy * weight.to(x.dtype)
    dx = (wdy - wdy.mean(-1, keepdim=True) - normal * (wdy * normal).mean(-1, keepdim=True)) * rstd[..., None]
    return dx, column_sum(dy * normal), column_sum(dy)
