"""The lanes of the ops over rows: dropout_add_layernorm, bias_gelu, gelu_layernorm."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.peers import require
from bench.ops.grid import Case, Function, Inputs, Lane, Op
from fastbert.kernels import reference
from fastbert.kernels.bias_gelu import bias_gelu
from fastbert.kernels.dropout_add_layernorm import dropout_add_layernorm
from fastbert.kernels.gelu_layernorm import gelu_layernorm

EPS = 1e-12  # BERT's


def _make(rows: tuple[str, ...], vectors: tuple[str, ...], widen: int = 1) -> Callable[..., Inputs]:
    """Normal inputs of [batch, seqlen, widen x hidden] and [widen x hidden]; LayerNorm's weight round 1."""

    def make(case: Case, generator: torch.Generator, device: str) -> Inputs:
        width = widen * case.hidden

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        leaves = {name: normal(case.batch, case.seqlen, width) for name in rows} | {n: normal(width) for n in vectors}
        if "weight" in leaves:
            leaves["weight"] = 1.0 + 0.3 * leaves["weight"]
        return Inputs(leaves, {}, normal(case.batch, case.seqlen, width))

    return make


def _of(call: Callable[..., Tensor]) -> Lane:
    """A lane that passes the leaves by name, and p where the op has dropout."""

    def build(case: Case) -> Function:
        return lambda inputs, p: call(**inputs.leaves, **({"p": p} if case.op == "dropout_add_layernorm" else {}))

    return Lane(build)


def _compiled(call: Callable[..., Tensor]) -> Lane:
    def build(case: Case) -> Function:
        # Without a GPU the tracing is what a dry run tries; generating C++ would take most of its time.
        backend = "inductor" if torch.cuda.is_available() else "aot_eager"
        return _of(torch.compile(call, dynamic=False, backend=backend)).build(case)

    return Lane(build)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _eager_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor, p: float = 0.0) -> Tensor:
    """As BertSelfOutput computes it: the product's bias, dropout, the sum, LayerNorm."""
    return _layer_norm(F.dropout(x + x_bias, p) + residual, weight, bias)


def _liger_layer_norm(before: Callable[..., Tensor], dropout: bool) -> Lane:
    """Liger's LayerNorm behind what comes before it in eager."""

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


OPS = {
    "dropout_add_layernorm": Op(
        _make(("x", "residual"), ("weight", "bias", "x_bias")),
        lambda inputs, p: reference.dropout_add_layernorm(**inputs.leaves),
        {
            "eager": _of(_eager_residual),
            "compile": _compiled(_eager_residual),
            "liger": _liger_layer_norm(_dropped_sum, dropout=True),
            "fastbert": _of(dropout_add_layernorm),
        },
        dropout=True,
    ),
    "bias_gelu": Op(
        _make(("x",), ("bias",), widen=4),
        lambda inputs, p: reference.bias_gelu(**inputs.leaves),
        {"eager": _of(reference.bias_gelu), "compile": _compiled(reference.bias_gelu), "fastbert": _of(bias_gelu)},
    ),
    "gelu_layernorm": Op(
        _make(("x",), ("weight", "bias", "x_bias")),
        lambda inputs, p: reference.gelu_layernorm(**inputs.leaves),
        {
            "eager": _of(reference.gelu_layernorm),
            "compile": _compiled(reference.gelu_layernorm),
            "liger": _liger_layer_norm(_activated, dropout=False),
            "fastbert": _of(gelu_layernorm),
        },
    ),
}
