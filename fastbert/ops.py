"""Re-exports the public functions of the kernels. `MISSING` is the reason if triton is too old or cannot be imported."""

from importlib import metadata
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

MISSING: str | None = None
INTERPRETED = False
MAX_WIDTH = 0

MAX_HEAD_SIZE = 0
# The triton of torch 2.9, the oldest supported torch. Older ones miscompile the kernels or do not compile them.
OLDEST_TRITON = (3, 5)


def check_triton() -> None:
    """Raise ImportError if triton is too old. A triton of unknown version is accepted."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # under another name, or not installed: the import below decides
        return
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if len(numbers) == 2 and numbers < OLDEST_TRITON:
        raise ImportError(f"triton {version} is too old, {'.'.join(map(str, OLDEST_TRITON))} or newer is needed")


try:
    check_triton()
    from fastbert.kernels.attention import attention, bounds_of
    from fastbert.kernels.attention.checks import MAX_HEAD_SIZE
    from fastbert.kernels.bias_gelu import bias_gelu
    from fastbert.kernels.core import failures
    from fastbert.kernels.core.checks import MAX_WIDTH
    from fastbert.kernels.core.failures import KernelFailed
    from fastbert.kernels.core.launch import INTERPRETED
    from fastbert.kernels.dropout_add_layernorm import dropout_add_layernorm
    from fastbert.kernels.embedding_layernorm import embed, embedding_layernorm
    from fastbert.kernels.encoder_layer import KERNELS as LAYER_KERNELS
    from fastbert.kernels.encoder_layer import Layout, Settings, Twins, Weights
    from fastbert.kernels.encoder_layer import unchecked as encoder_layer
    from fastbert.kernels.gather_rows import gather_rows
    from fastbert.kernels.gelu_layernorm import gelu_layernorm
    from fastbert.kernels.linear_cross_entropy import linear_cross_entropy
    from fastbert.kernels.packed_rows import packed_rows
    from fastbert.kernels.pool_rows import pool_rows
    from fastbert.kernels.row_counts import row_counts
except ImportError as error:
    MISSING = f"the kernels cannot be imported: {error}"
    if not TYPE_CHECKING:  # who calls a kernel has seen that MISSING is None
        attention = bounds_of = bias_gelu = dropout_add_layernorm = gather_rows = gelu_layernorm = linear_cross_entropy = None
        encoder_layer = KernelFailed = LAYER_KERNELS = Layout = Settings = Twins = Weights = None
        embed = embedding_layernorm = failures = packed_rows = pool_rows = row_counts = None

# Required alignment, in bytes, of an address that bound kernels read. safetensors maps files without alignment.
ALIGNMENT = 1 if INTERPRETED else 16

_bounds = WeakTensorKeyDictionary()


def key_bounds(key_mask: Tensor) -> Tensor:
    """`bounds_of(key_mask)`, computed once for all layers that get the same tensor."""
    if torch.compiler.is_compiling():
        return bounds_of(key_mask)
    bounds = _bounds.get(key_mask)
    if bounds is None:
        bounds = _bounds[key_mask] = bounds_of(key_mask)
    return bounds


__all__ = [
    "INTERPRETED",
    "LAYER_KERNELS",
    "MAX_HEAD_SIZE",
    "MAX_WIDTH",
    "MISSING",
    "KernelFailed",
    "Layout",
    "Settings",
    "Twins",
    "Weights",
    "attention",
    "bias_gelu",
    "dropout_add_layernorm",
    "embed",
    "embedding_layernorm",
    "encoder_layer",
    "failures",
    "gather_rows",
    "gelu_layernorm",
    "key_bounds",
    "linear_cross_entropy",
    "packed_rows",
    "pool_rows",
    "row_counts",
]
