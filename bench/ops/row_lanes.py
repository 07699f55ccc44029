"""Peers of the ops over rows: Liger's LayerNorm."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.core.peers import require
from bench.ops.grid import Case, Function, Inputs, Lane

EPS = 1e-12  # BERT's


def _liger_layer_norm(before: Callable[..., Tensor], dropout: bool) -> Lane:
    """Liger's LayerNorm after the eager operations that precede it."""

    def build(case: Case) -> Function:
        require("liger")
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        def call(inputs: Inputs, p: float) -> Tensor:
            leaves: dict[str, Any] = dict(inputs.leaves)
            weight, bias = leaves.pop("weight"), leaves.pop("bias")
            x = before(**leaves, p=p) if dropout else before(**leaves)
            return LigerLayerNormFunction.apply(x, weight, bias, EPS)

        return call

    return Lane(build)


def _dropped_sum(x: Tensor, residual: Tensor, x_bias: Tensor, p: float) -> Tensor:
    return F.dropout(x + x_bias, p) + residual


def _activated(x: Tensor, x_bias: Tensor) -> Tensor:
    return F.gelu(x + x_bias)


DROPOUT_ADD_LAYERNORM = {"liger": _liger_layer_norm(_dropped_sum, dropout=True)}
GELU_LAYERNORM = {"liger": _liger_layer_norm(_activated, dropout=False)}
