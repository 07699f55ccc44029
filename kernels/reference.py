"""Every op in plain PyTorch: the specification that tests, benchmarks and readers share.

Each function has the signature and the meaning of the public function of the same name. Only dropout's randomness is not
specified here: a reference takes the keep mask that the kernel draws.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .adamw.tables import Hyperparameters, Parameter, Tables

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def dropout_add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    eps: float = 1e-12,
    p: float = 0.0,
    out_dtype: torch.dtype | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual); `keep` (bool, shape of x) is dropout's keep mask."""
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if p > 0.0:
        x = torch.where(keep, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)
    return _layer_norm(x + residual, weight, bias, eps, out_dtype)


def embedding_layernorm(
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    offset: int = 0,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    eps: float = 1e-12,
    p: float = 0.0,
    out_dtype: torch.dtype | None = None,
    keep: Tensor | None = None,
    index: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    """dropout(LayerNorm(words[ids] + types[token_type_ids] + positions[position_ids])), summed in eager's order; with `index`
    only those rows."""
    rows = words if ids is None else F.embedding(ids, words, padding_idx)
    if position_ids is None:
        position_ids = torch.arange(offset, offset + rows.shape[-2], device=words.device)
    type_rows = types[0] if token_type_ids is None else F.embedding(token_type_ids, types)
    y = _layer_norm(rows + type_rows + F.embedding(position_ids, positions, position_padding_idx), weight, bias, eps, out_dtype)
    if index is not None:
        y = y.flatten(0, -2)[index.long().clamp(min=0)][None]
    return y if p == 0.0 else torch.where(keep, y * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, activation: str = "gelu") -> Tensor:
    """activation(x + bias)."""
    return ACTIVATIONS[activation](x if bias is None else x + bias.to(x.dtype))


def feed_forward(x: Tensor, weight: Tensor, bias: Tensor | None, output_weight: Tensor, *, activation: str = "gelu") -> Tensor:
    """activation(x weight' + bias) output_weight'; the bias is added to the rounded first product."""
    return F.linear(bias_gelu(F.linear(x, weight), bias, activation=activation), output_weight)


def gelu_layernorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    activation: str = "gelu",
    eps: float = 1e-12,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm(activation(x + x_bias))."""
    return _layer_norm(bias_gelu(x, x_bias, activation=activation), weight, bias, eps, out_dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    p: float = 0.0,
    key_bounds: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """dropout(softmax(scale q k' + mask)) v; `keep` is [B, heads, Sq, Sk], packed [sequences, heads, longest q, longest k].

    If k and v have fewer heads than q, a group of adjacent heads of q shares each of them.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        bounds_q = bounds if cu_seqlens_q is None else cu_seqlens_q.tolist()
        parts = []
        for i in range(len(bounds) - 1):
            rows, keys = slice(*bounds_q[i : i + 2]), slice(*bounds[i : i + 2])
            part = [q[rows].unsqueeze(0), k[keys].unsqueeze(0), v[keys].unsqueeze(0)]
            kept = None if keep is None else keep[i : i + 1, :, : part[0].shape[1], : part[1].shape[1]]
            parts.append(attention(*part, causal=causal, scale=scale, p=p, keep=kept)[0])
        return torch.cat(parts)
    if k.shape[2] != q.shape[2]:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    # Masks are added, as in transformers' eager attention: a row that sees no key is the average of all of them, and its scores
    # still have gradients.
    lowest = torch.finfo(scores.dtype).min
    added = torch.zeros((), dtype=scores.dtype, device=q.device)
    seen = torch.ones((), dtype=torch.bool, device=q.device)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        added = mask.to(scores.dtype)
        seen = seen & (added > lowest)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    if causal:
        seen = seen & torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
    masked = lowest + (scores - scores.detach())  # what adding `lowest` rounds to
    weights = torch.where(seen, (scores + added).clamp(min=lowest), masked).softmax(-1)
    if p > 0.0:
        weights = torch.where(keep, weights * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """cross_entropy(hidden weight' + bias, labels) with all logits in memory, in out_dtype if given."""
    logits = F.linear(hidden.reshape(labels.numel(), hidden.shape[-1]), weight, bias)
    logits = logits.to(out_dtype or logits.dtype)
    loss = F.cross_entropy(
        logits,
        labels.reshape(-1),
        None if class_weights is None else class_weights.to(logits.dtype),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.view(labels.shape) if reduction == "none" else loss


@torch.no_grad()
def adamw(
    parameters: "Sequence[Parameter]",
    groups: "Sequence[Hyperparameters]",
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    tables: "Tables | None" = None,
) -> None:
    """A step of AdamW in place, in float32 (float64 for float64), rounded where it is stored; `tables` is not read."""
    if found_inf is not None and found_inf != 0:
        return
    for p in parameters:
        lr, beta1, beta2, eps, weight_decay, maximize = map(float, groups[p.group])
        source = p.param if p.master is None else p.master
        dtype = torch.promote_types(source.dtype, torch.float32)
        if grad_scale is not None:
            p.grad.copy_(p.grad.to(dtype) / grad_scale)
        grad = p.grad.to(dtype) * (-1.0 if maximize else 1.0)
        p.step.add_(1)
        t = p.step.item()

        exp_avg = p.exp_avg.to(dtype) * beta1 + grad * (1 - beta1)
        exp_avg_sq = p.exp_avg_sq.to(dtype) * beta2 + grad.square() * (1 - beta2)
        largest = exp_avg_sq
        if p.max_exp_avg_sq is not None:
            largest = torch.maximum(p.max_exp_avg_sq.to(dtype), exp_avg_sq)
            p.max_exp_avg_sq.copy_(largest)
        update = exp_avg / (largest.sqrt() / (1 - beta2**t) ** 0.5 + eps)
        param = source.to(dtype) * (1 - lr * weight_decay) - update * (lr / (1 - beta1**t))

        p.exp_avg.copy_(exp_avg)
        p.exp_avg_sq.copy_(exp_avg_sq)
        if p.master is not None:
            p.master.copy_(param)
        p.param.copy_(param)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None) -> Tensor:
    x = x.to(out_dtype or x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias.to(x.dtype), eps)


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Row index[i] of x as row i, zeros where index[i] is negative. `inverse` is not needed here."""
    return torch.where((index >= 0)[:, None], x[index.clamp(min=0).long()], 0.0)


def key_bounds(key_mask: Tensor) -> Tensor:
    """Per row: the first key that is seen (S if none), how many leading keys are seen, the end of the last one seen."""
    seqlen = key_mask.shape[1]
    if seqlen == 0:
        return torch.zeros((key_mask.shape[0], 3), dtype=torch.int32, device=key_mask.device)
    places = torch.arange(seqlen, device=key_mask.device, dtype=torch.int32)
    first = torch.where(key_mask, places, seqlen).amin(1)
    leading = torch.where(key_mask, seqlen, places).amin(1)
    end = torch.where(key_mask, places + 1, 0).amax(1)
    return torch.stack([first, leading, end], dim=1).to(torch.int32)


def row_counts(tokens: Tensor | None, read: Tensor | None) -> Tensor:
    """int32 [3, B]: the tokens of each row, its positions that are read (0 if `read` is None, which means the first), and
    whether one of those is no token."""
    either = read if tokens is None else tokens
    counts = torch.zeros(3, either.shape[0], dtype=torch.int32, device=either.device)
    if tokens is not None:
        counts[0] = tokens.sum(1)
        counts[2] = (~tokens[:, :1] if read is None else read & ~tokens).any(1)
    if read is not None:
        counts[1] = read.sum(1)
    return counts


def packed_rows(
    counts: Tensor,
    tokens: Tensor | None,
    read: Tensor | None,
    seqlen: int,
    capacity: int,
    longest: int,
    exact: bool = True,
    first: bool = False,
    read_capacity: int = 0,
    read_longest: int = 0,
    read_exact: bool = True,
    check: bool = False,
) -> list[Tensor]:
    """cu_seqlens, index and inverse of the tokens, the same for what is read, that among the tokens, and whether all fits."""
    shape = counts.shape[1], seqlen
    every = torch.ones(shape, dtype=torch.bool, device=counts.device)
    rest = 0 if exact else -(-capacity // max(longest, 1))
    bounds, index, inverse = _rows_of(every if tokens is None else tokens, capacity, longest, rest)
    results = [bounds] if tokens is None else [bounds, index, inverse]
    if first or read is not None:
        rest = rest if read_exact else max(rest, -(-read_capacity // max(read_longest, 1)))
        chosen = every & (torch.arange(seqlen, device=counts.device) == 0) if read is None else read
        bounds, read_index, read_inverse = _rows_of(chosen, read_capacity, read_longest, rest)
        results += [bounds, read_index, read_inverse]
        if tokens is not None:
            results += [_at(inverse, read_index), _at(read_inverse, index)]
    if check:
        whole, alone = counts[0].sum(), counts[1].sum()
        fits = whole == capacity if exact else whole <= capacity
        read_fits = alone == read_capacity if read_exact else alone <= read_capacity
        fits = fits & (counts[0] <= longest).all(), read_fits & (counts[1] <= read_longest).all(), (counts[2] == 0).all()
        results.append(torch.stack(fits))
    return results


def _rows_of(chosen: Tensor, capacity: int, longest: int, rest: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sequences' bounds, plus those of `rest` sequences of `longest` in the spare capacity; the index and its inverse."""
    flat = chosen.flatten()
    places = flat.cumsum(0) - 1
    # Rows that are not chosen, or do not fit, go to a slot behind the others, which is cut off.
    slots = torch.where(flat, places, capacity).clamp(max=capacity)
    numbers = torch.arange(len(flat), device=flat.device, dtype=torch.int32)
    index = numbers.new_full((capacity + 1,), -1).scatter_(0, slots, numbers)[:capacity].clone()
    inverse = torch.where(flat & (places < capacity), places, -1).to(torch.int32)
    bounds = F.pad(chosen.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    steps = torch.arange(1, rest + 1, device=flat.device, dtype=torch.int32)
    return torch.cat([bounds, bounds[-1] + steps * longest]).clamp(max=capacity), index, inverse


def _at(numbers: Tensor, index: Tensor) -> Tensor:
    """numbers[index], -1 where the index is -1."""
    return torch.where(index >= 0, numbers[index.clamp(min=0).long()], -1) if len(numbers) else index.clone()


class PaddedRows(NamedTuple):
    """Rows put back into their batch: rows [B, S + 1, H], and numbers [B, S + 1], which row of x each of them is (-1: none).

    Only rows that count are there; the others, and a last one that every sequence has, are 0. weights [B, S + 1] are the
    positions, counted from 1 at the first row of the sequence.
    """

    rows: Tensor
    numbers: Tensor
    weights: Tensor


def pool_rows(
    x: Tensor,
    cu_seqlens: Tensor,
    mode: str,
    *,
    n_sequences: int,
    seqlen: int,
    index: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The mean, sum / sqrt(count), mean weighted by position, or maximum of the rows that count, on the padded batch."""
    padded = padded_rows(x, cu_seqlens, n_sequences, seqlen, index, mask)
    return (largest_rows(padded) if mode == "max" else averaged_rows(padded, mode))[0]


def padded_rows(
    x: Tensor, cu_seqlens: Tensor, n_sequences: int, seqlen: int, index: Tensor | None, mask: Tensor | None
) -> PaddedRows:
    rows = torch.arange(x.shape[0], device=x.device)
    positions = rows if index is None else index.long()
    counted = (positions >= 0) & (positions < n_sequences * seqlen)
    if mask is not None:
        # One more, for a batch without positions.
        counted = counted & F.pad(mask.flatten(), (0, 1))[torch.where(counted, positions, n_sequences * seqlen)]
    # Rows that do not count go to a slot behind the others, which is cut off.
    shape = n_sequences, seqlen + 1
    slots = torch.where(counted, positions + positions // max(seqlen, 1), shape[0] * shape[1])
    padded = x.new_zeros((shape[0] * shape[1] + 1, x.shape[1])).index_copy(0, slots, x)[:-1].view(*shape, x.shape[1])
    numbers = rows.new_full((shape[0] * shape[1] + 1,), -1).index_copy(0, slots, rows)[:-1].view(shape)

    places = torch.arange(n_sequences, device=x.device)[:, None] * seqlen + torch.arange(seqlen + 1, device=x.device)
    firsts = F.pad(positions, (0, 1))[cu_seqlens[:n_sequences].long()]
    return PaddedRows(padded, numbers, places - firsts[:, None] + 1)


def averaged_rows(padded: PaddedRows, mode: str) -> tuple[Tensor, Tensor]:
    """The average of the rows of each sequence, [B, H], and the scale of their sum, [B]; both 0 without a row."""
    wide = torch.promote_types(padded.rows.dtype, torch.float32)
    counted = padded.numbers >= 0
    weights = torch.where(counted, padded.weights if mode == "weighted" else 1, 0).to(wide)
    total = weights.sum(1)
    divisor = total.sqrt() if mode == "sqrt" else total
    sums = torch.where(counted[..., None], padded.rows * weights[..., None], 0.0).sum(1)
    y = sums / divisor.clamp(min=1e-9)[:, None]
    return y.to(padded.rows.dtype), torch.where(total > 0, 1.0 / divisor, 0.0)


def largest_rows(padded: PaddedRows) -> tuple[Tensor, Tensor]:
    """The largest of each column, [B, H], NaN before any number, and the first row of x that has it; -inf and -1 without a
    row."""
    counted = (padded.numbers >= 0)[..., None]
    rows = torch.where(counted, padded.rows, -torch.inf)
    equal = counted & ((rows == rows.amax(1, keepdim=True)) | rows.isnan())
    places = equal.to(torch.int8).argmax(1, keepdim=True)  # the first
    numbers = padded.numbers[..., None].expand_as(rows).gather(1, places).squeeze(1)
    return rows.gather(1, places).squeeze(1), torch.where(equal.any(1), numbers, -1)
