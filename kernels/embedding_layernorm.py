"""y = dropout(LayerNorm(words[ids] + types[token_type_ids] + positions[position_ids])): BertEmbeddings.

words [V, H], positions [P, H], types [N, H], ids [B, S]. With z the sum of the three rows, added and rounded in eager's
order, T = B * S:

    forward    y = dropout((z - mean) * rstd * weight + bias)      reads the rows, writes y             T (3H + H) b bytes
    backward   dz = LayerNorm'(dropout'(dy)), and its sums a row   reads dy, the rows; writes dz, then reads it once for
               of each table (embedding_gradients.py)              the words and once for positions and types

Saved: a row's mean and rstd in float32; z is gathered again, and the keep mask drawn again. Position ids that are
a range, or the same for the whole batch, and types that are few need no sorting. No atomics: the same bits each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plain
from .embedding_gradients import GROUPS, MOST_TYPES, by_places, by_runs
from .embedding_rows import embedding_layernorm_bwd_kernel, embedding_layernorm_fwd_kernel
from .failures import or_plain
from .launch import (
    MAX_WIDTH,
    accumulator,
    accumulator_torch,
    as_rows,
    check_device,
    check_dtype,
    check_vector,
    choose,
    differentiable,
    draw_seed,
    launch,
    needs_backward,
    resident_programs,
)

__all__ = ["embedding_layernorm"]


def _sum_arguments(
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
) -> dict[str, object]:
    """What both kernels take to make z: summed_rows' arguments."""
    *batch, seqlen = words.shape[:-1] if ids is None else ids.shape
    rows = as_rows(words)
    summed = torch.promote_types(words.dtype, types.dtype)
    z_dtype = torch.promote_types(summed, positions.dtype)
    return {
        "words_ptr": rows,
        "positions_ptr": positions.contiguous(),
        "types_ptr": types.contiguous(),
        "ids_ptr": None if ids is None else ids.contiguous(),
        "position_ids_ptr": None if position_ids is None else position_ids.contiguous(),
        "type_ids_ptr": None if token_type_ids is None else token_type_ids.contiguous(),
        "words_row_stride": rows.stride(0),
        "words_col_stride": rows.stride(1),
        "position_batch_stride": _batch_stride(position_ids, batch),
        "type_batch_stride": _batch_stride(token_type_ids, batch),
        "seqlen": seqlen,
        "offset": offset,
        "n_words": rows.shape[0],
        "n_positions": positions.shape[0],
        "n_types": types.shape[0],
        "N_COLS": words.shape[-1],
        "SUM": _language_type(summed),
        "Z": _language_type(z_dtype),
        "ACC": accumulator(z_dtype),
    }


def _batch_stride(ids: Tensor | None, batch: list[int]) -> int:
    """From one sequence's ids to the next one's: 0 where one row of them serves all."""
    return 0 if ids is None or list(ids.shape[:-1]) != batch else ids.shape[-1]


