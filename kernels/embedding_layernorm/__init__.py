"""y = dropout(LayerNorm(words[ids] + types[token_type_ids] + positions[position_ids])): BertEmbeddings.

words [V, H], positions [P, H], types [N, H], ids [B, S]. With z the sum of the three rows, added and rounded in eager's
order, and T = B * S:

    forward    y = dropout((z - mean) * rstd * weight + bias)      reads the rows, writes y             T (3H + H) b bytes
    backward   dz = LayerNorm'(dropout'(dy)), and its sums per     reads dy, the rows; writes dz, then reads it once for
               row of each table (gradients.py and sums.py)        the words and once for positions and types

Saved: mean and rstd per row in float32. The backward gathers z again, which costs what reading it back would and saves writing
and keeping it, and recomputes the keep mask. Position ids that are a range, or the same for the whole batch, and types that are
few need no sorting. No atomics: the same bits every time.

An id outside of its table raises on the CPU and fails an assertion on the device, as in torch. For that the forward kernel
alone is compiled with debug=True, which its launch asks for, without the overflow checks that debug=True implies.
"""

from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from ..core.autograd import needs_backward
from ..core.checks import MAX_WIDTH, check_device, check_dtype, check_vector
from ..core.failures import or_plain
from ..core.launch import (
    accumulator,
    accumulator_torch,
    as_rows,
    cdiv,
    choose,
    draw_seed,
    launch,
    next_power_of_2,
    resident_programs,
)
from ..core.op import define_op
from . import plain
from .arguments import Inputs, Needs, Saved, promote, z_dtype
from .gradients import by_runs
from .ids import batch_stride, packed_ids
from .rows import embedding_layernorm_bwd_kernel, embedding_layernorm_fwd_kernel
from .sums import GROUPS, MAX_TYPES, by_places, finish

__all__ = ["embedding_layernorm"]


def _sum_arguments(given: Inputs | Saved) -> dict[str, object]:
    """The arguments by which both kernels compute z: those of summed_rows."""
    words, positions, types = given.words, given.positions, given.types
    ids, token_type_ids, position_ids = given.ids, given.token_type_ids, given.position_ids
    shape = words.shape[:-1] if ids is None else ids.shape
    rows = words if words.dim() == 2 else as_rows(words)
    summed, promoted = promote(words.dtype, types.dtype), z_dtype(given)
    return {
        "words_ptr": rows,
        "positions_ptr": positions.contiguous(),
        "types_ptr": types.contiguous(),
        "ids_ptr": None if ids is None else ids.contiguous(),
        "position_ids_ptr": None if position_ids is None else position_ids.contiguous(),
        "type_ids_ptr": None if token_type_ids is None else token_type_ids.contiguous(),
        "words_row_stride": rows.stride(0),
        "words_col_stride": rows.stride(1),
        "position_batch_stride": batch_stride(position_ids, shape),
        "type_batch_stride": batch_stride(token_type_ids, shape),
        "seqlen": shape[-1],
        "offset": given.offset,
        "n_words": rows.shape[0],
        "n_positions": positions.shape[0],
        "n_types": types.shape[0],
        "N_COLS": words.shape[-1],
        "SUM": _language_type(summed),
        "Z": _language_type(promoted),
        "ACC": accumulator(promoted),
    }


