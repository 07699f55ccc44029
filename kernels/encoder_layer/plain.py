"""The layer's fallback: its reference, with the dropout bits that the kernels draw from the same seed."""

import torch
from torch import Tensor

from ..core.launch import accumulator_torch
from ..core.plain_dropout import keep_mask, keep_scores
from .forward import Inputs
from .plan import Plan
from .reference import encoder_layer
from .settings import Layout, Settings, Weights


def keeps(
    seed: Tensor | None, settings: Settings, sequences: int, longest_q: int, longest_k: int, shape: torch.Size
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The three keep masks; `shape` is the result's."""
    p = settings
    scores = None
    if p.attention_p > 0.0:
        scores = keep_scores(seed[0], range(sequences), p.heads, longest_q, longest_k, p.attention_p)
    first = keep_mask(seed[2], shape, p.attention_output_p) if p.attention_output_p > 0.0 else None
    return scores, first, keep_mask(seed[4], shape, p.output_p) if p.output_p > 0.0 else None


def forward(
    x: Tensor,
    weights: Weights,
    settings: Settings,
    layout: Layout,
    product_dtype: torch.dtype | None,
    norm_dtype: torch.dtype | None,
    seed: Tensor | None,
) -> Tensor:
    """The differentiable op."""
    read = x if layout.queries is None else layout.queries
    shape = read.shape if layout.index is None else torch.Size((*x.shape[:-2], len(layout.index), x.shape[-1]))
    sequences = x.shape[0] if layout.cu_seqlens is None else layout.cu_seqlens.shape[0] - 1
    longest = x.shape[1] if layout.cu_seqlens is None else layout.max_seqlen
    longest_q = longest if layout.queries is None else layout.max_seqlen_q
    return encoder_layer(
        x,
        weights,
        settings,
        **layout._asdict(),
        product_dtype=product_dtype,
        norm_dtype=norm_dtype,
        keep=keeps(seed, settings, sequences, longest_q, longest, shape),
    )


def gradients(
    plan: Plan, settings: Settings, dy: Tensor, inputs: Inputs, weights: Weights, seed: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of x, of the queries and of each weight, computed in the kernels' accumulation type; dy is [N, H]."""
    call, wide = plan.call, accumulator_torch(plan.call.product_dtype)
    x, queries = inputs.x, inputs.queries
    if not call.packed:
        x = x.view(call.sequences, call.longest, call.hidden)
    dtypes = [call.dtype, call.dtype, *(weight.dtype for weight in weights)]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        leaves = [None if t is None else t.detach().to(wide).requires_grad_() for t in (x, queries, *weights)]
        layout = Layout(
            *(inputs.key_mask, None, inputs.cu_seqlens, call.longest if call.packed else None),
            *(leaves[1], None if queries is None else inputs.cu_seqlens_q, call.longest_read),
            *(inputs.index, inputs.inverse),
        )
        y = forward(
            leaves[0],
            Weights(*leaves[2:]),
            settings,
            layout,
            *(None, None, seed),
        )
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype).view(y.shape)))
    return tuple(None if leaf is None else next(found).to(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True))