def _language_type(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _z_dtype(words: Tensor, positions: Tensor, types: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(words.dtype, types.dtype), positions.dtype)


def _check_range(ids: Tensor | None, table: Tensor) -> None:
    # On a GPU the kernel checks, because to look at the ids here would be a synchronisation.
    if ids is not None and ids.device.type == "cpu" and ids.numel():
        low, high = ids.aminmax()
        if low < 0 or high >= table.shape[0]:
            raise IndexError("index out of range in self")


@or_plain(plain.embedding_layernorm)
def _launch_fwd(
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    seed: Tensor | None,
    offset: int,
    padding_idx: int | None,
    eps: float,
    p: float,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    for table_ids, table in ((ids, words), (token_type_ids, types), (position_ids, positions)):
        _check_range(table_ids, table)
    tables = words, positions, types
    y, mean, rstd = _allocate_fwd(
        *tables, weight, bias, ids, token_type_ids, position_ids, seed, offset, padding_idx, eps, p, out_dtype, save
    )
    n_rows, n_cols = y.shape[:-1].numel(), y.shape[-1]
    widest = max((y, *tables), key=Tensor.element_size)
    config = choose("layernorm_forward", widest, n_cols)
    launch(
        embedding_layernorm_fwd_kernel,
        triton.cdiv(n_rows, config.BLOCK_M) if n_cols else 0,
        config,
        y,
        **_sum_arguments(*tables, ids, token_type_ids, position_ids, offset),
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        seed_ptr=seed,
        y_ptr=y,
        mean_ptr=mean if save else None,
        rstd_ptr=rstd if save else None,
        n_rows=n_rows,
        EPS=eps,
        P_DROP=p,
        VECTOR=16 // widest.element_size(),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=triton.next_power_of_2(n_cols),
        sanitize_overflow=False,  # debug=True asserts that as well as what is asked for
    )
    return y, mean, rstd


def _allocate_fwd(words, positions, types, weight, bias, ids, *rest):
    *_, out_dtype, save = rest
    shape = words.shape[:-1] if ids is None else ids.shape
    y = torch.empty((*shape, words.shape[-1]), dtype=out_dtype, device=words.device)
    statistics = accumulator_torch(_z_dtype(words, positions, types))
    mean = torch.empty(shape if save else (0,), dtype=statistics, device=words.device)
    return y, mean, torch.empty_like(mean)


def _launch_bwd(
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
    padding_idx: int | None,
    p: float,
    needs_words: bool,
    needs_positions: bool,
    needs_types: bool,
    needs_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = dy, words, positions, types, weight, mean, rstd, ids, token_type_ids, position_ids, seed, offset, p
    dz, sums = _launch_rows_bwd(*given, needs_words or needs_positions or needs_types, needs_sums)
    dwords = dz.new_empty(0)
    if needs_words and ids is None:
        dwords = dz.view(words.shape).to(words.dtype)
    elif needs_words:
        dwords = by_runs(dz, ids.reshape(-1), words.shape[0], padding_idx, words.dtype)
    dpositions, dtypes = _small_tables(
        dz, dy.shape[:-1], positions, types, token_type_ids, position_ids, offset, needs_positions, needs_types
    )
    return dwords, dpositions, dtypes, sums


@or_plain(plain.embedding_layernorm_backward)
def _launch_rows_bwd(
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
    """The gradient of the sum that was normalised, [T, H], and those of weight and bias, [2, H]."""
    tables = words, positions, types
    n_cols = dy.shape[-1]
    dy = as_rows(dy)
    n_rows = dy.shape[0]
    dz = torch.empty((n_rows, n_cols) if needs_dz else (0,), dtype=_z_dtype(*tables), device=dy.device)
    widest = max((dy, *tables), key=Tensor.element_size)
    config = choose("layernorm_backward", widest, n_cols)
    programs = resident_programs(config, dy, triton.cdiv(n_rows, config.BLOCK_M))
    chunks, block_n = config.chunks(n_cols)
    sums = mean.new_empty(programs, 2, n_cols) if needs_sums and dy.numel() else mean.new_zeros(1, 2, n_cols)
    launch(
        embedding_layernorm_bwd_kernel,
        programs if dy.numel() else 0,
        config,
        dy,
        dy_ptr=dy,
        **_sum_arguments(*tables, ids, token_type_ids, position_ids, offset),
        mean_ptr=mean,
        rstd_ptr=rstd,
        weight_ptr=weight.contiguous(),
        seed_ptr=seed,
        dz_ptr=dz if needs_dz else None,
        sums_ptr=sums if needs_sums else None,
        dy_row_stride=dy.stride(0),
        dy_col_stride=dy.stride(1),
        n_rows=n_rows,
        n_programs=programs,
        P_DROP=p,
        VECTOR=16 // widest.element_size(),
        BLOCK_M=config.BLOCK_M,
        CHUNKS=chunks,
        BLOCK_N=block_n,
    )
    return dz, sums.sum(0)


def _small_tables(
    dz: Tensor,
    shape: torch.Size,
    positions: Tensor,
    types: Tensor,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
    needs_positions: bool,
    needs_types: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of the positions' and types' tables; an empty tensor for one that is not asked for."""
    seqlen = shape[-1]
    one_for_all = position_ids is None or position_ids.numel() < shape.numel()
    few = token_type_ids is None or types.shape[0] <= MOST_TYPES
    dpositions, dtypes = dz.new_empty(0), dz.new_empty(0)
    if (needs_positions and one_for_all) or (needs_types and few):
        n_types = types.shape[0] if needs_types and few and token_type_ids is not None else 1
        # An expanded [1, 1] has a flat view of stride 0.
        type_ids = token_type_ids.expand(shape).reshape(-1).contiguous() if n_types > 1 else None
        sums = by_places(dz, seqlen if needs_positions and one_for_all else GROUPS, type_ids, n_types)
        if needs_types and few:
            dtypes = torch.zeros(types.shape, dtype=types.dtype, device=types.device)
            dtypes[:n_types] = sums.sum(0)
        if needs_positions and one_for_all:
            by_position = sums.sum(1)
            if position_ids is None:
                dpositions = torch.zeros(positions.shape, dtype=positions.dtype, device=positions.device)
                dpositions[offset : offset + seqlen] = by_position
            else:
                dpositions = by_runs(by_position, position_ids.reshape(-1), positions.shape[0], None, positions.dtype)
    if needs_positions and not one_for_all:
        ids = position_ids.expand(shape).reshape(-1)
        dpositions = by_runs(dz, ids, positions.shape[0], None, positions.dtype)
    if needs_types and not few:
        ids = token_type_ids.expand(shape).reshape(-1)
        dtypes = by_runs(dz, ids, types.shape[0], None, types.dtype)
    return dpositions, dtypes


def _allocate_bwd(dy, words, positions, types, weight, mean, *rest):
    *_, needs_words, needs_positions, needs_types, _ = rest
    tables = (words, positions, types)
    needs = needs_words, needs_positions, needs_types
    unasked = _z_dtype(*tables)
    gradients = [
        torch.empty(table.shape, dtype=table.dtype, device=dy.device) if needed else dy.new_empty(0, dtype=unasked)
        for table, needed in zip(tables, needs, strict=True)
    ]
    return *gradients, mean.new_empty(2, words.shape[-1])


def _save(ctx, inputs, output):
    words, positions, types, weight, bias, ids, token_type_ids, position_ids, seed, offset, padding_idx, _, p, *_ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(words, positions, types, weight, mean, rstd, ids, token_type_ids, position_ids, seed)
    ctx.options = offset, padding_idx, p
    ctx.bias_dtype = bias.dtype


def _gradients(backward, ctx, dy, *_):
    if dy is None:
        return (None,) * 15
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:5]
    *tables, (dweight, dbias) = backward(dy, *saved, *ctx.options, *needs[:3], needs[3] or needs[4])
    return (
        *(gradient if needed else None for gradient, needed in zip(tables, needs, strict=False)),
        dweight.to(saved[3].dtype) if needs[3] else None,
        dbias.to(ctx.bias_dtype) if needs[4] else None,
        *(None,) * 10,
    )


_op = torch.library.custom_op("fastbert::embedding_layernorm", _launch_fwd, mutates_args=())
_op.register_fake(_allocate_fwd)
_backward_op = torch.library.custom_op("fastbert::embedding_layernorm_backward", _launch_bwd, mutates_args=())
_backward_op.register_fake(_allocate_bwd)
_call = differentiable(_launch_fwd, _launch_bwd, _save, _gradients, _op, _backward_op)


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
    eps: float = 1e-12,
    p: float = 0.0,
    out_dtype: torch.dtype | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(LayerNorm(words[ids] + types[token_type_ids] + positions[position_ids])) in one pass over memory.

    Args:
        words: [V, H], the word embeddings; or, without ids, [..., S, H]: the words' rows themselves. fp64, fp32, fp16 or
            bf16, any strides.
        positions, types: [P, H] and [N, H], the other two tables; other dtypes promote the sum as torch does.
        weight, bias: [H], LayerNorm's.
        ids: int64 or int32 [..., S], rows of words.
        token_type_ids: the same for types, the shape of ids or [1, ..., S] for all sequences alike; row 0 when None.
        position_ids: the same for positions; offset, offset + 1, ... in each sequence when None.
        offset: the position of a sequence's first token, without position_ids.
        padding_idx: a row of words whose gradient is 0, as in nn.Embedding.
        eps: added to the variance.
        p: probability of dropping an element, rounded to 1/65536; kept ones are scaled by 1 / (1 - p).
        out_dtype: dtype of the result (autocast asks for float32); the promoted dtype by default.
        seed: int64 [] on words' device; drawn from torch's generator when None and p > 0.

    Returns:
        [..., S, H], contiguous.

    Raises:
        ValueError: shapes or devices that do not fit, a dtype that has no kernel, p outside [0, 1], H over 8192.
        IndexError: an id outside of its table; on a GPU a failed device assertion instead, as in torch.
    """
    tables = {"words": words, "positions": positions, "types": types}
    for name, table in tables.items():
        check_dtype(name, table)
        check_device(name, table, words)
        rows = name == "words" and ids is None
        if table.dim() < 2 or (table.dim() > 2 and not rows) or table.shape[-1] > MAX_WIDTH:
            expected = "[..., S, H]" if rows else "[rows, H]"
            raise ValueError(f"{name}: expected {expected} with H <= {MAX_WIDTH}, got {tuple(table.shape)}")
        if table.shape[-1] != words.shape[-1]:
            raise ValueError(f"{name}: expected rows of {words.shape[-1]}, got {tuple(table.shape)}")
    check_vector("weight", weight, words)
    check_vector("bias", bias, words)
    check_device("seed", seed, words)
    shape = words.shape[:-1] if ids is None else ids.shape
    for name, indices in (("ids", ids), ("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        _check_indices(name, indices, shape)
        check_device(name, indices, words)
    seqlen = shape[-1]
    if position_ids is None and not 0 <= offset <= positions.shape[0] - seqlen:
        raise ValueError(f"offset: {positions.shape[0]} positions do not reach from {offset} for {seqlen} tokens")
    if token_type_ids is None and not types.shape[0]:
        raise ValueError("types: expected at least one row, got none")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a probability from 0 to 1, got {p}")
    if p > 0.0 and seed is None:
        seed = draw_seed(words.device)
    return _call(
        words,
        positions,
        types,
        weight,
        bias,
        ids,
        token_type_ids,
        position_ids,
        seed if p > 0.0 else None,
        offset,
        padding_idx,
        eps,
        p,
        out_dtype or _z_dtype(words, positions, types),
        needs_backward(words, positions, types, weight, bias),
    )[0]


def _check_indices(name: str, indices: Tensor | None, shape: torch.Size) -> None:
    if indices is None:
        return
    if indices.dtype not in (torch.int64, torch.int32) or not indices.dim():
        raise ValueError(f"{name}: expected int64 or int32 [..., S], got {indices.dtype} {tuple(indices.shape)}")
    shared = (*(1 for _ in shape[:-1]), shape[-1])
    if tuple(indices.shape) not in (tuple(shape), shared):
        raise ValueError(f"{name}: expected shape {tuple(shape)} or {shared}, got {tuple(indices.shape)}")
