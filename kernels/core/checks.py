"""Argument checks of the public functions: each error names the argument, what is expected and what came."""

import torch
from torch import Tensor

MAX_WIDTH = 8192  # a row is one tile; wider tiles would spill
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a dtype without a kernel; results of an integer dtype would silently be rounded."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: expected float64, float32, float16 or bfloat16, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor | None, like: Tensor) -> None:
    """Raise ValueError unless `tensor` is None or on the device of `like`: kernels receive its address."""
    if tensor is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {tensor.device}")


def check_layernorm(x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None) -> None:
    """Raise ValueError unless x is [..., H] with H <= MAX_WIDTH and the vectors are [H]."""
    check_dtype("x", x)
    if x.dim() == 0 or x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x: expected [..., H] with H <= {MAX_WIDTH}, got {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        check_vector(name, vector, x)


def check_vector(name: str, vector: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless `vector` is None or has one element per column of x, on its device."""
    if vector is None:
        return
    check_dtype(name, vector)
    check_device(name, vector, x)
    if vector.shape != x.shape[-1:]:
        raise ValueError(f"{name}: expected shape {tuple(x.shape[-1:])}, got {tuple(vector.shape)}")


ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def check_activation(activation: str) -> None:
    """Raise ValueError for an activation without a kernel."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
