"""The launchers' twins in plain PyTorch: what runs where a kernel cannot (failures.py).

Each takes what its launcher takes and returns what that returns, of the same types, from dropout's same bits. They are
written for being right: in the type that the kernel computes in, with every intermediate in memory. No derivative is
taken by autograd here, which is off inside a custom op.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .plain_dropout import dropped, keep_mask

if TYPE_CHECKING:
    from ..linear_cross_entropy.rows import Targets


def bias_gelu(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return reference.bias_gelu(_raised(x), bias, activation=activation).to(x.dtype).contiguous()


def bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, activation: str, sum_columns: bool) -> tuple[Tensor, Tensor]:
    inner = _raised(x) if bias is None else _raised(x) + bias
    dx = _activation_backward(_raised(dy), inner, activation)
    return dx.to(x.dtype).contiguous(), _column_sum(dx)


def activated_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save: bool) -> tuple[Tensor, Tensor]:
    h = F.linear(x, weight)
    return bias_gelu(h, bias, activation), h if save else x.new_empty(0)


def activation_gradient(
    dout: Tensor, output_weight: Tensor, bias: Tensor | None, h: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    dh, dbias = bias_gelu_backward(torch.mm(dout, output_weight), h, bias, activation, True)
    return dh, bias_gelu(h, bias, activation), dbias


def dropout_add_layernorm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    p: float,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    sum_ = _raised(x) if x_bias is None else _raised(x) + x_bias
    z = (dropped(sum_, keep_mask(seed, x.shape, p), p) + residual).to(dtype).contiguous()
    y, mean, rstd = _layernorm(_raised(z), weight, bias, eps, out_dtype)
    return (y, z, mean, rstd) if save else (y, *(t.new_empty(0) for t in (z, mean, rstd)))


def dropout_add_layernorm_backward(
    dy: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    p: float,
    x_dtype: torch.dtype,
    dresidual_dtype: torch.dtype | None,
    sum_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dz, dweight, dbias = _layernorm_backward(dy, _raised(z), mean, rstd, weight)
    dx = dropped(dz, keep_mask(seed, z.shape, p), p)
    dresidual = dz.new_empty(0) if dresidual_dtype is None else dz.to(dresidual_dtype)
    return dx.to(x_dtype).contiguous(), dresidual.contiguous(), torch.stack([dweight, dbias, _column_sum(dx)])


def gelu_layernorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    activation: str,
    eps: float,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a = reference.bias_gelu(_raised(x), x_bias, activation=activation)
    y, mean, rstd = _layernorm(a, weight, bias, eps, out_dtype)
    return (y, mean, rstd) if save else (y, mean.new_empty(0), mean.new_empty(0))


def gelu_layernorm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    x_bias: Tensor | None,
    activation: str,
    sum_columns: bool,
    sums_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    inner = _raised(x) if x_bias is None else _raised(x) + x_bias
    a = reference.ACTIVATIONS[activation](inner)
    da, dweight, dbias = _layernorm_backward(dy, a, mean, rstd, weight)
    dx = _activation_backward(da, inner, activation)
    return dx.to(x.dtype).contiguous(), torch.stack([dweight, dbias, _column_sum(dx)]).to(sums_dtype)


def embedding_layernorm(
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    places: Tensor | None,
    seed: Tensor | None,
    offset: int,
    padding_idx: int | None,
    eps: float,
    p: float,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    z = _embedded(words, positions, types, ids, token_type_ids, position_ids, offset)
    y, mean, rstd = _layernorm(_raised(z), weight, bias, eps, out_dtype)
    y = dropped(y, keep_mask(seed, y.shape, p), p)
    return (y, mean, rstd) if save else (y, mean.new_empty(0), mean.new_empty(0))


def embedding_layernorm_backward(
    dy: Tensor,
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    seed: Tensor | None,
    offset: int,
    p: float,
    needs_dz: bool,
    needs_sums: bool,
) -> tuple[Tensor, Tensor]:
    """dz [T, H], the gradient of the sum that was normalised, and sums [1, 2, H] that are those of weight and bias."""
    z = _embedded(words, positions, types, ids, token_type_ids, position_ids, offset)
    dy = dropped(_raised(dy), keep_mask(seed, dy.shape, p), p)
    dz, dweight, dbias = _layernorm_backward(dy, _raised(z), mean, rstd, weight)
    return dz.to(z.dtype).reshape(-1, z.shape[-1]), torch.stack([dweight, dbias])[None]


def packed_ids(
    index: Tensor, ids: Tensor, type_ids: Tensor | None, position_ids: Tensor | None, offset: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The ids, types and positions of the rows `index`, [1, N]; of the first row where it is below 0."""
    index = index.long().clamp(min=0)
    seqlen = ids.shape[-1]
    if position_ids is None:
        position_ids = torch.arange(offset, offset + seqlen, device=ids.device)
    words, types, positions = (
        None if some is None else some.expand(ids.shape).reshape(-1)[index].long()[None]
        for some in (ids, type_ids, position_ids)
    )
    return words, types, positions


