"""out = dropout(softmax(scale Q K' + mask)) V for every head, without ever having the scores in memory.

q [B, Sq, heads, D], k and v [B, Sk, kv heads, D] with any strides (the projections' own output, no transposes), or packed
[T, heads, D] with cu_seqlens (and cu_seqlens_q, if the queries are other rows than the keys). out has the shape of q and is
contiguous, ready for the next product.

    forward    4 Sq Sk D operations per head; reads q, k, v; writes out and 4 bytes per row and head
    backward   10 Sq Sk D in exact arithmetic; 14 here, because scores and dP are computed twice

Saved: q, k, v, out, and the logarithm of each row's softmax sum (in float32 and float64 the top score and the sum separately).
Dropout's bits are recomputed.

What is masked may stay finite: eager adds its masks, so a NaN behind a mask comes through, while the kernels do not read it. An
infinite key that no query attends to may get NaN as its own gradient.

FlashAttention-2 (Dao, arXiv:2307.08691). The kernels and their sources are in forward.py, backward_kv.py, backward_q.py and
backward_short.py.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.configs import Config
from ..core.failures import or_plain
from ..core.launch import (
    Work,
    accumulator,
    accumulator_torch,
    cdiv,
    choose,
    choose_short,
    draw_seed,
    float32_products,
    next_power_of_2,
)
from ..core.op import define_op
from ..key_bounds import key_bounds as bounds_of
from . import plain
from .backward_kv import attention_bwd_kv_kernel
from .backward_q import attention_bwd_q_kernel
from .backward_short import attention_bwd_short_kernel
from .checks import check_inputs, check_masks
from .forward import attention_fwd_kernel

__all__ = ["attention"]


Strides = tuple[int, int, int, int]  # batch, row, head, column; the batch's is 0 for packed rows


class Geometry(NamedTuple):
    """A call's shapes, strides and numbers: everything but its tensors."""

    sequences: int
    max_seqlen_q: int
    max_seqlen_k: int
    n_rows: int  # all rows of queries
    n_heads: int
    kv_heads: int
    head_size: int
    q: Strides
    k: Strides
    v: Strides
    mask: tuple[int, int, int, int] | None  # strides of a general mask: batch, head, query, key
    causal: bool
    scale: float
    p: float

    def numbers(self, like: Tensor) -> dict[str, Any]:
        """The numbers that the forward and both large kernels of the backward take."""
        return {
            "q_strides": self.q,
            "k_strides": self.k,
            "v_strides": self.v,
            "mask_strides": self.mask or (0, 0, 0, 0),
            "n_heads": self.n_heads,
            "max_seqlen_q": self.max_seqlen_q,
            "max_seqlen_k": self.max_seqlen_k,
            "n_rows": self.n_rows,
            "SCALE": self.scale,
            "CAUSAL": self.causal,
            "P_DROP": self.p,
            "PRECISION": _precision(like.dtype),
            "ACC": accumulator(like.dtype),
            "D": self.head_size,
            "GROUP": self.n_heads // self.kv_heads,
            "BLOCK_D": _block_d(self.head_size),
        }

    def choose(self, kernel: str, like: Tensor, grouped: bool = False) -> Config:
        """The configuration. A general mask takes a pointer per score, a loop over heads what outlives an iteration: their
        tiles are smaller."""
        if grouped:
            kernel = f"{kernel}_grouped"
        elif self.mask is not None:
            kernel = f"{kernel}_masked"
        return choose(kernel, like, self.head_size, self.longest)

    @property
    def longest(self) -> int:
        return max(self.max_seqlen_q, self.max_seqlen_k)


def _strides(x: Tensor) -> Strides:
    return x.stride() if x.dim() == 4 else (0, *x.stride())


