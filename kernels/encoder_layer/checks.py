"""The layer's argument checks: each error names the argument, what is expected and what came."""

import torch
from torch import Tensor

from ..attention.checks import check_inputs, check_masks
from ..core.checks import MAX_WIDTH, check_activation, check_device, check_dtype
from .settings import Layout, Settings, Weights


def check(
    x: Tensor,
    weights: Weights,
    settings: Settings,
    layout: Layout,
    product_dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
    seed: Tensor | None,
) -> None:
    """Raise ValueError unless all arguments fit x and the settings."""
    key_mask, key_bounds, cu_seqlens, max_seqlen, queries, cu_seqlens_q, max_seqlen_q, index, inverse = layout
    check_dtype("x", x)
    packed = cu_seqlens is not None
    if x.dim() != (2 if packed else 3) or not 1 <= x.shape[-1] <= MAX_WIDTH:
        expected = "[T, H]" if packed else "[B, S, H]"
        raise ValueError(f"x: expected {expected} with H from 1 to {MAX_WIDTH}, got {tuple(x.shape)}")
    _check_settings(settings, x.shape[-1])
    _check_weights(weights, x)
    for name, dtype in (("product_dtype", product_dtype), ("norm_dtype", norm_dtype)):
        if dtype is not None:
            check_dtype(name, torch.empty(0, dtype=dtype))
    _check_float64({"x": x.dtype, "weights": weights.query.dtype, "product_dtype": product_dtype, "norm_dtype": norm_dtype})
    if (queries is None) != (cu_seqlens_q is None):
        raise ValueError("queries: expected together with cu_seqlens_q, got only one of them")
    read = x
    if queries is not None:
        if not packed:
            raise ValueError("queries: expected None without cu_seqlens, got a tensor")
        check_device("queries", queries, x)
        if queries.dtype != x.dtype or queries.dim() != 2 or queries.shape[1] != x.shape[1]:
            raise ValueError(f"queries: expected {x.dtype} [N, {x.shape[1]}], got {queries.dtype} {tuple(queries.shape)}")
        read = queries
    q, k = (rows.detach().unflatten(-1, (settings.heads, -1)) for rows in (read, x))
    check_inputs(q, k, k, settings.scale, settings.attention_p, None, cu_seqlens, max_seqlen, cu_seqlens_q, max_seqlen_q)
    check_masks(q, k, key_mask, None, key_bounds)
    if index is not None or inverse is not None:
        _check_rows(index, inverse, x, packed and queries is None)
    check_device("seed", seed, x)
    if seed is not None and (seed.dtype != torch.int64 or tuple(seed.shape) != (6,)):
        raise ValueError(f"seed: expected int64 [6], got {seed.dtype} {list(seed.shape)}")


def _check_rows(index: Tensor | None, inverse: Tensor | None, x: Tensor, fits: bool) -> None:
    if index is None or inverse is None or not fits:
        raise ValueError("index: expected together with inverse and cu_seqlens and without queries, got another combination")
    for name, rows, length in (("index", index, None), ("inverse", inverse, x.shape[0])):
        check_device(name, rows, x)
        if rows.dtype != torch.int32 or rows.dim() != 1 or (length is not None and rows.shape[0] != length):
            expected = "[N]" if length is None else f"[{length}]"
            raise ValueError(f"{name}: expected int32 {expected}, got {rows.dtype} {tuple(rows.shape)}")


def _check_float64(dtypes: dict[str, torch.dtype | None]) -> None:
    """Raise ValueError if only some dtypes are float64: what is saved and summed would have float32's width."""
    given = {name: dtype for name, dtype in dtypes.items() if dtype is not None}
    wide = [name for name, dtype in given.items() if dtype == torch.float64]
    if wide and len(wide) < len(given):
        raise ValueError(f"{wide[0]}: expected all dtypes to be float64, or none, got {', '.join(map(str, given.values()))}")


def _check_settings(settings: Settings, hidden: int) -> None:
    if settings.heads < 1 or hidden % settings.heads:
        raise ValueError(f"settings.heads: expected a divisor of H = {hidden}, got {settings.heads}")
    check_activation(settings.activation)
    for name in ("attention_p", "attention_output_p", "output_p"):
        if not 0.0 <= getattr(settings, name) <= 1.0:
            raise ValueError(f"settings.{name}: expected a probability from 0 to 1, got {getattr(settings, name)}")


def _check_weights(weights: Weights, x: Tensor) -> None:
    hidden = x.shape[-1]
    inner = weights.intermediate.shape[0] if weights.intermediate.dim() else 0
    shapes = Weights(
        *((hidden, hidden), (hidden,)) * 3,
        (hidden, hidden),
        *((hidden,),) * 3,
        (inner, hidden),
        (inner,),
        (hidden, inner),
        *((hidden,),) * 3,
    )
    for name, weight, shape in zip(Weights._fields, weights, shapes, strict=True):
        check_dtype(f"weights.{name}", weight)
        check_device(f"weights.{name}", weight, x)
        if tuple(weight.shape) != shape or weight.dtype != weights.query.dtype:
            expected = f"{weights.query.dtype} {shape}"
            raise ValueError(f"weights.{name}: expected {expected}, got {weight.dtype} {tuple(weight.shape)}")
