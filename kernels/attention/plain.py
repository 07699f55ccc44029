"""Attention's launchers' twins in plain PyTorch, see plain.py: all scores in memory, as eager has them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.plain_dropout import dropped, keep_scores


def attention(
    q, k, v, key_mask, key_bounds, mask, cu_seqlens, cu_seqlens_q, seed, max_seqlen, max_seqlen_q, causal, scale, p
):  # fmt: skip
    """out, and in place of the logsumexp a tensor that only the twin of the backward takes, which does not read it."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for rows, keys, sequences in _sequences(q, cu_seqlens, cu_seqlens_q):
        parts = _part(q, rows), _of_each_head(_part(k, keys), q), _of_each_head(_part(v, keys), q)
        weights, keep = _weights(*parts[:2], sequences, key_mask, mask, seed, causal, scale, p)
        _part(out, rows).copy_(torch.einsum("bhqk,bkhd->bqhd", dropped(weights, keep, p).to(q.dtype), parts[2]))
    planes = 2 if q.element_size() > 2 else 1
    shape = (planes, q.shape[-2], q.shape[:-2].numel())
    return out, torch.zeros(shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def attention_backward(
    grads, dout, q, k, v, out, logsumexp, key_mask, key_bounds, mask, cu_seqlens, cu_seqlens_q, seed,
    max_seqlen, max_seqlen_q, causal, scale, p,
):  # fmt: skip
    """dq, dk and dv, written into `grads`."""
    for grad in grads:
        grad.zero_()
    for rows, keys, sequences in _sequences(q, cu_seqlens, cu_seqlens_q):
        q_, k_, v_, dout_ = _part(q, rows), _part(k, keys), _part(v, keys), _part(dout, rows)
        k_, v_ = _of_each_head(k_, q), _of_each_head(v_, q)
        weights, keep = _weights(q_, k_, sequences, key_mask, mask, seed, causal, scale, p)
        dweights = dropped(torch.einsum("bqhd,bkhd->bhqk", dout_, v_).to(weights.dtype), keep, p)
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale
        dscores, weights = dscores.to(q.dtype), dropped(weights, keep, p).to(q.dtype)
        dq, dk, dv = _part(grads[0], rows), _part(grads[1], keys), _part(grads[2], keys)
        dq.copy_(torch.einsum("bhqk,bkhd->bqhd", dscores, k_))
        group = q.shape[-2] // k.shape[-2]
        dk.copy_(_summed_by_group(group, dscores, q_))
        dv.copy_(_summed_by_group(group, weights, dout_))
    return tuple(grads)


def _sequences(q: Tensor, cu_seqlens: Tensor | None, cu_seqlens_q: Tensor | None) -> Iterator[tuple[Any, Any, range]]:
    """Rows of q, rows of k and v, and which sequences they are: all at once, or one by one where they are packed."""
    if cu_seqlens is None:
        yield None, None, range(q.shape[0])
        return
    keys = cu_seqlens.tolist()
    rows = keys if cu_seqlens_q is None else cu_seqlens_q.tolist()
    for i in range(len(keys) - 1):
        yield slice(rows[i], rows[i + 1]), slice(keys[i], keys[i + 1]), range(i, i + 1)


def _part(x: Tensor, rows: slice | None) -> Tensor:
    """[B, rows, heads, D]; a view."""
    return x if rows is None else x[rows].unsqueeze(0)


def _of_each_head(x: Tensor, q: Tensor) -> Tensor:
    """k or v [B, rows, kv heads, D] with as many heads as q, a group of neighbours the same one."""
    return x if x.shape[2] == q.shape[-2] else x.repeat_interleave(q.shape[-2] // x.shape[2], 2)


def _summed_by_group(group: int, scores: Tensor, rows: Tensor) -> Tensor:
    """[B, Sk, kv heads, D]: scores [B, heads, Sq, Sk] times rows [B, Sq, heads, D], the heads of a group added up."""
    return torch.einsum("bhgqk,bqhgd->bkhd", scores.unflatten(1, (-1, group)), rows.unflatten(2, (-1, group)))


def _weights(
    q: Tensor,
    k: Tensor,
    sequences: range,
    key_mask: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor | None]:
    """Probabilities before dropout, and what that keeps. Masks mean what they do in tiles.mask_scores."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(k.shape[1] - q.shape[1])
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        here = mask > (-65504.0 if mask.dtype == torch.float16 else -(2.0**100))
        scores = scores + torch.where(here | mask.isnan(), mask, 0.0).to(scores.dtype)
        seen = seen & (here | mask.isnan())
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    weights = scores.masked_fill(~seen, -(2.0**100)).softmax(-1)
    keep = None if seed is None else keep_scores(seed, sequences, q.shape[2], q.shape[1], k.shape[1], p)
    return weights, keep