def in_order(ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids in ascending order, and the places that they had."""
    sorted_ids, order = ids.to(torch.int32).sort(stable=True)
    return sorted_ids, order.to(torch.int32)


def by_runs(dz: Tensor, ids: Tensor, n_table_rows: int, skip: int | None, dtype: torch.dtype) -> Tensor:
    """dz's rows, added up at the rows `ids` of a table."""
    dtable = _raised(dz).new_zeros(n_table_rows, dz.shape[1]).index_add_(0, ids.long(), _raised(dz))
    if skip is not None:
        dtable[skip] = 0.0
    return dtable.to(dtype)


def by_places(
    dz: Tensor,
    n_inner: int,
    type_ids: Tensor | None,
    n_types: int,
    seqlen: int,
    type_batch_stride: int,
    rows: Tensor | None = None,
) -> Tensor:
    """[1, n_inner, n_types, H]: the same by a row's type and place modulo n_inner, which is where `rows` has it if given."""
    tokens = torch.arange(dz.shape[0], device=dz.device) if rows is None else rows.flatten().long()
    places = torch.arange(len(tokens), device=dz.device) % max(n_inner, 1) * n_types
    if n_types > 1 and len(dz):
        ids = type_ids.long().view(-1, seqlen)
        places = places + ids.expand(dz.shape[0] // seqlen, -1).reshape(-1)[tokens]
    here = tokens >= 0
    sums = _raised(dz).new_zeros(n_inner * n_types, dz.shape[1])
    return sums.index_add_(0, places[here], _raised(dz)[tokens[here]]).view(1, n_inner, n_types, dz.shape[1])


def finish(
    sums: Tensor | None,
    place_sums: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dpositions: Tensor | None,
    dtypes: Tensor | None,
    offset: int,
) -> None:
    """Column sums of LayerNorm's [n, 2, H] and of the tables' [pieces, inner, types, H], into what is no None."""
    for i, gradient in enumerate((dweight, dbias)):
        if gradient is not None:
            gradient.copy_(sums[:, i].sum(0))
    if dpositions is not None:
        dpositions.zero_()[offset : offset + place_sums.shape[1]] = place_sums.sum((0, 2))
    if dtypes is not None:
        dtypes.zero_()[: place_sums.shape[2]] = place_sums.sum((0, 1))


def cross_entropy_rows(
    logits: Tensor,
    bias: Tensor | None,
    targets: "Targets",
    losses: Tensor | None,
    dlosses: Tensor | None,
    gradient: bool,
    scale: float = 1.0,
) -> None:
    """Losses of rows of logits, into `losses`, and with `gradient` their gradients where the logits stood."""
    n_cols, smoothing = logits.shape[1], targets.label_smoothing
    x = _raised(logits) if bias is None else _raised(logits) + bias[:n_cols]
    counted = targets.labels != targets.ignore_index
    at = torch.where(counted, targets.labels, 0)[:, None]
    logs = x.log_softmax(1)
    weights = x.new_ones(n_cols) if targets.class_weights is None else targets.class_weights[:n_cols]
    at_label = (1.0 - smoothing) * weights[at]
    if losses is not None:
        loss = -(at_label * logs.gather(1, at))[:, 0]
        if smoothing:
            loss -= smoothing * (logs * weights).mean(1)
        losses.copy_(torch.where(counted, loss, 0.0))
    if gradient:
        whole = at_label + smoothing * weights.mean() if smoothing else at_label
        spread = smoothing / n_cols * weights if smoothing else 0.0
        dx = (logs.exp() * whole - spread).scatter_add_(1, at, -at_label)
        dx *= scale if dlosses is None else (scale * _raised(dlosses))[:, None]
        logits.copy_(torch.where(counted[:, None], dx, 0.0))


def cross_entropy_reduce(
    losses: Tensor, targets: "Targets", n_cols: int, reduction: str, loss: Tensor | None, scale: Tensor | None
) -> None:
    """The sum or mean of the losses, and its derivative by a row's."""
    labels, weights = targets.labels, targets.class_weights
    counted = labels != targets.ignore_index
    if labels.is_cuda:
        torch._assert_async((~counted | ((labels >= 0) & (labels < n_cols))).all(), "linear_cross_entropy: no class")
    if loss is None:
        return
    unit = torch.ones_like(scale) if targets.unit is None else targets.unit
    if reduction == "mean":
        n = counted.sum() if weights is None else torch.where(counted, weights[torch.where(counted, labels, 0)], 0.0).sum()
        n = torch.where(n == 0, torch.nan, n)
        unit = torch.where(counted.any(), 1.0 / n, 1.0)
        loss.copy_(losses.sum() / n)
    else:
        loss.copy_(losses.sum() * unit)
    scale.copy_(unit)


def scaled(x: Tensor, dloss: Tensor, scale: Tensor, dtype: torch.dtype, in_place: bool = False) -> Tensor:
    y = (_raised(x) * (_raised(dloss) * _raised(scale))).to(dtype).contiguous()
    return x.copy_(y) if in_place else y


def gather_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    if not x.shape[0]:
        return x.new_zeros(index.shape[0], x.shape[1])
    return reference.gather_rows(x, index, inverse).contiguous()


def _raised(x: Tensor) -> Tensor:
    """In the type that kernels compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _column_sum(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).sum(0)


def _activation_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, x, 0)
    return torch.ops.aten.gelu_backward(dy, x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean and 1 / standard deviation of rows in the type that they are computed in."""
    mean = x.mean(-1)
    centred = x - mean[..., None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    y = centred * rstd[..., None] * _raised(weight) + _raised(bias)
    return y.to(out_dtype).contiguous(), mean.contiguous(), rstd.contiguous()


def _layernorm_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy = _raised(dy).to(x.dtype)
    normal = (x - mean[..., None]) * rstd[..., None]
    wdy = dy * weight.to(x.dtype)
    dx = (wdy - wdy.mean(-1, keepdim=True) - normal * (wdy * normal).mean(-1, keepdim=True)) * rstd[..., None]
    return dx, _column_sum(dy * normal), _column_sum(dy)


def _embedded(
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
) -> Tensor:
    rows = words if ids is None else F.embedding(ids, words)
    if position_ids is None:
        position_ids = torch.arange(offset, offset + rows.shape[-2], device=words.device)
    type_rows = types[0] if token_type_ids is None else F.embedding(token_type_ids, types)
    return rows + type_rows + F.embedding(position_ids, positions)
