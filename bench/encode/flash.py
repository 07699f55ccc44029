"""Registers torch's FlashAttention-2 kernel as an attention by the name `NAME`, so that sentence-transformers flattens.

sentence-transformers flattens its batches once where the attention's name contains "flash" and transformers finds a function
for sequences of different lengths under it. Here transformers' own path for FlashAttention-2 finds torch's kernel, as it
finds that of the package flash-attn elsewhere. Without a GPU the function
computes one sequence at a time by SDPA, so that a dry run checks the rest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import modeling_flash_attention_utils as utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

NAME = "torch_flash_attention"


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
) -> Tensor:
    """FlashAttention's function of this name: attention within each sequence of the rows [T, heads, D]."""
    if q.is_cuda:
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return torch.ops.aten._flash_attention_forward(q, k, v, *ends, dropout_p, causal, False, scale=softmax_scale)[0]
    sizes = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    pieces = zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]), strict=True)
    rows = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in one), None, dropout_p, causal, scale=softmax_scale)
        for one in pieces
    ]
    return torch.cat([row.transpose(0, 1) for row in rows])


def _no_padded_form(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError(f"{NAME} takes flattened batches only: one without padding came as rows of one length")


@contextmanager
def available() -> Iterator[None]:
    """Let transformers and sentence-transformers find the kernel by its name within the block."""
    imports: Callable[..., Any] = utils._lazy_imports

    def found(implementation: str | None, *others: Any, **more: Any) -> Any:
        if implementation != NAME:
            return imports(implementation, *others, **more)
        return _no_padded_form, flash_attn_varlen_func, None, utils._pad_input, utils._unpad_input

    AttentionInterface.register(NAME, flash_attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    utils._loaded_implementation = None  # transformers keeps the functions of the name that it found last
    try:
        with mock.patch.object(utils, "_lazy_imports", found):
            yield
    finally:
        utils._loaded_implementation = None