def _sizes(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[int, int, int]:
    """(sequences, rows of the longest, all rows)."""
    if cu_seqlens is None:
        return x.shape[0], x.shape[1], x.shape[0] * x.shape[1]
    return cu_seqlens.shape[0] - 1, max_seqlen, x.shape[0]


def geometry_of(given: "Inputs") -> Geometry:
    q, k, v, cu_seqlens, mask = given.q, given.k, given.v, given.cu_seqlens, given.mask
    cu_seqlens_q, max_seqlen_q = given.cu_seqlens_q, given.max_seqlen_q
    if cu_seqlens_q is None:  # the queries are the keys' rows
        cu_seqlens_q, max_seqlen_q = cu_seqlens, given.max_seqlen
    sequences, longest_q, n_rows = _sizes(q, cu_seqlens_q, max_seqlen_q)
    _, longest_k, _ = _sizes(k, cu_seqlens, given.max_seqlen)
    heads = q.shape[-2], k.shape[-2], q.shape[-1]
    strides = _strides(q), _strides(k), _strides(v), None if mask is None else mask.stride()
    return Geometry(sequences, longest_q, longest_k, n_rows, *heads, *strides, given.causal, given.scale, given.p)


def _aligned(*tensors: Tensor) -> bool:
    """Whether to tell the kernels that each row of a head starts at a multiple of 16 bytes in all of these tensors.

    At BERT's head sizes Triton infers it, because 16 divides every stride. For other head sizes it is read off every stride and
    address: where it does not hold (a slice that starts at the third element of its storage, a stride of 41), a 16-byte load
    would be a misaligned access, which ends the program.
    """
    head_size, vector = tensors[0].shape[-1], 16 // tensors[0].element_size()
    if head_size % 16 == 0 or head_size % vector:
        return False
    return all(
        x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and not any(stride % vector for stride in x.stride()[:-1]) for x in tensors
    )


def _precision(dtype: torch.dtype) -> str:
    """The precision of products, read at each launch as torch's own products do. Triton's default would be TF32."""
    return float32_products()


def _block_d(head_size: int) -> int:
    return max(16, next_power_of_2(head_size))  # the matrix unit's smallest side is 16


def forward_work(geometry: Geometry, like: Tensor, aligned: bool) -> Work:
    """The launch for tensors of the dtype and device of `like`; aligned: `_aligned` of q, k and v."""
    config = geometry.choose("attention_forward", like)
    programs = geometry.sequences * geometry.n_heads * cdiv(geometry.max_seqlen_q, config.BLOCK_M)
    blocks = {"ALIGNED": aligned, "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N}
    return Work(attention_fwd_kernel, programs, config, geometry.numbers(like) | blocks)


def query_scratch(geometry: Geometry, dtype: torch.dtype) -> tuple[tuple[int, int, int], torch.dtype]:
    """Shape and dtype of what attention_bwd_q_kernel leaves for attention_bwd_kv_kernel: tiles.store_queries."""
    return (geometry.n_heads, geometry.n_rows, 4), torch.int64 if dtype == torch.float64 else torch.int32


def backward_q_work(geometry: Geometry, like: Tensor, dout: Strides, dq_row_stride: int, aligned: bool) -> Work:
    """aligned: `_aligned` of q, k, v, out, dout and the gradients. It also writes what the kernel for k and v reads per query
    row."""
    config = geometry.choose("attention_backward_q", like)
    programs = geometry.sequences * geometry.n_heads * cdiv(geometry.max_seqlen_q, config.BLOCK_M)
    return Work(
        attention_bwd_q_kernel,
        programs,
        config,
        _backward_numbers(geometry, like, dout, aligned, config) | {"dq_row_stride": dq_row_stride},
    )


def backward_kv_work(geometry: Geometry, like: Tensor, dout: Strides, dkv_row_stride: int, aligned: bool) -> Work:
    """aligned: `_aligned` of q, k, v, dout and the gradients."""
    config = geometry.choose("attention_backward_kv", like, grouped=geometry.n_heads != geometry.kv_heads)
    programs = geometry.sequences * geometry.kv_heads * cdiv(geometry.max_seqlen_k, config.BLOCK_N)
    return Work(
        attention_bwd_kv_kernel,
        programs,
        config,
        _backward_numbers(geometry, like, dout, aligned, config) | {"dkv_row_stride": dkv_row_stride},
    )


def backward_short_work(
    geometry: Geometry, like: Tensor, dout: Strides, dq_row_stride: int, dkv_row_stride: int, aligned: bool
) -> Work | None:
    """One launch in place of the other two, for sequences short enough for its tables; None for longer ones, with a general
    mask, and where heads share keys. aligned: `_aligned` of q, k, v, out, dout and the gradients."""
    if geometry.mask is not None or geometry.n_heads != geometry.kv_heads:
        return None
    config = choose_short("attention_backward_short", like, geometry.head_size, geometry.longest)
    if config is None:
        return None
    numbers = _backward_numbers(geometry, like, dout, aligned, config)
    numbers |= {"dq_row_stride": dq_row_stride, "dkv_row_stride": dkv_row_stride}
    del numbers["mask_strides"], numbers["GROUP"]
    return Work(attention_bwd_short_kernel, geometry.sequences * geometry.n_heads, config, numbers)


def _backward_numbers(geometry: Geometry, like: Tensor, dout: Strides, aligned: bool, config: Config) -> dict[str, Any]:
    blocks = {"ALIGNED": aligned, "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N}
    return geometry.numbers(like) | {"dout_strides": dout} | blocks


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    key_bounds: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    cu_seqlens_q: Tensor | None
    seed: Tensor | None
    max_seqlen: int | None
    max_seqlen_q: int | None
    causal: bool
    scale: float
    p: float


class Saved(NamedTuple):
    inputs: Inputs
    out: Tensor
    logsumexp: Tensor


Gradients = tuple[Tensor, Tensor, Tensor]


@or_plain(plain.forward)
def launch_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v, key_mask, key_bounds, mask, cu_seqlens, cu_seqlens_q, seed, *_ = inputs
    out, logsumexp = _allocate_forward(inputs)
    if not q.numel() or not k.numel():
        return out.zero_(), logsumexp.zero_()  # no keys: every sum is empty
    geometry = geometry_of(inputs)
    forward_work(geometry, q, _aligned(q, k, v)).launch(
        q,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        logsumexp_ptr=logsumexp,
        key_mask_ptr=key_mask,
        key_bounds_ptr=key_bounds,
        mask_ptr=mask,
        cu_seqlens_q_ptr=cu_seqlens if cu_seqlens_q is None else cu_seqlens_q,
        cu_seqlens_k_ptr=cu_seqlens,
        seed_ptr=seed,
    )
    return out, logsumexp


def _allocate_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    q = inputs.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = math.prod(q.shape[:-2])  # torch.Size.numel would fix a size that torch.compile keeps dynamic
    planes = 2 if q.element_size() > 2 else 1  # see tiles.store_softmax
    return out, torch.empty((planes, q.shape[-2], rows), dtype=accumulator_torch(q.dtype), device=q.device)


def _launch_backward(dout: Tensor, saved: Saved) -> Gradients:
    return _launch_backward_into(_allocate_backward(dout, saved), dout, saved)


def _allocate_backward(dout: Tensor, saved: Saved) -> Gradients:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in saved.inputs[:3])


def launch_backward_packed(dout: Tensor, saved: Saved) -> Gradients:
    """Like _launch_backward; for self-attention the three gradients are views of one buffer [..., 3, heads, D].

    That buffer is the gradient of a product that computed q, k and v together: `unpack` passes it on without a copy.
    """
    q, k, *_ = saved.inputs
    if q.shape != k.shape:
        return _launch_backward(dout, saved)
    buffer = torch.empty((*q.shape[:-2], 3, *q.shape[-2:]), dtype=q.dtype, device=q.device)
    return _launch_backward_into(buffer.unbind(-3), dout, saved)


@or_plain(plain.backward, after=launch_forward)
def _launch_backward_into(grads: Gradients, dout: Tensor, saved: Saved) -> Gradients:
    inputs, out, logsumexp = saved
    q, k, v, key_mask, key_bounds, mask, cu_seqlens, cu_seqlens_q, seed, *_ = inputs
    dq, dk, dv = grads
    if not q.numel() or not k.numel():
        return tuple(grad.zero_() for grad in grads)
    geometry = geometry_of(inputs)
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "dout_ptr": dout,
        "key_mask_ptr": key_mask,
        "key_bounds_ptr": key_bounds,
        "cu_seqlens_q_ptr": cu_seqlens if cu_seqlens_q is None else cu_seqlens_q,
        "cu_seqlens_k_ptr": cu_seqlens,
    }
    aligned = _aligned(q, k, v, out, dout, dq, dk, dv)
    of_queries = {"logsumexp_ptr": logsumexp, "seed_ptr": seed, "dq_ptr": dq, "sums_ptr": None}
    work = backward_short_work(geometry, q, _strides(dout), dq.stride(-3), dk.stride(-3), aligned)
    if work is not None:
        work.launch(q, **shared, **of_queries, dk_ptr=dk, dv_ptr=dv)
        return dq, dk, dv
    shape, dtype = query_scratch(geometry, q.dtype)
    shared |= {"queries_ptr": torch.empty(shape, dtype=dtype, device=q.device), "mask_ptr": mask}
    backward_q_work(geometry, q, _strides(dout), dq.stride(-3), aligned).launch(q, **shared, out_ptr=out, **of_queries)
    of_keys = {"dk_ptr": dk, "dv_ptr": dv, "sums_ptr": None}
    backward_kv_work(geometry, q, _strides(dout), dk.stride(-3), aligned).launch(q, **shared, **of_keys)
    return dq, dk, dv


def _save(inputs: Inputs, out: Tensor, logsumexp: Tensor) -> Saved:
    return Saved(inputs, out, logsumexp)


def _gradients(backward, dout: Tensor, saved: Saved, needs: Inputs) -> dict[str, Tensor]:
    return dict(zip(("q", "k", "v"), backward(dout, saved), strict=True))


_call = define_op(
    "attention",
    (launch_forward, _allocate_forward),
    (_launch_backward, _allocate_backward),
    _save,
    _gradients,
    eager_backward=launch_backward_packed,
)


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
    seed: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k' + mask) v for every head, with dropout on the probabilities.

    A row whose keys are all masked is the average of all of them, as it is with eager's additive masks. float32 products are
    true float32 unless torch.set_float32_matmul_precision allows TF32.

    Args:
        q: [B, Sq, heads, D], or packed [T, heads, D]. fp64 (on a GPU computed by plain PyTorch), fp32, fp16 or bf16; any
            strides; D from 1 to 256.
        k, v: [B, Sk, kv heads, D], or packed like q. The number of kv heads divides that of q's heads; each serves a group of
            adjacent heads of q (grouped-query attention; with one kv head multi-query).
        key_mask: bool [B, Sk], true where a key is valid.
        mask: [B or 1, heads or 1, Sq or 1, Sk or 1], without leading dimensions if they are 1, such as [Sq, Sk]; bool (true
            where a key is seen) or a number that is added to the scaled score.
        cu_seqlens: int32 [sequences + 1], the start of each packed sequence and the end of the last: from 0 to T. Rows outside
            of all sequences are not written.
        max_seqlen: length of the longest packed sequence, or more.
        cu_seqlens_q, max_seqlen_q: the same for queries that are other rows than the keys: q is then [Tq, heads, D].
        causal: query i sees keys up to i + Sk - Sq.
        scale: of the scores; 1 / sqrt(D) by default.
        p: probability of dropping an attention probability, rounded to 2**-32.
        key_bounds: bounds_of(key_mask), if already known.
        seed: int64 [] on q's device; drawn from torch's generator when None and p > 0.

    Returns:
        The shape of q, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a dtype without a kernel, a mask that requires a gradient, a
            number of kv heads that does not divide q's, D over 256, a scale that is not finite, p outside [0, 1].
    """
    check_inputs(q, k, v, scale, p, seed, cu_seqlens, max_seqlen, cu_seqlens_q, max_seqlen_q)
    check_masks(q, k, key_mask, mask, key_bounds)
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if key_mask is not None:
        key_bounds = bounds_of(key_mask) if key_bounds is None else key_bounds.contiguous()
        key_mask = key_mask.contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    if cu_seqlens_q is not None:
        cu_seqlens_q = cu_seqlens_q.contiguous()
    if p > 0.0 and seed is None:
        seed = draw_seed(q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    seed = seed if p > 0.0 else None
    lengths = (max_seqlen, max_seqlen_q)
    return _call(Inputs(q, k, v, key_mask, key_bounds, mask, cu_seqlens, cu_seqlens_q, seed, *lengths, causal, scale, p))[0]
