"""The launchers' twins in plain PyTorch, see core/plain.py."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import plain
from ..core.plain_dropout import dropped, keep_mask
from .arguments import Inputs, Saved


def forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = plain.layernorm(plain.upcast(_sum(inputs)), inputs.weight, inputs.bias, inputs.eps, inputs.out_dtype)
    y = dropped(y, keep_mask(inputs.seed, y.shape, inputs.p), inputs.p)
    return (y, mean, rstd) if inputs.save else (y, mean.new_empty(0), mean.new_empty(0))


def rows_backward(dy: Tensor, saved: Saved, needs_dz: bool, needs_sums: bool) -> tuple[Tensor, Tensor]:
    """dz [T, H], the gradient of LayerNorm's input, and sums [1, 2, H], the gradients of weight and bias."""
    z = _sum(saved)
    dy = dropped(plain.upcast(dy), keep_mask(saved.seed, dy.shape, saved.p), saved.p)
    dz, dweight, dbias = plain.layernorm_backward(dy, plain.upcast(z), saved.mean, saved.rstd, saved.weight)
    return dz.to(z.dtype).reshape(-1, z.shape[-1]), torch.stack([dweight, dbias])[None]


def _sum(given: Inputs | Saved) -> Tensor:
    """The three rows, added in eager's order."""
    rows = given.words if given.ids is None else F.embedding(given.ids, given.words)
    position_ids = given.position_ids
    if position_ids is None:
        position_ids = torch.arange(given.offset, given.offset + rows.shape[-2], device=rows.device)
    types = given.types[0] if given.token_type_ids is None else F.embedding(given.token_type_ids, given.types)
    return rows + types + F.embedding(position_ids, given.positions)


def packed_ids(
    index: Tensor, ids: Tensor, type_ids: Tensor | None, position_ids: Tensor | None, offset: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The ids, types and positions of the rows `index`, [1, N]; those of the first row where index is below 0."""
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
    """ids in ascending order, and their places in `ids`."""
    sorted_ids, order = ids.to(torch.int32).sort(stable=True)
    return sorted_ids, order.to(torch.int32)


def by_runs(dz: Tensor, ids: Tensor, n_table_rows: int, skip: int | None, dtype: torch.dtype) -> Tensor:
    """The rows of dz, summed into the rows `ids` of a table."""
    dtable = plain.upcast(dz).new_zeros(n_table_rows, dz.shape[1]).index_add_(0, ids.long(), plain.upcast(dz))
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
    """Sums [1, n_inner, n_types, H] by a row's type and its place modulo n_inner; the place is that in `rows`, if given."""
    tokens = torch.arange(dz.shape[0], device=dz.device) if rows is None else rows.flatten().long()
    places = torch.arange(len(tokens), device=dz.device) % max(n_inner, 1) * n_types
    if n_types > 1 and len(dz):
        ids = type_ids.long().view(-1, seqlen)
        places = places + ids.expand(dz.shape[0] // seqlen, -1).reshape(-1)[tokens]
    here = tokens >= 0
    sums = plain.upcast(dz).new_zeros(n_inner * n_types, dz.shape[1])
    return sums.index_add_(0, places[here], plain.upcast(dz)[tokens[here]]).view(1, n_inner, n_types, dz.shape[1])


def finish(
    sums: Tensor | None,
    place_sums: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    dpositions: Tensor | None,
    dtypes: Tensor | None,
    offset: int,
) -> None:
    """Column sums of LayerNorm's [n, 2, H] and of the tables' [pieces, inner, types, H], written into the gradients given."""
    for i, gradient in enumerate((dweight, dbias)):
        if gradient is not None:
            gradient.copy_(sums[:, i].sum(0))
    if dpositions is not None:
        dpositions.zero_()[offset : offset + place_sums.shape[1]] = place_sums.sum((0, 2))
    if dtypes is not None:
        dtypes.zero_()[: place_sums.shape[2]] = place_sums.sum((0, 1))
