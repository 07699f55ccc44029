"""The kernels' public functions; or, where triton cannot be imported, the reason that there are none."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

MISSING: str | None = None
INTERPRETED = False
MAX_WIDTH = 0

MAX_HEAD_SIZE = 0

try:
    from fastbert.kernels.attention import attention, bounds_of
    from fastbert.kernels.attention_checks import MAX_HEAD_SIZE
    from fastbert.kernels.bias_gelu import bias_gelu
    from fastbert.kernels.dropout_add_layernorm import dropout_add_layernorm
    from fastbert.kernels.embedding_layernorm import embedding_layernorm
    from fastbert.kernels.gather_rows import gather_rows
    from fastbert.kernels.gelu_layernorm import gelu_layernorm
    from fastbert.kernels.launch import INTERPRETED, MAX_WIDTH
    from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
except ImportError as error:
    MISSING = f"the kernels cannot be imported: {error}"
    attention = bounds_of = bias_gelu = dropout_add_layernorm = gather_rows = gelu_layernorm = linear_cross_entropy = None
    embedding_layernorm = None

_bounds = WeakTensorKeyDictionary()


def key_bounds(key_mask: Tensor) -> Tensor:
    """`bounds_of` a mask, worked out once for all the layers that are given the same tensor."""
    if torch.compiler.is_compiling():
        return bounds_of(key_mask)
    if key_mask not in _bounds:
        _bounds[key_mask] = bounds_of(key_mask)
    return _bounds[key_mask]


__all__ = [
    "INTERPRETED",
    "MAX_HEAD_SIZE",
    "MAX_WIDTH",
    "MISSING",
    "attention",
    "bias_gelu",
    "dropout_add_layernorm",
    "embedding_layernorm",
    "gather_rows",
    "gelu_layernorm",
    "key_bounds",
    "linear_cross_entropy",
]
