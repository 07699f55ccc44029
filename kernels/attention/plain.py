"""The twins of attention's launchers in plain PyTorch, see core/plain.py: all scores in memory, as in eager."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.plain_dropout import dropped, keep_scores

if TYPE_CHECKING:
    from . import Inputs, Saved


def forward(inputs: "Inputs") -> tuple[Tensor, Tensor]:
    """out, and a placeholder for the logsumexp, which the backward's twin takes but does not read."""
    q, k, v, p = inputs.q, inputs.k, inputs.v, inputs.p
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for rows, keys, sequences in _sequences(inputs):
        parts = _part(q, rows), _of_each_head(_part(k, keys), q), _of_each_head(_part(v, keys), q)
        weights, keep = _weights(*parts[:2], sequences, inputs)
        _part(out, rows).copy_(torch.einsum("bhqk,bkhd->bqhd", dropped(weights, keep, p).to(q.dtype), parts[2]))
    planes = 2 if q.element_size() > 2 else 1
    shape = (planes, q.shape[-2], q.shape[:-2].numel())
    return out, torch.zeros(shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def backward(grads: tuple[Tensor, ...], dout: Tensor, saved: "Saved") -> tuple[Tensor, ...]:
    """dq, dk and dv, written into `grads`."""
    inputs = saved.inputs
    q, k, v, scale, p = inputs.q, inputs.k, inputs.v, inputs.scale, inputs.p
    for grad in grads:
        grad.zero_()
    for rows, keys, sequences in _sequences(inputs):
        q_, k_, v_, dout_ = _part(q, rows), _part(k, keys), _part(v, keys), _part(dout, rows)
        k_, v_ = _of_each_head(k_, q), _of_each_head(v_, q)
        weights, keep = _weights(q_, k_, sequences, inputs)
        dweights = dropped(torch.einsum("bqhd,bkhd->bhqk", dout_, v_).to(weights.dtype), keep, p)
        dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale
        dscores, weights = dscores.to(q.dtype), dropped(weights, keep, p).to(q.dtype)
        dq, dk, dv = _part(grads[0], rows), _part(grads[1], keys), _part(grads[2], keys)
        dq.copy_(torch.einsum("bhqk,bkhd->bqhd", dscores, k_))
        group = q.shape[-2] // k.shape[-2]
        dk.copy_(_summed_by_group(group, dscores, q_))
        dv.copy_(_summed_by_group(group, weights, dout_))
    return tuple(grads)


def _sequences(given: "Inputs") -> Iterator[tuple[Any, Any, range]]:
    """(rows of q, rows of k and v, sequences): all at once, or one by one if packed."""
    if given.cu_seqlens is None:
        yield None, None, range(given.q.shape[0])
        return
    keys = given.cu_seqlens.tolist()
    rows = keys if given.cu_seqlens_q is None else given.cu_seqlens_q.tolist()
    for i in range(len(keys) - 1):
        yield slice(rows[i], rows[i + 1]), slice(keys[i], keys[i + 1]), range(i, i + 1)


def _part(x: Tensor, rows: slice | None) -> Tensor:
    """[B, rows, heads, D]; a view."""
    return x if rows is None else x[rows].unsqueeze(0)


def _of_each_head(x: Tensor, q: Tensor) -> Tensor:
    """k or v [B, rows, kv heads, D] repeated to q's number of heads: adjacent heads share one."""
    return x if x.shape[2] == q.shape[-2] else x.repeat_interleave(q.shape[-2] // x.shape[2], 2)


def _summed_by_group(group: int, scores: Tensor, rows: Tensor) -> Tensor:
    """[B, Sk, kv heads, D]: scores [B, heads, Sq, Sk] times rows [B, Sq, heads, D], summed over the heads of a group."""
    return torch.einsum("bhgqk,bqhgd->bkhd", scores.unflatten(1, (-1, group)), rows.unflatten(2, (-1, group)))


def _weights(q: Tensor, k: Tensor, sequences: range, given: "Inputs") -> tuple[Tensor, Tensor | None]:
    """Probabilities before dropout, and the keep mask. Masks mean the same as in tiles.mask_scores."""
    mask, key_mask, seed = given.mask, given.key_mask, given.seed
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * given.scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if given.causal:
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
    keep = None if seed is None else keep_scores(seed, sequences, q.shape[2], q.shape[1], k.shape[1], given.p)
    return weights, keep
