"""What the ops' twins in plain PyTorch share: the twins are what runs where a kernel cannot (failures.py).

A twin stands beside its op, takes what the launcher takes and returns what that returns, of the same types, from dropout's
same bits. Twins are written for being right: in the type that the kernel computes in, with every intermediate in memory. No
derivative is taken by autograd here, which is off inside a custom op.
"""

import torch
from torch import Tensor


def raised(x: Tensor) -> Tensor:
    """In the type that kernels compute in."""
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
    """y, mean and 1 / standard deviation of rows in the type that they are computed in."""
    mean = x.mean(-1)
    centred = x - mean[..., None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd[..., None] * raised(weight) + raised(bias)
    return y.to(out_dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def layernorm_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy = raised(dy).to(x.dtype)
    normal = (x - mean[..., None]) * rstd[..., None]
    wdy = dy * weight.to(x.dtype)
    dx = (wdy - wdy.mean(-1, keepdim=True) - normal * (wdy * normal).mean(-1, keepdim=True)) * rstd[..., None]
    return dx, column_sum(dy * normal), column_sum(dy)
