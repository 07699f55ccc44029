"""Decides which modules of a layer may be called with packed tokens [1, T, H] instead of a batch [B, S, H].

Only modules known to work row by row may. A module that is not (a user's module in place of a Linear, a replaced forward)
keeps the batch padded.
"""

from torch import nn

from fastbert.dispatch import class_forward_replaced, hooked
from fastbert.layers import stock

# A layer's own parts, each with the part whose code (in `stock.CODE`) must be tested. Of self-attention only the fast class.
_PARTS = {
    "Layer": "Encoder",
    "Attention": "Encoder",
    "SelfAttention": "SelfAttention",
    "SelfOutput": "SelfOutput",
    "Intermediate": "Intermediate",
    "Output": "Output",
    "FFN": "FFN",
}
_TORCH = (
    *(nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity),
    *(nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Mish, nn.Hardtanh, nn.ReLU6),
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
)
# Modules (by prefix) of activations, and of replacements of a Linear: adapters, quantized weights, parametrisations.
_LIBRARIES = (
    "transformers.activations",
    "peft.",
    "bitsandbytes.",
    "torchao.",
    "torch.ao.nn.",
    "torch.nn.utils.parametrize",
)


def row_reason(module: nn.Module) -> str | None:
    """Why `module` may not be called with packed tokens, or None."""
    cls = type(module)
    if hooked(module):
        return "a layer with hooks"
    family, part, fast = stock.part_of(cls)
    if part in _PARTS and (fast or part != "SelfAttention"):
        return stock.untested(family.name(_PARTS[part]))
    if not (cls in _TORCH or cls.__module__.startswith(_LIBRARIES)) or class_forward_replaced(cls):
        return f"a layer with a {cls.__name__} that is not known to work row by row"
    return None
