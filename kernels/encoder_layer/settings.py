"""What a layer consists of and what one of its calls is: the types that the other files here share."""

from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """A layer's parameters, all of one dtype. Products' weights are [out, in], as in nn.Linear."""

    query: Tensor  # [H, H]
    query_bias: Tensor  # [H]
    key: Tensor
    key_bias: Tensor
    value: Tensor
    value_bias: Tensor
    attention_output: Tensor  # [H, H]
    attention_output_bias: Tensor
    attention_norm: Tensor  # [H]
    attention_norm_bias: Tensor
    intermediate: Tensor  # [F, H]
    intermediate_bias: Tensor  # [F]
    output: Tensor  # [H, F]
    output_bias: Tensor  # [H]
    output_norm: Tensor
    output_norm_bias: Tensor


class Settings(NamedTuple):
    """A layer's numbers.

    heads: number of heads, of H / heads columns each, up to 256.
    activation: "gelu" (exact), "gelu_tanh", "relu" or "silu".
    attention_eps, output_eps: added to the variance, by the LayerNorm after attention and the one after the feed-forward.
    attention_p: probability of dropping an attention probability.
    attention_output_p, output_p: probability of dropping an element before each LayerNorm's sum.
    causal: each query sees the keys up to its own position.
    scale: of scores; None: 1 / sqrt(H / heads).
    """

    heads: int
    activation: str = "gelu"
    attention_eps: float = 1e-12
    output_eps: float = 1e-12
    attention_p: float = 0.0
    attention_output_p: float = 0.0
    output_p: float = 0.0
    causal: bool = False
    scale: float | None = None

    @property
    def drops(self) -> bool:
        return self.attention_p > 0.0 or self.attention_output_p > 0.0 or self.output_p > 0.0


class Layout(NamedTuple):
    """How the rows of x are arranged and which of them are computed: encoder_layer's arguments of these names."""

    key_mask: Tensor | None = None
    key_bounds: Tensor | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int | None = None
    queries: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int | None = None
    index: Tensor | None = None
    inverse: Tensor | None = None


class Call(NamedTuple):
    """The properties of a call's tensors that decide which kernels run and how; with Settings they identify a plan.

    rows: rows of x, in `sequences` sequences of up to `longest` rows.
    read_rows: rows of the queries or of the index; None without either.
    longest_read: length of the queries' longest sequence; None where attention runs for all rows.
    product_dtype, norm_dtype: see encoder_layer.
    """

    rows: int
    sequences: int
    longest: int
    read_rows: int | None
    longest_read: int | None
    packed: bool
    masked: bool
    hidden: int
    inner: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    product_dtype: torch.dtype
    norm_dtype: torch.dtype | None
    device: torch.device
    precision: str  # torch's precision of float32 products
    gradient: bool
