"""Layers that `kernels.kernelize` puts in place of transformers' activations, by the names that these carry.

A layer has a forward and nothing else, which runs with the replaced module as `self`. For an input that the
kernel does not take it computes what the replaced module does.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.bias_gelu import bias_gelu
from ..kernels.core.launch import INTERPRETED

__all__ = ["FastGELU", "GeLU", "GeluTanh", "NewGELU", "SiLU"]


class GeLU(nn.Module):
    """The exact GELU: transformers' GELUActivation, hidden_act="gelu"."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return bias_gelu(input, activation="gelu") if _takes(input) else F.gelu(input)


class GeluTanh(nn.Module):
    """GELU by tanh: transformers' GELUTanh, hidden_act="gelu_pytorch_tanh"."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return bias_gelu(input, activation="gelu_tanh") if _takes(input) else F.gelu(input, approximate="tanh")


class NewGELU(nn.Module):
    """GELU by tanh: transformers' NewGELUActivation, hidden_act="gelu_new"."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        if _takes(input):
            return bias_gelu(input, activation="gelu_tanh")
        return 0.5 * input * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (input + 0.044715 * input.pow(3.0))))


class FastGELU(nn.Module):
    """GELU by tanh: transformers' FastGELUActivation, hidden_act="gelu_fast"."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        if _takes(input):
            return bias_gelu(input, activation="gelu_tanh")
        return 0.5 * input * (1.0 + torch.tanh(input * 0.7978845608 * (1.0 + 0.044715 * input * input)))


class SiLU(nn.Module):
    """SiLU: transformers' SiLUActivation, hidden_act="silu"."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        return bias_gelu(input, activation="silu") if _takes(input) else F.silu(input)


def _takes(x: Tensor) -> bool:
    """Whether the kernel computes this input: on an NVIDIA GPU, or in Triton's interpreter, and under no function transform."""
    if x.dim() == 0 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if not (x.is_cuda and torch.version.hip is None) and not (INTERPRETED and x.dtype != torch.bfloat16):
        return False
    if torch.compiler.is_compiling():
        return True
    plain = type(x) in (Tensor, nn.Parameter) and not torch.jit.is_tracing()
    # torch's stubs of its extension leave this module out.
    transformed = torch._C._functorch.maybe_current_level() is not None  # pyright: ignore[reportAttributeAccessIssue]
    return plain and not transformed and torch.autograd.forward_ad._current_level < 0