@cache
def _language_type(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _check_ranges(given: Inputs) -> None:
    for ids, table in ((given.ids, given.words), (given.token_type_ids, given.types), (given.position_ids, given.positions)):
        _check_range(ids, table)


def _check_range(ids: Tensor | None, table: Tensor) -> None:
    # On a GPU the kernel checks: looking at the ids here would be a synchronisation.
    if ids is not None and ids.device.type == "cpu" and ids.numel():
        low, high = ids.aminmax()
        if low < 0 or high >= table.shape[0]:
            raise IndexError("index out of range in self")


@or_plain(plain.forward)
def launch_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    _check_ranges(inputs)
    y, mean, rstd = _allocate_forward(inputs)
    n_rows, n_cols = y.shape[:-1].numel(), y.shape[-1]
    widest = max((y, inputs.words, inputs.positions, inputs.types), key=Tensor.element_size)
    config = choose("layernorm_forward", widest, n_cols)
    launch(
        embedding_layernorm_fwd_kernel,
        cdiv(n_rows, config.BLOCK_M) if n_cols else 0,
        config,
        y,
        **_sum_arguments(inputs),
        weight_ptr=inputs.weight.contiguous(),
        bias_ptr=inputs.bias.contiguous(),
        seed_ptr=inputs.seed,
        y_ptr=y,
        mean_ptr=mean if inputs.save else None,
        rstd_ptr=rstd if inputs.save else None,
        n_rows=n_rows,
        EPS=inputs.eps,
        P_DROP=inputs.p,
        VECTOR=16 // widest.element_size(),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=next_power_of_2(n_cols),
        debug=True,  # compiles the kernel's assertions; an argument of the launch, because compiled kernels are cached by those
        sanitize_overflow=False,  # which debug=True would enable
    )
    return y, mean, rstd


def _allocate_forward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    words, ids = inputs.words, inputs.ids
    shape = words.shape[:-1] if ids is None else ids.shape
    y = words.new_empty((*shape, words.shape[-1]), dtype=inputs.out_dtype)
    mean = words.new_empty(shape if inputs.save else (0,), dtype=accumulator_torch(z_dtype(inputs)))
    return y, mean, torch.empty_like(mean)


def launch_backward(dy: Tensor, saved: Saved, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the tables, weight and bias; an empty tensor for each that is not asked for."""
    words, positions, types, weight = saved.words, saved.positions, saved.types, saved.weight
    ids, token_type_ids, position_ids, places = saved.ids, saved.token_type_ids, saved.position_ids, saved.places
    needs_words, needs_positions, needs_types, needs_weight, needs_bias = needs
    dz, sums = _launch_rows(dy, saved, needs_words or needs_positions or needs_types, needs_weight or needs_bias)
    shape = dy.shape[:-1]

    # Positions that all sequences share and few types are summed by place; other ids are sorted first.
    counted = position_ids is None or places is not None
    shared = needs_positions and (counted or position_ids.numel() < shape.numel())
    few = needs_types and (token_type_ids is None or types.shape[0] <= MAX_TYPES)
    seqlen = shape[-1] if places is None else places.shape[-1]
    place_sums = None
    if shared or few:
        n_types = types.shape[0] if few and token_type_ids is not None else 1
        type_ids = token_type_ids.contiguous() if n_types > 1 else None
        type_stride = batch_stride(token_type_ids, shape)
        place_sums = by_places(dz, seqlen if shared else GROUPS, type_ids, n_types, shape[-1], type_stride, places)
    dwords = dpositions = by_place = dtypes = dweight = dbias = None
    if shared and counted:
        dpositions = by_place = positions.new_empty(positions.shape)
    elif shared:
        by_place = place_sums.new_empty(seqlen, dz.shape[1])
    if few:
        dtypes = types.new_empty(types.shape)
    if needs_weight:
        dweight = weight.new_empty(weight.shape)
    if needs_bias:
        dbias = weight.new_empty(weight.shape, dtype=saved.bias_dtype)
    if place_sums is not None or sums is not None:
        finish(sums, place_sums, dweight, dbias, by_place, dtypes, saved.offset if counted else 0)
        if dpositions is not None and saved.position_padding_idx is not None:
            dpositions[saved.position_padding_idx].zero_()

    if needs_words and ids is None:
        dwords = dz.view(words.shape).to(words.dtype)
    elif needs_words:
        dwords = by_runs(dz, ids.reshape(-1), words.shape[0], saved.padding_idx, words.dtype)
    if needs_positions and dpositions is None:
        read = position_ids if shared else position_ids.expand(shape)
        skip = saved.position_padding_idx
        dpositions = by_runs(by_place if shared else dz, read.reshape(-1), positions.shape[0], skip, positions.dtype)
    if needs_types and not few:
        dtypes = by_runs(dz, token_type_ids.expand(shape).reshape(-1), types.shape[0], None, types.dtype)
    gradients = dwords, dpositions, dtypes, dweight, dbias
    return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in gradients)


@or_plain(plain.rows_backward)
def _launch_rows(dy: Tensor, saved: Saved, needs_dz: bool, needs_sums: bool) -> tuple[Tensor, Tensor | None]:
    """dz [T, H], the gradient of LayerNorm's input, and the partial sums [n, 2, H] of the gradients of weight and bias."""
    mean = saved.mean
    n_cols = dy.shape[-1]
    dy = as_rows(dy)
    n_rows = dy.shape[0]
    dz = dy.new_empty((n_rows, n_cols) if needs_dz else (0,), dtype=z_dtype(saved))
    widest = max((dy, saved.words, saved.positions, saved.types), key=Tensor.element_size)
    config = choose("layernorm_backward", widest, n_cols)
    programs = resident_programs(config, dy, cdiv(n_rows, config.BLOCK_M))
    chunks, block_n = config.chunks(n_cols)
    sums = mean.new_empty(programs if dy.numel() else 0, 2, n_cols) if needs_sums else None
    launch(
        embedding_layernorm_bwd_kernel,
        programs if dy.numel() else 0,
        config,
        dy,
        dy_ptr=dy,
        **_sum_arguments(saved),
        mean_ptr=mean,
        rstd_ptr=saved.rstd,
        weight_ptr=saved.weight.contiguous(),
        seed_ptr=saved.seed,
        dz_ptr=dz if needs_dz else None,
        sums_ptr=sums,
        dy_row_stride=dy.stride(0),
        dy_col_stride=dy.stride(1),
        n_rows=n_rows,
        n_programs=programs,
        P_DROP=saved.p,
        STAGES=config.num_stages,
        VECTOR=16 // widest.element_size(),
        BLOCK_M=config.BLOCK_M,
        CHUNKS=chunks,
        BLOCK_N=block_n,
    )
    return dz, sums


def _allocate_backward(dy: Tensor, saved: Saved, needs: Needs) -> tuple[Tensor, ...]:
    like = saved.words, saved.positions, saved.types, saved.weight, saved.weight
    dtypes = *(tensor.dtype for tensor in like[:4]), saved.bias_dtype
    return tuple(
        tensor.new_empty(tensor.shape, dtype=dtype) if needed else dy.new_empty(0)
        for tensor, dtype, needed in zip(like, dtypes, needs, strict=True)
    )


def _save(inputs: Inputs, y: Tensor, mean: Tensor, rstd: Tensor) -> Saved:
    tables = inputs.words, inputs.positions, inputs.types, inputs.weight
    read = inputs.ids, inputs.token_type_ids, inputs.position_ids, inputs.places, inputs.seed
    padding = inputs.padding_idx, inputs.position_padding_idx
    return Saved(*tables, mean, rstd, *read, inputs.offset, *padding, inputs.p, inputs.bias.dtype)


def _gradients(backward, dy: Tensor, saved: Saved, needs: Inputs) -> dict[str, Tensor]:
    found = backward(dy, saved, Needs(*needs[:5]))
    return dict(zip(Inputs._fields[:5], found, strict=True))


_call = define_op(
    "embedding_layernorm", (launch_forward, _allocate_forward), (launch_backward, _allocate_backward), _save, _gradients
)


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
    seed: Tensor | None = None,
    index: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    """dropout(LayerNorm(words[ids] + types[token_type_ids] + positions[position_ids])) in one pass over memory.

    Args:
        words: [V, H], the word embeddings; without ids, [..., S, H], the words' rows themselves. fp64 (on a GPU computed by
            plain PyTorch), fp32, fp16 or bf16, any strides.
        positions, types: [P, H] and [N, H], the other two tables; other dtypes promote the sum as torch does.
        weight, bias: [H], LayerNorm's.
        ids: int64 or int32 [..., S], rows of words.
        token_type_ids: the same for types, in the shape of ids, or [1, ..., S] shared by all sequences; row 0 when None.
        position_ids: the same for positions; offset, offset + 1, ... in each sequence when None.
        offset: the position of a sequence's first token, without position_ids.
        padding_idx: a row of words whose gradient is 0, as in nn.Embedding.
        position_padding_idx: the same for positions.
        eps: added to the variance.
        p: probability of dropping an element, rounded to 1/65536; kept elements are scaled by 1 / (1 - p).
        out_dtype: dtype of the result (autocast asks for float32); the promoted dtype by default.
        seed: int64 [] on words' device; drawn from torch's generator when None and p > 0.
        index: int32 [N], the rows to compute, none twice, packed as gather_rows packs them. Below 0: a row that is not read,
            whose upstream gradient must be 0.
        inverse: int32 [..., S], with index: the place of each row in index, negative if it has none.

    Returns:
        [..., S, H], contiguous; with index [1, N, H].

    Raises:
        ValueError: shapes or devices that do not fit, a dtype without a kernel, p outside [0, 1], H over 8192, an index without
            inverse or ids.
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
        raise ValueError(f"offset: positions {offset} to {offset + seqlen - 1} do not fit a table of {positions.shape[0]} rows")
    if token_type_ids is None and not types.shape[0]:
        raise ValueError("types: expected at least one row, got none")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a probability from 0 to 1, got {p}")
    _check_packing(index, inverse, ids, words)
    read = ids, token_type_ids, position_ids, offset, padding_idx, position_padding_idx
    out_dtype = out_dtype or promote(promote(words.dtype, types.dtype), positions.dtype)
    return embed(words, positions, types, weight, bias, *read, eps, p, out_dtype, seed, index, inverse)


def embed(
    words: Tensor,
    positions: Tensor,
    types: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    offset: int,
    padding_idx: int | None,
    position_padding_idx: int | None,
    eps: float,
    p: float,
    out_dtype: torch.dtype,
    seed: Tensor | None = None,
    index: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    """embedding_layernorm for checked arguments."""
    places = None
    if index is not None:
        if not torch.compiler.is_compiling():
            for indices, table in ((ids, words), (token_type_ids, types), (position_ids, positions)):
                _check_range(indices, table)
        places = inverse.view(-1, ids.shape[-1]) if position_ids is None else None
        packed = plain.packed_ids if torch.compiler.is_compiling() else packed_ids
        ids, token_type_ids, position_ids = packed(index, ids, token_type_ids, position_ids, offset)
    if not p > 0.0:
        seed = None
    elif seed is None:
        seed = draw_seed(words.device)
    save = needs_backward(words, positions, types, weight, bias)
    read = ids, token_type_ids, position_ids, places, seed, offset, padding_idx, position_padding_idx
    inputs = Inputs(words, positions, types, weight, bias, *read, eps, p, out_dtype, save)
    call = _call if save or torch.compiler.is_compiling() else launch_forward
    return call(inputs)[0]


def _check_packing(index: Tensor | None, inverse: Tensor | None, ids: Tensor | None, words: Tensor) -> None:
    if index is None and inverse is None:
        return
    if index is None or inverse is None or ids is None:
        raise ValueError("index: expected index, inverse and ids together, or neither index nor inverse, got only some of them")
    for name, vector, length in (("index", index, None), ("inverse", inverse, ids.numel())):
        if vector.dtype != torch.int32 or vector.dim() != 1 or (length is not None and vector.shape[0] != length):
            expected = "[N]" if length is None else f"[{length}]"
            raise ValueError(f"{name}: expected int32 {expected}, got {vector.dtype} {tuple(vector.shape)}")
        check_device(name, vector, words)


def _check_indices(name: str, indices: Tensor | None, shape: torch.Size) -> None:
    if indices is None:
        return
    if indices.dtype not in (torch.int64, torch.int32) or not indices.dim():
        raise ValueError(f"{name}: expected int64 or int32 [..., S], got {indices.dtype} {tuple(indices.shape)}")
    shared = (*(1 for _ in shape[:-1]), shape[-1])
    if tuple(indices.shape) not in (tuple(shape), shared):
        raise ValueError(f"{name}: expected shape {tuple(shape)} or {shared}, got {tuple(indices.shape)}")
