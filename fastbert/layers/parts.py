"""Helpers shared by the fast layers: products without bias, and checks of LayerNorm, dropout and activation."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations

from fastbert import ops
from fastbert.dispatch import is_plain, is_plain_tensor, register_library_classes

# By name: not every supported transformers release has every class.
_ACTIVATION_CLASSES = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
}
_BY_CLASS = {
    getattr(activations, name): kernel for name, kernel in _ACTIVATION_CLASSES.items() if hasattr(activations, name)
} | {nn.ReLU: "relu", nn.SiLU: "silu"}
register_library_classes(nn.GELU, *_BY_CLASS)
_BY_FUNCTION = {F.gelu: "gelu", F.relu: "relu", torch.relu: "relu", F.silu: "silu"}


def kernel_activation(function: object) -> str | None:
    """The kernels' name for a model's activation (a module or a function), or None if they do not have it."""
    if not isinstance(function, nn.Module):
        return next((name for known, name in _BY_FUNCTION.items() if function is known), None)  # some are unhashable
    if not is_plain(function, type(function)):
        return None
    if type(function) is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    kernel = _BY_CLASS.get(type(function))
    return kernel if kernel is None or _acts_as_made(function, kernel) else None


def _acts_as_made(function: nn.Module, kernel: str) -> bool:
    """Whether the attribute `act`, which transformers' GELUs call, is still what their class sets."""
    act = getattr(function, "act", None)
    if act is None or (act is F.gelu and kernel == "gelu"):
        return True
    if isinstance(act, partial):
        return act.func is F.gelu and kernel == "gelu_tanh" and act.keywords == {"approximate": "tanh"}
    own = getattr(type(function), getattr(act, "__name__", ""), None)  # a method with the formula in Python
    return own is not None and getattr(act, "__func__", None) is own


def activation_reason(function: object) -> str | None:
    """Why this activation stays stock, or None."""
    if kernel_activation(function) is not None:
        return None
    if type(function) is nn.GELU or type(function) in _BY_CLASS:
        return f"activation {type(function).__name__} has hooks, or a replaced function"
    name = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", function)
    return f"activation {name} has no kernel"


def layernorm_reason(norm: nn.Module) -> str | None:
    """Why this LayerNorm stays stock, or None."""
    if not is_plain(norm, nn.LayerNorm):
        return f"LayerNorm is a {type(norm).__name__}, or has hooks"
    if norm.weight is None or norm.bias is None:
        return "LayerNorm without weight or bias"
    if len(norm.normalized_shape) != 1 or norm.normalized_shape[0] > ops.MAX_WIDTH:
        return f"LayerNorm over {norm.normalized_shape}: the kernels take one axis of up to {ops.MAX_WIDTH}"
    return None


UNKNOWN_ARGUMENTS = "arguments that the tested forwards do not take"


def bind_arguments(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """The arguments with exactly these names, in order; None if the call has others, as an untested forward may."""
    if not kwargs and len(args) == len(names):
        return args
    by_name = dict(zip(names, args, strict=False)) | kwargs
    exactly = len(args) + len(kwargs) == len(names) and by_name.keys() == set(names)
    return tuple(by_name[name] for name in names) if exactly else None


def dropout_reason(dropout: nn.Module) -> str | None:
    """Why this dropout stays stock, or None."""
    return None if is_plain(dropout, nn.Dropout) else f"dropout is a {type(dropout).__name__}, or has hooks"


def linear_without_bias(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The product of a Linear without its bias, and the bias for the next kernel to add.

    A Linear that is not a plain nn.Linear (LoRA, 4-bit, DTensor, parametrised, hooked) is called as a module; the bias is
    then included and the second result None.
    """
    if is_plain(linear, nn.Linear) and is_plain_tensor(linear.weight):
        return F.linear(x, linear.weight), linear.bias
    return linear(x), None


def layernorm_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The dtype that nn.LayerNorm returns for `dtype`: autocast runs it in float32 on CUDA and does not cast it on the CPU."""
    if device_type == "cuda" and torch.is_autocast_enabled("cuda") and dtype != torch.float64:
        return torch.float32
    return dtype
