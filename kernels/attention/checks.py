"""Attention's argument checks: each error names the argument, what is expected and what came."""

import math

import torch
from torch import Tensor

from ..core.checks import check_dtype

MAX_HEAD_SIZE = 256


def check_inputs(q, k, v, scale, p, seed, cu_seqlens, max_seqlen, cu_seqlens_q, max_seqlen_q) -> None:
    """Raise ValueError unless everything but the masks fits q."""
    packed = cu_seqlens is not None
    check_dtype("q", q)
    if q.dim() != (3 if packed else 4):
        raise ValueError(f"q: expected {'[T, heads, D]' if packed else '[B, S, heads, D]'}, got {tuple(q.shape)}")
    if not 1 <= q.shape[-1] <= MAX_HEAD_SIZE:
        raise ValueError(f"q: expected a head size from 1 to {MAX_HEAD_SIZE}, got {q.shape[-1]}")
    heads = _kv_heads(q, k)
    if not packed:
        expected = (q.shape[0], k.shape[1] if k.dim() == 4 else -1, heads, q.shape[-1])
    elif cu_seqlens_q is None:
        expected = (q.shape[0], heads, q.shape[-1])
    else:
        expected = (k.shape[0] if k.dim() == 3 else -1, heads, q.shape[-1])
    for name, tensor in (("k", k), ("v", v)):
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {tensor.dtype}")
        _check_device(name, tensor, q)
    _check_bounds("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, q)
    _check_bounds("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, q)
    if cu_seqlens_q is not None and (not packed or cu_seqlens_q.shape != cu_seqlens.shape):
        expected = f"cu_seqlens' shape, {tuple(cu_seqlens.shape)}" if packed else "None without cu_seqlens"
        raise ValueError(f"cu_seqlens_q: expected {expected}, got {tuple(cu_seqlens_q.shape)}")
    if scale is not None and not -math.inf < scale < math.inf:  # compared, as torch.compile can trace it
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a probability from 0 to 1, got {p}")
    if seed is not None:
        if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.dim():
            given = f"{seed.dtype} {list(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
            raise ValueError(f"seed: expected an int64 tensor without dimensions, got {given}")
        _check_device("seed", seed, q)


def _kv_heads(q: Tensor, k: Tensor) -> int:
    """The expected number of heads of k and v: k's own, if it divides q's."""
    heads = q.shape[-2]
    if k.dim() != q.dim() or k.shape[-2] == heads:
        return heads
    if k.shape[-2] == 0 or heads % k.shape[-2]:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {k.shape[-2]}")
    return k.shape[-2]


def _check_bounds(name, cu_seqlens, name_of_longest, max_seqlen, q) -> None:
    given = cu_seqlens is not None
    if given:
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not len(cu_seqlens):
            raise ValueError(f"{name}: expected int32 [sequences + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
        _check_device(name, cu_seqlens, q)
    if given != isinstance(max_seqlen, int | torch.SymInt) or (given and max_seqlen < 0):
        expected = "a length" if given else f"None without {name}"
        raise ValueError(f"{name_of_longest}: expected {expected}, got {max_seqlen!r}")


def check_masks(q, k, key_mask, mask, key_bounds) -> None:
    """Raise ValueError unless the masks fit q and k, which must have been checked."""
    if q.dim() == 3:
        if not (key_mask is None and mask is None and key_bounds is None):
            raise ValueError("cu_seqlens: packed rows take no key_mask, key_bounds or mask")
        return
    masks = {"key_mask": (key_mask, torch.bool, (q.shape[0], k.shape[1]))}
    masks["key_bounds"] = (key_bounds, torch.int32, (q.shape[0], 3))
    for name, (tensor, dtype, shape) in masks.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        _check_device(name, tensor, q)
    if key_bounds is not None and key_mask is None:
        raise ValueError("key_bounds: expected None without a key_mask, got a tensor")
    if mask is None:
        return
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if not 1 <= mask.dim() <= 4 or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False)):
        raise ValueError(f"mask: expected a shape that broadcasts to {full}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask: expected bool or a floating-point number to be added, got {mask.dtype}")
    if mask.requires_grad and torch.is_grad_enabled():
        raise ValueError("mask: expected a mask that requires no gradient, got one that does")
    _check_device("mask", mask, q)


def _check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {tensor.device}")
