"""Every op in plain PyTorch: the specification that tests, benchmarks and readers share.

Each function has the signature and the meaning of the kernel's public function of the same name. Dropout is
the exception that proves nothing by itself: a reference takes the keep mask that the kernel drew.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def dropout_add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-12,
    p: float = 0.0,
    out_dtype: torch.dtype | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual); `keep` (bool, shape of x) says what dropout kept."""
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if p > 0.0:
        x = torch.where(keep, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)
    return _layer_norm(x + residual, weight, bias, eps, out_dtype)


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, activation: str = "gelu") -> Tensor:
    """activation(x + bias)."""
    return ACTIVATIONS[activation](x if bias is None else x + bias.to(x.dtype))


def gelu_layernorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    activation: str = "gelu",
    eps: float = 1e-12,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm(activation(x + x_bias))."""
    return _layer_norm(bias_gelu(x, x_bias, activation=activation), weight, bias, eps, out_dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None) -> Tensor:
    x = x.to(out_dtype or x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps)
