"""out = dropout(softmax(scale Q K' + mask)) V for every head, without the scores ever in memory.

q [B, Sq, heads, D], k and v [B, Sk, kv heads, D] with any strides (the projections' own output, no transposes), or packed
[T, heads, D] with cu_seqlens (and cu_seqlens_q, where the queries are other rows than the keys); out has the shape of
q, contiguous: ready for the next product.

    forward    4 Sq Sk D operations a head; reads q, k, v; writes out and 4 bytes a row and head
    backward   10 Sq Sk D in exact arithmetic, 14 as computed here (scores and dP in both kernels)

Saved: q, k, v, out, and the logarithm of each row's softmax sum (in float32 and float64 the top score and the sum apart).
Dropout's bits are made again, not kept.
FlashAttention-2 (Dao, arXiv:2307.08691); the kernels and their sources are in attention_forward.py,
attention_backward.py and attention_backward_q.py.
"""

import math

import torch
import triton
from torch import Tensor

from . import plain_attention
from .attention_backward import attention_bwd_kv_kernel, attention_bwd_rows_kernel
from .attention_backward_q import attention_bwd_q_kernel
from .attention_checks import check_inputs, check_masks
from .attention_forward import attention_fwd_kernel
from .configs import Config
from .failures import or_plain
from .launch import INTERPRETED, accumulator, accumulator_torch, choose, differentiable, draw_seed, launch

__all__ = ["attention"]


def _geometry(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[int, int, int]:
    """Sequences, rows of the longest, rows in all."""
    if cu_seqlens is None:
        return x.shape[0], x.shape[1], x.shape[0] * x.shape[1]
    return cu_seqlens.shape[0] - 1, max_seqlen, x.shape[0]


def _of_queries(
    cu_seqlens: Tensor | None, cu_seqlens_q: Tensor | None, max_seqlen: int | None, max_seqlen_q: int | None
) -> tuple[Tensor | None, int | None]:
    """The queries' own bounds, or the keys' where they are the same rows."""
    return (cu_seqlens, max_seqlen) if cu_seqlens_q is None else (cu_seqlens_q, max_seqlen_q)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    """The four strides of a tensor as kernel arguments; a packed one has no batch."""
    batch, row, head, col = x.stride() if x.dim() == 4 else (0, *x.stride())
    return {
        f"{name}_batch_stride": batch,
        f"{name}_row_stride": row,
        f"{name}_head_stride": head,
        f"{name}_col_stride": col,
    }


def _mask_strides(mask: Tensor | None) -> dict[str, int]:
    batch, head, q, k = (0, 0, 0, 0) if mask is None else mask.stride()
    return {"mask_batch_stride": batch, "mask_head_stride": head, "mask_q_stride": q, "mask_k_stride": k}


def _aligned(*tensors: Tensor) -> bool:
    """Whether the kernels are told that each row of a head starts at a multiple of 16 bytes, in all of these tensors.

    Triton sees it for itself where 16 divides every stride, so at BERT's head sizes nobody has to ask. Where it is not so
    (a slice whose first element is the third of its storage, a stride of 41), a load of 16 bytes would be an error.
    """
    head_size, vector = tensors[0].shape[-1], 16 // tensors[0].element_size()
    if head_size % 16 == 0 or head_size % vector:
        return False
    return all(
        x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and not any(stride % vector for stride in x.stride()[:-1]) for x in tensors
    )


def _constants(q: Tensor, k: Tensor, causal: bool, scale: float, p: float) -> dict[str, object]:
    return {
        "SCALE": scale,
        "CAUSAL": causal,
        "P_DROP": p,
        "PRECISION": _precision(q),
        "ACC": accumulator(q.dtype),
        "D": q.shape[-1],
        "GROUP": q.shape[-2] // k.shape[-2],
        "BLOCK_D": _block_d(q),
    }


def _precision(q: Tensor) -> str:
    """Read at each launch, as torch's own products do: Triton's default would be TF32."""
    if q.dtype == torch.float64 and not INTERPRETED:
        return "sum"  # triton compiles no float64 product; it is there for gradcheck
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _block_d(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[-1]))  # the matrix unit's shortest side is 16


def _choose(kernel: str, q: Tensor, mask: Tensor | None = None, grouped: bool = False) -> Config:
    """A general mask needs registers for a pointer a score, a loop over heads for what goes round it: smaller tiles."""
    if grouped:
        kernel = f"{kernel}_grouped"
    elif mask is not None:
        kernel = f"{kernel}_masked"
    return choose(kernel, q, q.shape[-1])


