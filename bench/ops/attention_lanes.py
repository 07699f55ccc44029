"""Peers of attention: q, k and v [B, S, heads, D], a key mask if there is padding, dropout on the probabilities."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.core.peers import Absent, require
from bench.ops.grid import Case, Function, Inputs, Lane
from fastbert.kernels.attention import attention


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
            return F.scaled_dot_product_attention(q, k, v, inputs.peers["mask"], p).transpose(1, 2)

    return call


def _flex(case: Case) -> Function:
    if case.p:
        raise Absent("FlexAttention has no dropout")
    require("gpu")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def block_mask(given: dict[str, Any]) -> Any:
        """The mask of the given lengths. Built once per input, in the first call and therefore outside the timed ones."""
        lengths = given["lengths"]
        if given["mask"] is None:
            return None
        if id(lengths) not in masks:

            def real(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return k < lengths[b]

            masks[id(lengths)] = create_block_mask(real, case.batch, None, case.seqlen, case.seqlen, lengths.device)
        return masks[id(lengths)]

    def call(inputs: Inputs, p: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs.leaves.values())
        return attend(q, k, v, block_mask=block_mask(inputs.peers)).transpose(1, 2)

    return call


def _flash_attn(case: Case) -> Function:
    require("flash-attn")
    if case.dtype == "fp32":
        raise Absent("flash-attn takes no float32")
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    def padded(inputs: Inputs, p: float) -> Tensor:
        return flash_attn_func(*inputs.leaves.values(), dropout_p=p)

    def packed(inputs: Inputs, p: float) -> Tensor:
        starts, longest = inputs.peers["cu_seqlens"], inputs.peers["max_seqlen"]
        return flash_attn_varlen_func(*inputs.leaves.values(), starts, starts, longest, longest, dropout_p=p)

    return packed if case.fill < 1.0 else padded


def _fastbert_packed(case: Case) -> Function:
    if case.fill == 1.0:
        raise Absent("nothing to pack: there is no padding")

    def call(inputs: Inputs, p: float) -> Tensor:
        bounds, longest = inputs.peers["cu_seqlens"], inputs.peers["max_seqlen"]
        return attention(**inputs.leaves, cu_seqlens=bounds, max_seqlen=longest, p=p)

    return call


def _backend(name: SDPBackend) -> Callable[[Case], Function]:
    return partial(_sdpa, backend=name)


PEERS = {
    "sdpa math": Lane(_backend(SDPBackend.MATH)),
    "sdpa efficient": Lane(_backend(SDPBackend.EFFICIENT_ATTENTION)),
    "sdpa flash": Lane(_backend(SDPBackend.FLASH_ATTENTION)),
    "sdpa cudnn": Lane(_backend(SDPBackend.CUDNN_ATTENTION)),
    "flex": Lane(_flex),
    "flash-attn": Lane(_flash_attn, packed=True),
}
PACKED = {"fastbert packed": Lane(_fastbert_packed, packed=True)}
