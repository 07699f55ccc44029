"""The layer in plain PyTorch: the op's definition, and the fallback where a kernel of its backward cannot run."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .settings import Settings, Weights


def encoder_layer(
    x: Tensor,
    weights: Weights,
    settings: Settings,
    *,
    key_mask: Tensor | None = None,
    key_bounds: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    queries: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    index: Tensor | None = None,
    inverse: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    norm_dtype: torch.dtype | None = None,
    keep: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
) -> Tensor:
    """The op of the same name. `keep` holds the keep masks of the three dropouts: of the probabilities, as reference.attention
    takes it, and of the elements before each LayerNorm's sum."""
    w, low = weights, product_dtype or x.dtype
    of_scores, of_attention, of_output = keep or (None, None, None)

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(rows.to(low), weight.to(low), None if bias is None else bias.to(low))

    read = x if queries is None else queries
    q, k, v = (
        product(rows, weight, bias).unflatten(-1, (settings.heads, -1))
        for rows, weight, bias in ((read, w.query, w.query_bias), (x, w.key, w.key_bias), (x, w.value, w.value_bias))
    )
    attended = reference.attention(
        q,
        k,
        v,
        key_mask=key_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        causal=settings.causal,
        scale=settings.scale,
        p=settings.attention_p,
        keep=of_scores,
    ).flatten(-2)
    if index is not None:
        attended, read = (reference.gather_rows(rows, index, inverse) for rows in (attended, read))
    y = reference.dropout_add_layernorm(
        product(attended, w.attention_output),
        read,
        w.attention_norm,
        w.attention_norm_bias,
        x_bias=w.attention_output_bias,
        eps=settings.attention_eps,
        p=settings.attention_output_p,
        out_dtype=norm_dtype,
        keep=of_attention,
    )
    inner = reference.bias_gelu(product(y, w.intermediate), w.intermediate_bias, activation=settings.activation)
    return reference.dropout_add_layernorm(
        product(inner, w.output),
        y,
        w.output_norm,
        w.output_norm_bias,
        x_bias=w.output_bias,
        eps=settings.output_eps,
        p=settings.output_p,
        out_dtype=norm_dtype,
        keep=of_output,
    )