@or_plain(plain_attention.attention)
def _launch_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    key_bounds: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    seed: Tensor | None,
    max_seqlen: int | None,
    max_seqlen_q: int | None,
    causal: bool,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    out, logsumexp = _allocate_fwd(
        q, k, v, key_mask, key_bounds, mask, cu_seqlens, cu_seqlens_q, seed, max_seqlen, max_seqlen_q, causal, scale, p
    )
    if not q.numel() or not k.numel():
        return out.zero_(), logsumexp.zero_()  # what an empty sum is
    cu_seqlens_q, max_seqlen_q = _of_queries(cu_seqlens, cu_seqlens_q, max_seqlen, max_seqlen_q)
    sequences, seqlen_q, n_rows = _geometry(q, cu_seqlens_q, max_seqlen_q)
    _, seqlen_k, _ = _geometry(k, cu_seqlens, max_seqlen)
    n_heads = q.shape[-2]
    config = _choose("attention_forward", q, mask)
    launch(
        attention_fwd_kernel,
        sequences * n_heads * triton.cdiv(seqlen_q, config.BLOCK_M),
        config,
        q,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        logsumexp_ptr=logsumexp,
        key_mask_ptr=key_mask,
        key_bounds_ptr=key_bounds,
        mask_ptr=mask,
        cu_seqlens_q_ptr=cu_seqlens_q,
        cu_seqlens_k_ptr=cu_seqlens,
        seed_ptr=seed,
        **_strides("q", q),
        **_strides("k", k),
        **_strides("v", v),
        **_mask_strides(mask),
        n_heads=n_heads,
        max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k,
        n_rows=n_rows,
        **_constants(q, k, causal, scale, p),
        ALIGNED=_aligned(q, k, v),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
    )
    return out, logsumexp


def _allocate_fwd(q, *_):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = math.prod(q.shape[:-2])  # torch.Size.numel would fix a size that torch.compile keeps open
    planes = 2 if q.element_size() > 2 else 1  # attention_tiles.store_softmax
    return out, torch.empty((planes, q.shape[-2], rows), dtype=accumulator_torch(q.dtype), device=q.device)


def _launch_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    key_mask: Tensor | None,
    key_bounds: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_q: Tensor | None,
    seed: Tensor | None,
    max_seqlen: int | None,
    max_seqlen_q: int | None,
    causal: bool,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _allocate_bwd(dout, q, k, v)
    return _launch_bwd_into(
        grads, dout, q, k, v, out, logsumexp, key_mask, key_bounds, mask, cu_seqlens, cu_seqlens_q, seed,
        max_seqlen, max_seqlen_q, causal, scale, p,
    )  # fmt: skip


def _allocate_bwd(dout, q, k, v, *_):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _launch_bwd_packed(dout, q, k, v, *rest):
    """As _launch_bwd; of one self-attention, the three gradients are views of one buffer [..., 3, heads, D].

    That buffer is the gradient of a product that gave q, k and v at once: `unpack` hands it on without a copy.
    """
    if q.shape != k.shape:
        return _launch_bwd(dout, q, k, v, *rest)
    buffer = torch.empty((*q.shape[:-2], 3, *q.shape[-2:]), dtype=q.dtype, device=q.device)
    return _launch_bwd_into(buffer.unbind(-3), dout, q, k, v, *rest)


@or_plain(plain_attention.attention_backward, after=_launch_fwd)
def _launch_bwd_into(
    grads, dout, q, k, v, out, logsumexp, key_mask, key_bounds, mask, cu_seqlens, cu_seqlens_q, seed,
    max_seqlen, max_seqlen_q, causal, scale, p,
):  # fmt: skip
    dq, dk, dv = grads
    if not q.numel() or not k.numel():
        return tuple(grad.zero_() for grad in grads)
    cu_seqlens_q, max_seqlen_q = _of_queries(cu_seqlens, cu_seqlens_q, max_seqlen, max_seqlen_q)
    sequences, seqlen_q, n_rows = _geometry(q, cu_seqlens_q, max_seqlen_q)
    _, seqlen_k, _ = _geometry(k, cu_seqlens, max_seqlen)
    n_heads, head_size = q.shape[-2:]
    delta = torch.empty_like(logsumexp[0])
    row_key = torch.empty_like(logsumexp[0], dtype=torch.int32) if p > 0.0 else None
    constants = _constants(q, k, causal, scale, p)

    config = _choose("attention_backward_rows", q)
    launch(
        attention_bwd_rows_kernel,
        sequences * n_heads * triton.cdiv(seqlen_q, config.BLOCK_M),
        config,
        q,
        dout_ptr=dout,
        out_ptr=out,
        delta_ptr=delta,
        row_key_ptr=row_key,
        cu_seqlens_q_ptr=cu_seqlens_q,
        seed_ptr=seed,
        **_strides("dout", dout),
        n_heads=n_heads,
        max_seqlen_q=seqlen_q,
        n_rows=n_rows,
        **{name: constants[name] for name in ("P_DROP", "ACC", "D", "BLOCK_D")},
        ALIGNED=_aligned(dout, out),
        BLOCK_M=config.BLOCK_M,
    )
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "dout_ptr": dout,
        "logsumexp_ptr": logsumexp,
        "delta_ptr": delta,
        "row_key_ptr": row_key,
        "key_mask_ptr": key_mask,
        "key_bounds_ptr": key_bounds,
        "mask_ptr": mask,
        "cu_seqlens_q_ptr": cu_seqlens_q,
        "cu_seqlens_k_ptr": cu_seqlens,
        **_strides("q", q),
        **_strides("k", k),
        **_strides("v", v),
        **_strides("dout", dout),
        **_mask_strides(mask),
        "n_heads": n_heads,
        "max_seqlen_q": seqlen_q,
        "max_seqlen_k": seqlen_k,
        "n_rows": n_rows,
        **constants,
        "ALIGNED": _aligned(q, k, v, dout, dq, dk, dv),
    }
    config = _choose("attention_backward_q", q, mask)
    launch(
        attention_bwd_q_kernel,
        sequences * n_heads * triton.cdiv(seqlen_q, config.BLOCK_M),
        config,
        q,
        **shared,
        dq_ptr=dq,
        dq_row_stride=dq.stride(-3),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
    )
    config = _choose("attention_backward_kv", q, mask, grouped=n_heads != k.shape[-2])
    launch(
        attention_bwd_kv_kernel,
        sequences * k.shape[-2] * triton.cdiv(seqlen_k, config.BLOCK_N),
        config,
        q,
        **shared,
        dk_ptr=dk,
        dv_ptr=dv,
        dkv_row_stride=dk.stride(-3),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
    )
    return dq, dk, dv


