"""The lanes of attention: q, k and v [B, S, heads, D], a key mask where there is padding, dropout on the probabilities."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.core.peers import Absent, require
from bench.ops.grid import Case, Function, Inputs, Lane, Op
from fastbert.kernels import reference
from fastbert.kernels.attention import attention, bounds_of


def _make(case: Case, generator: torch.Generator, device: str) -> Inputs:
    """Random heads. Gradients of padded rows are zero: nothing reads those outputs."""
    shape = (case.batch, case.seqlen, case.heads, case.hidden // case.heads)
    leaves = {name: torch.randn(shape, generator=generator, device=device) for name in "qkv"}
    dy = torch.randn(shape, generator=generator, device=device)
    lengths = torch.tensor(case.lengths, device=device)
    context: dict[str, Any] = {"lengths": lengths, "key_mask": None, "key_bounds": None, "mask": None}
    starts = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    context |= {"cu_seqlens": starts.to(torch.int32), "max_seqlen": max(case.lengths)}
    if case.fill < 1.0:
        key_mask = torch.arange(case.seqlen, device=device)[None, :] < lengths[:, None]
        context |= {"key_mask": key_mask, "key_bounds": bounds_of(key_mask), "mask": key_mask[:, None, None, :]}
        dy = dy * key_mask[:, :, None, None]
    return Inputs(leaves, context, dy)


def _reference(inputs: Inputs, p: float) -> Tensor:
    return reference.attention(**inputs.leaves, key_mask=inputs.context["key_mask"])


def _scores_in_memory(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """As transformers' eager attention computes it."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), p)
    return (weights @ v).transpose(1, 2)


def _eager(case: Case) -> Function:
    return lambda inputs, p: _scores_in_memory(**inputs.leaves, mask=inputs.context["mask"], p=p)


def _compiled(case: Case) -> Function:
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    call = torch.compile(_scores_in_memory, dynamic=False, backend=backend)
    return lambda inputs, p: call(**inputs.leaves, mask=inputs.context["mask"], p=p)


def _sdpa(case: Case, backend: SDPBackend) -> Function:
    if backend is not SDPBackend.MATH and not torch.cuda.is_available():
        raise Absent("needs a GPU")
    if backend is SDPBackend.FLASH_ATTENTION and case.fill < 1.0:
        raise Absent("SDPA's flash backend takes no padding mask")
    if backend is SDPBackend.FLASH_ATTENTION and case.dtype == "fp32":
        raise Absent("SDPA's flash backend takes no float32")

    def call(inputs: Inputs, p: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs.leaves.values())
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, inputs.context["mask"], p).transpose(1, 2)

    return call


def _flex(case: Case) -> Function:
    if case.p:
        raise Absent("FlexAttention has no dropout")
    require("gpu")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def block_mask(context: dict[str, Any]) -> Any:
        """Made once for each input, outside of what is timed after the first call: it depends on the lengths alone."""
        lengths = context["lengths"]
        if context["key_mask"] is None:
            return None
        if id(lengths) not in masks:

            def real(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return k < lengths[b]

            masks[id(lengths)] = create_block_mask(real, case.batch, None, case.seqlen, case.seqlen, lengths.device)
        return masks[id(lengths)]

    def call(inputs: Inputs, p: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs.leaves.values())
        return attend(q, k, v, block_mask=block_mask(inputs.context)).transpose(1, 2)

    return call


def _flash_attn(case: Case) -> Function:
    require("flash-attn")
    if case.dtype == "fp32":
        raise Absent("flash-attn takes no float32")
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    def padded(inputs: Inputs, p: float) -> Tensor:
        return flash_attn_func(*inputs.leaves.values(), dropout_p=p)

    def packed(inputs: Inputs, p: float) -> Tensor:
        starts, longest = inputs.context["cu_seqlens"], inputs.context["max_seqlen"]
        return flash_attn_varlen_func(*inputs.leaves.values(), starts, starts, longest, longest, dropout_p=p)

    return packed if case.fill < 1.0 else padded


def _fastbert(case: Case) -> Function:
    def call(inputs: Inputs, p: float) -> Tensor:
        context = inputs.context
        return attention(**inputs.leaves, key_mask=context["key_mask"], key_bounds=context["key_bounds"], p=p)

    return call


def _fastbert_packed(case: Case) -> Function:
    if case.fill == 1.0:
        raise Absent("nothing to pack: there is no padding")

    def call(inputs: Inputs, p: float) -> Tensor:
        context = inputs.context
        return attention(**inputs.leaves, cu_seqlens=context["cu_seqlens"], max_seqlen=context["max_seqlen"], p=p)

    return call


def _backend(name: SDPBackend) -> Callable[[Case], Function]:
    return partial(_sdpa, backend=name)


OP = Op(
    _make,
    _reference,
    {
        "eager": Lane(_eager),
        "compile": Lane(_compiled),
        "sdpa math": Lane(_backend(SDPBackend.MATH)),
        "sdpa efficient": Lane(_backend(SDPBackend.EFFICIENT_ATTENTION)),
        "sdpa flash": Lane(_backend(SDPBackend.FLASH_ATTENTION)),
        "sdpa cudnn": Lane(_backend(SDPBackend.CUDNN_ATTENTION)),
        "flex": Lane(_flex),
        "flash-attn": Lane(_flash_attn, packed=True),
        "fastbert": Lane(_fastbert),
        "fastbert packed": Lane(_fastbert_packed, packed=True),
    },
)
