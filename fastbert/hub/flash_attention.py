"""FlashAttention's two functions, by the names and arguments of the package flash-attn 2, computed by the attention kernel.

transformers looks for these names in a kernel that it loads for `attn_implementation`. Beyond flash-attn they take float32.
"""

from typing import Any

import torch
from torch import Tensor

from . import packed

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Attention over sequences of one length.

    Args:
        q: [B, Sq, heads, D]; fp32, fp16 or bf16.
        k, v: [B, Sk, kv heads, D], where the number of kv heads divides that of q's.
        dropout_p: probability of dropping an attention probability.
        softmax_scale: of the scores; 1 / sqrt(D) by default.
        causal: query i sees keys up to i + Sk - Sq.
        window_size: how many keys before and behind i + Sk - Sq query i sees; -1 for all.
        deterministic: always holds.
        softcap, alibi_slopes, return_attn_probs: not computed.

    Returns:
        [B, Sq, heads, D]. A query that sees no key gets the average of all values, where flash-attn gives zeros.

    Raises:
        ValueError: an argument that is not computed, or as `attention`.
    """
    _refuse(softcap=softcap, alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs)
    more: dict[str, Any] = {"causal": causal}
    if not packed.covers(window_size, max(q.shape[1], k.shape[1]), causal):
        more = {"mask": packed.visible(q.shape[1], k.shape[1], causal, window_size, device=q.device)}
    return _attention(q, k, v, scale=softmax_scale, p=dropout_p, **more)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention over packed sequences. Arguments that `flash_attn_func` has too mean the same, for each sequence.

    Args:
        q: [Tq, heads, D].
        k, v: [Tk, kv heads, D].
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], the start of each sequence and the end of the last.
        max_seqlen_q, max_seqlen_k: lengths of the longest sequences, or more.
        block_table: not computed.

    Returns:
        [Tq, heads, D]. Where a window excludes keys, the sequences are padded to the longest for this call.

    Raises:
        ValueError: as `flash_attn_func`.
    """
    _refuse(softcap=softcap, alibi_slopes=alibi_slopes, return_attn_probs=return_attn_probs, block_table=block_table)
    longest_q, longest_k = int(max_seqlen_q), int(max_seqlen_k)
    if packed.covers(window_size, max(longest_q, longest_k), causal):
        bounds: dict[str, Any] = {"cu_seqlens": cu_seqlens_k, "max_seqlen": longest_k}
        if cu_seqlens_q is not cu_seqlens_k:
            bounds |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": longest_q}
        return _attention(q, k, v, causal=causal, scale=softmax_scale, p=dropout_p, **bounds)
    batch = packed.padded(q, k, v, (cu_seqlens_q, cu_seqlens_k, longest_q, longest_k), causal, window_size)
    out = _attention(batch.q, batch.k, batch.v, mask=batch.visible, scale=softmax_scale, p=dropout_p)
    return packed.unpad(out, batch.of_queries)


def _attention(*tensors: Tensor, **options: Any) -> Tensor:
    from ..kernels.attention import attention  # here: transformers may only ask for the functions, where triton is missing

    return attention(*tensors, **options)


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None and value is not False and not (isinstance(value, (int, float)) and value == 0):
            given = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"{name}: the kernel does not compute it; expected none, got {given}")