def _save(ctx, inputs, output):
    q, k, v, key_mask, key_bounds, mask, cu_seqlens, cu_seqlens_q, seed, *ctx.settings = inputs
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, logsumexp, key_mask, key_bounds, mask, cu_seqlens, cu_seqlens_q, seed)


def _gradients(backward, ctx, dout, *_):
    if dout is None or not any(ctx.needs_input_grad[:3]):
        return (None,) * 14
    return *backward(dout, *ctx.saved_tensors, *ctx.settings), *(None,) * 11


_op = torch.library.custom_op("fastbert::attention", _launch_fwd, mutates_args=())
_op.register_fake(_allocate_fwd)
_backward_op = torch.library.custom_op("fastbert::attention_backward", _launch_bwd, mutates_args=())
_backward_op.register_fake(_allocate_bwd)
_call = differentiable(_launch_fwd, _launch_bwd_packed, _save, _gradients, _op, _backward_op)


def bounds_of(key_mask: Tensor) -> Tensor:
    """What the kernels skip by: int32 [B, 3] of each row of a bool [B, Sk] mask: the first key that is valid (Sk if
    none is), how many keys lead without a gap, and the end of the last one that is valid. No synchronisation."""
    seqlen = key_mask.shape[1]
    if seqlen == 0:
        return torch.zeros((key_mask.shape[0], 3), dtype=torch.int32, device=key_mask.device)
    places = torch.arange(seqlen, device=key_mask.device, dtype=torch.int32)
    first = torch.where(key_mask, places, seqlen).amin(1)
    leading = torch.where(key_mask, seqlen, places).amin(1)
    end = torch.where(key_mask, places + 1, 0).amax(1)
    return torch.stack([first, leading, end], dim=1).to(torch.int32)


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

    A row whose keys are all masked is the average of all of them, as it is with eager's additive masks. float32
    products are true float32 unless torch.set_float32_matmul_precision allows TF32.

    Args:
        q: [B, Sq, heads, D], or packed [T, heads, D]. fp64, fp32, fp16 or bf16; any strides; D from 1 to 256.
        k, v: [B, Sk, kv heads, D], or packed like q. kv heads are as many as q's, or a divisor of that: each then serves a
            group of q's neighbouring heads (grouped queries; one kv head: multi-query).
        key_mask: bool [B, Sk], true where a key is valid.
        mask: [B or 1, heads or 1, Sq or 1, Sk or 1], leading dimensions may be left out, [Sq, Sk] for one; bool (true
            where seen) or a number added to the scaled score.
        cu_seqlens: int32 [sequences + 1], where each packed sequence starts and the last ends: from 0 to T. Rows that it
            leaves out are not written.
        max_seqlen: length of the longest packed sequence, or more.
        cu_seqlens_q, max_seqlen_q: the same of the queries, where they are other rows than the keys: q is then [Tq, heads, D].
        causal: query i sees keys up to i + Sk - Sq.
        scale: 1 / sqrt(D) by default.
        p: probability of dropping a probability, rounded to 2**-32.
        key_bounds: bounds_of(key_mask), where it is known already.
        seed: int64 [] on q's device; drawn from torch's generator when None and p > 0.

    Returns:
        The shape of q, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a dtype that has no kernel, a mask that requires a
            gradient, heads of k that do not divide q's, D over 256, a scale that is not finite, p outside [0, 1].
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
    return _call(q, k, v, key_mask, key_bounds, mask, cu_seqlens, cu_seqlens_q, seed, *lengths, causal, scale, p)[0]
